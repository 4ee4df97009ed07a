"""data.py: windows, labels, crops, symmetries, the cache."""
import dataclasses

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from helpers import ACTIVE, CHANNELS, COMPONENTS, derivatives, files_of
from systems import find_system


def open_split(root, split='train', resolution=0, **settings):
    return data.Split(root, ACTIVE, split, resolution, progress=False, **settings)


def every_field(split):
    """(runs, C, T, H, W), in memory."""
    return np.stack([split.fields[run] for run in range(len(split.runs))])


def from_file(file, trajectory, frames):
    """The eleven channels of some frames of one trajectory, (C, T, N, N), read straight from HDF5."""
    with h5py.File(file) as f:
        get = lambda name: f[name][trajectory, frames]
        u, D, E = get('t1_fields/velocity'), get('t2_fields/D'), get('t2_fields/E')
        return np.stack([get('t0_fields/concentration'), u[..., 0], u[..., 1],
                         *(t[..., i, j] for t in (D, E) for i in (0, 1) for j in (0, 1))])


def test_windows_are_the_files_values(published):
    """Channel names and order, time order, tensor components, runs: a swap anywhere would show (it is noise)."""
    split = open_split(published, stride=4)
    assert split.channels == CHANNELS
    assert split.components == COMPONENTS and split.frames.tolist() == [40] * 4
    assert split.fields[0].shape == (11, 40, 16, 16) and split.fields[0].dtype == np.float32
    assert split.windows.tolist() == [[run, t] for run in range(4) for t in (0, 4, 8)]
    x = split.load(split.windows)
    assert x.shape == (12, 11, 32, 16, 16) and x.dtype == torch.float32
    for window, (run, t) in zip(x.numpy(), split.windows):
        assert np.array_equal(window, from_file(files_of(published)[run // 2], run % 2, slice(t, t + 32)))
    assert torch.equal(split.load(split.windows[:3], frames=16), x[:3, :, :16])
    every = every_field(split).astype(np.float64).transpose(1, 0, 2, 3, 4).reshape(11, -1)
    assert np.allclose(split.mean, every.mean(1), atol=1e-6) and np.allclose(split.std, every.std(1), rtol=1e-5)


def test_labels_and_normalization(published):
    """Labels: the scalars that vary, log10 where the system says so. A channel of rounding errors is not blown up."""
    split = open_split(published)
    split.system = dataclasses.replace(ACTIVE, log_labels=('L',))
    assert split.varying() == ['alpha']                                  # L and zeta are constant here
    assert split.labels(['L', 'alpha']).tolist() == [[1, -1], [1, -1], [1, -5], [1, -5]]
    split.std[0], split.mean[0] = 1e-9, 1
    mean, std = split.normalization(True)
    assert np.array_equal(mean, split.mean) and std[0] == np.float32(1e-3)
    for field in slice(1, 3), slice(3, 7), slice(7, 11):                 # velocity, D, E: one std for all components
        assert np.allclose(std[field], np.sqrt(np.mean(split.std[field]**2)), rtol=1e-6)
    assert len(set(std.tolist())) == 4
    mean, std = split.normalization(False)
    assert not mean.any() and (std == 1).all()


def test_labels_are_z_scored_over_the_runs(mini):
    """By the mean and the standard deviation of all of them, as guessing the mean must score 1."""
    labels = data.Split(mini, ACTIVE, 'train').standard_labels                # (runs, L)
    assert labels.shape == (8, 2) and np.allclose(labels.mean(0), 0, atol=1e-12)
    assert np.allclose((labels**2).mean(0), 1, atol=1e-12)


def test_scalars_may_differ_between_the_runs_of_a_file(published):
    with h5py.File(files_of(published)[0], 'r+') as f:
        del f['scalars/alpha']
        f['scalars/alpha'] = [3.0, 7.0]
        f['scalars/alpha'].attrs['sample_varying'] = True
    assert open_split(published).labels(['alpha'])[:, 0].tolist() == [3, 7, -5, -5]


def test_datasets_are_found_where_they_were_downloaded(published, tmp_path):
    """the-well-download --base-path B puts them into B/datasets."""
    published.parent.rename(tmp_path / 'datasets')
    root, system, simulated = data.find_dataset('active_matter', tmp_path)
    assert root == tmp_path / 'datasets' / 'active_matter' and simulated is None and system.lr == 1e-3
    assert data.find_dataset('active_matter', tmp_path / 'datasets')[0] == root


def test_fields_are_cropped_then_resized(published):
    """As the system says, and bilinearly."""
    system = dataclasses.replace(ACTIVE, crop=((1 / 8, 5 / 8), (0, 1)))
    split = data.Split(published, system, 'train', resolution=12, progress=False)
    x = torch.tensor(from_file(files_of(published)[1], 1, slice(None))[:, :, 2:10])
    assert torch.allclose(torch.tensor(split.fields[3]), F.interpolate(x, size=(12, 12), mode='bilinear'), atol=1e-6)


def test_fields_that_would_grow_are_kept_as_they_are(published):
    """And resized window by window; crops are cut from that."""
    x = torch.tensor(from_file(files_of(published)[1], 1, slice(3, 35)))
    expected = F.interpolate(x, size=(24, 24), mode='bilinear')
    for _ in range(2):                                                   # the second finds the cache
        split = open_split(published, resolution=24)
        assert split.fields[0].shape[-2:] == (16, 16) and split.size == (24, 24) and len(split.grid[0]) == 24
        assert torch.allclose(split.load([(3, 3)])[0], expected, atol=1e-6)
    part = split.load([(3, 3)], crop=20, seeds=[5])[0, 0, 0]
    assert min((expected[0, 0, i:i + 20, j:j + 20] - part).abs().max() for i in range(5) for j in range(5)) < 2e-4


@pytest.mark.parametrize('name, shape, cut', [
    ('shear_flow', (256, 512), (slice(None), slice(0, 256))),
    ('rayleigh_benard', (512, 128), (slice(192, 320), slice(None)))])
def test_the_papers_part_of_the_domain(tmp_path, name, shape, cut):
    """Of files of the published shape; labels in log10 under the files' names; `whole` keeps everything."""
    system, rng, root = find_system(name), np.random.default_rng(0), tmp_path / name
    scalar = 'tracer' if name == 'shear_flow' else 'buoyancy'
    other = 'Schmidt' if name == 'shear_flow' else 'Prandtl'
    (root / 'data' / 'train').mkdir(parents=True)
    fields = {}
    for number, value in enumerate((1e4, 1e6)):
        fields[number] = rng.normal(size=(1, 33, *shape)).astype(np.float32)
        with h5py.File(root / 'data' / 'train' / f'{number}.hdf5', 'w') as f:
            f.create_group('dimensions').attrs['spatial_dims'] = ['x', 'y']
            f['scalars/Rayleigh'], f['scalars/' + other] = value, 0.5
            f['t0_fields/' + scalar], f['t0_fields/pressure'] = fields[number], fields[number]
            f['t1_fields/velocity'] = np.stack([fields[number], fields[number]], -1)
            f.create_group('t2_fields')
    split = data.Split(root, system, 'train', 0, system.stride, progress=False)
    assert split.channels == sorted([scalar, 'pressure']) + ['velocity_x', 'velocity_y']
    assert np.array_equal(split.fields[1, 0], fields[1][0][(slice(None), *cut)])
    assert split.varying() == ['Rayleigh'] and split.labels(['Rayleigh']).tolist() == [[4], [6]]
    assert split.periodic == ((True, False) if name == 'shear_flow' else (False, False))
    small = data.Split(root, system, 'train', 32, progress=False)
    expected = F.interpolate(torch.tensor(fields[0][0][(slice(None), *cut)])[None], (32, 32), mode='bilinear')
    assert torch.allclose(torch.tensor(small.fields[0, 0]), expected[0], atol=1e-6)
    everything = data.Split(root, system, 'train', 0, progress=False, whole=True)
    assert everything.fields[0].shape[-2:] == shape and everything.periodic == (True, name == 'shear_flow')
    assert len(list((root / 'cache').glob('*/*'))) == 3 * 4              # none replaced another


def test_gravity_leaves_one_mirror_symmetry(fluids):
    """Crops of convection keep up and down, and wrap around in x alone."""
    split = data.Split(fluids / 'rayleigh_benard', find_system('rayleigh_benard'), 'train', whole=True, progress=False)
    seen = set()
    for seed in range(40):
        out = split.load([(7, 20)], frames=1, crop=16, augment=True, seeds=[seed])[0].numpy()
        for element in (0, 1):
            image = data.transform(split.fields[7, :, 20:21], split.components, element)
            for shift in range(32):
                if np.array_equal(np.roll(image, -shift, -2)[:, :, :16], out):
                    seen.add((element, shift))
    assert len(seen) > 15 and {element for element, _ in seen} == {0, 1}


def test_random_crops_stay_inside(published):
    """Without augmentation a crop is a slice of the field, at many places over the seeds; one seed, one crop."""
    split = open_split(published)
    load = lambda seed: split.load([(1, 3)], frames=2, crop=12, seeds=[seed])[0].numpy()
    field, places = split.fields[1, :, 3:5], set()
    for seed in range(60):
        crop = load(seed)
        match = [(i, j) for i in range(5) for j in range(5) if np.array_equal(crop, field[..., i:i + 12, j:j + 12])]
        assert len(match) == 1
        places.add(match[0])
    assert len(places) > 15 and {i for i, _ in places} == set(range(5)) == {j for _, j in places}
    assert np.array_equal(load(7), load(7))


@pytest.mark.parametrize('corner', [(0, 0), (3, 9), (15, 15), (10, 0)])
def test_wrapped_crop_is_a_roll(corner):
    field = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    for h, w in (16, 16), (7, 7), (8, 12):
        out = np.empty((2, 3, h, w), np.float32)
        data.wrapped_copy(field, *corner, out)
        assert np.array_equal(out, np.roll(field, (-corner[0], -corner[1]), axis=(-2, -1))[..., :h, :w])


def test_augmentation_is_a_shift_and_a_symmetry(published):
    """All eight symmetries occur, with shifts across the edge, and nothing else happens to the field."""
    split, found = open_split(published), []
    for seed in range(60):
        out = split.load([(0, 0)], frames=1, augment=True, seeds=[seed])[0].numpy()
        for element in range(8):
            image = data.transform(split.fields[0, :, :1], COMPONENTS, element)
            for x, y in np.argwhere(image[0, 0] == out[0, 0, 0, 0]):     # noise: at most one place
                if np.array_equal(out, np.roll(image, (-x, -y), (-2, -1))):
                    found.append((element, x, y))
    assert len(found) == 60 and len(set(found)) > 55 and {element for element, _, _ in found} == set(range(8))


def test_transform_is_the_symmetry_group_of_the_square():
    x = np.random.default_rng(0).normal(size=(11, 2, 8, 8)).astype(np.float32)
    images = [data.transform(x, COMPONENTS, element) for element in range(8)]
    assert np.array_equal(images[0], x) and len({image.tobytes() for image in images}) == 8
    turned = flipped = x
    for _ in range(4):
        turned = data.transform(turned, COMPONENTS, 2)
    for _ in range(2):
        flipped = data.transform(flipped, COMPONENTS, 1)
    assert np.array_equal(turned, x) and np.array_equal(flipped, x)


@pytest.mark.parametrize('element', range(8))
def test_transform_moves_components_with_positions(element):
    """A transformed gradient is the gradient of the transformed field, and strain the strain of the flow."""
    x = np.arange(16) * 2 * np.pi / 16
    c = np.sin(x)[:, None] + np.cos(2 * x[:, None] + x) + 0.3 * np.sin(x + 1)         # no symmetry of its own
    u, v = np.cos(x[:, None] - 2 * x) + np.sin(2 * x)[:, None], np.sin(x[:, None] + x) + np.cos(3 * x)

    def strain(u, v):
        (u_x, u_y), (v_x, v_y) = derivatives(u), derivatives(v)
        return [u_x, (u_y + v_x) / 2, (u_y + v_x) / 2, v_y]

    gradient = lambda c: strain(*derivatives(c))                         # of a gradient: the Hessian
    flow = data.transform(np.stack([c, u, v, *gradient(c), *strain(u, v)])[:, None], COMPONENTS, element)[:, 0]
    assert np.allclose(flow[7:], strain(flow[1], flow[2]), atol=1e-12)
    assert np.allclose(flow[3:7], gradient(flow[0]), atol=1e-12)
    potential = data.transform(np.stack([c, *derivatives(c), *[c] * 8])[:, None], COMPONENTS, element)[:, 0]
    assert np.allclose(potential[1:3], derivatives(potential[0]), atol=1e-12)
