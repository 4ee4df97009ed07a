"""
JEPA for physics: predict the embedding of the next 16 frames from the embedding of these 16.

    context (B, C, 16, H, W) --encoder--> z  --predictor--> p   \
                                                                  VICReg(p, z')
    target  (B, C, 16, H, W) --encoder-----------------------> z' /

One encoder, a 3-D ConvNeXt that halves time, height and width four times, and a small convolutional
predictor, trained together (arXiv 2603.13227). Nothing is reconstructed: what the loss keeps of the
fields is what helps to say where the embedding goes next. Module names are the official code's, so
its checkpoints load as they are. The `nano` preset is for small runs: a small encoder of another
kind, `Statistics`, and as target any other 16 frames of the run.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import check_state, option, published_state
from vicreg import gather, standardize, vicreg_loss_maps

TITLE = 'JEPA'
PAPER = {'active_matter': 0.079, 'shear_flow': 0.38, 'rayleigh_benard': 0.13}          # table 1, attentive probe
ANY_SIZE = True                                                          # a convolution takes whole fields
TERMS = {'sim': 'invariance', 'std': 'variance', 'cov': 'covariance'}    # what the log's terms are in pictures


@dataclass
class Options:
    """The defaults are the paper's."""
    encoder: str = option('convnext', "convnext, the paper's, or statistics, local ones averaged: for small runs")
    widths: tuple = option((16, 32, 64, 128, 128), 'encoder widths: of the five stages, or of products, thresholds, '
                                                   'coarser thresholds and embedding')
    blocks: tuple = option((3, 3, 3, 9, 3), "residual blocks per stage of the paper's encoder")
    rate: float = option(8.0, 'by what the statistics encoder multiplies differences between frames')
    layer_scale: float = option(1e-6, 'initial layer scale of the residual blocks')
    residual: bool = option(False, 'predict the change of the embedding, not all of it')
    sim_coeff: float = option(2.0, 'weight of the invariance term')
    std_coeff: float = option(40.0, 'weight of the variance term')
    cov_coeff: float = option(2.0, 'weight of the covariance term')
    chunks: int = option(5, 'random chunks the rows of a batch are cut into for the loss')
    loss_rows: str = option('local', 'what the loss sees together: local, the windows of one process; global, of all')
    standardize: bool = option(False, 'z-score the embeddings before the loss, which settles its variance term')


NANO = dict(views='other-time', loss_rows='global', encoder='statistics', widths=(64, 64, 64, 32), layer_scale=1.0,
            residual=True, sim_coeff=10.0, cov_coeff=4.0, chunks=1, standardize=True, lr=3e-3)
PRESETS = {'paper': {}, 'nano': NANO,                                    # the fluids' frames differ less
           ('nano', 'shear_flow'): dict(rate=32.0), ('nano', 'rayleigh_benard'): dict(rate=32.0)}


def check(options, height, width):
    """Raise ValueError if the options, or fields of this size, will not do."""
    if options.encoder not in ENCODERS:
        raise ValueError(f'--encoder is {" or ".join(ENCODERS)}, not {options.encoder!r}')
    own = ENCODERS[options.encoder].WIDTHS
    if len(options.widths) != len(own):
        raise ValueError(f'the {options.encoder} encoder takes {len(own)} --widths: '
                         f'{",".join(map(str, own))} are its own')
    if options.encoder == 'convnext' and len(options.blocks) != len(options.widths):
        raise ValueError(f'the convnext encoder has {len(options.widths)} stages: give as many --blocks')
    if not all(isinstance(n, int) for n in options.widths + options.blocks):
        raise ValueError('--widths and --blocks are whole numbers')
    if min(options.widths) < 1 or min(options.blocks) < 0 or options.chunks < 1:
        raise ValueError('--widths and --chunks must be at least 1, --blocks at least 0')
    if options.loss_rows not in ('local', 'global'):
        raise ValueError(f'--loss-rows is local or global, not {options.loss_rows!r}')
    if options.widths[-1] % 8:
        raise ValueError(f'the probes need a last width divisible by their 8 heads, not {options.widths[-1]}')
    if height % 16 or width % 16:
        raise ValueError(f'the encoder needs sides divisible by 16, not {height} x {width}: choose another '
                         f'--resolution or --crop')


def build(options, inputs):
    return JEPA(len(inputs.channels), paired=inputs.paired, **vars(options))


class DepthwiseConv3d(nn.Conv3d):
    """Depthwise 7x7x7 convolution, 'same' padding, (B, C, T, H, W) -> same shape.

    Equal to nn.Conv3d(C, C, 7, padding=3, groups=C), parameters included, but computed as one grouped
    2-D convolution: time is folded into channels, and each field channel gets a T x T block of 7 x 7
    kernels, W[t_out, t_in] = w[t_in - t_out + 3], zero where that is outside 0..6. The backward pass
    of PyTorch's depthwise Conv3d is what makes this worth it: see `python bench.py`.
    """

    def __init__(self, dim):
        super().__init__(dim, dim, kernel_size=7, padding=3, groups=dim)

    def forward(self, x):
        B, C, T, H, W = x.shape
        w = F.pad(self.weight[:, 0], (0, 0, 0, 0, T - 4, T - 4))         # (C, 2T-1, 7, 7): offsets -(T-1)..T-1
        w = torch.stack([w[:, T - 1 - t:2 * T - 1 - t] for t in range(T)], 1)     # (C, T_out, T_in, 7, 7)
        x = x.reshape(B, C * T, H, W)
        x = F.conv2d(x, w.reshape(C * T, T, 7, 7), self.bias.repeat_interleave(T), padding=3, groups=C)
        return x.view(B, C, T, H, W)


class Stem(nn.Conv3d):
    """Per-frame 4x4 convolution, 'same' size: an even kernel pads one before and two after.

    Computed as a 2-D convolution of B*T images, in channels-last memory, which all later layers keep.
    """

    def __init__(self, channels, dim):
        super().__init__(channels, dim, kernel_size=(1, 4, 4))

    def forward(self, x):                                                # (B, C, T, H, W) -> (B, dim, T, H, W)
        B, C, T, H, W = x.shape
        x = x.transpose(1, 2).reshape(B * T, C, H, W).contiguous(memory_format=torch.channels_last)
        x = F.conv2d(F.pad(x, (1, 2, 1, 2)), self.weight[:, :, 0], self.bias)
        return x.view(B, T, -1, H, W).transpose(1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, T, H, W) or (B, C, H, W)."""

    def __init__(self, dim):
        super().__init__(dim, eps=1e-6)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """ConvNeXt block in 3-D (or 2-D): depthwise 7^d, LayerNorm, Linear x4, GELU, Linear, layer scale, residual."""

    def __init__(self, dim, dims=3, layer_scale=1e-6):
        super().__init__()
        self.conv = DepthwiseConv3d(dim) if dims == 3 else nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x):                                                # (B, C, ...)
        y = self.conv(x).movedim(1, -1)                                  # (B, ..., C)
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        return x + (self.gamma * y).movedim(-1, 1)                       # (B, C, ...)


class Encoder(nn.Module):
    """(B, channels, 16, H, W) fields -> (B, widths[-1], H/16, W/16) embedding. H, W divisible by 16.

    A stem, then a stage of residual blocks at each width with a halving of T, H and W between them; after four
    halvings T is 1 and the last stage is two-dimensional. The defaults are the paper's. Raises ValueError for other
    numbers of frames or indivisible resolutions.
    """

    WIDTHS = 16, 32, 64, 128, 128

    def __init__(self, channels, widths=WIDTHS, blocks=(3, 3, 3, 9, 3), layer_scale=1e-6):
        super().__init__()
        self.dim = widths[-1]
        stem = nn.Sequential(Stem(channels, widths[0]), ChannelNorm(widths[0]))
        self.downsample_layers = nn.ModuleList([stem] + [
            nn.Sequential(ChannelNorm(a), nn.Conv3d(a, b, kernel_size=2, stride=2))
            for a, b in zip(widths, widths[1:])])
        self.res_blocks = nn.ModuleList([
            nn.Sequential(*[Block(w, 3 if i < len(widths) - 1 else 2, layer_scale) for _ in range(n)])
            for i, (w, n) in enumerate(zip(widths, blocks))])

    def forward(self, x):
        check_shape(x)
        for i, (downsample, blocks) in enumerate(zip(self.downsample_layers, self.res_blocks)):
            x = downsample(x)                                            # (B, widths[i], T, H, W), halved i times
            if i == len(self.res_blocks) - 1:
                x = x.squeeze(2)                                         # (B, widths[-1], H/16, W/16)
            x = blocks(x)
        return x


def jets(x, rate=8.0):
    """Values, rates and gradients of (B, C, T, H, W), at every fourth frame and point: (B, 4C, T/4, H/4, W/4).

    Of 2 x 2 x 2 neighbours the mean, and the differences along t, x and y (not divided by their distance). Neighbours
    in a resolved field differ by a few percent of its size, and what enters so small a network finds late: hence the 8
    and `rate`, their factors in space and time.
    """
    B, C, T, H, W = x.shape
    x = x.view(B, C, T // 4, 4, H // 4, 4, W // 4, 4)[:, :, :, :2, :, :2, :, :2]       # (B, C, T/4, 2, H/4, 2, W/4, 2)

    def mean(x, axis):
        return (x.select(axis, 0) + x.select(axis, 1)) / 2

    def change(x, axis, factor=8.0):
        return factor * (x.select(axis, 1) - x.select(axis, 0))
    over_y = mean(x, 7)                                                  # (B, C, T/4, 2, H/4, 2, W/4)
    over_xy = mean(over_y, 5)                                            # (B, C, T/4, 2, H/4, W/4)
    return torch.cat([mean(over_xy, 3), change(over_xy, 3, rate), mean(change(over_y, 5), 3),
                      mean(mean(change(x, 7), 5), 3)], 1)


class Statistics(nn.Module):
    """(B, channels, 16, H, W) fields -> (B, widths[-1], H/16, W/16) embedding. H, W divisible by 16. Not the paper's.

    What a physicist would average over the field, learned: products of fields, rates and gradients (energies,
    dissipation), by how much these exceed thresholds, here and over a coarser neighbourhood, the means of all three
    over the 4 x 4 x 4 samples of a token on a logarithmic scale, and a small network of these means.
    """

    WIDTHS = 64, 64, 64, 32

    def __init__(self, channels, widths=WIDTHS, rate=8.0):
        super().__init__()
        self.rate = rate
        products, thresholds, coarse, self.dim = widths
        self.factors = nn.Linear(4 * channels, 2 * products)
        self.thresholds = nn.Linear(products, thresholds)
        self.coarse = nn.Conv3d(thresholds, coarse, kernel_size=2, stride=2)
        means = products + thresholds + coarse
        self.head = nn.Sequential(nn.LayerNorm(means), nn.Linear(means, 128), nn.GELU(), nn.Linear(128, self.dim))

    def forward(self, x):
        check_shape(x)
        a, b = self.factors(jets(x, self.rate).movedim(1, -1)).chunk(2, -1)         # (B, 4, H/4, W/4, products)
        products = a * b
        thresholds = F.relu(self.thresholds(products)).movedim(-1, 1)    # (B, thresholds, 4, H/4, W/4)
        coarse = F.relu(self.coarse(thresholds))                         # (B, coarse, 2, H/8, W/8)
        means = torch.cat([F.avg_pool3d(products.movedim(-1, 1), 4), F.avg_pool3d(thresholds, 4),
                           F.avg_pool3d(coarse, 2)], 1).squeeze(2)       # (B, means, H/16, W/16)
        means = torch.asinh(8 * means).movedim(1, -1)                    # logarithmic, and linear about zero
        return self.head(means).movedim(-1, 1)


def check_shape(x):
    """Raise ValueError unless fields (B, C, T, H, W) are 16 frames of sides divisible by 16."""
    T, H, W = x.shape[2:]
    if T != 16 or H % 16 or W % 16:
        raise ValueError(f'the encoder halves time and space four times: it needs 16 frames and a resolution divisible '
                         f'by 16, not {T} frames of {H} x {W}')


ENCODERS = {'convnext': Encoder, 'statistics': Statistics}


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
    """Encoder, predictor and loss. forward(context, target) -> {'loss', 'sim', 'std', 'cov'}.

    context, target: (B, channels, 16, H, W), of one run; the paper's follow each other. `generator` draws the loss's
    chunks and must be in the same state on all ranks. The last target embedding is kept, detached, in
    `self.embedding` for the log. The defaults are the paper's. Small runs learn faster with three
    changes: `standardize` z-scores embeddings and predictions over the batch, which settles the variance
    term, so that no step is spent on inflating noise to meet it; `residual` predicts the change of the
    embedding; and `paired=False` says that context and target show different places, whose positions
    have no partner: they are matched at random.
    """

    def __init__(self, channels, encoder='convnext', widths=(16, 32, 64, 128, 128), blocks=(3, 3, 3, 9, 3),
                 rate=8.0, layer_scale=1e-6, sim_coeff=2.0, std_coeff=40.0, cov_coeff=2.0, chunks=5, loss_rows='local',
                 standardize=False, residual=False, paired=True):
        super().__init__()
        self.standardize, self.residual, self.paired = standardize, residual, paired
        self.gather = gather if loss_rows == 'global' else lambda z: z
        if encoder == 'convnext':
            self.encoder = Encoder(channels, widths, blocks, layer_scale)
        else:
            self.encoder = Statistics(channels, widths, rate)
        self.predictor = Predictor(widths[-1], layer_scale)
        self.loss_settings = dict(sim_coeff=sim_coeff, std_coeff=std_coeff, cov_coeff=cov_coeff, chunks=chunks)

    def forward(self, context, target, generator=None):
        z, z_next = self.encoder(torch.cat([context, target])).chunk(2)  # (B, D, h, w) each
        self.embedding = z_next.detach()
        z, z_next = self.gather(z), self.gather(z_next)                  # (B or world * B, D, h, w)
        if self.standardize:
            z, z_next = standardize(z), standardize(z_next)
        p = self.predictor(z)                                            # the same
        if self.residual:
            p = z + p
        if self.standardize:
            p = standardize(p)
        if not self.paired:
            partner = torch.randperm(z[0, 0].numel(), generator=generator).to(z.device)
            z_next = z_next.flatten(2)[:, :, partner].view_as(z_next)
        with torch.autocast(p.device.type, enabled=False):               # statistics in full precision
            return vicreg_loss_maps(p, z_next, generator=generator, **self.loss_settings)

    def features(self, x):
        """Tokens: (B, channels, 16, H, W) -> (B, N = H/16 * W/16, D)."""
        return self.encoder(x).flatten(2).transpose(1, 2)


def load_published(model, path):
    """Load an official ConvEncoder_*.pth (a bare state dict) into model.encoder.

    Raises ValueError for a file that is cut short, would run code or holds no state dict, and, naming the key,
    if anything is missing, unknown or of another shape.
    """
    state = published_state(path)
    check_state(model.encoder.state_dict(), state, path)
    model.encoder.load_state_dict(state)
