"""Runs real programs beside a test: on free ports of 127.0.0.1, and never longer than the test."""

import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.servers import PATIENCE_S, wait_until


def free_port() -> int:
    """Return a port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(command: Sequence[str | Path]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the end of the block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


@contextmanager
def prometheus(folder: Path, configuration: Any, *options: str) -> Iterator[httpx.Client]:
    """Run a Prometheus that keeps its data in a folder; yield a client of its API once it is ready."""
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address={address}", "--log.level=error", *options]
    with running(command), httpx.Client(base_url=f"http://{address}", timeout=30) as api:
        wait_until(lambda: answers(api, "/-/ready"), "the start of Prometheus")
        yield api


def answers(http: httpx.Client, path: str) -> bool:
    """Tell whether somebody answers with 200; nobody listens at first."""
    try:
        return http.get(path).status_code == 200
    except httpx.TransportError:
        return False
