"""What goes wrong while cameras post: none of their frames is lost, and none is `PASS` that does not deserve it."""

import ctypes
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from service.settings import Settings
from tests.cameras import FRAMES, Cameras
from tests.factories import make_bundle
from tests.fakes import FakeEngine
from tests.servers import (
    LONG_S,
    PATIENCE_S,
    Side,
    serve_held,
    serve_in_thread,
    wait_until,
    wait_until_ready,
)

MANY = 12  # connections that misbehave at a time
GOOD = FRAMES["PASS"]
HEAD = (
    "POST /v1/lines/demo_line/inspect{query} HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\n"
    "Accept: {accept}\r\nContent-Length: {length}\r\n\r\n"
)

Misdeed = Callable[["socket.socket", "random.Random"], None]


def _head(length: int = len(GOOD), accept: str = "*/*", query: str = "") -> bytes:
    return HEAD.format(length=length, accept=accept, query=query).encode()


_serving = partial(serve_held, runners=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Return a store with one line; to be read only."""
    store = tmp_path_factory.mktemp("store")
    make_bundle(store)
    return store


def _is_unready(http: httpx.Client) -> bool:
    return http.get("/healthz/ready").status_code == 503


def _runners() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "flawline-runner"}


def _end_in_a_run(engine: FakeEngine, _: threading.Thread) -> None:
    def leave(_: object) -> None:
        raise SystemExit

    engine.on_run = leave


def _end_anywhere(_: FakeEngine, runner: threading.Thread) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(runner.ident or 0), ctypes.py_object(SystemExit))


@pytest.mark.parametrize("end", [_end_in_a_run, _end_anywhere], ids=["in a run", "anywhere"])
def test_engine_thread_when_it_ends_under_load_then_every_frame_hears_and_the_process_is_to_end(store, end):
    """A runner that is gone takes no frame with it: all are answered, the service is unready, and wants a restart."""
    lost, others = threading.Event(), _runners()
    with _serving(store, lost.set) as (http, engine), Cameras(str(http.base_url)) as cameras:
        cameras.after()
        end(engine, (_runners() - others).pop())

        told = lost.wait(PATIENCE_S)
        cameras.stop()
        unready = _is_unready(http)

    assert told
    assert unready
    cameras.assert_safe()
    assert cameras.codes() <= {"engine_failed", "line_not_ready"}
    assert cameras.told[-1].code == "line_not_ready"


def test_inference_when_it_hangs_for_a_while_under_load_then_504_on_time_and_no_late_answer_goes_astray(store):
    """Deadlines fire behind a run that hangs; when it ends at last, its answer is thrown away and the line goes on."""
    with (
        _serving(store, default_deadline_s=0.3) as (http, engine),
        Cameras(str(http.base_url)) as cameras,
    ):
        cameras.after()
        engine.hold()
        wait_until(lambda: "deadline_passed" in cameras.codes(), "a deadline behind the run that hangs")
        held_until_then = not engine.gate.is_set()
        engine.release()
        answered = sum(told.status == 200 for told in cameras.told)
        wait_until(lambda: sum(told.status == 200 for told in list(cameras.told)) > answered + 12, "answers again")
        cameras.stop()

    assert held_until_then
    cameras.assert_safe()
    assert cameras.codes() <= {"deadline_passed", "overloaded"}


def test_inference_when_it_hangs_for_good_under_load_then_all_are_told_and_the_process_is_to_end(store):
    """The alarm behind a run that does not end takes the line out of service, whatever time the callers have."""
    lost = threading.Event()
    with (
        _serving(store, lost.set, stuck_after_s=0.5) as (http, engine),
        Cameras(str(http.base_url)) as cameras,
    ):
        cameras.after()
        engine.hold()

        told = lost.wait(PATIENCE_S)
        wait_until(lambda: "line_not_ready" in cameras.codes(), "the refusal")
        cameras.stop()
        unready = _is_unready(http)

    assert told
    assert unready
    cameras.assert_safe()
    assert cameras.codes() == {"engine_failed", "line_not_ready"}


def test_inference_when_it_hangs_without_load_then_golden_frames_notice(store):
    """Nobody has to send a frame for a hung device to be found out: known frames go the same way."""
    lost = threading.Event()
    with _serving(store, lost.set, stuck_after_s=0.3, golden_every_s=0.1) as (http, engine):
        engine.hold()

        told = lost.wait(PATIENCE_S)

        assert told
        assert _is_unready(http)


def test_device_when_it_answers_otherwise_under_load_then_golden_frames_take_the_line_out(store):
    """A device that has changed its mind says PASS to a defect until known frames tell; then nothing is judged."""
    with (
        _serving(store, golden_every_s=0.1) as (http, engine),
        Cameras(str(http.base_url)) as cameras,
    ):
        cameras.after()
        network = engine.on_run
        engine.on_run = lambda frames: network(frames)._replace(scores=network(frames).scores + 1)  # stricter only

        wait_until(lambda: _is_unready(http), "unreadiness")
        cameras.stop()

    assert not cameras.cut_off
    assert cameras.told[-1].code == "line_not_ready"
    assert {told.verdict for told in cameras.told if told.expected == "FAIL"} <= {"FAIL", "NO_VERDICT"}


def _send_half_a_head(connection: socket.socket, _: random.Random) -> None:
    connection.sendall(_head()[:40])


def _send_half_a_frame(connection: socket.socket, _: random.Random) -> None:
    connection.sendall(_head() + GOOD[: len(GOOD) // 2])


def _never_read(connection: socket.socket, _: random.Random) -> None:
    connection.sendall((_head(accept="image/png") + GOOD) * 8)


def _hang_up_half_way(connection: socket.socket, _: random.Random) -> None:
    _send_half_a_frame(connection, _)
    _reset(connection)


def _hang_up_when_all_is_sent(connection: socket.socket, _: random.Random) -> None:
    connection.sendall(_head() + GOOD)
    _reset(connection)


def _say_no_more(connection: socket.socket, _: random.Random) -> None:
    connection.sendall(_head() + GOOD)
    connection.shutdown(socket.SHUT_WR)


def _make_noise(connection: socket.socket, generator: random.Random) -> None:
    connection.sendall(generator.randbytes(generator.randrange(1, 4096)))


def _send_noise_as_a_frame(connection: socket.socket, generator: random.Random) -> None:
    connection.sendall(_head() + generator.randbytes(len(GOOD)))


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.fixture(scope="module")
def shared(store) -> Iterator[httpx.Client]:
    """A server that no misdeed below may harm."""
    patient = {"default_deadline_s": LONG_S, "max_deadline_s": LONG_S, "drain_timeout_s": LONG_S}
    with serve_in_thread(Settings(store_directory=store, max_queue_size=1000, **patient)) as http:
        wait_until_ready(http)
        yield http


@pytest.mark.parametrize(
    "misdeed",
    [
        _send_half_a_head,
        _send_half_a_frame,
        _never_read,
        _hang_up_half_way,
        _hang_up_when_all_is_sent,
        _say_no_more,
        _make_noise,
        _send_noise_as_a_frame,
    ],
    ids=lambda misdeed: misdeed.__name__.strip("_").replace("_", " "),
)
def test_camera_when_others_misbehave_then_each_of_its_frames_has_its_verdict(shared, misdeed):
    """Slow heads, bodies and readers, those who hang up and those who talk nonsense harm nobody but themselves."""
    generator = random.Random(misdeed.__name__)  # noqa: S311 - noise, no secret
    address = urlsplit(str(shared.base_url))
    connections = []
    with Cameras(str(shared.base_url)) as cameras:
        cameras.after()
        for _ in range(MANY):
            connection = socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S)
            connections.append(connection)
            misdeed(connection, generator)

        cameras.after()  # while the others are at it
        cameras.stop()
        for connection in connections:
            connection.close()
        wait_until(
            lambda: 'flawline_queue_depth{engine="demo_line"} 0.0' in shared.get("/metrics").text,
            "that every place is given back",
        )

    cameras.assert_safe()
    assert {told.status for told in cameras.told} == {200}


def test_frame_when_bad_ones_come_under_load_then_each_is_told_of_itself_alone(shared):
    """Frames that can't be read, and good ones between them, on many connections at once: no two are mixed up."""
    bad = GOOD[: len(GOOD) // 2]
    with Cameras(str(shared.base_url)) as cameras:
        cameras.after()
        sides = [Side(lambda frame=frame: _told(shared, frame)) for frame in [bad, *FRAMES.values()] * 4]
        told = [side.answer() for side in sides]
        cameras.stop()

    assert told == [(400, "NO_VERDICT"), (200, "PASS"), (200, "FAIL")] * 4
    cameras.assert_safe()
    assert {told.status for told in cameras.told} == {200}


def _told(http: httpx.Client, frame: bytes) -> tuple[int, str]:
    answer = http.post("/v1/lines/demo_line/inspect", content=frame, headers={"Content-Type": "image/png"})
    return answer.status_code, answer.json()["verdict"]
