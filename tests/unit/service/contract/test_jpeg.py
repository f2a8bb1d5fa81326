"""Promises of the quick way of clean JPEGs: Pillow's pixels to the bit, and nothing of a file that is not clean."""

import io

import numpy as np
import pytest
from PIL import Image

from service.contract.jpeg import decode_clean
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
        pytest.param(lambda _: b"", id="everything"),
    ],
)
def test_decoding_when_libjpeg_would_mend_something_then_says_so(damage):
    """What is lost is never made up; whoever looks closely decides."""
    data = damage(write(restart_marker_blocks=3))

    assert decode_clean(data, (HEIGHT, WIDTH), (HEIGHT, WIDTH), is_grey=False) is None


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
