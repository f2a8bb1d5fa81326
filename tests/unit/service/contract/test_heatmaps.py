"""Promises of the pictures: one fixed scale, tied to the threshold, the same on every frame."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contract.heatmaps import grey_heatmap, heat, overlay
from service.contract.policy import ScoreRule, judge
from tests.factories import make_bundle, make_frame, make_policy, make_runner
from tests.strategies import anomaly_maps, finite_float32, policies


@given(policies(), st.lists(finite_float32(), min_size=1, max_size=20))
def test_grey_heatmap_when_read_back_tells_what_reaches_the_threshold(policy, values):
    """128 and more is exactly where the map reaches the region threshold, whatever the numbers are."""
    anomaly_map = np.array([[*values, policy.region_threshold, policy.map_floor]], np.float32)

    grey = grey_heatmap(anomaly_map, policy)

    np.testing.assert_array_equal(grey >= 128, anomaly_map >= np.float32(policy.region_threshold))


def test_grey_heatmap_when_the_map_is_at_the_anchors_shows_them():
    """Nothing at the floor, half way at the threshold, everything at twice the distance, and no further."""
    policy = make_policy(map_floor=1.0, region_threshold=3.0)
    anomaly_map = np.array([[-9, 1, 2, 3, 4, 5, 99]], np.float32)

    assert grey_heatmap(anomaly_map, policy).tolist() == [[0, 0, 64, 128, 191, 255, 255]]


@given(anomaly_maps(), anomaly_maps())
def test_heat_when_other_frames_are_hotter_does_not_change(one, other):
    """A frame's colours depend on its own values only, never on the range of anything."""
    policy = make_policy()
    both = np.concatenate([one.ravel(), other.ravel()])[None]

    np.testing.assert_array_equal(heat(both, policy)[0, : one.size], heat(one, policy).ravel())


def test_heatmap_when_the_part_is_good_stays_cold(tmp_path):
    """Good parts never look red."""
    run = make_runner((make_bundle(tmp_path) / "model.onnx").read_bytes())
    frames = np.stack([make_frame(32, 48, seed) for seed in range(20)])

    _, maps = run(frames)

    assert grey_heatmap(maps, make_policy()).max() < 64


def test_heatmap_when_the_part_is_defective_is_hot_on_the_defect(tmp_path):
    """The defect is warm and the rest is not."""
    run = make_runner((make_bundle(tmp_path) / "model.onnx").read_bytes())

    _, maps = run(make_frame(32, 48, defect=True)[None])

    grey = grey_heatmap(maps[0], make_policy())
    assert grey[6:10, 12:18].min() >= 128
    assert grey[:5].max() < 64


def painted(pixels, anomaly_map, window, frame_size):
    """Return the overlay of a map with its own regions."""
    policy = make_policy()
    judgement = judge(0.0, anomaly_map, policy, ScoreRule(kind="maximum"), window, None)
    return overlay(pixels, anomaly_map, policy, judgement.regions, window, frame_size)


def test_overlay_when_the_map_is_cold_leaves_the_frame_as_it_is():
    """A good part's overlay is the part."""
    pixels = make_frame(40, 60)

    result = painted(pixels, np.full((8, 12), 0.02, np.float32), (0, 0, 40, 60), (40, 60))

    np.testing.assert_array_equal(result, pixels)
    assert result is not pixels


@pytest.mark.parametrize("frame_size", [(40, 60), (400, 600)], ids=["original", "reduced"])
def test_overlay_when_the_map_is_hot_somewhere_paints_only_there(frame_size):
    """Paint and outline lie where the defect lies, at whatever resolution the frame is shown."""
    pixels = make_frame(40, 60)
    anomaly_map = np.zeros((8, 12), np.float32)
    anomaly_map[4, 6] = 1

    result = painted(pixels, anomaly_map, (0, 0, *frame_size), frame_size)

    changed = (result != pixels).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert changed[20:25, 30:35].all()
    assert (rows.min(), columns.min()) >= (12, 22)
    assert rows.max() <= 32
    assert columns.max() <= 42
    # Outlines are smoothed, so their cyan is hardly ever pure.
    rows, columns = np.nonzero(np.abs(result - np.array([0.0, 255.0, 255.0])).sum(axis=2) < 60)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 25, 30, 35)


def test_overlay_when_the_input_is_cropped_paints_nothing_on_the_rim():
    """What was never inspected is shown as it is, however hot the map."""
    pixels = make_frame(40, 60)

    result = painted(pixels, np.ones((8, 12), np.float32), (10, 15, 20, 30), (40, 60))

    np.testing.assert_array_equal(result[:8], pixels[:8])
    np.testing.assert_array_equal(result[:, :13], pixels[:, :13])
    assert (result[14:26, 20:40] != pixels[14:26, 20:40]).any(axis=2).all()
