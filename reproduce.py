"""
The numbers of README.md and NOTES.md, made again: data, training, and errors on test, for every seed of a row.

    python reproduce.py active_matter-jepa-nano              # three seeds: 50 minutes of one core, 20 GB
    python reproduce.py latents-or-pixels                    # that experiment's: 8 hours of one core, 25 GB
    python reproduce.py                                      # all: half a day
    python tables.py                                         # then writes the tables

A row is SYSTEM-NAME, with the flags of NAME below. Runs are kept in rows/, and data in data/seed0, data/seed1 and so
on; what is interrupted goes on. Then eval.json goes to results/, in place of what is there: it will be the same on
this machine, and elsewhere within the spread. After a change of code delete rows/. Each run takes one core, as ours
did; start one of these for each seed to use more.
"""
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common import alone_in, option, parse, script, write_bytes

from systems import system_names

HERE = Path(__file__).resolve().parent
ROWS = {                                                                 # after SYSTEM-: what train.py is told
    'jepa-nano': '--model jepa',
    'jepa-nano-supervised': '--model jepa --supervised',
    # latents or pixels: a third of nano's windows, 25,600
    'jepa-nano-paired': '--model jepa --steps 800 --views paired',
    'pixels-nano': '--model pixels --steps 800',
    'jepa-nano-vicreg': '--model jepa --steps 800',
    'jepa-nano-sigreg': '--model jepa --steps 800 --loss sigreg --standardize false --sigreg-coeff 0.05',
    'jepa-nano-ema': '--model jepa --steps 800 --target ema --cov-coeff 0',
    'jepa-nano-infonce': '--model jepa --steps 800 --loss infonce --temperature 0.2',
    'jepa-nano-short-supervised': '--model jepa --steps 800 --supervised',
    'vjepa-nano-block': '--model vjepa --steps 3200 --masks block',
    'vjepa-nano-random': '--model vjepa --steps 3200 --masks random',
    'vjepa-nano-temporal': '--model vjepa --steps 3200 --masks temporal',
    'videomae-nano': '--model videomae --steps 800',
    'vjepa-nano-supervised': '--model vjepa --steps 3200 --supervised',
}
MAIN, LATENTS_OR_PIXELS = list(ROWS)[:2], list(ROWS)[2:]
EXPERIMENT = [f'{system}-{row}' for system in ('active_matter', 'shear_flow') for row in LATENTS_OR_PIXELS]
ALL = [f'{system}-{row}' for system in system_names() for row in MAIN] + EXPERIMENT


@dataclass
class Settings:
    seeds: tuple = option((0, 1, 2), 'which', 'what')


def commands(name, seed):
    """(folder of the run, how train.py and eval.py make it) of a row's name and a seed. ValueError for no row."""
    found = [(system, row) for system in system_names() for row in ROWS if name == f'{system}-{row}']
    if not found:
        raise ValueError(f'no row {name!r}: a row is a system ({", ".join(system_names())}), a dash and one of '
                         f'{", ".join(ROWS)}')
    (system, row), = found
    out, data = f'rows/{name}-seed{seed}', ['--data-dir', f'data/seed{seed}']
    train = ['train.py', '--data', system, *ROWS[row].split(), '--seed', str(seed), *data, '--out', out]
    return Path(out), train, ['eval.py', out, '--split', 'test', *data]


def execute(command):
    """Run a script of ours on one core; ValueError if it fails, having said why."""
    print('$ python', *command, flush=True)
    if subprocess.run([sys.executable, HERE / command[0], *command[1:]],
                      env={'OMP_NUM_THREADS': '1', **os.environ}).returncode:
        raise ValueError(f'python {" ".join(command)} failed')


def make(name, seed):
    """One run of a row, and its eval.json in results/."""
    out, train, evaluate = commands(name, seed)
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        execute(train)                                                   # nothing, if it is finished and the same
        table = out / 'eval.json'
        known = json.loads(table.read_text()) if table.exists() else {}
        if known.get('split') != 'test' or table.stat().st_mtime < (out / 'ckpt.pt').stat().st_mtime:
            execute(evaluate)
            known = json.loads(table.read_text())
    if set(known['seeds'].values()) != {seed}:
        raise ValueError(f'{table} is of other seeds, {known["seeds"]}: delete data/seed{seed}')
    write_bytes(HERE / 'results' / f'{out.name}.json', table.read_bytes())


@script
def main(argv=None):
    settings, names = parse(__doc__ + '\nrows: ' + ', '.join(ALL), Settings, argv,
                            names=dict(nargs='*', help='of rows (default: all)'))
    names = [row for name in names for row in (EXPERIMENT if name == 'latents-or-pixels' else [name])] or ALL
    runs = [(name, seed) for name in names for seed in settings.seeds]
    for run in runs:                                                     # all are rows, before the first takes hours
        commands(*run)
    for run in runs:
        make(*run)
    print(f'{len(runs)} runs in results/. Next: python tables.py')


if __name__ == '__main__':
    main()
