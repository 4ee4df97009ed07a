"""probe.py: the official attentive probe, and planted labels."""
import math

import torch

import eval as evaluation
import probe
from helpers import both_dtypes, check_parity, fill, inputs


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


def mse(splits, estimates):
    """Of each label on test."""
    return (estimates - splits['test'][1]).pow(2).mean(0)


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
    assert (mse(splits, probe.linear(splits)[0]) < 1.5 * 0.1**2).all()
    shuffled = {name: (x, y.flip(0)) for name, (x, y) in splits.items()}
    assert (mse(shuffled, probe.linear(shuffled)[0]) > 0.5).all()


def test_knn_probe_recovers_clusters():
    g = torch.Generator().manual_seed(0)
    centers, values = torch.randn(5, 1, 8, generator=g), torch.randn(5, 2, generator=g)
    splits = {}
    for name in 'train', 'valid', 'test':
        which = torch.randint(5, (100,), generator=g)
        splits[name] = centers[which] + 0.01 * torch.randn(100, 3, 8, generator=g), values[which]
    assert (mse(splits, probe.knn(splits)[0]) < 1e-6).all()


def test_attentive_probe_learns_what_the_mean_token_hides():
    """The label is read from whichever token is marked: attention must find it."""
    g, splits = torch.Generator().manual_seed(0), {}
    for name in 'train', 'valid', 'test':
        x, which = torch.randn(400, 3, 16, generator=g), torch.randint(3, (400,), generator=g)
        x[:, :, 0] = 3.0 * (torch.arange(3) == which[:, None])
        splits[name] = x, x[torch.arange(400), which, 1:3]
    estimates, size = probe.attentive(splits, epochs=15, lr=1e-2)
    assert (mse(splits, estimates) < 0.2).all() and (mse(splits, probe.linear(splits)[0]) > 0.5).all()
    assert size == sum(p.numel() for p in probe.AttentiveProbe(16, 2).parameters())


def test_features_are_scaled_by_all_training_tokens():
    """Where few are labelled: by none else of the splits, and the ridge's bias is free all the same."""
    splits = planted(n=60)
    few = {name: (x[:4] if name == 'train' else x, y[:4] if name == 'train' else y) for name, (x, y) in splits.items()}
    scaled = probe.standardize(few | {'unlabelled': splits['train']})
    mean = splits['train'][0].double().mean(1)
    for name, (x, y) in few.items():
        by_hand = (x.double().mean(1) - mean.mean(0)) / mean.std(0)
        assert torch.allclose(scaled[name][0], by_hand, atol=1e-6)
        assert torch.equal(scaled[name][1], y.double())
    for ridge in 1e-6, 10.0:                                             # of centred features and labels, by hand
        x, y, z = scaled['train'][0], scaled['train'][1], scaled['test'][0]
        w = torch.linalg.solve((x - x.mean(0)).T @ (x - x.mean(0)) + ridge * torch.eye(16), (x - x.mean(0)).T @ (y - y.mean(0)))
        estimates, _ = probe.linear(few | {'unlabelled': splits['train']}, ridge=ridge)
        assert torch.allclose(estimates, (z - x.mean(0)) @ w + y.mean(0), atol=1e-6)


def test_probes_choose_on_valid():
    """The setting kept is the best on valid even where test prefers another."""
    noisy, clean = planted(n=50, noise=1.0), planted(n=50, noise=0.0)
    splits = {'train': noisy['train'], 'valid': noisy['train'], 'test': clean['train']}        # valid rewards memory
    assert torch.equal(probe.knn(splits)[0], probe.knn(splits, ks=(1,))[0])
    assert (mse(splits, probe.knn(splits)[0]) > mse(splits, probe.knn(splits, ks=(10,))[0])).all()
    assert torch.equal(probe.linear(splits)[0], probe.linear(splits, strengths=(1e-8,))[0])
    x, y = planted()['train']
    splits = {'train': (x, y), 'valid': (x, -3 * y), 'test': (x, y)}     # valid prefers the untrained: the first epoch
    kept, first = (probe.attentive(splits, epochs=n)[0] for n in (8, 1))
    assert torch.equal(kept, first)
    better, last = probe.attentive({**splits, 'valid': (x, y)}, epochs=8)[0], probe.attentive(
        splits, epochs=8, keep_best=False)[0]
    assert (mse(splits, better) < mse(splits, first) - 0.1).all() and torch.equal(better, last)


def test_uninformative_features_score_like_the_mean():
    """Labels z-scored by train, features constant: every probe can only predict the mean, and scores 1."""
    y = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    y = (y - y.mean(0)) / y.std(0, unbiased=False)
    splits = {name: (torch.ones(300, 2, 8), y) for name in ('train', 'valid', 'test')}
    assert torch.allclose(mse(splits, probe.linear(splits)[0]).float(), torch.ones(2), atol=1e-4)
    assert torch.allclose(mse(splits, probe.attentive(splits, epochs=5)[0]), torch.ones(2), atol=2e-2)


def test_ridge_strength_is_chosen_on_valid():
    """As many features as windows: the weakest penalty fits the training windows, noise and all."""
    splits = planted(n=40, dim=40, noise=1.0)
    weakest = probe.linear(splits, strengths=(1e-8,))[0]
    assert (mse(splits, probe.linear(splits)[0]) < 0.5 * mse(splits, weakest)).all()


def test_features_are_of_one_scale():
    """A large feature that says nothing does not drown a small one that says all, for neighbours and for ridge."""
    splits = planted(dim=8, noise=0.1)
    for name, (x, y) in splits.items():
        x = torch.cat([y[:, None, :].expand(-1, x.shape[1], -1), x * 1000], 2)
        splits[name] = x, y
    assert (mse(splits, probe.knn(splits)[0]) < 0.5).all()
    small = {name: (x * 1e-6, y) for name, (x, y) in splits.items()}
    assert torch.allclose(probe.linear(small)[0], probe.linear(splits)[0], atol=1e-3)


def test_features_are_z_scored_by_train_alone():
    """The splits that choose and score may be shifted and stretched: their statistics play no part."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n, shift, scale: (shift + scale * torch.randn(n, 3, 8, generator=generator), torch.zeros(n, 1))
    splits = {'train': draw(50, 2.0, 3.0), 'valid': draw(20, -7.0, 11.0), 'test': draw(30, 40.0, 0.1)}
    scaled = probe.standardize(splits)
    mean, std = (getattr(splits['train'][0].double().mean(1), name)(0) for name in ('mean', 'std'))
    for name, (x, _) in splits.items():
        assert torch.allclose(scaled[name][0] * std + mean, x.double().mean(1), atol=1e-4), name


def test_tokens_that_memory_does_not_hold(tmp_path, monkeypatch):
    """Half precision, in a file that leaves no trace; worked on in parts; the probes read the same from them."""
    torch.manual_seed(0)
    kept = {name: (torch.randn(n, 5, 8), torch.randn(n, 2)) for name, n in (('train', 40), ('valid', 20), ('test', 20))}
    kept = {name: (x, x.mean(1)[:, :2] * 3 + 0.1 * y) for name, (x, y) in kept.items()}
    whole = [probe.attentive(kept, epochs=5)[0], probe.linear(kept)[0], probe.knn(kept)[0]]
    assert probe.room_for(3, 5, 8, tmp_path).dtype == torch.float32
    monkeypatch.setattr(probe, 'IN_MEMORY', 1)
    monkeypatch.setattr(probe, 'PART', 4 * 5 * 8 * 3)
    stored = {}
    for name, (x, y) in kept.items():
        stored[name] = probe.room_for(*x.shape, tmp_path), y
        stored[name][0][:] = x
    assert stored['train'][0].dtype == torch.float16 and not any(tmp_path.iterdir())
    assert [len(part) for part in probe.parts(stored['valid'][0])] == [3] * 6 + [2]
    for a, b in zip(whole, [probe.attentive(stored, epochs=5)[0], probe.linear(stored)[0], probe.knn(stored)[0]]):
        assert (a - b.to(a)).abs().median() < 0.01                       # a near neighbour may be another


def test_a_probe_of_few_windows_has_its_epochs(monkeypatch):
    """At least as many as it is told, and as many as --epochs says."""
    torch.manual_seed(0)
    splits = {name: (torch.randn(9, 2, 8), torch.randn(9, 1)) for name in ('train', 'valid', 'test')}
    had, attentive = [], probe.attentive
    monkeypatch.setattr(probe, 'attentive', lambda *args, tick, **settings: attentive(
        *args, tick=lambda: had.append(args[2]), **settings))
    for asked, least, epochs in (1, 0, 1), (1, 7, 7), (7, 3, 7):
        args = evaluation.Settings(epochs=asked, split='test', probes='attentive')
        evaluation.fit_probes(splits, args, 'x', epochs=least)
        assert had == [epochs] * epochs
        had.clear()
