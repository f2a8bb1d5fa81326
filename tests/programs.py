"""Runs real programs beside a test: on free ports of 127.0.0.1, and never longer than the test."""

import contextlib
import http.server
import itertools
import os
import queue
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.servers import PATIENCE_S, wait_until

# Below what the system gives to whoever asks for any port, so that none is given away between the question and its use.
_PORTS_FROM, _PORTS_OF_A_PROCESS, _PROCESSES = 10_000, 100, 220
_offsets = itertools.cycle(range(_PORTS_OF_A_PROCESS))


def free_port() -> int:
    """Return a port that nobody listens to, for programs that can't be asked which one they chose.

    Each process of tests takes turns through ports of its own, so that two beside each other hand out different ones.
    """
    first = _PORTS_FROM + os.getpid() % _PROCESSES * _PORTS_OF_A_PROCESS
    for _ in range(_PORTS_OF_A_PROCESS):
        port = first + next(_offsets)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"somebody listens to every port from {first} on")


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
def listening() -> Iterator[tuple[str, queue.SimpleQueue[bytes]]]:
    """Take whatever is posted, as a pager or a collector would; yield the address and the bodies that arrive."""
    arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing on the test's output."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", arrived
        finally:
            server.shutdown()
            thread.join()


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
