"""
MPP: the axial vision transformer (AViT) of Multiple Physics Pretraining, predict the next frame from 16.

    fields (B, C, 16, H, W) --normalise--> field embedding --hMLP stem--> z (B, 16, D, H/16, W/16)
    z --12 space-time blocks--> z --decoder, last time step--> next frame (B, C, H, W)

McCabe et al., arXiv 2310.02994; a baseline of arXiv 2603.13227, which reads the physical parameters from
the encoder's tokens of the last time step and fine-tunes all weights. One model serves many systems: each
field it may meet is a state with its own column in the embedding and the decoder, and a system uses the
columns of its channels. Module names are the published checkpoints'. The stochastic depth MPP trains with
is left out.
"""
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import at_least, check_state, mean_and_std, option, published_state

TITLE = 'MPP'
PAPER = {'active_matter': 0.230, 'shear_flow': 0.59, 'rayleigh_benard': 0.08}          # table 1, attentive probe,
PAPER_FINETUNED = True                                                                 # all weights fine-tuned
PAIRED = True                                                            # the next frame has to be at its place
MLP_RATIO = 4.0                                                          # of its attentive probe, in the paper
SIZES = {'Ti': (192, 12, 3), 'S': (384, 12, 6), 'B': (768, 12, 12), 'L': (1024, 24, 16),     # width, blocks, heads
         'nano': (48, 2, 3)}


@dataclass
class Options:
    """The defaults are the published MPP-Ti's."""
    size: str = option('Ti', 'one of ' + ', '.join(SIZES))
    width: int = option(0, '0: as its size says')
    depth: int = option(0, 'blocks; 0: as its size says')
    heads: int = option(0, '0: as its size says')
    layer_scale: float = option(1e-6, 'initial layer scale of the blocks')
    official_state_map: bool = option(False, 'channels to states as in the official script, not by name')


PRESETS = {                                                              # it standardises its inputs itself
    'paper': dict(noise=0.0),
    'nano': dict(crop=0, normalize=False, size='nano', layer_scale=0.1, batch=16, micro_batch=16, steps=4800,
                 lr=3e-3)}


def size_of(options):
    """(width, blocks, heads): those given, or else as the named size has them."""
    if options.size not in SIZES:
        raise ValueError(f'no size {options.size!r}: choose from {", ".join(SIZES)}')
    at_least(options, 0, 'width', 'depth', 'heads')
    own = options.width, options.depth, options.heads
    return tuple(mine or default for mine, default in zip(own, SIZES[options.size]))


def check(options, height, width):
    """Raise ValueError if the options, or fields of this size, will not do."""
    dim, _, heads = size_of(options)
    if dim % 4 or dim % heads:
        raise ValueError(f'MPP width {dim} is not divisible by 4 and by its {heads} heads')
    if height % 16 or width % 16:
        raise ValueError(f'MPP needs sides divisible by 16, not {height} x {width}: choose another --resolution or '
                         f'--crop')


def build(options, inputs):
    return MPP(inputs.channels, inputs.periodic, size_of(options), options.official_state_map, options.layer_scale)

# The published models know twelve states: 0 the height of shallow water; 1 2 3 velocity and particles of
# incompressible flow; 4 5 a reaction's activator and inhibitor; 6 7 8 9 velocity, density and pressure of
# compressible flow; 10 11 were never used. Velocities here are incompressible, a tracer is what the particles
# are, and buoyancy is, in the Boussinesq equations, the density's departure from its mean, up to a factor.
KNOWN = 12
STATES = {'height': 0, 'velocity_x': 1, 'velocity_y': 2, 'tracer': 3, 'activator': 4, 'inhibitor': 5,
          'density': 8, 'buoyancy': 8, 'pressure': 9}
STATE_AXIS = {'space_bag.weight': 1, 'debed.out_kernel': 1, 'debed.out_bias': 0}        # where weights have the states


def state_indices(channels, official_state_map=False):
    """The state of each named channel; names MPP has never seen get 12, 13, .. in their order.

    The official script of arXiv 2603.13227 counts 0, 1, 2, .. whatever the channels are, so that pressure, say,
    meets the weights of shallow-water height: `official_state_map` does the same.
    """
    if official_state_map:
        return list(range(len(channels)))
    new = [c for c in channels if c not in STATES]
    return [STATES[c] if c in STATES else KNOWN + new.index(c) for c in channels]


# ---------------------------------------------------------------------------------------------
# stem and decoder

class RMSInstanceNorm(nn.Module):
    """(N, D, h, w) divided by its standard deviation over (h, w), unbiased; the mean stays.

    The bias is in the published files but was never used, in training either; asking for no gradient, it does
    not keep DistributedDataParallel waiting for one.
    """

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim), requires_grad=False)

    def forward(self, x):
        return x * (self.weight.view(-1, 1, 1) / (mean_and_std(x, (-2, -1))[1] + 1e-8))


class Stem(nn.Module):
    """hMLP stem: fields (N, C, H, W) -> patches (N, D, H/16, W/16) by convolutions of stride 4, 2 and 2.

    The field embedding, a linear map of the channels to D/4 at every point, comes first: columns `states` of
    `space_bag`, times sqrt(columns / C), bias included. As the first convolution is linear too, both are
    computed as one convolution, and the embedding at full resolution never exists.
    """

    def __init__(self, dim):
        super().__init__()
        c = dim // 4
        self.in_proj = nn.Sequential(
            nn.Conv2d(c, c, kernel_size=4, stride=4, bias=False), RMSInstanceNorm(c), nn.GELU(),
            nn.Conv2d(c, c, kernel_size=2, stride=2, bias=False), RMSInstanceNorm(c), nn.GELU(),
            nn.Conv2d(c, dim, kernel_size=2, stride=2, bias=False), RMSInstanceNorm(dim))

    def embed_fields(self, x, space_bag, states):                        # (N, C, H, W) -> (N, D/4, H/4, W/4)
        first = self.in_proj[0].weight * math.sqrt(space_bag.in_features / len(states))    # (D/4, D/4, 4, 4)
        weight = torch.einsum('oeij,ec->ocij', first, space_bag.weight[:, states])          # (D/4, C, 4, 4)
        bias = torch.einsum('oeij,e->o', first, space_bag.bias)
        return F.conv2d(x, weight, bias, stride=4)

    def forward(self, x, space_bag, states):
        return self.in_proj[1:](self.embed_fields(x, space_bag, states))


class Decoder(nn.Module):
    """Patches (N, D, H/16, W/16) -> the fields `states`, (N, C, H, W): the stem mirrored."""

    def __init__(self, dim, columns):
        super().__init__()
        c = dim // 4
        self.out_proj = nn.Sequential(
            nn.ConvTranspose2d(dim, c, kernel_size=2, stride=2, bias=False), RMSInstanceNorm(c), nn.GELU(),
            nn.ConvTranspose2d(c, c, kernel_size=2, stride=2, bias=False), RMSInstanceNorm(c), nn.GELU())
        head = nn.ConvTranspose2d(c, columns, kernel_size=4, stride=4)
        self.out_kernel, self.out_bias = head.weight, head.bias          # (D/4, columns, 4, 4), (columns,)

    def forward(self, z, states):
        return F.conv_transpose2d(self.out_proj(z), self.out_kernel[:, states], self.out_bias[states], stride=4)


# ---------------------------------------------------------------------------------------------
# space-time blocks

def distance_buckets(n, periodic=False, device=None):
    """(n, n) bucket, 0..31, of the distance from each query (row) to each key: T5's, with 16 for either direction.

    Distances below 8 have their own, longer ones share eight that widen logarithmically up to 32. On a
    periodic axis distances go the short way round; for odd n the wrap is one short, as it was in training.
    """
    i = torch.arange(n, device=device)
    d = i - i[:, None]                                                   # (n, n): key minus query
    if periodic:
        half = n // 2
        d = torch.where(d.abs() > half, d - 2 * half * d.sign(), d)
    far = 8 + (torch.log(d.abs().clamp(min=8) / 8) / math.log(32 / 8) * 8).long()
    return torch.where(d.abs() < 8, d.abs(), far.clamp(max=15)) + 16 * (d > 0)


class PositionBias(nn.Module):
    """Buckets (n, n) -> what to add to the attention logits, (heads, n, n)."""

    def __init__(self, heads):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(32, heads)

    def forward(self, buckets):
        return self.relative_attention_bias(buckets).permute(2, 0, 1)


class Attention(nn.Module):
    """Multi-head attention along axes of (B, T, D, h, w), averaged over the axes; the same shape comes out.

    Norms before it and before the output projection, queries and keys layer-normed per head (QK norm), and a
    relative position bias. All axes share the weights. The projection's rows are [q, k, v] head by head.
    """

    def __init__(self, dim, heads, norm):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.input_head = nn.Conv2d(dim, 3 * dim, kernel_size=1)
        self.output_head = nn.Conv2d(dim, dim, kernel_size=1)
        self.qnorm, self.knorm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)
        self.rel_pos_bias = PositionBias(heads)

    def attend(self, x, axes):
        """`axes`: {axis of (B, T, h, w): its distance buckets}."""
        B, T, D, h, w = x.shape
        x = self.input_head(self.norm1(x.flatten(0, 1)))                 # (B*T, 3D, h, w)
        x = x.view(B, T, self.heads, -1, h, w).permute(0, 1, 4, 5, 2, 3)  # (B, T, h, w, heads, 3D/heads)
        q, k, v = x.chunk(3, dim=-1)
        q, k = self.qnorm(q), self.knorm(k)
        out = 0
        for axis, buckets in axes.items():
            along = [t.movedim(axis, -2) for t in (q, k, v)]             # (B, ., ., heads, n, D/heads)
            y = F.scaled_dot_product_attention(*[t.flatten(0, 2) for t in along],
                                               attn_mask=self.rel_pos_bias(buckets))
            out = out + y.unflatten(0, along[0].shape[:3]).movedim(-2, axis) / len(axes)
        out = out.flatten(4).permute(0, 1, 4, 2, 3).flatten(0, 1)        # (B*T, D, h, w)
        return self.output_head(self.norm2(out)).view(B, T, D, h, w)


def drop_path(y, share, training):
    """Stochastic depth: in training, a residual y (B, ...) of a sample is left out with probability `share`."""
    if not training or share == 0:
        return y
    kept = torch.rand(len(y), *[1] * (y.ndim - 1), device=y.device) >= share
    return y * kept / (1 - share)


class Temporal(Attention):
    """Attention along time, each patch on its own; residual with layer scale. Its norms are plain instance norms."""

    dropped = 0.0                                                        # share, of stochastic depth

    def __init__(self, dim, heads, layer_scale):
        super().__init__(dim, heads, norm=lambda dim: nn.InstanceNorm2d(dim, affine=True))
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x, axes):                                          # (B, T, D, h, w)
        return x + drop_path(self.gamma.view(-1, 1, 1) * self.attend(x, axes), self.dropped, self.training)


class Spatial(Attention):
    """Axial attention along h and w, each frame on its own, then an MLP; residuals with layer scale."""

    dropped = 0.0

    def __init__(self, dim, heads, layer_scale):
        super().__init__(dim, heads, norm=RMSInstanceNorm)
        self.gamma_att = nn.Parameter(layer_scale * torch.ones(dim))
        self.gamma_mlp = nn.Parameter(layer_scale * torch.ones(dim))
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), gelu=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.mlp_norm = RMSInstanceNorm(dim)

    def forward(self, x, axes):                                          # (B, T, D, h, w)
        x = x + drop_path(self.gamma_att.view(-1, 1, 1) * self.attend(x, axes), self.dropped, self.training)
        y = self.mlp(x.movedim(2, -1)).movedim(-1, 2)                    # (B, T, D, h, w)
        return x + drop_path(self.gamma_mlp.view(-1, 1, 1) * self.mlp_norm(y), self.dropped, self.training)


class Block(nn.Module):
    """Time, then space."""

    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.temporal, self.spatial = Temporal(dim, heads, layer_scale), Spatial(dim, heads, layer_scale)

    def forward(self, x, time, space):
        return self.spatial(self.temporal(x, time), space)


# ---------------------------------------------------------------------------------------------
# the model

def normalised_mse(prediction, frame):
    """Squared error over the frame's variance, per sample and channel, averaged; (B, C, H, W) both.

    Predicting the spatial mean scores 1. MPP's own loss divides by the mean square; the variance is the same
    for fields of mean zero, and for others it keeps an offset from hiding what varies.
    """
    error = (prediction - frame).pow(2).mean((-2, -1))                   # (B, C)
    return (error / (frame.var((-2, -1), correction=0) + 1e-7)).mean()


class AViT(nn.Module):
    """Encoder and decoder on named channels; the defaults are MPP-Ti's. Raises ValueError for sizes it cannot have.

    `periodic` is for the axes (H, W); `size` a name in SIZES or (width, blocks, heads). Each channel is z-scored over
    time and space, per sample, on the way in. The norms see the patches of one frame: with fewer than 4 x 4 of
    them, 64 x 64 points, they are unstable.
    """

    def __init__(self, channels, periodic=(True, True), size='Ti', official_state_map=False, layer_scale=1e-6):
        super().__init__()
        if isinstance(size, str) and size not in SIZES:
            raise ValueError(f'unknown MPP size {size!r}: choose from {", ".join(SIZES)}')
        dim, blocks, heads = SIZES[size] if isinstance(size, str) else size
        if dim % 4 or dim % heads:
            raise ValueError(f'MPP width {dim} is not divisible by 4 and by its {heads} heads')
        self.dim, self.periodic = dim, periodic
        states = state_indices(channels, official_state_map)
        self.register_buffer('states', torch.tensor(states), persistent=False)           # where the weights are
        self.new_embedding = official_state_map and any(c not in STATES for c in channels)
        columns = max(KNOWN, max(states) + 1)
        self.space_bag = nn.Linear(columns, dim // 4)
        self.embed = Stem(dim)
        self.blocks = nn.ModuleList([Block(dim, heads, layer_scale) for _ in range(blocks)])
        self.debed = Decoder(dim, columns)

    def forward(self, x):
        """(B, C, T, H, W) -> z (B, T, D, H/16, W/16), and the fields' mean and std for `decode`, (B, C, 1, 1).

        Raises ValueError for another number of channels, and for H, W not divisible by 16 or a single patch.
        """
        B, C, T, H, W = x.shape
        if C != len(self.states) or H % 16 or W % 16 or H * W == 16 * 16:
            raise ValueError(f'this MPP model takes {len(self.states)} channels, in two or more patches of 16 x 16: '
                             f'not {C} channels of {H} x {W}')
        mean, std = mean_and_std(x, (2, 3, 4))                           # (B, C, 1, 1, 1)
        std = std + 1e-7
        x = ((x - mean) / std).transpose(1, 2).flatten(0, 1)             # (B*T, C, H, W)
        z = self.embed(x, self.space_bag, self.states).unflatten(0, (B, T))       # (B, T, D, H/16, W/16)
        time = {1: distance_buckets(T, False, x.device)}
        space = {2: distance_buckets(H // 16, self.periodic[0], x.device),
                 3: distance_buckets(W // 16, self.periodic[1], x.device)}
        for block in self.blocks:
            z = block(z, time, space)
        return z, mean[:, :, 0], std[:, :, 0]

    def decode(self, z, mean, std):
        """One time step of z, (B, D, H/16, W/16), -> the frame after it in the fields' units, (B, C, H, W)."""
        return self.debed(z, self.states) * std + mean


class MPP(nn.Module):
    """AViT and its loss. forward(context, target) -> {'loss'}: the normalised MSE of the frame after the context.

    context, target: (B, C, 16, H, W), consecutive in time, channels in the order of their names. What the last time
    step became is kept, detached, in `self.embedding` for the log. The arguments are AViT's.
    """

    def __init__(self, channels, periodic=(True, True), size='Ti', official_state_map=False, layer_scale=1e-6):
        super().__init__()
        self.encoder = AViT(channels, periodic, size, official_state_map, layer_scale)

    def forward(self, context, target, generator=None):
        return {'loss': normalised_mse(self.predict(context), target[:, :, 0])}          # draws nothing at random

    def predict(self, x):
        """(B, C, 16, H, W) -> the frame after them, (B, C, H, W)."""
        with torch.autocast(x.device.type, enabled=False):               # bfloat16 would round the norms' spread away
            z, mean, std = self.encoder(x)
            self.embedding = z[:, -1].detach()                           # (B, D, H/16, W/16)
            return self.encoder.decode(z[:, -1], mean, std)

    def paper_finetuning(self):
        """As the paper's script has it: every axis periodic, stochastic depth that grows to 0.2 in the last block."""
        self.encoder.periodic = True, True
        for i, block in enumerate(self.encoder.blocks):
            share = 0.2 * i / max(1, len(self.encoder.blocks) - 1)
            block.temporal.dropped = block.spatial.dropped = share

    def features(self, x):
        """The encoder's tokens of the last time step: (B, C, 16, H, W) -> (B, N = H/16 * W/16, D)."""
        with torch.autocast(x.device.type, enabled=False):
            return self.encoder(x)[0][:, -1].flatten(2).transpose(1, 2)


def load_published(model, path):
    """Load a published MPP_AViT_* file: a bare state dict or one under 'model_state', with or without 'module.'.

    New channels keep the columns they have. With `official_state_map` and new channels the whole field embedding
    stays as initialised, as in the official script. Raises ValueError, naming file and key, for a file that is
    unreadable, would run code, or is not this model's, of which nothing is loaded then.
    """
    state = published_state(path, 'model_state')
    own, new = model.encoder.state_dict(), {}                            # new: columns the file does not have
    for k, axis in STATE_AXIS.items():
        own[k], new[k] = own[k].tensor_split([KNOWN], axis)
    check_state(own, state, path)
    if model.encoder.new_embedding:
        state |= {k: own[k] for k in ('space_bag.weight', 'space_bag.bias')}
    state |= {k: torch.cat([state[k], new[k].to(state[k])], axis) for k, axis in STATE_AXIS.items()}
    model.encoder.load_state_dict(state)
