"""
Active matter: rod-like active particles in a Stokes fluid, on a periodic box.

The kinetic theory of Maddu, Weady and Shelley (J. Comput. Phys. 504, 2024) in two dimensions, with
the Bingham closure. The unknowns are moments of the distribution of orientations: c = <1>, the
concentration, and m = <exp(2i theta)>. The tensor D = <pp> is (c I + [[Re m, Im m], [Im m, -Re m]])
/ 2. With the strain rate e = E_xx + i E_xy and the vorticity w = v_x - u_y of the flow,

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
from systems.numerics import column, periodic_wavenumbers, share_of_tail, to_grid

BOX = 10.0                          # side of the periodic box, in rod lengths
D_T, D_R, BETA = 0.05, 0.05, 0.8    # translational, rotational diffusion; density in the stress

def bingham_table(degree=20):
    """Chebyshev coefficients (float64, variable x = 2 r^2 - 1) of h(r) = |m4| / (c r^2), r = |m|/c.

    A Bingham distribution exp(kappa cos 2(theta - theta0)) has r = I1(kappa)/I0(kappa) and
    |m4|/c = I2(kappa)/I0(kappa). h rises from 1/2 (isotropic) to 1 (perfectly aligned).
    """
    x = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))    # Chebyshev nodes
    r = np.sqrt((x + 1) / 2)
    theta = np.pi * (np.arange(4096) + 0.5) / 4096                      # of 2 theta, half a turn

    def moment(kappa, n):                                               # I_n(kappa), unnormalised
        weight = np.exp(kappa[:, None] * (np.cos(theta) - 1))
        return np.mean(weight * np.cos(n * theta), axis=1)

    # kappa(r) is between low and high: halve the interval, in the logarithm
    low, high = np.full_like(x, 1e-9), np.full_like(x, 1e5)
    for _ in range(100):
        mid = np.sqrt(low * high)
        below = moment(mid, 1) / moment(mid, 0) < r
        low, high = np.where(below, mid, low), np.where(below, high, mid)
    return np.polynomial.chebyshev.chebfit(x, moment(low, 2) / moment(low, 0) / r**2, degree)

def fourth_moment(c, m, h=bingham_table().tolist()):
    """m4 = <exp(4i theta)> = h(|m|/c) m^2 / c, if c (real) and m (complex) are of a Bingham one."""
    q = m / c
    x = (2 * (q.real**2 + q.imag**2) - 1).clamp(max=1.0)
    b1 = b2 = torch.zeros_like(x)
    for a in h[:0:-1]:                                                  # Clenshaw's recurrence
        b1, b2 = a + 2 * x * b1 - b2, b1
    return c * (h[0] + x * b1 - b2) * q * q

class ActiveMatter:
    """A batch of B runs on an N x N periodic grid, each with its own alpha and zeta, (B,).

    c: (B, N, N) real, m: (B, N, N) complex; the first grid axis is x. The stress depends on the
    strain rate: `sweeps` fixed-point iterations solve for it, each to a tenth of the error.
    """
    def __init__(self, alpha, zeta, c, m, dt, box=BOX, d_t=D_T, d_r=D_R, beta=BETA, sweeps=2):
        self.alpha, self.zeta = (column(v, c.dtype, c.device) for v in (alpha, zeta))
        self.beta, self.sweeps, self.dt, self.shape = beta, sweeps, dt, c.shape[1:]
        kx, ky, self.keep = periodic_wavenumbers(self.shape, (box, box), c)
        self.k2 = k2 = kx**2 + ky**2
        self.ikx, self.iky = 1j * kx * self.keep, 1j * ky * self.keep

        # streamfunction psi of the flow driven by a traceless stress s = s_xx + i s_xy:
        # lap^2 psi = (d_xx - d_yy) s_xy - 2 d_xy s_xx; u = psi_y, v = -psi_x
        inverse_k4 = torch.where(k2 > 0, 1 / k2.clamp(min=1e-12)**2, 0.0) * self.keep
        self.psi_xx, self.psi_xy = 2 * kx * ky * inverse_k4, -(kx**2 - ky**2) * inverse_k4
        # e = (-kx ky + i (kx^2 - ky^2)/2) psi. The stress part beta/4 e of an isotropic, uniform
        # suspension only thickens the fluid, by 1 + beta/8: this is exact, the rest by sweeps
        self.e_psi = torch.stack([-kx * ky, (kx**2 - ky**2) / 2])[:, None]
        self.thickening = 1 + beta / 8

        # diffusion of c, Re m and Im m over one time step; the state in Fourier space
        decay = torch.stack([-d_t * k2, -d_t * k2 - 4 * d_r, -d_t * k2 - 4 * d_r])
        self.propagator = torch.exp(decay * dt)                         # (3, N, N/2+1)
        self.state = torch.fft.rfft2(torch.stack([c, m.real, m.imag], 1)) * self.keep
        self.e = torch.zeros_like(m)                # last strain rate: the sweeps' first guess

    def flow(self, c, m, m4):
        """Streamfunction (B, N, N/2+1), in Fourier space, and strain rate e (B, N, N)."""
        active = self.alpha / 2 * m - self.zeta * self.beta / 4 * (c * m - m.conj() * m4)
        e = self.e
        for _ in range(self.sweeps):
            stress = active + self.beta / 4 * ((c - 1) * e + e.conj() * m4)
            s = torch.fft.rfft2(torch.stack([stress.real, stress.imag]))
            psi = (self.psi_xx * s[0] + self.psi_xy * s[1]) / self.thickening
            e = torch.complex(*to_grid(self.e_psi * psi, self.shape))
        self.e = e
        return psi, e

    def tendency(self, state):
        """Everything but diffusion: d/dt of the Fourier state (B, 3, N, N/2+1)."""
        # c, Re m, Im m and their gradients on the grid, (B, 9, N, N)
        grid = to_grid(torch.cat([state, self.ikx * state, self.iky * state], 1), self.shape)
        c, m = grid[:, 0], torch.complex(grid[:, 1], grid[:, 2])

        # the flow that they drive, with its vorticity
        m4 = fourth_moment(c, m)
        psi, e = self.flow(c, m, m4)
        u, v, w = to_grid(torch.stack([self.iky * psi, -self.ikx * psi, self.k2 * psi]), self.shape)

        # it turns, aligns and carries the rods
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
        """{name: (B, N, N)} now, on the grid: c, u, v, real, and m, e, complex."""
        c, *m = to_grid(self.state, self.shape).unbind(1)
        m = torch.complex(*m)
        m4 = fourth_moment(c, m)
        for _ in range(math.ceil(6 / self.sweeps)):                     # e converges to round-off
            psi, e = self.flow(c, m, m4)
        u, v = to_grid(torch.stack([self.iky * psi, -self.ikx * psi]), self.shape)
        return {'c': c, 'm': m, 'u': u, 'v': v, 'e': e}

    def fields(self):
        c, m, u, v, e = self.moments().values()
        D = torch.stack([(c + m.real) / 2, m.imag / 2, m.imag / 2, (c - m.real) / 2], -1)
        E = torch.stack([e.real, e.imag, e.imag, -e.real], -1)
        return {'concentration': c, 'velocity': torch.stack([u, v], -1),
                'D': D.unflatten(-1, (2, 2)), 'E': E.unflatten(-1, (2, 2))}

    def tail(self):
        """Of |m|^2, beyond two thirds of the largest wavenumber kept along either axis: (B,)."""
        return share_of_tail(self.state[:, 1:], self.ikx.abs(), self.iky.abs())

def active_matter_start(N, seed, dtype=torch.float32, device='cpu', modes=8, amplitude=0.05):
    """c = 1 and m = a few small random plane waves: (N, N), real and complex; one for a seed."""
    rng = np.random.default_rng(seed)
    x = np.arange(N) * (2 * np.pi / N)
    m = np.zeros((N, N), complex)
    for _ in range(modes):
        kx, ky = rng.integers(-3, 4, size=2)
        a = amplitude * (rng.normal() + 1j * rng.normal()) / np.sqrt(2 * modes)
        m += a * np.exp(1j * (kx * x[:, None] + ky * x[None, :]))
    m = torch.tensor(m, device=device).to(dtype.to_complex())
    return torch.ones(N, N, dtype=dtype, device=device), m

def solver(pairs, keys, p, device):
    """The solver of a batch: the parameters and the key [seed, split, pair, run] of each run."""
    c, m = zip(*(active_matter_start(p.grid[0], key, device=device) for key in keys))
    return ActiveMatter(*zip(*pairs), torch.stack(c), torch.stack(m), **p.settings, **p.domain)

def statistics(f, grid):
    """Of the order |m| / c = sqrt((D_xx - D_yy)^2 + 4 D_xy^2) / c, the flow, and the power E:D."""
    u, e = (f['velocity_x'], f['velocity_y']), (f['E_xx'], f['E_xy'])
    D, D_difference = (f['D_xx'], f['D_xy']), f['D_xx'] - f['D_yy']
    order = (D_difference**2 + 4 * f['D_xy']**2).sqrt() / f['concentration']

    levels = .02, .1, .25, .5, .75, .9, .98
    quantiles = torch.quantile(order.flatten(1)[:, ::4], order.new_tensor(levels), dim=1)   # (7, B)
    values = {f'order, quantile {level}': q for level, q in zip(levels, quantiles)}
    values |= {'order': grid.mean(order), 'order drift': grid.mean(order[:, -1:] - order[:, :1]),
               'power': grid.mean(f['E_xx'] * D_difference + 2 * f['E_xy'] * f['D_xy'])}

    # mean squares of fields, gradients and changes, as logarithms
    size, slope, change = grid.mean_square, grid.gradient, grid.change
    squares = {'velocity': size(*u), 'strain': size(*e), 'D gradient': slope(*D),
               'D change': change(*D), 'strain gradient': slope(*e), 'velocity change': change(*u),
               'strain change': change(*e), 'order change': change(order),
               'order gradient': slope(order)}
    return values | {name: (value + 1e-8).log() for name, value in squares.items()}

PAIRS = [(float(alpha), float(zeta)) for alpha in (-1, -2, -3, -4, -5) for zeta in range(1, 18, 2)]
SYSTEM = System(
    periodic=(True, True), symmetries=tuple(range(8)), symbols={'alpha': 'α', 'zeta': 'ζ'},
    picture=('velocity_x', 'velocity_y'), statistics=statistics,
    resolution=224, stride=1, noise=1.0, lr=1e-3, epochs=30.0, solver=solver, dt_save=0.25,
    published=dict(train=(45, 175), valid=(16, 24), test=(21, 26)),
    scalars=lambda alpha, zeta, box=BOX: {'L': box, 'zeta': zeta, 'alpha': alpha},
    axes=lambda nx, ny, box=BOX: [np.arange(n) * box / n for n in (nx, ny)],
    file='active_matter_L_{L}_zeta_{zeta}_alpha_{alpha}.hdf5',
    presets={
        'nano': Preset(                                     # milder, for the coarse grid
            (64, 64), 81, PAIRS, dict(train=3, valid=1, test=5), 9,
            '64 x 64, 81 frames, 45 pairs, 405 runs: 5.9 GB, 5 minutes on 2 cores',
            dict(dt=0.25 / 12, d_t=0.14, sweeps=1), dict(box=5.0)),
        'well': Preset(
            (256, 256), 81, PAIRS, dict(train=3, valid=1, test=1), 3, settings=dict(dt=0.005),
            about='256 x 256, 81 frames, 45 pairs, 225 runs: 53 GB; 15 minutes on an H100')})
