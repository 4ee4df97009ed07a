"""
Windows of a dataset through the encoder of a run: the tokens that are probed.

    a checkpoint --Run--> windows of train, valid and test --embed--> tokens (n, N, D) of each, and their labels

Under torchrun every rank embeds its share of the batches, on its own GPU. The first gathers them and alone does all
else; the others stay in `embed_along`, and need no disk but for the data. Tokens do not depend on the number of ranks,
nor does the noise in them on the size of a batch.
"""
import itertools

from common import (FRAMES, RANK, SPLITS, WORLD, Progress, data_folder, gathered, git_hash, pick_device, prefetch,
                    shared)

import numpy as np
import torch

import model as models
import probe
from config import Config
from data import WINDOW, Split, find_dataset, read_recipe
from generalize import spoilt
from remote import StoreError
from systems.numerics import Grid

LOADED = 2**26             # bytes of windows that are embedded at once


class Run:
    """A checkpoint, its Config and the splits it is probed on.

    path: the file, or the folder it lies in. args: eval.Settings. state: what the file holds, where it has been read.
    """

    def __init__(self, path, args, state=None):
        self.path = models.checkpoint_of(path)
        self.state = state or models.load_checkpoint(self.path)
        self.device, self.batch = pick_device(args.device), args.batch
        try:
            self.c = c = Config(**self.state['config'])
        except TypeError:
            raise ValueError(f'{self.path} was written by another version of train.py') from None
        self.name, self.module = models.title(c.model) + ', supervised' * c.supervised, models.find_model(c.model)
        self.labels, self.channels = self.state['labels'], self.state['inputs']['channels']
        self.root, self.system, _ = find_dataset(c.data, data_folder(args.data_dir, c.data_dir))
        self.splits = {s: Split(self.root, self.system, s, c.resolution, c.stride, c.cache_dir, whole=c.whole,
                                cache=c.cache)
                       for s in SPLITS if s != 'test' or args.split == 'test' or args.save_embeddings}
        for name, split in self.splits.items():
            if split.channels != self.channels or not set(self.labels) <= split.scalars.keys():
                raise ValueError(f'{self.root}, {name}: channels or scalars are not those {self.path} was trained on')
        self.shown = [self.system.name_of(name) for name in self.labels]
        self.git = git_hash()                                            # of the code that evaluates, as it starts
        self.probe_seed = args.seed if args.seed >= 0 else c.seed
        self.seeds = {'data': read_recipe(self.root).get('seed', 'none'), 'training': c.seed, 'probe': self.probe_seed}
        self.probe_on(args.stride or (4 if c.preset in ('nano', 'smoke') else c.stride))

    def windows_at(self, stride):
        """{split: (n, 2) of run and first frame}, `stride` frames apart, and their targets {split: (n, L)}."""
        windows = {name: np.array([(run, t) for run in range(len(split.runs))
                                   for t in range(0, split.fields.shape[2] - WINDOW + 1, stride)])
                   for name, split in self.splits.items()}
        if self.c.label_fraction < 1:                                    # the probes know no more labels than it did
            windows['train'] = self.splits['train'].with_labels(windows['train'], self.c.label_fraction, self.c.seed)
        mean, std = np.array(self.state['label_mean']), np.array(self.state['label_std'])
        return windows, {name: torch.tensor(((self.splits[name].labels(self.labels) - mean) / std)[w[:, 0]])
                         for name, w in windows.items()}

    def probe_on(self, stride, most=(None, None)):
        """Set `windows` and `targets`; `most`: so many of train and of valid, the same for all runs; None: all."""
        self.stride = stride
        self.windows, self.targets = self.windows_at(stride)
        for name, n in zip(SPLITS, most):
            if n is not None and n < len(self.windows[name]):
                chosen = np.sort(np.random.default_rng(0).permutation(len(self.windows[name]))[:n])
                self.windows[name], self.targets[name] = self.windows[name][chosen], self.targets[name][chosen]

    def field(self):
        """What of a window the encoder is given, in words."""
        (H, W), (h, w) = self.splits['train'].size, self.state['inputs']['size']
        part = 'whole domain' if self.c.whole or self.system.crop == ((0, 1), (0, 1)) else "paper's part of the domain"
        tiles = len(models.tile_starts(H, h)) * len(models.tile_starts(W, w))
        tiled = f', in {tiles} tiles of {h} x {w}' if tiles > 1 and not getattr(self.module, 'ANY_SIZE', False) else ''
        return f'{part} at {H} x {W}{tiled}'

    def model(self, device, trained=True):
        return models.model_of(self.state, self.path, device, trained)

    def encode(self, model, frozen=True, noise=None):
        """The function of raw windows (B, C, 16, H, W), and of the seeds of their noise -> tokens (B, N, D).

        noise: its std, after normalisation; None: as in training. seeds: a tuple of numbers for each window; without
        them it is drawn anew at every call.
        """
        device, noise = model.mean.device, self.c.noise if noise is None else noise
        generator = torch.Generator(device).manual_seed(self.c.seed)

        def function(x, seeds=()):
            x = x.to(device, model.mean.dtype)
            if noise > 0:
                own = [torch.Generator(device).manual_seed(int(np.random.default_rng(seed).integers(2**63)))
                       for seed in seeds] or [generator] * len(x)
                drawn = [torch.randn(x.shape[1:], generator=g, device=device, dtype=x.dtype) for g in own]
                x = x + noise * model.std * torch.stack(drawn)
            return model.embed(x) if frozen else model.features(x)
        return function

    def function(self, what, noise=None):
        """What `embed` applies to raw windows (B, C, 16, H, W) and seeds of their noise: -> (B, N, D)."""
        if what != 'field statistics':
            return self.encode(self.model(self.device, what == self.name), noise=noise)
        by_name = lambda x: {name: x[:, i] for i, name in enumerate(self.channels)}        # (B, T, H, W) each
        grid = Grid(*self.splits['train'].grid)
        return lambda x, seeds: torch.stack(list(self.system.statistics(by_name(x), grid).values()), 1)[:, None]

    def batches(self, what, noise, how, jobs, size):
        """Tokens (B, N, D), on the CPU, of each of the jobs: (split, number of the first of `size` windows).

        Raises ValueError if they are not finite.
        """
        function, (_, std) = self.function(what, noise), self.splits['train'].normalization(True)
        chosen = lambda name, first: self.windows[name][first:first + size]
        loaded = prefetch(lambda job: self.splits[job[0]].load(chosen(*job), frames=FRAMES), jobs, workers=1)
        for (name, first), x in zip(jobs, loaded):
            where = self.c.seed, 5, SPLITS.index(name)
            if how:
                x = spoilt(x, how, std, [int(np.random.default_rng((*where, 7, *window)).integers(2**63))
                                         for window in chosen(name, first)])
            tokens = function(x, [(*where, *window) for window in chosen(name, first)]).float().cpu()
            tokens = tokens.to(probe.kept_as(len(self.windows[name]), *tokens.shape[1:]))
            if not tokens.isfinite().all():
                raise ValueError(f'{self.path}: its tokens are not finite, or too large for float16')
            yield tokens
            self.splits[name].release()

    def embed(self, what, noise=None, how='', only=SPLITS):
        """{split: (tokens of all its windows, one CPU tensor (n, N, D) of probe.room_for, targets)}.

        what: the run's `name`, for its encoder; `random init`, for that before training; or `field statistics`. noise:
        as `encode` has it. how: as generalize.spoilt has it. only: these splits. On all ranks but the first the result
        is empty. Raises ValueError where a rank's `batches` did, after all rounds, so that no rank is left waiting.
        """
        if RANK == 0:                                                    # what `embed_along` waits for
            state = {k: v for k, v in self.state.items() if k != 'optimizer'}
            shared((self.path, state, self.windows, what, noise, how, only))
        C, (H, W) = len(self.channels), self.splits['train'].size
        size = max(1, min(self.batch, LOADED // (4 * C * FRAMES * H * W)))
        windows = {name: windows for name, windows in self.windows.items() if name in only}
        jobs = [(name, i) for name in windows for i in range(0, len(windows[name]), size)]
        out, failed = {}, None
        named = f'embedding, {what}' + f', {how}' * bool(how)
        with (Progress(sum(map(len, windows.values())), named, 'window', disable=RANK > 0) as bar,
              torch.no_grad()):
            own = or_its_error(self.batches(what, noise, how, jobs[RANK::WORLD], size))
            for i in range(0, len(jobs), WORLD):                         # a round: a batch of each rank
                for (name, first), tokens in zip(jobs[i:i + WORLD], gathered(next(own, None))):
                    if isinstance(tokens, Exception):
                        failed = failed or tokens
                        continue
                    if name not in out:
                        room = probe.room_for(len(self.windows[name]), *tokens.shape[1:], self.path.parent)
                        out[name] = room, self.targets[name]
                    out[name][0][first:first + len(tokens)] = tokens
                    bar.update(len(tokens))
        if failed:
            raise failed
        return out


def or_its_error(things):
    """What an iterator gives; from where it fails on, the error, endlessly."""
    try:
        yield from things
    except (ValueError, OSError, StoreError) as e:
        yield from itertools.repeat(e)


def embed_along(args):
    """What all ranks but the first do: embed their share of whatever it embeds, until it says None."""
    run = None
    while (asked := shared(None)) is not None:
        path, state, windows, what, noise, how, only = asked
        if run is None or run.path != path:
            run = Run(path, args, state)
        run.windows = windows
        run.embed(what, noise, how, only)
