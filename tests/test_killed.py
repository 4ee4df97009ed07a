"""cells.py, killed again and again: it goes on, and its numbers are those of one that was left in peace."""
import json
import os
import signal
import subprocess
import time

from helpers import HERE, command, linked, losses

ROW = 'rayleigh_benard-jepa-smoke'
OUT, DATA = f'rows/{ROW}-seed0', 'data/seed0-smoke/rayleigh_benard'


class Benchmark:
    """A process with a group of its own, in which its scripts are, and what they say."""

    def __init__(self, folder, name):
        self.said = folder / f'{name}.txt'
        flags = ['--preset', 'smoke', '--seeds', 1, '--jobs', 1, ROW]
        with open(self.said, 'w') as file:
            self.process = subprocess.Popen(**command(['-m', 'benchmark.cells'], *flags, CUDA_VISIBLE_DEVICES='',
                                                      PYTHONPATH=HERE), cwd=folder,
                                            stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def until(self, condition):
        while not condition(self.said.read_text()):
            assert self.process.poll() is None, self.said.read_text()
            time.sleep(0.01)

    def kill(self):
        """It and its scripts."""
        os.killpg(self.process.pid, signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL

    def ends(self):
        assert self.process.wait(timeout=300) == 0, self.said.read_text()
        return self.said.read_text()


def test_a_benchmark_that_was_killed_gives_the_same_errors(tmp_path):
    """With what it runs: in simulation, in training and in scoring."""
    killed, peace = tmp_path / 'killed', tmp_path / 'peace'
    for folder in killed, peace:
        folder.mkdir()
    first = Benchmark(killed, 'first')
    first.until(lambda said: any((killed / DATA / 'data/train').glob('*.hdf5')))
    first.kill()
    assert not (killed / DATA / 'stats.yaml').exists()

    second = Benchmark(killed, 'second')
    second.until(lambda said: (killed / OUT / 'log.jsonl').exists())
    second.kill()
    linked(killed / DATA, peace / DATA)
    third, undisturbed = Benchmark(killed, 'third'), Benchmark(peace, 'undisturbed')
    third.until(lambda said: ' probed on ' in said)
    third.kill()
    assert not (killed / OUT / 'eval.json').exists() and 'results' not in {path.name for path in killed.iterdir()}

    said = Benchmark(killed, 'fourth').ends()
    assert ': scoring (trained to step 20 of 20)' in said and '0 of 1 cells are there' in said
    undisturbed.ends()
    one, other = (json.loads((folder / f'results/cells/{ROW}-seed0.json').read_text()) for folder in (killed, peace))
    assert len(one['rows']['JEPA']) == 3 and all(one[k] == other[k] for k in ('rows', 'by_run', 'seeds', 'cost'))
    assert len(losses(killed / OUT)) == 20 and losses(killed / OUT) == losses(peace / OUT)
