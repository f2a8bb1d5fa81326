"""One timer for many moments: the event loop is asked for the earliest one, and the others cost a comparison."""

import asyncio
import math
from collections.abc import Callable

# The loop's timers may fire a little early; looking again just after the moment saves a second look.
_TIMER_SLACK_S = 0.001


class Alarm:
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
        in_s = time - self._clock() + _TIMER_SLACK_S  # a moment that is past is the loop's next one
        self._handle = asyncio.get_running_loop().call_later(in_s, self._fire)

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
