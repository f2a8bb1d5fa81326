"""How much memory bodies may take, from their first bytes until their request is answered, and whose.

Rules:

1.  All bodies together never take more than the budget.
2.  A holder takes no more than what it leaves free to others: one alone half of the budget, two a third each, and so
    on. Somebody new always finds room, however much the others send. (A. K. Choudhury and E. L. Hahne, "Dynamic queue
    length thresholds for shared-memory packet switches", IEEE/ACM Transactions on Networking 6(2), 1998.)
3.  A holder's only body may take all that is free, so that the largest body fits into any budget that is not smaller.

A body of known length is counted as a whole before it comes: one that is broken off half-way was of no use to anybody.
Counts may come from any thread, because bodies are decompressed beside the event loop.
"""

from threading import Lock
from types import TracebackType
from typing import Self

from service.errors import Overloaded

_TOO_MUCH = (
    "Too many bytes are on their way from this caller, or wait; send fewer at a time, or try again after as long as "
    "Retry-After says."
)


class BodyBudget:
    """The memory of all bodies.

    Args:
        most_bytes: that they may take together.
    """

    def __init__(self, most_bytes: int) -> None:
        self._free = most_bytes
        self._held: dict[str, int] = {}
        self._lock = Lock()

    def of(self, holder: str) -> "Holding":
        """Return what counts the body of one request.

        Args:
            holder: whose share it is taken from.
        """
        return Holding(self, holder)

    def change(self, holder: str, before: int, size: int) -> None:
        """Let one body of a holder take so many bytes, or raise what `Holding.hold` does."""
        with self._lock:
            others, free = self._held.get(holder, 0) - before, self._free + before - size
            if free < (others + size if others else 0):
                raise Overloaded(_TOO_MUCH)
            self._held[holder] = others + size
            self._free = free

    def give_back(self, holder: str, size: int) -> None:
        """Give so many bytes back."""
        with self._lock:
            self._free += size
            self._held[holder] -= size
            if not self._held[holder]:
                del self._held[holder]


class Holding:
    """What one request's body takes, inside a `with` block at whose end it is given back."""

    __slots__ = ("_budget", "_holder", "_size")

    def __init__(self, budget: BodyBudget, holder: str) -> None:
        self._budget = budget
        self._holder = holder
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        if self._size:
            self._budget.give_back(self._holder, self._size)
            self._size = 0

    def hold(self, size: int) -> None:
        """Hold so many bytes in all, or go on holding more.

        Raises:
            Overloaded: if the holder's share, or the budget, has no room for that.
        """
        if size > self._size:
            self._budget.change(self._holder, self._size, size)
            self._size = size
