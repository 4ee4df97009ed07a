"""
What a system is: everything the project knows of one of The Well's datasets, in one file NAME.py of this folder.

Such a file holds a SYSTEM, below: the equations' solver and the datasets simulated with it, the paper's protocol,
labels, symmetries, hand-made statistics and what a picture shows. A dataset that has no file here works too, with
what its own HDF5 files say.
"""
import dataclasses
import importlib
from dataclasses import dataclass, field
from pathlib import Path

import h5py

from remote import opened, path_of

DEFAULT = 'active_matter'


@dataclass
class Preset:
    """A dataset that can be simulated; `about` says it in words."""
    grid: tuple             # points along x and y, as written
    frames: int
    pairs: list             # of the two parameters
    runs: dict              # split -> initial conditions per pair
    files_at_once: int      # pairs advanced in one batch
    about: str
    settings: dict = field(default_factory=dict)                         # of the function that starts the solver
    domain: dict = field(default_factory=dict)                           # its size, where it is not The Well's


@dataclass
class System:
    """One of The Well's systems. The defaults are those of a dataset without a file here."""
    # the domain and the labels
    periodic: tuple = (False, False)                                     # is (x, y) periodic, and so shift invariant?
    symmetries: tuple = (0,)         # of the eight of the square (see data.transform), those of the equations
    log_labels: tuple = ()           # labels taken in log10
    shown: dict = field(default_factory=dict)                            # label in the files -> for people
    symbols: dict = field(default_factory=dict)                          # label for people -> in pictures
    picture: tuple = ()              # channels whose magnitude a picture shows; (): the first channel
    statistics: callable = None      # ({channel: (B, T, H, W)}, numerics.Grid) -> {name: (B,)}, without training
    # what the paper does with it (arXiv 2603.13227)
    crop: tuple = ((0, 1), (0, 1))   # (from, to) of x and of y that is kept, as fractions of the file's grid
    resolution: int = 0              # side the fields are resized to; 0 keeps the file's
    stride: int = 4                  # frames between window starts
    noise: float = 0.0               # std of the Gaussian noise on the input fields
    lr: float = 1e-4
    epochs: float = 30.0
    probe_windows: tuple = (None, None)                                  # at most, of train and of valid, in its probe
    # how it is simulated and written; without a solver it is not
    solver: callable = None          # (pairs, [[seed, split, pair, run]], Preset, device) -> solver
    dt_save: float = 0.0             # time between frames
    scalars: callable = None         # the two parameters, **domain -> The Well's scalars
    file: str = ''                   # name of a pair's file, with those in it
    axes: callable = None            # grid, **domain -> coordinates of x and y
    presets: dict = field(default_factory=dict)

    def part(self, whole):
        """(crop, periodic) of the whole domain, or of the paper's part of it: a cut axis is not periodic."""
        crop = ((0, 1), (0, 1)) if whole else self.crop
        return crop, tuple(p and kept == (0, 1) for p, kept in zip(self.periodic, crop))

    def protocol(self):
        """The paper's settings, for train.py."""
        return {name: getattr(self, name) for name in ('resolution', 'stride', 'noise', 'lr', 'epochs')}

    def name_of(self, label):
        """A label of the files as people know it."""
        return self.shown.get(label, label)

    def preset(self, name):
        """A Preset by name; `smoke` is a miniature of nano: the four extreme pairs, 32 frames and a bit, few runs."""
        if name == 'smoke' and 'nano' in self.presets:
            nano = self.presets['nano']
            first, second = (sorted({pair[i] for pair in nano.pairs}) for i in (0, 1))
            return dataclasses.replace(nano, frames=40, pairs=[(a, b) for b in (second[0], second[-1])
                                                               for a in (first[0], first[-1])],
                                       runs=dict(train=2, valid=1, test=1), files_at_once=4)
        if name not in self.presets:
            raise ValueError(f'no preset {name!r} to simulate: choose from {", ".join([*self.presets, "smoke"])}')
        return self.presets[name]


def system_names():
    """Names of the systems that have a file here."""
    return sorted(p.stem for p in Path(__file__).parent.glob('*.py') if b'\nSYSTEM = ' in p.read_bytes())


def find_system(name, root=None):
    """The System `name`: of its file here, else a plain one that knows its periodic axes from the files under `root`.

    Raises ValueError if there is neither.
    """
    if name in system_names():
        return importlib.import_module(f'systems.{name}').SYSTEM
    files = sorted(path_of(root).glob('data/*/*.h*5')) if root else []
    if not files:
        raise ValueError(f'unknown system {name!r}: systems/ has {", ".join(system_names())}, and there is no dataset '
                         f'of that name' + (f' in {path_of(root).parent}' if root else ''))
    return System(periodic=periodic_axes(files[0]))


def spatial_axes(f):
    """Names of the spatial axes of an open file."""
    return [a.decode() if isinstance(a, bytes) else str(a) for a in f['dimensions'].attrs['spatial_dims']]


def periodic_axes(path):
    """Is (x, y) periodic, by a file's `boundary_conditions`? Not if it does not say so."""
    text = lambda a: a.decode() if isinstance(a, bytes) else str(a)
    try:
        with h5py.File(opened(path), 'r') as f:
            axes = spatial_axes(f)
            periodic = {text(a) for condition in f['boundary_conditions'].values()
                        if text(condition.attrs['bc_type']).upper() == 'PERIODIC'
                        for a in condition.attrs['associated_dims']}
    except (OSError, KeyError):                                          # data.py will say what is wrong with the file
        return False, False
    return tuple(a in periodic for a in axes[:2])
