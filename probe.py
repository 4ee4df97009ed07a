"""
What does a frozen embedding know? Three probes read labels from it, from strongest to simplest.

    attentive    one learned query attends the tokens, then a linear layer: the paper's probe
    linear       ridge regression on the mean token
    knn          the mean label of the nearest mean tokens

Each takes {'train' | 'valid' | 'test': (tokens (n, N, D), labels (n, L))}, labels z-scored by the
training split, fits on train, chooses its one setting on valid (the best epoch, the ridge strength,
k), and returns its estimates of the labels of the `scored` split, (n, L). The mean squared error of
predicting the mean is 1. Tokens may be more than memory holds: `room_for` puts them in a file, and
no probe reads more than PART of them at a time.
"""
import copy
import math
import tempfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

IN_MEMORY = 2**30           # bytes of a split's tokens, as float32; what is more goes to a file, as float16
BATCH = 64                  # windows in a step of the attentive probe
PART = 2**28                # bytes of float32 tokens that are worked on at once
# The paper's code: steps of 256 windows, a cosine without warmup, the error on valid of every epoch. We take the last.
PAPER = dict(batch=256, warmup_epochs=0, keep_best=False)


def kept_as(n, N, D):
    """The dtype of a split's tokens (n, N, D) where they are kept."""
    return torch.float32 if 4 * n * N * D <= IN_MEMORY else torch.float16


def room_for(n, N, D, folder):
    """An empty tensor (n, N, D): float32 in memory, or float16 in a file that is gone when the tensor is."""
    if kept_as(n, N, D) == torch.float32:
        return torch.empty(n, N, D)
    with tempfile.TemporaryFile(dir=folder) as file:
        return torch.from_numpy(np.memmap(file, np.float16, 'w+', shape=(n, N, D)))


def parts(tokens):
    """Consecutive tokens of (n, N, D), as many as PART holds."""
    return tokens.split(max(1, PART // (4 * tokens.shape[1] * tokens.shape[2])))


def mean_tokens(tokens):
    """(n, N, D) -> (n, D) float64."""
    return torch.cat([part.mean(1, dtype=torch.float64) for part in parts(tokens)])


class AttentiveProbe(nn.Module):
    """tokens (B, N, D) -> label estimates (B, L). Bardes et al.'s attentive pooler of depth one, as the paper uses it.

    A learned query cross-attends the layer-normed tokens (no projection after the attention, the query
    itself is not normalised), then an MLP and a linear layer. The MLP's ratio sets the probe's size: the
    paper takes 12 at width 128 and 0.25 at width 384, so that probes of different encoders match; 0: so here.
    Dropout is on what the attention gives, inside and after the MLP, and before the linear layer.
    """

    def __init__(self, dim, labels, mlp_ratio=0.0, heads=8, dropout=0.0):
        super().__init__()
        mlp_ratio = mlp_ratio or (12.0 if dim <= 128 else 0.25)
        self.heads, self.drop = heads, nn.Dropout(dropout)
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)
        self.linear = nn.Linear(dim, labels)
        nn.init.trunc_normal_(self.query, std=0.02)
        for layer in self.q, self.kv, self.fc1, self.fc2:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.fc2.weight.data.div_(math.sqrt(2))

    def pool(self, tokens):
        """(B, N, D) -> (B, D).

        There is one query only, so keys and values of all tokens need not exist: q.(W x + b) is (W^T q).x plus a
        constant that the softmax ignores, and the mean of W x + b is W applied to the mean of x.
        """
        B, N, D = tokens.shape
        per_head = lambda w: w.view(self.heads, D // self.heads, -1)     # (heads, D/heads, D or 1)
        (key, value), value_bias = map(per_head, self.kv.weight.chunk(2)), per_head(self.kv.bias[D:])
        query = per_head(self.q(self.query).view(D, 1))                  # (heads, D/heads, 1)
        x = self.norm1(tokens)
        logits = x @ (key * query).sum(1).T * (D // self.heads)**-0.5    # (B, N, heads)
        mean = logits.softmax(1).transpose(1, 2) @ x                     # (B, heads, D): what each head attends to
        attended = value @ mean[..., None] + value_bias                  # (B, heads, D/heads, 1)
        x = self.query[:, 0] + self.drop(attended.reshape(B, D))
        return x + self.drop(self.fc2(self.drop(F.gelu(self.fc1(self.norm2(x))))))

    def forward(self, tokens):
        return self.linear(self.drop(self.pool(tokens)))


def attentive(splits, mlp_ratio=0.0, epochs=100, batch=BATCH, lr=1e-3, weight_decay=0.01, warmup_epochs=2, dropout=0.0,
              keep_best=True, scored='test', seed=0, device='cpu', tick=lambda: None):
    """(estimates (n, L) of an AttentiveProbe, its number of parameters).

    AdamW, linear warmup then cosine to zero; after the epoch that was best on valid, or the last if not `keep_best`.
    `tick` is called after every epoch.
    """
    small = sum(4 * x.numel() for x, _ in splits.values()) <= 3 * IN_MEMORY
    splits = {name: (x.to(device) if small else x, y.float().to(device)) for name, (x, y) in splits.items()}
    tokens, labels = splits['train']
    torch.manual_seed(seed)
    probe = AttentiveProbe(tokens.shape[-1], labels.shape[-1], mlp_ratio, dropout=dropout).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay)
    per_epoch = math.ceil(len(tokens) / batch)
    warmup, total = warmup_epochs * per_epoch, epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: (s + 1) / warmup if s < warmup else
                                                 0.5 * (1 + math.cos(math.pi * (s - warmup) / max(1, total - warmup))))

    def estimates(name):
        with torch.no_grad():
            return torch.cat([probe.eval()(x.to(device).float()) for x in parts(splits[name][0])])

    generator = torch.Generator().manual_seed(seed)
    best, best_state = math.inf, None
    for _ in range(epochs):
        probe.train()
        for index in torch.randperm(len(tokens), generator=generator).split(batch):
            optimizer.zero_grad()
            x, y = tokens[index.to(tokens.device)].to(device).float(), labels[index.to(device)]
            F.mse_loss(probe(x), y).backward()
            optimizer.step()
            schedule.step()
        now = (estimates('valid') - splits['valid'][1]).pow(2).mean().item()
        if now < best or not keep_best and math.isfinite(now):
            best, best_state = now, copy.deepcopy(probe.state_dict())
        tick()
    if best_state is None:
        raise FloatingPointError('the attentive probe diverged: its error on valid is not a number')
    probe.load_state_dict(best_state)
    return estimates(scored).cpu(), sum(p.numel() for p in probe.parameters())


def standardize(splits):
    """Mean over tokens, then z-scored by train: {name: (features (n, D) float64, labels)}."""
    features = {name: mean_tokens(x) for name, (x, _) in splits.items()}
    mean, std = features['train'].mean(0), features['train'].std(0) + 1e-9
    return {name: ((x - mean) / std, splits[name][1].double()) for name, x in features.items()}


def linear(splits, strengths=tuple(10.0**p for p in range(-8, 5)), scored='test'):
    """Estimates (n, L) of ridge regression on the mean token; per-row strength of the penalty chosen on valid."""
    splits = {name: (F.pad(x, (0, 1), value=1.0), y) for name, (x, y) in standardize(splits).items()}    # last: bias
    x, y = splits['train']
    gram, moment = x.T @ x / len(x), x.T @ y / len(x)
    eye = torch.eye(gram.shape[0], dtype=gram.dtype)
    weights = [torch.linalg.solve(gram + s * eye, moment) for s in strengths]
    best = min(weights, key=lambda w: (splits['valid'][0] @ w - splits['valid'][1]).pow(2).mean())
    return splits[scored][0] @ best


def knn(splits, ks=(1, 2, 5, 10, 20, 50, 100), scored='test'):
    """Mean labels (n, L) of the k nearest training windows, Euclidean in z-scored mean tokens; k by valid."""
    splits = standardize(splits)
    x, y = splits['train']

    def estimates(name, ks):
        nearest = torch.cdist(splits[name][0], x).topk(min(max(ks), len(x)), largest=False).indices      # (n, k)
        return [y[nearest[:, :k]].mean(1) for k in ks]

    on_valid = [(e - splits['valid'][1]).pow(2).mean() for e in estimates('valid', ks)]
    return estimates(scored, [ks[min(range(len(ks)), key=on_valid.__getitem__)]])[0]
