"""Initial values from a generator."""

import pytest
import torch
from torch import nn

from models.blocks.initial_values import draw_defaults


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: nn.Linear(50, 40), id="linear"),
        pytest.param(lambda: nn.Conv2d(20, 30, 3, groups=5), id="grouped convolution"),
        pytest.param(lambda: nn.ConvTranspose2d(20, 30, 4), id="transposed convolution"),
    ],
)
def test_defaults_when_the_seed_is_pytorchs_then_are_pytorchs_own(make):
    """The layer's constructor draws the same numbers, in the same order."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = make()
    layer = make()

    draw_defaults(nn.Sequential(layer), torch.Generator().manual_seed(3))

    for (name, value), own in zip(layer.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, own), name


def test_defaults_when_the_generator_is_the_same_then_are_the_same():
    """Whatever was drawn before from torch's own generator changes nothing."""
    first, again = nn.Linear(3, 4), nn.Linear(3, 4)

    draw_defaults(first, torch.Generator().manual_seed(1))
    torch.rand(1)
    draw_defaults(again, torch.Generator().manual_seed(1))

    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
