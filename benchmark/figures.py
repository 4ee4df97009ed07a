"""
Pictures of the whole benchmark, made from results/ and from the datasets on disk.

    python figures.py                                     # all that can be drawn -> figures/
    python figures.py --embeddings FILE,FILE,FILE         # and what eval.py --save-embeddings kept, a row for each file

targets.png: errors by what was predicted; labels.png: by the share of labels; cost.png: by the compute of training;
systems.png: a run of each system; parameters.png: what their parameters change; embeddings.png. What cannot be drawn
yet is left out, and named.
"""
import itertools
from dataclasses import dataclass
from pathlib import Path

from common import data_folder, option, parse, script

import numpy as np
from matplotlib.ticker import LogLocator

import model as models
from data import find_dataset
from plot import (PROBES, STYLE, canvas, corners, embeddings, files_by_labels, limits, plt, read_embeddings,
                  read_example, save, show, values_of)
from report import HERE, costs, floor_of, label_curves, of_experiment, of_paper, ordered
from systems import system_names
from tables import SHARED

MODELS = ('#cc79a7', 'D'), ('#0072b2', 'o'), ('#009e73', 's'), ('#56b4e9', 'v'), ('#e69f00', '^'), ('#8c564b', 'P')
GREY, BEFORE = '#777777', '#c0392b'                                      # hand-made statistics, untrained encoders
ERROR = 'error on test (MSE, z-scored)'


@dataclass
class Settings:
    data_dir: str = option('', 'datasets (default: $THE_WELL_DATA_DIR, else data/seed0 if it is there, else data)',
                           'what')
    results: str = option('', 'folder with what benchmark.py kept (default: results/ beside this file)', 'what')
    out: str = option('figures', 'folder for the pictures', 'what')
    embeddings: str = option('', 'npz files of eval.py --save-embeddings, with commas between', 'what')


def style(title):
    """{color, marker} of a row: its model's, whatever else is in the picture; grey where there is no model."""
    names = [models.title(name) for name in models.model_names()]
    name = title.partition(',')[0].partition(':')[0]
    color, marker = MODELS[names.index(name) % len(MODELS)] if name in names else (GREY, 'x')
    return {'color': color, 'marker': marker}


def people(system):
    return system.replace('_', ' ')


def numbers(axis, low, high):
    """Plain numbers on a log axis from `low` to `high`: the fewer of each decade, the longer it is."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1, 3) if high < 3000 * low else (1,)))
    axis.set_major_formatter('{x:g}')
    axis.set_minor_formatter('')


def error_axis(ax, values, p='attentive'):
    """A log y axis for errors under a probe, all of which are in `values`."""
    low, high = min(values) / 1.6, max(values) * 1.6
    ax.set(yscale='log', ylabel=f'{ERROR},\n{p} probe', ylim=(low, high))
    numbers(ax.yaxis, low, high)


def common_legend(figure, axes, columns):
    """One legend for all panels, below them: each name once."""
    keys = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels())}
    figure.legend(keys.values(), keys, loc='outside lower center', ncols=min(1 + columns, len(keys)))


# ---------------------------------------------------------------------------------------------
# from results/

def targets(figure, found):
    """Errors by what an encoder was trained to predict, a panel for each system, and what was missed at each scale.

    found: {system: {title: [(errors, errors by run, of the run) of each seed]}}, of report.of_experiment. A dot is a
    seed, a bar their mean, a red stroke the same encoder before training.
    """
    *panels, last = figure.subplots(1, len(found) + 1, width_ratios=[*[2] * len(found), 1.2])
    titles = [t for t in dict.fromkeys(t for rows in found.values() for t in rows)
              if t not in SHARED and not t.endswith('random init')]
    errors = lambda found, p: [e[p]['mean'] for e, _, _ in found]
    for ax, (system, rows) in zip(panels, found.items()):
        for (i, title), (j, p) in itertools.product(enumerate(titles), enumerate(PROBES)):
            y, seeds = i + 0.25 * (j - 1), errors(rows.get(title, []), p)
            if seeds:
                ax.barh(y, np.mean(seeds), 0.22, color=PROBES[p])
                ax.plot(seeds, [y] * len(seeds), '.', ms=4, color='#222222')
                if before := errors(floor_of(title, rows), p):
                    ax.plot([np.mean(before)] * 2, [y - 0.12, y + 0.12], color=BEFORE, lw=1.5)
        ax.set(title=people(system), yticks=range(len(titles)), ylim=(len(titles) - 0.4, -0.6),
               yticklabels=titles if ax is panels[0] else [], xlabel=ERROR)
        ax.grid(axis='x')
        ax.grid(False, axis='y')
    bands = 'low', 'mid', 'high'
    for (system, rows), line in zip(found.items(), itertools.cycle(('-', '--', ':'))):
        for title in titles:
            ends = [run['last_steps'] for _, _, run in rows.get(title, []) if 'low' in run.get('last_steps', {})]
            if ends:
                last.plot(bands, [np.mean([end[b] for end in ends]) for b in bands], ls=line, ms=5, **style(title),
                          label=f'{title}, {people(system)}')
    last.axhline(1, color='#444444', lw=0.8, ls='--')
    last.set(title='Share of the target not predicted', xlabel='spatial scale', ylim=(0, None), xticks=range(3),
             xticklabels=['> 8 px', '4 to 8', '< 4 px'])
    if last.get_legend_handles_labels()[0]:
        last.legend(fontsize=8)
    keys = [plt.Rectangle((0, 0), 1, 1, color=color) for color in PROBES.values()]
    figure.legend([*keys, plt.Line2D([], [], color=BEFORE)], [*PROBES, 'before training'],
                  loc='outside lower center', ncols=4)


def labels(figure, found):
    """Error by the share of the training runs whose labels the probe had: means over seeds, and how these spread.

    found: {system: what report.label_curves gives}. A row for each of two probes; what is no encoder has one, and is in
    both. Bands are a standard deviation wide, of the logarithm: on this axis, that of the errors would often reach down
    to nothing. Dashed: the encoder saw these labels, and no more.
    """
    probes, means = ('attentive', 'linear'), [1]
    axes = figure.subplots(2, len(found), sharex='col', sharey=True, squeeze=False)
    for ax, (p, curves) in zip(axes.flat, itertools.product(probes, found.values())):
        own = {title: by for (title, of), by in curves.items() if of == ('linear' if title in SHARED else p)}
        for title, by in own.items():
            mean = np.array([np.mean(by[share]) for share in sorted(by)])
            spread = np.exp([np.std(np.log(by[share]), ddof=len(by[share]) > 1) for share in sorted(by)])
            look = {'ms': 5, 'lw': 1.6} | style(title) | line_of(title)
            ax.plot(sorted(by), mean, label=title + ' (linear)' * (title in SHARED), **look)
            ax.fill_between(sorted(by), mean / spread, mean * spread, color=look['color'], alpha=0.15, lw=0)
            means += list(mean)
        ax.axhline(1, color='#444444', lw=0.8, ls='--', label='guessing the mean')
        shares = sorted({share for by in curves.values() for share in by})
        ax.set_xscale('log')
        ax.set_xticks(shares, [f'{share:.0%}' for share in shares])
        ax.set_xticks([], minor=True)
    for top, bottom, system in zip(*axes, found):
        top.set_title(people(system))
        bottom.set_xlabel('training runs with labels')
    for ax, p in zip(axes[:, 0], probes):
        error_axis(ax, means, p)
    common_legend(figure, axes.flat, len(found))


def line_of(title):
    """How the line of a row is drawn: hollow and dashed for an encoder that has seen labels, dotted without one."""
    if 'random init' in title:
        return {'ls': (0, (1, 3)), 'ms': 3, 'lw': 1}
    return {'ls': '--', 'mfc': 'white'} if 'supervised' in title else {'ls': ':' if title in SHARED else '-'}


def cost(figure, found, paid):
    """Error by the compute of training, a marker for each seed; lines: what labels, and a physicist, would give.

    found: {system: {title: [(errors, ..) of each seed]}}, of report.of_paper; paid: report.costs. TFLOP: forward and
    backward passes of all windows seen. A red stroke is the same encoder before training.
    """
    axes, values, spent = figure.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0], [], []
    for ax, (system, rows) in zip(axes, found.items()):
        tflop = {title: what['gflop'] * what['windows'] / 1e3 for title, what in paid[system].items()}
        errors = {(t, p): [e[p]['mean'] for e, _, _ in rows[t] if p in e] for t in rows for p in PROBES}
        lines, spent = [], spent + list(tflop.values())
        for title in (t for t in ordered({system: rows}) if t in tflop and errors[t, 'attentive']):
            seeds = errors[title, 'attentive']
            before = [e['attentive']['mean'] for e, _, _ in floor_of(title, rows)]
            values += seeds + before
            if 'supervised' in title:
                lines.append((title, np.mean(seeds), style(title)['color']))
                continue
            ax.plot([tflop[title]] * len(seeds), seeds, ls='', ms=7, mec='white', mew=0.6, label=title, **style(title))
            if before:
                ax.plot(tflop[title], np.mean(before), '_', ms=16, mew=2, color=BEFORE, zorder=1.5)
        lines += [(f'{t} (linear)', np.mean(errors[t, 'linear']), GREY) for t in SHARED if errors.get((t, 'linear'))]
        ax.plot([], [], '_', ms=16, mew=2, color=BEFORE, label='before training')
        for name, level, color in lines:
            ax.axhline(level, color=color, lw=1.3, ls='--' if color != GREY else ':', label=name)
        values += [level for _, level, _ in lines]
        ax.set(title=people(system), xlabel='TFLOP of training', xscale='log')
    axes[0].set_xlim(min(spent) / 2, max(spent) * 2)
    numbers(axes[0].xaxis, *axes[0].get_xlim())
    error_axis(axes[0], values)
    common_legend(figure, axes, len(found))


# ---------------------------------------------------------------------------------------------
# from the datasets

def fields(figure, rows):
    """Frames side by side. rows: [(what stands left, x (nx,), y (ny,), [(above, below, frame (nx, ny), (low, high))])].

    low, high: of the colours.
    """
    tall = [np.clip(np.ptp(y) / np.ptp(x), 0.25, 1) for _, x, y, _ in rows]
    axes = figure.subplots(len(rows), max(len(row[-1]) for row in rows), height_ratios=tall, squeeze=False)
    for row, (left, x, y, frames) in zip(axes, rows):
        for ax, (above, below, frame, colors) in zip(row, frames):
            show(ax, x, y, frame, *colors)
            ax.set_title(above, pad=4)
            ax.set_xlabel(below, labelpad=3)
        row[0].set_ylabel(left, rotation=0, ha='right', va='center')
        for ax in row[len(frames):]:
            ax.set_axis_off()


def span(low, high):
    """A range in words, to two digits of its width."""
    digits = 1 - int(np.floor(np.log10(max(high - low, 1e-30))))
    return ' to '.join(f'{round(float(v), digits) + 0.0:g}' for v in (low, high))                # + 0: no -0


def trajectory(name, system, root, columns=5):
    """A row of `fields`: a test run at the largest parameters, in the same colours at all times."""
    found, names = files_by_labels(root)
    pair = corners(found)[-1]
    shown, field, time, x, y = read_example(found[pair], system.picture)
    picked = np.linspace(0, len(shown) - 1, columns + 1).round().astype(int)[1:]           # t = 0 is dull
    colors = limits(shown[picked], field)
    left = f'{people(name)}\n{field}\n{values_of(system, names, pair)}'
    return left, x, y, [(f't = {time[i]:.3g}', '', shown[i], colors) for i in picked]


def extremes(name, system, root, late=0.75):
    """A row of `fields`: a frame of a test run at each pair of smallest and largest parameters, in its own colours."""
    found, names = files_by_labels(root)
    frames = []
    for pair in corners(found):
        shown, field, time, x, y = read_example(found[pair], system.picture)
        i = round(late * (len(shown) - 1))
        colors = limits(shown[i], field)
        frames.append((values_of(system, names, pair, ', '), span(*colors), shown[i], colors))
    return f'{people(name)}\n{field}\nt = {time[i]:.3g}', x, y, frames


# ---------------------------------------------------------------------------------------------
# each picture: what it is made from -> (figure, what is not in it); ValueError says why there is none

def draw_targets(args, folder):
    if not (found := of_experiment(folder)):
        raise ValueError('no results: python benchmark.py latents-or-pixels')
    targets(figure := canvas(12, 5), found)
    return figure, []


def draw_labels(args, folder):
    found = {system: label_curves(system, folder) for system in system_names()}
    found = {system: curves if any(len(by) > 1 for by in curves.values()) else {} for system, curves in found.items()}
    return panels(labels, found, 'no errors by share of labels: python benchmark.py paper-tables fewer-labels', 7.2)


def draw_cost(args, folder):
    rows, paid = of_paper('nano', folder), costs(folder)
    found = {system: rows[system] if paid.get(system) else {} for system in system_names()}
    return panels(lambda figure, found: cost(figure, found, paid), found, 'no costs: python benchmark.py paper-tables')


def panels(draw, found, why, height=4.4):
    """(figure, systems that are not in it) of a column for each system of which something was found."""
    shown = {system: rows for system, rows in found.items() if rows}
    if not shown:
        raise ValueError(why)
    draw(figure := canvas(max(5.6, 1.2 + 3.2 * len(shown)), height), shown)
    return figure, [people(system) for system in found if system not in shown]


def draw_fields(row, width, height):
    """The function that draws a row of each system whose dataset is on disk. width, height: inches, of all."""
    def draw(args, folder):
        where = data_folder(args.data_dir, 'data/seed0' if Path('data/seed0').exists() else '')
        rows, absent = [], []
        for name in system_names():
            root, system, _ = find_dataset(name, where)
            if any(root.glob('data/test/*.h*5')):
                rows.append(row(name, system, root))
            else:
                absent.append(people(name))
        if not rows:
            raise ValueError(f'no dataset in {where}')
        fields(figure := canvas(width, height * len(rows) / len(system_names())), rows)
        return figure, absent
    return draw


def draw_embeddings(args, folder):
    kept = [read_embeddings(Path(path)) for path in args.embeddings.split(',')]
    widest = max(len(arrays['label_names']) for arrays, _ in kept)
    figure = canvas(5 * widest, 3.6 * len(kept))
    for part, (arrays, system) in zip(np.atleast_1d(figure.subfigures(len(kept), 1)), kept):
        embeddings(part, arrays, system)
    return figure, []


PICTURES = {'targets': draw_targets, 'labels': draw_labels, 'cost': draw_cost,
            'systems': draw_fields(trajectory, 9.6, 4.4), 'parameters': draw_fields(extremes, 9.2, 5.6)}


@script
def main(argv=None):
    args, = parse(__doc__, Settings, argv)
    folder, out, left_out = Path(args.results or HERE / 'results'), Path(args.out), []
    if not any(folder.glob('*-seed[0-9]*.json')):
        raise ValueError(f'no results in {folder}: python benchmark.py makes them')
    out.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(STYLE | {'font.size': 10, 'axes.titlesize': 10})
    pictures = PICTURES | ({'embeddings': draw_embeddings} if args.embeddings else {})
    for name, draw in pictures.items():
        try:
            figure, absent = draw(args, folder)
        except ValueError as e:
            left_out.append(f'{name}.png ({e})')
            continue
        save(figure, out / f'{name}.png')
        left_out += [f'{", ".join(absent)} in {name}.png'] if absent else []
    if left_out:
        print('left out: ' + '; '.join(left_out))


if __name__ == '__main__':
    main()
