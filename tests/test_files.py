"""HDF5 files of many kinds: each is read as it should be, or refused in one line before anything is cached."""
import contextlib
import errno
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import common
import data
import eval as evaluation
import plot
import train
from helpers import HERE, TINY
from model import load_checkpoint, load_run
from systems import System

RNG = np.random.default_rng(0)
SPLITS = 'train', 'valid', 'test'


def noise(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def write(path, fields=None, scalars=None, axes=('x', 'y'), dims=None, periodic=(), n=16, frames=33, runs=2):
    """A file: values of fields ('t0_fields/c'), scalars and dimensions, each an array or (array, attributes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {'t0_fields/c': noise(runs, frames, n, n)} if fields is None else fields
    with h5py.File(path, 'w') as f:
        for group in 'dimensions', 'scalars', 't0_fields', 't1_fields', 't2_fields', 'boundary_conditions':
            f.create_group(group)
        f['dimensions'].attrs['spatial_dims'] = list(axes)
        named = {**{f'scalars/{k}': v for k, v in (scalars or {}).items()},
                 **{f'dimensions/{k}': v for k, v in (dims or {}).items()}}
        for name, values in {**fields, **named}.items():
            values, attributes = values if isinstance(values, tuple) else (values, {})
            f[name] = values
            f[name].attrs.update(attributes)
        for axis in axes:
            kind = 'PERIODIC' if axis in periodic else 'WALL'
            f.create_group(f'boundary_conditions/{axis}').attrs.update(bc_type=kind, associated_dims=[axis])
    return path


def dataset(tmp_path, *files, **all_files):
    """A root with a training split of these files, a.hdf5, b.hdf5, ..."""
    for name, settings in zip('abcdef', files or [{}]):
        write(tmp_path / 'set/data/train' / f'{name}.hdf5', **{**all_files, **settings})
    return tmp_path / 'set'


def open_split(root, system=System(), **settings):
    return data.Split(root, system, 'train', progress=False, **settings)


def refused(root, *words, system=System()):
    """With all these words, and nothing cached."""
    with pytest.raises(ValueError) as told:
        open_split(root, system)
    assert all(word in str(told.value) for word in words), told.value
    assert not (root / 'cache').exists()


def say(capsys, main, *flags):
    """The last line of a script that refuses."""
    with pytest.raises(SystemExit) as left:
        main([str(flag) for flag in flags])
    said = capsys.readouterr().err
    assert left.value.code == 2 and 'Traceback' not in said
    return said.splitlines()[-1]


# ---------------------------------------------------------------------------------------------
# scalars

@pytest.mark.parametrize('attributes', [{}, {'sample_varying': True}, {'sample_varying': False}])
def test_a_scalar_of_each_run(tmp_path, attributes):
    root = dataset(tmp_path, dict(scalars={'a': (np.float32([1, 2]), attributes), 'b': 5.0, 'c': [7.0]}),
                   dict(scalars={'a': (np.float32([3, 4]), attributes), 'b': 6.0, 'c': [7.0]}))
    split = open_split(root)
    assert split.labels(['a', 'b']).tolist() == [[1, 5], [2, 5], [3, 6], [4, 6]] and split.varying() == ['a', 'b']


def test_a_scalar_that_changes_in_time_is_no_label(tmp_path, capsys):
    """Said once, whatever its length."""
    changing = {'dose': (np.arange(33.0), {'time_varying': True}), 'dose2': ('text', {'time_varying': True})}
    root = dataset(tmp_path, dict(scalars={'a': 1.0, **changing}), dict(scalars={'a': 2.0, **changing}))
    data.say_once.cache_clear()
    assert open_split(root).varying() == ['a'] and open_split(root, cache_dir=tmp_path / 'again').varying() == ['a']
    said = capsys.readouterr().out
    assert said.count('dose changes in time') == said.count('dose2 changes in time') == 1


def test_a_constant_may_be_stored_in_two_precisions(tmp_path):
    root = dataset(tmp_path, dict(scalars={'a': np.float32(0.1), 'b': 1e300, 'c': 1e-100}),
                   dict(scalars={'a': np.float64(0.1), 'b': 1e300, 'c': 1.1e-100}))
    assert open_split(root).varying() == ['c']                           # it varies, however small


def test_a_label_has_a_standard_deviation(tmp_path):
    """Else all errors would be zero, or no numbers."""
    root = dataset(tmp_path, dict(scalars={'a': 1e300}), dict(scalars={'a': 2e300}))
    with pytest.raises(ValueError, match='scalar a is too large for a label'):
        open_split(root).varying()


BAD_SCALARS = {                                                          # of the second file, and words of the refusal
    'of another length': ({'a': [1.0, 2.0, 3.0]}, ['b.hdf5', 'scalar a', '(3,)']),
    'nan': ({'a': np.nan}, ['b.hdf5', 'scalar a', 'NaN']),
    'infinite for one run': ({'a': [1.0, np.inf]}, ['b.hdf5', 'scalar a', 'infinite']),
    'zero in log10': ({'a': 0.0}, ['b.hdf5', 'scalar a', 'logarithm']),
    'missing': ({}, ['b.hdf5', 'no scalar a', 'a.hdf5']),
    'one more': ({'a': 1.0, 'b': 2.0}, ['a.hdf5', 'no scalar b', 'b.hdf5']),
    'a text': ({'a': 'small'}, ['b.hdf5', 'scalar a', 'a number is needed']),
    'empty': ({'a': np.zeros(0)}, ['b.hdf5', 'scalar a', '(0,)']),
    'null': ({'a': h5py.Empty('f')}, ['b.hdf5', 'scalar a', 'a number is needed']),
}


@pytest.mark.parametrize('kind', BAD_SCALARS)
def test_bad_scalars(tmp_path, kind):
    scalars, words = BAD_SCALARS[kind]
    refused(dataset(tmp_path, dict(scalars={'a': 1.0}), dict(scalars=scalars)), *words, system=System(log_labels=('a',)))


# ---------------------------------------------------------------------------------------------
# fields

def test_components_in_one_axis(tmp_path):
    """A tensor as (.., 4), as the format's description has it, is that of (.., 2, 2)."""
    D, v = noise(2, 33, 16, 16, 2, 2), noise(2, 33, 16, 16, 2)
    root = dataset(tmp_path, fields={'t2_fields/D': D.reshape(2, 33, 16, 16, 4), 't1_fields/v': v})
    split = open_split(root)
    assert split.channels == ['v_x', 'v_y', 'D_xx', 'D_xy', 'D_yx', 'D_yy']
    assert np.array_equal(split.fields[1], np.moveaxis(np.concatenate([v, D.reshape(*D.shape[:4], 4)], -1)[1], -1, 0))


FULL = 3, 33, 16, 16
CONSTANT = {                                                             # attributes, and the shape in the file
    'no time': (dict(time_varying=False), (3, 16, 16)),
    'time of length 1': (dict(time_varying=False), (3, 1, 16, 16)),
    'all the time': (dict(time_varying=False), (3, 33, 16, 16)),
    'no runs': (dict(sample_varying=False), (33, 16, 16)),
    'one run': (dict(sample_varying=False), (1, 33, 16, 16)),
    'neither': (dict(sample_varying=False, time_varying=False), (16, 16)),
    'one of one': (dict(sample_varying=False, time_varying=False), (1, 1, 16, 16)),
    'one run, no time': (dict(sample_varying=False, time_varying=False), (1, 16, 16)),
    'no y': (dict(dim_varying=[True, False]), (3, 33, 16)),
    'no x': (dict(dim_varying=[False, True]), (3, 33, 16)),
    'y of length 1': (dict(dim_varying=[True, False]), (3, 33, 16, 1)),
    'x of length 1, no time': (dict(dim_varying=[False, True], time_varying=False), (3, 1, 16)),
    'y of length 1, no time': (dict(dim_varying=[True, False], time_varying=False), (3, 16, 1)),
    'a number': (dict(sample_varying=False, time_varying=False, dim_varying=[False, False]), ()),
}


@pytest.mark.parametrize('resolution', [0, 8])
@pytest.mark.parametrize('kind', CONSTANT)
def test_what_does_not_vary_is_repeated(tmp_path, kind, resolution):
    """A scalar and a vector without an axis, beside a field with all of them."""
    attributes, shape = CONSTANT[kind]
    a, v = noise(*shape), noise(*shape, 2)
    root = dataset(tmp_path, fields={'t0_fields/a': (a, attributes), 't0_fields/b': noise(*FULL), 't1_fields/v': (v, attributes)})
    varies = [attributes.get('sample_varying', True), attributes.get('time_varying', True),
              *attributes.get('dim_varying', [True, True])]
    lengths = shape if len(shape) == 4 else [n if yes else 1 for n, yes in zip(FULL, varies)]
    whole = np.broadcast_to(a.reshape(lengths), FULL), np.broadcast_to(v.reshape(*lengths, 2), (*FULL, 2))
    split = open_split(root, resolution=resolution)
    expected = torch.tensor(np.stack([whole[0], whole[1][..., 0], whole[1][..., 1]], 1))
    if resolution:
        expected = torch.stack([torch.nn.functional.interpolate(run, (8, 8), mode='bilinear') for run in expected])
    found = torch.tensor(np.stack([split.fields[run] for run in range(3)])[:, [0, 2, 3]])
    assert split.channels == ['a', 'b', 'v_x', 'v_y'] and torch.allclose(found, expected, atol=1e-6)


BAD_FIELDS = {                                                           # what is added, and words of the refusal
    'three components': ({'t1_fields/v': noise(2, 33, 16, 16, 3)}, ['field v', '(2, 33, 16, 16, 3)', 'x, y, 2)']),
    'three by three': ({'t2_fields/D': noise(2, 33, 16, 16, 3, 3)}, ['field D', '(2, 33, 16, 16, 3, 3)']),
    'a vector among scalars': ({'t0_fields/v': noise(2, 33, 16, 16, 2)}, ['field v', '(2, 33, 16, 16, 2)']),
    'no time, and no word of it': ({'t0_fields/a': noise(2, 16, 16)}, ['field a', '(2, 16, 16)', 'attributes']),
    'one run, and no word of it': ({'t0_fields/a': noise(1, 33, 16, 16)}, ['field a', '(1, 33, 16, 16)']),
    'a frame more': ({'t0_fields/a': noise(2, 34, 16, 16)}, ['field c', '(2, 33, 16, 16)']),
    'half of x': ({'t0_fields/a': (noise(2, 33, 8, 16), {'dim_varying': [False, True]})}, ['field a']),
    'odd attributes': ({'t0_fields/a': (noise(2, 33, 16), {'dim_varying': [True]})}, ['field a', 'attributes']),
    'a text': ({'t0_fields/a': 'text'}, ['a in t0_fields is not an array of numbers']),
    'empty': ({'t0_fields/a': noise(0, 33, 16, 16)}, ['a in t0_fields']),
    'a group': ({'t0_fields/a/b': noise(2, 33, 16, 16)}, ['a in t0_fields']),
    'a broken link': ({'t0_fields/a': h5py.SoftLink('/nowhere')}, ['a is a link']),
    'a name twice': ({'t0_fields/v_x': noise(2, 33, 16, 16), 't1_fields/v': noise(2, 33, 16, 16, 2)}, ['two channels', 'v_x']),
}


@pytest.mark.parametrize('kind', BAD_FIELDS)
def test_bad_fields(tmp_path, kind):
    fields, words = BAD_FIELDS[kind]
    root = dataset(tmp_path)
    with h5py.File(root / 'data/train/a.hdf5', 'r+') as f:
        for name, values in fields.items():
            values, attributes = values if isinstance(values, tuple) else (values, {})
            f[name] = values
            if attributes:
                f[name].attrs.update(attributes)
    refused(root, 'a.hdf5', *words)


def test_each_file_has_its_own_frames(tmp_path, capsys):
    """And windows of them; one that is too short for a window is left out, and said to be."""
    frames = 60, 20, 40
    fields = [noise(1, T, 16, 16) for T in frames]
    root = dataset(tmp_path, *(dict(fields={'t0_fields/c': x}, scalars={'a': float(T)}) for T, x in zip(frames, fields)))
    split = data.Split(root, System(), 'train', 0, 4)
    assert '1 of 3 files' in capsys.readouterr().out and split.frames.tolist() == [60, 40]
    assert split.windows.tolist() == [*([0, t] for t in range(0, 29, 4)), *([1, t] for t in range(0, 9, 4))]
    kept = [fields[0][0], fields[2][0]]
    for window, (run, t) in zip(split.load(split.windows)[:, 0].numpy(), split.windows):
        assert np.array_equal(window, kept[run][t:t + 32])
    both = np.concatenate([x.ravel() for x in kept]).astype(float)
    assert split.mean[0] == pytest.approx(both.mean(), abs=1e-6) and split.std[0] == pytest.approx(both.std(), rel=1e-6)
    assert split.labels(['a']).tolist() == [[60], [40]] and [run['file'] for run in split.runs] == ['a.hdf5', 'c.hdf5']

    # the other time of a window is of its own run
    asked, load = [], split.load
    split.load = lambda windows, *more: asked.append(np.array(windows)) or load(windows, *more)
    c = train.Config(views='other-time', batch=8, micro_batch=8, device='cpu')
    for step in range(12):
        train.load_batch(split, c, step, 0)
    context, target = np.concatenate(asked[::2]), np.concatenate(asked[1::2])
    assert (context[:, 0] == target[:, 0]).all() and (abs(context[:, 1] - target[:, 1]) >= 16).all()
    assert [target[target[:, 0] == run, 1].max() for run in (0, 1)] == [pytest.approx(44, abs=4), pytest.approx(24, abs=4)]
    assert (target[:, 1] + 16 <= split.frames[target[:, 0]]).all()


def test_files_of_another_grid_or_channel_are_refused(tmp_path):
    for i, other in enumerate((dict(n=32), dict(axes=('x', 'z')), dict(fields={'t0_fields/b': noise(2, 33, 16, 16)}))):
        refused(dataset(tmp_path / str(i), {}, other), 'b.hdf5', 'other channels or another shape')


# ---------------------------------------------------------------------------------------------
# axes and components

@pytest.mark.parametrize('axes', [('x', 'z'), ('r', 'theta')])
def test_axes_have_any_names(tmp_path, axes):
    """Components share one std; symmetries are those of x and y, and none where a quarter turn is no symmetry."""
    scale = np.float32([1, 3])
    fields = {'t0_fields/mass_y': 7 * noise(2, 33, 16, 16), 't0_fields/mass_x': noise(2, 33, 16, 16),
              't1_fields/v': scale * noise(2, 33, 16, 16, 2), 't2_fields/D': noise(2, 33, 16, 16, 2, 2)}
    system = System(periodic=(True, True), symmetries=tuple(range(8)))
    split = open_split(dataset(tmp_path, fields=fields, axes=axes), system)
    a, b = axes
    assert split.channels == ['mass_x', 'mass_y', f'v_{a}', f'v_{b}', *(f'D_{i}{j}' for i in axes for j in axes)]
    _, std = split.normalization(True)
    assert std[0] == pytest.approx(1, rel=0.05) and std[1] == pytest.approx(7, rel=0.05)     # scalars, not components
    assert std[2] == std[3] == pytest.approx(5**0.5, rel=0.05) and len(set(std[4:].tolist())) == 1

    # which symmetries occur, with what they do to components
    x, seen = split.fields[0, :, :1], set()
    for seed in range(60):
        out = split.load([(0, 0)], frames=1, augment=True, seeds=[seed])[0].numpy()
        for element in range(8):
            image = data.transform(x, split.components, element)
            for i, j in np.argwhere(image[0, 0] == out[0, 0, 0, 0]):
                seen |= {element} if np.array_equal(out, np.roll(image, (-i, -j), (-2, -1))) else set()
    assert seen == (set(range(8)) if axes == ('x', 'z') else {0})


def test_a_scalar_field_keeps_its_sign(tmp_path):
    """mass_y is no component: a mirror image has it as it is, and v_y is turned."""
    fields = {'t0_fields/mass_x': noise(2, 33, 16, 16), 't1_fields/mass': noise(2, 33, 16, 16, 2)}
    refused(dataset(tmp_path / 'twice', fields=fields), 'two channels')
    fields['t1_fields/v'] = fields.pop('t1_fields/mass')
    split = open_split(dataset(tmp_path, fields=fields))
    x = split.fields[0, :, :1]
    flipped, turned = (data.transform(x, split.components, element) for element in (1, 2))
    assert np.array_equal(flipped[0], x[0][:, ::-1]) and np.array_equal(flipped[1], -x[1][:, ::-1])
    assert np.array_equal(turned[0], np.rot90(x[0], axes=(-2, -1)))
    assert np.array_equal(turned[2], np.rot90(x[1], axes=(-2, -1)))      # v_x -> v_y


def test_small_fields_are_normalised(tmp_path):
    """Whatever their units; a channel that is constant but for rounding is not blown up."""
    fields = {'t0_fields/a_small': 1e-6 * noise(2, 33, 16, 16), 't0_fields/b_offset': 1e5 + 10 * noise(2, 33, 16, 16),
              't0_fields/c_constant': np.full((2, 33, 16, 16), 0.1, np.float32) + 1e-8 * noise(2, 33, 16, 16),
              't0_fields/d_zero': np.zeros((2, 33, 16, 16), np.float32), 't1_fields/v': 1e-9 * noise(2, 33, 16, 16, 2)}
    split = open_split(dataset(tmp_path, fields=fields))
    mean, std = (v.reshape(-1, 1, 1, 1) for v in split.normalization(True))
    z = ((split.fields[0] - mean) / std).std((1, 2, 3))
    assert z[[0, 1, 4, 5]] == pytest.approx(np.ones(4), rel=0.05) and z[2] < 1e-3 and z[3] == 0
    assert std.dtype == np.float32 and np.isfinite(std).all()


# ---------------------------------------------------------------------------------------------
# coordinates

X = np.linspace(0, 3, 16)
DIMS = {                                                                 # in the file, and what is read: time, x, y
    'none': ({}, (None, None, None)),
    'plain': (dict(time=np.arange(33) / 4, x=X, y=2 * X), (np.arange(33) / 4, X, 2 * X)),
    'one time': (dict(time=[0.5]), (None, None, None)),
    'no time': (dict(time=np.zeros(0)), (None, None, None)),
    'a time for each run': (dict(time=np.outer([1, 2], np.arange(33))), (np.arange(33), None, None)),
    'edges': (dict(x=np.arange(17.0)), (None, np.arange(16), None)),
    'mesh': (dict(x=np.meshgrid(X, X, indexing='ij')[0], y=2 * np.meshgrid(X, X, indexing='ij')[1]), (None, X, 2 * X)),
    'texts': (dict(x=np.array([b'a'] * 16)), (None, None, None)),
    'null': (dict(time=h5py.Empty('f')), (None, None, None)),
}


@pytest.mark.parametrize('kind', DIMS)
def test_coordinates(tmp_path, kind):
    """Of any kind: numbers of points where the file does not say."""
    dims, expected = DIMS[kind]
    root = dataset(tmp_path, dims=dims)
    expected = [np.arange(n) if x is None else x for x, n in zip(expected, (33, 16, 16))]
    split = open_split(root)
    assert np.allclose(split.grid[0], expected[1]) and np.allclose(split.grid[1], expected[2])
    assert split.grid[2] == pytest.approx(expected[0][1] - expected[0][0])
    _, _, *at = plot.read_example(root / 'data/train/a.hdf5', ())
    assert all(np.allclose(x, y) for x, y in zip(at, expected))


# ---------------------------------------------------------------------------------------------
# the machine's limits

def test_hundreds_of_files_are_read_with_few_open_ones(tmp_path):
    for i in range(300):
        write(tmp_path / 'set/data/train' / f'{i:03}.hdf5', runs=1, frames=32, n=2)
    child = f"""
import os, resource, sys
os.fsync = lambda file: None                                             # a second or ten
sys.path.insert(0, {str(HERE)!r})
import data, common
from systems import System
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
split = data.Split({str(tmp_path / 'set')!r}, System(), 'train', progress=False)
for x in common.prefetch(split.load, split.windows.reshape(-1, 4, 2), 4):
    print(len(x))
"""
    p = subprocess.run([sys.executable, '-c', child], capture_output=True, text=True, timeout=100)
    assert p.returncode == 0 and p.stdout.split() == ['4'] * 75, p.stderr


@pytest.mark.parametrize('number', [errno.EROFS, errno.EACCES])
def test_a_dataset_that_is_read_only(tmp_path, monkeypatch, number):
    """What to do is said; another --cache-dir works."""
    root, mkdir = dataset(tmp_path), Path.mkdir

    def refuse(self, *args, **settings):
        if root in self.parents:
            raise OSError(number, 'Read-only file system', str(self))
        mkdir(self, *args, **settings)
    monkeypatch.setattr(Path, 'mkdir', refuse)
    with pytest.raises(OSError, match='set/cache/train-full cannot be written .*--cache-dir'):
        open_split(root)
    assert len(open_split(root, cache_dir=tmp_path / 'elsewhere').windows) == 4


@contextlib.contextmanager
def largest_file(size):
    """As if the disk were full: longer files cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_no_half_of_a_cache(tmp_path):
    root = dataset(tmp_path, {}, {})
    with largest_file(50_000), pytest.raises(OSError, match='File too large.*--cache-dir'):
        open_split(root)
    assert not list((root / 'cache/train-full').iterdir()) and len(open_split(root).windows) == 8


@pytest.mark.parametrize('what', ['text', 'tensors', 'tensors, late'])
def test_a_full_disk_leaves_what_was_there(tmp_path, what):
    """A failed save is an OSError that names the file, though torch raises a RuntimeError; its part is gone."""
    path, late = tmp_path / 'ckpt.pt', torch.zeros(30_000)
    path.write_text('old')
    with largest_file(100_000), pytest.raises(OSError, match='ckpt.pt cannot be written: File too large'):
        if what == 'text':
            common.write_text(path, 'x' * 200_000)
        else:
            common.write_tensors(path, {'a': late[:24_900].clone() if 'late' in what else late})
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_ends_training_in_one_line(tmp_path, monkeypatch, capsys):
    """And the run goes on where it was, once there is room."""
    monkeypatch.chdir(tmp_path)
    make_well(tmp_path / 'data/gray_scott', **THE_WELL['gray_scott_reaction_diffusion'])
    flags = ['--data', 'gray_scott', '--resolution', 0, '--batch', 4, '--micro-batch', 4, '--out', 'out', '--steps']
    train.main([str(v) for v in (*TINY, *flags, 1)])
    old = Path('out/ckpt.pt').read_bytes()
    with largest_file(len(old) // 2):
        assert 'ckpt.pt cannot be written: File too large' in say(capsys, train.main, *TINY, *flags, 2)
    assert Path('out/ckpt.pt').read_bytes() == old and sorted(p.name for p in Path('out').iterdir()) == ['ckpt.pt', 'log.jsonl']
    train.main([str(v) for v in (*TINY, *flags, 2)])
    assert load_checkpoint('out/ckpt.pt')['step'] == 2


def test_other_errors_of_torch_stay_what_they_are(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError('CUDA error')
    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(RuntimeError, match='CUDA error'):
        common.write_tensors(tmp_path / 'ckpt.pt', {})
    assert not list(tmp_path.iterdir())


def test_peak_memory_without_the_resource_module(monkeypatch):
    """Windows has none."""
    assert common.peak_memory() > 0.01
    monkeypatch.setitem(sys.modules, 'resource', None)
    assert common.peak_memory() == 0.0


def test_the_required_torch_has_what_is_used():
    """torch.serialization.safe_globals came with 2.5."""
    lowest = re.search(r'^torch>=(\d+)\.(\d+)', (HERE / 'requirements.txt').read_text(), re.MULTILINE)
    used = 'safe_globals' in (HERE / 'common.py').read_text()
    assert tuple(map(int, lowest.groups())) >= ((2, 5) if used else (2, 4))


# ---------------------------------------------------------------------------------------------
# The Well's fourteen two-dimensional datasets, in miniature: axes, fields and scalars as published

EULER = dict(t0='density energy pressure', t1='momentum', gamma=(1.13, 1.76))
CONVECTION = dict(t0='buoyancy pressure', t1='velocity', Prandtl=(0.1, 1.0), Rayleigh=(1e6, 1e8), periodic='x', grid=(64, 32))
ACOUSTIC = dict(t0='pressure', steady='density speed_of_sound', t1='velocity')
THE_WELL = {
    'acoustic_scattering_discontinuous': ACOUSTIC,
    'acoustic_scattering_inclusions': ACOUSTIC,
    'acoustic_scattering_maze': ACOUSTIC,
    'active_matter': dict(t0='concentration', t1='velocity', t2='D E', L=(10.0, 10.0), zeta=(1.0, 9.0), alpha=(-1.0, -5.0),
                          periodic='xy'),
    'euler_multi_quadrants_openBC': EULER,
    'euler_multi_quadrants_periodicBC': EULER | dict(periodic='xy'),
    'gray_scott_reaction_diffusion': dict(t0='A B', F=(0.014, 0.098), k=(0.054, 0.057), periodic='xy'),
    'helmholtz_staircase': dict(t0='pressure_im pressure_re', mask='mask', omega=(0.06283032, 2.5110908), grid=(64, 32)),
    'planetswe': dict(t0='height', t1='velocity', axes=('theta', 'phi'), periodic=['phi'], grid=(32, 64), runs=1),
    'rayleigh_benard': CONVECTION,
    'rayleigh_benard_uniform': CONVECTION,
    'shear_flow': dict(t0='pressure tracer', t1='velocity', Rayleigh=(1e4, 5e5), Schmidt=(0.1, 10.0), periodic='xy', grid=(32, 64)),
    'turbulent_radiative_layer_2D': dict(t0='density pressure', t1='velocity', tcool=(0.03, 3.16), periodic='x', grid=(32, 96),
                                         runs=1),
    'viscoelastic_instability': dict(t0='c_zz pressure', t1='velocity', t2='C', Re=(1e3, 1e3), Wi=(50.0, 50.0),
                                     beta=(0.9, 0.9), epsilon=(2e-6, 2e-6), Lmax=(70.0, 70.0), periodic='x', frames=(20, 40)),
}


def make_well(root, t0, t1='', t2='', steady='', mask='', axes=('x', 'y'), periodic=(), grid=(32, 32), runs=2,
              frames=(34, 34), **scalars):
    """Two files a split. steady: scalar fields without time; mask: without time and runs."""
    for split, (number, T) in ((split, pair) for split in SPLITS for pair in enumerate(frames)):
        field = lambda *shape, **says: (noise(*shape), dict(
            dict(sample_varying=True, time_varying=True, dim_varying=[True, True]), **says))
        fields = {f't0_fields/{name}': field(runs, T, *grid) for name in t0.split()}
        fields |= {f't1_fields/{name}': field(runs, T, *grid, 2) for name in t1.split()}
        fields |= {f't2_fields/{name}': field(runs, T, *grid, 2, 2) for name in t2.split()}
        fields |= {f't0_fields/{name}': field(runs, *grid, time_varying=False) for name in steady.split()}
        fields |= {f't0_fields/{name}': field(*grid, time_varying=False, sample_varying=False) for name in mask.split()}
        time = np.arange(T) * (0.5 + number)
        dims = dict(zip(axes, map(np.arange, grid)), time=np.stack([time] * runs) if len(set(frames)) > 1 else time)
        dims = {name: (np.float32(x), dict(sample_varying=x.ndim == 2)) for name, x in dims.items()}
        constant = dict(sample_varying=False, time_varying=False)
        write(root / 'data' / split / f'{root.name}_{number}.hdf5', fields, axes=axes, dims=dims, periodic=periodic,
              scalars={name: (values[number], constant) for name, values in scalars.items()})


def test_there_are_fourteen():
    assert len(THE_WELL) == 14


@pytest.mark.parametrize('name', THE_WELL)
def test_the_wells_datasets_are_trained_on_evaluated_and_drawn(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    make_well(tmp_path / 'data' / name, **THE_WELL[name])
    flags = ['--data', name, '--resolution', 0, '--crop', 16, '--batch', 4, '--micro-batch', 4, '--steps', 2]
    train.main([str(v) for v in (*TINY, *flags)])
    out = tmp_path / f'out/{name}-jepa-nano-convnext-seed0'
    state, about = load_checkpoint(out / 'ckpt.pt'), THE_WELL[name]
    labels = [k for k, v in about.items() if isinstance(v, tuple) and isinstance(v[0], float) and v[0] != v[1]]
    assert sorted(state['labels']) == sorted(labels)
    assert len(state['inputs']['channels']) == sum(len(about.get(group, '').split()) * n for group, n in (
        ('t0', 1), ('steady', 1), ('mask', 1), ('t1', 2), ('t2', 4)))

    # without labels, an embedding is all there is
    if labels:
        evaluation.main(['--epochs', '1', '--stride', '99'])
        assert sorted(json.loads((out / 'eval.json').read_text())['labels']) == sorted(
            'Reynolds' if (name, k) == ('shear_flow', 'Rayleigh') else k for k in labels)
    else:
        assert (state['label_mean'], state['label_std']) == ([], [])
        assert 'no scalar varied' in say(capsys, evaluation.main) and not (out / 'eval.json').exists()
        assert '--supervised' in say(capsys, train.main, *TINY, *flags, '--supervised')
        channels = len(state['inputs']['channels'])
        assert load_run(out).embed(torch.zeros(1, channels, 16, 32, 32)).shape[2] == 8

    monkeypatch.setattr(plot, 'canvas', lambda width, height: plot.plt.figure(figsize=(width / 2, height / 2), dpi=30))
    plot.main([])
    assert len(list((tmp_path / 'figures').iterdir())) == (3 if labels else 2)


def test_square_crops_of_a_longer_field_are_turned(tmp_path, monkeypatch):
    """By all eight symmetries, though the field itself allows but four."""
    root = dataset(tmp_path, fields={'t0_fields/c': noise(1, 33, 16, 32)})
    split, seen, transform = open_split(root, System(periodic=(True, True), symmetries=tuple(range(8)))), set(), data.transform
    monkeypatch.setattr(data, 'transform', lambda cut, components, element, out: seen.add(element) or transform(cut, components, element, out))
    for seed in range(60):
        split.load([(0, 0)], frames=1, crop=16, augment=True, seeds=[seed])
    assert seen == set(range(1, 8))
    seen.clear()
    for seed in range(60):
        split.load([(0, 0)], frames=1, augment=True, seeds=[seed])
    assert seen == {1, 4, 5}                                             # no quarter turn
