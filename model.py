"""
What a model is, and a trained one from Python:

    from model import load_run
    model = load_run('out/active_matter-jepa-nano-seed0')
    tokens = model.embed(x)              # raw fields (B, C, 16, H, W) as in the files -> tokens (B, N, D)

A model is one file, NAME.py here or in baselines/, found by its name; nothing lists it. It needs

    Options                     a dataclass; its fields become flags (common.option gives them a help text)
    build(options, inputs)      -> a network, for the `Inputs` below

and the network is a module with forward(context, target, generator) -> {'loss': ..., other terms to log}, context and
target (B, C, 16, H, W) each, all randomness from `generator`; and with an `encoder` (B, C, 16, H, W) -> (B, D, ...)
or tokens (B, N, D), or else features(x) -> tokens. Everything else has a default:

    in the file     TITLE, its name in tables; PRESETS, {'paper' | 'nano' | (preset, system): {setting: value}}, of
                    Options and config.Config alike, which go before config.PRESETS; PAPER, {system: published error}
                    and PAPER_FINETUNED; PAPER_PROBE, {system: {setting of probe.attentive, or noise: value}} of the
                    paper's probe; read_latents(folder, system), published embeddings; TERMS, {term: its name in
                    pictures}; MLP_RATIO of its attentive probe;
                    ANY_SIZE, if it may be probed on larger fields than it was trained on (else these are tiled);
                    PAIRED, if context and target have to be at one place (--views paired);
                    check(options, height, width), which raises ValueError for what will not do;
                    load_published(network, path), for --init
    in the network  after_step(progress), called when the optimizer has stepped (an EMA teacher moves here), with the
                    share of the run's steps that are done; `embedding`, the last one, (B, D, ...) or tokens (B, N,
                    D), for the log (else what the encoder gave); undecayed(name, parameter), true for what AdamW's
                    weight decay leaves alone; paper_finetuning(), which makes it what the paper fine-tuned; modules of
                    a class called Block, of which --recompute keeps the inputs alone
"""
import dataclasses
import functools
import importlib
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from common import FRAMES, check_state, pick_device, read_tensors        # first: it makes torch's memory settings

import numpy as np
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from supervised import Supervised

HERE = Path(__file__).resolve().parent
DEFAULT = 'jepa'
NEEDED = {'model', 'optimizer', 'step', 'steps', 'seconds', 'samples', 'config', 'options', 'inputs', 'labels',
          'label_mean', 'label_std', 'mean', 'std'}                      # in a checkpoint


@dataclass
class Inputs:
    """What a network is built for."""
    system: str             # name of the dataset
    channels: list          # names
    periodic: tuple         # is the field it is trained on periodic along (x, y)?
    size: tuple             # (H, W) of the fields it is trained on
    paired: bool = True     # do context and target show the same place?
    published: bool = False                                              # will published weights be loaded into it?


def find_model(name):
    """The module of a model, by its name. Raises ValueError if no file defines it."""
    where = {name: HERE / f'{name}.py', 'baselines.' + name: HERE / 'baselines' / f'{name}.py'}
    found = [module for module, path in where.items() if name.isidentifier() and is_model(path)]
    if len(found) > 1:
        raise ValueError(f'two files define the model {name!r}, {name}.py and baselines/{name}.py: rename one')
    if not found:
        raise ValueError(f'unknown model {name!r}: a model is a file {name}.py, here or in baselines/, with Options '
                         f'and build(); there are {", ".join(model_names())}')
    module = importlib.import_module(found[0])
    if not dataclasses.is_dataclass(module.Options):
        raise ValueError(f'{name}.py: Options is no dataclass: write @dataclass above it')
    return module


def is_model(path):
    return path.is_file() and all(word in path.read_bytes() for word in (b'\nclass Options', b'\ndef build('))


def model_names():
    """Names of the models that have a file."""
    return sorted(path.stem for folder in (HERE, HERE / 'baselines') for path in folder.glob('*.py') if is_model(path))


def title(name):
    """A model's name in tables."""
    return getattr(find_model(name), 'TITLE', name)


class Model(nn.Module):
    """A network and what happens to raw fields before they reach it.

    mean, std: of each channel, (C,). `embed` and `features` take raw fields and return tokens.
    """

    def __init__(self, network, inputs, mean, std, any_size=False, dtype='float32'):
        super().__init__()
        self.network = network.double() if dtype == 'float64' else network
        self.inputs, self.any_size, self.mixed = inputs, any_size, dtype == 'bfloat16'
        real = torch.float64 if dtype == 'float64' else torch.float32
        for name, values in ('mean', mean), ('std', std):
            self.register_buffer(name, torch.as_tensor(values, dtype=real).view(-1, 1, 1, 1))
        self.seen = None                                                 # what the encoder gave last
        if isinstance(getattr(network, 'encoder', None), nn.Module):
            network.encoder.register_forward_hook(self.remember)

    def remember(self, encoder, x, z):
        own = torch.is_tensor(getattr(self.network, 'embedding', None))
        self.seen = z.detach() if self.training and torch.is_tensor(z) and not own else None

    def normalise(self, x):
        """Raw fields (B, C, T, H, W) -> what the network is given, on its device."""
        return (x.to(self.mean.device, self.mean.dtype, non_blocking=True) - self.mean) / self.std

    def autocast(self):
        """What the network computes in: bfloat16 where its run did."""
        return torch.autocast(self.mean.device.type, torch.bfloat16, enabled=self.mixed)

    @property
    def embedding(self):
        """Of the last training step, (B, D, ...), or None."""
        own = getattr(self.network, 'embedding', None)
        z = own if torch.is_tensor(own) else self.seen
        return z.transpose(1, 2) if z is not None and z.ndim == 3 else z

    def features(self, x):
        """Raw fields (B, C, 16, H, W) -> tokens (B, N, D), with gradients.

        A network bound to the size it was trained on sees larger fields as tiles of that size, evenly spaced and
        overlapping if they must; N counts the tokens of all. Raises ValueError for other channels, frames or sizes.
        """
        (h, w), names = self.inputs.size, self.inputs.channels
        if x.ndim != 5 or x.shape[1] != len(names) or x.shape[2] != FRAMES or not self.any_size and (
                x.shape[3] < h or x.shape[4] < w):
            least = '' if self.any_size else f', at least {h} x {w}'
            raise ValueError(f'embed takes fields (B, {len(names)}, {FRAMES}, H, W) of the channels '
                             f'{", ".join(names)}{least}; not {tuple(x.shape)}')
        x = self.normalise(x)
        with self.autocast():
            if self.any_size:
                return self.tokens(x)
            return torch.cat([self.tokens(x[..., i:i + h, j:j + w]) for i in tile_starts(x.shape[3], h)
                              for j in tile_starts(x.shape[4], w)], 1)

    def tokens(self, x):
        """Normalised fields -> tokens (B, N, D)."""
        return tokens_of(self.network, x)

    @torch.no_grad()
    def embed(self, x):
        """Raw fields (B, C, 16, H, W) -> tokens (B, N, D), frozen."""
        return self.features(x)


def tokens_of(network, x):
    """Normalised fields (B, C, 16, H, W) -> a network's tokens (B, N, D)."""
    if hasattr(network, 'features'):
        return network.features(x)
    z = network.encoder(x)
    return z if z.ndim == 3 else z.flatten(2).transpose(1, 2) if z.ndim > 3 else z[:, None]


def recompute_blocks(network):
    """Have every `Block` of a network keep no more than its input for the backward pass, which computes it again.

    Raises ValueError if there is none.
    """
    blocks = [module for module in network.modules() if type(module).__name__ == 'Block']
    if not blocks:
        raise ValueError('--recompute is for networks made of blocks, which this one is not')
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def embedding_health(z):
    """Mean std of the channels and effective rank of embeddings (B, D, ...): a collapse shows in either.

    The effective rank is exp of the entropy of the covariance's normalised spectrum (Roy, Vetterli 2007). Of 2^14 rows
    at most, evenly spaced.
    """
    z = z.movedim(1, -1).reshape(-1, z.shape[1])                         # (rows, D)
    z = z[::len(z) // 2**14 + 1].float()
    if len(z) < 2:
        return {'embedding_std': 0.0, 'embedding_rank': 1.0}
    p = torch.linalg.eigvalsh(torch.cov(z.T).cpu()).clamp(min=0)
    p = p / p.sum().clamp(min=1e-12)
    rank = torch.exp(-(p * p.clamp(min=1e-12).log()).sum()).item()
    return {'embedding_std': z.std(0).mean().item(), 'embedding_rank': rank}


def check_model(model):
    """The width of a Model's tokens. Raises ValueError unless they can be probed, at the size it is trained on."""
    x = torch.zeros(1, len(model.inputs.channels), FRAMES, *model.inputs.size)
    if not any(callable(getattr(model.network, name, None)) for name in ('features', 'encoder')):
        raise ValueError('the network needs an encoder, or features(x), to be probed')
    was = model.training
    with torch.random.fork_rng(devices=[]):
        tokens = model.eval().embed(x)
    model.train(was)
    if tokens.ndim != 3 or len(tokens) != 1 or tokens.shape[2] % 8:
        raise ValueError(f'the probes need tokens (B, N, D) with D divisible by their 8 heads; for one window this '
                         f'network gives {tuple(tokens.shape)}')
    return tokens.shape[2]


def unwrapped(network):
    """A model's own network, also if it is trained with labels."""
    return network.network if isinstance(network, Supervised) else network


def tile_starts(length, tile):
    """Where tiles start that cover a side: evenly spaced, as few as will do."""
    return np.linspace(0, length - tile, ceil(length / tile)).round().astype(int).tolist()


def build_model(name, options, inputs, mean, std, seed=0, dtype='float32', labels=0):
    """The Model `name` for these inputs, freshly initialised from its seed. labels: how many to learn, if any."""
    module = find_model(name)
    torch.manual_seed(seed)
    model = Model(module.build(options, inputs), inputs, mean, std, getattr(module, 'ANY_SIZE', False), dtype)
    if labels:
        width, network = check_model(model), model.network
        model.network = Supervised(network, functools.partial(tokens_of, network), width, labels).to(model.mean.dtype)
    return model


# ---------------------------------------------------------------------------------------------
# checkpoints

def checkpoint_of(path):
    """The checkpoint file of a run: itself, or the one in its folder."""
    return Path(path) / 'ckpt.pt' if Path(path).is_dir() else Path(path)


def is_checkpoint(path):
    """Is this a file of train.py, rather than one that somebody published?"""
    try:
        return 'options' in read_tensors(path)
    except ValueError:
        return False


def load_checkpoint(path):
    """A checkpoint dict written by train.py. Raises ValueError for any other file; never runs code from it."""
    try:
        state = read_tensors(path)
    except FileNotFoundError:
        raise ValueError(f'no checkpoint at {path}: train one with python train.py') from None
    if not NEEDED <= state.keys():
        raise ValueError(f'{path} is not a checkpoint of this version of train.py: it has no '
                         f'{", ".join(sorted(NEEDED - state.keys()))}; train again')
    channels = state['inputs']['channels']
    if not len(state['mean']) == len(state['std']) == len(channels):
        raise ValueError(f'{path} is damaged: mean and std of {len(state["mean"])} and {len(state["std"])} channels, '
                         f'not {len(channels)}')
    return state


def restore(model, state, path):
    """Load a checkpoint's weights into a Model; ValueError if they belong to another one."""
    check_state(model.network.state_dict(), state['model'], path)
    model.network.load_state_dict(state['model'])


def load_run(path, device='auto', trained=True):
    """The Model of a run of train.py, to `embed` with. path: its folder, or a checkpoint file.

    Not `trained`: as it was initialised. Raises ValueError if there is no such checkpoint.
    """
    path = checkpoint_of(path)
    return model_of(load_checkpoint(path), path, device, trained)


def model_of(state, path, device='auto', trained=True):
    """The Model in a checkpoint dict that was read from `path`."""
    module, c = find_model(state['config']['model']), state['config']
    try:
        options, inputs = module.Options(**state['options']), Inputs(**state['inputs'])
    except TypeError as e:                                               # a setting that has been renamed since
        raise ValueError(f'{path} was written by another version of {c["model"]}.py ({e})') from None
    model = build_model(c['model'], options, inputs, state['mean'], state['std'], c['seed'], c['dtype'],
                        len(state['labels']) if c.get('supervised') else 0)
    if trained:
        restore(model, state, path)
    return model.to(pick_device(device)).eval()


def settings_of(cls, resolved):
    """A dataclass of those of the resolved settings that it has."""
    return cls(**{f.name: resolved[f.name] for f in dataclasses.fields(cls) if f.name in resolved})
