"""
What the systems share: Fourier space, time stepping that does diffusion exactly, and statistics of fields.

A solver is made from its runs' parameters and initial fields; the dtype of the fields (float32 or float64)
and their device are the solver's. `advance(duration)` moves the runs on; `fields()` gives The Well's fields
at present, {name: (B, Nx, Ny[, 2[, 2]])}; `tail()` tells how well they are resolved: (B,), the share of the
energy that sits in the last third of the spectrum. Equations: The Well's, arXiv 2412.00568, and its papers.
"""
from math import ceil

import numpy as np
import torch


def periodic_wavenumbers(shape, lengths, like):
    """kx (Nx, 1), ky (1, Ny/2+1) of rfft2 on a periodic box, and 1 where the 2/3 rule keeps a mode, else 0.

    In the dtype and on the device of the tensor `like`.
    """
    (Nx, Ny), (LX, LY) = shape, lengths
    kx = like.new_tensor(2 * np.pi / LX * np.fft.fftfreq(Nx, 1 / Nx)).view(Nx, 1)
    ky = like.new_tensor(2 * np.pi / LY * np.arange(Ny // 2 + 1)).view(1, -1)
    return kx, ky, ((kx.abs() < kx.abs().max() * 2 / 3) & (ky < ky.max() * 2 / 3)).to(like.dtype)


def to_grid(f, shape):
    """rfft2's inverse, (..., Nx, Ny/2+1) -> (..., Nx, Ny), in one flat batch: twice as fast on CPU."""
    return torch.fft.irfft2(f.flatten(0, -3), s=shape).view(*f.shape[:-2], *shape)


def share_of_tail(f, kx, ky):
    """Share of the sum of |f|^2, f (B, C, Nx, Ny/2+1) in Fourier space, beyond 2/3 of max kx or max ky: (B,)."""
    energy = f.abs().square()
    energy[..., 1:] *= 2                                                 # rfft holds half of the spectrum
    energy[..., 0, 0] = 0                                                # the mean is no scale
    outer = (kx > kx.max() * 2 / 3) | (ky > ky.max() * 2 / 3)
    return (energy * outer).sum((1, 2, 3)) / energy.sum((1, 2, 3)).clamp(min=1e-30)


class ExponentialSolver:
    """q' = linear q + tendency(q), `linear` real and diagonal, by exponential time differencing ETDRK4.

    Cox and Matthews, J. Comput. Phys. 176, 2002. The coefficients cancel badly at small arguments and are
    taken as means over a circle around each (Kassam and Trefethen, SIAM J. Sci. Comput. 26, 2005).
    A solver sets `state` and `linear` and defines `tendency(state)` and `rate()`, the largest wavenumber
    times speed: the scheme is stable up to rate * dt of about 2.8 and is kept below 2.
    """

    LIMIT = 2.0
    schedule = None                                                      # (duration, steps) of the coefficients at hand

    def advance(self, duration):
        steps = max(ceil(duration / 0.1), ceil(duration * self.rate() / self.LIMIT))
        steps = steps if steps <= 8 else 4 * ceil(steps / 4)             # in fours: coefficients are kept for longer
        if self.schedule != (duration, steps):
            self.schedule = duration, steps
            self.set_coefficients(duration / steps)
        for _ in range(steps):
            self.step()

    def set_coefficients(self, dt):
        z = self.linear.double() * dt
        total = [torch.zeros_like(z) for _ in range(4)]
        points = 16                                                      # on the upper half; the lower is its conjugate
        for j in range(points):
            r = z + np.exp(1j * np.pi * (j + 0.5) / points)
            e = r.exp()
            for t, f in zip(total, (((r / 2).exp() - 1) / r,
                                    (-4 - r + e * (4 - 3 * r + r**2)) / r**3,
                                    2 * (2 + r + e * (r - 2)) / r**3,
                                    (-4 - 3 * r - r**2 + e * (4 - r)) / r**3)):
                t += f.real * (dt / points)
        self.decay, self.half_decay, self.half, self.first, self.middle, self.last = (
            c.to(self.linear.dtype) for c in (z.exp(), (z / 2).exp(), *total))

    def step(self):
        q, N = self.state, self.tendency
        n0 = N(q)
        a = self.half_decay * q + self.half * n0
        n1 = N(a)
        n2 = N(self.half_decay * q + self.half * n1)
        n3 = N(self.half_decay * a + self.half * (2 * n2 - n0))
        self.state = self.decay * q + self.first * n0 + self.middle * (n1 + n2) + self.last * n3


# ---------------------------------------------------------------------------------------------
# statistics: what a physicist would compute before training anything

class Grid:
    """Derivatives and means of fields (B, T, H, W) on points x (H,), y (W,), frames dt apart.

    Central differences over the points' own distances, one-sided at the ends; a point stands for the cell that
    reaches half way to its neighbours, the last for one as wide as its only gap (right for a periodic axis, and for
    points that crowd at a wall a cell that is small anyway), so that means are over the area.
    """

    def __init__(self, x, y, dt):
        self.points, self.dt = [torch.as_tensor(v, dtype=torch.float32) for v in (x, y)], float(dt)
        self.area = torch.outer(*(torch.gradient(v)[0] for v in self.points))
        self.area /= self.area.sum()                                     # (H, W)

    def derivative(self, f, axis):
        """d/dx (axis 0) or d/dy (axis 1)."""
        return torch.gradient(f, spacing=(self.points[axis].to(f.device),), dim=axis + 2)[0]

    def rate(self, f):
        """Change from frame to frame over time, (B, T - 1, H, W)."""
        return f.diff(dim=1) / self.dt

    def mean(self, f):
        """Over area and time: (B,)."""
        return (f * self.area.to(f.device)).sum((-2, -1)).mean(1)

    def mean_square(self, *fields):
        """Of the sum of squares: (B,)."""
        return sum(self.mean(f.square()) for f in fields)

    def gradient(self, *fields):
        """Mean square of the gradients: (B,)."""
        return self.mean_square(*(self.derivative(f, axis) for f in fields for axis in (0, 1)))


def log(x):
    return (x.abs() + 1e-10).log()


def fluid_statistics(u, v, s, power, grid):
    """Of a flow (u, v) and the scalar s it carries, (B, T, H, W) each, power (B,) that drives it: {name: (B,) log}.

    Sizes of velocity, vorticity, scalar and their gradients, and the diffusivities that the window's budgets
    suggest: what the mean squares of velocity, vorticity and scalar lose in time, halved, over what a diffusivity
    of one would take, the mean square of the gradients. They hold where nothing flows through the edges.
    """
    w = grid.derivative(v, 0) - grid.derivative(u, 1)
    duration = grid.dt * (u.shape[1] - 1)
    lost = lambda *fields: sum(grid.mean(f[:, :1].square() - f[:, -1:].square()) for f in fields) / 2
    mixed = s - (s * grid.area.to(s.device)).sum((-2, -1), keepdim=True)
    wall = lambda a, b: ((s[..., a] - s[..., b]) / (grid.points[1][a] - grid.points[1][b]).to(s.device))
    size, slope = grid.mean_square, grid.gradient
    out = {'velocity x': size(u), 'velocity y': size(v), 'vorticity': size(w), 'vorticity gradient': slope(w),
           'scalar': size(mixed), 'scalar gradient': slope(s), 'scalar curvature': slope(grid.derivative(s, 0)),
           'scalar change': size(grid.rate(s)), 'vorticity change': size(grid.rate(w)), 'power': power,
           'flux at the lower edge': wall(0, 1).square().flatten(1).mean(1),
           'flux at the upper edge': wall(-1, -2).square().flatten(1).mean(1),
           'viscosity by energy': (lost(u, v) + power * duration) / (size(w) * duration + 1e-10),
           'viscosity by enstrophy': lost(w) / (slope(w) * duration + 1e-10),
           'diffusivity': lost(mixed) / (slope(s) * duration + 1e-10)}
    return {name: log(value) for name, value in out.items()}
