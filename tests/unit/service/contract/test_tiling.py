"""Promises of tiles: every pixel of the canvas is seen, and no seam shows where their maps meet."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from service.contract.geometry import Tiling
from service.contract.policy import ScoreRule
from service.contract.tiling import answer_of, by_tiles, cut_tiles, stitch
from service.errors import EngineFailed
from tests.factories import make_frame, make_graph, make_input, make_runner
from tests.strategies import finite_float32

MEAN = ScoreRule(kind="top_fraction_mean", fraction=0.25)
TILES = Tiling(rows=3, columns=2, overlap_height=8, overlap_width=12)


@st.composite
def tilings(draw, most=4):
    """Draw an input that is cut, with every overlap up to half of a tile, none included."""
    height, width = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    tiling = Tiling(
        rows=draw(st.integers(1, most)),
        columns=draw(st.integers(1, most)),
        overlap_height=draw(st.integers(0, height // 2)),
        overlap_width=draw(st.integers(0, width // 2)),
    )
    return make_input(height, width, draw(st.integers(0, 2)), tiling)


def look(canvas, spec):
    """Be a network whose map is the picture itself."""
    return cut_tiles(canvas, spec)[..., 0].astype(np.float32)


def canvas_of(spec, seed=0):
    """Return noise of the canvas's size."""
    return np.random.default_rng(seed).integers(0, 256, (spec.canvas_height, spec.canvas_width, 3)).astype(np.uint8)


@given(tilings())
def test_tiles_when_cut_cover_every_pixel_of_the_canvas(spec):
    """No part of the canvas is left unseen, and no tile reaches beyond it."""
    seen = np.zeros((spec.canvas_height, spec.canvas_width), int)

    for top, left in spec.tile_corners:
        seen[top : top + spec.height, left : left + spec.width] += 1

    assert seen.min() == 1
    assert seen.sum() == spec.tile_count * spec.height * spec.width


@given(tilings())
def test_tiles_when_cut_are_the_very_pixels_row_by_row(spec):
    """A tile is a part of the canvas, unchanged, and tiles come in the order of their corners."""
    canvas = canvas_of(spec)

    tiles = cut_tiles(canvas, spec)

    assert tiles.shape == (spec.tile_count, spec.height, spec.width, 3)
    for tile, (top, left) in zip(tiles, spec.tile_corners, strict=True):
        np.testing.assert_array_equal(tile, canvas[top : top + spec.height, left : left + spec.width])


@given(tilings())
def test_stitching_when_the_network_shows_the_picture_gives_the_canvas_back(spec):
    """Where tiles agree, the stitched map has the very values that they agree on: there is no seam."""
    canvas = canvas_of(spec)

    np.testing.assert_array_equal(stitch(look(canvas, spec), spec), canvas[..., 0])


@given(tilings(), finite_float32())
def test_stitching_when_the_maps_are_constant_gives_the_constant(spec, value):
    """The weights sum to one everywhere, to the last bit."""
    maps = np.full((spec.tile_count, spec.height, spec.width), value, np.float32)

    stitched = stitch(maps, spec)

    assert stitched.shape == (spec.canvas_height, spec.canvas_width)
    assert stitched.dtype == np.float32
    assert (stitched == np.float32(value)).all()


@given(tilings(), st.data())
def test_stitching_when_everything_is_mirrored_mirrors_the_map(spec, data):
    """Left and right, top and bottom weigh alike."""
    maps = data.draw(
        arrays.arrays(np.float32, (spec.tile_count, spec.height, spec.width), elements=finite_float32(-100, 100))
    )
    grid = maps.reshape(spec.tiles.rows, spec.tiles.columns, spec.height, spec.width)
    mirrored = grid[::-1, ::-1, ::-1, ::-1].reshape(maps.shape)

    # atol: the two weights of a place are swapped, and rounded by themselves.
    np.testing.assert_allclose(stitch(mirrored, spec), stitch(maps, spec)[::-1, ::-1], rtol=1e-6, atol=1e-4)


@given(tilings())
def test_stitching_when_one_tile_alone_is_warm_falls_off_evenly_and_only_there(spec):
    """A tile's weight never rises towards its rim, lies in [0, 1], and is nothing outside of the tile."""
    alone = np.zeros((spec.tile_count, spec.height, spec.width), np.float32)
    alone[0] = 1

    stitched = stitch(alone, spec)

    assert (np.diff(stitched, axis=0) <= 0).all()
    assert (np.diff(stitched, axis=1) <= 0).all()
    assert stitched[0, 0] == 1
    assert not stitched[spec.height :].any()
    assert not stitched[:, spec.width :].any()


def test_stitching_when_maps_are_coarser_than_tiles_keeps_their_places():
    """A map of half a tile's resolution is stitched by half the overlap, so every cell stays over its pixels."""
    spec = make_input(16, 24, tiles=TILES)
    canvas = canvas_of(spec)[..., :1].astype(np.float32)
    coarse = canvas.reshape(spec.canvas_height // 2, 2, spec.canvas_width // 2, 2).mean(axis=(1, 3))
    maps = np.stack([coarse[top // 2 : top // 2 + 8, left // 2 : left // 2 + 12] for top, left in spec.tile_corners])

    np.testing.assert_array_equal(stitch(maps, spec), coarse)


def test_stitching_when_tiles_overlap_by_half_a_cell_is_refused():
    """A map that can't be laid on the canvas's grid is not bent to fit."""
    spec = make_input(16, 24, tiles=Tiling(rows=2, columns=1, overlap_height=3, overlap_width=0))

    with pytest.raises(ValueError, match="whole cells"):
        stitch(np.zeros((2, 8, 12), np.float32), spec)


def test_answer_when_frames_are_cut_is_reduced_from_the_stitched_map():
    """The frame's score is what the bundle's rule makes of the whole map, not of any tile."""
    spec = make_input(16, 24, tiles=TILES)
    maps = look(canvas_of(spec), spec)

    answer = answer_of(np.full(6, -1, np.float32), maps, spec, MEAN)

    np.testing.assert_array_equal(answer.anomaly_map, stitch(maps, spec))
    assert answer.score == MEAN.reduce(stitch(maps, spec).ravel())


def test_answer_when_frames_are_not_cut_is_the_networks_own():
    """Without tiles the network's score and map stand as they are."""
    maps = np.ones((1, 4, 6), np.float32)

    answer = answer_of(np.array([7], np.float32), maps, make_input(), MEAN)

    assert answer.score == 7
    assert answer.anomaly_map.base is maps


@pytest.mark.parametrize("count", [5, 7])
def test_answer_when_tiles_are_missing_or_too_many_is_the_engines_fault(count):
    """Maps are never stitched to a frame that they do not make."""
    spec = make_input(16, 24, tiles=TILES)

    with pytest.raises(EngineFailed):
        answer_of(np.zeros(count, np.float32), np.zeros((count, 16, 24), np.float32), spec, MEAN)


def test_network_by_tiles_when_it_looks_at_each_pixel_says_what_it_would_say_of_the_whole():
    """A network that sees no further than a cell gives the same map of the tiles as of the canvas in one piece."""
    spec = make_input(16, 24, tiles=TILES)
    canvases = np.stack([make_frame(spec.canvas_height, spec.canvas_width, seed, defect=True) for seed in (1, 2)])
    at_once = make_runner(make_graph(spec.canvas_height, spec.canvas_width))

    scores, maps = by_tiles(make_runner(make_graph(16, 24)), spec, MEAN)(canvases, np.zeros(2, np.int64))

    np.testing.assert_allclose(maps, at_once(canvases)[1], rtol=1e-6)  # float32 sums in another order
    np.testing.assert_allclose(scores, [MEAN.reduce(one.ravel()) for one in maps])


def test_network_by_tiles_when_it_is_told_lines_tells_every_tile_its_frames_line():
    """All tiles of a frame show the line that the frame shows."""
    spec = make_input(16, 24, tiles=TILES)
    told = []

    def run(frames, line_index):
        told.extend(line_index.tolist())
        return np.zeros(len(frames), np.float32), np.zeros((len(frames), 8, 12), np.float32)

    by_tiles(run, spec, MEAN)(np.stack([canvas_of(spec)] * 2), np.array([1, 0]))

    assert told == [1] * 6 + [0] * 6
