"""What a runner does with a batch: prepares its frames, runs and finishes them, and finds whose fault it is that fails.

Before: a runner was given the batch. After: the event loop is told what came of each frame. Nothing here knows the
loop, deadlines or who waits; all of it happens in the threads of the runners, in several of them at once.

Rules:

1.  What a frame's own work raises, before the run or after it, is that frame's answer and no neighbour's.
2.  A batch that fails is run again frame by frame, so that one frame can't fail its neighbours.
3.  When a frame fails alone, the probe (golden frames) tells whose fault it is: where it fails too, the engine is lost.
4.  A batch beside which no other runs and none waits may go a quicker way, on every core. Where that fails and the
    ordinary one does not, it is not taken again.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.engines.engine import Engine, EngineOutput, LoneRun, RunBatch
from service.errors import EngineFailed
from service.scheduling.places import Place
from service.scheduling.schedule import Priority, WaitingFrame

_Outcome_co = TypeVar("_Outcome_co", covariant=True)

_log = logging.getLogger("flawline")


class RunResult(NamedTuple):
    """What the engine said of one frame, and what it took.

    Attributes:
        scores: `(T,)` float32, raw scores of the graph, one for each network input of the frame.
        anomaly_maps: `(T, h, w)` float32.
        batch_size: frames that ran together.
        batch_number: of their run; no other run of this engine has it.
        queue_s: seconds from the arrival until a runner took it.
        prepare_s: seconds that the runner spent on making network inputs of it.
        infer_s: seconds in the engine.
        ran_at: when the engine had answered.
    """

    scores: NDArray[np.float32]
    anomaly_maps: NDArray[np.float32]
    batch_size: int
    batch_number: int
    queue_s: float
    prepare_s: float
    infer_s: float
    ran_at: float


class Work(Protocol[_Outcome_co]):
    """What a runner does with one frame beside running it, in its own thread; what it raises is this frame's alone."""

    def prepare(self) -> NDArray[np.uint8]:
        """Make the frame's network inputs `(T, H, W, 3)` uint8 RGB, as many as its place weighs."""
        ...

    def finish(self, result: RunResult) -> _Outcome_co:
        """Make of what the engine said what is waited for."""
        ...


@dataclass(eq=False, slots=True)
class Job:
    """A frame, what is to be done with it, and what has been done.

    Attributes:
        waiting: what the schedule is told of it.
        place: which it holds.
        work: what is done before and after its run.
        line_index: of its line within the bundle.
        submitted_at: when it began to wait.
        frames: its network inputs; None before they are made.
        prepare_s: seconds that this took.
        is_preparing: whether they are made now.
    """

    waiting: WaitingFrame
    place: Place
    work: Work[Any]
    line_index: int
    submitted_at: float
    frames: NDArray[np.uint8] | None = None
    prepare_s: float = 0.0
    is_preparing: bool = False


class RunOutcome(NamedTuple):
    """What became of a batch.

    Attributes:
        answers: what is waited for, or a fault, by the number of the frame.
        run_s: seconds of the run, with what was prepared for it; None where there is nothing to learn from it.
        is_engine_lost: whether known frames came out differently, too.
    """

    answers: dict[int, Any]
    run_s: float | None
    is_engine_lost: bool


class EngineRuns:
    """Runs batches on one engine.

    Args:
        engine: runs them, several at once.
        probe: runs frames whose answers are known, and raises where they come out differently.
        max_batch_size: network inputs in one run.
        clock: monotonic seconds.
        alone: the quicker way; None where there is none.
        is_alone: whether no other batch runs, on any engine, and none waits.
        expected_s: seconds that a batch is expected to take, by its weight.
    """

    def __init__(
        self,
        engine: Engine,
        probe: Callable[[], None],
        *,
        max_batch_size: int,
        clock: Callable[[], float],
        alone: LoneRun | None,
        is_alone: Callable[[], bool],
        expected_s: Callable[[int], float],
    ) -> None:
        self._engine = engine
        self._probe = probe
        self._most = max_batch_size
        self._clock = clock
        self._alone = alone
        self._is_alone = is_alone
        self._expected_s = expected_s
        self._numbers = count()

    def prepare(self, jobs: Iterable[Job]) -> tuple[list[Job], dict[int, Exception]]:
        """Make the network inputs of frames.

        Returns:
            Those that can be run, and by its number what was raised over each other one.
        """
        ready, faults = list[Job](), dict[int, Exception]()
        for job in jobs:
            fault = self._prepare_one(job)
            if fault is None:
                ready.append(job)
            else:
                faults[job.waiting.number] = fault
        return ready, faults

    def run(self, jobs: Sequence[Job], began_at: float) -> RunOutcome:
        """Run frames together, and one by one where that fails.

        Args:
            jobs: that are prepared, perhaps none; together no heavier than a batch may be, unless it is a single one.
            began_at: when a runner took them.
        """
        if not jobs:
            return RunOutcome({}, None, is_engine_lost=False)
        started_at = self._clock()
        alone = self._alone if self._may_run_alone(jobs) else None
        try:
            output = self._run_together(jobs, self._engine.run) if alone is None else self._run_wide(jobs, alone)
        except Exception as error:  # noqa: BLE001 - the edge: a runtime may raise anything
            _log.exception("a run failed", extra={"batch_size": len(jobs)})
            return self._run_one_by_one(jobs) if len(jobs) > 1 else self._blame(jobs[0], error)
        ended_at, number = self._clock(), next(self._numbers)
        answers: dict[int, Any] = {}
        end = 0
        for job in jobs:
            first, end = end, end + job.place.weight
            result = RunResult(
                scores=output.scores[first:end],
                anomaly_maps=output.anomaly_maps[first:end],
                batch_size=len(jobs),
                batch_number=number,
                queue_s=began_at - job.submitted_at,
                prepare_s=job.prepare_s,
                infer_s=ended_at - started_at,
                ran_at=ended_at,
            )
            answers[job.waiting.number] = _what_comes_of(partial(job.work.finish, result))
        if alone is None:
            return RunOutcome(answers, ended_at - began_at, is_engine_lost=False)
        # Admission asks how long frames take side by side. A lone one only tells how long they take at most.
        most_s = started_at - began_at + alone.speedup * (ended_at - started_at)
        return RunOutcome(answers, most_s if most_s < self._expected_s(end) else None, is_engine_lost=False)

    def _prepare_one(self, job: Job) -> Exception | None:
        if job.frames is not None:
            return None
        began_at, job.is_preparing = self._clock(), True
        frames = _what_comes_of(job.work.prepare)
        job.is_preparing = False
        job.prepare_s = self._clock() - began_at
        if isinstance(frames, Exception):
            return frames
        job.frames = frames
        return None

    def _may_run_alone(self, jobs: Sequence[Job]) -> bool:
        """Whether every core is there for a batch, which is asked once it is decoded: much may come till then.

        Of frames that matter less, as golden ones do, every other one goes the ordinary way, so that both are watched.
        """
        has_turn = any(job.waiting.priority is Priority.NORMAL or job.waiting.number % 2 for job in jobs)
        return has_turn and self._is_alone()

    def _run_wide(self, jobs: Sequence[Job], alone: LoneRun) -> EngineOutput:
        try:
            return self._run_together(jobs, alone.run)
        except Exception:  # noqa: BLE001 - the edge: a runtime may raise anything
            output = self._run_together(jobs, self._engine.run)
            _log.exception("lone frames run as others from now on")
            self._alone = None
            return output

    def _run_together(self, jobs: Sequence[Job], run: RunBatch) -> EngineOutput:
        inputs = [job.frames for job in jobs if job.frames is not None]
        lines = [_repeated(job.line_index, job.place.weight) for job in jobs]
        if len(inputs) == 1:  # a single frame is not copied
            frames, line_index = inputs[0], lines[0]
        else:
            frames, line_index = np.concatenate(inputs), np.concatenate(lines)
        if len(frames) <= self._most:
            return _run_once(run, frames, line_index)
        runs, first = [], 0  # only a single frame can weigh more than a batch may
        for size in run_sizes(len(frames), self._most):
            runs.append(_run_once(run, frames[first : first + size], line_index[first : first + size]))
            first += size
        return EngineOutput(*map(np.concatenate, zip(*runs, strict=True)))

    def _run_one_by_one(self, jobs: Sequence[Job]) -> RunOutcome:
        answers: dict[int, Any] = {}
        is_engine_lost = False
        for job in jobs:
            outcome = self.run([job], self._clock())
            answers |= outcome.answers
            is_engine_lost |= outcome.is_engine_lost
        return RunOutcome(answers, None, is_engine_lost)

    def _blame(self, job: Job, error: Exception) -> RunOutcome:
        sentence = "The engine failed on this frame; the part has no verdict."
        fault = error if isinstance(error, EngineFailed) else EngineFailed(sentence)
        answers: dict[int, Any] = {job.waiting.number: fault}
        try:
            self._probe()
        except Exception:  # noqa: BLE001 - the edge: a runtime may raise anything
            _log.exception("the probe failed as well")
            return RunOutcome(answers, None, is_engine_lost=True)
        return RunOutcome(answers, None, is_engine_lost=False)


def run_sizes(weight: int, max_batch_size: int) -> Iterator[int]:
    """Cut a batch into runs: one, unless it is a frame that weighs more than the largest run."""
    return (min(max_batch_size, weight - first) for first in range(0, weight, max_batch_size))


@lru_cache(maxsize=1024)  # numpy takes longer over the one number than over all that is done for a lone frame besides
def _repeated(line_index: int, weight: int) -> NDArray[np.int64]:
    """Return a frame's line once for each of its network inputs, to be read only."""
    indices = np.full(weight, line_index, np.int64)
    indices.setflags(write=False)
    return indices


def _run_once(run: RunBatch, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
    output = run(frames, line_index)
    if not len(output.scores) == len(output.anomaly_maps) == len(frames):
        raise EngineFailed("The engine answered with another number of frames than it was given.")
    return output


def _what_comes_of(step: Callable[[], Any]) -> Any:
    """Return what a step gives, or the exception that it raises."""
    try:
        return step()
    except Exception as error:  # noqa: BLE001 - the edge: a codec may raise anything, and only this frame fails with it
        return error
