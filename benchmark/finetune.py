"""
Fine-tuning: encoder and attentive head trained together to name the parameters, end to end.

Two protocols. `ours` is AdamW with a gentle rate for the encoder and a cosine. `paper` is that of the paper's script
for MPP: Adam at 1e-5 for everything, halved when the error on valid has not fallen for five epochs, 30 epochs, steps
of 64 windows that are 4 frames apart. Either keeps the epoch that was best on valid.
"""
import copy
import math

from common import FRAMES

import torch

import model as models
import probe

PAPER = dict(epochs=30, batch=64, lr=1e-5, stride=4)


def epochs_of(protocol):
    """How many epochs `--finetune` asks for: a number, or those of the paper. Raises ValueError for other words."""
    if protocol == 'paper':
        return PAPER['epochs']
    if not protocol.isdigit() or int(protocol) < 1:
        raise ValueError(f'--finetune is a number of epochs or paper, not {protocol!r}')
    return int(protocol)


def finetune(run, model, protocol, batch=16, lr=1e-5, mlp_ratio=0.0, scored='test', device='cpu', tick=lambda: None):
    """Estimates (n, L) of the labels of a split, in the order of `run.windows`.

    run: an embed.Run, whose windows and targets are used; model: its Model, which is changed. protocol: 'paper', or
    the number of our epochs, as text. batch, lr: of ours, lr that of the encoder (the head's is 1e-3). `tick` is
    called after every epoch. Raises FloatingPointError if it diverges.
    """
    paper, epochs = protocol == 'paper', epochs_of(protocol)
    batch, windows, targets = (PAPER['batch'] if paper else batch), dict(run.windows), dict(run.targets)
    if paper:
        spaced, labels = run.windows_at(PAPER['stride'])
        windows['train'], targets['train'] = spaced['train'], labels['train']
        network = models.unwrapped(model.network)
        if hasattr(network, 'paper_finetuning'):
            network.paper_finetuning()
    function = run.encode(model, frozen=False)
    load = lambda name, index: run.splits[name].load(windows[name][index], frames=FRAMES)
    truth = lambda name, index: targets[name][index].float().to(device)
    with torch.no_grad():
        dim = function(load('train', slice(0, 1))).shape[-1]
    torch.manual_seed(run.probe_seed)
    head = probe.AttentiveProbe(dim, targets['train'].shape[-1], mlp_ratio).to(device)
    both = torch.nn.ModuleList([model, head])
    optimizer, schedule = optimizer_of(model, head, paper, lr, epochs * math.ceil(len(windows['train']) / batch))
    order = torch.Generator().manual_seed(run.probe_seed)

    def estimates(name):
        both.eval()
        with torch.no_grad():
            return torch.cat([head(function(load(name, slice(i, i + batch))).float())
                              for i in range(0, len(windows[name]), batch)]).cpu()

    best, best_state = math.inf, None
    for _ in range(epochs):
        for index in torch.randperm(len(windows['train']), generator=order).split(batch):
            both.train()
            optimizer.zero_grad()
            (head(function(load('train', index.numpy())).float()) - truth('train', index)).pow(2).mean().backward()
            optimizer.step()
            if not paper:
                schedule.step()
        on_valid = (estimates('valid') - targets['valid']).pow(2).mean().item()
        if paper:
            schedule.step(on_valid)
        if on_valid < best:
            best, best_state = on_valid, copy.deepcopy(both.state_dict())
        tick()
    if best_state is None:
        raise FloatingPointError('fine-tuning diverged: its error on valid is not a number; try a lower --finetune-lr')
    both.load_state_dict(best_state)
    return estimates(scored)


def optimizer_of(model, head, paper, lr, steps):
    """(optimizer, schedule) of a protocol; the paper's schedule steps once an epoch, on the error on valid."""
    if paper:
        optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=PAPER['lr'])
        return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5)
    optimizer = torch.optim.AdamW([{'params': model.parameters(), 'lr': lr}, {'params': head.parameters(), 'lr': 1e-3}],
                                  weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
