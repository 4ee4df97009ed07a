r"""
Pixels in place of embeddings: JEPA's networks, but they predict the next 16 frames themselves.

    context (B, C, 16, H, W) --encoder--> z --predictor--> p --decoder--> pixels   \
                                                                              mean (pixels - x)^2
    target  (B, C, 16, H, W) --patches, normalised----------------------> x    /

A light decoder makes pixels of each predicted embedding. JEPA with `--views paired` differs by the
target, by its z-scores against collapse, and by noise, which would be in the target here.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn

from common import at_least, option
from jepa import WIDTHS, EncoderOptions, Predictor, build_encoder, check_encoder
from videomae import normalized_pixels, patchify

TITLE = 'pixels'
ANY_SIZE = True             # a convolution takes fields of any size

@dataclass
class Options(EncoderOptions):
    patch: int = option(8, 'side of a patch, two frames long, in which pixels are normalised')
    decoder_width: int = option(128, 'width of the decoder')
    residual: bool = option(False, 'predict the change of the embedding, not all of it')

PRESETS = {                 # nano: the encoder of jepa.py's
    'paper': dict(patch=16, noise=0.0),
    'nano': dict(encoder='statistics', widths=WIDTHS['statistics'], layer_scale=1.0,
                 views='paired', residual=True, lr=1e-3),
    ('nano', 'shear_flow'): dict(rate=32.0), ('nano', 'rayleigh_benard'): dict(rate=32.0),
}

def check(options, inputs):
    """Raise ValueError if the options do not fit together, or not the fields and views."""
    check_encoder(options, inputs.size)
    at_least(options, 1, 'patch', 'decoder_width')
    if 16 % options.patch:
        raise ValueError(f'--patch must divide the 16 pixels of a token, not be {options.patch}')
    if not inputs.paired:
        raise ValueError(f'{TITLE} predicts the next frame at its place: it takes --views paired')

def build(options, inputs):
    return Pixels(len(inputs.channels), **vars(options))

class Decoder(nn.Module):
    """Embeddings (B, D, h, w) -> patches (B, 8 * h * k * w * k, outputs), in order t, y, x."""
    def __init__(self, dim, width, patch, outputs):
        super().__init__()
        self.k = 16 // patch                                             # patches along a token
        self.embed = nn.Linear(dim, width)
        self.place = nn.Parameter(0.02 * torch.randn(8, self.k, self.k, width))
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(),
                                 nn.Linear(width, outputs))

    def forward(self, p):
        x = self.embed(p.movedim(1, -1))                                 # (B, h, w, width)
        x = x[:, None, :, None, :, None] + self.place[:, None, :, None]  # (B, 8, h, k, w, k, width)
        return self.mix(x).flatten(1, 5)

class Pixels(nn.Module):
    """Encoder, predictor, decoder: forward(context, target) -> {'loss'}. settings: of Options."""
    def __init__(self, channels, **settings):
        super().__init__()
        o = Options(**settings)
        self.patch, self.residual = o.patch, o.residual
        self.encoder = build_encoder(channels, o)
        self.predictor = Predictor(self.encoder.dim, o.layer_scale)
        outputs = 2 * o.patch**2 * channels
        self.decoder = Decoder(self.encoder.dim, o.decoder_width, o.patch, outputs)

    def predict(self, context):
        """Normalised pixels of the next frames, patch by patch: (B, N, pixels * C)."""
        z = self.encoder(context)                                        # (B, D, h, w)
        self.embedding = z.detach()                                      # for logs
        p = self.predictor(z)
        return self.decoder(z + p if self.residual else p)

    def forward(self, context, target, generator=None):
        """The mean squared error of all normalised pixels, in at least float32."""
        x = normalized_pixels(patchify(target, 2, self.patch))           # (B, N, pixels * C)
        return {'loss': (self.predict(context) - x).square().mean()}
