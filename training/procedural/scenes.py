"""Whole canvases: dead leaves, surfaces with marks, and layouts of repeated parts, in generated colours and light.

A canvas is painted from a palette of textures (`textures.py`) through stencils (`shapes.py`). Dead leaves (leaves of
power-law radius that hide each other) give the edge and scale statistics of natural images; see Lee, Mumford, Huang,
"Occlusion models for natural images", IJCV 41 (2001), and Baradad et al., "Learning to see by looking at noise",
arXiv:2106.05963.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.procedural.shapes import SHAPES, THIN_SHAPES, Shape, place_shape

Bytes = NDArray[np.uint8]
Colours = NDArray[np.float32]


class Painter:
    """Paints textured shapes on one canvas.

    Args:
        rng: source of all randomness.
        textures: square uint8 textures, each at least `size` a side.
        size: pixels a side of the canvas.

    Attributes:
        canvas: `(size, size, 3)` float32 in [0, 255].
    """

    def __init__(self, rng: Generator, textures: Sequence[Bytes], size: int) -> None:
        self.rng = rng
        self.textures = textures
        self.size = size
        self.is_grey = rng.random() < 0.4
        self.saturation = rng.uniform(0.05, 1) ** 1.5
        self.canvas = np.empty((size, size, 3), np.float32)

    def new_colours(self, contrast: float = 1) -> Colours:
        """Draw a colour for each grey level of a texture, `(256, 3)` float32 in [0, 255]."""
        ends = self.rng.uniform(0, 255, (2, 1)) + self.rng.uniform(-1, 1, (2, 3)) * (
            0 if self.is_grey else 160 * self.saturation
        )
        spread = contrast * self.rng.uniform(0, 1) ** 0.7
        middle, half = ends.mean(axis=0), (ends[1] - ends[0]) / 2 * spread
        ramp = np.linspace(-1, 1, 256)[:, None]
        return cast("Colours", np.clip(middle + ramp * half, 0, 255).astype(np.float32))

    def cover(self, contrast: float = 1) -> None:
        """Paint the whole canvas with one texture."""
        self.canvas[:] = self.new_colours(contrast)[self._patch(self.size, self.size)]

    def paint(
        self,
        shape_number: int,
        centre: tuple[float, float],
        radius: float,
        angle: float,
        colours: Colours | None = None,
        opacity: float = 1,
    ) -> None:
        """Paint one textured shape; its proportions are drawn afresh."""
        self._paint(SHAPES[shape_number], self.rng, centre, radius, angle, colours, opacity)

    def mark(self, contrast: float) -> None:
        """Add one small thing that looks like a blemish: a stroke, spot or hair, often faint."""
        shape = THIN_SHAPES[self.rng.integers(len(THIN_SHAPES))]
        radius = float(np.exp(self.rng.uniform(np.log(2), np.log(0.3 * self.size))))
        centre = (self.rng.uniform(0, self.size), self.rng.uniform(0, self.size))
        self._paint(shape, self.rng, centre, radius, self.rng.uniform(0, 2 * np.pi), None, contrast)

    def part(self, seed: int, centre: tuple[float, float], scale: float, angle: float, colours: list[Colours]) -> None:
        """Paint one copy of a part: the same few stacked shapes for the same seed."""
        rng = np.random.default_rng(seed)
        for layer in colours:
            shape = SHAPES[rng.integers(len(SHAPES))]
            offset = rng.uniform(-0.35, 0.35, 2) * scale
            at = (
                centre[0] + np.cos(angle) * offset[0] + np.sin(angle) * offset[1],
                centre[1] + np.cos(angle) * offset[1] - np.sin(angle) * offset[0],
            )
            turned = angle + rng.choice([0, np.pi / 2, np.pi / 4])
            self._paint(shape, rng, at, scale * rng.uniform(0.25, 1), turned, layer, 1)

    def shine(self) -> None:
        """Multiply by uneven light: a slope and a soft spot."""
        y = np.linspace(-1, 1, self.size, dtype=np.float32)[:, None]
        x = np.linspace(-1, 1, self.size, dtype=np.float32)[None, :]
        slope_y, slope_x = self.rng.uniform(-0.35, 0.35, 2)
        at_y, at_x = self.rng.uniform(-1, 1, 2)
        width = self.rng.uniform(0.3, 1.5)
        spot = np.exp(-((y - at_y) ** 2) / width**2) * np.exp(-((x - at_x) ** 2) / width**2)
        light = 1 + slope_y * y + slope_x * x + self.rng.uniform(-0.5, 0.5) * spot
        self.canvas *= light[..., None].astype(np.float32)

    def _patch(self, height: int, width: int) -> Bytes:
        """Cut a patch of a random texture."""
        texture = self.textures[int(self.rng.integers(len(self.textures)))]
        top = int(self.rng.integers(texture.shape[0] - height + 1))
        left = int(self.rng.integers(texture.shape[1] - width + 1))
        return texture[top : top + height, left : left + width]

    def _paint(
        self,
        shape: Shape,
        rng: Generator,
        centre: tuple[float, float],
        radius: float,
        angle: float,
        colours: Colours | None,
        opacity: float,
    ) -> None:
        stencil = place_shape(shape, rng, (self.size, self.size), centre, radius, angle)
        if stencil is None:
            return
        colours = self.new_colours() if colours is None else colours
        patch = colours[self._patch(*stencil.mask.shape)]
        below = self.canvas[stencil.rows, stencil.columns]
        below += (patch - below) * (stencil.mask * np.float32(opacity))[..., None]


def draw_canvas(rng: Generator, textures: Sequence[Bytes], size: int) -> Bytes:
    """Paint one canvas: dead leaves (60 %), a surface with a few marks (20 %), or repeated parts (20 %).

    Args:
        rng: source of all randomness.
        textures: square uint8 textures to paint with, each at least `size` a side.
        size: pixels a side.

    Returns:
        `(size, size, 3)` uint8 RGB.
    """
    painter = Painter(rng, textures, size)
    kind = rng.random()
    if kind < 0.6:
        _dead_leaves(painter)
    elif kind < 0.8:
        _marked_surface(painter)
    else:
        _part_layout(painter)
    if rng.random() < 0.5:
        painter.shine()
    return np.clip(painter.canvas, 0, 255).astype(np.uint8)


def _dead_leaves(painter: Painter) -> None:
    """Leaves on leaves; radii follow a power law, r^-3 between the smallest and the largest."""
    rng, size = painter.rng, painter.size
    painter.cover()
    smallest, largest = rng.uniform(3, 12), size * rng.uniform(0.12, 0.35)
    count = int(rng.integers(60, 220))
    quantile = rng.random(count)
    radii = (smallest**-2 + quantile * (largest**-2 - smallest**-2)) ** -0.5
    # A few large leaves first, so that the canvas is cut into regions under the small ones.
    radii[: count // 5] = rng.uniform(0.25, 1, count // 5) * largest
    for radius in radii:
        centre = (rng.uniform(0, size), rng.uniform(0, size))
        painter.paint(int(rng.integers(len(SHAPES))), centre, float(radius), rng.uniform(0, 2 * np.pi))


def _marked_surface(painter: Painter) -> None:
    """One textured surface, sometimes cut in two, with blemishes."""
    rng = painter.rng
    painter.cover(contrast=rng.uniform(0.1, 1))
    if rng.random() < 0.4:
        centre = (rng.uniform(0, painter.size), rng.uniform(0, painter.size))
        painter.paint(1, centre, painter.size * rng.uniform(0.2, 0.48), rng.uniform(0, 2 * np.pi))
    for _ in range(rng.integers(2, 40)):
        painter.mark(contrast=rng.uniform(0.1, 1))


def _part_layout(painter: Painter) -> None:
    """Copies of one to three parts on a ground, in rows or scattered, alike but for place and angle."""
    rng, size = painter.rng, painter.size
    painter.cover(contrast=rng.uniform(0, 1))
    for _ in range(rng.integers(0, 4)):  # the belt, rails, seams
        painter.paint(5, (rng.uniform(0, size), rng.uniform(0, size)), size * 0.49, rng.choice([0, np.pi / 2]))
    pitch = rng.uniform(0.08, 0.4) * size
    kinds = int(rng.integers(1, 4))
    seeds = rng.integers(0, 2**31, kinds)
    dresses = [[painter.new_colours() for _ in range(rng.integers(2, 6))] for _ in range(kinds)]
    jitter, turn = rng.choice([0, 0.05, 0.3]) * pitch, rng.choice([0, 0.05, np.pi])
    base_angle = rng.choice([0, rng.uniform(0, 2 * np.pi)])
    for y in np.arange(pitch / 2, size, pitch):
        for x in np.arange(pitch / 2, size, pitch):
            if rng.random() < 0.1:
                continue
            kind = int(rng.integers(kinds))
            centre = (y + rng.uniform(-1, 1) * jitter, x + rng.uniform(-1, 1) * jitter)
            angle = base_angle + rng.uniform(-1, 1) * turn
            painter.part(int(seeds[kind]), centre, pitch * 0.5, angle, dresses[kind])
    for _ in range(rng.integers(0, 8)):
        painter.mark(contrast=rng.uniform(0.2, 1))
