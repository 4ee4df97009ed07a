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

def mean_square(*fields):
    """Of the sum of squares of fields (B, ...): (B,)."""
    return sum(f.square().flatten(1).mean(1) for f in fields)


def gradient(*fields):
    """Mean square of the differences between neighbours in x and y, of fields (B, T, H, W): (B,)."""
    return mean_square(*(f.diff(dim=d) for f in fields for d in (2, 3)))


def fluid_statistics(u, v, s, power, duration):
    """Of a flow (u, v) and the scalar s it carries, (B, T, H, W) each: (B, 15), logs.

    Sizes of velocity, vorticity, scalar and their gradients, and the diffusivities that the window's budgets
    suggest: what the mean squares of velocity, vorticity and scalar lose in time over what diffusion takes
    from them, 2 nu or 2 kappa times the mean square of the gradients. `power` (B,) is what drives the flow,
    for `duration` time units.
    """
    w = v.diff(dim=2)[..., :-1] - u.diff(dim=3)[..., :-1, :]
    log = lambda x: (x.abs() + 1e-10).log()
    lost = lambda *fields: mean_square(*(x[:, 0] for x in fields)) - mean_square(*(x[:, -1] for x in fields))
    mixed = s - s.mean((2, 3), keepdim=True)
    sizes = [mean_square(u), mean_square(v), mean_square(w), gradient(w), mean_square(mixed), gradient(s),
             gradient(s.diff(dim=2)), mean_square(s.diff(dim=1)), mean_square(w.diff(dim=1)), power,
             gradient(s[..., :2]), gradient(s[..., -2:])]
    budgets = [log(lost(u, v) / 2 + power * duration) - log(mean_square(w)), log(lost(w)) - log(gradient(w)),
               log(lost(mixed)) - log(gradient(s))]
    return torch.stack([log(x) for x in sizes] + budgets, 1)
