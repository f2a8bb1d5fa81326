"""What bounded connections promise where the system is slow to say where a host is."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import pytest

from service.bounded_sockets import bounded_pool, waits_end_at
from service.client import Client, EncodedFrame
from service.contract.policy import Verdict
from tests.servers import PATIENCE_S, wait_until

HOST = "station.invalid"
GREETING = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
LISTENER = "127.0.0.1"
DEAF = "127.0.0.2"  # where nobody listens


class Names:
    """The system's look-ups of `HOST`, which a test holds; others are the system's own.

    Attributes:
        calls: how often `HOST` was looked up.
        found: what it leads to; an exception is raised.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.found: list[str] | Exception = [LISTENER]
        self.answered = threading.Event()
        self._system = socket.getaddrinfo

    def look_up(self, host: str, port: int, *arguments: Any, **options: Any) -> list[Any]:
        """Look a name up."""
        if host != HOST:
            return self._system(host, port, *arguments, **options)
        self.calls += 1
        assert self.answered.wait(PATIENCE_S)
        if isinstance(self.found, Exception):
            raise self.found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.found]


@pytest.fixture
def names(monkeypatch) -> Iterator[Names]:
    """Look-ups that are held until the test says so, and let go at its end."""
    held = Names()
    monkeypatch.setattr(socket, "getaddrinfo", held.look_up)
    yield held
    held.answered.set()
    wait_until(lambda: not _looking(), "the end of the look-ups")


@pytest.fixture
def pool() -> Iterator[httpcore.ConnectionPool]:
    """A pool of two connections."""
    with bounded_pool(httpcore.default_ssl_context(), 2) as connections:
        yield connections


@contextmanager
def _greeter(times: int) -> Iterator[int]:
    """Greet so many callers; yields the port."""
    with socket.create_server((LISTENER, 0)) as listening:

        def greet() -> None:
            for _ in range(times):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(GREETING)

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        thread.join(PATIENCE_S)


def _looking() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "flawline-look-up"]


def _ask(pool: httpcore.ConnectionPool, port: int, within_s: float) -> bytes:
    with waits_end_at(time.monotonic() + within_s):
        return pool.request("GET", f"http://{HOST}:{port}/").content


def test_pool_when_a_name_is_looked_up_for_long_then_callers_leave_in_time_and_one_thread_stays(names, pool):
    """However many ask, one look is under way, and it ends no later than it would have anyway."""
    with _greeter(1) as port:
        for _ in range(5):
            with pytest.raises(httpcore.ConnectTimeout):
                _ask(pool, port, 0.02)
        looking = len(_looking())
        names.answered.set()
        greeted = _ask(pool, port, PATIENCE_S)

    assert (looking, names.calls, greeted) == (1, 1, b"hi")


def test_pool_when_a_name_was_found_in_time_then_it_is_looked_up_again_for_the_next_connection(names, pool):
    """A host that moves is followed at once: what somebody has waited for is kept for nobody else."""
    names.answered.set()
    with _greeter(2) as port:
        for _ in range(2):
            _ask(pool, port, PATIENCE_S)

    assert names.calls == 2


def test_pool_when_a_name_was_found_too_late_and_long_ago_then_it_is_looked_up_anew(names, pool, monkeypatch):
    """What nobody has waited for is kept for a minute and no longer."""
    with _greeter(1) as port:
        with pytest.raises(httpcore.ConnectTimeout):
            _ask(pool, port, 0.02)
        names.found = [DEAF]
        names.answered.set()
        wait_until(lambda: not _looking(), "the end of the look-up")
        names.found = [LISTENER]
        later = time.monotonic() + 61
        monkeypatch.setattr(time, "monotonic", lambda: later)
        greeted = _ask(pool, port, PATIENCE_S)

    assert (names.calls, greeted) == (2, b"hi")


@pytest.mark.parametrize("fault", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label too long")])
def test_pool_when_a_name_leads_nowhere_then_it_is_told_and_not_remembered(names, pool, fault):
    """The next one who asks may find what this one did not."""
    names.answered.set()
    names.found = fault
    with _greeter(1) as port:
        with pytest.raises(httpcore.ConnectError, match=str(fault.args[-1])):
            _ask(pool, port, PATIENCE_S)
        names.found = [LISTENER]
        greeted = _ask(pool, port, PATIENCE_S)

    assert greeted == b"hi"


def test_pool_when_nobody_listens_at_the_first_address_then_the_next_is_tried(names, pool):
    """A name may lead to several places, as localhost does."""
    names.answered.set()
    names.found = [DEAF, LISTENER]
    with _greeter(1) as port:
        assert _ask(pool, port, PATIENCE_S) == b"hi"

    names.found = [DEAF, DEAF]
    with pytest.raises(httpcore.ConnectError):
        _ask(pool, port, PATIENCE_S)


def test_client_when_a_name_is_looked_up_for_long_then_the_deadline_holds(names):
    """A name server that hangs costs the part its verdict and the station no time."""
    with Client(f"http://{HOST}:9") as client:
        outcome = client.inspect("demo_line", EncodedFrame(b"frame", "image/png"), deadline_ms=100)

    assert outcome.verdict is Verdict.NO_VERDICT
    assert outcome.problem is not None
    assert outcome.problem.code == "not_reachable"
    assert outcome.elapsed_ms < 1000 * PATIENCE_S / 2
    assert names.calls == 1
