"""
A small encoder for laptops: (B, channels, 16, H, W) fields -> (B, D, H/16, W/16) embedding.

Not in the paper, whose ConvNeXt needs days on a CPU: `--encoder statistics` needs minutes. It
computes what a physicist would average: energies, dissipation, how often they are large.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

def jets(x, rate=8.0):
    """Values, rates and gradients of (B, C, T, H, W) -> (B, 4C, T/4, H/4, W/4).

    Of 2 x 2 x 2 neighbours at every fourth frame and point: their mean, and their differences along
    t (times `rate`), x and y (times 8). Unscaled, differences are a few percent of a field.
    """
    B, C, T, H, W = x.shape
    x = x.view(B, C, T // 4, 4, H // 4, 4, W // 4, 4)
    x = x[:, :, :, :2, :, :2, :, :2]                     # (B, C, T/4, 2, H/4, 2, W/4, 2)

    def mean(x, axis):
        return (x.select(axis, 0) + x.select(axis, 1)) / 2

    def change(x, axis, factor=8.0):
        return factor * (x.select(axis, 1) - x.select(axis, 0))

    # the pairs of neighbours along t, x and y are axes 3, 5 and 7
    over_y = mean(x, 7)                                  # (B, C, T/4, 2, H/4, 2, W/4)
    over_xy = mean(over_y, 5)                            # (B, C, T/4, 2, H/4, W/4)
    value, along_t = mean(over_xy, 3), change(over_xy, 3, rate)
    along_x = mean(change(over_y, 5), 3)
    along_y = mean(mean(change(x, 7), 5), 3)
    return torch.cat([value, along_t, along_x, along_y], 1)

class SmallEncoder(nn.Module):
    """(B, channels, 16, H, W) fields -> (B, widths[-1], H/16, W/16) embedding.

    Products of fields, rates and gradients; by how much they exceed thresholds, here and over a
    coarser neighbourhood; and a network of their means. widths: of these three, of the embedding.
    """
    def __init__(self, channels, widths=(64, 64, 64, 32), rate=8.0):
        super().__init__()
        self.rate = rate
        products, thresholds, coarse, self.dim = widths
        self.factors = nn.Linear(4 * channels, 2 * products)
        self.thresholds = nn.Linear(products, thresholds)
        self.coarse = nn.Conv3d(thresholds, coarse, kernel_size=2, stride=2)
        means = products + thresholds + coarse
        self.head = nn.Sequential(nn.LayerNorm(means), nn.Linear(means, 128), nn.GELU(),
                                  nn.Linear(128, self.dim))

    def forward(self, x):
        T, H, W = x.shape[2:]
        if T != 16 or H % 16 or W % 16:
            raise ValueError(f'the encoder halves time and space four times: it needs 16 frames '
                             f'and sides divisible by 16, not {T} frames of {H} x {W}')

        # point by point: products of two linear maps of the jets, and thresholds on them
        x = jets(x, self.rate).movedim(1, -1)                            # (B, 4, H/4, W/4, 4C)
        a, b = self.factors(x).chunk(2, -1)                              # (..., products)
        products = a * b
        thresholds = F.relu(self.thresholds(products)).movedim(-1, 1)    # (B, D1, 4, H/4, W/4)
        coarse = F.relu(self.coarse(thresholds))                         # (B, D2, 2, H/8, W/8)

        # the means over each token
        means = torch.cat([F.avg_pool3d(products.movedim(-1, 1), 4), F.avg_pool3d(thresholds, 4),
                           F.avg_pool3d(coarse, 2)], 1).squeeze(2)       # (B, means, H/16, W/16)

        # their size spans decades: take a logarithm, which is linear about zero
        means = torch.asinh(8 * means).movedim(1, -1)
        return self.head(means).movedim(-1, 1)                           # (B, D, H/16, W/16)
