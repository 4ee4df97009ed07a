"""
The Well's HDF5 files as windows of named channels, for pretraining and probing.

    <data dir>/<system>/data/{train,valid,test}/*.hdf5    what The Well ships and simulate.py writes

Opening a split builds a cache once: every trajectory cropped and resized as the paper does, channels
first, in one flat file of float32 that is memory-mapped afterwards (nanoGPT's .bin). A window is then
a slice of it. The cache is named after the files' contents and the settings, so changing either makes
a new one.
"""
import functools
import hashlib
import json
import mmap
import os
from pathlib import Path

from common import FRAMES, RANK, Progress, alone_in, write_text

import h5py
import numpy as np
import torch
import torch.nn.functional as F

import simulate
from systems import find_system, spatial_axes, system_names

WINDOW = 2 * FRAMES


def find_dataset(name, data_dir, build=False, seed=0):
    """(folder, System, preset it was simulated with or None) of a system's dataset.

    `data_dir`/`name`, or where the-well-download puts it, `data_dir`/datasets/`name`. With `build`, a dataset that is
    missing is simulated (the nano preset, from `seed`), and a half-simulated one finished. Raises ValueError for an
    unknown system.
    """
    root = Path(data_dir) / name
    if not root.exists() and (Path(data_dir) / 'datasets' / name).exists():
        root = Path(data_dir) / 'datasets' / name
    if build and name in system_names():
        if recipe := read_recipe(root):
            simulate.make_dataset(name, root.parent, **recipe)
        elif not any(root.glob('data/*/*.h*5')):
            print(f'No {name} dataset in {root.parent}: simulating a small one (see simulate.py --help).', flush=True)
            simulate.make_dataset(name, root.parent, seed=seed)
    return root, find_system(name, root), read_recipe(root).get('preset')


def read_recipe(root):
    """{'preset', 'seed'} that a dataset was simulated with; {} if it was not."""
    return {k: v for k, v in simulate.read_note(Path(root)).items() if k in ('preset', 'seed')}


# ---------------------------------------------------------------------------------------------
# one HDF5 file

def read_file(path):
    """(h5py.File, {channel name: (dataset, component index)}, {scalar: values}, (trajectories, frames, nx, ny)).

    A scalar has one value for each trajectory. Channels in the file's order: t0, t1, t2 fields, alphabetical inside
    a group, components last index fastest, named like The Well's metadata (velocity_x, D_xy). Raises ValueError
    naming the file.
    """
    try:
        f = h5py.File(path, 'r')
    except OSError as e:
        with open(path, 'rb') as raw:
            page = raw.read(512).lstrip()[:1] == b'<'
        raise ValueError(f'{path} is not a readable HDF5 file (' + ('but a web page: the download failed' if page else
                         str(e)) + '): download or simulate it again') from None
    for group in 'dimensions', 'scalars', 't0_fields', 't1_fields', 't2_fields':
        if group not in f:
            raise ValueError(f"{path} has no group '{group}': it is not in The Well's format")
    if 'spatial_dims' not in f['dimensions'].attrs:
        raise ValueError(f"{path}: group 'dimensions' has no attribute 'spatial_dims': it is not in The Well's format")
    axes = spatial_axes(f)
    if len(axes) != 2:
        raise ValueError(f'{path} has {len(axes)} spatial axes, {", ".join(axes)}: only fields in two will do')
    channels = {}
    for order in range(3):
        for name in sorted(f[f't{order}_fields']):
            d = f[f't{order}_fields'][name]
            for index in np.ndindex(*d.shape[4:]):
                channels['_'.join([name, ''.join(axes[i] for i in index)]) if index else name] = (d, index)
    if not channels:
        raise ValueError(f'{path} has no fields')
    shape = next(iter(channels.values()))[0].shape[:4]
    for name, (d, _) in channels.items():
        if d.shape[:4] != shape or len(shape) != 4:
            raise ValueError(f'{path}: field {name} has shape {d.shape}, expected {shape} (trajectories, frames, x, y)')
    scalars = {}
    for name, d in f['scalars'].items():
        values = np.asarray(d, float)
        own = values.ndim and len(values) == shape[0] and d.attrs.get('sample_varying', False)
        scalars[name] = [float(v.ravel()[0]) for v in (values if own else [values] * shape[0])]
    return f, channels, scalars, shape


def look_into(path):
    """(names of the channels, (nx, ny)) of a file."""
    f, channels, _, shape = read_file(path)
    f.close()
    return list(channels), shape[2:]


def content_key(files):
    """Hash of the files' names, sizes, times and sixteen blocks of each: cheap, and new whenever one is rewritten."""
    h = hashlib.sha256(b'2')                                             # the form of the cache
    for path in files:
        s = path.stat()
        h.update(f'{path.name} {s.st_size} {s.st_mtime_ns}'.encode())
        with open(path, 'rb') as f:
            for i in range(16):
                f.seek(i * s.st_size // 16)
                h.update(f.read(4096))
    return h.hexdigest()[:12]


def build_cache(files, crop, resolution, path, progress=True):
    """Write <path>.bin, float32 (runs, channels, frames, H, W), and <path>.json that describes it; atomically.

    crop: (from, to) of x and y as fractions of the grid; then resized to resolution x resolution, unless that is 0.
    Raises ValueError for files that disagree, are too short, or hold NaN or infinity.
    """
    f, channels, _, (_, T, nx, ny) = read_file(files[0])
    f.close()
    cut = [slice(round(a * n), round(b * n)) for n, (a, b) in zip((nx, ny), crop)]
    H, W = (s.stop - s.start for s in cut)
    if resolution:
        H = W = resolution
    if T < WINDOW:
        raise ValueError(f'{files[0]} has {T} frames, a window needs {WINDOW}')
    meta = {'channels': list(channels), 'shape': None, 'runs': []}
    count, total, squares = 0, np.zeros(len(channels)), np.zeros(len(channels))
    meta['grid'] = grid_points(files[0], cut, (H, W))
    part = path.with_suffix('.bin.part')
    with open(part, 'wb') as out:
        for file in Progress(files, f'caching {path.name}', 'file', disable=not progress):
            f, file_channels, scalars, shape = read_file(file)
            if list(file_channels) != list(channels) or shape[1:] != (T, nx, ny):
                raise ValueError(f'{file} has other channels or another shape than {files[0]}')
            for trajectory in range(shape[0]):
                for c, (name, (d, index)) in enumerate(file_channels.items()):
                    try:
                        x = d[(trajectory, slice(None), *cut, *index)]           # (T, H, W) of the file
                    except OSError as e:
                        raise ValueError(f'{file}: {name} cannot be read ({e})') from None
                    if not np.isfinite(x).all():
                        raise ValueError(f'{file}: {name} of trajectory {trajectory} has NaN or infinite values')
                    x = torch.as_tensor(x, dtype=torch.float32)
                    if x.shape[1:] != (H, W):
                        x = F.interpolate(x[None], size=(H, W), mode='bilinear', align_corners=False)[0]
                    x = x.numpy()
                    total[c] += x.sum(dtype=np.float64)
                    squares[c] += np.square(x, dtype=np.float64).sum()
                    out.write(x.tobytes())
                meta['runs'].append({'file': file.name, 'trajectory': trajectory,
                                     'scalars': {name: values[trajectory] for name, values in scalars.items()}})
                count += T * H * W
            f.close()
    meta['shape'] = [len(meta['runs']), len(channels), T, H, W]
    mean = total / count
    meta['mean'], meta['std'] = mean.tolist(), np.sqrt(np.maximum(squares / count - mean**2, 0)).tolist()
    os.replace(part, path.with_suffix('.bin'))
    write_text(path.with_suffix('.json'), json.dumps(meta))


def grid_points(path, cut, shape):
    """(x, y, time step) of what is kept of a file: its own coordinates, cut and resized like the fields."""
    points = []
    with h5py.File(path) as f:
        time = np.asarray(f['dimensions'].get('time', [0.0, 1.0]), float).ravel()
        for axis, kept, n in zip(spatial_axes(f), cut, shape):
            own = f['dimensions'][axis][kept] if axis in f['dimensions'] else np.arange(kept.start, kept.stop)
            at = (np.arange(n) + 0.5) * len(own) / n - 0.5               # F.interpolate's, no two alike at the ends
            i = np.clip(np.floor(at).astype(int), 0, max(0, len(own) - 2))
            following = np.minimum(i + 1, len(own) - 1)
            points.append((own[i] + (at - i) * (own[following] - own[i])).tolist())
    return *points, float(time[1] - time[0])


def find_cache(files, crop, resolution, cache_dir, settings, progress=True):
    """<cache_dir>/<settings>-<content key>, without its suffixes; built if missing, and older contents removed."""
    path = cache_dir / f'{settings}-{content_key(files)}'
    if path.with_suffix('.json').exists():
        return path
    with alone_in(cache_dir):                                            # two runs may start at once
        if not path.with_suffix('.json').exists():                       # nor was it built while this one waited
            try:
                build_cache(files, crop, resolution, path, progress)
            finally:                                                     # a failed build leaves nothing behind
                path.with_suffix('.bin.part').unlink(missing_ok=True)
            for old in cache_dir.glob(f'{settings}-{"?" * 12}.*'):       # same settings
                if old.stem != path.name:
                    old.unlink()
    return path


# ---------------------------------------------------------------------------------------------
# a split

class Split:
    """One split of one system, behind its cache.

    fields: memory map (runs, channels, frames, H, W) float32; channels: names; grid: x, y and the time between
    frames; mean, std: (channels,) of this split; scalars: {name: (runs,) array}; windows: (n, 2) array of (run, first
    frame).
    resolution: side the fields are resized to (0 keeps the file's). stride: frames between window starts.
    whole: keep the whole domain, not the system's part of it.
    """

    def __init__(self, root, system, split, resolution=0, stride=1, cache_dir=None, progress=RANK == 0, whole=False):
        folder = Path(root) / 'data' / split
        files = sorted(folder.glob('*.h*5'))
        if not files:
            raise ValueError(f"no HDF5 files in {folder}: point --data-dir at a folder in The Well's layout")
        cache_dir = Path(cache_dir or Path(root) / 'cache')
        cache_dir.mkdir(parents=True, exist_ok=True)
        crop, self.periodic = system.part(whole)
        settings = f'{split}-{resolution or "full"}' + ('-whole' if crop != system.crop else '')
        if cache_dir != Path(root) / 'cache':                            # a folder that several datasets may share
            place = hashlib.sha256(str(Path(root).resolve()).encode()).hexdigest()[:6]
            settings = f'{Path(root).name}-{place}-{settings}'
        path = find_cache(files, crop, resolution, cache_dir, settings, progress)
        meta = json.loads(path.with_suffix('.json').read_text())
        self.files = path.name.rpartition('-')[2]                        # hash of their content
        self.system, self.channels, self.runs, self.grid = system, meta['channels'], meta['runs'], meta['grid']
        self.mean, self.std = np.float32(meta['mean']), np.float32(meta['std'])
        # 'c': copy on write, because torch wants arrays it could write to; nobody does
        self.fields = np.memmap(path.with_suffix('.bin'), np.float32, 'c', shape=tuple(meta['shape']))
        names = self.runs[0]['scalars']
        self.scalars = {n: np.array([r['scalars'][n] for r in self.runs]) for n in names}
        starts = range(0, self.fields.shape[2] - WINDOW + 1, stride)
        self.windows = np.array([(r, t) for r in range(len(self.runs)) for t in starts])

    def labels(self, names):
        """(runs, len(names)) float64; log10 where the system says so."""
        columns = [np.log10(self.scalars[n]) if n in self.system.log_labels else self.scalars[n] for n in names]
        return np.stack(columns, 1)

    @functools.cached_property
    def standard_labels(self):
        """(runs, L): the labels, z-scored over the runs."""
        labels = self.labels(self.varying())
        return (labels - labels.mean(0)) / labels.std(0)

    def varying(self):
        """Names of the scalars that vary over the runs: the labels, as the files call them."""
        return [n for n, v in self.scalars.items() if np.ptp(v) > 0]

    def normalization(self, normalize):
        """(mean, std) by channel that fields are to be z-scored with; (0, 1) if not `normalize`.

        A channel that hardly varies (the concentration) is not blown up: std is at least 1e-3. Components along x and y
        of a vector or tensor share one std, the root of their mean variance: turned, it is as large as before.
        """
        if not normalize:
            return 0 * self.mean, 0 * self.std + 1
        names = [(field, len(component)) for field, component in map(split_name, self.channels)]
        variance = [np.mean([np.float64(s)**2 for s, other in zip(self.std, names) if other == name]) for name in names]
        return self.mean, np.maximum(np.float32(np.sqrt(variance)), np.float32(1e-3))

    def load(self, windows, frames=WINDOW, crop=0, augment=False, seeds=None):
        """Read windows (B, 2) of (run, first frame) -> float32 tensor (B, C, frames, h, w), raw units.

        crop: side of a square cut at a random place (0: the whole field). augment: a random shift along
        the periodic axes and a random symmetry of the equations. seeds: one per window, for both.
        """
        R, C, T, H, W = self.fields.shape
        h, w = (crop, crop) if crop else (H, W)
        symmetries = [s for s in self.system.symmetries if h == w or s // 2 % 2 == 0]     # quarter turns need a square
        out = torch.empty(len(windows), C, frames, h, w)
        for i, (run, t) in enumerate(windows):
            x0, y0, element = 0, 0, 0
            if crop or augment:
                rng = np.random.default_rng(seeds[i])
                shifts = [p and augment for p in self.periodic]          # across the edge only as an augmentation
                x0, y0 = (rng.integers(n if s else n - k + 1) for n, k, s in zip((H, W), (h, w), shifts))
                element = symmetries[rng.integers(len(symmetries))] if augment else 0
            wrapped_copy(torch.from_numpy(self.fields[run, :, t:t + frames]), x0, y0, out[i])
            if element:
                out[i] = torch.from_numpy(transform(out[i].numpy(), self.channels, element))
        return out

    def release(self):
        """Give mapped pages back to the page cache: they no longer count as this process's memory."""
        if hasattr(mmap, 'MADV_DONTNEED'):
            self.fields._mmap.madvise(mmap.MADV_DONTNEED)


def split_name(channel):
    """('velocity', 'x') of velocity_x, ('D', 'xy') of D_xy; a scalar's component is ''."""
    field, _, component = channel.rpartition('_')
    return (field, component) if field and component and set(component) <= {'x', 'y'} else (channel, '')


def wrapped_copy(field, x0, y0, out):
    """out (..., h, w) = field (..., H, W) from (x0, y0) on, periodically continued."""
    (H, W), (h, w) = field.shape[-2:], out.shape[-2:]
    nx, ny = min(h, H - x0), min(w, W - y0)                              # before the edge; the rest wraps
    out[..., :nx, :ny] = field[..., x0:x0 + nx, y0:y0 + ny]
    out[..., nx:, :ny] = field[..., :h - nx, y0:y0 + ny]
    out[..., :nx, ny:] = field[..., x0:x0 + nx, :w - ny]
    out[..., nx:, ny:] = field[..., :h - nx, :w - ny]


def transform(fields, channels, element):
    """One of the eight symmetries of the square: fields (C, T, n, n) -> same, components transformed too.

    element = flip + 2 * turns: x -> -x if flip, then `turns` quarter turns x -> y, y -> -x. Positions
    and components move together: v'(Rx) = R v(x), D'(Rx) = R D(x) R^T, component by component.
    """
    flip, turns = element % 2, element // 2
    axis = {'x': ('x', -1 if flip else 1), 'y': ('y', 1)}                # component -> (source component, sign)
    if flip:
        fields = fields[..., ::-1, :]
    for _ in range(turns):
        fields = np.rot90(fields, axes=(-2, -1))                         # new (x, y) = old (y, -x): x -> -y, y -> x
        axis = {'x': (axis['y'][0], -axis['y'][1]), 'y': axis['x']}
    out = np.empty(fields.shape, fields.dtype)
    for c, name in enumerate(channels):
        base, component = split_name(name)
        if component:
            source = base + '_' + ''.join(axis[a][0] for a in component)
            sign = np.prod([axis[a][1] for a in component])
        else:
            source, sign = name, 1
        np.multiply(fields[channels.index(source)], sign, out=out[c])
    return out
