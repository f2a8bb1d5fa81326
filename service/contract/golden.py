"""The golden set: a few frames whose answers are known, replayed on the real device before a line goes live.

A digest says that a file is the one that was written; only an inference says that this device, with this runtime,
still gives the verdict that was validated.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from service.contract.bundle import GOLDEN_FILE, GOLDEN_MAPS_FILE, Bundle, LineName, Manifest
from service.contract.calibration import read_arrays
from service.contract.frames import Frame, FrameLimits, fit_to_input, read_frame
from service.contract.pictures import least_contrast
from service.contract.policy import Policy, Verdict, inspected_mask, judge, may_judge
from service.contract.tiling import Run, by_tiles
from service.errors import BundleRefused, FlawlineError

_UNREADABLE = "The golden set can't be read; export the bundle again."


class GoldenAnswer(BaseModel):
    """What is expected of one golden frame.

    Attributes:
        line: whose policy judges the frame, and whose index the graph is told.
        file: path of the PNG within the bundle.
        description: what the frame shows, in words.
        score: raw score of the frame.
        verdict: under the line's default policy; `NO_VERDICT` where that needs a calibration and there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    line: LineName
    file: str
    description: str
    score: FiniteFloat
    verdict: Verdict


_ANSWERS = TypeAdapter(tuple[GoldenAnswer, ...])


@dataclass(frozen=True, eq=False)
class GoldenSet:
    """The parsed golden set of one bundle.

    Attributes:
        answers: one a frame.
        frames: decoded pixels, one a frame.
        anomaly_maps: `(n, h, w)` float32, expected.
    """

    answers: tuple[GoldenAnswer, ...]
    frames: tuple[Frame, ...]
    anomaly_maps: NDArray[np.float32]


def write_golden(
    answers: Sequence[GoldenAnswer], pngs: Sequence[bytes], anomaly_maps: NDArray[np.float32]
) -> dict[str, bytes]:
    """Return the files of a golden set by relative path.

    Args:
        answers: one a frame.
        pngs: the frames' bytes, in the same order.
        anomaly_maps: `(n, h, w)` float32, in the same order.
    """
    maps = io.BytesIO()
    np.savez_compressed(maps, anomaly_maps=anomaly_maps)
    return {
        GOLDEN_FILE: _ANSWERS.dump_json(tuple(answers), indent=2) + b"\n",
        GOLDEN_MAPS_FILE: maps.getvalue(),
        **{answer.file: png for answer, png in zip(answers, pngs, strict=True)},
    }


def read_golden(bundle: Bundle) -> GoldenSet:
    """Parse a verified bundle's golden set.

    Raises:
        BundleRefused: if it has no frame of a line, or its parts don't belong together.
    """
    return merge_golden(list(read_golden_by_line(bundle)))


def read_golden_by_line(bundle: Bundle) -> Iterator[GoldenSet]:
    """Parse a verified bundle's golden set line by line, so that the frames of few lines are in memory at a time.

    Raises:
        BundleRefused: if it has no frame of a line, or its parts don't belong together.
    """
    try:
        answers = _ANSWERS.validate_json(bundle.files[GOLDEN_FILE])
        maps = read_arrays(bundle.files[GOLDEN_MAPS_FILE], GOLDEN_MAPS_FILE)["anomaly_maps"]
    except (ValidationError, KeyError, FlawlineError) as error:
        raise BundleRefused(_UNREADABLE) from error
    shape = (len(answers), *bundle.manifest.map_size)
    shown: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        shown.setdefault(answer.line, []).append(index)
    if shown.keys() != set(bundle.manifest.lines):
        raise BundleRefused("The golden set must have frames of every line, and of no other; export the bundle again.")
    if maps.shape != shape or maps.dtype != np.float32 or not np.isfinite(maps).all():
        raise BundleRefused("The golden set is incomplete; export the bundle again.")
    for places in shown.values():
        own = tuple(answers[place] for place in places)
        yield GoldenSet(own, tuple(_read_frame(bundle, answer) for answer in own), maps[places])


def merge_golden(sets: Sequence[GoldenSet]) -> GoldenSet:
    """Put the golden sets of lines together; at least one."""
    return GoldenSet(
        tuple(answer for golden in sets for answer in golden.answers),
        tuple(frame for golden in sets for frame in golden.frames),
        np.concatenate([golden.anomaly_maps for golden in sets]),
    )


def _read_frame(bundle: Bundle, answer: GoldenAnswer) -> Frame:
    try:
        return read_frame(bundle.files[answer.file], FrameLimits(), bundle.manifest.input)
    except (KeyError, FlawlineError) as error:
        raise BundleRefused(_UNREADABLE) from error


def replay(bundle: Bundle, golden: GoldenSet, run: Run) -> None:
    """Judge every golden frame on a device by its own line's policy, and compare maps, scores and verdicts.

    Args:
        bundle: verified.
        golden: its golden set.
        run: the network on the device, which of a tiled frame is asked about the tiles.

    Raises:
        BundleRefused: if an answer differs by more than the manifest's rule allows; the sentence names the frame.
        EngineFailed: whatever `run` raises is passed on.
    """
    manifest = bundle.manifest
    run = by_tiles(run, manifest.input, manifest.output.score_rule)
    judges = {
        line: _judge_of(line, bundle.policies[line], manifest, golden) for line in {a.line for a in golden.answers}
    }
    for answer, frame, expected in zip(golden.answers, golden.frames, golden.anomaly_maps, strict=True):
        line_index, policy, inspected, span, magnitude = judges[answer.line]
        scores, maps = run(fit_to_input(frame.pixels, manifest.input)[None], np.array([line_index], np.int64))
        if maps.shape != (1, *expected.shape) or scores.shape != (1,):
            raise _differs(answer, "shape")
        # Written so that a NaN fails the comparison.
        if not float(np.abs(maps[0] - expected).max()) <= manifest.golden.map_tolerance * span:
            raise _differs(answer, "anomaly map")
        if not abs(float(scores[0]) - answer.score) <= manifest.golden.score_tolerance * magnitude:
            raise _differs(answer, "score")
        window = manifest.input.window(frame.height, frame.width)
        verdict = Verdict.NO_VERDICT
        if may_judge(policy, is_calibrated=answer.line in bundle.calibrations):
            rule = manifest.output.score_rule
            verdict = judge(float(scores[0]), maps[0], policy, rule, window, inspected).verdict
        if verdict is not answer.verdict:
            raise _differs(answer, "verdict")


def least_contrast_of(bundle: Bundle, golden: GoldenSet) -> float:
    """Return the contrast below which a frame shows no picture of a line (`pictures.py`).

    Args:
        bundle: verified.
        golden: of one of its lines.

    Returns:
        0 where the line is not calibrated: its golden frames are not known to show the line.
    """
    if any(answer.line not in bundle.calibrations for answer in golden.answers):
        return 0.0
    shown = list(zip(golden.answers, golden.frames, strict=True))
    good = [frame for answer, frame in shown if answer.verdict is Verdict.PASS] or golden.frames
    return least_contrast(fit_to_input(frame.pixels, bundle.manifest.input) for frame in good)


class _Judge(NamedTuple):
    """What the frames of one line are judged by: lines may have maps and scores of quite different sizes."""

    line_index: int
    policy: Policy
    inspected: NDArray[np.bool_] | None
    span: float
    magnitude: float


def _judge_of(line: str, policy: Policy, manifest: Manifest, golden: GoldenSet) -> _Judge:
    shown = [answer.line == line for answer in golden.answers]
    maps = golden.anomaly_maps[shown]
    magnitude = abs(policy.fail_threshold)
    if policy.calibration == "self":  # whose thresholds are in other units than raw scores
        magnitude = max(abs(answer.score) for answer, is_shown in zip(golden.answers, shown, strict=True) if is_shown)
    return _Judge(
        line_index=manifest.lines.index(line),
        policy=policy,
        inspected=inspected_mask(policy, *manifest.map_size, window=manifest.input.window(1, 1)),
        span=float(maps.max() - maps.min()),
        magnitude=max(magnitude, float(np.finfo(np.float32).tiny)),
    )


def _differs(answer: GoldenAnswer, what: str) -> BundleRefused:
    return BundleRefused(
        f"The golden frame {answer.file} gives another {what} on this device than at export; the network, the runtime "
        "or the device is not the one that was validated."
    )
