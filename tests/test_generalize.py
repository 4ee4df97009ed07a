"""generalize.py: fewer labels, values that a probe has not seen, spoilt fields; encoders trained with fewer labels."""
import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import probe
import train
from benchmark import generalize, report
from benchmark.generalize import INPUTS, held_out_values, spoilt
from helpers import ACTIVE, TINY
from model import load_checkpoint
from test_eval import seeing_all


# ---------------------------------------------------------------------------------------------
# which runs

GRID = np.array([(a, b) for a in range(5) for b in range(3) for _ in range(2)], float)             # two runs of each


def test_the_first_few_runs_are_spread_over_the_labels():
    """Each is the farthest from all before it, whatever the labels' units; twins come when all others have had their
    first."""
    for seed in range(3):
        order = data.spread_runs(GRID, seed)
        assert sorted(order) == list(range(30))
        first, second = ({tuple(GRID[run]) for run in part} for part in (order[:15], order[15:]))
        assert len(first) == len(second) == 15
        assert np.array_equal(data.spread_runs(GRID * [2**-10, 64], seed), order)
        z = (GRID - GRID.mean(0)) / GRID.std(0)
        away = lambda run, n: np.linalg.norm(z[order[:n]] - z[run], axis=1).min()
        for n in range(1, 15):
            assert away(order[n], n) == pytest.approx(max(away(run, n) for run in range(30)))
        assert len({tuple(GRID[run]) for run in order[:5]} & {(0, 0), (0, 2), (4, 0), (4, 2)}) >= 3   # corners


def test_a_seed_chooses_the_first_run_and_among_twins():
    orders = [data.spread_runs(GRID, seed) for seed in range(8)]
    assert all(np.array_equal(order, data.spread_runs(GRID, seed)) for seed, order in enumerate(orders))
    assert len({order[0] // 2 for order in orders}) > 2 and len({order[15] // 2 for order in orders}) > 2
    assert {run % 2 for order in orders for run in order[:15] if run < 10} == {0, 1}


def test_a_share_of_the_runs_is_part_of_a_larger_one(well):
    """One at least; rounded."""
    split = data.Split(well / 'active_matter', ACTIVE, 'train', 32, progress=False, whole=True)
    assert len(split.runs) == 6
    sizes = {0.001: 1, 0.24: 1, 0.26: 2, 0.5: 3, 0.75: 4, 0.9: 5, 1.0: 6}
    for seed in 0, 1:
        chosen = [split.labelled(fraction, seed).tolist() for fraction in sizes]
        assert [len(runs) for runs in chosen] == list(sizes.values())
        assert all(runs == chosen[-1][:len(runs)] for runs in chosen)
        labels = split.labels(split.varying())
        assert len({tuple(labels[run]) for run in chosen[3]}) == 3       # all the pairs there are
    assert split.labelled(1.0, 0).tolist() != split.labelled(1.0, 3).tolist()


def test_values_are_held_out_between_or_outside():
    of = lambda *values: {where: held.tolist() for where, held in held_out_values(np.array(values)).items()}
    assert of(3, 1, 2, 4, 5, 7, 6, 1, 3) == {'between': [2, 4, 6], 'outside': [1, 7]}
    assert of(4, 3, 2, 1, 1) == {'between': [2], 'outside': [1, 4]}
    assert of(1, 2, 3, 3, 2) == {}


# ---------------------------------------------------------------------------------------------
# what probes are given

class Fit:
    """It keeps what it is given, and estimates each label of what is scored as its mean token, plus `off`."""

    def __init__(self, off=0.0):
        self.asked, self.off = [], off

    def __call__(self, splits, attentive=True, epochs=0):
        assert list(splits)[:3] == ['train', 'valid', 'scored'] and {*list(splits)[3:]} <= {'unlabelled'}
        self.asked.append((splits, attentive, epochs))
        means = splits['scored'][0].mean(1) + self.off
        return {p: means + i for i, p in enumerate(['linear', 'knn'] + ['attentive'] * attentive)}


def windows(labels, runs, each=3):
    """(tokens (n, 2, L), labels (n, L)) of `runs` runs, of which a token says the labels and the window's number."""
    y = torch.tensor(labels, dtype=torch.float64)[:runs].repeat_interleave(each, 0)
    return torch.stack([y, y + torch.arange(len(y))[:, None]], 1), y


def test_fewer_labels_are_those_of_whole_runs(tmp_path):
    """All windows of the first runs of each order and no others, scaled by all training tokens; means over orders."""
    y = np.random.default_rng(0).normal(size=(40, 2))
    clean = {'train': windows(y, 40), 'valid': windows(y, 5), 'scored': windows(y, 7, each=1)}
    runs, orders = np.repeat(np.arange(40), 3), [np.random.default_rng(i).permutation(40) for i in (1, 2)]
    fit = Fit(0.5)
    found = generalize.with_fewer_labels(clean, fit, orders, runs, tmp_path)
    counts = dict(zip(('0.01', '0.02', '0.05', '0.1', '0.2', '0.5'), (1, 1, 2, 4, 8, 20)))
    assert list(found) == list(counts) and len(fit.asked) == 12
    tokens, labels = clean['train']
    for (splits, attentive, _), (count, order) in zip(fit.asked, product(counts.values(), orders)):
        mine = np.isin(runs, order[:count])
        assert torch.equal(splits['train'][0], tokens[mine].float()) and torch.equal(splits['train'][1], labels[mine])
        assert splits['valid'] is clean['valid'] and splits['scored'] is clean['scored'] and not attentive
        assert splits['unlabelled'] is clean['train']
    estimates = clean['scored'][0].mean(1) + 0.5
    for errors in found.values():
        assert errors == {p: pytest.approx((estimates + i - clean['scored'][1]).pow(2).mean().item())
                          for i, p in enumerate(('linear', 'knn'))}
    fit = Fit()
    fit.__class__ = type('Odd', (Fit,), {'__call__': lambda self, *a, **k: {
        p: e + len(self.asked) % 2 for p, e in Fit.__call__(self, *a, **k).items()}})     # the first draw is one off
    by_hand = [(clean['scored'][0].mean(1) + i - clean['scored'][1]).pow(2).mean().item() for i in (1, 0)]
    assert generalize.with_fewer_labels(clean, fit, orders, runs, tmp_path)['0.1']['linear'] == pytest.approx(np.mean(by_hand))
    one = Fit()
    generalize.with_fewer_labels(clean, one, [np.random.default_rng(2).permutation(120)], None, tmp_path)
    drawn = np.random.default_rng(2).permutation(120)[:24]               # a fifth of the windows
    assert torch.equal(one.asked[4][0]['train'][0], tokens[np.sort(drawn)].float()) and not one.asked[4][1]


def test_probes_do_not_see_values_that_are_held_out(tmp_path):
    """Neither to fit nor to choose by; the errors are of the label that was held out, at its held-out values alone."""
    y = np.array([(a, b, c) for a in range(5) for b in (0, 1) for c in range(4)], float)
    sets = {'train': windows(y, 40), 'valid': windows(y, 40, each=2), 'scored': windows(y[::-1].copy(), 40, each=1)}
    off = torch.tensor([0.5, 1.0, 2.0])
    fit, full = Fit(off), torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    found = generalize.at_unseen_values(sets, fit, {'linear': full, 'knn': full + 1}, tmp_path)
    held = {('between', 0): {1, 3}, ('outside', 0): {0, 4}, ('between', 2): {1}, ('outside', 2): {0, 3}}
    errors = {'between': [], 'outside': []}
    assert len(fit.asked) == len(held) and set(found) == set(errors)     # two values of the second are too few
    for ((where, label), out), (splits, attentive, _) in zip(held.items(), fit.asked):
        is_out = {name: np.isin(split[1][:, label], list(out)) for name, split in sets.items()}
        for name, (tokens, labels) in splits.items():
            kept = is_out[name] == (name == 'scored')
            assert torch.equal(labels, sets[name][1][kept]) and torch.equal(tokens, sets[name][0][kept].float())
        assert not attentive
        truth = splits['scored'][1][:, label]
        own = lambda estimates: (estimates[:, label] - truth).pow(2).mean().item()
        errors[where].append([[own(splits['scored'][0].mean(1) + off + i), own(full[is_out['scored']] + i)]
                              for i in (0, 1)])
    for where, pairs in errors.items():
        assert [found[where][p] for p in ('linear', 'knn')] == pytest.approx(np.mean(pairs, 0))
    assert generalize.at_unseen_values({name: (x, z[:, 1:2]) for name, (x, z) in sets.items()}, fit, {}, tmp_path) == {}


@pytest.mark.parametrize('scored', ['valid', 'test'])
@pytest.mark.parametrize('trained', [True, False])
def test_spoilt_fields_are_scored_by_probes_of_clean_ones(tmp_path, scored, trained):
    """Each way with its own estimates; probes are fitted to clean windows, and choose on clean ones, once for all."""
    y = np.random.default_rng(0).normal(size=(9, 2))
    sets = {'train': windows(y, 9), 'valid': windows(y, 6), 'test': windows(y, 4)}
    tokens, labels = sets[scored]
    for i, how in enumerate(INPUTS, 1):
        sets[how] = tokens + 10 * i, labels
    fit = Fit()
    runs, orders = np.repeat(np.arange(9), 3), [np.arange(9)] * 2
    estimates, found = generalize.measure(sets, fit, generalize.PARTS, runs, orders, scored, tmp_path, trained)
    probes = ['linear', 'knn', 'attentive']
    assert list(estimates) == probes and torch.equal(estimates['knn'], tokens.float().mean(1) + 1)
    splits, attentive, epochs = fit.asked[0]
    assert splits['train'] is sets['train'] and splits['valid'] is sets['valid'] and attentive and epochs == 0
    assert torch.equal(splits['scored'][1], labels.repeat(5, 1)) and len(splits['scored'][0]) == 5 * len(labels)
    own = probes if trained else probes[:2]
    assert sorted(found) == ['inputs', 'labels', 'values'] and list(found['inputs']) == list(INPUTS)
    for i, how in enumerate(INPUTS, 1):
        errors = {p: (estimates[p] + 10 * i - labels).pow(2).mean().item() for p in own}
        assert found['inputs'][how] == pytest.approx(errors, rel=1e-5)
    assert list(found['labels']) == ['0.01', '0.02', '0.05', '0.1', '0.2', '0.5', '1']
    assert found['labels']['1'] == {p: pytest.approx((estimates[p] - labels).pow(2).mean().item()) for p in own}
    assert [attentive for _, attentive, _ in fit.asked] == [True] + [False] * (6 * 2 + 4)   # draws; two labels
    for parts in generalize.PARTS:
        asked = sets if parts == 'inputs' else {name: sets[name] for name in ('train', 'valid', 'test')}
        assert list(generalize.measure(asked, fit, parts, runs, orders, scored, tmp_path, trained)[1]) == [parts]
    for part, _, _ in fit.asked[1:17]:
        assert len(part['scored'][1]) <= len(labels) and len(part['valid'][1]) <= len(sets['valid'][1])


# ---------------------------------------------------------------------------------------------
# spoilt fields

def test_noise_is_of_each_channels_size():
    """A window's own, whatever batch it is in."""
    x, std = torch.zeros(3, 2, 16, 32, 32) + torch.tensor([0.0, 5.0]).view(2, 1, 1, 1), np.float32([1, 100])
    noisy = spoilt(x, 'noise 0.3', std, [4, 5, 6]) - x
    assert (noisy.std((0, 2, 3, 4)) / (0.3 * torch.tensor(std)) - 1).abs().max() < 0.02
    assert (noisy.mean((0, 2, 3, 4)) / torch.tensor(std)).abs().max() < 0.01
    assert torch.equal(spoilt(x[1:2], 'noise 0.3', std, [5]) - x[1:2], noisy[1:2])
    assert torch.corrcoef(noisy[:, 0].flatten(1)).fill_diagonal_(0).abs().max() < 0.03
    assert torch.allclose(spoilt(x, 'noise 1', std, [4, 5, 6]) - x, noisy / 0.3, atol=1e-4)
    assert spoilt(x, '', std, [4, 5, 6]) is x


def test_half_resolution_keeps_what_is_coarse():
    """Its mean and slow waves; a chequerboard is gone."""
    i, j = torch.meshgrid(torch.arange(64), torch.arange(32), indexing='ij')
    chequered = ((i + j) % 2 * 2.0 - 1).expand(1, 2, 3, 64, 32)
    slow = torch.sin(2 * math.pi * i / 64).expand(1, 2, 3, 64, 32)
    x = torch.randn(2, 2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    half = lambda x: spoilt(x, 'half resolution', np.ones(2), [0, 1])
    assert half(x).shape == x.shape and torch.allclose(half(x).mean((-2, -1)), x.mean((-2, -1)), atol=1e-6)
    assert torch.allclose(half(3 + chequered), torch.full_like(chequered, 3.0), atol=1e-6)
    assert (half(slow) - slow)[..., 1:-1, :].abs().max() < 0.01 and half(x).std() < 0.5 * x.std()
    assert torch.equal(half(x)[1:], half(x[1:])) and torch.equal(half(x)[:, :1], half(x[:, :1]))


def test_an_encoder_sees_spoilt_windows_of_the_split_that_is_scored(trained):
    """Noise in units of each channel's spread, for encoders of raw fields, too; one for each window."""
    noises = []
    for batch, normalised in (3, True), (16, True), (16, False):
        run = evaluation.Run(trained, evaluation.Settings(stride=24, batch=batch))
        model = seeing_all(run)
        _, std = run.splits['train'].normalization(True)
        if not normalised:
            model.mean.zero_()
            model.std.fill_(1.0)
        encode = run.encode(model, noise=0.0)
        clean, found = run.embed(encode, run.name), run.embed(encode, run.name, 'noise 1', ('valid',))
        assert list(found) == ['valid'] and torch.equal(found['valid'][1], clean['valid'][1])
        noise = (found['valid'][0] - clean['valid'][0]) / (1 if normalised else torch.tensor(std)[:, None])
        noises.append(noise.movedim(1, -1).flatten(1))
    assert torch.equal(noises[0], noises[1]) and torch.allclose(noises[2], noises[1], atol=1e-3)
    assert noises[0].std() == pytest.approx(1, rel=0.02)
    assert torch.corrcoef(noises[0]).fill_diagonal_(0).abs().max() < 0.03
    for seed in 0, 1:
        run.c.seed = seed
        noises.append((run.embed(encode, run.name, 'noise 1', ('valid',))['valid'][0] - clean['valid'][0]).flatten())
    assert torch.corrcoef(torch.stack(noises[-2:]))[0, 1].abs() < 0.9


# ---------------------------------------------------------------------------------------------
# eval.py and train.py

def evaluated(out, *flags):
    evaluation.main([str(out), '--epochs', '2', '--stride', '24', *flags])
    return json.loads((out / 'eval.json').read_text())


@pytest.mark.parametrize('split', ['valid', 'test'])
def test_how_an_encoder_carries_is_beside_its_errors(trained, tmp_path, monkeypatch, capsys, split):
    """Which stay what they were; and report.py finds what it needs."""
    (tmp_path / 'ckpt.pt').write_bytes((trained / 'ckpt.pt').read_bytes())
    without, found = (evaluated(tmp_path, '--split', split, *flags) for flags in ([], ['--generalize']))
    assert 'generalization' not in without and found['probe']['generalize'] and not without['probe']['generalize']
    for row, by_probe in without['rows'].items():
        for p, errors in by_probe.items():
            assert found['rows'][row][p] == pytest.approx(errors, rel=1e-4, abs=1e-6), (row, p)
    carried = found['generalization']
    simple = ['linear', 'knn']
    probes = {'JEPA': ['attentive', *simple], 'random init': simple, 'field statistics': simple}
    assert list(carried) == list(probes)
    for row, own in probes.items():
        assert list(carried[row]['labels']) == ['0.01', '0.02', '0.05', '0.1', '0.2', '0.5', '1']
        assert list(carried[row]['inputs']) == list(INPUTS) and carried[row]['values'] == {}         # too few of them
        for part in 'labels', 'inputs':
            for share, errors in carried[row][part].items():             # of a part of the labels by the quick probes
                assert list(errors) == (simple if part == 'labels' and share != '1' else own)
                assert all(map(math.isfinite, errors.values()))
        assert carried[row]['labels']['1'] == {p: pytest.approx(found['rows'][row][p]['mean']) for p in own}
        assert carried[row]['labels']['0.01'] == carried[row]['labels']['0.1']                         # one of six runs
        assert carried[row]['labels']['0.01'] != carried[row]['labels']['0.5'] != carried[row]['labels']['1']
        assert carried[row]['inputs']['noise 1'] != carried[row]['inputs']['noise 0.1']
    said = capsys.readouterr().out.partition('by the share of training runs')[2]
    lines = {line.partition('  ')[0]: line.split() for line in said.splitlines()}
    for row, p in ((row, p) for row, own in probes.items() for p in own):
        by = carried[row]
        shown = [f'{errors[p]:.3f}' if p in errors else '-' for part in ('labels', 'inputs') for errors in by[part].values()]
        assert lines[f'{row}, {p}'][-11:] == shown
    if split == 'test':
        (tmp_path / 'active_matter-jepa-nano-vicreg-seed0.json').write_text(json.dumps(found))
        assert '| JEPA | linear | {:.3f} | '.format(carried['JEPA']['labels']['0.01']['linear']) in \
            report.labels_table(report.read_cells(tmp_path), 'active_matter')
        assert '| {:.3f} |'.format(carried['field statistics']['inputs']['half resolution']['linear']) in \
            report.carried_table(report.read_cells(tmp_path), 'active_matter')


def test_fractions_are_of_runs_or_of_windows(trained, monkeypatch, capsys):
    monkeypatch.setattr(generalize, 'measure', lambda sets, fit, *settings: settings)
    run = evaluation.Run(trained, evaluation.Settings(stride=16))
    asked = lambda seed=0, **flags: (setattr(run.c, 'seed', seed), evaluation.probe_row(
        run, evaluation.Settings(generalize='labels', **flags), {}, None, True))[1]
    parts, runs, orders, scored, folder, trained = asked()
    assert parts == 'labels' and np.array_equal(runs, run.windows['train'][:, 0])
    assert (scored, folder, trained) == ('valid', run.path.parent, True)
    assert np.array_equal(orders[0], run.splits['train'].labelled(1.0, 0))
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders) == 6
    assert not np.array_equal(orders[1], asked(seed=1)[2][1])            # nor are draws alike between seeds
    run.c.label_fraction = 0.5
    assert len(asked()[2]) == 1                                          # no others are known
    run.c.label_fraction = 1.0
    _, runs, orders, *_ = asked(fractions='windows')
    assert runs is None and all(np.array_equal(np.sort(order), np.arange(len(run.windows['train']))) for order in orders)
    assert len({tuple(order) for order in [*orders, asked(seed=1, fractions='windows')[2][0]]}) == 7
    with pytest.raises(SystemExit) as left:
        evaluation.main(['--fractions', 'files'])
    assert left.value.code == 2 and "not 'files'" in capsys.readouterr().err.splitlines()[-1]


def test_few_windows_are_probed_in_as_many_steps_by_whatever_encoder(trained):
    """As --generalize does for a share: 130 windows are three batches, and 300 steps 100 epochs."""
    run, sets = evaluation.Run(trained, evaluation.Settings(stride=16)), {'train': (None, range(130))}
    fit = lambda splits, attentive=True, epochs=0: (attentive, epochs)
    asked = lambda: evaluation.probe_row(run, evaluation.Settings(), sets, fit, True)[0]
    assert asked() == (True, 0)                                          # as many epochs as --epochs says
    run.c.label_fraction = 0.5
    assert asked() == (True, 100)


def test_an_encoder_trained_with_few_labels(well, tmp_path, monkeypatch):
    """It sees the windows of these runs and no others; nor do the probes that read from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generalize, 'STEPS', 1)
    seen, load = set(), data.Split.load
    monkeypatch.setattr(data.Split, 'load', lambda self, windows, *args, **settings: seen.update(
        run for run, _ in windows) or load(self, windows, *args, **settings))
    flags = [*TINY, '--data-dir', well, '--steps', 4, '--seed', 5, '--supervised', '--label-fraction', 0.5]
    train.main([str(v) for v in flags])
    out = Path('out/active_matter-jepa-nano-convnext-supervised-0.5-seed5')
    run = evaluation.Run(out, evaluation.Settings(stride=16))
    known = set(run.splits['train'].labelled(0.5, 5).tolist())
    assert seen == known and len(known) == 3 and load_checkpoint(out / 'ckpt.pt')['config']['label_fraction'] == 0.5
    assert set(run.windows['train'][:, 0]) == known and len(run.windows['train']) == 3 * 4
    assert set(run.windows['valid'][:, 0]) == {0, 1, 2, 3}
    assert np.allclose(run.targets['train'][::4], run.splits['train'].standard_labels[sorted(known)])
    given, standardize = [], probe.standardize
    monkeypatch.setattr(probe, 'standardize', lambda splits: given.append(splits) or standardize(splits))
    found = evaluated(out, '--generalize')
    assert found['windows'] == {'train': 9, 'valid': 12}

    # but all fields are there: z-scored by all windows, whose labels nobody can read
    for splits in given:
        x, y = splits['unlabelled']
        assert len(x) == 18 and y.isnan().all() and len(splits['train'][0]) <= 9
    assert len(given) > 4
    by = found['generalization']['random init']['labels']
    assert by['0.5'] == by['1'] != by['0.2']                             # of all runs; it knows no more than half


@pytest.mark.parametrize('flags', [['--label-fraction', '0.5'], ['--supervised', '--label-fraction', '0'],
                                   ['--supervised', '--label-fraction', '1.5']])
def test_a_share_of_labels_is_for_what_is_trained_with_labels(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, 'train', lambda *_: pytest.fail('it trains'))
    with pytest.raises(SystemExit) as left:
        train.main(flags)
    said = capsys.readouterr()
    assert left.value.code == 2 and said.err.count('\n') == 1 and '--label-fraction' in said.err and not said.out
    assert not list(tmp_path.iterdir())
