"""Chooses the golden set: a few frames that a device must answer as the exported graph did, before it may serve.

Comes after parity. Good frames are held-out ones; defects are real ones from the test frames, or planted where the line
has none, so that a device is also asked for a verdict that is not `PASS`. Frames near a threshold are passed over: on
another device either verdict would be right for them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Bundle, GoldenRule
from service.contract.frames import FrameLimits, encode_png, fit_to_input, read_frame, resize_pixels
from service.contract.geometry import InputSpec
from service.contract.golden import GoldenAnswer, GoldenSet, least_contrast_of, read_golden_by_line, write_golden
from service.contract.policy import Policy, ScoreRule, Verdict, inspected_mask, judge, may_judge
from service.contract.tiling import Run
from service.errors import FlawlineError, FrameNotComparable
from training.data.samples import ANOMALOUS, Sample
from training.measuring.answers import Answers, spread

# A golden frame keeps this many times the tolerance between its score and every threshold.
_CLEARANCE = 2.0
# Frames are stored at most at this multiple of what the network sees, so that a bundle of 20-megapixel frames stays
# small enough to hold in memory.
_LARGEST_MULTIPLE = 3
_PLANTED_TRIES = 12


class GoldenFailed(FlawlineError):
    """No frame is far enough from the thresholds to be asked on another device."""

    code = "golden_failed"


@dataclass(frozen=True, eq=False)
class GoldenFrame:
    """A frame that a device must answer as the exported graph did.

    Attributes:
        line: that it shows.
        png: its pixels, perhaps smaller than the camera's.
        description: what it shows, in words.
        score: raw score of the graph.
        anomaly_map: `(h, w)` float32.
        verdict: by the line's policy.
    """

    line: str
    png: bytes
    description: str
    score: float
    anomaly_map: NDArray[np.float32]
    verdict: Verdict


@dataclass(frozen=True)
class GoldenChooser:
    """What every candidate of one line is judged with.

    Attributes:
        run: the exported graph; of frames that are cut, `by_tiles` of it.
        line: name of the line.
        line_index: of the line among the bundle's.
        policy: the line's default rules.
        rule: how scores are reduced from maps.
        spec: the network's input.
        tolerance: how closely a device must reproduce the set.
        seed: of planted defects.
    """

    run: Run
    line: str
    line_index: int
    policy: Policy
    rule: ScoreRule
    spec: InputSpec
    tolerance: GoldenRule
    seed: int

    def choose(self, good: Answers, tested: Answers | None, count: int) -> list[GoldenFrame]:
        """Return a line's golden frames, half of them good.

        Args:
            good: answers to held-out good frames.
            tested: answers to test frames, or None where there are none.
            count: at most so many frames, at least two.

        Raises:
            GoldenFailed: if every candidate lies too near to a threshold.
        """
        wanted_good = (count + 1) // 2
        chosen = _first(self._real(spread(good)), wanted_good)
        defects = [] if tested is None else [s for s in spread(tested) if s.label == ANOMALOUS]
        # Most visible defects first would leave none that passes; a spread over all scores shows the real range.
        found = _first(self._real(defects), count - len(chosen))
        if not any(golden.verdict is not Verdict.PASS for golden in (*chosen, *found)):
            found = [*found[: count - len(chosen) - 1], *_first(self._planted(spread(good)), 1)]
        return self._at_least_one([*chosen, *found])

    def take(self, frames: Sequence[tuple[NDArray[np.uint8], str]], *, is_calibrated: bool) -> list[GoldenFrame]:
        """Return frames as golden ones, without a verdict where the line may not have one.

        Args:
            frames: pixels `(h, w, 3)` uint8 RGB, and what they show.
            is_calibrated: whether the line has a calibration.

        Raises:
            GoldenFailed: if every frame lies too near to a threshold, or is flat on a line that measures frames by
                themselves.
        """
        if not may_judge(self.policy, is_calibrated=is_calibrated):
            return [self._without_verdict(pixels, description) for pixels, description in frames]
        judged = []
        for pixels, description in frames:
            with contextlib.suppress(FrameNotComparable):
                judged.append(self._judge(pixels, description))
        return self._at_least_one([golden for golden in judged if golden is not None])

    def choose_again(self, golden: GoldenSet) -> list[GoldenFrame]:
        """Return the line's frames of a bundle's golden set, with the verdicts of a new policy.

        Raises:
            GoldenFailed: if every frame lies too near to a new threshold.
        """
        judged = [
            self._judge(frame.pixels, answer.description)
            for answer, frame in zip(golden.answers, golden.frames, strict=True)
            if answer.line == self.line
        ]
        return self._at_least_one([again for again in judged if again is not None])

    def _at_least_one(self, chosen: list[GoldenFrame]) -> list[GoldenFrame]:
        if not chosen:
            raise GoldenFailed(
                f"Every score of the line {self.line} lies within the golden tolerance of a threshold, so no device "
                "could be checked; train longer, or lower golden.score_tolerance."
            )
        return chosen

    def _real(self, samples: Sequence[Sample]) -> Iterator[GoldenFrame]:
        for sample in samples:
            what = "a good part" if sample.label != ANOMALOUS else f"a defect of the kind {sample.kind}"
            golden = self._judge(self._pixels(sample), what)
            if golden is not None:
                yield golden

    def _planted(self, samples: Sequence[Sample]) -> Iterator[GoldenFrame]:
        generator = np.random.default_rng(self.seed)
        for attempt in range(_PLANTED_TRIES):
            strength = (attempt + 1) / _PLANTED_TRIES
            pixels = plant_defect(self._pixels(samples[attempt % len(samples)]), generator, strength)
            golden = self._judge(pixels, "a good part with a planted defect")
            if golden is not None and golden.verdict is not Verdict.PASS:
                yield golden

    def _pixels(self, sample: Sample) -> NDArray[np.uint8]:
        frame = read_frame(sample.path.read_bytes(), FrameLimits(), self.spec)
        height, width = frame.pixels.shape[:2]
        scale = min(
            1.0,
            _LARGEST_MULTIPLE * max(self.spec.resize_height / height, self.spec.resize_width / width),
        )
        return resize_pixels(frame.pixels, round(height * scale), round(width * scale))

    def _judge(self, pixels: NDArray[np.uint8], description: str) -> GoldenFrame | None:
        """Judge one candidate as a device will, alone in its batch; None if it is too near to a threshold."""
        height, width = pixels.shape[:2]
        scores, maps = self._ask(pixels)
        inspected = inspected_mask(self.policy, *maps.shape[1:], window=self.spec.window(1, 1))
        window = self.spec.window(height, width)
        judgement = judge(float(scores[0]), maps[0], self.policy, self.rule, window, inspected)
        near = _CLEARANCE * self.tolerance.score_tolerance * abs(self.policy.fail_threshold)
        thresholds = (self.policy.review_threshold, self.policy.fail_threshold)
        if min(abs(judgement.score - threshold) for threshold in thresholds) <= near:
            return None
        return GoldenFrame(self.line, encode_png(pixels), description, float(scores[0]), maps[0], judgement.verdict)

    def _without_verdict(self, pixels: NDArray[np.uint8], description: str) -> GoldenFrame:
        scores, maps = self._ask(pixels)
        return GoldenFrame(self.line, encode_png(pixels), description, float(scores[0]), maps[0], Verdict.NO_VERDICT)

    def _ask(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self.run(fit_to_input(pixels, self.spec)[None], np.array([self.line_index], np.int64))


def contrast_asked_for(bundle: Bundle, line: str) -> float:
    """Return the contrast that a bundle's golden frames ask of the frames of one of its lines; 0 asks for none."""
    return next(least_contrast_of(bundle, own) for own in read_golden_by_line(bundle) if own.answers[0].line == line)


def carry_golden_over(bundle: Bundle, golden: GoldenSet, without: str) -> list[GoldenFrame]:
    """Return a bundle's golden frames as they are, all but those of one line."""
    return [
        GoldenFrame(
            answer.line, bundle.files[answer.file], answer.description, answer.score, anomaly_map, answer.verdict
        )
        for answer, anomaly_map in zip(golden.answers, golden.anomaly_maps, strict=True)
        if answer.line != without
    ]


def golden_files(chosen: Sequence[GoldenFrame]) -> dict[str, bytes]:
    """Return the files of a golden set by relative path, the frames of all lines one after another."""
    answers = [
        GoldenAnswer(
            line=golden.line,
            file=f"golden/{index:02d}.png",
            description=golden.description,
            score=golden.score,
            verdict=golden.verdict,
        )
        for index, golden in enumerate(chosen)
    ]
    return write_golden(answers, [golden.png for golden in chosen], np.stack([golden.anomaly_map for golden in chosen]))


def plant_defect(pixels: NDArray[np.uint8], generator: np.random.Generator, strength: float) -> NDArray[np.uint8]:
    """Return a good frame with a scratch and a stain near its centre: visible, and like nothing on a good part.

    Args:
        pixels: `(h, w, 3)` uint8 RGB; left as it is.
        generator: decides where and how.
        strength: from 0, nothing, to 1, a stain of a third of the frame in noise of full contrast.
    """
    height, width = pixels.shape[:2]
    planted = pixels.astype(np.float32)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    centre_y, centre_x = generator.uniform(0.35, 0.65, 2) * (height, width)
    angle = generator.uniform(0, np.pi)
    across = (x - centre_x) * np.sin(angle) - (y - centre_y) * np.cos(angle)
    along = (x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)
    size = min(height, width)
    scratch = (np.abs(across) < 0.02 * size) & (np.abs(along) < 0.4 * size * strength)
    radius = size * (0.05 + 0.28 * strength)
    stain = (y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2
    # Coarse noise: cells of some pixels survive the resize, single pixels would be averaged away.
    cell = max(1, size // 32)
    cells = generator.choice((0.0, 255.0), (height // cell + 1, width // cell + 1, 3))
    noise = np.repeat(np.repeat(cells, cell, axis=0), cell, axis=1)[:height, :width]
    planted[stain] = (1 - strength) * planted[stain] + strength * noise[stain]
    planted[scratch] = 255 - planted[scratch]
    return np.clip(planted, 0, 255).astype(np.uint8)


def _first(candidates: Iterator[GoldenFrame], count: int) -> list[GoldenFrame]:
    return [golden for golden, _ in zip(candidates, range(max(0, count)), strict=False)]
