"""data.py's cache: reused, rebuilt, gone on with."""
import os
import shutil
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest

import data
from helpers import HERE, files_of
from test_data import every_field, from_file, open_split


def stamps(cache):
    return {str(p.relative_to(cache)): p.stat().st_mtime_ns for p in cache.glob('*/*')}


def test_cache_is_reused_and_rebuilt(published):
    """Reused as it is, one per resolution; a file that changes is cached anew, and the stale one removed."""
    cache = published / 'cache'
    open_split(published, resolution=8)
    first = stamps(cache)
    assert sorted(name.rpartition('.')[2] for name in first) == ['json'] * 2 + ['npy'] * 2
    open_split(published, resolution=8, stride=2)
    assert stamps(cache) == first
    open_split(published, resolution=16)
    both = stamps(cache)
    assert len(both) == 8 and first.items() <= both.items()
    with h5py.File(files_of(published)[0], 'r+') as f:
        f['t1_fields/velocity'][0, 0] = 5.0
    assert (open_split(published, resolution=8).fields[0, 1:3, 0] == 5).all()
    now = stamps(cache)
    assert len(now) == 8 and len(first.items() & now.items()) == 2       # the other file was not read again
    elsewhere = published.parent / 'elsewhere'
    open_split(published, cache_dir=elsewhere)
    assert stamps(cache) == now and len(stamps(elsewhere)) == 4


def test_each_split_keeps_its_cache(published):
    """Building one does not remove another's: each is as large as its fields, and opened again as it is."""
    for split in 'train', 'valid', 'test':
        if split != 'train':
            shutil.copytree(published / 'data' / 'train', published / 'data' / split, dirs_exist_ok=True)
        open_split(published, split)
    kept = sorted(stamps(published / 'cache'))
    assert [name.partition('-')[0] for name in kept] == ['test'] * 4 + ['train'] * 4 + ['valid'] * 4


def test_two_runs_may_start_at_once(published, monkeypatch):
    """Each writes its own part, and renames it: both see the whole, whoever is first."""
    replace, other = os.replace, []

    def late(part, target):                                              # the cache is written, and not yet named
        if str(target).endswith('.npy') and not other:
            other.append(None)
            monkeypatch.setattr(data.os, 'getpid', lambda: 0)
            other[0] = open_split(published)
        replace(part, target)
    monkeypatch.setattr(data.os, 'replace', late)
    split = open_split(published)
    assert sorted(name.rpartition('.')[2] for name in stamps(published / 'cache')) == ['json'] * 2 + ['npy'] * 2
    for one in split, other[0]:
        assert np.array_equal(one.fields[0], from_file(files_of(published)[0], 0, slice(None)))


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
import data
from systems import find_system
read, seen = data.read_run, set()
def run_and_die(path, *more):
    seen.add(path)
    for fields in read(path, *more):
        yield fields
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
data.read_run = run_and_die
data.Split({str(published)!r}, find_system('active_matter'), 'train', 0, progress=False)
"""
    assert subprocess.run([sys.executable, '-c', child], timeout=60).returncode == -signal.SIGKILL
    assert len([name for name in stamps(published / 'cache') if name.endswith('.npy')]) == 2
    read, cache_file = [], data.cache_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, 'cache_file', lambda path, *more: read.append(path) or cache_file(path, *more))
        split = open_split(published)
    assert read == files[2:]
    assert {name.rpartition('.')[2] for name in stamps(published / 'cache')} == {'npy', 'json'}         # no part is left
    expected = open_split(published, cache_dir=published.parent / 'elsewhere')
    assert np.array_equal(every_field(split), every_field(expected)) and np.array_equal(split.std, expected.std)
    n = len(split.runs) // len(files)
    for i, file in enumerate(files):
        assert np.array_equal(split.fields[i * n], from_file(file, 0, slice(None)))
    assert [run['file'] for run in split.runs[::n]] == [file.name for file in files]


def test_several_processes_store_what_one_does(published, monkeypatch):
    several(published, 3)
    one = open_split(published)
    monkeypatch.setattr(data, 'LARGE', 1)
    many = open_split(published, cache_dir=published.parent / 'elsewhere', processes=2)
    assert np.array_equal(every_field(one), every_field(many)) and one.runs == many.runs and np.array_equal(one.mean, many.mean)


def test_a_library_call_starts_no_process(published, monkeypatch):
    """A script without a main guard would start itself again and again."""
    monkeypatch.setattr(data, 'LARGE', 1)
    script = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import data
from systems import find_system
data.LARGE = 1
data.Split({str(published)!r}, find_system('active_matter'), 'train')
"""
    (published.parent / 'snippet.py').write_text(script)
    done = subprocess.run([sys.executable, published.parent / 'snippet.py'], timeout=60, capture_output=True)
    assert done.returncode == 0 and len(stamps(published / 'cache')) == 4


def test_a_killed_process_is_told_in_one_line(published, monkeypatch):
    """And what the others stored is kept."""
    class Pool:
        def __init__(self, *args): pass
        def __enter__(self): return self
        def __exit__(self, *args): pass
        def shutdown(self, cancel_futures): pass

        def submit(self, function, *job):
            future = data.concurrent.futures.Future()
            if job[0] == files[0]:
                future.set_result(function(*job))
            else:
                future.set_exception(data.BrokenProcessPool())
            return future
    files = files_of(published)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, 'LARGE', 1)
        patch.setattr(data.concurrent.futures, 'ProcessPoolExecutor', Pool)
        with pytest.raises(OSError, match='was killed, perhaps for its memory'):
            open_split(published, processes=2)
    read, cache_file = [], data.cache_file
    monkeypatch.setattr(data, 'cache_file', lambda path, *more: read.append(path) or cache_file(path, *more))
    open_split(published)
    assert read == files[1:]


def test_what_the_disk_cannot_hold_is_not_begun(published, monkeypatch):
    monkeypatch.setattr(data.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**6))
    with pytest.raises(ValueError, match=r'the cache of .*data/train needs 0.0 GB and .*cache/train-full has 0.0 GB free: --cache-dir'):
        open_split(published)
    assert not stamps(published / 'cache')


def test_a_cache_is_mapped_for_reading_only(published):
    """Copy on write would be charged against memory: 31 GB could not be opened with 24. Nothing stays open."""
    split = open_split(published)
    fields = split.fields[0, :, 2:5]
    assert isinstance(fields, np.memmap) and fields.mode == 'r' and not fields.flags.writeable
    files = len(os.listdir('/proc/self/fd')) if os.path.exists('/proc/self/fd') else 0
    split.load(split.windows)
    assert not files or len(os.listdir('/proc/self/fd')) <= files
