"""Initial values from a generator."""

import pytest
import torch
from torch import nn

from models.blocks.initial_values import draw_defaults


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(50, 40), nn.Conv2d(20, 30, 3, groups=5), nn.ConvTranspose2d(20, 30, 4)],
    ids=["linear", "grouped convolution", "transposed convolution"],
)
def test_defaults_have_the_bounds_of_pytorch(layer):
    """Weights and biases fill the range that PyTorch's own constructor draws from."""
    own = {name: float(value.detach().abs().max()) for name, value in layer.named_parameters()}

    draw_defaults(nn.Sequential(layer), torch.Generator().manual_seed(0))

    for name, value in layer.named_parameters():
        assert float(value.detach().abs().max()) == pytest.approx(own[name], rel=0.15), name


def test_defaults_when_the_generator_is_the_same_then_are_the_same():
    """Whatever was drawn before from torch's own generator changes nothing."""
    first, again = nn.Linear(3, 4), nn.Linear(3, 4)

    draw_defaults(first, torch.Generator().manual_seed(1))
    torch.rand(1)
    draw_defaults(again, torch.Generator().manual_seed(1))

    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
