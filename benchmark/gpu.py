"""
What one GPU does, in 25 minutes:  python -m benchmark.gpu --out gpu.json --minutes 25

The tests that want a GPU; a training step of `paper` in every form, beside plain PyTorch; the other
models' steps; then, for the time that is left, `--preset real` and `paper` on simulated 256 x 256
data. Each is measured in a process of its own and written at once; if it fails, its error is. The
same command goes on where it stopped. At the end the table in docs/speed.md is drawn anew.
"""
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from common import (git_hash, machine, option, parse, peak_memory, pick_device, say, script,
                    write_text)
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import eval as evaluation
import simulate
import train
from benchmark import speed
from jepa import ChannelNorm, DepthwiseConv3d, Stem
from systems import DEFAULT, find_system
from vicreg import in_full

TESTS, DATA = 'pytest -m gpu', 'simulated data'
PAPER = 'jepa --preset paper --layer-scale 1 --recompute '         # so its loss sees the blocks
STEPS = {                   # what is timed: model and flags of train.py
    'JEPA, blocks as they are': PAPER + 'no', 'JEPA, blocks recomputed': PAPER + 'blocks',
    'JEPA, norm and MLP recomputed': PAPER + 'mlp', 'JEPA, plain PyTorch': PAPER + 'no',
    'JEPA, norms as mean and variance': PAPER + 'no', 'JEPA, compiled': PAPER + 'no --compile',
    'JEPA, norm and MLP recomputed, compiled': PAPER + 'mlp --compile',
    'V-JEPA': 'vjepa --preset paper', 'VideoMAE': 'videomae --preset paper',
    'MPP': 'mpp --preset paper', 'DISCO': 'disco --preset paper',
    'V-JEPA, real': 'vjepa --preset real --resolution 256', 'JEPA, nano': 'jepa --preset nano'}
# trained side by side. In the official code, whose ranks are not synchronised, an update is of 32
RACE = {'real': 'vjepa --preset real', 'paper': 'jepa --preset paper --batch 32'}
IN_MINIATURE = '--micro-batch 2 --batch 2 --resolution 32 '              # of a rehearsal
SMALL = {'jepa': IN_MINIATURE + '--widths 8,8,8,8,8 --blocks 1,1,0,0,0',
         'disco': IN_MINIATURE + '--width 32 --depth 1 --heads 2 --operator-width 4 --max-steps 2'}
SMALL_VIT = IN_MINIATURE + '--width 64 --depth 2 --heads 1'

@dataclass
class Settings:
    out: str = option('gpu.json', 'the file of results; data and runs go beside it', 'what')
    minutes: float = option(25.0, 'nothing new is begun after so many', 'what')
    rehearse: bool = option(False, 'in miniature, on a CPU: does this script run?', 'what', True)
    only: str = option('', 'measure this alone and print it, as this script does itself', 'what')

# --- other forms of JEPA's layers
def plain_stem(layer, x):
    """The official code's, in the default memory layout."""
    return F.conv3d(F.pad(x, (1, 2, 1, 2)), layer.weight, layer.bias)

def norm_by_moments(layer, x):
    """LayerNorm as mean and variance: PyTorch's kernel is made for rows longer than 16 channels."""
    axis = 1 if isinstance(layer, ChannelNorm) else -1
    shape = [-1] + [1] * (x.ndim - 2) if axis == 1 else [-1]             # of weights over channels
    x = in_full(x)                                                       # as autocast does
    variance, mean = torch.var_mean(x, axis, correction=0, keepdim=True)
    x = (x - mean) * (variance + layer.eps).rsqrt()
    return x * layer.weight.view(shape) + layer.bias.view(shape)

FORMS = {'JEPA, plain PyTorch': {DepthwiseConv3d: nn.Conv3d.forward, Stem: plain_stem},
         'JEPA, norms as mean and variance': dict.fromkeys([nn.LayerNorm, ChannelNorm],
                                                           norm_by_moments)}

# --- measurements: each is a dict
def measure_step(name, rehearse):
    """A training step's speed and memory; its loss and gradient, which no form may change."""
    title, dtype = name.rsplit(', ', 1)
    model, *flags = STEPS[title].split()
    flags += SMALL.get(model, SMALL_VIT).split() if rehearse and 'nano' not in flags else []
    c, options = speed.settings(model, 'cpu' if rehearse else 'cuda', *flags, '--dtype', dtype)
    network, step = speed.trainer(c, options, FORMS.get(title, {}))

    loss = step()['loss']                                                # it compiles here
    gradients = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    if c.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    took = speed.seconds(step, 1 if rehearse else 10)
    return {'windows': c.batch, 'windows_per_s': c.batch / took, 'memory_gb': peak_memory(),
            'loss': loss, 'gradient': torch.stack(gradients).norm().item()}

def make_data(folder, minutes, rehearse):
    """Simulate 92 runs of 48 frames at 256 x 256, as if downloaded; minutes to train each."""
    presets, began = find_system(DEFAULT).presets, time.time()
    presets['race'] = replace(presets['well'], frames=48, pairs=presets['well'].pairs[::2],
                              runs=dict(train=2, valid=1, test=1), files_at_once=8)
    simulate.make_dataset(DEFAULT, folder, 'smoke' if rehearse else 'race',
                          device=pick_device('auto'))
    (folder / DEFAULT / 'simulated.json').unlink()
    return {'minutes_each': (minutes - (time.time() - began) / 60) / 3}

def train_and_probe(name, folder, minutes, rehearse):
    """Train for so many minutes; then ridge and kNN, chosen and scored on valid."""
    model, *flags = RACE[name].split()
    flags += ['--model', model, '--data-dir', str(folder)]
    flags += SMALL.get(model, SMALL_VIT).split() if rehearse else ['--dtype', 'bfloat16']

    # ten steps say how many the minutes have room for
    first, out = folder / f'first-{name}', folder / name
    train.main([*flags, '--steps', '10', '--out', str(first)])
    log = evaluation.log_lines(first / 'log.jsonl', 5)
    rate, (c, _, _) = np.median([row['samples_per_s'] for row in log]), train.parse(flags, '')
    steps = max(10, round(60 * minutes * rate / c.batch))
    train.main([*flags, '--steps', str(steps), '--out', str(out)])

    # windows 8 frames apart, on valid
    evaluation.main([str(out), '--stride', '8', '--probes', 'linear,knn'])
    rows = json.loads((out / 'eval.json').read_text())['rows']
    return {'windows': steps * c.batch, 'minutes': minutes, 'errors': {
        f'{row}, {method}': errors[method] for row, errors in rows.items()
        for method in ('linear', 'knn') if method in errors}}

def measure(name, folder, minutes, rehearse):
    """The measurement of this name."""
    if name == TESTS:
        command = [sys.executable, '-m', *TESTS.split(), '-q']
        text = subprocess.run(command, capture_output=True, text=True).stdout
        return {'said': text.splitlines()[-1], 'output': text[-4000:]}
    if name == DATA:
        return make_data(folder, minutes, rehearse)
    if name in RACE:
        return train_and_probe(name, folder, minutes, rehearse)
    return measure_step(name, rehearse)

def measure_apart(name, args, minutes, left):
    """The same in a process of its own; {'error': its last words} if it fails, or takes longer."""
    command = [sys.executable, '-m', 'benchmark.gpu', '--only', name, '--out', args.out,
               '--minutes', str(minutes), *(['--rehearse'] if args.rehearse else [])]
    try:
        p = subprocess.run(command, capture_output=True, text=True, timeout=60 * left + 60)
    except subprocess.TimeoutExpired:
        return {'error': 'the time was up'}
    if p.returncode:
        return {'error': (p.stderr.strip().splitlines() or [f'exit code {p.returncode}'])[-1]}
    return json.loads(p.stdout.splitlines()[-1])

# --- the table
def table(results):
    """Markdown of the results so far."""
    found = results['measured']
    lines = [f'{results["machine"]}, commit {results["commit"][:7]}. '
             f'`{TESTS}`: {found.get(TESTS, {}).get("said", "not run")}', '',
             '| training step | windows | windows/s | GB | gradient |', '|---|---|---|---|---|']

    # a line for each step
    for name, row in found.items():
        if 'windows_per_s' in row:
            lines.append(f'| {name} | {row["windows"]} | {row["windows_per_s"]:.3g} | '
                         f'{row["memory_gb"]:.2f} | {row["gradient"]:.5g} |')
        elif 'error' in row:
            lines.append(f'| {name} | | failed | | {row["error"][:80]} |')

    # the two that were trained
    lines += ['', '| on valid | windows | minutes | probe | errors |', '|---|---|---|---|---|']
    for name, row in found.items():
        for probed, errors in row.get('errors', {}).items():
            shown = ', '.join(f'{label} {error:.3f}' for label, error in errors.items())
            lines.append(f'| {name} | {row["windows"]} | {row["minutes"]:.1f} | {probed} | '
                         f'{shown} |')
    return '\n'.join(lines)

def draw(results, page=Path('docs/speed.md')):
    """Put the table between its markers on a page."""
    marked = r'(<!-- gpu -->\n).*?(<!-- /gpu -->)'
    write_text(page, re.sub(marked, lambda m: f'{m[1]}{table(results)}\n{m[2]}', page.read_text(),
                            flags=re.DOTALL))

@script
def main(argv=None):
    args, = parse(__doc__, Settings, argv)
    out, began = Path(args.out), time.time()
    if args.only:
        folder = out.with_suffix('.data')
        return print(json.dumps(measure(args.only, folder, args.minutes, args.rehearse)))
    device = 'cpu' if args.rehearse else pick_device('cuda')
    out.parent.mkdir(parents=True, exist_ok=True)

    # what was measured stays; what failed is tried again
    results = json.loads(out.read_text()) if out.exists() else {'measured': {}}
    results |= {'machine': machine(device), 'commit': git_hash()}
    measured = results['measured']
    steps = [f'{title}, {dtype}' for dtype in ('bfloat16', 'float32') for title in STEPS]

    for name in [TESTS, *steps, DATA, *RACE]:
        left = args.minutes - (time.time() - began) / 60
        if left > 0 and 'error' in measured.get(name, ['error']):
            minutes = measured[DATA].get('minutes_each', 0) if name in RACE else left
            measured[name] = measure_apart(name, args, minutes, left)
            write_text(out, json.dumps(results, indent=1))
            say(f'{name}: {measured[name]}')

    # the table, on its page
    if args.rehearse:
        print(table(results))
    else:
        draw(results)

if __name__ == '__main__':
    main()
