"""
Simulate active matter and write it in The Well's format.

    python simulate.py active_matter                     # nano: 64 x 64, about two minutes on 2 CPU cores
    python simulate.py active_matter --preset well       # 256 x 256, as The Well; wants a GPU

Rod-like active particles in a Stokes fluid, in two dimensions: the kinetic theory of Maddu, Weady
and Shelley (J. Comput. Phys. 504, 2024) with the Bingham closure. The unknowns are moments of the
orientation distribution Psi(x, theta): the concentration c = <1> and the complex nematic moment
m = <exp(2i theta)>; D = <pp> is (c I + [[Re m, Im m], [Im m, -Re m]]) / 2. With the strain rate
e = E_xx + i E_xy and the vorticity w = v_x - u_y of the flow,

    c_t + u.grad c = d_T lap c
    m_t + u.grad m = i w m + A c - conj(A) m4 + d_T lap m - 4 d_R m,        A = e + zeta m
    -lap u + grad P = div Sigma,   div u = 0
    Sigma_xx + i Sigma_xy = alpha/2 m + beta/4 (e c + conj(e) m4) - zeta beta/4 (c m - conj(m) m4)

alpha (< 0: pushers) is the dipole strength, zeta the strength with which neighbours align.
Pseudo-spectral in space (periodic box, 2/3 dealiasing), integrating-factor Heun in time.
"""
import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# physics, as in The Well's active_matter
BOX = 10.0              # side of the periodic box, in rod lengths
D_T, D_R = 0.05, 0.05   # translational and rotational diffusion
BETA = 0.8              # particle density in the constraint stress
DT_SAVE, FRAMES = 0.25, 81
ALPHAS = (-1.0, -2.0, -3.0, -4.0, -5.0)
ZETAS = (1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0, 17.0)


@dataclass
class Preset:
    """What one preset simulates: 45 parameter pairs, each from several initial conditions."""
    grid: int            # points per side
    dt: float            # time step
    runs: dict           # split -> initial conditions per (alpha, zeta); no split shares one
    files_at_once: int   # (alpha, zeta) pairs advanced in one batch
    about: str           # for --help


PRESETS = {
    'nano': Preset(64, 0.02, {'train': 3, 'valid': 1, 'test': 1}, 9,
                   '64 x 64, 225 runs, 3.3 GB'),
    'well': Preset(256, 0.005, {'train': 3, 'valid': 1, 'test': 1}, 3,
                   '256 x 256, 225 runs, 53 GB; for a GPU'),
}


# ---------------------------------------------------------------------------------------------
# the closure

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


# ---------------------------------------------------------------------------------------------
# the solver

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
        k = 2 * np.pi / box * np.fft.fftfreq(N, 1 / N)
        kx = torch.tensor(k, dtype=dtype, device=device).view(N, 1)
        ky = torch.tensor(np.abs(k[:N // 2 + 1]), dtype=dtype, device=device).view(1, N // 2 + 1)
        k2 = kx**2 + ky**2
        keep = (kx.abs() < ky.max() * 2 / 3) & (ky < ky.max() * 2 / 3)   # 2/3 rule
        self.keep = keep.to(dtype)
        self.ikx, self.iky = 1j * kx * self.keep, 1j * ky * self.keep
        # streamfunction psi of the flow driven by a traceless stress s = s_xx + i s_xy:
        # lap^2 psi = (d_xx - d_yy) s_xy - 2 d_xy s_xx, negated; u = psi_y, v = -psi_x
        inverse_k4 = torch.where(k2 > 0, 1 / k2.clamp(min=1e-12)**2, torch.zeros_like(k2)) * self.keep
        self.psi_xx, self.psi_xy = 2 * kx * ky * inverse_k4, -(kx**2 - ky**2) * inverse_k4
        # e = (-kx ky + i (kx^2 - ky^2)/2) psi. The stress part beta/4 e of an isotropic, uniform
        # suspension only thickens the fluid, by 1 + beta/8: it is solved exactly, the rest by sweeps.
        self.exx_psi, self.exy_psi = -kx * ky, (kx**2 - ky**2) / 2
        self.thickening = 1 + beta / 8
        self.k2 = k2
        decay = torch.stack([-d_t * k2, -d_t * k2 - 4 * d_r, -d_t * k2 - 4 * d_r])
        self.propagator = torch.exp(decay * dt)                          # (3, N, N/2+1)
        self.state = self.forward_fft(torch.stack([c, m.real, m.imag], 1)) * self.keep
        self.e = torch.zeros_like(m)                                     # last strain rate: the sweeps' first guess

    def forward_fft(self, f):
        return torch.fft.rfft2(f)

    def inverse_fft(self, f):
        flat = f.reshape(-1, *f.shape[-2:])                              # a flat batch: twice as fast on CPU
        return torch.fft.irfft2(flat, s=(self.N, self.N)).view(*f.shape[:-1], self.N)

    def flow(self, c, m, m4):
        """Streamfunction (B, N, N/2+1), in Fourier space, and strain rate e (B, N, N) of the Stokes flow."""
        active = self.alpha / 2 * m - self.zeta * self.beta / 4 * (c * m - m.conj() * m4)
        e = self.e
        for _ in range(self.sweeps):
            stress = active + self.beta / 4 * ((c - 1) * e + e.conj() * m4)
            s = self.forward_fft(torch.stack([stress.real, stress.imag]))
            psi = (self.psi_xx * s[0] + self.psi_xy * s[1]) / self.thickening
            e = torch.complex(*self.inverse_fft(torch.stack([self.exx_psi * psi, self.exy_psi * psi])))
        self.e = e
        return psi, e

    def tendency(self, state):
        """Everything but diffusion: d/dt of the Fourier state (B, 3, N, N/2+1)."""
        grid = self.inverse_fft(torch.cat([state, self.ikx * state, self.iky * state], 1))     # (B, 9, N, N)
        c, m = grid[:, 0], torch.complex(grid[:, 1], grid[:, 2])
        m4 = fourth_moment(c, m)
        psi, e = self.flow(c, m, m4)
        u, v, w = self.inverse_fft(torch.stack([self.iky * psi, -self.ikx * psi, self.k2 * psi]))
        A = e + self.zeta * m
        turn = 1j * w * m + A * c - A.conj() * m4
        change = -(u[:, None] * grid[:, 3:6] + v[:, None] * grid[:, 6:9])
        change = change + torch.stack([torch.zeros_like(c), turn.real, turn.imag], 1)
        return self.forward_fft(change) * self.keep

    def step(self):
        """One integrating-factor Heun step: diffusion exactly, the rest to second order in dt."""
        E, dt, q = self.propagator, self.dt, self.state
        n0 = self.tendency(q)
        n1 = self.tendency(E * (q + dt * n0))
        self.state = E * q + dt / 2 * (E * n0 + n1)

    def fields(self):
        """dict of (B, N, N) grids: c, m (complex), u, v, e (complex), of the present state."""
        c, m_re, m_im = self.inverse_fft(self.state).unbind(1)
        m = torch.complex(m_re, m_im)
        m4 = fourth_moment(c, m)
        for _ in range(3):                                               # converge e to round-off for output
            psi, e = self.flow(c, m, m4)
        u, v = self.inverse_fft(torch.stack([self.iky * psi, -self.ikx * psi]))
        return {'c': c, 'm': m, 'u': u, 'v': v, 'e': e}


def initial_condition(N, seed, dtype=torch.float32, device='cpu', modes=8, amplitude=0.05):
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


def simulate(alpha, zeta, seeds, grid, dt, frames=FRAMES, dtype=torch.float32, device='cpu', tick=lambda: None):
    """Run B = len(alpha) simulations at once; float32 arrays in The Well's layout, by field name.

    Returns concentration (B, frames, N, N), velocity (..., 2), D and E (..., 2, 2); x before y.
    `tick` is called after every saved frame. Raises FloatingPointError if a run blows up.
    """
    c, m = map(torch.stack, zip(*[initial_condition(grid, s, dtype, device) for s in seeds]))
    steps = round(DT_SAVE / dt)                                          # per saved frame
    solver = ActiveMatter(alpha, zeta, c, m, DT_SAVE / steps)
    B = len(alpha)
    out = {'concentration': np.empty((B, frames, grid, grid), np.float32),
           'velocity': np.empty((B, frames, grid, grid, 2), np.float32),
           'D': np.empty((B, frames, grid, grid, 2, 2), np.float32),
           'E': np.empty((B, frames, grid, grid, 2, 2), np.float32)}
    for frame in range(frames):
        if frame > 0:
            for _ in range(steps):
                solver.step()
        f = solver.fields()
        c, m, e = f['c'], f['m'], f['e']
        rows = {'concentration': c, 'velocity': torch.stack([f['u'], f['v']], -1),
                'D': torch.stack([(c + m.real) / 2, m.imag / 2, m.imag / 2, (c - m.real) / 2], -1),
                'E': torch.stack([e.real, e.imag, e.imag, -e.real], -1)}
        for name, value in rows.items():
            out[name][:, frame] = value.view(out[name][:, frame].shape).cpu().numpy()
        if not np.isfinite(out['velocity'][:, frame]).all():
            raise FloatingPointError(f'the simulation blew up at t = {frame * DT_SAVE}: take a smaller time step')
        tick()
    return out


# ---------------------------------------------------------------------------------------------
# The Well's format

def write_well_file(path, alpha, zeta, fields):
    """One (alpha, zeta), fields as `simulate` returns them, as The Well's HDF5; atomically."""
    B, T, N = fields['concentration'].shape[:3]
    part = path.with_name(path.name + '.part')
    scalars = {'L': BOX, 'zeta': zeta, 'alpha': alpha}
    with h5py.File(part, 'w') as f:
        f.attrs.update(dataset_name='active_matter', grid_type='cartesian', n_spatial_dims=2, n_trajectories=B,
                       simulation_parameters=list(scalars), **scalars)

        def dataset(group, name, data, dtype=np.float32, **attrs):
            d = group.create_dataset(name, data=np.asarray(data, dtype))
            d.attrs.update(sample_varying=False, time_varying=False)
            d.attrs.update(attrs)

        g = f.create_group('dimensions')
        g.attrs['spatial_dims'] = ['x', 'y']
        dataset(g, 'time', np.arange(T) * DT_SAVE)
        del g['time'].attrs['time_varying']
        for axis in 'xy':
            dataset(g, axis, np.arange(N) * (BOX / N))
        g = f.create_group('boundary_conditions')
        for axis in 'xy':
            b = g.create_group(axis + '_periodic')
            mask = np.zeros(N, bool)
            mask[[0, -1]] = True
            b.attrs.update(associated_dims=[axis], associated_fields=np.array([], h5py.string_dtype()),
                           bc_type='PERIODIC', sample_varying=False, time_varying=False)
            b.create_dataset('mask', data=mask)
            b.create_dataset('values', data=np.zeros(mask.sum(), np.float32))
        g = f.create_group('scalars')
        g.attrs['field_names'] = list(scalars)
        for name, value in scalars.items():
            dataset(g, name, value)
        for order, names in enumerate((['concentration'], ['velocity'], ['D', 'E'])):
            g = f.create_group(f't{order}_fields')
            g.attrs['field_names'] = names
            for name in names:
                tensor = dict(symmetric=True, antisymmetric=False) if order == 2 else {}
                dataset(g, name, fields[name], dim_varying=[True, True], sample_varying=True, time_varying=True,
                        **tensor)
    os.replace(part, path)


def write_text(path, text):
    """A text file that is complete or not there at all."""
    part = path.with_name(path.name + '.part')
    part.write_text(text)
    os.replace(part, path)


def write_stats(train_dir, path):
    """The Well's stats.yaml: mean, std, rms of each field and of its change between frames, over `train_dir`."""
    moments = {}                                                         # (name, '' or '_delta') -> [n, sum, squares]
    for file in sorted(train_dir.glob('*.hdf5')):
        with h5py.File(file) as f:
            for order in range(3):
                for name, d in f[f't{order}_fields'].items():
                    for x in d:                                          # one trajectory (T, N, N, ...)
                        for suffix, y in ('', x), ('_delta', np.diff(x, axis=0)):
                            y = y.astype(np.float64)
                            m = moments.setdefault((name, suffix), [0, 0, 0])
                            m[0] += y[..., 0, 0].size if order == 2 else y[..., 0].size if order == 1 else y.size
                            m[1] += y.sum((0, 1, 2))
                            m[2] += (y * y).sum((0, 1, 2))

    def yaml(value, indent):
        """A number, or a nested list of numbers, as block YAML (exponents written so that YAML reads floats)."""
        if np.ndim(value) == 0:
            return f' {value:.4E}\n'
        return '\n' + ''.join(' ' * indent + '-' + yaml(v, indent + 2) for v in value)

    text = ''
    for statistic in 'mean', 'mean_delta', 'rms', 'rms_delta', 'std', 'std_delta':
        kind, _, suffix = statistic.partition('_')
        text += statistic + ':\n'
        for name in sorted({name for name, _ in moments}):
            n, total, squares = moments[name, suffix and '_delta']
            value = {'mean': total / n, 'rms': np.sqrt(squares / n),
                     'std': np.sqrt(np.maximum(squares / n - (total / n)**2, 0))}[kind]
            text += f'  {name}:' + yaml(value, 2)
    write_text(path, text)


def make_dataset(system, data_dir, preset='nano', seed=0, device='cpu'):
    """Simulate a preset into <data_dir>/<system>; finished files are kept, so a broken run resumes.

    Every run's initial condition depends on (seed, split, alpha, zeta, index) alone, and the runs that
    are advanced together never change, so the same seed gives the same bytes however often it is cut.
    Raises ValueError if the folder holds data that this call did not make.
    """
    p = PRESETS[preset]
    root = Path(data_dir) / system
    recipe = {'preset': preset, 'seed': seed, 'grid': p.grid, 'dt': p.dt, 'runs': p.runs}
    note = root / 'simulated.json'
    existing = sorted(root.glob('data/*/*.hdf5'))
    if note.exists() and json.loads(note.read_text()) != recipe:
        raise ValueError(f'{root} was simulated with other settings ({note.read_text()}): '
                         f'delete it or choose another --data-dir')
    if existing and not note.exists():
        raise ValueError(f'{root} already holds {len(existing)} files that this script did not write: '
                         f'choose another --data-dir')
    root.mkdir(parents=True, exist_ok=True)
    if not note.exists():
        write_text(note, json.dumps(recipe))

    pairs = [(a, z) for a in ALPHAS for z in ZETAS]
    batches = [(split, runs, pairs[i:i + p.files_at_once]) for split, runs in p.runs.items()
               for i in range(0, len(pairs), p.files_at_once)]
    path = lambda split, a, z: root / 'data' / split / f'active_matter_L_{BOX}_zeta_{z}_alpha_{a}.hdf5'
    bar = tqdm(total=sum(runs * len(batch) * FRAMES for _, runs, batch in batches), unit='frame',
               desc=f'simulating {root}', smoothing=0.05)
    for split, runs, batch in batches:
        (root / 'data' / split).mkdir(parents=True, exist_ok=True)
        todo = [pair for pair in batch if not path(split, *pair).exists()]
        if not todo:
            bar.update(runs * len(batch) * FRAMES)
            continue
        each = [(a, z, [seed, 'train valid test'.split().index(split), pairs.index((a, z)), r])
                for a, z in batch for r in range(runs)]
        alpha, zeta, seeds = zip(*each)
        out = simulate(alpha, zeta, seeds, p.grid, p.dt, device=device, tick=lambda: bar.update(len(each)))
        for i, (a, z) in enumerate(batch):
            if (a, z) in todo:
                write_well_file(path(split, a, z), a, z, {k: v[i * runs:(i + 1) * runs] for k, v in out.items()})
    bar.close()
    if not (root / 'stats.yaml').exists():
        write_stats(root / 'data' / 'train', root / 'stats.yaml')
    return root


def main():
    presets = '\n'.join(f'  {name:6} {p.about}' for name, p in PRESETS.items())
    parser = argparse.ArgumentParser(description=__doc__ + '\npresets:\n' + presets,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('system', choices=['active_matter'])
    parser.add_argument('--preset', choices=list(PRESETS), default='nano')
    parser.add_argument('--data-dir', default=os.environ.get('THE_WELL_DATA_DIR', 'data'),
                        help='default: $THE_WELL_DATA_DIR, else ./data')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    try:
        root = make_dataset(args.system, args.data_dir, args.preset, args.seed, args.device)
    except (ValueError, OSError, FloatingPointError) as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(2)
    print(f'{root} is complete. Next: python train.py --data {args.system} --data-dir {args.data_dir}')


if __name__ == '__main__':
    main()
