"""
Fine-tuning, eval.py --finetune: encoder and attentive head learn the parameters together.

Ours is AdamW with a gentle rate for the encoder and a cosine; `paper`, as its script for MPP, Adam,
halved when the error on valid has not fallen for five epochs. Both keep the best epoch on valid.
"""
import copy
import math

from common import FRAMES
import torch

import model as models
import probe

PAPER = dict(epochs=30, batch=64, lr=1e-5, stride=4)

def epochs_of(protocol):
    """How many epochs `--finetune` asks for. Raises ValueError for what is no number nor paper."""
    if protocol != 'paper' and (not protocol.isdigit() or int(protocol) < 1):
        raise ValueError(f'--finetune is a number of epochs or paper, not {protocol!r}')
    return PAPER['epochs'] if protocol == 'paper' else int(protocol)

def finetune(run, model, protocol, batch=16, lr=1e-5, mlp_ratio=0.0, scored='test', device='cpu',
             tick=lambda: None):
    """Estimates (n, L) of the labels of run.windows[scored], by `model`, which is changed.

    run: an eval.Run. protocol: 'paper', or the number of our epochs, as text. batch, lr: of ours.
    tick: called after every epoch. Raises FloatingPointError if it diverges.
    """
    # the paper takes windows of its own, and some models are changed for it
    paper, windows, targets = protocol == 'paper', dict(run.windows), dict(run.targets)
    if paper:
        batch, (spaced, labels) = PAPER['batch'], run.windows_at(PAPER['stride'])
        windows['train'], targets['train'] = spaced['train'], labels['train']
        network = models.unwrapped(model.network)
        if hasattr(network, 'paper_finetuning'):
            network.paper_finetuning()

    encode = run.encode(model, frozen=False)

    def tokens(name, index):
        return encode(run.splits[name].load(windows[name][index], frames=FRAMES))

    def estimate(name):
        both.eval()
        with torch.no_grad():
            return torch.cat([head(tokens(name, slice(i, i + batch)).float())
                              for i in range(0, len(windows[name]), batch)]).cpu()

    with torch.no_grad():
        dim = tokens('train', slice(0, 1)).shape[-1]
    torch.manual_seed(run.probe_seed)
    head = probe.AttentiveProbe(dim, targets['train'].shape[-1], mlp_ratio).to(device)
    both, epochs = torch.nn.ModuleList([model, head]), epochs_of(protocol)
    steps = epochs * math.ceil(len(windows['train']) / batch)
    optimizer, schedule = optimizer_of(model, head, paper, lr, steps)
    scaler = model.scaler()                                    # of a run in float16

    # epochs; the best on valid is kept
    order = torch.Generator().manual_seed(run.probe_seed)
    best, best_state = math.inf, None
    for _ in range(epochs):
        for index in torch.randperm(len(windows['train']), generator=order).split(batch):
            both.train()
            optimizer.zero_grad()

            truth = targets['train'][index].float().to(device)
            estimates = head(tokens('train', index.numpy()).float())
            scaler.scale((estimates - truth).pow(2).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            if not paper:
                schedule.step()

        on_valid = (estimate('valid') - targets['valid']).pow(2).mean().item()
        if paper:
            schedule.step(on_valid)
        if on_valid < best:
            best, best_state = on_valid, copy.deepcopy(both.state_dict())
        tick()

    if best_state is None:
        raise FloatingPointError('fine-tuning diverged: its error on valid is not a number; try a '
                                 'lower --finetune-lr')
    both.load_state_dict(best_state)
    return estimate(scored)

def optimizer_of(model, head, paper, lr, steps):
    """(optimizer, schedule) of a protocol; the paper's schedule steps once an epoch."""
    schedules = torch.optim.lr_scheduler
    if paper:
        optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=PAPER['lr'])
        return optimizer, schedules.ReduceLROnPlateau(optimizer, factor=0.5, patience=5)
    optimizer = torch.optim.AdamW([{'params': model.parameters(), 'lr': lr},
                                   {'params': head.parameters(), 'lr': 1e-3}], weight_decay=0.01)
    return optimizer, schedules.CosineAnnealingLR(optimizer, steps)
