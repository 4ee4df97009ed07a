"""
Pretrain an encoder on windows of physical fields.

    python train.py --data NAME                                   # in one process, CPU or GPU
    torchrun train.py --data NAME --model NAME                    # torchrun, if you like
    torchrun --nproc_per_node=8 train.py --data NAME              # data parallel, one process per GPU
    python train.py --data NAME --model NAME --help               # the settings of this model on this data

With no dataset on disk, a small one is simulated first. Running the same command again resumes from the last
checkpoint, and a larger --steps extends a finished run. Presets: `nano` (a laptop, simulated data), `paper` (the
paper's sizes) and `smoke` (does it run at all?); config.py has the settings. Everything random in step s is drawn
from (seed, s), so a run that is killed and resumed, or split over ranks, sees the same windows, crops, loss chunks
and masks.
"""
import contextlib
import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path

from common import (FRAMES, RANK, WORLD, Progress, Timed, git_hash, on_gpu, peak_memory, prefetch, say, script, shared,
                    start_ranks, write_tensors, write_text)

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import model as models
from config import MAY_CHANGE, Config, describe, parse
from data import WINDOW, Split, find_dataset

LOADERS = {'cuda': 4, 'cpu': 1}                                          # threads that load batches ahead


# ---------------------------------------------------------------------------------------------
# batches

def window_order(n, seed, first, count):
    """Positions first..first+count of an endless shuffled pass over n windows, reshuffled every epoch."""
    position = np.arange(first, first + count)
    out = np.empty(count, int)
    for epoch in np.unique(position // n):
        here = position // n == epoch
        out[here] = np.random.default_rng([seed, 1, epoch]).permutation(n)[position[here] % n]
    return out


def learning_rate(step, steps, warmup, peak, low):
    """Linear warmup from `low`, then a cosine down to `low`."""
    if step < warmup:
        return low + (peak - low) * (step + 1) / warmup
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup)))


def load_batch(data, c, step, micro):
    """This rank's windows of a step's micro-batch, as in the files, and their labels: (local, C, 32, H, W), (local, L).

    The labels are z-scored.
    """
    local = c.micro_batch // WORLD
    first = micro * c.micro_batch + RANK * local                         # this rank's part of the step's windows
    chosen = window_order(len(data.windows), c.seed, step * c.batch, c.batch)[first:first + local]
    windows = data.windows[chosen]                                       # (local, 2): run, first frame
    views = [(windows, WINDOW)] if c.views == 'paired' else [(windows, FRAMES), (windows + (0, FRAMES), FRAMES)]
    if c.views == 'other-time':
        last = data.fields.shape[2] - FRAMES
        views[1] = np.array([(run, other_time(t, last, (c.seed, 4, step, first + i)))
                             for i, (run, t) in enumerate(windows)]), FRAMES
    out = data.room(local, WINDOW, c.crop, pin_memory=c.device == 'cuda')
    for v, ((where, frames), part) in enumerate(zip(views, out.split(views[0][1], dim=2))):
        seeds = [(c.seed, 2 + v, step, first + i) for i in range(local)]
        data.load(where, frames, c.crop, c.augment, seeds, out=part)
    data.release()
    return out, torch.tensor(data.standard_labels[windows[:, 0]])


def other_time(t, last, seed):
    """A first frame in 0..last whose 16 frames are none of those from t on."""
    free = [s for s in range(last + 1) if abs(s - t) >= FRAMES]
    return free[np.random.default_rng(seed).integers(len(free))]


# ---------------------------------------------------------------------------------------------
# the run

def open_data(c):
    """(folder, Split) of the training data.

    What is missing is simulated by the first rank, while the others wait, and cached by one rank of each node.
    """
    if RANK > 0:
        dist.barrier()
    root, system, _ = find_dataset(c.data, c.data_dir, build=RANK == 0, seed=c.seed)
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    data = Split(root, system, 'train', c.resolution, c.stride, c.cache_dir, whole=c.whole, cache=c.cache)
    if not data.varying():
        raise ValueError(f'no scalar varies over the training files of {root}: there is nothing to probe')
    if c.label_fraction < 1:
        data.windows = data.with_labels(data.windows, c.label_fraction, c.seed)
    return root, data


def initial_model(c, module, options, data, state):
    """The Model of a run: initialised from its seed, with the weights that --init names, or those of its checkpoint.

    state: the run's own checkpoint, if it has one. Raises ValueError if weights and model do not fit, or if the model
    cannot be probed.
    """
    path = models.checkpoint_of(c.init)
    start = state or (models.load_checkpoint(path) if c.init and models.is_checkpoint(path) else None)
    inputs = models.Inputs(c.data, data.channels, (False, False) if c.crop else data.periodic,
                           (c.crop, c.crop) if c.crop else data.size, c.views == 'paired',
                           start['inputs']['published'] if start else bool(c.init))
    mean, std = data.normalization(c.normalize)
    model = models.build_model(c.model, options, inputs, mean, std, c.seed, c.dtype,
                               len(data.varying()) if c.supervised else 0)
    if start:
        if start['inputs']['channels'] != data.channels:
            raise ValueError(f'{path} was trained on the channels {", ".join(start["inputs"]["channels"])}, not '
                             f'{", ".join(data.channels)}')
        models.restore(model, start, c.out if state else path)
    elif c.init:
        if not hasattr(module, 'load_published'):
            raise ValueError(f'{c.model} has no load_published: --init takes the folder of a run of it')
        module.load_published(models.unwrapped(model.network), c.init)
    model.to(c.device)
    models.check_model(model)
    return model


def own_checkpoint(path):
    """A run's checkpoint dict, or None: the first rank's, on all ranks."""
    return shared(models.load_checkpoint(path) if RANK == 0 and path.exists() else None)


def check_resumable(c, options, steps, state, checkpoint):
    """Raise ValueError if a checkpoint is of a run with other settings, or with more steps; say if it is extended."""
    own = asdict(c) | asdict(options)
    younger = asdict(Config()) | asdict(type(options)())                 # a setting may be younger than the run
    there = younger | state['config'] | state['options']
    differs = [k for k in own if k not in MAY_CHANGE and own[k] != there.get(k)]
    if differs:
        raise ValueError(f'{checkpoint} is a run with other settings ('
                         + ', '.join(f'{k}: {there.get(k)}, now {own[k]}' for k in differs) + '): choose another --out')
    if steps < state['steps']:
        raise ValueError(f'{checkpoint} is a run of {state["steps"]} steps, now {steps}: only more are possible')
    if steps > state['steps']:
        say(f'extended from {state["steps"]} steps to {steps}: from step {state["step"]} on the learning rate (and a '
            f"teacher's momentum) is that of the longer run")


def train_step(model, forward, optimizer, batches, c, step):
    """One step of the optimizer, on the next of the batches -> {term: its mean over this rank's part of the batch}.

    forward: the network, or DDP around it. The means are float64 scalars on the device, and nothing is read from there:
    Log.read does, steps later. One more term, `finite`, is 1 if all gradients were.
    """
    optimizer.zero_grad(set_to_none=True)
    sums, accumulate = {}, c.batch // c.micro_batch
    for micro in range(accumulate):
        x, labels = next(batches)
        x, labels = model.normalise(x), [labels.to(x)] if c.supervised else []           # (local, C, 32, H, W)
        common = (c.seed * 2**20 + step) * 1024 + micro
        generator = torch.Generator().manual_seed(common % 2**63)        # same on all ranks
        own = (common * 1024 + RANK) % 2**63
        torch.manual_seed(own)                                           # for networks with dropout and the like
        if c.noise > 0:
            noise = torch.Generator(x.device).manual_seed(own)
            x = x + c.noise * torch.randn(x.shape, generator=noise, device=x.device, dtype=x.dtype)
        last = micro == accumulate - 1
        with contextlib.nullcontext() if last or WORLD == 1 else forward.no_sync():
            with model.autocast():
                losses = forward(x[:, :, :FRAMES], x[:, :, FRAMES:], generator, *labels)
            if not isinstance(losses, dict) or 'loss' not in losses:
                raise ValueError("a network's forward(context, target, generator) returns a dict with 'loss' in it")
            (losses['loss'] / accumulate).backward()
        for name, value in losses.items():
            value = value if torch.is_tensor(value) else torch.full((), value, device=x.device)
            value = value.detach().double()
            sums[name] = sums.get(name, 0.0) + value / accumulate
    finite = [p.grad.isfinite().all() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    return sums | {'finite': torch.stack(finite).all().double()}


class Log:
    """A run's log.jsonl, a line for each step, and its progress bar.

    What a step gives is kept in `unread`, on the device; `read` gets it all from there at once. seconds: of training
    so far; loaded: the Timed iterator that the steps wait for. `waiting` is the share of their time that this takes the
    processor; a GPU has two batches in hand.
    """

    def __init__(self, c, step, steps, seconds, loaded):
        path = Path(c.out) / 'log.jsonl'
        self.batch, self.checkpoint, self.seconds, self.loaded = c.batch, Path(c.out) / 'ckpt.pt', seconds, loaded
        if RANK == 0 and path.exists():                                  # without steps that will be made again
            kept = [line for line in path.read_text().splitlines() if line.endswith('}')
                    and json.loads(line)['step'] < step]
            write_text(path, ''.join(line + '\n' for line in kept))
        self.file = open(path if RANK == 0 else os.devnull, 'a')
        self.bar = Progress(steps, 'training', 'step', initial=step, disable=RANK > 0, smoothing=0.05)
        self.wait_for_next()

    def wait_for_next(self):
        self.unread, self.started, self.waited = [], time.perf_counter(), self.loaded.seconds

    def read(self, embedding):
        """Write a line for each unread step, the last with the health of `embedding`.

        Raises FloatingPointError if a loss or a gradient was not finite.
        """
        values = torch.cat([torch.stack(list(terms.values())) for _, _, terms in self.unread])
        if WORLD > 1:
            dist.all_reduce(values)
        values, n = iter((values / WORLD).tolist()), len(self.unread)    # here one waits for the GPU
        took, waited = (time.perf_counter() - self.started) / n, (self.loaded.seconds - self.waited) / n
        for step, rate, terms in self.unread:
            read = {name: next(values) for name in terms}                # means over the global batch
            finite = read.pop('finite') == 1
            if not finite or not math.isfinite(read['loss']):
                kept = self.checkpoint if self.checkpoint.exists() else 'none yet'
                raise FloatingPointError(f'the loss is {read["loss"]} at step {step}, its gradient '
                                         f'{"" if finite else "not "}finite; the last good checkpoint is kept '
                                         f'({kept}): try a lower --lr')
            self.seconds += took
            last = RANK == 0 and step == self.unread[-1][0] and embedding is not None
            health = models.embedding_health(embedding) if last else {}
            self.file.write(json.dumps({
                'step': step, **read, **health, 'lr': rate, 'samples_per_s': self.batch / took,
                'seconds': self.seconds, 'waiting': waited / took, 'memory_gb': peak_memory()}) + '\n')
        self.file.flush()
        shown = read | ({'rank': health['embedding_rank']} if health else {})
        self.bar.set_postfix_str(', '.join(f'{k} {v:.3f}' for k, v in shown.items()), refresh=False)
        self.bar.update(n)

    def close(self):
        self.bar.close()
        self.file.close()


def optimizer_of(network, c):
    """AdamW with the paper's betas; all parameters decay, but those of which the network's own `undecayed` is true."""
    undecayed = getattr(network, 'undecayed', lambda name, parameter: False)
    groups = {}
    for name, parameter in network.named_parameters():
        groups.setdefault(0.0 if undecayed(name, parameter) else c.weight_decay, []).append(parameter)
    return torch.optim.AdamW([{'params': parameters, 'weight_decay': decay} for decay, parameters in groups.items()],
                             lr=c.lr, betas=(0.9, 0.95), fused=c.device == 'cuda')


def announce(c, root, data, model, options, steps, step):
    """Say what is about to happen."""
    labels = ', '.join(data.system.name_of(name) for name in data.varying())
    say(f'{c.data}: {len(data.runs)} training runs in {root}, {len(data.channels)} channels, labels {labels}')
    say(describe(c, options))
    network = models.unwrapped(model.network)
    encoder = getattr(network, 'encoder', network)
    in_encoder, in_all = (sum(p.numel() for p in m.parameters()) for m in (encoder, model))
    say(f'{c.model}, preset {c.preset} on {torch.cuda.get_device_name() if c.device == "cuda" else "CPU"}, '
        f'{c.dtype}; {in_encoder:,} parameters in the encoder, {in_all - in_encoder:,} beside it')
    windows, (h, w) = len(data.windows), model.inputs.size
    say(f'{windows} windows of {FRAMES} + {FRAMES} frames at {h} x {w}; a step takes {c.batch} of them = '
        f'{c.batch // c.micro_batch} accumulation(s) x {WORLD} rank(s) x {c.micro_batch // WORLD}; '
        f'{steps} steps = {steps * c.batch / windows:.2f} epochs')
    say(f'writing {c.out}/ckpt.pt and {c.out}/log.jsonl' + (f', resuming at step {step}' if step else ''))


def train(c, module, options):
    """The run: data, model, optimizer, then step after step to the end of its schedule."""
    start_ranks(c.device, 'nccl' if c.device == 'cuda' else 'gloo')
    root, data = open_data(c)
    windows = len(data.windows)
    steps = c.steps if c.steps >= 0 else math.ceil(c.epochs * windows / c.batch)
    warmup = min(steps, round(c.warmup_epochs * windows / c.batch))
    out = Path(c.out)
    checkpoint = out / 'ckpt.pt'
    state, step, seconds, git = own_checkpoint(checkpoint), 0, 0.0, git_hash()
    if state:
        check_resumable(c, options, steps, state, checkpoint)
    model = initial_model(c, module, options, data, state)
    optimizer = optimizer_of(model.network, c)
    if state:
        for group in state['optimizer']['param_groups']:
            group['fused'] = c.device == 'cuda'                          # it may have been saved on another device
        optimizer.load_state_dict(state['optimizer'])
        step, seconds = state['step'], state['seconds']
    out.mkdir(parents=True, exist_ok=True)
    announce(c, root, data, model, options, steps, step)
    if c.recompute:
        models.recompute_blocks(model.network)
    forward = model.network
    if WORLD > 1:
        forward = DistributedDataParallel(forward, find_unused_parameters=model.inputs.published or c.supervised)
    if c.compile:
        forward = torch.compile(forward)

    def save():
        labels = data.labels(data.varying())
        write_tensors(checkpoint, dict(
            model=model.network.state_dict(), optimizer=optimizer.state_dict(), step=step, steps=steps,
            seconds=seconds, samples=step * c.batch, config=asdict(c), options=asdict(options),
            inputs=asdict(model.inputs), mean=model.mean.flatten().tolist(), std=model.std.flatten().tolist(),
            labels=data.varying(), label_mean=labels.mean(0).tolist(), label_std=labels.std(0).tolist(),
            git=git))

    jobs = ((s, micro) for s in range(step, steps) for micro in range(c.batch // c.micro_batch))
    loaded = Timed(prefetch(lambda job: load_batch(data, c, *job), jobs, workers=LOADERS[c.device]))
    batches = on_gpu(loaded) if c.device == 'cuda' else loaded
    with contextlib.closing(Log(c, step, steps, seconds, loaded)) as log:
        while step < steps:
            rate = learning_rate(step, steps, warmup, c.lr, c.min_lr)
            for group in optimizer.param_groups:
                group['lr'] = rate
            log.unread.append((step, rate, train_step(model, forward, optimizer, batches, c, step)))
            if hasattr(model.network, 'after_step'):
                model.network.after_step((step + 1) / steps)
            step += 1
            saving = step % c.save_every == 0 or step == steps
            if saving or step % c.log_every == 0:
                log.read(model.embedding)
                seconds = log.seconds
                if saving and RANK == 0:                                 # what has been read, and so is finite
                    save()
                log.wait_for_next()
    if RANK == 0 and not checkpoint.exists():                            # no step was asked for
        save()
    say(f'{steps} steps in {seconds / 60:.1f} min, peak memory {peak_memory():.1f} GB. '
        f'Next: python eval.py {out}')
    if WORLD > 1:
        del forward                      # first, or its end may wait for gloo's thread, which waits for Python's lock
        dist.destroy_process_group()


@script
def main(argv=None):
    train(*parse(argv, __doc__))


if __name__ == '__main__':
    main()
