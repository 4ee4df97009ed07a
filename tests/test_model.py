"""model.py: a trained model from Python, raw fields, tiles, and starting from or going on with a run."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import eval as evaluation
from common import mean_and_std
from helpers import ACTIVE, MODELS, TINY, losses, refused, run
from model import Inputs, Model, load_checkpoint, load_run, tile_starts
from train import learning_rate


def windows(well, n=2):
    split = data.Split(well / 'active_matter', ACTIVE, 'test', 32, progress=False, whole=True)
    return split.load(split.windows[:n], frames=16)


def test_three_lines_of_python(well, trained):
    """Raw fields in, tokens out: as if normalised by hand and put through the encoder of the checkpoint."""
    model, x = load_run(trained, device='cpu'), windows(well)
    tokens = model.embed(x)
    assert tokens.shape == (2, 4, 8) and not tokens.requires_grad and not model.training
    state = load_checkpoint(trained / 'ckpt.pt')
    mean, std = (torch.tensor(state[k]).view(-1, 1, 1, 1) for k in ('mean', 'std'))
    assert std.min() < 0.5 and torch.equal(tokens, model.network.features((x - mean) / std))
    assert torch.equal(model.network.state_dict()['encoder.res_blocks.1.0.gamma'],
                       state['model']['encoder.res_blocks.1.0.gamma'])
    assert not torch.allclose(load_run(trained, 'cpu', trained=False).embed(x), tokens, atol=1e-2)
    assert model.features(x).requires_grad
    for wrong in x[0], x[:, :3], x[:, :, :8], x[..., :20]:
        with pytest.raises(ValueError, match='(embed takes fields .B, 11, 16, H, W.|divisible by 16)'):
            model.embed(wrong)


class Places(torch.nn.Module):
    """Its one token is the corner of what it sees."""

    def features(self, x):
        assert x.shape[-2:] == (16, 24)
        return x[:, :, 0, 0, 0][:, None]                                 # (B, 1, C)


def test_models_bound_to_their_size_see_all_of_a_field():
    """In tiles, evenly spaced, that overlap where they must; every point is in one."""
    assert tile_starts(64, 32) == [0, 32] and tile_starts(32, 32) == [0] and tile_starts(96, 32) == [0, 32, 64]
    assert tile_starts(48, 32) == [0, 16] and tile_starts(70, 32) == [0, 19, 38]
    model = Model(Places(), Inputs('any', ['a', 'b'], (True, True), (16, 24)), [0, 1], [1, 2])
    x = torch.randn(3, 2, 16, 32, 36)
    corners = torch.stack([x[:, :, 0, i, j] for i in (0, 16) for j in (0, 12)], 1)               # (B, 4, C)
    assert torch.allclose(model.embed(x), (corners - torch.tensor([0, 1])) / torch.tensor([1, 2]))
    with pytest.raises(ValueError, match='at least 16 x 24; not .3, 2, 16, 16, 20.'):
        model.embed(x[..., :16, :20])


class Seen(torch.nn.Module):
    """Its tokens are all it sees."""

    def features(self, x):
        return x.flatten(2).transpose(1, 2)


def test_probes_see_the_noise_of_training():
    """Of the size it had there, after normalisation, whatever the units of a channel; and none where there was none."""
    model = Model(Seen(), Inputs('any', ['a', 'b'], (True, True), (32, 32)), [0, 5], [1, 100], any_size=True)
    run_with = lambda noise: SimpleNamespace(c=SimpleNamespace(seed=0, noise=noise))
    x = torch.zeros(2, 2, 16, 32, 32) + torch.tensor([0, 5]).view(-1, 1, 1, 1)
    noisy = evaluation.Run.encode(run_with(2.0), model)(x)
    assert (noisy.std((0, 1)) - 2).abs().max() < 0.05
    assert not evaluation.Run.encode(run_with(0.0), model)(x).any()


@pytest.mark.parametrize('dims', [(1, 3), (2,), (0, 1, 2, 3)])
def test_mean_and_spread_are_torchs(dims):
    """In their gradients, too; and where there is no spread, that is zero."""
    x = 5 + 3 * torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    std, mean = torch.std_mean(x, dims, keepdim=True)
    ours = mean_and_std(x, dims)
    assert torch.allclose(ours[0], mean, rtol=1e-14) and torch.allclose(ours[1], std, rtol=1e-14)
    g, = torch.autograd.grad((std**3 + 2 * mean).sum(), x)
    own, = torch.autograd.grad((ours[1]**3 + 2 * ours[0]).sum(), x)
    assert torch.allclose(own, g, rtol=1e-12)
    flat = torch.full((3, 4, 5, 6), 0.1, dtype=torch.float64, requires_grad=True)
    mean, std = mean_and_std(flat, dims)
    g, = torch.autograd.grad((mean + std).sum(), flat)
    assert std.max() < 1e-15 and g.isfinite().all() and torch.allclose(g, torch.full_like(g, mean.numel() / g.numel()))


@pytest.mark.parametrize('shape, tokens', [((2, 5), (2, 1, 5)), ((2, 7, 5), (2, 7, 5)), ((2, 5, 3, 4), (2, 12, 5)),
                                           ((2, 5, 2, 3, 4), (2, 24, 5))])
def test_whatever_an_encoder_gives_becomes_tokens(shape, tokens):
    class Network(torch.nn.Module):
        def encoder(self, x):
            self.embedding = x
            return x
    model = Model(Network(), Inputs('any', ['a'], (True, True), (16, 16)), [0], [1])
    assert model.tokens(torch.zeros(shape)).shape == tokens
    channels = model.embedding.movedim(1, -1).reshape(-1, 5)             # what the log's rank is taken of
    assert len(channels) == np.prod(tokens[:2])


def test_finished_runs_are_extended_or_used_as_a_start(well, trained, tmp_path):
    flags = [*TINY, '--data-dir', well, '--out', 'out/a', '--warmup-epochs', 0]
    run('train.py', *flags, '--steps', 4, cwd=tmp_path)
    first = losses(tmp_path / 'out/a')
    assert 'extended from 4 steps to 7' in run('train.py', *flags, '--steps', 7, cwd=tmp_path).stdout
    assert len(losses(tmp_path / 'out/a')) == 7 and losses(tmp_path / 'out/a')[:4] == first
    rates = [json.loads(line)['lr'] for line in (tmp_path / 'out/a/log.jsonl').read_text().splitlines()]
    assert rates[3] == pytest.approx(1e-6) and rates[4:] == [learning_rate(s, 7, 0, 3e-3, 1e-6) for s in (4, 5, 6)]
    assert load_checkpoint(tmp_path / 'out/a/ckpt.pt')['step'] == 7
    refused('train.py', *flags, '--steps', 5, cwd=tmp_path, words=['7 steps, now 5'])
    start = [*TINY, '--data-dir', well, '--init', 'out/a', '--lr', 1e-4, '--out', 'out/b', '--steps']
    run('train.py', *start, 0, cwd=tmp_path)
    one, two = (load_checkpoint(tmp_path / 'out' / name / 'ckpt.pt') for name in 'ab')
    assert two['step'] == 0 and all(torch.equal(v, two['model'][k]) for k, v in one['model'].items())
    run('train.py', *start, 2, cwd=tmp_path)
    assert len(losses(tmp_path / 'out/b')) == 2
    other = [*MODELS['videomae'], '--data-dir', well, '--init', 'out/a', '--out', 'out/c']
    refused('train.py', *other, cwd=tmp_path, words=['another model'])
