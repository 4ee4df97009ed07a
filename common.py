"""
What every script shares: flags from dataclasses, errors in one line, devices, ranks, files, locks, progress.

Imported before torch, whose memory settings it makes.
"""
import os
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')                       # huge pages for CPU tensors, read by torch

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import io
import itertools
import math
import platform
import re
import subprocess
import sys
import time
import typing
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from remote import StoreError, path_of

torch.backends.cudnn.allow_tf32 = True                                   # in convolutions, and not in matrix products:
torch.backends.cuda.matmul.allow_tf32 = False                            # as the official trainer runs

FRAMES = 16                 # of context, and as many of target
SPLITS = 'train', 'valid', 'test'
RANK, WORLD = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))     # torchrun sets them


# ---------------------------------------------------------------------------------------------
# flags

def option(default, help='', group='model', bare=None):
    """A dataclass field that becomes a flag, with dashes for underscores.

    bare: its value when it is given alone; a bool whose bare is True is a switch that takes no value.
    """
    return dataclasses.field(default=default, metadata={'help': help, 'group': group, 'bare': bare})


class Parser(argparse.ArgumentParser):
    """Flags from dataclasses. Bad ones raise ValueError; there are no abbreviations."""

    def __init__(self, description, **settings):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **settings)
        self.titled = {}                                                 # groups

    def add_dataclass(self, cls, defaults=None):
        """A flag for every field, in the groups of its `option`s. `defaults`: what --help shows in place of the own.

        Fields are bool, int, float, str or tuple (numbers, with commas between). A flag that is not given is absent.
        """
        types = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            title, kind = f.metadata.get('group', 'model'), KINDS.get(types[f.name])
            if kind is None or f.default is dataclasses.MISSING:
                raise ValueError(f'{cls.__module__}.py: {cls.__name__}.{f.name} must be a bool, int, float, str or '
                                 f'tuple with a plain default')
            if '--' + f.name.replace('_', '-') in self._option_string_actions:
                raise ValueError(f'{cls.__module__}.py: {cls.__name__}.{f.name} is a flag already, take another name')
            if title not in self.titled:
                self.titled[title] = self.add_argument_group(title)
            value = (defaults or {}).get(f.name, f.default)
            shown = ','.join(map(str, value)) if isinstance(value, tuple) else value
            bare = f.metadata.get('bare')
            if kind is boolean and bare is True:
                extra = dict(action='store_true')
            else:
                extra = dict(type=kind, metavar=kind.__name__.upper())
                if kind is boolean or bare is not None:
                    extra |= dict(nargs='?', const=True if bare is None else bare)
            about = f.metadata.get('help', '') + ('' if shown in ('', None) else f' (default: {shown})')
            self.titled[title].add_argument('--' + f.name.replace('_', '-'), default=argparse.SUPPRESS,
                                            help=about.replace('%', '%%').strip(), **extra)

    def error(self, message):
        raise ValueError(f'{message}; python {self.prog} --help lists the flags')


def parse(description, cls, argv, **positional):
    """(`cls` of the flags in argv, then the value of each positional argument); argv None: the command line."""
    parser = Parser(description)
    for name, settings in positional.items():
        parser.add_argument(name, **settings)
    parser.add_dataclass(cls)
    given = vars(parser.parse_args(argv))
    values = [given.pop(name) for name in positional]
    return cls(**given), *values


def boolean(text):
    if text.lower() not in ('true', 'false'):
        raise ValueError(text)
    return text.lower() == 'true'


def number(text):
    """A finite float: neither nan nor inf is a setting."""
    if not math.isfinite(float(text)):
        raise ValueError(text)
    return float(text)


def numbers(text):
    return tuple(int(v) if v.strip().lstrip('+-').isdigit() else number(v) for v in text.split(','))


KINDS = {bool: boolean, int: int, float: number, str: str, tuple: numbers}


def at_least(settings, low, *names):
    """Raise ValueError if one of these fields of a dataclass is under `low`."""
    for name in names:
        if getattr(settings, name) < low:
            raise ValueError(f'--{name.replace("_", "-")} must be at least {low}, not {getattr(settings, name)}')


def script(main):
    """Decorate a script's main(): what a user can mend ends in one line and exit code 2, without a traceback."""
    @functools.wraps(main)
    def wrapped(*args):
        keep_freed_memory()
        try:
            return main(*args)
        except Exception as e:
            if RANK > 0:                                                 # the first rank says it, if it can
                time.sleep(10)
            if not isinstance(e, (ValueError, OSError, FloatingPointError, StoreError)):
                raise
            note = " (torchrun's own report, with exit code 1, follows and adds nothing)" if WORLD > 1 else ''
            print(f'error: {" ".join(str(e).split())}{note}', file=sys.stderr, flush=True)
            sys.exit(2)
    return wrapped


# ---------------------------------------------------------------------------------------------
# machine

def pick_device(name):
    """'cuda' or 'cpu'; `auto` is the first of them that is there. Raises ValueError for what is not."""
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    if name not in ('cpu', 'cuda') or name == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'device {name!r} is not to be had here: --device cpu always is')
    return name


def peak_memory():
    """Peak memory of this process in GB: the GPU's if it uses one, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e9


def mean_and_std(x, dim):
    """Mean and unbiased standard deviation over some axes, which stay with size 1.

    In two passes, which on CPU are five times as fast as torch.std_mean in its one; no spread has the gradient zero.
    """
    mean = x.mean(dim, keepdim=True)
    n = x.numel() // mean.numel()
    return mean, torch.linalg.vector_norm(x - mean, dim=dim, keepdim=True) / math.sqrt(n - 1)


def keep_freed_memory():
    """Ask glibc to keep freed blocks for reuse: giving them back costs a third of a training step on CPU."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX: threads reuse each other's
        for parameter, value in (-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1):
            libc.mallopt(parameter, value)


def machine(device):
    """What this runs on, in words. device: cuda or cpu."""
    info = Path('/proc/cpuinfo')                                         # Linux says which CPU, at times
    named = re.search('model name.*: (.*)', info.read_text()) if info.exists() else None
    cpu = named[1] if named else platform.processor() or platform.machine()
    name = torch.cuda.get_device_name() if device == 'cuda' else cpu
    return f'{name}, {torch.get_num_threads()} of {os.cpu_count()} cores, PyTorch {torch.__version__}'


def git_hash():
    """The commit of this code, with -dirty if a Python file has been changed since (results and pages may)."""
    git = lambda *words: subprocess.run(['git', *words], cwd=Path(__file__).parent, capture_output=True, text=True,
                                        check=True).stdout.strip()
    try:
        return git('rev-parse', 'HEAD') + '-dirty' * bool(git('status', '--porcelain', '--untracked-files=no', '*.py'))
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


class Progress(tqdm):
    """tqdm's bar on a terminal; in a log file a plain line every five seconds, none for what takes less than one."""

    def __init__(self, work, desc, unit, **settings):
        """`work`: how much there is to do, or the things to iterate over."""
        settings |= dict(total=work) if isinstance(work, int) else dict(iterable=work)
        self.plain = not sys.stderr.isatty()
        if self.plain:
            settings |= dict(mininterval=5, delay=1, bar_format='{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} '
                                                                'so far, {remaining} to go{postfix}')
        super().__init__(desc=desc, unit=unit, **settings)

    @staticmethod
    def status_printer(file):
        return tqdm.status_printer(file) if file.isatty() else lambda line: line and print(line, file=file, flush=True)

    def close(self):
        if self.plain and not self.disable:
            if time.time() > self.start_t + self.delay:
                self.refresh()                                           # the last line
            self.leave, self.fp = False, io.StringIO()                   # and no empty one after it
        super().close()


def prefetch(load, jobs, workers):
    """load(job) for each job, in order, computed ahead by `workers` threads."""
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        try:
            for job in jobs:
                pending.append(pool.submit(load, job))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for p in pending:
                p.cancel()


class Timed:
    """An iterator that keeps how long one waited for it, in `seconds`."""

    def __init__(self, things):
        self.things, self.seconds = iter(things), 0.0

    def __iter__(self):
        return self

    def __next__(self):
        start = time.perf_counter()
        try:
            return next(self.things)
        finally:
            self.seconds += time.perf_counter() - start


def sent(x, device):
    """A CPU tensor on a device, which nobody waits for."""
    if torch.device(device).type == 'cuda':
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()                                  # it cannot trace pinned memory
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def on_gpu(batches):
    """Tuples of CPU tensors (pinned ones, if it is to be of use) on the GPU, each copied while the one before is used.

    The processor, which does not wait for what it asks of the GPU, is held back here, two batches ahead of it: it
    would fill the GPU's memory. Three batches may be there at a time.
    """
    copies, ahead, used = torch.cuda.Stream(), deque(), deque()
    for batch in itertools.chain(batches, [None]):
        if batch is not None:
            with torch.cuda.stream(copies):
                ahead.append(([part.to('cuda', non_blocking=True) for part in batch], copies.record_event()))
        if ahead and (batch is None or len(ahead) > 1):
            parts, copied = ahead.popleft()
            torch.cuda.current_stream().wait_event(copied)
            for part in parts:
                part.record_stream(torch.cuda.current_stream())          # whose work is done before its memory is free
            yield parts
            del parts, part                                              # the batch may be let go
            used.append(torch.cuda.Event(blocking=True))
            used[-1].record()
            if len(used) > 1:
                used.popleft().synchronize()


# ---------------------------------------------------------------------------------------------
# ranks: the processes of torchrun, on one computer or several, which may not share a disk

def start_ranks(device, backend='gloo'):
    """Join the other ranks, if there are any; on cuda each takes its GPU. backend: nccl for what lies there."""
    if WORLD == 1:
        return
    if device == 'cuda':
        if int(os.environ['LOCAL_RANK']) >= torch.cuda.device_count():
            raise ValueError(f'more processes than the {torch.cuda.device_count()} GPUs here: lower --nproc_per_node')
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    # the others wait while the first simulates, caches or probes, which may take hours
    dist.init_process_group(backend, timeout=datetime.timedelta(days=2))


def say(*words):
    """Print, on the first rank only."""
    if RANK == 0:
        print(*words, flush=True)


def shared(value):
    """The first rank's value, on all ranks."""
    values = [value]
    if WORLD > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gathered(value):
    """The values of all ranks, in order, on the first; [] on the others."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD if RANK == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


# ---------------------------------------------------------------------------------------------
# files

def data_folder(flag, of_run=''):
    """The folder of datasets, or its URL: the flag's, else $THE_WELL_DATA_DIR, else that of a run, else data."""
    return path_of(flag or os.environ.get('THE_WELL_DATA_DIR') or of_run or 'data')


def write_bytes(path, content):
    """A file that is complete or not there at all."""
    part = path.with_name(path.name + '.part')
    part.write_bytes(content)
    os.replace(part, path)


def write_text(path, text):
    write_bytes(path, text.encode())


def write_tensors(path, state):
    """A file of plain types and tensors, complete or not there at all."""
    part = path.with_name(path.name + '.part')
    torch.save(state, part)
    os.replace(part, path)


def read_tensors(path, safe=()):
    """The dict in a torch.save file of plain types, tensors and classes in `safe`; never runs code from it.

    Raises ValueError in one line for any other file, OSError for one that is not there.
    """
    try:
        with torch.serialization.safe_globals(list(safe)) if safe else contextlib.nullcontext():
            state = torch.load(path, map_location='cpu', weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception:                                                    # pickle, zip and io errors of many kinds
        raise ValueError(f'{path} is not a checkpoint: it is cut short, or holds more than plain tensors') from None
    if not isinstance(state, dict):
        raise ValueError(f'{path} is not a checkpoint: it holds a {type(state).__name__}, no state dict')
    return state


def published_state(path, under='', safe=()):
    """A published state dict, bare or `under` a key of the file, without the 'module.' that DDP puts before names."""
    state = read_tensors(path, safe)
    state = state.get(under, state)
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f'{path} holds no state dict' + (f', bare or under {under}' if under else ''))
    wrapped = all(str(k).startswith('module.') for k in state)
    return {str(k).removeprefix('module.' if wrapped else ''): v for k, v in state.items()}


def check_state(own, state, path):
    """Raise ValueError, naming the first such key, if `state` lacks one of `own`, or has another or another shape."""
    for k in sorted(own.keys() | state.keys()):
        if k not in state or k not in own or own[k].shape != state[k].shape:
            raise ValueError(f'{path} is of another model: {k} is '
                             f'{tuple(state[k].shape) if k in state else "missing"} there, '
                             f'{tuple(own[k].shape) if k in own else "unknown"} here')


@contextlib.contextmanager
def alone_in(folder):
    """Other processes that want the same folder, or file, wait for this one; where none can be locked, nobody does.

    Gives the lock's file descriptor, or None: a child process that inherits it holds the lock as well.
    """
    lock = None
    with contextlib.suppress(ImportError, OSError):
        import fcntl
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield lock
    finally:
        if lock is not None:
            os.close(lock)
