"""Initial values that follow from a generator alone, whatever was drawn before."""

import torch
from torch import nn


def draw_defaults(module: nn.Module, generator: torch.Generator) -> None:
    """Draw linear and convolutional layers as PyTorch does by default: uniform within 1 / root of the fan-in.

    PyTorch takes the fan-in of a transposed convolution from the second axis of its weight, and so does this.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            bound = layer.weight[0].numel() ** -0.5
            for parameter in layer.parameters(recurse=False):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


def draw_xavier(module: nn.Module, generator: torch.Generator) -> None:
    """Draw linear and convolutional layers uniformly after Glorot, a kernel as the matrix that it is; biases are 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.data.flatten(1), generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
