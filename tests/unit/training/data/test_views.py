"""Promises of what fitting sees: tiles are frames of their own, and few frames are looked at in many ways."""

import numpy as np
import pytest

from service.contract.geometry import Tiling
from service.contract.tiling import cut_tiles
from tests.factories import make_input
from training.data.loader import MemoryFrames
from training.data.views import TileFrames, inputs_of_frame, views_of

SPEC = make_input(8, 6, tiles=Tiling(rows=2, columns=2, overlap_height=2, overlap_width=2))


@pytest.fixture
def frames():
    """Three canvases of noise, the last of another line."""
    noise = np.random.default_rng(0).integers(0, 256, (3, SPEC.canvas_height, SPEC.canvas_width, 3))
    return MemoryFrames(noise.astype(np.uint8), [0, 0, 1])


def test_tiles_when_taken_then_are_those_that_the_network_will_be_shown(frames):
    """A frame's tiles are neighbours, cut as the service cuts them, in whatever order they are taken."""
    cut = np.concatenate([cut_tiles(canvas, SPEC) for canvas in frames.take([0, 1, 2])])
    tiles = TileFrames(frames, SPEC)

    assert len(tiles) == 12 == len(frames) * inputs_of_frame(SPEC, makes_views=False)
    np.testing.assert_array_equal(tiles.take([11, 0, 5, 0]), cut[[11, 0, 5, 0]])


def test_tiles_when_taken_then_show_the_line_of_their_frame(frames):
    """A line-conditioned detector is told the right line of every tile."""
    assert TileFrames(frames, SPEC).line_index.tolist() == [0] * 8 + [1] * 4


def test_views_when_frames_are_few_then_are_made_of_what_the_network_takes(frames):
    """Each tile is turned and shifted as published for the network's input."""
    views = views_of(frames, SPEC, makes_views=True)

    assert len(views) == 22 * 12 == len(frames) * inputs_of_frame(SPEC, makes_views=True)
    np.testing.assert_array_equal(views.take([22]), TileFrames(frames, SPEC).take([1]))


def test_views_when_frames_are_whole_and_many_then_are_the_frames_themselves(frames):
    """Nothing is cut or copied without need."""
    assert views_of(frames, make_input(8, 6), makes_views=False) is frames
