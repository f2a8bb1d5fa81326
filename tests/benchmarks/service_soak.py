"""Whether an hour of frames leaves anything behind.

    python -m tests.benchmarks.service_soak [--minutes 60] [--load 60] [--store FOLDER]

Frames come at random times at so many percent of what the service can take. Memory is read once a second; its slope is
that of a line through the readings after the first tenth, in percent of the mean an hour.
"""

import numpy as np

from tests.benchmarks.serving import Sender, Served, arguments, closed_loop, codes, open_loop, print_table, ready_store
from tests.benchmarks.stand_in import make_jpeg


def main() -> None:
    """Measure and print."""
    read = arguments(__doc__, minutes=60.0, load=60.0)
    store = ready_store(read.store)
    with Served(store) as server:
        sender = Sender(server.port, "line0", make_jpeg(), 5000)
        closed_loop(sender, 16, 2.0)
        capacity = sum(a.status == 200 for a in closed_loop(sender, 16, 6.0)) / 6.0
        memory: list[float] = []
        answers = open_loop(
            [(sender, read.load / 100 * capacity)],
            60 * read.minutes,
            watch=lambda: memory.append(server.memory_mib),
        )
    settled = np.array(memory[len(memory) // 10 :])
    hours = np.arange(len(settled)) / 3600
    slope = np.polyfit(hours, settled, 1)[0] / settled.mean() * 100
    print_table(
        ("minutes", "frames/s offered", "answers", "memory MiB first to last", "slope % an hour"),
        [
            (
                read.minutes,
                read.load / 100 * capacity,
                codes(answers),
                f"{settled[0]:.0f} to {settled[-1]:.0f}",
                float(slope),
            )
        ],
    )


if __name__ == "__main__":
    main()
