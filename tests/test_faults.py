"""What should not happen, and does: each ends in one line, reads nothing from elsewhere, and leaves what was there."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import common
import data
from helpers import HERE, TINY, command, read_bytes, refused as refused_script
from test_files import dataset, largest_file, noise, open_split, refused
from test_files import say as last_line

import eval as evaluation
import plot
import simulate
import train


# ---------------------------------------------------------------------------------------------
# data files: nothing outside of them is read, and no more than they hold

def virtual(f, name='t0_fields/v'):
    layout = h5py.VirtualLayout((2, 33, 16, 16), 'f4')
    layout[:] = h5py.VirtualSource('../secret.hdf5', 'x', (2, 33, 16, 16))
    f.create_virtual_dataset(name, layout)


def claim(name, *shape):
    """A dataset of this shape of which nothing was written: it takes a few bytes."""
    return lambda f: f.create_dataset(name, shape, 'f4', chunks=tuple(min(n, 16) for n in shape))


def replace(name, value):
    def change(f):
        f.pop(name, None)
        f[name] = value
    return change


SECRET = h5py.ExternalLink('../secret.hdf5', '/x')
ODD = {                                                                  # what is in the file, and words of the refusal
    'a field elsewhere': (replace('t0_fields/v', SECRET), ['v is a link']),
    'a group elsewhere': (replace('t0_fields', h5py.ExternalLink('../secret.hdf5', '/')), ['t0_fields is a link']),
    'a scalar elsewhere': (replace('scalars/v', SECRET), ['v is a link']),
    'an axis elsewhere': (replace('dimensions/x', SECRET), ['x is a link']),
    'walls elsewhere': (replace('boundary_conditions', h5py.ExternalLink('../secret.hdf5', '/')), ['boundary_conditions is a']),
    'a name for a name': (replace('t0_fields/v', h5py.SoftLink('/t0_fields/c')), ['v is a link']),
    'pieced together': (virtual, ['v has its numbers in another file']),
    'raw numbers': (lambda f: f.create_dataset('t0_fields/v', (2, 33, 16, 16), 'f4', external=[('../secret.hdf5', 0, 1 << 20)]),
                    ['v has its numbers in another file']),
    'a field of 1e12': (claim('t0_fields/v', 10**6, 10**6, 16, 16), ['v has shape (1000000, 1000000,', 'than the file holds']),
    'more than can be counted': (claim('t0_fields/v', 2**40, 2**40, 16, 16), ['v has shape', 'than the file holds']),
    'a scalar of 1e12': (claim('scalars/v', 10**12), ['v has shape (1000000000000,)', 'than the file holds']),
    'an axis of 1e12': (claim('dimensions/x', 10**12), ['x has shape (1000000000000,)', 'than the file holds']),
    'a reference': (lambda f: f.create_dataset('t0_fields/v', data=f['scalars'].ref, dtype=h5py.ref_dtype), ['v in t0_fields']),
    'a referring scalar': (lambda f: f.create_dataset('scalars/v', data=f['scalars'].ref, dtype=h5py.ref_dtype), ['scalar v']),
    'a field of nothing': (lambda f: f.create_dataset('t0_fields/v', data=h5py.Empty('f4')), ['v in t0_fields']),
    'a scalar of nothing': (lambda f: f.create_dataset('scalars/v', data=h5py.Empty('f4')), ['scalar v']),
}


@pytest.mark.parametrize('kind', ODD)
def test_odd_files_are_refused(tmp_path, kind):
    """Before anything is cached; what a link leads to is there, and stays shut."""
    change, words = ODD[kind]
    root = dataset(tmp_path)
    with h5py.File(root / 'data/secret.hdf5', 'w') as f:
        f['x'] = noise(2, 33, 16, 16)
    with h5py.File(root / 'data/train/a.hdf5', 'r+') as f:
        change(f)
    if kind == 'walls elsewhere':
        with pytest.raises(ValueError, match='boundary_conditions is a link'):
            data.find_dataset('set', root)
    else:
        refused(root, 'a.hdf5', *words)


def test_what_packs_well_is_no_claim(tmp_path):
    """A field of zeros, packed by gzip to a thousandth, is read."""
    root, zeros = dataset(tmp_path), np.zeros((2, 33, 16, 16), 'f4')
    with h5py.File(root / 'data/train/a.hdf5', 'r+') as f:
        f.create_dataset('t0_fields/v', data=zeros, compression='gzip', compression_opts=9)
    with pytest.MonkeyPatch.context() as patch:                          # as if it were large
        patch.setattr('systems.datasets.SMALL', 1)
        assert open_split(root).channels == ['c', 'v']


# ---------------------------------------------------------------------------------------------
# the cache

def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def larger(path):
    about = json.loads(path.read_text())
    about['shape'][2] *= 2
    path.write_text(json.dumps(about))


DAMAGED = {'cut': ('npy', cut), 'empty': ('npy', lambda path: path.write_bytes(b'')), 'a text': ('npy', lambda p: p.write_text('x' * 999)),
           'of doubles': ('npy', lambda path: np.save(path, np.load(path).astype(float))),
           'notes cut': ('json', cut), 'no notes': ('json', Path.unlink), 'a list': ('json', lambda path: path.write_text('[]')),
           'notes of more': ('json', larger)}


@pytest.mark.parametrize('kind', DAMAGED)
def test_a_damaged_cache_is_refused(tmp_path, kind):
    """In one line, with what to do; and never by a signal from a file that is shorter than its map."""
    suffix, damage = DAMAGED[kind]
    root = dataset(tmp_path)
    open_split(root)
    damage(next((root / 'cache/train-full').glob(f'*.{suffix}')))
    with pytest.raises(ValueError, match=r'a-\w+.npy or .json is damaged: delete .*cache/train-full$'):
        open_split(root)
    shutil.rmtree(root / 'cache')
    assert len(open_split(root).windows) == 4


def test_a_cache_that_is_cut_while_it_is_read(tmp_path):
    root = dataset(tmp_path)
    split = open_split(root)
    path = next((root / 'cache/train-full').glob('*.npy'))
    for damage in cut, DAMAGED['empty'][1]:
        damage(path)
        with pytest.raises(ValueError, match='a-.*npy is damaged: delete its folder'):
            split.load(split.windows)


# ---------------------------------------------------------------------------------------------
# checkpoints

def test_a_checkpoint_is_no_larger_than_its_file(trained, tmp_path, monkeypatch):
    """torch.save packs nothing: a packed one may hold a thousand times its size, and is not begun."""
    with zipfile.ZipFile(trained / 'ckpt.pt') as whole, zipfile.ZipFile(tmp_path / 'bomb.pt', 'w', zipfile.ZIP_DEFLATED) as bomb:
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
        bomb.writestr('ckpt/data/999', bytes(10**8))
    assert (tmp_path / 'bomb.pt').stat().st_size < 10**7
    monkeypatch.setattr(torch, 'load', lambda *_, **__: pytest.fail('it is read'))
    with pytest.raises(ValueError, match='bomb.pt is not a checkpoint'):
        common.read_tensors(tmp_path / 'bomb.pt')


# ---------------------------------------------------------------------------------------------
# a full disk, at every write; what was there stays

def fails(capsys, words, main, *flags):
    line = last_line(capsys, main, *flags)
    assert all(word in line for word in words), line


def test_a_full_disk_ends_each_script_in_one_line(well, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, 'out')
    evaluate = 'out', '--data-dir', well, '--stride', 16, '--probes', 'linear', '--split', 'test'
    evaluation.main([str(flag) for flag in evaluate])                    # the cache is there
    before = read_bytes(tmp_path)
    with largest_file(100):
        fails(capsys, ['new/log.jsonl cannot be written: File too large'], train.main, *TINY, '--data-dir', well, '--out', 'new')
        fails(capsys, ['out/eval.json cannot be written: File too large'], evaluation.main, *evaluate)
        fails(capsys, ['out/examples.png cannot be written: File too large'], plot.main, 'out', '--data-dir', well, '--out', 'out')
    assert Path('new/log.jsonl').stat().st_size <= 100
    shutil.rmtree('new')
    assert read_bytes(tmp_path) == before

    # of the embeddings the table is kept
    evaluate_and_keep = *evaluate, '--save-embeddings', 'here.npz'
    monkeypatch.setattr(evaluation, 'write_text', lambda *_: None)
    with largest_file(100):
        fails(capsys, ['here.npz cannot be written: File too large'], evaluation.main, *evaluate_and_keep)
    assert read_bytes(tmp_path) == before


def test_a_full_disk_ends_a_simulation_in_one_line(tmp_path):
    """HDF5 itself ended the process here: a file is made in memory, then written."""
    fields = {name: noise(1, 4, 32, 16, *more) for name, more in {'tracer': (), 'pressure': (), 'velocity': (2,)}.items()}
    with largest_file(20_000), pytest.raises(OSError, match='a.hdf5 cannot be written: File too large'):
        simulate.write_well_file(tmp_path / 'a.hdf5', 'shear_flow', (100.0, 1.0), fields)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------
# where scripts are run, and how they end

def shell(line, cwd, **environment):
    """What a shell makes of a line; `python` in it is ours, with one thread."""
    env = command('train.py')['env'] | environment
    return subprocess.run(['bash', '-c', line.replace('python ', f'{sys.executable} {HERE}/')], cwd=cwd, text=True,
                          env={k: v for k, v in env.items() if v is not None}, capture_output=True, timeout=300)


def test_odd_places_and_a_bare_machine(well, tmp_path):
    """No HOME, no locale, few open files; blanks, a line break, a percent sign and quotes in the names of folders."""
    place = tmp_path / 'a b\n%s "c" \'d\''
    place.mkdir()
    shutil.copytree(well / 'active_matter', place / 'active_matter', copy_function=os.link)
    flags = ' '.join(map(str, TINY))
    for line in (f'ulimit -n 40; python train.py {flags} --steps 2 --data-dir .. --out "o %d"',
                 'ulimit -n 40; python eval.py "o %d" --data-dir .. --probes linear --stride 16',
                 'ulimit -n 40; python plot.py "o %d" --data-dir .. --out "p %d"'):
        (place / 'in').mkdir(exist_ok=True)
        p = shell(line, place / 'in', HOME=None, LC_ALL='C', LANG=None, MPLCONFIGDIR=None)
        assert p.returncode == 0, p.stderr
    assert sorted(path.name for path in (place / 'in/p %d').iterdir()) == ['errors.png', 'examples.png', 'training.png']


def test_nobody_reads_what_is_said(trained, tmp_path):
    """`| head -1`: no traceback."""
    p = shell('python train.py --help | head -1', tmp_path)
    assert 'Traceback' not in p.stderr and len(p.stdout.splitlines()) == 1


def test_a_rank_that_is_killed_takes_the_others_with_it(well, tmp_path):
    """Within a minute, and none is left."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', HERE / 'train.py']
    p = subprocess.Popen(**command(torchrun, *TINY, '--data-dir', well, '--out', tmp_path / 'out', '--steps', 10**6),
                         cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        log = tmp_path / 'out/log.jsonl'
        wait_for(lambda: log.exists() and log.stat().st_size, 120)
        ranks = Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split()
        assert len(ranks) == 2
        os.kill(int(ranks[1]), signal.SIGKILL)
        said, _ = p.communicate(timeout=60)
        assert p.returncode == 1 and 'SIGKILL' in said
        assert not any(Path('/proc', rank).exists() for rank in ranks)
    finally:
        p.kill()


def wait_for(what, seconds):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_evaluation_is_of_the_checkpoint_it_began_with(well, trained, tmp_path, monkeypatch):
    """Although the training saves another one meanwhile."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, 'out')
    newer = torch.load('out/ckpt.pt', weights_only=True) | {'step': 999, 'samples': 999, 'seconds': 999.0}
    embed = evaluation.Run.embed

    def and_save(run, *args, **settings):
        common.write_tensors(Path('out/ckpt.pt'), newer)
        return embed(run, *args, **settings)
    monkeypatch.setattr(evaluation.Run, 'embed', and_save)
    evaluation.main(['out', '--data-dir', str(well), '--stride', '16', '--probes', 'linear'])
    assert json.loads(Path('out/eval.json').read_text())['run']['step'] == 40


NAMES = {                                                                # a command, and what the line says
    'a model in another folder': (['train.py', '--model', '../mine'], "unknown model '../mine'"),
    'a model in a module': (['train.py', '--model', 'os.path'], "unknown model 'os.path'"),
    'a dataset in another folder': (['train.py', '--data', '../x'], '../x'),
    'a cell in another folder': (['-m', 'benchmark.cells', '../x-seed0'], "no row '../x'"),
    'an absurd count': (['train.py', *TINY, '--batch', 10**18], 'out of memory'),
}


@pytest.mark.parametrize('kind', NAMES)
def test_odd_names_are_refused(well, tmp_path, kind):
    (script, *flags), word = NAMES[kind]
    if script == '-m':
        p = subprocess.run(**command([script, flags[0]], *flags[1:], PYTHONPATH=HERE), cwd=tmp_path, capture_output=True, text=True)
        assert p.returncode == 2 and word in p.stderr and 'Traceback' not in p.stderr
    else:
        left = refused_script(script, *flags, '--data-dir', well, cwd=tmp_path, words=[word])
        assert all(path.name == 'log.jsonl' for path in left)            # begun, where memory ends
