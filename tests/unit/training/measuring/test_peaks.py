"""Promises of the places where good parts look oddest: they are found, and a rim that gathers them can be left out."""

import numpy as np
import pytest

from service.contract.policy import inspected_mask
from tests.factories import encode, make_policy
from training.calibrate import read_region_of_interest
from training.measuring.peaks import find_peaks, mask_without_rim

_WHOLE = (0.0, 0.0, 1.0, 1.0)
_LOWER_RIGHT = (0.5, 0.25, 0.5, 0.75)  # top, left, height, width


def _maps(*cells, size=(16, 24)):
    """Make a map a cell, hottest there."""
    maps = np.random.default_rng(0).uniform(0, 1, (len(cells), *size)).astype(np.float32)
    for anomaly_map, cell in zip(maps, cells, strict=True):
        anomaly_map[cell] = 2
    return maps


@pytest.mark.parametrize(
    ("window", "expected"),
    [(_WHOLE, [(6.5 / 24, 2.5 / 16)]), (_LOWER_RIGHT, [(0.25 + 0.75 * 6.5 / 24, 0.5 + 0.5 * 2.5 / 16)])],
    ids=["whole frame", "part of it"],
)
def test_peaks_when_a_map_covers_a_window_then_lie_in_fractions_of_the_frame(window, expected):
    """Places are the hottest cells' middles, width before height, where people will look for them."""
    np.testing.assert_allclose(find_peaks(_maps((2, 6)), None, window).places, expected)


def test_peaks_when_a_place_is_not_inspected_then_are_the_hottest_of_the_rest():
    """What a region of interest leaves out sets no threshold."""
    maps = _maps((2, 6))
    inspected = np.ones((16, 24), bool)
    inspected[2, 6] = False
    hottest = np.unravel_index(np.where(inspected, maps[0], -1).argmax(), (16, 24))

    peaks = find_peaks(maps, inspected, _WHOLE)

    np.testing.assert_allclose(peaks.places, [((hottest[1] + 0.5) / 24, (hottest[0] + 0.5) / 16)])


@pytest.mark.parametrize(("at_rim", "gather"), [(15, True), (14, False)])
def test_peaks_when_three_quarters_lie_in_the_outer_eighth_then_gather_at_the_rim(at_rim, gather):
    """Two of sixteen rows and three of 24 columns on each side are the rim; the cells behind them are not."""
    rim = [(1, 12), (14, 12), (8, 2), (8, 21), (0, 0)]
    inside = [(2, 3), (13, 20), (8, 12)]
    cells = [rim[i % 5] for i in range(at_rim)] + [inside[i % 3] for i in range(20 - at_rim)]

    peaks = find_peaks(_maps(*cells), None, _WHOLE)

    assert peaks.at_rim == at_rim
    assert peaks.gather_at_rim is gather
    assert not find_peaks(_maps(*cells), np.ones((16, 24), bool), _WHOLE).gather_at_rim


@pytest.mark.parametrize("window", [_WHOLE, _LOWER_RIGHT], ids=["whole frame", "part of it"])
def test_mask_without_rim_when_it_is_the_region_of_interest_then_nothing_of_the_rim_is_inspected(tmp_path, window):
    """The mask that is proposed leaves out exactly what was counted as the rim."""
    path = tmp_path / "mask.png"
    path.write_bytes(encode(mask_without_rim((480, 640), window)))
    policy = make_policy(region_of_interest=read_region_of_interest(path))

    inspected = inspected_mask(policy, 16, 24, window=window)

    expected = np.zeros((16, 24), bool)
    expected[2:-2, 3:-3] = True
    np.testing.assert_array_equal(inspected, expected)
