"""
What a pretrained encoder knows of the physics: the error table.

    python eval.py                                # the newest run under out/
    python eval.py out/...                        # that one (its folder, or the checkpoint in it)
    python eval.py out/... out/...                # several in one table
    python eval.py out/... --finetune             # also train encoder and head end to end
    python eval.py out/... --save-embeddings FILE # also keep what the encoder gave, for plot.py
    python eval.py --all                          # the paper's table 1, from everything under out/

Embeds windows of the train, valid and test splits, --stride frames apart, once with the frozen encoder, fits
three probes (probe.py) to the parameters of the simulations, and prints their mean squared error on test, with
the parameters z-scored by the training split: guessing the mean scores 1. The rows that keep the encoder
honest: the same encoder before training, and hand-made statistics of the fields with ridge regression.
Each run's rows go to eval.json beside its checkpoint, whatever else is in the table.
"""
import copy
import io
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

from common import (FRAMES, SPLITS, Progress, at_least, data_folder, option, parse, peak_memory, pick_device, script,
                    write_bytes, write_text)

import numpy as np
import torch

import model as models
import probe
import systems
from data import WINDOW, Split, find_dataset
from config import Config

PROBES = 'attentive', 'linear', 'knn'
TUNED = 'epochs', 'mlp_ratio', 'seed'                                    # what a probe depends on besides its windows


@dataclass
class Settings:
    all: bool = option(False, "the paper's table 1 from everything under out/", 'what', bare=True)
    save_embeddings: str = option('', 'npz file for mean tokens, labels and run ids of every window', 'what')
    data_dir: str = option('', "default: $THE_WELL_DATA_DIR, else the checkpoint's", 'data')
    stride: int = option(0, 'frames between probed windows; 0: 4 for nano, else as in training', 'data')
    batch: int = option(16, 'windows embedded at once', 'data')
    epochs: int = option(100, 'epochs of the attentive probe', 'probe')
    mlp_ratio: float = option(0.0, "MLP ratio of the attentive probe; 0: the paper's (the model's, or else 12 up to "
                                   'width 128 and 0.25 above)', 'probe')
    finetune: int = option(0, 'epochs of training encoder and attentive head end to end; 5 if given alone', 'probe', 5)
    finetune_lr: float = option(1e-5, 'learning rate of the encoder in that', 'probe')
    seed: int = option(0, 'seed of the attentive probe', 'probe')
    device: str = option('auto', 'cuda, cpu, or auto', 'machine')


# ---------------------------------------------------------------------------------------------
# runs, and the windows they are probed on

def checkpoints():
    """Those under out/, the newest last; ValueError if there is none."""
    found = sorted(Path('out').glob('*/ckpt.pt'), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError('no checkpoint under out/: train one with python train.py, or name one')
    return found


class Run:
    """A checkpoint, its Config and the splits it is probed on. `path`: the file, or the folder it lies in."""

    def __init__(self, path, args):
        self.path = models.checkpoint_of(path)
        self.state = models.load_checkpoint(self.path)
        try:
            self.c = c = Config(**self.state['config'])
        except TypeError:
            raise ValueError(f'{self.path} was written by another version of train.py') from None
        self.name, self.module = models.title(c.model), models.find_model(c.model)
        self.labels, self.channels = self.state['labels'], self.state['inputs']['channels']
        self.root, self.system, _ = find_dataset(c.data, data_folder(args.data_dir, c.data_dir))
        self.splits = {s: Split(self.root, self.system, s, c.resolution, c.stride, c.cache_dir, whole=c.whole)
                       for s in SPLITS}
        for name, split in self.splits.items():
            if split.channels != self.channels or not set(self.labels) <= split.scalars.keys():
                raise ValueError(f'{self.root}, {name}: channels or scalars are not those {self.path} was trained on')
        self.shown = [self.system.name_of(name) for name in self.labels]
        self.probe_on(args.stride or (4 if c.preset in ('nano', 'smoke') else c.stride))

    def probe_on(self, stride):
        """Set `windows`, {split: (n, 2) of run and first frame}, `stride` frames apart, and their targets (n, L)."""
        self.stride = stride
        self.windows = {name: np.array([(run, t) for run in range(len(split.runs))
                                        for t in range(0, split.fields.shape[2] - WINDOW + 1, stride)])
                        for name, split in self.splits.items()}
        mean, std = np.array(self.state['label_mean']), np.array(self.state['label_std'])
        self.targets = {name: torch.tensor(((self.splits[name].labels(self.labels) - mean) / std)[w[:, 0]])
                        for name, w in self.windows.items()}

    def field(self):
        """What of a window the encoder is given, in words."""
        (H, W), (h, w) = self.splits['test'].fields.shape[-2:], self.state['inputs']['size']
        part = 'whole domain' if self.c.whole or self.system.crop == ((0, 1), (0, 1)) else "paper's part of the domain"
        tiles = len(models.tile_starts(H, h)) * len(models.tile_starts(W, w))
        tiled = f', in {tiles} tiles of {h} x {w}' if tiles > 1 and not getattr(self.module, 'ANY_SIZE', False) else ''
        return f'{part} at {H} x {W}{tiled}'

    def model(self, device, trained=True):
        return models.model_of(self.state, self.path, device, trained)

    def encode(self, model, frozen=True):
        """The function raw windows (B, C, 16, H, W) -> tokens (B, N, D), with the input noise of its training."""
        device = model.mean.device
        generator = torch.Generator(device).manual_seed(self.c.seed)

        def function(x):
            x = x.to(device, model.mean.dtype)
            if self.c.noise > 0:                                         # after normalisation, it is of this size
                x = x + self.c.noise * model.std * torch.randn(x.shape, generator=generator, device=device,
                                                               dtype=x.dtype)
            return model.embed(x) if frozen else model.features(x)
        return function

    def embed(self, function, batch, description):
        """{split: (function(x) of all its windows as one float32 CPU tensor (n, N, D), targets)}."""
        out = {}
        with Progress(sum(map(len, self.windows.values())), description, 'window') as bar:
            for name, windows in self.windows.items():
                parts = []
                for w in (windows[i:i + batch] for i in range(0, len(windows), batch)):
                    x = self.splits[name].load(w, frames=FRAMES)
                    with torch.no_grad():
                        parts.append(function(x).float().cpu())
                    bar.update(len(w))
                self.splits[name].release()
                out[name] = torch.cat(parts), self.targets[name]
        return out


# ---------------------------------------------------------------------------------------------
# rows of the table: {probe: error of each label (L,)}

def probes(run, embedded, args, device, description):
    """({probe: error (L,)}, number of parameters of the attentive probe)."""
    with Progress(args.epochs, f'probing {description}', 'epoch') as bar:
        error, size = probe.attentive(embedded, args.mlp_ratio or getattr(run.module, 'MLP_RATIO', 0.0), args.epochs,
                                      seed=args.seed, device=device, tick=bar.update)
    return {'attentive': error, 'linear': probe.linear(embedded), 'knn': probe.knn(embedded)}, size


def field_statistics(run, args):
    """The row of the system's hand-made statistics with ridge regression, or None where it has none."""
    if run.system.statistics is None:
        print(f'field statistics: none are defined for {run.c.data} (systems/{run.c.data}.py would hold them)')
        return None
    by_name = lambda x: {name: x[:, i] for i, name in enumerate(run.channels)}         # (B, T, H, W) each
    embedded = run.embed(lambda x: run.system.statistics(by_name(x))[:, None], args.batch, 'field statistics')
    return {'linear': probe.linear(with_products(embedded))}


def with_products(splits):
    """Features (n, 1, S) -> z-scored, with all pairwise products appended: (n, 1, S + S(S+1)/2)."""
    mean, std = splits['train'][0].mean(0), splits['train'][0].std(0) + 1e-9
    out = {}
    for name, (s, y) in splits.items():
        s = (s - mean) / std
        i, j = torch.triu_indices(s.shape[-1], s.shape[-1])
        out[name] = (torch.cat([s, s[..., i] * s[..., j]], -1), y)
    return out


def finetune(run, model, args, device, tick):
    """Test error (L,) of encoder and attentive head trained together, after the epoch that was best on valid.

    The paper's protocol for MPP. AdamW at --finetune-lr for the encoder, 1e-3 for the head, cosine to zero; windows
    as the probes see them. `tick` is called after every batch.
    """
    function, windows, targets = run.encode(model, frozen=False), run.windows, run.targets
    load = lambda name, index: (run.splits[name].load(windows[name][index], frames=FRAMES),
                                targets[name][index].float().to(device))
    with torch.no_grad():
        dim = function(load('train', slice(0, 1))[0]).shape[-1]
    torch.manual_seed(args.seed)
    head = probe.AttentiveProbe(dim, targets['train'].shape[-1],
                                args.mlp_ratio or getattr(run.module, 'MLP_RATIO', 0.0)).to(device)
    optimizer = torch.optim.AdamW([{'params': model.parameters(), 'lr': args.finetune_lr},
                                   {'params': head.parameters(), 'lr': 1e-3}], weight_decay=0.01)
    batches = math.ceil(len(windows['train']) / args.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.finetune * batches)
    order = torch.Generator().manual_seed(args.seed)

    def error(name):
        with torch.no_grad():
            parts = [load(name, slice(i, i + args.batch)) for i in range(0, len(windows[name]), args.batch)]
            return torch.cat([(head(function(x).float()) - y).pow(2) for x, y in parts]).mean(0).cpu()

    best, best_state, both = math.inf, None, torch.nn.ModuleList([model, head])
    for _ in range(args.finetune):
        for index in torch.randperm(len(windows['train']), generator=order).split(args.batch):
            x, y = load('train', index.numpy())
            optimizer.zero_grad()
            (head(function(x).float()) - y).pow(2).mean().backward()
            optimizer.step()
            schedule.step()
            tick()
        on_valid = error('valid').mean().item()
        if on_valid < best:
            best, best_state = on_valid, copy.deepcopy(both.state_dict())
    if best_state is None:
        raise FloatingPointError('fine-tuning diverged: its error on valid is not a number; try a lower --finetune-lr')
    both.load_state_dict(best_state)
    return error('test')


# ---------------------------------------------------------------------------------------------
# the table

def evaluate_run(run, args, device):
    """(rows of one run, {title: {probe: error (L,)}}; numbers of parameters; tokens of the trained encoder)."""
    rows, kept = {}, None
    for title, trained in (run.name, True), ('random init', False):
        model = run.model(device, trained)
        embedded = run.embed(run.encode(model), args.batch, f'embedding, {title}')
        rows[title], size = probes(run, embedded, args, device, title)
        kept = kept or embedded
        if args.finetune:
            steps = args.finetune * math.ceil(len(run.windows['train']) / args.batch)
            with Progress(steps, f'fine-tuning {title}', 'step') as bar:
                rows[f'{title}, fine-tuned'] = {'attentive': finetune(run, model, args, device, bar.update)}
    encoder = getattr(model.network, 'encoder', model.network)
    return rows, {'encoder': sum(p.numel() for p in encoder.parameters()), 'attentive probe': size}, kept


def evaluate(paths, args):
    """Evaluate runs of one dataset, write each one's eval.json, and print their table."""
    device = pick_device(args.device)
    runs = [Run(path, args) for path in paths]
    same = lambda r: (r.c.data, r.labels, r.state['label_mean'], [r.splits[s].files for s in SPLITS])
    if any(same(r) != same(runs[0]) for r in runs):
        raise ValueError('the checkpoints are of different systems or datasets: a table is about one')
    for run in runs:                                                     # the same windows, whatever the presets
        run.probe_on(max(r.stride for r in runs))
    results, statistics = [], {}
    for run in runs:
        started = time.perf_counter()
        counts = ' / '.join(str(len(w)) for w in run.windows.values())
        print(f'{run.name}: {run.path}, preset {run.c.preset}, seed {run.c.seed}, step {run.state["step"]}, '
              f'{run.state["samples"]:,} windows seen\n  probed on {counts} windows, {run.stride} frames apart: '
              f'{run.field()}', flush=True)
        rows, parameters, tokens = evaluate_run(run, args, device)
        print(f'  {parameters["encoder"]:,} parameters in the encoder, {parameters["attentive probe"]:,} in its '
              f'attentive probe')
        seen = run.c.resolution, run.c.whole
        if seen not in statistics:
            statistics[seen] = field_statistics(run, args)
        if statistics[seen]:
            rows['field statistics'] = statistics[seen]
        rows['predict the mean'] = {p: run.targets['test'].pow(2).mean(0) for p in PROBES}
        results.append(result_of(run, args, rows, parameters, time.perf_counter() - started))
        write_text(run.path.with_name('eval.json'), json.dumps(results[-1], indent=1))
        if args.save_embeddings:
            save_embeddings(Path(args.save_embeddings), run, tokens)
    print_table(results)
    print(f'{sum(r["seconds"] for r in results) / 60:.1f} min, peak memory {peak_memory():.1f} GB; the same numbers '
          f'are in ' + ', '.join(str(r.path.with_name('eval.json')) for r in runs))


def result_of(run, args, rows, parameters, seconds):
    """What goes to a run's eval.json."""
    scores = {name: {p: {**dict(zip(run.shown, e.tolist())), 'mean': e.mean().item()} for p, e in by_probe.items()}
              for name, by_probe in rows.items()}
    paper = getattr(run.module, 'PAPER', {}).get(run.c.data)
    if paper is not None:
        scores[f'{run.name}, the paper'] = {'attentive': {'mean': paper}}
    return {'system': run.c.data, 'split': 'test', 'labels': run.shown, 'row': run.name, 'rows': scores,
            'seconds': seconds, 'parameters': parameters, 'field': run.field(), 'stride': run.stride,
            'windows': {name: len(w) for name, w in run.windows.items()}, 'probe': {k: getattr(args, k) for k in TUNED},
            'run': {'checkpoint': str(run.path), 'model': run.c.model, 'preset': run.c.preset, 'seed': run.c.seed,
                    'windows_seen': run.state['samples'], 'train_seconds': run.state['seconds']}}


def merge_rows(results):
    """The rows of several runs' eval.json as one table's; what the runs share stands once."""
    rows, shared, paper = {}, {}, {}
    for r in results:
        name = r['row']
        while name in rows:                                              # several runs of one model
            name += "'"
        for title, row in r['rows'].items():
            if title.endswith(', the paper'):
                paper[title] = row
            elif title in ('field statistics', 'predict the mean'):
                shared.setdefault(title, row)
            else:
                own = name + title[len(r['row']):] if title.startswith(r['row']) else title
                rows[own if own.startswith(name) or len(results) == 1 else f'{name}, {own}'] = row
    return rows | shared | paper


def print_table(results):
    """Rows = encoders, columns = labels under each probe: mean squared error of z-scored labels on test."""
    rows = merge_rows(results)
    first = results[0]
    columns = [*first['labels'], 'mean']
    width, each = max(map(len, rows)) + 2, max(8, *(len(c) + 2 for c in columns))
    print(f'\nMSE of z-scored parameters, {first["system"]}, {first["split"]} split (guessing the mean: 1)\n')
    print((' ' * width + '   '.join(f'{p:^{each * len(columns)}}' for p in PROBES)).rstrip())
    print(' ' * width + '   '.join(''.join(f'{c:>{each}}' for c in columns) for _ in PROBES))
    for name, row in rows.items():
        cell = lambda p, c: f'{row[p][c]:{each}.3f}' if c in row.get(p, {}) else f'{"-":>{each}}'
        print(f'{name:{width}}' + '   '.join(''.join(cell(p, c) for c in columns) for p in PROBES))
    print()
    if len({r['field'].partition(',')[0] for r in results}) > 1:
        print('Not like with like: ' + '; '.join(f'{r["row"]} saw the {r["field"]}' for r in results) + '\n')
    if any(r['run']['preset'] == 'smoke' for r in results):
        print('A smoke run: these numbers mean nothing.\n')


def table_one(args):
    """The paper's table 1: the newest checkpoint of every system and model under out/, measured beside published.

    Reads the eval.json that is newer than its checkpoint, else evaluates: also if this call's flags differ from the
    defaults and from what they were there, and, with --finetune, what has no fine-tuned row yet. A fine-tuned row
    goes before a frozen one, and is marked. A run that cannot be evaluated is left out, in one line.
    """
    newest, cells, seen = {}, {}, {}
    for path in checkpoints():
        try:
            c = models.load_checkpoint(path)['config']
            newest[c['data'], c['model']] = path
        except ValueError as e:
            print(f'left out: {e}')
    for (system, model), path in newest.items():
        try:
            known = known_result(path, args)
        except ValueError as e:
            print(f'left out: {e}')
            continue
        tuned = known['rows'].get(f'{known["row"]}, fine-tuned')
        error = (tuned or known['rows'][known['row']])['attentive']['mean']
        cells[system, model] = f'{error:.3f}' + '*' * bool(tuned)
        how = ', '.join([known['field'].partition(',')[0], f'windows {known["stride"]} frames apart',
                         *(f'{k} {v}' for k, v in known['probe'].items())])
        seen.setdefault(system, {}).setdefault(how, []).append(known['row'])
    columns = list(dict.fromkeys([*systems.system_names(), *(system for system, _ in cells)]))
    width = max(20, *(len(system) + 2 for system in columns))
    print('MSE of z-scored parameters, mean over those of a system, attentive probe: measured on test | the paper\n')
    print(' ' * 12 + ''.join(f'{system:>{width}}' for system in columns))
    for name in models.model_names():
        module, shown = models.find_model(name), []
        for system in columns:
            paper = getattr(module, 'PAPER', {}).get(system)
            star = '*' * getattr(module, 'PAPER_FINETUNED', False)
            published = '-' if paper is None else f'{paper:.3f}{star}'
            shown.append(f'{cells.get((system, name), "not run")} | {published}')
        print(f'{models.title(name):12}' + ''.join(f'{cell:>{width}}' for cell in shown))
    print('\n* fine-tuned end to end; the others are frozen')
    for system, ways in seen.items():
        if len(ways) > 1:
            print(f'{system}, not like with like: '
                  + '; '.join(f'{", ".join(names)}: {how}' for how, names in ways.items()))


def known_result(path, args):
    """The eval.json of a checkpoint, made again if it is missing, older, or not what the flags ask for."""
    table, default = path.with_name('eval.json'), Settings()
    known = json.loads(table.read_text()) if table.exists() else {}
    asked = {k: getattr(args, k) for k in (*TUNED, 'stride') if getattr(args, k) != getattr(default, k)}
    there = {**known.get('probe', {}), 'stride': known.get('stride')}
    stale = 'probe' not in known or table.stat().st_mtime < path.stat().st_mtime
    if stale or any(there[k] != v for k, v in asked.items()) or args.finetune and not any(
            row.endswith('fine-tuned') for row in known['rows']):
        evaluate([path], args)
        known = json.loads(table.read_text())
    return known


def save_embeddings(path, run, tokens):
    """An npz of every probed window: mean token, labels, and the run, file, frame and split it is from."""
    part = lambda f: np.concatenate([f(name, split) for name, split in run.splits.items()])
    which = lambda name: run.windows[name][:, 0]
    count = sum(map(len, run.windows.values()))
    buffer = io.BytesIO()
    np.savez(buffer, system=run.c.data, model=run.name, label_names=run.shown,
             log_labels=[name in run.system.log_labels for name in run.labels],
             embedding=torch.cat([tokens[name][0].mean(1) for name in run.splits]).numpy(),               # (n, D)
             labels=part(lambda name, split: np.stack([split.scalars[k] for k in run.labels], 1)[which(name)]),
             run=part(lambda name, split: which(name)), frame=part(lambda name, split: run.windows[name][:, 1]),
             filename=part(lambda name, split: np.array([r['file'] for r in split.runs])[which(name)]),
             split=part(lambda name, split: np.full(len(which(name)), name)))
    write_bytes(path, buffer.getvalue())
    print(f'{path}: the mean tokens of {count} windows')


@script
def main(argv=None):
    args, paths = parse(__doc__, Settings, argv, runs=dict(
        nargs='*', help='folders of runs, or their checkpoints (default: the newest of out/)'))
    at_least(args, 1, 'batch', 'epochs')
    at_least(args, 0, 'stride', 'mlp_ratio', 'finetune', 'finetune_lr', 'seed')
    if args.save_embeddings and (args.all or len(paths) > 1):
        raise ValueError('--save-embeddings takes one run')
    kept = Path(args.save_embeddings).absolute()
    if args.save_embeddings and (kept.is_dir() or not kept.parent.is_dir()):
        raise ValueError(f'--save-embeddings takes a file to write, in a folder that is there; not {kept}')
    if args.all and paths:
        raise ValueError('--all takes everything under out/, and no runs')
    table_one(args) if args.all else evaluate(paths or checkpoints()[-1:], args)


if __name__ == '__main__':
    main()
