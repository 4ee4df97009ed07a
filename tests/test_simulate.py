"""simulate.py: The Well's format, splits, resuming, and The Well's own reader."""
import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
import torch

import simulate
from helpers import (ALPHAS, CHANNELS, FLUIDS, GRID, NAME, RUNS, ZETAS, attributes, both_fluids, derivatives, files_of,
                     linked, make_miniature, make_published, read_bytes)
from systems import find_system, rayleigh_benard as convection
from systems.active_matter import active_matter_start
from systems.datasets import read_recipe
from systems.rayleigh_benard import rayleigh_benard_start
from systems.shear_flow import random_start


def test_simulated_files_have_the_wells_format(mini):
    """Every file's name, and every group, dataset, shape, type and attribute of one."""
    for split in RUNS:
        assert [p.name for p in files_of(mini, split)] == sorted(NAME.format(z, a) for a in ALPHAS for z in ZETAS)
    assert not list(mini.rglob('*.part'))
    T, N, n, constant = 81, GRID, RUNS['train'], {'sample_varying': False, 'time_varying': False}
    with h5py.File(mini / 'data' / 'train' / NAME.format(9.0, -5.0)) as f:
        assert set(f) == {'boundary_conditions', 'dimensions', 'scalars', 't0_fields', 't1_fields', 't2_fields'}
        scalars = {'L': 10.0, 'zeta': 9.0, 'alpha': -5.0}
        assert attributes(f) == {'dataset_name': 'active_matter', 'grid_type': 'cartesian', 'n_spatial_dims': 2,
                                 'n_trajectories': n, 'simulation_parameters': list(scalars), **scalars}
        dims, walls = f['dimensions'], f['boundary_conditions']
        assert set(dims) == {'time', 'x', 'y'} and attributes(dims) == {'spatial_dims': ['x', 'y']}
        assert attributes(dims['time']) == {'sample_varying': False}
        assert np.array_equal(dims['time'], np.arange(T) * 0.25) and set(walls) == {'x_periodic', 'y_periodic'}
        for axis in 'xy':
            assert attributes(dims[axis]) == constant and dims[axis].dtype == np.float32
            assert np.allclose(dims[axis], np.arange(N) * 10 / N)
            b = walls[axis + '_periodic']
            assert attributes(b) == {'bc_type': 'PERIODIC', 'associated_dims': [axis], 'associated_fields': [],
                                     **constant}
            assert b['mask'].dtype == bool and np.array_equal(b['mask'], [True] + [False] * (N - 2) + [True])
            assert b['values'].dtype == np.float32 and b['values'].shape == (2,)
        assert attributes(f['scalars']) == {'field_names': list(scalars)} and set(f['scalars']) == set(scalars)
        for name, value in scalars.items():
            assert f['scalars'][name][()] == value and attributes(f['scalars'][name]) == constant
        for order, names in enumerate((['concentration'], ['velocity'], ['D', 'E'])):
            group, tensor = f[f't{order}_fields'], {'symmetric': True, 'antisymmetric': False} if order == 2 else {}
            assert attributes(group) == {'field_names': names} and set(group) == set(names)
            for name in names:
                assert attributes(group[name]) == {'dim_varying': [True, True], 'sample_varying': True,
                                                   'time_varying': True, **tensor}
                assert group[name].shape == (n, T, N, N) + (2,) * order and group[name].dtype == np.float32


def test_simulated_tensors_are_consistent(mini):
    """trace D = c; D and E symmetric; E traceless and the symmetric gradient of velocity; no two runs share a start."""
    starts = set()
    for file in (file for split in RUNS for file in files_of(mini, split)):
        with h5py.File(file) as f:
            c, u = f['t0_fields/concentration'][:], f['t1_fields/velocity'][:]
            D, E = f['t2_fields/D'][:], f['t2_fields/E'][:]
        assert np.allclose(D[..., 0, 0] + D[..., 1, 1], c, atol=1e-6) and np.abs(c - 1).max() < 1e-2
        assert np.array_equal(D[..., 0, 1], D[..., 1, 0]) and np.array_equal(E[..., 0, 1], E[..., 1, 0])
        assert np.array_equal(E[..., 0, 0], -E[..., 1, 1])
        (u_x, u_y), (v_x, _) = derivatives(u[..., 0]), derivatives(u[..., 1])
        assert np.allclose(E[..., 0, 0], u_x, atol=1e-4) and np.allclose(E[..., 0, 1], (u_y + v_x) / 2, atol=1e-4)
        assert np.abs(E[:, 40:]).max() > 1e-3
        starts |= {start.tobytes() for start in D[:, 0]}
    assert len(starts) == 4 * sum(RUNS.values())                         # nor do two splits


def test_stats_yaml(mini):
    """stats.yaml holds mean, std and rms of the training fields and of their changes between frames."""
    found, numbers = {}, None
    for line in (mini / 'stats.yaml').read_text().splitlines():          # '- - 1.0' is one number of a nested list
        key, colon, value = line.strip().partition(':')
        if colon and line[0] != ' ':
            statistic = key
        elif colon:
            numbers = found[statistic, key] = [float(value)] if value else []
        else:
            numbers += [float(line.split()[-1])] if line.split()[-1] != '-' else []
    for name, path in {'concentration': 't0_fields/concentration', 'velocity': 't1_fields/velocity',
                       'D': 't2_fields/D', 'E': 't2_fields/E'}.items():
        runs = []
        for file in files_of(mini):
            with h5py.File(file) as f:
                runs.append(f[path][:].astype(np.float64))
        x = np.concatenate(runs)
        for suffix, values in ('', x), ('_delta', np.diff(x, axis=1)):
            rows = values.reshape(-1, *x.shape[4:])
            for statistic, expected in {'mean': rows.mean(0), 'std': rows.std(0),
                                        'rms': np.sqrt((rows**2).mean(0))}.items():
                assert np.allclose(found[statistic + suffix, name], expected.ravel(), rtol=2e-4, atol=1e-7), statistic
    assert len(found) == 6 * 4


def test_interrupted_simulation_resumes(mini, tmp_path):
    """A lost file comes back byte for byte, over the debris of its first attempt, and no other is touched."""
    root = linked(mini, tmp_path / 'active_matter')
    before, times = read_bytes(root), {p: p.stat().st_mtime_ns for p in files_of(root) + files_of(root, 'valid')}
    lost = files_of(root, 'valid')[1]
    lost.unlink()
    lost.with_name(lost.name + '.part').write_bytes(b'half a file')
    assert make_miniature(tmp_path) == root
    assert read_bytes(root) == before
    assert [p for p in times if p.stat().st_mtime_ns != times[p]] == [lost]


def test_simulation_does_not_touch_other_peoples_data(mini, tmp_path):
    """Neither published files nor those of another recipe are mixed with new ones."""
    others = make_published(tmp_path / 'published', frames=2), linked(mini, tmp_path / 'simulated' / 'active_matter')
    for root, seed in zip(others, (0, 1)):
        before = read_bytes(root)
        with pytest.raises(ValueError, match='choose another --data-dir'):
            make_miniature(root.parent, seed)
        assert read_bytes(root) == before


@both_fluids
def test_fluids_have_the_wells_format(fluids, name):
    """Scalars under The Well's names, grids, boundaries and fields."""
    nx, ny = FLUIDS[name]['grid']
    first, second = FLUIDS[name]['pairs'][1]
    scalars, file, scalar_fields = {
        'shear_flow': ({'Rayleigh': first, 'Schmidt': second}, 'shear_flow_Reynolds_50_Schmidt_2.hdf5',
                       ['pressure', 'tracer']),
        'rayleigh_benard': ({'Prandtl': second, 'Rayleigh': first}, 'rayleigh_benard_Rayleigh_2000_Prandtl_2.hdf5',
                            ['buoyancy', 'pressure'])}[name]
    for split, runs in RUNS.items():
        assert len(files_of(fluids / name, split)) == 4
        with h5py.File(fluids / name / 'data' / split / file) as f:
            assert attributes(f) == {'dataset_name': name, 'grid_type': 'cartesian', 'n_spatial_dims': 2,
                                     'n_trajectories': runs, 'simulation_parameters': list(scalars), **scalars}
            assert {k: v[()] for k, v in f['scalars'].items()} == pytest.approx(scalars)
            assert attributes(f['t0_fields']) == {'field_names': scalar_fields}
            assert attributes(f['t1_fields']) == {'field_names': ['velocity']}
            assert attributes(f['t2_fields']) == {'field_names': []}
            for field in scalar_fields:
                assert f['t0_fields'][field].shape == (runs, 36, nx, ny)
            assert f['t1_fields/velocity'].shape == (runs, 36, nx, ny, 2)
            assert np.isfinite(f['t1_fields/velocity'][:]).all() and f['t1_fields/velocity'][:].std() > 1e-4
            x, y, walls = f['dimensions/x'][:], f['dimensions/y'][:], f['boundary_conditions']
            if name == 'shear_flow':
                assert np.allclose(x, np.arange(nx) / nx) and np.allclose(y, 2 * np.arange(ny) / ny - 1)
                assert np.allclose(f['dimensions/time'], 0.1 * np.arange(36))
                assert {k: v.attrs['bc_type'] for k, v in walls.items()} == dict.fromkeys(
                    ('x_periodic', 'y_periodic'), 'PERIODIC')
            else:
                assert np.allclose(x, 4 * np.arange(nx) / nx)
                assert np.allclose(y, (1 - np.cos(np.pi * (np.arange(ny) + 0.5) / ny)) / 2)
                assert np.allclose(f['dimensions/time'], 0.25 * np.arange(36))
                assert {k: v.attrs['bc_type'] for k, v in walls.items()} == {'x_periodic': 'PERIODIC', 'y_wall': 'WALL'}


@both_fluids
def test_no_initial_condition_is_in_two_splits(fluids, name):
    starts = {}
    for split in RUNS:
        field = 't1_fields/velocity' if name == 'shear_flow' else 't0_fields/buoyancy'
        starts[split] = set()
        for file in files_of(fluids / name, split):
            with h5py.File(file) as f:
                starts[split] |= {x[0].tobytes() for x in f[field]}
                assert len({x[0].tobytes() for x in f[field]}) == len(f[field])
    assert not starts['train'] & starts['test'] and not (starts['train'] | starts['test']) & starts['valid']


@pytest.mark.parametrize('name', ['active_matter', 'shear_flow', 'rayleigh_benard'])
def test_no_two_splits_begin_nearly_alike(name):
    """All starts of nano: a run of valid or test is at least a fifth, in relative L2, from every run of train."""
    system, p = find_system(name), find_system(name).presets['nano']
    grid = [n // 2 for n in p.grid]
    starts = {}
    for s, (split, runs) in enumerate(p.runs.items()):
        keys = [[0, s, pair, run] for pair in range(len(p.pairs)) for run in range(runs)]
        if name == 'shear_flow':
            draw = {name: value for name, value in p.settings.items() if name != 'refine'}
            fields = [random_start(*grid, key, **draw)[0] for key in keys]
        elif name == 'active_matter':
            fields = [torch.view_as_real(active_matter_start(grid[0], key)[1]) for key in keys]
        else:                                                            # what breaks the symmetry; its db: below
            fields = [rayleigh_benard_start(*grid, 1.0, key, p.settings['noise']) for key in keys]
            fields = [b - b.mean(0) for b in fields]
        starts[split] = torch.stack([f.flatten() for f in fields])
    for split in 'valid', 'test':
        distance = torch.cdist(starts[split], starts['train']) / starts[split].norm(dim=1, keepdim=True)
        assert distance.min() > 0.2, split


def test_no_two_runs_of_convection_have_one_db(monkeypatch):
    """A start's db is its own, from 0.2 to 1, and tells nothing of its parameters: of all runs of nano, as solved."""
    p, starts = find_system('rayleigh_benard').presets['nano'], []
    monkeypatch.setattr(convection, 'RayleighBenard', lambda rayleigh, prandtl, b: starts.extend(zip(rayleigh, prandtl, b)))
    keys = [[s, split, pair, run] for s in (0, 1) for split, runs in enumerate(p.runs.values())
            for pair in range(len(p.pairs)) for run in range(runs)]
    find_system('rayleigh_benard').solver([p.pairs[pair] for _, _, pair, _ in keys], keys, p, 'cpu')

    # b = (1 - y) db + y (1 - y) times noise that has no mean along x
    y = torch.tensor(convection.chebyshev_nodes(p.grid[1]))
    db = torch.stack([(b.mean(0) / (1 - y)).mean() for *_, b in starts])
    assert len((1e6 * db).round().unique()) == len(keys) and 0.2 <= db.min() < 0.22 and 0.98 < db.max() <= 1
    assert abs(db.mean() - 0.6) < 0.03
    of_train = torch.tensor([split == 0 for _, split, *_ in keys])
    labels = torch.tensor([[np.log(ra), pr] for ra, pr, _ in starts])
    for chosen in of_train, ~of_train:
        with_labels = torch.corrcoef(torch.cat([db[chosen, None], labels[chosen]], 1).T)[0, 1:]
        assert with_labels.abs().max() < 0.25
    # nor does a run of test begin nearly as one of train at its parameters, db in
    shape = {split: torch.stack([b.flatten() for (*_, b), key in zip(starts, keys) if key[:2] == [0, split]]) for split in (0, 2)}
    apart = torch.cdist(shape[2].view(28, 5, -1), shape[0].view(28, 3, -1))
    assert (apart / shape[2].view(28, 5, -1).norm(dim=2, keepdim=True)).min() > 0.02


def test_the_seed_reaches_the_data(tmp_path):
    """Another seed, other fields; the same seed, the same bytes."""
    def first_file(folder, seed):
        with pytest.MonkeyPatch.context() as patch:
            presets = find_system('shear_flow').presets
            patch.setitem(presets, 'nano', dataclasses.replace(presets['nano'], runs=RUNS, **{
                **FLUIDS['shear_flow'], 'frames': 2, 'pairs': [(50.0, 1.0)]}))
            return files_of(simulate.make_dataset('shear_flow', tmp_path / folder, seed=seed))[0].read_bytes()
    assert first_file('a', 0) == first_file('b', 0) != first_file('c', 1)


@pytest.fixture
def cores():
    """A function that sets how many threads torch has, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize('name', ['active_matter', *FLUIDS])
def test_data_do_not_depend_on_the_number_of_cores(tmp_path, cores, name):
    """One core or three, batches one after the other or side by side: the same bytes, and as many threads as before."""
    size = FLUIDS.get(name, dict(grid=(64, 64), pairs=[(-1.0, 1.0), (-5.0, 9.0)]))
    made = []
    for number in 1, 3:
        cores(number)
        with pytest.MonkeyPatch.context() as patch:
            presets = find_system(name).presets
            patch.setitem(presets, 'nano', dataclasses.replace(presets['nano'], runs=RUNS, files_at_once=1, **{
                **size, 'frames': 8}))
            root = simulate.make_dataset(name, tmp_path / str(number), unresolved=True)
        made.append({path.relative_to(root): content for path, content in read_bytes(root).items()})
        with ThreadPoolExecutor(1) as pool:                              # nor do threads that are started later
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == number
    assert made[0] == made[1] and len(made[0]) > 6


def test_layers_of_shear_flow_lie_anywhere():
    """Not four at the quarters of the box, whatever the seed."""
    p, y, places = find_system('shear_flow').presets['nano'], -1 + 2 * np.arange(256) / 256, []
    draw = {name: value for name, value in p.settings.items() if name != 'refine'}
    for seed in range(64):
        profile = random_start(4, 256, seed, **{**draw, 'waves': 0.0})[0][0, 0]
        places.append(y[profile.diff().abs().argmax()] % 0.5)            # a quarter of the box
    assert np.histogram(places, 5, (0, 0.5))[0].min() > 4


@pytest.mark.parametrize('number', [1, 2])
def test_unresolved_runs_are_refused(tmp_path, capsys, cores, number):
    """A thin shear on a coarse grid: one line that names the file, which is not written; with the flag it is.

    A resolved run beside it is finished before, or, on another core, stopped.
    """
    cores(number)
    with pytest.MonkeyPatch.context() as patch:
        presets = find_system('shear_flow').presets
        patch.setitem(presets, 'nano', dataclasses.replace(presets['nano'], runs=RUNS, **{
            **FLUIDS['shear_flow'], 'frames': 40, 'pairs': [(50.0, 1.0), (1e5, 1.0)], 'files_at_once': 1}))
        command = ['shear_flow', '--data-dir', str(tmp_path), '--device', 'cpu']
        with pytest.raises(SystemExit) as stopped:
            simulate.main(command)
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and 'Reynolds_100000_Schmidt_1.hdf5' in line and '--unresolved' in line
        there = [p.name for p in files_of(tmp_path / 'shear_flow')]
        assert there == ['shear_flow_Reynolds_50_Schmidt_1.hdf5'] * (number == 1)
        assert not list(tmp_path.rglob('*.part'))
        simulate.main([*command, '--unresolved'])
        finished = capsys.readouterr().out
        simulate.main(command)                                           # nothing is missing
    assert len(files_of(tmp_path / 'shear_flow')) == 2
    line = next(line for line in finished.splitlines() if 'last third' in line)
    share = float(re.search(r'At most (\S+) of the energy', line)[1])
    assert share > simulate.RESOLVED == 2e-3 and 'Reynolds_100000' in line and 'not resolved' in line


def test_large_batches_are_simulated_one_by_one(tmp_path, monkeypatch, cores):
    """As many side by side as memory and cores allow; a single one gets all cores."""
    cores(3)
    seen = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers, prefix, initializer, arguments):
            seen.append((workers, arguments[0]))
            super().__init__(1)
    monkeypatch.setattr(simulate, 'ThreadPoolExecutor', Pool)
    monkeypatch.setattr(simulate, 'record', lambda *args: ({}, np.zeros(99)))
    monkeypatch.setattr(simulate, 'write_well_file', lambda path, *args: path.touch())
    monkeypatch.setattr(simulate, 'write_stats', lambda *args: None)
    for name, preset in ('active_matter', 'nano'), ('active_matter', 'well'):
        system = find_system(name)
        monkeypatch.setattr(system, 'solver', lambda *args: None)
        simulate.make_dataset(name, tmp_path / preset, preset)
    assert seen == [(3, 1), (1, 3)]
    assert find_system('active_matter').presets['nano'].files_at_once == 9             # 27 runs: 0.43 GB


@both_fluids
def test_the_wells_own_reader_opens_fluids(fluids, name):
    the_well = pytest.importorskip('the_well.data')
    nx, ny = FLUIDS[name]['grid']
    dataset = the_well.WellDataset(path=str(fluids / name), well_split_name='train', n_steps_input=4, n_steps_output=4,
                                   use_normalization=False)
    assert dataset.metadata.spatial_resolution == (nx, ny) and len(dataset) == 8 * (36 - 8 + 1)
    first = 'tracer' if name == 'shear_flow' else 'buoyancy'
    assert sorted(dataset.metadata.field_names[0]) == sorted([first, 'pressure'])
    x = dataset[len(dataset) - 1]
    assert x['input_fields'].shape == (4, nx, ny, 4) and torch.isfinite(x['input_fields']).all()
    other, found = 'Schmidt' if name == 'shear_flow' else 'Prandtl', set()
    for i in range(0, len(dataset), 36 - 8 + 1):
        scalars = dict(zip(dataset.metadata.constant_scalar_names, dataset[i]['constant_scalars'].tolist()))
        found.add((scalars['Rayleigh'], scalars[other]))
    assert found == set(FLUIDS[name]['pairs'])
    walls = [2, 2] if name == 'shear_flow' else [0, 0]                   # periodic or wall
    assert x['boundary_conditions'].tolist() == [[2, 2], walls]


@pytest.mark.parametrize('normalize', [False, True])
def test_the_wells_own_reader_opens_it(mini, normalize):
    the_well = pytest.importorskip('the_well.data')
    from the_well.data.normalization import ZScoreNormalization
    for split, runs in RUNS.items():
        dataset = the_well.WellDataset(path=str(mini), well_split_name=split, n_steps_input=4, n_steps_output=4,
                                       use_normalization=normalize, normalization_type=ZScoreNormalization)
        assert dataset.metadata.field_names == {0: ['concentration'], 1: ['velocity_x', 'velocity_y'], 2: CHANNELS[3:]}
        assert dataset.metadata.spatial_resolution == (GRID, GRID)
        assert len(dataset) == runs * 4 * (81 - 8 + 1)
        names, pairs = dataset.metadata.constant_scalar_names, set()
        assert set(names) == {'L', 'zeta', 'alpha'}
        for i in range(0, len(dataset), 1 if split == 'valid' else 37):
            x = dataset[i]
            scalars = dict(zip(names, x['constant_scalars'].tolist()))
            assert scalars['L'] == 10 and x['input_fields'].shape == (4, GRID, GRID, 11)
            assert torch.isfinite(x['input_fields']).all() and torch.isfinite(x['output_fields']).all()
            pairs.add((scalars['alpha'], scalars['zeta']))
        assert pairs == {(a, z) for a in ALPHAS for z in ZETAS}
        assert (x['boundary_conditions'] == 2).all()                     # periodic
        axis = torch.arange(GRID) * 10 / GRID
        assert torch.allclose(x['space_grid'], torch.stack(torch.meshgrid(axis, axis, indexing='ij'), -1))
        with h5py.File(mini / 'data' / split / dataset.files_paths[-1].split('/')[-1]) as f:
            last = f['t2_fields/D'][-1, 73:77, :, :, 0, 0]
        d_xx = dataset[len(dataset) - 1]['input_fields'][..., 3]
        assert np.allclose(np.corrcoef(d_xx.flatten(), last.ravel())[0, 1], 1, atol=1e-5)
        assert np.allclose(d_xx, last) != normalize


@pytest.mark.parametrize('note', ['{"preset": ', '[1]', '{"preset": "nano"}', '"nano"'])
def test_a_damaged_note_of_a_simulation_is_refused(tmp_path, note):
    (tmp_path / 'simulated.json').write_text(note)
    with pytest.raises(ValueError, match='simulated.json is damaged: delete'):
        read_recipe(tmp_path)
    (tmp_path / 'simulated.json').write_text('{}')
    assert read_recipe(tmp_path) == read_recipe(tmp_path / 'nowhere') == {}
