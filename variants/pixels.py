"""
Pixels in place of latents: JEPA's encoder and predictor, but what is predicted are the next 16 frames themselves.

    context (B, C, 16, H, W) --encoder--> z --predictor--> p --decoder--> pixels   \
                                                                                      mean (pixels - x)^2
    target  (B, C, 16, H, W) --patches, normalised--------------------> x          /

Encoder and predictor are jepa.py's, and so is the data that JEPA gets with `--views paired`: the pair differs by the
target, and by what its loss needs (JEPA's z-scores, which keep it from collapsing; here no noise, which would be in
the target too). A light decoder, thrown away afterwards, turns each predicted embedding into the patches of its
16 x 16 pixels. As in videomae.py, whose patches these are, `low`, `mid` and `high` say how much of each scale the
prediction misses.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn

import encoders
from common import at_least, option
from encoders import EncoderOptions, build_encoder, check_encoder
from jepa import Predictor
from videomae import TERMS, missed, normalized_pixels, patchify  # noqa: F401 (TERMS: what the log's are in pictures)

TITLE = 'pixels'
ANY_SIZE = PAIRED = True


@dataclass
class Options(EncoderOptions):
    patch: int = option(8, 'side of a patch, which is two frames long, as in VideoMAE: pixels are normalised in it')
    decoder_width: int = option(128, 'width of the decoder')
    residual: bool = option(False, 'predict the change of the embedding, not all of it')


PRESETS = {'paper': dict(patch=16, noise=0.0),
           'nano': encoders.NANO | dict(views='paired', residual=True, lr=3e-3),
           ('nano', 'shear_flow'): encoders.NANO_FLUIDS, ('nano', 'rayleigh_benard'): encoders.NANO_FLUIDS}


def check(options, height, width):
    """Raise ValueError if the options, or fields of this size, will not do."""
    check_encoder(options, height, width)
    at_least(options, 1, 'patch', 'decoder_width')
    if 16 % options.patch:
        raise ValueError(f'--patch must divide the 16 pixels of a token, not be {options.patch}')


def build(options, inputs):
    return Pixels(len(inputs.channels), **vars(options))


class Decoder(nn.Module):
    """Predicted embeddings (B, D, h, w) -> patches (B, 8 * k * k * h * w, outputs), in order t, y, x; k = 16 / patch.

    A token stands for 16 frames of 16 x 16 pixels, 8 * k * k patches: a layer and a code of the place tell them
    apart, a second makes the pixels.
    """

    def __init__(self, dim, width, patch, outputs):
        super().__init__()
        self.k = 16 // patch
        self.embed = nn.Linear(dim, width)
        self.place = nn.Parameter(0.02 * torch.randn(8, self.k, self.k, width))
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs))

    def forward(self, p):
        x = self.embed(p.movedim(1, -1))                                 # (B, h, w, width)
        x = x[:, None, :, None, :, None] + self.place[:, None, :, None]  # (B, 8, h, k, w, k, width)
        return self.mix(x).flatten(1, 5)


class Pixels(nn.Module):
    """Encoder, predictor, decoder. forward(context, target) -> {'loss', 'low', 'mid', 'high'}, the last three detached.

    context, target: (B, C, 16, H, W), at one place, one after the other. The last context embedding is kept,
    detached, in `self.embedding` for the log. `encoder`: the encoder's settings, as in EncoderOptions.
    """

    def __init__(self, channels, patch=8, decoder_width=128, residual=False, layer_scale=1e-6, **encoder):
        super().__init__()
        self.patch, self.residual = patch, residual
        self.encoder = build_encoder(channels, layer_scale=layer_scale, **encoder)
        self.predictor = Predictor(self.encoder.dim, layer_scale)
        self.decoder = Decoder(self.encoder.dim, decoder_width, patch, 2 * patch * patch * channels)

    def predict(self, context):
        """Normalised pixels of the next frames, patch by patch: (B, N, pixels * C)."""
        z = self.encoder(context)                                        # (B, D, h, w)
        self.embedding = z.detach()
        return self.decoder(z + self.predictor(z) if self.residual else self.predictor(z))

    def forward(self, context, target, generator=None):
        x = normalized_pixels(patchify(target, 2, self.patch))           # (B, N, pixels * C)
        error = self.predict(context) - x                                # at least float32
        return {'loss': error.square().mean(), **missed(error, x, self.patch, target.shape[1])}
