"""benchmark.py, killed again and again: it goes on, and its numbers are those of one that was left in peace."""
import fcntl
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import benchmark
from common import alone_in
from helpers import command, linked, losses

ROW = 'rayleigh_benard-jepa-smoke'
OUT, DATA = f'rows/{ROW}-seed0', 'data/seed0-smoke/rayleigh_benard'


class Benchmark:
    """A process with a group of its own, in which its scripts are, and what they say."""

    def __init__(self, folder, name):
        self.said = folder / f'{name}.txt'
        flags = ['--preset', 'smoke', '--seeds', 1, '--jobs', 1, ROW]
        with open(self.said, 'w') as file:
            self.process = subprocess.Popen(**command('benchmark.py', *flags, CUDA_VISIBLE_DEVICES=''), cwd=folder,
                                            stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def until(self, condition):
        while not condition(self.said.read_text()):
            assert self.process.poll() is None, self.said.read_text()
            time.sleep(0.01)

    def signal(self, number):
        """To it and to its scripts, of which some may outlive it."""
        os.killpg(self.process.pid, number)

    def ends(self):
        assert self.process.wait(timeout=300) == 0, self.said.read_text()
        return self.said.read_text()


def test_a_benchmark_that_was_killed_gives_the_same_errors(tmp_path):
    """With what it runs, in simulation and in scoring; and alone, in training: then the next one waits for what it
    left behind, and does not train beside it."""
    killed, peace = tmp_path / 'killed', tmp_path / 'peace'
    for folder in killed, peace:
        folder.mkdir()
    first = Benchmark(killed, 'first')
    first.until(lambda said: any((killed / DATA / 'data/train').glob('*.hdf5')))
    first.signal(signal.SIGKILL)
    assert first.process.wait() == -signal.SIGKILL and not (killed / DATA / 'stats.yaml').exists()

    second = Benchmark(killed, 'second')
    second.until(lambda said: (killed / OUT / 'log.jsonl').exists())
    second.signal(signal.SIGSTOP)
    second.process.kill()
    second.process.wait()
    linked(killed / DATA, peace / DATA)
    third, undisturbed = Benchmark(killed, 'third'), Benchmark(peace, 'undisturbed')
    third.until(lambda said: 'starts' in said)
    time.sleep(0.5)
    assert not (killed / OUT / 'ckpt.pt').exists() and '$ python' not in third.said.read_text()
    second.signal(signal.SIGCONT)
    third.until(lambda said: ' probed on ' in said)
    third.signal(signal.SIGKILL)
    assert third.process.wait() == -signal.SIGKILL and 'resuming at step 20' in third.said.read_text()
    assert not (killed / OUT / 'eval.json').exists() and 'results' not in {path.name for path in killed.iterdir()}

    said = Benchmark(killed, 'fourth').ends()
    assert ' scoring (trained)' in said and '0 of 1 cells are there' in said
    undisturbed.ends()
    one, other = (json.loads((folder / f'results/{ROW}-seed0.json').read_text()) for folder in (killed, peace))
    assert len(one['rows']['JEPA']) == 3 and all(one[k] == other[k] for k in ('rows', 'by_run', 'seeds', 'cost'))
    assert len(losses(killed / OUT)) == 20 and losses(killed / OUT) == losses(peace / OUT)


def test_a_benchmark_waits_for_what_another_left_behind(tmp_path, monkeypatch):
    """Who dies leaves its lock to the script that it had started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, 'HERE', tmp_path)
    (tmp_path / 'train.py').write_text('import time; open("begun", "w"); time.sleep(1); open("done", "w")')
    (tmp_path / 'lock').touch()
    lock = os.open('lock', os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    cell = benchmark.Cell(f'{ROW}-seed0', benchmark.Settings())
    job = threading.Thread(target=cell.execute, args=(['train.py'], [], None, lock, 1))
    job.start()
    while job.is_alive() and not Path('begun').exists():
        time.sleep(0.01)
    os.close(lock)                                                       # as when it dies
    assert not Path('done').exists()
    with alone_in('lock'):
        assert Path('done').exists()
    job.join()
