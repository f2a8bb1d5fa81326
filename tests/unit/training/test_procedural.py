"""Generated frames: the same for the same seed, wherever and in whatever order they are drawn."""

import numpy as np
import pytest

from training.procedural.frames import FrameStream, draw_frame
from training.procedural.shapes import SHAPES, place_shape
from training.procedural.textures import TEXTURES, draw_texture


def _stream(seed):
    return FrameStream(seed, frame_size=32, canvas_size=96, texture_count=6, shard_size=16)


def test_shard_when_drawn_by_two_streams_in_another_order_then_is_the_same():
    """A shard follows from seed and number alone, so that any process may draw it at any time."""
    forwards, backwards = _stream(3), _stream(3)

    first, second = forwards.shard(0), forwards.shard(1)

    assert np.array_equal(backwards.shard(1), second)
    assert np.array_equal(backwards.shard(0), first)


def test_shard_when_seed_or_number_differ_then_differs():
    """Neither another seed nor another number repeats frames."""
    reference = _stream(3).shard(0)

    assert not np.array_equal(_stream(4).shard(0), reference)
    assert not np.array_equal(_stream(3).shard(1), reference)


def test_shard_when_drawn_then_frames_are_rgb_bytes_with_something_on_them():
    """Frames are `(N, H, W, 3)` uint8, mostly with contrast, some in colour."""
    frames = _stream(0).shard(0)

    assert frames.shape == (16, 32, 32, 3)
    assert frames.dtype == np.uint8
    assert (frames.std(axis=(1, 2, 3)) > 2).mean() > 0.7
    assert (np.ptp(frames, axis=3).max(axis=(1, 2)) > 10).any()


def test_shards_when_started_late_then_goes_on_where_it_should():
    """The endless supply can begin anywhere."""
    late = next(_stream(1).shards(start=2))

    assert np.array_equal(late, _stream(1).shard(2))


def test_stream_when_shard_size_is_not_whole_canvases_then_refuses():
    """A shard always consists of whole canvases."""
    with pytest.raises(ValueError, match="multiple of 16"):
        FrameStream(0, shard_size=10)


@pytest.mark.parametrize("recipe", TEXTURES, ids=lambda recipe: recipe.__name__)
def test_texture_recipe_when_drawn_with_many_seeds_then_is_finite_and_repeatable(recipe):
    """No recipe divides by zero or depends on anything but its generator."""
    for seed in range(5):
        field = recipe(np.random.default_rng(seed), 64)

        assert field.shape == (64, 64)
        assert np.isfinite(field).all()
        assert np.array_equal(field, recipe(np.random.default_rng(seed), 64))


def test_draw_texture_when_drawn_then_uses_the_whole_range():
    """Textures are stretched, so that a palette decides their contrast."""
    textures = [draw_texture(np.random.default_rng(seed), 64) for seed in range(8)]

    assert all(texture.dtype == np.uint8 for texture in textures)
    assert np.median([np.ptp(texture) for texture in textures]) == 255


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_place_shape_when_inside_then_covers_something_within_its_radius(shape):
    """A stencil lies within its circle and its mask is a share of a pixel."""
    stencil = place_shape(shape, np.random.default_rng(1), (64, 64), (32.0, 30.0), 12.0, 0.7)

    assert stencil.mask.min() == 0
    assert 0.5 < stencil.mask.max() <= 1
    rows, columns = np.nonzero(stencil.mask)
    reach = np.hypot(rows + stencil.rows.start - 32, columns + stencil.columns.start - 30).max()
    assert reach < 12 * 1.45 + 1


def test_place_shape_when_outside_the_canvas_then_is_none():
    """A shape that misses the canvas paints nothing."""
    assert place_shape(SHAPES[0], np.random.default_rng(0), (64, 64), (-40.0, 10.0), 12.0, 0.0) is None


def test_draw_frame_when_given_a_seed_then_returns_one_repeatable_frame():
    """One call gives other tests a frame of the size they need."""
    frame = draw_frame(5, 40, 64)

    assert frame.shape == (40, 64, 3)
    assert np.array_equal(frame, draw_frame(5, 40, 64))
