"""Whether an hour of frames leaves anything behind.

    python -m tests.benchmarks.service_soak [--minutes 60] [--load 60] [--rate 16] [--store FOLDER]

Frames come at random times, at so many percent of what the service can take, or at so many a second where `--rate` says
so: then nothing is measured first, and the soak can run beside other work. Memory, open files and threads are read
about once a second and told about once a minute. The slope of memory is that of a line through the readings after the
first tenth, in percent of their mean an hour; also for the second half alone, where a cache that fills no longer shows.
"""

import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.benchmarks.serving import Sender, Served, arguments, closed_loop, codes, open_loop, print_table, ready_store
from tests.benchmarks.stand_in import make_jpeg

_TOLD_EVERY = 60  # readings


class Reading(NamedTuple):
    """What the server's process held at one moment, so many seconds after the start."""

    at_s: float
    memory_mib: float
    open_files: int
    threads: int


def main() -> None:
    """Measure and print."""
    read = arguments(__doc__, optional=("rate",), minutes=60.0, load=60.0, rate=16.0)
    readings: list[Reading] = []
    with Served(ready_store(read.store)) as server:
        sender = Sender(server.port, "line0", make_jpeg(), 5000)
        rate = read.rate or read.load / 100 * _capacity(sender)

        begun = time.monotonic()

        def look() -> None:
            at_s = time.monotonic() - begun
            readings.append(Reading(at_s, server.memory_mib, server.open_files, server.threads))
            if len(readings) % _TOLD_EVERY == 0:
                print(readings[-1], file=sys.stderr, flush=True)

        answers = open_loop([(sender, rate)], 60 * read.minutes, watch=look)
    settled = readings[len(readings) // 10 :]
    memory = [reading.memory_mib for reading in settled]
    print_table(
        ("minutes", "frames/s", "answers", "memory MiB, first to last", "slope % an hour", "in the second half"),
        [
            (
                read.minutes,
                rate,
                codes(answers),
                f"{memory[0]:.1f} to {memory[-1]:.1f}",
                _slope(settled),
                _slope(settled[len(settled) // 2 :]),
            )
        ],
    )
    print_table(
        ("", "first", "least", "most", "last"),
        [
            (name, values[0], min(values), max(values), values[-1])
            for name, values in (
                ("open files", [reading.open_files for reading in settled]),
                ("threads", [reading.threads for reading in settled]),
            )
        ],
    )


def _capacity(sender: Sender) -> float:
    closed_loop(sender, 16, 2.0)
    return sum(answer.status == 200 for answer in closed_loop(sender, 16, 6.0)) / 6.0


def _slope(readings: Sequence[Reading]) -> float:
    """Return the slope of memory, in percent of its mean an hour."""
    hours = np.array([reading.at_s for reading in readings]) / 3600
    memory = np.array([reading.memory_mib for reading in readings])
    return float(np.polyfit(hours, memory, 1)[0] / memory.mean() * 100)


if __name__ == "__main__":
    main()
