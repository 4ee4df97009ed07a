"""reproduce.py: the commands of a row, and what is run again."""
import json
import os
import subprocess
from pathlib import Path

import pytest

import config
import reproduce
import train
import eval as evaluation
from common import parse
from helpers import HERE
from tables import with_tables


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The commands that were run; they pretend to train and to evaluate."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, 'HERE', tmp_path)
    (tmp_path / 'results').mkdir()
    commands = []

    def pretend(command, env):
        assert env['OMP_NUM_THREADS'] == os.environ.get('OMP_NUM_THREADS', '1')
        script, *flags = command[1:]
        commands.append([script.name, *flags])
        if script.name == 'eval.py':
            k = int(flags[0][-1])
            (tmp_path / flags[0] / 'eval.json').write_text(json.dumps(dict(
                split='test', seeds=dict(data=k, training=k, probe=k), by=len(commands))))
        elif not (tmp_path / flags[-1] / 'ckpt.pt').exists():
            (tmp_path / flags[-1] / 'ckpt.pt').touch()
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(reproduce.subprocess, 'run', pretend)
    return commands


ROW, OUT = 'shear_flow-jepa-nano-supervised', 'rows/shear_flow-jepa-nano-supervised-seed'


def test_a_row_is_made_seed_by_seed(ran):
    """Trained and scored with data of its own, and copied; a finished one is only looked at by train.py."""
    reproduce.main([ROW, '--seeds', '0,3'])
    commands = [line for k in '03' for line in (
        ['train.py', '--data', 'shear_flow', '--model', 'jepa', '--supervised', '--seed', k, '--data-dir',
         f'data/seed{k}', '--out', OUT + k],
        ['eval.py', OUT + k, '--split', 'test', '--data-dir', f'data/seed{k}'])]
    assert ran == commands
    assert all(json.loads(Path(f'results/{ROW}-seed{k}.json').read_text())['seeds']['data'] == k for k in (0, 3))
    ran.clear()
    reproduce.main([ROW, '--seeds', '0,3'])
    assert ran == commands[::2]


def test_what_is_stale_is_scored_again(ran):
    """On valid, or before the checkpoint's last step."""
    table, result = Path(OUT + '0/eval.json'), Path(f'results/{ROW}-seed0.json')
    for spoil in (lambda: table.write_text(json.dumps(dict(split='valid'))), lambda: os.utime(table, (1, 1))):
        reproduce.main([ROW, '--seeds', '0'])
        spoil()
        ran.clear()
        reproduce.main([ROW, '--seeds', '0'])
        assert [command[0] for command in ran] == ['train.py', 'eval.py']
        assert json.loads(result.read_text())['by'] == 2


def test_results_of_other_data_are_refused(ran, capsys):
    """Nor is anything copied if a command fails."""
    reproduce.main([ROW, '--seeds', '0'])
    before = Path(f'results/{ROW}-seed0.json').read_bytes()
    Path(OUT + '0/eval.json').write_text(json.dumps(dict(split='test', seeds=dict(data=1, training=0, probe=0))))
    with pytest.raises(SystemExit):
        reproduce.main([ROW, '--seeds', '0'])
    assert 'delete data/seed0' in capsys.readouterr().err.splitlines()[-1]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(reproduce.subprocess, 'run', lambda command, env: subprocess.CompletedProcess(command, 2))
        reproduce.main([ROW, '--seeds', '0'])
    assert 'failed' in capsys.readouterr().err.splitlines()[-1]
    assert Path(f'results/{ROW}-seed0.json').read_bytes() == before


@pytest.mark.parametrize('name', ['active_matter-gan-nano', 'jepa-nano'])
def test_unknown_rows_are_refused(ran, capsys, name):
    """Before anything is run."""
    with pytest.raises(SystemExit):
        reproduce.main([ROW, name])
    assert f"'{name}'" in capsys.readouterr().err.splitlines()[-1] and not ran


def test_every_table_is_made_of_rows(tmp_path, monkeypatch):
    """What README.md and NOTES.md show, and what train.py and eval.py are told, exists."""
    names = set()
    monkeypatch.setattr('tables.summary', lambda given, folder: names.update(given) or '')
    for page in 'README.md', 'NOTES.md':
        with_tables((HERE / page).read_text(), HERE / 'results')
    assert names - {'parameters'} <= set(reproduce.ALL)
    monkeypatch.chdir(tmp_path)
    for name in reproduce.ALL:
        out, first, second = reproduce.commands(name, 1)
        c, _, _ = train.parse(first[1:], '')
        assert (c.preset, c.seed, c.out, c.data_dir) == ('nano', 1, str(out), 'data/seed1')
        settings, folders = parse('', evaluation.Settings, second[1:], folders=dict(nargs='*'))
        assert settings.split == 'test' and settings.data_dir == 'data/seed1' and folders == [str(out)]


def test_an_experiment_is_one_word(ran):
    """Twelve rows of it, of two systems, which see 25,600 windows each; other rows may stand beside it."""
    reproduce.main(['latents-or-pixels', 'rayleigh_benard-jepa-nano', '--seeds', '0'])
    made = {path.stem for path in Path('results').iterdir()} - {'rayleigh_benard-jepa-nano-seed0'}
    assert len(made) == 24 and all(f'{system}-{row}-seed0' in made for system in ('active_matter', 'shear_flow')
                                   for row in ('jepa-nano-paired', 'pixels-nano', 'vjepa-nano-block', 'videomae-nano'))
    for name in reproduce.EXPERIMENT:
        c = config.parse(reproduce.commands(name, 0)[1][1:], '')[0]
        assert c.batch * c.steps == 25600 and c.preset == 'nano', name


@pytest.mark.parametrize('file', sorted((HERE / 'results').glob('*-seed*.json')), ids=lambda file: file.stem)
def test_a_result_is_of_what_its_row_says(file):
    """What train.py is told now is what it was told then; a setting may be younger than the result."""
    name, _, seed = file.stem.rpartition('-seed')
    c, _, options = config.parse(reproduce.commands(name, int(seed))[1][1:], '')
    there = json.loads(file.read_text())['run']['settings']
    now = {k: list(v) if isinstance(v, tuple) else v for k, v in (vars(c) | vars(options)).items()}
    own = {'out', 'data_dir', 'cache_dir', 'device', 'save_every'}
    assert {k: v for k, v in now.items() if k in there.keys() - own} == {
        k: v for k, v in there.items() if k in now.keys() - own}
