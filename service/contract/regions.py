"""Connected components, their outlines and polygon masks: the one door to OpenCV's shape functions.

Pure: arrays in, arrays and small records out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Window = tuple[float, float, float, float]
Polygon = tuple[tuple[float, float], ...]

# A component's outline is traced on its mask enlarged by this factor, so that it runs along the pixels' outer edges
# (to an eighth of a pixel) and a component of one pixel still has an area.
_OUTLINE_SCALE = 4


@dataclass(frozen=True)
class Region:
    """A connected component of the thresholded map, in pixels of the original frame.

    Attributes:
        x: left edge of the bounding box.
        y: top edge of the bounding box.
        width: of the bounding box.
        height: of the bounding box.
        polygon: outer outline as `(x, y)` points.
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
    mask = anomaly_map >= threshold
    if not mask.any():
        return [], 0
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA] * scale_y * scale_x
    peaks = np.full(count, -np.inf, np.float32)
    np.maximum.at(peaks, np.asarray(labels, np.int64)[mask], anomaly_map[mask])
    kept = [label for label in range(1, count) if areas[label - 1] >= min_area_px]
    kept.sort(key=lambda label: -float(peaks[label]))
    regions = []
    for label in kept[:max_regions]:
        x0, y0, box_w, box_h = (int(v) for v in stats[label, :4])
        inside = labels[y0 : y0 + box_h, x0 : x0 + box_w] == label
        outline = _outline(inside)
        regions.append(
            Region(
                x=left + x0 * scale_x,
                y=top + y0 * scale_y,
                width=box_w * scale_x,
                height=box_h * scale_y,
                polygon=tuple((left + (x0 + x) * scale_x, top + (y0 + y) * scale_y) for x, y in outline),
                area_px=float(areas[label - 1]),
                peak=float(peaks[label]),
                mean=float(anomaly_map[y0 : y0 + box_h, x0 : x0 + box_w][inside].mean()),
            )
        )
    return regions, len(kept)


def rasterise(polygons: Sequence[Polygon], height: int, width: int) -> NDArray[np.bool_]:
    """Fill polygons given in fractions of the frame, `(x, y)` in [0, 1].

    Returns:
        `(height, width)` bool, True inside any of them.
    """
    canvas = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        points = np.array([(x * width - 0.5, y * height - 0.5) for x, y in polygon])
        cv2.fillPoly(canvas, [np.rint(points).astype(np.int32)], 1)
    return canvas > 0


def outline_mask(mask: NDArray[np.bool_]) -> tuple[Polygon, ...]:
    """Turn a mask `(h, w)` into the outer outlines of its components, in fractions of the frame; holes are filled."""
    h, w = mask.shape
    labels, count = label_components(mask)
    outlines = (_outline(labels == label) for label in range(1, count + 1))
    return tuple(tuple((x / w, y / h) for x, y in outline) for outline in outlines)


def draw_outlines(pixels: NDArray[np.uint8], polygons: Sequence[Polygon], colour: tuple[int, int, int]) -> None:
    """Draw closed outlines into `(h, w, 3)` uint8 pixels in place; points are `(x, y)` pixels of that image."""
    thickness = max(1, round(min(pixels.shape[:2]) / 200))
    for polygon in polygons:
        points = np.rint(np.array(polygon)).astype(np.int32).reshape(-1, 1, 2)
        cv2.polylines(pixels, [points], isClosed=True, color=colour, thickness=thickness, lineType=cv2.LINE_AA)


def _outline(inside: NDArray[np.bool_]) -> list[tuple[float, float]]:
    enlarged = np.kron(inside, np.ones((_OUTLINE_SCALE, _OUTLINE_SCALE), np.uint8)).astype(np.uint8)
    contours, _ = cv2.findContours(enlarged, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    largest = max(contours, key=len)
    return [((float(x) + 0.5) / _OUTLINE_SCALE, (float(y) + 0.5) / _OUTLINE_SCALE) for x, y in largest[:, 0, :]]
