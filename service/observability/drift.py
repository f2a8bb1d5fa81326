"""How far a line has moved away from the parts it was calibrated on: scores, verdicts, and the pictures themselves.

Three signals that fail differently. A changed product moves the scores and leaves brightness alone; a dying lamp moves
brightness first; dirt on the lens costs focus. Old frames fade out, so that each figure tells of the last few hundred.
Where there is no figure yet it is None, never NaN: one NaN in a day's history makes NaN of the day's mean.
Nothing here reads the clock or knows of metrics.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.contract.calibration import Calibration

# Frames after which an old one counts 1 / e.
_MEMORY_FRAMES = 500.0
# Before so many frames, a share says nothing.
_FEWEST_FRAMES = 50
# Calibration frames that a bin needs: with fewer, chance alone looks like drift.
_FRAMES_A_BIN = 10
_FEWEST_BINS = 4
_SATURATED = 250
_GROWTH = math.exp(1 / _MEMORY_FRAMES)
_LARGEST_UNIT = 1e9


@dataclass
class Fading:
    """A share or mean in which old values fade out.

    Attributes:
        memory: values after which an old one counts 1 / e.
    """

    memory: float
    _weight: float = 0.0
    _sum: float = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        keep = math.exp(-1 / self.memory)
        self._weight = self._weight * keep + 1
        self._sum = self._sum * keep + value

    def mean(self) -> float | None:
        """Return the mean; None before the first value."""
        return self._sum / self._weight if self._weight else None


class ScoreDrift:
    """The population stability index of a line's scores against the good parts of its calibration.

    `PSI = sum((a - e) ln(a / e))` over bins, `e` the calibration's shares and `a` those of the last frames, each with
    half a frame added so that an empty bin stays finite. Below 0.1 nothing moved; above 0.25 the line is another one.
    Bins of the calibration's histogram are merged until each holds ten frames, because with sparse bins chance alone
    gives `(bins - 1) / n`.

    Args:
        calibration: of the line, under the policy that scores.
    """

    def __init__(self, calibration: Calibration) -> None:
        bins = int(np.clip(calibration.scores.size // _FRAMES_A_BIN, _FEWEST_BINS, calibration.histogram_counts.size))
        kept = np.linspace(0, calibration.histogram_counts.size, bins + 1).round().astype(int)[1:-1]
        edges = calibration.histogram_edges[kept - 1]
        counts = np.bincount(np.searchsorted(edges, calibration.scores, side="right"), minlength=bins)
        self._expected: NDArray[np.float64] = (counts + 0.5) / (counts + 0.5).sum()
        self._edges: list[float] = edges.tolist()
        # In a unit that grows, so that old frames fade without being touched.
        self._counts = [0.0] * bins
        self._unit = 1.0
        self._frames = 0

    def add(self, score: float) -> None:
        """Count one frame's score."""
        self._unit *= _GROWTH
        if self._unit > _LARGEST_UNIT:
            self._counts = [count / self._unit for count in self._counts]
            self._unit = 1.0
        self._counts[bisect_right(self._edges, float(np.float32(score)))] += self._unit
        self._frames += 1

    def index(self) -> float | None:
        """Return the index, at least 0; None before fifty frames."""
        if self._frames < _FEWEST_FRAMES:
            return None
        counts = np.array(self._counts) / self._unit
        seen = (counts + 0.5) / (counts + 0.5).sum()
        return float(((seen - self._expected) * np.log(seen / self._expected)).sum())


@dataclass(frozen=True)
class ImageQuality:
    """What a picture says of lamp, lens and sensor; all of the green channel, which every sensor samples most.

    Attributes:
        brightness: mean, from 0 to 1.
        saturation: share of pixels near white, from 0 to 1.
        focus: variance of the Laplacian over the squared mean; falls when the picture blurs, not when it darkens.
        noise: standard deviation of the sensor's noise, from 0 to 1 (Immerkaer, 1996).
    """

    brightness: float
    saturation: float
    focus: float
    noise: float


def measure_quality(pixels: NDArray[np.uint8]) -> ImageQuality:
    """Measure a picture `(H, W, 3)` uint8 RGB of at least 3 by 3 pixels."""
    green = np.ascontiguousarray(pixels[:, :, 1])
    grey = green.astype(np.float32) / 255
    brightness = float(grey.mean())
    middle = grey[1:-1, 1:-1]
    beside = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    corners = grey[:-2, :-2] + grey[:-2, 2:] + grey[2:, :-2] + grey[2:, 2:]
    laplacian = beside - 4 * middle
    residue = corners - 2 * beside + 4 * middle  # blind for planes and straight edges, so that what is left is noise
    return ImageQuality(
        brightness=brightness,
        saturation=float((green >= _SATURATED).mean()),
        focus=float(laplacian.var()) / max(brightness, 1 / 255) ** 2,
        noise=float(np.abs(residue).mean()) * math.sqrt(math.pi / 2) / 6,
    )


@dataclass
class LineDrift:
    """The three signals of one line.

    Attributes:
        scores: against the calibration; None where none speaks of them.
        review: share of frames that were not `PASS`.
        quality: means by statistic.
    """

    scores: ScoreDrift | None
    review: Fading = field(default_factory=lambda: Fading(_MEMORY_FRAMES))
    quality: dict[str, Fading] = field(default_factory=dict)

    def judged(self, score: float, *, passed: bool) -> None:
        """Count one frame under the line's own policy."""
        if self.scores is not None:
            self.scores.add(score)
        self.review.add(0.0 if passed else 1.0)

    def seen(self, quality: ImageQuality) -> None:
        """Count one measured picture."""
        for name, value in vars(quality).items():
            self.quality.setdefault(name, Fading(_MEMORY_FRAMES / 10)).add(value)
