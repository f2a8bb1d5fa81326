"""Connections whose waits end together, at one instant of the caller's, however many waits there are.

A timeout of httpcore bounds one wait for one piece. Whoever gets a byte now and then, or sends a large frame over a
slow network, begins another wait with each piece and is bounded by nothing. Here every wait gets what is left.
Only looking up a host's name keeps its own bounds, those of the system.

The one importer of httpcore.
"""

import math
import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import httpcore

# A wait to send ends with its piece: large enough to cost nothing, and small enough to end soon.
_PIECE_BYTES = 64 * 2**10
_KEEP_ALIVE_S = 5.0

_ends_at: ContextVar[float] = ContextVar("_ends_at", default=math.inf)


@contextmanager
def waits_end_at(instant: float) -> Iterator[None]:
    """Let every wait of this thread for a connection of a bounded pool end then; `instant` is of `time.monotonic`."""
    token = _ends_at.set(instant)
    try:
        yield
    finally:
        _ends_at.reset(token)


def bounded_pool(context: ssl.SSLContext, connections: int) -> httpcore.ConnectionPool:
    """Return a pool of connections that `waits_end_at` bounds.

    Args:
        context: of TLS.
        connections: at most, and as many kept open.
    """
    return httpcore.ConnectionPool(
        ssl_context=context,
        max_connections=connections,
        max_keepalive_connections=connections,
        keepalive_expiry=_KEEP_ALIVE_S,
        network_backend=_Backend(),
    )


class _Backend(httpcore.NetworkBackend):
    """Opens bounded connections."""

    def __init__(self) -> None:
        self._plain = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        left_s = _left_s(timeout, httpcore.ConnectTimeout)
        return _Stream(self._plain.connect_tcp(host, port, left_s, local_address, socket_options))


class _Stream(httpcore.NetworkStream):
    """A connection whose every wait is bounded by what is left."""

    def __init__(self, plain: httpcore.NetworkStream) -> None:
        self._plain = plain

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._plain.read(max_bytes, _left_s(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for begin in range(0, len(buffer), _PIECE_BYTES):
            piece = buffer[begin : begin + _PIECE_BYTES]
            self._plain.write(piece, _left_s(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._plain.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left_s = _left_s(timeout, httpcore.ConnectTimeout)
        return _Stream(self._plain.start_tls(ssl_context, server_hostname, left_s))

    def get_extra_info(self, info: str) -> Any:
        return self._plain.get_extra_info(info)


def _left_s(timeout: float | None, over: type[Exception]) -> float | None:
    """Return how long the next wait may take; raises what is `over` where nothing is left."""
    left_s = _ends_at.get() - time.monotonic()
    if left_s <= 0:
        raise over("the time is over")
    if left_s == math.inf:
        return timeout
    return left_s if timeout is None else min(timeout, left_s)
