r"""
JEPA for physics: predict the embedding of other frames (the paper: the next 16) from these 16.

    context (B, C, 16, H, W) --encoder--> z  --predictor--> p   \
                                                                  VICReg(p, z')
    target  (B, C, 16, H, W) --encoder-----------------------> z' /

A 3-D ConvNeXt encoder and a small convolutional predictor are trained together (arXiv 2603.13227).
A constant embedding would be easy to predict. VICReg (vicreg.py) prevents this collapse. Compare it
with `--loss sigreg`, `--loss infonce` (objectives.py), and `--target ema`, where a slow copy of the
encoder embeds the target. Module names are the official code's, so its checkpoints load.
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import at_least, autocast, check_state, option, published_state
from objectives import infonce_loss_maps, sigreg_loss_maps
from variants.small import SmallEncoder
from vicreg import gather, standardize, vicreg_loss_maps

TITLE = 'JEPA'
ANY_SIZE = True             # a convolution takes fields of any size
WIDTHS = {'convnext': (16, 32, 64, 128, 128), 'statistics': (64, 64, 64, 32)}    # of each encoder
CHOICES = {'loss': ('vicreg', 'sigreg', 'infonce'), 'loss_rows': ('local', 'global'),
           'target': ('encoder', 'ema'), 'predictor': ('conv', 'identity')}

@dataclass
class EncoderOptions:
    """The defaults are the paper's."""
    encoder: str = option('convnext', "convnext, the paper's; statistics, of variants/small.py")
    widths: tuple = option(WIDTHS['convnext'], "of convnext's stages, or of statistics' layers")
    blocks: tuple = option((3, 3, 3, 9, 3), 'residual blocks in each stage of convnext')
    rate: float = option(8.0, 'statistics multiplies differences between frames by it')
    layer_scale: float = option(1e-6, 'initial layer scale of the residual blocks')

@dataclass
class Options(EncoderOptions):
    residual: bool = option(False, 'predict the change of the embedding, not all of it')
    loss: str = option('vicreg', 'of predicted and actual embedding: vicreg, sigreg, infonce')
    sim_coeff: float = option(2.0, "weight of vicreg's invariance term")
    std_coeff: float = option(40.0, "weight of vicreg's variance term")
    cov_coeff: float = option(2.0, "weight of vicreg's covariance term")
    chunks: int = option(5, 'vicreg cuts the rows of a batch into so many random chunks')
    sigreg_coeff: float = option(0.05, "share of sigreg's normality term; the rest is invariance")
    directions: int = option(1024, 'random directions along which sigreg looks')
    temperature: float = option(0.2, 'temperature of --loss infonce')
    loss_rows: str = option('local', 'the loss sees windows of one process: local; of all: global')
    standardize: bool = option(False, 'z-score the embeddings before the loss')
    target: str = option('encoder', 'what embeds the target: encoder; ema, its moving average')
    momentum: tuple = option((0.996, 1.0), 'of this average, at the start and the end of the run')
    predictor: str = option('conv', "conv, the paper's; identity, none: to see what it is for")

PRESETS = {
    'paper': {},
    # for minutes on a laptop; the target, any other 16 frames, shares only the run's physics
    'nano': dict(encoder='statistics', widths=WIDTHS['statistics'], layer_scale=1.0,
                 views='other-time', loss_rows='global', residual=True, sim_coeff=10.0,
                 cov_coeff=4.0, chunks=1, standardize=True, lr=3e-3),
    # the frames of the fluids differ less from each other
    ('nano', 'shear_flow'): dict(rate=32.0), ('nano', 'rayleigh_benard'): dict(rate=32.0),
}

def check(options, inputs):
    """Raise ValueError if the options do not fit together, or not the fields of inputs.size."""
    check_encoder(options, inputs.size)
    for name, words in CHOICES.items():
        if getattr(options, name) not in words:
            flag = '--' + name.replace('_', '-')
            raise ValueError(f'{flag} is {" or ".join(words)}, not {getattr(options, name)!r}')

    at_least(options, 1, 'chunks', 'directions')
    if not 0 <= options.sigreg_coeff <= 1:
        raise ValueError(f'--sigreg-coeff is a share, from 0 to 1, not {options.sigreg_coeff}')
    if options.temperature <= 0:
        raise ValueError(f'--temperature must be more than 0, not {options.temperature}')
    check_momentum(options.momentum)

def check_encoder(options, size):
    """Raise ValueError if EncoderOptions do not fit together, or not fields of size (H, W)."""
    if options.encoder not in WIDTHS:
        raise ValueError(f'--encoder is {" or ".join(WIDTHS)}, not {options.encoder!r}')
    defaults = WIDTHS[options.encoder]
    if len(options.widths) != len(defaults):
        raise ValueError(f'the {options.encoder} encoder takes {len(defaults)} --widths: '
                         f'{",".join(map(str, defaults))} are its defaults')
    if options.encoder == 'convnext' and len(options.blocks) != 5:
        raise ValueError('the convnext encoder has 5 stages: give as many --blocks')

    # the attentive probe has eight heads, and the encoder halves H and W four times
    whole = all(isinstance(n, int) for n in options.widths + options.blocks)
    if not whole or min(options.widths) < 1 or min(options.blocks) < 0:
        raise ValueError('--widths are whole numbers, at least 1, and --blocks, at least 0')
    if options.widths[-1] % 8:
        raise ValueError(f'the probes need a last width divisible by 8, not {options.widths[-1]}')
    if size[0] % 16 or size[1] % 16:
        raise ValueError(f'the encoder needs sides divisible by 16, not {size[0]} x {size[1]}: '
                         f'choose another --resolution or --crop')

def build(options, inputs):
    return JEPA(len(inputs.channels), inputs.paired, **vars(options))

def build_encoder(channels, options):
    """The encoder that EncoderOptions ask for, for fields of so many channels."""
    if options.encoder == 'statistics':
        return SmallEncoder(channels, options.widths, options.rate)
    return Encoder(channels, options.widths, options.blocks, options.layer_scale)

class DepthwiseConv3d(nn.Conv3d):
    """Depthwise 7x7x7 convolution, 'same' padding, (B, C, T, H, W) -> same shape."""
    def __init__(self, dim):
        super().__init__(dim, dim, kernel_size=7, padding=3, groups=dim)

    def forward(self, x):
        B, C, T, H, W = x.shape
        # a kernel for each pair of frames: W[t_out, t_in] = w[t_in - t_out + 3], zero outside 0..6
        w = F.pad(self.weight[:, 0], (0, 0, 0, 0, T - 4, T - 4))         # (C, 2T-1, 7, 7)
        w = torch.stack([w[:, T - 1 - t:2 * T - 1 - t] for t in range(T)], 1)     # (C, T, T, 7, 7)

        # one 2-D convolution of C * T channels: its backward pass is faster (docs/speed.md)
        bias = self.bias.repeat_interleave(T)
        x = F.conv2d(x.flatten(1, 2), w.flatten(0, 1), bias, padding=3, groups=C)
        return x.view(B, C, T, H, W)

class Stem(nn.Conv3d):
    """Per-frame 4x4 convolution, 'same' size, in channels-last memory, which later layers keep."""
    def forward(self, x):                                                # (B, C, T, H, W)
        B, T = x.shape[0], x.shape[2]
        x = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = F.conv2d(F.pad(x, (1, 2, 1, 2)), self.weight[:, :, 0], self.bias)
        return x.unflatten(0, (B, T)).transpose(1, 2)                    # (B, dim, T, H, W)

class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, T, H, W)."""
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)

class Block(nn.Module):
    """ConvNeXt block, in 3-D or 2-D: a convolution mixes neighbours, an MLP channels; residual."""
    def __init__(self, dim, dims=3, layer_scale=1e-6):
        super().__init__()
        self.conv = (DepthwiseConv3d(dim) if dims == 3 else
                     nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x):                                                # (B, C, ...)
        y = self.mlp(self.conv(x).movedim(1, -1))                        # (B, ..., C)
        return x + y.movedim(-1, 1)                                      # (B, C, ...)

    def mlp(self, y):
        """The half that is pointwise, (B, ..., C) -> same: five sixths of what a block keeps."""
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        return self.gamma * y

class Encoder(nn.Module):
    """3-D ConvNeXt (Liu et al., CVPR 2022): (B, C, 16, H, W) -> (B, widths[-1], H/16, W/16)."""
    def __init__(self, channels, widths=(16, 32, 64, 128, 128), blocks=(3, 3, 3, 9, 3),
                 layer_scale=1e-6):
        super().__init__()
        self.dim = widths[-1]

        # before the first stage a stem; before the others T, H and W are halved
        stem = nn.Sequential(Stem(channels, widths[0], (1, 4, 4)), ChannelNorm(widths[0], eps=1e-6))
        halvings = [nn.Sequential(ChannelNorm(a, eps=1e-6), nn.Conv3d(a, b, 2, stride=2))
                    for a, b in zip(widths, widths[1:])]
        self.downsample_layers = nn.ModuleList([stem, *halvings])

        # stages of residual blocks; at the last T is 1, so it is 2-D
        dims = [3] * (len(widths) - 1) + [2]
        self.res_blocks = nn.ModuleList(
            nn.Sequential(*[Block(width, d, layer_scale) for _ in range(n)])
            for width, d, n in zip(widths, dims, blocks))

    def forward(self, x):
        T, H, W = x.shape[2:]
        if T != 16 or H % 16 or W % 16:
            raise ValueError(f'the encoder halves time and space four times: it needs 16 frames '
                             f'and sides divisible by 16, not {T} frames of {H} x {W}')

        for downsample, blocks in zip(self.downsample_layers, self.res_blocks):
            x = blocks(downsample(x).squeeze(2))         # (B, width, T, H, W), without T if it is 1
        return x                                         # (B, widths[-1], H/16, W/16)

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

    settings: as in Options. Small runs learn faster with `residual` and `standardize`: z-scores
    meet the variance term at once. paired: do context and target show the same place?
    """
    def __init__(self, channels, paired=True, **settings):
        super().__init__()
        o = self.options = Options(**settings)
        self.paired, self.standardize = paired, o.standardize
        self.needs_runs = o.loss == 'infonce'
        self.encoder = build_encoder(channels, o)

        # the identity predicts that nothing changes
        self.predictor, self.residual = nn.Identity(), False
        if o.predictor == 'conv':
            self.predictor, self.residual = Predictor(self.encoder.dim, o.layer_scale), o.residual

        # the teacher begins as a copy of the encoder and gets no gradient
        self.teacher = None
        if o.target == 'ema':
            self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, context, target, generator=None, runs=None):
        """context, target: (B, channels, 16, H, W). `generator`: in the same state on all ranks.
        runs: (B,), the run that each is of, for --loss infonce."""
        # embed both; `self.embedding` keeps one for logs
        if self.teacher is None:
            if self.options.encoder == 'statistics':     # reads an eighth of the points: no copy
                z, z_next = self.encoder(context), self.encoder(target)  # (B, D, h, w)
            else:
                z, z_next = self.encoder(torch.cat([context, target])).chunk(2)
            self.embedding = z_next.detach().clone()         # compiled, a view of z_next crashes
        else:
            z = self.encoder(context)                                    # (B, D, h, w)
            self.embedding = z.detach()
            with torch.no_grad():
                z_next = self.teacher(target)                            # the same

        # the rows of the loss
        if self.options.loss_rows == 'global':
            z, z_next = gather(z), gather(z_next)                        # (world * B, D, h, w)
            runs = runs if runs is None else gather(runs)                # (world * B,)
        if self.standardize:
            z, z_next = standardize(z), standardize(z_next)

        # predict the embedding of the target from that of the context
        p = self.predictor(z)                                            # (world * B, D, h, w)
        if self.residual:
            p = z + p
        if self.standardize:
            p = standardize(p)

        # crops share no place: match places at random. What can be predicted is of the whole run
        if not self.paired:
            partner = torch.randperm(z[0, 0].numel(), generator=generator).to(z.device)
            z_next = z_next.flatten(2)[:, :, partner].view_as(z_next)
        with autocast(p.device):                                         # in full precision
            return self.loss(p, z_next, generator, **({'runs': runs} if self.needs_runs else {}))

    def loss(self, p, z_next, generator, runs=None):
        """{'loss', and its terms} of predicted and actual embeddings (B, D, h, w), of runs (B,)."""
        o = self.options
        if o.loss == 'sigreg':
            return sigreg_loss_maps(p, z_next, sigreg_coeff=o.sigreg_coeff,
                                    directions=o.directions, generator=generator)
        if o.loss == 'infonce':
            return infonce_loss_maps(p, z_next, temperature=o.temperature, runs=runs)
        return vicreg_loss_maps(p, z_next, sim_coeff=o.sim_coeff, std_coeff=o.std_coeff,
                                cov_coeff=o.cov_coeff, chunks=o.chunks, generator=generator)

    def after_step(self, progress):
        """Move the teacher, if there is one. progress: share of the run's steps that are done."""
        if self.teacher is not None:
            move_teacher(self.teacher, self.encoder, self.options.momentum, progress)

    def features(self, x):
        """Tokens: (B, channels, 16, H, W) -> (B, N = H/16 * W/16, D)."""
        return self.encoder(x).flatten(2).transpose(1, 2)

@torch.no_grad()
def move_teacher(teacher, encoder, momentum, progress):
    """A moving average: teacher <- m teacher + (1 - m) encoder (Tarvainen, Valpola 2017)."""
    start, end = momentum
    m = start + (end - start) * progress                 # progress goes from 0 to 1 in a run
    for slow, fast in zip(teacher.parameters(), encoder.parameters()):
        slow.lerp_(fast, 1 - m)

def check_momentum(momentum):
    """Raise ValueError unless these are two numbers from 0 to 1."""
    if len(momentum) != 2 or not 0 <= min(momentum) <= max(momentum) <= 1:
        raise ValueError(f'--momentum is two numbers from 0 to 1, not {momentum}')

def load_published(model, path):
    """Load an official ConvEncoder_*.pth, or raise ValueError and leave the model as it was."""
    state = published_state(path)
    check_state(model.encoder.state_dict(), state, path)
    model.encoder.load_state_dict(state)
    if model.teacher is not None:
        model.teacher.load_state_dict(state)
