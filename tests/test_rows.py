"""cells.py: that what is run is what pages show, that settings can be parsed, and that results are of their rows."""
import json

import pytest

import eval as evaluation
from benchmark import cells, report
from benchmark.cells import GROUPS, ROWS, Settings, find_cell, settings_of, why_stale
from benchmark.report import FEWER, PAPER_TABLES
from common import parse
from helpers import HERE
from systems import system_names


def cell_of(name):
    return find_cell(name, Settings())


def everywhere(rows, systems=tuple(system_names())):
    return [f'{system}-{row}' for system in systems for row in rows]


def test_every_table_is_made_of_rows(tmp_path, monkeypatch):
    """What the pages show, and what train.py and eval.py are told, exists."""
    names = set()
    monkeypatch.setattr(report, 'summary', lambda results, given: names.update(given) or '')
    monkeypatch.setattr(report, 'by_runs', lambda results, value, given: names.update(given) or '')
    for kind in 'side_by_side', 'table_one', 'labels_table', 'carried_table', 'cost_table', 'compare':
        monkeypatch.setattr(report, kind, lambda *args, **_: names.update(v for v in args if isinstance(v, str)) or '')
    for page in report.PAGES:
        report.with_tables((HERE / page).read_text(), {})
    assert names - {'parameters', 'nano', 'attentive', 'experiment', *system_names()} <= set(everywhere(ROWS)) and len(names) > 4
    listed = {row for groups in GROUPS.values() for rows in groups.values() for row in rows}
    assert listed <= set(everywhere(ROWS)) and {f'active_matter-{row}' for row in PAPER_TABLES['paper']} <= listed
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('THE_WELL_DATA_DIR', raising=False)
    for name in everywhere(ROWS):
        cell = cell_of(f'{name}-seed1')
        own, scored = settings_of(cell)
        assert (own['preset'], own['seed'], own['out']) == (cell.preset, 1, str(cell.run))
        same = name.rpartition('-at-noise')[0] or name                  # the run of another row, scored in another way
        assert cell.run.name == f'{same}-seed1'
        assert own['data_dir'] == {'paper': 'data', 'smoke': 'data/seed1-smoke', 'nano': 'data/seed1'}[cell.preset]
        settings, runs = parse('', evaluation.Settings, cell.evaluate[1:], runs=dict(nargs='*'))
        assert settings.split == 'test' and settings.data_dir == own['data_dir'] and runs == [own['out']]


def test_an_experiment_is_one_word(tmp_path, monkeypatch):
    """All its encoders see 76,800 windows; those of table 1, in other ways, or with fewer labels, a third of them."""
    monkeypatch.chdir(tmp_path)
    found = cells.find_cells(['other-ways', 'rayleigh_benard-jepa-nano'], Settings(seeds=2))
    assert len(found) == 2 * (2 * 9 + 1) and len({cell.name for cell in found}) == len(found)
    assert [cell.seed for cell in found] == [0] * 19 + [1] * 19
    some = everywhere(['jepa-nano-sigreg', 'vjepa-nano-block'], ('active_matter', 'shear_flow'))
    assert {cell.name for cell in found} >= {f'{row}-seed1' for row in some}
    shorter = report.OTHER_WAYS + everywhere(PAPER_TABLES['nano']) + everywhere(FEWER['nano'])
    for names, windows in (report.EXPERIMENT, 76800), (shorter, 25600):
        for name in names:
            own, _ = settings_of(cell_of(f'{name}-seed0'))
            assert own['batch'] * own['steps'] == windows and own['preset'] == 'nano', name
    for row, share in report.FEWER_LONGER.items():
        own, _ = settings_of(cell_of(f'active_matter-{row}-seed0'))
        assert own['supervised'] and own['label_fraction'] == share == int(row.rpartition('-')[2]) / 100
        assert ('infonce' in own['init'], own['steps'], own['lr']) == ((True, 800, 1e-3) if 'tuned' in row else (False, 2400, 3e-3))
    for row in GROUPS['nano']['noise']:
        own, scored = settings_of(cell_of(f'{row}-seed0'))
        assert scored['noise'] == 0.3 and own['noise'] == (0.0 if 'at-noise' in row else 0.3)
    rows = {name.partition('-')[2] for name in report.EXPERIMENT}
    assert {row for pair in report.COMPARED for row in pair[:2]} == rows and len(report.EXPERIMENT) == 3 * len(rows)
    assert settings_of(cell_of('active_matter-jepa-nano-short-supervised-5-seed0'))[0]['label_fraction'] == 0.05


@pytest.mark.parametrize('file', sorted((HERE / 'results/cells').glob('*-seed*.json')), ids=lambda file: file.stem)
def test_a_result_is_of_what_its_row_says(file, tmp_path, monkeypatch):
    """What the scripts are told now is what they were told then, but for what was not asked of them yet."""
    monkeypatch.chdir(tmp_path)
    assert why_stale(cell_of(file.stem), json.loads(file.read_text())) in (
        ('', ''), ('scoring', 'generalize , now labels,values,inputs'))
