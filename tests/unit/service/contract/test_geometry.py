"""Promises of sizes and windows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.contract.geometry import InputSpec, Tiling, plain_input
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


def test_window_when_frames_are_cut_is_what_all_tiles_cover():
    """Six tiles of 256 that overlap by a quarter inspect the whole frame, or all but the rim where that is cropped."""
    tiling = Tiling(rows=3, columns=2, overlap_height=64, overlap_width=64)

    whole, cropped = make_input(256, 256, 0, tiling), make_input(256, 256, 32, tiling)

    assert (whole.canvas_height, whole.canvas_width) == (640, 448)
    assert whole.resize_target == (640, 448)
    assert whole.window(1280, 896) == (0, 0, 1280, 896)
    assert cropped.window(704, 512) == (32, 32, 640, 448)


def test_stitched_size_when_maps_are_coarser_is_that_of_the_canvas_at_the_maps_resolution():
    """Map and canvas keep one proportion."""
    spec = make_input(256, 192, tiles=Tiling(rows=3, columns=2, overlap_height=64, overlap_width=48))

    assert spec.stitched_size(128, 96) == (320, 168)
    assert plain_input(256, 192).stitched_size(128, 96) == (128, 96)


@pytest.mark.parametrize(
    "tiling",
    [
        {"rows": 2, "columns": 2, "overlap_height": 17, "overlap_width": 0},
        {"rows": 2, "columns": 2, "overlap_height": 0, "overlap_width": 25},
        {"rows": 0, "columns": 2, "overlap_height": 0, "overlap_width": 0},
        {"rows": 9, "columns": 9, "overlap_height": 0, "overlap_width": 0},
        {"rows": 2, "columns": 2, "overlap_height": -1, "overlap_width": 0},
    ],
    ids=["too far down", "too far across", "no row", "too many", "gaps"],
)
def test_input_when_tiles_make_no_sense_is_refused(tiling):
    """Tiles that overlap by more than a half, leave gaps, or are too many or none, are refused at reading."""
    fields = {"height": 32, "width": 48, "resize_height": 4000, "resize_width": 4000}

    with pytest.raises(ValidationError):
        InputSpec.model_validate(fields | {"tiles": tiling})


def test_input_when_tiles_cover_more_than_the_frame_is_refused():
    """A canvas is cut out of the resized frame, which must be large enough."""
    tiles = Tiling(rows=2, columns=1, overlap_height=0, overlap_width=0)

    with pytest.raises(ValidationError, match="not cover more"):
        InputSpec(height=32, width=48, resize_height=63, resize_width=48, tiles=tiles)
