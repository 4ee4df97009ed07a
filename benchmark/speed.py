"""
What does a training step compute, and how fast?  python -m benchmark.speed

Steps are train.py's own, of one micro-batch: forward, backward, AdamW; at nano's sizes, on CPU (for
a GPU there is benchmark/gpu.py). FLOP are those of matrix products, convolutions and attention, two
for a multiplication with its addition, as they are executed: the zeros of DepthwiseConv3d count,
too. They are compared with products of square matrices. Memory is that of this process so far.
"""
import functools
import itertools
import math
import tempfile

from common import Parser, machine, peak_memory, script
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import model as models
import train
from baselines.disco import WELL
from data import WINDOW
from jepa import WIDTHS
from systems import find_system

LABELS = 'first', 'second'  # each system here has two

def seconds(function, repeats):
    """Mean seconds of a function, after two calls that do not count."""
    timer = Timer('function()', globals={'function': function}, num_threads=torch.get_num_threads())
    return timer.timeit(repeats).mean

# --- FLOP, from shapes
def convolution_backward(grad, x, weight, bias, *settings, out_shape=None):
    """Each gradient that is wanted takes as many as forward; PyTorch 2.13 says `groups` times."""
    _, _, _, transposed, _, _, wanted = settings
    points = math.prod((x if transposed else grad)[2:])
    return sum(wanted[:2]) * 2 * math.prod(weight) * grad[0] * points

def attention(q, k, v, *rest, out_shape=None, **settings):
    """softmax(q k^T) v of shapes (B, heads, n, D)."""
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])

def attention_backward(grad, q, k, v, *rest, out_shape=None, **settings):
    """q k^T again, and four products for the gradients."""
    return 2 * math.prod(q[:3]) * k[2] * (3 * q[3] + 2 * v[3])

FORMULAS = {                # PyTorch's counter has none for attention on CPU
    torch.ops.aten.convolution_backward: convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward}

def count(function):
    """FLOP of a function, forward and backward."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        function()
    return counter.get_total_flops()

# --- training steps
def settings(name, device, *flags):
    """(Config, Options) of a model, nano's if the flags, train.py's, do not say otherwise."""
    with tempfile.TemporaryDirectory() as empty:                         # no dataset, and no run
        c, _, options = train.parse(['--model', name, '--preset', 'nano', '--device', device,
                                     '--data-dir', empty, '--out', empty, *map(str, flags)], '',
                                    missing=True)
    c.batch = c.micro_batch
    return c, options

def size_of(c):
    """(H, W) of the fields that a model is trained on."""
    side = c.crop or c.resolution
    return (side, side) if side else find_system(c.data).preset('nano').grid

def smooth_fields(c):
    """(B, C, 32, H, W): noise on every eighth point, interpolated. DISCO's steps need it smooth."""
    (H, W), noise = size_of(c), torch.Generator().manual_seed(0)
    shape = c.batch, len(WELL[c.data][2].split()), WINDOW // 8, H // 8, W // 8
    coarse = torch.randn(shape, generator=noise)
    return F.interpolate(coarse, size=(WINDOW, H, W), mode='trilinear')

def trainer(c, options, forms={}):
    """(network, function that trains it by a step on the next of `batches`: {term: mean}).

    batches: iterator of (fields (B, C, 32, H, W), labels (B, 2)); without it, of smooth fields
    again and again. The learning rate is 0: the weights stay. forms: {class: another forward} of
    layers of exactly these classes.
    """
    names = WELL[c.data][2].split()
    periodic = (False, False) if c.crop else find_system(c.data).part(c.whole)[1]
    inputs = models.Inputs(c.data, names, periodic, size_of(c), train.is_paired(c))
    model = models.build_model(c.model, options, inputs, [0] * len(names), [1] * len(names), c.seed,
                               c.dtype, LABELS if c.supervised else ()).to(c.device)

    # as train.py calls it, but for other forms of layers
    for layer in model.network.modules():
        if type(layer) in forms:
            layer.forward = functools.partial(forms[type(layer)], layer)
    models.recompute_blocks(model.network, c.recompute, c.device)
    forward = train.as_stepped(model, c)

    optimizer = train.optimizer_of(model.network, c)
    for group in optimizer.param_groups:
        group['lr'] = 0.0
    batch = (smooth_fields(c).to(c.device), torch.zeros(c.batch, len(LABELS), device=c.device),
             torch.arange(c.batch))

    def step(batches=itertools.repeat(batch)):
        terms = train.train_step(model, forward, optimizer, batches, c, step=0)
        if hasattr(model.network, 'after_step'):
            model.network.after_step(0.0)
        return terms
    return model.network, step

def gflop_per_window(c, options):
    """GFLOP of a training step, forward and backward, for each window; counted at c's sizes."""
    return count(trainer(c, options)[1]) / c.batch / 1e9

def measure(title, c, options, repeats):
    """What a training step takes, beside matrix products of the same dtype: a dict."""
    _, step = trainer(c, options)
    flop, memory = count(step), peak_memory()                            # and it warms up
    n, square = 1024, torch.randn(1024, 1024, dtype=getattr(torch, c.dtype))
    step_s, product_s = seconds(step, repeats), seconds(lambda: square @ square, repeats)
    rate, of_products = flop / step_s / 1e9, 2 * n**3 / product_s / 1e9
    return {'model': title, 'windows': c.batch, 'gflop_per_window': flop / c.batch / 1e9,
            'windows_per_s': c.batch / step_s, 'gflop_per_s': rate, 'memory_gb': memory,
            'matmul_gflop_per_s': of_products, 'share_of_matmul': rate / of_products}

def cases():
    """(title, Config, Options) of each model, the default one with each of its encoders."""
    for name in sorted(models.MODELS):
        if name != models.DEFAULT:
            yield models.title(name), *settings(name, 'cpu')
    for encoder, widths in WIDTHS.items():
        flags = models.DEFAULT, 'cpu', '--encoder', encoder, '--widths', ','.join(map(str, widths))
        yield f'{models.title(models.DEFAULT)}, {encoder}', *settings(*flags)

@script
def main(argv=None):
    Parser(__doc__).parse_args(argv)
    print(f'{machine("cpu")}\n\n{"training step":17} {"windows":>10} {"GFLOP/window":>13} '
          f'{"windows/s":>10} {"GFLOP/s":>9} {"of matmul":>10} {"GB":>6}')
    for title, c, options in cases():
        row, (H, W) = measure(title, c, options, repeats=3), size_of(c)
        print(f'{title:17} {f"{c.batch}x{H}x{W}":>10} {row["gflop_per_window"]:13.4g} '
              f'{row["windows_per_s"]:10.4g} {row["gflop_per_s"]:9.4g} '
              f'{row["share_of_matmul"]:10.0%} {row["memory_gb"]:6.2f}', flush=True)

if __name__ == '__main__':
    main()
