"""cells.py: the commands of a cell, what is made again, what is said of it, jobs, and failures."""
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import model as models
import train
from benchmark import cells as benchmark
from benchmark import report
from benchmark.cells import (GROUPS, ROWS, SCORED, Settings, find_cell, progress, settings_of, what_is_missing,
                             why_stale)
from helpers import HERE, make_published
from systems import system_names
from test_report import result


def cell_of(name, **settings):
    return find_cell(name, Settings(**settings))


def result_of(cell, minutes=10, **changes):
    """What eval.json of a cell would hold; `changes` of the settings that it was trained with."""
    own, scored = settings_of(cell)
    row = models.title(own['model']) + ', supervised' * own['supervised']
    run = {'model': own['model'], 'preset': cell.preset, 'windows_seen': 9, 'train_seconds': 60 * minutes,
           'memory_gb': 1.0, 'settings': own | changes}
    own = result(0.2, cell.seed, row, system=cell.system, probe=scored, run=run, seconds=120, parameters={'encoder': 9})
    return own | ({'generalization': {}} if scored['generalize'] else {})


def put(name, *args, **changes):
    """A result, as if the cell had been made."""
    cell = cell_of(name)
    cell.result.parent.mkdir(parents=True, exist_ok=True)
    cell.result.write_text(json.dumps(result_of(cell, *args, **changes)))
    return cell.result


def put_run(name, step=None, cell=None, **changes):
    """A checkpoint, as if the cell had been trained, up to `step` or to the end."""
    cell = cell or cell_of(name)
    c, _, options = train.parse(cell.train[1:], '', missing=True)
    cell.run.mkdir(parents=True, exist_ok=True)
    torch.save({**dict.fromkeys(models.IN_CHECKPOINT), 'inputs': {'channels': []}, 'mean': [], 'std': [],
                'config': dataclasses.asdict(c) | changes, 'options': dataclasses.asdict(options),
                'step': c.steps if step is None else step, 'steps': c.steps}, cell.run / 'ckpt.pt')
    return cell.run / 'ckpt.pt'


class Ran(list):
    """What was run, (cell, script, flags); each pretends to do its work, having called `before(cell, script)`."""

    def __init__(self):
        self.before, self.fails, self.making = lambda *_: None, set(), threading.local()

    def __call__(self, command, env, stdout, stderr):
        script, flags, name = Path(command[1]), command[2:], self.making.name
        assert command[0] == sys.executable and script.parent == report.HERE
        script = script.name
        with open(f'{cell_of(name).run}.lock') as mine, pytest.raises(BlockingIOError):      # nobody else makes it
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert env['OMP_NUM_THREADS'] == os.environ.get('OMP_NUM_THREADS', '1')
        self.append((name, script, flags))
        self.before(name, script)
        failed = (name, script) in self.fails
        if not failed:
            self.pretend(name, script, flags)
        return subprocess.CompletedProcess(command, 2 * failed)

    def pretend(self, name, script, flags):
        cell = cell_of(name, data_dir=flags[flags.index('--data-dir') + 1])
        if cell.start and str(cell.start.run) == flags[flags.index('--out') + 1 if '--out' in flags else 0]:
            cell, name = cell.start, cell.start.name
        if script == 'train.py' and not (cell.run / 'ckpt.pt').exists():
            assert flags == cell.train[1:]
            put_run(name, cell=cell)
        if script == 'eval.py':
            (cell.run / 'eval.json').write_text(json.dumps(result_of(cell) | {'by': len(self)}))

    def scripts(self):
        return [script for _, script, _ in self]


@pytest.fixture
def ran(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in 'THE_WELL_DATA_DIR', 'CUDA_VISIBLE_DEVICES':
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(benchmark.speed, 'gflop_per_window', lambda c, options: c.batch / 64)
    monkeypatch.setattr(benchmark.subprocess, 'run', ran := Ran())
    make = benchmark.make

    def told(cell, log, stop):
        ran.making.name, ran.making.stop = cell.name, stop
        return make(cell, log, stop)
    monkeypatch.setattr(benchmark, 'make', told)
    return ran


def fails(*argv):
    """Exit code 2."""
    with pytest.raises(SystemExit) as left:
        benchmark.main([*argv])
    assert left.value.code == 2


ROW, TUNED = 'shear_flow-jepa-nano-supervised', 'active_matter-mpp-nano'
WHOLE = ['simulate.py', 'train.py', 'eval.py']


# ---------------------------------------------------------------------------------------------
# a cell

@pytest.mark.parametrize('names, heads', [
    ([f'{ROW}-seed0', TUNED], ['shear_flow | seeds', 'active_matter | seeds']),
    (['fewer-labels'], [' | active_matter: the paper', ' | parameters of the encoder']),
    (['experiment', TUNED], [' | active_matter: attentive', 'first, second', 'active_matter | seeds']),
    ([], [' | active_matter: the paper', ' | parameters of the encoder', ' | active_matter: attentive', 'first, second',
          ' | active_matter: attentive'])])
def test_it_ends_in_the_tables_that_were_asked_for(ran, monkeypatch, capsys, names, heads):
    monkeypatch.setattr(report, 'labels_table', lambda *_: '')
    monkeypatch.setattr(report, 'carried_table', lambda *_: '')
    for name in (f'{system}-{row}-seed0' for system in system_names() for row in (
            'jepa-nano-vicreg', 'jepa-nano', 'jepa-nano-supervised', 'mpp-nano')):
        put(name)
    monkeypatch.setattr(benchmark, 'make_all', lambda *_: {})
    benchmark.main([*names, '--seeds', '1'])
    lines = capsys.readouterr().out.splitlines()
    tables = [above for above, line in zip(lines, lines[1:]) if line.startswith('|---')]
    assert len(tables) == len(heads) and all(table.startswith(f'| {head}') for table, head in zip(tables, heads))


def test_a_row_is_made_seed_by_seed(ran):
    """Simulated, trained and scored with a seed of its own, and copied; what is there is not made again."""
    benchmark.main([ROW, '--seeds', '2', '--jobs', '1'])
    assert ran == [(f'{ROW}-seed{k}', script, flags) for k in '01' for script, flags in (
        ('simulate.py', ['shear_flow', '--preset', 'nano', '--seed', k, '--data-dir', f'data/seed{k}']),
        ('train.py', ['--data', 'shear_flow', '--model', 'jepa', '--supervised', '--seed', k, '--data-dir',
                      f'data/seed{k}', '--out', f'rows/{ROW}-seed{k}']),
        ('eval.py', [f'rows/{ROW}-seed{k}', '--split', 'test', '--generalize', 'labels', '--data-dir', f'data/seed{k}']))]
    for k in 0, 1:
        made = json.loads(Path(f'results/cells/{ROW}-seed{k}.json').read_text())
        assert made['seeds']['data'] == k and made['cost'] == {'gflop_per_window': 0.5}              # of a micro-batch
    ran.clear()
    benchmark.main([ROW, '--seeds', '2', '--jobs', '1'])
    assert not ran
    benchmark.main([ROW, f'{ROW}-seed1', f'{ROW}-seed7', '--seeds', '1', '--results', 'a/b', '--jobs', '1'])
    assert sorted({name for name, _, _ in ran}) == [f'{ROW}-seed{k}' for k in (0, 1, 7)]
    assert ran.scripts() == WHOLE[:2] * 2 + WHOLE and len(list(Path('a/b').iterdir())) == 3


def test_what_is_scored_belongs_to_its_row(ran):
    benchmark.main([TUNED, '--seeds', '1', '--jobs', '1'])
    assert ran[-1][2] == [f'rows/{TUNED}-seed0', '--split', 'test', '--finetune', '5', '--finetune-lr', '1e-3',
                          '--data-dir', 'data/seed0']
    assert set(SCORED) <= set(ROWS)


def test_a_cell_may_start_from_another_ones_run(ran):
    """Whose training comes first, if it is not there, and is not scored."""
    row, base = 'shear_flow-jepa-nano-tuned-10', 'shear_flow-jepa-nano-infonce'
    assert settings_of(cell_of(f'{row}-seed1'))[0]['init'] == f'rows/{base}-seed1'
    benchmark.main([f'{row}-seed1', '--jobs', '1'])
    assert ran.scripts() == ['simulate.py', 'train.py', 'simulate.py', 'train.py', 'eval.py']
    flags = [flags for _, script, flags in ran if script == 'train.py']
    assert flags[0][flags[0].index('--out') + 1] == flags[1][flags[1].index('--init') + 1] == f'rows/{base}-seed1'
    assert '--init' not in flags[0] and [p.stem for p in Path('results/cells').iterdir()] == [f'{row}-seed1']
    ran.clear()
    benchmark.main([f'{row}-seed1', '--jobs', '1'])
    assert not ran


def test_a_run_may_be_scored_in_two_ways(ran):
    """It is trained once; each way has its result."""
    row, base = 'shear_flow-jepa-nano-at-noise', 'shear_flow-jepa-nano'
    benchmark.main([base, row, '--seeds', '1', '--jobs', '1'])
    assert [flags[0] for _, script, flags in ran if script == 'eval.py'] == [f'rows/{base}-seed0'] * 2
    ways = [json.loads(Path(f'results/cells/{name}-seed0.json').read_text())['probe'] for name in (base, row)]
    assert [(way['noise'], way['generalize']) for way in ways] == [(-1.0, 'labels'), (0.3, '')]
    ran.clear()
    benchmark.main([base, row, '--seeds', '1', '--jobs', '1'])
    assert not ran


def test_what_was_not_scored_to_the_end_is_scored_again(ran):
    """On valid, before the checkpoint's last step, or with other settings; a finished table is only copied."""
    table, kept = Path(f'rows/{ROW}-seed0/eval.json'), Path(f'results/cells/{ROW}-seed0.json')
    for spoil, scored in ((lambda: table.write_text(json.dumps(dict(split='valid'))), ['eval.py']),
                          (lambda: os.utime(table, (1, 1)), ['eval.py']),
                          (lambda: table.write_text(table.read_text().replace('"epochs": 100', '"epochs": 9')),
                           ['eval.py']), (lambda: None, [])):
        benchmark.main([ROW, '--seeds', '1', '--jobs', '1'])
        spoil()
        kept.unlink()
        ran.clear()
        benchmark.main([ROW, '--seeds', '1', '--jobs', '1'])
        assert ran.scripts() == [*WHOLE[:2], *scored] and json.loads(kept.read_text())['probe']['epochs'] == 100


def test_results_of_other_data_are_refused(ran, capsys):
    """Nor is anything copied if a command fails."""
    benchmark.main([ROW, '--seeds', '1', '--jobs', '1'])
    table, kept = Path(f'rows/{ROW}-seed0/eval.json'), Path(f'results/cells/{ROW}-seed0.json')
    other = json.loads(table.read_text())
    other['seeds']['data'] = 1
    table.write_text(json.dumps(other))
    kept.unlink()
    fails(ROW, '--seeds', '1', '--jobs', '1')
    assert 'delete data/seed0' in capsys.readouterr().err.splitlines()[-1]
    table.unlink()
    for script in WHOLE:
        ran.fails = {(f'{ROW}-seed0', script)}
        fails(ROW, '--seeds', '1', '--jobs', '1')
        assert f'{script} ' in (last := capsys.readouterr().err.splitlines()[-1]) and last.endswith(' failed')
    assert not kept.exists()


@pytest.mark.parametrize('name', ['active_matter-gan-nano', 'jepa-nano', f'{ROW}-seed', f'{ROW}-seedx', 'paper'])
def test_unknown_rows_are_refused(ran, capsys, name):
    """Before anything is run."""
    fails(ROW, name)
    assert 'no row ' in capsys.readouterr().err.splitlines()[-1] and not ran and not list(Path().iterdir())


@pytest.mark.parametrize('flags, words', [
    (['--preset', 'paper'], 'no active_matter under data'), (['shear_flow-disco-paper'], 'no shear_flow under data'),
    (['--preset', 'macro'], 'macro'), (['--seeds', '0'], '--seeds'), (['--jobs', '-1'], '--jobs')])
def test_what_cannot_be_made_is_refused(ran, capsys, flags, words):
    """The paper's sizes are for The Well's files: nothing is simulated for them."""
    fails(*flags)
    assert words in capsys.readouterr().err.splitlines()[-1] and not ran and not list(Path().iterdir())


def test_the_wells_files_are_found_where_train_py_finds_them(ran):
    """Where they were downloaded to; they have no seed of ours, and nothing is simulated."""
    make_published('well/datasets')
    benchmark.main(['active_matter-jepa-paper-seed2', '--data-dir', 'well', '--preset', 'paper', '--jobs', '1'])
    assert ran.scripts() == WHOLE[1:] and all('well' in flags for _, _, flags in ran)


# ---------------------------------------------------------------------------------------------
# what is stale

def test_a_stale_cell_is_made_anew(ran, capsys):
    """What differs is said; a run of other settings is in its way, and nothing of it is touched."""
    name = f'{ROW}-seed0'
    kept = put(name, lr=0.5)
    file = put_run(name, lr=0.5)
    content = file.read_bytes()
    benchmark.main([ROW, '--seeds', '1', '--dry-run'])
    said = capsys.readouterr().out
    assert f'{name}: training (stale: lr 0.5, now 0.003; delete rows/{name} first' in said
    assert '0 of 1 cells are there' in said and not ran
    fails(ROW, '--seeds', '1', '--jobs', '1')
    assert '(lr 0.5, now 0.003): delete it' in capsys.readouterr().err.splitlines()[-1] and not ran
    assert file.read_bytes() == content
    file.unlink()
    benchmark.main([ROW, '--seeds', '1', '--jobs', '1'])
    assert ran.scripts() == WHOLE and json.loads(kept.read_text())['run']['settings']['lr'] == 0.003


def test_a_run_of_other_settings_is_no_beginning(ran, capsys):
    """A cell with no result, too, is not made of it."""
    cell = cell_of(f'{ROW}-seed0')
    put_run(f'{ROW}-seed0', steps=7)
    assert progress(cell)[2] == 'steps 7, now 2400'
    assert what_is_missing(cell)[0] == 'training' and 'delete rows/' in what_is_missing(cell)[1]
    fails(ROW, '--seeds', '1', '--jobs', '1')
    assert not ran and 'delete it' in capsys.readouterr().err.splitlines()[-1]
    put_run(f'{ROW}-seed0')
    put(f'{ROW}-seed0', lr=0.5)                                          # killed before it could replace this
    assert what_is_missing(cell) == ('scoring', 'stale: lr 0.5, now 0.003; trained to step 2400 of 2400')


def test_where_and_on_what_machine_a_cell_was_made_does_not_matter(ran):
    cell = cell_of(f'{ROW}-seed0')
    stale = lambda **changes: why_stale(cell, result_of(cell, **changes))
    assert stale(out='elsewhere', data_dir='b', cache_dir='c', device='cuda', save_every=7) == ('', '')
    assert stale(cache='int16', log_every=7) == ('', '')                 # settings that are gone
    assert stale(older=1) == ('', '')
    assert stale(steps=7, seed=3)[1] == 'steps 7, now 2400, seed 3, now 0'
    assert stale(micro_batch=8) == ('training', 'micro_batch 8, now 32')
    younger = result_of(cell)
    del younger['run']['settings']['label_fraction'], younger['probe']['fractions']
    assert why_stale(cell, younger) == ('', '')
    whole = result_of(cell_of('active_matter-jepa-nano-short-supervised-seed0'))
    del whole['run']['settings']['label_fraction']
    fewer = cell_of('active_matter-jepa-nano-short-supervised-10-seed0')
    assert why_stale(fewer, whole) == ('training', 'label_fraction 1.0, now 0.1')
    scored = result_of(cell)
    scored['probe']['epochs'] = 7
    assert why_stale(cell, scored) == ('scoring', 'epochs 7, now 100')
    paper = cell_of('active_matter-jepa-paper-seed0')                    # whose micro-batch depends on the GPUs
    assert why_stale(paper, result_of(paper, micro_batch=64)) == ('', '')


def test_what_was_not_asked_of_an_old_cell(ran, capsys):
    """How far it carries: a matter of scoring if its run is there, and of training if it is not."""
    row = 'active_matter-videomae-nano'
    name = f'{row}-seed0'
    kept = put(name)
    assert what_is_missing(cell_of(name)) == ('', '')
    old = json.loads(kept.read_text())
    del old['generalization'], old['probe']['generalize'], old['probe']['fractions']
    kept.write_text(json.dumps(old))
    assert what_is_missing(cell_of(name)) == ('training', 'stale: generalize , now labels,values,inputs')
    put_run(name, step=9)
    assert what_is_missing(cell_of(name)) == (
        'training', 'stale: generalize , now labels,values,inputs; trained to step 9 of 800')
    put_run(name)
    (Path(f'rows/{name}') / 'eval.json').write_text(json.dumps(old))
    benchmark.main([row, '--seeds', '1', '--jobs', '1'])
    assert 'scoring (stale: generalize , now labels,values,inputs; ' in capsys.readouterr().out
    assert ran.scripts() == WHOLE and 'generalization' in json.loads(kept.read_text())


# ---------------------------------------------------------------------------------------------
# the plan

def test_a_dry_run_makes_nothing_and_counts(ran, capsys):
    benchmark.main(['--dry-run'])
    rows = {row for group in GROUPS['nano'].values() for row in group}
    said = capsys.readouterr().out
    assert not ran and not list(Path().iterdir())
    assert f'0 of {3 * len(rows)} cells are there' in said
    assert all(f'{row}-seed{k}: training\n' in said for row in rows for k in range(3))
    put(f'{ROW}-seed1')
    benchmark.main([ROW, '--dry-run'])
    assert '1 of 3 cells are there' in capsys.readouterr().out
    benchmark.main(['paper-tables', '--preset', 'smoke', '--seeds', '2', '--dry-run'])
    assert '0 of 24 cells are there' in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# jobs

def test_what_a_cpu_made_is_not_stale_where_there_is_a_gpu(ran, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: True)
    file = HERE / 'results' / 'cells' / 'active_matter-jepa-nano-seed0.json'
    assert why_stale(cell_of(file.stem), json.loads(file.read_text())) == ('', '')


def test_out_of_memory_in_one_cell_is_not_the_end(ran, capsys, monkeypatch):
    """Whatever it raises: the others are made, and it is named."""
    def count(c, options):
        if c.seed == 0:
            raise MemoryError('too large')
        return 1.0
    monkeypatch.setattr(benchmark.speed, 'gflop_per_window', count)
    fails(ROW, '--seeds', '2', '--jobs', '1')
    assert 'seed0: failed, too large' in capsys.readouterr().out and [p.stem for p in Path('results/cells').iterdir()] == [
        f'{ROW}-seed1']


def test_two_jobs_make_all_cells(ran, capsys, monkeypatch):
    """At once, each with a log of its own. One that fails is named in the end, and does not stop the others."""
    together, first = threading.Barrier(2, timeout=60), set()

    def before(name, script):
        if script == 'simulate.py' and len(first) < 2:
            first.add(name)
            together.wait()
    ran.before, ran.fails = before, {(f'{ROW}-seed1', 'train.py')}
    monkeypatch.setattr(report, 'write_pages', lambda cells: pytest.fail('the pages are of other results'))
    fails(ROW, '--seeds', '4', '--jobs', '2')
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith('error: ') and f'{ROW}-seed1: ' in last and f'rows/{ROW}-seed1.log says why' in last
    assert not any(f'{ROW}-seed{k}' in last for k in (0, 2, 3))
    assert {path.name for path in Path('results/cells').iterdir()} == {f'{ROW}-seed{k}.json' for k in (0, 2, 3)}
    assert {name for name, script, _ in ran if script == 'eval.py'} == {f'{ROW}-seed{k}' for k in (0, 2, 3)}
    for k in range(4):
        log = Path(f'rows/{ROW}-seed{k}.log').read_text()
        assert log.count('$ python ') == (2 if k == 1 else 3) and f'data/seed{k}' in log and 'data/seed4' not in log
    assert '4 of 4' in said.out and 'attentive 0.200, linear 0.200, knn 0.200' in said.out
    assert '| active_matter: ' not in said.out and '| shear_flow | seeds |' in said.out
    written = []
    monkeypatch.setattr(report, 'write_pages', written.append)
    monkeypatch.setattr(report, 'HERE', Path.cwd())
    ran.fails = set()
    benchmark.main([ROW, '--seeds', '4', '--jobs', '2'])
    assert written == [report.read_cells('results/cells')] and len(list(Path('results/cells').iterdir())) == 4


@pytest.mark.parametrize('fails', [True, False])
def test_ctrl_c_starts_no_other_cell(ran, capsys, fails):
    """Nor the next script of the one that is being made, if its present one ends well all the same."""
    def interrupt(name, script):
        if len(ran) == 1:                                                # as its script has, too
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert ran.making.stop.wait(60)
    ran.before, ran.fails = interrupt, {(f'{ROW}-seed{k}', 'simulate.py') for k in range(3) if fails}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)    # which what runs in the background has not
    try:
        with pytest.raises(SystemExit, match='130'):
            benchmark.main([ROW, '--seeds', '3', '--jobs', '1'])
    finally:
        signal.signal(signal.SIGINT, before)
    assert [name for name, _, _ in ran] == [f'{ROW}-seed0'] and capsys.readouterr().out.count(': starts') == 1
