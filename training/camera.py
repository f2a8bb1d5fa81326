"""A camera at the end of a run: posts frames to a real server over HTTP and keeps what came back.

It knows the wire, not the server: a frame goes in as the file's own bytes, and whatever is no answer in time counts as
`NO_VERDICT`.
"""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

_MEDIA_TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".bmp": "image/bmp",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".webp": "image/webp",
}


@dataclass(frozen=True)
class Shot:
    """One frame's answer as the camera saw it.

    Attributes:
        path: the frame.
        verdict: what the server said, or `NO_VERDICT`.
        score: raw score, or None without a verdict.
        inspection_id: under which the server keeps the heatmap for a while, or None.
        timings_ms: the server's stages.
        round_trip_ms: from the first byte sent to the last byte received.
        problem: the server's sentence where there is no verdict.
    """

    path: Path
    verdict: str
    score: float | None
    inspection_id: str | None
    timings_ms: dict[str, float]
    round_trip_ms: float
    problem: str | None


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
) -> list[Shot]:
    """Post every frame once, several at a time, each connection like one camera.

    Args:
        url: the server.
        line: its line.
        frames: encoded images.
        connections: cameras that wait for their answer before they send the next frame.
        on_shot: called after each answer, from several threads.

    Returns:
        One answer a frame, in the order of `frames`.
    """
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    with (
        httpx.Client(base_url=url, timeout=30, limits=limits, trust_env=False) as client,
        ThreadPoolExecutor(connections) as cameras,
    ):

        def shoot(path: Path) -> Shot:
            shot = _shoot(client, line, path)
            on_shot()
            return shot

        return list(cameras.map(shoot, frames))


def fetch_overlay(url: str, line: str, path: Path) -> bytes:
    """Inspect one frame and return the overlay PNG instead of JSON.

    Raises:
        httpx.HTTPStatusError: if the server gave no verdict.
    """
    headers = {"Content-Type": _MEDIA_TYPES[path.suffix.lower()], "Accept": "image/png"}
    answer = httpx.post(
        f"{url}/v1/lines/{line}/inspect", content=path.read_bytes(), headers=headers, timeout=30, trust_env=False
    )
    return answer.raise_for_status().content


def _shoot(client: httpx.Client, line: str, path: Path) -> Shot:
    headers = {"Content-Type": _MEDIA_TYPES[path.suffix.lower()]}
    body = path.read_bytes()
    started = time.perf_counter()
    try:
        answer = client.post(f"/v1/lines/{line}/inspect", content=body, headers=headers)
        document = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        return Shot(path, "NO_VERDICT", None, None, {}, (time.perf_counter() - started) * 1e3, str(error))
    elapsed_ms = (time.perf_counter() - started) * 1e3
    if answer.status_code != httpx.codes.OK:
        return Shot(path, "NO_VERDICT", None, None, {}, elapsed_ms, str(document.get("detail")))
    return Shot(
        path,
        document["verdict"],
        document["score"],
        document["inspection_id"],
        document["timings_ms"],
        elapsed_ms,
        None,
    )


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
