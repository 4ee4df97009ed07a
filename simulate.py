"""
Simulate one of three systems and write it in The Well's format.

    python simulate.py active_matter                     # nano: small grids, minutes on 2 CPU cores
    python simulate.py shear_flow
    python simulate.py rayleigh_benard
    python simulate.py active_matter --preset well       # The Well's grid and frames; wants a GPU

solvers.py solves the equations. A dataset is every pair of values of the system's two parameters, each from
several initial conditions, of which none is in two splits; one file per pair and split. An interrupted
simulation leaves no half file, and goes on when it is started again.
"""
import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

import solvers

SPLITS = 'train', 'valid', 'test'
RESOLVED = 1e-4         # largest share of the energy in the last third of the spectrum of a resolved run


# ---------------------------------------------------------------------------------------------
# the three systems

@dataclass
class Preset:
    """What one preset simulates; `about` says it in words."""
    grid: tuple             # points along x and y, as written
    frames: int
    pairs: list             # of the two parameters
    runs: dict              # split -> initial conditions per pair
    files_at_once: int      # pairs advanced in one batch
    about: str
    settings: dict = field(default_factory=dict)                         # of the function below that starts the solver


def active_matter(pairs, keys, p, device):
    """The solver of a batch of runs. pairs: their parameters; keys: [seed, split, pair, run] of each."""
    c, m = map(torch.stack, zip(*[solvers.active_matter_start(p.grid[0], key, device=device) for key in keys]))
    return solvers.ActiveMatter(*zip(*pairs), c, m, **p.settings)


def shear_flow(pairs, keys, p, device):
    """Starts are an enumerable few: shuffled, dealt out to the splits, and taken in turns there."""
    starts = list(itertools.product(*p.settings['starts']))
    ends = np.round(np.cumsum([0, *p.runs.values()]) / sum(p.runs.values()) * len(starts)).astype(int)

    def start(seed, split, pair, run):
        mine = np.random.default_rng(seed).permutation(len(starts))[ends[split]:ends[split + 1]]
        n_shear, n_blobs, width = starts[mine[(pair * p.runs[SPLITS[split]] + run) % len(mine)]]
        fine = (n * p.settings['refine'] for n in p.grid)
        return solvers.shear_flow_start(*fine, n_shear, n_blobs, width, device=device)
    return solvers.ShearFlow(*zip(*pairs), *map(torch.stack, zip(*[start(*key) for key in keys])))


def rayleigh_benard(pairs, keys, p, device):
    """db goes through The Well's five values from run to run."""
    b = [solvers.rayleigh_benard_start(*p.grid, (0.2, 0.4, 0.6, 0.8, 1.0)[(pair + run + 3 * split) % 5],
                                       [seed, split, pair, run], p.settings['noise'], device=device)
         for seed, split, pair, run in keys]
    return solvers.RayleighBenard(*zip(*pairs), torch.stack(b))


@dataclass
class System:
    """One of The Well's systems: how it is solved and written."""
    solver: callable        # (pairs, keys, preset, device) -> solver
    dt_save: float          # time between frames
    scalars: callable       # the two parameters -> The Well's scalars
    file: str               # name of a pair's file
    axes: callable          # grid -> coordinates of x and y
    presets: dict
    walls: bool = False     # y is bounded by walls, not periodic


def pairs(first, second):
    """Every pair, the second parameter varying slowest."""
    return [(float(a), float(b)) for b in second for a in first]


ACTIVE = [(float(alpha), float(zeta)) for alpha in (-1, -2, -3, -4, -5) for zeta in range(1, 18, 2)]
SCHMIDT = PRANDTL = 0.1, 0.2, 0.5, 1, 2, 5, 10
SYSTEMS = {
    'active_matter': System(
        active_matter, 0.25, lambda alpha, zeta: {'L': solvers.BOX, 'zeta': zeta, 'alpha': alpha},
        'active_matter_L_10.0_zeta_{1}_alpha_{0}.hdf5',
        lambda nx, ny: [np.arange(n) * solvers.BOX / n for n in (nx, ny)],
        {'nano': Preset((64, 64), 81, ACTIVE, dict(train=3, valid=1, test=1), 9,
                        '64 x 64, 81 frames, 45 pairs, 225 runs: 3.3 GB, 3 minutes on 2 cores', dict(dt=0.25 / 12)),
         'well': Preset((256, 256), 81, ACTIVE, dict(train=3, valid=1, test=1), 3,
                        '256 x 256, 81 frames, 45 pairs, 225 runs: 53 GB; for a GPU, not timed', dict(dt=0.005))}),
    'shear_flow': System(
        shear_flow, 0.1, lambda reynolds, schmidt: {'Rayleigh': reynolds, 'Schmidt': schmidt},           # sic
        'shear_flow_Reynolds_{0:g}_Schmidt_{1:g}.hdf5',
        lambda nx, ny: [np.arange(nx) / nx, -1 + 2 * np.arange(ny) / ny],
        {'nano': Preset((48, 96), 80, pairs((80, 160, 320, 640), SCHMIDT), dict(train=3, valid=1, test=1), 7,
                        '48 x 96 (solved at 96 x 192), 80 frames, 28 pairs at Reynolds 80 to 640, 140 runs, each of '
                        'four layers, so that every crop of 32 x 32 sees one: 0.8 GB, 2 minutes on 2 cores',
                        dict(refine=2, starts=((4,), (2, 3, 4, 5), tuple(1 + i / 40 for i in range(41))))),
         'well': Preset((256, 512), 200, pairs((1e4, 5e4, 1e5, 5e5), SCHMIDT), dict(train=32, valid=4, test=4), 1,
                        '256 x 512 (solved at 1024 x 2048), 200 frames, 28 pairs, 1120 runs: 470 GB; for a GPU, '
                        'not timed',
                        dict(refine=4, starts=((2, 4), (2, 3, 4, 5), (0.25, 0.5, 1.0, 2.0, 4.0))))}),
    'rayleigh_benard': System(
        rayleigh_benard, 0.25, lambda rayleigh, prandtl: {'Prandtl': prandtl, 'Rayleigh': rayleigh},
        'rayleigh_benard_Rayleigh_{0:g}_Prandtl_{1:g}.hdf5',
        lambda nx, ny: [np.arange(nx) * 4 / nx, solvers.chebyshev_nodes(ny)],
        {'nano': Preset((96, 32), 80, pairs((2.5e3, 8e3, 2.5e4, 8e4), PRANDTL), dict(train=3, valid=1, test=1), 4,
                        '96 x 32, 80 frames, 28 pairs at Rayleigh 2.5e3 to 8e4, 140 runs: 0.5 GB, 2 minutes on 2 cores',
                        dict(noise=0.1)),
         'well': Preset((512, 128), 200, pairs((1e6, 1e7, 1e8, 1e9, 1e10), PRANDTL), dict(train=40, valid=5, test=5), 1,
                        '512 x 128, 200 frames, 35 pairs, 1750 runs: 370 GB; for a GPU, not timed', dict(noise=1e-3))},
        walls=True),
}


def record(solver, frames, dt_save, step=1, tick=lambda: None):
    """Advance a solver through its frames: The Well's fields, and each run's worst `tail()` after t = 0.

    Fields: {name: float32 (B, frames, Nx, Ny[, 2[, 2]])}, every `step`-th point of the solver's grid. `tick` is
    called after every frame. Raises FloatingPointError if a run blows up.
    """
    out, worst = {}, 0.0
    for frame in range(frames):
        if frame > 0:
            solver.advance(dt_save)
        for name, value in solver.fields().items():
            value = value[:, ::step, ::step].float().cpu().numpy()
            if not np.isfinite(value).all():
                raise FloatingPointError(f'the simulation blew up at t = {frame * dt_save}: take a smaller time step')
            if name not in out:
                out[name] = np.empty((len(value), frames, *value.shape[1:]), np.float32)
            out[name][:, frame] = value
        if frame > 0:                                                    # a start may be rougher than what follows
            worst = np.maximum(worst, solver.tail().cpu().numpy())
        tick()
    return out, worst


# ---------------------------------------------------------------------------------------------
# The Well's format

def write_well_file(path, name, pair, fields):
    """Runs of system `name` at one pair of parameters, fields as from `record`, as The Well's HDF5; atomically."""
    system = SYSTEMS[name]
    B, T, nx, ny = next(iter(fields.values())).shape[:4]
    part = path.with_name(path.name + '.part')
    scalars = system.scalars(*pair)
    with h5py.File(part, 'w') as f:
        f.attrs.update(dataset_name=name, grid_type='cartesian', n_spatial_dims=2, n_trajectories=B,
                       simulation_parameters=list(scalars), **scalars)

        def dataset(group, name, data, dtype=np.float32, **attrs):
            d = group.create_dataset(name, data=np.asarray(data, dtype))
            d.attrs.update(sample_varying=False, time_varying=False)
            d.attrs.update(attrs)

        g = f.create_group('dimensions')
        g.attrs['spatial_dims'] = ['x', 'y']
        dataset(g, 'time', np.arange(T) * system.dt_save)
        del g['time'].attrs['time_varying']
        for axis, points in zip('xy', system.axes(nx, ny)):
            dataset(g, axis, points)
        g = f.create_group('boundary_conditions')
        for axis, n in zip('xy', (nx, ny)):
            kind = 'wall' if axis == 'y' and system.walls else 'periodic'
            b = g.create_group(f'{axis}_{kind}')
            mask = np.zeros(n, bool)
            mask[[0, -1]] = True
            b.attrs.update(associated_dims=[axis], associated_fields=np.array([], h5py.string_dtype()),
                           bc_type=kind.upper(), sample_varying=False, time_varying=False)
            b.create_dataset('mask', data=mask)
            b.create_dataset('values', data=np.zeros(mask.sum(), np.float32))
        g = f.create_group('scalars')
        g.attrs['field_names'] = list(scalars)
        for name, value in scalars.items():
            dataset(g, name, value)
        for order in range(3):
            names = [name for name, values in fields.items() if values.ndim == 4 + order]
            g = f.create_group(f't{order}_fields')
            g.attrs['field_names'] = np.array(names, h5py.string_dtype())
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


def check_device(device):
    """Raise ValueError unless `device` is cpu, or cuda where there is one."""
    if device not in ('cpu', 'cuda') or device == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'device {device!r} is not to be had here: --device cpu always is')


@contextlib.contextmanager
def alone_in(folder):
    """Other processes that want the same folder wait for this one; where folders cannot be locked, nobody does."""
    lock = None
    with contextlib.suppress(ImportError, OSError):
        import fcntl
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


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


def make_dataset(name, data_dir, preset='nano', seed=0, device='cpu'):
    """Simulate a preset into <data_dir>/<name>; finished files are kept, so a broken run resumes.

    Every run's initial condition depends on (seed, split, pair, run) alone, and the runs that are advanced
    together never change, so the same seed gives the same bytes however often it is cut. Says how many runs
    are not resolved. Raises ValueError if the folder holds data that this call did not make.
    """
    p = SYSTEMS[name].presets[preset]
    root = Path(data_dir) / name
    recipe = {'preset': preset, 'seed': seed, **dataclasses.asdict(p)}
    recipe = json.loads(json.dumps({k: v for k, v in recipe.items() if k not in ('about', 'files_at_once')}))
    note = root / 'simulated.json'
    existing = sorted(root.glob('data/*/*.hdf5'))
    if note.exists() and json.loads(note.read_text()) != recipe:
        raise ValueError(f'{root} was simulated with other settings ({note}): delete it or choose another --data-dir')
    if existing and not note.exists():
        raise ValueError(f'{root} already holds {len(existing)} files that this script did not write: '
                         f'choose another --data-dir')
    root.mkdir(parents=True, exist_ok=True)
    with alone_in(root):
        if not note.exists():
            write_text(note, json.dumps(recipe))
        simulate_missing(name, p, root, seed, device)
    return root


def simulate_missing(name, p, root, seed, device):
    """What `make_dataset` does, once it is clear that it may."""
    system = SYSTEMS[name]
    batches = [(split, p.pairs[i:i + p.files_at_once]) for split in SPLITS
               for i in range(0, len(p.pairs), p.files_at_once)]
    path = lambda split, pair: root / 'data' / split / system.file.format(*pair)
    resolution = []
    bar = tqdm(total=sum(p.runs[split] * len(batch) for split, batch in batches) * p.frames, unit='frame',
               desc=f'simulating {root}', smoothing=0.05)
    for split, batch in batches:
        runs = p.runs[split]
        (root / 'data' / split).mkdir(parents=True, exist_ok=True)
        todo = [pair for pair in batch if not path(split, pair).exists()]
        if not todo:
            bar.update(runs * len(batch) * p.frames)
            continue
        each = [(pair, [seed, SPLITS.index(split), p.pairs.index(pair), run]) for pair in batch for run in range(runs)]
        solver = system.solver(*zip(*each), p, device)
        fields, tails = record(solver, p.frames, system.dt_save, p.settings.get('refine', 1),
                               tick=lambda: bar.update(len(each)))
        for i, pair in enumerate(batch):
            mine = slice(i * runs, (i + 1) * runs)
            if pair in todo:
                write_well_file(path(split, pair), name, pair, {k: v[mine] for k, v in fields.items()})
                resolution += [(tail, path(split, pair)) for tail in tails[mine]]
    bar.close()
    if resolution:
        worst, where = max(resolution)
        count = sum(tail > RESOLVED for tail, _ in resolution)
        verdict = f': {count} of {len(resolution)} runs are not resolved (over {RESOLVED:g}).' if count else '.'
        print(f'At most {worst:.1e} of the energy of a run is in the last third of its spectrum ({where}){verdict}',
              flush=True)
    if not (root / 'stats.yaml').exists():
        write_stats(root / 'data' / 'train', root / 'stats.yaml')


def main():
    presets = '\n'.join(f'  {name:16} {preset:6} {p.about}' for name, system in SYSTEMS.items()
                        for preset, p in system.presets.items())
    parser = argparse.ArgumentParser(description=__doc__ + '\npresets:\n' + presets,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('system', choices=list(SYSTEMS))
    parser.add_argument('--preset', choices=['nano', 'well'], default='nano')
    parser.add_argument('--data-dir', default=os.environ.get('THE_WELL_DATA_DIR', 'data'),
                        help='default: $THE_WELL_DATA_DIR, else ./data')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    try:
        check_device(args.device)
        root = make_dataset(args.system, args.data_dir, args.preset, args.seed, args.device)
    except (ValueError, OSError, FloatingPointError) as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(2)
    print(f'{root} is complete. Next: python train.py --data {args.system} --data-dir {args.data_dir}')


if __name__ == '__main__':
    main()
