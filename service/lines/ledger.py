"""What the registry's hands share: its parts, its locks, and what has happened to the versions of each bundle.

Nothing is changed here: that is the business of the modules above, up to `registry.py`, which names them.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from service.contract.signature import Trust
from service.lines.catalogue import Catalogue
from service.lines.choices import Choices, LastLive
from service.lines.live import LineStatus, LoadedVersion, VersionKey
from service.lines.loading import BatcherOptions, Loader, OpenEngine
from service.lines.memory import EngineSizes
from service.lines.served import WHILE_LOADING_S, ServedLines
from service.observability.telemetry import Telemetry
from service.stores.store import Store
from service.threads import Turns

SHORTEST_RETRY_S = 1.0
GONE = "It was removed from the store and serves on; put it back, or activate another version."
GONE_MEANWHILE = (
    "It was removed from the store while it was not in memory, and can't come back; put it back, or activate another "
    "version."
)
TAKEN_OUT = "It was unloaded by an administrator; load it again."


@dataclass(frozen=True)
class RegistryOptions:
    """What is kept in memory, and what becomes live by itself; see `Settings`.

    Attributes:
        activates_newest: whether a new version in the store becomes live without being asked for; else a restart takes
            the version that was live as well, where there is a state directory.
        keeps_previous: whether the version before the live one stays loaded.
        budget_bytes: memory of all engines together; None is no limit.
        pinned: lines whose engine is never unloaded.
        trust: whose signature bundles must have; None does not ask for one.
        state_directory: where administrators' choices are kept through restarts; None forgets them.
        weighs_engines: whether an engine takes what loading it added to this process; else what it says itself, as for
            the memory of another device.
    """

    activates_newest: bool = True
    keeps_previous: bool = True
    budget_bytes: int | None = None
    pinned: frozenset[str] = frozenset()
    trust: Trust | None = None
    state_directory: Path | None = None
    weighs_engines: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why a version was not taken into use.

    Attributes:
        reason: in a sentence.
        looks: of its files then, from outside.
        tries: how often it was refused with these looks.
        again_at: from when on it is tried again as it is, by the registry's clock, where store or machine may have been
            at fault; infinite where it must change first.
    """

    reason: str
    looks: object
    tries: int
    again_at: float


@dataclass
class History:
    """What happened to the versions of one bundle.

    Attributes:
        live: versions that were live, the present one last.
        held_back: versions that do not become live by themselves.
        refusals: why versions are not in use that were tried.
        load_s: how long a load takes for which somebody waits, as the last one has shown.
    """

    live: list[str] = field(default_factory=list)
    held_back: set[str] = field(default_factory=set)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    load_s: float = WHILE_LOADING_S


class Ledger(ServedLines):
    """What is known of the versions in store and memory.

    Args:
        store: of bundles.
        wanted: lines that should be served; None means every one in the store.
        open_engine: brings a verified bundle to its device.
        driven: how engines are driven.
        telemetry: learns which lines there are and what serves them.
        clock: monotonic seconds.
        options: what is kept, and what becomes live by itself.
    """

    def __init__(
        self,
        store: Store,
        wanted: frozenset[str] | None,
        open_engine: OpenEngine,
        driven: BatcherOptions,
        telemetry: Telemetry,
        clock: Callable[[], float],
        options: RegistryOptions | None = None,
    ) -> None:
        super().__init__(clock)
        self._catalogue = Catalogue(store, wanted)
        self._wanted = wanted
        self._options = options or RegistryOptions()
        self._choices = Choices(self._options.state_directory)
        self._last_live = LastLive(self._options.state_directory)
        self._loader = Loader(store.directory, open_engine, driven, telemetry, clock, self._options.trust)
        self._telemetry = telemetry
        telemetry.memory_is_bounded(self._options.budget_bytes)
        self._fault: str | None = None
        # What is named first is taken first: looking at the store to the end, speaking with it, a turn, the change.
        self._looking = threading.Lock()
        self._asking = threading.Lock()
        self._told_left_out: dict[VersionKey, str] = {}
        self._called: list[VersionKey] = []  # versions that somebody asks for, to be brought from the store and kept
        self._loading = Turns()
        self._changing = threading.Lock()
        self._histories: dict[str, History] = {}
        self._loading_now: VersionKey | None = None
        self._loading_since = 0.0
        self._asked_again: set[str] = set()
        self._late: set[str] = set()  # lines that came while others were served, and were refused since
        self._hidden: set[str] = set()  # bundles whose folder in the store can't be read
        self._has_scanned = False  # whether the store could be read once, so that its lines are known
        self._gone: frozenset[VersionKey] = frozenset()  # from the store at its last look, and in use all the same
        self._retired: list[LoadedVersion] = []
        self._sizes = EngineSizes()
        self._networks: dict[VersionKey, str] = {}  # of what was loaded here, to tell what it will take again
        self._closed_bytes = 0  # of engines, ever since: what was given back while another one was loaded

    def comes_back(self, status: LineStatus) -> bool:
        """Tell whether a line is not in memory and would come back with its next frame, or is on its way."""
        return (
            status.state in ("unloaded", "loading")
            and status.line not in self._taken_out
            and self._pause_s(status.bundle) == 0
        )

    def _pause_s(self, name: str) -> float:
        history = self._history(name)
        refusal = history.refusals.get(history.live[-1]) if history.live else None
        return 0.0 if refusal is None else max(0.0, refusal.again_at - self._clock())

    def _load_takes_s(self, name: str) -> float:
        load_s, loading = self._history(name).load_s, self._loading_now
        if loading is None or loading.name != name:
            return load_s
        return max(SHORTEST_RETRY_S, load_s - (self._clock() - self._loading_since))

    def _history(self, name: str) -> History:
        return self._histories.setdefault(name, History())


def named(key: VersionKey) -> dict[str, str]:
    """Return a version as the log names it."""
    return {"bundle": key.name, "version": key.version}
