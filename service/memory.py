"""Which engines make room for another one: decides without doing.

Rules:

1.  Nothing is unloaded while all that is loaded, and what is to come, fits into the budget.
2.  First go those that no line is served by (kept for rolling back, or in the shadow), then those that were asked for
    the longest ago. Pinned ones never go.
3.  Where even that makes too little room, nothing goes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from service.live import VersionKey


@dataclass(frozen=True)
class Resident:
    """An engine in memory.

    Attributes:
        key: whose engine it is.
        size_bytes: memory that it takes.
        used_at: when a frame last asked for it; seconds of any monotonic clock.
        is_live: whether lines are served by it.
        is_pinned: whether it must stay.
    """

    key: VersionKey
    size_bytes: int
    used_at: float
    is_live: bool
    is_pinned: bool


def make_room(residents: Iterable[Resident], budget_bytes: int, wanted_bytes: int) -> tuple[VersionKey, ...] | None:
    """Choose whom to unload.

    Args:
        residents: all that is loaded.
        budget_bytes: memory of all engines together.
        wanted_bytes: of what is to come beside them; 0 asks who is too many now.

    Returns:
        Those to unload, in order; None where there can't be room.
    """
    known = tuple(residents)
    over = sum(resident.size_bytes for resident in known) + wanted_bytes - budget_bytes
    leaving: list[VersionKey] = []
    movable = (resident for resident in known if not resident.is_pinned)
    for resident in sorted(movable, key=lambda resident: (resident.is_live, resident.used_at)):
        if over <= 0:
            break
        leaving.append(resident.key)
        over -= resident.size_bytes
    return None if over > 0 else tuple(leaving)
