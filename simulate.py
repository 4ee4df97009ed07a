"""
Simulate one of three systems and write it in The Well's format.

    python simulate.py active_matter                     # nano: small grids, minutes on 2 CPU cores
    python simulate.py shear_flow
    python simulate.py rayleigh_benard
    python simulate.py active_matter --preset well       # The Well's grid and frames; wants a GPU

systems/ holds the equations, their solvers and the presets. A dataset is every pair of values of the system's two
parameters, each from several initial conditions, of which none is in two splits; one file per pair and split. An
interrupted simulation leaves no half file, and goes on when it is started again. Runs that their grid does not resolve
are refused: --unresolved writes them all the same.
"""
import dataclasses
import json
import math
import os
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path

from common import SPLITS, Progress, alone_in, at_least, data_folder, option, parse, pick_device, script, write_text

import h5py
import numpy as np
import torch

from remote import Remote, path_of
from systems import find_system, system_names

RESOLVED = 1e-3         # largest share of the energy in the last third of the spectrum of a resolved run
MEMORY = 4e9            # bytes of fields held at once: so many batches of runs are simulated side by side


@dataclasses.dataclass
class Settings:
    preset: str = option('nano', "what to simulate; smoke is nano's in miniature", 'dataset')
    data_dir: str = option('', 'folder of datasets (default: $THE_WELL_DATA_DIR, else data)', 'dataset')
    seed: int = option(0, 'seed of the initial conditions', 'dataset')
    unresolved: bool = option(False, f'write runs with more than {RESOLVED:g} of their energy in the last third of the '
                                     'spectrum, too', 'dataset', bare=True)
    device: str = option('auto', 'cuda, cpu, or auto', 'machine')


def record(solver, frames, dt_save, step=1, limit=np.inf, tick=lambda: None):
    """Advance a solver through its frames: The Well's fields, and each run's worst `tail()` after t = 0.

    Fields: {name: float32 (B, frames, Nx, Ny[, 2[, 2]])}, every `step`-th point of the solver's grid; of no use if a
    tail exceeds `limit`, as it stops there. `tick` is called after every frame. Raises FloatingPointError if a run
    blows up.
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
            if np.max(worst) > limit:
                break
        tick()
    return out, worst


# ---------------------------------------------------------------------------------------------
# The Well's format

def write_well_file(path, name, pair, fields, domain={}):
    """Runs of system `name` at one pair of parameters, fields as from `record`, as The Well's HDF5; atomically."""
    system = find_system(name)
    B, T, nx, ny = next(iter(fields.values())).shape[:4]
    part = path.with_name(path.name + '.part')
    scalars = system.scalars(*pair, **domain)
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
        for axis, points in zip('xy', system.axes(nx, ny, **domain)):
            dataset(g, axis, points)
        g = f.create_group('boundary_conditions')
        for axis, n, periodic in zip('xy', (nx, ny), system.periodic):
            kind = 'periodic' if periodic else 'wall'
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


def make_dataset(name, data_dir, preset='nano', seed=0, unresolved=False, device='cpu'):
    """Simulate a preset into <data_dir>/<name>; finished files are kept, so a broken run resumes.

    Every run's initial condition depends on (seed, split, pair, run) alone, and the runs that are advanced
    together never change, so the same seed gives the same bytes however often it is cut. Raises ValueError if the
    folder holds data that this call did not make or is at a URL, and, unless `unresolved`, if the grid does not
    resolve a run.
    """
    if isinstance(path_of(data_dir), Remote):
        raise ValueError(f'nothing is written to {data_dir}: simulate into a folder of this computer')
    p = find_system(name).preset(preset)
    root = Path(data_dir) / name
    recipe = {'preset': preset, 'seed': seed, **dataclasses.asdict(p)}
    recipe = json.loads(json.dumps({k: v for k, v in recipe.items() if k not in ('about', 'files_at_once')}))
    note = root / 'simulated.json'
    existing = sorted(root.glob('data/*/*.hdf5'))
    if note.exists() and read_note(root) != recipe:
        raise ValueError(f'{root} was simulated with other settings ({note}): delete it or choose another --data-dir')
    if existing and not note.exists():
        raise ValueError(f'{root} already holds {len(existing)} files that this script did not write: '
                         f'choose another --data-dir')
    root.mkdir(parents=True, exist_ok=True)
    with alone_in(root):
        if not note.exists():
            write_text(note, json.dumps(recipe))
        simulate_missing(name, p, root, seed, unresolved, device)
    return root


def read_note(root):
    """What <root>/simulated.json says of how a dataset was simulated, a dict; {} if it was not."""
    note = root / 'simulated.json'
    try:
        there = json.loads(note.read_text()) if note.exists() else {}
        if there and not {'preset', 'seed'} <= there.keys():
            raise KeyError('preset, seed')
        return there or {}
    except (ValueError, AttributeError, KeyError):
        raise ValueError(f'{note} is damaged: delete {root}, or choose another --data-dir') from None


def simulate_missing(name, p, root, seed, unresolved, device):
    """What `make_dataset` does, once it is clear that it may."""
    system = find_system(name)
    batches = [(split, p.pairs[i:i + p.files_at_once]) for split in SPLITS
               for i in range(0, len(p.pairs), p.files_at_once)]
    path = lambda split, pair: root / 'data' / split / system.file.format(**system.scalars(*pair, **p.domain))
    missing = [(split, batch, todo) for split, batch in batches
               if (todo := [pair for pair in batch if not path(split, pair).exists()])]
    limit, stopped = np.inf if unresolved else RESOLVED, threading.Event()
    bar = Progress(sum(p.runs[split] * len(batch) for split, batch, _ in missing) * p.frames,
                   f'simulating {root}', 'frame', smoothing=0.05, disable=not missing)

    def simulate_batch(split, batch, todo):
        """Advance the runs of some pairs together, write the missing files: (worst tail, the file it is in)."""
        runs = p.runs[split]
        each = [(pair, [seed, SPLITS.index(split), p.pairs.index(pair), run]) for pair in batch for run in range(runs)]

        def tick():
            bar.update(len(each))
            if stopped.is_set():
                raise CancelledError

        fields, tails = record(system.solver(*zip(*each), p, device), p.frames, system.dt_save,
                               p.settings.get('refine', 1), limit, tick)
        where = path(split, each[tails.argmax()][0])
        if tails.max() > limit:
            raise ValueError(f'{where} would not be resolved: {tails.max():.1e} of the energy of a run is in the last '
                             f'third of its spectrum, more than {limit:g} (python simulate.py {name} --unresolved, '
                             f'with the other flags as they were, writes it all the same)')
        for i, pair in enumerate(batch):
            if pair in todo:
                mine = slice(i * runs, (i + 1) * runs)
                write_well_file(path(split, pair), name, pair, {k: v[mine] for k, v in fields.items()}, p.domain)
        return tails.max(), where

    for split in SPLITS:
        (root / 'data' / split).mkdir(parents=True, exist_ok=True)
    # On small grids a core for each batch is faster than all for one, and no byte depends on how many there are.
    cores = torch.get_num_threads()
    fit = MEMORY / (p.frames * math.prod(p.grid) * 12 * 4 * max(p.runs.values()) * p.files_at_once)
    threads = 1 if fit >= 2 else cores                                   # of a batch
    with ThreadPoolExecutor(1 if device == 'cuda' else max(1, min(cores, int(fit))), 'batch',
                            torch.set_num_threads, (threads,)) as pool:
        jobs = [pool.submit(simulate_batch, *batch) for batch in missing]
        try:
            worst = [job.result() for job in as_completed(jobs)]
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)
            bar.close()
    if missing:
        share, where = max(worst)
        print(f'At most {share:.1e} of the energy of a run simulated now is in the last third of its spectrum ({where}'
              f'): {"not resolved" if share > RESOLVED else "resolved"}, as the limit is {RESOLVED:g}.', flush=True)
    if not (root / 'stats.yaml').exists():
        write_stats(root / 'data' / 'train', root / 'stats.yaml')


@script
def main(argv=None):
    presets = '\n'.join(f'  {name:16} {preset:6} {p.about}' for name in system_names()
                        for preset, p in find_system(name).presets.items())
    settings, name = parse(__doc__ + '\npresets:\n' + presets, Settings, argv,
                           system=dict(help=', '.join(system_names())))
    at_least(settings, 0, 'seed')
    find_system(name)
    data_dir = data_folder(settings.data_dir)
    root = make_dataset(name, data_dir, settings.preset, settings.seed, settings.unresolved,
                        pick_device(settings.device))
    print(f'{root} is complete. Next: python train.py --data {name} --data-dir {data_dir}')


if __name__ == '__main__':
    main()
