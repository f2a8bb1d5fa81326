"""Answers that nobody takes, over real sockets: their connection is cut off, and a slow reader gets all of its own."""

import select
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic
from typing import Any

import pytest
import trustme
import uvicorn

from service import protocol
from service.ports.connections import Connections
from service.protocol import BoundedProtocol
from tests.servers import PATIENCE_S, wait_until

LARGE = 24 * 2**20  # more than the buffers of both systems take
GET = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"


async def answer_at_length(_scope: Any, _receive: Any, send: Any) -> None:
    """Answer with many bytes."""
    headers = [(b"content-length", b"%d" % LARGE)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": bytes(LARGE)})


class Served:
    """A server, and what it tells of its connections.

    Args:
        server: that runs.
        context: of its callers, where they speak TLS.
        told: why connections were cut off, so far.
    """

    def __init__(self, server: uvicorn.Server, context: ssl.SSLContext | None, told: list[str]) -> None:
        self.told = told
        self.server = server
        self._context = context

    def connect(self) -> socket.socket:
        """Return a connection that takes little ahead of its reader."""
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.settimeout(PATIENCE_S)
        plain.connect(self.server.servers[0].sockets[0].getsockname())
        return plain if self._context is None else self._context.wrap_socket(plain, server_hostname="test")

    def connections(self) -> int:
        """Return how many connections are open."""
        return len(self.server.server_state.connections)


@pytest.fixture(params=["plain", "TLS"])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Serve with little patience."""
    monkeypatch.setattr(protocol, "UNREAD_S", 0.5)
    monkeypatch.setattr(protocol, "LOOKED_EVERY_S", 0.1)
    with _serving(is_secret=request.param == "TLS", most_unread_bytes=2**30) as served:
        yield served


@contextmanager
def _serving(*, is_secret: bool, most_unread_bytes: int) -> Iterator[Served]:
    secret: dict[str, Any] = {}
    context = None
    if is_secret:
        authority = trustme.CA()
        of_server, context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
        authority.issue_cert("test").configure_cert(of_server)
        authority.configure_trust(context)
        secret = {"ssl_context_factory": lambda *_: of_server}
    told: list[str] = []
    port = Connections(monotonic, tell=told.append, most_unread_bytes=most_unread_bytes)
    speak: Any = partial(BoundedProtocol, port=port)
    known: dict[str, Any] = {"port": 0, "http": speak, "ws": "none", "lifespan": "off", "log_config": None, **secret}
    server = uvicorn.Server(uvicorn.Config(answer_at_length, **known))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, "the start")
        yield Served(server, context, told)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)


def test_answer_when_nothing_of_it_is_taken_then_its_connection_is_cut_off(served):
    """Memory of an answer that nobody reads is given back, whatever is kept open at the other end."""
    with served.connect() as connection:
        connection.sendall(GET)

        wait_until(lambda: served.told == ["unread_answer"], "the end of patience")
        wait_until(lambda: served.connections() == 0, "the end of the connection")
        left = 0
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                left += len(piece)
        assert left < 2**18  # what lay at this end; the server's system keeps nothing either


@pytest.mark.parametrize("served", ["plain"], indirect=True)  # of TLS, the event loop bounds it: half a minute
def test_answer_when_the_caller_hangs_up_after_it_but_takes_nothing_then_its_connection_is_cut_off(served):
    """Closing waits for what was written, and not for ever."""
    with served.connect() as connection:
        connection.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        received = 0
        while received < LARGE - 300_000:  # what is left lies in buffers, and the server has closed its end
            received += len(connection.recv(min(65536, LARGE - 300_000 - received)))

        wait_until(lambda: served.connections() == 0, "the end of the connection")


def test_answer_when_it_is_taken_slowly_then_comes_whole(served):
    """A reader that rests, but for less than the patience, is no thief of memory."""
    with served.connect() as connection:
        connection.sendall(GET)
        received, rests = 0, 0
        while received < LARGE:
            received += len(connection.recv(65536))
            if received > (rests + 1) * LARGE // 8:
                rests += 1
                select.select([], [], [], 0.1)

    assert served.told == []


def test_answer_when_it_is_taken_steadily_but_in_little_bits_then_comes_whole(served):
    """Bits that do not make the server's system ask for more are taken all the same."""
    with served.connect() as connection:
        connection.sendall(GET)
        received = _take_bits(connection, 4 * protocol.UNREAD_S)
        while received < LARGE and (piece := connection.recv(65536)):
            received += len(piece)

    assert received >= LARGE
    assert served.told == []


def test_answer_when_nothing_more_is_taken_after_little_bits_then_its_connection_is_cut_off(served):
    """Whoever has taken something of an answer is not waited for any longer because of that."""
    with served.connect() as connection:
        connection.sendall(GET)
        _take_bits(connection, 2 * protocol.UNREAD_S)
        told_while_taken = list(served.told)

        wait_until(lambda: served.told == ["unread_answer"], "the end of patience")
        wait_until(lambda: served.connections() == 0, "the end of the connection")
    assert told_while_taken == []


def _take_bits(connection: socket.socket, for_s: float) -> int:
    """Take a few bytes at a time, with rests between them, and return how many that were."""
    received, end = 0, monotonic() + for_s
    while monotonic() < end:
        received += len(connection.recv(4096))
        select.select([], [], [], 0.02)
    return received


def test_answers_when_they_are_more_than_may_be_under_way_then_the_oldest_goes():
    """Many answers that nobody takes are no more memory than one bound, before anybody's patience has ended."""
    with _serving(is_secret=False, most_unread_bytes=2 * LARGE) as served:
        connections = [served.connect() for _ in range(4)]
        for connection in connections:
            connection.sendall(GET)

        wait_until(lambda: served.told == ["unread_answer"] * 2, "room")
        wait_until(lambda: served.connections() == 2, "the end of two")
        for connection in connections:
            connection.close()
