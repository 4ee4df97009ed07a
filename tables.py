"""
Tables of errors: of one evaluation, the paper's table 1, and, over seeds, those of README.md and NOTES.md.

    python tables.py              # write every table in README.md and NOTES.md anew, from results/*.json
    python tables.py --check      # only say whether they are what results/ gives

Such a table stands between `<!-- results: NAME NAME -->` and `<!-- /results -->`; NAME stands for the files
results/NAME-seed*.json, copies of the eval.json of runs that differ in their seeds, and NAME-seed0 for one of them.
`parameters` among the names gives a column to each parameter. `latents-or-pixels` alone stands for the rows of that
experiment (reproduce.py), its systems side by side.
"""
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from common import option, parse, script, write_text

import numpy as np

from config import MAY_CHANGE
from reproduce import EXPERIMENT

PROBES = 'attentive', 'linear', 'knn'
PUBLISHED = ', the paper (valid)'                                        # ends the name of a published row
SHARED = 'field statistics', 'predict the mean'                          # rows that do not depend on the run
HERE = Path(__file__).resolve().parent


@dataclass
class Settings:
    check: bool = option(False, 'write nothing; exit code 2 if a table is not what results/ gives', 'what', bare=True)


def interval(by_run, draws=2000):
    """95% bootstrap interval of the mean of errors by run, (R,): runs, not their windows, are drawn anew."""
    by_run = np.asarray(by_run)
    drawn = by_run[np.random.default_rng(0).integers(len(by_run), size=(draws, len(by_run)))].mean(1)
    return np.quantile(drawn, [0.025, 0.975]).tolist()


# ---------------------------------------------------------------------------------------------
# one evaluation

def merge_rows(results, key='rows'):
    """The rows of several runs' eval.json as one table's; what the runs share stands once. key: 'rows' or 'by_run'."""
    rows, shared, paper = {}, {}, {}
    for r in results:
        name = r['row']
        while name in rows:                                              # several runs of one model
            name += "'"
        for title, row in r[key].items():
            if title.endswith(PUBLISHED):
                paper[title] = row
            elif title in SHARED:
                shared.setdefault(title, row)
            else:
                own = name + title[len(r['row']):] if title.startswith(r['row']) else title
                rows[own if own.startswith(name) or len(results) == 1 else f'{name}, {own}'] = row
    return rows | shared | paper


def print_table(results):
    """Rows = encoders, columns = labels under each probe: mean squared error of z-scored labels, and its interval."""
    rows, by_run = merge_rows(results), merge_rows(results, 'by_run')
    first = results[0]
    columns = [*first['labels'], 'mean']
    width, each = max(map(len, rows)) + 2, max(8, *(len(c) + 2 for c in columns))
    print(f'\nMSE of z-scored parameters, {first["system"]}, {first["split"]} split (guessing the mean: 1)\n')
    print((' ' * width + '   '.join(f'{p:^{each * len(columns)}}' for p in PROBES)).rstrip())
    print(' ' * width + '   '.join(''.join(f'{c:>{each}}' for c in columns) for _ in PROBES))
    for name, row in rows.items():
        cell = lambda p, c: f'{row[p][c]:{each}.3f}' if c in row.get(p, {}) else f'{"-":>{each}}'
        print(f'{name:{width}}' + '   '.join(''.join(cell(p, c) for c in columns) for p in PROBES))
    runs = len(next(iter(by_run['predict the mean'].values())))
    print(f'\n95% intervals of the means, over {runs} {first["split"]} {first.get("unit", "runs")} drawn anew\n')
    for name, row in by_run.items():
        cells = [f'[{low:.3f}, {high:.3f}]' if p in row else '-' for p in PROBES
                 for low, high in [interval(row.get(p, [0]))]]
        if name != 'predict the mean':
            print(f'{name:{width}}' + '   '.join(f'{cell:>{each * len(columns)}}' for cell in cells))
    print('\n'.join(['', *caveats(results)]))


def caveats(results):
    """What must be said of a table, a line each."""
    said, unlike = [], {}
    for what, of in (('saw the', lambda r: r['field'].partition(',')[0]),
                     ('trained on', lambda r: f'{r["run"]["windows_seen"]:,} windows'),
                     ('started from', lambda r: r['run']['settings'].get('init') or 'random weights'),
                     ('has the seeds', lambda r: ', '.join(f'{k} {v}' for k, v in r['seeds'].items()))):
        if len({of(r) for r in results}) > 1:
            unlike[what] = '; '.join(f'{r["row"]} {what} {of(r)}' for r in results)
    if unlike:
        said += ['Not like with like: ' + '. '.join(unlike.values()) + '.', '']
    if results[0]['split'] == 'valid':
        said += ['The probes chose their settings on these windows: a table to tune by. The one to report is --split '
                 'test.', '']
    if any(r['run']['preset'] == 'smoke' for r in results):
        said += ['A smoke run: these numbers mean nothing.', '']
    return said


def print_table_one(cells, models, systems, seen, split):
    """cells: {(system, model): error}; models: {name: (title, {system: published}, star)}; seen: of eval.table_one."""
    width = max(20, *(len(system) + 2 for system in systems))
    print(f'MSE of z-scored parameters, mean over those of a system, attentive probe: measured on {split} | the paper, '
          f'on valid\n')
    print(' ' * 12 + ''.join(f'{system:>{width}}' for system in systems))
    for name, (title, paper, star) in models.items():
        published = {s: f'{paper[s]:.3f}{star}' if s in paper else '-' for s in systems}
        print(f'{title:12}' + ''.join(f'{cells.get((s, name), "not run") + " | " + published[s]:>{width}}'
                                      for s in systems))
    print('\n* fine-tuned end to end; the others are frozen')
    for system, ways in seen.items():
        if len(ways) > 1:
            print(f'{system}, not like with like: '
                  + '; '.join(f'{", ".join(names)}: {how}' for how, names in ways.items()))


# ---------------------------------------------------------------------------------------------
# over seeds

def collect(names, folder):
    """({title: [(errors, errors by run, of the run) of each seed]}, an eval.json) of the files of all names.

    Of the run: what eval.json says of it, and the rank; {} for rows that are not of the trained encoder.
    """
    rows, first = defaultdict(dict), None                                # by title, then by seeds
    for name in names:
        files = sorted(folder.glob(f'{name}-seed[0-9]*.json')) or sorted(folder.glob(f'{name}.json'))
        if not files:
            raise ValueError(f'no {folder}/{name}-seed*.json')
        same, variant = None, re.sub('-seed[0-9]+$', '', name).partition('-nano')[2].lstrip('-')
        for file in files:
            r = json.loads(file.read_text())
            first, same = first or r, same or r
            check_alike(r, first, same, file)
            start = r['run']['settings'].get('init')
            own_name = r['row'].endswith(variant.rpartition('-')[2])     # as of one trained with labels
            title = ', '.join(filter(None, [r['row'], variant * (not own_name), start and f'from {start}']))
            for row in (row for row in r['by_run'] if row != 'predict the mean'):
                of_run = {**r['run'], 'rank': r.get('rank')} if row == r['row'] else {}
                found = r['rows'][row], r['by_run'][row], of_run
                seeds, plain = tuple(r['seeds'].values()), f'{r["row"].partition(",")[0]}: {row}'
                if row in SHARED:                                        # once for each dataset, whatever the model
                    rows[row].setdefault(r['seeds']['data'], found)
                    continue
                own = title + row.removeprefix(r['row']) if row.startswith(r['row']) else f'{title}: {row}'
                if row == 'random init' and rows[plain].setdefault(seeds, found) == found:
                    continue                                             # variants begin with the same weights
                if seeds in rows[own]:
                    raise ValueError(f'{file}: there is another result of {own} with these seeds')
                rows[own][seeds] = found
    return {title: list(found.values()) for title, found in rows.items()}, first


def no_better(values, random):
    """Are several seeds' errors not below those of random weights by two standard deviations of the difference?"""
    if min(len(values), len(random)) < 2:
        return False
    return bool(np.mean(random) - np.mean(values) < 2 * np.hypot(np.std(random, ddof=1), np.std(values, ddof=1)))


def summary(names, folder):
    """A Markdown table of the runs results/NAME-seed*.json of each name: mean and standard deviation over the seeds.

    `~` marks what is not below the model's random weights by two standard deviations of their difference. Raises
    ValueError for files that are missing, or that one table cannot compare.
    """
    each, names = 'parameters' in names, [name for name in names if name != 'parameters']
    rows, first = collect(names, folder)
    columns = [*first['labels'], 'mean'] if each else ['mean']
    head = [f'{p}: {c}' if each else p for p in PROBES for c in columns]
    lines = ['| ' + ' | '.join([first['system'], 'seeds', 'windows seen', *head]) + ' |',
             '|---' * (3 + len(head)) + '|']
    for title, found in rows.items():
        cells = []
        for p in PROBES:
            for c in columns:
                cells.append(cell(found, rows.get(title.partition(',')[0] + ': random init', []), p, c))
                if cells[-1] != '-' and c == 'mean':
                    cells[-1] += ' [{:.3f}, {:.3f}]'.format(*interval(sum((runs[p] for _, runs, _ in found), [])))
        windows = sorted({of_run['windows_seen'] for _, _, of_run in found if of_run})
        seen = ' to '.join(f'{w:,}' for w in dict.fromkeys((windows[0], windows[-1]))) if windows else '-'
        lines.append(f'| {title} | {len(found)} | {seen} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def cell(seeds, random, p, column):
    """Mean and spread over seeds of a column's errors under a probe, and `~`, if they are no better than random's."""
    values, floor = ([e[p][column] for e, _, _ in found if p in e] for found in (seeds, random))
    if not values:
        return '-'
    spread = f' ± {np.std(values, ddof=1):.3f}' if len(values) > 1 else ''
    return f'{np.mean(values):.3f}{spread}' + ' ~' * no_better(values, floor)


def of_experiment(folder):
    """{system: what `collect` gives first}, of the rows of "latents or pixels" of which there are results."""
    there = {re.sub('-seed[0-9]+$', '', file.stem) for file in folder.glob('*-seed*.json')}
    names = defaultdict(list)
    for name in EXPERIMENT:
        if name in there:
            names[name.partition('-')[0]].append(name)
    return {system: collect(own, folder)[0] for system, own in names.items()}


LAST = '', 'random init', 'supervised', 'field statistics'               # an order of rows


def side_by_side(folder):
    """A Markdown table of that experiment: errors are means over a system's parameters, `~` and ± as in `summary`.

    Floors and ceilings come last. Effective rank: of the mean tokens of all training windows, and of how many channels,
    a number for each system.
    """
    found = of_experiment(folder)
    head = ['', *(f'{s}: {p}' for s in found for p in PROBES), 'effective rank']
    lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
    shown = []
    titles = dict.fromkeys(title for rows in found.values() for title in rows)
    for title in sorted(titles, key=lambda title: max(i for i, word in enumerate(LAST) if word in title)):
        errors = [[e for e, _, _ in rows.get(title, [])] for rows in found.values()]
        if errors in shown:                                              # two models' encoders may begin alike
            continue
        shown.append(errors)
        cells, ranks = [], []
        for rows in found.values():
            seeds, random = (rows.get(t, []) for t in (title, title.partition(',')[0] + ': random init'))
            cells += [cell(seeds, random, p, 'mean') for p in PROBES]
            own = [of_run['rank'] for _, _, of_run in seeds if of_run.get('rank')]
            ranks.append(f'{np.mean([rank["effective"] for rank in own]):.1f} of {own[0]["of"]}' if own else '-')
        lines.append('| ' + ' | '.join([title, *cells, ' / '.join(ranks)]) + ' |')
    return '\n'.join(lines)


def as_probed(r):
    """What the results of a table have in common."""
    return {**{k: r[k] for k in ('system', 'labels', 'stride', 'windows')},
            **{k: r['probe'][k] for k in ('probe', 'epochs', 'mlp_ratio')},
            'field': r['field'].partition(',')[0]}                       # tiled or not, it is the same field


def as_trained(r):
    """What the results of a name have in common: all but their seeds, and where they lie."""
    settings = {**r['run']['settings'], **{k: r['probe'].get(k) for k in ('finetune', 'finetune_lr')}}
    own = {'seed', *MAY_CHANGE} - {'steps', 'epochs'}
    return {k: v for k, v in settings.items() if k not in own}


def check_alike(r, first, same, file):
    """Raise ValueError unless a result is of test, and like the `first` of its table and the `same` of its name."""
    if 'by_run' not in r or r['split'] != 'test':
        raise ValueError(f'{file} was not scored on test by this version: python eval.py --split test')
    for other, kept, whose in (first, as_probed, 'table'), (same, as_trained, 'name'):
        there = kept(other)
        for what, value in kept(r).items():
            if value != there.get(what, value):                          # a setting may be younger than a result
                raise ValueError(f'{file}: {what} is {value} in it, and {there[what]} in the first of its {whose}')


def with_tables(text, folder):
    """A Markdown text with every table between its markers made anew."""
    def table(match):
        names = match[2].split()
        made = side_by_side(folder) if names == ['latents-or-pixels'] else summary(names, folder)
        return f'{match[1]}\n{made}\n{match[3]}'
    return re.sub(r'(<!-- results: ([^>]*) -->)\n.*?(<!-- /results -->)', table, text, flags=re.DOTALL)


@script
def main(argv=None):
    args, = parse(__doc__, Settings, argv)
    for page in HERE / 'README.md', HERE / 'NOTES.md':
        text = page.read_text()
        new = with_tables(text, HERE / 'results')
        if new == text:
            print(f'{page.name}: every table is what results/ gives')
        elif args.check:
            raise ValueError(f'{page.name} has other numbers than results/: python tables.py writes them')
        else:
            write_text(page, new)
            print(f'{page.name}: written')


if __name__ == '__main__':
    main()
