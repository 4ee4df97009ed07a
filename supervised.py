"""
The ceiling: a model's own encoder, trained with the labels that the probes will look for (train.py --supervised).

What this cannot read off a window, no way of training the same encoder without labels should be expected to. A linear
layer reads the labels from the mean token; context and target are two windows of the run, each with its labels, so
that a step sees what a step of the model itself sees.
"""
import torch
import torch.nn as nn

import model as models


class Supervised(nn.Module):
    """A network of which only the encoder is trained. dim: width of its tokens; labels: their number."""

    def __init__(self, network, dim, labels):
        super().__init__()
        self.network, self.head = network, nn.Linear(dim, labels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.embedding = None                                            # the last, for the log
        self.undecayed = getattr(network, 'undecayed', lambda name, parameter: False)

    def features(self, x):
        """Normalised fields (B, C, 16, H, W) -> tokens (B, N, D)."""
        return models.tokens_of(self.network, x)

    def forward(self, context, target, generator, labels):
        """The mean squared error of the z-scored labels (B, L), and of each."""
        tokens = torch.cat([self.features(x) for x in (context, target)])                                # (2B, N, D)
        self.embedding = tokens.detach()
        errors = (self.head(tokens.mean(1)) - labels.repeat(2, 1)).square().mean(0)                      # (L,)
        return {'loss': errors.mean(), **{f'label {i}': e.detach() for i, e in enumerate(errors)}}
