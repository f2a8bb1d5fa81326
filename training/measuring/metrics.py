"""The field's figures, exact and safe with ties: AUROC, AP and F1-max of images and pixels, AUPRO, sPRO and SegF1.

Pure numpy; comes after `evaluate` has maps and scores, before the report. Rules:

- Larger scores are more anomalous; any real range is allowed and nothing is clipped or rescaled.
- Pixels of all images are pooled, normal images included; one curve a category. Where not all is inspected, pixels
  outside are left out, good and defective ones, and a defect counts with the part inside.
- What is not defined is a `Metric` without a value and with a reason, never 0 and never NaN.
- Sorting and ties are the business of `ranking.py`, intervals that of `bootstrap.py`.

Left out, each with its reason: image figures of a map's largest value, which the makers of MVTec's sets rank by, beside
those of a detector's own score: of two figures the better one would be quoted, and verdicts rest on the score; the area
under precision and recall by trapezoids, as VisA's makers take it, which is optimistic beside AP; the files that the
server of MVTec AD 2 takes for its private frames.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from training.data.samples import AUPRO_LIMIT
from training.measuring.bootstrap import Interval, PerImage, auroc_interval, bootstrap, histograms, interval, one_hot
from training.measuring.ranking import (
    Bools,
    Float32s,
    Float64s,
    PixelPool,
    Ranking,
    area_up_to,
    check_map,
    checked_labels,
    checked_samples,
    pool_pixels,
    pooled,
    pooled_weights,
    rank,
    saturating_weights,
    split_mask,
    values_of,
)

_NO_ANOMALOUS = "there is no anomalous sample"
_NO_NORMAL = "there is no normal sample"
_NO_REGION = "no mask marks a region"
_NO_FREE_PIXEL = "masks mark every pixel"
# What a missing class means where samples are pixels: frames of it may well exist.
_OF_PIXELS = {_NO_ANOMALOUS: _NO_REGION, _NO_NORMAL: _NO_FREE_PIXEL}
_NO_GOOD_PIXEL = "there is no held-out good frame to choose the threshold on"
_DEGENERATE = "degenerate: all scores are equal"
_DEGENERATE_GOOD = "degenerate: all pixels of the held-out good frames are equal, and so is the threshold"

# Of the good pixels, above their mean: where SegF1 cuts.
_DEVIATIONS = 3

_INTERVAL_BELOW = 100


@dataclass(frozen=True)
class Metric:
    """One figure, or the reason why there is none.

    Attributes:
        value: the figure, or None where it is not defined.
        reason: why there is no value, or what weakens it ("degenerate"; why no interval can be told).
        interval: 95 % interval where there are few anomalous images: of a stratified bootstrap over images, or the
            exact one of an image AUROC that is 1 or 0 (`bootstrap.auroc_interval`).
    """

    value: float | None
    reason: str | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """A curve to draw, thinned to few points that follow its bends.

    Attributes:
        x: `(n,)` float64.
        y: `(n,)` float64.
    """

    x: Float64s
    y: Float64s


@dataclass(frozen=True)
class PixelCurves:
    """The three curves of the pooled pixels: ROC, precision over recall, and PRO over the false positive rate."""

    roc: Curve
    precision_recall: Curve
    pro: Curve


def auroc(scores: ArrayLike, labels: ArrayLike) -> Metric:
    """Area under the ROC curve: P(s+ > s-) + P(s+ = s-) / 2.

    Args:
        scores: `(n,)` real.
        labels: `(n,)`, 1 or True = anomalous, 0 or False = normal.

    Raises:
        ScoreNotFinite: if a score is NaN or infinite.
        ValueError: if the shapes differ or a label is neither 0 nor 1.
    """
    return _auroc(_rank_samples(scores, labels))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> Metric:
    """Step-wise area under precision over recall, sum of (R_n - R_{n-1}) P_n; arguments and errors as `auroc`."""
    return _average_precision(_rank_samples(scores, labels))


def f1_max(scores: ArrayLike, labels: ArrayLike) -> Metric:
    """Largest F1 over all thresholds, which only the test labels know; arguments and errors as `auroc`."""
    return _f1_max(_rank_samples(scores, labels))


def image_metrics(scores: ArrayLike, labels: ArrayLike, *, seed: int = 0) -> dict[str, Metric]:
    """Return `i_auroc`, `i_ap` and `i_f1max`, with intervals where there are fewer than 100 anomalous images.

    Where images are too few, or draws of them all give one figure, there is a reason instead of an interval.

    Args:
        scores: `(n,)` real.
        labels: `(n,)`, 1 = anomalous, 0 = normal.
        seed: of the bootstrap.

    Raises:
        ScoreNotFinite: if a score is NaN or infinite.
        ValueError: if the shapes differ or a label is neither 0 nor 1.
    """
    values, anomalous = checked_samples(scores, labels)
    ranking = rank(values[~anomalous], values[anomalous])
    metrics = {"i_auroc": _auroc(ranking), "i_ap": _average_precision(ranking), "i_f1max": _f1_max(ranking)}
    if not 0 < ranking.anomalous < _INTERVAL_BELOW or ranking.normal == 0:
        return metrics
    distinct, group = np.unique(-values, return_inverse=True)
    per_image = PerImage(
        normal=one_hot(group, ~anomalous, distinct.size),
        anomalous=one_hot(group, anomalous, distinct.size),
        cover=None,
        regions=None,
    )
    figures = bootstrap(per_image, anomalous, seed=seed)
    images = (ranking.normal, ranking.anomalous)
    value = metrics["i_auroc"].value
    return {
        name: _with_interval(
            metric,
            interval(figures[:, column], images)
            if name != "i_auroc" or value is None
            else auroc_interval(value, figures[:, column], *images),
        )
        for column, (name, metric) in enumerate(metrics.items())
    }


def roc_curve(scores: ArrayLike, labels: ArrayLike, points: int = 400) -> Curve:
    """Return the true positive rate over the false positive rate; empty where a class is missing; errors as `auroc`."""
    return _roc_curve(_rank_samples(scores, labels), points)


def precision_recall_curve(scores: ArrayLike, labels: ArrayLike, points: int = 400) -> Curve:
    """Return precision over recall; empty where there is no anomalous sample; errors as `auroc`."""
    return _precision_recall_curve(_rank_samples(scores, labels), points)


def pixel_auroc(maps: Sequence[Float32s], masks: Sequence[Bools]) -> Metric:
    """AUROC of the pooled pixels; arguments and errors as `aupro`."""
    return _of_pixels(_auroc(_rank_pixels(maps, masks)))


def pixel_average_precision(maps: Sequence[Float32s], masks: Sequence[Bools]) -> Metric:
    """AP of the pooled pixels; arguments and errors as `aupro`."""
    return _of_pixels(_average_precision(_rank_pixels(maps, masks)))


def pixel_f1_max(maps: Sequence[Float32s], masks: Sequence[Bools]) -> Metric:
    """F1-max of the pooled pixels; arguments and errors as `aupro`."""
    return _of_pixels(_f1_max(_rank_pixels(maps, masks)))


def aupro(maps: Sequence[Float32s], masks: Sequence[Bools], limit: float = AUPRO_LIMIT) -> Metric:
    """Area under the per-region overlap for false positive rates up to `limit`, divided by `limit`.

    Regions are 8-connected components and weigh the same, whatever their size; normal pixels are all others, of all
    images (Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 6).

    Args:
        maps: `(H, W)` float32 each, at the size of the mask.
        masks: `(H, W)` bool each; all False for a normal image.
        limit: largest false positive rate, in (0, 1].

    Raises:
        ScoreNotFinite: if a map holds NaN or infinity.
        ValueError: if a map and its mask differ in size, or the limit is outside (0, 1].
    """
    return _area_of_cover(_rank_pixels(maps, masks), limit)


def spro(
    maps: Sequence[Float32s],
    channels: Sequence[Sequence[Bools]],
    saturations: Sequence[Sequence[int]],
    limit: float = 0.05,
    *,
    inspected: Sequence[Bools] | None = None,
) -> Metric:
    """Area under the saturated per-region overlap up to `limit`, divided by `limit`.

    A channel marks one defect, in one piece or several; covering `saturation` of its pixels is enough (Bergmann et
    al., "Beyond Dents and Scratches", IJCV 2022, Eq. 1). A pixel is normal only if no channel marks it.

    Args:
        maps: `(H, W)` float32 each.
        channels: the bool masks `(H, W)` of each image's defects; none for a normal image.
        saturations: the saturation area of each channel, in pixels (`saturation_area`).
        limit: largest false positive rate, in (0, 1].
        inspected: `(H, W)` bool each, or None for everything.

    Raises:
        ScoreNotFinite: if a map holds NaN or infinity.
        ValueError: if sizes or counts do not fit, a saturation is not positive, or the limit is outside (0, 1].
    """
    normals, pieces, targets = [], [], []
    for index, (anomaly_map, masks, wanted) in enumerate(zip(maps, channels, saturations, strict=True)):
        if len(masks) != len(wanted):
            raise ValueError(f"image {index} has {len(masks)} channels but {len(wanted)} saturation areas")
        anomalous = np.zeros(anomaly_map.shape, bool)
        seen = None if inspected is None else inspected[index]
        for mask, saturation in zip(masks, wanted, strict=True):
            check_map(anomaly_map, mask, index)
            if saturation < 1:
                raise ValueError(f"image {index} has a saturation area of {saturation} pixels; it must be positive")
            anomalous |= mask
            _, marked = split_mask(mask, seen)
            if marked.any():
                pieces.append(values_of(anomaly_map, marked))
                targets.append(min(saturation, pieces[-1].size))
        check_map(anomaly_map, anomalous, index)
        free, _ = split_mask(anomalous, seen)
        normals.append(values_of(anomaly_map, free))
    weights = [saturating_weights(piece, target) for piece, target in zip(pieces, targets, strict=True)]
    ranking = rank(pooled(normals), pooled(pieces), weights=pooled_weights(weights), regions=len(pieces))
    return _area_of_cover(ranking, limit)


def saturation_area(area_px: int, threshold: float, *, relative: bool) -> int:
    """Return how many pixels of a channel are enough, by the `defects_config.json` of MVTec LOCO.

    A number of pixels above the channel's area means all of it, as in the kit; the kit warns of it too, but there is
    nothing that a user could mend.

    Args:
        area_px: pixels of the channel.
        threshold: share of the area where `relative`, else pixels.
        relative: how to read the threshold.
    """
    return max(1, int(threshold * area_px)) if relative else max(1, min(int(threshold), area_px))


def seg_f1(
    maps: Iterable[Float32s],
    masks: Iterable[Bools],
    good_maps: Iterable[Float32s],
    *,
    inspected: Sequence[Bools] | None = None,
    good_inspected: Sequence[Bools] | None = None,
) -> Metric:
    """F1 of the pooled pixels at one threshold that good frames choose: mean + 3 standard deviations of their pixels.

    The deviation is the population's, of all good pixels pooled. A pixel is predicted where `map >= threshold`, as in
    a verdict. Every map and mask is looked at once and let go, so they may be made one by one.

    Args:
        maps: `(H, W)` float32 each, at the size of the mask.
        masks: `(H, W)` bool each; all False for a normal image.
        good_maps: `(H, W)` float32 each, of good frames that fitting never saw and that are no test frames.
        inspected: `(H, W)` bool each, of the maps; or None for everything.
        good_inspected: `(H, W)` bool each, of the good maps; or None for everything.

    Raises:
        ScoreNotFinite: if a map holds NaN or infinity.
        ValueError: if sizes or counts do not fit.
    """
    good = _good_pixels(good_maps, good_inspected)
    if good is None:
        return Metric(None, _NO_GOOD_PIXEL)
    hits, alarms, anomalous, normal = 0, 0, 0, 0
    low, high = math.inf, -math.inf
    for index, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True)):
        check_map(anomaly_map, mask, index)
        pieces = split_mask(mask, None if inspected is None else inspected[index])
        free, marked = (values_of(anomaly_map, piece) for piece in pieces)
        hits += int(np.count_nonzero(marked >= good.threshold))
        alarms += int(np.count_nonzero(free >= good.threshold))
        anomalous += marked.size
        normal += free.size
        for values in (free, marked):
            if values.size:
                low, high = min(low, float(values.min())), max(high, float(values.max()))
    if (missing := _missing_class(anomalous, normal)) is not None:
        return _of_pixels(missing)
    weakness = _DEGENERATE if low == high else _DEGENERATE_GOOD if good.are_equal else None
    return Metric(2 * hits / (hits + alarms + anomalous), weakness)


def aupro_name(limit: float) -> str:
    """Name AUPRO up to a false positive rate: `aupro` where that is the usual 0.3, else for example `aupro_at_0.05`."""
    return "aupro" if limit == AUPRO_LIMIT else f"aupro_at_{limit:g}"


def pixel_metrics(
    maps: Sequence[Float32s],
    masks: Sequence[Bools],
    labels: ArrayLike,
    aupro_limits: Sequence[float] = (AUPRO_LIMIT,),
    *,
    inspected: Sequence[Bools] | None = None,
    seed: int = 0,
) -> dict[str, Metric]:
    """Return `p_auroc`, `p_ap`, `p_f1max` and AUPRO, with intervals where fewer than 100 images are anomalous.

    Values are exact; the intervals come from histograms with some 4096 quantile bins (error below 1e-3).

    Args:
        maps: `(H, W)` float32 each, at the size of the mask.
        masks: `(H, W)` bool each; all False for a normal image. An anomalous image without a marked pixel counts as
            normal pixels.
        labels: `(n,)`, 1 = anomalous, 0 = normal; the strata of the bootstrap.
        aupro_limits: largest false positive rates of AUPRO, in (0, 1], each a figure of its own; see `aupro_name`.
        inspected: `(H, W)` bool each, or None for everything.
        seed: of the bootstrap.

    Raises:
        ScoreNotFinite: if a map holds NaN or infinity.
        ValueError: if sizes differ, a label is neither 0 nor 1, or a normal image has a marked pixel.
    """
    anomalous_images = checked_labels(labels, len(maps))
    pool = pool_pixels(maps, masks, inspected)
    for index, values in enumerate(pool.anomalous_of_image):
        if values.size and not anomalous_images[index]:
            raise ValueError(f"image {index} is labelled normal but its mask marks {values.size} pixels")
    ranking = _rank_pool(pool)
    metrics = {
        "p_auroc": _of_pixels(_auroc(ranking)),
        "p_ap": _of_pixels(_average_precision(ranking)),
        "p_f1max": _of_pixels(_f1_max(ranking)),
        **{aupro_name(limit): _area_of_cover(ranking, limit) for limit in aupro_limits},
    }
    if not 0 < int(anomalous_images.sum()) < _INTERVAL_BELOW or ranking.anomalous == 0 or ranking.normal == 0:
        return metrics
    per_image = histograms(pool, maps, masks, inspected)
    figures = bootstrap(per_image, anomalous_images, seed=seed, limits=aupro_limits)
    defective = int(anomalous_images.sum())
    images = (anomalous_images.size - defective, defective)
    return {
        name: _with_interval(metric, interval(figures[:, column], images))
        for column, (name, metric) in enumerate(metrics.items())
    }


def pixel_curves(maps: Sequence[Float32s], masks: Sequence[Bools], points: int = 400) -> PixelCurves:
    """Return the curves of the pooled pixels, to draw; arguments and errors as `aupro`."""
    ranking = _rank_pixels(maps, masks)
    return PixelCurves(
        roc=_roc_curve(ranking, points),
        precision_recall=_precision_recall_curve(ranking, points),
        pro=_pro_curve(ranking, points),
    )


def _auroc(ranking: Ranking) -> Metric:
    if (missing := _missing(ranking)) is not None:
        return missing
    # Twice the number of normal samples that each anomalous one beats, ties counted half: integers, hence exact.
    beaten = 2 * ranking.normal - ranking.fp_above - ranking.fp
    twice = int(np.sum(np.diff(ranking.tp, prepend=0) * beaten))
    return _metric(twice / (2 * ranking.anomalous * ranking.normal), ranking)


def _average_precision(ranking: Ranking) -> Metric:
    if (missing := _missing(ranking)) is not None:
        return missing
    precision = ranking.tp / (ranking.tp + ranking.fp)
    gained = np.diff(ranking.tp, prepend=0) / ranking.anomalous
    return _metric(float(np.sum(gained * precision)), ranking)


def _f1_max(ranking: Ranking) -> Metric:
    if (missing := _missing(ranking)) is not None:
        return missing
    return _metric(float(np.max(2 * ranking.tp / (ranking.tp + ranking.fp + ranking.anomalous))), ranking)


def _area_of_cover(ranking: Ranking, limit: float) -> Metric:
    if not 0 < limit <= 1:
        raise ValueError(f"the limit must be in (0, 1], got {limit}")
    if ranking.cover is None:
        return Metric(None, _NO_REGION)
    if ranking.normal == 0:
        return Metric(None, _NO_FREE_PIXEL)
    return _metric(area_up_to(*_steps(ranking, ranking.cover), limit) / limit, ranking)


class _GoodPixels(NamedTuple):
    """What the pixels of good frames say; the threshold is float64, so that no pixel is rounded across it."""

    threshold: np.float64
    are_equal: bool


def _good_pixels(maps: Iterable[Float32s], inspected: Sequence[Bools] | None) -> _GoodPixels | None:
    """Return the threshold of good pixels, or None where there is no pixel.

    Mean and squared deviations are joined image by image (Chan, Golub, LeVeque, "Algorithms for Computing the Sample
    Variance", The American Statistician 1983).
    """
    count, mean, squares = 0, 0.0, 0.0
    low, high = math.inf, -math.inf
    for index, anomaly_map in enumerate(maps):
        where = np.ones(anomaly_map.shape, bool) if inspected is None else inspected[index]
        check_map(anomaly_map, where, index)
        values = anomaly_map[where].astype(np.float64)
        if not values.size:
            continue
        own_mean, joined = float(values.mean()), count + values.size
        shift = own_mean - mean
        squares += float(np.sum((values - own_mean) ** 2)) + shift**2 * count * values.size / joined
        mean += shift * values.size / joined
        count, low, high = joined, min(low, float(values.min())), max(high, float(values.max()))
    if count == 0:
        return None
    if low == high:  # a mean of equal values may be an ulp off
        return _GoodPixels(np.float64(low), are_equal=True)
    return _GoodPixels(np.float64(mean + _DEVIATIONS * math.sqrt(squares / count)), are_equal=False)


def _missing(ranking: Ranking) -> Metric | None:
    return _missing_class(ranking.anomalous, ranking.normal)


def _missing_class(anomalous: int, normal: int) -> Metric | None:
    if anomalous == 0:
        return Metric(None, _NO_ANOMALOUS)
    return Metric(None, _NO_NORMAL) if normal == 0 else None


def _of_pixels(metric: Metric) -> Metric:
    return metric if metric.reason is None else replace(metric, reason=_OF_PIXELS.get(metric.reason, metric.reason))


def _metric(value: float, ranking: Ranking) -> Metric:
    # Sums of thousands of float64 shares may pass 1 by an ulp or two.
    return Metric(min(value, 1.0), _DEGENERATE if ranking.degenerate else None)


def _steps(ranking: Ranking, height: Float64s) -> tuple[Float64s, Float64s]:
    """Return the nodes of a curve over the false positive rate, `(2K + 2,)` each.

    A distinct anomalous score has two nodes, before and after its tie group; up to the next one the curve is level.
    """
    x = np.empty(2 * height.size + 2)
    y = np.empty_like(x)
    x[0], y[0], x[-1], y[-1] = 0.0, 0.0, 1.0, 1.0
    x[1:-1:2], x[2:-1:2] = ranking.fp_above / ranking.normal, ranking.fp / ranking.normal
    y[1:-1:2], y[2:-1:2] = np.concatenate(([0.0], height[:-1])), height
    return x, y


def _rank_samples(scores: ArrayLike, labels: ArrayLike) -> Ranking:
    values, anomalous = checked_samples(scores, labels)
    return rank(values[~anomalous], values[anomalous])


def _rank_pixels(maps: Sequence[Float32s], masks: Sequence[Bools]) -> Ranking:
    return _rank_pool(pool_pixels(maps, masks))


def _rank_pool(pool: PixelPool) -> Ranking:
    return rank(
        pool.normal,
        pooled(pool.anomalous_of_image),
        weights=pooled_weights(pool.weights_of_image),
        regions=sum(pool.regions_of_image),
    )


def _roc_curve(ranking: Ranking, points: int) -> Curve:
    if _missing(ranking) is not None:
        return Curve(np.empty(0), np.empty(0))
    return _thinned(*_steps(ranking, ranking.tp / ranking.anomalous), points)


def _pro_curve(ranking: Ranking, points: int) -> Curve:
    if ranking.cover is None or ranking.normal == 0:
        return Curve(np.empty(0), np.empty(0))
    return _thinned(*_steps(ranking, ranking.cover), points)


def _precision_recall_curve(ranking: Ranking, points: int) -> Curve:
    if ranking.anomalous == 0:
        return Curve(np.empty(0), np.empty(0))
    return _thinned(ranking.tp / ranking.anomalous, ranking.tp / (ranking.tp + ranking.fp), points)


def _thinned(x: Float64s, y: Float64s, points: int) -> Curve:
    """Keep at most `points` nodes, evenly spread along the curve's length, and both ends."""
    if x.size <= points:
        return Curve(x, y)
    length = np.concatenate(([0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))))
    kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], points)))
    kept[0], kept[-1] = 0, x.size - 1
    return Curve(x[kept], y[kept])


def _with_interval(metric: Metric, found: Interval) -> Metric:
    """Put an interval to a figure, or the reason why it has none."""
    if metric.value is None:
        return metric
    reasons = [reason for reason in (metric.reason, found.reason) if reason is not None]
    return replace(metric, interval=found.bounds, reason="; ".join(reasons) or None)
