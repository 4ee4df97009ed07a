"""report.py, tables.py: intervals, means over seeds, and that the pages say what results/ says."""
import json

import numpy as np
import pytest

import report
import tables


def test_the_interval_is_over_runs():
    assert tables.interval([0.3, 0.3, 0.3]) == pytest.approx([0.3, 0.3])
    assert tables.interval([0.0, 1.0]) == [0.0, 1.0]
    errors = np.random.default_rng(1).exponential(size=400)
    low, high = tables.interval(errors)
    assert high - low == pytest.approx(2 * 1.96 * errors.std() / 20, rel=0.1) and low < errors.mean() < high


PROBE = {'probe': 'ours', 'epochs': 100, 'mlp_ratio': 0.0, 'finetune': ''}
SEEDS = {'data': 0, 'training': 0, 'probe': 0}


def run(windows=100, **settings):
    return {'windows_seen': windows, 'preset': 'nano', 'settings': {'init': '', 'lr': 0.001, **settings}}


def result(error, seed, row='JEPA', **changes):
    """An eval.json; the parts that a table needs."""
    scores = lambda e: {p: {'alpha': e - 0.1, 'zeta': e + 0.1, 'mean': e} for p in tables.PROBES}
    runs = lambda e: {p: [e - 0.05, e + 0.05] for p in tables.PROBES}
    ridge = 0.01 * (seed + 1)
    return {'system': 'active_matter', 'labels': ['alpha', 'zeta'], 'row': row, 'split': 'test', 'stride': 4,
            'windows': {'train': 9, 'valid': 9, 'test': 2}, 'field': 'whole domain at 64 x 64, in 4 tiles of 32 x 32',
            'probe': {**PROBE, 'seed': seed},
            'seeds': {'data': seed, 'training': seed, 'probe': seed},
            'run': run(seed=seed),
            'rows': {row: scores(error), 'random init': scores(2 * error), 'field statistics': {
                'linear': scores(ridge)['linear']}, 'predict the mean': scores(1.0), row + tables.PUBLISHED: {}},
            'by_run': {row: runs(error), 'random init': runs(2 * error), 'field statistics': {
                'linear': [ridge - 0.01, ridge + 0.01]}}, **changes}


def write(folder, name, *args, **changes):
    (folder / f'{name}.json').write_text(json.dumps(result(*args, **changes)))


def test_means_over_seeds(tmp_path):
    for seed, error in enumerate((0.2, 0.3, 0.4)):
        write(tmp_path, f'a-nano-seed{seed}', error, seed)
    write(tmp_path, 'a-nano-paired-seed0', 0.5, 0, run=run(200, init='out/x'), field='whole domain at 64 x 64')
    table = report.summary(['a-nano', 'a-nano-paired'], tmp_path).splitlines()
    assert table[0] == '| active_matter | seeds | windows seen | attentive | linear | knn |'
    rows = {line.split(' | ')[0][2:]: line.split(' | ')[1:] for line in table[2:]}
    assert rows['JEPA'][:3] == ['3', '100', '0.300 ± 0.100 ~ [0.233, 0.367]']
    assert rows['JEPA: random init'][2].startswith('0.600 ± 0.200 [')
    assert rows['JEPA, paired, from out/x'][:2] == ['1', '200']
    assert rows['JEPA, paired, from out/x'][2].startswith('0.500 [0.450, 0.550]')
    assert rows['field statistics'][0] == '3' and len(rows) == 5         # each dataset's once, not each model's
    assert rows['field statistics'][2:4] == ['-', '0.020 ± 0.010 [0.010, 0.030]']
    each = report.summary(['parameters', 'a-nano'], tmp_path).splitlines()
    assert 'attentive: alpha | attentive: zeta | attentive: mean' in each[0] and '0.200 ± 0.100 ~ | 0.400' in each[2]
    alone = report.summary(['a-nano-seed1'], tmp_path).splitlines()
    assert alone[2].startswith('| JEPA | 1 | 100 | 0.300 [')
    with pytest.raises(ValueError, match='b-nano'):
        report.summary(['b-nano'], tmp_path)
    page = 'before\n<!-- results: a-nano -->\nold\n<!-- /results -->\nafter'
    assert report.with_tables(page, tmp_path).splitlines()[2] == table[0]
    assert report.with_tables(report.with_tables(page, tmp_path), tmp_path).endswith('<!-- /results -->\nafter')


def test_what_is_no_better_than_random_weights_is_marked():
    """By two standard deviations of the difference of the means' spreads: here 2 * sqrt(0.1^2 + 0.2^2) = 0.447."""
    random = [0.4, 0.6, 0.8]
    assert report.no_better([0.06, 0.16, 0.26], random) and not report.no_better([0.05, 0.15, 0.25], random)
    assert not report.no_better([0.7], random)


def test_variants_that_start_alike_share_the_row_of_random_weights(tmp_path):
    write(tmp_path, 'a-nano-seed0', 0.2, 0)
    changed = result(0.4, 0)
    changed['rows']['random init'], changed['by_run']['random init'] = [
        result(0.2, 0)[k]['random init'] for k in ('rows', 'by_run')]
    (tmp_path / 'a-nano-paired-seed0.json').write_text(json.dumps(changed))
    titles = [line.split(' | ')[0] for line in report.summary(['a-nano', 'a-nano-paired'], tmp_path).splitlines()[2:]]
    assert titles == ['| JEPA', '| JEPA: random init', '| field statistics', '| JEPA, paired']
    changed['rows']['random init'] = result(0.3, 0)['rows']['random init']                 # from other weights
    (tmp_path / 'a-nano-paired-seed0.json').write_text(json.dumps(changed))
    assert '| JEPA, paired: random init | 1 |' in report.summary(['a-nano', 'a-nano-paired'], tmp_path)


def test_one_row_is_one_experiment(tmp_path):
    """Its files differ in their seeds, in nothing else; where they lie does not matter."""
    write(tmp_path, 'a-nano-seed0', 0.2, 0)
    write(tmp_path, 'a-nano-seed1', 0.3, 1, run=run(out='out/elsewhere', seed=1))
    assert '| JEPA | 2 |' in report.summary(['a-nano'], tmp_path)
    for changes in dict(run=run(lr=0.1)), dict(probe={**PROBE, 'finetune': '5'}), dict(seeds=SEEDS):
        write(tmp_path, 'a-nano-seed1', 0.3, 1, **changes)
        with pytest.raises(ValueError, match='a-nano-seed1.json'):
            report.summary(['a-nano'], tmp_path)
    tuned = result(0.2, 0)
    for key in 'rows', 'by_run':
        tuned[key]['JEPA, fine-tuned'] = tuned[key]['JEPA']
    (tmp_path / 'b-nano-seed0.json').write_text(json.dumps(tuned))
    assert '| JEPA, fine-tuned | 1 |' in report.summary(['b-nano'], tmp_path)


def test_the_encoder_with_labels_has_a_row(tmp_path):
    write(tmp_path, 'a-nano-seed0', 0.2, 0)
    changed = result(0.1, 0, 'JEPA, supervised')
    for key in 'rows', 'by_run':
        changed[key]['random init'] = result(0.2, 0)[key]['random init']
    (tmp_path / 'a-nano-supervised-seed0.json').write_text(json.dumps(changed))
    titles = [line.split(' | ')[0] for line in
              report.summary(['a-nano', 'a-nano-supervised'], tmp_path).splitlines()[2:]]
    assert titles == ['| JEPA', '| JEPA: random init', '| field statistics', '| JEPA, supervised']


def test_systems_side_by_side(tmp_path):
    """Each its own seeds, spreads, marks and ranks; two models that begin alike share a row; no other system's rows."""
    def put(system, name, row, own, seed, **changes):
        r = result(own, seed, row, system=system, **changes)
        for key in 'rows', 'by_run':
            r[key]['random init'] = result(0.1 + 0.01 * seed, seed)[key]['random init']              # twice that
        (tmp_path / f'{system}-{name}-seed{seed}.json').write_text(json.dumps(r))
    for system, scale in ('active_matter', 1), ('shear_flow', 2):
        for seed in 0, 1:
            rank = {'effective': 3.0 * scale + seed, 'of': 32}
            put(system, 'jepa-nano-vicreg', 'JEPA', 0.01 * scale + 0.002 * seed, seed, rank=rank)
            put(system, 'pixels-nano', 'pixels', 0.2 * scale + 0.1 * seed, seed)
    put('rayleigh_benard', 'jepa-nano-vicreg', 'JEPA', 0.5, 0)
    table = report.side_by_side(tmp_path).splitlines()
    assert table[0] == ('|  | active_matter: attentive | active_matter: linear | active_matter: knn '
                        '| shear_flow: attentive | shear_flow: linear | shear_flow: knn | effective rank |')
    rows = {line.split(' | ')[0][2:]: line.split(' | ')[1:] for line in table[2:]}
    assert list(rows) == ['pixels', 'JEPA, vicreg', 'pixels: random init', 'field statistics']
    assert rows['JEPA, vicreg'] == [*['0.011 ± 0.001'] * 3, *['0.021 ± 0.001'] * 3, '3.5 of 32 / 6.5 of 32 |']
    assert rows['pixels: random init'][3] == '0.210 ± 0.014' and rows['pixels'][0] == '0.250 ± 0.071 ~'
    assert rows['pixels'][3] == '0.450 ± 0.071 ~' and rows['pixels'][6] == '- / - |'
    for seed in 0, 1:
        (tmp_path / f'shear_flow-pixels-nano-seed{seed}.json').unlink()
    alone = report.side_by_side(tmp_path).splitlines()
    assert any(line.split(' | ')[0] == '| pixels' and line.split(' | ')[4:7] == ['-', '-', '-'] for line in alone)
    page = '<!-- results: latents-or-pixels -->\n<!-- /results -->'
    assert report.with_tables(page, tmp_path).splitlines()[1] == table[0]


@pytest.mark.parametrize('changes', [
    dict(split='valid'), dict(system='shear_flow'), dict(labels=['alpha']), dict(stride=8), dict(windows={'test': 3}),
    dict(field="paper's part of the domain at 64 x 64"),
    dict(probe={**PROBE, 'probe': 'paper'}),
    dict(probe={**PROBE, 'epochs': 5})])
def test_what_one_table_cannot_compare_is_refused(tmp_path, changes):
    write(tmp_path, 'a-nano-seed0', 0.2, 0)
    write(tmp_path, 'a-nano-seed1', 0.2, 1, **changes)
    with pytest.raises(ValueError, match='a-nano-seed1.json'):
        report.summary(['a-nano'], tmp_path)


def test_the_pages_say_what_results_says(capsys):
    report.main(['--check'])
    assert capsys.readouterr().out.count('every table is what results/ gives') == 2
