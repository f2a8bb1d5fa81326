"""Writes a bundle into the store: under a hidden temporary name first, renamed into place last.

Readers never see half a bundle, because a rename is all or nothing, nor one that the service would refuse: what was
written is read and its golden set replayed before it is renamed, so that nobody can publish what was not verified.
Publishers need no lock either: a version number belongs to whoever renames first, and the other one seals again under
the next number.
"""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from service.contract.bundle import REPORT_FILE, Manifest, load_bundle, seal, versions_of
from service.contract.golden import read_golden, replay
from service.contract.tiling import Run

# Begins with a dot, which no version does; `versions_of` passes over it.
_TEMPORARY_PREFIX = ".publishing-"
# A publisher writes for seconds; what is older was left behind by a process that died.
_LEFT_BEHIND_AFTER_S = 3600.0
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EACCES})
_MACHINES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS})
_PROBE_BYTES = 4096


class StoreRefused(Exception):
    """What was named as a store can't be one; the sentence says why."""


class StoreFailed(Exception):
    """The machine can't write the store, for example because its disk is full; the sentence says why."""


def is_machines_fault(error: OSError) -> bool:
    """Tell whether the machine is at fault, as with a full disk, and not what the caller named."""
    return error.errno in _MACHINES


def probe_store(store: Path, name: str) -> None:
    """Find out whether a bundle could be put into a store; asked before fitting, not an hour later.

    Nothing stays: where there is no store yet, the nearest folder above it is tried.

    Raises:
        StoreRefused: if it can't be a store.
        StoreFailed: if the machine can't write it.
    """
    directory = store / name
    place = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, dir=place) as temporary:
            _write(Path(temporary) / "probe", bytes(_PROBE_BYTES))
    except OSError as error:
        raise _fault_of(error, store) from error


def publish(
    store: Path,
    manifest: Manifest,
    files: Mapping[str, bytes],
    graph: Run,
    page: Callable[[str], str] | None = None,
) -> Path:
    """Seal a bundle under the next free version of its name and put it into the store.

    Args:
        store: root of all names; made where it is missing.
        manifest: its `version` and `files` are replaced.
        files: contents by relative path, all but the manifest and its sidecar.
        graph: answers the golden set, before the bundle gets its name.
        page: returns the report, given the version that the bundle gets; None where `files` holds it.

    Returns:
        The bundle's directory, `store/<name>/<version>`.

    Raises:
        StoreRefused: if it can't be a store.
        StoreFailed: if the machine can't write it.
        BundleRefused: if the service would refuse the bundle, as it lies on the disk; then the store is as it was.
    """
    try:
        return _publish(store / manifest.name, manifest, files, graph, page)
    except OSError as error:
        raise _fault_of(error, store) from error


def _publish(
    directory: Path,
    manifest: Manifest,
    files: Mapping[str, bytes],
    graph: Run,
    page: Callable[[str], str] | None,
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(directory)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=directory))
    try:
        temporary.chmod(0o755)  # mkdtemp makes it private, but the server may run as another user
        for relative, data in files.items():
            _write(temporary / relative, data)
        return _rename_into_place(temporary, directory, manifest, files, graph, page)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_into_place(
    temporary: Path,
    directory: Path,
    manifest: Manifest,
    files: Mapping[str, bytes],
    graph: Run,
    page: Callable[[str], str] | None,
) -> Path:
    number = 0
    while True:
        number = max([number, *(int(version) for version in versions_of(directory))]) + 1
        of_version = {} if page is None else {REPORT_FILE: page(str(number)).encode()}
        sealed = seal(manifest.model_copy(update={"version": str(number)}), {**files, **of_version})
        for relative in sealed.keys() - files.keys():
            _write(temporary / relative, sealed[relative])
        for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
            _sync_directory(folder)
        written = load_bundle(temporary)
        replay(written, read_golden(written), graph)
        final = directory / str(number)
        try:
            temporary.rename(final)
        except OSError as error:
            if error.errno not in _TAKEN or not final.exists():
                raise
            continue
        _sync_directory(directory)
        return final


def _fault_of(error: OSError, store: Path) -> StoreRefused | StoreFailed:
    why = error.strerror or str(error)
    if is_machines_fault(error):
        return StoreFailed(f"The store {store} can't be written: {why}.")
    place = store if error.filename is None else Path(error.filename).parent
    where = "" if place == store else f"{place}: "
    return StoreRefused(f"The store {store} can't take a bundle ({where}{why}); take a folder that can be written.")


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
