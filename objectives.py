"""SIGReg and InfoNCE: other losses of a predicted embedding x and the actual one y than VICReg."""
import math

import torch
import torch.nn.functional as F

from vicreg import in_full

# --- SIGReg: make the embedding an isotropic Gaussian (LeJEPA, arXiv 2511.08544)
#
# A distribution is a standard normal if and only if all its one-dimensional projections are. So
# draw unit directions a, and compare the empirical characteristic function of the projections a.z
# with that of N(0, 1), by the statistic of Epps and Pulley (1983):
#
#     S(z) = mean over a of  N int |phi_a(t) - exp(-t^2/2)|^2 exp(-t^2/2) dt
#     phi_a(t) = 1/N sum_n exp(i t a.z_n)
#     L = (1 - w) mean (x - y)^2 + w [ S(x) + S(y) ] / 2
#
# One term replaces VICReg's variance and covariance. For N independent rows of white noise S is
# about 1, whatever N is; for a constant it grows with N. LeJEPA compares each view with the mean of
# the views: for two this is a quarter of (x - y)^2, so its w of 0.05 is our 0.17.

def sigreg(z, directions, knots=17, reach=3.0):
    """S of rows z (N, D) along unit vectors `directions` (D, K): a scalar."""
    # the weights of the trapezoidal rule from 0 to `reach`, doubled: the integrand is even in t
    t = torch.linspace(0, reach, knots, device=z.device, dtype=z.dtype)  # (knots,)
    weights = torch.full_like(t, 2 * reach / (knots - 1))
    weights[0] /= 2
    weights[-1] /= 2

    # the squared distance of the characteristic functions, real and imaginary part
    gauss = torch.exp(-t**2 / 2)
    angles = (z @ directions)[:, :, None] * t                            # (N, K, knots)
    real, imaginary = angles.cos().mean(0) - gauss, angles.sin().mean(0)
    distance = real.square() + imaginary.square()                        # (K, knots)
    return len(z) * (distance @ (weights * gauss)).mean()

def random_directions(dim, count, generator=None):
    """(dim, count) unit vectors, uniform on the sphere."""
    return F.normalize(torch.randn(dim, count, generator=generator), dim=0)

def sigreg_loss_maps(x, y, sigreg_coeff=0.05, directions=1024, generator=None):
    """The loss L of embedding maps x, y (B, D, H, W) -> {'loss', 'sim', 'sigreg'}."""
    # every position of every sample is a row; under DDP `gather` x and y first
    x, y = (in_full(z).movedim(1, -1).flatten(0, 2) for z in (x, y))     # (B*H*W, D)
    a = random_directions(x.shape[1], directions, generator).to(x)       # (D, K)
    sim = F.mse_loss(x, y)
    normal = (sigreg(x, a) + sigreg(y, a)) / 2
    loss = (1 - sigreg_coeff) * sim + sigreg_coeff * normal
    return {'loss': loss, 'sim': sim, 'sigreg': normal}

# --- InfoNCE: among many embeddings, find the one of the same window (arXiv 1807.03748)
#
# For windows n = 1..N with embeddings x_n and y_n, averaged over their positions, and the cosine
# similarity s(x, y):
#
#     L = - mean_n log [ exp(s(x_n, y_n) / T) / sum_m exp(s(x_n, y_m) / T) ]
#
# averaged with the same loss of x and y exchanged. The embedding learns what tells runs apart, not
# what changes along a run, or from place to place. So m goes over windows of other runs, and n.
# Other runs with the same parameters remain: they are pushed apart, as nobody knows the labels.
# A batch is one micro-batch, of all ranks with `--loss-rows global`.

def infonce(x, y, temperature=0.2, runs=None):
    """Loss of paired rows x, y (N, D), and `found`: how often a row's partner is the nearest.
    runs: (N,), the run of each row; another row of its run is not compared with it."""
    if len(x) < 2:
        raise ValueError('InfoNCE compares windows: it needs at least 2 at once, see --micro-batch')
    similarity = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T / temperature         # (N, N)
    partner = torch.arange(len(x), device=x.device)
    if runs is not None:
        own = (runs[:, None] == runs) & (partner[:, None] != partner)    # (N, N)
        similarity = similarity.masked_fill(own, -math.inf)
    loss = (F.cross_entropy(similarity, partner) + F.cross_entropy(similarity.T, partner)) / 2
    return {'loss': loss, 'found': (similarity.argmax(1) == partner).float().mean()}

def infonce_loss_maps(x, y, temperature=0.2, runs=None):
    """InfoNCE of embedding maps x, y (B, D, H, W), runs (B,). Under DDP `gather` them first."""
    x, y = (in_full(z).mean((2, 3)) for z in (x, y))                     # (B, D)
    return infonce(x, y, temperature, runs)
