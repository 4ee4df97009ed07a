"""
What a model is, and a trained one from Python:

    from model import load_run
    model = load_run('out/active_matter-jepa-nano-seed0')
    tokens = model.embed(x)              # raw fields (B, C, 16, H, W) as in the files -> (B, N, D)

A model is one file: one of MODELS, or your own NAME.py beside this one. It needs

    Options                   a dataclass; its fields become flags (common.option gives them help)
    build(options, inputs)    -> a network, for the `Inputs` below

and the network is a module with forward(context, target, generator) -> {'loss': .., other terms to
log}, context and target (B, C, 16, H, W), all randomness from `generator`. It has an `encoder`
(B, C, 16, H, W) -> (B, D, ...) or tokens (B, N, D), or else features(x) -> tokens; and its forward
keeps the last embedding, detached, as self.embedding, for the log. It may have

    in the file     TITLE, for tables; PRESETS, {'paper' | 'nano' | (preset, system): {setting:
                    value}}; ANY_SIZE, true if larger fields than in training need no tiles;
                    check(options, inputs), which raises ValueError for what will not do;
                    load_published(network, path); classes called Block, for --recompute; their
                    `mlp` is what --recompute mlp repeats, on a GPU by itself if it is a method:
                    it takes and gives (B, ..., D), and mixes no places
    in the network  encoder.dim, for --supervised; encoder.head, its last layers: eval.py also reads
                    random features without them; needs_runs, true if its forward takes the
                    keyword runs (B,); after_step(share of steps done), after each step;
                    undecayed(name, parameter), true for what weight decay leaves alone
"""
import dataclasses
import functools
import importlib
import itertools
from math import ceil
from pathlib import Path

from common import FRAMES, autocast, check_state, pick_device, read_tensors
import numpy as np
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

HERE = Path(__file__).resolve().parent
DEFAULT = 'jepa'
MODELS = {'jepa': 'jepa', 'videomae': 'videomae', 'vjepa': 'variants.vjepa',
          'pixels': 'variants.pixels', 'mpp': 'baselines.mpp', 'disco': 'baselines.disco'}

# the paper's table 1, attentive probe, scored on valid; MPP is fine-tuned there, the others frozen
PUBLISHED = {
    'jepa': dict(active_matter=0.079, shear_flow=0.38, rayleigh_benard=0.13),
    'videomae': dict(active_matter=0.160, shear_flow=0.67, rayleigh_benard=0.18),
    'mpp': dict(active_matter=0.230, shear_flow=0.59, rayleigh_benard=0.08),
    'disco': dict(active_matter=0.057, shear_flow=0.13, rayleigh_benard=0.01)}
FINETUNED_IN_PAPER = 'mpp',
PAPER_PROBE = {('videomae', 'shear_flow'): dict(noise=0.1, dropout=0.1)}          # where it differs
PROBE_MLP_RATIO = {'mpp': 4.0, 'disco': 4.0}

LOWER = {'bfloat16': torch.bfloat16, 'float16': torch.float16}           # dtypes of autocast
ROWS = 2**20                # places in which an MLP is repeated at once: a clip of 16 x 224 x 224

IN_CHECKPOINT = {'model', 'optimizer', 'step', 'steps', 'seconds', 'samples', 'config', 'options',
                 'inputs', 'labels', 'label_mean', 'label_std', 'mean', 'std'}

@dataclasses.dataclass
class Inputs:
    """What a network is built for."""
    system: str             # name of the dataset
    channels: list          # names
    periodic: tuple         # is the field it is trained on periodic along (x, y)?
    size: tuple             # (H, W) of the fields it is trained on
    paired: bool = True     # do context and target show the same place?
    published: bool = False                                    # will it load published weights?

# --- files of models
def find_model(name):
    """The module of a model, by its name. Raises ValueError if no file defines it."""
    own = name.isidentifier() and (HERE / f'{name}.py').is_file()
    module = importlib.import_module(MODELS.get(name, name)) if name in MODELS or own else None
    if not hasattr(module, 'Options') or not hasattr(module, 'build'):
        raise ValueError(f'unknown model {name!r}: choose from {", ".join(MODELS)}, or write '
                         f'{name}.py with Options and build()')
    if not dataclasses.is_dataclass(module.Options):
        raise ValueError(f'{name}.py: Options is no dataclass: write @dataclass above it')
    return module

def title(name):
    """A model's name in tables."""
    return getattr(find_model(name), 'TITLE', name)

# --- the network and what is around it
class Model(nn.Module):
    """A network and what happens to raw fields before they reach it. mean, std: (C,)."""
    def __init__(self, network, inputs, mean, std, any_size=False, dtype='float32'):
        super().__init__()
        self.network = network.double() if dtype == 'float64' else network
        self.inputs, self.any_size, self.lower = inputs, any_size, LOWER.get(dtype)
        real = torch.float64 if dtype == 'float64' else torch.float32
        for name, values in ('mean', mean), ('std', std):
            self.register_buffer(name, torch.as_tensor(values, dtype=real).view(-1, 1, 1, 1))

    def normalise(self, x):
        """Raw fields (B, C, T, H, W) -> what the network is given, on its device."""
        x = x.to(self.mean.device, self.mean.dtype, non_blocking=True) - self.mean
        return x.div_(self.std)

    def autocast(self):
        """What the network computes in: bfloat16 or float16 where its run did."""
        return autocast(self.mean.device, self.lower)

    def scaler(self):
        """Multiplies a loss, so that its gradients are no zeros in float16; else does nothing."""
        return torch.amp.GradScaler(self.mean.device.type, enabled=self.lower == torch.float16)

    @property
    def embedding(self):
        """Of the last training step, (B, D, ...), or None."""
        z = getattr(self.network, 'embedding', None)
        z = z if torch.is_tensor(z) else None
        return z.transpose(1, 2) if z is not None and z.ndim == 3 else z          # of tokens

    def features(self, x):
        """Raw fields (B, C, 16, H, W) -> tokens (B, N, D), with gradients; ValueError for others.

        A network bound to the size it was trained on sees larger fields as tiles: N is of all."""
        (h, w), names = self.inputs.size, self.inputs.channels
        small = not self.any_size and x.ndim == 5 and (x.shape[3] < h or x.shape[4] < w)
        if x.ndim != 5 or x.shape[1:3] != (len(names), FRAMES) or small:
            least = '' if self.any_size else f', at least {h} x {w}'
            raise ValueError(f'embed takes fields (B, {len(names)}, {FRAMES}, H, W) of the channels'
                             f' {", ".join(names)}{least}; not {tuple(x.shape)}')

        x = self.normalise(x)
        with self.autocast():
            if self.any_size:
                return self.tokens(x)
            corners = itertools.product(tile_starts(x.shape[3], h), tile_starts(x.shape[4], w))
            return torch.cat([self.tokens(x[..., i:i + h, j:j + w]) for i, j in corners], 1)

    def tokens(self, x):
        """Normalised fields -> tokens (B, N, D)."""
        return tokens_of(self.network, x)

    @torch.no_grad()
    def embed(self, x):
        """Raw fields (B, C, 16, H, W) -> tokens (B, N, D), frozen."""
        return self.features(x)

class Supervised(nn.Module):
    """The ceiling of every table: a network's own encoder and a linear layer, from the mean token
    (D,) of context and target, trained with z-scored labels (B, L) of these names."""
    def __init__(self, network, dim, labels):
        super().__init__()
        self.network, self.head, self.labels = network, nn.Linear(dim, len(labels)), labels
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.embedding = None

    def undecayed(self, name, parameter):
        """As the network has it."""
        rule = getattr(self.network, 'undecayed', None)
        return rule is not None and rule(name.removeprefix('network.'), parameter)

    def features(self, x):
        return tokens_of(self.network, x)

    def forward(self, context, target, generator, labels):
        """-> {'loss': mean squared error of the labels, and of each}."""
        tokens = torch.cat([self.features(x) for x in (context, target)])         # (2B, N, D)
        self.embedding = tokens.detach()
        errors = (self.head(tokens.mean(1)) - labels.repeat(2, 1)).square().mean(0)        # (L,)
        by_label = zip(self.labels, errors.detach())
        return {'loss': errors.mean(), **{f'label {name}': error for name, error in by_label}}

def tokens_of(network, x):
    """Normalised fields (B, C, 16, H, W) -> a network's tokens (B, N, D)."""
    if hasattr(network, 'features'):
        return network.features(x)
    z = network.encoder(x)                                     # (B, D), tokens, or (B, D, ...)
    return z if z.ndim == 3 else z[:, None] if z.ndim == 2 else z.flatten(2).transpose(1, 2)

def check_tokens(model, x):
    """Raise ValueError unless a Model's tokens of raw windows x (B, C, 16, H, W) can be probed."""
    tokens = model.eval().embed(x)
    model.train()
    if tokens.ndim != 3 or len(tokens) != len(x) or tokens.shape[2] % 8:
        raise ValueError(f'the probes need tokens (B, N, D) with D divisible by their 8 heads; of '
                         f'{len(x)} windows this network makes {tuple(tokens.shape)}')

def tile_starts(length, tile):
    """Where tiles start that cover a side: evenly spaced, as few as will do."""
    return np.linspace(0, length - tile, ceil(length / tile)).round().astype(int).tolist()

def unwrapped(network):
    """A model's own network, also if it is trained with labels."""
    return network.network if isinstance(network, Supervised) else network

def count_parameters(model):
    """(parameters of a Model's encoder, of all of it)."""
    network = unwrapped(model.network)
    return tuple(sum(p.numel() for p in part.parameters())
                 for part in (getattr(network, 'encoder', network), model))

def recompute_blocks(network, what, device='cpu'):
    """Keep less for the backward pass, which computes parts of each `Block` again -> what it does.

    what: no; mlp, the pointwise half; blocks, all of it; auto: mlp on a GPU, where it is a method.
    Raises ValueError if the network has no such part.
    """
    blocks = [module for module in network.modules() if type(module).__name__ == 'Block']
    halves = [block for block in blocks if hasattr(block, 'mlp')]
    if what == 'auto':
        ours = any(not isinstance(block.mlp, nn.Module) for block in halves)
        what = 'mlp' if ours and device != 'cpu' else 'no'
    if not {'no': True, 'mlp': halves, 'blocks': blocks}[what]:
        raise ValueError(f'--recompute {what} is for networks made of blocks'
                         f'{" with an mlp" if what == "mlp" else ""}, which this one is not')

    # also inside a whole block that is computed again: then it, too, never has all of its MLP
    for block in halves if what != 'no' else ():
        owner, name = (block.mlp, 'forward') if isinstance(block.mlp, nn.Module) else (block, 'mlp')
        setattr(owner, name, functools.partial(checkpoint_in_parts, getattr(owner, name)))
    for block in blocks if what == 'blocks' else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return what

def checkpoint_in_parts(function, y):
    """function(y) of y (B, ..., D), pointwise: the backward pass repeats it for ROWS at a time."""
    parts = y.split(max(1, ROWS // y[0, ..., 0].numel()))
    return torch.cat([checkpoint(function, part, use_reentrant=False) for part in parts])

def embedding_health(z):
    """Mean std of the channels, effective rank of embeddings (B, D, ...): both fall in a collapse.

    And their root mean square, beside which a std is small. The rank is exp of the entropy of
    the covariance's normalised spectrum (Roy and Vetterli 2007).
    """
    z = z.movedim(1, -1).reshape(-1, z.shape[1])               # (rows, D)
    z = z[::len(z) // 2**14 + 1].float()                       # 16384 rows are enough
    z = z.repeat(2, 1) if len(z) == 1 else z                   # one row: no spread
    size = z.square().mean().cpu()
    p = torch.linalg.eigvalsh(torch.cov(z.T).cpu())
    p = p * (p > 1e-12 * z.shape[1] * size)                    # less is float32's rounding
    p = p / p.sum().clamp(min=1e-30)
    rank = torch.exp(-(p * p.clamp(min=1e-12).log()).sum()).item()
    return {'embedding_std': z.std(0).mean().item(), 'embedding_rank': rank,
            'embedding_rms': size.sqrt().item()}

def collapse(health, supervised=False):
    """[how an embedding of this health has collapsed, in words], or [].

    To a point: the spread is small beside 1, the variance term's aim, and beside the embedding's
    size, which alone may fall or grow without harm. JEPA without that term has 0.008 and 0.16 after
    50 steps, 0.002 and 0.08 after 150; random weights have 0.13 and 0.6, all our models over 0.05.
    To a line: the rank is near 1, as it may be with one label to learn.
    """
    spread, rank, size = (health[f'embedding_{k}'] for k in ('std', 'rank', 'rms'))
    if spread < 0.01 and spread <= 0.25 * size:
        return ['COLLAPSED: all embeddings are alike']
    return ['COLLAPSED: all channels say the same'] if rank < 1.1 and not supervised else []

# --- building, saving and loading
def build_model(name, options, inputs, mean, std, seed=0, dtype='float32', labels=()):
    """A fresh Model of this seed, and labels it will learn. ValueError: it cannot be probed."""
    module = find_model(name)
    torch.manual_seed(seed)
    network = module.build(options, inputs)
    model = Model(network, inputs, mean, std, getattr(module, 'ANY_SIZE', False), dtype)
    # can it be probed, and learn labels?
    if not any(callable(getattr(network, part, None)) for part in ('features', 'encoder')):
        raise ValueError('the network needs an encoder, or features(x), to be probed')
    if labels:
        width = getattr(getattr(network, 'encoder', network), 'dim', None)
        if not width:
            raise ValueError(f'--supervised needs the width of the tokens of {name}: encoder.dim')
        model.network = Supervised(network, width, labels).to(model.mean.dtype)
    return model

def checkpoint_of(path):
    """The checkpoint file of a run: itself, or the one in its folder."""
    return Path(path) / 'ckpt.pt' if Path(path).is_dir() else Path(path)

def load_checkpoint(path):
    """A checkpoint dict of train.py; never runs code from it. ValueError for any other file."""
    try:
        state = read_tensors(path)
    except FileNotFoundError:
        raise ValueError(f'no checkpoint at {path}: train one with python train.py') from None
    if not IN_CHECKPOINT <= state.keys():
        missing = ', '.join(sorted(IN_CHECKPOINT - state.keys()))
        raise ValueError(f'{path} is not a checkpoint of this version of train.py: it has no '
                         f'{missing}; train again')
    channels = state['inputs']['channels']                     # is it whole?
    if not len(state['mean']) == len(state['std']) == len(channels):
        raise ValueError(f'{path} is damaged: mean and std of {len(state["mean"])} and '
                         f'{len(state["std"])} channels, not {len(channels)}')
    return state

def restore(model, state, path):
    """Load a checkpoint's weights into a Model; ValueError if they belong to another one.
    What is trained with labels may start from a run without: only its linear layer is new."""
    network = model.network if state['config'].get('supervised') else unwrapped(model.network)
    check_state(network.state_dict(), state['model'], path)
    network.load_state_dict(state['model'])

def load_run(path, device='auto', trained=True):
    """The Model of a run (folder or checkpoint), or as initialised; ValueError if there is none."""
    path = checkpoint_of(path)
    return model_of(load_checkpoint(path), path, device, trained)

def model_of(state, path, device='auto', trained=True):
    """The Model in a checkpoint dict that was read from `path`."""
    module, c = find_model(state['config']['model']), state['config']
    try:
        options, inputs = module.Options(**state['options']), Inputs(**state['inputs'])
    except TypeError as e:                                     # a setting that is unknown here
        raise ValueError(f'{path} is of another version of {c["model"]}.py ({e})') from None
    model = build_model(c['model'], options, inputs, state['mean'], state['std'], c['seed'],
                        c['dtype'], state['labels'] if c.get('supervised') else ())
    if trained:
        restore(model, state, path)
    return model.to(pick_device(device)).eval()
