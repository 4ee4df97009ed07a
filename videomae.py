"""
VideoMAE for physics: hide nine tenths of a clip, predict its pixels from the rest (Tong et al., NeurIPS 2022).

    clip (B, C, 16, H, W) --cut into tubelets--> patches --hide 90%--> visible --encoder--> z
                                                   |                                        |
                                                   +--> normalised pixels <--MSE-- decoder(z, mask tokens)

The encoder, a ViT, sees the visible tokens only; a light decoder fills in the hidden ones and is thrown
away after pretraining. The mask is a tube: the same places are hidden in all frames, so that nothing can
be copied from a neighbouring frame. Where JEPA predicts an embedding, this reconstructs every pixel,
small scales and noise included: `low`, `mid` and `high` in the log say how much of each scale it misses.
Parameter names are the official code's (MCG-NJU/VideoMAE), so its checkpoints load.
"""
import argparse
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common import at_least, check_state, option, published_state, sent

TITLE = 'VideoMAE'
PAPER = {'active_matter': 0.160, 'shear_flow': 0.67, 'rayleigh_benard': 0.18}          # table 1, attentive probe
PAPER_PROBE = {'shear_flow': dict(noise=0.1, dropout=0.1)}                # as its probe was trained there
TERMS = {'low': 'missed of long waves', 'mid': 'of shorter', 'high': 'of short'}         # of the log, in pictures
SIZES = {'nano': (64, 4, 2), 'tiny': (192, 12, 3), 'small': (384, 12, 6)}              # width, depth, heads


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
    """The defaults are the paper's."""
    mask_ratio: float = option(0.9, 'share of the patches that is hidden')
    decoder_width: int = option(192, 'width of the decoder, 64 a head')
    decoder_depth: int = option(4, 'blocks of the decoder')


PRESETS = {
    # its target is the pixels: no noise on them. A window is two clips, so this is the paper's batch of 256
    'paper': dict(noise=0.0, batch=128, lr=1.5e-4, min_lr=1e-5),
    'nano': dict(size='nano', patch=8, decoder_width=64, decoder_depth=2, mask_ratio=0.75, lr=1.5e-3,
                 warmup_epochs=0.3)}


def encoder_size(options):
    """(width, depth, heads): those given, or else as the named size has them."""
    if options.size not in SIZES:
        raise ValueError(f'no size {options.size!r}: choose from {", ".join(SIZES)}')
    at_least(options, 0, 'width', 'depth', 'heads')
    own = options.width, options.depth, options.heads
    return tuple(mine or default for mine, default in zip(own, SIZES[options.size]))


def check(options, height, width):
    """Raise ValueError if the options, or fields of this size, will not do."""
    at_least(options, 1, 'decoder_width')
    at_least(options, 0, 'decoder_depth')
    check_sizes(options, options.decoder_width, height, width)
    hidden_places(height * width // options.patch**2, options.mask_ratio)


def check_sizes(options, light, height, width):
    """Raise ValueError if heads do not divide widths, also that of the `light` decoder, or patches the fields."""
    at_least(options, 1, 'patch')
    of_encoder, _, heads = encoder_size(options)
    for own, divisor in (of_encoder, heads), (light, heads_of(light)):
        if own % divisor:
            raise ValueError(f'width {own} is not divisible by {divisor} heads')
    if height % options.patch or width % options.patch:
        raise ValueError(f'the patches need sides divisible by {options.patch}, not {height} x {width}: choose another '
                         f'--resolution, --crop or --patch')


def heads_of(width):
    """Of a light decoder: 64 channels each."""
    return max(1, width // 64)


def build(options, inputs):
    return VideoMAE(len(inputs.channels), *encoder_size(options), options.patch, mask_ratio=options.mask_ratio,
                    decoder_width=options.decoder_width, decoder_depth=options.decoder_depth,
                    decoder_heads=heads_of(options.decoder_width))


# ---------------------------------------------------------------------------------------------
# clips, patches, positions and masks

def patchify(x, tubelet, patch):
    """Fields (B, C, T, H, W) -> patches (B, N, tubelet * patch * patch, C), N in order t, h, w.

    Raises ValueError if T is not divisible by `tubelet`, or H or W by `patch`.
    """
    B, C, T, H, W = x.shape
    if T % tubelet or H % patch or W % patch:
        raise ValueError(f'patches of {tubelet} frames and {patch} x {patch} pixels do not tile '
                         f'{T} frames of {H} x {W}')
    x = x.reshape(B, C, T // tubelet, tubelet, H // patch, patch, W // patch, patch)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)                                # (B, t, h, w, tubelet, patch, patch, C)
    return x.reshape(B, -1, tubelet * patch * patch, C)


def unpatchify(patches, shape, tubelet, patch):
    """The inverse of `patchify`: patches of a clip of `shape` (B, C, T, H, W) -> (B, C, T, H, W)."""
    B, C, T, H, W = shape
    x = patches.view(B, T // tubelet, H // patch, W // patch, tubelet, patch, patch, C)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(shape)


def take(x, where):
    """Rows `where` (B, n) of every sample of x (B, N, ...) -> (B, n, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], where]


@lru_cache(maxsize=16)
def positions(tokens, width, dtype=torch.float32, device=None):
    """Fixed position table (tokens, width): columns 2i and 2i + 1 are sin and cos of n / 10000^(2i / width).

    n is the token's index in order t, h, w: a table for a grid of another size is another table. Computed
    in float64 and rounded to float32, as in the official code.
    """
    i = torch.arange(width) // 2
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] / 10000**(2 * i.double() / width)
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return table.float().to(device, dtype, non_blocking=True)


def hidden_places(places, mask_ratio):
    """How many of the places of a frame are hidden; ValueError if that is none, or all."""
    hidden = int(mask_ratio * places)
    if not 0 < hidden < places:
        raise ValueError(f'mask ratio {mask_ratio} hides {hidden} of {places} patches: '
                         'some must be hidden and some visible')
    return hidden


def tube_masks(batch, places, mask_ratio, generator=None, rank=0, world=1):
    """True where a place is hidden, in all frames: (2 * batch, places), `int(mask_ratio * places)` per clip.

    For the clips cat([context, target]) of `batch` windows. Under DDP the masks of the global batch are drawn
    on every rank, from a `generator` in the same state, and this rank's part is returned: together the ranks
    hide what one process would. Raises ValueError if nothing would be hidden, or nothing visible.
    """
    hidden = hidden_places(places, mask_ratio)
    order = torch.rand(2, world * batch, places, generator=generator).argsort(-1)      # random permutations
    return (order < hidden)[:, rank * batch:(rank + 1) * batch].flatten(0, 1)


def tube_tokens(chosen, slots):
    """Indices (B, slots * n) of the tokens of all time slots at the places chosen, (B, places), n in each row."""
    B, places = chosen.shape
    where = chosen.nonzero()[:, 1].view(B, 1, -1)                        # (B, 1, n)
    return (where + places * torch.arange(slots, device=chosen.device)[:, None]).flatten(1)


@torch.no_grad()
def normalized_pixels(patches):
    """The target: patches (..., pixels, C) with mean 0 and variance 1 per patch and channel -> (..., pixels * C).

    Variance divides by pixels - 1, and 1e-6 is added to the standard deviation, as in the official code.
    """
    x = patches - patches.mean(dim=-2, keepdim=True)
    variance = x.square().sum(dim=-2, keepdim=True) / (x.shape[-2] - 1)
    return (x / (variance.sqrt() + 1e-6)).flatten(-2)


@torch.no_grad()
def missed(error, target, patch, channels):
    """What a prediction misses of its patches at each scale, relative to what is there -> {'low', 'mid', 'high'}.

    error, target: (B, n, tubelet * patch * patch * channels), of normalised patches, over all ranks. Cosine transforms
    inside each patch: its edges are no edges of the field. low: waves longer than the patch, and its mean; mid: longer
    than half of it; high: the rest. 1 is as bad as to predict flat patches. It is for the log: of every third patch.
    """
    k = torch.arange(patch, dtype=torch.float64, device=error.device)
    basis = torch.cos(torch.pi / patch * (k + 0.5) * k[:, None]).to(error) * (2 / patch)**0.5            # (wave, pixel)
    basis[0] /= 2**0.5
    waves = torch.hypot(k[:, None], k)                                   # half waves to a patch, (wave, wave)
    bands = torch.stack([waves < 2, (waves >= 2) & (waves < 4), waves >= 4]).to(error)
    parts = []
    for x in error, target:
        x = torch.einsum('ky,lx,bntyxc->bntklc', basis, basis, x[:, ::3].unflatten(-1, (-1, patch, patch, channels)))
        parts.append((bands * x.square().sum((0, 1, 2, 5))).sum((1, 2)))
    energy = torch.stack(parts)                                          # (2, 3)
    if dist.is_initialized():
        dist.all_reduce(energy)
    return dict(zip(('low', 'mid', 'high'), energy[0] / energy[1].clamp(min=1e-20)))


# ---------------------------------------------------------------------------------------------
# the networks

class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D). Keys have no bias: the softmax would ignore it."""

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
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                             # (B, heads, N, D/heads) each
        x = F.scaled_dot_product_attention(q, k, v)                      # (B, heads, N, D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)), hidden width four times."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width)))

    def forward(self, x):                                                # (B, N, D)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Patches (B, n, pixels, C) -> (B, n, width): a convolution whose stride is its kernel, on chosen patches only."""

    def __init__(self, channels, width, patch, tubelet):
        super().__init__()
        kernel = (tubelet, patch, patch)
        self.proj = nn.Conv3d(channels, width, kernel_size=kernel, stride=kernel)

    def forward(self, patches):
        weight = self.proj.weight.movedim(1, -1).flatten(1)              # (D, pixels * C)
        return F.linear(patches.flatten(2), weight, self.proj.bias)


class Encoder(nn.Module):
    """ViT: patches (B, N, pixels, C) from `patchify` -> tokens (B, N, width) after the final norm.

    With `visible` (B, n), only these tokens are embedded and attend each other: (B, n, width).
    Raises ValueError if `width` is not divisible by `heads`.
    """

    def __init__(self, channels, width=384, depth=12, heads=6, patch=16, tubelet=2):
        super().__init__()
        self.dim = width
        self.patch_embed = PatchEmbed(channels, width, patch, tubelet)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, patches, visible=None):
        B, N, _, _ = patches.shape
        position = positions(N, self.dim, self.norm.weight.dtype, patches.device)      # (N, D)
        if visible is not None:
            patches, position = take(patches, visible), position[visible]              # (B, n, pixels, C), (B, n, D)
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
    for layer in (layer for network in networks for layer in network.modules()):
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class VideoMAE(nn.Module):
    """Masked autoencoder. forward(context, target) -> {'loss', 'low', 'mid', 'high'}.

    The two halves of a window are two clips, each reconstructed on its own. Defaults are the paper's
    (arXiv 2603.13227); for its "tiny", VideoMAE(channels, *SIZES['tiny']). Any resolution and number of
    frames that the patches tile will do. The visible tokens of the last forward are kept, detached, in
    `self.embedding` for the log, (2B, D, T/tubelet, visible places). Raises ValueError if a width is not
    divisible by its heads.
    """

    def __init__(self, channels, width=384, depth=12, heads=6, patch=16, tubelet=2,
                 decoder_width=192, decoder_depth=4, decoder_heads=3, mask_ratio=0.9):
        super().__init__()
        self.patch, self.tubelet, self.mask_ratio = patch, tubelet, mask_ratio
        self.encoder = Encoder(channels, width, depth, heads, patch, tubelet)
        self.encoder_to_decoder = nn.Linear(width, decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder = Decoder(decoder_width, decoder_depth, decoder_heads, tubelet * patch * patch * channels)
        initialise(self.mask_token, self.encoder, self.decoder)          # what is between them keeps PyTorch's default

    def undecayed(self, name, parameter):
        """As VideoMAE is trained: no weight decay on biases, norms and the mask token."""
        return parameter.ndim == 1 or name == 'mask_token'

    def reconstruct(self, patches, masked):
        """Patches (B, N, pixels, C), masked (B, h * w) with equally many True in each row -> (prediction, hidden).

        hidden: indices (B, n) of the hidden tokens, ascending. prediction: their normalised pixels
        (B, n, pixels * C), pixel by pixel, channels innermost.
        """
        N, slots = patches.shape[1], patches.shape[1] // masked.shape[1]
        visible, hidden = (sent(tube_tokens(m, slots), patches.device) for m in (~masked, masked))
        z = self.encoder(patches, visible)                               # (B, N - n, D)
        self.embedding = z.detach().transpose(1, 2).unflatten(2, (slots, -1))
        position = positions(N, self.mask_token.shape[-1], self.mask_token.dtype, patches.device)
        tokens = torch.cat([self.encoder_to_decoder(z) + position[visible],
                            self.mask_token + position[hidden]], dim=1)  # (B, N, decoder width)
        return self.decoder(tokens, hidden.shape[1]), hidden

    def forward(self, context, target, generator=None):
        """context, target: (B, C, 16, H, W) -> {'loss', 'low', 'mid', 'high'}, the last three detached.

        loss: mean squared error of the normalised pixels of hidden patches. low, mid, high: the share of these
        pixels that is `missed` at a scale. `generator` draws the masks and must be in the same state on all ranks.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        x = torch.cat([context, target])                                 # (2B, C, 16, H, W)
        patches = patchify(x, self.tubelet, self.patch)                  # (2B, N, pixels, C)
        places = patches.shape[1] * self.tubelet // x.shape[2]
        masked = tube_masks(len(context), places, self.mask_ratio, generator, rank, world)
        prediction, hidden = self.reconstruct(patches, masked)           # (2B, n, pixels * C), (2B, n)
        pixels = normalized_pixels(take(patches, hidden))                # the same, at least float32
        error = prediction - pixels
        return {'loss': error.square().mean(), **missed(error, pixels, self.patch, x.shape[1])}

    def features(self, x):
        """All tokens: (B, C, 16, H, W) -> (B, N = 8 * H/patch * W/patch, D)."""
        return self.encoder(patchify(x, self.tubelet, self.patch))


def load_published(model, path):
    """Load a pretraining checkpoint of MCG-NJU/VideoMAE, {'model': state}, or a bare state dict, into `model`.

    Keys may begin with 'module.'. A state dict of an encoder alone loads into the encoder. Of a checkpoint
    with C' input channels instead of C, every input channel gets the mean of the patch embedding's C'
    channels times C'/C, so that their sum is kept, and the decoder's head stays as it is. Such changes are
    printed, in one line. Raises ValueError if the file is no checkpoint, or, naming the key, if anything is
    missing, unknown or of another shape; the model is then as before.
    """
    state = published_state(path, 'model', safe=[argparse.Namespace])      # the official run's flags: plain values
    own, notes = model.state_dict(), []
    if not any(k.startswith('encoder.') for k in state):
        state = {'encoder.' + k: v for k, v in state.items()}
        state.update((k, v) for k, v in own.items() if not k.startswith('encoder.'))
        notes.append('encoder only, the decoder stays as it is')
    stem = 'encoder.patch_embed.proj.weight'
    if stem in state and state[stem].ndim == 5 and state[stem].shape[1] != own[stem].shape[1]:
        there, here = state[stem].shape[1], own[stem].shape[1]
        state[stem] = (state[stem].mean(1, keepdim=True) * there / here).repeat(1, here, 1, 1, 1)
        state.update((k, own[k]) for k in ('decoder.head.weight', 'decoder.head.bias') if k in state)
        notes.append(f'each of the {here} channels embedded by the mean over its {there} channels x {there}/{here}, '
                     "the decoder's head stays as it is")
    check_state(own, state, path)
    model.load_state_dict(state)
    if notes:
        print(f'{path}: ' + '; '.join(notes))
