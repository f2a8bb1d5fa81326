"""Brushed-metal plates, good ones and scratched ones: a product line that needs no camera and belongs to nobody."""

from collections.abc import Iterator

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

PLATE_SIDE = 384

_HOLES = ((0.22, 0.22), (0.22, 0.78), (0.78, 0.22), (0.78, 0.78))


def draw_plates(seed: int, *, scratched: bool = False) -> Iterator[NDArray[np.uint8]]:
    """Draw plate after plate without end, `(384, 384, 3)` uint8 RGB each; equal seeds give equal plates."""
    rng = np.random.default_rng(seed)
    while True:
        yield draw_plate(rng, scratched=scratched)


def draw_plate(rng: Generator, *, scratched: bool) -> NDArray[np.uint8]:
    """Return one plate, `(384, 384, 3)` uint8 RGB: brushed metal, four holes and a bore, never quite in place."""
    y, x = np.mgrid[0:PLATE_SIDE, 0:PLATE_SIDE].astype(np.float32) / PLATE_SIDE
    x, y = x + rng.normal(0, 0.006), y + rng.normal(0, 0.006)
    streaks = rng.normal(0, 1, (PLATE_SIDE, PLATE_SIDE + 64)).astype(np.float32)
    streaks = np.cumsum(streaks, axis=1)
    metal = 148 + 1.1 * (streaks[:, 64:] - streaks[:, :-64]) + 26 * np.cos(5 * (x - 0.4))
    if scratched:
        middle = 0.40 + 0.30 * (x - 0.1) + 0.02 * np.sin(17 * x)
        near = np.exp(-(((y - middle) / 0.0035) ** 2)) * ((x > 0.16) & (x < 0.52))
        metal += 85 * near - 45 * np.roll(near, 3, axis=0)
    for centre_y, centre_x in _HOLES:
        metal = _bore(metal, np.hypot(y - centre_y, x - centre_x), 0.055)
    metal = _bore(metal, np.hypot(y - 0.5, x - 0.5), 0.13)
    outside = (np.abs(x - 0.5) > 0.45) | (np.abs(y - 0.5) > 0.45)
    metal = np.where(outside, 34, metal) + rng.normal(0, 3, metal.shape)
    tinted: NDArray[np.float64] = metal[..., None] * np.array([1.0, 0.99, 0.95])
    return tinted.clip(0, 255).astype(np.uint8)


def _bore(metal: NDArray[np.float32], distance: NDArray[np.float32], radius: float) -> NDArray[np.float32]:
    rim = 50 * np.exp(-(((distance - radius - 0.012) / 0.008) ** 2))
    return np.where(distance < radius, 22, metal + rim).astype(np.float32)
