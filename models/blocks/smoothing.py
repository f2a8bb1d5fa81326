"""A coarse map, resized and blurred in one step."""

import math

import torch
from torch import Tensor, nn

_RADIUS_SIGMAS = 4.0  # the reach of scipy's Gaussian filter, which the reference codes smooth with


class SmoothUpsampling(nn.Module):
    """Resize maps bilinearly, blur them with a Gaussian that reflects at the border, then cut a margin off.

    All steps are linear along each axis, so one matrix an axis does them. The border pixel is repeated by the
    reflection, as scipy's mode "reflect" does and PyTorch's does not.

    Args:
        source: `(height, width)` of the maps that come.
        target: `(height, width)` that they are resized to.
        sigma: standard deviation in pixels of the target; 0 for no blur.
        align_corners: whether the outermost values lie on the outermost pixels' centres or on their cells'.
        margin: pixels of the target that are cut off on each side in the end.
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        source: tuple[int, int],
        target: tuple[int, int],
        sigma: float,
        *,
        align_corners: bool = True,
        margin: int = 0,
    ) -> None:
        super().__init__()
        for name, old, new in zip(("rows", "columns"), source, target, strict=True):
            matrix = gaussian_matrix(new, sigma) @ bilinear_matrix(old, new, align_corners=align_corners)
            matrix = matrix[margin : new - margin]
            self.register_buffer(name, matrix.to(torch.float32), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Bring `(B, h, w)` to `(B, H, W)` of the target size less the margin."""
        return self.rows @ maps @ self.columns.T


def bilinear_matrix(old: int, new: int, *, align_corners: bool = True) -> Tensor:
    """Return what resizes a row of `old` values bilinearly to `new`: `(new, old)` float64."""
    if align_corners:
        places = torch.linspace(0, old - 1, new, dtype=torch.float64)
    else:
        places = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5).clamp(0, old - 1)
    return (1 - (places[:, None] - torch.arange(old)).abs()).clamp_min(0)


def gaussian_matrix(size: int, sigma: float) -> Tensor:
    """Return what blurs a row of `size` values, reflected behind its last value: `(size, size)` float64."""
    radius = math.floor(_RADIUS_SIGMAS * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / max(sigma, 1e-6)) ** 2)
    places = (torch.arange(size)[:, None] + offsets) % (2 * size)
    places = torch.where(places < size, places, 2 * size - 1 - places)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, places, (weights / weights.sum()).expand(size, -1))
