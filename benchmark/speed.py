"""
Speed and memory of each part against its plain version, measured side by side in one run.

    python bench.py                              # CUDA if there is one, else CPU: five minutes on 2 cores
    python bench.py --device cpu --json bench.json
    python bench.py --only simulation,steps      # some parts; --help lists them

Prints one table: what, plain, ours, ratio (above 1: ours is better). Where both compute the same thing, that
is checked first. Times are medians; the two sides take turns, so that a busy machine slows both alike. `loader` is
bench_loader.py; a second table, `steps`, is bench_steps.py.
"""
import copy
import json
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import FRAMES, option, parse, peak_memory, pick_device, script, write_text

import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import bench_loader
import bench_steps
from baselines.disco import DISCO, WELL
from baselines.mpp import MPP
from bench_steps import seconds
from data import WINDOW, Split
from encoders import ChannelNorm, DepthwiseConv3d
from jepa import JEPA
from probe import AttentiveProbe
from systems import find_system
from systems.active_matter import ActiveMatter, active_matter_start
from systems.rayleigh_benard import RayleighBenard, chebyshev_nodes, rayleigh_benard_start
from systems.shear_flow import ShearFlow, shear_flow_start
from videomae import SIZES, VideoMAE, positions, tube_masks

ROWS = []


def row(what, plain, ours, unit, less_is_better=True):
    ratio = plain / ours if less_is_better else ours / plain
    ROWS.append({'what': what, 'plain': plain, 'ours': ours, 'unit': unit, 'ratio': ratio})
    print(f'{what:58} {plain:9.4g} {ours:9.4g} {unit:12} {ratio:6.1f}x', flush=True)


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

def seven_convolutions(conv, x):
    """A DepthwiseConv3d as seven depthwise 2-D ones, shifted in time and added."""
    B, C, T, H, W = x.shape
    images = x.transpose(1, 2).reshape(B * T, C, H, W).contiguous(memory_format=torch.channels_last)
    y = conv.bias.view(C, 1, 1)
    for offset in range(7):
        part = F.conv2d(images, conv.weight[:, :, offset], padding=3, groups=C).view(B, T, C, H, W)
        y = y + F.pad(part, (0, 0, 0, 0, 0, 0, 3, 3))[:, offset:offset + T]
    return y.transpose(1, 2)


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
        assert_close(seven_convolutions(ours, x), plain(x), **tolerance)
        plain_s, seven_s, ours_s = seconds([lambda: both_ways(plain, x), lambda: both_ways(
            lambda x: seven_convolutions(ours, x), x), lambda: both_ways(ours, x)], device)
        row(f'depthwise 7x7x7, 8 x 16 x 16 x 32 x 32{name}', plain_s * 1e3, ours_s * 1e3, 'ms')
        row('  as seven depthwise 2-D convolutions', seven_s * 1e3, ours_s * 1e3, 'ms')


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
    plain_s, first_s, ours_s = seconds(steps, device, repeats=3, warmup=0 if device == 'cpu' else 1)
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


def plain_attention(attn, x):
    """videomae.Attention with its softmax written out."""
    B, N, D = x.shape
    bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    q, k, v = F.linear(x, attn.qkv.weight, bias).view(B, N, 3, attn.heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * (D // attn.heads)**-0.5).softmax(dim=-1)       # (B, heads, N, N)
    return attn.proj((weights @ v).transpose(1, 2).reshape(B, N, D))


def plain_videomae(model, x, masked):
    """The loss of clips x (B, C, T, H, W), masked (B, h * w), one clip at a time: every patch is embedded, then
    the visible ones are kept; attention is written out; no spectrum of the error."""
    def transform(blocks, z):
        for block in blocks:
            z = z + plain_attention(block.attn, block.norm1(z))
            z = z + block.mlp(block.norm2(z))
        return z

    losses = []
    encoder, decoder, s, P = model.encoder, model.decoder, model.tubelet, model.patch
    for clip, places in zip(x, masked.to(x.device)):
        C, T, H, W = clip.shape
        hidden = places.repeat(T // s)                                   # (N,)
        z = encoder.patch_embed.proj(clip[None]).flatten(2).transpose(1, 2)            # (1, N, D)
        z = z + positions(len(hidden), z.shape[2], device=x.device)
        z = model.encoder_to_decoder(encoder.norm(transform(encoder.blocks, z[:, ~hidden])))
        position = positions(len(hidden), z.shape[2], device=x.device)
        z = torch.cat([z + position[~hidden], model.mask_token + position[hidden]], dim=1)
        z = decoder.head(decoder.norm(transform(decoder.blocks, z)[:, -int(hidden.sum()):]))
        with torch.no_grad():
            pixels = clip.view(C, T // s, s, H // P, P, W // P, P).permute(1, 3, 5, 2, 4, 6, 0)
            pixels = pixels.reshape(len(hidden), -1, C)                  # (N, pixels, C)
            pixels = (pixels - pixels.mean(1, keepdim=True)) / (pixels.std(1, keepdim=True) + 1e-6)
        losses.append(F.mse_loss(z[0].float(), pixels[hidden].flatten(1)))
    return torch.stack(losses).mean()


def masked_autoencoder(device):
    """Forward, backward and AdamW of VideoMAE, ours with the spectrum of its error.

    On CPU the tiny model, on many small clips, as nano trains it, and on few large ones, where nearly all the
    time goes into the same matrix products on both sides; on CUDA the small one at the paper's size.
    """
    cases = [('small', 8, 224, 16)] if device == 'cuda' else [('tiny', 8, 32, 8), ('tiny', 2, 64, 8)]
    for size, batch, side, patch in cases:
        torch.manual_seed(0)
        model = VideoMAE(11, *SIZES[size], patch=patch).to(device)
        context, target = torch.randn(2, batch, 11, FRAMES, side, side, device=device)
        masks = lambda: torch.Generator().manual_seed(0)
        masked = tube_masks(batch, (side // patch)**2, model.mask_ratio, masks())
        ours = lambda: model(context, target, masks())['loss']
        plain = lambda: plain_videomae(model, torch.cat([context, target]), masked)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=device == 'cuda')  # the weights stay

        def step(loss):
            optimizer.zero_grad(set_to_none=True)
            with autocast(device):
                value = loss()
            value.backward()
            optimizer.step()
            return value.detach()

        values, gradients = [], []
        for loss in plain, ours:
            values.append(step(loss))
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        tolerance = 1e-4 if device == 'cpu' else 2e-2
        assert_close(*values, rtol=tolerance, atol=0)
        assert (gradients[0] - gradients[1]).norm() < 10 * tolerance * gradients[0].norm()
        plain_s, ours_s = seconds([lambda: step(plain), lambda: step(ours)], device,
                                  *((5, 0) if device == 'cpu' else (10, 2)))
        row(f'VideoMAE {size} step, {2 * batch} clips of 11 x 16 x {side} x {side}', 2 * batch / plain_s,
            2 * batch / ours_s, 'clips/s', less_is_better=False)


def plain_pool(p, tokens):
    """probe.AttentiveProbe.pool with keys and values of every token."""
    B, N, D = tokens.shape
    heads = lambda x: x.view(B, -1, p.heads, D // p.heads).transpose(1, 2)
    k, v = p.kv(p.norm1(tokens)).chunk(2, dim=-1)
    query = p.query.expand(B, 1, D)
    x = query + F.scaled_dot_product_attention(heads(p.q(query)), heads(k), heads(v)).transpose(1, 2).reshape(B, 1, D)
    return (x + p.fc2(F.gelu(p.fc1(p.norm2(x))))).squeeze(1)


def attentive_probe(device):
    """The attentive probe on a batch of 64 windows, forward and backward: JEPA's tokens and VideoMAE's at 224 x 224."""
    for name, N, D, ratio in ('JEPA', 196, 128, 12.0), ('VideoMAE', 1568, 384, 0.25):
        tokens, p = torch.randn(64, N, D, device=device), AttentiveProbe(D, 2, ratio).to(device)
        assert_close(p.pool(tokens), plain_pool(p, tokens), rtol=1e-3, atol=1e-3)
        plain_s, ours_s = seconds([lambda: plain_pool(p, tokens).sum().backward(),
                                   lambda: p.pool(tokens).sum().backward()], device)
        row(f'attentive probe, 64 windows of {N} x {D} ({name})', plain_s * 1e3, ours_s * 1e3, 'ms')


def physics_models(device):
    """Fine-tuning MPP-Ti and embedding with DISCO, 16 frames of 128 x 128 (CPU: 64 x 64): one by one, and a batch."""
    torch.manual_seed(0)
    batch, side = (16, 128) if device == 'cuda' else (2, 64)
    names = WELL['active_matter'][2].split()
    model, head, disco = (m.to(device) for m in (MPP(names), AttentiveProbe(192, 2, 4.0), DISCO('active_matter')))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-5)
    x = torch.randn(batch, len(names), FRAMES, side, side, device=device)

    def tune(size):
        for part in x.split(size):
            optimizer.zero_grad(set_to_none=True)
            head(model.features(part)).square().mean().backward()
            optimizer.step()

    @torch.no_grad()
    def embed(size):
        return torch.cat([disco.features(part) for part in x.split(size)])

    assert_close(embed(1), embed(batch), rtol=1e-3, atol=1e-3)
    for name, f in ('MPP-Ti, fine-tuning', tune), ('DISCO, embedding', embed):
        plain_s, ours_s = seconds([lambda: f(1), lambda: f(batch)], device, repeats=3)
        row(f'{name}, {side} x {side}: one by one, {batch} at once', batch / plain_s, batch / ours_s, 'windows/s',
            less_is_better=False)
        if device == 'cuda':
            memory = []
            for size in 1, batch:
                torch.cuda.reset_peak_memory_stats()
                f(size)
                memory.append(peak_memory())
            row('  peak memory', *memory, 'GB')


def read_hdf5(f, trajectory, t, resolution, place):
    """One window (C, 32, H, W) straight from The Well's file: the preprocessing of data.py, no cache.

    place: slices of x and y; only these are read.
    """
    fields = [f[group][name][trajectory, t:t + WINDOW, *place] for group in ('t0_fields', 't1_fields', 't2_fields')
              for name in sorted(f[group])]                              # (32, nx, ny, ...)
    x = np.concatenate([np.moveaxis(v.reshape(*v.shape[:3], -1), -1, 0) for v in fields])           # (C, 32, nx, ny)
    x = torch.from_numpy(x)
    return F.interpolate(x, size=(resolution, resolution), mode='bilinear') if resolution != x.shape[-1] else x


def reading(grid, resolution=0, crop=0, reads=30):
    """One window at a random start (and place, if cropped): HDF5 left open, against the cache; both in memory."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path, = bench_loader.write_noise(Path(folder), grid, files=1, runs=1, frames=40)
        split = Split(folder, find_system(bench_loader.SYSTEM), 'train', resolution, progress=False)

        def place(seed):                                                 # where Split.load cuts with this seed
            corner = np.random.default_rng(seed).integers(grid - crop + 1, size=2) if crop else (0, 0)
            return [slice(a, a + (crop or grid)) for a in corner]

        with h5py.File(path) as f:
            jobs = [(w, seed) for seed in range(2 * reads) for w in rng.permutation(split.windows)]
            jobs = iter([jobs[i] for i in rng.permutation(len(jobs))])
            plain = lambda w, seed: read_hdf5(f, *w, resolution or crop or grid, place(seed))
            ours = lambda w, seed: split.load(w[None], crop=crop, seeds=[seed])[0]
            for w in split.windows:                                      # equal, and both files read once
                assert_close(ours(w, 0), plain(w, 0), rtol=1e-4, atol=1e-5)
            plain_s, ours_s = seconds([lambda: plain(*next(jobs)), lambda: ours(*next(jobs))], 'cpu', reads)
    what = f', resized to {resolution}' if resolution else f', a random {crop} x {crop} of it' if crop else ''
    row(f'reading a window of {grid} x {grid}{what}: HDF5, cache', plain_s * 1e3, ours_s * 1e3, 'ms')


def simulation(device, runs=15):
    """Each system one run at a time, or 15 in one batch; counted in time units of all runs together."""
    def active_matter(b, grid=64):
        c, m = map(torch.stack, zip(*[active_matter_start(grid, seed, device=device) for seed in range(b)]))
        return ActiveMatter([-3.0] * b, [9.0] * b, c, m, dt=0.02)

    def shear_flow(b, grid=64):
        start = shear_flow_start(grid, 2 * grid, 2, 2, 1.0, device=device)
        return ShearFlow([1000.0] * b, [1.0] * b, *(torch.stack([f] * b) for f in start))

    def rayleigh_benard(b, grid=32):
        return RayleighBenard([1e6] * b, [1.0] * b, torch.stack(
            [rayleigh_benard_start(4 * grid, grid, 1.0, seed, 0.1, device=device) for seed in range(b)]))

    for make, name, duration in ((active_matter, 'active matter, 64 x 64', 0.2),
                                 (shear_flow, 'shear flow, 64 x 128', 0.2),
                                 (rayleigh_benard, 'convection, 128 x 32', 1.0)):
        plain, ours = make(1), make(runs)
        plain_s, ours_s = seconds([lambda: plain.advance(duration), lambda: ours.advance(duration)], device)
        row(f'{name}: one run at a time, {runs} at once', duration / plain_s, runs * duration / ours_s, 'time units/s',
            less_is_better=False)


def reference_runs(device):
    """The two runs of testdata/reference_flows.npz from start to end, on one CPU thread whatever the device.

    `plain` is not measured here: 31 and 500 seconds are what the framework that made the files took.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    u, s = shear_flow_start(64, 128, 2, 2, 1.0)
    x, y = np.arange(128)[:, None] / 32, chebyshev_nodes(32)
    b = torch.tensor((1 - y) + 0.01 * y * (1 - y) * (np.sin(np.pi * x) + 0.5 * np.cos(1.5 * np.pi * x))).float()
    shear, heat = ShearFlow([1000.0], [1.0], u[None], s[None]), RayleighBenard([1e6], [1.0], b[None])
    for name, solver, save, end, other in (('shear flow, Re 1000, 64 x 128, to t = 4', shear, 0.1, 4, 31),
                                           ('convection, Ra 1e6, 128 x 32, to t = 8', heat, 0.25, 8, 500)):
        start = time.perf_counter()
        for _ in range(round(end / save)):
            solver.advance(save)
        row(f'{name}; reported', end / other, end / (time.perf_counter() - start), 'time units/s', less_is_better=False)
    torch.set_num_threads(threads)


def readings(device):
    """Windows one by one, on the CPU whatever the device."""
    reading(256, resolution=224)
    reading(64)
    reading(64, crop=32)


def loader(device):
    """Batches of windows, in threads or in processes."""
    for what, plain, ours, unit, less_is_better in bench_loader.compare(device):
        row(what, plain, ours, unit, less_is_better)


PARTS = {part.__name__: part for part in (training_step, convolution, one_batch, masked_autoencoder, attentive_probe,
                                          physics_models, simulation, reference_runs, readings, loader)}
PARTS |= {'steps': bench_steps.table}                                    # a table of its own, the last


@dataclass
class Settings:
    device: str = option('auto', 'cuda, cpu, or auto', 'machine')
    only: str = option('', 'parts, with commas between: ' + ', '.join(PARTS), 'machine')
    json: str = option('', 'also write the numbers to this file', 'machine')


@script
def main(argv=None):
    args, = parse(__doc__, Settings, argv)
    device, path, names = pick_device(args.device), Path(args.json), args.only.split(',') if args.only else [*PARTS]
    if unknown := set(names) - set(PARTS):
        raise ValueError(f'no part {", ".join(sorted(unknown))}: choose from {", ".join(PARTS)}')
    if args.json and not path.absolute().parent.is_dir():
        raise ValueError(f'{path.parent} is no folder to write {path.name} to')
    machine = torch.cuda.get_device_name() if device == 'cuda' else 'CPU'
    machine += f', {torch.get_num_threads()} CPU threads, PyTorch {torch.__version__}'
    print(machine)
    if names != ['steps']:
        print(f'\n{"what":58} {"plain":>9} {"ours":>9} {"":12} {"ratio":>7}')
    found = {name: PARTS[name](device) for name in PARTS if name in names}
    if args.json:
        write_text(path, json.dumps({'machine': machine, 'rows': ROWS, 'steps': found.get('steps', [])}, indent=1))


if __name__ == '__main__':
    main()
