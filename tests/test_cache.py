"""cache.py: reused, rebuilt, gone on with, in half the size, and done without."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import cache as caching
import data
from helpers import HERE, files_of
from test_data import from_file, open_split


def test_cache_is_reused_and_rebuilt(published):
    """Reused as it is, one per resolution, rebuilt when a file changes, the stale one removed."""
    cache = published / 'cache'
    stamps = lambda: {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    open_split(published, resolution=8)
    first = stamps()
    assert sorted(Path(n).suffix for n in first) == ['.bin', '.json']
    open_split(published, resolution=8, stride=2)
    assert stamps() == first
    open_split(published, resolution=16)
    both = stamps()
    assert len(both) == 4 and first.items() <= both.items()
    with h5py.File(files_of(published)[0], 'r+') as f:
        f['t1_fields/velocity'][0, 0] = 5.0
    assert (open_split(published, resolution=8).fields[0, 1:3, 0] == 5).all()
    now = stamps()
    assert len(now) == 4 and not first.keys() & now.keys()
    elsewhere = published.parent / 'elsewhere'
    open_split(published, cache_dir=elsewhere)
    assert stamps() == now and len(list(elsewhere.iterdir())) == 2


def test_each_split_keeps_its_cache(published):
    """Building one does not remove another's: each is as large as its fields, and opened again as it is."""
    for split in 'train', 'valid', 'test':
        if split != 'train':
            shutil.copytree(published / 'data' / 'train', published / 'data' / split, dirs_exist_ok=True)
        open_split(published, split)
    kept = sorted(p.name for p in (published / 'cache').iterdir())
    assert [name.partition('-')[0] for name in kept] == ['test'] * 2 + ['train'] * 2 + ['valid'] * 2


def test_two_runs_may_start_at_once(published, monkeypatch):
    """Another process that wants the same cache waits for the one that builds it, and takes that."""
    replace, others, other = os.replace, [], f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import data
from systems import find_system
data.Split({str(published)!r}, find_system('active_matter'), 'train', 0, progress=False)
"""

    def late(*paths):                                                    # the cache is written, and not yet named
        monkeypatch.undo()
        others.append(subprocess.Popen([sys.executable, '-c', other]))
        with pytest.raises(subprocess.TimeoutExpired):
            others[0].wait(10)
        replace(*paths)
    monkeypatch.setattr(caching.os, 'replace', late)
    split = open_split(published)
    cache = published / 'cache'
    stamps = lambda: {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    first = stamps()
    assert others[0].wait(60) == 0 and stamps() == first
    assert sorted(p.suffix for p in cache.iterdir()) == ['.bin', '.json']
    assert np.array_equal(split.fields[0], from_file(files_of(published)[0], 0, slice(None)))


def several(published, n):
    """n files in place of one; their paths."""
    first = files_of(published)[0]
    for i in range(1, n):
        shutil.copy(first, first.with_name(f'z{i}.hdf5'))
        with h5py.File(first.with_name(f'z{i}.hdf5'), 'r+') as f:
            f['t1_fields/velocity'][:] += i
    return files_of(published)


def test_a_killed_build_goes_on_with_the_files_that_are_missing(published):
    """After kill -9 while the third is stored, two are not read again, and nothing differs."""
    files = several(published, 4)
    child = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import cache, data
from systems import find_system
store = cache.store
cache.store = lambda of, i, *more: os.kill(os.getpid(), signal.SIGKILL) if i == 2 else store(of, i, *more)
data.Split({str(published)!r}, find_system('active_matter'), 'train', 0, progress=False)
"""
    assert subprocess.run([sys.executable, '-c', child], timeout=60).returncode == -signal.SIGKILL
    left = {p.name.rpartition('.')[2] for p in (published / 'cache').iterdir()}
    assert left == {'part', 'done'}
    read, store = [], caching.store
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, 'store', lambda of, i, *more: read.append(i) or store(of, i, *more))
        split = open_split(published)
    assert read == list(range(2, len(files)))
    assert {p.suffix for p in (published / 'cache').iterdir()} == {'.bin', '.json'}
    expected = open_split(published, cache_dir=published.parent / 'elsewhere')
    assert np.array_equal(split.fields, expected.fields) and np.array_equal(split.std, expected.std)
    n = len(split.runs) // len(files)
    for i, file in enumerate(files):
        assert np.array_equal(split.fields[i * n], from_file(file, 0, slice(None)))
    assert [run['file'] for run in split.runs[::n]] == [file.name for file in files]


def test_several_processes_store_what_one_does(published, monkeypatch):
    several(published, 3)
    one = open_split(published)
    monkeypatch.setattr(caching, 'LARGE', 1)
    many = open_split(published, cache_dir=published.parent / 'elsewhere')
    assert np.array_equal(one.fields, many.fields) and one.runs == many.runs and np.array_equal(one.mean, many.mean)


def test_a_killed_process_is_told_in_one_line(published, monkeypatch):
    """And what the others stored is kept."""
    def killed(of, missing, part, kind, size):
        yield 0, store(of, 0, part, kind)
        raise caching.BrokenProcessPool
    store, before = caching.store, caching.stored
    monkeypatch.setattr(caching, 'stored', killed)
    with pytest.raises(OSError, match='was killed, perhaps for its memory'):
        open_split(published)
    read = []
    monkeypatch.setattr(caching, 'stored', before)
    monkeypatch.setattr(caching, 'store', lambda of, i, *more: read.append(i) or store(of, i, *more))
    open_split(published)
    assert read == list(range(1, len(files_of(published))))


def test_what_the_disk_cannot_hold_is_not_begun(published, monkeypatch):
    monkeypatch.setattr(caching.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**6))
    with pytest.raises(ValueError, match=r'needs 0.0 GB and .*cache has 0.0 GB free: --cache int16 halves it'):
        open_split(published)
    assert not any((published / 'cache').iterdir())


def test_int16_is_within_half_a_step(published):
    """Of 1/65534 of the range of each channel in each run; two bytes a value; a constant is exact."""
    exact, half = open_split(published), open_split(published, cache='int16')
    assert half.fields.dtype == np.int16 and np.array_equal(half.mean, exact.mean)
    a, b = (split.load(split.windows[:1], 32).numpy() for split in (exact, half))
    run = exact.windows[0, 0]
    size = np.ptp(exact.fields[run].reshape(len(exact.channels), -1), 1)[:, None, None, None]
    assert (np.abs(a - b) <= size / 65534 / 2 * 1.01 + 1e-6 * np.abs(a)).all() and not np.array_equal(a, b)
    assert np.array_equal(caching.quantise(np.full((2, 2, 2), 3.5, np.float32))[1], [0.0, 3.5])
    turned = [split.load(split.windows[:2], 32, 16, True, [1, 2]).numpy() for split in (exact, half)]
    assert np.abs(turned[0] - turned[1]).max() < 1e-3


def test_a_range_that_does_not_fit_into_int16_is_refused():
    """Half a step is at most 0.005 of a channel's std, in all runs; a constant has no step."""
    meta = {'channels': ['a', 'b'], 'std': [1.0, 0.0], 'scale': [[[0.0099, 5.0], [0.0, 1.0]]] * 2}
    caching.check_steps(meta)
    meta['scale'] = [meta['scale'][0], [[0.0101, 5.0], [0.0, 1.0]]]
    with pytest.raises(ValueError, match='a does not fit into int16: .* 662 times .*: use --cache float32'):
        caching.check_steps(meta)


def test_without_a_cache_windows_are_the_same(published):
    """Also cut and resized; no file is written. Mean and std are estimates, here of all frames."""
    for settings in dict(), dict(resolution=8), dict(whole=True, stride=3):
        kept, direct = open_split(published, **settings), open_split(published, cache='none', **settings)
        assert direct.fields.shape == kept.fields.shape and direct.grid == tuple(kept.grid)
        assert np.array_equal(direct.windows, kept.windows) and direct.scalars.keys() == kept.scalars.keys()
        assert all(np.array_equal(direct.scalars[k], kept.scalars[k]) for k in kept.scalars)
        for w in (kept.windows[:3], kept.windows[-2:]):
            assert torch.equal(direct.load(w), kept.load(w))
        assert np.allclose(direct.mean, kept.mean, atol=0.1) and np.allclose(direct.std, kept.std, rtol=0.1)
        shutil.rmtree(published / 'cache')
    open_split(published, cache='none')
    assert not (published / 'cache').exists()


def test_a_cache_is_mapped_for_reading_only(published):
    """Copy on write would be charged against memory: 31 GB could not be opened with 24."""
    fields = open_split(published).fields
    assert fields.mode == 'r' and not fields.flags.writeable
