"""jepa.py: the official network and step, its checkpoints, and what nano adds to the paper's objective."""
import itertools
import re

import pytest
import torch

from helpers import PARITY, both_dtypes, check_parity, fill, inputs
from model import Inputs, find_model
from jepa import JEPA, DepthwiseConv3d, Encoder, Predictor, load_published
from variants.small import SmallEncoder, jets


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


SMALL = {'widths': (2, 2, 4, 4, 8), 'blocks': (1, 1, 1, 1, 1)}


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_official_checkpoints_load(tmp_path, prefix):
    """As they are, and as DistributedDataParallel names them."""
    published, model = JEPA(3, **SMALL).encoder, JEPA(3, **SMALL)
    torch.save({prefix + k: v for k, v in published.state_dict().items()}, tmp_path / 'ConvEncoder_0.pth')
    load_published(model, tmp_path / 'ConvEncoder_0.pth')
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
        load_published(model, tmp_path / 'other.pth')
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())       # not half loaded


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


def test_partners_are_drawn_anew():
    """By the generator: another state, other partners, of places and of clips."""
    torch.manual_seed(0)
    model, x = JEPA(2, paired=False, encoder='statistics', widths=(8, 8, 8, 8), layer_scale=1.0), torch.randn(2, 2, 2, 16, 32, 32)
    losses = [model(*x, torch.Generator().manual_seed(seed))['sim'].item() for seed in (0, 1, 3, 0)]
    assert len(set(losses)) == 3 and losses[3] == losses[0]


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


def test_jets_are_values_rates_and_gradients():
    """Of a field linear in t, x and y: its value between the first two of every four points, and its slopes."""
    t, x, y = torch.meshgrid(torch.arange(16.), torch.arange(32.), torch.arange(16.), indexing='ij')
    field = torch.stack([1 + 2 * t + 3 * x - 5 * y, t * 0 + 7])[None]    # (1, 2, 16, 32, 16)
    out = jets(field)
    assert out.shape == (1, 8, 4, 8, 4)
    middle = lambda v: v[::4, ::4, ::4] + 0.5
    assert torch.allclose(out[0, 0], 1 + 2 * middle(t) + 3 * middle(x) - 5 * middle(y))
    assert [v.unique().tolist() for v in out[0, 2::2]] == [[16], [24], [-40]]          # eight times the slopes
    assert out[0, 1].unique().tolist() == [7] and not out[0, 3::2].any()
    assert torch.equal(jets(field, rate=32.0), out * torch.tensor([1.0, 1, 4, 4, 1, 1, 1, 1]).view(8, 1, 1, 1))


def test_the_small_encoder_takes_means_over_a_token():
    """Point by point, as written in its docstring; and a token sees only its own 16 x 16 points."""
    torch.manual_seed(0)
    encoder, x = SmallEncoder(3, (5, 6, 4, 8), rate=2.0), torch.randn(2, 3, 16, 32, 48)
    out = encoder(x)                                                     # (2, 8, 2, 3)
    assert out.shape == (2, 8, 2, 3) and encoder.dim == 8
    points = jets(x, 2.0)[1, :, :, 4:8, 8:12]                                 # (12, 4, 4, 4) of the token at (1, 2)
    products, thresholds, coarse = torch.zeros(4, 4, 4, 5), torch.zeros(4, 4, 4, 6), torch.zeros(2, 2, 2, 4)
    for p in itertools.product(range(4), repeat=3):
        factors = encoder.factors.weight @ points[:, *p] + encoder.factors.bias
        products[p] = factors[:5] * factors[5:]
        thresholds[p] = (encoder.thresholds.weight @ products[p] + encoder.thresholds.bias).relu()
    for t, i, j in itertools.product(range(2), repeat=3):
        around = thresholds[2 * t:2 * t + 2, 2 * i:2 * i + 2, 2 * j:2 * j + 2]
        coarse[t, i, j] = (torch.einsum('octij,tijc->o', encoder.coarse.weight, around) + encoder.coarse.bias).relu()
    means = torch.cat([v.flatten(0, 2).mean(0) for v in (products, thresholds, coarse)])
    assert torch.allclose(out[1, :, 1, 2], encoder.head(torch.asinh(8 * means)), atol=1e-5)
    changed = x.clone()
    changed[:, :, :, :16] += 1
    changed[:, :, :, :, 16:32] += 1
    same = torch.isclose(encoder(changed), out, atol=1e-6).all(1)        # (2, 2, 3)
    assert same.tolist() == [[[False] * 3, [True, False, True]]] * 2
    with pytest.raises(ValueError, match='16 frames'):
        encoder(x[:, :, :8])


def test_the_small_encoder_in_bfloat16():
    """Under autocast values and differences stay float32, and the embedding is close to float32's."""
    torch.manual_seed(0)
    encoder, x = SmallEncoder(3), torch.randn(8, 3, 16, 32, 32).cumsum(-1).cumsum(-2) / 16
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert jets(x).dtype == torch.float32
        rounded = encoder(x).float()
    assert (rounded - encoder(x)).std() < 0.05 * encoder(x).std(0).mean()


def test_settings_of_the_loss_and_the_encoder_reach_them():
    """--rate; and the chunks of VICReg are rows at random, other ones in another step."""
    module, inputs = find_model('jepa'), Inputs('x', ['a'], (True, True), (32, 32), paired=False)
    small = module.build(module.Options(encoder='statistics', widths=(8, 8, 8, 8), rate=3.0), inputs)
    assert small.encoder.rate == 3.0
    network, (p, z) = module.build(module.Options(chunks=2), inputs), torch.randn(2, 4, 128, 2, 2)
    losses = [network.loss(p, z, torch.Generator().manual_seed(seed))['loss'].item() for seed in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize('options, words', [
    (dict(encoder='resnet'), "--encoder is convnext or statistics, not 'resnet'"), (dict(blocks=(1, 1, 1)), 'has 5 stages'),
    (dict(encoder='statistics', widths=(8, 8)), 'takes 4 --widths'), (dict(widths=(2, 2, 4, 8, 12)), 'divisible by 8, not 12'),
    (dict(widths=(2, 2, 4, 0, 8)), 'at least 1'), (dict(blocks=(1, 1, 1, 1, -1)), 'at least 0'),
    (dict(blocks=(1, 1, 1, 1, 0.5)), 'whole numbers'), (dict(temperature=0.0), '--temperature must be more than 0'),
    (dict(sigreg_coeff=1.5), 'is a share'), (dict(momentum=(0.9,)), 'momentum'),
    (dict(chunks=0), '--chunks must be at least 1'), (dict(loss='mse'), '--loss is')])
def test_options_that_do_not_fit_are_refused(options, words):
    module = find_model('jepa')
    fields = Inputs('x', ['a'], (True, True), (32, 32))
    with pytest.raises(ValueError, match=words):
        module.check(module.Options(**options), fields)
    for sound in {}, dict(widths=(2, 2, 4, 4, 8)), dict(encoder='statistics', widths=(8, 8, 8, 8), blocks=(1,)), dict(temperature=1e-3):
        module.check(module.Options(**sound), fields)
    with pytest.raises(ValueError, match='sides divisible by 16, not 32 x 40'):
        module.check(module.Options(), Inputs('x', ['a'], (True, True), (32, 40)))
