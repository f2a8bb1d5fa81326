"""One engine's queue: takes frames, asks the schedule, hands batches to the runners, and answers each frame once.

Before: the frame has its place. After: it is answered. What a frame needs before and after its run is done by the
runner, in the same thread, where whoever brings it wants that (`engine_runs.Work`).

The event loop owns all that is kept here. What it shares with the runners is in `batch_queue`: a runner that ends a
batch takes the next one there by itself, posts to the loop what became of the first and what was decided, and runs on.
Nothing polls: frames are taken when one arrives, a run ends, or a deadline comes. A frame's deadline fires by a timer
of its own, so it is on time even behind a run that never ends.

Where the engine is found lost (`engine_runs`), a run takes too long (`patience`) or something in here fails, the
batcher is unhealthy. It answers everything that waits with `EngineFailed` then, and never recovers; the process has to
be started again.

A frame that keeps its runner too long before its run, while it is decoded, says nothing about the engine. It is
refused, another runner takes that one's place, and the one that was given up ends when it comes back, in what time the
others leave. Only where many do not come back is the batcher lost: a new process alone gets back what they hold.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.engines.engine import Engine, LoneRun
from service.errors import DeadlinePassed, EngineFailed, FlawlineError, LineNotReady, Overloaded
from service.observability.telemetry import CALLER_LEFT, REQUEST_FAILED, Discarded, EngineMeter
from service.scheduling.alarm import Alarm
from service.scheduling.batch_queue import Batch, BatchQueue, Running, Taken
from service.scheduling.engine_runs import EngineRuns, Job, RunOutcome, RunResult, Work, run_sizes
from service.scheduling.patience import MOST_GIVEN_UP, Patience, not_decoded
from service.scheduling.places import Holding, Place, Places
from service.scheduling.schedule import Priority, RunTimes, WaitingFrame
from service.threads import BEHIND_FRAMES, BEHIND_THE_LOOP, hold_back, stand_back

# Each frame gets an instance of its own: one that is raised in several tasks would collect their tracebacks.
_Fault = Callable[[], FlawlineError]

_Outcome = TypeVar("_Outcome")

_log = logging.getLogger("flawline")


class _Ready:
    """Work of which nothing is left but to run."""

    def __init__(self, frames: NDArray[np.uint8]) -> None:
        self._frames = frames

    def prepare(self) -> NDArray[np.uint8]:
        return self._frames

    def finish(self, result: RunResult) -> RunResult:
        return result


@dataclass(eq=False, slots=True)
class _Entry(Job):
    """A frame that waits or runs, and whoever waits for it."""

    answer: asyncio.Future[Any] = field(kw_only=True)

    @property
    def is_left(self) -> bool:
        """Whether nobody waits for it any more; a runner may ask."""
        return self.answer.done()


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
            see `patience` for what of its time counts.
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
        self._running = Running() if running is None else running
        self._runners = runners
        self._max_batch_size = run_times.max_batch_size
        self._queue: BatchQueue[_Entry] = BatchQueue(runners, run_times)
        self._places = Places(max_queue_size, is_shared=lines > 1, tell=self._count_places)
        self._runs = EngineRuns(
            engine,
            probe,
            max_batch_size=run_times.max_batch_size,
            clock=clock,
            alone=alone,
            is_alone=self._is_alone,
            expected_s=self._expected_s,
        )
        self._patience = Patience(stuck_after_s)
        self._meter = meter
        self._clock = clock
        self._numbers = count()
        self._unanswered: dict[int, _Entry] = {}
        self._next_step = Alarm(self._step, clock)
        self._next_expiry = Alarm(self._expire_due, clock)
        self._next_check = Alarm(self._look_for_stuck, clock)
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
    ) -> Holding:
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
        return self._places.hold(place)

    async def submit(self, place: Place, frames: NDArray[np.uint8], line_index: int) -> RunResult:
        """Run one frame whose network inputs `(T, H, W, 3)` are there; else as `run`."""
        place.weight = len(frames)
        return await self.run(place, _Ready(frames), line_index)

    async def run(self, place: Place, work: Work[_Outcome], line_index: int) -> _Outcome:
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
        entry = _Entry(waiting, place, work, line_index, now, answer=self._loop.create_future())
        self._unanswered[waiting.number] = entry
        self._next_expiry.ring_by(place.deadline)
        if self._queue.add(entry):
            self._step()
        else:  # nothing to decide but when to look again, which costs the same behind however many frames
            self._next_step.ring_by(place.deadline - self._queue.run_times.of(place.weight))
        try:
            outcome: _Outcome = await entry.answer
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

    def _count_places(self, held: int) -> None:
        self._meter.depth(held)
        if not held:
            self._all_answered.set()

    def _admit(self, new: Place) -> None:
        if self._fault is not None:
            raise LineNotReady("The line is unhealthy and waits for a restart; the part has no verdict.")
        if self._is_draining:
            raise LineNotReady("The service stops; send the frame to another instance.", retry_after_s=1)
        now = self._clock()
        if now < new.deadline and self.is_idle:  # nothing is ahead of it, and what follows would find the same
            return
        admission = self._queue.admit(self._places.ahead(), new, now)
        if not self._places.has_room(new):
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
            _fail(entry, _too_late(self._expected_s(entry.place.weight)))
        if self._fault is not None:
            return
        for batch in taken.batches:
            self._next_check.ring_by(batch.started_at + self._patience.looks_every_s)
            for size in run_sizes(batch.weight, self._max_batch_size):
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
        """Lose the engine where a run has not ended for so long, and replace a runner that prepares one for so long."""
        now = self._clock()
        if self._patience.look(now, self._next_check.late_s):
            _log.warning("the process stood still", extra={"seconds": round(self._next_check.late_s, 3)})
        for batch in self._queue.under_way():
            if self._fault is not None:
                return
            left_s = self._patience.left_s(batch.step_since, now)
            if left_s > 0:
                self._next_check.ring_by(now + min(left_s, self._patience.looks_every_s))
                return
            if batch.ran_from is None and batch.thread_id:
                self._guard(partial(self._give_up, batch))
            else:
                self._lose("A run does not end")

    def _give_up(self, batch: Batch[_Entry]) -> None:
        """Replace a runner that does not come back from preparing a batch."""
        if not self._queue.give_up(batch):  # it has come back this very moment
            self._next_check.ring_by(self._clock() + self._patience.looks_every_s)
            return
        _log.error(
            "a runner is replaced: decoding does not end", extra={"lines": [e.place.line for e in batch.entries]}
        )
        self._meter.decoder_replaced()
        for entry in batch.entries:
            _fail(entry, not_decoded(self._patience.stuck_after_s) if entry.is_preparing else _beside_another())
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

    def _finish(self, batch: Batch[_Entry], outcome: RunOutcome, taken: Taken[_Entry]) -> None:
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
        began_at = self._clock()
        ready, faults = self._runs.prepare(batch.entries)
        if not self._queue.begin_run(batch, self._clock()):
            raise _GivenUp
        outcome = self._runs.run(ready, began_at)
        outcome.answers.update(faults)
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

    def _is_alone(self) -> bool:
        return self._running.count == 1 and not self._queue.has_waiting

    def _expected_s(self, weight: int) -> float:
        return self._queue.run_times.of(weight)


def _beside_another() -> Overloaded:
    return Overloaded("A frame beside this one kept the decoder; send it again.")


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
