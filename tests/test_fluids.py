"""
systems/shear_flow.py and systems/rayleigh_benard.py, against another solver and against their equations.

tests/data/reference_flows.npz: fields that an established spectral framework computed in double precision, of
shear flow at Re 1000, Sc 1 and of convection at Ra 1e6, Pr 1 (<system>/<field>, at the times <system>/t).
"""
import dataclasses

import numpy as np
import pytest
import torch

from helpers import HERE, both_dtypes
from systems import find_system, shear_flow as shear_flow_file
from systems.numerics import share_of_tail
from systems.rayleigh_benard import RayleighBenard, chebyshev_nodes, rayleigh_benard_start
from systems.shear_flow import ShearFlow, shear_flow_start


FLOWS = np.load(HERE / 'tests/data' / 'reference_flows.npz')


def shear_flow(N=32, reynolds=200.0, schmidt=1.0, start=(2, 2, 1.0), dtype=torch.float64):
    velocity, tracer = shear_flow_start(N, 2 * N, *start, dtype=dtype)
    return ShearFlow([reynolds], [schmidt], velocity[None], tracer[None])


def convection(Nx=32, Ny=16, rayleigh=1e4, prandtl=1.0, db=1.0, noise=0.1, dtype=torch.float64):
    b = rayleigh_benard_start(Nx, Ny, db, 0, noise, dtype)
    return RayleighBenard([rayleigh], [prandtl], b[None])


def reference_start(Nx=128, Ny=32):
    """The start of the reference run of convection."""
    x, y = np.arange(Nx)[:, None] * 4 / Nx, chebyshev_nodes(Ny)
    return torch.tensor((1 - y) + 0.01 * y * (1 - y) * (np.sin(np.pi * x) + 0.5 * np.cos(1.5 * np.pi * x)))


def on_grid(solver):
    """Fields as arrays (Nx, Ny) by name: velocity as u and v."""
    f = {k: v[0].double().numpy() for k, v in solver.fields().items()}
    f['u'], f['v'] = np.moveaxis(f.pop('velocity'), -1, 0)
    return f


def fields_and_changes(solver, h=1e-3):
    """Fields by name, and their time derivatives by central differences."""
    frames = []
    for _ in range(3):
        frames.append(on_grid(solver))
        solver.advance(h)
    return frames[1], {name: (frames[2][name] - frames[0][name]) / (2 * h) for name in frames[1]}


@both_dtypes
@pytest.mark.parametrize('system, tolerances', [('shear_flow', (1e-4, 1e-3)), ('rayleigh_benard', (1e-3, 1e-2))])
def test_solver_agrees_with_an_established_one(system, tolerances, dtype):
    """Every field, in relative L2, at an early and a late time."""
    if system == 'shear_flow':
        solver, duration = shear_flow(64, 1000.0, dtype=dtype), 0.1
    else:
        solver, duration = RayleighBenard([1e6], [1.0], reference_start()[None].to(dtype)), 0.25
    now = 0.0
    for i, (t, tolerance) in enumerate(zip(FLOWS[system + '/t'], tolerances)):
        for _ in range(round((t - now) / duration)):
            solver.advance(duration)
        now, found = t, on_grid(solver)
        found['velocity'] = np.stack([found.pop('u'), found.pop('v')])
        for name in found:
            expected = FLOWS[f'{system}/{name}'][i].astype(np.float64)
            error = np.linalg.norm(found[name] - expected) / np.linalg.norm(expected)
            assert error < tolerance, (name, t, error)


@pytest.mark.parametrize('make', [shear_flow, convection])
def test_fluids_are_fourth_order_in_time(make):
    """Halving the time step divides the error by sixteen."""
    def after(steps):
        solver = make()
        solver.advance(0.5)                                              # off a start that may be rough
        solver.set_coefficients(0.4 / steps)
        for _ in range(steps):
            solver.step()
        return solver.state
    a, b, c = map(after, (8, 16, 32))
    assert 12 < (a - b).abs().max() / (b - c).abs().max() < 21


def test_fluids_converge_spectrally_in_space():
    """The same start on finer grids: refining once more changes the result far less than a high order would."""
    def shear(N):
        solver = shear_flow(N)
        solver.advance(1.0)
        return on_grid(solver)['tracer'][::N // 16, ::N // 16]

    def heat(N):                                                         # Nusselt-like numbers do not depend on nodes
        solver = RayleighBenard([2e4], [1.0], reference_start(2 * N, N)[None] + 0)
        for _ in range(8):
            solver.advance(1.0)
        b = on_grid(solver)['buoyancy'].mean(0)
        return np.polynomial.chebyshev.chebval(np.linspace(-1, 1, 9), np.polynomial.chebyshev.chebfit(
            2 * chebyshev_nodes(N) - 1, b, N - 1))
    for run, sizes in (shear, (16, 32, 64)), (heat, (8, 16, 32)):
        a, b, c = map(run, sizes)
        assert np.abs(b - c).max() < np.abs(a - c).max() / 100, run


def test_shear_flow_conserves_and_diffuses():
    """Mean tracer and momentum stay; parallel flow and tracer decay as their wave does; the energy budget closes."""
    solver = shear_flow(reynolds=100.0, schmidt=2.0)
    means = lambda f: [f[k].mean() for k in ('u', 'v', 'tracer')]
    before = on_grid(solver)
    energy = lambda f: ((f['u'] - f['u'].mean())**2 + f['v']**2).mean() / 2
    dt, rows = 0.02, []
    for _ in range(21):
        f = on_grid(solver)
        u_y = np.fft.ifft(1j * np.pi * np.fft.fftfreq(64, 1 / 64) * np.fft.fft(f['u'], axis=1), axis=1).real
        v_x = np.fft.ifft(2j * np.pi * np.fft.fftfreq(32, 1 / 32)[:, None] * np.fft.fft(f['v'], axis=0), axis=0).real
        rows.append((energy(f), ((v_x - u_y)**2).mean()))                # enstrophy
        solver.advance(dt)
    e, w2 = np.array(rows).T
    lost = (w2[0] + w2[-1] + 4 * w2[1:-1:2].sum() + 2 * w2[2:-1:2].sum()) * dt / 3 / 100         # Simpson, nu = 1/100
    assert e[0] - e[-1] == pytest.approx(lost, rel=1e-5)
    assert np.allclose(means(on_grid(solver)), means(before), atol=1e-12)
    assert abs(on_grid(solver)['pressure'].mean()) < 1e-14

    y = torch.arange(32, dtype=torch.float64) / 16 - 1
    u = torch.sin(2 * np.pi * y).expand(16, 32)
    tracer = torch.cos(np.pi * y).expand(1, 16, 32)
    solver = ShearFlow([50.0], [0.5], torch.stack([0.3 + u, 0 * u])[None], tracer)
    solver.advance(1.0)
    f = on_grid(solver)
    assert np.allclose(f['u'], 0.3 + np.exp(-(2 * np.pi)**2 / 50) * u.numpy(), atol=1e-12)
    assert np.allclose(f['tracer'], np.exp(-np.pi**2 / 25) * np.cos(np.pi * y.numpy()), atol=1e-12)


def test_shear_flow_is_incompressible_and_forces_balance():
    """div u = 0, and u_t + u.grad u + grad p = nu lap u with the pressure that is written."""
    solver = shear_flow()
    solver.advance(1.0)
    f, changes = fields_and_changes(solver)
    kx, ky = 2j * np.pi * np.fft.fftfreq(32, 1 / 32)[:, None], 1j * np.pi * np.fft.fftfreq(64, 1 / 64)
    d = lambda a, k: np.fft.ifft2(k * np.fft.fft2(a)).real
    assert np.abs(d(f['u'], kx) + d(f['v'], ky)).max() < 1e-12
    for name, k in ('u', kx), ('v', ky):
        residual = (changes[name] + f['u'] * d(f[name], kx) + f['v'] * d(f[name], ky) + d(f['pressure'], k)
                    - d(f[name], kx**2 + ky**2) / 200)
        assert np.abs(residual).max() < 2e-5, name                       # what the 2/3 rule leaves out


def polynomial(values, derivative=0, at=None):
    """Derivatives in y of fields (Nx, Ny) on the Chebyshev nodes, there or at points of [0, 1]."""
    n = values.shape[1]
    nodes = 2 * chebyshev_nodes(n) - 1
    c = np.polynomial.chebyshev.chebfit(nodes, values.T, n - 1)
    return 2.0**derivative * np.polynomial.chebyshev.chebval(
        nodes if at is None else 2 * np.asarray(at) - 1, np.polynomial.chebyshev.chebder(c, derivative))


def test_convection_meets_its_equations():
    """Walls and incompressibility to round-off; b and u change as the equations say, with the pressure written."""
    solver = convection(48, 32)
    for _ in range(16):
        solver.advance(0.5)
    f, changes = fields_and_changes(solver)
    kx = 0.5j * np.pi * np.fft.fftfreq(48, 1 / 48)[:, None]
    x = lambda a, order=1: np.fft.ifft(kx**order * np.fft.fft(a, axis=0), axis=0).real
    y = lambda a, order=1: polynomial(a, order)
    assert np.abs(f['u']).max() > 0.05 and np.abs(x(f['u']) + y(f['v'])).max() < 1e-11
    for name, walls in ('u', (0, 0)), ('v', (0, 0)), ('buoyancy', (1, 0)):
        assert np.abs(polynomial(f[name], at=[0.0, 1.0]) - walls).max() < 1e-12, name
    nodes, weights = np.polynomial.legendre.leggauss(32)
    assert abs((polynomial(f['pressure'], at=(nodes + 1) / 2) * weights).mean()) < 1e-13         # zero integral
    force = {'u': -x(f['pressure']), 'v': f['buoyancy'] - y(f['pressure']), 'buoyancy': 0}
    for name, diffusivity in ('u', 0.01), ('v', 0.01), ('buoyancy', 0.01):
        residual = (changes[name] + f['u'] * x(f[name]) + f['v'] * y(f[name]) - force[name]
                    - diffusivity * (x(f[name], 2) + y(f[name], 2)))
        assert np.abs(residual).max() < 1e-5, name


def test_convection_sets_in_at_the_critical_rayleigh_number():
    """Two no-slip walls, wavenumber pi: 1707.9 (Chandrasekhar 1961, 1707.8 at 3.117)."""
    x, y = np.arange(16)[:, None] / 4, chebyshev_nodes(16)
    start = torch.tensor(1 - y + 1e-6 * np.sin(np.pi * y) * np.cos(np.pi * x))
    solver = RayleighBenard([1690.0, 1725.0], [1.0, 1.0], torch.stack([start, start]))
    speed = []
    for _ in range(3):                                                   # the first transient dies out
        for _ in range(10):
            solver.advance(5.0)
        speed.append(solver.fields()['velocity'].abs().amax((1, 2, 3)))
    assert speed[2][0] < speed[1][0] and speed[2][1] > speed[1][1]


def test_convection_carries_the_same_heat_everywhere():
    """In a steady state the Nusselt number at the walls is that of the volume, and buoyancy's work is dissipated."""
    solver = convection(32, 24, rayleigh=5e3)
    for _ in range(60):
        solver.advance(2.0)
    f, kappa = on_grid(solver), 5e3**-0.5
    nodes, weights = np.polynomial.legendre.leggauss(24)
    mean = lambda a: (polynomial(a, at=(nodes + 1) / 2) * weights).sum() / 2 / 32                # over the domain
    at_walls = -polynomial(f['buoyancy'], 1, at=[0.0, 1.0]).mean(0)
    work = mean(f['v'] * f['buoyancy'])
    v_x = np.fft.ifft(0.5j * np.pi * np.fft.fftfreq(32, 1 / 32)[:, None] * np.fft.fft(f['v'], axis=0), axis=0).real
    assert at_walls[0] > 1.5 and at_walls == pytest.approx(1 + work / kappa, rel=1e-3)
    assert kappa * mean((v_x - polynomial(f['u'], 1))**2) == pytest.approx(work, rel=1e-3)


def test_heat_that_only_diffuses_decays_as_its_number_says():
    """Where nothing flows, at a Prandtl and a Schmidt number that are not 1: else two diffusivities are one."""
    y = torch.tensor(chebyshev_nodes(16))
    b = (1 - y) + 0.1 * torch.sin(np.pi * y) + torch.zeros(16, 1, dtype=y.dtype)
    heat = RayleighBenard([100.0], [4.0], b[None])
    heat.advance(1.0)                                                    # kappa = (100 x 4)^-1/2
    expected = 0.1 * torch.sin(np.pi * y) * np.exp(-np.pi**2 / 20)
    assert np.allclose(on_grid(heat)['buoyancy'] - (1 - y.numpy()), expected, atol=1e-6)

    y = torch.tensor(-1 + 2 * np.arange(32) / 32)
    dye = torch.sin(np.pi * y) + torch.zeros(16, 1, dtype=y.dtype)
    still = ShearFlow([10.0], [4.0], torch.zeros(1, 2, 16, 32, dtype=y.dtype), dye[None])
    still.advance(1.0)                                                   # kappa = 1 / (10 x 4)
    assert np.allclose(on_grid(still)['tracer'], dye * np.exp(-np.pi**2 / 40), atol=1e-6)


def test_the_wells_starts_of_shear_flow_are_in_one_split_each(monkeypatch):
    """Sixty of them, for 40 runs of each pair of parameters: all are used."""
    system = find_system('shear_flow')
    p = dataclasses.replace(system.presets['well'], grid=(8, 16))
    p.settings = p.settings | {'refine': 1}
    monkeypatch.setattr(shear_flow_file, 'ShearFlow', lambda reynolds, schmidt, velocity, tracer: velocity)
    starts = []
    for split, runs in enumerate(p.runs.values()):
        keys = [[0, split, pair, run] for pair in range(len(p.pairs)) for run in range(runs)]
        starts.append({u.numpy().tobytes() for u in system.solver([p.pairs[key[2]] for key in keys], keys, p, 'cpu')})
    train, valid, test = starts
    assert not train & valid and not train & test and not valid & test and min(map(len, starts)) > 1


@pytest.mark.parametrize('rate, duration, steps', [(1.0, 0.4, 4), (30.0, 0.4, 6), (1.0, 1.0, 12), (25.0, 1.0, 16), (33.0, 1.0, 20)])
def test_steps_are_as_few_as_are_stable(monkeypatch, rate, duration, steps):
    """Of a tenth of a time unit at most, and of 2 / rate; more than eight are a multiple of four."""
    solver, taken = shear_flow(), []
    monkeypatch.setattr(solver, 'rate', lambda: rate)
    monkeypatch.setattr(solver, 'step', lambda: taken.append(solver.schedule))
    solver.advance(duration)
    assert taken == [(duration, steps)] * steps


@pytest.mark.parametrize('Nx, Ny', [(32, 16), (48, 12)])
def test_products_of_convection_have_points_enough(Nx, Ny):
    """Half more than modes: Gauss's rule of Q points is exact to degree 2Q - 1, and a product times a mode has 3 Ny."""
    solver = convection(Nx, Ny)
    assert len(solver.y) >= 1.5 * Ny and solver.products_x >= 1.5 * Nx
    assert solver.product_grid(solver.evaluate(solver.state, 'products'))[0].shape == (1, solver.products_x, len(solver.y))


def test_the_tail_of_a_spectrum_is_along_either_axis():
    """Beyond two thirds of the largest wavenumber of x or of y; the mean has no scale, and both halves count."""
    kx, ky = torch.fft.fftfreq(24, 1 / 24).abs().view(-1, 1), torch.arange(13.0).view(1, -1)         # to 12
    def share(*modes):
        f = torch.zeros(1, 1, 24, 13, dtype=torch.complex128)
        for (i, j), size in modes:
            f[0, 0, i, j] = size
        return share_of_tail(f, kx, ky).item()
    assert share(((9, 1), 1)) == share(((-9, 1), 1)) == share(((1, 9), 1)) == 1 and share(((8, 8), 1)) == 0
    assert share(((9, 0), 1), ((0, 0), 100), ((1, 0), 3)) == pytest.approx(0.1)
    assert share(((9, 0), 1), ((1, 1), 1)) == pytest.approx(1 / 3)       # a mode of ky > 0 stands for two
