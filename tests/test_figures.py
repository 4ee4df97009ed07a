"""figures.py: pictures say what the tables say, and are drawn without the cells and datasets that are not there."""
import json

import numpy as np
import pytest

import plot
from benchmark import figures, report
from benchmark.report import read_cells
from helpers import HERE, files_of, make_published, refused
from systems import find_system
from test_report import result

BENCHMARK = {'jepa-nano-vicreg': 'JEPA', 'jepa-nano-next': 'JEPA', 'disco-nano': 'DISCO', 'jepa-nano-short-supervised': 'JEPA, supervised'}
SHARES = {0.1: 3.0, 0.5: 2.0, 1.0: 1.0}                                  # and the error there, in units of the last


def put(folder, system, row, error, seed, **changes):
    """A cell: errors fall with labels as SHARES says; its random weights have twice the error."""
    title = BENCHMARK[row]
    r = result(error, seed, title, system=system, parameters={'encoder': 9}, cost={'gflop_per_window': 0.5 + len(row)})
    r['run'] |= {'windows_seen': 4000, 'train_seconds': 60.0, 'memory_gb': 1.0}
    for key in 'rows', 'by_run':                                         # its encoder's, with labels or without
        r[key]['random init'] = result(0.2 + 0.1 * seed, seed)[key]['random init']
    curve = lambda e, probes: {'labels': {f'{share:g}': {p: e * k for p in probes} for share, k in SHARES.items()}}
    r['generalization'] = {title: curve(error, plot.PROBES), 'random init': curve(0.5, ('linear', 'knn')),
                           'field statistics': curve(0.01 * (seed + 1), ('linear',))}
    (folder / f'{system}-{row}-seed{seed}.json').write_text(json.dumps(r | changes))


@pytest.fixture
def folder(tmp_path):
    """Results of two systems, one of them without one of the models, two seeds; the third system has none."""
    (tmp_path / 'results').mkdir()
    for seed in 0, 1:
        put(tmp_path / 'results', 'active_matter', 'jepa-nano-vicreg', 0.1 * (1 + seed), seed)
        put(tmp_path / 'results', 'active_matter', 'disco-nano', 0.3, seed)
        put(tmp_path / 'results', 'shear_flow', 'disco-nano', 0.4, seed)
        put(tmp_path / 'results', 'shear_flow', 'jepa-nano-short-supervised', 0.05 * (1 + seed), seed)
    put(tmp_path / 'results', 'shear_flow', 'jepa-nano-short-supervised', 0.05, 0, generalization={})
    r = json.loads((tmp_path / 'results/shear_flow-jepa-nano-short-supervised-seed0.json').read_text())
    r['rows']['JEPA, supervised'] = result(0.2, 0)['rows']['JEPA']
    (tmp_path / 'results/shear_flow-jepa-nano-short-supervised-10-seed0.json').write_text(json.dumps(r))
    return tmp_path / 'results'


def lines_of(ax):
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith('_')}


def test_the_curves_are_those_of_the_table(folder):
    """A row for each probe, the statistics' linear one in both; bands of one std of the logarithm."""
    figure, absent = figures.draw_labels(None, read_cells(folder))
    both, untrained = ['field statistics (linear)', 'guessing the mean'], ['DISCO: random init']
    titles = {('active_matter', 'attentive'): ['JEPA', 'DISCO'],
              ('shear_flow', 'attentive'): ['DISCO', 'JEPA, supervised, from scratch', 'JEPA: random init'],
              ('active_matter', 'linear'): ['JEPA', 'DISCO', 'JEPA: random init', *untrained],
              ('shear_flow', 'linear'): ['DISCO', 'JEPA, supervised, from scratch', 'JEPA: random init', *untrained]}
    assert absent == ['rayleigh benard'] and len(figure.axes) == len(titles)
    for ax, ((system, p), own) in zip(figure.axes, titles.items()):
        assert ax.get_title() == system.replace('_', ' ') * (p == 'attentive')
        assert p in ax.get_ylabel() or system == 'shear_flow'
        curves, lines = report.label_curves(read_cells(folder), system), lines_of(ax)
        assert sorted(lines) == sorted(own + both)
        for title in own + both[:1]:
            by = curves[title.removesuffix(' (linear)'), 'linear' if '(' in title else p]
            x, y = lines[title].get_data()
            assert list(x) == sorted(by) and list(y) == pytest.approx([np.mean(by[share]) for share in sorted(by)])
    band = figure.axes[0].collections[0].get_paths()[0].vertices         # JEPA: 0.1 and 0.2, a factor of 2 apart
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.15 / 2**0.5**0.5, 3 * 0.15 * 2**0.5**0.5))


def test_a_model_has_one_colour(folder):
    found = [lines_of(ax) for ax in figures.draw_labels(None, read_cells(folder))[0].axes]
    colors = {name: {lines[name].get_color() for lines in found if name in lines} for name in ('JEPA', 'DISCO')}
    assert all(len(own) == 1 for own in colors.values()) and colors['JEPA'] != colors['DISCO']
    name = 'JEPA, supervised, from scratch'
    assert {lines[name].get_color() for lines in found if name in lines} == colors['JEPA']


def rows(by_title):
    """Records of {title: [error of each seed, ..]}."""
    return {title: {(seed,): {'error': {'mean': dict.fromkeys(plot.PROBES, e)}} for seed, e in enumerate(errors)}
            for title, errors in by_title.items()}


def test_targets_with_rows_missing(monkeypatch):
    """Bars and strokes stand where their row's name does."""
    found = {'active_matter': rows({'JEPA, vicreg': [0.1, 0.2], 'JEPA: random init': [0.4, 0.6],
                                    'pixels': [0.3], 'VideoMAE': [0.5]}),
             'shear_flow': rows({'VideoMAE': [0.7], 'VideoMAE: random init': [0.9]})}
    monkeypatch.setattr(figures, 'read_records', lambda *_: found)
    figure, _ = figures.draw_targets(None, {})
    active, shear = figure.axes
    assert [label.get_text() for label in active.get_yticklabels()] == ['JEPA, vicreg', 'pixels', 'VideoMAE']
    bars = {(round(bar.get_y() + bar.get_height() / 2), round(bar.get_width(), 3)) for bar in active.patches}
    assert bars == {(0, 0.15), (1, 0.3), (2, 0.5)} and {round(b.get_width(), 3) for b in shear.patches} == {0.7}
    assert all(1.6 < bar.get_y() for bar in shear.patches)
    strokes = [line.get_xdata()[0] for line in active.lines if line.get_color() == figures.BEFORE]
    assert strokes == pytest.approx([0.5] * 3)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ['attentive', 'linear', 'knn', 'before training']


def test_corners():
    """Smallest and largest of each parameter, of those that are there; else the first files."""
    grid = {(a, z): f'{a} {z}' for a in (-2.0, -1.0, -3.0) for z in (5.0, 1.0, 9.0)}
    assert plot.corners(grid) == [(-3.0, 1.0), (-3.0, 9.0), (-1.0, 1.0), (-1.0, 9.0)]
    del grid[-3.0, 9.0]
    assert plot.corners(grid) == [(-3.0, 1.0), (-1.0, 1.0), (-1.0, 9.0)]
    assert plot.corners({(1.0, 2.0): '', (2.0, 1.0): '', (3.0, 3.0): ''}) == [(3.0, 3.0)]
    assert plot.corners({(1.0, 2.0): '', (2.0, 1.0): ''}) == [(1.0, 2.0), (2.0, 1.0)]


def test_runs_are_shown_at_the_values_they_are_labelled_with(tmp_path, monkeypatch):
    root, system = make_published(tmp_path), find_system('active_matter')
    drawn = []
    monkeypatch.setattr(figures, 'show', lambda ax, x, y, frame, *colors: drawn.append((len(x), len(y), frame, colors)))
    figure, absent = figures.draw_systems(figures.Settings(data_dir=str(tmp_path)), {})
    path = next(path for path in files_of(root, 'test') if 'alpha_-1.0' in path.name)
    shown, _, _, _, _ = plot.read_example(path, system.picture)
    assert figure.axes[0].get_ylabel() == 'active matter\n|velocity|\nα = -1' and drawn[0][:2] == (16, 16)
    assert [ax.get_title() for ax in figure.axes] == ['t = 8', 't = 16', 't = 23', 't = 31', 't = 39']
    assert all(np.array_equal(frame, shown[t]) for (_, _, frame, _), t in zip(drawn, (8, 16, 23, 31, 39)))
    assert len({colors for *_, colors in drawn}) == 1 and absent == ['rayleigh benard', 'shear flow']


def test_what_is_left_out_is_said(folder, tmp_path, capsys, monkeypatch):
    """In one line, and all else is drawn."""
    monkeypatch.setenv('THE_WELL_DATA_DIR', '')
    monkeypatch.chdir(tmp_path)
    make_published(tmp_path / 'data' / 'seed0')
    put(folder, 'active_matter', 'jepa-nano-next', 0.3, 0)
    figures.main(['--results', str(folder)])
    *saved, left_out = capsys.readouterr().out.splitlines()
    drawn = {path.name for path in (tmp_path / 'figures').iterdir()}
    assert drawn == {f'{name}.png' for name in ('targets', 'labels', 'systems')}
    assert len(saved) == len(drawn) and left_out.startswith('left out: rayleigh benard in labels.png; ')
    assert 'rayleigh benard, shear flow in systems.png' in left_out
    for file in folder.glob('*jepa*'):
        file.unlink()
    for file in folder.glob('*.json'):
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items()
                                    if k not in ('generalization', 'cost')}))
    figures.main(['--results', str(folder), '--data-dir', 'nowhere', '--out', 'few'])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and all(f'{name}.png (' in said[0] for name in figures.PICTURES)


def test_without_any_results(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(HERE))
    assert not refused(['-m', 'benchmark.figures'], '--results', tmp_path, cwd=tmp_path,
                       words=['no results', 'benchmark.cells'])
