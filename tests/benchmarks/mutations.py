"""Damaged frames, strange heads, bombs and noise against a real server; ends with exit code 1 where one did harm.

    python -m tests.benchmarks.mutations                 the full measure: 10,000 frames and heads, some minutes
    python -m tests.benchmarks.mutations --count 500     a look

Harm is: an answer 5xx other than 503 and 504, a `PASS` for a frame whose end was cut off or for a PNG that was changed,
a bomb that is not answered with 413 or that costs memory, a server that grows or is not ready afterwards. Other formats
have no check: bytes that were changed into other valid ones are another picture, and what that shows is judged. Those
are told in a line of their own.
"""

import argparse
import collections
import contextlib
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np

from tests.factories import encode, make_bundle, make_frame
from tests.mutations import CUT, Mutant, bomb, mutants
from tests.servers import ServerProcess

INSPECT = "/v1/lines/demo_line/inspect"
CHECKED = frozenset({"image/png"})
BOMB_SIDE = 10_000  # 100 megapixels
CALLERS = 4
ALLOWED_GROWTH = 0.05  # in the second half: the first one fills what allocators and records keep
_EXPECTED = frozenset({503, 504})


def main() -> int:
    """Run everything and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="frames, and as many heads in a fifth of them")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        make_bundle(store)
        with ServerProcess(store) as server:
            server.ready()
            harm = [
                *send_mutants(server, arguments.count, arguments.seed),
                *send_heads(server, arguments.count // 5, arguments.seed),
                *send_bombs(server),
                *send_noise(server, max(50, arguments.count // 20), arguments.seed),
            ]
            if server.http.get("/healthz/ready").status_code != 200:
                harm.append("the server is not ready any more")
            faults = [event for event in server.events() if event["level"] == "ERROR"]
            harm += [f"logged: {event['message']}" for event in faults[:5]]
    print("\n".join(harm) or "no harm")
    return 1 if harm else 0


def send_mutants(server: ServerProcess, count: int, seed: int) -> list[str]:
    """Send damaged frames whose sound ones FAIL, and watch answers and memory."""
    statuses: collections.Counter[str] = collections.Counter()
    harm: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    tallying = threading.Lock()

    def send(mutant: Mutant) -> None:
        answer = server.http.post(INSPECT, content=mutant.data, headers={"Content-Type": mutant.media_type})
        verdict = answer.json().get("verdict")
        with tallying:
            statuses[f"{answer.status_code} {verdict}"] += 1
            if answer.status_code >= 500 and answer.status_code not in _EXPECTED:
                harm.append(f"{mutant.kind} {mutant.media_type}: {answer.status_code}")
            if verdict == "PASS":
                if mutant.kind == CUT or mutant.media_type in CHECKED:
                    harm.append(f"{mutant.kind} {mutant.media_type}: PASS")
                else:
                    others[f"{mutant.kind} {mutant.media_type}"] += 1

    started, half = time.monotonic(), 0
    sent = mutants(count, defect=True, seed=seed)
    with ThreadPoolExecutor(CALLERS) as callers:
        for part in range(10):
            list(callers.map(send, _some(sent, count // 10)))
            if part == 4:
                half = memory_of(server)
    growth = memory_of(server) / half - 1
    print(f"{count} damaged frames in {time.monotonic() - started:.0f} s: {dict(sorted(statuses.items()))}")
    print(f"other pictures of formats without a check that PASS: {dict(others)}")
    print(f"memory from the half to the end: {half / 2**20:.0f} MB, {growth:+.1%}")
    return [*harm, *([f"memory grew by {growth:.1%}"] if growth > ALLOWED_GROWTH else [])]


def send_heads(server: ServerProcess, count: int, seed: int) -> list[str]:
    """Send sound frames of a FAIL part under strange headers and parameters."""
    generator = np.random.default_rng(seed)
    frame = encode(make_frame(defect=True))
    names = (
        *("Content-Type", "Accept", "X-Part-Id", "X-Request-Id", "X-Deadline-Ms", "X-Heatmap", "X-Sequence", "X-View"),
        *("X-Pixel-Format", "X-Width", "X-Height", "X-Stride", "Authorization", "Range", "Expect", "Content-Encoding"),
    )
    values = (
        *("", "image/png", "application/x-raw-frame", "multipart/form-data", "multipart/form-data; boundary=", "-1"),
        *("1e309", "nan", "0", "99999999999999999999", "Mono8", "8", "../..", "%00", "*/*;q=x", "gzip", "a" * 8000),
    )
    statuses: collections.Counter[str] = collections.Counter()
    harm = []
    for _ in range(count):
        headers = {"Content-Type": "image/png"}
        for _ in range(int(generator.integers(1, 5))):
            value = values[int(generator.integers(len(values)))]
            if generator.random() < 0.3:
                value = bytes(generator.integers(33, 127, int(generator.integers(1, 40)), np.uint8)).decode()
            headers[names[int(generator.integers(len(names)))]] = value
        answer = server.http.post(INSPECT, content=frame, headers=headers)
        verdict = answer.headers.get("Flawline-Verdict") or ("PASS" if b'"verdict":"PASS"' in answer.content else "")
        statuses[str(answer.status_code)] += 1
        if (answer.status_code >= 500 and answer.status_code not in _EXPECTED) or verdict == "PASS":
            harm.append(f"{answer.status_code} {verdict} for {headers}")
    print(f"{count} strange heads: {dict(sorted(statuses.items()))}")
    return harm


def send_bombs(server: ServerProcess) -> list[str]:
    """Send four small files of 100 megapixels at once, of each codec that can make them small."""
    harm = []
    for image_format in ("PNG", "JPEG", "TIFF"):
        options = {"compression": "tiff_deflate"} if image_format == "TIFF" else {}
        data = bomb(BOMB_SIDE, image_format, **options)
        headers = {"Content-Type": f"image/{image_format.lower()}"}
        before, started = memory_of(server), time.monotonic()
        with ThreadPoolExecutor(CALLERS) as callers:
            answers = list(
                callers.map(lambda _: server.http.post(INSPECT, content=data, headers=headers).status_code, range(4))  # noqa: B023 - ends before the next one
            )
        took, growth = time.monotonic() - started, (memory_of(server) - before) / 2**20
        print(f"{image_format} bombs of {len(data)} bytes: {answers}, {took:.2f} s, memory {growth:+.0f} MB")
        if answers != [413] * 4 or growth > 64:
            harm.append(f"{image_format} bombs: {answers}, memory {growth:+.0f} MB")
    return harm


def send_noise(server: ServerProcess, count: int, seed: int) -> list[str]:
    """Send bytes that are no HTTP, and HTTP that was damaged, each on a connection of its own."""
    generator = np.random.default_rng(seed)
    frame = encode(make_frame(defect=True))
    head = f"POST {INSPECT} HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: {len(frame)}\r\n\r\n"
    address = ("127.0.0.1", urlsplit(server.url).port)
    answers: collections.Counter[str] = collections.Counter()
    harm = []
    for index in range(count):
        sent = bytearray(generator.bytes(int(generator.integers(1, 4000))))
        if index % 2:
            sent = bytearray(head.encode() + frame)
            for place in generator.integers(len(head), size=3):
                sent[place] = int(generator.integers(256))
        said = b""
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=5) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65536):
                said += chunk
        answers[said[9:12].decode("latin-1") or "closed"] += 1
        if said[9:10] == b"5" and said[9:12] not in (b"503", b"504"):
            harm.append(f"noise: {said[:60]!r}")
        if b'"verdict":"PASS"' in said:
            harm.append("noise: PASS")
    print(f"{count} connections with noise: {dict(sorted(answers.items()))}")
    return harm


def memory_of(server: ServerProcess) -> int:
    """Return the resident bytes of the server's process, as it says itself."""
    text = httpx.get(f"{server.url}/metrics").text
    (line,) = (line for line in text.splitlines() if line.startswith("process_resident_memory_bytes "))
    return int(float(line.split()[1]))


def _some(sent, count):
    """Take the next few of an iterator."""
    return [mutant for _, mutant in zip(range(count), sent, strict=False)]


if __name__ == "__main__":
    sys.exit(main())
