"""
SIGReg: keep an embedding from collapsing by asking that it be an isotropic Gaussian (LeJEPA, arXiv 2511.08544).

A distribution is a standard normal if and only if all its one-dimensional projections are. So draw unit
directions a, and compare the empirical characteristic function of the projections a.z with that of N(0, 1),
by the statistic of Epps and Pulley (1983):

    S(z) = mean over a of  N int |phi_a(t) - exp(-t^2/2)|^2 exp(-t^2/2) dt,    phi_a(t) = 1/N sum_n exp(i t a.z_n)

    L = (1 - w) mean (x - y)^2 + w [ S(x) + S(y) ] / 2

One term in place of VICReg's variance and covariance, linear in the number of rows and of directions. For N independent
rows of white noise S is about 1, whatever N; for a constant it grows with N. The paper's invariance compares each
view with their mean, which for two views is a quarter of (x - y)^2: its w of 0.05 is our 0.17.
"""
import torch
import torch.nn.functional as F

from common import sent
from vicreg import in_full


def sigreg(z, directions, knots=17, reach=3.0):
    """S of rows z (N, D) along unit vectors `directions` (D, K): a scalar.

    The integrand is even in t: the trapezoidal rule with `knots` from 0 to `reach`, doubled.
    """
    t = torch.linspace(0, reach, knots, device=z.device, dtype=z.dtype)  # (knots,)
    gauss = torch.exp(-t**2 / 2)
    weights = torch.full_like(t, 2 * reach / (knots - 1))
    weights[0] /= 2
    weights[-1] /= 2
    angles = (z @ directions)[:, :, None] * t                            # (N, K, knots)
    distance = (angles.cos().mean(0) - gauss).square() + angles.sin().mean(0).square()               # (K, knots)
    return len(z) * (distance @ (weights * gauss)).mean()


def random_directions(dim, count, generator=None):
    """(dim, count) unit vectors, uniform on the sphere."""
    return F.normalize(torch.randn(dim, count, generator=generator), dim=0)


def sigreg_loss_maps(x, y, sigreg_coeff=0.05, directions=1024, generator=None):
    """The loss L of embedding maps x, y (B, D, H, W) -> {'loss', 'sim', 'sigreg'}.

    Every position of every sample is a row (under DDP: of every rank, so `gather` x and y first, and give each
    rank a `generator` in the same state). In at least float32.
    """
    x, y = (in_full(z).movedim(1, -1).flatten(0, 2) for z in (x, y))     # (B*H*W, D)
    a = sent(random_directions(x.shape[1], directions, generator), x.device).to(x)       # (D, K)
    sim, normal = F.mse_loss(x, y), (sigreg(x, a) + sigreg(y, a)) / 2
    return {'loss': (1 - sigreg_coeff) * sim + sigreg_coeff * normal, 'sim': sim, 'sigreg': normal}
