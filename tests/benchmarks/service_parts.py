"""What a frame costs beside the network, part by part: for machines that are too busy for the other benchmarks.

    python -m tests.benchmarks.service_parts [--frames 100] [--rounds 7] [--store FOLDER]

One thread takes the places of the event loop and of the runners in turns, with eight connections without a wire; so its
own CPU time tells each part. The network runs in between, as it does in service: it sweeps the caches, and most of what
a call costs then is to fetch its code and data anew. Sockets, and hand-overs between threads, are left out.
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import uvicorn
import uvloop
from uvicorn.server import ServerState

from service import pipeline
from service.app import create_app, open_port
from service.contract import jpeg
from service.heap import give_back
from service.observability.log import log_json_lines
from service.protocol import BoundedProtocol
from service.routes import context as answering
from service.scheduling.batch_queue import Batch
from service.scheduling.batcher import Batcher
from service.settings import Settings
from tests.benchmarks.serving import Sender, arguments, print_table, ready_store
from tests.benchmarks.stand_in import make_jpeg

CONNECTIONS = 8
WARM_UP_FRAMES = 60
_FRAMES_A_TENTH = 16  # answers that are counted together on a machine with nothing else to do
_TURNS = 4  # of the event loop, until nothing is left to do but to wait
_PARTS = ("network", "libjpeg", "SHA-256", "runner besides", "event loop, answering", "event loop, receiving")


class Spent:
    """Nanoseconds of this thread by part."""

    def __init__(self) -> None:
        self.by_part: Counter[str] = Counter()

    def time(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a call that is timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            began_at = time.thread_time_ns()
            try:
                return call(*arguments, **named)
            finally:
                self.by_part[part] += time.thread_time_ns() - began_at

        return timed

    def time_inside(self, owner: Any, name: str, part: str) -> None:
        """Have what is called by this name timed as a part of its own."""
        setattr(owner, name, self.time(part, getattr(owner, name)))


class _NoWire:
    """The server's end of a connection that leads nowhere."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def get_extra_info(self, _name: str, default: Any = None) -> Any:
        return default

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        """Do nothing: nothing comes by itself."""

    resume_reading = close = abort = pause_reading


class _Connection(NamedTuple):
    protocol: BoundedProtocol
    wire: _NoWire


def main() -> None:
    """Measure and print."""
    read = arguments(__doc__, frames=100, rounds=7)
    store = ready_store(read.store)
    answering._SETTLED_AFTER_S, answering._MOST_UNSETTLED = 3600.0, _FRAMES_A_TENTH
    Batcher._start_runner = lambda _: None  # type: ignore[method-assign]  # this thread does what they do
    with tempfile.TemporaryFile() as log:
        log_json_lines("INFO", log.fileno())
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rounds = runner.run(_measure(Settings(store_directory=store), read.frames, read.rounds))
    table = {part: [spent[part] / read.frames / 1000 for spent in rounds] for part in _PARTS}
    rows = [(part, statistics.median(each), min(each)) for part, each in table.items()]
    print_table(("part", "us a frame, median of rounds", "least"), rows)
    os._exit(0)  # the interpreter would wait for what was never started here to end


async def _measure(settings: Settings, frames: int, rounds: int) -> list[Counter[str]]:
    app = create_app(settings)
    registry = app.state.context.registry
    registry.load()
    (live,) = registry.live_versions()
    spent, batcher = Spent(), live.bundle.batcher
    spent.time_inside(batcher._runs._engine._session, "run", "network")
    spent.time_inside(jpeg.simplejpeg, "decode_jpeg", "libjpeg")
    spent.time_inside(pipeline.hashlib, "sha256", "SHA-256")
    config = uvicorn.Config(app, ws="none", log_config=None, log_level="warning", access_log=False)
    config.load()
    state, port = ServerState(), open_port(app, CONNECTIONS)
    connections = [_Connection(BoundedProtocol(config, state, {}, port=port), _NoWire()) for _ in range(CONNECTIONS)]
    request = Sender(0, "line0", make_jpeg()).request()
    for protocol, wire in connections:
        protocol.connection_made(wire)  # type: ignore[arg-type]  # all that is asked of a transport
        protocol.data_received(request)
    await _until_idle()
    give_back()
    batches: list[Batch[Any]] = []
    measured = []
    for count in (WARM_UP_FRAMES, *[frames] * rounds):
        spent.by_part.clear()
        for _ in range(count):
            await _turn(batcher, batches, connections, request, spent)
        inside = sum(spent.by_part[part] for part in _PARTS[:3])
        spent.by_part["runner besides"] = spent.by_part["runner"] - inside
        measured.append(spent.by_part.copy())
    return measured[1:]


async def _turn(
    batcher: Batcher, batches: list[Batch[Any]], connections: list[_Connection], request: bytes, spent: Spent
) -> None:
    """Run and answer the frame whose turn it is, and have its connection send the next one."""
    while not batcher._inbox.empty():
        given = batcher._inbox.get()
        if given is not None:
            batcher._running.begin()
            batches.append(given)
    following = spent.time("runner", batcher._run_batch)(batches.pop(0))
    if following is not None:
        batches.append(following)
    began_at = time.thread_time_ns()
    await _until_idle()
    spent.by_part["event loop, answering"] += time.thread_time_ns() - began_at
    ((protocol, wire),) = [connection for connection in connections if connection.wire.sent]
    answer = b"".join(wire.sent)
    if not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(answer.decode())
    wire.sent.clear()
    began_at = time.thread_time_ns()
    protocol.data_received(request)
    await _until_idle()
    spent.by_part["event loop, receiving"] += time.thread_time_ns() - began_at


async def _until_idle() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)


if __name__ == "__main__":
    main()
