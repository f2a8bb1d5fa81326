"""Everything that turns a score and a map into a verdict; it lives outside the weights and has its own version.

The only function of the project that may say `PASS`, `judge`, says it of finite numbers below both thresholds, and of
nothing else. Whether the frame shows a picture that it could be said of is asked before, of every frame and for every
policy (`pictures.py`). Region filters decide what is shown, never the verdict: a region that is too small to report
does not make a part good.

Thresholds come from good parts (`calibration: "good_parts"`, the default), and a line without such a calibration gets
no verdict. For lines that have no good parts yet, a policy file may say `calibration: "self"`: each frame is then
measured by itself. Over the inspected values m of its map,

    spread = 1.4826 * median(|m - median(m)|)        z = (m - median(m)) / spread

z is what thresholds, regions and heatmaps of such a policy refer to, and the score is what the bundle's score rule
makes of z: robust standard deviations above the frame's own middle (GRNR, arXiv:2406.07333, fails from 8 on). It means:

- Nothing is promised: there is no p-value, no false-reject rate, and the answer says `calibration: "self"`.
- What can't be measured never passes. A covered lens, an empty or a saturated frame gives a flat map whose noise would
  be its own measure; a spread below `least_spread` is refused, as is any number that is not finite. Where there are no
  good parts, this alone tells such a frame.
- A frame that is odd in most places is its own measure and may pass. So it is for surfaces that look the same all over
  and have small defects, until good parts are at hand: `flawline calibrate`.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from service.contract.regions import Polygon, Region, Window, find_regions, rasterise
from service.errors import BundleRefused, EngineFailed, FrameNotComparable

# Where thresholds come from; see above.
CalibrationKind = Literal["good_parts", "self"]

# Makes the median absolute deviation of normally distributed values their standard deviation.
_DEVIATIONS_OF_MEDIAN = 1.4826
_LARGEST = float(np.finfo(np.float32).max)
_LEAST_SHARE_OF_DEVIATION = 0.25

VersionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Verdict(StrEnum):
    """What is said of a frame; everything that is not one of the first three is `NO_VERDICT`."""

    PASS = "PASS"  # noqa: S105 - a verdict, not a password
    REVIEW = "REVIEW"
    FAIL = "FAIL"
    NO_VERDICT = "NO_VERDICT"


class ScoreRule(BaseModel):
    """How a score is reduced from its map, so that it can be reduced again inside a region of interest.

    Attributes:
        kind: mean of the largest values, the largest value, or the standard deviation of all.
        fraction: share of the values that the mean is of, in (0, 1]; None for the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["top_fraction_mean", "maximum", "deviation"]
    fraction: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _fraction_belongs_to_its_kind(self) -> Self:
        if (self.kind == "top_fraction_mean") != (self.fraction is not None):
            raise ValueError("a fraction belongs to top_fraction_mean, and only there")
        return self

    def reduce(self, values: NDArray[np.float32]) -> float:
        """Reduce inspected map values `(n,)` to one score.

        Raises:
            BundleRefused: if nothing is inspected.
        """
        if values.size == 0:
            raise BundleRefused("The region of interest leaves no map value to inspect; enlarge it.")
        if self.kind == "deviation":
            return float(values.std(dtype=np.float64))
        if self.fraction is None:
            return float(values.max())
        count = max(1, int(values.size * self.fraction))
        return float(np.partition(values, values.size - count)[values.size - count :].mean(dtype=np.float32))


class Policy(BaseModel):
    """A line's rules for verdicts.

    Attributes:
        version: name under which answers and requests refer to it.
        review_threshold: from this score on a part is at least `REVIEW`.
        fail_threshold: from this score on a part is `FAIL`; not below `review_threshold`.
        region_threshold: map values from here on belong to regions, and are drawn warm in heatmaps.
        map_floor: map value of an ordinary good pixel, drawn as nothing; below `region_threshold`.
        region_of_interest: polygons in fractions of the frame, `(x, y)`; without it everything is inspected. Pixels
            outside count neither for the score nor for regions.
        min_region_area_px: smaller regions are not reported, in pixels of the original frame.
        max_regions: at most so many regions are described; the number of all is always told.
        calibration: `good_parts`, whose raw scores the thresholds were chosen by; or `self`, thresholds in units of
            each frame's own spread, with which nothing is promised.
        least_spread: with `self`, frames whose map spreads less than this have no verdict; in units of the raw map.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: VersionName
    review_threshold: FiniteFloat
    fail_threshold: FiniteFloat
    region_threshold: FiniteFloat
    map_floor: FiniteFloat
    region_of_interest: tuple[Polygon, ...] | None = None
    min_region_area_px: float = Field(default=0, ge=0)
    max_regions: int = Field(default=50, ge=0, le=1000)
    calibration: CalibrationKind = "good_parts"
    least_spread: FiniteFloat | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _thresholds_are_ordered(self) -> Self:
        if self.review_threshold > self.fail_threshold:
            raise ValueError("review_threshold must not be above fail_threshold")
        if self.map_floor >= self.region_threshold:
            raise ValueError("map_floor must be below region_threshold")
        if (self.calibration == "self") != (self.least_spread is not None):
            raise ValueError("least_spread belongs to the calibration self, and only there")
        for polygon in self.region_of_interest or ():
            if len(polygon) < 3 or not all(0 <= v <= 1 for point in polygon for v in point):
                raise ValueError("a region of interest is polygons of at least three points in fractions of the frame")
        return self


class PolicyFile(Policy):
    """A line's own policy as a file of the store holds it: the rules, and the network whose scores they are for.

    Attributes:
        network: that of the bundles that it may judge, which `flawline verify` and the policies of the line tell. It
            may be missing where the rules pass nothing that the bundle's own policy stops, whatever the network is.
    """

    network: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @property
    def rules(self) -> Policy:
        """What judges."""
        return Policy(**self.model_dump(exclude={"network"}))


def policy_digest(policy: Policy) -> str:
    """Return the SHA-256 of a policy's canonical JSON."""
    text = json.dumps(policy.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Judgement:
    """What a policy says of one frame.

    Attributes:
        verdict: `PASS`, `REVIEW` or `FAIL`.
        score: the score that was compared, inside the region of interest where there is one.
        regions: at most `max_regions`, highest peak first, in pixels of the original frame.
        regions_total: how many there are.
        anomaly_map: `(h, w)` float32, in the units of the policy's thresholds.
    """

    verdict: Verdict
    score: float
    regions: list[Region]
    regions_total: int
    anomaly_map: NDArray[np.float32] = field(
        compare=False
    )  # arrays have no single truth, and the score follows from it


class Compared(NamedTuple):
    """What a policy's thresholds are compared with.

    Attributes:
        score: of the frame.
        anomaly_map: `(h, w)` float32.
    """

    score: float
    anomaly_map: NDArray[np.float32]


def refuse_unfit_region(inspected: NDArray[np.bool_] | None, rule: ScoreRule) -> None:
    """Refuse a region of interest that a defect could fill, where the score is how uneven the map is.

    A defect that fills all that is inspected leaves an even map, and would pass.

    Args:
        inspected: `inspected_mask(policy, h, w)`, `(h, w)` bool.
        rule: of the detector.

    Raises:
        BundleRefused: if the region is smaller than a quarter of the map.
    """
    if rule.kind == "deviation" and inspected is not None and inspected.mean() < _LEAST_SHARE_OF_DEVIATION:
        raise BundleRefused(
            "This detector scores how uneven its map is, and a defect could fill so small a region of interest and "
            f"leave it even. Inspect at least {_LEAST_SHARE_OF_DEVIATION:.0%} of what it sees, crop the frames, or "
            "take a detector that scores by the largest values."
        )


def may_judge(policy: Policy, *, is_calibrated: bool) -> bool:
    """Tell whether a policy may give verdicts: its thresholds come from good parts, or it says that none are needed."""
    return is_calibrated or policy.calibration == "self"


def scores_alike(policy: Policy, other: Policy) -> bool:
    """Tell whether two policies score frames alike: by raw scores, of the same region of interest.

    What good parts say of scores, p-values and rates among it, holds for a policy that scores as the one did that they
    were calibrated under, and for no other.
    """
    by_raw_scores = policy.calibration == other.calibration == "good_parts"
    return by_raw_scores and policy.region_of_interest == other.region_of_interest


def is_as_strict(policy: Policy, other: Policy) -> bool:
    """Tell whether a policy passes nothing that another one stops, and fails whatever that fails, by any network.

    Both must compare the same scores for that: of the same region of interest, and measured in the same way.
    """
    return (
        (policy.calibration, policy.region_of_interest) == (other.calibration, other.region_of_interest)
        and policy.review_threshold <= other.review_threshold
        and policy.fail_threshold <= other.fail_threshold
        and (policy.least_spread or 0.0) >= (other.least_spread or 0.0)
    )


def inspected_mask(
    policy: Policy, height: int, width: int, *, window: Window = (0.0, 0.0, 1.0, 1.0)
) -> NDArray[np.bool_] | None:
    """Lay the region of interest on a map's grid; None where everything is inspected.

    Args:
        policy: the line's rules.
        height: of the map.
        width: of the map.
        window: where the map lies on the frame, `(top, left, height, width)` in fractions of the frame, which is
            `InputSpec.window(1, 1)`; a centre crop's map does not cover the frame that polygons refer to.

    Returns:
        `(height, width)` bool.

    Raises:
        BundleRefused: if nothing is left to inspect.
    """
    if policy.region_of_interest is None:
        return None
    top, left, window_height, window_width = window
    polygons = [
        tuple(((x - left) / window_width, (y - top) / window_height) for x, y in polygon)
        for polygon in policy.region_of_interest
    ]
    mask = rasterise(polygons, height, width)
    if not mask.any():
        raise BundleRefused("The region of interest leaves nothing to inspect; move or enlarge it.")
    return mask


def image_score(
    score: float, anomaly_map: NDArray[np.float32], inspected: NDArray[np.bool_] | None, rule: ScoreRule
) -> float:
    """Return the score that a policy compares: the graph's own, or reduced again inside the region of interest.

    Raises:
        EngineFailed: if the score or an inspected map value is not finite.
        BundleRefused: if nothing is inspected.
    """
    # A NaN anywhere is both the largest and the smallest value, so that two looks tell what a mask of all cells would.
    if not (math.isfinite(score) and math.isfinite(anomaly_map.max()) and math.isfinite(anomaly_map.min())):
        raise EngineFailed("The engine returned a score or map that is not finite; the part has no verdict.")
    return score if inspected is None else rule.reduce(anomaly_map[inspected])


def bring_to_units(
    score: float,
    anomaly_map: NDArray[np.float32],
    policy: Policy,
    rule: ScoreRule,
    inspected: NDArray[np.bool_] | None,
) -> Compared:
    """Bring a raw score and map to the units of a policy's thresholds: as they are, or measured by the frame itself.

    Args:
        score: raw score of the graph.
        anomaly_map: `(h, w)` float32, raw.
        policy: the line's rules.
        rule: how scores are reduced from maps.
        inspected: `inspected_mask(policy, h, w)`.

    Raises:
        EngineFailed: if a number is not finite.
        FrameNotComparable: if the frame shall be measured by itself and its map is flat.
        BundleRefused: if nothing is inspected.
    """
    raw = image_score(score, anomaly_map, inspected, rule)
    if policy.calibration == "good_parts":
        return Compared(raw, anomaly_map)
    wide = anomaly_map.astype(np.float64)  # where no difference of two float32 values overflows
    values = wide if inspected is None else wide[inspected]
    middle, spread = float(np.median(values)), spread_of(values)
    # Written so that a NaN is refused.
    if policy.least_spread is None or not spread >= policy.least_spread:
        raise FrameNotComparable(
            "The frame is flat, as with a covered lens or without light, and frames of this line are measured by "
            "themselves; look at the camera, or calibrate the line with good parts: flawline calibrate."
        )
    measured = np.clip((wide - middle) / spread, -_LARGEST, _LARGEST).astype(np.float32)
    return Compared(rule.reduce(measured.ravel() if inspected is None else measured[inspected]), measured)


def spread_of(anomaly_map: NDArray[np.floating]) -> float:
    """Return the robust standard deviation of map values of any shape: 1.4826 times its median absolute deviation."""
    return _DEVIATIONS_OF_MEDIAN * float(np.median(np.abs(anomaly_map - np.median(anomaly_map))))


def verdict_of(score: float, policy: Policy) -> Verdict:
    """Compare a finite score with a policy's two thresholds."""
    return verdict_between(score, policy.review_threshold, policy.fail_threshold)


def verdict_between(score: float, review_threshold: float, fail_threshold: float) -> Verdict:
    """Compare a finite score with two thresholds, the first of which is not above the second."""
    if score >= fail_threshold:
        return Verdict.FAIL
    if score >= review_threshold:
        return Verdict.REVIEW
    return Verdict.PASS if score < review_threshold else Verdict.NO_VERDICT


def judge(
    score: float,
    anomaly_map: NDArray[np.float32],
    policy: Policy,
    rule: ScoreRule,
    window: Window,
    inspected: NDArray[np.bool_] | None,
) -> Judgement:
    """Turn one frame's score and map into a verdict and regions.

    Args:
        score: raw score of the graph.
        anomaly_map: `(h, w)` float32.
        policy: the line's rules.
        rule: how scores are reduced from maps.
        window: where the map lies on the original frame, `(top, left, height, width)` in its pixels.
        inspected: `inspected_mask(policy, h, w)`, computed once a policy.

    Raises:
        EngineFailed: if a number is not finite.
        FrameNotComparable: if the policy measures frames by themselves and this one is flat.
    """
    score, anomaly_map = bring_to_units(score, anomaly_map, policy, rule, inspected)
    visible = anomaly_map if inspected is None else np.where(inspected, anomaly_map, np.float32(-np.inf))
    regions, total = find_regions(
        visible, policy.region_threshold, window, policy.min_region_area_px, policy.max_regions
    )
    return Judgement(verdict_of(score, policy), score, regions, total, anomaly_map)
