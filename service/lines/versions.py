"""How versions get into memory, become live in one assignment, and leave: the registry's hands.

A version is loaded beside whatever is live, by `service/lines/loading.py`, one at a time: whoever loads has a turn of
`_loading`, and an administrator or a frame gets the next one before a look at the store does. Whoever changes something
holds the lock `_changing`, only to decide and to swap, and never while anything is loaded or a store is asked. So what
was decided may be wrong by the time that it is loaded, and is decided again in the moment of the swap: a version that
somebody has stepped back from meanwhile is closed, and does not become live. A turn is taken before the lock.

What is replaced is closed once nobody needs it and the last of its frames is answered. `tend`, `drain` and `close`
belong where the event loop runs.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from service.contract.bundle import MODEL_FILE
from service.contract.signature import Trust
from service.errors import (
    BundleNotLoaded,
    BundleRefused,
    FlawlineError,
)
from service.heap import held_bytes, lacked_memory
from service.lines.catalogue import Catalogue
from service.lines.choices import Choices, LastLive
from service.lines.live import (
    LineCard,
    LineState,
    LineStatus,
    LiveLine,
    LoadedVersion,
    VersionKey,
)
from service.lines.loading import BatcherOptions, Loader, OpenEngine
from service.lines.memory import EngineSizes, Resident, make_room
from service.lines.served import WHILE_LOADING_S, ServedLines, State
from service.observability.telemetry import Telemetry
from service.scheduling.batcher import Batcher
from service.stores.store import Store
from service.threads import Turns

_SHORTEST_RETRY_S = 1.0
# Of a fault that may pass: each pause is twice the one before, up to this. What never was live is given up after so
# many tries, a quarter of an hour, and waits until it changes.
_LONGEST_PAUSE_S = 300.0
_MOST_TRIES = 10
_FEWER_LINES = "does not serve the line; activate a version that does, or take the line out of FLAWLINE_LINES."

_log = logging.getLogger("flawline")

_Outcome = TypeVar("_Outcome")


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


class LoadedVersions(ServedLines):
    """The versions in memory.

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
        self._asked_again: set[str] = set()
        self._late: set[str] = set()  # lines that came while others were served, and were refused since
        self._hidden: set[str] = set()  # bundles whose folder in the store can't be read
        self._has_scanned = False  # whether the store could be read once, so that its lines are known
        self._gone: frozenset[VersionKey] = frozenset()  # from the store at its last look, and in use all the same
        self._retired: list[LoadedVersion] = []
        self._sizes = EngineSizes()
        self._networks: dict[VersionKey, str] = {}  # of what was loaded here, to tell what it will take again
        self._closed_bytes = 0  # of engines, ever since: what was given back while another one was loaded

    # What belongs where the event loop runs.

    def tend(self) -> None:
        """Close what was replaced, as soon as the last of its frames is answered."""
        for version in list(self._retired):
            if version.bundle.batcher.is_idle:
                version.bundle.batcher.close()
                version.bundle.engine.close()
                self._closed_bytes += version.bundle.engine.size_bytes
                self._retired.remove(version)
                _log.info("version closed", extra=_named(version.key))

    async def drain(self) -> None:
        """Admit nothing more, and return when all that was admitted is answered."""
        batchers = self._batchers()
        for batcher in batchers:
            batcher.stop_admitting()
        for batcher in batchers:
            await batcher.drain()

    def close(self) -> None:
        """End every runner; to be called where the event loop runs."""
        for batcher in self._batchers():
            batcher.close()

    def _batchers(self) -> list[Batcher]:
        return [version.bundle.batcher for version in (*self._state.loaded.values(), *self._retired)]

    # From the store into memory.

    def _load_if(
        self, choose: Callable[[], VersionKey | None], *, is_urgent: bool = False
    ) -> dict[VersionKey, str | None]:
        """Load a version and make it live.

        Args:
            choose: says which, or that none is wanted any more; asked before it is loaded and again when it is.
            is_urgent: whether somebody waits for it.

        Returns:
            It, with why it was refused, or None; nothing where none was wanted.
        """
        with self._changing:
            if choose() is None:
                return {}
        with self._loading.take(is_urgent=is_urgent):
            with self._changing:
                key = choose()
            return {} if key is None else self._load_or_refuse(key, choose, is_urgent=is_urgent)

    def _load_or_refuse(
        self, key: VersionKey, choose: Callable[[], VersionKey | None], *, is_urgent: bool
    ) -> dict[VersionKey, str | None]:
        looked = self._catalogue.looks(*key)
        try:
            loaded = self._open(key, is_urgent=is_urgent)
            with self._changing:
                if choose() != key:
                    _close(loaded)
                    _log.info("version not wanted any more", extra=_named(key))
                    return {}
                self._go_live(self._take_in(loaded))
                if not self._options.activates_newest:
                    self._choices.begin_with(*key)
        except FlawlineError as error:
            fault = error
        except Exception as error:  # noqa: BLE001 - the edge: one bundle's fault must not keep the others from loading
            _log.exception("loading failed", extra=_named(key))
            self._telemetry.version_refused(key.name)
            fault = _of_the_machine(error)
        else:
            return {key: None}
        with self._changing:
            self._remember_refusal(key, fault, looked)
            self._tell_who_waits(key, fault)
        return {key: fault.sentence}

    def _remember_refusal(self, key: VersionKey, fault: FlawlineError, looks: object) -> None:
        """Note why a version is not in use, and when it may be tried again: later and later."""
        history = self._history(key.name)
        before = history.refusals.get(key.version)
        tries = before.tries + 1 if before is not None and before.looks == looks else 1
        # What was live here was proved here, so that it comes back however long the fault takes to pass.
        may_pass = _may_pass(fault) and (key.version in history.live or tries < _MOST_TRIES)
        pause_s = min(_SHORTEST_RETRY_S * 2 ** min(tries - 1, _MOST_TRIES), _LONGEST_PAUSE_S)
        again_at = self._clock() + pause_s if may_pass else math.inf
        history.refusals[key.version] = Refusal(fault.sentence, looks, tries, again_at)

    def _tell_who_waits(self, key: VersionKey, fault: FlawlineError) -> None:
        """Say of the lines of a version that was refused how they stand."""
        live, not_live = self._state.live, self._state.not_live
        was_live = self._history(key.name).live[-1:] == [key.version]
        # Its manifest may be what can't be read.
        known = tuple(line for line, status in not_live.items() if status.bundle == key.name)
        lines = known if was_live else self._catalogue.lines(*key)
        not_served = tuple(line for line in lines if line not in live and line not in self._taken_out)
        if not self._is_loading:
            self._late |= set(not_served) - not_live.keys()  # those that are wanted by name are known from the start
        if was_live and _may_pass(fault):
            reason = f"The line made room for others and could not come back; it is tried again. {fault.sentence}"
            self._note(key.name, not_served, "unloaded", reason)
            return
        # A version that waits for a frame is not undone by one that was never live.
        waiting = {line for line, status in not_live.items() if status.state == "unloaded"}
        refused = not_served if was_live else tuple(line for line in not_served if line not in waiting)
        self._note(key.name, refused, "refused", f"Version {key.version}: {fault.sentence}")

    def comes_back(self, status: LineStatus) -> bool:
        """Tell whether a line is not in memory and would come back with its next frame, or is on its way."""
        return (
            status.state in ("unloaded", "loading")
            and status.line not in self._taken_out
            and self._pause_s(status.bundle) == 0
        )

    def _bring(self, choose: Callable[[], VersionKey], use: Callable[[LoadedVersion], _Outcome]) -> _Outcome:
        """Use a version that somebody waits for: at once where it is in memory, else after it was loaded.

        Args:
            choose: says which; asked again when it is loaded, since others may have changed something.
            use: called with it while nobody else changes anything.

        Returns:
            What that returns.

        Raises:
            FlawlineError: whatever choosing and using it raise.
            BundleRefused: if it does not hold; nothing has changed then.
            EngineFailed: if the device does not take it; nothing has changed then.
        """
        with self._changing:
            loaded = self._at_hand(choose())
            if loaded is not None:
                return use(loaded)
        with self._loading.take(is_urgent=True):
            while True:
                with self._changing:
                    key = choose()
                    loaded = self._at_hand(key)
                    if loaded is not None:
                        return use(loaded)
                looked = self._catalogue.looks(*key)
                try:
                    loaded = self._open(key, is_urgent=True)
                except FlawlineError as error:
                    with self._changing:
                        self._remember_refusal(key, error, looked)
                    raise
                with self._changing:
                    try:
                        is_chosen = choose() == key
                    except FlawlineError:
                        _close(loaded)
                        raise
                    if is_chosen:
                        return use(self._take_in(loaded))
                    _close(loaded)

    def _at_hand(self, key: VersionKey) -> LoadedVersion | None:
        """Return a version that is in memory, proved once more; None where it has to be loaded.

        Raises:
            BundleRefused: if it does not hold any more, or another bundle has come to serve one of its lines.
            EngineFailed: if its engine fails.
        """
        loaded = self._state.loaded.get(key)
        if loaded is None or not loaded.bundle.batcher.is_healthy:
            return None
        self._claim(key.name, loaded.bundle.manifest.lines)
        self._loader.prove_again(loaded)
        return loaded

    def _open(self, key: VersionKey, *, is_urgent: bool) -> LoadedVersion:
        """Load a version, beside whatever is live; nobody is served by it yet.

        Args:
            key: which.
            is_urgent: whether somebody waits for it; who waits for the next one waits for this one too.

        Raises:
            BundleRefused: if it does not hold, or store or machine do not let it be loaded.
            EngineFailed: if the device does not take it.
        """
        self._loading_now = key
        self._telemetry.declare_engine(key.name)
        try:
            with self._telling_of_refusals(key):
                held_before, closed_before = self._held_bytes(), self._closed_bytes
                # Nobody makes room for what can't even be read.
                loaded, takes_s = self._loader.load(
                    key.name,
                    key.version,
                    lambda lines: self._claim_and_make_room(key, lines),
                    # At the start nothing is ready, and nothing keeps it from being so soon.
                    gives_way=bool(self._state.live) and not self._is_loading,
                    is_awaited=lambda: is_urgent or self._loading.is_awaited,
                )
                self._weigh(loaded, held_before, closed_before)
                try:
                    with self._changing:
                        self._refuse_too_large(loaded)
                except BundleRefused:
                    _close(loaded)
                    raise
        finally:
            self._loading_now = None
        self._history(key.name).load_s = max(_SHORTEST_RETRY_S, takes_s)
        return loaded

    @contextmanager
    def _telling_of_refusals(self, key: VersionKey) -> Iterator[None]:
        """Count and log what keeps a version from being loaded; whatever it is, whoever asked hears a sentence."""
        try:
            yield
        except Exception as error:
            fault = error if isinstance(error, FlawlineError) else _of_the_machine(error)
            if lacked_memory(error):  # which some runtimes tell as a graph that they can't load
                fault = _of_the_machine(error)
            self._telemetry.version_refused(key.name)
            trace = None if fault is error else error
            _log.error("bundle refused", extra={**_named(key), "reason": fault.sentence}, exc_info=trace)
            if fault is error:
                raise
            raise fault from error

    def _take_in(self, loaded: LoadedVersion) -> LoadedVersion:
        """Have a version that was loaded in memory, to be asked for.

        Raises:
            BundleRefused: if another bundle has come to serve one of its lines meanwhile.
        """
        key = loaded.key
        try:
            with self._telling_of_refusals(key):
                self._claim(key.name, loaded.bundle.manifest.lines)
        except BundleRefused:
            _close(loaded)
            raise
        self._history(key.name).refusals.pop(key.version, None)
        self._used_at[key] = self._clock()
        for line in loaded.lines:
            self._telemetry.declare_line(line)
        loaded = replace(loaded, lines={line: self._by_its_policy(live) for line, live in loaded.lines.items()})
        replaced = self._state.loaded.get(key)
        if replaced is not None:
            self._retired.append(replaced)
        self._state = replace(self._state, loaded={**self._state.loaded, key: loaded})
        self._telemetry.engine_runs(*_running(loaded), size_bytes=loaded.bundle.engine.size_bytes)
        return loaded

    def _claim_and_make_room(self, key: VersionKey, lines: tuple[str, ...]) -> tuple[str, ...]:
        """Return which lines a bundle may serve here, and make room for it.

        Raises:
            BundleRefused: if another bundle serves one of them.
        """
        with self._changing:
            wanted = self._claim(key.name, lines)
            self._make_room_for(key)
        return wanted

    def _claim(self, name: str, lines: tuple[str, ...]) -> tuple[str, ...]:
        """Return which lines a bundle may serve here.

        Raises:
            BundleRefused: if another bundle serves one of them.
        """
        wanted = self._catalogue.wanted_of(lines)
        for line in lines:
            live = self._state.live.get(line)
            if live is not None and live.bundle.manifest.name != name:
                raise BundleRefused(f"{live.bundle.manifest.name} serves {line} already; remove one.")
        return wanted

    # What becomes live, in one assignment each.

    def _become(self, state: State) -> None:
        """Serve what a state says, and tell no more of the lines that nothing serves then."""
        left = self._state.live.keys() - state.live.keys()
        self._state = state
        for line in sorted(left):
            self._telemetry.line_leaves(line)

    def _go_live(self, version: LoadedVersion) -> None:
        """Serve the lines of a loaded version by it."""
        key, state = version.key, self._state
        served, refused = self._by_their_policies(version)
        others = {line: live for line, live in state.live.items() if live.bundle.manifest.name != key.name}
        absent = {
            line: status
            for line, status in state.not_live.items()
            if line not in served and (status.bundle != key.name or line in self._taken_out)
        }
        left = {line for line, status in state.not_live.items() if status.bundle == key.name}
        left |= state.live.keys() - others.keys()
        left -= {*served, *refused, *absent}
        missing = {
            line: LineStatus(line, key.name, "refused", f"Version {key.version} of {key.name} {_FEWER_LINES}", None)
            for line in left & (self._wanted or frozenset())
        }
        self._become(replace(state, live={**others, **served}, not_live={**absent, **refused, **missing}))
        self._late &= self._state.not_live.keys()  # what was served once is missed when it is gone
        for live in served.values():
            self._keep(live)
            self._tell_of(live)
        if left:
            _log.warning("the new version serves fewer lines", extra={**_named(key), "lines": sorted(left)})
        history = self._history(key.name)
        history.live = [known for known in history.live if known != key.version] + [key.version]
        history.held_back.discard(key.version)
        self._last_live.note(*key)
        shadow = self._state.shadows.get(key.name)
        if shadow is not None and shadow.key == key:
            self._end_shadow(key.name)
        self._keep_only_what_is_needed(key.name)
        _log.info("version live", extra={**_named(key), "digest": version.bundle.digest})

    def _by_their_policies(self, version: LoadedVersion) -> tuple[dict[str, LiveLine], dict[str, LineStatus]]:
        """Return the lines that a version may serve, and those whose chosen policy is not there any more."""
        served: dict[str, LiveLine] = {}
        refused: dict[str, LineStatus] = {}
        for line, live in version.lines.items():
            if line in self._taken_out:
                continue
            found = self._by_its_policy(live)
            if found.default_policy == found.own_policy or found.gives_verdicts:
                served[line] = found
            else:
                refused[line] = _without_its_policy(found)
        return served, refused

    def _by_its_policy(self, live: LiveLine) -> LiveLine:
        """Return a line with the policies of the store, judged by the one that was chosen for it and this version."""
        found = self._loader.with_policies_of_store(live)
        wanted = self._choices.policy_of(live.name, *live.key) or live.own_policy
        return found if wanted == found.default_policy else replace(found, default_policy=wanted)

    def _replace_line(self, line: LiveLine) -> None:
        """Serve a line by the same version in another way."""
        self._keep(line)
        state = self._state
        not_live = {name: status for name, status in state.not_live.items() if name != line.name}
        self._state = replace(state, live={**state.live, line.name: line}, not_live=not_live)
        self._late.discard(line.name)
        self._tell_of(line)

    def _keep(self, line: LiveLine) -> None:
        """Replace a line of a version that is in memory, whether that is live, kept or in the shadow."""
        state, key = self._state, line.key
        before = state.loaded[key]
        version = replace(before, lines={**before.lines, line.name: line})
        shadows = {name: version if shadow is before else shadow for name, shadow in state.shadows.items()}
        self._state = replace(state, loaded={**state.loaded, key: version}, shadows=shadows)

    def _look_at_policies(self) -> "PoliciesSeen":
        """Offer the policies that lie in the store by now, and no others, in every version that is in memory."""
        seen = PoliciesSeen([], [], {})
        for version in list(self._state.loaded.values()):
            is_current = self._history(version.key.name).live[-1:] == [version.key.version]
            for kept in version.lines.values():
                serving = self._state.live.get(kept.name)
                is_live = serving is not None and serving.key == version.key
                found = self._loader.with_policies_of_store(kept)
                if is_current and kept.name not in self._taken_out:
                    seen.offered.extend((kept.name, name) for name in found.policies.keys() - kept.policies.keys())
                    seen.withdrawn.extend((kept.name, name) for name in kept.policies.keys() - found.policies.keys())
                    faults = {name: refusal.reason for name, refusal in found.refusals.items() if refusal.is_fault}
                    seen.refused.update({(kept.name, name): reason for name, reason in faults.items()})
                if found is kept:
                    continue
                self._keep(found)
                if is_live:
                    self._go_on_with(found)
        for line, policy in seen.withdrawn:
            _log.warning("policy withdrawn", extra={"line": line, "policy": policy})
        return PoliciesSeen(sorted(seen.offered), sorted(seen.withdrawn), seen.refused)

    def _go_on_with(self, line: LiveLine) -> None:
        """Serve a line with other policies than before, or refuse it where the one that judged is gone.

        It is not judged by another one: that could pass what this one stops.
        """
        state = self._state
        if line.default_policy in line.policies:
            self._state = replace(state, live={**state.live, line.name: line})
            return
        live = {name: serving for name, serving in state.live.items() if name != line.name}
        not_live = {**state.not_live, line.name: _without_its_policy(line)}
        self._become(replace(state, live=live, not_live=not_live))

    def _end_shadow(self, name: str) -> None:
        if name in self._state.shadows:
            shadows = {known: version for known, version in self._state.shadows.items() if known != name}
            self._state = replace(self._state, shadows=shadows)
            _log.info("shadow off", extra={"bundle": name})

    def _tell_of(self, live: LiveLine) -> None:
        bundle, default = live.bundle, live.policies[live.default_policy].policy
        self._telemetry.line_serves(
            live.name,
            bundle.manifest.version,
            bundle.digest,
            live.default_policy,
            bundle.device,
            live.calibration_for(default),
        )

    def _note(self, bundle: str, lines: tuple[str, ...], state: LineState, reason: str) -> None:
        for line in lines:
            self._telemetry.declare_line(line)
        cards = {line: None if state == "refused" else self._card_of(line, bundle) for line in lines}
        noted = {line: LineStatus(line, bundle, state, reason, None, card) for line, card in cards.items()}
        self._state = replace(self._state, not_live={**self._state.not_live, **noted})

    def _card_of(self, line: str, bundle: str) -> LineCard | None:
        """Return what was told of a line that is not in memory, where the same bundle is to bring it back."""
        before = self._state.not_live.get(line)
        return before.card if before is not None and before.bundle == bundle else None

    def _hold_back_newer(self, name: str, version: str) -> None:
        there = {*self._catalogue.readable_versions(name), *self._catalogue.absent(name)}
        newer = {stored for stored in there if int(stored) > int(version)}
        self._history(name).held_back |= newer

    # From memory.

    def _keep_only_what_is_needed(self, name: str) -> None:
        """Retire the versions of a bundle that are neither live nor kept nor in the shadow."""
        live, shadow = self._history(name).live, self._state.shadows.get(name)
        kept = set(live[-2:] if self._options.keeps_previous else live[-1:])
        if shadow is not None:
            kept.add(shadow.key.version)
        self._retire(key for key in self._state.loaded if key.name == name and key.version not in kept)

    def _retire(self, keys: Iterable[VersionKey]) -> None:
        """Take versions out of what may be asked for; they are closed when their last frame is answered."""
        leaving = set(keys)
        state = self._state
        self._state = replace(
            state, loaded={key: version for key, version in state.loaded.items() if key not in leaving}
        )
        for key in leaving:
            self._used_at.pop(key, None)
            self._retired.append(state.loaded[key])
            self._telemetry.engine_closed(*_running(state.loaded[key]))

    def _make_room_for(self, key: VersionKey) -> None:
        """Unload what has to make room for a version, by what its file promises of its size."""
        if self._options.budget_bytes is None:
            return
        file = self._catalogue.folder(*key) / MODEL_FILE
        try:
            file_bytes = file.stat().st_size
        except OSError:  # whoever loads it says what is wrong
            return
        expected = self._sizes.expect(self._networks.get(key), file_bytes)
        self._unload(make_room(self._residents(key.name), self._options.budget_bytes, expected) or ())

    def _weigh(self, loaded: LoadedVersion, held_before: int | None, closed_before: int) -> None:
        """Have an engine that was just loaded say what that took, where it can be seen."""
        held = self._held_bytes()
        if held is None or held_before is None:
            return
        bundle = loaded.bundle
        network = bundle.manifest.files[MODEL_FILE]
        grown, closed = held - held_before, self._closed_bytes - closed_before
        try:
            file_bytes = (self._catalogue.folder(*loaded.key) / MODEL_FILE).stat().st_size
        except OSError:  # it was removed meanwhile
            file_bytes = bundle.engine.size_bytes
        self._networks[loaded.key] = network
        bundle.engine.size_bytes = self._sizes.learn(network, file_bytes, bundle.engine.size_bytes, grown, closed)

    def _held_bytes(self) -> int | None:
        return held_bytes() if self._options.weighs_engines else None

    def _refuse_too_large(self, loaded: LoadedVersion) -> None:
        """Unload what has to make room for an engine whose size is known by now.

        Raises:
            BundleNotLoaded: if there can't be room.
        """
        if self._options.budget_bytes is None:
            return
        size = loaded.bundle.engine.size_bytes
        leaving = make_room(self._residents(loaded.key.name), self._options.budget_bytes, size)
        if leaving is None:
            raise BundleNotLoaded(
                f"Its engine takes {size} bytes, and the memory budget has no room for it beside what must stay; raise "
                "FLAWLINE_MEMORY_BUDGET_BYTES, or pin fewer lines."
            )
        self._unload(leaving)

    def _residents(self, name: str) -> list[Resident]:
        """Return what is loaded.

        The live version of a bundle stays while another one of it is prepared, and where it could not come back.
        """
        state = self._state
        live = {s.key for s in state.live.values()}
        return [
            Resident(
                key=key,
                size_bytes=version.bundle.engine.size_bytes,
                used_at=self._used_at.get(key, 0.0),
                is_live=key in live,
                is_pinned=(key in live and (key.name == name or self._can_not_come_back(key)))
                or not self._options.pinned.isdisjoint(version.lines),
            )
            for key, version in state.loaded.items()
        ]

    def _can_not_come_back(self, key: VersionKey) -> bool:
        return key in self._gone and not self._catalogue.folder(*key).is_dir()

    def _unload(self, keys: Iterable[VersionKey]) -> None:
        """Unload engines whose lines are loaded again as soon as somebody asks for them."""
        for key in keys:
            state = self._state
            lines = {line: serving for line, serving in state.live.items() if serving.key == key}
            reason = "The line makes room for others; it is loaded as soon as a frame comes."
            absent = {
                line: LineStatus(line, key.name, "unloaded", reason, None, serving.card)
                for line, serving in lines.items()
            }
            live = {line: serving for line, serving in state.live.items() if line not in lines}
            shadows = {name: version for name, version in state.shadows.items() if version.key != key}
            self._become(replace(state, live=live, not_live={**state.not_live, **absent}, shadows=shadows))
            self._retire((key,))
            self._telemetry.engine_unloaded(key.name)
            _log.info("engine unloaded for others", extra=_named(key))

    def _load_again(self, name: str) -> None:
        """Load a bundle again that was unloaded: the body of a thread."""
        try:
            with self._changing:
                lines = self._waiting_for(name)
                if lines:
                    self._note(name, lines, "loading", "The line is loaded again; try again in a moment.")
            self._load_if(lambda: self._absent(name), is_urgent=True)
        finally:
            self._asked_again.discard(name)

    def _waiting_for(self, name: str) -> tuple[str, ...]:
        """Return the lines that wait for a bundle to come back, which is not in memory."""
        live = self._history(name).live
        if not live or VersionKey(name, live[-1]) in self._state.loaded:
            return ()
        there = (status for status in self._state.not_live.values() if status.bundle == name)
        return tuple(status.line for status in there if self.comes_back(status))

    def _absent(self, name: str) -> VersionKey | None:
        """Return the version of a bundle that lines wait for, which is not in memory."""
        return VersionKey(name, self._history(name).live[-1]) if self._waiting_for(name) else None

    def _ask_again(self, name: str) -> None:
        if name in self._asked_again:
            return
        self._asked_again.add(name)
        try:
            threading.Thread(target=self._load_again, args=(name,), name="flawline-load", daemon=True).start()
        except RuntimeError:  # the machine has no thread left now; the next frame asks again
            self._asked_again.discard(name)
            _log.exception("a line can't be loaded again", extra={"bundle": name})

    def _pause_s(self, name: str) -> float:
        history = self._history(name)
        refusal = history.refusals.get(history.live[-1]) if history.live else None
        return 0.0 if refusal is None else max(0.0, refusal.again_at - self._clock())

    def _load_takes_s(self, name: str) -> float:
        return self._history(name).load_s

    def _history(self, name: str) -> History:
        return self._histories.setdefault(name, History())


class PoliciesSeen(NamedTuple):
    """What a look at the policy files has changed for the lines that are served, as line and version.

    Attributes:
        offered: policies that were not offered before.
        withdrawn: policies that are not offered any more.
        refused: files that do not hold, with the reason.
    """

    offered: list[tuple[str, str]]
    withdrawn: list[tuple[str, str]]
    refused: dict[tuple[str, str], str]


def _without_its_policy(live: LiveLine) -> LineStatus:
    """Return how a line stands that is not judged by the policy that was chosen for it, and so by none."""
    refusal = live.refusals.get(live.default_policy)
    reason = (
        f"An administrator chose its policy {live.default_policy}, which is not there or was refused; put the file "
        f"back and load the line, or choose another policy.{'' if refusal is None else ' ' + refusal.reason}"
    )
    _log.error("line refused", extra={"line": live.name, "reason": reason})
    return LineStatus(live.name, live.key.name, "refused", reason, None)


def _may_pass(fault: FlawlineError) -> bool:
    """Tell whether store or machine may be at fault, rather than the bundle."""
    return isinstance(fault, BundleNotLoaded) or not isinstance(fault, BundleRefused)


def _of_the_machine(error: Exception) -> FlawlineError:
    """Say what kept a bundle from being loaded, where nothing is known against it."""
    if lacked_memory(error):
        return BundleNotLoaded(
            "The machine has too little memory to load it; give the process more, lower FLAWLINE_MEMORY_BUDGET_BYTES, "
            "or serve fewer lines here."
        )
    return BundleNotLoaded("Loading failed in a way that nobody foresaw; the log says how.")


def _close(version: LoadedVersion) -> None:
    """Close a version that nobody was ever served by."""
    version.bundle.batcher.close()
    version.bundle.engine.close()


def _running(version: LoadedVersion) -> tuple[str, str, str, str, str]:
    """Return the labels of a version in memory."""
    bundle = version.bundle
    return *version.key, bundle.device, bundle.provider, bundle.precision


def _named(key: VersionKey) -> dict[str, str]:
    return {"bundle": key.name, "version": key.version}
