"""Connections whose waits end together, at one instant of the caller's, however many waits there are.

A timeout of httpcore bounds one wait for one piece. Whoever gets a byte now and then, or sends a large frame over a
slow network, begins another wait with each piece and is bounded by nothing. Here every wait gets what is left.

The system looks names up for as long as it likes, and nothing can stop it. So that is done beside: by one thread a name
at most, however many wait for it, and what comes too late for all of them is there for the next one who asks.

The one importer of httpcore.
"""

import ipaddress
import math
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import httpcore

# A wait to send ends with its piece: large enough to cost nothing, and small enough to end soon.
_PIECE_BYTES = 64 * 2**10
_KEEP_ALIVE_S = 5.0
# What a name led to so long ago is looked up anew.
_FRESH_S = 60.0

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
        self._names = _Names()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = self._names.look_up(host, port, _left_s(timeout, httpcore.ConnectTimeout))
        for address in addresses[:-1]:
            try:
                return self._connect(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue  # nobody is there, but perhaps at the next one
        return self._connect(addresses[-1], port, timeout, local_address, socket_options)

    def _connect(
        self,
        address: str,
        port: int,
        timeout: float | None,
        local_address: str | None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None,
    ) -> httpcore.NetworkStream:
        left_s = _left_s(timeout, httpcore.ConnectTimeout)
        return _Stream(self._plain.connect_tcp(address, port, left_s, local_address, socket_options))


class _Names:
    """Looks up where hosts are, and waits for it only as long as the caller can."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[tuple[str, int], _Lookup] = {}

    def look_up(self, host: str, port: int, timeout: float | None) -> list[str]:
        """Return a host's numeric addresses, at least one, in the system's order.

        Raises:
            httpcore.ConnectTimeout: if that takes longer than the timeout, in seconds.
            httpcore.ConnectError: if there is none.
        """
        if _is_address(host):
            return [host]
        with self._lock:
            lookup = self._under_way.get((host, port))
            if lookup is None or lookup.is_stale:
                lookup = self._under_way[host, port] = _Lookup(host, port)
        try:
            addresses = lookup.found.result(timeout)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(f"{host} was not found in time") from error
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(str(error)) from error
        with self._lock:
            if self._under_way.get((host, port)) is lookup:
                del self._under_way[host, port]  # so that the next one looks anew
        return addresses


class _Lookup:
    """One look for a host, in a thread that does not keep the process from ending.

    Attributes:
        found: numeric addresses.
    """

    def __init__(self, host: str, port: int) -> None:
        self.found: Future[list[str]] = Future()
        self._host = host
        self._port = port
        self._ended_at = math.inf
        threading.Thread(target=self._look, name="flawline-look-up", daemon=True).start()

    @property
    def is_stale(self) -> bool:
        """Whether it found nothing, or so long ago that it may hold no more."""
        if not self.found.done():
            return False
        return self.found.exception() is not None or time.monotonic() - self._ended_at > _FRESH_S

    def _look(self) -> None:
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            addresses = [_numeric(entry[4]) for entry in found]
        except BaseException as error:  # noqa: BLE001 - the thread's edge: it is told to those who wait
            self._ended_at = time.monotonic()
            self.found.set_exception(error)
        else:
            self._ended_at = time.monotonic()
            self.found.set_result(addresses)


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


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _numeric(place: tuple[Any, ...]) -> str:
    """Return a socket's address as text, with the interface that a link-local one needs."""
    return socket.getnameinfo(place, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]


def _left_s(timeout: float | None, over: type[Exception]) -> float | None:
    """Return how long the next wait may take; raises what is `over` where nothing is left."""
    left_s = _ends_at.get() - time.monotonic()
    if left_s <= 0:
        raise over("the time is over")
    if left_s == math.inf:
        return timeout
    return left_s if timeout is None else min(timeout, left_s)
