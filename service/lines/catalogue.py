"""What lies in the store, and what each of it promises; nothing is verified or loaded here.

A folder that can't be read, or a store that can't be asked, never ends a look: it is said, and the rest is listed.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from service.contract.bundle import LINE_NAME, promised_lines, versions_of
from service.errors import StoreUnreachable
from service.stores.store import NOTHING, Needed, Store

_log = logging.getLogger("flawline")


class Catalogue:
    """Bundles of a store, by name and version.

    Args:
        store: to look into.
        wanted: lines that should be served; None means every one.

    Attributes:
        why_unreadable: why the store's directory can't be read, in a sentence.
        why_stale: why the store could not be asked for what is new, in a sentence.
    """

    def __init__(self, store: Store, wanted: frozenset[str] | None) -> None:
        self._store = store
        self._wanted = wanted
        self.why_unreadable: str | None = None
        self.why_stale: str | None = None

    def refresh(self, needed: Needed = NOTHING) -> bool:
        """Have the store bring what is new, and say whether it could; else what it brought before is what there is.

        Args:
            needed: what comes first, and stays, where the store has no room for all.
        """
        try:
            self._store.refresh(needed)
        except StoreUnreachable as error:
            if error.sentence != self.why_stale:  # said once, however often the store is asked
                _log.exception("the store can't be asked", extra={"reason": error.sentence})
            self.why_stale = error.sentence
            return False
        if self.why_stale is not None:
            _log.info("the store can be asked again")
        self.why_stale = None
        return True

    def names(self) -> list[str]:
        """List what may be names of bundles; a volume has folders of its own, which may not even be looked into."""
        try:
            names = sorted(e.name for e in self._store.directory.iterdir() if re.fullmatch(LINE_NAME, e.name))
        except OSError as error:
            reason = f"The store can't be read: {error.strerror}."
            if reason not in (self.why_unreadable, self.why_stale):
                _log.exception("the store can't be read", extra={"store": str(self._store.directory)})
            self.why_unreadable = reason
            return []
        self.why_unreadable = None
        return names

    def folder(self, name: str, version: str) -> Path:
        """Return where a version lies, or would."""
        return self._store.directory / name / version

    def versions(self, name: str) -> list[str]:
        """Return the versions of a name, oldest first.

        Raises:
            OSError: if its folder can't be read.
        """
        return versions_of(self._store.directory / name) if re.fullmatch(LINE_NAME, name) else []

    def readable_versions(self, name: str) -> list[str]:
        """Return the versions of a name, oldest first; none where its folder can't be read."""
        try:
            return self.versions(name)
        except OSError:  # whoever loads it says what is wrong
            return []

    def absent(self, name: str) -> Mapping[str, str]:
        """Return the versions of a name that the store has but could not bring here, each with why, in a sentence."""
        return {version: why for (known, version), why in self._store.absent().items() if known == name}

    def removed(self, name: str) -> set[str]:
        """Return the versions of a name that lie in the directory and in the store no longer."""
        return {version for known, version in self._store.gone() if known == name}

    def is_gone(self, name: str, version: str) -> bool:
        """Tell whether the store has a version no longer; False where nobody can tell, as while it can't be read."""
        if (name, version) in self._store.gone():
            return True
        if self.why_stale is not None or (not self.names() and self.why_unreadable is not None):
            return False
        try:
            return version not in self.versions(name) and version not in self.absent(name)
        except OSError:
            return False

    def is_here(self, name: str, version: str) -> bool:
        """Tell whether a version lies in the directory now, as far as anybody can look; asked at each call."""
        try:
            return self.folder(name, version).is_dir()
        except OSError:
            return False

    def names_elsewhere(self) -> set[str]:
        """Return the names of which the store has versions that it could not bring here."""
        return {name for name, _ in self._store.absent()}

    def lines(self, name: str, version: str) -> tuple[str, ...]:
        """Return the wanted lines that a version means to serve."""
        return self.wanted_of(promised_lines(self.folder(name, version), name))

    def wanted_of(self, lines: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of some lines that should be served."""
        return tuple(line for line in lines if self._wanted is None or line in self._wanted)

    def bundle_of(self, line: str) -> str | None:
        """Return the name whose newest version means to serve a line; None where there is none."""
        for name in self.names():
            stored = self.readable_versions(name)
            if stored and line in self.lines(name, stored[-1]):
                return name
        return None

    def looks(self, name: str, version: str) -> object:
        """Return what a version's files look like from outside, to tell whether somebody has changed them."""
        folder = self.folder(name, version)
        try:
            return sorted((path.as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*"))
        except OSError:
            return None
