"""
Tables over seeds, of results/*.json, in Markdown: those of README.md, NOTES.md and results/README.md.

    python report.py              # write every table in these pages anew
    python report.py --check      # only say whether they are what results/ gives

A table stands between `<!-- results: WORD WORD -->` and `<!-- /results -->`. The words:

    NAME NAME           rows (rows.py): the files results/NAME-seed*.json; NAME-seed0 for one of them
    parameters          among names: a column for each parameter
    table-1 [PROBE ..]  models by systems, beside the paper's numbers; of some probes
    latents-or-pixels   that experiment's rows, its systems side by side
    labels SYSTEM       errors by the share of labels that the probes had
    carried SYSTEM      errors at unseen parameters, and on spoilt fields
    cost                what the models of table 1 cost

Cells are means and standard deviations over seeds; `~`, for a trained encoder, says that it is not better than its
random weights by two standard deviations of the difference.
"""
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from common import option, parse, script, write_text

import numpy as np

import model as models
from config import MAY_CHANGE
from rows import EXPERIMENT, FEWER, GROUPS, PAPER_TABLES
from systems import system_names
from tables import PROBES, SHARED, interval, number

HERE = Path(__file__).resolve().parent
PAGES = 'README.md', 'NOTES.md', 'results/README.md'


@dataclass
class Settings:
    check: bool = option(False, 'write nothing; exit code 2 if a table is not what results/ gives', 'what', bare=True)


# ---------------------------------------------------------------------------------------------
# over seeds

def result_files(name, folder):
    """The results of all seeds of a row SYSTEM-ROW, or of one cell, SYSTEM-ROW-seedN."""
    return sorted(folder.glob(f'{name}-seed[0-9]*.json')) or sorted(folder.glob(f'{name}.json'))


def collect(names, folder, variants=True):
    """({title: [(errors, errors by run, of the run) of each seed]}, an eval.json) of the files of all names.

    Of the run: what eval.json says of it, its rank, cost and parameters; for rows that are not of the trained encoder
    only how they carry (`generalization`), if that is there. variants: titles say how a row differs from its preset.
    """
    rows, first = defaultdict(dict), None                                # by title, then by seeds
    for name in names:
        files = result_files(name, folder)
        if not files:
            raise ValueError(f'no {folder}/{name}-seed*.json')
        same, variant = None, re.sub('-seed[0-9]+$', '', name).partition('-nano')[2].lstrip('-') * variants
        for file in files:
            r = json.loads(file.read_text())
            first, same = first or r, same or r
            check_alike(r, first, same, file)
            start = r['run']['settings'].get('init')
            own_name = r['row'].endswith(variant.rpartition('-')[2])     # as of one trained with labels
            title = ', '.join(filter(None, [r['row'], variant * (not own_name), start and f'from {start}']))
            for row in (row for row in r['by_run'] if row != 'predict the mean'):
                carried = r.get('generalization', {}).get(row)
                of_run = {'generalization': carried} if carried else {}
                if row == r['row']:
                    of_run |= r['run'] | {k: r.get(k) for k in ('rank', 'parameters', 'cost')}
                found = r['rows'][row], r['by_run'][row], of_run
                seeds, plain = tuple(r['seeds'].values()), f'{r["row"].partition(",")[0]}: {row}'
                if row in SHARED:                                        # once for each dataset, whatever the model
                    known = rows[row].setdefault(r['seeds']['data'], found)
                    if not same_as(known, found):
                        raise ValueError(f'{file}: its {row} are not those of other results of data seed '
                                         f'{r["seeds"]["data"]}: they are of other data')
                    continue
                own = title + row.removeprefix(r['row']) if row.startswith(r['row']) else f'{title}: {row}'
                if row == 'random init' and same_as(rows[plain].setdefault(seeds, found), found):
                    continue                                             # variants begin with the same weights
                if seeds in rows[own]:
                    raise ValueError(f'{file}: there is another result of {own} with these seeds')
                rows[own][seeds] = found
    return {title: list(found.values()) for title, found in rows.items()}, first


def same_as(known, found):
    """Have two results the same errors? Then the first learns what else the second says."""
    if known[:2] == found[:2]:
        known[2].update(found[2])
    return known[:2] == found[:2]


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
    head, lines = [f'{p}: {c}' if each else p for p in PROBES for c in columns], []
    for title, found in rows.items():
        cells = []
        for p in PROBES:
            for c in columns:
                cells.append(cell(found, floor_of(title, rows), p, c))
                if cells[-1] != '-' and c == 'mean':
                    cells[-1] += ' [{:.3f}, {:.3f}]'.format(*interval(sum((runs[p] for _, runs, _ in found), [])))
        windows = sorted({of_run['windows_seen'] for _, _, of_run in found if 'windows_seen' in of_run})
        seen = ' to '.join(f'{w:,}' for w in dict.fromkeys((windows[0], windows[-1]))) if windows else '-'
        lines.append([title, str(len(found)), seen, *cells])
    return markdown([first['system'], 'seeds', 'windows seen', *head], lines)


def floor_of(title, rows):
    """The seeds of the random weights that a row began with: fine-tuned as well, if it was, and there are such."""
    model, comma, rest = title.partition(',')
    return rows.get(f'{model}: random init{comma}{rest}', rows.get(f'{model}: random init', []))


def cell(seeds, random, p, column):
    """Mean and spread over seeds of a column's errors under a probe, and `~`, if they are no better than random's."""
    values, floor = ([e[p][column] for e, _, _ in found if p in e] for found in (seeds, random))
    return shown(values) + ' ~' * no_better(values, floor)


def shown(values):
    """Mean and standard deviation, as in a cell."""
    if not values:
        return '-'
    return number(np.mean(values)) + (f' ± {number(np.std(values, ddof=1))}' if len(values) > 1 else '')


def markdown(head, rows):
    """A table of cells of text."""
    line = lambda row: '| ' + ' | '.join(row) + ' |'
    return '\n'.join([line(head), '|---' * len(head) + '|', *map(line, rows)])


def ordered(found, marks=(', fine-tuned', 'supervised', 'random init', 'field statistics')):
    """Titles of {system: {title: ..}}: first those without any of the marks, then by the last of the marks in them."""
    place = lambda title: max((i + 1 for i, mark in enumerate(marks) if mark in title), default=0)
    return sorted(dict.fromkeys(title for rows in found.values() for title in rows), key=place)


def of_experiment(folder):
    """{system: what `collect` gives first}, of the rows of "latents or pixels" of which there are results."""
    names = defaultdict(list)
    for name in EXPERIMENT:
        if result_files(name, folder):
            names[name.partition('-')[0]].append(name)
    return {system: collect(own, folder)[0] for system, own in names.items()}


def side_by_side(folder):
    """A Markdown table of that experiment: errors are means over a system's parameters, `~` and ± as in `summary`.

    Floors and ceilings come last. Effective rank: of the mean tokens of all training windows, and of how many channels,
    a number for each system.
    """
    found = of_experiment(folder)
    lines, shown = [], []
    for title in ordered(found, ('random init', 'supervised', 'field statistics')):
        errors = [[e for e, _, _ in rows.get(title, [])] for rows in found.values()]
        if errors in shown:                                              # two models' encoders may begin alike
            continue
        shown.append(errors)
        cells, ranks = [], []
        for rows in found.values():
            seeds = rows.get(title, [])
            cells += [cell(seeds, floor_of(title, rows), p, 'mean') for p in PROBES]
            own = [of_run['rank'] for _, _, of_run in seeds if of_run.get('rank')]
            ranks.append(f'{np.mean([rank["effective"] for rank in own]):.1f} of {own[0]["of"]}' if own else '-')
        lines.append([title, *cells, ' / '.join(ranks)])
    return markdown(['', *(f'{s}: {p}' for s in found for p in PROBES), 'effective rank'], lines)


# ---------------------------------------------------------------------------------------------
# the paper's tables

def of_paper(preset, folder):
    """{system: what `collect` gives first} of the rows of table 1, of which there are results."""
    found = {}
    for system in system_names():
        names = [f'{system}-{row}' for row in PAPER_TABLES[preset]]
        names = [name for name in names if result_files(name, folder)]
        if names:
            found[system] = collect(names, folder, variants=False)[0]
    return found


def table_one(preset, folder, probes=PROBES):
    """Markdown: models by systems, with the numbers that the paper has (on valid of The Well)."""
    found = of_paper(preset, folder)
    published = {}                                                       # by title and system
    for name in models.model_names():
        m = models.find_model(name)
        title = models.title(name) + ', fine-tuned' * getattr(m, 'PAPER_FINETUNED', False)
        published |= {(title, system): f'{value:.3f}' for system, value in getattr(m, 'PAPER', {}).items()}
    rows = []
    wanted = {models.title(model) + ', supervised' * ('supervised' in rest): {}
              for model, _, rest in (row.partition('-') for row in PAPER_TABLES[preset])}
    for title in ordered({'': wanted, **found}):
        rows.append([title])
        for system, own in found.items():
            seeds, plain = own.get(title, []), title.replace(', fine-tuned as in the paper', ', fine-tuned')
            rows[-1] += [published.get((plain, system), '-')] + [cell(seeds, floor_of(title, own), p, 'mean')
                                                                 for p in probes]
    rows.append(['predict the mean'] + ['-', *['1'] * len(probes)] * len(found))
    return markdown(['', *(f'{system}: {c}' for system in found for c in ('the paper', *probes))], rows)


def label_curves(system, folder, preset='nano'):
    """{(title, probe): {fraction: errors of the seeds}} of generalize.py, and of what was trained with fewer labels.

    Where that was measured, there are the attentive probe's errors of the same random weights as well.
    """
    curves = defaultdict(lambda: defaultdict(list))
    rows = of_paper(preset, folder).get(system, {})
    for title in ordered({system: rows}):
        for errors, _, of_run in rows[title]:
            for fraction, by_probe in of_run.get('generalization', {}).get('labels', {}).items():
                for p, error in by_probe.items():
                    if 'supervised' not in title:                        # its encoder has seen all labels
                        curves[title, p][float(fraction)].append(error)
            if title.endswith('supervised'):
                for p in PROBES:
                    curves[f'{title}, from scratch', p][1.0].append(errors[p]['mean'])
    for row, fraction in FEWER[preset].items():
        same = None
        for file in result_files(f'{system}-{row}', folder):
            r = json.loads(file.read_text())
            same = same or r
            check_alike(r, same, same, file)
            before = f'{r["row"].partition(",")[0]}: random init'
            curves[before, 'attentive'][fraction].append(r['rows']['random init']['attentive']['mean'])
            for p in PROBES:
                curves[f'{r["row"]}, from scratch', p][fraction].append(r['rows'][r['row']][p]['mean'])
    for (title, p), by in curves.items():
        if 'random init' in title and p == 'attentive' and title in rows:
            by[1.0] = [errors[p]['mean'] for errors, _, _ in rows[title]]
    return {(title, p): curves[title, p] for title in ordered({system: [t for t, _ in curves]}) for p in PROBES
            if (title, p) in curves}


def labels_table(system, folder, preset='nano'):
    """Markdown of `label_curves`: a row for each encoder and probe, without the nearest neighbours."""
    curves = {key: by for key, by in label_curves(system, folder, preset).items() if key[1] != 'knn'}
    fractions = sorted({fraction for by in curves.values() for fraction in by})
    rows = [[title, p, *(shown(by.get(fraction, [])) for fraction in fractions)] for (title, p), by in curves.items()]
    return markdown([system, 'probe', *(f'{fraction:.0%}' for fraction in fractions)], rows)


def carried_table(system, folder, preset='nano'):
    """Markdown: errors at values held out from the probe, in brackets those of one that saw them; and on spoilt fields.

    Columns of `values` are of the linear probe and the nearest neighbours, for which alone they were measured.
    """
    rows, head = [], []
    found = of_paper(preset, folder).get(system, {})
    for title in ordered({system: found}):
        carried = [of_run['generalization'] for _, _, of_run in found[title] if of_run.get('generalization')]
        for p in PROBES if carried else ():
            if p == 'knn' or p not in carried[0]['inputs'].get('half resolution', {}):
                continue
            where, inputs = list(carried[0]['values']), list(carried[0]['inputs'])
            head = [system, 'probe', *where, 'all values, clean', *inputs]
            fair = 'supervised' not in title                             # its encoder was told the held-out values
            pairs = {w: [c['values'][w][p] for c in carried if fair and p in c['values'][w]] for w in where}
            rows.append([title, p, *(f'{shown([a for a, _ in pair])} ({number(np.mean([b for _, b in pair]))})'
                                     if pair else '-' for pair in pairs.values()),
                         shown([c['labels']['1'][p] for c in carried]),
                         *(shown([c['inputs'][how][p] for c in carried]) for how in inputs)])
    return markdown(head, rows)


def costs(folder, preset='nano'):
    """{system: {title: {what: mean over seeds}}} of the trained encoders of table 1; FLOP as bench_steps.py counts.

    Of the minutes, the median: a run may have been paused.
    """
    out = defaultdict(dict)
    for system, rows in of_paper(preset, folder).items():
        for title, seeds in rows.items():
            runs = [of_run for _, _, of_run in seeds if of_run.get('cost')]
            if runs:
                mean = lambda value: float(np.mean([value(run) for run in runs]))
                out[system][title] = {
                    'parameters': runs[0]['parameters']['encoder'], 'windows': mean(lambda r: r['windows_seen']),
                    'gflop': mean(lambda r: r['cost']['gflop_per_window']),
                    'minutes': float(np.median([r['train_seconds'] / 60 for r in runs])),
                    'gb': mean(lambda r: r['memory_gb'])}
    return out


def cost_table(folder, preset='nano'):
    """Markdown of `costs`, from the least to the most over the systems."""
    found = costs(folder, preset)
    rows = []
    for title in ordered(found):
        own = [rows[title] for rows in found.values() if title in rows]
        span = lambda values, form: ' to '.join(dict.fromkeys(format(v, form) for v in (min(values), max(values))))
        rows.append([title, span([c['parameters'] for c in own], ',.0f'), span([c['windows'] for c in own], ',.0f'),
                     span([c['gflop'] for c in own], '.3f'),
                     span([c['gflop'] * c['windows'] / 1e3 for c in own], '.1f'),
                     span([c['minutes'] for c in own], '.0f'), span([c['gb'] for c in own], '.1f')])
    return markdown(['', 'parameters of the encoder', 'windows seen', 'GFLOP a window', 'TFLOP in all', 'minutes',
                     'peak GB'], rows)


def paper_tables(preset, folder):
    """Markdown: all of these, of a preset."""
    each = [table(system, folder, preset) for system in of_paper(preset, folder)
            for table in (labels_table, carried_table)]
    return '\n\n'.join([table_one(preset, folder), cost_table(folder, preset), *each])


def tables_of(names, preset, folder):
    """Markdown of what benchmark.py was asked for: parts of rows.GROUPS (none: all of them), rows, cells.

    Rows and cells without results are left out.
    """
    parts = GROUPS[preset]
    asked = list(names) or list(parts)
    tables = [paper_tables(preset, folder)] if {'paper-tables', 'fewer-labels'} & {*asked} else []
    tables += [side_by_side(folder)] if 'latents-or-pixels' in asked else []
    own = [row for name in asked if name not in parts or name == 'longest' for row in parts.get(name, [name])
           if result_files(row, folder)]
    return '\n\n'.join(tables + [summary([row], folder) for row in own])


# ---------------------------------------------------------------------------------------------
# what may stand in one table

def as_probed(r):
    """What the results of a table have in common."""
    return {**{k: r[k] for k in ('system', 'labels', 'stride', 'windows')},
            **{k: r['probe'][k] for k in ('probe', 'epochs', 'mlp_ratio', *['fractions'] * ('generalization' in r))},
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


def made(words, folder):
    """The table that the words of a marker ask for."""
    kind, *rest = words
    whole = {'latents-or-pixels': side_by_side, 'cost': cost_table}
    by_system = {'labels': labels_table, 'carried': carried_table}
    if kind == 'table-1':
        return table_one('nano', folder, rest or PROBES)
    if kind in whole and not rest:
        return whole[kind](folder)
    if kind in by_system and len(rest) == 1:
        return by_system[kind](*rest, folder)
    return summary(words, folder)


def with_tables(text, folder):
    """A Markdown text with every table between its markers made anew."""
    table = lambda match: f'{match[1]}\n{made(match[2].split(), folder)}\n{match[3]}'
    return re.sub(r'(<!-- results: ([^>]*) -->)\n.*?(<!-- /results -->)', table, text, flags=re.DOTALL)


def remade(folder):
    """(name of a page, its text, its text with every table made anew) of each."""
    for name in PAGES:
        text = (HERE / name).read_text()
        yield name, text, with_tables(text, folder)


def write_pages(folder):
    """Make every table of the pages anew."""
    for name, text, new in remade(folder):
        if new != text:
            write_text(HERE / name, new)
        print(f'{name}: ' + ('written' if new != text else 'every table is what results/ gives'))


@script
def main(argv=None):
    args, = parse(__doc__, Settings, argv)
    if not args.check:
        return write_pages(HERE / 'results')
    for name, text, new in remade(HERE / 'results'):
        if new != text:
            raise ValueError(f'{name} has other numbers than results/: python report.py writes them')
    print('every table is what results/ gives')


if __name__ == '__main__':
    main()
