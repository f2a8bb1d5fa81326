"""What watches the service, against the real programs: every query of every dashboard and rule finds its metric.

A Prometheus scrapes a real server under the load of simulated cameras. A metric that is renamed in the code, a label
that is gone, or a query that is no PromQL fails here.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from service.errors import CallerError, known_codes
from service.observability.telemetry import OTHER_REASON, Telemetry
from tests.factories import encode, make_bundle, make_frame
from tests.programs import prometheus as run_prometheus
from tests.servers import ServerProcess, wait_until

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
MONITORING = K8S / "monitoring"
LINES = ("cap", "screw")
VARIABLES = {"$namespace": ".*", "$line": ".*", "$__rate_interval": "5s"}
# There is no GPU, and everybody may call, by plain HTTP.
NOT_IN_THE_TRIAL = ("DCGM", "flawline_keys_", "flawline_certificate_")
# Drift says nothing before fifty frames of a line.
FRAMES = 60


def _script(name):
    specification = importlib.util.spec_from_file_location(f"monitoring_{name}", MONITORING / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


BUILD, PICTURE = _script("build"), _script("picture")
PANEL_QUERIES = [
    pytest.param(query, id=f"{name}: {panel.title} {number}")
    for name, (_, panels) in BUILD.DASHBOARD_PANELS.items()
    for panel in panels
    for number, query in enumerate(panel.queries)
]
RULES = [rule for group in yaml.safe_load(BUILD.RULES.read_text("utf-8"))["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
RULE_TESTS = ("rules_test.yaml", "rules_of_days_test.yaml")
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """A Prometheus with our rules that has scraped a server of two lines, one frame of which had no verdict."""
    folder = tmp_path_factory.mktemp("prometheus")
    for line in LINES:
        make_bundle(folder / "store", line)
    (folder / "keys.json").write_text(json.dumps({"keys": []}))
    with ServerProcess(folder / "store") as server:
        server.ready()
        scraping = _scraping(folder, server.url)
        with run_prometheus(folder, scraping, "--enable-feature=exemplar-storage") as api:
            _load(server)
            yield api


def _load(server):
    frames = [encode(make_frame(seed=seed, defect=seed % 4 == 0)) for seed in range(4)]
    for number in range(FRAMES):
        for line in LINES:
            wanted = {"Content-Type": "image/png", "X-Heatmap": "overlay"}
            answer = server.http.post(f"/v1/lines/{line}/inspect", content=frames[number % 4], headers=wanted)
            assert answer.status_code == 200
        for line in LINES:
            server.http.post(f"/v1/lines/{line}/inspect", content=b"x", headers={"Content-Type": "image/png"})


def _scraping(folder, url):
    rules = re.sub(r"interval: \d+[sm]", "interval: 1s", BUILD.RULES.read_text("utf-8"))
    (folder / "rules.yaml").write_text(rules)
    targets = {"targets": [url.removeprefix("http://")], "labels": {"namespace": "flawline"}}
    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(folder / "rules.yaml")],
        "scrape_configs": [{"job_name": "flawline", "static_configs": [targets]}],
    }


def _filled(expression):
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def _ask(api, expression):
    expression = _filled(expression)
    answer = api.get("/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
    return answer["data"]["result"]


@needs_prometheus
@pytest.mark.parametrize("query", PANEL_QUERIES)
def test_panel_when_cameras_run_then_its_query_returns_data(prometheus, query):
    """What somebody looks at is there, or the panel says why it is empty on an ordinary day."""
    if query.may_be_empty is not None and any(name in query.expression for name in NOT_IN_THE_TRIAL):
        assert _ask(prometheus, query.expression) == []
        return

    wait_until(lambda: bool(_ask(prometheus, query.expression)), f"data for {query.expression}")


@needs_prometheus
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule["alert"])
def test_rule_when_cameras_run_then_every_metric_in_it_exists(prometheus, rule):
    """An alert on a metric that nobody emits would never fire, and nobody would know."""
    names = set(re.findall(r"\b(?:[a-z_]+:)?flawline_\w+(?::\w+)?", rule["expr"])) - {
        "flawline_keys_oldest_timestamp_seconds",
        "flawline_keys_in_force",
        "flawline_certificate_expiry_timestamp_seconds",
    }

    for name in names:
        wait_until(lambda name=name: bool(_ask(prometheus, name)), f"the metric {name}")
    _ask(prometheus, rule["expr"])


@needs_prometheus
def test_point_beside_a_panel_when_followed_then_leads_to_the_heatmap_of_that_inspection(prometheus):
    """Grafana asks for exemplars, and makes each one a link as the trial's data source says."""
    [source] = yaml.safe_load((ROOT / "docker/compose/grafana-datasource.yaml").read_text())["datasources"]
    [link] = source["jsonData"]["exemplarTraceIdDestinations"]
    [panel] = [panel for panel in BUILD.DASHBOARD_PANELS["lines"][1] if "Scores" in panel.title]
    [query] = [_filled(query.expression) for query in panel.queries if query.has_exemplars]

    def exemplars():
        span = {"start": time.time() - 300, "end": time.time() + 1}
        told = prometheus.get("/api/v1/query_exemplars", params={"query": query, **span}).json()
        return [(series["seriesLabels"], point) for series in told["data"] for point in series["exemplars"]]

    wait_until(lambda: bool(exemplars()), "an exemplar")
    labels, point = exemplars()[0]
    place = link["url"].replace("$${__value.raw}", point["labels"][link["name"]])
    picture = httpx.get(f"http://{labels['instance']}{place.removeprefix('http://localhost:8000')}")

    assert picture.status_code == 200
    assert picture.headers["content-type"] == "image/png"


@needs_prometheus
@pytest.mark.parametrize("name", BUILD.DASHBOARD_PANELS)
def test_dashboard_when_drawn_without_grafana_then_every_panel_has_its_place(prometheus, name):
    """Whoever has no Grafana at hand still sees what it would show, from the committed file."""
    dashboard = json.loads((BUILD.DASHBOARDS / f"flawline-{name}.json").read_text("utf-8"))

    figure = PICTURE.draw(dashboard, PICTURE.Prometheus(str(prometheus.base_url), 1, VARIABLES))

    drawn = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {panel["title"] for panel in dashboard["panels"]} <= drawn


def test_stat_when_its_value_reaches_a_threshold_then_is_drawn_in_its_colour():
    """What is red in Grafana is not green in a picture of it."""
    steps = [{"color": "green", "value": None}, {"color": "yellow", "value": 1}, {"color": "red", "value": 3}]
    panel = {
        "type": "stat",
        "title": "gone",
        "gridPos": {"x": 0, "y": 0, "w": 24, "h": 8},
        "targets": [{"expr": str(value), "legendFormat": "gone"} for value in (0, 1, 2, 3)],
        "fieldConfig": {"defaults": {"thresholds": {"steps": steps}}},
    }

    class Prometheus:
        def now(self, expression):
            return [{"metric": {}, "value": (0, expression)}]

    figure = PICTURE.draw({"title": "fleet", "panels": [panel]}, Prometheus())

    drawn = {text.get_text(): text.get_color() for axes in figure.axes for text in axes.texts}
    assert [drawn[value] for value in "0123"] == ["#73bf69", "#f2cc0c", "#f2cc0c", "#f2495c"]


@needs_prometheus
def test_alerts_when_the_service_is_well_then_none_fires(prometheus):
    """Frames that nobody could read raise the share without verdict; nothing else is wrong here."""
    expected = {"FlawlineNoVerdict", "FlawlineScoreDrift", "FlawlineReviewSurge"}

    def fired():
        alerts = prometheus.get("/api/v1/alerts").json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts}

    # Rules that are looked at before the first scrape find no service; what is wrong for longer stays.
    wait_until(lambda: fired() <= expected, "the alerts to be those of a service that is well")


@needs_promtool
def test_rules_when_checked_by_promtool_then_hold_and_fire_as_written():
    """The syntax is right, and every alert has a case in which it fires and one in which it does not."""
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", *RULE_TESTS]):
        told = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stdout + told.stderr


@needs_promtool
def test_scaling_when_no_frame_comes_then_no_query_says_what_is_no_number(tmp_path):
    """KEDA of before 2026 makes a large negative number of NaN; while frames come, queries say what they should."""
    triggers = yaml.safe_load((K8S / "overlays/keda/scaling.yaml").read_text("utf-8"))["spec"]["triggers"]
    labels = 'namespace="flawline",line="cap"'
    series = {
        f'flawline_stage_duration_seconds_bucket{{{labels},stage="queue",le="0.1"}}': "0+90x10 900x20",
        f'flawline_stage_duration_seconds_bucket{{{labels},stage="queue",le="+Inf"}}': "0+90x10 900x20",
        f'flawline_no_verdict_total{{{labels},reason="overloaded"}}': "0+90x10 900x20",
        'flawline_ready{namespace="flawline",instance="one"}': "1x30",
        'flawline_ready{namespace="flawline",instance="two"}': "1x30",
        'flawline_ready{namespace="flawline",instance="new"}': "0x30",
    }
    queries = [trigger["metadata"]["query"] for trigger in triggers]
    cases = [(query, "1m", [{"value": value}]) for query, value in zip(queries, (2 * 95, 2 * 360), strict=True)]
    cases += [(query, "5m", samples) for query, samples in zip(queries, ([], [{"value": 0}]), strict=True)]
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f"round({query})",
                "eval_time": at,
                "exp_samples": [{"labels": "{}", **sample} for sample in samples],
            }
            for query, at, samples in cases
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": [], "tests": [test]}))

    told = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "test.yaml"], capture_output=True, text=True, check=False
    )

    assert told.returncode == 0, told.stdout + told.stderr


def test_rules_when_tested_then_no_alert_is_forgotten():
    """Each alert is made to fire once, and has a section of the runbook."""
    tests = [test for file in RULE_TESTS for test in yaml.safe_load((MONITORING / file).read_text("utf-8"))["tests"]]
    fires = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    runbook = (K8S / "README.md").read_text("utf-8")

    assert {rule["alert"] for rule in ALERTS} == fires
    for rule in ALERTS:
        place = rule["annotations"]["runbook"]
        assert place == f"k8s/README.md#{rule['alert'].lower()}"
        assert f"### {rule['alert']}\n" in runbook


@pytest.mark.parametrize("file", [BUILD.RULES, K8S / "overlays/keda/scaling.yaml"], ids=lambda file: file.name)
def test_reasons_when_a_rule_names_them_then_every_line_has_them_before_they_first_happen(file):
    """A counter that is born with three hundred lost frames shows no rise: the alert would not see the first outage."""
    named = re.findall(r'flawline_no_verdict_total{[^}]*reason=~"([^"]+)"', file.read_text("utf-8"))
    telemetry = Telemetry()
    telemetry.declare_line("cap")
    told = telemetry.exposition()[0].decode()

    assert named
    for reason in set("|".join(named).split("|")):
        assert f'flawline_no_verdict_total{{line="cap",reason="{reason}"}} 0.0' in told


def test_promise_when_a_frame_has_no_verdict_then_every_code_counts_but_the_callers():
    """A code that nobody thought of when it was added would make a line look well whose every frame is refused."""
    [counted] = [rule["expr"] for rule in RULES if rule.get("record") == "line:flawline_missed:rate5m"]
    [named] = re.findall(r'reason=~"([^"]+)"', counted)
    [promised] = [
        rule["expr"]
        for rule in RULES
        if rule.get("record") == "slo:flawline_errors:rate5m" and rule["labels"]["slo"] == "verdicts"
    ]

    assert set(named.split("|")) == known_codes() - known_codes(CallerError) | {OTHER_REASON}
    assert promised == "line:flawline_missed:rate5m"


@pytest.mark.parametrize("path", BUILD.outputs(), ids=lambda path: path.name)
def test_file_when_built_again_then_is_the_one_that_is_committed(path):
    """Nobody edits a dashboard by hand, and nobody forgets to build it."""
    assert path.read_text("utf-8") == BUILD.outputs()[path]
