"""What the service does with as much as it can take, and with three times as much.

    python -m tests.benchmarks.service_overload [--seconds 60] [--deadline 500] [--store FOLDER]

Capacity is what 16 connections get in a closed loop. Then frames come at random times: at 60 % of capacity, where the
99th percentile is held against the time of a single frame, and at 300 %, where what was accepted must be answered
within its deadline (milliseconds) and the rest refused at once. Goodput is held against the mean of the capacity right
before and right after, and lasts until the last answer, so that what is accepted near the end counts for nothing extra.
"""

import statistics

from tests.benchmarks.serving import (
    Sender,
    Served,
    arguments,
    closed_loop,
    codes,
    measure_limit,
    open_loop,
    percentile,
    print_table,
    ready_store,
)
from tests.benchmarks.stand_in import make_jpeg


def measure_capacity(sender: Sender) -> float:
    """Return the frames a second that 16 connections get."""
    answers = closed_loop(sender, 16, 6.0)
    took_s = max(a.ended_at for a in answers) - min(a.sent_at for a in answers)
    return sum(a.status == 200 for a in answers) / took_s


def main() -> None:
    """Measure and print."""
    read = arguments(__doc__, seconds=60.0, deadline=500)
    store = ready_store(read.store)
    limit = measure_limit(store, 4)
    with Served(store) as server:
        sender = Sender(server.port, "line0", make_jpeg(), read.deadline)
        closed_loop(sender, 16, 2.0)
        capacity = measure_capacity(sender)
        easy = open_loop([(sender, 0.6 * capacity)], read.seconds)
        memory = [server.memory_mib]
        before = measure_capacity(sender)
        hard = open_loop([(sender, 3 * before)], read.seconds, watch=lambda: memory.append(server.memory_mib))
        capacities = (before, measure_capacity(sender))
        after = closed_loop(sender, 1, 2.0)
    latencies = [answer.latency_ms for answer in easy if answer.status == 200]
    print(
        f"Capacity {capacity:.1f} frames/s; limit {limit.frames_a_second:.1f}, a single frame {limit.single_ms:.1f} ms."
    )
    print_table(
        ("60 % of capacity", "p50 ms", "p95 ms", "p99 ms", "p99 in single frames"),
        [
            (
                codes(easy),
                *(percentile(latencies, share) for share in (0.5, 0.95, 0.99)),
                percentile(latencies, 0.99) / limit.single_ms,
            )
        ],
    )
    in_time = [a.wait_ms for a in hard if a.status == 200]
    took_s = max(a.ended_at for a in hard) - min(a.sent_at for a in hard)
    refused = [a.wait_ms for a in hard if a.status == 503]
    print_table(
        ("300 % of capacity", "goodput", "answered late", "refused p50 ms", "p99", "longest", "memory MiB"),
        [
            (
                codes(hard),
                sum(wait <= read.deadline for wait in in_time) / took_s / statistics.mean(capacities),
                sum(wait > read.deadline for wait in in_time) + sum(a.status == 504 for a in hard),
                *(percentile(refused, share) for share in (0.5, 0.99, 1.0)),
                f"{memory[0]:.0f} to {max(memory):.0f}, at the end {memory[-1]:.0f}",
            )
        ],
    )
    print(f"Capacity before and after it: {capacities[0]:.1f} and {capacities[1]:.1f} frames/s.")
    print(f"Afterwards: {codes(after)}, p50 {percentile([a.wait_ms for a in after], 0.5):.1f} ms.")


if __name__ == "__main__":
    main()
