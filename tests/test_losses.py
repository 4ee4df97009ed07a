"""objectives.py and the teacher of jepa.py: the formulas, and what JEPA makes of them."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import jepa
import train
from helpers import NANO
from jepa import JEPA, load_published, move_teacher
from model import Inputs, Model
from objectives import infonce, infonce_loss_maps, random_directions, sigreg, sigreg_loss_maps

SMALL = {'encoder': 'statistics', 'widths': (4, 4, 4, 8)}
seeded = lambda seed: torch.Generator().manual_seed(seed)


def epps_pulley(x, reach):
    """N int |phi - exp(-t^2/2)|^2 exp(-t^2/2) dt over [-reach, reach], by a fine sum over complex exponentials."""
    t = np.linspace(-reach, reach, 20001)
    phi = np.exp(1j * t[:, None] * x).mean(1)
    return len(x) * np.sum(np.abs(phi - np.exp(-t**2 / 2))**2 * np.exp(-t**2 / 2)) * (t[1] - t[0])


@pytest.mark.parametrize('scale, shift', [(1.0, 0.0), (0.3, 0.0), (1.0, 2.0), (0.0, 0.0)])
def test_sigreg_is_the_statistic_of_epps_and_pulley(scale, shift):
    """Mean over directions, by quadrature of the formula on both sides of 0."""
    z, a = scale * torch.randn(50, 3, generator=seeded(0)).double() + shift, random_directions(3, 4, seeded(1)).double()
    exact = np.mean([epps_pulley((z @ a[:, k]).numpy(), 3.0) for k in range(4)])
    assert sigreg(z, a).item() == pytest.approx(exact, rel=1e-2)
    assert sigreg(z, a, knots=2001).item() == pytest.approx(exact, rel=1e-5)
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    phi = torch.exp(1j * t[:, None, None] * (z @ a)).mean(1).T           # (4, 33)
    rule = torch.trapezoid((phi - torch.exp(-t**2 / 2)).abs()**2 * torch.exp(-t**2 / 2), t).mean().item()
    assert sigreg(z, a).item() == pytest.approx(50 * rule, rel=1e-9)     # 17 knots on each side of 0
    wide = np.mean([epps_pulley((z @ a[:, k]).numpy(), 12.0) for k in range(4)])
    assert exact == pytest.approx(wide, rel=0.02)                        # 3 is far enough


def test_sigreg_tells_normal_from_collapsed():
    """About 1 for white noise, whatever the number of rows; of what is not normal it grows with them."""
    a = random_directions(16, 256, seeded(0))
    assert torch.allclose(a.norm(dim=0), torch.ones(256)) and (a @ a.T / 256 - torch.eye(16) / 16).abs().max() < 0.03
    noise = [torch.randn(n, 16, generator=seeded(n)) for n in (200, 2000)]
    for z in noise:
        assert 0.5 < sigreg(z, a) < 1.5
    for bad in (lambda z: 0 * z), (lambda z: z[:, :1].expand(-1, 16)), (lambda z: 3 * z):
        few, many = (sigreg(bad(z), a).item() for z in noise)
        assert few > 2.5 and many == pytest.approx(10 * few, rel=0.35)


def test_sigreg_loss_of_maps():
    """Both embeddings count, every position is a row, and the weights add up to one."""
    x, y = torch.randn(2, 6, 8, 2, 3, generator=seeded(0)).unbind()
    out = sigreg_loss_maps(x, y, 0.1, 32, seeded(3))
    a = random_directions(8, 32, seeded(3))
    rows = [z.permute(0, 2, 3, 1).reshape(-1, 8) for z in (x, y)]
    assert torch.allclose(out['sigreg'], (sigreg(rows[0], a) + sigreg(rows[1], a)) / 2)
    assert torch.allclose(out['loss'], 0.9 * F.mse_loss(x, y) + 0.1 * out['sigreg'])
    assert not torch.equal(out['sigreg'], sigreg_loss_maps(x, y, 0.1, 32, seeded(4))['sigreg'])
    assert sigreg_loss_maps(x.bfloat16(), y.bfloat16(), 0.1, 32, seeded(3))['loss'].dtype == torch.float32


def test_sigreg_makes_a_collapsed_cloud_normal():
    """Gradient descent on the statistic alone: from a line to an isotropic cloud."""
    z = (torch.randn(256, 1, generator=seeded(0)) + 0.05 * torch.randn(256, 4, generator=seeded(1))).requires_grad_()
    optimizer = torch.optim.Adam([z], 0.05)
    for step in range(600):
        optimizer.zero_grad()
        sigreg(z, random_directions(4, 16, seeded(step))).backward()
        optimizer.step()
    assert (torch.cov(z.detach().T) - torch.eye(4)).abs().max() < 0.3 and z.mean(0).abs().max() < 0.1


def test_infonce_is_the_cross_entropy_of_similarities():
    x, y = torch.randn(2, 7, 5, generator=seeded(0)).double().unbind()
    cosine = lambda i, j: (x[i] @ y[j] / x[i].norm() / y[j].norm()).item()
    s = np.array([[cosine(i, j) / 0.2 for j in range(7)] for i in range(7)])
    both = [-np.mean(np.diag(m) - np.log(np.exp(m).sum(1))) for m in (s, s.T)]
    out = infonce(x, y, 0.2)
    assert out['loss'].item() == pytest.approx(np.mean(both)) and out['found'] == np.mean(s.argmax(1) == np.arange(7))
    maps = infonce_loss_maps(x.view(7, 5, 1, 1).expand(7, 5, 2, 3), y.view(7, 5, 1, 1), 0.2)
    assert torch.allclose(maps['loss'], out['loss'])                     # positions are averaged
    assert infonce(x, y)['loss'] == out['loss']                          # the default
    assert infonce(x, x, 0.05)['loss'] < 0.1 and infonce(x, x)['found'] == 1
    with pytest.raises(ValueError, match='at least 2'):
        infonce(x[:1], y[:1])


def test_infonce_compares_with_other_runs_alone():
    """Windows 0 and 2 are of one run: neither is the other's negative, whatever its embedding; 1 and 3 are."""
    x, y = torch.randn(2, 4, 5, generator=seeded(0)).double().unbind()
    runs = torch.tensor([7, 3, 7, 5])

    def loss(y, runs=runs):
        return infonce(x, y, 0.2, runs)['loss']
    left = [[0, 1, 3], [0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3]]             # whom each window is compared with
    s = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(y).T / 0.2
    by_hand = [[m[n, those].logsumexp(0) - m[n, n] for n, those in enumerate(left)] for m in (s, s.T)]
    assert loss(y).item() == pytest.approx(np.mean(by_hand))
    assert loss(y, torch.arange(4)) == infonce(x, y, 0.2)['loss'] > loss(y)
    assert infonce(x, y, 0.2, torch.ones(4))['loss'] == 0                # nobody to be compared with
    maps = infonce_loss_maps(x[..., None, None], y[..., None, None], 0.2, runs)
    assert maps['loss'].item() == pytest.approx(loss(y).item())


def test_infonce_is_told_the_runs_by_each_step():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32, 32)
    c = train.Config(batch=4, micro_batch=4, views='other-time')
    losses = []
    for runs in torch.arange(4), torch.tensor([0, 1, 0, 1]):
        torch.manual_seed(1)
        model = Model(JEPA(3, **SMALL, loss='infonce'), Inputs('any', list('abc'), (True, True), (32, 32)),
                      [0.0] * 3, [1.0] * 3)
        sgd = torch.optim.SGD(model.parameters(), 0.0)
        losses.append(train.train_step(model, model.network, sgd, iter([(x, None, runs)]), c, 0)['loss'])
    assert losses[1] < losses[0]


def test_teacher_formula():
    slow, fast = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    old = [p.clone() for p in slow.parameters()]
    move_teacher(slow, fast, (0.9, 1.0), 0.5)                            # m = 0.95
    for before, after, new in zip(old, slow.parameters(), fast.parameters()):
        assert torch.allclose(after, 0.95 * before + 0.05 * new)
    last = [p.clone() for p in slow.parameters()]
    move_teacher(slow, fast, (0.9, 1.0), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(last, slow.parameters()))


def test_jepa_with_a_teacher(tmp_path):
    """The target's embedding is the teacher's, without gradient; without a teacher it is the encoder's, with."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 16, 32, 32)
    model = JEPA(3, **SMALL, target='ema', momentum=(0.5, 0.5), chunks=1)
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    seen = {}
    model.loss = lambda p, z, *more: seen.update(z=z) or {'loss': p.mean()}
    model(*x)['loss'].backward()
    assert torch.equal(seen['z'], model.teacher(x[1])) and not seen['z'].requires_grad
    assert torch.equal(model.embedding, model.encoder(x[0]).detach())
    assert all(p.grad is None for p in model.teacher.parameters()) and model.encoder.factors.weight.grad.abs().sum() > 0
    before = model.teacher.factors.weight.clone()
    model.after_step(0.3)
    assert torch.allclose(model.teacher.factors.weight, (before + model.encoder.factors.weight) / 2)
    published = {k: torch.ones_like(v) for k, v in model.encoder.state_dict().items()}
    torch.save(published, tmp_path / 'published.pth')
    load_published(model, tmp_path / 'published.pth')                    # it starts there, too
    assert all(torch.equal(model.teacher.state_dict()[k], v) for k, v in published.items())
    plain = JEPA(3, **SMALL, chunks=1)
    assert plain.teacher is None and not any('teacher' in name for name in plain.state_dict())
    plain.after_step(0.3)


def test_jepa_passes_each_loss_its_settings(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 16, 32, 32)
    for loss, settings, terms in (('sigreg', dict(sigreg_coeff=0.3, directions=8), {'sim', 'sigreg'}),
                                  ('infonce', dict(temperature=0.1), {'found'}),
                                  ('vicreg', dict(cov_coeff=7.0, chunks=1), {'sim', 'std', 'cov'})):
        model = JEPA(3, **SMALL, loss=loss, **settings)
        passed, function = {}, getattr(jepa, f'{loss}_loss_maps')
        monkeypatch.setattr(jepa, f'{loss}_loss_maps',
                            lambda p, z, **given: passed.update(given) or function(p, z, **given))
        assert set(model(*x, seeded(0))) == {'loss'} | terms
        assert {name: passed[name] for name in settings} == settings
    with pytest.raises(TypeError, match="'sim_coef'"):
        JEPA(3, sim_coef=3.0)


@pytest.mark.parametrize('standardize', [False, True])
def test_the_identity_predicts_that_nothing_changes(standardize):
    """No parameters, and the same encoder; with equal context and target there is nothing to learn."""
    torch.manual_seed(0)
    usual, x = JEPA(3, **SMALL), torch.randn(4, 3, 16, 32, 32)
    torch.manual_seed(0)
    model = JEPA(3, **SMALL, predictor='identity', residual=True, standardize=standardize, chunks=1)
    assert not list(model.predictor.parameters())
    assert all(torch.equal(v, usual.state_dict()[name]) for name, v in model.state_dict().items())
    assert model(x, x)['sim'] < 1e-4 and model(x, x + torch.randn_like(x))['sim'] > 1e-3


@pytest.mark.parametrize('flags, words', [(['--loss', 'hinge'], 'hinge'), (['--temperature', '0'], 'temperature'),
                                          (['--target', 'self'], 'self'), (['--predictor', 'oracle'], 'oracle'), (['--momentum', '1'], 'momentum'),
                                          (['--directions', '0'], 'at least 1'), (['--sigreg-coeff', '2'], 'share')])
def test_bad_options_are_refused(well, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        train.parse([*map(str, NANO), '--data-dir', str(well), '--out', str(tmp_path / 'a'), *flags], '')
