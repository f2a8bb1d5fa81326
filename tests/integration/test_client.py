"""What the client promises: real servers give real answers, and everything else in the world is `NO_VERDICT`."""

import asyncio
import json
import math
import os
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Any

import httpx
import numpy as np
import pytest

from service.client import AsyncClient, Client, ClientFault, EncodedFrame, Frame, Outcome, RawFrame
from service.contract.policy import Verdict
from service.settings import Settings
from tests.factories import encode, make_bundle, make_frame, make_policy, make_self_policy, network_of, write_policy
from tests.servers import held_engine, serve_in_thread, wait_until_ready

GOOD = EncodedFrame(encode(make_frame()), "image/png")
DEFECT = EncodedFrame(encode(make_frame(defect=True)), "image/png")
PASSING = b'{"verdict":"PASS"'
KINDS = ("sync", "async")

Answer = bytes | Callable[[bytes], bytes]  # the latter gets the head of the request


class Unforeseen(os.PathLike[str]):
    """A path that fails as no path should."""

    def __fspath__(self) -> str:
        """Fail."""
        raise LookupError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of one line."""
    place = tmp_path_factory.mktemp("store")
    make_bundle(place)
    return place


@pytest.fixture(scope="module")
def url(store) -> Iterator[str]:
    """Of a ready server."""
    with serve_in_thread(Settings(store_directory=store)) as http:
        wait_until_ready(http)
        yield str(http.base_url)


@pytest.fixture(scope="module")
def passing(url) -> dict[str, Any]:
    """What a real server says of a good part that nothing was said about."""
    with httpx.Client(base_url=url) as http:
        path, headers = "/v1/lines/demo_line/inspect", {"Content-Type": "image/png"}
        answer: dict[str, Any] = http.post(path, content=GOOD.data, headers=headers).json()
        return answer


def _ask(kind: str, url: str, *frames: Frame, **options: Any) -> list[Outcome]:
    """Inspect one frame after the other with one client."""

    async def ask() -> list[Outcome]:
        async with AsyncClient(url) as client:
            return [await client.inspect("demo_line", frame, **options) for frame in frames]

    if kind == "async":
        return asyncio.run(ask())
    with Client(url) as client:
        return [client.inspect("demo_line", frame, **options) for frame in frames]


@contextmanager
def _stranger(*answers: Answer) -> Iterator[tuple[str, list[bytes]]]:
    """Serve fixed bytes, one answer a connection, whatever is asked; yields the address and what was asked."""
    with _strangers(*((answer,) for answer in answers)) as served:
        yield served


@contextmanager
def _strangers(*connections: tuple[Answer, ...]) -> Iterator[tuple[str, list[bytes]]]:
    """Serve the answers of one connection after the other; yields the address and what was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer_all() -> None:
            for answers in connections:
                connection, _ = listening.accept()
                with connection, suppress(ConnectionError):  # of a client that has read enough
                    for answer in answers:
                        asked.append(_read_request(connection))
                        connection.sendall(answer if isinstance(answer, bytes) else answer(asked[-1]))
            listening.close()

        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=answer_all, daemon=True)
        thread.start()
        yield address, asked


def _read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionError
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(
        next((line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), b"0")
    )
    while len(body) < length:
        body += connection.recv(65536)
    return head


def _told(
    answer: dict[str, Any], *, keeps: bool = False, status: str = "200 OK", blanks: int = 0, **changes: Any
) -> Callable[[bytes], bytes]:
    """Return what answers every request with an answer that was changed, as the answer to that request.

    So many blanks, which JSON allows, come before it.
    """

    def tell(head: bytes) -> bytes:
        told = answer | {"request_id": _header(head, b"x-request-id").decode()} | changes
        body = b" " * blanks + json.dumps(told).encode()
        return _http(status, body, Connection="keep-alive" if keeps else "close")

    return tell


def _http(status: str, body: bytes, **headers: str) -> bytes:
    headers = {"Connection": "close", **headers}
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize("kind", KINDS)
def test_client_when_the_camera_noted_a_digest_then_what_was_lost_since_has_no_verdict(url, kind):
    """A frame of a format that notices nothing gets a verdict as it was written, and none once its end is zeros."""
    pixels = make_frame(defect=True)
    whole = encode(pixels, "BMP")
    digest = sha256(whole).hexdigest()
    damaged = whole[:2000] + bytes(len(whole) - 2000)

    one, other = _ask(
        kind,
        url,
        EncodedFrame(whole, "image/bmp", digest=digest),
        EncodedFrame(damaged, "image/bmp", digest=digest),
    )

    assert one.verdict is Verdict.FAIL
    assert other.verdict is Verdict.NO_VERDICT
    assert other.problem is not None
    assert (other.problem.code, other.tries) == ("unreadable_frame", 1)


@pytest.mark.parametrize("frame", [GOOD, RawFrame(make_frame())], ids=["encoded", "raw"])
@pytest.mark.parametrize("kind", KINDS)
def test_client_when_nobody_noted_a_digest_then_it_tells_that_of_what_it_sends(passing, kind, frame):
    """Whatever changes a frame between client and server is noticed."""
    content = frame.data if isinstance(frame, EncodedFrame) else frame.pixels.tobytes()
    with _stranger(_told(passing)) as (address, asked):
        _ask(kind, address, frame)

    told = b"sha-256=:" + b64encode(sha256(content).digest()) + b":"
    assert _header(asked[0], b"content-digest") == told


@pytest.mark.parametrize("digest", ["", "ab", "g" * 64, 7], ids=["empty", "too short", "no digits", "no text"])
def test_client_when_a_digest_can_be_none_then_the_part_has_no_verdict(digest):
    """A digest that nothing could fit is told before anything is sent."""
    [outcome] = _ask("sync", "http://127.0.0.1:9", EncodedFrame(GOOD.data, "image/png", digest=digest))

    assert outcome.problem is not None
    assert (outcome.problem.code, outcome.tries) == ("frame_unreadable", 0)
    assert "64 hexadecimal digits" in outcome.problem.sentence


@pytest.mark.parametrize(("frame", "verdict"), [(GOOD, Verdict.PASS), (DEFECT, Verdict.FAIL)], ids=["good", "defect"])
def test_client_when_a_frame_is_inspected_then_the_answer_is_the_servers(url, frame, verdict):
    """Both clients return the verdict with the whole typed answer, about the part that was named."""

    async def ask() -> Verdict:
        async with AsyncClient(url) as client:
            return (await client.inspect("demo_line", frame)).verdict

    with Client(url) as client:
        outcome = client.inspect("demo_line", frame, part_id="part 7", sequence=3)

    assert (outcome.verdict, outcome.problem, outcome.tries) == (verdict, None, 1)
    assert outcome.answer is not None
    assert (outcome.answer.part_id, outcome.answer.sequence) == ("part 7", 3)
    assert asyncio.run(ask()) is verdict


def test_client_when_the_frame_is_a_file_or_pixels_then_the_score_is_the_same(url, tmp_path):
    """A PNG file, its bytes and its raw pixels are the same frame."""
    pixels = make_frame(defect=True)
    file = tmp_path / "frame.png"
    file.write_bytes(encode(pixels))

    with Client(url) as client:
        outcomes = [client.inspect("demo_line", frame) for frame in (file, str(file), DEFECT, RawFrame(pixels))]

    assert len({outcome.answer.score for outcome in outcomes if outcome.answer}) == 1
    assert all(outcome.answer for outcome in outcomes)


@pytest.mark.parametrize(
    ("pixels", "seen"),
    [(make_frame(40, 50)[:, :, 0], 40), (make_frame(41, 50)[:, :, 0].astype(np.uint16) * 256, 41)],
    ids=["mono8", "mono16"],
)
def test_client_when_pixels_are_grey_then_their_depth_is_told(url, pixels, seen):
    """Grey frames travel as the sensor gave them, 8 or 16 bits."""
    with Client(url) as client:
        outcome = client.inspect("demo_line", RawFrame(pixels))

    assert outcome.answer is not None
    assert outcome.answer.frame.height == seen


def test_client_when_a_heatmap_was_asked_for_then_it_can_be_fetched(url):
    """The overlay is there under the inspection's id, and a wrong id is a fault with a sentence."""
    with Client(url) as client:
        outcome = client.inspect("demo_line", DEFECT, heatmap="overlay")
        assert outcome.answer is not None
        picture = client.heatmap(outcome.answer.inspection_id)
        with pytest.raises(ClientFault, match="kept"):
            client.heatmap("0" * 32)

    assert picture.startswith(b"\x89PNG")


def test_client_when_it_asks_for_lines_then_they_are_typed(url):
    """The list of lines says how each one stands."""
    with Client(url) as client:
        [line] = client.lines()

    assert (line.line, line.state) == ("demo_line", "ready")


@pytest.mark.parametrize(
    ("line", "frame", "options", "code"),
    [
        ("no_such_line", GOOD, {}, "unknown_line"),
        ("demo_line", EncodedFrame(b"no image", "image/png"), {}, "unreadable_frame"),
        ("demo_line", EncodedFrame(GOOD.data, "text/plain"), {}, "media_type_not_allowed"),
        ("demo_line", GOOD, {"policy": "unheard_of"}, "unknown_policy"),
        ("../../healthz/live", GOOD, {}, "parameter_invalid"),
        ("demo_line", GOOD, {"part_id": "Teil ä"}, "parameter_invalid"),
        ("demo_line", GOOD, {"part_id": "a\r\nX-Policy: lenient"}, "parameter_invalid"),
        ("demo_line", GOOD, {"deadline_ms": 0.0}, "parameter_invalid"),
        ("demo_line", GOOD, {"deadline_ms": float("nan")}, "parameter_invalid"),
        ("demo_line", GOOD, {"deadline_ms": 1e300}, "parameter_invalid"),
        ("demo_line", RawFrame(np.zeros((4, 4, 4), np.uint8)), {}, "frame_unreadable"),
        ("demo_line", RawFrame(np.zeros(4, np.uint8), "Mono8"), {}, "frame_unreadable"),
        ("demo_line", RawFrame(np.zeros((4, 4)), "Mono8"), {}, "frame_unreadable"),
        ("demo_line", RawFrame(np.zeros((4, 4), np.uint8), "Farbe ä"), {}, "frame_unreadable"),
        ("demo_line", "frame\0.png", {}, "frame_unreadable"),
        ("demo_line", GOOD.data, {}, "frame_unreadable"),
        ("demo_line", None, {}, "frame_unreadable"),
        ("demo_line", EncodedFrame("no bytes", "image/png"), {}, "frame_unreadable"),
        ("demo_line", EncodedFrame(GOOD.data, "image/jpäg"), {}, "frame_unreadable"),
        ("demo_line", EncodedFrame(GOOD.data, "image/png\r\nX-Policy: lenient"), {}, "frame_unreadable"),
        ("demo_line", EncodedFrame(GOOD.data, None), {}, "frame_unreadable"),
        (None, GOOD, {}, "parameter_invalid"),
        ("demo_line", GOOD, {"part_id": 815}, "parameter_invalid"),
        ("demo_line", GOOD, {"part_id": "    "}, "parameter_invalid"),
        ("demo_line", GOOD, {"deadline_ms": "soon"}, "parameter_invalid"),
        ("demo_line", Unforeseen(), {}, "client_failed"),
    ],
)
def test_client_when_something_is_wrong_then_it_says_what_and_never_raises(url, line, frame, options, code):
    """Every fault, ours or the server's, is an outcome without a verdict and with a stable code."""

    async def ask() -> Outcome:
        async with AsyncClient(url) as client:
            return await client.inspect(line, frame, **options)

    with Client(url) as client:
        outcomes = [client.inspect(line, frame, **options), asyncio.run(ask())]

    for outcome in outcomes:
        assert outcome.verdict is Verdict.NO_VERDICT
        assert outcome.answer is None
        assert outcome.problem is not None
        assert outcome.problem.code == code
        assert len(outcome.problem.sentence) > 10


def test_client_when_it_was_closed_then_it_says_so():
    """A verdict that is asked for too late is none, and nothing is raised."""

    async def ask() -> Outcome:
        client = AsyncClient("http://127.0.0.1:9")
        await client.close()
        return await client.inspect("demo_line", GOOD)

    client = Client("http://127.0.0.1:9")
    client.close()
    outcomes = [client.inspect("demo_line", GOOD), asyncio.run(ask())]

    assert [outcome.verdict for outcome in outcomes] == [Verdict.NO_VERDICT] * 2
    assert [outcome.problem.code for outcome in outcomes if outcome.problem] == ["client_closed"] * 2
    with pytest.raises(ClientFault, match="closed"):
        client.lines()


@pytest.mark.parametrize(
    ("address", "key"), [("ftp://127.0.0.1:9", None), ("http://127.0.0.1:{port}", "key\r\n")], ids=["scheme", "key"]
)
def test_client_when_http_can_not_carry_the_request_then_it_is_tried_once_and_shows_no_key(address, key):
    """What no try can mend costs no time, and the key stays out of the sentence."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        Client(address.format(port=listening.getsockname()[1]), key) as client,
    ):
        outcome = client.inspect("demo_line", GOOD)

    assert (outcome.verdict, outcome.tries) == (Verdict.NO_VERDICT, 1)
    assert outcome.problem is not None
    assert outcome.problem.code == "parameter_invalid"
    assert "key\\r" not in outcome.problem.sentence


def test_client_when_a_plc_fills_the_part_id_with_blanks_then_it_is_the_id_without_them(url):
    """Blanks round an id do not count, whichever way they come: HTTP takes them from headers anyway."""
    with Client(url) as client, httpx.Client(base_url=url) as http:
        outcome = client.inspect("demo_line", GOOD, part_id="0815    ", view=" top")
        answer = http.post(
            "/v1/lines/demo_line/inspect",
            params={"part_id": "0815    "},
            content=GOOD.data,
            headers={"Content-Type": "image/png"},
        ).json()

    assert outcome.answer is not None
    assert (outcome.answer.part_id, outcome.answer.view, answer["part_id"]) == ("0815", "top", "0815")


@pytest.mark.parametrize("name", ["missing.png", "notes.txt"])
def test_client_when_a_file_can_not_be_sent_then_nothing_is(url, tmp_path, name):
    """A missing file and one that is no image are told by their name."""
    (tmp_path / "notes.txt").write_text("no image")

    with Client(url) as client:
        outcome = client.inspect("demo_line", tmp_path / name)

    assert outcome.tries == 0
    assert outcome.problem is not None
    assert outcome.problem.code == "frame_unreadable"
    assert name in outcome.problem.sentence


@pytest.mark.parametrize(
    "answer",
    [
        _http("200 OK", b""),
        _http("200 OK", b"PASS"),
        _http("200 OK", PASSING),
        _http("200 OK", PASSING + b"}"),
        _http("200 OK", b'"PASS"'),
        _http("200 OK", b"\xff" * 40),
        _http("200 OK", PASSING + b"}", Content_Encoding="gzip"),
        _http("204 No Content", b""),
        _http("302 Found", PASSING + b"}", Location="http://127.0.0.1:9/"),
        _http("404 Not Found", b"<html>proxy</html>"),
        _http("500 Internal Server Error", PASSING + b"}"),
        _http("500 Internal Server Error", b'{"code":null,"detail":["PASS"],"request_id":7}'),
        _http("200 OK", b"x" * 17 * 2**20),
        b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + PASSING,
        b"\x00\x01 no HTTP\r\n\r\n",
    ],
    ids=lambda answer: repr(answer[9:40]),
)
def test_client_when_a_stranger_answers_then_there_is_no_verdict(answer):
    """Whatever stands at the address, only a complete answer of the service is a verdict."""
    with _stranger(answer) as (url, _), Client(url, deadline_ms=300) as client:
        outcome = client.inspect("demo_line", GOOD)

    assert outcome.verdict is Verdict.NO_VERDICT
    assert outcome.answer is None
    assert outcome.problem is not None


@pytest.mark.parametrize(
    ("options", "said", "verdict"),
    [
        ({"part_id": "1", "view": "top", "sequence": 1}, {}, Verdict.PASS),
        ({}, {}, Verdict.NO_VERDICT),
        ({"part_id": "2", "view": "top", "sequence": 1}, {}, Verdict.NO_VERDICT),
        ({"part_id": "1", "view": "side", "sequence": 1}, {}, Verdict.NO_VERDICT),
        ({"part_id": "1", "view": "top", "sequence": 2}, {}, Verdict.NO_VERDICT),
        ({"part_id": "1", "view": "top", "sequence": 1}, {"part_id": None}, Verdict.NO_VERDICT),
        ({"part_id": "1", "view": "top", "sequence": 1}, {"line": "another_line"}, Verdict.NO_VERDICT),
    ],
    ids=["same", "nothing named", "part", "view", "sequence", "no part", "line"],
)
def test_client_when_the_answer_is_about_another_part_then_it_is_not_believed(passing, options, said, verdict):
    """Whatever was named of the part must be the answer's; the same answer is believed where it is."""
    answer = {"part_id": "1", "view": "top", "sequence": 1} | said

    with _stranger(_told(passing, **answer)) as (proxy, _):
        [outcome] = _ask("sync", proxy, DEFECT, **options)

    assert outcome.verdict is verdict
    assert _why(outcome) == (None if verdict is Verdict.PASS else "answer_unusable")


@pytest.mark.parametrize("status", ["201 Created", "203 Non-Authoritative Information", "206 Partial Content"])
def test_client_when_a_whole_answer_has_another_status_than_200_then_it_is_not_believed(passing, status):
    """Whoever changed the status may have changed the rest."""
    with _stranger(_told(passing, status=status)) as (proxy, _):
        [outcome] = _ask("sync", proxy, GOOD)

    assert outcome.verdict is Verdict.NO_VERDICT
    assert _why(outcome) == "answer_unusable"


@pytest.mark.parametrize("kind", KINDS)
def test_client_when_the_environment_names_a_proxy_then_the_station_is_asked_all_the_same(passing, kind, monkeypatch):
    """What an office needs to reach the internet must not stand between a camera and its station."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    with _stranger(_told(passing)) as (server, _):
        [outcome] = _ask(kind, server, GOOD, deadline_ms=500)

    assert outcome.verdict is Verdict.PASS


@pytest.mark.parametrize("kind", KINDS)
def test_client_when_a_connection_breaks_before_the_answer_then_it_asks_again(passing, kind):
    """A server that stops, or closes an idle connection in the moment of its use, costs a try and no verdict."""
    with _stranger(b"", _told(passing)) as (server, asked):
        [outcome] = _ask(kind, server, GOOD)

    assert (outcome.verdict, outcome.tries, len(asked)) == (Verdict.PASS, 2, 2)


def test_client_when_pixels_are_big_endian_then_their_values_are_sent(passing):
    """Raw formats begin with the low byte, whatever order pixels have in memory."""
    values = np.arange(48, dtype="<u2").reshape(6, 8) * 1000

    with _stranger(_told(passing)) as (server, asked):
        _ask("sync", server, RawFrame(values.astype(">u2")))

    told = b"sha-256=:" + b64encode(sha256(values.tobytes()).digest()) + b":"
    assert _header(asked[0], b"content-digest") == told


@pytest.mark.parametrize("kind", KINDS)
def test_client_when_a_cache_answers_then_it_is_not_believed(passing, kind):
    """An answer that was given before is another request's, even where the part has no name."""
    with _stranger(_http("200 OK", json.dumps(passing).encode())) as (cache, _):
        [outcome] = _ask(kind, cache, DEFECT)

    assert outcome.verdict is Verdict.NO_VERDICT
    assert _why(outcome) == "answer_unusable"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("frame", "verdict"), [(GOOD, Verdict.PASS), (DEFECT, Verdict.NO_VERDICT)], ids=["same", "other"]
)
def test_client_behind_a_proxy_that_names_requests_anew_believes_what_is_about_its_frames_bytes(
    passing, kind, frame, verdict
):
    """Envoy puts its own id in a request's place; whether an answer is this frame's is then told by the digest."""
    with _stranger(_told(passing, request_id="envoy-1")) as (proxy, _):
        [outcome] = _ask(kind, proxy, frame)

    assert outcome.verdict is verdict


@pytest.mark.parametrize("kind", KINDS)
def test_client_when_answers_come_one_request_late_then_none_is_taken_for_the_next_part(passing, kind):
    """What a connection still held of an earlier request costs one verdict, and the connection with it."""
    failing = {"verdict": "FAIL", "score": 0.9}
    late = _told(passing, keeps=True)
    said: list[bytes] = []

    def first_again(head: bytes) -> bytes:
        said.append(late(head))
        return said[0]

    with _strangers((first_again,) * 3, (_told(passing, **failing),)) as (server, asked):
        outcomes = _ask(kind, server, GOOD, DEFECT, DEFECT)

    assert [outcome.verdict for outcome in outcomes] == [Verdict.PASS, Verdict.NO_VERDICT, Verdict.FAIL]
    assert len({_header(head, b"x-request-id") for head in asked}) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        ({"policy": "night"}, {}, "night"),
        ({}, {"score": 0.407, "thresholds": {"review": 0.1, "fail": 0.251}}, "0.407"),
        ({}, {"score": 0.15}, "contradicts"),
        ({}, {"verdict": "FAIL"}, "contradicts"),
        ({}, {"verdict": "REVIEW"}, "contradicts"),
        ({}, {"verdict": "NO_VERDICT"}, "contradicts"),
        ({}, {"thresholds": {"review": 0.2, "fail": 0.1}}, "contradicts"),
        ({}, {"score": math.nan}, "score"),
        ({}, {"score": -math.inf}, "score"),
        ({}, {"score": None}, "score"),
        ({}, {"thresholds": {"review": math.inf, "fail": math.inf}}, "thresholds.review"),
        ({}, {"p_value": math.nan}, "p_value"),
    ],
    ids=str,
)
def test_client_when_an_answer_contradicts_the_request_or_itself_then_it_is_not_believed(
    passing, kind, options, changes, said
):
    """Whoever judged by other rules than were asked, or says what its own numbers do not, has passed nothing."""
    with _stranger(_told(passing, **changes)) as (server, _):
        [outcome] = _ask(kind, server, DEFECT, **options)

    assert (outcome.verdict, outcome.answer) == (Verdict.NO_VERDICT, None)
    assert _why(outcome) == "answer_unusable"
    assert outcome.problem is not None
    assert said in outcome.problem.sentence


def test_client_when_every_kind_of_policy_answers_then_each_is_believed(tmp_path):
    """No honest answer is refused: with or without a band for REVIEW, all of it, a corner, or measured by itself."""
    policies = {
        "none_to_review": make_policy(version="none_to_review", review_threshold=0.2),
        "wide": make_policy(version="wide", review_threshold=-1.0, fail_threshold=5.0),
        "all_fail": make_policy(version="all_fail", review_threshold=-2.0, fail_threshold=-1.0),
        "large_only": make_policy(version="large_only", min_region_area_px=1e9, max_regions=0),
        "corner": make_policy(version="corner", region_of_interest=(((0.0, 0.0), (0.2, 0.0), (0.2, 0.2)),)),
        "self": make_self_policy(version="self"),
    }
    network = network_of(make_bundle(tmp_path))
    for policy in policies.values():
        write_policy(tmp_path, policy, network)

    with serve_in_thread(Settings(store_directory=tmp_path)) as http:
        wait_until_ready(http)
        url = str(http.base_url)
        outcomes = {name: _ask("sync", url, GOOD, DEFECT, policy=name) for name in policies}

    told = {name: [outcome.verdict.value for outcome in both] for name, both in outcomes.items()}
    assert told == {
        "none_to_review": ["PASS", "FAIL"],
        "wide": ["REVIEW", "REVIEW"],
        "all_fail": ["FAIL", "FAIL"],
        "large_only": ["PASS", "FAIL"],
        "corner": ["PASS", "PASS"],
        "self": ["PASS", "FAIL"],
    }


def test_client_when_a_score_is_the_threshold_itself_then_the_servers_verdict_is_believed(url, passing):
    """Numbers travel exactly: a score at a border is on the server's side of it."""
    border = 0.1 + 0.2  # no short decimal number
    below = math.nextafter(border, 0.0)
    thresholds = {"review": border, "fail": math.nextafter(border, 1.0)}
    outcomes = []
    for score, verdict in ((below, "PASS"), (border, "REVIEW"), (thresholds["fail"], "FAIL")):
        with _stranger(_told(passing, score=score, verdict=verdict, thresholds=thresholds)) as (server, _):
            outcomes += _ask("sync", server, GOOD)

    assert [outcome.verdict.value for outcome in outcomes] == ["PASS", "REVIEW", "FAIL"]


def test_client_when_the_picture_is_that_of_another_inspection_then_it_is_refused():
    """A picture says nothing of its part by itself; its answer's head does."""
    picture = _http("200 OK", b"picture", Flawline_Inspection_Id="1" * 32)

    async def fetch(url: str) -> bytes:
        async with AsyncClient(url) as client:
            return await client.heatmap("0" * 32)

    with _stranger(picture, picture) as (url, _), Client(url) as client:
        with pytest.raises(ClientFault, match="another inspection"):
            client.heatmap("0" * 32)
        with pytest.raises(ClientFault, match="another inspection"):
            asyncio.run(fetch(url))


@pytest.mark.parametrize("status", ["503 Service Unavailable", "429 Too Many Requests"])
def test_client_when_told_to_wait_then_it_waits_as_long_and_asks_again(url, status):
    """`Retry-After` is respected, and the next try tells the server how much time is left."""
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    refusal = _http(status, b'{"code":"overloaded","detail":"Slow down."}', Retry_After="3")
    with (
        _stranger(refusal, refusal) as (stranger, asked),
        Client(stranger, clock=lambda: now[0], sleep=sleep) as client,
    ):
        outcome = client.inspect("demo_line", GOOD, deadline_ms=7000)

    assert slept[:2] == [3.0, 3.0]
    assert [float(_header(head, b"x-deadline-ms")) for head in asked] == [7000, 4000]
    assert outcome.verdict is Verdict.NO_VERDICT


@pytest.mark.parametrize("wait", ["inf", "nan", "-1", "soon", "Sun, 29 Nov 2026 12:00:00 GMT"])
def test_client_when_told_to_wait_for_no_number_of_seconds_then_it_asks_again_by_its_own_pause(passing, wait):
    """A proxy that says something odd about waiting costs no verdict."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    refusal = _http("503 Service Unavailable", b'{"code":"overloaded","detail":"Slow down."}', Retry_After=wait)
    with (
        _stranger(refusal, _told(passing)) as (stranger, _),
        Client(stranger, clock=lambda: now[0], sleep=sleep) as client,
    ):
        outcome = client.inspect("demo_line", GOOD)

    assert (outcome.verdict, outcome.tries) == (Verdict.PASS, 2)
    assert 0 <= now[0] < 1


def test_client_when_waiting_would_take_too_long_then_it_does_not_ask_again():
    """A retry after the deadline could only be late: the refusal is the answer."""
    refusal = _http("503 Service Unavailable", b'{"code":"overloaded","detail":"Slow down."}', Retry_After="3")
    slept: list[float] = []

    with _stranger(refusal) as (url, _), Client(url, sleep=slept.append) as client:
        outcome = client.inspect("demo_line", GOOD, deadline_ms=2000)

    assert (slept, outcome.tries) == ([], 1)
    assert outcome.problem is not None
    assert (outcome.problem.code, outcome.problem.status) == ("overloaded", 503)


def test_client_when_nobody_listens_then_it_tries_until_the_deadline_and_no_longer():
    """A server that restarts is found again; one that stays away costs no more than the deadline."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with Client("http://127.0.0.1:9", clock=lambda: now[0], sleep=sleep) as client:
        outcome = client.inspect("demo_line", GOOD, deadline_ms=1500)

    assert outcome.problem is not None
    assert outcome.problem.code == "not_reachable"
    assert outcome.tries > 2
    assert outcome.elapsed_ms <= 1500


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_client_when_the_engine_hangs_then_it_returns_at_the_deadline(store, kind):
    """The server's 504 is heard, and the part has no verdict."""
    engines = []

    def open_engine(bundle):
        engines.append(held_engine(bundle))
        return engines[0]

    with serve_in_thread(Settings(store_directory=store), open_engine) as http:
        wait_until_ready(http)
        url = str(http.base_url)

        async def ask():
            async with AsyncClient(url) as client:
                return await client.inspect("demo_line", GOOD, deadline_ms=200)

        def ask_and_wait():
            with Client(url) as client:
                return client.inspect("demo_line", GOOD, deadline_ms=200)

        engines[0].hold()
        try:
            begun = time.monotonic()
            outcome = ask_and_wait() if kind == "sync" else asyncio.run(ask())
            took_s = time.monotonic() - begun
        finally:
            engines[0].release()

    assert outcome.verdict is Verdict.NO_VERDICT
    assert outcome.problem is not None
    assert outcome.problem.code == "deadline_passed"
    assert took_s >= 0.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("took_s", "verdict"), [(0.25, Verdict.PASS), (0.2501, Verdict.NO_VERDICT)], ids=str)
def test_client_when_the_answer_comes_after_the_deadline_then_it_is_no_verdict(passing, kind, took_s, verdict):
    """The part has gone by then: what is listened for after the deadline is why there is no verdict, and no verdict."""
    outcome, request_id = _answered_after(kind, took_s, _told(passing))

    assert (outcome.verdict, outcome.elapsed_ms) == (verdict, took_s * 1000)
    assert (outcome.answer is not None) == (verdict is Verdict.PASS)
    if verdict is Verdict.NO_VERDICT:
        assert outcome.problem is not None
        assert (outcome.problem.code, outcome.problem.request_id) == ("deadline_passed", request_id)


@pytest.mark.parametrize("kind", KINDS)
def test_client_when_a_refusal_comes_after_the_deadline_then_its_reason_is_heard(kind):
    """The server says at the deadline itself why it has nothing to say, which is later for whoever waits."""
    refusal = _http("504 Gateway Timeout", b'{"code":"deadline_passed","detail":"The engine is stuck."}')

    outcome, _ = _answered_after(kind, 0.4, lambda _: refusal)

    assert outcome.verdict is Verdict.NO_VERDICT
    assert outcome.problem is not None
    assert (outcome.problem.status, outcome.problem.sentence) == (504, "The engine is stuck.")


def _answered_after(kind: str, took_s: float, tell: Callable[[bytes], bytes]) -> tuple[Outcome, str]:
    """Return what a client with a deadline of a quarter of a second makes of an answer, and its request's id."""
    now = [0.0]

    def tell_late(head: bytes) -> bytes:
        now[0] = took_s
        return tell(head)

    async def ask(url: str) -> Outcome:
        async with AsyncClient(url, deadline_ms=250, clock=lambda: now[0]) as client:
            return await client.inspect("demo_line", GOOD)

    with _stranger(tell_late) as (url, asked), Client(url, deadline_ms=250, clock=lambda: now[0]) as client:
        outcome = client.inspect("demo_line", GOOD) if kind == "sync" else asyncio.run(ask(url))
    return outcome, _header(asked[0], b"x-request-id").decode()


@pytest.mark.parametrize("kind", KINDS)
def test_client_when_the_answer_drips_then_it_stops_listening(passing, kind):
    """A byte now and then keeps each wait short; their sum is bounded all the same, whatever would come in the end."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.2
        return now[0]

    async def ask(url: str) -> Outcome:
        async with AsyncClient(url, clock=clock) as client:
            return await client.inspect("demo_line", GOOD, deadline_ms=500)

    with _stranger(_told(passing, blanks=2**20)) as (stranger, _), Client(stranger, clock=clock) as client:
        outcome = client.inspect("demo_line", GOOD, deadline_ms=500) if kind == "sync" else asyncio.run(ask(stranger))

    assert outcome.verdict is Verdict.NO_VERDICT
    assert outcome.problem is not None
    assert outcome.problem.code == "deadline_passed"
    assert "before the answer was complete" in outcome.problem.sentence


@pytest.mark.parametrize("kind", KINDS)
def test_client_when_the_answer_is_longer_than_any_of_ours_then_it_stops_listening(passing, kind, monkeypatch):
    """Nobody sends megabytes as a verdict, and no camera's memory is filled with them."""
    monkeypatch.setattr("service.client._LARGEST_ANSWER_BYTES", 2**16)

    with _stranger(_told(passing, blanks=2**17)) as (stranger, _):
        [outcome] = _ask(kind, stranger, GOOD)

    assert outcome.verdict is Verdict.NO_VERDICT
    assert outcome.problem is not None
    assert outcome.problem.code == "answer_unusable"
    assert "longer" in outcome.problem.sentence


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("way", ["the head drips", "the frame is taken slowly"])
def test_client_when_every_wait_is_short_then_all_of_them_together_end_soon_after_the_deadline(way, kind):
    """A byte now and then begins a new wait each time; the sum of them is bounded, whatever else is."""
    frame = GOOD if way == "the head drips" else EncodedFrame(bytes(64 * 2**20), "image/png")

    async def ask(url: str) -> Outcome:
        async with AsyncClient(url) as client:
            return await client.inspect("demo_line", frame, deadline_ms=500)

    with _dripping(takes_slowly=frame is not GOOD) as url, Client(url) as client:
        outcome = client.inspect("demo_line", frame, deadline_ms=500) if kind == "sync" else asyncio.run(ask(url))

    assert outcome.verdict is Verdict.NO_VERDICT
    assert outcome.problem is not None
    assert outcome.problem.code == "deadline_passed"
    assert outcome.elapsed_ms < 2000


@contextmanager
def _dripping(*, takes_slowly: bool) -> Iterator[str]:
    """Serve one connection that gets on all the time and never far, for at most ten seconds."""
    ended = threading.Event()

    def drip() -> None:
        connection, _ = listening.accept()
        with connection, suppress(OSError):  # of a client that has gone
            for turn in range(500):
                if takes_slowly:
                    connection.recv(2**18)
                else:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Wait: " if turn == 0 else b"x")
                if ended.wait(0.02):
                    return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        ended.set()
        thread.join()


def _why(outcome: Outcome) -> str | None:
    return None if outcome.problem is None else outcome.problem.code


def _header(head: bytes, name: bytes) -> bytes:
    return next(line.split(b":", 1)[1].strip() for line in head.split(b"\r\n") if line.lower().startswith(name))
