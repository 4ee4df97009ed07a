"""
Where a dataset lies on disk, and how much of it is there. All of these are found, below a folder X:

    X/NAME/data/train/*.hdf5, X/datasets/NAME/..    simulate.py; the-well-download
    X/data/train, X/train, or X is that folder      hf download --local-dir X
    X/datasets--polymathic-ai--NAME/snapshots/HASH/data/train       the hub's cache, files are links

A dataset is what the `dataset_name` in its files says; without one, what its folder is called.
"""
import contextlib
import json
import math
import os
from collections import Counter
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from common import SPLITS
import h5py
import numpy as np
from systems import System, find_system

DEPTH, MOST = 5, 2000       # folders below X that are looked into: how deep, and how many
SMALL = 2**30               # bytes: a larger array must be in its file,
DENSE = 2000                # with so many in one of its bytes at most: gzip packs 1,032 zeros

# --- files
def list_files(root, split):
    """{path: '', or why it is left out} of a split's HDF5 files, sorted. No file is opened."""
    files, folder = {}, Path(root, 'data', split)
    if not folder.is_dir():
        folder = Path(root, split)
    entries = os.scandir(folder) if folder.is_dir() else ()
    for entry in sorted(entries, key=lambda entry: entry.name):
        if entry.name.endswith(('.incomplete', '.part')):
            files[folder / entry.name] = 'incomplete'
        elif fnmatch(entry.name, '.*.h*5'):                    # ._a.hdf5: a Mac's notes on a.hdf5
            files[folder / entry.name] = 'hidden'
        elif fnmatch(entry.name, '*.h*5'):
            lost = entry.is_symlink() and not os.path.exists(entry.path)
            files[folder / entry.name] = 'linked to nothing' if lost else ''
    return files

def well_files(root, *splits):
    """The HDF5 files of some splits, or all, sorted in each; without those that are left out."""
    listed = (item for split in splits or SPLITS for item in list_files(root, split).items())
    return [path for path, why in listed if not why]

def left_out(root):
    """How many files were left out, and why, in words: 1 hidden, 2 incomplete."""
    reasons = Counter(why for split in SPLITS for why in list_files(root, split).values() if why)
    unfinished = [*Path(root, '.cache/huggingface/download').rglob('*.incomplete')]
    if root.parent.name == 'snapshots':                        # in the hub's cache
        unfinished += root.parents[1].glob('blobs/*.incomplete')
    reasons['incomplete'] += len(unfinished)
    return ', '.join(f'{n} {why}' for why, n in sorted(reasons.items()) if n)

def why_unreadable(path, error):
    """What is wrong with a file that h5py could not open, and what to do."""
    if 'lock file' in str(error):
        return (f'{path} is locked: another program holds it, or this disk has no locks. If nobody '
                f'writes to it, set HDF5_USE_FILE_LOCKING=FALSE')
    with open(path, 'rb') as raw:
        start = raw.read(512).lstrip()
    # perhaps what a failed download left
    if start.startswith(b'<'):
        error = 'a web page: the download failed'
    elif start.startswith(b'version https://git-lfs'):
        error = 'a Git LFS pointer in place of the file: git lfs pull'
    elif not start or 'truncated' in str(error):
        error = 'cut short: the download did not end'
    return f'{path} is unreadable ({error}): download or simulate it again'

# --- what they say
def member(group, name, path):
    """What a group of an open file has under a name, or None. Raises ValueError for what lies in
    another file, and for more numbers than this one can hold: nothing of it is read."""
    link = group.get(name, getlink=True)
    if link is not None and not isinstance(link, h5py.HardLink):
        raise ValueError(f'{path}: {name} is a link, and links are not followed')
    # where are its numbers, and how many?
    found = group.get(name)
    if isinstance(found, h5py.Dataset):
        if found.is_virtual or found.external:
            raise ValueError(f'{path}: {name} has its numbers in another file')
        size = math.prod(found.shape or ()) * found.dtype.itemsize
        if size > max(SMALL, DENSE * found.id.get_storage_size()):
            raise ValueError(f'{path}: {name} has shape {found.shape}, more than the file holds')
    return found

def as_name(text):
    """A string of an HDF5 attribute."""
    return text.decode() if isinstance(text, bytes) else str(text)

def dataset_name(root):
    """The `dataset_name` in the files; '' if they have none, None if none of three can be read."""
    for path in [path for split in SPLITS for path in well_files(root, split)[:1]]:
        with contextlib.suppress(OSError), h5py.File(path, 'r') as f:
            return as_name(f.attrs.get('dataset_name', ''))

def periodic_axes(path):
    """Is (x, y) periodic, by a file's `boundary_conditions`? No, where it does not say so."""
    try:
        with h5py.File(path, 'r') as f:
            axes = [as_name(axis) for axis in np.ravel(f['dimensions'].attrs['spatial_dims'])]
            group = member(f, 'boundary_conditions', path) or {}
            conditions = [member(group, name, path).attrs for name in group]
            periodic = {as_name(axis) for says in conditions
                        if as_name(says['bc_type']).upper() == 'PERIODIC'
                        for axis in np.ravel(says['associated_dims'])}
    except (OSError, KeyError, AttributeError):                # open_well_file says what is wrong
        return False, False
    return tuple(axis in periodic for axis in axes[:2])

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

def own_system(name):
    """The System of the file NAME.py in systems/, or None."""
    with contextlib.suppress(ValueError):
        return find_system(name)

def can_be_simulated(name):
    return bool(own_system(name) and own_system(name).presets)

def system_name(root, name):
    """`name`; or, if systems/ does not know it, what the files say, if systems/ knows that."""
    said = dataset_name(root)
    return said if said and own_system(said) and not own_system(name) else name

# --- which one
def find_dataset(name, data_dir, missing=False):
    """(folder, System, preset it was simulated with or None) of a dataset in or below `data_dir`.
    missing: where there is none, but it can be simulated, the folder it would have. Raises
    ValueError, with what was seen and the flags to give, for none, for two, and for other files."""
    top = Path(data_dir) if Path(data_dir).name not in ('', '..') else Path(data_dir).resolve()
    seen = {root: dataset_name(root) for root in dataset_folders(top)}
    roots = [root for root, said in seen.items() if is_wanted(root, said, name, top)]
    if not roots and list(seen.values()) == [None] and well_files(*seen):
        roots = [*seen]                                        # open_well_file says what is wrong

    # none, or two?
    if not roots and missing and can_be_simulated(name) and top / name not in seen:
        return top / name, own_system(name), None
    if len(roots) != 1:
        raise ValueError(what_was_seen(name, top, seen, roots))

    # a dataset without a file in systems/ works too, with what its own files say
    root, files, preset = roots[0], well_files(roots[0]), read_recipe(roots[0]).get('preset')
    system = own_system(system_name(root, name))
    if not files and not (preset and system):
        raise ValueError(f'{root} has no complete HDF5 file ({left_out(root)}): end its download')
    return root, system or System(periodic=periodic_axes(files[0])), preset

def dataset_folders(top):
    """Datasets in `top` and below, the nearest first: folders that hold splits, or data/ with them,
    or a simulation that was begun. Links are followed, no folder is looked into twice."""
    roots, visited, queue = {}, set(), [(top, 0)]
    for folder, depth in islice(queue, MOST):                  # while it grows
        place = os.path.realpath(folder)
        if place in visited:
            continue
        visited.add(place)
        inside = []
        with contextlib.suppress(OSError):                     # no folder, or not ours to read
            inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())

        # what is below a dataset is its own
        if Path(folder, 'simulated.json').exists():
            roots[folder] = True
        elif any(list_files(folder, split) for split in SPLITS if split in inside):
            is_part = folder != top or Path(folder.parent, 'simulated.json').exists()
            roots[folder.parent if is_part and folder.name == 'data' else folder] = True
        elif depth < DEPTH:                                    # go on below, but not in caches
            names = (n for n in inside if n != 'cache' and not n.startswith('.'))
            queue += [(folder / n, depth + 1) for n in names]
    return [*roots]

def folder_name(root):
    """What a dataset's folder is called; in the hub's cache, the one two above."""
    return (root.parents[1] if root.parent.name == 'snapshots' else root).name.rpartition('--')[2]

def is_wanted(root, said, name, top):
    """Is this the dataset `name`? A simulated one only where simulate.py would write it."""
    if read_recipe(root) and top not in (root, root.parent, root / 'data'):
        return False
    another = said and own_system(said) and own_system(name)
    return said == name or folder_name(root) == name and not another

# --- in words
def what_was_seen(name, top, seen, roots):
    """Why there is not one dataset `name` in `top`, and the flags to give, in a line."""
    found = []
    for root in roots or [*seen][:5]:
        flags = f'--data {seen[root] or folder_name(root)} --data-dir '
        inside = root == top and Path(top, 'data').is_dir()    # else top/NAME would be looked for
        flags += str(top / 'data' if inside else root)
        simulated = ', simulated' if read_recipe(root) else ''
        found.append(f'{flags} ({len(well_files(root))} files{simulated})')
    if roots:
        return f'{len(roots)} datasets {name} under {top}. Give one of: {"; ".join(found)}'

    # another one, or a mistake; nothing is simulated among somebody's data
    there = 'no train/, valid/ or test/ with HDF5 files' if top.is_dir() else 'no such folder'
    do = 'Check --data-dir and $THE_WELL_DATA_DIR'
    if can_be_simulated(name) and not found:
        do += f', or python simulate.py {name} --data-dir {top}'
    return f'no {name} under {top}: {"; ".join(found) or there}. {do}'

def is_complete(root, system, splits):
    """Have these splits as many files as were published? Yes, if that is not known."""
    return all(len(well_files(root, split)) >= files
               for split, (files, _) in system.published.items() if split in splits)

def summary(name, root, opened):
    """Where a dataset is, how much of it, and its protocol, in a line. opened: {split: Split}."""
    train, recipe, parts = opened['train'], read_recipe(root), []
    published = {} if recipe else train.system.published
    for split in SPLITS:
        files, (most, runs) = len(well_files(root, split)), published.get(split, (0, 0))
        words = f'{split} {files} of {most} files' if most else f'{split} {files} files'
        if files < most:
            words += ': incomplete download'

        # the runs of files that were not opened are known if all are there
        if split in opened:
            words += f', {len(opened[split].runs):,} runs, {len(opened[split].windows):,} windows'
        elif most and files == most:
            windows = runs * len(train.windows) // len(train.runs)
            words += f', {runs:,} runs, {windows:,} windows'
        parts.append(words)

    # what else there is to say
    if without := left_out(root):
        parts.append(f'left out: {without}')
    if recipe:
        parts.append(f'simulated, preset {recipe["preset"]}, seed {recipe["seed"]}')
    parts.append(f'protocol of {name}' if own_system(name) else 'no protocol of its own')

    same = [train.system.name_of(n) for n in train.scalars if n not in train.varying()]
    if same := ', '.join(n for n in same if n in train.system.symbols):
        parts.append(f'{same} the same in all training files: no label')
    return f'{name} in {root}: ' + '; '.join(parts)
