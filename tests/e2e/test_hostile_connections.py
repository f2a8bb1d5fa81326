"""What arrives on a port besides well-behaved requests, over raw sockets: it survives, and says NO_VERDICT."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest

from service.protocol import MAX_HEAD_BYTES
from tests.factories import encode, make_bundle, make_frame
from tests.servers import PATIENCE_S, ServerProcess

GOOD = encode(make_frame())
OFFER = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    """A ready server."""
    store = tmp_path_factory.mktemp("store")
    make_bundle(store)
    with ServerProcess(store) as process:
        yield process.ready()


def _request(path: str = "/v1/lines/demo_line/inspect", more: str = "", length: object = len(GOOD)) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n{more}\r\n"
    return head.encode("latin-1") + GOOD


def _connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(server.url).port), timeout=PATIENCE_S)


def _answer(connection: socket.socket) -> tuple[int, dict[str, str], dict[str, object]]:
    """Read one answer with its length told."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += connection.recv(65536)
    return int(status.split()[1]), headers, json.loads(body)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS greeting\r\n\r\n",
        _request(length="-5"),
        _request(length="many"),
        _request(more="Transfer-Encoding: gzip\r\n"),
        _request(more="X-Part-Id: a\x00b\r\n"),
        _request(more=f"X-Filler: {'a' * 2**17}\r\n")[: MAX_HEAD_BYTES + 1],
        _request(more="X-Filler: a\r\n" * 2**13)[: MAX_HEAD_BYTES + 1],
        _request(path="/" + "a" * 2**17)[: MAX_HEAD_BYTES + 1],
        b"CONNECT somewhere:443 HTTP/1.1\r\nHost: somewhere\r\n\r\n",
    ],
    ids=[
        *("TLS", "length", "no number", "coding", "control", "long header", "many headers", "long address"),
        "tunnel",
    ],
)
def test_request_when_it_is_no_http_then_a_problem_says_no_verdict_and_the_connection_ends(server, request_bytes):
    """What the parser refuses is answered in the form of every fault, with an id; a head is refused where it grows."""
    with _connect(server) as connection:
        connection.sendall(request_bytes)

        status, headers, problem = _answer(connection)

    assert (status, headers["content-type"]) == (400, "application/problem+json")
    assert (problem["code"], problem["verdict"]) == ("caller_error", "NO_VERDICT")
    assert problem["request_id"] == headers["x-request-id"]
    assert headers["connection"] == "close"


def test_request_when_it_offers_another_protocol_then_its_frame_is_judged_and_the_next_one_as_well(server):
    """Java's own client offers HTTP/2 with every request; the offer is not taken, and the body is not lost with it."""
    with _connect(server) as connection:
        answers = []
        for _ in range(2):
            connection.sendall(_request(more=OFFER))
            answers.append(_answer(connection))

    assert [(status, answer["verdict"]) for status, _, answer in answers] == [(200, "PASS")] * 2


def test_request_when_it_waits_for_100_continue_then_it_gets_it_before_the_body_is_sent(server):
    """Curl asks before it sends a large body; the question is answered, and then the frame."""
    head, _, body = _request(more="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    with _connect(server) as connection:
        connection.sendall(head + b"\r\n\r\n")
        told = connection.recv(1024)
        connection.sendall(body)

        status, _, answer = _answer(connection)

    assert told.startswith(b"HTTP/1.1 100 ")
    assert (status, answer["verdict"]) == (200, "PASS")


def test_requests_when_sent_ahead_of_their_answers_then_answered_in_order(server):
    """Pipelined frames are answered one after the other, each as itself."""
    with _connect(server) as connection:
        connection.sendall(_request(more="X-Part-Id: first\r\n") + _request(more="X-Part-Id: second\r\n"))
        received = b""
        while received.count(b'"timings_ms"') < 2:
            received += connection.recv(65536)

    assert received.index(b'"part_id":"first"') < received.index(b'"part_id":"second"')


def test_cameras_when_idle_connections_take_every_place_then_are_served_and_probes_are_answered(tmp_path):
    """Who opens connections and sends next to nothing makes room for whoever comes; that is counted, and in the log."""
    make_bundle(tmp_path)
    bounds = {"FLAWLINE_MAX_CONNECTIONS": "32", "FLAWLINE_HEALTH_PORT": "0"}
    with ServerProcess(tmp_path, bounds) as crowded, ExitStack() as opened:
        crowded.ready()
        port = next(event["port"] for event in crowded.events() if event["message"] == "health listening")
        probe = f"http://127.0.0.1:{port}/healthz/live"
        for url in [crowded.url] * 100 + [probe] * 200:
            address = ("127.0.0.1", urlsplit(url).port)
            connection = opened.enter_context(socket.create_connection(address, timeout=PATIENCE_S))
            connection.sendall(b"G")

        with _connect(crowded) as connection:
            connection.sendall(_request())
            status, _, answer = _answer(connection)
        live = httpx.get(probe, timeout=PATIENCE_S)
        metrics = httpx.get(f"{crowded.url}/metrics", timeout=PATIENCE_S).text

    assert (status, answer["verdict"], live.status_code) == (200, "PASS", 200)
    cut = float(metrics.partition('flawline_connections_cut_total{reason="no_room"} ')[2].partition("\n")[0])
    assert cut >= 100 - 32 + 200 - 64
    assert any(event["message"] == "connections were cut off" for event in crowded.events())


def test_server_when_it_may_open_few_files_then_it_takes_as_many_as_it_may(tmp_path):
    """What a shell leaves by default bounds nobody; the hard limit does, and more connections than that are refused."""
    make_bundle(tmp_path)
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1024))"
    with ServerProcess(tmp_path, before=few) as server:
        server.ready()
        assert server.most_files() == 1024

    with pytest.raises(AssertionError, match="MAX_CONNECTIONS: 513 connections need twice as many"):
        ServerProcess(tmp_path, {"FLAWLINE_MAX_CONNECTIONS": "513"}, before=few)


def test_address_when_it_ends_in_a_slash_then_404_and_no_redirect(server):
    """A redirect would lose the verdict to clients that do not follow, and repeat a host that the caller made up."""
    with _connect(server) as connection:
        connection.sendall(_request(path="/v1/lines/demo_line/inspect/"))

        status, headers, problem = _answer(connection)

    assert (status, problem["code"], problem["verdict"]) == (404, "not_found", "NO_VERDICT")
    assert "location" not in headers
