"""Runs the server for tests: as a real process, as operators run it, or in a thread of the test with a fake engine.

Nothing sleeps for a guessed time: a server says on its log where it listens, and what a test waits for is asked again
and again until it holds or a bounded time is over.
"""

import fcntl
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import httpx
import numpy as np
import uvicorn

from service.app import create_app
from service.contract.bundle import Bundle
from service.engines.ort import OrtEngine
from service.lines.loading import OpenEngine
from service.protocol import BoundedProtocol
from service.settings import Settings
from tests.fakes import FakeEngine

LONG_S = 600.0  # longer than any test

_Result = TypeVar("_Result")

PATIENCE_S = 60  # for a slow machine; every wait ends as soon as it can
_PAUSE_S = 0.02


def wait_until(holds: Callable[[], bool], what: str, within_s: float = PATIENCE_S) -> None:
    """Ask until something holds.

    Raises:
        AssertionError: if it does not within the time.
    """
    pause = threading.Event()
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, f"{what} did not happen within {within_s} s"
        pause.wait(_PAUSE_S)


class ServerProcess:
    """A `flawline serve` process on a free port of 127.0.0.1, with its log.

    Args:
        store: directory of bundles.
        environment: more settings.
        options: of the command line.
        before: statements that run in the process before it serves.
        interpreter: of another environment, whose installed package then serves; this one's where absent.
    """

    def __init__(
        self,
        store: Path,
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        before: str = "pass",
        interpreter: Path | None = None,
    ) -> None:
        program = f"{before}\nfrom service.__main__ import main; main()"
        command = [
            str(interpreter or sys.executable),
            "-c",
            program,
            "serve",
            "--store",
            str(store),
            "--port",
            "0",
            *options,
        ]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            cwd=None if interpreter is None else store,  # else Python would import the sources that lie here
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.log: list[str] = []
        self.admin_port: int | None = None
        self._port: queue.Queue[int | None] = queue.Queue()
        self._reads = threading.Event()
        self._reads.set()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            port = self._port.get(timeout=PATIENCE_S)
            assert port is not None, "the server ended before it listened:\n" + "\n".join(self.log)
        except BaseException:
            self._end()  # else a later test would be blamed for what is left behind
            raise
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._end()

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(PATIENCE_S)
        self._reads.set()
        self._reader.join(PATIENCE_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def ready(self) -> Self:
        """Wait until the server says that it is ready."""
        wait_until_ready(self.http)
        return self

    def line(self, name: str) -> dict[str, Any]:
        """Return what the server says of a line."""
        answer: dict[str, Any] = self.http.get(f"/v1/lines/{name}").json()
        return answer

    def wait_for_line(self, name: str, state: str) -> dict[str, Any]:
        """Wait until a line has a state, and return what the server says of it."""
        wait_until(lambda: self.line(name).get("state") == state, f"state {state} of {name}")
        return self.line(name)

    def terminate(self) -> None:
        """Send SIGTERM, as an orchestrator does, and return at once."""
        self._process.send_signal(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        """Send another signal, and return at once."""
        self._process.send_signal(number)

    def limit_files(self, most_bytes: int | None) -> None:
        """Let the process write no file beyond a size, as on a full disk; None lets it write any again."""
        limit = resource.RLIM_INFINITY if most_bytes is None else most_bytes
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def most_files(self) -> int:
        """Return how many files the process may have open."""
        return resource.prlimit(self._process.pid, resource.RLIMIT_NOFILE)[0]

    def stop_reading(self) -> None:
        """Leave the log where it is, in a pipe that holds a page, as a collector of logs that hangs does."""
        assert self._process.stdout is not None
        self._reads.clear()
        fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, resource.getpagesize())

    def exit_code(self) -> int:
        """Wait for the end of the process."""
        return self._process.wait(PATIENCE_S)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the log's JSON lines so far."""
        for line in list(self.log):
            if line.startswith("{"):
                yield json.loads(line)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode("utf-8", "replace").rstrip()
            self.log.append(line)
            if line.startswith("{"):
                event = json.loads(line)
                if event.get("message") == "administration listening":
                    self.admin_port = int(event["port"])
                if event.get("message") == "listening":
                    self._port.put(int(event["port"]))
            if not self._reads.is_set():
                self._reads.wait()
                return  # what is left may end in half a line
        self._port.put(None)


def held_engine(bundle: Bundle) -> FakeEngine:
    """Return an engine that answers as the bundle's network does, and whose runs a test can hold."""
    network = OrtEngine(bundle)
    engine = FakeEngine(device="cpu")
    engine.on_run = lambda frames: network.run(frames, np.zeros(len(frames), np.int64))
    return engine


@contextmanager
def serve_held(
    store: Path, when_lost: Callable[[], None] | None = None, **settings: float
) -> Iterator[tuple[httpx.Client, FakeEngine]]:
    """Serve a store of one bundle with an engine that the test holds, and with patience; it is let go at the end."""
    made: list[FakeEngine] = []

    def open_engine(bundle: Bundle) -> FakeEngine:
        made.append(held_engine(bundle))
        return made[0]

    names = ("default_deadline_s", "max_deadline_s", "drain_timeout_s", "stuck_after_s")
    known = Settings(store_directory=store, **(dict.fromkeys(names, LONG_S) | settings))
    with serve_in_thread(known, open_engine, when_lost) as http:
        wait_until_ready(http)
        try:
            yield http, made[0]
        finally:
            made[0].release()


@contextmanager
def serve_in_thread(
    settings: Settings, open_engine: OpenEngine | None = None, when_lost: Callable[[], None] | None = None
) -> Iterator[httpx.Client]:
    """Serve over real sockets, in a thread of the test, until the end of the block; arguments are of `create_app`."""
    config = uvicorn.Config(
        create_app(settings, open_engine=open_engine, when_lost=when_lost),
        port=0,
        http=BoundedProtocol,
        ws="none",
        log_config=None,
        log_level="critical",
        timeout_graceful_shutdown=PATIENCE_S,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), "the start")
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http:
            yield http
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)


def wait_until_ready(http: httpx.Client) -> None:
    """Wait until a server says that it is ready."""
    wait_until(lambda: http.get("/healthz/ready").status_code == 200, "readiness")


class Side(Generic[_Result]):
    """A call that runs beside the test; its answer, or what it raised, is there when asked for."""

    def __init__(self, call: Callable[[], _Result]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(call)
        self._pool.shutdown(wait=False)

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return self._future.done()

    def answer(self) -> _Result:
        """Wait for the end."""
        return self._future.result(PATIENCE_S)
