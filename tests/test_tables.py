"""tables.py: intervals, means over seeds, and that the pages say what results/ says."""
import json

import numpy as np
import pytest

import tables


def test_the_interval_is_over_runs():
    assert tables.interval([0.3, 0.3, 0.3]) == pytest.approx([0.3, 0.3])
    assert tables.interval([0.0, 1.0]) == [0.0, 1.0]
    errors = np.random.default_rng(1).exponential(size=400)
    low, high = tables.interval(errors)
    assert high - low == pytest.approx(2 * 1.96 * errors.std() / 20, rel=0.1) and low < errors.mean() < high


def result(error, seed, row='JEPA', windows=100):
    scores = lambda e: {p: {'alpha': e - 0.1, 'zeta': e + 0.1, 'mean': e} for p in tables.PROBES}
    runs = lambda e: {p: [e - 0.05, e + 0.05] for p in tables.PROBES}
    return {'system': 'active_matter', 'labels': ['alpha', 'zeta'], 'row': row, 'run': {'windows_seen': windows},
            'rows': {row: scores(error), 'random init': scores(2 * error), 'field statistics': {
                'linear': scores(0.01)['linear']}, 'predict the mean': scores(1.0), row + tables.PUBLISHED: {}},
            'by_run': {row: runs(error), 'random init': runs(2 * error), 'field statistics': {'linear': [0.0, 0.02]}}}


def test_means_over_seeds(tmp_path):
    for seed, error in enumerate((0.2, 0.3, 0.4)):
        (tmp_path / f'a-nano-seed{seed}.json').write_text(json.dumps(result(error, seed)))
    (tmp_path / 'a-nano-paired-seed0.json').write_text(json.dumps(result(0.5, 0, windows=200)))
    table = tables.summary(['a-nano', 'a-nano-paired'], tmp_path).splitlines()
    assert table[0] == '| active_matter | seeds | windows seen | attentive | linear | knn |'
    rows = {line.split(' | ')[0][2:]: line.split(' | ')[1:] for line in table[2:]}
    assert rows['JEPA'][:3] == ['3', '100', '0.300 ± 0.100 [0.233, 0.367]']
    assert rows['JEPA: random init'][2].startswith('0.600 ± 0.200 [')
    assert rows['JEPA, paired'][:2] == ['1', '200'] and rows['JEPA, paired'][2].startswith('0.500 [0.450, 0.550]')
    assert rows['field statistics'][2:4] == ['-', '0.010 ± 0.000 [0.003, 0.018]'] and len(rows) == 5
    each = tables.summary(['parameters', 'a-nano'], tmp_path).splitlines()
    assert 'attentive: alpha | attentive: zeta | attentive: mean' in each[0] and '0.200 ± 0.100 | 0.400' in each[2]
    with pytest.raises(ValueError, match='b-nano'):
        tables.summary(['b-nano'], tmp_path)
    page = 'before\n<!-- results: a-nano -->\nold\n<!-- /results -->\nafter'
    assert tables.with_tables(page, tmp_path).splitlines()[2] == table[0]
    assert tables.with_tables(tables.with_tables(page, tmp_path), tmp_path).endswith('<!-- /results -->\nafter')


def test_the_pages_say_what_results_says(capsys):
    tables.main(['--check'])
    assert capsys.readouterr().out.count('every table is what results/ gives') == 2
