"""
All runs of all tables, with several seeds. It ends in the tables.

    python -m benchmark.cells --dry-run                     # what is missing
    python -m benchmark.cells                               # all that has a table, three seeds
    python -m benchmark.cells paper-tables                  # a part, a row, or one cell:
    python -m benchmark.cells active_matter-mpp-nano
    python -m benchmark.cells active_matter-mpp-nano-seed0
    python -m benchmark.cells --preset paper --data-dir B   # the paper's sizes, The Well's files

Parts: paper-tables, fewer-labels; of nano also experiment, other-ways, few-or-tuned, noise. A cell
SYSTEM-ROW-seedN is one training with one seed, and its errors on test. simulate.py (each seed has
its own data), train.py and eval.py make it in rows/CELL, and go on where they were interrupted. The
result goes to results/cells/CELL.json; with today's settings it is not made again. Each of --jobs
has one CPU core (or OMP_NUM_THREADS). After a change of code, delete rows/ and results/cells/.
"""
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from common import alone_in, at_least, data_folder, option, parse, say, script, write_text
import torch

import eval as evaluation
import model as models
import train
from benchmark import report, speed
from data import find_dataset
from systems import system_names

ROWS = {                                    # after SYSTEM-: flags of train.py
    # the experiment: what is predicted, and how a constant is prevented; 76,800 windows each
    'jepa-nano': '--model jepa', 'jepa-nano-next': '--model jepa --views paired',
    'jepa-nano-infonce': '--model jepa --loss infonce',
    'jepa-nano-next-infonce': '--model jepa --loss infonce --views paired',
    'pixels-nano': '--model pixels', 'jepa-nano-supervised': '--model jepa --supervised',
    # a third of them, 25,600
    'jepa-nano-vicreg': '--model jepa --steps 800',
    'videomae-nano': '--model videomae --steps 800',
    'mpp-nano': '--model mpp --steps 1600 --lr 1e-2',
    'disco-nano': '--model disco --steps 1600',
    'jepa-nano-short-supervised': '--model jepa --steps 800 --supervised',
    # as many: other ways
    'jepa-nano-sigreg': '--model jepa --steps 800 --loss sigreg --standardize false '
                        '--sigreg-coeff 0.05',
    'jepa-nano-ema': '--model jepa --steps 800 --target ema --cov-coeff 0',
    'vjepa-nano-supervised': '--model vjepa --steps 3200 --supervised',
    # `paper` trains MPP and DISCO from nothing: for published weights, add --init FILE --steps 0
    'jepa-paper-supervised': '--model jepa --preset paper --supervised',
}
for masks in 'block', 'random', 'temporal':
    ROWS[f'vjepa-nano-{masks}'] = f'--model vjepa --steps 3200 --masks {masks}'
for model in 'jepa', 'videomae', 'mpp', 'disco':
    for preset in 'paper', 'smoke':
        ROWS[f'{model}-{preset}'] = f'--model {model} --preset {preset}'
for preset, length in ('nano', 'steps 800'), ('paper', 'preset paper'):
    for row, share in report.FEWER[preset].items():
        ROWS[row] = f'--model jepa --{length} --supervised --label-fraction {share}'

for row, share in report.FEWER_LONGER.items():                           # the tuned: not as long
    few, shorter = f'--model jepa --supervised --label-fraction {share}', ' --steps 800 --lr 1e-3'
    ROWS[row] = few + shorter if 'tuned' in row else few
ROWS |= {'jepa-nano-noise': '--model jepa --noise 0.3',
         'jepa-nano-infonce-noise': '--model jepa --loss infonce --noise 0.3'}
STARTS_FROM = {row: 'jepa-nano-infonce' for row in report.FEWER_LONGER if 'tuned' in row}
SCORED_AGAIN = {                            # the run of another row, scored in another way
    'jepa-nano-at-noise': 'jepa-nano', 'jepa-nano-infonce-at-noise': 'jepa-nano-infonce'}
ROWS |= {row: ROWS[trained] for row, trained in SCORED_AGAIN.items()}

SCORED = {                                  # flags of eval.py, where there are any
    'mpp-nano': '--finetune 5 --finetune-lr 1e-3', 'mpp-paper': '--finetune paper',
    'jepa-smoke': '--epochs 5', 'videomae-smoke': '--epochs 5', 'disco-smoke': '--epochs 5',
    'mpp-smoke': '--epochs 5 --finetune 1',
    **dict.fromkeys(('jepa-nano-vicreg', 'videomae-nano', 'jepa-nano-short-supervised',
                     'jepa-paper', 'videomae-paper', 'jepa-paper-supervised'), '--generalize'),
    **dict.fromkeys(('jepa-nano', 'jepa-nano-next', 'jepa-nano-infonce', 'jepa-nano-next-infonce',
                     'pixels-nano', 'jepa-nano-supervised'), '--generalize labels'),
    **dict.fromkeys(('jepa-nano-noise', 'jepa-nano-infonce-noise', *SCORED_AGAIN), '--noise 0.3')}

def everywhere(rows):
    return [f'{system}-{row}' for system in system_names() for row in rows]

GROUPS = {preset: {'paper-tables': everywhere(report.PAPER_TABLES[preset]),      # {part: its rows}
                   'fewer-labels': everywhere(report.FEWER[preset])} for preset in report.FEWER}
TWO = 'active_matter', 'shear_flow'
GROUPS['nano'] |= {
    'experiment': report.EXPERIMENT, 'other-ways': report.OTHER_WAYS,
    'few-or-tuned': [f'{s}-{row}' for s in TWO for row in report.FEWER_LONGER],
    'noise': [f'{s}-{row}{how}' for s in TWO for row in ('jepa-nano', 'jepa-nano-infonce')
              for how in ('-at-noise', '-noise')]}
ONE_AT_A_TIME = threading.Lock()            # PyTorch's generator and its counter of FLOP are global

@dataclass
class Settings:
    preset: str = option('nano', 'nano; paper, on data that are there; smoke: does it run?', 'what')
    seeds: int = option(3, 'how many: 0, 1, ..', 'what')
    dry_run: bool = option(False, 'only say what is missing', 'what', bare=True)
    data_dir: str = option('', 'datasets of --preset paper (default: as train.py)', 'machine')
    results: str = option('results/cells', 'folder of the results', 'machine')
    jobs: int = option(0, 'cells at once; 0: one for each CPU core, or one on a GPU', 'machine')

# --- a cell
def find_cell(name, args):
    """A cell by its name SYSTEM-ROW-seedN: its files, and the commands that make it.

    Raises ValueError if there is no such row.
    """
    start, _, seed = name.rpartition('-seed')
    system, _, row = start.partition('-')
    if system not in system_names() or row not in ROWS or not seed.isdigit():
        raise ValueError(f'no row {start or name!r}: --help lists the parts; a row is a system, '
                         f'{", ".join(system_names())}, a dash and one of {", ".join(ROWS)}')

    # nano and smoke have data of their own for each seed
    preset = next((p for p in ('paper', 'smoke') if p in row.split('-')), 'nano')
    data = {'nano': f'data/seed{seed}', 'smoke': f'data/seed{seed}-smoke',
            'paper': str(data_folder(args.data_dir))}[preset]
    run = Path('rows', f'{system}-{SCORED_AGAIN.get(row, row)}-seed{seed}')
    seeded, folder, start, init = ['--seed', seed], ['--data-dir', data], None, []
    if row in STARTS_FROM:
        start = find_cell(f'{system}-{STARTS_FROM[row]}-seed{seed}', args)
        init = ['--init', str(start.run)]

    return SimpleNamespace(
        name=name, system=system, seed=int(seed), preset=preset, data=data, run=run, start=start,
        result=Path(args.results, f'{name}.json'),
        simulate=['simulate.py', system, '--preset', preset, *seeded, *folder],
        train=['train.py', '--data', system, *ROWS[row].split(), *init, *seeded, *folder,
               '--out', str(run)],
        evaluate=['eval.py', str(run), '--split', 'test', *SCORED.get(row, '').split(), *folder])

def find_cells(names, args):
    """The cells of parts, rows and cells by name, each once; no names: all of the preset."""
    if args.preset not in GROUPS:
        raise ValueError(f'unknown preset {args.preset!r}: choose from {", ".join(GROUPS)}')
    groups = GROUPS[args.preset]
    rows = [row for name in names or groups for row in groups.get(name, [name])]
    cells = [row if '-seed' in row else f'{row}-seed{k}' for k in range(args.seeds) for row in rows]
    return [find_cell(name, args) for name in dict.fromkeys(cells)]

def as_json(settings):
    """Settings as a JSON file gives them back."""
    return json.loads(json.dumps(settings))

def settings_of(cell):
    """What its train.py and eval.py are run with: [{name: value}, {name: value}]."""
    c, _, options = train.parse(cell.train[1:], '', missing=True)
    scored, _ = parse('', evaluation.Settings, cell.evaluate[1:], runs=dict(nargs='*'))
    return as_json([vars(c) | vars(options), {k: getattr(scored, k) for k in evaluation.TUNED}])

def why_stale(cell, result):
    """Which settings of a result are not the cell's: ('training' or 'scoring', in words).

    ('', '') if all are. A setting that is younger than the result had its default there. Folders
    may differ, and what concerns the machine alone, as the paper's micro-batch.
    """
    free = {*train.OF_MACHINE, *(['micro_batch'] if cell.preset == 'paper' else [])}
    run, (trained, scored) = result['run']['settings'], settings_of(cell)
    options = models.find_model(run['model']).Options
    defaults = as_json(vars(train.Config()) | vars(options()) | vars(evaluation.Settings()))

    for what, now, then in ('training', trained, run), ('scoring', scored, result['probe']):
        then = defaults | then
        differs = [f'{name} {then[name]}, now {value}' for name, value in now.items()
                   if name not in free and then.get(name) != value]
        if differs:
            return what, ', '.join(differs)
    return '', ''

def progress(cell):
    """(step that its training has reached, steps, what of the run's settings differs)."""
    if not (cell.run / 'ckpt.pt').exists():
        return 0, 1, ''
    state = models.load_checkpoint(cell.run / 'ckpt.pt')
    there = {'settings': as_json(state['config'] | state['options'])}
    differs = why_stale(cell, {'run': there, 'probe': settings_of(cell)[1]})[1]
    return state['step'], state['steps'], differs

def what_is_missing(cell):
    """(what is to be done: '', 'scoring' or 'training'; why, in words)."""
    words = []
    if cell.result.exists():
        words = [f'stale: {why_stale(cell, evaluation.read_result(cell.result))[1]}']
        if words == ['stale: ']:
            return '', ''
    step, steps, differs = progress(cell)                                # of its training
    if differs:
        words.append(f'delete {cell.run} first, a run of other settings: {differs}')
    elif step:
        words.append(f'trained to step {step} of {steps}')
    return 'scoring' if step == steps and not differs else 'training', '; '.join(words)

# --- making cells
def make(cell, log, stop):
    """Run the commands of a cell, which do nothing if it is done, and keep its eval.json -> that.

    log: a file for what they print, or None. stop: an Event; if it is set, no command is run.
    Raises ValueError if a command fails, or if there is a run of other settings.
    """
    def execute(command):
        if stop.is_set():                                                # Ctrl-C
            raise ValueError('interrupted')
        print('$ python', *command, file=log, flush=True)
        done = subprocess.run([sys.executable, report.HERE / command[0], *command[1:]], stdout=log,
                              stderr=log, env={'OMP_NUM_THREADS': '1', **os.environ})
        if done.returncode:                                              # it has said why
            where = f': {log.name} says why' if log else ''
            raise ValueError(f'python {" ".join(command)} failed{where}')

    def train_it(cell):
        if differs := progress(cell)[2]:
            raise ValueError(f'{cell.run} is a run of other settings ({differs}): delete it')
        if cell.preset != 'paper':
            execute(cell.simulate)
        execute(cell.train)

    def nobody_else(cell):
        lock = cell.run.with_name(f'{cell.run.name}.lock')
        lock.touch()
        return alone_in(lock)

    with nobody_else(cell):
        if cell.start:                                                   # its encoder at the start
            with nobody_else(cell.start):
                train_it(cell.start)
        train_it(cell)

        # score, unless that was done since, in the same way
        table, result = cell.run / 'eval.json', {}
        if table.exists() and table.stat().st_mtime >= (cell.run / 'ckpt.pt').stat().st_mtime:
            with suppress(ValueError):
                result = evaluation.read_result(table)
        if result.get('split') != 'test' or why_stale(cell, result)[0]:
            execute(cell.evaluate)
            result = evaluation.read_result(table)

        # other data may lie there
        if cell.preset != 'paper' and set(result['seeds'].values()) != {cell.seed}:
            raise ValueError(f'{table} is of other seeds, {result["seeds"]}: delete {cell.data}')

        # what it cost: counted for a micro-batch, or for two of the paper's large windows
        c, _, options = train.parse([*cell.train[1:], '--device', 'cpu'], '', missing=True)
        c.batch = c.micro_batch = 2 if cell.preset == 'paper' else c.micro_batch
        with ONE_AT_A_TIME:
            result['cost'] = {'gflop_per_window': speed.gflop_per_window(c, options)}
        cell.result.parent.mkdir(parents=True, exist_ok=True)
        write_text(cell.result, json.dumps(result, indent=1))
    return result

def make_all(cells, jobs):
    """Make the cells, `jobs` at once -> {name of a cell: why it failed}."""
    failed, done, stop = {}, [], threading.Event()

    def work(cell):
        try:
            cell.run.parent.mkdir(exist_ok=True)                         # rows/
            log_file = cell.run.with_name(f'{cell.name}.log')
            with open(log_file, 'a') if jobs > 1 else nullcontext() as log:
                say(f'{cell.name}: starts')
                result = make(cell, log, stop)
            errors = result['rows'][result['row']]
            words = ', '.join(f'{p} {error["mean"]:.3f}' for p, error in errors.items())
        except Exception as e:                                           # the others go on
            failed[cell.name] = words = f'failed, {e}'

        done.append(cell)
        say(f'{cell.name}: {words}. {len(done)} of {len(cells)}')

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(work, cells))
        finally:
            stop.set()
    return failed

def tables_of(names, preset, results):
    """Markdown of the parts (none: all of the preset), rows and cells that were asked for."""
    groups, tables = GROUPS[preset], []
    asked = names or [*groups]
    if {'paper-tables', 'fewer-labels'} & {*asked}:
        tables += [report.table_one(results, preset), report.cost_table(results, preset)]
        for system in sorted({result['system'] for result in results.values()}):
            tables += [report.labels_table(results, system, preset),
                       report.carried_table(results, system, preset)]

    for part in [part for part in ('experiment', 'other-ways') if part in asked]:
        tables.append(report.side_by_side(results, groups[part]))
        tables += [report.compare(results)] if part == 'experiment' else []
    apart = 'paper-tables', 'fewer-labels', 'experiment', 'other-ways'
    rows = [row for name in asked if name not in apart for row in groups.get(name, [name])]
    tables += [report.summary(results, [row]) for row in rows if report.seeds_of(results, row)]
    return '\n\n'.join(tables)

@script
def main(argv=None):
    args, names = parse(__doc__, Settings, argv, names=dict(
        nargs='*', help='parts, rows or cells (default: all)'))
    at_least(args, 1, 'seeds')
    at_least(args, 0, 'jobs')

    # what is missing? the paper's sizes are for The Well's files
    cells, todo = find_cells(names, args), []
    for cell in cells:
        if cell.preset == 'paper':
            find_dataset(cell.system, cell.data)

        what, why = what_is_missing(cell)
        if what:
            todo.append(cell)
            print(f'{cell.name}: {what}' + (f' ({why})' if why else ''))
    print(f'{len(cells) - len(todo)} of {len(cells)} cells are there.')
    if args.dry_run:
        return

    # make it, and the tables
    failed = make_all(todo, args.jobs or (1 if torch.cuda.is_available() else os.cpu_count()))
    results = report.read_cells(args.results)
    print(tables_of(names, args.preset, results))
    if Path(args.results).resolve() == report.HERE / 'results' / 'cells':
        report.write_pages(results)
    if failed:
        raise ValueError('; '.join(f'{name}: {why}' for name, why in failed.items()))

if __name__ == '__main__':
    main()
