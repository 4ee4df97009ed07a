"""The datasets and the run that the tests share, each made once. Read only."""
import dataclasses
import os

import pytest
import torch

import simulate
from helpers import FLUIDS, NAME, RUNS, TINY, linked, make_miniature, make_published, run
from systems import find_system

if 'PYTEST_XDIST_WORKER' in os.environ:                                  # one of several processes
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def mini(tmp_path_factory):
    """<data dir>/active_matter as simulate.py writes it: 2 alphas x 2 zetas, 32 x 32, 81 frames. Read only."""
    return make_miniature(tmp_path_factory.mktemp('simulated'))


@pytest.fixture(scope='session')
def fluids(tmp_path_factory):
    """A data dir with miniatures of shear flow and convection as simulate.py writes them. Read only."""
    folder = tmp_path_factory.mktemp('fluids')
    for name, size in FLUIDS.items():
        with pytest.MonkeyPatch.context() as patch:
            presets = find_system(name).presets
            patch.setitem(presets, 'nano', dataclasses.replace(presets['nano'], runs=RUNS, **size))
            simulate.make_dataset(name, folder, unresolved=True)         # they are small
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, and no data folder of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('THE_WELL_DATA_DIR', raising=False)
    return tmp_path


@pytest.fixture
def published(tmp_path):
    return make_published(tmp_path / 'well')


@pytest.fixture(scope='session')
def well(mini, tmp_path_factory):
    """A data dir with the miniature as if downloaded; one training file is missing, so that labels are unbalanced."""
    root = linked(mini, tmp_path_factory.mktemp('well') / 'active_matter')
    (root / 'simulated.json').unlink()
    (root / 'data' / 'train' / NAME.format(9.0, -5.0)).unlink()
    return root.parent


@pytest.fixture(scope='session')
def trained(well, tmp_path_factory):
    """The out folder of a finished run."""
    out = tmp_path_factory.mktemp('trained')
    run('train.py', *TINY, '--data-dir', well, '--out', out, cwd=out)
    return out
