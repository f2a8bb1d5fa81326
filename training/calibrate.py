"""Turns held-out good parts into a calibration and the default policy: no defect is ever needed for a threshold.

Comes after fitting, before the export; the thresholds are those of `service.contract.calibration`, so a rate means the
same to whoever trains and to whoever serves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.contract.calibration import Calibration, Threshold, needed_good_parts, reachable_rate
from service.contract.frames import decode_region_mask
from service.contract.policy import Policy, ScoreRule, image_score, inspected_mask, refuse_unfit_region
from service.contract.regions import Polygon, Window, outline_mask_with_holes
from service.errors import CalibrationRefused, ParameterInvalid, UnreadableFrame
from training.measuring.peaks import Peaks, find_peaks

# Smaller components of a region-of-interest mask are specks of a brush, not places to inspect.
_SMALLEST_ROI_FRACTION = 1e-4


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What good parts alone decide.

    Attributes:
        calibration: sorted good-part values, for p-values and drift.
        policy: the bundle's default rules.
        review: the threshold of `REVIEW` and its promise.
        fail: the threshold of `FAIL` and its promise.
        peaks: where good parts look oddest, which is what thresholds are set by.
    """

    calibration: Calibration
    policy: Policy
    review: Threshold
    fail: Threshold
    peaks: Peaks


def refuse_unsupported_rates(
    good_parts: int, review_rate: float, fail_rate: float, *, frames: int | None = None, splits: bool = True
) -> None:
    """Refuse rates that so many held-out good parts can't support; asked before fitting, not an hour later.

    Args:
        good_parts: how many are held out.
        review_rate: wanted share of good parts that are at least `REVIEW`.
        fail_rate: wanted share of good parts that are `FAIL`.
        frames: of these parts; None where each has one.
        splits: whether the parts are a share of more, which could be a larger one.

    Raises:
        CalibrationRefused: with the number of good parts that would do, or what is wrong with the rates.
    """
    if 0 < review_rate < fail_rate < 1:
        raise CalibrationRefused(
            f"The fail rate, {fail_rate:g}, must not be above the review rate, {review_rate:g}: a part that fails "
            f"would also be reviewed. Give --review-rate {fail_rate:g} or above as well, or a lower --fail-rate."
        )
    if not 0 < fail_rate <= review_rate < 1:
        raise CalibrationRefused(
            "The fail rate must be above 0 and not above the review rate, which must be below 1: a part that fails "
            f"would also be reviewed. They are {fail_rate:g} and {review_rate:g}; for example use 0.05 and 0.1."
        )
    needed = needed_good_parts(fail_rate)
    if good_parts < needed:
        lowest = reachable_rate(good_parts)
        also = f" with --review-rate {lowest:g}" if lowest > review_rate else ""
        share = ", hold out a larger share," if splits else ""
        views = "" if frames in (None, good_parts) else f", in {frames} frames that show them several times"
        raise CalibrationRefused(
            f"A false-reject rate of {fail_rate:g} needs at least {needed} good parts that fitting never saw, and "
            f"{good_parts} {'is' if good_parts == 1 else 'are'} held out{views}; add good "
            f"{'parts' if views else 'frames'}{share} or accept a higher rate: --fail-rate "
            f"{lowest:g}{also}, or above."
        )


def calibrate(
    scores: NDArray[np.float32],
    maps: NDArray[np.float32],
    rule: ScoreRule,
    *,
    review_rate: float,
    fail_rate: float,
    version: str,
    region_of_interest: tuple[Polygon, ...] | None = None,
    window: Window = (0.0, 0.0, 1.0, 1.0),
    parts: NDArray[np.int64] | None = None,
) -> Calibrated:
    """Calibrate on good parts that fitting never saw.

    A part of several views is stopped where any of them is, so it counts once, by its highest score.

    Args:
        scores: `(n,)` raw scores of the detector.
        maps: `(n, h, w)` float32.
        rule: how scores are reduced from maps.
        review_rate: wanted share of good parts that are at least `REVIEW`, those that fail included.
        fail_rate: wanted share of good parts that are `FAIL`.
        version: of the policy.
        region_of_interest: polygons in fractions of the frame, or None for everything.
        window: where the maps lie on the frame, `InputSpec.window(1, 1)`.
        parts: `(n,)` which part each frame shows; None where each shows one of its own.

    Raises:
        CalibrationRefused: if there are too few good parts for a rate, or a score is not finite.
        BundleRefused: if the region of interest leaves nothing to inspect, or too little for this detector.
    """
    good_parts = len(scores) if parts is None else np.unique(parts).size
    refuse_unsupported_rates(good_parts, review_rate, fail_rate, frames=len(scores))
    policy = _without_thresholds(version, region_of_interest)
    inspected = inspected_mask(policy, *maps.shape[1:], window=window)
    refuse_unfit_region(inspected, rule)
    if not (np.isfinite(scores).all() and np.isfinite(maps).all()):
        raise CalibrationRefused("A good frame's score or map is not finite; look at the frames and the training loss.")
    compared = [image_score(float(score), amap, inspected, rule) for score, amap in zip(scores, maps, strict=True)]
    visible = maps.reshape(len(maps), -1) if inspected is None else maps[:, inspected]
    calibration = Calibration.from_good_parts(
        np.array(compared, np.float32), visible.max(axis=1), float(np.median(visible)), parts
    )
    review, fail = calibration.threshold(review_rate), calibration.threshold(fail_rate)
    thresholds = {
        "review_threshold": review.value,
        "fail_threshold": fail.value,
        "region_threshold": calibration.peak_threshold(review_rate).value,
        "map_floor": calibration.map_floor,
    }
    policy = Policy.model_validate(policy.model_dump() | thresholds)
    return Calibrated(calibration, policy, review, fail, find_peaks(maps, inspected, window))


def refuse_unusable_region(
    region_of_interest: tuple[Polygon, ...], map_size: tuple[int, int], rule: ScoreRule, window: Window
) -> None:
    """Refuse a region of interest that no calibration could use; asked before fitting, not an hour later.

    Args:
        region_of_interest: polygons in fractions of the frame.
        map_size: `(height, width)` of a frame's map.
        rule: how scores are reduced from maps.
        window: where the maps lie on the frame, `InputSpec.window(1, 1)`.

    Raises:
        BundleRefused: if it leaves nothing to inspect, or too little for this detector.
    """
    refuse_unfit_region(inspected_mask(_without_thresholds("0", region_of_interest), *map_size, window=window), rule)


def _without_thresholds(version: str, region_of_interest: tuple[Polygon, ...] | None) -> Policy:
    """Return what the service's own function rasterises a region of interest from."""
    return Policy(
        version=version,
        review_threshold=0,
        fail_threshold=0,
        region_threshold=1,
        map_floor=0,
        region_of_interest=region_of_interest,
    )


def read_region_of_interest(path: Path) -> tuple[Polygon, ...]:
    """Read a mask image, white where parts are inspected, as polygons in fractions of the frame.

    Greys count as the nearer of the two. Black places inside a white one are left out as well, as the hole of a washer.
    Specks of either are not minded.

    Raises:
        UnreadableFrame: if the file can't be decoded or marks nothing.
    """
    mask = _read_mask(path)
    polygons = outline_mask_with_holes(mask, _SMALLEST_ROI_FRACTION * mask.size)
    if not polygons:
        raise UnreadableFrame(
            f"The region-of-interest mask {path} has no white; paint white where parts are inspected."
        )
    return polygons


def refuse_other_shape(path: Path, frame_sizes: Sequence[tuple[int, int]]) -> None:
    """Refuse a mask image that was not drawn on a line's frames: laid over them, it would be squeezed.

    Another size will do, as of a thumbnail. Where the frames' own aspect ratios differ, any between them will.

    Args:
        path: of the mask.
        frame_sizes: `(height, width)` of frames, the most common one first.

    Raises:
        UnreadableFrame: if the file can't be decoded.
        ParameterInvalid: if its aspect ratio is none of the frames', but for a pixel of each side.
    """
    height, width = _read_mask(path).shape
    if not has_shape_of((height, width), frame_sizes):
        frame_height, frame_width = frame_sizes[0]
        raise ParameterInvalid(
            f"The region-of-interest mask {path} has {width}x{height} pixels and the frames {frame_width}x"
            f"{frame_height}, which is another aspect ratio; draw it on a frame."
        )


def tell_other_shapes(path: Path, frame_sizes: Sequence[tuple[int, int]]) -> str | None:
    """Say that a mask is squeezed over some frames, because they have other aspect ratios; None where it is not.

    Args:
        path: of the mask, which `refuse_other_shape` has let pass.
        frame_sizes: `(height, width)` of frames.

    Raises:
        UnreadableFrame: if the file can't be decoded.
    """
    size = _read_mask(path).shape
    others = [frame_size for frame_size in frame_sizes if not has_shape_of(size, [frame_size])]
    if not others:
        return None
    return (
        f"The region-of-interest mask {path} has {size[1]}x{size[0]} pixels, and some frames another aspect ratio, "
        f"like {others[0][1]}x{others[0][0]}: it is squeezed over them and may leave out other places than were "
        "painted. If they come from another camera, make them a line with a mask of its own."
    )


def has_shape_of(size: tuple[int, int], frame_sizes: Sequence[tuple[int, int]]) -> bool:
    """Tell whether `(height, width)` has the aspect ratio of frames, or one between theirs, but for a pixel a side."""
    lowest, highest = _aspect_ratios(*size)
    ratios = [_aspect_ratios(*frame_size) for frame_size in frame_sizes]
    return highest >= min(low for low, _ in ratios) and lowest <= max(high for _, high in ratios)


def _aspect_ratios(height: int, width: int) -> tuple[float, float]:
    """Return between which width / height lies that was rounded to whole pixels, up or down."""
    return (width - 1) / (height + 1), (width + 1) / max(1, height - 1)


def _read_mask(path: Path) -> NDArray[np.bool_]:
    try:
        return decode_region_mask(path.read_bytes())
    except OSError as error:
        raise UnreadableFrame(f"The region-of-interest mask {path} can't be read.") from error
