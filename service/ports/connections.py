"""How many connections a port keeps open, and which of them go when there are too many.

Rules:

1.  A port has no more connections than its bound. Where one more comes, some that wait for a request make room: no
    request is broken off for it. Where all are at work, the new one is turned away.
2.  First go those that never brought a request, then those between two requests; of either, first those of the address
    that has most connections, and of one address those that have waited longest. An address alone gets no share: a
    proxy or a router stands for a whole plant, and while there is room nobody is in anybody's way.
3.  Answers that were not taken yet are bounded together; beyond that, who has been taking one the longest is cut off.

Whoever is cut off or turned away is counted, and told of in the log from time to time. Nothing here knows sockets.
"""

import heapq
import logging
import resource
from collections import Counter
from collections.abc import Callable
from typing import Literal, Protocol

Cut = Literal["no_room", "turned_away", "slow_head", "unread_answer"]

MOST_CONNECTIONS = 4096

_TOLD_EVERY_S = 10.0
# So many make room at once, because looking for them means to look at all.
_SHARE_THAT_GOES = 64
# Where nobody could go, nobody can a moment later.
_LOOKED_EVERY_S = 0.1
# As many as the largest node gives a container; Linux takes no more for one process.
_MOST_FILES = 2**20

_log = logging.getLogger("flawline")


class Connection(Protocol):
    """One connection, as far as it matters who goes."""

    @property
    def peer(self) -> str:
        """Address of the other end."""
        ...

    @property
    def has_asked(self) -> bool:
        """Whether it brought a request."""
        ...

    def waits_since(self) -> float | None:
        """Return since when it waits for a request to be complete; None where it is at work."""
        ...

    def cut(self) -> None:
        """End it at once."""
        ...


class Connections:
    """The connections of one port.

    Args:
        clock: monotonic seconds; the one that connections tell by how long they wait.
        most: open at a time.
        most_unread_bytes: of answers that were not taken yet, together.
        tell: called for each that is cut off or turned away.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        most: int = MOST_CONNECTIONS,
        most_unread_bytes: int = 2**30,
        tell: Callable[[Cut], None] = lambda _: None,
    ) -> None:
        self._clock = clock
        self._most = most
        self._most_unread_bytes = most_unread_bytes
        self._tell = tell
        self._open: set[Connection] = set()
        self._unread: dict[Connection, int] = {}  # who has been taking an answer the longest comes first
        self._unread_bytes = 0
        self._untold: Counter[str] = Counter()
        self._told_at = self._looked_at = float("-inf")

    def __len__(self) -> int:
        return len(self._open)

    def come(self, connection: Connection) -> bool:
        """Let a connection in, and return whether there is room for it."""
        if len(self._open) >= self._most and not self._make_room():
            self._count("turned_away", connection)
            return False
        self._open.add(connection)
        return True

    def go(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        self._open.discard(connection)

    def cut(self, connection: Connection, why: Cut) -> None:
        """Cut a connection off, and count it."""
        self._open.discard(connection)
        self._count(why, connection)
        connection.cut()

    def take_answer(self, connection: Connection, size: int) -> None:
        """Note that a connection begins to take a large answer; room for it is made where others don't take theirs."""
        self._unread[connection] = size
        self._unread_bytes += size
        while self._unread_bytes > self._most_unread_bytes and len(self._unread) > 1:
            slowest = next(iter(self._unread))
            self.has_taken_answer(slowest)
            self.cut(slowest, "unread_answer")

    def has_taken_answer(self, connection: Connection) -> None:
        """Note that it has done so, or never will."""
        self._unread_bytes -= self._unread.pop(connection, 0)

    def _make_room(self) -> bool:
        now = self._clock()
        if now - self._looked_at < _LOOKED_EVERY_S:
            return False
        of_peer = Counter(connection.peer for connection in self._open)
        waiting = [
            (connection.has_asked, -of_peer[connection.peer], since, number, connection)
            for number, connection in enumerate(self._open)
            if (since := connection.waits_since()) is not None
        ]
        if not waiting:
            self._looked_at = now
        for *_, connection in heapq.nsmallest(max(1, self._most // _SHARE_THAT_GOES), waiting):
            self.cut(connection, "no_room")
        return bool(waiting)

    def _count(self, why: Cut, connection: Connection) -> None:
        self._tell(why)
        self._untold[why] += 1
        now = self._clock()
        if now - self._told_at >= _TOLD_EVERY_S:
            told = {"cut": dict(self._untold), "open": len(self._open), "most": self._most, "peer": connection.peer}
            _log.warning("connections were cut off", extra=told)
            self._untold.clear()
            self._told_at = now


def raise_file_limit() -> int:
    """Let the process open as many files as it may, and return how many that is; a connection is a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # some sandboxes do not let it; the bound of connections follows what there is
            return soft
    return max(soft, wanted)
