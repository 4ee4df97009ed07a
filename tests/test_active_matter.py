"""systems/active_matter.py: growth rates, conservation, forces, the closure, convergence."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import simulate
from helpers import derivatives, wavenumbers
from systems import active_matter, find_system, system_names


def developed(N=32, alpha=-3.0, zeta=9.0, dt=0.01, steps=20, wavy=0.0, amplitude=0.6, seed=0):
    """A solver in float64 after some steps from a strongly nonlinear state; c = 1 + wavy cos cos."""
    c, m = active_matter.active_matter_start(N, seed, torch.float64, amplitude=amplitude)
    x = torch.arange(N, dtype=torch.float64) * 2 * math.pi / N
    c = c + wavy * torch.cos(x)[:, None] * torch.cos(2 * x)
    solver = active_matter.ActiveMatter([alpha], [zeta], c[None], m[None], dt)
    for _ in range(steps):
        solver.step()
    return solver


def numpy_fields(solver):
    return {name: f[0].numpy() for name, f in solver.moments().items()}


@pytest.mark.parametrize('wave', [(1, 0), (0, 2), (1, 1), (2, -1)])
def test_linear_growth_rates(wave):
    """Small waves of the isotropic state grow as the linearised equations say.

    With c = 1 and m4 = O(m^2), m_t = e + zeta m + d_T lap m - 4 d_R m. A wave whose rods lie along or across
    k (longitudinal: m ~ exp(2i phi), phi the direction of k) drives no flow, e = 0. One at 45 degrees
    (transverse: m ~ i exp(2i phi)) drives a shear with e = -s/2, where s = (alpha/2 - zeta beta/4) m + beta/4 e
    is the stress, so e (1 + beta/8) = (-alpha/4 + zeta beta/8) m.
    """
    N, dt, steps, beta = 16, 1e-3, 40, active_matter.BETA
    kx, ky = (2 * np.pi / active_matter.BOX * k for k in wave)
    x = np.arange(N) * active_matter.BOX / N
    ripple = 1e-7 * np.cos(kx * x[:, None] + ky * x)
    along = np.exp(2j * math.atan2(ky, kx))
    pairs = [(a, z) for a in (-1.0, -5.0) for z in (1.0, 9.0)]
    alpha, zeta = (np.repeat(v, 2) for v in zip(*pairs))                 # longitudinal, transverse for each pair
    direction = np.tile([along, 1j * along], len(pairs))[:, None, None]
    m = torch.tensor(direction * ripple)
    solver = active_matter.ActiveMatter(alpha, zeta, torch.ones(m.shape, dtype=torch.float64), m, dt)
    size = lambda: ((solver.moments()['m'].numpy() / direction).real * ripple).sum((1, 2))
    before = size()
    for _ in range(steps):
        solver.step()
    measured = np.log(size() / before) / (steps * dt)
    longitudinal = zeta - 4 * active_matter.D_R - active_matter.D_T * (kx**2 + ky**2)
    transverse = longitudinal + (-alpha / 4 + zeta * beta / 8) / (1 + beta / 8)
    expected = np.where(np.arange(len(alpha)) % 2, transverse, longitudinal)
    assert np.allclose(measured, expected, rtol=1e-4), (measured, expected)


def test_concentration_is_conserved():
    """It moves and diffuses, but none is made."""
    start, end = (numpy_fields(developed(wavy=0.2, steps=steps))['c'] for steps in (0, 40))
    assert abs(end.mean() - start.mean()) < 1e-13
    assert np.abs(end - start).max() > 1e-2


def test_flow_is_incompressible_and_strain_is_its_gradient():
    f = numpy_fields(developed(wavy=0.2))
    (u_x, u_y), (v_x, v_y) = derivatives(f['u']), derivatives(f['v'])
    assert np.abs(u_x).max() > 1e-2                                      # there is a flow
    assert np.abs(u_x + v_y).max() < 1e-13
    assert abs(f['u'].mean()) < 1e-14 and abs(f['v'].mean()) < 1e-14
    assert np.allclose(f['e'].real, u_x, atol=1e-13) and np.allclose(f['e'].imag, (u_y + v_x) / 2, atol=1e-13)


def test_stokes_forces_balance():
    """curl div Sigma + lap w = 0 on resolved modes, with the full stress, which contains the strain rate itself."""
    f = numpy_fields(developed(wavy=0.2))
    c, m, e, N = f['c'], f['m'], f['e'], f['c'].shape[0]
    m4 = active_matter.fourth_moment(torch.tensor(c), torch.tensor(m)).numpy()
    alpha, zeta, beta = -3.0, 9.0, active_matter.BETA
    stress = alpha / 2 * m + beta / 4 * (e * c + e.conj() * m4) - zeta * beta / 4 * (c * m - m.conj() * m4)
    kx, ky = wavenumbers(N)
    kept = np.maximum(np.abs(kx), np.abs(ky)) < 2 * np.pi / active_matter.BOX * N / 4   # inside the 2/3 rule's square
    xx, xy, u, v = (np.fft.fft2(g) * kept for g in (stress.real, stress.imag, f['u'], f['v']))
    curl = -(kx**2 - ky**2) * xy + 2 * kx * ky * xx
    drag = -(kx**2 + ky**2) * (1j * kx * v - 1j * ky * u)
    assert np.abs(curl + drag).max() < 1e-5 * np.abs(drag).max()


def test_solver_follows_the_equations_of_motion():
    """One small step changes c and m as the equations on top of systems/active_matter.py say, every nonlinear term included."""
    zeta, dt, solver = 9.0, 1e-3, developed(N=48, amplitude=0.3, wavy=0.2, steps=2)
    laplacian = lambda f: sum(derivatives(d)[i] for i, d in enumerate(derivatives(f)))
    both = lambda g, m: g(m.real) + 1j * g(m.imag)

    def tendency(f):
        c, m, e = f['c'], f['m'], f['e']
        advect = lambda g: sum(v * d for v, d in zip((f['u'], f['v']), derivatives(g)))
        w, A = derivatives(f['v'])[0] - derivatives(f['u'])[1], e + zeta * m
        m4 = active_matter.fourth_moment(torch.tensor(c), torch.tensor(m)).numpy()
        return (active_matter.D_T * laplacian(c) - advect(c), -both(advect, m) + 1j * w * m + A * c - A.conj() * m4
                + active_matter.D_T * both(laplacian, m) - 4 * active_matter.D_R * m)

    before = numpy_fields(solver)
    again = active_matter.ActiveMatter([-3.0], [zeta], *(torch.tensor(before[k])[None] for k in 'cm'), dt)
    again.step()
    after = numpy_fields(again)
    for k, old, new in zip('cm', tendency(before), tendency(after)):
        change = (after[k] - before[k]) / dt                             # the mean of both ends, to second order
        assert np.abs(change - (old + new) / 2).max() < 1e-3 * np.abs(change).max(), k


@pytest.mark.parametrize('N', [24, 32])
def test_solver_commutes_with_quarter_turns(N):
    """Turning the start turns everything: grids by rot90 (x, y -> -y, x), m by exp(i pi), (u, v) to (-v, u)."""
    c, m = active_matter.active_matter_start(N, 0, torch.float64, amplitude=0.3)
    turn = lambda f: torch.rot90(f, dims=(-2, -1))
    c, m = torch.stack([c, turn(c)]), torch.stack([m, -turn(m)])
    solver = active_matter.ActiveMatter([-3.0, -3.0], [5.0, 5.0], c, m, dt=0.02)
    for _ in range(10):
        solver.step()
    f = solver.moments()
    for ours, expected in (f['m'][1], -f['m'][0]), (f['u'][1], -f['v'][0]), (f['v'][1], f['u'][0]):
        assert torch.allclose(ours, turn(expected), rtol=0, atol=1e-11), 'do x and y keep the same wavenumbers?'


def test_closure_limits():
    """Isotropic: |m4| / c -> r^2 / 2. Perfectly aligned: m4 = m^2 / c."""
    c, phase = torch.tensor([0.7, 1.0, 1.3], dtype=torch.float64), torch.tensor([0.3, 2.0, -1.0], dtype=torch.float64)
    m4 = lambda r: active_matter.fourth_moment(c, torch.polar(r * c, phase))
    assert torch.allclose(m4(1e-4), torch.polar(c * 1e-8 / 2, 2 * phase), rtol=1e-5, atol=0)
    assert torch.allclose(m4(1.0), torch.polar(c, 2 * phase), rtol=1e-5, atol=0)


@pytest.mark.parametrize('kappa', [0.1, 1.0, 3.0, 10.0, 100.0])
def test_closure_is_the_bingham_distribution(kappa):
    theta = torch.arange(4000, dtype=torch.float64) * 2 * math.pi / 4000
    psi = torch.exp(kappa * (torch.cos(2 * (theta - 0.4)) - 1))
    psi = 1.2 * psi / psi.sum()
    moment = lambda n: (psi * torch.exp(1j * n * theta)).sum().view(1)
    assert abs(active_matter.fourth_moment(psi.sum().view(1), moment(2)) - moment(4)) < 1e-5


def test_second_order_in_time():
    """Halving the time step divides the error by four."""
    a, b, c = (np.concatenate([f['m'].ravel(), f['u'].ravel()]) for f in
               (numpy_fields(developed(N=16, dt=0.2 / n, steps=n, wavy=0.1)) for n in (10, 20, 40)))
    assert 3.3 < np.abs(a - b).max() / np.abs(b - c).max() < 4.8


def test_nano_is_resolved():
    """The liveliest pairs stay well under what simulate.py allows; with The Well's diffusion they pass it."""
    p, pairs = find_system('active_matter').preset('nano'), [(-5.0, 13.0), (-5.0, 15.0), (-5.0, 17.0)]

    def worst(**changes):
        solver = active_matter.solver(pairs, [[0, 0, 36 + i, 0] for i in (6, 7, 8)],
                                      dataclasses.replace(p, settings=p.settings | changes), 'cpu')
        frames = []
        tails = simulate.record(solver, p.frames, 0.25, limit=simulate.RESOLVED, tick=lambda: frames.append(1))[1]
        return tails.max(), len(frames)
    (ours, frames), (theirs, until) = worst(), worst(d_t=0.05)
    assert ours < simulate.RESOLVED / 1.5 and frames == p.frames
    assert (p.settings['d_t'], p.domain['box']) == (0.14, 5.0)           # of 675 runs the worst has 7e-4
    assert theirs > simulate.RESOLVED and until < p.frames               # it stops there


def test_sweeps_of_nano_suffice():
    """In the liveliest pair, fewer sweeps of the Stokes equation cost a fraction of what the time step costs."""
    p, pair = find_system('active_matter').preset('nano'), (-5.0, 17.0)

    def state(**changes):
        each = dataclasses.replace(p, settings=p.settings | changes)
        solver = active_matter.solver([pair], [[0, 0, 44, 0]], each, 'cpu')
        for _ in range(round(1 / each.settings['dt'])):
            solver.step()
        return solver.state
    ours, exact, fine = state(), state(sweeps=5), state(sweeps=5, dt=p.settings['dt'] / 4)
    assert (ours - exact).norm() < (exact - fine).norm() / 4


def test_spectral_in_space():
    """The same smooth start on finer grids: halving the spacing gains far more than a factor of 2^4."""
    at_16 = lambda N: numpy_fields(developed(N=N, zeta=5.0, steps=5, amplitude=0.05))['m'][::N // 16, ::N // 16]
    a, b, c = map(at_16, (16, 32, 64))
    assert np.abs(b - c).max() < np.abs(a - c).max() / 500


def test_frames_are_as_far_apart_as_written():
    """Every preset's time steps fit between two frames; those that do not are refused."""
    for system in map(find_system, system_names()):
        for preset in system.presets.values():
            if 'dt' in preset.settings:
                steps = system.dt_save / preset.settings['dt']
                assert steps == pytest.approx(round(steps), rel=1e-9)
    with pytest.raises(ValueError, match='whole number'):
        developed(N=16, dt=0.02, steps=1).advance(0.25)


def test_simulation_is_reproducible():
    """Bit for bit, and whatever runs in the same batch."""
    def run(*seeds):
        c, m = map(torch.stack, zip(*[active_matter.active_matter_start(16, seed) for seed in seeds]))
        return simulate.record(active_matter.ActiveMatter([-1.0, -5.0], [3.0, 9.0], c, m, 0.05), 3, 0.25)[0]
    first, again, other = run(1, 2), run(1, 2), run(1, 3)
    assert {k: v.shape for k, v in first.items()} == {'concentration': (2, 3, 16, 16), 'velocity': (2, 3, 16, 16, 2),
                                                      'D': (2, 3, 16, 16, 2, 2), 'E': (2, 3, 16, 16, 2, 2)}
    for name in first:
        assert np.array_equal(first[name], again[name]) and np.array_equal(first[name][0], other[name][0]), name
        assert name == 'concentration' or not np.array_equal(first[name][1], other[name][1]), name


def test_the_tensors_in_the_files_are_of_the_rods():
    """Rods at an angle of 30 degrees: D = <n n> has n_x n_y > 0, and its larger axis is theirs."""
    angle, order = np.pi / 6, 0.6
    c = torch.ones(1, 16, 16, dtype=torch.float64)
    m = order * np.exp(2j * angle) * c
    D = active_matter.ActiveMatter([-1.0], [1.0], c, m, 0.05).fields()['D'][0, 3, 4].numpy()
    values, axes = np.linalg.eigh(D)
    along = axes[:, 1] * np.sign(axes[0, 1])
    assert np.allclose(along, [np.cos(angle), np.sin(angle)]) and np.allclose(values, [(1 - order) / 2, (1 + order) / 2])
