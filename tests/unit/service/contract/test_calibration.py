"""Promises of calibration: thresholds and p-values that mean the same, and bounds that hold."""

import io
import math
import zipfile

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from service.contract.calibration import HISTOGRAM_BINS, Calibration, needed_good_parts, reachable_rate, read_arrays
from service.errors import BundleRefused, CalibrationRefused
from tests.strategies import false_reject_rates, finite_float32, score_sets


def calibrate(scores):
    """Calibrate on scores alone."""
    return Calibration.from_good_parts(scores, scores, 0.0)


def threshold_or_none(calibration, rate):
    """Return the threshold, or None where n good parts can't support the rate."""
    try:
        return calibration.threshold(rate)
    except CalibrationRefused:
        return None


@given(score_sets(), false_reject_rates(), finite_float32())
def test_threshold_when_compared_with_p_values_separates_exactly(scores, rate, other):
    """A score reaches the threshold exactly where its p-value is within the wanted rate, ties included."""
    calibration = calibrate(scores)
    threshold = threshold_or_none(calibration, rate)
    assume(threshold is not None)
    near = np.float32(threshold.value)
    candidates = [other, *scores, near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))]

    for score in map(float, candidates):
        assert (score >= threshold.value) == (calibration.p_value(score) <= rate)


@given(score_sets(), false_reject_rates())
def test_threshold_when_refused_names_the_number_that_suffices(scores, rate):
    """A refusal tells the smallest number of good parts with which the same rate is possible."""
    if threshold_or_none(calibrate(scores), rate) is not None:
        assert scores.size >= needed_good_parts(rate)
        return

    needed = needed_good_parts(rate)

    assert needed > scores.size
    with pytest.raises(CalibrationRefused, match=f"needs at least {needed} good parts .* there are {scores.size};"):
        calibrate(scores).threshold(rate)
    if needed < 2000:
        assert threshold_or_none(calibrate(np.zeros(needed, np.float32)), rate) is not None
        assert threshold_or_none(calibrate(np.zeros(needed - 1, np.float32)), rate) is None if needed > 1 else True


@pytest.mark.parametrize(("rate", "needed"), [(0.5, 1), (0.1, 9), (0.05, 19), (0.02, 49), (0.01, 99), (1 / 49, 48)])
def test_needed_good_parts_when_the_rate_is_known_is_the_textbooks(rate, needed):
    """One part in n + 1 is the smallest rate that n good parts support."""
    assert needed_good_parts(rate) == needed


@pytest.mark.parametrize("good_parts", [1, 2, 6, 19, 48, 66, 999, 12345])
def test_reachable_rate_when_taken_as_the_rate_is_supported_by_that_many_good_parts(good_parts):
    """The rate that a refusal offers is one that the same good parts support: it is rounded up, by little."""
    offered = reachable_rate(good_parts)

    assert needed_good_parts(offered) <= good_parts
    assert offered < 1.01 / (good_parts + 1)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan, math.inf])
def test_rate_when_it_is_no_share_is_refused(rate):
    """A rate outside of (0, 1) is refused with an example of a good one, wherever it is given."""
    calibration = calibrate(np.zeros(100, np.float32))

    for ask in (calibration.threshold, calibration.peak_threshold, needed_good_parts):
        with pytest.raises(CalibrationRefused, match="between 0 and 1"):
            ask(rate)


def test_rate_when_it_is_the_smallest_number_is_refused_in_words():
    """Even an absurd rate ends in a sentence, not in an overflow."""
    with pytest.raises(CalibrationRefused, match="needs at least"):
        calibrate(np.zeros(3, np.float32)).threshold(1e-300)


@given(score_sets(), finite_float32(), finite_float32())
def test_p_value_when_scores_rise_never_rises_and_stays_in_range(scores, one, other):
    """More anomalous never means more ordinary; a p-value is never 0."""
    calibration = calibrate(scores)
    low, high = sorted([one, other])

    assert 0 < calibration.p_value(high) <= calibration.p_value(low) <= 1


@given(score_sets(), finite_float32())
def test_p_value_when_counted_by_hand_is_the_same(scores, score):
    """The p-value is one more than the good parts at least this anomalous, over one more than all."""
    count = sum(float(good) >= score for good in scores)

    assert calibrate(scores).p_value(score) == (count + 1) / (scores.size + 1)


def test_p_value_when_a_good_part_is_judged_again_counts_it_though_calibrations_hold_fewer_digits():
    """A score is compared as it was kept: deviations are float64, and a part is at least as anomalous as itself."""
    score = float(np.float32(0.1)) + 1e-10

    assert calibrate(np.array([0.1, 0.05], np.float32)).p_value(score) == 2 / 3


@pytest.mark.parametrize("n", [1, 19, 60, 199, 1000, 5000])
@pytest.mark.parametrize("rate", [0.01, 0.02, 0.05, 0.1, 0.5, 0.9])
def test_bound_when_compared_with_the_beta_quantile_is_equal(n, rate):
    """The bound is Beta(k + 1, n - k)'s 95 % quantile, also where binomials exceed float64 (atol: lgamma at 5000)."""
    threshold = threshold_or_none(calibrate(np.arange(n, dtype=np.float32)), rate)
    if threshold is None:
        assert n < needed_good_parts(rate)
        return

    above = int((np.arange(n) >= threshold.value).sum())

    assert threshold.bound == pytest.approx(stats.beta.ppf(0.95, above + 1, n - above), abs=1e-9)
    assert threshold.bound >= rate * n / (n + 1) - 1 / (n + 1)
    assert (threshold.false_reject_rate, threshold.good_parts) == (rate, n)


def test_threshold_when_simulated_holds_its_rate_and_its_bound():
    """Over 500 calibration sets the mean false-reject rate is within the wanted one, and 95 % lie within the bound."""
    rate, n = 0.05, 59
    sets = np.random.default_rng(0).uniform(size=(500, n)).astype(np.float32)

    thresholds = [calibrate(scores).threshold(rate) for scores in sets]

    rates = 1 - np.array([threshold.value for threshold in thresholds])  # of uniform scores
    assert rates.mean() == pytest.approx(3 / 60, abs=0.004)  # three standard errors of 500 sets
    assert (rates <= thresholds[0].bound).mean() == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("resemblance", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("parts", "rate"), [(20, 0.05), (39, 0.1)])
def test_threshold_when_parts_have_several_views_holds_its_rate_and_its_bound(parts, rate, resemblance):
    """However much views of a part have in common, the bound holds of parts, and of single frames all the more."""
    views, sets = 5, 600
    generator = np.random.default_rng(0)
    part_of = np.repeat(np.arange(parts), views)

    def draw(count):
        own, shared = generator.normal(size=(count, views)), generator.normal(size=(count, 1))
        return (math.sqrt(resemblance) * shared + math.sqrt(1 - resemblance) * own).astype(np.float32)

    thresholds = [
        Calibration.from_good_parts(drawn, drawn, 0.0, part_of).threshold(rate)
        for drawn in (draw(parts).ravel() for _ in range(sets))
    ]

    values = np.array([threshold.value for threshold in thresholds])
    highest = np.sort(draw(200_000).max(axis=1))
    of_parts = 1 - np.searchsorted(highest, values) / highest.size
    of_frames = 1 - stats.norm.cdf(values)
    assert thresholds[0].good_parts == parts
    assert of_parts.mean() <= rate + 4 * of_parts.std() / math.sqrt(sets)
    assert (of_parts > thresholds[0].bound).mean() <= 0.05 + 0.03  # three standard errors of 600 sets
    assert of_frames.mean() <= rate
    assert (of_frames > thresholds[0].bound).mean() <= 0.05


def test_threshold_when_each_part_has_many_views_counts_parts():
    """A hundred frames of ten parts support what ten parts support, by the highest value of each."""
    scores = np.arange(100, dtype=np.float32)
    part_of = np.arange(100) % 10

    calibration = Calibration.from_good_parts(scores, scores + 1, 0.0, part_of)

    assert calibration.good_parts == 10
    assert calibration.part_scores.tolist() == list(range(90, 100))
    assert calibration.part_peaks.tolist() == list(range(91, 101))
    assert calibration.threshold(0.1).bound == pytest.approx(stats.beta.ppf(0.95, 1, 10))
    assert calibration.peak_threshold(0.1).value == np.nextafter(np.float32(100), np.float32(np.inf))
    assert (calibration.p_value(89), calibration.p_value(98), calibration.p_value(100)) == (1, 3 / 11, 1 / 11)
    assert calibration.scores.size == calibration.histogram_counts.sum() == 100  # drift is a matter of frames
    with pytest.raises(CalibrationRefused, match=r"needs at least 19 good parts .* there are 10;"):
        calibration.threshold(0.05)


def test_bytes_when_parts_have_several_views_hold_them_and_otherwise_nothing_of_parts():
    """What was calibrated on one frame a part has the file that it always had."""
    scores = np.arange(6, dtype=np.float32)
    of_pairs = Calibration.from_good_parts(scores, scores + 1, 0.0, np.array([0, 0, 1, 1, 2, 2]))
    of_singles = Calibration.from_good_parts(scores, scores + 1, 0.0, np.arange(6))

    read = Calibration.from_bytes(of_pairs.to_bytes())

    np.testing.assert_array_equal(read.part_scores, [1, 3, 5])
    np.testing.assert_array_equal(read.part_peaks, [2, 4, 6])
    assert of_singles.to_bytes() == Calibration.from_good_parts(scores, scores + 1, 0.0).to_bytes()
    assert not [name for name in read_arrays(of_singles.to_bytes(), "") if name.startswith("part")]


def test_calibrating_when_a_frame_shows_no_part_is_a_fault_of_ours():
    """Parts that don't match their frames are never guessed."""
    with pytest.raises(ValueError, match="show a part"):
        Calibration.from_good_parts(np.zeros(3, np.float32), np.zeros(3, np.float32), 0.0, np.zeros(2, np.int64))


def test_peak_threshold_when_peaks_differ_from_scores_uses_the_peaks():
    """Regions are cut by what good maps reach, not by what good scores are."""
    scores = np.zeros(19, np.float32)
    peaks = np.arange(19, dtype=np.float32)

    calibration = Calibration.from_good_parts(scores, peaks, 0.0)

    assert calibration.peak_threshold(0.05).value == np.nextafter(np.float32(18), np.float32(np.inf))
    assert calibration.threshold(0.05).value == np.nextafter(np.float32(0), np.float32(np.inf))


@given(score_sets(), finite_float32())
def test_bytes_when_written_and_read_hold_the_same_calibration(scores, floor):
    """A calibration survives its file, and equal calibrations give equal bytes."""
    written = Calibration.from_good_parts(scores, scores + 1, floor)

    read = Calibration.from_bytes(written.to_bytes())

    for name in ("scores", "peaks", "histogram_edges", "histogram_counts"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name), strict=True)
    assert read.map_floor == written.map_floor
    assert read.to_bytes() == written.to_bytes()


@given(score_sets())
def test_histogram_when_scores_are_any_counts_each_once(scores):
    """The drift reference holds every good part, in ascending bins."""
    calibration = calibrate(scores)

    assert calibration.histogram_counts.sum() == scores.size
    assert calibration.histogram_counts.shape == (HISTOGRAM_BINS,)
    assert (np.diff(calibration.histogram_edges) >= 0).all()


def test_histogram_when_scores_differ_is_evenly_filled():
    """Bins are quantiles, so that drift is as visible in the tail as in the middle."""
    calibration = calibrate(np.arange(200, dtype=np.float32))

    assert calibration.histogram_counts.tolist() == [10] * HISTOGRAM_BINS


@pytest.mark.parametrize(
    ("scores", "peaks", "floor"),
    [
        ([], [], 0.0),
        ([1.0], [1.0, 2.0], 0.0),
        ([[1.0, 2.0]], [[1.0, 2.0]], 0.0),
        ([math.nan], [1.0], 0.0),
        ([1.0], [math.inf], 0.0),
        ([1.0], [1.0], math.nan),
    ],
    ids=["none", "unequal", "two-dimensional", "nan", "infinite", "floor"],
)
def test_calibrating_when_values_are_unusable_is_refused(scores, peaks, floor):
    """No calibration is made of nothing, or of numbers that are none."""
    with pytest.raises(CalibrationRefused):
        Calibration.from_good_parts(np.array(scores, np.float32), np.array(peaks, np.float32), floor)


def changed(**arrays):
    """Return a calibration's file with some arrays replaced, or left out where None."""
    with np.load(io.BytesIO(calibrate(np.arange(5, dtype=np.float32)).to_bytes())) as file:
        kept = dict(file.items()) | arrays
    buffer = io.BytesIO()
    np.savez(buffer, **{name: value for name, value in kept.items() if value is not None})
    return buffer.getvalue()


_SIX = np.array([-1, 0, 1, 2, 3, 4], np.float32)


@pytest.mark.parametrize(
    "arrays",
    [
        {"scores": None},
        {"map_floor": None},
        {"map_floor": np.array([0.0, 1.0])},
        {"map_floor": np.float64(math.nan)},
        {"scores": np.array([3, 2, 1, 0, -1], np.float32)},
        {"scores": np.array([0, 1, 2, 3, math.nan], np.float32)},
        {"scores": np.zeros((5, 1), np.float32)},
        {"scores": np.zeros(5, np.float64)},
        {"scores": np.zeros(4, np.float32)},
        {"scores": np.zeros(0, np.float32), "peaks": np.zeros(0, np.float32)},
        {"scores": np.array(["a", "b"])},
        {"histogram_edges": np.zeros(3, np.float32)},
        {"histogram_counts": np.zeros(HISTOGRAM_BINS, np.int64)},
        {"histogram_counts": np.zeros(3, np.int64)},
        {"part_scores": np.array([4], np.float32)},
        {"part_scores": np.array([3], np.float32), "part_peaks": np.array([4], np.float32)},
        {"part_scores": np.array([3, 4], np.float32), "part_peaks": np.array([3, 3.5], np.float32)},
        {"part_scores": np.array([3, 4], np.float32), "part_peaks": np.array([3, 4], np.float32), "peaks": _SIX},
        {"scores": np.array([-math.inf, 1, 2, 3, 4], np.float32)},
        {"histogram_edges": np.full(HISTOGRAM_BINS - 1, math.nan, np.float32)},
        {"part_scores": np.array([3, 4]), "part_peaks": np.array([3, 4], np.float32)},
        {"part_scores": np.arange(-1, 5, dtype=np.float32), "part_peaks": np.arange(-1, 5, dtype=np.float32)},
    ],
)
def test_reading_when_arrays_can_not_be_a_calibration_is_refused(arrays):
    """Missing, unsorted, misshapen, mistyped or contradicting arrays are refused."""
    with pytest.raises(BundleRefused, match=r"calibration\.npz"):
        Calibration.from_bytes(changed(**arrays))


def test_reading_when_an_array_is_pickled_is_refused():
    """Objects are never unpickled, whatever they are."""
    buffer = io.BytesIO()
    np.savez(buffer, scores=np.array([{"an": "object"}], dtype=object))

    with pytest.raises(BundleRefused, match=r"calibration\.npz"):
        Calibration.from_bytes(buffer.getvalue())


@given(st.data())
def test_reading_when_a_byte_is_changed_or_the_end_is_lost_never_raises_another_error(data):
    """A damaged file is refused as a bundle's fault, or still holds a sound calibration; nothing else escapes."""
    whole = calibrate(np.arange(5, dtype=np.float32)).to_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]

    for damaged in (flipped, whole[:at]):
        try:
            calibration = Calibration.from_bytes(damaged)
        except BundleRefused:
            continue
        assert np.isfinite(calibration.scores).all()


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x93NUMPY", b"not an archive"])
def test_reading_arrays_when_the_file_is_none_is_refused_by_name(data):
    """The sentence names the file that can't be read."""
    with pytest.raises(BundleRefused, match=r"golden/maps\.npz"):
        read_arrays(data, "golden/maps.npz")


def test_reading_arrays_when_a_lone_array_lies_in_place_of_an_archive_is_refused():
    """An npy file under an npz's name is refused."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))

    with pytest.raises(BundleRefused):
        read_arrays(buffer.getvalue(), "calibration.npz")


def test_reading_arrays_when_a_member_is_no_array_is_refused():
    """An archive that holds something else than arrays is refused or has no such array."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("scores.npy", b"nothing of the kind")

    with pytest.raises(BundleRefused):
        Calibration.from_bytes(buffer.getvalue())
