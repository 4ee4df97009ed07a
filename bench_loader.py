"""
Windows per second of 224 x 224: our loader against The Well's own.

    python bench.py --only loader       # needs pip install the_well, and 2 GB of disk in the temporary folder

Theirs: the_well's WellDataset (16 frames in, 16 out, without normalisation) under PyTorch's DataLoader, each window
resized by F.interpolate in the worker. Ours: data.Split.load behind common.prefetch, from the cache, which holds the
resized windows and was built once before. Both read the same windows one by one, in the same order, with as many
workers as train.py has threads: 1 on CPU, 4 on CUDA. The data are noise, 256 x 256 in The Well's format. The share of
a step is of the default model, nano's on CPU and the paper's on CUDA, on whole windows of 224 x 224.

`warm`: the files are in the page cache. `cold`: they were dropped from it by posix_fadvise(DONTNEED) just before, and
each window is read once; what a disk or a host keeps in memory of its own is still there, and in a temporary folder
that is in memory nothing is ever cold. Workers are started before the clock is.
"""
import functools
import os
import tempfile
import time
from pathlib import Path

from common import FRAMES, Timed, on_gpu, prefetch

import numpy as np
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset

import simulate
from bench_steps import seconds, settings, trainer
from data import WINDOW, Split
from model import DEFAULT
from systems import find_system
from train import LOADERS

SYSTEM = 'active_matter'


def write_noise(root, grid, files=3, runs=2, frames=2 * WINDOW):
    """Files in <root>/data/train as The Well has them, 11 channels, 0.37 GB each at 256 x 256 -> their paths."""
    rng = np.random.default_rng(0)
    shapes = {'concentration': (), 'velocity': (2,), 'D': (2, 2), 'E': (2, 2)}
    (root / 'data' / 'train').mkdir(parents=True)
    paths = [root / 'data' / 'train' / f'{i}.hdf5' for i in range(files)]
    for i, path in enumerate(paths):
        fields = {name: rng.random((runs, frames, grid, grid, *s), np.float32) for name, s in shapes.items()}
        simulate.write_well_file(path, SYSTEM, (-1.0 - i, 1.0), fields)
    return paths


class Resized(Dataset):
    """Windows (n, 2) of (run, first frame) of a WellDataset, (C, 32, side, side) each."""

    def __init__(self, source, windows, side):
        self.source, self.side = source, side
        self.places = windows @ [source.n_windows_per_trajectory[0], 1]  # all runs are as long

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        sample = self.source[self.places[i]]
        x = torch.cat([sample['input_fields'], sample['output_fields']]).permute(0, 3, 1, 2)         # (32, C, H, W)
        return F.interpolate(x, size=(self.side, self.side), mode='bilinear').transpose(0, 1)


def load(split, windows, pinned=False):
    """A batch, as train.load_batch reads it."""
    x = split.load(windows, out=split.room(len(windows), WINDOW, pin_memory=pinned))
    split.release()
    return x


def drop(folder):
    """Take the files of a folder out of the page cache."""
    for path in folder.rglob('*.*'):
        with open(path, 'rb') as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def waiting(step, batches, steps, device):
    """Share of the time of training steps that they wait for their batches, without the first, as train.py has it."""
    loaded, done = Timed((x, torch.zeros(1)) for x in batches), lambda: device == 'cuda' and torch.cuda.synchronize()
    feed = on_gpu(loaded) if device == 'cuda' else loaded
    step(feed)
    done()
    started, waited = time.perf_counter(), loaded.seconds
    for _ in range(1, steps):
        step(feed)
    done()
    return (loaded.seconds - waited) / (time.perf_counter() - started)


def compare(device, grid=256, side=224):
    """(what, theirs, ours, unit, is less better) of each row; none, but a word how to get it, without the_well."""
    try:
        from the_well.data import WellDataset
    except ImportError as e:
        print(f"loader: left out ({e}); pip install the_well brings The Well's own")
        return
    workers = LOADERS[device]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_noise(root, grid)
        split = Split(root, find_system(SYSTEM), 'train', side, stride=WINDOW, progress=False)
        source = WellDataset(path=str(root), well_split_name='train', n_steps_input=FRAMES, n_steps_output=FRAMES,
                             use_normalization=False)
        windows = np.random.default_rng(0).permutation(split.windows)
        resized = Resized(source, windows, side)
        for i in 0, len(windows) - 1:
            assert_close(split.load(windows[i:i + 1])[0], resized[i], rtol=1e-4, atol=1e-5)
        pinned = device == 'cuda'
        theirs = DataLoader(resized, num_workers=workers, persistent_workers=True, pin_memory=pinned)      # in order
        ours = lambda: prefetch(functools.partial(load, split, pinned=pinned), windows[:, None], workers)
        yield from rates(root, lambda: theirs, ours, len(windows), f'{side} x {side}, {workers} worker(s)')
        c, options = settings(DEFAULT, device, '--data', SYSTEM, '--crop', 0, '--resolution', side, '--views', 'paired',
                              '--batch', 1, '--micro-batch', 1)
        _, step = trainer(c, options)
        shares = [100 * waiting(step, batches, len(windows), device) for batches in (theirs, ours())]
        yield f'  of a training step, waiting for data ({c.preset})', *shares, '%', True


def rates(root, theirs, ours, n, what):
    """Rows of windows/s, cold and warm. theirs, ours: functions that give the batches of n windows in all."""
    read = lambda batches: [None for _ in batches]
    passes = [lambda: read(theirs()), lambda: read(ours())]
    passes[0]()                                                          # starts the workers, which are kept
    if hasattr(os, 'posix_fadvise'):
        times = [[], []]
        for _ in range(2):
            for f, t in zip(passes, times):
                drop(root)
                t += seconds([f], 'cpu', repeats=1, warmup=0)
        yield f'loading {what}, cold', *(n / np.mean(t) for t in times), 'windows/s', False
    yield f'loading {what}, warm', *(n / t for t in seconds(passes, 'cpu', repeats=3)), 'windows/s', False
