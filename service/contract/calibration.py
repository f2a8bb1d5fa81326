"""What good parts say about a score: p-values, thresholds with their bound, and the histogram that drift compares with.

Everything rests on one assumption, exchangeability: the calibration frames were drawn like the good parts of tomorrow,
and fitting never saw them. Then a good part's p-value is conformal, `P(p <= a) <= a`, whatever the detector is
(Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005; Bates et al., arXiv:2104.08279).

`n` good parts can support false-reject rates down to `1 / (n + 1)`; a smaller rate is refused, never extrapolated.
"""

import io
import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from service.errors import BundleRefused, CalibrationRefused

HISTOGRAM_BINS = 20
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Threshold:
    """A threshold and what is promised of it.

    Attributes:
        value: `score >= value` is anomalous.
        false_reject_rate: the wanted rate on good parts; it holds on average over calibration sets.
        bound: with 95 % confidence over calibration sets, this one's false-reject rate is at most this.
        good_parts: how many calibration frames stand behind it.
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
    """

    scores: NDArray[np.float32]
    peaks: NDArray[np.float32]
    histogram_edges: NDArray[np.float32]
    histogram_counts: NDArray[np.int64]
    map_floor: float

    @classmethod
    def from_good_parts(cls, scores: NDArray[np.float32], peaks: NDArray[np.float32], map_floor: float) -> Self:
        """Calibrate on good parts.

        Args:
            scores: `(n,)` the policy's score of each held-out good frame.
            peaks: `(n,)` the largest inspected map value of each.
            map_floor: median map value over all of them.

        Raises:
            CalibrationRefused: if there is no frame or a value is not finite.
        """
        scores = np.sort(np.asarray(scores, np.float32))
        peaks = np.sort(np.asarray(peaks, np.float32))
        if scores.size == 0 or scores.shape != peaks.shape:
            raise CalibrationRefused("Calibration needs at least one good frame that fitting never saw.")
        if not (np.isfinite(scores).all() and np.isfinite(peaks).all() and math.isfinite(map_floor)):
            raise CalibrationRefused("A good frame's score is not finite; look at the frames and the training loss.")
        edges = np.quantile(scores, np.linspace(0, 1, HISTOGRAM_BINS + 1)[1:-1]).astype(np.float32)
        counts = np.bincount(np.searchsorted(edges, scores, side="right"), minlength=HISTOGRAM_BINS)
        return cls(scores, peaks, edges, counts.astype(np.int64), float(map_floor))

    def p_value(self, score: float) -> float:
        """Return `(k + 1) / (n + 1)`, k the number of good parts at least this anomalous; in (0, 1]."""
        at_least = self.scores.size - int(np.searchsorted(self.scores, np.float32(score), side="left"))
        return (at_least + 1) / (self.scores.size + 1)

    def threshold(self, false_reject_rate: float) -> Threshold:
        """Choose the smallest score threshold whose p-value is within the wanted rate.

        `score >= value` holds exactly where `p_value(score) <= false_reject_rate`.

        Raises:
            CalibrationRefused: if n good parts can't support the rate; the sentence names the needed number.
        """
        return _conformal_threshold(self.scores, false_reject_rate)

    def peak_threshold(self, false_reject_rate: float) -> Threshold:
        """Choose the map threshold that at most this share of good parts reaches anywhere.

        Raises:
            CalibrationRefused: as for `threshold`.
        """
        return _conformal_threshold(self.peaks, false_reject_rate)

    def to_bytes(self) -> bytes:
        """Write the npz file of a bundle; equal calibrations give equal bytes."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            scores=self.scores,
            peaks=self.peaks,
            histogram_edges=self.histogram_edges,
            histogram_counts=self.histogram_counts,
            map_floor=np.float64(self.map_floor),
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the npz file of a bundle; arrays only, never pickled objects.

        Raises:
            BundleRefused: if it is no such file or its values can't be a calibration.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                calibration = cls(
                    arrays["scores"].astype(np.float32),
                    arrays["peaks"].astype(np.float32),
                    arrays["histogram_edges"].astype(np.float32),
                    arrays["histogram_counts"].astype(np.int64),
                    float(arrays["map_floor"]),
                )
        except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
            raise BundleRefused("calibration.npz can't be read; export the bundle again.") from error
        for values in (calibration.scores, calibration.peaks):
            if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all() or (np.diff(values) < 0).any():
                raise BundleRefused("calibration.npz must hold finite, sorted values; export the bundle again.")
        return calibration


def needed_good_parts(false_reject_rate: float) -> int:
    """Return the smallest n whose p-values can reach a rate: `1 / (n + 1) <= rate`."""
    needed = math.ceil(1 / false_reject_rate) - 1
    while 1 / (needed + 1) > false_reject_rate:
        needed += 1
    return needed


def _conformal_threshold(ascending: NDArray[np.float32], rate: float) -> Threshold:
    if not 0 < rate < 1:
        raise CalibrationRefused("A false-reject rate lies between 0 and 1, for example 0.02.")
    n = int(ascending.size)
    # Largest number of good parts that may lie at or above the threshold: (k + 1) / (n + 1) <= rate.
    above = math.floor(rate * (n + 1)) - 1
    while above + 1 < n and (above + 2) / (n + 1) <= rate:  # repairs the floor where rate * (n + 1) rounds down
        above += 1
    if above < 0:
        raise CalibrationRefused(
            f"A false-reject rate of {rate:g} needs at least {needed_good_parts(rate)} good parts that fitting never "
            f"saw, and there are {n}; hold out more frames or ask for at least {1 / (n + 1):.3g}."
        )
    # Just above the largest value that must stay good, so that ties with it stay good as well.
    value = float(np.nextafter(ascending[n - 1 - above], np.float32(np.inf)))
    return Threshold(value, rate, _upper_bound(n, above), n)


def _upper_bound(n: int, above: int) -> float:
    """Bound the false-reject rate of one calibration set, which is Beta(above + 1, n - above) distributed, or below.

    The quantile is found by bisection on the binomial tail, `P(Beta(a + 1, n - a) <= x) = P(Bin(n, x) > a)`.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        tail = sum(math.comb(n, k) * middle**k * (1 - middle) ** (n - k) for k in range(above + 1))
        low, high = (low, middle) if 1 - tail >= _CONFIDENCE else (middle, high)
    return high
