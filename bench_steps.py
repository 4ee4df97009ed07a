"""
What a training step of each model computes, how fast against this machine's matrix products, and in which kernels.

    python bench.py --only steps        # nano's sizes on CPU, the paper's on CUDA

A step is train.py's own, of one micro-batch: forward, backward, AdamW. (The paper's optimizer steps once in 32 of
these.) FLOP are those of matrix products, convolutions and attention, two for a multiplication with its addition, as
they are executed: what a backward pass computes again counts again, and so do zeros, of which the convolution of
`encoders.DepthwiseConv3d` has many; how many is said below the table. Not counted: everything point by point, norms,
sums, and products with a vector. The rate of matrix products is of square ones in the step's dtype, with as many
threads, in turns with the step; on CUDA PyTorch computes convolutions in TF32 but float32 products in full, so that
float32 convolutions may exceed it, and MPP (all of it) and DISCO (its integration) stay in float32 in any dtype.

Kinds of kernels, shares of the time inside operations (Python's own has no part in it); on CUDA a kernel is of the
kind of the operation that launched it:

    conv    convolutions                             point   point by point, sums and pooling
    mm      matrix products                          copy    copies, gathers, padding, filling
    attn    attention and softmax; where it is written out as products (a learned bias on CPU), its backward is mm
    norm    norms, variances (those written by hand are partly `point`)
    optim   AdamW                                    other   views, autograd's bookkeeping, random numbers
"""
import contextlib
import itertools
import math
import os
import re
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import config
from baselines.disco import WELL
from data import WINDOW
from encoders import ENCODERS, DepthwiseConv3d
from model import DEFAULT, Inputs, build_model, model_names, title
from systems import find_system
from train import optimizer_of, train_step


def seconds(functions, device, repeats=5, warmup=1):
    """Median seconds of each function, called in turns."""
    times = [[] for _ in functions]
    for i in range(warmup + repeats):
        for f, t in zip(functions, times):
            if device == 'cuda':
                torch.cuda.synchronize()
            start = time.perf_counter()
            f()
            if device == 'cuda':
                torch.cuda.synchronize()
            t.append(time.perf_counter() - start)
    return [float(np.median(t[warmup:])) for t in times]


# ---------------------------------------------------------------------------------------------
# FLOP

def convolution_backward(grad, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, wanted,
                         out_shape=None):
    """FLOP, from shapes: each gradient that is wanted, of input and weights, takes as many as the forward pass.

    weight: (C_out, C_in / groups, ...). PyTorch 2.13's own formula counts the weights' gradient `groups` times.
    """
    return sum(wanted[:2]) * 2 * math.prod(weight) * grad[0] * math.prod((x if transposed else grad)[2:])


def attention(q, k, v, *rest, out_shape=None, **settings):
    """FLOP of softmax(q k^T) v, from shapes (B, heads, n, D)."""
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


def attention_backward(grad, q, k, v, *rest, out_shape=None, **settings):
    """q k^T again, and four products for the gradients."""
    return 2 * math.prod(q[:3]) * k[2] * (3 * q[3] + 2 * v[3])


aten = torch.ops.aten
FORMULAS = {aten.convolution_backward: convolution_backward,
            aten._scaled_dot_product_flash_attention_for_cpu: attention,           # which PyTorch's counter leaves out
            aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward}


def count(function, network=None):
    """(FLOP of what a function does, forward and backward; how many of them multiply zeros).

    Zeros: those in the kernels of the network's DepthwiseConv3d, which has a 7 x 7 one for each of T x T pairs of
    frames, zero if they are more than three apart; in all three passes.
    """
    zeros = []

    def note(module, inputs, y):
        (B, C, T, H, W), apart = y.shape, [abs(i - j) for i in range(y.shape[2]) for j in range(y.shape[2])]
        zeros.append((3 if y.requires_grad else 1) * 2 * B * C * H * W * 49 * sum(d > 3 for d in apart))

    layers = [m for m in network.modules() if isinstance(m, DepthwiseConv3d)] if network else []
    hooks = [layer.register_forward_hook(note) for layer in layers]
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        function()
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops(), sum(zeros)


# ---------------------------------------------------------------------------------------------
# kinds of kernels

WHOLE = {'optim': r'^Optimizer\.', 'attn': 'scaled_dot_product|softmax',  # with all they call
         'norm': r'(layer|batch|group|instance)_norm|::(std|var)(_mean)?$'}
KINDS = {'conv': 'conv(?!ert)', 'mm': '::_?(mm|bmm|addmm|baddbmm|mv|addmv|dot|matmul|linear)',
         'copy': '::_?(copy|clone|cat|stack|index|gather|scatter|take|slice_|select_b|fill_|zero|ones|full|empty|to$|'
                 'to_copy|contiguous|constant_pad|reflection_pad|pad|repeat|roll|flip|embedding|resize)',
         'point': '::_?(sum|mean|mse_loss|l1_loss|smooth_l1_loss|avg_pool|cumsum|amax|amin|max|min|all|any)'}
ORDER = 'conv', 'mm', 'attn', 'norm', 'point', 'copy', 'optim', 'other'


def kind_of(names):
    """Kind of an operation, from its name and those of all it is called from, innermost first."""
    for kind, pattern in WHOLE.items():
        if any(re.search(pattern, name) for name in names):
            return kind
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, names[0]))
    return next(found, 'point' if is_pointwise(names[0]) else 'other')


def is_pointwise(name):
    """Does PyTorch tag an operation as pointwise?"""
    packet = getattr(aten, name.removeprefix('aten::'), None) if name.startswith('aten::') else None
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


@contextlib.contextmanager
def quiet():
    """Without stderr, on which PyTorch 2.13's profiler says that it starts and stops."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def shares(function, device):
    """{kind: share of the time in operations} of a function, on CUDA of the time in their kernels."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == 'cuda')
    with quiet(), profile(activities=activities) as found:
        function()
        if device == 'cuda':
            torch.cuda.synchronize()
    times = dict.fromkeys(ORDER, 0.0)
    for event in found.events():
        if event.device_type == DeviceType.CPU:                          # what launches kernels is one as well
            names, parent = [], event
            while parent is not None:
                names.append(parent.name)
                parent = parent.cpu_parent
            times[kind_of(names)] += event.self_device_time_total if device == 'cuda' else event.self_cpu_time_total
    return {kind: t / max(sum(times.values()), 1e-9) for kind, t in times.items()}


# ---------------------------------------------------------------------------------------------
# steps

LABELS = 2                                                               # of each system here


def settings(name, device, *flags):
    """(Config, Options) of a model's nano preset on CPU, of its paper preset on CUDA; flags: train.py's."""
    with tempfile.TemporaryDirectory() as empty:                         # no dataset, and no run
        c, _, options = config.parse(['--model', name, '--preset', 'paper' if device == 'cuda' else 'nano', '--device',
                                      device, '--data-dir', empty, '--out', empty, *map(str, flags)], '')
    c.batch = c.micro_batch
    return c, options


def size_of(c):
    """(H, W) of the fields that a model is trained on."""
    side = c.crop or c.resolution
    return (side, side) if side else find_system(c.data).preset('nano').grid


def trainer(c, options):
    """(network, function that trains it by a step on the next of `batches`); the learning rate is 0: weights stay.

    batches: iterator of (fields (B, C, 32, H, W), labels (B, LABELS), of use if they supervise).
    """
    names = WELL[c.data][2].split()
    periodic = (False, False) if c.crop else find_system(c.data).part(c.whole)[1]
    inputs = Inputs(c.data, names, periodic, size_of(c), c.views == 'paired')
    model = build_model(c.model, options, inputs, [0] * len(names), [1] * len(names), c.seed, c.dtype,
                        LABELS * c.supervised).to(c.device)
    optimizer = optimizer_of(model.network, c)
    for group in optimizer.param_groups:
        group['lr'] = 0.0

    def step(batches):
        train_step(model, model.network, optimizer, batches, c, step=0)
        if hasattr(model.network, 'after_step'):
            model.network.after_step(0.0)
    return model.network, step


def gflop_per_window(c, options):
    """GFLOP of a training step's forward and backward pass, for each of its windows; counted on a step of c's sizes."""
    network, step = trainer(c, options)
    batches = itertools.repeat((smooth_fields(c).to(c.device), torch.zeros(c.batch, LABELS, device=c.device)))
    return count(lambda: step(batches), network)[0] / c.batch / 1e9


def smooth_fields(c):
    """(B, C, 32, H, W): noise on every eighth point, interpolated. DISCO takes more steps if it is rough."""
    (H, W), noise = size_of(c), torch.Generator().manual_seed(0)
    coarse = torch.randn(c.batch, len(WELL[c.data][2].split()), WINDOW // 8, H // 8, W // 8, generator=noise)
    return F.interpolate(coarse, size=(WINDOW, H, W), mode='trilinear')


def measure(what, c, options, repeats):
    """A row of the table: a dict."""
    network, train = trainer(c, options)
    batches = itertools.repeat((smooth_fields(c).to(c.device), None))
    step = lambda: train(batches)
    n = 8192 if c.device == 'cuda' else 1024
    square = torch.randn(n, n, device=c.device, dtype=getattr(torch, c.dtype))
    flop, zeros = count(step, network)                                   # the warm-up as well
    warmup = 1 if c.device == 'cuda' else 0
    step_s, product_s = seconds([step, lambda: square @ square], c.device, repeats, warmup)
    rate, of_products = flop / step_s / 1e9, 2 * n**3 / product_s / 1e9
    return {'model': what, 'dtype': c.dtype, 'windows': c.batch, 'side': size_of(c)[0],
            'gflop_per_window': flop / c.batch / 1e9, 'zeros': zeros / flop, 'windows_per_s': c.batch / step_s,
            'gflop_per_s': rate, 'matmul_gflop_per_s': of_products, 'share_of_matmul': rate / of_products,
            'kinds': shares(step, c.device)}


def cases(device):
    """(what, its Config, its Options) of each model, the default one with each of its encoders."""
    for name in model_names():
        for encoder in ENCODERS if name == DEFAULT else ['']:
            flags = ['--encoder', encoder, '--widths', ','.join(map(str, ENCODERS[encoder].WIDTHS))] if encoder else []
            what = title(name) + f', {encoder}' * bool(encoder)
            c, options = settings(name, device, *flags)
            halves = ['bfloat16'] if device == 'cuda' and torch.cuda.is_bf16_supported() else []
            for dtype in dict.fromkeys([c.dtype, *halves]):
                c.dtype = dtype
                yield what, c, options


def table(device):
    """Print a line for each model, and return the rows."""
    rows = []
    print(f'\n{"training step":17} {"dtype":8} {"windows":>7} {"GFLOP per window, windows/s, GFLOP/s":>26}  matmul '
          + ''.join(f'{kind:>6}' for kind in ORDER))
    for what, c, options in cases(device):
        rows.append(row := measure(what, c, options, repeats=3))
        print(f'{what:17} {c.dtype:8} {row["windows"]:3}x{row["side"]:<3} {row["gflop_per_window"]:10.4g} '
              f'{row["windows_per_s"]:11.4g} {row["gflop_per_s"]:13.4g} {row["share_of_matmul"]:7.0%} '
              + ''.join(f'{row["kinds"][kind]:6.0%}' for kind in ORDER), flush=True)
    rates = [row['matmul_gflop_per_s'] for row in rows]
    print(f'matmul: share of the rate of matrix products, {min(rates):.0f} to {max(rates):.0f} GFLOP/s here; '
          + ', '.join(f'{row["zeros"]:.0%} of the FLOP of {row["model"]} multiply zeros'
                      for row in rows if row['zeros'] and row['dtype'] == rows[0]['dtype']))
    return rows
