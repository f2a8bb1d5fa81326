"""The page that one shows the plant manager: what is caught, what it costs in good parts, where the detector looks.

Comes last but for the bundle. Two steps, so that a page can be rendered again without the frames: `collect.py` makes a
`ReportData` that a run directory keeps, `render` turns it into one HTML file that needs nothing else: pictures are data
URIs, curves are inline SVG, and a content security policy forbids everything that is not in the file.
"""

from collections.abc import Sequence
from typing import NamedTuple

from service.contract.frames import FrameLimits, decode_image
from service.contract.geometry import InputSpec
from service.contract.heatmaps import RAMP_AT, RAMP_RGB, overlay
from service.contract.policy import Policy, ScoreRule, Verdict, inspected_mask, judge
from training.golden import GoldenFrame
from training.reporting.collect import base64_jpeg
from training.reporting.drawings import draw_histogram, draw_loss, draw_precision_recall, draw_roc
from training.reporting.page_data import Group, LineReport, Picture, ReportData, Rules, RunFacts
from training.reporting.pages import render_page


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
        golden.description, golden.verdict, judgement.score, base64_jpeg(pixels), base64_jpeg(painted)
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


# ---- pictures


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
