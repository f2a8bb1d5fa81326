"""Anomaly maps as pictures, on a fixed scale tied to the threshold.

A heatmap is 0 at the policy's `map_floor` and half way at its `region_threshold`, on every frame alike. Scaling each
frame by its own range would make every good part look red.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.contract.frames import resize_map
from service.contract.policy import Policy
from service.contract.regions import Region, Window, draw_outlines

# Anchors of a dark-violet to yellow ramp whose lightness rises evenly, so that it also reads in grey.
RAMP_AT = (0.0, 0.25, 0.5, 0.75, 1.0)
RAMP_RGB = ((20, 10, 60), (110, 25, 110), (200, 60, 70), (245, 140, 30), (252, 250, 160))
_OUTLINE_RGB = (0, 255, 255)

# What each of 256 steps of warmth leaves of the frame, and the paint that it lays on: `(256, 1)` and `(256, 3)`.
_STEPS = np.linspace(0, 1, 256)
_OPACITY = 0.75 * np.clip(2 * _STEPS - 0.4, 0, 1)[:, None]
_CLARITY = (1 - _OPACITY).astype(np.float32)
_PAINT = (_OPACITY * np.stack([np.interp(_STEPS, RAMP_AT, c) for c in zip(*RAMP_RGB, strict=True)], -1)).astype(
    np.float32
)


def heat(anomaly_map: NDArray[np.float32], policy: Policy) -> NDArray[np.float32]:
    """Scale a map to [0, 1]: 0 at or below `map_floor`, 0.5 at `region_threshold`, 1 at twice that distance.

    Args:
        anomaly_map: `(h, w)` float32.
        policy: the line's rules.
    """
    return _warmth(anomaly_map, policy).astype(np.float32)


def grey_heatmap(anomaly_map: NDArray[np.float32], policy: Policy) -> NDArray[np.uint8]:
    """Return the map `(h, w)` as uint8 grey; 128 and more exactly where the map reaches the region threshold."""
    return np.rint(_warmth(anomaly_map, policy) * 255).astype(np.uint8)


def overlay(
    pixels: NDArray[np.uint8],
    anomaly_map: NDArray[np.float32],
    policy: Policy,
    regions: Sequence[Region],
    window: Window,
    frame_size: tuple[int, int],
) -> NDArray[np.uint8]:
    """Lay the heatmap over the frame and draw the regions' outlines.

    Args:
        pixels: `(h, w, 3)` uint8 RGB, the frame at any resolution.
        anomaly_map: float32, of any resolution.
        policy: the line's rules.
        regions: in pixels of the original frame.
        window: where the map lies on the original frame.
        frame_size: `(height, width)` of the original frame.

    Returns:
        `(h, w, 3)` uint8 RGB of the same size as `pixels`.
    """
    height, width = pixels.shape[:2]
    scale_y, scale_x = height / frame_size[0], width / frame_size[1]
    top, left = round(window[0] * scale_y), round(window[1] * scale_x)
    bottom, right = round((window[0] + window[2]) * scale_y), round((window[1] + window[3]) * scale_x)
    warmth = resize_map(heat(anomaly_map, policy), bottom - top, right - left)
    step = np.rint(warmth * 255).astype(np.uint8)
    painted = pixels.copy()
    inspected = painted[top:bottom, left:right]
    inspected[:] = np.rint(inspected * _CLARITY[step] + _PAINT[step]).astype(np.uint8)
    outlines = [tuple((x * scale_x, y * scale_y) for x, y in region.polygon) for region in regions]
    draw_outlines(painted, outlines, _OUTLINE_RGB)
    return painted


def _warmth(anomaly_map: NDArray[np.float32], policy: Policy) -> NDArray[np.float64]:
    # In float64, where a value at the threshold gives exactly one half and none below it rounds up to it.
    span = 2 * (policy.region_threshold - policy.map_floor)
    scaled: NDArray[np.float64] = np.clip((anomaly_map.astype(np.float64) - policy.map_floor) / span, 0, 1)
    return scaled
