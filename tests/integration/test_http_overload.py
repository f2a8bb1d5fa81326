"""The moments in which the service must say no, or too late: loading, full, stuck, left alone, told to stop."""

import asyncio
import json
import logging
import re
import socket
import threading
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.app import create_app
from service.contract.bundle import Bundle
from service.engines.engine import Engine
from service.errors import EngineFailed
from service.observability.log import JsonLines
from service.settings import Settings
from tests.factories import encode, make_bundle, make_frame
from tests.fakes import FakeEngine
from tests.servers import (
    PATIENCE_S,
    Side,
    held_engine,
    serve_held,
    serve_in_thread,
    wait_until,
    wait_until_ready,
)

INSPECT = "/v1/lines/demo_line/inspect"
GOOD = encode(make_frame())
PNG = {"Content-Type": "image/png"}

_serving = partial(serve_held, runners=1)


@pytest.fixture
def store(tmp_path) -> Path:
    """A store with one line."""
    make_bundle(tmp_path)
    return tmp_path


def _inspect(http: httpx.Client, **options: object) -> httpx.Response:
    return httpx.post(http.base_url.join(INSPECT), content=GOOD, headers=PNG, timeout=PATIENCE_S, **options)


def _occupy(http: httpx.Client, engine: FakeEngine) -> Side[httpx.Response]:
    """Start an inspection and return once its run is held in the engine."""
    engine.hold()
    runs = len(engine.batches)
    side = Side(lambda: _inspect(http))
    wait_until(lambda: len(engine.batches) > runs, "the run")
    return side


def test_line_when_it_is_loading_then_503_with_the_wait_and_readiness_is_false_until_it_is_proven(store):
    """Before the golden frames came out right nothing is answered; afterwards everything is."""
    may_open = threading.Event()

    def open_engine(bundle: Bundle) -> Engine:
        may_open.wait(PATIENCE_S)
        return held_engine(bundle)

    with serve_in_thread(Settings(store_directory=store), open_engine) as http:
        wait_until(lambda: bool(http.get("/v1/lines").json()["lines"]), "the scan")
        early, not_ready, live = _inspect(http), http.get("/healthz/ready"), http.get("/healthz/live")
        line = http.get("/v1/lines/demo_line").json()
        may_open.set()
        wait_until_ready(http)
        late = _inspect(http)

    assert (early.status_code, early.json()["code"]) == (503, "line_loading")
    assert int(early.headers["retry-after"]) >= 1
    assert early.json()["verdict"] == "NO_VERDICT"
    assert not_ready.status_code == 503
    assert not_ready.json()["reasons"][0]["line"] == "demo_line"
    assert live.status_code == 200
    assert (line["state"], line["live"]) == ("loading", None)
    assert late.json()["verdict"] == "PASS"


def test_store_when_it_is_empty_then_the_service_is_alive_and_never_ready(tmp_path):
    """An empty registry answers nothing, and says so to the orchestrator."""
    with serve_in_thread(Settings(store_directory=tmp_path)) as http:
        wait_until(lambda: _inspect(http).status_code == 404, "the end of loading")

        ready, live = http.get("/healthz/ready"), http.get("/healthz/live")

    assert (ready.status_code, live.status_code) == (503, 200)
    assert ready.json()["reasons"]


def test_queue_when_full_then_503_with_the_wait_and_health_stays_true(store):
    """One frame more than the queue takes is refused at once; the accepted ones are answered, health stays true."""
    with _serving(store, max_queue_size=2) as (http, engine):
        first = _occupy(http, engine)
        second = Side(lambda: _inspect(http))
        wait_until(lambda: 'flawline_queue_depth{engine="demo_line"} 2.0' in http.get("/metrics").text, "a full queue")

        refused = _inspect(http)
        live, ready = http.get("/healthz/live"), http.get("/healthz/ready")
        engine.release()

        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["verdict"] == "NO_VERDICT"
        assert (live.status_code, ready.status_code) == (200, 200)
        assert [side.answer().json()["verdict"] for side in (first, second)] == ["PASS", "PASS"]


def test_queue_when_full_then_a_frame_is_refused_before_its_body_came(store):
    """A camera that is too much for the line hears so after the head of its request, and need not send the frame."""
    head = f"POST {INSPECT} HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\nContent-Length: {len(GOOD)}\r\n\r\n"
    with _serving(store, max_queue_size=1) as (http, engine):
        first = _occupy(http, engine)
        with socket.create_connection((http.base_url.host, http.base_url.port), timeout=PATIENCE_S) as connection:
            connection.sendall(head.encode())
            refused = connection.recv(65536)
            engine.release()
            first.answer()
            connection.sendall(GOOD + head.encode() + GOOD)  # the same connection serves the next frame
            answered = connection.recv(65536)

    assert refused.startswith(b"HTTP/1.1 503 ")
    assert answered.startswith(b"HTTP/1.1 200 ")


def test_priority_when_a_frame_may_wait_then_those_that_may_not_go_first_and_it_is_shed_sooner(store):
    """Frames of an archive run when no camera waits, and leave the last places of the queue to the cameras."""
    with _serving(store, max_queue_size=4) as (http, engine):
        archive = {"params": {"priority": "low"}}
        sides = [_occupy(http, engine), Side(lambda: _inspect(http, **archive))]
        wait_until(lambda: 'flawline_queue_depth{engine="demo_line"} 2.0' in http.get("/metrics").text, "its place")
        sides.append(Side(lambda: _inspect(http)))
        wait_until(lambda: 'flawline_queue_depth{engine="demo_line"} 3.0' in http.get("/metrics").text, "its place")

        shed = _inspect(http, **archive)
        engine.release()
        first, low, normal = (side.answer().json() for side in sides)

    assert (shed.status_code, shed.json()["code"]) == (503, "overloaded")
    assert [answer["verdict"] for answer in (first, low, normal)] == ["PASS"] * 3
    assert normal["timings_ms"]["queue"] < low["timings_ms"]["queue"]


def test_deadline_when_a_run_is_stuck_then_504_on_time_for_the_running_and_the_waiting(store):
    """Whoever runs or waits behind a run that does not end hears of it at the deadline, not at the end of the run."""
    with _serving(store) as (http, engine):
        engine.hold()
        sides = [Side(lambda: _inspect(http, params={"deadline_ms": "1500"})) for _ in range(2)]

        answers = [side.answer() for side in sides]  # the engine is still held

        assert engine.gate.is_set() is False
        for answer in answers:
            assert (answer.status_code, answer.json()["code"]) == (504, "deadline_passed")
            assert answer.json()["verdict"] == "NO_VERDICT"
            assert 0.3 < answer.elapsed.total_seconds() < 5


def test_deadline_when_it_passed_then_the_next_frame_is_answered_as_if_nothing_had_been(store):
    """A late run spoils nothing for those who come after it."""
    with _serving(store) as (http, engine):
        engine.hold()
        late = Side(lambda: _inspect(http, params={"deadline_ms": "200"})).answer()
        engine.release()

        answer = _inspect(http)

    assert late.status_code == 504
    assert answer.json()["verdict"] == "PASS"


def test_body_when_it_does_not_arrive_in_time_then_504(store):
    """A camera that stops sending half way holds nothing for ever."""
    sent = threading.Event()

    def body() -> Iterator[bytes]:
        yield GOOD[:100]
        sent.wait(PATIENCE_S)
        yield GOOD[100:]

    with _serving(store) as (http, _):
        answer = Side(
            lambda: httpx.post(
                http.base_url.join(INSPECT),
                content=body(),
                headers=PNG,
                params={"deadline_ms": "200"},
                timeout=PATIENCE_S,
            )
        )
        wait_until(
            lambda: (
                'flawline_no_verdict_total{line="demo_line",reason="deadline_passed"} 1.0' in http.get("/metrics").text
            ),
            "the refusal",
        )
        sent.set()

        assert answer.answer().status_code == 504


def test_body_when_another_version_becomes_live_while_it_comes_then_that_one_answers(store):
    """A camera that sends slowly is not told of a version that was closed meanwhile; its frame is judged by the new."""
    app = create_app(Settings(store_directory=store, keep_previous=False))
    registry = app.state.context.registry
    registry.load()

    async def body() -> AsyncIterator[bytes]:
        yield GOOD[:100]
        make_bundle(store, version="2")
        await asyncio.to_thread(registry.rescan)
        registry.tend()
        yield GOOD[100:]

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            return await http.post(INSPECT, content=body(), headers=PNG)

    answer = asyncio.run(ask())
    registry.close()

    assert (answer.status_code, answer.json()["verdict"]) == (200, "PASS")
    assert answer.json()["bundle"]["version"] == "2"


def test_body_of_several_frames_when_another_version_becomes_live_while_it_comes_then_the_log_names_that_one(
    store, caplog
):
    """Of a frame without a verdict is told what was to judge it then, and not what was live when it began to come."""
    app = create_app(Settings(store_directory=store))
    registry = app.state.context.registry
    registry.load()
    asked = httpx.Request("POST", f"http://test{INSPECT}-batch", files=[("frames", GOOD[:-40])])

    async def body() -> AsyncIterator[bytes]:
        yield asked.read()[:100]
        make_bundle(store, version="2")
        await asyncio.to_thread(registry.rescan)
        yield asked.read()[100:]

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            kind = {"Content-Type": asked.headers["Content-Type"]}
            answer = await http.post(asked.url, content=body(), headers=kind)
            assert answer.json()["items"][0]["code"] == "unreadable_frame"
            await http.get("/metrics")

    with caplog.at_level(logging.INFO, "flawline.inspections"):
        asyncio.run(ask())
    registry.close()

    lines = (json.loads(JsonLines().format(record)) for record in caplog.records)
    [told] = [line for line in lines if line.get("code") == "unreadable_frame"]
    assert (told["verdict"], told["bundle_version"]) == ("NO_VERDICT", "2")


def test_caller_when_it_hangs_up_then_its_frame_is_dropped_and_counted(store):
    """Nobody is worked for who has left: the waiting frame never runs."""
    with _serving(store) as (http, engine):
        first = _occupy(http, engine)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(http.base_url.join(INSPECT), content=GOOD, headers=PNG, timeout=httpx.Timeout(60, read=2))
        wait_until(
            lambda: 'flawline_no_verdict_total{line="demo_line",reason="caller_left"} 1.0' in http.get("/metrics").text,
            "the count",
        )
        runs = len(engine.batches)
        engine.release()

        assert first.answer().json()["verdict"] == "PASS"
        assert len(engine.batches) == runs


def test_caller_of_several_frames_when_it_hangs_up_then_each_of_them_is_counted_as_left(store):
    """Nobody got an answer, not of the frame that was finished either: every frame of the request has no verdict."""
    with _serving(store) as (http, engine):
        network, runs = engine.on_run, len(engine.batches)

        def hold_the_next(frames):
            engine.hold()
            return network(frames)

        engine.on_run = hold_the_next
        asked = http.build_request("POST", f"{INSPECT}-batch", files=[("frames", GOOD)] * 3)
        head = "".join(f"{name}: {value}\r\n" for name, value in asked.headers.items())
        with socket.create_connection((http.base_url.host, http.base_url.port), timeout=PATIENCE_S) as connection:
            connection.sendall(f"POST {INSPECT}-batch HTTP/1.1\r\n{head}\r\n".encode() + asked.read())
            wait_until(lambda: len(engine.batches) == runs + 2, "the second run")
        left = 'flawline_no_verdict_total{line="demo_line",reason="caller_left"}'
        wait_until(lambda: left in http.get("/metrics").text, "the count")
        told = http.get("/metrics").text

    assert f"{left} 3.0" in told
    assert "flawline_inspections_total{" not in told


def test_caller_that_sent_frames_ahead_when_it_hangs_up_then_each_that_came_is_counted(store):
    """Of frames that stand in line on one connection none is lost without a trace."""
    with _serving(store) as (http, engine):
        first = _occupy(http, engine)
        head = (
            f"POST {INSPECT} HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\nContent-Length: {len(GOOD)}\r\n\r\n"
        )
        with socket.create_connection((http.base_url.host, http.base_url.port), timeout=PATIENCE_S) as connection:
            connection.sendall((head.encode() + GOOD) * 4)
            wait_until(lambda: 'flawline_queue_depth{engine="demo_line"} 2.0' in http.get("/metrics").text, "the frame")
        engine.release()
        first.answer()

        counts = re.compile(r"^flawline_(?:inspections_total|no_verdict_total)\{.*\} (\S+)$", re.MULTILINE)
        wait_until(lambda: sum(map(float, counts.findall(http.get("/metrics").text))) == 5, "the counts")


def test_service_when_work_behind_an_answer_never_ends_then_draining_still_does(store):
    """What is recorded after an answer can't keep the service from ending."""
    app = create_app(Settings(store_directory=store, default_deadline_s=0.2, max_deadline_s=0.2, drain_timeout_s=0.2))

    async def live_and_end() -> None:
        async with asyncio.timeout(PATIENCE_S):
            async with app.router.lifespan_context(app):
                app.state.context.after_answers.start("never", asyncio.Event().wait())

    asyncio.run(live_and_end())  # returns


def test_engine_when_it_fails_on_one_frame_then_500_and_the_next_one_passes(store):
    """A failing run is our fault and no verdict; the golden frames show that the engine still works."""
    with _serving(store) as (http, engine):
        network = engine.on_run
        failing = iter([True])

        def on_run(frames):
            if next(failing, False):
                raise EngineFailed("The runtime failed on this batch; the parts have no verdict.")
            return network(frames)

        engine.on_run = on_run
        failed, after = _inspect(http), _inspect(http)

    assert (failed.status_code, failed.json()["code"]) == (500, "engine_failed")
    assert failed.json()["verdict"] == "NO_VERDICT"
    assert after.json()["verdict"] == "PASS"


def test_engine_when_it_is_lost_then_the_service_is_unready_and_still_says_no_verdict(store):
    """An engine that fails on its golden frames too is lost: nothing is answered any more, and the process may end."""
    lost = threading.Event()
    with _serving(store, lost.set) as (http, engine):

        def broken(_):
            raise RuntimeError("device lost")

        engine.on_run = broken
        failed = _inspect(http)
        wait_until(lambda: http.get("/healthz/ready").status_code == 503, "unreadiness")
        after = _inspect(http)
        line = http.get("/v1/lines/demo_line").json()
        told = lost.wait(PATIENCE_S)

    assert told
    assert failed.status_code == 500
    assert (after.status_code, after.json()["code"]) == (503, "line_not_ready")
    assert line["state"] == "unhealthy"
    assert "device lost" not in failed.text


def test_fault_when_nobody_expected_it_then_500_tells_nothing_of_it(tmp_path):
    """An exception that is none of ours is answered with the request id alone; the log holds the rest."""
    app = create_app(Settings(store_directory=tmp_path))

    async def broken() -> None:
        raise ZeroDivisionError("secret detail")

    app.add_api_route("/broken", broken)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.get("/broken")

    answer = asyncio.run(ask())

    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert answer.json()["verdict"] == "NO_VERDICT"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == answer.json()["request_id"]


class _JumpingClock:
    """A clock that jumps far ahead at one reading of a request."""

    def __init__(self) -> None:
        self.readings = 0
        self.jumps_at = 0

    def __call__(self) -> float:
        self.readings += 1
        return time.monotonic() + (1000.0 if 0 < self.jumps_at <= self.readings else 0.0)


def _asked_late(store: Path, path: str, **request: Any) -> tuple[httpx.Response, list[httpx.Response]]:
    """Return an answer that was on time, and those where the deadline passed at one step after the other."""
    clock = _JumpingClock()
    app = create_app(Settings(store_directory=store), clock=clock)
    app.state.context.registry.load()

    async def ask(jumps_at: int) -> httpx.Response:
        clock.readings, clock.jumps_at = 0, jumps_at
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            return await http.post(path, **request)

    async def ask_each() -> tuple[httpx.Response, list[httpx.Response]]:
        await ask(0)  # the first one also sets the alarms
        app.state.context.after_answers.settle()
        answer = await ask(0)
        # The last reading of an answer that was on time is that of its timings.
        return answer, [await ask(reading) for reading in range(2, clock.readings)]

    on_time, late = asyncio.run(ask_each())
    assert len(late) > 3
    return on_time, late


def test_picture_when_the_deadline_passes_at_any_step_then_504_or_a_refusal_but_no_late_picture(store):
    """Drawing is part of the way to the answer: whoever asked for the picture itself is not answered late with it."""
    on_time, late = _asked_late(store, INSPECT, content=GOOD, headers=PNG | {"Accept": "image/png"})

    assert on_time.headers["content-type"] == "image/png"
    assert {answer.status_code for answer in late} <= {503, 504}
    assert all(answer.json()["verdict"] == "NO_VERDICT" for answer in late)


def test_protocol_when_the_deadline_passes_at_any_step_then_504_or_a_refusal_but_no_late_answer(store):
    """Reading a request and writing its maps take time, too: no late verdict under `/v2` either."""
    frame = {"name": "encoded_frames", "datatype": "BYTES", "shape": [1]}
    base64 = {"data": [b64encode(GOOD).decode()], "parameters": {"content_type": "base64"}}

    on_time, late = _asked_late(store, "/v2/models/demo_line/infer", json={"inputs": [frame | base64]})

    assert on_time.json()["outputs"][2]["data"] == ["PASS"]
    assert {answer.status_code for answer in late} <= {503, 504}
    assert all(list(answer.json()) == ["error"] for answer in late)
