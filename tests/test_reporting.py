"""What a student reports: probes of one's choice, rows with names, costs, curves, Weights & Biases, and a collapse."""
import importlib
import json
import shutil
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

import eval as evaluation
import model as models
import plot
import probe
import train
from benchmark import report
from helpers import TINY, files_of, linked
from model import collapse, embedding_health, load_checkpoint
from train import Config

QUICK = ['--probes', 'linear,knn', '--stride', '16']


@pytest.fixture
def made(well, here, capsys):
    """A function that trains a small run in this process, two steps, and gives its folder."""
    def make(out, *flags):
        train.main([str(v) for v in (*TINY, '--data-dir', well, '--steps', 2, '--out', out, *flags)])
        capsys.readouterr()
        return here / out
    return make


@pytest.fixture
def says(capsys):
    """A function that evaluates runs in this process, and gives what is printed."""
    def say(*flags):
        evaluation.main([str(flag) for flag in flags])
        return capsys.readouterr().out
    return say


def log_of(run):
    return [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]


def result_of(run, name='eval.json'):
    return json.loads((run / name).read_text())


# --- probes

def features(seed=0, n=60, dim=5):
    """Splits of tokens (n, 1, dim), and labels (n, 2) whose means are not zero."""
    g, splits = torch.Generator().manual_seed(seed), {}
    w = torch.randn(dim, 2, generator=g, dtype=torch.float64)
    for name in 'train', 'valid', 'test':
        x = torch.randn(n, 1, dim, generator=g)
        splits[name] = x, 3 + x[:, 0].double() @ w + torch.randn(n, 2, generator=g, dtype=torch.float64)
    return splits


@pytest.mark.parametrize('alpha', [1.0, 300.0, 1e9])
def test_the_ridge_is_scikit_learns(alpha):
    """min |X w + b - Y|^2 + alpha |w|^2: here as plain least squares, whose penalty is rows more. b costs nothing."""
    splits = features()
    estimates, chosen = probe.linear(splits, ridge=alpha)
    x, y = splits['train'][0][:, 0].double(), splits['train'][1]
    mean, std = x.mean(0), x.std(0)
    rows = torch.cat([torch.cat([(x - mean) / std, torch.ones(len(x), 1)], 1),
                      torch.cat([alpha**0.5 * torch.eye(5), torch.zeros(5, 1)], 1).double()])
    w = torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(5, 2)])).solution
    expected = (splits['test'][0][:, 0] - mean) / std @ w[:-1] + w[-1]
    assert torch.allclose(estimates, expected, rtol=0, atol=1e-6) and chosen == {'ridge': alpha}
    if alpha == 1e9:
        assert torch.allclose(estimates, y.mean(0).expand_as(estimates), atol=1e-5)


def test_what_is_chosen_can_be_given():
    splits = features()
    estimates, chosen = probe.linear(splits)
    assert torch.equal(estimates, probe.linear(splits, ridge=chosen['ridge'])[0])
    assert chosen['ridge'] in [60 * 10.0**p for p in range(-8, 5)]       # of the sum over 60 windows
    near, chosen = probe.knn(splits)
    assert chosen['k'] in probe.KS and chosen['metric'] == 'euclidean'
    assert torch.equal(near, probe.knn(splits, ks=(chosen['k'],))[0])
    assert not torch.equal(near, probe.knn(splits, ks=(50,))[0])


def test_neighbours_by_angle():
    """By hand; and on valid the better metric is found: here the length of a feature says nothing."""
    g, splits = torch.Generator().manual_seed(0), {}
    for name in 'train', 'valid', 'test':
        angle, size = 6.28 * torch.rand(80, 1, generator=g), 10**(3 * torch.rand(80, 1, generator=g))
        x, y = torch.cat([angle.cos(), angle.sin()], 1) * size, torch.cat([angle.cos(), angle.sin()], 1).double()
        splits[name] = torch.cat([x, -x])[:, None], torch.cat([y, -y])   # with a mean of zero
    estimates, chosen = probe.knn(splits, ks=(3,), metrics=('cosine',))
    z = {name: x for name, (x, _) in probe.standardize(splits).items()}
    unit = {name: x / x.norm(dim=1, keepdim=True) for name, x in z.items()}
    nearest = (unit['test'] @ unit['train'].T).argsort(1, descending=True)[:, :3]
    assert torch.allclose(estimates, splits['train'][1][nearest].mean(1)) and chosen == {'k': 3, 'metric': 'cosine'}
    assert probe.knn(splits, metrics=probe.METRICS)[1]['metric'] == 'cosine'
    said = {name: (x, x[:, 0].norm(dim=1, keepdim=True).log().double()) for name, (x, _) in splits.items()}
    assert probe.knn(said, metrics=probe.METRICS)[1]['metric'] == 'euclidean'           # the length alone


def test_only_the_probes_that_are_asked_for(made, says, monkeypatch):
    """The course's main table: without attention, with its ridge, its k and its metric."""
    run = made('out/a')
    monkeypatch.setattr(probe, 'attentive', None)                        # would fail
    said, result = says(run, *QUICK, '--ridge', 1, '--k', 20, '--metric', 'cosine'), result_of(run)
    assert 'attentive' not in said.partition('MSE')[2] and '  probes: ridge 1, k 20, metric cosine\n' in said
    assert result['chosen']['JEPA'] == result['chosen']['random init'] == {'ridge': 1.0, 'k': 20, 'metric': 'cosine'}
    assert {row: [*by_probe] for row, by_probe in result['rows'].items()} == {
        'JEPA': ['linear', 'knn'], 'JEPA, with products': ['linear'], 'random init': ['linear', 'knn'],
        'field statistics': ['linear', 'knn'], 'field statistics, with products': ['linear'],
        'predict the mean': ['linear', 'knn']}
    assert {k: result['probe'][k] for k in ('probes', 'ridge', 'k')} == {'probes': 'linear,knn', 'ridge': 1.0, 'k': 20}
    alone = says(run, '--stride', 16, '--probes', 'knn')
    assert 'knn' in alone and 'linear' not in alone.partition('MSE')[2]
    assert [*result_of(run)['rows']['field statistics']] == ['knn'] and result_of(run)['chosen']['JEPA']['k'] in probe.KS
    carried = says(run, *QUICK, '--generalize')
    assert 'JEPA, knn' in carried and 'JEPA, attentive' not in carried


@pytest.mark.parametrize('flags', [('--probes', 'mlp'), ('--probes', ''), ('--metric', 'l1'), ('--ridge', '-1'),
                                   ('--k', '-1')], ids=' '.join)
def test_probes_that_will_not_do(flags, here, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(['nowhere', *flags])
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


def test_the_head_of_a_supervised_run_is_a_row(made, says, tmp_path):
    """Its errors are the network's own; older checkpoints have it, too; report.py takes it."""
    run = made('out/a', '--supervised', '--crop', 0, '--noise', 0, '--lr', 0.01, '--steps', 6)
    assert {'label alpha', 'label zeta'} <= log_of(run)[-1].keys()
    state = load_checkpoint(run / 'ckpt.pt')
    del state['machine']
    torch.save(state, run / 'ckpt.pt')                                   # as an older one
    said, result = says(run, *QUICK, '--split', 'test'), result_of(run)
    name = 'JEPA, supervised: its own head'
    assert f'\n{name} ' in said and list(result['rows'][name]) == ['linear'] and 'on unknown machine' in said
    of = evaluation.Run(run, evaluation.Settings(split='test', stride=16))
    model, windows = of.model('cpu'), of.windows['test']
    x = model.normalise(of.splits['test'].load(windows, frames=16))
    with torch.no_grad():
        errors = model.network(x, x, None, of.targets['test'].float())   # of the context, twice
    for label in 'alpha', 'zeta':
        assert result['rows'][name]['linear'][label] == pytest.approx(float(errors[f'label {label}']), rel=1e-4)
    (tmp_path / 'active_matter-jepa-nano-supervised-seed0.json').write_text(json.dumps(result))
    words = ['parameters', 'active_matter-jepa-nano-supervised']
    assert f'| {name} |' in report.summary(report.read_cells(tmp_path), words)


# --- several runs, several checkpoints

def test_checkpoints_of_a_run_are_a_curve(made, says, monkeypatch):
    """Rows named by their step, each with a file of its own; what is before training once."""
    run = made('out/a', '--steps', 6)
    state, asked, row = load_checkpoint(run / 'ckpt.pt'), [], evaluation.evaluate_row
    for step in 2, 4:
        weights = {k: v * (1 + 1 / step) for k, v in state['model'].items()}
        torch.save({**state, 'model': weights, 'step': step, 'samples': 8 * step}, run / f'ckpt-{step}.pt')
    monkeypatch.setattr(evaluation, 'evaluate_row', lambda run, args, title: asked.append(title) or row(
        run, args, title))
    said = says(*(run / f'ckpt{step}.pt' for step in ('', '-4', '-2')), *QUICK)
    assert asked == ['JEPA', 'random init', 'random features', 'field statistics', 'JEPA', 'JEPA']
    rows = [line.split('  ')[0] for line in said.partition('guessing the mean')[2].splitlines()[4:14]]
    steps = [f'JEPA, step {step}' for step in (2, 4, 6)]
    assert rows == [*steps, *(f'{row}, with products' for row in steps), 'random init', 'field statistics',
                    'field statistics, with products', 'predict the mean']
    files = 'eval-2.json', 'eval-4.json', 'eval.json'
    assert [result_of(run, file)['run']['step'] for file in files] == [2, 4, 6]
    one, two, three = (result_of(run, file)['rows']['JEPA'] for file in files)
    assert one != two != three and {p.name for p in run.glob('eval*')} == {*files}
    assert result_of(run, 'eval-2.json')['run']['last_steps']['loss'] == pytest.approx(
        np.mean([line['loss'] for line in log_of(run)[:2]]))             # the log goes on behind it


def test_ablations_are_named_by_their_folder(made, says):
    made('out/low', '--lr', 1e-4)
    made('out/high', '--lr', 1e-2, '--seed', 1)
    said = says('out/low', 'out/high', 'out/low/', *QUICK)               # one is named twice
    rows = [line.split('  ')[0] for line in said.partition('guessing the mean')[2].splitlines()[4:13]]
    assert rows == ['low', 'low, random init', 'high', 'high, random init', 'low, with products', 'high, with products',
                    'field statistics', 'field statistics, with products', 'predict the mean']
    assert 'low has the seeds' in said and '; high has the seeds' in said and 'JEPA has' not in said
    assert result_of(made('out/low', '--lr', 1e-4))['row'] == 'JEPA'     # alone, it has its model's name


@pytest.mark.parametrize('paths, names', [
    (['out/a/ckpt.pt'], ['JEPA']), (['out/a/ckpt.pt', 'out/b/ckpt.pt'], ['a', 'b']),
    (['x/a/ckpt.pt', 'y/a/ckpt.pt'], ['x/a', 'y/a']),
    (['out/a/ckpt-1.pt', 'out/a/ckpt-2.pt'], ['JEPA, step 1', 'JEPA, step 2']),
    (['out/a/ckpt-1.pt', 'out/a/ckpt-2.pt', 'out/b/ckpt.pt'], ['a, step 1', 'a, step 2', 'b']),
    (['one.pt', 'two.pt'], ['JEPA, step 9', "JEPA, step 9'"])], ids=str)
def test_rows_have_names_of_their_own(paths, names):
    steps = [int(path[-4]) if '-' in path else 9 for path in paths]
    results = [{'row': 'JEPA', 'rows': {'JEPA': i, 'JEPA, fine-tuned': i, 'random init': i}, 'run': {
        'checkpoint': path, 'step': step}} for i, (path, step) in enumerate(zip(paths, steps))]
    assert evaluation.names_of(results) == names
    rows = evaluation.merge_rows(results)
    assert {f'{name}, fine-tuned' for name in names} <= rows.keys() and len(rows) == 3 * len(names)
    other = {'row': 'VideoMAE', 'rows': {}, 'run': {'checkpoint': 'out/mae/ckpt.pt'}}
    if names[0] in ('JEPA', 'a'):
        assert evaluation.names_of([*results, other]) == [*names, 'VideoMAE']


# --- what it cost

def test_what_a_run_cost(made, says, monkeypatch):
    """Where it was trained is in the checkpoint, also if it went on elsewhere."""
    for steps, name in (2, 'Tesla T4'), (4, 'NVIDIA L4'), (6, 'Tesla T4'):
        monkeypatch.setattr(train, 'processor', lambda device: name)
        run = made('out/a', '--steps', steps)
    state = load_checkpoint(run / 'ckpt.pt')
    assert state['machine'] == 'Tesla T4 and NVIDIA L4'
    torch.save({**state, 'seconds': 2 * 3600.0, 'samples': 36000}, run / 'ckpt.pt')
    said, result = says(run, *QUICK), result_of(run)
    lines, network = log_of(run), models.load_run(run)
    memory = lines[-1]['memory_gb']
    assert models.count_parameters(network) == (result['parameters']['encoder'], result['parameters']['all'])
    encoder, beside = result['parameters']['encoder'], result['parameters']['all'] - result['parameters']['encoder']
    assert (f'JEPA: {encoder:,} parameters in the encoder, {beside:,} beside it; trained 2.0 h on Tesla T4 and '
            f'NVIDIA L4, {memory:.1f} GB, 5.0 windows/s\n') in said and beside > 0
    assert {'machine': 'Tesla T4 and NVIDIA L4', 'windows_per_s': 5.0, 'memory_gb': memory}.items() <= result['run'].items()
    with open(run / 'log.jsonl', 'a') as log:
        log.write('{"step": 6, "lo')                                   # it goes on, and its last line is cut short
    assert evaluation.log_lines(run / 'log.jsonl', 2) == lines[-2:]
    result['run'].pop('memory_gb')
    assert 'NVIDIA L4, 5.0 windows/s' in evaluation.in_words(result)     # without a log


# --- Weights & Biases

STAND_IN = '''
import json
from pathlib import Path
BOOK, CALLS = Path('board.json'), []
class Run:
    def __init__(self, id):
        self.id, self.steps = id, json.loads(BOOK.read_text()).get(id, []) if BOOK.exists() else []
    @property
    def step(self):
        return self.steps[-1] + 1 if self.steps else 0
    def log(self, line, step):
        assert step >= self.step and line['step'] == step and 'loss' in line
        self.steps.append(step)
    def __enter__(self):
        return self
    def __exit__(self, kind, *rest):
        BOOK.write_text(json.dumps((json.loads(BOOK.read_text()) if BOOK.exists() else {}) | {self.id: self.steps}))
        CALLS.append(kind)
def init(**settings):
    CALLS.append(settings)
    return Run(settings['id'])
'''


@pytest.fixture
def wandb(here, monkeypatch):
    """A package that counts as the real one does: what it has of a run stays, and steps only increase."""
    (here / 'packages').mkdir()
    (here / 'packages/wandb.py').write_text(STAND_IN)
    monkeypatch.syspath_prepend(here / 'packages')
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    yield lambda: importlib.import_module('wandb')
    sys.modules.pop('wandb', None)


def test_weights_and_biases(wandb, made, here):
    """A run that went on after it lost steps has one page, with each step once, and all its settings."""
    made('out/without')
    assert 'wandb' not in sys.modules
    run = made('out/a', '--wandb', 'physics', '--lr', 0.004, '--steps', 3)
    shutil.copy(run / 'ckpt.pt', here / 'earlier.pt')
    made('out/a', '--wandb', 'physics', '--lr', 0.004, '--steps', 5)
    shutil.copy(here / 'earlier.pt', run / 'ckpt.pt')                    # killed before it saved
    made('out/a', '--wandb', 'physics', '--lr', 0.004, '--steps', 7)
    calls, book = wandb().CALLS, json.loads((here / 'board.json').read_text())
    assert [*book.values()] == [[0, 1, 2, 3, 4, 5, 6]] and len(log_of(run)) == 7
    assert [call for call in calls if not isinstance(call, dict)] == [None] * 3        # each was ended in peace
    first, *later = [call for call in calls if call]
    assert {c['id'] for c in later} == {first['id']} and first['project'] == 'physics' and first['resume'] == 'allow'
    assert first['config']['lr'] == 0.004 and first['config']['widths'] == (4, 4, 8, 8, 8)
    shutil.rmtree(run)
    made('out/a', '--wandb', 'physics')                                  # from the start: another page
    assert len(json.loads((here / 'board.json').read_text())) == 2


def test_weights_and_biases_of_a_run_that_fails(wandb, made, capsys):
    with pytest.raises(SystemExit):
        made('out/a', '--wandb', 'physics', '--lr', '1e30', '--steps', 9)
    assert wandb().CALLS[-1] is FloatingPointError and 'the loss is' in capsys.readouterr().err


def test_only_rank_0_has_a_page(wandb, monkeypatch, tmp_path):
    monkeypatch.setattr(train, 'RANK', 1)
    with train.open_board(Config(wandb='physics', out=str(tmp_path)), Config(), 0) as board:
        assert board is None and 'wandb' not in sys.modules and not (tmp_path / 'wandb_id').exists()


def test_without_the_package(here, monkeypatch, capsys):
    """One line, before anything is simulated."""
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(SystemExit):
        train.main(['--wandb', 'physics'])
    assert 'pip install wandb' in capsys.readouterr().err.splitlines()[-1] and not any(here.iterdir())


# --- probing while it trains

def test_probing_leaves_training_as_it_is(made, says):
    """The same losses and weights, bit for bit; every third step and the last; the errors are eval.py's."""
    flags = ['--steps', 7, '--supervised', '--lr', 0.01, '--stride', 8]
    plain, probed = made('out/plain', *flags), made('out/probed', *flags, '--probe-every', 3)
    lines = log_of(probed)
    assert [line['loss'] for line in lines] == [line['loss'] for line in log_of(plain)]
    one, two = (load_checkpoint(run / 'ckpt.pt')['model'] for run in (plain, probed))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert [line['step'] for line in lines if 'probe_mean' in line] == [2, 5, 6]
    says(probed, '--probes', 'linear', '--stride', 8)
    errors = result_of(probed)['rows']['JEPA, supervised']['linear']
    assert {k: lines[-1][f'probe_{k}'] for k in errors} == pytest.approx(errors, rel=1e-3)
    plot.training(figure := plot.canvas(12, 3), probed / 'log.jsonl')
    drawn = {ax.get_title(): [line.get_label() for line in ax.lines] for ax in figure.axes}
    assert drawn['Ridge probe on valid'] == ['probe_alpha', 'probe_zeta', 'probe_mean']
    assert drawn['Its terms, unweighted'] == ['label alpha', 'label zeta'] and len(drawn['Embedding']) == 2


def test_probing_is_cheap_and_draws_nothing(made, well, monkeypatch):
    """At most 512 and 256 windows, of all runs; PyTorch's random numbers and the network's mode are left alone."""
    run = made('out/a')
    c, _, _ = train.parse([str(v) for v in (*TINY, '--data-dir', well, '--probe-every', 1, '--noise', 0.5,
                                            '--stride', 16)], '')
    root, data = train.open_data(c)
    splits, model, seen = train.open_probed(c, root, data), models.load_run(run, 'cpu'), []
    state = torch.get_rng_state()
    first, again = (train.probe_on_valid(model.train(), splits, c, 0, 9) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state()) and first == again and model.network.encoder.training
    c.noise = 0.0
    assert train.probe_on_valid(model, splits, c, 0, 9) != first         # which saw the noise of training
    for split in splits.values():
        split.windows = np.repeat(split.windows, 60, 0)
        split.load = lambda windows, frames: seen.append(windows) or torch.zeros(len(windows), 11, frames, 1, 1)
    model.embed = lambda x: x.flatten(2)[:, :, :8]
    train.probe_on_valid(model, splits, c, 0, 9)
    windows = np.concatenate(seen)
    assert 256 < len(windows) <= 512 + 256 and max(map(len, seen)) <= 8 and set(windows[:, 0]) == set(range(6))
    assert train.probe_on_valid(model, {}, c, 0, 9) == {}
    monkeypatch.setattr(train, 'RANK', 1)
    assert train.open_probed(c, root, data) == {}


# --- collapse

def embeddings(kind, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    z, offset = torch.randn(64, 8, 3, 3, generator=g), torch.randn(8, 1, 1, generator=g)
    line = torch.randn(64, 1, 3, 3, generator=g) * torch.randn(8, 1, 1, generator=g)
    return {'healthy': z, 'small, for z-scores': 1e-3 * z, 'far from zero': z + 300 * offset,
            'zero': 0 * z, 'constant': offset.expand_as(z), 'constant, rounded': offset * (1 + 1e-7 * z),
            'large and constant': 100 + 0 * z, 'a point': 0.02 * (offset + 0.1 * z), 'a line': line,
            'one embedding': z[:1, :, 0, 0]}[kind]


@pytest.mark.parametrize('kind, words', [
    ('healthy', ''), ('small, for z-scores', ''), ('far from zero', ''), ('zero', 'alike'), ('constant', 'alike'),
    ('constant, rounded', 'alike'), ('large and constant', 'alike'), ('a point', 'alike'), ('a line', 'same'),
    ('one embedding', 'alike')])
def test_a_collapse_is_said(kind, words):
    health = embedding_health(embeddings(kind))
    assert ' '.join(collapse(health)).endswith(words) and bool(collapse(health)) == bool(words)
    assert collapse(health, supervised=True) == ([] if kind == 'a line' else collapse(health))
    if kind in ('zero', 'constant', 'constant, rounded', 'large and constant', 'a line', 'one embedding'):
        assert health['embedding_rank'] == pytest.approx(1, abs=1e-3)    # and not that of the rounding
    else:
        assert health['embedding_rank'] > 7.8


def test_the_rank_of_healthy_embeddings_is_what_it_was():
    z = embeddings('healthy') * torch.logspace(-3, 0, 8).view(8, 1, 1)
    p = torch.linalg.eigvalsh(torch.cov(z.movedim(1, -1).reshape(-1, 8).T))
    p = p / p.sum()
    assert embedding_health(z)['embedding_rank'] == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-6)
    assert collapse({'embedding_std': 0.0016, 'embedding_rank': 22.8, 'embedding_rms': 0.0244})     # docs/break_it.md


@pytest.mark.parametrize('kind, said', [
    ('healthy', 'loss 0.001, embedding: spread 0.99, rank 7.9 of 8, sim loss 0.000, std loss 0.990, found 0.500'),
    ('constant', 'loss 0.001, embedding: spread 0, rank 1.0 of 8, COLLAPSED: all embeddings are alike, sim loss 0.000, '
                 'std loss 0.990, found 0.500')])
def test_the_progress_line(kind, said, tmp_path):
    """A std that is a loss is called one; the embedding stands before it. The log has the terms' own names."""
    shown, terms = [], {'loss': 0.001, 'sim': 0.0, 'std': 0.99, 'found': 0.5}
    bar = SimpleNamespace(set_postfix_str=lambda text, refresh: shown.append(text), update=lambda: None)
    with open(tmp_path / 'log.jsonl', 'w') as log:
        train.log_step(log, None, bar, SimpleNamespace(embedding=embeddings(kind), network=None), 3, terms, {'lr': 1.0})
    assert shown == [said]
    line, = log_of(tmp_path)
    assert line.items() >= ({'step': 3, 'lr': 1.0} | terms).items() and line['embedding_std'] < 1.1


def result(name, seed, error, **settings):
    """What print_table needs of an eval.json: one probe, one label."""
    rows = {'JEPA': {'linear': {'alpha': error, 'mean': error}}, 'predict the mean': {'linear': {'alpha': 1, 'mean': 1}}}
    return {'system': 'active_matter', 'split': 'test', 'labels': ['alpha'], 'row': 'JEPA', 'rows': rows, 'field': 'whole',
            'by_run': {row: {'linear': [by['linear']['mean']] * 2} for row, by in rows.items()}, 'seeds': {'training': seed},
            'run': {'checkpoint': f'out/{name}-seed{seed}/ckpt.pt', 'windows_seen': 8, 'preset': 'nano', 'seed': seed,
                    'step': 4, 'settings': {'width': 8, 'out': name, **settings, 'seed': seed}}}


def test_seeds_have_their_mean_and_spread(capsys):
    """Those of runs that differ in nothing else; that is like with like."""
    wide = [result('wide', seed, error, width=9) for seed, error in ((0, 0.1), (1, 0.3), (2, 0.2))]
    evaluation.print_table([result('a', 0, 0.5), result('a', 1, 0.7), *wide[:2]])
    said = capsys.readouterr().out
    rows = {line[:25].strip(): line[25:].split() for line in said.splitlines()}
    assert rows['a, mean of 2 seeds'] == ['0.600', '0.600'] and rows['a, std of 2 seeds'] == ['0.141', '0.141']
    assert rows['wide, mean of 2 seeds'] == ['0.200', '0.200']
    assert 'Not like with like' not in said and said.count('wide-seed1 ') == 2
    evaluation.print_table([result('a', 0, 0.5), *wide])
    said = capsys.readouterr().out
    assert said.split('wide, std of 3 seeds')[1].split()[:2] == ['0.100', '0.100'] and 'a, mean' not in said and 'has the seeds training 0' in said


def test_a_row_depends_on_its_own_run_alone(made, says):
    """Field statistics are fitted to the labels that a run knows, whatever stands before it in the table."""
    few, all_of_them = made('out/few', '--supervised', '--label-fraction', 0.34), made('out/all', '--supervised')
    alone = {}
    for run in few, all_of_them:
        says(run, '--probes', 'linear', '--stride', 16)
        alone[run] = result_of(run)['rows']['field statistics']
    said = says('out/few', 'out/all', '--probes', 'linear', '--stride', 16)
    assert all(result_of(run)['rows']['field statistics'] == row for run, row in alone.items())
    assert alone[few] != alone[all_of_them] and 'few knows 34% of the labels; all knows 100% of the labels' in said


def test_other_files_are_said(made, says, published):
    """An encoder may be scored on data that it was not trained on, but not without a word."""
    run = made('out/a')
    assert 'was trained on other files' not in says(run, *QUICK)
    assert f'out/a/ckpt.pt was trained on other files than those in {published}' in says(run, *QUICK, '--data-dir', published.parent)


def test_a_valid_split_that_does_not_fit_is_refused_before_training(here, well, capsys):
    """By --probe-every, which needs its labels."""
    root = linked(well / 'active_matter', here / 'data/active_matter')
    for file in files_of(root, 'valid'):
        shutil.copy(file, here / 'copy')
        file.unlink()
        with h5py.File(here / 'copy', 'r+') as f:
            del f['scalars/zeta']
        shutil.move(here / 'copy', file)
    with pytest.raises(SystemExit):
        train.main([str(v) for v in (*TINY, '--data-dir', root.parent, '--out', 'out', '--probe-every', 1)])
    assert 'channels or scalars of valid/ are not those of train/' in capsys.readouterr().err and not (here / 'out').exists()


def test_a_damaged_line_of_the_log_is_skipped(made, says):
    run = made('out/a')
    with open(run / 'log.jsonl', 'a') as log:
        log.write('{"step": garb}\n')
    says(run, *QUICK)
    assert result_of(run)['run']['last_steps']['loss'] > 0


def test_a_page_that_cannot_be_had(wandb, made, monkeypatch, capsys):
    """No network, or no login: one line."""
    wandb()
    monkeypatch.setattr(sys.modules['wandb'], 'init', lambda **settings: 1 / 0)
    with pytest.raises(SystemExit):
        made('out/a', '--wandb', 'physics')
    assert capsys.readouterr().err.splitlines()[-1] == 'error: --wandb: division by zero (no network? WANDB_MODE=offline)'
