"""Ranks of anomalous scores among normal ones: what every figure of `metrics.py` is computed from.

Every curve that the figures need changes its height at anomalous scores only. Between two of them ROC and PRO run
level, AP adds nothing and F1 falls. So normal scores are sorted once (values alone, no permutation) and looked up at
the distinct anomalous scores, which are few; all pixel figures share that one sort.

Pure numpy. A tie group counts as a whole and is never split.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from service.contract.regions import label_components

Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]
Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]


class ScoreNotFinite(ValueError):
    """A score or map holds NaN or infinity; such values have no rank and are never replaced by a guess."""


@dataclass(frozen=True)
class Ranking:
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


def rank(
    normal: NDArray[np.floating],
    anomalous: NDArray[np.floating],
    *,
    weights: Float64s | None = None,
    regions: int = 0,
) -> Ranking:
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
    return Ranking(
        tp=ends + 1,
        fp_above=above,
        fp=at_or_above,
        cover=cover,
        normal=int(normal.size),
        anomalous=int(anomalous.size),
        degenerate=bool(low == high),
    )


@dataclass(frozen=True)
class PixelPool:
    """Pixels of all images, split by what they are.

    Attributes:
        normal: all normal pixels in one array; sorted once `_rank_pool` was called.
        anomalous_of_image: the anomalous pixels of each image.
        weights_of_image: for each of them 1 / inspected pixels of its region.
        regions_of_image: number of regions of each image that are inspected, in whole or in part.
    """

    normal: Float32s
    anomalous_of_image: list[Float32s]
    weights_of_image: list[Float64s]
    regions_of_image: list[int]


def pool_pixels(
    maps: Sequence[Float32s], masks: Sequence[Bools], inspected: Sequence[Bools] | None = None
) -> PixelPool:
    """Split the pixels of maps `(H, W)` by their masks `(H, W)`, and weigh the anomalous ones by their regions.

    Where not all is inspected, `(H, W)` bool each, pixels outside are left out. A region is one by its whole mask: one
    that is cut counts once, with the part inside.

    Raises:
        ScoreNotFinite: if a map holds NaN or infinity.
        ValueError: if a map and its mask differ in size, or a mask is not bool.
    """
    normals, anomalous, weights, regions = [], [], [], []
    for index, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True)):
        check_map(anomaly_map, mask, index)
        free, marked = split_mask(mask, None if inspected is None else inspected[index])
        labels, count = label_components(mask)
        owners = labels[marked]
        areas = np.bincount(owners, minlength=count + 1)
        normals.append(values_of(anomaly_map, free))
        anomalous.append(values_of(anomaly_map, marked))
        weights.append(1.0 / areas[owners])
        regions.append(int(np.count_nonzero(areas)))
    return PixelPool(pooled(normals), anomalous, weights, regions)


def split_mask(mask: Bools, inspected: Bools | None) -> tuple[Bools, Bools]:
    """Return which pixels of a mask `(H, W)` are normal and which are anomalous, among the inspected ones.

    Raises:
        ValueError: if mask and inspected pixels differ in size.
    """
    if inspected is None:
        return ~mask, mask
    if inspected.shape != mask.shape:
        raise ValueError(f"a mask has the shape {mask.shape}, and what is inspected of it {inspected.shape}")
    return inspected & ~mask, inspected & mask


def pooled(pieces: Sequence[Float32s]) -> Float32s:
    """Join pieces, of which there may be none."""
    return np.concatenate([np.empty(0, np.float32), *pieces])


def pooled_weights(pieces: Sequence[Float64s]) -> Float64s:
    """Join pieces, of which there may be none."""
    return np.concatenate([np.empty(0), *pieces])


def values_of(anomaly_map: Float32s, where: Bools) -> Float32s:
    """Return the chosen pixels of a map as a float32 copy."""
    return anomaly_map[where].astype(np.float32, copy=False)


def saturating_weights(values: Float32s, saturation: int) -> Float64s:
    """Let the highest `saturation` pixels of a channel share its weight 1, and the rest add nothing.

    At the end of any tie group the sum is min(covered / saturation, 1), whatever the order inside the group.
    """
    weights = np.zeros(values.size)
    weights[np.argsort(values)[::-1][:saturation]] = 1.0 / saturation
    return weights


def checked_samples(scores: ArrayLike, labels: ArrayLike) -> tuple[Float64s, Bools]:
    """Return scores `(n,)` as a copy and labels as bool, True = anomalous.

    Raises:
        ScoreNotFinite: if a score is NaN or infinite.
        ValueError: if the shapes differ or a label is neither 0 nor 1.
    """
    values = np.array(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"scores must have one dimension, got shape {values.shape}")
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ScoreNotFinite(f"score {index} is {values[index]}; a score must be a finite number")
    return values, checked_labels(labels, values.size)


def checked_labels(labels: ArrayLike, count: int) -> Bools:
    """Return labels `(count,)` as bool, True = anomalous.

    Raises:
        ValueError: if the shape is another one or a label is neither 0 nor 1.
    """
    given = np.asarray(labels)
    if given.shape != (count,):
        raise ValueError(f"expected {count} labels, got shape {given.shape}")
    if not np.isin(given, (0, 1)).all():
        raise ValueError("labels must be 0 (normal) or 1 (anomalous); unknown ones can't be judged")
    return given.astype(bool)


def check_map(anomaly_map: Float32s, mask: Bools, index: int) -> None:
    """Refuse a map that can't be judged by its mask; the sentence names the image by its index.

    Raises:
        ScoreNotFinite: if the map holds NaN or infinity.
        ValueError: if the sizes differ, or the mask is not bool.
    """
    if anomaly_map.ndim != 2 or anomaly_map.shape != mask.shape:
        raise ValueError(f"image {index} has a map of shape {anomaly_map.shape} and a mask of shape {mask.shape}")
    if mask.dtype != np.bool_:
        raise ValueError(f"image {index} has a mask of type {mask.dtype}; it must be bool")
    if not np.isfinite(anomaly_map).all():
        raise ScoreNotFinite(f"the map of image {index} holds NaN or infinity; every pixel must be a finite number")


def area_up_to(x: Float64s, y: Float64s, limit: float) -> float:
    """Return the trapezoidal area on [0, limit] of nodes with rising `x`; the end is interpolated."""
    inside = int(np.searchsorted(x, limit, side="right"))
    area = float(np.trapezoid(y[:inside], x[:inside]))
    if inside < x.size and x[inside - 1] < limit:
        share = (limit - x[inside - 1]) / (x[inside] - x[inside - 1])
        end = y[inside - 1] + share * (y[inside] - y[inside - 1])
        area += float((limit - x[inside - 1]) * (y[inside - 1] + end) / 2)
    return area
