"""A run that is taken away and queued again: signals, checkpoints by the clock, other machines, other data, docs/slurm.md."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import h5py
import pytest
import torch

import common
import data
import eval as evaluation
import probe
import simulate
import train
from helpers import (ALPHAS, FORKS, GRID, HERE, RUNS, STEPS, TINY, ZETAS, command, files_of, linked, losses,
                     read_bytes)
from model import load_checkpoint, load_run
from run_script import run_script
from systems import find_system
from test_data import open_split

EXIT = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}


@pytest.fixture(autouse=True)
def before(monkeypatch, tmp_path):
    """Each in a folder of its own; a signal that a test sends may not end the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('THE_WELL_DATA_DIR', raising=False)
    handlers = {s: signal.signal(s, signal.default_int_handler) for s in EXIT}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


def ends(main, *flags):
    """The exit code of a script's main(), 0 if it ends well."""
    try:
        main([str(flag) for flag in flags])
    except SystemExit as e:
        return e.code
    return 0


def send(*signals):
    """They come to this process, and their handlers have run."""
    for s in signals:
        signal.raise_signal(s)


def during(monkeypatch, where, name, signals, number=0):
    """While function `name` of a module is called for the number-th time, the signals come."""
    function, calls = getattr(where, name), []

    def with_signals(*args, **kwargs):
        calls.append(args)
        if len(calls) == number + 1:
            send(*signals)
        return function(*args, **kwargs)
    monkeypatch.setattr(where, name, with_signals)
    return calls


# --- train.py
def test_a_signal_ends_a_run_after_its_step(well, trained, monkeypatch, capsys):
    """Saved, in one line that says where, and 128 + the signal's number. The same command goes on, as if never stopped."""
    flags = [*TINY, '--data-dir', well, '--save-every', 1000, '--out', 'out']
    for i, (s, code) in enumerate(EXIT.items()):
        with monkeypatch.context() as patch:
            during(patch, train, 'train_step', [s], 4)
            assert ends(train.main, *flags) == code
        said = capsys.readouterr().err.splitlines()
        step = 5 * (i + 1)
        assert said[-1] == f'stopped by {s.name} at step {step} of {STEPS}: the same command goes on (out/ckpt.pt)'
        assert sum('stopped' in line for line in said) == 1
        assert load_checkpoint('out/ckpt.pt')['step'] == len(losses(Path('out'))) == step
    assert not [thread for thread in threading.enumerate() if thread.name.startswith('ThreadPool')]
    assert ends(train.main, *flags) == 0 and losses(Path('out')) == losses(trained)


def test_a_signal_in_the_last_step_changes_nothing(well, monkeypatch, capsys):
    during(monkeypatch, train, 'train_step', [signal.SIGUSR1], 2)
    assert ends(train.main, *TINY, '--data-dir', well, '--steps', 3, '--out', 'out') == 0
    assert 'Next: python eval.py' in capsys.readouterr().out and load_checkpoint('out/ckpt.pt')['step'] == 3


def test_help_tells_the_exit_codes(capsys):
    assert ends(train.main, '--help') == 0
    assert '143,\n130 or 138 (128 + signal)' in capsys.readouterr().out


class Left(BaseException):
    pass


@pytest.mark.parametrize('torchrun', [False, True])
def test_a_second_signal_ends_at_once(well, monkeypatch, torchrun):
    """In the middle of a step, without a checkpoint. torchrun passes on what its processes have had: that one is the same."""
    def leave(code):
        raise Left(code)
    if torchrun:
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    monkeypatch.setattr(common.os, '_exit', leave)
    during(monkeypatch, train, 'train_step', [signal.SIGTERM, signal.SIGINT], 2)
    flags = [*TINY, '--data-dir', well, '--steps', 5, '--save-every', 1000, '--out', 'out']
    if torchrun:
        assert ends(train.main, *flags) == 143 and load_checkpoint('out/ckpt.pt')['step'] == 3
        common.STOP.came = time.monotonic() - 2.1
    else:
        with pytest.raises(Left, match='130'):
            train.main([str(flag) for flag in flags])
        assert not Path('out/ckpt.pt').exists()
    common.STOP.number = signal.SIGTERM
    with pytest.raises(Left, match='130'):
        common.STOP.receive(signal.SIGINT, None)


def test_all_ranks_stop_after_the_same_step(well, trained, tmp_path):
    """Although only one was told; the first has its checkpoint."""
    (tmp_path / 'ranks.py').write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import train
step = train.train_step
def and_note(*args):
    if os.environ['RANK'] == '1' and args[5] == 3:
        os.kill(os.getpid(), signal.SIGUSR1)
    terms = step(*args)
    with open('steps' + os.environ['RANK'], 'a') as f:
        f.write(f'{{args[5]}} ')
    return terms
train.train_step = and_note
train.main()
""")
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'ranks.py']
    p = subprocess.run(**command(torchrun, *TINY, '--data-dir', well, '--out', 'out', '--save-every', 1000),
                       cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert p.returncode == 1 and 'stopped by SIGUSR1 at step 4 of 40' in p.stderr, p.stderr        # torchrun's code
    assert (tmp_path / 'steps0').read_text() == (tmp_path / 'steps1').read_text() == '0 1 2 3 '
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['step'] == 4


class Job:
    """train.py in a process of its own, which knows PyTorch already."""

    def __init__(self, *flags):
        env = command('train.py')['env']
        self.folder = tempfile.mkdtemp(dir='.')
        self.said = Path(self.folder, 'stdout'), Path(self.folder, 'stderr')
        self.process = FORKS.Process(target=run_script, args=(str(HERE / 'train.py'), [str(f) for f in flags],
                                                              os.getcwd(), env, *map(os.path.abspath, self.said)))
        self.process.start()

    def ends(self):
        """(exit code, all it said)."""
        self.process.join(300)
        assert self.process.exitcode is not None
        return self.process.exitcode, ''.join(path.read_text() for path in self.said if path.exists())


def rehearse(flags, out, signals, seed=0):
    """So many signals at random moments of a run, begun again and again -> the steps it stopped at."""
    draw, stops, log = random.Random(seed), [], out / 'log.jsonl'
    for i in range(signals):
        job, early = Job(*flags), i % 3 == 2
        # every third before its first step, where Ctrl-C may find Python not ready; the others after a few steps
        s = draw.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL] if early else [*EXIT, signal.SIGKILL])
        if early:
            time.sleep(draw.uniform(0, 1))
        more = (log.read_text().count('\n') if log.exists() else 0) + draw.randint(1, 3)
        while not early and job.process.is_alive() and not (log.exists() and log.read_text().count('\n') >= more):
            time.sleep(draw.uniform(0, 0.02))
        if job.process.is_alive():
            os.kill(job.process.pid, s)
        code, said = job.ends()
        assert code in (0, -s, EXIT.get(s)) and 'Traceback' not in said, said
        stops.append(load_checkpoint(out / 'ckpt.pt')['step'] if (out / 'ckpt.pt').exists() else 0)
    return stops


def test_signals_at_random_moments(well, trained, tmp_path):
    """SIGTERM, SIGINT, SIGUSR1 or kill -9: the losses are those of a run that was left in peace."""
    flags = [*TINY, '--data-dir', well, '--out', tmp_path / 'out']
    stops = rehearse(flags, tmp_path / 'out', 5)
    assert stops == sorted(stops) and stops[-1] > 0
    assert Job(*flags).ends()[0] == 0
    assert losses(tmp_path / 'out') == losses(trained) and not list((tmp_path / 'out').glob('*.part'))


# --- before the first step, and in scripts with nothing to save: one line, at once
def one_line(capsys, s):
    said = capsys.readouterr().err.splitlines()
    return said[-1] == f'stopped by {s.name}: files that are complete are kept' and not any('Traceback' in line for line in said)


@pytest.mark.parametrize('script', ['train', 'eval'])
def test_ctrl_c_while_data_are_cached(well, trained, tmp_path, monkeypatch, capsys, script):
    """The file that is whole is kept, of the other nothing is left."""
    root = linked(well / 'active_matter', tmp_path / 'data/active_matter')
    shutil.rmtree(root / 'cache', ignore_errors=True)
    during(monkeypatch, data, 'read_run', [signal.SIGINT], RUNS['train'])                # of the second file
    if script == 'train':
        code = ends(train.main, *TINY, '--data-dir', root.parent, '--out', 'out')
    else:
        shutil.copytree(trained, 'out')
        code = ends(evaluation.main, 'out', '--data-dir', root.parent)
    assert code == 130 and one_line(capsys, signal.SIGINT)
    assert sorted(path.suffix for path in (root / 'cache').glob('*/*')) == ['.json', '.npy']
    assert not (Path('out') / ('eval.json' if script == 'eval' else 'ckpt.pt')).exists()


def test_a_signal_while_eval_probes(well, trained, monkeypatch, capsys):
    shutil.copytree(trained, 'out')
    before = read_bytes(Path('out'))
    during(monkeypatch, probe, 'attentive', [signal.SIGTERM])
    assert ends(evaluation.main, 'out', '--data-dir', well, '--stride', 24) == 143
    assert one_line(capsys, signal.SIGTERM) and read_bytes(Path('out')) == before


def test_ctrl_c_while_data_are_simulated(mini, tmp_path, monkeypatch, capsys):
    """Its threads end at the next frame, and leave whole files alone. (That it goes on is tested in test_simulate.py.)"""
    presets = find_system('active_matter').presets
    nano = simulate.find_system('active_matter').preset('nano')
    monkeypatch.setitem(presets, 'nano', type(nano)(**{**vars(nano), 'grid': (GRID, GRID), 'runs': RUNS, 'domain': {},
                                                       'pairs': [(a, z) for a in ALPHAS for z in ZETAS],
                                                       'files_at_once': 3, 'settings': {'dt': 0.0625}}))
    record, written = simulate.record, during(monkeypatch, simulate, 'write_well_file', [])

    def interrupted(*args, **kwargs):                                    # when a file is there
        if written and not common.STOP.number:
            os.kill(os.getpid(), signal.SIGINT)
            while not common.STOP.number:
                time.sleep(0.001)
        return record(*args, **kwargs)
    monkeypatch.setattr(simulate, 'record', interrupted)
    assert ends(simulate.main, 'active_matter', '--data-dir', 'data', '--unresolved') == 130
    assert one_line(capsys, signal.SIGINT) and not list(Path('data').rglob('*.part'))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith('batch')]
    made = list(Path('data').rglob('*.hdf5'))
    assert 0 < len(made) < 12 and all(path.read_bytes() == (mini / path.relative_to('data/active_matter')).read_bytes()
                                      for path in made)


def test_ctrl_c_ends_the_processes_that_cache(well, tmp_path):
    """Only their parent is told. None goes on, and no part of a file is left."""
    root = linked(well / 'active_matter', tmp_path / 'active_matter')
    shutil.rmtree(root / 'cache', ignore_errors=True)
    (tmp_path / 'caching.py').write_text(f"""
import signal, sys
sys.path.insert(0, {str(HERE)!r})
import common, data
from systems import find_system
read = data.read_run
def read_run(*args):                                                     # also in the processes, which import this
    for field in read(*args):
        yield field
        signal.pause()
data.read_run = read_run
@common.script
def main():
    data.LARGE = 1
    data.Split({str(root)!r}, find_system('active_matter'), 'train', processes=2)
if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
""")
    p = subprocess.Popen(**command([tmp_path / 'caching.py']), text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, start_new_session=True)
    while len(list(root.rglob('*.part'))) < 2 and p.poll() is None:
        time.sleep(0.02)
    p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=60)[0]                                  # until the last of them has closed it
    assert p.returncode == 130 and 'Traceback' not in said, said
    assert said.splitlines()[-1] == 'stopped by SIGINT: files that are complete are kept'
    assert not list(root.rglob('*.part')) and not list(root.rglob('*.npy'))


# --- checkpoints
@pytest.mark.parametrize('minutes, saved', [(0, [1, 2, 3, 4, 5, 6]), (2.5, [3, 6]), (100, [6])])
def test_saves_by_the_clock(well, monkeypatch, minutes, saved):
    """Of steps that take a minute each."""
    now, step, steps = [0.0], train.train_step, []

    def slow(*args):
        now[0] += 60
        return step(*args)
    monkeypatch.setattr(train, 'train_step', slow)
    monkeypatch.setattr(train.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(train, 'write_tensors', lambda path, state: steps.append(state['step']))
    flags = [*TINY, '--data-dir', well, '--steps', 6, '--save-every', 1000, '--save-minutes', minutes, '--out', 'out']
    monkeypatch.setattr(train.Path, 'exists', lambda self, exists=Path.exists: self.name == 'ckpt.pt' and bool(steps)
                        or exists(self))
    assert ends(train.main, *flags) == 0 and steps == saved


def test_checkpoints_are_kept(well, trained):
    """Those of a curve, each as the run was then; a run goes on from the last."""
    flags = [*TINY, '--data-dir', well, '--save-every', 1000, '--keep-every', 4, '--out', 'out']
    assert ends(train.main, *flags, '--steps', 9) == 0
    assert {path.name for path in Path('out').iterdir()} == {'ckpt.pt', 'ckpt-4.pt', 'ckpt-8.pt', 'log.jsonl'}
    for step in 4, 8:
        assert load_checkpoint(f'out/ckpt-{step}.pt')['step'] == step
        assert load_run(f'out/ckpt-{step}.pt').embed(torch.zeros(1, 11, 16, 32, 32)).shape == (1, 4, 8)
    assert load_checkpoint('out/ckpt.pt')['step'] == 9


def test_the_log_goes_on(well, trained, capsys):
    """A checkpoint older than the log, whose end is torn: every step once, time never goes back."""
    shutil.copytree(trained, 'out')
    state = torch.load('out/ckpt.pt', weights_only=True)
    flags = [*TINY, '--data-dir', well, '--steps', STEPS + 2, '--out', 'out']
    with open('out/log.jsonl', 'a') as log:
        for line in ({'step': STEPS + i, 'loss': 1.0, 'seconds': state['seconds'] + 50 + i} for i in range(9)):
            log.write(json.dumps(line) + '\n')
        log.write('{"step": 49, "loss": 1.0, "sec\0\0\0\n{"step": 50, "lo')
    assert ends(train.main, *flags) == 0 and 'resuming at step 40' in capsys.readouterr().out
    rows = [json.loads(line) for line in Path('out/log.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == list(range(STEPS + 2))
    seconds = [row['seconds'] for row in rows]
    assert seconds == sorted(seconds) and state['seconds'] < seconds[-1] < state['seconds'] + 50


# --- another machine, other data
@pytest.mark.parametrize('flags, note', [
    (['--micro-batch', 4], 'micro_batch 8, now 4: from step 40 on random draws differ, and so does a loss that compares'),
    (['--dtype', 'float64'], 'dtype float32, now float64: from step 40 on rounding differs'),
    (['--cache-dir', 'elsewhere', '--save-every', 7, '--save-minutes', 1, '--keep-every', 9], '')])
def test_a_run_goes_on_elsewhere(well, trained, capsys, flags, note):
    shutil.copytree(trained, 'out')
    assert ends(train.main, *TINY, '--data-dir', well, '--steps', STEPS + 2, *flags, '--out', 'out') == 0
    said = capsys.readouterr().out
    assert note in said and ('now' in said.replace('steps to 42', '')) == bool(note)
    assert len(losses(Path('out'))) == STEPS + 2


def change_values(root):
    with h5py.File(files_of(root)[1], 'r+') as f:
        f['t1_fields/velocity'][:] *= 7


def change_scalar(root):
    for split in 'train', 'valid', 'test':
        for file in files_of(root, split):
            with h5py.File(file, 'r+') as f:
                f['scalars/alpha'][...] *= 2


def change_another_scalar(root):
    """Which is the same in all files, and no label."""
    for file in files_of(root):
        with h5py.File(file, 'r+') as f:
            f['scalars/L'][...] = 10.5


def turn_values(root):
    """No mean and no standard deviation shows it."""
    with h5py.File(files_of(root)[1], 'r+') as f:
        f['t1_fields/velocity'][:] = f['t1_fields/velocity'][:][:, ::-1]


CHANGES = {
    'values': change_values, 'a label': change_scalar, 'another scalar': change_another_scalar,
    'turned': turn_values,
    'a file less': lambda root: files_of(root)[0].unlink(),
    'a file more': lambda root: shutil.copy(files_of(root)[0], files_of(root)[0].with_name('another.hdf5')),
    'another order': lambda root: files_of(root)[0].rename(root / 'data/train/z.hdf5')}


@pytest.mark.parametrize('change, old', [*((change, False) for change in CHANGES),
                                         *((change, True) for change in ('values', 'a label', 'turned'))])
def test_other_data_are_refused(well, trained, tmp_path, capsys, change, old):
    """In one line, and nothing is touched. Of older runs means and standard deviations are compared."""
    root = Path(shutil.copytree(well / 'active_matter', tmp_path / 'other/active_matter'))
    shutil.copytree(trained, 'out')
    CHANGES[change](root)
    if old:
        state = torch.load('out/ckpt.pt', weights_only=True)
        del state['data_hash']
        torch.save(state, 'out/ckpt.pt')
    before = read_bytes(Path('out'))
    code, said = ends(train.main, *TINY, '--data-dir', root.parent, '--out', 'out'), capsys.readouterr()
    if old and change == 'turned':                                       # no statistic shows it
        assert code == 0 and 'ckpt.pt is older: its data are known by mean, std and labels alone' in said.out
    else:
        last = said.err.splitlines()[-1]
        assert code == 2 and last.startswith('error: out/ckpt.pt was trained on other files than those in'), last
        assert str(root) in last and 'choose another --out' in last
    assert read_bytes(Path('out')) == before


def test_a_copy_of_the_data_will_do(well, trained, tmp_path, capsys):
    """In another folder, with other times and names; its cache is made anew."""
    root = Path(shutil.copytree(well / 'active_matter', tmp_path / 'scratch/active_matter'))
    shutil.rmtree(root / 'cache', ignore_errors=True)
    for file in files_of(root):
        os.utime(file, (1e9, 1e9))
        file.rename(file.with_name('renamed_' + file.name))
    shutil.copytree(trained, 'out')
    state = torch.load('out/ckpt.pt', weights_only=True)
    state['mean'] = [v * (1 + 1e-6) for v in state['mean']]              # as another processor adds them up
    torch.save(state, 'out/ckpt.pt')
    assert ends(train.main, *TINY, '--data-dir', root.parent, '--steps', STEPS + 1, '--out', 'out') == 0
    assert 'resuming at step 40' in capsys.readouterr().out
    after = load_checkpoint('out/ckpt.pt')
    assert after['data_hash'] == state['data_hash'] and after['step'] == STEPS + 1


def test_the_hash_has_what_16_blocks_may_miss(published):
    """A number somewhere in a large file, and the names of the channels."""
    split = open_split(published)
    hashes, split.paths = {split.data_hash()}, []
    hashes.add(split.data_hash())
    assert len(hashes) == 2                                              # of no file, and of two
    split.scalars['L'][1] += 1
    hashes.add(split.data_hash())
    split.channels[0] = 'another'
    assert len({*hashes, split.data_hash()}) == 4


# --- docs/slurm.md, and a shell script that plays the scheduler
def test_the_batch_script_of_the_page(well, trained, tmp_path):
    """Told that its time is over, it saves, is queued again, and ends as if nothing had happened."""
    page = (HERE / 'docs/slurm.md').read_text()
    script = re.search('```bash\n(.*?)```', page, re.DOTALL)[1]
    for line in '--signal=B:USR1@120', '--requeue', '--open-mode=append':
        assert f'\n#SBATCH {line}' in script
    bin_folder = tmp_path / '.venv/bin'
    bin_folder.mkdir(parents=True)
    (bin_folder / 'activate').write_text('PATH=$PWD/.venv/bin:$PATH\n')
    flags = ' '.join(map(str, [*TINY, '--save-every', 1000]))
    for name, text in {'srun': 'SLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"', 'scontrol': 'echo $@ >> requeued',
                       'python': f'shift; exec {sys.executable} {HERE}/train.py {flags} "$@"',
                       'scheduler': '''
log=out/jepa/log.jsonl
for i in 1 2 3; do
    bash job.sh >> job.log 2>&1 & job=$!
    if [ $i = 1 ]; then
        until [ -s $log ] || ! kill -0 $job; do sleep 0.05; done
        kill -USR1 $job
    fi
    wait $job; code=$?
    echo $code
    [ $code = 138 ] || break
done'''}.items():
        (bin_folder / name).write_text('#!/bin/bash\n' + text)
        (bin_folder / name).chmod(0o755)
    (tmp_path / 'job.sh').write_text(script.replace('/shared/the_well', str(well)).replace(
        '${TMPDIR:-/tmp}/$USER-cache', 'scratch'))
    env = command('train.py')['env'] | {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '1', 'SLURM_JOB_NAME': 'jepa'}
    p = subprocess.run(['bash', '.venv/bin/scheduler'], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    said = (tmp_path / 'job.log').read_text()
    assert p.stdout.split() == ['138', '0'] and (tmp_path / 'requeued').read_text() == 'requeue 7\n', p.stderr + said
    assert 'stopped by SIGUSR1 at step' in said and 'resuming at step' in said and 'Traceback' not in said
    assert losses(tmp_path / 'out/jepa') == losses(trained) and list((tmp_path / 'scratch').glob('*/*.npy'))


def test_two_trainings_do_not_share_a_folder(well, trained, capsys):
    """A requeued job may begin while the first still saves: one line, and nothing is touched."""
    shutil.copytree(trained, 'out')
    before = {path: path.read_bytes() for path in Path('out').iterdir()}
    with common.alone_in(Path('out')):
        assert ends(train.main, *TINY, '--data-dir', well, '--steps', STEPS + 2, '--out', 'out') == 2
    assert 'another process writes to out' in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path('out').iterdir()} == before
    assert ends(train.main, *TINY, '--data-dir', well, '--steps', STEPS + 2, '--out', 'out') == 0
