"""Curves and histograms of the report as inline SVG whose colours are the page's, so that they read in light and dark.

The one door to matplotlib. Numbers in, text out; nothing here knows runs or bundles.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
Thresholds = tuple[float, float]

_LOSS_POINTS = 600
_BINS = 48
_PANELS_SIDE_BY_SIDE = 3

# Matplotlib wants fixed colours: each of these stands for a variable of the page's style sheet.
_INK, _GRID, _GOOD, _TEST = "#010101", "#020202", "#030303", "#040404"
_DEFECT, _REVIEW, _FAIL = "#050505", "#060606", "#070707"
_VARIABLES = {
    _INK: "var(--ink)",
    _GRID: "var(--line)",
    _GOOD: "var(--held)",
    _TEST: "var(--good)",
    _DEFECT: "var(--defect)",
    _REVIEW: "var(--review)",
    _FAIL: "var(--fail)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
# Where a legend hides least. It is matplotlib's default as well, but only who asks for it is spared a warning when the
# search takes more than a second, as on a busy machine.
_EMPTIEST: Final = "best"


def draw_histogram(
    held_out: Sequence[float],
    good: Sequence[float],
    defective: Sequence[float],
    thresholds: Thresholds,
    place: int = 1,
) -> str:
    """Draw the scores of three groups of frames, each as shares of its own size, with both thresholds.

    Args:
        held_out: of good frames that thresholds were calibrated on.
        good: of good test frames.
        defective: of anomalous test frames.
        thresholds: review and fail.
        place: tells this drawing from others of its kind on the page.
    """
    series = [
        ("good, held out for calibration", held_out, _GOOD),
        ("good, test", good, _TEST),
        ("defective, test", defective, _DEFECT),
    ]
    edges = np.histogram_bin_edges(np.concatenate([held_out, good, defective, thresholds]), _BINS).tolist()

    def paint(axes: Axes) -> None:
        for name, scores, colour in series:
            if len(scores):
                share = np.full(len(scores), 100 / len(scores))
                axes.hist(scores, edges, weights=share, color=colour, alpha=0.45, label=f"{name} ({len(scores)})")
                axes.hist(scores, edges, weights=share, histtype="step", color=colour, linewidth=1.4)
        axes.axvline(thresholds[0], color=_REVIEW, linewidth=1.6, linestyle="--", label="review threshold")
        axes.axvline(thresholds[1], color=_FAIL, linewidth=1.6, label="fail threshold")
        axes.set_xlabel("score (larger is more anomalous)")
        axes.set_ylabel("percent of the group's frames")
        axes.legend(loc=_EMPTIEST)

    label = (
        f"Histogram of scores of good and defective frames, with the review threshold at {thresholds[0]:.4g} and the "
        f"fail threshold at {thresholds[1]:.4g}"
    )
    return _draw(f"histogram-{place}", label, (8.4, 3.4), paint)


def draw_roc(
    points: Points, good: Sequence[float], defective: Sequence[float], thresholds: Thresholds, place: int = 1
) -> str | None:
    """Draw the ROC curve with the points of both thresholds; None where there is no curve."""
    if not points:
        return None

    def paint(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), color=_DEFECT, linewidth=1.8, zorder=3, clip_on=False)
        _mark(axes, [(_share(good, value), _share(defective, value)) for value in thresholds])
        axes.set(xlabel="share of good frames stopped", ylabel="share of defects stopped")
        axes.legend(loc="lower right")

    label = "ROC curve of the test frames, with the points of both thresholds"
    return _draw(f"roc-{place}", label, (4.1, 3.6), paint)


def draw_precision_recall(
    points: Points, good: Sequence[float], defective: Sequence[float], thresholds: Thresholds, place: int = 1
) -> str | None:
    """Draw precision over recall with the points of both thresholds; None where there is no curve."""
    if not points:
        return None

    def at(threshold: float) -> tuple[float, float]:
        right, wrong = _share(defective, threshold) * len(defective), _share(good, threshold) * len(good)
        return right / len(defective), right / (right + wrong) if right + wrong else 1.0

    def paint(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), color=_DEFECT, linewidth=1.8, zorder=3, clip_on=False)
        _mark(axes, [at(value) for value in thresholds])
        axes.set(xlabel="share of defects stopped", ylabel="share of stops that are right")
        axes.legend(loc="lower left")

    label = "Precision over recall of the test frames, with the points of both thresholds"
    return _draw(f"precision-recall-{place}", label, (4.1, 3.6), paint)


def draw_loss(losses: Sequence[tuple[str, int, float]]) -> str | None:
    """Draw `(stage, step, loss)` of all iterations with a running mean; None where nothing descended.

    Each stage has a panel with axes of its own, since its loss is another quantity than those of the others.
    """
    if not losses:
        return None
    stages: dict[str, list[float]] = {}
    for stage, _, loss in losses:
        stages.setdefault(stage, []).append(loss)

    def painter(stage: str, values: Sequence[float], *, has_title: bool) -> Callable[[Axes], None]:
        window = max(1, len(values) // 100)
        smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
        every = max(1, len(values) // _LOSS_POINTS)

        def paint(axes: Axes) -> None:
            steps = np.arange(len(values))
            axes.plot(steps[::every], values[::every], color=_TEST, linewidth=0.7, alpha=0.5, label="each iteration")
            axes.plot(steps[window - 1 :][::every], smooth[::every], color=_TEST, linewidth=1.8, label="running mean")
            axes.set(xlabel="iteration", ylabel="loss", xlim=(0, max(1, len(values) - 1)))
            if has_title:
                axes.set_title(stage)
            axes.legend(loc=_EMPTIEST)

        return paint

    told = [f"{len(values)} iterations, from {values[0]:.3g} to {values[-1]:.3g}" for values in stages.values()]
    if len(stages) > 1:
        told = [f"{stage}: {one}" for stage, one in zip(stages, told, strict=True)]
    paints = [painter(stage, values, has_title=len(stages) > 1) for stage, values in stages.items()]
    rows = -(-len(paints) // _PANELS_SIDE_BY_SIDE)
    return _draw("loss", f"Training loss over {'; '.join(told)}", (8.4, 2.6 * rows), *paints)


def _mark(axes: Axes, points: Points) -> None:
    marks = ((_REVIEW, "o", "review threshold"), (_FAIL, "s", "fail threshold"))
    for point, (colour, marker, label) in zip(points, marks, strict=True):
        axes.plot(*point, marker, color=colour, markersize=7, label=label, zorder=4, clip_on=False, linestyle="none")
    axes.set(xlim=(0, 1), ylim=(0, 1))


def _share(scores: Sequence[float], threshold: float) -> float:
    return float(np.mean(np.array(scores) >= threshold)) if len(scores) else 0.0


def _draw(name: str, label: str, size: tuple[float, float], *paints: Callable[[Axes], None]) -> str:
    """Draw one panel each, some side by side."""
    columns = min(len(paints), _PANELS_SIDE_BY_SIDE)
    rows = -(-len(paints) // columns)
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        for place, paint in enumerate(paints, 1):
            axes = figure.add_subplot(rows, columns, place)
            axes.patch.set_alpha(0)
            axes.grid(color=_GRID, linewidth=0.5)
            axes.set_axisbelow(True)
            paint(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    # Matplotlib's list of fonts is not the page's: keep the size, inherit the rest.
    svg = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font-size: \1", svg)
    # Every drawing numbers its parts alike; in one page the names must differ.
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"(xlink:href=\"|url\()#", rf"\1#{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
