"""bench.py and bench_steps.py: FLOP against the formulas written out, kinds of kernels, each model's step."""
import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import bench
import bench_steps
from encoders import DepthwiseConv3d
from helpers import BASE, MODELS
from model import model_names


def both_ways(function, *shapes, inputs=True):
    """FLOP of a function of tensors and its gradients, by the counter."""
    tensors = [torch.randn(s, requires_grad=inputs) for s in shapes]
    return bench_steps.count(lambda: function(*tensors).sum().backward())[0]


@pytest.mark.parametrize('layer, points', [(nn.Conv2d(6, 12, 3, padding=1), 8 * 8),
                                           (nn.Conv2d(6, 12, 3, groups=3), 6 * 6),
                                           (nn.Conv2d(6, 6, 3, groups=6, stride=2, padding=1), 4 * 4),
                                           (nn.ConvTranspose2d(6, 12, 2, groups=3, stride=2), 8 * 8)])
def test_flop_of_convolutions(layer, points):
    """Two for each weight, window and point of the output (of the input, if transposed); as many for each gradient."""
    forward = 2 * layer.weight.numel() * 5 * points
    assert both_ways(layer, (5, 6, 8, 8)) == 3 * forward
    assert both_ways(layer, (5, 6, 8, 8), inputs=False) == 2 * forward   # the weights' alone


def test_flop_of_products_and_attention():
    """On CPU the gradient of attention makes its weights again; as an einsum it is six products of matrices."""
    B, heads, n, m, D = 2, 3, 5, 7, 4
    shapes = [(B, heads, k, D) for k in (n, m, m)]
    assert both_ways(F.scaled_dot_product_attention, *shapes) == (2 + 5) * 2 * B * heads * n * m * D

    def written(q, k, v):
        return torch.einsum('bhnm,bhmd->bhnd', torch.einsum('bhnd,bhmd->bhnm', q, k).softmax(-1), v)

    assert both_ways(written, *shapes) == 6 * 2 * B * heads * n * m * D
    assert both_ways(nn.Linear(8, 3), (2, 5, 8)) == 3 * 2 * 2 * 5 * 8 * 3


@pytest.mark.parametrize('frames, taps', [(16, 100), (4, 16)])
def test_flop_of_the_depthwise_convolution(frames, taps):
    """T x T kernels of 7 x 7, of which those at most three frames apart are not zero: `taps`."""
    x = torch.randn(2, 3, frames, 8, 8, requires_grad=True)
    layer = nn.Sequential(DepthwiseConv3d(3))
    flop, zeros = bench_steps.count(lambda: layer(x).sum().backward(), layer)
    each = 3 * 2 * 2 * 3 * 8 * 8 * 49
    assert flop == each * frames**2 and flop - zeros == each * taps


@pytest.mark.parametrize('kind, names', [
    ('conv', ['aten::mkldnn_convolution', 'aten::convolution']), ('conv', ['aten::convolution_backward']),
    ('mm', ['aten::addmm', 'aten::linear']), ('mm', ['aten::bmm']),
    ('attn', ['aten::_scaled_dot_product_flash_attention_for_cpu_backward']),
    ('attn', ['aten::bmm', 'aten::_scaled_dot_product_attention_math']),
    ('norm', ['aten::native_layer_norm', 'aten::layer_norm']), ('norm', ['aten::std_mean']),
    ('point', ['aten::gelu_backward']), ('point', ['aten::mul']), ('point', ['aten::sum']),
    ('copy', ['aten::copy_', 'aten::contiguous']), ('copy', ['aten::clone']), ('copy', ['aten::cat']),
    ('optim', ['aten::mul_', 'Optimizer.step#AdamW.step']), ('optim', ['aten::_fused_adamw_', 'Optimizer.step#AdamW']),
    ('other', ['aten::view']), ('other', ['aten::normal_']), ('other', ['AddmmBackward0'])])
def test_kinds_of_kernels(kind, names):
    assert bench_steps.kind_of(names) == kind


def test_shares_of_time():
    a = torch.randn(600, 600)
    found = bench_steps.shares(lambda: (a @ a).add_(a), 'cpu')
    assert sum(found.values()) == pytest.approx(1) and found['mm'] > 0.7 and found['conv'] == 0


@pytest.mark.parametrize('name', model_names())
def test_a_step_of_each_model(name):
    """In miniature; a new model is measured without a word of it here."""
    c, options = bench_steps.settings(name, 'cpu', *MODELS.get(name, [*BASE, '--model', name]), '--batch', 4,
                                      '--micro-batch', 4)
    row = bench_steps.measure(name, c, options, repeats=1)
    assert row['windows'] == 4 and row['gflop_per_window'] > 0 and (row['zeros'] > 0) == (name == 'jepa')
    assert row['gflop_per_s'] == pytest.approx(row['gflop_per_window'] * row['windows_per_s'])
    assert row['share_of_matmul'] == pytest.approx(row['gflop_per_s'] / row['matmul_gflop_per_s'])
    assert sum(row['kinds'].values()) == pytest.approx(1) and row['kinds']['optim'] > 0
    assert row['kinds']['mm'] + row['kinds']['conv'] > 0


def test_a_step_is_a_training_step():
    """train.py's own: it has gradients, an optimizer, and, as the learning rate is 0, the same weights afterwards."""
    c, options = bench_steps.settings('vjepa', 'cpu', *MODELS['vjepa'])
    network, step = bench_steps.trainer(c, options)
    before = [p.clone() for p in network.parameters()]
    step(iter([(bench_steps.smooth_fields(c), None)]))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters()))
    assert all(p.grad.abs().sum() > 0 for p in network.encoder.parameters() if p.ndim > 1)


def test_every_model_has_a_row():
    found = [(c.model, getattr(options, 'encoder', ''), c.preset) for _, c, options in bench_steps.cases('cpu')]
    assert {model for model, _, _ in found} == set(model_names()) and {preset for *_, preset in found} == {'nano'}
    assert [encoder for model, encoder, _ in found if model == 'jepa'] == ['convnext', 'statistics']
    for name in model_names():                                           # on CUDA
        c, options = bench_steps.settings(name, 'cpu', '--preset', 'paper')
        assert bench_steps.size_of(c) == (224, 224) and c.batch == 8 and c.dtype == 'float32'


def test_fields_that_are_no_squares_are_counted_as_they_are():
    """A model that sees whole fields sees 96 x 32 of convection: 3/4 of the points of 64 x 64, of 4 fields of 11."""
    c, options = bench_steps.settings('mpp', 'cpu', '--data', 'rayleigh_benard', '--batch', '2', '--micro-batch', '2')
    assert bench_steps.size_of(c) == (96, 32) == tuple(bench_steps.smooth_fields(c).shape[-2:])
    square, _ = bench_steps.settings('mpp', 'cpu', '--batch', '2', '--micro-batch', '2')
    assert 0.5 < bench_steps.gflop_per_window(c, options) / bench_steps.gflop_per_window(square, options) < 0.75


def test_parts_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.PARTS, 'steps', lambda device: [{'model': device}])
    bench.main(['--device', 'cpu', '--only', 'steps', '--json', str(tmp_path / 'bench.json')])
    found = json.loads((tmp_path / 'bench.json').read_text())
    assert found['steps'] == [{'model': 'cpu'}] and found['rows'] == []
    with pytest.raises(SystemExit):
        bench.main(['--only', 'step'])
