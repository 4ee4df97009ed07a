"""
Do the tests bite where nobody chose? Breaks lines at random, in a copy, and runs the tests that reach them.

    pip install cosmic-ray pytest-testmon
    python tests/random_mutants.py 300 --seed 0 > mutants.txt            # hours; --list only says which

Cosmic Ray makes the mutants: a place is drawn for each, and then one of the operators that can change it. testmon
notes in one run of the tests which of them reach which function; a mutant is shown to these alone, until one fails.
It sees no processes that a test starts, so the files that do little else are left out. A survivor needs a test, or is
no fault: docs/mutants.md has the reasons. mutants.py has those that we chose.
"""
import argparse
import ast
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import MutationVisitor

from mutants import HERE, copied

FILES = [HERE / f'{name}.py' for name in ('train', 'data', 'eval', 'probe', 'vicreg', 'jepa', 'objectives', 'model')]
FILES += sorted((HERE / 'systems').glob('*.py'))
IN_PROCESSES = ['test_all.py', *(f'tests/test_{name}.py' for name in (
    'benchmark', 'break_it', 'figures', 'gpu', 'gpu_benchmark', 'house', 'killed', 'mutants', 'report', 'rows', 'speed'))]
TESTMON = ['-m', 'pytest', '-q', '--testmon', *(f'--ignore={file}' for file in IN_PROCESSES)]
LIMIT = 600                                              # seconds: a mutant that never ends is caught, too


def every_place(path):
    """{where a file can be changed: [(operator, its how-manieth occurrence)]}."""
    places, tree = {}, get_ast(path.read_text())
    for name in plugins.operator_names():
        if not name.startswith('core/Variable'):                         # these take arguments
            operator = plugins.get_operator(name)()
            found = [place for node in ast_nodes(tree) for place in operator.mutation_positions(node)]
            for occurrence, place in enumerate(found):
                places.setdefault((path, place), []).append((name, occurrence))
    return places


def draw(count, seed):
    """[(file, operator, occurrence)]: so many places, each with one operator."""
    places, chosen = {}, random.Random(seed)
    for path in FILES:
        places |= every_place(path)
    return [(path, *chosen.choice(places[path, place])) for path, place in chosen.sample(sorted(places), count)]


def broken(path, operator, occurrence):
    """(what the file is then, what has changed in words), or None if nothing has, or it is no Python."""
    code = path.read_text()
    new = MutationVisitor.mutate_code(code, plugins.get_operator(operator)(), occurrence)
    try:
        if not new or ast.dump(ast.parse(new)) == ast.dump(ast.parse(code)):
            return None
    except SyntaxError:
        return None
    old_lines, new_lines = code.split('\n'), new.split('\n')
    i = next(i for i, (a, b) in enumerate(zip(old_lines, new_lines)) if a != b)
    new_line = new_lines[i].strip() if len(old_lines) == len(new_lines) else 'gone'
    return new, f'{path.relative_to(HERE)}:{i + 1}: {old_lines[i].strip()} -> {new_line}'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('count', type=int)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--list', action='store_true')
    parser.add_argument('--first', type=int, default=0, help='of the sample: go on after an interruption')
    args = parser.parse_args()
    sample = draw(args.count, args.seed)

    with tempfile.TemporaryDirectory() as folder:
        house, environment = copied(Path(folder)), {**os.environ, 'OMP_NUM_THREADS': '1'}
        run = lambda *flags: subprocess.run([sys.executable, *TESTMON, *flags], cwd=house, env=environment,
                                            capture_output=True, text=True, timeout=LIMIT if flags else None)
        if not args.list and (p := run()).returncode:
            raise SystemExit(f'error: not all tests pass with nothing broken\n{p.stdout}{p.stderr}')
        for i, (path, operator, occurrence) in enumerate(sample):
            found = broken(path, operator, occurrence)
            if i < args.first or not found:
                continue
            new, said = found
            if args.list:
                print(i, said)
                continue

            target, started = house / path.relative_to(HERE), time.monotonic()
            code = target.read_text()
            target.write_text(new)
            try:
                p = run('-x', '--testmon-nocollect', '--testmon-forceselect')
                words = re.findall(r'^(?:FAILED|ERROR) (\S+)', p.stdout, re.M)
                what = words[0] if words else 'SURVIVED' if p.returncode in (0, 5) else 'ended otherwise'
            except subprocess.TimeoutExpired:
                what = 'never ended'
            target.write_text(code)
            print(f'{i} {what} ({time.monotonic() - started:.0f} s) {said}', flush=True)


if __name__ == '__main__':
    main()
