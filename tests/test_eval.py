"""eval.py: when runs may stand in one table, and what the table says of them."""
import json
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import eval as evaluation
import model as models
import probe
import simulate
from helpers import HERE, MODELS, NANO, TINY, command, files_of, linked, run
from model import load_checkpoint
from systems import find_system
from train import main as train

QUICK = ['--epochs', '1', '--stride', '16']


def made(well, out, *flags, model='jepa'):
    """A run of two steps, in this process."""
    train([str(v) for v in (*MODELS[model], '--data-dir', well, '--steps', 2, '--out', out, *flags)])
    return out


def says(capsys, *flags):
    evaluation.main([str(f) for f in flags])
    return capsys.readouterr().out


@pytest.mark.parametrize('change', ['order of the files', 'one file less', 'other values'])
def test_tables_are_of_one_dataset(well, here, change, capsys):
    """The same test runs are not enough: labels are z-scored by the training runs, and probes are trained on them."""
    other = linked(well / 'active_matter', here / 'other' / 'active_matter')
    shutil.rmtree(other / 'cache', ignore_errors=True)
    first = files_of(other)[0]
    if change == 'order of the files':
        first.rename(first.with_name('z.hdf5'))
    elif change == 'one file less':
        first.unlink()
    else:
        copy = shutil.copy(first, here / 'copy.hdf5')
        first.unlink()
        shutil.move(copy, first)
        with h5py.File(first, 'r+') as f:
            f['t1_fields/velocity'][0, 0] += 1
    runs = made(well, 'out/a'), made(other.parent, 'out/b')
    with pytest.raises(SystemExit):
        evaluation.main([*runs, *QUICK])
    assert 'different systems or datasets' in capsys.readouterr().err


def test_all_runs_of_a_table_have_their_windows(well, here, capsys):
    """The wider of two strides, whatever runs were trained at, in either order; --stride goes first."""
    runs = made(well, 'out/a', '--stride', 3), made(well, 'out/b', '--stride', 8)
    for order in runs, runs[::-1]:
        says(capsys, *order, '--epochs', 1)
        for run in runs:
            result = json.loads((here / run / 'eval.json').read_text())
            assert result['stride'] == 4 and result['windows'] == {'train': 6 * 13, 'valid': 4 * 13}
    run = evaluation.Run(runs[0], evaluation.Settings(stride=5))
    assert run.windows['valid'][:4].tolist() == [[0, 0], [0, 5], [0, 10], [0, 15]]
    paper = load_checkpoint(here / runs[0] / 'ckpt.pt')
    torch.save({**paper, 'config': {**paper['config'], 'preset': 'paper'}}, 'paper.pt')
    assert evaluation.Run('paper.pt', evaluation.Settings()).stride == 3               # as in training


def test_tables_say_what_differs(well, here, capsys):
    made(well, 'out/a')
    made(well, 'out/b', '--resolution', 16, model='videomae')
    said = says(capsys, 'out/a', 'out/b', *QUICK)
    assert 'Not like with like: JEPA saw the whole domain at 32 x 32; VideoMAE saw the whole domain at 16 x 16' in said
    assert 'Not like' not in says(capsys, 'out/a', *QUICK)


def test_runs_and_data_must_fit(well, here, capsys):
    made(well, 'out/a')
    state = load_checkpoint(here / 'out/a/ckpt.pt')
    torch.save({**state, 'labels': ['beta', 'zeta']}, 'labels.pt')
    for name in 'alcohol', 'zinc':                                       # the first channel is `concentration`
        channels = [name, *state['inputs']['channels'][1:]]
        torch.save({**state, 'inputs': {**state['inputs'], 'channels': channels}}, f'{name}.pt')
    for flags, word in (['labels.pt'], 'not those'), (['alcohol.pt'], 'not those'), (['zinc.pt'], 'not those'), (['--all'], '--all is gone'), (
            ['out/a', '--save-embeddings', 'out'], '--save-embeddings'), (
            ['out/a', 'labels.pt', '--save-embeddings', 'x.npz'], 'one run'):
        with pytest.raises(SystemExit):
            evaluation.main([*flags, *QUICK])
        assert word in capsys.readouterr().err


def test_bfloat16_runs_are_evaluated_in_bfloat16(well, here):
    made(well, 'out/a', '--dtype', 'bfloat16')
    run = evaluation.Run('out/a', evaluation.Settings())
    model, seen = run.model('cpu'), []
    model.network.encoder.downsample_layers[1].register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    model.embed(run.splits['valid'].load(run.windows['valid'][:1], frames=16))
    assert seen == [torch.bfloat16]


def test_resumed_and_borrowed_runs(well, here, capsys):
    """What may differ when a run goes on; where weights may come from."""
    made(well, 'out/a')
    made(well, 'out/a', '--save-every', 7)                               # done already, and allowed to differ
    assert 'resuming at step 2' in capsys.readouterr().out
    shutil.copy('out/a/ckpt.pt', 'mine.pt')
    for start in 'out/a', 'out/a/', 'mine.pt':
        made(well, 'out/b', '--init', start, *(['--seed', 1] if start == 'mine.pt' else []), '--steps', 2,
             *(['--out', 'out/c'] if start == 'mine.pt' else []))
    shutil.move('out/a', 'out/elsewhere')
    made(well, 'out/b', '--init', 'out/a')                               # a resume does not need its start
    state = load_checkpoint('mine.pt')
    names = {**state['inputs'], 'channels': state['inputs']['channels'][::-1]}
    torch.save({**state, 'inputs': names}, 'other.pt')
    with pytest.raises(SystemExit):
        made(well, 'out/d', '--init', 'other.pt')
    assert 'was trained on the channels' in capsys.readouterr().err
    assert state['inputs']['periodic'] == (False, False)                 # a crop of a periodic field is not
    made(well, 'out/e', '--crop', 0)
    assert load_checkpoint('out/e/ckpt.pt')['inputs']['periodic'] == (True, True)


def test_epochs_go_before_a_presets_steps(well, here, capsys):
    train([str(v) for v in (*[f for f in TINY if f not in ('--steps', 40)], '--data-dir', well, '--epochs', 0.05,
                            '--out', 'out/a')])
    assert load_checkpoint('out/a/ckpt.pt')['steps'] == 2                # of 6 runs x 50 windows, 8 at a time


def test_the_split_that_is_asked_for_is_scored(well, here, capsys):
    """Errors of its runs alone; valid, the default, is said to be one to tune by. It is enough to tune by."""
    root = linked(well / 'active_matter', here / 'data' / 'active_matter')
    shutil.rmtree(root / 'cache', ignore_errors=True)
    files_of(root, 'test')[0].unlink()
    made(root.parent, 'out/a')
    for split, runs in ('valid', 4), ('test', 3):
        said = says(capsys, *([] if split == 'valid' else ['--split', split]), *QUICK)
        result = json.loads((here / 'out/a/eval.json').read_text())
        assert result['split'] == split and f'bootstrap over {runs} {split} runs' in said
        assert ('a table to tune by' in said) == (split == 'valid')
        for row in result['by_run'].values():
            assert {len(errors) for errors in row.values()} == {runs}
        for row, by_probe in result['by_run'].items():
            for p, errors in by_probe.items():
                assert sum(errors) / runs == pytest.approx(result['rows'][row][p]['mean'], rel=1e-4)
    shutil.rmtree(root / 'data' / 'test')                                # valid is enough to tune by
    assert 'valid split' in says(capsys, *QUICK)
    assert json.loads((here / 'out/a/eval.json').read_text())['split'] == 'valid'
    for flags in ['--split', 'train'], ['--probe', 'mine'], ['--split', 'test', '--probe', 'paper'], [
            '--finetune', 'best'], ['--latents', 'nowhere']:
        with pytest.raises(SystemExit):
            evaluation.main(flags)
        assert flags[0] in capsys.readouterr().err


def test_seeds_reach_data_and_probe(well, here, capsys, monkeypatch):
    """A dataset that is missing is simulated from the run's seed; its probe has it too; the table says which seed did
    what."""
    asked = []
    monkeypatch.setattr(simulate, 'make_dataset', lambda *how: asked.append(how))
    with pytest.raises(SystemExit):                                      # nothing was simulated
        train(['--seed', '7'])
    assert asked == [('active_matter', Path('data'), 'nano', 7)]
    made(well, 'out/a', '--seed', 3)
    assert 'seeds: data none, training 3, probe 3' in says(capsys, *QUICK)
    (well / 'active_matter' / 'simulated.json').write_text('{"preset": "nano", "seed": 5}')
    try:
        assert 'seeds: data 5, training 3, probe 4' in says(capsys, '--seed', 4, *QUICK)
    finally:
        (well / 'active_matter' / 'simulated.json').unlink()
    assert json.loads((here / 'out/a/eval.json').read_text())['seeds'] == {'data': 5, 'training': 3, 'probe': 4}

    # the run's seed, if no other is asked for
    seen, attentive = [], probe.attentive
    monkeypatch.setattr(probe, 'attentive', lambda *args, **settings: seen.append(settings['seed']) or attentive(*args, **settings))
    for flags in [], ['--seed', 4]:
        says(capsys, *flags, *QUICK)
    assert set(seen[:len(seen) // 2]) == {3} and set(seen[len(seen) // 2:]) == {4}


def test_probes_see_the_noise_of_training(well, here):
    """Of the std that training had, or that the paper's probe has; on the normalised fields."""
    made(well, 'out/a', '--noise', 0.5)
    run = evaluation.Run('out/a', evaluation.Settings())
    model = seeing_all(run)
    x = run.splits['valid'].load(run.windows['valid'][:4], frames=16)
    clean = model.embed(x)
    for noise, std in (None, 0.5), (0.1, 0.1), (0.0, 0.0):
        added = run.encode(model, noise=noise)(x) - clean
        assert added.std().item() == pytest.approx(std, rel=0.03)


def seeing_all(run, trained=True):
    """A run's model, whose tokens are now what the encoder would see."""
    model = run.model('cpu', trained)
    model.network.features = lambda x: x.flatten(2)
    return model


def test_every_window_has_the_label_of_its_run(well, here):
    """z-scored by the training runs; the runs differ, and so do windows of one file."""
    r = evaluation.Run(made(well, 'out/a'), evaluation.Settings(device='cpu', split='test', stride=16))
    for name, split in r.splits.items():
        found = {}
        for (run, _), target in zip(r.windows[name].tolist(), r.targets[name].tolist()):
            found.setdefault(run, set()).add(tuple(target))
        mean, std = (np.array(r.state[key]) for key in ('label_mean', 'label_std'))
        for run, targets in found.items():
            with h5py.File(well / 'active_matter/data' / name / split.runs[run]['file']) as f:
                value = [f['scalars'][label][()] for label in ('alpha', 'zeta')]
            assert targets == {tuple((value - mean) / std)}
        assert len(found) == len(split.runs) and len(set.union(*found.values())) >= 3


def test_a_windows_noise_is_its_own(well, here):
    """Whatever batch it is in, and before training as after; no two windows, and no two seeds, have the same."""
    made(well, 'out/a', '--noise', 0.5)
    added = []
    for batch in 3, 16:
        run = evaluation.Run('out/a', evaluation.Settings(stride=24, batch=batch))
        noisy, clean = (run.embed(run.encode(seeing_all(run), noise=noise), 'x') for noise in (None, 0.0))
        added.append(torch.cat([noisy[name][0] - clean[name][0] for name in run.windows]).flatten(1))
    assert torch.equal(*added) and torch.equal(run.embed(run.encode(seeing_all(run, False)), 'x')['valid'][0], noisy['valid'][0])
    assert added[0].std().item() == pytest.approx(0.5, rel=0.03)
    run.c.seed = 1
    again = run.embed(run.encode(seeing_all(run)), 'x')['valid'][0] - clean['valid'][0]
    assert torch.corrcoef(torch.cat([added[0], again.flatten(1)])).fill_diagonal_(0).abs().max() < 0.02


def test_a_process_that_fails_ends_all(trained, tmp_path):
    """With one line that says why, whichever of them it is; and no table."""
    shutil.copytree(trained, tmp_path / 'out/a')
    (tmp_path / 'ranks.py').write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import common, eval
common.time.sleep = lambda seconds: None
batches = eval.Run.batches
def failing(run, *args):
    if os.environ['RANK'] == os.environ['FAILS']:
        raise ValueError('no windows on rank ' + os.environ['RANK'])
    yield from batches(run, *args)
eval.Run.batches = failing
eval.main()
""")
    for rank in '0', '1':
        p = subprocess.run(**command([*TORCHRUN, 'ranks.py'], 'out/a', *QUICK, FAILS=rank), cwd=tmp_path,
                           capture_output=True, text=True, timeout=120)
        assert p.returncode == 1 and f'error: no windows on rank {rank} (' in p.stderr
        assert not (tmp_path / 'out/a/eval.json').exists() and 'MSE' not in p.stdout


TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


def test_two_processes_give_the_table_of_one(trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'out/a')
    one, two = (evaluated(tmp_path, script, '--split', 'test') for script in ('eval.py', [*TORCHRUN, HERE / 'eval.py']))
    assert one == two


def evaluated(folder, script, *flags):
    """All that is said and written of out/a, but for the time it took."""
    said = run(script, 'out/a', *flags, *QUICK, '--save-embeddings', 'kept.npz', cwd=folder).stdout
    result, kept = json.loads((folder / 'out/a/eval.json').read_text()), np.load(folder / 'kept.npz')
    assert len(result['rows']) == 6 and said.count('MSE of z-scored parameters') == 1
    return ({k: v for k, v in result.items() if k not in ('seconds', 'command')}, {k: kept[k].tolist() for k in kept},
            [line for line in said.splitlines() if ' min, peak memory ' not in line])


def test_processes_share_windows_and_no_disk(trained, tmp_path):
    """Each embeds its part, of clean and of spoilt fields; the run, with noise, and its tokens, in a file, are with
    the first."""
    (tmp_path / 'ranks.py').write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
os.chdir('../disk' + os.environ.get('RANK', '0'))
import data, eval, probe
from benchmark import generalize
probe.IN_MEMORY, generalize.STEPS, seen, load = 1, 1, [], data.Split.load
data.Split.load = lambda self, windows, **how: seen.append(len(windows)) or load(self, windows, **how)
eval.main()
print(sum(seen), file=open('seen', 'w'))
""")
    state = load_checkpoint(trained / 'ckpt.pt')
    (tmp_path / 'disk0/out/a').mkdir(parents=True)
    (tmp_path / 'disk1').mkdir()
    torch.save({**state, 'config': {**state['config'], 'noise': 0.5}}, tmp_path / 'disk0/out/a/ckpt.pt')
    seen = lambda disk: int((tmp_path / disk / 'seen').read_text())
    one = evaluated(tmp_path / 'disk0', ['../ranks.py'], '--batch', 5, '--generalize')
    alone = seen('disk0')
    two = evaluated(tmp_path / 'disk0', [*TORCHRUN, '../ranks.py'], '--batch', 5, '--generalize')
    assert one == two and len(one[0]['generalization']['JEPA']['inputs']) == 4
    assert [p.name for p in (tmp_path / 'disk1').iterdir()] == ['seen']
    assert seen('disk0') + seen('disk1') == alone and abs(seen('disk0') - seen('disk1')) < 0.2 * alone


def test_the_papers_probe(well, here, capsys, monkeypatch):
    """Its settings, the model's own for that system, and at most so many windows of train and valid."""
    made(well, 'out/a', model='videomae')
    seen = []
    attentive = probe.attentive
    monkeypatch.setattr(evaluation.probe, 'attentive', lambda splits, *args, **settings: seen.append(
        ({k: len(x) for k, (x, _) in splits.items()}, settings)) or attentive(splits, *args, **settings))
    monkeypatch.setitem(models.PAPER_PROBE, ('videomae', 'active_matter'), dict(noise=0.1, dropout=0.2))
    monkeypatch.setattr(find_system('active_matter'), 'probe_windows', (20, 9))
    noises, encode = [], evaluation.Run.encode
    monkeypatch.setattr(evaluation.Run, 'encode', lambda run, *args, **settings: noises.append(settings.get('noise'))
                        or encode(run, *args, **settings))
    dropped, dropout = [], torch.nn.Dropout
    monkeypatch.setattr(probe.nn, 'Dropout', lambda p: dropped.append(p) or dropout(p))
    says(capsys, '--probe', 'paper', '--epochs', 2, '--stride', 16)
    assert noises[0] == 0.1 and 0.2 in dropped
    windows, settings = seen[0]
    assert (windows['train'], windows['valid']) == (20, 9)
    assert {k: settings[k] for k in ('batch', 'warmup_epochs', 'keep_best', 'dropout', 'scored')} == dict(
        batch=256, warmup_epochs=0, keep_best=False, dropout=0.2, scored='valid')
    run = evaluation.Run('out/a', evaluation.Settings())
    run.probe_on(16, (20, 9))
    chosen = run.windows['train'].tolist()
    run.probe_on(16)
    assert len(chosen) == 20 and all(w in run.windows['train'].tolist() for w in chosen)
    assert len({r for r, _ in chosen}) == len(run.splits['train'].runs)               # drawn, not the first ones
    assert run.targets['train'].shape == (len(run.windows['train']), 2)


def test_what_the_log_ends_with(tmp_path):
    """Means over its last 100 steps, of losses and the embedding's health; nothing, if there is no log."""
    log = tmp_path / 'log.jsonl'
    assert evaluation.last_steps(log) == {}
    log.write_text(''.join(json.dumps(dict(step=i, loss=i, embedding_rank=2 * i, lr=1, seconds=i, memory_gb=1,
                                           samples_per_s=1)) + '\n' for i in range(150)))
    assert evaluation.last_steps(log) == {'loss': 99.5, 'embedding_rank': 199.0}


def test_floors_of_a_table(well, here, monkeypatch, capsys):
    """The untrained encoder without its head, statistics without and with products; of what has no head, nothing."""
    train([str(v) for v in (*NANO, '--data-dir', well, '--steps', 1, '--out', 'out/small')])
    made(well, 'out/convnext')
    widths, fit = {}, evaluation.fit_probes
    monkeypatch.setattr(evaluation, 'fit_probes', lambda splits, *args, **how: widths.setdefault(
        how.get('title') or args[1], splits['train'][0].shape[2]) and fit(splits, *args, **how))
    says(capsys, 'out/small', 'out/convnext', *QUICK)
    assert (widths['random init'], widths['random features']) == (8, 8 + 8 + 8)        # with its head, and without
    by = {name: json.loads((here / f'out/{name}/eval.json').read_text())['rows'] for name in ('small', 'convnext')}
    assert list(by['small']) == ['JEPA', 'JEPA, with products', 'random init', 'random features', 'field statistics',
                                 'field statistics, with products', 'predict the mean']
    assert 'random features' not in by['convnext']
    assert list(by['small']['random features']) == list(by['small']['field statistics']) == ['linear', 'knn']
    assert list(by['small']['JEPA, with products']) == ['linear']
    says(capsys, 'out/small', *QUICK, '--probes', 'attentive')
    rows = json.loads((here / 'out/small/eval.json').read_text())['rows']
    assert list(rows) == ['JEPA', 'random init', 'predict the mean']

    # these features are what the head is given
    run = evaluation.Run('out/small', evaluation.Settings(stride=24))
    encoder, given = run.model('cpu', trained=False).network.encoder, []
    encoder.head.register_forward_hook(lambda module, x, y: given.append(x[0]))
    model = run.model('cpu', trained=False)
    model.network.encoder.head = torch.nn.Identity()
    x = run.splits['valid'].load(run.windows['valid'][:2], frames=16)
    encoder(model.normalise(x))
    assert torch.equal(model.embed(x), given[0].flatten(1, 2))


def test_products_are_of_two_features():
    splits = {name: (torch.randn(9, 2, 3), torch.zeros(9, 1)) for name in ('train', 'valid')}
    z = probe.standardize(splits)['valid'][0]
    found = evaluation.with_products(splits)['valid'][0]
    assert found.shape == (9, 1, 3 + 6)
    by_hand = [z[:, 0], z[:, 1], z[:, 2], *(z[:, i] * z[:, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)))]
    assert torch.allclose(found[:, 0], torch.stack(by_hand, 1))


def test_noise_is_on_all_fields(trained, here, monkeypatch, capsys):
    """--noise: probes fitted to noisy windows, and to clean ones, both scored on noisy ones; --noise 0: none, also
    where the encoder was trained with noise."""
    shutil.copytree(trained, 'out/a')
    seen = []
    fit = evaluation.fit_probes
    monkeypatch.setattr(evaluation, 'fit_probes', lambda splits, *args, **how: seen.append(splits) or fit(
        splits, *args, **how))
    said = says(capsys, 'out/a', *QUICK, '--probes', 'linear', '--noise', 0.5, '--split', 'test')
    rows = json.loads((here / 'out/a/eval.json').read_text())
    assert rows['probe']['noise'] == 0.5 and 'JEPA, probe of clean fields' in said
    noisy, of_clean = seen[:2]
    assert list(of_clean) == ['train', 'valid', 'scored'] and of_clean['scored'] is noisy['test']
    assert not torch.equal(of_clean['train'][0], noisy['train'][0])
    seen.clear()
    says(capsys, 'out/a', *QUICK, '--probes', 'linear', '--split', 'test')
    assert torch.equal(seen[0]['train'][0], of_clean['train'][0]) and torch.equal(seen[0]['valid'][0], of_clean['valid'][0])
    state = load_checkpoint('out/a/ckpt.pt')
    torch.save({**state, 'config': {**state['config'], 'noise': 0.7}}, 'out/a/ckpt.pt')
    for flags, same in ([], False), (['--noise', 0], True):
        seen.append(None)
        says(capsys, 'out/a', *QUICK, '--probes', 'linear', '--split', 'test', *flags)
        later = next(splits for splits in seen[seen.index(None) + 1:])
        assert torch.equal(later['test'][0], seen[0]['test'][0]) == same
        seen[:] = seen[:1]
    for flag in ['--generalize', 'inputs'], ['--finetune']:
        with pytest.raises(SystemExit):
            evaluation.main(['out/a', '--noise', '0.1', *flag])
        assert 'choose one' in capsys.readouterr().err
    assert 'noise 0 on the fields' in says(capsys, 'out/a', *QUICK, '--probes', 'linear', '--noise', 0)


def test_an_encoder_is_tuned_from_a_run_without_labels(well, here, capsys):
    """--supervised --init: its encoder is that run's, the linear layer new; the other way round is refused."""
    made(well, 'out/a')
    made(well, 'out/b', '--supervised', '--init', 'out/a', '--lr', 1e-9, '--weight-decay', 0)
    one, other = (load_checkpoint(here / f'out/{name}/ckpt.pt')['model'] for name in 'ab')
    for name, value in one.items():
        assert torch.allclose(other[f'network.{name}'], value, atol=1e-6), name
    with pytest.raises(SystemExit):
        made(well, 'out/c', '--init', 'out/b')
    assert 'out/b/ckpt.pt' in capsys.readouterr().err


def test_every_windows_label_is_its_runs(well, here):
    """In the order of its tokens, in both splits, as the encoder sees them."""
    made(well, 'out/a')
    run = evaluation.Run('out/a', evaluation.Settings(stride=24))
    found = run.embed(lambda x, seeds: x.mean((3, 4))[:, :, 0][:, None], 'JEPA')       # a first frame's means
    for name in 'train', 'valid':
        split, (tokens, labels) = run.splits[name], found[name]
        by_hand = (split.labels(run.labels) - run.splits['train'].labels(run.labels).mean(0)) / run.splits['train'].labels(run.labels).std(0)
        for i, (which, t) in enumerate(run.windows[name]):
            assert torch.allclose(tokens[i, 0], torch.tensor(split.fields[which, :, t].mean((1, 2))), atol=1e-5)
            assert labels[i].tolist() == pytest.approx(by_hand[which].tolist())


def test_labels_by_run_are_those_of_the_files(well, here, capsys):
    """In the order of `by_run`, whose errors are of the same runs."""
    made(well, 'out/a')
    says(capsys, 'out/a', *QUICK, '--split', 'test', '--probes', 'linear')
    result = json.loads((here / 'out/a/eval.json').read_text())
    by_hand = [(f['scalars/alpha'][()], f['scalars/zeta'][()]) for f in map(h5py.File, files_of(well / 'active_matter', 'test'))
               for _ in range(len(f['t0_fields/concentration']))]
    assert list(zip(result['labels_by_run']['alpha'], result['labels_by_run']['zeta'])) == by_hand
    assert len(result['by_run']['JEPA']['linear']) == len(by_hand)


def test_runs_that_begin_alike_share_their_floors(well, here, monkeypatch, capsys):
    """Whatever they learn from there, and whatever the model's name; not if they are embedded or probed otherwise."""
    for name, flags in dict(one=[], two=['--lr', 0.5, '--loss', 'infonce'], three=['--noise', 0.5], four=['--seed', 1]).items():
        train([str(v) for v in (*NANO, '--data-dir', well, '--steps', 1, '--out', f'out/{name}', *flags)])
    train([str(v) for v in (*NANO, '--model', 'pixels', '--views', 'paired', '--data-dir', well, '--steps', 1, '--out', 'out/five')])
    asked, row = [], evaluation.evaluate_row
    monkeypatch.setattr(evaluation, 'evaluate_row', lambda run, args, title: asked.append((run.path.parent.name, title)) or row(
        run, args, title))
    runs = [f'out/{name}' for name in ('one', 'two', 'three', 'four', 'five')]
    says(capsys, *runs, *QUICK, '--probes', 'linear')
    assert [name for name, title in asked if title == 'random init'] == ['one', 'three', 'four']
    results = [json.loads((here / run / 'eval.json').read_text()) for run in runs]
    floors = [result['rows']['random init'] for result in results]
    assert floors[0] == floors[1] == floors[4] != floors[2] and floors[3] != floors[0]

    # statistics belong to the data, and to what a seed draws: noise, or the labels that are known
    assert [name for name, title in asked if title == 'field statistics'] == ['one']
    asked.clear()
    says(capsys, 'out/one', 'out/four', *QUICK, '--probes', 'linear', '--noise', 0.3)
    assert [name for name, title in asked if title == 'field statistics'] == ['one', 'four']

    # what they depend on besides
    run = evaluation.Run('out/one', evaluation.Settings(stride=24))
    begun = {run.beginning()}
    for change in (lambda: setattr(run, 'mlp_ratio', 3.0), lambda: setattr(run, 'probe_seed', 9),
                   lambda: setattr(run.c, 'label_fraction', 0.5), lambda: setattr(run.c, 'dtype', 'bfloat16')):
        change()
        begun.add(run.beginning())
    assert len(begun) == 5


def test_products_of_many_features_are_no_row(trained, here, monkeypatch, capsys):
    shutil.copytree(trained, 'out/a')
    embed = evaluation.Run.embed
    for width in 64, 65:
        monkeypatch.setattr(evaluation.Run, 'embed', lambda *args, **how: {
            name: (torch.randn(len(x), 1, width), y) for name, (x, y) in embed(*args, **how).items()})
        assert ('JEPA, with products' in says(capsys, 'out/a', *QUICK, '--probes', 'linear')) == (width == 64)
        monkeypatch.setattr(evaluation.Run, 'embed', embed)


def test_kept_embeddings_have_the_labels_of_their_runs(well, here, capsys):
    made(well, 'out/a')
    says(capsys, 'out/a', *QUICK, '--probes', 'linear', '--save-embeddings', 'kept.npz')
    run, kept = evaluation.Run('out/a', evaluation.Settings(stride=16, split='test')), np.load('kept.npz')
    embed = run.encode(run.model('cpu'))
    for i in range(0, len(kept['run']), 5):
        split = run.splits[str(kept['split'][i])]
        mine = split.runs[kept['run'][i]]
        assert kept['labels'][i].tolist() == [mine['scalars'][name] for name in run.labels] and kept['filename'][i] == mine['file']
        tokens = embed(split.load([(kept['run'][i], kept['frame'][i])], frames=16))
        assert np.allclose(kept['embedding'][i], tokens.mean(1)[0], atol=1e-5)


def test_the_part_of_the_domain_is_said(trained, well, monkeypatch):
    """All of it, if the run or the system says so; a table of both says that they are unlike."""
    run = evaluation.Run(trained, evaluation.Settings(data_dir=str(well)))
    monkeypatch.setattr(run, 'system', find_system('active_matter'))
    for whole, crop, words in ((True, ((0, 0.5), (0, 1)), 'whole domain'), (False, ((0, 1), (0, 1)), 'whole domain'),
                               (False, ((0, 0.5), (0, 1)), "paper's part of the domain")):
        run.c.whole = whole
        monkeypatch.setattr(run.system, 'crop', crop)
        assert run.field() == f'{words} at 32 x 32'
    monkeypatch.setattr(models.find_model('jepa'), 'ANY_SIZE', False, raising=False)
    assert run.field() == f'{words} at 32 x 32, in 4 tiles of 16 x 16'
