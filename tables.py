"""
Tables of errors as eval.py prints them: of one or several runs of a system, and the paper's table 1.
"""
import numpy as np

PROBES = 'attentive', 'linear', 'knn'
PUBLISHED = ', the paper (valid)'                                        # ends the name of a published row
SHARED = 'field statistics', 'predict the mean'                          # rows that do not depend on the run


def interval(by_run, draws=2000):
    """95% bootstrap interval of the mean of errors by run, (R,): runs, not their windows, are drawn anew."""
    by_run = np.asarray(by_run)
    drawn = by_run[np.random.default_rng(0).integers(len(by_run), size=(draws, len(by_run)))].mean(1)
    return np.quantile(drawn, [0.025, 0.975]).tolist()


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


def number(error):
    """An error in a table: a probe that extrapolates may be far off."""
    return f'{error:.3f}' if error < 100 else f'{error:,.0f}'


def print_carried(result):
    """What eval.json says of `generalization`: a line for each encoder and probe."""
    rows = {}
    for title, carried in result['generalization'].items():
        for p in PROBES:
            if p in carried['labels']['1']:
                shares = {f'{float(share):.0%}': number(by[p]) for share, by in carried['labels'].items()}
                pairs = {where: by[p] for where, by in carried['values'].items() if p in by}
                pairs = {where: f'{number(own)} ({number(seen)})' for where, (own, seen) in pairs.items()}
                rows[f'{title}, {p}'] = shares | pairs | {how: number(by[p]) for how, by in carried['inputs'].items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    widths = {c: max(len(c), *(len(row.get(c, '-')) for row in rows.values())) + 2 for c in columns}
    name = max(map(len, rows)) + 2
    print(f'\n{result["row"]}: means over parameters, by the share of training {result["probe"]["fractions"]} with '
          f'labels; at values unseen by the probe (seen); on spoilt fields\n')
    print(' ' * name + ''.join(f'{c:>{widths[c]}}' for c in columns))
    for title, row in rows.items():
        print(f'{title:{name}}' + ''.join(f'{row.get(c, "-"):>{widths[c]}}' for c in columns))


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
