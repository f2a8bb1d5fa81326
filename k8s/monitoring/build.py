"""Builds what is committed beside it: Grafana's dashboards, and the cluster's PrometheusRule out of `rules.yaml`.

    python k8s/monitoring/build.py

Every query reads metrics that the service emits; a test runs each one against a Prometheus that scrapes a real server,
and another one builds the files anew and compares. The panels are told as data below, so that the test, the dashboards
and whoever reads this see the same queries.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from grafana_foundation_sdk.builders import dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DynamicConfigValue,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

HERE = Path(__file__).resolve().parent
RULES, DASHBOARDS = HERE / "rules.yaml", HERE / "dashboards"
RULE_RESOURCE = HERE / "prometheusrule.yaml"

_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_LINE = 'namespace=~"$namespace",line=~"$line"'
_FLEET = 'namespace=~"$namespace"'
_ON_GPU = 'exported_namespace=~"$namespace"'
_RATE = "[$__rate_interval]"

# A verdict has its colour wherever it is drawn.
_VERDICT_COLOURS = {"PASS": "green", "REVIEW": "yellow", "FAIL": "red", "NO_VERDICT": "purple"}

Kind = Literal["timeseries", "stat", "heatmap", "table"]


@dataclass(frozen=True)
class Query:
    """One query of a panel.

    Attributes:
        expression: PromQL, with the dashboard's variables.
        legend: how a series is named, with `{{label}}`.
        may_be_empty: why it is empty on an ordinary day, or None where that would be a fault.
        has_exemplars: whether single inspections are drawn as points beside it, each with a link to its heatmap.
    """

    expression: str
    legend: str
    may_be_empty: str | None = None
    has_exemplars: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: of the panel.
        meaning: shown when the mouse is over it.
        unit: Grafana's name of it.
        queries: drawn together.
        kind: how they are drawn.
        width: of 24 columns.
        warning: from here on a value is drawn yellow.
        critical: from here on a value is drawn red.
    """

    title: str
    meaning: str
    unit: str
    queries: Sequence[Query]
    kind: Kind = "timeseries"
    width: int = 12
    warning: float | None = None
    critical: float | None = None


def _quantiles(metric: str, labels: str, by: str) -> list[Query]:
    return [
        Query(
            f"histogram_quantile({quantile}, sum by ({by}, le) (rate({metric}_bucket{{{labels}}}{_RATE})))",
            f"p{int(100 * quantile)} {{{{{by}}}}}",
            has_exemplars=quantile > 0.5,
        )
        for quantile in (0.5, 0.99)
    ]


_WHY_NO_VERDICT = Panel(
    "Why frames had no verdict",
    "By the code that the caller was told.",
    "reqps",
    [
        Query(
            # Some reasons of every line stand at 0 from the first, and would fill the legend.
            f"sum by (line, reason) (rate(flawline_no_verdict_total{{{_LINE}}}{_RATE}) "
            f"and flawline_no_verdict_total{{{_LINE}}} > 0)",
            "{{line}} {{reason}}",
            "no frame was without a verdict",
        )
    ],
)

_LINES_PANELS = (
    Panel(
        "Frames a second",
        "Frames that came, by line, with and without a verdict.",
        "reqps",
        [Query(f"line:flawline_frames:rate5m{{{_LINE}}}", "{{line}}")],
    ),
    Panel(
        "Verdicts",
        "What was said of the frames, all chosen lines together.",
        "reqps",
        [
            Query(f"sum by (verdict) (rate(flawline_inspections_total{{{_LINE}}}{_RATE}))", "{{verdict}}"),
            Query(
                f"sum(rate(flawline_no_verdict_total{{{_LINE}}}{_RATE}))",
                "NO_VERDICT",
                "no frame was without a verdict",
            ),
        ],
    ),
    Panel(
        "Scores against the threshold",
        "Median and 99th percentile, in units of the fail threshold: at 1 a part fails. A point is one part: click it "
        "for its heatmap, as long as the pod that judged it keeps it.",
        "none",
        _quantiles("flawline_score", _LINE, "line"),
        critical=1,
    ),
    Panel(
        "Share of stopped parts",
        "Of the last few hundred frames, how many were not PASS.",
        "percentunit",
        [Query(f"flawline_review_ratio{{{_LINE}}}", "{{line}}")],
        warning=0.2,
    ),
    Panel(
        "Drift of scores",
        "Stability index of the last scores against the line's calibration: above 0.25 the parts are other ones.",
        "none",
        [Query(f"flawline_score_psi{{{_LINE}}}", "{{line}}")],
        warning=0.1,
        critical=0.25,
    ),
    Panel(
        "Brightness",
        "Mean of the pictures, from 0 to 1. A lamp that dies shows here before the scores move.",
        "percentunit",
        [Query(f'flawline_image_quality{{{_LINE},stat="brightness"}}', "{{line}}")],
    ),
    Panel(
        "Focus",
        "Sharpness of the pictures; falls with dirt on the lens and a camera that moved.",
        "none",
        [Query(f'flawline_image_quality{{{_LINE},stat="focus"}}', "{{line}}")],
    ),
    Panel(
        "Promise of thirty days",
        "Budget of errors that is left, of frames with a verdict and of frames in time: 100 % is untouched; below 0"
        " the promise is broken.",
        "percentunit",
        [Query(f"slo:flawline_budget:left30d{{{_LINE}}}", "{{line}} {{slo}}")],
    ),
    Panel(
        "Shadow against live",
        "Share of the last hour's frames on which a version on trial would have said something else: stricter, laxer, "
        "or nothing at all. A line without a shadow shows nothing.",
        "percentunit",
        [Query(f"line:flawline_shadow_disagreements:ratio1h{{{_LINE}}}", "{{line}} {{kind}}")],
        warning=0.02,
    ),
    _WHY_NO_VERDICT,
)

_LATENCY_PANELS = (
    Panel(
        "Time in the service",
        "From the first byte of a request to the last byte of its answer, of frames that were answered or whose "
        "deadline passed. Those that were refused at once have no time: how many there are stands beside.",
        "s",
        _quantiles("flawline_stage_duration_seconds", f'{_LINE},stage="total"', "line"),
    ),
    Panel(
        "Frames without a verdict",
        "Share of all frames that came. Missed are those that the caller is not to blame for: late, refused for want "
        "of time or room, or broken. A caller that left may have waited too long.",
        "percentunit",
        [
            Query(f"line:flawline_missed:ratio5m{{{_LINE}}}", "{{line}} missed"),
            Query(f"line:flawline_no_verdict:ratio5m{{{_LINE}}}", "{{line}} whoever is to blame"),
        ],
        warning=0.001,
        critical=0.01,
    ),
    Panel(
        "Total time, answered and late frames",
        "How many frames took how long; of those that were refused at once, see the share without a verdict.",
        "s",
        [
            Query(
                f'sum by (le) (increase(flawline_stage_duration_seconds_bucket{{{_LINE},stage="total"}}{_RATE}))',
                "{{le}}",
            )
        ],
        kind="heatmap",
        width=24,
    ),
    Panel(
        "Mean time by stage",
        "Where a frame's time goes: receive, decode, queue, infer, postprocess, encode.",
        "s",
        [
            Query(
                f'sum by (stage) (rate(flawline_stage_duration_seconds_sum{{{_LINE},stage!="total"}}{_RATE})) / '
                f'sum by (stage) (rate(flawline_stage_duration_seconds_count{{{_LINE},stage!="total"}}{_RATE}))',
                "{{stage}}",
            )
        ],
    ),
    Panel(
        "Time left to the deadline",
        "In the slowest twentieth of the frames that were answered, late, or refused for want of time or room; those "
        "that were not answered have none left. At zero frames are lost.",
        "s",
        [
            Query(
                "histogram_quantile(0.05, sum by (line, le) "
                f"(rate(flawline_deadline_slack_seconds_bucket{{{_LINE}}}{_RATE})))",
                "{{line}}",
            )
        ],
    ),
    Panel(
        "Frames in one run",
        "Mean size of the batches of each engine.",
        "none",
        [
            Query(
                f"sum by (engine) (rate(flawline_batch_size_sum{{{_FLEET}}}{_RATE})) / "
                f"sum by (engine) (rate(flawline_batch_size_count{{{_FLEET}}}{_RATE}))",
                "{{engine}}",
            )
        ],
    ),
    Panel(
        "Frames accepted and not answered",
        "Waiting or running, by engine.",
        "none",
        [Query(f"sum by (engine) (flawline_queue_depth{{{_FLEET}}})", "{{engine}}")],
    ),
    Panel(
        "Time left, answered and missed frames",
        "How many frames had how much time to spare; none where they were late, or refused for want of time or room.",
        "s",
        [Query(f"sum by (le) (increase(flawline_deadline_slack_seconds_bucket{{{_LINE}}}{_RATE}))", "{{le}}")],
        kind="heatmap",
    ),
    Panel(
        "Frames nobody waited for",
        "Dropped before their run, or their result after it: the caller had left, the deadline had passed, or another "
        "frame of the same request had no verdict (request_failed).",
        "reqps",
        [
            Query(
                f"sum by (engine, reason) (rate(flawline_discarded_total{{{_FLEET}}}{_RATE}))", "{{engine}} {{reason}}"
            )
        ],
    ),
)

_FLEET_PANELS = (
    Panel(
        "Ready",
        "How many pods answer frames, of those that are scraped, of those that Prometheus knows.",
        "none",
        [
            Query(f"sum(flawline_ready{{{_FLEET}}})", "ready"),
            Query(f"count(flawline_ready{{{_FLEET}}})", "scraped"),
            Query(f'count(up{{{_FLEET},job="flawline"}})', "known"),
        ],
        kind="stat",
        width=8,
    ),
    Panel(
        "Golden failures",
        "Bundles whose golden frames came out differently on a device, since the pods started.",
        "none",
        [Query(f"sum(flawline_golden_failures_total{{{_FLEET}}})", "failures")],
        kind="stat",
        width=8,
        critical=1,
    ),
    Panel(
        "Store unreachable",
        "Pods whose last look at the store for new versions failed, or that had none yet, and looks that failed in a "
        "day. What is loaded is served.",
        "none",
        [
            Query(f"sum(flawline_store_reachable{{{_FLEET}}} == bool 0)", "pods"),
            Query(f"sum(increase(flawline_store_unreachable_total{{{_FLEET}}}[1d]))", "misses in a day"),
        ],
        kind="stat",
        width=8,
        warning=1,
    ),
    Panel(
        "Refused versions",
        "Versions of bundles that a pod did not take into use, since it started. What was live goes on.",
        "none",
        [Query(f"sum(flawline_versions_refused_total{{{_FLEET}}})", "refused")],
        kind="stat",
        width=8,
        warning=1,
    ),
    Panel(
        "Pods whose keys file is refused",
        "The keys before it stay in force there, those included that were revoked.",
        "none",
        [Query(f"sum(flawline_keys_in_force{{{_FLEET}}} == bool 0)", "refused", "everybody may call")],
        kind="stat",
        width=8,
        critical=1,
    ),
    Panel(
        "Age of the oldest key",
        "By pod; half a year is too old.",
        "s",
        [
            Query(
                f"max(time() - flawline_keys_oldest_timestamp_seconds{{{_FLEET}}})",
                "oldest",
                "everybody may call",
            )
        ],
        kind="stat",
        width=8,
        warning=180 * 86400,
    ),
    Panel(
        "Live versions that are gone from the store",
        "They judge on, in these pods; pods that start now do not have them.",
        "none",
        [Query(f"sum(flawline_live_version_in_store{{{_FLEET}}} == bool 0)", "gone")],
        kind="stat",
        width=8,
        critical=1,
    ),
    Panel(
        "Refused policies",
        "Policy files that a pod does not take as they lie in the store, since it started. What was offered goes on.",
        "none",
        [Query(f"sum(flawline_policies_refused_total{{{_FLEET}}})", "refused")],
        kind="stat",
        width=8,
        warning=1,
    ),
    Panel(
        "Certificate ends in",
        "Of the pod whose certificate ends first; two weeks are too few.",
        "s",
        [
            Query(
                f"min(flawline_certificate_expiry_timestamp_seconds{{{_FLEET}}} - time())",
                "ends in",
                "the service speaks plain HTTP",
            )
        ],
        kind="stat",
        width=8,
    ),
    Panel(
        "Connections cut off or turned away",
        "In five minutes, by reason: no_room and turned_away want more room (FLAWLINE_MAX_CONNECTIONS), or fewer "
        "connections that nobody uses; slow_head and unread_answer are a network that loses, or a caller that is slow.",
        "none",
        [
            Query(
                f"sum by (reason) (increase(flawline_connections_cut_total{{{_FLEET}}}[5m]))",
                "{{reason}}",
            )
        ],
        warning=10,
    ),
    Panel(
        "Open files and connections",
        "Of as many as a pod may have, by pod. At 100 % nobody gets in any more.",
        "percentunit",
        [Query(f"process_open_fds{{{_FLEET}}} / process_max_fds{{{_FLEET}}}", "{{instance}}")],
        warning=0.8,
    ),
    Panel(
        "Decoders replaced",
        "Threads that a frame kept without end, so that they were given up, within an hour, by pod. Each goes on "
        "taking what time the others leave; at 16 at a time the pod starts anew.",
        "none",
        [Query(f"increase(flawline_decoders_replaced_total{{{_FLEET}}}[1h])", "{{instance}}")],
        warning=1,
    ),
    Panel(
        "Records dropped",
        "What made room for newer ones, or found nobody who took it: heatmaps and disagreements that are kept, traces, "
        "lines of the log. Verdicts are not touched.",
        "ops",
        [Query(f"sum by (sink) (rate(flawline_records_dropped_total{{{_FLEET}}}{_RATE}))", "{{sink}}")],
    ),
    Panel(
        "Memory",
        "Resident, by pod.",
        "bytes",
        [Query(f"process_resident_memory_bytes{{{_FLEET}}}", "{{instance}}")],
    ),
    Panel(
        "CPU",
        "Cores in use, by pod.",
        "none",
        [Query(f"rate(process_cpu_seconds_total{{{_FLEET}}}{_RATE})", "{{instance}}")],
    ),
    Panel(
        "Golden replays",
        "Golden frames that were replayed while lines were served, by how that ended; one that was skipped met a busy "
        "engine, one that ended early was itself at fault. None at all: FLAWLINE_GOLDEN_EVERY_S is 0.",
        "none",
        [
            Query(
                f"sum by (outcome) (increase(flawline_golden_checks_total{{{_FLEET}}}[1h]))",
                "{{outcome}}",
            )
        ],
    ),
    Panel(
        "Loading an engine",
        "From reading the bundle to its golden frames passed.",
        "s",
        [Query(f"max by (engine) (flawline_engine_load_seconds{{{_FLEET}}})", "{{engine}}")],
    ),
    Panel(
        "Memory of engines",
        "What the engines of a pod take, as their budget counts it, and that budget; 0 is no limit.",
        "bytes",
        [
            Query(f"sum by (instance) (flawline_engine_memory_bytes{{{_FLEET}}})", "{{instance}}"),
            Query(f"flawline_engine_memory_budget_bytes{{{_FLEET}}}", "{{instance}} budget"),
        ],
    ),
    Panel(
        "Engines that made room for others",
        "Unloaded within an hour, by engine. Each comes back with its line's next frame, which is refused.",
        "none",
        [Query(f"sum by (engine) (increase(flawline_engine_unloads_total{{{_FLEET}}}[1h]))", "{{engine}}")],
    ),
    Panel(
        "What serves each line",
        "Version, digest, policy and device of every line.",
        "none",
        [Query(f"sum by (line, version, digest, policy, device) (flawline_model_info{{{_FLEET}}})", "{{line}}")],
        kind="table",
        width=24,
    ),
    Panel(
        "Engines in memory",
        "Version, device, runtime and precision of every engine, and in how many pods it is loaded.",
        "none",
        [
            Query(
                f"sum by (engine, version, device, provider, precision) (flawline_engine_info{{{_FLEET}}})",
                "{{engine}}",
            )
        ],
        kind="table",
        width=24,
    ),
    Panel(
        "GPU busy",
        "As the DCGM exporter tells it.",
        "percent",
        [Query(f"DCGM_FI_DEV_GPU_UTIL{{{_ON_GPU}}}", "{{gpu}} {{exported_pod}}", "there is no GPU")],
    ),
    Panel(
        "GPU memory",
        "In use, as the DCGM exporter tells it.",
        "decmbytes",
        [Query(f"DCGM_FI_DEV_FB_USED{{{_ON_GPU}}}", "{{gpu}} {{exported_pod}}", "there is no GPU")],
    ),
)

_DETAIL_PANELS = (
    Panel(
        "Scores",
        "How many frames had which score, in units of the fail threshold: 1 is at it.",
        "none",
        [Query(f"sum by (le) (increase(flawline_score_bucket{{{_LINE}}}{_RATE}))", "{{le}}")],
        kind="heatmap",
        width=24,
    ),
    Panel(
        "Median and 99th percentile of scores",
        "In units of the fail threshold.",
        "none",
        _quantiles("flawline_score", _LINE, "line"),
        critical=1,
    ),
    Panel(
        "Verdicts by version",
        "What each version of the bundle said.",
        "reqps",
        [
            Query(
                f"sum by (version, verdict) (rate(flawline_inspections_total{{{_LINE}}}{_RATE}))",
                "{{version}} {{verdict}}",
            )
        ],
    ),
    Panel(
        "Picture",
        "Brightness, share near white, focus and noise.",
        "none",
        [Query(f"flawline_image_quality{{{_LINE}}}", "{{stat}}")],
    ),
    Panel(
        "Time by stage, slowest in a hundred",
        "Each stage by itself.",
        "s",
        [
            Query(
                "histogram_quantile(0.99, sum by (stage, le) "
                f"(rate(flawline_stage_duration_seconds_bucket{{{_LINE}}}{_RATE})))",
                "{{stage}}",
            )
        ],
    ),
    _WHY_NO_VERDICT,
)

DASHBOARD_PANELS = {
    "lines": ("Flawline: lines", _LINES_PANELS),
    "latency": ("Flawline: latency", _LATENCY_PANELS),
    "fleet": ("Flawline: fleet", _FLEET_PANELS),
    "line-detail": ("Flawline: line detail", _DETAIL_PANELS),
}


def build_dashboard(name: str) -> str:
    """Return one dashboard as the JSON that Grafana reads."""
    title, panels = DASHBOARD_PANELS[name]
    # Every line of the store has this metric from the first, also one that was refused and has never had a verdict; so
    # has `unknown`, for the frames of lines that nobody knows.
    lines = 'label_values(flawline_no_verdict_total{namespace=~"$namespace"}, line)'
    built = (
        dashboard.Dashboard(title)
        .uid(f"flawline-{name}")
        .tags(["flawline"])
        .time("now-1h", "now")
        .refresh("10s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(
            dashboard.DashboardLink("Flawline")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["flawline"])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_variable("namespace", "label_values(flawline_ready, namespace)"))
    )
    if any("$line" in query.expression for panel in panels for query in panel.queries):
        built.with_variable(_variable("line", lines, many=name != "line-detail"))
    for number, panel in enumerate(panels, start=1):
        built.with_panel(_draw(panel).id(number))
    told = json.loads(json.dumps(built.build(), cls=JSONEncoder))
    return json.dumps(_without_surplus(told), indent=2, sort_keys=True) + "\n"


def _without_surplus(told: dict[str, Any]) -> dict[str, Any]:
    """Return a dashboard without what the builders write and Grafana's own types do not know."""
    del told["style"]
    for panel in told["panels"]:
        panel["options"] = panel["options"] or {}
    for variable in told["templating"]["list"]:
        for name in ("auto", "auto_count", "auto_min", "id"):
            del variable[name]
    return told


def build_rule_resource() -> str:
    """Return the rules as the resource that the Prometheus operator reads."""
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "flawline", "namespace": "flawline"},
        "spec": yaml.safe_load(RULES.read_text("utf-8")),
    }
    origin = "# Made by k8s/monitoring/build.py from k8s/monitoring/rules.yaml.\n"
    return origin + yaml.safe_dump(resource, sort_keys=False)


def outputs() -> dict[Path, str]:
    """Return every file that is made here, with its contents."""
    files = {DASHBOARDS / f"flawline-{name}.json": build_dashboard(name) for name in DASHBOARD_PANELS}
    return {**files, RULE_RESOURCE: build_rule_resource()}


def _variable(name: str, query: str, *, many: bool = True) -> dashboard.QueryVariable:
    variable = (
        dashboard.QueryVariable(name)
        .query(query)
        .datasource(_SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(many)
        .include_all(many)
    )
    # Otherwise "All" is a list of what there was when the dashboard was opened.
    return variable.all_value(".+") if many else variable


def _draw(panel: Panel) -> Any:
    drawn: Any = {
        "timeseries": timeseries.Panel,
        "stat": stat.Panel,
        "heatmap": heatmap.Panel,
        "table": table.Panel,
    }[panel.kind]()
    drawn.title(panel.title).description(panel.meaning).datasource(_SOURCE).unit(panel.unit).span(panel.width).height(8)
    for query, letter in zip(panel.queries, "ABCDEF", strict=False):
        target = prometheus.Dataquery().expr(query.expression).legend_format(query.legend).ref_id(letter)
        if query.has_exemplars:
            target.exemplar(True)
        if panel.kind == "heatmap":
            target.format(PromQueryFormat.HEATMAP)
        if panel.kind == "table":
            target.format(PromQueryFormat.TABLE).instant()
        drawn.with_target(target)
    if panel.kind == "timeseries":
        legend = VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.LIST)
        drawn.legend(legend.placement(LegendPlacement.BOTTOM)).fill_opacity(8).line_width(2)
        for verdict, colour in _VERDICT_COLOURS.items():
            if any("{{verdict}}" in query.legend for query in panel.queries):
                fixed = {"mode": "fixed", "fixedColor": colour}
                drawn.override_by_regexp(f"/(^| ){verdict}$/", [DynamicConfigValue(id_val="color", value=fixed)])
    if panel.warning is not None or panel.critical is not None:
        steps = [Threshold(value=None, color="green")]
        steps += [
            Threshold(value=value, color=colour)
            for value, colour in ((panel.warning, "yellow"), (panel.critical, "red"))
            if value is not None
        ]
        drawn.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    return drawn


if __name__ == "__main__":
    for path, text in outputs().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
