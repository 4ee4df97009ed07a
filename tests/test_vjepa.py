"""variants/vjepa.py: the official predictor and blocks, masks that never overlap, and a teacher that moves as it should."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from helpers import MODELS, PARITY, both_dtypes, check_parity, fill, filled
from model import Inputs, Model, embedding_health, load_checkpoint
from variants import vjepa
from variants.vjepa import MASKS, VJEPA, Predictor, block_size, union_of_blocks, visible_and_hidden
from vicreg import covariance_loss, variance_loss
from videomae import patchify, tube_masks

MINI = dict(width=24, depth=2, heads=2, patch=4, predictor_width=12, predictor_depth=1, mask_ratio=0.75)
GRIDS = (8, 4, 4), (8, 14, 14), (8, 2, 3), (4, 8, 2)
seeded = lambda seed: torch.Generator().manual_seed(seed)


def official_name(key):
    """Ours -> that of facebookresearch/vjepa2."""
    for ours, theirs in ('embed.', 'predictor_embed.'), ('decoder.blocks.', 'predictor_blocks.'), (
            'decoder.norm.', 'predictor_norm.'), ('decoder.head.', 'predictor_proj.'), ('mask_token', 'mask_tokens.0'):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)


@both_dtypes
def test_predictor_is_the_official_one(dtype):
    predictor = fill(Predictor(24, 16, 2, 2), dtype, official_name)
    visible, hidden = (torch.tensor(PARITY[f'vjepa_predictor/{name}']) for name in ('visible', 'hidden'))
    z = filled('input', (2, 40, 24), True).to(dtype)
    with torch.no_grad():
        check_parity('vjepa_predictor', out=predictor(z, visible, hidden, 128))


def test_blocks_are_the_official_ones():
    """Their size for a share and an aspect; and how much of a clip the union of several hides, on average."""
    for H, W, share, aspect, h, w in PARITY['vjepa_masks/sizes']:
        assert block_size(int(H), int(W), share, aspect) == (h, w)
    assert vjepa.SHORT == (8, 0.15) and vjepa.LONG == (2, 0.7)
    for H, W, blocks, share, mean, error in PARITY['vjepa_masks/shares']:
        grid = 8, int(H), int(W)
        if blocks == 2 and H == W == 4:                                  # all hidden is drawn again: one share remains
            assert mean == 0.75
        found = [union_of_blocks(1, grid, int(blocks), share, seeded(seed)).float().mean() for seed in range(400)]
        assert abs(np.mean(found) - mean) < 5 * error, (H, W, blocks)


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('name', MASKS)
def test_nothing_is_both_visible_and_hidden(name, grid):
    """For every mask, grid and seed: equally many of each in every clip, each once, and the mask is obeyed."""
    N = grid[0] * grid[1] * grid[2]
    for seed in range(20):
        masks = MASKS[name](3, grid, 0.75, seeded(seed))
        assert len(masks) == (2 if name == 'block' else 1)
        for mask, again in zip(masks, MASKS[name](3, grid, 0.75, seeded(seed))):
            assert mask.shape == (2, 3, N) and mask.dtype == torch.bool and torch.equal(mask, again)
            visible, hidden = visible_and_hidden(mask, seeded(seed))
            assert visible.shape[-1] == (~mask).sum(-1).min() > 0 and hidden.shape[-1] == mask.sum(-1).min() > 0
            assert not mask.gather(-1, visible).any() and mask.gather(-1, hidden).all()
            for v, h in zip(visible.flatten(0, 1), hidden.flatten(0, 1)):
                assert len({*v.tolist()} | {*h.tolist()}) == len(v) + len(h)
                assert v.tolist() == sorted(v.tolist()) and h.tolist() == sorted(h.tolist())


def test_which_tokens_each_mask_hides():
    grid, places = (8, 4, 4), 16
    random, = MASKS['random'](3, grid, 0.75, seeded(1))
    assert torch.equal(random.flatten(0, 1)[:, :places], tube_masks(3, places, 0.75, seeded(1)))     # VideoMAE's
    assert torch.equal(random.view(2, 3, 8, places), random.view(2, 3, 8, places)[:, :, :1].expand(2, 3, 8, places))
    temporal, = MASKS['temporal'](3, grid, 0.5, seeded(1))
    assert temporal.view(2, 3, 8, places).all(-1).tolist() == [[[False] * 4 + [True] * 4] * 3] * 2
    short, long = MASKS['block'](50, (8, 14, 14), 0.0, seeded(1))
    for mask in short, long:
        tubes = mask.view(100, 8, 14, 14)
        assert torch.equal(tubes, tubes[:, :1].expand_as(tubes)) and len({t.numpy().tobytes() for t in tubes}) > 40
    one = union_of_blocks(1, (1, 14, 14), 1, 0.15, seeded(2))[0, 0].view(14, 14)
    rows, columns = one.any(1).nonzero().flatten(), one.any(0).nonzero().flatten()
    assert one[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].all() and one.sum() == len(rows) * len(columns) > 20
    with pytest.raises(ValueError, match='temporal|hides 8 of 8'):
        MASKS['temporal'](1, grid, 1.0, None)
    with pytest.raises(ValueError, match='smaller --patch'):
        MASKS['block'](1, (8, 1, 1), 0.5, None)


def test_the_predictor_sees_nothing_hidden():
    """Other pixels in hidden places change the targets, and no prediction; visible ones change both."""
    torch.manual_seed(0)
    model, x = VJEPA(3, **MINI).eval(), torch.randn(2, 3, 16, 16, 16)
    mask, = MASKS['random'](1, (8, 4, 4), 0.75, seeded(0))
    visible, hidden = (i.flatten(0, 1) for i in visible_and_hidden(mask, seeded(0)))

    def both(changed):
        patches = patchify(x, 2, 4).clone()
        patches[torch.arange(2)[:, None], changed] += 1
        p = model.predictor(model.encoder(patches, visible), visible, hidden, patches.shape[1])
        return p, model.targets(patches)
    p, y = both(visible[:, :0])
    other_p, other_y = both(hidden)
    assert torch.equal(p, other_p) and not torch.allclose(y, other_y, atol=1e-3)
    assert not torch.allclose(both(visible)[0], p, atol=1e-3)
    assert torch.allclose(y.mean(-1), torch.zeros(2, 128), atol=1e-6)    # layer-normed
    assert torch.allclose(y.var(-1, unbiased=False), torch.ones(2, 128), atol=1e-3)


def huber(error):
    return torch.where(error.abs() < 1, error**2 / 2, error.abs() - 0.5)


@pytest.mark.parametrize('distance, of', [('l1', torch.abs), ('smooth-l1', huber), ('l2', torch.square)])
def test_the_loss_is_the_mean_distance_over_hidden_tokens(distance, of):
    torch.manual_seed(0)
    model, x = VJEPA(3, **MINI, masks='temporal', distance=distance, vicreg=0.01).double(), torch.randn(
        2, 2, 3, 16, 16, 16, dtype=torch.float64)
    model.teacher.norm.weight.data.mul_(2)                               # or its output would be normal already
    losses = model(*x, seeded(0))
    patches, visible = patchify(x.flatten(0, 1), 2, 4), torch.arange(32).expand(4, -1)
    hidden = torch.arange(32, 128).expand(4, -1)
    z = model.encoder(patches, visible)
    y = F.layer_norm(model.teacher(patches), (24,))[:, 32:]
    error = of(model.predictor(z, visible, hidden, 128) - y).mean()
    std, cov = variance_loss(z.flatten(0, 1)), covariance_loss(z.flatten(0, 1))
    assert torch.allclose(losses['error'], error) and torch.allclose(losses['std'], std)
    assert torch.allclose(losses['loss'], error + 0.01 * (25 * std + cov))
    assert torch.equal(model.embedding, z.detach())                      # for the log
    losses['loss'].backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad is not None for p in [*model.encoder.parameters(), *model.predictor.parameters()])


def test_every_mask_has_its_share_of_the_loss():
    """Of two block masks: the mean of the errors of each, with the tokens that are drawn for it."""
    torch.manual_seed(0)
    model, x = VJEPA(3, **MINI), torch.randn(2, 2, 3, 32, 16, 16)[:, :, :, :16]
    loss, generator, patches, errors = model(*x, seeded(0))['loss'], seeded(0), patchify(x.flatten(0, 1), 2, 4), []
    for mask in MASKS['block'](2, (8, 4, 4), 0.75, generator):
        visible, hidden = (i.flatten(0, 1) for i in visible_and_hidden(mask, generator))
        y = model.targets(patches)[torch.arange(4)[:, None], hidden]
        errors.append((model.predictor(model.encoder(patches, visible), visible, hidden, 128) - y).abs().mean())
    assert len(errors) == 2 and torch.allclose(loss, sum(errors) / 2) and not torch.allclose(*errors)


def test_the_next_frames_are_predicted_place_by_place():
    """--masks next: of all tokens; the teacher sees the target alone, and the encoder the context alone."""
    torch.manual_seed(0)
    model, x = VJEPA(3, **MINI, masks='next', distance='l2', vicreg=0.01, std_coeff=50.0).double(), torch.randn(
        2, 2, 3, 16, 16, 16, dtype=torch.float64)
    model.teacher.norm.weight.data.mul_(2)                               # it is not normed again
    losses = model(*x, seeded(0))
    z, y = model.encoder(patchify(x[0], 2, 4)), model.teacher(patchify(x[1], 2, 4))         # (2, 128, 24)
    decoder, positions = model.predictor.decoder, vjepa.positions(128, 12, torch.float64)
    p = decoder.head(decoder.norm(decoder.blocks(model.predictor.embed(z) + positions)))
    std, cov = variance_loss(z.flatten(0, 1)), covariance_loss(z.flatten(0, 1))
    error = (p - y).square().mean()
    assert torch.allclose(losses['error'], error) and torch.equal(model.embedding, z.detach())
    assert torch.allclose(losses['loss'], error + 0.01 * (50 * std + cov))
    assert torch.equal(model(*x, seeded(1))['loss'], losses['loss'])     # nothing is drawn
    losses['loss'].backward()
    trained = [*model.encoder.parameters(), *model.predictor.parameters()]
    assert all(p.grad is not None for p in trained if p.requires_grad)   # as DDP wants it
    assert [p is model.predictor.mask_token for p in trained if not p.requires_grad] == [True]
    assert all(p.grad is None for p in model.teacher.parameters())


def test_the_teacher_moves_by_its_formula(well, tmp_path):
    """Ten steps with a momentum that rises from 0.5 to 1; it is in the checkpoint."""
    flags = [str(v) for v in (*MODELS['vjepa'], '--momentum', '0.5,1', '--data-dir', well)]
    seen, move = [], vjepa.move_teacher

    def noted(teacher, encoder, momentum, progress):
        before, now = (next(m.parameters()).detach().clone() for m in (teacher, encoder))
        move(teacher, encoder, momentum, progress)
        seen.append((before, now, next(teacher.parameters()).detach().clone()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vjepa, 'move_teacher', noted)
        train.main([*flags, '--steps', '10', '--out', str(tmp_path / 'a')])
    for step, (before, now, after) in enumerate(seen):
        m = 0.5 + 0.5 * (step + 1) / 10
        assert torch.allclose(after, m * before + (1 - m) * now, atol=1e-7)
        assert step == 0 or torch.equal(before, seen[step - 1][2])
    assert len(seen) == 10 and not torch.allclose(seen[8][2], seen[0][0], atol=1e-5)
    state = load_checkpoint(tmp_path / 'a' / 'ckpt.pt')['model']
    assert torch.equal(state['teacher.patch_embed.proj.weight'], seen[-1][2])


@pytest.mark.parametrize('flags, words', [
    (['--masks', 'stripes'], 'stripes'), (['--distance', 'l3'], 'l3'), (['--momentum', '0.9'], 'momentum'),
    (['--momentum', '0.9,1.5'], 'momentum'), (['--masks', 'temporal', '--mask-ratio', '1'], '8 of 8'),
    (['--masks', 'random', '--mask-ratio', '0'], 'hides 0'), (['--predictor-width', '0'], 'at least 1'),
    (['--predictor-width', '100', '--heads', '3'], 'divisible'), (['--vicreg', '-1'], 'at least 0'),
    (['--masks', 'block', '--patch', '16', '--crop', '16'], 'smaller --patch'), (['--std-coeff', '-1'], 'at least 0'),
    (['--masks', 'next', '--views', 'unpaired'], 'paired'), (['--masks', 'last'], 'temporal, next, not')])
def test_bad_options_are_refused(well, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        train.parse([*map(str, MODELS['vjepa']), '--data-dir', str(well), '--out', str(tmp_path / 'a'), *flags], '')


def test_a_collapse_shows_in_the_log():
    """Equal tokens, of any number: the std over them is 0, though each has a spread over its channels."""
    model = Model(VJEPA(3, **MINI), Inputs('any', list('abc'), (True, True), (16, 16)), [0] * 3, [1] * 3)
    x = torch.randn(2, 2, 3, 16, 16, 16)
    model.network(*x, seeded(0))
    healthy = embedding_health(model.embedding)
    assert model.embedding.shape[:2] == (4, 24) and healthy['embedding_std'] > 0.1 and healthy['embedding_rank'] > 2
    model.network.encoder.norm.weight.data.zero_()
    model.network.encoder.norm.bias.data.copy_(torch.randn(24))
    model.network(*x, seeded(0))
    assert embedding_health(model.embedding)['embedding_std'] < 1e-5


def test_in_bfloat16():
    """Under autocast variance and covariance are taken in full precision."""
    torch.manual_seed(0)
    model, x = VJEPA(3, **MINI, vicreg=0.01), torch.randn(2, 2, 3, 16, 16, 16)
    full = model(*x, seeded(0))
    with torch.autocast('cpu', torch.bfloat16):
        mixed = model(*x, seeded(0))
        rows = model.embedding.flatten(0, 1)
    assert mixed['cov'].dtype == mixed['std'].dtype == mixed['loss'].dtype == torch.float32
    assert model.embedding.dtype == torch.float32 and len(rows) == 4 * model.embedding.shape[1]
    assert torch.allclose(mixed['loss'], full['loss'], rtol=0.02)


def test_settings():
    """Those that a long run would be needed to show; nano's are in test_train.py."""
    o = vjepa.Options()
    assert (o.masks, o.distance, o.momentum, o.vicreg) == ('block', 'l1', (0.996, 1.0), 0.0)
    model = VJEPA(3, **MINI)
    assert model.undecayed('predictor.mask_token', model.predictor.mask_token)
    assert not model.undecayed('predictor.embed.weight', model.predictor.embed.weight)
