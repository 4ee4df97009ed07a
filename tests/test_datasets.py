"""Finding a dataset on disk: in all the ways people have it, and never another one in its place."""
import fcntl
import json
import os
import shutil
from pathlib import Path

import h5py
import pytest

import data
import eval as evaluation
import simulate
import train
from eval import PUBLISHED_ROW
from helpers import ACTIVE, TINY, files_of, linked, make_published, read_bytes, refused, run
from systems import System, datasets

SPLITS = 'train', 'valid', 'test'
HUB = 'datasets--polymathic-ai--active_matter/snapshots/0a1b2c'
FLAGS = [*TINY, '--resolution', 16, '--steps', 1]


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """<folder>/{train,valid,test}, whose files say that they are active_matter. Read only."""
    root = make_published(tmp_path_factory.mktemp('files'))
    for path in root.rglob('*.hdf5'):
        with h5py.File(path, 'r+') as f:
            f.attrs['dataset_name'] = 'active_matter'
    return root / 'data'


def parse(*flags, name='active_matter'):
    return train.parse([str(f) for f in ('--data', name, '--device', 'cpu', *flags)], '')[0]


def rename(folder, name):
    """The files in a folder say that they are of another dataset, or, None, do not say anything."""
    for path in list(Path(folder).rglob('*.hdf5')):
        content = path.read_bytes()
        path.unlink()                                                    # the others share it
        path.write_bytes(content)
        with h5py.File(path, 'r+') as f:
            del f.attrs['dataset_name']
            f.attrs.update({'dataset_name': name} if name else {})


def begin_simulation(root, seed=0):
    root.mkdir(parents=True, exist_ok=True)
    (root / 'simulated.json').write_text(json.dumps({'preset': 'nano', 'seed': seed}))


def in_the_hubs_cache(files, folder):
    """Files are links into blobs/, as huggingface_hub makes them."""
    (blobs := folder.parents[1] / 'blobs').mkdir(parents=True)
    for i, file in enumerate(sorted(files.rglob('*.hdf5'))):
        os.link(file, blobs / f'{i:040x}')
        (link := folder / 'data' / file.relative_to(files)).parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / f'{i:040x}', link.parent))


LAYOUTS = {                                                              # where the splits lie in X, and the flag
    'simulate.py': ('X/active_matter/data', 'X'), 'without data': ('X/active_matter', 'X'),
    'the-well-download': ('X/datasets/active_matter/data', 'X'), 'local-dir': ('X/data', 'X'), 'bare': ('X', 'X'),
    'own folder': ('X/active_matter/data', 'X/active_matter'), 'splits': ('X/active_matter/data', 'X/active_matter/data'),
    'other name': ('X/mine/data', 'X'), 'hub': (f'X/{HUB}/data', 'X'), 'hub, above': (f'X/hub/{HUB}/data', 'X'),
    'hub, snapshot': (f'X/{HUB}/data', f'X/{HUB}')}


@pytest.mark.parametrize('told', ['flag', 'variable'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_is_found(files, here, monkeypatch, layout, told):
    """With all its files and its protocol; nothing is written."""
    place, flag = LAYOUTS[layout]
    in_the_hubs_cache(files, (here / place).parent) if 'hub' in layout else linked(files, here / place)
    before = read_bytes(here)
    if told == 'variable':
        monkeypatch.setenv('THE_WELL_DATA_DIR', flag)
    c = parse(*['--data-dir', flag][:2 * (told == 'flag')])
    assert (c.preset, c.data, c.data_dir, c.resolution, c.stride) == ('paper', 'active_matter', flag, 224, 1)
    root, system, simulated = data.find_dataset('active_matter', flag)
    assert system is ACTIVE and simulated is None
    for split in SPLITS:
        found = datasets.well_files(root, split)
        assert [path.name for path in found] == [path.name for path in files_of(files.parent, split)]
        assert all(path.samefile(file) for path, file in zip(found, files_of(files.parent, split)))
    assert read_bytes(here) == before


@pytest.mark.parametrize('layout', ['bare', 'hub'])
def test_they_train_evaluate_and_plot(files, here, layout):
    """And say what they found: where, how much, which protocol."""
    place, flag = LAYOUTS[layout]
    in_the_hubs_cache(files, (here / place).parent) if 'hub' in layout else linked(files, here / place)
    root = Path(place).parent if 'hub' in layout else place
    said = run('train.py', *FLAGS, '--data-dir', flag, '--out', 'out/a', cwd=here).stdout
    assert (f'active_matter in {root}: train 2 of 45 files: incomplete download, 4 runs, 36 windows; valid 2 of 16 files:'
            ' incomplete download; test 2 of 21 files: incomplete download; protocol of active_matter; '
            'zeta the same in all training files: no label') in said and 'imulating' not in said
    said = run('eval.py', '--epochs', 1, '--stride', 8, cwd=here).stdout
    assert f'active_matter in {root}: train 2 of 45 files: incomplete download, 4 runs, 36 windows; valid 2 of 16' in said
    assert 'no label' in said and 'the paper (valid)' not in said.replace('protocol', '')
    run('plot.py', '--out', 'pictures', cwd=here)
    assert not list(here.rglob('simulated.json'))


def nothing(files):
    pass


def another_dataset(files):
    linked(files, Path('X/shear_flow/data').absolute())
    rename('X', 'shear_flow')


def another_in_its_folder(files):
    linked(files, Path('X/active_matter/data').absolute())
    rename('X', 'shear_flow')


def no_name_at_all(files):
    linked(files, Path('X/mine/data').absolute())
    rename('X', None)


def simulated_elsewhere(files):
    linked(files, Path('X/seed1/active_matter/data').absolute())
    begin_simulation(Path('X/seed1/active_matter'))


def not_yet_downloaded(files):
    Path('X/active_matter/data/train').mkdir(parents=True)
    Path('X/active_matter/data/train/a.hdf5.incomplete').touch()


ABSENT = {
    'mistyped': (nothing, ['no active_matter under X: no such folder', '--data-dir', '$THE_WELL_DATA_DIR',
                           'or python simulate.py active_matter --data-dir X']),
    'empty': (lambda files: Path('X').mkdir(), ['no active_matter under X', 'no train/, valid/ or test/']),
    'another': (another_dataset, ['--data shear_flow --data-dir X/shear_flow (6 files)']),
    'another in its folder': (another_in_its_folder, ['--data shear_flow --data-dir X/active_matter (6 files)']),
    'no name': (no_name_at_all, ['--data mine --data-dir X/mine (6 files)']),
    'simulated elsewhere': (simulated_elsewhere, ['--data active_matter --data-dir X/seed1/active_matter (6 files, sim']),
    'not downloaded': (not_yet_downloaded, ['X/active_matter', 'no complete HDF5 file (1 incomplete)'])}


@pytest.mark.parametrize('absent', ABSENT)
def test_what_is_not_there_is_not_simulated(files, here, monkeypatch, absent):
    """One line: what was seen, and the flag to give. train.py, with its --preset smoke, too, eval.py and plot.py."""
    prepare, words = ABSENT[absent]
    prepare(files)
    before = read_bytes(here)
    monkeypatch.setattr(simulate, 'make_dataset', lambda *_: pytest.fail('it is simulated'))
    for flags in [], ['--preset', 'smoke'], ['--preset', 'paper']:
        with pytest.raises(ValueError) as error:
            parse('--data-dir', 'X', *flags)
        assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)
        assert ('simulate.py' in str(error.value)) == (absent in ('mistyped', 'empty'))
    monkeypatch.setenv('THE_WELL_DATA_DIR', 'X/')
    for find in parse, lambda: data.find_dataset('active_matter', 'X'):
        with pytest.raises(ValueError, match=words[0].replace('(', '.').replace(')', '.')):
            find()
    assert read_bytes(here) == before


def test_a_mistyped_flag_ends_in_one_line(files, trained, here):
    shutil.copytree(trained, here / 'out')
    for script, flags in ('train.py', TINY), ('eval.py', ['out']), ('plot.py', ['out']):
        refused(script, *flags, '--data-dir', 'tpyo', cwd=here, words=['no active_matter under tpyo: no such folder'])
    assert not (here / 'tpyo').exists()
    assert '--data-dir' in run('train.py', '--data-dir', 'tpyo', '--help', cwd=here).stdout


@pytest.mark.parametrize('real, flag', [('B/datasets/active_matter/data', 'B/datasets/active_matter'),
                                        ('B/data', 'B/data'), ('B/other/train', 'B/other')])
def test_two_of_them_are_refused(files, here, real, flag):
    """A leftover that was simulated is never preferred; either flag that is offered then finds one."""
    linked(files, here / (real if real.endswith('data') else 'B/other'))
    linked(files, here / 'B/active_matter/data')
    begin_simulation(here / 'B/active_matter')
    for find in lambda: parse('--data-dir', 'B'), lambda: data.find_dataset('active_matter', 'B'):
        with pytest.raises(ValueError) as error:
            find()
        offers = '--data-dir B/active_matter (6 files, simulated)', f'--data-dir {flag} (6 files)'
        assert '2 datasets active_matter under B' in str(error.value) and all(o in str(error.value) for o in offers)
    assert parse('--data-dir', flag).preset == 'paper'
    assert parse('--data-dir', 'B/active_matter', '--crop', 16).preset == 'nano'


def test_what_is_simulated_for_other_seeds_is_not_in_the_way(files, here):
    """data/seed1 and data/smoke beside data/active_matter."""
    for folder in 'data/active_matter', 'data/seed1/active_matter', 'data/smoke/active_matter':
        linked(files, here / folder / 'data')
        begin_simulation(here / folder)
    assert data.find_dataset('active_matter', 'data')[::2] == (Path('data/active_matter'), 'nano')
    assert data.find_dataset('active_matter', 'data/seed1')[0] == Path('data/seed1/active_matter')
    shutil.rmtree('data/active_matter')
    linked(files, here / 'data/active_matter/data')                      # real ones
    assert parse().preset == 'paper' and parse('--preset', 'smoke', '--crop', 16).data_dir == 'data/smoke'


@pytest.mark.parametrize('flags, asked', [
    ([], ('active_matter', Path('data'), 'nano', 7)),
    (['--preset', 'smoke'], ('active_matter', Path('data/smoke'), 'smoke', 7)),
    (['--data-dir', 'D'], ('active_matter', Path('D'), 'nano', 3)),                      # was begun
    (['--data-dir', 'D/active_matter'], ('active_matter', Path('D'), 'nano', 3))])
def test_what_is_simulated(here, monkeypatch, flags, asked):
    """Without --data-dir, and what was begun."""
    begin_simulation(here / 'D/active_matter', seed=3)
    made = []
    monkeypatch.setattr(simulate, 'make_dataset', lambda *how: made.append(how))
    with pytest.raises(ValueError):                                      # nothing was simulated
        train.open_data(parse('--seed', 7, '--crop', 16, *flags))
    assert made == [asked]


def test_the_name_in_the_files_decides(files, here):
    """Under another folder name they have their own protocol, and that of their windows."""
    linked(files, here / 'B/mine/data')
    c = parse('--data-dir', 'B', name='mine')
    assert (c.data, c.data_dir, c.stride, c.noise, c.resolution) == ('active_matter', 'B/mine', 1, 1.0, 224)
    assert data.find_dataset('mine', 'B')[1] is ACTIVE
    assert c == parse('--data-dir', 'B/mine')
    rename('B', 'of_our_own')
    assert data.find_dataset('mine', 'B')[1] == System() == data.find_dataset('of_our_own', 'B')[1]
    rename('B', 'shear_flow')
    with pytest.raises(ValueError, match='--data shear_flow --data-dir B/mine '):
        parse('--data-dir', 'B')


def test_files_without_a_name_have_their_folders(files, here):
    linked(files, here / 'B/active_matter/data')
    in_the_hubs_cache(files, here / 'C' / HUB)
    rename('B', None)
    rename('C', None)
    assert data.find_dataset('active_matter', 'B')[1] is ACTIVE is data.find_dataset('active_matter', 'C')[1]


def test_loops_links_and_large_trees(files, here, monkeypatch):
    """Links are followed, each folder once, to a depth; what is hidden, and caches, are not looked into."""
    linked(files, here / 'elsewhere/data')
    for link, target in ('X/loop', 'X'), ('X/a/up', 'X'), ('X/a/am', 'elsewhere'), ('X/again', 'elsewhere'):
        Path(link).parent.mkdir(parents=True, exist_ok=True)
        Path(link).symlink_to(here / target)
    for place in 'X/cache/active_matter', 'X/.trash/active_matter', 'X/1/2/3/4/5/6/active_matter':
        linked(files, here / place / 'data')
    assert data.find_dataset('active_matter', 'X')[0].resolve() == here / 'elsewhere'
    looked, scandir = [], os.scandir
    monkeypatch.setattr(datasets, 'MOST', 30)
    monkeypatch.setattr(datasets.os, 'scandir', lambda folder: looked.append(folder) or scandir(folder))
    for i in range(100):
        Path(f'X/b/{i}').mkdir(parents=True)
    assert data.find_dataset('active_matter', 'X')[0].resolve() == here / 'elsewhere' and len(looked) < 60


def test_a_folder_of_many_files_is_listed_not_opened(files, here, monkeypatch):
    root = linked(files, here / 'X/data')
    for i in range(1750):
        (root / 'train' / f'z{i}.hdf5').touch()
    opened, File = [], h5py.File
    monkeypatch.setattr(h5py, 'File', lambda *args: opened.append(args) or File(*args))
    assert len(datasets.well_files(data.find_dataset('active_matter', 'X')[0], 'train')) == 1752
    assert 0 < len(opened) <= 3


def test_hidden_and_unfinished_files_are_counted(files, here, monkeypatch):
    """And left out, in every split; so are links to nothing."""
    in_the_hubs_cache(files, here / 'X' / HUB)
    root = here / 'X' / HUB
    (root / 'data/train/._a.hdf5').write_bytes(b'Mac')
    (root / 'data/valid/.b.hdf5').write_bytes(b'')
    (root / 'data/test/c.hdf5.incomplete').write_bytes(b'')
    (root.parents[1] / 'blobs/0.incomplete').write_bytes(b'')
    (root / 'data/train/d.hdf5').symlink_to('../../../blobs/none')
    assert [len(datasets.well_files(root, split)) for split in SPLITS] == [2, 2, 2]
    split = data.Split(root, ACTIVE, 'train', progress=False)
    assert len(split.runs) == 4
    said = datasets.summary('active_matter', root, {'train': split})
    assert 'left out: 2 hidden, 2 incomplete, 1 linked to nothing' in said
    local = linked(files, here / 'Y/data').parent                        # as hf download --local-dir leaves it
    (folder := local / '.cache/huggingface/download/data/train').mkdir(parents=True)
    (folder / 'x.5f.incomplete').touch()
    assert datasets.left_out(local) == '1 incomplete'
    monkeypatch.setattr(ACTIVE, 'published', dict(train=(2, 4), valid=(2, 5), test=(2, 6)))
    said = datasets.summary('active_matter', root, {'train': split})
    assert 'train 2 of 2 files, 4 runs, 36 windows; valid 2 of 2 files, 5 runs, 45 windows; test 2 of 2 files, ' in said
    assert datasets.is_complete(root, ACTIVE, SPLITS) and 'incomplete download' not in said


def test_how_many_files_there_should_be():
    """As published: 45 / 16 / 21 of 175 / 24 / 26 runs."""
    assert ACTIVE.published == dict(train=(45, 175), valid=(16, 24), test=(21, 26))


def test_a_simulation_says_that_it_is_one(mini):
    split = data.Split(mini, ACTIVE, 'train', progress=False)
    said = datasets.summary('active_matter', mini, {'train': split})
    assert 'train 4 files, 8 runs, 400 windows; valid 4 files; test 4 files; ' in said
    assert 'simulated, preset nano, seed 0; protocol of active_matter' in said and 'no label' not in said


@pytest.mark.parametrize('lacks', ['nothing', 'a file', 'a label'])
def test_the_papers_number_is_for_complete_data(well, files, here, monkeypatch, lacks):
    """A split that is not evaluated may be missing."""
    if lacks == 'a label':                                               # zeta is the same everywhere
        well = linked(files, here / 'X/data').parent
    counts = {'nothing': (3, 4), 'a file': (4, 4), 'a label': (2, 2)}[lacks]
    monkeypatch.setattr(ACTIVE, 'published', dict(train=(counts[0], 6), valid=(counts[1], 4), test=(90, 90)))
    train.main([str(f) for f in (*FLAGS, '--data-dir', well, '--out', 'out/a')])
    evaluation.main(['--epochs', '1', '--stride', '24'])
    rows = json.loads(Path('out/a/eval.json').read_text())['rows']
    assert ('JEPA' + PUBLISHED_ROW in rows) == (lacks == 'nothing')


@pytest.mark.parametrize('fault, words', [('page', 'a web page'), ('pointer', 'Git LFS pointer'),
                                          ('truncated', 'cut short'), ('empty', 'cut short'),
                                          ('locked', 'another program holds it')])
@pytest.mark.parametrize('which', ['one', 'all'])
def test_files_that_cannot_be_read(files, here, fault, words, which):
    """Each has a line of its own, wherever the file lies."""
    root, locks = linked(files, here / 'X/data').parent, []
    content = {'page': b'\n<!DOCTYPE html><html>', 'pointer': b'version https://git-lfs.github.com/spec/v1\noid',
               'truncated': files_of(root)[1].read_bytes()[:50_000], 'empty': b''}
    for path in [files_of(root)[1]] if which == 'one' else sorted(root.rglob('*.hdf5')):
        if fault == 'locked':
            locks.append(open(path))
            fcntl.flock(locks[-1], fcntl.LOCK_EX)
            continue
        path.unlink()
        path.write_bytes(content[fault])
    with pytest.raises(ValueError, match=words) as error:
        c = parse('--data-dir', 'X')
        train.open_data(c)
    assert '.hdf5' in str(error.value) and '\n' not in str(error.value)
    assert ('HDF5_USE_FILE_LOCKING=FALSE' in str(error.value)) == (fault == 'locked')
    for lock in locks:
        lock.close()
