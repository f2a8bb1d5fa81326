"""The places of one engine's queue: how many frames may wait for their answers at a time, and whose they are.

A frame takes a place before anything is done for it, holds it until it is answered, and gives it back in every outcome.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from service.scheduling.schedule import Priority, has_room


@dataclass(eq=False, slots=True)
class Place:
    """A frame's right to be answered, taken before it is decoded.

    Attributes:
        deadline: when the answer is due.
        line: whose frame it is.
        weight: network inputs of the frame.
        priority: how much it matters beside others.
        is_ahead: whether it still has its run before it.
    """

    deadline: float
    line: str
    weight: int
    priority: Priority
    is_ahead: bool = True


class Places:
    """Who holds a place.

    Args:
        most: places.
        is_shared: whether several lines ask for them.
        tell: called with the number of those that are held, whenever that changes.
    """

    def __init__(self, most: int, *, is_shared: bool, tell: Callable[[int], None]) -> None:
        self._most = most
        self._is_shared = is_shared
        self._tell = tell
        self._held: set[Place] = set()
        self._held_by: Counter[str] = Counter()

    def __len__(self) -> int:
        """Return how many are held."""
        return len(self._held)

    def ahead(self) -> list[Place]:
        """Return those of frames that still have their run before them."""
        return [place for place in self._held if place.is_ahead]

    def has_room(self, new: Place) -> bool:
        """Say whether there is one for one more frame."""
        return has_room(self._most, len(self._held), self._held_by[new.line], new.priority, is_shared=self._is_shared)

    def hold(self, place: Place) -> "Holding":
        """Return what holds a place for as long as a `with` block."""
        return Holding(self, place)

    def take(self, place: Place) -> None:
        """Hold a place, until `give_back`."""
        self._held.add(place)
        self._held_by[place.line] += 1
        self._tell(len(self._held))

    def give_back(self, place: Place) -> None:
        """Hold a place no longer."""
        self._held.remove(place)
        self._held_by[place.line] -= 1
        self._tell(len(self._held))


class Holding:
    """A place while it is held."""

    __slots__ = ("_place", "_places")

    def __init__(self, places: Places, place: Place) -> None:
        self._places = places
        self._place = place

    def __enter__(self) -> Place:
        self._places.take(self._place)
        return self._place

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self._places.give_back(self._place)
