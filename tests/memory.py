"""
What fits on which card?  python tests/memory.py

Counts the bytes of a training step's tensors on the meta device, which has shapes and no values: the paper's sizes
take seconds on any machine. CUDA itself, cuDNN's workspaces and gaps between tensors are not counted. For models with
attention it is too much: the meta device has the form that makes the whole matrix.
"""
import sys
import weakref
from pathlib import Path

import torch
import torch.nn as nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as models
import train
from benchmark import speed
from common import FRAMES, WINDOW


def kept(network, function):
    """Bytes that a function's result keeps for its backward pass: each storage once, without the parameters."""
    own, storages = {p.untyped_storage()._cdata for p in network.parameters()}, {}

    def keep(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


class Memory(TorchDispatchMode):
    """Counts bytes of all tensors on the meta device that are alive: now, and at most so far."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size):
        self.now -= size


def as_autocast(network):
    """Products in bfloat16, norms in float32, as on a GPU. (The meta device has no autocast; float16 is as large.)"""
    for part in network.modules():
        if isinstance(part, nn.LayerNorm):
            part.register_forward_pre_hook(lambda layer, args: (args[0].float(), *args[1:]))
        else:
            for name, p in part.named_parameters(recurse=False):
                p.data = p.data if name == 'gamma' else p.data.bfloat16()
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv3d)) or hasattr(part, 'qkv'):
            part.register_forward_pre_hook(lambda layer, args: (args[0].bfloat16(), *args[1:]))


def peak(c, options):
    """Bytes of a training step of one micro-batch of c.micro_batch windows, at most."""
    names = speed.WELL[c.data][2].split()
    inputs = models.Inputs(c.data, names, (False, False), speed.size_of(c), train.is_paired(c))
    model = models.build_model(c.model, options, inputs, [0] * len(names), [1] * len(names))
    weights = 16 * sum(p.numel() for p in model.parameters())            # float32: with gradients, AdamW's two moments
    if c.dtype in models.LOWER:
        as_autocast(model.network)
    model.to('meta')
    models.recompute_blocks(model.network, c.recompute)

    with Memory() as memory:
        x = model.normalise(torch.empty(c.micro_batch, len(names), WINDOW, *inputs.size, device='meta'))
        x = x + torch.empty_like(x) if c.noise else x
        terms = model.network(x[:, :, :FRAMES], x[:, :, FRAMES:], torch.Generator().manual_seed(0))
        terms['loss'].backward()
        return memory.peak + weights


CASES = [('jepa', dtype, recompute, windows) for dtype, recompute, windows in (
    ('float32', 'no', 8), ('float32', 'mlp', 8), ('float32', 'blocks', 8),
    ('bfloat16', 'no', 8), ('bfloat16', 'mlp', 8), ('bfloat16', 'blocks', 8), ('bfloat16', 'mlp', 1),
    ('bfloat16', 'mlp', 16), ('bfloat16', 'mlp', 32), ('bfloat16', 'mlp', 64))]


def count(name, dtype, recompute, windows):
    """GB of a step of the paper's preset."""
    c, options = speed.settings(name, 'cpu', '--preset', 'paper', '--dtype', dtype, '--recompute', recompute,
                                '--batch', windows, '--micro-batch', windows)
    return peak(c, options) / 1e9


if __name__ == '__main__':
    for case in CASES:
        print(*(f'{word:9}' for word in case), f'{count(*case):6.1f} GB', flush=True)
