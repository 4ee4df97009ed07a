"""
videomae.py: the official network, masks, reconstruction, published checkpoints.

tests/data/parity_videomae.npz also holds the official state dicts, <model>/state_dict/keys and .../shapes, of
videomae_pretrain (4 channels) and videomae_encoder (11 channels).
"""
import argparse
import pickle
import re

import numpy as np
import pytest
import torch

from model import Inputs, embedding_health, find_model
import videomae
from helpers import PARITY, both_dtypes, check_parity, fill, inputs
from videomae import VideoMAE


MINI = dict(width=24, depth=2, heads=2, patch=4, decoder_width=12, decoder_depth=1, decoder_heads=3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_videomae(channels=3, **settings):
    torch.manual_seed(0)
    return VideoMAE(channels, **{**MINI, **settings})


def clips(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(1), dtype=dtype)


@both_dtypes
def test_encoder_is_the_official_one(dtype):
    x, = inputs(dtype, input=(1, 4, 16, 32, 32))
    model = VideoMAE(4, decoder_depth=1)
    fill(model.encoder, dtype)
    check_parity('videomae_encoder', out=model.features(x), pos_embed_probe=videomae.positions(32, 384, dtype)[:, :8])
    assert sum(p.numel() for p in model.encoder.parameters()) == 22_076_544


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
    model = VideoMAE(3, width=192, heads=3, depth=1)
    state = model.state_dict()
    for key, fans in ('encoder.blocks.0.attn.qkv', 4 * 192), ('decoder.head', 192 + 1536), ('encoder_to_decoder', None):
        bound = (6 / fans)**0.5 if fans else 192**-0.5
        assert 0.98 * bound < state[key + '.weight'].abs().max() <= bound, key
    assert all((v == 0).all() for k, v in state.items() if k.endswith('bias') and 'patch_embed' not in k)
    assert 0 < state['mask_token'].abs().max() <= 0.02
    assert model.encoder.blocks[0].attn.heads == 3
    assert videomae.SIZES['tiny'] == (192, 12, 3) and videomae.SIZES['small'] == (384, 12, 6)


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
    """The mean of two ranks' gradients and losses is one process's."""
    model = small_videomae(mask_ratio=0.75).double()
    context, target = clips(2, 4, 3, 4, 16, 16, dtype=torch.float64)
    parts = [(context[:2], target[:2]), (context[2:], target[2:])]

    def step(x, y):
        losses = model(x, y, seeded())
        return losses, torch.autograd.grad(losses['loss'], list(model.parameters()))

    one, expected = step(context, target)
    monkeypatch.setattr(videomae, 'WORLD', 2)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(videomae, 'RANK', rank)
        ranks.append(step(*parts[rank]))
    for name, value in one.items():
        parts = [losses[name].item() for losses, _ in ranks]
        assert np.mean(parts) == pytest.approx(value.item(), rel=1e-10), name
        assert parts[0] == parts[1] or name == 'loss', name
    for e, a, b in zip(expected, *(gradient for _, gradient in ranks)):
        assert torch.allclose((a + b) / 2, e, rtol=1e-10, atol=1e-14)


def test_patches_tile_the_clip():
    """In order t, h, w; pixels of a patch in the same order, channels innermost."""
    x = clips(2, 3, 4, 6, 8)
    patches = videomae.patchify(x, 2, 2)
    assert patches.shape == (2, 2 * 3 * 4, 8, 3)
    for t, h, w in (0, 0, 0), (1, 2, 1), (1, 0, 3):
        tubelet = x[1, :, 2 * t:2 * t + 2, 2 * h:2 * h + 2, 2 * w:2 * w + 2]
        assert torch.equal(patches[1, (t * 3 + h) * 4 + w], tubelet.permute(1, 2, 3, 0).reshape(8, 3))


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
    health = embedding_health(model.embedding)
    assert 0 < health['embedding_std'] < 10 and 1 < health['embedding_rank'] <= 24


def test_embedding_of_visible_tokens_is_in_place():
    """Without attention's mixing, what the encoder makes of a visible token is what it makes of it among all."""
    model, x = small_videomae(depth=0, mask_ratio=0.75), clips(2, 1, 3, 4, 16, 16)
    model(*x, seeded())
    every = model.features(x.flatten(0, 1)).transpose(1, 2).reshape(2, 24, 2, 16)         # (2, D, t, places)
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
    tokens = model.features(x[0])
    assert tokens.shape == (2, n, 24)
    assert torch.allclose(tokens, model.encoder(videomae.patchify(x[0], 2, 4), torch.arange(n).expand(2, n)), atol=1e-5)


def test_bfloat16_autocast():
    """The errors are taken in float32."""
    model, x = small_videomae(), clips(2, 2, 3, 4, 16, 16)
    exact = model(*x, seeded())
    with torch.autocast('cpu', torch.bfloat16):
        losses = model(*x, seeded())
    losses['loss'].backward()
    for name, value in losses.items():
        assert value.dtype == torch.float32 and value.item() == pytest.approx(exact[name].item(), rel=0.05), name


@pytest.mark.parametrize('shape', [(16, 15, 16), (16, 16, 18), (15, 16, 16), (16, 2, 16)])
def test_clips_that_patches_do_not_tile_are_refused(shape):
    model, x = small_videomae(), torch.zeros(2, 1, 3, *shape)
    said = f'{shape[0]} frames of {shape[1]} x {shape[2]}'
    with pytest.raises(ValueError, match=f'^patches of 2 frames and 4 x 4 pixels do not tile {said}$'):
        model(*x, seeded())
    with pytest.raises(ValueError, match=said):
        model.features(x[0])


@pytest.mark.parametrize('settings', [dict(width=24, heads=5), dict(decoder_width=12, decoder_heads=5)])
def test_heads_that_do_not_divide_the_width_are_refused(settings):
    with pytest.raises(ValueError, match='width (24|12) is not divisible by 5 heads'):
        small_videomae(**settings)


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
    videomae.load_published(ours, tmp_path / 'checkpoint.pth')
    for k, v in ours.state_dict().items():
        assert torch.equal(v, theirs[k].to(v.dtype)), k
    assert capsys.readouterr().out == ''


def test_encoder_alone_loads(tmp_path, capsys):
    theirs, ours = pretrained().encoder.state_dict(), small_videomae()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    torch.save(theirs, tmp_path / 'encoder.pth')
    videomae.load_published(ours, tmp_path / 'encoder.pth')
    for k, v in ours.state_dict().items():
        assert torch.equal(v, theirs[k.removeprefix('encoder.')] if k.startswith('encoder.') else before[k]), k
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and 'encoder only' in said


def test_checkpoints_of_other_channels_load(tmp_path, capsys):
    """A field that is equal in all channels is embedded as before; all but patch embedding and head is as there."""
    theirs, ours = pretrained(3), small_videomae(5)
    head = {k: v.clone() for k, v in ours.decoder.head.state_dict().items()}
    torch.save(official_checkpoint(theirs.state_dict()), tmp_path / 'checkpoint.pth')
    videomae.load_published(ours, tmp_path / 'checkpoint.pth')
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and 'mean over its 3 channels x 3/5' in said and 'head stays' in said
    x = clips(2, 1, 4, 16, 16)
    embed = lambda model, channels: model.features(x.expand(2, channels, 4, 16, 16))
    assert torch.allclose(embed(ours, 5), embed(theirs, 3), atol=1e-4)
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
        videomae.load_published(model, tmp_path / 'other.pth')
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
    with pytest.raises(ValueError, match=re.escape(f'{path} ') + '(is not a checkpoint|holds no state)') as e:
        videomae.load_published(small_videomae(), path)
    assert str(e.value).isprintable()                                    # one line
    with pytest.raises(FileNotFoundError):
        videomae.load_published(small_videomae(), tmp_path / 'nowhere.pth')


def test_the_share_that_is_hidden_reaches_the_network():
    module = find_model('videomae')
    for share, hidden in (0.5, 8), (0.75, 12):
        options = module.Options(size='nano', patch=8, mask_ratio=share, decoder_width=64, decoder_depth=1)
        network = module.build(options, Inputs('x', ['a'], (True, True), (32, 32)))
        seen = []
        network.encoder.register_forward_hook(lambda module, args, tokens: seen.append(tokens.shape[1]))
        network(*torch.randn(2, 2, 1, 16, 32, 32), torch.Generator())
        assert seen == [8 * (16 - hidden)], seen
