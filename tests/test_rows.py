"""rows.py: that what is run is what pages show, that settings can be parsed, and that results are of their rows."""
import json

import pytest

import benchmark
import eval as evaluation
import report
from benchmark import Cell, Settings
from common import parse
from helpers import HERE
from rows import EXPERIMENT, FEWER, GROUPS, PAPER_TABLES, ROWS, everywhere
from systems import system_names


def cell_of(name):
    return Cell(name, Settings())


def test_every_table_is_made_of_rows(tmp_path, monkeypatch):
    """What the pages show, and what train.py and eval.py are told, exists."""
    names = set()
    monkeypatch.setattr(report, 'summary', lambda given, folder: names.update(given) or '')
    for kind in 'side_by_side', 'table_one', 'labels_table', 'carried_table', 'cost_table':
        monkeypatch.setattr(report, kind, lambda *args: names.update(v for v in args if isinstance(v, str)) or '')
    for page in report.PAGES:
        report.with_tables((HERE / page).read_text(), HERE / 'results')
    assert names - {'parameters', 'nano', *system_names()} <= set(everywhere(ROWS)) and len(names) > 4
    listed = {row for groups in GROUPS.values() for rows in groups.values() for row in rows}
    assert listed <= set(everywhere(ROWS)) and {f'active_matter-{row}' for row in PAPER_TABLES['paper']} <= listed
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('THE_WELL_DATA_DIR', raising=False)
    for name in everywhere(ROWS):
        cell = cell_of(f'{name}-seed1')
        own, scored = cell.settings()
        assert (own['preset'], own['seed'], own['out']) == (cell.preset, 1, f'rows/{name}-seed1')
        assert own['data_dir'] == {'paper': 'data', 'smoke': 'data/seed1-smoke', 'nano': 'data/seed1'}[cell.preset]
        settings, runs = parse('', evaluation.Settings, cell.evaluate[1:], runs=dict(nargs='*'))
        assert settings.split == 'test' and settings.data_dir == own['data_dir'] and runs == [own['out']]


def test_an_experiment_is_one_word(tmp_path, monkeypatch):
    """Its encoders, and those of table 1, see 25,600 windows each, whatever they are; so do those with fewer labels."""
    monkeypatch.chdir(tmp_path)
    cells = benchmark.named(['latents-or-pixels', 'rayleigh_benard-jepa-nano'], Settings(seeds=2))
    assert len(cells) == 2 * (2 * 12 + 1) and len({cell.name for cell in cells}) == len(cells)
    assert [cell.seed for cell in cells] == [0] * 25 + [1] * 25
    some = everywhere(['jepa-nano-paired', 'pixels-nano', 'vjepa-nano-block'], ('active_matter', 'shear_flow'))
    assert {cell.name for cell in cells} >= {f'{row}-seed1' for row in some}
    for name in EXPERIMENT + everywhere(PAPER_TABLES['nano']) + everywhere(FEWER['nano']):
        own, _ = cell_of(f'{name}-seed0').settings()
        assert own['batch'] * own['steps'] == 25600 and own['preset'] == 'nano', name
    assert cell_of('active_matter-jepa-nano-short-supervised-5-seed0').settings()[0]['label_fraction'] == 0.05


@pytest.mark.parametrize('file', sorted((HERE / 'results').glob('*-seed*.json')), ids=lambda file: file.stem)
def test_a_result_is_of_what_its_row_says(file, tmp_path, monkeypatch):
    """What the scripts are told now is what they were told then, but for what was not asked of them yet."""
    monkeypatch.chdir(tmp_path)
    assert cell_of(file.stem).why_stale(json.loads(file.read_text())) in (
        ('', ''), ('scoring', 'generalize False, now True'))
