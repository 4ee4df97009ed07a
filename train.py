"""
Pretrain an encoder on windows of physical fields.

    python train.py --data active_matter                          # JEPA, in one process, CPU or GPU
    torchrun train.py --data active_matter --model videomae       # its rival; torchrun, if you like
    torchrun --nproc_per_node=8 train.py --data shear_flow        # data parallel, one process per GPU

With no dataset on disk, a small one is simulated first. Running the same command again resumes from
the last checkpoint. Two presets: `nano` (a laptop, simulated data) and `paper` (the paper's sizes);
defaults < preset < flags. Everything random in step s is drawn from (seed, s), so a run that is
killed and resumed, or split over ranks, sees the same windows, crops, loss chunks and masks.
"""
import os
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')                       # huge pages for CPU tensors, read by torch

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import json
import math
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import jepa
import videomae
from baselines import disco, mpp
from data import FRAMES, SYSTEMS, WINDOW, Split, find_dataset
from simulate import check_device, write_text


def option(default, help):
    return dataclasses.field(default=default, metadata={'help': help})


@dataclass
class Config:
    """Everything a run depends on; saved in its checkpoint. Zero often means: what the preset or system says."""
    data: str = option('active_matter', 'system: ' + ', '.join(SYSTEMS))
    model: str = option('jepa', 'jepa, videomae, mpp or disco')
    preset: str = option('auto', 'nano, paper, or auto: nano on data simulated by the nano preset, else paper')
    data_dir: str = option('', "folder of datasets in The Well's layout (default: $THE_WELL_DATA_DIR, else data)")
    cache_dir: str = option('', 'where preprocessed trajectories are kept (default: <data dir>/<system>/cache)')
    out: str = option('', 'folder of checkpoint and log (default: out/<system>-<model>-<preset>-seed<seed>)')
    # what the encoder sees
    resolution: int = option(224, 'side the fields are resized to; 0 keeps the file\'s')
    whole: bool = option(False, 'keep the whole domain; else the part the paper uses (of shear flow and convection)')
    crop: int = option(0, 'side of the random square cut from each training window; 0: the whole field')
    stride: int = option(0, 'frames between window starts; 0: the system\'s (active matter 1, others 4)')
    noise: float = option(-1.0, 'std of Gaussian noise added to the inputs; -1: the system\'s (convection 0, others 1)')
    normalize: bool = option(False, 'z-score each channel with the training split\'s mean and std')
    augment: bool = option(False, 'random shifts and mirrorings under which the equations are the same')
    paired: bool = option(True, 'crop and augment context and target alike; false: each on its own, so that only '
                                'what the whole run shares can be predicted')
    # JEPA
    widths: tuple = option((16, 32, 64, 128, 128), 'encoder widths, one per stage')
    blocks: tuple = option((3, 3, 3, 9, 3), 'residual blocks per stage')
    layer_scale: float = option(1e-6, 'initial layer scale of the residual blocks (not VideoMAE\'s)')
    residual: bool = option(False, 'predict the change of the embedding, not all of it')
    sim_coeff: float = option(2.0, 'weight of the invariance term')
    std_coeff: float = option(40.0, 'weight of the variance term')
    cov_coeff: float = option(2.0, 'weight of the covariance term')
    chunks: int = option(5, 'random chunks the rows of a batch are cut into for the loss')
    standardize: bool = option(False, 'z-score the embeddings before the loss, which settles its variance term')
    init: str = option('', 'published weights to start from: the file of JEPA\'s encoder, VideoMAE, MPP or DISCO')
    # the transformers: VideoMAE, MPP, DISCO
    size: str = option('', 'videomae: tiny or small (default); mpp: Ti (default), S, B or L')
    width: int = option(0, 'of the encoder; 0: as its size says')
    depth: int = option(0, 'blocks of the encoder; 0: as its size says')
    heads: int = option(0, 'of the encoder; 0: as its size says')
    patch: int = option(16, 'side of a patch, or of a tubelet, which is two frames long')
    decoder_width: int = option(192, 'width of VideoMAE\'s decoder, 64 a head')
    decoder_depth: int = option(4, 'blocks of VideoMAE\'s decoder')
    mask_ratio: float = option(0.9, 'share of the patches that VideoMAE hides')
    official_state_map: bool = option(False, 'MPP: channels to states as in the official script, not by name')
    operator_width: int = option(8, 'of DISCO\'s operator, at full resolution')
    generator_width: int = option(768, 'of the layers that make DISCO\'s operator')
    max_steps: int = option(32, '1/max_steps is the least step of DISCO\'s integration')
    # optimisation
    batch: int = option(256, 'windows per optimizer step, over all ranks and accumulation steps')
    micro_batch: int = option(8, 'windows per forward pass, over all ranks: the loss sees these together')
    epochs: float = option(0.0, 'passes over the training windows; 0: the system\'s (shear flow 6, others 30)')
    steps: int = option(-1, 'optimizer steps; -1: as many as `epochs` need; 0: none, to save the initial weights')
    lr: float = option(0.0, 'peak learning rate; 0: the system\'s (active matter 1e-3, others 1e-4)')
    min_lr: float = option(1e-6, 'learning rate at the end')
    warmup_epochs: float = option(-1.0, 'linear warmup, in epochs; -1: the system\'s (active matter 2, others 6)')
    weight_decay: float = option(0.05, 'AdamW weight decay')
    seed: int = option(0, 'seed of everything random')
    # machine
    device: str = option('auto', 'cuda, cpu, or auto')
    dtype: str = option('auto', 'float32, bfloat16 (autocast), float64, or auto: bfloat16 on a GPU that has it')
    save_every: int = option(100, 'steps between checkpoints')


# the defaults above are arXiv 2603.13227's
PRESETS = {
    'jepa': {
        'paper': {},
        'nano': dict(resolution=0, whole=True, crop=32, noise=0.0, normalize=True, augment=True, paired=False,
                     widths=(8, 16, 32, 64, 32), blocks=(0, 1, 1, 1, 1), layer_scale=1.0, residual=True,
                     sim_coeff=10.0, cov_coeff=4.0, chunks=1, standardize=True,
                     batch=64, micro_batch=64, steps=1200, lr=3e-3, warmup_epochs=0.5)},
    'videomae': {
        'paper': dict(noise=0.0, lr=1.5e-4),                             # its target is the pixels: no noise on them
        'nano': dict(resolution=0, whole=True, crop=32, noise=0.0, normalize=True, augment=True,
                     width=64, depth=4, heads=2, patch=8, decoder_width=128, decoder_depth=2, mask_ratio=0.75,
                     batch=32, micro_batch=32, steps=1200, lr=1.5e-3, warmup_epochs=0.3)},
    'mpp': {                                                             # both standardise their inputs themselves
        'paper': dict(noise=0.0),
        'nano': dict(resolution=0, whole=True, noise=0.0, augment=True, width=48, depth=2, heads=3, layer_scale=0.1,
                     batch=16, micro_batch=16, steps=800, lr=3e-3, warmup_epochs=0.5)},
    'disco': {
        'paper': dict(noise=0.0),
        'nano': dict(resolution=0, whole=True, crop=32, noise=0.0, augment=True, width=32, depth=2, heads=2, patch=8,
                     operator_width=4, generator_width=16, max_steps=2, layer_scale=0.1,
                     batch=16, micro_batch=16, steps=1000, lr=3e-3, warmup_epochs=0.5)},
}
FOR_SYSTEM = {                                                           # what a preset sets differently for one system
    ('jepa', 'nano', 'shear_flow'): dict(cov_coeff=0.4, steps=700),
    ('jepa', 'nano', 'rayleigh_benard'): dict(cov_coeff=0.4, steps=400)}
SIZES = {'videomae': {name: (s['width'], 12, s['heads']) for name, s in videomae.SIZES.items()},
         'mpp': mpp.SIZES, 'disco': {'': (384, 12, 6)}}                  # width, depth, heads
PUBLISHED = {'jepa': jepa.load_official, 'videomae': videomae.load_official, 'mpp': mpp.load_published,
             'disco': disco.load_official}                               # (model, path), for --init


def parse_config(cls, description):
    """The flags given on the command line, as a dict; a flag for every field of a dataclass made of `option`s."""
    def boolean(text):
        if text.lower() not in ('true', 'false'):
            raise ValueError(text)
        return text.lower() == 'true'

    def integers(text):
        return tuple(int(v) for v in text.split(','))

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    for f in dataclasses.fields(cls):
        kind = {bool: boolean, tuple: integers}.get(f.type, f.type)
        shown = ','.join(map(str, f.default)) if f.type is tuple else f.default
        extra = dict(nargs='?', const=True) if f.type is bool else {}
        parser.add_argument('--' + f.name.replace('_', '-'), type=kind, default=argparse.SUPPRESS,
                            metavar=kind.__name__.upper(), **extra,
                            help=f.metadata['help'] + ('' if shown in ('', 'auto') else f' (default: {shown})'))
    return vars(parser.parse_args())


def resolve(flags, simulated_preset):
    """Config from command-line flags: defaults < preset < flags, then the system's values for what is left open."""
    c = Config(**flags)
    if c.preset == 'auto':
        c.preset = 'nano' if simulated_preset == 'nano' else 'paper'
    if c.model not in PRESETS:
        raise ValueError(f'unknown model {c.model!r}: choose from {", ".join(PRESETS)}')
    if c.preset not in PRESETS[c.model]:
        raise ValueError(f'unknown preset {c.preset!r}: choose from auto, {", ".join(PRESETS[c.model])}')
    preset = PRESETS[c.model][c.preset] | FOR_SYSTEM.get((c.model, c.preset, c.data), {})
    if 'size' in flags:                                                  # a named size goes before the preset's own
        preset |= dict(width=0, depth=0, heads=0)
    c = Config(**{**preset, **flags, 'preset': c.preset})
    system = SYSTEMS[c.data]
    c.stride = c.stride or system.stride
    c.noise = system.noise if c.noise < 0 else c.noise
    c.lr = c.lr or system.lr
    c.epochs = c.epochs or system.epochs
    c.warmup_epochs = system.warmup_epochs if c.warmup_epochs < 0 else c.warmup_epochs
    c.out = c.out or f'out/{c.data}-{c.model}-{c.preset}-seed{c.seed}'
    if c.device == 'auto':
        c.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if c.dtype == 'auto':
        c.dtype = 'bfloat16' if c.device == 'cuda' and torch.cuda.is_bf16_supported() else 'float32'
    if c.dtype not in ('float32', 'bfloat16', 'float64'):
        raise ValueError(f'unknown dtype {c.dtype!r}: choose from float32, bfloat16, float64')
    c.micro_batch = min(c.micro_batch, c.batch)
    check_device(c.device)
    if c.micro_batch < 1 or c.batch % c.micro_batch:
        raise ValueError(f'batch {c.batch} is not a multiple of micro_batch {c.micro_batch}')
    if c.model in SIZES and c.size not in ('', *SIZES[c.model]):
        raise ValueError(f'{c.model} has no size {c.size!r}: choose from {", ".join(SIZES[c.model])}')
    for name in 'save_every', 'patch', 'chunks', 'max_steps', 'stride', 'decoder_width':
        if getattr(c, name) < 1:
            raise ValueError(f'{name} must be at least 1, not {getattr(c, name)}')
    if c.widths[-1] % 8:
        raise ValueError(f'the probes need a last width divisible by their 8 heads, not {c.widths[-1]}')
    if c.steps < -1:
        raise ValueError(f'steps must be -1, 0 or more, not {c.steps}')
    if c.init and not Path(c.init).is_file():                            # before anything is simulated or cached
        raise ValueError(f'no file {c.init} to start from')
    if c.resolution:
        check_size(c, (c.resolution, c.resolution))
    return c


def check_size(c, shape):
    """Raise ValueError if the model cannot take training windows cut from fields of `shape`."""
    unit = c.patch if c.model == 'videomae' else 16
    if c.crop > min(shape):
        raise ValueError(f'crop {c.crop} is larger than the fields, {shape[0]} x {shape[1]}')
    for side in (c.crop, *(shape if c.model == 'jepa' else ())) if c.crop else shape:         # JEPA is probed uncropped
        if side % unit or side < 1:
            raise ValueError(f'{c.model} needs sides divisible by {unit}, not {side}: choose another --resolution or '
                             f'--crop')


# ---------------------------------------------------------------------------------------------
# model and checkpoints

def build_model(c, channels):
    """The model of a Config for channels of these names, freshly initialised from its seed.

    A model is a module with an `encoder`, forward(context, target, generator) -> {'loss': ..., other terms},
    `embedding`, the last one, (B, D, h, w), for the log, features(x) -> tokens, to fine-tune, and embed(x), the
    same without gradients, for the probes.
    """
    torch.manual_seed(c.seed)
    if c.model == 'jepa':
        model = jepa.JEPA(len(channels), c.widths, c.blocks, c.layer_scale, c.sim_coeff, c.std_coeff, c.cov_coeff,
                          c.chunks, c.standardize, c.residual, c.paired)
    else:
        model = build_transformer(c, channels)
    return model.double() if c.dtype == 'float64' else model


def build_transformer(c, channels):
    """VideoMAE, MPP or DISCO: of the size that is named, but for a width, depth or heads of the Config's own."""
    own = SIZES[c.model][c.size or {'videomae': 'small', 'mpp': 'Ti', 'disco': ''}[c.model]]
    width, depth, heads = (asked or default for asked, default in zip((c.width, c.depth, c.heads), own))
    if c.model == 'videomae':
        return videomae.VideoMAE(len(channels), width, depth, heads, c.patch, mask_ratio=c.mask_ratio,
                                 decoder_width=c.decoder_width, decoder_depth=c.decoder_depth,
                                 decoder_heads=max(1, c.decoder_width // 64))
    if c.model == 'mpp':
        periodic = (False, False) if c.crop else SYSTEMS[c.data].part(c.whole)[1]
        return mpp.MPP(channels, periodic, (width, depth, heads), c.official_state_map, c.layer_scale)
    return disco.DISCO(c.data, channels, all_datasets=bool(c.init), dim=width, blocks=depth, heads=heads, patch=c.patch,
                       hidden=c.generator_width, width=c.operator_width, layer_scale=c.layer_scale,
                       max_steps=c.max_steps)


def save_checkpoint(path, **state):
    """One file of plain types and tensors, complete or not there at all."""
    part = path.with_name(path.name + '.part')
    torch.save(state, part)
    os.replace(part, path)


def load_checkpoint(path):
    """A checkpoint dict written by train.py. Raises ValueError for any other file; never runs code from it."""
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise ValueError(f'no checkpoint at {path}: train one with python train.py') from None
    except Exception as e:                                               # pickle, zip and io errors of many kinds
        raise ValueError(f'{path} is not a checkpoint of train.py ({str(e).splitlines()[0][:100]})') from None
    needed = {'model', 'optimizer', 'step', 'config', 'channels', 'mean', 'std'}
    if not isinstance(state, dict) or not needed <= state.keys():
        raise ValueError(f'{path} is not a checkpoint of train.py: it has no {", ".join(sorted(needed))}')
    return state


def restore(model, state, path):
    """Load a checkpoint's weights into `model`; ValueError if they belong to another one."""
    try:
        model.load_state_dict(state['model'])
    except RuntimeError as e:
        raise ValueError(f'{path} holds another model: {str(e).splitlines()[1].strip()}') from None


def git_hash():
    try:
        return subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


# ---------------------------------------------------------------------------------------------
# batches

def prefetch(load, jobs, workers):
    """load(job) for each job, in order, computed ahead by `workers` threads."""
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        try:
            for job in jobs:
                pending.append(pool.submit(load, job))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for p in pending:
                p.cancel()


def window_order(n, seed, first, count):
    """Positions first..first+count of an endless shuffled pass over n windows, reshuffled every epoch."""
    position = np.arange(first, first + count)
    out = np.empty(count, int)
    for epoch in np.unique(position // n):
        here = position // n == epoch
        out[here] = np.random.default_rng([seed, 1, epoch]).permutation(n)[position[here] % n]
    return out


def learning_rate(step, steps, warmup, peak, low):
    """Linear warmup from `low`, then a cosine down to `low`."""
    if step < warmup:
        return low + (peak - low) * (step + 1) / warmup
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup)))


def embedding_health(z):
    """(mean std of the channels, effective rank) of embeddings (B, D, h, w): a collapse shows in either.

    The effective rank is exp of the entropy of the covariance's normalised spectrum (Roy, Vetterli 2007).
    """
    z = z.movedim(1, -1).reshape(-1, z.shape[1]).float().cpu()           # (rows, D)
    if len(z) < 2:
        return 0.0, 1.0
    p = torch.linalg.eigvalsh(torch.cov(z.T)).clamp(min=0)
    p = p / p.sum().clamp(min=1e-12)
    return z.std(0).mean().item(), torch.exp(-(p * p.clamp(min=1e-12).log()).sum()).item()


def peak_memory():
    """Peak memory of this process in GB: the GPU's if it uses one, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e9


def keep_freed_memory():
    """Ask glibc to keep freed blocks for reuse: giving them back costs a third of a training step on CPU."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        for parameter, value in (-4, 0), (-1, 2**31 - 1), (-2, 2**28):   # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(parameter, value)


# ---------------------------------------------------------------------------------------------
# the run

def train(flags):
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    master = rank == 0
    say = print if master else lambda *a: None
    if world > 1:
        cuda = torch.cuda.is_available() and flags.get('device', 'auto') != 'cpu'
        if cuda and int(os.environ['LOCAL_RANK']) >= torch.cuda.device_count():
            raise ValueError(f'more processes than the {torch.cuda.device_count()} GPUs here: lower --nproc_per_node')
        if cuda:
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        # the others wait while rank 0 simulates or caches, which may take hours
        dist.init_process_group('nccl' if cuda else 'gloo', timeout=datetime.timedelta(days=2))

    # data
    data_dir = flags.get('data_dir') or os.environ.get('THE_WELL_DATA_DIR', 'data')
    name = flags.get('data', Config.data)
    if name in SYSTEMS and not (Path(data_dir) / name).exists():         # refuse bad flags before simulating
        Path(resolve(flags, 'nano').out).mkdir(parents=True, exist_ok=True)
    if master:
        find_dataset(name, data_dir, build=True)
    if world > 1:
        dist.barrier()
    root, system, simulated = find_dataset(name, data_dir)
    c = resolve({**flags, 'data_dir': str(data_dir)}, simulated)
    if c.micro_batch % world:
        raise ValueError(f'micro_batch {c.micro_batch} does not divide over {world} ranks')
    open_split = lambda: Split(root, system, 'train', c.resolution, c.stride, c.cache_dir, master, c.whole)
    data = open_split() if master else None
    if world > 1:
        dist.barrier()
    data = data or open_split()
    labels = data.varying()
    if not labels:
        raise ValueError(f'no scalar varies over the training files of {root}: there is nothing to probe')
    check_size(c, data.fields.shape[-2:])
    mean, std = data.normalization(c.normalize)
    label_values = data.labels(labels)

    # model
    device = torch.device(c.device)
    model = build_model(c, data.channels).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, betas=(0.9, 0.95), weight_decay=c.weight_decay,
                                  fused=device.type == 'cuda')
    windows = len(data.windows)
    steps = c.steps if c.steps >= 0 else math.ceil(c.epochs * windows / c.batch)
    warmup = min(steps, round(c.warmup_epochs * windows / c.batch))
    accumulate = c.batch // c.micro_batch

    # resume
    out = Path(c.out)
    checkpoint = out / 'ckpt.pt'
    step, seconds = 0, 0.0
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        own = dataclasses.asdict(c)
        differs = [k for k in own if own[k] != state['config'].get(k, getattr(Config, k))
                   and k not in ('data_dir', 'cache_dir', 'out', 'device')]
        if differs:
            raise ValueError(f'{checkpoint} is a run with other settings ('
                             + ', '.join(f'{k}: {state["config"].get(k)}, now {own[k]}' for k in differs)
                             + '): choose another --out')
        restore(model, state, checkpoint)
        optimizer.load_state_dict(state['optimizer'])
        step, seconds = state['step'], state['seconds']
    elif c.init:
        PUBLISHED[c.model](model, c.init)
    log_path = out / 'log.jsonl'
    if master:
        kept = [line for line in (log_path.read_text().splitlines() if log_path.exists() else [])
                if line.endswith('}') and json.loads(line)['step'] < step]
        write_text(log_path, ''.join(line + '\n' for line in kept))

    say(f'{c.data}: {len(data.runs)} training runs in {root}, {len(data.channels)} channels, '
        f'labels {", ".join(dict(system.shown).get(name, name) for name in labels)}')
    in_encoder, in_all = (sum(p.numel() for p in m.parameters()) for m in (model.encoder, model))
    say(f'{c.model}, preset {c.preset} on {torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}, '
        f'{c.dtype}; {in_encoder:,} parameters in the encoder, {in_all - in_encoder:,} beside it')
    side = (c.crop, c.crop) if c.crop else data.fields.shape[-2:]
    say(f'{windows} windows of {FRAMES} + {FRAMES} frames at {side[0]} x {side[1]}; a step takes {c.batch} of them = '
        f'{accumulate} accumulation(s) x {world} rank(s) x {c.micro_batch // world}; '
        f'{steps} steps = {steps * c.batch / windows:.2f} epochs')
    say(f'writing {checkpoint} and {log_path}' + (f', resuming at step {step}' if step else ''))

    forward = model
    if world > 1:
        forward = DistributedDataParallel(model, device_ids=[device.index] if device.index is not None else None,
                                          find_unused_parameters=bool(c.init))   # they may serve other systems too
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16')
    real = torch.float64 if c.dtype == 'float64' else torch.float32
    mean, std = (torch.as_tensor(v, dtype=real, device=device).view(-1, 1, 1, 1) for v in (mean, std))
    local = c.micro_batch // world

    def load(job):
        s, micro = job
        first = micro * c.micro_batch + rank * local                     # this rank's part of the step's windows
        chosen = window_order(windows, c.seed, s * c.batch, c.batch)[first:first + local]
        views = [(0, WINDOW)] if c.paired else [(0, FRAMES), (FRAMES, FRAMES)]            # (first frame, frames)
        parts = [data.load(data.windows[chosen] + (0, offset), frames, c.crop, c.augment,
                           seeds=[(c.seed, 2 + v, s, first + i) for i in range(local)])
                 for v, (offset, frames) in enumerate(views)]
        data.release()
        return torch.cat(parts, dim=2)                                   # (local, C, 32, H, W)

    def save(step, seconds):
        save_checkpoint(checkpoint, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                        seconds=seconds, samples=step * c.batch, config=dataclasses.asdict(c),
                        channels=data.channels, labels=labels,
                        mean=mean.flatten().tolist(), std=std.flatten().tolist(), rng=torch.get_rng_state(),
                        label_mean=label_values.mean(0).tolist(), label_std=label_values.std(0).tolist(),
                        git=git_hash())

    jobs = ((s, micro) for s in range(step, steps) for micro in range(accumulate))
    batches = prefetch(load, jobs, workers=4 if device.type == 'cuda' else 1)
    bar = tqdm(total=steps, initial=step, desc='training', unit='step', disable=not master, smoothing=0.05)
    with open(log_path if master else os.devnull, 'a') as log:
        while step < steps:
            started = time.perf_counter()
            lr = learning_rate(step, steps, warmup, c.lr, c.min_lr)
            for group in optimizer.param_groups:
                group['lr'] = lr
            optimizer.zero_grad(set_to_none=True)
            sums = {}
            for micro in range(accumulate):
                x = (next(batches).to(device, real, non_blocking=True) - mean) / std          # (local, C, 32, H, W)
                common = (c.seed * 2**20 + step) * 1024 + micro
                generator = torch.Generator().manual_seed(common % 2**63)                     # same on all ranks
                if c.noise > 0:
                    own = torch.Generator(device).manual_seed((common * 1024 + rank) % 2**63)
                    x = x + c.noise * torch.randn(x.shape, generator=own, device=device, dtype=real)
                last = micro == accumulate - 1
                with contextlib.nullcontext() if last or world == 1 else forward.no_sync():
                    with autocast():
                        losses = forward(x[:, :, :FRAMES], x[:, :, FRAMES:], generator)
                    (losses['loss'] / accumulate).backward()
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value.item() / accumulate
            if world > 1:                                                # the global batch's, the same on all ranks
                values = torch.tensor(list(sums.values()), device=device, dtype=torch.float64)
                dist.all_reduce(values)
                sums = dict(zip(sums, (values / world).tolist()))
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            finite = torch.stack([g.isfinite().all() for g in gradients]).all().item()        # one wait for the GPU
            if not math.isfinite(sums['loss']) or not finite:
                bar.close()
                raise FloatingPointError(f'the loss is {sums["loss"]} at step {step}, its gradient '
                                         f'{"" if finite else "not "}finite; the last good checkpoint is kept '
                                         f'({checkpoint if checkpoint.exists() else "none yet"}): try a lower --lr')
            optimizer.step()
            took = time.perf_counter() - started
            seconds += took
            spread, rank_of_z = embedding_health(model.embedding)
            log.write(json.dumps({'step': step, **sums, 'embedding_std': spread, 'embedding_rank': rank_of_z, 'lr': lr,
                                  'samples_per_s': c.batch / took, 'seconds': seconds,
                                  'memory_gb': peak_memory()}) + '\n')
            log.flush()
            step += 1
            bar.update()
            bar.set_postfix_str(', '.join(f'{k} {v:.3f}' for k, v in sums.items()) + f', rank {rank_of_z:.0f}')
            if master and (step % c.save_every == 0 or step == steps):
                save(step, seconds)
    bar.close()
    if master and not checkpoint.exists():                               # no step was asked for
        save(step, seconds)
    say(f'{steps} steps in {seconds / 60:.1f} min, peak memory {peak_memory():.1f} GB. '
        f'Next: python eval.py {checkpoint}')
    if world > 1:
        dist.destroy_process_group()


def main():
    keep_freed_memory()
    flags = parse_config(Config, __doc__)
    try:
        train(flags)
    except (ValueError, OSError, FloatingPointError) as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
