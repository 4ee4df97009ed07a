"""
Everything that must stay true: python -m pytest test_all.py (a few minutes on two CPU cores).

Nothing outside this folder is read; what the tests write goes to pytest's temporary folder. The test of
The Well's own reader is skipped unless the package `the_well` is installed.

testdata/parity_jepa.npz holds outputs of the paper's official code, its weights and inputs filled by the
formula in `filled` below. Per case and output: <case>/<output>/float32 and .../float64, flattened, and
.../check = [largest allowed absolute error in float32, in float64, stride of the stored elements].
"""
import dataclasses
import json
import math
import os
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
import train
from jepa import JEPA, DepthwiseConv3d, Encoder, Predictor, load_official
from vicreg import covariance_loss, variance_loss, vicreg_loss, vicreg_loss_maps

HERE = Path(__file__).resolve().parent
PARITY = np.load(HERE / 'testdata' / 'parity_jepa.npz')
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
        elif key.split('.')[-1] == 'gamma':
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
# the solver

def wavenumbers(N):
    k = 2 * np.pi / simulate.BOX * np.fft.fftfreq(N, 1 / N)
    return k[:, None], k[None, :]


def derivatives(f):
    """Spectral (d/dx, d/dy) of a real periodic (..., N, N) array on the simulation's box; x is the first axis."""
    kx, ky = wavenumbers(f.shape[-1])
    return [np.fft.ifft2(1j * k * np.fft.fft2(f)).real for k in (kx, ky)]


def developed(N=32, alpha=-3.0, zeta=9.0, dt=0.01, steps=20, wavy=0.0, amplitude=0.6, seed=0):
    """A solver in float64 after some steps from a strongly nonlinear state; c = 1 + wavy cos cos."""
    c, m = simulate.initial_condition(N, seed, torch.float64, amplitude=amplitude)
    x = torch.arange(N, dtype=torch.float64) * 2 * math.pi / N
    c = c + wavy * torch.cos(x)[:, None] * torch.cos(2 * x)
    solver = simulate.ActiveMatter([alpha], [zeta], c[None], m[None], dt)
    for _ in range(steps):
        solver.step()
    return solver


def numpy_fields(solver):
    return {name: f[0].numpy() for name, f in solver.fields().items()}


@pytest.mark.parametrize('wave', [(1, 0), (0, 2), (1, 1), (2, -1)])
def test_linear_growth_rates(wave):
    """Small waves of the isotropic state grow as the linearised equations say.

    With c = 1 and m4 = O(m^2), m_t = e + zeta m + d_T lap m - 4 d_R m. A wave whose rods lie along or across
    k (longitudinal: m ~ exp(2i phi), phi the direction of k) drives no flow, e = 0. One at 45 degrees
    (transverse: m ~ i exp(2i phi)) drives a shear with e = -s/2, where s = (alpha/2 - zeta beta/4) m + beta/4 e
    is the stress, so e (1 + beta/8) = (-alpha/4 + zeta beta/8) m.
    """
    N, dt, steps, beta = 16, 1e-3, 40, simulate.BETA
    kx, ky = (2 * np.pi / simulate.BOX * k for k in wave)
    x = np.arange(N) * simulate.BOX / N
    ripple = 1e-7 * np.cos(kx * x[:, None] + ky * x)
    along = np.exp(2j * math.atan2(ky, kx))
    pairs = [(a, z) for a in (-1.0, -5.0) for z in (1.0, 9.0)]
    alpha, zeta = (np.repeat(v, 2) for v in zip(*pairs))                 # longitudinal, transverse for each pair
    direction = np.tile([along, 1j * along], len(pairs))[:, None, None]
    m = torch.tensor(direction * ripple)
    solver = simulate.ActiveMatter(alpha, zeta, torch.ones(m.shape, dtype=torch.float64), m, dt)
    size = lambda: ((solver.fields()['m'].numpy() / direction).real * ripple).sum((1, 2))
    before = size()
    for _ in range(steps):
        solver.step()
    measured = np.log(size() / before) / (steps * dt)
    longitudinal = zeta - 4 * simulate.D_R - simulate.D_T * (kx**2 + ky**2)
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
    m4 = simulate.fourth_moment(torch.tensor(c), torch.tensor(m)).numpy()
    alpha, zeta, beta = -3.0, 9.0, simulate.BETA
    stress = alpha / 2 * m + beta / 4 * (e * c + e.conj() * m4) - zeta * beta / 4 * (c * m - m.conj() * m4)
    kx, ky = wavenumbers(N)
    kept = np.maximum(np.abs(kx), np.abs(ky)) < 2 * np.pi / simulate.BOX * N / 4      # inside the 2/3 rule's square
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
        m4 = simulate.fourth_moment(torch.tensor(c), torch.tensor(m)).numpy()
        return (simulate.D_T * laplacian(c) - advect(c), -both(advect, m) + 1j * w * m + A * c - A.conj() * m4
                + simulate.D_T * both(laplacian, m) - 4 * simulate.D_R * m)

    before = numpy_fields(solver)
    again = simulate.ActiveMatter([-3.0], [zeta], *(torch.tensor(before[k])[None] for k in 'cm'), dt)
    again.step()
    after = numpy_fields(again)
    for k, old, new in zip('cm', tendency(before), tendency(after)):
        change = (after[k] - before[k]) / dt                             # the mean of both ends, to second order
        assert np.abs(change - (old + new) / 2).max() < 1e-3 * np.abs(change).max(), k


@pytest.mark.parametrize('N', [24, 32])
def test_solver_commutes_with_quarter_turns(N):
    """Turning the start turns everything: grids by rot90 (x, y -> -y, x), m by exp(i pi), (u, v) to (-v, u)."""
    c, m = simulate.initial_condition(N, 0, torch.float64, amplitude=0.3)
    turn = lambda f: torch.rot90(f, dims=(-2, -1))
    c, m = torch.stack([c, turn(c)]), torch.stack([m, -turn(m)])
    solver = simulate.ActiveMatter([-3.0, -3.0], [5.0, 5.0], c, m, dt=0.02)
    for _ in range(10):
        solver.step()
    f = solver.fields()
    for ours, expected in (f['m'][1], -f['m'][0]), (f['u'][1], -f['v'][0]), (f['v'][1], f['u'][0]):
        assert torch.allclose(ours, turn(expected), rtol=0, atol=1e-11), 'do x and y keep the same wavenumbers?'


def test_closure_limits():
    """Isotropic: |m4| / c -> r^2 / 2. Perfectly aligned: m4 = m^2 / c."""
    c, phase = torch.tensor([0.7, 1.0, 1.3], dtype=torch.float64), torch.tensor([0.3, 2.0, -1.0], dtype=torch.float64)
    m4 = lambda r: simulate.fourth_moment(c, torch.polar(r * c, phase))
    assert torch.allclose(m4(1e-4), torch.polar(c * 1e-8 / 2, 2 * phase), rtol=1e-5, atol=0)
    assert torch.allclose(m4(1.0), torch.polar(c, 2 * phase), rtol=1e-5, atol=0)


@pytest.mark.parametrize('kappa', [0.1, 1.0, 3.0, 10.0, 100.0])
def test_closure_is_the_bingham_distribution(kappa):
    theta = torch.arange(4000, dtype=torch.float64) * 2 * math.pi / 4000
    psi = torch.exp(kappa * (torch.cos(2 * (theta - 0.4)) - 1))
    psi = 1.2 * psi / psi.sum()
    moment = lambda n: (psi * torch.exp(1j * n * theta)).sum().view(1)
    assert abs(simulate.fourth_moment(psi.sum().view(1), moment(2)) - moment(4)) < 1e-5


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


def test_simulation_is_reproducible():
    """Bit for bit, and whatever runs in the same batch."""
    run = lambda *seeds: simulate.simulate([-1.0, -5.0], [3.0, 9.0], seeds, grid=16, dt=0.05, frames=3)
    first, again, other = run(1, 2), run(1, 2), run(1, 3)
    assert {k: v.shape for k, v in first.items()} == {'concentration': (2, 3, 16, 16), 'velocity': (2, 3, 16, 16, 2),
                                                      'D': (2, 3, 16, 16, 2, 2), 'E': (2, 3, 16, 16, 2, 2)}
    for name in first:
        assert np.array_equal(first[name], again[name]) and np.array_equal(first[name][0], other[name][0]), name
        assert name == 'concentration' or not np.array_equal(first[name][1], other[name][1]), name


# ---------------------------------------------------------------------------------------------
# datasets: one that simulate.py makes, in miniature, and one written by hand as The Well publishes them

ALPHAS, ZETAS, GRID, RUNS = (-1.0, -5.0), (1.0, 9.0), 32, {'train': 2, 'valid': 1, 'test': 1}
CHANNELS = ['concentration', 'velocity_x', 'velocity_y', 'D_xx', 'D_xy', 'D_yx', 'D_yy', 'E_xx', 'E_xy', 'E_yx', 'E_yy']
NAME = 'active_matter_L_10.0_zeta_{}_alpha_{}.hdf5'
ACTIVE = data.SYSTEMS['active_matter']


def make_miniature(folder, seed=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, 'ALPHAS', ALPHAS)
        patch.setattr(simulate, 'ZETAS', ZETAS)
        tiny = dataclasses.replace(simulate.PRESETS['nano'], grid=GRID, dt=0.0625, runs=RUNS, files_at_once=3)
        patch.setitem(simulate.PRESETS, 'nano', tiny)
        return simulate.make_dataset('active_matter', folder, 'nano', seed)


@pytest.fixture(scope='session')
def mini(tmp_path_factory):
    """<data dir>/active_matter as simulate.py writes it: 2 alphas x 2 zetas, 32 x 32, 81 frames. Read only."""
    return make_miniature(tmp_path_factory.mktemp('simulated'))


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
    system = dataclasses.replace(ACTIVE, crop=(slice(2, 10), slice(None)))
    split = data.Split(published, system, 'train', resolution=12, progress=False)
    x = torch.tensor(from_file(files_of(published)[1], 1, slice(None))[:, :, 2:10])
    assert torch.allclose(torch.tensor(split.fields[3]), F.interpolate(x, size=(12, 12), mode='bilinear'), atol=1e-6)


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
    """The log's losses, (steps, 4), having checked that every step is there once, in order."""
    rows = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == list(range(len(rows)))
    return [[row[k] for k in ('loss', 'sim', 'std', 'cov')] for row in rows]


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


def test_two_ranks_equal_one_process(well, tmp_path):
    """With accumulation: the same losses, and the same weights, on both ranks."""
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
    flags = [*TINY, '--data-dir', well, '--dtype', 'float64', '--noise', 0, '--chunks', 5, '--crop', 0,
             '--micro-batch', 4, '--steps', 20]
    run('train.py', *flags, '--out', 'one', cwd=tmp_path)
    run(torchrun, *flags, '--out', 'two', cwd=tmp_path)
    assert len(losses(tmp_path / 'one')) == 20
    assert np.allclose(losses(tmp_path / 'two'), losses(tmp_path / 'one'), rtol=1e-5, atol=0)
    one, two = (train.load_checkpoint(tmp_path / name / 'ckpt.pt')['model'] for name in ('one', 'two'))
    ranks = [torch.load(tmp_path / f'rank{r}.pt', weights_only=True) for r in (0, 1)]
    for k in one:
        assert torch.allclose(two[k], one[k], rtol=0, atol=1e-6), k
        assert torch.equal(ranks[0][k], ranks[1][k]) and torch.equal(ranks[0][k], two[k]), k


def test_diverging_run_stops(well, tmp_path):
    """No NaN in the log, and the last good checkpoint is kept."""
    refused('train.py', *TINY, '--data-dir', well, '--lr', 1e30, '--save-every', 1, '--out', 'out', cwd=tmp_path,
            words=['the loss is', 'step', 'ckpt.pt'])
    assert 1 <= len(losses(tmp_path / 'out')) < STEPS and np.isfinite(losses(tmp_path / 'out')).all()
    state = train.load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert all(torch.isfinite(v).all() for v in state['model'].values())
    train.restore(train.build_model(train.Config(**state['config']), 11), state, 'out/ckpt.pt')


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
            row = next(line for line in table.splitlines() if line.startswith(name))
            assert f'{scores["alpha"]:.3f}' in row and f'{scores["mean"]:.3f}' in row
    assert result['rows']['JEPA'].keys() == {'attentive', 'linear', 'knn'}
    seen, asked = np.array([[-1, 1], [-1, 9], [-5, 1]]), np.array([[-1, 1], [-1, 9], [-5, 1], [-5, 9]])
    alpha, zeta = (((asked - seen.mean(0)) / seen.std(0))**2).mean(0)    # z-scored by the training files
    expected = {'alpha': alpha, 'zeta': zeta, 'mean': (alpha + zeta) / 2}
    assert result['rows']['predict the mean']['linear'] == pytest.approx(expected)


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
