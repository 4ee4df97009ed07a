"""
What every script shares: flags, errors in one line, devices, progress, ranks, files. Read it last.
It is imported before torch, because it sets how torch gets its memory.
"""
import os
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')             # huge pages for CPU tensors
import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import io
import math
import platform
import re
import signal
import subprocess
import sys
import time
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
# Ctrl-C while our scripts import PyTorch: no traceback
if (Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
torch.backends.cudnn.allow_tf32 = True                         # as in the official trainer:
torch.backends.cuda.matmul.allow_tf32 = False                  # convolutions alone

FRAMES = 16                 # frames of context, and as many of target
WINDOW = 2 * FRAMES
SPLITS = 'train', 'valid', 'test'
SMOKE_DATA = 'data/smoke'   # apart: nobody should find them in place of real data
RANK, LOCAL_RANK = int(os.environ.get('RANK', 0)), int(os.environ.get('LOCAL_RANK', 0))
WORLD = int(os.environ.get('WORLD_SIZE', 1))                   # torchrun sets all three

# --- flags; first those that are gone, and what to do now
GONE = {'--cache': 'the cache always holds float32 values; --cache-dir says where',
        '--log-every': 'every step is read and logged',
        '--all': 'python -m benchmark.report makes the tables; name several runs to compare them',
        '--latents': 'python -m baselines.latents FOLDER --data NAME'}

def option(default, help='', group='model', bare=None):
    """A dataclass field that becomes a flag. bare: its value when the flag is given alone."""
    return dataclasses.field(default=default, metadata=dict(help=help, group=group, bare=bare))

class Parser(argparse.ArgumentParser):
    """Flags from dataclasses. Bad flags raise ValueError; there are no abbreviations."""
    def __init__(self, description, **settings):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def add_dataclass(self, cls, defaults=None):
        """A flag for each field: bool, int, float, str or tuple (numbers with commas between).
        A flag that is not given is absent. defaults: what --help shows, {name: value}."""
        types = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            flag, kind = '--' + f.name.replace('_', '-'), KINDS.get(types[f.name])
            where = f'{cls.__module__}.py: {cls.__name__}.{f.name}'    # a model's own may be wrong
            if kind is None or f.default is dataclasses.MISSING:
                raise ValueError(f'{where} must be a bool, int, float, str or tuple with a default')
            if flag in self._option_string_actions:
                raise ValueError(f'{where} is a flag already, take another name')
            # a switch, or a flag with a value, which a bool need not have
            bare = f.metadata.get('bare')
            extra = dict(type=kind, metavar=kind.__name__.upper())
            if bare is True:
                extra = dict(action='store_true')
            elif kind is boolean or bare is not None:
                extra |= dict(nargs='?', const=True if bare is None else bare)
            # its line in --help
            shown = as_text((defaults or {}).get(f.name, f.default))
            text = f.metadata.get('help', '') + (f' (default: {shown})' if shown else '')
            title, text = f.metadata.get('group', 'model'), text.replace('%', '%%').strip()
            titled = {group.title: group for group in self._action_groups}
            group = titled.get(title) or self.add_argument_group(title)
            group.add_argument(flag, default=argparse.SUPPRESS, help=text, **extra)

    def error(self, message):
        for flag in GONE:
            if re.search(f'{flag}( |=|$)', message):
                message = f'{flag} is gone: {GONE[flag]}'
        raise ValueError(f'{message}; python {self.prog} --help lists the flags')

def parse(description, cls, argv, **positional):
    """(`cls` of the flags, the value of each positional argument). argv None: the command line."""
    parser = Parser(description)
    for name, settings in positional.items():
        parser.add_argument(name, **settings)
    parser.add_dataclass(cls)
    given = vars(parser.parse_args(argv))
    values = [given.pop(name) for name in positional]
    return cls(**given), *values

def as_text(value):
    return ','.join(map(str, value)) if isinstance(value, tuple) else str(value)

def boolean(text):
    if text.lower() not in ('true', 'false'):
        raise ValueError(text)
    return text.lower() == 'true'

def number(text):
    if not math.isfinite(float(text)):                         # neither nan nor inf is a setting
        raise ValueError(text)
    return float(text)

def numbers(text):
    return tuple(int(v) if v.strip().lstrip('+-').isdigit() else number(v) for v in text.split(','))

KINDS = {bool: boolean, int: int, float: number, str: str, tuple: numbers}

def at_least(settings, low, *names):
    """Raise ValueError if one of these fields of a dataclass is under `low`."""
    for name, value in ((name, getattr(settings, name)) for name in names):
        if value < low:
            raise ValueError(f'--{name.replace("_", "-")} must be at least {low}, not {value}')

# --- how a script ends
SIGNALS = [s for s in signal.Signals if s.name in ('SIGTERM', 'SIGINT', 'SIGUSR1')]
RANK_ENDED = 'closed by peer|reset by peer|Connection refused|NCCL'      # as PyTorch says it
# where memory ends: what PyTorch says, and what to try then, in this order
MEMORY_ENDED = "out of memory|not enough memory|can't allocate memory|ALLOC_FAILED"
LESS_MEMORY = {
    'train.py': 'try, in this order, --dtype bfloat16 (where a GPU has none: float16), --recompute '
                'mlp, --recompute blocks, then a smaller --micro-batch, which changes the loss of '
                '--preset paper: its statistics are those of a micro-batch',
    'eval.py': 'try a smaller --batch'}

class Stop(contextlib.ContextDecorator):
    """A signal ends a script in one line, with exit code 128 + its number. It is raised as
    KeyboardInterrupt. Where `waits` is true it is only noted as `number`: the script says `where`
    it stops. A second one ends the process at once."""
    number, waits, where = 0, False, ''

    def __enter__(self):
        self.number, self.waits, self.where = 0, False, ''
        # what is ignored stays ignored, as Ctrl-C is by what a shell runs in the background
        self.before = {s: signal.signal(s, self.receive) for s in SIGNALS
                       if signal.getsignal(s) != signal.SIG_IGN}

    def __exit__(self, kind, error, trace):
        for s, handler in self.before.items():
            signal.signal(s, handler)
        if kind is KeyboardInterrupt or self.where:
            number = self.number or signal.SIGTERM
            if RANK == 0:
                kept = self.where or ': files that are complete are kept'
                print(f'stopped by {signal.Signals(number).name}{kept}', file=sys.stderr)
            sys.exit(128 + number)

    def receive(self, number, frame):
        if not self.number:
            self.number, self.came = number, time.monotonic()
            if not self.waits:
                raise KeyboardInterrupt
            if RANK == 0:                                      # print may be at work
                os.write(2, b'\nstopping after this step; a second signal ends it at once\n')
        # torchrun repeats what its processes may have had from the scheduler
        elif 'TORCHELASTIC_RUN_ID' not in os.environ or time.monotonic() > self.came + 2:
            os._exit(128 + number)

STOP = Stop()

def script(main):
    """Decorate main(): an error that a user can mend ends in one line and exit code 2."""
    @STOP
    @functools.wraps(main)
    def wrapped(*args):
        keep_freed_memory()
        try:
            main(*args)
            end_ranks()
        except Exception as e:                                 # what a user can mend: no traceback
            STOP.waits = False
            if said := out_of_memory(e):
                file = Path(main.__code__.co_filename).name
                e = MemoryError(f'{said}: {LESS_MEMORY.get(file, "try smaller sizes")}')
            if RANK > 0 or WORLD > 1 and isinstance(e, RuntimeError):    # another rank says why
                time.sleep(10)

            # who else has ended, and what no user can mend
            if WORLD > 1 and isinstance(e, RuntimeError) and re.search(RANK_ENDED, str(e)):
                e = ChildProcessError('another rank has ended: its last words say why')
            if not isinstance(e, (ValueError, OSError, MemoryError, FloatingPointError)):
                raise
            note = " (torchrun's own report follows and adds nothing)" if WORLD > 1 else ''
            print('error:', ' '.join(str(e).split()) + note, file=sys.stderr, flush=True)
            sys.exit(2)
    return wrapped

def out_of_memory(e):
    """What did not fit, in words, if memory ended with this exception; else ''."""
    ended = isinstance(e, RuntimeError) and re.search(MEMORY_ENDED, str(e))
    if not ended and not isinstance(e, MemoryError):
        return ''
    asked = re.search(r'allocate (\d[\d.]* \w+)', str(e))
    return 'out of memory' + (f', {asked[1]} more did not fit' if asked else '')

# --- machine
def pick_device(name):
    """'cuda', 'mps' or 'cpu'; `auto` is cuda if it is there. ValueError for what is not there."""
    there = {'cpu': True, 'cuda': torch.cuda.is_available(),
             'mps': torch.backends.mps.is_available()}         # a Mac's GPU; nobody has tried it
    if name == 'auto':
        return 'cuda' if there['cuda'] else 'cpu'
    if not there.get(name):
        raise ValueError(f'no device {name!r} on this machine: use --device cpu')
    return name

def fast_dtype():
    """bfloat16 if this GPU computes in it; else float16. A T4 would only emulate it, slowly."""
    try:
        real = torch.cuda.is_bf16_supported(including_emulation=False)
    except TypeError:                                          # an older PyTorch cannot tell
        real = torch.cuda.get_device_capability() >= (8, 0)
    return 'bfloat16' if real else 'float16'

def autocast(device, dtype=None):
    """Compute in a lower dtype here, where the device can; None: in none, even inside another."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, enabled=dtype is not None)

def peak_memory():
    """Peak memory of this process in GB: the GPU's if it uses one, else resident (0: unknown)."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    with contextlib.suppress(ImportError):                     # Windows has no such module
        import resource
        unit = 1 if sys.platform == 'darwin' else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return 0.0

def mean_and_std(x, dim):
    """Mean and unbiased std over some axes, which stay: on CPU, 5 times torch.std_mean's speed."""
    mean = x.mean(dim, keepdim=True)
    norm = torch.linalg.vector_norm(x - mean, dim=dim, keepdim=True)     # no spread: gradient zero
    return mean, norm / math.sqrt(x.numel() // mean.numel() - 1)

def keep_freed_memory():
    """Ask glibc to keep freed blocks: it saves a third of a training step on CPU."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX (threads share one arena)
        for parameter, value in (-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1):
            libc.mallopt(parameter, value)

def machine(device):
    """What this runs on, in words. device: cuda, mps or cpu."""
    cores = f'{torch.get_num_threads()} of {os.cpu_count()} cores'
    return f'{processor(device)}, {cores}, PyTorch {torch.__version__}'

def processor(device):
    """The name of the GPU, of all ranks' GPUs, or of the CPU. device: cuda, mps or cpu."""
    if device == 'cuda':
        return (f'{WORLD} x ' if WORLD > 1 else '') + torch.cuda.get_device_name()
    info = Path('/proc/cpuinfo')                               # Linux names the CPU here
    found = re.search('model name.*: (.*)', info.read_text()) if info.exists() else None
    cpu = found[1] if found else platform.processor() or platform.machine()
    return f'{cpu}, its GPU' if device == 'mps' else cpu

def git_hash():
    """The commit of this code, with -dirty if a Python file has changed since."""
    def git(*words):
        return subprocess.run(['git', *words], cwd=Path(__file__).parent, capture_output=True,
                              text=True, check=True).stdout.strip()
    try:
        changed = git('status', '--porcelain', '--untracked-files=no', '*.py')
        return git('rev-parse', 'HEAD') + ('-dirty' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'

class Progress(tqdm):
    """tqdm's bar on a terminal; in a log file, a plain line every five seconds."""
    PLAIN = '{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} so far, {remaining} to go{postfix}'
    def __init__(self, work, desc, unit, **settings):          # work: a number, or an iterable
        settings |= dict(total=work) if isinstance(work, int) else dict(iterable=work)
        self.plain = not sys.stderr.isatty()
        if self.plain:                                         # work of under a second is silent
            settings |= dict(mininterval=5, delay=1, bar_format=self.PLAIN)
        super().__init__(desc=desc, unit=unit, **settings)

    @staticmethod
    def status_printer(file):
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda line: line and print(line, file=file, flush=True)

    def close(self):
        if self.plain and not self.disable:
            if time.time() > self.start_t + self.delay:
                self.refresh()                                 # the last line,
            self.leave, self.fp = False, io.StringIO()         # and no empty one after it
        super().close()

def draw_seed(numbers):
    """A seed for torch from a tuple of numbers: other numbers, other random bits, all of them."""
    return int(np.random.default_rng(numbers).integers(2**63))

def prefetch(load, jobs, workers):
    """load(job) for each job, in order, computed ahead by `workers` threads."""
    with ThreadPoolExecutor(workers) as pool:
        pending = []
        try:
            for job in jobs:                                   # one more than workers is under way
                pending.append(pool.submit(load, job))
                if len(pending) > workers:
                    yield pending.pop(0).result()
            while pending:                                     # the last ones
                yield pending.pop(0).result()
        finally:
            pool.shutdown(cancel_futures=True)

# --- ranks: the processes of torchrun, on one computer or several, which may not share a disk
def start_ranks(device, backend='gloo'):
    """Join the other ranks, if there are any; on cuda each takes its GPU."""
    if WORLD == 1 or dist.is_initialized():
        return
    if device == 'mps':
        raise ValueError('one process for --device mps, without torchrun')
    if device == 'cuda':
        gpus = torch.cuda.device_count()
        if LOCAL_RANK >= gpus:
            raise ValueError(f'more processes than the {gpus} GPUs here: lower --nproc_per_node')
        torch.cuda.set_device(LOCAL_RANK)
    dist.init_process_group(backend, timeout=datetime.timedelta(days=2))  # rank 0 may take hours

def end_ranks():
    """Leave the other ranks: a process that ends without it may abort after its work is done."""
    if WORLD > 1 and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()

@contextlib.contextmanager
def one_rank_first(is_first):
    """The ranks for which `is_first` is true go before the others, which find their work done."""
    if WORLD > 1 and not is_first:
        dist.barrier()
    yield
    if WORLD > 1 and is_first:
        dist.barrier()

def say(*words):
    """Print, on rank 0 only."""
    if RANK == 0:
        print(*words, flush=True)

def from_rank_0(value):
    """Rank 0's value, on all ranks."""
    values = [value]
    if WORLD > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]

def gather_on_rank_0(value):
    """The values of all ranks, in order, on rank 0; [] on the others."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD if RANK == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []

# --- files
def data_folder(flag, of_run=''):
    """The flag's folder of datasets, else $THE_WELL_DATA_DIR, else that of a run, else data."""
    variable = '' if str(of_run) == SMOKE_DATA else os.environ.get('THE_WELL_DATA_DIR')
    folder = flag or variable or of_run or 'data'
    if '://' in str(folder):
        raise ValueError(f'URLs are gone, as {folder}: the-well-download, then --data-dir')
    return Path(folder)

@contextlib.contextmanager
def complete_file(path):
    """The name of a part to write: it becomes `path` when it is done, and goes if that fails.
    Raises OSError naming `path`, which stays as it was."""
    part = path.with_name(path.name + '.part')
    try:
        yield part
        os.replace(part, path)
    except BaseException as e:
        part.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise type(e)(f'{path} cannot be written: {e.strerror or e}') from None
        raise

def write_bytes(path, content):
    """A file that is complete or not there at all."""
    with complete_file(path) as part:
        part.write_bytes(content)

def write_text(path, text):
    write_bytes(path, text.encode())

def write_tensors(path, state):
    """A file of plain types and tensors, complete or not there at all."""
    with complete_file(path) as part, open(part, 'wb') as file:
        try:
            torch.save(state, file)
        except RuntimeError as e:                              # torch's words for a failed write
            raise e.__context__ if isinstance(e.__context__, OSError) else e

def read_tensors(path, safe=()):
    """The dict in a torch.save file of plain types, tensors and classes in `safe`.
    It never runs code from the file. Raises ValueError for other files, OSError for none."""
    try:
        # torch.save packs nothing: what would be larger than its file is no checkpoint
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as parts:
            if sum(part.file_size for part in parts.infolist()) > os.path.getsize(path):
                raise ValueError
        with torch.serialization.safe_globals(list(safe)) if safe else contextlib.nullcontext():
            state = torch.load(path, map_location='cpu', weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception:                                          # of pickle, zip and io: many kinds
        raise ValueError(f'{path} is not a checkpoint: cut short, or not plain tensors') from None
    if not isinstance(state, dict):
        raise ValueError(f'{path} is not a checkpoint: it holds no state dict')
    return state

def published_state(path, under='', safe=()):
    """A published state dict, bare or `under` a key of the file, without DDP's 'module.'."""
    state = read_tensors(path, safe)
    state = state.get(under, state)
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f'{path} holds no state dict' + (f' under {under}' if under else ''))
    wrapped = all(str(k).startswith('module.') for k in state)
    return {str(k).removeprefix('module.' if wrapped else ''): v for k, v in state.items()}

def check_state(ours, state, path):
    """Raise ValueError, naming the key, unless both have the same keys and shapes."""
    for k in sorted(ours.keys() | state.keys()):
        there = tuple(state[k].shape) if k in state else 'missing'
        here = tuple(ours[k].shape) if k in ours else 'unknown'
        if there != here:
            raise ValueError(f'{path} is of another model: {k} is {there} there, {here} here')

@contextlib.contextmanager
def alone_in(folder, wait=True):
    """Other processes that want the same folder wait for this one, if it can be locked. wait:
    if not, they raise ValueError."""
    lock = None
    with contextlib.suppress(ImportError, OSError):
        import fcntl
        lock = os.open(folder, os.O_RDONLY)                    # closed, it is unlocked
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ValueError(f'another process writes to {folder}: wait for its end') from None

    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
