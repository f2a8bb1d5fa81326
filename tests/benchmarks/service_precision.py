"""What fewer bits give a whole service on real frames, beside the float32 limit and what the best other server reaches.

    flawline train LINE --store fp32 …; flawline export RUN --precision int8 --store int8
    python -m tests.benchmarks.service_precision fp32 int8 LINE/test [--device openvino] [--rounds 3] [--seconds 8]

Both stores hold one line, exported from one run behind the gate on verdicts. Each is served by a process of its own,
the second one on `--device`; both and the limit (float32, decode and run on two threads, no server) take turns on the
same frame. The best other server reaches `--best` of that limit, as was measured with a network of the same kind. Then
every frame of the folder is sent to both, and their verdicts are counted: those that differ lie at a threshold, or the
gate has not done its work.
"""

import argparse
import http.client
import json
import statistics
from collections import Counter
from pathlib import Path

from tests.benchmarks.serving import PATIENCE_S, Sender, Served, closed_loop, measure_limit, print_table

_MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".bmp": "image/bmp"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float32", type=Path, help="store of the float32 bundle")
    parser.add_argument("lower", type=Path, help="store of the other one")
    parser.add_argument("frames", type=Path, help="folder of images")
    parser.add_argument("--device", default="cpu", help="of the other one: cpu or openvino")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument(
        "--best", type=float, default=0.92, help="share of the limit that the best other server reaches"
    )
    read = parser.parse_args()
    line = next(read.float32.glob("*/*/manifest.json")).parents[1].name
    files = sorted(file for file in read.frames.rglob("*") if file.suffix.lower() in _MEDIA_TYPES)
    rates: dict[str, list[float]] = {"limit": [], "float32": [], "lower": []}
    with Served(read.float32.resolve()) as plain, Served(read.lower.resolve(), device=read.device) as lower:
        for number in range(read.rounds):
            file = files[number % len(files)]
            rates["limit"].append(measure_limit(read.float32.resolve(), read.seconds, file).frames_a_second)
            for name, server in (("float32", plain), ("lower", lower)):
                sender = Sender(server.port, line, file.read_bytes(), media_type=_MEDIA_TYPES[file.suffix.lower()])
                closed_loop(sender, read.connections, 1.0)
                answers = closed_loop(sender, read.connections, read.seconds)
                took_s = max(one.ended_at for one in answers) - min(one.sent_at for one in answers)
                rates[name].append(sum(one.status == 200 for one in answers) / took_s)
        verdicts = Counter((_verdict(plain, line, file), _verdict(lower, line, file)) for file in files)
    limit = rates["limit"]
    print_table(
        ("", "frames/s", "of the float32 limit", "of the best other server"),
        [
            (
                name,
                statistics.median(measured),
                statistics.median(one / of for one, of in zip(measured, limit, strict=True)),
                statistics.median(one / (of * read.best) for one, of in zip(measured, limit, strict=True)),
            )
            for name, measured in rates.items()
        ],
    )
    print_table(
        ("float32 says", "the other says", "frames"), [(*pair, count) for pair, count in sorted(verdicts.items())]
    )


def _verdict(server: Served, line: str, file: Path) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    headers = {"Content-Type": _MEDIA_TYPES[file.suffix.lower()], "X-Deadline-Ms": "10000"}
    connection.request("POST", f"/v1/lines/{line}/inspect", file.read_bytes(), headers)
    said = str(json.loads(connection.getresponse().read())["verdict"])
    connection.close()
    return said


if __name__ == "__main__":
    main()
