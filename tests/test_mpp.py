"""baselines/mpp.py: the official model, states by name, published checkpoints."""
import math
import re

import pytest
import torch
import torch.nn.functional as F

from baselines.mpp import MPP, SIZES, distance_buckets, load_published, normalised_mse, state_indices
from probe import AttentiveProbe
from helpers import PARITY, both_dtypes, check_parity, fill, inputs

ACTIVE_MATTER = ['concentration', 'velocity_x', 'velocity_y',
                 'D_xx', 'D_xy', 'D_yx', 'D_yy', 'E_xx', 'E_xy', 'E_yx', 'E_yy']
SHEAR_FLOW = ['pressure', 'tracer', 'velocity_x', 'velocity_y']
RAYLEIGH_BENARD = ['buoyancy', 'pressure', 'velocity_x', 'velocity_y']
TINY = (16, 2, 2)


def tiny(channels=SHEAR_FLOW, layer_scale=1.0, **settings):
    torch.manual_seed(0)
    return MPP(channels, size=TINY, layer_scale=layer_scale, **settings)


def manifest():
    return {k: tuple(n for n in shape if n)
            for k, shape in zip(PARITY['mpp_manifest/keys'].tolist(), PARITY['mpp_manifest/shapes'].tolist())}


# ---------------------------------------------------------------------------------------------
# the official model

@both_dtypes
@pytest.mark.parametrize('case, shape, periodic, channels, official', [
    ('mpp', (16, 1, 4, 64, 64), (True, True), RAYLEIGH_BENARD, True),
    ('mpp_bc', (6, 2, 3, 80, 96), (False, True), ['inhibitor', 'height', 'pressure'], False),
    ('mpp_bc_odd', (4, 1, 2, 80, 64), (True, False), ['tracer', 'pressure'], False)], ids=['mpp', 'bc', 'odd'])
def test_mpp_is_the_official_one(case, shape, periodic, channels, official, dtype):
    """Tokens and prediction; the official input is (T, B, C, H, W), and its first boundary condition is W's."""
    model = MPP(channels, periodic, official_state_map=official)
    if case == 'mpp_bc_odd':
        model.encoder.states = torch.tensor([3, 11])                     # 11 is a state without a name
    fill(model, dtype, lambda key: key.removeprefix('encoder.'))
    x, = inputs(dtype, input=shape)
    x = x.detach().permute(1, 2, 0, 3, 4)
    with torch.no_grad():
        check_parity(case, tokens=model.features(x), prediction=model.predict(x))


def test_mpp_ti_has_the_published_keys():
    published = {k: v for k, v in manifest().items() if not k.startswith('regression_head.')}
    assert len(published) == 439
    assert {k: tuple(v.shape) for k, v in MPP(SHEAR_FLOW).state_dict().items()} == published


def test_mpp_with_its_head_has_the_official_size():
    """The head is the attentive probe with an MLP four times as wide."""
    count = lambda model: sum(p.numel() for p in model.parameters())
    official = sum(math.prod(shape) for shape in manifest().values())
    assert count(MPP(SHEAR_FLOW)) + count(AttentiveProbe(192, 2, mlp_ratio=4.0)) == official == 7_694_270


@pytest.mark.parametrize('size, millions', [('Ti', 7), ('S', 29), ('B', 116), ('L', 407)])
def test_mpp_sizes(size, millions):
    with torch.device('meta'):
        model = MPP(SHEAR_FLOW, size=size)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert model.encoder.blocks[0].spatial.qnorm.weight.shape == (64,) and len(model.encoder.blocks) == SIZES[size][1]


# ---------------------------------------------------------------------------------------------
# parts

@pytest.mark.parametrize('periodic', [False, True], ids=['walls', 'periodic'])
@pytest.mark.parametrize('n', [1, 2, 5, 14, 15, 40])
def test_distance_buckets_written_out(n, periodic):
    """The published rule, pair by pair: the wrap is a remainder by half the length, of the sign of the way round."""
    def bucket(d):
        if periodic and d < -(n // 2):
            d = d % (n // 2)
        elif periodic and d > n // 2:
            d = d % -(n // 2)
        far = 8 + int(math.log(max(abs(d), 8) / 8) / math.log(4) * 8)
        return (16 if d > 0 else 0) + (abs(d) if abs(d) < 8 else min(far, 15))

    expected = [[bucket(key - query) for key in range(n)] for query in range(n)]
    assert distance_buckets(n, periodic).tolist() == expected


@pytest.mark.parametrize('channels', [SHEAR_FLOW, ACTIVE_MATTER], ids=['4', '11'])
def test_stem_embeds_fields_as_the_linear_layer_does(channels):
    """One convolution equals the scaled linear map of the chosen columns at every point, then the convolution."""
    encoder, x = tiny(channels).double().encoder, torch.randn(2, len(channels), 32, 48, dtype=torch.float64)
    bag, states = encoder.space_bag, encoder.states
    fields = math.sqrt(bag.weight.shape[1] / len(states)) * F.linear(x.movedim(1, -1), bag.weight[:, states], bag.bias)
    expected = encoder.embed.in_proj[0](fields.movedim(-1, 1))
    assert bag.weight.shape[1] == {4: 12, 11: 21}[len(channels)]
    assert torch.allclose(encoder.embed.embed_fields(x, bag, states), expected, atol=1e-12)


@pytest.mark.parametrize('axis', [0, 1], ids=['H', 'W'])
@pytest.mark.parametrize('periodic', [(True, False), (False, True)], ids=['along-H', 'along-W'])
def test_periodic_axes_are_those_along_which_shifts_commute(axis, periodic):
    """Rolling the fields by a patch rolls the tokens, once both ways round to the opposite side weigh the same."""
    model, x = tiny(periodic=periodic).double(), torch.randn(1, 4, 3, 64, 64, dtype=torch.float64)
    for block in model.encoder.blocks:
        table = block.spatial.rel_pos_bias.relative_attention_bias.weight
        table.data[2] = table.data[16 + 2]                               # of four patches, two apart is opposite
    model.predict(x)
    rolled = model.embedding.roll(1, 2 + axis)
    model.predict(x.roll(16, 3 + axis))
    assert torch.allclose(model.embedding, rolled, atol=1e-9) == periodic[axis]


def test_normalised_mse_written_out():
    """Per sample and channel: the spatial mean scores 1, whatever the units; a fraction of a deviation its square."""
    frame = torch.randn(3, 2, 8, 8, dtype=torch.float64) * torch.tensor([1.0, 50.0]).view(2, 1, 1) + 7
    assert normalised_mse(frame, frame) == 0
    mean, std = frame.mean((2, 3), keepdim=True), frame.std((2, 3), correction=0, keepdim=True)
    assert abs(normalised_mse(mean.expand_as(frame), frame) - 1) < 1e-6
    assert abs(normalised_mse(frame + 0.1 * std, frame) - 0.01) < 1e-6
    one = frame.clone()
    one[1, 0] = mean[1, 0]
    assert abs(normalised_mse(one, frame) - 1 / 6) < 1e-6


# ---------------------------------------------------------------------------------------------
# states

@pytest.mark.parametrize('channels, states', [
    (SHEAR_FLOW, [9, 3, 1, 2]), (RAYLEIGH_BENARD, [8, 9, 1, 2]), (['activator', 'inhibitor'], [4, 5]),
    (ACTIVE_MATTER, [12, 1, 2, 13, 14, 15, 16, 17, 18, 19, 20])], ids=['shear', 'rb', 'reaction', 'active'])
def test_channels_meet_their_states_by_name(channels, states):
    assert state_indices(channels) == states
    encoder = tiny(channels).encoder
    columns = max(12, max(states) + 1)
    assert encoder.states.tolist() == states
    assert encoder.space_bag.weight.shape == (4, columns) and encoder.debed.out_kernel.shape == (4, columns, 4, 4)
    assert state_indices(channels, official_state_map=True) == list(range(len(channels)))
    assert tiny(channels, official_state_map=True).encoder.space_bag.weight.shape == (4, 12)


def test_channel_order_does_not_matter():
    """The same fields under the same names in another order: the same tokens, the prediction in that order."""
    order = [2, 0, 3, 1]
    one, other = tiny().double(), tiny([SHEAR_FLOW[i] for i in order]).double()
    official = tiny([SHEAR_FLOW[i] for i in order], official_state_map=True).double()
    other.load_state_dict(one.state_dict())
    official.load_state_dict(one.state_dict())
    x = torch.randn(1, 4, 3, 64, 64, dtype=torch.float64)
    assert torch.allclose(one.features(x), other.features(x[:, order]), atol=1e-9)
    assert torch.allclose(one.predict(x)[:, order], other.predict(x[:, order]), atol=1e-9)
    assert not torch.allclose(one.features(x), official.features(x[:, order]), atol=1e-3)


# ---------------------------------------------------------------------------------------------
# training

def test_mpp_predicts_the_first_target_frame():
    model = tiny().double()
    context, target = torch.randn(2, 2, 4, 16, 64, 64, dtype=torch.float64)
    losses = model(context, target, torch.Generator())
    assert list(losses) == ['loss'] and losses['loss'].dtype == torch.float64
    assert losses['loss'] == normalised_mse(model.predict(context), target[:, :, 0])
    later, first = target.clone(), target.clone()
    later[:, :, 1:] += 1
    first[:, :, 0] += 1
    assert model(context, later)['loss'] == losses['loss'] != model(context, first)['loss']


def test_mpp_features_and_embedding_are_the_last_time_step():
    model, x = tiny(), torch.randn(2, 4, 16, 64, 96)
    tokens = model.features(x)
    assert tokens.shape == (2, 24, 16) and tokens.requires_grad
    assert torch.equal(model.features(x), tokens)
    model.predict(x)
    assert model.embedding.shape == (2, 16, 4, 6) and not model.embedding.requires_grad
    assert torch.equal(model.embedding.flatten(2).transpose(1, 2), tokens)
    assert torch.equal(tokens[1, 6 * 2 + 5], model.encoder(x)[0][1, -1, :, 2, 5])       # token 17: row 2, column 5


@pytest.mark.parametrize('channels', [SHEAR_FLOW, ACTIVE_MATTER], ids=['known', 'new'])
def test_gradients_reach_every_parameter(channels):
    """All but the biases published and never used, which ask for none, and the keys' bias, which softmax cancels."""
    model = tiny(channels).double()
    x = torch.randn(2, len(channels), 32, 64, 64, dtype=torch.float64)
    model(x[:, :, :16], x[:, :, 16:])['loss'].backward()
    unused = {k for k, p in model.named_parameters() if not p.requires_grad}
    rms = r'encoder\.(embed\.in_proj\.[147]|debed\.out_proj\.[14]|blocks\.\d\.spatial\.(norm[12]|mlp_norm))\.bias'
    assert unused == {k for k in model.state_dict() if re.fullmatch(rms, k)} and len(unused) == 11
    sizes = {k: p.grad.abs().max().item() for k, p in model.named_parameters() if k not in unused}
    assert [k for k, size in sizes.items() if not size > 1e-9] == [k for k in sizes if k.endswith('knorm.bias')]
    chosen = model.encoder.space_bag.weight.grad.abs().amax(0) > 0
    assert chosen.nonzero().flatten().tolist() == sorted(model.encoder.states)

    model.zero_grad()
    model.features(x[:, :, :16]).sum().backward()                        # fine-tuning leaves the decoder alone
    without = {k for k, p in model.named_parameters() if k not in unused and p.grad is None}
    assert without == {k for k in sizes if 'debed' in k}


def test_mpp_takes_a_constant_channel():
    """As the concentration is in runs that start uniform: predicted as it is, at no cost."""
    model, x = tiny(ACTIVE_MATTER), torch.randn(1, 11, 32, 64, 64)
    x[:, 0] = 1.0
    loss = model(x[:, :, :16], x[:, :, 16:])['loss']
    loss.backward()
    assert torch.allclose(model.predict(x[:, :, :16])[:, 0], torch.ones(1, 64, 64), atol=1e-5)
    assert 0.5 < loss < 10
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_mpp_stays_in_full_precision_under_autocast():
    model, x = tiny(), torch.randn(2, 1, 4, 16, 64, 64)
    expected, tokens = model(*x)['loss'], model.features(x[0])
    with torch.autocast('cpu', torch.bfloat16):
        assert model(*x)['loss'] == expected
        assert torch.equal(model.features(x[0]), tokens)


@pytest.mark.parametrize('shape, message', [
    ((1, 4, 16, 60, 64), '4 channels of 60 x 64'), ((1, 4, 16, 64, 60), '4 channels of 64 x 60'),
    ((1, 3, 16, 64, 64), 'takes 4 channels'), ((1, 4, 16, 16, 16), 'two or more patches')])
def test_mpp_refuses_fields_it_cannot_take(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny().features(torch.zeros(shape))


@pytest.mark.parametrize('size, message', [('XL', 'choose from Ti, S, B, L'), ((18, 1, 3), 'width 18'),
                                           ((16, 1, 3), 'its 3 heads')])
def test_mpp_refuses_sizes_it_cannot_have(size, message):
    with pytest.raises(ValueError, match=message):
        MPP(SHEAR_FLOW, size=size)


# ---------------------------------------------------------------------------------------------
# published files

def published(width=16):
    """The state dict of a published file: twelve states, bare names."""
    torch.manual_seed(1)
    state = MPP(SHEAR_FLOW, size=(width, 2, 2)).encoder.state_dict()
    return {k: torch.randn_like(v) for k, v in state.items()}


@pytest.mark.parametrize('channels', [SHEAR_FLOW, ACTIVE_MATTER], ids=['known', 'new'])
@pytest.mark.parametrize('prefix', ['', 'module.'], ids=['plain', 'module'])
@pytest.mark.parametrize('wrap', [dict, lambda state: {'iters': 5, 'epoch': 1, 'model_state': state}],
                         ids=['bare', 'model_state'])
def test_published_files_load(tmp_path, wrap, prefix, channels):
    """Into the first twelve columns; new channels keep the columns they were given."""
    file, model = tmp_path / 'MPP_AViT_Ti', tiny(channels)
    state, before = published(), {k: v.clone() for k, v in model.encoder.state_dict().items()}
    torch.save(wrap({prefix + k: v for k, v in state.items()}), file)
    load_published(model, file)
    after = model.encoder.state_dict()
    for k, axis in ('space_bag.weight', 1), ('debed.out_kernel', 1), ('debed.out_bias', 0):
        new = after[k].shape[axis] - 12
        assert new == (9 if channels is ACTIVE_MATTER else 0)
        assert torch.equal(after[k].narrow(axis, 12, new), before[k].narrow(axis, 12, new))
        after[k] = after[k].narrow(axis, 0, 12)
    assert state.keys() == after.keys()
    for k, v in state.items():
        assert torch.equal(v, after[k]), k


def test_official_state_map_starts_the_field_embedding_anew_for_active_matter(tmp_path):
    """As the official script does; for the other systems, and the rest of the weights, it loads everything."""
    torch.save(published(), tmp_path / 'file')
    for channels, kept in (ACTIVE_MATTER, {'space_bag.weight', 'space_bag.bias'}), (SHEAR_FLOW, set()):
        model = tiny(channels, official_state_map=True)
        before = {k: v.clone() for k, v in model.encoder.state_dict().items()}
        load_published(model, tmp_path / 'file')
        after = model.encoder.state_dict()
        assert {k for k in after if torch.equal(after[k], before[k])} == kept
        assert all(torch.equal(after[k], v) for k, v in published().items() if k not in kept)


def test_published_files_load_into_double(tmp_path):
    torch.save(published(), tmp_path / 'file')
    model = tiny(ACTIVE_MATTER).double()
    load_published(model, tmp_path / 'file')
    assert {v.dtype for v in model.state_dict().values()} == {torch.float64}
    assert torch.equal(model.encoder.space_bag.bias, published()['space_bag.bias'].double())


KEY = 'blocks.1.spatial.mlp.fc1.weight'


@pytest.mark.parametrize('fault', ['missing', 'extra', 'shape', 'width', 'depth', 'states', 'prefix', 'not a tensor'])
@pytest.mark.parametrize('wrap', [dict, lambda state: {'model_state': state}], ids=['bare', 'model_state'])
def test_published_files_of_another_model_are_refused(tmp_path, fault, wrap):
    """In one line with the file and the key, and nothing is loaded."""
    model, state, key = tiny(ACTIVE_MATTER), published(), KEY
    if fault == 'missing':
        del state[KEY]
    elif fault == 'extra':
        key = 'head.weight'
        state[key] = torch.zeros(3)
    elif fault == 'shape':
        state[KEY] = state[KEY][:-1]
    elif fault == 'width':
        state, key = published(32), r'blocks.0.spatial.gamma_att is \(32,\) there, \(16,\) here'
    elif fault == 'depth':
        state = {k: v for k, v in state.items() if not k.startswith('blocks.1.')}
        key = 'blocks.1.spatial.gamma_att is missing there'
    elif fault == 'states':
        key = 'debed.out_bias'
        state[key] = torch.zeros(13)
    elif fault == 'prefix':
        state['module.' + KEY] = state.pop(KEY)
    else:
        key = 'no state dict'
        state[KEY] = [1.0, 2.0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save(wrap(state), tmp_path / 'other')
    with pytest.raises(ValueError, match=key) as e:
        load_published(model, tmp_path / 'other')
    assert str(tmp_path / 'other') in str(e.value) and '\n' not in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Code:
    """What a malicious file may hold: unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('fault', ['truncated', 'code', 'list', 'empty', 'absent'])
def test_unreadable_published_files_are_refused(tmp_path, fault, zipped):
    file, trap = tmp_path / 'MPP_AViT_Ti', tmp_path / 'trap'
    content = {'code': {**published(), 'x': Code(trap)}, 'list': [1, 2]}.get(fault, published())
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    if fault == 'truncated':
        file.write_bytes(file.read_bytes()[:-2000])
    elif fault == 'empty':
        file.write_bytes(b'')
    elif fault == 'absent':
        file.unlink()
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    says = {'list': 'state dict', 'absent': 'No such file'}.get(fault, 'is not a checkpoint')
    with pytest.raises(FileNotFoundError if fault == 'absent' else ValueError, match=says) as e:
        load_published(model, file)
    assert str(file) in str(e.value) and '\n' not in str(e.value)
    assert not trap.exists()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if fault == 'code':                                                  # the trap does work
        torch.load(file, weights_only=False)
        assert trap.exists()
