"""train.py: settings, schedule, order of the windows, published weights."""
import numpy as np
import pytest
import torch

import train
from model import load_checkpoint
from baselines import mpp
from baselines.disco import DISCO
from helpers import HERE, MODELS, losses, refused, run


def test_defaults_preset_system_flags(tmp_path, monkeypatch):
    """Each goes before the one to its left; what nano sets for one system is not the paper's."""
    monkeypatch.chdir(tmp_path)                                          # no data: nano would be simulated

    def settings(*flags):
        c, _, options = train.parse(flags)
        return c.preset, getattr(options, 'cov_coeff', None), c.steps
    assert settings('--preset', 'paper', '--data', 'shear_flow') == ('paper', 2.0, -1)
    assert settings() == ('nano', 4.0, 1200)
    assert settings('--data', 'shear_flow') == ('nano', 0.4, 700)
    assert settings('--data', 'shear_flow', '--cov-coeff', '3.0') == ('nano', 3.0, 700)
    assert settings('--data', 'shear_flow', '--model', 'mpp') == ('nano', None, 800)
    assert settings('--data', 'shear_flow', '--preset', 'smoke') == ('smoke', 0.4, 20)


@pytest.mark.parametrize('model', MODELS)
def test_published_weights_are_a_start(well, tmp_path, model):
    """--init --steps 0 is a checkpoint of the published weights, which eval.py takes; damaged ones are refused."""
    flags = [*MODELS[model], '--data-dir', well, '--steps', 0]
    if model == 'disco':                                                 # whose published weights serve all datasets
        weights = DISCO('active_matter', all_datasets=True, dim=32, blocks=1, heads=2, patch=8, hidden=8,
                        width=4).state_dict()
    else:
        run('train.py', *flags, '--seed', 5, '--out', 'out/source', cwd=tmp_path)
        source = load_checkpoint(tmp_path / 'out' / 'source' / 'ckpt.pt')
        assert source['step'] == 0
        weights = {k if model == 'videomae' else k.removeprefix('encoder.'): v for k, v in source['model'].items()
                   if model == 'videomae' or k.startswith('encoder.')}
    if model == 'mpp':
        weights |= {k: weights[k].narrow(axis, 0, 12) for k, axis in mpp.STATE_AXIS.items()}
    torch.save({'videomae': {'model': weights}, 'disco': {'model_state': weights}}.get(model, weights),
               tmp_path / 'published')
    run('train.py', *flags, '--init', 'published', '--out', 'out/init', cwd=tmp_path)
    own = load_checkpoint(tmp_path / 'out' / 'init' / 'ckpt.pt')['model']
    for k, v in weights.items():
        loaded = own[k if k in own else 'encoder.' + k]
        assert torch.equal(loaded[tuple(map(slice, v.shape))], v), k
    if model == 'disco':                                                 # most of the weights are other datasets'
        torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', HERE / 'train.py']
        run(torchrun, *flags, '--init', 'published', '--steps', 3, '--out', 'out/on', cwd=tmp_path)
        assert np.isfinite(losses(tmp_path / 'out' / 'on')).all()
        assert '\nDISCO ' in run('eval.py', 'out/on', '--epochs', 1, '--stride', 16, cwd=tmp_path).stdout
    if model != 'jepa':                                                  # the loaders' own tests refuse more
        return
    (tmp_path / 'cut').write_bytes((tmp_path / 'published').read_bytes()[:3000])
    assert refused('train.py', *flags, '--init', 'cut', '--out', 'out/cut', cwd=tmp_path, words=['cut']) == set()
    refused('train.py', *flags, '--init', 'nowhere', '--out', 'out/cut', cwd=tmp_path, words=['nowhere'])


def test_learning_rate_schedule():
    rates = [train.learning_rate(s, 100, 10, 1e-3, 1e-6) for s in range(100)]
    assert rates[9] == pytest.approx(1e-3) == max(rates) and rates[-1] == pytest.approx(1e-6)
    assert np.allclose(np.diff(rates[:10]), np.diff(rates[:10])[0]) and (np.diff(rates[10:]) < 0).all()


def test_every_window_once_an_epoch():
    """However the epochs are cut into batches."""
    order = np.concatenate([train.window_order(10, 0, first, 4) for first in range(0, 40, 4)]).reshape(4, 10)
    assert (np.sort(order, 1) == np.arange(10)).all() and len({tuple(epoch) for epoch in order}) == 4
    assert np.array_equal(order.ravel()[5:25], train.window_order(10, 0, 5, 20))
    assert not np.array_equal(order.ravel(), train.window_order(10, 1, 0, 40))
