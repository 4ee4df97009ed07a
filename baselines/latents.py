"""
What DISCO's published latents know of the physics: the error table of eval.py, without a network.

    python -m baselines.latents FOLDER --data shear_flow

FOLDER holds {train,valid}/batch_*.pt. A random half of valid is held out and scored, for a test.
"""
from dataclasses import dataclass
from pathlib import Path

from common import at_least, option, parse, pick_device, read_tensors, script
import torch

import eval as evaluation
from eval import PROBES, PUBLISHED_ROW, fit_probes, print_table, score
from model import PROBE_MLP_RATIO, PUBLISHED
from systems import find_system

TITLE = 'DISCO, published latents'
LABELS = {'active_matter': ['L', 'zeta', 'alpha'], 'shear_flow': ['Rayleigh', 'Schmidt'],
          'rayleigh_benard': ['Rayleigh', 'Prandtl']}              # in the files' order

@dataclass
class Settings:
    data: str = option('', 'system of the latents: ' + ', '.join(LABELS), 'data')
    epochs: int = option(100, 'epochs of the attentive probe', 'probe')

def read_latents(folder, dataset):
    """{split: (tokens (n, 1, D), labels (n, L))} of official files, and the names of these labels.

    Labels are raw, and only those that vary over train. Raises ValueError, naming the file.
    """
    splits, names = {}, LABELS[dataset]
    for split in 'train', 'valid':
        latents, labels = [], []
        for path in sorted(Path(folder, split).glob('batch_*.pt')):
            batch = read_tensors(path)
            z, y = (batch.get(key, torch.empty(0)) for key in ('theta_latent', 'labels'))
            latents.append(z)
            labels.append(y)
            # somebody else wrote the file
            if z.ndim != 2 or z.shape[1] != latents[0].shape[1] or y.shape != (len(z), len(names)):
                raise ValueError(f'{path} needs theta_latent (b, D) and labels (b, {len(names)})')
        if not labels:
            raise ValueError(f'no latents {Path(folder, split)}/batch_*.pt')
        splits[split] = torch.cat(latents)[:, None], torch.cat(labels)
    # a label that never varies teaches nothing
    varies = splits['train'][1].std(0) > 0
    splits = {split: (z, y[:, varies]) for split, (z, y) in splits.items()}
    return splits, [name for name, v in zip(names, varies) if v]

@script
def main(argv=None):
    args, folder = parse(__doc__, Settings, argv, folder=dict(help='folder of the latents'))
    at_least(args, 1, 'epochs')
    if args.data not in LABELS:
        raise ValueError(f'--data is {", ".join(LABELS)}; not {args.data!r}')
    # labels in log10 where the system has them so, then z-scored by train
    system, (splits, names) = find_system(args.data), read_latents(folder, args.data)
    logs = torch.tensor([name in system.log_labels for name in names])
    splits = {split: (z.float(), torch.where(logs, y.double().log10(), y.double()))
              for split, (z, y) in splits.items()}
    mean, std = splits['train'][1].mean(0), splits['train'][1].std(0, correction=0)
    splits = {split: (z, (y - mean) / std) for split, (z, y) in splits.items()}
    # the files may be in some order: draw the half that is held out
    z, y = splits['valid']
    mixed = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    valid, scored = mixed.tensor_split([len(z) // 2])
    splits |= {'valid': (z[valid], y[valid]), 'scored': (z[scored], y[scored])}
    print(f'{TITLE}: {" / ".join(str(len(z)) for z, _ in splits.values())} windows; half of valid, '
          f'drawn at random, is held out and scored')
    # probe them; beside their errors stand those of the mean and the paper's
    targets, labels = splits['scored'][1], [system.name_of(name) for name in names]
    settings = evaluation.Settings(epochs=args.epochs)
    row = fit_probes(splits, settings, TITLE, PROBE_MLP_RATIO['disco'], device=pick_device('auto'))
    mean = {p: torch.zeros_like(targets) for p in PROBES}
    scores, by_window = score({TITLE: row, 'predict the mean': mean}, targets,
                              torch.arange(len(targets)).numpy(), labels)
    scores['DISCO' + PUBLISHED_ROW] = {'attentive': {'mean': PUBLISHED['disco'][args.data]}}
    # a table of one result
    print_table([{'system': args.data, 'split': 'held-out half of the valid', 'labels': labels,
                  'row': TITLE, 'rows': scores, 'by_run': by_window, 'unit': 'windows', 'field': '',
                  'seeds': {}, 'run': {'windows_seen': 0, 'preset': '', 'settings': {}}}])

if __name__ == '__main__':
    main()
