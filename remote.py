"""
Datasets in a store: hf://, s3://, https:// and whatever else fsspec reads, with what is used here of pathlib.Path.

    path_of('hf://datasets/polymathic-ai') / 'active_matter'     a Remote; of a plain folder, a Path
    h5py.File(opened(path))                                      of either

HDF5 reads bytes here and there. A Remote fetches them in blocks of 8 MB, each of which becomes a file of its own: it is
complete or not there, all threads and processes share it, and what was fetched once is not fetched again. (fsspec's
blockcache calls a block present before it is: after a failed request it gives zeros.) Nothing is written to a store.
"""
import contextlib
import fnmatch
import functools
import hashlib
import io
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

BLOCK = 2**23
AHEAD = 2**16               # bytes that fsspec may fetch beyond a block
PACKAGES = {'hf': 'huggingface_hub', 'https': 'fsspec[http]'}            # of other protocols fsspec[protocol]
VERSIONS = ('ETag', 'etag', 'blob_id', 'md5Hash', 'mtime', 'LastModified', 'last_modified', 'Last-Modified', 'updated',
            'created')      # what stores call that which tells a file's content from an earlier one, the surest first


def path_of(place):
    """A folder or file by its name: Remote if it is a URL, else Path."""
    text = str(place)
    return Remote(text if text.endswith('://') else text.rstrip('/')) if '://' in text else Path(place)


def opened(path):
    """What h5py.File takes: a Path as it is, a Remote as a file-like object."""
    return path.open() if isinstance(path, Remote) else path


def kept_in(folder, path):
    """The path, of which `folder` keeps the blocks that are read if it is a Remote."""
    return replace(path, kept=folder / 'blocks') if isinstance(path, Remote) else path


def forget(path):
    """Remove the blocks of a Remote that are kept."""
    if isinstance(path, Remote):
        shutil.rmtree(path.blocks, ignore_errors=True)


class StoreError(Exception):
    """A store did not give what it has: going on later may help, as it does not with a ValueError or an OSError."""


@contextlib.contextmanager
def asking(url):
    """Whatever a store's client raises, as StoreError in one line."""
    try:
        yield
    except Exception as e:
        raise StoreError(f'{url} cannot be read ({type(e).__name__}: {e})') from None


@dataclass(frozen=True, order=True)
class Remote:
    """A file or folder of a store. kept: folder for its blocks; without one they last as long as a file is open.

    Raises ValueError for a protocol that nobody here speaks, StoreError if the store does not answer.
    """
    url: str
    kept: Path = None

    def __str__(self):
        return self.url

    def __truediv__(self, name):
        return Remote(f'{self.url}/{name}', self.kept)

    @property
    def name(self):
        return self.url.rpartition('/')[2]

    @property
    def parent(self):
        return Remote(self.url.rpartition('/')[0], self.kept)

    def resolve(self):
        return self

    @property
    def store(self):
        """(fsspec's file system, the path there)."""
        protocol = self.url.partition('://')[0].rpartition('::')[2]
        try:
            import fsspec
            return fsspec.core.url_to_fs(self.url)
        except ImportError as e:
            package = PACKAGES.get(protocol, f'fsspec[{protocol}]')
            raise ValueError(f'{self.url}: {e}: pip install "{package}"') from None
        except ValueError as e:
            raise ValueError(f'{self.url}: {e}') from None

    @functools.cached_property
    def info(self):
        """What the store tells of it, a dict; {} if there is nothing of that name."""
        fs, path = self.store
        with asking(self):
            with contextlib.suppress(FileNotFoundError):
                return fs.info(path)
        return {}

    def exists(self):
        return bool(self.info)

    @property
    def size(self):
        """Bytes of a file."""
        if self.info.get('size') is None:
            raise StoreError(f'{self} cannot be read: the store does not tell its size')
        return self.info['size']

    @property
    def version(self):
        """Text that changes with a file's content, without reading it: its size, and a hash or time that the store has.
        """
        return f'{self.size} {next((self.info[key] for key in VERSIONS if self.info.get(key)), "")}'

    def glob(self, pattern):
        """What is there of a pattern like data/*/*.hdf5, in the store's order."""
        first, _, rest = pattern.partition('/')
        fs, path = self.store
        with asking(self):
            try:
                entries = fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                entries = []
        for entry in entries:
            below = self / entry['name'].rstrip('/').rpartition('/')[2]
            if fnmatch.fnmatchcase(below.name, first) and not (rest and entry['type'] != 'directory'):
                yield from below.glob(rest) if rest else [below]

    @property
    def blocks(self):
        """Folder of this file's blocks, in the version of now."""
        return self.kept / hashlib.sha256(f'{self} {self.version}'.encode()).hexdigest()[:16]

    def open(self, mode='rb'):
        """The file, for reading bytes."""
        return io.BufferedReader(Blocks(self), 2**16)

    def read_text(self):
        with self.open() as f:
            return f.read().decode()


class Blocks(io.RawIOBase):
    """The bytes of a Remote, block by block from disk, those that are missing from the store."""

    def __init__(self, file):
        self.file, self.at, self.folder = file, 0, file.kept and file.blocks
        if not self.folder:
            self.folder = Path(tempfile.mkdtemp())
            weakref.finalize(self, shutil.rmtree, self.folder, True)

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, self.file.size)[whence]
        return self.at

    def readinto(self, out):
        if self.at >= self.file.size:
            return 0
        number, start = divmod(self.at, BLOCK)
        with self.block(number) as f:
            f.seek(start)
            n = f.readinto(out)                                          # no further than to the block's end
        self.at += n
        return n

    def block(self, number):
        """The file of a block, open; it is fetched if it is not there."""
        path = self.folder / str(number)
        with contextlib.suppress(FileNotFoundError):                     # another process may forget it at any time
            return open(path, 'rb')
        content = self.fetch(number * BLOCK, min((number + 1) * BLOCK, self.file.size))
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as part:
            part.write(content)
        os.replace(part.name, path)
        return open(path, 'rb')

    def fetch(self, start, end):
        """Bytes from `start` to `end` of the store's file."""
        fs, path = self.file.store
        with asking(self.file), fs.open(path, block_size=AHEAD) as f:
            f.seek(start)
            content = f.read(end - start)
        if len(content) != end - start:
            raise StoreError(f'{self.file} cannot be read: {len(content)} bytes came, not {end - start}')
        return content
