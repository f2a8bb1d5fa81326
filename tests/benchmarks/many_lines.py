"""What a line costs: one multi-line bundle on a real server, with one line and with many.

Run: `python tests/benchmarks/many_lines.py [--lines 1000]`. A bundle of the tiny class-conditional graph is written for
each count, `flawline serve` is started on it, and its memory is read from the kernel once it is ready, and again after
every line has had a frame: metrics of a line are made with its first frame. Printed as rows of a table.

Limits: a line takes at most 100 kB, and 1,000 lines are ready within 30 s of the start. Both are judged in the same
run, and the exit code is 1 where one of them is missed.
"""

import argparse
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository: tests are no package

from tests.factories import encode, make_bundle, make_frame
from tests.servers import ServerProcess

_MOST_BYTES_A_LINE = 100_000
_LONGEST_START_S = 30.0
_PNG = {"Content-Type": "image/png"}


class Measured(NamedTuple):
    """One server.

    Attributes:
        lines: that it serves.
        ready_s: from its start until it was ready.
        ready_bytes: resident memory when it was.
        seen_bytes: resident memory after a frame of every line.
        scrape_bytes: of the metrics, then.
    """

    lines: int
    ready_s: float
    ready_bytes: int
    seen_bytes: int
    scrape_bytes: int


def measure(lines: int, folder: Path) -> Measured:
    """Serve a bundle of so many lines."""
    names = tuple(f"line_{number:04d}" for number in range(lines))
    make_bundle(folder, "many", lines=names, conditional=True)
    frame = encode(make_frame())
    started_at = time.monotonic()
    with ServerProcess(folder, {"FLAWLINE_LOG_LEVEL": "INFO"}) as server:
        server.ready()
        ready_s = time.monotonic() - started_at
        ready_bytes = resident_bytes(server)

        def ask(name: str) -> None:
            # The tiny graph takes another grey for good on each line, so the verdicts differ; all that counts is one.
            server.http.post(f"/v1/lines/{name}/inspect", content=frame, headers=_PNG).raise_for_status()

        with ThreadPoolExecutor(4) as cameras:
            list(cameras.map(ask, names))
        scrape = server.http.get("/metrics").content
        return Measured(lines, ready_s, ready_bytes, resident_bytes(server), len(scrape))


def resident_bytes(server: ServerProcess) -> int:
    """Return what the server says of its own resident memory."""
    (text,) = re.findall(r"^process_resident_memory_bytes (\S+)$", server.http.get("/metrics").text, re.MULTILINE)
    return int(float(text))


def main() -> None:
    """Measure one line and many, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=1000)
    wanted = parser.parse_args().lines
    with tempfile.TemporaryDirectory() as folder:
        one = measure(1, Path(folder) / "one")
        many = measure(wanted, Path(folder) / "many")
    print("| lines | start to ready, s | RSS at ready, MB | RSS after a frame of each, MB | scrape, kB |")
    print("|---:|---:|---:|---:|---:|")
    for row in (one, many):
        print(
            f"| {row.lines} | {row.ready_s:.1f} | {row.ready_bytes / 1e6:.0f} | {row.seen_bytes / 1e6:.0f} "
            f"| {row.scrape_bytes / 1e3:.0f} |"
        )
    a_line = (many.seen_bytes - one.seen_bytes) / (wanted - 1)
    print(
        f"\nA line takes {a_line / 1e3:.1f} kB (limit {_MOST_BYTES_A_LINE / 1e3:.0f}), of which "
        f"{(many.ready_bytes - one.ready_bytes) / (wanted - 1) / 1e3:.1f} kB before its first frame; "
        f"ready after {many.ready_s:.1f} s (limit {_LONGEST_START_S:.0f})."
    )
    raise SystemExit(0 if a_line <= _MOST_BYTES_A_LINE and many.ready_s <= _LONGEST_START_S else 1)


if __name__ == "__main__":
    main()
