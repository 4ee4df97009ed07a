"""
What a pretrained encoder knows of the physics: the error table.

    python eval.py                                # the newest run under out/, on valid: to tune by
    python eval.py --split test                   # on test: to report, once
    python eval.py out/... out/...                # several runs in one table, or checkpoints
    python eval.py --probes linear,knn            # without the one that takes minutes
    python eval.py out/... --finetune             # also train encoder and head end to end
    python eval.py out/... --generalize           # fewer labels, unseen parameters, spoilt fields
    python eval.py out/... --noise 0.3            # on noisy fields, by probes of noisy, clean ones
    python eval.py out/... --save-embeddings FILE # keep the mean tokens of all windows
    torchrun --nproc_per_node=8 eval.py out/...   # the same table, sooner

Three probes (probe.py) read the z-scored parameters from frozen tokens of windows; the table has
their mean squared errors: guessing the mean scores 1. Some rows keep the encoder honest: itself
before training, also without its head (random features), and hand-made field statistics. `With
products`: the linear probe is given all products of two features, too. The rows go to eval.json
beside each checkpoint, of ckpt-STEP.pt to eval-STEP.json: several checkpoints give the curve.
"""
import contextlib
import io
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common import (FRAMES, LOCAL_RANK, RANK, SPLITS, WORLD, Progress, at_least, data_folder,
                    draw_seed, from_rank_0, gather_on_rank_0, git_hash, machine, one_rank_first,
                    option, parse, peak_memory, pick_device, prefetch, say, script, start_ranks,
                    write_bytes, write_text)
import numpy as np
import torch

import model as models
import probe
from benchmark import finetune, generalize
from data import Split, find_dataset
from systems.datasets import is_complete, read_recipe, summary
from systems.numerics import Grid
from train import MAY_CHANGE, config_of

LOADED = 2**26                                                 # bytes of windows embedded at once
EMBEDDED = *SPLITS, 'unlabelled'            # windows: the last of all runs, where few are labelled
PROBES = 'attentive', 'linear', 'knn'
PUBLISHED_ROW = ', the paper (valid)'                          # ends the name of a published row
PRODUCTS, OF_CLEAN = ', with products', ', probe of clean fields'        # end rows' names
# rows that do not depend on the run
SHARED = 'predict the mean', *(f'field statistics{how}' for how in ('', PRODUCTS, OF_CLEAN))
CLOCKS = {'step', 'lr', 'samples_per_s', 'seconds', 'waiting', 'memory_gb'}       # terms of the log
TUNED = ('split', 'probe', 'epochs', 'mlp_ratio', 'seed', 'finetune', 'finetune_lr', 'generalize',
         'fractions', 'probes', 'ridge', 'k', 'metric', 'noise')         # what rows depend on

@dataclass
class Settings:
    split: str = option('valid', 'scored: valid, to tune by, or test, to report', 'what')
    save_embeddings: str = option('', 'npz file for mean tokens, labels and runs', 'what')
    data_dir: str = option('', "default: $THE_WELL_DATA_DIR, else the run's", 'data')
    stride: int = option(0, 'frames between windows; 0: 4 for nano, else as in training', 'data')
    batch: int = option(16, 'windows embedded at once', 'data')
    probes: str = option(','.join(PROBES), 'probes to fit and show', 'probe')
    ridge: float = option(0.0, "strength of the linear probe's penalty: scikit-learn's alpha, of "
                          'errors summed over windows; 0: the best on valid', 'probe')
    k: int = option(0, 'neighbours of knn; 0: the best on valid', 'probe')
    metric: str = option('euclidean', 'of knn, between z-scored mean tokens: euclidean, cosine, or '
                         'valid: the better one there', 'probe')
    probe: str = option('ours', 'training of the attentive probe: ours or paper', 'probe')
    epochs: int = option(100, 'epochs of the attentive probe', 'probe')
    mlp_ratio: float = option(0.0, "MLP ratio of the attentive probe; 0: the paper's", 'probe')
    noise: float = option(-1.0, "std of noise on all fields, in units of a channel's; -1: that of "
                          'training', 'probe')
    generalize: str = option('', 'also by fewer labels, at new values, of spoilt inputs: some of '
                             + ','.join(generalize.PARTS), 'probe', ','.join(generalize.PARTS))
    fractions: str = option('runs', 'what --generalize takes a share of: runs or windows', 'probe')
    finetune: str = option('', 'also train end to end: epochs (alone: 5), or paper', 'probe', '5')
    finetune_lr: float = option(1e-5, 'learning rate of the encoder in --finetune', 'probe')
    seed: int = option(-1, "of the attentive probe; -1: the run's", 'probe')
    device: str = option('auto', 'cuda, cpu, mps, or auto', 'machine')

# --- windows through the encoder
class Run:
    """A checkpoint, its windows {split: (n, 2): run, first frame} and z-scored targets (n, L)."""
    def __init__(self, path, args):
        # the checkpoint: only rank 0 needs the file, or its folder
        self.path, state = models.checkpoint_of(path), None
        if RANK == 0:
            state = {k: v for k, v in models.load_checkpoint(self.path).items() if k != 'optimizer'}
        self.state = from_rank_0(state)
        self.settings = self.state['config'] | self.state['options']
        # what it is, what it can be probed for, and how
        self.c = c = config_of(self.state, self.path)
        self.name = models.title(c.model) + (', supervised' if c.supervised else '')
        self.labels, self.channels = self.state['labels'], self.state['inputs']['channels']
        if not self.labels:
            raise ValueError(f'{self.path} has no labels: no scalar varied over its training files')
        self.device, self.batch = pick_device(args.device), args.batch
        self.mlp_ratio = args.mlp_ratio or models.PROBE_MLP_RATIO.get(c.model, 0.0)
        # its data
        self.root, self.system, _ = find_dataset(c.data, data_folder(args.data_dir, c.data_dir))
        names = SPLITS if args.split == 'test' or args.save_embeddings else SPLITS[:2]
        with one_rank_first(LOCAL_RANK == 0):
            self.splits = {name: Split(self.root, self.system, name, c.resolution, c.stride,
                                       c.cache_dir, c.whole, os.cpu_count()) for name in names}
        # do they fit together?
        self.shown = [self.system.name_of(name) for name in self.labels]
        for name, split in self.splits.items():
            if split.channels != self.channels or not set(self.labels) <= split.scalars.keys():
                raise ValueError(f'{self.root}, {name}: channels or scalars are not those '
                                 f'{self.path} was trained on')
        # its seeds, and the code that evaluates it
        self.git, self.probe_seed = git_hash(), args.seed if args.seed >= 0 else c.seed
        self.seeds = {'data': read_recipe(self.root).get('seed', 'none'), 'training': c.seed,
                      'probe': self.probe_seed}
        self.probe_on(args.stride or (4 if c.preset in ('nano', 'smoke') else c.stride))

    def windows_at(self, stride):
        """{split: windows (n, 2)}, `stride` frames apart, and {split: their targets (n, L)}."""
        windows = {name: split.windows_at(stride) for name, split in self.splits.items()}
        if self.c.label_fraction < 1:                          # probes know no more labels than it
            windows['unlabelled'] = windows['train']           # all fields are there all the same
            windows['train'] = self.splits['train'].with_labels(
                windows['train'], self.c.label_fraction, self.c.seed)
        mean, std = (np.array(self.state[key]) for key in ('label_mean', 'label_std'))
        of_runs = {name: (s.labels(self.labels) - mean) / std for name, s in self.splits.items()}
        of_runs['unlabelled'] = np.full_like(of_runs['train'], np.nan)
        return windows, {name: torch.tensor(of_runs[name][w[:, 0]]) for name, w in windows.items()}

    def probe_on(self, stride, most=(None, None)):
        """Set `windows` and `targets`. most: of train and valid, at most so many are drawn."""
        self.stride, (self.windows, self.targets) = stride, self.windows_at(stride)
        for name, n in zip(SPLITS, most):
            if n is not None and n < len(self.windows[name]):
                drawn = np.sort(np.random.default_rng(0).permutation(len(self.windows[name]))[:n])
                for values in self.windows, self.targets:
                    values[name] = values[name][drawn]

    def labels_by_run(self, split):
        """{label: its values, as in the files, of the runs in order}, as errors are in `by_run`."""
        runs = np.unique(self.windows[split][:, 0])
        return {shown: self.splits[split].scalars[name][runs].tolist()
                for name, shown in zip(self.labels, self.shown)}

    def field(self):
        """What the encoder sees of a window, in words."""
        (H, W), (h, w) = self.splits['train'].size, self.state['inputs']['size']
        whole = self.c.whole or self.system.crop == ((0, 1), (0, 1))
        part = 'whole domain' if whole else "paper's part of the domain"
        tiles = len(models.tile_starts(H, h)) * len(models.tile_starts(W, w))
        tiled = tiles > 1 and not getattr(models.find_model(self.c.model), 'ANY_SIZE', False)
        return f'{part} at {H} x {W}' + (f', in {tiles} tiles of {h} x {w}' if tiled else '')

    def model(self, device, trained=True):
        return models.model_of(self.state, self.path, device, trained)

    def beginning(self):
        """What rows of random weights depend on, as text: what these weights make of a window."""
        windows = self.windows['train'][:1]
        tokens = self.encode(self.model('cpu', trained=False), noise=0.0)(
            self.splits['train'].load(windows, frames=FRAMES))
        return str([self.mlp_ratio, self.c.noise, self.c.seed, self.c.label_fraction,
                    self.probe_seed, self.c.dtype, tokens.tolist()])

    def encode(self, model, frozen=True, noise=None):
        """A function: raw windows (B, C, 16, H, W), and seeds of their noise -> tokens (B, N, D).

        noise: its std, in units of what the network is given; None: as in training. seeds: a tuple
        of numbers for each window; without them, noise is drawn anew at every call.
        """
        device, noise = model.mean.device, self.c.noise if noise is None else noise
        anew = torch.Generator(device).manual_seed(self.c.seed)

        def to_tokens(x, seeds=()):
            x = x.to(device, model.mean.dtype)
            if noise > 0:
                generators = [torch.Generator(device).manual_seed(draw_seed(seed))
                              for seed in seeds] or [anew] * len(x)
                drawn = [torch.randn(x.shape[1:], generator=generator, device=device, dtype=x.dtype)
                         for generator in generators]          # (C, 16, H, W) each
                x = x + noise * model.std * torch.stack(drawn)
            return model.embed(x) if frozen else model.features(x)
        return to_tokens

    def measure(self, x, seeds):
        """Hand-made statistics of raw windows (B, C, 16, H, W), as if tokens: (B, 1, S)."""
        fields = {name: x[:, i] for i, name in enumerate(self.channels)}          # (B, T, H, W)
        found = self.system.statistics(fields, Grid(*self.splits['train'].grid))
        return torch.stack(list(found.values()), 1)[:, None]

    def embed(self, to_tokens, title, spoilt='', only=EMBEDDED):
        """{split: (tokens (n, N, D) of all its windows, on the CPU, targets (n, L))}, on rank 0.

        to_tokens: as from `encode`. spoilt: one of generalize.INPUTS. Raises ValueError.
        """
        # jobs: batches of at most LOADED bytes
        C, (H, W) = len(self.channels), self.splits['train'].size
        size = max(1, min(self.batch, LOADED // (4 * C * FRAMES * H * W)))
        windows = {name: w for name, w in self.windows.items() if name in only}
        jobs = [(name, i) for name, w in windows.items() for i in range(0, len(w), size)]
        batches = self.batches(to_tokens, spoilt, jobs[RANK::WORLD], size)
        named, out = f'embedding, {title}' + (f', {spoilt}' if spoilt else ''), {}
        with (Progress(sum(map(len, windows.values())), named, 'window', disable=RANK > 0) as bar,
              torch.no_grad()):
            for i in range(0, len(jobs), WORLD):                  # a batch of each rank, in order
                gathered = gather_on_rank_0(next(batches, None))
                for (name, first), tokens in zip(jobs[i:i + WORLD], gathered):
                    if name not in out:                        # now the size of tokens is known
                        shape = len(windows[name]), *tokens.shape[1:]
                        out[name] = probe.room_for(*shape, self.path.parent), self.targets[name]
                    out[name][0][first:first + len(tokens)] = tokens
                    bar.update(len(tokens))
        return out

    def batches(self, to_tokens, spoilt, jobs, size):
        """Tokens (B, N, D) of each job: (split, number of the first of `size` windows)."""
        std = self.splits['train'].normalization(True)[1]
        def load(job):
            name, first = job
            data = self.splits['train' if name == 'unlabelled' else name]
            return data.load(self.windows[name][first:first + size], frames=FRAMES)
        for (name, first), x in zip(jobs, prefetch(load, jobs, workers=1)):
            # what is drawn for a window depends on it alone
            seeds = [(self.c.seed, 5, EMBEDDED.index(name), *window)
                     for window in self.windows[name][first:first + size]]
            if spoilt:
                noise = [draw_seed((*seed[:3], 7, *seed[3:])) for seed in seeds]
                x = generalize.spoilt(x, spoilt, std, noise)
            tokens = to_tokens(x, seeds).float().cpu()         # (B, N, D)
            tokens = tokens.to(probe.kept_as(len(self.windows[name]), *tokens.shape[1:]))
            if not tokens.isfinite().all():
                raise ValueError(f'{self.path}: tokens are not finite, or too large for float16')
            yield tokens

# --- rows of the table: {probe: estimates of the labels of the scored windows (n, L)}
def fit_probes(splits, args, title, mlp_ratio=0.0, seed=0, device='cpu', attentive=True, epochs=0,
               only=PROBES, chosen=None, **protocol):
    """{probe: estimates (n, L)} of splits['scored'], else of splits[args.split].
    epochs, protocol: of the attentive probe; at least args.epochs. only: these of args.probes.
    chosen: a dict that gets the settings {'ridge', 'k', 'metric'} of the first fit.
    """
    scored, rows = 'scored' if 'scored' in splits else args.split, {}
    wanted, settings = set(args.probes.split(',')) & set(only), {}
    if attentive and 'attentive' in wanted:                    # in minutes, the others in seconds
        epochs = max(epochs, args.epochs)
        with Progress(epochs, f'probing {title}', 'epoch') as bar:
            rows['attentive'], _ = probe.attentive(splits, mlp_ratio, epochs, scored=scored,
                                                   seed=seed, device=device, tick=bar.update,
                                                   **protocol)
    # and what they choose on valid
    if 'linear' in wanted:
        rows['linear'], settings = probe.linear(splits, scored=scored, ridge=args.ridge)
    if 'knn' in wanted:
        metrics = probe.METRICS if args.metric == 'valid' else (args.metric,)
        rows['knn'], near = probe.knn(splits, (args.k,) if args.k else probe.KS, scored, metrics)
        settings |= near
    if chosen is not None:                                     # the table's fit comes first
        chosen.update(settings | chosen)
    return rows

def probe_row(run, args, splits, fit, trained):
    """(a row, what --generalize finds or None) of embedded splits. fit: as fit_probes."""
    if args.generalize:
        # a share of the training runs, or of their windows
        windows, data, seed = run.windows['train'], run.splits['train'], run.c.seed
        runs, orders = windows[:, 0], [data.labelled(1.0, seed)]         # as in --supervised
        if run.c.label_fraction == 1:                          # else no others are known
            orders += [data.labelled(1.0, (seed, draw)) for draw in range(1, generalize.DRAWS)]
        if args.fractions == 'windows':
            runs, orders = None, [np.random.default_rng([seed, 8, draw]).permutation(len(windows))
                                  for draw in range(generalize.DRAWS)]
        return generalize.measure(splits, fit, args.generalize, runs, orders, args.split,
                                  run.path.parent, trained)
    return fit(splits, epochs=epochs_of(run, splits)), None

def epochs_of(run, splits):
    """Epochs of the attentive probe at least: few windows, but as many steps all the same."""
    return generalize.epochs_for(len(splits['train'][1])) if run.c.label_fraction < 1 else 0

class Found(NamedTuple):    # by evaluate_row
    rows: dict = {}         # {title: row}
    carried: dict = {}      # {title: what --generalize finds}
    chosen: dict = {}       # {title: what its probes chose}
    means: dict = {}        # {split: mean tokens (n, D)}, of the trained encoder, of statistics

def with_products(splits):
    """{split: (mean tokens z-scored, and all products of two of them, (n, 1, D + D(D+1)/2), its
    labels)} of tokens (n, N, D)."""
    found = {}
    for name, (x, y) in probe.standardize(splits).items():
        i, j = torch.triu_indices(x.shape[1], x.shape[1])
        found[name] = torch.cat([x, x[:, i] * x[:, j]], 1)[:, None], y
    return found

def evaluate_row(run, args, title):
    """A Found, on rank 0, of run.name, the trained encoder; 'random init'; 'random features', the
    same without its head; or 'field statistics', by the last two without the attentive probe."""
    trained, by_hand, noise, protocol = title == run.name, title == 'field statistics', None, {}
    simple = by_hand or title == 'random features'
    if by_hand and run.system.statistics is None:
        say(f'{title}: none are defined for {run.c.data} (systems/{run.c.data}.py would hold them)')
        return Found()
    if simple and not {'linear', 'knn'} & {*args.probes.split(',')}:
        return Found()

    # an encoder's head makes few channels of many features
    model = None if by_hand else run.model(run.device, trained)
    if title == 'random features':
        encoder = getattr(models.unwrapped(model.network), 'encoder', None)
        if not hasattr(encoder, 'head'):
            return Found()
        encoder.head = torch.nn.Identity()
    # the paper trains its probe in another way, and some models' probes in ways of their own
    if args.probe == 'paper':
        protocol = probe.PAPER | models.PAPER_PROBE.get((run.c.model, run.c.data), {})
        noise = protocol.pop('noise', None)
    noisy = f'noise {args.noise:g}' if args.noise > 0 else ''
    if args.noise >= 0:
        noise = 0.0

    # embed: all ranks; with --generalize also the scored split, spoilt in each way
    encode = run.measure if by_hand else run.encode(model, noise=noise)
    splits = run.embed(encode, title, noisy)
    clean = run.embed(encode, title, '', {*EMBEDDED} - {'test'}) if noisy else {}
    for how in generalize.INPUTS if 'inputs' in args.generalize else ():
        splits[how] = run.embed(encode, title, how, (args.split,)).get(args.split)
    if RANK > 0:
        return None

    # probe: rank 0
    fit = partial(fit_probes, args=args, title=title, mlp_ratio=run.mlp_ratio, seed=run.probe_seed,
                  device=run.device, chosen=(chosen := {}), **protocol,
                  only=PROBES[1:] if simple else PROBES)
    row, carried = probe_row(run, args, splits, fit, trained)
    rows = {title: row}                                        # of the table
    if noisy:                                                  # a probe that saw no noise
        scored = clean | {'scored': splits[args.split]}
        rows[title + OF_CLEAN] = fit(scored, epochs=epochs_of(run, scored))
    means = {name: probe.mean_tokens(splits[name][0])
             for name in run.windows if trained or by_hand}
    del splits                                                 # they may be a large file
    if 'linear' in args.probes and means and means['train'].shape[1] <= 64:
        pairs = with_products({name: (x[:, None], run.targets[name]) for name, x in means.items()})
        rows[title + PRODUCTS] = fit_probes(pairs, args, title, only=('linear',))
    # an encoder that was trained with labels has a linear layer of its own
    if trained and run.c.supervised and 'linear' in args.probes:
        head = model.network.head.to('cpu', torch.float64)
        rows[f'{title}: its own head'] = {'linear': head(means[args.split]).detach()}
    # fine-tune: encoder and head together
    if args.finetune and not by_hand:
        with Progress(finetune.epochs_of(args.finetune), f'fine-tuning {title}', 'epoch') as bar:
            estimates = finetune.finetune(
                run, run.model(run.device, trained), args.finetune, args.batch, args.finetune_lr,
                run.mlp_ratio, args.split, run.device, bar.update)
        how = 'fine-tuned as in the paper' if args.finetune == 'paper' else 'fine-tuned'
        rows[f'{title}, {how}'] = {'attentive': estimates}
    return Found(rows, {title: carried}, {title: chosen}, means)

def evaluate(paths, args):
    """Evaluate runs of one dataset, write each one's eval.json, and print their table."""
    # a table is about one dataset, and all its rows about the same windows
    paths = list(dict.fromkeys(map(models.checkpoint_of, paths)))
    folders = [path.parent for path in paths]                  # of a run, step after step
    runs = sorted((Run(path, args) for path in paths),
                  key=lambda run: (folders.index(run.path.parent), run.state['step']))
    runs = list({(run.path.parent, run.state['step']): run for run in runs}.values())
    of_data = [(run.c.data, run.labels, run.state['label_mean'],
                [split.files for split in run.splits.values()]) for run in runs]
    if any(data != of_data[0] for data in of_data):
        raise ValueError('the checkpoints are of different systems or datasets: a table has one')

    data_hash = runs[0].splits['train'].data_hash() if RANK == 0 else ''
    most = runs[0].system.probe_windows if args.probe == 'paper' else ()
    for run in runs:
        run.probe_on(max(r.stride for r in runs), most)
        if run.state.get('data_hash', data_hash) != data_hash:
            say(f'{run.path} was trained on other files than those in {run.root}')
    say(summary(runs[0].c.data, runs[0].root, runs[0].splits))
    results, statistics, untrained = [], {}, {}                # two: by what they depend on
    for run in runs:
        # what is probed
        started = time.perf_counter()
        counts = ' / '.join(str(len(run.windows[name])) for name in run.splits)
        seeds = ', '.join(f'{k} {v}' for k, v in run.seeds.items())
        say(f'{run.name}: {run.path}, preset {run.c.preset}, step {run.state["step"]}, '
            f'{run.state["samples"]:,} windows seen; seeds: {seeds}\n  probed on {counts} windows, '
            f'{run.stride} frames apart: {run.field()}')
        # the encoder; the same before training, once for all runs that begin alike
        found = evaluate_row(run, args, run.name)
        begun = from_rank_0(run.beginning() if RANK == 0 and len(runs) > 1 else '')
        if begun not in untrained:
            untrained[begun] = [evaluate_row(run, args, f'random {what}')
                                for what in ('init', 'features')]
        # and what a physicist would measure; labels and noise may be drawn by the seed
        drawn = args.generalize or args.noise > 0 or run.c.label_fraction < 1
        seen = run.c.resolution, run.c.whole, run.c.label_fraction, drawn and run.c.seed
        if seen not in statistics:
            statistics[seen] = evaluate_row(run, args, 'field statistics')
        if RANK > 0:
            continue
        # keep it
        result = result_of(run, args, [found, *untrained[begun], statistics[seen]])
        results.append(result | {'seconds': time.perf_counter() - started})
        write_text(result_file(run.path), json.dumps(results[-1], indent=1))
        if args.save_embeddings:
            save_embeddings(Path(args.save_embeddings), run, found.means)
    if RANK > 0:
        return
    # the table
    print_table(results)
    for result, name in zip(results, names_of(results)) if args.generalize else ():
        generalize.print_carried(result | {'row': name})
    files = ', '.join(str(result_file(run.path)) for run in runs)
    print(f'{sum(r["seconds"] for r in results) / 60:.1f} min, peak memory {peak_memory():.1f} GB; '
          f'the same numbers are in {files}')

def result_file(checkpoint):
    """Where the errors of a checkpoint go: of ckpt-STEP.pt to eval-STEP.json, else to eval.json."""
    step = checkpoint.stem.removeprefix('ckpt-')
    return checkpoint.with_name(f'eval-{step}.json' if step.isdigit() else 'eval.json')

def result_of(run, args, found):
    """A run's eval.json: errors of what evaluate_row found (trained first), what they depend on."""
    # errors
    rows, generalization, chosen = {}, {}, {}
    for one in found:
        rows, chosen = rows | one.rows, chosen | one.chosen
        generalization |= one.carried
    rows['predict the mean'] = {p: torch.zeros_like(run.targets[args.split])
                                for p in PROBES if p in args.probes}
    scores, by_run = score(rows, run.targets[args.split], run.windows[args.split][:, 0], run.shown)
    # the paper's number, for its own data: real, complete, with all labels
    published = models.PUBLISHED.get(run.c.model, {}).get(run.c.data)
    theirs = not read_recipe(run.root) and is_complete(run.root, run.system, run.splits)
    theirs = theirs and {*run.system.symbols} <= {*run.shown} and not run.c.supervised
    if published and theirs and 'attentive' in args.probes and args.noise < 0:
        scores[run.name + PUBLISHED_ROW] = {'attentive': {'mean': published}}
    # the encoder, in numbers
    means = found[0].means['train']                            # (n, D)
    rank = models.embedding_health(means)['embedding_rank']
    head = probe.AttentiveProbe(means.shape[1], len(run.labels), run.mlp_ratio)
    in_encoder, in_all = models.count_parameters(run.model('cpu', trained=False))

    log, step, seconds = run.path.with_name('log.jsonl'), run.state['step'], run.state['seconds']
    result = {
        'system': run.c.data, 'split': args.split, 'labels': run.shown, 'row': run.name,
        'rows': scores, 'by_run': by_run, 'labels_by_run': run.labels_by_run(args.split),
        # the encoder
        'chosen': chosen, 'parameters': {'encoder': in_encoder, 'all': in_all,
                       'attentive probe': sum(p.numel() for p in head.parameters())},
        'rank': {'effective': rank, 'of': means.shape[1]},
        **({'generalization': generalization} if args.generalize else {}),
        # what they depend on
        'field': run.field(), 'stride': run.stride, 'seeds': run.seeds,
        'windows': {name: len(run.windows[name]) for name in run.splits},
        'probe': {k: getattr(args, k) for k in TUNED},
        'command': ' '.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        'evaluated_by': run.git, 'machine': machine(run.device),
        # the training
        'run': {'checkpoint': str(run.path), 'model': run.c.model, 'preset': run.c.preset,
                'seed': run.c.seed, 'step': step, 'windows_seen': run.state['samples'],
                'train_seconds': seconds, 'machine': run.state.get('machine', 'unknown machine'),
                'windows_per_s': run.state['samples'] / seconds if seconds else 0.0,
                'last_steps': last_steps(log, step=step),      # before this checkpoint
                **{'memory_gb': line['memory_gb'] for line in log_lines(log, 1, step)},
                'git': run.state['git'], 'settings': run.settings}}
    say(in_words(result))
    return result

def read_result(path):
    """An eval.json as a dict. Raises ValueError for any other file."""
    try:
        result = json.loads(path.read_text())
        errors = [e for row in result['rows'].values() for by_label in row.values()
                  for e in by_label.values()]
        # numbers, of a row that is there, and what they depend on
        whole = (np.isfinite(errors).all() and isinstance(result['run']['settings'], dict)
                 and {'system', 'labels', 'split', 'probe', 'seeds'} <= result.keys()
                 and result['row'] in result['rows'].keys() & result['by_run'].keys())
    except (ValueError, TypeError, AttributeError, KeyError):
        whole = False
    if not whole:
        raise ValueError(f'{path} is no result of eval.py, or a damaged one: delete it')
    return result

def in_words(result):
    """What a run is, what it cost, and what its probes chose."""
    counts, run, minutes = result['parameters'], result['run'], result['run']['train_seconds'] / 60
    took = f'{minutes / 60:.1f} h' if minutes >= 60 else f'{minutes:.1f} min'
    memory = f'{run["memory_gb"]:.1f} GB, ' if 'memory_gb' in run else ''
    chosen = ', '.join(f'{k} {v if k == "metric" else format(v, "g")}'
                       for k, v in result['chosen'][result['row']].items())
    return (f'{result["row"]}: {counts["encoder"]:,} parameters in the encoder, '
            f'{counts["all"] - counts["encoder"]:,} beside it; trained {took} on {run["machine"]}, '
            f'{memory}{run["windows_per_s"]:.1f} windows/s\n  probes: {chosen}')

def log_lines(log, steps, step=math.inf):
    """The last so many lines (0: all) of a training log before a step, as dicts; [] for none."""
    lines = []
    for line in log.read_text(errors='replace').splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):                  # one may be cut short
            lines.append(json.loads(line))
    return [line for line in lines if line['step'] < step][-steps:]

def last_steps(log, steps=100, step=math.inf):
    """Means over the last lines of a log, of its losses and of the embedding's health."""
    lines = log_lines(log, steps, step)
    names = lines[-1].keys() - CLOCKS if lines else ()
    return {name: float(np.mean([line[name] for line in lines if name in line]))
            for name in sorted(names)}

def score(rows, targets, runs, labels):
    """Errors of estimates: {row: {probe: {label or 'mean': MSE}}}, {row: {probe: [MSE by run]}}."""
    scores, by_run = {}, {}
    for name, by_probe in rows.items():
        scores[name], by_run[name] = {}, {}
        for p, estimates in by_probe.items():
            e = (estimates - targets).pow(2)                   # (n, L)
            scores[name][p] = dict(zip(labels, e.mean(0).tolist())) | {'mean': e.mean().item()}
            by_run[name][p] = [round(e[runs == r].mean().item(), 6) for r in np.unique(runs)]
    return scores, by_run

def save_embeddings(path, run, means):
    """An npz of every probed window: mean token, labels, run, frame, file and split."""
    parts = []
    for name, split in run.splits.items():
        which, frames = run.windows[name].T
        parts.append({
            'embedding': means[name].float().numpy(),
            'labels': np.stack([split.scalars[k] for k in run.labels], 1)[which],
            'run': which, 'frame': frames, 'split': np.full(len(which), name),
            'filename': np.array([r['file'] for r in split.runs])[which]})

    buffer = io.BytesIO()
    np.savez(buffer, system=run.c.data, model=run.name, label_names=run.shown,
             log_labels=[name in run.system.log_labels for name in run.labels],
             **{key: np.concatenate([p[key] for p in parts]) for key in parts[0]})
    write_bytes(path, buffer.getvalue())
    print(f'{path}: the mean tokens of {sum(len(p["run"]) for p in parts)} windows')

# --- the table
def interval(by_seed, draws=2000):
    """95% bootstrap interval of a mean of errors: of each seed (R,), by test run.
    Seeds are drawn anew, then the runs of each; windows never, as those of a run are alike."""
    rng, sums = np.random.default_rng(0), np.zeros(draws)
    for drawn in rng.integers(len(by_seed), size=(len(by_seed), draws)):          # one seed each
        for seed, errors in enumerate(map(np.asarray, by_seed)):
            here = np.flatnonzero(drawn == seed)
            runs = rng.integers(len(errors), size=(len(here), len(errors)))
            sums[here] += errors[runs].mean(1)
    return np.quantile(sums / len(by_seed), [0.025, 0.975]).tolist()

def names_of(results):
    """The rows of runs in one table: the model; if several are of one, the folder, or the step."""
    rows, names = [r['row'] for r in results], []
    folders = [Path(r['run'].get('checkpoint', '')).parent for r in results]
    for r, folder in zip(results, folders):
        alone = rows.count(r['row']) == 1 or len(set(folders)) == 1
        name = r['row'] if alone else str(folder).removeprefix('out/')
        name += f', step {r["run"].get("step")}' if folders.count(folder) > 1 else ''
        names.append(name + "'" * names.count(name))
    return names

def merge_rows(results, key='rows'):
    """The rows of several runs' eval.json as one table's. What they share stands once, last."""
    rows, products, shared, paper = {}, {}, {}, {}
    for r, name in zip(results, names_of(results)):
        for title, row in r[key].items():
            # a number of the paper, a row of this run, or one of all runs
            same = all(other[key].get(title) == row for other in results)
            if title.endswith(PUBLISHED_ROW):
                paper[title] = row
            elif title.startswith(r['row']):
                of_model = products if title.endswith(PRODUCTS) else rows
                of_model[name + title[len(r['row']):]] = row
            elif same:                                         # also random init of one run
                shared[title] = row
            else:
                rows[f'{name}, {title}'] = row
    return rows | products | shared | paper

def without_seed(run):
    """The name of a run's folder, without its seed."""
    return re.sub(r'-seed\d+$', '', run)

def repeats(results):
    """{name: the runs that differ in nothing but their seeds}; in order, alone if nothing else."""
    groups = {}
    for r, name in zip(results, names_of(results)):
        same = {k: v for k, v in r['run']['settings'].items() if k not in (*MAY_CHANGE, 'seed')}
        same['init'] = without_seed(same.get('init') or '')
        groups.setdefault(f'{r["run"].get("step")} {same}', []).append((name, r))
    # named by what their folders' names have in common
    named = {}
    for group in groups.values():
        name = os.path.commonprefix([name for name, _ in group]).removesuffix('-seed')
        name = name or group[0][1]['row']
        named[name + "'" * (name in named)] = [r for _, r in group]
    return named

def over_seeds(results):
    """Rows of a table: mean and standard deviation of the errors of runs with several seeds."""
    rows = {}
    for name, group in repeats(results).items():
        for how in ('mean', 'std') if len(group) > 1 else ():
            row = rows[f'{name}, {how} of {len(group)} seeds'] = {}
            for p, by_label in group[0]['rows'][group[0]['row']].items():
                errors = {c: [r['rows'][r['row']][p][c] for r in group] for c in by_label}
                row[p] = {c: np.mean(e) if how == 'mean' else np.std(e, ddof=1)
                          for c, e in errors.items()}
    return rows

def print_table(results):
    """Rows: encoders. Columns: labels under each probe, errors and then 95% intervals."""
    rows, by_run, first = merge_rows(results), merge_rows(results, 'by_run'), results[0]
    rows = over_seeds(results) | rows
    columns, probes = [*first['labels'], 'mean'], [p for p in PROBES
                                                   if any(p in row for row in rows.values())]
    width, each = max(map(len, rows)) + 2, max(8, *(len(c) + 2 for c in columns))
    # what it is
    noise = first.get('probe', {}).get('noise', -1.0)
    noisy = f', noise {noise:g} on the fields' if noise >= 0 else ''
    print(f'\nMSE of z-scored parameters, {first["system"]}, {first["split"]} split{noisy} '
          f'(guessing the mean: 1)\n')
    # errors
    print((' ' * width + '   '.join(f'{p:^{each * len(columns)}}' for p in probes)).rstrip())
    print(' ' * width + '   '.join(''.join(f'{c:>{each}}' for c in columns) for _ in probes))
    for name, row in rows.items():
        blocks = []
        for p in probes:                                       # a block of columns each
            cells = [f'{row[p][c]:.3f}' if c in row.get(p, {}) else '-' for c in columns]
            blocks.append(''.join(f'{cell:>{each}}' for cell in cells))
        print(f'{name:{width}}' + '   '.join(blocks))
    # intervals
    count = len(next(iter(by_run['predict the mean'].values())))
    print(f'\n95% intervals of the means: bootstrap over {count} {first["split"]} '
          f'{first.get("unit", "runs")}\n')
    for name, row in by_run.items():
        if name != 'predict the mean':                         # whose error is 1
            cells = ['[{:.3f}, {:.3f}]'.format(*interval([row[p]])) if p in row else '-'
                     for p in probes]
            print(f'{name:{width}}' + '   '.join(f'{c:>{each * len(columns)}}' for c in cells))
    print('\n'.join(['', *caveats(results)]))

def caveats(results):
    """What must be said of a table, a line each."""
    # do the rows differ in more than the model?
    unlike = {
        'saw the': [r['field'].partition(',')[0] for r in results],
        'trained on': [f'{r["run"]["windows_seen"]:,} windows' for r in results],
        'knows': [f'{r["run"]["settings"].get("label_fraction", 1):.0%} of the labels'
                  for r in results],
        'started from': [r['run']['settings'].get('init') or 'random weights' for r in results],
        'has the seeds': [', '.join(f'{k} {v}' for k, v in r['seeds'].items()) for r in results]}
    # steps of one run differ in what they saw, and all encoders may have the same seeds
    if len({r['run'].get('checkpoint', '').rpartition('/')[0] for r in results}) == 1:
        del unlike['trained on']
    seeds = {str(sorted(r['run'].get('seed', 0) for r in group))
             for group in repeats(results).values()}
    if len(seeds) == 1:
        del unlike['has the seeds']

    said = ['; '.join(f'{name} {what} {value}' for name, value in zip(names_of(results), values))
            for what, values in unlike.items() if len(set(values)) > 1]
    said = ['Not like with like: ' + '. '.join(said) + '.', ''] if said else []
    # what is the table for?
    if results[0]['split'] == 'valid':
        said += ['The probes chose their settings on these windows: a table to tune by. The one to '
                 'report is --split test.', '']
    if any(r['run']['preset'] == 'smoke' for r in results):
        said += ['A smoke run: these numbers mean nothing.', '']
    return said

def checkpoints():
    """Those under out/, the newest last; ValueError if there is none."""
    found = sorted(Path('out').glob('*/ckpt.pt'), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError('no checkpoint under out/: train one with python train.py, or name one')
    return found

@script
def main(argv=None):
    args, paths = parse(__doc__, Settings, argv, runs=dict(
        nargs='*', help='folders of runs, or their checkpoints (default: the newest of out/)'))
    # flags that will not do
    at_least(args, 1, 'batch', 'epochs')
    at_least(args, 0, 'stride', 'mlp_ratio', 'finetune_lr', 'ridge', 'k')
    at_least(args, -1, 'seed', 'noise')
    for name, *choices in (('split', 'valid', 'test'), ('probe', 'ours', 'paper'),
                           ('fractions', 'runs', 'windows'), ('metric', *probe.METRICS, 'valid')):
        if getattr(args, name) not in choices:
            raise ValueError(f'--{name} is {" or ".join(choices)}, not {getattr(args, name)!r}')
    # probes, the paper's protocol, and the number of epochs
    if not set(args.probes.split(',')) <= set(PROBES):
        raise ValueError(f'--probes is some of {",".join(PROBES)}, not {args.probes!r}')
    if args.probe == 'paper' and args.split != 'valid':
        raise ValueError("the paper's probe is scored on valid: --split valid")
    if args.finetune:
        finetune.epochs_of(args.finetune)
    # parts of --generalize, and what spoils fields
    if not set(args.generalize.split(',')) <= {*generalize.PARTS, ''}:
        raise ValueError(f'--generalize is some of {",".join(generalize.PARTS)}, not '
                         f'{args.generalize!r}')
    if args.noise >= 0 and ('inputs' in args.generalize or args.finetune):
        raise ValueError('--noise is for frozen encoders, and --generalize inputs has its own: '
                         'choose one')
    # a file that could not be written, hours later
    file = Path(args.save_embeddings).absolute()
    if args.save_embeddings and len(paths) > 1:
        raise ValueError('--save-embeddings takes one run')
    if args.save_embeddings and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f'--save-embeddings takes a file in a folder that is there, not {file}')
    start_ranks(pick_device(args.device))
    evaluate(paths or from_rank_0(checkpoints()[-1:] if RANK == 0 else None), args)

if __name__ == '__main__':
    main()
