"""What engines take, and which of them make room for another one: decides without doing.

Rules:

1.  Nothing is unloaded while all that is loaded, and what is to come, fits into the budget.
2.  First go those that no line is served by (kept for rolling back, or in the shadow), then those that were asked for
    the longest ago. Pinned ones never go.
3.  Where even that makes too little room, nothing goes.
4.  An engine takes what loading it was seen to take, for a runtime's own copies and buffers stand in no file; but never
    less than is promised. Frames come and go meanwhile, so the same network's loads are averaged. Where other engines
    were closed meanwhile, what they gave back is only guessed, and adds nothing to what is known already.
5.  One that was never loaded here is expected to outgrow its file as the others did.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from service.lines.live import VersionKey


class EngineSizes:
    """What engines were seen to take, by their networks."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}  # bytes of the file, bytes in memory

    def learn(self, network: str, file_bytes: int, promised_bytes: int, grown_bytes: int, closed_bytes: int = 0) -> int:
        """Take note of a load, and return what the engine takes.

        Args:
            network: SHA-256 of its file, since versions and bundles share networks.
            file_bytes: size of that file.
            promised_bytes: what the engine itself says that it takes.
            grown_bytes: by how much memory grew; less than nothing where others gave more back meanwhile.
            closed_bytes: what other engines took that were closed meanwhile.
        """
        known = self._seen.get(network)
        if known is None:
            taken = grown_bytes + closed_bytes
        else:
            taken = known[1] if closed_bytes else (known[1] + grown_bytes) // 2
        self._seen[network] = file_bytes, max(promised_bytes, taken)
        return self._seen[network][1]

    def expect(self, network: str | None, file_bytes: int) -> int:
        """Return what an engine will take; None where nobody knows which network it is."""
        if network in self._seen:
            return self._seen[network][1]
        files, taken = (sum(sizes) for sizes in zip(*self._seen.values(), strict=True)) if self._seen else (1, 1)
        return max(file_bytes, file_bytes * taken // max(1, files))


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
