"""Which version of each bundle should serve: by what was chosen, was refused, and lies in the store.

Decides without doing: what it returns may have changed by the time that it is loaded, so that it is asked again then.
"""

import math
from collections.abc import Sequence

from service.errors import BundleRefused
from service.lines.ledger import History, Ledger, Refusal
from service.lines.live import VersionKey
from service.stores.store import Needed


class WantedVersions(Ledger):
    """The versions that should serve, or be there."""

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
        if self._choices.why_unknown is not None or (self._is_loading and not self._last_live.is_known):
            judging |= self._all_here()  # any of them may be what judged
        in_use = {key for key in judging if any(self._may_judge(key, line) for line in self._catalogue.lines(*key))}
        return Needed(serving, previous, newest_waits=not self._options.activates_newest, in_use=in_use)

    def _all_here(self) -> set[VersionKey]:
        names = self._catalogue.names()
        return {VersionKey(name, version) for name in names for version in self._catalogue.readable_versions(name)}

    def _may_judge(self, key: VersionKey, line: str) -> bool:
        """Tell whether a bundle could judge a line: that is not unloaded, and no other bundle has come to serve it."""
        live = self._state.live.get(line)
        return line not in self._taken_out and (live is None or live.key.name == key.name)

    def _in_use(self) -> set[VersionKey]:
        """Return the versions that lines are judged by, or would be with their next frame."""
        histories = dict(self._histories)
        names = {status.bundle for status in self.statuses() if status.line not in self._taken_out}
        return {VersionKey(name, histories[name].live[-1]) for name in names & histories.keys() if histories[name].live}

    def _begins_with(self, name: str) -> bool:
        """Tell whether a restart would begin with the version that was chosen, rather than with a newer one."""
        known = {*self._catalogue.readable_versions(name), *self._catalogue.absent(name)}
        return self._first(name, sorted(known, key=int)) == self._choices.chosen.versions[name].live

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

    def _before(self, name: str) -> str | None:
        """Return the version that was live before, or the next older one in the store where none was.

        Older than the one that should be live, where none is. What is held back becomes live by its name alone, and
        what is gone from the store not at all.
        """
        history = self._histories.get(name, History())
        if len(history.live) > 1:
            return history.live[-2]
        stored = self._catalogue.readable_versions(name)
        if not history.live and not stored:
            return None
        live = history.live[-1] if history.live else self._first(name, stored)
        there = {*stored, *self._catalogue.absent(name)} - self._catalogue.removed(name) - history.held_back
        older = {version for version in there if int(version) < int(live)}
        return max(older, key=int, default=None)

    def _gone_of(self, name: str) -> set[str]:
        return {key.version for key in self._gone if key.name == name}

    def _refuse_to_guess(self) -> None:
        """Change nothing where nobody knows what administrators chose.

        Raises:
            BundleRefused: if that is so.
        """
        if self._choices.why_unknown is not None:
            raise BundleRefused(self._choices.why_unknown)
