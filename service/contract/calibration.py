"""What good parts say about a score: p-values, thresholds with their bound, and the histogram that drift compares with.

Everything rests on one assumption, exchangeability: the calibration frames were drawn like the good parts of tomorrow,
and fitting never saw them. Then a good part's p-value is conformal, `P(p <= a) <= a`, whatever the detector is
(Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005; Bates et al., arXiv:2104.08279).

`n` good parts can support false-reject rates down to `1 / (n + 1)`; a smaller rate is refused, never extrapolated.

What is counted is parts, not frames. Views of one part resemble each other, so a hundred views of five parts know of
five parts alone, and a bound that took them for a hundred would not hold. A part of several views is stopped where any
of them is, so it counts once, by its highest value. Parts are exchangeable whatever their views have in common, so rate
and bound hold of them exactly; a single frame exceeds a threshold no more often than its part does, so they hold of
frames as well, with room to spare.
"""

import io
import math
import struct
import zipfile
import zlib
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from service.errors import BundleRefused, CalibrationRefused

HISTOGRAM_BINS = 20
_CONFIDENCE = 0.95

# What numpy and the zip reader raise on bytes that are not the arrays they claim to be.
_ARRAY_FILE_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    SyntaxError,
    MemoryError,
    OverflowError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Threshold:
    """A threshold and what is promised of it.

    Attributes:
        value: `score >= value` is anomalous.
        false_reject_rate: the wanted rate on good parts; it holds on average over calibration sets.
        bound: with 95 % confidence over calibration sets, this one's false-reject rate is at most this.
        good_parts: how many calibration parts stand behind it, each of one frame or more.
    """

    value: float
    false_reject_rate: float
    bound: float
    good_parts: int


@dataclass(frozen=True, eq=False)
class Calibration:
    """Sorted values of good parts that fitting never saw.

    Attributes:
        scores: `(n,)` float32 ascending; the policy's score of each frame.
        peaks: `(n,)` float32 ascending; the largest inspected map value of each frame.
        histogram_edges: `(HISTOGRAM_BINS - 1,)` float32 inner edges between equally filled bins of `scores`.
        histogram_counts: `(HISTOGRAM_BINS,)` int64.
        map_floor: median map value over all frames; heatmaps start here.
        part_scores: `(m,)` float32 ascending, m <= n; the highest score among each part's frames, which p-values and
            thresholds rest on. The very `scores` where each frame shows a part of its own.
        part_peaks: `(m,)` float32 ascending; the same of `peaks`.
    """

    scores: NDArray[np.float32]
    peaks: NDArray[np.float32]
    histogram_edges: NDArray[np.float32]
    histogram_counts: NDArray[np.int64]
    map_floor: float
    part_scores: NDArray[np.float32]
    part_peaks: NDArray[np.float32]

    @property
    def good_parts(self) -> int:
        """How many parts stand behind every threshold."""
        return int(self.part_scores.size)

    @classmethod
    def from_good_parts(
        cls,
        scores: NDArray[np.float32],
        peaks: NDArray[np.float32],
        map_floor: float,
        parts: NDArray[np.int64] | None = None,
    ) -> Self:
        """Calibrate on good parts.

        Args:
            scores: `(n,)` the policy's score of each held-out good frame.
            peaks: `(n,)` the largest inspected map value of each.
            map_floor: median map value over all of them.
            parts: `(n,)` which part each frame shows, any numbers; None where each shows one of its own.

        Raises:
            CalibrationRefused: if there is no frame or a value is not finite.
            ValueError: if not every frame shows a part.
        """
        scores, peaks = np.asarray(scores, np.float32), np.asarray(peaks, np.float32)
        if parts is not None and parts.shape != scores.shape:
            raise ValueError(f"of {scores.shape} frames, {parts.shape} show a part")
        if scores.size == 0 or scores.ndim != 1 or scores.shape != peaks.shape:
            raise CalibrationRefused("Calibration needs at least one good frame that fitting never saw.")
        if not (np.isfinite(scores).all() and np.isfinite(peaks).all() and math.isfinite(map_floor)):
            raise CalibrationRefused("A good frame's score is not finite; look at the frames and the training loss.")
        part_scores, part_peaks = _highest(scores, parts), _highest(peaks, parts)
        scores, peaks = np.sort(scores), np.sort(peaks)
        edges = np.quantile(scores, np.linspace(0, 1, HISTOGRAM_BINS + 1)[1:-1]).astype(np.float32)
        counts = np.bincount(np.searchsorted(edges, scores, side="right"), minlength=HISTOGRAM_BINS)
        return cls(scores, peaks, edges, counts.astype(np.int64), float(map_floor), part_scores, part_peaks)

    def p_value(self, score: float) -> float:
        """Return `(k + 1) / (n + 1)`, k the number of good parts at least this anomalous; in (0, 1]."""
        count = len(self.part_scores)
        at_least = count - bisect_left(self.part_scores.data, float(np.float32(score)))
        return (at_least + 1) / (count + 1)

    def threshold(self, false_reject_rate: float) -> Threshold:
        """Choose the smallest score threshold whose p-value is within the wanted rate.

        `score >= value` holds exactly where `p_value(score) <= false_reject_rate`.

        Raises:
            CalibrationRefused: if n good parts can't support the rate; the sentence names the needed number.
        """
        return _conformal_threshold(self.part_scores, false_reject_rate)

    def peak_threshold(self, false_reject_rate: float) -> Threshold:
        """Choose the map threshold that at most this share of good parts reaches anywhere.

        Raises:
            CalibrationRefused: as for `threshold`.
        """
        return _conformal_threshold(self.part_peaks, false_reject_rate)

    def to_bytes(self) -> bytes:
        """Write the npz file of a bundle; equal calibrations give equal bytes."""
        buffer = io.BytesIO()
        # Only where parts have several frames, so that all other files are what they were before parts were counted.
        has_views = self.good_parts < self.scores.size
        of_parts: dict[str, Any] = {"part_scores": self.part_scores, "part_peaks": self.part_peaks} if has_views else {}
        np.savez(
            buffer,
            scores=self.scores,
            peaks=self.peaks,
            histogram_edges=self.histogram_edges,
            histogram_counts=self.histogram_counts,
            map_floor=np.float64(self.map_floor),
            **of_parts,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the npz file of a bundle; arrays only, never pickled objects.

        A file that says nothing of parts has one frame a part.

        Raises:
            BundleRefused: if it is no such file or its values can't be a calibration.
        """
        arrays = read_arrays(data, "calibration.npz")
        try:
            calibration = cls(
                arrays["scores"],
                arrays["peaks"],
                arrays["histogram_edges"],
                arrays["histogram_counts"],
                float(arrays["map_floor"]),
                arrays.get("part_scores", arrays["scores"]),
                arrays.get("part_peaks", arrays["peaks"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BundleRefused("calibration.npz lacks a value; export the bundle again.") from error
        if not calibration._holds_together():
            raise BundleRefused("calibration.npz must hold finite, sorted values; export the bundle again.")
        return calibration

    def _holds_together(self) -> bool:
        for values in (self.scores, self.peaks, self.histogram_edges, self.part_scores, self.part_peaks):
            if values.dtype != np.float32 or values.ndim != 1 or values.size == 0:
                return False
            if not np.isfinite(values).all() or (np.diff(values) < 0).any():
                return False
        counts = self.histogram_counts
        return (
            self.scores.size == self.peaks.size
            and self.part_scores.size == self.part_peaks.size <= self.scores.size
            and self.part_scores[-1] == self.scores[-1]
            and self.part_peaks[-1] == self.peaks[-1]
            and self.histogram_edges.size == HISTOGRAM_BINS - 1
            and counts.dtype == np.int64
            and counts.shape == (HISTOGRAM_BINS,)
            and bool((counts >= 0).all())
            and int(counts.sum()) == self.scores.size
            and math.isfinite(self.map_floor)
        )


def read_arrays(data: bytes, name: str) -> dict[str, NDArray[Any]]:
    """Read every array of an npz file; never pickled objects.

    Args:
        data: the file.
        name: of the file, for the sentence.

    Raises:
        BundleRefused: if it is no such file, is damaged, or holds objects.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return dict(arrays.items())
    except _ARRAY_FILE_ERRORS as error:
        raise BundleRefused(f"{name} can't be read; export the bundle again.") from error


def needed_good_parts(false_reject_rate: float) -> int:
    """Return the smallest n whose p-values can reach a rate: `1 / (n + 1) <= rate`.

    Raises:
        CalibrationRefused: if the rate is not between 0 and 1.
    """
    _check_rate(false_reject_rate)
    # Floating division may round to either side of the whole number: start below it and count up.
    needed = max(1, math.floor(1 / Fraction(false_reject_rate)) - 2)
    while 1 / (needed + 1) > false_reject_rate:
        needed += 1
    return needed


def reachable_rate(good_parts: int) -> float:
    """Return the smallest false-reject rate, rounded up to three digits, that so many good parts can support."""
    scale: int = 100 * 10 ** len(str(good_parts + 1))
    return -(-scale // (good_parts + 1)) / scale


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise CalibrationRefused("A false-reject rate lies between 0 and 1, for example 0.02.")


def _highest(values: NDArray[np.float32], parts: NDArray[np.int64] | None) -> NDArray[np.float32]:
    """Return the highest value of each part, ascending; of every frame where each shows a part of its own."""
    if parts is None:
        return np.sort(values)
    _, part = np.unique(parts, return_inverse=True)
    highest = np.full(part.max() + 1, -np.inf, np.float32)
    np.maximum.at(highest, part, values)
    return np.sort(highest)


def _conformal_threshold(ascending: NDArray[np.float32], rate: float) -> Threshold:
    _check_rate(rate)
    n = int(ascending.size)
    # Largest number of good parts that may lie at or above the threshold: (k + 1) / (n + 1) <= rate. The product may
    # round to either side of a whole number, hence the two repairs.
    above = min(math.floor(rate * (n + 1)), n) - 1
    while above >= 0 and (above + 1) / (n + 1) > rate:
        above -= 1
    while above + 1 < n and (above + 2) / (n + 1) <= rate:
        above += 1
    if above < 0:
        raise CalibrationRefused(
            f"A false-reject rate of {rate:g} needs at least {needed_good_parts(rate)} good parts that fitting never "
            f"saw, and there are {n}; hold out more frames or ask for at least {reachable_rate(n):g}."
        )
    # Just above the largest value that must stay good, so that ties with it stay good as well.
    value = float(np.nextafter(ascending[n - 1 - above], np.float32(np.inf)))
    return Threshold(value, rate, _upper_bound(n, above), n)


def _upper_bound(n: int, above: int) -> float:
    """Bound the false-reject rate of one calibration set, which is Beta(above + 1, n - above) distributed, or below.

    The quantile is found by bisection on the binomial tail, `P(Beta(a + 1, n - a) <= x) = P(Bin(n, x) > a)`.
    """
    k = np.arange(above + 1)
    # In logarithms, because binomial coefficients of a few thousand parts are beyond float64.
    log_factorials = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    log_ways = log_factorials[n] - log_factorials[k] - log_factorials[n - k]
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        tail = float(np.exp(log_ways + k * math.log(middle) + (n - k) * math.log1p(-middle)).sum())
        low, high = (low, middle) if 1 - tail >= _CONFIDENCE else (middle, high)
    return high
