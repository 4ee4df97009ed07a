"""
Tables over seeds, in Markdown: those of README.md, docs/notebook.md and results/README.md.

    python -m benchmark.report              # write every table of these pages anew
    python -m benchmark.report --check      # only say whether they are what results/cells/ gives

A table stands between `<!-- results: WORD WORD -->` and `<!-- /results -->`. The words, after
`older` of results/older/:

    NAME NAME                      rows of the benchmark; after `parameters`, with each parameter
    runs LABEL=VALUE NAME NAME     means and medians of test runs; of those with this value, apart
    table-1, cost                  models by systems, beside the paper's numbers; what they cost
    experiment, other-ways         what is predicted and by which loss; more ways, with less to see
    experiment PROBE               the first in short
    compare                        rows of the experiment, two by two
    labels SYSTEM, carried SYSTEM  by the share of labels; at unseen parameters, on spoilt fields
    labels SYSTEM experiment       the first of the experiment's encoders

A number is the mean over seeds ± its standard deviation. `~`: training did not clearly help. The
gain over the same encoder's random weights is less than two standard deviations of that gain.
Brackets: 95% intervals, as eval.interval draws them; of a difference, the same seeds and runs of
both rows are drawn.
"""
import functools
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from common import option, parse, script, write_text
import numpy as np

import model as models
from benchmark.generalize import number
from eval import OF_CLEAN, PROBES, PRODUCTS, SHARED, interval, read_result, without_seed
from systems import system_names
from train import GONE, OF_MACHINE

HERE = Path(__file__).resolve().parent.parent
PAGES = 'README.md', 'docs/notebook.md', 'results/README.md'
PAPER_TABLES = {                            # rows of table 1, of each preset
    'nano': ['jepa-nano-vicreg', 'videomae-nano', 'mpp-nano', 'disco-nano',
             'jepa-nano-short-supervised'],
    'paper': ['jepa-paper', 'videomae-paper', 'mpp-paper', 'disco-paper', 'jepa-paper-supervised'],
    'smoke': ['jepa-smoke', 'videomae-smoke', 'mpp-smoke', 'disco-smoke']}
FEWER = {                                   # encoders that learn from a share of the labels
    'nano': {f'jepa-nano-short-supervised-{n}': n / 100 for n in (1, 2, 5, 10, 20, 50)},
    'paper': {f'jepa-paper-supervised-{n}': n / 100 for n in (10, 50)}, 'smoke': {}}
FEWER_LONGER = {                            # as long as the experiment's; tuned from one of these
    f'jepa-nano-{start}-{n}': n / 100 for n in (10, 20, 50) for start in ('supervised', 'tuned')}
EXPERIMENT = [f'{system}-{row}' for system in system_names() for row in (
    'jepa-nano-next', 'jepa-nano-next-infonce', 'jepa-nano', 'jepa-nano-infonce', 'pixels-nano',
    'jepa-nano-supervised')]
OTHER_WAYS = [f'{system}-{row}' for system in ('active_matter', 'shear_flow') for row in (
    'jepa-nano-vicreg', 'jepa-nano-sigreg', 'jepa-nano-ema', 'jepa-nano-short-supervised',
    'vjepa-nano-block', 'vjepa-nano-random', 'vjepa-nano-temporal', 'videomae-nano',
    'vjepa-nano-supervised')]
IN_WORDS = {'next': 'next 16', 'infonce': 'InfoNCE', 'next-infonce': 'next 16, InfoNCE'}
COMPARED = (                                # two rows, and the one thing in which they differ
    ('jepa-nano-next', 'pixels-nano', 'target: embeddings, pixels'),
    ('jepa-nano-next-infonce', 'pixels-nano', 'target: embeddings (InfoNCE), pixels'),
    ('jepa-nano-next-infonce', 'jepa-nano-next', 'loss: InfoNCE, VICReg (next 16)'),
    ('jepa-nano-infonce', 'jepa-nano', 'loss: InfoNCE, VICReg (other 16)'),
    ('jepa-nano', 'jepa-nano-next', 'view: other 16, next 16 (VICReg)'),
    ('jepa-nano-infonce', 'jepa-nano-next-infonce', 'view: other 16, next 16 (InfoNCE)'),
    ('jepa-nano-infonce', 'jepa-nano-supervised', 'labels: none, all'))

@dataclass
class Settings:
    check: bool = option(False, 'write nothing; exit code 2 if a table is wrong', 'what', bare=True)

def read_cells(folder):
    """{name: eval.json} of all cells SYSTEM-ROW-seedN of a folder, by name."""
    return {path.stem: read_result(path) for path in sorted(Path(folder).glob('*-seed[0-9]*.json'))}

read_older = functools.cache(read_cells)    # many tables are made of them

def seeds_of(cells, name):
    """The cells of all seeds of a row SYSTEM-ROW, or one cell: {name: eval.json}."""
    return {cell: result for cell, result in cells.items()
            if cell == name or re.fullmatch(f'{name}-seed[0-9]+', cell)}

def read_records(cells, names, variants=True):
    """{system: {title: {seeds: record}}} of the encoders of those rows that have results.

    A record: `error` {column: {probe: error}}; `labels`, `values`, `inputs` of --generalize, alike;
    `by_run`; of a trained encoder the eval.json as `result`. variants: titles say how rows differ.
    Raises ValueError for results that one table cannot compare.
    """
    found, seen = {}, {}
    for name in names:
        for cell, result in seeds_of(cells, name).items():
            check_alike(cell, result, seen)

            # the title of what was trained: model, variant (unless its name has it), start
            variant = cell.rpartition('-seed')[0].partition('-nano')[2].lstrip('-')
            if not variants or result['row'].endswith(variant.rpartition('-')[2]):
                variant = ''
            start = result['run']['settings'].get('init')
            # and its words
            variant = IN_WORDS.get(variant, variant)
            start = without_seed(Path(start).name) if start else ''
            title = ', '.join(filter(None, [result['row'], variant, start and f'from {start}']))
            add_records(found.setdefault(name.partition('-')[0], {}), cell, result, title)
    return found

def paper_records(cells, preset='nano'):
    """The same of the rows of table 1."""
    names = [f'{system}-{row}' for system in system_names() for row in PAPER_TABLES[preset]]
    return read_records(cells, names, variants=False)

def check_alike(cell, result, seen):
    """Raise ValueError if a result is unlike the first of its table, or the first of its row.

    seen: {what was compared: its settings}. A setting that a result does not have is not compared.
    """
    if result['split'] != 'test':
        raise ValueError(f'{cell}.json was not scored on test: python eval.py --split test')

    # all results of a table were probed alike; those of a row differ in seeds and folders alone
    probe, free = result['probe'], {'seed', *GONE, *OF_MACHINE}
    table = {k: result[k] for k in ('system', 'labels', 'stride', 'windows')}
    table |= {k: v for k, v in probe.items()
              if k in ('probe', 'epochs', 'mlp_ratio', 'fractions', 'ridge', 'k', 'metric')}
    table['field'] = result['field'].partition(',')[0]                   # in tiles or not
    row = result['run']['settings'] | {k: probe.get(k) for k in ('finetune', 'finetune_lr')}
    row['on noise'] = probe.get('noise', -1.0)
    row['init'] = without_seed(row.get('init') or '')                    # it has this seed, too
    row = {k: v for k, v in row.items() if k not in free}

    for name, settings in {cell.partition('-')[0]: table, cell.rpartition('-')[0]: row}.items():
        first = seen.setdefault(name, settings)
        for k, value in settings.items():
            if value != first.get(k, value):
                raise ValueError(f'{cell}.json: {k} is {value}; in the first of {name}: {first[k]}')

def add_records(records, cell, result, own):
    """Add those of a cell: of the encoder with the title `own`, its random weights, statistics.

    Raises ValueError if other errors, or those of another training, have the same place.
    """
    model = result['row'].partition(',')[0]
    floors = [f'random {what}{how}' for what in ('init', 'features') for how in ('', OF_CLEAN)]
    for encoder, by_run in result['by_run'].items():
        rows = result['rows'][encoder]
        errors = {c: {p: rows[p][c] for p in rows} for c in (*result['labels'], 'mean')}
        new, seeds = {'by_run': by_run, 'error': errors}, tuple(result['seeds'].values())

        # statistics belong to the data; variants of a model begin with the same weights
        title, floor = f'{own}: {encoder}', f'{model}: {encoder}'
        begun = records.get(floor, {}).get(seeds, new)
        if encoder.startswith(result['row']):
            title = own + encoder.removeprefix(result['row'])
        elif encoder in SHARED:
            title, seeds = encoder, (result['seeds']['data'],)
        elif encoder in floors and begun | new == begun:
            title = floor

        # these stand in a table once, and all cells must agree
        if encoder != 'predict the mean':
            record = records.setdefault(title, {}).setdefault(seeds, new)
            alone = encoder not in (*SHARED, *floors)                    # one training, one place
            if record | new != record or alone and record is not new:
                raise ValueError(f'{cell}.json: there is another result of {title} with these '
                                 f'seeds, perhaps of other data')
            record |= result.get('generalization', {}).get(encoder, {})
            if encoder == result['row']:
                record['result'] = result

def errors_of(records, title, probe, column='mean', kind='error'):
    """The errors of all seeds."""
    found = [record.get(kind, {}).get(column, {}) for record in records.get(title, {}).values()]
    return [errors[probe] for errors in found if probe in errors]

def columns_of(records, kind):
    """All columns of a kind: of `error` the parameters, of `labels` the shares."""
    every = [record for seeds in records.values() for record in seeds.values()]
    return list(dict.fromkeys(column for record in every for column in record.get(kind, {})))

def results_of(records, title):
    """The eval.json of each seed of an encoder that was trained."""
    return [one['result'] for one in records.get(title, {}).values() if 'result' in one]

def floor_of(title, records):
    """The title of the random weights that an encoder began with, fine-tuned if it was."""
    model, comma, rest = title.partition(',')
    if rest.endswith(OF_CLEAN):
        return f'{model}: random init{OF_CLEAN}'
    tuned = f'{model}: random init{comma}{rest}'
    return tuned if tuned in records else f'{model}: random init'

def no_better(errors, random):
    """Are errors of several seeds not below those of random weights, by two standard deviations?"""
    if min(len(errors), len(random)) < 2:
        return False
    spread = np.hypot(np.std(random, ddof=1), np.std(errors, ddof=1))
    return bool(np.mean(random) - np.mean(errors) < 2 * spread)

def show(errors):
    """Mean and standard deviation over seeds."""
    spread = f' ± {number(np.std(errors, ddof=1))}' if len(errors) > 1 else ''
    return number(np.mean(errors)) + spread if errors else '-'

def show_error(records, title, probe, column='mean'):
    """The same of an encoder, with `~` if it is no better than its random weights."""
    errors = errors_of(records, title, probe, column)
    floor = errors_of(records, floor_of(title, records), probe, column)
    return show(errors) + (' ~' if no_better(errors, floor) else '')

def markdown(table):
    """Of {head: texts of its column}."""
    lines = [f'| {" | ".join(texts)} |' for texts in (table, *zip(*table.values()))]
    return '\n'.join([lines[0], '|---' * len(table) + '|', *lines[1:]])

def order_titles(titles, marks=(', fine-tuned', 'supervised', ', with products', 'random init',
                                'random features', 'field statistics')):
    """Each title once: first those without a mark, then by the last of the marks in them."""
    def place(title):
        return max((i + 1 for i, mark in enumerate(marks) if mark in title), default=0)
    return sorted(dict.fromkeys(titles), key=place)

def summary(cells, names):
    """Some rows: an error of each probe, and its 95% interval over the runs of the test split."""
    rows = [name for name in names if name != 'parameters']
    for name in rows:
        if not seeds_of(cells, name):
            raise ValueError(f'no results of {name}: python -m benchmark.cells {name} makes them')
    records, = read_records(cells, rows).values()
    if 'parameters' not in names:                                        # in short
        records = {t: own for t, own in records.items() if not t.endswith((PRODUCTS, 'own head'))}
    results = [results_of(records, title) for title in records]          # [] of random weights
    table = {results[0][0]['system']: records, 'seeds': [str(len(own)) for own in records.values()]}
    windows = [own[0]['run']['windows_seen'] if own else '-' for own in results]
    table['windows seen'] = [n if n == '-' else f'{n:,}' for n in windows]

    # errors; of the mean, the interval as well
    columns = columns_of(records, 'error') if 'parameters' in names else ['mean']
    for p, column in product(PROBES, columns):
        texts = [show_error(records, title, p, column) for title in records]
        for i, own in enumerate(records.values()):
            if column == 'mean' and texts[i] != '-':
                errors = [one['by_run'][p] for one in own.values()]      # of each seed
                texts[i] += ' [{:.3f}, {:.3f}]'.format(*interval(errors))
        table[p if columns == ['mean'] else f'{p}: {column}'] = texts
    return markdown(table)

def by_runs(cells, value, names):
    """Of each row and probe: the mean, and the median of the test runs; means of the runs with a
    value of a label, 'alpha=-1', and of the others. Each is a mean over seeds, with its spread."""
    records, = read_records(cells, names).values()
    label, _, number_of = value.partition('=')
    first = next(r for title in records for r in results_of(records, title))
    apart = np.isclose(first['labels_by_run'][label], float(number_of))  # (R,)
    columns = {'mean': np.mean, 'median': np.median,
               f'{label} {number_of}': lambda e: e[apart].mean(),
               'others': lambda e: e[~apart].mean()}

    table = {first['system']: list(records)}
    for p, (name, take) in product(PROBES, columns.items()):
        table[f'{p}: {name}'] = texts = []
        for own in records.values():
            errors = [np.array(one['by_run'][p]) for one in own.values() if p in one['by_run']]
            texts.append(show([take(e) for e in errors]))
    return markdown(table)

def compare(cells):
    """Differences of errors, first minus second, of rows of the experiment: the mean over seeds
    and its interval, `~` if zero is in it. By run: both rows have the same runs."""
    table = {'first, second': [f'{first}, {second}' for first, second, _ in COMPARED],
             'differ in': [what for *_, what in COMPARED]}
    for system, p in product(system_names(), PROBES):
        texts = []
        for first, second, _ in COMPARED:
            one, other = (errors_by_run(cells, f'{system}-{row}', p) for row in (first, second))
            both = sorted(one.keys() & other.keys())                     # seeds
            texts.append(show_gap([one[seed] - other[seed] for seed in both]))
        if any(text != '-' for text in texts):
            table[f'{system}: {p}'] = texts
    return markdown(table)

def errors_by_run(cells, name, probe):
    """{seed: errors of the test runs (R,)} of the trained encoder of a row SYSTEM-ROW."""
    results = seeds_of(cells, name).values()
    return {r['seeds']['training']: np.array(r['by_run'][r['row']][probe]) for r in results}

def show_gap(gaps):
    """The mean of differences by run, of each seed (R,), and its interval."""
    if not gaps:
        return '-'
    low, high = interval(gaps)
    mark = ' ~' if low <= 0 <= high else ''
    return f'{np.mean([np.mean(gap) for gap in gaps]):+.3f} [{low:+.3f}, {high:+.3f}]{mark}'

def side_by_side(cells, rows, probes=PROBES):
    """What was predicted, by system. Effective rank: of how many channels of the mean tokens.
    probes: one of them makes a short table, of what that probe has read."""
    found, titles = read_records(cells, rows), {}
    for title in order_titles([title for records in found.values() for title in records],
                              ('supervised', ', with products', 'random init', 'random features',
                               'field statistics')):
        # encoders of two models may begin with the same weights
        errors = [errors_of(records, title, p) for records in found.values() for p in probes]
        if any(errors):
            titles.setdefault(str(errors), title)

    table, ranks = {'': titles.values()}, []
    for system, records in found.items():
        for p in probes:
            head = f'{system}: {p}' if probes == PROBES else system
            table[head] = [show_error(records, title, p) for title in titles.values()]
        ranks.append([])                                                 # of this system
        for title in titles.values():
            own = [r['rank'] for r in results_of(records, title) if r.get('rank')]
            mean = np.mean([rank['effective'] for rank in own]) if own else 0
            ranks[-1].append(f'{mean:.1f} of {own[0]["of"]}' if own else '-')
    if probes == PROBES:
        table['effective rank'] = [' / '.join(texts) for texts in zip(*ranks)]
    return markdown(table)

def table_one(cells, preset='nano'):
    """Models by systems, with the paper's numbers, which are on valid of The Well."""
    found = paper_records(cells, preset)
    titles = [models.title(row.partition('-')[0]) + (', supervised' if 'supervised' in row else '')
              for row in PAPER_TABLES[preset]]
    published = {}
    for name, errors in models.PUBLISHED.items():
        tuned = ', fine-tuned' if name in models.FINETUNED_IN_PAPER else ''
        published |= {(models.title(name) + tuned, system): f'{error:.3f}'
                      for system, error in errors.items()}

    # each model of the table, made or not, and what its cells found besides
    titles = order_titles(titles + [title for records in found.values() for title in records])
    table = {'': [*titles, 'predict the mean']}
    for system, records in found.items():
        plain = [t.replace('fine-tuned as in the paper', 'fine-tuned') for t in titles]
        table[f'{system}: the paper'] = [published.get((t, system), '-') for t in plain] + ['-']
        for p in PROBES:
            table[f'{system}: {p}'] = [show_error(records, t, p) for t in titles] + ['1']
    return markdown(table)

def label_curves(cells, system, preset='nano'):
    """{(title, probe): {share of the labels: errors of the seeds}}, of probes and encoders alike.

    An encoder trained with labels has its own share of them: `from scratch`. Where that was
    measured, the same random weights have errors of the attentive probe, too.
    """
    if preset == 'experiment':
        every, rows = read_records(cells, EXPERIMENT), FEWER_LONGER
    else:
        every, rows = paper_records(cells, preset), FEWER[preset]

    of_share, curves = {1.0: every.get(system, {})}, {}
    for row, share in rows.items():
        records = read_records(cells, [f'{system}-{row}'], False).get(system, {})
        of_share.setdefault(share, {}).update(records)
    fewer = {title for share, records in of_share.items() for title in records if share < 1}

    for share, records in of_share.items():
        titles = [t for t in records if not t.endswith((PRODUCTS, 'its own head'))]
        for title, p in product(titles, PROBES):
            # what was trained with so many labels
            own, name = {share: errors_of(records, title, p)}, title
            if 'supervised' in title:
                name = title if 'from' in title else f'{title}, from scratch'

            # else probes that had a share of the labels
            elif not (p == 'attentive' and 'random init' in title and title in fewer):
                own = {float(column): errors_of(records, title, p, column, 'labels')
                       for column in columns_of(records, 'labels') if share == 1}
            for column, errors in own.items():
                if errors:
                    curves.setdefault((name, p), {})[column] = errors

    # the experiment's encoders begin with the same weights
    titles = order_titles(title for title, _ in curves)
    if preset == 'experiment':
        titles = [t for t in titles if not t.startswith('pixels: random')]
    return {(t, p): curves[t, p] for t in titles for p in PROBES if (t, p) in curves}

def labels_table(cells, system, preset='nano'):
    """`label_curves`: a row for each encoder and two probes."""
    curves = label_curves(cells, system, preset)
    shown = ('linear', 'knn') if preset == 'experiment' else ('attentive', 'linear')
    rows = [(title, p) for title, p in curves if p in shown]
    table = {system: [title for title, _ in rows], 'probe': [p for _, p in rows]}
    for share in sorted({share for curve in curves.values() for share in curve}):
        table[f'{share:.0%}'] = [show(curves[row].get(share, [])) for row in rows]
    return markdown(table)

def carried_table(cells, system, preset='nano'):
    """Errors at values held out from the probe (of one that saw them), and on spoilt fields."""
    records = paper_records(cells, preset).get(system, {})
    rows = [(title, p) for title, p in product(order_titles(records), ('attentive', 'linear'))
            if errors_of(records, title, p, 'half resolution', 'inputs')]
    table = {system: [title for title, _ in rows], 'probe': [p for _, p in rows]}

    for values in columns_of(records, 'values'):
        # an encoder trained with labels was told these values
        table[values] = ['-'] * len(rows)
        for i, (title, p) in enumerate(rows):
            pairs = errors_of(records, title, p, values, 'values')
            if pairs and 'supervised' not in title:
                seen = number(np.mean([seen for _, seen in pairs]))
                table[values][i] = f'{show([unseen for unseen, _ in pairs])} ({seen})'

    table['all values, clean'] = [show(errors_of(records, *row, '1', 'labels')) for row in rows]
    for how in columns_of(records, 'inputs'):
        table[how] = [show(errors_of(records, *row, how, 'inputs')) for row in rows]
    return markdown(table)

def cost_table(cells, preset='nano'):
    """Means over seeds, from the least to the most over the systems."""
    found, runs = paper_records(cells, preset).values(), {}
    for title in order_titles(title for records in found for title in records):
        each = [[r for r in results_of(records, title) if r.get('cost')] for records in found]
        if any(each):
            runs[title] = [results for results in each if results]

    def column(form, cost_of, mean=np.mean):
        costs = [[mean([cost_of(r) for r in results]) for results in runs[title]] for title in runs]
        ends = [[format(min(each), form), format(max(each), form)] for each in costs]
        return [' to '.join(dict.fromkeys(both)) for both in ends]

    # the median of the minutes: a run may have been paused
    return markdown({
        '': runs, 'parameters of the encoder': column(',.0f', lambda r: r['parameters']['encoder']),
        'windows seen': column(',.0f', lambda r: r['run']['windows_seen']),
        'GFLOP a window': column('.3f', lambda r: r['cost']['gflop_per_window']),
        'TFLOP in all': column('.1f', lambda r: r['cost']['gflop_per_window'] / 1e3
                                                * r['run']['windows_seen']),
        'minutes': column('.0f', lambda r: r['run']['train_seconds'] / 60, np.median),
        'peak GB': column('.1f', lambda r: r['run']['memory_gb'])})

def make_table(words, cells):
    """The table that the words of a marker ask for."""
    kind, *rest = words
    if kind == 'older':
        return make_table(rest, read_older(HERE / 'results' / 'older'))
    tables = {('table-1', 0): table_one, ('cost', 0): cost_table, ('labels', 1): labels_table,
              ('labels', 2): labels_table, ('carried', 1): carried_table, ('compare', 0): compare}

    # with words of their own
    if kind in ('experiment', 'other-ways'):
        return side_by_side(cells, EXPERIMENT if kind == 'experiment' else OTHER_WAYS,
                            tuple(rest) or PROBES)
    if kind == 'runs':
        return by_runs(cells, rest[0], rest[1:])
    table = tables.get((kind, len(rest)))
    return table(cells, *rest) if table else summary(cells, words)

def with_tables(text, cells):
    """A Markdown text with every table between its markers made anew."""
    def table(match):
        return f'{match[1]}\n{make_table(match[2].split(), cells)}\n{match[3]}'
    marked = r'(<!-- results: ([^>]*) -->)\n.*?(<!-- /results -->)'
    return re.sub(marked, table, text, flags=re.DOTALL)

def write_pages(cells, check=False):
    """Make every table of the pages anew. check: only raise ValueError if one is not as it was."""
    for name in PAGES:
        text = (HERE / name).read_text()
        new = with_tables(text, cells)
        if new != text and check:
            raise ValueError(f'{name} has other numbers than results/: '
                             f'python -m benchmark.report writes them')
        if new != text:
            write_text(HERE / name, new)
            print(f'{name}: written')
    print('every table is what results/ gives')

@script
def main(argv=None):
    args, = parse(__doc__, Settings, argv)
    write_pages(read_cells(HERE / 'results' / 'cells'), args.check)

if __name__ == '__main__':
    main()
