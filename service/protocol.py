"""HTTP/1.1 as uvicorn speaks it on httptools, with what an open port needs besides; one object a connection.

Uvicorn bounds neither how large a head may grow nor how long it may take to arrive, drops the body of a request that
offers another protocol (as Java's own client does with every request), and answers what is no HTTP in plain text. Here
heads are bounded in bytes and in time, offers are overheard and the frame is judged, and whoever sends something else
is told so in a problem document with `NO_VERDICT`.

A request's time runs from the first byte of its head on, also while it stands in line behind the ones before it on its
connection. That byte is one that was read here: how long bytes lay in the kernel before, nobody tells.

The rest is for speed, because the service may take but a few per cent of what a frame takes: a body whose length is
told wakes its reader once, when it is complete, and not for each of its pieces; head and body of an answer leave in one
packet; one timer watches a connection for as long as it lives; and who works for a caller is told when it hangs up,
rather than having a task wait for that.
"""

import asyncio
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

import httptools
from pydantic_core import to_json
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.routes.context import CONNECTION_EXTENSION
from service.routes.problems import PROBLEM_MEDIA_TYPE, REQUEST_ID_HEADER, problem_document

MAX_HEAD_BYTES = 64 * 2**10

_NO_HTTP = (
    "This is no HTTP/1.1 request, or its head is larger than 64 KiB; look at what lies between camera and service."
)
# What offers another protocol; a request is read again without them.
_OFFERS = frozenset({b"upgrade", b"http2-settings", b"connection"})


class BoundedProtocol(HttpToolsProtocol):
    """A connection whose next request must have arrived, head complete, within the time of keep-alive."""

    _patience: asyncio.TimerHandle | None = None
    _waits_since: float | None = None
    _came_at = 0.0
    _is_heard_again = False
    _has_moved = False
    _kept_bytes = 0
    _answering: "_Cycle | None" = None
    cycle: "_Cycle"

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Start waiting for the first request."""
        super().connection_made(transport)
        self._waits_since = self.loop.time()
        self._look()

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
        self._is_heard_again = False

    def on_headers_complete(self) -> None:
        """Start answering, as uvicorn does, or stand in line behind the requests before this one."""
        if self.parser.should_upgrade():
            return
        if len(self.url) + sum(map(len, chain.from_iterable(self.headers))) > MAX_HEAD_BYTES:
            raise ValueError("the head is too large")
        self._has_moved, self._waits_since = True, None
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
        """Stop waiting, and tell whoever works for this caller."""
        super().connection_lost(exc)
        if self._patience is not None:
            self._patience.cancel()
        if self._answering is not None:
            self._answering.leave()

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
        """Hang up where the next head has been waited for long enough, else look again when it may be."""
        wait_s: float = self.timeout_keep_alive
        if self._waits_since is not None:
            wait_s += self._waits_since - self.loop.time()
            if wait_s <= 0:
                self.timeout_keep_alive_handler()
                return
        self._patience = self.loop.call_later(wait_s, self._look)


class _Cycle(RequestResponseCycle):
    """One request and its answer; a `Connection` to whoever works for it."""

    def __init__(self, *, came_at: float, clock: Callable[[], float], **known: Any) -> None:
        super().__init__(**known)
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
            False where that has to wait, because the caller does not read what it was sent; then nothing is sent.
        """
        if self.flow.write_paused:
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
        """Send an answer's head or the next piece of its body."""
        await super().send(message)
        if self.response_complete:
            self._throw_away()
        if message["type"] == "http.response.body":
            self._together.flush()


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
