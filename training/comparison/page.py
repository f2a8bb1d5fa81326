"""The page that shows several detectors side by side: what each finds, what it costs, and the same frames by each.

Comes after the cells of a comparison are complete. Figures come from the cells; pictures are made anew from the kept
bundles, so that a page can be written again without measuring anything.
"""

import base64
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import POLICY_FILE, Manifest, load_bundle, load_policy
from service.contract.frames import FrameLimits, decode_image, encode_jpeg, fit_to_input, resize_mask, resize_pixels
from service.contract.heatmaps import overlay
from service.contract.policy import Policy, Verdict, inspected_mask, judge
from service.contract.regions import draw_outlines, outline_mask
from service.contract.tiling import Run, by_tiles
from training.bundling.export import GraphRun
from training.comparison.compare import (
    Cell,
    CellFailed,
    CellPlan,
    auroc_difference,
    auroc_resamples,
    cell_directory,
    data_digest,
)
from training.data.detect import read_dataset
from training.data.loader import load_mask
from training.data.samples import ANOMALOUS, NORMAL, UNKNOWN, Sample
from training.measuring.bootstrap import FEWEST_FRAMES, auroc_interval
from training.reporting.collect import leave_out
from training.reporting.page_data import HELD_OUT
from training.reporting.pages import duration, mebibytes, millions, percent, render_page

_DEFECTS_SHOWN, _GOOD_SHOWN = 6, 2
_PICTURE_PX = 320
_ONLY_LINE = np.zeros(1, np.int64)
_JPEG_QUALITY = 80
_ANNOTATION_RGB = (80, 220, 80)
_FIGURES = ("i_auroc", "i_ap", "p_auroc", "aupro")
# Below one half a ranking is worse than chance, so a bar begins there.
_BAR_BEGINS = 0.5

TABLE_COLUMNS = (
    *("detector", "I-AUROC", "95 %", "control", "I-AP", "P-AUROC", "AUPRO", "defects stopped", "good stopped"),
    *("fit", "trained / all", "graph", "ms a frame"),
)


@dataclass(frozen=True)
class Result:
    """What is known of one detector on one line.

    Attributes:
        plan: what was wanted.
        cell: what was measured, or None.
        control: of the same detector, or None where it was not asked for or failed.
        fault: why there is no cell.
    """

    plan: CellPlan
    cell: Cell | None
    control: Cell | None = None
    fault: str | None = None


class Ranked(NamedTuple):
    """An image AUROC with its 95 % interval (`bootstrap.auroc_interval`), or why it has none; all from 0 to 1."""

    value: float
    bounds: tuple[float, float] | None
    reason: str | None

    def __str__(self) -> str:
        """Tell the interval."""
        return "-" if self.bounds is None else f"{100 * self.bounds[0]:.1f} to {100 * self.bounds[1]:.1f}"


class Settings(NamedTuple):
    """What the command was told of all detectors.

    Attributes:
        configuration: name of the one that every detector has.
        changes: `key=value` that were changed by hand, in order.
        weights: that were asked for, in words.
    """

    configuration: str
    changes: tuple[str, ...]
    weights: str


class ComparedLine(NamedTuple):
    """Which frames a line's figures are of.

    Attributes:
        name: of the line.
        folder: of its frames.
        data: SHA-256 over them.
        mask: SHA-256 of the region of interest's file, or None where everything was inspected.
    """

    name: str
    folder: Path
    data: str
    mask: str | None


class ShownOverlay(NamedTuple):
    """One detector's answer to one frame: verdict, score, and base64 JPEG."""

    detector: str
    verdict: Verdict
    score: float
    picture: str


class ShownFrame(NamedTuple):
    """A frame as base64 JPEG, and what every detector says of it."""

    name: str
    kind: str
    is_good: bool
    is_annotated: bool
    picture: str
    overlays: tuple[ShownOverlay, ...]


def pair_controls(outcomes: Sequence[Cell | CellFailed], plans: Sequence[CellPlan]) -> list[Result]:
    """Put each detector's control beside it; the outcomes are those of the plans, in order."""
    both = list(zip(plans, outcomes, strict=True))
    controls = {
        (plan.line, plan.config.detector): outcome
        for plan, outcome in both
        if plan.kind == "control" and isinstance(outcome, Cell)
    }
    return [
        Result(
            plan,
            outcome if isinstance(outcome, Cell) else None,
            controls.get((plan.line, plan.config.detector)),
            outcome.sentence if isinstance(outcome, CellFailed) else None,
        )
        for plan, outcome in both
        if plan.kind == "fitted"
    ]


def table_rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Return the cells of one line as rows of `TABLE_COLUMNS`, the best detector first."""
    return [_table_row(result) for result in _best_first(results)]


def render_comparison(results: Sequence[Result], folder: Path, settings: Settings) -> str:
    """Return the page.

    Args:
        results: of all lines and detectors.
        folder: that keeps the cells and their bundles.
        settings: of all detectors.
    """
    by_line: Mapping[str, list[Result]] = defaultdict(list)
    for result in results:
        by_line[result.plan.line].append(result)
    detectors = list(dict.fromkeys(result.plan.config.detector for result in results))
    lines = [
        {
            "name": line,
            "results": _best_first(of_line),
            "as_good": as_good_as_best(_best_first(of_line)),
            "ranked": {result.plan.config.detector: ranked(result.cell) for result in of_line},
            "controls": {result.plan.config.detector: ranked(result.control) for result in of_line},
            "slowest_ms": max((r.cell.speed.cpu_ms for r in of_line if r.cell and r.cell.speed), default=1.0),
            "reasons": _reasons(of_line),
            "frames": show_frames([result for result in of_line if result.cell is not None], folder),
        }
        for line, of_line in by_line.items()
    ]
    return render_page(
        "compare.html",
        {
            "lines": lines,
            "detectors": detectors,
            "settings": settings,
            "rates": sorted({(r.plan.config.review_rate, r.plan.config.fail_rate) for r in results}),
            "seeds": sorted({r.plan.config.seed for r in results}),
            "data": [_compared_line(of_line[0].plan) for of_line in by_line.values()],
            "configurations": {r.plan.config.detector: r.plan.config.to_yaml() for r in results},
            "measured": [cell for r in results for cell in (r.cell, r.control) if cell is not None],
            "means": _means(results),
            "has_controls": any(result.control is not None for result in results),
            "cpus": sorted({r.cell.speed.cpu for r in results if r.cell is not None and r.cell.speed is not None}),
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "stopped": stopped_shares,
            "place": _place,
            "fewest_frames": FEWEST_FRAMES,
            "stands_above": stands_above_control,
        },
    )


def ranked(cell: Cell | None) -> Ranked | None:
    """Return a cell's image AUROC with its interval, or None where it is not defined."""
    if cell is None or (value := cell.metrics["i_auroc"].value) is None:
        return None
    found = auroc_interval(value, auroc_resamples([cell]), len(cell.good_scores), len(cell.defect_scores))
    return Ranked(value, found.bounds, found.reason)


def stands_above_control(result: Result) -> bool | None:
    """Tell whether a detector ranks better than its control beyond the noise of the test frames.

    Returns:
        None where one of them was not measured; False also where the test frames are too few to tell.
    """
    if result.cell is None or result.control is None:
        return None
    difference = auroc_difference([result.cell], [result.control])
    return difference is not None and difference[0] > 0


def as_good_as_best(results: Sequence[Result]) -> list[str]:
    """Return the detectors of one line that its test frames can't tell from the best one, the better first.

    Told apart are two where the 95 % interval of their difference, over the same draws of test frames, lies above 0;
    whether the intervals of each alone overlap says little.

    Args:
        results: of one line, the best first.
    """
    known = [result.cell for result in results if result.cell is not None and ranked(result.cell) is not None]
    behind = [(cell, auroc_difference(known[:1], [cell])) for cell in known[1:]]
    return [cell.detector for cell, difference in behind if difference is None or difference[0] <= 0]


def stopped_shares(cell: Cell) -> tuple[float | None, float | None]:
    """Return the shares of defective and of good test frames that are not `PASS`; None where there are no such."""

    def share(is_good: bool) -> float | None:
        rows = [row for row in cell.verdicts if row.is_good == is_good and row.kind != HELD_OUT]
        total = sum(row.total for row in rows)
        return sum(row.review + row.failed for row in rows) / total if total else None

    return share(False), share(True)


def show_frames(results: Sequence[Result], folder: Path) -> list[ShownFrame]:
    """Draw the same few test frames by every detector of one line.

    Frames are chosen by rank alone: of each kind of defect in turn the one in the middle, then the hardest, then the
    clearest, as all detectors see them on average; and of good frames the one that looks worst and the one in the
    middle.

    Args:
        results: of one line, measured.
        folder: that keeps the bundles.
    """
    cells = [result.cell for result in results if result.cell is not None]
    if not cells:
        return []
    samples = [s for s in read_dataset(results[0].plan.folder, results[0].plan.layout).test if s.label != UNKNOWN]
    shown = _choose(samples, cells)
    artists = [
        _Artist.load(cell, cell_directory(folder, result.plan) / cell.bundle)
        for result, cell in zip(results, cells, strict=True)
        if cell.bundle is not None
    ]
    return [_show(sample, artists) for sample in shown]


class _Artist(NamedTuple):
    """A bundle that answers and draws."""

    detector: str
    run: Run
    manifest: Manifest
    policy: Policy

    @classmethod
    def load(cls, cell: Cell, path: Path) -> "_Artist":
        bundle = load_bundle(path)
        manifest = bundle.manifest
        graph = GraphRun(bundle.model)
        run = by_tiles(graph, manifest.input, manifest.output.score_rule)
        return cls(cell.detector, run, manifest, load_policy(path / POLICY_FILE))

    def draw(self, frame: NDArray[np.uint8], small: NDArray[np.uint8]) -> ShownOverlay:
        """Answer a frame `(H, W, 3)` and paint the answer over its thumbnail `(h, w, 3)`, both uint8."""
        spec, size = self.manifest.input, (frame.shape[0], frame.shape[1])
        scores, maps = self.run(fit_to_input(frame, spec)[None], _ONLY_LINE)
        window = spec.window(*size)
        inspected = inspected_mask(self.policy, *maps.shape[1:], window=spec.window(1, 1))
        judgement = judge(float(scores[0]), maps[0], self.policy, self.manifest.output.score_rule, window, inspected)
        painted = overlay(small, judgement.anomaly_map, self.policy, judgement.regions, window, size)
        if inspected is not None:
            leave_out(painted, small, inspected, spec.window(*small.shape[:2]))
        return ShownOverlay(self.detector, judgement.verdict, judgement.score, _base64_jpeg(painted))


def _show(sample: Sample, artists: Sequence[_Artist]) -> ShownFrame:
    bit_depth = artists[0].manifest.input.bit_depth
    frame = decode_image(sample.path.read_bytes(), FrameLimits(), bit_depth=bit_depth).pixels
    height, width = frame.shape[:2]
    scale = min(1.0, _PICTURE_PX / max(height, width))
    small = resize_pixels(frame, max(1, round(height * scale)), max(1, round(width * scale)))
    overlays = tuple(artist.draw(frame, small) for artist in artists)
    mask = resize_mask(load_mask(sample, height, width), *small.shape[:2])
    outlined = small.copy()
    draw_outlines(
        outlined,
        [tuple((x * small.shape[1], y * small.shape[0]) for x, y in outline) for outline in outline_mask(mask)],
        _ANNOTATION_RGB,
    )
    return ShownFrame(
        name=sample.path.name,
        kind=sample.kind,
        is_good=sample.label == NORMAL,
        is_annotated=bool(mask.any()),
        picture=_base64_jpeg(outlined),
        overlays=overlays,
    )


def _choose(samples: Sequence[Sample], cells: Sequence[Cell]) -> list[Sample]:
    defects = [sample for sample in samples if sample.label == ANOMALOUS]
    good = [sample for sample in samples if sample.label == NORMAL]
    ranks = np.mean([_ranks(cell.defect_scores) for cell in cells], axis=0)
    of_kind: dict[str, list[int]] = defaultdict(list)
    for index in np.argsort(ranks, kind="stable"):
        of_kind[defects[index].kind].append(int(index))
    # Middle, hardest, clearest of each kind; a kind with fewer frames gives what it has.
    turns = [dict.fromkeys((row[len(row) // 2], row[0], row[-1])) for _, row in sorted(of_kind.items())]
    order = [list(turn)[place] for place in range(3) for turn in turns if place < len(turn)]
    chosen = [defects[index] for index in order[:_DEFECTS_SHOWN]]
    if good:
        by_rank = np.argsort(np.mean([_ranks(cell.good_scores) for cell in cells], axis=0), kind="stable")
        places = dict.fromkeys((int(by_rank[-1]), int(by_rank[len(good) // 2])))
        chosen += [good[index] for index in list(places)[:_GOOD_SHOWN]]
    return chosen


def _ranks(scores: Sequence[float]) -> NDArray[np.float64]:
    """Return each score's rank, 0 for the lowest; `(n,)`."""
    return np.argsort(np.argsort(np.array(scores), kind="stable"), kind="stable").astype(np.float64)


def _best_first(results: Sequence[Result]) -> list[Result]:
    def accuracy(result: Result) -> float:
        value = None if result.cell is None else result.cell.metrics["i_auroc"].value
        return -1.0 if value is None else value

    return sorted(results, key=accuracy, reverse=True)


def _means(results: Sequence[Result]) -> list[tuple[str, dict[str, float], float]]:
    """Return each detector's image AUROC by line and their mean, the best first; only detectors that know all lines."""
    lines = {result.plan.line for result in results}
    known: dict[str, dict[str, float]] = defaultdict(dict)
    for result in results:
        if result.cell is not None and result.cell.metrics["i_auroc"].value is not None:
            known[result.cell.detector][result.plan.line] = result.cell.metrics["i_auroc"].value
    rows = [(name, of, sum(of.values()) / len(of)) for name, of in known.items() if set(of) == lines]
    return sorted(rows, key=lambda row: -row[2])


def _compared_line(plan: CellPlan) -> ComparedLine:
    mask = plan.region_of_interest
    return ComparedLine(
        plan.line,
        plan.folder,
        data_digest(plan.folder, plan.layout),
        None if mask is None else hashlib.sha256(mask.read_bytes()).hexdigest(),
    )


def _reasons(results: Sequence[Result]) -> list[str]:
    """Return why figures of a line are not defined, each reason once."""
    records = [record for result in results if result.cell is not None for record in result.cell.metrics.values()]
    return list(dict.fromkeys(record.reason for record in records if record.value is None and record.reason))


def _table_row(result: Result) -> tuple[str, ...]:
    name, cell = result.plan.config.detector, result.cell
    if cell is None:
        return (name, f"failed: {result.fault}", *[""] * (len(TABLE_COLUMNS) - 2))
    of_cell, control = ranked(cell), ranked(result.control)
    values = [cell.metrics[figure].value for figure in _FIGURES]
    figures = ["-" if value is None else percent(value) for value in values]
    stopped = ["-" if share is None else percent(share) for share in stopped_shares(cell)]
    return (
        name,
        figures[0],
        "-" if of_cell is None else str(of_cell),
        "-" if control is None else percent(control.value),
        *figures[1:],
        *stopped,
        duration(cell.fit_s),
        f"{millions(cell.trainable_parameters or 0)} / {millions(cell.parameters or 0)}",
        mebibytes(cell.model_bytes or 0),
        "-" if cell.speed is None else f"{cell.speed.cpu_ms:.1f}",
    )


def _place(value: float) -> str:
    """Return where a figure lies on its bar, which ends at 1, in percent of the bar's length."""
    return f"{100 * min(1.0, max(0.0, (value - _BAR_BEGINS) / (1 - _BAR_BEGINS))):.1f}"


def _base64_jpeg(pixels: NDArray[np.uint8]) -> str:
    return base64.b64encode(encode_jpeg(pixels, _JPEG_QUALITY)).decode("ascii")
