"""train.py: settings, schedule, order of the windows, published weights, labels."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from model import Inputs, Model, build_model, find_model, load_checkpoint, title, unwrapped
from baselines import mpp
from baselines.disco import DISCO
from helpers import HERE, MODELS, losses, refused, run


def test_defaults_preset_system_flags(tmp_path, monkeypatch):
    """Each goes before the one to its left; what nano sets for one system is not the paper's."""
    monkeypatch.chdir(tmp_path)                                          # no data: nano would be simulated

    def settings(*flags):
        c, _, options = train.parse(flags, '')
        return c.preset, getattr(options, 'rate', None), c.steps
    assert settings('--preset', 'paper', '--data', 'shear_flow') == ('paper', 8.0, -1)
    assert settings() == ('nano', 8.0, 2400)
    assert settings('--data', 'shear_flow') == ('nano', 32.0, 2400)
    assert settings('--data', 'shear_flow', '--rate', '3.0') == ('nano', 3.0, 2400)
    assert settings('--data', 'shear_flow', '--model', 'mpp') == ('nano', None, 4800)
    assert settings('--data', 'shear_flow', '--preset', 'smoke') == ('smoke', 32.0, 20)


def test_each_rank_takes_eight_windows_at_once(tmp_path, monkeypatch):
    """The rows of the paper's loss, on however many GPUs; what is asked for goes before, if it divides."""
    monkeypatch.chdir(tmp_path)
    for world, asked, expected in (1, [], 8), (4, [], 32), (64, [], 256), (4, ['--micro-batch', '4'], 4):
        monkeypatch.setattr(train, 'WORLD', world)
        assert train.parse(['--preset', 'paper', *asked], '')[0].micro_batch == expected
    with pytest.raises(ValueError, match='does not divide over 4 ranks'):
        train.parse(['--preset', 'paper', '--micro-batch', '2'], '')


# whole, normalize, augment, paired views; those of the paper are in test_protocol.py. All see 76,800 windows
SETTINGS = """
model    system          flags crop stride batch steps lr warm-up
jepa     active_matter   yyyn 32 1 32 2400  0.003 0.5
jepa     shear_flow      yyyn 32 4 32 2400  0.003 0.5
jepa     rayleigh_benard yyyn 32 4 32 2400  0.003 0.5
videomae active_matter   yyyy 32 1 32 2400 0.0015 0.3
videomae shear_flow      yyyy 32 4 32 2400 0.0015 0.3
videomae rayleigh_benard yyyy 32 4 32 2400 0.0015 0.3
vjepa    active_matter   yyyy 32 1  8 9600  0.0007 0.3
vjepa    shear_flow      yyyy 32 4  8 9600  0.0007 0.3
pixels   active_matter   yyyy 32 1 32 2400  0.001 0.5
pixels   shear_flow      yyyy 32 4 32 2400  0.001 0.5
mpp      active_matter   ynyy  0 1 16 4800  0.003 0.5
mpp      shear_flow      ynyy  0 4 16 4800  0.003 0.5
mpp      rayleigh_benard ynyy  0 4 16 4800  0.003 0.5
disco    active_matter   ynyy 32 1 16 4800  0.003 0.5
disco    shear_flow      ynyy 32 4 16 4800  0.003 0.5
disco    rayleigh_benard ynyy 32 4 16 4800  0.003 0.5
"""
OF_NANO = {
    'jepa': dict(encoder='statistics', widths=(64, 64, 64, 32), layer_scale=1.0, residual=True, sim_coeff=10.0,
                 std_coeff=40.0, cov_coeff=4.0, chunks=1, standardize=True, loss_rows='global'),
    'videomae': dict(size='nano', patch=8, mask_ratio=0.75, decoder_width=64, decoder_depth=2),
    'vjepa': dict(size='nano', patch=8, masks='block', mask_ratio=0.75, predictor_width=64, predictor_depth=2,
                  distance='l1', momentum=(0.996, 1.0), vicreg=0.01),
    'pixels': dict(encoder='statistics', widths=(64, 64, 64, 32), layer_scale=1.0, residual=True, patch=8,
                   decoder_width=128),
    'mpp': dict(size='nano', layer_scale=0.1, official_state_map=False),
    'disco': dict(width=32, depth=2, heads=2, patch=8, layer_scale=0.1, operator_width=4, generator_width=16,
                  max_steps=2)}


@pytest.mark.parametrize('row', SETTINGS.strip().splitlines()[1:], ids=lambda row: '-'.join(row.split()[:2]))
def test_settings_of_nano(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('THE_WELL_DATA_DIR', raising=False)
    model, system, flags, *numbers = row.split()
    c, _, options = train.parse(['--model', model, '--data', system], '')
    assert c.preset == 'nano' and (c.resolution, c.noise, c.weight_decay, c.min_lr) == (0, 0.0, 0.05, 1e-6)
    assert ''.join('ny'[v] for v in (c.whole, c.normalize, c.augment, c.views == 'paired')) == flags
    assert [c.crop, c.stride, c.batch, c.steps, c.lr, c.warmup_epochs] == [float(v) for v in numbers]
    assert c.batch == c.micro_batch and c.batch * c.steps == 76800
    assert c.views == ('other-time' if model == 'jepa' else 'paired')
    found = vars(options)
    assert found.get('rate', 0) == (0 if model not in ('jepa', 'pixels') else 8 if system == 'active_matter' else 32)
    assert {k: found[k] for k in OF_NANO[model]} == OF_NANO[model]


class Chance(torch.nn.Module):
    """A network whose loss is drawn by its dropout."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, context, target, generator):
        return {'loss': self.weight * torch.nn.functional.dropout(context).mean()}


def test_accumulated_gradients_are_the_mean_of_the_windows():
    """Of all micro-batches: one step of four windows moves the weights as two of two do together."""
    x = torch.rand(4, 1, 32, 4, 4)

    def gradient(micro_batch):
        c = train.Config(batch=4, micro_batch=micro_batch)
        model = Model(Chance(), Inputs('any', ['a'], (True, True), (4, 4)), [0], [1]).eval()
        model.network.forward = lambda context, target, generator: {'loss': model.network.weight * context.mean()}
        parts = iter([(part, None, None) for part in x.split(micro_batch)])
        train.train_step(model, model.network, torch.optim.SGD(model.parameters(), 0.1), parts, c, 0)
        return model.network.weight.grad.item()
    assert gradient(4) == pytest.approx(x[:, :, :16].mean().item()) == pytest.approx(gradient(2))


def test_settings_may_be_younger_than_a_run():
    """A run of before an option was there goes on, with its default and no other value."""
    c, options = train.Config(batch=4), find_model('jepa').Options()
    there = {k: v for k, v in vars(options).items() if k not in ('loss', 'target')}
    state = dict(config=vars(c), options=there, steps=5, step=5)
    train.check_resumable(c, options, 5, state, 'ckpt.pt')
    options.loss = 'infonce'
    with pytest.raises(ValueError, match='loss: vicreg, now infonce'):
        train.check_resumable(c, options, 5, state, 'ckpt.pt')


def test_dropout_depends_on_seed_and_step_alone():
    """Whatever was drawn before: else a resumed run would not be the one that was killed."""
    c, x = train.Config(batch=2, micro_batch=2), torch.ones(2, 1, 32, 4, 4)

    def loss(step):
        torch.rand(step + 3)
        model = Model(Chance(), Inputs('any', ['a'], (True, True), (4, 4)), [0], [1])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return train.train_step(model, model.network, optimizer, iter([(x, None, None)]), c, step)['loss']
    assert loss(1) == loss(1) != loss(2)


@pytest.mark.parametrize('model', [name for name in MODELS if hasattr(find_model(name), 'load_published')])
def test_published_weights_are_a_start(well, tmp_path, model):
    """--init --steps 0 is a checkpoint of the published weights, which eval.py takes; damaged ones are refused."""
    flags = [*MODELS[model], '--data-dir', well, '--steps', 0]
    if model == 'disco':                                                 # whose published weights serve all datasets
        weights = DISCO('active_matter', all_datasets=True, dim=32, blocks=1, heads=2, patch=8, hidden=8,
                        width=4).state_dict()
    else:
        run('train.py', *flags, '--seed', 5, '--out', 'out/source', cwd=tmp_path)
        source = load_checkpoint(tmp_path / 'out' / 'source' / 'ckpt.pt')
        assert source['step'] == 0
        weights = {k if model == 'videomae' else k.removeprefix('encoder.'): v for k, v in source['model'].items()
                   if model == 'videomae' or k.startswith('encoder.')}
    if model == 'mpp':
        weights |= {k: weights[k].narrow(axis, 0, 12) for k, axis in mpp.STATE_AXIS.items()}
    torch.save({'videomae': {'model': weights}, 'disco': {'model_state': weights}}.get(model, weights),
               tmp_path / 'published')
    run('train.py', *flags, '--init', 'published', '--out', 'out/init', cwd=tmp_path)
    if model == 'jepa':
        run('train.py', *flags, '--init', 'published', '--supervised', '--out', 'out/labels', cwd=tmp_path)
    own = load_checkpoint(tmp_path / 'out' / 'init' / 'ckpt.pt')['model']
    for k, v in weights.items():
        loaded = own[k if k in own else 'encoder.' + k]
        assert torch.equal(loaded[tuple(map(slice, v.shape))], v), k
    if model == 'disco':                                                 # most of the weights are other datasets'
        torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', HERE / 'train.py']
        run(torchrun, *flags, '--init', 'published', '--steps', 3, '--out', 'out/on', cwd=tmp_path)
        assert np.isfinite(losses(tmp_path / 'out' / 'on')).all()
        assert '\nDISCO ' in run('eval.py', 'out/on', '--epochs', 1, '--stride', 16, cwd=tmp_path).stdout
    if model != 'jepa':                                                  # the loaders' own tests refuse more
        return
    (tmp_path / 'cut').write_bytes((tmp_path / 'published').read_bytes()[:3000])
    assert refused('train.py', *flags, '--init', 'cut', '--out', 'out/cut', cwd=tmp_path, words=['cut']) == set()
    refused('train.py', *flags, '--init', 'nowhere', '--out', 'out/cut', cwd=tmp_path, words=['nowhere'])


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


@pytest.mark.parametrize('model', ['jepa', 'videomae'])
def test_supervised_learns_the_labels(well, tmp_path, monkeypatch, model):
    """The encoder fits the labels of its windows; it is probed like any other."""
    monkeypatch.chdir(tmp_path)
    base = [str(v) for v in (*MODELS[model], '--data-dir', well, '--noise', 0, '--out', 'out/a', '--supervised')]
    train.main([*base, '--steps', '40', '--lr', '3e-3'])
    train.main([*base, '--steps', '60', '--lr', '3e-3'])                 # goes on
    log = [json.loads(line) for line in Path('out/a/log.jsonl').read_text().splitlines()]
    first, last = (np.mean([line['loss'] for line in part]) for part in (log[:5], log[-5:]))
    assert len(log) == 60 and last < 0.75 * first and log[-1]['embedding_rank'] > 1
    assert log[0]['loss'] == pytest.approx(np.mean([log[0]['label alpha'], log[0]['label zeta']]), rel=1e-4)
    evaluation.main(['out/a', '--epochs', '2', '--stride', '16'])
    result = json.loads(Path('out/a/eval.json').read_text())
    rows, name = result['rows'], title(model) + ', supervised'
    assert name in rows and not any('the paper' in row for row in rows)
    state = load_checkpoint('out/a/ckpt.pt')
    assert result['parameters']['encoder'] == sum(
        v.numel() for k, v in state['model'].items() if k.startswith('network.encoder.'))


def test_labels_leave_a_network_what_it_is(tmp_path):
    """Its random weights, its weight decay, its fine-tuning, its published weights."""
    inputs = Inputs('active_matter', ['a', 'b'], (True, True), (32, 32))
    for name, changes in ('jepa', dict(widths=(4, 4, 8, 8, 8))), ('videomae', {}), ('mpp', {}):
        module = find_model(name)
        options = module.Options(**changes)
        plain, labelled = (build_model(name, options, inputs, [0, 0], [1, 1], labels=n).network for n in ((), ('a', 'b')))
        assert unwrapped(labelled) is labelled.network and unwrapped(plain) is plain
        assert all((v == labelled.network.state_dict()[k]).all() for k, v in plain.state_dict().items())
        if hasattr(plain, 'undecayed'):
            kept = {k for k, v in plain.named_parameters() if plain.undecayed(k, v)}
            assert kept == {k.removeprefix('network.') for k, v in labelled.named_parameters()
                            if k.startswith('network.') and labelled.undecayed(k, v)} and 'mask_token' in kept


@pytest.mark.parametrize('flags, name', [
    ([], 'active_matter-jepa-nano-seed0'), (['--loss', 'vicreg', '--seed', '2'], 'active_matter-jepa-nano-seed2'),
    (['--loss', 'infonce'], 'active_matter-jepa-nano-infonce-seed0'),
    (['--loss', 'sigreg', '--target', 'ema', '--momentum', '0.9,1'], 'active_matter-jepa-nano-sigreg-ema-seed0'),
    (['--model', 'vjepa', '--masks', 'random', '--supervised', '--label-fraction', '0.5'],
     'active_matter-vjepa-nano-random-supervised-0.5-seed0')])
def test_a_run_of_another_loss_has_a_folder_of_its_own(here, flags, name):
    """Else the second of two would be refused, as the first one's settings differ."""
    assert train.parse(flags, '')[0].out == f'out/{name}'


def test_tokens_are_checked_after_the_first_step(well, here, monkeypatch, capsys):
    """That they can be probed: before hours are spent, and once."""
    checked = []
    monkeypatch.setattr(train.models, 'check_tokens', lambda model, x: checked.append(len(Path('out/log.jsonl').read_text())))
    train.main([str(v) for v in (*MODELS['jepa'], '--data-dir', well, '--steps', 3, '--out', 'out')])
    assert checked == [0]                                                # the log had no line yet
    assert '3 steps = 0.08 epochs' in capsys.readouterr().out            # 3 x 8 of 300 windows


def test_a_curve_of_errors_is_of_every_so_manieth_step_and_the_last():
    c, due = train.Config(probe_every=3), []
    for step in range(8):
        try:
            assert train.probe_on_valid(None, {'train': None}, c, step, 8) == {}
        except AttributeError:                                           # it would begin, had it a model
            due.append(step + 1)
    assert due == [3, 6, 8] and train.probe_on_valid(None, {}, c, 2, 8) == {}
