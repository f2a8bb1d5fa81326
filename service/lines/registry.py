"""Which line is served by what, and how that changes while frames come: nothing answers that was not proved here.

The store is `<store>/<name>/<version>/`; the newest version of each name is the live one. A line's own policies are
`<store>/<line>/policies/<version>.json`, beside the default policy that is in the bundle.

A change is prepared beside what is live, by `loading.py`, and becomes true in one assignment: a frame that was
there before is answered by what was live before, one that comes after by the new version. What is replaced is kept for
rolling back, and closed once it is too many and the last of its frames is answered.

What administrators choose is noted by `choices.py` and counts again after a restart, where it could be kept; a
file of choices that does not hold refuses every line.

While an older version is live, a newer one that does not hold changes nothing: the line goes on with what it has, and
log, metric and the list of versions tell of the refusal. A restart changes nothing in that, where a state directory
keeps which version was live before. Where nobody knows, a version that is refused at the start is not replaced by an
older one, which perhaps nobody ever wanted: a silent step back would give verdicts that nobody expects, so the line is
refused, with the sentence that says why, and the service is not ready. Whoever wants the older version removes the
newer one. Nor is it replaced while store or machine may be at fault rather than the version: it is tried again.

A version that is removed from the store is let go of at the next look, but where lines are judged by it: a hand that
slipped in a bucket takes no line out of service. That one serves on until another one is made live or its lines are
unloaded, and log, metric and the list of versions tell of it. Nobody steps back to one that is gone.

A version that somebody stepped back from, on purpose, is held back until somebody asks for it by name. A policy file
that is refused is not offered, and one that is gone is withdrawn; the line goes on with its others, but where the one
that was chosen to judge is gone, it is refused. `policies.py` says which file may judge which bundle.

What changes anything blocks and belongs into a thread; what only reads takes no lock. Looks at the store come one after
another and may take long, for the store as well as for what is loaded. What administrators and frames want does not
wait for them: it comes between two versions, or at once where nothing has to be loaded. `versions.py` says how
that is kept apart, and how versions get in and out of memory; `served.py` is what readers see.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from service.errors import (
    BundleRefused,
    LineNotCalibrated,
    StoreUnreachable,
    UnknownBundle,
    UnknownLine,
    UnknownVersion,
)
from service.heap import give_back
from service.lines.live import (
    NOT_CALIBRATED,
    LineStatus,
    LiveLine,
    LoadedVersion,
    VersionKey,
    VersionState,
    VersionStatus,
)
from service.lines.served import State
from service.lines.versions import History, LoadedVersions, Refusal
from service.stores.store import Needed

_GONE = "It was removed from the store and serves on; put it back, or activate another version."
_TAKEN_OUT = "It was unloaded by an administrator; load it again."
_ENDED_EARLY = "Loading ended early, in a way that nobody foresaw; the log says how."

_log = logging.getLogger("flawline")


@dataclass(frozen=True)
class Rescanned:
    """What looking at the store has changed.

    Attributes:
        activated: versions that became live.
        refused: versions that did not, with the reason.
        policies: new policies, as line and version.
        withdrawn: policies that are offered no more, as line and version.
        refused_policies: files of lines that are served which do not hold, with the reason, however often they were
            looked at.
    """

    activated: tuple[VersionKey, ...]
    refused: Mapping[VersionKey, str]
    policies: tuple[tuple[str, str], ...]
    withdrawn: tuple[tuple[str, str], ...]
    refused_policies: Mapping[tuple[str, str], str]


class Registry(LoadedVersions):
    """The lines of one store; see `LoadedVersions` for what it is made of."""

    # What callers ask.

    def versions(self, line: str) -> list[VersionStatus]:
        """Return the versions of a line's bundle, oldest first.

        Raises:
            UnknownLine: if there is no such line.
            LineNotReady: if that can't be told before everything is loaded.
        """
        return self.versions_of(self.status(line).bundle)

    def versions_of(self, name: str) -> list[VersionStatus]:
        """Return the versions of a bundle that are loaded or lie in the store, oldest first."""
        state = self._state
        loaded = {key.version: version for key, version in state.loaded.items() if key.name == name}
        history = self._histories.get(name, History())
        stored = self._catalogue.readable_versions(name)
        return [
            VersionStatus(
                version,
                self._version_state(VersionKey(name, version), state, history),
                self._why_version(VersionKey(name, version), loaded.get(version), history),
                self._lines_of(name, version, loaded.get(version)),
                loaded[version].bundle.engine.size_bytes if version in loaded else None,
                version in history.held_back,
            )
            for version in sorted({*stored, *loaded}, key=int)
        ]

    def names(self) -> list[str]:
        """Return the bundles that serve lines, or mean to."""
        return sorted({status.bundle for status in self.statuses()})

    def lines_of(self, name: str) -> tuple[str, ...]:
        """Return the lines that a bundle serves or means to, as far as is known without loading anything.

        Raises:
            UnknownBundle: if there is no such bundle.
        """
        lines = tuple(status.line for status in self.statuses() if status.bundle == name)
        if not lines:
            raise UnknownBundle("There is no such bundle; GET /v1/bundles lists them.")
        return lines

    @property
    def why_forgotten(self) -> str | None:
        """Why something that administrators chose would not survive a restart; None where all would."""
        return self._choices.why_forgotten

    @property
    def why_empty(self) -> str:
        """Why no line is served, where none is even known."""
        known = self._catalogue.why_stale or self._catalogue.why_unreadable or self._fault
        return known or "No line is loaded; the store may be empty."

    @property
    def live_in_store(self) -> Mapping[str, bool]:
        """Whether the version that judges lies in the store, as the last look found, by bundle whose lines are served.

        Those included that made room for others.
        """
        return {key.name: key not in self._gone for key in self._in_use()}

    @property
    def is_ready(self) -> bool:
        """Whether at least one line is served, and none of those that should be is missing.

        A line that made room for others is served: a frame brings it back, and while that takes its time. One that was
        refused when it came to the store later is told of, and takes no other line down.
        """
        missed = [status for status in self.statuses() if status.line not in self._late or status.live is not None]
        # Not whether the store can be read now: what is loaded needs it no longer.
        is_whole = not self._is_loading and not self._is_unfinished
        is_served = any(status.state == "ready" or self.comes_back(status) for status in missed)
        return is_whole and is_served and {status.state for status in missed} <= {"ready", "unloaded", "loading"}

    # What changes something: in a thread.

    def load(self) -> None:
        """Load every wanted line of the store; whatever is wrong with a bundle refuses its lines and no others."""
        try:
            with self._looking:
                with self._changing:
                    self._recall()
                self._ask_store()
                self._load_all()
                self._let_go_of_gone()
        except Exception:  # noqa: BLE001 - the edge of this thread: whoever asks must hear that loading has ended
            self._fault = _ENDED_EARLY
            _log.exception("loading ended early")
        finally:
            give_back()
            self._is_loading = False

    def rescan(self) -> Rescanned:
        """Ask the store for what is new: versions become live, policies are offered, and withdrawn where they are gone.

        Raises:
            StoreUnreachable: if it can't be asked; nothing has changed then.
            BundleRefused: if nobody knows what administrators chose.
        """
        with self._looking:
            self._refuse_to_guess()
            if not self._ask_store():
                raise StoreUnreachable(self._catalogue.why_stale or "The store can't be asked.")
            refused = self._load_late() if self._is_unfinished else self._load_new()
            activated = tuple(key for key, reason in refused.items() if reason is None)
            if refused:
                give_back()
            reasons = {key: reason for key, reason in refused.items() if reason is not None} | self._left_out()
            self._let_go_of_gone()
            with self._changing:
                seen = self._look_at_policies()
            return Rescanned(activated, reasons, tuple(seen.offered), tuple(seen.withdrawn), seen.refused)

    def try_again(self) -> None:
        """Load what store or machine kept from being loaded, where it is time; nothing else is looked for.

        Neither a frame nor an administrator has to ask: a pod that is not ready gets no frames.
        """
        with self._looking:
            if self._is_unfinished:
                loaded = self._load_late() if self._ask_store() else {}
            else:
                names = list(self._histories)
                loaded = self._load_each(names, lambda name: self._overdue(name) or self._as_before(name))
            if loaded:
                give_back()

    def activate(self, name: str, version: str) -> None:
        """Make a version live, after it was proved; newer ones no longer become live by themselves.

        Raises:
            UnknownVersion: if the store has no such version.
            StoreUnreachable: if the store can't be read now.
            BundleRefused: if it does not hold; nothing has changed then.
            EngineFailed: if the device does not take it; nothing has changed then.
        """

        def choose() -> VersionKey:
            self._refuse_to_guess()
            return self._stored(name, version)

        def use(loaded: LoadedVersion) -> None:
            self._go_live(loaded)
            self._hold_back_newer(name, version)
            self._choices.choose_version(name, version, self._history(name).held_back)

        with self._called_for(name, version):
            self._bring(choose, use)

    def roll_back(self, name: str) -> str:
        """Make the version live that was live before, or the next older one in the store where none was.

        Returns:
            The version that is live now.

        Raises:
            UnknownVersion: if there is none.
            StoreUnreachable: if the store can't be read now.
            BundleRefused: if it does not hold any more; nothing has changed then.
            EngineFailed: if the device does not take it; nothing has changed then.
        """

        def choose() -> VersionKey:
            self._refuse_to_guess()
            before = self._before(name)
            if before is None:
                self._demand_a_readable_store()
                raise UnknownVersion("There is no version before this one.")
            return self._stored(name, before)

        def use(loaded: LoadedVersion) -> str:
            before, history = loaded.key.version, self._history(name)
            left = history.live[-1] if history.live else None
            self._go_live(loaded)
            if left is not None:
                history.live = [version for version in history.live if version not in (left, before)] + [before]
                self._keep_only_what_is_needed(name)
            self._hold_back_newer(name, before)
            self._choices.choose_version(name, before, self._history(name).held_back)
            return before

        with self._called_for(name, self._before(name)):
            return self._bring(choose, use)

    def start_shadow(self, name: str, version: str) -> None:
        """Load a version that looks at the frames of the live one and answers nobody.

        Raises:
            UnknownVersion: if the store has no such version, or it is the live one.
            StoreUnreachable: if the store can't be read now.
            BundleRefused: if it does not hold.
            EngineFailed: if the device does not take it.
            LineNotCalibrated: if it could give no verdict on any of its lines.
        """

        def choose() -> VersionKey:
            self._refuse_to_guess()
            key = self._stored(name, version)
            if self._history(name).live[-1:] == [version]:
                raise UnknownVersion("This version is live; a shadow is another one.")
            return key

        def use(shadow: LoadedVersion) -> None:
            if not any(line.gives_verdicts for line in shadow.lines.values()):
                self._keep_only_what_is_needed(name)
                raise LineNotCalibrated(NOT_CALIBRATED)
            self._state = replace(self._state, shadows={**self._state.shadows, name: shadow})
            self._keep_only_what_is_needed(name)
            _log.info("shadow on", extra={"bundle": name, "version": version})

        with self._called_for(name, version):
            self._bring(choose, use)

    def stop_shadow(self, name: str) -> None:
        """Try no version beside the live one any more."""
        with self._changing:
            self._end_shadow(name)
            self._keep_only_what_is_needed(name)

    def activate_policy(self, line: str, version: str) -> None:
        """Judge a line by another of its policies while this version of its bundle is live.

        Raises:
            UnknownLine: if there is no such line.
            UnknownPolicy: if the line has no such policy, or it was written for another network's scores.
            BundleRefused: if its file was changed since it was offered first.
            LineNotReady: if the line is not served.
            LineNotCalibrated: if the policy needs a calibration and the line has none.
        """
        with self._changing:
            self._refuse_to_guess()
            serving = self._loader.with_policies_of_store(self._loaded_line(line))
            policy = serving.policy(version)
            if version in serving.refusals and version != serving.own_policy:
                raise BundleRefused(serving.refusals[version].reason)
            if not serving.may_be_judged_by(policy):
                raise LineNotCalibrated(NOT_CALIBRATED)
            self._replace_line(replace(serving, default_policy=version))
            self._choices.choose_policy(line, *serving.key, version)

    def load_line(self, line: str) -> None:
        """Serve a line again that was unloaded; one that is served takes the newest version that may become live.

        Raises:
            UnknownLine: if the store has no such line.
            StoreUnreachable: if the store can't be read now.
            BundleRefused: if its bundle does not hold; nothing has changed then.
            EngineFailed: if the device does not take it; nothing has changed then.
        """

        def choose() -> VersionKey:
            name = self._bundle_of(line)
            live = self._history(name).live
            key = self._newer(name, asks_again=True) or (VersionKey(name, live[-1]) if live else None)
            if key is None:
                raise UnknownLine("There is no bundle of this line in the store.")
            return key

        def use(loaded: LoadedVersion) -> None:
            if line not in loaded.lines:
                name, version = loaded.key
                raise UnknownLine(f"Version {version} of {name} does not serve this line; activate one that does.")
            self._taken_out.discard(line)
            self._go_live(loaded)
            self._choices.load(line)

        self._refuse_to_guess()
        self._ask_store()
        self._bring(choose, use)

    def unload_line(self, line: str) -> None:
        """Serve a line no longer, until it is loaded again; its engine goes with the last line that uses it.

        Raises:
            UnknownLine: if there is no such line.
        """
        with self._changing:
            self._refuse_to_guess()
            name = self.status(line).bundle
            self._taken_out.add(line)
            self._choices.unload(line)
            state = self._state
            live = {known: serving for known, serving in state.live.items() if known != line}
            status = LineStatus(line, name, "unloaded", _TAKEN_OUT, None)
            self._become(replace(state, live=live, not_live={**state.not_live, line: status}))
            if not any(serving.bundle.manifest.name == name for serving in live.values()):
                self._end_shadow(name)
                self._retire(key for key in state.loaded if key.name == name)
            _log.info("line unloaded", extra={"line": line})

    # The store.

    def _ask_store(self) -> bool:
        with self._asking:
            if self._catalogue.refresh(self._needed()):
                self._hidden.intersection_update(self._catalogue.names())
                if not self._hidden:
                    self._telemetry.store_read()
                return True
            self._telemetry.store_unreachable()
            return False

    def _needed(self) -> Needed:
        """Return what a store that has no room for all must have here: also what a restart would begin with."""
        chosen = self._choices.chosen.versions
        histories = dict(self._histories)
        live = {name: history.live[-1] for name, history in histories.items() if history.live}
        began_with = {name: version.live for name, version in chosen.items() if self._begins_with(name)}
        # What was live before this start counts as in use until something else is live.
        judging = {VersionKey(*key) for key in {**self._last_live.versions, **began_with, **live}.items()}
        serving = judging | {VersionKey(*key) for key in (*began_with.items(), *self._last_live.versions.items())}
        serving |= {shadow.key for shadow in self._state.shadows.values()}
        serving |= set(self._called)
        if self._loading_now is not None:
            serving.add(self._loading_now)
        befores = ((name, self._before(name)) for name in histories.keys() | chosen.keys())
        previous = {VersionKey(name, before) for name, before in befores if before is not None}
        in_use = {key for key in judging if not self._taken_out.issuperset(self._catalogue.lines(*key))}
        return Needed(serving, previous, newest_waits=not self._options.activates_newest, in_use=in_use)

    def _in_use(self) -> set[VersionKey]:
        """Return the versions that lines are judged by, or would be with their next frame."""
        histories = dict(self._histories)
        names = {status.bundle for status in self.statuses() if status.line not in self._taken_out}
        return {VersionKey(name, histories[name].live[-1]) for name in names & histories.keys() if histories[name].live}

    def _let_go_of_gone(self) -> None:
        """Have nobody served by what the store has no longer, but for what lines are judged by: that is told."""
        were_live = {VersionKey(name, one) for name, history in [*self._histories.items()] for one in history.live}
        gone = {key for key in were_live.union(self._state.loaded) if self._catalogue.is_gone(*key)}
        is_empty = not self._catalogue.names()  # rather a volume that is away than everything revoked
        with self._changing:
            in_use = self._in_use()
            for key in () if is_empty else sorted(gone - in_use):
                self._let_go_of(key)
            for key in sorted((gone & in_use) - self._gone):
                named = {"bundle": key.name, "version": key.version}
                _log.error("the live version is gone from the store", extra={**named, "reason": _GONE})
            self._gone = frozenset(gone & in_use)

    def _let_go_of(self, key: VersionKey) -> None:
        history, shadow = self._history(key.name), self._state.shadows.get(key.name)
        history.live = [version for version in history.live if version != key.version]
        if shadow is not None and shadow.key == key:
            self._end_shadow(key.name)
        if key in self._state.loaded:
            self._retire((key,))
            _log.warning("a version is gone from the store", extra={"bundle": key.name, "version": key.version})

    def _begins_with(self, name: str) -> bool:
        """Tell whether a restart would begin with the version that was chosen, rather than with a newer one."""
        known = {*self._catalogue.readable_versions(name), *self._catalogue.absent(name)}
        return self._first(name, sorted(known, key=int)) == self._choices.chosen.versions[name].live

    def _left_out(self) -> dict[VersionKey, str]:
        """Return the versions that would become live and could not be brought from the store; each is counted once."""
        found: dict[VersionKey, str] = {}
        for name in self._catalogue.names_elsewhere():
            absent, history = self._catalogue.absent(name), self._history(name)
            newest = max((*absent, *self._catalogue.readable_versions(name)), key=int)
            live = history.live[-1] if history.live else "0"
            waits = newest in history.held_back or (history.live and not self._options.activates_newest)
            if newest in absent and int(newest) > int(live) and not waits:
                found[VersionKey(name, newest)] = absent[newest]
        for key, reason in found.items():
            if self._told_left_out.get(key) != reason:
                self._telemetry.version_refused(key.name)
                _log.error(
                    "a version can't be brought", extra={"bundle": key.name, "version": key.version, "reason": reason}
                )
        self._told_left_out = found
        return found

    @contextmanager
    def _called_for(self, name: str, version: str | None) -> Iterator[None]:
        """Have the store bring a version that is not here, and keep it inside of the block."""
        if version is None:
            yield
            return
        key = VersionKey(name, version)
        self._called.append(key)
        try:
            if key not in self._state.loaded and version not in self._catalogue.readable_versions(name):
                self._ask_store()  # what became of it is told by whoever looks for it
            yield
        finally:
            self._called.remove(key)

    def _load_all(self) -> dict[VersionKey, str | None]:
        """Load what is to begin with, and return each version with why it was refused, or None."""
        with self._changing:
            first = {name: VersionKey(name, version) for name, version in self._scan()}
        loaded = self._load_each(list(first), lambda name: None if self._history(name).live else first[name])
        loaded |= self._load_each(list(first), self._as_before)
        if not self.statuses():
            _log.error("no line is served", extra={"reason": self.why_empty})
        return loaded

    def _load_late(self) -> dict[VersionKey, str | None]:
        """Begin anew where the start could not be finished: all lines of the store are missed until they serve."""
        self._is_loading = True
        try:
            loaded = self._load_all()
        except Exception:
            self._fault = _ENDED_EARLY
            raise
        else:
            self._fault = None
            return loaded
        finally:
            self._is_loading = False

    @property
    def _is_unfinished(self) -> bool:
        """Whether the store could not be read at the start, or loading ended early."""
        return not self._has_scanned or self._fault is not None

    def _load_new(self) -> dict[VersionKey, str | None]:
        """Load what has come since, and return each version with why it was refused, or None."""
        readable = [name for name in self._catalogue.names() if self._can_be_looked_into(name)]
        return self._load_each(readable, lambda name: self._newer(name) or self._lost(name) or self._as_before(name))

    def _load_each(
        self, names: Iterable[str], choose: Callable[[str], VersionKey | None]
    ) -> dict[VersionKey, str | None]:
        """Load a version of each bundle but where its lines are all taken out; others may change something between."""

        def chosen(name: str) -> VersionKey | None:
            key = choose(name)
            return None if key is None or self._taken_out.issuperset(self._catalogue.lines(*key)) else key

        found: dict[VersionKey, str | None] = {}
        for name in names:
            found |= self._load_if(partial(chosen, name))
        return found

    def _can_be_looked_into(self, name: str) -> bool:
        """Tell whether new versions of a bundle would be found; what hides them is counted, and logged once."""
        try:
            self._catalogue.versions(name)
        except OSError as error:
            self._telemetry.store_unreachable()
            if name not in self._hidden:
                self._hidden.add(name)
                _log.error("a folder of the store can't be read", extra={"bundle": name, "reason": error.strerror})
            return False
        if name in self._hidden:
            self._hidden.discard(name)
            if not self._hidden:
                self._telemetry.store_read()
        return True

    def _scan(self) -> list[tuple[str, str]]:
        """Find the newest version of each name, and say that its lines are loading."""
        candidates = []
        names = self._catalogue.names()
        self._has_scanned = self._catalogue.why_unreadable is None
        known: set[str] = set()
        for name in names:
            try:
                versions = self._catalogue.versions(name)
            except OSError as error:
                _log.exception("a folder of the store can't be read", extra={"bundle": name})
                self._hidden.add(name)
                self._telemetry.store_unreachable()
                lines = self._catalogue.wanted_of((name,))
                self._refuse(name, self._without_live(lines), f"Its folder can't be read: {error.strerror}.")
                known.update(lines)
                continue
            first = self._first(name, versions) if versions else ""
            self._tell_of_step_back(name, first)
            lines = self._catalogue.lines(name, first if first in versions else versions[-1]) if versions else ()
            out = tuple(line for line in lines if line in self._taken_out)
            self._note(name, out, "unloaded", _TAKEN_OUT)
            known.update(lines)
            lines = self._without_live(line for line in lines if line not in out)
            if lines and self._choices.why_unknown is not None:
                self._refuse(name, lines, self._choices.why_unknown)
            elif lines and first not in versions:
                self._refuse(name, lines, self._why_chosen_is_missing(name, first))
            elif lines and not self._history(name).live:
                candidates.append((name, first))
                self._note(name, lines, "loading", "The line is loading; try again in a moment.")
        why_missing = self._catalogue.why_unreadable or "There is no bundle of this line in the store."
        for missing in sorted((self._wanted or frozenset()) - known - self._state.live.keys()):
            absent = self._catalogue.absent(missing)
            newest = max(absent, key=int, default=None)
            why = (
                why_missing
                if newest is None
                else f"Version {newest} could not be brought from the store. {absent[newest]}"
            )
            self._refuse(missing, (missing,), why)
        self._left_out()
        return candidates

    def _tell_of_step_back(self, name: str, first: str) -> None:
        """Log where a start takes an older version than was live before, because the store has that no longer."""
        before = self._last_live.versions.get(name)
        if before is not None and first and int(first) < int(before) and self._catalogue.is_gone(name, before):
            reason = f"Version {before}, which was live before, is gone from the store."
            _log.warning("an older version is taken", extra={"bundle": name, "version": first, "reason": reason})

    def _why_chosen_is_missing(self, name: str, version: str) -> str:
        chosen = f"An administrator chose version {version}"
        why = self._catalogue.absent(name).get(version) or self._catalogue.why_stale
        if why is not None:
            return f"{chosen}, which could not be brought from the store. {why}"
        return f"{chosen}, which is not in the store; put it back, or activate another one."

    def _refuse(self, name: str, lines: tuple[str, ...], reason: str) -> None:
        """Refuse lines before anything of them is loaded, and log why."""
        self._note(name, lines, "refused", reason)
        for line in lines:
            _log.error("line refused", extra={"line": line, "reason": reason})

    def _stored(self, name: str, version: str) -> VersionKey:
        key = VersionKey(name, version)
        if key not in self._state.loaded and version not in self._catalogue.readable_versions(name):
            self._demand_a_readable_store()
            why = self._catalogue.absent(name).get(version)
            if why is not None:
                raise StoreUnreachable(f"Version {version} could not be brought from the store. {why}")
            raise UnknownVersion("The store has no such version of this bundle.")
        return key

    def _demand_a_readable_store(self) -> None:
        """Say of nothing that it is not in the store while nobody can look.

        Raises:
            StoreUnreachable: if that is so.
        """
        if not self._catalogue.names() and self._catalogue.why_unreadable is not None:
            raise StoreUnreachable(self._catalogue.why_unreadable)

    def _newer(self, name: str, *, asks_again: bool = False) -> VersionKey | None:
        """Return the newest version where it should become live: not held back, and not refused as it is."""
        stored = self._catalogue.readable_versions(name)
        history = self._history(name)
        live = history.live[-1] if history.live else None
        newest = (stored[-1] if live is not None else self._first(name, stored)) if stored else ""
        if newest not in stored or not self._catalogue.lines(name, newest):
            return None
        if live is not None and (int(newest) <= int(live) or newest in history.held_back):
            return None
        if live is not None and not self._options.activates_newest:
            return None
        key = VersionKey(name, newest)
        return key if asks_again or self._may_be_tried(key) else None

    def _lost(self, name: str) -> VersionKey | None:
        """Return the version that was live, made room for others and could not come back, where it may be tried."""
        history = self._history(name)
        if not history.live or history.live[-1] not in history.refusals:
            return None
        key = VersionKey(name, history.live[-1])
        return key if key not in self._state.loaded and self._may_be_tried(key) else None

    def _may_be_tried(self, key: VersionKey) -> bool:
        """Tell whether a version was not refused, or has changed since, or whether its fault may have passed."""
        refusal = self._history(key.name).refusals.get(key.version)
        return refusal is None or self._is_overdue(refusal) or refusal.looks != self._catalogue.looks(*key)

    def _without_live(self, lines: Iterable[str]) -> tuple[str, ...]:
        """Return those that nothing serves: a start that is begun anew takes nothing from what it has reached."""
        return tuple(line for line in lines if line not in self._state.live)

    def _is_overdue(self, refusal: Refusal) -> bool:
        return refusal.again_at <= self._clock()

    def _overdue(self, name: str) -> VersionKey | None:
        """Return the version of a bundle that should serve and does not, where its fault may have passed by now."""
        history = self._history(name)
        if history.live:
            return self._lost(name)
        due = {version for version, refusal in history.refusals.items() if self._is_overdue(refusal)}
        stored = self._catalogue.readable_versions(name) if due else []
        wanted = self._first(name, stored) if stored else ""
        return VersionKey(name, wanted) if wanted in due else None

    def _as_before(self, name: str) -> VersionKey | None:
        """Return the version that was live before the start, where the one to begin with was refused for good."""
        history, version = self._history(name), self._last_live.versions.get(name)
        if history.live or version is None or version in history.held_back:
            return None
        stored = self._catalogue.readable_versions(name)
        refusal = history.refusals.get(self._first(name, stored)) if version in stored else None
        if refusal is None or refusal.again_at < math.inf:
            return None
        key = VersionKey(name, version)
        return key if self._may_be_tried(key) else None

    def _first(self, name: str, stored: Sequence[str]) -> str:
        """Return the version to begin with: what an administrator chose, or the newest one that is not held back."""
        chosen = self._choices.chosen.versions.get(name)
        if chosen is None:
            return stored[-1]
        newer = [version for version in stored if int(version) > int(chosen.live) and version not in chosen.held_back]
        return newer[-1] if newer and self._options.activates_newest else chosen.live

    def _recall(self) -> None:
        """Take over what administrators chose before this start."""
        if not self._options.activates_newest and self._options.state_directory is None:
            _log.warning("versions wait for an administrator, and without a state directory a restart does not")
        self._choices.recall()
        chosen = self._choices.chosen
        self._taken_out |= set(chosen.unloaded)
        for name, version in chosen.versions.items():
            self._history(name).held_back |= set(version.held_back)
        self._last_live.recall()  # in the end: where it ends early, what was chosen counts all the same

    def _refuse_to_guess(self) -> None:
        """Change nothing where nobody knows what administrators chose.

        Raises:
            BundleRefused: if that is so.
        """
        if self._choices.why_unknown is not None:
            raise BundleRefused(self._choices.why_unknown)

    def _loaded_line(self, line: str) -> LiveLine:
        """Return what serves a line, or would but for its policy.

        Raises:
            UnknownLine: if there is no such line.
            LineNotReady: if it is not served for another reason.
        """
        state = self._state
        if line not in state.live and line in state.not_live and line not in self._taken_out:
            name = state.not_live[line].bundle
            live = self._history(name).live
            version = state.loaded.get(VersionKey(name, live[-1])) if live else None
            if version is not None and line in version.lines:
                return version.lines[line]
        return self.serving(line, None)

    def _before(self, name: str) -> str | None:
        """Return the version that was live before, or the next older one in the store where none was.

        Older than the one that should be live, where none is.
        """
        history = self._histories.get(name, History())
        if len(history.live) > 1:
            return history.live[-2]
        stored = self._catalogue.readable_versions(name)
        if not history.live and not stored:
            return None
        live = history.live[-1] if history.live else self._first(name, stored)
        older = {version for version in (*stored, *self._catalogue.absent(name)) if int(version) < int(live)}
        return max(older, key=int, default=None)

    def _bundle_of(self, line: str) -> str:
        """Return the name of the bundle that serves a line, or would if it were loaded."""
        state = self._state
        if line in state.live:
            return state.live[line].bundle.manifest.name
        name = state.not_live[line].bundle if line in state.not_live else self._catalogue.bundle_of(line)
        if name is None:
            self._demand_a_readable_store()
            raise UnknownLine("There is no bundle of this line in the store.")
        return name

    def _lines_of(self, name: str, version: str, loaded: LoadedVersion | None) -> tuple[str, ...]:
        if loaded is not None:
            return tuple(loaded.lines)
        return self._catalogue.lines(name, version)

    # What is told.

    def _why_version(self, key: VersionKey, loaded: LoadedVersion | None, history: History) -> str | None:
        if loaded is not None and loaded.bundle.batcher.why_unhealthy is not None:
            return loaded.bundle.batcher.why_unhealthy
        if key in self._gone:
            return _GONE
        is_refused = loaded is None and key.version in history.refusals
        return history.refusals[key.version].reason if is_refused else None

    def _version_state(self, key: VersionKey, state: State, history: History) -> VersionState:
        if key in state.loaded:
            shadow = state.shadows.get(key.name)
            if any(serving.key == key for serving in state.live.values()):
                return "live"
            return "shadow" if shadow is not None and shadow.key == key else "kept"
        if key == self._loading_now:
            return "loading"
        return "refused" if key.version in history.refusals else "stored"
