"""
The tables, with error bars: makes what is missing of data, runs and results, and ends in the tables.

    python benchmark.py --dry-run                        # what is missing, and how long it will take
    python benchmark.py                                  # everything that has a table, three seeds
    python benchmark.py paper-tables                     # a part of it (below), a row, or one cell of a row:
    python benchmark.py active_matter-mpp-nano
    python benchmark.py active_matter-mpp-nano-seed0
    python benchmark.py --preset paper --data-dir B      # the paper's own sizes, on The Well's files; for GPUs

A cell is SYSTEM-ROW-seedN: one training with one seed, and its errors on test. It is made in rows/ and, when it is
complete, copied to results/; a cell that is there and of today's settings is not made again. What is interrupted goes
on. A cell whose settings are others than its row's is stale, and is made anew; what its run had found is kept beside
it, as rows/CELL.old. A seed changes the data as well, where they are simulated (data/seedN).

--jobs cells are made at once. Each has one CPU core, as ours had (else OMP_NUM_THREADS says), so that numbers do not
depend on the jobs; with GPUs each has its share of them. After a change of code, delete rows/ and results/.
"""
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from common import alone_in, at_least, data_folder, option, parse, say, script, write_text

import torch

import bench_steps
import config
import eval as evaluation
import model as models
import report
from data import find_dataset
from rows import GROUPS, ROWS, SCORED
from systems import system_names

HERE = Path(__file__).resolve().parent
COUNTING = threading.Lock()


@dataclass
class Settings:
    preset: str = option('nano', 'nano, or paper, on data that are there; smoke: does it run at all?', 'what')
    seeds: int = option(3, 'how many: 0, 1, ..', 'what')
    dry_run: bool = option(False, 'only say what is missing, and how long it will take', 'what', bare=True)
    data_dir: str = option('', "datasets of --preset paper (default: $THE_WELL_DATA_DIR, else data)", 'machine')
    results: str = option('results', 'folder of the results', 'machine')
    jobs: int = option(0, 'cells at once; 0: one for each GPU, or for each CPU core', 'machine')


class Cell:
    """One run with one seed: the commands that make it, and where its files lie.

    name: SYSTEM-ROW-seedN. Raises ValueError if there is no such row.
    """

    def __init__(self, name, args):
        row, _, seed = name.rpartition('-seed')
        found = [(system, r) for system in system_names() for r in ROWS if row == f'{system}-{r}']
        if not found or not seed.isdigit():
            parts = ', '.join(f'{part} (--preset {preset})' for preset, parts in GROUPS.items() for part in parts)
            raise ValueError(f'no row {row or name!r}: parts are {parts}; a row is a system, '
                             f'{", ".join(system_names())}, a dash and one of {", ".join(ROWS)}')
        (self.system, self.row), self.name, self.seed = found[0], name, int(seed)
        self.run, self.result = Path('rows') / name, Path(args.results) / f'{name}.json'
        self.preset = next((p for p in ('paper', 'smoke') if p in self.row.split('-')), 'nano')
        smoke = '-smoke' * (self.preset == 'smoke')
        self.data = str(data_folder(args.data_dir)) if self.preset == 'paper' else f'data/seed{seed}{smoke}'
        self.stopped = threading.Event()                                 # set: no other script is to be run
        data = ['--data-dir', self.data]
        self.simulate = ['simulate.py', self.system, '--preset', self.preset, '--seed', seed, *data]
        self.train = ['train.py', '--data', self.system, *ROWS[self.row].split(), '--seed', seed, *data, '--out',
                      str(self.run)]
        self.evaluate = ['eval.py', str(self.run), '--split', 'test', *SCORED.get(self.row, '').split(), *data]

    def settings(self):
        """What train.py and eval.py would be run with: {name: value}, {name: value}."""
        c, _, options = config.parse(self.train[1:], '')
        scored, _ = parse('', evaluation.Settings, self.evaluate[1:], runs=dict(nargs='*'))
        return plain(vars(c) | vars(options)), plain({k: getattr(scored, k) for k in evaluation.TUNED})

    def why_stale(self, result):
        """('training' or 'scoring', what differs) of a result's settings from the row's; ('', '') if nothing does.

        A setting that is younger than the result had its default there. Folders, and what only concerns the machine,
        may differ.
        """
        (own, scored), options = self.settings(), models.find_model(result['run']['settings']['model']).Options
        free = {*config.MAY_CHANGE, *['micro_batch'] * (self.preset == 'paper')} - {'steps', 'epochs'}
        younger = plain(vars(config.Config()) | vars(options()) | vars(evaluation.Settings()))
        for what, now, there in ('training', own, result['run']['settings']), ('scoring', scored, result['probe']):
            there = younger | there
            differs = [f'{k} {there[k]}, now {v}' for k, v in now.items() if k not in free and there.get(k) != v]
            if differs:
                return what, ', '.join(differs)
        return '', ''

    def state(self):
        """(what is to be done: '', 'scoring' or 'training'; in words)."""
        there = self.result.exists()
        differs = self.why_stale(json.loads(self.result.read_text()))[1] if there else ''
        if there and not differs:
            return '', ''
        step, steps = self.progress()
        if step == steps:
            return 'scoring', differs or 'trained'
        return 'training', differs or (f'trained to step {step} of {steps}' if step else '')

    def checkpoint(self):
        """(its run's checkpoint dict, what of its settings differs from the row's); ({}, '') if there is none."""
        if not (self.run / 'ckpt.pt').exists():
            return {}, ''
        state = models.load_checkpoint(self.run / 'ckpt.pt')
        there = {'run': {'settings': plain(state['config'] | state['options'])}, 'probe': self.settings()[1]}
        return state, self.why_stale(there)[1]

    def progress(self):
        """(step its training has reached, steps)."""
        state, differs = self.checkpoint()
        return (state['step'], state['steps']) if state and not differs else (0, 1)

    def set_aside(self):
        """Move a run of other settings out of the way: train.py would refuse to go on with it."""
        if self.checkpoint()[1]:
            old = self.run.with_name(self.run.name + '.old')
            if old.exists():
                raise ValueError(f'{self.run} is of other settings, and {old} is there already: delete one')
            self.run.rename(old)

    def make(self, gpus, log):
        """Simulate, train, score, and keep what was found in results/. gpus: their numbers; log: file, or None."""
        self.run.parent.mkdir(exist_ok=True)
        lockfile = self.run.with_name(self.name + '.lock')
        lockfile.touch()
        with alone_in(lockfile) as lock:                                 # children hold it, too, and may outlive us
            execute = lambda command, ranks: self.execute(command, gpus, log, lock, ranks)
            self.set_aside()
            if self.preset != 'paper':
                execute(self.simulate, 1)
            execute(self.train, len(gpus))                               # nothing, if it is finished
            table = self.run / 'eval.json'
            known = json.loads(table.read_text()) if table.exists() else {}
            if (known.get('split') != 'test' or table.stat().st_mtime < (self.run / 'ckpt.pt').stat().st_mtime
                    or self.why_stale(known)[0]):
                execute(self.evaluate, len(gpus))
                known = json.loads(table.read_text())
            if self.preset != 'paper' and set(known['seeds'].values()) != {self.seed}:
                raise ValueError(f'{table} is of other seeds, {known["seeds"]}: delete {self.data}')
            known['cost'] = {'gflop_per_window': self.gflop_per_window()}
            self.result.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.result, json.dumps(known, indent=1))
        return known

    def gflop_per_window(self):
        """Counted on the CPU, on one micro-batch, or two windows of the paper's."""
        c, _, options = config.parse([*self.train[1:], '--device', 'cpu'], '')
        c.batch = c.micro_batch = 2 if self.preset == 'paper' else c.micro_batch
        with COUNTING:
            return bench_steps.gflop_per_window(c, options)

    def execute(self, command, gpus, log, lock, ranks):
        """Run a script of ours; ValueError if it fails, having said why."""
        if self.stopped.is_set():
            raise ValueError('interrupted')
        environment = {'OMP_NUM_THREADS': '1', **os.environ}
        if gpus:
            environment['CUDA_VISIBLE_DEVICES'] = ','.join(map(str, gpus))
        start = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks > 1 else []
        print('$ python', *command, file=log, flush=True)
        done = subprocess.run([sys.executable, *start, HERE / command[0], *command[1:]], env=environment, stdout=log,
                              stderr=log, pass_fds=[lock] if lock is not None else [])
        if done.returncode:
            where = f': {log.name} says why' if log else ''
            raise ValueError(f'python {" ".join(command)} failed{where}')


def plain(settings):
    """Settings as a JSON file gives them back."""
    return json.loads(json.dumps(settings))


# ---------------------------------------------------------------------------------------------
# the plan

def named(names, args):
    """The cells of groups, rows and cells by name; of the preset's own tables, if there are none. No cell twice."""
    if args.preset not in GROUPS:
        raise ValueError(f'unknown preset {args.preset!r}: choose from {", ".join(GROUPS)}')
    groups = GROUPS[args.preset]
    names = list(names) or list(groups)
    rows = [row for name in names for row in groups.get(name, [name])]
    cells = [name for k in range(args.seeds) for name in rows if '-seed' not in name for name in [f'{name}-seed{k}']]
    return [Cell(name, args) for name in dict.fromkeys(cells + [name for name in rows if '-seed' in name])]


def seconds_of(cell, what, results):
    """How long a cell should take, by results of its row, in this system or in any, or of its model; None without."""
    step, steps = cell.progress()
    left = {'training': 1 - step / max(1, steps), 'scoring': 0.0}[what]
    own = cell.settings()[0]
    alike = lambda system, row: [r for name, r in results.items() if re.fullmatch(f'{system}-{row}-seed[0-9]+', name)]
    of_model = [r for r in results.values() if r['run']['model'] == own['model'] and r['run']['preset'] == cell.preset
                and r['run']['settings']['supervised'] == own['supervised']]
    alike = alike(cell.system, cell.row) or alike('[a-z_]+', cell.row) or of_model
    times = [left * r['run']['train_seconds'] + r['seconds'] for r in alike]
    return sum(times) / len(times) if times else None


def show_plan(todo, cells, args, jobs):
    """Print a line for each cell that is not there, and the sum of their minutes."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(Path(args.results).glob('*-seed*.json'))}
    times = [seconds_of(cell, what, results) for cell, what, _ in todo]
    width = max([len(cell.name) for cell in cells]) + 2
    for (cell, what, words), seconds in zip(todo, times):
        stale = 'stale: ' * cell.result.exists()
        shown = '  ? min' if seconds is None else f'{seconds / 60:3.0f} min'
        print(f'{cell.name:{width}} {shown}   {what}' + (f' ({stale}{words})' if words else ''))
    known = sum(filter(None, times))
    unknown = f', and {times.count(None)} cells of unknown time' if None in times else ''
    print(f'{len(cells) - len(todo)} of {len(cells)} cells are there; the others take {known / 3600:.1f} hours of one '
          f'job{unknown}, here with {jobs}: {known / 3600 / jobs:.1f}. Times are those of earlier cells.')
    missing = {f'{cell.data}/{cell.system}' for cell, _, _ in todo
               if cell.preset != 'paper' and not Path(cell.data, cell.system, 'stats.yaml').exists()}
    if missing:
        print(f'Before that, minutes each, these are simulated: {", ".join(sorted(missing))}.')


def make_all(todo, jobs, gpus):
    """Make the cells, `jobs` at once; returns {name of a cell: why it failed}."""
    places, failed, started = queue.SimpleQueue(), {}, time.time()
    for k in range(jobs):
        places.put(gpus[k::jobs])

    def work(cell):
        own, begun = places.get(), time.time()
        try:
            cell.run.parent.mkdir(exist_ok=True)
            with open(cell.run.parent / f'{cell.name}.log', 'a') if jobs > 1 else nullcontext() as log:
                say(f'{cell.name}: starts')
                found = cell.make(own, log)
        finally:
            places.put(own)
        errors = ', '.join(f'{p} {e["mean"]:.3f}' for p, e in found['rows'][found['row']].items())
        return f'{errors}; {(time.time() - begun) / 60:.1f} min'

    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(work, cell): cell for cell in todo}
        try:
            for n, future in enumerate(as_completed(pending), 1):
                cell = pending[future]
                try:
                    words = future.result()
                except Exception as e:                                   # out of memory, too: the others go on
                    failed[cell.name] = words = f'failed, {e}'
                left = (time.time() - started) / n * (len(todo) - n) / 3600
                say(f'{cell.name}: {words}. {n} of {len(todo)}, about {left:.1f} hours to go')
        except BaseException:                                            # Ctrl-C: no other script starts
            for cell in todo:
                cell.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


@script
def main(argv=None):
    about = '\n'.join(f'  {group} (--preset {preset}): {len(rows)} rows'
                      for preset, groups in GROUPS.items() for group, rows in groups.items())
    args, names = parse(f'{__doc__}\nparts:\n{about}', Settings, argv, names=dict(
        nargs='*', help='parts, rows or cells (default: all)'))
    at_least(args, 1, 'seeds')
    at_least(args, 0, 'jobs')
    count = torch.cuda.device_count()                                    # of those that we are to see
    gpus = (os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(count)))).split(',')[:count]
    jobs = args.jobs or len(gpus) or os.cpu_count()
    if len(gpus) % jobs and gpus:
        raise ValueError(f'{jobs} jobs cannot share {len(gpus)} GPUs evenly: choose another --jobs')
    cells = named(names, args)
    for cell in cells:
        if cell.preset == 'paper' and not any(find_dataset(cell.system, cell.data)[0].glob('data/*/*.h*5')):
            raise ValueError(f'no {cell.system} under {cell.data}: README.md says how to get it')
    todo = [(cell, *state) for cell in cells if (state := cell.state())[0]]
    show_plan(todo, cells, args, jobs)
    if args.dry_run:
        return
    failed = make_all([cell for cell, _, _ in todo], jobs, gpus)
    try:
        print(report.tables_of(names, args.preset, Path(args.results)))
        if Path(args.results).resolve() == HERE / 'results':
            report.write_pages(HERE / 'results')
    except ValueError as e:                                              # a row of which a part is stale, perhaps
        failed['tables'] = f'not made, {e}'
    if failed:
        raise ValueError('; '.join(f'{name}: {why}' for name, why in failed.items()))


if __name__ == '__main__':
    main()
