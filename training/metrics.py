"""The field's figures, exact and safe with ties: AUROC, AP and F1-max of images and pixels, AUPRO and sPRO.

Pure numpy; comes after `evaluate` has maps and scores, before the report. Rules:

- Larger scores are more anomalous; any real range is allowed and nothing is clipped or rescaled.
- Pixels of all images are pooled, normal images included; one curve a category.
- What is not defined is a `Metric` without a value and with a reason, never 0 and never NaN.

Why it is fast: every curve used here changes its height at anomalous scores only. Between two of them ROC and PRO run
level, AP adds nothing and F1 falls. So normal scores are sorted once (values alone, no permutation) and looked up at
the distinct anomalous scores, which are few; all pixel figures share that one sort.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from service.contract.regions import label_components

Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]
Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]

_NO_ANOMALOUS = "there is no anomalous sample"
_NO_NORMAL = "there is no normal sample"
_NO_REGION = "no mask marks a region"
_DEGENERATE = "degenerate: all scores are equal"

_RESAMPLES = 1000
_INTERVAL_BELOW = 100
_INTERVAL_PERCENTILES = (2.5, 97.5)
# Pixel intervals come from per-image histograms: quantile bins of normal and of anomalous pixels, this many of each.
_BINS = 2048
# Bound on the elements of one chunk of the resampling matrix, to keep its memory small.
_CHUNK_ELEMENTS = 4_000_000


class ScoreNotFinite(ValueError):
    """A score or map holds NaN or infinity; such values have no rank and are never replaced by a guess."""


@dataclass(frozen=True)
class Metric:
    """One figure, or the reason why there is none.

    Attributes:
        value: the figure, or None where it is not defined.
        reason: why there is no value, or what weakens it ("degenerate").
        interval: 95 % interval of a stratified bootstrap over images, where there are few anomalous ones.
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


@dataclass(frozen=True)
class _Ranking:
    """All that the curves need, at the K distinct anomalous scores in falling order.

    Attributes:
        tp: `(K,)` anomalous samples with a score at or above.
        fp_above: `(K,)` normal samples with a score above.
        fp: `(K,)` normal samples with a score at or above.
        cover: `(K,)` mean covered share of the regions, or None where there are no regions to speak of.
        normal: number of normal samples.
        anomalous: number of anomalous samples.
        degenerate: whether all scores are equal.
    """

    tp: Int64s
    fp_above: Int64s
    fp: Int64s
    cover: Float64s | None
    normal: int
    anomalous: int
    degenerate: bool


# ---- image level


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

    Args:
        scores: `(n,)` real.
        labels: `(n,)`, 1 = anomalous, 0 = normal.
        seed: of the bootstrap.

    Raises:
        ScoreNotFinite: if a score is NaN or infinite.
        ValueError: if the shapes differ or a label is neither 0 nor 1.
    """
    values, anomalous = _checked_samples(scores, labels)
    ranking = _rank(values[~anomalous], values[anomalous])
    metrics = {"i_auroc": _auroc(ranking), "i_ap": _average_precision(ranking), "i_f1max": _f1_max(ranking)}
    if not 0 < ranking.anomalous < _INTERVAL_BELOW or ranking.normal == 0:
        return metrics
    distinct, group = np.unique(-values, return_inverse=True)
    per_image = _PerImage(
        normal=_one_hot(group, ~anomalous, distinct.size),
        anomalous=_one_hot(group, anomalous, distinct.size),
        cover=None,
        regions=None,
    )
    names = ("i_auroc", "i_ap", "i_f1max")
    return _with_intervals(metrics, names, _bootstrap(per_image, anomalous, seed=seed, limit=1.0))


def roc_curve(scores: ArrayLike, labels: ArrayLike, points: int = 400) -> Curve:
    """Return the true positive rate over the false positive rate; empty where a class is missing; errors as `auroc`."""
    return _roc_curve(_rank_samples(scores, labels), points)


def precision_recall_curve(scores: ArrayLike, labels: ArrayLike, points: int = 400) -> Curve:
    """Return precision over recall; empty where there is no anomalous sample; errors as `auroc`."""
    return _precision_recall_curve(_rank_samples(scores, labels), points)


# ---- pixel level


def pixel_auroc(maps: Sequence[Float32s], masks: Sequence[Bools]) -> Metric:
    """AUROC of the pooled pixels; arguments and errors as `aupro`."""
    return _auroc(_rank_pixels(maps, masks))


def pixel_average_precision(maps: Sequence[Float32s], masks: Sequence[Bools]) -> Metric:
    """AP of the pooled pixels; arguments and errors as `aupro`."""
    return _average_precision(_rank_pixels(maps, masks))


def pixel_f1_max(maps: Sequence[Float32s], masks: Sequence[Bools]) -> Metric:
    """F1-max of the pooled pixels; arguments and errors as `aupro`."""
    return _f1_max(_rank_pixels(maps, masks))


def aupro(maps: Sequence[Float32s], masks: Sequence[Bools], limit: float = 0.3) -> Metric:
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
) -> Metric:
    """Area under the saturated per-region overlap up to `limit`, divided by `limit`.

    A channel marks one defect, in one piece or several; covering `saturation` of its pixels is enough (Bergmann et
    al., "Beyond Dents and Scratches", IJCV 2022, Eq. 1). A pixel is normal only if no channel marks it.

    Args:
        maps: `(H, W)` float32 each.
        channels: the bool masks `(H, W)` of each image's defects; none for a normal image.
        saturations: the saturation area of each channel, in pixels (`saturation_area`).
        limit: largest false positive rate, in (0, 1].

    Raises:
        ScoreNotFinite: if a map holds NaN or infinity.
        ValueError: if sizes or counts do not fit, a saturation is not positive, or the limit is outside (0, 1].
    """
    normals, pieces, targets = [], [], []
    for index, (anomaly_map, masks, wanted) in enumerate(zip(maps, channels, saturations, strict=True)):
        if len(masks) != len(wanted):
            raise ValueError(f"image {index} has {len(masks)} channels but {len(wanted)} saturation areas")
        anomalous = np.zeros(anomaly_map.shape, bool)
        for mask, saturation in zip(masks, wanted, strict=True):
            _check_map(anomaly_map, mask, index)
            if saturation < 1:
                raise ValueError(f"image {index} has a saturation area of {saturation} pixels; it must be positive")
            anomalous |= mask
            if mask.any():
                pieces.append(_values_of(anomaly_map, mask))
                targets.append(min(saturation, pieces[-1].size))
        _check_map(anomaly_map, anomalous, index)
        normals.append(_values_of(anomaly_map, ~anomalous))
    weights = [_saturating_weights(piece, target) for piece, target in zip(pieces, targets, strict=True)]
    ranking = _rank(_pooled(normals), _pooled(pieces), weights=_pooled_weights(weights), regions=len(pieces))
    return _area_of_cover(ranking, limit)


def saturation_area(area_px: int, threshold: float, *, relative: bool) -> int:
    """Return how many pixels of a channel are enough, by the `defects_config.json` of MVTec LOCO.

    Args:
        area_px: pixels of the channel.
        threshold: share of the area where `relative`, else pixels.
        relative: how to read the threshold.
    """
    return max(1, int(threshold * area_px)) if relative else max(1, min(int(threshold), area_px))


def pixel_metrics(
    maps: Sequence[Float32s],
    masks: Sequence[Bools],
    labels: ArrayLike,
    aupro_limit: float = 0.3,
    *,
    seed: int = 0,
) -> dict[str, Metric]:
    """Return `p_auroc`, `p_ap`, `p_f1max` and `aupro`, with intervals where fewer than 100 images are anomalous.

    Values are exact; the intervals come from histograms with some 4096 quantile bins (error below 1e-3).

    Args:
        maps: `(H, W)` float32 each, at the size of the mask.
        masks: `(H, W)` bool each; all False for a normal image. An anomalous image without a marked pixel counts as
            normal pixels.
        labels: `(n,)`, 1 = anomalous, 0 = normal; the strata of the bootstrap.
        aupro_limit: largest false positive rate of AUPRO, in (0, 1].
        seed: of the bootstrap.

    Raises:
        ScoreNotFinite: if a map holds NaN or infinity.
        ValueError: if sizes differ, a label is neither 0 nor 1, or a normal image has a marked pixel.
    """
    anomalous_images = _checked_labels(labels, len(maps))
    pool = _pool(maps, masks)
    for index, values in enumerate(pool.anomalous_of_image):
        if values.size and not anomalous_images[index]:
            raise ValueError(f"image {index} is labelled normal but its mask marks {values.size} pixels")
    ranking = _rank_pool(pool)
    metrics = {
        "p_auroc": _auroc(ranking),
        "p_ap": _average_precision(ranking),
        "p_f1max": _f1_max(ranking),
        "aupro": _area_of_cover(ranking, aupro_limit),
    }
    if not 0 < int(anomalous_images.sum()) < _INTERVAL_BELOW or ranking.anomalous == 0 or ranking.normal == 0:
        return metrics
    per_image = _histograms(pool, maps, masks)
    figures = _bootstrap(per_image, anomalous_images, seed=seed, limit=aupro_limit)
    return _with_intervals(metrics, ("p_auroc", "p_ap", "p_f1max", "aupro"), figures)


def pixel_curves(maps: Sequence[Float32s], masks: Sequence[Bools], points: int = 400) -> PixelCurves:
    """Return the curves of the pooled pixels, to draw; arguments and errors as `aupro`."""
    ranking = _rank_pixels(maps, masks)
    return PixelCurves(
        roc=_roc_curve(ranking, points),
        precision_recall=_precision_recall_curve(ranking, points),
        pro=_pro_curve(ranking, points),
    )


# ---- from ranks to figures


def _auroc(ranking: _Ranking) -> Metric:
    if (missing := _missing(ranking)) is not None:
        return missing
    # Twice the number of normal samples that each anomalous one beats, ties counted half: integers, hence exact.
    beaten = 2 * ranking.normal - ranking.fp_above - ranking.fp
    twice = int(np.sum(np.diff(ranking.tp, prepend=0) * beaten))
    return _metric(twice / (2 * ranking.anomalous * ranking.normal), ranking)


def _average_precision(ranking: _Ranking) -> Metric:
    if (missing := _missing(ranking)) is not None:
        return missing
    precision = ranking.tp / (ranking.tp + ranking.fp)
    gained = np.diff(ranking.tp, prepend=0) / ranking.anomalous
    return _metric(float(np.sum(gained * precision)), ranking)


def _f1_max(ranking: _Ranking) -> Metric:
    if (missing := _missing(ranking)) is not None:
        return missing
    return _metric(float(np.max(2 * ranking.tp / (ranking.tp + ranking.fp + ranking.anomalous))), ranking)


def _area_of_cover(ranking: _Ranking, limit: float) -> Metric:
    if not 0 < limit <= 1:
        raise ValueError(f"the limit must be in (0, 1], got {limit}")
    if ranking.cover is None:
        return Metric(None, _NO_REGION)
    if ranking.normal == 0:
        return Metric(None, _NO_NORMAL)
    return _metric(_area_up_to(*_steps(ranking, ranking.cover), limit) / limit, ranking)


def _missing(ranking: _Ranking) -> Metric | None:
    if ranking.anomalous == 0:
        return Metric(None, _NO_ANOMALOUS)
    return Metric(None, _NO_NORMAL) if ranking.normal == 0 else None


def _metric(value: float, ranking: _Ranking) -> Metric:
    # Sums of thousands of float64 shares may pass 1 by an ulp or two.
    return Metric(min(value, 1.0), _DEGENERATE if ranking.degenerate else None)


def _steps(ranking: _Ranking, height: Float64s) -> tuple[Float64s, Float64s]:
    """Return the nodes of a curve over the false positive rate, `(2K + 2,)` each.

    A distinct anomalous score has two nodes, before and after its tie group; up to the next one the curve is level.
    """
    x = np.empty(2 * height.size + 2)
    y = np.empty_like(x)
    x[0], y[0], x[-1], y[-1] = 0.0, 0.0, 1.0, 1.0
    x[1:-1:2], x[2:-1:2] = ranking.fp_above / ranking.normal, ranking.fp / ranking.normal
    y[1:-1:2], y[2:-1:2] = np.concatenate(([0.0], height[:-1])), height
    return x, y


def _area_up_to(x: Float64s, y: Float64s, limit: float) -> float:
    """Return the trapezoidal area on [0, limit] of nodes with rising `x`; the end is interpolated."""
    inside = int(np.searchsorted(x, limit, side="right"))
    area = float(np.trapezoid(y[:inside], x[:inside]))
    if inside < x.size and x[inside - 1] < limit:
        share = (limit - x[inside - 1]) / (x[inside] - x[inside - 1])
        end = y[inside - 1] + share * (y[inside] - y[inside - 1])
        area += float((limit - x[inside - 1]) * (y[inside - 1] + end) / 2)
    return area


# ---- from scores to ranks


def _rank_samples(scores: ArrayLike, labels: ArrayLike) -> _Ranking:
    values, anomalous = _checked_samples(scores, labels)
    return _rank(values[~anomalous], values[anomalous])


def _rank_pixels(maps: Sequence[Float32s], masks: Sequence[Bools]) -> _Ranking:
    return _rank_pool(_pool(maps, masks))


def _rank(
    normal: NDArray[np.floating],
    anomalous: NDArray[np.floating],
    *,
    weights: Float64s | None = None,
    regions: int = 0,
) -> _Ranking:
    """Rank anomalous scores among normal ones; `normal` is sorted in place.

    `weights` are what each anomalous sample adds to the sum over regions of their covered share.
    """
    normal.sort()
    order = np.argsort(anomalous)[::-1]
    falling = anomalous[order]
    # A tie group counts as a whole: only its last member is a node.
    ends = np.flatnonzero(np.append(falling[1:] != falling[:-1], np.True_)) if falling.size else np.empty(0, np.int64)
    distinct = falling[ends]
    # Searching with rising keys walks through memory once.
    above = normal.size - np.searchsorted(normal, distinct[::-1], side="right")[::-1]
    at_or_above = normal.size - np.searchsorted(normal, distinct[::-1], side="left")[::-1]
    cover = None if weights is None or regions == 0 else np.cumsum(weights[order])[ends] / regions
    low = min((a.min() for a in (normal, anomalous) if a.size), default=0.0)
    high = max((a.max() for a in (normal, anomalous) if a.size), default=0.0)
    return _Ranking(
        tp=ends + 1,
        fp_above=above,
        fp=at_or_above,
        cover=cover,
        normal=int(normal.size),
        anomalous=int(anomalous.size),
        degenerate=bool(low == high),
    )


@dataclass(frozen=True)
class _Pool:
    """Pixels of all images, split by what they are.

    Attributes:
        normal: all normal pixels in one array; sorted once `_rank_pool` was called.
        anomalous_of_image: the anomalous pixels of each image.
        weights_of_image: for each of them 1 / pixels of its region.
        regions_of_image: number of regions of each image.
    """

    normal: Float32s
    anomalous_of_image: list[Float32s]
    weights_of_image: list[Float64s]
    regions_of_image: list[int]


def _pool(maps: Sequence[Float32s], masks: Sequence[Bools]) -> _Pool:
    normals, anomalous, weights, regions = [], [], [], []
    for index, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True)):
        _check_map(anomaly_map, mask, index)
        labels, count = label_components(mask)
        owners = labels[mask]
        areas = np.bincount(owners, minlength=count + 1)
        normals.append(_values_of(anomaly_map, ~mask))
        anomalous.append(_values_of(anomaly_map, mask))
        weights.append(1.0 / areas[owners])
        regions.append(count)
    return _Pool(_pooled(normals), anomalous, weights, regions)


def _rank_pool(pool: _Pool) -> _Ranking:
    return _rank(
        pool.normal,
        _pooled(pool.anomalous_of_image),
        weights=_pooled_weights(pool.weights_of_image),
        regions=sum(pool.regions_of_image),
    )


def _pooled(pieces: Sequence[Float32s]) -> Float32s:
    return np.concatenate([np.empty(0, np.float32), *pieces])


def _pooled_weights(pieces: Sequence[Float64s]) -> Float64s:
    return np.concatenate([np.empty(0), *pieces])


def _values_of(anomaly_map: Float32s, where: Bools) -> Float32s:
    return anomaly_map[where].astype(np.float32, copy=False)


def _saturating_weights(values: Float32s, saturation: int) -> Float64s:
    """Let the highest `saturation` pixels of a channel share its weight 1, and the rest add nothing.

    At the end of any tie group the sum is min(covered / saturation, 1), whatever the order inside the group.
    """
    weights = np.zeros(values.size)
    weights[np.argsort(values)[::-1][:saturation]] = 1.0 / saturation
    return weights


def _checked_samples(scores: ArrayLike, labels: ArrayLike) -> tuple[Float64s, Bools]:
    values = np.array(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"scores must have one dimension, got shape {values.shape}")
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ScoreNotFinite(f"score {index} is {values[index]}; a score must be a finite number")
    return values, _checked_labels(labels, values.size)


def _checked_labels(labels: ArrayLike, count: int) -> Bools:
    given = np.asarray(labels)
    if given.shape != (count,):
        raise ValueError(f"expected {count} labels, got shape {given.shape}")
    if not np.isin(given, (0, 1)).all():
        raise ValueError("labels must be 0 (normal) or 1 (anomalous); unknown ones can't be judged")
    return given.astype(bool)


def _check_map(anomaly_map: Float32s, mask: Bools, index: int) -> None:
    if anomaly_map.ndim != 2 or anomaly_map.shape != mask.shape:
        raise ValueError(f"image {index} has a map of shape {anomaly_map.shape} and a mask of shape {mask.shape}")
    if mask.dtype != np.bool_:
        raise ValueError(f"image {index} has a mask of type {mask.dtype}; it must be bool")
    if not np.isfinite(anomaly_map).all():
        raise ScoreNotFinite(f"the map of image {index} holds NaN or infinity; every pixel must be a finite number")


# ---- curves to draw


def _roc_curve(ranking: _Ranking, points: int) -> Curve:
    if _missing(ranking) is not None:
        return Curve(np.empty(0), np.empty(0))
    return _thinned(*_steps(ranking, ranking.tp / ranking.anomalous), points)


def _pro_curve(ranking: _Ranking, points: int) -> Curve:
    if ranking.cover is None or ranking.normal == 0:
        return Curve(np.empty(0), np.empty(0))
    return _thinned(*_steps(ranking, ranking.cover), points)


def _precision_recall_curve(ranking: _Ranking, points: int) -> Curve:
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


# ---- bootstrap


@dataclass(frozen=True)
class _PerImage:
    """What each image adds to the counts of G groups of scores, the highest scores first.

    Attributes:
        normal: `(n, G)` normal samples.
        anomalous: `(n, G)` anomalous samples.
        cover: `(n, G)` sum over the image's regions of their covered share, or None at image level.
        regions: `(n,)` number of regions, or None at image level.
    """

    normal: Float64s
    anomalous: Float64s
    cover: Float64s | None
    regions: Float64s | None


def _one_hot(group: Int64s, where: Bools, groups: int) -> Float64s:
    matrix = np.zeros((group.size, groups))
    matrix[np.flatnonzero(where), group[where]] = 1.0
    return matrix


def _histograms(pool: _Pool, maps: Sequence[Float32s], masks: Sequence[Bools]) -> _PerImage:
    """Count each image's pixels in quantile bins of the pool, whose normal pixels are sorted."""
    anomalous = np.sort(_pooled(pool.anomalous_of_image))
    picks = [np.unique(np.linspace(0, a.size - 1, _BINS).astype(np.int64)) for a in (pool.normal, anomalous)]
    edges = np.unique(np.concatenate([pool.normal[picks[0]], anomalous[picks[1]]]))

    def falling(rising: Float32s, sums: NDArray[np.number]) -> Float64s:
        """Return what lies in each bin, the highest first, given the running sums over rising values from 0."""
        below = np.append(sums[np.searchsorted(rising, edges)], sums[-1])
        return np.diff(below.astype(np.float64))[::-1]

    normal_rows, anomalous_rows, cover_rows = [], [], []
    for index, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True)):
        normal_of_image = np.sort(_values_of(anomaly_map, ~mask))
        order = np.argsort(pool.anomalous_of_image[index])
        rising = pool.anomalous_of_image[index][order]
        shares = np.concatenate(([0.0], np.cumsum(pool.weights_of_image[index][order])))
        normal_rows.append(falling(normal_of_image, np.arange(normal_of_image.size + 1)))
        anomalous_rows.append(falling(rising, np.arange(rising.size + 1)))
        cover_rows.append(falling(rising, shares))
    return _PerImage(
        np.stack(normal_rows),
        np.stack(anomalous_rows),
        np.stack(cover_rows),
        np.asarray(pool.regions_of_image, np.float64),
    )


def _bootstrap(per_image: _PerImage, anomalous_images: Bools, *, seed: int, limit: float) -> Float64s:
    """Draw images with replacement, normal and anomalous ones apart.

    Returns:
        `(resamples, 4)` AUROC, AP, F1-max and the area of cover; NaN where a resample has none.
    """
    generator = np.random.default_rng(seed)
    strata = [np.flatnonzero(anomalous_images == kind) for kind in (False, True)]
    images, groups = per_image.normal.shape
    chunk = max(1, _CHUNK_ELEMENTS // max(images, groups))
    figures = []
    for start in range(0, _RESAMPLES, chunk):
        rows = min(chunk, _RESAMPLES - start)
        counts = np.zeros((rows, images))
        for stratum in strata:
            if stratum.size:
                share = np.full(stratum.size, 1 / stratum.size)
                counts[:, stratum] = generator.multinomial(stratum.size, share, size=rows)
        figures.append(_resampled_figures(counts, per_image, limit))
    return np.concatenate(figures)


def _resampled_figures(counts: Float64s, per_image: _PerImage, limit: float) -> Float64s:
    """Compute the figures of resamples given how often each image was drawn, `(r, n)`; returns `(r, 4)`."""
    positive, negative = counts @ per_image.anomalous, counts @ per_image.normal  # (r, G)
    tp, fp = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
    anomalous, normal = tp[:, -1], fp[:, -1]
    figures = np.full((len(counts), 4), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        # A resample may hold only anomalous images without a marked pixel: its figures are NaN and drop out.
        beaten = normal[:, None] - fp + negative / 2
        figures[:, 0] = np.sum(positive * beaten, axis=1) / (anomalous * normal)
        precision = np.where(tp + fp > 0, tp / (tp + fp), 0.0)
        figures[:, 1] = np.sum(positive * precision, axis=1) / anomalous
        figures[:, 2] = np.max(2 * tp / (tp + fp + anomalous[:, None]), axis=1)
        if per_image.cover is not None and per_image.regions is not None:
            cover = np.cumsum(counts @ per_image.cover, axis=1) / (counts @ per_image.regions)[:, None]
            rate = fp / normal[:, None]
            for row in range(len(counts)):
                x, y = np.concatenate(([0.0], rate[row])), np.concatenate(([0.0], cover[row]))
                figures[row, 3] = _area_up_to(x, y, limit) / limit
    return figures


def _with_intervals(metrics: dict[str, Metric], names: Sequence[str], figures: Float64s) -> dict[str, Metric]:
    completed = dict(metrics)
    for column, name in enumerate(names):
        defined = figures[:, column][np.isfinite(figures[:, column])]
        if metrics[name].value is not None and defined.size:
            low, high = np.percentile(defined, _INTERVAL_PERCENTILES)
            completed[name] = replace(metrics[name], interval=(float(low), float(high)))
    return completed
