"""
Everything that must stay true: python -m pytest test_all.py (a few minutes on two CPU cores).

Nothing outside this folder is read; what the tests write goes to pytest's temporary folder. The test of
The Well's own reader is skipped unless the package `the_well` is installed.

testdata/parity_*.npz hold outputs of the paper's official code, its weights and inputs filled by the
formula in `filled` below. Per case and output: <case>/<output>/float32 and .../float64, flattened, and
.../check = [largest allowed absolute error in float32, in float64, stride of the stored elements].
"""
import argparse
import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import probe
import simulate
import solvers
import train
import videomae
from baselines import mpp
from baselines.disco import DISCO
from jepa import JEPA, DepthwiseConv3d, Encoder, Predictor, load_official
from vicreg import covariance_loss, variance_loss, vicreg_loss, vicreg_loss_maps
from videomae import VideoMAE

HERE = Path(__file__).resolve().parent
PARITY = {k: v for file in (HERE / 'testdata').glob('parity_*.npz') for k, v in np.load(file).items()}
both_dtypes = pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])


# ---------------------------------------------------------------------------------------------
# parity with the official implementation

def filled(key, shape, is_input=False):
    """The tensor called `key` in the reference run: a pseudo-random cosine, float32."""
    n, c, prime = math.prod(shape), zlib.crc32(key.encode()), 1000003
    v = np.cos(0.7 * ((np.arange(n) + c % prime)**2 % prime) + c / 2**32 * 6.283185307179586)
    if not is_input:
        if len(shape) >= 2:
            v = v / math.sqrt(n / shape[0])
        elif key.split('.')[-1] in ('gamma', 'gamma_att', 'gamma_mlp'):
            v = 0.5 + 0.1 * v
        else:
            v = 0.1 * v + (1 if key.endswith('weight') else 0)
    return torch.tensor(v.reshape(shape), dtype=torch.float32)


def fill(module, dtype, official_name=lambda key: key):
    """The module with the reference run's weights; `official_name` maps our parameter names to its."""
    module.load_state_dict({k: filled(official_name(k), v.shape) for k, v in module.state_dict().items()})
    return module.to(dtype)


def inputs(dtype, **shapes):
    return [filled(key, shape, is_input=True).to(dtype).requires_grad_() for key, shape in shapes.items()]


def check_parity(case, **outputs):
    """Every output is within the stored tolerance of the official one of its dtype."""
    for name, ours in outputs.items():
        ours = torch.as_tensor(ours).detach()
        dtype = str(ours.dtype).removeprefix('torch.')
        *atols, stride = PARITY[f'{case}/{name}/check']
        theirs, ours = PARITY[f'{case}/{name}/{dtype}'], ours.flatten()[::int(stride)].numpy()
        assert ours.shape == theirs.shape, name
        error = np.abs(ours - theirs).max()
        assert error <= atols[dtype == 'float64'], f'{case}, {name}, {dtype}: off by {error:.1e}'


@both_dtypes
@pytest.mark.parametrize('case, network, shape, size', [
    ('jepa_encoder', lambda: Encoder(11), (2, 11, 16, 32, 32), 2_468_720),
    ('jepa_encoder_4ch', lambda: Encoder(4), (1, 4, 16, 48, 32), 2_466_928),
    ('jepa_predictor', lambda: Predictor(128), (2, 128, 4, 4), 801_664)], ids=['encoder', 'encoder-4', 'predictor'])
def test_network_is_the_official_one(case, network, shape, size, dtype):
    x, = inputs(dtype, input=shape)
    network = fill(network(), dtype)
    with torch.no_grad():
        check_parity(case, out=network(x))
    assert sum(p.numel() for p in network.parameters()) == size


@both_dtypes
@pytest.mark.parametrize('case, shape, loss', [
    ('vicreg', (200, 128), vicreg_loss),
    ('vicreg_3d', (2, 128, 1, 4, 4), lambda x, y: vicreg_loss_maps(x[:, :, 0], y[:, :, 0], chunks=1)),
    ('vicreg_3d_chunks', (3, 128, 1, 6, 7), lambda x, y: vicreg_loss_maps(x[:, :, 0], y[:, :, 0], chunks=5)),
], ids=['rows', 'maps', 'chunks'])
def test_vicreg_is_the_official_one(case, shape, loss, dtype):
    """Terms and gradients into both branches; rows of maps in sample, height, width order, cut as torch.chunk does."""
    x, y = inputs(dtype, x=shape, y=shape)
    losses = loss(x, y)
    grad_x, grad_y = torch.autograd.grad(losses['loss'], (x, y))
    check_parity(case, loss=losses['loss'], repr_loss=losses['sim'], std_loss=losses['std'], cov_loss=losses['cov'],
                 grad_x=grad_x, grad_y=grad_y, grad_x_norm=grad_x.norm(), grad_y_norm=grad_y.norm())
    if case == 'vicreg':
        check_parity(case, std_loss_x=variance_loss(x), std_loss_y=variance_loss(y),
                     cov_loss_x=covariance_loss(x), cov_loss_y=covariance_loss(y))


@both_dtypes
def test_training_step_is_the_official_one(dtype):
    """Both encoder passes, predictor, loss, and gradients through both branches."""
    model = JEPA(4, chunks=1)
    fill(model, dtype, lambda key: key.split('.', 1)[1])                 # official keys have no encoder., predictor.
    context, target = inputs(dtype, context=(2, 4, 16, 32, 32), target=(2, 4, 16, 32, 32))
    losses = model(context, target)
    losses['loss'].backward()
    with torch.no_grad():
        z, z_next = model.encoder(context), model.encoder(target)
        check_parity('jepa_step', context_embedding=z, target_embedding=z_next, prediction=model.predictor(z))
    assert torch.allclose(model.embedding, z_next, atol=1e-4)            # what the log's rank is computed from
    parameters = dict(model.named_parameters())
    norms = [parameters[k].grad.norm() for k in PARITY['jepa_step/grad_norms/keys']]
    check_parity('jepa_step', loss=losses['loss'], repr_loss=losses['sim'], std_loss=losses['std'],
                 cov_loss=losses['cov'], grad_norms=torch.stack(norms))


@both_dtypes
def test_attentive_probe_is_the_official_one(dtype):
    def official(key):
        layer, _, rest = key.partition('.')
        block = 'pooler.cross_attention_block.'
        layers = {'query': 'pooler.query_tokens', 'norm1': block + 'norm1', 'norm2': block + 'norm2',
                  'linear': 'linear',
                  'q': block + 'xattn.q', 'kv': block + 'xattn.kv', 'fc1': block + 'mlp.fc1', 'fc2': block + 'mlp.fc2'}
        return layers[layer] + (rest and '.' + rest)

    tokens, = inputs(dtype, input=(2, 16, 128))
    ours = fill(probe.AttentiveProbe(128, 2, mlp_ratio=12.0, heads=8), dtype, official)
    assert sum(p.numel() for p in ours.parameters()) == 445_314
    check_parity('attentive_probe', pooled=ours.pool(tokens), out=ours(tokens))


SMALL = {'widths': (2, 2, 4, 4, 8), 'blocks': (1, 1, 1, 1, 1)}


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_official_checkpoints_load(tmp_path, prefix):
    """As they are, and as DistributedDataParallel names them."""
    published, model = JEPA(3, **SMALL).encoder, JEPA(3, **SMALL)
    torch.save({prefix + k: v for k, v in published.state_dict().items()}, tmp_path / 'ConvEncoder_0.pth')
    load_official(model, tmp_path / 'ConvEncoder_0.pth')
    for k, v in published.state_dict().items():
        assert torch.equal(v, model.encoder.state_dict()[k]), k


@pytest.mark.parametrize('fault', ['missing', 'extra', 'shape'])
def test_official_checkpoints_of_another_model_are_refused(tmp_path, fault):
    model, key = JEPA(3, **SMALL), 'res_blocks.2.0.pwconv1.weight'
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: torch.full_like(v, 7.0) for k, v in model.encoder.state_dict().items()}
    if fault == 'missing':
        del state[key]
    elif fault == 'extra':
        key = 'head.weight'
        state[key] = torch.zeros(3)
    else:
        state[key] = state[key][:-1]
    torch.save(state, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=re.escape(key)):
        load_official(model, tmp_path / 'other.pth')
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())       # not half loaded


# ---------------------------------------------------------------------------------------------
# what nano adds to the paper's objective

def test_standardize_settles_the_variance_term():
    """Whatever the scale of the embedding: the loss's variance term is zero, its invariance term that of z-scores."""
    model, x = JEPA(3, **SMALL, chunks=1).double(), torch.randn(2, 4, 3, 16, 32, 32, dtype=torch.float64)
    assert model(*x)['std'] > 0.1
    model.standardize = True
    before = model(*x)
    assert before['std'] < 1e-3 and 0.5 < before['sim'] < 4
    for block in model.encoder.res_blocks[-1], model.encoder.downsample_layers[-1]:
        for p in block.parameters():
            p.data.mul_(5)                                               # rescales the embedding, mostly
    assert model(*x)['std'] < 1e-3


def test_residual_predictor_and_random_partners():
    """With nothing predicted the residual leaves the context; positions are then compared with themselves or not."""
    model, x = JEPA(3, **SMALL, residual=True, chunks=1), torch.randn(2, 3, 16, 32, 32)
    for p in model.predictor.parameters():
        p.data.zero_()
    sim = lambda: model(x, x, torch.Generator().manual_seed(0))['sim'].item()
    assert sim() < 1e-10
    model.paired = False
    assert sim() > 1e-3


# ---------------------------------------------------------------------------------------------
# loss and layers against their definitions

def test_vicreg_is_its_formula():
    """The sums of the paper, written out element by element."""
    torch.manual_seed(0)
    N, D = 7, 3
    x, y = torch.randn(N, D, dtype=torch.float64), 0.5 * torch.randn(N, D, dtype=torch.float64)

    def variance(z):
        return sum(max(0, 1 - math.sqrt(sum((z[n, j] - z[:, j].mean())**2 for n in range(N)) / N + 1e-4))
                   for j in range(D)) / D / 2

    def covariance(z):
        entry = lambda i, j: sum((z[n, i] - z[:, i].mean()) * (z[n, j] - z[:, j].mean()) for n in range(N)) / (N - 1)
        return sum(entry(i, j)**2 for i in range(D) for j in range(D) if i != j) / D

    sim = sum((x[n, j] - y[n, j])**2 for n in range(N) for j in range(D)) / (N * D)
    std, cov = variance(x) + variance(y), covariance(x) + covariance(y)
    expected = {'sim': sim, 'std': std, 'cov': cov, 'loss': 3 * sim + 5 * std + 7 * cov}
    losses = vicreg_loss(x, y, sim_coeff=3, std_coeff=5, cov_coeff=7)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=1e-12), name


def test_vicreg_chunks_are_drawn_from_all_rows():
    """A generator shuffles x and y alike: one chunk is unaffected, several differ from those in order."""
    x, y = torch.randn(2, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = lambda seed: seed and torch.Generator().manual_seed(seed)
    loss = lambda chunks, seed: vicreg_loss_maps(x, y, chunks=chunks, generator=generator(seed))
    assert loss(1, 1)['loss'] == pytest.approx(loss(1, None)['loss'].item(), rel=1e-12)
    assert loss(4, 1)['loss'] != pytest.approx(loss(4, None)['loss'].item(), rel=1e-3)
    assert loss(4, 1)['loss'] == loss(4, 1)['loss']
    assert loss(4, 1)['sim'] == pytest.approx(loss(4, None)['sim'].item(), rel=1e-12)  # pairs stay together


@pytest.mark.parametrize('T', [2, 4, 8, 16])
def test_depthwise_convolution_is_conv3d(T):
    """The folded 2-D form gives Conv3d's values and its gradients of input, weight and bias."""
    torch.manual_seed(T)
    ours, theirs = DepthwiseConv3d(3).double(), torch.nn.Conv3d(3, 3, 7, padding=3, groups=3).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, T, 6, 5, dtype=torch.float64, requires_grad=True)
    weigh = torch.randn(2, 3, T, 6, 5, dtype=torch.float64)
    a, b = ours(x), theirs(x)
    assert torch.allclose(a, b, rtol=0, atol=1e-12)
    for g, h in zip(torch.autograd.grad((a * weigh).sum(), [x, ours.weight, ours.bias]),
                    torch.autograd.grad((b * weigh).sum(), [x, theirs.weight, theirs.bias])):
        assert torch.allclose(g, h, rtol=0, atol=1e-11)


# ---------------------------------------------------------------------------------------------
# the solver of active matter

def wavenumbers(N):
    k = 2 * np.pi / solvers.BOX * np.fft.fftfreq(N, 1 / N)
    return k[:, None], k[None, :]


def derivatives(f):
    """Spectral (d/dx, d/dy) of a real periodic (..., N, N) array on the simulation's box; x is the first axis."""
    kx, ky = wavenumbers(f.shape[-1])
    return [np.fft.ifft2(1j * k * np.fft.fft2(f)).real for k in (kx, ky)]


def developed(N=32, alpha=-3.0, zeta=9.0, dt=0.01, steps=20, wavy=0.0, amplitude=0.6, seed=0):
    """A solver in float64 after some steps from a strongly nonlinear state; c = 1 + wavy cos cos."""
    c, m = solvers.active_matter_start(N, seed, torch.float64, amplitude=amplitude)
    x = torch.arange(N, dtype=torch.float64) * 2 * math.pi / N
    c = c + wavy * torch.cos(x)[:, None] * torch.cos(2 * x)
    solver = solvers.ActiveMatter([alpha], [zeta], c[None], m[None], dt)
    for _ in range(steps):
        solver.step()
    return solver


def numpy_fields(solver):
    return {name: f[0].numpy() for name, f in solver.moments().items()}


@pytest.mark.parametrize('wave', [(1, 0), (0, 2), (1, 1), (2, -1)])
def test_linear_growth_rates(wave):
    """Small waves of the isotropic state grow as the linearised equations say.

    With c = 1 and m4 = O(m^2), m_t = e + zeta m + d_T lap m - 4 d_R m. A wave whose rods lie along or across
    k (longitudinal: m ~ exp(2i phi), phi the direction of k) drives no flow, e = 0. One at 45 degrees
    (transverse: m ~ i exp(2i phi)) drives a shear with e = -s/2, where s = (alpha/2 - zeta beta/4) m + beta/4 e
    is the stress, so e (1 + beta/8) = (-alpha/4 + zeta beta/8) m.
    """
    N, dt, steps, beta = 16, 1e-3, 40, solvers.BETA
    kx, ky = (2 * np.pi / solvers.BOX * k for k in wave)
    x = np.arange(N) * solvers.BOX / N
    ripple = 1e-7 * np.cos(kx * x[:, None] + ky * x)
    along = np.exp(2j * math.atan2(ky, kx))
    pairs = [(a, z) for a in (-1.0, -5.0) for z in (1.0, 9.0)]
    alpha, zeta = (np.repeat(v, 2) for v in zip(*pairs))                 # longitudinal, transverse for each pair
    direction = np.tile([along, 1j * along], len(pairs))[:, None, None]
    m = torch.tensor(direction * ripple)
    solver = solvers.ActiveMatter(alpha, zeta, torch.ones(m.shape, dtype=torch.float64), m, dt)
    size = lambda: ((solver.moments()['m'].numpy() / direction).real * ripple).sum((1, 2))
    before = size()
    for _ in range(steps):
        solver.step()
    measured = np.log(size() / before) / (steps * dt)
    longitudinal = zeta - 4 * solvers.D_R - solvers.D_T * (kx**2 + ky**2)
    transverse = longitudinal + (-alpha / 4 + zeta * beta / 8) / (1 + beta / 8)
    expected = np.where(np.arange(len(alpha)) % 2, transverse, longitudinal)
    assert np.allclose(measured, expected, rtol=1e-4), (measured, expected)


def test_concentration_is_conserved():
    """It moves and diffuses, but none is made."""
    start, end = (numpy_fields(developed(wavy=0.2, steps=steps))['c'] for steps in (0, 40))
    assert abs(end.mean() - start.mean()) < 1e-13
    assert np.abs(end - start).max() > 1e-2


def test_flow_is_incompressible_and_strain_is_its_gradient():
    f = numpy_fields(developed(wavy=0.2))
    (u_x, u_y), (v_x, v_y) = derivatives(f['u']), derivatives(f['v'])
    assert np.abs(u_x).max() > 1e-2                                      # there is a flow
    assert np.abs(u_x + v_y).max() < 1e-13
    assert abs(f['u'].mean()) < 1e-14 and abs(f['v'].mean()) < 1e-14
    assert np.allclose(f['e'].real, u_x, atol=1e-13) and np.allclose(f['e'].imag, (u_y + v_x) / 2, atol=1e-13)


def test_stokes_forces_balance():
    """curl div Sigma + lap w = 0 on resolved modes, with the full stress, which contains the strain rate itself."""
    f = numpy_fields(developed(wavy=0.2))
    c, m, e, N = f['c'], f['m'], f['e'], f['c'].shape[0]
    m4 = solvers.fourth_moment(torch.tensor(c), torch.tensor(m)).numpy()
    alpha, zeta, beta = -3.0, 9.0, solvers.BETA
    stress = alpha / 2 * m + beta / 4 * (e * c + e.conj() * m4) - zeta * beta / 4 * (c * m - m.conj() * m4)
    kx, ky = wavenumbers(N)
    kept = np.maximum(np.abs(kx), np.abs(ky)) < 2 * np.pi / solvers.BOX * N / 4      # inside the 2/3 rule's square
    xx, xy, u, v = (np.fft.fft2(g) * kept for g in (stress.real, stress.imag, f['u'], f['v']))
    curl = -(kx**2 - ky**2) * xy + 2 * kx * ky * xx
    drag = -(kx**2 + ky**2) * (1j * kx * v - 1j * ky * u)
    assert np.abs(curl + drag).max() < 1e-5 * np.abs(drag).max()


def test_solver_follows_the_equations_of_motion():
    """One small step changes c and m as the equations on top of simulate.py say, every nonlinear term included."""
    zeta, dt, solver = 9.0, 1e-3, developed(N=48, amplitude=0.3, wavy=0.2, steps=2)
    laplacian = lambda f: sum(derivatives(d)[i] for i, d in enumerate(derivatives(f)))
    both = lambda g, m: g(m.real) + 1j * g(m.imag)

    def tendency(f):
        c, m, e = f['c'], f['m'], f['e']
        advect = lambda g: sum(v * d for v, d in zip((f['u'], f['v']), derivatives(g)))
        w, A = derivatives(f['v'])[0] - derivatives(f['u'])[1], e + zeta * m
        m4 = solvers.fourth_moment(torch.tensor(c), torch.tensor(m)).numpy()
        return (solvers.D_T * laplacian(c) - advect(c), -both(advect, m) + 1j * w * m + A * c - A.conj() * m4
                + solvers.D_T * both(laplacian, m) - 4 * solvers.D_R * m)

    before = numpy_fields(solver)
    again = solvers.ActiveMatter([-3.0], [zeta], *(torch.tensor(before[k])[None] for k in 'cm'), dt)
    again.step()
    after = numpy_fields(again)
    for k, old, new in zip('cm', tendency(before), tendency(after)):
        change = (after[k] - before[k]) / dt                             # the mean of both ends, to second order
        assert np.abs(change - (old + new) / 2).max() < 1e-3 * np.abs(change).max(), k


@pytest.mark.parametrize('N', [24, 32])
def test_solver_commutes_with_quarter_turns(N):
    """Turning the start turns everything: grids by rot90 (x, y -> -y, x), m by exp(i pi), (u, v) to (-v, u)."""
    c, m = solvers.active_matter_start(N, 0, torch.float64, amplitude=0.3)
    turn = lambda f: torch.rot90(f, dims=(-2, -1))
    c, m = torch.stack([c, turn(c)]), torch.stack([m, -turn(m)])
    solver = solvers.ActiveMatter([-3.0, -3.0], [5.0, 5.0], c, m, dt=0.02)
    for _ in range(10):
        solver.step()
    f = solver.moments()
    for ours, expected in (f['m'][1], -f['m'][0]), (f['u'][1], -f['v'][0]), (f['v'][1], f['u'][0]):
        assert torch.allclose(ours, turn(expected), rtol=0, atol=1e-11), 'do x and y keep the same wavenumbers?'


def test_closure_limits():
    """Isotropic: |m4| / c -> r^2 / 2. Perfectly aligned: m4 = m^2 / c."""
    c, phase = torch.tensor([0.7, 1.0, 1.3], dtype=torch.float64), torch.tensor([0.3, 2.0, -1.0], dtype=torch.float64)
    m4 = lambda r: solvers.fourth_moment(c, torch.polar(r * c, phase))
    assert torch.allclose(m4(1e-4), torch.polar(c * 1e-8 / 2, 2 * phase), rtol=1e-5, atol=0)
    assert torch.allclose(m4(1.0), torch.polar(c, 2 * phase), rtol=1e-5, atol=0)


@pytest.mark.parametrize('kappa', [0.1, 1.0, 3.0, 10.0, 100.0])
def test_closure_is_the_bingham_distribution(kappa):
    theta = torch.arange(4000, dtype=torch.float64) * 2 * math.pi / 4000
    psi = torch.exp(kappa * (torch.cos(2 * (theta - 0.4)) - 1))
    psi = 1.2 * psi / psi.sum()
    moment = lambda n: (psi * torch.exp(1j * n * theta)).sum().view(1)
    assert abs(solvers.fourth_moment(psi.sum().view(1), moment(2)) - moment(4)) < 1e-5


def test_second_order_in_time():
    """Halving the time step divides the error by four."""
    a, b, c = (np.concatenate([f['m'].ravel(), f['u'].ravel()]) for f in
               (numpy_fields(developed(N=16, dt=0.2 / n, steps=n, wavy=0.1)) for n in (10, 20, 40)))
    assert 3.3 < np.abs(a - b).max() / np.abs(b - c).max() < 4.8


def test_spectral_in_space():
    """The same smooth start on finer grids: halving the spacing gains far more than a factor of 2^4."""
    at_16 = lambda N: numpy_fields(developed(N=N, zeta=5.0, steps=5, amplitude=0.05))['m'][::N // 16, ::N // 16]
    a, b, c = map(at_16, (16, 32, 64))
    assert np.abs(b - c).max() < np.abs(a - c).max() / 500


def test_frames_are_as_far_apart_as_written():
    """Every preset's time steps fit between two frames; those that do not are refused."""
    for system in simulate.SYSTEMS.values():
        for preset in system.presets.values():
            if 'dt' in preset.settings:
                steps = system.dt_save / preset.settings['dt']
                assert steps == pytest.approx(round(steps), rel=1e-9)
    with pytest.raises(ValueError, match='whole number'):
        developed(N=16, dt=0.02, steps=1).advance(0.25)


def test_simulation_is_reproducible():
    """Bit for bit, and whatever runs in the same batch."""
    def run(*seeds):
        c, m = map(torch.stack, zip(*[solvers.active_matter_start(16, seed) for seed in seeds]))
        return simulate.record(solvers.ActiveMatter([-1.0, -5.0], [3.0, 9.0], c, m, 0.05), 3, 0.25)[0]
    first, again, other = run(1, 2), run(1, 2), run(1, 3)
    assert {k: v.shape for k, v in first.items()} == {'concentration': (2, 3, 16, 16), 'velocity': (2, 3, 16, 16, 2),
                                                      'D': (2, 3, 16, 16, 2, 2), 'E': (2, 3, 16, 16, 2, 2)}
    for name in first:
        assert np.array_equal(first[name], again[name]) and np.array_equal(first[name][0], other[name][0]), name
        assert name == 'concentration' or not np.array_equal(first[name][1], other[name][1]), name


# ---------------------------------------------------------------------------------------------
# the solvers of the two fluids
#
# testdata/reference_flows.npz: fields that an established spectral framework computed in double precision, of
# shear flow at Re 1000, Sc 1 and of convection at Ra 1e6, Pr 1 (<system>/<field>, at the times <system>/t).

FLOWS = np.load(HERE / 'testdata' / 'reference_flows.npz')


def shear_flow(N=32, reynolds=200.0, schmidt=1.0, start=(2, 2, 1.0), dtype=torch.float64):
    velocity, tracer = solvers.shear_flow_start(N, 2 * N, *start, dtype=dtype)
    return solvers.ShearFlow([reynolds], [schmidt], velocity[None], tracer[None])


def convection(Nx=32, Ny=16, rayleigh=1e4, prandtl=1.0, db=1.0, noise=0.1, dtype=torch.float64):
    b = solvers.rayleigh_benard_start(Nx, Ny, db, 0, noise, dtype)
    return solvers.RayleighBenard([rayleigh], [prandtl], b[None])


def reference_start(Nx=128, Ny=32):
    """The start of the reference run of convection."""
    x, y = np.arange(Nx)[:, None] * 4 / Nx, solvers.chebyshev_nodes(Ny)
    return torch.tensor((1 - y) + 0.01 * y * (1 - y) * (np.sin(np.pi * x) + 0.5 * np.cos(1.5 * np.pi * x)))


def on_grid(solver):
    """Fields as arrays (Nx, Ny) by name: velocity as u and v."""
    f = {k: v[0].double().numpy() for k, v in solver.fields().items()}
    f['u'], f['v'] = np.moveaxis(f.pop('velocity'), -1, 0)
    return f


def fields_and_changes(solver, h=1e-3):
    """Fields by name, and their time derivatives by central differences."""
    frames = []
    for _ in range(3):
        frames.append(on_grid(solver))
        solver.advance(h)
    return frames[1], {name: (frames[2][name] - frames[0][name]) / (2 * h) for name in frames[1]}


@both_dtypes
@pytest.mark.parametrize('system, tolerances', [('shear_flow', (1e-4, 1e-3)), ('rayleigh_benard', (1e-3, 1e-2))])
def test_solver_agrees_with_an_established_one(system, tolerances, dtype):
    """Every field, in relative L2, at an early and a late time."""
    if system == 'shear_flow':
        solver, duration = shear_flow(64, 1000.0, dtype=dtype), 0.1
    else:
        solver, duration = solvers.RayleighBenard([1e6], [1.0], reference_start()[None].to(dtype)), 0.25
    now = 0.0
    for i, (t, tolerance) in enumerate(zip(FLOWS[system + '/t'], tolerances)):
        for _ in range(round((t - now) / duration)):
            solver.advance(duration)
        now, found = t, on_grid(solver)
        found['velocity'] = np.stack([found.pop('u'), found.pop('v')])
        for name in found:
            expected = FLOWS[f'{system}/{name}'][i].astype(np.float64)
            error = np.linalg.norm(found[name] - expected) / np.linalg.norm(expected)
            assert error < tolerance, (name, t, error)


@pytest.mark.parametrize('make', [shear_flow, convection])
def test_fluids_are_fourth_order_in_time(make):
    """Halving the time step divides the error by sixteen."""
    def after(steps):
        solver = make()
        solver.advance(0.5)                                              # off a start that may be rough
        solver.set_coefficients(0.4 / steps)
        for _ in range(steps):
            solver.step()
        return solver.state
    a, b, c = map(after, (8, 16, 32))
    assert 12 < (a - b).abs().max() / (b - c).abs().max() < 21


def test_fluids_converge_spectrally_in_space():
    """The same start on finer grids: refining once more changes the result far less than a high order would."""
    def shear(N):
        solver = shear_flow(N)
        solver.advance(1.0)
        return on_grid(solver)['tracer'][::N // 16, ::N // 16]

    def heat(N):                                                         # Nusselt-like numbers do not depend on nodes
        solver = solvers.RayleighBenard([2e4], [1.0], reference_start(2 * N, N)[None] + 0)
        for _ in range(8):
            solver.advance(1.0)
        b = on_grid(solver)['buoyancy'].mean(0)
        return np.polynomial.chebyshev.chebval(np.linspace(-1, 1, 9), np.polynomial.chebyshev.chebfit(
            2 * solvers.chebyshev_nodes(N) - 1, b, N - 1))
    for run, sizes in (shear, (16, 32, 64)), (heat, (8, 16, 32)):
        a, b, c = map(run, sizes)
        assert np.abs(b - c).max() < np.abs(a - c).max() / 100, run


def test_shear_flow_conserves_and_diffuses():
    """Mean tracer and momentum stay; parallel flow and tracer decay as their wave does; the energy budget closes."""
    solver = shear_flow(reynolds=100.0, schmidt=2.0)
    means = lambda f: [f[k].mean() for k in ('u', 'v', 'tracer')]
    before = on_grid(solver)
    energy = lambda f: ((f['u'] - f['u'].mean())**2 + f['v']**2).mean() / 2
    dt, rows = 0.02, []
    for _ in range(21):
        f = on_grid(solver)
        u_y = np.fft.ifft(1j * np.pi * np.fft.fftfreq(64, 1 / 64) * np.fft.fft(f['u'], axis=1), axis=1).real
        v_x = np.fft.ifft(2j * np.pi * np.fft.fftfreq(32, 1 / 32)[:, None] * np.fft.fft(f['v'], axis=0), axis=0).real
        rows.append((energy(f), ((v_x - u_y)**2).mean()))                # enstrophy
        solver.advance(dt)
    e, w2 = np.array(rows).T
    lost = (w2[0] + w2[-1] + 4 * w2[1:-1:2].sum() + 2 * w2[2:-1:2].sum()) * dt / 3 / 100         # Simpson, nu = 1/100
    assert e[0] - e[-1] == pytest.approx(lost, rel=1e-5)
    assert np.allclose(means(on_grid(solver)), means(before), atol=1e-12)
    assert abs(on_grid(solver)['pressure'].mean()) < 1e-14

    y = torch.arange(32, dtype=torch.float64) / 16 - 1
    u = torch.sin(2 * np.pi * y).expand(16, 32)
    tracer = torch.cos(np.pi * y).expand(1, 16, 32)
    solver = solvers.ShearFlow([50.0], [0.5], torch.stack([0.3 + u, 0 * u])[None], tracer)
    solver.advance(1.0)
    f = on_grid(solver)
    assert np.allclose(f['u'], 0.3 + np.exp(-(2 * np.pi)**2 / 50) * u.numpy(), atol=1e-12)
    assert np.allclose(f['tracer'], np.exp(-np.pi**2 / 25) * np.cos(np.pi * y.numpy()), atol=1e-12)


def test_shear_flow_is_incompressible_and_forces_balance():
    """div u = 0, and u_t + u.grad u + grad p = nu lap u with the pressure that is written."""
    solver = shear_flow()
    solver.advance(1.0)
    f, changes = fields_and_changes(solver)
    kx, ky = 2j * np.pi * np.fft.fftfreq(32, 1 / 32)[:, None], 1j * np.pi * np.fft.fftfreq(64, 1 / 64)
    d = lambda a, k: np.fft.ifft2(k * np.fft.fft2(a)).real
    assert np.abs(d(f['u'], kx) + d(f['v'], ky)).max() < 1e-12
    for name, k in ('u', kx), ('v', ky):
        residual = (changes[name] + f['u'] * d(f[name], kx) + f['v'] * d(f[name], ky) + d(f['pressure'], k)
                    - d(f[name], kx**2 + ky**2) / 200)
        assert np.abs(residual).max() < 2e-5, name                       # what the 2/3 rule leaves out


def polynomial(values, derivative=0, at=None):
    """Derivatives in y of fields (Nx, Ny) on the Chebyshev nodes, there or at points of [0, 1]."""
    n = values.shape[1]
    nodes = 2 * solvers.chebyshev_nodes(n) - 1
    c = np.polynomial.chebyshev.chebfit(nodes, values.T, n - 1)
    return 2.0**derivative * np.polynomial.chebyshev.chebval(
        nodes if at is None else 2 * np.asarray(at) - 1, np.polynomial.chebyshev.chebder(c, derivative))


def test_convection_meets_its_equations():
    """Walls and incompressibility to round-off; b and u change as the equations say, with the pressure written."""
    solver = convection(48, 32)
    for _ in range(16):
        solver.advance(0.5)
    f, changes = fields_and_changes(solver)
    kx = 0.5j * np.pi * np.fft.fftfreq(48, 1 / 48)[:, None]
    x = lambda a, order=1: np.fft.ifft(kx**order * np.fft.fft(a, axis=0), axis=0).real
    y = lambda a, order=1: polynomial(a, order)
    assert np.abs(f['u']).max() > 0.05 and np.abs(x(f['u']) + y(f['v'])).max() < 1e-11
    for name, walls in ('u', (0, 0)), ('v', (0, 0)), ('buoyancy', (1, 0)):
        assert np.abs(polynomial(f[name], at=[0.0, 1.0]) - walls).max() < 1e-12, name
    nodes, weights = np.polynomial.legendre.leggauss(32)
    assert abs((polynomial(f['pressure'], at=(nodes + 1) / 2) * weights).mean()) < 1e-13         # zero integral
    force = {'u': -x(f['pressure']), 'v': f['buoyancy'] - y(f['pressure']), 'buoyancy': 0}
    for name, diffusivity in ('u', 0.01), ('v', 0.01), ('buoyancy', 0.01):
        residual = (changes[name] + f['u'] * x(f[name]) + f['v'] * y(f[name]) - force[name]
                    - diffusivity * (x(f[name], 2) + y(f[name], 2)))
        assert np.abs(residual).max() < 1e-5, name


def test_convection_sets_in_at_the_critical_rayleigh_number():
    """Two no-slip walls, wavenumber pi: 1707.9 (Chandrasekhar 1961, 1707.8 at 3.117)."""
    x, y = np.arange(16)[:, None] / 4, solvers.chebyshev_nodes(16)
    start = torch.tensor(1 - y + 1e-6 * np.sin(np.pi * y) * np.cos(np.pi * x))
    solver = solvers.RayleighBenard([1690.0, 1725.0], [1.0, 1.0], torch.stack([start, start]))
    speed = []
    for _ in range(3):                                                   # the first transient dies out
        for _ in range(10):
            solver.advance(5.0)
        speed.append(solver.fields()['velocity'].abs().amax((1, 2, 3)))
    assert speed[2][0] < speed[1][0] and speed[2][1] > speed[1][1]


def test_convection_carries_the_same_heat_everywhere():
    """In a steady state the Nusselt number at the walls is that of the volume, and buoyancy's work is dissipated."""
    solver = convection(32, 24, rayleigh=5e3)
    for _ in range(60):
        solver.advance(2.0)
    f, kappa = on_grid(solver), 5e3**-0.5
    nodes, weights = np.polynomial.legendre.leggauss(24)
    mean = lambda a: (polynomial(a, at=(nodes + 1) / 2) * weights).sum() / 2 / 32                # over the domain
    at_walls = -polynomial(f['buoyancy'], 1, at=[0.0, 1.0]).mean(0)
    work = mean(f['v'] * f['buoyancy'])
    v_x = np.fft.ifft(0.5j * np.pi * np.fft.fftfreq(32, 1 / 32)[:, None] * np.fft.fft(f['v'], axis=0), axis=0).real
    assert at_walls[0] > 1.5 and at_walls == pytest.approx(1 + work / kappa, rel=1e-3)
    assert kappa * mean((v_x - polynomial(f['u'], 1))**2) == pytest.approx(work, rel=1e-3)


# ---------------------------------------------------------------------------------------------
# datasets: one that simulate.py makes, in miniature, and one written by hand as The Well publishes them

ALPHAS, ZETAS, GRID, RUNS = (-1.0, -5.0), (1.0, 9.0), 32, {'train': 2, 'valid': 1, 'test': 1}
CHANNELS = ['concentration', 'velocity_x', 'velocity_y', 'D_xx', 'D_xy', 'D_yx', 'D_yy', 'E_xx', 'E_xy', 'E_yx', 'E_yy']
NAME = 'active_matter_L_10.0_zeta_{}_alpha_{}.hdf5'
ACTIVE = data.SYSTEMS['active_matter']


def make_miniature(folder, seed=0):
    with pytest.MonkeyPatch.context() as patch:
        presets = simulate.SYSTEMS['active_matter'].presets
        patch.setitem(presets, 'nano', dataclasses.replace(
            presets['nano'], grid=(GRID, GRID), pairs=[(a, z) for a in ALPHAS for z in ZETAS], runs=RUNS,
            files_at_once=3, settings={'dt': 0.0625}))
        return simulate.make_dataset('active_matter', folder, 'nano', seed)


@pytest.fixture(scope='session')
def mini(tmp_path_factory):
    """<data dir>/active_matter as simulate.py writes it: 2 alphas x 2 zetas, 32 x 32, 81 frames. Read only."""
    return make_miniature(tmp_path_factory.mktemp('simulated'))


FLUIDS = {                                                               # as the tests simulate them
    'shear_flow': dict(grid=(16, 32), frames=36, pairs=[(r, s) for r in (50.0, 200.0) for s in (0.5, 2.0)]),
    'rayleigh_benard': dict(grid=(32, 16), frames=36, pairs=[(r, p) for r in (2e3, 2e4) for p in (0.5, 2.0)]),
}
both_fluids = pytest.mark.parametrize('name', FLUIDS)


@pytest.fixture(scope='session')
def fluids(tmp_path_factory):
    """A data dir with miniatures of shear flow and convection as simulate.py writes them. Read only."""
    folder = tmp_path_factory.mktemp('fluids')
    for name, size in FLUIDS.items():
        with pytest.MonkeyPatch.context() as patch:
            presets = simulate.SYSTEMS[name].presets
            patch.setitem(presets, 'nano', dataclasses.replace(presets['nano'], runs=RUNS, **size))
            simulate.make_dataset(name, folder)
    return folder


def linked(root, target):
    """A copy that shares the files' contents, but may lose and replace files."""
    return Path(shutil.copytree(root, target, copy_function=os.link))


def make_published(folder, frames=40, n=16):
    """A hand-written <folder>/active_matter: noise, two trajectories in each of two files a split."""
    rng = np.random.default_rng(0)
    root = Path(folder) / 'active_matter'
    for split in 'train', 'valid', 'test':
        (root / 'data' / split).mkdir(parents=True)
        for alpha in ALPHAS:
            with h5py.File(root / 'data' / split / NAME.format(1.0, alpha), 'w') as f:
                f.create_group('dimensions').attrs['spatial_dims'] = ['x', 'y']
                for name, value in {'L': 10.0, 'alpha': alpha, 'zeta': 1.0}.items():
                    f[f'scalars/{name}'] = value
                for name, components in {'t0_fields/concentration': (), 't1_fields/velocity': (2,),
                                         't2_fields/D': (2, 2), 't2_fields/E': (2, 2)}.items():
                    f[name] = rng.normal(size=(2, frames, n, n, *components)).astype(np.float32) + (name[1] == '0')
    return root


def files_of(root, split='train'):
    return sorted((root / 'data' / split).glob('*.hdf5'))


def read_bytes(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def attributes(node):
    plain = lambda v: v.tolist() if isinstance(v, (np.ndarray, np.generic)) else v
    return {k: plain(v) for k, v in node.attrs.items()}


def test_simulated_files_have_the_wells_format(mini):
    """Every file's name, and every group, dataset, shape, type and attribute of one."""
    for split in RUNS:
        assert [p.name for p in files_of(mini, split)] == sorted(NAME.format(z, a) for a in ALPHAS for z in ZETAS)
    assert not list(mini.rglob('*.part'))
    T, N, n, constant = 81, GRID, RUNS['train'], {'sample_varying': False, 'time_varying': False}
    with h5py.File(mini / 'data' / 'train' / NAME.format(9.0, -5.0)) as f:
        assert set(f) == {'boundary_conditions', 'dimensions', 'scalars', 't0_fields', 't1_fields', 't2_fields'}
        scalars = {'L': 10.0, 'zeta': 9.0, 'alpha': -5.0}
        assert attributes(f) == {'dataset_name': 'active_matter', 'grid_type': 'cartesian', 'n_spatial_dims': 2,
                                 'n_trajectories': n, 'simulation_parameters': list(scalars), **scalars}
        dims, walls = f['dimensions'], f['boundary_conditions']
        assert set(dims) == {'time', 'x', 'y'} and attributes(dims) == {'spatial_dims': ['x', 'y']}
        assert attributes(dims['time']) == {'sample_varying': False}
        assert np.array_equal(dims['time'], np.arange(T) * 0.25) and set(walls) == {'x_periodic', 'y_periodic'}
        for axis in 'xy':
            assert attributes(dims[axis]) == constant and dims[axis].dtype == np.float32
            assert np.allclose(dims[axis], np.arange(N) * 10 / N)
            b = walls[axis + '_periodic']
            assert attributes(b) == {'bc_type': 'PERIODIC', 'associated_dims': [axis], 'associated_fields': [],
                                     **constant}
            assert b['mask'].dtype == bool and np.array_equal(b['mask'], [True] + [False] * (N - 2) + [True])
            assert b['values'].dtype == np.float32 and b['values'].shape == (2,)
        assert attributes(f['scalars']) == {'field_names': list(scalars)} and set(f['scalars']) == set(scalars)
        for name, value in scalars.items():
            assert f['scalars'][name][()] == value and attributes(f['scalars'][name]) == constant
        for order, names in enumerate((['concentration'], ['velocity'], ['D', 'E'])):
            group, tensor = f[f't{order}_fields'], {'symmetric': True, 'antisymmetric': False} if order == 2 else {}
            assert attributes(group) == {'field_names': names} and set(group) == set(names)
            for name in names:
                assert attributes(group[name]) == {'dim_varying': [True, True], 'sample_varying': True,
                                                   'time_varying': True, **tensor}
                assert group[name].shape == (n, T, N, N) + (2,) * order and group[name].dtype == np.float32


def test_simulated_tensors_are_consistent(mini):
    """trace D = c; D and E symmetric; E traceless and the symmetric gradient of velocity; no two runs share a start."""
    starts = set()
    for file in (file for split in RUNS for file in files_of(mini, split)):
        with h5py.File(file) as f:
            c, u = f['t0_fields/concentration'][:], f['t1_fields/velocity'][:]
            D, E = f['t2_fields/D'][:], f['t2_fields/E'][:]
        assert np.allclose(D[..., 0, 0] + D[..., 1, 1], c, atol=1e-6) and np.abs(c - 1).max() < 1e-2
        assert np.array_equal(D[..., 0, 1], D[..., 1, 0]) and np.array_equal(E[..., 0, 1], E[..., 1, 0])
        assert np.array_equal(E[..., 0, 0], -E[..., 1, 1])
        (u_x, u_y), (v_x, _) = derivatives(u[..., 0]), derivatives(u[..., 1])
        assert np.allclose(E[..., 0, 0], u_x, atol=1e-4) and np.allclose(E[..., 0, 1], (u_y + v_x) / 2, atol=1e-4)
        assert np.abs(E[:, 40:]).max() > 1e-3
        starts |= {start.tobytes() for start in D[:, 0]}
    assert len(starts) == 4 * sum(RUNS.values())                         # nor do two splits


def test_stats_yaml(mini):
    """stats.yaml holds mean, std and rms of the training fields and of their changes between frames."""
    found, numbers = {}, None
    for line in (mini / 'stats.yaml').read_text().splitlines():          # '- - 1.0' is one number of a nested list
        key, colon, value = line.strip().partition(':')
        if colon and line[0] != ' ':
            statistic = key
        elif colon:
            numbers = found[statistic, key] = [float(value)] if value else []
        else:
            numbers += [float(line.split()[-1])] if line.split()[-1] != '-' else []
    for name, path in {'concentration': 't0_fields/concentration', 'velocity': 't1_fields/velocity',
                       'D': 't2_fields/D', 'E': 't2_fields/E'}.items():
        runs = []
        for file in files_of(mini):
            with h5py.File(file) as f:
                runs.append(f[path][:].astype(np.float64))
        x = np.concatenate(runs)
        for suffix, values in ('', x), ('_delta', np.diff(x, axis=1)):
            rows = values.reshape(-1, *x.shape[4:])
            for statistic, expected in {'mean': rows.mean(0), 'std': rows.std(0),
                                        'rms': np.sqrt((rows**2).mean(0))}.items():
                assert np.allclose(found[statistic + suffix, name], expected.ravel(), rtol=2e-4, atol=1e-7), statistic
    assert len(found) == 6 * 4


def test_interrupted_simulation_resumes(mini, tmp_path):
    """A lost file comes back byte for byte, over the debris of its first attempt, and no other is touched."""
    root = linked(mini, tmp_path / 'active_matter')
    before, times = read_bytes(root), {p: p.stat().st_mtime_ns for p in files_of(root) + files_of(root, 'valid')}
    lost = files_of(root, 'valid')[1]
    lost.unlink()
    lost.with_name(lost.name + '.part').write_bytes(b'half a file')
    assert make_miniature(tmp_path) == root
    assert read_bytes(root) == before
    assert [p for p in times if p.stat().st_mtime_ns != times[p]] == [lost]


def test_simulation_does_not_touch_other_peoples_data(mini, tmp_path):
    """Neither published files nor those of another recipe are mixed with new ones."""
    others = make_published(tmp_path / 'published', frames=2), linked(mini, tmp_path / 'simulated' / 'active_matter')
    for root, seed in zip(others, (0, 1)):
        before = read_bytes(root)
        with pytest.raises(ValueError, match='choose another --data-dir'):
            make_miniature(root.parent, seed)
        assert read_bytes(root) == before


@both_fluids
def test_fluids_have_the_wells_format(fluids, name):
    """Scalars under The Well's names, grids, boundaries and fields."""
    nx, ny = FLUIDS[name]['grid']
    first, second = FLUIDS[name]['pairs'][1]
    scalars, file, scalar_fields = {
        'shear_flow': ({'Rayleigh': first, 'Schmidt': second}, 'shear_flow_Reynolds_50_Schmidt_2.hdf5',
                       ['pressure', 'tracer']),
        'rayleigh_benard': ({'Prandtl': second, 'Rayleigh': first}, 'rayleigh_benard_Rayleigh_2000_Prandtl_2.hdf5',
                            ['buoyancy', 'pressure'])}[name]
    for split, runs in RUNS.items():
        assert len(files_of(fluids / name, split)) == 4
        with h5py.File(fluids / name / 'data' / split / file) as f:
            assert attributes(f) == {'dataset_name': name, 'grid_type': 'cartesian', 'n_spatial_dims': 2,
                                     'n_trajectories': runs, 'simulation_parameters': list(scalars), **scalars}
            assert {k: v[()] for k, v in f['scalars'].items()} == pytest.approx(scalars)
            assert attributes(f['t0_fields']) == {'field_names': scalar_fields}
            assert attributes(f['t1_fields']) == {'field_names': ['velocity']}
            assert attributes(f['t2_fields']) == {'field_names': []}
            for field in scalar_fields:
                assert f['t0_fields'][field].shape == (runs, 36, nx, ny)
            assert f['t1_fields/velocity'].shape == (runs, 36, nx, ny, 2)
            assert np.isfinite(f['t1_fields/velocity'][:]).all() and f['t1_fields/velocity'][:].std() > 1e-4
            x, y, walls = f['dimensions/x'][:], f['dimensions/y'][:], f['boundary_conditions']
            if name == 'shear_flow':
                assert np.allclose(x, np.arange(nx) / nx) and np.allclose(y, 2 * np.arange(ny) / ny - 1)
                assert np.allclose(f['dimensions/time'], 0.1 * np.arange(36))
                assert {k: v.attrs['bc_type'] for k, v in walls.items()} == dict.fromkeys(
                    ('x_periodic', 'y_periodic'), 'PERIODIC')
            else:
                assert np.allclose(x, 4 * np.arange(nx) / nx)
                assert np.allclose(y, (1 - np.cos(np.pi * (np.arange(ny) + 0.5) / ny)) / 2)
                assert np.allclose(f['dimensions/time'], 0.25 * np.arange(36))
                assert {k: v.attrs['bc_type'] for k, v in walls.items()} == {'x_periodic': 'PERIODIC', 'y_wall': 'WALL'}


@both_fluids
def test_no_initial_condition_is_in_two_splits(fluids, name):
    starts = {}
    for split in RUNS:
        field = 't1_fields/velocity' if name == 'shear_flow' else 't0_fields/buoyancy'
        starts[split] = set()
        for file in files_of(fluids / name, split):
            with h5py.File(file) as f:
                starts[split] |= {x[0].tobytes() for x in f[field]}
                assert len({x[0].tobytes() for x in f[field]}) == len(f[field])
    assert not starts['train'] & starts['test'] and not (starts['train'] | starts['test']) & starts['valid']


def test_unresolved_runs_are_named(tmp_path, capsys):
    """A thin shear on a coarse grid: the files are written, and the output says that they are not resolved."""
    with pytest.MonkeyPatch.context() as patch:
        presets = simulate.SYSTEMS['shear_flow'].presets
        patch.setitem(presets, 'nano', dataclasses.replace(presets['nano'], runs=RUNS, **{
            **FLUIDS['shear_flow'], 'frames': 3, 'pairs': [(1e4, 1.0)]}))
        simulate.make_dataset('shear_flow', tmp_path)
    assert len(files_of(tmp_path / 'shear_flow')) == 1
    printed = ''.join(capsys.readouterr())
    assert 'Reynolds_10000_Schmidt_1.hdf5' in printed and re.search('[1-4] of 4 runs are not resolved', printed)


@both_fluids
def test_the_wells_own_reader_opens_fluids(fluids, name):
    the_well = pytest.importorskip('the_well.data')
    nx, ny = FLUIDS[name]['grid']
    dataset = the_well.WellDataset(path=str(fluids / name), well_split_name='train', n_steps_input=4, n_steps_output=4,
                                   use_normalization=False)
    assert dataset.metadata.spatial_resolution == (nx, ny) and len(dataset) == 8 * (36 - 8 + 1)
    first = 'tracer' if name == 'shear_flow' else 'buoyancy'
    assert sorted(dataset.metadata.field_names[0]) == sorted([first, 'pressure'])
    x = dataset[len(dataset) - 1]
    assert x['input_fields'].shape == (4, nx, ny, 4) and torch.isfinite(x['input_fields']).all()
    other, found = 'Schmidt' if name == 'shear_flow' else 'Prandtl', set()
    for i in range(0, len(dataset), 36 - 8 + 1):
        scalars = dict(zip(dataset.metadata.constant_scalar_names, dataset[i]['constant_scalars'].tolist()))
        found.add((scalars['Rayleigh'], scalars[other]))
    assert found == set(FLUIDS[name]['pairs'])
    walls = [2, 2] if name == 'shear_flow' else [0, 0]                   # periodic or wall
    assert x['boundary_conditions'].tolist() == [[2, 2], walls]


@pytest.mark.parametrize('normalize', [False, True])
def test_the_wells_own_reader_opens_it(mini, normalize):
    the_well = pytest.importorskip('the_well.data')
    from the_well.data.normalization import ZScoreNormalization
    for split, runs in RUNS.items():
        dataset = the_well.WellDataset(path=str(mini), well_split_name=split, n_steps_input=4, n_steps_output=4,
                                       use_normalization=normalize, normalization_type=ZScoreNormalization)
        assert dataset.metadata.field_names == {0: ['concentration'], 1: ['velocity_x', 'velocity_y'], 2: CHANNELS[3:]}
        assert dataset.metadata.spatial_resolution == (GRID, GRID)
        assert len(dataset) == runs * 4 * (81 - 8 + 1)
        names, pairs = dataset.metadata.constant_scalar_names, set()
        assert set(names) == {'L', 'zeta', 'alpha'}
        for i in range(0, len(dataset), 1 if split == 'valid' else 37):
            x = dataset[i]
            scalars = dict(zip(names, x['constant_scalars'].tolist()))
            assert scalars['L'] == 10 and x['input_fields'].shape == (4, GRID, GRID, 11)
            assert torch.isfinite(x['input_fields']).all() and torch.isfinite(x['output_fields']).all()
            pairs.add((scalars['alpha'], scalars['zeta']))
        assert pairs == {(a, z) for a in ALPHAS for z in ZETAS}
        assert (x['boundary_conditions'] == 2).all()                     # periodic
        axis = torch.arange(GRID) * 10 / GRID
        assert torch.allclose(x['space_grid'], torch.stack(torch.meshgrid(axis, axis, indexing='ij'), -1))
        with h5py.File(mini / 'data' / split / dataset.files_paths[-1].split('/')[-1]) as f:
            last = f['t2_fields/D'][-1, 73:77, :, :, 0, 0]
        d_xx = dataset[len(dataset) - 1]['input_fields'][..., 3]
        assert np.allclose(np.corrcoef(d_xx.flatten(), last.ravel())[0, 1], 1, atol=1e-5)
        assert np.allclose(d_xx, last) != normalize


# ---------------------------------------------------------------------------------------------
# data.py

@pytest.fixture
def published(tmp_path):
    return make_published(tmp_path / 'well')


def open_split(root, split='train', resolution=0, **settings):
    return data.Split(root, ACTIVE, split, resolution, progress=False, **settings)


def from_file(file, trajectory, frames):
    """The eleven channels of some frames of one trajectory, (C, T, N, N), read straight from HDF5."""
    with h5py.File(file) as f:
        get = lambda name: f[name][trajectory, frames]
        u, D, E = get('t1_fields/velocity'), get('t2_fields/D'), get('t2_fields/E')
        return np.stack([get('t0_fields/concentration'), u[..., 0], u[..., 1],
                         *(t[..., i, j] for t in (D, E) for i in (0, 1) for j in (0, 1))])


def test_windows_are_the_files_values(published):
    """Channel names and order, time order, tensor components, runs: a swap anywhere would show (it is noise)."""
    split = open_split(published, stride=4)
    assert split.channels == CHANNELS
    assert split.fields.shape == (4, 11, 40, 16, 16) and split.fields.dtype == np.float32
    assert split.windows.tolist() == [[run, t] for run in range(4) for t in (0, 4, 8)]
    x = split.load(split.windows)
    assert x.shape == (12, 11, 32, 16, 16) and x.dtype == torch.float32
    for window, (run, t) in zip(x.numpy(), split.windows):
        assert np.array_equal(window, from_file(files_of(published)[run // 2], run % 2, slice(t, t + 32)))
    assert torch.equal(split.load(split.windows[:3], frames=16), x[:3, :, :16])
    every = split.fields.astype(np.float64).transpose(1, 0, 2, 3, 4).reshape(11, -1)
    assert np.allclose(split.mean, every.mean(1), atol=1e-6) and np.allclose(split.std, every.std(1), rtol=1e-5)


def test_labels_and_normalization(published):
    """Labels: the scalars that vary, log10 where the system says so. A channel that hardly varies is not blown up."""
    split = open_split(published)
    split.system = dataclasses.replace(ACTIVE, log_labels=('L',))
    assert split.varying() == ['alpha']                                  # L and zeta are constant here
    assert split.labels(['L', 'alpha']).tolist() == [[1, -1], [1, -1], [1, -5], [1, -5]]
    split.std[0] = 1e-9
    mean, std = split.normalization(True)
    assert np.array_equal(mean, split.mean) and std[0] == np.float32(1e-3) and np.array_equal(std[1:], split.std[1:])
    mean, std = split.normalization(False)
    assert not mean.any() and (std == 1).all()


def test_fields_are_cropped_then_resized(published):
    """As the system says, and bilinearly."""
    system = dataclasses.replace(ACTIVE, crop=((1 / 8, 5 / 8), (0, 1)))
    split = data.Split(published, system, 'train', resolution=12, progress=False)
    x = torch.tensor(from_file(files_of(published)[1], 1, slice(None))[:, :, 2:10])
    assert torch.allclose(torch.tensor(split.fields[3]), F.interpolate(x, size=(12, 12), mode='bilinear'), atol=1e-6)


@pytest.mark.parametrize('name, shape, cut', [
    ('shear_flow', (256, 512), (slice(None), slice(0, 256))),
    ('rayleigh_benard', (512, 128), (slice(192, 320), slice(None)))])
def test_the_papers_part_of_the_domain(tmp_path, name, shape, cut):
    """Of files of the published shape; labels in log10 under the files' names; `whole` keeps everything."""
    system, rng, root = data.SYSTEMS[name], np.random.default_rng(0), tmp_path / name
    scalar = 'tracer' if name == 'shear_flow' else 'buoyancy'
    other = 'Schmidt' if name == 'shear_flow' else 'Prandtl'
    (root / 'data' / 'train').mkdir(parents=True)
    fields = {}
    for number, value in enumerate((1e4, 1e6)):
        fields[number] = rng.normal(size=(1, 33, *shape)).astype(np.float32)
        with h5py.File(root / 'data' / 'train' / f'{number}.hdf5', 'w') as f:
            f.create_group('dimensions').attrs['spatial_dims'] = ['x', 'y']
            f['scalars/Rayleigh'], f['scalars/' + other] = value, 0.5
            f['t0_fields/' + scalar], f['t0_fields/pressure'] = fields[number], fields[number]
            f['t1_fields/velocity'] = np.stack([fields[number], fields[number]], -1)
            f.create_group('t2_fields')
    split = data.Split(root, system, 'train', 0, system.stride, progress=False)
    assert split.channels == sorted([scalar, 'pressure']) + ['velocity_x', 'velocity_y']
    assert np.array_equal(split.fields[1, 0], fields[1][0][(slice(None), *cut)])
    assert split.varying() == ['Rayleigh'] and split.labels(['Rayleigh']).tolist() == [[4], [6]]
    assert split.periodic == ([True, False] if name == 'shear_flow' else [False, False])
    small = data.Split(root, system, 'train', 32, progress=False)
    expected = F.interpolate(torch.tensor(fields[0][0][(slice(None), *cut)])[None], (32, 32), mode='bilinear')
    assert torch.allclose(torch.tensor(small.fields[0, 0]), expected[0], atol=1e-6)
    everything = data.Split(root, system, 'train', 0, progress=False, whole=True)
    assert everything.fields.shape[-2:] == shape and everything.periodic == [True, name == 'shear_flow']
    assert len(list((root / 'cache').iterdir())) == 6                    # none replaced another


def test_gravity_leaves_one_mirror_symmetry(fluids):
    """Crops of convection keep up and down, and wrap around in x alone."""
    split = data.Split(fluids / 'rayleigh_benard', data.SYSTEMS['rayleigh_benard'], 'train', whole=True, progress=False)
    seen = set()
    for seed in range(40):
        out = split.load([(7, 20)], frames=1, crop=16, augment=True, seeds=[seed])[0].numpy()
        for element in (0, 1):
            image = data.transform(split.fields[7, :, 20:21], split.channels, element)
            for shift in range(32):
                if np.array_equal(np.roll(image, -shift, -2)[:, :, :16], out):
                    seen.add((element, shift))
    assert len(seen) > 15 and {element for element, _ in seen} == {0, 1}


def test_random_crops_stay_inside(published):
    """Without augmentation a crop is a slice of the field, at many places over the seeds; one seed, one crop."""
    split = open_split(published)
    load = lambda seed: split.load([(1, 3)], frames=2, crop=12, seeds=[seed])[0].numpy()
    field, places = split.fields[1, :, 3:5], set()
    for seed in range(60):
        crop = load(seed)
        match = [(i, j) for i in range(5) for j in range(5) if np.array_equal(crop, field[..., i:i + 12, j:j + 12])]
        assert len(match) == 1
        places.add(match[0])
    assert len(places) > 15 and {i for i, _ in places} == set(range(5)) == {j for _, j in places}
    assert np.array_equal(load(7), load(7))


@pytest.mark.parametrize('corner', [(0, 0), (3, 9), (15, 15), (10, 0)])
def test_wrapped_crop_is_a_roll(corner):
    field = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    for h, w in (16, 16), (7, 7), (8, 12):
        out = np.empty((2, 3, h, w), np.float32)
        data.wrapped_copy(field, *corner, out)
        assert np.array_equal(out, np.roll(field, (-corner[0], -corner[1]), axis=(-2, -1))[..., :h, :w])


def test_augmentation_is_a_shift_and_a_symmetry(published):
    """All eight symmetries occur, with shifts across the edge, and nothing else happens to the field."""
    split, found = open_split(published), []
    for seed in range(60):
        out = split.load([(0, 0)], frames=1, augment=True, seeds=[seed])[0].numpy()
        for element in range(8):
            image = data.transform(split.fields[0, :, :1], CHANNELS, element)
            for x, y in np.argwhere(image[0, 0] == out[0, 0, 0, 0]):     # noise: at most one place
                if np.array_equal(out, np.roll(image, (-x, -y), (-2, -1))):
                    found.append((element, x, y))
    assert len(found) == 60 and len(set(found)) > 55 and {element for element, _, _ in found} == set(range(8))


def test_transform_is_the_symmetry_group_of_the_square():
    x = np.random.default_rng(0).normal(size=(11, 2, 8, 8)).astype(np.float32)
    images = [data.transform(x, CHANNELS, element) for element in range(8)]
    assert np.array_equal(images[0], x) and len({image.tobytes() for image in images}) == 8
    turned = flipped = x
    for _ in range(4):
        turned = data.transform(turned, CHANNELS, 2)
    for _ in range(2):
        flipped = data.transform(flipped, CHANNELS, 1)
    assert np.array_equal(turned, x) and np.array_equal(flipped, x)


@pytest.mark.parametrize('element', range(8))
def test_transform_moves_components_with_positions(element):
    """A transformed gradient is the gradient of the transformed field, and strain the strain of the flow."""
    x = np.arange(16) * 2 * np.pi / 16
    c = np.sin(x)[:, None] + np.cos(2 * x[:, None] + x) + 0.3 * np.sin(x + 1)         # no symmetry of its own
    u, v = np.cos(x[:, None] - 2 * x) + np.sin(2 * x)[:, None], np.sin(x[:, None] + x) + np.cos(3 * x)

    def strain(u, v):
        (u_x, u_y), (v_x, v_y) = derivatives(u), derivatives(v)
        return [u_x, (u_y + v_x) / 2, (u_y + v_x) / 2, v_y]

    gradient = lambda c: strain(*derivatives(c))                         # of a gradient: the Hessian
    flow = data.transform(np.stack([c, u, v, *gradient(c), *strain(u, v)])[:, None], CHANNELS, element)[:, 0]
    assert np.allclose(flow[7:], strain(flow[1], flow[2]), atol=1e-12)
    assert np.allclose(flow[3:7], gradient(flow[0]), atol=1e-12)
    potential = data.transform(np.stack([c, *derivatives(c), *[c] * 8])[:, None], CHANNELS, element)[:, 0]
    assert np.allclose(potential[1:3], derivatives(potential[0]), atol=1e-12)


def test_cache_is_reused_and_rebuilt(published):
    """Reused as it is, one per resolution, rebuilt when a file changes, the stale one removed."""
    cache = published / 'cache'
    stamps = lambda: {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    open_split(published, resolution=8)
    first = stamps()
    assert sorted(Path(n).suffix for n in first) == ['.bin', '.json']
    open_split(published, resolution=8, stride=2)
    assert stamps() == first
    open_split(published, resolution=16)
    both = stamps()
    assert len(both) == 4 and first.items() <= both.items()
    with h5py.File(files_of(published)[0], 'r+') as f:
        f['t1_fields/velocity'][0, 0] = 5.0
    assert (open_split(published, resolution=8).fields[0, 1:3, 0] == 5).all()
    now = stamps()
    assert len(now) == 4 and not first.keys() & now.keys()
    elsewhere = published.parent / 'elsewhere'
    open_split(published, cache_dir=elsewhere)
    assert stamps() == now and len(list(elsewhere.iterdir())) == 2


def test_two_runs_may_start_at_once(published, monkeypatch):
    """Another process that wants the same cache waits for the one that builds it, and takes that."""
    replace, others, other = os.replace, [], f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import data
data.Split({str(published)!r}, data.SYSTEMS['active_matter'], 'train', 0, progress=False)
"""

    def late(*paths):                                                    # the cache is written, and not yet named
        monkeypatch.undo()
        others.append(subprocess.Popen([sys.executable, '-c', other]))
        with pytest.raises(subprocess.TimeoutExpired):
            others[0].wait(10)
        replace(*paths)
    monkeypatch.setattr(data.os, 'replace', late)
    split = open_split(published)
    cache = published / 'cache'
    stamps = lambda: {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    first = stamps()
    assert others[0].wait(60) == 0 and stamps() == first
    assert sorted(p.suffix for p in cache.iterdir()) == ['.bin', '.json']
    assert np.array_equal(split.fields[0], from_file(files_of(published)[0], 0, slice(None)))


# ---------------------------------------------------------------------------------------------
# videomae.py
#
# testdata/parity_videomae.npz also holds the official state dicts, <model>/state_dict/keys and .../shapes, of
# videomae_pretrain (4 channels) and videomae_encoder (11 channels).

MINI = dict(width=24, depth=2, heads=2, patch=4, decoder_width=12, decoder_depth=1, decoder_heads=3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_videomae(channels=3, **settings):
    torch.manual_seed(0)
    return VideoMAE(channels, **{**MINI, **settings})


def clips(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(1), dtype=dtype)


# VideoMAE: parity with the official implementation

@both_dtypes
def test_encoder_is_the_official_one(dtype):
    x, = inputs(dtype, input=(1, 4, 16, 32, 32))
    model = VideoMAE(4, decoder_depth=1)
    fill(model.encoder, dtype)
    check_parity('videomae_encoder', out=model.embed(x), pos_embed_probe=videomae.positions(32, 384, dtype)[:, :8])
    assert sum(p.numel() for p in model.encoder.parameters()) == 22_076_544
    assert not model.embed(x).requires_grad


@both_dtypes
def test_pretraining_is_the_official_one(dtype, monkeypatch):
    """Predicted and target pixels of the hidden tokens, and the loss; place 0 of 4 is visible."""
    x, = inputs(dtype, input=(1, 4, 16, 32, 32))
    x = x.detach()
    model = fill(VideoMAE(4), dtype)
    assert sum(p.numel() for p in model.parameters()) == 24_324_800
    masked = torch.tensor([[False, True, True, True]])
    with torch.no_grad():
        patches = videomae.patchify(x, 2, 16)
        prediction, hidden = model.reconstruct(patches, masked)
        check_parity('videomae_pretrain', out=prediction,
                     labels=videomae.normalized_pixels(videomae.take(patches, hidden)))
        monkeypatch.setattr(videomae, 'tube_masks', lambda *a: masked.repeat(2, 1))
        check_parity('videomae_pretrain', loss=model(x, x)['loss'])


@pytest.mark.parametrize('name, network', [('videomae_encoder', lambda: videomae.Encoder(11)),
                                           ('videomae_pretrain', lambda: VideoMAE(4))], ids=['encoder', 'pretrain'])
def test_parameters_have_the_official_names(name, network):
    """And shapes: nothing else is in the state dict, the position table least of all."""
    shapes = [tuple(map(int, s.split(','))) for s in PARITY[f'{name}/state_dict/shapes']]
    official = dict(zip(PARITY[f'{name}/state_dict/keys'].tolist(), shapes))
    assert {k: tuple(v.shape) for k, v in network().state_dict().items()} == official


def test_initial_weights():
    """Xavier in the networks, no bias, PyTorch's default in the layer between them; the sizes are the paper's two."""
    model = VideoMAE(3, **videomae.SIZES['tiny'], depth=1)
    state = model.state_dict()
    for key, fans in ('encoder.blocks.0.attn.qkv', 4 * 192), ('decoder.head', 192 + 1536), ('encoder_to_decoder', None):
        bound = (6 / fans)**0.5 if fans else 192**-0.5
        assert 0.98 * bound < state[key + '.weight'].abs().max() <= bound, key
    assert all((v == 0).all() for k, v in state.items() if k.endswith('bias') and 'patch_embed' not in k)
    assert 0 < state['mask_token'].abs().max() <= 0.02
    assert model.encoder.blocks[0].attn.heads == 3
    assert {k: s['width'] // s['heads'] for k, s in videomae.SIZES.items()} == {'tiny': 64, 'small': 64}


# VideoMAE: masks

@pytest.mark.parametrize('places, ratio, hidden', [(196, 0.9, 176), (64, 0.9, 57), (10, 0.75, 7), (2, 0.9, 1)])
def test_masks_hide_the_same_number_in_every_clip(places, ratio, hidden):
    masked = videomae.tube_masks(5, places, ratio, seeded())
    assert masked.shape == (10, places) and (masked.sum(1) == hidden).all()
    assert torch.equal(masked, videomae.tube_masks(5, places, ratio, seeded()))
    if places >= 64:
        assert len(masked.unique(dim=0)) == 10                           # each clip its own
        assert not torch.equal(masked, videomae.tube_masks(5, places, ratio, seeded(1)))


def test_masks_hide_every_place_equally_often():
    often = videomae.tube_masks(2000, 16, 0.75, seeded()).double().mean(0)
    assert (often - 0.75).abs().max() < 0.04                             # six standard deviations


def test_masks_are_tubes():
    """Tokens in order t, h, w: the same places in each time slot."""
    masked = videomae.tube_masks(3, 16, 0.75, seeded())
    for b, hidden in enumerate(videomae.tube_tokens(masked, 8)):
        flags = torch.zeros(8 * 16, dtype=torch.bool)
        flags[hidden] = True
        assert torch.equal(flags.view(8, 16), masked[b].expand(8, 16))
        assert torch.equal(hidden, hidden.sort().values)


@pytest.mark.parametrize('places, ratio', [(1, 0.9), (64, 1.0), (64, 0.01), (64, 1.5), (64, -0.5)])
def test_masks_that_leave_nothing_to_do_are_refused(places, ratio):
    with pytest.raises(ValueError, match=f'mask ratio {ratio} hides .* of {places} patches'):
        videomae.tube_masks(2, places, ratio, seeded())


def test_ranks_hide_what_one_process_hides():
    """Rows of the global batch are in rank order, of context as of target."""
    whole = videomae.tube_masks(6, 16, 0.75, seeded()).view(2, 6, 16)
    parts = [videomae.tube_masks(2, 16, 0.75, seeded(), rank, 3).view(2, 2, 16) for rank in range(3)]
    assert torch.equal(torch.cat(parts, dim=1), whole)



def test_ranks_train_like_one_process(monkeypatch):
    """The mean of two ranks' gradients is one process's, and both report the losses of the global batch."""
    model = small_videomae(mask_ratio=0.75).double()
    context, target = clips(2, 4, 3, 4, 16, 16, dtype=torch.float64)
    parts = [(context[:2], target[:2]), (context[2:], target[2:])]

    def step(x, y):
        losses = model(x, y, seeded())
        return losses, torch.autograd.grad(losses['loss'], list(model.parameters()))

    one, expected = step(context, target)
    sent, total = [], None

    def all_reduce(values):
        sent.append(values.clone())
        values.copy_(sent[-1] if total is None else total)

    monkeypatch.setattr(videomae.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(videomae.dist, 'get_world_size', lambda: 2)
    monkeypatch.setattr(videomae.dist, 'all_reduce', all_reduce)
    for attempt in range(2):                                             # first to learn what each rank sends
        ranks = []
        for rank in range(2):
            monkeypatch.setattr(videomae.dist, 'get_rank', lambda: rank)
            ranks.append(step(*parts[rank]))
        total = sent[0] + sent[1]
    assert not torch.allclose(sent[0], sent[1], rtol=1e-3)
    for losses, _ in ranks:
        for name, value in one.items():
            assert losses[name].item() == pytest.approx(value.item(), rel=1e-10), name
    for e, a, b in zip(expected, *(gradient for _, gradient in ranks)):
        assert torch.allclose((a + b) / 2, e, rtol=1e-10, atol=1e-14)


# VideoMAE: the reconstruction

def test_patches_tile_the_clip():
    """In order t, h, w; pixels of a patch in the same order, channels innermost; and back."""
    x = clips(2, 3, 4, 6, 8)
    patches = videomae.patchify(x, 2, 2)
    assert patches.shape == (2, 2 * 3 * 4, 8, 3)
    for t, h, w in (0, 0, 0), (1, 2, 1), (1, 0, 3):
        tubelet = x[1, :, 2 * t:2 * t + 2, 2 * h:2 * h + 2, 2 * w:2 * w + 2]
        assert torch.equal(patches[1, (t * 3 + h) * 4 + w], tubelet.permute(1, 2, 3, 0).reshape(8, 3))
    assert torch.equal(videomae.unpatchify(patches, x.shape, 2, 2), x)


def test_patch_embedding_is_a_convolution():
    embed, x = videomae.Encoder(3, 24, 0, 2, patch=4).patch_embed, clips(2, 3, 4, 8, 12)
    expected = embed.proj(x).flatten(2).transpose(1, 2)
    assert torch.allclose(embed(videomae.patchify(x, 2, 4)), expected, rtol=0, atol=1e-5)


def test_target_is_normalised_per_patch_and_channel():
    """Whatever scale and offset a channel has, and with the variance divided by n - 1; no gradient flows through."""
    patches = clips(5, 8, 3, dtype=torch.float64)
    target = videomae.normalized_pixels(patches.clone().requires_grad_())
    assert not target.requires_grad
    expected = (patches - patches.mean(1, keepdim=True)) / (patches.std(1, keepdim=True) + 1e-6)
    assert torch.allclose(target, expected.flatten(1), rtol=1e-12)
    scaled = videomae.normalized_pixels(torch.tensor([1.0, 10.0, 100.0]) * patches + 7)
    assert torch.allclose(scaled, target, rtol=1e-4, atol=1e-4)


def test_encoder_sees_visible_patches_only():
    model, context, target = small_videomae(mask_ratio=0.75), *clips(2, 2, 3, 4, 16, 16)
    masked = videomae.tube_masks(2, 16, 0.75, seeded())

    def embedding(change, seen):
        """With one pixel of every frame changed, in the first visible or hidden place of each clip."""
        x = torch.cat([context, target])
        for b in range(4):
            place = (masked[b] != seen).nonzero()[0].item()
            x[b, :, :, place // 4 * 4, place % 4 * 4] += change
        model(x[:2], x[2:], seeded())
        return model.embedding

    assert embedding(0, False).shape == (4, 24, 2, 4) and not model.embedding.requires_grad
    assert torch.equal(embedding(9, False), embedding(0, False))
    assert (embedding(9, True) - embedding(0, True)).abs().amax((1, 2, 3)).min() > 1e-3
    spread, rank = train.embedding_health(model.embedding)
    assert 0 < spread < 10 and 1 < rank <= 24


def test_embedding_of_visible_tokens_is_in_place():
    """Without attention's mixing, what the encoder makes of a visible token is what it makes of it among all."""
    model, x = small_videomae(depth=0, mask_ratio=0.75), clips(2, 1, 3, 4, 16, 16)
    model(*x, seeded())
    every = model.embed(x.flatten(0, 1)).transpose(1, 2).reshape(2, 24, 2, 16)         # (2, D, t, places)
    for b, masked in enumerate(videomae.tube_masks(1, 16, 0.75, seeded())):
        assert torch.allclose(model.embedding[b], every[b][:, :, ~masked], atol=1e-6)


def test_every_parameter_learns():
    model, x = small_videomae(), clips(2, 2, 3, 4, 16, 16)
    model(*x, seeded())['loss'].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_training_reduces_the_loss():
    """One clip of a travelling wave is learnt, far below what predicting the mean scores, 1 - 1/n."""
    model = small_videomae(1, mask_ratio=0.75)
    i = torch.arange(16.0)
    x = (i[:, None] / 2 + i / 3 - torch.arange(8.0)[:, None, None]).sin()[None, None]  # (1, 1, 8, 16, 16)
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=1e-2), seeded()
    for _ in range(200):
        losses = model(x, x, generator)
        optimizer.zero_grad()
        losses['loss'].backward()
        optimizer.step()
    assert losses['loss'].item() < 0.25


def test_constant_clip_is_harmless():
    model, x = small_videomae(), torch.full((2, 1, 3, 4, 16, 16), 1.7)
    losses = model(*x, seeded())
    losses['loss'].backward()
    assert all(v.isfinite() for v in losses.values()) and losses['loss'] < 100
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('shape', [(16, 16, 16), (4, 8, 24), (16, 32, 16), (16, 16, 16)])
def test_any_size_that_patches_tile(shape):
    """One model, several sizes in turn; positions are those of the number of tokens at hand."""
    model, x, n = small_videomae().eval(), clips(2, 2, 3, *shape), shape[0] // 2 * shape[1] // 4 * shape[2] // 4
    assert model(*x, seeded())['loss'].isfinite()
    tokens = model.embed(x[0])
    assert tokens.shape == (2, n, 24)
    assert torch.allclose(tokens, model.encoder(videomae.patchify(x[0], 2, 4), torch.arange(n).expand(2, n)), atol=1e-5)


def test_bfloat16_autocast():
    """The errors and their spectrum are taken in float32."""
    model, x = small_videomae(), clips(2, 2, 3, 4, 16, 16)
    exact = model(*x, seeded())
    with torch.autocast('cpu', torch.bfloat16):
        losses = model(*x, seeded())
    losses['loss'].backward()
    for name, value in losses.items():
        assert value.dtype == torch.float32 and value.item() == pytest.approx(exact[name].item(), rel=0.05), name
    assert sum(losses[k] for k in ('low', 'mid', 'high')).item() == pytest.approx(losses['loss'].item(), rel=1e-5)


@pytest.mark.parametrize('shape', [(16, 15, 16), (16, 16, 18), (15, 16, 16), (16, 2, 16)])
def test_clips_that_patches_do_not_tile_are_refused(shape):
    model, x = small_videomae(), torch.zeros(2, 1, 3, *shape)
    said = f'{shape[0]} frames of {shape[1]} x {shape[2]}'
    with pytest.raises(ValueError, match=f'^patches of 2 frames and 4 x 4 pixels do not tile {said}$'):
        model(*x, seeded())
    with pytest.raises(ValueError, match=said):
        model.embed(x[0])


@pytest.mark.parametrize('settings', [dict(width=24, heads=5), dict(decoder_width=12, decoder_heads=5)])
def test_heads_that_do_not_divide_the_width_are_refused(settings):
    with pytest.raises(ValueError, match='width (24|12) is not divisible by 5 heads'):
        small_videomae(**settings)


# VideoMAE: the error at different scales

@pytest.mark.parametrize('H, W', [(12, 12), (16, 16), (9, 7), (8, 15), (5, 12)])
def test_bands_add_up(H, W):
    """And each is the sum over its wavenumbers of the whole transform, written out."""
    x = clips(3, 2, H, W, dtype=torch.float64)
    power = np.abs(np.fft.fft2(x.numpy()))**2 / (H * W)
    expected = np.zeros(3)
    for i in range(H):
        for j in range(W):
            k = np.hypot(min(i, H - i) / H, min(j, W - j) / W) / 0.5     # 1: half a cycle per pixel
            expected[0 if k < 1 / 3 - 1e-9 else 1 if k < 2 / 3 - 1e-9 else 2] += power[:, :, i, j].sum()
    assert np.allclose(videomae.band_energies(x), expected, rtol=1e-6)
    assert np.allclose(expected.sum(), x.square().sum(), rtol=1e-12)


def test_bands_of_the_loss_add_up():
    model, x = small_videomae().double(), clips(2, 2, 3, 4, 16, 12, dtype=torch.float64)
    losses = model(*x, seeded())
    assert sum(losses[k] for k in ('low', 'mid', 'high')).item() == pytest.approx(losses['loss'].item(), rel=1e-12)
    assert all(losses[k] > 0.01 * losses['loss'] and not losses[k].requires_grad for k in ('low', 'mid', 'high'))


@pytest.mark.parametrize('k, band', [
    ((0, 0), 'low'), ((1, 2), 'low'), ((0, 2), 'low'), ((3, 0), 'mid'), ((2, 2), 'mid'), ((5, 0), 'mid'),
    ((0, 6), 'high'), ((4, 4), 'high'), ((-5, 3), 'high'), ((8, 8), 'high')])
def test_an_error_of_one_wavenumber_is_of_its_band(k, band, monkeypatch):
    """Through `forward`: a prediction off by one wave everywhere, tokens in any order. Bands end at 8/3, 16/3."""
    model, shape = small_videomae(), (2, 3, 4, 16, 16)
    i = torch.arange(16) * 2 * torch.pi / 16
    wave = (k[0] * i[:, None] + k[1] * i).cos().expand(shape)
    order = torch.randperm(2 * 16, generator=seeded())

    def off_by_a_wave(patches, masked):
        prediction = videomae.normalized_pixels(patches) + videomae.patchify(wave, 2, 4).flatten(2)
        return prediction[:, order], order.expand(2, -1)

    monkeypatch.setattr(model, 'reconstruct', off_by_a_wave)
    losses = model(*clips(2, 1, *shape[1:]))
    expected = wave.square().mean().item()
    assert losses['loss'] == pytest.approx(expected, rel=1e-5)
    for name in 'low', 'mid', 'high':
        assert losses[name] == pytest.approx(expected if name == band else 0, rel=1e-5, abs=1e-6), name


def test_error_is_zero_where_visible(monkeypatch):
    """What the bands see of an error of one: the hidden patches, and nothing around them."""
    model, x = small_videomae(mask_ratio=0.75), clips(2, 2, 3, 4, 16, 16)
    seen = []
    split = videomae.band_energies
    monkeypatch.setattr(videomae, 'band_energies', lambda e: seen.append(e) or split(e))
    monkeypatch.setattr(videomae, 'normalized_pixels', lambda patches: torch.zeros_like(patches.flatten(-2)))
    monkeypatch.setattr(model.decoder, 'forward', lambda tokens, hidden: torch.ones(4, hidden, 2 * 4 * 4 * 3))
    losses = model(*x, seeded())
    masked = videomae.tube_masks(2, 16, 0.75, seeded()).view(4, 1, 1, 4, 4).float()
    assert torch.equal(seen[0], F.interpolate(masked, (1, 16, 16)).expand(4, 3, 4, 16, 16))
    assert losses['loss'] == 1


# VideoMAE: published checkpoints

def official_checkpoint(state, prefix=''):
    """As the official code saves it, its run's flags included."""
    return {'model': {prefix + k: v for k, v in state.items()}, 'epoch': 799, 'optimizer': {'state': {}},
            'scaler': {'scale': 65536.0}, 'args': argparse.Namespace(mask_ratio=0.9, window_size=(8, 14, 14), lr=1e-3)}


def pretrained(channels=3, **settings):
    """A model unlike `small_videomae()` in every parameter."""
    model = small_videomae(channels, **settings)
    for i, p in enumerate(model.parameters()):
        p.data.normal_(generator=seeded(i))
    return model


@pytest.mark.parametrize('form', ['checkpoint', 'module.', 'bare', 'double'])
def test_videomae_checkpoints_load(tmp_path, form, capsys):
    theirs, ours = pretrained().state_dict(), small_videomae()
    if form == 'double':
        ours = ours.double()
    prefix = 'module.' if form == 'module.' else ''
    torch.save(theirs if form == 'bare' else official_checkpoint(theirs, prefix), tmp_path / 'checkpoint.pth')
    videomae.load_official(ours, tmp_path / 'checkpoint.pth')
    for k, v in ours.state_dict().items():
        assert torch.equal(v, theirs[k].to(v.dtype)), k
    assert capsys.readouterr().out == ''


def test_encoder_alone_loads(tmp_path, capsys):
    theirs, ours = pretrained().encoder.state_dict(), small_videomae()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    torch.save(theirs, tmp_path / 'encoder.pth')
    videomae.load_official(ours, tmp_path / 'encoder.pth')
    for k, v in ours.state_dict().items():
        assert torch.equal(v, theirs[k.removeprefix('encoder.')] if k.startswith('encoder.') else before[k]), k
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and 'encoder only' in said


def test_checkpoints_of_other_channels_load(tmp_path, capsys):
    """A field that is equal in all channels is embedded as before; all but patch embedding and head is as there."""
    theirs, ours = pretrained(3), small_videomae(5)
    head = {k: v.clone() for k, v in ours.decoder.head.state_dict().items()}
    torch.save(official_checkpoint(theirs.state_dict()), tmp_path / 'checkpoint.pth')
    videomae.load_official(ours, tmp_path / 'checkpoint.pth')
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and 'mean over its 3 channels x 3/5' in said and 'head stays' in said
    x = clips(2, 1, 4, 16, 16)
    assert torch.allclose(ours.embed(x.expand(2, 5, 4, 16, 16)), theirs.embed(x.expand(2, 3, 4, 16, 16)), atol=1e-4)
    weight, theirs = ours.encoder.patch_embed.proj.weight, theirs.state_dict()
    assert torch.equal(weight[:, :1].expand_as(weight), weight)
    for k, v in ours.state_dict().items():
        if k.startswith('decoder.head'):
            assert torch.equal(v, head[k.removeprefix('decoder.head.')]), k
        elif k != 'encoder.patch_embed.proj.weight':
            assert torch.equal(v, theirs[k]), k


@pytest.mark.parametrize('fault', ['missing', 'extra', 'shape', 'missing head', 'encoder missing', 'jepa'])
def test_checkpoints_of_another_model_are_refused(tmp_path, fault):
    model, key = small_videomae(), 'encoder.blocks.1.mlp.fc1.weight'
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = pretrained(4 if fault == 'missing head' else 3).state_dict()
    if fault == 'missing':
        del state[key]
    elif fault == 'extra':
        key = 'encoder.head.weight'
        state[key] = torch.zeros(3)
    elif fault == 'shape':
        state[key] = state[key][:-1]
    elif fault == 'missing head':
        key = 'decoder.head.bias'
        del state[key]
    elif fault == 'encoder missing':
        state = {k.removeprefix('encoder.'): v for k, v in state.items() if k.startswith('encoder.') and k != key}
    else:
        key = 'decoder.blocks.0.attn.proj.bias'
        state = {'encoder.downsample_layers.0.0.weight': torch.zeros(3)}
    torch.save({'model': state}, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=re.escape(key)) as e:
        videomae.load_official(model, tmp_path / 'other.pth')
    assert str(e.value).isprintable()                                    # one line
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())       # not half loaded


class Code:
    """Unpickling this would run code."""

    def __reduce__(self):
        return pytest.fail, ('a checkpoint ran code',)


@pytest.mark.parametrize('content', ['empty', 'text', 'truncated', 'code', 'pickle', 'list', 'nested', 'nothing'])
def test_files_that_are_no_checkpoints_are_refused(tmp_path, content):
    path = tmp_path / 'file.pth'
    things = {'code': {'model': Code()}, 'list': [torch.zeros(3)], 'nested': {'epoch': 3, 'weights': {}}, 'nothing': {}}
    if content in things:
        torch.save(things[content], path)
    elif content == 'truncated':
        torch.save(official_checkpoint(small_videomae().state_dict()), path)
        path.write_bytes(path.read_bytes()[:5000])
    else:
        path.write_bytes({'empty': b'', 'text': b'not found\n', 'pickle': pickle.dumps(Code(), 2)}[content])
    with pytest.raises(ValueError, match=re.escape(f'{path} ') + '(is not a readable checkpoint|holds no state)') as e:
        videomae.load_official(small_videomae(), path)
    assert str(e.value).isprintable()                                    # one line
    with pytest.raises(FileNotFoundError):
        videomae.load_official(small_videomae(), tmp_path / 'nowhere.pth')


# ---------------------------------------------------------------------------------------------
# probe.py

def planted(n=200, tokens=4, dim=16, noise=0.1, seed=0):
    """Splits whose two labels are a linear map of the mean token."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(dim, 2, generator=g)
    splits = {}
    for name in 'train', 'valid', 'test':
        x = torch.randn(n, tokens, dim, generator=g)
        y = x.mean(1) @ w * math.sqrt(tokens / dim)
        splits[name] = x, y + noise * torch.randn(n, 2, generator=g)
    return splits


def test_linear_probe_recovers_a_linear_map():
    splits = planted(noise=0.1)
    assert (probe.linear(splits) < 1.5 * 0.1**2).all()
    shuffled = {name: (x, y.flip(0)) for name, (x, y) in splits.items()}
    assert (probe.linear(shuffled) > 0.5).all()


def test_knn_probe_recovers_clusters():
    g = torch.Generator().manual_seed(0)
    centers, values = torch.randn(5, 1, 8, generator=g), torch.randn(5, 2, generator=g)
    splits = {}
    for name in 'train', 'valid', 'test':
        which = torch.randint(5, (100,), generator=g)
        splits[name] = centers[which] + 0.01 * torch.randn(100, 3, 8, generator=g), values[which]
    assert (probe.knn(splits) < 1e-6).all()


def test_attentive_probe_learns_what_the_mean_token_hides():
    """The label is read from whichever token is marked: attention must find it."""
    g, splits = torch.Generator().manual_seed(0), {}
    for name in 'train', 'valid', 'test':
        x, which = torch.randn(400, 3, 16, generator=g), torch.randint(3, (400,), generator=g)
        x[:, :, 0] = 3.0 * (torch.arange(3) == which[:, None])
        splits[name] = x, x[torch.arange(400), which, 1:3]
    error, size = probe.attentive(splits, epochs=25, lr=1e-2)
    assert (error < 0.2).all() and (probe.linear(splits) > 0.5).all()
    assert size == sum(p.numel() for p in probe.AttentiveProbe(16, 2).parameters())


def test_probes_choose_on_valid():
    """The setting kept is the best on valid even where test prefers another."""
    noisy, clean = planted(n=50, noise=1.0), planted(n=50, noise=0.0)
    splits = {'train': noisy['train'], 'valid': noisy['train'], 'test': clean['train']}        # valid rewards memory
    assert torch.equal(probe.knn(splits), probe.knn(splits, ks=(1,)))
    assert (probe.knn(splits) > probe.knn(splits, ks=(10,))).all()
    assert torch.equal(probe.linear(splits), probe.linear(splits, strengths=(1e-8,)))
    x, y = planted()['train']
    splits = {'train': (x, y), 'valid': (x, -3 * y), 'test': (x, y)}     # valid prefers the untrained: the first epoch
    error, first = (probe.attentive(splits, epochs=n)[0] for n in (8, 1))
    assert torch.equal(error, first)
    assert (probe.attentive({**splits, 'valid': (x, y)}, epochs=8)[0] < first - 0.1).all()


def test_uninformative_features_score_like_the_mean():
    """Labels z-scored by train, features constant: every probe can only predict the mean, and scores 1."""
    y = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    y = (y - y.mean(0)) / y.std(0, unbiased=False)
    splits = {name: (torch.ones(300, 2, 8), y) for name in ('train', 'valid', 'test')}
    assert torch.allclose(probe.linear(splits).float(), torch.ones(2), atol=1e-4)
    assert torch.allclose(probe.attentive(splits, epochs=5)[0], torch.ones(2), atol=2e-2)


# ---------------------------------------------------------------------------------------------
# train.py and eval.py, as commands

STEPS = 40
TINY = ['--preset', 'nano', '--crop', 16, '--resolution', GRID, '--widths', '4,4,8,8,8', '--blocks', '0,1,1,1,1',
        '--batch', 8, '--micro-batch', 8, '--steps', STEPS, '--save-every', 3, '--device', 'cpu', '--dtype', 'float32']


def command(script, *flags, **environment):
    """Arguments for subprocess: a script of this folder, one thread, and no dataset of the user's."""
    env = {k: v for k, v in os.environ.items() if k != 'THE_WELL_DATA_DIR'}
    script = script if isinstance(script, list) else [HERE / script]
    return dict(args=[str(a) for a in (sys.executable, *script, *flags)],
                env={**env, 'OMP_NUM_THREADS': '1', **{k: str(v) for k, v in environment.items()}})


def run(script, *flags, cwd, code=0, **environment):
    """Run to the end; checks the exit code, and that nobody was shown a traceback."""
    p = subprocess.run(**command(script, *flags, **environment), cwd=cwd, capture_output=True, text=True,
                       timeout=300)                                      # should a refusal start to work instead
    assert p.returncode == code and 'Traceback' not in p.stderr + p.stdout, p.stdout + p.stderr
    return p


def refused(script, *flags, cwd, words=()):
    """Run to an error: exit code 2, one clear last line, nothing that was on disk touched. Returns the new files."""
    before = read_bytes(cwd)
    last = run(script, *flags, cwd=cwd, code=2).stderr.splitlines()[-1]
    assert last.startswith('error: ') and all(word in last for word in words), last
    after = read_bytes(cwd)
    assert all(after.get(path) == content for path, content in before.items())
    return after.keys() - before.keys()


def losses(out):
    """The log's losses, (steps, terms), having checked that every step is there once, in order."""
    rows = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == list(range(len(rows)))
    return [[row[k] for k in ('loss', 'sim', 'std', 'cov', 'low', 'mid', 'high') if k in row] for row in rows]


# the rivals of JEPA in miniature; flags of their own go after TINY's
RIVALS = {
    'videomae': ['--width', 16, '--depth', 2, '--heads', 2, '--patch', 8, '--decoder-width', 64, '--decoder-depth', 1,
                 '--mask-ratio', 0.75, '--crop', 0],
    'mpp': ['--width', 16, '--depth', 1, '--heads', 2, '--crop', 0],
    'disco': ['--width', 32, '--depth', 1, '--heads', 2, '--patch', 8, '--operator-width', 4, '--generator-width', 8,
              '--max-steps', 2, '--crop', 0],
}


@pytest.fixture(scope='session')
def well(mini, tmp_path_factory):
    """A data dir with the miniature as if downloaded; one training file is missing, so that labels are unbalanced."""
    root = linked(mini, tmp_path_factory.mktemp('well') / 'active_matter')
    (root / 'simulated.json').unlink()
    (root / 'data' / 'train' / NAME.format(9.0, -5.0)).unlink()
    return root.parent


@pytest.fixture(scope='session')
def trained(well, tmp_path_factory):
    """The out folder of a finished run."""
    out = tmp_path_factory.mktemp('trained')
    run('train.py', *TINY, '--data-dir', well, '--out', out, cwd=out)
    return out


def test_training_log_and_checkpoint(trained):
    rows = [json.loads(line) for line in (trained / 'log.jsonl').read_text().splitlines()]
    assert len(losses(trained)) == STEPS and np.isfinite(losses(trained)).all()
    for row in rows:
        assert row['loss'] == pytest.approx(10 * row['sim'] + 40 * row['std'] + 4 * row['cov'], rel=1e-4)
        assert 1 <= row['embedding_rank'] <= 8 and row['embedding_std'] > 0
    state = train.load_checkpoint(trained / 'ckpt.pt')
    assert state['step'] == STEPS and state['samples'] == STEPS * 8 and state['channels'] == CHANNELS
    assert state['labels'] == ['alpha', 'zeta'] and not list(trained.glob('*.part'))


def test_same_command_same_losses(well, trained, tmp_path):
    """Bit for bit; and THE_WELL_DATA_DIR does what --data-dir does."""
    run('train.py', *TINY, '--out', 'again', cwd=tmp_path, THE_WELL_DATA_DIR=well)
    assert losses(tmp_path / 'again') == losses(trained)


def test_killed_run_resumes(well, trained, tmp_path):
    """kill -9 between two checkpoints, with a torn last line: the log ends up as if nothing had happened."""
    out, flags = tmp_path / 'out', [*TINY, '--data-dir', well, '--out', tmp_path / 'out']
    written = lambda: (out / 'log.jsonl').read_text().count('\n') if (out / 'ckpt.pt').exists() else 0
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(**command('train.py', *flags), cwd=tmp_path, **quiet)
    while process.poll() is None and written() < 8:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 8 <= written() < STEPS
    with open(out / 'log.jsonl', 'a') as log:
        log.write('{"step": 9, "lo')
    assert 'resuming at step' in run('train.py', *flags, cwd=tmp_path).stdout
    assert len(losses(out)) == STEPS and losses(out) == losses(trained)


@pytest.mark.parametrize('model', ['jepa', 'videomae'])
def test_two_ranks_equal_one_process(well, tmp_path, model):
    """With accumulation: the same losses, and the same weights, on both ranks. VideoMAE's hide the same patches."""
    (tmp_path / 'ranks.py').write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import torch, train
models, build = [], train.build_model
train.build_model = lambda *args: models.append(build(*args)) or models[-1]
train.main()
torch.save(models[0].state_dict(), 'rank' + os.environ['RANK'] + '.pt')
""")
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'ranks.py']
    flags = [*TINY, *RIVALS.get(model, []), '--model', model, '--data-dir', well, '--dtype', 'float64', '--noise', 0,
             '--chunks', 5, '--crop', 0, '--micro-batch', 4, '--steps', 20]
    run('train.py', *flags, '--out', 'one', cwd=tmp_path)
    run(torchrun, *flags, '--out', 'two', cwd=tmp_path)
    assert len(losses(tmp_path / 'one')) == 20
    assert np.allclose(losses(tmp_path / 'two'), losses(tmp_path / 'one'), rtol=1e-5, atol=0)
    one, two = (train.load_checkpoint(tmp_path / name / 'ckpt.pt')['model'] for name in ('one', 'two'))
    ranks = [torch.load(tmp_path / f'rank{r}.pt', weights_only=True) for r in (0, 1)]
    for k in one:
        assert torch.allclose(two[k], one[k], rtol=0, atol=1e-6), k
        assert torch.equal(ranks[0][k], ranks[1][k]) and torch.equal(ranks[0][k], two[k]), k


@pytest.mark.parametrize('model', RIVALS)
def test_rivals_train_resume_and_evaluate(well, tmp_path, model):
    """The spine's promises for each: same command, same losses; killed, resumed and finished as if never; one table."""
    flags = [*TINY, *RIVALS[model], '--data-dir', well, '--model', model, '--steps', 12]
    run('train.py', *flags, '--out', 'out/a', cwd=tmp_path)
    rows = losses(tmp_path / 'out' / 'a')
    assert len(rows) == 12 and np.isfinite(rows).all() and len({row[0] for row in rows}) == 12
    if model == 'videomae':
        assert all(row[0] == pytest.approx(sum(row[1:]), rel=1e-5) for row in rows)          # the bands
    out = tmp_path / 'out' / 'b'
    process = subprocess.Popen(**command('train.py', *flags, '--out', out), cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / 'ckpt.pt').exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 'resuming at step' in run('train.py', *flags, '--out', out, cwd=tmp_path).stdout
    assert losses(out) == rows
    refused('train.py', *flags, '--size', 'huge', '--out', 'out/c', cwd=tmp_path, words=['huge'])
    refused('train.py', *flags, '--lr', 1e30, '--save-every', 1, '--out', 'out/c', cwd=tmp_path, words=['the loss is'])
    table = run('eval.py', 'out/a', '--epochs', 2, '--finetune', 1, '--stride', 16, cwd=tmp_path).stdout
    title = {'videomae': 'VideoMAE', 'mpp': 'MPP', 'disco': 'DISCO'}[model]
    result = json.loads((tmp_path / 'out' / 'a' / 'eval.json').read_text())
    rows, width, ratio = result['rows'], int(RIVALS[model][1]), 12 if model == 'videomae' else 4
    assert result['parameters'][title]['attentive probe'] == sum(
        p.numel() for p in probe.AttentiveProbe(width, 2, ratio).parameters())
    tuned = [f'{name}, fine-tuned' for name in (title, 'random init')]
    for name in title, 'random init', *tuned, f'{title}, the paper':
        assert np.isfinite(rows[name]['attentive']['mean']) and f'\n{name} ' in table
    assert rows[tuned[0]] != rows[tuned[1]]


def test_defaults_preset_system_flags():
    """Each goes before the one to its left; what nano sets for one system is not the paper's."""
    settings = lambda simulated, **flags: (lambda c: (c.preset, c.cov_coeff, c.steps))(train.resolve(flags, simulated))
    assert settings(None, data='shear_flow') == ('paper', 2.0, -1)
    assert settings('nano', data='active_matter') == ('nano', 4.0, 1200)
    assert settings('nano', data='shear_flow') == ('nano', 0.4, 700)
    assert settings('nano', data='shear_flow', cov_coeff=3.0) == ('nano', 3.0, 700)
    assert settings('nano', data='shear_flow', model='mpp') == ('nano', 2.0, 800)


@pytest.mark.parametrize('model', ['jepa', *RIVALS])
def test_published_weights_are_a_start(well, tmp_path, model):
    """--init --steps 0 is a checkpoint of the published weights, which eval.py takes; damaged ones are refused."""
    flags = [*TINY, *RIVALS.get(model, []), '--model', model, '--data-dir', well, '--steps', 0]
    if model == 'disco':                                                 # whose published weights serve all datasets
        weights = DISCO('active_matter', all_datasets=True, dim=32, blocks=1, heads=2, patch=8, hidden=8,
                        width=4).state_dict()
    else:
        run('train.py', *flags, '--seed', 5, '--out', 'out/source', cwd=tmp_path)
        source = train.load_checkpoint(tmp_path / 'out' / 'source' / 'ckpt.pt')
        assert source['step'] == 0
        weights = {k if model == 'videomae' else k.removeprefix('encoder.'): v for k, v in source['model'].items()
                   if model == 'videomae' or k.startswith('encoder.')}
    if model == 'mpp':
        weights |= {k: weights[k].narrow(axis, 0, 12) for k, axis in mpp.STATE_AXIS.items()}
    torch.save({'videomae': {'model': weights}, 'disco': {'model_state': weights}}.get(model, weights),
               tmp_path / 'published')
    run('train.py', *flags, '--init', 'published', '--out', 'out/init', cwd=tmp_path)
    own = train.load_checkpoint(tmp_path / 'out' / 'init' / 'ckpt.pt')['model']
    for k, v in weights.items():
        loaded = own[k if k in own else 'encoder.' + k]
        assert torch.equal(loaded[tuple(map(slice, v.shape))], v), k
    if model == 'disco':                                                 # most of the weights are other datasets'
        torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', HERE / 'train.py']
        run(torchrun, *flags, '--init', 'published', '--steps', 3, '--out', 'out/on', cwd=tmp_path)
        assert np.isfinite(losses(tmp_path / 'out' / 'on')).all()
        assert '\nDISCO ' in run('eval.py', 'out/on', '--epochs', 1, '--stride', 16, cwd=tmp_path).stdout
    if model != 'jepa':                                                  # the loaders' own tests refuse more
        return
    (tmp_path / 'cut').write_bytes((tmp_path / 'published').read_bytes()[:3000])
    assert refused('train.py', *flags, '--init', 'cut', '--out', 'out/cut', cwd=tmp_path, words=['cut']) == set()
    refused('train.py', *flags, '--init', 'nowhere', '--out', 'out/cut', cwd=tmp_path, words=['nowhere'])


def test_several_checkpoints_in_one_table(well, trained, tmp_path):
    """JEPA and a rival side by side, by folder; then everything under out/ as the paper's table 1."""
    shutil.copytree(trained, tmp_path / 'out' / 'jepa')
    rival = [*TINY, *RIVALS['videomae'], '--model', 'videomae', '--steps', 2]
    run('train.py', *rival, '--data-dir', well, '--out', 'out/mae', cwd=tmp_path)
    said = run('eval.py', 'out/jepa', 'out/mae', '--epochs', 2, '--stride', 16, cwd=tmp_path).stdout
    one, two = (json.loads((tmp_path / 'out' / name / 'eval.json').read_text()) for name in ('jepa', 'mae'))
    assert one == two and list(one['rows']) == [
        'JEPA', 'JEPA, random init', 'VideoMAE', 'VideoMAE, random init', 'field statistics', 'predict the mean',
        'JEPA, the paper', 'VideoMAE, the paper']
    assert 'in its attentive probe' in said and one['parameters']['VideoMAE']['attentive probe'] > 0
    table = run('eval.py', '--all', cwd=tmp_path).stdout.splitlines()
    for title in 'JEPA', 'VideoMAE':
        row = next(line for line in table if line.startswith(title + ' '))
        assert f'{one["rows"][title]["attentive"]["mean"]:.3f} | ' in row and row.count('not run') == 2
    assert sum(line.count('not run') for line in table) == 10            # of 12 cells
    other = train.load_checkpoint(tmp_path / 'out' / 'mae' / 'ckpt.pt')
    torch.save({**other, 'config': {**other['config'], 'data': 'shear_flow'}}, tmp_path / 'other.pt')
    refused('eval.py', 'out/jepa', 'other.pt', '--data-dir', well, cwd=tmp_path)       # no shear flow there


def test_diverging_run_stops(well, tmp_path):
    """No NaN in the log, and the last good checkpoint is kept."""
    refused('train.py', *TINY, '--data-dir', well, '--lr', 1e30, '--save-every', 1, '--out', 'out', cwd=tmp_path,
            words=['the loss is', 'step', 'ckpt.pt'])
    assert 1 <= len(losses(tmp_path / 'out')) < STEPS and np.isfinite(losses(tmp_path / 'out')).all()
    state = train.load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert all(torch.isfinite(v).all() for v in state['model'].values())
    train.restore(train.build_model(train.Config(**state['config']), CHANNELS), state, 'out/ckpt.pt')


def test_learning_rate_schedule():
    rates = [train.learning_rate(s, 100, 10, 1e-3, 1e-6) for s in range(100)]
    assert rates[9] == pytest.approx(1e-3) == max(rates) and rates[-1] == pytest.approx(1e-6)
    assert np.allclose(np.diff(rates[:10]), np.diff(rates[:10])[0]) and (np.diff(rates[10:]) < 0).all()


def test_every_window_once_an_epoch():
    """However the epochs are cut into batches."""
    order = np.concatenate([train.window_order(10, 0, first, 4) for first in range(0, 40, 4)]).reshape(4, 10)
    assert (np.sort(order, 1) == np.arange(10)).all() and len({tuple(epoch) for epoch in order}) == 4
    assert np.array_equal(order.ravel()[5:25], train.window_order(10, 0, 5, 20))
    assert not np.array_equal(order.ravel(), train.window_order(10, 1, 0, 40))


def test_eval_reports_the_table(well, trained, tmp_path):
    """On a dataset that has moved: THE_WELL_DATA_DIR goes before the place the checkpoint remembers."""
    moved, run_dir = linked(well / 'active_matter', tmp_path / 'moved' / 'active_matter'), tmp_path / 'out' / 'run'
    shutil.rmtree(moved / 'cache')
    shutil.copytree(trained, run_dir)
    table = run('eval.py', '--epochs', 3, cwd=tmp_path, THE_WELL_DATA_DIR=moved.parent).stdout    # the newest in out/
    assert (moved / 'cache').exists()
    result = json.loads((run_dir / 'eval.json').read_text())
    assert {'system', 'split', 'labels', 'rows', 'seconds', 'parameters'} <= result.keys()
    assert (result['system'], result['split'], result['labels']) == ('active_matter', 'test', ['alpha', 'zeta'])
    for name in 'JEPA', 'random init', 'field statistics', 'predict the mean':
        for scores in result['rows'][name].values():
            assert scores['mean'] == pytest.approx((scores['alpha'] + scores['zeta']) / 2)
            row = next(line for line in table.splitlines() if line.startswith(name + ' '))
            assert f'{scores["alpha"]:.3f}' in row and f'{scores["mean"]:.3f}' in row
    assert result['rows']['JEPA'].keys() == {'attentive', 'linear', 'knn'}
    seen, asked = np.array([[-1, 1], [-1, 9], [-5, 1]]), np.array([[-1, 1], [-1, 9], [-5, 1], [-5, 9]])
    alpha, zeta = (((asked - seen.mean(0)) / seen.std(0))**2).mean(0)    # z-scored by the training files
    expected = {'alpha': alpha, 'zeta': zeta, 'mean': (alpha + zeta) / 2}
    assert result['rows']['predict the mean']['linear'] == pytest.approx(expected)


@both_fluids
def test_fluids_train_and_evaluate(fluids, tmp_path, name):
    """The same commands; the Reynolds number goes by its own name."""
    root = linked(fluids / name, tmp_path / 'data' / name)
    (root / 'simulated.json').unlink()
    flags = [*TINY, '--resolution', 0, '--steps', 3, '--data', name, '--out', 'out/a']
    said = run('train.py', *flags, cwd=tmp_path).stdout
    assert ('Reynolds' if name == 'shear_flow' else 'Rayleigh') in said
    run('eval.py', '--epochs', 2, cwd=tmp_path)
    result = json.loads((tmp_path / 'out' / 'a' / 'eval.json').read_text())
    assert result['labels'] == (['Reynolds', 'Schmidt'] if name == 'shear_flow' else ['Prandtl', 'Rayleigh'])
    paper = result['rows'].pop('JEPA, the paper')
    assert paper == {'attentive': {'mean': 0.38 if name == 'shear_flow' else 0.13}}
    assert all(np.isfinite(list(scores.values())).all() for row in result['rows'].values() for scores in row.values())


# ---------------------------------------------------------------------------------------------
# bad input: exit code 2, one clear line, and everything on disk as it was

def edit(root, number, change):
    with h5py.File(files_of(root)[number], 'r+') as f:
        change(f)


def shorten(root):
    shutil.rmtree(root)
    make_published(root.parent, frames=31)


def put_nan(f):
    f['t2_fields/D'][1, 3, 4, 5, 0, 1] = np.nan


FIRST, SECOND = NAME.format(1.0, -1.0), NAME.format(1.0, -5.0)
DAMAGES = {                                                              # what is done, and what the message must say
    'truncated': (lambda root: os.truncate(files_of(root)[1], 99_999), [SECOND]),
    'no scalars': (lambda root: edit(root, 0, lambda f: f.pop('scalars')), [FIRST, 'scalars']),
    'no axes': (lambda root: edit(root, 0, lambda f: f['dimensions'].attrs.clear()), [FIRST, 'spatial_dims']),
    'a field less': (lambda root: edit(root, 1, lambda f: f['t2_fields'].pop('E')), [SECOND, 'channels']),
    'nan': (lambda root: edit(root, 1, put_nan), [SECOND, 'D_xy', 'NaN']),
    'too short': (shorten, ['31 frames', '32']),
    'no training split': (lambda root: shutil.rmtree(root / 'data' / 'train'), ['train']),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_data_is_refused(tmp_path, damage):
    """The message says what is wrong and where, and no cache of half the data, nor a run's folder, is left."""
    inflict, words = DAMAGES[damage]
    inflict(make_published(tmp_path))
    flags = [*TINY, '--resolution', 16, '--data-dir', tmp_path, '--out', tmp_path / 'out']
    assert not refused('train.py', *flags, cwd=tmp_path, words=words)


@pytest.mark.parametrize('flags, word', [
    ('train.py --data active_mater', 'active_mater'),
    ('train.py --out file/out', 'file'),
    ('train.py --resolution 40 --crop 0', '16'),
    ('train.py --batch 10 --micro-batch 4', 'multiple'),
    ('train.py --preset macro', 'macro'),
    ('train.py --model gan', 'gan'),
    ('simulate.py active_matter --data-dir file', 'file'),
    ('simulate.py active_matter', 'choose another --data-dir'),          # ./data holds somebody else's
    ('eval.py nowhere.pt', 'nowhere.pt'),
    ('eval.py', 'no checkpoint under out/'),
    ('eval.py file', 'not a checkpoint'),
    ('eval.py tensors.pt', 'not a checkpoint')])
def test_bad_flags_are_refused(tmp_path, flags, word):
    make_published(tmp_path / 'data')
    (tmp_path / 'file').write_bytes(np.random.default_rng(0).bytes(1000))
    torch.save({'weight': torch.zeros(3)}, tmp_path / 'tensors.pt')
    script, *flags = flags.split()
    refused(script, *(TINY if script == 'train.py' else []), *flags, cwd=tmp_path, words=[word])


class Evil:
    def __reduce__(self):
        return os.mkdir, ('evil',)


def test_checkpoints_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': Evil()}, 'evil.pt')
    torch.load('evil.pt', weights_only=False)                            # the file does bite
    os.rmdir('evil')
    refused('eval.py', 'evil.pt', cwd=tmp_path, words=['not a checkpoint'])
    assert not Path('evil').exists()


def test_finished_run_is_not_overwritten_by_another(well, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'out')
    flags = [*TINY, '--data-dir', well, '--seed', 1, '--out', 'out']
    assert not refused('train.py', *flags, cwd=tmp_path, words=['seed: 0, now 1', '--out'])
