"""One engine's queue: takes frames, asks the schedule, hands batches to the runners, and answers each frame once.

Before: the frame has its place. After: it is answered. What a frame needs before and after its run is done by the
runner, in the same thread, where whoever brings it wants that (`Work`).

The event loop owns all state, so there are no locks. Runners are threads that only run batches and post the outcome
back. Nothing polls: a step is taken when a frame arrives, a run ends, or a deadline comes. A frame's deadline fires by
a timer of its own, so it is on time even behind a run that never ends.

A batch that fails is run again frame by frame, so that one frame can't fail its neighbours. When a frame fails alone,
the probe (golden frames) tells whose fault it is: where it fails too, the engine is lost and the batcher is unhealthy,
as it is after a run that takes too long or a fault of its own. An unhealthy batcher answers everything that waits with
`EngineFailed` and never recovers; the process has to be started again.
"""

import asyncio
import logging
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

from service.engines.engine import Engine, EngineOutput
from service.errors import DeadlinePassed, EngineFailed, FlawlineError, LineNotReady, Overloaded
from service.schedule import Priority, RunTimes, Shares, WaitingFrame, admit, decide, has_room
from service.telemetry import EngineMeter

# The loop's timers may fire a little early; looking again just after the moment saves a second look.
_TIMER_SLACK_S = 0.001

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
class Place:
    """A frame's right to be answered, taken before it is decoded.

    Attributes:
        deadline: when the answer is due.
        line: whose frame it is.
        weight: network inputs of the frame.
        priority: how much it matters beside others.
        is_ahead: whether it still has its run before it.
    """

    deadline: float
    line: str
    weight: int
    priority: Priority
    is_ahead: bool = True


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


@dataclass(eq=False, slots=True)
class _Batch:
    """Frames that run together; `alarm` sounds where they run too long."""

    entries: list[_Entry]
    weight: int
    started_at: float
    expected_end: float
    alarm: asyncio.TimerHandle


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


class Batcher:
    """The queue and the runners of one engine.

    Args:
        engine: runs batches, several at once.
        probe: runs frames whose answers are known, and raises where they come out differently.
        lines: that the engine serves.
        runners: batches that run side by side.
        max_queue_size: frames that have a place at a time.
        run_times: learned from warming up; its length is the largest batch.
        stuck_after_s: a run that takes longer makes the batcher unhealthy.
        meter: counts.
        clock: monotonic seconds.
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
    ) -> None:
        self._engine = engine
        self._probe = probe
        self._lines = lines
        self._runners = runners
        self._max_queue_size = max_queue_size
        self._run_times = run_times
        self._shares = Shares()
        self._stuck_after_s = stuck_after_s
        self._meter = meter
        self._clock = clock
        self._numbers = count()
        self._run_numbers = count()
        self._places: set[Place] = set()
        self._places_of: Counter[str] = Counter()
        self._waiting: dict[int, _Entry] = {}
        self._running: set[_Batch] = set()
        self._next_look: asyncio.TimerHandle | None = None
        self._fault: _Fault | None = None
        self._why_unhealthy: str | None = None
        self._is_lost = False
        self._is_draining = False
        self._all_answered = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: SimpleQueue[_Batch | None] = SimpleQueue()
        for _ in range(runners):
            # Daemons, because a run that never ends must not keep the process from ending.
            threading.Thread(target=self._serve, name="flawline-runner", daemon=True).start()

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
    def is_draining(self) -> bool:
        """Whether no frame is admitted any more."""
        return self._is_draining

    @property
    def is_idle(self) -> bool:
        """Whether no frame has a place here and nothing runs."""
        return not self._places and not self._running

    def has_idle_runner(self) -> bool:
        """Whether a frame would run at once; shadow traffic to another engine may ask."""
        return len(self._running) < self._runners and not self._waiting

    @property
    def has_spare_runner(self) -> bool:
        """Whether one more frame would run at once and leave nobody waiting."""
        return self.is_healthy and len(self._places) < self._runners

    def refuse_hopeless(
        self, deadline: float, *, line: str, weight: int = 1, priority: Priority = Priority.NORMAL
    ) -> None:
        """Refuse a frame that would get no place now, before more is done for it; arguments and faults of `place`."""
        self._admit(Place(deadline, line, weight, priority))

    def place(self, deadline: float, *, line: str, weight: int = 1, priority: Priority = Priority.NORMAL) -> "_Holding":
        """Take a place for one frame, to be held by a `with` block, and given back in every outcome.

        Args:
            deadline: when the answer is due, by the clock.
            line: whose frame it is.
            weight: network inputs that the frame will be; its tiles, where it is cut into some.
            priority: how much it matters beside others.

        Raises:
            LineNotReady: if the batcher is draining or unhealthy.
            Overloaded: if every place is taken, or the deadline can't be met behind those that are.
        """
        place = Place(deadline, line, weight, priority)
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
        """
        if self._fault is not None:
            raise self._fault()
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        now = self._clock()
        waiting = WaitingFrame(next(self._numbers), place.deadline, place.weight, place.priority, place.line)
        entry = _Entry(waiting, place, work, line_index, now, self._loop.create_future())
        self._waiting[waiting.number] = entry
        timer = self._loop.call_later(max(0.0, place.deadline - now), self._expire, entry)
        if len(self._running) < self._runners:
            self._step()
        else:  # nothing to decide but when to look again, which costs the same behind however many frames
            self._look_at(place.deadline - self._run_times.of(place.weight))
        try:
            outcome: _Outcome_co = await entry.answer
            return outcome
        finally:
            timer.cancel()
            if self._waiting.pop(waiting.number, None) is not None:  # only a caller that leaves gets here so early
                self._meter.discard("caller_left")
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
        free_in_s = [max(0.0, batch.expected_end - now) for batch in self._running]
        free_in_s += [0.0] * (self._runners - len(free_in_s))
        ahead = [place for place in self._places if place.is_ahead]
        admission = admit(ahead, new, free_in_s, now, self._run_times, self._shares)
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
        try:
            self._dispatch()
        except Exception:  # noqa: BLE001 - the edge: whatever goes wrong in here, those who wait must hear of it
            _log.exception("the batch loop failed")
            self._lose("The batch loop failed")

    def _dispatch(self) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        if not self._waiting:
            return
        now = self._clock()
        frames = [entry.waiting for entry in self._waiting.values()]
        busy = len(self._running)
        decision = decide(frames, self._runners - busy, busy, now, self._run_times, self._shares)
        self._shares = decision.shares
        for numbers in decision.batches:
            self._start([self._waiting.pop(number) for number in numbers], now)
        for number in decision.expired:
            self._expire(self._waiting[number])
        for number in decision.refused:
            entry = self._waiting.pop(number)
            _fail(entry, _too_late(self._run_times.of(entry.place.weight)))
        if decision.look_again_at is not None:
            self._look_at(decision.look_again_at)

    def _look_at(self, time: float) -> None:
        """Take a step then at the latest."""
        delay_s = max(0.0, time - self._clock()) + _TIMER_SLACK_S
        if self._next_look is not None:
            if self._next_look.when() <= self._here.time() + delay_s:
                return
            self._next_look.cancel()
        self._next_look = self._here.call_later(delay_s, self._step)

    def _start(self, entries: list[_Entry], now: float) -> None:
        for entry in entries:
            entry.place.is_ahead = False
        alarm = self._here.call_later(self._stuck_after_s, self._lose, "A run does not end")
        weight = sum(entry.place.weight for entry in entries)
        batch = _Batch(entries, weight, now, now + self._run_times.of(weight), alarm)
        self._running.add(batch)
        for size in self._run_sizes(weight):
            self._meter.batch(size)
        self._inbox.put(batch)

    def _finish(self, batch: _Batch, outcome: _Outcome) -> None:
        batch.alarm.cancel()
        self._running.discard(batch)
        if outcome.run_s is not None:
            occupied_s = self._clock() - batch.started_at
            self._run_times = self._run_times.learn(batch.weight, outcome.run_s, occupied_s)
        if outcome.is_engine_lost:
            self._lose("The engine fails on frames whose answers are known")
        elif self._fault is None:
            self._step()  # before the answers, so that the runner is busy again while they are written
        for entry in batch.entries:
            answer = outcome.answers[entry.waiting.number]
            if entry.answer.done():
                self._meter.discard("caller_left" if entry.answer.cancelled() else "late")
            elif isinstance(answer, Exception):
                entry.answer.set_exception(answer)
            else:
                entry.answer.set_result(answer)

    def _expire(self, entry: _Entry) -> None:
        self._waiting.pop(entry.waiting.number, None)
        _fail(entry, DeadlinePassed("The deadline passed before the answer was there; the part has no verdict."))

    def _lose(self, what_happened: str) -> None:
        _log.error("a batcher is lost", extra={"why": what_happened})
        self._why_unhealthy, self._is_lost = "The engine is lost; start the service again.", True
        self._end(partial(EngineFailed, f"{what_happened}; the part has no verdict, and the line waits for a restart."))

    def _end(self, fault: _Fault) -> None:
        if self._fault is not None:
            return
        self._fault = fault
        if self._next_look is not None:
            self._next_look.cancel()
        for batch in self._running:
            batch.alarm.cancel()
        left = [*self._waiting.values(), *(entry for batch in self._running for entry in batch.entries)]
        self._waiting.clear()
        for entry in left:
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
        try:
            while (batch := self._inbox.get()) is not None:
                self._post(self._finish, batch, self._run(batch.entries))
        except BaseException:  # noqa: BLE001 - a runner that ends takes its frames with it; they must hear of it
            _log.exception("a runner ended")
            self._post(self._lose, "A runner ended")

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._here.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: this run took longer than the service lived
            _log.warning("a run ended after the service")

    def _run(self, entries: Sequence[_Entry]) -> _Outcome:
        began_at = self._clock()
        answers: dict[int, Any] = {}
        ready = [entry for entry in entries if self._is_ready(entry, answers)]
        if not ready:
            return _Outcome(answers, None, is_engine_lost=False)
        started_at = self._clock()
        try:
            output = self._run_together(ready)
        except Exception as error:  # noqa: BLE001 - the edge: a runtime may raise anything
            _log.exception("a run failed", extra={"batch_size": len(ready)})
            failed = self._run_alone(ready) if len(ready) > 1 else self._give_up(ready[0], error)
            return failed._replace(answers=answers | failed.answers)
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
        return _Outcome(answers, ended_at - began_at, is_engine_lost=False)

    def _is_ready(self, entry: _Entry, answers: dict[int, Any]) -> bool:
        """Prepare a frame that is not prepared yet; where that fails, the fault is its answer, and no neighbour's."""
        if entry.frames is not None:
            return True
        began_at = self._clock()
        frames = _what_comes_of(entry.work.prepare)
        entry.prepare_s = self._clock() - began_at
        if isinstance(frames, Exception):
            answers[entry.waiting.number] = frames
            return False
        entry.frames = frames
        return True

    def _run_together(self, entries: Sequence[_Entry]) -> EngineOutput:
        inputs = [entry.frames for entry in entries if entry.frames is not None]
        frames = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)  # a single frame is not copied
        line_index = np.repeat(
            np.array([entry.line_index for entry in entries], np.int64), [entry.place.weight for entry in entries]
        )
        # Only a single frame can weigh more than a batch may.
        runs, first = [], 0
        for size in self._run_sizes(len(frames)):
            runs.append(self._engine.run(frames[first : first + size], line_index[first : first + size]))
            if not len(runs[-1].scores) == len(runs[-1].anomaly_maps) == size:
                raise EngineFailed("The engine answered with another number of frames than it was given.")
            first += size
        return runs[0] if len(runs) == 1 else EngineOutput(*map(np.concatenate, zip(*runs, strict=True)))

    def _run_sizes(self, weight: int) -> Iterator[int]:
        """Cut what weighs more than the largest batch into runs."""
        most = self._run_times.max_batch_size
        return (min(most, weight - first) for first in range(0, weight, most))

    def _run_alone(self, entries: Sequence[_Entry]) -> _Outcome:
        answers: dict[int, Any] = {}
        is_engine_lost = False
        for entry in entries:
            outcome = self._run([entry])
            answers |= outcome.answers
            is_engine_lost |= outcome.is_engine_lost
        return _Outcome(answers, None, is_engine_lost)

    def _give_up(self, entry: _Entry, error: Exception) -> _Outcome:
        sentence = "The engine failed on this frame; the part has no verdict."
        fault = error if isinstance(error, EngineFailed) else EngineFailed(sentence)
        answers: dict[int, Any] = {entry.waiting.number: fault}
        try:
            self._probe()
        except Exception:  # noqa: BLE001 - the edge: a runtime may raise anything
            _log.exception("the probe failed as well")
            return _Outcome(answers, None, is_engine_lost=True)
        return _Outcome(answers, None, is_engine_lost=False)


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


def _what_comes_of(step: Callable[[], Any]) -> Any:
    """Return what a step gives, or the exception that it raises."""
    try:
        return step()
    except Exception as error:  # noqa: BLE001 - the edge: a codec may raise anything, and only this frame fails with it
        return error


def _fail(entry: _Entry, fault: FlawlineError) -> None:
    if not entry.answer.done():
        entry.answer.set_exception(fault)


def _too_late(wait_s: float) -> Overloaded:
    sentence = "The deadline can't be met now; slow down, try again later or allow more time."
    return Overloaded(sentence, retry_after_s=wait_s)
