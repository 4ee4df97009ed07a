"""
What the tests share: the official codes' outputs, small datasets, and scripts run as commands.

tests/data/parity_*.npz hold outputs of the paper's official code, its weights and inputs filled by the
formula in `filled` below. Per case and output: <case>/<output>/float32 and .../float64, flattened, and
.../check = [largest allowed absolute error in float32, in float64, stride of the stored elements].
"""
import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

import simulate
from run_script import run_script
from systems import find_system
from systems.active_matter import BOX

HERE = Path(__file__).resolve().parent.parent


PARITY = {k: v for file in (HERE / 'tests/data').glob('parity_*.npz') for k, v in np.load(file).items()}
both_dtypes = pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])


def filled(key, shape, is_input=False):
    """The tensor called `key` in the reference run: a pseudo-random cosine, float32."""
    n, c, prime = math.prod(shape), zlib.crc32(key.encode()), 1000003
    v = np.cos(0.7 * ((np.arange(n) + c % prime)**2 % prime) + c / 2**32 * 6.283185307179586)
    if not is_input:
        if len(shape) >= 2:
            v = v / math.sqrt(n / shape[0])
        elif key.split('.')[-1] in ('gamma', 'gamma_att', 'gamma_mlp'):
            v = 0.5 + 0.1 * v
        else:
            v = 0.1 * v + (1 if key.endswith('weight') else 0)
    return torch.tensor(v.reshape(shape), dtype=torch.float32)


def fill(module, dtype, official_name=lambda key: key):
    """The module with the reference run's weights; `official_name` maps our parameter names to its."""
    module.load_state_dict({k: filled(official_name(k), v.shape) for k, v in module.state_dict().items()})
    return module.to(dtype)


def inputs(dtype, **shapes):
    return [filled(key, shape, is_input=True).to(dtype).requires_grad_() for key, shape in shapes.items()]


def check_parity(case, **outputs):
    """Every output is within the stored tolerance of the official one of its dtype."""
    for name, ours in outputs.items():
        ours = torch.as_tensor(ours).detach()
        dtype = str(ours.dtype).removeprefix('torch.')
        *atols, stride = PARITY[f'{case}/{name}/check']
        theirs, ours = PARITY[f'{case}/{name}/{dtype}'], ours.flatten()[::int(stride)].numpy()
        assert ours.shape == theirs.shape, name
        error = np.abs(ours - theirs).max()
        assert error <= atols[dtype == 'float64'], f'{case}, {name}, {dtype}: off by {error:.1e}'


def wavenumbers(N):
    k = 2 * np.pi / BOX * np.fft.fftfreq(N, 1 / N)
    return k[:, None], k[None, :]


def derivatives(f):
    """Spectral (d/dx, d/dy) of a real periodic (..., N, N) array on the simulation's box; x is the first axis."""
    kx, ky = wavenumbers(f.shape[-1])
    return [np.fft.ifft2(1j * k * np.fft.fft2(f)).real for k in (kx, ky)]


# ---------------------------------------------------------------------------------------------
# datasets: one that simulate.py makes, in miniature, and one written by hand as The Well publishes them

ALPHAS, ZETAS, GRID, RUNS = (-1.0, -5.0), (1.0, 9.0), 32, {'train': 2, 'valid': 1, 'test': 1}
CHANNELS = ['concentration', 'velocity_x', 'velocity_y', 'D_xx', 'D_xy', 'D_yx', 'D_yy', 'E_xx', 'E_xy', 'E_yx', 'E_yy']
COMPONENTS = [('concentration', ()), ('velocity', (0,)), ('velocity', (1,)),
              *((tensor, (i, j)) for tensor in 'DE' for i in (0, 1) for j in (0, 1))]
NAME = 'active_matter_L_10.0_zeta_{}_alpha_{}.hdf5'
ACTIVE = find_system('active_matter')


def make_miniature(folder, seed=0):
    with pytest.MonkeyPatch.context() as patch:
        presets = find_system('active_matter').presets
        patch.setitem(presets, 'nano', dataclasses.replace(
            presets['nano'], grid=(GRID, GRID), pairs=[(a, z) for a in ALPHAS for z in ZETAS], runs=RUNS,
            files_at_once=3, settings={'dt': 0.0625}, domain={}))
        return simulate.make_dataset('active_matter', folder, 'nano', seed, unresolved=True)           # it is small


FLUIDS = {                                                               # as the tests simulate them
    'shear_flow': dict(grid=(16, 32), frames=36, pairs=[(r, s) for r in (50.0, 200.0) for s in (0.5, 2.0)]),
    'rayleigh_benard': dict(grid=(32, 16), frames=36, pairs=[(r, p) for r in (2e3, 2e4) for p in (0.5, 2.0)]),
}
both_fluids = pytest.mark.parametrize('name', FLUIDS)


def linked(root, target):
    """A copy that shares the files' contents, but may lose and replace files."""
    return Path(shutil.copytree(root, target, copy_function=os.link))


def make_published(folder, frames=40, n=16):
    """A hand-written <folder>/active_matter: noise, two trajectories in each of two files a split."""
    rng = np.random.default_rng(0)
    root = Path(folder) / 'active_matter'
    for split in 'train', 'valid', 'test':
        (root / 'data' / split).mkdir(parents=True)
        for alpha in ALPHAS:
            with h5py.File(root / 'data' / split / NAME.format(1.0, alpha), 'w') as f:
                f.create_group('dimensions').attrs['spatial_dims'] = ['x', 'y']
                for name, value in {'L': 10.0, 'alpha': alpha, 'zeta': 1.0}.items():
                    f[f'scalars/{name}'] = value
                for name, components in {'t0_fields/concentration': (), 't1_fields/velocity': (2,),
                                         't2_fields/D': (2, 2), 't2_fields/E': (2, 2)}.items():
                    f[name] = rng.normal(size=(2, frames, n, n, *components)).astype(np.float32) + (name[1] == '0')
    return root


def files_of(root, split='train'):
    return sorted((root / 'data' / split).glob('*.hdf5'))


def read_bytes(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def attributes(node):
    plain = lambda v: v.tolist() if isinstance(v, (np.ndarray, np.generic)) else v
    return {k: plain(v) for k, v in node.attrs.items()}


# ---------------------------------------------------------------------------------------------
# train.py and eval.py, as commands

STEPS = 40
BASE = ['--preset', 'nano', '--crop', 16, '--resolution', GRID, '--batch', 8, '--micro-batch', 8, '--steps', STEPS,
        '--save-every', 3, '--device', 'cpu', '--dtype', 'float32']
TINY = [*BASE, '--encoder', 'convnext', '--widths', '4,4,8,8,8', '--blocks', '0,1,1,1,1']     # a small JEPA


def command(script, *flags, **environment):
    """Arguments for subprocess: a script of this folder, one thread, and no dataset of the user's."""
    env = {k: v for k, v in os.environ.items() if k != 'THE_WELL_DATA_DIR'}
    script = script if isinstance(script, list) else [HERE / script]
    return dict(args=[str(a) for a in (sys.executable, *script, *flags)],
                env={**env, 'OMP_NUM_THREADS': '1', **{k: str(v) for k, v in environment.items()}})


FORKS = multiprocessing.get_context('forkserver')                        # processes that have imported PyTorch:
FORKS.set_forkserver_preload(['torch', 'h5py'])                          # it takes seconds, and there are hundreds
os.environ.update(OMP_NUM_THREADS='1', THP_MEM_ALLOC_ENABLE='1')         # which it reads then


def run(script, *flags, cwd, code=0, **environment):
    """Run to the end; checks the exit code, and that nobody was shown a traceback."""
    given = command(script, *flags, **environment)
    if given['args'][1].startswith('-'):                                 # python -m, or -c
        p = subprocess.run(**given, cwd=cwd, capture_output=True, text=True, timeout=300)
    else:
        with tempfile.TemporaryDirectory() as folder:
            said = Path(folder, 'stdout'), Path(folder, 'stderr')
            path = str(Path(cwd, given['args'][1]).resolve())
            job = FORKS.Process(target=run_script, args=(path, given['args'][2:], cwd, given['env'], *said))
            job.start()
            job.join(300)                                                # should a refusal start to work instead
            job.kill()
            job.join()
            p = SimpleNamespace(returncode=job.exitcode, stdout=said[0].read_text(), stderr=said[1].read_text())
    assert p.returncode == code and 'Traceback' not in p.stderr + p.stdout, p.stdout + p.stderr
    return p


def refused(script, *flags, cwd, words=()):
    """Run to an error: exit code 2, one clear last line, nothing that was on disk touched. Returns the new files."""
    before = read_bytes(cwd)
    last = run(script, *flags, cwd=cwd, code=2).stderr.splitlines()[-1]
    assert last.startswith('error: ') and all(word in last for word in words), last
    after = read_bytes(cwd)
    assert all(after.get(path) == content for path, content in before.items())
    return after.keys() - before.keys()


def losses(out):
    """The log's losses, (steps, terms), having checked that every step is there once, in order."""
    rows = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == list(range(len(rows)))
    terms = 'loss', 'sim', 'std', 'cov', 'low', 'mid', 'high', 'error', 'sigreg', 'found'
    return [[row[k] for k in terms if k in row] for row in rows]


# the rivals of JEPA in miniature; flags of their own go after BASE's
RIVALS = {
    'videomae': ['--width', 16, '--depth', 2, '--heads', 2, '--patch', 8, '--decoder-width', 64, '--decoder-depth', 1,
                 '--mask-ratio', 0.75, '--crop', 0],
    'vjepa': ['--width', 16, '--depth', 2, '--heads', 2, '--patch', 8, '--predictor-width', 64, '--predictor-depth', 1,
              '--mask-ratio', 0.75, '--vicreg', 0.01, '--crop', 0],
    'pixels': ['--widths', '4,4,8,16', '--decoder-width', 16],
    'mpp': ['--width', 16, '--depth', 1, '--heads', 2, '--crop', 0],
    'disco': ['--width', 32, '--depth', 1, '--heads', 2, '--patch', 8, '--operator-width', 4, '--generator-width', 8,
              '--max-steps', 2, '--crop', 0],
}
NANO = [*BASE, '--widths', '8,8,8,8']                                    # nano's own JEPA, but narrower
MODELS = {'jepa': TINY, **{name: [*BASE, *flags, '--model', name] for name, flags in RIVALS.items()}}
