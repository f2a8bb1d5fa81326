"""The lock of pretrained weights: which exist, where they come from, and the SHA-256 that their files must have.

Two locks of one form. The project's lies beside this file and is what we vouch for. Every folder that was fetched or
packed has its own, `weights.lock.json`, with the digest of each file in it; carried across an air gap it tells whether
what arrived is what left. Where both know a digest they must agree. Where the project knows none (it was not recorded
yet), the first download on a connected machine decides, and the folder's lock holds everybody to it afterwards.

A file is never opened before its digest was compared, and is only ever safetensors.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from models.backbones import BackboneUnavailable
from training.backbones.download import fetch_where_reachable

LOCK_FILE = "weights.lock.json"
PROJECT_LOCK = Path(__file__).with_name(LOCK_FILE)
SHIPPED_FOLDER = Path(__file__).resolve().parents[2] / "models" / "weights"

_TIMM = "timm:"
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$")]


class WeightsRefused(Exception):
    """A weight file is missing, unknown or not what the lock says; the sentence says what to do."""


class LockedWeights(BaseModel):
    """One line of a lock.

    Attributes:
        name: the backbone's name, as in a run's configuration.
        file: its file in a folder of weights.
        source: "timm:<tagged name>" can be fetched; "package" comes with the wheel; "by hand: ..." says what it is.
        licence: SPDX name of the weights' licence.
        sha256: of the file, or None where none was recorded yet.
        aliases: other names that people use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    file: _FileName
    source: str
    licence: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    aliases: tuple[str, ...] = ()


class _LockFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    weights: tuple[LockedWeights, ...]


@dataclass(frozen=True)
class Checked:
    """What `verify_folder` found of one file.

    Attributes:
        entry: the lock's line.
        fault: None where all is well, else what is wrong.
    """

    entry: LockedWeights
    fault: Literal["missing", "changed", "against the project's lock"] | None


def read_lock(path: Path = PROJECT_LOCK) -> dict[str, LockedWeights]:
    """Read a lock by names; an absent file is an empty lock.

    Raises:
        WeightsRefused: if it is no lock of this version.
    """
    if not path.is_file():
        return {}
    try:
        lock = _LockFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise WeightsRefused(f"{path} is no lock of weights that this version knows; pack the folder again.") from error
    return {entry.name: entry for entry in lock.weights}


def find_locked(name: str) -> LockedWeights:
    """Return the project's line for a name or alias.

    Raises:
        WeightsRefused: if there is none.
    """
    lock = read_lock()
    for entry in lock.values():
        if name in (entry.name, *entry.aliases):
            return entry
    raise WeightsRefused(f"No weights are locked under {name!r}; known are {', '.join(sorted(lock))}.")


def backbone_name(name: str) -> str:
    """Return the locked name of an alias, and every other name as it is."""
    return next((entry.name for entry in read_lock().values() if name in entry.aliases), name)


def known_files(name: str) -> list[str]:
    """Return the file that the project's lock names for a backbone or alias, if it knows it."""
    return [entry.file for entry in read_lock().values() if name in (entry.name, *entry.aliases)]


def name_of_file(file: str) -> str:
    """Return the backbone whose weights the project's lock expects in a file, or the file's stem."""
    stem = file.removesuffix(".safetensors")
    return next((entry.name for entry in read_lock().values() if entry.file == file), stem)


def how_to_get(name: str) -> str:
    """Say which command brings weights of this name, for the person who misses them."""
    try:
        entry = find_locked(name)
    except WeightsRefused:
        return f"put {name}.safetensors into a folder and give it with --weights"
    if not entry.source.startswith(_TIMM):
        return f"put {entry.file} ({entry.source}) into a folder and give it with --weights"
    return (
        f"on a connected machine run `flawline weights pack carry {entry.name}`, bring the folder carry here, check it "
        "with `flawline weights verify carry` and give it with --weights carry"
    )


def fetch_weights(
    names: Iterable[str],
    folder: Path,
    *,
    search: Sequence[Path] = (),
    fetch: Callable[[str], Mapping[str, Tensor]] = fetch_where_reachable,
) -> list[LockedWeights]:
    """Bring weights into a folder and write its lock: from the folder itself, other folders, or a download.

    Args:
        names: names or aliases.
        folder: made where it is missing.
        search: folders that may hold the files already.
        fetch: downloads by timm's tagged name.

    Returns:
        The folder's lines for these names, each with its digest.

    Raises:
        WeightsRefused: if a name is unknown, a file can't be had, or a digest differs from a lock's.
    """
    wanted = [find_locked(name) for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    brought = []
    for entry in wanted:
        held_to = _digest_to_hold(entry, read_lock(folder / LOCK_FILE))
        target = folder / entry.file
        source = next((place for place in (folder, *search, SHIPPED_FOLDER) if (place / entry.file).is_file()), None)
        if source is None:
            _write_whole(target, _download(entry, fetch), held_to)
        elif source != folder:
            refuse_changed_file(source / entry.file)
            _write_whole(target, (source / entry.file).read_bytes(), held_to)
        digest = digest_of(target)
        _compare(target, digest, held_to)
        brought.append(entry.model_copy(update={"sha256": digest}))
        _add_to_lock(folder / LOCK_FILE, brought[-1])
    return brought


def verify_folder(folder: Path) -> list[Checked]:
    """Compare every file of a folder's lock with its digest, and both with the project's lock.

    Raises:
        WeightsRefused: if the folder has no lock.
    """
    lock = read_lock(folder / LOCK_FILE)
    if not lock:
        raise WeightsRefused(f"{folder} has no {LOCK_FILE}; make such a folder with `flawline weights pack`.")
    return [Checked(entry, _fault(folder, entry)) for entry in lock.values()]


def refuse_changed_file(path: Path) -> None:
    """Compare a file with the lock that lies beside it, if there is one that names it.

    Raises:
        WeightsRefused: if the digest differs.
    """
    for entry in read_lock(path.with_name(LOCK_FILE)).values():
        if entry.file == path.name:
            _compare(path, digest_of(path), entry.sha256)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(folder: Path, entry: LockedWeights) -> Literal["missing", "changed", "against the project's lock"] | None:
    path = folder / entry.file
    if not path.is_file():
        return "missing"
    digest = digest_of(path)
    if digest != entry.sha256:
        return "changed"
    known = read_lock().get(entry.name)
    return "against the project's lock" if known and known.sha256 not in (None, digest) else None


def _digest_to_hold(entry: LockedWeights, lock: Mapping[str, LockedWeights]) -> str | None:
    if entry.sha256 is not None:
        return entry.sha256
    return lock[entry.name].sha256 if entry.name in lock else None


def _download(entry: LockedWeights, fetch: Callable[[str], Mapping[str, Tensor]]) -> bytes:
    if not entry.source.startswith(_TIMM):
        raise WeightsRefused(f"{entry.name} can't be downloaded; {how_to_get(entry.name)}.")
    try:
        state = fetch(entry.source.removeprefix(_TIMM))
    except BackboneUnavailable as error:
        raise WeightsRefused(f"{error}. Without a connection, {how_to_get(entry.name)}.") from error
    # Independent copies: networks may share a tensor under two names, which the format refuses.
    return safetensors.torch.save(
        {name: value.detach().cpu().clone().contiguous() for name, value in sorted(state.items())}
    )


def _write_whole(target: Path, content: bytes, held_to: str | None) -> None:
    """Write a file that is what it has to be, or nothing."""
    _compare(target, hashlib.sha256(content).hexdigest(), held_to)
    temporary = target.with_name(f".{target.name}.writing")
    temporary.write_bytes(content)
    temporary.replace(target)


def _compare(path: Path, digest: str, held_to: str | None) -> None:
    if held_to is not None and digest != held_to:
        raise WeightsRefused(
            f"{path.name} has SHA-256 {digest}, the lock says {held_to}; delete {path} and fetch or carry it again."
        )


def _add_to_lock(path: Path, entry: LockedWeights) -> None:
    lock = read_lock(path) | {entry.name: entry}
    content = _LockFile(weights=tuple(lock[name] for name in sorted(lock))).model_dump_json(indent=2)
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(content + "\n")
    temporary.replace(path)
