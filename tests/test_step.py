"""A step of training: what is not finite moves nothing, blocks may be computed again."""
import json

import pytest
import torch

import train
from helpers import BASE, CHANNELS, MODELS, NANO, RIVALS, STEPS, TINY, run
from data import Split
from model import Inputs, Model, build_model, recompute_blocks
from systems import find_system

AHEAD = {'jepa': TINY, 'nano': NANO, 'ema': [*NANO, '--target', 'ema'], 'sigreg': [*NANO, '--loss', 'sigreg'],
         'infonce': [*NANO, '--loss', 'infonce'], 'supervised': [*NANO, '--supervised'],
         'block': [*MODELS['vjepa'], '--masks', 'block'], 'not z-scored': [*NANO, '--standardize', 'false'],
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
    return iter(zip(x.split(c.micro_batch), labels.split(c.micro_batch), torch.arange(2).split(c.micro_batch)))


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


@pytest.mark.parametrize('name', ['nano', 'videomae', 'vjepa', 'not z-scored'])
def test_compiled_steps_are_the_same(name, tmp_path, monkeypatch):
    """Also with blocks that are computed again. PyTorch's tracing alone, without making kernels; with its gradients'
    tracing where a view of the network's output, kept for the log, would fail there."""
    found = []
    for compiled in False, True:
        c, model, x, labels = miniature(AHEAD[name], monkeypatch, tmp_path)
        if name in BLOCKS:
            recompute_blocks(model.network, 'blocks')
        forward = torch.compile(model.network, backend='eager' if name != 'not z-scored' else 'aot_eager') if compiled else model.network
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


# ---------------------------------------------------------------------------------------------
# what a step is given

class Listener(torch.nn.Module):
    """A network that keeps what it sees, and what its generator draws."""

    def __init__(self):
        super().__init__()
        self.encoder, self.inputs, self.drawn = torch.nn.Linear(4, 8), [], []

    def forward(self, context, target, generator):
        self.inputs.append(torch.cat([context, target], 2))
        self.drawn.append(torch.rand(4, generator=generator))
        return {'loss': self.encoder(context).square().mean()}


def heard(monkeypatch, rank=0, **settings):
    """A Listener after two steps of two micro-batches each; its fields are zeros, and noise."""
    monkeypatch.setattr(train, 'RANK', rank)
    c, network = train.Config(batch=4, micro_batch=2, noise=1.0, dtype='float32', **settings), Listener()
    model = Model(network, Inputs('any', ['a'], (True, True), (8, 4)), [0], [1])
    optimizer = train.optimizer_of(network, c)
    for step in 0, 1:
        batches = iter([(torch.zeros(2, 1, 32, 8, 4), None, None)] * 2)
        train.train_step(model, network, optimizer, batches, c, step)
    return network


def test_draws_differ_between_micro_batches_and_steps_but_not_between_ranks(monkeypatch):
    """Masks and chunks are of all ranks together; the noise is each rank's own."""
    first, second, again = (heard(monkeypatch, rank) for rank in (0, 1, 0))
    assert len(torch.stack(first.drawn).unique(dim=0)) == len(torch.stack(first.inputs).unique(dim=0)) == 4
    assert all(map(torch.equal, first.drawn, second.drawn))
    assert not any(map(torch.equal, first.inputs, second.inputs))
    assert all(map(torch.equal, first.drawn + first.inputs, again.drawn + again.inputs))
    for seed in 1, 4:                                                    # a generator on the CPU keeps 32 bits
        other = heard(monkeypatch, seed=seed)
        assert not any(map(torch.equal, first.drawn + first.inputs, other.drawn + other.inputs))


def test_micro_batches_and_ranks_share_a_batch(published, monkeypatch):
    """Whatever the cut, the windows of a step are the same, each once, with its label, crop and turn."""
    data = Split(published, find_system('active_matter'), 'train')

    def batch(step, micro_batch, world=1):
        monkeypatch.setattr(train, 'WORLD', world)
        c, parts = train.Config(batch=8, micro_batch=micro_batch, crop=8, augment=True, seed=3, device='cpu'), []
        for micro in range(8 // micro_batch):
            for rank in range(world):
                monkeypatch.setattr(train, 'RANK', rank)
                parts.append(train.load_batch(data, c, step, micro))
        return [torch.cat(part) for part in zip(*parts)]
    whole = batch(0, 8)
    assert len(whole[0].unique(dim=0)) == 8 and whole[0].shape == (8, 11, 32, 8, 8)
    for cut in batch(0, 2), batch(0, 4, world=2), batch(0, 8, world=4):
        assert all(map(torch.equal, whole, cut))
    assert not torch.equal(batch(1, 8)[0], whole[0])


def test_the_optimizer_has_the_rate_of_the_schedule(well, tmp_path, monkeypatch):
    """Every step, of all its groups, and the log says so. The warmup's length is in epochs, the schedule's in steps."""
    seen, step = [], train.train_step
    monkeypatch.setattr(train, 'train_step', lambda *args: seen.append(
        {group['lr'] for group in args[2].param_groups}) or step(*args))
    monkeypatch.chdir(tmp_path)
    train.main([str(flag) for flag in [*NANO, '--data-dir', well, '--warmup-epochs', 0.25, '--lr', 0.02,
                                       '--min-lr', 0.001, '--steps', 30, '--stride', 3, '--out', 'out']])
    log = [json.loads(line) for line in (tmp_path / 'out/log.jsonl').read_text().splitlines()]
    rates = [row['lr'] for row in log]
    assert seen == [{rate} for rate in rates]
    # 6 training runs with 17 windows each are 102: a quarter of an epoch is 3 steps of 8
    assert rates[:3] == pytest.approx([0.001 + 0.019 / 3, 0.001 + 0.019 * 2 / 3, 0.02])
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[3] == pytest.approx(0.02) and rates[-1] == 0.001


@pytest.mark.parametrize('losses', [{'error': torch.zeros(())}, torch.zeros(()), [('loss', 0.0)], {}])
def test_what_a_network_returns_is_a_dict_with_a_loss(tmp_path, monkeypatch, losses):
    c, model, x, labels = miniature(MODELS['jepa'], monkeypatch, tmp_path)
    model.network.forward = lambda context, target, generator: losses
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with pytest.raises(ValueError, match="returns a dict with 'loss' in it"):
        train.train_step(model, model.network, optimizer, batches(c, x, labels), c, 0)
