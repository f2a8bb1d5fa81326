"""Where bundles come from: what the registry asks of a store. It only ever reads a local directory.

A store that lies elsewhere mirrors complete versions into that directory; what is in it is not trusted for that: every
bundle is verified when it is loaded, wherever it came from.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol


class Needed(NamedTuple):
    """What must not be missing where a store can't bring everything, as names and versions of bundles.

    Attributes:
        serving: what serves or was chosen to, and what somebody asks for; never given up for anything else.
        previous: what rolling back would take.
        newest_waits: whether newest versions come after what rolling back would take, because they become live only
            when somebody asks for them.
        in_use: of `serving`, what lines are judged by, or would be after a restart. That is not given up either where
            the store has it no longer: whoever removed it by accident must not have taken lines out of service.
    """

    serving: Collection[tuple[str, str]] = ()
    previous: Collection[tuple[str, str]] = ()
    newest_waits: bool = False
    in_use: Collection[tuple[str, str]] = ()


NOTHING = Needed()


class Store(Protocol):
    """Bundles and policies as `<name>/<version>/` and `<line>/policies/<version>.json` in a local directory.

    Attributes:
        directory: to be read; it may not be there yet.
    """

    @property
    def directory(self) -> Path:
        """Where the registry reads."""
        ...

    def refresh(self, needed: Needed = NOTHING) -> None:
        """Bring what is new into the directory, each version whole or not at all: written aside, renamed last.

        Blocks, and is called from one thread at a time. What is being served may still be read; nothing that a version
        consists of is changed in place.

        Args:
            needed: what comes first, and stays, where there is no room for all.

        Raises:
            StoreUnreachable: if the store can't be asked; what lies in the directory stays as it is.
        """
        ...

    def absent(self) -> Mapping[tuple[str, str], str]:
        """Return the versions that the store has and the directory has not, by name and number, each with why.

        Of the last look; may be asked by any thread.
        """
        ...

    def gone(self) -> Collection[tuple[str, str]]:
        """Return the versions that lie in the directory and in the store no longer, by name and number.

        Of the last look; may be asked by any thread.
        """
        ...
