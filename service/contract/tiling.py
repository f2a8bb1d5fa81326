"""Cuts a canvas into tiles and stitches their maps to one: what stands between a frame and a network that sees a part.

Training, golden replay and service go through these functions, so that a threshold means the same in all of them.
Where tiles overlap, their maps are blended with weights that run evenly from one tile to the next and sum to one, so
that no seam shows; where the tiles agree, the stitched map holds the very value that they agree on.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.contract.geometry import InputSpec
from service.contract.policy import ScoreRule
from service.errors import EngineFailed

# Frames `(B, H, W, 3)` uint8 and `line_index` `(B,)` int64 to scores `(B,)` and maps `(B, h, w)`, both float32.
Run = Callable[[NDArray[np.uint8], NDArray[np.int64]], tuple[NDArray[np.float32], NDArray[np.float32]]]

# Inputs of one run where a whole frame is asked for at once: many tiles of a large network would fill the memory.
_LARGEST_RUN = 8


class FrameAnswer(NamedTuple):
    """What a network says of one frame.

    Attributes:
        score: raw.
        anomaly_map: `(h, w)` float32, of the whole canvas.
    """

    score: np.float32
    anomaly_map: NDArray[np.float32]


def cut_tiles(canvas: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.uint8]:
    """Cut a canvas `(H, W, 3)` into what the network takes, `(T, h, w, 3)`, row by row; without tiling T is 1."""
    if spec.tiles is None:
        return canvas[None]
    return np.stack([canvas[top : top + spec.height, left : left + spec.width] for top, left in spec.tile_corners])


def answer_of(scores: NDArray[np.float32], maps: NDArray[np.float32], spec: InputSpec, rule: ScoreRule) -> FrameAnswer:
    """Make one answer of what the network said of a frame's tiles.

    Args:
        scores: `(T,)` float32, one a tile.
        maps: `(T, h, w)` float32, in the order of `cut_tiles`.
        spec: how the frame was cut.
        rule: how the score is reduced from the stitched map; without tiling the network's own score stands.

    Raises:
        EngineFailed: if the maps are not as many as the tiles.
    """
    if len(scores) != spec.tile_count or len(maps) != spec.tile_count:
        raise EngineFailed("The engine answered with another number of tiles than it was given.")
    if spec.tiles is None:
        return FrameAnswer(scores[0], maps[0])
    anomaly_map = stitch(maps, spec)
    return FrameAnswer(np.float32(rule.reduce(anomaly_map.ravel())), anomaly_map)


def stitch(maps: NDArray[np.float32], spec: InputSpec) -> NDArray[np.float32]:
    """Stitch the maps `(T, h, w)` float32 of a frame's tiles to the map of its canvas.

    Raises:
        ValueError: if tiles overlap by a part of a map's cell.
    """
    if spec.tiles is None:
        only: NDArray[np.float32] = maps[0]
        return only
    down, across = spec.overlap_cells(*maps.shape[1:])
    columns = spec.tiles.columns
    rows = [_blend(list(maps[at : at + columns]), across, axis=1) for at in range(0, len(maps), columns)]
    return _blend(rows, down, axis=0)


def by_tiles(run: Run, spec: InputSpec, rule: ScoreRule) -> Run:
    """Return a network that takes whole canvases `(B, H, W, 3)`, cuts them and stitches the answers.

    Args:
        run: the network, which takes tiles.
        spec: how canvases are cut; without tiling the network itself is returned.
        rule: how scores are reduced from maps.
    """
    if spec.tiles is None:
        return run

    def run_whole(
        frames: NDArray[np.uint8], line_index: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        answers = [_ask(run, canvas, line, spec, rule) for canvas, line in zip(frames, line_index, strict=True)]
        return np.array([one.score for one in answers], np.float32), np.stack([one.anomaly_map for one in answers])

    return run_whole


def _ask(run: Run, canvas: NDArray[np.uint8], line: np.int64, spec: InputSpec, rule: ScoreRule) -> FrameAnswer:
    tiles = cut_tiles(canvas, spec)
    said = [
        run(some, np.full(len(some), line, np.int64))
        for some in (tiles[at : at + _LARGEST_RUN] for at in range(0, len(tiles), _LARGEST_RUN))
    ]
    return answer_of(np.concatenate([one[0] for one in said]), np.concatenate([one[1] for one in said]), spec, rule)


def _blend(parts: Sequence[NDArray[np.float32]], overlap: int, axis: int) -> NDArray[np.float32]:
    """Join maps `(h, w)` along an axis, each one's last `overlap` cells lying on the next one's first."""
    # At the centre of each cell, how far it lies from one tile towards the next. In float64, where the two weights sum
    # to one so closely that equal float32 values come out unchanged.
    towards_next = (np.arange(overlap) + 0.5) / max(1, overlap)
    weights = np.expand_dims(towards_next, 1 - axis)
    pieces: list[NDArray[np.float32]] = []
    last = len(parts) - 1
    for number, part in enumerate(parts):
        size = part.shape[axis]
        begin, end = (overlap if number > 0 else 0), (size - overlap if number < last else size)
        if number > 0:
            before = _slice(parts[number - 1], size - overlap, size, axis)
            shared = before * (1 - weights) + _slice(part, 0, overlap, axis) * weights
            pieces.append(shared.astype(np.float32))
        pieces.append(_slice(part, begin, end, axis))
    return np.concatenate(pieces, axis=axis)


def _slice(part: NDArray[np.float32], begin: int, end: int, axis: int) -> NDArray[np.float32]:
    return part[begin:end] if axis == 0 else part[:, begin:end]
