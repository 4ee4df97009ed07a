"""The protocol to the letter: what only a long run would show is pinned here, with its source.

Sources: [T] the paper's text, arXiv 2603.13227; [C] its code, helenqu/physical-representation-learning at bb77f7b;
[V] VideoMAE's code, MCG-NJU/VideoMAE; [M] MPP's, PolymathicAI/multiple_physics_pretraining; [O] ours, docs/protocol.md says
why.
"""
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

import model as models
import probe
import train
from benchmark import finetune
from data import Split
from helpers import HERE
from model import Inputs, Model
from systems import System, find_system

SYSTEMS = 'active_matter', 'shear_flow', 'rayleigh_benard'
SHARED = dict(
    resolution=224, whole=False, crop=0, normalize=False, augment=False, views='paired',     # [C] data.py
    supervised=False, label_fraction=1.0,
    micro_batch=8,                                                       # [C] configs: windows per GPU
    weight_decay=0.05, warmup_epochs=0.0,                                # [C] its epoch warmup never acts; see docs/protocol.md
    dtype='float32',                                                     # [C] no autocast in its trainer
    recompute='auto', compile=False,
    steps=-1, init='')
OF_SYSTEM = {                                                            # [C] configs: train, dataset; data.py: stride
    'active_matter': dict(stride=1, noise=1.0, lr=1e-3, epochs=30.0),
    'shear_flow': dict(stride=4, noise=1.0, lr=1e-4, epochs=6.0),
    'rayleigh_benard': dict(stride=4, noise=0.0, lr=1e-4, epochs=30.0)}
OF_MODEL = {
    'jepa': dict(batch=256, min_lr=1e-6, encoder='convnext', rate=8.0,   # [C] train.py: target_global_batch_size
                 widths=(16, 32, 64, 128, 128), blocks=(3, 3, 3, 9, 3), layer_scale=1e-6, residual=False,
                 sim_coeff=2.0, std_coeff=40.0, cov_coeff=2.0, chunks=5, standardize=False,      # [T], [C] model.py
                 loss_rows='local',                                      # [C] nothing is gathered
                 loss='vicreg', target='encoder', sigreg_coeff=0.05, directions=1024, temperature=0.2,
                 momentum=(0.996, 1.0), predictor='conv'),                               # not the paper's
    'videomae': dict(batch=128, lr=1.5e-4, min_lr=1e-5, noise=0.0,       # [V] per 256 clips, two in a window
                     size='small', width=0, depth=0, heads=0, patch=16, mask_ratio=0.9, decoder_width=192,
                     decoder_depth=4),                                   # [T]
    'mpp': dict(batch=256, min_lr=1e-6, noise=0.0,                       # [O] the paper starts from published weights
                size='Ti', width=0, depth=0, heads=0, layer_scale=1e-6, official_state_map=False),       # [M]
    'disco': dict(batch=256, min_lr=1e-6, noise=0.0)}                    # [O] likewise
ELSEWHERE = {'data', 'model', 'preset', 'data_dir', 'cache_dir', 'out', 'device', 'seed', 'save_every', 'save_minutes',
             'keep_every', 'probe_every', 'wandb'}


@pytest.mark.parametrize('name', OF_MODEL)
@pytest.mark.parametrize('system', SYSTEMS)
def test_every_setting_of_the_paper_preset(name, system, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('THE_WELL_DATA_DIR', raising=False)
    c, module, options = train.parse(['--model', name, '--preset', 'paper', '--data', system], '')
    found = {k: v for k, v in (asdict(c) | asdict(options)).items() if k not in ELSEWHERE}
    expected = SHARED | OF_SYSTEM[system] | OF_MODEL[name]
    if name == 'disco':                                                  # its own are in test_disco.py
        found = {k: v for k, v in found.items() if k in expected}
    assert found == expected


def test_every_setting_of_the_real_preset(tmp_path, monkeypatch):
    """[J] jpakdel/active_matter_JEPA, runs/baseline_vit_ema_vicreg_lam001_20260430_170646/config.json; [O] z-scores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('THE_WELL_DATA_DIR', raising=False)
    c, module, o = train.parse(['--model', 'vjepa', '--preset', 'real'], '')
    found = {k: v for k, v in (asdict(c) | asdict(o)).items() if k not in ELSEWHERE - {'save_every'}}
    assert found == SHARED | dict(
        resolution=0, normalize=True, noise=0.0,                         # [J] 256 x 256; [O]; [J] noise_std
        stride=16,                                                       # [J] null: as many as num_frames
        batch=2, micro_batch=2, epochs=30.0, lr=3e-4, min_lr=1e-6, warmup_epochs=2.0,    # [J] optim
        size='small', width=0, depth=0, heads=0, patch=16,               # [J] encoder_size, patch_size
        predictor_width=384, predictor_depth=6,                          # [J] predictor
        masks='next', mask_ratio=0.9, distance='l2',                     # [J] losses: of all tokens of the next frames
        momentum=(0.996, 0.996),                                         # [J] ema_decay, constant
        vicreg=0.01, std_coeff=50.0,                                     # [J] 0.01 (25 V + C): V is twice ours
        save_every=1000)                                                 # of half a GB each
    assert np.ceil(c.epochs * 175 * 4 / c.batch) == 10_500               # [J] final.json: global_step

    # [J] final.json: 23,457,408 and 10,943,232; ours have no bias of keys, and an unused mask token
    network = module.build(o, Inputs('active_matter', list('abcdefghijk'), (True, True), (256, 256)))
    sizes = [sum(p.numel() for p in part.parameters()) for part in (network.encoder, network.predictor)]
    assert sizes == [23_457_408 - 12 * 384, 10_943_232 - 6 * 384 + 384]


def test_a_models_own_preset_says_whose_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no preset 'real': add --model vjepa, or choose from auto"):
        train.parse(['--preset', 'real'], '')
    with pytest.raises(ValueError, match="no preset 'reel': choose from auto, smoke, paper, nano$"):
        train.parse(['--preset', 'reel'], '')


def test_published_numbers():
    """[T] table 1; MPP's are fine-tuned."""
    published = {'jepa': (0.079, 0.38, 0.13), 'videomae': (0.160, 0.67, 0.18), 'disco': (0.057, 0.13, 0.01),
                 'mpp': (0.230, 0.59, 0.08)}
    for name, errors in published.items():
        assert models.PUBLISHED[name] == dict(zip(SYSTEMS, errors)), name
        assert (name in models.FINETUNED_IN_PAPER) == (name == 'mpp')


def test_parts_of_the_domain():
    """[C] data.py: shear flow's first half in y, convection's rows 192 to 319 of 512."""
    assert [find_system(name).crop for name in SYSTEMS] == [((0, 1), (0, 1)), ((0, 1), (0, 0.5)),
                                                            ((192 / 512, 320 / 512), (0, 1))]
    assert [find_system(name).probe_windows for name in SYSTEMS] == [(None, None), (20480, 9600), (10240, 4800)]


# ---------------------------------------------------------------------------------------------
# optimizers

@pytest.mark.parametrize('decays', [True, False])
def test_an_optimizer_step_is_the_formula(decays):
    """AdamW, betas (0.9, 0.95): two steps by hand. What a network calls undecayed is left alone by the decay."""
    network = torch.nn.Linear(1, 1, bias=False).double()
    network.undecayed = lambda name, parameter: not decays
    c = train.Config(lr=0.1, weight_decay=0.05)
    optimizer, p = train.optimizer_of(network, c), network.weight
    w, m, v = p.item(), 0.0, 0.0
    for step, g in enumerate((0.3, -0.2), 1):
        p.grad = torch.full_like(p, g)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w * (1 - 0.1 * 0.05 * decays) - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step))**0.5 + 1e-8)
    assert p.item() == pytest.approx(w, rel=1e-9)


def test_videomae_does_not_decay_biases_norms_and_the_mask_token():
    """[V] optim_factory.py."""
    network = models.find_model('videomae').VideoMAE(2, 16, 1, 2, 8, decoder_width=64, decoder_depth=1,
                                                     decoder_heads=1)
    free, decayed = sorted(train.optimizer_of(network, train.Config()).param_groups, key=lambda g: g['weight_decay'])
    own = dict(network.named_parameters())
    names = {name for name, p in own.items() if any(p is q for q in free['params'])}
    assert (free['weight_decay'], decayed['weight_decay']) == (0.0, 0.05)
    assert names == {name for name in own if name.endswith('bias') or 'norm' in name or name == 'mask_token'}
    assert len(free['params']) + len(decayed['params']) == len(own)


class Recorder(torch.nn.Module):
    """A network that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.encoder, self.seen = torch.nn.Linear(4, 8), []

    def forward(self, context, target, generator):
        self.seen.append((context, target, self.encoder(context)))
        return {'loss': self.seen[-1][2].float().pow(2).mean()}


def steps_of(dtype='float32', x=torch.zeros(4, 1, 32, 16, 4), **settings):
    network = Recorder()
    c = train.Config(batch=4, micro_batch=4, dtype=dtype, **settings)
    model = Model(network, Inputs('any', ['a'], (True, True), (16, 4)), [0], [1], dtype=dtype)
    optimizer = train.optimizer_of(network, c)
    for step in 0, 1:
        train.train_step(model, network, optimizer, iter([(x, None, None)]), c, step)
    return network.seen


def test_noise_on_the_input_has_the_std_it_claims():
    """Its own for context and target, and in every step."""
    seen = steps_of(noise=0.7)
    views = [v for context, target, _ in seen for v in (context, target)]
    assert all(v.std().item() == pytest.approx(0.7, rel=0.05) and abs(v.mean().item()) < 0.05 for v in views)
    assert all((a - b).std() > 0.9 for i, a in enumerate(views) for b in views[:i])
    assert all((context == 0).all() for context, _, _ in steps_of(noise=0.0))


def test_bfloat16_reaches_the_matrix_products():
    assert {z.dtype for _, _, z in steps_of('bfloat16')} == {torch.bfloat16}
    assert {z.dtype for _, _, z in steps_of('float32')} == {torch.float32}


# ---------------------------------------------------------------------------------------------
# views

class Places(Split):
    """A dataset of one periodic channel, a number that says run, frame and place."""

    def __init__(self, runs=3, frames=81, n=16):
        axes = np.ogrid[:runs, :1, :frames, :n, :n]
        self.fields = sum(a * s for a, s in zip(axes, (1e6, 0, 1e4, 1e2, 1))).astype(np.float32)
        self.size, self.frames = (n, n), [frames] * runs
        self.windows = np.array([(r, t) for r in range(runs) for t in range(frames - 31)])
        self.system, self.channels, self.periodic = System(), ['a'], (True, True)
        self.components, self.symmetries = [('a', ())], (0,)
        self.scalars, self.scale = {'place': np.arange(runs) - 1.0, 'other': np.arange(runs) ** 2}, []

    def release(self):
        pass


def decode(x):
    """(run, first frame, x, y of the first point) of each window (B, 1, T, h, w)."""
    first = x[:, 0, 0, 0, 0].round().long()
    return torch.stack([first // 10**6, first // 10**4 % 100, first // 100 % 100, first % 100], 1).tolist()


def batch_of(views, step=0, **settings):
    data = Places()
    c = train.Config(views=views, crop=4, augment=True, batch=32, micro_batch=32, **settings)
    x, labels, runs = train.load_batch(data, c, step, 0)
    asked = data.windows[train.window_order(len(data.windows), c.seed, step * 32, 32)]
    assert torch.allclose(labels[:, 0], torch.tensor(1.5**0.5 * (asked[:, 0] - 1)))     # each window's own, z-scored
    assert runs.tolist() == asked[:, 0].tolist()
    return decode(x[:, :, :16]), decode(x[:, :, 16:]), asked.tolist(), x


def test_paired_views_are_one_place():
    context, target, asked, x = batch_of('paired')
    assert [c[:2] for c in context] == asked
    assert all(t == [r, f + 16, i, j] for (r, f, i, j), t in zip(context, target))
    assert len({tuple(c[2:]) for c in context}) > 16                     # but every window has its own
    assert (x.diff(dim=2) == 1e4).all()                                  # all 32 frames follow each other


def test_unpaired_views_have_places_of_their_own():
    context, target, asked, _ = batch_of('unpaired')
    assert [c[:2] for c in context] == asked and [t[:2] for t in target] == [[r, f + 16] for r, f in asked]
    assert sum(c[2:] == t[2:] for c, t in zip(context, target)) < 4      # one in 256 by chance
    assert batch_of('unpaired')[0] == context != batch_of('unpaired', step=1)[0]
    assert batch_of('unpaired', seed=1)[0] != context


def test_other_time_views_share_the_run_alone():
    seen = set()
    for step in range(6):
        context, target, asked, _ = batch_of('other-time', step)
        assert [c[:2] for c in context] == asked
        for (r, f, i, j), (run, frame, *place) in zip(context, target):
            assert run == r and abs(frame - f) >= 16 and 0 <= frame <= 81 - 16
            seen.add(frame - f)
    assert min(seen) < -40 and max(seen) > 40 and len(seen) > 60         # before as well as after, near and far
    assert train.other_time(0, 16, 0) == 16                              # the only one there is


@pytest.mark.parametrize('views', ['unpaired', 'other-time'])
@pytest.mark.parametrize('augment', [True, False])
def test_both_views_are_turned_or_none(views, augment):
    data, asked = Places(), []
    load = data.load
    data.load = lambda windows, frames, crop, augment, *more: asked.append(augment) or load(windows, frames, crop, augment, *more)
    train.load_batch(data, train.Config(views=views, crop=4, augment=augment, batch=8, micro_batch=8), 0, 0)
    assert asked == [augment, augment]


# ---------------------------------------------------------------------------------------------
# probes and fine-tuning

def test_the_attentive_probe_is_trained_as_claimed(monkeypatch):
    """AdamW 1e-3, decay 0.01, all windows once an epoch in another order each; linear warmup, cosine to zero."""
    made, rates, orders = [], [], []

    class AdamW(torch.optim.AdamW):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            made.append(self.defaults)

        def step(self, *args):
            rates.append(self.param_groups[0]['lr'])
            return super().step(*args)
    monkeypatch.setattr(torch.optim, 'AdamW', AdamW)
    forward = probe.AttentiveProbe.forward
    monkeypatch.setattr(probe.AttentiveProbe, 'forward', lambda self, x: (
        orders.append(x[:, 0, 0].tolist()) if self.training else None) or forward(self, x))
    x, y = torch.randn(40, 3, 8), torch.randn(40, 2)
    x[:, 0, 0] = torch.arange(40)
    splits = {name: (x, y) for name in ('train', 'valid', 'test')}
    probe.attentive(splits, epochs=10, batch=8)
    assert (made[0]['lr'], made[0]['weight_decay'], made[0]['betas']) == (1e-3, 0.01, (0.9, 0.999))
    epochs = [sum(orders[i:i + 5], []) for i in range(0, 50, 5)]
    assert all(sorted(e) == list(range(40)) for e in epochs) and len({tuple(e) for e in epochs}) == 10
    cosine = [1e-3 * 0.5 * (1 + np.cos(np.pi * s / 40)) for s in range(40)]
    assert np.allclose(rates, [1e-3 * (s + 1) / 10 for s in range(10)] + cosine)
    rates.clear()
    probe.attentive(splits, epochs=4, **probe.PAPER)                     # [C] no warmup, steps of 256 windows
    assert np.allclose(rates, [1e-3 * 0.5 * (1 + np.cos(np.pi * s / 4)) for s in range(4)])
    assert probe.PAPER == dict(batch=256, warmup_epochs=0, keep_best=False)
    assert models.PAPER_PROBE == {('videomae', 'shear_flow'): dict(noise=0.1, dropout=0.1)}    # [C] configs


def test_probe_dropout_is_off_when_it_is_scored():
    x = torch.randn(4, 3, 16)
    dropped = probe.AttentiveProbe(16, 2, dropout=0.5)
    assert not torch.equal(dropped(x), dropped(x)) and torch.equal(dropped.eval()(x), dropped(x))


class FakeRun:
    """What fine-tuning needs of a run: labels that the encoder must move to see."""
    probe_seed = 0

    def __init__(self, n=96):
        self.windows = {name: np.stack([np.arange(n), 0 * np.arange(n)], 1) for name in ('train', 'valid', 'test')}
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 1, 16, 4, 4, generator=g)
        self.targets = {name: self.x.mean((1, 2, 3, 4))[:, None].double() * 16 for name in self.windows}
        self.splits, self.loaded = {name: self for name in self.windows}, []

    def windows_at(self, stride):
        assert stride == 4
        return {name: w[::2] for name, w in self.windows.items()}, {name: y[::2] for name, y in self.targets.items()}

    def load(self, windows, frames):
        self.loaded.append(len(windows))
        return self.x[windows[:, 0]]

    def encode(self, model, frozen):
        assert not frozen
        return lambda x: model(x.flatten(1))[:, None]


@pytest.mark.parametrize('protocol', ['3', 'paper'])
def test_fine_tuning_moves_the_encoder(protocol, monkeypatch):
    made = []
    for name in 'Adam', 'AdamW':
        kind = getattr(torch.optim, name)
        monkeypatch.setattr(torch.optim, name, lambda *args, kind=kind, name=name, **settings: made.append(
            (name, kind(*args, **settings))) or made[-1][1])
    monkeypatch.setattr(finetune, 'PAPER', {**finetune.PAPER, 'epochs': 3})
    torch.manual_seed(0)
    run, model = FakeRun(), torch.nn.Linear(256, 16)
    model.network = network = torch.nn.Identity()
    model.scaler = lambda: torch.amp.GradScaler(enabled=False)
    network.paper_finetuning = lambda: made.append('as in the paper')
    before = model.weight.clone()
    estimates = finetune.finetune(run, model, protocol, batch=32, lr=1e-4)
    assert estimates.shape == (96, 1) and (model.weight - before).abs().max() > 1e-6
    if protocol == 'paper':
        (said, (name, optimizer)), = [made]
        assert said == 'as in the paper' and name == 'Adam' and len(optimizer.param_groups) == 1
        assert (optimizer.defaults['lr'], optimizer.defaults['weight_decay']) == (1e-5, 0)
        assert run.loaded.count(48) == 3                                 # every other window, in one step of 64
    else:
        (name, optimizer), = made
        encoder, head = optimizer.param_groups
        assert name == 'AdamW' and encoder['initial_lr'] == 1e-4 and head['initial_lr'] == 1e-3
        assert encoder['weight_decay'] == head['weight_decay'] == 0.01 and encoder['lr'] < 1e-9          # cosine to 0
        assert any(p is model.weight for p in encoder['params'])


def test_the_papers_fine_tuning():
    """[C] mpp_param_estimation.py: 30 epochs, 2 GPUs x 32 windows, stride 4; [M] stochastic depth up to 0.2."""
    assert finetune.PAPER == dict(epochs=30, batch=64, lr=1e-5, stride=4)
    network = models.find_model('mpp').MPP(['velocity_x', 'velocity_y'], (False, False), (16, 3, 2), layer_scale=1.0)
    x = torch.randn(8, 2, 16, 32, 32)
    still = network.train().features(x)
    assert torch.equal(still, network.features(x)) and network.encoder.periodic == (False, False)
    network.paper_finetuning()
    assert network.encoder.periodic == (True, True)
    assert [b.spatial.dropped for b in network.encoder.blocks] == [0.0, 0.1, 0.2]
    assert not torch.equal(network.features(x), network.features(x))
    assert torch.equal(network.eval().features(x), network.features(x))
    with pytest.raises(ValueError, match='best'):
        finetune.epochs_of('best')


def test_the_plateau_halves_the_rate():
    _, schedule = finetune.optimizer_of(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), True, 1e-3, 10)
    assert (schedule.factor, schedule.patience, schedule.mode) == (0.5, 5, 'min')


# ---------------------------------------------------------------------------------------------
# the systems and their datasets: another number here makes other data, and no test would see it

def described(name):
    """All plain settings of a system, and of its datasets, as JSON has them."""
    system = find_system(name)
    settings = {k: v for k, v in vars(system).items() if not callable(v) and k != 'presets'}
    presets = {k: {n: v for n, v in vars(p).items() if n != 'about'} for k, p in system.presets.items()}
    files = {k: [system.scalars(*p.pairs[1], **p.domain), [axis.tolist()[:3] for axis in system.axes(*p.grid, **p.domain)]]
             for k, p in system.presets.items()}
    return json.loads(json.dumps(dict(settings=settings, presets=presets, files=files)))


def first_frames(name):
    """Fields of the first run of nano with seed 0 at some points, at its start and two frames later: {name: [values]}."""
    system = find_system(name)
    p = system.presets['nano']
    solver, frames = system.solver(p.pairs[:1], [[0, 0, 0, 0]], p, 'cpu'), []
    for _ in range(2):
        fields = {k: v[0, 3::29, 5::17] for k, v in solver.fields().items()} | {'tail': solver.tail()[:1]}
        frames.append({k: v.double().flatten().tolist() for k, v in fields.items()})
        solver.advance(2 * system.dt_save)
    return {f'{k} {t}': frame[k] for t, frame in enumerate(frames) for k in frame}


@pytest.mark.parametrize('name', SYSTEMS)
def test_what_the_results_were_made_with(name):
    """tests/data/systems.json: if a change is meant, write it anew, as all results are of other data then."""
    there = json.loads((HERE / 'tests/data/systems.json').read_text())[name]
    assert described(name) == there['described']
    found = first_frames(name)
    assert found.keys() == there['frames'].keys()
    for k, values in found.items():
        assert np.allclose(values, there["frames"][k], atol=1e-9 + 2e-3 * np.abs(values).max()), k        # a tail may be rounding


def test_settings_of_which_nothing_else_depends():
    """A dataset without a file in systems/; what knn chooses from; the run that only shows that all works."""
    assert System().protocol() == dict(resolution=0, stride=4, noise=0.0, lr=1e-4, epochs=30.0)
    assert System().part(False) == (((0, 1), (0, 1)), (False, False))
    assert probe.KS == (1, 2, 5, 10, 20, 50, 100) and probe.METRICS == ('euclidean', 'cosine')
    assert train.SMOKE == dict(steps=20, batch=16, micro_batch=16)


def test_the_papers_own_numbers():
    """[T] table 1: the errors that tables show beside ours; MPP's are fine-tuned."""
    systems = 'active_matter', 'shear_flow', 'rayleigh_benard'
    table = dict(jepa=(0.079, 0.38, 0.13), videomae=(0.160, 0.67, 0.18), mpp=(0.230, 0.59, 0.08), disco=(0.057, 0.13, 0.01))
    assert models.PUBLISHED == {name: dict(zip(systems, errors)) for name, errors in table.items()}
    assert models.FINETUNED_IN_PAPER == ('mpp',)
