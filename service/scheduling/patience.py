"""How long a step may take, of the time in which the process was awake: decides without doing.

A run that does not end costs its engine, and a frame whose decoding does not end costs its thread. But where the whole
process stood still, as it does when a signal stops it, its machine is suspended or it gets no core, every step seems to
take long, and none is to blame. Whoever waits for steps looks at them every so often, and a look that is late tells.

Nothing here knows asyncio, threads or a clock. Time is an argument: seconds of any monotonic clock.

Rules:

1.  A step is stuck once it has taken `stuck_after_s` of the time that counts.
2.  A look that is late by more than `looks_every_s` tells that the process stood still. What passed since the look
    before it does not count then, for nobody knows how much of that the process was awake. So a pause of more than two
    looks never counts; a shorter one may.
3.  What counted before a pause goes on counting, and each pause takes at most one look's time of being awake with it.
    So a step that never ends is found stuck, however often the process is paused.
4.  Only the latest pauses are left out. So it is found stuck even where every look is late.
"""

import math
from collections import deque

from service.errors import UnreadableFrame

# Threads that were given up over a frame and did not come back, each with that frame's memory.
MOST_GIVEN_UP = 16
# Looks in the time that makes a step stuck.
_LOOKS = 6
# That are left out; a step during which the process is paused more often is not worth waiting for.
_MOST_PAUSES = 16


class Patience:
    """Counts how long steps took while the process was awake.

    Args:
        stuck_after_s: how long a step may take.

    Attributes:
        stuck_after_s: the same.
        looks_every_s: how long after the beginning of a step, and after each look during it, the next look may come.
    """

    def __init__(self, stuck_after_s: float) -> None:
        self.stuck_after_s = stuck_after_s
        self.looks_every_s = stuck_after_s / _LOOKS
        self._looked_at = -math.inf
        self._pauses: deque[tuple[float, float]] = deque(maxlen=_MOST_PAUSES)

    def look(self, now: float, late_s: float) -> bool:
        """Take note of a look, and return whether the process stood still before it.

        Args:
            now: when it comes.
            late_s: how long after it should have come.
        """
        has_stood_still = late_s > self.looks_every_s
        if has_stood_still:
            self._pauses.append((self._looked_at, now))
        self._looked_at = now
        return has_stood_still

    def left_s(self, since: float, now: float) -> float:
        """Return how much longer a step may take; 0 or less where it is stuck.

        A step that began before another never has more left.

        Args:
            since: when it began.
            now: of the look.
        """
        paused_s = sum(end - max(begin, since) for begin, end in self._pauses if end > since)
        return self.stuck_after_s - (now - since - paused_s)


def not_decoded(after_s: float) -> UnreadableFrame:
    """Return what is said of a frame whose decoding does not end."""
    return UnreadableFrame(f"The frame could not be decoded within {after_s:g} s; send it as the camera wrote it.")
