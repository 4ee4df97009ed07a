"""
What does a frozen embedding know? Three probes read labels from it, from strongest to simplest.

    attentive    one learned query attends the tokens, then a linear layer: the paper's probe
    linear       ridge regression on the mean token
    knn          the mean label of the nearest mean tokens

Each takes {'train' | 'valid' | 'test': (tokens (n, N, D), z-scored labels (n, L))}. It fits on
train, chooses what is not given on valid (the best epoch, the ridge's strength, k), and estimates
the labels of `scored`. `room_for` puts many tokens in a file: probes read PART of them at a time.
"""
import copy
import math
import tempfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

IN_MEMORY = 2**30           # bytes of a split's tokens as float32; more go to a file, as float16
KS, METRICS = (1, 2, 5, 10, 20, 50, 100), ('euclidean', 'cosine')         # of knn, to choose from
BATCH = 64                  # windows in a step of the attentive probe
PART = 2**28                # bytes of float32 tokens that are worked on at once
DISTANCES = 2**26           # bytes of distances that knn holds at once
# as in the paper's code, which shows the error on valid of every epoch; we take the last
PAPER = dict(batch=256, warmup_epochs=0, keep_best=False)

def kept_as(n, N, D):
    """The dtype of a split's tokens (n, N, D) where they are kept."""
    return torch.float32 if 4 * n * N * D <= IN_MEMORY else torch.float16

def room_for(n, N, D, folder):
    """An empty tensor (n, N, D): float32 in memory, or float16 in a file that goes with it."""
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
    """tokens (B, N, D) -> label estimates (B, L): Bardes et al.'s attentive pooler of depth one."""
    def __init__(self, dim, labels, mlp_ratio=0.0, heads=8, dropout=0.0):
        super().__init__()
        # 0: the paper's ratio, with which probes of width 128 and 384 have about one size
        hidden = int(dim * (mlp_ratio or (12.0 if dim <= 128 else 0.25)))
        self.heads, self.drop = heads, nn.Dropout(dropout)
        # a learned query attends the normed tokens; as in the paper, no projection follows
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.linear = nn.Linear(dim, labels)

        # the official initial weights
        nn.init.trunc_normal_(self.query, std=0.02)
        for layer in self.q, self.kv, self.fc1, self.fc2:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.fc2.weight.data.div_(math.sqrt(2))

    def pool(self, tokens):
        """(B, N, D) -> (B, D). With one query, keys and values of all tokens need not exist."""
        B, N, D = tokens.shape
        size = D // self.heads
        key, value = self.kv.weight.view(2, self.heads, size, D)         # (heads, size, D) each
        value_bias = self.kv.bias[D:].view(self.heads, size, 1)
        query = self.q(self.query).view(self.heads, size, 1)

        # q.(W x + b) is (W^T q).x + constant; the mean of W x + b is W (mean of x) + b
        x = self.norm1(tokens)
        logits = x @ (key * query).sum(1).T * size**-0.5                 # (B, N, heads)
        mean = logits.softmax(1).transpose(1, 2) @ x                     # (B, heads, D)
        attended = value @ mean[..., None] + value_bias                  # (B, heads, size, 1)
        x = self.query[:, 0] + self.drop(attended.reshape(B, D))
        return x + self.drop(self.fc2(self.drop(F.gelu(self.fc1(self.norm2(x))))))

    def forward(self, tokens):
        return self.linear(self.drop(self.pool(tokens)))

def attentive(splits, mlp_ratio=0.0, epochs=100, batch=BATCH, lr=1e-3,
              weight_decay=0.01, warmup_epochs=2, dropout=0.0, keep_best=True,
              scored='test', seed=0, device='cpu', tick=lambda: None):
    """(estimates (n, L) of an AttentiveProbe, its parameters' number). `tick`: after each epoch."""
    # small tokens are on the device all the time
    small = sum(4 * x.numel() for x, _ in splits.values()) <= 3 * IN_MEMORY
    splits = {name: (x.to(device) if small else x, y.float().to(device))
              for name, (x, y) in splits.items()}
    tokens, labels = splits['train']

    # the probe and its optimizer: linear warmup, then a cosine to zero
    torch.manual_seed(seed)
    probe = AttentiveProbe(tokens.shape[-1], labels.shape[-1], mlp_ratio, 8, dropout).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay)
    per_epoch = math.ceil(len(tokens) / batch)
    warmup, total = warmup_epochs * per_epoch, epochs * per_epoch

    def rate(step):
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    def estimate(name):
        probe.eval()
        with torch.no_grad():
            return torch.cat([probe(x.to(device).float()) for x in parts(splits[name][0])])

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed)
    best, best_state = math.inf, None
    for _ in range(epochs):
        # one epoch
        probe.train()
        for index in torch.randperm(len(tokens), generator=generator).split(batch):
            x, y = tokens[index.to(tokens.device)].to(device).float(), labels[index.to(device)]
            optimizer.zero_grad()
            F.mse_loss(probe(x), y).backward()
            optimizer.step()
            schedule.step()
        # keep the best weights, or the last
        error = (estimate('valid') - splits['valid'][1]).pow(2).mean().item()
        if error < best or not keep_best and math.isfinite(error):
            best, best_state = error, copy.deepcopy(probe.state_dict())
        tick()
    if best_state is None:
        raise FloatingPointError('the attentive probe diverged: its error on valid is no number')
    probe.load_state_dict(best_state)
    return estimate(scored).cpu(), sum(p.numel() for p in probe.parameters())

def standardize(splits):
    """Mean over tokens, then z-scored: {name: (features (n, D) float64, labels)}. By train, or by
    'unlabelled', training windows whose labels a probe does not know: it may see their tokens."""
    features = {name: mean_tokens(x) for name, (x, _) in splits.items()}
    seen = features['unlabelled' if 'unlabelled' in features else 'train']
    mean, std = seen.mean(0), seen.std(0) + 1e-9
    return {name: ((x - mean) / std, splits[name][1].double()) for name, x in features.items()}

def linear(splits, strengths=tuple(10.0**p for p in range(-8, 5)), scored='test', ridge=0.0):
    """(estimates (n, L) of ridge regression, {'ridge': its strength}), the best on valid or given.

    min |X W + b - Y|^2 + ridge |W|^2, sums over training rows: scikit-learn's Ridge(alpha=ridge).
    strengths: of the penalty per row, to choose from.
    """
    splits = standardize(splits)
    # the weights for each strength; b is the mean label, as centred features have mean zero
    x, y = splits['train']
    centre, b = x.mean(0), y.mean(0)
    gram, moment = (x - centre).T @ (x - centre) / len(x), (x - centre).T @ y / len(x)
    eye = torch.eye(len(gram), dtype=gram.dtype)
    weights = {r: torch.linalg.solve(gram + r / len(x) * eye, moment)
               for r in ([ridge] if ridge else [s * len(x) for s in strengths])}
    # the best on valid
    x, y = splits['valid']
    best = min(weights, key=lambda r: ((x - centre) @ weights[r] + b - y).pow(2).mean())
    return (splits[scored][0] - centre) @ weights[best] + b, {'ridge': best}

def knn(splits, ks=KS, scored='test', metrics=METRICS[:1]):
    """(mean labels (n, L) of the k training windows with the nearest mean tokens, {'k', 'metric'}).
    Chosen on valid: k, and the metric if there are several of METRICS; all of z-scored features."""
    splits = standardize(splits)
    y = splits['train'][1]

    def estimate(name, metric, ks):
        z, x = splits[name][0], splits['train'][0]
        if metric == 'cosine':                                 # unit vectors: near is a small angle
            z, x = F.normalize(z), F.normalize(x)
        most, rows = min(max(ks), len(x)), max(1, DISTANCES // (8 * len(x)))
        nearest = torch.cat([torch.cdist(part, x).topk(most, largest=False).indices
                             for part in z.split(rows)])                 # (n, most)
        return [y[nearest[:, :k]].mean(1) for k in ks]

    errors = {(k, metric): (e - splits['valid'][1]).pow(2).mean()
              for metric in metrics for k, e in zip(ks, estimate('valid', metric, ks))}
    k, metric = min(errors, key=errors.get)
    return estimate(scored, metric, [k])[0], {'k': k, 'metric': metric}
