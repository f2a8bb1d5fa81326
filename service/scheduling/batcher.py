"""One engine's queue: takes frames, asks the schedule, hands batches to the runners, and answers each frame once.

Before: the frame has its place. After: it is answered. What a frame needs before and after its run is done by the
runner, in the same thread, where whoever brings it wants that (`Work`).

The event loop owns all that is kept here. What it shares with the runners is in `batch_queue`: a runner that ends a
batch takes the next one there by itself, posts to the loop what became of the first and what was decided, and runs on.
Nothing polls: frames are taken when one arrives, a run ends, or a deadline comes. A frame's deadline fires by a timer
of its own, so it is on time even behind a run that never ends.

A batch that fails is run again frame by frame, so that one frame can't fail its neighbours. When a frame fails alone,
the probe (golden frames) tells whose fault it is: where it fails too, the engine is lost and the batcher is unhealthy,
as it is after a run that takes too long or a fault of its own. An unhealthy batcher answers everything that waits with
`EngineFailed` and never recovers; the process has to be started again.

A frame that keeps its runner too long before its run, while it is decoded, says nothing about the engine. It is
refused, another runner takes that one's place, and the one that was given up ends when it comes back, in what time the
others leave. Only where many do not come back is the batcher lost: a new process alone gets back what they hold.
"""

import asyncio
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count, pairwise
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.engines.engine import Engine, EngineOutput, LoneRun, RunBatch
from service.errors import DeadlinePassed, EngineFailed, FlawlineError, LineNotReady, Overloaded, UnreadableFrame
from service.observability.telemetry import CALLER_LEFT, REQUEST_FAILED, Discarded, EngineMeter
from service.scheduling.batch_queue import Batch, BatchQueue, Place, Running, Taken
from service.scheduling.schedule import Priority, RunTimes, WaitingFrame, has_room
from service.threads import BEHIND_FRAMES, BEHIND_THE_LOOP, hold_back, stand_back

# The loop's timers may fire a little early; looking again just after the moment saves a second look.
_TIMER_SLACK_S = 0.001
# Looks for a stuck run in the time that makes it one; who looks seldom takes a process that stood still for one.
_LOOKS_FOR_STUCK = 6
# Threads that were given up and did not come back, each with a frame's memory.
MOST_GIVEN_UP = 16

# Each frame gets an instance of its own: one that is raised in several tasks would collect their tracebacks.
_Fault = Callable[[], FlawlineError]

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


class _Ready:
    """Work of which nothing is left but to run."""

    def __init__(self, frames: NDArray[np.uint8]) -> None:
        self._frames = frames

    def prepare(self) -> NDArray[np.uint8]:
        return self._frames

    def finish(self, result: RunResult) -> RunResult:
        return result


@dataclass(eq=False, slots=True)
class _Entry:
    """A frame that waits or runs."""

    waiting: WaitingFrame
    place: Place
    work: Work[Any]
    line_index: int
    submitted_at: float
    answer: asyncio.Future[Any]
    frames: NDArray[np.uint8] | None = None
    prepare_s: float = 0.0
    is_preparing: bool = False

    @property
    def is_left(self) -> bool:
        """Whether nobody waits for it any more; a runner may ask."""
        return self.answer.done()


class _Outcome(NamedTuple):
    """What became of a batch.

    Attributes:
        answers: what is waited for, or a fault, by the number of the frame.
        run_s: seconds of the run, with what was prepared for it; None where there is nothing to learn from it.
        is_engine_lost: whether known frames came out differently, too.
    """

    answers: dict[int, Any]
    run_s: float | None
    is_engine_lost: bool


class _GivenUp(Exception):
    """The batch was given up while it was prepared, and its runner has been replaced."""


class Batcher:
    """The queue and the runners of one engine.

    Args:
        engine: runs batches, several at once.
        probe: runs frames whose answers are known, and raises where they come out differently.
        lines: that the engine serves.
        runners: batches that run side by side.
        max_queue_size: frames that have a place at a time.
        run_times: learned from warming up; its length is the largest batch.
        stuck_after_s: a run that takes longer makes the batcher unhealthy, and preparing that does costs its runner;
            time in which the process itself stood still does not count.
        meter: counts.
        clock: monotonic seconds.
        alone: how a batch runs beside which no other does, on any engine, and none waits; None: as every other.
        running: the batches of all engines in this process.

    Attributes:
        answered: frames so far, golden ones among them; what the engine did not answer does not count.
    """

    def __init__(
        self,
        engine: Engine,
        probe: Callable[[], None],
        *,
        lines: int,
        runners: int,
        max_queue_size: int,
        run_times: RunTimes,
        stuck_after_s: float,
        meter: EngineMeter,
        clock: Callable[[], float],
        alone: LoneRun | None = None,
        running: Running | None = None,
    ) -> None:
        self._engine = engine
        self._alone = alone
        self._running = Running() if running is None else running
        self._probe = probe
        self._lines = lines
        self._runners = runners
        self._max_queue_size = max_queue_size
        self._most = run_times.max_batch_size
        self._queue: BatchQueue[_Entry] = BatchQueue(runners, run_times)
        self._stuck_after_s = stuck_after_s
        self._looks_every_s = stuck_after_s / _LOOKS_FOR_STUCK
        self._awake_since = -math.inf
        self._meter = meter
        self._clock = clock
        self._numbers = count()
        self._run_numbers = count()
        self._places: set[Place] = set()
        self._places_of: Counter[str] = Counter()
        self._unanswered: dict[int, _Entry] = {}
        self._next_step = _Alarm(self._step, clock)
        self._next_expiry = _Alarm(self._expire_due, clock)
        self._next_check = _Alarm(self._look_for_stuck, clock)
        self._fault: _Fault | None = None
        self._why_unhealthy: str | None = None
        self._is_lost = False
        self._is_draining = False
        self._given_up = 0
        self.answered = 0
        self._all_answered = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: SimpleQueue[Batch[_Entry] | None] = SimpleQueue()
        for _ in range(runners):
            self._start_runner()

    @property
    def is_healthy(self) -> bool:
        """Whether frames can still be answered here; once lost, for ever."""
        return self._fault is None

    @property
    def is_lost(self) -> bool:
        """Whether it is the engine's fault that no frame can be answered here, so that only a new process helps."""
        return self._is_lost

    @property
    def why_unhealthy(self) -> str | None:
        """Why frames can't be answered here any more, in a sentence."""
        return self._why_unhealthy

    @property
    def is_idle(self) -> bool:
        """Whether no frame has a place here and nothing runs."""
        return not self._places and self._queue.is_empty

    def has_idle_runner(self) -> bool:
        """Whether a frame would run at once; shadow traffic to another engine may ask."""
        return self._queue.has_idle_runner

    @property
    def has_spare_runner(self) -> bool:
        """Whether one more frame would run at once and leave nobody waiting."""
        return self.is_healthy and len(self._places) < self._runners

    def wait_for_gap(self, longest_s: float) -> bool:
        """Block until no frame of any engine has to wait for one that could as well run later; to be asked by a thread.

        Args:
            longest_s: to wait.

        Returns:
            False where there was no gap all the while.
        """
        return self._running.wait_for_gap(longest_s)

    def refuse_hopeless(
        self, deadline: float, *, line: str, weight: int = 1, priority: Priority = Priority.NORMAL
    ) -> None:
        """Refuse a frame that would get no place now, before more is done for it; arguments and faults of `place`."""
        self._admit(Place(deadline, line, weight, priority))

    def place(
        self,
        deadline: float,
        *,
        line: str,
        weight: int = 1,
        priority: Priority = Priority.NORMAL,
        is_hopeful: bool = False,
    ) -> "_Holding":
        """Take a place for one frame, to be held by a `with` block, and given back in every outcome.

        Args:
            deadline: when the answer is due, by the clock.
            line: whose frame it is.
            weight: network inputs that the frame will be; its tiles, where it is cut into some.
            priority: how much it matters beside others.
            is_hopeful: whether `refuse_hopeless` has let it pass just now, with no other frame since.

        Raises:
            LineNotReady: if the batcher is draining or unhealthy.
            Overloaded: if every place is taken, or the deadline can't be met behind those that are.
        """
        place = Place(deadline, line, weight, priority)
        if not is_hopeful:
            self._admit(place)
        return _Holding(place, self._take, self._give_back)

    async def submit(self, place: Place, frames: NDArray[np.uint8], line_index: int) -> RunResult:
        """Run one frame whose network inputs `(T, H, W, 3)` are there; else as `run`."""
        place.weight = len(frames)
        return await self.run(place, _Ready(frames), line_index)

    async def run(self, place: Place, work: Work[_Outcome_co], line_index: int) -> _Outcome_co:
        """Run one frame, with others or alone.

        Args:
            place: of this frame, still held.
            work: what is to be done before and after, by the runner.
            line_index: of its line within the bundle.

        Raises:
            DeadlinePassed: at the deadline, wherever the frame is by then.
            Overloaded: as soon as the deadline can't be met any more.
            EngineFailed: if the engine fails on this frame, or is lost.
            Exception: whatever the work raises.
            CancelledError: if it is given up; whoever cancels it with `REQUEST_FAILED` has it counted as that.
        """
        if self._fault is not None:
            raise self._fault()
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        now = self._clock()
        waiting = WaitingFrame(next(self._numbers), place.deadline, place.weight, place.priority, place.line)
        entry = _Entry(waiting, place, work, line_index, now, self._loop.create_future())
        self._unanswered[waiting.number] = entry
        self._next_expiry.ring_by(place.deadline)
        if self._queue.add(entry):
            self._step()
        else:  # nothing to decide but when to look again, which costs the same behind however many frames
            self._next_step.ring_by(place.deadline - self._queue.run_times.of(place.weight))
        try:
            outcome: _Outcome_co = await entry.answer
            return outcome
        finally:
            del self._unanswered[waiting.number]
            if self._queue.withdraw(entry):  # only who is given up gets here so early
                self._meter.discard(_why_left(entry.answer))
            elif not entry.answer.cancelled():
                entry.answer.exception()  # looked at, so that a caller leaving at this very moment leaves no warning

    def stop_admitting(self) -> None:
        """Refuse every new frame from now on."""
        self._is_draining = True

    async def drain(self) -> None:
        """Admit nothing more, and return when all that was admitted is answered."""
        self.stop_admitting()
        while self._places:
            self._all_answered.clear()
            await self._all_answered.wait()

    def close(self) -> None:
        """End the runners; whatever still waits is told that the service stops."""
        self._end(partial(LineNotReady, "The service stops; send the frame to another instance."))

    def distrust(self, why: str) -> None:
        """Answer nothing any more: the engine runs, and what it says is not what was validated."""
        self._why_unhealthy = why
        _log.error("a batcher is distrusted", extra={"why": why})
        self._end(partial(LineNotReady, f"{why} The part has no verdict, and the line waits for a restart."))

    def _take(self, place: Place) -> None:
        self._places.add(place)
        self._places_of[place.line] += 1
        self._meter.depth(len(self._places))

    def _give_back(self, place: Place) -> None:
        self._places.remove(place)
        self._places_of[place.line] -= 1
        self._meter.depth(len(self._places))
        if not self._places:
            self._all_answered.set()

    def _admit(self, new: Place) -> None:
        if self._fault is not None:
            raise LineNotReady("The line is unhealthy and waits for a restart; the part has no verdict.")
        if self._is_draining:
            raise LineNotReady("The service stops; send the frame to another instance.", retry_after_s=1)
        now = self._clock()
        if now < new.deadline and self.is_idle:  # nothing is ahead of it, and what follows would find the same
            return
        admission = self._queue.admit([place for place in self._places if place.is_ahead], new, now)
        if not has_room(
            self._max_queue_size,
            len(self._places),
            self._places_of[new.line],
            new.priority,
            is_shared=self._lines > 1,
        ):
            raise Overloaded("The queue is full; slow down or try again later.", retry_after_s=admission.wait_s)
        if not admission.is_possible:
            raise _too_late(admission.wait_s)

    def _step(self) -> None:
        self._guard(self._dispatch)

    def _guard(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:  # noqa: BLE001 - the edge: whatever goes wrong in here, those who wait must hear of it
            _log.exception("the batch loop failed")
            self._lose("The batch loop failed")

    def _dispatch(self) -> None:
        taken = self._queue.take(self._clock())
        for batch in taken.batches:
            self._inbox.put(batch)
        self._note(taken)

    def _note(self, taken: Taken[_Entry]) -> None:
        """Tell those whose frames will not run, and watch over what runs now."""
        for entry in taken.expired:
            self._expire(entry)
        for entry in taken.refused:
            _fail(entry, _too_late(self._queue.run_times.of(entry.place.weight)))
        if self._fault is not None:
            return
        for batch in taken.batches:
            self._next_check.ring_by(batch.started_at + self._looks_every_s)
            for size in self._run_sizes(batch.weight):
                self._meter.batch(size)
        if taken.look_again_at is not None:
            self._next_step.ring_by(taken.look_again_at)

    def _expire_due(self) -> None:
        now, left = self._clock(), [entry for entry in self._unanswered.values() if not entry.answer.done()]
        for entry in left:
            if entry.place.deadline <= now:
                self._expire(entry)
        later = [entry.place.deadline for entry in left if entry.place.deadline > now]
        if later:
            self._next_expiry.ring_by(min(later))

    def _look_for_stuck(self) -> None:
        """Lose the engine where a run has not ended for so long that this process was awake.

        A runner that has not come back from preparing one is replaced instead.
        """
        now = self._clock()
        if self._next_check.late_s > self._looks_every_s:  # it stood still, paused or starved, and its runners with it
            _log.warning("the process stood still", extra={"seconds": round(self._next_check.late_s, 3)})
            self._awake_since = now
        for batch in self._queue.under_way():
            if self._fault is not None:
                return
            is_stuck_at = max(batch.step_since, self._awake_since) + self._stuck_after_s
            if is_stuck_at > now:
                self._next_check.ring_by(min(is_stuck_at, now + self._looks_every_s))
                return
            if batch.ran_from is None and batch.thread_id:
                self._guard(partial(self._give_up, batch))
            else:
                self._lose("A run does not end")

    def _give_up(self, batch: Batch[_Entry]) -> None:
        """Replace a runner that does not come back from preparing a batch."""
        if not self._queue.give_up(batch):  # it has come back this very moment
            self._next_check.ring_by(self._clock() + self._looks_every_s)
            return
        _log.error(
            "a runner is replaced: decoding does not end", extra={"lines": [e.place.line for e in batch.entries]}
        )
        self._meter.decoder_replaced()
        for entry in batch.entries:
            _fail(entry, not_decoded(self._stuck_after_s) if entry.is_preparing else _beside_another())
        self._running.end()
        hold_back(batch.thread_id, BEHIND_FRAMES)
        self._given_up += 1
        if self._given_up >= MOST_GIVEN_UP:
            self._lose("Frames are decoded without end")
            return
        self._start_runner()
        self._step()

    def _take_back(self) -> None:
        self._given_up -= 1

    def _start_runner(self) -> None:
        # Daemons, because a run that never ends must not keep the process from ending.
        threading.Thread(target=self._serve, name="flawline-runner", daemon=True).start()

    def _finish(self, batch: Batch[_Entry], outcome: _Outcome, taken: Taken[_Entry]) -> None:
        """Answer a batch's frames, whose runner has gone on with what it took meanwhile."""
        if outcome.is_engine_lost:
            self._lose("The engine fails on frames whose answers are known")
        self._guard(partial(self._note, taken))
        for entry in batch.entries:
            answer = outcome.answers[entry.waiting.number] if self._fault is None else self._fault()
            if entry.answer.done():
                self._meter.discard(_why_left(entry.answer) if entry.answer.cancelled() else "late")
            elif isinstance(answer, Exception):
                entry.answer.set_exception(answer)
            else:
                self.answered += 1
                entry.answer.set_result(answer)

    def _expire(self, entry: _Entry) -> None:
        self._queue.withdraw(entry)
        _fail(entry, DeadlinePassed("The deadline passed before the answer was there; the part has no verdict."))

    def _lose(self, what_happened: str) -> None:
        _log.error("a batcher is lost", extra={"why": what_happened})
        self._why_unhealthy, self._is_lost = "The engine is lost; start the service again.", True
        self._end(partial(EngineFailed, f"{what_happened}; the part has no verdict, and the line waits for a restart."))

    def _end(self, fault: _Fault) -> None:
        if self._fault is not None:
            return
        self._fault = fault
        for alarm in (self._next_step, self._next_expiry, self._next_check):
            alarm.cancel()
        for entry in self._queue.close():
            _fail(entry, fault())
        for _ in range(self._runners):
            self._inbox.put(None)

    @property
    def _here(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("nothing runs before the first submit")
        return self._loop

    def _serve(self) -> None:
        """Run batches until told to end: the body of a runner's thread."""
        # Runners that keep every core busy would keep refusals and answers from the event loop.
        stand_back(BEHIND_THE_LOOP)
        try:
            while (batch := self._inbox.get()) is not None:
                self._running.begin()
                while batch is not None:
                    batch = self._run_batch(batch)
        except _GivenUp:
            self._post(self._take_back)
        except BaseException:  # noqa: BLE001 - a runner that ends takes its frames with it; they must hear of it
            _log.exception("a runner ended")
            self._post(self._lose, "A runner ended")

    def _run_batch(self, batch: Batch[_Entry]) -> Batch[_Entry] | None:
        """Run a batch, post what became of it, and return the one that this runner runs next."""
        batch.thread_id = threading.get_native_id()
        began_at, answers = self._clock(), dict[int, Any]()
        ready = [entry for entry in batch.entries if self._is_ready(entry, answers)]
        if not self._queue.begin_run(batch, self._clock()):
            raise _GivenUp
        outcome = self._run(ready, began_at)
        outcome = outcome._replace(answers=answers | outcome.answers)
        taken: Taken[_Entry] = Taken()
        try:
            if outcome.is_engine_lost:
                self._queue.end(batch)
            else:
                taken = self._queue.end_and_take(batch, outcome.run_s, self._clock())
        finally:
            # Not between batches that follow at once, so that what gives way finds no gap there; and before those who
            # wait hear of it, since they may send the next frame, which would not be alone.
            if not taken.batches:
                self._running.end()
            self._post(self._finish, batch, outcome, taken)
        return taken.batches[0] if taken.batches else None

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._here.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: this run took longer than the service lived
            _log.warning("a run ended after the service")

    def _run(self, ready: Sequence[_Entry], began_at: float) -> _Outcome:
        answers: dict[int, Any] = {}
        if not ready:
            return _Outcome(answers, None, is_engine_lost=False)
        started_at = self._clock()
        alone = self._alone if self._is_alone(ready) else None
        try:
            output = self._run_together(ready, self._engine.run) if alone is None else self._run_wide(ready, alone)
        except Exception as error:  # noqa: BLE001 - the edge: a runtime may raise anything
            _log.exception("a run failed", extra={"batch_size": len(ready)})
            return self._run_alone(ready) if len(ready) > 1 else self._blame(ready[0], error)
        ended_at, number = self._clock(), next(self._run_numbers)
        first_of = list(accumulate((entry.place.weight for entry in ready), initial=0))
        for entry, (first, end) in zip(ready, pairwise(first_of), strict=True):
            result = RunResult(
                scores=output.scores[first:end],
                anomaly_maps=output.anomaly_maps[first:end],
                batch_size=len(ready),
                batch_number=number,
                queue_s=began_at - entry.submitted_at,
                prepare_s=entry.prepare_s,
                infer_s=ended_at - started_at,
                ran_at=ended_at,
            )
            answers[entry.waiting.number] = _what_comes_of(partial(entry.work.finish, result))
        if alone is None:
            return _Outcome(answers, ended_at - began_at, is_engine_lost=False)
        # Admission asks how long frames take side by side. A lone one only tells how long they take at most.
        most_s = started_at - began_at + alone.speedup * (ended_at - started_at)
        weight = first_of[-1]
        return _Outcome(answers, most_s if most_s < self._queue.run_times.of(weight) else None, is_engine_lost=False)

    def _is_alone(self, entries: Sequence[_Entry]) -> bool:
        """Whether every core is there for the batch that asks, which it does once decoded: much may come till then.

        Of frames that matter less, as golden ones do, every other one goes the ordinary way, so that both are watched.
        """
        has_turn = any(entry.waiting.priority is Priority.NORMAL or entry.waiting.number % 2 for entry in entries)
        return has_turn and self._running.count == 1 and not self._queue.has_waiting

    def _is_ready(self, entry: _Entry, answers: dict[int, Any]) -> bool:
        """Prepare a frame that is not prepared yet; where that fails, the fault is its answer, and no neighbour's."""
        if entry.frames is not None:
            return True
        began_at, entry.is_preparing = self._clock(), True
        frames = _what_comes_of(entry.work.prepare)
        entry.is_preparing = False
        entry.prepare_s = self._clock() - began_at
        if isinstance(frames, Exception):
            answers[entry.waiting.number] = frames
            return False
        entry.frames = frames
        return True

    def _run_wide(self, entries: Sequence[_Entry], alone: LoneRun) -> EngineOutput:
        """Run on every core; a way that fails where the ordinary one does not is not taken again."""
        try:
            return self._run_together(entries, alone.run)
        except Exception:  # noqa: BLE001 - the edge: a runtime may raise anything
            output = self._run_together(entries, self._engine.run)
            _log.exception("lone frames run as others from now on")
            self._alone = None
            return output

    def _run_together(self, entries: Sequence[_Entry], run: RunBatch) -> EngineOutput:
        inputs = [entry.frames for entry in entries if entry.frames is not None]
        frames = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)  # a single frame is not copied
        line_index = np.repeat(
            np.array([entry.line_index for entry in entries], np.int64), [entry.place.weight for entry in entries]
        )
        # Only a single frame can weigh more than a batch may.
        runs, first = [], 0
        for size in self._run_sizes(len(frames)):
            runs.append(run(frames[first : first + size], line_index[first : first + size]))
            if not len(runs[-1].scores) == len(runs[-1].anomaly_maps) == size:
                raise EngineFailed("The engine answered with another number of frames than it was given.")
            first += size
        return runs[0] if len(runs) == 1 else EngineOutput(*map(np.concatenate, zip(*runs, strict=True)))

    def _run_sizes(self, weight: int) -> Iterator[int]:
        """Cut what weighs more than the largest batch into runs."""
        return (min(self._most, weight - first) for first in range(0, weight, self._most))

    def _run_alone(self, entries: Sequence[_Entry]) -> _Outcome:
        answers: dict[int, Any] = {}
        is_engine_lost = False
        for entry in entries:
            outcome = self._run([entry], self._clock())
            answers |= outcome.answers
            is_engine_lost |= outcome.is_engine_lost
        return _Outcome(answers, None, is_engine_lost)

    def _blame(self, entry: _Entry, error: Exception) -> _Outcome:
        sentence = "The engine failed on this frame; the part has no verdict."
        fault = error if isinstance(error, EngineFailed) else EngineFailed(sentence)
        answers: dict[int, Any] = {entry.waiting.number: fault}
        try:
            self._probe()
        except Exception:  # noqa: BLE001 - the edge: a runtime may raise anything
            _log.exception("the probe failed as well")
            return _Outcome(answers, None, is_engine_lost=True)
        return _Outcome(answers, None, is_engine_lost=False)


class _Alarm:
    """Rings at the earliest moment that was asked for; to ask for a later one costs a comparison and no timer.

    Args:
        ring: called then, on the event loop; it has to ask again for what is still to come.
        clock: monotonic seconds.

    Attributes:
        late_s: how long after its moment it rang last.
    """

    __slots__ = ("_at", "_clock", "_handle", "_ring", "late_s")

    def __init__(self, ring: Callable[[], None], clock: Callable[[], float]) -> None:
        self._ring = ring
        self._clock = clock
        self._at = math.inf
        self.late_s = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def ring_by(self, time: float) -> None:
        """Ring then, or before."""
        if time >= self._at:
            return
        self.cancel()
        self._at = time
        delay_s = max(0.0, time - self._clock()) + _TIMER_SLACK_S
        self._handle = asyncio.get_running_loop().call_later(delay_s, self._fire)

    def cancel(self) -> None:
        """Do not ring."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._at = math.inf

    def _fire(self) -> None:
        self.late_s = self._clock() - self._at
        self.cancel()
        self._ring()


class _Holding:
    """A place while it is held."""

    __slots__ = ("_give_back", "_place", "_take")

    def __init__(self, place: Place, take: Callable[[Place], None], give_back: Callable[[Place], None]) -> None:
        self._place = place
        self._take = take
        self._give_back = give_back

    def __enter__(self) -> Place:
        self._take(self._place)
        return self._place

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self._give_back(self._place)


def not_decoded(after_s: float) -> UnreadableFrame:
    """Return what is said of a frame whose decoding does not end."""
    return UnreadableFrame(f"The frame could not be decoded within {after_s:g} s; send it as the camera wrote it.")


def _beside_another() -> Overloaded:
    return Overloaded("A frame beside this one kept the decoder; send it again.")


def _what_comes_of(step: Callable[[], Any]) -> Any:
    """Return what a step gives, or the exception that it raises."""
    try:
        return step()
    except Exception as error:  # noqa: BLE001 - the edge: a codec may raise anything, and only this frame fails with it
        return error


def _fail(entry: _Entry, fault: FlawlineError) -> None:
    if not entry.answer.done():
        entry.answer.set_exception(fault)


def _why_left(answer: asyncio.Future[Any]) -> Discarded:
    """Return why an answer was given up: what it was cancelled with tells."""
    if answer.cancelled():
        try:
            answer.exception()
        except asyncio.CancelledError as given_up:
            if given_up.args == (REQUEST_FAILED,):
                return REQUEST_FAILED
    return CALLER_LEFT


def _too_late(wait_s: float) -> Overloaded:
    sentence = "The deadline can't be met now; slow down, try again later or allow more time."
    return Overloaded(sentence, retry_after_s=wait_s)
