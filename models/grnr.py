"""GRNR: rebuild each patch from its neighbours, pulled toward what is most usual in the same image; the rest is odd.

Every feature of one image is a linear combination of its eight neighbours, chosen to lie near the feature itself and,
much nearer, to the image's most typical features. A defect is neither typical nor rebuilt from its surroundings. There
is no training set, no training and no memory: an image is its own reference, so only textures can be judged, surfaces
that fill the frame. An object's outline would be its own defect.

Paper: Yao, Luo, Cao, Zhang, Yu, Shen, "Global-Regularized Neighborhood Regression for Efficient Zero-Shot Texture
Anomaly Detection", 2024, arXiv:2406.07333.
Reference code: hmyao22/GRNR, a demo without a licence. Nothing of it is copied.

Deviations, each with its reason:
* the demo's self filter averages rows that hold an infinite diagonal, so its choice is the map's first row; here a
  position's distance to itself is left out, as the paper says;
* the choice of typical features ends in a slope of some ranks (`support_slope`) instead of after rank N: two features
  whose distances agree to the last float32 digits would otherwise change places between runtimes; 0 is the published
  step;
* a ridge keeps a border's repeated neighbours solvable, where the demo adds noise that nobody seeded;
* only the mean of the typical features enters: with T of `_project` that is the same solution, without a tensor of
  positions x N x channels;
* the eight neighbours are turned by an orthogonal matrix first, into their mean and seven differences: the solution
  is the same, and float32 keeps the digits of differences that a large common part would drown;
* the image is reflected outwards by the margin that is cut off the map later, so that all of the part is judged, and by
  `context` more, which only the backbone sees: the zeros that its convolutions pad with reach seven cells inwards, far
  more than the margin, and would make every good texture's rim the oddest place of its map. With `border_mode="crop"`
  there is no such context and the margin is the image's own, as in the demo, and the map's rim holds the map's least
  value instead of being cut off, because maps are laid over whole frames;
* frames are resized by the one filter that training and service share, bilinear with antialiasing, instead of Lanczos;
* thresholds from good parts are this project's, with a stated bound, not the 99.5th percentile.
The demo shows no image score: it is the map's largest value. How many times the map's middle that is, which would tell
textures of different restlessness apart, is told by the frame's own units where frames are measured by themselves.

Symbols: E = `features` (B, C, H, W), as rows (B, n, C) · Q = a row of E · S_G = the typical rows, mu = their mean
(B, C) · S_L = `neighbours` (B, n, 8, C) · N = `support` · lambda = `regularisation` · eps = `ridge`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import CnnBackbone
from models.blocks.maps import require_image_size
from models.blocks.smoothing import SmoothUpsampling
from models.detector import AnomalyOutput, Stage

_TINY = 1e-12  # keeps a constant image finite
_NEIGHBOURS = 8


@dataclass(frozen=True)
class GrnrConfig:
    """Defaults are those of the demo (hmyao22/GRNR), the only place where the paper's values can be read.

    Attributes:
        backbone: timm's name of a CNN; WideResNet-50-2.
        layers: indices of the two tapped stages, strides 8 and 16 (layer2 and layer3).
        image_size: `(height, width)` of the images; the demo's canvas of 320 less the margin.
        margin: pixels of the canvas on each side whose map is not used (32).
        border_mode: `reflect_pad` adds the margin to the image; `crop` takes it from the image, as the demo does.
        context: pixels that `reflect_pad` adds beyond the margin for the backbone alone, a multiple of its coarsest
            stride; not in the demo. With the margin, as far as the backbone's padding reaches.
        support: N, how many typical features are averaged, at each scale (40).
        support_slope: half the width of the slope at which the choice of typical features ends, in ranks and as a
            fraction of N; 0 ends it sharply.
        regularisation: lambda, the pull toward the typical features (5); 0 for none.
        ridge: eps, as a fraction of the neighbours' mean squared length.
        pool: side of the mean that smooths features (3).
        cut: cells round each scale's grid that hold no answer (3 and 2).
        blur_sigma: standard deviation of the Gaussian in pixels (3).
    """

    products: ClassVar[frozenset[str]] = frozenset({"texture"})
    score_reduction: ClassVar[Literal["maximum"]] = "maximum"

    backbone: str = "wide_resnet50_2.tv_in1k"
    layers: tuple[int, int] = (2, 3)
    image_size: tuple[int, int] = (256, 256)
    margin: int = 32
    border_mode: Literal["reflect_pad", "crop"] = "reflect_pad"
    context: int = 96
    support: int = 40
    support_slope: float = 0.25
    regularisation: float = 5.0
    ridge: float = 1e-4
    pool: int = 3
    cut: tuple[int, int] = (3, 2)
    blur_sigma: float = 3.0


def mean_distances(rows: Tensor) -> Tensor:
    """Return each row's mean Euclidean distance to the other rows.

    Args:
        rows: `(B, n, C)` float32, n at least 2.

    Returns:
        `(B, n)` float32, not negative.
    """
    count = rows.shape[1]
    # Distances do not change when all rows are moved, and small rows lose fewer digits in their products.
    centred = rows - rows.mean(dim=1, keepdim=True)
    squares = centred.square().sum(dim=2)
    products = centred @ centred.transpose(1, 2)  # (B, n, n)
    distances = (squares[:, :, None] + squares[:, None, :] - 2 * products).clamp_min(0).sqrt()
    itself = distances.flatten(1)[:, :: count + 1]  # the diagonal
    return (distances.sum(dim=2) - itself).clamp_min(0) / (count - 1)


def typical_weights(distances: Tensor, support: int, slope: int) -> Tensor:
    """Choose the positions that are nearest to all others.

    Args:
        distances: `(B, n)` mean distances.
        support: N, how many are chosen.
        slope: weights fall from 1 to 0 between the ranks N - slope and N + slope, both among the n; with 0, all are
            chosen that are not farther than the N-th. Equal distances have equal weights.

    Returns:
        `(B, n)` float32 in [0, 1], not all 0.
    """
    nearest = distances.topk(support + slope, dim=1, largest=False, sorted=True).values
    last = nearest[:, support + slope - 1 :]
    if slope == 0:
        return (distances <= last).to(distances.dtype)
    first = nearest[:, support - slope - 1 : support - slope]
    width = (last - first).clamp_min(_TINY)
    return (0.5 + ((first + last) / 2 - distances) / width).clamp(0, 1)


def neighbour_filters() -> Tensor:
    """Return the orthogonal combinations of eight neighbours, as filters `(8, 1, 3, 3)` whose centre is zero.

    The first is constant over the neighbours, the others are differences of them (a cosine transform).
    """
    steps = torch.arange(_NEIGHBOURS, dtype=torch.float64)
    matrix = torch.cos(math.pi / _NEIGHBOURS * steps[:, None] * (steps + 0.5)) * math.sqrt(2 / _NEIGHBOURS)
    matrix[0] /= math.sqrt(2)
    filters = torch.zeros(_NEIGHBOURS, 9, dtype=torch.float64)
    filters[:, [0, 1, 2, 3, 5, 6, 7, 8]] = matrix
    return filters.reshape(_NEIGHBOURS, 1, 3, 3).to(torch.float32)


def combine_neighbours(features: Tensor, filters: Tensor) -> Tensor:
    """Return combinations of the eight neighbours of every position; behind the border features are reflected.

    Args:
        features: `(B, C, H, W)`, at least 2 x 2.
        filters: `(8, 1, 3, 3)`.

    Returns:
        `(B, n, 8, C)`.
    """
    batch, channels, height, width = features.shape
    padded = functional.pad(features, (1, 1, 1, 1), mode="reflect")
    single = padded.reshape(batch * channels, 1, height + 2, width + 2)
    combined = functional.conv2d(single, filters)
    return combined.reshape(batch, channels, _NEIGHBOURS, height * width).permute(0, 3, 2, 1)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve small symmetric positive definite systems by elimination, in few operators that every runtime has.

    Without exchanges of rows, which such matrices do not need.

    Args:
        matrix: `(..., k, k)`.
        right: `(..., k, 1)`.

    Returns:
        `(..., k, 1)`.
    """
    size = matrix.shape[-1]
    others = (1 - torch.eye(size, dtype=matrix.dtype, device=matrix.device))[..., None].unbind(dim=1)  # (k, 1) each
    rows = torch.cat((matrix, right), dim=-1)  # (..., k, k + 1)
    pivots = []
    for step, other in enumerate(others):
        row = rows.narrow(-2, step, 1)
        pivots.append(row.narrow(-1, step, 1))
        rows = rows - rows.narrow(-1, step, 1) * other * (row / pivots[-1])
    return rows.narrow(-1, size, 1) / torch.cat(pivots, dim=-2)


class _Regression(nn.Module):
    """One scale: how far each feature lies from what its neighbours and the typical features make of it."""

    filters: Tensor

    def __init__(self, config: GrnrConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("filters", neighbour_filters(), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Score features `(B, C, H, W)`: distances `(B, H, W)`."""
        rows = features.flatten(2).transpose(1, 2)  # (B, n, C)
        rebuilt = self._project(rows, combine_neighbours(features, self.filters))
        return (rows - rebuilt).square().sum(dim=2).sqrt().reshape(-1, *features.shape[2:])

    def _project(self, rows: Tensor, neighbours: Tensor) -> Tensor:
        """Return the best combination of neighbours `(B, n, 8, C)` for each row of `(B, n, C)`.

        Minimises ||Q - W S_L||^2 + lambda sum_m ||S_G^m - W S_L||^2 (arXiv:2406.07333), whose solution projects
        T = (Q + lambda N mu) / (1 + lambda N) on the neighbours' span.
        """
        pull = self.config.regularisation * self.config.support
        target = (rows + pull * self._typical_mean(rows)) / (1 + pull)
        gram = neighbours @ neighbours.transpose(2, 3)  # (B, n, 8, 8)
        squares = neighbours.square().sum(dim=(2, 3), keepdim=True) + _TINY  # the trace of S_L S_L^T
        eye = torch.eye(_NEIGHBOURS, dtype=rows.dtype, device=rows.device)
        ridge = (self.config.ridge / _NEIGHBOURS) * squares * eye
        weights = solve(gram + ridge, neighbours @ target[..., None])  # (B, n, 8, 1)
        return (weights.transpose(2, 3) @ neighbours).squeeze(2)

    def _typical_mean(self, rows: Tensor) -> Tensor:
        """Return mu `(B, 1, C)` of rows `(B, n, C)`."""
        slope = _slope_ranks(self.config)
        weights = typical_weights(mean_distances(rows), self.config.support, slope)
        return (weights[:, None, :] @ rows) / weights.sum(dim=1)[:, None, None]


class Grnr(nn.Module):
    """Neighbourhood regression at two scales; nothing is fitted.

    Raises:
        ValueError: if the configuration contradicts itself or the backbone.
    """

    def __init__(self, config: GrnrConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        added = config.margin if config.border_mode == "reflect_pad" else 0
        self.backbone = CnnBackbone(config.backbone, config.layers)
        canvas = (config.image_size[0] + 2 * added, config.image_size[1] + 2 * added)
        grids = [(canvas[0] // stride, canvas[1] // stride) for stride in self.backbone.strides]
        _refuse_contradictions(config, canvas, self.backbone.strides, grids)
        self.regression = _Regression(config)
        self.upsampling = nn.ModuleList(
            SmoothUpsampling(grid, canvas, config.blur_sigma, align_corners=False, margin=config.margin)
            for grid in grids
        )

    def load_backbone_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the backbone's weights in timm's naming.

        Raises:
            ValueError: if a key is missing, unknown or has another shape.
        """
        self.backbone.load_weights(state_dict)

    def stages(self) -> Sequence[Stage]:
        """Return no stage: an image is judged by itself alone."""
        return []

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Return the smoothed features of both scales, `(B, C, H, W)` each, of images `(B, 3, H, W)`.

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights.
        """
        require_image_size(images, self.image_size)
        pool, context = self.config.pool, 0
        if self.config.border_mode == "reflect_pad":
            context = self.config.context
            images = functional.pad(images, (self.config.margin + context,) * 4, mode="reflect")
        # Zeros behind the border count, as in the demo; the rim that they darken is dropped or cut.
        smoothed = [functional.avg_pool2d(layer, pool, stride=1, padding=pool // 2) for layer in self.backbone(images)]
        cells = [context // stride for stride in self.backbone.strides]
        return [_drop_rim(layer, width) for layer, width in zip(smoothed, cells, strict=True)]

    def forward(self, images: Tensor) -> AnomalyOutput:
        """Judge images `(B, 3, H, W)` float32 in [0, 1].

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights.
        """
        maps = [
            upsample(_cut_rim(self.regression(features), cells))
            for features, cells, upsample in zip(self.encode(images), self.config.cut, self.upsampling, strict=True)
        ]
        anomaly_map = maps[0] * maps[1]
        if self.config.border_mode == "crop":
            anomaly_map = _surround(anomaly_map, self.config.margin)
        return AnomalyOutput(anomaly_map, anomaly_map.amax(dim=(1, 2)))


def _slope_ranks(config: GrnrConfig) -> int:
    """Return half the width of the slope in ranks; a slope that is wanted has one at least."""
    return math.ceil(config.support_slope * config.support)


def _drop_rim(features: Tensor, cells: int) -> Tensor:
    """Drop a rim of cells of features `(B, C, H, W)`."""
    return features if cells == 0 else features[:, :, cells:-cells, cells:-cells]


def _cut_rim(grid: Tensor, cells: int) -> Tensor:
    """Replace a rim of cells of grids `(B, H, W)` by the grid's least value."""
    if cells == 0:
        return grid
    least = grid.amin(dim=(1, 2), keepdim=True)
    inner = functional.pad((grid - least)[:, cells:-cells, cells:-cells], (cells,) * 4)
    return inner + least


def _surround(anomaly_map: Tensor, margin: int) -> Tensor:
    """Put a rim of each map's least value round maps `(B, h, w)`."""
    least = anomaly_map.amin(dim=(1, 2), keepdim=True)
    return functional.pad(anomaly_map - least, (margin,) * 4) + least


def _refuse_contradictions(
    config: GrnrConfig, canvas: tuple[int, int], strides: Sequence[int], grids: Sequence[tuple[int, int]]
) -> None:
    coarsest = max(strides)
    if canvas[0] % coarsest or canvas[1] % coarsest:
        raise ValueError(f"the canvas of {canvas[0]} x {canvas[1]} is not a multiple of the stride {coarsest}")
    if config.pool % 2 == 0:
        raise ValueError(f"features are smoothed over an odd number of cells, not {config.pool}")
    if config.border_mode == "reflect_pad":
        if config.context % coarsest:
            raise ValueError(f"a context of {config.context} pixels is not a multiple of the stride {coarsest}")
        if (added := config.margin + config.context) >= min(config.image_size):
            raise ValueError(
                f"an image of {config.image_size} can't be reflected over margin and context, {added} pixels"
            )
    for cells, grid, stride in zip(config.cut, grids, strides, strict=True):
        if cells * stride > config.margin:
            raise ValueError(f"a cut of {cells} cells of {stride} pixels reaches beyond the margin of {config.margin}")
        if min(grid) <= max(2 * cells, 1):
            raise ValueError(f"a cut of {cells} cells leaves nothing of a grid of {grid[0]} x {grid[1]}")
        slope, cells_in_all = _slope_ranks(config), grid[0] * grid[1]
        if not slope < config.support <= cells_in_all - max(slope, 1):
            raise ValueError(f"{config.support} typical features can't be chosen among {cells_in_all}")
