"""
Where a dataset lies on disk, and how much of it is there. All of these are found, below a folder X:

    X/NAME/data/train/*.hdf5, X/datasets/NAME/..    simulate.py; the-well-download
    X/data/train, X/train, or X is that folder      huggingface-cli download --local-dir X
    X/datasets--polymathic-ai--NAME/snapshots/HASH/data/train       the hub's cache, files are links

A dataset is what the `dataset_name` in its files says; without one, what its folder is called.
"""
import contextlib
import fnmatch
import json
import os
from collections import Counter
from pathlib import Path

from common import SPLITS
import h5py
from systems import System, find_system

DEPTH, MOST = 5, 2000       # folders below X that are looked into: how deep, and how many

# --- files
def split_folder(root, split):
    folder = Path(root, 'data', split)
    return folder if folder.is_dir() else Path(root, split)

def list_files(root, split):
    """{path: why it is left out, or ''} of a split's HDF5 files, sorted. No file is opened."""
    files, folder = {}, split_folder(root, split)
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if entry.name.endswith(('.incomplete', '.part')):
            files[folder / entry.name] = 'incomplete'
        elif fnmatch.fnmatch(entry.name, '*.h*5'):
            lost = entry.is_symlink() and not os.path.exists(entry.path)
            hidden = entry.name.startswith('.')                # ._a.hdf5: a Mac's notes on a.hdf5
            files[folder / entry.name] = 'hidden' if hidden else 'linked to nothing' if lost else ''
    return dict(sorted(files.items()))

def well_files(root, split):
    """A split's HDF5 files, sorted; without hidden and incomplete ones, and links to nothing."""
    return [path for path, why in list_files(root, split).items() if not why]

def all_files(root):
    return [path for split in SPLITS for path in well_files(root, split)]

def left_out(root):
    """How many files were left out and why, in words: 1 hidden, 2 incomplete."""
    reasons = Counter(why for split in SPLITS for why in list_files(root, split).values() if why)
    # where huggingface-cli keeps what it has not finished
    for folder in Path(root, '.cache', 'huggingface'), Path(root).parent.parent / 'blobs':
        if folder.name != 'blobs' or Path(root).parent.name == 'snapshots':
            reasons['incomplete'] += len([*folder.rglob('*.incomplete')])
    return ', '.join(f'{n} {why}' for why, n in sorted(reasons.items()) if n)

def why_unreadable(path, error):
    """What is wrong with a file that h5py could not open, and what to do."""
    if isinstance(error, BlockingIOError) or 'lock file' in str(error):
        return (f'{path} is locked: another program holds it, or this disk has no locks. If nobody '
                f'writes to it, set HDF5_USE_FILE_LOCKING=FALSE')
    with open(path, 'rb') as raw:
        start = raw.read(512).lstrip()
    # perhaps what a failed download left
    why = error
    if start.startswith(b'<'):
        why = 'a web page: the download failed'
    elif start.startswith(b'version https://git-lfs'):
        why = 'a Git LFS pointer in place of the file: git lfs pull'
    elif not start or 'truncated' in str(error):
        why = 'cut short: the download did not end'
    return f'{path} is unreadable ({why}): download or simulate it again'

# --- what the files say
def as_name(text):
    """A string of an HDF5 attribute."""
    return text.decode() if isinstance(text, bytes) else str(text)

def dataset_name(root):
    """The `dataset_name` in the files of a dataset; '' if they have none, None if none is readable.
    At most one file of each split is opened."""
    for split in SPLITS:
        for path in well_files(root, split)[:1]:
            with contextlib.suppress(OSError), h5py.File(path, 'r') as f:
                return as_name(f.attrs.get('dataset_name', ''))

def periodic_axes(path):
    """Is (x, y) periodic, by a file's `boundary_conditions`? No, where it does not say so."""
    try:
        with h5py.File(path, 'r') as f:
            axes = [as_name(axis) for axis in f['dimensions'].attrs['spatial_dims']]
            periodic = {as_name(axis) for condition in f['boundary_conditions'].values()
                        if as_name(condition.attrs['bc_type']).upper() == 'PERIODIC'
                        for axis in condition.attrs['associated_dims']}
    except (OSError, KeyError):                                # open_well_file says what is wrong
        return False, False
    return tuple(axis in periodic for axis in axes[:2])

def is_simulated(root):
    return Path(root, 'simulated.json').exists()

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

# --- which one
def find_dataset(name, data_dir, missing=False):
    """(folder, System, preset it was simulated with or None) of a dataset in or below `data_dir`.
    missing: where there is none, but it can be simulated, the folder it would have. Raises
    ValueError, with what was seen and the flags to give, for none, for two, and for other files."""
    top = Path(data_dir)
    if top.name in ('', '..'):
        top = Path(os.path.abspath(top))
    seen = {root: dataset_name(root) for root in dataset_folders(top)}
    matches = [root for root, said in seen.items() if is_wanted(root, said, name, top)]
    if not matches and list(seen.values()) == [None] and all_files(*seen):
        matches = [*seen]                                      # open_well_file says what is wrong

    # none?
    if len(matches) > 1:
        flags = ' or '.join(in_words(root, top) for root in matches)
        raise ValueError(f'{len(matches)} datasets {name} under {top}. Give one of {flags}')
    if not matches:
        system = own_system(name)
        if not missing or not system or not system.presets or top / name in seen:
            raise ValueError(what_was_seen(name, top, seen))
        return top / name, system, None

    # a dataset without a file in systems/ works too, with what its own files say
    root, preset = matches[0], read_recipe(matches[0]).get('preset')
    if not all_files(root) and not preset:
        raise ValueError(f'{root} has no complete HDF5 file ({left_out(root)}): end its download')
    system = own_system(system_name(root, name))
    return root, system or System(periodic=periodic_axes(all_files(root)[0])), preset

def dataset_folders(top):
    """The folders of datasets, in `top` and below: those that hold splits, or data/ with splits, or
    a simulation that was begun. Links are followed, no folder is looked into twice."""
    found, visited, level = {}, set(), [top]
    for _ in range(DEPTH + 1):
        folders, level = level[:MOST - len(visited)], []
        for folder in folders:
            try:
                inode = folder.stat().st_dev, folder.stat().st_ino
                inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
            except OSError:                                    # not a folder, or not ours
                continue
            if inode in visited:
                continue
            visited.add(inode)

            # is it a dataset? what is below one is its own
            if is_simulated(folder):
                found[folder] = True
            elif any(list_files(folder, split) for split in SPLITS if split in inside):
                is_part = folder.name == 'data' and (folder != top or is_simulated(folder.parent))
                found[folder.parent if is_part else folder] = True
            else:
                level += [folder / n for n in inside if n != 'cache' and not n.startswith('.')]
    return [*found]

def folder_name(root):
    """What a dataset's folder is called; in the hub's cache, two folders up."""
    folder = root.parent.parent if root.parent.name == 'snapshots' else root
    return folder.name.rpartition('--')[2]

def is_wanted(root, said, name, top):
    """Is this the dataset `name`? A simulated one only where simulate.py would write it."""
    if is_simulated(root) and top not in (root, root.parent, root / 'data'):
        return False
    another = said and said != name and own_system(said) and own_system(name)
    return said == name or folder_name(root) == name and not another

def own_system(name):
    """The System of a file in systems/, or None."""
    with contextlib.suppress(ValueError):
        return find_system(name)

def system_name(root, name):
    """`name`; or, if systems/ does not know it, what the files say, if systems/ knows that."""
    said = dataset_name(root)
    return said if said and own_system(said) and not own_system(name) else name

# --- in words
def in_words(root, top):
    """--data-dir X/NAME (4 files, simulated)."""
    simulated = ', simulated' if is_simulated(root) else ''
    return f'--data-dir {root if root != top else top / "data"} ({len(all_files(root))} files{simulated})'

def what_was_seen(name, top, seen):
    """That there is no dataset `name` in `top`, what there is, and what to do: a line."""
    system = own_system(name)
    make = f', or python simulate.py {name} --data-dir {top}' if system and system.presets else ''
    if not seen:
        there = 'it has no train/, valid/ or test/ with HDF5 files' if top.is_dir() else 'no folder'
        return f'no {name} under {top}: {there}. Check --data-dir and $THE_WELL_DATA_DIR{make}'
    found = [f'--data {said or folder_name(root)} {in_words(root, top)}'
             + ('' if said else f', unless its folder is renamed {name}: its files do not say')
             for root, said in [*seen.items()][:5]]
    return f'no {name} under {top}. It has {"; ".join(found)}{make}'

def expected_files(root, system):
    """{split: (files, runs)} of a dataset that is complete, as simulated or as published; or {}."""
    recipe = read_recipe(root)
    if {'pairs', 'runs'} <= recipe.keys():
        pairs = len(recipe['pairs'])
        return {split: (pairs, pairs * recipe['runs'][split]) for split in SPLITS}
    return {} if recipe else system.published

def is_complete(root, system, splits=SPLITS):
    """Are there as many files as were simulated, or published? Yes, if that is not known."""
    expected = expected_files(root, system)
    return all(len(well_files(root, s)) >= expected[s][0] for s in splits if s in expected)

def summary(name, root, opened):
    """One line: where a dataset is, how much of it, and its protocol. opened: {split: Split}."""
    train = opened['train']
    expected, recipe, parts = expected_files(root, train.system), read_recipe(root), []
    per_run = len(train.windows) // len(train.runs)

    # the runs of files that are not opened are known if all files are there
    for split in SPLITS:
        files, (most, runs) = len(well_files(root, split)), expected.get(split, (0, 0))
        words = f'{split} {files}' + (f' of {most}' if most else '') + ' files'
        if files < most:
            words += ': incomplete ' + ('simulation' if recipe else 'download')
        if split in opened:
            words += f', {len(opened[split].runs):,} runs, {len(opened[split].windows):,} windows'
        elif most and files == most:
            words += f', {runs:,} runs, {runs * per_run:,} windows'
        parts.append(words)

    # what else there is to say
    if without := left_out(root):
        parts.append(f'left out: {without}')
    if recipe:
        parts.append(f'simulated, preset {recipe["preset"]}, seed {recipe["seed"]}')
    parts.append(f'protocol of {name}' if own_system(name) else 'no protocol of its own')
    names = {train.system.name_of(scalar): scalar for scalar in train.scalars}
    if same := [n for n in names if n in train.system.symbols and names[n] not in train.varying()]:
        parts.append(f'{", ".join(same)} the same in all training files: no label')
    return f'{name} in {root}: ' + '; '.join(parts)
