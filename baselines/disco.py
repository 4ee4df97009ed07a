"""
DISCO: read the law of motion off a few frames, then integrate it.

    frames (B, C, T, H, W) --hypernetwork--> tokens --mean over time and space--> z (B, 384)
    z --generators--> theta, the weights of a small U-Net, the operator
    dy/dt = operator(y; theta),  y(0) = the last frame,  y(1) = the next one

Morel et al. 2025, arXiv 2504.19496. All that the prediction knows of the physics passes through z,
the theta latent: arXiv 2603.13227 probes it as a baseline. Published checkpoints load.
"""
import functools
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

from common import at_least, autocast, check_state, mean_and_std, option, published_state

TITLE = 'DISCO'
EULER = 'density energy pressure momentum_x momentum_y'
V2, V3 = 'velocity_x velocity_y', 'velocity_x_3d velocity_y_3d velocity_z_3d'
D, E = 'D_xx D_xy D_yx D_yy', 'E_xx E_xy E_yx E_yy'
B3 = 'magnetic_field_x magnetic_field_y magnetic_field_z'
GAS = f'pressure density temperature {V3}'
# the 29 states that DISCO tells apart; two were never used
STATES = f'{EULER} tracer {V2} concentration {D} A B - - buoyancy {V3} temperature {B3} {E}'.split()
# the datasets it was trained on: spatial axes, walls or open ends, channels in its order
WELL = {
    'euler_obc': (2, True, EULER), 'euler_pbc': (2, False, EULER),
    'active_matter': (2, False, f'concentration {V2} {D} {E}'), 'gray_scott': (2, False, 'A B'),
    'mhd': (3, False, f'density {V3} {B3}'),
    'rayleigh_benard': (2, True, f'buoyancy pressure {V2}'),
    'rayleigh_taylor': (3, True, f'density {V3}'),
    'shear_flow': (2, False, f'tracer pressure {V2}'),
    'supernova': (3, True, GAS), 'gravity_cooling': (3, True, GAS),
    'radiative_layer': (2, True, f'density pressure {V2}')}

@dataclass
class Options:
    """The defaults are those of the published model."""
    width: int = option(384, 'of the hypernetwork, and of the latent')
    depth: int = option(12, 'blocks of the hypernetwork')
    heads: int = option(6, 'of the hypernetwork')
    patch: int = option(16, 'side of a patch: 8 or 16')
    layer_scale: float = option(1e-6, 'initial layer scale of the blocks')
    operator_width: int = option(8, 'of the operator, at full resolution')
    generator_width: int = option(768, "of the layers that make the operator's weights")
    max_steps: int = option(32, '1/max_steps is the shortest step of the integration')

PRESETS = {'paper': dict(noise=0.0), 'nano': dict(                 # it z-scores its inputs itself
    normalize=False, width=32, depth=2, heads=2, patch=8, operator_width=4, generator_width=16,
    max_steps=2, layer_scale=0.1, batch=16, micro_batch=16, steps=4800, lr=3e-3)}

def check(o, inputs):
    """Raise ValueError if the options, or what the network will see, do not fit."""
    if not inputs.paired:
        raise ValueError(f'{TITLE} predicts the next frame at its place: it takes --views paired')
    if o.patch not in (8, 16) or min(o.width, o.heads) < 1 or o.width % (8 * o.heads):
        raise ValueError('DISCO needs --patch 8 or 16, and a --width divisible by 8 x --heads')
    at_least(o, 1, 'operator_width', 'generator_width', 'max_steps')

    H, W = inputs.size
    if H % 16 or W % 16 or min(H, W) < 32:
        raise ValueError(f'DISCO needs sides 32, 48, .., not {H} x {W}: set --resolution or --crop')
    if inputs.channels is not None:
        ordered_channels(inputs.system, inputs.channels)

def build(o, inputs):
    return DISCO(inputs.system, inputs.channels, inputs.published, o.width, o.depth, o.heads,
                 o.patch, o.generator_width, o.operator_width, o.layer_scale, o.max_steps)

def ordered_channels(dataset, channels):
    """A dataset's channels in DISCO's order. Raises ValueError if DISCO has others, or not it."""
    if dataset not in WELL:
        raise ValueError(f'DISCO has datasets {", ".join(WELL)}; not {dataset!r}')
    ordered = WELL[dataset][2].replace('_3d', '').split()
    if sorted(channels or ordered) != sorted(ordered):
        raise ValueError(f'in DISCO {dataset} has {", ".join(ordered)}, not {", ".join(channels)}')
    return ordered

def standardize(x, first):
    """z-scores of x over the axes from `first` on; the mean and the std that undo them."""
    mean, std = mean_and_std(x, tuple(range(first, x.ndim)))
    return (x - mean) / (std + 1e-7), mean, std + 1e-7

# --- hypernetwork: frames -> tokens
class GroupNorm(nn.GroupNorm):
    """Group norm with a scale and no bias. The official code calls it RMS."""
    def __init__(self, groups, dim):
        super().__init__(groups, dim)
        self.bias = None

class RelativeBias(nn.Module):
    """T5's bias by position, (1, heads, n, n): 16 bins of distance, and 16 more for keys ahead."""
    def __init__(self, heads):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(32, heads)
        edges = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 23, 27])     # log from 8
        self.register_buffer('edges', edges, persistent=False)

    def forward(self, n):
        i = torch.arange(n, device=self.edges.device)
        ahead = i - i[:, None]                                     # (n, n): key minus query
        bins = torch.bucketize(ahead.abs(), self.edges, right=True) + 16 * (ahead > 0)
        return self.relative_attention_bias(bins).permute(2, 0, 1)[None]

def attend(qkv, axis, heads, qnorm, knorm, bias):
    """Attention along one axis: qkv (B, T, 3C, H, W, D), head by head -> (B, T, C, H, W, D)."""
    # the other axes join the batch, then leave it
    x = qkv.unflatten(2, (heads, 3, -1))                           # (B, T, heads, 3, C/heads, ..)
    x = x.movedim((3, 2, axis if axis < 2 else axis + 2, 4), (0, -3, -2, -1))
    q, k, v = x.flatten(1, -4)                                     # (B*.., heads, n, C/heads) each
    y = F.scaled_dot_product_attention(qnorm(q), knorm(k), v, attn_mask=bias(q.shape[-2]))
    y = y.view(x.shape[1:])                                        # (B, .., heads, n, C/heads)
    return y.movedim((-3, -1, -2), (2, 3, axis if axis < 2 else axis + 1)).flatten(2, 3)

class TemporalAttention(nn.Module):
    """Every position attends over time. (B, T, C, H, W, D) -> same shape."""
    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.heads = heads
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))
        self.norm1, self.norm2 = GroupNorm(2 * heads, dim), GroupNorm(2 * heads, dim)
        self.input_head, self.output_head = nn.Conv3d(dim, 3 * dim, 1), nn.Conv3d(dim, dim, 1)
        self.qnorm, self.knorm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)
        self.rel_pos_bias = RelativeBias(heads)

    def forward(self, x):
        B, T, C, H, W, D = x.shape
        y = self.input_head(self.norm1(x.flatten(0, 1))).unflatten(0, (B, T))
        y = attend(y, 1, self.heads, self.qnorm, self.knorm, self.rel_pos_bias)
        y = self.output_head(self.norm2(y.flatten(0, 1))).unflatten(0, (B, T))
        return x + self.gamma.view(C, 1, 1, 1) * y

class SpatialAttention(nn.Module):
    """Frames attend along their first `axes` axes, averaged; an MLP. (B, T, C, H, W, D) -> same."""
    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.heads = heads
        self.gamma_att = nn.Parameter(layer_scale * torch.ones(dim))
        self.gamma_mlp = nn.Parameter(layer_scale * torch.ones(dim))
        self.norm1, self.norm2, self.mlp_norm = (GroupNorm(2 * heads, dim) for _ in range(3))
        # lists: one for each axis
        self.input_heads = nn.ModuleList([nn.Conv3d(dim, 3 * dim, 1) for _ in range(3)])
        self.output_head = nn.Conv3d(dim, dim, 1)
        self.qnorms = nn.ModuleList([nn.LayerNorm(dim // heads) for _ in range(3)])
        self.knorms = nn.ModuleList([nn.LayerNorm(dim // heads) for _ in range(3)])
        self.rel_pos_biases = nn.ModuleList([RelativeBias(heads) for _ in range(3)])
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, axes):
        B, T, C, H, W, D = x.shape
        x = x.flatten(0, 1)                                        # (B*T, C, H, W, D)
        # each axis has weights of its own; take their mean
        y, total = self.norm1(x), 0
        for a in range(axes):
            qkv = self.input_heads[a](y).unflatten(0, (B, T))      # (B, T, 3C, H, W, D)
            total = total + attend(qkv, 3 + a, self.heads, self.qnorms[a], self.knorms[a],
                                   self.rel_pos_biases[a])
        y = total.flatten(0, 1) / (3 if D > 1 else 2)
        x = x + self.gamma_att.view(C, 1, 1, 1) * self.output_head(self.norm2(y))

        y = self.mlp(x.movedim(1, -1)).movedim(-1, 1)
        x = x + self.gamma_mlp.view(C, 1, 1, 1) * self.mlp_norm(y)
        return x.unflatten(0, (B, T))

class Hypernetwork(nn.Module):
    """Frames (B, C, T, *space) of some states -> tokens (B, T, dim, *space / patch), three axes."""
    def __init__(self, axes, dim, blocks, heads, patch, layer_scale):
        super().__init__()
        self.dim = dim
        self.adapter = nn.ModuleDict({'linear': nn.Linear(len(STATES), dim // 4)})
        # a convolutional encoder for each number of axes
        self.encoder, c, k = nn.ModuleDict(), dim // 4, patch // 4
        for a in axes:
            conv = nn.Conv2d if a == 2 else nn.Conv3d
            self.encoder[str(a)] = nn.ModuleDict({'encoder': nn.Sequential(
                conv(c, c, k, stride=k, bias=False), GroupNorm(2 * heads, c), nn.GELU(),
                conv(c, c, 2, stride=2, bias=False), GroupNorm(2 * heads, c), nn.GELU(),
                conv(c, dim, 2, stride=2, bias=False), GroupNorm(2 * heads, dim))})
        # the blocks serve 2-D and 3-D; without 3-D data the first sees no third axis
        self.blocks = nn.ModuleList([nn.ModuleDict({
            'temporal': TemporalAttention(dim, heads, layer_scale),
            'spatial': SpatialAttention(dim, heads, layer_scale)}) for _ in range(blocks)])
        if 3 not in axes:
            for name in 'input_heads', 'qnorms', 'knorms', 'rel_pos_biases':
                getattr(self.blocks[0]['spatial'], name)[2].requires_grad_(False)

    def forward(self, x, states):
        B, C, T, *space = x.shape
        x = standardize(x, 2)[0].transpose(1, 2).flatten(0, 1)     # (B*T, C, *space)
        # the adapter and the first convolution of the encoder are both linear: apply them as one
        encoder, adapter = self.encoder[str(len(space))]['encoder'], self.adapter['linear']
        first, scale = encoder[0].weight, (len(STATES) / C)**0.5
        weight = torch.einsum('om...,mc->oc...', first, scale * adapter.weight[:, states])
        bias = first.flatten(2).sum(2) @ (scale * adapter.bias)
        convolve = F.conv2d if len(space) == 2 else F.conv3d
        x = encoder[1:](convolve(x, weight, bias, stride=encoder[0].stride))
        x = x.view(B, T, *x.shape[1:], *[1] * (3 - len(space)))    # (B, T, dim, h, w, d)
        # after its first block the official code takes 2-D data for 3-D of depth one: it adds the
        # attention along that axis too, and still divides by two
        for i, block in enumerate(self.blocks):
            x = block['spatial'](block['temporal'](x), axes=3 if i else len(space))
        return x

# --- operator: a U-Net whose weights are generated
class Operator(nn.Module):
    """The U-Net in dy/dt = operator(y; theta): (B, channels, *space) -> same; 16 divides *space."""
    def __init__(self, axes, walls, channels, width):
        super().__init__()
        self.walls = walls
        w = [width * 2**i for i in range(6)]                       # of the levels, the bottleneck
        transposed = nn.ConvTranspose2d if axes == 2 else nn.ConvTranspose3d

        def conv(c_in, c_out, kernel, **settings):
            layer = nn.Conv2d if axes == 2 else nn.Conv3d
            return layer(c_in, c_out, kernel, padding=(kernel - 1) // 2, bias=False,
                         padding_mode='reflect' if walls else 'circular', **settings)

        def norm(c):
            return nn.GroupNorm(4, c, affine=False)

        # each level on the way down is half as large and twice as wide
        self.adapter_in = conv(channels + walls, w[0], 3)
        self.conv_in = nn.Sequential(conv(w[0], w[0], 3), norm(w[0]), nn.GELU())
        self.downs = nn.ModuleList([nn.Sequential(OrderedDict(
            conv1=conv(a, b, 2, stride=2), norm1=norm(b), gelu1=nn.GELU(),
            conv2=conv(b, b, 3, groups=b), norm2=norm(b), gelu2=nn.GELU()))
            for a, b in zip(w[:4], w[1:5])])
        # each level on the way up is joined to its like
        self.ups = nn.ModuleList([nn.ModuleDict(OrderedDict(
            up=transposed(b, a, 2, stride=2, bias=False),
            conv=conv(b, a, 3, groups=a), norm=norm(a))) for a, b in zip(w[3::-1], w[4::-1])])
        self.bottleneck = nn.Sequential(conv(w[4], w[5], 1), norm(w[5]), nn.GELU(),
                                        conv(w[5], w[4], 1))
        self.convs_out = nn.Sequential(conv(w[0], w[0], 3), norm(w[0]), nn.GELU())
        self.adapter_out = conv(w[0], channels, 3)

    def forward(self, y):
        if self.walls:                                             # mark all edges in a channel
            inside = torch.zeros_like(y[:, :1])[(..., *[slice(1, -1)] * (y.ndim - 2))]
            edges = F.pad(inside, (1, 1) * (y.ndim - 2), value=1.0)
            y = torch.cat([y, edges], 1)                           # (B, channels + 1, H, W)
        # down, keeping each level, and up again
        levels = [self.conv_in(self.adapter_in(y))]                # (B, width, H, W)
        for down in self.downs:
            levels.append(down(levels[-1]))
        x = levels.pop()                                           # (B, 16 width, H/16, W/16)

        x = x + self.bottleneck(x)
        for up in self.ups:
            x = torch.cat([up['up'](x), levels.pop()], 1)
            x = F.gelu(up['norm'](up['conv'](x)))
        return self.adapter_out(self.convs_out(x))                 # (B, channels, H, W)

    def sizes(self):
        """[(what a weight's shape depends on, its number of entries)], in the order of theta."""
        kinds = {name: 'adim' if p.shape[-1] == 1 else 'dim' for name, p in self.named_parameters()}
        kinds |= {'adapter_in.weight': 'channels', 'adapter_out.weight': 'channels'}
        return [(kinds[name], p.numel()) for name, p in self.named_parameters()]

    def bounds(self):
        """For each entry of theta the largest initial weight of its tensor: its scale."""
        return torch.cat([p.abs().max().expand(p.numel()) for p in self.parameters()])

# --- integration
def bosh3(f, y, max_steps=32, rtol=5e-6, atol=1e-9):
    """y(1) of dy/dt = f(t, y) from y(0) = y: Bogacki and Shampine's Runge-Kutta of order 3 (1989).

    One step for the whole batch follows the error estimate, but is never under 1/max_steps.
    """
    def rms(v):
        return v.pow(2).mean().sqrt().item()

    def step(t, h, y, k1):                                         # end, two slopes, its error
        k2 = f(t + h / 2, y + h / 2 * k1)
        k3 = f(t + h * 3 / 4, y + h * 3 / 4 * k2)
        end = y + h * (2 / 9 * k1 + 1 / 3 * k2 + 4 / 9 * k3)
        k4 = f(t + h, end)                                         # k1 of the next step
        return end, k2, k4, h * (-5 / 72 * k1 + 1 / 12 * k2 + 1 / 9 * k3 - 1 / 8 * k4)

    # if there are many steps, memory keeps the start of each, and the backward pass repeats it
    if max_steps > 4:
        step = functools.partial(checkpoint, step, use_reentrant=False, preserve_rng_state=False)
    # length of the first step: Hairer, Norsett, Wanner, II.4
    k1 = f(0.0, y)
    with torch.no_grad():
        scale = atol + rtol * y.abs()
        d0, d1 = rms(y / scale), rms(k1 / scale)
        h = 0.01 * d0 / d1 if min(d0, d1) >= 1e-5 and d1 < math.inf else 1e-6
        d2 = rms((f(h, y + h * k1) - k1) / scale) / h
    longer = max(1e-6, 1e-3 * h) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2))**(1 / 3)

    t, h = 0.0, max(1 / max_steps, min(100 * h, longer))
    while True:
        end, k2, k4, error = step(t, h, y, k1)
        with torch.no_grad():
            ratio = rms(error / (atol + rtol * torch.maximum(y.abs(), end.abs())))
        # accept the step if its error is allowed, or if no shorter step is
        if ratio <= 1 or h <= 1 / max_steps:
            if t + h >= 1:
                break
            t, y, k1 = t + h, end, k4
        # the error grows as the third power of the step
        wished = 0.9 / ratio**(1 / 3) if ratio else 10.0
        h = max(1 / max_steps, h * min(10.0, max(1.0 if ratio < 1 else 0.2, wished)))
    # the last step goes past t = 1: a cubic through its ends and slopes, corrected at the midpoint
    def cubic(s):
        return (y + s * h * k1 + s**2 * (3 * (end - y) - h * (2 * k1 + k4))
                + s**3 * (2 * (y - end) + h * (k1 + k4)))
    s = (1 - t) / h
    return cubic(s) + 16 * s**2 * (1 - s)**2 * (y + h / 2 * k2 - cubic(0.5))

# --- the model
class DISCO(nn.Module):
    """The whole model: context, target (B, C, T, H, W) -> {'loss'}, of the target's first frame.

    `channels`: those of WELL[dataset] in any order. Published weights have the operators of all
    datasets and the default sizes. Raises ValueError for names and sizes that do not fit.
    """
    def __init__(self, dataset, channels=None, all_datasets=False, dim=384, blocks=12, heads=6,
                 patch=16, hidden=768, width=8, layer_scale=1e-6, max_steps=32):
        super().__init__()
        ordered = ordered_channels(dataset, channels)
        if patch not in (8, 16):
            raise ValueError(f'DISCO for {dataset} has patches of 8 or 16, not {patch}')
        # the input's channels in DISCO's order, and back
        self.dataset, self.max_steps = dataset, max_steps
        channels = list(channels or ordered)
        self.order = [channels.index(c) for c in ordered]
        self.back = [ordered.index(c) for c in channels]
        self.states = [STATES.index(WELL[dataset][2].split()[i]) for i in self.back]
        # the operators' own weights only give shapes and a scale: they never run with them
        axes = {n: WELL[n][0] for n in (WELL if all_datasets else [dataset])}
        self.axes = axes[dataset]
        self.hpnn = Hypernetwork(sorted(set(axes.values())), dim, blocks, heads, patch, layer_scale)
        self.opnns = nn.ModuleDict({
            n: Operator(*WELL[n][:2], len(WELL[n][2].split()), width) for n in axes})
        self.opnns.requires_grad_(False)

        def generator(n, kind):
            return nn.Linear(hidden, sum(size for k, size in self.opnns[n].sizes() if k == kind))

        # weights whose shape depends on the axes, or on the channels, have their own generators
        self.param_gen_common = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.param_gen_adim = generator(dataset, 'adim')
        self.param_gen_dim = nn.ModuleDict({str(a): generator(n, 'dim') for n, a in axes.items()})
        self.param_gen_channels = nn.ModuleDict({n: generator(n, 'channels') for n in axes})
        for n, operator in self.opnns.items():
            self.register_buffer(f'theta_norm_{n}', operator.bounds())

    @property
    def encoder(self):
        return self.hpnn

    def features(self, x):
        """The theta latent as one token: (B, C, T, H, W) -> (B, 1, dim)."""
        B, C, T, *space = x.shape
        if C != len(self.states) or len(space) != self.axes or any(n % 16 or n < 32 for n in space):
            raise ValueError(f'DISCO needs {len(self.states)} channels in {self.axes} dimensions '
                             f'of 32, 48, 64, ..; not {C} of {" x ".join(map(str, space))}')
        x = standardize(x, 2)[0]                                   # the hypernetwork does it again
        return self.hpnn(x, self.states).mean((1, 3, 4, 5))[:, None]

    def theta(self, z):
        """Latent (B, dim) -> the operator's weights (B, n), each within twice its bound."""
        # a generator gives all tensors of its kind; put them in the operator's order
        h, sizes, parts = self.param_gen_common(z), self.opnns[self.dataset].sizes(), {}
        generators = {'channels': self.param_gen_channels[self.dataset],
                      'adim': self.param_gen_adim, 'dim': self.param_gen_dim[str(self.axes)]}
        for kind, generator in generators.items():
            parts[kind] = iter(generator(h).split([size for k, size in sizes if k == kind], 1))
        theta = torch.cat([next(parts[kind]) for kind, _ in sizes], 1)
        # bound them softly
        bound = getattr(self, f'theta_norm_{self.dataset}')
        return 2 * bound * torch.tanh(theta / (2 * bound.pow(2).mean().sqrt()))

    def derivative(self, y, theta):
        """dy/dt of y (B, C, H, W), standardised, in DISCO's order, each sample by its own theta."""
        operator = self.opnns[self.dataset]
        parts = theta.split([size for _, size in operator.sizes()], 1)
        weights = {name: part.view(-1, *p.shape)
                   for (name, p), part in zip(operator.named_parameters(), parts)}
        return vmap(lambda w, y: functional_call(operator, w, y[None])[0])(weights, y)

    def next_frame(self, x):
        """x (B, C, T, H, W) -> next frame (B, C, H, W), z-scored by x's mean and std; these; z."""
        z = self.features(x)[:, 0].to(x.dtype)
        # the integration has too many steps for half precision
        with autocast(x.device):
            theta = self.theta(z)
            x, mean, std = standardize(x, 2)                       # by sample and channel
            y, last_mean, last_std = standardize(x[:, self.order, -1], 2)
            y = bosh3(lambda t, y: self.derivative(y, theta), y, self.max_steps)
            y = y * last_std + last_mean
        return y[:, self.back], mean[:, :, 0], std[:, :, 0], z

    def predict(self, x):
        """The frame after x (B, C, T, H, W): (B, C, H, W)."""
        y, mean, std, _ = self.next_frame(x)
        return y * std + mean

    def forward(self, context, target, generator=None):
        """Squared error of the next frame over its variance, per sample and channel, averaged."""
        # DISCO's own loss is a Gaussian likelihood with that variance: half of this, and a constant
        y, mean, std, z = self.next_frame(context)
        self.embedding = z.detach()[:, :, None, None]
        frame = (target[:, :, 0] - mean) / std                     # (B, C, H, W)
        variance = frame.flatten(2).var(2) + 1e-7                  # (B, C)
        return {'loss': ((y - frame).pow(2).flatten(2).mean(2) / variance).mean()}

def load_published(model, path):
    """Load a DISCO training checkpoint. Raises ValueError, naming the key, if it does not fit."""
    state, expected = published_state(path, 'model_state'), model.state_dict()
    # older ones were made for 2-D: their weights lack the last, singleton axis
    for k in expected.keys() & state.keys():
        if (*state[k].shape, 1) == expected[k].shape:
            state[k] = state[k][..., None]
    check_state(expected, state, path)
    model.load_state_dict(state)
