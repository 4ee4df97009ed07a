"""
Shear flow: two-dimensional incompressible flow that carries a tracer, in a doubly periodic box.
"""
import itertools

import numpy as np
import torch

from systems import Preset, System
from systems.numerics import ExponentialSolver, fluid_statistics, periodic_wavenumbers, share_of_tail, to_grid


class ShearFlow(ExponentialSolver):
    """Two-dimensional incompressible flow with a passive tracer s; x in [0, 1), y in [-1, 1), both periodic.

        u_t + u.grad u + grad p = nu lap u,  div u = 0,  s_t + u.grad s = D lap s,  nu = 1/Re,  D = nu/Sc

    reynolds, schmidt: (B,). velocity: (B, 2, Nx, Ny), projected onto div u = 0 first; tracer: (B, Nx, Ny).
    The state is vorticity w = v_x - u_y and tracer in Fourier space, dealiased by the 2/3 rule; the mean
    flow never changes. `fields()` has pressure (mean zero), tracer and velocity.
    """

    LX, LY = 1.0, 2.0

    def __init__(self, reynolds, schmidt, velocity, tracer):
        B, _, Nx, Ny = velocity.shape
        dtype, device = velocity.dtype, velocity.device
        self.shape = Nx, Ny
        kx, ky, keep = periodic_wavenumbers(self.shape, (self.LX, self.LY), tracer)
        k2 = kx**2 + ky**2
        self.ikx, self.iky = 1j * kx * keep, 1j * ky * keep
        self.inverse_k2 = torch.where(k2 > 0, 1 / k2.clamp(min=1e-12), torch.zeros_like(k2)) * keep
        column = lambda v: torch.as_tensor(v, dtype=dtype, device=device).view(-1, 1, 1)
        nu = 1 / column(reynolds)
        self.linear = -torch.stack([nu * k2, nu / column(schmidt) * k2], 1)                              # (B, 2, ..)
        self.mean_flow = velocity.mean((-2, -1)).view(B, 2, 1, 1)
        u, v = torch.fft.rfft2(velocity).unbind(1)
        self.state = torch.stack([self.ikx * v - self.iky * u, torch.fft.rfft2(tracer) * keep], 1)

    def grid(self, f):
        return to_grid(f, self.shape)

    def velocity_and_tracer(self, state):
        """u, v, s on the grid, (B, Nx, Ny) each; u = psi_y and v = -psi_x of the streamfunction, -lap psi = w."""
        w, s = state.unbind(1)
        psi = w * self.inverse_k2
        u, v, s = self.grid(torch.stack([self.iky * psi, -self.ikx * psi, s]))
        return u + self.mean_flow[:, 0], v + self.mean_flow[:, 1], s

    def rate(self):
        u, v, _ = self.velocity_and_tracer(self.state)
        return (self.ikx.abs().max() * u.abs().max() + self.iky.abs().max() * v.abs().max()).item()

    def tendency(self, state):
        u, v, s = self.velocity_and_tracer(state)
        uv, vv_uu, us, vs = torch.fft.rfft2(torch.stack([u * v, v * v - u * u, u * s, v * s]))
        curl = (self.iky**2 - self.ikx**2) * uv - self.ikx * self.iky * vv_uu                            # of -div uu
        return torch.stack([curl, -self.ikx * us - self.iky * vs], 1)

    def fields(self):
        u, v, s = self.velocity_and_tracer(self.state)
        uu, uv, vv = torch.fft.rfft2(torch.stack([u * u, u * v, v * v]))
        div_div = self.ikx**2 * uu + 2 * self.ikx * self.iky * uv + self.iky**2 * vv
        p = div_div * self.inverse_k2                                    # lap p = -div div uu
        return {'pressure': self.grid(p), 'tracer': s, 'velocity': torch.stack([u, v], -1)}

    def tail(self):
        """The larger of the shares of kinetic energy and of tracer variance beyond 2/3 of the wavenumbers kept."""
        flow, tracer = self.state[:, :1] * self.inverse_k2.sqrt(), self.state[:, 1:]
        return torch.maximum(*(share_of_tail(f, self.ikx.abs(), self.iky.abs()) for f in (flow, tracer)))


def shear_flow_start(Nx, Ny, n_shear, n_blobs, width, dtype=torch.float32, device='cpu'):
    """Velocity (2, Nx, Ny) and tracer (Nx, Ny) of The Well's shear_flow: tanh shears, sines that will roll them up."""
    x = torch.arange(Nx, dtype=torch.float64)[:, None] / Nx
    y = -1 + 2 * torch.arange(Ny, dtype=torch.float64)[None, :] / Ny
    u, v = torch.full((Nx, Ny), 0.5, dtype=torch.float64), torch.zeros(Nx, Ny, dtype=torch.float64)
    for k in range(n_shear):
        sign = 1 if k % 2 else -1
        q = n_shear * (y + 1 - (2 * k + 1) / n_shear) / (2 * width)
        u = u + sign / 2 * torch.tanh(q / 0.1)
        v = v + 0.1 * torch.sin(sign * n_blobs * np.pi * x) * torch.exp(-q**2 / 0.01)
    return torch.stack([u, v]).to(device, dtype), u.to(device, dtype)


def random_start(Nx, Ny, seed, layers, jumps, widths, blobs, waves, dtype=torch.float32, device='cpu'):
    """As `shear_flow_start`, but with places, thicknesses, jumps and blobs of each layer, and long waves, of its own.

    jumps, widths (of a layer's share of the box) and the size of the `blobs` are drawn evenly from (low, high), waves
    normally with that std. Jumps alternate in sign and add up to zero, so that the whole is periodic.
    """
    rng = np.random.default_rng(seed)
    place = 2 * (np.arange(layers) + rng.uniform(-0.3, 0.3, layers)) / layers + rng.uniform(-1, 1)
    jump = np.where(np.arange(layers) % 2, -1, 1) * rng.uniform(*jumps, layers)
    jump = (jump - jump.mean()) * rng.choice([-1, 1])
    thickness, amplitude = 2 * rng.uniform(*widths, layers) / layers, rng.uniform(*blobs, layers)
    number, phase = rng.integers(1, 4, layers), rng.uniform(0, 2 * np.pi, layers)
    x, y = np.arange(Nx)[:, None] / Nx, -1 + 2 * np.arange(Ny)[None, :] / Ny
    u, v = np.zeros((Nx, Ny)), np.zeros((Nx, Ny))
    for wave in 1, 2, 3:
        u = u + waves * rng.normal() * np.sin(np.pi * wave * y + rng.uniform(0, 2 * np.pi))
    for k in range(layers):
        for period in -4, -2, 0, 2, 4:
            q = (y - place[k] - period) / thickness[k]
            u = u + jump[k] / 2 * np.tanh(q)
            v = v + amplitude[k] * np.sin(2 * np.pi * number[k] * x + phase[k]) * np.exp(-q**2)
    u, v = (torch.tensor(f - f.mean(), dtype=dtype, device=device) for f in (u, v))
    return torch.stack([u, v]), u


def solver(pairs, keys, p, device):
    """The solver of a batch of runs. pairs: their parameters; keys: [seed, split, pair, run] of each.

    The Well's starts are an enumerable few: shuffled, dealt out to the splits, and taken in turns there. A preset
    with `layers` draws each run's own.
    """
    fine = [n * p.settings['refine'] for n in p.grid]
    if 'layers' in p.settings:
        draw = {name: value for name, value in p.settings.items() if name != 'refine'}
        starts = [random_start(*fine, key, **draw, device=device) for key in keys]
        return ShearFlow(*zip(*pairs), *map(torch.stack, zip(*starts)))
    starts = list(itertools.product(*p.settings['starts']))
    ends = np.round(np.cumsum([0, *p.runs.values()]) / sum(p.runs.values()) * len(starts)).astype(int)

    def start(seed, split, pair, run):
        mine = np.random.default_rng(seed).permutation(len(starts))[ends[split]:ends[split + 1]]
        n_shear, n_blobs, width = starts[mine[(pair * list(p.runs.values())[split] + run) % len(mine)]]
        return shear_flow_start(*fine, n_shear, n_blobs, width, device=device)
    return ShearFlow(*zip(*pairs), *map(torch.stack, zip(*[start(*key) for key in keys])))


def statistics(f, grid):
    """Of the flow and its tracer; nothing drives it."""
    u = f['velocity_x']
    return fluid_statistics(u, f['velocity_y'], f['tracer'], u.new_zeros(len(u)), grid)


SCHMIDT = 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0
with_schmidt = lambda reynolds: [(r, s) for s in SCHMIDT for r in reynolds]
SYSTEM = System(
    periodic=(True, True), symmetries=tuple(range(8)), log_labels=('Rayleigh',),
    shown={'Rayleigh': 'Reynolds'},                                      # the files call the Reynolds number Rayleigh
    symbols={'Reynolds': 'Re', 'Schmidt': 'Sc'}, picture=('tracer',), statistics=statistics,
    crop=((0, 1), (0, 0.5)), resolution=224, stride=4, noise=1.0, lr=1e-4, epochs=6.0, probe_windows=(20480, 9600),
    solver=solver, dt_save=0.1, scalars=lambda reynolds, schmidt: {'Rayleigh': reynolds, 'Schmidt': schmidt},     # sic
    file='shear_flow_Reynolds_{Rayleigh:g}_Schmidt_{Schmidt:g}.hdf5',
    axes=lambda nx, ny: [np.arange(nx) / nx, -1 + 2 * np.arange(ny) / ny],
    presets={
        'nano': Preset((48, 96), 80, with_schmidt((80.0, 160.0, 320.0, 640.0)), dict(train=3, valid=1, test=1), 7,
                       '48 x 96 (solved at 96 x 192), 80 frames, 28 pairs at Reynolds 80 to 640, 140 runs, each of '
                       'four layers at places of its own: 0.8 GB, 3 minutes on 2 cores',
                       dict(refine=2, layers=4, jumps=(0.4, 1.2), widths=(0.1, 0.2), blobs=(0.05, 0.15), waves=0.1)),
        'well': Preset((256, 512), 200, with_schmidt((1e4, 5e4, 1e5, 5e5)), dict(train=32, valid=4, test=4), 1,
                       '256 x 512 (solved at 1024 x 2048), 200 frames, 28 pairs, 1120 runs: 470 GB; for a GPU, '
                       'not timed',
                       dict(refine=4, starts=((2, 4), (2, 3, 4, 5), (0.25, 0.5, 1.0, 2.0, 4.0))))})
