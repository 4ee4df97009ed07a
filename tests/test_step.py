"""A step of training: what is not finite moves nothing, blocks may be computed again."""
import pytest
import torch

import train
from helpers import BASE, CHANNELS, MODELS, NANO, RIVALS, STEPS, TINY, run
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
    c, _, options = train.parse([str(flag) for flag in [*flags, '--batch', 2, '--micro-batch', 1]], '')
    inputs = Inputs('active_matter', CHANNELS, (True, True), (32, 32), c.views == 'paired')
    labels = ('a', 'b') if c.supervised else ()
    c.micro_batch = 2 if c.model == 'jepa' and getattr(options, 'loss', '') == 'infonce' else 1
    torch.manual_seed(0)
    return c, build_model(c.model, options, inputs, [0.0] * 11, [1.0] * 11, labels=labels), torch.randn(
        2, 11, 32, 32, 32), torch.randn(2, 2)


def batches(c, x, labels):
    return iter(zip(x.split(c.micro_batch), labels.split(c.micro_batch)))


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
            recompute_blocks(model.network, 'blocks')
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
        recompute_blocks(model.network, 'blocks')


def test_what_is_not_finite_is_never_saved(well, tmp_path):
    flags = [*BASE, *RIVALS['pixels'], '--model', 'pixels', '--data-dir', well, '--out', 'out']
    p = run('train.py', *flags, '--lr', 1e30, '--save-every', 20, cwd=tmp_path, code=2)
    assert 0 < len((tmp_path / 'out/log.jsonl').read_text().splitlines()) < 20         # of the steps that were
    assert 'finite; the last good checkpoint is kept (none yet)' in p.stderr and not (tmp_path / 'out/ckpt.pt').exists()


@pytest.mark.parametrize('name', ['nano', 'videomae', 'vjepa'])
def test_compiled_steps_are_the_same(name, tmp_path, monkeypatch):
    """Also with blocks that are computed again. PyTorch's tracing alone, without making kernels."""
    found = []
    for compiled in False, True:
        c, model, x, labels = miniature(AHEAD[name], monkeypatch, tmp_path)
        if name != 'nano':
            recompute_blocks(model.network, 'blocks')
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
