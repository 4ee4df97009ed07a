"""
The encoders of jepa.py and pixels.py: (B, channels, 16, H, W) fields -> (B, D, H/16, W/16) embedding.

`Encoder` is the paper's 3-D ConvNeXt (arXiv 2603.13227; Liu et al., CVPR 2022), which halves time, height and width
four times; its module names are the official code's. `Statistics` is for small runs.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import option


@dataclass
class EncoderOptions:
    """The defaults are the paper's."""
    encoder: str = option('convnext', "convnext, the paper's, or statistics, local ones averaged: for small runs")
    widths: tuple = option((16, 32, 64, 128, 128), 'encoder widths: of the five stages, or of products, thresholds, '
                                                   'coarser thresholds and embedding')
    blocks: tuple = option((3, 3, 3, 9, 3), "residual blocks per stage of the paper's encoder")
    rate: float = option(8.0, 'by what the statistics encoder multiplies differences between frames')
    layer_scale: float = option(1e-6, 'initial layer scale of the residual blocks')


NANO = dict(encoder='statistics', widths=(64, 64, 64, 32), layer_scale=1.0)
NANO_FLUIDS = dict(rate=32.0)                                            # their frames differ less


def check_encoder(options, height, width):
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
    if min(options.widths) < 1 or min(options.blocks) < 0:
        raise ValueError('--widths must be at least 1, --blocks at least 0')
    if options.widths[-1] % 8:
        raise ValueError(f'the probes need a last width divisible by their 8 heads, not {options.widths[-1]}')
    if height % 16 or width % 16:
        raise ValueError(f'the encoder needs sides divisible by 16, not {height} x {width}: choose another '
                         f'--resolution or --crop')


def build_encoder(channels, **settings):
    """The encoder for fields of so many channels. settings: of EncoderOptions, whose defaults hold for the others."""
    o = EncoderOptions(**settings)
    if o.encoder == 'convnext':
        return Encoder(channels, o.widths, o.blocks, o.layer_scale)
    return Statistics(channels, o.widths, o.rate)


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
