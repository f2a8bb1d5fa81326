"""A store that is an S3-compatible bucket: complete versions are mirrored into a directory, where they are read.

A version is complete when its `manifest.json` is there, because publishers write that last. Each file is fetched into
a folder of another name and held against the manifest's digest, and the folder is renamed when it is whole; a fetch
that was cut short goes on where it was. What the manifest doesn't name is left where it is, but for the signature.

Versions never change: one whose manifest is replaced in the bucket is not fetched again, and that is said. One that is
removed there is removed here, but for what is in use: that stays until something else is, and is told as gone. A
version that does not hold keeps no other from coming, and is tried again when its objects have changed.

Where there is no room for all, what serves or was chosen to comes first and is never removed for others, then come the
newest version of every name and the one that rolling back would take, and then the others, newer ones first. What has
no room is left out and said, and comes when it is needed.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pydantic import ValidationError

from service.contract.bundle import LINE_NAME, MANIFEST_DIGEST_FILE, MANIFEST_FILE, Manifest
from service.contract.signature import MAX_SIGNATURE_BYTES, SIGNATURE_FILE
from service.errors import BundleRefused, StoreUnreachable
from service.stores.objects import Listed, Objects
from service.stores.store import NOTHING, Needed

POLICIES_DIRECTORY = "policies"

_MAX_MANIFEST_BYTES = 16 * 2**20
_MAX_POLICY_BYTES = 2**20
_PATIENCE = 3  # faults of one call; after them the network is at fault, and each further one would take its time
_FETCHING = ".fetching-"
_TAGS = ".tags"
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_POLICY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\.json")

_log = logging.getLogger("flawline")


class _Version(NamedTuple):
    """A complete version in the bucket, with its objects by path below it."""

    name: str
    number: str
    objects: Mapping[str, Listed]

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.number

    @property
    def size_bytes(self) -> int:
        return sum(item.size for item in self.objects.values())

    @property
    def manifest(self) -> Listed:
        return self.objects[MANIFEST_FILE]

    @property
    def tags(self) -> tuple[tuple[str, str], ...]:
        return tuple(sorted((path, listed.tag) for path, listed in self.objects.items()))


class _Refused(NamedTuple):
    """Why a version does not hold, and what its objects were then."""

    tags: tuple[tuple[str, str], ...]
    reason: str


class Mirror:
    """The bundles of a bucket, in a directory of this machine.

    Args:
        objects: of the bucket.
        directory: that nobody else writes to; made where it is missing.
        max_bytes: of all versions in it.

    Attributes:
        directory: where complete versions are read.
    """

    def __init__(self, objects: Objects, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self._objects = objects
        self._max_bytes = max_bytes
        self._refused: dict[tuple[str, str], _Refused] = {}
        self._crowded_out: Collection[tuple[str, str]] = ()
        self._said: set[str] = set()
        self._absent: Mapping[tuple[str, str], str] = {}
        self._gone: Collection[tuple[str, str]] = ()

    def refresh(self, needed: Needed = NOTHING) -> None:
        """Bring what is new, remove what is gone and not in use.

        Args:
            needed: what comes first, and stays, where there is no room for all; and what stays though it is gone.

        Raises:
            StoreUnreachable: if the bucket can't be listed or read, or the directory not be written; what lies in it
                stays, and the next call goes on.
        """
        listed = self._objects.list()
        versions, policies = _sort(listed)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._gone = self._remove_gone(versions, needed.in_use)
            self._remove_policies(policies)
            fitting = self._fitting(versions, needed)
            faults = list(islice(self._bring_all(fitting, policies), _PATIENCE))
        except OSError as error:
            raise StoreUnreachable(f"{self.directory} can't be written: {error.strerror or error}.") from error
        finally:
            self._absent = dict(self._tell_absent(versions))
        if faults:
            raise faults[0]

    def absent(self) -> Mapping[tuple[str, str], str]:
        """Return the versions that the bucket has and the directory has not, by name and number, each with why."""
        return self._absent

    def gone(self) -> Collection[tuple[str, str]]:
        """Return the versions that the directory has and the bucket no longer, by name and number."""
        return self._gone

    def _tell_absent(self, versions: Iterable[_Version]) -> Iterator[tuple[tuple[str, str], str]]:
        for version in versions:
            if self._folder(version).exists():
                continue
            refused = self._refused.get(version.key)
            if refused is not None:
                yield version.key, refused.reason
            elif version.key in self._crowded_out:
                yield version.key, f"There is no room for it in {self.directory}; raise FLAWLINE_MAX_STORE_BYTES."
            else:
                yield version.key, "It could not be fetched; the log says why."

    def _bring_all(self, versions: Iterable[_Version], policies: Mapping[str, Listed]) -> Iterator[StoreUnreachable]:
        """Bring everything, and yield each fault: one object that can't be read must not keep the others away."""
        brings = [partial(self._bring, version) for version in versions]
        brings += [partial(self._bring_policy, path, item) for path, item in policies.items()]
        for bring in brings:
            try:
                bring()
            except StoreUnreachable as error:
                yield error

    def _fitting(self, versions: Iterable[_Version], needed: Needed) -> list[_Version]:
        """Choose what there is room for, most needed first, and make that room."""
        fitting: list[_Version] = []
        left = self._max_bytes - sum(_size_of(self.directory / name / number) for name, number in self._gone)
        crowded_out: list[_Version] = []
        for version in self._by_need(versions, needed):
            # What serves stays where it is, even where somebody has lowered the limit: a restart has to find it.
            stays = version.key in needed.serving and self._folder(version).exists()
            if version.size_bytes > left and not stays:
                crowded_out.append(version)
                continue
            left -= version.size_bytes
            fitting.append(version)
        self._crowded_out = {version.key for version in crowded_out}
        for version in crowded_out:
            named = f"{version.name} {version.number}"
            self._say(f"{named} has no room in {self.directory}; raise FLAWLINE_MAX_STORE_BYTES.")
            shutil.rmtree(self._half(version), ignore_errors=True)
            if self._folder(version).exists():
                self._remove(version.name, version.number)
        return fitting

    def _by_need(self, versions: Iterable[_Version], needed: Needed) -> list[_Version]:
        """Sort by what should be there first: what serves and is there, the rest of it, the newest ones, and so on."""
        newest_first = sorted(versions, key=lambda version: int(version.number), reverse=True)
        seen: Counter[str] = Counter()
        ranked: list[tuple[tuple[int, int, str], _Version]] = []
        for version in newest_first:
            if version.key in needed.serving:
                need = 0 if self._folder(version).exists() else 1
            elif version.key in needed.previous:
                need = 2 if needed.newest_waits else 3
            elif not seen[version.name]:
                need = 3 if needed.newest_waits else 2
            else:
                need = 4
            ranked.append(((need, seen[version.name], version.name), version))
            seen[version.name] += 1
        return [version for _, version in sorted(ranked, key=lambda pair: pair[0])]

    def _bring(self, version: _Version) -> None:
        if self._folder(version).exists():
            if self._tag_of(version) != version.manifest.tag:
                self._say(
                    f"{MANIFEST_FILE} of {version.name} {version.number} was replaced in the store; versions never "
                    "change, and the one that was there before is kept. Publish under a new version."
                )
            elif SIGNATURE_FILE in version.objects and not (self._folder(version) / SIGNATURE_FILE).exists():
                self._bring_signature(version)
            return
        refused = self._refused.get(version.key)
        if refused is not None and refused.tags == version.tags:
            return
        try:
            self._fetch(version)
        except BundleRefused as error:
            self._refused[version.key] = _Refused(version.tags, error.sentence)
            shutil.rmtree(self._half(version), ignore_errors=True)
            self._say(f"{version.name} {version.number} in the store is refused. {error.sentence}")
        else:
            self._refused.pop(version.key, None)
            _log.info("a version was mirrored", extra={"bundle": version.name, "version": version.number})

    def _fetch(self, version: _Version) -> None:
        data = self._get(version, MANIFEST_FILE, _MAX_MANIFEST_BYTES)
        files = _digests_of(data)
        half = self._half(version)
        half.mkdir(parents=True, exist_ok=True)
        _write(half / MANIFEST_FILE, data)
        for path, digest in files.items():
            self._fetch_file(version, half, path, digest)
        # Not in the manifest: the one is made from it, the other signs it; whoever loads the bundle checks both.
        _write(half / MANIFEST_DIGEST_FILE, hashlib.sha256(data).hexdigest().encode() + b"\n")
        if SIGNATURE_FILE in version.objects:
            _write(half / SIGNATURE_FILE, self._get(version, SIGNATURE_FILE, MAX_SIGNATURE_BYTES))
        self._remove_strangers(half, files)
        self._remember_tag(version)
        half.rename(self._folder(version))

    def _fetch_file(self, version: _Version, half: Path, path: str, digest: str) -> None:
        target = half / path
        if target.is_file() and _digest_of(target) == digest:
            return
        data = self._get(version, path, self._max_bytes)
        if hashlib.sha256(data).hexdigest() != digest:
            raise BundleRefused(f"{path} is not the file that {MANIFEST_FILE} names; publish the bundle again.")
        _write(target, data)

    def _get(self, version: _Version, path: str, max_bytes: int) -> bytes:
        listed = version.objects.get(path)
        if listed is None:
            raise BundleRefused(f"{path} is missing though {MANIFEST_FILE} names it; publish the bundle again.")
        if listed.size > max_bytes:
            raise BundleRefused(f"{path} has {listed.size} bytes, more than are taken.")
        return self._objects.get(listed.key, listed.size)

    def _bring_signature(self, version: _Version) -> None:
        """Fetch the signature of a version that was signed after it was published."""
        data = self._objects.get(version.objects[SIGNATURE_FILE].key, MAX_SIGNATURE_BYTES)
        aside = self.directory / version.name / f"{_FETCHING}signature"
        _write(aside, data)
        aside.rename(self._folder(version) / SIGNATURE_FILE)

    def _bring_policy(self, path: str, listed: Listed) -> None:
        target = self.directory / path
        if self._tag_at(path) == listed.tag and target.is_file():
            return
        if listed.size > _MAX_POLICY_BYTES:
            self._say(f"{path} has {listed.size} bytes, more than a policy may have.")
            return
        aside = target.with_name(f"{_FETCHING}{target.name}")
        _write(aside, self._objects.get(listed.key, listed.size))
        aside.rename(target)
        _write(self._tag_file(path), listed.tag.encode())

    def _remove_gone(
        self, versions: Iterable[_Version], in_use: Collection[tuple[str, str]]
    ) -> Collection[tuple[str, str]]:
        """Remove what the bucket has no longer, and return the versions that stay because they are in use."""
        there = {version.key for version in versions}
        staying: set[tuple[str, str]] = set()
        for folder in self.directory.glob("*/*"):
            name, number = folder.parent.name, folder.name.removeprefix(_FETCHING)
            if not (folder.is_dir() and _VERSION.fullmatch(number)) or (name, number) in there:
                continue
            if (name, number) in in_use and folder.name == number:
                staying.add((name, number))
            else:
                shutil.rmtree(folder)
                self._tag_file(f"{name}/{number}").unlink(missing_ok=True)
                _log.info("a version is gone from the store", extra={"bundle": name, "version": number})
        self._refused = {key: refused for key, refused in self._refused.items() if key in there}
        return staying

    def _remove_policies(self, policies: Mapping[str, Listed]) -> None:
        for file in self.directory.glob(f"*/{POLICIES_DIRECTORY}/*.json"):
            path = file.relative_to(self.directory).as_posix()
            if path not in policies:
                file.unlink()
                self._tag_file(path).unlink(missing_ok=True)

    def _remove(self, name: str, number: str) -> None:
        shutil.rmtree(self.directory / name / number)
        self._tag_file(f"{name}/{number}").unlink(missing_ok=True)

    @staticmethod
    def _remove_strangers(half: Path, files: Mapping[str, str]) -> None:
        """Remove what an earlier fetch left of another manifest."""
        known = {*files, MANIFEST_FILE, MANIFEST_DIGEST_FILE, SIGNATURE_FILE}
        for path in half.rglob("*"):
            if path.is_file() and path.relative_to(half).as_posix() not in known:
                path.unlink()

    def _folder(self, version: _Version) -> Path:
        return self.directory / version.name / version.number

    def _half(self, version: _Version) -> Path:
        return self.directory / version.name / f"{_FETCHING}{version.number}"

    def _tag_file(self, path: str) -> Path:
        return self.directory / _TAGS / path.replace("/", "+")

    def _tag_at(self, path: str) -> str | None:
        try:
            return self._tag_file(path).read_text()
        except OSError:
            return None

    def _tag_of(self, version: _Version) -> str | None:
        return self._tag_at(f"{version.name}/{version.number}")

    def _remember_tag(self, version: _Version) -> None:
        _write(self._tag_file(f"{version.name}/{version.number}"), version.manifest.tag.encode())

    def _say(self, sentence: str) -> None:
        """Log a fault once; the store is asked again and again."""
        if sentence not in self._said:
            self._said.add(sentence)
            _log.error("the store holds what is not taken", extra={"reason": sentence})


def _sort(listed: Iterable[Listed]) -> tuple[list[_Version], dict[str, Listed]]:
    """Tell complete versions and policies from whatever else lies in a bucket."""
    found: dict[tuple[str, str], dict[str, Listed]] = {}
    policies: dict[str, Listed] = {}
    for item in listed:
        name, _, rest = item.key.partition("/")
        folder, _, path = rest.partition("/")
        if not re.fullmatch(LINE_NAME, name) or not path:
            continue
        if _VERSION.fullmatch(folder):
            found.setdefault((name, folder), {})[path] = item
        elif folder == POLICIES_DIRECTORY and _POLICY.fullmatch(path):
            policies[item.key] = item
    versions = [_Version(*key, objects) for key, objects in found.items() if MANIFEST_FILE in objects]
    return versions, policies


def _digests_of(manifest: bytes) -> dict[str, str]:
    try:
        files = Manifest.model_validate_json(manifest).files
    except ValidationError:
        # One of another release, perhaps: whoever loads it says so. Its files are fetched all the same.
        files = _digests_of_another(manifest)
    for path in files:
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
            raise BundleRefused(f"{MANIFEST_FILE} names a file outside of the bundle.")
    return files


def _digests_of_another(manifest: bytes) -> dict[str, str]:
    try:
        files = json.loads(manifest)["files"]
        return {str(path): str(digest) for path, digest in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleRefused(f"{MANIFEST_FILE} can't be read; publish the bundle again.") from error


def _digest_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
