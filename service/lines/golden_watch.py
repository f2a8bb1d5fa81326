"""Replays golden frames while lines are served, so that a device that has changed its mind is found without a defect.

Once a period and live bundle, the golden frames of one of its lines go the way of every other frame: through the queue,
at low priority, onto the runners. An engine that raises is then lost by the batcher's own rule, and one that hangs by
its own alarm; one that answers with other numbers is distrusted, and its lines are unhealthy.

Priorities count among the frames of one engine, but cores are everybody's. So bundles are asked one after another,
spread over the period, and each golden frame waits until the frames of all engines leave room for it. Where they leave
none for a bundle's share of the period, or a queue has no room, or a deadline passes, nothing is proved: frames that
are answered are proof enough, and saturation is no fault. A replay that ends by a fault of its own blames no engine,
and proves nothing either: it is counted apart.

An engine that nobody asks has no such proof while another line takes all the room. After a few turns it is replayed all
the same: one golden frame at a time, at low priority.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.errors import BundleRefused, EngineFailed, MomentError, Overloaded
from service.lines.live import LoadedVersion, VersionKey
from service.lines.registry import Registry
from service.observability.telemetry import GoldenOutcome, Telemetry
from service.scheduling.schedule import Priority
from service.threads import BEHIND_THE_LOOP, begin

_log = logging.getLogger("flawline")

# Turns of an engine that answered no frame meanwhile; the next one waits for no gap.
_MOST_UNPROVED_IN_A_ROW = 3

_Answer = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass
class _Watched:
    """What is known of a bundle.

    Attributes:
        turns: that it has had, which decide on the line whose golden frames are next.
        answered: frames that its engine had answered after the last one.
        unproved: turns in a row that proved nothing, and between which its engine answered no frame.
    """

    turns: int = 0
    answered: int = 0
    unproved: int = 0


class GoldenWatch:
    """Asks engines what is known; belongs where the event loop runs.

    Args:
        registry: knows what is live.
        telemetry: counts.
        every_s: between two replays of a bundle; also the time that one may take. It waits for gaps for at most its
            share of that, all frames together, so that the next bundle has its turn.
        clock: monotonic seconds.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        registry: Registry,
        telemetry: Telemetry,
        *,
        every_s: float,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._registry = registry
        self._telemetry = telemetry
        self._every_s = every_s
        self._clock = clock
        self._sleep = sleep
        self._watched: dict[VersionKey, _Watched] = {}

    async def run(self) -> None:
        """Replay again and again, until cancelled."""
        while True:
            await self.look()

    async def look(self) -> None:
        """Replay once on every live bundle, one after another, spread over the period."""
        begun_at, live = self._clock(), self._registry.live_versions()
        self._watched = {version.key: self._watched.get(version.key) or _Watched() for version in live}
        for place, version in enumerate(live):
            await self._sleep_until(begun_at + self._every_s * (place + 1) / len(live))
            if any(version.bundle is other.bundle for other in self._registry.live_versions()):
                await self._take_turn(version, self._every_s / len(live))
        if not live:
            await self._sleep_until(begun_at + self._every_s)

    async def _sleep_until(self, time: float) -> None:
        await self._sleep(max(0.0, time - self._clock()))

    async def _take_turn(self, version: LoadedVersion, share_s: float) -> None:
        watched, batcher = self._watched[version.key], version.bundle.batcher
        if batcher.answered != watched.answered:
            watched.unproved = 0
        gives_way = watched.unproved < _MOST_UNPROVED_IN_A_ROW
        outcome = await self._ask(version, watched.turns, share_s if gives_way else None)
        self._telemetry.golden_checked(outcome)
        watched.turns += 1
        watched.answered = batcher.answered
        watched.unproved = watched.unproved + 1 if outcome in ("skipped", "ended_early") else 0

    async def _ask(self, version: LoadedVersion, turn: int, patience_s: float | None) -> GoldenOutcome:
        """Replay the golden frames of one line.

        Args:
            version: live.
            turn: of its bundle; its lines have theirs one after another.
            patience_s: for gaps, all frames together; None does not ask for gaps.

        Returns:
            What came of it.
        """
        bundle = version.bundle
        proof = bundle.proofs[turn % len(bundle.proofs)]
        loop, deadline = asyncio.get_running_loop(), self._clock() + self._every_s

        async def submit(frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> _Answer:
            line = bundle.manifest.lines[int(line_index[0])]
            with bundle.batcher.place(deadline, line=line, weight=len(frames), priority=Priority.LOW) as place:
                result = await bundle.batcher.submit(place, frames, int(line_index[0]))
            return result.scores, result.anomaly_maps

        def run(frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> _Answer:
            nonlocal patience_s
            if patience_s is not None:
                asked_at = self._clock()
                if not bundle.batcher.wait_for_gap(patience_s):
                    raise Overloaded("The frames of lines left no room for a golden one.")
                patience_s -= self._clock() - asked_at
            return asyncio.run_coroutine_threadsafe(submit(frames, line_index), loop).result()

        try:
            # In a thread of its own: a replay waits for its answers as long as its engine is held, and no request may
            # wait for a thread behind it.
            await asyncio.wrap_future(begin(lambda: proof(run), name="flawline-golden", niceness=BEHIND_THE_LOOP))
        except MomentError:
            return "skipped"
        except BundleRefused as error:
            bundle.batcher.distrust(error.sentence)
            return "failed"
        except EngineFailed:  # whether the engine is lost, the batcher has found out meanwhile
            _log.warning("a golden frame failed", extra={"bundle": version.key.name, "version": version.key.version})
            return "failed"
        except Exception:  # noqa: BLE001 - the edge of this task: looking goes on
            named = {"bundle": version.key.name, "version": version.key.version}
            _log.exception("a golden replay ended early", extra=named)
            return "ended_early"
        return "passed"
