"""The trial of docker/compose.yaml, run with the programs that exist here: its own configuration, its own first line.

Grafana and Docker are not among them. Only addresses are changed, from its names to ports of this machine.
"""

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from service.contract.frames import FrameLimits, decode_image
from tests.factories import make_bundle
from tests.programs import answers, free_port, listening, prometheus, running
from tests.servers import PATIENCE_S, ServerProcess, wait_until

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker/compose"
_PROGRAMS = ("prometheus", "prometheus-alertmanager")
_MISSING = [program for program in _PROGRAMS if shutil.which(program) is None]
# Older than half a year, which is when an alert asks for new ones.
_KEYS_AGE_S = 200 * 86400


@contextmanager
def _alertmanager(folder, pager):
    text = (COMPOSE / "alertmanager.yaml").read_text().replace("group_wait: 10s", "group_wait: 1s")
    configuration = yaml.safe_load(text)
    [receiver] = configuration["receivers"]
    receiver["webhook_configs"] = [{"url": pager}]
    (folder / "alertmanager.yaml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus-alertmanager",
        f"--config.file={folder}/alertmanager.yaml",
        f"--storage.path={folder}/alerts",
    ]
    with running([*command, "--cluster.listen-address=", f"--web.listen-address={address}"]):
        with httpx.Client(base_url=f"http://{address}") as http:
            wait_until(lambda: answers(http, "/-/ready"), "the start of Alertmanager")
        yield address


def _scraping(service, manager, key):
    text = (COMPOSE / "prometheus.yaml").read_text()
    text = text.replace("/etc/prometheus/rules.yaml", str(ROOT / "k8s/monitoring/rules.yaml"))
    text = text.replace("service:8000", service).replace("alertmanager:9093", manager)
    configuration = yaml.safe_load(re.sub(r"_interval: \d+s", "_interval: 1s", text))
    # The trial's service is open; this one has keys, because their age is what raises an alert at once.
    configuration["scrape_configs"][0]["authorization"] = {"credentials": key}
    return configuration


@pytest.fixture
def old_keys(tmp_path):
    """A keys file that nobody changed for long, and the key in it that may read metrics."""
    key, file = "m" * 40, tmp_path / "keys.json"
    entry = {"name": "prometheus", "sha256": hashlib.sha256(key.encode()).hexdigest(), "lines": ["*"]}
    file.write_text(json.dumps([entry | {"actions": ["metrics"]}]))
    changed_at = time.time() - _KEYS_AGE_S
    os.utime(file, (changed_at, changed_at))
    return file, key


@pytest.mark.skipif(bool(_MISSING), reason=f"{', '.join(_MISSING)} is not installed")
def test_composition_when_something_is_wrong_then_the_pager_hears_of_it(tmp_path, old_keys):
    """A real service, Prometheus and Alertmanager with the trial's configuration: from a metric to a webhook."""
    keys, key = old_keys
    make_bundle(tmp_path / "store")
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(tmp_path / "store", {"FLAWLINE_KEYS_FILE": str(keys)}))
        pager, told = stack.enter_context(listening())
        manager = stack.enter_context(_alertmanager(tmp_path, pager))
        scraping = _scraping(server.url.removeprefix("http://"), manager, key)
        stack.enter_context(prometheus(tmp_path, scraping))
        call = json.loads(told.get(timeout=PATIENCE_S))

    [alert] = call["alerts"]
    assert call["receiver"] == "shown-only"
    assert alert["labels"]["alertname"] == "FlawlineKeysOld"
    assert alert["labels"]["namespace"] == "flawline"
    assert "half a year" in alert["annotations"]["summary"]


def test_first_line_when_drawn_then_the_camera_sees_other_plates_and_now_and_then_a_scratched_one(tmp_path):
    """Plates to fit to, plates that fitting never saw, and the last of thirty-two is brighter where the scratch is."""
    runpy.run_path(str(COMPOSE / "first_line.py"))["draw_line"](tmp_path, fit=2, shown=32)

    fit = [file.read_bytes() for file in sorted((tmp_path / "brushed_plate/train/good").iterdir())]
    shown = [file.read_bytes() for file in sorted((tmp_path / "camera").iterdir())]
    brightest = [decode_image(data, FrameLimits(), None).pixels[150:200, 70:130].max() for data in shown]

    assert (len(fit), len(shown), len({*fit, *shown})) == (2, 32, 34)
    assert max(brightest[:-1]) < 220 < brightest[-1]


def test_first_line_when_it_is_there_already_then_nothing_is_done_again(tmp_path):
    """The volume keeps the line, so the second `docker compose up` takes seconds."""
    (tmp_path / "store/brushed_plate/1").mkdir(parents=True)

    told = subprocess.run(
        [sys.executable, COMPOSE / "first_line.py", tmp_path / "frames", tmp_path / "store"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert "is there already" in told.stdout
    assert not (tmp_path / "frames").exists()
