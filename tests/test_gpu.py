"""
Every branch that only a GPU takes: python -m pytest -m gpu. Skipped where there is none; NOTES.md lists them.

DEVICE=cpu runs what can be run without.
"""
import json
import os

import numpy as np
import pytest
import torch

import config
import simulate
import train
from common import on_gpu
from encoders import DepthwiseConv3d
from helpers import BASE, FLUIDS, HERE, MODELS, NANO, RIVALS, TINY, losses, run
from model import load_run
from test_step import AHEAD, batches, miniature

DEVICE = os.environ.get('DEVICE', 'cuda')
NONE = not torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == 'cuda' and NONE, reason='there is no GPU here')]
gpu_only = pytest.mark.skipif(NONE, reason='there is no GPU here')
ON_GPU = ['--device', DEVICE, '--data-dir']


@gpu_only
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', AHEAD)
def test_a_step_never_waits(name, dtype, tmp_path, monkeypatch):
    """PyTorch raises where it would: train.py's step, fused AdamW, noise and the teacher's move included."""
    flags = [*AHEAD[name], '--device', 'cuda', '--dtype', dtype, '--noise', 0.1]
    c, model, x, labels = miniature(flags, monkeypatch, tmp_path)
    model.to('cuda')
    x, labels = x.to('cuda'), labels.to('cuda')
    optimizer = train.optimizer_of(model.network, c)
    assert optimizer.defaults['fused']
    for step in range(3):                                                # the first ones may build what is kept
        torch.cuda.set_sync_debug_mode('error' if step == 2 else 'default')
        try:
            terms = train.train_step(model, model.network, optimizer, batches(c, x, labels), c, step)
            if hasattr(model.network, 'after_step'):
                model.network.after_step(0.5)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    assert all(v.isfinite() and v.is_cuda for v in terms.values())


@gpu_only
def test_batches_arrive_in_order_and_whole():
    """While the GPU is busy, and memory is used again and again."""
    made = [(torch.full((4, 2**20), float(i)).pin_memory(), torch.tensor([i])) for i in range(20)]
    square, seen = torch.randn(4096, 4096, device='cuda'), []
    for x, label in on_gpu(iter(made)):
        square = torch.nn.functional.normalize(square @ square)          # work that the batch has to wait for
        seen.append((x.sum(), label))
        del x, label
    assert [int(label) for _, label in seen] == list(range(20))
    assert [float(total) for total, _ in seen] == [i * 2.0**22 for i in range(20)]


@pytest.mark.parametrize('name', ['jepa', 'nano', *RIVALS])
def test_a_run_on_the_gpu_is_one_on_the_processor(name, well, tmp_path):
    """The first losses; later ones part, as rounding does. Then eval.py, there; and the checkpoint, here."""
    flags = [*(MODELS | {'nano': NANO})[name], '--noise', 0, '--steps', 6, '--log-every', 4]
    run('train.py', *flags, '--data-dir', well, '--device', 'cpu', '--out', 'here', cwd=tmp_path)
    run('train.py', *flags, *ON_GPU, well, '--out', 'there', cwd=tmp_path)
    here, there = (np.array(losses(tmp_path / name)) for name in ('here', 'there'))
    assert np.allclose(there[:3], here[:3], rtol=2e-2, atol=1e-3)
    run('eval.py', 'there', '--device', DEVICE, '--epochs', 3, cwd=tmp_path)
    run('eval.py', 'here', '--device', 'cpu', '--epochs', 3, cwd=tmp_path)
    rows = [json.loads((tmp_path / name / 'eval.json').read_text())['rows'] for name in ('here', 'there')]
    for probe, errors in rows[0]['random init'].items():                 # the weights are the same
        assert rows[1]['random init'][probe] == pytest.approx(errors, rel=0.1, abs=0.02)
    x = torch.randn(2, 11, 16, 32, 32)
    assert torch.allclose(load_run(tmp_path / 'there', DEVICE).embed(x.to(DEVICE)).cpu(),
                          load_run(tmp_path / 'there', 'cpu').embed(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('flags', [['--recompute'], ['--compile'], ['--dtype', 'auto'], ['--cache', 'none']])
def test_ways_to_run(flags, well, tmp_path):
    run('train.py', *BASE, *RIVALS['videomae'], '--model', 'videomae', '--steps', 4, *flags, *ON_GPU, well,
        '--out', 'out', cwd=tmp_path)
    assert np.isfinite(losses(tmp_path / 'out')).all()
    line = json.loads((tmp_path / 'out/log.jsonl').read_text().splitlines()[-1])
    assert 0 < line['memory_gb'] < 40 and 0 <= line['waiting'] <= 1


@gpu_only
def test_bfloat16_is_chosen_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    c, _, _ = config.parse([*map(str, TINY), '--device', 'auto', '--dtype', 'auto'], '')
    assert c.device == 'cuda' and c.dtype == ('bfloat16' if torch.cuda.is_bf16_supported() else 'float32')


@gpu_only
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last_3d])
def test_the_depthwise_convolution(layout):
    ours = DepthwiseConv3d(8).to('cuda', torch.float64)
    x = torch.randn(2, 8, 16, 12, 12, device='cuda', dtype=torch.float64).contiguous(memory_format=layout)
    plain = torch.nn.functional.conv3d(x, ours.weight, ours.bias, padding=3, groups=8)
    torch.testing.assert_close(ours(x), plain)


@gpu_only
@pytest.mark.parametrize('ranks', [1, 2])
def test_ranks_on_gpus(ranks, well, tmp_path):
    """NCCL, each with its GPU: the losses of one process. More than there are is refused in one line."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', HERE / 'train.py']
    flags = [*NANO, '--noise', 0, '--steps', 5, *ON_GPU, well]
    if ranks > torch.cuda.device_count():
        assert 'lower --nproc_per_node' in run(torchrun, *flags, '--out', 'two', cwd=tmp_path, code=1).stderr
        return
    run(torchrun, *flags, '--out', 'ranks', cwd=tmp_path)
    run('train.py', *flags, '--out', 'one', cwd=tmp_path)
    assert np.allclose(losses(tmp_path / 'ranks'), losses(tmp_path / 'one'), rtol=1e-2, atol=1e-3)
    torchrun[-1] = str(HERE / 'eval.py')
    for script in torchrun, 'eval.py':
        run(script, 'one', '--epochs', 2, cwd=tmp_path)
        rows = json.loads((tmp_path / 'one/eval.json').read_text())['rows']
        first = rows if script is torchrun else first
    assert rows['random init']['linear'] == pytest.approx(first['random init']['linear'], rel=1e-2)


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


@gpu_only
def test_noise_is_the_steps_own(tmp_path, monkeypatch):
    """Drawn on the GPU, from (seed, step): the same when made again."""
    c, model, x, labels = miniature([*NANO, '--device', 'cuda', '--noise', 1.0], monkeypatch, tmp_path)
    model.to('cuda')
    sgd = torch.optim.SGD(model.parameters(), 0.0)


    def loss(step):
        return float(train.train_step(model, model.network, sgd, batches(c, x.cuda(), labels), c, step)['loss'])
    assert loss(1) == pytest.approx(loss(1), rel=1e-5) and abs(loss(1) - loss(2)) > 1e-4 * loss(1)
