"""
Pictures of the data, a training run and its error table.

    python plot.py                                        # the newest run under out/ -> figures/
    python plot.py out/... out/...                        # of the first, but errors of all in one picture
    python plot.py out/... --banner figures/banner.png    # only the README's: examples and table in one
    python plot.py --embeddings FILE                      # what eval.py --save-embeddings FILE kept

Writes examples.png (the flow, for a few parameters of the test split), training.png (from log.jsonl) and
errors.png (from eval.json; left out until python eval.py has made one), or embeddings.png (mean tokens in their
first two principal components, coloured by each parameter).
"""
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from common import data_folder, option, parse, script

import matplotlib
matplotlib.use('Agg')                                                    # no window
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator
from PIL import Image                                                    # comes with matplotlib

import model as models
import systems
from data import find_dataset
from eval import CLOCKS, checkpoints
from tables import PUBLISHED, merge_rows
from well import read_file

PROBES = {'attentive': '#3b528b', 'linear': '#21918c', 'knn': '#a0c93a'}
STYLE = {'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.titlesize': 9,
         'axes.grid': True, 'axes.grid.axis': 'y', 'grid.color': '#e6e6e6', 'axes.axisbelow': True,
         'legend.frameon': False}
BOOKKEEPING = CLOCKS | {'loss', 'embedding_std', 'embedding_rank'}


@dataclass
class Settings:
    data_dir: str = option('', 'default: $THE_WELL_DATA_DIR, else data', 'what')
    out: str = option('figures', 'folder for the pictures', 'what')
    banner: str = option('', 'write only this picture, examples and error table', 'what')
    embeddings: str = option('', 'npz file of eval.py --save-embeddings: draw only that', 'what')


def read_example(path, picture):
    """(fields shown (T, nx, ny), their name, time, x, y) of a file's first run. picture: channels, or ()."""
    f, channels, _, shape = read_file(path)
    with f:
        names = [name for name in picture if name in channels] or list(channels)[:1]
        read = lambda name: channels[name][0][(0, slice(None), slice(None), slice(None), *channels[name][1])]
        shown = read(names[0]) if len(names) == 1 else np.sqrt(sum(np.square(read(name)) for name in names))
        at = [f['dimensions'][k][:] if k in f['dimensions'] else np.arange(n)
              for k, n in zip(('time', *systems.spatial_axes(f)), shape[1:])]
    name = names[0] if len(names) == 1 else f'|{names[0].rpartition("_")[0]}|'
    return shown, name.replace('_', ' '), *at


def files_by_labels(root, labels=()):
    """({values of the labels: path} of the test split's files, labels): the first two of `labels`, or that vary."""
    scalars = {}
    for path in sorted((root / 'data' / 'test').glob('*.h*5')):
        f, _, found, _ = read_file(path)
        f.close()
        scalars[path] = {name: values[0] for name, values in found.items()}
    if not scalars:
        raise ValueError(f'{root} has no files in its test split')
    first = next(iter(scalars.values()))
    labels = list(labels or (n for n, value in first.items() if any(s[n] != value for s in scalars.values())))[:2]
    return {tuple(s[name] for name in labels): path for path, s in scalars.items()}, labels


def corners(found):
    """The pairs of smallest and largest values among the keys of {values: path}; without these, the first four."""
    ends = [sorted(set(values)) for values in zip(*found)]
    pairs = itertools.product(*((values[0], values[-1]) for values in ends))
    return [pair for pair in dict.fromkeys(pairs) if pair in found] or list(found)[:4]


def limits(shown, name):
    """(low, high) of the colours of fields with this name, of any shape: a magnitude begins at zero."""
    return (0, np.quantile(shown, 0.998)) if name.startswith('|') else (shown.min(), shown.max())


def show(ax, x, y, frame, low, high):
    """A field (nx, ny) at x (nx,), y (ny,), without axes."""
    ax.pcolormesh(x, y, frame.T, cmap='magma', vmin=low, vmax=high, shading='gouraud', rasterized=True)
    ax.set(xticks=[], yticks=[], aspect='equal')
    ax.grid(False)
    ax.spines[:].set_visible(False)


def values_of(system, labels, values, between='\n'):
    """Labels of the files and their values, in words: α = -1, ζ = 17."""
    return between.join(f'{symbol(system, system.name_of(n))} = {v:g}' for n, v in zip(labels, values))


def examples(figure, root, system, labels, frames):
    """A row of frames for each pair of smallest and largest parameters of the test split, each on its own scale."""
    found, labels = files_by_labels(root, labels)
    pairs = corners(found)
    axes = figure.subplots(len(pairs), frames, squeeze=False)
    for row, pair in zip(axes, pairs):
        shown, name, time, x, y = read_example(found[pair], system.picture)
        picked = np.linspace(0, len(shown) - 1, frames + 1).round().astype(int)[1:]      # t = 0 is dull
        low, high = limits(shown[picked] if name.startswith('|') else shown, name)
        for ax, i in zip(row, picked):
            show(ax, x, y, shown[i], low, high)
            if ax in axes[0]:
                ax.set_title(f't = {time[i]:g}', pad=4)
        row[0].set_ylabel(values_of(system, labels, pair), rotation=0, ha='right', va='center')
    figure.suptitle(f'{name[:1].upper()}{name[1:]}, each row on its own scale', fontsize=10)


def symbol(system, label):
    """A label, as people know it, in a picture."""
    return system.symbols.get(label, label)


def training(figure, path, names):
    """Loss, its terms (`names`: what to call them), spread and rank of the embedding, learning rate; by step."""
    log = [json.loads(line) for line in path.read_text().splitlines()]
    if not log:
        raise ValueError(f'{path} is empty: the run has made no step')
    axes = figure.subplots(1, 4)
    terms = [key for key in log[-1] if key not in BOOKKEEPING]
    panels = (('Loss', ('loss',), False), ('Its terms, unweighted', terms, True),
              ('Embedding', ('embedding_std', 'embedding_rank'), True), ('Learning rate', ('lr',), False))
    names = {'embedding_std': 'standard deviation', 'embedding_rank': 'effective rank', **names}
    for ax, (title, keys, log_axis) in zip(axes, panels):
        keys = [key for key in keys if key in log[-1]]                   # a loss may have one term only
        for key, color in zip(keys, itertools.cycle(PROBES.values())):
            ax.plot(*zip(*((line['step'], line[key]) for line in log if key in line)), color=color, lw=1.2,
                    label=names.get(key, key))
        ax.set(title=title, xlabel='step', yscale='log' if log_axis else 'linear')
        if log_axis:
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter('{x:g}')
            ax.yaxis.set_minor_formatter('')
        if len(keys) > 1:
            ax.legend()


def errors(figure, result, columns, system):
    """One panel per column (the mean, labels): test error of each encoder under each probe, log axis."""
    rows = [name for name in result['rows'] if name != 'predict the mean' and not name.endswith(PUBLISHED)]
    papers = {n: r['attentive'] for n, r in result['rows'].items() if n.endswith(PUBLISHED)}
    values = [r[p][c] for n in rows for r in [result['rows'][n]] for p in r for c in columns]
    low = min(values + [v for paper in papers.values() for v in paper.values()]) / 1.8
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for ax, column in zip(axes, columns):
        for i, name in enumerate(rows):
            probes = [p for p in PROBES if p in result['rows'][name]]
            for j, p in enumerate(probes):
                x, value = i + 0.27 * (j - (len(probes) - 1) / 2), result['rows'][name][p][column]
                ax.bar(x, value - low, 0.25, bottom=low, color=PROBES[p], label=p if i == 0 else None)
                inside = value > 0.3                                     # the bar; low ones have the number on top
                ax.annotate(f'{value:.2g}', (x, value), (0, -3 if inside else 2), textcoords='offset points',
                            ha='center', va='top' if inside else 'bottom', fontsize=7,
                            color='white' if inside and p != 'knn' else 'black')
        ax.axhline(1, color='#444444', lw=0.8, ls='--')
        ax.text(len(rows) - 0.5, 1.06, 'guessing the mean', ha='right', va='bottom', fontsize=7, color='#444444')
        for name, paper in papers.items():
            if column in paper:
                ax.axhline(paper[column], color='#c0392b', lw=1, ls=':')
                ax.text(len(rows) - 0.5, paper[column] * 1.06, f'{name}: {paper[column]:g}', ha='right',
                        va='bottom', fontsize=7, color='#c0392b')
        ax.set(yscale='log', xlim=(-0.55, len(rows) - 0.45), ylim=(low, max(values + [1]) * 2.2))
        ax.set_title(symbol(system, column))
        ax.yaxis.set_major_formatter('{x:g}')
        ax.set_xticks(range(len(rows)), [n.replace(' ', '\n', 1) for n in rows])
        ax.tick_params(axis='x', length=0)
    axes[0].set_ylabel(f'error on {result["split"]} (MSE, z-scored)')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)


def embeddings(figure, kept, system):
    """Mean tokens (n, D) in their first two principal components, a panel for each label; test runs in full colour."""
    z = kept['embedding'].astype(np.float64)
    z = (z - z.mean(0)) / (z.std(0) + 1e-9)
    _, spread, directions = np.linalg.svd(z, full_matrices=False)
    share, (first, second) = spread**2 / (spread**2).sum(), (z @ directions[:2].T).T
    test, names = kept['split'] == 'test', kept['label_names'].tolist()
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, name, values, log in zip(axes, names, kept['labels'].T, kept['log_labels']):
        norm = (matplotlib.colors.LogNorm if log else matplotlib.colors.Normalize)(values.min(), values.max())
        for where, size, alpha in (~test, 4, 0.5), (test, 12, 1.0):
            dots = ax.scatter(first[where], second[where], s=size, c=values[where], norm=norm, cmap='viridis',
                              alpha=alpha, lw=0)
        ax.set(title=symbol(system, name), xlabel=f'component 1 ({share[0]:.0%})',
               ylabel=f'component 2 ({share[1]:.0%})')
        ax.grid(False)
        figure.colorbar(dots, ax=ax)
    figure.suptitle(f'{kept["model"]}, {kept["system"]}: large dots are test windows', fontsize=10)


def save(figure, path):
    part = path.with_name(path.name + '.part.png')
    figure.savefig(part)
    plt.close(figure)
    Image.open(part).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(part, optimize=True)
    part.replace(path)
    print(f'{path}: {path.stat().st_size / 1e3:.0f} kB')


def canvas(width, height):
    return plt.figure(figsize=(width, height), dpi=120, layout='constrained')


def read_embeddings(path):
    """(the arrays of a file of eval.py --save-embeddings, its System)."""
    try:
        kept = dict(np.load(path, allow_pickle=False))
        name = str(kept['system'])
    except (OSError, ValueError, KeyError):
        raise ValueError(f'{path} is no file of eval.py --save-embeddings') from None
    return kept, systems.find_system(name) if name in systems.system_names() else systems.System()


def read_tables(runs):
    """What eval.py found of these runs, as one eval.json; None if it has not been run on the first of them."""
    results = []
    for table in (run / 'eval.json' for run in runs):
        if table.exists():
            results.append(json.loads(table.read_text()))
            if 'row' not in results[-1]:
                raise ValueError(f'{table} was written by an earlier version: make it again with python eval.py')
            if results[-1]['system'] != results[0]['system']:
                raise ValueError('the runs are of different systems: a picture is about one')
    return {**results[0], 'rows': merge_rows(results)} if results else None


def plot_runs(runs, args, out):
    """Pictures of the first run, and of the table of all; only the banner if that is asked for."""
    run, result = runs[0], read_tables(runs)
    log = run / 'log.jsonl'
    if not log.exists():
        raise ValueError(f'{run} is no run of train.py: it has no log.jsonl')
    state = models.load_checkpoint(run / 'ckpt.pt')
    root, system, _ = find_dataset(state['config']['data'], data_folder(args.data_dir, state['config']['data_dir']))
    labels = state['labels']
    if args.banner:
        if not result:
            raise ValueError(f'{run} has no eval.json for the banner: make one with python eval.py {run}')
        figure = canvas(10, 4.1)
        left, right = figure.subfigures(1, 2, width_ratios=(0.78, 1))
        examples(left, root, system, labels, 4)
        errors(right, result, ['mean'], system)
        shown = ' and '.join(symbol(system, name) for name in result['labels'])
        right.axes[0].set_title(f'What a frozen encoder knows of {shown}', fontsize=11)
        Path(args.banner).parent.mkdir(parents=True, exist_ok=True)
        return save(figure, Path(args.banner))
    examples(figure := canvas(9.6, 5), root, system, labels, 8)
    save(figure, out / 'examples.png')
    terms = getattr(models.find_model(state['config']['model']), 'TERMS', {})
    training(figure := canvas(12, 2.8), log, terms)
    save(figure, out / 'training.png')
    if result:
        errors(figure := canvas(12, 3.8), result, ['mean', *result['labels']], system)
        save(figure, out / 'errors.png')
    else:
        print(f'no {run}/eval.json, so no errors.png: make one with python eval.py {run}')


@script
def main(argv=None):
    args, paths = parse(__doc__, Settings, argv, runs=dict(
        nargs='*', type=Path, help='folders of runs, or checkpoints (default: the newest under out/)'))
    plt.rcParams.update(STYLE)
    out = Path(args.out)
    if missing := [str(p) for p in paths if not p.exists()]:
        raise ValueError(f'no run at {", ".join(missing)}')
    if not args.banner:
        out.mkdir(parents=True, exist_ok=True)
    if args.embeddings:
        kept, system = read_embeddings(args.embeddings)
        embeddings(figure := canvas(5 * len(kept['label_names']), 4.2), kept, system)
        save(figure, out / 'embeddings.png')
    else:
        plot_runs([p if p.is_dir() else p.parent for p in paths or checkpoints()[-1:]], args, out)


if __name__ == '__main__':
    main()
