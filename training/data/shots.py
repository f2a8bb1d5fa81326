"""Fitting on a few good frames: which ones, and the further views that are made of each.

The frames are drawn by Python's generator from those sorted by path, so that a seed names the same ones everywhere.
Only they are fitted on; all other good frames may calibrate, for they cost a line nothing but time.

The 22 views of a frame are those of INP-Former's few-shot setting (its code, luow23/INP-Former): the frame itself; 8
rotations by ±45, ±33.75, ±22.5 and ±11.25 degrees; 8 shifts by (±0.2, ±0.2) and (±0.1, ±0.1) of half a frame; mirrored;
grey; turned by 90, 180 and 270 degrees. Sampling is bilinear and reflects at the edges. There, views are made of
normalised tensors; here of pixels, rounded to whole grey levels, which is the same to half a level but for the grey
view: its luma is taken before normalisation.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from training.data.loader import FrameSource, LineIndex, Pixels
from training.data.samples import Dataset, DatasetFault, Sample

_ANGLES_DEG = tuple(sign * angle for angle in (45.0, 33.75, 22.5, 11.25) for sign in (1, -1))
_SHIFTS = tuple((step * x, step * y) for step in (0.2, 0.1) for x in (1, -1) for y in (1, -1))
_TURNS_DEG = (90.0, 180.0, 270.0)
# Weights of ITU-R BT.601, which image libraries call luma.
_LUMA = (0.299, 0.587, 0.114)


def choose_shots(dataset: Dataset, shots: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Return the good frames to fit on, sorted by path, and those that may calibrate.

    A data set that brings validation frames is calibrated on those; any other on its other good frames, but for
    further views of a piece that is fitted on.

    Raises:
        DatasetFault: if there are fewer good frames than are wanted.
    """
    good = dataset.train_good
    if len(good) < shots:
        raise DatasetFault(
            f"{dataset.root} has {len(good)} good frames to train on and {shots} are wanted; add frames."
        )
    drawn = random.Random(seed).sample(range(len(good)), shots)  # noqa: S311 -- no secret is drawn
    chosen = [good[index] for index in sorted(drawn)]
    pieces = {sample.group for sample in chosen} - {None}
    others = [sample for index, sample in enumerate(good) if index not in drawn and sample.group not in pieces]
    return chosen, list(dataset.validation_good) or others


class ShotViews:
    """A source that holds the 22 views of every frame of another source, made when they are taken.

    Args:
        frames: what the views are made of.
    """

    def __init__(self, frames: FrameSource) -> None:
        self._frames = frames
        self._views = _views()

    @staticmethod
    def count() -> int:
        """Return how many views each frame has."""
        return len(_views())

    @property
    def line_index(self) -> LineIndex:
        """Return the line of each view, `(22 n,)`."""
        return np.repeat(self._frames.line_index, len(self._views))

    def __len__(self) -> int:
        return len(self._frames) * len(self._views)

    def take(self, indices: Sequence[int]) -> Pixels:
        """Return views as `(B, H, W, 3)` uint8 RGB, in the order of the indices; a frame's views are neighbours."""
        count = len(self._views)
        frames = self._frames.take([index // count for index in indices])
        return np.stack([self._view(frame, index % count) for frame, index in zip(frames, indices, strict=True)])

    def _view(self, pixels: NDArray[np.uint8], view: int) -> NDArray[np.uint8]:
        matrix = self._views[view]
        if isinstance(matrix, str):
            return _plainly(pixels, matrix)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
        grid = affine_grid(matrix[None], list(image.shape), align_corners=False)
        moved = grid_sample(image, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        return moved[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()


def _views() -> list[Tensor | str]:
    """Return the views in order: a word, or a matrix `(2, 3)` that leads from a view's places to the frame's."""
    turned = [_rotation(angle) for angle in _ANGLES_DEG]
    shifted = [torch.tensor([[1.0, 0.0, x], [0.0, 1.0, y]]) for x, y in _SHIFTS]
    return ["itself", *turned, *shifted, "mirrored", "grey", *(_rotation(angle) for angle in _TURNS_DEG)]


def _rotation(degrees: float) -> Tensor:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]])


def _plainly(pixels: NDArray[np.uint8], view: str) -> NDArray[np.uint8]:
    if view == "mirrored":
        return np.ascontiguousarray(pixels[:, ::-1])
    if view == "grey":
        luma = np.rint(pixels @ np.array(_LUMA)).astype(np.uint8)
        return np.repeat(luma[..., None], 3, axis=2)
    return pixels
