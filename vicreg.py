"""
VICReg: a loss with which a joint embedding learns without collapse (Bardes, Ponce, LeCun 2022).

Two embeddings of the same thing, x (predicted) and y (actual), should agree: the invariance term.
Alone, it is solved by a constant. So every channel must keep a standard deviation of at least one
(the variance term), and no two channels may say the same (the covariance term):

    L = sim * mean (x - y)^2
      + std * [ v(x) + v(y) ],    v(z) = 1/2 mean_j relu(1 - sqrt(Var z_j + 1e-4))
      + cov * [ c(x) + c(y) ],    c(z) = 1/D sum_{i != j} Cov(z)_ij^2
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F

def variance_loss(z):
    """How far the channels of z (N, D) fall short of standard deviation 1. Divides by N."""
    std = torch.sqrt(z.var(dim=0, unbiased=False) + 1e-4)                # (D,)
    return F.relu(1 - std).mean() / 2

def covariance_loss(z):
    """Sum of squared off-diagonal covariances of z (N, D), over D. Covariance divides by N - 1."""
    N, D = z.shape
    z = z - z.mean(dim=0)
    cov = z.T @ z / (N - 1)                                              # (D, D)
    return (cov.pow(2).sum() - cov.diagonal().pow(2).sum()) / D

def vicreg_loss(x, y, sim_coeff=2.0, std_coeff=40.0, cov_coeff=2.0):
    """VICReg of rows x, y (N, D) -> {'loss', 'sim', 'std', 'cov'}. Defaults: arXiv 2603.13227."""
    sim = F.mse_loss(x, y)
    std = variance_loss(x) + variance_loss(y)
    cov = covariance_loss(x) + covariance_loss(y)
    loss = sim_coeff * sim + std_coeff * std + cov_coeff * cov
    return {'loss': loss, 'sim': sim, 'std': std, 'cov': cov}

def vicreg_loss_maps(x, y, sim_coeff=2.0, std_coeff=40.0, cov_coeff=2.0, chunks=5, generator=None):
    """VICReg of embedding maps x, y (B, D, H, W), as in the physics paper; terms of `vicreg_loss`.

    Every position of every sample is one row (under DDP `gather` x and y first). `generator`
    shuffles the rows; None keeps their order. The loss is the mean over `chunks` of them.
    """
    x, y = (in_full(z).movedim(1, -1).flatten(0, 2) for z in (x, y))     # (B*H*W, D)
    if generator is not None:
        order = torch.randperm(len(x), generator=generator).to(x.device)
        x, y = x[order], y[order]

    # the loss of each chunk, then the mean of each term
    losses = [vicreg_loss(a, b, sim_coeff, std_coeff, cov_coeff)
              for a, b in zip(x.chunk(chunks), y.chunk(chunks))]
    return {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}

class Gather(torch.autograd.Function):
    """The batches (B, ...) of every rank, in rank order: (world * B, ...).

    Every rank computes the loss of the global batch. DDP takes the mean of gradients over ranks.
    Parameters before this function need the sum: hence the factor `world`. Those after it do not.
    """
    @staticmethod
    def forward(ctx, z):
        batches = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(batches, z)
        return torch.cat(batches)

    @staticmethod
    def backward(ctx, grad):
        world, rank = dist.get_world_size(), dist.get_rank()
        return grad.chunk(world)[rank] * world

def gather(z):
    """z (B, ...) of all ranks, with correct gradients under DDP; z itself in a single process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        return Gather.apply(z.contiguous())
    return z

def standardize(z):
    """z (B, D, ...) with every channel at mean 0 and standard deviation 1 over all else."""
    return F.batch_norm(z, None, None, training=True)

def in_full(z):
    """z in float32, if autocast has made less of it."""
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
