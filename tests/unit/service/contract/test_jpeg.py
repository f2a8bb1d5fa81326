"""Promises of the quick way of clean JPEGs: Pillow's pixels to the bit, and nothing of a file that is not clean."""

import io

import numpy as np
import pytest
from PIL import Image

from service.contract.jpeg import PixelsMadeUp, decode_clean
from tests.factories import make_frame

HEIGHT, WIDTH = 97, 161  # no multiple of any block
KINDS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "full chroma": {"subsampling": 0},
    "half chroma": {"subsampling": 1},
    "restarts": {"restart_marker_blocks": 3},
    "coarse": {"quality": 20},
    "stored as RGB": {"keep_rgb": True},
}


def write(mode="RGB", **options) -> bytes:
    """Return a frame as a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(make_frame(HEIGHT, WIDTH, seed=6)).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_decoding_when_the_file_is_clean_then_pixels_are_pillows(options, mode, scale):
    """Thresholds that were found on one of them hold on the other."""
    data = write(mode, **options)
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (WIDTH // scale, HEIGHT // scale))
        expected = np.asarray(image)

    pixels = decode_clean(data, (HEIGHT, WIDTH), expected.shape[:2], is_grey=mode == "L")

    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-2], id="end"),
        pytest.param(lambda data: data[: len(data) // 2] + b"\xff\xd9", id="half"),
        pytest.param(
            lambda data: data[: data.rindex(b"\xff\xd1") + 2] + data[data.rindex(b"\xff\xd2") :], id="stretch"
        ),
    ],
)
def test_decoding_when_libjpeg_would_mend_something_then_says_so(damage):
    """What is lost is never made up."""
    data = damage(write(restart_marker_blocks=3))

    with pytest.raises(PixelsMadeUp):
        decode_clean(data, (HEIGHT, WIDTH), (HEIGHT, WIDTH), is_grey=False)


@pytest.mark.parametrize(
    ("left", "is_padding"),
    [
        pytest.param(bytes(20), True, id="zeros"),
        pytest.param(b"\x55" * 63, True, id="one value"),
        pytest.param(bytes(range(1, 30)), False, id="data"),
        pytest.param(bytes(200), False, id="too many"),
    ],
)
def test_decoding_when_bytes_are_left_before_the_end_then_only_a_little_padding_is_let_pass(left, is_padding):
    """Cameras fill up their last word; what is left of a scan that lost its beginning looks otherwise."""
    whole = write()

    def decode():
        return decode_clean(whole[:-2] + left + whole[-2:], (HEIGHT, WIDTH), (HEIGHT, WIDTH), is_grey=False)

    if is_padding:
        assert decode() is None
    else:
        with pytest.raises(PixelsMadeUp):
            decode()


def test_decoding_when_it_is_no_jpeg_then_there_is_nothing():
    """Whoever looks closely says what is wrong with it."""
    assert decode_clean(b"", (HEIGHT, WIDTH), (HEIGHT, WIDTH), is_grey=False) is None


@pytest.mark.parametrize(
    ("size", "is_grey"),
    [
        pytest.param((HEIGHT - 1, WIDTH), False, id="size"),
        pytest.param((HEIGHT, WIDTH), True, id="layout"),
    ],
)
def test_decoding_when_the_header_was_read_otherwise_then_nothing_is_decoded(size, is_grey):
    """Limits were held against what was told: two readers of one header must not be played off against each other."""
    assert decode_clean(write(), size, size, is_grey=is_grey) is None
