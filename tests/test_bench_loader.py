"""bench_loader.py: what The Well's own loader reads is what ours reads, and waiting is timed."""
import sys
import time

import pytest
from torch.testing import assert_close

import bench_loader


def test_share_of_waiting(monkeypatch):
    """Batches that take three times as long as a step: three quarters, of all steps but the first."""
    now = [0.0]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    def step(batches):
        next(batches)
        pass_by(1)

    assert bench_loader.waiting(step, (pass_by(100 if i == 0 else 3) for i in range(6)), 6, 'cpu') == 0.75


def test_loader_without_the_well(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'the_well.data', None)
    assert list(bench_loader.compare('cpu')) == [] and 'pip install the_well' in capsys.readouterr().out


def test_both_loaders(tmp_path):
    """The Well's own reads the same windows; what is dropped from the page cache is read again all the same."""
    the_well = pytest.importorskip('the_well.data')
    bench_loader.write_noise(tmp_path, grid=24, files=2, runs=2)
    split = bench_loader.Split(tmp_path, bench_loader.find_system('active_matter'), 'train', 16, stride=8,
                               progress=False)
    source = the_well.WellDataset(path=str(tmp_path), well_split_name='train', n_steps_input=16, n_steps_output=16)
    theirs = bench_loader.Resized(source, split.windows, 16)
    assert len(theirs) == 20
    for i in 0, 7, 19:
        bench_loader.drop(tmp_path)
        assert_close(bench_loader.load(split, split.windows[i:i + 1])[0], theirs[i], rtol=1e-4, atol=1e-5)
    assert theirs[0].std() > 0.1
