"""Every request's id and the time of its arrival; the id is the caller's own where it has one that fits."""

import os
import re
from collections.abc import Callable, Iterable

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.routes.context import connection_of
from service.routes.problems import REQUEST_ID_HEADER

_HEADER = REQUEST_ID_HEADER.lower().encode()
_FITS = re.compile(rb"[!#-\[\]-~]{1,128}")  # printable ASCII without space, quote and backslash


class Identity:
    """Gives every request its id and the time of its arrival, and echoes the id.

    Args:
        app: answers.
        clock: monotonic seconds.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float]) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = identify(scope, self._clock())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = with_id(message["headers"], request_id)
            await send(message)

        await self._app(scope, receive, send_with_id)


def identify(scope: Scope, now: float) -> bytes:
    """Note in a scope when the request came, and its id, which is returned; one that does not fit is replaced.

    It came with its first byte where the server tells when that was, and `now` elsewhere.
    """
    connection = connection_of(scope)
    received_at = now if connection is None else now - connection.age_s()
    shown = dict(reversed(scope["headers"])).get(_HEADER)  # of two the first counts
    request_id = shown if shown is not None and _FITS.fullmatch(shown) else os.urandom(16).hex().encode()
    scope.setdefault("state", {}).update(request_id=request_id.decode(), received_at=received_at)
    return request_id


def received_at_of(request: Request) -> float:
    """Return when a request came."""
    received_at: float = request.scope["state"]["received_at"]
    return received_at


def with_id(headers: Iterable[tuple[bytes, bytes]], request_id: bytes) -> list[tuple[bytes, bytes]]:
    """Return an answer's headers with the id of its request."""
    return [*[header for header in headers if header[0] != _HEADER], (_HEADER, request_id)]
