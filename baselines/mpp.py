"""
MPP, Multiple Physics Pretraining: an axial vision transformer (AViT) that predicts the next frame.

    fields (B, C, 16, H, W) --normalise, field embedding, hMLP stem--> z (B, 16, D, H/16, W/16)
    z --12 space-time blocks--> z --decoder, last time step--> next frame (B, C, H, W)

McCabe et al., arXiv 2310.02994; a baseline of arXiv 2603.13227, which reads the parameters from the
last time step's tokens. One model serves many systems: each field is a state with a column in the
embedding and in the decoder. Published checkpoints load. Pretraining has no stochastic depth here.
"""
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import at_least, autocast, check_state, mean_and_std, option, published_state

TITLE = 'MPP'
SIZES = {'Ti': (192, 12, 3), 'S': (384, 12, 6), 'B': (768, 12, 12), 'L': (1024, 24, 16),
         'nano': (48, 2, 3)}                                       # width, blocks, heads

@dataclass
class Options:
    """The defaults are those of the published MPP-Ti."""
    size: str = option('Ti', 'one of ' + ', '.join(SIZES))
    width: int = option(0, '0: as its size says')
    depth: int = option(0, 'blocks; 0: as its size says')
    heads: int = option(0, '0: as its size says')
    layer_scale: float = option(1e-6, 'initial layer scale of the blocks')
    official_state_map: bool = option(False, 'number the channels as the official script does')

PRESETS = {'paper': dict(noise=0.0), 'nano': dict(                 # it z-scores its inputs itself
    crop=0, normalize=False, size='nano', layer_scale=0.1, batch=16, micro_batch=16, steps=4800,
    lr=3e-3)}

def resolve_size(size, given=(0, 0, 0)):
    """(width, blocks, heads) of a name in SIZES, or these three; what is `given` replaces them."""
    if isinstance(size, str) and size not in SIZES:
        raise ValueError(f'unknown MPP size {size!r}: choose from {", ".join(SIZES)}')
    named = SIZES[size] if isinstance(size, str) else size
    dim, blocks, heads = (value or default for value, default in zip(given, named))
    if dim % 4 or dim % heads:
        raise ValueError(f'MPP width {dim} is not divisible by 4 and by its {heads} heads')
    return dim, blocks, heads

def check(o, inputs):
    """Raise ValueError if the options, or what the network will see, do not fit."""
    if not inputs.paired:
        raise ValueError(f'{TITLE} predicts the next frame at its place: it takes --views paired')
    at_least(o, 0, 'width', 'depth', 'heads')
    resolve_size(o.size, (o.width, o.depth, o.heads))
    H, W = inputs.size
    if H % 16 or W % 16:
        raise ValueError(f'MPP needs multiples of 16, not {H} x {W}: set --resolution or --crop')

def build(o, inputs):
    size = resolve_size(o.size, (o.width, o.depth, o.heads))
    return MPP(inputs.channels, inputs.periodic, size, o.official_state_map, o.layer_scale)

# Of MPP's two flows, velocity here is that of the incompressible one, and a tracer stands for its
# particles. Buoyancy is, up to a factor, the density minus its mean (Boussinesq).
KNOWN = 12                                                         # states of the published models
STATES = {'height': 0, 'velocity_x': 1, 'velocity_y': 2, 'tracer': 3, 'activator': 4,
          'inhibitor': 5, 'density': 8, 'buoyancy': 8, 'pressure': 9}
STATE_AXIS = {'space_bag.weight': 1, 'debed.out_kernel': 1, 'debed.out_bias': 0}       # in weights

def state_indices(channels, official_state_map=False):
    """The state of each named channel. Names that MPP has never seen get 12, 13, .. in turn."""
    # the script of arXiv 2603.13227 counts the channels: pressure may meet the weights of a height
    if official_state_map:
        return list(range(len(channels)))
    new = [c for c in channels if c not in STATES]
    return [STATES[c] if c in STATES else KNOWN + new.index(c) for c in channels]

# --- stem and decoder
class RMSInstanceNorm(nn.Module):
    """(N, D, h, w) divided by its standard deviation over (h, w), unbiased. The mean stays."""
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        # published, but never used, not even in training: DDP must not wait for its gradient
        self.bias = nn.Parameter(torch.zeros(dim), requires_grad=False)

    def forward(self, x):
        return x * (self.weight.view(-1, 1, 1) / (mean_and_std(x, (-2, -1))[1] + 1e-8))

class Stem(nn.Module):
    """hMLP stem: fields (N, C, H, W) -> patches (N, D, H/16, W/16), by strides of 4, 2 and 2."""
    def __init__(self, dim):
        super().__init__()
        c = dim // 4
        self.in_proj = nn.Sequential(
            nn.Conv2d(c, c, 4, stride=4, bias=False), RMSInstanceNorm(c), nn.GELU(),
            nn.Conv2d(c, c, 2, stride=2, bias=False), RMSInstanceNorm(c), nn.GELU(),
            nn.Conv2d(c, dim, 2, stride=2, bias=False), RMSInstanceNorm(dim))

    def embed_fields(self, x, space_bag, states):
        """(N, C, H, W) -> (N, D/4, H/4, W/4): columns `states` embed, the first layer convolves."""
        # embedding, scaled by sqrt(columns / C), and convolution are linear: apply them as one
        first = self.in_proj[0].weight * math.sqrt(space_bag.in_features / len(states))
        weight = torch.einsum('oeij,ec->ocij', first, space_bag.weight[:, states])
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
            nn.ConvTranspose2d(dim, c, 2, stride=2, bias=False), RMSInstanceNorm(c), nn.GELU(),
            nn.ConvTranspose2d(c, c, 2, stride=2, bias=False), RMSInstanceNorm(c), nn.GELU())
        head = nn.ConvTranspose2d(c, columns, 4, stride=4)
        self.out_kernel, self.out_bias = head.weight, head.bias    # (D/4, columns, 4, 4); (columns)

    def forward(self, z, states):
        kernel, bias = self.out_kernel[:, states], self.out_bias[states]
        return F.conv_transpose2d(self.out_proj(z), kernel, bias, stride=4)

# --- space-time blocks
def distance_buckets(n, periodic=False, device=None):
    """T5's bucket, 0..31, of the distance from each query (row) to each key: (n, n)."""
    i = torch.arange(n, device=device)
    d = i - i[:, None]                                             # (n, n): key minus query
    if periodic:                                                   # go the short way round
        half = n // 2                                              # odd n: one short, as trained
        d = torch.where(d.abs() > half, d - 2 * half * d.sign(), d)
    far = 8 + (torch.log(d.abs().clamp(min=8) / 8) / math.log(32 / 8) * 8).long()
    return torch.where(d.abs() < 8, d.abs(), far.clamp(max=15)) + 16 * (d > 0)

class Attention(nn.Module):
    """Multi-head attention along axes of (B, T, D, h, w), averaged over them. The shape stays."""
    dropped = 0.0                                                  # share, by stochastic depth

    def __init__(self, dim, heads, norm):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.input_head = nn.Conv2d(dim, 3 * dim, kernel_size=1)
        self.output_head = nn.Conv2d(dim, dim, kernel_size=1)
        self.qnorm, self.knorm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)
        self.rel_pos_bias = nn.ModuleDict({'relative_attention_bias': nn.Embedding(32, heads)})

    def attend(self, x, axes):
        """`axes`: {axis of (B, T, h, w): its distance buckets}."""
        # queries, keys and values of every patch, head by head
        B, T, D, h, w = x.shape
        x = self.input_head(self.norm1(x.flatten(0, 1))).view(B, T, self.heads, -1, h, w)
        x = x.permute(0, 1, 4, 5, 2, 3)                            # (B, T, h, w, heads, 3D/heads)
        q, k, v = x.chunk(3, dim=-1)
        q, k = self.qnorm(q), self.knorm(k)
        # one axis at a time, with the same weights: the others join the batch
        out = 0
        for axis, buckets in axes.items():
            q_, k_, v_ = (t.movedim(axis, -2) for t in (q, k, v))  # (B, ., ., heads, n, D/heads)
            bias = self.rel_pos_bias['relative_attention_bias'](buckets).permute(2, 0, 1)
            y = F.scaled_dot_product_attention(q_.flatten(0, 2), k_.flatten(0, 2),
                                               v_.flatten(0, 2), attn_mask=bias)
            out = out + y.unflatten(0, q_.shape[:3]).movedim(-2, axis) / len(axes)
        # back to frames, for the output projection
        out = out.flatten(4).permute(0, 1, 4, 2, 3).flatten(0, 1)  # (B*T, D, h, w)
        return self.output_head(self.norm2(out)).view(B, T, D, h, w)

    def add(self, x, gamma, y):
        """x + gamma y: layer scale, and in training stochastic depth if `dropped` is set."""
        y = gamma.view(-1, 1, 1) * y
        if self.training and self.dropped > 0:
            kept = torch.rand(len(y), *[1] * (y.ndim - 1), device=y.device) >= self.dropped
            y = y * kept / (1 - self.dropped)
        return x + y

class Temporal(Attention):
    """Attention along time, each patch on its own; a residual with layer scale. Instance norms."""
    def __init__(self, dim, heads, layer_scale):
        super().__init__(dim, heads, norm=lambda c: nn.InstanceNorm2d(c, affine=True))
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x, axes):                                    # (B, T, D, h, w)
        return self.add(x, self.gamma, self.attend(x, axes))

class Spatial(Attention):
    """Axial attention along h and w in each frame, then an MLP; residuals with layer scale."""
    def __init__(self, dim, heads, layer_scale):
        super().__init__(dim, heads, norm=RMSInstanceNorm)
        self.gamma_att = nn.Parameter(layer_scale * torch.ones(dim))
        self.gamma_mlp = nn.Parameter(layer_scale * torch.ones(dim))
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), gelu=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.mlp_norm = RMSInstanceNorm(dim)

    def forward(self, x, axes):                                    # (B, T, D, h, w)
        x = self.add(x, self.gamma_att, self.attend(x, axes))
        y = self.mlp(x.movedim(2, -1)).movedim(-1, 2)
        return self.add(x, self.gamma_mlp, self.mlp_norm(y))

class Block(nn.Module):
    """One space-time block of the AViT: attention along time, then along space and an MLP."""
    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.temporal = Temporal(dim, heads, layer_scale)
        self.spatial = Spatial(dim, heads, layer_scale)

    def forward(self, x, time, space):
        return self.spatial(self.temporal(x, time), space)

# --- the model
def normalised_mse(prediction, frame):
    """Mean squared error over the frame's variance, by sample and channel; both (B, C, H, W)."""
    # MPP's own loss divides by the mean square, where an offset hides what varies
    error = (prediction - frame).pow(2).mean((-2, -1))             # (B, C)
    return (error / (frame.var((-2, -1), correction=0) + 1e-7)).mean()

class AViT(nn.Module):
    """Encoder and decoder on named channels. Its norms are unstable on less than 4 x 4 patches."""
    def __init__(self, channels, periodic=(True, True), size='Ti', official_state_map=False,
                 layer_scale=1e-6):
        super().__init__()
        self.dim, blocks, heads = resolve_size(size)
        self.periodic = periodic                                   # of (H, W)
        # which columns of embedding and decoder the channels use; unknown channels add columns
        states = state_indices(channels, official_state_map)
        self.register_buffer('states', torch.tensor(states), persistent=False)
        self.new_embedding = official_state_map and any(c not in STATES for c in channels)
        columns = max(KNOWN, max(states) + 1)

        self.space_bag = nn.Linear(columns, self.dim // 4)
        self.embed = Stem(self.dim)
        self.blocks = nn.ModuleList([Block(self.dim, heads, layer_scale) for _ in range(blocks)])
        self.debed = Decoder(self.dim, columns)

    def forward(self, x):
        """(B, C, T, H, W) -> z (B, T, D, H/16, W/16), and x's mean and std, (B, C, 1, 1) each."""
        B, C, T, H, W = x.shape
        if C != len(self.states) or H % 16 or W % 16 or H * W == 16 * 16:
            raise ValueError(f'this MPP model takes {len(self.states)} channels, in two or more '
                             f'patches of 16 x 16: not {C} channels of {H} x {W}')
        # z-score each channel of each sample, then embed every frame on its own
        mean, std = mean_and_std(x, (2, 3, 4))                     # (B, C, 1, 1, 1)
        std = std + 1e-7
        x = ((x - mean) / std).transpose(1, 2).flatten(0, 1)       # (B*T, C, H, W)
        z = self.embed(x, self.space_bag, self.states).unflatten(0, (B, T))
        # attention runs along axis 1 in time, and along axes 2 and 3 in space
        time = {1: distance_buckets(T, False, x.device)}
        space = {2: distance_buckets(H // 16, self.periodic[0], x.device),
                 3: distance_buckets(W // 16, self.periodic[1], x.device)}
        for block in self.blocks:
            z = block(z, time, space)
        return z, mean[:, :, 0], std[:, :, 0]

class MPP(nn.Module):
    """AViT and its loss: context, target (B, C, 16, H, W) -> {'loss'} of the frame after it."""
    def __init__(self, channels, *settings, **named):
        super().__init__()
        self.encoder = AViT(channels, *settings, **named)

    def forward(self, context, target, generator=None):
        return {'loss': normalised_mse(self.predict(context), target[:, :, 0])}

    def predict(self, x):
        """(B, C, 16, H, W) -> the frame after them, (B, C, H, W)."""
        # bfloat16 would round away the spread that the norms divide by
        with autocast(x.device):
            z, mean, std = self.encoder(x)
            self.embedding = z[:, -1].detach()                     # (B, D, H/16, W/16)
            return self.encoder.debed(z[:, -1], self.encoder.states) * std + mean

    def paper_finetuning(self):
        """As in the paper's script: all axes periodic, stochastic depth from 0 up to 0.2."""
        self.encoder.periodic = True, True
        for i, block in enumerate(self.encoder.blocks):
            share = 0.2 * i / max(1, len(self.encoder.blocks) - 1)
            block.temporal.dropped = block.spatial.dropped = share

    def features(self, x):
        """(B, C, 16, H, W) -> tokens of the last time step, (B, N = H/16 * W/16, D)."""
        with autocast(x.device):
            return self.encoder(x)[0][:, -1].flatten(2).transpose(1, 2)

def load_published(model, path):
    """Load a published MPP_AViT_* file. Raises ValueError, naming file and key, for others."""
    # the file must have the model's weights, without the columns of new channels
    state = published_state(path, 'model_state')
    expected, new_columns = model.encoder.state_dict(), {}
    for key, axis in STATE_AXIS.items():
        expected[key], new_columns[key] = expected[key].tensor_split([KNOWN], axis)
    check_state(expected, state, path)
    # new columns stay; with new channels the official script leaves the whole field embedding new
    if model.encoder.new_embedding:
        for key in 'space_bag.weight', 'space_bag.bias':
            state[key] = expected[key]
    for key, axis in STATE_AXIS.items():
        state[key] = torch.cat([state[key], new_columns[key].to(state[key])], axis)
    model.encoder.load_state_dict(state)
