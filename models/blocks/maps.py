"""What happens to a coarse map on its way to a score; shared by all detectors."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional


class GaussianBlur(nn.Module):
    """Blur maps with a truncated, normalised Gaussian; what lies outside the map counts as zero.

    Args:
        kernel_size: odd side of the kernel in pixels of the map.
        sigma: standard deviation in pixels of the map.
    """

    kernel: Tensor

    def __init__(self, kernel_size: int, sigma: float) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(f"the blur needs an odd kernel, not {kernel_size}")
        offsets = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
        weights = torch.exp(-(offsets**2) / (2 * sigma**2))
        kernel = torch.outer(weights, weights)
        kernel = (kernel / kernel.sum()).to(torch.float32)
        self.register_buffer("kernel", kernel[None, None], persistent=False)

    def forward(self, anomaly_map: Tensor) -> Tensor:
        """Blur `(B, h, w)` float32 maps, keeping their size."""
        return functional.conv2d(anomaly_map[:, None], self.kernel, padding="same")[:, 0]


def resize_map(anomaly_map: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Resize `(B, h, w)` maps bilinearly to `size`, height first."""
    if tuple(anomaly_map.shape[1:]) == tuple(size):
        return anomaly_map
    resized = functional.interpolate(anomaly_map[:, None], size=size, mode="bilinear", align_corners=align_corners)
    return resized[:, 0]


def top_fraction_mean(anomaly_map: Tensor, fraction: float) -> Tensor:
    """Score each image by the mean of its largest map values.

    Args:
        anomaly_map: `(B, h, w)` float32, larger = more anomalous.
        fraction: share of pixels to average, in (0, 1]; rounded down, at least one pixel is used.

    Returns:
        `(B,)` float32.

    Raises:
        ValueError: if `fraction` is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction must lie in (0, 1], not {fraction}")
    values = anomaly_map.flatten(1)
    count = max(1, math.floor(fraction * values.shape[1]))
    return values.topk(count, dim=1, sorted=False).values.mean(dim=1)


def map_deviation(anomaly_map: Tensor) -> Tensor:
    """Score each image by the standard deviation of its map `(B, h, w)`, over all pixels: `(B,)` float32.

    In two passes, because the mean square less the squared mean loses the digits of a nearly flat map. A constant that
    is added to a map changes nothing.
    """
    mean = anomaly_map.mean(dim=(1, 2), keepdim=True)
    return (anomaly_map - mean).square().mean(dim=(1, 2)).sqrt()


def reduce_map(anomaly_map: Tensor, how: Literal["deviation", "maximum"]) -> Tensor:
    """Score each image by its map `(B, h, w)`: the standard deviation, or the largest value; `(B,)` float32."""
    return anomaly_map.amax(dim=(1, 2)) if how == "maximum" else map_deviation(anomaly_map)


def require_image_size(images: Tensor, image_size: tuple[int, int]) -> None:
    """Refuse images that are not `(B, 3, H, W)` of the detector's size.

    Raises:
        ValueError: naming the size that was expected and the one that came.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, *image_size):
        raise ValueError(
            f"expected images of shape (B, 3, {image_size[0]}, {image_size[1]}), got {tuple(images.shape)}"
        )
