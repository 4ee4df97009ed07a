"""
Speed and memory of each part against its plain version, measured side by side in one run.

    python bench.py                              # CUDA if there is one, else CPU: under two minutes on 2 cores
    python bench.py --device cpu --json bench.json

Prints one table: what, plain, ours, ratio (above 1: ours is better). Where both compute the same thing, that
is checked first. Times are medians; the two sides take turns, so that a busy machine slows both alike.
"""
import os
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')                       # huge pages for CPU tensors, as in train.py

import argparse
import copy
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import simulate
from data import FRAMES, SYSTEMS, WINDOW, Split
from jepa import JEPA, ChannelNorm, DepthwiseConv3d
from train import keep_freed_memory, peak_memory

ROWS = []


def row(what, plain, ours, unit, less_is_better=True):
    ratio = plain / ours if less_is_better else ours / plain
    ROWS.append({'what': what, 'plain': plain, 'ours': ours, 'unit': unit, 'ratio': ratio})
    print(f'{what:58} {plain:9.4g} {ours:9.4g} {unit:12} {ratio:6.1f}x', flush=True)


def seconds(functions, device, repeats=5, warmup=1):
    """Median seconds of each function, called in turns."""
    times = [[] for _ in functions]
    for i in range(warmup + repeats):
        for f, t in zip(functions, times):
            if device == 'cuda':
                torch.cuda.synchronize()
            start = time.perf_counter()
            f()
            if device == 'cuda':
                torch.cuda.synchronize()
            t.append(time.perf_counter() - start)
    return [float(np.median(t[warmup:])) for t in times]


def plain_version(model, channels_first=False):
    """A copy of `model` with nn.Conv3d(groups=C) for every DepthwiseConv3d, weights and results the same.

    channels_first: in PyTorch's default memory layout, as anyone would write it first. Otherwise in the
    channels-last layout that our stem and norms produce, where PyTorch's own convolution is faster.
    """
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, DepthwiseConv3d):
            m.__class__ = nn.Conv3d                                      # only `forward` differs
        if isinstance(m, ChannelNorm) and channels_first:
            m.register_forward_hook(lambda module, x, y: y.contiguous())
    return model


def autocast(device):
    """What train.py computes in: bfloat16 on CUDA, float32 on CPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == 'cuda')


# ---------------------------------------------------------------------------------------------
# the parts

def convolution(device):
    """One depthwise convolution, forward and backward, in both memory layouts."""
    ours = DepthwiseConv3d(16).to(device)
    plain = plain_version(ours)
    tolerance = dict(rtol=1e-4, atol=1e-4) if device == 'cpu' else dict(rtol=1e-2, atol=1e-2)       # TF32

    def both_ways(conv, x):
        with autocast(device):
            y = conv(x)
        y.backward(torch.ones_like(y))

    for layout, name in (torch.contiguous_format, ''), (torch.channels_last_3d, ', channels last'):
        x = torch.randn(8, 16, 16, 32, 32, device=device).to(memory_format=layout).requires_grad_()
        assert_close(ours(x), plain(x), **tolerance)
        plain_s, ours_s = seconds([lambda: both_ways(plain, x), lambda: both_ways(ours, x)], device)
        row(f'depthwise 7x7x7, 8 x 16 x 16 x 32 x 32{name}', plain_s * 1e3, ours_s * 1e3, 'ms')


def training_case(device):
    """(JEPA of the paper, context, target): 2 windows at 64 x 64 on CPU, 8 at 224 x 224 on CUDA."""
    torch.manual_seed(0)
    batch, side = (8, 224) if device == 'cuda' else (2, 64)
    model = JEPA(11).to(device)
    return model, *torch.randn(2, batch, 11, FRAMES, side, side, device=device)


def stepper(model, context, target):
    """A function that trains `model` by one step and returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=context.is_cuda)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(context.device.type):
            loss = model(context, target, torch.Generator().manual_seed(0))['loss']
        loss.backward()
        optimizer.step()
        return loss.detach()
    return step


def step_memory(plain, device):
    """GB that a training step takes. For a fresh process: there is no resetting a peak on CPU."""
    before = peak_memory() if device == 'cpu' else 0
    model, context, target = training_case(device)
    stepper(plain_version(model) if plain else model, context, target)()
    return peak_memory() - before


def training_step(device):
    """Forward, VICReg, backward and AdamW of the paper's encoder and predictor.

    The first part to run: memory is measured in fresh processes, which inherit this one's peak.
    """
    with multiprocessing.get_context('spawn').Pool(1, maxtasksperchild=1) as pool:
        memory = [pool.apply(step_memory, (plain, device)) for plain in (True, False)]
    model, context, target = training_case(device)
    batch, side = len(context), context.shape[-1]
    models = plain_version(model), plain_version(model, channels_first=True), model
    steps = [stepper(m, context, target) for m in models]
    what = f'training step, {batch} x 11 x (16 + 16) x {side} x {side}'
    plain, plain_first, ours = [step() for step in steps]                # the warm-up as well
    for loss in plain, plain_first:
        assert_close(loss, ours, rtol=1e-4 if device == 'cpu' else 2e-2, atol=0)
    plain_s, first_s, ours_s = seconds(steps, device, *((3, 0) if device == 'cpu' else (10, 2)))
    row(what, batch / first_s, batch / ours_s, 'windows/s', less_is_better=False)
    row('  the plain one in channels-last memory too', batch / plain_s, batch / ours_s, 'windows/s',
        less_is_better=False)
    row('  peak memory', *memory, 'GB')


def one_batch(device):
    """The encoder on context and target: two calls, or one of twice the batch; forward and backward."""
    model, context, target = training_case(device)

    def encode(*inputs):
        with autocast(device):
            z = torch.cat([model.encoder(x) for x in inputs])
        z.float().square().mean().backward()

    plain_s, ours_s = seconds([lambda: encode(context, target), lambda: encode(torch.cat([context, target]))], device)
    row('encoding context and target: two calls, one batch', plain_s * 1e3, ours_s * 1e3, 'ms')


def read_hdf5(f, trajectory, t, resolution):
    """One window (C, 32, H, W) straight from The Well's file: the preprocessing of data.py, no cache."""
    fields = [f[group][name][trajectory, t:t + WINDOW] for group in ('t0_fields', 't1_fields', 't2_fields')
              for name in sorted(f[group])]                              # (32, nx, ny, ...)
    x = np.concatenate([np.moveaxis(v.reshape(*v.shape[:3], -1), -1, 0) for v in fields])           # (C, 32, nx, ny)
    x = torch.from_numpy(x)
    return F.interpolate(x, size=(resolution, resolution), mode='bilinear') if resolution != x.shape[-1] else x


def reading(grid, resolution, reads=20):
    """One window at a random start: HDF5 left open, against the cache. Both files are warm in the page cache."""
    rng = np.random.default_rng(0)
    shapes = {'concentration': (), 'velocity': (2,), 'D': (2, 2), 'E': (2, 2)}
    fields = {k: rng.random((1, 40, grid, grid, *s), np.float32) for k, s in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'data' / 'train' / 'random.hdf5'
        path.parent.mkdir(parents=True)
        simulate.write_well_file(path, -1.0, 1.0, fields)
        split = Split(folder, SYSTEMS['active_matter'], 'train', resolution, progress=False)
        with h5py.File(path) as f:
            starts = iter(rng.permutation(np.repeat(split.windows, 2 * reads, axis=0)))
            plain = lambda w: read_hdf5(f, *w, resolution)
            ours = lambda w: split.load(w[None])[0]
            for w in split.windows:                                      # equal, and both files read once
                assert_close(ours(w), plain(w), rtol=1e-4, atol=1e-5)
            plain_s, ours_s = seconds([lambda: plain(next(starts)), lambda: ours(next(starts))], 'cpu', reads)
    resized = f', resized to {resolution}' if grid != resolution else ''
    row(f'reading a window of {grid} x {grid}{resized}: HDF5, cache', plain_s * 1e3, ours_s * 1e3, 'ms')


def simulation(device, runs=15, grid=64, steps=10):
    """Active matter one run at a time, or 15 runs in one batch; counted in time units of all runs."""
    def solver(b):
        c, m = map(torch.stack, zip(*[simulate.active_matter_start(grid, seed, device=device) for seed in range(b)]))
        return simulate.ActiveMatter([-3.0] * b, [9.0] * b, c, m, dt=0.02)

    plain, ours = solver(1), solver(runs)
    advance = lambda s: [s.step() for _ in range(steps)]
    plain_s, ours_s = seconds([lambda: advance(plain), lambda: advance(ours)], device)
    row(f'simulating {grid} x {grid}: one run at a time, {runs} at once', steps * 0.02 / plain_s,
        runs * steps * 0.02 / ours_s, 'time units/s', less_is_better=False)


def main():
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--json', type=Path, help='also write the numbers to this file')
    args = parser.parse_args()
    try:
        if args.device == 'cuda' and not torch.cuda.is_available():
            raise ValueError('PyTorch sees no CUDA device: use --device cpu')
        if args.json and not args.json.parent.is_dir():
            raise ValueError(f'{args.json.parent} is no folder to write {args.json.name} to')
        machine = torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'
        machine += f', {torch.get_num_threads()} CPU threads, PyTorch {torch.__version__}'
        print(f'{machine}\n\n{"what":58} {"plain":>9} {"ours":>9} {"":12} {"ratio":>7}')
        for part in training_step, convolution, one_batch, simulation:
            part(args.device)
        reading(256, 224)
        reading(64, 64)
        if args.json:
            args.json.write_text(json.dumps({'machine': machine, 'rows': ROWS}, indent=1))
    except (ValueError, OSError) as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
