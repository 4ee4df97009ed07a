"""speed.py: FLOP against the formulas written out, and each model's step."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmark import speed
from helpers import BASE, MODELS
from jepa import DepthwiseConv3d
from model import MODELS as model_names


def both_ways(function, *shapes, inputs=True):
    """FLOP of a function of tensors and its gradients, by the counter."""
    tensors = [torch.randn(s, requires_grad=inputs) for s in shapes]
    return speed.count(lambda: function(*tensors).sum().backward())


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


@pytest.mark.parametrize('frames', [16, 4])
def test_flop_of_the_depthwise_convolution(frames):
    """T x T kernels of 7 x 7, with those that are zero, more than three frames apart."""
    x = torch.randn(2, 3, frames, 8, 8, requires_grad=True)
    layer = nn.Sequential(DepthwiseConv3d(3))
    each = 3 * 2 * 2 * 3 * 8 * 8 * 49
    assert speed.count(lambda: layer(x).sum().backward()) == each * frames**2


@pytest.mark.parametrize('name', model_names)
def test_a_step_of_each_model(name):
    """In miniature; a new model is measured without a word of it here."""
    c, options = speed.settings(name, 'cpu', *MODELS.get(name, [*BASE, '--model', name]), '--batch', 4,
                                      '--micro-batch', 4)
    row = speed.measure(name, c, options, repeats=1)
    assert row['windows'] == 4 and row['gflop_per_window'] > 0
    assert row['gflop_per_s'] == pytest.approx(row['gflop_per_window'] * row['windows_per_s'])
    assert row['share_of_matmul'] == pytest.approx(row['gflop_per_s'] / row['matmul_gflop_per_s'])


def test_a_step_is_a_training_step():
    """train.py's own: it has gradients, an optimizer, and, as the learning rate is 0, the same weights afterwards."""
    c, options = speed.settings('vjepa', 'cpu', *MODELS['vjepa'])
    network, step = speed.trainer(c, options)
    before = [p.clone() for p in network.parameters()]
    step(iter([(speed.smooth_fields(c), None, None)]))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters()))
    assert all(p.grad.abs().sum() > 0 for p in network.encoder.parameters() if p.ndim > 1)


def test_every_model_has_a_row():
    found = [(c.model, getattr(options, 'encoder', ''), c.preset) for _, c, options in speed.cases()]
    assert {model for model, _, _ in found} == set(model_names) and {preset for *_, preset in found} == {'nano'}
    assert [encoder for model, encoder, _ in found if model == 'jepa'] == ['convnext', 'statistics']
    for name in model_names:                                           # on CUDA
        c, options = speed.settings(name, 'cpu', '--preset', 'paper')
        assert speed.size_of(c) == (224, 224) and c.batch == 8 and c.dtype == 'float32'


def test_fields_that_are_no_squares_are_counted_as_they_are():
    """A model that sees whole fields sees 96 x 32 of convection: 3/4 of the points of 64 x 64, of 4 fields of 11."""
    c, options = speed.settings('mpp', 'cpu', '--data', 'rayleigh_benard', '--batch', '2', '--micro-batch', '2')
    assert speed.size_of(c) == (96, 32) == tuple(speed.smooth_fields(c).shape[-2:])
    square, _ = speed.settings('mpp', 'cpu', '--batch', '2', '--micro-batch', '2')
    assert 0.5 < speed.gflop_per_window(c, options) / speed.gflop_per_window(square, options) < 0.75


def test_what_is_printed(monkeypatch, capsys):
    """The table of steps."""
    monkeypatch.setattr(speed, 'cases', lambda: [('V-JEPA', *speed.settings(
        'vjepa', 'cpu', *MODELS['vjepa'], '--batch', 4, '--micro-batch', 4))])
    times = iter((2.0, 1.0))                                             # step, product
    monkeypatch.setattr(speed, 'seconds', lambda function, repeats: next(times))
    speed.main([])
    said = capsys.readouterr().out.splitlines()
    row = next(line for line in said if line.startswith('V-JEPA')).split()
    assert row[1] == '4x32x32' and float(row[3]) == 2 and row[5].endswith('%') and len(row) == 7
