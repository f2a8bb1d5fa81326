"""Writes a bundle into the store: under a hidden temporary name first, renamed into place last.

Readers never see half a bundle, because a rename is all or nothing. Publishers need no lock either: a version number
belongs to whoever renames first, and the other one seals again under the next number.
"""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from service.contract.bundle import Manifest, seal, versions_of

# Begins with a dot, which no version does; `versions_of` passes over it.
_TEMPORARY_PREFIX = ".publishing-"
# A publisher writes for seconds; what is older was left behind by a process that died.
_LEFT_BEHIND_AFTER_S = 3600.0
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EACCES})


def publish(
    store: Path, manifest: Manifest, files: Mapping[str, bytes], check: Callable[[Path], object] | None = None
) -> Path:
    """Seal a bundle under the next free version of its name and put it into the store.

    Args:
        store: root of all names; made where it is missing.
        manifest: its `version` and `files` are replaced.
        files: contents by relative path, all but the manifest and its sidecar.
        check: looks at the complete bundle under its temporary name; what it raises keeps the bundle out of the store.

    Returns:
        The bundle's directory, `store/<name>/<version>`.
    """
    directory = store / manifest.name
    directory.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(directory)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=directory))
    try:
        temporary.chmod(0o755)  # mkdtemp makes it private, but the server may run as another user
        for relative, data in files.items():
            _write(temporary / relative, data)
        return _rename_into_place(temporary, directory, manifest, files, check)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_into_place(
    temporary: Path,
    directory: Path,
    manifest: Manifest,
    files: Mapping[str, bytes],
    check: Callable[[Path], object] | None,
) -> Path:
    number = 0
    while True:
        number = max([number, *(int(version) for version in versions_of(directory))]) + 1
        sealed = seal(manifest.model_copy(update={"version": str(number)}), files)
        for relative in sealed.keys() - files.keys():
            _write(temporary / relative, sealed[relative])
        for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
            _sync_directory(folder)
        if check is not None:
            check(temporary)
        final = directory / str(number)
        try:
            temporary.rename(final)
        except OSError as error:
            if error.errno not in _TAKEN or not final.exists():
                raise
            continue
        _sync_directory(directory)
        return final


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make a directory's entries survive a power cut; a no-op where directories can't be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(directory: Path) -> None:
    oldest_alive = time.time() - _LEFT_BEHIND_AFTER_S
    for entry in directory.iterdir():
        try:
            dead = entry.name.startswith(_TEMPORARY_PREFIX) and entry.stat().st_mtime < oldest_alive
        except FileNotFoundError:  # another publisher has just renamed or removed it
            continue
        if dead:
            shutil.rmtree(entry, ignore_errors=True)
