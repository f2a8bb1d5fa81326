"""A camera at the end of a run: starts a real server and posts frames to it, through the client that customers use."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from service.client import Client, ClientFault, Outcome, Problem


class ServerDidNotStart(Exception):
    """The server ended or did not become ready; the sentence names its log."""


@contextlib.contextmanager
def running_server(store: Path, log: Path, ready_within_s: float = 60) -> Iterator[str]:
    """Run `flawline serve` as a process of its own until the block ends, then stop it as Kubernetes would.

    Args:
        store: folder of bundles.
        log: where the server's output goes.
        ready_within_s: how long loading and the golden replay may take.

    Yields:
        The base URL, once the server says that it is ready.

    Raises:
        ServerDidNotStart: if it ended or did not become ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "service", "serve", "--store", str(store), "--host", "127.0.0.1"]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own command with our own arguments
            [*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait_until_ready(process, url, log, ready_within_s)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def post_frames(
    url: str, line: str, frames: Sequence[Path], *, connections: int = 8, on_shot: Callable[[], None] = lambda: None
) -> list[Outcome]:
    """Post every frame once, several at a time, each connection like one camera.

    Args:
        url: the server.
        line: its line.
        frames: encoded images.
        connections: cameras that wait for their answer before they send the next frame.
        on_shot: called after each answer, from several threads.

    Returns:
        One outcome a frame, in the order of `frames`.
    """
    with Client(url, connections=connections) as client, ThreadPoolExecutor(connections) as cameras:

        def shoot(path: Path) -> Outcome:
            outcome = client.inspect(line, path)
            on_shot()
            return outcome

        return list(cameras.map(shoot, frames))


def fetch_overlay(url: str, line: str, path: Path) -> bytes:
    """Inspect one frame and return the overlay PNG.

    Raises:
        ClientFault: if the server gave no verdict.
    """
    with Client(url) as client:
        outcome = client.inspect(line, path, heatmap="overlay")
        if outcome.answer is None:
            raise ClientFault(outcome.problem or Problem("answer_unusable", "The frame got no verdict."))
        return client.heatmap(outcome.answer.inspection_id, "overlay")


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path, ready_within_s: float) -> None:
    deadline = time.monotonic() + ready_within_s
    last = "it did not answer"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerDidNotStart(f"The server ended with code {process.returncode}; its log is {log}.")
        try:
            answer = httpx.get(f"{url}/healthz/ready", timeout=2, trust_env=False)
        except httpx.TransportError:
            time.sleep(0.1)
            continue
        if answer.status_code == httpx.codes.OK:
            return
        last = answer.text
        time.sleep(0.1)
    raise ServerDidNotStart(f"The server did not become ready within {ready_within_s:g} s ({last}); its log is {log}.")
