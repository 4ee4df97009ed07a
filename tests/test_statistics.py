"""Hand-made statistics (systems/numerics.Grid, and those of each system) on fields whose value is known."""
import math

import h5py
import numpy as np
import pytest
import torch

from data import Split
from helpers import make_published
from systems import System, find_system
from systems.numerics import Grid, fluid_statistics
from systems.rayleigh_benard import chebyshev_nodes

X, Y, DT, T = np.arange(48) * 4 / 48, chebyshev_nodes(64), 0.25, 5
GRID = Grid(X, Y, DT)
x, y = (torch.tensor(v, dtype=torch.float32) for v in np.broadcast_arrays(X[:, None], Y[None]))
t = DT * torch.arange(T).view(1, T, 1, 1)
zero = torch.zeros(1, T, 48, 64)
field = lambda values: zero + values                                     # (1, T, H, W)
near = lambda value, rel=1e-3: pytest.approx(value, rel=rel, abs=1e-6)


def test_derivatives_and_means_know_the_spacing():
    """Points crowd at the walls, and stand for smaller cells there."""
    assert torch.allclose(GRID.derivative(field(7 * y), 1), field(7.0), atol=1e-3)
    assert torch.allclose(GRID.derivative(field(7 * x), 0), field(7.0), atol=1e-3)
    inside = GRID.derivative(field(y**2), 1)[..., 1:-1]
    assert torch.allclose(inside, field(2 * y)[..., 1:-1], atol=1e-3)    # second order also where the spacing changes
    assert GRID.mean(field(1.0)).item() == near(1) and GRID.mean(field(y)).item() == near(0.5)
    assert GRID.mean(field(torch.sin(math.pi * y))).item() == near(2 / math.pi, 2e-3) != near(
        torch.sin(math.pi * y).mean().item(), 0.1)
    assert torch.allclose(GRID.rate(3 * t + zero), torch.tensor(3.0)) and GRID.rate(zero).shape[1] == T - 1
    assert GRID.gradient(field(3 * x + 4 * y), field(5 * x)).item() == near(9 + 16 + 25)
    assert GRID.mean_square(field(3.0), field(4.0)).item() == near(25)


def test_sizes_of_a_known_flow():
    """Of a uniform vorticity of 2, a scalar with known slopes, and known rates of change."""
    found = fluid_statistics(field(-y) + 0.5 * t, field(x), field(5 * y + 2 * t), torch.tensor([6.0]), GRID)
    expected = {'vorticity': 4, 'vorticity gradient': 0, 'velocity y': (x**2).mean().item(), 'scalar': 25 / 12,
                'scalar gradient': 25, 'scalar curvature': 0, 'scalar change': 4, 'vorticity change': 0, 'power': 6,
                'flux at the lower edge': 25, 'flux at the upper edge': 25,
                'velocity x': sum(1 / 3 - 0.5 * v + 0.25 * v * v for v in t.flatten().tolist()) / T}
    for name, value in expected.items():
        assert found[name].exp().item() == pytest.approx(value, rel=3e-3, abs=1e-4), name
    wavy = fluid_statistics(zero, zero, field(torch.sin(math.pi / 2 * x)), torch.zeros(1), GRID)
    assert wavy['scalar curvature'].exp().item() == near((math.pi / 2)**4 / 2, 0.1)
    uneven = fluid_statistics(zero, zero, field(y**2), torch.zeros(1), GRID)
    assert uneven['flux at the upper edge'].exp().item() == near(4, 1e-2)
    assert uneven['flux at the lower edge'].exp().item() < 1e-4


@pytest.mark.parametrize('power', [0.0, 0.3])
def test_budgets_give_the_diffusivities(power):
    """Waves that decay as viscosity 0.02 and diffusivity 0.05 say, one of them driven."""
    box = Grid(np.arange(64) / 64, -1 + np.arange(64) / 32, 0.05)
    y, t = torch.tensor(-1 + np.arange(64) / 32).view(1, 1, 1, -1), 0.05 * torch.arange(4).view(1, 4, 1, 1)
    nu, kappa, k = 0.02, 0.05, math.pi
    wave = (torch.sin(k * y) + torch.zeros(1, 1, 64, 1)).float()
    energy = 0.5 * torch.exp(-2 * nu * k**2 * t)                         # mean of u^2
    energy = energy + power / (nu * k**2) * (1 - torch.exp(-2 * nu * k**2 * t))
    u = (2 * energy).sqrt() * wave
    s = torch.exp(-kappa * k**2 * t) * wave
    found = fluid_statistics(u, 0 * u, s, torch.tensor([power]), box)
    assert found['viscosity by energy'].exp().item() == near(nu, 0.03)
    assert found['diffusivity'].exp().item() == near(kappa, 0.03)
    if power == 0:
        assert found['viscosity by enstrophy'].exp().item() == near(nu, 0.03)


def test_statistics_of_the_fluids_are_of_their_fields():
    """Convection is driven by <v b>, shear flow by nothing; each statistic reads the channel it is named for."""
    f = {'velocity_x': field(2.0), 'velocity_y': field(3.0), 'buoyancy': field(5 * y), 'tracer': field(5 * x)}
    convection = find_system('rayleigh_benard').statistics(f, GRID)
    assert convection['power'].exp().item() == near(7.5)
    assert convection['velocity x'].exp().item() == near(4) and convection['velocity y'].exp().item() == near(9)
    shear = find_system('shear_flow').statistics(f, GRID)
    assert shear['power'].exp().item() < 1e-9 and shear['scalar gradient'].exp().item() == near(25)
    assert shear.keys() == convection.keys() and len(shear) == 15


def test_statistics_of_active_matter():
    """c = 2 and D from a moment m that is known; flow, strain, slopes and rates as given."""
    m_re, m_im = field(1.2 + 0.1 * x) + 0.2 * t, field(0.3 * y)
    f = {'concentration': field(2.0), 'D_xx': 1 + m_re / 2, 'D_yy': 1 - m_re / 2, 'D_xy': m_im / 2,
         'velocity_x': field(3.0) + t, 'velocity_y': field(4.0), 'E_xx': field(y) + 2 * t, 'E_xy': field(2 * x)}
    found = find_system('active_matter').statistics(f, GRID)
    order = (m_re**2 + m_im**2).sqrt() / 2
    assert len(found) == 19 and found['order'].item() == near(GRID.mean(order).item())
    for level in .02, .1, .25, .5, .75, .9, .98:
        assert found[f'order, quantile {level}'].item() == near(torch.quantile(order, level).item(), 0.02)
    plain = {**f, 'D_xx': 1 + field(0.3), 'D_yy': 1 - field(0.3), 'D_xy': field(0.4)}
    uniform = find_system('active_matter').statistics(plain, GRID)
    assert uniform['order'].item() == near(0.5) and uniform['order, quantile 0.5'].item() == near(0.5)
    assert uniform['power'].item() == near(GRID.mean(f['E_xx'] * 0.6 + f['E_xy'] * 0.8).item())
    assert found['order drift'].item() == near(GRID.mean(order[:, -1:] - order[:, :1]).item())
    squares = {'velocity': ((3 + t)**2).mean().item() + 16, 'velocity change': 1, 'strain change': 4,
               'strain gradient': 1 + 4, 'D change': 0.01, 'D gradient': 0.05**2 + 0.15**2,
               'strain': GRID.mean_square(f['E_xx'], f['E_xy']).item(),
               'order change': GRID.mean_square(GRID.rate(order)).item(),
               'order gradient': GRID.gradient(order).item()}
    for name, value in squares.items():
        assert found[name].exp().item() == near(value, 3e-3), name


def test_splits_know_their_grid(tmp_path):
    """Coordinates and times of the file, cut and resized like its fields; counted where the file has none."""
    root, nodes = make_published(tmp_path), np.sort(np.random.default_rng(0).random(16))
    for file in root.glob('data/*/*.hdf5'):
        with h5py.File(file, 'r+') as f:
            f['dimensions/x'], f['dimensions/time'] = nodes, 0.5 * np.arange(40)
    (gx, gy, dt) = Split(root, System(), 'train').grid
    assert np.allclose(gx, nodes) and np.allclose(gy, np.arange(16)) and dt == 0.5
    (gx, gy, _) = Split(root, System(crop=((0.5, 1), (0, 1))), 'train', resolution=4).grid
    assert np.allclose(gx, nodes[8:].reshape(4, 2).mean(1))
    assert np.allclose(gy, np.arange(16).reshape(4, 4)[:, 1:3].mean(1))
    for n in 32, 48, 64:                                                 # larger than the file: even to the ends
        gy = np.array(Split(root, System(), 'train', resolution=n).grid[1])
        assert np.allclose(np.diff(gy), 16 / n) and gy.mean() == pytest.approx(7.5)


def test_a_scalar_whose_mean_drifts_does_not_diffuse_more():
    """As the buoyancy of convection, heated from below."""
    still, s = torch.zeros(1), field(torch.sin(math.pi / 2 * x)) * (1 - 0.1 * t)
    found, drifting = (fluid_statistics(zero, zero, values, still, GRID)['diffusivity'] for values in (s, s + 3 * t))
    assert drifting.item() == near(found.item(), 1e-3)
