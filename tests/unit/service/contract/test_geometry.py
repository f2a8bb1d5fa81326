"""Promises of sizes and windows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.contract.geometry import InputSpec, plain_input
from tests.factories import make_input

SIDES = st.integers(1, 2000)


@given(SIDES, SIDES, SIDES, SIDES)
def test_window_when_nothing_is_cropped_is_the_whole_frame(height, width, frame_height, frame_width):
    """Without a crop every pixel is inspected."""
    top, left, window_height, window_width = plain_input(height, width).window(frame_height, frame_width)

    assert (top, left) == (0, 0)
    assert (window_height, window_width) == (pytest.approx(frame_height), pytest.approx(frame_width))


def test_window_when_the_centre_is_cropped_tells_what_is_inspected():
    """448 to 392 inspects the inner seven eighths, in pixels of the frame, height first."""
    spec = make_input(height=392, width=392, margin=28)

    assert spec.window(896, 1792) == (56, 112, 784, 1568)


@given(SIDES, SIDES, st.integers(0, 50), SIDES, SIDES)
def test_window_when_cropped_lies_inside_and_in_the_middle(height, width, margin, frame_height, frame_width):
    """The rim that is cut away is as wide on both sides."""
    top, left, h, w = make_input(height, width, margin).window(frame_height, frame_width)

    assert 2 * top + h == pytest.approx(frame_height)
    assert 2 * left + w == pytest.approx(frame_width)


def test_resize_target_when_cropped_is_the_size_before_the_crop():
    """The decoder aims at what the resize needs, which is more than what the network sees."""
    assert make_input(height=32, width=48, margin=4).resize_target == (40, 56)


@pytest.mark.parametrize("sizes", [(9, 8, 8, 8), (8, 9, 8, 8), (0, 8, 8, 8), (8, 8, 8, 9000), (-1, 8, 8, 8)], ids=str)
def test_input_when_sizes_make_no_sense_is_refused(sizes):
    """A crop larger than its frame, or a side that is none, is refused at reading."""
    height, width, resize_height, resize_width = sizes

    with pytest.raises(ValidationError):
        InputSpec(height=height, width=width, resize_height=resize_height, resize_width=resize_width)
