"""
Pictures of the whole benchmark, made from results/cells/ and from the datasets on disk.

    python -m benchmark.figures             # all that can be drawn -> figures/

targets.png: errors by what was predicted; labels.png: by the share of labels, of the older
tables with --results results/older; systems.png: a run of each system. What is left out is named.
"""
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from common import data_folder, option, parse, script
import numpy as np
from matplotlib.ticker import LogLocator

import model as models
from benchmark.report import (EXPERIMENT, HERE, errors_of, floor_of, label_curves, read_cells,
                              read_records)
from data import find_dataset
from eval import SHARED
from plot import (PROBES, STYLE, canvas, corners, files_by_labels, limits, plt, read_example, save,
                  show, values_of)
from systems import system_names
from systems.datasets import well_files

LOOKS = (('#cc79a7', 'D'), ('#0072b2', 'o'), ('#009e73', 's'), ('#56b4e9', 'v'), ('#e69f00', '^'),
         ('#8c564b', 'P'))                  # of the models, by name
BEFORE = '#c0392b'                          # untrained encoders
ERROR = 'error on test (MSE, z-scored)'

@dataclass
class Settings:
    data_dir: str = option('', 'default: $THE_WELL_DATA_DIR, else data/seed0 or data', 'what')
    results: str = option('', "folder of the benchmark's results (default: results/cells)", 'what')
    out: str = option('figures', 'folder for the pictures', 'what')

def style_of(title):
    """{color, marker} of a row: its model's in every picture; grey where there is no model."""
    model = title.partition(',')[0].partition(':')[0]
    found = {models.title(name): look for name, look in zip(sorted(models.MODELS), LOOKS)}
    return dict(zip(('color', 'marker'), found.get(model, ('#777777', 'x'))))

def in_words(system):
    return system.replace('_', ' ')

def draw_targets(args, cells):
    """Errors by what an encoder was trained to predict.

    A dot is a seed, a bar their mean, a red stroke the encoder before training.
    """
    found = read_records(cells, EXPERIMENT)
    if not found:
        raise ValueError('no results: python -m benchmark.cells experiment')
    figure = canvas(12, 5)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    titles = [title for title in dict.fromkeys(t for records in found.values() for t in records)
              if any(errors_of(records, title, 'attentive') for records in found.values())
              and 'random init' not in title]

    for ax, (system, records) in zip(panels, found.items()):
        for (i, title), (j, p) in product(enumerate(titles), enumerate(PROBES)):
            y, errors = i + 0.25 * (j - 1), errors_of(records, title, p)
            before = errors_of(records, floor_of(title, records), p)     # training
            if errors:
                ax.barh(y, np.mean(errors), 0.22, color=PROBES[p])
                ax.plot(errors, [y] * len(errors), '.', ms=4, color='#222222')
            if errors and before:
                ax.plot([np.mean(before)] * 2, [y - 0.12, y + 0.12], color=BEFORE, lw=1.5)

        ax.set(title=in_words(system), yticks=range(len(titles)), ylim=(len(titles) - 0.4, -0.6),
               yticklabels=titles if ax is panels[0] else [], xlabel=ERROR)
        ax.grid(axis='x')
        ax.grid(False, axis='y')

    keys = [plt.Rectangle((0, 0), 1, 1, color=color) for color in PROBES.values()]
    figure.legend([*keys, plt.Line2D([], [], color=BEFORE)], [*PROBES, 'before training'],
                  loc='outside lower center', ncols=4)
    return figure, []

def draw_labels(args, cells):
    """Error by the share of the runs whose labels the probe had, or, dashed, probe and encoder.

    Bands: a standard deviation of the logarithm over seeds.
    """
    found = {system: label_curves(cells, system) for system in system_names()}
    found = {system: curves for system, curves in found.items()
             if any(len(curve) > 1 for curve in curves.values())}
    if not found:
        raise ValueError('no errors by share of labels: '
                         'python -m benchmark.cells paper-tables fewer-labels')

    figure, means = canvas(max(5.6, 1.2 + 3.2 * len(found)), 7.2), [1]
    axes = figure.subplots(2, len(found), sharex='col', sharey=True, squeeze=False)
    panels = product(('attentive', 'linear'), found.items())
    for ax, (p, (system, curves)) in zip(axes.flat, panels):
        # the statistics have no attentive probe: the linear one stands in both rows
        for (title, of), curve in curves.items():
            if of != ('linear' if title in SHARED else p):
                continue
            shares = sorted(curve)
            mean = np.array([np.mean(curve[share]) for share in shares])
            spread = [np.std(np.log(curve[s]), ddof=len(curve[s]) > 1) for s in shares]

            # dotted and small: random weights; hollow: the encoder has seen labels
            look = {'ms': 5, 'lw': 1.6, 'ls': ':' if title in SHARED else '-'} | style_of(title)
            if 'random init' in title:
                look |= {'ls': (0, (1, 3)), 'ms': 3, 'lw': 1}
            elif 'supervised' in title:
                look |= {'ls': '--', 'mfc': 'white'}

            ax.plot(shares, mean, label=title + (' (linear)' if title in SHARED else ''), **look)
            band = mean / np.exp(spread), mean * np.exp(spread)
            ax.fill_between(shares, *band, color=look['color'], alpha=0.15, lw=0)
            means += list(mean)

        # what stands around a panel
        ax.axhline(1, color='#444444', lw=0.8, ls='--', label='guessing the mean')
        ticks = sorted({share for curve in curves.values() for share in curve})
        ax.set_xscale('log')
        ax.set_xticks(ticks, [f'{share:.0%}' for share in ticks])
        ax.set_xticks([], minor=True)
        ax.set(**{'title': in_words(system)} if p == 'attentive' else
               {'xlabel': 'training runs with labels'})

    # the shared axis; fewer numbers in a decade, the longer it is
    low, high = min(means) / 1.6, max(means) * 1.6
    digits = (1, 2, 5) if high < 30 * low else (1, 3) if high < 3000 * low else (1,)
    for ax, p in zip(axes[:, 0], ('attentive', 'linear')):
        ax.set(yscale='log', ylabel=f'{ERROR},\n{p} probe', ylim=(low, high))
        ax.yaxis.set_major_locator(LogLocator(subs=digits))
        ax.yaxis.set_major_formatter('{x:g}')
        ax.yaxis.set_minor_formatter('')

    # one legend for all panels
    keys = {name: key for ax in axes.flat for key, name in zip(*ax.get_legend_handles_labels())}
    figure.legend(keys.values(), keys, loc='outside lower center',
                  ncols=min(1 + len(found), len(keys)))
    return figure, [in_words(system) for system in system_names() if system not in found]

def draw_systems(args, cells, columns=5):
    """A test run of each system whose dataset is on disk, at its largest parameters."""
    folder = data_folder(args.data_dir, 'data/seed0' if Path('data/seed0').exists() else '')
    found = {name: find_dataset(name, folder, missing=True)[:2] for name in system_names()}
    there = {name: place for name, place in found.items() if well_files(place[0], 'test')}
    if not there:
        raise ValueError(f'no dataset in {folder}')

    # a row for each: its runs, and how tall it is
    rows = []
    for name, (root, system) in there.items():
        files, names = files_by_labels(root)
        pair = corners(files)[-1]
        left = f'{in_words(name)}\n{{}}\n{values_of(system, names, pair)}'
        rows.append((left, *read_example(files[pair], system.picture)))
    tall = [np.clip(np.ptp(y) / np.ptp(x), 0.25, 1) for *_, x, y in rows]

    # frames in the same colours at all times
    figure = canvas(9.6, 4.4 * len(rows) / len(found))
    axes = figure.subplots(len(rows), columns, height_ratios=tall, squeeze=False)
    for row, (left, shown, field, time, x, y) in zip(axes, rows):
        picked = np.linspace(0, len(shown) - 1, columns + 1).round().astype(int)[1:]     # t > 0
        colors = limits(shown[picked], field)
        for ax, i in zip(row, picked):
            show(ax, x, y, shown[i], *colors)
            ax.set_title(f't = {time[i]:.3g}', pad=4)
        row[0].set_ylabel(left.format(field), rotation=0, ha='right', va='center')
    return figure, [in_words(name) for name in found if name not in there]

# (args, cells) -> (figure, what is not in it)
PICTURES = {'targets': draw_targets, 'labels': draw_labels, 'systems': draw_systems}

@script
def main(argv=None):
    args, = parse(__doc__, Settings, argv)
    folder, out, left_out = Path(args.results or HERE / 'results' / 'cells'), Path(args.out), []
    cells = read_cells(folder)
    if not cells:
        raise ValueError(f'no results in {folder}: python -m benchmark.cells makes them')
    out.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(STYLE | {'font.size': 10, 'axes.titlesize': 10})

    for name, draw in PICTURES.items():
        try:
            figure, absent = draw(args, cells)
            save(figure, out / f'{name}.png')
            left_out += [f'{", ".join(absent)} in {name}.png'] if absent else []
        # the others are drawn
        except ValueError as e:
            left_out.append(f'{name}.png ({e})')
    if left_out:
        print('left out: ' + '; '.join(left_out))

if __name__ == '__main__':
    main()
