"""Bad input: exit code 2, one clear line, and everything on disk as it was."""
import os
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from helpers import BASE, HERE, NAME, TINY, command, files_of, make_published, refused


def edit(root, number, change):
    with h5py.File(files_of(root)[number], 'r+') as f:
        change(f)


def shorten(root):
    shutil.rmtree(root)
    make_published(root.parent, frames=31)


def put_nan(f):
    f['t2_fields/D'][1, 3, 4, 5, 0, 1] = np.nan


FIRST, SECOND = NAME.format(1.0, -1.0), NAME.format(1.0, -5.0)
DAMAGES = {                                                              # what is done, and what the message must say
    'truncated': (lambda root: os.truncate(files_of(root)[1], 99_999), [SECOND]),
    'no scalars': (lambda root: edit(root, 0, lambda f: f.pop('scalars')), [FIRST, 'scalars']),
    'no axes': (lambda root: edit(root, 0, lambda f: f['dimensions'].attrs.clear()), [FIRST, 'spatial_dims']),
    'a field less': (lambda root: edit(root, 1, lambda f: f['t2_fields'].pop('E')), [SECOND, 'channels']),
    'nan': (lambda root: edit(root, 1, put_nan), [SECOND, 'D_xy', 'NaN']),
    'too short': (shorten, ['31 frames', '32']),
    'no training split': (lambda root: shutil.rmtree(root / 'data' / 'train'), ['train']),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_data_is_refused(tmp_path, damage):
    """The message says what is wrong and where, and no cache of half a file, nor a run's folder, is left."""
    inflict, words = DAMAGES[damage]
    inflict(make_published(tmp_path))
    flags = [*TINY, '--resolution', 16, '--data-dir', tmp_path, '--out', tmp_path / 'out']
    left = refused('train.py', *flags, cwd=tmp_path, words=words)
    assert all(FIRST.removesuffix('.hdf5') in path.name and path.suffix in ('.npy', '.json') for path in left)
    assert not left or damage == 'nan'                                   # the first file was whole, and stays


@pytest.mark.parametrize('flags, word', [
    ('train.py --data active_mater', 'active_mater'),
    ('smoke.py', 'python train.py --preset smoke; python eval.py'),
    ('train.py --cache none', '--cache is gone: the cache always holds float32'),
    ('train.py --log-every 3', '--log-every is gone'),
    ('eval.py --all', '--all is gone: python -m benchmark.report'),
    ('eval.py --latents here', '--latents is gone: python -m baselines.latents'),
    ('train.py --out file/out', 'file'),
    ('train.py --resolution 40 --crop 0', '16'),
    ('train.py --batch 10 --micro-batch 4', 'multiple'),
    ('train.py --preset macro', 'macro'),
    ('train.py --model gan', 'gan'),
    ('train.py --model data', 'data'),                                   # a file, but no model
    ('train.py --noise nan', 'nan'),
    ('train.py --lr inf', 'inf'),
    ('train.py --batch 0', '--batch must be at least 1'),
    ('train.py --resolution -16', '--resolution must be at least 0'),
    ('train.py --epochs 0', '--epochs must be more than 0'),
    ('train.py --seed -1', '--seed must be at least 0'),
    ('train.py --mask-ratio 0.5', '--mask-ratio'),                       # of another model
    ('train.py --encoder mine', 'convnext or statistics'),
    ('train.py --encoder statistics', '4 --widths: 64,64'),
    ('train.py --widths 4,4', '5 --widths: 16,32'),
    ('train.py --model videomae --widths 4,4,8,8,8', '--widths'),
    ('train.py --step 3', '--step'),                                     # no abbreviations
    ('simulate.py active_matter --seed -1', '--seed must be at least 0'),
    ('simulate.py shear_flow --preset macro', 'macro'),
    ('plot.py nowhere', 'nowhere'),
    ('simulate.py active_matter --data-dir file', 'file'),
    ('simulate.py active_matter', 'choose another --data-dir'),          # ./data holds somebody else's
    ('eval.py nowhere.pt', 'nowhere.pt'),
    ('eval.py', 'no checkpoint under out/'),
    ('eval.py file', 'not a checkpoint'),
    ('eval.py --stride -1', '--stride must be at least 0'),
    ('eval.py --batch 0', '--batch must be at least 1'),
    ('eval.py --epochs 0', '--epochs must be at least 1'),
    ('eval.py tensors.pt', 'not a checkpoint')])
def test_bad_flags_are_refused(tmp_path, flags, word):
    make_published(tmp_path / 'data')
    (tmp_path / 'file').write_bytes(np.random.default_rng(0).bytes(1000))
    torch.save({'weight': torch.zeros(3)}, tmp_path / 'tensors.pt')
    script, *flags = flags.split()
    base = [] if script != 'train.py' else BASE if '--model' in flags else TINY
    assert not refused(script, *base, *flags, cwd=tmp_path, words=[word])


@pytest.mark.parametrize('flags', [['--model', 'videomae', '--mask-ratio', 1.5], ['--seed', -1], ['--noise', 'nan'],
                                   ['--crop', 24], ['--model', 'disco', '--crop', 16],
                                   ['--model', 'mpp', '--views', 'unpaired'], ['--out', 'file']])
def test_bad_flags_are_refused_before_anything_is_simulated(tmp_path, flags):
    (tmp_path / 'file').write_text('')
    assert not refused('train.py', *flags, cwd=tmp_path)


def test_a_web_page_is_no_dataset(tmp_path):
    """What a failed download leaves."""
    root = make_published(tmp_path)
    files_of(root)[1].write_text('<!DOCTYPE html><html>404: not found</html>')
    refused('train.py', *TINY, '--resolution', 16, '--data-dir', tmp_path, '--out', 'out', cwd=tmp_path,
            words=[SECOND, 'web page'])


def test_damaged_checkpoints_are_refused(trained, tmp_path):
    """In one line that says what it is: of another version, with statistics of other channels, or not one at all."""
    state = torch.load(trained / 'ckpt.pt', weights_only=True)
    for name, change, word in (('old', {'options': None}, 'this version'), ('short', {'mean': [0.0]}, 'mean and std'),
                               ('option', {'options': {**state['options'], 'colour': 3}}, 'another version'),
                               ('config', {'config': {**state['config'], 'colour': 3}}, 'another version')):
        changed = {k: v for k, v in {**state, **change}.items() if v is not None}
        torch.save(changed, tmp_path / f'{name}.pt')
        refused('eval.py', f'{name}.pt', cwd=tmp_path, words=[f'{name}.pt', word])
    (tmp_path / 'text.pt').write_text('hello')
    refused('eval.py', 'text.pt', cwd=tmp_path, words=['text.pt is not a checkpoint', 'plain tensors'])


@pytest.mark.parametrize('script, flags, word', [('train.py', ['--noise', 'nan'], 'noise'),
                                                 ('eval.py', ['nowhere'], 'nowhere')])
def test_under_torchrun_the_first_line_says_what_is_wrong(tmp_path, script, flags, word):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', HERE / script]
    p = subprocess.run(**command(torchrun, *flags), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    said = [line for line in p.stderr.splitlines() if 'error: ' in line]
    assert p.returncode == 1 and said[0].startswith('error: ') and word in said[0] and 'RuntimeError' not in p.stderr
    assert "torchrun's own report" in said[0] and sum(line.startswith('error: ') for line in said) == 1


class Evil:
    def __reduce__(self):
        return os.mkdir, ('evil',)


def test_checkpoints_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': Evil()}, 'evil.pt')
    torch.load('evil.pt', weights_only=False)                            # the file does bite
    os.rmdir('evil')
    refused('eval.py', 'evil.pt', cwd=tmp_path, words=['not a checkpoint'])
    assert not Path('evil').exists()


def test_finished_run_is_not_overwritten_by_another(well, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'out')
    flags = [*TINY, '--data-dir', well, '--seed', 1, '--out', 'out']
    assert not refused('train.py', *flags, cwd=tmp_path, words=['seed: 0, now 1', '--out'])
