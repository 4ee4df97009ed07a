"""
What a pretrained encoder knows of the physics: the error table.

    python eval.py                                # the newest checkpoint under out/
    python eval.py out/.../ckpt.pt                # that one, or the one in that folder
    python eval.py out/...jepa... out/...videomae...            # both in one table
    python eval.py out/...mpp... --finetune       # also train encoder and head end to end
    python eval.py --all                          # the paper's table 1, from everything under out/

Embeds windows of the train, valid and test splits, --stride frames apart, once with the frozen encoder, fits
three probes (probe.py) to the parameters of the simulations, and prints their mean squared error on test, with
the parameters z-scored by the training split: guessing the mean scores 1. The rows that keep the encoder
honest: the same encoder before training, and hand-made statistics of the fields with ridge regression.
The same numbers go to eval.json beside the checkpoint.
"""
import os
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import probe
from data import FRAMES, SYSTEMS, Split, find_dataset
from simulate import check_device, write_text
from train import Config, build_model, keep_freed_memory, load_checkpoint, peak_memory, restore

TITLES = {'jepa': 'JEPA', 'videomae': 'VideoMAE', 'disco': 'DISCO', 'mpp': 'MPP'}
MLP_RATIO = {'mpp': 4.0, 'disco': 4.0}                                   # of the paper's probes; the others' by width
PAPER = {                # arXiv 2603.13227, table 1: attentive probe, mean over the parameters; MPP fully fine-tuned
    'active_matter': {'jepa': 0.079, 'videomae': 0.160, 'disco': 0.057, 'mpp': 0.230},
    'shear_flow': {'jepa': 0.38, 'videomae': 0.67, 'disco': 0.13, 'mpp': 0.59},
    'rayleigh_benard': {'jepa': 0.13, 'videomae': 0.18, 'disco': 0.01, 'mpp': 0.08}}


# ---------------------------------------------------------------------------------------------
# hand-made statistics: what a physicist would compute before training anything

def mean_square(*fields):
    """Of the sum of squares of fields (B, ...): (B,)."""
    return sum(f.square().flatten(1).mean(1) for f in fields)


def gradient(*fields):
    """Mean square of the differences between neighbours in x and y, of fields (B, T, H, W): (B,)."""
    return mean_square(*(f.diff(dim=d) for f in fields for d in (2, 3)))


def active_matter_statistics(f):
    """Of the nematic order |m| = sqrt((D_xx - D_yy)^2 + 4 D_xy^2) / c, the flow, and the power E:D: (B, 19)."""
    order = ((f['D_xx'] - f['D_yy'])**2 + 4 * f['D_xy']**2).sqrt() / f['concentration']
    flat = order.flatten(1)
    levels = torch.tensor([.02, .1, .25, .5, .75, .9, .98], device=order.device)
    quantiles = torch.quantile(flat[:, ::4], levels, dim=1).T
    velocity, strain, D = (f['velocity_x'], f['velocity_y']), (f['E_xx'], f['E_xy']), (f['D_xx'], f['D_xy'])
    change = lambda *fields: mean_square(*(v.diff(dim=1) for v in fields))
    squares = [mean_square(*velocity), mean_square(*strain), gradient(*D), change(*D), gradient(*strain),
               change(*velocity), change(*strain), change(order), mean_square(order.diff(dim=2))]
    power = (f['E_xx'] * (f['D_xx'] - f['D_yy']) + 2 * f['E_xy'] * f['D_xy']).flatten(1).mean(1)
    drift = order[:, -1].flatten(1).mean(1) - order[:, 0].flatten(1).mean(1)
    return torch.cat([quantiles, torch.stack([flat.mean(1), drift, power], 1),
                      torch.stack([(s + 1e-8).log() for s in squares], 1)], 1)


def fluid_statistics(f):
    """Of a flow and the scalar it carries (tracer or buoyancy): (B, 15), logs.

    Sizes of velocity, vorticity, scalar and their gradients, and the diffusivities that the window's budgets
    suggest: what the mean squares of velocity, vorticity and scalar lose in time over what diffusion takes
    from them, 2 nu or 2 kappa times the mean square of the gradients. Buoyancy puts in <v b>.
    """
    u, v, s = f['velocity_x'], f['velocity_y'], f['tracer' if 'tracer' in f else 'buoyancy']
    w = v.diff(dim=2)[..., :-1] - u.diff(dim=3)[..., :-1, :]
    log = lambda x: (x.abs() + 1e-10).log()
    lost = lambda *fields: mean_square(*(x[:, 0] for x in fields)) - mean_square(*(x[:, -1] for x in fields))
    mixed = s - s.mean((2, 3), keepdim=True)
    duration = 0.25 * (u.shape[1] - 1)                                   # of convection, whose budget has a source
    power = (v * s).flatten(1).mean(1) if 'buoyancy' in f else torch.zeros_like(lost(u))
    sizes = [mean_square(u), mean_square(v), mean_square(w), gradient(w), mean_square(mixed), gradient(s),
             gradient(s.diff(dim=2)), mean_square(s.diff(dim=1)), mean_square(w.diff(dim=1)), power,
             gradient(s[..., :2]), gradient(s[..., -2:])]
    budgets = [log(lost(u, v) / 2 + power * duration) - log(mean_square(w)), log(lost(w)) - log(gradient(w)),
               log(lost(mixed)) - log(gradient(s))]
    return torch.stack([log(x) for x in sizes] + budgets, 1)


def field_statistics(x, channels):
    """Statistics of windows x (B, C, T, H, W) in file units -> (B, S)."""
    f = {name: x[:, i] for i, name in enumerate(channels)}               # (B, T, H, W) each
    return active_matter_statistics(f) if 'D_xx' in f else fluid_statistics(f)


def with_products(splits):
    """Features (n, 1, S) -> z-scored, with all pairwise products appended: (n, 1, S + S(S+1)/2)."""
    mean, std = splits['train'][0].mean(0), splits['train'][0].std(0) + 1e-9
    out = {}
    for name, (s, y) in splits.items():
        s = (s - mean) / std
        i, j = torch.triu_indices(s.shape[-1], s.shape[-1])
        out[name] = (torch.cat([s, s[..., i] * s[..., j]], -1), y)
    return out


# ---------------------------------------------------------------------------------------------
# embeddings

def eval_windows(split, stride):
    """Windows (n, 2) of (run, first frame), `stride` frames apart: the ones training could start at."""
    return split.windows[split.windows[:, 1] % stride == 0]


def load_windows(split, windows, crop):
    """Raw windows (B, C, 16, H, W): whole fields, or a square at a place that depends on the window alone."""
    return split.load(windows, frames=FRAMES, crop=crop, seeds=[(9, *map(int, w)) for w in windows])


def embed(split, windows, function, batch, bar, crop=0):
    """function(x) -> (B, N, D) over raw windows x (B, C, 16, H, W); all of them as one float32 CPU tensor."""
    out = []
    for i in range(0, len(windows), batch):
        x = load_windows(split, windows[i:i + batch], crop)
        with torch.no_grad():
            out.append(function(x).float().cpu())
        bar.update(len(x))
    split.release()
    return torch.cat(out)


def encoder_function(model, state, c, device, frozen=True):
    """Raw windows -> tokens by a model, with the normalisation and input noise it was trained with."""
    real = torch.float64 if c.dtype == 'float64' else torch.float32
    mean, std = (torch.tensor(state[k], dtype=real, device=device).view(-1, 1, 1, 1) for k in ('mean', 'std'))
    generator = torch.Generator(device).manual_seed(c.seed)
    model = model.to(device).eval()

    def function(x):
        x = (x.to(device, real) - mean) / std
        if c.noise > 0:
            x = x + c.noise * torch.randn(x.shape, generator=generator, device=device, dtype=real)
        with torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16'):
            return model.embed(x) if frozen else model.features(x)
    return function


def finetune(run, model, windows, targets, args, device, tick):
    """Test error (L,) of encoder and attentive head trained together, after the epoch that was best on valid.

    The paper's protocol for MPP. AdamW at --finetune-lr for the encoder, 1e-3 for the head, cosine to zero; windows
    as the probes see them. `tick` is called after every batch.
    """
    function = encoder_function(model, run.state, run.c, device, frozen=False)
    load = lambda name, index: (load_windows(run.splits[name], windows[name][index], run.crop),
                                targets[name][index].float().to(device))
    with torch.no_grad():
        dim = function(load('train', slice(0, 1))[0]).shape[-1]
    torch.manual_seed(args.seed)
    head = probe.AttentiveProbe(dim, targets['train'].shape[-1], args.mlp_ratio or run.mlp_ratio).to(device)
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

def checkpoints():
    """Those under out/, the newest last; ValueError if there is none."""
    found = sorted(Path('out').glob('*/ckpt.pt'), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError('no checkpoint under out/: train one with python train.py --data active_matter, or name one')
    return found


class Run:
    """A checkpoint, its Config and the splits it is probed on. `path`: the file, or the folder it lies in."""

    def __init__(self, path, data_dir):
        self.path = path / 'ckpt.pt' if path.is_dir() else path
        self.state = load_checkpoint(self.path)
        try:
            self.c = c = Config(**self.state['config'])
        except TypeError:
            raise ValueError(f'{self.path} was written by another version of train.py') from None
        self.root, system, _ = find_dataset(c.data, data_dir or os.environ.get('THE_WELL_DATA_DIR') or c.data_dir)
        self.splits = {s: Split(self.root, system, s, c.resolution, c.stride, c.cache_dir, whole=c.whole)
                       for s in ('train', 'valid', 'test')}
        for name, split in self.splits.items():
            if split.channels != self.state['channels'] or not set(self.state['labels']) <= split.scalars.keys():
                raise ValueError(f'{self.root}, {name}: channels or scalars are not those {self.path} was trained on')

        # a convolution takes whole fields whatever it was trained on; a transformer's positions are those of its crops
        self.crop = 0 if c.model == 'jepa' else c.crop
        self.mlp_ratio = MLP_RATIO.get(c.model, 0.0)

    def model(self, trained):
        model = build_model(self.c, self.state['channels'])
        if trained:
            restore(model, self.state, self.path)
        return model


def evaluate(args):
    started = time.perf_counter()
    device = torch.device(args.device)
    runs = [Run(Path(p), args.data_dir) for p in args.checkpoints or checkpoints()[-1:]]
    first = runs[0]
    if any((r.c.data, r.state['labels'], r.splits['test'].runs) != (first.c.data, first.state['labels'],
                                                                    first.splits['test'].runs) for r in runs):
        raise ValueError('the checkpoints are of different systems or datasets: a table is about one')
    labels, system = first.state['labels'], SYSTEMS[first.c.data]
    shown = [dict(system.shown).get(name, name) for name in labels]
    stride = args.stride or (4 if first.c.preset == 'nano' else first.c.stride)
    windows = {name: eval_windows(split, stride) for name, split in first.splits.items()}
    mean, std = np.array(first.state['label_mean']), np.array(first.state['label_std'])
    targets = {name: torch.tensor(((first.splits[name].labels(labels) - mean) / std)[w[:, 0]])
               for name, w in windows.items()}
    total = sum(map(len, windows.values()))
    print(f'{first.c.data}: {" / ".join(str(len(w)) for w in windows.values())} windows to probe')

    def tokens_of(run, function, description, crop=0):
        with tqdm(total=total, desc=description, unit='window') as bar:
            return {name: (embed(run.splits[name], w, function, args.batch, bar, crop), targets[name])
                    for name, w in windows.items()}

    def probes(run, embedded, description):
        with tqdm(total=args.epochs, desc=f'probing {description}', unit='epoch') as bar:
            error, size = probe.attentive(embedded, args.mlp_ratio or run.mlp_ratio, args.epochs, seed=args.seed,
                                          device=device, tick=bar.update)
        return {'attentive': error, 'linear': probe.linear(embedded), 'knn': probe.knn(embedded)}, size

    rows, parameters, names = {}, {}, []
    for run in runs:
        name = TITLES[run.c.model]
        while name in rows:                                              # several runs of one model
            name += "'"
        names.append(name)
        for title, trained in (name, True), ('random init' if len(runs) == 1 else f'{name}, random init', False):
            model = run.model(trained)
            function = encoder_function(model, run.state, run.c, device)
            rows[title], size = probes(run, tokens_of(run, function, f'embedding, {title}', run.crop), title)
            if args.finetune:
                steps = args.finetune * math.ceil(len(windows['train']) / args.batch)
                with tqdm(total=steps, desc=f'fine-tuning {title}', unit='step') as bar:
                    rows[f'{title}, fine-tuned'] = {'attentive': finetune(run, model, windows, targets, args, device,
                                                                          bar.update)}
        parameters[name] = {'encoder': sum(p.numel() for p in model.encoder.parameters()), 'attentive probe': size}
        print(f'{name}: {run.path}, preset {run.c.preset}, seed {run.c.seed}, step {run.state["step"]}, '
              f'{run.state["samples"]:,} windows seen; {parameters[name]["encoder"]:,} parameters in the encoder, '
              f'{size:,} in its attentive probe')
    statistics = lambda x: field_statistics(x, first.state['channels'])[:, None]
    rows['field statistics'] = {'linear': probe.linear(with_products(tokens_of(first, statistics, 'field statistics')))}
    rows['predict the mean'] = {p: targets['test'].pow(2).mean(0) for p in ('attentive', 'linear', 'knn')}

    result = {'system': first.c.data, 'split': 'test', 'labels': shown, 'rows': {}, 'seconds': None,
              'parameters': parameters,
              'runs': [{'row': name, 'checkpoint': str(r.path), 'model': r.c.model, 'preset': r.c.preset,
                        'seed': r.c.seed, 'windows_seen': r.state['samples'], 'train_seconds': r.state['seconds']}
                       for name, r in zip(names, runs)]}
    for name, by_probe in rows.items():
        result['rows'][name] = {p: {**dict(zip(shown, e.tolist())), 'mean': e.mean().item()}
                                for p, e in by_probe.items()}
    for model in dict.fromkeys(r.c.model for r in runs):
        result['rows'][f'{TITLES[model]}, the paper'] = {'attentive': {'mean': PAPER[first.c.data][model]}}
    result['seconds'] = time.perf_counter() - started
    print_table(result)
    for run in runs:
        write_text(run.path.with_name('eval.json'), json.dumps(result, indent=1))
    print(f'{result["seconds"] / 60:.1f} min, peak memory {peak_memory():.1f} GB; the same numbers are in '
          + ', '.join(str(r.path.with_name('eval.json')) for r in runs))


def print_table(result):
    """Rows = encoders, columns = labels under each probe: mean squared error of z-scored labels on test."""
    probes, columns = ('attentive', 'linear', 'knn'), [*result['labels'], 'mean']
    width, each = max(map(len, result['rows'])) + 2, max(8, *(len(c) + 2 for c in columns))
    print(f'\nMSE of z-scored parameters, {result["system"]}, {result["split"]} split (guessing the mean: 1)\n')
    print((' ' * width + '   '.join(f'{p:^{each * len(columns)}}' for p in probes)).rstrip())
    print(' ' * width + '   '.join(''.join(f'{c:>{each}}' for c in columns) for _ in probes))
    for name, row in result['rows'].items():
        cell = lambda p, c: f'{row[p][c]:{each}.3f}' if c in row.get(p, {}) else f'{"-":>{each}}'
        print(f'{name:{width}}' + '   '.join(''.join(cell(p, c) for c in columns) for p in probes))
    print()


def table_one(args):
    """The paper's table 1: the newest checkpoint of every system and model under out/, measured beside published.

    Reads the eval.json that is newer than its checkpoint, else evaluates; with --finetune also what has no fine-tuned
    row yet. A fine-tuned row goes before a frozen one, and is marked.
    """
    newest, cells = {}, {}
    for path in checkpoints():
        c = load_checkpoint(path)['config']
        newest[c['data'], c['model']] = path
    for (system, model), path in newest.items():
        table = path.with_name('eval.json')
        known = json.loads(table.read_text()) if table.exists() else {'rows': {}}
        stale = not table.exists() or table.stat().st_mtime < path.stat().st_mtime
        if stale or args.finetune and not any(row.endswith('fine-tuned') for row in known['rows']):
            args.checkpoints = [path]
            evaluate(args)
            known = json.loads(table.read_text())
        name = next(run['row'] for run in known['runs'] if Path(run['checkpoint']).parent.name == path.parent.name)
        tuned = known['rows'].get(f'{name}, fine-tuned')
        cells[system, model] = f'{(tuned or known["rows"][name])["attentive"]["mean"]:.3f}' + ('*' if tuned else '')
    print('MSE of z-scored parameters, mean over the two of a system, attentive probe: measured on test | the paper\n')
    print(' ' * 10 + ''.join(f'{system:>20}' for system in PAPER))
    for model, title in TITLES.items():
        shown = [cells.get((s, model), 'not run') + f' | {PAPER[s][model]:.3f}' + '*' * (model == 'mpp') for s in PAPER]
        print(f'{title:10}' + ''.join(f'{cell:>20}' for cell in shown))
    print('\n* fine-tuned end to end; the others are frozen')


def main():
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('checkpoints', nargs='*',
                        help='files, or the folders they lie in (default: the newest out/*/ckpt.pt)')
    parser.add_argument('--all', action='store_true', help="the paper's table 1 from everything under out/")
    parser.add_argument('--data-dir', help="default: $THE_WELL_DATA_DIR, else the checkpoint's")
    parser.add_argument('--stride', type=int, default=0,
                        help='frames between probed windows (default: 4 for nano, else as in training)')
    parser.add_argument('--batch', type=int, default=16, help='windows embedded at once')
    parser.add_argument('--epochs', type=int, default=100, help='epochs of the attentive probe')
    parser.add_argument('--mlp-ratio', type=float, default=0.0,
                        help="MLP ratio of the attentive probe (default: the paper's, 4 for MPP and DISCO, else 12 "
                             'up to width 128 and 0.25 above)')
    parser.add_argument('--finetune', type=int, nargs='?', const=5, default=0, metavar='EPOCHS',
                        help='also train encoder and attentive head end to end (5 epochs unless given)')
    parser.add_argument('--finetune-lr', type=float, default=1e-5, help='learning rate of the encoder in that')
    parser.add_argument('--seed', type=int, default=0, help='seed of the attentive probe')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    try:
        check_device(args.device)
        if args.finetune < 0:
            raise ValueError(f'--finetune takes a number of epochs, not {args.finetune}')
        table_one(args) if args.all else evaluate(args)
    except (ValueError, OSError, FloatingPointError) as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
