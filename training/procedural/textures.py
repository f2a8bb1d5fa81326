"""Grey surface textures drawn by formula: noise, brushed metal, weave, cells, tiles, print, tracks and the like.

A texture is `(size, size)` uint8, stretched over the whole range. Each recipe takes a generator and a size, and draws
its own frequencies, angles and amounts, so one recipe gives a wide family. Nothing here was photographed.
"""

from collections.abc import Callable
from typing import cast

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Field = NDArray[np.float32]

_FULL_TURN = 2 * np.pi


def draw_texture(rng: Generator, size: int) -> NDArray[np.uint8]:
    """Draw one texture of a random kind; a third of them are two kinds laid over each other.

    Args:
        rng: source of all randomness.
        size: pixels a side, at least 64.

    Returns:
        `(size, size)` uint8, darkest and brightest percent at 0 and 255.
    """
    field = _draw_field(rng, size)
    if rng.random() < 0.33:
        share = rng.uniform(0.2, 0.8)
        field = (1 - share) * field + share * _draw_field(rng, size)
    return _to_bytes(field)


def fractal_noise(rng: Generator, size: int) -> Field:
    """Noise with a power-law spectrum, from cloudy to nearly white."""
    return _noise_with_spectrum(rng, size, _radius(size) ** -rng.uniform(0.5, 2.2))


def brushed(rng: Generator, size: int) -> Field:
    """Noise drawn out along one direction: brushed metal, wood, rolled sheet."""
    along, across = _rotated_frequencies(size, rng.uniform(0, _FULL_TURN))
    length, width = rng.uniform(20, 150), rng.uniform(0.4, 3)
    return _noise_with_spectrum(rng, size, np.exp(-((along * length) ** 2) - (across * width) ** 2))


def oriented_noise(rng: Generator, size: int) -> Field:
    """Noise of one wavelength and direction: ripples, corduroy, rolling marks."""
    along, across = _rotated_frequencies(size, rng.uniform(0, _FULL_TURN))
    frequency, spread = rng.uniform(0.02, 0.25), rng.uniform(0.003, 0.03)
    return _noise_with_spectrum(rng, size, np.exp(-(((along - frequency) ** 2 + across**2) / (2 * spread**2))))


def grating(rng: Generator, size: int) -> Field:
    """Parallel lines, straight or warped, soft or sharp."""
    phase = _phase(rng, size, rng.uniform(0, _FULL_TURN), _log_uniform(rng, 4, 60))
    wave = np.sin(phase + rng.choice([0, 1, 3]) * _smooth_noise(rng, size, rng.uniform(30, 120)))
    return cast("Field", np.tanh(wave * rng.uniform(0.5, 8) + rng.uniform(-1, 1)))


def weave(rng: Generator, size: int) -> Field:
    """Threads that pass over and under each other."""
    angle, pitch = rng.uniform(0, _FULL_TURN), _log_uniform(rng, 6, 40)
    warp, weft = _phase(rng, size, angle, pitch), _phase(rng, size, angle + np.pi / 2, pitch * rng.uniform(0.7, 1.4))
    over = np.sin(warp / 2) * np.sin(weft / 2) > 0
    thread = np.where(over, np.abs(np.sin(warp)), rng.uniform(0.4, 1) * np.abs(np.sin(weft)))
    return cast("Field", thread + rng.uniform(0, 0.4) * _white(rng, size))


def mesh(rng: Generator, size: int) -> Field:
    """Two gratings at an angle: mesh, knurling, hatching."""
    angle, pitch = rng.uniform(0, _FULL_TURN), _log_uniform(rng, 6, 50)
    first, second = _phase(rng, size, angle, pitch), _phase(rng, size, angle + rng.uniform(0.5, 2.6), pitch)
    sharpness = rng.uniform(1, 8)
    return np.maximum(np.tanh(sharpness * np.sin(first)), np.tanh(sharpness * np.sin(second)))


def dots(rng: Generator, size: int) -> Field:
    """Dots on a lattice: perforation, halftone, beads; some lattices drop dots or vary their radius."""
    pitch = _log_uniform(rng, 7, 60)
    u, v = _lattice(rng, size, pitch)
    radius = rng.uniform(0.15, 0.5) * (1 + rng.uniform(0, 0.6) * _per_cell(rng, u, v))
    distance = np.hypot(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5)
    return cast("Field", np.tanh((radius - distance) * pitch * rng.uniform(0.2, 1)))


def cells(rng: Generator, size: int) -> Field:
    """Polygonal grains with bright, dark or flat borders: crystals, leather, foam."""
    pitch = _log_uniform(rng, 10, 90)
    u, v = _lattice(rng, size, pitch)
    column, row = np.floor(u).astype(np.int32), np.floor(v).astype(np.int32)
    seeds = rng.random((3, 64, 64), dtype=np.float32)
    nearest, second = np.full_like(u, 9), np.full_like(u, 9)
    shade = np.zeros_like(u)
    for step_row in (-1, 0, 1):
        for step_column in (-1, 0, 1):
            at = ((row + step_row) % 64, (column + step_column) % 64)
            distance = np.hypot(column + step_column + seeds[0][at] - u, row + step_row + seeds[1][at] - v)
            closer = distance < nearest
            second = np.where(closer, nearest, np.minimum(second, distance))
            shade = np.where(closer, seeds[2][at], shade)
            nearest = np.minimum(nearest, distance)
    border = np.minimum((second - nearest) * pitch / rng.uniform(1, 8), 1)
    return cast("Field", rng.uniform(-1, 1) * shade + rng.uniform(-1, 1) * border + rng.uniform(-0.6, 0.6) * nearest)


def blobs(rng: Generator, size: int) -> Field:
    """Thresholded smooth noise: stains, camouflage, corrosion, foam."""
    noise = _smooth_noise(rng, size, _log_uniform(rng, 3, 50))
    return cast("Field", np.tanh((noise - rng.uniform(-1, 1)) * rng.uniform(1, 15)))


def tiles(rng: Generator, size: int) -> Field:
    """Bricks, tiles or pixels with joints and a shade each."""
    pitch = _log_uniform(rng, 8, 120)
    u, v = _lattice(rng, size, pitch)
    u = u + rng.choice([0, 0.5]) * (np.floor(v) % 2)
    shade = _per_cell(rng, u, v)
    edge = np.minimum(np.abs(u - np.round(u)), np.abs(v - np.round(v))) * pitch
    return np.where(edge < rng.uniform(0, 3), rng.uniform(-1, 2), rng.uniform(0, 1) * shade).astype(np.float32)


def scratches(rng: Generator, size: int) -> Field:
    """Many short straight strokes of a few directions."""
    field = np.zeros((size, size), np.float32)
    for _ in range(rng.integers(1, 5)):
        along, across = _rotated_frequencies(size, rng.uniform(0, _FULL_TURN))
        stroke = np.exp(-((along * rng.uniform(10, 60)) ** 2) - (across * rng.uniform(0.5, 2)) ** 2)
        impulses = (rng.random((size, size), dtype=np.float32) < rng.uniform(0.0003, 0.004)).astype(np.float32)
        strokes = _filter(impulses, stroke)
        field += rng.uniform(-1, 1) * strokes / strokes.std().clip(1e-6)
    return cast("Field", np.clip(field, -4, 4))


def grains(rng: Generator, size: int) -> Field:
    """Speckle: sand, sponge, cast iron, terrazzo; skewed towards bright or dark specks."""
    noise = _smooth_noise(rng, size, rng.uniform(0.5, 3))
    return cast(
        "Field", np.exp(rng.uniform(0.3, 1.5) * np.clip(noise, -3, 3) * rng.choice([-1, 1])) * rng.choice([-1, 1])
    )


def marble(rng: Generator, size: int) -> Field:
    """Lines bent by fractal noise: marble, wood grain, flow marks."""
    phase = _phase(rng, size, rng.uniform(0, _FULL_TURN), _log_uniform(rng, 15, 120))
    bend = _standardise(fractal_noise(rng, size))
    return cast("Field", np.abs(np.sin(phase + rng.uniform(0.5, 4) * bend)) ** rng.uniform(0.3, 2))


def turning_marks(rng: Generator, size: int) -> Field:
    """Rings around one centre: turned, ground and polished faces."""
    y, x = _grid(size)
    radius = np.hypot(x - rng.uniform(-0.3, 1.3) * size, y - rng.uniform(-0.3, 1.3) * size)
    rings = np.interp(radius, np.arange(3 * size), _line_noise(rng, 3 * size, rng.uniform(0.7, 6)))
    return cast("Field", rings.astype(np.float32) + rng.uniform(0, 0.5) * _white(rng, size))


def printed_rows(rng: Generator, size: int) -> Field:
    """Rows of letter-like marks, as on labels and type plates."""
    scale = _log_uniform(rng, 1, 6)
    y, x = (axis / scale for axis in _grid(size))
    column, row = np.floor(x / 6).astype(np.int32), np.floor(y / 9).astype(np.int32)
    alphabet = rng.random((26, 7, 5)) < 0.5
    text = rng.integers(0, 26, (256, 256))
    gaps = rng.random((256, 256)) < rng.uniform(0.05, 0.3)
    inner_x, inner_y = (x - 6 * column).astype(np.int32), (y - 9 * row).astype(np.int32)
    at = (row % 256, column % 256)
    ink = alphabet[text[at], np.minimum(inner_y, 6), np.minimum(inner_x, 4)]
    ink &= (inner_x < 5) & (inner_y < 7) & ~gaps[at]
    return ink.astype(np.float32) + np.float32(rng.uniform(0, 0.3)) * _white(rng, size)


def tracks(rng: Generator, size: int) -> Field:
    """Etched conductor-like tracks: straight runs, bends, crossings and round pads on a grid."""
    pitch = _log_uniform(rng, 10, 60)
    u, v = _lattice(rng, size, pitch, angles=(0, np.pi / 2, np.pi / 4))
    column, row = np.floor(u).astype(np.int32) % 128, np.floor(v).astype(np.int32) % 128
    x, y = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
    # One bit for each border between two cells says whether a wire crosses it, so neighbours always agree.
    crosses_right = rng.random((128, 128)) < rng.uniform(0.3, 0.8)
    crosses_down = rng.random((128, 128)) < rng.uniform(0.3, 0.8)
    right, left = crosses_right[row, column], crosses_right[row, column - 1]
    down, up = crosses_down[row, column], crosses_down[row - 1, column]
    distance = np.full_like(u, 1)
    for present, wire in (
        (right, np.hypot(np.minimum(x, 0), y)),
        (left, np.hypot(np.maximum(x, 0), y)),
        (down, np.hypot(x, np.minimum(y, 0))),
        (up, np.hypot(x, np.maximum(y, 0))),
    ):
        distance = np.where(present, np.minimum(distance, wire), distance)
    pads = (rng.random((128, 128)) < rng.uniform(0, 0.4))[row, column]
    radius = np.where(pads, np.hypot(x, y) - rng.uniform(0.1, 0.3), 1)
    covered = np.minimum(distance - rng.uniform(0.05, 0.3), radius)
    return cast("Field", np.tanh(-covered * pitch * rng.uniform(0.5, 2)))


TEXTURES: tuple[Callable[[Generator, int], Field], ...] = (
    fractal_noise,
    brushed,
    oriented_noise,
    grating,
    weave,
    mesh,
    dots,
    cells,
    blobs,
    tiles,
    scratches,
    grains,
    marble,
    turning_marks,
    printed_rows,
    tracks,
)


def _draw_field(rng: Generator, size: int) -> Field:
    """Draw one texture, standardised."""
    recipe = TEXTURES[rng.integers(len(TEXTURES))]
    return _standardise(recipe(rng, size))


def _to_bytes(field: Field) -> NDArray[np.uint8]:
    """Stretch a field over 0 to 255, cutting a percent at each end (judged on every fourth pixel)."""
    low, high = np.percentile(field[::4, ::4], (1, 99))
    if high - low < 1e-6:
        return np.full(field.shape, 128, np.uint8)
    return cast("NDArray[np.uint8]", (np.clip((field - low) / (high - low), 0, 1) * 255).astype(np.uint8))


def _standardise(field: Field) -> Field:
    """Shift and scale to mean 0 and standard deviation 1."""
    return cast("Field", ((field - field.mean()) / max(float(field.std()), 1e-6)).astype(np.float32))


def _log_uniform(rng: Generator, low: float, high: float) -> float:
    """Draw a size so that every octave is equally likely."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _grid(size: int) -> tuple[Field, Field]:
    """Row and column numbers as `(size, 1)` and `(1, size)`."""
    axis = np.arange(size, dtype=np.float32)
    return axis[:, None], axis[None, :]


def _phase(rng: Generator, size: int, angle: float, wavelength: float) -> Field:
    """Phase of a plane wave: radians, `(size, size)`."""
    y, x = _grid(size)
    step = _FULL_TURN / wavelength
    return (
        np.float32(step * np.cos(angle)) * x
        + np.float32(step * np.sin(angle)) * y
        + np.float32(rng.uniform(0, _FULL_TURN))
    )


def _lattice(rng: Generator, size: int, pitch: float, angles: tuple[float, ...] | None = None) -> tuple[Field, Field]:
    """Coordinates `(u, v)` in cells of a square lattice, turned at random or by one of `angles`."""
    angle = rng.uniform(0, _FULL_TURN) if angles is None else angles[rng.integers(len(angles))]
    y, x = _grid(size)
    cosine, sine = np.float32(np.cos(angle) / pitch), np.float32(np.sin(angle) / pitch)
    shift_u, shift_v = rng.uniform(0, 50, 2).astype(np.float32)
    return cosine * x + sine * y + shift_u, cosine * y - sine * x + shift_v


def _per_cell(rng: Generator, u: Field, v: Field) -> Field:
    """Give every lattice cell its own random value in [-1, 1]."""
    values = rng.uniform(-1, 1, (64, 64)).astype(np.float32)
    return values[np.floor(v).astype(np.int32) % 64, np.floor(u).astype(np.int32) % 64]


def _white(rng: Generator, size: int) -> Field:
    """White noise of standard deviation 1."""
    return rng.standard_normal((size, size), dtype=np.float32)


def _radius(size: int) -> Field:
    """Distance from zero frequency in cycles a pixel, with zero itself moved to the first step."""
    radius = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    radius[0, 0] = 1 / size
    return cast("Field", radius.astype(np.float32))


def _rotated_frequencies(size: int, angle: float) -> tuple[Field, Field]:
    """Frequencies along and across a direction, in cycles a pixel."""
    y, x = np.fft.fftfreq(size)[:, None].astype(np.float32), np.fft.rfftfreq(size)[None, :].astype(np.float32)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * x + sine * y, cosine * y - sine * x


def _filter(field: Field, response: Field) -> Field:
    """Multiply a field's spectrum by a real response."""
    return np.fft.irfft2(np.fft.rfft2(field) * response, s=field.shape).astype(np.float32)


def _noise_with_spectrum(rng: Generator, size: int, response: Field) -> Field:
    """White noise, filtered."""
    return _filter(_white(rng, size), response)


def _smooth_noise(rng: Generator, size: int, scale: float) -> Field:
    """Noise without detail below `scale` pixels, standardised."""
    return _standardise(_noise_with_spectrum(rng, size, np.exp(-((_radius(size) * scale) ** 2) * 4)))


def _line_noise(rng: Generator, length: int, scale: float) -> Field:
    """One-dimensional noise without detail below `scale` steps, standardised."""
    spectrum = np.fft.rfft(rng.standard_normal(length)) * np.exp(-((np.fft.rfftfreq(length) * scale) ** 2) * 4)
    return _standardise(np.fft.irfft(spectrum, n=length).astype(np.float32))
