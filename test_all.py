"""
What README.md promises, end to end: python -m pytest test_all.py. The parts have their tests in tests/.

Nothing outside this folder is read; what the tests write goes to pytest's temporary folder.
"""
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import model as models
import probe
from eval import PUBLISHED_ROW as PUBLISHED
from helpers import (CHANNELS, FLUIDS, HERE, MODELS, NANO, RIVALS, STEPS, TINY, both_fluids, command, linked, losses,
                     make_miniature, refused, run)
from model import load_checkpoint, model_of
from systems import system_names

pytest_plugins = ['shared_fixtures']


def test_training_log_and_checkpoint(trained):
    rows = [json.loads(line) for line in (trained / 'log.jsonl').read_text().splitlines()]
    assert len(losses(trained)) == STEPS and np.isfinite(losses(trained)).all()
    for row in rows:
        assert row['loss'] == pytest.approx(10 * row['sim'] + 40 * row['std'] + 4 * row['cov'], rel=1e-4)
        assert 1 <= row['embedding_rank'] <= 8 and row['embedding_std'] > 0
    state = load_checkpoint(trained / 'ckpt.pt')
    assert state['step'] == STEPS and state['samples'] == STEPS * 8 and state['inputs']['channels'] == CHANNELS
    assert state['labels'] == ['alpha', 'zeta'] and not list(trained.glob('*.part'))


def test_same_command_same_losses(well, trained, tmp_path):
    """Bit for bit; and THE_WELL_DATA_DIR does what --data-dir does."""
    run('train.py', *TINY, '--out', 'again', cwd=tmp_path, THE_WELL_DATA_DIR=well)
    assert losses(tmp_path / 'again') == losses(trained)


def test_killed_run_resumes(well, trained, tmp_path):
    """kill -9 between two checkpoints, with a torn last line: the log ends up as if nothing had happened."""
    out, flags = tmp_path / 'out', [*TINY, '--data-dir', well, '--out', tmp_path / 'out']
    written = lambda: (out / 'log.jsonl').read_text().count('\n') if (out / 'ckpt.pt').exists() else 0
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(**command('train.py', *flags), cwd=tmp_path, **quiet)
    while process.poll() is None and written() < 8:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 8 <= written() < STEPS
    with open(out / 'log.jsonl', 'a') as log:
        log.write('{"step": 9, "lo')
    assert 'resuming at step' in run('train.py', *flags, cwd=tmp_path).stdout
    assert len(losses(out)) == STEPS and losses(out) == losses(trained)


def test_two_ranks_equal_one_process(well, tmp_path):
    """With accumulation: the same losses, and the same weights, on both ranks. Masks and directions are the same."""
    (tmp_path / 'all.py').write_text(f"""
import functools, gc, json, os, sys
sys.path.insert(0, {str(HERE)!r})
import model, torch, train
def only_the_group_is_left():                                            # else its end may wait for ever
    assert not any(type(thing) is train.DistributedDataParallel for thing in gc.get_objects())
train.start_ranks = functools.cache(train.start_ranks)                   # one group of ranks for all
train.dist.destroy_process_group = only_the_group_is_left
built, build = [], model.build_model
model.build_model = lambda *args: built.append(build(*args)) or built[-1]
for name, flags in json.load(open('flags.json')).items():
    train.main([*flags, '--out', sys.argv[1] + '/' + name])
    torch.save(built[-1].network.state_dict(), sys.argv[1] + '/' + name + '/rank' + os.environ.get('RANK', '0') + '.pt')
""")
    own = {'jepa': [*TINY, '--chunks', 5, '--recompute', 'mlp'], 'nano': NANO,
           'sigreg': [*NANO, '--loss', 'sigreg', '--target', 'ema'], 'infonce': [*NANO, '--loss', 'infonce'],
           'videomae': [*MODELS['videomae'], '--recompute'], 'vjepa': MODELS['vjepa'], 'pixels': MODELS['pixels']}
    common = ['--data-dir', well, '--dtype', 'float64', '--noise', 0, '--crop', 0, '--micro-batch', 4, '--steps', 6]
    flags = {name: [str(flag) for flag in [*flags, *common]] for name, flags in own.items()}
    (tmp_path / 'flags.json').write_text(json.dumps(flags))
    run(['all.py'], 'one', cwd=tmp_path)
    run(['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'all.py'], 'two', cwd=tmp_path)
    for name in own:
        outs = [tmp_path / processes / name for processes in ('one', 'two')]
        assert len(losses(outs[0])) == 6, name
        assert np.allclose(losses(outs[1]), losses(outs[0]), rtol=1e-5, atol=0), name
        one, two = (load_checkpoint(out / 'ckpt.pt')['model'] for out in outs)
        ranks = [torch.load(outs[1] / f'rank{r}.pt', weights_only=True) for r in (0, 1)]
        for k in one:
            assert torch.allclose(two[k], one[k], rtol=0, atol=1e-6), (name, k)
            assert torch.equal(ranks[0][k], ranks[1][k]) and torch.equal(ranks[0][k], two[k]), (name, k)


def test_local_rows_are_those_of_one_process(well, tmp_path):
    """--loss-rows local on two ranks: one process's loss at half the micro-batch, as in the official code."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', HERE / 'train.py']
    flags = [*TINY, '--data-dir', well, '--dtype', 'float64', '--noise', 0, '--crop', 0, '--views', 'paired',
             '--chunks', 1, '--standardize', 'false', '--steps', 4]     # nothing in the loss is drawn at random
    run('train.py', *flags, '--loss-rows', 'local', '--micro-batch', 4, '--out', 'one', cwd=tmp_path)
    run(torchrun, *flags, '--loss-rows', 'local', '--micro-batch', 8, '--out', 'two', cwd=tmp_path)
    run('train.py', *flags, '--loss-rows', 'global', '--micro-batch', 8, '--out', 'all', cwd=tmp_path)
    one, two, whole = (np.array(losses(tmp_path / name)) for name in ('one', 'two', 'all'))
    assert np.allclose(two, one, rtol=1e-5, atol=0) and (np.abs(whole - one) / one)[:, 3].min() > 1e-3         # cov
    weights = [load_checkpoint(tmp_path / name / 'ckpt.pt')['model'] for name in ('one', 'two')]
    assert all(torch.allclose(weights[0][k], weights[1][k], rtol=0, atol=1e-6) for k in weights[0])


def test_ranks_with_disks_of_their_own_resume_together(well, tmp_path):
    """Only the first rank has a checkpoint. Killed and started again, all go on where it stood."""
    (tmp_path / 'ranks.py').write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
os.makedirs('disk' + os.environ['RANK'], exist_ok=True)
os.chdir('disk' + os.environ['RANK'])
import torch, train
step = train.train_step
def and_note(*args):
    losses = step(*args)
    with open('steps', 'a') as f:
        f.write(f'{{args[5]}} ')
    if args[5] == int(os.environ.get('DIE_AFTER', -1)):
        os.kill(os.getpid(), 9)
    return losses
train.train_step = and_note
train.main()
""")
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'ranks.py']
    flags = [*TINY, '--data-dir', well, '--steps', 8, '--save-every', 3, '--out', 'out']
    subprocess.run(**command(torchrun, *flags, DIE_AFTER=4), cwd=tmp_path, capture_output=True, timeout=300)
    assert not (tmp_path / 'disk1/out/ckpt.pt').exists()
    assert load_checkpoint(tmp_path / 'disk0/out/ckpt.pt')['step'] == 3
    run(torchrun, *flags, cwd=tmp_path)
    for disk in 'disk0', 'disk1':
        assert (tmp_path / disk / 'steps').read_text() == '0 1 2 3 4 3 4 5 6 7 ', disk
    run(torchrun, *flags[:-1], 'never_killed', cwd=tmp_path)
    assert losses(tmp_path / 'disk0/out') == losses(tmp_path / 'disk0/never_killed')


def test_two_nodes_with_caches_of_their_own_equal_one_process(well, tmp_path):
    """Two torchrun agents, each with its folder: both build the cache, neither waits for the other's lock."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    flags = [*TINY, '--data-dir', well, '--dtype', 'float64', '--noise', 0, '--crop', 0, '--steps', 4]
    agents = []
    for node in 0, 1:
        torchrun = ['-m', 'torch.distributed.run', '--nnodes=2', f'--node_rank={node}', '--nproc_per_node=1',
                    '--master_addr=127.0.0.1', f'--master_port={port}', HERE / 'train.py']
        (tmp_path / f'node{node}').mkdir()
        agents.append(subprocess.Popen(**command(torchrun, *flags, '--cache-dir', 'cache', '--out', 'out'),
                                       cwd=tmp_path / f'node{node}', stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [agent.communicate(timeout=300)[0].decode() for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    run('train.py', *flags, '--out', 'one', cwd=tmp_path)
    assert np.allclose(losses(tmp_path / 'node0/out'), losses(tmp_path / 'one'), rtol=1e-5, atol=0)
    for node in 0, 1:
        names = [p.name for p in (tmp_path / f'node{node}/cache').glob('*/*')]
        assert len(names) == 2 * 3 and {name.rpartition('.')[2] for name in names} == {'npy', 'json'}


@pytest.mark.parametrize('model', RIVALS)
def test_rivals_train_resume_and_evaluate(well, tmp_path, model):
    """The spine's promises for each: same command, same losses; killed, resumed and finished as if never; one table."""
    flags = [*MODELS[model], '--data-dir', well, '--steps', 8]
    run('train.py', *flags, '--out', 'out/a', cwd=tmp_path)
    rows = losses(tmp_path / 'out' / 'a')
    assert len(rows) == 8 and np.isfinite(rows).all() and len({row[0] for row in rows}) == 8
    out = tmp_path / 'out' / 'b'
    process = subprocess.Popen(**command('train.py', *flags, '--out', out), cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / 'ckpt.pt').exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 'resuming at step' in run('train.py', *flags, '--out', out, cwd=tmp_path).stdout
    assert losses(out) == rows
    size = '--widths' if model == 'pixels' else '--size'
    refused('train.py', *flags, size, 'huge', '--out', 'out/c', cwd=tmp_path, words=['huge'])
    refused('train.py', *flags, '--lr', 1e30, '--save-every', 1, '--out', 'out/c', cwd=tmp_path, words=['the loss is'])
    table = run('eval.py', 'out/a', '--epochs', 2, '--finetune', 1, '--stride', 16, cwd=tmp_path).stdout
    title = models.title(model)
    result = json.loads((tmp_path / 'out' / 'a' / 'eval.json').read_text())
    width = 16 if model == 'pixels' else int(RIVALS[model][1])           # of the embedding
    rows, ratio = result['rows'], 12 if model in ('videomae', 'vjepa', 'pixels') else 4
    assert result['parameters']['attentive probe'] == sum(
        p.numel() for p in probe.AttentiveProbe(width, 2, ratio).parameters())
    tuned = [f'{name}, fine-tuned' for name in (title, 'random init')]
    for name in title, 'random init', *tuned:
        assert np.isfinite(rows[name]['attentive']['mean']) and f'\n{name} ' in table
    assert rows[tuned[0]] != rows[tuned[1]]


def test_several_checkpoints_in_one_table(well, trained, tmp_path):
    """JEPA and a rival side by side, by folder."""
    shutil.copytree(trained, tmp_path / 'out' / 'jepa')
    flags = [*MODELS['videomae'], '--steps', 2, '--stride', 8, '--data-dir', well]
    run('train.py', *flags, '--out', 'out/mae', cwd=tmp_path)
    said = run('eval.py', 'out/jepa', 'out/mae', '--epochs', 2, '--stride', 12, cwd=tmp_path).stdout
    one, two = (json.loads((tmp_path / 'out' / name / 'eval.json').read_text()) for name in ('jepa', 'mae'))
    for name, title in ('jepa', 'JEPA'), ('mae', 'VideoMAE'):            # each its own, whatever else is in the table
        result = json.loads((tmp_path / 'out' / name / 'eval.json').read_text())
        assert list(result['rows']) == [title, f'{title}, with products', 'random init', 'field statistics',
                                        'field statistics, with products', 'predict the mean']       # 3 of 45 files
        assert result['run']['model'] in ('jepa', 'videomae') and result['parameters']['attentive probe'] > 0
    rows = [line.split('  ')[0] for line in said.partition('guessing the mean')[2].splitlines()[4:]]
    assert rows[:9] == ['JEPA', 'JEPA, random init', 'VideoMAE', 'VideoMAE, random init', 'JEPA, with products',
                        'VideoMAE, with products', 'field statistics', 'field statistics, with products',
                        'predict the mean']
    assert 'whole domain at 32 x 32' in said and one['windows'] == two['windows'] and 'saw the' not in said
    assert 'Not like with like: JEPA trained on 320 windows; VideoMAE trained on 16 windows.' in said
    other = load_checkpoint(tmp_path / 'out' / 'mae' / 'ckpt.pt')
    torch.save({**other, 'config': {**other['config'], 'data': 'shear_flow'}}, tmp_path / 'other.pt')
    refused('eval.py', 'out/jepa', 'other.pt', '--data-dir', well, cwd=tmp_path)       # no shear flow there


def test_diverging_run_stops(well, tmp_path):
    """No NaN in the log, and the last good checkpoint is kept."""
    refused('train.py', *TINY, '--data-dir', well, '--lr', 1e30, '--save-every', 1, '--out', 'out', cwd=tmp_path,
            words=['the loss is', 'step', 'ckpt.pt'])
    assert 1 <= len(losses(tmp_path / 'out')) < STEPS and np.isfinite(losses(tmp_path / 'out')).all()
    state = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert all(torch.isfinite(v).all() for v in state['model'].values())
    model_of(state, 'out/ckpt.pt')


def test_eval_reports_the_table(well, trained, tmp_path):
    """On a dataset that has moved: THE_WELL_DATA_DIR goes before the place the checkpoint remembers."""
    moved, run_dir = linked(well / 'active_matter', tmp_path / 'moved' / 'active_matter'), tmp_path / 'out' / 'run'
    shutil.rmtree(moved / 'cache')
    shutil.copytree(trained, run_dir)
    table = run('eval.py', '--split', 'test', '--epochs', 3, cwd=tmp_path, THE_WELL_DATA_DIR=moved.parent).stdout
    assert (moved / 'cache').exists()
    result = json.loads((run_dir / 'eval.json').read_text())
    assert {'system', 'split', 'labels', 'rows', 'by_run', 'seeds', 'machine', 'parameters'} <= result.keys()
    assert (result['system'], result['split'], result['labels']) == ('active_matter', 'test', ['alpha', 'zeta'])
    for name in 'JEPA', 'random init', 'field statistics', 'predict the mean':
        for scores in result['rows'][name].values():
            assert scores['mean'] == pytest.approx((scores['alpha'] + scores['zeta']) / 2)
            row = next(line for line in table.splitlines() if line.startswith(name + ' '))
            assert f'{scores["alpha"]:.3f}' in row and f'{scores["mean"]:.3f}' in row
    assert result['rows']['JEPA'].keys() == {'attentive', 'linear', 'knn'}
    seen, asked = np.array([[-1, 1], [-1, 9], [-5, 1]]), np.array([[-1, 1], [-1, 9], [-5, 1], [-5, 9]])
    alpha, zeta = (((asked - seen.mean(0)) / seen.std(0))**2).mean(0)    # z-scored by the training files
    expected = {'alpha': alpha, 'zeta': zeta, 'mean': (alpha + zeta) / 2}
    assert result['rows']['predict the mean']['linear'] == pytest.approx(expected)


@both_fluids
def test_fluids_train_and_evaluate(fluids, tmp_path, name):
    """The same commands; the Reynolds number goes by its own name."""
    root = linked(fluids / name, tmp_path / 'data' / name)
    (root / 'simulated.json').unlink()
    flags = [*TINY, '--resolution', 0, '--steps', 3, '--data', name, '--out', 'out/a']
    said = run('train.py', *flags, cwd=tmp_path).stdout
    assert ('Reynolds' if name == 'shear_flow' else 'Rayleigh') in said
    run('eval.py', '--epochs', 2, cwd=tmp_path)
    result = json.loads((tmp_path / 'out' / 'a' / 'eval.json').read_text())
    assert result['labels'] == (['Reynolds', 'Schmidt'] if name == 'shear_flow' else ['Prandtl', 'Rayleigh'])
    paper = result['rows'].pop('JEPA' + PUBLISHED)
    assert paper == {'attentive': {'mean': 0.38 if name == 'shear_flow' else 0.13}}
    assert all(np.isfinite(list(scores.values())).all() for row in result['rows'].values() for scores in row.values())


@pytest.mark.parametrize('name', system_names())
def test_smoke(tmp_path, fluids, name):
    """The README's one-minute commands end in a table and say what it is worth."""
    small = []
    if name in FLUIDS:                                                   # they are simulated in test_simulate.py
        (linked(fluids / name, tmp_path / 'data/smoke' / name) / 'simulated.json').unlink()
        small = ['--crop', 16]
    one = run('train.py', '--preset', 'smoke', '--data', name, *small, cwd=tmp_path)
    two = run('eval.py', '--epochs', 10, cwd=tmp_path)
    assert '\nJEPA ' in two.stdout and 'A smoke run: these numbers mean nothing.' in two.stdout
    assert '\r' not in one.stderr + two.stderr                           # progress in plain lines
    assert 'simulating' in one.stderr or name in FLUIDS
    assert {p.name for p in tmp_path.iterdir()} == {'data', 'out'} and (tmp_path / 'data/smoke').is_dir()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_nothing_is_said_of_what_is_not_done(mini, monkeypatch):
    """A dataset that is complete is not `simulated`: no bar that jumps to 100%."""
    monkeypatch.setattr(sys, 'stderr', Terminal())
    make_miniature(mini.parent)
    assert sys.stderr.getvalue() == ''
