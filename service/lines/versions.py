"""How versions get from the store into memory, and become live there or are refused.

A version is loaded beside whatever is live, by `service/lines/loading.py`, one at a time: whoever loads has a turn of
`_loading`, and an administrator or a frame gets the next one before a look at the store does. Whoever changes something
holds the lock `_changing`, only to decide and to swap, and never while anything is loaded or a store is asked. So what
was decided may be wrong by the time that it is loaded, and is decided again in the moment of the swap: a version that
somebody has stepped back from meanwhile is closed, and does not become live. A turn is taken before the lock.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from service.errors import (
    BundleNotLoaded,
    BundleRefused,
    FlawlineError,
)
from service.heap import lacked_memory
from service.lines.going_live import LiveVersions
from service.lines.ledger import SHORTEST_RETRY_S, Refusal, named
from service.lines.live import LoadedVersion, VersionKey
from service.lines.residence import running

# Of a fault that may pass: each pause is twice the one before, up to this. What never was live is given up after so
# many tries, a quarter of an hour, and waits until it changes.
_LONGEST_PAUSE_S = 300.0
_MOST_TRIES = 10

_log = logging.getLogger("flawline")

_Outcome = TypeVar("_Outcome")


class LoadedVersions(LiveVersions):
    """The versions that were brought into memory, or could not be."""

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
                    _log.info("version not wanted any more", extra=named(key))
                    return {}
                self._go_live(self._take_in(loaded))
                if not self._options.activates_newest:
                    self._choices.begin_with(*key)
        except FlawlineError as error:
            fault = error
        except Exception as error:  # noqa: BLE001 - the edge: one bundle's fault must not keep the others from loading
            _log.exception("loading failed", extra=named(key))
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
        pause_s = min(SHORTEST_RETRY_S * 2 ** min(tries - 1, _MOST_TRIES), _LONGEST_PAUSE_S)
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
        self._loading_since = self._clock()
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
        self._history(key.name).load_s = max(SHORTEST_RETRY_S, takes_s)
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
            _log.error("bundle refused", extra={**named(key), "reason": fault.sentence}, exc_info=trace)
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
        self._telemetry.engine_runs(*running(loaded), size_bytes=loaded.bundle.engine.size_bytes)
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
            if live is not None and live.key.name != name:
                already = f"{live.key.name} serves {line} already"
                if self._catalogue.is_gone(*live.key):
                    raise BundleRefused(f"{already}, though it was removed from the store; unload {line}, and load it.")
                raise BundleRefused(f"{already}; remove one.")
        return wanted

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
