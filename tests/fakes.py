"""Stand-ins with the real signatures: an engine that computes nothing much, a clock that stands still, and a loop."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engines.engine import EngineOutput, LoneRun


class FakeClock:
    """A clock that moves only when told to; seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def hold_time() -> FakeClock:
    """Have the running loop go by a clock that moves only when told to, and return it.

    It shows a time long before the loop's own, so that what was to come by that, as the end of `in_loop`, does not.
    """
    asyncio.get_running_loop().time = clock = FakeClock(-1e6)
    return clock


async def pass_time(clock: FakeClock, seconds: float) -> None:
    """Let time pass at once, for the timers of a loop whose time is held as well, as it does for a paused process."""
    clock.advance(seconds)
    for _ in range(5):
        await asyncio.sleep(0)


class FakeEngine:
    """Scores a frame by its mean grey level over 255, and maps every cell to the same value.

    Args:
        map_size: `(h, w)` of the maps.
        device: where it claims to run.

    Attributes:
        batches: how many frames each run had, in order.
        line_indices: what each run was told of its lines.
        on_run: called with the frames inside each run, before the answer; raise here to fail, or return an answer to
            replace the real one.
        started: released once for each run that began; acquire it in a thread to wait for one.
        size_bytes: what it claims to take.
        is_closed: whether it was told to give everything back.
        gate: runs wait here; open unless `hold` was called.
    """

    def __init__(self, map_size: tuple[int, int] = (4, 6), device: str = "fake") -> None:
        self.device, self.provider, self.precision = device, "fake", "fp32"
        self.size_bytes = 0
        self.alone: LoneRun | None = None
        self.is_closed = False
        self.batches: list[int] = []
        self.line_indices: list[list[int]] = []
        self.on_run: Callable[[NDArray[np.uint8]], EngineOutput | None] = lambda _: None
        self.started = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self._map_size = map_size

    def hold(self) -> None:
        """Let every run wait until `release`."""
        self.gate.clear()

    def release(self) -> None:
        """Let the runs that wait go on, and later ones pass."""
        self.gate.set()

    def run(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        """Answer as `Engine.run` promises, unless `on_run` says otherwise."""
        self.batches.append(len(frames))
        self.line_indices.append(line_index.tolist())
        self.started.release()
        self.gate.wait()
        replaced = self.on_run(frames)
        return grey_level(frames, self._map_size) if replaced is None else replaced

    def close(self) -> None:
        """Note it."""
        self.is_closed = True


def grey_level(frames: NDArray[np.uint8], map_size: tuple[int, int] = (4, 6)) -> EngineOutput:
    """Return what a `FakeEngine` says of frames `(B, H, W, 3)` uint8."""
    scores = frames.mean(axis=(1, 2, 3), dtype=np.float64).astype(np.float32) / np.float32(255)
    maps = np.broadcast_to(scores[:, None, None], (len(frames), *map_size)).astype(np.float32)
    return EngineOutput(scores, maps)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in a loop of its own, and let it fail rather than wait for ever."""

    @wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(30):
                await test(*arguments, **fixtures)

        asyncio.run(bounded())

    return run
