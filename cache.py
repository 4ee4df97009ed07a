"""
A split's trajectories in one flat file that is memory-mapped afterwards: nanoGPT's .bin, for fields.

    files --plan--> how large, what is kept, where each file's part goes
          --store, a process for each of several files--> <settings>-<hash>.bin, and .json that describes it

Every trajectory is cropped and, if that makes it smaller, resized as the paper does, channels first; a window is then
a slice. The name ends in a hash of the files' contents, so changing one makes a new cache. What is interrupted goes on
file by file. Three ways: float32, the values; int16, half of that, in steps of 1/65534 of the range of a channel in a
run; none: no cache, windows are read from the HDF5 files. Of remote files, the cache's folder keeps what was read
(remote.py): for good if it is none, else until the file is stored.
"""
import bisect
import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import threading
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from common import FRAMES, Progress, alone_in, say, write_text

import h5py
import numpy as np
import torch
import torch.nn.functional as F

from remote import Remote, forget, kept_in, opened
from systems import spatial_axes
from well import read_file

WINDOW = 2 * FRAMES
KINDS = {'float32': np.float32, 'int16': np.int16, 'none': None}
LARGE = 2**30               # bytes of a cache that is worth several processes, and a word before it is built


@dataclass
class Plan:
    """What is kept of a split's files.

    runs: file, trajectory and scalars of each; first: the run that each file begins with; cut: of x and y; shape: runs,
    channels, frames, H, W; size: H and W of windows, which may be larger; grid: their points.
    """
    files: list
    channels: list
    runs: list
    shape: tuple
    first: list
    cut: list
    size: tuple
    grid: tuple

    def bytes(self, kind):
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(KINDS[kind]).itemsize


def plan(files, crop, resolution):
    """Look into all files. crop: (from, to) of x and y as fractions of the grid; then resized, unless resolution is 0.

    Fields that would grow are kept as they are: data.py resizes their windows. Raises ValueError for files that
    disagree or are too short.
    """
    first, runs, alike = [], [], None
    for file in files:
        f, channels, scalars, (n, *rest) = read_file(file)
        f.close()
        alike = alike or (list(channels), rest)
        if (list(channels), rest) != alike:
            raise ValueError(f'{file} has other channels or another shape than {files[0]}')
        first.append(len(runs))
        runs += [{'file': file.name, 'trajectory': i, 'scalars': {name: values[i] for name, values in scalars.items()}}
                 for i in range(n)]
    channels, (T, *size) = alike
    if T < WINDOW:
        raise ValueError(f'{files[0]} has {T} frames, a window needs {WINDOW}')
    cut = [slice(round(a * n), round(b * n)) for n, (a, b) in zip(size, crop)]
    own = tuple(s.stop - s.start for s in cut)
    size = (resolution, resolution) if resolution else own
    shape = len(runs), len(channels), T, *(own if resolution > max(own) else size)
    return Plan(files, channels, runs, shape, first, cut, size, grid_points(files[0], cut, size))


def grid_points(path, cut, shape):
    """(x, y, time step) of what is kept of a file: its own coordinates, cut and resized like the fields."""
    points = []
    with h5py.File(opened(path)) as f:
        time = np.asarray(f['dimensions'].get('time', [0.0, 1.0]), float).ravel()
        for axis, kept, n in zip(spatial_axes(f), cut, shape):
            own = f['dimensions'][axis][kept] if axis in f['dimensions'] else np.arange(kept.start, kept.stop)
            at = (np.arange(n) + 0.5) * len(own) / n - 0.5               # F.interpolate's, no two alike at the ends
            i = np.clip(np.floor(at).astype(int), 0, max(0, len(own) - 2))
            following = np.minimum(i + 1, len(own) - 1)
            points.append((own[i] + (at - i) * (own[following] - own[i])).tolist())
    return *points, float(time[1] - time[0])


def content_key(files):
    """Hash of the files' names, sizes, times and sixteen blocks of each: cheap, and new whenever one is rewritten.

    Of a remote file, of what its store tells.
    """
    h = hashlib.sha256(b'3')                                             # the form of the cache
    for path in files:
        if isinstance(path, Remote):
            h.update(f'{path.name} {path.version}'.encode())
            continue
        s = path.stat()
        h.update(f'{path.name} {s.st_size} {s.st_mtime_ns}'.encode())
        with open(path, 'rb') as f:
            for i in range(16):
                f.seek(i * s.st_size // 16)
                h.update(f.read(4096))
    return h.hexdigest()[:12]


def read_fields(file, channels, trajectory, frames, cut, size):
    """Fields of an open file, one after the other, each with its components: (K, frames, H, W) float32.

    channels: as read_file gives them; frames: a slice. Raises ValueError for what cannot be read.
    """
    for d in dict.fromkeys(d for d, _ in channels.values()):
        first, last, _ = frames.indices(d.shape[1])
        out = np.empty((int(np.prod(d.shape[4:])), last - first, *size), np.float32)
        for t in range(first, last, FRAMES):                             # so many at a time, all their components
            block = slice(t, min(t + FRAMES, last))
            try:
                x = d[(trajectory, block, *cut)]                         # (frames, h, w, ...components)
            except OSError as e:
                raise ValueError(f'{file}: {d.name[1:]} cannot be read ({e})') from None
            x = np.moveaxis(x.reshape(*x.shape[:3], -1), -1, 0)          # (K, frames, h, w)
            if x.shape[2:] != size:
                x = torch.from_numpy(np.ascontiguousarray(x, np.float32))
                x = F.interpolate(x, size=size, mode='bilinear', align_corners=False).numpy()
            out[:, t - first:block.stop - first] = x
        yield out


def store(of, number, part, kind):
    """Write one file's trajectories to their place in `part` -> {'moments', 'scale'} of them.

    moments: sums of the values and squares of each channel; scale: of int16, [step, middle] of each channel of each
    trajectory. Raises ValueError for NaN or infinity.
    """
    file, size = of.files[number], of.shape[3:]
    f, channels, _, (runs, *_) = read_file(file)
    moments, scales = np.zeros((of.shape[1], 2)), []
    with f, open(part, 'r+b') as out:
        out.seek(of.first[number] * (of.bytes(kind) // of.shape[0]))
        for trajectory in range(runs):
            fields, scale = read_fields(file, channels, trajectory, slice(None), of.cut, size), []
            for c, (name, x) in enumerate(zip(channels, itertools.chain.from_iterable(fields))):       # (T, H, W)
                if not all(np.isfinite(frame).all() for frame in x):
                    raise ValueError(f'{file}: {name} of trajectory {trajectory} has NaN or infinite values')
                moments[c] += x.sum(dtype=np.float64), sum(np.square(frame, dtype=np.float64).sum() for frame in x)
                if kind == 'int16':
                    x, step_and_middle = quantise(x)
                    scale.append(step_and_middle)
                out.write(x.tobytes())
            scales += [scale] if scale else []
        out.flush()
        os.fsync(out.fileno())
    return {'moments': moments.tolist(), 'scale': scales}


def quantise(x):
    """A channel (T, H, W) float32 -> (int16, [step, middle]): x is int16 * step + middle, within half a step."""
    low, high = float(x.min()), float(x.max())
    step, middle = (high - low) / 65534, (high + low) / 2
    return np.rint((x - middle) / (step or 1)).astype(np.int16), [step, middle]


def build(of, kind, path, progress=True):
    """Write <path>.bin and <path>.json. Killed, and called again, it goes on with the files that are missing.

    Of remote files, what was read of those in progress is on disk, too. Raises ValueError if the disk cannot hold it,
    before anything is written, and for files that will not do; StoreError, which leaves what is stored.
    """
    own = f'{path.name}.{platform.node()}'                               # of this node
    part, done = path.with_name(own + '.part'), path.with_name(own + '.done')
    lines = [json.loads(line) for line in done.read_text().splitlines() if line.endswith('}')] if done.exists() else []
    found = {line['number']: line for line in lines} if part.exists() else {}
    missing, size = [i for i in range(len(of.files)) if i not in found], of.bytes(kind)
    passing = sorted(of.files[i].size for i in missing if isinstance(of.files[i], Remote))[-workers(missing, size):]
    needed, free = size * len(missing) / len(of.files) + sum(passing), shutil.disk_usage(path.parent).free
    if needed > free:
        raise ValueError(f'the cache of {of.files[0].parent} needs {needed / 1e9:.1f} GB and {path.parent} has '
                         f'{free / 1e9:.1f} GB free: --cache int16 halves it, '
                         + '--cache none needs none, ' * (not passing) + '--cache-dir puts it elsewhere')
    if progress and size > LARGE:
        say(f'{path.name}: a cache of {size / 1e9:.1f} GB from {len(of.files)} files'
            + f', {len(found)} of them stored before' * bool(found))
    try:
        with open(part, 'ab') as f:
            f.truncate(size)
        with open(done, 'a') as log, Progress(len(of.files), f'caching {path.name}', 'file', initial=len(found),
                                              disable=not progress) as bar:
            for i, result in stored(of, missing, part, kind, size):
                found[i] = result
                log.write(json.dumps({'number': i, **result}) + '\n')
                log.flush()
                forget(of.files[i])
                bar.update()
        describe(of, [found[i] for i in range(len(of.files))], part, path)
        for file in of.files:
            forget(file)                                                 # also of one that was looked into again
    except BrokenProcessPool:
        raise ChildProcessError(f'a process that cached {of.files[0].parent} was killed, perhaps for its memory; what '
                                f'is stored is kept: run this again') from None
    except (ValueError, OSError):                                        # what cannot be mended by going on
        for leftover in part, done:
            leftover.unlink(missing_ok=True)
        raise
    done.unlink()


def workers(missing, size):
    """How many processes store the missing files of a cache of `size` bytes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, min(cores, len(missing), 8)) if size >= LARGE else 1


def stored(of, missing, part, kind, size):
    """(number, what `store` gives) of each missing file as it is done, by several processes if it is worth it."""
    jobs = workers(missing, size)
    if jobs < 2:
        yield from ((i, store(of, i, part, kind)) for i in missing)
        return
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn')) as pool:
        futures = {pool.submit(store, of, i, part, kind): i for i in missing}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def describe(of, found, part, path):
    """Name the finished file, and write what it holds beside it. found: what `store` gave, file by file."""
    mean, squares = sum(np.array(file['moments']) for file in found).T / (np.prod(of.shape) / of.shape[1])
    meta = {'channels': of.channels, 'shape': of.shape, 'size': of.size, 'grid': of.grid, 'mean': mean.tolist(),
            'std': np.sqrt(np.maximum(squares - mean**2, 0)).tolist(), 'runs': of.runs,
            'scale': sum((file['scale'] for file in found), [])}
    check_steps(meta)
    os.replace(part, path.with_suffix('.bin'))
    write_text(path.with_suffix('.json'), json.dumps(meta))


def check_steps(meta):
    """Raise ValueError if a step of int16 is more than a hundredth of a channel's std anywhere."""
    steps = np.reshape(meta['scale'], (-1, len(meta['channels']), 2))[..., 0].max(0, initial=0)         # (C,)
    for name, step, std in zip(meta['channels'], steps, meta['std']):
        if step > 0.01 * std:
            raise ValueError(f'{name} does not fit into int16: its range in a run is {65534 * step / std:.0f} times '
                             f'its standard deviation: use --cache float32')


class Files:
    """The same, without a cache: fields[run, :, from:to] is read from the files, (C, frames, H, W) float32.

    shape: (runs, C, frames, H, W). Each thread opens its own files. `moments`: mean and std of the channels, estimated
    from 256 frames all over the runs.
    """

    def __init__(self, of):
        self.of, self.shape, self.kept = of, of.shape, threading.local()

    def __getitem__(self, where):
        run, _, frames = where
        number = bisect.bisect_right(self.of.first, run) - 1
        kept = self.kept.__dict__
        if number not in kept:
            kept[number] = read_file(self.of.files[number])[:2]          # the open file, and its channels
        return np.concatenate([*read_fields(self.of.files[number], kept[number][1], run - self.of.first[number], frames,
                                            self.of.cut, self.shape[3:])])

    def moments(self):
        n = min(256, self.shape[0] * self.shape[2])
        places = (divmod(i * self.shape[0] * self.shape[2] // n, self.shape[2]) for i in range(n))     # (run, frame)
        x = np.stack([self[run, :, t:t + 1] for run, t in places], 1, dtype=np.float64)
        return x.mean((1, 2, 3, 4)), x.std((1, 2, 3, 4))


def find_cache(files, crop, resolution, cache_dir, settings, kind='float32', progress=True):
    """(meta, fields) of a split; the cache is built if it is missing, and those of older contents are removed.

    meta: what the .json says. fields: memory map (runs, C, frames, H, W), or Files if kind is 'none'. Processes of one
    computer wait for the one that builds; another computer, which may have another disk, builds its own.
    """
    key, files = content_key(files), [kept_in(cache_dir, file) for file in files]
    if kind == 'none':
        fields = Files(of := plan(files, crop, resolution))
        mean, std = fields.moments()
        return dict(channels=of.channels, size=of.size, grid=of.grid, mean=mean, std=std, runs=of.runs, scale=[],
                    key=key), fields
    path = cache_dir / f'{settings}-{key}'
    if not path.with_suffix('.json').exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        place = hashlib.sha256(str(cache_dir.resolve()).encode()).hexdigest()[:16]
        lock = Path(tempfile.gettempdir()) / f'cache-{place}'            # on this computer alone
        if not lock.exists():
            lock.touch()
        with alone_in(lock):                                             # two runs may start at once
            if not path.with_suffix('.json').exists():                   # nor was it built while this one waited
                build(plan(files, crop, resolution), kind, path, progress)
                for old in cache_dir.glob(f'{settings}-{"?" * 12}.*'):   # same settings
                    if not old.name.startswith(path.name):
                        old.unlink(missing_ok=True)
    meta = json.loads(path.with_suffix('.json').read_text())
    return meta | {'key': key}, np.memmap(path.with_suffix('.bin'), KINDS[kind], 'r', shape=tuple(meta['shape']))
