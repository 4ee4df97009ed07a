"""
Simulate one of three systems and write it in The Well's format.

    python simulate.py active_matter                    # nano: small grids, minutes on 2 CPU cores
    python simulate.py active_matter --preset well      # The Well's grid and frames; wants a GPU

A dataset has a file for each split and pair of parameters. Interrupted, it goes on when restarted.
"""
import io
import json
import math
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from common import (SPLITS, Progress, alone_in, at_least, data_folder, option, parse,
                    pick_device, script, write_bytes, write_text)
import h5py
import numpy as np
import torch

from systems import find_system, system_names
from systems.datasets import read_recipe, well_files

RESOLVED = 2e-3     # largest share of energy in the last third of the spectrum of a resolved run
MEMORY = 4e9        # bytes of fields held at once: so many batches are simulated side by side

@dataclass
class Settings:
    preset: str = option('nano', 'what to simulate; smoke is nano in miniature', 'dataset')
    data_dir: str = option('', 'all datasets (default: $THE_WELL_DATA_DIR, else data)', 'dataset')
    seed: int = option(0, 'seed of the initial conditions', 'dataset')
    unresolved: bool = option(False, 'also write runs that are not resolved', 'dataset', True)
    device: str = option('auto', 'cuda, cpu, or auto', 'machine')

def record(solver, frames, dt_save, step=1, limit=np.inf, tick=lambda: None):
    """A solver's fields, {name: float32 (B, frames, Nx, Ny[, 2[, 2]])}, and runs' worst `tail()`s.

    Every `step`-th point is kept; a tail over `limit`, after t = 0, stops it. `tick` is called each
    frame. FloatingPointError if a run blows up.
    """
    out, worst = {}, 0.0
    for frame in range(frames):
        if frame > 0:
            solver.advance(dt_save)
        for name, value in solver.fields().items():
            value = value[:, ::step, ::step].float().cpu().numpy()          # (B, nx, ny, ...)
            if not np.isfinite(value).all():
                raise FloatingPointError(f'the simulation blew up at t = {frame * dt_save}')
            if frame == 0:
                out[name] = np.empty((len(value), frames, *value.shape[1:]), np.float32)
            out[name][:, frame] = value
        if frame > 0:                                       # a start may be rougher
            worst = np.maximum(worst, solver.tail().cpu().numpy())
            if np.max(worst) > limit:
                break
        tick()
    return out, worst

# --- The Well's format
def write_well_file(path, name, pair, fields, domain={}):
    """Write the runs at one pair of parameters, `fields` of `record`, as HDF5, atomically."""
    system = find_system(name)
    scalars = system.scalars(*pair, **domain)
    B, T, nx, ny = next(iter(fields.values())).shape[:4]

    def dataset(group, name, data, **attributes):
        d = group.create_dataset(name, data=np.asarray(data, np.float32))
        d.attrs.update(dict(sample_varying=False, time_varying=False) | attributes)

    # in memory first: where a disk is full, HDF5 may end the process
    file = io.BytesIO()
    with h5py.File(file, 'w') as f:
        f.attrs.update(dataset_name=name, grid_type='cartesian', n_spatial_dims=2, n_trajectories=B,
                       simulation_parameters=list(scalars), **scalars)

        g = f.create_group('dimensions')
        g.attrs['spatial_dims'] = ['x', 'y']
        dataset(g, 'time', np.arange(T) * system.dt_save)
        del g['time'].attrs['time_varying']
        for axis, points in zip('xy', system.axes(nx, ny, **domain)):
            dataset(g, axis, points)

        g = f.create_group('boundary_conditions')
        for axis, n, periodic in zip('xy', (nx, ny), system.periodic):
            kind, nothing = 'periodic' if periodic else 'wall', np.array([], h5py.string_dtype())
            b = g.create_group(f'{axis}_{kind}')
            b.attrs.update(associated_dims=[axis], associated_fields=nothing, bc_type=kind.upper(),
                           sample_varying=False, time_varying=False)
            # it is the first and the last point, with zeros
            b.create_dataset('mask', data=np.isin(np.arange(n), [0, n - 1]))
            b.create_dataset('values', data=np.zeros(2, np.float32))
        g = f.create_group('scalars')
        g.attrs['field_names'] = list(scalars)
        for name, value in scalars.items():
            dataset(g, name, value)
        # scalar, vector and tensor fields
        varying = dict(dim_varying=[True, True], sample_varying=True, time_varying=True)
        for order in range(3):
            names = [name for name, values in fields.items() if values.ndim == 4 + order]
            symmetry = dict(symmetric=True, antisymmetric=False) if order == 2 else {}
            g = f.create_group(f't{order}_fields')                          # even if empty
            g.attrs['field_names'] = np.array(names, h5py.string_dtype())
            for name in names:
                dataset(g, name, fields[name], **varying, **symmetry)
    write_bytes(path, file.getbuffer())

def write_stats(train_dir, path):
    """The Well's stats.yaml: mean, std, rms of fields and of their change between frames."""
    moments = {}                # {(field, '' or '_delta'): [number, sum, sum of squares]}
    for file in sorted(train_dir.glob('*.hdf5')):
        with h5py.File(file) as f:
            fields = [item for order in range(3) for item in f[f't{order}_fields'].items()]
            for name, run in ((name, run) for name, d in fields for run in d):
                # run: (T, Nx, Ny[, 2[, 2]]); each component has its own sums
                for suffix, x in ('', run), ('_delta', np.diff(run, axis=0)):
                    x, m = x.astype(np.float64), moments.setdefault((name, suffix), [0, 0, 0])
                    m[0] += math.prod(x.shape[:3])
                    m[1] += x.sum((0, 1, 2))
                    m[2] += (x * x).sum((0, 1, 2))
    def yaml(value, indent):                # a number or a nested list; exponents that YAML reads
        if np.ndim(value) == 0:
            return f' {value:.4E}\n'
        return '\n' + ''.join(' ' * indent + '-' + yaml(v, indent + 2) for v in value)
    text = ''                               # a paragraph for each moment
    for kind, suffix in [(k, s) for k in ('mean', 'rms', 'std') for s in ('', '_delta')]:
        text += f'{kind}{suffix}:\n'
        for name in sorted({name for name, _ in moments}):
            n, total, squares = moments[name, suffix]
            variance = np.maximum(squares / n - (total / n)**2, 0)      # rounding may take it below
            value = {'mean': total / n, 'rms': np.sqrt(squares / n), 'std': np.sqrt(variance)}[kind]
            text += f'  {name}:' + yaml(value, 2)
    write_text(path, text)

# --- a dataset
def make_dataset(name, data_dir, preset='nano', seed=0, unresolved=False, device='cpu'):
    """Simulate a preset into <data_dir>/<name>, and return that folder. Finished files are kept.

    A start depends on (seed, split, pair, run), the same runs advance together: a seed gives the
    same bytes. ValueError if it has other data, or a run is unresolved (not if `unresolved`).
    """
    p, root = find_system(name).preset(preset), Path(data_dir) / name
    recipe, note = {'preset': preset, 'seed': seed, **asdict(p)}, root / 'simulated.json'
    del recipe['about'], recipe['files_at_once']

    # never mix two datasets
    instead = 'choose another --data-dir'
    if note.exists() and read_recipe(root) != json.loads(json.dumps(recipe)):
        raise ValueError(f'{root} was made with other settings ({note}): delete it or {instead}')
    if not note.exists() and well_files(root):
        raise ValueError(f'{root} holds files that this script did not write: {instead}')
    root.mkdir(parents=True, exist_ok=True)
    with alone_in(root):                                                # no other process
        if not note.exists():
            write_text(note, json.dumps(recipe))
        simulate_missing(name, p, root, seed, unresolved, device)
        if not (root / 'stats.yaml').exists():
            write_stats(root / 'data' / 'train', root / 'stats.yaml')
    return root

def simulate_missing(name, p, root, seed, unresolved, device):
    """Simulate each batch of pairs that lacks a file; several at once, on several cores."""
    system, stopped = find_system(name), threading.Event()
    limit = np.inf if unresolved else RESOLVED

    def file_of(split, pair):
        return root / 'data' / split / system.file.format(**system.scalars(*pair, **p.domain))

    for split in SPLITS:
        (root / 'data' / split).mkdir(parents=True, exist_ok=True)
    batches = [p.pairs[i:i + p.files_at_once] for i in range(0, len(p.pairs), p.files_at_once)]
    missing = [(split, batch) for split in SPLITS for batch in batches
               if not all(file_of(split, pair).exists() for pair in batch)]     # any of its files
    frames = p.frames * sum(p.runs[split] * len(batch) for split, batch in missing)
    bar = Progress(frames, f'simulating {root}', 'frame', smoothing=0.05, disable=not missing)

    def simulate_batch(split, batch):
        """Advance the runs of some pairs together; write missing files: (worst tail, its file)."""
        runs, pairs = p.runs[split], [pair for pair in batch for _ in range(p.runs[split])]
        keys = [[seed, SPLITS.index(split), p.pairs.index(pair), i % runs]
                for i, pair in enumerate(pairs)]

        def tick():
            bar.update(len(keys))
            if stopped.is_set():
                raise CancelledError

        # all frames, or until a run is not resolved
        fields, tails = record(system.solver(pairs, keys, p, device), p.frames, system.dt_save,
                               p.settings.get('refine', 1), limit, tick)
        file = file_of(split, pairs[tails.argmax()])                    # of the worst
        if tails.max() > limit:
            raise ValueError(f'{file} would not be resolved: a run has {tails.max():.1e} of its '
                             f'energy in the last third of its spectrum, more than {limit:g}. To '
                             f'write it all the same: python simulate.py {name} --unresolved')

        # a file for each pair
        for i, pair in enumerate(batch):
            if not file_of(split, pair).exists():
                of_pair = {k: v[i * runs:(i + 1) * runs] for k, v in fields.items()}
                write_well_file(file_of(split, pair), name, pair, of_pair, p.domain)
        return tails.max(), file

    # on small grids a core for each batch is faster than all for one; no byte depends on it
    cores = torch.get_num_threads()
    fit = MEMORY / (p.frames * math.prod(p.grid) * 12 * 4 * max(p.runs.values()) * p.files_at_once)
    threads = 1 if fit >= 2 else cores                                  # of a batch
    workers = 1 if device == 'cuda' else max(1, min(cores, int(fit)))   # batches at once
    with ThreadPoolExecutor(workers, 'batch', torch.set_num_threads, (threads,)) as pool:
        jobs = [pool.submit(simulate_batch, *batch) for batch in missing]
        try:                                                # an error in one batch stops the others
            worst = [job.result() for job in as_completed(jobs)]
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)
            bar.close()
    if missing:                                             # else nothing was simulated
        share, file = max(worst)
        resolved = 'not resolved' if share > RESOLVED else 'resolved'
        print(f'At most {share:.1e} of the energy of a run simulated now is in the last third of '
              f'its spectrum ({file}): {resolved}, as the limit is {RESOLVED:g}.', flush=True)

@script
def main(argv=None):
    presets = '\n'.join(f'  {name:16} {preset:6} {p.about}' for name in system_names()
                        for preset, p in find_system(name).presets.items())
    settings, name = parse(__doc__ + '\npresets:\n' + presets, Settings, argv,
                           system=dict(help=', '.join(system_names())))
    at_least(settings, 0, 'seed')
    if settings.device == 'mps':
        raise ValueError('the solvers need float64, which mps has not: use --device cpu')
    data_dir = data_folder(settings.data_dir)
    root = make_dataset(name, data_dir, settings.preset, settings.seed, settings.unresolved,
                        pick_device(settings.device))
    print(f'{root} is complete. Next: python train.py --data {name} --data-dir {data_dir}')

if __name__ == '__main__':
    main()
