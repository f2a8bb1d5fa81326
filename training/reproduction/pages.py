"""What came out of a reproduction, beside what was published: one record, and the same as Markdown and as a page.

Comes after `reproduce`. Rules: a figure is ours or published and says which; a mean over categories exists only where
all of them were measured with every seed; what is not defined says why.
"""

import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean, stdev

from pydantic import BaseModel, ConfigDict

from training.data.benchmarks import BENCHMARKS
from training.reproduction.published import SHOTS, PublishedDetector, PublishedFigures, Setting, read_published
from training.reproduction.reproduce import Cell, CellFailed, Plan

_TITLES = {
    "i_auroc": "I-AUROC",
    "i_ap": "I-AP",
    "i_f1max": "I-F1max",
    "p_auroc": "P-AUROC",
    "p_ap": "P-AP",
    "p_f1max": "P-F1max",
    "aupro": "AUPRO@0.3",
    "aupro_at_0.05": "AUPRO@0.05",
    "seg_f1": "SegF1",
    "spro": "sPRO@0.05, mean of kinds",
    "i_auroc_of_kinds": "I-AUROC, mean of kinds",
    "i_auroc_logical_anomalies": "I-AUROC, logical anomalies",
    "i_auroc_structural_anomalies": "I-AUROC, structural anomalies",
    "spro_logical_anomalies": "sPRO@0.05, logical anomalies",
    "spro_structural_anomalies": "sPRO@0.05, structural anomalies",
    "s_auroc": "S-AUROC, over pieces of several frames",
}
_SPREAD = (
    " A figure of ours is the mean of the seeds, “±” the standard deviation between them (of a sample, n - 1); it "
    "tells how much another seed moves the figure, not how much other test frames would."
)
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .75rem 0; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8886; }
"""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Record):
    """A figure of ours, in percent.

    Attributes:
        value: mean over the seeds, or None.
        spread: standard deviation over the seeds, where there are several.
        reason: why there is no value.
    """

    value: float | None
    spread: float | None = None
    reason: str | None = None

    def __str__(self) -> str:
        """Tell the figure, or why there is none."""
        if self.value is None:
            return f"not defined: {self.reason}"
        return f"{self.value:.2f}" + ("" if self.spread is None else f" ± {self.spread:.2f}")


class Comparison(_Record):
    """A figure of ours beside a published one.

    Attributes:
        of: what it is the mean over, or the category.
        metric: name of the figure.
        ours: measured here.
        published: percent, or None where nobody's figure is known.
        source: of the published one.
        differs: how its setting differs from ours.
    """

    of: str
    metric: str
    ours: Figure
    published: float | None = None
    source: str = ""
    differs: tuple[str, ...] = ()


class Reproduction(_Record):
    """Everything that came out.

    Attributes:
        detector: name of the method here.
        title: as its authors call it.
        paper: arXiv id, or empty.
        remark: what a reader must know of the published figures.
        data: title of the data set, or of the folder.
        setting: one model for each category, or one for all.
        seeds: of the models.
        differences: where this run, or the method here, differs from the paper's, one sentence each.
        means: over the data set, and over other groups of categories with published means.
        by_category: every category and figure.
        failures: models that could not be measured.
        cells: all measured models.
    """

    detector: str
    title: str
    paper: str
    remark: str
    data: str
    setting: Setting
    seeds: tuple[int, ...]
    differences: tuple[str, ...]
    means: tuple[Comparison, ...]
    by_category: tuple[Comparison, ...]
    failures: tuple[CellFailed, ...]
    cells: tuple[Cell, ...]


def summarise(
    plan: Plan, results: Sequence[Cell | CellFailed], folder_name: str, differences: Sequence[str]
) -> Reproduction:
    """Set our figures beside the published ones.

    Args:
        plan: what was wanted.
        results: of `reproduce`.
        folder_name: of the data set, for one that nobody published.
        differences: where the configuration is not the paper's.
    """
    told = read_published().get(plan.config.detector)
    cells = tuple(result for result in results if isinstance(result, Cell))
    failures = tuple(result for result in results if isinstance(result, CellFailed))
    rows = [] if told is None else [f for f in told.figures if f.data == plan.data and f.setting == plan.setting]
    names = tuple(line.name for line in plan.lines)
    metrics = _metrics_of(cells, rows, plan.data)
    figures = _Figures(plan.seeds, cells, failures)
    return Reproduction(
        detector=plan.config.detector,
        title=plan.config.detector if told is None else told.title,
        paper="" if told is None else told.paper,
        remark="Nothing published is known here." if told is None else told.remark,
        data=folder_name if plan.data is None else BENCHMARKS[plan.data].title,
        setting=plan.setting,
        seeds=plan.seeds,
        differences=(*differences, *_differences_of_method(told), *_differences_of(plan, metrics)),
        means=tuple(_means(plan, rows, figures, metrics)),
        by_category=tuple(_by_category(names, rows, figures, metrics)),
        failures=failures,
        cells=cells,
    )


def to_markdown(found: Reproduction) -> str:
    """Tell a reproduction as a Markdown document."""
    return "\n".join(_document(found, _markdown_table, lambda text: f"- {_markdown(text)}", "# {}\n", "\n## {}\n"))


def to_html(found: Reproduction) -> str:
    """Tell a reproduction as one HTML page that needs nothing else."""
    item = "<p>• {}</p>".format
    body = _document(found, _html_table, lambda text: item(html.escape(text)), "<h1>{}</h1>", "<h2>{}</h2>")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{html.escape(_title(found))}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def comparison_rows(comparisons: Iterable[Comparison]) -> list[tuple[str, str, str, str, str, str]]:
    """Return one row of text for each comparison: of, figure, ours, published, difference, source."""
    return [
        (
            row.of,
            _TITLES.get(row.metric, row.metric),
            str(row.ours),
            "none known" if row.published is None else f"{row.published}",
            "" if row.published is None or row.ours.value is None else f"{row.ours.value - row.published:+.2f}",
            row.source,
        )
        for row in comparisons
    ]


COMPARISON_COLUMNS = ("of", "figure", "ours, %", "published, %", "ours minus published", "source of the published")


class _Figures:
    """Our figures by category, metric and seed."""

    def __init__(self, seeds: Sequence[int], cells: Sequence[Cell], failures: Sequence[CellFailed]) -> None:
        self._seeds = seeds
        self._of = {(name, cell.seed): figures for cell in cells for name, figures in cell.figures.items()}
        self._why = {(name, failure.seed): failure.sentence for failure in failures for name in failure.categories}

    def of_category(self, name: str, metric: str) -> Figure:
        """Return a category's figure over all seeds."""
        return self.mean((name,), metric)

    def mean(self, names: Sequence[str], metric: str) -> Figure:
        """Return the mean over categories for each seed, then over the seeds."""
        values = []
        for seed in self._seeds:
            of_seed = []
            for name in names:
                value, reason = self._one(name, metric, seed)
                if value is None:
                    place = "" if len(names) == 1 else f"{name}: "
                    return Figure(value=None, reason=f"{place}{reason}")
                of_seed.append(value)
            values.append(100 * fmean(of_seed))
        return Figure(value=fmean(values), spread=stdev(values) if len(values) > 1 else None)

    def _one(self, name: str, metric: str, seed: int) -> tuple[float | None, str]:
        figures = self._of.get((name, seed))
        if figures is None:
            return None, self._why.get((name, seed), "was not run")
        record = figures.get(metric)
        if record is None:
            return None, "this data set has no such figure"
        return record.value, record.reason or ""


def _means(
    plan: Plan, rows: Sequence[PublishedFigures], figures: _Figures, metrics: Sequence[str]
) -> Iterator[Comparison]:
    names = tuple(line.name for line in plan.lines)
    whole = () if plan.data is None else BENCHMARKS[plan.data].categories
    wanted = whole or names
    label = f"mean over all {len(wanted)} categories" if whole or plan.is_whole else "mean over the folder's categories"
    missing = [name for name in wanted if name not in names]
    for metric in metrics:
        published = next((row for row in rows if not row.categories and metric in row.values), None)
        if missing or not (whole or plan.is_whole):
            reason = f"only {len(names)} of {len(wanted)} categories were run" if missing else "not all were run"
            ours = Figure(value=None, reason=reason)
        else:
            ours = figures.mean(wanted, metric)
        yield _compare(label, metric, ours, published)
    for row in rows:
        if len(row.categories) > 1:
            absent = [name for name in row.categories if name not in names]
            for metric in row.values:
                ours = (
                    Figure(value=None, reason=f"{', '.join(absent)} not run")
                    if absent
                    else figures.mean(row.categories, metric)
                )
                yield _compare(f"mean over {', '.join(row.categories)}", metric, ours, row)


def _by_category(
    names: Sequence[str], rows: Sequence[PublishedFigures], figures: _Figures, metrics: Sequence[str]
) -> Iterator[Comparison]:
    for name in names:
        for metric in metrics:
            published = next((row for row in rows if row.categories == (name,) and metric in row.values), None)
            yield _compare(name, metric, figures.of_category(name, metric), published)


def _compare(of: str, metric: str, ours: Figure, published: PublishedFigures | None) -> Comparison:
    if published is None:
        return Comparison(of=of, metric=metric, ours=ours)
    return Comparison(
        of=of,
        metric=metric,
        ours=ours,
        published=published.values[metric],
        source=published.source,
        differs=published.differs,
    )


def _metrics_of(cells: Sequence[Cell], rows: Sequence[PublishedFigures], data: str | None) -> list[str]:
    """Return all figures there are, ours and published, in the field's order."""
    seen = {metric for cell in cells for figures in cell.figures.values() for metric in figures}
    seen |= {metric for row in rows for metric in row.values}
    if data == "mvtec_ad2":
        seen.discard("s_auroc")  # older cells have it, of the lights of a piece; nobody measures that
    return [*(name for name in _TITLES if name in seen), *sorted(seen - _TITLES.keys())]


def _differences_of_method(told: PublishedDetector | None) -> tuple[str, ...]:
    """Say where a method here is not its authors', or that nothing of the kind is known."""
    if told is None:
        return ()
    return told.differs or ("No difference between the method here and its authors' is known.",)


def _differences_of(plan: Plan, metrics: Sequence[str]) -> Iterator[str]:
    told = read_published().get(plan.config.detector)
    if told is not None and plan.setting != told.setting and plan.setting not in SHOTS:
        yield f"The setting is {plan.setting}; the paper's first setting is {told.setting}."
    spec = plan.config.frame_input
    if (spec.canvas_height, spec.canvas_width) != (spec.resize_height, spec.resize_width):
        yield (
            f"Frames are cropped from {spec.resize_height}x{spec.resize_width} to "
            f"{spec.canvas_height}x{spec.canvas_width}; pixel figures are measured inside the crop."
        )
    if plan.config.evaluation_resolution == "original":
        yield "Our pixel figures are measured at the frames' own size."
    else:
        yield "Our pixel figures are measured at the size of the anomaly map."
    if "seg_f1" in metrics:
        yield (
            "Our SegF1 is that of the public test frames, at mean + 3 standard deviations of the category's validation "
            "pixels; the makers' own rule could not be read, and their server measures private frames."
        )
    if plan.setting in SHOTS:
        model = "one model for all categories" if plan.is_one_model else "a model for each category"
        yield f"Each seed draws frames of its own, {SHOTS[plan.setting]} of each category, for {model}."
    if len(plan.seeds) == 1:
        yield "One seed was run, so nothing is known of the spread."


def _title(found: Reproduction) -> str:
    return f"{found.title} on {found.data}, {found.setting}"


def _document(
    found: Reproduction,
    table: Callable[[Sequence[str], Iterable[Sequence[str]]], str],
    item: Callable[[str], str],
    first: str,
    second: str,
) -> Iterator[str]:
    yield first.format(html.escape(_title(found)))
    yield item(
        "“Ours” was measured by this run; “published” was read in the source beside it and was not measured here."
    )
    if found.paper:
        yield item(f"Paper: {found.paper}. {found.remark}".strip())
    elif found.remark:
        yield item(found.remark)
    yield item(f"Seeds: {', '.join(map(str, found.seeds))}.{_SPREAD if len(found.seeds) > 1 else ''}")
    yield second.format("Ours beside published")
    yield table(COMPARISON_COLUMNS, comparison_rows(found.means))
    yield second.format("Where the settings differ")
    differs = dict.fromkeys(text for row in (*found.means, *found.by_category) for text in row.differs)
    yield from (item(text) for text in (*found.differences, *differs))
    yield second.format("By category, ours")
    metrics = list(dict.fromkeys(row.metric for row in found.by_category))
    by_category: dict[str, list[str]] = {}
    for row in found.by_category:
        published = "" if row.published is None else f" (published {row.published})"
        by_category.setdefault(row.of, []).append(f"{row.ours}{published}")
    heads = ("category", *(_TITLES.get(metric, metric) for metric in metrics))
    yield table(heads, [(name, *cells) for name, cells in by_category.items()])
    if found.failures:
        yield second.format("Not measured")
        yield from (item(f"{', '.join(f.categories)}, seed {f.seed}: {f.sentence}") for f in found.failures)
    if warnings := list(dict.fromkeys(text for cell in found.cells for text in cell.warnings)):
        yield second.format("What the check of the data noticed")
        yield from (item(text) for text in warnings)
    yield second.format("Models")
    yield table(("categories", "seed", "fitted on", "device", "fitting, s", "finished"), _models(found.cells))


def _models(cells: Iterable[Cell]) -> list[tuple[str, ...]]:
    return [
        (
            ", ".join(cell.figures),
            str(cell.seed),
            f"{sum(fitted for fitted, _, _ in cell.frames.values())} frames",
            cell.device,
            f"{cell.fit_s:.0f}",
            cell.created_at,
        )
        for cell in cells
    ]


def _markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_markdown(cell) for cell in line)} |" for line in lines)


def _html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>\n{line(columns, "th")}\n{body}\n</table></div>'


def differences_of_configuration(config: str, settings: Sequence[str], weights: Mapping[str, str]) -> list[str]:
    """Say how a run's options leave the paper's setting.

    Args:
        config: name or path of the configuration.
        settings: `key=value` that were changed.
        weights: what is special about the backbone's weights, by option.
    """
    told = [] if config == "paper" else [f"The configuration is {config}, not the paper's."]
    told += [f"Changed by hand: {setting}." for setting in settings]
    return told + [f"{option}: {what}." for option, what in weights.items()]
