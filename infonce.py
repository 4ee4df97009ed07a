"""
InfoNCE: of many embeddings, know the one that is of the same run (van den Oord et al., arXiv 1807.03748).

For windows n = 1..N with embeddings x_n (predicted) and y_n (actual), averaged over their positions, and the cosine
similarity s(x, y):

    L = - mean_n log [ exp(s(x_n, y_n) / T) / sum_m exp(s(x_n, y_m) / T) ],    averaged with x and y exchanged

What tells runs apart is learned; what changes along a run, or from place to place, is not. Two windows of one run in a
batch count as different all the same: of 32 windows of nano's 135 runs of active matter a fifth has such a neighbour,
of its 84 of the fluids a third. The other runs are those of a micro-batch, of all ranks with `--loss-rows global`.
"""
import torch
import torch.nn.functional as F

from vicreg import in_full


def infonce(x, y, temperature=0.5):
    """The loss of paired rows x, y (N, D), and how often the own partner is nearest. ValueError if N is 1."""
    if len(x) < 2:
        raise ValueError('InfoNCE compares windows: it needs at least 2 at once, see --micro-batch')
    similarity = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T / temperature         # (N, N)
    own = torch.arange(len(x), device=x.device)
    loss = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
    return {'loss': loss, 'found': (similarity.argmax(1) == own).float().mean()}


def infonce_loss_maps(x, y, temperature=0.5, generator=None):
    """The loss of embedding maps x, y (B, D, H, W) (under DDP: `gather` them first), in at least float32."""
    return infonce(*(in_full(z).mean((2, 3)) for z in (x, y)), temperature)
