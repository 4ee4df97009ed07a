"""benchmark.py: the commands of a cell, what is made again, what is said of it, jobs, and failures."""
import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import benchmark
import config
import model as models
import report
from benchmark import Cell, Settings
from helpers import HERE
from rows import GROUPS, ROWS, SCORED
from systems import system_names
from test_report import result


def cell_of(name, **settings):
    return Cell(name, Settings(**settings))


def result_of(cell, minutes=10, **changes):
    """What eval.json of a cell would hold; `changes` of the settings that it was trained with."""
    own, scored = cell.settings()
    row = models.title(own['model']) + ', supervised' * own['supervised']
    run = {'model': own['model'], 'preset': cell.preset, 'windows_seen': 9, 'train_seconds': 60 * minutes,
           'memory_gb': 1.0, 'settings': own | changes}
    own = result(0.2, cell.seed, row, system=cell.system, probe=scored, run=run, seconds=120, parameters={'encoder': 9})
    return own | ({'generalization': {}} if scored['generalize'] else {})


def put(name, *args, **changes):
    """A result, as if the cell had been made."""
    cell = cell_of(name)
    cell.result.parent.mkdir(exist_ok=True)
    cell.result.write_text(json.dumps(result_of(cell, *args, **changes)))
    return cell.result


def put_run(name, step=None, cell=None, **changes):
    """A checkpoint, as if the cell had been trained, up to `step` or to the end."""
    cell = cell or cell_of(name)
    c, _, options = config.parse(cell.train[1:], '')
    cell.run.mkdir(parents=True, exist_ok=True)
    torch.save({**dict.fromkeys(models.NEEDED), 'inputs': {'channels': []}, 'mean': [], 'std': [],
                'config': dataclasses.asdict(c) | changes, 'options': dataclasses.asdict(options),
                'step': c.steps if step is None else step, 'steps': c.steps}, cell.run / 'ckpt.pt')
    return cell.run / 'ckpt.pt'


class Ran(list):
    """What was run, (cell, script, flags); each pretends to do its work, having called `before(cell, script)`."""

    def __init__(self):
        self.before, self.fails, self.busy, self.guard, self.where = lambda *_: None, set(), set(), threading.Lock(), []

    def __call__(self, command, env, stdout, stderr, pass_fds):
        at = next(i for i, word in enumerate(command) if str(word).endswith('.py'))
        script, flags = Path(command[at]), command[at + 1:]
        assert command[0] == sys.executable and script.parent == benchmark.HERE
        start, script = ' '.join(command[1:at]), script.name
        lock, = pass_fds                                                 # which the child has, and nobody else
        name = next(p.stem for p in Path('rows').glob('*.lock') if os.path.samestat(os.fstat(lock), p.stat()))
        with open(f'rows/{name}.lock') as mine, pytest.raises(BlockingIOError):
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert env['OMP_NUM_THREADS'] == os.environ.get('OMP_NUM_THREADS', '1')
        ranks = re.fullmatch('-m torch.distributed.run --standalone --nproc_per_node=([0-9]+)|', start)[1]
        gpus = env.get('CUDA_VISIBLE_DEVICES', '')
        with self.guard:
            assert not self.busy & set(gpus.split(',')) - {''}
            self.busy |= set(gpus.split(','))
            self.append((name, script, flags))
            self.where.append((script, gpus, int(ranks or 1)))
        self.before(name, script)
        failed = (name, script) in self.fails
        if not failed:
            self.pretend(name, script, flags)
        with self.guard:
            self.busy -= set(gpus.split(','))
        return subprocess.CompletedProcess(command, 2 * failed)

    def pretend(self, name, script, flags):
        cell = cell_of(name, data_dir=flags[flags.index('--data-dir') + 1])
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
    monkeypatch.setattr(benchmark.bench_steps, 'gflop_per_window', lambda c, options: c.batch / 64)
    monkeypatch.setattr(benchmark.subprocess, 'run', ran := Ran())
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
    (['latents-or-pixels', ROW], [' | active_matter: attentive', 'shear_flow | seeds']),
    ([], [' | active_matter: the paper', ' | parameters of the encoder', ' | active_matter: attentive',
          *(f'{system} | seeds' for system in system_names() for _ in range(2))])])
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
        ('eval.py', [f'rows/{ROW}-seed{k}', '--split', 'test', '--data-dir', f'data/seed{k}']))]
    for k in 0, 1:
        made = json.loads(Path(f'results/{ROW}-seed{k}.json').read_text())
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


def test_what_was_not_scored_to_the_end_is_scored_again(ran):
    """On valid, before the checkpoint's last step, or with other settings; a finished table is only copied."""
    table, kept = Path(f'rows/{ROW}-seed0/eval.json'), Path(f'results/{ROW}-seed0.json')
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
    table, kept = Path(f'rows/{ROW}-seed0/eval.json'), Path(f'results/{ROW}-seed0.json')
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
    file = Path('well/datasets/active_matter/data/train/a.hdf5')
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, 'look_into', lambda file: (None, (256, 256)))
        benchmark.main(['active_matter-jepa-paper-seed2', '--data-dir', 'well', '--preset', 'paper', '--jobs', '1'])
    assert ran.scripts() == WHOLE[1:] and all('well' in flags for _, _, flags in ran)


# ---------------------------------------------------------------------------------------------
# what is stale

def test_a_stale_cell_is_made_anew(ran, capsys):
    """What differs is said; what its run had found is kept beside it, once."""
    name = f'{ROW}-seed0'
    kept, old = put(name, lr=0.5), Path(f'rows/{name}.old')
    content = put_run(name, lr=0.5).read_bytes()
    benchmark.main([ROW, '--seeds', '1', '--dry-run'])
    said = capsys.readouterr().out
    assert f'{name}    12 min   training (stale: lr 0.5, now 0.003)\n' in said and '0 of 1 cells are there' in said
    assert not ran and not old.exists()
    benchmark.main([ROW, '--seeds', '1', '--jobs', '1'])
    assert ran.scripts() == WHOLE and (old / 'ckpt.pt').read_bytes() == content
    assert json.loads(kept.read_text())['run']['settings']['lr'] == 0.003
    ran.clear()
    content = put_run(name, lr=0.6).read_bytes()
    put(name, lr=0.6)
    fails(ROW, '--seeds', '1', '--jobs', '1')
    assert 'delete one' in capsys.readouterr().err.splitlines()[-1] and not ran
    assert Path(f'rows/{name}/ckpt.pt').read_bytes() == content


def test_a_run_of_other_settings_is_no_beginning(ran, capsys):
    """It is as if it were not there: a cell with no result, too, is trained from the start."""
    put_run(f'{ROW}-seed0', steps=7)
    assert cell_of(f'{ROW}-seed0').state() == ('training', '') and cell_of(f'{ROW}-seed0').progress() == (0, 1)
    benchmark.main([ROW, '--seeds', '1', '--jobs', '1'])
    assert ran.scripts() == WHOLE and Path(f'rows/{ROW}-seed0.old/ckpt.pt').exists()
    assert models.load_checkpoint(Path(f'rows/{ROW}-seed0/ckpt.pt'))['config']['steps'] == 2400
    put(f'{ROW}-seed0', lr=0.5)                                          # killed before it could replace this
    assert cell_of(f'{ROW}-seed0').state() == ('scoring', 'lr 0.5, now 0.003')


def test_where_and_on_what_machine_a_cell_was_made_does_not_matter(ran):
    cell = cell_of(f'{ROW}-seed0')
    stale = lambda **changes: cell.why_stale(result_of(cell, **changes))
    assert stale(out='elsewhere', data_dir='b', cache_dir='c', device='cuda', save_every=7) == ('', '')
    assert stale(cache='int16') == ('training', 'cache int16, now float32')
    assert stale(older=1) == ('', '')
    assert stale(steps=7, seed=3)[1] == 'steps 7, now 2400, seed 3, now 0'
    assert stale(micro_batch=8) == ('training', 'micro_batch 8, now 32')
    younger = result_of(cell)
    del younger['run']['settings']['label_fraction'], younger['probe']['fractions']
    assert cell.why_stale(younger) == ('', '')
    whole = result_of(cell_of('active_matter-jepa-nano-short-supervised-seed0'))
    del whole['run']['settings']['label_fraction']
    fewer = cell_of('active_matter-jepa-nano-short-supervised-10-seed0')
    assert fewer.why_stale(whole) == ('training', 'label_fraction 1.0, now 0.1')
    scored = result_of(cell)
    scored['probe']['epochs'] = 7
    assert cell.why_stale(scored) == ('scoring', 'epochs 7, now 100')
    paper = cell_of('active_matter-jepa-paper-seed0')                    # whose micro-batch depends on the GPUs
    assert paper.why_stale(result_of(paper, micro_batch=64)) == ('', '')


def test_what_was_not_asked_of_an_old_cell(ran, capsys):
    """How far it carries: a matter of scoring if its run is there, and of training if it is not."""
    row = 'active_matter-videomae-nano'
    name = f'{row}-seed0'
    kept = put(name)
    assert cell_of(name).state() == ('', '')
    old = json.loads(kept.read_text())
    del old['generalization'], old['probe']['generalize'], old['probe']['fractions']
    kept.write_text(json.dumps(old))
    assert cell_of(name).state() == ('training', 'generalize False, now True')
    put_run(name, step=9)
    assert cell_of(name).state() == ('training', 'generalize False, now True')
    put_run(name)
    (Path(f'rows/{name}') / 'eval.json').write_text(json.dumps(old))
    benchmark.main([row, '--seeds', '1', '--jobs', '1'])
    assert 'scoring (stale: generalize False, now True)' in capsys.readouterr().out
    assert ran.scripts() == WHOLE and 'generalization' in json.loads(kept.read_text())
    assert not Path(f'rows/{name}.old').exists()


# ---------------------------------------------------------------------------------------------
# the plan

def test_a_dry_run_makes_nothing_and_counts(ran, capsys):
    benchmark.main(['--dry-run'])
    rows = {row for group in GROUPS['nano'].values() for row in group}
    said = capsys.readouterr().out
    assert not ran and not list(Path().iterdir())
    assert f'0 of {3 * len(rows)} cells are there' in said and f'and {3 * len(rows)} cells of unknown time' in said
    assert all(f'{row}-seed{k} ' in said for row in rows for k in range(3)) and said.count('? min') == 3 * len(rows)
    put(f'{ROW}-seed1')
    benchmark.main([ROW, '--dry-run'])
    assert '1 of 3 cells are there' in capsys.readouterr().out
    Path('data/seed0/shear_flow').mkdir(parents=True)
    Path('data/seed0/shear_flow/stats.yaml').touch()                     # is complete; there is a result of seed 1
    benchmark.main([ROW, '--dry-run'])
    assert capsys.readouterr().out.endswith('these are simulated: data/seed2/shear_flow.\n')
    benchmark.main(['paper-tables', '--preset', 'smoke', '--seeds', '2', '--dry-run'])
    assert '0 of 24 cells are there' in capsys.readouterr().out


def test_times_are_those_of_earlier_cells(ran, capsys):
    """Of the row in this system, or in another, or of the model; of a run that was broken off, the rest."""
    put('active_matter-videomae-nano-seed0', 58)
    put('active_matter-jepa-nano-ema-seed0', 28)
    put_run('active_matter-videomae-nano-seed2', 200)                    # of 800
    put_run('active_matter-videomae-nano-seed3')
    names = ['active_matter-videomae-nano-seed1', 'active_matter-videomae-nano-seed2',
             'active_matter-videomae-nano-seed3', 'shear_flow-videomae-nano-seed0', 'shear_flow-jepa-nano-vicreg-seed0',
             'shear_flow-jepa-nano-supervised-seed0', 'shear_flow-mpp-nano-seed0']
    for own, jobs in (60, '1'), (18, '2'):
        benchmark.main([*names, '--dry-run', '--jobs', jobs])
        said = capsys.readouterr().out
        lines = dict(line.split(maxsplit=1) for line in said.splitlines()[:-1])
        assert [lines[name] for name in names] == [
            '60 min   training', f'{58 * 0.75 + 2:.0f} min   training (trained to step 200 of 800)',
            '2 min   scoring (trained)', f'{own} min   training', '30 min   training', '? min   training',
            '? min   training']
        total = (60 + 45.5 + 2 + own + 30) / 60
        assert f'0 of 7 cells are there; the others take {total:.1f} hours of one job, and 2 cells of unknown time, ' \
               f'here with {jobs}: {total / int(jobs):.1f}.' in said
        put('shear_flow-videomae-nano-seed5', 16)


# ---------------------------------------------------------------------------------------------
# jobs

def test_what_a_cpu_made_is_not_stale_where_there_is_a_gpu(ran, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: True)
    file = HERE / 'results' / 'active_matter-jepa-nano-seed0.json'
    assert cell_of(file.stem).why_stale(json.loads(file.read_text())) == ('', '')


def test_out_of_memory_in_one_cell_is_not_the_end(ran, capsys, monkeypatch):
    """Whatever it raises: the others are made, and it is named."""
    def count(c, options):
        if c.seed == 0:
            raise MemoryError('too large')
        return 1.0
    monkeypatch.setattr(benchmark.bench_steps, 'gflop_per_window', count)
    fails(ROW, '--seeds', '2', '--jobs', '1')
    assert 'seed0: failed, too large' in capsys.readouterr().out and [p.stem for p in Path('results').iterdir()] == [
        f'{ROW}-seed1']


def test_two_jobs_make_all_cells(ran, capsys, monkeypatch):
    """At once, each with a log of its own. One that fails is named in the end, and does not stop the others."""
    together, first = threading.Barrier(2, timeout=60), set()

    def before(name, script):
        if script == 'simulate.py' and len(first) < 2:
            first.add(name)
            together.wait()
    ran.before, ran.fails = before, {(f'{ROW}-seed1', 'train.py')}
    monkeypatch.setattr(report, 'write_pages', lambda folder: pytest.fail('the pages are of other results'))
    fails(ROW, '--seeds', '4', '--jobs', '2')
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith('error: ') and f'{ROW}-seed1: ' in last and f'rows/{ROW}-seed1.log says why' in last
    assert not any(f'{ROW}-seed{k}' in last for k in (0, 2, 3))
    assert {path.name for path in Path('results').iterdir()} == {f'{ROW}-seed{k}.json' for k in (0, 2, 3)}
    assert {name for name, script, _ in ran if script == 'eval.py'} == {f'{ROW}-seed{k}' for k in (0, 2, 3)}
    for k in range(4):
        log = Path(f'rows/{ROW}-seed{k}.log').read_text()
        assert log.count('$ python ') == (2 if k == 1 else 3) and f'data/seed{k}' in log and 'data/seed4' not in log
    assert '4 of 4, about 0.0 hours to go' in said.out and 'attentive 0.200, linear 0.200, knn 0.200' in said.out
    assert '| active_matter: ' not in said.out and '| shear_flow | seeds |' in said.out
    written = []
    monkeypatch.setattr(report, 'write_pages', written.append)
    monkeypatch.setattr(benchmark, 'HERE', Path.cwd())
    ran.fails = set()
    benchmark.main([ROW, '--seeds', '4', '--jobs', '2'])
    assert written == [Path.cwd() / 'results'] and len(list(Path('results').iterdir())) == 4


@pytest.mark.parametrize('fails', [True, False])
def test_ctrl_c_starts_no_other_cell(ran, capsys, fails):
    """Nor the next script of the one that is being made, if its present one ends well all the same."""
    def interrupt(name, script):
        if len(ran) == 1:                                                # as its script has, too
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.5)
    ran.before, ran.fails = interrupt, {(f'{ROW}-seed{k}', 'simulate.py') for k in range(3) if fails}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)    # which what runs in the background has not
    try:
        with pytest.raises(KeyboardInterrupt):
            benchmark.main([ROW, '--seeds', '3', '--jobs', '1'])
    finally:
        signal.signal(signal.SIGINT, before)
    assert [name for name, _, _ in ran] == [f'{ROW}-seed0'] and capsys.readouterr().out.count(': starts') == 1


@pytest.mark.parametrize('flags, cells, shares', [
    ([], 4, {'0', '1', '2', '3'}), (['--jobs', '2'], 4, {'0,2', '1,3'}), (['--jobs', '1'], 1, {'0,1,2,3'}),
    ([], 3, {'0', '1', '2'})])                                           # a cell goes on with as many as it began with
def test_each_job_has_its_share_of_the_gpus(ran, monkeypatch, flags, cells, shares):
    """A rank for each of them, however few cells are left."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    ran.before = lambda *_: time.sleep(0.02)
    benchmark.main([ROW, '--seeds', str(cells), *flags])
    ranks = len(min(shares).split(','))
    assert {gpus for _, gpus, _ in ran.where} == shares and len(list(Path('results').iterdir())) == cells
    assert {(script, n) for script, _, n in ran.where} == {('simulate.py', 1), ('train.py', ranks), ('eval.py', ranks)}


def test_gpus_are_those_that_one_may_use(ran, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '5,7')
    benchmark.main([ROW, '--seeds', '2'])
    assert {gpus for _, gpus, _ in ran.where} == {'5', '7'}
    fails(ROW, '--jobs', '3')
    assert '3 jobs cannot share 2 GPUs evenly' in capsys.readouterr().err
