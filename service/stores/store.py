"""Where bundles come from: what the registry asks of a store. It only ever reads a local directory.

A store that lies elsewhere mirrors complete versions into that directory; what is in it is not trusted for that: every
bundle is verified when it is loaded, wherever it came from.
"""

from pathlib import Path
from typing import Protocol


class Store(Protocol):
    """Bundles and policies as `<name>/<version>/` and `<line>/policies/<version>.json` in a local directory.

    Attributes:
        directory: to be read; it may not be there yet.
    """

    @property
    def directory(self) -> Path:
        """Where the registry reads."""
        ...

    def refresh(self) -> None:
        """Bring what is new into the directory, each version whole or not at all: written aside, renamed last.

        Blocks, and is called from one thread at a time. What is being served may still be read; nothing that a version
        consists of is changed in place.

        Raises:
            StoreUnreachable: if the store can't be asked; what lies in the directory stays as it is.
        """
        ...
