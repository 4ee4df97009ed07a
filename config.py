"""
The settings of a training run: what they are, their defaults, and what is refused.

A setting's value is the flag's if it is given, else the preset's (of the model for this system, of the model, of
PRESETS below), else the system's protocol, else the default. train.py says how a run uses them.
"""
import dataclasses
import functools
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

from common import WORLD, Parser, at_least, data_folder, option, pick_device

import torch

import model as models
import systems
from cache import KINDS
from data import find_dataset
from systems import System
from well import look_into

of_data, of_optimisation, of_machine = (functools.partial(option, group=g) for g in ('data', 'optimisation', 'machine'))


@dataclass
class Config:
    """What a run depends on besides its model's Options; both are saved in its checkpoint.

    What stands as `System` here comes from the system, if neither preset nor flag sets it.
    """
    data: str = of_data(systems.DEFAULT, 'system: ' + ', '.join(systems.system_names()) + ', or another of The Well\'s')
    model: str = option(models.DEFAULT, ', '.join(models.model_names()))
    preset: str = option('auto', 'nano, paper or smoke; auto: nano on data simulated by the nano preset, else paper')
    data_dir: str = of_data('', "folder of datasets in The Well's layout, or its URL, like hf://datasets/polymathic-ai "
                               '(default: $THE_WELL_DATA_DIR, else data)')
    cache: str = of_data('float32', 'copy of the preprocessed data on disk, for fast reading: float32; int16, half the '
                                    "size, slightly rounded; none, no copy: The Well's files are read, slower")
    cache_dir: str = of_data('', 'where preprocessed trajectories are kept (default: <data dir>/<system>/cache; '
                                'of a URL, data/cache)')
    resolution: int = of_data(System.resolution, 'side the fields are resized to; 0 keeps the file\'s')
    whole: bool = of_data(False, 'keep the whole domain; else the part of it that the paper uses')
    crop: int = of_data(0, 'side of the random square cut from each training window; 0: the whole field')
    stride: int = of_data(System.stride, 'frames between window starts')
    noise: float = of_data(System.noise, 'std of Gaussian noise added to the inputs')
    normalize: bool = of_data(False, 'z-score with the training split\'s mean and std; the components of a vector '
                                    'share one std')
    augment: bool = of_data(False, 'random shifts and mirrorings under which the equations are the same')
    views: str = of_data('paired', 'what the target is: paired, the next 16 frames at the same place; unpaired, those '
                                   'at another place, shifted and turned on its own, so that only what the whole run '
                                   'shares can be predicted; other-time, that and any other 16 frames of the run')
    init: str = option('', 'weights to start from: the folder of another run, or a published file')
    supervised: bool = option(False, 'train the encoder with the labels, for comparison (supervised.py)', bare=True)
    label_fraction: float = option(1.0, 'share of the training runs that --supervised learns from: whole runs, spread '
                                        'over the labels (data.spread_runs)')
    batch: int = of_optimisation(256, 'windows per optimizer step, over all ranks and accumulation steps')
    micro_batch: int = of_optimisation(0, 'windows per forward pass, over all ranks; 0: 8 for each rank')
    epochs: float = of_optimisation(System.epochs, 'passes over the training windows; counts if --steps does not')
    steps: int = of_optimisation(-1, 'optimizer steps; -1: as many as --epochs needs; 0: save the initial weights')
    lr: float = of_optimisation(System.lr, 'peak learning rate')
    min_lr: float = of_optimisation(1e-6, 'learning rate at the end')
    warmup_epochs: float = of_optimisation(0.0, 'linear warmup, in epochs')
    weight_decay: float = of_optimisation(0.05, 'AdamW weight decay')
    seed: int = of_optimisation(0, 'seed of everything random in training; also of the data, if they are simulated now')
    out: str = of_machine('', 'folder of checkpoint and log (default: out/<system>-<model>-<preset>-seed<seed>)')
    device: str = of_machine('auto', 'cuda, cpu, or auto')
    dtype: str = of_machine('auto', 'float32, bfloat16 (autocast), float64, or auto: bfloat16 on a GPU that has it')
    save_every: int = of_machine(100, 'steps between checkpoints')
    recompute: bool = of_machine(False, 'gradient checkpointing: blocks keep their input alone, and are computed again '
                                        'in the backward pass. Less memory, a third slower', bare=True)
    compile: bool = of_machine(False, 'torch.compile the network: minutes first, then, on CPU, steps in half the time '
                                      'for some models, in all of it for others (NOTES.md)', bare=True)
    log_every: int = of_machine(1, 'steps between reading losses from the GPU, which waits for it; the log has all '
                                   'steps, but the rank of the embedding only in the last of them')


PRESETS = {                                                              # a model's own go before these
    'paper': dict(dtype='float32', log_every=10),                        # the official trainer has no autocast
    'nano': dict(dtype='float32', resolution=0, whole=True, crop=32, noise=0.0, normalize=True, augment=True, batch=32,
                 micro_batch=32, steps=2400, lr=1e-3, warmup_epochs=0.5)}
VIEWS = 'paired', 'unpaired', 'other-time'
SMOKE = dict(steps=20, batch=16, micro_batch=16)                         # on top of nano
MAY_CHANGE = ('data_dir', 'cache_dir', 'out', 'device', 'save_every', 'log_every', 'recompute', 'compile', 'steps',
              'epochs')                                                  # when a run goes on

def parse(argv, description):
    """(Config, module of the model, its Options) from flags; nothing is simulated or cached yet.

    Raises ValueError for what would fail later. argv None: the command line.
    """
    first = Parser('', add_help=False)
    first.add_dataclass(Config)
    known = Config(**vars(first.parse_known_args(argv)[0]))
    module = models.find_model(known.model)
    root, system, simulated = find_dataset(known.data, data_folder(known.data_dir))
    files = sorted(root.glob('data/*/*.h*5'))                            # none: it will be simulated
    simulated = simulated or ('' if files else 'nano')
    preset = known.preset
    if preset == 'auto':
        preset = simulated if simulated in ('nano', 'smoke') else 'paper'
    defaults = {f.name: f.default for cls in (Config, module.Options) for f in dataclasses.fields(cls)}
    defaults |= system.protocol() | preset_of(module, preset, known.data)

    parser = Parser(f'{description}\nDefaults below: {known.model}, preset {preset}, on {known.data}.')
    parser.add_dataclass(Config, defaults)
    parser.add_dataclass(module.Options, defaults)
    flags = vars(parser.parse_args(argv))
    if 'epochs' in flags and 'steps' not in flags:                       # which a preset may have set
        flags['steps'] = -1
    resolved = defaults | flags | dict(preset=preset)
    c, options = (models.settings_of(cls, resolved) for cls in (Config, module.Options))
    finish(c)
    channels, grid = look_into(files[0]) if files else (None, system.preset(simulated).grid)
    crop, periodic = system.part(c.whole)
    part = [round(b * n) - round(a * n) for n, (a, b) in zip(grid, crop)]
    size = [c.resolution] * 2 if c.resolution else part
    check_size(c, module, options, size)
    if channels:                                                         # can it be built? before hours of caching
        module.build(options, models.Inputs(c.data, channels, periodic, tuple(size), c.views == 'paired'))
    return c, module, options


def preset_of(module, preset, system):
    """The settings of a model's preset on a system."""
    own = getattr(module, 'PRESETS', {})
    get = lambda name: PRESETS.get(name, {}) | own.get(name, {}) | own.get((name, system), {})
    names = [name for name in {**PRESETS, **own} if isinstance(name, str)]
    if preset not in ('smoke', *names):
        raise ValueError(f'unknown preset {preset!r}: choose from auto, smoke, {", ".join(names)}')
    settings = get('nano') | SMOKE if preset == 'smoke' else get(preset)
    unknown = settings.keys() - {f.name for cls in (Config, module.Options) for f in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f'{module.__name__}.py: PRESETS sets {", ".join(sorted(unknown))}, which is no setting')
    return settings


def finish(c):
    """Fill in what depends on the rest of a Config, and raise ValueError for what will not do."""
    at_least(c, 1, 'stride', 'batch', 'save_every', 'log_every')
    at_least(c, 0, 'resolution', 'crop', 'micro_batch', 'noise', 'min_lr', 'warmup_epochs', 'weight_decay', 'seed')
    at_least(c, -1, 'steps')
    for name in 'lr', 'epochs':
        if getattr(c, name) <= 0:
            raise ValueError(f'--{name} must be more than 0, not {getattr(c, name)}')
    if not 0 < c.label_fraction <= 1 or c.label_fraction < 1 and not c.supervised:
        raise ValueError(f'--label-fraction is more than 0 and at most 1, and for --supervised: not {c.label_fraction}')
    if c.seed >= 2**32:
        raise ValueError(f'--seed must be less than 2**32, not {c.seed}')
    c.data_dir = str(data_folder(c.data_dir))
    labels = f'-{c.label_fraction:g}' * (c.label_fraction < 1)
    c.out = c.out or f'out/{c.data}-{c.model}-{c.preset}{"-supervised" * c.supervised}{labels}-seed{c.seed}'
    c.device = pick_device(c.device)
    if c.cache not in KINDS:
        raise ValueError(f'unknown cache {c.cache!r}: choose from {", ".join(KINDS)}')
    if c.views not in VIEWS:
        raise ValueError(f'unknown views {c.views!r}: choose from {", ".join(VIEWS)}')
    if c.dtype == 'auto':
        c.dtype = 'bfloat16' if c.device == 'cuda' and torch.cuda.is_bf16_supported() else 'float32'
    if c.dtype not in ('float32', 'bfloat16', 'float64'):
        raise ValueError(f'unknown dtype {c.dtype!r}: choose from float32, bfloat16, float64')
    c.micro_batch = min(c.micro_batch or 8 * WORLD, c.batch)
    if c.batch % c.micro_batch:
        raise ValueError(f'batch {c.batch} is not a multiple of micro_batch {c.micro_batch}')
    if c.micro_batch % WORLD:
        raise ValueError(f'micro_batch {c.micro_batch} does not divide over {WORLD} ranks')
    c.init = c.init and str(Path(c.init))
    if c.init and not Path(c.init).exists() and not (Path(c.out) / 'ckpt.pt').exists():
        raise ValueError(f'no file or folder {c.init} to start from')
    place = next(path for path in (Path(c.out), *Path(c.out).absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f'{place} is no folder to write to: choose another --out')


def check_size(c, module, options, shape):
    """Raise ValueError if the model cannot be trained, or probed, on fields of `shape`, or with these views."""
    if getattr(module, 'PAIRED', False) and c.views != 'paired':
        raise ValueError(f'{models.title(c.model)} predicts the next frame at its place: it takes --views paired')
    if c.crop > min(shape):
        raise ValueError(f'crop {c.crop} is larger than the fields, {shape[0]} x {shape[1]}')
    sizes = [(c.crop, c.crop)] if c.crop else []
    if not c.crop or getattr(module, 'ANY_SIZE', False):                 # what is bound to its size is probed in tiles
        sizes.append(tuple(shape))
    for size in sizes if hasattr(module, 'check') else ():
        module.check(options, *size)


def describe(c, options):
    """The settings that were resolved, by group, as text."""
    groups = {}
    for settings in c, options:
        for f in dataclasses.fields(settings):
            value = getattr(settings, f.name)
            shown = ','.join(map(str, value)) if isinstance(value, tuple) else value
            if shown != '':
                groups.setdefault(f.metadata.get('group', 'model'), []).append(f'{f.name} {shown}')
    return '\n'.join(textwrap.fill(f'{group}: {", ".join(items)}', 110, subsequent_indent='  ')
                     for group, items in groups.items())
