"""Finds the files in a folder: all of them, or an error, since "all PASS" is said of the whole folder.

Python's own `rglob` leaves out what it may not look into, and folders that are links, without a word.
"""

import os
from pathlib import Path


def find_files(folder: Path, without: Path | None = None) -> list[Path]:
    """Return the files in a folder and in all folders below it, sorted; linked files and folders count like others.

    Where several ways lead to one folder, as where a link leads back, its files are returned once, by a way without
    links if there is one.

    Args:
        folder: to look into.
        without: a folder that is not looked into, whichever way leads there; it need not exist.

    Raises:
        OSError: if a folder can't be looked into, or a link leads nowhere; its `filename` says which.
    """
    excluded = None if without is None else Path(os.path.realpath(without))
    seen: set[str] = set()
    files: list[Path] = []
    folders, linked = [folder], list[Path]()
    while folders or linked:
        place = folders.pop() if folders else linked.pop(0)
        real = os.path.realpath(place)
        if real in seen or (excluded is not None and Path(real).is_relative_to(excluded)):
            continue
        seen.add(real)
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir():
                    (linked if entry.is_symlink() else folders).append(place / entry.name)
                    continue
                if entry.is_symlink():
                    os.stat(entry.path)  # noqa: PTH116 - to raise where it leads nowhere: what, nobody knows
                files.append(place / entry.name)
    return sorted(files)
