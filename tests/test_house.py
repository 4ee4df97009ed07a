"""A model is one file, a system is one file: each is added here without touching anything else."""
import ast
import json
import re
import shutil
import sys

import h5py
import numpy as np
import pytest
import torch

import house
import model
import train
from helpers import BASE, HERE, TINY, refused, run
from model import MODELS, load_checkpoint
from systems import system_names


def test_a_model_is_one_file(well, tmp_path):
    """byol.py beside the others: it trains, its teacher moves, it is evaluated, tabled and drawn."""
    house = tmp_path / 'house'
    house.mkdir()
    for path in [*HERE.glob('*.py'), *(HERE / name for name in ('baselines', 'benchmark', 'systems', 'variants'))]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, house / path.name)
    shutil.copy(HERE / 'tests' / 'byol.py', house)
    at = lambda script: [house / script]
    flags = [*BASE, '--model', 'byol', '--data-dir', well, '--width', 8, '--steps', 6]
    assert '--momentum' in run(at('train.py'), '--model', 'byol', '--help', cwd=tmp_path).stdout
    run(at('train.py'), *flags, '--out', 'out/start', '--steps', 0, cwd=tmp_path)
    said = run(at('train.py'), *flags, '--out', 'out/byol', cwd=tmp_path).stdout
    assert 'momentum 0.9' in said and 'width 8' in said
    rows = [json.loads(line) for line in (tmp_path / 'out/byol/log.jsonl').read_text().splitlines()]
    assert len(rows) == 6 and all(1 <= row['embedding_rank'] <= 8 for row in rows)
    before, after = (load_checkpoint(tmp_path / 'out' / name / 'ckpt.pt')['model'] for name in ('start', 'byol'))
    student, teacher, first = after['encoder.0.weight'], after['teacher.0.weight'], before['teacher.0.weight']
    assert torch.equal(first, before['encoder.0.weight'])
    assert 0 < (teacher - first).norm() < 0.6 * (student - first).norm()           # it follows, and lags behind
    shutil.rmtree(tmp_path / 'out/start')
    assert '\nbyol ' in run(at('eval.py'), '--epochs', 1, '--stride', 16, cwd=tmp_path).stdout
    result = json.loads((tmp_path / 'out/byol/eval.json').read_text())
    assert list(result['rows']) == ['byol', 'byol, with products', 'random init', 'field statistics',
                                     'field statistics, with products', 'predict the mean']
    assert '4 tiles of 16 x 16' in result['field']                       # the whole field, like every other model
    run(at('plot.py'), '--data-dir', well, '--out', 'pictures', cwd=tmp_path)
    assert {p.name for p in (tmp_path / 'pictures').iterdir()} == {'examples.png', 'training.png', 'errors.png'}
    assert not refused(at('train.py'), *flags, '--widths', '4,4,8,8,8', cwd=tmp_path, words=['--widths'])


def write_gray_scott(folder, runs=2, frames=34, n=128):
    """Two scalar fields, other scalars, a wall in y, as The Well has them."""
    root, rng = folder / 'gray_scott_like', np.random.default_rng(0)
    for split in 'train', 'valid', 'test':
        (root / 'data' / split).mkdir(parents=True)
        for feed in 0.014, 0.058:
            with h5py.File(root / 'data' / split / f'gray_scott_F_{feed}.hdf5', 'w') as f:
                f.create_group('dimensions').attrs['spatial_dims'] = ['x', 'y']
                for axis, values in ('time', np.arange(frames)), ('x', np.arange(n) / n), ('y', np.arange(n) / n):
                    f['dimensions'][axis] = values.astype(np.float32)
                for axis, kind in ('x', 'PERIODIC'), ('y', 'WALL'):
                    b = f.create_group(f'boundary_conditions/{axis}_{kind.lower()}')
                    b.attrs.update(bc_type=kind, associated_dims=[axis])
                for name, value in ('F', feed), ('k', 0.05 + feed / 10), ('D', 2.0):
                    f[f'scalars/{name}'] = value
                for name in 'A', 'B':
                    f[f't0_fields/{name}'] = feed + rng.random((runs, frames, n, n), np.float32)
                f.create_group('t1_fields'), f.create_group('t2_fields')
    return root


def test_a_dataset_needs_no_file(tmp_path):
    """In The Well's format, under a name nobody knows: trained on, evaluated, kept and drawn."""
    write_gray_scott(tmp_path / 'data')
    c, _, _ = train.parse(['--data', 'gray_scott_like', '--data-dir', str(tmp_path / 'data')], '')
    assert (c.preset, c.resolution, c.crop) == ('paper', 0, 0)           # its own resolution
    flags = [*TINY, '--data', 'gray_scott_like', '--resolution', 0, '--steps', 3, '--stride', 2, '--out', 'out/a']
    assert 'labels F, k' in run('train.py', *flags, cwd=tmp_path).stdout
    assert load_checkpoint(tmp_path / 'out/a/ckpt.pt')['inputs']['channels'] == ['A', 'B']
    run('train.py', *flags, '--crop', 0, '--steps', 0, '--out', 'whole', cwd=tmp_path)
    assert load_checkpoint(tmp_path / 'whole/ckpt.pt')['inputs']['periodic'] == (True, False)
    said = run('eval.py', 'out/a', '--epochs', 1, '--stride', 2, '--save-embeddings', 'kept.npz', cwd=tmp_path).stdout
    assert 'field statistics: none' in said and '128 x 128' in said
    result = json.loads((tmp_path / 'out/a/eval.json').read_text())
    assert list(result['rows']) == ['JEPA', 'JEPA, with products', 'random init', 'predict the mean'] and result['labels'] == ['F', 'k']
    run('plot.py', 'out/a', '--out', 'pictures', cwd=tmp_path)
    assert {p.name for p in (tmp_path / 'pictures').iterdir()} == {'examples.png', 'training.png', 'errors.png'}
    kept = np.load(tmp_path / 'kept.npz')
    assert kept['embedding'].shape == (24, 8) and kept['labels'].shape == (24, 2)
    assert kept['label_names'].tolist() == ['F', 'k'] and set(kept['labels'][:, 0].round(3)) == {0.014, 0.058}
    assert set(zip(kept['split'], kept['run'])) == {(s, r) for s in ('train', 'valid', 'test') for r in range(4)}


def test_no_model_or_system_is_named_where_any_may_come():
    names = [*MODELS, *system_names()]
    assert len(names) >= 7
    for path in 'train.py', 'eval.py', 'plot.py', 'benchmark/figures.py', 'data.py':
        words = set((HERE / path).read_text().replace('.', ' ').replace("'", ' ').replace('/', ' ').split())
        assert not words & {w for name in names for w in (name, name + ',')}, path


def test_the_house_is_as_large_as_its_card_says():
    """Files, lines, columns, paragraphs, words: house.py counts them."""
    for what, (number, most, where) in house.count().items():
        assert number <= most, f'{what}: {number}, at most {most}: {where[:20]}'


def test_no_function_is_longer_than_a_screen_or_two():
    """70 lines, with its comments."""
    for path in house.python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 70, f'{path}: {node.name}'


def test_nobody_imports_what_is_above_it():
    """Methods know neither data nor training; nobody imports eval, plot or benchmark, but these one another."""
    above = {'eval', 'plot', 'benchmark'}
    methods = {'jepa', 'vicreg', 'objectives', 'videomae', 'probe', 'variants', 'mpp', 'disco'}
    for path in house.sources():
        tree, folder = ast.parse(path.read_text()), path.parent.name
        nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {name.split('.')[0] for node in nodes for name in
                 ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])}
        if path.stem not in above | {'latents'} and folder != 'benchmark':
            assert not names & above, path
        if path.stem in methods or folder == 'variants':
            assert not names & {'data', 'train', 'model', 'simulate', 'systems'}, path


def test_readme_names_every_file():
    """The map in README.md has each script, and the lines of those to read first."""
    readme = (HERE / 'README.md').read_text()
    rows = re.findall(r'\| `(\w+\.py)` \| (\d+) \|', readme)
    assert len(rows) == 8
    for name, lines in rows:
        assert int(lines) == (HERE / name).read_text().count('\n'), name
    for path in [*HERE.glob('*.py'), *HERE.glob('baselines/*.py'), *HERE.glob('variants/*.py'),
                 *HERE.glob('systems/[a-z]*.py')]:
        assert path.name in readme or path.name == 'smoke.py', path


START = 'import torch, torch.nn as nn\nfrom dataclasses import dataclass, field\n'
OPTIONS = '''
@dataclass
class Options:
    width: int = 8

def build(options, inputs):
    return Net(options.width)
'''
NET = '''
class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.encoder = nn.Conv3d(11, width, 16)
    def forward(self, context, target, generator):
        return {'loss': self.encoder(context).mean()}
'''
ODD_FILES = {                                                            # what is odd, and what the message must say
    'no dataclass': (OPTIONS.replace('@dataclass', ''), NET, 'dataclass'),
    'a flag of train.py': (OPTIONS.replace('= 8', '= 8\n    batch: int = 3'), NET, 'Options.batch'),
    'a factory': (OPTIONS.replace('= 8', '= 8\n    many: list = field(default_factory=list)'), NET, 'Options.many'),
    'no default': (OPTIONS.replace(' = 8', ''), NET, 'Options.width'),
    'typo in a preset': ("PRESETS = {'nano': dict(stpes=3)}\n" + OPTIONS, NET, 'stpes'),
    'nothing to probe': (OPTIONS, NET.replace('encoder', 'net'), 'encoder'),
    'a width of seven': (OPTIONS.replace('= 8', '= 7'), NET, 'divisible by their 8 heads'),
    'no dict': (OPTIONS, NET.replace("{'loss': ", '(').replace('()}', '())'), 'dict'),
}


@pytest.mark.parametrize('odd', ODD_FILES)
def test_odd_model_files_are_refused(well, tmp_path, monkeypatch, capsys, odd):
    """In one line that says what the file needs; and before it has trained for an hour."""
    *text, word = ODD_FILES[odd]
    monkeypatch.setattr(model, 'HERE', tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'odd', raising=False)
    (tmp_path / 'odd.py').write_text(START + ''.join(text))
    flags = [str(v) for v in (*BASE, '--steps', 1, '--model', 'odd', '--data-dir', well, '--out', tmp_path / 'out')]
    with pytest.raises(SystemExit):
        train.main(flags)
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith('error: ') and word in said.splitlines()[-1]


def test_the_least_model_is_enough(well, tmp_path, monkeypatch):
    """Options, build and a module; annotations may be strings."""
    monkeypatch.setattr(model, 'HERE', tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'odd', raising=False)
    (tmp_path / 'odd.py').write_text('from __future__ import annotations\n' + START + OPTIONS + NET)
    train.main([str(v) for v in (*BASE, '--steps', 1, '--model', 'odd', '--data-dir', well, '--out', tmp_path / 'out')])
    assert model.load_run(tmp_path / 'out').embed(torch.zeros(1, 11, 16, 32, 32)).shape == (1, 4, 8)


def test_a_script_starts_without_the_compiler():
    """Importing it takes three seconds."""
    run(['-c', 'import sys, train, eval, benchmark.cells; assert "torch._dynamo" not in sys.modules'], cwd=HERE)
