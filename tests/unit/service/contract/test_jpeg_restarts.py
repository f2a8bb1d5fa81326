"""Promises of restart markers: a stretch that is lost is noticed, and no sound file is refused."""

import re

import numpy as np
import pytest

from service.contract.frames import FrameLimits, decode_image
from service.contract.jpeg_restarts import restarts_fit
from service.errors import UnreadableFrame
from tests.factories import encode, make_frame

_RESTART = re.compile(rb"\xff[\xd0-\xd7]")


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 9, 3), (64, 80), (33, 17, 3), (130, 641)])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("restarts", [{}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 3}])
def test_file_when_sound_then_fits(shape, progressive, restarts):
    """Every size, subsampling and interval of a sound file is accepted."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    for subsampling in (0, 1, 2):
        data = encode(pixels, "JPEG", subsampling=subsampling, progressive=progressive, **restarts)
        assert restarts_fit(data, closely=True)


@pytest.mark.parametrize("lost", ["marker", "stretch", "order"])
def test_frame_when_a_stretch_between_two_markers_is_lost_then_unreadable(lost):
    """The codec would fill it with grey, and a defect that was there would be gone."""
    data = encode(make_frame(defect=True), "JPEG", quality=95, restart_marker_rows=1)
    first, second = [match.start() for match in _RESTART.finditer(data)][1:3]
    damaged = {
        "marker": data[:first] + data[first + 2 :],
        "stretch": data[:first] + data[second:],
        "order": data[:first] + b"\xff\xd6" + data[first + 2 :],
    }[lost]

    with pytest.raises(UnreadableFrame, match="damaged"):
        decode_image(damaged, FrameLimits())


def test_frame_when_its_head_names_another_size_than_its_markers_then_unreadable():
    """A width that was changed in the head does not make another picture of the same data."""
    data = bytearray(encode(make_frame(), "JPEG", restart_marker_rows=1))
    size_at = data.index(b"\xff\xc0") + 5
    data[size_at + 2 : size_at + 4] = (200).to_bytes(2, "big")

    with pytest.raises(UnreadableFrame):
        decode_image(bytes(data), FrameLimits())
