"""
JEPA for physics: predict the embedding of the next 16 frames from the embedding of these 16.

    context (B, C, 16, H, W) --encoder--> z  --predictor--> p   \
                                                                  VICReg(p, z')
    target  (B, C, 16, H, W) --encoder-----------------------> z' /

One encoder (encoders.py: the paper's 3-D ConvNeXt, or a small one) and a small convolutional predictor,
trained together (arXiv 2603.13227). Nothing is reconstructed: what the loss keeps of the
fields is what helps to say where the embedding goes next. Module names are the official code's, so
its checkpoints load as they are. The `nano` preset is for small runs: a small encoder of another
kind, and as target any other 16 frames of the run. Other ways to keep the embedding from being
constant: `--loss sigreg`, `--loss infonce`, and `--target ema`, where a slow copy of the encoder
embeds the target.
"""
import copy
import functools
from dataclasses import dataclass, fields

import torch
import torch.nn as nn

import encoders
from common import at_least, check_state, option, published_state, sent
from encoders import Block, EncoderOptions, build_encoder, check_encoder
from ema import check_momentum, move_teacher
from infonce import infonce_loss_maps
from sigreg import sigreg_loss_maps
from vicreg import gather, standardize, vicreg_loss_maps

TITLE = 'JEPA'
PAPER = {'active_matter': 0.079, 'shear_flow': 0.38, 'rayleigh_benard': 0.13}          # table 1, attentive probe
ANY_SIZE = True                                                          # a convolution takes whole fields
TERMS = {'sim': 'invariance', 'std': 'variance', 'cov': 'covariance', 'sigreg': 'normality',
         'found': 'found'}                                               # what the log's terms are in pictures
LOSSES = {'vicreg': (vicreg_loss_maps, ('sim_coeff', 'std_coeff', 'cov_coeff', 'chunks')),           # and its options
          'sigreg': (sigreg_loss_maps, ('sigreg_coeff', 'directions')),
          'infonce': (infonce_loss_maps, ('temperature',))}


@dataclass
class Options(EncoderOptions):
    """The defaults are the paper's."""
    residual: bool = option(False, 'predict the change of the embedding, not all of it')
    loss: str = option('vicreg', 'loss of predicted and actual embedding: ' + ', '.join(LOSSES))
    sim_coeff: float = option(2.0, "weight of vicreg's invariance term")
    std_coeff: float = option(40.0, "weight of vicreg's variance term")
    cov_coeff: float = option(2.0, "weight of vicreg's covariance term")
    chunks: int = option(5, 'random chunks the rows of a batch are cut into for vicreg')
    sigreg_coeff: float = option(0.05, "share of sigreg's normality term; the rest is the invariance")
    directions: int = option(1024, 'random directions along which sigreg looks')
    temperature: float = option(0.5, 'temperature of --loss infonce')
    loss_rows: str = option('local', 'what the loss sees together: local, the windows of one process; global, of all')
    standardize: bool = option(False, 'z-score the embeddings before the loss, which settles its variance term')
    target: str = option('encoder', "what embeds the target: encoder, the context's own; ema, its slowly moving "
                                    'average, without gradient')
    momentum: tuple = option((0.996, 1.0), "momentum of --target ema's average, at the start and, linearly, at the end")


PRESETS = {'paper': {}, 'nano': encoders.NANO | dict(
               views='other-time', loss_rows='global', residual=True, sim_coeff=10.0, cov_coeff=4.0, chunks=1,
               standardize=True, lr=3e-3),
           ('nano', 'shear_flow'): encoders.NANO_FLUIDS, ('nano', 'rayleigh_benard'): encoders.NANO_FLUIDS}


def check(options, height, width):
    """Raise ValueError if the options, or fields of this size, will not do."""
    check_encoder(options, height, width)
    at_least(options, 1, 'chunks', 'directions')
    if not 0 <= options.sigreg_coeff <= 1:
        raise ValueError(f'--sigreg-coeff is a share, from 0 to 1, not {options.sigreg_coeff}')
    if options.loss not in LOSSES:
        raise ValueError(f'--loss is {", ".join(LOSSES)}, not {options.loss!r}')
    if options.loss_rows not in ('local', 'global'):
        raise ValueError(f'--loss-rows is local or global, not {options.loss_rows!r}')
    if options.temperature <= 0:
        raise ValueError(f'--temperature must be more than 0, not {options.temperature}')
    if options.target not in ('encoder', 'ema'):
        raise ValueError(f'--target is encoder or ema, not {options.target!r}')
    check_momentum(options.momentum)


def build(options, inputs):
    return JEPA(len(inputs.channels), paired=inputs.paired, **vars(options))


class Predictor(nn.Module):
    """(B, D, h, w) context embedding -> (B, D, h, w) predicted target embedding."""

    def __init__(self, dim, layer_scale=1e-6):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(dim, 2 * dim, kernel_size=2, padding=1),           # (B, 2D, h+1, w+1)
            Block(2 * dim, 2, layer_scale),
            nn.Conv2d(2 * dim, dim, kernel_size=2))                      # (B, D, h, w)

    def forward(self, z):
        return self.conv(z)


class JEPA(nn.Module):
    """Encoder, predictor and loss. forward(context, target) -> {'loss', and its terms}.

    context, target: (B, channels, 16, H, W), of one run; the paper's follow each other. `generator` draws what the
    loss needs and must be in the same state on all ranks. The last target embedding is kept, detached, in
    `self.embedding` for the log (with a teacher, the last context embedding). The defaults are the paper's. Small
    runs learn faster with three changes: `standardize` z-scores embeddings and predictions over the batch, which
    settles the variance term, so that no step is spent on inflating noise to meet it; `residual` predicts the change
    of the embedding; and `paired=False` says that context and target show different places, whose positions have no
    partner: they are matched at random. `settings`: of the encoder and of the loss, as in Options.
    """

    def __init__(self, channels, loss='vicreg', loss_rows='local', standardize=False, residual=False, paired=True,
                 target='encoder', momentum=(0.996, 1.0), layer_scale=1e-6, **settings):
        if unknown := settings.keys() - {f.name for f in fields(Options)}:
            raise TypeError(f'JEPA has no setting {", ".join(sorted(unknown))}')
        super().__init__()
        self.standardize, self.residual, self.paired, self.momentum = standardize, residual, paired, momentum
        self.gather = gather if loss_rows == 'global' else lambda z: z
        of_encoder = {f.name: settings[f.name] for f in fields(EncoderOptions) if f.name in settings}
        self.encoder = build_encoder(channels, layer_scale=layer_scale, **of_encoder)
        self.predictor = Predictor(self.encoder.dim, layer_scale)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False) if target == 'ema' else None
        function, names = LOSSES[loss]
        self.loss = functools.partial(function, **{name: settings[name] for name in names if name in settings})

    def embed_both(self, context, target):
        """Embeddings (B, D, h, w) of context and target."""
        if self.teacher is None:
            z, z_next = self.encoder(torch.cat([context, target])).chunk(2)
            self.embedding = z_next.detach()
        else:
            z = self.encoder(context)
            self.embedding = z.detach()
            with torch.no_grad():
                z_next = self.teacher(target)
        return z, z_next

    def forward(self, context, target, generator=None):
        z, z_next = map(self.gather, self.embed_both(context, target))   # (B or world * B, D, h, w)
        if self.standardize:
            z, z_next = standardize(z), standardize(z_next)
        p = self.predictor(z)                                            # the same
        if self.residual:
            p = z + p
        if self.standardize:
            p = standardize(p)
        if not self.paired:
            partner = sent(torch.randperm(z[0, 0].numel(), generator=generator), z.device)
            z_next = z_next.flatten(2)[:, :, partner].view_as(z_next)
        with torch.autocast(p.device.type, enabled=False):               # statistics in full precision
            return self.loss(p, z_next, generator=generator)

    def after_step(self, progress):
        """Move the teacher, if there is one."""
        if self.teacher is not None:
            move_teacher(self.teacher, self.encoder, self.momentum, progress)

    def features(self, x):
        """Tokens: (B, channels, 16, H, W) -> (B, N = H/16 * W/16, D)."""
        return self.encoder(x).flatten(2).transpose(1, 2)


def load_published(model, path):
    """Load an official ConvEncoder_*.pth (a bare state dict) into model.encoder, and its teacher, if there is one.

    Raises ValueError for a file that is cut short, would run code or holds no state dict, and, naming the key,
    if anything is missing, unknown or of another shape.
    """
    state = published_state(path)
    check_state(model.encoder.state_dict(), state, path)
    for network in filter(None, (model.encoder, model.teacher)):
        network.load_state_dict(state)
