"""
The Well's HDF5 files as windows of named channels.

    <data dir>/<system>/data/{train,valid,test}/*.hdf5   what The Well ships and simulate.py writes
      --cache_file-->  one .npy for each, cropped, resized, channels first, and a .json beside it
      --Split.load-->  windows (B, C, frames, h, w): a slice of that, cut, shifted and turned

The cache makes reading fast. A cache file that is there is complete: it was renamed when finished.
"""
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from common import FRAMES, RANK, SIGNALS, WINDOW, Progress, say, write_text
import h5py
import numpy as np
import torch
import torch.nn.functional as F
from systems import System, find_system

LARGE = 2**30               # bytes: a larger cache is announced, and made by several processes

# --- datasets and their files
def find_dataset(name, data_dir):
    """(folder, System, preset it was simulated with or None) of a dataset, which may be missing.
    The folder is `data_dir`/`name` or, where the-well-download puts it, `data_dir`/datasets/`name`.
    Raises ValueError for a system that has neither a file in systems/ nor a dataset."""
    root = Path(data_dir) / name
    if not root.exists() and (root.parent / 'datasets' / name).exists():
        root = root.parent / 'datasets' / name
    # a dataset without a file in systems/ works too, with what its own files say
    try:
        system = find_system(name)
    except ValueError as unknown:
        files = sorted(root.glob('data/*/*.h*5'))
        if not files:
            raise ValueError(f'{unknown}, and {root.parent} has no dataset of that name') from None
        system = System(periodic=periodic_axes(files[0]))
    return root, system, read_recipe(root).get('preset')

def read_recipe(root):
    """How a dataset was simulated: <root>/simulated.json, or {}. ValueError if it is damaged."""
    note = Path(root) / 'simulated.json'
    try:
        recipe = json.loads(note.read_text()) if note.exists() else {}
        if recipe and not {'preset', 'seed'} <= recipe.keys():
            raise KeyError('preset, seed')
        return recipe or {}
    except (ValueError, AttributeError, KeyError):
        raise ValueError(f'{note} is damaged: delete {root}, or change --data-dir') from None

def open_well_file(path):
    """(h5py.File, {channel: (dataset, component)}, {scalar: values}, (runs, frames, nx, ny)).
    Channels in the file's order: t0, t1, t2 fields, alphabetical in a group, components last index
    fastest (velocity_x, D_xy). Scalars: a value for each run. Raises ValueError naming the file."""
    try:
        f = h5py.File(path, 'r')
    except OSError as e:                                       # perhaps what a failed download left
        with open(path, 'rb') as raw:
            why = 'a web page: the download failed' if raw.read(512).lstrip()[:1] == b'<' else e
        raise ValueError(f'{path} is unreadable ({why}): download or simulate it again') from None

    # is it as we need it?
    for group in 'dimensions', 'scalars', 't0_fields', 't1_fields', 't2_fields':
        if group not in f:
            raise ValueError(f"{path} has no group '{group}': it is not in The Well's format")
    if 'spatial_dims' not in f['dimensions'].attrs:
        raise ValueError(f"{path} has no attribute 'spatial_dims': it is not in The Well's format")
    axes = spatial_axes(f)
    if len(axes) != 2:
        raise ValueError(f'{path} has {len(axes)} spatial axes, {", ".join(axes)}: we take two')

    # every component of every field is a channel, all are of one shape
    channels, shape = {}, None
    for order in range(3):
        for name in sorted(f[f't{order}_fields']):
            d = f[f't{order}_fields'][name]                    # (runs, frames, nx, ny, ...)
            shape = shape or d.shape[:4]
            if d.shape[:4] != shape or len(shape) != 4:
                raise ValueError(f'{path}: field {name} has shape {d.shape}, not {shape}')
            for component in np.ndindex(*d.shape[4:]):
                suffix = ''.join(axes[i] for i in component)
                channels[f'{name}_{suffix}' if component else name] = d, component
    if not channels:
        raise ValueError(f'{path} has no fields')

    # a scalar belongs to the file, or to each run
    scalars = {}
    for name, d in f['scalars'].items():
        values = np.asarray(d, float)
        varies = values.ndim and len(values) == shape[0] and d.attrs.get('sample_varying', False)
        scalars[name] = [float(v.ravel()[0]) for v in (values if varies else [values] * shape[0])]
    return f, channels, scalars, shape

def spatial_axes(f):
    """Names of the spatial axes of an open file."""
    return [as_name(a) for a in f['dimensions'].attrs['spatial_dims']]

def as_name(text):
    """A string of an HDF5 attribute."""
    return text.decode() if isinstance(text, bytes) else str(text)

def periodic_axes(path):
    """Is (x, y) periodic, by a file's `boundary_conditions`? No, where it does not say so."""
    try:
        with h5py.File(path, 'r') as f:
            axes = spatial_axes(f)
            periodic = {as_name(axis) for condition in f['boundary_conditions'].values()
                        if as_name(condition.attrs['bc_type']).upper() == 'PERIODIC'
                        for axis in condition.attrs['associated_dims']}
    except (OSError, KeyError):                                # open_well_file says what is wrong
        return False, False
    return tuple(axis in periodic for axis in axes[:2])

# --- the cache
def content_key(path):
    """Hash of a file's name, size, time and 16 blocks: cheap, and new whenever it is rewritten."""
    stat = path.stat()
    h = hashlib.sha256(f'5 {path.name} {stat.st_size} {stat.st_mtime_ns}'.encode())
    with open(path, 'rb') as f:
        for i in range(16):
            f.seek(i * stat.st_size // 16)
            h.update(f.read(4096))
    return h.hexdigest()[:12]

def describe_file(path, crop, resolution):
    """What the cache will keep of a file, as a dict of plain types.
    crop: (from, to) of x and of y, as fractions of the grid; the fields are then resized, unless
    resolution is 0 or they would grow: then `load` resizes their windows."""
    f, channels, scalars, (runs, frames, *grid) = open_well_file(path)
    with f:
        if frames < WINDOW:
            raise ValueError(f'{path} has {frames} frames, a window needs {WINDOW}')
        # cut, then resized if that makes it smaller
        cut = [(round(a * n), round(b * n)) for n, (a, b) in zip(grid, crop)]
        kept = [stop - start for start, stop in cut]
        size = [resolution, resolution] if resolution else kept
        stored = kept if resolution > max(kept) else size

        # coordinates: as F.interpolate places points, but no two alike at the ends
        dims, points = f['dimensions'], []
        for axis, (start, stop), n in zip(spatial_axes(f), cut, size):
            x = dims[axis][start:stop] if axis in dims else np.arange(start, stop)
            at = (np.arange(n) + 0.5) * len(x) / n - 0.5       # in grid steps, between i and i + 1
            i = np.clip(np.floor(at).astype(int), 0, max(0, len(x) - 2))
            following = np.minimum(i + 1, len(x) - 1)
            points.append((x[i] + (at - i) * (x[following] - x[i])).tolist())
        time = np.asarray(dims.get('time', [0.0, 1.0]), float).ravel()
        return {'channels': list(channels), 'scalars': scalars, 'cut': cut, 'size': size,
                'shape': [runs, len(channels), frames, *stored], 'file': [frames, *grid],
                'grid': [*points, float(time[1] - time[0])]}      # x, y, time step

def cache_file(path, about, target):
    """Write a file's runs to <target>.npy; `about` and the sums of each channel to <target>.json.
    Raises ValueError for NaN, infinity and what cannot be read; nothing is left then."""
    part = Path(f'{target}.{os.urandom(4).hex()}.part')
    f, channels, _, _ = open_well_file(path)
    sums = np.zeros((len(channels), 2))                        # of values, of their squares
    try:
        # channel by channel: no run need fit into memory
        with f, open(part, 'wb') as out:
            np.lib.format.write_array_header_1_0(out, {
                'descr': '<f4', 'fortran_order': False, 'shape': tuple(about['shape'])})
            for run in range(about['shape'][0]):
                fields = (x for field in read_run(path, channels, run, about) for x in field)
                for c, (name, x) in enumerate(zip(channels, fields)):             # x: (T, H, W)
                    if not all(np.isfinite(frame).all() for frame in x):
                        raise ValueError(f'{path}: {name} has NaN or infinity in trajectory {run}')
                    squares = sum(np.square(frame, dtype=np.float64).sum() for frame in x)
                    sums[c] += x.sum(dtype=np.float64), squares
                    out.write(x.tobytes())
            out.flush()
            os.fsync(out.fileno())

        # the .npy goes last: where it is, all is. Another process may have been faster
        with contextlib.suppress(FileNotFoundError):
            write_text(Path(f'{target}.json'), json.dumps(about | {'sums': sums.tolist()}))
            os.replace(part, f'{target}.npy')
    finally:
        part.unlink(missing_ok=True)

def read_run(path, channels, run, about):
    """The fields of a run, one after the other, with their components: (K, T, H, W) float32."""
    T, *stored = about['shape'][2:]
    cut = [slice(*c) for c in about['cut']]
    for d in dict.fromkeys(dataset for dataset, _ in channels.values()):
        out = np.empty((math.prod(d.shape[4:]), T, *stored), np.float32)
        for t in range(0, T, FRAMES):                          # 16 frames at a time
            try:
                x = d[(run, slice(t, t + FRAMES), *cut)]       # (frames, h, w, components)
            except OSError as e:
                raise ValueError(f'{path}: {d.name[1:]} cannot be read ({e})') from None
            x = np.moveaxis(x.reshape(*x.shape[:3], -1), -1, 0)       # (K, frames, h, w)
            if list(x.shape[2:]) != stored:
                x = torch.from_numpy(np.ascontiguousarray(x, np.float32))
                x = F.interpolate(x, size=stored, mode='bilinear', align_corners=False).numpy()
            out[:, t:t + FRAMES] = x
        yield out

def find_cache(files, crop, resolution, folder, processes=1, progress=True):
    """[(path without suffix, what its .json says)] of each file; what is missing is made.
    Raises ValueError, before anything is written, for files that disagree and for a full disk."""
    targets = [folder / f'{file.stem}-{content_key(file)}' for file in files]
    missing = [i for i, target in enumerate(targets) if not Path(f'{target}.npy').exists()]
    about = [describe_file(file, crop, resolution) if i in missing
             else json.loads(Path(f'{target}.json').read_text())
             for i, (file, target) in enumerate(zip(files, targets))]

    # are they alike?
    for file, a in zip(files, about):
        if (a['channels'], a['file']) != (about[0]['channels'], about[0]['file']):
            raise ValueError(f'{file} has other channels or another shape than {files[0]}')
    if not missing:
        return list(zip(targets, about))

    # does it fit on the disk?
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(4 * math.prod(about[i]['shape']) for i in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f'the cache of {files[0].parent} needs {needed / 1e9:.1f} GB and {folder} '
                         f'has {free / 1e9:.1f} GB free: --cache-dir puts it elsewhere')
    if progress and needed > LARGE:
        say(f'{folder.name}: a cache of {needed / 1e9:.1f} GB from {len(missing)} files')

    # a library call starts no process: a script without a main guard would start itself
    jobs = [(files[i], about[i], targets[i]) for i in missing]
    with Progress(len(files), f'caching {folder.name}', 'file', initial=len(files) - len(missing),
                  disable=not progress) as bar:
        if processes > 1 and needed >= LARGE:
            cache_in_parallel(jobs, processes, bar)
        else:                                                  # here
            for job in jobs:
                cache_file(*job)
                bar.update()

    # caches of older contents go
    kept = {Path(f'{target}{suffix}') for target in targets for suffix in ('.npy', '.json')}
    for old in set(folder.iterdir()) - kept:
        old.unlink(missing_ok=True)
    return [(target, json.loads(Path(f'{target}.json').read_text())) for target in targets]

def cache_in_parallel(jobs, processes, bar):
    """cache_file(*job) of each job, in so many processes of their own."""
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(min(processes, len(jobs), 8), spawn) as pool:
        futures = [pool.submit(cache_in_process, *job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()                                # raises what the process raised
                bar.update()
        except KeyboardInterrupt:                              # a signal
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        except BrokenProcessPool:
            raise ChildProcessError(f'a process that cached {jobs[0][0].parent} was killed, '
                                    f'perhaps for its memory: run this again') from None
        finally:
            pool.shutdown(cancel_futures=True)

def cache_in_process(*job):
    """cache_file in a process of its own. A signal ends it, and no part of a file is left."""
    for s in SIGNALS:
        signal.signal(s, lambda *_: sys.exit())
    try:
        cache_file(*job)
    except SystemExit:                                         # else the next job would begin
        os._exit(1)

class Fields:
    """The fields of all runs, (runs, C, T, H, W) float32: fields[run, :, from:to] is read.
    paths: .npy files; runs: how many are in each. Nothing stays open between two reads."""

    def __init__(self, paths, runs, shape):
        self.paths, self.shape = paths, (sum(runs), *shape)
        self.first = np.cumsum([0, *runs])                     # the run that each file begins with

    def __getitem__(self, index):
        run, *rest = index if isinstance(index, tuple) else (index,)
        number = np.searchsorted(self.first, run, side='right') - 1
        return np.load(self.paths[number], mmap_mode='r')[(run - self.first[number], *rest)]

# --- a split
class Split:
    """One split of one system, behind its cache.
    fields: Fields, (runs, C, T, H, W). channels: names. size: (H, W) of windows. grid: x, y, time
    step. mean, std: (C,). runs: file, trajectory and scalars of each. scalars: {name: (runs,)}.
    windows: (n, 2), run and first frame. resolution: side of the resized fields (0: the file's).
    whole: keep the whole domain, not the system's part. processes: how many may make the cache."""
    def __init__(self, root, system, split, resolution=0, stride=1, cache_dir=None, whole=False,
                 processes=1, progress=RANK == 0):
        root, files = Path(root), sorted(Path(root, 'data', split).glob('*.h*5'))
        if not files:
            raise ValueError(f"no HDF5 files in {root / 'data' / split}: point --data-dir at a "
                             f"folder in The Well's layout")
        crop, self.periodic = system.part(whole)
        name = f'{split}-{resolution or "full"}' + ('-whole' if crop != system.crop else '')
        folder = root / 'cache' / name
        if cache_dir and Path(cache_dir) != root / 'cache':    # datasets may share a --cache-dir
            place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:6]
            folder = Path(cache_dir) / f'{root.name}-{place}-{name}'
        cached = find_cache(files, crop, resolution, folder, processes, progress)

        # what the files say
        first = cached[0][1]
        self.system, self.channels, self.grid = system, first['channels'], first['grid']
        self.size = tuple(first['size'])
        self.fields = Fields([f'{target}.npy' for target, _ in cached],
                             [about['shape'][0] for _, about in cached], first['shape'][1:])
        self.files = [target.name for target, _ in cached]     # names and hashes of their contents
        self.paths = files

        # runs and their scalars
        self.runs = [{'file': file.name, 'trajectory': i,
                      'scalars': {name: values[i] for name, values in about['scalars'].items()}}
                     for file, (_, about) in zip(files, cached) for i in range(about['shape'][0])]
        self.scalars = {name: np.array([run['scalars'][name] for run in self.runs])
                        for name in self.runs[0]['scalars']}

        # mean and standard deviation of each channel over all runs
        points = math.prod(self.fields.shape) / len(self.channels)
        mean, square = sum(np.array(about['sums']) for _, about in cached).T / points
        self.mean, self.std = np.float32(mean), np.float32(np.sqrt(np.maximum(square - mean**2, 0)))
        self.windows = self.windows_at(stride)

    def windows_at(self, stride):
        """(n, 2) of run and first frame, `stride` frames apart."""
        starts = range(0, self.fields.shape[2] - WINDOW + 1, stride)
        return np.array([(run, t) for run in range(len(self.runs)) for t in starts])

    def data_hash(self):
        """Hash of channels, scalars and 16 blocks of each file, whatever its place and time."""
        scalars = {name: values.tolist() for name, values in self.scalars.items()}
        h = hashlib.sha256(json.dumps([self.channels, scalars]).encode())
        for path in self.paths:
            size = path.stat().st_size
            with open(path, 'rb') as f:
                for i in range(16):
                    f.seek(i * size // 16)
                    h.update(f.read(2**15))
        return h.hexdigest()

    def varying(self):
        """Names of the scalars that vary over the runs: the labels, as the files call them."""
        return [name for name, values in self.scalars.items() if np.ptp(values) > 0]

    def labels(self, names):
        """(runs, len(names)) float64; in log10 where the system says so."""
        return np.stack([np.log10(self.scalars[name]) if name in self.system.log_labels
                         else self.scalars[name] for name in names], 1)

    @functools.cached_property
    def standard_labels(self):
        """(runs, L): the labels, z-scored over the runs."""
        labels = self.labels(self.varying())
        return (labels - labels.mean(0)) / labels.std(0)

    def labelled(self, fraction, seed):
        """Numbers of the runs (k,) whose labels are known if `fraction` of them are; at least 1."""
        order = spread_runs(self.labels(self.varying()), seed)
        return order[:max(1, round(fraction * len(order)))]

    def with_labels(self, windows, fraction, seed):
        """The windows (n, 2) whose run is among the `labelled`."""
        return windows[np.isin(windows[:, 0], self.labelled(fraction, seed))]

    def normalization(self, normalize):
        """(mean, std), (C,) each, that fields are z-scored with; (0, 1) if not `normalize`.
        The components of a vector or tensor share one std, the root of their mean variance: a
        turned field keeps its size. It is at least 1e-3, for a channel that hardly varies."""
        if not normalize:
            return 0 * self.mean, 0 * self.std + 1
        kinds = [(field, len(component)) for field, component in map(split_name, self.channels)]
        variance = [np.mean([np.float64(s)**2 for s, k in zip(self.std, kinds) if k == kind])
                    for kind in kinds]
        return self.mean, np.maximum(np.float32(np.sqrt(variance)), np.float32(1e-3))

    def load(self, windows, frames=WINDOW, crop=0, augment=False, seeds=None):
        """Windows (B, 2) of run and first frame -> (B, C, frames, h, w) float32, raw units.
        crop: side of a square cut at a random place (0: the whole field). augment: a random shift
        along the periodic axes and a random symmetry of the equations. seeds: one per window."""
        H, W = self.size
        out = torch.empty(len(windows), self.fields.shape[1], frames, crop or H, crop or W)
        h, w = out.shape[-2:]
        # quarter turns need a square
        symmetries = [s for s in self.system.symmetries if h == w or s // 2 % 2 == 0]
        for i, (run, t) in enumerate(windows):
            # where it is cut, and how it is turned; only an augmentation goes across the edge
            x0, y0, element = 0, 0, 0
            if crop or augment:
                rng = np.random.default_rng(seeds[i])
                x0, y0 = (rng.integers(n if periodic and augment else n - k + 1)
                          for n, k, periodic in zip((H, W), (h, w), self.periodic))
                if augment:
                    element = symmetries[rng.integers(len(symmetries))]

            # read: (C, frames, H, W), or smaller in the cache
            fields = self.fields[run, :, t:t + frames]
            if fields.shape[-2:] != self.size:
                small = torch.from_numpy(np.array(fields, np.float32))
                fields = F.interpolate(small, size=self.size, mode='bilinear').numpy()
            wrapped_copy(fields, x0, y0, out[i].numpy())
            if element:
                out[i] = torch.from_numpy(transform(out[i].numpy(), self.channels, element))
        return out

def spread_runs(labels, seed):
    """An order of runs, by labels (runs, L), whose first few are always spread over the labels.
    Each run is the farthest from all before it, in z-scored labels; of runs with equal labels, the
    second comes after all others' first. seed: of the first run, and of the choice among equals."""
    z = (labels - labels.mean(0)) / labels.std(0)
    left, order = np.random.default_rng([seed, 6]).permutation(len(z)), []
    while len(left):
        # a turn: one run for each set of labels
        _, first = np.unique(z[left], axis=0, return_index=True)
        turn, distance = left[np.sort(first)], np.full(len(first), np.inf)
        left = left[~np.isin(left, turn)]
        # farthest first
        while len(turn):
            i = distance.argmax()
            order.append(turn[i])
            distance = np.minimum(distance, np.linalg.norm(z[turn] - z[turn[i]], axis=1))
            distance, turn = np.delete(distance, i), np.delete(turn, i)
    return np.array(order)

# --- places, components and symmetries
def split_name(channel):
    """('velocity', 'x') of velocity_x, ('D', 'xy') of D_xy; a scalar's component is ''."""
    field, _, component = channel.rpartition('_')
    is_component = field and component and set(component) <= {'x', 'y'}
    return (field, component) if is_component else (channel, '')

def wrapped_copy(field, x0, y0, out):
    """out (..., h, w) = field (..., H, W) from (x0, y0) on, periodically continued."""
    (H, W), (h, w) = field.shape[-2:], out.shape[-2:]
    nx, ny = min(h, H - x0), min(w, W - y0)                    # before the edge; the rest wraps
    out[..., :nx, :ny] = field[..., x0:x0 + nx, y0:y0 + ny]
    out[..., nx:, :ny] = field[..., :h - nx, y0:y0 + ny]
    out[..., :nx, ny:] = field[..., x0:x0 + nx, :w - ny]
    out[..., nx:, ny:] = field[..., :h - nx, :w - ny]

def transform(fields, channels, element):
    """One of the eight symmetries of the square: fields (C, T, n, n) -> the same shape.
    element = flip + 2 * turns: x -> -x if flip, then `turns` quarter turns x -> y, y -> -x.
    Positions and components move together: v'(Rx) = R v(x), D'(Rx) = R D(x) R^T."""
    flip, turns = element % 2, element // 2
    axis = {'x': ('x', -1 if flip else 1), 'y': ('y', 1)}      # component -> (source, sign)

    # positions
    if flip:
        fields = fields[..., ::-1, :]
    for _ in range(turns):                                     # new (x, y) = old (y, -x)
        fields = np.rot90(fields, axes=(-2, -1))
        axis = {'x': (axis['y'][0], -axis['y'][1]), 'y': axis['x']}

    # components
    out = np.empty(fields.shape, fields.dtype)
    for c, name in enumerate(channels):                        # v'_x is v_y, say, or -v_x
        base, component = split_name(name)
        source = base + ('_' if component else '') + ''.join(axis[a][0] for a in component)
        sign = math.prod(axis[a][1] for a in component)        # a Python int: stays float32
        np.multiply(fields[channels.index(source)], sign, out=out[c])
    return out
