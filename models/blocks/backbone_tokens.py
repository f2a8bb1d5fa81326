"""One tensor of tokens out of a frozen backbone's layers, so that a method built on tokens takes transformers and CNNs.

A vision transformer gives the mean of each set of neighbouring blocks. A CNN gives its pyramid on the finest grid,
projected to fewer channels, which has to be measured on good frames first.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import CnnBackbone, VitBackbone, build_backbone
from models.detector import PassStage

# The blocks that INP-Former taps, by its code (luow23/INP-Former).
_TAPPED_BLOCKS: Mapping[str, tuple[int, ...]] = {
    "vit_small_patch14_reg4_dinov2": (2, 3, 4, 5, 6, 7, 8, 9),
    "vit_base_patch14_reg4_dinov2": (2, 3, 4, 5, 6, 7, 8, 9),
    "vit_large_patch14_reg4_dinov2": (4, 6, 8, 10, 12, 14, 16, 18),
}
_CNN_LAYERS = (2, 3)  # strides 8 and 16


class GroupMeans(nn.Module):
    """Transformer tokens: the mean of each set of neighbouring layers.

    Args:
        groups: G, the number of sets.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, layers: list[Tensor]) -> Tensor:
        """Turn L layers `(B, N, C)` into `(B, G, N, C)`."""
        return mean_by_group(layers, self.groups)


class PyramidTokens(nn.Module):
    """CNN tokens: the pyramid on its finest grid, projected by an uncentred PCA.

    Each layer is divided by one scalar, clipped and divided by the root of its channel count, so that layers weigh the
    same. Standardising each channel instead cost 0.14 to 0.19 of image AUROC on a real line. Statistics are gathered in
    two looks at the good frames, because the clip depends on the first.

    Args:
        channels: of each layer.
        grid: `(height, width)` of the finest layer.
        projected: C, the channels that are kept.
        average: take the 3x3 mean of each layer first.

    Raises:
        ValueError: if there are fewer channels than shall be kept.
    """

    layer_scales: Tensor
    projection: Tensor
    token_scale: Tensor
    is_measured: Tensor

    _CLIP = 8.0

    def __init__(self, channels: Sequence[int], grid: tuple[int, int], projected: int, *, average: bool) -> None:
        super().__init__()
        if projected > sum(channels):
            raise ValueError(f"can't project {sum(channels)} channels to {projected}")
        self.grid = grid
        self.average = average
        self.register_buffer("layer_scales", torch.ones(len(channels)))
        self.register_buffer("projection", torch.zeros(sum(channels), projected))
        self.register_buffer("token_scale", torch.ones(()))
        self.register_buffer("is_measured", torch.zeros((), dtype=torch.bool))
        # An exported graph can't branch on a tensor, so a plain copy of `is_measured` is kept beside it.
        self._may_run = False
        self.register_load_state_dict_post_hook(PyramidTokens._copy_flag)  # type: ignore[no-untyped-call]  # torch's
        self._sums: Tensor | None = None
        self._moments: Tensor | None = None
        self._count = 0

    def _copy_flag(self, _: object) -> None:
        self._may_run = bool(self.is_measured)

    def _on_finest_grid(self, layers: list[Tensor]) -> list[Tensor]:
        """Bring maps `(B, C, h, w)` to tokens `(B, N, C)` of the finest grid."""
        tokens = []
        for layer in layers:
            x = functional.avg_pool2d(layer, 3, stride=1, padding=1, count_include_pad=False) if self.average else layer
            if tuple(x.shape[2:]) != self.grid:
                x = functional.interpolate(x, size=self.grid, mode="bilinear", align_corners=False)
            tokens.append(x.flatten(2).transpose(1, 2))
        return tokens

    def _balance(self, tokens: list[Tensor]) -> Tensor:
        """Give each layer the same weight: `(B, N, sum of C)`."""
        balanced = [
            (x / scale).clamp(-self._CLIP, self._CLIP) / math.sqrt(x.shape[-1])
            for x, scale in zip(tokens, self.layer_scales.unbind(), strict=True)
        ]
        return torch.cat(balanced, dim=-1)

    @torch.no_grad()
    def observe_scales(self, layers: list[Tensor]) -> None:
        """Add a batch to the mean and mean square of each layer."""
        tokens = self._on_finest_grid(layers)
        sums = torch.stack([torch.stack((x.double().mean(), x.double().square().mean())) for x in tokens])
        batch = len(layers[0])
        self._sums = batch * sums if self._sums is None else self._sums + batch * sums
        self._count += batch

    def finish_scales(self) -> None:
        """Keep the standard deviation of each layer."""
        if self._sums is None:
            raise RuntimeError("no frames were observed")
        mean, square = (self._sums / self._count).unbind(dim=1)
        self.layer_scales.copy_((square - mean.square()).clamp_min(1e-12).sqrt())
        self._sums, self._count = None, 0

    @torch.no_grad()
    def observe_moments(self, layers: list[Tensor]) -> None:
        """Add a batch to the second-moment matrix of balanced tokens."""
        x = self._balance(self._on_finest_grid(layers)).flatten(0, 1)
        moments = (x.T @ x).double()
        self._moments = moments if self._moments is None else self._moments + moments
        self._count += len(x)

    def finish_moments(self) -> None:
        """Keep the directions that hold most energy, and the size of what they leave."""
        if self._moments is None:
            raise RuntimeError("no frames were observed")
        energies, directions = torch.linalg.eigh(self._moments / self._count)  # ascending
        kept = self.projection.shape[1]
        directions = directions[:, -kept:].flip(1)
        # The sign of an eigenvector is arbitrary: fix it, so that two machines agree.
        largest = directions.abs().argmax(dim=0, keepdim=True)
        directions = directions * directions.gather(0, largest).sign()
        self.projection.copy_(directions)
        self.token_scale.copy_((energies[-kept:].clamp_min(0).sum() / kept).clamp_min(1e-12).sqrt())
        self.is_measured.fill_(True)
        self._may_run = True
        self._moments, self._count = None, 0

    def passes(self, backbone: nn.Module) -> list[PassStage]:
        """Return the two looks at the good frames, through the backbone whose layers these are."""
        return [
            PassStage("layer scales", lambda images: self.observe_scales(backbone(images)), self.finish_scales),
            PassStage("projection", lambda images: self.observe_moments(backbone(images)), self.finish_moments),
        ]

    def forward(self, layers: list[Tensor]) -> Tensor:
        """Turn maps `(B, C, h, w)` of any sizes into tokens `(B, 1, N, C)`.

        Raises:
            RuntimeError: if the good frames were not looked at twice.
        """
        if not self._may_run:
            raise RuntimeError("the pyramid was not measured yet; run the pass stages over the good frames first")
        tokens = self._balance(self._on_finest_grid(layers)) @ self.projection / self.token_scale
        return tokens[:, None]  # (B, 1, N, C)


class FrozenFront(NamedTuple):
    """A backbone and what makes tokens of its layers.

    Attributes:
        backbone: frozen, without weights yet.
        tokens: layers to `(B, G, N, C)`.
        grid: `(height, width)` of the N positions.
        channels: C.
        heads: into which attention may split them.
    """

    backbone: CnnBackbone | VitBackbone
    tokens: GroupMeans | PyramidTokens
    grid: tuple[int, int]
    channels: int
    heads: int


def build_front(
    name: str,
    image_size: tuple[int, int],
    layers: tuple[int, ...] | None,
    *,
    groups: int,
    heads: int | None,
    projected_channels: int | None,
    average: bool,
) -> FrozenFront:
    """Build a backbone and the token source that fits its kind.

    Args:
        name: timm's.
        image_size: `(height, width)`.
        layers: tapped blocks or stages; None takes the published ones of the backbone, strides 8 and 16 of a CNN.
        groups: G, sets of neighbouring layers; 1 for a CNN.
        heads: None takes those of the transformer.
        projected_channels: C of a CNN's projected pyramid; None for a transformer.
        average: take the 3x3 mean of each CNN layer first.

    Raises:
        ValueError: if the values contradict each other or the backbone.
    """
    backbone = build_backbone(name, layers or _TAPPED_BLOCKS.get(name, _CNN_LAYERS), image_size)
    if isinstance(backbone, VitBackbone):
        if projected_channels is not None or average:
            raise ValueError("projected_channels and average_features are for CNN backbones")
        if layers is None and name not in _TAPPED_BLOCKS:
            raise ValueError(f"nothing is published on which blocks of {name} to tap; set layers")
        if len(backbone.layers) % groups:
            raise ValueError(f"{len(backbone.layers)} layers can't be split into {groups} equal groups")
        front = FrozenFront(backbone, GroupMeans(groups), backbone.grid, backbone.channels[0], heads or backbone.heads)
    else:
        if projected_channels is None or heads is None or groups != 1:
            raise ValueError("a CNN backbone needs projected_channels, heads and groups=1")
        coarsest, finest = max(backbone.strides), min(backbone.strides)
        if image_size[0] % coarsest or image_size[1] % coarsest:
            raise ValueError(f"image size {image_size} is not a multiple of the stride {coarsest}")
        grid = (image_size[0] // finest, image_size[1] // finest)
        pyramid = PyramidTokens(backbone.channels, grid, projected_channels, average=average)
        front = FrozenFront(backbone, pyramid, grid, projected_channels, heads)
    if front.channels % front.heads:
        raise ValueError(f"{front.channels} channels can't be split among {front.heads} heads")
    return front


def mean_by_group(layers: Sequence[Tensor], groups: int) -> Tensor:
    """Average `(B, N, C)` tensors in `groups` equal runs of neighbours: `(B, G, N, C)`."""
    size = len(layers) // groups
    runs = [layers[start : start + size] for start in range(0, len(layers), size)]
    return torch.stack([torch.stack(list(run)).mean(dim=0) for run in runs], dim=1)


def sample_tokens(tokens: Tensor, count: int | None, generator: torch.Generator) -> Tensor:
    """Draw `count` of N tokens for each image, all of them if None: `(B, G, count, C)`."""
    batch, groups, positions, channels = tokens.shape
    if count is None or count >= positions:
        return tokens
    drawn = torch.rand(batch, positions, generator=generator).topk(count, dim=1).indices.to(tokens.device)
    return tokens.gather(2, drawn[:, None, :, None].expand(-1, groups, -1, channels))
