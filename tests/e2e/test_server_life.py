"""A server's life as a real process: start, refuse what is wrong, answer, stop in order."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.cameras import Cameras
from tests.factories import encode, make_bundle, make_frame, make_graph, reseal
from tests.servers import PATIENCE_S, ServerProcess, wait_until

INSPECT = "/v1/lines/demo_line/inspect"
PNG = {"Content-Type": "image/png"}
GOOD = encode(make_frame())
CAMERAS = 4
# By the line in whose bundle a byte of the file is flipped.
FLIPPED = {
    "graph": "model.onnx",
    "calibration": "calibration.npz",
    "policy": "policy.json",
    "golden": "golden/0.png",
    "manifest": "manifest.json",
}
# A server whose end waits for a thread that never comes back, as from a file system that does not answer.
NEVER_ENDS = """
import asyncio, threading, uvicorn
serve = uvicorn.Server.serve
async def stuck(self, sockets=None):
    await serve(self, sockets)
    await asyncio.to_thread(threading.Event().wait)
uvicorn.Server.serve = stuck
"""

# A server whose device fails for good as soon as a file is there.
DEVICE_GOES = """
from pathlib import Path
from service.engines.ort import OrtEngine
run = OrtEngine.run
def fail_once_gone(self, frames, line_index):
    if Path({!r}).exists():
        raise OSError("the device is gone")
    return run(self, frames, line_index)
OrtEngine.run = fail_once_gone
"""

# A server whose device takes its time until a file is there, once it has proved its bundle.
DEVICE_WAITS = """
import threading
from pathlib import Path
from service.scheduling.batcher import Batcher
from service.engines.ort import OrtEngine
run, made = OrtEngine._run, Batcher.__init__
proved = threading.Event()
def note(self, *arguments, **options):
    made(self, *arguments, **options)
    proved.set()
def wait(self, *arguments):
    while proved.is_set() and not Path({!r}).exists():
        threading.Event().wait(0.01)
    return run(self, *arguments)
OrtEngine._run, Batcher.__init__ = wait, note
"""

# A server whose log can't be written any more as soon as a file is there: the disk that it lies on is full.
DISK_FILLS = """
import os
from pathlib import Path
from service.engines.ort import OrtEngine
run = OrtEngine.run
def fill(self, frames, line_index):
    if Path({!r}).exists():
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    return run(self, frames, line_index)
OrtEngine.run = fill
"""


def test_server_when_it_runs_then_its_runtime_reports_to_nobody(tmp_path, monkeypatch):
    """ONNX Runtime keeps a device id for its maker's telemetry; with us it does not even begin to."""
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    home, store = tmp_path / "home", tmp_path / "store"
    home.mkdir()
    make_bundle(store)
    places = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}

    with ServerProcess(store, environment=places) as server:
        server.ready()
        answer = server.http.post(INSPECT, content=GOOD, headers=PNG)

    assert answer.status_code == 200
    assert list(home.rglob("*")) == []


def test_server_when_started_then_alive_first_and_ready_only_when_proven(tmp_path):
    """The port answers while lines are loading; readiness comes with the golden frames, and then frames pass."""
    make_bundle(tmp_path)
    with ServerProcess(tmp_path) as server:
        assert server.http.get("/healthz/live").status_code == 200

        server.ready()

        assert server.line("demo_line")["state"] == "ready"
        assert server.http.post(INSPECT, content=GOOD, headers=PNG).json()["verdict"] == "PASS"


@pytest.fixture(scope="module")
def flipped(tmp_path_factory) -> Iterator[ServerProcess]:
    """A server of as many lines as a bundle has kinds of files; each line has one flipped byte in another of them."""
    store = tmp_path_factory.mktemp("flipped")
    for line, name in FLIPPED.items():
        path = make_bundle(store, line)
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(bytes(data))
    with ServerProcess(store) as server:
        yield server


@pytest.mark.parametrize("line", FLIPPED)
def test_bundle_when_one_byte_is_flipped_then_refused_by_the_name_of_the_file_and_never_ready(flipped, line):
    """A flipped byte anywhere keeps the line and the whole service from being ready, and the line says which file."""
    told = flipped.wait_for_line(line, "refused")
    ready = flipped.http.get("/healthz/ready")
    answer = flipped.http.post(f"/v1/lines/{line}/inspect", content=GOOD, headers=PNG)

    assert FLIPPED[line] in told["reason"]
    assert ready.status_code == 503
    assert told["reason"] in {reason["reason"] for reason in ready.json()["reasons"]}
    assert (answer.status_code, answer.json()["code"]) == (503, "line_not_ready")
    assert answer.json()["verdict"] == "NO_VERDICT"


def test_bundle_when_its_weights_are_changed_and_its_digests_repaired_then_refused_by_the_golden_set(tmp_path):
    """Digests can be made right again; the known answers of the golden frames can't."""
    path = make_bundle(tmp_path)
    (path / "model.onnx").write_bytes(make_graph(reference=0.5))
    reseal(path)

    with ServerProcess(tmp_path) as server:
        line = server.wait_for_line("demo_line", "refused")
        ready = server.http.get("/healthz/ready")
        metrics = server.http.get("/metrics").text

    assert "golden" in line["reason"]
    assert ready.status_code == 503
    assert "flawline_golden_failures_total 1.0" in metrics


def test_bundle_when_refused_then_the_other_lines_are_answered_while_the_service_is_not_ready(tmp_path):
    """One broken bundle takes down its own lines only, but readiness tells that one is missing."""
    make_bundle(tmp_path)
    broken = make_bundle(tmp_path, "other_line")
    (broken / "policy.json").write_bytes(b"{}")

    with ServerProcess(tmp_path) as server:
        server.wait_for_line("other_line", "refused")
        server.wait_for_line("demo_line", "ready")

        assert server.http.post(INSPECT, content=GOOD, headers=PNG).json()["verdict"] == "PASS"
        assert server.http.get("/healthz/ready").status_code == 503


def test_server_when_told_to_stop_under_load_then_accepted_frames_are_answered_and_it_exits_with_zero(tmp_path):
    """SIGTERM costs nobody an answer: whatever was accepted is answered in full, later connections are refused."""
    make_bundle(tmp_path)
    answers: list[httpx.Response] = []
    cut_off: list[Exception] = []
    stopping = threading.Event()
    small = {"PASS": make_frame(60, 80, seed=1), "FAIL": make_frame(60, 80, seed=1, defect=True)}
    frames = {verdict: frame.repeat(10, axis=0).repeat(10, axis=1) for verdict, frame in small.items()}

    def camera(expected: str) -> None:
        frame, part = encode(frames[expected]), {"X-Part-Id": expected}
        # A connection for each frame: one that is kept may be closed by the server just when the next frame is sent.
        while True:
            try:
                answers.append(httpx.post(server.url + INSPECT, content=frame, headers=PNG | part, timeout=PATIENCE_S))
            except httpx.ConnectError:
                return
            except httpx.TransportError as error:
                if stopping.is_set():
                    cut_off.append(error)
                    return
                raise

    patient = dict.fromkeys(
        ("FLAWLINE_DEFAULT_DEADLINE_S", "FLAWLINE_MAX_DEADLINE_S", "FLAWLINE_DRAIN_TIMEOUT_S"), "60"
    )
    with ServerProcess(tmp_path, patient) as server:
        server.ready()
        cameras = [threading.Thread(target=camera, args=(expected,)) for expected in [*frames] * (CAMERAS // 2)]
        for thread in cameras:
            thread.start()
        wait_until(lambda: len(answers) >= 2 * CAMERAS, "load")
        stopping.set()
        server.terminate()
        exit_code = server.exit_code()
        for thread in cameras:
            thread.join(PATIENCE_S)
        told = [event for event in server.events() if event["message"] == "inspection"]

    assert exit_code == 0
    judged = [answer.json() for answer in answers if answer.status_code == 200]
    assert {(answer["part_id"], answer["verdict"]) for answer in judged} == {("PASS", "PASS"), ("FAIL", "FAIL")}
    assert {answer.json()["code"] for answer in answers if answer.status_code != 200} <= {"line_not_ready"}
    # Connections that the kernel had taken but the server had not are cut; no frame that was judged lost its answer.
    assert sum(event["verdict"] != "NO_VERDICT" for event in told) == len(judged)
    assert len(cut_off) <= CAMERAS


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT, signal.SIGTERM), (signal.SIGHUP,)],
    ids=lambda signals: "-".join(one.name for one in signals),
)
def test_server_when_it_is_told_to_stop_in_any_way_and_again_then_what_was_accepted_is_answered(
    tmp_path, signals, request
):
    """Impatience and a closed terminal cost nobody a verdict; the end is bounded by the time for draining."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a server under nohup, as these tests may be, ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, inherited))
    make_bundle(tmp_path / "store")
    go_on = tmp_path / "go-on"
    patient = dict.fromkeys(
        ("FLAWLINE_DEFAULT_DEADLINE_S", "FLAWLINE_MAX_DEADLINE_S", "FLAWLINE_DRAIN_TIMEOUT_S"), "60"
    )
    with (
        ServerProcess(tmp_path / "store", patient, before=DEVICE_WAITS.format(str(go_on))) as server,
        ThreadPoolExecutor(CAMERAS) as cameras,
    ):
        server.ready()
        sent = [
            cameras.submit(httpx.post, server.url + INSPECT, content=GOOD, headers=PNG, timeout=PATIENCE_S)
            for _ in range(CAMERAS)
        ]
        accepted = f'flawline_queue_depth{{engine="demo_line"}} {CAMERAS}.0'
        wait_until(lambda: accepted in server.http.get("/metrics").text, "the frames")

        for heard, one in enumerate(signals, start=1):
            server.signal(one)
            wait_until(lambda heard=heard: _told(server, "told to stop", "stopping already") == heard, "the signal")
        go_on.touch()
        answers = [answer.result() for answer in sent]
        exit_code = server.exit_code()

        assert {(answer.status_code, answer.json()["verdict"]) for answer in answers} == {(200, "PASS")}
        assert exit_code == 0
        assert not [event for event in server.events() if event["level"] == "ERROR"]


def _told(server: ServerProcess, *messages: str) -> int:
    return sum(event["message"] in messages for event in server.events())


def test_server_when_the_health_port_is_taken_then_says_so_and_ends_in_order(tmp_path):
    """One line of the log names the address; nothing is cancelled half way."""
    make_bundle(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "service", "serve", "--store", str(tmp_path), "--port", "0"],
            env={**os.environ, "FLAWLINE_HEALTH_PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    assert ended.returncode == 3
    assert f"('127.0.0.1', {port}): address already in use" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert '"listening"' not in ended.stderr


def test_server_when_a_bad_frame_comes_among_seventy_good_ones_then_none_of_them_is_harmed(tmp_path):
    """Frames share batches and not their fate: what can't be read is told so, and every neighbour gets its verdict."""
    make_bundle(tmp_path)
    frames = [GOOD[: len(GOOD) // 2] if number % 14 == 3 else GOOD for number in range(75)]
    with ServerProcess(tmp_path, {"FLAWLINE_MAX_BATCH_SIZE": "8", "FLAWLINE_MAX_QUEUE_SIZE": "100"}) as server:
        server.ready()
        with ThreadPoolExecutor(16) as cameras:
            answers = list(cameras.map(lambda frame: server.http.post(INSPECT, content=frame, headers=PNG), frames))

    told = [(answer.status_code, answer.json()["verdict"]) for answer in answers]
    assert told == [(200, "PASS") if frame is GOOD else (400, "NO_VERDICT") for frame in frames]


def test_server_when_its_log_is_read_then_every_line_is_json_and_each_frame_has_one(tmp_path):
    """One canonical line a frame, with ids, verdict and seconds by stage; no access log beside it."""
    make_bundle(tmp_path)
    with ServerProcess(tmp_path) as server:
        server.ready()
        server.http.post(INSPECT, content=GOOD, headers=PNG | {"X-Request-Id": "r-1", "X-Part-Id": "917"})
        server.http.post(INSPECT, content=b"no image", headers=PNG | {"X-Request-Id": "r-2"})
        replaced = server.http.post(INSPECT, content=GOOD, headers=PNG | {"X-Request-Id": "r 3"}).json()["request_id"]
        tiff = encode(make_frame(), "TIFF")[:20]  # of which Pillow warns
        server.http.post(INSPECT, content=tiff, headers={"Content-Type": "image/tiff", "X-Request-Id": "r-4"})
        server.terminate()
        server.exit_code()
        log, events = list(server.log), list(server.events())

    inspections = {event["request_id"]: event for event in events if event["message"] == "inspection"}
    assert len(log) == len(events)
    assert sum(event["message"] == "inspection" for event in events) == 4
    assert (inspections["r-1"]["verdict"], inspections["r-1"]["part_id"]) == ("PASS", "917")
    assert (inspections["r-2"]["verdict"], inspections["r-2"]["code"]) == ("NO_VERDICT", "unreadable_frame")
    assert (inspections[replaced]["verdict"], inspections[replaced]["code"]) == ("NO_VERDICT", "parameter_invalid")
    assert inspections["r-4"]["code"] == "unreadable_frame"
    assert "py.warnings" in {event["logger"] for event in events}
    assert inspections["r-1"]["seconds"].keys() >= {"decode", "infer", "total"}


def test_server_when_the_device_is_gone_then_it_is_unready_within_a_period_and_ends_to_be_started_again(tmp_path):
    """A device that fails for good is found without any frame: not ready, then exit code 1."""
    make_bundle(tmp_path)
    gone = tmp_path / "gone"
    brief = {"FLAWLINE_GOLDEN_EVERY_S": "0.2"}
    with ServerProcess(tmp_path, brief, before=DEVICE_GOES.format(str(gone))) as server:
        server.ready()
        gone.touch()
        exit_code = server.exit_code()
        told = [event["message"] for event in server.events()]

    assert exit_code == 1
    assert "a batcher is lost" in told
    assert "an engine is lost; the process ends and wants to be started again" in told


def test_log_when_its_disk_is_full_then_frames_are_judged_and_lost_lines_are_counted(tmp_path):
    """A line that can't be written costs no frame its verdict, and the metrics tell that lines are missing."""
    store, full = tmp_path / "store", tmp_path / "full"
    make_bundle(store)
    with ServerProcess(store, before=DISK_FILLS.format(str(full))) as server:
        server.ready()
        with Cameras(server.url) as cameras:
            cameras.after()
            full.touch()
            cameras.after()
        metrics, ready = server.http.get("/metrics").text, server.http.get("/healthz/ready")
        server.terminate()
        exit_code = server.exit_code()

    cameras.assert_safe()
    assert {told.status for told in cameras.told} == {200}
    (lost,) = re.findall(r'^flawline_records_dropped_total\{sink="log"\} (\S+)$', metrics, re.MULTILINE)
    assert float(lost) > 0
    assert (ready.status_code, exit_code) == (200, 0)


def test_log_when_nobody_reads_it_then_frames_are_judged_and_the_server_ends_in_order(tmp_path):
    """Whatever collects the log may hang: its full pipe holds up neither a frame nor the end."""
    make_bundle(tmp_path)
    with ServerProcess(tmp_path) as server:
        server.ready()
        server.stop_reading()
        with Cameras(server.url) as cameras:
            cameras.after()
            cameras.after()
        refused = [server.http.post("/v1/lines/nowhere/inspect", content=b"").status_code for _ in range(60)]
        ready = server.http.get("/healthz/ready").status_code
        server.terminate()
        exit_code = server.exit_code()

    cameras.assert_safe()
    assert {told.status for told in cameras.told} == {200}
    assert set(refused) == {404}  # each of them a line of the log: several times what the pipe holds
    assert (ready, exit_code) == (200, 0)


def test_server_when_a_reader_stalls_and_a_thread_never_ends_then_it_still_ends_in_time(tmp_path):
    """The time for draining bounds the end: neither a client that stops reading nor a stuck thread can stretch it."""
    make_bundle(tmp_path)
    brief = {f"FLAWLINE_{name}_S": "5" for name in ("DEFAULT_DEADLINE", "MAX_DEADLINE", "DRAIN_TIMEOUT")}
    noise = encode(np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8), "BMP")
    with ServerProcess(tmp_path, brief, before=NEVER_ENDS) as server:
        server.ready()
        with server.http.stream("POST", INSPECT, content=noise, headers=PNG | {"Accept": "image/png"}) as answer:
            told_at = time.monotonic()
            server.terminate()
            exit_code = server.exit_code()
            took_s = time.monotonic() - told_at

    assert answer.status_code == 200
    assert exit_code == 1
    assert took_s < PATIENCE_S / 2
    assert "the process did not end by itself in time, and is ended" in {event["message"] for event in server.events()}


@pytest.mark.parametrize(
    ("options", "environment", "sentence"),
    [
        (["--port", "70000"], {}, "FLAWLINE_PORT"),
        (["--deadline-ms", "0"], {}, "FLAWLINE_DEFAULT_DEADLINE_S"),
        (["--device", "tpu"], {}, "FLAWLINE_DEVICE"),
        (["--keys-file", "absent.json"], {}, "absent.json"),
        ([], {"FLAWLINE_KEY_FILE": "keys.json"}, "did you mean FLAWLINE_KEYS_FILE?"),
        ([], {"FLAWLINE_MAX_BODY_BYTES": "lots"}, "FLAWLINE_MAX_BODY_BYTES"),
    ],
    ids=["port", "deadline", "device", "keys", "misspelt", "bytes"],
)
def test_start_when_a_setting_is_wrong_then_one_sentence_and_exit_code_two(tmp_path, options, environment, sentence):
    """A wrong option or setting stops the start with a sentence that names it, and without a traceback."""
    command = [sys.executable, "-m", "service", "serve", "--store", str(tmp_path), *options]

    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False, cwd=Path.cwd()
    )

    assert ended.returncode == 2
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr


def test_port_when_taken_then_the_start_fails_with_a_reason(tmp_path):
    """Two servers on one port are told apart: the second one ends, and says why."""
    with ServerProcess(tmp_path) as server:
        port = server.url.rpartition(":")[2]
        command = [sys.executable, "-m", "service", "serve", "--store", str(tmp_path), "--port", port]

        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)

    assert ended.returncode != 0
    assert "address already in use" in ended.stderr
