"""
How far does an embedding carry? The probes of eval.py with fewer labels, at unseen parameters, on spoilt fields.

    python eval.py out/... --split test --generalize

    labels     probes fitted to 1, 2, 5, .. 100% of the training runs: whole runs, each smaller set a part of the larger
               ones, spread over the parameters (data.spread_runs); --fractions windows draws windows, as the paper does
    values     probes fitted without some values of a parameter, and scored on these: every second one (`between`), or
               the smallest and the largest (`outside`); beside it, the same windows by probes that saw all values
    inputs     probes fitted to clean fields, scored on noisy ones (white noise, in units of the std that a channel is
               normalised by), and on fields at half resolution (2 x 2 points averaged, and interpolated back to the
               encoder's size)

Probes choose their settings on valid, all of it but for held-out values, whatever split is scored. The attentive one is
fitted to the trained encoder alone, and not for `values`.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

import probe

FRACTIONS = 0.01, 0.02, 0.05, 0.1, 0.2, 0.5                              # of the labels; all are measured anyway
INPUTS = 'noise 0.1', 'noise 0.3', 'noise 1', 'half resolution'
STEPS = 300                                                              # at least, of the attentive probe
LEAST_VALUES = 4                                                         # of a parameter, to hold some out


def spoilt(x, how, std, seeds):
    """Raw windows (B, C, T, H, W) as one of INPUTS, or as they are if `how` is ''. std: (C,) of the channels."""
    if how.startswith('noise'):
        drawn = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return x + float(how.split()[1]) * torch.as_tensor(std).view(-1, 1, 1, 1) * torch.stack(drawn)
    if how == 'half resolution':
        B, C, T, H, W = x.shape
        coarse = F.avg_pool2d(x.reshape(B * C, T, H, W), 2)
        return F.interpolate(coarse, size=(H, W), mode='bilinear').view_as(x)
    return x


def some(tokens, index, folder):
    """The windows of tokens (n, N, D) at `index` (m,) -> (m, N, D), in memory or in a file as `probe.room_for` says."""
    room = probe.room_for(len(index), *tokens.shape[1:], folder)
    for first in range(0, len(index), 64):
        room[first:first + 64] = tokens[index[first:first + 64]]
    return room


def joined(parts, folder):
    """Tokens (n, N, D) of several sets, one after the other."""
    room, first = probe.room_for(sum(map(len, parts)), *parts[0].shape[1:], folder), 0
    for part in parts:
        room[first:first + len(part)] = part
        first += len(part)
    return room


def kept(split, index, folder):
    """(tokens, labels) of the windows at `index`."""
    return some(split[0], index, folder), split[1][index]


def held_out(values):
    """{'between' or 'outside': those of the values (n,) that are held out}; {} if there are too few of them."""
    distinct = np.unique(values)
    return {} if len(distinct) < LEAST_VALUES else {'between': distinct[1:-1:2], 'outside': distinct[[0, -1]]}


def mean_errors(estimates, targets):
    """{probe: mean squared error} of {probe: (n, L)}."""
    return {p: (e - targets).pow(2).mean().item() for p, e in estimates.items()}


def epochs_for(windows):
    """Epochs of the attentive probe on a part of the training windows: STEPS steps, at least."""
    return math.ceil(STEPS / math.ceil(windows / probe.BATCH))


def measure(sets, fit, runs, order, scored, folder, trained):
    """({probe: estimates (n, L) of the scored split}, what eval.json says of `generalization`).

    sets: {a split, or one of INPUTS: (tokens, labels)}. fit: the function (splits, attentive: bool, epochs) -> {probe:
    estimates of splits['scored']}. runs, order: as `labels` has them. trained: else the attentive probe is fitted to
    clean fields with all labels alone.
    """
    clean, y = {'train': sets['train'], 'valid': sets['valid'], 'scored': sets[scored]}, sets[scored][1]
    everything = joined([sets[name][0] for name in (scored, *INPUTS)], folder), y.repeat(1 + len(INPUTS), 1)
    by_input = {p: e.split(len(y)) for p, e in fit({**clean, 'scored': everything}, True, 0).items()}
    estimates = {p: e[0] for p, e in by_input.items()}
    own = {p: e for p, e in by_input.items() if trained or p != 'attentive'}
    return estimates, {
        'labels': labels(clean, fit, order, runs, folder, trained)
        | {'1': mean_errors({p: estimates[p] for p in own}, y)},
        'values': values(clean, fit, estimates, folder),
        'inputs': {how: mean_errors({p: e[1 + i] for p, e in own.items()}, y) for i, how in enumerate(INPUTS)}}


def labels(clean, fit, order, runs, folder, trained):
    """{fraction: {probe: error}} of probes fitted to a part of the training windows.

    order: numbers of runs, of which the first are taken with all their windows; runs: (n,) of the training windows. If
    runs is None, order is of windows.
    """
    found = {}
    for fraction in FRACTIONS:
        taken = order[:max(1, round(fraction * len(order)))]
        index = torch.as_tensor(np.flatnonzero(np.isin(runs, taken)) if runs is not None else np.sort(taken))
        part = {**clean, 'train': kept(clean['train'], index, folder)}
        found[f'{fraction:g}'] = mean_errors(fit(part, trained, epochs_for(len(index))), clean['scored'][1])
    return found


def values(clean, fit, estimates, folder):
    """{'between' or 'outside': {probe: [error at values it has not seen, of one that has seen them all]}}.

    Means over the labels with enough values: a label's error is that of the windows whose own value was held out.
    """
    found = {}
    for label, column in enumerate(clean['train'][1].T):
        for where, held in held_out(column.numpy()).items():
            out = {name: torch.as_tensor(np.isin(y[:, label].numpy(), held)) for name, (_, y) in clean.items()}
            part = {name: kept(split, torch.nonzero(out[name] == (name == 'scored'))[:, 0], folder)
                    for name, split in clean.items()}
            unseen, truth = fit(part, False, 0), part['scored'][1][:, label]
            for p, e in unseen.items():
                errors = [(e[:, label] - truth).pow(2).mean().item(),
                          (estimates[p][out['scored'], label] - truth).pow(2).mean().item()]
                found.setdefault(where, {}).setdefault(p, []).append(errors)
    return {where: {p: np.mean(errors, 0).tolist() for p, errors in by_probe.items()}
            for where, by_probe in found.items()}
