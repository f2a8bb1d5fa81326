"""HTTP/1.1 as uvicorn speaks it on h11, with what an open port needs besides; one object a connection.

Uvicorn bounds neither how long a head may take to arrive nor what an idle connection costs, and answers what is no
HTTP in plain text. Here heads are bounded in bytes (by h11) and in time, and whoever sends something else is told so in
a problem document with `NO_VERDICT`. The faster parser of httptools is not taken: it drops the body of a request that
offers another protocol, as Java's own client does with every request, and it takes heads of any size.
"""

import asyncio
from uuid import uuid4

import h11
from pydantic_core import to_json
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.routes.problems import PROBLEM_MEDIA_TYPE, REQUEST_ID_HEADER, problem_document

MAX_HEAD_BYTES = 64 * 2**10

_NO_HTTP = (
    "This is no HTTP/1.1 request, or its head is larger than 64 KiB; look at what lies between camera and service."
)


class BoundedProtocol(H11Protocol):
    """A connection whose next request must have arrived, head complete, within the time of keep-alive."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Start waiting for the first request."""
        super().connection_made(transport)
        self._wait_for_request()

    def data_received(self, data: bytes) -> None:
        """Take bytes; a complete head ends the wait, half of one does not."""
        super().data_received(data)
        if self._is_answering:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Start waiting for the next request."""
        super().on_response_complete()
        self._stop_waiting()
        if not (self._is_answering or self.transport.is_closing()):
            self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._stop_waiting()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words, which say less than ours
        """Answer what is no HTTP, where no other answer has begun, and hang up."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            request_id = uuid4().hex
            body = to_json(problem_document("caller_error", _NO_HTTP, request_id, None))
            head = (
                f"HTTP/1.1 400 Bad Request\r\nContent-Type: {PROBLEM_MEDIA_TYPE}\r\nContent-Length: {len(body)}\r\n"
                f"{REQUEST_ID_HEADER}: {request_id}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _should_upgrade(self) -> bool:
        return False  # HTTP/1.1 goes on; offers of other protocols need no line in the log

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_request(self) -> None:
        self._patience = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
