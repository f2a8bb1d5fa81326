"""Runs every batch size that the schedule may choose, before a line is ready; the time that it may take is bounded.

The first run of a size allocates, chooses kernels and records graphs; a frame of a camera must never wait for that.
Where time runs out, the larger sizes are given up rather than left cold: the schedule then never chooses them.
"""

import logging
from collections.abc import Callable

import numpy as np

from service.contract.bundle import Manifest
from service.engines.engine import Engine
from service.schedule import RunTimes

# The first one allocates, the second one may record a graph, the third one is what a frame will meet.
_RUNS = 3

_log = logging.getLogger("flawline")


def warm_up(
    engine: Engine, manifest: Manifest, max_batch_size: int, limit_s: float, clock: Callable[[], float]
) -> RunTimes:
    """Warm an engine, smallest batches first, and learn what each size takes.

    Args:
        engine: just opened.
        manifest: of its bundle.
        max_batch_size: the largest batch that is wanted.
        limit_s: seconds after which no further size is begun; a batch of one always runs.
        clock: monotonic seconds.

    Returns:
        What was learned; its length is the largest batch that was warmed.

    Raises:
        EngineFailed: if a run fails.
    """
    begun = clock()
    learned: list[float] = []
    for size in range(1, max_batch_size + 1):
        if learned and clock() - begun >= limit_s:
            _log.warning(
                "warming up took too long; batches stay smaller",
                extra={"engine": manifest.name, "limit_s": limit_s, "max_batch_size": len(learned)},
            )
            break
        frames = np.zeros((size, manifest.input.height, manifest.input.width, 3), np.uint8)
        line_index = np.zeros(size, np.int64)
        for _ in range(_RUNS):
            started_at = clock()
            engine.run(frames, line_index)
            took = clock() - started_at
        learned.append(took)
    run_times = RunTimes.unknown(len(learned))
    for size, seconds in enumerate(learned, start=1):
        run_times = run_times.learn(size, seconds)
    return run_times
