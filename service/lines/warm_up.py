"""Runs every batch size that the schedule may choose, before a line is ready; the time that it may take is bounded.

Where an engine has a quicker way for a frame that is alone, that is tried here as well (`LoneTrial`).

The first run of a size allocates, chooses kernels and records graphs; a frame of a camera must never wait for that.
Where time runs out, the larger sizes are given up rather than left cold: the schedule then never chooses them.

When and where a run is done is said by whoever loads: beside lines that are served, their frames come first.
"""

import contextlib
import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import wait

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Manifest
from service.engines.engine import Engine, EngineOutput, LoneRun, RunBatch
from service.scheduling.schedule import RunTimes
from service.threads import BEHIND_FRAMES, begin

# A start is a busy time, and the lone way, which needs every core, is the one that is held up; so it is asked again.
_LONE_TRIES = 20
_LONE_LIMIT_S = 2.0
# The first one allocates, the second one may record a graph, the third one is what a frame will meet.
_RUNS = 3
_TOGETHER_WITHIN_S = 1.0

_log = logging.getLogger("flawline")

# Does one run, at once or when its turn has come, and tells its answer and the seconds that it took itself.
TimedRun = Callable[[RunBatch, NDArray[np.uint8], NDArray[np.int64]], tuple[EngineOutput, float]]


def at_once(clock: Callable[[], float]) -> TimedRun:
    """Return how runs are done that nobody is waiting behind."""

    def timed(run: RunBatch, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> tuple[EngineOutput, float]:
        began_at = clock()
        output = run(frames, line_index)
        return output, clock() - began_at

    return timed


def warm_up(
    engine: Engine,
    manifest: Manifest,
    max_batch_size: int,
    limit_s: float,
    timed: TimedRun,
) -> RunTimes:
    """Warm an engine, smallest batches first, and learn what each size takes.

    Args:
        engine: just opened.
        manifest: of its bundle.
        max_batch_size: the largest batch that is wanted.
        limit_s: seconds of running after which no further size is begun; a batch of one always runs. What runs wait for
            their turn does not count: busy neighbours must not make this engine's batches smaller for good.
        timed: how runs are done.

    Returns:
        What was learned; its length is the largest batch that was warmed.

    Raises:
        EngineFailed: if a run fails.
    """
    learned: list[float] = []
    spent_s = 0.0
    for size in range(1, max_batch_size + 1):
        if learned and spent_s >= limit_s:
            _log.warning(
                "warming up took too long; batches stay smaller",
                extra={"engine": manifest.name, "limit_s": limit_s, "max_batch_size": len(learned)},
            )
            break
        frames = np.zeros((size, manifest.input.height, manifest.input.width, 3), np.uint8)
        line_index = np.zeros(size, np.int64)
        # The quickest of them: what else goes on just now tells nothing of the engine, and would refuse frames for it.
        took_s = [timed(engine.run, frames, line_index)[1] for _ in range(_RUNS)]
        learned.append(min(took_s))
        spent_s += sum(took_s)
    run_times = RunTimes.unknown(len(learned))
    for size, seconds in enumerate(learned, start=1):
        run_times = run_times.learn(size, seconds)
    return run_times


def run_side_by_side(engine: Engine, manifest: Manifest, batch_size: int, count: int) -> None:
    """Run as many batches at once as frames may, so that the buffers of all of them are there, and can be seen.

    Args:
        engine: warm.
        manifest: of its bundle.
        batch_size: frames in each.
        count: of runs.

    Raises:
        EngineFailed: if one fails.
    """
    frames = np.zeros((batch_size, manifest.input.height, manifest.input.width, 3), np.uint8)
    line_index = np.zeros(batch_size, np.int64)
    together = threading.Barrier(count)

    def run() -> None:
        with contextlib.suppress(threading.BrokenBarrierError):  # then they come one by one, and less is seen
            together.wait(_TOGETHER_WITHIN_S)
        engine.run(frames, line_index)

    runs = [begin(run, name="flawline-warm-up", niceness=BEHIND_FRAMES) for _ in range(count)]
    wait(runs)
    for outcome in runs:
        outcome.result()


class LoneTrial:
    """Runs an engine's both ways on frames that are known, and says whether the lone one may be taken.

    A frame's score must not depend on what else goes on, so both have to say the same to the last bit; and the lone one
    has to be quicker, which on many cores or a slow memory it need not be. One that fails is not taken, and no reason
    to refuse the line.

    Args:
        engine: warm.
        timed: how runs are done.
    """

    def __init__(self, engine: Engine, timed: TimedRun) -> None:
        self._timed = timed
        self._engine = engine
        self._is_equal = True
        self._spent_s = 0.0
        self._quickest_s = self._quickest_alone_s = math.inf
        self._last: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None

    def run(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        """Run frames `(B, H, W, 3)` uint8 of lines `(B,)` int64 as `Engine.run` does, and once more the other way.

        Raises:
            EngineFailed: if the ordinary way fails.
        """
        output, took_s = self._timed(self._engine.run, frames, line_index)
        if self._engine.alone is None:
            return output
        self._last = frames, line_index
        try:
            other, took_alone_s = self._timed(self._engine.alone.run, frames, line_index)
        except Exception:  # noqa: BLE001 - the edge: a runtime may raise anything
            _log.exception("the lone way failed")
            self._is_equal = False
            return output
        self._spent_s += took_s + took_alone_s
        self._quickest_alone_s = min(self._quickest_alone_s, took_alone_s / len(frames))
        self._quickest_s = min(self._quickest_s, took_s / len(frames))
        self._is_equal &= all(map(np.array_equal, output, other))
        return output

    def winner(self) -> LoneRun | None:
        """Return the lone way if it may be taken; runs known frames again for a while where it was not quicker."""
        if self._last is None:  # there is no other way, or nothing was tried
            return None
        limit_s = self._spent_s + _LONE_LIMIT_S  # of running, as for the sizes
        for _ in range(_LONE_TRIES):
            if self._is_quicker or not self._is_equal or self._spent_s >= limit_s:
                break
            self.run(*self._last)
        if self._is_equal and self._is_quicker:
            return self._engine.alone
        _log.info("lone frames run as others", extra={"is_equal": self._is_equal, "is_quicker": self._is_quicker})
        return None

    @property
    def _is_quicker(self) -> bool:
        return self._quickest_alone_s < self._quickest_s
