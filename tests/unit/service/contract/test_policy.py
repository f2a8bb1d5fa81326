"""Promises of the only code that may say PASS."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.contract.policy import (
    Policy,
    ScoreRule,
    Verdict,
    inspected_mask,
    is_as_strict,
    judge,
    may_judge,
    refuse_unfit_region,
    scores_alike,
    spread_of,
    verdict_of,
)
from service.errors import BundleRefused, EngineFailed, FrameNotComparable
from tests.factories import make_input, make_policy, make_self_policy
from tests.strategies import anomaly_maps, finite_float32, policies

MAXIMUM = ScoreRule(kind="maximum")
WINDOW = (0.0, 0.0, 8.0, 8.0)
SEVERITY = [Verdict.PASS, Verdict.REVIEW, Verdict.FAIL]
LEFT_HALF = (((0.0, 0.0), (0.45, 0.0), (0.45, 1.0), (0.0, 1.0)),)


@given(policies(), finite_float32(), finite_float32())
def test_verdict_when_the_score_rises_never_softens(policy, one, other):
    """A more anomalous part is never judged better."""
    low, high = sorted([one, other])

    assert SEVERITY.index(verdict_of(low, policy)) <= SEVERITY.index(verdict_of(high, policy))


@given(policies(), finite_float32())
def test_verdict_when_passed_lies_below_both_thresholds(policy, score):
    """PASS means below review and below fail, and nothing else."""
    passed = verdict_of(score, policy) is Verdict.PASS

    assert passed == (score < policy.review_threshold and score < policy.fail_threshold)


@pytest.mark.parametrize(
    ("score", "verdict"),
    [
        (0.0999, Verdict.PASS),
        (0.1, Verdict.REVIEW),
        (0.1999, Verdict.REVIEW),
        (0.2, Verdict.FAIL),
        (math.inf, Verdict.FAIL),
        (math.nan, Verdict.NO_VERDICT),
    ],
)
def test_verdict_when_the_score_touches_a_threshold_is_the_stricter(score, verdict):
    """A score at the threshold is anomalous, and NaN has no verdict."""
    assert verdict_of(score, make_policy(review_threshold=0.1, fail_threshold=0.2)) is verdict


@given(
    st.floats(allow_nan=True, allow_infinity=True, width=32),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.integers(0, 63),
    st.booleans(),
)
def test_judging_when_a_map_value_is_not_finite_is_no_pass(score, broken, at, with_region):
    """One broken value anywhere, also outside of the region of interest, makes the engine's answer unusable."""
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map.flat[at] = broken
    inspected = np.eye(8, dtype=bool) if with_region else None

    with pytest.raises(EngineFailed, match="no verdict"):
        judge(score, anomaly_map, make_policy(), MAXIMUM, WINDOW, inspected)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("inspected", [None, np.ones((8, 8), bool)], ids=["everywhere", "region"])
def test_judging_when_the_score_is_not_finite_is_no_pass(score, inspected):
    """A broken score is an engine failure even where the score is reduced again from the map."""
    with pytest.raises(EngineFailed):
        judge(score, np.zeros((8, 8), np.float32), make_policy(), MAXIMUM, WINDOW, inspected)


@given(anomaly_maps(), policies(), finite_float32())
def test_judging_when_anything_is_finite_agrees_with_its_own_score(anomaly_map, policy, score):
    """The verdict is that of the score in the answer; regions are shown and never soften it."""
    judgement = judge(score, anomaly_map, policy, MAXIMUM, WINDOW, None)

    assert judgement.score == score
    assert judgement.verdict is verdict_of(score, policy)
    assert len(judgement.regions) == min(judgement.regions_total, policy.max_regions)


def test_judging_when_every_region_is_too_small_still_fails():
    """Filters decide what is shown, never the verdict."""
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map[3, 3] = 1

    judgement = judge(1.0, anomaly_map, make_policy(min_region_area_px=2), MAXIMUM, WINDOW, None)

    assert (judgement.verdict, judgement.regions, judgement.regions_total) == (Verdict.FAIL, [], 0)


@pytest.mark.parametrize("shift", [0, -9], ids=["from zero on", "far below zero"])
def test_judging_when_the_defect_lies_outside_of_the_region_of_interest_passes(shift):
    """What is not inspected counts neither for the score nor for regions, wherever a detector's maps begin."""
    ordinary = make_policy()
    names = ("review_threshold", "fail_threshold", "region_threshold", "map_floor")
    policy = make_policy(region_of_interest=LEFT_HALF, **{name: getattr(ordinary, name) + shift for name in names})
    anomaly_map = np.full((8, 8), shift, np.float32)
    anomaly_map[2, 6] = 1

    judgement = judge(1.0, anomaly_map, policy, MAXIMUM, WINDOW, inspected_mask(policy, 8, 8))

    assert (judgement.verdict, judgement.score, judgement.regions) == (Verdict.PASS, shift, [])


def test_judging_when_the_defect_lies_inside_of_the_region_of_interest_fails():
    """A region of interest hides nothing that it covers."""
    policy = make_policy(region_of_interest=LEFT_HALF)
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map[2, 1:6] = 1

    judgement = judge(1.0, anomaly_map, policy, MAXIMUM, WINDOW, inspected_mask(policy, 8, 8))

    assert judgement.verdict is Verdict.FAIL
    assert [(region.x, region.width) for region in judgement.regions] == [(1.0, 3.0)]


def test_inspected_mask_when_the_input_is_cropped_follows_the_frame():
    """Polygons are fractions of the frame; on a centre crop's map they lie where the frame's pixels lie."""
    spec = make_input(height=60, width=60, margin=20)
    policy = make_policy(region_of_interest=(((0.0, 0.0), (0.499, 0.0), (0.499, 0.305), (0.0, 0.305)),))

    mask = inspected_mask(policy, 60, 60, window=spec.window(1, 1))

    # Of 100 resized rows, 0 to 30 are of interest, and the map starts at row 20; so do the columns, of 0 to 49.
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 10, 0, 29)


def test_inspected_mask_when_there_is_no_region_of_interest_is_none():
    """Inspecting everything costs nothing."""
    assert inspected_mask(make_policy(), 4, 4) is None


def test_inspected_mask_when_the_crop_leaves_nothing_of_it_is_refused():
    """A policy that would look at nothing can't be used."""
    corner = (((0.0, 0.0), (0.1, 0.0), (0.1, 0.1)),)
    policy = make_policy(region_of_interest=corner)

    with pytest.raises(BundleRefused, match="nothing to inspect"):
        inspected_mask(policy, 60, 60, window=make_input(60, 60, margin=20).window(1, 1))


@pytest.mark.parametrize(("rows", "refused"), [(3, True), (4, False)])
def test_region_when_a_defect_could_fill_it_and_leave_the_map_even_is_refused(rows, refused):
    """A deviation needs a quarter of the map; a detector that scores by its largest values takes any region."""
    inspected = np.zeros((16, 8), bool)
    inspected[:rows] = True

    refuse_unfit_region(inspected, MAXIMUM)
    refuse_unfit_region(None, ScoreRule(kind="deviation"))
    with pytest.raises(BundleRefused, match="at least 25%") if refused else nullcontext():
        refuse_unfit_region(inspected, ScoreRule(kind="deviation"))


def test_score_when_nothing_is_inspected_is_refused():
    """No values, no score, no verdict."""
    with pytest.raises(BundleRefused, match="enlarge"):
        MAXIMUM.reduce(np.zeros(0, np.float32))


@given(anomaly_maps(), st.floats(0.001, 1))
def test_top_fraction_mean_when_sorted_by_hand_is_the_same(anomaly_map, fraction):
    """The score is the mean of the highest share of values, of at least one; rtol: order of float32 sums."""
    values = anomaly_map.ravel()
    count = max(1, int(values.size * fraction))

    score = ScoreRule(kind="top_fraction_mean", fraction=fraction).reduce(values)

    assert score == pytest.approx(float(np.sort(values)[::-1][:count].mean(dtype=np.float64)), rel=1e-6)


@given(anomaly_maps())
def test_maximum_when_reduced_is_the_largest_value(anomaly_map):
    """The maximum is what it says."""
    assert MAXIMUM.reduce(anomaly_map.ravel()) == anomaly_map.max()


@given(anomaly_maps())
def test_deviation_when_computed_by_hand_is_the_same(anomaly_map):
    """The root of the mean squared distance to the mean, in double precision."""
    values = anomaly_map.ravel().tolist()
    middle = math.fsum(values) / len(values)
    expected = math.sqrt(math.fsum((value - middle) ** 2 for value in values) / len(values))

    score = ScoreRule(kind="deviation").reduce(anomaly_map.ravel())

    assert score == pytest.approx(expected, rel=1e-9, abs=1e-9 * max(map(abs, values)))


@pytest.mark.parametrize(
    "fields",
    [{"kind": "top_fraction_mean"}, {"kind": "maximum", "fraction": 0.1}, {"kind": "deviation", "fraction": 1}],
)
def test_score_rule_when_fraction_and_kind_do_not_fit_is_refused(fields):
    """A fraction belongs to one rule only."""
    with pytest.raises(ValidationError, match="fraction belongs"):
        ScoreRule(**fields)


@given(policies())
def test_policy_when_written_and_read_is_the_same(policy):
    """A policy survives its file to the bit."""
    assert Policy.model_validate_json(policy.model_dump_json()) == policy


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"review_threshold": 0.3}, "review_threshold must not be above"),
        ({"map_floor": 0.2}, "map_floor must be below"),
        ({"fail_threshold": math.nan}, "finite"),
        ({"review_threshold": -math.inf}, "finite"),
        ({"region_of_interest": (((0, 0), (1, 1)),)}, "three points"),
        ({"region_of_interest": (((0, 0), (1, 0), (1, 1.5)),)}, "fractions of the frame"),
        ({"region_of_interest": (((0, 0), (1, 0), (1, math.nan)),)}, "fractions of the frame"),
        ({"min_region_area_px": -1}, "greater than or equal to 0"),
        ({"max_regions": -1}, "greater than or equal to 0"),
        ({"version": "../1"}, "pattern"),
        ({"fail_treshold": 1}, "Extra inputs"),
    ],
)
def test_policy_when_a_rule_makes_no_sense_is_refused(fields, reason):
    """Whatever could judge in a way nobody meant is refused at reading, with the field's name."""
    with pytest.raises(ValidationError, match=reason):
        make_policy(**fields)


def _self_map(peak: float = 0.0) -> np.ndarray:
    """Return an ordinary map whose values lie evenly round 10, with one of so many spreads above the middle."""
    anomaly_map = np.linspace(9, 11, 64 * 64, dtype=np.float32)
    anomaly_map = np.random.default_rng(0).permutation(anomaly_map).reshape(64, 64)
    anomaly_map[20, 30] = np.median(anomaly_map) + peak * spread_of(anomaly_map)
    return anomaly_map


@pytest.mark.parametrize(
    ("peak", "verdict"), [(0.0, Verdict.PASS), (5.9, Verdict.PASS), (6.1, Verdict.REVIEW), (8.1, Verdict.FAIL)]
)
@pytest.mark.parametrize(("factor", "shift"), [(1.0, 0.0), (1000.0, 5.0), (0.01, -3.0)])
def test_self_calibration_when_a_map_is_scaled_and_moved_then_the_verdict_stays(peak, verdict, factor, shift):
    """A frame is measured by itself: its score is the peak in spreads above the middle, whatever the map's size."""
    anomaly_map = (factor * _self_map(peak) + shift).astype(np.float32)

    judgement = judge(float(anomaly_map.max()), anomaly_map, make_self_policy(), MAXIMUM, WINDOW, None)

    assert judgement.verdict is verdict
    assert judgement.score == pytest.approx(max(peak, 1.35), rel=0.01)
    assert judgement.regions_total == (verdict is not Verdict.PASS)


def test_self_calibration_when_written_out_then_is_the_robust_z_of_the_inspected_values():
    """Middle and spread are medians over the region of interest, and the score is reduced from z by the same rule."""
    policy = make_self_policy(region_of_interest=LEFT_HALF)
    inspected = inspected_mask(policy, 64, 64)
    anomaly_map = _self_map(7.0).T.copy()
    rule = ScoreRule(kind="top_fraction_mean", fraction=0.01)

    judgement = judge(float(anomaly_map.max()), anomaly_map, policy, rule, WINDOW, inspected)

    values = anomaly_map[inspected].astype(np.float64)
    z = (values - np.median(values)) / (1.4826 * np.median(np.abs(values - np.median(values))))
    assert judgement.score == pytest.approx(np.sort(z)[-int(0.01 * len(z)) :].mean(), rel=1e-4)
    assert judgement.anomaly_map[inspected] == pytest.approx(z, rel=1e-3, abs=1e-4)


@given(
    st.sampled_from([0.0, 1.0, -3.0, 1e-30, 1e30]),
    st.floats(0, 5e-5),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_self_calibration_when_a_map_is_flat_then_there_is_no_verdict(level, noise, seed, with_region):
    """A map that is nothing but its own noise is refused, however quiet its largest value is."""
    policy = make_self_policy(**({"region_of_interest": LEFT_HALF} if with_region else {}))
    grain = np.random.default_rng(seed).uniform(-noise, noise, (8, 8))
    anomaly_map = (level + grain).astype(np.float32)

    with pytest.raises(FrameNotComparable):
        judge(level, anomaly_map, policy, MAXIMUM, WINDOW, inspected_mask(policy, 8, 8))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_self_calibration_when_values_are_not_finite_then_there_is_no_verdict(broken, share):
    """Medians pass over a few broken values, so every value is looked at before."""
    anomaly_map = _self_map()
    anomaly_map.ravel()[: int(share * anomaly_map.size)] = broken

    with pytest.raises(EngineFailed):
        judge(1.0, anomaly_map, make_self_policy(), MAXIMUM, WINDOW, None)


@given(st.floats(1e30, 3e38), st.booleans())
def test_self_calibration_when_a_value_is_huge_then_it_never_passes(value, flip):
    """What overflows on its way to units is above every threshold or refused."""
    anomaly_map = _self_map()
    anomaly_map[3, 3] = value

    judgement = judge(0.0 if flip else value, anomaly_map, make_self_policy(), MAXIMUM, WINDOW, None)

    assert judgement.verdict is Verdict.FAIL


@pytest.mark.parametrize(
    "fields",
    [
        {"calibration": "self"},
        {"least_spread": 0.1},
        {"calibration": "self", "least_spread": 0.0},
        {"calibration": "self", "least_spread": math.nan},
        {"calibration": "none"},
    ],
)
def test_policy_when_self_calibration_is_not_complete_then_it_is_refused(fields):
    """A policy that measures frames by themselves says from which spread on, and no other one does."""
    with pytest.raises(ValidationError):
        make_policy(**fields)


@pytest.mark.parametrize(
    ("policy", "is_calibrated", "may"),
    [(make_policy(), True, True), (make_policy(), False, False), (make_self_policy(), False, True)],
    ids=["calibrated", "not calibrated", "self"],
)
def test_verdicts_when_a_line_is_not_calibrated_then_only_a_policy_that_says_self_gives_them(
    policy, is_calibrated, may
):
    """Thresholds that nobody measured decide nothing, unless somebody said so in the policy file."""
    assert may_judge(policy, is_calibrated=is_calibrated) is may


@pytest.mark.parametrize(
    ("policy", "alike"),
    [
        (make_policy(version="strict", fail_threshold=0.15), True),
        (make_policy(region_of_interest=LEFT_HALF), False),
        (make_self_policy(), False),
    ],
    ids=["other thresholds", "another region", "measured by itself"],
)
def test_scores_when_policies_differ_then_are_alike_only_for_raw_ones_of_the_same_region(policy, alike):
    """What good parts say of one policy's scores counts for another that looks at the same in the same units."""
    assert scores_alike(policy, make_policy()) is alike
    assert scores_alike(make_policy(), policy) is alike
    assert scores_alike(policy, policy) is (policy.calibration == "good_parts")


@pytest.mark.parametrize(
    ("fields", "strict"),
    [
        ({}, True),
        ({"version": "2"}, True),
        ({"review_threshold": 0.09}, True),
        ({"review_threshold": 0.11}, False),
        ({"fail_threshold": 0.19}, True),
        ({"fail_threshold": 0.21}, False),
        ({"review_threshold": 0.09, "fail_threshold": 0.21}, False),
        ({"review_threshold": 0.11, "fail_threshold": 0.19}, False),
        ({"region_of_interest": LEFT_HALF}, False),
        ({"calibration": "self", "least_spread": 0.5}, False),
    ],
)
def test_strictness_when_one_rule_is_laxer_then_no_other_makes_up_for_it(fields, strict):
    """A policy stands in for another only where it stops and fails whatever that does, by the same scores."""
    own = make_policy(review_threshold=0.1, fail_threshold=0.2)

    assert is_as_strict(own.model_copy(update=fields), own) is strict


@pytest.mark.parametrize(("least_spread", "strict"), [(0.4, False), (0.5, True), (0.6, True)])
def test_strictness_when_frames_are_measured_by_themselves_then_flatter_ones_may_not_pass(least_spread, strict):
    """A map that has no verdict under the bundle's own policy must not get one under another."""
    policy = make_self_policy(least_spread=least_spread)

    assert is_as_strict(policy, make_self_policy(least_spread=0.5)) is strict


@pytest.mark.parametrize("other", [None, (((0.0, 0.0), (0.4, 0.0), (0.4, 1.0), (0.0, 1.0)),)])
def test_strictness_when_the_bundles_own_policy_has_another_region_then_scores_are_not_the_same(other):
    """A smaller region may miss a defect, and a larger one changes what a score is reduced from."""
    assert not is_as_strict(make_policy(region_of_interest=other), make_policy(region_of_interest=LEFT_HALF))
