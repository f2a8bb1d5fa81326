"""Drift: a changed product, a dying lamp and a dirty lens each move their own figure, and ordinary days move none."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contract.calibration import Calibration
from service.observability.drift import Fading, LineDrift, ScoreDrift, measure_quality


def _calibration(count=400, seed=0):
    scores = np.random.default_rng(seed).normal(1, 0.2, count).astype(np.float32)
    return Calibration.from_good_parts(scores, scores, 0.0)


def _feed(drift, scores):
    for score in scores:
        drift.add(float(score))
    return drift.index()


def _part(seed=0, shape=(96, 128)):
    """Return a textured grey part with a little sensor noise, as float in [0, 1]."""
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    pattern = 0.45 + 0.2 * np.sin(rows / 3) * np.cos(columns / 5)
    return pattern + draw.normal(0, 0.01, shape)


def _frame(grey):
    return np.repeat((grey.clip(0, 1) * 255).round().astype(np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize("count", [40, 400])
def test_index_when_parts_are_as_calibrated_then_stays_small(count):
    """Parts of the same distribution are no drift, also where few frames were calibrated on."""
    index = _feed(ScoreDrift(_calibration(count)), np.random.default_rng(1).normal(1, 0.2, 1500))

    assert 0 <= index < 0.25


@pytest.mark.parametrize(("mean", "deviation"), [(1.3, 0.2), (0.7, 0.2), (1.0, 0.6)])
def test_index_when_scores_move_then_rises_above_the_usual_limit(mean, deviation):
    """A shift by one and a half deviations in either direction, or a wider spread, is called drift."""
    index = _feed(ScoreDrift(_calibration()), np.random.default_rng(1).normal(mean, deviation, 1500))

    assert index > 0.25


def test_index_when_few_good_parts_were_calibrated_on_then_a_moved_line_is_still_seen():
    """Chance moves the index of a small calibration, and a change of the product all the more."""
    index = _feed(ScoreDrift(_calibration(9)), np.random.default_rng(1).normal(1.6, 0.2, 1500))

    assert index > 0.25


def test_index_when_the_line_recovers_then_forgets():
    """After some hundred ordinary parts an old change no longer counts."""
    drift, draw = ScoreDrift(_calibration()), np.random.default_rng(1)

    moved = _feed(drift, draw.normal(2, 0.2, 1000))
    recovered = _feed(drift, draw.normal(1, 0.2, 3000))

    assert moved > 1
    assert recovered < 0.25


def test_index_when_frames_are_few_then_says_nothing():
    """Forty-nine parts say nothing about a line; the fiftieth begins to."""
    drift = ScoreDrift(_calibration())

    before = _feed(drift, [1.0] * 49)
    after = _feed(drift, [1.0])

    assert before is None
    assert math.isfinite(after)


@given(
    scores=st.lists(st.floats(-1e6, 1e6, width=32), min_size=20, max_size=60),
    seen=st.lists(st.floats(-1e9, 1e9), min_size=50, max_size=80),
)
def test_index_when_values_are_any_then_it_is_finite_and_not_negative(scores, seen):
    """Equal scores, huge ones and empty bins never give infinity or NaN."""
    drift = ScoreDrift(Calibration.from_good_parts(np.array(scores, np.float32), np.array(scores, np.float32), 0.0))

    index = _feed(drift, seen)

    assert math.isfinite(index)
    assert index >= 0


def test_index_when_computed_plainly_then_is_the_same():
    """The index equals its formula over bins that are counted by hand, as long as nothing has faded."""
    calibration, seen = _calibration(), np.random.default_rng(2).normal(1.1, 0.2, 60).astype(np.float32)

    index = _feed(ScoreDrift(calibration), seen)

    edges = [-np.inf, *calibration.histogram_edges, np.inf]
    weights = np.exp(-np.arange(60)[::-1] / 500)
    filled = np.array(
        [
            (
                ((calibration.scores >= low) & (calibration.scores < high)).sum(),
                weights[(seen >= low) & (seen < high)].sum(),
            )
            for low, high in itertools.pairwise(edges)
        ]
    )
    e, a = ((filled + 0.5) / (filled + 0.5).sum(axis=0)).T
    assert index == pytest.approx(float(((a - e) * np.log(a / e)).sum()), rel=1e-9)


def test_index_when_frames_have_come_for_days_then_is_that_of_the_last_ones():
    """What keeps the counts within the range of floats changes no figure."""
    seen = np.random.default_rng(2).normal(1.1, 0.2, 11_000)
    long_ago, lately = ScoreDrift(_calibration()), ScoreDrift(_calibration())

    index = _feed(long_ago, seen)

    assert index == pytest.approx(_feed(lately, seen[-9_000:]), abs=1e-5)


def test_share_when_values_fade_then_is_their_weighted_mean():
    """Each value counts 1 / e of what one `memory` later counts."""
    fading = Fading(memory=2.0)

    for value in (1.0, 0.0, 1.0):
        fading.add(value)

    weights = np.exp(-np.array([2, 1, 0]) / 2)
    assert fading.mean() == pytest.approx(float((weights * [1, 0, 1]).sum() / weights.sum()))
    assert Fading(2.0).mean() is None


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        (lambda part: part * 0.5, {"brightness"}),
        (lambda part: part + 0.5, {"brightness", "saturation", "focus"}),
        (lambda part: (part + np.roll(part, 1, 0) + np.roll(part, 2, 0) + np.roll(part, 3, 0)) / 4, {"focus", "noise"}),
        (lambda part: part + np.random.default_rng(9).normal(0, 0.05, part.shape), {"noise", "focus"}),
    ],
    ids=["lamp dims", "overexposed", "lens blurs", "sensor warms"],
)
def test_quality_when_something_fails_then_its_own_figures_move(change, moved):
    """Each fault moves some figures by more than a third and leaves the others where they were."""
    before, after = measure_quality(_frame(_part())), measure_quality(_frame(change(_part())))

    floor = {"brightness": 0.01, "saturation": 0.01, "focus": 1e-4, "noise": 2e-3}
    far = {
        name for name, value in vars(before).items() if abs(getattr(after, name) - value) > max(value / 3, floor[name])
    }
    assert moved <= far
    assert "brightness" in moved or "brightness" not in far


def test_noise_when_known_then_is_found():
    """On a plane the estimate is the standard deviation that was added."""
    plane = np.full((200, 200), 0.5) + np.random.default_rng(0).normal(0, 0.03, (200, 200))

    assert measure_quality(_frame(plane)).noise == pytest.approx(0.03, rel=0.05)


@pytest.mark.parametrize(("grey", "saturation"), [(249, 0.0), (250, 1.0)])
def test_saturation_when_pixels_are_near_white_then_is_their_share(grey, saturation):
    """Compression takes a saturated pixel a few levels down, and bright parts are not saturated."""
    assert measure_quality(np.full((8, 8, 3), grey, np.uint8)).saturation == saturation


def test_quality_when_a_picture_has_colours_then_its_green_counts():
    """Half of a sensor's pixels are green; the other colours are made up from fewer, and of a lamp's."""
    frame = _frame(_part())
    coloured = frame.copy()
    coloured[:, :, (0, 2)] = (255, 0)

    assert measure_quality(coloured) == measure_quality(frame)


def test_line_when_judged_and_seen_then_keeps_its_signals_apart():
    """A lamp that dims moves brightness only; the share of stopped parts counts verdicts and nothing else."""
    line = LineDrift(ScoreDrift(_calibration()))

    for number in range(100):
        line.judged(1.0, passed=number % 4 != 0)
        line.seen(measure_quality(_frame(_part(number))))
    bright = line.quality["brightness"].mean()
    for number in range(200):
        line.seen(measure_quality(_frame(_part(number) * 0.6)))

    assert line.review.mean() == pytest.approx(0.25, abs=0.02)
    assert line.quality["brightness"].mean() == pytest.approx(0.6 * bright, rel=0.05)
