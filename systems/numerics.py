"""
What the systems share: Fourier space, time stepping that does diffusion exactly, field statistics.

`advance(duration)` moves the B runs of a solver on. `fields()` gives The Well's fields, {name: (B,
Nx, Ny[, 2[, 2]])}; `tail()` (B,) the share of the energy in the last third of the spectrum. The
equations are those of The Well, arXiv 2412.00568, and of its sources.
"""
from math import ceil

import numpy as np
import torch

def column(values, dtype, device):
    """One number for each run, (B,), as a tensor (B, 1, 1) that broadcasts over its grid."""
    return torch.as_tensor(values, dtype=dtype, device=device).view(-1, 1, 1)

def periodic_wavenumbers(shape, lengths, like):
    """kx (Nx, 1), ky (1, Ny/2+1) of rfft2, as `like`; and 1 where the 2/3 rule keeps a mode."""
    (Nx, Ny), (LX, LY) = shape, lengths
    kx = like.new_tensor(2 * np.pi / LX * np.fft.fftfreq(Nx, 1 / Nx)).view(Nx, 1)
    ky = like.new_tensor(2 * np.pi / LY * np.arange(Ny // 2 + 1)).view(1, -1)
    return kx, ky, ((kx.abs() < kx.abs().max() * 2 / 3) & (ky < ky.max() * 2 / 3)).to(like.dtype)

def to_grid(f, shape):
    """Inverse of rfft2, (..., Nx, Ny/2+1) -> (..., Nx, Ny). One flat batch is twice as fast."""
    return torch.fft.irfft2(f.flatten(0, -3), s=shape).view(*f.shape[:-2], *shape)

def share_of_tail(f, kx, ky):
    """Share of the sum of |f|^2, f (B, C, Nx, Ny/2+1), beyond 2/3 of the largest kx or ky: (B,)."""
    energy = f.abs().square()
    energy[..., 1:] *= 2                                    # rfft holds half of the spectrum
    energy[..., 0, 0] = 0                                   # the mean has no scale
    outer = (kx > kx.max() * 2 / 3) | (ky > ky.max() * 2 / 3)
    return (energy * outer).sum((1, 2, 3)) / energy.sum((1, 2, 3)).clamp(min=1e-30)

class ExponentialSolver:
    """q' = linear q + tendency(q), `linear` real and diagonal, by exponential time differencing.

    ETDRK4 of Cox and Matthews, J. Comput. Phys. 176, 2002: stable to a rate * dt of about 2.8. A
    solver has `state`, `linear`, `tendency(state)` and `rate()`, largest wavenumber times speed.
    """
    LIMIT = 2.0
    schedule = None                                 # (duration, steps) of the present coefficients

    def advance(self, duration):
        steps = max(ceil(duration / 0.1), ceil(duration * self.rate() / self.LIMIT))
        if steps > 8:
            steps = 4 * ceil(steps / 4)             # so that coefficients serve for longer
        if self.schedule != (duration, steps):
            self.schedule = duration, steps
            self.set_coefficients(duration / steps)
        for _ in range(steps):
            self.step()

    def set_coefficients(self, dt):
        # the formulas cancel badly at small z: take means over a circle around it (Kassam and
        # Trefethen, SIAM J. Sci. Comput. 26, 2005); its lower half is the conjugate of the upper
        z, points = self.linear.double() * dt, 16
        half, first, middle, last = (torch.zeros_like(z) for _ in range(4))

        for j in range(points):                         # the coefficients of Cox and Matthews
            r = z + np.exp(1j * np.pi * (j + 0.5) / points)
            e = r.exp()
            half += (((r / 2).exp() - 1) / r).real * (dt / points)
            first += ((-4 - r + e * (4 - 3 * r + r**2)) / r**3).real * (dt / points)
            middle += (2 * (2 + r + e * (r - 2)) / r**3).real * (dt / points)
            last += ((-4 - 3 * r - r**2 + e * (4 - r)) / r**3).real * (dt / points)

        self.decay, self.half_decay, self.half, self.first, self.middle, self.last = (
            c.to(self.linear.dtype) for c in (z.exp(), (z / 2).exp(), half, first, middle, last))

    def step(self):
        q, N = self.state, self.tendency
        n0 = N(q)
        a = self.half_decay * q + self.half * n0
        n1 = N(a)
        n2 = N(self.half_decay * q + self.half * n1)
        n3 = N(self.half_decay * a + self.half * (2 * n2 - n0))
        self.state = self.decay * q + self.first * n0 + self.middle * (n1 + n2) + self.last * n3

# --- statistics: what a physicist would compute before training anything
class Grid:
    """Derivatives and means of fields (B, T, H, W) on points x (H,), y (W,), with frames dt apart.

    Differences are central. Means are over the area; cells reach half way to the next points.
    """
    def __init__(self, x, y, dt):
        self.points, self.dt = [torch.as_tensor(v, dtype=torch.float32) for v in (x, y)], float(dt)
        self.area = torch.outer(*(torch.gradient(v)[0] for v in self.points))
        self.area /= self.area.sum()                                    # (H, W)

    def derivative(self, f, axis):          # d/dx (axis 0) or d/dy (axis 1): (B, T, H, W)
        return torch.gradient(f, spacing=(self.points[axis].to(f.device),), dim=axis + 2)[0]

    def rate(self, f):                      # change over time: (B, T - 1, H, W)
        return f.diff(dim=1) / self.dt

    def mean(self, f):                      # over area and time: (B,)
        return (f * self.area.to(f.device)).sum((-2, -1)).mean(1)

    def mean_square(self, *fields):         # mean of the sum of squares: (B,)
        return sum(self.mean(f.square()) for f in fields)

    def gradient(self, *fields):            # mean square of the gradients: (B,)
        return self.mean_square(*(self.derivative(f, axis) for f in fields for axis in (0, 1)))

    def change(self, *fields):              # mean square of the rates: (B,)
        return self.mean_square(*map(self.rate, fields))

def fluid_statistics(u, v, s, power, grid):
    """Of a flow (u, v) with a scalar s, (B, T, H, W) each, driven by power (B,): {name: (B,) log}.

    Budgets give diffusivities: the mean square of a field loses, per time, twice its diffusivity
    times the mean square of its gradient, if nothing flows through the edges.
    """
    duration = grid.dt * (u.shape[1] - 1)
    w = grid.derivative(v, 0) - grid.derivative(u, 1)
    mixed = s - (s * grid.area.to(s.device)).sum((-2, -1), keepdim=True)    # s minus its mean

    def lost(*fields):                                      # half of what their mean square loses
        return sum(grid.mean(f[:, :1].square() - f[:, -1:].square()) for f in fields) / 2
    def edge_flux(edge, inner):                             # mean square of s_y there
        gap = grid.points[1][edge] - grid.points[1][inner]
        return ((s[..., edge] - s[..., inner]) / gap.to(s.device)).square().flatten(1).mean(1)

    size, slope, change = grid.mean_square, grid.gradient, grid.change
    values = {
        'velocity x': size(u), 'velocity y': size(v), 'vorticity': size(w),
        'vorticity gradient': slope(w), 'scalar': size(mixed), 'scalar gradient': slope(s),
        'scalar curvature': slope(grid.derivative(s, 0)), 'scalar change': change(s),
        'vorticity change': change(w), 'power': power,
        'flux at the lower edge': edge_flux(0, 1), 'flux at the upper edge': edge_flux(-1, -2),
        # diffusivities, from the budgets
        'viscosity by energy': (lost(u, v) + power * duration) / (size(w) * duration + 1e-10),
        'viscosity by enstrophy': lost(w) / (slope(w) * duration + 1e-10),
        'diffusivity': lost(mixed) / (slope(s) * duration + 1e-10)}
    return {name: (value.abs() + 1e-10).log() for name, value in values.items()}
