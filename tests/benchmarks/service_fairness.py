"""What nine lines notice of a tenth that sends twenty times its share, on one engine.

    python -m tests.benchmarks.service_fairness [--seconds 30] [--rounds 3] [--store FOLDER]

A share is a tenth of 60 % of what the engine can do. In each round the ten lines first send their shares, then one of
them twenty times as much; frames come at random times, and latencies are of the nine others.
"""

import statistics

from tests.benchmarks.serving import (
    Answer,
    Sender,
    Served,
    arguments,
    closed_loop,
    codes,
    open_loop,
    percentile,
    print_table,
    ready_store,
)
from tests.benchmarks.stand_in import make_jpeg

LINES = 10
TIMES = 20


def main() -> None:
    """Measure and print."""
    read = arguments(__doc__, seconds=30.0, rounds=3)
    store = ready_store(read.store, LINES)
    rows, rises = [], []
    with Served(store) as server:
        frame = make_jpeg()
        senders = [Sender(server.port, f"line{number}", frame, 2000) for number in range(LINES)]
        closed_loop(senders[0], 16, 2.0)
        capacity = sum(a.status == 200 for a in closed_loop(senders[0], 16, 6.0)) / 6.0
        share = 0.6 * capacity / LINES
        for number in range(read.rounds):
            p99 = []
            for times in (1, TIMES):
                rates = [(senders[0], share * times), *((sender, share) for sender in senders[1:])]
                answers = open_loop(rates, read.seconds, seed=number)
                others = [answer for answer in answers if answer.line != "line0"]
                noisy = [answer for answer in answers if answer.line == "line0"]
                p99.append(percentile(_latencies(others), 0.99))
                rows.append((number, times, codes(others), percentile(_latencies(others), 0.5), p99[-1], codes(noisy)))
            rises.append(100 * (p99[1] / p99[0] - 1))
    print(f"Capacity {capacity:.1f} frames/s, a share {share:.1f}.")
    print_table(("round", "times its share", "the others", "p50 ms", "p99 ms", "the noisy one"), rows)
    print(f"The others' p99 rises by {statistics.median(rises):+.0f} % (median of {len(rises)}).")


def _latencies(answers: list[Answer]) -> list[float]:
    return [answer.latency_ms for answer in answers if answer.status == 200]


if __name__ == "__main__":
    main()
