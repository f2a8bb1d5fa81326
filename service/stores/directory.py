"""A store that is a local directory, or a volume that is mounted as one."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from service.errors import StoreUnreachable
from service.stores.store import NOTHING, Needed


class DirectoryStore:
    """Bundles lie where they are read.

    Args:
        directory: of bundles.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def refresh(self, needed: Needed = NOTHING) -> None:  # noqa: ARG002 - everything is there
        """Only see that the directory can be read: whoever writes into it has already brought what is new.

        Raises:
            StoreUnreachable: if it can't be, as where a volume is away.
        """
        try:
            with os.scandir(self.directory) as entries:
                next(entries, None)
        except OSError as error:
            raise StoreUnreachable(f"The store can't be read: {error.strerror}.") from error

    def absent(self) -> Mapping[tuple[str, str], str]:
        """Return nothing: the directory is the store."""
        return {}

    def gone(self) -> Collection[tuple[str, str]]:
        """Return nothing: what is removed is not there either."""
        return ()
