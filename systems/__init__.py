"""
What a system is: all that the project knows of one of The Well's datasets, in one file NAME.py.

Such a file holds a SYSTEM (below). Your own file works by its name. A dataset without a file works
too, as a plain System().
"""
import importlib
from dataclasses import dataclass, field, replace
from pathlib import Path

DEFAULT = 'active_matter'

@dataclass
class Preset:
    """A dataset that can be simulated."""
    grid: tuple             # points along x and y, as written
    frames: int
    pairs: list             # of the two parameters
    runs: dict              # split -> initial conditions per pair
    files_at_once: int      # pairs advanced in one batch
    about: str              # what --help says
    settings: dict = field(default_factory=dict)    # of the function that starts the solver
    domain: dict = field(default_factory=dict)      # its size, where it is not The Well's

@dataclass
class System:
    """One of The Well's systems. The defaults are those of a dataset without a file here."""
    periodic: tuple = (False, False)        # is (x, y) periodic, and so shift invariant?
    symmetries: tuple = (0,)                # of the square's eight (see data.transform)
    log_labels: tuple = ()                  # labels taken in log10
    shown: dict = field(default_factory=dict)       # label in the files -> label for people
    symbols: dict = field(default_factory=dict)     # label for people -> symbol in pictures
    picture: tuple = ()                     # channels whose magnitude is drawn; (): the first
    statistics: callable = None             # {channel: (B, T, H, W)}, Grid -> {name: (B,)}

    # what the paper does with it, arXiv 2603.13227
    crop: tuple = ((0, 1), (0, 1))          # (from, to) of x and y: fractions that are kept
    resolution: int = 0                     # side the fields are resized to; 0: as in the file
    stride: int = 4                         # frames between window starts
    noise: float = 0.0                      # std of the Gaussian noise on the input fields
    lr: float = 1e-4
    epochs: float = 30.0
    probe_windows: tuple = (None, None)     # at most, of train and valid, in its probe
    published: dict = field(default_factory=dict)   # {split: (files, runs)} of The Well's files

    # how it is simulated and written; a system without a solver is not simulated
    solver: callable = None                 # (pairs, [[seed, split, pair, run]], Preset, device)
    dt_save: float = 0.0                    # time between frames
    scalars: callable = None                # the two parameters, **domain -> The Well's scalars
    file: str = ''                          # name of a pair's file, with the scalars in it
    axes: callable = None                   # nx, ny, **domain -> coordinates of x and y
    presets: dict = field(default_factory=dict)

    def part(self, whole):
        """(crop, periodic): the whole domain, or the paper's part. A cut axis is not periodic."""
        crop = ((0, 1), (0, 1)) if whole else self.crop
        return crop, tuple(p and kept == (0, 1) for p, kept in zip(self.periodic, crop))

    def protocol(self):                 # the paper's settings, for train.py
        return {n: getattr(self, n) for n in ('resolution', 'stride', 'noise', 'lr', 'epochs')}

    def name_of(self, label):           # a label of the files as people know it
        return self.shown.get(label, label)

    def preset(self, name):
        """A Preset by name. `smoke` is nano in miniature: extreme pairs, few frames, few runs."""
        if name == 'smoke' and 'nano' in self.presets:
            nano = self.presets['nano']
            first, second = zip(*nano.pairs)
            pairs = [(a, b) for b in (min(second), max(second)) for a in (min(first), max(first))]
            runs = dict(train=2, valid=1, test=1)
            return replace(nano, frames=40, pairs=pairs, files_at_once=4, runs=runs)
        if name not in self.presets:
            raise ValueError(f'no preset {name!r} to simulate: choose from '
                             f'{", ".join([*self.presets, "smoke"])}')
        return self.presets[name]

def system_names():
    """Names of the systems that have a file here."""
    return ['active_matter', 'rayleigh_benard', 'shear_flow']

def find_system(name):
    """The System of the file NAME.py in this folder. Raises ValueError if there is none."""
    if name.isidentifier() and (Path(__file__).parent / f'{name}.py').exists():
        module = importlib.import_module(f'systems.{name}')
        if hasattr(module, 'SYSTEM'):
            return module.SYSTEM
    raise ValueError(f'unknown system {name!r}: systems/ has {", ".join(system_names())}')
