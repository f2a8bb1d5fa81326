"""How far a figure may move with other test images: a stratified bootstrap over images, not over pixels.

Works on counts in groups of scores, the highest first. At image level a group is a distinct score, which is exact; at
pixel level groups are some 4096 quantile bins, which moves a figure by less than 1e-3 and makes a thousand resamples
of 40 million pixels a matter of two matrix products. Where frames are too few for draws to tell anything, `interval`
says so instead of giving a width of 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.measuring.ranking import (
    Bools,
    Float32s,
    Float64s,
    Int64s,
    PixelPool,
    area_up_to,
    pooled,
    split_mask,
    values_of,
)

_RESAMPLES = 1000
# Good or defective ones. With fewer, the interval of the draws held the true AUROC of simulated normal scores in fewer
# than four of five repetitions, where 19 of 20 are promised.
FEWEST_FRAMES = 5
_PERCENTILES = (2.5, 97.5)
_TAIL = 0.025
# Draws of one figure that differ by less do so by the order of their sums.
_SAME = 1e-12
_TOO_FEW = f"no interval: fewer than {FEWEST_FRAMES} good or defective test frames"
_NO_SPREAD = "no interval: every draw of the test frames gives the same figure"
# Quantile bins of normal and of anomalous pixels, this many of each.
_BINS = 2048
# Bound on the elements of one chunk of the resampling matrix, to keep its memory small.
_CHUNK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class PerImage:
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


@dataclass(frozen=True)
class Interval:
    """How far a figure may move with other test images.

    Attributes:
        bounds: 95 % interval, or None where these images don't tell one.
        reason: why there is none.
    """

    bounds: tuple[float, float] | None
    reason: str | None = None


def interval(draws: Float64s, images: Sequence[int]) -> Interval:
    """Return the 95 % interval of a figure's draws, or why there is none.

    Args:
        draws: `(resamples,)` of the figure; NaN where a resample has none.
        images: how many normal and how many anomalous ones were drawn from.
    """
    if any(0 < count < FEWEST_FRAMES for count in images):
        return Interval(None, _TOO_FEW)
    defined = draws[np.isfinite(draws)]
    if not defined.size or float(np.ptp(defined)) < _SAME:
        return Interval(None, _NO_SPREAD)
    low, high = np.percentile(defined, _PERCENTILES)
    return Interval((float(low), float(high)))


def auroc_interval(value: float, draws: Float64s, normal: int, anomalous: int) -> Interval:
    """Return the 95 % interval of an image AUROC, also where all anomalous images lie above, or below, all normal ones.

    Draws of such a ranking are all alike. The exact interval of a share then holds: pair each image of the smaller
    class with another one of the other class, which makes k = min(normal, anomalous) independent pairs. Each is in
    order with a chance of AUROC, so that all are with at most AUROC^k, and AUROC is at least 0.025^(1/k) (Clopper and
    Pearson, "The Use of Confidence or Fiducial Limits", Biometrika 1934). It is wide, since it makes nothing of other
    pairs: a kind of defect that the test frames lack is not ruled out by a distance between those they have.

    Args:
        value: the AUROC.
        draws: `(resamples,)` of it.
        normal: images, at least one.
        anomalous: images, at least one.
    """
    least = _TAIL ** (1 / min(normal, anomalous))
    if value == 1:
        return Interval((least, 1.0))
    if value == 0:
        return Interval((0.0, 1 - least))
    return interval(draws, (normal, anomalous))


def one_hot(group: Int64s, where: Bools, groups: int) -> Float64s:
    """Return `(n, groups)` with a 1 in the group of each chosen row."""
    matrix = np.zeros((group.size, groups))
    matrix[np.flatnonzero(where), group[where]] = 1.0
    return matrix


def histograms(
    pool: PixelPool, maps: Sequence[Float32s], masks: Sequence[Bools], inspected: Sequence[Bools] | None = None
) -> PerImage:
    """Count each image's pixels in quantile bins of the pool, whose normal pixels are sorted."""
    anomalous = np.sort(pooled(pool.anomalous_of_image))
    picks = [np.unique(np.linspace(0, a.size - 1, _BINS).astype(np.int64)) for a in (pool.normal, anomalous)]
    edges = np.unique(np.concatenate([pool.normal[picks[0]], anomalous[picks[1]]]))

    def falling(rising: Float32s, sums: NDArray[np.number]) -> Float64s:
        """Return what lies in each bin, the highest first, given the running sums over rising values from 0."""
        below = np.append(sums[np.searchsorted(rising, edges)], sums[-1])
        return np.diff(below.astype(np.float64))[::-1]

    normal_rows, anomalous_rows, cover_rows = [], [], []
    for index, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True)):
        free, _ = split_mask(mask, None if inspected is None else inspected[index])
        normal_of_image = np.sort(values_of(anomaly_map, free))
        order = np.argsort(pool.anomalous_of_image[index])
        rising = pool.anomalous_of_image[index][order]
        shares = np.concatenate(([0.0], np.cumsum(pool.weights_of_image[index][order])))
        normal_rows.append(falling(normal_of_image, np.arange(normal_of_image.size + 1)))
        anomalous_rows.append(falling(rising, np.arange(rising.size + 1)))
        cover_rows.append(falling(rising, shares))
    return PerImage(
        np.stack(normal_rows),
        np.stack(anomalous_rows),
        np.stack(cover_rows),
        np.asarray(pool.regions_of_image, np.float64),
    )


def bootstrap(per_image: PerImage, anomalous_images: Bools, *, seed: int, limits: Sequence[float] = ()) -> Float64s:
    """Draw images with replacement, normal and anomalous ones apart.

    Returns:
        `(resamples, 3 + limits)` AUROC, AP, F1-max and the area of cover up to each limit; NaN where a resample has
        none.
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
        figures.append(_resampled_figures(counts, per_image, limits))
    return np.concatenate(figures)


def _resampled_figures(counts: Float64s, per_image: PerImage, limits: Sequence[float]) -> Float64s:
    """Compute the figures of resamples given how often each image was drawn, `(r, n)`; see `bootstrap`."""
    positive, negative = counts @ per_image.anomalous, counts @ per_image.normal  # (r, G)
    tp, fp = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
    anomalous, normal = tp[:, -1], fp[:, -1]
    figures = np.full((len(counts), 3 + len(limits)), np.nan)
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
                figures[row, 3:] = [area_up_to(x, y, limit) / limit for limit in limits]
    return figures
