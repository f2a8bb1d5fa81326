"""Promises of raw sensor bytes, each format against its own plain reference in numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contract.frames import FrameLimits, decode_image
from service.contract.raw_frames import PIXEL_FORMATS, decode_raw
from service.errors import CallerError, FrameTooLarge, ParameterInvalid, UnreadableFrame
from tests.factories import encode

LIMITS = FrameLimits()
HEIGHT, WIDTH = 6, 10
MOSAICS = {
    "BayerRG8": ((0, 1), (1, 2)),
    "BayerGR8": ((1, 0), (2, 1)),
    "BayerGB8": ((1, 2), (0, 1)),
    "BayerBG8": ((2, 1), (1, 0)),
}
BITS = {"Mono10": 16, "Mono12": 16, "Mono16": 16, "Mono10p": 10, "Mono12p": 12, "RGB8": 24, "BGR8": 24}
DEPTH = {"Mono10": 10, "Mono12": 12, "Mono16": 16, "Mono10p": 10, "Mono12p": 12}


def row_bytes(pixel_format, width=WIDTH):
    """Return how many bytes a row of pixels needs."""
    return -(-width * BITS.get(pixel_format, 8) // 8)


def pack(words, bits):
    """Write each row as one long number whose lowest bits are the first pixel: PFNC's `p`, said in plain integers."""
    size = -(-words.shape[1] * bits // 8)
    rows = (sum(int(value) << (bits * place) for place, value in enumerate(row)) for row in words)
    return b"".join(row.to_bytes(size, "little") for row in rows)


def sensor(pixel_format, height=HEIGHT, width=WIDTH, seed=0):
    """Return what a camera of this format would send, and the RGB that it means."""
    generator = np.random.default_rng(seed)
    if pixel_format in DEPTH:
        words = generator.integers(0, 2 ** DEPTH[pixel_format], (height, width))
        sent = pack(words, BITS[pixel_format]) if pixel_format.endswith("p") else words.astype("<u2").tobytes()
        return sent, np.stack([words // 2 ** (DEPTH[pixel_format] - 8)] * 3, axis=-1)
    if pixel_format in ("RGB8", "BGR8"):
        colours = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
        return colours.tobytes(), colours if pixel_format == "RGB8" else colours[:, :, [2, 1, 0]]
    grey = generator.integers(0, 256, (height, width)).astype(np.uint8)
    if pixel_format in MOSAICS:
        return grey.tobytes(), demosaic(grey, MOSAICS[pixel_format])
    return grey.tobytes(), np.stack([grey] * 3, axis=-1)


def demosaic(mosaic, cell):
    """Interpolate a mosaic of cells of two by two colours bilinearly; the rim repeats its inner neighbour."""
    height, width = mosaic.shape
    colour_at = lambda y, x: cell[y % 2][x % 2]  # noqa: E731 - a table with two indices
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
    row = row_bytes(pixel_format)
    padded = b"".join(data[at : at + row] + b"\xaa" * padding for at in range(0, len(data), row))

    frame = decode_raw(padded, pixel_format, WIDTH, HEIGHT, row + padding, LIMITS)

    np.testing.assert_array_equal(frame.pixels, expected)
    assert (frame.height, frame.width, frame.pixels.dtype) == (HEIGHT, WIDTH, np.uint8)


@pytest.mark.parametrize("pixel_format", PIXEL_FORMATS)
@pytest.mark.parametrize("difference", [-1, 1, -WIDTH])
def test_raw_frame_when_the_byte_count_is_wrong_is_refused(pixel_format, difference):
    """Missing or surplus bytes are refused with both numbers, never padded or cut."""
    data, _ = sensor(pixel_format)
    wrong = data + b"\0" if difference > 0 else data[:difference]

    with pytest.raises(UnreadableFrame, match=f"is {len(data)} bytes, but {len(wrong)} arrived"):
        decode_raw(wrong, pixel_format, WIDTH, HEIGHT, row_bytes(pixel_format), LIMITS)


@pytest.mark.parametrize("pixel_format", PIXEL_FORMATS)
def test_raw_frame_when_the_stride_is_shorter_than_a_row_is_refused(pixel_format):
    """A stride that would let rows overlap is the caller's mistake."""
    stride = row_bytes(pixel_format) - 1

    with pytest.raises(ParameterInvalid, match=f"stride is {stride} bytes"):
        decode_raw(b"\0" * stride * HEIGHT, pixel_format, WIDTH, HEIGHT, stride, LIMITS)


@pytest.mark.parametrize(("width", "height"), [(0, 4), (4, 0), (-4, 4), (4, -4), (-4, -4)])
def test_raw_frame_when_a_size_is_not_positive_is_refused(width, height):
    """Sizes are checked before they are multiplied."""
    with pytest.raises(ParameterInvalid, match="positive"):
        decode_raw(b"\0" * 16, "Mono8", width, height, None, LIMITS)


@pytest.mark.parametrize(("width", "height"), [(5, 4), (4, 5), (2, 2), (2, 8), (8, 2)])
@pytest.mark.parametrize("pixel_format", MOSAICS)
def test_raw_frame_when_a_mosaic_is_odd_or_tiny_is_refused(pixel_format, width, height):
    """A mosaic without whole cells, or too small to interpolate, is refused rather than painted black."""
    with pytest.raises(ParameterInvalid, match="even width and height of at least 4"):
        decode_raw(b"\7" * (width * height), pixel_format, width, height, None, LIMITS)


@pytest.mark.parametrize(("pixel_format", "smallest_wrong"), [("Mono10", 1 << 10), ("Mono12", 1 << 12)])
def test_raw_frame_when_a_value_has_too_many_bits_is_refused(pixel_format, smallest_wrong):
    """A 12-bit camera that says 10 bits is found out."""
    words = np.array([[0, smallest_wrong]], "<u2")

    with pytest.raises(UnreadableFrame, match=f"not {pixel_format}"):
        decode_raw(words.tobytes(), pixel_format, 2, 1, None, LIMITS)


@pytest.mark.parametrize("bit_depth", [8, 10, 12, 14, 16])
def test_raw_frame_when_it_is_mono16_then_is_read_as_a_file_of_sixteen_bits_is(bit_depth):
    """A 12-bit camera's words give the same pixels raw and as PNG: those that its line was trained on."""
    words = np.random.default_rng(3).integers(0, 2**bit_depth, (HEIGHT, WIDTH)).astype("<u2")

    frame = decode_raw(words.tobytes(), "Mono16", WIDTH, HEIGHT, None, LIMITS, bit_depth)

    np.testing.assert_array_equal(frame.pixels, decode_image(encode(words), LIMITS, bit_depth=bit_depth).pixels)
    assert frame.pixels.max() > 127


def test_raw_frame_when_mono16_has_more_bits_than_the_line_is_refused():
    """Values in the upper end of the words are not of the camera that the line was trained on."""
    words = np.array([[0, 1 << 12]], "<u2")

    with pytest.raises(UnreadableFrame, match="more than 12 bits"):
        decode_raw(words.tobytes(), "Mono16", 2, 1, None, LIMITS, 12)


@pytest.mark.parametrize(
    ("pixel_format", "bit_depth", "right"),
    [("Mono12", 10, "Mono10"), ("Mono12p", 10, "Mono10"), ("Mono10", 8, "Mono8"), ("Mono12", 11, "Mono16")],
)
def test_raw_frame_when_its_format_has_more_bits_than_the_line_then_the_right_one_is_named(
    pixel_format, bit_depth, right
):
    """A camera that was set to other bits than the line's is found out by name, however dark its frames are."""
    with pytest.raises(ParameterInvalid, match=f"this line have {bit_depth}; send {right},"):
        decode_raw(bytes(48), pixel_format, 4, 1, 48, LIMITS, bit_depth)


@pytest.mark.parametrize("pixel_format", PIXEL_FORMATS)
def test_raw_frame_when_its_format_has_no_more_bits_than_the_line_then_its_own_count(pixel_format):
    """A format that says its bits is read by them, and one of eight bits knows nothing of the line's."""
    data, _ = sensor(pixel_format, width=12)
    shallow = bytes(len(data)) if pixel_format == "Mono16" else data

    frame = decode_raw(shallow, pixel_format, 12, HEIGHT, None, LIMITS, 12)

    np.testing.assert_array_equal(frame.pixels, decode_raw(shallow, pixel_format, 12, HEIGHT, None, LIMITS).pixels)


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


@pytest.mark.parametrize("pixel_format", PIXEL_FORMATS)
def test_raw_frame_when_rows_follow_each_other_needs_no_stride(pixel_format):
    """Without padding the sizes say everything."""
    width = 12  # whole bytes of every format
    data, expected = sensor(pixel_format, width=width)

    np.testing.assert_array_equal(decode_raw(data, pixel_format, width, HEIGHT, None, LIMITS).pixels, expected)


@given(st.sampled_from(["Mono10p", "Mono12p"]), st.integers(1, 13), st.integers(1, 4), st.data())
def test_raw_frame_when_packed_gives_what_the_unpacked_format_gives(pixel_format, width, height, data):
    """Packing saves bytes and changes no pixel, whatever width leaves bits over at the end of a row."""
    depth = DEPTH[pixel_format]
    values = data.draw(st.lists(st.integers(0, 2**depth - 1), min_size=width * height, max_size=width * height))
    words = np.array(values, np.uint16).reshape(height, width)

    packed = decode_raw(pack(words, depth), pixel_format, width, height, row_bytes(pixel_format, width), LIMITS)

    plain = decode_raw(words.astype("<u2").tobytes(), pixel_format[:-1], width, height, None, LIMITS)
    np.testing.assert_array_equal(packed.pixels, plain.pixels)


@pytest.mark.parametrize(
    ("pixel_format", "data", "pixels"),
    [
        # Pixels 0x3FF, 0, 0x3FF, 0: bits 0 to 9 and 20 to 29, lowest first.
        ("Mono10p", b"\xff\x03\xf0\x3f\x00", [255, 0, 255, 0]),
        # Pixels 0x123, 0xABC: 0x23, then 0xC over 0x1, then 0xAB.
        ("Mono12p", b"\x23\xc1\xab", [0x12, 0xAB]),
    ],
)
def test_raw_frame_when_packed_reads_the_lowest_bits_first(pixel_format, data, pixels):
    """The standard's own bit order, written out by hand."""
    frame = decode_raw(data, pixel_format, len(pixels), 1, None, LIMITS)

    assert frame.pixels[0, :, 0].tolist() == pixels


@pytest.mark.parametrize(("pixel_format", "width"), [("Mono10p", 5), ("Mono12p", 3)])
def test_raw_frame_when_packed_rows_end_within_a_byte_needs_its_stride(pixel_format, width):
    """Where the next row begins is not guessed."""
    with pytest.raises(ParameterInvalid, match="name the stride"):
        decode_raw(bytes(64), pixel_format, width, 1, None, LIMITS)


@pytest.mark.parametrize("pixel_format", ["Mono8", "RGB8"])
def test_raw_frame_when_nothing_changes_is_a_view_of_what_arrived(pixel_format):
    """Five megapixels are not copied to be looked at."""
    data, _ = sensor(pixel_format)

    pixels = decode_raw(data, pixel_format, WIDTH, HEIGHT, None, LIMITS).pixels

    assert np.shares_memory(pixels, np.frombuffer(data, np.uint8))
