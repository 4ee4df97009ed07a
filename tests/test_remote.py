"""remote.py: datasets in a store. memory:// in this process, file:// where scripts run."""
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cache as caching
import data
import plot
import remote
import simulate
import train
from config import parse
from helpers import TINY, files_of, linked, losses, make_published, read_bytes, run
from systems import find_system
from test_data import open_split
from well import read_file

fsspec = pytest.importorskip('fsspec')


@pytest.fixture
def url(published, monkeypatch):
    """A dataset in memory, as `published`, in blocks of 64 kB; the working directory is empty."""
    fs = fsspec.filesystem('memory')
    fs.put(str(published), '/well/active_matter', recursive=True)
    monkeypatch.setattr(remote, 'BLOCK', 2**16)
    (published.parent.parent / 'here').mkdir()
    monkeypatch.chdir(published.parent.parent / 'here')
    yield 'memory://well/active_matter'
    fs.rm('/', recursive=True)
    fs.store.clear(), fs.pseudo_dirs.clear()


@pytest.fixture
def fetched(monkeypatch):
    """What is asked of the store: (file's name, first byte), in order."""
    asked, fetch = [], remote.Blocks.fetch
    monkeypatch.setattr(remote.Blocks, 'fetch', lambda self, start, end: asked.append((self.file.name, start))
                        or fetch(self, start, end))
    return asked


def same(a, b):
    assert a.runs == b.runs and a.grid == b.grid and a.channels == b.channels and np.array_equal(a.windows, b.windows)
    assert np.array_equal(a.mean, b.mean) and np.array_equal(a.std, b.std)
    assert torch.equal(a.load(a.windows), b.load(b.windows))


@pytest.mark.parametrize('cache', caching.KINDS)
def test_windows_are_those_of_the_same_files_on_disk(published, url, cache):
    """Also cut and resized; two datasets may keep their caches in one folder, beside which nothing is written."""
    for settings in dict(resolution=8), dict(whole=True, stride=3):
        same(open_split(published, cache=cache, **settings), open_split(url, cache=cache, **settings))
    assert [str(p) for p in Path().rglob('*') if p.is_dir()] == ['data', 'data/cache', 'data/cache/blocks',
                                                                 *map(str, Path('data/cache/blocks').iterdir())]
    fsspec.filesystem('memory').mv('/well', '/better', recursive=True)
    open_split('memory://better/active_matter', cache=cache)
    kept = [p for p in Path('data/cache').glob('*.bin')]
    assert len(kept) == (0 if cache == 'none' else 3) and all(p.name.startswith('active_matter-') for p in kept)


def test_without_a_cache_a_second_pass_reads_nothing_from_the_store(url, fetched):
    """Nor does another process: a block is fetched once, when it is first needed."""
    split = open_split(url, cache='none', stride=8, cache_dir='kept')
    before = len(fetched)
    first = split.load(split.windows)
    assert before and len(fetched) == len(set(fetched))
    del fetched[:]
    assert torch.equal(split.load(split.windows), first)
    again = open_split(url, cache='none', stride=8, cache_dir='kept')
    assert torch.equal(again.load(again.windows), first) and not fetched
    assert {p.name for p in Path().iterdir()} == {'kept'} and {p.name for p in Path('kept').iterdir()} == {'blocks'}


def test_a_cache_reads_each_file_once_and_keeps_one_at_a_time(url, fetched, monkeypatch):
    """Blocks of what is stored are gone when the next file is; what is fetched is what there is."""
    store, there, blocks = caching.store, [], Path('data/cache/blocks')
    size = lambda: sum(p.stat().st_size for p in blocks.rglob('*') if p.is_file())
    monkeypatch.setattr(caching, 'store', lambda *args: there.append(size()) or store(*args))
    open_split(url)
    files = list(remote.path_of(url).glob('data/train/*.hdf5'))
    assert sorted(fetched) == [(f.name, start) for f in sorted(files) for start in range(0, f.size, 2**16)]
    assert len(there) == 2 and there[0] == 2 * there[1] and not any(blocks.iterdir())    # the headers of both, of one
    del fetched[:]
    open_split(url)
    assert not fetched                                                   # the cache is enough


def test_a_build_goes_on_after_the_store_failed(published, url, fetched, monkeypatch):
    """With the file, and the block, at which it stopped."""
    fetch, second = remote.Blocks.fetch, files_of(published)[1].name

    def failing(self, start, end):
        if (self.file.name, start) == (second, 5 * 2**16):
            raise remote.StoreError('gone')
        return fetch(self, start, end)
    monkeypatch.setattr(remote.Blocks, 'fetch', failing)
    with pytest.raises(remote.StoreError, match='gone'):
        open_split(url)
    assert {p.suffix for p in Path('data/cache').iterdir()} == {'.part', '.done', ''}
    monkeypatch.setattr(remote.Blocks, 'fetch', fetch)
    read, store = [], caching.store
    monkeypatch.setattr(caching, 'store', lambda of, i, *more: read.append(i) or store(of, i, *more))
    split = open_split(url)
    again = [block for block in fetched if block[0] == second]
    assert read == [1] and len(again) == len(set(again)) and not any(Path('data/cache/blocks').iterdir())
    same(open_split(published), split)


def test_a_failure_is_told_whichever_block_it_strikes(url, monkeypatch):
    """Never zeros in place of a field, or walls in place of periodic axes."""
    fs, fetch, left = fsspec.filesystem('memory'), remote.Blocks.fetch, [0]
    monkeypatch.setattr(remote, 'BLOCK', 2**17)
    fs.mv('/well/active_matter', '/well/unheard_of', recursive=True)

    def limited(self, start, end):
        left[0] -= 1
        if left[0] < 0:
            raise remote.StoreError('gone')
        return fetch(self, start, end)
    monkeypatch.setattr(remote.Blocks, 'fetch', limited)

    def everything():
        root, system, _ = data.find_dataset('unheard_of', 'memory://well')
        split = data.Split(root, system, 'train', cache='none', progress=False)
        return split.load(split.windows[:1])
    for allowed in range(100):
        left[0] = allowed
        shutil.rmtree('data', ignore_errors=True)
        try:
            everything()
            break
        except remote.StoreError as e:
            assert str(e) == 'gone'
    assert 10 < allowed < 100


@pytest.mark.parametrize('short', [True, False])
def test_what_comes_short_is_refused(url, monkeypatch, short):
    """A store that ends early, or gives the whole file for a part of it, as some web servers do."""
    whole = fsspec.filesystem('memory').store['/well/active_matter/data/train/' + Path(first_of(url)).name].getvalue()
    monkeypatch.setattr(type(fsspec.filesystem('memory').open(first_of(url))), 'read',
                        lambda self, n=-1: whole[:n - 1] if short else whole)
    with pytest.raises(remote.StoreError, match='bytes came, not'):
        open_split(url)


def first_of(url):
    return str(min(remote.path_of(url).glob('data/train/*.hdf5')))


def test_several_processes_store_what_one_does(published, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, 'LARGE', 1)
    same(open_split(published), open_split(f'file://{published}', cache_dir=tmp_path / 'kept'))
    assert not any((tmp_path / 'kept/blocks').iterdir())


def test_a_changed_file_makes_another_cache(published, tmp_path):
    """Its time or size, which is all that is asked: not a byte of it is read for that."""
    at = lambda: {p.name for p in (tmp_path / 'kept').glob('*.json')}
    url, first = f'file://{published}/', files_of(published)[0]
    open_split(url, cache_dir=tmp_path / 'kept')
    before = at()
    first.chmod(0o200)
    open_split(url, cache_dir=tmp_path / 'kept')
    assert at() == before and len(before) == 1
    first.chmod(0o600)
    shutil.copy(files_of(published)[1], first)
    assert (open_split(url, cache_dir=tmp_path / 'kept').scalars['alpha'] == -5).all()
    assert len(at()) == 1 and at() != before


def test_what_the_disk_cannot_hold_is_not_begun(url, monkeypatch):
    """A file in progress counts, too: it is there beside the cache."""
    size, plan = max(f.size for f in remote.path_of(url).glob('data/train/*.hdf5')), []
    build = caching.build
    monkeypatch.setattr(caching, 'build', lambda of, *more: plan.append(of) or build(of, *more))
    free = lambda n: monkeypatch.setattr(caching.shutil, 'disk_usage',
                                         lambda path: shutil._ntuple_diskusage(10**12, 10**12, n))
    free(10)
    with pytest.raises(ValueError, match='--cache int16 halves it, --cache-dir puts it elsewhere'):
        open_split(url)
    needed = plan[0].bytes('float32') + size
    free(needed - 1)
    with pytest.raises(ValueError, match='needs 0.0 GB'):
        open_split(url)
    free(needed)
    open_split(url)


def test_a_web_page_or_half_a_file_is_no_dataset(url):
    fs, first = fsspec.filesystem('memory'), remote.path_of(first_of(url))
    content = fs.cat_file(first.url)
    for broken, word in (b'<html>404</html>', 'web page'), (content[:99_999], 'not a readable HDF5 file'):
        fs.pipe_file(first.url, broken)
        with pytest.raises(ValueError, match=word):
            read_file(remote.path_of(first.url))


# ---------------------------------------------------------------------------------------------
# errors, and the scripts

@pytest.fixture
def stopped(tmp_path, monkeypatch, capsys):
    """A function that runs a script's main to its error, in an empty folder that stays empty: the last line."""
    def run_to_error(main, *flags):
        monkeypatch.chdir(tmp_path)
        before = read_bytes(tmp_path)
        with pytest.raises(SystemExit) as e:
            main([str(v) for v in flags])
        assert e.value.code == 2 and read_bytes(tmp_path) == before
        return capsys.readouterr().err.splitlines()[-1]
    return run_to_error


def test_bad_urls_are_refused(tmp_path, stopped):
    """Nothing is simulated instead, and nothing written anywhere."""
    make_published(tmp_path / 'well')
    for flags, words in (
            (['--data-dir', f'file://{tmp_path}/nowhere'], ['no dataset at file://', 'nowhere/active_matter']),
            (['--data-dir', f'file://{tmp_path}/well', '--data', 'mine'], ['no dataset at file://', 'well/mine']),
            (['--data-dir', 'nope://there'], ['nope://there/active_matter: ', 'rotocol not known'])):
        said = stopped(train.main, *TINY, *flags)
        assert said.startswith('error: ') and all(word in said for word in words), said
    said = stopped(simulate.main, 'active_matter', '--preset', 'smoke', '--data-dir', f'file://{tmp_path}/well')
    assert said.startswith('error: nothing is written to file://')


@pytest.mark.parametrize('missing, package', [('fsspec', 'huggingface_hub'), ('huggingface_hub', 'huggingface_hub')])
def test_a_missing_package_is_named(monkeypatch, missing, package):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=f'hf://datasets/nobody/a: .*: pip install "{package}"'):
        remote.path_of('hf://datasets/nobody/a').exists()
    monkeypatch.setitem(sys.modules, 'fsspec', None)
    with pytest.raises(ValueError, match=r'pip install "fsspec\[s3\]"'):
        remote.path_of('s3://bucket').exists()


class Unplugged(fsspec.AbstractFileSystem):
    def ls(self, *args, **kwargs):
        raise RuntimeError('no route\nto host')                          # clients have errors of many kinds
    info = _open = ls


def test_without_a_network_there_is_one_line(stopped):
    fsspec.register_implementation('unplugged', Unplugged, clobber=True)
    assert stopped(train.main, *TINY, '--data-dir', 'unplugged://there') == \
        'error: unplugged://there/active_matter cannot be read (RuntimeError: no route to host)'
    with pytest.raises(remote.StoreError):
        next(remote.path_of('unplugged://there').glob('*.hdf5'))


def test_names_are_those_of_paths():
    for place in 'data', '/data/', Path('a/b'):
        assert remote.path_of(place) == Path(place)
    path = remote.path_of('hf://datasets/nobody/') / 'active_matter'
    assert (str(path), path.name, str(path.parent)) == ('hf://datasets/nobody/active_matter', 'active_matter',
                                                        'hf://datasets/nobody')
    assert str(remote.path_of('memory://') / 'a') == 'memory:///a' and remote.path_of(str(path)) == path


def test_what_was_simulated_and_put_into_a_store_keeps_its_recipe(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(simulate, 'make_dataset', lambda *args, **kwargs: pytest.fail('simulated'))
    for build in True, False:
        root, system, preset = data.find_dataset('active_matter', f'file://{mini.parent}', build)
        assert preset == 'nano' and data.read_recipe(root) == {'preset': 'nano', 'seed': 0}
    monkeypatch.chdir(tmp_path)
    c, _, _ = parse(['--data-dir', f'file://{mini.parent}'], '')
    assert c.preset == 'nano' and c.data_dir == f'file://{mini.parent}' and system is find_system('active_matter')


def test_train_and_eval_from_a_url(well, trained, tmp_path, monkeypatch):
    """The same losses and errors as from the folder; the store, and the current folder's data, stay as they are."""
    store = linked(well / 'active_matter', tmp_path / 'store/active_matter')
    shutil.rmtree(store / 'cache', ignore_errors=True)
    before, here, url = read_bytes(store), tmp_path / 'here', f'file://{store.parent}'
    here.mkdir()
    monkeypatch.chdir(here)
    run('train.py', *TINY, '--data-dir', url, '--out', 'out/a', cwd=here)
    assert losses(here / 'out/a') == losses(trained)
    tables = []
    for folder in [], ['--data-dir', well]:
        run('eval.py', 'out/a', '--epochs', 1, '--stride', 24, *folder, cwd=here)
        tables.append((here / 'out/a/eval.json').read_text().split('"seconds"')[0])
    assert tables[0] == tables[1]
    train.main([str(v) for v in (*TINY, '--data-dir', url, '--out', 'out/b', '--cache', 'none', '--steps', 3)])
    loss = [np.array(losses(out))[:3, 0] for out in (here / 'out/b', trained)]
    assert np.allclose(*loss, rtol=0.2)                                  # its mean and std are estimates
    plot.main(['out/a', '--out', 'pictures'])
    assert (here / 'pictures/examples.png').exists()
    assert read_bytes(store) == before and {p.name for p in (here / 'data').iterdir()} == {'cache'}
