"""
A reference for every table: a model's own encoder, trained as long with the labels that the probes will look for.

`train.py --supervised` puts this around a model's network. A linear layer reads the labels from the mean token;
context and target are two windows of the run, each with its labels, so that a step sees what a step of the model
itself sees. It says what this encoder can tell at this size of training; with few runs it learns those by heart.
"""
import torch
import torch.nn as nn


class Supervised(nn.Module):
    """A network of which only the encoder is trained.

    tokens: the function normalised fields (B, C, 16, H, W) -> the network's tokens (B, N, D); dim: D; labels: their
    number.
    """

    def __init__(self, network, tokens, dim, labels):
        super().__init__()
        self.network, self.features, self.head = network, tokens, nn.Linear(dim, labels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.embedding = None                                            # the last, for the log

    def undecayed(self, name, parameter):
        """As the network has it."""
        own = getattr(self.network, 'undecayed', lambda name, parameter: False)
        return own(name.removeprefix('network.'), parameter)

    def forward(self, context, target, generator, labels):
        """The mean squared error of the z-scored labels (B, L), and of each."""
        tokens = torch.cat([self.features(x) for x in (context, target)])                                # (2B, N, D)
        self.embedding = tokens.detach()
        errors = (self.head(tokens.mean(1)) - labels.repeat(2, 1)).square().mean(0)                      # (L,)
        return {'loss': errors.mean(), **{f'label {i}': e.detach() for i, e in enumerate(errors)}}
