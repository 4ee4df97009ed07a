"""
What a pretrained encoder knows of the physics: the error table.

    python eval.py                                # the newest run under out/, on valid: to tune by
    python eval.py --split test                   # on test: to report, once
    python eval.py out/...                        # that one (its folder, or the checkpoint in it)
    python eval.py out/... out/...                # several in one table
    python eval.py out/... --finetune             # also train encoder and head end to end (finetune.py)
    python eval.py out/... --generalize           # fewer labels, unseen parameters, spoilt fields (generalize.py)
    python eval.py out/... --probe paper          # the attentive probe as the paper's code trains it
    python eval.py out/... --save-embeddings FILE # also keep what the encoder gave, for plot.py
    python eval.py --all                          # the paper's table 1, from everything under out/
    python eval.py --latents FOLDER --data NAME   # published embeddings in place of a run
    torchrun --nproc_per_node=8 eval.py out/...   # the same table, sooner: all processes embed, the first does the rest

Embeds windows of the train, valid and test splits, --stride frames apart, once with the frozen encoder, fits
three probes (probe.py) to the parameters of the simulations, and prints their mean squared error on --split, with
the parameters z-scored by the training split: guessing the mean scores 1. The rows that keep the encoder
honest: the same encoder before training, and hand-made statistics of the fields with ridge regression.
Each run's rows go to eval.json beside its checkpoint, whatever else is in the table.
"""
import io
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import (RANK, Progress, at_least, machine, option, parse, peak_memory, pick_device, script, shared,
                    start_ranks, write_bytes, write_text)

import numpy as np
import torch

import generalize
import model as models
import probe
import systems
from data import read_recipe
from embed import Run, embed_along
from finetune import epochs_of, finetune
from tables import PROBES, PUBLISHED, print_carried, print_table, print_table_one

CLOCKS = {'step', 'lr', 'samples_per_s', 'seconds', 'waiting', 'memory_gb'}   # of the log; the rest is learned
# what rows depend on
TUNED = 'split', 'probe', 'epochs', 'mlp_ratio', 'seed', 'finetune', 'finetune_lr', 'generalize', 'fractions'


@dataclass
class Settings:
    split: str = option('valid', 'that is scored: valid, to tune by, or test, to report', 'what')
    all: bool = option(False, "the paper's table 1 from everything under out/", 'what', bare=True)
    latents: str = option('', 'folder of published embeddings to probe: train/ and valid/batch_*.pt', 'what')
    save_embeddings: str = option('', 'npz file for mean tokens, labels and run ids of every window', 'what')
    data_dir: str = option('', "default: $THE_WELL_DATA_DIR, else the checkpoint's", 'data')
    data: str = option('', 'system of the --latents', 'data')
    stride: int = option(0, 'frames between probed windows; 0: 4 for nano, else as in training', 'data')
    batch: int = option(16, 'windows embedded at once', 'data')
    probe: str = option('ours', "how the attentive probe is trained: ours, or paper, as in its code, on valid", 'probe')
    epochs: int = option(100, 'epochs of the attentive probe', 'probe')
    mlp_ratio: float = option(0.0, "MLP ratio of the attentive probe; 0: the paper's (the model's, or else 12 up to "
                                   'width 128 and 0.25 above)', 'probe')
    generalize: bool = option(False, 'also probe with fewer labels, at unseen parameters, and on noisy and coarse '
                                     'fields (generalize.py)', 'probe', bare=True)
    fractions: str = option('runs', 'of what --generalize takes fractions: runs, or windows', 'probe')
    finetune: str = option('', 'also train encoder and attentive head end to end: paper, or a number of epochs of '
                               'our own protocol; 5 if given alone', 'probe', '5')
    finetune_lr: float = option(1e-5, 'learning rate of the encoder in ours', 'probe')
    seed: int = option(-1, "seed of the attentive probe; -1: the run's", 'probe')
    device: str = option('auto', 'cuda, cpu, or auto', 'machine')


# ---------------------------------------------------------------------------------------------
# rows of the table: {probe: estimates of the labels of the windows of the scored split (n, L)}

def probes(splits, module, args, seed, device, description, attentive=True, epochs=0, **protocol):
    """{probe: estimates (n, L)}; with or without the attentive one, of so many epochs at least."""
    found, scored = {}, scored_of(splits, args)
    if attentive:
        epochs = max(epochs, args.epochs)
        with Progress(epochs, f'probing {description}', 'epoch') as bar:
            found['attentive'], _ = probe.attentive(splits, ratio_of(module, args), epochs, scored=scored, seed=seed,
                                                    device=device, tick=bar.update, **protocol)
    return {**found, 'linear': probe.linear(splits, scored=scored), 'knn': probe.knn(splits, scored=scored)}


def scored_of(splits, args):
    """The name of the split that is scored: generalize.py has its own."""
    return 'scored' if 'scored' in splits else args.split


def ratio_of(module, args):
    """MLP ratio of the attentive probe: the flag's, or the model's; 0: probe.AttentiveProbe chooses."""
    return args.mlp_ratio or getattr(module, 'MLP_RATIO', 0.0)


def field_statistics(run, args):
    """(the row of hand-made statistics with ridge regression, how it carries); (None, {}) where a system has none."""
    if run.system.statistics is None:
        print(f'field statistics: none are defined for {run.c.data} (systems/{run.c.data}.py would hold them)')
        return None, {}
    ridge = lambda splits, *settings: {'linear': probe.linear(splits, scored=scored_of(splits, args))}
    return row_of(run, args, with_products(embedded(run, args, 'field statistics')), ridge, trained=False)


def embedded(run, args, what, noise=None):
    """What run.embed gives; with --generalize also the scored split's windows in each way that they are spoilt."""
    sets = run.embed(what, noise)
    for how in generalize.INPUTS if args.generalize else ():
        sets[how] = run.embed(what, noise, how, (args.split,)).get(args.split)
    return sets


def row_of(run, args, sets, fit, trained):
    """(row of a table, {} or what --generalize finds). fit(splits, attentive, epochs) -> the row of some windows."""
    if not args.generalize:                                              # a part of the runs is probed as there
        return fit(sets, True, generalize.epochs_for(len(sets['train'][1])) if run.c.label_fraction < 1 else 0), {}
    windows = run.windows['train']
    if args.fractions == 'runs':
        runs, order = windows[:, 0], run.splits['train'].labelled(1.0, run.c.seed)
    else:
        runs, order = None, np.random.default_rng([run.c.seed, 8]).permutation(len(windows))
    return generalize.measure(sets, fit, runs, order, args.split, run.path.parent, trained)


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
# the table

def evaluate_run(run, args):
    """(rows of one run, {title: {probe: estimates}}; what eval.json says of the encoder; its tokens)."""
    rows, carried, about, kept, noise, protocol = {}, {}, {}, None, None, {}
    if args.probe == 'paper':                                            # some models have settings of their own there
        protocol = probe.PAPER | getattr(run.module, 'PAPER_PROBE', {}).get(run.c.data, {})
        noise = protocol.pop('noise', None)
    for title in run.name, 'random init':
        sets = embedded(run, args, title, noise)
        fit = lambda splits, *settings: probes(splits, run.module, args, run.probe_seed, run.device, title, *settings,
                                               **protocol)
        rows[title], carried[title] = row_of(run, args, sets, fit, title == run.name)
        if title == run.name:
            kept, means = sets if args.save_embeddings else None, probe.mean_tokens(sets['train'][0])
            about = {'rank': {'effective': models.embedding_health(means)['embedding_rank'], 'of': means.shape[1]}}
        del sets                                                         # it may be a large file
        if args.finetune:
            with Progress(epochs_of(args.finetune), f'fine-tuning {title}', 'epoch') as bar:
                model = run.model(run.device, title == run.name)
                tuned = finetune(run, model, args.finetune, args.batch, args.finetune_lr, ratio_of(run.module, args),
                                 args.split, run.device, bar.update)
            rows[f'{title}, {tuned_name(args)}'] = {'attentive': tuned}
    network = models.unwrapped(run.model('cpu', trained=False).network)
    encoder = getattr(network, 'encoder', network)
    head = probe.AttentiveProbe(means.shape[1], len(run.labels), ratio_of(run.module, args))
    parameters = {'encoder': sum(p.numel() for p in encoder.parameters()),
                  'attentive probe': sum(p.numel() for p in head.parameters())}
    return rows, {'parameters': parameters, **about, **({'generalization': carried} if args.generalize else {})}, kept


def tuned_name(args):
    return "fine-tuned as in the paper" if args.finetune == 'paper' else 'fine-tuned'


def evaluate(paths, args):
    """Evaluate runs of one dataset, write each one's eval.json, and print their table."""
    runs = [Run(path, args) for path in paths]
    same = lambda r: (r.c.data, r.labels, r.state['label_mean'], [split.files for split in r.splits.values()])
    if any(same(r) != same(runs[0]) for r in runs):
        raise ValueError('the checkpoints are of different systems or datasets: a table is about one')
    most = runs[0].system.probe_windows if args.probe == 'paper' else ()
    for run in runs:                                                     # the same windows, whatever the presets
        run.probe_on(max(r.stride for r in runs), most)
    results, statistics = [], {}
    for run in runs:
        started = time.perf_counter()
        counts = ' / '.join(str(len(w)) for w in run.windows.values())
        print(f'{run.name}: {run.path}, preset {run.c.preset}, step {run.state["step"]}, {run.state["samples"]:,} '
              f'windows seen; seeds: {", ".join(f"{k} {v}" for k, v in run.seeds.items())}\n  probed on {counts} '
              f'windows, {run.stride} frames apart: {run.field()}', flush=True)
        rows, about, tokens = evaluate_run(run, args)
        print(f'  {about["parameters"]["encoder"]:,} parameters in the encoder, '
              f'{about["parameters"]["attentive probe"]:,} in its attentive probe')
        seen = run.c.resolution, run.c.whole
        if seen not in statistics:
            statistics[seen] = field_statistics(run, args)
        row, carried = statistics[seen]
        if row:
            rows['field statistics'] = row
        if carried:
            about['generalization']['field statistics'] = carried
        rows['predict the mean'] = {p: torch.zeros_like(run.targets[args.split]) for p in PROBES}
        results.append(result_of(run, args, rows, about, time.perf_counter() - started))
        write_text(run.path.with_name('eval.json'), json.dumps(results[-1], indent=1))
        if args.save_embeddings:
            save_embeddings(Path(args.save_embeddings), run, tokens)
    print_table(results)
    for result in results if args.generalize else ():
        print_carried(result)
    print(f'{sum(r["seconds"] for r in results) / 60:.1f} min, peak memory {peak_memory():.1f} GB; the same numbers '
          f'are in ' + ', '.join(str(r.path.with_name('eval.json')) for r in runs))


def result_of(run, args, rows, about, seconds):
    """What goes to a run's eval.json: errors of each row, and of each run of the scored split; what they depend on."""
    scores, by_run = scored(rows, run.targets[args.split], run.windows[args.split][:, 0], run.shown)
    log = run.path.with_name('log.jsonl')
    paper = getattr(run.module, 'PAPER', {}).get(run.c.data)
    if paper is not None and not run.c.supervised and not read_recipe(run.root):       # nothing of what we simulate
        scores[run.name + PUBLISHED] = {'attentive': {'mean': paper}}
    return {'system': run.c.data, 'split': args.split, 'labels': run.shown, 'row': run.name, 'rows': scores,
            'by_run': by_run, 'seconds': seconds, **about, 'field': run.field(), 'stride': run.stride,
            'windows': {name: len(w) for name, w in run.windows.items()}, 'seeds': run.seeds,
            'probe': {k: getattr(args, k) for k in TUNED}, 'command': ' '.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            'evaluated_by': run.git, 'machine': machine(run.device),
            'run': {'checkpoint': str(run.path), 'model': run.c.model, 'preset': run.c.preset, 'seed': run.c.seed,
                    'windows_seen': run.state['samples'], 'train_seconds': run.state['seconds'],
                    **{'memory_gb': line['memory_gb'] for line in log_lines(log, 1)}, 'last_steps': last_steps(log),
                    'git': run.state['git'], 'settings': run.state['config'] | run.state['options']}}


def last_steps(log, steps=100):
    """What a training log says of its last steps: the means of its losses and of the embedding's spread and rank."""
    lines = log_lines(log, steps)
    names = lines[-1].keys() - CLOCKS if lines else ()
    return {name: float(np.mean([line[name] for line in lines if name in line])) for name in sorted(names)}


def log_lines(log, last):
    """The last so many lines of a training log, which may not be there."""
    return [json.loads(line) for line in log.read_text().splitlines()[-last:]] if log.exists() else []


def scored(rows, targets, runs, labels):
    """Errors of estimates: {row: {probe: {label or 'mean': MSE}}}, and {row: {probe: the mean's, run by run}}."""
    scores, by_run = {}, {}
    for name, by_probe in rows.items():
        squared = {p: (estimates - targets).pow(2) for p, estimates in by_probe.items()}               # (n, L)
        scores[name], by_run[name] = {}, {}
        for p, e in squared.items():
            scores[name][p] = {**dict(zip(labels, e.mean(0).tolist())), 'mean': e.mean().item()}
            by_run[name][p] = [round(e[runs == r].mean().item(), 6) for r in np.unique(runs)]
    return scores, by_run


def checkpoints():
    """Those under out/, the newest last; ValueError if there is none."""
    found = sorted(Path('out').glob('*/ckpt.pt'), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError('no checkpoint under out/: train one with python train.py, or name one')
    return found


def table_one(args):
    """The paper's table 1: the newest checkpoint of every system and model under out/, measured beside published.

    Reads the eval.json that is newer than its checkpoint, else evaluates: also if it is of another split, if this
    call's flags differ from the defaults and from what they were there, and, with --finetune, what has no fine-tuned
    row yet. A fine-tuned row goes before a frozen one, and is marked. A run that cannot be evaluated is left out, in
    one line.
    """
    newest, cells, seen = {}, {}, {}
    for path in checkpoints():
        try:
            c = models.load_checkpoint(path)['config']
            if not c.get('supervised'):
                newest[c['data'], c['model']] = path
        except ValueError as e:
            print(f'left out: {e}')
    for (system, model), path in newest.items():
        try:
            known = known_result(path, args)
        except ValueError as e:
            print(f'left out: {e}')
            continue
        tuned = next((r for name, r in known['rows'].items() if name.startswith(f'{known["row"]}, fine-tuned')), None)
        error = (tuned or known['rows'][known['row']])['attentive']['mean']
        cells[system, model] = f'{error:.3f}' + '*' * bool(tuned)
        how = ', '.join([known['field'].partition(',')[0], f'windows {known["stride"]} frames apart',
                         *(f'{k} {v}' for k, v in known['probe'].items() if not k.startswith('finetune'))])
        seen.setdefault(system, {}).setdefault(how, []).append(known['row'])
    columns = list(dict.fromkeys([*systems.system_names(), *(system for system, _ in cells)]))
    run = {model for _, model in cells}                                  # and those that the paper has, run or not
    modules = {name: models.find_model(name) for name in models.model_names()}
    modules = {name: m for name, m in modules.items() if hasattr(m, 'PAPER') or name in run}
    published = {name: (models.title(name), getattr(m, 'PAPER', {}), '*' * getattr(m, 'PAPER_FINETUNED', False))
                 for name, m in modules.items()}
    print_table_one(cells, published, columns, seen, args.split)


def known_result(path, args):
    """The eval.json of a checkpoint, made again if it is missing, older, or not what the flags ask for."""
    table, default = path.with_name('eval.json'), Settings()
    known = json.loads(table.read_text()) if table.exists() else {}
    asked = {k: getattr(args, k) for k in (*TUNED, 'stride') if getattr(args, k) != getattr(default, k)}
    there = {**known.get('probe', {}), 'stride': known.get('stride')}
    stale = 'by_run' not in known or table.stat().st_mtime < path.stat().st_mtime or known['split'] != args.split
    if stale or any(there.get(k) != v for k, v in asked.items()):
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
             embedding=torch.cat([probe.mean_tokens(tokens[name][0]).float() for name in run.splits]).numpy(),
             labels=part(lambda name, split: np.stack([split.scalars[k] for k in run.labels], 1)[which(name)]),
             run=part(lambda name, split: which(name)), frame=part(lambda name, split: run.windows[name][:, 1]),
             filename=part(lambda name, split: np.array([r['file'] for r in split.runs])[which(name)]),
             split=part(lambda name, split: np.full(len(which(name)), name)))
    write_bytes(path, buffer.getvalue())
    print(f'{path}: the mean tokens of {count} windows')


def evaluate_latents(args):
    """Probe published embeddings. They have no test split: half of valid, drawn at random, is held out in its place."""
    readers = [m for m in map(models.find_model, models.model_names()) if hasattr(m, 'read_latents')]
    system = systems.find_system(args.data)
    for module in readers:                                               # of the models here, one
        splits, names = module.read_latents(args.latents, args.data)
        logs = torch.tensor([name in system.log_labels for name in names])
        own = lambda y: torch.where(logs, y.double().log10(), y.double())
        splits = {name: (z.float(), own(y)) for name, (z, y) in splits.items()}
        mean, std = splits['train'][1].mean(0), splits['train'][1].std(0, correction=0)
        splits = {name: (z, (y - mean) / std) for name, (z, y) in splits.items()}
        (z, y), half = splits['valid'], len(splits['valid'][0]) // 2
        mixed = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))       # the files may be in an order
        splits |= {'valid': (z[mixed[:half]], y[mixed[:half]]), 'test': (z[mixed[half:]], y[mixed[half:]])}
        title, labels = f'{module.TITLE}, published latents', [system.name_of(name) for name in names]
        print(f'{title}: {" / ".join(str(len(z)) for z, _ in splits.values())} windows; half of valid, '
              f'drawn at random, is held out and scored')
        args.split = 'test'
        seed = max(args.seed, 0)
        estimates = probes(splits, module, args, seed, pick_device(args.device), title)
        rows = {title: estimates, 'predict the mean': {p: torch.zeros_like(splits['test'][1]) for p in PROBES}}
        scores, by_run = scored(rows, splits['test'][1], np.arange(len(z) - half), labels)
        if args.data in getattr(module, 'PAPER', {}):
            scores[module.TITLE + PUBLISHED] = {'attentive': {'mean': module.PAPER[args.data]}}
        print_table([{'system': args.data, 'split': 'held-out half of the valid', 'labels': labels, 'row': title,
                      'rows': scores, 'by_run': by_run, 'unit': 'windows', 'field': '', 'seeds': {},
                      'run': {'windows_seen': 0, 'preset': '', 'settings': {}}}])


@script
def main(argv=None):
    args, paths = parse(__doc__, Settings, argv, runs=dict(
        nargs='*', help='folders of runs, or their checkpoints (default: the newest of out/)'))
    at_least(args, 1, 'batch', 'epochs')
    at_least(args, 0, 'stride', 'mlp_ratio', 'finetune_lr')
    at_least(args, -1, 'seed')
    if args.split not in ('valid', 'test') or args.probe not in ('ours', 'paper'):
        raise ValueError(f'--split is valid or test, --probe ours or paper; not {args.split!r} and {args.probe!r}')
    if args.probe == 'paper' and args.split != 'valid':
        raise ValueError('the paper\'s probe is scored on valid: --split valid')
    if args.fractions not in ('runs', 'windows'):
        raise ValueError(f'--fractions is runs or windows, not {args.fractions!r}')
    if args.finetune:
        epochs_of(args.finetune)
    if args.save_embeddings and (args.all or len(paths) > 1):
        raise ValueError('--save-embeddings takes one run')
    kept = Path(args.save_embeddings).absolute()
    if args.save_embeddings and (kept.is_dir() or not kept.parent.is_dir()):
        raise ValueError(f'--save-embeddings takes a file to write, in a folder that is there; not {kept}')
    if args.all and paths:
        raise ValueError('--all takes everything under out/, and no runs')
    if args.latents:
        if paths or args.all or not args.data:
            raise ValueError('--latents takes --data, the name of their system, and no runs')
        idle = [name for name in ('split', 'probe', 'finetune', 'generalize', 'stride', 'save_embeddings')
                if getattr(args, name) != getattr(Settings(), name)]
        if idle:
            raise ValueError(f'--{idle[0].replace("_", "-")} has no meaning for --latents')
    start_ranks(pick_device(args.device))
    if RANK > 0:
        return embed_along(args)
    if args.latents:
        evaluate_latents(args)
    elif args.all:
        table_one(args)
    else:
        evaluate(paths or checkpoints()[-1:], args)
    shared(None)                                                         # the other ranks may go


if __name__ == '__main__':
    main()
