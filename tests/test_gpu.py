"""
Every branch that only a GPU takes: python -m pytest -m gpu. Skipped where there is none; docs/speed.md lists them.

DEVICE=cpu runs what can be run without.
"""
import json
import os
import subprocess

import numpy as np
import pytest
import torch

import simulate
import train
from jepa import DepthwiseConv3d
from helpers import BASE, FLUIDS, HERE, MODELS, NANO, RIVALS, TINY, command, losses, run
from model import Inputs, Model, load_run

DEVICE = os.environ.get('DEVICE', 'cuda')
NONE = not torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == 'cuda' and NONE, reason='there is no GPU here')]
gpu_only = pytest.mark.skipif(NONE, reason='there is no GPU here')
ON_GPU = ['--device', DEVICE, '--data-dir']


@pytest.mark.parametrize('name', ['jepa', 'nano', *RIVALS])
def test_a_run_on_the_gpu_is_one_on_the_processor(name, well, tmp_path):
    """In double precision: losses, then eval.py and fine-tuning there, and the checkpoint here."""
    flags = [*(MODELS | {'nano': NANO})[name], '--dtype', 'float64', '--noise', 0, '--steps', 6]
    run('train.py', *flags, '--data-dir', well, '--device', 'cpu', '--out', 'here', cwd=tmp_path)
    run('train.py', *flags, *ON_GPU, well, '--out', 'there', cwd=tmp_path)
    assert np.allclose(losses(tmp_path / 'there'), losses(tmp_path / 'here'), rtol=1e-4, atol=1e-7)
    rows = []
    for device in 'cpu', DEVICE:
        run('eval.py', 'there', '--device', device, '--epochs', 3, '--finetune', 1, cwd=tmp_path)
        rows.append(json.loads((tmp_path / 'there/eval.json').read_text())['rows'])
    for row, errors in rows[0].items():
        for probe, by_label in errors.items():
            assert rows[1][row][probe] == pytest.approx(by_label, rel=0.02, abs=1e-3), (row, probe)
    x = torch.randn(2, 11, 16, 32, 32, dtype=torch.float64)
    assert torch.allclose(load_run(tmp_path / 'there', DEVICE).embed(x.to(DEVICE)).cpu(),
                          load_run(tmp_path / 'there', 'cpu').embed(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('flags', [['--recompute'], ['--recompute', 'mlp'], ['--compile'], ['--dtype', 'auto'],
                                   ['--dtype', 'float16']])
def test_ways_to_run(flags, well, tmp_path):
    run('train.py', *BASE, *RIVALS['videomae'], '--model', 'videomae', '--steps', 4, *flags, *ON_GPU, well,
        '--out', 'out', cwd=tmp_path)
    assert np.isfinite(losses(tmp_path / 'out')).all()
    line = json.loads((tmp_path / 'out/log.jsonl').read_text().splitlines()[-1])
    assert 0 < line['memory_gb'] < 40


def test_the_papers_jepa_compiled(well, tmp_path):
    """Its embedding is kept as a copy: a view of the network's output crashed PyTorch."""
    run('train.py', *TINY, '--views', 'paired', '--standardize', 'false', '--residual', 'false', '--steps', 3, '--compile',
        *ON_GPU, well, '--out', 'out', cwd=tmp_path)
    assert np.isfinite(losses(tmp_path / 'out')).all()


@gpu_only
def test_bfloat16_is_chosen_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    c, _, _ = train.parse([*map(str, TINY), '--device', 'auto', '--dtype', 'auto'], '')
    assert c.device == 'cuda' and c.dtype == (
        'bfloat16' if torch.cuda.get_device_capability() >= (8, 0) else 'float16')


@gpu_only
@pytest.mark.parametrize('dtype, error', [(torch.float64, 1e-12), (torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last_3d])
def test_the_depthwise_convolution(layout, dtype, error):
    """And its gradients, against PyTorch's on the CPU."""
    layer = DepthwiseConv3d(8).to(dtype).double()
    there = DepthwiseConv3d(8).to('cuda', dtype)
    there.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 16, 12, 12, dtype=dtype).contiguous(memory_format=layout)
    b, a = x.cuda().requires_grad_(), x.double().requires_grad_()        # a may be x itself
    expected = torch.nn.functional.conv3d(a, layer.weight, layer.bias, padding=3, groups=8)
    found = there(b)
    expected.square().sum().backward()
    found.float().square().sum().backward() if dtype != torch.float64 else found.square().sum().backward()
    for ours, plain in (found, expected), (b.grad, a.grad), (there.weight.grad, layer.weight.grad):
        assert (ours.cpu().double() - plain).norm() < error * plain.norm()


@gpu_only
def test_precision_is_the_official_trainers():
    """TF32 in convolutions, but full float32 in matrix products."""
    a, b = torch.randn(2, 512, 512, device='cuda')
    exact = a.double() @ b.double()
    assert ((a @ b).double() - exact).norm() < 1e-6 * exact.norm()
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@gpu_only
def test_more_ranks_than_gpus_are_refused(well, tmp_path):
    ranks = torch.cuda.device_count() + 1
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', HERE / 'train.py']
    p = subprocess.run(**command(torchrun, *NANO, *ON_GPU, well, '--micro-batch', ranks, '--batch', ranks),
                       cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert p.returncode == 1 and 'lower --nproc_per_node' in p.stderr


@gpu_only
def test_what_ranks_say_over_nccl(tmp_path):
    """One process alone is enough for what train.py asks of NCCL."""
    (tmp_path / 'alone.py').write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import torch, common, vicreg
import torch.distributed as dist
torch.cuda.set_device(0)
dist.init_process_group('nccl', init_method='tcp://127.0.0.1:29751', world_size=1, rank=0)
total = torch.full((3,), 1.5, dtype=torch.float64, device='cuda')
dist.all_reduce(total)
common.WORLD = 1 + 1
assert total.tolist() == [1.5] * 3 and common.from_rank_0(dict(a=torch.ones(2)))['a'].tolist() == [1, 1]
z = torch.randn(4, 3, device='cuda', requires_grad=True)
vicreg.Gather.apply(z).square().sum().backward()
assert torch.equal(z.grad, 2 * z)
net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2).cuda())
with net.no_sync():
    net(z.detach()).sum().backward()
net(z.detach()).sum().backward()
dist.destroy_process_group()
""")
    run([tmp_path / 'alone.py'], cwd=tmp_path)


@gpu_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='there is one GPU')
def test_ranks_on_gpus(well, tmp_path):
    """Two, each with its GPU: training as in one process, evaluation too."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    flags = [*NANO, '--dtype', 'float64', '--noise', 0, '--steps', 5, *ON_GPU, well]
    run([*torchrun, HERE / 'train.py'], *flags, '--out', 'two', cwd=tmp_path)
    run('train.py', *flags, '--out', 'one', cwd=tmp_path)
    assert np.allclose(losses(tmp_path / 'two'), losses(tmp_path / 'one'), rtol=1e-4, atol=1e-7)
    rows = []
    for script in [HERE / 'eval.py'], [*torchrun, HERE / 'eval.py']:
        run(script, 'one', '--epochs', 2, cwd=tmp_path)
        rows.append(json.loads((tmp_path / 'one/eval.json').read_text())['rows']['random init']['linear'])
    assert rows[0] == pytest.approx(rows[1], rel=1e-2)


@pytest.mark.parametrize('name', ['active_matter', *FLUIDS])
def test_the_solvers(name):
    """A few steps from the same start end in the same fields."""
    p = simulate.find_system(name).preset('smoke')
    keys, pairs = [[0, 0, 0, 0], [0, 0, 1, 0]], p.pairs[:2]
    fields = []
    for device in 'cpu', DEVICE:
        solver = simulate.find_system(name).solver(pairs, keys, p, device)
        solver.advance(simulate.find_system(name).dt_save)
        fields.append({k: v.cpu() for k, v in solver.fields().items()})
    for k, there in fields[1].items():
        scale = fields[0][k].abs().max() + 1e-6
        assert (there - fields[0][k]).abs().max() < 1e-3 * scale, k


@gpu_only
def test_memory_and_name_are_the_gpus():
    from common import machine, peak_memory, pick_device
    torch.zeros(2**28, device='cuda')
    assert pick_device('auto') == 'cuda' and peak_memory() >= 2**30 / 1e9
    assert torch.cuda.get_device_name() in machine('cuda')


class Mean(torch.nn.Module):
    """A network whose loss is the mean of what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, context, target, generator):
        return {'loss': self.weight * context.mean()}


@gpu_only
def test_noise_is_the_steps_own():
    """Drawn on the GPU, from (seed, step): the same when made again, another in another step."""
    c = train.Config(batch=2, micro_batch=2, noise=1.0, device='cuda', dtype='float32')
    model = Model(Mean(), Inputs('any', ['a'], (True, True), (16, 16)), [0], [1]).to('cuda')
    sgd, x = torch.optim.SGD(model.parameters(), 0.0), torch.zeros(2, 1, 32, 16, 16, device='cuda')
    loss = lambda step: float(train.train_step(model, model.network, sgd, iter([(x, None, None)]), c, step)['loss'])
    assert loss(1) == loss(1) != loss(2) and loss(1) != 0
