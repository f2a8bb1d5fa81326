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
from pathlib import Path

import pytest
import yaml

from tests.factories import encode, make_bundle, make_frame
from tests.programs import prometheus as run_prometheus
from tests.servers import ServerProcess, wait_until

K8S = Path(__file__).resolve().parents[2] / "k8s"
MONITORING = K8S / "monitoring"
LINES = ("cap", "screw")
VARIABLES = {"$namespace": ".*", "$line": ".*", "$__rate_interval": "5s"}
# Drift says nothing before fifty frames of a line.
FRAMES = 60


def _build():
    specification = importlib.util.spec_from_file_location("monitoring_build", MONITORING / "build.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["monitoring_build"] = module
    specification.loader.exec_module(module)
    return module


BUILD = _build()
PANEL_QUERIES = [
    pytest.param(query, id=f"{name}: {panel.title} {number}")
    for name, (_, panels) in BUILD.DASHBOARD_PANELS.items()
    for panel in panels
    for number, query in enumerate(panel.queries)
]
RULES = [rule for group in yaml.safe_load(BUILD.RULES.read_text("utf-8"))["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
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
        with run_prometheus(folder, _scraping(folder, server.url)) as api:
            _load(server)
            yield api


def _load(server):
    frames = [encode(make_frame(seed=seed, defect=seed % 4 == 0)) for seed in range(4)]
    for number in range(FRAMES):
        for line in LINES:
            answer = server.http.post(
                f"/v1/lines/{line}/inspect", content=frames[number % 4], headers={"Content-Type": "image/png"}
            )
            assert answer.status_code == 200
        for line in LINES:
            server.http.post(f"/v1/lines/{line}/inspect", content=b"x", headers={"Content-Type": "image/png"})


def _scraping(folder, url):
    rules = re.sub(r"interval: 30s", "interval: 1s", BUILD.RULES.read_text("utf-8"))
    (folder / "rules.yaml").write_text(rules)
    targets = {"targets": [url.removeprefix("http://")], "labels": {"namespace": "flawline"}}
    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(folder / "rules.yaml")],
        "scrape_configs": [{"job_name": "flawline", "static_configs": [targets]}],
    }


def _ask(api, expression):
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    answer = api.get("/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
    return answer["data"]["result"]


@needs_prometheus
@pytest.mark.parametrize("query", PANEL_QUERIES)
def test_panel_when_cameras_run_then_its_query_returns_data(prometheus, query):
    """What somebody looks at is there, or the panel says why it is empty on an ordinary day."""
    if query.may_be_empty is not None and "DCGM" in query.expression:
        assert _ask(prometheus, query.expression) == []
        return

    wait_until(lambda: bool(_ask(prometheus, query.expression)), f"data for {query.expression}")


@needs_prometheus
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule["alert"])
def test_rule_when_cameras_run_then_every_metric_in_it_exists(prometheus, rule):
    """An alert on a metric that nobody emits would never fire, and nobody would know."""
    names = set(re.findall(r"\b(?:[a-z_]+:)?flawline_\w+(?::\w+)?", rule["expr"])) - {
        "flawline_keys_modified_timestamp_seconds"
    }

    for name in names:
        wait_until(lambda name=name: bool(_ask(prometheus, name)), f"the metric {name}")
    _ask(prometheus, rule["expr"])


@needs_prometheus
def test_alerts_when_the_service_is_well_then_none_fires(prometheus):
    """Frames that nobody could read raise the share without verdict; nothing else is wrong here."""
    fired = {alert["labels"]["alertname"] for alert in prometheus.get("/api/v1/alerts").json()["data"]["alerts"]}

    assert fired <= {"FlawlineNoVerdict", "FlawlineScoreDrift", "FlawlineReviewSurge"}


@needs_promtool
def test_rules_when_checked_by_promtool_then_hold_and_fire_as_written():
    """The syntax is right, and every alert has a case in which it fires and one in which it does not."""
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]):
        told = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stdout + told.stderr


def test_rules_when_tested_then_no_alert_is_forgotten():
    """Each alert is made to fire once, and has a section of the runbook."""
    tests = yaml.safe_load((MONITORING / "rules_test.yaml").read_text("utf-8"))["tests"]
    fires = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    runbook = (K8S / "README.md").read_text("utf-8")

    assert {rule["alert"] for rule in ALERTS} == fires
    for rule in ALERTS:
        place = rule["annotations"]["runbook"]
        assert place == f"k8s/README.md#{rule['alert'].lower()}"
        assert f"### {rule['alert']}\n" in runbook


@pytest.mark.parametrize("path", BUILD.outputs(), ids=lambda path: path.name)
def test_file_when_built_again_then_is_the_one_that_is_committed(path):
    """Nobody edits a dashboard by hand, and nobody forgets to build it."""
    assert path.read_text("utf-8") == BUILD.outputs()[path]
