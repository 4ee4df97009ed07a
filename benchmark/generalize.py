"""
How far does an embedding carry?  python eval.py out/... --split test --generalize [PARTS]

    labels    probes fitted to 1, 2, 5, .. 100% of the training runs, or of their windows, as the
              paper does (`--fractions windows`); the mean of several draws of them
    values    probes fitted without some values of a parameter, and scored on these: every second
              one (`between`), or the smallest and the largest (`outside`)
    inputs    probes fitted to clean fields, scored on noisy ones, in units of a channel's std, and
              on fields at half resolution

Probes choose on valid, without the held-out values. The attentive one is fitted once, for the table
and for `inputs`.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

import probe

FRACTIONS = 0.01, 0.02, 0.05, 0.1, 0.2, 0.5             # of the labels; 1 is measured anyway
PARTS = 'labels', 'values', 'inputs'
INPUTS = 'noise 0.1', 'noise 0.3', 'noise 1', 'half resolution'
STEPS = 300                                             # at least, of the attentive probe
DRAWS = 6                                               # of the runs, or windows, with labels

def spoilt(x, how, std, seeds):
    """Raw windows (B, C, T, H, W), spoilt as one of INPUTS, or as they are if `how` is ''.
    std: (C,), of the channels. seeds: of the noise, one for each window.
    """
    if how.startswith('noise'):
        noise = torch.stack([torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed))
                             for seed in seeds])
        return x + float(how.split()[1]) * torch.as_tensor(std).view(-1, 1, 1, 1) * noise
    if how == 'half resolution':
        coarse = F.avg_pool2d(x.flatten(0, 1), 2)                        # (B * C, T, H / 2, W / 2)
        return F.interpolate(coarse, size=x.shape[3:], mode='bilinear').view_as(x)
    return x

def gather(sets, index, folder):
    """Tokens (n, N, D) at `index` (m,) of each of `sets`, one after the other: probe.room_for."""
    if len(sets) == 1 and sets[0].shape[1] == 1:         # means: they are few, and stay as they are
        return sets[0][index]
    room = probe.room_for(len(sets) * len(index), *sets[0].shape[1:], folder)
    for i, tokens in enumerate(sets):
        for first in range(0, len(index), 64):
            part = index[first:first + 64]
            room[i * len(index) + first:][:len(part)] = tokens[part]
    return room

def held_out_values(values):
    """{'between' or 'outside': which of the values (n,) are held out}; {} if they are too few."""
    distinct = np.unique(values)
    return {'between': distinct[1:-1:2], 'outside': distinct[[0, -1]]} if len(distinct) > 3 else {}

def mean_errors(estimates, targets):
    """{probe: mean squared error} of {probe: (n, L)}."""
    return {p: (e - targets).pow(2).mean().item() for p, e in estimates.items()}

def epochs_for(windows):
    """Epochs of the attentive probe on so many training windows: at least STEPS steps."""
    return math.ceil(STEPS / math.ceil(windows / probe.BATCH))

def measure(sets, fit, parts, runs, orders, scored, folder, trained):
    """({probe: estimates (n, L) of the scored split}, {one of `parts`: what eval.json says of it}).

    sets: {a split, or one of INPUTS: (tokens, labels)}. fit(splits, attentive, epochs) estimates
    splits['scored']: {probe: (n, L)}. trained: else the attentive probe is fitted once.
    """
    clean = {'train': sets['train'], 'valid': sets['valid'], 'scored': sets[scored]}
    clean |= {'unlabelled': sets['unlabelled']} if 'unlabelled' in sets else {}
    y, inputs = sets[scored][1], [how for how in INPUTS if how in sets]  # (n, L)

    # the probes are fitted once for clean and spoilt fields
    tokens = gather([sets[name][0] for name in (scored, *inputs)], torch.arange(len(y)), folder)
    splits = clean | {'scored': (tokens, y.repeat(1 + len(inputs), 1))}
    by_input = {p: e.split(len(y)) for p, e in fit(splits, attentive=True).items()}
    estimates = {p: e[0] for p, e in by_input.items()}

    errors = [mean_errors({p: e[i] for p, e in by_input.items() if trained or p != 'attentive'}, y)
              for i in range(1 + len(inputs))]
    found = {'inputs': dict(zip(inputs, errors[1:]))} if inputs else {}

    # the other probes, fitted many times, read mean tokens: (n, 1, D)
    clean = {name: (probe.mean_tokens(x)[:, None], labels) for name, (x, labels) in clean.items()}
    if 'labels' in parts:
        found['labels'] = with_fewer_labels(clean, fit, orders, runs, folder) | {'1': errors[0]}
    if 'values' in parts:
        found['values'] = at_unseen_values(clean, fit, estimates, folder)
    return estimates, found

def with_fewer_labels(clean, fit, orders, runs, folder):
    """{fraction: {probe: error}} of probes fitted to a part of the training windows: over draws.

    orders: for each draw, numbers of runs; the first are taken with all their windows. runs: (n,),
    the run of each training window; None if the orders are of windows.
    """
    errors, (tokens, labels) = {}, clean['train']
    runs = np.arange(len(labels)) if runs is None else runs
    for fraction in FRACTIONS:
        found = []
        for order in orders:
            taken = order[:max(1, round(fraction * len(order)))]
            index = torch.as_tensor(np.flatnonzero(np.isin(runs, taken)))

            # the other windows have tokens all the same
            few = {'train': (gather([tokens], index, folder), labels[index])}
            splits = {**clean, **few, 'unlabelled': clean.get('unlabelled', clean['train'])}
            found.append(mean_errors(fit(splits, attentive=False), clean['scored'][1]))
        errors[f'{fraction:g}'] = {p: np.mean([e[p] for e in found]) for p in found[0]}
    return errors

def at_unseen_values(clean, fit, estimates, folder):
    """{'between' or 'outside': {probe: [error at values it has not seen, of one that has]}}.

    Means over the labels with enough values. estimates: {probe: (n, L)}, of probes that saw all.
    """
    found = {}
    for label, column in enumerate(clean['train'][1].T):
        for values, held_out in held_out_values(column.numpy()).items():
            # train and valid lose the windows with these values; of the scored ones, they stay
            splits = {}
            for name, (tokens, y) in clean.items():
                out = np.isin(y[:, label].numpy(), held_out)
                index = torch.as_tensor(np.flatnonzero(out == (name == 'scored')))
                splits[name] = gather([tokens], index, folder), y[index]

            truth = y[index, label]                                      # of the scored split
            for p, e in fit(splits, attentive=False).items():
                errors = [(e[:, label] - truth).pow(2).mean().item(),
                          (estimates[p][index, label] - truth).pow(2).mean().item()]
                found.setdefault(values, {}).setdefault(p, []).append(errors)
    return {values: {p: np.mean(pairs, 0).tolist() for p, pairs in by_probe.items()}
            for values, by_probe in found.items()}

def number(error):
    """An error in a table: a probe that extrapolates may be far off."""
    return f'{error:.3f}' if error < 100 else f'{error:,.0f}'

def print_carried(result):
    """Print what eval.json says of `generalization`: a line for each encoder and probe."""
    found = result['generalization']
    parts = {part: dict.fromkeys(how for carried in found.values() for how in carried.get(part, ()))
             for part in PARTS}
    print(f'\n{result["row"]}: means over parameters, by the share of training '
          f'{result["probe"]["fractions"]} with labels; at values unseen by the probe (seen); on '
          f'spoilt fields\n')

    rows = {'': [*(f'{float(share):.0%}' for share in parts['labels']),
                 *(f'{value} (seen)' for value in parts['values']), *parts['inputs']]}
    for title, carried in found.items():
        probes = [p for part in carried.values() for errors in part.values() for p in errors]

        # '-' where a probe was not tried
        for p in dict.fromkeys(probes):
            texts = rows[f'{title}, {p}'] = []
            for part, hows in parts.items():
                errors = [carried.get(part, {}).get(how, {}).get(p) for how in hows]
                texts += ['-' if e is None else '{} ({})'.format(*map(number, e))
                          if part == 'values' else number(e) for e in errors]

    widths = [max(8, 2 + len(column)) for column in rows['']]
    for title, row in rows.items():
        print(f'{title:{max(map(len, rows)) + 2}}', end='')
        print(*(f'{cell:>{width}}' for cell, width in zip(row, widths)), sep='')
