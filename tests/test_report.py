"""report.py: intervals, means over seeds, and that the pages say what results/cells/ says."""
import json

import numpy as np
import pytest

import eval as tables
from benchmark import report
from benchmark.report import read_cells
from model import PUBLISHED, find_model


def test_the_interval_is_over_runs():
    assert tables.interval([[0.3, 0.3, 0.3]]) == pytest.approx([0.3, 0.3])
    assert tables.interval([[0.0, 1.0]]) == [0.0, 1.0]
    errors = np.random.default_rng(1).exponential(size=400)
    low, high = tables.interval([errors])
    assert high - low == pytest.approx(2 * 1.96 * errors.std() / 20, rel=0.1) and low < errors.mean() < high


@pytest.mark.parametrize('between, within', [(1.0, 0.0), (0.0, 1.0), (0.1, 1.0), (0.3, 1.0)])
def test_the_interval_is_over_seeds_then_over_their_runs(between, within):
    """Of 40 seeds of 50 runs. Its half is 1.96 standard errors: of the seeds' means, and of their runs' once more,
    as they are drawn, too."""
    rng = np.random.default_rng(0)
    errors = between * rng.normal(size=(40, 1)) + within * rng.normal(size=(40, 50))
    low, high = tables.interval(errors)
    known = 1.96 * np.sqrt(errors.mean(1).var() / 40 + within**2 / 2000)
    assert (high - low) / 2 == pytest.approx(known, rel=0.1)
    assert (low + high) / 2 == pytest.approx(errors.mean(), abs=0.3 * known)
    # seeds may have other numbers of runs; each counts as one
    assert tables.interval([[0.0] * 9, [1.0]]) == [0.0, 1.0]


PROBE = {'probe': 'ours', 'epochs': 100, 'mlp_ratio': 0.0, 'finetune': '', 'fractions': 'runs'}
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
                'linear': scores(ridge)['linear']}, 'predict the mean': scores(1.0), row + tables.PUBLISHED_ROW: {}},
            'by_run': {row: runs(error), 'random init': runs(2 * error), 'field statistics': {
                'linear': [ridge - 0.01, ridge + 0.01]}}, **changes}


def write(folder, name, *args, **changes):
    (folder / f'{name}.json').write_text(json.dumps(result(*args, **changes)))


def test_means_over_seeds(tmp_path):
    for seed, error in enumerate((0.2, 0.3, 0.4)):
        write(tmp_path, f'a-nano-seed{seed}', error, seed)
    write(tmp_path, 'a-nano-paired-seed0', 0.5, 0, run=run(200, init='out/x'), field='whole domain at 64 x 64')
    table = report.summary(read_cells(tmp_path), ['a-nano', 'a-nano-paired']).splitlines()
    assert table[0] == '| active_matter | seeds | windows seen | attentive | linear | knn |'
    rows = {line.split(' | ')[0][2:]: line.split(' | ')[1:] for line in table[2:]}
    assert rows['JEPA'][:3] == ['3', '100', '0.300 ± 0.100 ~ [0.200, 0.400]']
    assert rows['JEPA: random init'][2].startswith('0.600 ± 0.200 [')
    assert rows['JEPA, paired, from x'][:2] == ['1', '200']
    assert rows['JEPA, paired, from x'][2].startswith('0.500 [0.450, 0.550]')
    assert rows['field statistics'][0] == '3' and len(rows) == 5         # each dataset's once, not each model's
    assert rows['field statistics'][2:4] == ['-', '0.020 ± 0.010 [0.007, 0.033]']
    each = report.summary(read_cells(tmp_path), ['parameters', 'a-nano']).splitlines()
    assert 'attentive: alpha | attentive: zeta | attentive: mean' in each[0] and '0.200 ± 0.100 ~ | 0.400' in each[2]
    alone = report.summary(read_cells(tmp_path), ['a-nano-seed1']).splitlines()
    assert alone[2].startswith('| JEPA | 1 | 100 | 0.300 [')
    with pytest.raises(ValueError, match='b-nano'):
        report.summary(read_cells(tmp_path), ['b-nano'])
    page = 'before\n<!-- results: a-nano -->\nold\n<!-- /results -->\nafter'
    assert report.with_tables(page, read_cells(tmp_path)).splitlines()[2] == table[0]
    assert report.with_tables(report.with_tables(page, read_cells(tmp_path)), read_cells(tmp_path)).endswith('<!-- /results -->\nafter')


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
    titles = [line.split(' | ')[0] for line in report.summary(read_cells(tmp_path), ['a-nano', 'a-nano-paired']).splitlines()[2:]]
    assert titles == ['| JEPA', '| JEPA: random init', '| field statistics', '| JEPA, paired']
    changed['rows']['random init'] = result(0.3, 0)['rows']['random init']                 # from other weights
    (tmp_path / 'a-nano-paired-seed0.json').write_text(json.dumps(changed))
    assert '| JEPA, paired: random init | 1 |' in report.summary(read_cells(tmp_path), ['a-nano', 'a-nano-paired'])


def test_one_row_is_one_experiment(tmp_path):
    """Its files differ in their seeds, in nothing else; where they lie does not matter."""
    write(tmp_path, 'a-nano-seed0', 0.2, 0)
    write(tmp_path, 'a-nano-seed1', 0.3, 1, run=run(out='out/elsewhere', seed=1))
    assert '| JEPA | 2 |' in report.summary(read_cells(tmp_path), ['a-nano'])
    for changes in (dict(run=run(lr=0.1)), dict(probe={**PROBE, 'finetune': '5'}), dict(seeds=SEEDS),
                    dict(probe={**PROBE, 'noise': 0.3}), dict(run=run(init='rows/other-seed1'))):
        write(tmp_path, 'a-nano-seed1', 0.3, 1, **changes)
        with pytest.raises(ValueError, match='a-nano-seed1.json'):
            report.summary(read_cells(tmp_path), ['a-nano'])
    tuned = result(0.2, 0)
    for key in 'rows', 'by_run':
        tuned[key]['JEPA, fine-tuned'] = tuned[key]['JEPA']
    (tmp_path / 'b-nano-seed0.json').write_text(json.dumps(tuned))
    assert '| JEPA, fine-tuned | 1 |' in report.summary(read_cells(tmp_path), ['b-nano'])


def test_seeds_may_start_from_runs_of_their_own_seeds(tmp_path):
    for seed in 0, 1:
        r = result(0.1, seed, 'JEPA, supervised', run=run(init=f'rows/a-infonce-seed{seed}', seed=seed))
        (tmp_path / f'a-nano-tuned-seed{seed}.json').write_text(json.dumps(r))
    assert '| JEPA, supervised, tuned, from a-infonce | 2 |' in report.summary(read_cells(tmp_path), ['a-nano-tuned'])
    assert len(tables.repeats(list(read_cells(tmp_path).values()))) == 1


def test_a_probe_of_clean_fields_has_its_own_floor(tmp_path):
    for seed in 0, 1:
        r = result(0.3 + 0.01 * seed, seed)
        for key in 'rows', 'by_run':
            for row, e in ('JEPA', 0.35), ('random init', 0.36), ('field statistics', 0.01):
                r[key][f'{row}, probe of clean fields'] = result(e + 0.01 * seed, seed)[key]['JEPA']
        (tmp_path / f'a-nano-at-noise-seed{seed}.json').write_text(json.dumps(r))
    rows = {line.split(' | ')[0][2:]: line.split(' | ')[3] for line in
            report.summary(read_cells(tmp_path), ['a-nano-at-noise']).splitlines()[2:]}
    assert rows['JEPA, at-noise, probe of clean fields'].startswith('0.355 ± 0.007 ~')           # of 0.365, not of 0.61
    assert '~' not in rows['JEPA, at-noise'] and {'JEPA: random init, probe of clean fields',
                                                   'field statistics, probe of clean fields'} <= rows.keys()


def test_older_results_have_tables_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'HERE', tmp_path)
    for name, error in ('cells', 0.2), ('older', 0.4):
        (tmp_path / 'results' / name).mkdir(parents=True)
        write(tmp_path / 'results' / name, 'a-nano-seed0', error, 0)
    page = ''.join(f'<!-- results: {words} -->\n<!-- /results -->\n' for words in ('a-nano', 'older a-nano'))
    shown = report.with_tables(page, read_cells(tmp_path / 'results/cells'))
    assert '| JEPA | 1 | 100 | 0.200 [' in shown.partition('older')[0]
    assert '| JEPA | 1 | 100 | 0.400 [' in shown.partition('older')[2]


def test_the_encoder_with_labels_has_a_row(tmp_path):
    write(tmp_path, 'a-nano-seed0', 0.2, 0)
    changed = result(0.1, 0, 'JEPA, supervised')
    for key in 'rows', 'by_run':
        changed[key]['random init'] = result(0.2, 0)[key]['random init']
    (tmp_path / 'a-nano-supervised-seed0.json').write_text(json.dumps(changed))
    titles = [line.split(' | ')[0] for line in
              report.summary(read_cells(tmp_path), ['a-nano', 'a-nano-supervised']).splitlines()[2:]]
    assert titles == ['| JEPA', '| JEPA: random init', '| field statistics', '| JEPA, supervised']


def test_systems_side_by_side(tmp_path):
    """Each its own seeds, spreads, marks and ranks; two models that begin alike share a row."""
    def put(system, name, row, own, seed, **changes):
        r = result(own, seed, row, system=system, **changes)
        for key in 'rows', 'by_run':
            r[key]['random init'] = result(0.1 + 0.01 * seed, seed)[key]['random init']              # twice that
        (tmp_path / f'{system}-{name}-seed{seed}.json').write_text(json.dumps(r))
    for system, scale in ('active_matter', 1), ('shear_flow', 2):
        for seed in 0, 1:
            rank = {'effective': 3.0 * scale + seed, 'of': 32}
            put(system, 'jepa-nano-next', 'JEPA', 0.01 * scale + 0.002 * seed, seed, rank=rank)
            put(system, 'pixels-nano', 'pixels', 0.2 * scale + 0.1 * seed, seed)
            put(system, 'jepa-nano-vicreg', 'JEPA', 0.5, seed)           # of another table
    table = report.side_by_side(read_cells(tmp_path), report.EXPERIMENT).splitlines()
    assert table[0] == ('|  | active_matter: attentive | active_matter: linear | active_matter: knn '
                        '| shear_flow: attentive | shear_flow: linear | shear_flow: knn | effective rank |')
    rows = {line.split(' | ')[0][2:]: line.split(' | ')[1:] for line in table[2:]}
    assert list(rows) == ['JEPA, next 16', 'pixels', 'JEPA: random init', 'field statistics']
    assert rows['JEPA, next 16'] == [*['0.011 ± 0.001'] * 3, *['0.021 ± 0.001'] * 3, '3.5 of 32 / 6.5 of 32 |']
    assert rows['JEPA: random init'][3] == '0.210 ± 0.014' and rows['pixels'][0] == '0.250 ± 0.071 ~'
    assert rows['pixels'][3] == '0.450 ± 0.071 ~' and rows['pixels'][6] == '- / - |'
    for seed in 0, 1:
        (tmp_path / f'shear_flow-pixels-nano-seed{seed}.json').unlink()
    alone = report.side_by_side(read_cells(tmp_path), report.EXPERIMENT).splitlines()
    assert any(line.split(' | ')[0] == '| pixels' and line.split(' | ')[4:7] == ['-', '-', '-'] for line in alone)
    page = '<!-- results: experiment -->\n<!-- /results -->\n<!-- results: other-ways -->\n<!-- /results -->'
    pages = report.with_tables(page, read_cells(tmp_path))
    short = report.with_tables('<!-- results: experiment knn -->\n<!-- /results -->', read_cells(tmp_path)).splitlines()[1:]
    assert short[0] == '|  | active_matter | shear_flow |' and short[2] == '| JEPA, next 16 | 0.011 ± 0.001 | 0.021 ± 0.001 |'
    assert [line.split(' | ')[0] for line in short[2:-1]][:2] == ['| JEPA, next 16', '| pixels']
    assert pages.splitlines()[1] == table[0] and '| JEPA, vicreg | 0.500' in pages


def test_two_rows_are_compared_run_by_run(tmp_path):
    """Seeds and runs of both are drawn together: what makes a run hard for both is no spread of their difference."""
    hard = np.random.default_rng(0).exponential(size=(3, 40))
    for seed in range(3):
        for name, row, more in (('jepa-nano-next', 'JEPA', 0.0), ('pixels-nano', 'pixels', 0.1)):
            r = result(0.2, seed, row)
            noise = 0.05 * np.random.default_rng([seed, len(name)]).normal(size=40)
            r['by_run'][row] = {p: (hard[seed] + more + (noise if p == 'knn' else 0)).tolist() for p in tables.PROBES}
            r['seeds'] = {'data': 0, 'training': seed, 'probe': 0}       # of the training, not of the data
            (tmp_path / f'active_matter-{name}-seed{seed}.json').write_text(json.dumps(r))
    (tmp_path / 'active_matter-pixels-nano-seed2.json').unlink()         # then seeds 0 and 1 are left
    head, (first, *others) = cells_of(report.compare(read_cells(tmp_path)))
    assert head == ['first, second', 'differ in', *(f'active_matter: {p}' for p in tables.PROBES)]
    assert first[:4] == ['jepa-nano-next, pixels-nano', 'target: embeddings, pixels', *['-0.100 [-0.100, -0.100]'] * 2]
    low, high = map(float, first[4].partition('[')[2].strip(']').split(','))
    assert -0.14 < low < -0.1 < high < -0.06 and {*sum([row[2:] for row in others], [])} == {'-'}
    assert report.show_gap([np.array([-0.1, 0.3])]) == '+0.100 [-0.100, +0.300] ~'


def test_runs_of_one_value_stand_apart(tmp_path):
    """Means, medians, and means of the runs with this value and of the others: of each seed, then over seeds."""
    for seed in 0, 1:
        errors = [1.0 + seed, 0.1, 0.2, 0.3]
        r = result(0.2, seed, labels_by_run={'alpha': [-1.0, -2.0, -3.0, -4.0], 'zeta': [1, 2, 3, 4]})
        r['by_run'] = {row: {p: errors for p in tables.PROBES} for row in ('JEPA', 'random init')}
        (tmp_path / f'a-nano-seed{seed}.json').write_text(json.dumps(r))
    page = report.with_tables('<!-- results: runs alpha=-1 a-nano -->\n<!-- /results -->', read_cells(tmp_path))
    head, rows = cells_of('\n'.join(page.splitlines()[1:-1]))
    assert head[:5] == ['active_matter', *(f'attentive: {how}' for how in ('mean', 'median', 'alpha -1', 'others'))]
    assert [row[0] for row in rows] == ['JEPA', 'JEPA: random init']
    assert rows[0][1:5] == ['0.525 ± 0.177', '0.250 ± 0.000', '1.500 ± 0.707', '0.200 ± 0.000']


@pytest.mark.parametrize('changes', [
    dict(split='valid'), dict(system='shear_flow'), dict(labels=['alpha']), dict(stride=8), dict(windows={'test': 3}),
    dict(field="paper's part of the domain at 64 x 64"),
    dict(probe={**PROBE, 'probe': 'paper'}),
    dict(probe={**PROBE, 'epochs': 5}),
    dict(generalization={}, probe={**PROBE, 'fractions': 'windows'})])
def test_what_one_table_cannot_compare_is_refused(tmp_path, changes):
    write(tmp_path, 'a-nano-seed0', 0.2, 0, generalization={})
    write(tmp_path, 'a-nano-seed1', 0.2, 1, **changes)
    with pytest.raises(ValueError, match='a-nano-seed1.json'):
        report.summary(read_cells(tmp_path), ['a-nano'])


# ---------------------------------------------------------------------------------------------
# the paper's tables

def carried(error, *probes):
    """What --generalize finds: worse with fewer labels, by 0.1, and still worse at unseen values and on noise."""
    worse = lambda more: {p: error + more for p in probes}
    return {'labels': {'0.1': worse(0.1), '1': worse(0)},
            'values': {'between': {p: [error + 0.2, error / 2] for p in probes if p != 'attentive'}},
            'inputs': {'noise 1': worse(0.4), 'half resolution': worse(0.3)}}


def put(folder, name, error, seed, row='JEPA', floor=0.9, **changes):
    """A result beside others of its seed, whose random weights and field statistics are like theirs."""
    system, by_row = name.partition('-')[0], {row: carried(error, *tables.PROBES),
                                              'random init': carried(floor, 'linear', 'knn'),
                                              'field statistics': carried(0.01, 'linear')}
    r = result(error, seed, row, system=system, generalization=by_row, **changes)
    r['run'] |= {'train_seconds': 60 * (1, 2, 30)[seed], 'memory_gb': 0.5 + seed}
    for key, own in ('rows', result(floor, seed)), ('by_run', result(floor, seed)):
        r[key]['random init'] = own[key]['JEPA']
    (folder / f'{name}-seed{seed}.json').write_text(json.dumps(r))
    return r


def tuned(folder, name, error, floor, *seeds, how='fine-tuned'):
    """Add fine-tuned rows to results: the trained encoder's, and, if `floor` is not None, its random weights'."""
    for seed in seeds:
        file = folder / f'{name}-seed{seed}.json'
        r = json.loads(file.read_text())
        for row, e in (r['row'], error), ('random init', floor):
            if e is not None:
                own = result(e + 0.01 * seed, seed)
                r['rows'][f'{row}, {how}'] = {'attentive': own['rows']['JEPA']['attentive']}
                r['by_run'][f'{row}, {how}'] = {'attentive': own['by_run']['JEPA']['attentive']}
        file.write_text(json.dumps(r))


def cells_of(table):
    """{first cell: the others} of a Markdown table's rows, and its head."""
    head, line, *rows = ([cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines())
    assert set(line) == {'---'} and all(len(row) == len(head) for row in rows)
    assert len({row[0] + row[1] for row in rows}) == len(rows)
    return head, rows


def test_table_one_stands_beside_the_papers(tmp_path):
    """Models by systems; what is fine-tuned is compared with random weights that were fine-tuned; what is missing is
    a dash."""
    for seed in 0, 1:
        for system in 'active_matter', 'shear_flow':
            put(tmp_path, f'{system}-jepa-nano-vicreg', 0.2 + 0.02 * seed, seed)
        put(tmp_path, 'active_matter-jepa-nano-short-supervised', 0.1, seed, 'JEPA, supervised')
        put(tmp_path, 'active_matter-mpp-nano', 0.4, seed, 'MPP', probe={**PROBE, 'finetune': '5'})
        put(tmp_path, 'active_matter-jepa-nano', 0.05, seed)             # of another table
    tuned(tmp_path, 'active_matter-mpp-nano', 0.3, 0.305, 0, 1)
    head, rows = cells_of(report.table_one(read_cells(tmp_path), 'nano'))
    assert head == ['', *(f'{system}: {c}' for system in ('active_matter', 'shear_flow')
                          for c in ('the paper', *tables.PROBES))]
    assert [row[0] for row in rows] == ['JEPA', 'VideoMAE', 'MPP', 'DISCO', 'MPP, fine-tuned', 'JEPA, supervised',
                                        'JEPA: random init', 'MPP: random init', 'MPP: random init, fine-tuned',
                                        'field statistics', 'predict the mean']
    by = {row[0]: row[1:] for row in rows}
    jepa, mpp = PUBLISHED['jepa'], PUBLISHED['mpp']
    assert by['JEPA'] == [f'{jepa["active_matter"]:.3f}', *['0.210 ± 0.014'] * 3,
                          f'{jepa["shear_flow"]:.3f}', *['0.210 ± 0.014'] * 3]
    assert by['MPP'] == ['-', *['0.400 ± 0.000'] * 3, '-', '-', '-', '-']          # the paper's is fine-tuned
    assert by['MPP, fine-tuned'] == [f'{mpp["active_matter"]:.3f}', '0.305 ± 0.007 ~', '-', '-',
                                     f'{mpp["shear_flow"]:.3f}', '-', '-', '-']
    assert by['JEPA, supervised'][:2] == ['-', '0.100 ± 0.000'] and by['predict the mean'] == ['-', '1', '1', '1'] * 2
    assert by['field statistics'][:4] == ['-', '-', '0.015 ± 0.007', '-']
    assert by['MPP: random init, fine-tuned'][1] == '0.310 ± 0.007' and by['JEPA: random init'][1] == '0.900 ± 0.000'
    for seed in 0, 1:
        put(tmp_path, 'active_matter-mpp-nano', 0.4, seed, 'MPP', probe={**PROBE, 'finetune': '5'})
    tuned(tmp_path, 'active_matter-mpp-nano', 0.3, None, 0, 1)           # then they are compared with frozen ones
    assert '| MPP, fine-tuned | {:.3f} | 0.305 ± 0.007 | - |'.format(mpp['active_matter']) in \
        report.table_one(read_cells(tmp_path), 'nano')


def test_the_papers_own_way_of_fine_tuning_has_its_number(tmp_path, monkeypatch):
    """Also where a model of somebody's own has no title."""
    put(tmp_path, 'active_matter-mpp-paper', 0.4, 0, 'MPP')
    tuned(tmp_path, 'active_matter-mpp-paper', 0.3, 0.9, 0, how='fine-tuned as in the paper')
    put(tmp_path, 'active_matter-mpp-nano', 0.7, 0, 'MPP')
    monkeypatch.delattr(find_model('pixels'), 'TITLE')
    by = {row[0]: row[1:] for row in cells_of(report.table_one(read_cells(tmp_path), 'paper'))[1]}
    published = PUBLISHED['mpp']['active_matter']
    assert by['MPP, fine-tuned as in the paper'] == [f'{published:.3f}', '0.300', '-', '-']
    assert by['MPP'][:2] == ['-', '0.400'] and by['JEPA'][1:] == ['-', '-', '-']                     # not run


def test_curves_of_labels(tmp_path):
    """The encoder with labels has seen them all: its curve is made of encoders trained with fewer, and of itself."""
    for seed in 0, 1:
        put(tmp_path, 'shear_flow-jepa-nano-vicreg', 0.2 + 0.02 * seed, seed)
        put(tmp_path, 'shear_flow-jepa-nano-short-supervised', 0.1, seed, 'JEPA, supervised')
        put(tmp_path, 'shear_flow-jepa-nano-short-supervised-10', 0.6 + 0.1 * seed, seed, 'JEPA, supervised')
    put(tmp_path, 'shear_flow-jepa-nano-short-supervised-1', 0.95, 0, 'JEPA, supervised')
    put(tmp_path, 'active_matter-jepa-nano-short-supervised-2', 0.5, 0, 'JEPA, supervised')
    curves = report.label_curves(read_cells(tmp_path), 'shear_flow')
    assert {title for title, _ in curves} == {'JEPA', 'JEPA: random init', 'field statistics',
                                              'JEPA, supervised, from scratch'}
    assert curves['JEPA', 'attentive'] == {0.1: pytest.approx([0.3, 0.32]), 1.0: [0.2, 0.22]}
    assert curves['JEPA: random init', 'linear'][0.1] == [1.0, 1.0]
    assert curves['JEPA: random init', 'attentive'] == {0.01: [0.9], 0.1: [0.9] * 2, 1.0: [0.9] * 2}
    assert ('field statistics', 'knn') not in curves
    for p in tables.PROBES:
        assert curves['JEPA, supervised, from scratch', p] == {1.0: [0.1, 0.1], 0.01: [0.95], 0.1: [0.6, 0.7]}
    head, rows = cells_of(report.labels_table(read_cells(tmp_path), 'shear_flow'))
    assert head == ['shear_flow', 'probe', '1%', '10%', '100%']
    assert ['JEPA', 'attentive', '-', '0.310 ± 0.014', '0.210 ± 0.014'] in rows
    assert ['JEPA, supervised, from scratch', 'linear', '0.950', '0.650 ± 0.071', '0.100 ± 0.000'] in rows
    assert [row[:2] for row in rows] == [[title, p] for title in (
        'JEPA', 'JEPA, supervised, from scratch', 'JEPA: random init') for p in ('attentive', 'linear')] + [
        ['field statistics', 'linear']]


def test_how_far_an_encoder_carries(tmp_path):
    """At unseen values beside what saw them; the attentive probe was not fitted there, and an encoder with labels has
    seen them. Nothing of what did not try."""
    for seed in 0, 1:
        put(tmp_path, 'shear_flow-jepa-nano-vicreg', 0.2 + 0.02 * seed, seed)
        put(tmp_path, 'shear_flow-jepa-nano-short-supervised', 150 * (1 + seed), seed, 'JEPA, supervised')
        file = tmp_path / f'shear_flow-videomae-nano-seed{seed}.json'
        put(tmp_path, 'shear_flow-videomae-nano', 0.3, seed, 'VideoMAE')
        r = json.loads(file.read_text())
        del r['generalization']
        file.write_text(json.dumps(r))
    head, rows = cells_of(report.carried_table(read_cells(tmp_path), 'shear_flow'))
    assert head == ['shear_flow', 'probe', 'between', 'all values, clean', 'noise 1', 'half resolution']
    assert rows == [['JEPA', 'attentive', '-', '0.210 ± 0.014', '0.610 ± 0.014', '0.510 ± 0.014'],
                    ['JEPA', 'linear', '0.410 ± 0.014 (0.105)', *rows[0][3:]],
                    *(['JEPA, supervised', p, '-', *['225 ± 106'] * 3] for p in ('attentive', 'linear')),
                    ['JEPA: random init', 'linear', '1.100 ± 0.000 (0.450)', *(f'{e} ± 0.000' for e in (
                        '0.900', '1.300', '1.200'))],
                    ['field statistics', 'linear', '0.210 ± 0.000 (0.005)', *(f'{e} ± 0.000' for e in (
                        '0.010', '0.410', '0.310'))]]


def test_random_weights_carry_as_whoever_tried_says(tmp_path):
    """Two models may begin alike, of which the first was not asked."""
    put(tmp_path, 'shear_flow-jepa-nano-vicreg', 0.2, 0)
    put(tmp_path, 'shear_flow-jepa-nano-short-supervised', 0.1, 0, 'JEPA, supervised')
    file = tmp_path / 'shear_flow-jepa-nano-vicreg-seed0.json'
    r = json.loads(file.read_text())
    del r['generalization']
    file.write_text(json.dumps(r))
    titles = [row[0] for row in cells_of(report.carried_table(read_cells(tmp_path), 'shear_flow'))[1]]
    assert titles == ['JEPA, supervised', 'JEPA, supervised', 'JEPA: random init', 'field statistics']


def test_what_the_models_cost(tmp_path):
    """From the least to the most over the systems, each a mean over its seeds; only of those of which it is known.

    Of minutes the median: a run may have been paused.
    """
    for system, scale in ('active_matter', 1), ('shear_flow', 3):
        for seed in 0, 1, 2:
            cost = {} if system == 'shear_flow' and seed else {'gflop_per_window': 0.5 * scale}
            put(tmp_path, f'{system}-jepa-nano-vicreg', 0.2, seed, run=run(25600, seed=seed), cost=cost,
                parameters={'encoder': 1000 * scale, 'attentive probe': 7})
    put(tmp_path, 'active_matter-videomae-nano', 0.3, 0, 'VideoMAE')
    head, rows = cells_of(report.cost_table(read_cells(tmp_path)))
    assert head == ['', 'parameters of the encoder', 'windows seen', 'GFLOP a window', 'TFLOP in all', 'minutes',
                    'peak GB']
    assert rows == [['JEPA', '1,000 to 3,000', '25,600', '0.500 to 1.500', '12.8 to 38.4', '1 to 2', '0.5 to 1.5']]


def test_the_words_of_a_marker_choose_its_table(monkeypatch):
    kinds = dict(compare='compare', cost_table='cost', labels_table='labels s', carried_table='carried s')
    for name in kinds:
        monkeypatch.setattr(report, name, lambda *args, name=name: (name, *args))
    monkeypatch.setattr(report, 'table_one', lambda *args: ('table_one', *args))
    monkeypatch.setattr(report, 'summary', lambda *args: ('summary', *args))
    for name, words in kinds.items():
        assert report.make_table(words.split(), {}) == (name, {}, *words.split()[1:])
    assert report.make_table(['table-1'], {}) == ('table_one', {})
    for names in ['parameters', 'a-nano'], ['labels'], ['cost', 'a-nano'], ['labels', 'a', 'b', 'c']:
        assert report.make_table(names, {}) == ('summary', {}, names)


# ---------------------------------------------------------------------------------------------
# the pages

def test_the_pages_say_what_results_says(capsys):
    report.main(['--check'])
    assert capsys.readouterr().out == 'every table is what results/ gives\n'


@pytest.mark.parametrize('spoil', [
    lambda r: 'not json', lambda r: '[]', lambda r: '{}', lambda r: json.dumps(r)[:-9], lambda r: json.dumps(r | {'rows': []}),
    lambda r: json.dumps(r | {'row': 'none'}), lambda r: json.dumps({k: v for k, v in r.items() if k != 'seeds'}),
    lambda r: json.dumps(r | {'rows': {'JEPA': {'linear': {'mean': None}}}}), lambda r: json.dumps(r | {'run': None}),
    lambda r: json.dumps(r).replace('"mean": 0.2', '"mean": NaN'), lambda r: json.dumps(r | {'by_run': {}})],
    ids=['text', 'list', 'empty', 'cut', 'no rows', 'no row', 'no seeds', 'null', 'no run', 'nan', 'no by_run'])
def test_a_damaged_result_is_one_line(tmp_path, spoil):
    (tmp_path / 'a-nano-seed0.json').write_text(spoil(result(0.2, 0)))
    with pytest.raises(ValueError, match='a-nano-seed0.json is no result of eval.py'):
        read_cells(tmp_path)


def test_pages_are_written_where_they_are_wrong(tmp_path, monkeypatch, capsys):
    """--check finds the page and writes nothing; without it, the table is made anew, and all around it stays."""
    monkeypatch.setattr(report, 'HERE', tmp_path)
    (tmp_path / 'results' / 'cells').mkdir(parents=True)
    (tmp_path / 'docs').mkdir()
    write(tmp_path / 'results' / 'cells', 'a-nano-seed0', 0.2, 0)
    for page in report.PAGES:
        (tmp_path / page).write_text(f'of {page}\n<!-- results: a-nano -->\n<!-- /results -->\nend\n')
    report.main([])
    assert capsys.readouterr().out.count(': written') == len(report.PAGES) == 3
    report.main(['--check'])
    wrong = tmp_path / 'docs/notebook.md'
    right = wrong.read_text()
    assert right.startswith('of docs/notebook.md\n') and right.endswith('\n<!-- /results -->\nend\n') and '| 0.200 [' in right
    wrong.write_text(right.replace('0.200', '0.100'))
    with pytest.raises(SystemExit) as left:
        report.main(['--check'])
    assert left.value.code == 2 and 'docs/notebook.md has other numbers' in capsys.readouterr().err
    assert wrong.read_text() != right
    report.main([])
    assert wrong.read_text() == right
    said = capsys.readouterr().out
    assert 'docs/notebook.md: written' in said and said.count(': written') == 1
