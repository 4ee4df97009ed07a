"""A step of training: it never waits for the device, blocks may be computed again, terms are read later."""
import contextlib
import json

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import config
import train
from common import Timed
from helpers import BASE, CHANNELS, MODELS, NANO, RIVALS, STEPS, TINY, losses, run
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
    """Meta tensors stand for a GPU's: their values cannot be read. And no copy to them may block."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, out, name = kwargs or {}, function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if name in ('_to_copy', 'copy_', 'index', 'index_put_'):
            inputs = [x for x in tree_leaves(args) if torch.is_tensor(x) and x.ndim]
            if any(x.device != out.device for x in inputs):
                assert kwargs.get('non_blocking'), f'{name}: {tuple(inputs[0].shape)} is copied, and waited for'
        return out


class NoLists(TorchFunctionMode):
    """What is made of a list is copied from the processor, and waited for, as are indices that are one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__ and args[0].device.type == 'meta':
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(i, list) or torch.is_tensor(i) and i.device.type != 'meta' for i in index), index
        elif function in (torch.tensor, torch.as_tensor):
            assert torch.device((kwargs or {}).get('device') or 'cpu').type != 'meta' or torch.is_tensor(args[0]), args
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', AHEAD)
def test_a_step_never_waits_for_the_device(name, tmp_path, monkeypatch):
    """But DISCO's, whose solver chooses the length of its steps by their errors."""
    c, model, x, labels = miniature(AHEAD[name], monkeypatch, tmp_path)
    model, x, labels = model.to('meta'), x.to('meta'), labels.to('meta')
    monkeypatch.setattr(torch, 'autocast', lambda *args, **settings: contextlib.nullcontext())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with NoWaiting(), NoLists():
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
    assert 0 < len((tmp_path / 'out/log.jsonl').read_text().splitlines()) < 20         # of the steps that were
    assert 'finite; the last good checkpoint is kept (none yet)' in p.stderr and not (tmp_path / 'out/ckpt.pt').exists()


@pytest.mark.parametrize('name', ['nano', 'videomae', 'vjepa'])
def test_compiled_steps_are_the_same(name, tmp_path, monkeypatch):
    """Also with blocks that are computed again. PyTorch's tracing alone, without making kernels."""
    found = []
    for compiled in False, True:
        c, model, x, labels = miniature(AHEAD[name], monkeypatch, tmp_path)
        if name != 'nano':
            recompute_blocks(model.network)
        forward = torch.compile(model.network, backend='eager') if compiled else model.network
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        found.append([train.train_step(model, forward, optimizer, batches(c, x, labels), c, s) for s in (0, 1)])
        assert model.embedding is not None
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('flag', [True, False])
def test_a_run_goes_on_with_the_adamw_of_its_device(flag, well, trained, tmp_path, monkeypatch):
    """Whatever device its checkpoint was saved on."""
    state = torch.load(trained / 'ckpt.pt', weights_only=True)
    for group in state['optimizer']['param_groups']:
        group['fused'] = flag
    (tmp_path / 'out').mkdir()
    torch.save(state, tmp_path / 'out/ckpt.pt')
    seen, step = [], train.train_step
    monkeypatch.setattr(train, 'train_step', lambda *args: seen.append(args[2].param_groups[0]['fused']) or step(*args))
    monkeypatch.chdir(tmp_path)
    train.main([str(flag) for flag in [*TINY, '--data-dir', well, '--steps', STEPS + 1, '--out', 'out']])
    assert seen == [False]


def test_waiting_is_timed():
    slow = Timed(iter(range(3)))
    assert list(slow) == [0, 1, 2] and slow.seconds > 0
