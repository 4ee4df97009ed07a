"""reproduce.py: the commands of a row, and what is run again."""
import json
import subprocess
from pathlib import Path

import pytest

import reproduce
import train
import eval as evaluation
from common import parse
from helpers import HERE
from tables import with_tables


def test_a_row_is_made_seed_by_seed(tmp_path, monkeypatch):
    """Trained and scored with data of its own; what is finished is only copied, what is scored on valid is not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, 'HERE', tmp_path)
    (tmp_path / 'results').mkdir()
    ran = []

    def pretend(command):
        script, *flags = command[1:]
        ran.append([script.name, *flags])
        if script.name == 'eval.py':
            Path(flags[0]).mkdir(parents=True)
            (Path(flags[0]) / 'eval.json').write_text(json.dumps(dict(split='test', said=flags)))
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(reproduce.subprocess, 'run', pretend)
    row, out = 'shear_flow-jepa-nano-supervised', 'out/shear_flow-jepa-nano-supervised-seed'
    reproduce.main([row, '--seeds', '0,3'])
    assert ran == [line for k in '03' for line in (
        ['train.py', '--data', 'shear_flow', '--model', 'jepa', '--supervised', '--seed', k, '--data-dir',
         f'data/seed{k}', '--out', out + k],
        ['eval.py', out + k, '--split', 'test', '--data-dir', f'data/seed{k}'])]
    for k in '03':
        copied = json.loads((tmp_path / 'results' / f'{row}-seed{k}.json').read_text())
        assert copied['said'][0] == out + k
    (tmp_path / (out + '3') / 'eval.json').write_text(json.dumps(dict(split='valid')))
    (tmp_path / (out + '0') / 'eval.json').write_text(json.dumps(dict(split='test', said='kept')))
    ran.clear()
    monkeypatch.setattr(reproduce.subprocess, 'run', lambda command: subprocess.CompletedProcess(command, 2))
    with pytest.raises(SystemExit):                                      # train.py fails: nothing is copied after it
        reproduce.main([row, '--seeds', '0,3'])
    assert json.loads((tmp_path / 'results' / f'{row}-seed0.json').read_text())['said'] == 'kept'
    assert json.loads((tmp_path / 'results' / f'{row}-seed3.json').read_text())['split'] == 'test'


def test_unknown_rows_are_refused(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(['active_matter-gan-nano'])
    assert 'active_matter-gan-nano' in capsys.readouterr().err.splitlines()[-1]


def test_every_table_is_made_of_rows(tmp_path, monkeypatch):
    """What README.md and NOTES.md show, and what train.py and eval.py are told, exists."""
    names = set()
    monkeypatch.setattr('tables.summary', lambda given, folder: names.update(given) or '')
    for page in 'README.md', 'NOTES.md':
        with_tables((HERE / page).read_text(), HERE / 'results')
    assert names - {'parameters'} <= set(reproduce.ALL)
    monkeypatch.chdir(tmp_path)
    for name in reproduce.ALL:
        out, (first, second) = reproduce.commands(name, 1)
        c, _, _ = train.parse(first[1:], '')
        assert (c.preset, c.seed, c.out, c.data_dir) == ('nano', 1, str(out), 'data/seed1')
        settings, folders = parse('', evaluation.Settings, second[1:], folders=dict(nargs='*'))
        assert settings.split == 'test' and settings.data_dir == 'data/seed1' and folders == [str(out)]
