"""Anti-aliased masks of plain shapes: the leaves, marks and parts that scenes are made of.

A shape is a signed distance in pixels, negative inside; its mask is the share of a pixel that is covered.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Field = NDArray[np.float32]
# Draws its own proportions; (generator, u, v, radius) to a signed distance, all in pixels, u and v in its own axes.
Shape = Callable[[Generator, Field, Field, float], Field]


class Stencil(NamedTuple):
    """A shape placed on a canvas.

    Attributes:
        rows: canvas rows that it touches.
        columns: canvas columns that it touches.
        mask: `(rows, columns)` float32 in [0, 1].
    """

    rows: slice
    columns: slice
    mask: Field


def ellipse(rng: Generator, u: Field, v: Field, radius: float) -> Field:
    """Disc or ellipse."""
    flatness = rng.uniform(0.3, 1)
    return cast("Field", (np.hypot(u, v / np.float32(flatness)) - radius) * np.float32(flatness))


def rectangle(rng: Generator, u: Field, v: Field, radius: float) -> Field:
    """Rectangle, up to a square."""
    return np.maximum(np.abs(u) - radius * 0.8, np.abs(v) - radius * rng.uniform(0.2, 0.8))


def polygon(rng: Generator, u: Field, v: Field, radius: float) -> Field:
    """Convex polygon of three to seven sides."""
    sides = int(rng.integers(3, 8))
    distance = np.full_like(u + v, -1e9)
    for angle in 2 * np.pi * (np.arange(sides) + rng.uniform(-0.3, 0.3, sides)) / sides:
        edge = np.float32(np.cos(angle)) * u + np.float32(np.sin(angle)) * v - radius * rng.uniform(0.45, 0.8)
        distance = np.maximum(distance, edge.astype(np.float32))
    return distance


def ring(rng: Generator, u: Field, v: Field, radius: float) -> Field:
    """Ring: washer, eyelet, pad."""
    width = radius * rng.uniform(0.05, 0.4)
    return cast("Field", np.abs(np.hypot(u, v) - (radius - width)) - width)


def arc(rng: Generator, u: Field, v: Field, radius: float) -> Field:
    """Open part of a ring: hook, hair, curved scratch."""
    width = max(radius * rng.uniform(0.01, 0.12), 0.6)
    return cast(
        "Field", np.maximum(np.abs(np.hypot(u, v) - (radius - width)) - width, u + v - radius * rng.uniform(-1, 1))
    )


def bar(rng: Generator, u: Field, v: Field, radius: float) -> Field:
    """Thin rod: needle, track, straight scratch."""
    return np.maximum(np.abs(u) - radius, np.abs(v) - max(radius * rng.uniform(0.01, 0.12), 0.5))


def cross(rng: Generator, u: Field, v: Field, radius: float) -> Field:
    """Two crossed bars, or an angle piece where one is cut."""
    width = radius * rng.uniform(0.08, 0.3)
    upright = np.maximum(np.abs(u) - width, np.abs(v) - radius)
    lying = np.maximum(np.abs(v) - width, np.abs(u - radius * rng.choice([0, 0.5])) - radius * 0.6)
    return cast("Field", np.minimum(upright, lying))


def glyph(rng: Generator, u: Field, v: Field, radius: float) -> Field:
    """Letter-like sign of five by five squares, half of them mirrored."""
    filled = rng.random((5, 5)) < 0.55
    if rng.random() < 0.5:
        filled = filled | filled[:, ::-1]
    cell = radius * 1.4 / 5
    column, row = np.floor(u / cell + 2.5).astype(np.int32), np.floor(v / cell + 2.5).astype(np.int32)
    inside = (column >= 0) & (column < 5) & (row >= 0) & (row < 5)
    return np.where(inside & filled[np.clip(row, 0, 4), np.clip(column, 0, 4)], np.float32(-1), np.float32(1))


SHAPES: tuple[Shape, ...] = (
    ellipse,
    rectangle,
    polygon,
    ring,
    arc,
    bar,
    cross,
    glyph,
)
THIN_SHAPES = (arc, bar, ellipse)


def place_shape(
    shape: Shape,
    rng: Generator,
    canvas: tuple[int, int],
    centre: tuple[float, float],
    radius: float,
    angle: float,
) -> Stencil | None:
    """Draw one shape.

    Args:
        shape: one of `SHAPES`.
        rng: draws its proportions.
        canvas: `(height, width)` pixels.
        centre: `(y, x)` pixels; may lie outside.
        radius: pixels from the centre to the farthest point.
        angle: radians.

    Returns:
        The stencil, or None where it misses the canvas.
    """
    y, x = centre
    top, bottom = max(int(y - radius) - 1, 0), min(int(y + radius) + 2, canvas[0])
    left, right = max(int(x - radius) - 1, 0), min(int(x + radius) + 2, canvas[1])
    if top >= bottom or left >= right:
        return None
    dy = (np.arange(top, bottom, dtype=np.float32) - np.float32(y))[:, None]
    dx = (np.arange(left, right, dtype=np.float32) - np.float32(x))[None, :]
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    distance = shape(rng, cosine * dx + sine * dy, cosine * dy - sine * dx, radius)
    mask = np.clip(0.5 - distance, 0, 1).astype(np.float32)
    return Stencil(slice(top, bottom), slice(left, right), mask)
