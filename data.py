"""
The Well's HDF5 files as windows of named channels, for pretraining and probing.

    <data dir>/<system>/data/{train,valid,test}/*.hdf5    what The Well ships and simulate.py writes; or at a URL

Opening a split builds a cache once (cache.py). A window is then a slice of it, cut, shifted and turned.
"""
import functools
import hashlib
import math
import mmap
from pathlib import Path

from common import RANK

import numpy as np
import torch
import torch.nn.functional as F

import simulate
from cache import WINDOW, find_cache
from remote import Remote, path_of
from systems import find_system, system_names


def find_dataset(name, data_dir, build=False, seed=0):
    """(folder, System, preset it was simulated with or None) of a system's dataset.

    `data_dir`/`name`, or where the-well-download puts it, `data_dir`/datasets/`name`. With `build`, a dataset that is
    missing is simulated (the nano preset, from `seed`), and a half-simulated one finished; never at a URL. Raises
    ValueError for an unknown system, and if there is nothing at a URL.
    """
    data_dir = path_of(data_dir)
    root = data_dir / name
    if not root.exists() and (data_dir / 'datasets' / name).exists():
        root = data_dir / 'datasets' / name
    if isinstance(root, Remote):
        if not any(root.glob('data/*/*.h*5')):
            raise ValueError(f"no dataset at {root}: it would hold data/train/*.hdf5, in The Well's layout")
    elif build and name in system_names():
        if recipe := read_recipe(root):
            simulate.make_dataset(name, root.parent, **recipe)
        elif not any(root.glob('data/*/*.h*5')):
            print(f'No {name} dataset in {root.parent}: simulating a small one (see simulate.py --help).', flush=True)
            simulate.make_dataset(name, root.parent, seed=seed)
    return root, find_system(name, root), read_recipe(root).get('preset')


def read_recipe(root):
    """{'preset', 'seed'} that a dataset was simulated with; {} if it was not."""
    return {k: v for k, v in simulate.read_note(path_of(root)).items() if k in ('preset', 'seed')}


# ---------------------------------------------------------------------------------------------
# a split

class Split:
    """One split of one system, behind its cache.

    fields: (runs, channels, frames, H, W), of which [run, :, from:to] is read: a memory map of the cache, float32 or
    int16 in `scale`; or, without a cache, the files. channels: names; grid: x, y and the time between
    frames; size: (H, W) of windows, to which smaller fields are resized; mean, std: (channels,) of the fields; scalars:
    {name: (runs,) array}; windows: (n, 2) array of (run, first frame).
    resolution: side the fields are resized to (0 keeps the file's). stride: frames between window starts.
    whole: keep the whole domain, not the system's part of it. cache: float32, int16 or none.
    """

    def __init__(self, root, system, split, resolution=0, stride=1, cache_dir=None, progress=RANK == 0, whole=False,
                 cache='float32'):
        root = path_of(root)
        folder = root / 'data' / split
        files = sorted(folder.glob('*.h*5'))
        if not files:
            raise ValueError(f"no HDF5 files in {folder}: point --data-dir at a folder in The Well's layout")
        cache_dir = Path(cache_dir or ('data/cache' if isinstance(root, Remote) else root / 'cache'))
        crop, self.periodic = system.part(whole)
        settings = f'{split}-{resolution or "full"}' + ('-whole' if crop != system.crop else '') + '-int16' * (
            cache == 'int16')
        if cache_dir != root / 'cache':                                  # a folder that several datasets may share
            place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:6]
            settings = f'{root.name}-{place}-{settings}'
        meta, self.fields = find_cache(files, crop, resolution, cache_dir, settings, cache, progress)
        self.files = meta['key']                                         # hash of their content
        self.system, self.channels, self.runs, self.grid = system, meta['channels'], meta['runs'], meta['grid']
        self.mean, self.std = np.float32(meta['mean']), np.float32(meta['std'])
        self.size = tuple(meta.get('size', self.fields.shape[-2:]))      # (H, W) of windows
        self.scale = np.float32(meta['scale'])                           # (runs, channels, 2), or empty
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

    def labelled(self, fraction, seed):
        """Numbers of the runs (k,) whose labels are known if `fraction` of them are; one at least."""
        order = spread_runs(self.labels(self.varying()), seed)
        return order[:max(1, round(fraction * len(order)))]

    def with_labels(self, windows, fraction, seed):
        """Those of the windows (n, 2) whose run is among the `labelled`."""
        return windows[np.isin(windows[:, 0], self.labelled(fraction, seed))]

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

    def room(self, windows, frames, crop=0, **settings):
        """An empty float32 tensor (windows, C, frames, h, w), as `load` fills it. settings: pin_memory."""
        H, W = self.size
        return torch.empty(windows, self.fields.shape[1], frames, crop or H, crop or W, **settings)

    def load(self, windows, frames=WINDOW, crop=0, augment=False, seeds=None, out=None):
        """Read windows (B, 2) of (run, first frame) -> float32 tensor (B, C, frames, h, w), raw units; or into `out`.

        crop: side of a square cut at a random place (0: the whole field). augment: a random shift along
        the periodic axes and a random symmetry of the equations. seeds: one per window, for both.
        """
        H, W = self.size
        out = self.room(len(windows), frames, crop) if out is None else out
        h, w = out.shape[-2:]
        symmetries = [s for s in self.system.symmetries if h == w or s // 2 % 2 == 0]     # quarter turns need a square
        for i, (run, t) in enumerate(windows):
            x0, y0, element = 0, 0, 0
            if crop or augment:
                rng = np.random.default_rng(seeds[i])
                shifts = [p and augment for p in self.periodic]          # across the edge only as an augmentation
                x0, y0 = (rng.integers(n if s else n - k + 1) for n, k, s in zip((H, W), (h, w), shifts))
                element = symmetries[rng.integers(len(symmetries))] if augment else 0
            fields = self.fields[run, :, t:t + frames]                   # (C, frames, H, W), or smaller in a cache
            if fields.shape[-2:] != self.size:
                own = torch.from_numpy(np.array(fields, np.float32))
                fields = F.interpolate(own, size=self.size, mode='bilinear').numpy()
            wrapped_copy(fields, x0, y0, out[i].numpy())
            if len(self.scale):
                step, middle = self.scale[run].T[..., None, None, None]  # (channels, 1, 1, 1) each
                out[i].mul_(torch.from_numpy(step)).add_(torch.from_numpy(middle))
            if element:
                out[i] = torch.from_numpy(transform(out[i].numpy(), self.channels, element))
        return out

    def release(self):
        """Give mapped pages back to the page cache: they no longer count as this process's memory."""
        if isinstance(self.fields, np.memmap) and hasattr(mmap, 'MADV_DONTNEED'):
            self.fields._mmap.madvise(mmap.MADV_DONTNEED)


def spread_runs(labels, seed):
    """An order of runs, by labels (runs, L), of which any first few are spread over the labels: (runs,) numbers.

    Each is the one farthest from all before it, in z-scored labels. Of runs with the same labels the second comes when
    all others have had their first, and so on. seed: of the first, and of which of them.
    """
    z = (labels - labels.mean(0)) / labels.std(0)
    left, order = np.random.default_rng([seed, 6]).permutation(len(z)), []
    while len(left):
        _, first = np.unique(z[left], axis=0, return_index=True)         # a run for each set of labels
        turn, distance = left[np.sort(first)], np.full(len(first), np.inf)
        left = left[~np.isin(left, turn)]
        while len(turn):
            i = distance.argmax()
            order.append(turn[i])
            distance = np.delete(np.minimum(distance, np.linalg.norm(z[turn] - z[turn[i]], axis=1)), i)
            turn = np.delete(turn, i)
    return np.array(order)


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
            sign = math.prod(axis[a][1] for a in component)              # a Python int keeps the fields float32
        else:
            source, sign = name, 1
        np.multiply(fields[channels.index(source)], sign, out=out[c])
    return out
