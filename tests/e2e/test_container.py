"""The CPU service's image, really built and really run: small rights, one frame, an orderly end.

Needs buildah, podman, and a base image under the name that the Dockerfile asks for; `.ci/run` makes one from Debian
where no registry is reachable. The pod of the rendered Deployment is played as well, by podman instead of a cluster.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from tests.factories import encode, make_bundle, make_frame
from tests.programs import answers, free_port
from tests.servers import wait_until

ROOT = Path(__file__).resolve().parents[2]
BASE, IMAGE = "docker.io/library/python:3.11-slim-bookworm", "localhost/flawline/service:0.1.0"
ENVIRONMENT = {**os.environ, "CONTAINERS_CONF": str(Path(__file__).parent / "containers.conf")}
PNG = {"Content-Type": "image/png"}
_LARGEST_MB = 600


def _run(*command, check=True):
    told = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert not check or told.returncode == 0, told.stdout[-2000:] + told.stderr[-2000:]
    return told


def _why_not():
    missing = [program for program in ("buildah", "podman", "runc") if shutil.which(program) is None]
    if missing:
        return f"{missing[0]} is not installed"
    return "" if _run("podman", "image", "exists", BASE, check=False).returncode == 0 else f"there is no image {BASE}"


pytestmark = [
    pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "ready"),
    pytest.mark.timeout(1800),  # the first build installs everything
]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The image of this checkout; of several test processes the first one builds, and the others find its layers."""
    # Where wheels come from is this machine's matter: its configuration of pip is lent to the build, not copied.
    lent = [Path("/etc/pip.conf"), Path("/etc/ssl/certs"), *map(Path, os.environ.get("PIP_FIND_LINKS", "").split())]
    mounts = [part for path in lent if path.exists() for part in ("-v", f"{path}:{path}:ro")]
    with (tmp_path_factory.getbasetemp().parent / "image.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run(
            *("buildah", "bud", "--isolation", "chroot", "--format", "docker", "--layers", *mounts),
            *("-f", "docker/Dockerfile", "--build-arg", "REVISION=abc", "-t", IMAGE, "."),
        )
    return json.loads(_run("podman", "image", "inspect", IMAGE).stdout)[0]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store that the container's user may read."""
    place = tmp_path_factory.mktemp("container") / "store"
    make_bundle(place)
    for path in (place.parent, *place.parent.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return place


@contextmanager
def _container(store, purpose):
    """Run the image under a name that another run of these tests beside this one does not have."""
    name = f"flawline-{purpose}-{os.getpid()}"
    rights = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--memory", "512m"]
    _run(
        *("podman", "run", "-d", "--name", name, *rights, "-p", "127.0.0.1::8000"),
        *("-v", f"{store}:/store:ro", IMAGE),
    )
    try:
        address = _run("podman", "port", name, "8000").stdout.strip()
        with httpx.Client(base_url=f"http://{address}", timeout=30) as http:
            wait_until(lambda: answers(http, "/healthz/ready"), f"readiness of {name}")
            yield name, http
    finally:
        _run("podman", "rm", "-f", name, check=False)


def test_image_when_built_then_is_small_labelled_and_not_root(image):
    """An ordinary user by number, OCI labels, a health check, and no more than the service needs."""
    settings = image["Config"]
    base = json.loads(_run("podman", "image", "inspect", BASE).stdout)[0]

    assert settings["User"] == "10001:10001"
    assert settings["Labels"]["org.opencontainers.image.revision"] == "abc"
    assert settings["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert "/healthz/live" in " ".join(image["Healthcheck"]["Test"])
    assert (image["Size"] - base["Size"]) / 1e6 < _LARGEST_MB


def test_container_when_run_with_few_rights_then_inspects_and_can_write_nothing(image, store):
    """Read-only, without capabilities, in half a gigabyte: a frame is judged, and nothing can be changed."""
    with _container(store, "rights") as (name, http):
        answer = http.post("/v1/lines/demo_line/inspect", content=encode(make_frame()), headers=PNG)
        who = _run("podman", "exec", name, "id", "-u").stdout.strip()
        written = _run("podman", "exec", name, "touch", "/opt/flawline/x", check=False)
        tools = _run("podman", "exec", name, "sh", "-c", "ls /opt/flawline/bin", check=False).stdout.split()
        healthy = _run("podman", "healthcheck", "run", name, check=False)
        _run("podman", "exec", name, "python", "-c", "import httpx, obstore, opentelemetry.sdk")

    assert answer.json()["verdict"] == "PASS"
    assert who == "10001"
    assert "Read-only" in written.stderr
    assert not {"pip", "gcc", "torchrun"} & set(tools)
    assert healthy.returncode == 0


def test_container_when_told_to_stop_then_ends_in_order(image, store):
    """SIGTERM drains, and the exit code is zero."""
    with _container(store, "stop") as (name, http):
        http.post("/v1/lines/demo_line/inspect", content=encode(make_frame()), headers=PNG)
        _run("podman", "stop", "-t", "20", name)
        state = json.loads(_run("podman", "inspect", name).stdout)[0]["State"]
        log = _run("podman", "logs", name)

    assert state["ExitCode"] == 0
    assert "told to stop" in log.stdout + log.stderr


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_deployment_when_its_pod_is_played_then_inspects(image, store, tmp_path):
    """The rendered Deployment itself, its settings and its rights, run by podman; only volumes are this machine's."""
    told = _run("kubectl", "kustomize", "k8s/overlays/cpu").stdout
    resources = {resource["kind"]: resource for resource in yaml.safe_load_all(told) if resource}
    pod, port = resources["Deployment"]["spec"]["template"]["spec"], free_port()
    pod["containers"][0]["image"] = IMAGE
    pod["containers"][0]["ports"][0]["hostPort"] = port
    pod.pop("topologySpreadConstraints")
    keys = tmp_path / "keys.json"
    key = "k" * 40
    entry = {"name": "press 4", "sha256": hashlib.sha256(key.encode()).hexdigest(), "lines": ["demo_line"]}
    keys.write_text(json.dumps([entry | {"actions": ["inspect"]}]))
    keys.chmod(0o644)
    tmp_path.chmod(0o755)
    places = {"store": str(store), "keys": str(tmp_path), "scratch": None}
    pod["volumes"] = [
        {"name": name, "emptyDir": {}} if path is None else {"name": name, "hostPath": {"path": path}}
        for name, path in places.items()
    ]
    resources["Deployment"]["spec"]["replicas"] = 1
    resources["Deployment"]["metadata"]["name"] += f"-{os.getpid()}"  # its pod's name, here
    file = tmp_path / "pod.yaml"
    file.write_text(yaml.safe_dump_all([resources["ConfigMap"], resources["Deployment"]]))
    _run("podman", "play", "kube", str(file))
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            wait_until(lambda: answers(http, "/healthz/ready"), "readiness of the pod")
            stranger = http.post("/v1/lines/demo_line/inspect", content=encode(make_frame()), headers=PNG)
            camera = http.post(
                "/v1/lines/demo_line/inspect",
                content=encode(make_frame()),
                headers=PNG | {"Authorization": f"Bearer {key}"},
            )
    finally:
        _run("podman", "play", "kube", "--down", str(file), check=False)

    assert (stranger.status_code, stranger.json()["verdict"]) == (401, "NO_VERDICT")
    assert camera.json()["verdict"] == "PASS"
