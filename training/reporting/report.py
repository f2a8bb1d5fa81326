"""The page that one shows the plant manager: what is caught, what it costs in good parts, where the detector looks.

Comes last but for the bundle. Two steps, so that a page can be rendered again without the frames: `collect` makes a
`ReportData` that a run directory keeps, `render` turns it into one HTML file that needs nothing else: pictures are data
URIs, curves are inline SVG, and a content security policy forbids everything that is not in the file.
"""

import base64
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from service.contract.bundle import LineRecord, MetricRecord, ParityRecord
from service.contract.calibration import Calibration, Threshold
from service.contract.frames import FrameLimits, decode_image, encode_jpeg, resize_mask, resize_pixels
from service.contract.geometry import InputSpec
from service.contract.heatmaps import RAMP_AT, RAMP_RGB, overlay
from service.contract.policy import (
    Judgement,
    Policy,
    ScoreRule,
    Verdict,
    inspected_mask,
    judge,
    policy_digest,
    verdict_of,
)
from service.contract.regions import Window, draw_outlines, outline_mask
from training.calibrate import Calibrated
from training.data.loader import load_mask
from training.data.samples import ANOMALOUS, NORMAL, Sample
from training.golden import GoldenFrame
from training.measuring.answers import Answers
from training.measuring.evaluate import Evaluation, inspected_share, judge_all, to_records, without_test_frames
from training.measuring.metrics import Curve
from training.reporting.drawings import draw_histogram, draw_loss, draw_precision_recall, draw_roc
from training.reporting.pages import render_page

_THUMBNAIL_PX = 480
_JPEG_QUALITY = 80
_PICTURES_OF_A_KIND = 6
_ANNOTATION_RGB = (80, 220, 80)
_INSPECTED_RGB = (255, 255, 255)
_DIMMED = 0.4
_VERDICTS = (Verdict.PASS, Verdict.REVIEW, Verdict.FAIL)
_HELD_OUT = "good, held out"

Group = Literal["missed", "rejected", "caught", "passed"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Promise(_Record):
    """One threshold and what good parts promise of it; see `service.contract.calibration.Threshold`.

    Attributes:
        value: of the threshold.
        rate: share of good parts that reach it, on average.
        bound: of that share, with 95 % confidence.
        good_parts: behind both, each of one frame or more.
    """

    value: float
    rate: float
    bound: float
    good_parts: int


class Inspected(_Record):
    """What is inspected, where that is not the whole frame.

    Attributes:
        share: of the frame.
        defects_outside: how many defective test frames show their marked defect wholly outside; None where no mask
            tells it.
    """

    share: float
    defects_outside: int | None = None

    def __str__(self) -> str:
        """Say it in words."""
        told = (
            f"Only the region of interest is inspected, {100 * self.share:.3g} % of the frame: defects outside of it "
            "are not looked for, and pixel figures are measured inside."
        )
        if self.defects_outside:
            told += (
                f" Defective test frames whose marked defect lies wholly outside: {self.defects_outside}; image "
                "figures and verdicts count them all the same."
            )
        return told


class Rules(_Record):
    """The policy that verdicts and pictures follow.

    Attributes:
        version: of the policy.
        digest: SHA-256 of its canonical JSON, as answers of the service name it.
        region_threshold: of the anomaly map; from it on, regions are outlined.
        map_floor: where the scale of heatmaps begins.
    """

    version: str
    digest: str
    region_threshold: float
    map_floor: float

    @classmethod
    def of(cls, policy: Policy) -> Self:
        """Return what the page says of a policy."""
        return cls(
            version=policy.version,
            digest=policy_digest(policy),
            region_threshold=policy.region_threshold,
            map_floor=policy.map_floor,
        )

    @property
    def map_ceiling(self) -> float:
        """Where the scale of heatmaps ends: its middle is the threshold of regions."""
        return 2 * self.region_threshold - self.map_floor


class VerdictRow(_Record):
    """How many frames of one kind got which verdict."""

    kind: str
    is_good: bool
    passed: int
    review: int
    failed: int

    @property
    def total(self) -> int:
        """All frames of the kind."""
        return self.passed + self.review + self.failed


class Picture(_Record):
    """A frame and its overlay, as base64 JPEGs.

    Attributes:
        group: why it is shown.
        name: of the file.
        kind: good, or the kind of defect.
        verdict: under the bundle's policy.
        score: compared score.
        is_annotated: whether the frame shows the outline of its ground-truth mask.
        frame: base64 JPEG.
        overlay: base64 JPEG.
    """

    group: Group
    name: str
    kind: str
    verdict: Verdict
    score: float
    is_annotated: bool
    frame: str
    overlay: str


class Fact(_Record):
    """One line of the run's facts."""

    name: str
    value: str


class RunFacts(_Record):
    """What the run says of itself.

    Attributes:
        name: of the bundle.
        detector: name of the method.
        backbone: name of the feature extractor, or None.
        created_at: UTC, ISO 8601.
        facts: further facts, in order.
        configuration: the run's YAML.
        losses: `(stage, step, loss)` of every iteration.
        parity: of the exported graph.
        warnings: what is worth knowing of the lines together.
    """

    name: str
    detector: str
    backbone: str | None
    created_at: str
    facts: tuple[Fact, ...]
    configuration: str
    losses: tuple[tuple[str, int, float], ...]
    parity: ParityRecord
    warnings: tuple[str, ...] = ()


class LineReport(_Record):
    """What the page shows of one line.

    Attributes:
        line: its name.
        facts: of its frames, in order.
        warnings: what the data check allowed but wants known.
        carried_from: version of the bundle that the line's thresholds were calibrated with, where that is an older one;
            then there is nothing of its test frames but figures.
        review: the threshold of `REVIEW`.
        fail: the threshold of `FAIL`.
        verdicts: held-out good frames first, then test frames by kind.
        metrics: figures of the test frames.
        by_kind: I-AUROC of each kind of defect.
        calibration_scores: of held-out good frames.
        good_scores: of good test frames.
        defect_scores: of anomalous test frames.
        roc: `(x, y)` points.
        precision_recall: `(x, y)` points.
        pictures: best and worst frames.
        peaks: where good parts look oddest, `(x, y)` in fractions of the frame, a place a held-out frame.
        peaks_at_rim: how many of them lie at the rim, where that sets the thresholds; else None.
        inspected: what is, where that is not the whole frame.
        rules: the line's policy; None in reports that are older than this.
        is_unseen: whether it is known that fitting saw none of the frames that thresholds rest on.
    """

    line: str
    facts: tuple[Fact, ...]
    warnings: tuple[str, ...]
    carried_from: str | None = None
    review: Promise
    fail: Promise
    verdicts: tuple[VerdictRow, ...]
    metrics: dict[str, MetricRecord]
    by_kind: dict[str, MetricRecord]
    calibration_scores: tuple[float, ...]
    good_scores: tuple[float, ...]
    defect_scores: tuple[float, ...]
    roc: tuple[tuple[float, float], ...]
    precision_recall: tuple[tuple[float, float], ...]
    pictures: tuple[Picture, ...]
    peaks: tuple[tuple[float, float], ...] = ()
    peaks_at_rim: int | None = None
    inspected: Inspected | None = None
    rules: Rules | None = None
    is_unseen: bool = True

    @property
    def held_out_frames(self) -> int:
        """How many frames stand behind the thresholds; more than parts, where parts have several views."""
        return sum(row.total for row in self.verdicts if row.kind == _HELD_OUT)

    @property
    def good_tested(self) -> tuple[VerdictRow, ...]:
        """Verdicts of good test frames."""
        return tuple(row for row in self.verdicts if row.is_good and row.kind != _HELD_OUT)

    @property
    def defects_tested(self) -> tuple[VerdictRow, ...]:
        """Verdicts of defective test frames, a row a kind."""
        return tuple(row for row in self.verdicts if not row.is_good)


class ReportData(_Record):
    """Everything the page shows; a run directory keeps it as `report.json`.

    Attributes:
        run: what the run says of itself.
        resolution: at which pixel figures were measured.
        lines: a section each, at least one.
    """

    run: RunFacts
    resolution: Literal["original", "model"]
    lines: tuple[LineReport, ...]


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
    rows = [_row(_HELD_OUT, True, held_counts)]
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
        verdicts=(_row(_HELD_OUT, True, {verdict: counts[verdict] for verdict in _VERDICTS}),),
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


class Drawings(NamedTuple):
    """What of a page takes most of its time and does not depend on the version of its bundle."""

    lines: list["_Section"]
    loss: str | None


def draw(data: ReportData) -> Drawings:
    """Draw the curves of a page, for whoever renders it more than once.

    Args:
        data: what the page shows.
    """
    lines = [_words_and_drawings(line, place) for place, line in enumerate(data.lines, start=1)]
    return Drawings(lines, draw_loss(data.run.losses))


def render(data: ReportData, version: str | None = None, drawings: Drawings | None = None) -> str:
    """Return the page as one self-contained HTML file.

    Args:
        data: what it shows.
        version: of the bundle that holds the page; None outside of one. The bundle's digest can't stand there, because
            it covers the page.
        drawings: of the same data, where they are there already.
    """
    drawings = drawings or draw(data)
    values = {
        "data": data,
        "version": version,
        "ramp": ", ".join(f"rgb{rgb} {100 * at:g}%" for at, rgb in zip(RAMP_AT, RAMP_RGB, strict=True)),
        "lines": drawings.lines,
        "loss": drawings.loss,
        "metric_names": _METRIC_NAMES,
        "groups": _GROUPS,
        "glossary": _GLOSSARY,
    }
    return render_page("report.html", values)


class GeneratedPicture(NamedTuple):
    """A generated frame with its map and what is said of it, as base64 JPEGs."""

    description: str
    verdict: Verdict
    score: float
    frame: str
    overlay: str


def render_zero_shot(
    run: RunFacts,
    version: str,
    policy: Policy,
    golden: Sequence[GoldenFrame],
    rule: ScoreRule,
    spec: InputSpec,
) -> str:
    """Return the page of a bundle that no frame of its line has made, as one self-contained HTML file.

    Args:
        run: what the bundle says of itself.
        version: of the bundle.
        policy: of the line.
        golden: generated frames with their answers.
        rule: how scores are reduced from maps.
        spec: the network's input.
    """
    pictures = [_generated_picture(frame, policy, rule, spec) for frame in golden]
    values = {"run": run, "version": version, "policy": policy, "rules": Rules.of(policy), "pictures": pictures}
    return render_page("zero_shot.html", values)


def _generated_picture(golden: GoldenFrame, policy: Policy, rule: ScoreRule, spec: InputSpec) -> GeneratedPicture:
    pixels = decode_image(golden.png, FrameLimits()).pixels
    size = pixels.shape[0], pixels.shape[1]
    inspected = inspected_mask(policy, *golden.anomaly_map.shape, window=spec.window(1, 1))
    window = spec.window(*size)
    judgement = judge(golden.score, golden.anomaly_map, policy, rule, window, inspected)
    # Only where a verdict may be given are regions of one shown.
    regions = [] if golden.verdict is Verdict.NO_VERDICT else judgement.regions
    painted = overlay(pixels, judgement.anomaly_map, policy, regions, window, size)
    return GeneratedPicture(
        golden.description, golden.verdict, judgement.score, _base64_jpeg(pixels), _base64_jpeg(painted)
    )


class _Section(NamedTuple):
    """One line as the page's template takes it."""

    place: int
    data: LineReport
    good_total: int
    good_failed: int
    good_review: int
    defect_total: int
    defect_failed: int
    defect_review: int
    defect_missed: int
    histogram: str
    roc: str | None
    precision_recall: str | None
    ordinary: Picture | None


def _words_and_drawings(line: LineReport, place: int) -> _Section:
    thresholds = (line.review.value, line.fail.value)
    good, defective = line.good_scores, line.defect_scores
    return _Section(
        place=place,
        data=line,
        good_total=sum(row.total for row in line.good_tested),
        good_failed=sum(row.failed for row in line.good_tested),
        good_review=sum(row.review for row in line.good_tested),
        defect_total=sum(row.total for row in line.defects_tested),
        defect_failed=sum(row.failed for row in line.defects_tested),
        defect_review=sum(row.review for row in line.defects_tested),
        defect_missed=sum(row.passed for row in line.defects_tested),
        histogram=draw_histogram(line.calibration_scores, good, defective, thresholds, place),
        roc=draw_roc(line.roc, good, defective, thresholds, place),
        precision_recall=draw_precision_recall(line.precision_recall, good, defective, thresholds, place),
        ordinary=next((picture for picture in line.pictures if picture.group == "passed"), None),
    )


# ---- figures


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


# ---- pictures


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
        frame=_base64_jpeg(pixels),
        overlay=_base64_jpeg(painted),
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


def _base64_jpeg(pixels: NDArray[np.uint8]) -> str:
    return base64.b64encode(encode_jpeg(pixels, _JPEG_QUALITY)).decode("ascii")


# ---- words


_SPRO = "as AUPRO@0.05, but covering as much of a defect as its kind asks for is enough"
_METRIC_NAMES = {
    "i_auroc": ("Image AUROC", "chance that a random defective frame scores higher than a random good one"),
    "i_ap": ("Image AP", "average share of right alarms, over all thresholds"),
    "i_f1max": ("Image F1-max", "best balance of found defects and right alarms, at a threshold only the labels know"),
    "i_auroc_logical_anomalies": ("Image AUROC, logical anomalies", "that of this kind against all good frames"),
    "i_auroc_structural_anomalies": ("Image AUROC, structural anomalies", "that of this kind against all good frames"),
    "i_auroc_of_kinds": ("Image AUROC, mean of kinds", "mean of those of all kinds"),
    "spro_logical_anomalies": ("sPRO@0.05, logical anomalies", _SPRO),
    "spro_structural_anomalies": ("sPRO@0.05, structural anomalies", _SPRO),
    "spro": ("sPRO@0.05, mean of kinds", "mean of those of all kinds"),
    "s_auroc": ("Sample AUROC", "the same as image AUROC, for pieces that several frames show; the worst frame counts"),
    "p_auroc": ("Pixel AUROC", "the same as image AUROC, for pixels"),
    "p_ap": ("Pixel AP", "the same as image AP, for pixels; the strictest figure of localisation"),
    "p_f1max": ("Pixel F1-max", "the same as image F1-max, for pixels"),
    "aupro": (
        "AUPRO",
        "how much of each defect is covered while at most 30 % of good pixels are; each defect counts alike",
    ),
    "aupro_at_0.05": ("AUPRO@0.05", "the same as AUPRO, while at most 5 % of good pixels are covered"),
    "seg_f1": (
        "SegF1",
        "the same as pixel F1-max, at a threshold from good frames alone: mean + 3 standard deviations of their pixels",
    ),
}

_GROUPS: dict[Group, tuple[str, str]] = {
    "missed": ("Missed defects", "Defective frames that would pass. The lowest scores first: these are the worst."),
    "rejected": (
        "Good parts that would be stopped",
        "Good test frames whose verdict is REVIEW or FAIL. The highest scores first: these are the worst.",
    ),
    "caught": ("Clearest defects", "Defective frames with the highest scores, each kind in turn."),
    "passed": ("Ordinary good parts", "What the heatmap looks like when nothing is wrong."),
}

_GLOSSARY = {
    "line": "One product seen by one camera pose.",
    "frame": "One camera image.",
    "good part": "A part without defect. The detector learns from these alone.",
    "held out": "Good frames that thresholds rest on; the detector must not have been fitted on them.",
    "anomaly map": "For each place of the frame, how unlike good parts it is. Drawn as a heatmap on a fixed scale.",
    "score": "One number a frame; larger is more anomalous. It has no unit and no upper end.",
    "threshold": "From this score on a part is at least REVIEW, or FAIL.",
    "verdict": "PASS, REVIEW (a person should look) or FAIL; NO_VERDICT when anything went wrong, which is never PASS.",
    "false-reject rate": "Share of good parts that are stopped although nothing is wrong with them.",
    "region": "A connected place where the anomaly map is above its own threshold; outlined in cyan.",
    "interval": (
        "In 95 of 100 repetitions with other test frames such an interval holds the figure of all frames of this kind. "
        "Frames that are too few, or draws of them that all give one figure, tell none; of a perfect ranking only an "
        "image AUROC has one, which counts frames alone."
    ),
    "golden set": "Frames with known answers inside the bundle; a device must reproduce them before it may serve.",
    "parity": "The exported network was compared with the trained one: maps, scores and verdicts.",
}
