"""Tokens of a CNN pyramid: balanced, projected, and refused before they are measured."""

import pytest
import torch
from torch import Tensor

from models.blocks.backbone_tokens import PyramidTokens


def _layers(seed: int = 0, batch: int = 6) -> list[Tensor]:
    """Return two layers of unlike size and scale, in batches that differ."""
    generator = torch.Generator().manual_seed(seed)
    fine = 3 + 5 * torch.randn(batch, 6, 8, 8, generator=generator)
    coarse = 0.01 * torch.rand(batch, 10, 4, 4, generator=generator)
    return [fine, coarse]


def _measured(*, average: bool = False) -> PyramidTokens:
    tokens = PyramidTokens((6, 10), (8, 8), 4, average=average)
    for observe, finish in (
        (tokens.observe_scales, tokens.finish_scales),
        (tokens.observe_moments, tokens.finish_moments),
    ):
        for part in (slice(0, 4), slice(4, 6)):  # unequal batches
            observe([layer[part] for layer in _layers()])
        finish()
    return tokens


def test_pyramid_when_measured_then_each_layer_is_divided_by_its_deviation():
    """The scalars are the standard deviations over all frames, whatever the batches were."""
    tokens = _measured()

    on_grid = tokens._on_finest_grid(_layers())

    expected = torch.stack([layer.std(unbiased=False) for layer in on_grid])
    torch.testing.assert_close(tokens.layer_scales, expected)


def test_pyramid_when_measured_then_the_projection_is_the_uncentred_pca():
    """The kept directions are orthonormal, hold the most energy, and leave tokens of mean square one."""
    tokens = _measured()

    balanced = tokens._balance(tokens._on_finest_grid(_layers())).flatten(0, 1)
    _, _, right = torch.linalg.svd(balanced, full_matrices=False)
    projected = tokens(_layers())

    torch.testing.assert_close(tokens.projection.T @ tokens.projection, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close((right[:4] @ tokens.projection).abs(), torch.eye(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(projected.square().mean(), torch.tensor(1.0), rtol=1e-3, atol=0)
    assert projected.shape == (6, 1, 64, 4)


def test_pyramid_when_a_value_is_far_out_then_it_is_clipped():
    """One channel can't outshout all others: eight deviations are the most that counts."""
    tokens = _measured()
    layers = _layers()
    layers[0][:, 0] = 1e6

    balanced = tokens._balance(tokens._on_finest_grid(layers))

    assert balanced[..., :6].abs().max().item() == pytest.approx(8 / 6**0.5)


def test_pyramid_when_averaging_then_each_layer_is_smoothed_without_padding():
    """The 3 x 3 mean counts only what lies inside the map: a constant stays constant."""
    tokens = PyramidTokens((6, 10), (8, 8), 4, average=True)

    fine, coarse = tokens._on_finest_grid([torch.ones(1, 6, 8, 8), 2 * torch.ones(1, 10, 4, 4)])

    torch.testing.assert_close(fine, torch.ones(1, 64, 6))
    torch.testing.assert_close(coarse, 2 * torch.ones(1, 64, 10))


@pytest.mark.parametrize("finish", ["finish_scales", "finish_moments"])
def test_pyramid_when_finished_without_frames_then_refuses(finish):
    """An empty folder never leaves half-made statistics."""
    tokens = PyramidTokens((6, 10), (8, 8), 4, average=False)

    with pytest.raises(RuntimeError, match="no frames"):
        getattr(tokens, finish)()
