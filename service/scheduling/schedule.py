"""Which frames run now, which are refused, and when to look again: decides without doing.

Nothing here knows asyncio, threads, a clock or the frames themselves. State goes in, a decision comes out, and time is
an argument: seconds of any monotonic clock.

Rules:

1.  Frames that matter more go first. Among those, frames of lines that had more than their share lately stand back
    behind those of all others. Then the earliest deadline goes first, then the first to arrive. So a line that sends
    too much gets what the others leave, and they do not wait behind it.
2.  No frame waits while a runner is idle: nothing is ever collected.
3.  Waiting frames are split evenly over the idle runners, rather than filling one batch. A batch never weighs more than
    `max_batch_size`, except that one frame that alone weighs more runs alone. No frame joins a batch that would then
    end after the deadline of one of its frames.
4.  A batch is never made larger than pays. On a CPU a batch of eight takes eight times as long as a frame, so frames
    run one by one; on a GPU it takes little longer, so they run together. The learned run times tell.
5.  A frame whose deadline has passed is expired and not run.
6.  A frame that could not meet its deadline even if it ran alone at once, by the learned run times, is refused at once.
7.  But where nothing runs and every waiting frame would be refused, the one with the most time left runs anyway: run
    times are only learned by running, and one wrong estimate must not refuse frames for ever.
8.  Each frame leaves exactly once: it runs, expires or is refused.

Rules 5 to 7 decide about frames that were accepted; `admit` asks the same question before a frame is accepted, with
what is ahead of it in mind, and `has_room` whether the queue has a place for it: no line takes more than twice as many
places as it leaves free, so that there is always one for a line that has none, and what matters less leaves room.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple, Protocol, Self

# Learned times follow a faster run quickly and a slower one slowly: a single stall must not refuse good frames.
_FASTER_SHARE = 0.5
_SLOWER_SHARE = 0.1
# A queue moves at the mean pace, of which one stall is but a part; more than so many times the mean is a stall.
_PACE_SHARE = 0.1
_LONGEST_STALL = 4
# A larger batch must save at least this share of the time a frame takes, or it is not worth the longer wait.
_WORTHWHILE_GAIN = 0.05
# What is ahead of a frame may take longer than learned, and decoding, judging and answering take their time as well; a
# frame that is accepted should be in time.
_WAIT_MARGIN = 1.25
# A line that had more than so many times an even share stands back; what ran longer ago than the window counts little.
_FAIR_SHARE = 1.25
_WINDOW_INPUTS = 200
_FORGOTTEN = 0.05
_LARGEST_UNIT = 1e3
# How many places a line may hold for each one that is free.
_PLACES_A_FREE_ONE = 2


class Priority(IntEnum):
    """How much a frame matters beside others: none runs while one that matters more waits.

    There is none above `NORMAL`: whoever may send could then push everybody else aside. `LOW` is for frames that no
    line waits for, such as those of an archive, and `SHADOW` for frames whose answer nobody gets.
    """

    NORMAL = 0
    LOW = 1
    SHADOW = 2


# The share of all places up to which frames of a priority may fill the queue.
_SHARE_OF_PLACES = {Priority.NORMAL: 1.0, Priority.LOW: 0.5, Priority.SHADOW: 0.25}


class WaitingFrame(NamedTuple):
    """A frame that is ready to run.

    Attributes:
        number: in order of arrival; unique.
        deadline: when its answer is due.
        weight: how many network inputs it is; a tiled frame counts as its tiles.
        priority: how much it matters beside others.
        line: whose frame it is.
    """

    number: int
    deadline: float
    weight: int = 1
    priority: Priority = Priority.NORMAL
    line: str = ""


class Promise(Protocol):
    """A frame that was accepted and does not run yet.

    Attributes:
        deadline: when its answer is due.
        weight: how many network inputs it is.
        priority: how much it matters beside others.
        line: whose frame it is.
    """

    deadline: float
    weight: int
    priority: Priority
    line: str


@dataclass(frozen=True)
class RunTimes:
    """What runs have taken so far; never changed, only replaced.

    Attributes:
        seconds: of a batch of weight i + 1, rather the quick ones; None where none of that weight has run.
        pace_s: mean seconds of late that a network input kept a runner, hand-overs included; 0 where nothing has run.
    """

    seconds: tuple[float | None, ...]
    pace_s: float = 0.0

    @classmethod
    def unknown(cls, max_batch_size: int) -> Self:
        """Return what is known before the first run."""
        return cls((None,) * max_batch_size)

    @property
    def max_batch_size(self) -> int:
        """The largest weight of a batch."""
        return len(self.seconds)

    def learn(self, weight: int, seconds: float, occupied_s: float | None = None) -> "RunTimes":
        """Return what is known after one more run.

        Args:
            weight: of the batch.
            seconds: that the run took.
            occupied_s: from the decision to run it until the runner could take the next batch. On a busy machine
                threads wait for each other on the way, and a queue moves no faster. None: as long as the run.
        """
        index = min(weight, self.max_batch_size) - 1
        input_s = seconds / weight
        kept_s = (seconds if occupied_s is None else max(seconds, occupied_s)) / weight
        pace_s = self.pace_s or kept_s
        pace_s += _PACE_SHARE * (min(kept_s, _LONGEST_STALL * pace_s) - pace_s)
        seconds = input_s * (index + 1)
        known = self.seconds[index]
        if known is not None:
            share = _FASTER_SHARE if seconds < known else _SLOWER_SHARE
            seconds = known + share * (seconds - known)
        return RunTimes((*self.seconds[:index], seconds, *self.seconds[index + 1 :]), pace_s)

    def of(self, weight: int) -> float:
        """Estimate the seconds of a batch, from the nearest known weights; 0 where nothing is known.

        A frame that is heavier than the largest batch takes several runs, all of them full but the last.
        """
        if weight <= len(self.seconds) and (known := self.seconds[weight - 1]) is not None:
            return known
        runs, rest = divmod(weight, self.max_batch_size)
        return runs * self._estimates[-1] + (self._estimates[rest - 1] if rest else 0.0)

    @property
    def best_weight(self) -> int:
        """The smallest weight that is about as fast, a frame, as the fastest one."""
        return 1 if len(self.seconds) == 1 else self._best_weight

    @cached_property
    def _best_weight(self) -> int:
        known = [(i + 1, s / (i + 1)) for i, s in enumerate(self.seconds) if s is not None]
        if not known:
            return self.max_batch_size
        fastest = min(each for _, each in known)
        return next(weight for weight, each in known if each * (1 - _WORTHWHILE_GAIN) <= fastest)

    @cached_property
    def _estimates(self) -> tuple[float, ...]:
        return tuple(self._estimate(i + 1) if s is None else s for i, s in enumerate(self.seconds))

    def _estimate(self, weight: int) -> float:
        known = [(abs(i + 1 - weight), i + 1, s) for i, s in enumerate(self.seconds) if s is not None]
        if not known:
            return 0.0
        _, nearest, seconds = min(known)
        return seconds * max(1.0, weight / nearest)


@dataclass(frozen=True, slots=True)
class Shares:
    """How much each line had of the engine lately; never changed, only replaced.

    Attributes:
        used: network inputs that ran, by line, in a unit that grows: what ran a window ago counts 1 / e.
        total: of all lines.
        unit: what one input counts now.
    """

    used: Mapping[str, float] = field(default_factory=dict)
    total: float = 0.0
    unit: float = 1.0

    def is_over(self, line: str) -> bool:
        """Whether a line had more than an even share allows."""
        return len(self.used) > 1 and self.used.get(line, 0.0) * len(self.used) > _FAIR_SHARE * self.total

    def over(self, lines: Iterable[str]) -> set[str]:
        """Return those of some lines that had more than an even share allows."""
        return {line for line in set(lines) if self.is_over(line)} if len(self.used) > 1 else set()

    def left_to_excess(self) -> float:
        """Return what part of the engine goes to lines that have more than their share, in (0, 1]."""
        if not self.total:
            return 1.0
        excess = sum(used for line, used in self.used.items() if self.is_over(line)) / self.total
        return max(excess, 1 / len(self.used))

    def among(self, lines: Collection[str]) -> "Shares":
        """Return what holds where these lines want something as well, though they may have had nothing yet."""
        if all(line in self.used for line in lines):
            return self
        return Shares(dict.fromkeys(lines, 0.0) | dict(self.used), self.total, self.unit)

    def after(self, started: Sequence[WaitingFrame]) -> "Shares":
        """Return what holds after frames started."""
        if not started:
            return self
        used, total, unit = dict(self.used), self.total, self.unit
        for frame in started:
            used[frame.line] = used.get(frame.line, 0.0) + unit * frame.weight
            total += unit * frame.weight
            unit *= 1 + frame.weight / _WINDOW_INPUTS
        if unit > _LARGEST_UNIT:  # small numbers again, and lines that have long been silent are forgotten
            used = {line: each / unit for line, each in used.items() if each > _FORGOTTEN * unit}
            total, unit = sum(used.values()), 1.0
        return Shares(used, min(total, unit * _WINDOW_INPUTS), unit)


class Decision(NamedTuple):
    """What happens to the waiting frames, by their numbers; those named nowhere go on waiting.

    Attributes:
        batches: one for a runner each, all to be run now.
        expired: whose deadline has passed.
        refused: that can't meet their deadline any more.
        look_again_at: when the next waiting frame would be refused; None where no frame goes on waiting.
        shares: of the lines from now on.
    """

    batches: tuple[tuple[int, ...], ...]
    expired: tuple[int, ...]
    refused: tuple[int, ...]
    look_again_at: float | None
    shares: Shares


class Admission(NamedTuple):
    """Whether one more frame can be answered in time.

    Attributes:
        is_possible: by the learned run times.
        wait_s: until what is ahead of it is done; what a refused caller should wait before it asks again.
    """

    is_possible: bool
    wait_s: float


def decide(
    waiting: Collection[WaitingFrame],
    idle_runners: int,
    busy_runners: int,
    now: float,
    run_times: RunTimes,
    shares: Shares,
) -> Decision:
    """Decide about every waiting frame.

    Args:
        waiting: in any order.
        idle_runners: that could start a batch each.
        busy_runners: that are running one.
        now: the time.
        run_times: learned so far.
        shares: of the lines so far.
    """
    if len(waiting) == 1 and idle_runners > 0:  # by far the most frequent case: what follows would find the same
        (frame,) = waiting
        if frame.deadline - run_times.of(frame.weight) > now:
            return Decision(((frame.number,),), (), (), None, shares.among((frame.line,)).after((frame,)))
    lines = {frame.line for frame in waiting}
    shares = shares.among(lines)
    over = shares.over(lines)
    in_order = sorted(waiting, key=lambda frame: (frame.priority, frame.line in over, frame.deadline, frame.number))
    alive = [frame for frame in in_order if frame.deadline > now]
    expired = _left_out(in_order, alive)
    run_s = {weight: run_times.of(weight) for weight in {frame.weight for frame in alive}}
    ready = [frame for frame in alive if frame.deadline - run_s[frame.weight] > now]
    if alive and not ready and idle_runners > 0 and busy_runners == 0:
        ready = [max(alive, key=lambda frame: (frame.deadline, frame.number))]
    refused = _left_out(alive, ready)
    batches = _split(ready, idle_runners, now, run_times)
    gone = sum(len(batch) for batch in batches)  # the first ones
    look_again_at = min((frame.deadline - run_s[frame.weight] for frame in ready[gone:]), default=None)
    return Decision(batches, expired, refused, look_again_at, shares.after(ready[:gone]))


def admit(
    ahead: Collection[Promise],
    new: Promise,
    runners_free_in_s: Sequence[float],
    now: float,
    run_times: RunTimes,
    shares: Shares,
) -> Admission:
    """Say whether one more frame could be answered in time.

    Args:
        ahead: the frames that were accepted and do not run yet.
        new: the one that asks.
        runners_free_in_s: for each runner, when it is expected to be idle; 0 where it is.
        now: the time.
        run_times: learned so far.
        shares: of the lines so far.
    """
    best = run_times.best_weight
    input_s = max(run_times.of(best) / best, run_times.pace_s) / len(runners_free_in_s)
    over = shares.over([new.line, *[other.line for other in ahead]])
    before = (new.priority, new.line in over, new.deadline)
    weight_before = sum(
        [other.weight for other in ahead if (other.priority, other.line in over, other.deadline) <= before]
    )
    if new.line in over:  # frames of others that are still to come will go before it as well
        input_s /= shares.left_to_excess()
    wait_s = min(runners_free_in_s) + weight_before * input_s
    nothing_runs = not any(runners_free_in_s) and weight_before == 0
    ends_at = now + wait_s * _WAIT_MARGIN + run_times.of(new.weight)
    return Admission(new.deadline > now and (nothing_runs or ends_at < new.deadline), wait_s)


def has_room(places: int, taken: int, taken_by_line: int, priority: Priority, *, is_shared: bool) -> bool:
    """Say whether the queue has a place for one more frame.

    Args:
        places: of the queue.
        taken: by frames that are not answered yet.
        taken_by_line: by those of the new frame's line.
        priority: of the new frame.
        is_shared: whether other lines use the queue as well; one that is alone may fill it.
    """
    if taken >= places * _SHARE_OF_PLACES[priority]:
        return False
    return not is_shared or taken_by_line < _PLACES_A_FREE_ONE * (places - taken)


def _left_out(frames: Sequence[WaitingFrame], kept: Sequence[WaitingFrame]) -> tuple[int, ...]:
    """Return the numbers of frames that were not kept, in order."""
    if len(kept) == len(frames):  # as nearly always
        return ()
    numbers = {frame.number for frame in kept}
    return tuple(frame.number for frame in frames if frame.number not in numbers)


def _split(
    ready: Sequence[WaitingFrame], idle_runners: int, now: float, run_times: RunTimes
) -> tuple[tuple[int, ...], ...]:
    """Fill one batch after the other, in order, each with an even share of what is left."""
    worthwhile = run_times.best_weight
    if worthwhile == 1:  # on a CPU, always: frames run one by one
        return tuple((frame.number,) for frame in ready[:idle_runners])
    batches: list[tuple[int, ...]] = []
    left = sum(frame.weight for frame in ready)
    at = 0
    for runners_left in range(min(idle_runners, len(ready)), 0, -1):
        if at == len(ready):
            break
        share = min(-(-left // runners_left), worthwhile)
        first, weight = at, ready[at].weight
        due = ready[first].deadline
        at += 1
        while at < len(ready):
            heavier = weight + ready[at].weight
            earliest = min(due, ready[at].deadline)
            if heavier > share or now + run_times.of(heavier) >= earliest:
                break
            weight, due, at = heavier, earliest, at + 1
        left -= weight
        batches.append(tuple(frame.number for frame in ready[first:at]))
    return tuple(batches)
