"""Promises of raw sensor bytes, each format against its own plain reference in numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contract.frames import FrameLimits
from service.contract.raw_frames import PIXEL_FORMATS, decode_raw
from service.errors import CallerError, FrameTooLarge, ParameterInvalid, UnreadableFrame

LIMITS = FrameLimits()
HEIGHT, WIDTH = 6, 10
BYTES = {"Mono8": 1, "Mono10": 2, "Mono12": 2, "Mono16": 2, "BayerRG8": 1, "RGB8": 3, "BGR8": 3}
DEPTH = {"Mono10": 10, "Mono12": 12, "Mono16": 16}


def sensor(pixel_format, height=HEIGHT, width=WIDTH, seed=0):
    """Return what a camera of this format would send, and the RGB that it means."""
    generator = np.random.default_rng(seed)
    if pixel_format in DEPTH:
        words = generator.integers(0, 2 ** DEPTH[pixel_format], (height, width))
        return words.astype("<u2").tobytes(), np.stack([words // 2 ** (DEPTH[pixel_format] - 8)] * 3, axis=-1)
    if pixel_format in ("RGB8", "BGR8"):
        colours = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
        return colours.tobytes(), colours if pixel_format == "RGB8" else colours[:, :, [2, 1, 0]]
    grey = generator.integers(0, 256, (height, width)).astype(np.uint8)
    return grey.tobytes(), demosaic(grey) if pixel_format == "BayerRG8" else np.stack([grey] * 3, axis=-1)


def demosaic(mosaic):
    """Interpolate an RGGB mosaic bilinearly, pixel by pixel; the rim repeats its inner neighbour."""
    height, width = mosaic.shape
    colour_at = lambda y, x: ((0, 1), (1, 2))[y % 2][x % 2]  # noqa: E731 - a table with two indices
    rgb = np.zeros((height, width, 3), np.int64)
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            for colour in range(3):
                if colour_at(y, x) == colour:
                    rgb[y, x, colour] = mosaic[y, x]
                    continue
                values = [int(mosaic[place]) for place in around if colour_at(*place) == colour]
                rgb[y, x, colour] = (sum(values) + len(values) // 2) // len(values)
    rgb[0], rgb[-1] = rgb[1], rgb[-2]
    rgb[:, 0], rgb[:, -1] = rgb[:, 1], rgb[:, -2]
    return rgb


@pytest.mark.parametrize("pixel_format", PIXEL_FORMATS)
@pytest.mark.parametrize("padding", [0, 1, 7])
def test_raw_frame_when_rows_are_padded_or_not_gives_the_very_pixels(pixel_format, padding):
    """Every format is bit-exact against its plain reference, and padding between rows is never seen."""
    data, expected = sensor(pixel_format)
    row = WIDTH * BYTES[pixel_format]
    padded = b"".join(data[at : at + row] + b"\xaa" * padding for at in range(0, len(data), row))

    frame = decode_raw(padded, pixel_format, WIDTH, HEIGHT, row + padding if padding else None, LIMITS)

    np.testing.assert_array_equal(frame.pixels, expected)
    assert (frame.height, frame.width, frame.pixels.dtype) == (HEIGHT, WIDTH, np.uint8)
    assert frame.pixels.flags.c_contiguous


@pytest.mark.parametrize("pixel_format", PIXEL_FORMATS)
@pytest.mark.parametrize("difference", [-1, 1, -WIDTH])
def test_raw_frame_when_the_byte_count_is_wrong_is_refused(pixel_format, difference):
    """Missing or surplus bytes are refused with both numbers, never padded or cut."""
    data, _ = sensor(pixel_format)
    wrong = data + b"\0" if difference > 0 else data[:difference]

    with pytest.raises(UnreadableFrame, match=f"is {len(data)} bytes, but {len(wrong)} arrived"):
        decode_raw(wrong, pixel_format, WIDTH, HEIGHT, None, LIMITS)


@pytest.mark.parametrize("pixel_format", PIXEL_FORMATS)
def test_raw_frame_when_the_stride_is_shorter_than_a_row_is_refused(pixel_format):
    """A stride that would let rows overlap is the caller's mistake."""
    stride = WIDTH * BYTES[pixel_format] - 1

    with pytest.raises(ParameterInvalid, match=f"stride is {stride} bytes"):
        decode_raw(b"\0" * stride * HEIGHT, pixel_format, WIDTH, HEIGHT, stride, LIMITS)


@pytest.mark.parametrize(("width", "height"), [(0, 4), (4, 0), (-4, 4), (4, -4), (-4, -4)])
def test_raw_frame_when_a_size_is_not_positive_is_refused(width, height):
    """Sizes are checked before they are multiplied."""
    with pytest.raises(ParameterInvalid, match="positive"):
        decode_raw(b"\0" * 16, "Mono8", width, height, None, LIMITS)


@pytest.mark.parametrize(("width", "height"), [(5, 4), (4, 5), (2, 2), (2, 8), (8, 2)])
def test_raw_frame_when_a_mosaic_is_odd_or_tiny_is_refused(width, height):
    """A mosaic without whole cells, or too small to interpolate, is refused rather than painted black."""
    with pytest.raises(ParameterInvalid, match="even width and height of at least 4"):
        decode_raw(b"\7" * (width * height), "BayerRG8", width, height, None, LIMITS)


@pytest.mark.parametrize(("pixel_format", "smallest_wrong"), [("Mono10", 1 << 10), ("Mono12", 1 << 12)])
def test_raw_frame_when_a_value_has_too_many_bits_is_refused(pixel_format, smallest_wrong):
    """A 12-bit camera that says 10 bits is found out."""
    words = np.array([[0, smallest_wrong]], "<u2")

    with pytest.raises(UnreadableFrame, match=f"not {pixel_format}"):
        decode_raw(words.tobytes(), pixel_format, 2, 1, None, LIMITS)


@pytest.mark.parametrize(
    "limits", [FrameLimits(max_pixels=WIDTH * HEIGHT - 1), FrameLimits(max_bytes=WIDTH * HEIGHT - 1)]
)
def test_raw_frame_when_over_a_limit_is_refused(limits):
    """Raw frames obey the limits of encoded ones."""
    with pytest.raises(FrameTooLarge):
        decode_raw(bytes(WIDTH * HEIGHT), "Mono8", WIDTH, HEIGHT, None, limits)


@given(
    st.binary(max_size=64),
    st.sampled_from(PIXEL_FORMATS),
    st.integers(-2, 9),
    st.integers(-2, 9),
    st.none() | st.integers(-2, 40),
)
def test_raw_frame_when_anything_arrives_gives_a_frame_or_the_callers_error(data, pixel_format, width, height, stride):
    """No combination of bytes and sizes raises anything but the caller's errors."""
    try:
        frame = decode_raw(data, pixel_format, width, height, stride, LIMITS)
    except CallerError:
        return

    assert frame.pixels.shape == (height, width, 3)
