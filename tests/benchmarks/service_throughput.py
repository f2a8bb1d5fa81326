"""How much of the machine the service leaves to the detector: frames a second, CPU time a frame, added latency.

    python -m tests.benchmarks.service_throughput [--rounds 5] [--seconds 8] [--store FOLDER]

In each round the limit and the server take turns at 1, 8 and 32 connections. The figures are medians of the rounds, and
ratios are of neighbours. What a lone camera's median lies above is shown twice: decoding and running on one thread, and
decoding and running on every core, as the server runs a frame that is alone.
"""

import statistics
from operator import attrgetter

from tests.benchmarks.serving import (
    Limit,
    Sender,
    Served,
    arguments,
    closed_loop,
    codes,
    measure_limit,
    percentile,
    print_table,
    ready_store,
)
from tests.benchmarks.stand_in import make_jpeg

CONNECTIONS = (1, 8, 32)


def main() -> None:
    """Measure and print."""
    read = arguments(__doc__, rounds=5, seconds=8.0)
    store = ready_store(read.store)
    rows: dict[int, list[tuple[float, float, float, float, Limit]]] = {c: [] for c in CONNECTIONS}
    with Served(store) as server:
        sender = Sender(server.port, "line0", make_jpeg())
        closed_loop(sender, 4, 1.0)
        for number in range(read.rounds):
            before = measure_limit(store, read.seconds / 2)
            for connections in CONNECTIONS:
                cpu_s = server.cpu_s
                answers = closed_loop(sender, connections, read.seconds)
                cpu_s = server.cpu_s - cpu_s
                after = measure_limit(store, read.seconds / 2)
                good = [answer for answer in answers if answer.status == 200]
                if len(good) < len(answers):
                    print(f"not all were answered in round {number}: {codes(answers)}")
                took_s = max(a.ended_at for a in answers) - min(a.sent_at for a in answers)
                latencies = [answer.wait_ms for answer in good]
                limit = Limit(*(statistics.mean(pair) for pair in zip(before, after, strict=True)))
                cpu_ms = 1000 * cpu_s / len(answers)
                rows[connections].append(
                    (len(good) / took_s, cpu_ms, percentile(latencies, 0.5), percentile(latencies, 0.99), limit)
                )
                before = after
        memory = server.memory_mib
    print_table(
        (
            *("connections", "frames/s", "of the limit", "CPU ms a frame", "over the limit", "p50 ms", "p99 ms"),
            *("over one thread, ms", "over every core, ms"),
        ),
        [
            (
                connections,
                statistics.median(row[0] for row in measured),
                statistics.median(row[0] / row[4].frames_a_second for row in measured),
                statistics.median(row[1] for row in measured),
                f"{statistics.median(100 * (row[1] / row[4].cpu_ms - 1) for row in measured):+.1f} %",
                statistics.median(row[2] for row in measured),
                statistics.median(row[3] for row in measured),
                *(
                    statistics.median(row[2] - single_ms(row[4]) for row in measured) if connections == 1 else ""
                    for single_ms in (attrgetter("single_ms"), attrgetter("alone_ms"))
                ),
            )
            for connections, measured in rows.items()
        ],
    )
    limits = [row[4] for measured in rows.values() for row in measured]
    print(
        f"Limit, decode and run on two threads: {statistics.median(x.frames_a_second for x in limits):.1f} frames/s, "
        f"{statistics.median(x.cpu_ms for x in limits):.2f} CPU ms; a single frame "
        f"{statistics.median(x.single_ms for x in limits):.1f} ms, on every core "
        f"{statistics.median(x.alone_ms for x in limits):.1f} ms. Server's memory {memory:.0f} MiB."
    )


if __name__ == "__main__":
    main()
