"""
What a pretrained encoder knows of the physics: the error table.

    python eval.py                                # the newest checkpoint under out/
    python eval.py out/.../ckpt.pt                # that one

Embeds every window of the train, valid and test splits once with the frozen encoder, fits three probes
(probe.py) to the parameters of the simulations, and prints their mean squared error on test, with the
parameters z-scored by the training split: guessing the mean scores 1. The rows that keep the encoder
honest: the same encoder before training, and hand-made statistics of the fields with ridge regression.
The same numbers go to eval.json beside the checkpoint.
"""
import os
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import probe
from data import FRAMES, Split, find_dataset
from train import Config, build_model, keep_freed_memory, load_checkpoint, peak_memory, restore

PAPER = {'active_matter': 0.079}     # arXiv 2603.13227, table 1: JEPA, attentive probe, mean over the parameters


# ---------------------------------------------------------------------------------------------
# hand-made statistics: what a physicist would compute before training anything

def field_statistics(x, channels):
    """Statistics of active-matter windows x (B, C, T, H, W) in file units -> (B, 19).

    Quantiles of the nematic order |m| = sqrt((D_xx - D_yy)^2 + 4 D_xy^2) / c, its mean, its drift, and
    logs of mean squares: velocity, strain rate, gradients and time differences of D and velocity; and
    the mean of E:D, the power the particles put in.
    """
    f = {name: x[:, i] for i, name in enumerate(channels)}               # (B, T, H, W) each
    order = ((f['D_xx'] - f['D_yy'])**2 + 4 * f['D_xy']**2).sqrt() / f['concentration']
    flat = order.flatten(1)
    quantiles = torch.quantile(flat[:, ::4], torch.tensor([.02, .1, .25, .5, .75, .9, .98], device=x.device), dim=1).T
    square = lambda *names: sum(f[n].square().flatten(1).mean(1) for n in names)
    slope = lambda dim, *names: sum(f[n].diff(dim=dim).square().flatten(1).mean(1) for n in names)
    squares = [square('velocity_x', 'velocity_y'), square('E_xx', 'E_xy'),
               slope(2, 'D_xx', 'D_xy') + slope(3, 'D_xx', 'D_xy'), slope(1, 'D_xx', 'D_xy'),
               slope(2, 'E_xx', 'E_xy') + slope(3, 'E_xx', 'E_xy'), slope(1, 'velocity_x', 'velocity_y'),
               slope(1, 'E_xx', 'E_xy'), order.diff(dim=1).square().flatten(1).mean(1),
               order.diff(dim=2).square().flatten(1).mean(1)]
    power = (f['E_xx'] * (f['D_xx'] - f['D_yy']) + 2 * f['E_xy'] * f['D_xy']).flatten(1).mean(1)
    drift = order[:, -1].flatten(1).mean(1) - order[:, 0].flatten(1).mean(1)
    return torch.cat([quantiles, torch.stack([flat.mean(1), drift, power], 1),
                      torch.stack([(s + 1e-8).log() for s in squares], 1)], 1)


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


def embed(split, windows, function, batch, bar):
    """function(x) -> (B, N, D) over raw windows x (B, C, 16, H, W); all of them as one float32 CPU tensor."""
    out = []
    for i in range(0, len(windows), batch):
        x = split.load(windows[i:i + batch], frames=FRAMES)
        with torch.no_grad():
            out.append(function(x).float().cpu())
        bar.update(len(x))
    split.release()
    return torch.cat(out)


def encoder_function(model, state, c, device):
    """Raw windows -> tokens by a frozen model, with the normalisation and input noise it was trained with."""
    real = torch.float64 if c.dtype == 'float64' else torch.float32
    mean, std = (torch.tensor(state[k], dtype=real, device=device).view(-1, 1, 1, 1) for k in ('mean', 'std'))
    generator = torch.Generator(device).manual_seed(c.seed)
    model = model.to(device).eval()

    def function(x):
        x = (x.to(device, real) - mean) / std
        if c.noise > 0:
            x = x + c.noise * torch.randn(x.shape, generator=generator, device=device, dtype=real)
        with torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16'):
            return model.embed(x)
    return function


# ---------------------------------------------------------------------------------------------
# the table

def newest_checkpoint():
    found = sorted(Path('out').glob('*/ckpt.pt'), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError('no checkpoint under out/: train one with python train.py --data active_matter, or name one')
    return found[-1]


def evaluate(args):
    started = time.perf_counter()
    path = Path(args.checkpoint) if args.checkpoint else newest_checkpoint()
    state = load_checkpoint(path)
    try:
        c = Config(**state['config'])
    except TypeError:
        raise ValueError(f'{path} was written by another version of train.py') from None
    device = torch.device(args.device)
    data_dir = args.data_dir or os.environ.get('THE_WELL_DATA_DIR') or c.data_dir
    root, system, _ = find_dataset(c.data, data_dir)
    stride = args.stride or (4 if c.preset == 'nano' else c.stride)
    splits = {s: Split(root, system, s, c.resolution, c.stride, c.cache_dir) for s in ('train', 'valid', 'test')}
    labels, channels = state['labels'], state['channels']
    for name, split in splits.items():
        if split.channels != channels or not set(labels) <= split.scalars.keys():
            raise ValueError(f'{root}, {name}: channels or scalars are not those {path} was trained on')
    mean, std = np.array(state['label_mean']), np.array(state['label_std'])
    windows = {name: eval_windows(split, stride) for name, split in splits.items()}
    targets = {name: torch.tensor(((splits[name].labels(labels) - mean) / std)[w[:, 0]]) for name, w in windows.items()}
    total = sum(map(len, windows.values()))
    print(f'{path}: {c.data}, preset {c.preset}, seed {c.seed}, step {state["step"]}, '
          f'{state["samples"]:,} windows seen; {" / ".join(str(len(w)) for w in windows.values())} windows to probe')

    def tokens_of(function, description):
        with tqdm(total=total, desc=description, unit='window') as bar:
            return {name: (embed(splits[name], w, function, args.batch, bar), targets[name])
                    for name, w in windows.items()}

    def probes(embedded, name):
        with tqdm(total=args.epochs, desc=f'probing {name}', unit='epoch') as bar:
            error, size = probe.attentive(embedded, args.mlp_ratio, args.epochs, seed=args.seed, device=device,
                                          tick=bar.update)
        return {'attentive': error, 'linear': probe.linear(embedded), 'knn': probe.knn(embedded)}, size

    rows = {}
    model = build_model(c, len(channels))
    parameters = {'encoder': sum(p.numel() for p in model.encoder.parameters())}
    untrained = encoder_function(build_model(c, len(channels)), state, c, device)
    restore(model, state, path)
    trained = encoder_function(model, state, c, device)
    rows['JEPA'], parameters['attentive probe'] = probes(tokens_of(trained, 'embedding'), 'JEPA')
    rows['random init'], _ = probes(tokens_of(untrained, 'embedding, random init'), 'random init')
    statistics = with_products(tokens_of(lambda x: field_statistics(x, channels)[:, None], 'field statistics'))
    rows['field statistics'] = {'linear': probe.linear(statistics)}
    rows['predict the mean'] = {p: targets['test'].pow(2).mean(0) for p in ('attentive', 'linear', 'knn')}

    result = {'system': c.data, 'split': 'test', 'labels': labels, 'rows': {}, 'seconds': None,
              'parameters': parameters, 'checkpoint': str(path), 'windows_seen': state['samples'],
              'train_seconds': state['seconds']}
    for name, by_probe in rows.items():
        result['rows'][name] = {p: {**dict(zip(labels, e.tolist())), 'mean': e.mean().item()}
                                for p, e in by_probe.items()}
    if c.data in PAPER:
        result['rows']['JEPA, the paper'] = {'attentive': {'mean': PAPER[c.data]}}
    result['seconds'] = time.perf_counter() - started
    print_table(result)
    out = path.with_name('eval.json')
    part = out.with_name('eval.json.part')
    part.write_text(json.dumps(result, indent=1))
    os.replace(part, out)
    print(f'{result["seconds"] / 60:.1f} min, peak memory {peak_memory():.1f} GB; the same numbers are in {out}')


def print_table(result):
    """Rows = encoders, columns = labels under each probe: mean squared error of z-scored labels on test."""
    probes, columns = ('attentive', 'linear', 'knn'), [*result['labels'], 'mean']
    width = max(map(len, result['rows'])) + 2
    print(f'\nMSE of z-scored parameters, {result["system"]}, {result["split"]} split (guessing the mean: 1)\n')
    print(' ' * width + '   '.join(f'{p:^{8 * len(columns)}}' for p in probes))
    print(' ' * width + '   '.join(''.join(f'{c:>8}' for c in columns) for _ in probes))
    for name, row in result['rows'].items():
        cell = lambda p, c: f'{row[p][c]:8.3f}' if c in row.get(p, {}) else f'{"-":>8}'
        print(f'{name:{width}}' + '   '.join(''.join(cell(p, c) for c in columns) for p in probes))
    print()


def main():
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('checkpoint', nargs='?', help='default: the newest out/*/ckpt.pt')
    parser.add_argument('--data-dir', help="default: $THE_WELL_DATA_DIR, else the checkpoint's")
    parser.add_argument('--stride', type=int, default=0,
                        help='frames between probed windows (default: 4 for nano, else as in training)')
    parser.add_argument('--batch', type=int, default=16, help='windows embedded at once')
    parser.add_argument('--epochs', type=int, default=100, help='epochs of the attentive probe')
    parser.add_argument('--mlp-ratio', type=float, default=12.0, help="MLP ratio of the attentive probe")
    parser.add_argument('--seed', type=int, default=0, help='seed of the attentive probe')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    try:
        evaluate(args)
    except (ValueError, OSError, FloatingPointError) as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
