"""What waits for one engine and what runs on it: all that the event loop and the runners share.

A runner that ends a batch takes the next one itself. Handed over through the event loop, each batch would leave a core
idle until the loop came round to it. So both come here, and a lock keeps them apart for as long as a decision takes.
Whoever takes frames is told all that was decided, and tells those whose frames will not run.
"""

import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from service.scheduling.places import Place
from service.scheduling.schedule import Admission, RunTimes, Shares, WaitingFrame, admit, decide


class Entry(Protocol):
    """A frame that waits or runs."""

    @property
    def waiting(self) -> WaitingFrame:
        """What the schedule is told of it."""
        ...

    @property
    def place(self) -> Place:
        """Which it holds."""
        ...

    @property
    def is_left(self) -> bool:
        """Whether nobody waits for it any more, so that it need not run."""
        ...


_Entry = TypeVar("_Entry", bound=Entry)


@dataclass(eq=False, slots=True)
class Batch(Generic[_Entry]):
    """Frames that run together.

    Attributes:
        entries: in the order of their urgency.
        weight: network inputs of all.
        started_at: when it was decided that they run.
        expected_end: by the learned run times.
        thread_id: of its runner, by the system's count; 0 before one has it.
        ran_from: when all that can be run of it was prepared; None before.
    """

    entries: list[_Entry]
    weight: int
    started_at: float
    expected_end: float
    thread_id: int = 0
    ran_from: float | None = None

    @property
    def step_since(self) -> float:
        """Since when it is prepared, or then since when it runs."""
        return self.started_at if self.ran_from is None else self.ran_from


class Taken(NamedTuple, Generic[_Entry]):
    """What was decided about the frames that waited.

    Attributes:
        batches: that run from now on.
        expired: whose deadline has passed.
        refused: that can't meet their deadline any more.
        look_again_at: when the next one that still waits would be refused; None where none waits.
    """

    batches: Sequence[Batch[_Entry]] = ()
    expired: Sequence[_Entry] = ()
    refused: Sequence[_Entry] = ()
    look_again_at: float | None = None


class Running:
    """What runs in this process, whichever engines it runs on; each runner counts for as long as it has frames.

    What can as well run later waits for a gap: that so little runs that one run more leaves a core for the next frame.

    Args:
        side_by_side: runs that the machine has cores for.

    Attributes:
        count: of those that run now.
    """

    def __init__(self, side_by_side: int = 1) -> None:
        self.count = 0
        self._few = max(1, side_by_side - 1)
        self._fewer = threading.Condition(threading.Lock())

    def begin(self) -> None:
        """Count one more, until `end`."""
        with self._fewer:
            self.count += 1

    def end(self) -> None:
        """Count one less, and let those know that wait for a gap."""
        with self._fewer:
            self.count -= 1
            self._fewer.notify_all()

    def wait_for_gap(self, longest_s: float) -> bool:
        """Block until there is a gap, and return whether there was one in so many seconds."""
        with self._fewer:
            return self._fewer.wait_for(self._is_gap, longest_s)

    @contextmanager
    def in_gap(self, longest_s: float) -> Iterator[None]:
        """Count one more from the next gap on, or after so many seconds without one."""
        with self._fewer:
            self._fewer.wait_for(self._is_gap, longest_s)
            self.count += 1
        try:
            yield
        finally:
            self.end()

    def _is_gap(self) -> bool:
        return self.count < self._few


class BatchQueue(Generic[_Entry]):
    """The frames of one engine.

    Args:
        runners: batches that run side by side.
        run_times: learned from warming up.
    """

    def __init__(self, runners: int, run_times: RunTimes) -> None:
        self.run_times = run_times
        self._runners = runners
        self._shares = Shares()
        self._waiting: dict[int, _Entry] = {}
        self._running: set[Batch[_Entry]] = set()
        self._is_closed = False
        # May be taken once more by whoever holds it: collecting garbage can end a caller's coroutine at any moment.
        self._lock = threading.RLock()

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._waiting and not self._running

    @property
    def has_waiting(self) -> bool:
        """Whether any frame waits."""
        return bool(self._waiting)

    def under_way(self) -> list[Batch[_Entry]]:
        """Return the batches that are prepared or run, the one whose step has taken longest first."""
        with self._lock:
            return sorted(self._running, key=lambda batch: batch.step_since)

    def begin_run(self, batch: Batch[_Entry], now: float) -> bool:
        """Note that a batch is prepared, and return whether it may run; it may not once it was given up."""
        with self._lock:
            if batch not in self._running:
                return False
            batch.ran_from = now
            return True

    def give_up(self, batch: Batch[_Entry]) -> bool:
        """End a batch whose runner still prepares it, and return whether it did; from then on it never runs."""
        with self._lock:
            if batch not in self._running or batch.ran_from is not None:
                return False
            self._running.discard(batch)
            return True

    def add(self, entry: _Entry) -> bool:
        """Have a frame wait, and return whether a runner is idle that should take it."""
        with self._lock:
            self._waiting[entry.waiting.number] = entry
            return len(self._running) < self._runners

    def withdraw(self, entry: _Entry) -> bool:
        """Have a frame wait no longer, and return whether it still did."""
        with self._lock:
            return self._waiting.pop(entry.waiting.number, None) is not None

    def admit(self, ahead: Collection[Place], new: Place, now: float) -> Admission:
        """Say whether one more frame could be answered in time behind those that have a place."""
        with self._lock:
            free_in_s = [max(0.0, batch.expected_end - now) for batch in self._running]
            run_times, shares = self.run_times, self._shares
        free_in_s += [0.0] * (self._runners - len(free_in_s))
        return admit(ahead, new, free_in_s, now, run_times, shares)

    def take(self, now: float) -> Taken[_Entry]:
        """Take a batch for each idle runner."""
        with self._lock:
            return self._take(self._runners - len(self._running), now)

    def end(self, batch: Batch[_Entry]) -> None:
        """End a batch from which there is nothing to learn."""
        with self._lock:
            self._running.discard(batch)

    def end_and_take(self, batch: Batch[_Entry], run_s: float | None, now: float) -> Taken[_Entry]:
        """End a batch, and take the next one for the runner that becomes idle by it.

        Args:
            batch: that ended.
            run_s: seconds that it took to run; None where there is nothing to learn from it.
            now: the time.
        """
        with self._lock:
            self._running.discard(batch)
            if run_s is not None:
                self.run_times = self.run_times.learn(batch.weight, run_s, now - batch.started_at)
            return self._take(1, now)

    def close(self) -> list[_Entry]:
        """Give nothing to anybody any more, and return all that waits or runs."""
        with self._lock:
            self._is_closed = True
            left = [*self._waiting.values(), *(entry for batch in self._running for entry in batch.entries)]
            self._waiting.clear()
            return left

    def _take(self, idle_runners: int, now: float) -> Taken[_Entry]:
        if self._is_closed or not self._waiting:
            return Taken()
        frames = [entry.waiting for entry in list(self._waiting.values()) if not entry.is_left]
        decision = decide(frames, idle_runners, len(self._running), now, self.run_times, self._shares)
        self._shares = decision.shares
        return Taken(
            [self._start(numbers, now) for numbers in decision.batches],
            [self._waiting.pop(number) for number in decision.expired],
            [self._waiting.pop(number) for number in decision.refused],
            decision.look_again_at,
        )

    def _start(self, numbers: Iterable[int], now: float) -> Batch[_Entry]:
        entries = [self._waiting.pop(number) for number in numbers]
        for entry in entries:
            entry.place.is_ahead = False
        weight = sum(entry.place.weight for entry in entries)
        batch = Batch(entries, weight, now, now + self.run_times.of(weight))
        self._running.add(batch)
        return batch
