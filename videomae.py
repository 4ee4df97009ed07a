"""
VideoMAE for physics: predict the pixels of a clip from a tenth of them (Tong et al., NeurIPS 2022).

    clip (B, C, 16, H, W) --tubelets--> patches --hide 90%--> visible --encoder--> z
                                           |                                       |
                                           +--> normalised pixels <--MSE-- decoder(z, mask tokens)

A light decoder, thrown away afterwards, fills in what the encoder, a ViT, did not see: the same
places in all frames, so nothing is copied from other frames. Names are MCG-NJU/VideoMAE's.
"""
import argparse
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import RANK, WORLD, at_least, check_state, option, published_state

TITLE = 'VideoMAE'
SIZES = {'nano': (64, 4, 2), 'tiny': (192, 12, 3), 'small': (384, 12, 6)}    # width, depth, heads

@dataclass
class ViTOptions:
    """Of the encoder. The defaults are the paper's."""
    size: str = option('small', 'of the encoder: ' + ', '.join(SIZES))
    width: int = option(0, 'of the encoder; 0: as its size says')
    depth: int = option(0, 'blocks of the encoder; 0: as its size says')
    heads: int = option(0, 'of the encoder; 0: as its size says')
    patch: int = option(16, 'side of a tubelet, which is two frames long')

@dataclass
class Options(ViTOptions):
    mask_ratio: float = option(0.9, 'share of the patches that is hidden')
    decoder_width: int = option(192, 'width of the decoder, 64 a head')
    decoder_depth: int = option(4, 'blocks of the decoder')

PRESETS = {
    # no noise: it would be part of the target; 128 windows are the paper's batch of 256 clips
    'paper': dict(noise=0.0, batch=128, lr=1.5e-4, min_lr=1e-5),
    'nano': dict(size='nano', patch=8, decoder_width=64, decoder_depth=2, mask_ratio=0.75,
                 lr=1.5e-3, warmup_epochs=0.3),
}

def check(options, inputs):
    """Raise ValueError if the options do not fit together, or not the fields of inputs.size."""
    at_least(options, 1, 'decoder_width')
    at_least(options, 0, 'decoder_depth')
    check_sizes(options, options.decoder_width, inputs.size)
    # the masks refuse a ratio that leaves nothing to hide, or nothing to see
    H, W = inputs.size
    tube_masks(1, H * W // options.patch**2, options.mask_ratio, torch.Generator())

def check_sizes(options, decoder_width, size):
    """Raise ValueError if heads do not divide their widths, or patches the fields' size (H, W)."""
    at_least(options, 1, 'patch')
    encoder_width, _, heads = encoder_size(options)
    for width, n in (encoder_width, heads), (decoder_width, decoder_heads(decoder_width)):
        if width % n:
            raise ValueError(f'width {width} is not divisible by {n} heads')
    if size[0] % options.patch or size[1] % options.patch:
        raise ValueError(f'the patches need sides divisible by {options.patch}, not {size[0]} x '
                         f'{size[1]}: choose another --resolution, --crop or --patch')

def encoder_size(options):
    """(width, depth, heads): each as its option says, or, where that is 0, as the named size."""
    if options.size not in SIZES:
        raise ValueError(f'no size {options.size!r}: choose from {", ".join(SIZES)}')
    at_least(options, 0, 'width', 'depth', 'heads')
    width, depth, heads = SIZES[options.size]
    return options.width or width, options.depth or depth, options.heads or heads

def decoder_heads(width):
    """Of a light decoder: 64 channels each."""
    return max(1, width // 64)

def build(options, inputs):
    o, heads = options, decoder_heads(options.decoder_width)
    return VideoMAE(len(inputs.channels), *encoder_size(o), o.patch, decoder_width=o.decoder_width,
                    decoder_depth=o.decoder_depth, decoder_heads=heads, mask_ratio=o.mask_ratio)

def patchify(x, tubelet, patch):
    """Fields (B, C, T, H, W) -> patches (B, N, tubelet * patch * patch, C), N in order t, h, w."""
    B, C, T, H, W = x.shape
    if T % tubelet or H % patch or W % patch:
        raise ValueError(f'patches of {tubelet} frames and {patch} x {patch} pixels do not tile '
                         f'{T} frames of {H} x {W}')
    x = x.reshape(B, C, T // tubelet, tubelet, H // patch, patch, W // patch, patch)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)                # (B, t, h, w, tubelet, patch, patch, C)
    return x.reshape(B, -1, tubelet * patch * patch, C)

def take(x, index):
    """Rows `index` (B, n) of every sample of x (B, N, ...) -> (B, n, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]

@lru_cache(maxsize=16)
def positions(tokens, width, dtype=torch.float32, device=None):
    """Fixed table (tokens, width): columns 2i, 2i + 1 are sin, cos of n / 10000^(2i / width)."""
    i = torch.arange(width) // 2
    n = torch.arange(tokens, dtype=torch.float64)[:, None]
    angle = n / 10000**(2 * i.double() / width)          # (tokens, width), float64 as officially
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return table.float().to(device, dtype)

def tube_masks(batch, places, mask_ratio, generator=None, rank=0, world=1):
    """True where a place is hidden, in all frames: (2 * batch, places), for context and target."""
    hidden = int(mask_ratio * places)
    if not 0 < hidden < places:
        raise ValueError(f'mask ratio {mask_ratio} hides {hidden} of {places} patches: '
                         'some must be hidden and some visible')
    # under DDP all ranks draw the masks of the global batch, then each takes its part
    order = torch.rand(2, world * batch, places, generator=generator).argsort(-1)    # permutations
    return (order < hidden)[:, rank * batch:(rank + 1) * batch].flatten(0, 1)

def tube_tokens(chosen, slots):
    """Indices (B, slots * n) of the tokens of all time slots at n places, true in (B, places)."""
    B, places = chosen.shape
    place = chosen.nonzero()[:, 1].view(B, 1, -1)                        # (B, 1, n)
    return (place + places * torch.arange(slots, device=chosen.device)[:, None]).flatten(1)

@torch.no_grad()
def normalized_pixels(patches):
    """Patches (..., pixels, C) -> (..., pixels * C): mean 0, variance 1 in each patch, channel."""
    x = patches - patches.mean(dim=-2, keepdim=True)
    variance = x.square().sum(dim=-2, keepdim=True) / (x.shape[-2] - 1)
    return (x / (variance.sqrt() + 1e-6)).flatten(-2)

class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> same. Keys have no bias: the softmax ignores it."""
    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f'width {width} is not divisible by {heads} heads')
        self.heads = heads
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, N, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                             # (B, heads, N, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)                      # the same
        return self.proj(x.transpose(1, 2).reshape(B, N, D))

class Block(nn.Module):
    """Transformer block, pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). (B, N, D)."""
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width)))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

class PatchEmbed(nn.Module):
    """Patches (B, n, pixels, C) -> (B, n, width): a convolution whose stride is its kernel."""
    def __init__(self, channels, width, patch, tubelet):
        super().__init__()
        self.proj = nn.Conv3d(channels, width, (tubelet, patch, patch), (tubelet, patch, patch))

    def forward(self, patches):
        weight = self.proj.weight.movedim(1, -1).flatten(1)              # (D, pixels * C)
        return F.linear(patches.flatten(2), weight, self.proj.bias)

class Encoder(nn.Module):
    """ViT: patches (B, N, pixels, C) -> tokens (B, N, width), or of `visible` (B, n) alone."""
    def __init__(self, channels, width=384, depth=12, heads=6, patch=16, tubelet=2):
        super().__init__()
        self.dim = width
        self.patch_embed = PatchEmbed(channels, width, patch, tubelet)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, patches, visible=None):
        position = positions(patches.shape[1], self.dim, self.norm.weight.dtype, patches.device)
        if visible is not None:
            patches = take(patches, visible)                             # (B, n, pixels, C)
            position = position[visible]                                 # (B, n, D)
        return self.norm(self.blocks(self.patch_embed(patches) + position))

class Decoder(nn.Module):
    """Tokens (B, N, width) -> predictions (B, hidden, outputs) of the last `hidden` tokens."""
    def __init__(self, width, depth, heads, outputs):
        super().__init__()
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, outputs)

    def forward(self, x, hidden):
        return self.head(self.norm(self.blocks(x)[:, -hidden:]))

def initialise(mask_token, *networks):
    """As VideoMAE's: a small mask token, Xavier's uniform linear layers, their biases zero."""
    nn.init.trunc_normal_(mask_token, std=0.02, a=-0.02, b=0.02)
    for layer in nn.ModuleList(networks).modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

class VideoMAE(nn.Module):
    """Reconstructs context and target, each on its own: forward(context, target) -> {'loss'}."""
    def __init__(self, channels, width=384, depth=12, heads=6, patch=16, tubelet=2,
                 decoder_width=192, decoder_depth=4, decoder_heads=3, mask_ratio=0.9):
        super().__init__()
        self.patch, self.tubelet, self.mask_ratio = patch, tubelet, mask_ratio
        self.encoder = Encoder(channels, width, depth, heads, patch, tubelet)
        self.encoder_to_decoder = nn.Linear(width, decoder_width, bias=False)  # keeps PyTorch's
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        pixels = tubelet * patch * patch * channels
        self.decoder = Decoder(decoder_width, decoder_depth, decoder_heads, pixels)
        initialise(self.mask_token, self.encoder, self.decoder)

    def undecayed(self, name, parameter):
        """As VideoMAE is trained: no weight decay on biases, norms and the mask token."""
        return parameter.ndim == 1 or name == 'mask_token'

    def reconstruct(self, patches, masked):
        """Patches (B, N, pixels, C), masks (B, h * w) -> pixels of hidden tokens, their indices."""
        N = patches.shape[1]
        slots = N // masked.shape[1]
        visible, hidden = (tube_tokens(m, slots).to(patches.device) for m in (~masked, masked))

        # encode the visible tokens, and keep them for logs: (B, D, slots, visible places)
        z = self.encoder(patches, visible)                               # (B, N - n, D)
        self.embedding = z.detach().transpose(1, 2).unflatten(2, (slots, -1))

        # decode them with a mask token at each hidden place
        position = positions(N, self.mask_token.shape[-1], self.mask_token.dtype, patches.device)
        tokens = torch.cat([self.encoder_to_decoder(z) + position[visible],
                            self.mask_token + position[hidden]], dim=1)
        return self.decoder(tokens, hidden.shape[1]), hidden             # (B, n, pixels C), (B, n)

    def forward(self, context, target, generator=None):
        """context, target: (B, C, 16, H, W). `generator`: in the same state on all ranks."""
        patches = patchify(torch.cat([context, target]), self.tubelet, self.patch)  # (2B, N, ...)
        places = patches.shape[1] * self.tubelet // context.shape[2]
        masked = tube_masks(len(context), places, self.mask_ratio, generator, RANK, WORLD)

        # the error of the hidden patches, in at least float32
        prediction, hidden = self.reconstruct(patches, masked)           # (2B, n, pixels * C)
        error = prediction - normalized_pixels(take(patches, hidden))
        return {'loss': error.square().mean()}

    def features(self, x):
        """All tokens: (B, C, 16, H, W) -> (B, N = 8 * H/patch * W/patch, D)."""
        return self.encoder(patchify(x, self.tubelet, self.patch))

def load_published(model, path):
    """Load MCG-NJU/VideoMAE's checkpoint, or raise ValueError and leave the model as it was."""
    # the file also holds the official run's flags, in a Namespace
    state = published_state(path, 'model', safe=[argparse.Namespace])
    ours, notes = model.state_dict(), []

    # an encoder alone: the rest is as it was
    if not any(k.startswith('encoder.') for k in state):
        state = {'encoder.' + k: v for k, v in state.items()}
        state.update((k, v) for k, v in ours.items() if not k.startswith('encoder.'))
        notes.append('encoder only, the decoder stays as it is')

    # other channels: each gets the mean over theirs, scaled so that the sum over channels is kept
    stem = 'encoder.patch_embed.proj.weight'
    if stem in state and state[stem].ndim == 5 and state[stem].shape[1] != ours[stem].shape[1]:
        there, here = state[stem].shape[1], ours[stem].shape[1]
        state[stem] = (state[stem].mean(1, keepdim=True) * there / here).repeat(1, here, 1, 1, 1)
        state |= {k: ours[k] for k in ('decoder.head.weight', 'decoder.head.bias') if k in state}
        notes.append(f'each of the {here} channels embedded by the mean over its {there} channels '
                     f"x {there}/{here}, the decoder's head stays as it is")

    check_state(ours, state, path)
    model.load_state_dict(state)
    if notes:
        print(f'{path}: ' + '; '.join(notes))
