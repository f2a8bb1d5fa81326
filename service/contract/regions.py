"""Connected components, their outlines and polygon masks: the one door to OpenCV's shape functions.

Pure: arrays in, arrays and small records out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Window = tuple[float, float, float, float]
Polygon = tuple[tuple[float, float], ...]

_HALF_A_CELL = 1.0  # in half pixels, the unit of `_outline`; finer steps are the grid's and not the defect's


@dataclass(frozen=True)
class Region:
    """A connected component of the thresholded map, in pixels of the original frame.

    Attributes:
        x: left edge of the bounding box.
        y: top edge of the bounding box.
        width: of the bounding box.
        height: of the bounding box.
        polygon: outer outline as `(x, y)` points, simplified by at most half a cell of the map.
        area_px: area in original pixels.
        peak: largest map value inside.
        mean: mean map value inside.
    """

    x: float
    y: float
    width: float
    height: float
    polygon: Polygon
    area_px: float
    peak: float
    mean: float


@dataclass(frozen=True, eq=False)
class _Part:
    """A cut of a mask, and the column and row where it lies."""

    x: int
    y: int
    inside: NDArray[np.bool_]


def label_components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Number the 8-connected components of a mask.

    Args:
        mask: `(h, w)` bool.

    Returns:
        Labels `(h, w)` int32, 0 where the mask is False, and the number of components.
    """
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S)
    return np.asarray(labels, dtype=np.int32), int(count) - 1


def find_regions(
    anomaly_map: NDArray[np.float32], threshold: float, window: Window, min_area_px: float, max_regions: int
) -> tuple[list[Region], int]:
    """Find the regions in which the map reaches a threshold, the highest peak first.

    Args:
        anomaly_map: `(h, w)` float32; values of -inf are outside of every region.
        threshold: `map >= threshold` belongs to a region.
        window: where the map lies on the original frame, `(top, left, height, width)` in its pixels.
        min_area_px: smaller regions are left out, in original pixels.
        max_regions: at most so many are described.

    Returns:
        The regions, and how many there are before `max_regions` cuts them.
    """
    top, left, window_height, window_width = window
    h, w = anomaly_map.shape
    scale_y, scale_x = window_height / h, window_width / w
    least = _round_up(threshold)
    if not anomaly_map.max() >= least:  # a good part, as most are: no mask is made of it
        return [], 0
    mask = anomaly_map >= least
    count, numbered, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    labels: NDArray[np.int32] = np.asarray(numbered, np.int32)
    areas = stats[:, cv2.CC_STAT_AREA] * scale_y * scale_x
    peaks = np.full(count, -np.inf, np.float32)
    np.maximum.at(peaks, labels[mask], anomaly_map[mask])
    kept = 1 + np.flatnonzero(areas[1:] >= min_area_px)  # label 0 is the background
    highest_first = kept[np.argsort(-peaks[kept], kind="stable")]
    regions = []
    for label in highest_first[:max_regions]:
        x0, y0, box_w, box_h = (int(v) for v in stats[label, :4])
        inside = labels[y0 : y0 + box_h, x0 : x0 + box_w] == label
        outline = _corners(cv2.approxPolyDP(_outline(inside), _HALF_A_CELL, closed=True))
        regions.append(
            Region(
                x=left + x0 * scale_x,
                y=top + y0 * scale_y,
                width=box_w * scale_x,
                height=box_h * scale_y,
                polygon=tuple((left + (x0 + x) * scale_x, top + (y0 + y) * scale_y) for x, y in outline),
                area_px=float(areas[label]),
                peak=float(peaks[label]),
                mean=float(anomaly_map[y0 : y0 + box_h, x0 : x0 + box_w][inside].mean()),
            )
        )
    return regions, len(kept)


def rasterise(polygons: Sequence[Polygon], height: int, width: int) -> NDArray[np.bool_]:
    """Fill polygons given in fractions of the frame, `(x, y)` in [0, 1].

    Args:
        polygons: corners may lie outside of the grid.
        height: of the grid.
        width: of the grid.

    Returns:
        `(height, width)` bool, True in every cell inside any of them and along their edges, so that a polygon thinner
        than a cell still marks something.
    """
    canvas = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        points = np.array([(x * width, y * height) for x, y in polygon])
        cv2.fillPoly(canvas, [np.floor(points).astype(np.int32)], 1)
    return canvas > 0


def outline_mask(mask: NDArray[np.bool_]) -> tuple[Polygon, ...]:
    """Turn a mask `(h, w)` into the outer outlines of its components, in fractions of the frame; holes are filled."""
    return tuple(_outline_in_frame(part, *mask.shape) for part in _components(_Part(0, 0, mask)))


def outline_mask_with_holes(mask: NDArray[np.bool_], least_px: float) -> tuple[Polygon, ...]:
    """Turn a mask `(h, w)` into polygons that leave its holes out, in fractions of the frame.

    A polygon knows no holes, so a component that has some is cut through each: a ring becomes two arcs.

    Args:
        mask: True where something is marked.
        least_px: components of fewer pixels are left out, and holes of fewer are filled.
    """
    left = [part for part in _components(_Part(0, 0, mask)) if part.inside.sum() >= least_px]
    outlines = []
    while left:
        part = left.pop()
        column = _column_through_a_hole(part.inside, least_px)
        if column is None:
            outlines.append(_outline_in_frame(part, *mask.shape))
        else:
            left += _components(_Part(part.x, part.y, part.inside[:, :column]))
            left += _components(_Part(part.x + column, part.y, part.inside[:, column:]))
    return tuple(outlines)


def draw_outlines(pixels: NDArray[np.uint8], polygons: Sequence[Polygon], colour: tuple[int, int, int]) -> None:
    """Draw closed outlines into `(h, w, 3)` uint8 pixels in place; points are `(x, y)` pixels of that image."""
    thickness = max(1, round(min(pixels.shape[:2]) / 200))
    for polygon in polygons:
        points = np.rint(np.array(polygon)).astype(np.int32).reshape(-1, 1, 2)
        cv2.polylines(pixels, [points], isClosed=True, color=colour, thickness=thickness, lineType=cv2.LINE_AA)


def _components(part: _Part) -> list[_Part]:
    """Return the 8-connected components of a cut, each cut to its bounding box."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(part.inside.astype(np.uint8), connectivity=8)
    return [
        _Part(part.x + x, part.y + y, labels[y : y + h, x : x + w] == label)
        for label, (x, y, w, h) in enumerate(stats[1:, :4].tolist(), start=1)
    ]


def _column_through_a_hole(inside: NDArray[np.bool_], least_px: float) -> int | None:
    """Return a column through the middle of the largest hole of a component, or None without one of enough pixels."""
    _, _, stats, _ = cv2.connectedComponentsWithStats((~inside).view(np.uint8), connectivity=4)
    height, width = inside.shape
    holes = [
        (area, x + w // 2)
        for x, y, w, h, area in stats[1:].tolist()
        if x > 0 and y > 0 and x + w < width and y + h < height and area >= least_px
    ]
    return max(holes)[1] if holes else None


def _outline_in_frame(part: _Part, height: int, width: int) -> Polygon:
    """Return the outer outline of a component in fractions of a frame."""
    return tuple(((part.x + x) / width, (part.y + y) / height) for x, y in _corners(_outline(part.inside)))


def _outline(inside: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Trace the outer edge of one component, `(n, 1, 2)` as `(x, y)` in half pixels, pixel i spanning [2i, 2i + 2].

    The tracer walks from pixel centre to pixel centre, so it is given the grid of the pixels' corners, edges and
    centres, twice as fine: then its walk runs along the pixels' outer edges and one pixel has an area of one.
    """
    h, w = inside.shape
    fine = np.zeros((2 * h + 1, 2 * w + 1), np.uint8)
    fine[1::2, 1::2] = inside
    cv2.dilate(fine, np.ones((3, 3), np.uint8), dst=fine)
    contours, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    (contour,) = contours
    return np.asarray(contour, np.int32)


def _corners(outline: NDArray[Any]) -> list[tuple[float, float]]:
    """Return an outline's points `(x, y)` with pixel i spanning [i, i + 1]."""
    return [(x / 2, y / 2) for x, y in outline[:, 0, :].tolist()]


def _round_up(threshold: float) -> np.float32:
    """Return the smallest float32 that is not below a threshold, so that float32 maps are compared exactly."""
    rounded = np.float32(threshold)
    return rounded if float(rounded) >= threshold else np.nextafter(rounded, np.float32(np.inf))
