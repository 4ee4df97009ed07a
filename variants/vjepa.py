r"""
V-JEPA for physics: predict the embedding of the hidden part of a clip (arXiv 2404.08471).

    clip (B, C, 16, H, W) --patches--> visible --encoder--> z --predictor--> p   \
                                                                              mean |p - y|
                                       all ----teacher----> hidden tokens --> y  /

The target is what a teacher, which sees the whole clip, makes of the hidden tokens. The teacher is
a moving average of the encoder and gets no gradient: this prevents a constant embedding. The ViT,
positions and initial weights are VideoMAE's. Unlike V-JEPA's authors, we do not probe the teacher.

`--masks next` hides nothing. It predicts, as jepa.py does, the teacher's tokens of the next 16
frames from the encoder's of these, all of them, each at its own place.
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import FRAMES, RANK, WORLD, at_least, autocast, option
from jepa import check_momentum, move_teacher
from vicreg import covariance_loss, gather, in_full, variance_loss
from videomae import (Decoder, Encoder, ViTOptions, check_sizes, decoder_heads, encoder_size,
                      initialise, patchify, positions, take, tube_masks)

TITLE = 'V-JEPA'
TUBELET = 2                              # frames of a patch
SHORT, LONG = (8, 0.15), (2, 0.70)       # two block masks: number of blocks, share of each
DISTANCES = {'l1': F.l1_loss, 'smooth-l1': F.smooth_l1_loss, 'l2': F.mse_loss}

@dataclass
class Options(ViTOptions):
    masks: str = option('block', 'hide block: rectangles; random: places; temporal: last frames; '
                        'next: hide nothing, predict the next 16 frames')
    mask_ratio: float = option(0.9, 'share that random and temporal masks hide')
    predictor_width: int = option(192, 'width of the predictor, 64 a head')
    predictor_depth: int = option(12, 'blocks of the predictor')
    distance: str = option('l1', 'of prediction and target: ' + ', '.join(DISTANCES))
    momentum: tuple = option((0.996, 1.0), "the teacher's, at the start and, linearly, at the end")
    vicreg: float = option(0.0, 'weight of 25 variance + 1 covariance term of the visible tokens')
    std_coeff: float = option(25.0, 'weight of the variance term in --vicreg')

PRESETS = {
    'paper': dict(noise=0.0, batch=128, lr=1.5e-4),
    'nano': dict(size='nano', patch=8, predictor_width=64, predictor_depth=2, mask_ratio=0.75,
                 vicreg=0.01, batch=8, micro_batch=8, steps=9600, lr=7e-4, warmup_epochs=0.3),
    # the best ridge probe that others published for The Well's active_matter (docs/protocol.md)
    'real': dict(resolution=0, normalize=True, noise=0.0, stride=16,       # 4 windows of a run
                 masks='next', predictor_width=384, predictor_depth=6, distance='l2',
                 momentum=(0.996, 0.996), vicreg=0.01, std_coeff=50.0,     # our term is half theirs
                 batch=2, epochs=30.0, lr=3e-4, min_lr=1e-6, warmup_epochs=2.0, save_every=1000),
}

def check(options, inputs):
    """Raise ValueError if the options do not fit together, or not the fields of inputs.size."""
    at_least(options, 1, 'predictor_width')
    at_least(options, 0, 'predictor_depth', 'vicreg', 'std_coeff')
    check_momentum(options.momentum)
    check_sizes(options, options.predictor_width, inputs.size)
    for name, choices in ('masks', (*MASKS, 'next')), ('distance', DISTANCES):
        if getattr(options, name) not in choices:
            raise ValueError(f'--{name} is {", ".join(choices)}, not {getattr(options, name)!r}')

    # the masks refuse a grid or a ratio that leaves nothing to hide, or nothing to see
    if options.masks == 'next':
        if not inputs.paired:
            raise ValueError('--masks next predicts the same places: it needs --views paired')
        return
    grid = FRAMES // TUBELET, *(side // options.patch for side in inputs.size)
    MASKS[options.masks](1, grid, options.mask_ratio, torch.Generator().manual_seed(0))

def build(options, inputs):
    return VJEPA(len(inputs.channels), **vars(options))

# --- lists of masks (2, batch, N), true where a token is hidden, N in order of the grid (t, h, w)
def random_masks(batch, grid, ratio, generator):
    """VideoMAE's tubes: the same random places in all frames. One mask."""
    slots, h, w = grid
    return [tube_masks(batch, h * w, ratio, generator).view(2, batch, -1).repeat(1, 1, slots)]

def temporal_masks(batch, grid, ratio, generator):
    """The last frames, everywhere. One mask."""
    slots, h, w = grid
    hidden = round(ratio * slots)
    if not 0 < hidden < slots:
        raise ValueError(f'mask ratio {ratio} hides {hidden} of {slots} time slots: some must be '
                         f'hidden and some visible')
    return [(torch.arange(slots) >= slots - hidden).repeat_interleave(h * w).repeat(2, batch, 1)]

def block_masks(batch, grid, ratio, generator):
    """V-JEPA's two: in all frames, the union of some blocks of places. `ratio` plays no part."""
    return [union_of_blocks(batch, grid, *kind, generator) for kind in (SHORT, LONG)]

MASKS = {'block': block_masks, 'random': random_masks, 'temporal': temporal_masks}

def union_of_blocks(batch, grid, blocks, share, generator):
    """Tubes over `blocks` rectangles, each of about a `share` of the places: (2, batch, N)."""
    slots, H, W = grid
    if H * W < 2:
        raise ValueError(f'a grid of {H} x {W} patches has no block to hide: '
                         f'choose a smaller --patch')
    aspect = 0.75 + 0.75 * torch.rand((), generator=generator).item()
    h, w = block_size(H, W, share, aspect)               # of all rectangles
    y, x = torch.arange(H)[:, None], torch.arange(W)

    # draw the top left corners, again where nothing would be visible
    hidden = torch.ones(2 * batch, H, W, dtype=torch.bool)
    while (full := hidden.flatten(1).all(1)).any():
        n = int(full.sum())
        top = torch.randint(H - h + 1, (n, blocks, 1, 1), generator=generator)
        left = torch.randint(W - w + 1, (n, blocks, 1, 1), generator=generator)
        hidden[full] = ((y >= top) & (y < top + h) & (x >= left) & (x < left + w)).any(1)
    return hidden.view(2, batch, H * W).repeat(1, 1, slots)

def block_size(H, W, share, aspect):
    """(h, w) of a block of about `share` of H x W places, h / w about `aspect`; never the whole."""
    area = int(share * H * W)
    h = min(H, max(1, round((area * aspect)**0.5)))
    w = min(W, max(1, round((area / aspect)**0.5)))
    if (h, w) == (H, W):
        return (h - 1, w) if H > 1 else (h, w - 1)
    return h, w

def visible_and_hidden(mask, generator):
    """mask (2, batch, N) -> indices, ascending: (2, batch, n visible), (2, batch, m hidden)."""
    # a random order, visible tokens first; a clip with more than the least n or m loses the rest
    order = (torch.rand(mask.shape, generator=generator) + mask).argsort(-1)
    n, m = (~mask).sum(-1).min(), mask.sum(-1).min()
    return order[..., :n].sort(-1)[0], order[..., mask.shape[-1] - m:].sort(-1)[0]

class Predictor(nn.Module):
    """Visible tokens (B, n, dim), and a mask token at each hidden place -> those (B, m, dim)."""
    def __init__(self, dim, width, depth, heads):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder = Decoder(width, depth, heads, outputs=dim)

    def forward(self, z, visible, hidden, tokens):
        position = positions(tokens, self.mask_token.shape[-1], self.mask_token.dtype, z.device)
        x = torch.cat([self.embed(z) + position[visible], self.mask_token + position[hidden]], 1)
        return self.decoder(x, hidden.shape[1])

class VJEPA(nn.Module):
    """Encoder, teacher, predictor. forward(context, target) -> {'loss', 'error', 'std', 'cov'}."""
    def __init__(self, channels, **settings):
        super().__init__()
        o = self.options = Options(**settings)
        self.encoder = Encoder(channels, *encoder_size(o), o.patch, TUBELET)
        heads = decoder_heads(o.predictor_width)
        self.predictor = Predictor(self.encoder.dim, o.predictor_width, o.predictor_depth, heads)
        initialise(self.predictor.mask_token, self.encoder, self.predictor)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.predictor.mask_token.requires_grad_(o.masks != 'next')      # which has no use for it

    def undecayed(self, name, parameter):
        """No weight decay on biases, norms and the mask token."""
        return parameter.ndim == 1 or name.endswith('mask_token')

    def after_step(self, progress):
        """Move the teacher; progress: share of the run that is done."""
        move_teacher(self.teacher, self.encoder, self.options.momentum, progress)

    @torch.no_grad()
    def targets(self, patches):
        """What the teacher makes of all tokens, (B, N, D), each with mean 0 and variance 1."""
        y = self.teacher(patches)
        return F.layer_norm(y, y.shape[-1:])

    def predict_next(self, context, target):
        """All tokens (B, N, D) of these frames; of the next, as predicted and as the teacher's."""
        context, target = (patchify(x, TUBELET, self.options.patch) for x in (context, target))
        z, layers = self.encoder(context), self.predictor
        with torch.no_grad():
            y = self.teacher(target)                                     # its last layer is a norm
        x = layers.embed(z)                                              # (B, N, width)
        x = x + positions(*x.shape[1:], layers.mask_token.dtype, x.device)
        return z, layers.decoder(x, x.shape[1]), y

    def predict_hidden(self, context, target, generator):
        """Of each mask: visible tokens (2B, n, D), predicted hidden ones (2B, m, D), the same."""
        o, (B, _, T, H, W) = self.options, context.shape
        patches = patchify(torch.cat([context, target]), TUBELET, o.patch)     # (2B, N, pixels, C)
        y = self.targets(patches)                                        # (2B, N, D)

        # the clips of all ranks are masked together: (2, WORLD * B, N)
        grid = (T // TUBELET, H // o.patch, W // o.patch)
        for mask in MASKS[o.masks](WORLD * B, grid, o.mask_ratio, generator):
            # the tokens of this rank's clips: (2B, n) and (2B, m)
            visible, hidden = (i[:, RANK * B:(RANK + 1) * B].flatten(0, 1).to(patches.device)
                               for i in visible_and_hidden(mask, generator))
            # predict the hidden embeddings from the visible ones
            z = self.encoder(patches, visible)                           # (2B, n, D)
            p = self.predictor(z, visible, hidden, patches.shape[1])     # (2B, m, D)
            yield z, p, take(y, hidden)

    def forward(self, context, target, generator=None):
        """context, target: (B, C, 16, H, W). `generator`: in the same state on all ranks."""
        o, losses = self.options, []
        predictions = (self.predict_hidden(context, target, generator) if o.masks != 'next' else
                       [self.predict_next(context, target)])
        for z, p, y in predictions:
            terms = {'error': DISTANCES[o.distance](p, y)}
            # VICReg's two terms against collapse
            if o.vicreg:
                with autocast(z.device):                                 # in full precision
                    rows = in_full(gather(z)).flatten(0, 1)              # (WORLD * clips * n, D)
                    terms |= {'std': variance_loss(rows), 'cov': covariance_loss(rows)}
            losses.append(terms)

        # the mean of each term over the masks; for logs, the last one's visible tokens
        self.embedding = z.detach()
        terms = {name: torch.stack([one[name] for one in losses]).mean() for name in losses[0]}
        against_collapse = o.std_coeff * terms.get('std', 0) + terms.get('cov', 0)
        return {'loss': terms['error'] + o.vicreg * against_collapse, **terms}

    def features(self, x):
        """All tokens: (B, C, 16, H, W) -> (B, N = 8 * H/patch * W/patch, D)."""
        return self.encoder(patchify(x, TUBELET, self.options.patch))
