"""
baselines/disco.py: the official model, its integrator and operator, published checkpoints and latents.
"""
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines import disco, latents
from baselines.disco import DISCO, WELL, bosh3, load_published, standardize
from baselines.latents import read_latents
from helpers import PARITY, both_dtypes, check_parity, filled, inputs

TINY = dict(dim=32, blocks=2, heads=2, patch=8, hidden=16, width=4, layer_scale=1.0, max_steps=2)
SMALL = dict(dim=96, blocks=2, heads=6, hidden=32)


def windows(dataset='active_matter', batch=2, frames=4, size=(32, 32), seed=0):
    """(context, target) of smooth random walks in time."""
    C = len(WELL[dataset][2].split())
    x = torch.randn(batch, C, 2 * frames, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (F.avg_pool3d(F.pad(x.cumsum(2), (2,) * 4 + (0, 0), 'circular'), (1, 5, 5), 1).float()).chunk(2, 2)


# ---------------------------------------------------------------------------------------------
# parity with the official implementation

@pytest.mark.parametrize('case, dataset, states, shape, size', [
    ('disco', 'shear_flow', [0, 1, 2, 3], (1, 16, 4, 32, 32), {}),
    ('disco_small', 'shear_flow', [6, 1, 20, 3], (2, 12, 4, 48, 64), SMALL),
    ('disco_small_walls', 'rayleigh_benard', [0, 5, 2, 28], (1, 4, 4, 64, 32), SMALL)])
def test_disco_is_the_official_one(case, dataset, states, shape, size):
    """Latent, generated weights, operator, integrated prediction. The published size is filled once for both dtypes."""
    model = DISCO(dataset, **size)
    model.states = states
    model.load_state_dict({k: v if k.startswith('theta_norm') else filled(k, v.shape)
                           for k, v in model.state_dict().items()})
    bound = model.get_buffer(f'theta_norm_{dataset}').copy_(model.opnns[dataset].bounds())
    for dtype in torch.float32, torch.float64:
        model, x = model.to(dtype), inputs(dtype, input=shape)[0].transpose(1, 2)              # (B, C, T, H, W)
        with torch.no_grad():
            y, _, _, z = model.next_frame(x)
            theta = model.theta(z)
            last = standardize(standardize(x, 2)[0][:, :, -1], 2)[0]
            check_parity(case, theta_latent=model.features(x)[:, 0], theta=theta, prediction=y,
                         theta_norm=bound.to(dtype), prediction_denormalised=model.predict(x),
                         opnn_rhs_at_t0=model.derivative(last, theta))


@both_dtypes
@pytest.mark.parametrize('rate, least, steps', [(0.02, 32, 31), (0.3, 32, 37), (3.0, 32, 32), (1.0, 0, 113)])
def test_integrator_is_the_official_one(rate, least, steps, dtype):
    """Solution, and the number of steps, accepted or not: rejections, interpolation past t = 1, both are met here."""
    y, W = inputs(dtype, y0=(2, 8), W=(8, 8))
    W, calls = W / math.sqrt(8), []

    def f(t, y):
        calls.append(t)
        return rate * (y @ W.T + math.cos(5 * t))

    with torch.no_grad():
        check_parity('ode_bosh3', **{f'rate{rate}_minstep{least}': bosh3(f, y, max_steps=least or 1e12)})
    assert len(calls) == 2 + 3 * steps


def test_state_dict_is_the_published_one():
    """Names and shapes of all 11 datasets' weights, none more, none less."""
    with torch.device('meta'):
        model = DISCO('active_matter', all_datasets=True)
    published = [line.split() for line in PARITY['disco_well/state_dict'].item().decode().splitlines()]
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == \
        {k: tuple(map(int, shape)) for k, *shape in published}
    assert sum(p.numel() for p in model.parameters()) == 323_612_448


def test_relative_positions_are_binned_like_t5():
    """The published weights' formula, max_distance 32, written out."""
    bias = disco.RelativeBias(1)
    bias.relative_attention_bias.weight.data = torch.arange(32.)[:, None]
    bins = bias(64)[0, 0].long()                                         # (query, key)
    for i in range(64):
        for j in range(64):
            n = abs(i - j)
            far = min(15, 8 + int(np.float32(np.log(np.float32(max(n, 8) / 8))) / math.log(4) * 8))
            assert bins[i, j] == (n if n < 8 else far) + 16 * (j > i), (i, j)


# ---------------------------------------------------------------------------------------------
# channels, sizes, integration

def test_channels_are_known_by_name():
    """DISCO's numbers of the states; and a model that gets its channels in another order says the same of them."""
    states = {'active_matter': [8, 6, 7, 9, 10, 11, 12, 25, 26, 27, 28], 'rayleigh_benard': [17, 2, 6, 7],
              'shear_flow': [5, 2, 6, 7], 'mhd': [0, 18, 19, 20, 22, 23, 24], 'supernova': [2, 0, 21, 18, 19, 20]}
    for dataset, numbers in states.items():
        assert DISCO(dataset, **TINY).states == numbers
    theirs = DISCO('shear_flow', **TINY).double()                        # tracer, pressure, velocity_x, velocity_y
    ours = DISCO('shear_flow', ('pressure', 'velocity_x', 'tracer', 'velocity_y'), **TINY).double()
    ours.load_state_dict(theirs.state_dict())
    x, target = (v.double() for v in windows('shear_flow'))
    there, back = [1, 2, 0, 3], [2, 0, 1, 3]
    assert torch.allclose(ours.features(x[:, there]), theirs.features(x), atol=1e-12)
    assert torch.allclose(ours.predict(x[:, there])[:, back], theirs.predict(x), atol=1e-12)
    assert torch.allclose(ours(x[:, there], target[:, there])['loss'], theirs(x, target)['loss'], atol=1e-12)
    assert not torch.allclose(ours.features(x), theirs.features(x), atol=1e-3)


@pytest.mark.parametrize('wrong', [{'dataset': 'shear'}, {'channels': ('tracer', 'pressure', 'u', 'v')}, {'patch': 32}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ValueError, match='shear_flow'):
        DISCO(**{'dataset': 'shear_flow', **TINY, **wrong})


@pytest.mark.parametrize('shape', [(1, 3, 4, 32, 32), (1, 4, 4, 32, 40), (1, 4, 4, 16, 32), (1, 4, 4, 32, 32, 32)])
def test_sizes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match='needs 4 channels in 2 dimensions'):
        DISCO('shear_flow', **TINY).predict(torch.zeros(shape))


def test_three_dimensional_data_runs():
    x = torch.randn(1, 7, 2, 32, 32, 32)
    model = DISCO('mhd', **{**TINY, 'max_steps': 1})
    assert model.features(x).shape == (1, 1, 32) and model.predict(x).shape == (1, 7, 32, 32, 32)


def test_integrator_is_of_third_order():
    """Half the step, an eighth of the error. With so small a tolerance all steps are the shortest allowed."""
    f = lambda t, y: -math.cos(t) * y**2                                 # 1 / y grows by sin t
    y = torch.tensor([0.5, 1.5], dtype=torch.float64)
    errors = [(bosh3(f, y, n, rtol=1e-15, atol=0) - 1 / (1 / y + math.sin(1))).abs().max() for n in (8, 16, 32, 64)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(2.8 < p < 3.3 for p in orders), orders


def test_integrator_differentiates_its_own_steps():
    y, w = torch.randn(2, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda y, w: bosh3(lambda t, y: torch.tanh(y @ w), y, 3, rtol=1e-15),
                                    (y, w.requires_grad_()))


@pytest.mark.parametrize('max_steps, again', [(4, False), (5, True), (32, True)])
def test_integration_that_is_computed_again_is_the_same(monkeypatch, max_steps, again):
    """Values and gradients, bit for bit; where steps are few they are all kept."""
    y, W = inputs(torch.float32, y0=(2, 8), W=(8, 8))
    calls, found = [], []

    def f(t, y):
        calls.append(t)
        return 3.0 * (y.tanh() @ W.T + math.cos(5 * t))

    for patched in False, True:
        if patched:
            monkeypatch.setattr(disco, 'checkpoint', lambda step, *start, **settings: step(*start))
        calls.clear()
        out = bosh3(f, y, max_steps)
        forward = len(calls)
        found.append([out, *torch.autograd.grad(out.pow(2).sum(), (y, W))])
        steps, rest = divmod(forward - 2, 3)
        assert rest == 0 and steps >= max_steps // 2 and len(calls) == forward + 3 * steps * (again and not patched)
    assert all(torch.equal(a, b) and b.abs().max() > 0 for a, b in zip(*found))


def test_not_a_number_ends_the_integration():
    context, target = windows()
    context[0, 0, 0, 0, 0] = math.nan
    assert DISCO('active_matter', **TINY)(context, target)['loss'].isnan()


# ---------------------------------------------------------------------------------------------
# training

def test_loss_is_discos_likelihood_up_to_a_constant():
    model, (context, target) = DISCO('active_matter', **TINY).double(), (v.double() for v in windows())
    loss = model(context, target)['loss']
    _, mean, std = standardize(context, 2)
    truth = (target[:, :, :1] - mean) / std
    variance = truth.var((3, 4), keepdim=True).expand_as(truth) + 1e-7
    prediction = (model.predict(context)[:, :, None] - mean) / std
    nll = F.gaussian_nll_loss(prediction, truth, variance, eps=1e-8)
    assert torch.allclose(loss, 2 * nll - variance.log().mean(), atol=1e-10)
    assert model.embedding.shape == (2, 32, 1, 1) and not model.embedding.requires_grad
    assert torch.allclose(model.embedding[:, :, 0, 0], model.features(context)[:, 0], atol=1e-10)


@pytest.mark.parametrize('dataset', ['active_matter', 'rayleigh_benard'])
def test_gradient_reaches_every_parameter(dataset):
    """But the operator's own weights, and what attention along an axis of length one, or a shift of all keys, hides."""
    model = DISCO(dataset, **TINY).double()
    model(*(v.double() for v in windows(dataset)))['loss'].backward()
    hidden = re.compile(r'qnorms\.2|knorms\.2|rel_pos_biases\.2|knorms?\.(\d\.)?bias')
    for name, p in model.named_parameters():
        if name.startswith('opnns') or re.search(r'blocks\.0\.spatial\.(\w+)\.2\.', name):
            assert not p.requires_grad, name
        else:
            assert p.requires_grad and p.grad is not None, name
            assert p.grad.abs().max() > 1e-9 or hidden.search(name), name


def test_features_are_differentiable():
    model, (context, _) = DISCO('active_matter', **TINY), windows()
    z = model.features(context)
    assert z.shape == (2, 1, 32) and z.requires_grad
    z.square().sum().backward()
    assert all(p.grad is not None for p in model.hpnn.parameters() if p.requires_grad)


def test_generated_weights_stay_in_bounds():
    model = DISCO('active_matter', **TINY)
    theta, bound = model.theta(1e4 * torch.randn(3, 32)).abs(), model.theta_norm_active_matter
    assert bound.shape == theta.shape[1:] and 1.9 < (theta / bound).max() < 2 + 1e-5


def test_bfloat16_autocast_leaves_the_integration_alone():
    """The latent is computed in half precision, what follows from it as without autocast."""
    model, (context, target) = DISCO('active_matter', **TINY), windows()
    exact = model(context, target)['loss']
    with torch.autocast('cpu', torch.bfloat16):
        half, (y, _, _, z) = model(context, target)['loss'], model.next_frame(context)
    assert half.dtype == torch.float32 and 0 < (half - exact).abs() < 0.05 * exact
    last, mean, std = standardize(standardize(context, 2)[0][:, :, -1], 2)
    theta = model.theta(z)
    assert (bosh3(lambda t, y: model.derivative(y, theta), last, 2) * std + mean - y).abs().max() < 1e-5


def test_it_learns_and_repeats_itself():
    """Patterns that drift by one cell a frame: 30 steps beat repeating the last frame; again, and to the same bit."""
    def losses(steps):
        torch.manual_seed(0)
        model = DISCO('gray_scott', **TINY)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        out = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(x[:, :, :4], x[:, :, 4:])['loss']
            loss.backward()
            optimizer.step()
            out.append(loss.item())
        return out

    first = windows('gray_scott')[0][:, :, :1]
    x = torch.cat([first.roll(t, -1) for t in range(5)], 2)              # (2, 2, 5, 32, 32)
    repeat = ((x[:, :, 4] - x[:, :, 3]).pow(2).mean((2, 3)) / x[:, :, 4].var((2, 3))).mean()
    out = losses(30)
    assert out[-1] < 0.8 * repeat < out[0], (out, repeat)
    assert losses(3) == out[:3]


# ---------------------------------------------------------------------------------------------
# published files

def published(model, form):
    state = model.state_dict()
    if form == '2-D':
        state = {k: v.squeeze(-1) if v.dim() == 5 else v for k, v in state.items()}
    optimizer = torch.optim.AdamW(model.parameters())
    return {'iters': 4000, 'epoch': 2, 'optimizer_state_dict': optimizer.state_dict(),
            'model_state': {('module.' if form == 'module.' else '') + k: v for k, v in state.items()}}


@pytest.mark.parametrize('form', ['plain', 'module.', '2-D'])
def test_disco_checkpoints_load(tmp_path, form):
    theirs, ours = DISCO('shear_flow', **TINY), DISCO('shear_flow', **TINY)
    torch.save(published(theirs, form), tmp_path / 'ckpt.tar')
    load_published(ours, tmp_path / 'ckpt.tar')
    for k, v in theirs.state_dict().items():
        assert torch.equal(v, ours.state_dict()[k]), k


class Evil:
    def __reduce__(self):
        return Path.touch, (Path('executed'),)


@pytest.mark.parametrize('fault', ['truncated', 'missing', 'unknown', 'width', 'bare', 'code', 'plain pickle', 'list'])
def test_other_files_are_refused(tmp_path, fault, monkeypatch):
    """In one line with the file's name, and the key's if it is one; nothing of them is loaded or run."""
    monkeypatch.chdir(tmp_path)
    path, model, key = Path('ckpt.tar'), DISCO('shear_flow', **TINY), 'hpnn.blocks.1.spatial.mlp.fc1.weight'
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = published(DISCO('shear_flow', **{**TINY, 'dim': 64 if fault == 'width' else 32}), 'module.')
    if fault == 'missing':
        del state['model_state']['module.' + key]
    elif fault == 'unknown':
        key = 'hpnn.head'
        state['model_state']['module.' + key] = torch.zeros(3)
    elif fault == 'width':
        key = 'hpnn.adapter.linear.bias'
    elif fault == 'bare':
        state = {'model': state['model_state']}
    elif fault == 'code':
        state['epoch'] = Evil()
    torch.save([state] if fault == 'list' else state, path)
    if fault == 'truncated':
        path.write_bytes(path.read_bytes()[:-1000])
    elif fault == 'plain pickle':
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError) as error:
        load_published(model, path)
    assert '\n' not in str(error.value) and 'ckpt.tar' in str(error.value) and not Path('executed').exists()
    assert (key in str(error.value)) == (fault in ('missing', 'unknown', 'width'))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def save_latents(folder, dim=8):
    g = torch.Generator().manual_seed(0)
    batches = {}
    for split, sizes in ('train', (5, 5, 2)), ('valid', (3,)):
        (folder / split).mkdir(parents=True)
        for i, b in enumerate(sizes):
            z, labels = torch.randn(b, dim, generator=g), torch.randn(b, 3, generator=g)
            labels[:, 0] = 10.0                                          # L never varies
            batches[split, i] = z, labels
            torch.save({'theta_latent': z, 'labels': labels}, folder / split / f'batch_{i}.pt')
    return batches


def test_latents_are_read(tmp_path):
    """All rows, those of a short last batch too, and the labels that vary, by name."""
    batches = save_latents(tmp_path)
    splits, names = read_latents(tmp_path, 'active_matter')
    assert names == ['zeta', 'alpha'] and set(splits) == {'train', 'valid'}
    for split, n in ('train', 3), ('valid', 1):
        tokens, labels = splits[split]
        assert torch.equal(tokens, torch.cat([batches[split, i][0] for i in range(n)])[:, None])
        assert torch.equal(labels, torch.cat([batches[split, i][1] for i in range(n)])[:, 1:])


@pytest.mark.parametrize('fault', ['none', 'truncated', 'key', 'width', 'labels', 'rows', 'code'])
def test_other_latents_are_refused(tmp_path, fault):
    save_latents(tmp_path)
    bad = tmp_path / 'train' / 'batch_1.pt'
    batch = {'theta_latent': torch.randn(5, 8), 'labels': torch.randn(5, 3)}
    if fault == 'none':
        bad = tmp_path / 'valid'
        (bad / 'batch_0.pt').unlink()
    elif fault == 'truncated':
        bad.write_bytes(bad.read_bytes()[:-100])
    else:
        if fault == 'key':
            del batch['theta_latent']
        elif fault == 'width':
            batch['theta_latent'] = torch.randn(5, 9)
        elif fault == 'labels':
            batch['labels'] = torch.randn(5, 2)
        elif fault == 'rows':
            batch['labels'] = torch.randn(4, 3)
        else:
            batch['labels'] = Evil()
        torch.save(batch, bad)
    with pytest.raises(ValueError, match=re.escape(str(bad))) as error:
        read_latents(tmp_path, 'active_matter')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('blank', [None, 50])
def test_published_latents_have_a_row(tmp_path, capsys, blank):
    """DISCO's: train and half of valid teach and choose, the other half is scored (badly, if it says nothing)."""
    g = torch.Generator().manual_seed(0)
    for split, n in ('train', 400), ('valid', 100):
        (tmp_path / 'latents' / split).mkdir(parents=True)
        labels = torch.stack([10**torch.randint(1, 5, (n,), generator=g).sort()[0].float(),             # as files are
                              torch.randint(1, 9, (n,), generator=g).float()], 1)
        z = torch.randn(n, 16, generator=g) * 0.1
        z[:, 0], z[:, 1] = labels[:, 0].log10(), labels[:, 1]
        if split == 'valid' and blank:
            z[torch.randperm(100, generator=torch.Generator().manual_seed(0))[blank:]] = z.mean(0)
        torch.save({'theta_latent': z, 'labels': labels}, tmp_path / 'latents' / split / 'batch_0.pt')
    latents.main([str(tmp_path / 'latents'), '--data', 'shear_flow', '--epochs', '2'])
    said = capsys.readouterr().out
    assert '400 / 50 / 50 windows' in said and 'held-out half of the valid' in said and 'Reynolds' in said
    row = next(line for line in said.splitlines() if line.startswith('DISCO, published latents  '))
    linear = [float(v) for v in row.split()[-6:-3]]
    assert 'DISCO, the paper (valid)' in said and (min(linear) > 0.5 if blank else max(linear) < 0.05)
