"""Smoothing, resizing and scoring of coarse maps."""

import pytest
import torch

from models.blocks.maps import GaussianBlur, map_deviation, require_image_size, resize_map, top_fraction_mean


def test_blur_when_given_one_bright_pixel_then_shows_the_normalised_kernel():
    """The answer to a point is the Gaussian itself: sums to one, symmetric, with the ratio that sigma says."""
    point = torch.zeros(1, 9, 9)
    point[0, 4, 4] = 1

    blurred = GaussianBlur(5, 4.0)(point)

    torch.testing.assert_close(blurred.sum(), torch.tensor(1.0))
    torch.testing.assert_close(blurred, blurred.transpose(1, 2))
    ratio = blurred[0, 4, 5] / blurred[0, 4, 4]
    torch.testing.assert_close(ratio, torch.exp(torch.tensor(-1 / 32)))


def test_blur_when_at_the_border_then_counts_outside_as_zero():
    """Corners of a constant map get the kernel's share that lies inside, as in the published evaluation."""
    constant = torch.ones(1, 7, 9)

    blurred = GaussianBlur(5, 4.0)(constant)

    assert blurred.shape == constant.shape
    torch.testing.assert_close(blurred[0, 3, 4], torch.tensor(1.0))
    assert blurred[0, 0, 0] < 0.5


def test_blur_when_the_kernel_is_even_then_refuses():
    """An even kernel would shift the map by half a pixel."""
    with pytest.raises(ValueError, match="odd"):
        GaussianBlur(4, 1.0)


def test_resize_map_when_sizes_differ_then_height_comes_first():
    """A `(B, h, w)` map becomes `(B, height, width)`; corners stay where they are with align_corners."""
    coarse = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])

    fine = resize_map(coarse, (3, 5), align_corners=True)

    assert fine.shape == (1, 3, 5)
    torch.testing.assert_close(fine[0, 1], torch.tensor([1.0, 1.25, 1.5, 1.75, 2.0]))


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(1.0, 4.5), (0.2, 8.5), (0.29, 8.5), (0.01, 9.0)],
    ids=["all", "two", "rounds down", "at least one"],
)
def test_top_fraction_mean_averages_the_largest_values(fraction, expected):
    """Of ten values 0 to 9 the largest share is averaged, rounded down but never empty."""
    anomaly_map = torch.arange(10.0)[torch.randperm(10)].reshape(1, 2, 5)

    score = top_fraction_mean(anomaly_map, fraction)

    torch.testing.assert_close(score, torch.tensor([expected]))


def test_top_fraction_mean_when_published_size_then_uses_655_of_65536_pixels():
    """One percent of a 256 x 256 map is 655 values, as in the reference code."""
    values = torch.zeros(1, 256, 256)
    values.view(-1)[:655] = 1.0

    assert top_fraction_mean(values, 0.01).item() == pytest.approx(1.0)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1])
def test_top_fraction_mean_when_fraction_is_impossible_then_refuses(fraction):
    """Nothing and more than everything can't be averaged."""
    with pytest.raises(ValueError, match="fraction"):
        top_fraction_mean(torch.zeros(1, 2, 2), fraction)


def test_deviation_when_a_constant_is_added_then_the_score_stays():
    """The score is the deviation over all pixels, whatever level the map lies at."""
    maps = torch.rand(3, 7, 9, generator=torch.Generator().manual_seed(0))

    score = map_deviation(maps)

    torch.testing.assert_close(score, maps.flatten(1).std(dim=1, correction=0))
    torch.testing.assert_close(map_deviation(maps + 10), score, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(3, 8, 6), (1, 1, 8, 6), (1, 3, 6, 8)], ids=["no batch", "grey", "transposed"])
def test_require_image_size_when_the_shape_differs_then_names_both(shape):
    """The sentence holds the expected size and the shape that came."""
    with pytest.raises(ValueError, match=r"\(B, 3, 8, 6\).*got"):
        require_image_size(torch.zeros(shape), (8, 6))
