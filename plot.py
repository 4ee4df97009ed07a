"""
Pictures of the data, a training run and its error table.

    python plot.py                      # the newest run under out/ -> figures/
    python plot.py out/... out/...      # of the first run, but with the errors of all

Writes examples.png (fields of the test split), training.png (log.jsonl), errors.png (eval.json).
"""
import io
import itertools
from dataclasses import dataclass
from pathlib import Path

from common import data_folder, option, parse, script, write_bytes
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator
from PIL import Image                                                   # comes with matplotlib

import model as models
from data import coordinates, find_dataset, open_well_file
from eval import CLOCKS, PUBLISHED_ROW, checkpoints, log_lines, merge_rows, read_result
from systems.datasets import well_files

plt.switch_backend('Agg')                                               # no window
PROBES = {'attentive': '#3b528b', 'linear': '#21918c', 'knn': '#a0c93a'}
STYLE = {'font.size': 9, 'axes.titlesize': 9, 'axes.spines.top': False, 'axes.spines.right': False,
         'axes.grid': True, 'axes.grid.axis': 'y', 'grid.color': '#e6e6e6', 'axes.axisbelow': True,
         'legend.frameon': False}

@dataclass
class Settings:
    data_dir: str = option('', 'datasets (default: $THE_WELL_DATA_DIR, else data)', 'what')
    out: str = option('figures', 'folder for the pictures', 'what')

def read_example(path, picture):
    """(fields (T, nx, ny), name, time, x, y) of run 0: the magnitude of `picture`, or channel 0."""
    f, channels, _, shape = open_well_file(path)
    with f:
        names = [n for n in picture if n in channels] or list(channels)[:1]
        shown = [field.read(0)[..., k] for field, k in map(channels.get, names)]
        at = [coordinates(f, axis, shape) for axis in range(3)]
    if len(names) == 1:
        return shown[0], names[0].replace('_', ' '), *at
    name = names[0].rpartition('_')[0].replace('_', ' ')
    return np.sqrt(sum(np.square(v) for v in shown)), f'|{name}|', *at

def files_by_labels(root, labels=()):
    """({values of two labels: path} of test, the two: of `labels`, else of scalars that vary)."""
    scalars = {}
    for path in well_files(root, 'test'):
        f, _, values, _ = open_well_file(path)
        f.close()
        scalars[path] = {name: of_runs[0] for name, of_runs in values.items()}
    if not scalars:
        raise ValueError(f'{root} has no files in its test split')
    varying = (n for n in scalars[path] if len({s[n] for s in scalars.values()}) > 1)
    labels = list(labels or varying)[:2]
    return {tuple(s[name] for name in labels): path for path, s in scalars.items()}, labels

def corners(files):
    """The pairs of smallest and largest values among the keys of `files`; else the first four."""
    pairs = itertools.product(*((min(values), max(values)) for values in zip(*files)))
    return [pair for pair in dict.fromkeys(pairs) if pair in files] or list(files)[:4]

def limits(shown, name):
    """(low, high) of the colours of fields with this name. A magnitude begins at zero."""
    return (0, np.quantile(shown, 0.998)) if name.startswith('|') else (shown.min(), shown.max())

def show(ax, x, y, frame, low, high):
    """Draw a field (nx, ny) at x (nx,), y (ny,), without axes."""
    ax.pcolormesh(x, y, frame.T, cmap='magma', vmin=low, vmax=high, shading='gouraud')
    ax.set(xticks=[], yticks=[], aspect='equal')
    ax.grid(False)
    ax.spines[:].set_visible(False)

def values_of(system, labels, values, between='\n'):
    """Labels of the files and their values, in words: α = -1, ζ = 17."""
    named = zip(map(system.name_of, labels), values)
    return between.join(f'{system.symbols.get(n, n)} = {v:g}' for n, v in named)

def examples(figure, root, system, labels, columns):
    """A row of frames for each pair of smallest and largest parameters of the test split."""
    files, labels = files_by_labels(root, labels)
    axes = figure.subplots(len(corners(files)), columns, squeeze=False)
    for row, pair in zip(axes, corners(files)):
        shown, name, time, x, y = read_example(files[pair], system.picture)
        frames = np.linspace(0, len(shown) - 1, columns + 1).round().astype(int)[1:]    # not t = 0
        colors = limits(shown[frames] if name.startswith('|') else shown, name)
        for ax, frame in zip(row, frames):
            show(ax, x, y, shown[frame], *colors)
            ax.set_title(f't = {time[frame]:g}' if ax in axes[0] else '', pad=4)
        row[0].set_ylabel(values_of(system, labels, pair), rotation=0, ha='right', va='center')
    figure.suptitle(f'{name[:1].upper()}{name[1:]}, each row on its own scale', fontsize=10)

def training(figure, path):
    """Loss, its terms, std and rank of the embedding, and learning rate, by step."""
    log = log_lines(path, 0)
    spread = ['embedding_std', 'embedding_rank']
    probed = list(dict.fromkeys(key for line in log for key in line if key.startswith('probe_')))
    terms = [key for key in log[-1] if key not in {*CLOCKS, 'loss', *probed}
             and not key.startswith('embedding_')]
    panels = {'Loss': ['loss'], 'Its terms, unweighted': terms, 'Embedding': spread,
              'Learning rate': ['lr']} | ({'Ridge probe on valid': probed} if probed else {})

    for ax, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items()):
        for key, color in zip(keys, itertools.cycle(PROBES.values())):
            lines = [line for line in log if key in line]               # that have it
            values = [[line[k] for line in lines] for k in ('step', key)]
            ax.plot(*values, color=color, lw=1.2, label=key)
        ax.set(title=title, xlabel='step')
        if len(keys) > 1:
            ax.legend()
        if keys is terms or keys is spread:                             # their sizes differ much
            ax.set_yscale('log')
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter('{x:g}')
            ax.yaxis.set_minor_formatter('')

def errors(figure, result, system):
    """One panel per column (the mean, labels): error of each encoder under each probe, log axis."""
    columns = ['mean', *result['labels']]
    rows = {name: row for name, row in result['rows'].items() if name != 'predict the mean'}
    published = {n: rows.pop(n)['attentive'] for n in [*rows] if n.endswith(PUBLISHED_ROW)}
    values = [by[column] for row in rows.values() for by in row.values() for column in columns]
    low = min(values + [v for row in published.values() for v in row.values()]) / 1.8
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for ax, column in zip(axes, columns):
        for i, row in enumerate(rows.values()):                         # a group of bars
            probes = [p for p in PROBES if p in row]
            for j, p in enumerate(probes):
                value, x = row[p][column], i + 0.27 * (j - (len(probes) - 1) / 2)
                ax.bar(x, value - low, 0.25, bottom=low, color=PROBES[p], label=p if i == 0 else '')
                inside = value > 0.3                                    # its number; else on top
                color = 'white' if inside and p != 'knn' else 'black'
                ax.annotate(f'{value:.2g}', (x, value), (0, -9 if inside else 2), color=color,
                            fontsize=7, textcoords='offset points', ha='center')
        # lines: guessing the mean, and what was published
        theirs = {f'{n}: {r[column]:g}': r[column] for n, r in published.items() if column in r}
        for words, y in ({'guessing the mean': 1} | theirs).items():
            color, style = ('#444444', '--') if words not in theirs else ('#c0392b', ':')
            ax.axhline(y, color=color, lw=1, ls=style)
            ax.text(len(rows) - 0.5, y * 1.06, words, color=color, fontsize=7, ha='right')
        ax.set(yscale='log', xlim=(-0.55, len(rows) - 0.45), ylim=(low, max(values + [1]) * 2.2),
               title=system.symbols.get(column, column))
        ax.yaxis.set_major_formatter('{x:g}')                           # not 10^-1
        ax.set_xticks(range(len(rows)), [name.replace(' ', '\n', 1) for name in rows])
        ax.tick_params(axis='x', length=0)
    axes[0].set_ylabel(f'error on {result["split"]} (MSE, z-scored)')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)

def canvas(width, height):
    return plt.figure(figsize=(width, height), dpi=120, layout='constrained')

def save(figure, path):
    """A png of 256 colours, complete or not there at all."""
    figure.savefig(drawn := io.BytesIO())
    plt.close(figure)
    fewer_colours = Image.open(drawn).convert('RGB').quantize(256, dither=0)
    fewer_colours.save(small := io.BytesIO(), 'png', optimize=True)
    write_bytes(path, small.getvalue())
    print(f'{path}: {path.stat().st_size / 1e3:.0f} kB')

@script
def main(argv=None):
    args, paths = parse(__doc__, Settings, argv, runs=dict(
        nargs='*', type=Path, help='folders of runs, or checkpoints (default: the newest of out/)'))
    if missing := ', '.join(str(p) for p in paths if not p.exists()):
        raise ValueError(f'no run at {missing}')
    plt.rcParams.update(STYLE)
    (out := Path(args.out)).mkdir(parents=True, exist_ok=True)
    runs = [p if p.is_dir() else p.parent for p in paths or checkpoints()[-1:]]
    run, log = runs[0], runs[0] / 'log.jsonl'                           # the one that is drawn
    if not log_lines(log, 1):
        raise ValueError(f'{run} is no run of train.py, or has made no step: it has no {log.name}')
    results = [read_result(p) for r in runs if (p := r / 'eval.json').exists()]
    if len({result['system'] for result in results}) > 1:
        raise ValueError('the runs are of different systems: a picture is about one')
    # the data and the training
    state = models.load_checkpoint(run / 'ckpt.pt')
    config = state['config']
    root, system, _ = find_dataset(config['data'], data_folder(args.data_dir, config['data_dir']))
    examples(figure := canvas(9.6, 5), root, system, state['labels'], 8)
    save(figure, out / 'examples.png')
    training(figure := canvas(12, 2.8), log)
    save(figure, out / 'training.png')
    if not results:                                                     # no errors to draw
        return print(f'no {run}/eval.json, so no errors.png: make one with python eval.py {run}')
    errors(figure := canvas(12, 3.8), results[0] | {'rows': merge_rows(results)}, system)
    save(figure, out / 'errors.png')

if __name__ == '__main__':
    main()
