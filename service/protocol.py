"""HTTP/1.1 as uvicorn speaks it on httptools, with what an open port needs besides; one object a connection.

Uvicorn bounds neither how large a head may grow nor how long it may take to arrive, nor how long an answer may take to
leave; it drops the body of a request that offers another protocol (as Java's own client does with every request), and
answers what is no HTTP in plain text. Here heads are bounded in bytes and in time, who takes nothing of an answer is
cut off, offers are overheard and the frame is judged, and whoever sends something else is told so in a problem document
with `NO_VERDICT`. How many connections there may be is the business of `service/ports/connections.py`.

A request's time runs from the first byte of its head on, also while it stands in line behind the ones before it on its
connection. That byte is one that was read here: how long bytes lay in the kernel before, nobody tells.

The rest is for speed, because the service may take but a few per cent of what a frame takes: a body whose length is
told wakes its reader once, when it is complete, and not for each of its pieces; head and body of an answer leave in one
packet; one timer watches a connection for as long as it lives; and who works for a caller is told when it hangs up,
rather than having a task wait for that.
"""

import asyncio
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

import httptools
from pydantic_core import to_json
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.ports.connections import Connections, Cut
from service.routes.context import CONNECTION_EXTENSION
from service.routes.problems import PROBLEM_MEDIA_TYPE, REQUEST_ID_HEADER, problem_document

MAX_HEAD_BYTES = 64 * 2**10

# From the first byte of a head to its end; and without a byte of an answer that the other end takes.
HEAD_S = 10.0
UNREAD_S = 10.0
LOOKED_EVERY_S = 5.0
# Where Linux's `struct tcp_info` has `tcpi_bytes_acked`, since 4.1.
_ACKNOWLEDGED = struct.Struct("=120xQ")
# An answer leaves piece by piece, and the next one once the one before is nearly gone: so it is seen who takes none.
_PIECE_BYTES = 256 * 2**10

_NO_LINGER = struct.pack("ii", 1, 0)
_NO_HTTP = (
    "This is no HTTP/1.1 request, or its head is larger than 64 KiB; look at what lies between camera and service."
)
# What offers another protocol; a request is read again without them.
_OFFERS = frozenset({b"upgrade", b"http2-settings", b"connection"})


class BoundedProtocol(HttpToolsProtocol):
    """A connection that is cut off where a head does not end, or an answer is not taken.

    Args:
        config: of the server.
        server_state: of the server.
        app_state: what the application's life has left for requests.
        _loop: that it runs in; the present one where absent.
        port: the connections of its port; one with the usual bounds, for itself alone, where absent.
    """

    _patience: asyncio.TimerHandle | None = None
    _waits_since: float | None = None
    _came_at = 0.0
    _is_heard_again = False
    _is_in_head = False
    _unsent_bytes = 0
    _acknowledged_bytes = 0
    _stuck_since: float | None = None
    _has_moved = False
    _kept_bytes = 0
    _answering: "_Cycle | None" = None
    cycle: "_Cycle"

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        port: Connections | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.port = Connections(time.monotonic) if port is None else port

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Start waiting for the first request, where there is room for one more connection."""
        super().connection_made(transport)
        self._waits_since = self.loop.time()
        if self.port.come(self):
            self._look()
        else:
            self.cut()

    def data_received(self, data: bytes) -> None:
        """Take bytes, and bound those that the parser keeps to itself: a head that grows, or what follows a body."""
        self._has_moved = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._overhear(data[offer.args[0] :])
            return
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("")
            return
        if self.cycle is not None:
            self.cycle.hold_back()
        self._kept_bytes = 0 if self._has_moved else self._kept_bytes + len(data)
        if self._kept_bytes > MAX_HEAD_BYTES:
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Note when the first byte of a request came."""
        super().on_message_begin()
        if not self._is_heard_again:
            self._came_at = self.loop.time()
        self._is_heard_again, self._is_in_head = False, True

    def on_headers_complete(self) -> None:
        """Start answering, as uvicorn does, or stand in line behind the requests before this one."""
        if self.parser.should_upgrade():
            return
        if len(self.url) + sum(map(len, chain.from_iterable(self.headers))) > MAX_HEAD_BYTES:
            raise ValueError("the head is too large")
        self._has_moved, self._is_in_head, self._waits_since = True, False, None
        http_version = self.parser.get_http_version()
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        self.scope |= {
            "method": self.parser.get_method().decode("ascii"),
            "http_version": http_version,
            "path": unquote(path) if "%" in path else path,
            "raw_path": url.path,
            "query_string": url.query or b"",
        }
        before = self.cycle
        self.cycle = cycle = _Cycle(
            connection=self,
            came_at=self._came_at,
            clock=self.loop.time,
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=http_version != "1.0" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        if before is None or before.response_complete:
            self._answering = cycle
            self._start_asgi_task(cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._has_moved = True
        if not self.parser.should_upgrade():
            self.cycle.take(body)

    def on_message_complete(self) -> None:
        """Take the end of a body."""
        self._has_moved = True
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request, or start waiting for it."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._answering = cycle if isinstance(cycle, _Cycle) else None  # all of them are ours
            self._start_asgi_task(cycle, app)
        else:
            self._waits_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting, tell whoever works for this caller, and have counted what it sent ahead."""
        super().connection_lost(exc)
        self.port.go(self)
        if self._patience is not None:
            self._patience.cancel()
        if self._answering is not None:
            self._answering.leave()
        in_line = [cycle for cycle, _ in reversed(self.pipeline) if isinstance(cycle, _Cycle)]  # all of them are ours
        self.pipeline.clear()
        left = [cycle for cycle in in_line if cycle.brings_body]  # without one, no frame is lost
        for cycle in in_line:
            cycle.leave()
        if left:
            task = self.loop.create_task(_end_unanswered(left, self.app))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def resume_writing(self) -> None:
        """Go on writing; the other end has taken something."""
        super().resume_writing()
        self._stuck_since = None

    @property
    def peer(self) -> str:
        """Address of the other end."""
        return "" if self.client is None else self.client[0]

    @property
    def has_asked(self) -> bool:
        """Whether it brought a request."""
        return self.cycle is not None

    def waits_since(self) -> float | None:
        """Return since when it waits for a request to be complete; None where it is at work."""
        return self._waits_since

    def cut(self) -> None:
        """End it at once, and have the system forget what it holds for the other end as well."""
        wire = self.transport.get_extra_info("socket")
        if wire is not None:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words, which say less than ours
        """Answer what is no HTTP, where no other answer has begun, and hang up."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            request_id = uuid4().hex
            body = to_json(problem_document("caller_error", _NO_HTTP, request_id, None))
            head = (
                f"HTTP/1.1 400 Bad Request\r\nContent-Type: {PROBLEM_MEDIA_TYPE}\r\nContent-Length: {len(body)}\r\n"
                f"{REQUEST_ID_HEADER}: {request_id}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _overhear(self, rest: bytes) -> None:
        """Read a request once more without its offer of another protocol, and then what followed its head."""
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":  # which means another protocol whatever its headers say
            self.send_400_response("")
            return
        head = [method + b" " + self.url + b" HTTP/" + version.encode()]
        head += [name + b": " + value for name, value in self.headers if name not in _OFFERS]
        self.parser = httptools.HttpRequestParser(self)
        self._is_heard_again = True
        self.data_received(b"\r\n".join((*head, b"\r\n")) + rest)

    def _look(self) -> None:
        """Hang up where the next request has been waited for long enough, cut off who is too slow, and look again."""
        now = self.loop.time()
        why = self._why_cut(now)
        if why is not None:
            self.port.cut(self, why)
            return
        wait_s = LOOKED_EVERY_S
        if self._waits_since is not None:
            left_s = self._waits_since + self.timeout_keep_alive - now
            if left_s <= 0:
                self.timeout_keep_alive_handler()  # which waits for what was not taken yet
            else:
                wait_s = min(wait_s, left_s)
        self._patience = self.loop.call_later(wait_s, self._look)

    def _why_cut(self, now: float) -> Cut | None:
        """Say what keeps the connection from going on, if it is the other end and has been for too long.

        What is not sent yet gets less only once much of the system's own buffer is free, and later still under TLS; so
        a reader is known by what its system has acknowledged.
        """
        unsent_bytes = self.transport.get_write_buffer_size()
        acknowledged_bytes = _acknowledged_bytes(self.transport) if unsent_bytes else 0
        if not unsent_bytes:
            self._stuck_since = None
        elif (
            self._stuck_since is None
            or unsent_bytes < self._unsent_bytes
            or acknowledged_bytes > self._acknowledged_bytes
        ):
            self._stuck_since = now
        self._unsent_bytes, self._acknowledged_bytes = unsent_bytes, acknowledged_bytes
        if self._stuck_since is not None and now - self._stuck_since >= UNREAD_S:
            return "unread_answer"
        if self._is_in_head and self._waits_since is not None:
            return "slow_head" if now - max(self._came_at, self._waits_since) >= HEAD_S else None
        return None


def _acknowledged_bytes(transport: asyncio.Transport) -> int:
    """Return how many bytes the other end's system has taken so far, those of TLS included; 0 where nobody tells."""
    wire = transport.get_extra_info("socket")
    if sys.platform != "linux" or wire is None:
        return 0
    try:
        known = wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKNOWLEDGED.size)
    except OSError:  # no TCP, or closed already
        return 0
    return int(_ACKNOWLEDGED.unpack(known)[0]) if len(known) == _ACKNOWLEDGED.size else 0


class _Cycle(RequestResponseCycle):
    """One request and its answer; a `Connection` to whoever works for it."""

    def __init__(
        self, *, connection: BoundedProtocol, came_at: float, clock: Callable[[], float], **known: Any
    ) -> None:
        super().__init__(**known)
        self._connection = connection
        self._came_at = came_at
        self._clock = clock
        self._wire: asyncio.Transport = known["transport"]
        self._together = self.transport = _Together(self._wire)  # type: ignore[assignment]  # all that is asked of one
        self._pieces: list[bytes] = []
        self._bytes = 0
        self._is_length_known = b"content-length" in [name for name, _ in self.scope["headers"]]
        self._waits_for_all = False
        self._is_wanted = True
        self._when_left: Callable[[], None] | None = None
        self.scope["extensions"] = {CONNECTION_EXTENSION: self}  # type: ignore[dict-item]  # ASGI knows tables alone

    @property
    def brings_body(self) -> bool:
        """Whether a body has come, of which nothing was read yet, or is to come."""
        return self.more_body or self._bytes > 0

    def take(self, piece: bytes) -> None:
        """Take a piece of the body, and wake whoever reads it unless it waits for all of it."""
        if not self._is_wanted:
            return
        self._pieces.append(piece)
        self._bytes += len(piece)
        if not self._waits_for_all:
            self.message_event.set()

    def hold_back(self) -> None:
        """Take no more for as long as nobody reads a body of which much has come, and more is to come."""
        is_read = self._waits_for_all or not self._is_wanted  # by somebody, or to be thrown away
        if self._bytes > HIGH_WATER_LIMIT and self.more_body and not is_read:
            self.flow.pause_reading()

    def _throw_away(self) -> None:
        """Keep nothing of the body that has come, nor of what still comes: its memory counts as given back."""
        self._is_wanted, self._pieces, self._bytes = False, [], 0

    def leave(self) -> None:
        """Tell whoever works for the caller that it has left."""
        self._throw_away()
        if self.response_complete:
            return
        self.disconnected = True
        self.message_event.set()
        if self._when_left is not None:
            self._when_left()

    def watch(self, when_left: Callable[[], None] | None) -> bool:
        """Have somebody told when the caller leaves, or nobody any more, and return whether it has left already."""
        self._when_left = when_left
        return self.disconnected

    def age_s(self) -> float:
        """Return how long ago the first byte of the request came."""
        return self._clock() - self._came_at

    def has_body(self) -> bool:
        """Tell whether all of the body is there."""
        return not (self.more_body or self.disconnected)

    async def receive(self) -> Any:
        """Return the body, or the next piece of it where nobody knows how long it will be."""
        if self.waiting_for_100_continue and not self._wire.is_closing():
            self._wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        # Whoever reads a body of known length has found that it may be so long.
        self._waits_for_all = self._is_length_known
        if self._waits_for_all and self.more_body:
            self.message_event.clear()
        if self._is_wanted:
            self.flow.resume_reading()
            try:
                await self.message_event.wait()
            except asyncio.CancelledError:  # whoever read it has no more time
                self._throw_away()
                raise
            self.message_event.clear()
        if not self._is_wanted:
            return {"type": "http.disconnect"}
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces, self._bytes = [], 0
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    def answer(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bool:
        """Send a whole answer of known length, as `send` does in two steps with more questions.

        Returns:
            False where that has to wait, because the caller does not read what it was sent, or because it is so large
            that it may have to; then nothing is sent.
        """
        if self.flow.write_paused or len(body) > _PIECE_BYTES:
            return False
        if self.disconnected:
            return True
        lines = [STATUS_LINE[status]]
        for name, value in (*self.default_headers, *headers):
            if b"\n" in value or b"\r" in value:
                raise RuntimeError("a header of ours has a line's end in it")
            lines += (name, b": ", value, b"\r\n")
            if name == b"connection" and value == b"close":
                self.keep_alive = False
        lines += (b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n", body)
        self.response_started = self.response_complete = True
        self._throw_away()
        self._wire.write(b"".join(lines))
        self.message_event.set()
        if not self.keep_alive:
            self._wire.close()
        self.on_response()
        return True

    async def send(self, message: Any) -> None:
        """Send an answer's head or the next part of its body."""
        body: bytes = message.get("body", b"")
        if len(body) <= _PIECE_BYTES:
            await self._send(message)
            return
        self._connection.port.take_answer(self._connection, len(body))
        try:
            for begin in range(0, len(body), _PIECE_BYTES):
                end = begin + _PIECE_BYTES
                is_last = end >= len(body) and not message.get("more_body", False)
                await self._send(message | {"body": body[begin:end], "more_body": not is_last})
        finally:
            self._connection.port.has_taken_answer(self._connection)

    async def _send(self, message: Any) -> None:
        """Send one message, once there is room for it."""
        await super().send(message)
        if self.response_complete:
            self._throw_away()
        if message["type"] == "http.response.body":
            self._together.flush()


async def _end_unanswered(left: Iterable[_Cycle], app: Any) -> None:
    """Have requests that stood in line when their caller left end as every one does that is left, and so be counted.

    They end where their body is asked for: one after the other, with whatever else is due between them.
    """
    for cycle in left:
        await cycle.run_asgi(app)
        await asyncio.sleep(0)


class _Together:
    """A transport that holds an answer's head back until its body, or the first of it, is there."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held: bytes | None = None
        self._has_begun = False

    def write(self, data: bytes) -> None:
        """Write; the first time, soon."""
        if self._has_begun:
            self._transport.write(data if self._held is None else self._held + data)
            self._held = None
        else:
            self._has_begun, self._held = True, data

    def flush(self) -> None:
        """Write what was held back: an answer without a body ends with its head."""
        if self._held is not None:
            self._transport.write(self._held)
            self._held = None

    def close(self) -> None:
        """Write what was held back, and hang up."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Tell whether nothing more can be written."""
        return self._transport.is_closing()
