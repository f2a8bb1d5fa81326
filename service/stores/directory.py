"""A store that is a local directory, or a volume that is mounted as one."""

from pathlib import Path


class DirectoryStore:
    """Bundles lie where they are read.

    Args:
        directory: of bundles.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def refresh(self) -> None:
        """Do nothing: whoever writes into the directory has already brought what is new."""
