"""Resizing and blurring a map in one step."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from models.blocks.smoothing import SmoothUpsampling, gaussian_matrix


@pytest.mark.parametrize("target", [(32, 48), (6, 10)], ids=["larger", "same"])
def test_smoothing_when_sigma_is_zero_then_is_the_bilinear_resize(target):
    """Without a blur what remains is PyTorch's resize with aligned corners, height before width."""
    maps = torch.rand(3, 6, 10, generator=torch.Generator().manual_seed(0))

    resized = SmoothUpsampling((6, 10), target, 0.0)(maps)

    expected = functional.interpolate(maps[:, None], size=target, mode="bilinear", align_corners=True)[:, 0]
    torch.testing.assert_close(resized, expected)


def test_smoothing_when_blurred_then_is_a_gaussian_of_four_deviations_on_a_mirrored_map():
    """The border value is repeated by the reflection and the kernel is cut at four sigma, as in scipy."""
    maps = torch.rand(1, 12, 20, generator=torch.Generator().manual_seed(0))
    offsets = np.arange(-8, 9)
    kernel = np.exp(-0.5 * (offsets / 2.0) ** 2)
    kernel /= kernel.sum()

    blurred = SmoothUpsampling((12, 20), (12, 20), 2.0)(maps)[0].numpy()

    padded = np.pad(maps[0].numpy(), 8, mode="symmetric")
    along_rows = np.stack([np.convolve(row, kernel, mode="valid") for row in padded])
    expected = np.stack([np.convolve(column, kernel, mode="valid") for column in along_rows.T]).T
    np.testing.assert_allclose(blurred, expected, rtol=0, atol=1e-6)


def test_gaussian_when_a_map_is_smaller_than_the_kernel_then_a_constant_stays():
    """However often the map has to be mirrored, weights sum to one."""
    matrix = gaussian_matrix(5, 4.0)

    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(5, dtype=torch.float64))


def test_smoothing_when_corners_are_not_aligned_then_cells_are_resized_and_the_margin_is_cut():
    """Values lie in the middle of their cells, and the blur still sees what is cut off afterwards."""
    maps = torch.rand(2, 6, 10, generator=torch.Generator().manual_seed(0))

    resized = SmoothUpsampling((6, 10), (24, 40), 0.0, align_corners=False, margin=4)(maps)
    blurred = SmoothUpsampling((6, 10), (24, 40), 1.0, align_corners=False, margin=4)(maps)

    expected = functional.interpolate(maps[:, None], size=(24, 40), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(resized, expected[:, 4:-4, 4:-4])
    torch.testing.assert_close(blurred, SmoothUpsampling((24, 40), (24, 40), 1.0)(expected)[:, 4:-4, 4:-4])
