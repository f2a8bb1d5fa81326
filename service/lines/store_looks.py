"""What comes from the store: looks at it, one after another, and what each of them has changed.

A look may take long, for the store as well as for what is loaded, and keeps neither frames nor administrators waiting.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from service.errors import StoreUnreachable
from service.heap import give_back
from service.lines.ledger import GONE, GONE_MEANWHILE, TAKEN_OUT, named
from service.lines.live import VersionKey
from service.lines.versions import LoadedVersions

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
        gone: live versions that the store has no longer, with what is to be done; they serve on, where they are in
            memory or can come back.
    """

    activated: tuple[VersionKey, ...]
    refused: Mapping[VersionKey, str]
    policies: tuple[tuple[str, str], ...]
    withdrawn: tuple[tuple[str, str], ...]
    refused_policies: Mapping[tuple[str, str], str]
    gone: Mapping[VersionKey, str]


class StoreLooks(LoadedVersions):
    """The versions that were found in the store."""

    # What callers ask.

    @property
    def why_empty(self) -> str:
        """Why no line is served, where none is even known."""
        known = self._catalogue.why_stale or self._catalogue.why_unreadable or self._fault
        return known or "No line is loaded; the store may be empty."

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
            gone = {key: self._why_gone(key) for key in sorted(self._gone)}
            return Rescanned(activated, reasons, tuple(seen.offered), tuple(seen.withdrawn), seen.refused, gone)

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

    # What a look does.

    def _ask_store(self) -> bool:
        with self._asking:
            if self._catalogue.refresh(self._needed()):
                self._hidden.intersection_update(self._catalogue.names())
                if not self._hidden:
                    self._telemetry.store_read()
                return True
            self._telemetry.store_unreachable()
            return False

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
                told = {**named(key), "reason": self._why_gone(key)}
                _log.error("the live version is gone from the store", extra=told)
            self._gone = frozenset(gone & in_use)

    def _why_gone(self, key: VersionKey) -> str:
        return GONE if key in self._state.loaded or self._catalogue.is_here(*key) else GONE_MEANWHILE

    def _let_go_of(self, key: VersionKey) -> None:
        history, shadow = self._history(key.name), self._state.shadows.get(key.name)
        # Where it was to serve, what its lines come back by is decided as at a start: no look steps back.
        was_last = history.live[-1:] == [key.version]
        history.live = [] if was_last else [version for version in history.live if version != key.version]
        if shadow is not None and shadow.key == key:
            self._end_shadow(key.name)
        if key in self._state.loaded:
            self._retire((key,))
            _log.warning("a version is gone from the store", extra=named(key))

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
            self._note(name, out, "unloaded", TAKEN_OUT)
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

    def _without_live(self, lines: Iterable[str]) -> tuple[str, ...]:
        """Return those that nothing serves: a start that is begun anew takes nothing from what it has reached."""
        return tuple(line for line in lines if line not in self._state.live)

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
