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
import itertools
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
from systems.datasets import as_name, find_dataset, member, well_files, why_unreadable

say_once = functools.cache(say)
LARGE = 2**30               # bytes: a larger cache is announced, and made by several processes

# --- files
def open_well_file(path):
    """(h5py.File, {channel: (Field, number of its component)}, {scalar: its value for each run},
    (runs, frames, nx, ny)). Channels in the file's order: t0, t1, t2 fields, alphabetical in a
    group, components last index fastest (velocity_x, D_xy). Raises ValueError naming the file."""
    try:
        f = h5py.File(path, 'r')
    except OSError as e:
        raise ValueError(why_unreadable(path, e)) from None

    # is it as we need it?
    for group in 'dimensions', 'scalars', 't0_fields', 't1_fields', 't2_fields':
        if not isinstance(member(f, group, path), h5py.Group):
            raise ValueError(f"{path} has no group '{group}': it is not in The Well's format")
    if 'spatial_dims' not in f['dimensions'].attrs:
        raise ValueError(f"{path} has no attribute 'spatial_dims': it is not in The Well's format")
    axes = spatial_axes(f)
    if len(axes) != 2:
        raise ValueError(f'{path} has {len(axes)} spatial axes, {", ".join(axes)}: we take two')

    # every component of every field is a channel
    fields, shape = find_fields(f, path)
    channels = {}
    for field in fields:
        for k, component in enumerate(field.components):
            suffix = ''.join(axes[i] for i in component)
            channel = f'{field.name}_{suffix}' if component else field.name
            # a scalar field may have the name of a component
            if channel in channels:
                raise ValueError(f'{path} has two channels called {channel}')
            channels[channel] = field, k
    return f, channels, read_scalars(f, path, shape[0]), shape

def find_fields(f, path):
    """([Field], (runs, frames, nx, ny)) of an open file."""
    fields = []
    for order in range(3):
        for name in sorted(group := f[f't{order}_fields']):
            d = member(group, name, path)
            if not isinstance(d, h5py.Dataset) or d.dtype.kind not in 'fiub' or not d.size:
                raise ValueError(f'{path}: {name} in t{order}_fields is not an array of numbers')
            fields.append(Field(path, name, d, order))

    if not fields:
        raise ValueError(f'{path} has no fields')

    # all are of one shape: what an axis lacks is repeated
    shape = tuple(max(field.lengths.get(axis, 1) for field in fields) for axis in range(4))
    for field in fields:
        field.shape = shape
        if any(n != shape[axis] and (n > 1 or field.varies[axis])
               for axis, n in field.lengths.items()):
            own = field.dataset.shape
            raise ValueError(f'{path}: field {field.name} has shape {own}, not {shape} as others')
    return fields, shape

class Field:
    """A field of an open file, to be read as (runs, frames, nx, ny, components). In the file, an
    axis may be missing, or of length 1, if its attributes say that it does not vary along it.
    lengths: of the axes that are there, by number. components: indices of each, () of a scalar."""

    def __init__(self, path, name, dataset, order):
        self.name, self.dataset = name, dataset
        self.components = list(np.ndindex(*[2] * order))
        # along which axes does it vary?
        says = dataset.attrs.get
        self.varies = np.hstack([says('sample_varying', True), says('time_varying', True),
                                 says('dim_varying', [True, True])]).astype(bool)

        # its shape: axes, then (2,) of a vector, (2, 2) or (4,) of a tensor
        shape = dataset.shape
        last = 2 if order == 2 and shape[-2:] == (2, 2) else min(order, 1)
        lengths = shape[:len(shape) - last]
        axes = find_axes(lengths, self.varies)
        components = math.prod(shape[len(lengths):])

        if axes is None or len(self.varies) != 4 or components != len(self.components):
            raise ValueError(f'{path}: field {name} has shape {shape}, not (runs, frames, x, y'
                             f'{", 2" * order}), or less if its attributes say so')
        self.lengths = dict(zip(axes, lengths))

    def read(self, run, frames=slice(None), x=slice(None), y=slice(None)):
        """Some frames of a run, and of them a part: (frames, nx, ny, components)."""
        wanted = slice(run, run + 1), frames, x, y
        values = self.dataset[tuple(wanted[axis] if n == self.shape[axis] else slice(None)
                                    for axis, n in self.lengths.items())]
        # with all axes; those that it lacks are repeated
        there = dict(zip(self.lengths, np.shape(values)))
        values = np.reshape(values, (*(there.get(axis, 1) for axis in (1, 2, 3)), -1))
        full = [len(range(n)[part]) for n, part in zip(self.shape[1:], wanted[1:])]
        return np.broadcast_to(values, (*full, len(self.components)))

def find_axes(lengths, varies):
    """Which of (runs, frames, x, y) the axes of a field are, by number: those along which it
    varies, perhaps others of length 1, or all four. None if that cannot be."""
    for axes in itertools.combinations(range(len(varies)), len(lengths)):
        others = {n for axis, n in zip(axes, lengths) if not varies[axis]}
        if len(axes) == 4 or set(np.flatnonzero(varies)) <= set(axes) and others <= {1}:
            return axes

def read_scalars(f, path, runs):
    """{scalar: its value for each run} of an open file: the file's, or each run's own. Values are
    rounded to float32, in which some files keep them. One that changes in time is left out."""
    scalars = {}
    for name in f['scalars']:
        d = member(f['scalars'], name, path)
        if isinstance(d, h5py.Dataset) and np.any(d.attrs.get('time_varying', False)):
            continue

        # one value, or one for each run
        is_number = isinstance(d, h5py.Dataset) and d.dtype.kind in 'fiub'
        if not is_number or d.size not in (1, runs):
            raise ValueError(f'{path}: scalar {name} has shape {getattr(d, "shape", None)}: a '
                             f'number is needed, or one for each of the {runs} runs')
        values = np.asarray(d, float).ravel()
        if not np.isfinite(values).all():
            raise ValueError(f'{path}: scalar {name} is NaN or infinite')
        mantissa, exponent = np.frexp(values)                  # rounds without overflow
        values = np.ldexp(np.float32(mantissa).astype(float), exponent)
        scalars[name] = np.broadcast_to(values, runs).tolist()
    return scalars

def spatial_axes(f):
    """Names of the spatial axes of an open file."""
    return [as_name(a) for a in np.ravel(f['dimensions'].attrs['spatial_dims'])]

def coordinates(f, axis, shape):
    """Along time (axis 0), x (1) or y (2) of an open file: (n,), of the first run; 0, 1, .. where
    it does not say. shape: (runs, frames, nx, ny)."""
    name, n = ('time', *spatial_axes(f))[axis], shape[axis + 1]
    d = member(f['dimensions'], name, f.filename)
    x = np.atleast_1d(d[()] if isinstance(d, h5py.Dataset) else ())
    if axis and x.shape == shape[2:]:                          # given for each point of the grid
        x = np.moveaxis(x, axis - 1, -1)
    x = x.ravel()[:x.shape[-1]]                                # the first run's, or line's
    return x[:n] if x.dtype.kind in 'fi' and len(x) >= n else np.arange(n)

# --- the cache
def content_key(path):
    """Hash of a file's name, size, time and 16 blocks: cheap, and new whenever it is rewritten."""
    stat = path.stat()
    h = hashlib.sha256(f'6 {path.name} {stat.st_size} {stat.st_mtime_ns}'.encode())
    h.update(read_blocks(path, 4096))
    return h.hexdigest()[:12]

def read_blocks(path, length):
    """16 blocks of so many bytes, evenly spread over a file."""
    blocks, size = [], path.stat().st_size
    with open(path, 'rb') as f:
        for i in range(16):
            f.seek(i * size // 16)
            blocks.append(f.read(length))
    return b''.join(blocks)

def describe_file(path, crop, resolution):
    """What the cache will keep of a file, as a dict of plain types.
    crop: (from, to) of x and of y, as fractions of the grid; the fields are then resized, unless
    resolution is 0 or they would grow: then `load` resizes their windows."""
    f, channels, scalars, shape = open_well_file(path)
    runs, frames, *grid = shape
    with f:
        # cut, then resized if that makes it smaller
        cut = [(round(a * n), round(b * n)) for n, (a, b) in zip(grid, crop)]
        kept = [stop - start for start, stop in cut]
        size = [resolution, resolution] if resolution else kept
        stored = kept if resolution > max(kept) else size

        # coordinates: as F.interpolate places points, but no two alike at the ends
        points = []
        for axis, ((start, stop), n) in enumerate(zip(cut, size), 1):
            x = coordinates(f, axis, shape)[start:stop]
            at = (np.arange(n) + 0.5) * len(x) / n - 0.5       # in grid steps, between i and i + 1
            i = np.clip(np.floor(at).astype(int), 0, max(0, len(x) - 2))
            following = np.minimum(i + 1, len(x) - 1)
            points.append((x[i] + (at - i) * (x[following] - x[i])).tolist())
        time = [*coordinates(f, 0, shape)[:2].astype(float), 0.0, 1.0][:2]

        for name in f['scalars'].keys() - scalars.keys():
            say_once(f'{name} changes in time: it is not taken for a label')
        return {'channels': list(channels), 'scalars': scalars, 'cut': cut, 'size': size,
                'components': [[d.name, list(d.components[k])] for d, k in channels.values()],
                'shape': [runs, len(channels), frames, *stored], 'file': grid,
                'axes': spatial_axes(f), 'grid': [*points, time[1] - time[0]]}    # x, y, time step

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
    for field in dict.fromkeys(field for field, _ in channels.values()):
        out = np.empty((len(field.components), T, *stored), np.float32)
        for t in range(0, T, FRAMES):                          # 16 frames at a time
            try:
                x = field.read(run, slice(t, t + FRAMES), *cut)       # (frames, h, w, components)
            except OSError as e:
                raise ValueError(f'{path}: {field.dataset.name[1:]} cannot be read ({e})') from None
            x = np.moveaxis(x, -1, 0)                          # (K, frames, h, w)
            if list(x.shape[2:]) != stored:
                x = torch.from_numpy(np.array(x, np.float32, order='C'))
                x = F.interpolate(x, size=stored, mode='bilinear', align_corners=False).numpy()
            out[:, t:t + FRAMES] = x
        yield out

def read_about(target):
    """What the .json of a cache file says, once both are there. ValueError if they do not agree."""
    with contextlib.suppress(ValueError, TypeError, KeyError, OSError, EOFError):
        about = json.loads(Path(f'{target}.json').read_text())
        fields = np.load(f'{target}.npy', mmap_mode='r')       # of its full length, or ValueError
        if fields.dtype == np.float32 and list(fields.shape) == about['shape']:
            return about
    raise ValueError(f'{target}.npy or .json is damaged: delete {target.parent}')

def find_cache(files, crop, resolution, folder, log_labels=(), processes=1, progress=True):
    """[(file, what the .json of its cache says, its path without suffix)]; what is missing is made.
    Files too short for a window are left out. log_labels: scalars whose log10 will be taken.
    Raises ValueError, before anything is written, for files that disagree and for a full disk."""
    found = []
    for file in files:
        target = folder / f'{file.stem}-{content_key(file)}'
        cached = Path(f'{target}.npy').exists()
        about = read_about(target) if cached else describe_file(file, crop, resolution)
        found.append((file, about, target))

    # those with windows; are they alike?
    usable = [entry for entry in found if entry[1]['shape'][2] >= WINDOW]
    if not usable:
        frames = found[0][1]['shape'][2]
        raise ValueError(f'{files[0]} has {frames} frames, a window needs {WINDOW}')
    if len(usable) < len(files) and progress:
        say(f'{len(files) - len(usable)} of {len(files)} files in {files[0].parent} are left out: '
            f'they have fewer than {WINDOW} frames, and so no window')
    check_alike(usable, log_labels)

    # what is missing is made, and caches of older contents go
    missing = [entry for entry in usable if not Path(f'{entry[2]}.npy').exists()]
    try:
        if missing:
            fill_cache(missing, len(usable), folder, processes, progress)
            kept = {Path(f'{target}{end}') for *_, target in usable for end in ('.npy', '.json')}
            for old in set(folder.iterdir()) - kept:
                old.unlink(missing_ok=True)
    except ChildProcessError:                                  # it says what to do
        raise
    except OSError as e:
        raise OSError(f'{folder} cannot be written ({e.strerror or e}): --cache-dir puts the '
                      f'cache elsewhere') from None
    # what was there has been read; what was made now has its sums, too
    return [(file, about if 'sums' in about else read_about(target), target)
            for file, about, target in usable]

def check_alike(found, log_labels):
    """Raise ValueError if the files of a split, as in find_cache, do not go together."""
    first, of_first, _ = found[0]
    for file, about, _ in found:
        if any(about[key] != of_first[key] for key in ('components', 'axes', 'file')):
            raise ValueError(f'{file} has other channels or another shape than {first}')
        for name in about['scalars'].keys() ^ of_first['scalars'].keys():
            one, other = (file, first) if name in of_first['scalars'] else (first, file)
            raise ValueError(f'{one} has no scalar {name}, which {other} has')
        # a logarithm needs what is positive
        for name in about['scalars'].keys() & set(log_labels):
            if min(about['scalars'][name]) <= 0:
                raise ValueError(f'{file}: scalar {name}, whose logarithm is taken, is not above 0')

def fill_cache(missing, number, folder, processes, progress):
    """Make what find_cache misses of `number` files. ValueError for a full disk."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(4 * math.prod(about['shape']) for _, about, _ in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f'the cache of {missing[0][0].parent} needs {needed / 1e9:.1f} GB and '
                         f'{folder} has {free / 1e9:.1f} GB free: --cache-dir puts it elsewhere')
    if progress and needed > LARGE:
        say(f'{folder.name}: a cache of {needed / 1e9:.1f} GB from {len(missing)} files')

    # a library call starts no process: a script without a main guard would start itself
    with Progress(number, f'caching {folder.name}', 'file', initial=number - len(missing),
                  disable=not progress) as bar:
        if processes > 1 and needed >= LARGE:
            cache_in_parallel(missing, processes, bar)
        else:                                                  # here
            for job in missing:
                cache_file(*job)
                bar.update()

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
    """The fields of all runs, (C, T, H, W) float32 of each: fields[run, :, from:to] is read.
    paths: .npy files; runs: how many are in each. Nothing stays open between two reads."""

    def __init__(self, paths, runs):
        self.paths = paths
        self.first = np.cumsum([0, *runs])                     # the run that each file begins with

    def __getitem__(self, index):
        run, *rest = index if isinstance(index, tuple) else (index,)
        number = np.searchsorted(self.first, run, side='right') - 1
        try:
            fields = np.load(self.paths[number], mmap_mode='r')
        except (ValueError, EOFError):                         # cut short since it was opened
            raise ValueError(f'{self.paths[number]} is damaged: delete its folder') from None
        return fields[(run - self.first[number], *rest)]

# --- a split
class Split:
    """One split of one system, behind its cache.
    fields: Fields. frames: (runs,), how many each has. channels: names. components: (field,
    indices) of each. size: (H, W) of windows. grid: x, y, time step. mean, std: (C,). symmetries:
    of square windows. runs: file, trajectory and scalars of each. scalars: {name: (runs,)}.
    windows: (n, 2), run and first frame. resolution: side of the resized fields (0: the file's).
    whole: keep the whole domain, not the system's part. processes: how many may make the cache."""
    def __init__(self, root, system, split, resolution=0, stride=1, cache_dir=None, whole=False,
                 processes=1, progress=RANK == 0):
        root, files = Path(root), well_files(root, split)
        if not files:
            raise ValueError(f'{root} has no HDF5 files in {split}/: download this split, too')
        crop, self.periodic = system.part(whole)
        name = f'{split}-{resolution or "full"}' + ('-whole' if crop != system.crop else '')
        folder = root / 'cache' / name
        if cache_dir and Path(cache_dir) != root / 'cache':    # datasets may share a --cache-dir
            place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:6]
            folder = Path(cache_dir) / f'{root.name}-{place}-{name}'
        cached = find_cache(files, crop, resolution, folder, system.log_labels, processes,
                            progress)

        # what the files say
        shapes = [about['shape'] for _, about, _ in cached]    # runs, C, frames, h, w
        first = cached[0][1]
        self.system, self.channels, self.grid = system, first['channels'], first['grid']
        self.size = tuple(first['size'])
        self.components = [(field, tuple(indices)) for field, indices in first['components']]
        self.fields = Fields([f'{target}.npy' for *_, target in cached], [s[0] for s in shapes])
        self.frames = np.repeat([s[2] for s in shapes], [s[0] for s in shapes])
        self.files = [target.name for *_, target in cached]    # names and hashes of their contents
        self.paths = files
        cartesian = set(first['axes']) <= set('xyz')           # in r, theta no square turns
        self.symmetries = system.symmetries if cartesian else (0,)

        # runs and their scalars
        self.runs = [{'file': file.name, 'trajectory': i,
                      'scalars': {name: values[i] for name, values in about['scalars'].items()}}
                     for file, about, _ in cached for i in range(about['shape'][0])]
        self.scalars = {name: np.array([run['scalars'][name] for run in self.runs])
                        for name in self.runs[0]['scalars']}

        # mean and standard deviation of each channel over all runs
        points = sum(map(math.prod, shapes)) / len(self.channels)
        mean, square = sum(np.array(about['sums']) for _, about, _ in cached).T / points
        self.mean, self.std = np.float32(mean), np.float32(np.sqrt(np.maximum(square - mean**2, 0)))
        self.windows = self.windows_at(stride)

    def windows_at(self, stride):
        """(n, 2) of run and first frame, `stride` frames apart."""
        return np.array([(run, t) for run, frames in enumerate(self.frames)
                         for t in range(0, frames - WINDOW + 1, stride)])

    def data_hash(self):
        """Hash of channels, scalars and 16 blocks of each file, whatever its place and time."""
        scalars = {name: values.tolist() for name, values in self.scalars.items()}
        h = hashlib.sha256(json.dumps([self.channels, scalars]).encode())
        for path in self.paths:
            h.update(read_blocks(path, 2**15))
        return h.hexdigest()

    def varying(self):
        """Names of the scalars that vary over the runs: the labels, as the files call them."""
        with np.errstate(over='ignore'):                       # std: as a label's is taken
            spread = {name: np.std(values) for name, values in self.scalars.items()
                      if np.ptp(values) > 0}
        for name in spread:
            if np.isinf(spread[name]):
                raise ValueError(f'scalar {name} is too large for a label: up to '
                                 f'{self.scalars[name].max():g}')
        return [name for name, std in spread.items() if std > 0]

    def labels(self, names):
        """(runs, len(names)) float64; in log10 where the system says so."""
        labels = [np.log10(self.scalars[name]) if name in self.system.log_labels
                  else self.scalars[name] for name in names]
        return np.stack(labels, 1) if labels else np.empty((len(self.runs), 0))

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
        turned field keeps its size. A channel that is constant, but for rounding, is divided by a
        thousandth of its size; by 1 if it is zero."""
        if not normalize:
            return 0 * self.mean, 0 * self.std + 1
        kinds = [(field, len(indices)) for field, indices in self.components]

        def share(values):                                     # root mean square over a kind
            return np.float32(np.sqrt([np.mean([np.float64(v)**2 for v, k in zip(values, kinds)
                                                if k == kind]) for kind in kinds]))
        std, size = share(self.std), share(self.mean)
        std = np.where(std > 1e-5 * size, std, np.float32(1e-3) * size)
        return self.mean, np.where(std > 0, std, np.float32(1))

    def load(self, windows, frames=WINDOW, crop=0, augment=False, seeds=None, out=None):
        """Windows (B, 2) of run and first frame -> (B, C, frames, h, w) float32, raw units.
        crop: side of a square cut at a random place (0: the whole field). augment: a random shift
        along the periodic axes and a random symmetry of the equations. seeds: one per window.
        out: a tensor for the result."""
        H, W = self.size
        if out is None:
            out = torch.empty(len(windows), len(self.channels), frames, crop or H, crop or W)
        h, w = out.shape[-2:]
        # quarter turns need a square
        symmetries = [s for s in self.symmetries if h == w or s // 2 % 2 == 0]
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
            window = out[i].numpy()
            cut = np.empty(window.shape, np.float32) if element else window
            wrapped_copy(fields, x0, y0, cut)
            # turned, it goes to its place
            if element:
                transform(cut, self.components, element, window)
        return out

def spread_runs(labels, seed):
    """An order of runs, by labels (runs, L), whose first few are always spread over the labels.
    Each run is the farthest from all before it, in z-scored labels; of runs with equal labels, the
    second comes after all others' first. seed: of the first run, and of the choice among equals; a
    number, or several."""
    z = (labels - labels.mean(0)) / labels.std(0)
    left, order = np.random.default_rng([*np.ravel(seed), 6]).permutation(len(z)), []
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

# --- places and symmetries
def wrapped_copy(field, x0, y0, out):
    """out (..., h, w) = field (..., H, W) from (x0, y0) on, periodically continued."""
    (H, W), (h, w) = field.shape[-2:], out.shape[-2:]
    nx, ny = min(h, H - x0), min(w, W - y0)                    # before the edge; the rest wraps
    out[..., :nx, :ny] = field[..., x0:x0 + nx, y0:y0 + ny]
    out[..., nx:, :ny] = field[..., :h - nx, y0:y0 + ny]
    out[..., :nx, ny:] = field[..., x0:x0 + nx, :w - ny]
    out[..., nx:, ny:] = field[..., :h - nx, :w - ny]

def transform(fields, components, element, out=None):
    """One of the eight symmetries of the square: fields (C, T, n, n) -> out, of the same shape.
    element = flip + 2 * turns: x -> -x if flip, then `turns` quarter turns x -> y, y -> -x.
    Positions and components move together: v'(Rx) = R v(x), D'(Rx) = R D(x) R^T.
    components: (field, indices) of each channel, as ('D', (0, 1)) for D_xy."""
    flip, turns = element % 2, element // 2
    axis = [(0, -1 if flip else 1), (1, 1)]                    # of a component: (source, sign)

    # positions
    if flip:
        fields = fields[..., ::-1, :]
    for _ in range(turns):                                     # new (x, y) = old (y, -x)
        fields = np.rot90(fields, axes=(-2, -1))
        axis = [(axis[1][0], -axis[1][1]), axis[0]]

    # components
    out = np.empty(fields.shape, fields.dtype) if out is None else out
    for c, (field, indices) in enumerate(components):          # v'_x is v_y, say, or -v_x
        source = field, tuple(axis[i][0] for i in indices)
        sign = math.prod(axis[i][1] for i in indices)          # a Python int: stays float32
        np.multiply(fields[components.index(source)], sign, out=out[c])
    return out
