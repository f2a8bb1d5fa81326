"""The trial of docker/compose.yaml, as far as it can be checked without Docker.

It is what the specification allows, whatever it mounts exists, its images are pinned, and its containers may do no more
than they need. What of it exists as a program here is run in `tests/e2e/test_compose.py`.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from compose_spec import PyCompose

from service.commands.client import commands

ROOT = Path(__file__).resolve().parents[3]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
SERVICES = COMPOSE["services"]
OURS = ("first-line", "service", "camera")
GRAFANA = DOCKER / "compose"


def mounts(name):
    """Yield what a service mounts, as (source, target, is read-only)."""
    for mount in SERVICES[name]["volumes"]:
        source, target, *options = mount.split(":")
        yield source, target, options == ["ro"]


def test_composition_when_read_then_is_what_the_specification_allows():
    """A parser of the Compose Specification takes it, and it refuses whatever it does not know."""
    read = PyCompose.from_json(json.dumps(COMPOSE))

    assert set(read.service_names()) == {*OURS, "prometheus", "alertmanager", "grafana"}
    with pytest.raises(ValueError, match="mem_limits"):
        PyCompose.from_json(json.dumps(COMPOSE).replace("mem_limit", "mem_limits"))


@pytest.mark.parametrize("name", SERVICES)
def test_service_when_started_then_its_image_is_pinned_and_its_share_bounded(name):
    """No `latest`, a memory limit, no capabilities, no way to more rights."""
    service = SERVICES[name]

    assert re.fullmatch(r"[a-z0-9./-]+:v?[0-9][\w.-]*", service["image"])
    assert "mem_limit" in service
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert name not in OURS or service["read_only"] is True


@pytest.mark.parametrize("name", SERVICES)
def test_service_when_started_then_whatever_it_mounts_exists(name):
    """A file that is not there would become a folder of root's, and an error that nobody understands."""
    for source, _, is_read_only in mounts(name):
        if source.startswith("."):
            assert (DOCKER / source).exists(), source
            assert is_read_only, source
        else:
            assert source in COMPOSE["volumes"]


def test_ports_when_published_then_only_this_machine_reaches_them():
    """Nobody logs in anywhere in this trial, so nobody else may come."""
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]

    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_images_of_ours_when_built_then_come_from_dockerfiles_that_exist():
    """What is built here, and the camera takes the service's image."""
    built = {name: SERVICES[name]["build"] for name in OURS if "build" in SERVICES[name]}

    assert {name: build["dockerfile"] for name, build in built.items()} == {
        "first-line": "docker/training.Dockerfile",
        "service": "docker/Dockerfile",
    }
    for build in built.values():
        assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
    assert SERVICES["camera"]["image"] == SERVICES["service"]["image"]


def test_camera_when_started_then_its_options_are_those_of_the_command():
    """The words after `camera` are options that `flawline camera` has, and they lead to the service."""
    words = SERVICES["camera"]["command"]
    [camera] = [info.callback for info in commands.registered_commands if info.callback.__name__ == "camera"]
    options = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}

    assert words[0] == "camera"
    assert options <= {"json", *camera.__annotations__, *camera.__code__.co_varnames}
    assert words[words.index("--url") + 1] == "http://service:8000"


def test_grafana_when_started_then_finds_prometheus_and_the_dashboards_that_were_built():
    """One source, under its service's name, and the folder of the committed dashboards, the first of them as home."""
    [source] = yaml.safe_load((GRAFANA / "grafana-datasource.yaml").read_text())["datasources"]
    [provider] = yaml.safe_load((GRAFANA / "grafana-dashboards.yaml").read_text())["providers"]
    mounted = {target: (DOCKER / path).resolve() for path, target, _ in mounts("grafana") if path.startswith(".")}
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]

    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    folder = mounted[provider["options"]["path"]]
    assert folder == ROOT / "k8s/monitoring/dashboards"
    assert (folder / Path(home).name).is_file()
    assert str(Path(home).parent) == provider["options"]["path"]


def test_prometheus_when_started_then_scrapes_the_service_and_tells_the_alertmanager():
    """Names and ports are those of the composition, and rules are the cluster's own file."""
    configuration = yaml.safe_load((DOCKER / "compose/prometheus.yaml").read_text())
    [job] = configuration["scrape_configs"]
    [managers] = configuration["alerting"]["alertmanagers"]

    assert job["static_configs"] == [{"targets": ["service:8000"], "labels": {"namespace": "flawline"}}]
    assert managers["static_configs"] == [{"targets": ["alertmanager:9093"]}]
    sources = {target: source for source, target, _ in mounts("prometheus")}
    assert [sources[path] for path in configuration["rule_files"]] == ["../k8s/monitoring/rules.yaml"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_when_its_configuration_is_checked_then_it_holds(tmp_path):
    """By the real program; only where the rules lie is this machine's."""
    text = (DOCKER / "compose/prometheus.yaml").read_text()
    (tmp_path / "prometheus.yaml").write_text(
        text.replace("/etc/prometheus/rules.yaml", str(ROOT / "k8s/monitoring/rules.yaml"))
    )

    told = subprocess.run(
        ["promtool", "check", "config", tmp_path / "prometheus.yaml"], capture_output=True, text=True, check=False
    )

    assert told.returncode == 0, told.stdout + told.stderr
    assert "rules found" in told.stdout


@pytest.mark.skipif(shutil.which("amtool") is None, reason="amtool is not installed")
def test_alertmanager_when_its_configuration_is_checked_then_it_holds():
    """By the real program, as it is."""
    told = subprocess.run(
        ["amtool", "check-config", DOCKER / "compose/alertmanager.yaml"], capture_output=True, text=True, check=False
    )

    assert told.returncode == 0, told.stdout + told.stderr
