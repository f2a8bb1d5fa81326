"""Bodies that take memory: what is on its way is bounded in all and for each caller, and comes free again."""

import gzip
import hashlib
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from service.settings import Settings
from tests.factories import encode, make_bundle, make_frame
from tests.servers import LONG_S, PATIENCE_S, serve_in_thread, wait_until, wait_until_ready

INSPECT = "/v1/lines/demo_line/inspect"
LARGEST = 2**20
GOOD = encode(make_frame())
HEAD = (
    "POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: {kind}\r\nX-API-Key: {key}\r\nContent-Length: {length}\r\n"
    "Expect: 100-continue\r\n\r\n"
)
FORM = "multipart/form-data; boundary=x"
KEYS = ("one", "other", "scraper")


@contextmanager
def serving(folder: Path, *, keys: bool = True, **settings: float) -> Iterator[httpx.Client]:
    """Serve lines `demo_line` and `other_line` with memory for four of the largest bodies."""
    for line in ("demo_line", "other_line"):
        make_bundle(folder / "store", line)
    entries = [
        {"name": key, "sha256": hashlib.sha256(key.encode()).hexdigest(), "lines": ["*"]}
        | {"actions": ["metrics" if key == "scraper" else "inspect"]}
        for key in KEYS
    ]
    (folder / "keys.json").write_text(json.dumps(entries))
    known = Settings(
        store_directory=folder / "store",
        keys_file=folder / "keys.json" if keys else None,
        max_body_bytes=LARGEST,
        max_body_bytes_held=4 * LARGEST,
        **({"default_deadline_s": LONG_S, "max_deadline_s": LONG_S, "drain_timeout_s": LONG_S} | settings),
    )
    with serve_in_thread(known) as http:
        wait_until_ready(http)
        yield http


def ask(http: httpx.Client, key: str = "one", line: str = "demo_line") -> httpx.Response:
    """Send one good frame."""
    return http.post(
        INSPECT.replace("demo_line", line), content=GOOD, headers={"Content-Type": "image/png", "X-API-Key": key}
    )


@contextmanager
def unfinished(http: httpx.Client, path: str = INSPECT, kind: str = "image/png", bodies: int = 2) -> Iterator[None]:
    """Begin some of the largest bodies, of which one caller may have two, and send most of each."""
    with ExitStack() as connections:
        for _ in range(bodies):
            address = (http.base_url.host, http.base_url.port)
            connection = connections.enter_context(socket.create_connection(address, timeout=PATIENCE_S))
            head = HEAD.format(path=path, kind=kind, key="one", length=LARGEST).encode()
            connection.sendall(head)
            assert connection.recv(1024).startswith(b"HTTP/1.1 100 ")  # so there is room for it, which is taken
            connection.sendall(bytes(LARGEST - 1000))
        yield


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (INSPECT, "image/png"),
        (INSPECT, FORM),
        (f"{INSPECT}-batch", FORM),
        ("/v2/models/demo_line/infer", "application/json"),
    ],
    ids=["frame", "form", "several frames", "open inference"],
)
def test_bodies_when_one_key_never_ends_them_then_only_its_own_frames_are_refused(tmp_path, path, kind):
    """Half of the memory is the most that a key gets; the refusal is one of the moment, and is counted."""
    with serving(tmp_path) as http:
        with unfinished(http, path, kind):
            refused, other = ask(http), ask(http, key="other")
        wait_until(lambda: ask(http).status_code == 200, "room once they have left")
        metrics = http.get("/metrics", headers={"X-API-Key": "scraper"}).text

    assert (refused.json()["code"], refused.json()["verdict"]) == ("overloaded", "NO_VERDICT")
    assert int(refused.headers["retry-after"]) >= 1
    assert other.json()["verdict"] == "PASS"
    [counted] = [
        one
        for one in metrics.splitlines()
        if one.startswith("flawline_no_verdict_total") and "overloaded" in one and "demo_line" in one
    ]
    assert float(counted.split()[-1]) >= 1


def test_bodies_when_there_are_no_keys_then_each_line_has_its_share(tmp_path):
    """Where everybody is anybody, one line's cameras can't take all of the memory."""
    with serving(tmp_path, keys=False) as http, unfinished(http):
        assert ask(http).json()["code"] == "overloaded"
        assert ask(http, line="other_line").json()["verdict"] == "PASS"


def test_bodies_when_their_deadline_passes_then_their_memory_is_free_though_they_stay_connected(tmp_path):
    """Whoever neither sends on nor hangs up keeps nothing from others for longer than a deadline."""
    with serving(tmp_path, default_deadline_s=0.5) as http, unfinished(http):
        wait_until(lambda: ask(http).status_code == 200, "room after the deadline")


def test_body_when_its_length_is_not_told_then_it_is_counted_as_it_comes(tmp_path):
    """A body in chunks finds as little room as one that says how long it will be."""
    headers = {"Content-Type": "image/png", "X-API-Key": "one"}
    with serving(tmp_path) as http, unfinished(http):
        answer = http.post(INSPECT, content=iter([GOOD[:10], GOOD[10:]]), headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")


def test_body_when_it_grows_as_it_is_decompressed_then_what_it_becomes_is_counted(tmp_path):
    """A few kilobytes that become the largest body need its room."""
    bomb = gzip.compress(bytes(LARGEST))
    with serving(tmp_path) as http, unfinished(http, bodies=1):

        def infer(key: str) -> httpx.Response:
            headers = {"Content-Encoding": "gzip", "X-API-Key": key}
            return http.post("/v2/models/demo_line/infer", content=bomb, headers=headers)

        there_is_room, refused = infer("other"), infer("one")

    assert there_is_room.status_code == 400  # it was read, and is no request
    assert (refused.status_code, "way" in refused.json()["error"]) == (503, True)
