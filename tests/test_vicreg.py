"""vicreg.py: the official loss, and the formula."""
import math

import pytest
import torch

from helpers import both_dtypes, check_parity, inputs
from vicreg import covariance_loss, variance_loss, vicreg_loss, vicreg_loss_maps


@both_dtypes
@pytest.mark.parametrize('case, shape, loss', [
    ('vicreg', (200, 128), vicreg_loss),
    ('vicreg_3d', (2, 128, 1, 4, 4), lambda x, y: vicreg_loss_maps(x[:, :, 0], y[:, :, 0], chunks=1)),
    ('vicreg_3d_chunks', (3, 128, 1, 6, 7), lambda x, y: vicreg_loss_maps(x[:, :, 0], y[:, :, 0], chunks=5)),
], ids=['rows', 'maps', 'chunks'])
def test_vicreg_is_the_official_one(case, shape, loss, dtype):
    """Terms and gradients into both branches; rows of maps in sample, height, width order, cut as torch.chunk does."""
    x, y = inputs(dtype, x=shape, y=shape)
    losses = loss(x, y)
    grad_x, grad_y = torch.autograd.grad(losses['loss'], (x, y))
    check_parity(case, loss=losses['loss'], repr_loss=losses['sim'], std_loss=losses['std'], cov_loss=losses['cov'],
                 grad_x=grad_x, grad_y=grad_y, grad_x_norm=grad_x.norm(), grad_y_norm=grad_y.norm())
    if case == 'vicreg':
        check_parity(case, std_loss_x=variance_loss(x), std_loss_y=variance_loss(y),
                     cov_loss_x=covariance_loss(x), cov_loss_y=covariance_loss(y))


def test_vicreg_is_its_formula():
    """The sums of the paper, written out element by element."""
    torch.manual_seed(0)
    N, D = 7, 3
    x, y = torch.randn(N, D, dtype=torch.float64), 0.5 * torch.randn(N, D, dtype=torch.float64)

    def variance(z):
        return sum(max(0, 1 - math.sqrt(sum((z[n, j] - z[:, j].mean())**2 for n in range(N)) / N + 1e-4))
                   for j in range(D)) / D / 2

    def covariance(z):
        entry = lambda i, j: sum((z[n, i] - z[:, i].mean()) * (z[n, j] - z[:, j].mean()) for n in range(N)) / (N - 1)
        return sum(entry(i, j)**2 for i in range(D) for j in range(D) if i != j) / D

    sim = sum((x[n, j] - y[n, j])**2 for n in range(N) for j in range(D)) / (N * D)
    std, cov = variance(x) + variance(y), covariance(x) + covariance(y)
    expected = {'sim': sim, 'std': std, 'cov': cov, 'loss': 3 * sim + 5 * std + 7 * cov}
    losses = vicreg_loss(x, y, sim_coeff=3, std_coeff=5, cov_coeff=7)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=1e-12), name


def test_vicreg_chunks_are_drawn_from_all_rows():
    """A generator shuffles x and y alike: one chunk is unaffected, several differ from those in order."""
    x, y = torch.randn(2, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = lambda seed: seed and torch.Generator().manual_seed(seed)
    loss = lambda chunks, seed: vicreg_loss_maps(x, y, chunks=chunks, generator=generator(seed))
    assert loss(1, 1)['loss'] == pytest.approx(loss(1, None)['loss'].item(), rel=1e-12)
    assert loss(4, 1)['loss'] != pytest.approx(loss(4, None)['loss'].item(), rel=1e-3)
    assert loss(4, 1)['loss'] == loss(4, 1)['loss']
    assert loss(4, 1)['sim'] == pytest.approx(loss(4, None)['sim'].item(), rel=1e-12)  # pairs stay together
