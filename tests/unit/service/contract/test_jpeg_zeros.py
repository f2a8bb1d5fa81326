"""Promises about stretches of zeros in a JPEG: what was lost is told from what is a picture of nothing."""

import struct

import numpy as np
import pytest

from service.contract.frames import FrameLimits, decode_image
from service.contract.jpeg_segments import START_OF_SCAN, segments
from service.contract.jpeg_zeros import holds_lost_stretch
from service.errors import UnreadableFrame
from tests.factories import encode

BLOCK = 512
_ROWS, _COLUMNS = np.mgrid[:128, :160]
_SHADE = 100 + 40 * np.sin(_COLUMNS / 30) + 20 * np.cos(_ROWS / 20)
NOISE = np.clip(_SHADE[:, :, None] + np.random.default_rng(0).normal(0, 8, (128, 160, 3)), 0, 255).astype(np.uint8)
KINDS = {
    "grey": (NOISE[:, :, 0], {"quality": 95}),
    "rgb": (NOISE, {"quality": 95}),
    "full chroma": (NOISE, {"quality": 90, "subsampling": 0}),
    "own tables": (NOISE, {"quality": 95, "optimize": True}),
    "restarts": (NOISE, {"quality": 95, "restart_marker_blocks": 16}),
}


def _begin_of_scan(data: bytes) -> int:
    return next(end for marker, _, end in segments(data) if marker == START_OF_SCAN)


@pytest.mark.parametrize(("pixels", "options"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("target", [None, (32, 40)], ids=["full", "scaled"])
def test_decoding_when_a_block_of_a_jpeg_is_zeros_is_refused(pixels, options, target):
    """Wherever the block lies, the last one before the end included, which leaves nothing over to be noticed."""
    data = encode(pixels, "JPEG", **options)
    decode_image(data, FrameLimits(), target)

    for at in range(_begin_of_scan(data), len(data) - 2 - BLOCK, 61):
        with pytest.raises(UnreadableFrame, match="damaged or truncated"):
            decode_image(data[:at] + bytes(BLOCK) + data[at + BLOCK :], FrameLimits(), target)


def test_stretch_when_the_codec_would_say_nothing_of_it_is_found_all_the_same():
    """The look at the bytes does not need the decoder's luck."""
    for pixels, options in KINDS.values():
        data = encode(pixels, "JPEG", **options)
        at = len(data) // 2

        assert not holds_lost_stretch(data)
        assert holds_lost_stretch(data[:at] + bytes(BLOCK) + data[at + BLOCK :])


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize(
    "options", [{}, {"optimize": True}, {"progressive": True}], ids=["usual", "own", "progressive"]
)
def test_decoding_when_a_picture_is_coded_as_zeros_returns_it(value, options):
    """Where zero bits mean that a block ends, a flat picture is a long stretch of them."""
    data = encode(np.full((1024, 1024), value, np.uint8), "JPEG", **options)

    assert (decode_image(data, FrameLimits()).pixels == value).all()
    if "optimize" in options:
        assert bytes(BLOCK) in data


def test_decoding_when_zeros_are_no_pixels_returns_the_frame():
    """Padded notes before the picture and whatever follows it are no loss."""
    data = encode(NOISE, "JPEG", quality=95)
    note = b"\xff\xeb" + struct.pack(">H", 2 + BLOCK) + bytes(BLOCK)

    padded = data[:2] + note + data[2:] + bytes(BLOCK)

    np.testing.assert_array_equal(decode_image(padded, FrameLimits()).pixels, decode_image(data, FrameLimits()).pixels)
