"""Gathers what a page shows of a line: figures, promises, verdicts and pictures; the last step that needs the frames.

Comes after evaluation and before the page (`report.py`).
"""

import base64
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import LineRecord
from service.contract.calibration import Calibration, Threshold
from service.contract.frames import FrameLimits, decode_image, encode_jpeg, resize_mask, resize_pixels
from service.contract.geometry import InputSpec
from service.contract.heatmaps import overlay
from service.contract.policy import Judgement, Policy, ScoreRule, Verdict, inspected_mask, verdict_of
from service.contract.regions import Window, draw_outlines, outline_mask
from training.calibrate import Calibrated
from training.data.loader import load_mask
from training.data.samples import ANOMALOUS, NORMAL, Sample
from training.measuring.answers import Answers
from training.measuring.evaluate import Evaluation, inspected_share, judge_all, to_records, without_test_frames
from training.measuring.metrics import Curve
from training.reporting.page_data import (
    HELD_OUT,
    Fact,
    Group,
    Inspected,
    LineReport,
    Picture,
    Promise,
    Rules,
    VerdictRow,
)

_THUMBNAIL_PX = 480
_JPEG_QUALITY = 80
_PICTURES_OF_A_KIND = 6
_ANNOTATION_RGB = (80, 220, 80)
_INSPECTED_RGB = (255, 255, 255)
_DIMMED = 0.4
_VERDICTS = (Verdict.PASS, Verdict.REVIEW, Verdict.FAIL)


def collect(
    line: str,
    facts: tuple[Fact, ...],
    warnings: tuple[str, ...],
    calibrated: Calibrated,
    held_out: Answers,
    evaluation: Evaluation | None,
    rule: ScoreRule,
    spec: InputSpec,
) -> LineReport:
    """Gather a line's figures and pictures; the last step that needs the frames.

    Args:
        line: its name.
        facts: of its frames.
        warnings: what the data check allowed but wants known.
        calibrated: thresholds and policy.
        held_out: answers to the good frames that were calibrated on.
        evaluation: of the test frames, or None where the line has none.
        rule: how scores are reduced from maps.
        spec: the network's input.
    """
    policy, peaks = calibrated.policy, calibrated.peaks
    share = inspected_share(policy, held_out.maps.shape[1:], spec)
    outside = None if evaluation is None else evaluation.defects_outside
    judgements = judge_all(held_out, policy, rule, spec)
    held_counts = dict.fromkeys(_VERDICTS, 0)
    for judgement in judgements:
        held_counts[judgement.verdict] += 1
    rows = [_row(HELD_OUT, True, held_counts)]
    pictures: list[Picture] = []
    if evaluation is not None:
        good_kinds = {s.kind for s in evaluation.answers.samples if s.label == NORMAL}
        for kind, counts in evaluation.verdict_counts().items():
            is_good = kind in good_kinds
            rows.append(_row("good, test" if is_good else kind, is_good, counts))
        pictures = _pictures_of_test(evaluation, policy, spec)
    if not any(picture.group == "passed" for picture in pictures):
        middle = int(np.argsort(held_out.scores, kind="stable")[len(held_out.scores) // 2])
        pictures.append(_picture("passed", held_out, judgements[middle], middle, policy, spec))
    return LineReport(
        line=line,
        facts=facts,
        warnings=warnings,
        review=_promise(calibrated.review),
        fail=_promise(calibrated.fail),
        verdicts=tuple(rows),
        metrics=to_records(without_test_frames() if evaluation is None else evaluation.metrics),
        by_kind={} if evaluation is None else to_records(evaluation.by_kind),
        calibration_scores=_rounded(judgement.score for judgement in judgements),
        good_scores=_scores_of(evaluation, NORMAL),
        defect_scores=_scores_of(evaluation, ANOMALOUS),
        roc=() if evaluation is None else _points(evaluation.roc),
        precision_recall=() if evaluation is None else _points(evaluation.precision_recall),
        pictures=tuple(pictures),
        peaks=tuple((float(f"{x:.3f}"), float(f"{y:.3f}")) for x, y in peaks.places),
        peaks_at_rim=peaks.at_rim if peaks.gather_at_rim else None,
        inspected=None if share is None else Inspected(share=share, defects_outside=outside),
        rules=Rules.of(policy),
    )


def carry_over(
    line: str, version: str, policy: Policy, calibration: Calibration, record: LineRecord, share: float | None
) -> LineReport:
    """Tell of a line whose thresholds stay as they are, from what its bundle holds.

    Args:
        line: its name.
        version: of the bundle that holds the following.
        policy: the line's default rules.
        calibration: its good-part values.
        record: what the manifest says of it.
        share: of the frame that is inspected, or None for all of it.

    Raises:
        ValueError: if the line was not calibrated.
    """
    if record.review_rate is None or record.fail_rate is None:
        raise ValueError("a line without a calibration promises nothing")
    counts = Counter(verdict_of(float(score), policy) for score in calibration.scores)
    facts = [Fact(name="Data digest", value=record.data.digest)]
    if record.data.calibration_frames is not None:
        facts.append(Fact(name="Digest of what calibrated it", value=record.data.calibration_frames.digest))
    return LineReport(
        line=line,
        facts=tuple(facts),
        warnings=(),
        carried_from=version,
        review=_promise(calibration.threshold(record.review_rate)),
        fail=_promise(calibration.threshold(record.fail_rate)),
        verdicts=(_row(HELD_OUT, True, {verdict: counts[verdict] for verdict in _VERDICTS}),),
        metrics=record.metrics,
        by_kind={},
        calibration_scores=_rounded(calibration.scores.tolist()),
        good_scores=(),
        defect_scores=(),
        roc=(),
        precision_recall=(),
        pictures=(),
        inspected=None if share is None else Inspected(share=share),
        rules=Rules.of(policy),
    )


def _row(kind: str, is_good: bool, counts: dict[Verdict, int]) -> VerdictRow:
    return VerdictRow(
        kind=kind,
        is_good=is_good,
        passed=counts[Verdict.PASS],
        review=counts[Verdict.REVIEW],
        failed=counts[Verdict.FAIL],
    )


def _promise(threshold: Threshold) -> Promise:
    return Promise(
        value=threshold.value,
        rate=threshold.false_reject_rate,
        bound=threshold.bound,
        good_parts=threshold.good_parts,
    )


def _scores_of(evaluation: Evaluation | None, label: int) -> tuple[float, ...]:
    if evaluation is None:
        return ()
    return _rounded(
        judgement.score
        for sample, judgement in zip(evaluation.answers.samples, evaluation.judgements, strict=True)
        if sample.label == label
    )


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.7g}") for value in values)


def _points(curve: Curve) -> tuple[tuple[float, float], ...]:
    return tuple(zip(_rounded(curve.x), _rounded(curve.y), strict=True))


def _pictures_of_test(evaluation: Evaluation, policy: Policy, spec: InputSpec) -> list[Picture]:
    samples, judgements = evaluation.answers.samples, evaluation.judgements
    order = sorted(range(len(samples)), key=lambda i: judgements[i].score)
    defects = [i for i in order if samples[i].label == ANOMALOUS]
    good = [i for i in order if samples[i].label == NORMAL]
    groups: dict[Group, list[int]] = {
        "missed": [i for i in defects if judgements[i].verdict is Verdict.PASS][:_PICTURES_OF_A_KIND],
        "rejected": [i for i in reversed(good) if judgements[i].verdict is not Verdict.PASS][:_PICTURES_OF_A_KIND],
        "caught": _clearest_of_each_kind(defects[::-1], samples, judgements),
        "passed": [i for i in good[len(good) // 2 :] if judgements[i].verdict is Verdict.PASS][:2],
    }
    return [
        _picture(group, evaluation.answers, judgements[i], i, policy, spec)
        for group, chosen in groups.items()
        for i in chosen
    ]


def _clearest_of_each_kind(
    falling: Sequence[int], samples: Sequence[Sample], judgements: Sequence[Judgement]
) -> list[int]:
    """Take the highest score of each kind first, then the second of each, and so on."""
    taken: dict[str, int] = {}
    rank = {}
    for i in falling:
        if judgements[i].verdict is not Verdict.PASS:
            rank[i] = taken.get(samples[i].kind, 0)
            taken[samples[i].kind] = rank[i] + 1
    return sorted(rank, key=lambda i: (rank[i], -judgements[i].score))[:_PICTURES_OF_A_KIND]


def _picture(
    group: Group, answers: Answers, judgement: Judgement, index: int, policy: Policy, spec: InputSpec
) -> Picture:
    sample, frame_size = answers.samples[index], answers.frame_sizes[index]
    scale = min(1.0, _THUMBNAIL_PX / max(frame_size))
    height, width = max(1, round(frame_size[0] * scale)), max(1, round(frame_size[1] * scale))
    decoded = decode_image(sample.path.read_bytes(), FrameLimits(), (height, width), spec.bit_depth)
    pixels = resize_pixels(decoded.pixels, height, width)
    window, anomaly_map = spec.window(*frame_size), answers.maps[index]
    painted = overlay(pixels, anomaly_map, policy, judgement.regions, window, frame_size)
    inspected = inspected_mask(policy, *anomaly_map.shape, window=spec.window(1, 1))
    if inspected is not None:
        leave_out(painted, pixels, inspected, spec.window(height, width))
    if sample.mask_paths:
        mask = resize_mask(load_mask(sample, *frame_size), height, width)
        pixels = pixels.copy()
        outlines = [tuple((x * width, y * height) for x, y in outline) for outline in outline_mask(mask)]
        draw_outlines(pixels, outlines, _ANNOTATION_RGB)
    return Picture(
        group=group,
        name=sample.path.name,
        kind=sample.kind,
        verdict=judgement.verdict,
        score=judgement.score,
        is_annotated=bool(sample.mask_paths),
        frame=base64_jpeg(pixels),
        overlay=base64_jpeg(painted),
    )


def leave_out(
    painted: NDArray[np.uint8], pixels: NDArray[np.uint8], inspected: NDArray[np.bool_], window: Window
) -> None:
    """Dim what is not inspected of a frame with its heatmap, in place, and draw a line round what is.

    No heat is shown there: no verdict looks at it.

    Args:
        painted: `(h, w, 3)` uint8, the frame with its heatmap.
        pixels: `(h, w, 3)` uint8, the frame.
        inspected: cells of the map, of any resolution.
        window: where the map lies on the picture, in its pixels.
    """
    height, width = pixels.shape[:2]
    top, left, bottom, right = (
        round(edge) for edge in (window[0], window[1], window[0] + window[2], window[1] + window[3])
    )
    seen = np.zeros((height, width), bool)
    seen[top:bottom, left:right] = resize_mask(inspected, bottom - top, right - left)
    painted[~seen] = np.rint(pixels[~seen] * _DIMMED).astype(np.uint8)
    outlines = [tuple((x * width, y * height) for x, y in outline) for outline in outline_mask(seen)]
    draw_outlines(painted, outlines, _INSPECTED_RGB)


def base64_jpeg(pixels: NDArray[np.uint8]) -> str:
    """Return a picture `(H, W, 3)` uint8 as a page embeds it."""
    return base64.b64encode(encode_jpeg(pixels, _JPEG_QUALITY)).decode("ascii")
