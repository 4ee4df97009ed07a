"""plot.py: the experiment's picture, where systems have not the same rows. The others are drawn in test_house.py."""
import pytest

import plot


def row(*errors, **last_steps):
    return [({p: {'mean': e} for p in plot.PROBES}, {}, {'last_steps': last_steps}) for e in errors]


def test_targets_with_rows_missing():
    """Bars and strokes stand where their row's name does; a model keeps its colour, a system its line."""
    missed = dict(low=0.8, mid=0.9, high=1.0)
    found = {'active_matter': {'JEPA, vicreg': row(0.1, 0.2), 'JEPA: random init': row(0.4, 0.6),
                               'pixels': row(0.3, **missed), 'VideoMAE': row(0.5, **missed), 'field statistics': []},
             'shear_flow': {'VideoMAE': row(0.7, **missed), 'VideoMAE: random init': row(0.9)}}
    plot.targets(figure := plot.canvas(12, 5), found)
    active, shear, last = figure.axes
    assert [label.get_text() for label in active.get_yticklabels()] == ['JEPA, vicreg', 'pixels', 'VideoMAE']
    bars = {(round(bar.get_y() + bar.get_height() / 2), round(bar.get_width(), 3)) for bar in active.patches}
    assert bars == {(0, 0.15), (1, 0.3), (2, 0.5)} and {round(b.get_width(), 3) for b in shear.patches} == {0.7}
    assert all(1.6 < bar.get_y() for bar in shear.patches)
    strokes = [line.get_xdata()[0] for line in active.lines if line.get_color() == '#c0392b']
    assert strokes == pytest.approx([0.5] * 3)
    lines = {line.get_label(): line for line in last.lines if ',' in line.get_label()}
    assert {'pixels, active matter', 'VideoMAE, active matter', 'VideoMAE, shear flow'} <= lines.keys()
    assert lines['VideoMAE, active matter'].get_color() == lines['VideoMAE, shear flow'].get_color()
    assert lines['pixels, active matter'].get_color() != lines['VideoMAE, active matter'].get_color()
    assert lines['VideoMAE, active matter'].get_linestyle() != lines['VideoMAE, shear flow'].get_linestyle()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ['attentive', 'linear', 'knn', 'before training']
