"""It fits, and says so when it does not: what is computed again, lower precision, other devices, kNN in blocks."""
import json
import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import common
import eval as evaluation
import memory
import model as models
import probe
import simulate
import train
from helpers import BASE, CHANNELS, HERE, MODELS, NANO, RIVALS, TINY, losses
from jepa import Block, Encoder
from model import Inputs, Model, build_model, recompute_blocks


def parsed(*flags):
    return train.parse([str(flag) for flag in flags], '')


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A folder without data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('THE_WELL_DATA_DIR', raising=False)


# ---------------------------------------------------------------------------------------------
# what is computed again

def test_what_the_papers_encoder_keeps():
    """MB of one float32 clip of 224 x 224, by hooks on saved tensors."""
    for what, megabytes in ('no', 2783), ('mlp', 663), ('blocks', 448):
        with torch.device('meta'):
            encoder, x = Encoder(11), torch.empty(1, 11, 16, 224, 224)
        recompute_blocks(encoder, what)
        assert memory.kept(encoder, lambda: encoder(x)) / 1e6 == pytest.approx(megabytes, abs=0.6), what


def test_values_and_no_shapes_alone_are_counted_alike():
    """At 64 x 64, with real tensors: the same shares."""
    found = []
    for what in 'no', 'mlp', 'blocks':
        encoder, x = Encoder(11), torch.zeros(1, 11, 16, 64, 64)
        recompute_blocks(encoder, what)
        found.append(memory.kept(encoder, lambda: encoder(x)))
    assert found[1] < 0.26 * found[0] and found[2] < 0.18 * found[0]


def test_the_table_of_cards_is_counted():
    """docs/speed.md: GB of a step of 8 windows of `paper`, as `python tests/memory.py` prints them."""
    page = (HERE / 'docs/speed.md').read_text()
    rows = {(dtype, what): float(number) for dtype, what, number in
            re.findall(r'\| (float32|16 bits) \| (no|mlp|blocks) \| 8 \| (\d+\.\d) \|', page)}
    assert len(rows) == 6
    for dtype, what in ('float32', 'mlp'), ('16 bits', 'mlp'), ('16 bits', 'no'):
        counted = memory.count('jepa', dtype.replace('16 bits', 'bfloat16'), what, 8)
        assert rows[dtype, what] == pytest.approx(counted, abs=0.06), (dtype, what)


@pytest.mark.parametrize('what', ['mlp', 'blocks'])
@pytest.mark.parametrize('dims', [3, 2])
def test_gradients_of_a_block_are_exact(dims, what, monkeypatch):
    """Bit for bit in one part, to rounding in several; the weights keep their names."""
    x = torch.randn(4, 8, *[4] * dims, dtype=torch.float64)

    def gradients(what):
        torch.manual_seed(0)
        block = Block(8, dims, 0.5).double()
        names, calls = list(block.state_dict()), []
        block.norm.register_forward_hook(lambda *_: calls.append(1))
        recompute_blocks(torch.nn.Sequential(block), what)
        y = x.clone().requires_grad_()
        block(y).sin().sum().backward()
        assert list(block.state_dict()) == names
        return [y.grad, *(p.grad for p in block.parameters())], len(calls)

    plain, once = gradients('no')
    again, twice = gradients(what)
    assert once == 1 and twice == 2 and all(torch.equal(a, b) for a, b in zip(plain, again))
    monkeypatch.setattr(models, 'ROWS', 4**dims)
    in_parts, calls = gradients(what)
    assert calls >= 8                                                    # four windows, each on its own
    torch.testing.assert_close(in_parts, plain, rtol=1e-12, atol=1e-14)


def step_of(flags, what, dtype='float32', **settings):
    """(terms, gradients) of a step of a miniature network."""
    c, _, options = parsed(*flags, '--batch', 2, '--micro-batch', 2, '--dtype', dtype)
    model = build_model(c.model, options, Inputs('active_matter', CHANNELS, (True, True), (32, 32)), [0.0] * 11,
                        [1.0] * 11, dtype=dtype)
    recompute_blocks(model.network, what)
    forward = torch.compile(model.network, backend='eager') if settings.get('compiled') else model.network
    x = torch.randn(2, 11, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    terms = train.train_step(model, forward, torch.optim.SGD(model.parameters(), 0.0), iter([(x, None, None)]), c, 0)
    return terms, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize('name', ['jepa', 'videomae', 'vjepa', 'pixels'])
def test_gradients_of_networks_are_exact(name, nowhere, monkeypatch):
    flags = MODELS[name] + (['--encoder', 'convnext', '--widths', '4,4,8,8,8', '--blocks', '0,1,1,1,1'] * (
        name == 'pixels'))
    monkeypatch.setattr(models, 'ROWS', 16)
    torch.testing.assert_close(step_of(flags, 'mlp', 'float64'), step_of(flags, 'no', 'float64'), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize('settings', [{}, {'compiled': True}])
def test_in_autocast_and_compiled(settings, nowhere):
    """What is computed again is computed in bfloat16 again."""
    torch.testing.assert_close(step_of(TINY, 'mlp', 'bfloat16', **settings), step_of(TINY, 'no', 'bfloat16'),
                               rtol=1e-2, atol=1e-5)


def test_who_computes_what_again(nowhere):
    """auto: MLPs on a GPU, where a file has them as a method. What cannot be done is said."""
    def chosen(name, *words):
        c, module, options = parsed(*MODELS[name])
        return recompute_blocks(module.build(options, Inputs('active_matter', CHANNELS, (True, True), (32, 32))), *words)
    assert [chosen('jepa', 'auto', device) for device in ('cpu', 'cuda', 'mps')] == ['no', 'mlp', 'mlp']
    assert [chosen(name, 'auto', 'cuda') for name in ('videomae', 'mpp', 'disco')] == ['no'] * 3
    assert chosen('videomae', 'mlp') == 'mlp' and chosen('mpp', 'blocks') == 'blocks'
    with pytest.raises(ValueError, match='--recompute mlp is for networks made of blocks with an mlp'):
        chosen('mpp', 'mlp')
    with pytest.raises(ValueError, match='--recompute blocks is for networks made of blocks, which'):
        chosen('disco', 'blocks')


def test_the_flag_is_a_word(nowhere):
    assert [parsed(*flags)[0].recompute for flags in ([], ['--recompute'], ['--recompute', 'mlp'])] == [
        'auto', 'blocks', 'mlp']
    with pytest.raises(ValueError, match='unknown recompute .* choose from auto, no, mlp, blocks'):
        parsed('--recompute', 'true')


@pytest.mark.parametrize('word', [True, False])
def test_runs_from_before_it_was_a_word_go_on(word, trained):
    state = models.load_checkpoint(trained / 'ckpt.pt')
    assert state['config']['recompute'] == 'no'                          # what auto was
    state['config']['recompute'] = word
    assert 'recompute' in train.MAY_CHANGE and train.config_of(state, '').recompute is word
    c, options = train.Config(**state['config']), models.find_model('jepa').Options(**state['options'])
    c.recompute = 'auto'
    train.check_resumable(c, options, state['steps'], state, 'ckpt.pt')


# ---------------------------------------------------------------------------------------------
# memory that ends

FULL = {
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.58 GiB of '
                           'which 1.20 GiB is free.'): '2.00 GiB',
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                 'allocate 4000 bytes. Error code 12 (Cannot allocate memory)'): '4000 bytes',
    RuntimeError('[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.'): '9 bytes',
    RuntimeError('MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1 GB, max allowed: 6.8 GB). Tried '
                 'to allocate 1.00 GB on private pool.'): '1.00 GB',
    RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'): '',
    MemoryError('Unable to allocate 7.11 PiB for an array with shape (1000000000000000,)'): '7.11 PiB'}


@pytest.mark.parametrize('error', FULL, ids=range(len(FULL)))
def test_memory_that_ends_is_one_line(error, well, tmp_path, monkeypatch, capsys):
    """What did not fit, and what to try, in this order."""
    def step(*args):
        raise error
    monkeypatch.setattr(train, 'train_step', step)
    with pytest.raises(SystemExit) as end:
        train.main([str(v) for v in (*TINY, '--data-dir', well, '--out', tmp_path / 'out')])
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and said.startswith('error: out of memory') and FULL[error] in said
    tried = [said.index(word) for word in ('bfloat16', 'float16)', '--recompute mlp', '--recompute blocks',
                                           '--micro-batch', 'changes the loss')]
    assert tried == sorted(tried)


def test_evaluation_takes_fewer_windows_at_once(monkeypatch, capsys):
    def evaluate(*args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
    monkeypatch.setattr(evaluation, 'evaluate', evaluate)
    with pytest.raises(SystemExit):
        evaluation.main(['nowhere', '--device', 'cpu'])
    assert capsys.readouterr().err == 'error: out of memory, 2.00 GiB more did not fit: try a smaller --batch\n'


def test_other_errors_keep_their_traceback():
    @common.script
    def main():
        raise RuntimeError('a mistake of ours')
    with pytest.raises(RuntimeError, match='ours'):
        main()


# ---------------------------------------------------------------------------------------------
# lower precision

@pytest.mark.parametrize('real, dtype', [(True, 'bfloat16'), (False, 'float16')])
@pytest.mark.parametrize('old', [False, True])
def test_bfloat16_where_it_is_not_only_emulated(real, dtype, old, nowhere, monkeypatch):
    """PyTorch says yes for a T4, too; an old one cannot be asked, but for the card's generation."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (8, 0) if real else (7, 5))
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', (lambda: True) if old else (
        lambda including_emulation=True: including_emulation or real))
    assert parsed('--device', 'cuda', '--dtype', 'auto')[0].dtype == dtype
    assert parsed('--device', 'cuda', '--preset', 'paper')[0].dtype == 'float32'
    assert parsed('--device', 'cpu', '--dtype', 'auto')[0].dtype == 'float32'


def test_a_run_in_float16(well, tmp_path, monkeypatch):
    """Its products are; the scale of its loss is kept, so a resumed run is the same; evaluation is in float16, too."""
    monkeypatch.chdir(tmp_path)
    flags = [str(v) for v in (*TINY, '--data-dir', well, '--dtype', 'float16', '--steps')]
    train.main([*flags, '9', '--out', 'whole'])
    step, count = train.train_step, []

    def stopped(*args):
        count.append(step(*args))
        if len(count) == 8:
            raise KeyboardInterrupt
        return count[-1]
    monkeypatch.setattr(train, 'train_step', stopped)
    with pytest.raises(SystemExit):
        train.main([*flags, '9', '--out', 'halved'])
    state = models.load_checkpoint('halved/ckpt.pt')
    assert state['step'] == 6 and 1 < state['scaler']['scale'] < 2.0**16                    # it was too high at first
    monkeypatch.setattr(train, 'train_step', step)
    train.main([*flags, '9', '--out', 'halved'])
    assert losses(tmp_path / 'halved') == losses(tmp_path / 'whole') and np.isfinite(losses(tmp_path / 'whole')).all()
    scaler = models.load_checkpoint('halved/ckpt.pt')['scaler']
    assert scaler == models.load_checkpoint('whole/ckpt.pt')['scaler'] and scaler['_growth_tracker'] > 0
    seen, model = [], models.load_run('whole', 'cpu')
    model.network.encoder.downsample_layers[1].register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    model.embed(torch.zeros(1, 11, 16, 32, 32))
    assert seen == [torch.float16]
    evaluation.main(['whole', '--epochs', '1', '--stride', '32', '--finetune', '1', '--device', 'cpu'])
    assert np.isfinite(json.loads((tmp_path / 'whole/eval.json').read_text())['rows']['JEPA, fine-tuned'][
        'attentive']['mean'])


class Steep(torch.nn.Module):
    """A network whose loss has the gradient `slope`."""

    def __init__(self, slope, loss=1.0):
        super().__init__()
        self.weight, self.slope, self.value = torch.nn.Parameter(torch.zeros(())), slope, loss

    def forward(self, context, target, generator):
        return {'loss': self.weight * self.slope + self.value}


def steep_step(slope, scale, loss=1.0):
    model = Model(Steep(slope, loss), Inputs('any', ['a'], (True, True), (4, 4)), [0], [1], dtype='float16')
    scaler = torch.amp.GradScaler('cpu', init_scale=scale)
    c = train.Config(batch=1, micro_batch=1, dtype='float16', device='cpu')
    sgd, x = torch.optim.SGD(model.parameters(), 0.1), torch.zeros(1, 1, 32, 4, 4)
    train.train_step(model, model.network, sgd, iter([(x, None, None)]), c, 0, scaler)
    return model.network.weight.item(), scaler.get_scale()


def test_the_scale_of_a_float16_loss_finds_its_level():
    """Too high: the step is left out, the scale halved. That is no divergence, but a scale under one is."""
    assert steep_step(0.5, scale=1024.0) == (pytest.approx(-0.05), 1024.0)
    assert steep_step(3e38, scale=1024.0) == (0.0, 512.0)
    for slope, scale, loss in (3e38, 1024.0, np.inf), (np.inf, 0.5, 1.0):
        with pytest.raises(FloatingPointError, match='try a lower --lr, or --dtype float32'):
            steep_step(slope, scale, loss)


# ---------------------------------------------------------------------------------------------
# a Mac's GPU, which has no float64

class NoFloat64(TorchDispatchMode):
    """Refuses what mps refuses. The CPU stands in for it, so that values can be read."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_iter(out)):
            raise TypeError(f'Cannot convert a MPS Tensor to float64 dtype: {function}')
        return out


MPS_FLAGS = {'jepa': TINY, 'nano': NANO, 'supervised': [*NANO, '--supervised'], 'sigreg': [*NANO, '--loss', 'sigreg'],
             'ema': [*NANO, '--target', 'ema'], **{name: [*BASE, *RIVALS[name], '--model', name] for name in RIVALS}}


@pytest.mark.parametrize('name', MPS_FLAGS)
def test_no_float64_reaches_a_mac(name, nowhere):
    """A step, and tokens; labels are float64 on the CPU, where tables are made, too, once."""
    c, _, options = parsed(*MPS_FLAGS[name], '--batch', 2, '--micro-batch', 2)
    model = build_model(c.model, options, Inputs('active_matter', CHANNELS, (True, True), (32, 32)), [0.0] * 11,
                        [1.0] * 11, labels=('alpha', 'zeta') if c.supervised else ())
    x, labels = torch.randn(2, 11, 32, 32, 32), torch.randn(2, 2, dtype=torch.float64)
    model.embed(x[:, :, :16])                                            # makes the ViTs' table of places
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    train.train_step(model, model.network, sgd, iter([(x, labels, None)]), c, 0)
    with pytest.raises(TypeError, match='MPS'), NoFloat64():             # on the CPU there is some
        train.train_step(model, model.network, sgd, iter([(x, labels, None)]), c, 0)
    c.device = 'mps'
    with NoFloat64():
        terms = train.train_step(model, model.network, sgd, iter([(x, labels, None)]), c, 0)
        assert model.embed(x[:, :, :16]).dtype == torch.float32
    assert np.isfinite(terms['loss'])


def test_a_mac_is_accepted(nowhere, well, monkeypatch):
    with pytest.raises(ValueError, match="no device 'mps' on this machine"):
        parsed('--device', 'mps')
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    c = parsed('--device', 'mps', '--dtype', 'auto')[0]
    assert (c.device, c.dtype) == ('mps', 'float32') and parsed('--device', 'auto')[0].device != 'mps'
    assert parsed('--device', 'mps', '--dtype', 'float16')[0].dtype == 'float16'
    with pytest.raises(ValueError, match='no float64 on mps: use --dtype float32'):
        parsed('--device', 'mps', '--dtype', 'float64')
    assert 'GPU' in common.machine('mps') and common.peak_memory() > 0
    assert not train.optimizer_of(torch.nn.Linear(2, 2), c).defaults['fused']
    monkeypatch.setattr(torch.amp, 'is_autocast_available', lambda device: False)           # an older PyTorch
    with pytest.raises(ValueError, match='no float16 on mps: use --dtype float32'):
        parsed('--device', 'mps', '--dtype', 'float16')


def test_a_device_without_autocast_computes_as_it_is():
    with common.autocast(torch.device('meta')), common.autocast(torch.device('meta'), torch.float16):
        assert torch.nn.Linear(2, 2, device='meta')(torch.empty(1, 2, device='meta')).dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16), common.autocast(torch.device('cpu')):       # none inside another
        assert torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.float32


def test_nothing_is_pinned_for_a_mac(well, nowhere, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda x: pinned.append(1) or x)
    c = parsed(*TINY, '--data-dir', well)[0]
    _, data = train.open_data(c)
    for device, count in ('cpu', 0), ('mps', 0), ('cuda', 1):
        c.device = device
        train.load_batch(data, c, 0, 0)
        assert len(pinned) == count


def test_a_mac_takes_one_process_and_simulates_on_its_cpu(monkeypatch, capsys):
    monkeypatch.setattr(common, 'WORLD', 2)
    with pytest.raises(ValueError, match='one process'):
        common.start_ranks('mps')
    monkeypatch.setattr(common, 'WORLD', 1)
    with pytest.raises(SystemExit):
        simulate.main(['shear_flow', '--device', 'mps'])
    assert 'float64' in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# nearest neighbours

def test_knn_in_blocks_is_knn(monkeypatch):
    g = torch.Generator().manual_seed(0)
    splits = {name: (torch.randn(n, 3, 8, generator=g), torch.randn(n, 2, generator=g))
              for name, n in (('train', 120), ('valid', 50), ('test', 41))}
    whole, shapes, cdist = probe.knn(splits)[0], [], torch.cdist
    monkeypatch.setattr(probe, 'DISTANCES', 8 * 120 * 7)
    monkeypatch.setattr(torch, 'cdist', lambda a, b: shapes.append(len(a)) or cdist(a, b))
    assert torch.equal(probe.knn(splits)[0], whole) and max(shapes) == 7 and sum(shapes) == 91
