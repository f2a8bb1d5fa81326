"""Draws a dashboard without Grafana: its panels' queries, asked of a real Prometheus, in the places and units it names.

    prometheus --config.file=... &        # scraping a service that cameras keep busy
    python k8s/monitoring/picture.py http://127.0.0.1:9090 lines .github/dashboard.png --minutes 10

Everything is read from the committed JSON, so whoever looks at the picture looks at the dashboard: titles, units,
thresholds, legends, grid. Colours and fonts are matplotlib's.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

mpl.use("Agg")

DASHBOARDS = Path(__file__).resolve().parent / "dashboards"
_COLUMNS = 24
_INCHES_A_COLUMN, _INCHES_A_ROW = 0.62, 0.36
_STEPS = 120
_DIM, _INK, _PAPER = "#8e8e99", "#d8d9da", "#181b1f"
_COLOURS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#fade2a")
_NAMED = {"green": "#73bf69", "yellow": "#f2cc0c", "red": "#f2495c", "purple": "#b877d9"}
_MANY_SERIES = 8


class Prometheus:
    """Asks one Prometheus, over one range of time."""

    def __init__(self, url: str, minutes: float, variables: Mapping[str, str]) -> None:
        self._url = url.rstrip("/")
        self._variables = variables
        self.end = time.time()
        self.start = self.end - 60 * minutes
        self.step = (self.end - self.start) / _STEPS

    def over_time(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of a query, each with its labels and `values`."""
        return self._ask("query_range", expression, start=self.start, end=self.end, step=self.step)

    def now(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of a query at the end of the range, each with its labels and `value`."""
        return self._ask("query", expression, time=self.end)

    def _ask(self, what: str, expression: str, **when: float) -> list[dict[str, Any]]:
        for name, value in self._variables.items():
            expression = expression.replace(name, value)
        asked = {"query": expression, **when}
        answer = httpx.get(f"{self._url}/api/v1/{what}", params=asked, timeout=30).json()
        if answer["status"] != "success":
            raise SystemExit(f"{expression}: {answer.get('error')}")
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result


def draw(dashboard: Mapping[str, Any], prometheus: Prometheus) -> Figure:
    """Return a figure of the whole dashboard."""
    panels = dashboard["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(_COLUMNS * _INCHES_A_COLUMN, rows * _INCHES_A_ROW + 0.4), facecolor="#111217")
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.25 / height, dashboard["title"], color=_INK, fontsize=13, weight="bold", va="center")
    for panel in panels:
        _draw_panel(figure, panel, prometheus, rows, top=0.4 / height)
    return figure


def _draw_panel(figure: Figure, panel: Mapping[str, Any], prometheus: Prometheus, rows: int, *, top: float) -> None:
    place, scale = panel["gridPos"], (1 - top) / rows
    left, width = place["x"] / _COLUMNS, place["w"] / _COLUMNS
    bottom, height = 1 - top - (place["y"] + place["h"]) * scale, place["h"] * scale
    card = figure.add_axes((left + 0.004, bottom + 0.15 * scale, width - 0.008, height - 0.3 * scale), facecolor=_PAPER)
    card.set(xticks=[], yticks=[])
    for spine in card.spines.values():
        spine.set_color("#2c3235")
    card.text(0.02, 1 - 0.5 / place["h"], panel["title"], color=_INK, fontsize=9, va="center", transform=card.transAxes)
    inner = (left + 0.055 * 12 / _COLUMNS + 0.012, bottom + 2.3 * scale, width - 0.055, height - 3.6 * scale)
    axes = figure.add_axes(inner, facecolor=_PAPER)
    kinds: dict[str, Callable[[Axes, Mapping[str, Any], Prometheus], None]] = {
        "timeseries": _draw_series,
        "heatmap": _draw_heatmap,
        "stat": _draw_stat,
        "table": _draw_table,
    }
    axes.tick_params(colors=_DIM, labelsize=7, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    kinds[panel["type"]](axes, panel, prometheus)


def _draw_series(axes: Axes, panel: Mapping[str, Any], prometheus: Prometheus) -> None:
    drawn = 0
    for target in panel["targets"]:
        for series in prometheus.over_time(target["expr"]):
            times, values = np.array(series["values"], float).T
            name = _legend(target["legendFormat"], series["metric"])
            colour = _colour_of(name, panel) or _COLOURS[drawn % len(_COLOURS)]
            label = name if drawn < _MANY_SERIES else None
            axes.plot(times - prometheus.end, values, color=colour, linewidth=1.3, label=label)
            axes.fill_between(times - prometheus.end, values, color=colour, alpha=0.08, linewidth=0)
            drawn += 1
    for step in panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", ()):
        if step.get("value"):
            axes.axhline(
                step["value"], color={"yellow": "#f2cc0c"}.get(step["color"], "#f2495c"), linewidth=0.8, ls="--"
            )
    if not drawn:
        axes.text(0.5, 0.5, "No data", color=_DIM, fontsize=9, ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    low, high = axes.get_ylim()
    is_flat = axes.dataLim.ymin == axes.dataLim.ymax == 0  # around which matplotlib leaves room on both sides
    axes.set_ylim(0 if is_flat else min(0, low), 1 if is_flat else max(high, 1e-9))
    _name_axes(axes, panel, prometheus)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.06, -0.13),
        ncols=4,
        fontsize=6.5,
        labelcolor=_INK,
        frameon=False,
        handlelength=1,
        columnspacing=1,
    )


def _draw_heatmap(axes: Axes, panel: Mapping[str, Any], prometheus: Prometheus) -> None:
    [target] = panel["targets"]
    series = sorted(prometheus.over_time(target["expr"]), key=lambda one: float(one["metric"]["le"]))
    if not series:
        axes.text(0.5, 0.5, "No data", color=_DIM, fontsize=9, ha="center", transform=axes.transAxes)
        return
    times = sorted({float(at) for one in series for at, _ in one["values"]})
    counts = np.zeros((len(series), len(times)))
    for row, one in enumerate(series):
        at = {float(moment): float(value) for moment, value in one["values"]}
        counts[row] = [at.get(moment, 0.0) for moment in times]
    # Buckets count everything below their bound; a cell is what lies between two bounds.
    cells = np.diff(counts, axis=0, prepend=0).clip(0)
    axes.imshow(
        np.ma.masked_equal(cells, 0),
        origin="lower",
        aspect="auto",
        cmap="plasma",
        # A cell reaches back to the moment before, so that a single one has a width as well.
        extent=(times[0] - prometheus.step - prometheus.end, times[-1] - prometheus.end, 0, len(series)),
        interpolation="nearest",
    )
    _name_axes(axes, panel, prometheus)
    unit = panel["fieldConfig"]["defaults"].get("unit", "none")
    bounds = [_told(float(one["metric"]["le"]), unit) for one in series]
    axes.set_yticks(np.arange(1, len(series) + 1, 2), bounds[::2])


def _draw_stat(axes: Axes, panel: Mapping[str, Any], prometheus: Prometheus) -> None:
    axes.set(xticks=[], yticks=[])
    unit = panel["fieldConfig"]["defaults"].get("unit", "none")
    answers = [(target, one) for target in panel["targets"] for one in prometheus.now(target["expr"])]
    for number, (target, one) in enumerate(answers):
        x = (number + 0.5) / len(answers)
        value = float(one["value"][1])
        colour = _colour_at(value, panel)
        axes.text(x, 0.55, _told(value, unit), color=colour, fontsize=26, ha="center", transform=axes.transAxes)
        name = _legend(target["legendFormat"], one["metric"])
        axes.text(x, 0.2, name, color=_DIM, fontsize=8, ha="center", transform=axes.transAxes)


def _colour_at(value: float, panel: Mapping[str, Any]) -> str:
    """Return the colour of the last threshold that a value has reached."""
    steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", ())
    reached = [step["color"] for step in steps if step.get("value") is None or value >= step["value"]]
    return _NAMED[reached[-1]] if reached else _NAMED["green"]


def _draw_table(axes: Axes, panel: Mapping[str, Any], prometheus: Prometheus) -> None:
    axes.set(xticks=[], yticks=[])
    [target] = panel["targets"]
    rows = [one["metric"] for one in prometheus.now(target["expr"])]
    columns = sorted({name for row in rows for name in row})
    for x, name in enumerate(columns):
        axes.text(x / len(columns), 0.95, name, color=_DIM, fontsize=8, transform=axes.transAxes)
        for y, row in enumerate(rows):
            told = row.get(name, "")[:20]
            axes.text(x / len(columns), 0.75 - 0.2 * y, told, color=_INK, fontsize=8, transform=axes.transAxes)


def _name_axes(axes: Axes, panel: Mapping[str, Any], prometheus: Prometheus) -> None:
    unit = panel["fieldConfig"]["defaults"].get("unit", "none")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _told(value, unit)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 60:.0f} min"))
    axes.set_xlim(prometheus.start - prometheus.end, 0)
    minutes = (prometheus.end - prometheus.start) / 60
    axes.set_xticks(60 * np.arange(-math.floor(minutes), 1, max(1, round(minutes / 6))))
    if panel["type"] == "timeseries":
        axes.locator_params(axis="y", nbins=5)
        axes.grid(color="#2c3235", linewidth=0.5)


def _told(value: float, unit: str) -> str:
    """Return a value in a unit of Grafana's, as it would write it."""
    if np.isinf(value):
        return "+Inf"
    if unit == "s":
        return f"{value:g} s" if abs(value) >= 1 or value == 0 else f"{1000 * value:.3g} ms"
    if unit == "percentunit":
        return f"{100 * value:.4g}%"
    if unit in ("bytes", "decmbytes"):
        megabytes = value / 2**20 if unit == "bytes" else value
        return f"{megabytes:.4g} MiB"
    return {"reqps": f"{value:.3g} req/s", "percent": f"{value:.3g}%"}.get(unit, f"{value:.4g}")


def _colour_of(name: str, panel: Mapping[str, Any]) -> str | None:
    """Return the colour that the dashboard fixes for a series, if it does."""
    for override in panel["fieldConfig"]["overrides"]:
        if re.search(override["matcher"]["options"].strip("/"), name):
            [colour] = [each["value"]["fixedColor"] for each in override["properties"] if each["id"] == "color"]
            return _NAMED[colour]
    return None


def _legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), template).strip()


def main() -> None:
    """Draw one dashboard to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", help="its address")
    parser.add_argument("dashboard", help="lines, latency, fleet or line-detail")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--minutes", type=float, default=15, help="how far back")
    parser.add_argument("--line", default=".*", help="what the variable of that name is set to")
    parser.add_argument("--interval", default="30s", help="over which rates are taken")
    arguments = parser.parse_args()
    variables = {"$namespace": ".*", "$line": arguments.line, "$__rate_interval": arguments.interval}
    prometheus = Prometheus(arguments.prometheus, arguments.minutes, variables)
    dashboard = json.loads((DASHBOARDS / f"flawline-{arguments.dashboard}.json").read_text("utf-8"))
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(dashboard, prometheus).savefig(arguments.picture, dpi=80)


if __name__ == "__main__":
    main()
