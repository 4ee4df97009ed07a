"""
Active matter: rod-like active particles in a Stokes fluid, on a periodic box.

The kinetic theory of Maddu, Weady and Shelley (J. Comput. Phys. 504, 2024) in two dimensions, with the
Bingham closure. The unknowns are moments of the orientation distribution Psi(x, theta): the concentration
c = <1> and the complex nematic moment m = <exp(2i theta)>; D = <pp> is
(c I + [[Re m, Im m], [Im m, -Re m]]) / 2. With the strain rate e = E_xx + i E_xy and the vorticity
w = v_x - u_y of the flow,

    c_t + u.grad c = d_T lap c
    m_t + u.grad m = i w m + A c - conj(A) m4 + d_T lap m - 4 d_R m,        A = e + zeta m
    -lap u + grad P = div Sigma,   div u = 0
    Sigma_xx + i Sigma_xy = alpha/2 m + beta/4 (e c + conj(e) m4) - zeta beta/4 (c m - conj(m) m4)

alpha (< 0: pushers) is the dipole strength, zeta the strength with which neighbours align.
Pseudo-spectral in space (periodic box, 2/3 dealiasing), integrating-factor Heun in time.
"""
import math

import numpy as np
import torch

from systems import Preset, System
from systems.numerics import periodic_wavenumbers, share_of_tail, to_grid

BOX = 10.0              # side of the periodic box, in rod lengths
D_T, D_R = 0.05, 0.05   # translational and rotational diffusion
BETA = 0.8              # particle density in the constraint stress


def bingham_table(degree=20):
    """Chebyshev coefficients (float64, variable x = 2 r^2 - 1) of h(r) = |m4| / (c r^2), r = |m|/c.

    A Bingham distribution exp(kappa cos 2(theta - theta0)) has r = I1(kappa)/I0(kappa) and
    |m4|/c = I2(kappa)/I0(kappa) = 1 - 2 r/kappa; so m4 = h(r) m^2 / c, with h rising from 1/2
    (isotropic) to 1 (perfectly aligned). kappa(r) is found by bisection on the integrals.
    """
    k = degree + 1
    x = np.cos(np.pi * (np.arange(k) + 0.5) / k)                         # Chebyshev nodes
    r = np.sqrt((x + 1) / 2)
    theta = np.pi * (np.arange(4096) + 0.5) / 4096                       # of 2 theta, half a turn
    moment = lambda kappa, n: np.mean(np.exp(kappa[:, None] * (np.cos(theta) - 1)) * np.cos(n * theta), axis=1)
    low, high = np.full(k, 1e-9), np.full(k, 1e5)
    for _ in range(100):
        mid = np.sqrt(low * high)
        below = moment(mid, 1) / moment(mid, 0) < r
        low, high = np.where(below, mid, low), np.where(below, high, mid)
    h = moment(low, 2) / moment(low, 0) / r**2
    return np.polynomial.chebyshev.chebfit(x, h, degree)


CLOSURE = bingham_table().tolist()


def fourth_moment(c, m):
    """m4 = <exp(4i theta)> of the Bingham distribution with moments c (real) and m (complex)."""
    q = m / c
    x = (2 * (q.real**2 + q.imag**2) - 1).clamp(max=1.0)
    b1 = b2 = torch.zeros_like(x)
    for a in CLOSURE[:0:-1]:                                             # Clenshaw's recurrence
        b1, b2 = a + 2 * x * b1 - b2, b1
    return c * (CLOSURE[0] + x * b1 - b2) * q * q


class ActiveMatter:
    """A batch of B runs on an N x N periodic grid, each with its own alpha and zeta.

    alpha, zeta: (B,). c: (B, N, N) real and m: (B, N, N) complex are the state; the first grid
    axis is x, the second y. dtype float32 or float64. `sweeps` fixed-point iterations solve the
    Stokes equation, whose stress contains the strain rate; each gains about a factor of ten.
    """

    def __init__(self, alpha, zeta, c, m, dt, box=BOX, d_t=D_T, d_r=D_R, beta=BETA, sweeps=2):
        B, N, _ = c.shape
        dtype, device = c.dtype, c.device
        column = lambda v: torch.as_tensor(v, dtype=dtype, device=device).view(-1, 1, 1)
        self.alpha, self.zeta = column(alpha), column(zeta)
        self.beta, self.sweeps, self.dt, self.N = beta, sweeps, dt, N
        kx, ky, self.keep = periodic_wavenumbers((N, N), (box, box), c)
        k2 = kx**2 + ky**2
        self.ikx, self.iky = 1j * kx * self.keep, 1j * ky * self.keep
        # streamfunction psi of the flow driven by a traceless stress s = s_xx + i s_xy:
        # lap^2 psi = (d_xx - d_yy) s_xy - 2 d_xy s_xx; u = psi_y, v = -psi_x
        inverse_k4 = torch.where(k2 > 0, 1 / k2.clamp(min=1e-12)**2, torch.zeros_like(k2)) * self.keep
        self.psi_xx, self.psi_xy = 2 * kx * ky * inverse_k4, -(kx**2 - ky**2) * inverse_k4
        # e = (-kx ky + i (kx^2 - ky^2)/2) psi. The stress part beta/4 e of an isotropic, uniform
        # suspension only thickens the fluid, by 1 + beta/8: it is solved exactly, the rest by sweeps.
        self.exx_psi, self.exy_psi = -kx * ky, (kx**2 - ky**2) / 2
        self.thickening = 1 + beta / 8
        self.k2 = k2
        decay = torch.stack([-d_t * k2, -d_t * k2 - 4 * d_r, -d_t * k2 - 4 * d_r])
        self.propagator = torch.exp(decay * dt)                          # (3, N, N/2+1)
        self.state = torch.fft.rfft2(torch.stack([c, m.real, m.imag], 1)) * self.keep
        self.e = torch.zeros_like(m)                                     # last strain rate: the sweeps' first guess

    def grid(self, f):
        return to_grid(f, (self.N, self.N))

    def flow(self, c, m, m4):
        """Streamfunction (B, N, N/2+1), in Fourier space, and strain rate e (B, N, N) of the Stokes flow."""
        active = self.alpha / 2 * m - self.zeta * self.beta / 4 * (c * m - m.conj() * m4)
        e = self.e
        for _ in range(self.sweeps):
            stress = active + self.beta / 4 * ((c - 1) * e + e.conj() * m4)
            s = torch.fft.rfft2(torch.stack([stress.real, stress.imag]))
            psi = (self.psi_xx * s[0] + self.psi_xy * s[1]) / self.thickening
            e = torch.complex(*self.grid(torch.stack([self.exx_psi * psi, self.exy_psi * psi])))
        self.e = e
        return psi, e

    def tendency(self, state):
        """Everything but diffusion: d/dt of the Fourier state (B, 3, N, N/2+1)."""
        grid = self.grid(torch.cat([state, self.ikx * state, self.iky * state], 1))     # (B, 9, N, N)
        c, m = grid[:, 0], torch.complex(grid[:, 1], grid[:, 2])
        m4 = fourth_moment(c, m)
        psi, e = self.flow(c, m, m4)
        u, v, w = self.grid(torch.stack([self.iky * psi, -self.ikx * psi, self.k2 * psi]))
        A = e + self.zeta * m
        turn = 1j * w * m + A * c - A.conj() * m4
        change = -(u[:, None] * grid[:, 3:6] + v[:, None] * grid[:, 6:9])
        change = change + torch.stack([torch.zeros_like(c), turn.real, turn.imag], 1)
        return torch.fft.rfft2(change) * self.keep

    def step(self):
        """One integrating-factor Heun step: diffusion exactly, the rest to second order in dt."""
        E, dt, q = self.propagator, self.dt, self.state
        n0 = self.tendency(q)
        n1 = self.tendency(E * (q + dt * n0))
        self.state = E * q + dt / 2 * (E * n0 + n1)

    def advance(self, duration):
        steps = round(duration / self.dt)
        if abs(steps * self.dt - duration) > 1e-6 * duration:
            raise ValueError(f'{duration} is not a whole number of time steps of {self.dt}')
        for _ in range(steps):
            self.step()

    def moments(self):
        """dict of (B, N, N) grids: c, m (complex), u, v, e (complex), of the present state."""
        c, m_re, m_im = self.grid(self.state).unbind(1)
        m = torch.complex(m_re, m_im)
        m4 = fourth_moment(c, m)
        for _ in range(math.ceil(6 / self.sweeps)):                      # converge e to round-off for output
            psi, e = self.flow(c, m, m4)
        u, v = self.grid(torch.stack([self.iky * psi, -self.ikx * psi]))
        return {'c': c, 'm': m, 'u': u, 'v': v, 'e': e}

    def fields(self):
        f = self.moments()
        c, m, e = f['c'], f['m'], f['e']
        tensor = lambda xx, xy, yy: torch.stack([xx, xy, xy, yy], -1).unflatten(-1, (2, 2))
        return {'concentration': c, 'velocity': torch.stack([f['u'], f['v']], -1),
                'D': tensor((c + m.real) / 2, m.imag / 2, (c - m.real) / 2), 'E': tensor(e.real, e.imag, -e.real)}

    def tail(self):
        """Of |m|^2, beyond two thirds of the largest wavenumber kept along either axis: (B,)."""
        return share_of_tail(self.state[:, 1:], self.ikx.abs(), self.iky.abs())


def active_matter_start(N, seed, dtype=torch.float32, device='cpu', modes=8, amplitude=0.05):
    """c = 1 and m = a few small random plane waves: (N, N) real and complex. One seed, one state."""
    rng = np.random.default_rng(seed)
    x = np.arange(N) * (2 * np.pi / N)
    m = np.zeros((N, N), complex)
    for _ in range(modes):
        kx, ky = rng.integers(-3, 4, size=2)
        a = amplitude * (rng.normal() + 1j * rng.normal()) / np.sqrt(2 * modes)
        m += a * np.exp(1j * (kx * x[:, None] + ky * x[None, :]))
    m = torch.tensor(m, device=device).to(torch.complex64 if dtype == torch.float32 else torch.complex128)
    return torch.ones(N, N, dtype=dtype, device=device), m


def solver(pairs, keys, p, device):
    """The solver of a batch of runs. pairs: their parameters; keys: [seed, split, pair, run] of each."""
    c, m = map(torch.stack, zip(*[active_matter_start(p.grid[0], key, device=device) for key in keys]))
    return ActiveMatter(*zip(*pairs), c, m, **p.settings, **p.domain)


def statistics(f, grid):
    """Of the order |m| / c = sqrt((D_xx - D_yy)^2 + 4 D_xy^2) / c, the flow, and the power E:D: {name: (B,)}."""
    order = ((f['D_xx'] - f['D_yy'])**2 + 4 * f['D_xy']**2).sqrt() / f['concentration']
    levels = (.02, .1, .25, .5, .75, .9, .98)
    quantiles = torch.quantile(order.flatten(1)[:, ::4], torch.tensor(levels, device=order.device), dim=1)
    velocity, strain, D = (f['velocity_x'], f['velocity_y']), (f['E_xx'], f['E_xy']), (f['D_xx'], f['D_xy'])
    change = lambda *fields: grid.mean_square(*map(grid.rate, fields))
    squares = {'velocity': grid.mean_square(*velocity), 'strain': grid.mean_square(*strain), 'D gradient':
               grid.gradient(*D), 'D change': change(*D), 'strain gradient': grid.gradient(*strain),
               'velocity change': change(*velocity), 'strain change': change(*strain), 'order change': change(order),
               'order gradient': grid.gradient(order)}
    return {**{f'order, quantile {level}': q for level, q in zip(levels, quantiles)}, 'order': grid.mean(order),
            'order drift': grid.mean(order[:, -1:] - order[:, :1]),
            'power': grid.mean(f['E_xx'] * (f['D_xx'] - f['D_yy']) + 2 * f['E_xy'] * f['D_xy']),
            **{name: (value + 1e-8).log() for name, value in squares.items()}}


PAIRS = [(float(alpha), float(zeta)) for alpha in (-1, -2, -3, -4, -5) for zeta in range(1, 18, 2)]
SYSTEM = System(
    periodic=(True, True), symmetries=tuple(range(8)), symbols={'alpha': 'α', 'zeta': 'ζ'},
    picture=('velocity_x', 'velocity_y'), statistics=statistics,
    resolution=224, stride=1, noise=1.0, lr=1e-3, epochs=30.0,
    solver=solver, dt_save=0.25, scalars=lambda alpha, zeta, box=BOX: {'L': box, 'zeta': zeta, 'alpha': alpha},
    file='active_matter_L_{L}_zeta_{zeta}_alpha_{alpha}.hdf5',
    axes=lambda nx, ny, box=BOX: [np.arange(n) * box / n for n in (nx, ny)],
    presets={
        'nano': Preset((64, 64), 81, PAIRS, dict(train=3, valid=1, test=1), 9,
                       '64 x 64, 81 frames, 45 pairs, 225 runs, in a box of 5 with a translational diffusion of 0.14, '
                       'milder for the coarse grid: 3.3 GB, 2.6 minutes on 2 cores',
                       dict(dt=0.25 / 12, d_t=0.14, sweeps=1), dict(box=5.0)),
        'well': Preset((256, 256), 81, PAIRS, dict(train=3, valid=1, test=1), 3,
                       '256 x 256, 81 frames, 45 pairs, 225 runs: 53 GB; on an H100 a quarter of an hour', dict(dt=0.005))})
