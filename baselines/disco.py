"""
DISCO (Morel et al. 2025, arXiv 2504.19496): read the law of motion off a few frames, then integrate it.

    frames (B, C, T, H, W) --hypernetwork--> tokens --mean over time and space--> z (B, 384)
    z --generators--> theta, the weights of a small U-Net, the operator
    dy/dt = operator(y; theta),  y(0) = the last frame,  y(1) = the next one

All that the prediction knows of the physics passes through z, the theta latent: arXiv 2603.13227 probes it as a
baseline. Names are the official code's, so its checkpoints load. No drop path.
"""
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

from common import at_least, check_state, mean_and_std, option, published_state, read_tensors

TITLE = 'DISCO'
PAPER = {'active_matter': 0.057, 'shear_flow': 0.13, 'rayleigh_benard': 0.01}          # table 1, attentive probe
PAIRED = True                                                            # the next frame has to be at its place
MLP_RATIO = 4.0                                                          # of its attentive probe, in the paper
# The 29 states DISCO tells apart; in 3-D the velocities are others. Two were never used.
STATES = ('density energy pressure momentum_x momentum_y tracer velocity_x velocity_y concentration D_xx D_xy D_yx '
          'D_yy A B - - buoyancy velocity_x_3d velocity_y_3d velocity_z_3d temperature magnetic_field_x '
          'magnetic_field_y magnetic_field_z E_xx E_xy E_yx E_yy').split()
EULER = 'density energy pressure momentum_x momentum_y'
GAS = 'pressure density temperature velocity_x_3d velocity_y_3d velocity_z_3d'
WELL = {                    # the datasets it was trained on: spatial axes, walls or open ends, channels in its order
    'euler_obc': (2, True, EULER),
    'euler_pbc': (2, False, EULER),
    'active_matter': (2, False, 'concentration velocity_x velocity_y D_xx D_xy D_yx D_yy E_xx E_xy E_yx E_yy'),
    'gray_scott': (2, False, 'A B'),
    'mhd': (3, False, 'density velocity_x_3d velocity_y_3d velocity_z_3d '
                      'magnetic_field_x magnetic_field_y magnetic_field_z'),
    'rayleigh_benard': (2, True, 'buoyancy pressure velocity_x velocity_y'),
    'rayleigh_taylor': (3, True, 'density velocity_x_3d velocity_y_3d velocity_z_3d'),
    'shear_flow': (2, False, 'tracer pressure velocity_x velocity_y'),
    'supernova': (3, True, GAS),
    'gravity_cooling': (3, True, GAS),
    'radiative_layer': (2, True, 'density pressure velocity_x velocity_y'),
}


@dataclass
class Options:
    """The defaults are the published model's."""
    width: int = option(384, 'of the hypernetwork, and of the latent')
    depth: int = option(12, 'blocks of the hypernetwork')
    heads: int = option(6, 'of the hypernetwork')
    patch: int = option(16, 'side of a patch: 8 or 16')
    layer_scale: float = option(1e-6, 'initial layer scale of the blocks')
    operator_width: int = option(8, 'of the operator, at full resolution')
    generator_width: int = option(768, "of the layers that make the operator's weights")
    max_steps: int = option(32, '1/max_steps is the least step of the integration')


PRESETS = {                                                              # it standardises its inputs itself
    'paper': dict(noise=0.0),
    'nano': dict(normalize=False, width=32, depth=2, heads=2, patch=8, operator_width=4, generator_width=16,
                 max_steps=2, layer_scale=0.1, batch=16, micro_batch=16, steps=4800, lr=3e-3)}


def check(options, height, width):
    """Raise ValueError if the options, or fields of this size, will not do."""
    if options.patch not in (8, 16) or min(options.width, options.heads) < 1 or options.width % (8 * options.heads):
        raise ValueError(f'DISCO needs --patch 8 or 16, not {options.patch}, and a --width divisible by 8 x --heads')
    at_least(options, 1, 'operator_width', 'generator_width', 'max_steps')
    if height % 16 or width % 16 or min(height, width) < 32:
        raise ValueError(f'DISCO needs sides of 32, 48, 64, .., not {height} x {width}: set --resolution or --crop')


def build(o, inputs):
    """Published weights serve all datasets."""
    return DISCO(inputs.system, inputs.channels, inputs.published, o.width, o.depth, o.heads, o.patch,
                 o.generator_width, o.operator_width, o.layer_scale, o.max_steps)


def standardize(x, first):
    """z-scores of x over the axes from `first` on, and the mean and standard deviation that undo them."""
    mean, std = mean_and_std(x, tuple(range(first, x.ndim)))
    return (x - mean) / (std + 1e-7), mean, std + 1e-7


# ---------------------------------------------------------------------------------------------
# hypernetwork: frames -> tokens

class GroupNorm(nn.GroupNorm):
    """Group norm with a scale and no bias. The official code calls it RMS, but it does subtract the mean."""

    def __init__(self, groups, dim):
        super().__init__(groups, dim)
        self.bias = None


class RelativeBias(nn.Module):
    """T5's bias by relative position, (1, heads, n, n): 16 bins of distance, and 16 more for keys ahead."""

    def __init__(self, heads):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(32, heads)
        edges = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 23, 27])             # log scale from 8 to 32
        self.register_buffer('edges', edges, persistent=False)

    def forward(self, n):
        i = torch.arange(n, device=self.edges.device)
        ahead = i - i[:, None]                                           # (n, n): position of key minus query
        bins = torch.bucketize(ahead.abs(), self.edges, right=True) + 16 * (ahead > 0)
        return self.relative_attention_bias(bins).permute(2, 0, 1)[None]


def attend(qkv, axis, heads, qnorm, knorm, bias):
    """Attention along one axis of tokens (B, T, C, H, W, D) from qkv (B, T, 3C, H, W, D), (q, k, v) inside heads."""
    x = qkv.unflatten(2, (heads, 3, -1))                                 # (B, T, heads, 3, C/heads, H, W, D)
    x = x.movedim((3, 2, axis if axis < 2 else axis + 2, 4), (0, -3, -2, -1))
    q, k, v = x.flatten(1, -4)                                           # (B * other axes, heads, n, C/heads) each
    y = F.scaled_dot_product_attention(qnorm(q), knorm(k), v, attn_mask=bias(q.shape[-2]))
    y = y.view(x.shape[1:])                                              # (B, other axes.., heads, n, C/heads)
    return y.movedim((-3, -1, -2), (2, 3, axis if axis < 2 else axis + 1)).flatten(2, 3)       # (B, T, C, H, W, D)


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
        y = self.input_head(self.norm1(x.flatten(0, 1))).unflatten(0, (B, T))                  # (B, T, 3C, H, W, D)
        y = attend(y, 1, self.heads, self.qnorm, self.knorm, self.rel_pos_bias)
        y = self.output_head(self.norm2(y.flatten(0, 1))).unflatten(0, (B, T))
        return x + self.gamma.view(C, 1, 1, 1) * y


class SpatialAttention(nn.Module):
    """Every frame attends along each of its first `axes` axes, averaged; then an MLP. (B, T, C, H, W, D) -> same."""

    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.heads = heads
        three = lambda layer: nn.ModuleList([layer() for _ in range(3)])
        self.gamma_att, self.gamma_mlp = (nn.Parameter(layer_scale * torch.ones(dim)) for _ in range(2))
        self.norm1, self.norm2, self.mlp_norm = (GroupNorm(2 * heads, dim) for _ in range(3))
        self.input_heads, self.output_head = three(lambda: nn.Conv3d(dim, 3 * dim, 1)), nn.Conv3d(dim, dim, 1)
        self.qnorms, self.knorms = (three(lambda: nn.LayerNorm(dim // heads)) for _ in range(2))
        self.rel_pos_biases = three(lambda: RelativeBias(heads))
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, axes):
        B, T, C, H, W, D = x.shape
        x = x.flatten(0, 1)                                              # (B*T, C, H, W, D)
        y = self.norm1(x)
        y = sum(attend(self.input_heads[a](y).unflatten(0, (B, T)), 3 + a, self.heads, self.qnorms[a], self.knorms[a],
                       self.rel_pos_biases[a]) for a in range(axes)).flatten(0, 1) / (3 if D > 1 else 2)
        x = x + self.gamma_att.view(C, 1, 1, 1) * self.output_head(self.norm2(y))
        y = self.mlp(x.movedim(1, -1)).movedim(-1, 1)
        return (x + self.gamma_mlp.view(C, 1, 1, 1) * self.mlp_norm(y)).unflatten(0, (B, T))


class Hypernetwork(nn.Module):
    """Frames (B, C, T, *space) of the given states -> tokens (B, T, dim, H/patch, W/patch, D/patch or 1).

    A linear map of whatever channels there are, a convolutional encoder of each frame, space-time blocks.
    """

    def __init__(self, axes, dim, blocks, heads, patch, layer_scale):
        super().__init__()
        self.adapter = nn.ModuleDict({'linear': nn.Linear(len(STATES), dim // 4)})
        self.encoder = nn.ModuleDict()
        for a in axes:
            conv = lambda c_out, k: (nn.Conv2d if a == 2 else nn.Conv3d)(dim // 4, c_out, k, stride=k, bias=False)
            self.encoder[str(a)] = nn.ModuleDict({'encoder': nn.Sequential(
                conv(dim // 4, patch // 4), GroupNorm(2 * heads, dim // 4), nn.GELU(),
                conv(dim // 4, 2), GroupNorm(2 * heads, dim // 4), nn.GELU(),
                conv(dim, 2), GroupNorm(2 * heads, dim))})
        self.blocks = nn.ModuleList([nn.ModuleDict({'temporal': TemporalAttention(dim, heads, layer_scale),
                                                    'spatial': SpatialAttention(dim, heads, layer_scale)})
                                     for _ in range(blocks)])
        if 3 not in axes:                                                # the first block will see no third axis
            s = self.blocks[0]['spatial']
            for unused in s.input_heads[2], s.qnorms[2], s.knorms[2], s.rel_pos_biases[2]:
                unused.requires_grad_(False)

    def forward(self, x, states):
        B, C, T, *space = x.shape
        x = standardize(x, 2)[0].transpose(1, 2).flatten(0, 1)           # (B*T, C, *space)
        # Nothing stands between the adapter and the encoder's first convolution: both are applied as one.
        encoder, adapter = self.encoder[str(len(space))]['encoder'], self.adapter['linear']
        scale = (len(STATES) / C)**0.5                                   # of the bias too
        weight = torch.einsum('om...,mc->oc...', encoder[0].weight, scale * adapter.weight[:, states])
        bias = encoder[0].weight.flatten(2).sum(2) @ (scale * adapter.bias)
        x = (F.conv2d if len(space) == 2 else F.conv3d)(x, weight, bias, stride=encoder[0].stride)
        x = encoder[1:](x)                                               # (B*T, dim, *space / patch)
        x = x.view(B, T, *x.shape[1:], *[1] * (3 - len(space)))          # (B, T, dim, h, w, d)
        for i, block in enumerate(self.blocks):
            # After its first block the official code takes 2-D data for 3-D of depth one: it adds the attention
            # along that axis too, and still divides by two.
            x = block['spatial'](block['temporal'](x), axes=3 if i else len(space))
        return x


# ---------------------------------------------------------------------------------------------
# operator: a U-Net whose weights are generated

class Operator(nn.Module):
    """The U-Net in dy/dt = operator(y; theta): (B, channels, *space) -> same shape, sizes divisible by 16.

    Its own weights only give shapes and an initial scale. Walls anywhere mean padding by reflection everywhere,
    and one more input channel that marks all edges.
    """

    def __init__(self, axes, walls, channels, width):
        super().__init__()
        self.walls = walls
        layer, transposed = [(nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d)][axes - 2]
        conv = lambda c_in, c_out, kernel, **settings: layer(
            c_in, c_out, kernel, padding=(kernel - 1) // 2, padding_mode='reflect' if walls else 'circular', bias=False,
            **settings)
        norm = lambda c: nn.GroupNorm(4, c, affine=False)
        w = [width * 2**i for i in range(6)]
        self.adapter_in = conv(channels + walls, w[0], 3)
        self.conv_in = nn.Sequential(conv(w[0], w[0], 3), norm(w[0]), nn.GELU())
        self.downs = nn.ModuleList([nn.Sequential(OrderedDict(
            conv1=conv(a, b, 2, stride=2), norm1=norm(b), gelu1=nn.GELU(),
            conv2=conv(b, b, 3, groups=b), norm2=norm(b), gelu2=nn.GELU())) for a, b in zip(w[:4], w[1:5])])
        self.ups = nn.ModuleList([nn.ModuleDict(OrderedDict(
            up=transposed(b, a, 2, stride=2, bias=False),
            conv=conv(b, a, 3, groups=a), norm=norm(a))) for a, b in zip(w[3::-1], w[4::-1])])
        self.bottleneck = nn.Sequential(conv(w[4], w[5], 1), norm(w[5]), nn.GELU(), conv(w[5], w[4], 1))
        self.convs_out = nn.Sequential(conv(w[0], w[0], 3), norm(w[0]), nn.GELU())
        self.adapter_out = conv(w[0], channels, 3)

    def forward(self, y):
        if self.walls:
            inside = torch.zeros_like(y[:, :1])[(..., *[slice(1, -1)] * (y.ndim - 2))]
            y = torch.cat([y, F.pad(inside, (1, 1) * (y.ndim - 2), value=1.0)], 1)             # (B, channels + 1, H, W)
        levels = [self.conv_in(self.adapter_in(y))]                      # (B, width, H, W)
        for down in self.downs:
            levels.append(down(levels[-1]))                              # twice as wide, half as big
        x = levels.pop()                                                 # (B, 16 width, H/16, W/16)
        x = x + self.bottleneck(x)
        for up in self.ups:
            x = F.gelu(up['norm'](up['conv'](torch.cat([up['up'](x), levels.pop()], 1))))
        return self.adapter_out(self.convs_out(x))                       # (B, channels, H, W)

    def sizes(self):
        """[(what the weight's shape depends on, its number of entries)], in the order they have in theta."""
        return [('channels' if name.startswith('adapter') else 'adim' if p.shape[-1] == 1 else 'dim', p.numel())
                for name, p in self.named_parameters()]

    def bounds(self):
        """For each entry of theta the largest initial weight of its tensor, which sets its scale."""
        return torch.cat([p.abs().max().expand(p.numel()) for p in self.parameters()])


# ---------------------------------------------------------------------------------------------
# integration

def bosh3(f, y, max_steps=32, rtol=5e-6, atol=1e-9):
    """y(1) of dy/dt = f(t, y) from y(0) = y, by the third-order Runge-Kutta scheme of Bogacki and Shampine (1989).

    The step follows the embedded error estimate, one for the whole batch, but is never under 1/max_steps: steps
    that short are taken whatever their error. A last step past t = 1 is interpolated. The backward pass differentiates
    the scheme; where there may be many steps it computes each again, so that memory only holds its start.
    """
    def step(t, h, y, k1):
        k2 = f(t + h / 2, y + h / 2 * k1)
        k3 = f(t + h * 3 / 4, y + h * 3 / 4 * k2)
        end = y + h * (2 / 9 * k1 + 1 / 3 * k2 + 4 / 9 * k3)
        k4 = f(t + h, end)                                               # the next step's k1
        return end, k2, k4, h * (-5 / 72 * k1 + 1 / 12 * k2 + 1 / 9 * k3 - 1 / 8 * k4)

    again = lambda *start: checkpoint(step, *start, use_reentrant=False, preserve_rng_state=False)
    rms = lambda v: v.pow(2).mean().sqrt().item()
    k1 = f(0.0, y)
    with torch.no_grad():                                                # first step: Hairer, Norsett, Wanner, II.4
        scale = atol + rtol * y.abs()
        d0, d1 = rms(y / scale), rms(k1 / scale)
        h = 0.01 * d0 / d1 if min(d0, d1) >= 1e-5 and d1 < math.inf else 1e-6
        d2 = rms((f(h, y + h * k1) - k1) / scale) / h
        h = min(100 * h, max(1e-6, 1e-3 * h) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2))**(1 / 3))
    t, h = 0.0, max(1 / max_steps, h)
    while True:
        end, k2, k4, error = (again if max_steps > 4 else step)(t, h, y, k1)
        with torch.no_grad():
            ratio = rms(error / (atol + rtol * torch.maximum(y.abs(), end.abs())))
        if ratio <= 1 or h <= 1 / max_steps:                             # accepted
            if t + h >= 1:
                break
            t, y, k1 = t + h, end, k4
        factor = min(10.0, max(1.0 if ratio < 1 else 0.2, 0.9 / ratio**(1 / 3))) if ratio else 10.0
        h = max(1 / max_steps, h * factor)
    cubic = lambda s: (y + s * h * k1 + s**2 * (3 * (end - y) - h * (2 * k1 + k4))
                       + s**3 * (2 * (y - end) + h * (k1 + k4)))
    s = (1 - t) / h                                                      # quartic through both ends and the midpoint
    return cubic(s) + 16 * s**2 * (1 - s)**2 * (y + h / 2 * k2 - cubic(0.5))


# ---------------------------------------------------------------------------------------------
# the model

class DISCO(nn.Module):
    """Hypernetwork, generators and operator. forward(context, target) -> {'loss'} of next-frame prediction.

    context, target: (B, C, T, H, W), consecutive in time, sizes 32, 48, 64, ..; `channels` names the C channels,
    WELL[dataset]'s in any order (default: that one). The published weights serve all_datasets. `width` is the
    operator's at full resolution, 1/max_steps the least step of its integration. Defaults are the published sizes.
    The last latent of the context is kept, detached, in `self.embedding` (B, dim, 1, 1) for the log.
    Raises ValueError for names and sizes that do not fit.
    """

    def __init__(self, dataset, channels=None, all_datasets=False, dim=384, blocks=12, heads=6, patch=16, hidden=768,
                 width=8, layer_scale=1e-6, max_steps=32):
        super().__init__()
        if dataset not in WELL or patch not in (8, 16):
            raise ValueError(f'DISCO has datasets {", ".join(WELL)} and patches 8, 16; not {dataset!r}, {patch}')
        self.axes, _, names = WELL[dataset]
        own = names.replace('_3d', '').split()
        channels = list(channels or own)
        if sorted(channels) != sorted(own):
            raise ValueError(f'DISCO knows {dataset} by the channels {", ".join(own)}, not {", ".join(channels)}')
        self.dataset, self.max_steps = dataset, max_steps
        self.order = [channels.index(c) for c in own]                    # from the input's order to its own
        self.back = [own.index(c) for c in channels]                     # and back
        self.states = [STATES.index(names.split()[i]) for i in self.back]
        axes = {n: WELL[n][0] for n in (WELL if all_datasets else [dataset])}
        self.hpnn = Hypernetwork(sorted(set(axes.values())), dim, blocks, heads, patch, layer_scale)
        self.opnns = nn.ModuleDict({n: Operator(*WELL[n][:2], len(WELL[n][2].split()), width) for n in axes})
        self.opnns.requires_grad_(False)                                 # never run with weights of their own
        generator = lambda n, kind: nn.Linear(hidden, sum(size for k, size in self.opnns[n].sizes() if k == kind))
        self.param_gen_common = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
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
            raise ValueError(f'DISCO for {self.dataset} needs {len(self.states)} channels in {self.axes} dimensions of '
                             f'sizes 32, 48, 64, ..; not {C} channels of {" x ".join(map(str, space))}')
        x = standardize(x, 2)[0]                                         # which the hypernetwork will do again
        return self.hpnn(x, self.states).mean((1, 3, 4, 5))[:, None]

    def theta(self, z):
        """Latent (B, dim) -> the operator's weights (B, n), each within twice its bound."""
        h, sizes = self.param_gen_common(z), self.opnns[self.dataset].sizes()
        generators = {'channels': self.param_gen_channels[self.dataset], 'adim': self.param_gen_adim,
                      'dim': self.param_gen_dim[str(self.axes)]}
        parts = {kind: iter(generator(h).split([size for k, size in sizes if k == kind], 1))
                 for kind, generator in generators.items()}
        theta = torch.cat([next(parts[kind]) for kind, _ in sizes], 1)
        bound = getattr(self, f'theta_norm_{self.dataset}')
        return 2 * bound * torch.tanh(theta / (2 * bound.pow(2).mean().sqrt()))

    def derivative(self, y, theta):
        """dy/dt = operator(y; theta) of standardised frames (B, C, H, W) in DISCO's order of channels."""
        operator = self.opnns[self.dataset]
        parts = theta.split([size for _, size in operator.sizes()], 1)
        weights = {name: part.view(-1, *p.shape) for (name, p), part in zip(operator.named_parameters(), parts)}
        return vmap(lambda w, y: functional_call(operator, w, y[None])[0])(weights, y)         # each sample by its own

    def next_frame(self, x):
        """The frame after x (B, C, T, H, W), as z-scores (B, C, H, W) of x's mean and std; those; the latent."""
        z = self.features(x)[:, 0].to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):               # too many steps for half precision
            theta = self.theta(z)
            x, mean, std = standardize(x, 2)                             # by sample and channel
            y, last_mean, last_std = standardize(x[:, self.order, -1], 2)
            y = bosh3(lambda t, y: self.derivative(y, theta), y, self.max_steps) * last_std + last_mean
        return y[:, self.back], mean[:, :, 0], std[:, :, 0], z

    def predict(self, x):
        """The frame after x (B, C, T, H, W): (B, C, H, W)."""
        y, mean, std, _ = self.next_frame(x)
        return y * std + mean

    def forward(self, context, target, generator=None):
        """Squared error of the target's first frame over its spatial variance, by sample and channel, averaged.

        DISCO's own loss is a Gaussian likelihood with that variance: half of this, plus a constant.
        """
        y, mean, std, z = self.next_frame(context)
        self.embedding = z.detach()[:, :, None, None]
        frame = (target[:, :, 0] - mean) / std                           # (B, C, H, W)
        variance = frame.flatten(2).var(2) + 1e-7                        # (B, C)
        return {'loss': ((y - frame).pow(2).flatten(2).mean(2) / variance).mean()}


# ---------------------------------------------------------------------------------------------
# published files

LATENT_LABELS = {'active_matter': ['L', 'zeta', 'alpha'], 'shear_flow': ['Rayleigh', 'Schmidt'],
                 'rayleigh_benard': ['Rayleigh', 'Prandtl']}


def load_published(model, path):
    """Load a DISCO training checkpoint, {'model_state': ..}, its keys with or without 'module.'.

    Older ones were made for 2-D: their weights lack the last, singleton axis. Raises ValueError, naming file and
    key, if anything is missing, unknown or of another shape.
    """
    state, own = published_state(path, 'model_state'), model.state_dict()
    for k in own.keys() & state.keys():
        if (*state[k].shape, 1) == own[k].shape:
            state[k] = state[k][..., None]
    check_state(own, state, path)
    model.load_state_dict(state)


def read_latents(folder, dataset):
    """Official latents: <folder>/{train,valid}/batch_*.pt, each {'theta_latent': (b, D), 'labels': (b, L)}.

    Returns {split: (tokens (n, 1, D), labels (n, L'))} as the probes take them, and the names of the L' labels that
    vary over train, as simulated, neither in log10 nor z-scored. Raises ValueError, naming the file.
    """
    splits, names = {}, LATENT_LABELS[dataset]
    for split in 'train', 'valid':
        parts = {'theta_latent': [], 'labels': []}
        for path in sorted(Path(folder, split).glob('batch_*.pt')):
            batch = read_tensors(path)
            for key, part in parts.items():
                part.append(batch.get(key, torch.empty(0)))
            z, labels = (part[-1] for part in parts.values())
            if z.ndim != 2 or z.shape[1:] != parts['theta_latent'][0].shape[1:] or labels.shape != (len(z), len(names)):
                raise ValueError(f'{path} does not hold theta_latent (b, D) and labels (b, {len(names)}), '
                                 f'{", ".join(names)}')
        if not parts['labels']:
            raise ValueError(f'no latents {Path(folder, split)}/batch_*.pt')
        splits[split] = torch.cat(parts['theta_latent'])[:, None], torch.cat(parts['labels'])
    varies = splits['train'][1].std(0) > 0
    return {split: (z, y[:, varies]) for split, (z, y) in splits.items()}, [n for n, v in zip(names, varies) if v]
