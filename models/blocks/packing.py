"""Feature maps of several sizes in one tensor, so that a training loop can keep them frame by frame."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MapShape = tuple[int, int, int]
"""Channels, height and width of one map."""


def map_shapes(channels: Sequence[int], strides: Sequence[int], image_size: tuple[int, int]) -> list[MapShape]:
    """Return the shapes of a backbone's layers for images of a size that all strides divide."""
    height, width = image_size
    return [(count, height // stride, width // stride) for count, stride in zip(channels, strides, strict=True)]


def pack(maps: Sequence[Tensor]) -> Tensor:
    """Put maps `(B, C, h, w)` of any sizes one after the other: `(B, sum of C h w)`."""
    return torch.cat([one.flatten(1) for one in maps], dim=1)


def unpack(packed: Tensor, shapes: Sequence[MapShape]) -> list[Tensor]:
    """Take apart again what `pack` put together from maps of these shapes."""
    rows = torch.split(packed, [math.prod(shape) for shape in shapes], dim=1)
    return [row.reshape(-1, *shape) for row, shape in zip(rows, shapes, strict=True)]
