"""Simulated cameras: triggers at a rate, frames over HTTP, and a tally of what came back.

A camera does not wait for its answer: parts arrive whether the last one is judged or not. Where more frames are under
way than a camera's buffer holds, the next one is dropped and counted, as a real one would.
"""

import asyncio
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from service.client import Frame, Outcome
from service.contract.policy import Verdict

Arrivals = Literal["regular", "poisson"]
Inspect = Callable[[str, Frame, int], Awaitable[Outcome]]
Sleep = Callable[[float], Awaitable[None]]

# Latencies kept for percentiles; older ones make room.
_KEPT_LATENCIES = 5000
_INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class CameraPlan:
    """How one camera triggers.

    Attributes:
        line: that it looks at.
        rate_hz: parts a second, on average.
        arrivals: `regular`, moved by `jitter`, or `poisson`.
        jitter: of regular triggers, as a fraction of the time between two: 0 is a clock, 1 anywhere in its slot.
        burst: frames at each trigger, as of a part that is seen from several sides.
        buffer: frames under way at most.
        seed: of jitter and arrivals.
    """

    line: str
    rate_hz: float
    arrivals: Arrivals = "regular"
    jitter: float = 0.1
    burst: int = 1
    buffer: int = 64
    seed: int = 1


@dataclass
class Tally:
    """What one camera saw so far.

    Attributes:
        sent: frames.
        dropped: frames that found the buffer full.
        verdicts: by verdict.
        problems: by code, of frames without a verdict; `interrupted` are those that were under way at the end of a run
            that was stopped.
        latencies_ms: of the last frames, from trigger to verdict.
    """

    sent: int = 0
    dropped: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_LATENCIES))

    def note(self, outcome: Outcome) -> None:
        """Count one frame's end."""
        self.verdicts[outcome.verdict.value] += 1
        if outcome.problem is not None:
            self.problems[outcome.problem.code] += 1
        self.latencies_ms.append(outcome.elapsed_ms)

    def note_interrupted(self) -> None:
        """Count a frame whose answer nobody waits for any more."""
        self.verdicts[Verdict.NO_VERDICT.value] += 1
        self.problems[_INTERRUPTED] += 1

    @property
    def saw_all(self) -> bool:
        """Whether every frame had a verdict, but for those whose wait the end of the run cut short; one at least."""
        without = self.verdicts[Verdict.NO_VERDICT.value] - self.problems[_INTERRUPTED]
        return without == 0 and self.dropped == 0 and self.verdicts.total() > self.problems[_INTERRUPTED]

    def percentile_ms(self, fraction: float) -> float | None:
        """Return the latency that this fraction of the last frames did not exceed; None before the first."""
        ordered = sorted(self.latencies_ms)
        return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else None


def trigger_times(plan: CameraPlan) -> Iterator[float]:
    """Yield the seconds at which a camera triggers, ascending and without end; equal plans give equal times."""
    draw = random.Random(plan.seed)  # noqa: S311 - arrivals, not secrets
    if plan.arrivals == "poisson":
        yield from itertools.accumulate(draw.expovariate(plan.rate_hz) for _ in itertools.count())
    for number in itertools.count():
        yield (number + plan.jitter * draw.random()) / plan.rate_hz


async def run_camera(
    plan: CameraPlan,
    frames: Sequence[Frame],
    tally: Tally,
    inspect: Inspect,
    *,
    duration_s: float,
    clock: Callable[[], float],
    sleep: Sleep = asyncio.sleep,
) -> None:
    """Trigger until the time is over, then wait for what is under way.

    Args:
        plan: of the camera.
        frames: sent in turn, again from the first after the last.
        tally: filled while the camera runs.
        inspect: sends a frame of a line with its running number.
        duration_s: of triggering; infinite runs until the task is cancelled.
        clock: monotonic seconds.
        sleep: waits so many seconds.
    """
    begun_at = clock()
    supply = itertools.cycle(frames)
    under_way: set[asyncio.Task[None]] = set()

    async def shoot(frame: Frame, number: int) -> None:
        tally.note(await inspect(plan.line, frame, number))

    def end(task: asyncio.Task[None]) -> None:
        under_way.discard(task)
        if task.cancelled():
            tally.note_interrupted()

    async with asyncio.TaskGroup() as group:
        for at_s in trigger_times(plan):
            if at_s >= duration_s:
                break
            await sleep(max(0.0, begun_at + at_s - clock()))
            for frame in itertools.islice(supply, plan.burst):
                if len(under_way) >= plan.buffer:
                    tally.dropped += 1
                    continue
                task = group.create_task(shoot(frame, tally.sent))
                tally.sent += 1
                under_way.add(task)
                task.add_done_callback(end)
