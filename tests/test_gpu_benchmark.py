"""benchmark/gpu.py, rehearsed: every form is the same step, what fails is noted, and the rest goes on."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

from benchmark import gpu, speed
from helpers import HERE
from jepa import ChannelNorm, DepthwiseConv3d, Stem

SMALL = gpu.SMALL['jepa'].split()


@pytest.mark.parametrize('title', gpu.FORMS)
def test_every_form_is_the_same_step(title):
    """Loss and all gradients, in double precision; and its layers are in another form."""
    _, *flags = gpu.STEPS[title].split()
    found = []
    for forms in {}, gpu.FORMS[title]:
        c, options = speed.settings('jepa', 'cpu', *flags, *SMALL, '--dtype', 'float64')
        network, step = speed.trainer(c, options, forms)
        found.append([torch.tensor(step()['loss'])] + [p.grad for p in network.parameters()])
        changed = [type(m) for m in network.modules() if 'forward' in vars(m)]
        assert set(changed) == set(forms) and (not forms or len(changed) >= 3)
    assert len(found[0]) > 20 and all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(*found))


@pytest.mark.parametrize('layer, shape', [(nn.LayerNorm(16, eps=1e-6), (2, 5, 16)),
                                          (ChannelNorm(16, eps=1e-6), (2, 16, 3, 4, 4))])
def test_the_norm_by_moments(layer, shape):
    """It is LayerNorm, weights and all; in bfloat16 it is taken in full precision."""
    for p in layer.parameters():
        nn.init.normal_(p)
    x = 3 + 2 * torch.randn(shape)
    assert torch.allclose(gpu.norm_by_moments(layer, x), layer(x), atol=1e-5)
    assert gpu.norm_by_moments(layer, x.bfloat16()).dtype == torch.float32


def test_the_plain_stem():
    layer, x = Stem(3, 8, (1, 4, 4)), torch.randn(2, 3, 16, 12, 12)
    assert torch.allclose(gpu.plain_stem(layer, x), layer(x), atol=1e-5)


def test_what_is_measured():
    """What the issue asks: each form of a paper step at 8 windows, the rivals at paper size, the recipe, nano."""
    seen = {}
    for title, flags in gpu.STEPS.items():
        model, *flags = flags.split()
        c, _ = speed.settings(model, 'cpu', *flags)
        seen[title] = model, c.preset, c.batch, speed.size_of(c), c.recompute, c.compile
    paper = [v[4:] for title, v in seen.items() if v[:4] == ('jepa', 'paper', 8, (224, 224))]
    assert seen['MPP'][1] == seen['DISCO'][1] == 'paper'
    assert sorted(paper) == sorted([('no', False)] * 3 + [('blocks', False), ('mlp', False), ('no', True), ('mlp', True)])
    assert set(gpu.FORMS) <= set(seen) and set(gpu.FORMS['JEPA, plain PyTorch']) == {DepthwiseConv3d, Stem}
    assert seen['V-JEPA'][:4] == ('vjepa', 'paper', 8, (224, 224))
    assert seen['VideoMAE'][:4] == ('videomae', 'paper', 8, (224, 224))
    assert seen['V-JEPA, real'][:4] == ('vjepa', 'real', 2, (256, 256))
    assert seen['JEPA, nano'][:4] == ('jepa', 'nano', 32, (32, 32))


@pytest.mark.parametrize('name', ['V-JEPA, real, float32', 'JEPA, norm and MLP recomputed, bfloat16', 'VideoMAE, float32',
                                  'MPP, float32', 'DISCO, float32'])
def test_a_step_in_miniature(name):
    row = gpu.measure(name, None, 1, True)
    assert row['windows'] == 2 and min(row['windows_per_s'], row['memory_gb'], row['gradient']) > 0
    assert math.isfinite(row['loss'])


def test_what_fails_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    """Each result is in the file before the next is begun; the same command tries only what failed."""
    out, asked = tmp_path / 'deep' / 'gpu.json', []

    def fake(name, args, minutes, left):
        kept = json.loads(out.read_text())['measured'] if out.exists() else {}
        assert set(asked) <= set(kept) and left <= 25
        asked.append(name)
        if name in gpu.RACE:
            assert minutes == 3
        broken = name == 'V-JEPA, float32' and name not in kept
        return {'error': 'out of memory'} if broken else {'minutes_each': 3} if name == gpu.DATA else {'said': 'well'}
    monkeypatch.setattr(gpu, 'measure_apart', fake)
    gpu.main(['--rehearse', '--out', str(out)])
    measured = json.loads(out.read_text())['measured']
    assert list(measured) == asked and len(asked) == 2 * len(gpu.STEPS) + 4 and asked[-3:] == [gpu.DATA, *gpu.RACE]
    assert '| V-JEPA, float32 | | failed | | out of memory |' in capsys.readouterr().out
    asked.clear()
    gpu.main(['--rehearse', '--out', str(out)])
    assert asked == ['V-JEPA, float32']
    asked.clear()
    out.unlink()
    gpu.main(['--rehearse', '--out', str(out), '--minutes', '0'])
    assert not asked


def test_a_measurement_has_a_process_of_its_own(tmp_path, monkeypatch):
    """What it prints last is the result; its last words are the error. Nor does a hang stop the others."""
    monkeypatch.chdir(HERE)
    args = gpu.Settings(out=str(tmp_path / 'gpu.json'), rehearse=True)
    assert gpu.measure_apart('JEPA, no such form, float32', args, 1, 1) == {'error': "KeyError: 'JEPA, no such form'"}
    assert gpu.measure_apart('VideoMAE, float32', args, 1, 1)['windows'] == 2
    assert gpu.measure_apart('VideoMAE, float32', args, 1, -1) == {'error': 'the time was up'}


def test_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(['--out', str(tmp_path / 'gpu.json')])
    assert capsys.readouterr().err.startswith('error: no device') and not list(tmp_path.iterdir())


def test_the_two_that_are_trained(well, tmp_path):
    """Each for ten steps at least, of its own preset; ridge and kNN of the trained and of the random encoder."""
    (tmp_path / 'active_matter').symlink_to(well / 'active_matter')
    for name in 'real', 'paper':
        found = gpu.train_and_probe(name, tmp_path, 0, True)
        assert found['windows'] == 20 and found['minutes'] == 0
        for method in 'linear', 'knn':
            errors = {row: errors for row, errors in found['errors'].items() if row.endswith(f', {method}')}
            assert len(errors) >= 2 and set(errors[f'random init, {method}']) == {'alpha', 'zeta', 'mean'}
            assert all(np.isfinite(list(e.values())).all() for e in errors.values())
        assert not any('attentive' in row for row in found['errors'])
        c = torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)['config']
        assert c['preset'] == name and c['steps'] == 10
        assert json.loads((tmp_path / name / 'eval.json').read_text())['split'] == 'valid'


def test_the_data(tmp_path, monkeypatch):
    """Of The Well's grid, as if downloaded: no note of a simulation stays, so `paper` and `real` take them for The Well's."""
    def fake(name, folder, preset, device):
        (folder / name).mkdir(parents=True)
        (folder / name / 'simulated.json').touch()
        asked.append(gpu.find_system(name).preset(preset))
    asked, presets = [], gpu.find_system('active_matter').presets
    monkeypatch.setattr(gpu.simulate, 'make_dataset', fake)
    monkeypatch.setitem(presets, 'race', None)
    assert 7.9 < gpu.make_data(tmp_path, 24, False)['minutes_each'] <= 8
    assert asked[0].grid == (256, 256) and len(asked[0].pairs) * sum(asked[0].runs.values()) == 92
    assert not (tmp_path / 'active_matter/simulated.json').exists()


def test_the_table_is_drawn_between_its_markers(tmp_path):
    results = {'machine': 'a GPU', 'commit': '1234567890', 'measured': {
        gpu.TESTS: {'said': '26 passed'},
        'V-JEPA, bfloat16': dict(windows=8, windows_per_s=12.345, memory_gb=6.789, loss=1.0, gradient=3.14159),
        'VideoMAE, float32': {'error': 'CUDA out of memory'},
        'real': {'windows': 640, 'minutes': 4.5, 'errors': {
            'V-JEPA, linear': {'alpha': 0.01, 'zeta': 0.25}}}}}
    page = tmp_path / 'page.md'
    page.write_text('before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n')
    for _ in range(2):                                                   # again: the same
        gpu.draw(results, page)
        text = page.read_text()
        assert text.startswith('before\n<!-- gpu -->\na GPU, commit 1234567. `pytest -m gpu`: 26 passed\n')
        assert '| V-JEPA, bfloat16 | 8 | 12.3 | 6.79 | 3.1416 |' in text and 'old' not in text
        assert '| VideoMAE, float32 | | failed | | CUDA out of memory |' in text
        assert '| real | 640 | 4.5 | V-JEPA, linear | alpha 0.010, zeta 0.250 |' in text
        assert text.endswith('|\n<!-- /gpu -->\nafter\n')
    assert (HERE / 'docs/speed.md').read_text().count('<!-- gpu -->\n') == 1
