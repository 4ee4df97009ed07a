"""
Pretrain an encoder on windows of physical fields.

    python train.py --data NAME                                # one process, CPU or GPU
    torchrun --nproc_per_node=8 train.py --data NAME           # data parallel, a process per GPU
    python train.py --data NAME --model NAME --help            # the settings of this model and data

Without --data-dir, a small dataset is simulated first. The same command again resumes the run; a
larger --steps extends it. Everything random in step s is drawn from (seed, s): a run that is killed
and resumed, or split over ranks, sees the same windows and masks.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 end a run after its step, with a checkpoint and exit code 143,
130 or 138 (128 + signal); a second one ends it at once. docs/slurm.md has a job that is requeued.
"""
import contextlib
import errno
import importlib.util
import json
import math
import os
import re
import secrets
import textwrap
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from common import (FRAMES, LOCAL_RANK, RANK, SMOKE_DATA, STOP, WORLD, Parser, Progress, alone_in,
                    as_text, at_least, data_folder, draw_seed, fast_dtype, from_rank_0, git_hash,
                    one_rank_first, option, peak_memory, pick_device, prefetch, processor,
                    read_tensors, say, script, start_ranks, write_tensors, write_text)
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import model as models
import probe
import simulate
from data import Split, describe_file, find_dataset
from systems import DEFAULT, System
from systems.datasets import read_recipe, summary, system_name, well_files

of_data, of_optimizer = partial(option, group='data'), partial(option, group='optimisation')
of_machine = partial(option, group='machine')

# --- settings
@dataclass
class Config:
    """What a run depends on besides its model's Options. Both are saved in its checkpoint."""
    data: str = of_data(DEFAULT, "the system, or another dataset of The Well's")
    model: str = option(models.DEFAULT, 'one of ' + ', '.join(models.MODELS) + ', or your own file')
    preset: str = option('auto', "nano, paper, smoke or a model's own; auto: nano on data made for "
                         'it, else paper')
    data_dir: str = of_data('', 'folder of datasets (default: $THE_WELL_DATA_DIR, else data)')
    cache_dir: str = of_data('', 'for preprocessed fields (default: <data dir>/<system>/cache)')
    # the fields: the paper's are resized to 224, of a part of the domain, and not normalised
    resolution: int = of_data(System.resolution, "side the fields are resized to; 0: the file's")
    whole: bool = of_data(False, 'keep the whole domain, not the part that the paper uses')
    crop: int = of_data(0, 'side of the square cut from each window; 0: the whole field')
    stride: int = of_data(System.stride, 'frames between the starts of windows')
    noise: float = of_data(System.noise, 'std of the Gaussian noise on the inputs')
    normalize: bool = of_data(False, 'z-score channels; components of a vector share one std')
    augment: bool = of_data(False, 'random shifts and mirrorings that the equations allow')
    views: str = of_data('paired', 'target. paired: the next 16 frames; unpaired: these, cropped '
                         'apart; other-time: any other 16, cropped apart; same: the context')
    # other ways to begin, and to learn
    init: str = option('', 'weights to start from: the folder of another run, or a published file')
    supervised: bool = option(False, 'train the encoder with the labels, for comparison', bare=True)
    label_fraction: float = option(1.0, 'share of the training runs that --supervised learns from')
    # a step: the loss sees a micro-batch, the optimizer a batch
    batch: int = of_optimizer(256, 'windows per optimizer step, over all ranks')
    micro_batch: int = of_optimizer(0, 'windows per forward pass, over all ranks; 0: 8 per rank')
    epochs: float = of_optimizer(System.epochs, 'passes over the windows, if --steps is -1')
    steps: int = of_optimizer(-1, 'optimizer steps; -1: as many as --epochs needs; 0: none')
    lr: float = of_optimizer(System.lr, 'peak learning rate')
    min_lr: float = of_optimizer(1e-6, 'learning rate at the end of the cosine')
    warmup_epochs: float = of_optimizer(0.0, 'linear warmup, in epochs')
    weight_decay: float = of_optimizer(0.05, "AdamW's weight decay")
    seed: int = of_optimizer(0, 'of everything random; also of data that are simulated now')
    # the machine: none of this changes what is learned, but for dtype
    out: str = of_machine('', 'folder of the run (default: one of its own in out/)')
    device: str = of_machine('auto', 'cuda, cpu, mps (a Mac; not tried), or auto')
    dtype: str = of_machine('auto', 'float32, float64, bfloat16, float16 (its loss is scaled), or '
                            'auto: on a GPU bfloat16, or float16 if it has none')
    save_every: int = of_machine(100, 'steps between checkpoints')
    save_minutes: float = of_machine(10.0, 'minutes between checkpoints: both count')
    keep_every: int = of_machine(0, 'steps between checkpoints kept as ckpt-<step>.pt; 0: none')
    probe_every: int = of_machine(0, 'steps between ridge probes on valid, for curves; 0: none')
    wandb: str = of_machine('', 'project of Weights & Biases that gets the log, too')
    recompute: str = of_machine('auto', 'activation checkpointing: no; mlp, the MLP of each block; '
                                'blocks, whole ones; auto: mlp on a GPU', bare='blocks')
    compile: bool = of_machine(False, 'torch.compile, which takes minutes at first', bare=True)

# The last one wins: default, the system's protocol(), PRESETS, the model's PRESETS, the flag.
PRESETS = {
    'paper': dict(dtype='float32'),                            # its trainer has no autocast
    'nano': dict(dtype='float32', resolution=0, whole=True,    # the simulated fields as they are
                 normalize=True, noise=0.0, crop=32, augment=True,       # 135 runs are few
                 batch=32, micro_batch=32, steps=2400,         # 76,800 windows, minutes on a CPU
                 lr=1e-3, warmup_epochs=0.5)}
SMOKE = dict(steps=20, batch=16, micro_batch=16)               # on top of nano
# what no result depends on; what may change when a run goes on; and what is gone of old runs
OF_MACHINE = ('data_dir cache_dir out device save_every save_minutes keep_every probe_every wandb '
              'recompute compile').split()
MAY_CHANGE = [*OF_MACHINE, 'steps', 'epochs', 'micro_batch', 'dtype']
GONE = 'cache', 'log_every'

def parse(argv, description, missing=False):
    """(Config, the model's module, its Options) of argv or the command line. ValueError if bad.
    missing: neither the dataset that --data-dir names need be there, nor the run of --init."""
    # the defaults of the other flags depend on these
    first = Parser('', add_help=False)
    first.add_dataclass(Config)
    early, rest = first.parse_known_args(argv)
    early = Config(**vars(early))
    module = models.find_model(early.model)

    # the data: where we are told that they are, nothing is simulated
    smoke = early.preset == 'smoke'                            # its data are apart
    folder = data_folder(early.data_dir, SMOKE_DATA if smoke else '')
    told = early.data_dir or (not smoke and os.environ.get('THE_WELL_DATA_DIR'))
    absent = missing or not told or '-h' in rest or '--help' in rest
    root, system, simulated = find_dataset(early.data, folder, absent)
    files, name = well_files(root), system_name(root, early.data)
    if not files and not simulated:
        simulated = 'smoke' if smoke else 'nano'               # as it will be
    made_for = simulated if simulated in ('nano', 'smoke') else 'paper'
    preset = made_for if early.preset == 'auto' else early.preset

    # default < preset < flag
    settings = {f.name: f.default for cls in (Config, module.Options) for f in fields(cls)}
    settings |= system.protocol() | preset_settings(module, preset, name)
    parser = Parser(f'{description}\nDefaults: {early.model}, preset {preset}, on {name}.\n'
                    f'Presets of {early.model}: auto, {", ".join(presets_of(module))}.')
    parser.add_dataclass(Config, settings)
    parser.add_dataclass(module.Options, settings)
    flags = vars(parser.parse_args(argv))                      # those that were given
    if 'epochs' in flags and 'steps' not in flags:             # a preset may have set the steps
        flags['steps'] = -1
    # words, as infonce, that are not the preset's: a folder of their own
    given = [(flags[f.name], settings[f.name]) for f in fields(module.Options) if f.name in flags]
    words = [v for v, default in given if v != default and isinstance(v, str) and v.isidentifier()]
    settings |= flags | dict(preset=preset, data=name,
                             data_dir=str(folder if name == early.data else root))
    c, options = (cls(**{f.name: settings[f.name] for f in fields(cls)})
                  for cls in (Config, module.Options))
    complete(c, words, missing)

    # does the model take these fields?
    (crop, periodic), channels = system.part(c.whole), None
    if files:
        about = describe_file(files[0], crop, c.resolution)
        channels, size = about['channels'], about['size']
    else:                                                      # the grid that will be simulated
        grid = system.preset(simulated).grid
        size = [c.resolution or round(b * n) - round(a * n) for n, (a, b) in zip(grid, crop)]
    if c.crop > min(size):
        raise ValueError(f'crop {c.crop} is larger than the fields, {size[0]} x {size[1]}')

    # a model that takes any size is probed on whole fields; another one in tiles of its own
    sizes = [(c.crop, c.crop)] if c.crop else []
    if not c.crop or getattr(module, 'ANY_SIZE', False):
        sizes.append(tuple(size))
    for size in sizes if hasattr(module, 'check') else ():
        module.check(options, models.Inputs(c.data, channels, periodic, size, is_paired(c)))
    return c, module, options

def is_paired(c):
    """Do context and target show the same place?"""
    return c.views in ('paired', 'same')

def presets_of(module):
    """Names of a model's presets."""
    own = getattr(module, 'PRESETS', {})
    return ['smoke', *(key for key in PRESETS | own if isinstance(key, str))]

def preset_settings(module, preset, system):
    """The settings of a model's preset on a system. ValueError if there is no such preset."""
    of_model = getattr(module, 'PRESETS', {})
    if preset not in presets_of(module):
        # perhaps another model has it
        hints = [f'add --model {name}, or ' for name in models.MODELS
                 if preset in getattr(models.find_model(name), 'PRESETS', {})]
        raise ValueError(f'this model has no preset {preset!r}: {"".join(hints[:1])}choose from '
                         f'auto, {", ".join(presets_of(module))}')
    key, more = ('nano', SMOKE) if preset == 'smoke' else (preset, {})
    settings = PRESETS.get(key, {}) | of_model.get(key, {}) | of_model.get((key, system), {}) | more
    # a typo in a model's file would pass in silence
    known = {f.name for cls in (Config, module.Options) for f in fields(cls)}
    if unknown := settings.keys() - known:
        names = ', '.join(sorted(unknown))
        raise ValueError(f'{module.__name__}.py: PRESETS sets {names}, which is no setting')
    return settings

def complete(c, words=(), missing=False):
    """Fill in what depends on the rest of a Config; ValueError for what will not do. words: of the
    run's folder. missing: what it starts from need not be there."""
    at_least(c, 1, 'stride', 'batch', 'save_every')
    at_least(c, 0, 'resolution', 'crop', 'micro_batch', 'noise', 'min_lr', 'warmup_epochs',
             'weight_decay', 'seed', 'save_minutes', 'keep_every', 'probe_every')
    at_least(c, -1, 'steps')
    for name in 'lr', 'epochs':
        if getattr(c, name) <= 0:
            raise ValueError(f'--{name} must be more than 0, not {getattr(c, name)}')
    if c.seed >= 2**32:                                        # numpy's are 32 bits
        raise ValueError(f'--seed must be less than 2**32, not {c.seed}')
    if not 0 < c.label_fraction <= 1 or c.label_fraction < 1 and not c.supervised:
        raise ValueError(f'--label-fraction is in (0, 1], for --supervised: not {c.label_fraction}')

    if c.wandb and not getattr(importlib.util.find_spec('wandb'), 'origin', None):  # or a folder
        raise ValueError('--wandb needs a package that is not here: pip install wandb')

    c.device = pick_device(c.device)
    if c.dtype == 'auto':
        c.dtype = fast_dtype() if c.device == 'cuda' else 'float32'
    for name, choices in (('views', 'paired, unpaired, other-time, same'),
                          ('dtype', 'float32, float64, bfloat16, float16'),
                          ('recompute', 'auto, no, mlp, blocks')):
        if getattr(c, name) not in choices.split(', '):
            raise ValueError(f'unknown {name} {getattr(c, name)!r}: choose from {choices}')
    # what the device cannot do
    no_autocast = c.dtype in models.LOWER and not torch.amp.is_autocast_available(c.device)
    if no_autocast or (c.device, c.dtype) == ('mps', 'float64'):
        raise ValueError(f'no {c.dtype} on {c.device}: use --dtype float32')

    # a batch is cut into micro-batches, and these over the ranks
    c.micro_batch = min(c.micro_batch or 8 * WORLD, c.batch)
    if c.batch % c.micro_batch:
        raise ValueError(f'batch {c.batch} is not a multiple of micro_batch {c.micro_batch}')
    if c.micro_batch % WORLD:
        raise ValueError(f'micro_batch {c.micro_batch} does not divide over {WORLD} ranks')

    # where it starts, and where it is written
    if not c.out:
        words = [*words, 'supervised'] if c.supervised else words
        words = [*words, f'{c.label_fraction:g}'] if c.label_fraction < 1 else words
        c.out = 'out/' + '-'.join([c.data, c.model, c.preset, *words, f'seed{c.seed}'])
    c.init = c.init and str(Path(c.init))                      # without a slash at its end
    places = Path(c.init), Path(c.out) / 'ckpt.pt'
    if c.init and not missing and not any(place.exists() for place in places):
        raise ValueError(f'no file or folder {c.init} to start from')
    there = next(p for p in (Path(c.out), *Path(c.out).absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f'{there} is no folder to write to: choose another --out')

# --- batches
def label_names(data):
    """The labels of a Split, as people know them."""
    return [data.system.name_of(name) for name in data.varying()]

def open_data(c):
    """(folder, Split) of the training data: simulated, if missing, and cached."""
    with one_rank_first(RANK == 0):
        root, system, _ = find_dataset(c.data, c.data_dir, missing=RANK == 0)
        recipe = read_recipe(root)                             # of one that is half simulated
        if RANK == 0 and not recipe and not well_files(root):
            recipe = {'preset': 'smoke' if c.preset == 'smoke' else 'nano', 'seed': c.seed}
            say(f'No {c.data} dataset in {root.parent}: simulating one (see simulate.py --help).')
        # begun, or to be begun; a renamed folder is not added to
        if RANK == 0 and recipe and system.presets and root.name == c.data:
            simulate.make_dataset(c.data, root.parent, recipe['preset'], recipe['seed'])

    # each node has a cache of its own
    with one_rank_first(LOCAL_RANK == 0):
        data = Split(root, system, 'train', c.resolution, c.stride, c.cache_dir, c.whole,
                     processes=os.cpu_count())

    say(summary(c.data, root, {'train': data}))
    # labels are needed by --supervised alone
    if c.supervised and not data.varying():
        raise ValueError(f'no scalar varies over the training files of {root}: --supervised needs '
                         f'labels, pretraining does not')
    if c.label_fraction < 1:
        data.windows = data.with_labels(data.windows, c.label_fraction, c.seed)
    return root, data

def window_order(n, seed, first, count):
    """Positions first..first+count of an endless pass over n windows, shuffled every epoch."""
    position, out = np.arange(first, first + count), np.empty(count, int)
    for epoch in np.unique(position // n):
        here = position // n == epoch
        out[here] = np.random.default_rng([seed, 1, epoch]).permutation(n)[position[here] % n]
    return out

def load_batch(data, c, step, micro):
    """A micro-batch of this rank: windows (B, C, 32, H, W), raw units; labels (B, L), z-scored;
    the run of each, (B,)."""
    # which windows: this rank's part of the micro-batch's part of the step
    B = c.micro_batch // WORLD
    first = micro * c.micro_batch + RANK * B
    order = window_order(len(data.windows), c.seed, step * c.batch, c.batch)
    windows = data.windows[order[first:first + B]]             # (B, 2): run, first frame
    labels = torch.tensor(data.standard_labels[windows[:, 0]])                    # (B, L)

    def seeds(stream):                 # 1: order, 2: context, 3: target, 4: its time
        return [(c.seed, stream, step, first + i) for i in range(B)]

    # context and target at the same place, one after the other: read 32 frames at once
    sides = (c.crop, c.crop) if c.crop else data.size
    x = torch.empty(B, len(data.channels), 2 * FRAMES, *sides)
    frames = 2 * FRAMES if c.views == 'paired' else FRAMES
    data.load(windows, frames, c.crop, c.augment, seeds(2), x[:, :, :frames])
    if c.views == 'same':
        x[:, :, FRAMES:] = x[:, :, :FRAMES]

    # or the target is another view, cropped and turned on its own
    if c.views in ('unpaired', 'other-time'):
        where = windows + (0, FRAMES)                          # the next 16 frames
        if c.views == 'other-time':
            where = [(run, other_time(t, data.frames[run] - FRAMES, seed))
                     for (run, t), seed in zip(windows, seeds(4))]
        data.load(np.array(where), FRAMES, c.crop, c.augment, seeds(3), x[:, :, FRAMES:])
    # pinned memory: the copy to the GPU goes on while it computes
    return x.pin_memory() if c.device == 'cuda' else x, labels, torch.tensor(windows[:, 0])

def other_time(t, last, seed):
    """A first frame in 0..last whose 16 frames are none of those from t on."""
    free = [s for s in range(last + 1) if abs(s - t) >= FRAMES]
    return free[np.random.default_rng(seed).integers(len(free))]

# --- one step
def learning_rate(step, steps, warmup, peak, low):
    """Linear warmup from `low`, then a cosine down to `low`."""
    if step < warmup:
        return low + (peak - low) * (step + 1) / warmup
    angle = math.pi * (step - warmup) / max(1, steps - 1 - warmup)
    return low + (peak - low) * 0.5 * (1 + math.cos(angle))

def train_step(model, forward, optimizer, batches, c, step, scaler=None):
    """A step of the optimizer on the next batches -> {term: mean}. forward: the network or its DDP.
    The term 'stop' is the signal that a rank has had, or 0: all see it after the same step.

    Raises FloatingPointError, before any weight moves, if the loss or a gradient is not finite;
    with a scaler (Model.scaler), such a gradient lowers its scale and the weights stay.
    """
    scaler, wide = scaler or model.scaler(), torch.float32 if c.device == 'mps' else torch.float64
    optimizer.zero_grad(set_to_none=True)
    sums, accumulate = {}, c.batch // c.micro_batch
    for micro in range(accumulate):
        x, labels, runs = next(batches)                        # loaded ahead
        x = model.normalise(x)                                 # (B, C, 32, H, W)
        labels = [labels.to(x.dtype).to(x.device)] if c.supervised else []
        needs_runs = getattr(model.network, 'needs_runs', False)
        also = {'runs': runs.to(x.device)} if needs_runs else {}

        # two seeds: what all ranks draw alike (masks, chunks), and what each draws for itself
        alike = draw_seed((c.seed, 10, step, micro))
        of_rank = draw_seed((c.seed, 9, step, micro, RANK))
        generator = torch.Generator().manual_seed(alike)
        torch.manual_seed(of_rank)                             # for dropout and the like
        if c.noise > 0:
            noise = torch.Generator(x.device).manual_seed(of_rank)
            x = x + c.noise * torch.randn(x.shape, generator=noise, device=x.device, dtype=x.dtype)

        # ranks add their gradients up in the last backward pass of the step
        last = micro == accumulate - 1
        with contextlib.nullcontext() if last or WORLD == 1 else forward.no_sync():
            with model.autocast():                             # bfloat16 or float16, if it is so
                losses = forward(x[:, :, :FRAMES], x[:, :, FRAMES:], generator, *labels, **also)
            if not isinstance(losses, dict) or 'loss' not in losses:
                raise ValueError("a network's forward returns a dict with 'loss' in it")
            scaler.scale(losses['loss'] / accumulate).backward()

        # terms of the log, in double precision where there is one
        for name, value in losses.items():
            value = torch.as_tensor(value, device=x.device).detach().to(wide)
            sums[name] = sums.get(name, 0.0) + value / accumulate

    # means over all ranks; here the CPU waits for the GPU
    means, stop = torch.stack(list(sums.values())), torch.tensor(STOP.number, device=x.device)
    if WORLD > 1:
        dist.all_reduce(means)
        dist.all_reduce(stop, dist.ReduceOp.MAX)
    terms = dict(zip(sums, (means / WORLD).tolist())) | {'stop': stop.item()}

    # what is not finite moves nothing; in float16 the scale was too high, and finds its level
    finite = [p.grad.isfinite().all() for p in model.parameters() if p.grad is not None]
    finite = torch.stack(finite).all()
    lost = not finite and (not scaler.is_enabled() or scaler.get_scale() < 1)
    if lost or not math.isfinite(terms['loss']):
        last, gradient = Path(c.out) / 'ckpt.pt', 'finite' if finite else 'not finite'
        advice = 'a lower --lr' + (', or --dtype float32' if scaler.is_enabled() else '')
        raise FloatingPointError(                              # no weight has moved
            f'the loss is {terms["loss"]} at step {step}, its gradient {gradient}; the last good '
            f'checkpoint is kept ({last if last.exists() else "none yet"}): try {advice}')
    scaler.step(optimizer)
    scaler.update()
    return terms

def optimizer_of(network, c):
    """AdamW with the paper's betas. A network's own `undecayed` says what does not decay."""
    undecayed, groups = getattr(network, 'undecayed', None), {}
    for name, parameter in network.named_parameters():
        free = undecayed is not None and undecayed(name, parameter)
        groups.setdefault(0.0 if free else c.weight_decay, []).append(parameter)

    groups = [{'params': parameters, 'weight_decay': w} for w, parameters in groups.items()]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, 0.95), fused=c.device == 'cuda')

def restore_optimizer(optimizer, scaler, state, c):
    """Load the state of both in a checkpoint, but with the fused kernel of this device."""
    for group in state['optimizer']['param_groups']:
        group['fused'] = c.device == 'cuda'
    optimizer.load_state_dict(state['optimizer'])
    if state.get('scaler'):                                    # none of a run in another dtype
        scaler.load_state_dict(state['scaler'])

# --- a ridge probe now and then
def open_probed(c, root, data):
    """{'train' | 'valid': Split} for --probe-every, on rank 0; else {}."""
    if not (c.probe_every and RANK == 0 and data.varying()):
        return {}
    valid = Split(root, data.system, 'valid', c.resolution, c.stride, c.cache_dir, c.whole,
                  os.cpu_count())
    if valid.channels != data.channels or not set(data.varying()) <= valid.scalars.keys():
        raise ValueError(f'{root}: channels or scalars of valid/ are not those of train/')
    return {'train': data, 'valid': valid}

def probe_on_valid(model, splits, c, step, steps):
    """{'probe_LABEL', 'probe_mean': error on valid} of a ridge that is chosen there, or {}.
    Its random numbers are its own: training goes on as without it."""
    if not splits or (step + 1) % c.probe_every and step + 1 < steps:
        return {}
    names, tokens_of, device = splits['train'].varying(), {}, model.mean.device
    raw = splits['train'].labels(names)                        # (runs, L)
    generator = torch.Generator(device).manual_seed(c.seed)

    model.eval()
    for name, most in ('train', 512), ('valid', 256):          # windows at even distances
        split, tokens = splits[name], []
        windows = split.windows[::math.ceil(len(split.windows) / most)]
        for few in np.array_split(windows, math.ceil(len(windows) / 8)):
            x = split.load(few, FRAMES).to(device, model.mean.dtype)     # (8, C, 16, H, W)
            noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
            z = model.embed(x + c.noise * model.std * noise)   # as in training, and in eval.py
            tokens.append(z.float().mean(1, keepdim=True).cpu())
        labels = ((split.labels(names) - raw.mean(0)) / raw.std(0))[windows[:, 0]]
        tokens_of[name] = torch.cat(tokens), torch.tensor(labels)        # (n, 1, D), (n, L)
    model.train()

    estimates, _ = probe.linear(tokens_of, scored='valid')
    errors = (estimates - tokens_of['valid'][1]).square().mean(0)        # (L,)
    named = zip([*label_names(splits['train']), 'mean'], [*errors.tolist(), errors.mean().item()])
    return {f'probe_{name}': error for name, error in named}

# --- the run
def initial_model(c, module, options, data, state):
    """The Model of a run: from its seed, with the weights of --init, or of its own `state`."""
    path, start, ours = models.checkpoint_of(c.init), state, Path(c.init).is_dir()
    if not state and c.init:
        with contextlib.suppress(ValueError):                  # of a file that somebody published
            ours = ours or 'options' in read_tensors(path)
        start = models.load_checkpoint(path) if ours else None

    # a crop has no periodic border
    size = (c.crop, c.crop) if c.crop else data.size
    inputs = models.Inputs(c.data, data.channels, (False, False) if c.crop else data.periodic, size,
                           is_paired(c), start['inputs']['published'] if start else bool(c.init))
    model = models.build_model(c.model, options, inputs, *data.normalization(c.normalize), c.seed,
                               c.dtype, label_names(data) if c.supervised else ())

    if start:                                                  # the weights of a run of train.py
        if start['inputs']['channels'] != data.channels:       # names, in order
            trained, channels = ', '.join(start['inputs']['channels']), ', '.join(data.channels)
            raise ValueError(f'{path} was trained on the channels {trained}, not {channels}')
        models.restore(model, start, c.out if state else path)
    elif c.init and not hasattr(module, 'load_published'):
        raise ValueError(f'{c.model} has no load_published: --init takes a run of it')
    elif c.init:
        module.load_published(models.unwrapped(model.network), c.init)
    return model.to(c.device)

def as_stepped(model, c):
    """A Model's network as a step calls it: on all ranks, compiled."""
    forward = model.network
    if WORLD > 1:           # unused: DISCO's other operators; what labels do not train
        unused = model.inputs.published or c.supervised
        forward = DistributedDataParallel(forward, find_unused_parameters=unused)
    return torch.compile(forward) if c.compile else forward

def config_of(state, path):
    """The Config in a checkpoint dict read from `path`. Settings that are gone are ignored."""
    try:
        return Config(**{k: v for k, v in state['config'].items() if k not in GONE})
    except TypeError:
        raise ValueError(f'{path} was written by another version of train.py') from None

def check_resumable(c, options, steps, state, checkpoint):
    """Raise ValueError if a checkpoint is of other settings, or of more steps."""
    now = asdict(c) | asdict(options)                          # older runs lack younger settings
    there = asdict(Config()) | asdict(type(options)()) | state['config'] | state['options']
    changed = [k for k in now if k not in MAY_CHANGE and now[k] != there.get(k)]
    if changed:
        changes = ', '.join(f'{k}: {there.get(k)}, now {now[k]}' for k in changed)
        raise ValueError(f'{checkpoint} has other settings ({changes}): choose another --out')
    if steps < state['steps']:
        raise ValueError(f'{checkpoint} has {state["steps"]} steps, now {steps}: only more will do')
    if steps > state['steps']:                                 # another schedule from here on
        say(f'extended from {state["steps"]} steps to {steps}: from step {state["step"]} on the '
            f"learning rate (and a teacher's momentum) is that of the longer run")
    # on another GPU
    since = f'from step {state["step"]} on'
    if c.micro_batch != there['micro_batch']:
        say(f'micro_batch {there["micro_batch"]}, now {c.micro_batch}: {since} random draws '
            f'differ, and so does a loss that compares the windows of a micro-batch, as VICReg')
    if c.dtype != there['dtype']:
        say(f'dtype {there["dtype"]}, now {c.dtype}: {since} rounding differs')

def check_data(c, root, data, data_hash, state, checkpoint):
    """Raise ValueError if a checkpoint was trained on other data."""
    # of older runs only statistics are known
    mean, std = data.normalization(c.normalize)
    labels = [data.labels([name]) for name in data.varying()]  # (runs, 1) each
    now = [*mean, *std, *map(np.mean, labels), *map(np.std, labels)]
    there = [v for k in ('mean', 'std', 'label_mean', 'label_std') for v in state[k]]
    alike = len(now) == len(there) and np.allclose(now, there, rtol=1e-3, atol=1e-6)
    if not alike or state.get('data_hash', data_hash) != data_hash:
        raise ValueError(f'{checkpoint} was trained on other files than those in {root}: point '
                         f'--data-dir at the same ones, or choose another --out')
    if 'data_hash' not in state:
        say(f'{checkpoint} is older: its data are known by mean, std and labels alone')

def ran_on(state, device):
    """The machines that a run was trained on, before it was resumed from `state`, and now."""
    before = state.get('machine', 'unknown machine').split(' and ') if state else []
    return ' and '.join(dict.fromkeys([*before, processor(device)]))

def announce(c, root, data, model, options, steps, step):
    """Say what is about to happen."""
    labels = ', '.join(label_names(data))
    say(f'{c.data}: {len(data.runs)} training runs in {root}, {len(data.channels)} channels, '
        f'labels {labels or "none: no scalar varies, so eval.py will have nothing to score"}')
    # the settings, a paragraph for each group
    groups = {}
    for settings in c, options:
        for f in fields(settings):
            if shown := as_text(getattr(settings, f.name)):
                groups.setdefault(f.metadata.get('group', 'model'), []).append(f'{f.name} {shown}')
    for group, items in groups.items():
        say(textwrap.fill(f'{group}: {", ".join(items)}', 100, subsequent_indent='  '))
    # the network, and what a step is
    in_encoder, in_all = models.count_parameters(model)
    where = torch.cuda.get_device_name() if c.device == 'cuda' else c.device.upper()
    say(f'{c.model}, preset {c.preset} on {where}, {c.dtype}; {in_encoder:,} parameters in the '
        f'encoder, {in_all - in_encoder:,} beside it')
    windows, (h, w) = len(data.windows), model.inputs.size     # of a step
    say(f'{windows} windows of {FRAMES} + {FRAMES} frames at {h} x {w}; a step takes {c.batch} of '
        f'them = {c.batch // c.micro_batch} accumulation(s) x {WORLD} rank(s) x '
        f'{c.micro_batch // WORLD}; {steps} steps = {steps * c.batch / windows:.2f} epochs')
    resuming = f', resuming at step {step}' if step else ''
    say(f'writing {c.out}/ckpt.pt and {c.out}/log.jsonl{resuming}')

@contextlib.contextmanager
def open_log(c, step):
    """log.jsonl to append to, without the steps that will be made again; rank 0's alone is kept.
    Raises ValueError if another training writes to the folder."""
    path = Path(c.out) / 'log.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(path.parent, wait=False) if RANK == 0 else contextlib.nullcontext():
        if RANK == 0 and path.exists():
            text = path.read_text(errors='replace')            # its last line may be cut short
            lines = re.findall(r'^({"step": (\d+),.*}\n)', text, re.MULTILINE)
            write_text(path, ''.join(line for line, s in lines if int(s) < step))
        try:
            with open(path if RANK == 0 else os.devnull, 'a', buffering=1) as log:        # by line
                yield log
        except OSError as e:                                   # a full disk: it has no name
            if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(f'{path} cannot be written: {e.strerror}') from None

def open_board(c, options, step):
    """The run's page at Weights & Biases, as a context: it ends with it. None without --wandb."""
    if not c.wandb or RANK > 0:
        return contextlib.nullcontext()
    import wandb
    file = Path(c.out) / 'wandb_id'                            # a resumed run goes on under its id
    if step == 0 or not file.exists():
        write_text(file, secrets.token_hex(4))
    try:
        return wandb.init(project=c.wandb, id=file.read_text(), resume='allow', dir=c.out,
                          name=Path(c.out).name, config=asdict(c) | asdict(options),
                          allow_val_change=True)
    except Exception as e:                                     # of its own kinds
        raise ValueError(f'--wandb: {e} (no network? WANDB_MODE=offline)') from None

def log_step(log, board, bar, model, step, terms, rest):
    """Write a line of the log, and show its losses. Has the embedding, (B, D, ...), collapsed?"""
    z, health, words = model.embedding, {}, []
    if RANK == 0 and z is not None:
        health = models.embedding_health(z)
        words = [f'embedding: spread {health["embedding_std"]:.2g}, '
                 f'rank {health["embedding_rank"]:.1f} of {z.shape[1]}']
        words += models.collapse(health, isinstance(model.network, models.Supervised))

    line = {'step': step} | terms | health | rest
    log.write(json.dumps(line) + '\n')
    if board and step >= board.step:                           # it has these, from before a kill
        board.log(line, step=step)

    # after the loss the embedding, as terminals are narrow; std alone would read as its spread
    losses = {name: f'{name} loss' for name in ('sim', 'std', 'cov')}
    shown = [f'{losses.get(name, name)} {value:.3f}' for name, value in terms.items()]
    bar.set_postfix_str(', '.join([shown[0], *words, *shown[1:]]), refresh=False)
    bar.update()

def save_checkpoint(c, options, data, model, optimizer, scaler, step, **reached):
    """Write all that a resume, or eval.py, needs. reached: steps, seconds and the like."""
    labels = data.labels(data.varying())                       # (runs, L)
    state = dict(
        config=asdict(c), options=asdict(options), inputs=asdict(model.inputs),
        mean=model.mean.flatten().tolist(), std=model.std.flatten().tolist(),
        labels=data.varying(), label_mean=labels.mean(0).tolist(),
        label_std=labels.std(0).tolist(), model=model.network.state_dict(),
        optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step,
        samples=step * c.batch, **reached)
    write_tensors(Path(c.out) / 'ckpt.pt', state)
    # some are kept, for a curve of errors
    if c.keep_every and step % c.keep_every == 0:
        write_tensors(Path(c.out) / f'ckpt-{step}.pt', state)

def train(c, module, options):
    """The run: data, model, optimizer, then step after step to the end of its schedule."""
    start_ranks(c.device, 'nccl' if c.device == 'cuda' else 'gloo')
    root, data = open_data(c)
    windows, out, checkpoint = len(data.windows), Path(c.out), Path(c.out) / 'ckpt.pt'
    steps = c.steps if c.steps >= 0 else math.ceil(c.epochs * windows / c.batch)
    warmup = min(steps, round(c.warmup_epochs * windows / c.batch))

    # a run that was begun goes on: rank 0 has its checkpoint
    state = models.load_checkpoint(checkpoint) if RANK == 0 and checkpoint.exists() else None
    state, data_hash = from_rank_0((state, data.data_hash() if RANK == 0 else ''))
    if state:
        check_resumable(c, options, steps, state, checkpoint)
        check_data(c, root, data, data_hash, state, checkpoint)
    step, seconds = (state['step'], state['seconds']) if state else (0, 0.0)

    # the model, its optimizer, and the windows that it may be probed on now and then
    model = initial_model(c, module, options, data, state)
    optimizer, scaler = optimizer_of(model.network, c), model.scaler()
    if state:
        restore_optimizer(optimizer, scaler, state, c)
    c.recompute = models.recompute_blocks(model.network, c.recompute, c.device)
    forward, probed = as_stepped(model, c), open_probed(c, root, data)
    announce(c, root, data, model, options, steps, step)

    # what a checkpoint needs besides its step
    save = partial(save_checkpoint, c, options, data, model, optimizer, scaler, steps=steps,
                   git=git_hash(), data_hash=data_hash, machine=ran_on(state, c.device))

    # batches are loaded ahead, while the network computes
    jobs = ((s, micro) for s in range(step, steps) for micro in range(c.batch // c.micro_batch))
    batches = prefetch(lambda job: load_batch(data, c, *job), jobs, 1 if c.device == 'cpu' else 4)
    bar = Progress(steps, 'training', 'step', initial=step, disable=RANK > 0, smoothing=0.05)
    with (open_log(c, step) as log, open_board(c, options, step) as board,
          contextlib.closing(bar), contextlib.closing(batches)):
        STOP.waits, due = True, time.monotonic() + 60 * c.save_minutes
        while step < steps:                                    # waiting for data is timed, too
            began, rate = time.perf_counter(), learning_rate(step, steps, warmup, c.lr, c.min_lr)
            for group in optimizer.param_groups:
                group['lr'] = rate
            terms = train_step(model, forward, optimizer, batches, c, step, scaler)
            stopped = terms.pop('stop')
            STOP.number = STOP.number or stopped               # perhaps another rank's
            if hasattr(model.network, 'after_step'):           # a teacher follows
                model.network.after_step((step + 1) / steps)
            took = time.perf_counter() - began
            seconds += took

            # can its tokens be probed? then its line of the log
            if step == 0:
                models.check_tokens(model, data.load(data.windows[:1], FRAMES, c.crop, seeds=[0]))
            errors = probe_on_valid(model, probed, c, step, steps)
            log_step(log, board, bar, model, step, terms, errors | dict(
                lr=rate, samples_per_s=c.batch / took, seconds=seconds, memory_gb=peak_memory()))
            step += 1

            # now and then a checkpoint
            if RANK == 0 and (stopped or step == steps or time.monotonic() > due
                              or any(step % n == 0 for n in (c.save_every, c.keep_every) if n)):
                save(step=step, seconds=seconds)
                due = time.monotonic() + 60 * c.save_minutes
            if stopped and step < steps:
                STOP.where = f' at step {step} of {steps}: the same command goes on ({checkpoint})'
                return
    if RANK == 0 and not checkpoint.exists():                  # no step was asked for
        save(step=step, seconds=seconds)
    say(f'{steps} steps in {seconds / 60:.1f} min, peak memory {peak_memory():.1f} GB. '
        f'Next: python eval.py {out}')

@script
def main(argv=None):
    train(*parse(argv, __doc__))

if __name__ == '__main__':
    main()
