"""Replays golden frames while lines are served, so that a device that has changed its mind is found without a defect.

Once a period and live bundle, the golden frames of one of its lines go the way of every other frame: through the queue,
at low priority, onto the runners. An engine that raises is then lost by the batcher's own rule, and one that hangs by
its own alarm; one that answers with other numbers is distrusted, and its lines are unhealthy.

Priorities count among the frames of one engine, but cores are everybody's. So bundles are asked one after another,
spread over the period, and each golden frame waits until the frames of all engines leave room for it. Where they leave
none for a whole period, or a queue has no room, or a deadline passes, nothing is proved: frames that are answered are
proof enough, and saturation is no fault.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import numpy as np
from numpy.typing import NDArray

from service.errors import BundleRefused, EngineFailed, MomentError, Overloaded
from service.live import LoadedVersion, VersionKey
from service.registry import Registry
from service.schedule import Priority
from service.telemetry import Telemetry
from service.threads import BEHIND_THE_LOOP, begin

_log = logging.getLogger("flawline")

_Answer = tuple[NDArray[np.float32], NDArray[np.float32]]


class GoldenWatch:
    """Asks engines what is known; belongs where the event loop runs.

    Args:
        registry: knows what is live.
        telemetry: counts.
        every_s: between two replays of a bundle; also the time that one may take.
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
        self._turn: dict[VersionKey, int] = {}

    async def run(self) -> None:
        """Replay again and again, until cancelled."""
        while True:
            await self.look()

    async def look(self) -> None:
        """Replay once on every live bundle, one after another, spread over the period."""
        begun_at, live = self._clock(), self._registry.live_versions()
        self._turn = {version.key: self._turn.get(version.key, -1) + 1 for version in live}
        for place, version in enumerate(live):
            await self._sleep_until(begun_at + self._every_s * (place + 1) / len(live))
            if any(version.bundle is other.bundle for other in self._registry.live_versions()):
                await self._ask(version)
        if not live:
            await self._sleep_until(begun_at + self._every_s)

    async def _sleep_until(self, time: float) -> None:
        await self._sleep(max(0.0, time - self._clock()))

    async def _ask(self, version: LoadedVersion) -> None:
        bundle = version.bundle
        proof = bundle.proofs[self._turn[version.key] % len(bundle.proofs)]
        loop, deadline = asyncio.get_running_loop(), self._clock() + self._every_s

        async def submit(frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> _Answer:
            line = bundle.manifest.lines[int(line_index[0])]
            with bundle.batcher.place(deadline, line=line, weight=len(frames), priority=Priority.LOW) as place:
                result = await bundle.batcher.submit(place, frames, int(line_index[0]))
            return result.scores, result.anomaly_maps

        def run(frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> _Answer:
            if not bundle.batcher.wait_for_gap(deadline - self._clock()):
                raise Overloaded("The frames of lines left no room for a golden one.")
            return asyncio.run_coroutine_threadsafe(submit(frames, line_index), loop).result()

        try:
            # In a thread of its own: a replay waits for its answers as long as its engine is held, and no request may
            # wait for a thread behind it.
            await asyncio.wrap_future(begin(lambda: proof(run), name="flawline-golden", niceness=BEHIND_THE_LOOP))
        except MomentError:
            self._telemetry.golden_checked("skipped")
        except BundleRefused as error:
            self._telemetry.golden_checked("failed")
            bundle.batcher.distrust(error.sentence)
        except EngineFailed:  # whether the engine is lost, the batcher has found out meanwhile
            self._telemetry.golden_checked("failed")
            _log.warning("a golden frame failed", extra={"bundle": version.key.name, "version": version.key.version})
        except Exception:  # noqa: BLE001 - the edge of this task: looking goes on
            _log.exception("a replay ended early")
        else:
            self._telemetry.golden_checked("passed")
