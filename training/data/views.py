"""What fitting sees of whole frames: their tiles, where frames are cut, and further views, where they are few."""

from collections.abc import Sequence

import numpy as np

from service.contract.geometry import InputSpec
from service.contract.tiling import cut_tiles
from training.data.loader import FrameSource, LineIndex, Pixels
from training.data.shots import ShotViews


class TileFrames:
    """A source that holds the tiles of every frame of another source, cut when they are taken.

    Args:
        frames: whole canvases.
        spec: how they are cut.
    """

    def __init__(self, frames: FrameSource, spec: InputSpec) -> None:
        self._frames = frames
        self._spec = spec

    @property
    def line_index(self) -> LineIndex:
        """Return the line of each tile, `(T n,)`."""
        return np.repeat(self._frames.line_index, self._spec.tile_count)

    def __len__(self) -> int:
        return len(self._frames) * self._spec.tile_count

    def take(self, indices: Sequence[int]) -> Pixels:
        """Return tiles as `(B, h, w, 3)` uint8 RGB, in the order of the indices; a frame's tiles are neighbours."""
        count = self._spec.tile_count
        wanted = sorted({index // count for index in indices})
        cut = {
            number: cut_tiles(canvas, self._spec)
            for number, canvas in zip(wanted, self._frames.take(wanted), strict=True)
        }
        return np.stack([cut[index // count][index % count] for index in indices])


def inputs_of_frame(spec: InputSpec, *, makes_views: bool) -> int:
    """Return how many neighbouring inputs `views_of` makes of each frame; arguments as there."""
    return spec.tile_count * (ShotViews.count() if makes_views else 1)


def views_of(frames: FrameSource, spec: InputSpec, *, makes_views: bool) -> FrameSource:
    """Return what a detector is fitted on.

    Args:
        frames: whole canvases.
        spec: how they are cut.
        makes_views: whether there are further views of what the network takes.
    """
    tiles = frames if spec.tiles is None else TileFrames(frames, spec)
    return ShotViews(tiles) if makes_views else tiles
