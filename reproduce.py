"""
The numbers of README.md and NOTES.md, made again: data, training, and errors on test, for every seed of a row.

    python reproduce.py active_matter-jepa-nano              # three seeds: about half an hour on two cores
    python reproduce.py                                      # all rows: a day
    python tables.py                                         # then writes the tables

A row is SYSTEM-NAME, with the flags of NAME below. What is finished under out/ is not run again, and what was
interrupted goes on; then the eval.json of each run is copied to results/. Each seed has data of its own, in
data/seed0, data/seed1 and so on. To use several cores well, start several of these with OMP_NUM_THREADS=1.
"""
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common import option, parse, script, write_bytes

from systems import system_names

HERE = Path(__file__).resolve().parent
ROWS = {                                                                 # after SYSTEM-: what train.py is told
    'jepa-nano': '--model jepa',
    'jepa-nano-supervised': '--model jepa --supervised',
    'videomae-nano': '--model videomae',
}
ALL = [f'{system}-{row}' for system in system_names() for row in ROWS if system == 'active_matter' or 'jepa' in row]


@dataclass
class Settings:
    seeds: tuple = option((0, 1, 2), 'which', 'what')


def commands(name, seed):
    """(folder of the run, the commands that make it) of a row's name and a seed. Raises ValueError for no row."""
    system = next((s for s in system_names() if name.removeprefix(s + '-') in ROWS), None)
    if system is None:
        raise ValueError(f'no row {name!r}: a row is a system ({", ".join(system_names())}), a dash and one of '
                         f'{", ".join(ROWS)}')
    out, data = f'out/{name}-seed{seed}', ['--data-dir', f'data/seed{seed}']
    train = ['train.py', '--data', system, *ROWS[name.removeprefix(system + '-')].split(), '--seed', str(seed), *data]
    return Path(out), [[*train, '--out', out], ['eval.py', out, '--split', 'test', *data]]


def finished(out):
    """Has a run been scored on test?"""
    table = out / 'eval.json'
    return table.exists() and json.loads(table.read_text()).get('split') == 'test'


@script
def main(argv=None):
    settings, names = parse(__doc__ + '\nrows: ' + ', '.join(ALL), Settings, argv,
                            names=dict(nargs='*', help='of rows (default: all)'))
    runs = [(name, seed, *commands(name, seed)) for name in names or ALL for seed in settings.seeds]
    for name, seed, out, steps in runs:
        if not finished(out):
            for step in steps:
                print('$ python', *step, flush=True)
                if subprocess.run([sys.executable, HERE / step[0], *step[1:]]).returncode:
                    raise ValueError(f'python {" ".join(step)} failed')
        write_bytes(HERE / 'results' / f'{name}-seed{seed}.json', (out / 'eval.json').read_bytes())
    print(f'{len(runs)} runs in results/. Next: python tables.py')


if __name__ == '__main__':
    main()
