"""What the service's benchmarks share: the server as a process, load over loopback, and the limit without a server.

The limit decodes and runs the same frame through the same graph with the same functions, on two threads of a process of
its own. Each benchmark takes it in the same run and in turns with the server, because a busy machine slows both alike.
CPU time is of the server's process alone, and of the limit's; it stays comparable where wall time does not.

    python -m tests.benchmarks.serving STORE SECONDS [FRAME]    # the limit alone, as JSON
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from service.contract.bundle import load_bundle
from service.contract.frames import FrameLimits, decode_image, fit_to_input
from service.engines.engine import EngineOptions, RunBatch
from service.engines.ort import OrtEngine
from service.settings import usable_cpus
from tests.benchmarks.stand_in import make_jpeg, make_store

PATIENCE_S = 60.0
MOST_CONNECTIONS = 400
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Answer(NamedTuple):
    """One request's fate.

    Attributes:
        due_at: when it should have been sent.
        sent_at: when it was.
        ended_at: when its answer was there.
        status: of HTTP; 0 where none came.
        line: whose frame it was.
    """

    due_at: float
    sent_at: float
    ended_at: float
    status: int
    line: str

    @property
    def latency_ms(self) -> float:
        """From when it should have been sent: a generator that is late can't hide the wait."""
        return 1000 * (self.ended_at - self.due_at)

    @property
    def wait_ms(self) -> float:
        """From when it was sent."""
        return 1000 * (self.ended_at - self.sent_at)


class Limit(NamedTuple):
    """What the machine does without a server.

    Attributes:
        frames_a_second: of two threads, each of which decodes and runs.
        cpu_ms: that a frame takes of them.
        single_ms: of one frame on one thread.
        alone_ms: of one frame that is run on every core.
    """

    frames_a_second: float
    cpu_ms: float
    single_ms: float
    alone_ms: float


class Served:
    """A `flawline serve` process on a free port of loopback, for the length of a block."""

    def __init__(self, store: Path, **settings: object) -> None:
        self._log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115 - closed with the block
        environment = {f"FLAWLINE_{name.upper()}": str(value) for name, value in settings.items()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve", "--store", str(store), "--port", "0"],
            env={**os.environ, **environment},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            self.port = int(self._wait_for(self._listening))
            self._wait_for(lambda: asyncio.run(_get(self.port, "/healthz/ready")) == 200)
        except BaseException:
            self._process.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    @property
    def cpu_s(self) -> float:
        """CPU time that the process has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S

    @property
    def memory_mib(self) -> float:
        """Resident memory of the process."""
        return self._status("VmRSS") / 1024

    @property
    def threads(self) -> int:
        """Threads of the process."""
        return self._status("Threads")

    @property
    def open_files(self) -> int:
        """Files and sockets that the process holds open."""
        return sum(1 for _ in Path(f"/proc/{self._process.pid}/fd").iterdir())

    def _status(self, name: str) -> int:
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
        raise RuntimeError("the server has ended")

    def _listening(self) -> int:
        for line in Path(self._log.name).read_text().splitlines():
            if '"listening"' in line:
                return int(json.loads(line)["port"])
        return 0

    def _wait_for(self, ask: Callable[[], int]) -> int:
        end = time.monotonic() + PATIENCE_S
        while not (answer := ask()):
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{Path(self._log.name).read_text()}")
            time.sleep(0.05)
        return answer


@dataclass(frozen=True)
class Sender:
    """One line's camera."""

    port: int
    line: str
    frame: bytes
    deadline_ms: int = 10_000
    media_type: str = "image/jpeg"

    def request(self) -> bytes:
        """Return the bytes of a request."""
        head = (
            f"POST /v1/lines/{self.line}/inspect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {self.media_type}\r\n"
            f"X-Deadline-Ms: {self.deadline_ms}\r\nContent-Length: {len(self.frame)}\r\n\r\n"
        )
        return head.encode() + self.frame


class _Connection:
    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes, line: str = "", due_at: float | None = None) -> Answer:
        sent_at = time.perf_counter()
        status = 0
        try:
            async with asyncio.timeout(PATIENCE_S):
                if self._streams is not None and self._streams[0].at_eof():
                    self.close()  # the server ended it while nobody used it
                if self._streams is None:
                    self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=2**22)
                reader, writer = self._streams
                writer.write(request)
                await writer.drain()
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r")[0]))
                status = int(head.split(b" ", 2)[1])
                if b"connection: close" in head:
                    self.close()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            self.close()
        return Answer(sent_at if due_at is None else due_at, sent_at, time.perf_counter(), status, line)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


async def _get(port: int, path: str) -> int:
    connection = _Connection(port)
    answer = await connection.ask(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    connection.close()
    return answer.status


def closed_loop(sender: Sender, connections: int, seconds: float) -> list[Answer]:
    """Send from so many connections, each its next frame as soon as the last one is answered."""

    async def send(answers: list[Answer], end: float) -> None:
        connection, request = _Connection(sender.port), sender.request()
        while time.perf_counter() < end:
            answers.append(await connection.ask(request, sender.line))
        connection.close()

    async def send_all() -> list[Answer]:
        answers: list[Answer] = []
        end = time.perf_counter() + seconds
        await asyncio.gather(*(send(answers, end) for _ in range(min(connections, MOST_CONNECTIONS))))
        return answers

    return asyncio.run(send_all())


def open_loop(
    senders: Sequence[tuple[Sender, float]], seconds: float, seed: int = 0, watch: Callable[[], None] = lambda: None
) -> list[Answer]:
    """Send frames at random times, whether or not the ones before are answered.

    Args:
        senders: with frames a second of each; arrivals are Poisson.
        seconds: to send for.
        seed: of the times.
        watch: called once a second.
    """
    generator = random.Random(seed)  # noqa: S311 - times of arrival, no secret
    plan = sorted(
        (at, number) for number, (_, rate) in enumerate(senders) for at in _arrivals(generator, rate, seconds)
    )
    requests = [sender.request() for sender, _ in senders]

    async def send_all() -> list[Answer]:
        answers: list[Answer] = []
        idle: list[_Connection] = []
        tasks: set[asyncio.Task[None]] = set()

        async def send(number: int, due_at: float) -> None:
            sender = senders[number][0]
            connection = idle.pop() if idle else _Connection(sender.port)
            answers.append(await connection.ask(requests[number], sender.line, due_at))
            idle.append(connection)

        begin, watched = time.perf_counter(), 0.0
        for at, number in plan:
            await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
            if at - watched >= 1:
                watched = at
                watch()
            if len(tasks) < MOST_CONNECTIONS:
                task = asyncio.create_task(send(number, begin + at))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            else:
                now = time.perf_counter()
                answers.append(Answer(begin + at, now, now, 0, senders[number][0].line))
        if tasks:
            await asyncio.wait(tasks)
        for connection in idle:
            connection.close()
        return answers

    return asyncio.run(send_all())


def _arrivals(generator: random.Random, rate: float, seconds: float) -> list[float]:
    arrivals, at = [], generator.expovariate(rate)
    while at < seconds:
        arrivals.append(at)
        at += generator.expovariate(rate)
    return arrivals


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile, or NaN of nothing."""
    return float(np.percentile(values, 100 * share)) if values else float("nan")


def codes(answers: Sequence[Answer]) -> str:
    """Return how often each status came; `none` is no answer at all."""
    return ", ".join(
        f"{status or 'none'}: {count}" for status, count in sorted(Counter(a.status for a in answers).items())
    )


def measure_limit(store: Path, seconds: float, frame: Path | None = None) -> Limit:
    """Measure what the machine does without a server, in a process and a session of its own.

    Args:
        store: of the bundle.
        seconds: to measure.
        frame: image file; the drawn JPEG where absent.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.serving", str(store), str(seconds), *([str(frame)] if frame else [])],
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
        timeout=seconds + PATIENCE_S,
    )
    return Limit(**json.loads(done.stdout.splitlines()[-1]))


def ready_store(folder: str, lines: int = 1) -> Path:
    """Return a store with the stand-in detector, made where it is not there yet."""
    store = Path(folder).absolute()
    return store if any(store.glob("*/1/manifest.json")) else make_store(store, lines)


def arguments(about: str | None, optional: Sequence[str] = (), **defaults: float) -> argparse.Namespace:
    """Read a benchmark's arguments: numbers with defaults, each bounded, and where the store lies.

    Args:
        about: the text of `--help`.
        optional: numbers that are None where absent; their default is an example.
        defaults: of the numbers.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="of the stand-in detector; kept for the next time, made where absent")
    for name, default in defaults.items():
        told = f"for example {default}" if name in optional else f"{default} where absent"
        kept = None if name in optional else default
        parser.add_argument(f"--{name}", type=type(default), default=kept, help=told)
    read = parser.parse_args()
    for name in defaults:
        given = getattr(read, name)
        if given is not None and not 0 < given <= 7200:
            parser.error(f"--{name} lies between 0 and 7200")
    read.store = read.store or tempfile.mkdtemp(prefix="flawline-store-")
    return read


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table of Markdown."""
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    print(flush=True)


def _limit(store: Path, seconds: float, frame: bytes) -> Limit:
    bundle = load_bundle(next(store.glob("*/1")))
    engine, spec = OrtEngine(bundle, EngineOptions(threads_alone=usable_cpus())), bundle.manifest.input
    line_index = np.zeros(1, np.int64)

    def once(run: RunBatch = engine.run) -> None:
        pixels = decode_image(frame, FrameLimits(), spec.resize_target).pixels
        run(fit_to_input(pixels, spec)[None], line_index)

    def median_ms(run: RunBatch) -> float:
        singles = []
        for _ in range(20):
            began_at = time.perf_counter()
            once(run)
            singles.append(1000 * (time.perf_counter() - began_at))
        return statistics.median(singles[5:])

    def repeat(counts: list[int], end: float) -> None:
        count = 0
        while time.perf_counter() < end:
            once()
            count += 1
        counts.append(count)

    single_ms = median_ms(engine.run)
    alone_ms = single_ms if engine.alone is None else median_ms(engine.alone.run)
    counts: list[int] = []
    began_at, cpu_s = time.perf_counter(), time.process_time()
    threads = [threading.Thread(target=repeat, args=(counts, began_at + seconds)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s, cpu_s = time.perf_counter() - began_at, time.process_time() - cpu_s
    return Limit(sum(counts) / took_s, 1000 * cpu_s / sum(counts), single_ms, alone_ms)


if __name__ == "__main__":
    shown = Path(sys.argv[3]).read_bytes() if len(sys.argv) > 3 else make_jpeg()
    print(json.dumps(_limit(Path(sys.argv[1]), float(sys.argv[2]), shown)._asdict()))
