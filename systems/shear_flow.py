"""
Shear flow: two-dimensional incompressible flow with a passive tracer s, in a doubly periodic box.

x is in [0, 1) and y in [-1, 1). As in The Well:

    u_t + u.grad u + grad p = nu lap u,  div u = 0,  s_t + u.grad s = D lap s
    nu = 1/Re,  D = nu/Sc
"""
import itertools

import numpy as np
import torch

from systems import Preset, System
from systems.numerics import (ExponentialSolver, column, fluid_statistics, periodic_wavenumbers,
                              share_of_tail, to_grid)

class ShearFlow(ExponentialSolver):
    """reynolds, schmidt: (B,). velocity: (B, 2, Nx, Ny), made divergence free. tracer: (B, Nx, Ny).

    The state is vorticity w = v_x - u_y and tracer in Fourier space, by the 2/3 rule.
    """
    def __init__(self, reynolds, schmidt, velocity, tracer):
        self.shape = tracer.shape[1:]
        kx, ky, keep = periodic_wavenumbers(self.shape, (1.0, 2.0), tracer)
        k2 = kx**2 + ky**2
        self.ikx, self.iky = 1j * kx * keep, 1j * ky * keep
        self.inverse_k2 = torch.where(k2 > 0, 1 / k2.clamp(min=1e-12), torch.zeros_like(k2)) * keep

        # diffusion of vorticity and tracer, and their start in Fourier space
        Re, Sc = (column(v, velocity.dtype, velocity.device) for v in (reynolds, schmidt))
        self.linear = -torch.stack([1 / Re * k2, 1 / Re / Sc * k2], 1)  # (B, 2, Nx, Ny/2+1)
        self.mean_flow = velocity.mean((-2, -1)).view(-1, 2, 1, 1)      # it never changes
        u, v = torch.fft.rfft2(velocity).unbind(1)
        self.state = torch.stack([self.ikx * v - self.iky * u, torch.fft.rfft2(tracer) * keep], 1)

    def velocity_and_tracer(self, state):
        """u, v, s on the grid, (B, Nx, Ny) each: u = psi_y, v = -psi_x, -lap psi = w."""
        w, s = state.unbind(1)
        psi = w * self.inverse_k2
        u, v, s = to_grid(torch.stack([self.iky * psi, -self.ikx * psi, s]), self.shape)
        return u + self.mean_flow[:, 0], v + self.mean_flow[:, 1], s

    def rate(self):
        u, v, _ = self.velocity_and_tracer(self.state)
        return (self.ikx.abs().max() * u.abs().max() + self.iky.abs().max() * v.abs().max()).item()

    def tendency(self, state):
        u, v, s = self.velocity_and_tracer(state)
        uv, vv_uu, us, vs = torch.fft.rfft2(torch.stack([u * v, v * v - u * u, u * s, v * s]))
        curl = (self.iky**2 - self.ikx**2) * uv - self.ikx * self.iky * vv_uu   # of -div uu
        return torch.stack([curl, -self.ikx * us - self.iky * vs], 1)

    def fields(self):
        """Pressure (its mean is zero), tracer and velocity."""
        u, v, s = self.velocity_and_tracer(self.state)
        uu, uv, vv = torch.fft.rfft2(torch.stack([u * u, u * v, v * v]))
        div_div = self.ikx**2 * uu + 2 * self.ikx * self.iky * uv + self.iky**2 * vv
        p = to_grid(div_div * self.inverse_k2, self.shape)              # lap p = -div div uu
        return {'pressure': p, 'tracer': s, 'velocity': torch.stack([u, v], -1)}

    def tail(self):
        """Of kinetic energy or tracer variance, the larger, beyond 2/3 of the wavenumbers kept."""
        flow, tracer = self.state[:, :1] * self.inverse_k2.sqrt(), self.state[:, 1:]
        return torch.maximum(*(share_of_tail(f, self.ikx.abs(), self.iky.abs())
                               for f in (flow, tracer)))

def shear_flow_start(Nx, Ny, n_shear, n_blobs, width, dtype=torch.float32, device='cpu'):
    """Velocity (2, Nx, Ny) and tracer (Nx, Ny) of The Well: tanh shears, sines to roll them up."""
    x = torch.arange(Nx, dtype=torch.float64)[:, None] / Nx
    y = -1 + 2 * torch.arange(Ny, dtype=torch.float64)[None, :] / Ny
    u, v = torch.full((Nx, Ny), 0.5, dtype=x.dtype), torch.zeros(Nx, Ny, dtype=x.dtype)
    for k in range(n_shear):
        sign = 1 if k % 2 else -1                                       # directions alternate
        q = n_shear * (y + 1 - (2 * k + 1) / n_shear) / (2 * width)
        u = u + sign / 2 * torch.tanh(q / 0.1)
        v = v + 0.1 * torch.sin(sign * n_blobs * np.pi * x) * torch.exp(-q**2 / 0.01)
    return torch.stack([u, v]).to(device, dtype), u.to(device, dtype)

def random_start(Nx, Ny, seed, layers, jumps, widths, blobs, waves, device='cpu'):
    """As `shear_flow_start`, in float32, with layers at random, whose jumps add up to zero.

    jumps, widths (of a layer's share of the box), blobs: (low, high); waves: std of the long waves.
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

    # layers, with their images in the next boxes
    for k in range(layers):
        for period in -4, -2, 0, 2, 4:
            q = (y - place[k] - period) / thickness[k]
            u = u + jump[k] / 2 * np.tanh(q)
            wave = np.sin(2 * np.pi * number[k] * x + phase[k])
            v = v + amplitude[k] * wave * np.exp(-q**2)
    u, v = (torch.tensor(f - f.mean(), dtype=torch.float32, device=device) for f in (u, v))
    return torch.stack([u, v]), u

def solver(pairs, keys, p, device):
    """The solver of a batch: the parameters and the key [seed, split, pair, run] of each run."""
    fine = [n * p.settings['refine'] for n in p.grid]
    draw = {name: value for name, value in p.settings.items() if name != 'refine'}
    if 'layers' in draw:
        starts = [random_start(*fine, key, **draw, device=device) for key in keys]
    else:
        choices, runs, starts = list(itertools.product(*draw['starts'])), [*p.runs.values()], []
        ends = np.round(np.cumsum([0, *runs]) / sum(runs) * len(choices)).astype(int)
        # The Well's few starts are shuffled, dealt out to the splits like the runs, taken in turns
        for seed, split, pair, run in keys:
            shuffled = np.random.default_rng(seed).permutation(len(choices))
            dealt = shuffled[ends[split]:ends[split + 1]]
            choice = choices[dealt[(pair * runs[split] + run) % len(dealt)]]
            starts.append(shear_flow_start(*fine, *choice, device=device))
    velocity, tracer = zip(*starts)
    return ShearFlow(*zip(*pairs), torch.stack(velocity), torch.stack(tracer))

def statistics(f, grid):
    """Of the flow and its tracer; nothing drives it."""
    u = f['velocity_x']
    return fluid_statistics(u, f['velocity_y'], f['tracer'], u.new_zeros(len(u)), grid)

SCHMIDT = 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0
SYSTEM = System(
    periodic=(True, True), symmetries=tuple(range(8)), log_labels=('Rayleigh',),
    shown={'Rayleigh': 'Reynolds'}, symbols={'Reynolds': 'Re', 'Schmidt': 'Sc'},
    picture=('tracer',), statistics=statistics, crop=((0, 1), (0, 0.5)), resolution=224, stride=4,
    noise=1.0, lr=1e-4, epochs=6.0, probe_windows=(20480, 9600), solver=solver, dt_save=0.1,
    scalars=lambda reynolds, schmidt: {'Rayleigh': reynolds, 'Schmidt': schmidt},
    axes=lambda nx, ny: [np.arange(nx) / nx, -1 + 2 * np.arange(ny) / ny],
    file='shear_flow_Reynolds_{Rayleigh:g}_Schmidt_{Schmidt:g}.hdf5',
    presets={
        'nano': Preset(
            (48, 96), 80, [(r, s) for s in SCHMIDT for r in (80.0, 160.0, 320.0, 640.0)],
            dict(train=3, valid=1, test=5), 7,
            '48 x 96 (solved at 96 x 192), 80 frames, 28 pairs, 252 runs: 1.5 GB, 5 minutes',
            dict(refine=2, layers=4, jumps=(0.4, 1.2), widths=(0.1, 0.2), blobs=(0.05, 0.15),
                 waves=0.1)),
        'well': Preset(
            (256, 512), 200, [(r, s) for s in SCHMIDT for r in (1e4, 5e4, 1e5, 5e5)],
            dict(train=32, valid=4, test=4), 1,
            '256 x 512 (solved at 1024 x 2048), 200 frames, 28 pairs, 1120 runs: 470 GB; not timed',
            dict(refine=4, starts=((2, 4), (2, 3, 4, 5), (0.25, 0.5, 1.0, 2.0, 4.0))))})
