"""A step of training: it never waits for the device, blocks may be computed again, terms are read later."""
import contextlib
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import config
import train
from common import Timed
from helpers import BASE, CHANNELS, MODELS, NANO, RIVALS, TINY, losses, run
from model import Inputs, build_model, recompute_blocks

AHEAD = {'jepa': TINY, 'nano': NANO, 'ema': [*NANO, '--target', 'ema'], 'sigreg': [*NANO, '--loss', 'sigreg'],
         'infonce': [*NANO, '--loss', 'infonce'], 'supervised': [*NANO, '--supervised'],
         'block': [*MODELS['vjepa'], '--masks', 'block'],
         **{name: MODELS[name] for name in MODELS if name != 'disco'}}
BLOCKS = ['jepa', 'videomae', 'vjepa', 'mpp']


def miniature(flags, monkeypatch, folder):
    """(Config, Model, a batch (2, 11, 32, 32, 32) and its labels)."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv('THE_WELL_DATA_DIR', raising=False)
    c, _, options = config.parse([str(flag) for flag in [*flags, '--batch', 2, '--micro-batch', 1]], '')
    inputs = Inputs('active_matter', CHANNELS, (True, True), (32, 32), c.views == 'paired')
    labels = 2 if c.supervised else 0
    c.micro_batch = 2 if c.model == 'jepa' and getattr(options, 'loss', '') == 'infonce' else 1
    torch.manual_seed(0)
    return c, build_model(c.model, options, inputs, [0.0] * 11, [1.0] * 11, labels=labels), torch.randn(
        2, 11, 32, 32, 32), torch.randn(2, 2)


def batches(c, x, labels):
    return iter(zip(x.split(c.micro_batch), labels.split(c.micro_batch)))


class NoWaiting(TorchDispatchMode):
    """Meta tensors stand for a GPU's: their values cannot be read; and a copy to them may not block either."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, out = kwargs or {}, function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].device != out.device:
            assert kwargs.get('non_blocking'), f'{tuple(args[0].shape)} is copied, and waited for'
        return out


@pytest.mark.parametrize('name', AHEAD)
def test_a_step_never_waits_for_the_device(name, tmp_path, monkeypatch):
    """But DISCO's, whose solver chooses the length of its steps by their errors."""
    c, model, x, labels = miniature(AHEAD[name], monkeypatch, tmp_path)
    model, x, labels = model.to('meta'), x.to('meta'), labels.to('meta')
    monkeypatch.setattr(torch, 'autocast', lambda *args, **settings: contextlib.nullcontext())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with NoWaiting():
        terms = train.train_step(model, model.network, optimizer, batches(c, x, labels), c, 0)
        if hasattr(model.network, 'after_step'):
            model.network.after_step(0.5)
    assert set(terms) >= {'loss', 'finite'} and all(v.shape == () and v.dtype == torch.float64 for v in terms.values())


@pytest.mark.parametrize('name', BLOCKS)
def test_blocks_are_computed_again(name, tmp_path, monkeypatch):
    """The same loss and gradients, from fewer tensors kept."""
    more = {'jepa': ['--blocks', '2,2,2,2,2'], 'mpp': ['--depth', 3]}.get(name, [])
    c, model, x, labels = miniature([*MODELS[name], *more], monkeypatch, tmp_path)
    kept, found = [], []

    def keep(tensor):
        kept[-1] += tensor.numel()
        return tensor
    for again in False, True:
        if again:
            recompute_blocks(model.network)
        kept.append(0)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms = train.train_step(model, model.network, optimizer, batches(c, x, labels), c, 0)
        found.append((terms['loss'], [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
    assert kept[1] < 0.75 * kept[0]


def test_no_blocks_to_compute_again(tmp_path, monkeypatch):
    _, model, *_ = miniature(MODELS['disco'], monkeypatch, tmp_path)
    with pytest.raises(ValueError, match='blocks'):
        recompute_blocks(model.network)


def test_terms_are_read_every_few_steps(well, trained, tmp_path):
    """The same losses, a line for each step; the embedding's health in the last of those read together."""
    run('train.py', *TINY, '--data-dir', well, '--log-every', 7, '--save-every', 10, '--recompute', '--out', 'out',
        cwd=tmp_path)
    assert losses(tmp_path / 'out') == losses(trained)
    lines = [json.loads(line) for line in (tmp_path / 'out/log.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if 'embedding_rank' in line] == [6, 9, 13, 19, 20, 27, 29, 34, 39]
    seconds = [line['seconds'] for line in lines]
    assert all(0 < a < b for a, b in zip(seconds, seconds[1:])) and all(0 <= line['waiting'] <= 1 for line in lines)


def test_what_is_not_finite_is_never_saved(well, tmp_path):
    """Though it is noticed steps later."""
    flags = [*BASE, *RIVALS['pixels'], '--model', 'pixels', '--data-dir', well, '--out', 'out']
    p = run('train.py', *flags, '--lr', 1e30, '--log-every', 100, '--save-every', 20, cwd=tmp_path, code=2)
    assert 'finite; the last good checkpoint is kept (none yet)' in p.stderr and not (tmp_path / 'out/ckpt.pt').exists()


def test_waiting_is_timed():
    slow = Timed(iter(range(3)))
    assert list(slow) == [0, 1, 2] and 0 < slow.seconds < 1
