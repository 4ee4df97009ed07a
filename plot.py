"""
Pictures of the data, a training run and its error table.

    python plot.py                                        # the newest run under out/ -> figures/
    python plot.py out/... --data-dir data --out figures
    python plot.py out/... --banner figures/banner.png    # only the README's: examples and table in one

Writes examples.png (the flow, for a few parameters of the test split), training.png (from log.jsonl) and
errors.png (from eval.json; left out until python eval.py has made one).
"""
import argparse
import json
import os
import sys
from pathlib import Path

import matplotlib
matplotlib.use('Agg')                                                    # no window
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator
from PIL import Image                                                    # comes with matplotlib

from data import find_dataset, read_file
from eval import checkpoints

SHOWN = {                                        # the two parameters, and what the examples show of the flow
    'active_matter': ('alpha', 'zeta', 'speed'),
    'shear_flow': ('Rayleigh', 'Schmidt', 'tracer'),                     # sic: the files' name for Reynolds
    'rayleigh_benard': ('Rayleigh', 'Prandtl', 'buoyancy')}
NAMES = {'alpha': 'α', 'zeta': 'ζ', 'Reynolds': 'Re', 'Schmidt': 'Sc', 'Prandtl': 'Pr', 'Rayleigh': 'Ra'}
PROBES = {'attentive': '#3b528b', 'linear': '#21918c', 'knn': '#a0c93a'}
STYLE = {'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.titlesize': 9,
         'axes.grid': True, 'axes.grid.axis': 'y', 'grid.color': '#e6e6e6', 'axes.axisbelow': True,
         'legend.frameon': False}


def examples(figure, root, system, frames):
    """A row of frames for each pair of smallest and largest parameters of the test split, each on its own scale."""
    first, second, what = SHOWN[root.name]
    found = {}
    for path in sorted((root / 'data' / 'test').glob('*.h*5')):
        f, channels, scalars, _ = read_file(path)
        with f:
            found[scalars[first], scalars[second]] = path
    if not found:
        raise ValueError(f'{root} has no files in its test split')
    ends = [sorted({pair[i] for pair in found}) for i in (0, 1)]
    rows = [pair for pair in dict.fromkeys((a, b) for a in (ends[0][0], ends[0][-1]) for b in (ends[1][0], ends[1][-1]))
            if pair in found]
    axes = figure.subplots(len(rows), frames, squeeze=False)
    for row, pair in zip(axes, rows):
        f, channels, _, _ = read_file(found[pair])
        with f:
            read = lambda name: channels[name][0][(0, slice(None), ..., *channels[name][1])]             # (T, nx, ny)
            shown = np.hypot(read('velocity_x'), read('velocity_y')) if what == 'speed' else read(what)
            time, x, y = (f['dimensions'][k][:] for k in ('time', 'x', 'y'))
        picked = np.linspace(0, len(shown) - 1, frames + 1).round().astype(int)[1:]      # t = 0 is dull
        low, high = (0, np.quantile(shown[picked], 0.998)) if what == 'speed' else (shown.min(), shown.max())
        for ax, i in zip(row, picked):
            ax.pcolormesh(x, y, shown[i].T, cmap='magma', vmin=low, vmax=high, shading='gouraud', rasterized=True)
            ax.set(xticks=[], yticks=[], aspect='equal')
            ax.grid(False)
            ax.spines[:].set_visible(False)
            if ax in axes[0]:
                ax.set_title(f't = {time[i]:g}', pad=4)
        names = [NAMES[dict(system.shown).get(name, name)] for name in (first, second)]
        row[0].set_ylabel('\n'.join(f'{n} = {v:g}' for n, v in zip(names, pair)), rotation=0, ha='right', va='center')
    title = 'Speed of the flow, each row on its own scale' if what == 'speed' else what.capitalize()
    figure.suptitle(title, fontsize=10)


def training(figure, path):
    """Loss terms, spread and effective rank of the embedding, learning rate; by optimizer step."""
    log = [json.loads(line) for line in path.read_text().splitlines()]
    if not log:
        raise ValueError(f'{path} is empty: the run has made no step')
    step = [line['step'] for line in log]
    axes = figure.subplots(1, 4)
    terms = ('sim', 'std', 'cov') if 'sim' in log[0] else ('low', 'mid', 'high')
    panels = (('Loss', ('loss',), False), ('Its terms, unweighted', terms, True),
              ('Embedding', ('embedding_std', 'embedding_rank'), True), ('Learning rate', ('lr',), False))
    names = {'sim': 'invariance', 'std': 'variance', 'cov': 'covariance', 'embedding_std': 'standard deviation',
             'embedding_rank': 'effective rank', 'low': 'low wavenumbers', 'mid': 'middle', 'high': 'high'}
    for ax, (title, keys, log_axis) in zip(axes, panels):
        keys = [key for key in keys if key in log[0]]                    # MPP and DISCO have one term only
        for key, color in zip(keys, PROBES.values()):
            ax.plot(step, [line[key] for line in log], color=color, lw=1.2, label=names.get(key))
        ax.set(title=title, xlabel='step', yscale='log' if log_axis else 'linear')
        if log_axis:
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter('{x:g}')
            ax.yaxis.set_minor_formatter('')
        if len(keys) > 1:
            ax.legend()


def errors(figure, result, columns):
    """One panel per column (the mean, labels): test error of each encoder under each probe, log axis."""
    rows = [name for name in result['rows'] if name != 'predict the mean' and not name.endswith(', the paper')]
    papers = {n: r['attentive'] for n, r in result['rows'].items() if n.endswith(', the paper')}
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
        ax.set_title(NAMES.get(column, column))
        ax.yaxis.set_major_formatter('{x:g}')
        ax.set_xticks(range(len(rows)), [n.replace(' ', '\n', 1) for n in rows])
        ax.tick_params(axis='x', length=0)
    axes[0].set_ylabel('error on test (MSE, z-scored)')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)


def save(figure, path):
    figure.savefig(path)
    plt.close(figure)
    Image.open(path).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f'{path}: {path.stat().st_size / 1e3:.0f} kB')


def plot(args):
    run = Path(args.run) if args.run else checkpoints()[-1].parent
    if run.is_file():
        run = run.parent
    log, table = run / 'log.jsonl', run / 'eval.json'
    if not log.exists():
        raise ValueError(f'{run} is no run of train.py: it has no log.jsonl')
    result = json.loads(table.read_text()) if table.exists() else None
    root, system, _ = find_dataset(args.data or (result or {}).get('system', 'active_matter'), args.data_dir)
    new = lambda width, height: plt.figure(figsize=(width, height), dpi=120, layout='constrained')
    if args.banner:
        if not result:
            raise ValueError(f'{run} has no eval.json for the banner: make one with python eval.py {run / "ckpt.pt"}')
        figure = new(10, 4.1)
        left, right = figure.subfigures(1, 2, width_ratios=(0.78, 1))
        examples(left, root, system, 4)
        errors(right, result, ['mean'])
        shown = ' and '.join(NAMES[name] for name in result['labels'])
        right.axes[0].set_title(f'What a frozen encoder knows of {shown}', fontsize=11)
        args.banner.parent.mkdir(parents=True, exist_ok=True)
        return save(figure, args.banner)
    args.out.mkdir(parents=True, exist_ok=True)
    examples(figure := new(9.6, 5), root, system, 8)
    save(figure, args.out / 'examples.png')
    training(figure := new(12, 2.8), log)
    save(figure, args.out / 'training.png')
    if result:
        errors(figure := new(12, 3.8), result, ['mean', *result['labels']])
        save(figure, args.out / 'errors.png')
    else:
        print(f'no {table}, so no errors.png: make one with python eval.py {run / "ckpt.pt"}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('run', nargs='?', help='folder of a run, or its checkpoint (default: the newest under out/)')
    parser.add_argument('--data', help="system whose examples are shown (default: that of the run's table)")
    parser.add_argument('--data-dir', default=os.environ.get('THE_WELL_DATA_DIR', 'data'),
                        help='default: $THE_WELL_DATA_DIR, else ./data')
    parser.add_argument('--out', type=Path, default=Path('figures'), help='folder for the pictures')
    parser.add_argument('--banner', type=Path, help='write only this picture, examples and error table')
    args = parser.parse_args()
    plt.rcParams.update(STYLE)
    try:
        plot(args)
    except (ValueError, OSError) as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
