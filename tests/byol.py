"""A model that is one file: what test_house.py drops beside the others. BYOL (Grill et al. 2020), in small."""
import copy
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Options:
    width: int = 16
    momentum: float = 0.9


def build(options, inputs):
    return BYOL(len(inputs.channels), options.width, options.momentum)


class BYOL(nn.Module):
    def __init__(self, channels, width, momentum):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(channels, width, (16, 4, 4), (16, 4, 4)), nn.GELU(),
                                     nn.Conv3d(width, width, (1, 2, 2), (1, 2, 2)))
        self.predictor = nn.Conv3d(width, width, 1)
        self.teacher, self.momentum = copy.deepcopy(self.encoder).requires_grad_(False), momentum

    def forward(self, context, target, generator):
        z = self.encoder(context)                                        # (B, D, 1, h, w)
        self.embedding = z.detach()
        p, z_next = self.predictor(z), self.teacher(target)
        return {'loss': 2 - 2 * F.cosine_similarity(p, z_next, dim=1).mean()}

    @torch.no_grad()
    def after_step(self, progress):
        for slow, fast in zip(self.teacher.parameters(), self.encoder.parameters()):
            slow.lerp_(fast, 1 - self.momentum)
