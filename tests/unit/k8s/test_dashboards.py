"""The dashboards' JSON, held against Grafana's own types and against what Grafana would do with it.

Grafana itself is in no registry that was at hand. Its types are, of the very version that `docker/compose.yaml` starts:
the TypeScript compiler refuses a field that they do not know, and a value that they do not allow.
"""

import json
import os
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from service.observability.telemetry import Telemetry

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "k8s/monitoring/dashboards").glob("*.json"))
DASHBOARDS = {path.stem: json.loads(path.read_text("utf-8")) for path in FILES}
# A folder of npm that holds @grafana/schema and typescript.
TYPES = Path(os.environ.get("FLAWLINE_GRAFANA_TYPES", "nowhere"))
COLUMNS = 24
KINDS = {"timeseries": "TimeSeries", "stat": "Stat", "heatmap": "Heatmap", "table": "Table"}

every_dashboard = pytest.mark.parametrize("name", DASHBOARDS)


@every_dashboard
def test_dashboard_when_opened_then_its_panels_lie_beside_each_other_and_inside(name):
    """No panel covers another one or leaves the grid, and each has a number of its own that links can name."""
    panels = DASHBOARDS[name]["panels"]
    places = [panel["gridPos"] for panel in panels]

    assert sorted(panel["id"] for panel in panels) == list(range(1, len(panels) + 1))
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= COLUMNS for place in places)
    for one, other in combinations(places, 2):
        assert (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )


@every_dashboard
def test_dashboard_when_a_query_uses_a_variable_then_there_is_one_that_is_chosen_above(name):
    """A variable that nobody declared would be asked for literally; one that nobody uses would change nothing."""
    dashboard = DASHBOARDS[name]
    declared = [variable["name"] for variable in dashboard["templating"]["list"]]
    known = {*declared, "__rate_interval"}
    text = json.dumps([dashboard["panels"], [variable.get("query") for variable in dashboard["templating"]["list"]]])

    used = set(re.findall(r"\$\{?(\w+)", text))
    assert used <= known
    assert set(declared) - {"datasource"} <= used
    assert all(target["datasource"]["uid"] == "${datasource}" for target in _with_sources(dashboard))
    for number, variable in enumerate(dashboard["templating"]["list"]):
        # They are filled in this order.
        assert not set(re.findall(r"\$(\w+)", str(variable.get("query")))) & set(declared[number:])


@every_dashboard
def test_dashboard_when_a_line_was_never_judged_then_it_can_be_chosen_all_the_same(name):
    """A line that was refused, and `unknown`, are what somebody without verdicts looks for; "All" has no gaps."""
    telemetry = Telemetry()
    telemetry.declare_line("refused")
    told = telemetry.exposition()[0].decode()

    for variable in DASHBOARDS[name]["templating"]["list"]:
        assert not variable.get("includeAll") or variable["allValue"] == ".+"
        if variable["name"] == "line":
            [metric] = re.findall(r"label_values\((\w+)", variable["query"])
            assert {"refused", "unknown"} <= set(re.findall(rf'^{metric}{{.*?line="(\w+)"', told, re.MULTILINE))


def test_dashboards_when_taken_together_then_show_every_metric_but_those_that_the_runbook_names():
    """What nobody can look at was counted for nothing, and a metric that is new is not forgotten here."""
    told = {family.name for family in _everything_that_is_told()}
    runbook = (ROOT / "k8s/README.md").read_text("utf-8")
    [left_out] = re.findall(r"Every metric that a pod exports is on a dashboard, but .*?\n\n", runbook, re.DOTALL)
    left_out = set(re.findall(r"`(\w+)`", left_out))

    asked = _with_what_rules_ask(" ".join(json.dumps(dashboard["panels"]) for dashboard in DASHBOARDS.values()))
    drawn = {name for name in told if re.search(rf"\b{name}(_total|_bucket|_sum|_count)?\b", asked)}

    assert len(told) > 30
    assert (told - drawn, left_out - told) == (left_out, set())


def _everything_that_is_told():
    """Return the families of a service that asks for keys, over TLS."""
    telemetry = Telemetry()
    watched = {name for name in dir(Telemetry) if name.startswith("watch_")}
    assert watched == {"watch_readiness", "watch_keys", "watch_certificate", "watch_live_versions"}
    telemetry.watch_keys(lambda: 0.0, lambda: True)
    telemetry.watch_certificate(lambda: 0.0)
    telemetry.watch_live_versions(dict)
    return telemetry.snapshot().collect()


def _with_what_rules_ask(queries):
    """Return queries with those of the recording rules that they ask, and that these ask."""
    groups = yaml.safe_load((ROOT / "k8s/monitoring/rules.yaml").read_text("utf-8"))["groups"]
    recorded = {rule["record"]: rule["expr"] for group in groups for rule in group["rules"] if "record" in rule}
    while asked := [name for name in recorded if name in queries]:
        queries += " ".join(recorded.pop(name) for name in asked)
    return queries


def _with_sources(dashboard):
    return [one for one in (*dashboard["panels"], *dashboard["templating"]["list"]) if "datasource" in one]


def test_dashboards_when_linked_then_each_has_a_name_of_its_own_and_the_tag_that_links_follow():
    """The menu of dashboards goes by a tag."""
    assert len({dashboard["uid"] for dashboard in DASHBOARDS.values()}) == len(DASHBOARDS) == len(FILES)
    for dashboard in DASHBOARDS.values():
        for link in dashboard["links"]:
            assert set(link["tags"]) <= set(dashboard["tags"])


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.skipif(not TYPES.is_dir(), reason="Grafana's types are not installed")
def test_dashboards_when_held_against_grafanas_types_then_every_field_and_value_is_one_that_it_knows(tmp_path):
    """Of the version that is started; a misspelt field beside them is refused, so the compiler does look."""
    [version] = re.findall(r"grafana/grafana:(\S+)", (ROOT / "docker/compose.yaml").read_text())
    package = TYPES / "node_modules/@grafana/schema"
    assert json.loads((package / "package.json").read_text())["version"] == version

    wrong = json.loads(json.dumps(DASHBOARDS["flawline-lines"]))
    wrong["panels"][0]["titel"] = wrong["panels"][0].pop("title")
    for name, dashboards in (("right", list(DASHBOARDS.values())), ("wrong", [wrong])):
        (tmp_path / f"{name}.ts").write_text(_as_typescript(dashboards, package / "dist/types/raw"))
    options = ["--noEmit", "--strict", "--skipLibCheck", "--moduleResolution", "node10", "--module", "commonjs"]
    told = subprocess.run(
        ["node", TYPES / "node_modules/typescript/bin/tsc", *options, "--pretty", "false", "right.ts", "wrong.ts"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    faults = told.stdout.splitlines()
    assert [fault for fault in faults if fault.startswith("right.ts")] == []
    assert any(fault.startswith("wrong.ts") and "titel" in fault for fault in faults)


def _as_typescript(dashboards, types):
    """Return the dashboards as constants of Grafana's types; their enumerations become the strings that JSON has."""
    lines = [f"import type {{ Dashboard }} from '{types}/dashboard/x/dashboard_types.gen';"]
    lines += [
        f"import type * as {kind} from '{types}/composable/{kind}/panelcfg/x/{name}PanelCfg_types.gen';"
        for kind, name in KINDS.items()
    ]
    lines.append(
        "type Json<T> = T extends string ? `${T}` : T extends (infer U)[] ? Json<U>[] "
        ": T extends object ? { [K in keyof T]: Json<T[K]> } : T;"
    )
    for number, dashboard in enumerate(dashboards):
        lines.append(f"export const dashboard{number}: Json<Dashboard> = {json.dumps(dashboard)};")
        # What a kind of panel has for itself is anything to the dashboard, so it is held against the kind's own types.
        for place, panel in enumerate(dashboard["panels"]):
            own = {"Options": panel["options"], "FieldConfig": panel["fieldConfig"]["defaults"].get("custom")}
            lines += [
                f"export const own{number}_{place}_{part}: Json<Partial<{panel['type']}.{part}>> = {json.dumps(value)};"
                for part, value in own.items()
                if value is not None
            ]
    return "\n".join(lines)
