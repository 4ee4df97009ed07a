"""
V-JEPA for physics: hide part of a clip, predict the embedding of what is hidden (Bardes et al., arXiv 2404.08471).

    clip (B, C, 16, H, W) --patches--> visible --encoder--> z --predictor(z, mask tokens)--> p  \
                                                                                                   mean |p - y|
                                       all ----teacher----> hidden tokens, layer-normed ---> y  /

VideoMAE's ViT with another target: not the pixels of the hidden tokens but what a teacher makes of them, which
sees the whole clip. The teacher is a moving average of the encoder (ema.py) and gets no gradient; that is what
keeps both from the constant embedding, which would be easy to predict. `embedding_std` and `embedding_rank` in
the log show if it does. With `--masks random` this and videomae.py differ by the target, and in `nano` by what
suits each: here smaller steps and a weak VICReg term.

Unlike V-JEPA's, the positions are VideoMAE's, a table over the flattened grid; blocks begin as VideoMAE's; and
what is probed is the encoder, which can be trained with labels, not the teacher that follows it.
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import RANK, WORLD, at_least, option, sent
from ema import check_momentum, move_teacher
from vicreg import covariance_loss, gather, in_full, variance_loss
from videomae import (Decoder, Encoder, ViTOptions, check_sizes, encoder_size, heads_of, initialise, patchify,
                      positions, take, tube_masks)

TITLE = 'V-JEPA'
TERMS = {'error': 'prediction', 'std': 'variance', 'cov': 'covariance'}  # what the log's terms are in pictures
SHORT, LONG = (8, 0.15), (2, 0.70)       # V-JEPA's two block masks: how many blocks, share of the places of each
DISTANCES = {'l1': F.l1_loss, 'smooth-l1': F.smooth_l1_loss, 'l2': F.mse_loss}


@dataclass
class Options(ViTOptions):
    masks: str = option('block', 'what is hidden: block, two masks of spatial blocks in all frames; random, the '
                                 'same random places in all frames, as VideoMAE does; temporal, the last frames')
    mask_ratio: float = option(0.9, 'share that random and temporal masks hide')
    predictor_width: int = option(192, 'width of the predictor, 64 a head')
    predictor_depth: int = option(12, 'blocks of the predictor')
    distance: str = option('l1', 'of prediction and target: ' + ', '.join(DISTANCES))
    momentum: tuple = option((0.996, 1.0), "the teacher's, at the start and, linearly, at the end")
    vicreg: float = option(0.0, 'weight of 25 variance + 1 covariance term (vicreg.py) of the visible tokens')


PRESETS = {
    'paper': dict(noise=0.0, batch=128, lr=1.5e-4),
    'nano': dict(size='nano', patch=8, predictor_width=64, predictor_depth=2, mask_ratio=0.75, vicreg=0.01, batch=8,
                 micro_batch=8, steps=9600, lr=7e-4, warmup_epochs=0.3)}


def check(options, height, width):
    """Raise ValueError if the options, or fields of this size, will not do."""
    at_least(options, 1, 'predictor_width')
    at_least(options, 0, 'predictor_depth', 'vicreg')
    if options.masks not in MASKS:
        raise ValueError(f'--masks is {", ".join(MASKS)}, not {options.masks!r}')
    if options.distance not in DISTANCES:
        raise ValueError(f'--distance is {", ".join(DISTANCES)}, not {options.distance!r}')
    check_momentum(options.momentum)
    check_sizes(options, options.predictor_width, height, width)
    grid = 16 // 2, height // options.patch, width // options.patch
    MASKS[options.masks](1, grid, options.mask_ratio, torch.Generator().manual_seed(0))


def build(options, inputs):
    return VJEPA(len(inputs.channels), *encoder_size(options), options.patch, masks=options.masks,
                 mask_ratio=options.mask_ratio, predictor_width=options.predictor_width,
                 predictor_depth=options.predictor_depth, distance=options.distance, momentum=options.momentum,
                 vicreg=options.vicreg)


# ---------------------------------------------------------------------------------------------
# masks: True where a token is hidden, for 2 * batch clips, (2, batch, N), N in order t, h, w of the grid

def random_masks(batch, grid, ratio, generator):
    """VideoMAE's tubes: the same random places in all frames. One mask."""
    slots, h, w = grid
    return [tube_masks(batch, h * w, ratio, generator).view(2, batch, -1).repeat(1, 1, slots)]


def temporal_masks(batch, grid, ratio, generator):
    """The last frames, everywhere: predict the future. One mask. Raises ValueError if they are none, or all."""
    slots, h, w = grid
    hidden = round(ratio * slots)
    if not 0 < hidden < slots:
        raise ValueError(f'mask ratio {ratio} hides {hidden} of {slots} time slots: some must be hidden and some '
                         f'visible')
    return [(torch.arange(slots) >= slots - hidden).repeat_interleave(h * w).repeat(2, batch, 1)]


def block_masks(batch, grid, ratio, generator):
    """V-JEPA's two: in all frames, the union of some blocks of places. `ratio` has no part in it."""
    return [union_of_blocks(batch, grid, *kind, generator) for kind in (SHORT, LONG)]


def union_of_blocks(batch, grid, blocks, share, generator):
    """Tubes over `blocks` rectangles, each of about a `share` of the places: (2, batch, N).

    All are of one size, with an aspect ratio of 0.75 to 1.5; where they are is drawn for each clip, and again if
    they hide it all. Raises ValueError on a grid of one place.
    """
    slots, H, W = grid
    if H * W < 2:
        raise ValueError(f'a grid of {H} x {W} patches has no block to hide: choose a smaller --patch')
    h, w = block_size(H, W, share, 0.75 + 0.75 * torch.rand((), generator=generator).item())
    y, x = torch.arange(H)[:, None], torch.arange(W)
    hidden = torch.ones(2 * batch, H, W, dtype=torch.bool)
    while (full := hidden.flatten(1).all(1)).any():
        n = int(full.sum())
        top = torch.randint(H - h + 1, (n, blocks, 1, 1), generator=generator)
        left = torch.randint(W - w + 1, (n, blocks, 1, 1), generator=generator)
        hidden[full] = ((y >= top) & (y < top + h) & (x >= left) & (x < left + w)).any(1)
    return hidden.view(2, batch, H * W).repeat(1, 1, slots)


def block_size(H, W, share, aspect):
    """Height and width of a block of about a `share` of H x W places, h / w about `aspect`; never all of them."""
    area = int(share * H * W)
    h, w = min(H, max(1, round((area * aspect)**0.5))), min(W, max(1, round((area / aspect)**0.5)))
    return (h, w) if (h, w) != (H, W) else (h - 1, w) if H > 1 else (h, w - 1)


def visible_and_hidden(mask, generator):
    """Indices of tokens, ascending: (2, batch, n visible), (2, batch, m hidden), for a mask (2, batch, N).

    n and m are the least that any clip has (of all ranks: more GPUs, fewer tokens; of two blocks of 70% on 14 x 14, 19%
    of the tokens are visible, and 7% are left with 8 windows); what others have more, drawn at random, is neither seen
    nor predicted.
    """
    order = (torch.rand(mask.shape, generator=generator) + mask).argsort(-1)           # visible tokens come first
    n, m = (~mask).sum(-1).min(), mask.sum(-1).min()
    return order[..., :n].sort(-1)[0], order[..., mask.shape[-1] - m:].sort(-1)[0]


MASKS = {'block': block_masks, 'random': random_masks, 'temporal': temporal_masks}


# ---------------------------------------------------------------------------------------------
# the network

class Predictor(nn.Module):
    """Visible tokens (B, n, dim) and where they stand -> the embeddings (B, m, dim) predicted at the hidden ones.

    A narrow transformer of visible tokens and, at each hidden place, the same mask token, with their positions.
    """

    def __init__(self, dim, width, depth, heads):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder = Decoder(width, depth, heads, outputs=dim)

    def forward(self, z, visible, hidden, tokens):
        position = positions(tokens, self.mask_token.shape[-1], self.mask_token.dtype, z.device)       # (N, width)
        x = torch.cat([self.embed(z) + position[visible], self.mask_token + position[hidden]], 1)
        return self.decoder(x, hidden.shape[1])


class VJEPA(nn.Module):
    """Encoder, teacher, predictor. forward(context, target) -> {'loss', 'error'} and, if they count, 'std', 'cov'.

    The two halves of a window are two clips, each predicted on its own. The visible tokens of the last forward are
    kept, detached, in `self.embedding` for the log. Raises ValueError if a width is not divisible by its heads.
    """

    def __init__(self, channels, width=384, depth=12, heads=6, patch=16, tubelet=2, masks='block', mask_ratio=0.9,
                 predictor_width=192, predictor_depth=12, distance='l1', momentum=(0.996, 1.0), vicreg=0.0):
        super().__init__()
        self.patch, self.tubelet, self.momentum, self.vicreg = patch, tubelet, momentum, vicreg
        self.masks, self.mask_ratio, self.distance = MASKS[masks], mask_ratio, DISTANCES[distance]
        self.encoder = Encoder(channels, width, depth, heads, patch, tubelet)
        self.predictor = Predictor(width, predictor_width, predictor_depth, heads_of(predictor_width))
        initialise(self.predictor.mask_token, self.encoder, self.predictor)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def undecayed(self, name, parameter):
        """No weight decay on biases, norms and the mask token."""
        return parameter.ndim == 1 or name.endswith('mask_token')

    def after_step(self, progress):
        move_teacher(self.teacher, self.encoder, self.momentum, progress)

    @torch.no_grad()
    def targets(self, patches):
        """What the teacher makes of all tokens, (B, N, D), each with mean 0 and variance 1 over D."""
        y = self.teacher(patches)
        return F.layer_norm(y, y.shape[-1:])

    def forward(self, context, target, generator=None):
        """context, target: (B, C, 16, H, W). `generator` draws the masks, in the same state on all ranks."""
        x = torch.cat([context, target])                                 # (2B, C, 16, H, W)
        B, _, T, H, W = context.shape
        patches = patchify(x, self.tubelet, self.patch)                  # (2B, N, pixels, C)
        y = self.targets(patches)                                        # (2B, N, D)
        grid, terms = (T // self.tubelet, H // self.patch, W // self.patch), []
        for mask in self.masks(WORLD * B, grid, self.mask_ratio, generator):           # of all ranks: (2, WORLD * B, N)
            visible, hidden = (sent(i[:, RANK * B:(RANK + 1) * B].flatten(0, 1), x.device)
                               for i in visible_and_hidden(mask, generator))           # (2B, n), (2B, m)
            z = self.encoder(patches, visible)                           # (2B, n, D)
            p = self.predictor(z, visible, hidden, patches.shape[1])     # (2B, m, D)
            terms.append({'error': self.distance(p, take(y, hidden))})
            if self.vicreg:
                with torch.autocast(x.device.type, enabled=False):       # statistics in full precision
                    rows = in_full(gather(z)).flatten(0, 1)              # (2 * WORLD * B * n, D)
                    terms[-1] |= {'std': variance_loss(rows), 'cov': covariance_loss(rows)}
        self.embedding = z.detach()
        terms = {name: torch.stack([t[name] for t in terms]).mean() for name in terms[0]}
        loss = terms['error'] + self.vicreg * (25 * terms.get('std', 0) + terms.get('cov', 0))
        return {'loss': loss, **terms}

    def features(self, x):
        """All tokens: (B, C, 16, H, W) -> (B, N = 8 * H/patch * W/patch, D)."""
        return self.encoder(patchify(x, self.tubelet, self.patch))
