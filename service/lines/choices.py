"""What administrators chose, kept through restarts: the live version, those held back, policies, unloaded lines.

Where versions wait for an administrator, the one that serves first counts as chosen: a restart takes no other.

A file in a directory of its own holds it, where one is named; it is replaced as a whole, so that nobody ever reads half
of it, and carries its own digest. One that does not hold is never guessed at: a version that somebody stepped back from
must not come back because a disk forgot. What can't be written counts all the same while the process lives, is told as
forgotten, and is written with the next change.

Beside it lies which version of each bundle was live last (`LastLive`): nobody's choice, but what a start may fall back
to.

Several processes may share the directory: each change is made to what the file holds by then, under a lock (`flock`)
that bars the others meanwhile. They read the file when they start, and hear of each other's changes no sooner. Where
the volume has no locks, a change is written all the same and told as one that another process may undo.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.contract.bundle import LineName

CHOICES_FILE = "choices.json"
LAST_LIVE_FILE = "live.json"
# Beside the files, because one is replaced, and a lock on what was replaced bars nobody. Empty, and never removed:
# whoever waits for it would have another one than whoever comes then.
LOCK_FILE = ".choices.lock"

_Version = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]

_MAX_BYTES = 64 * 2**20
# A change takes milliseconds; nobody waits longer for those of all other processes, and a stopped one bars nobody's.
_LONGEST_WAIT_S = 5.0
_LOOKS_AGAIN_S = 0.01
# Of what nobody chose: lines wait for it to serve.
_SHORT_WAIT_S = 0.2
_NO_DIRECTORY = "No directory is named for it (FLAWLINE_STATE_DIRECTORY), so it is forgotten when the service ends."

_NOT_READ = (
    f"{CHOICES_FILE} in the state directory could not be read, in a way that nobody foresaw; the log says how. "
    "Start the service again."
)

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_NO_LOCKS = (
    "It was written, but the volume has no file locks (flock), so that a process which changes something in the same "
    "moment may undo it: have the volume mounted with them."
)

_log = logging.getLogger("flawline")


class _Unreadable(Exception):
    """The file is there and does not hold; the sentence says what to do."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


class _Held(Exception):
    """Another process changes something, and does not end."""


class ChosenVersion(BaseModel):
    """Which version of a bundle somebody wanted live.

    Attributes:
        live: its number.
        held_back: newer ones that lay in the store then; they become live only by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    live: _Version
    held_back: tuple[_Version, ...] = ()


class Chosen(BaseModel):
    """All that was chosen; nothing at first.

    Attributes:
        versions: by name of the bundle.
        policies: of each line, by `<bundle>/<version>`: thresholds belong to the scores of one network.
        unloaded: lines that are not to be served.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: Mapping[LineName, ChosenVersion] = {}
    policies: Mapping[LineName, Mapping[str, str]] = {}
    unloaded: tuple[LineName, ...] = ()


class _Live(BaseModel):
    """Versions that were live last, by name of the bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: Mapping[LineName, _Version] = {}


Change = Callable[[Chosen], Chosen]

_Kept = TypeVar("_Kept", bound=BaseModel)


class Choices:
    """The choices of this process, and the file that outlives it.

    Args:
        directory: of the file; None forgets everything with the process.
        longest_wait_s: for other processes, at each change.

    Attributes:
        chosen: what counts.
        why_forgotten: why something of it would not survive a restart, in a sentence; None where all would.
        why_unknown: why nobody knows what was chosen before this start, in a sentence; None where it is known.
    """

    def __init__(self, directory: Path | None, *, longest_wait_s: float = _LONGEST_WAIT_S) -> None:
        self.chosen = Chosen()
        self.why_forgotten = _NO_DIRECTORY if directory is None else None
        self.why_unknown: str | None = None
        self._file = None if directory is None else directory / CHOICES_FILE
        self._longest_wait_s = longest_wait_s
        self._unwritten: list[Change] = []

    def recall(self) -> None:
        """Take over what the file holds; one that does not hold is told of in `why_unknown`."""
        if self._file is None:
            return
        self.why_unknown = _NOT_READ  # whatever ends this early, nothing is guessed
        try:
            self.chosen = _read(self._file, Chosen)
        except _Unreadable as error:
            self.why_unknown = error.sentence
            _log.exception("what administrators chose is not known")
        else:
            self.why_unknown = None
            _log.info("choices recalled", extra={"choices": self.chosen.model_dump(mode="json")})

    def choose_version(self, bundle: str, live: str, held_back: Collection[str]) -> None:
        """Note which version of a bundle is wanted live."""
        wanted = ChosenVersion(live=live, held_back=tuple(sorted(held_back, key=int)))
        self._change(lambda chosen: chosen.model_copy(update={"versions": {**chosen.versions, bundle: wanted}}))

    def begin_with(self, bundle: str, live: str) -> None:
        """Note which version of a bundle serves first, as if it were chosen, where nobody has chosen one yet."""
        if bundle in self.chosen.versions:
            return

        def change(chosen: Chosen) -> Chosen:
            before = chosen.versions.get(bundle)
            if before is None:
                return chosen.model_copy(update={"versions": {**chosen.versions, bundle: ChosenVersion(live=live)}})
            if before.live != live:
                told = {"bundle": bundle, "version": live, "other_version": before.live}
                _log.warning("another process serves another version, which a restart takes as well", extra=told)
            return chosen

        self._change(change)

    def choose_policy(self, line: str, bundle: str, version: str, policy: str) -> None:
        """Note by which policy a line is judged while a version of its bundle is live."""

        def change(chosen: Chosen) -> Chosen:
            of_line = {**chosen.policies.get(line, {}), f"{bundle}/{version}": policy}
            return chosen.model_copy(update={"policies": {**chosen.policies, line: of_line}})

        self._change(change)

    def unload(self, line: str) -> None:
        """Note that a line is not to be served."""
        self._change(lambda chosen: chosen.model_copy(update={"unloaded": tuple(sorted({*chosen.unloaded, line}))}))

    def load(self, line: str) -> None:
        """Note that a line is to be served again."""
        self._change(
            lambda chosen: chosen.model_copy(
                update={"unloaded": tuple(known for known in chosen.unloaded if known != line)}
            )
        )

    def policy_of(self, line: str, bundle: str, version: str) -> str | None:
        """Return the policy that was chosen for a line and a version; None where none was."""
        return self.chosen.policies.get(line, {}).get(f"{bundle}/{version}")

    def _change(self, change: Change) -> None:
        self.chosen = change(self.chosen)
        if self._file is None:
            return
        self._unwritten.append(change)
        try:
            with _only_one(self._file.with_name(LOCK_FILE), self._longest_wait_s) as has_locks:
                kept = _read(self._file, Chosen)
                for unwritten in self._unwritten:
                    kept = unwritten(kept)
                _write(self._file, kept)
        except _Unreadable as error:
            self._tell_forgotten(error.sentence)
        except _Held:
            self._tell_forgotten(
                f"Another process has held {LOCK_FILE} in the state directory for more than {self._longest_wait_s:g} s."
            )
        except OSError as error:
            self._tell_forgotten(f"The state directory can't be written: {error.strerror or error}.")
        else:
            self._unwritten.clear()
            self.why_forgotten = None if has_locks else _NO_LOCKS
            if not has_locks:
                _log.warning("a choice is kept without a lock", extra={"reason": _NO_LOCKS})

    def _tell_forgotten(self, sentence: str) -> None:
        self.why_forgotten = f"It counts until the service ends, and is forgotten then. {sentence}"
        _log.error("a choice can't be kept", extra={"reason": sentence})


class LastLive:
    """Which version of each bundle was live last, and the file that outlives the process.

    What can't be read or written is only not known: then a start has nothing to fall back to.

    Args:
        directory: of the file; None forgets everything with the process.

    Attributes:
        versions: by name of the bundle, as far as they are kept.
        is_known: whether what was kept before this start could be read, or none was.
    """

    def __init__(self, directory: Path | None) -> None:
        self.versions: Mapping[str, str] = {}
        self.is_known = True
        self._file = None if directory is None else directory / LAST_LIVE_FILE

    def recall(self) -> None:
        """Take over what the file holds."""
        if self._file is not None:
            try:
                self.versions = _read(self._file, _Live).versions
            except _Unreadable as error:
                self.is_known = False
                _log.warning("which versions were live last is not known", extra={"reason": error.sentence})

    def note(self, bundle: str, version: str) -> None:
        """Note that a version is live."""
        if self._file is None or self.versions.get(bundle) == version:
            return
        try:
            with _only_one(self._file.with_name(LOCK_FILE), _SHORT_WAIT_S):
                try:
                    kept = _read(self._file, _Live).versions
                except _Unreadable:
                    kept = self.versions
                _write(self._file, _Live(versions={**kept, bundle: version}))
        except (_Held, OSError) as error:
            reason = str(error) or "another process holds the lock"
            _log.warning("which version is live can't be kept", extra={"bundle": bundle, "reason": reason})
        else:
            self.versions = {**self.versions, bundle: version}


def why_unusable(directory: Path) -> str | None:
    """Return why choices could not be kept in a directory, which is made where it is missing; None where they can."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{directory} can't be made: {error.strerror}."
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"{directory} can't be written by this user."
    return None


def _read(file: Path, kind: type[_Kept]) -> _Kept:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_BYTES)
    except FileNotFoundError:
        return kind()
    except OSError as error:
        raise _Unreadable(f"{file.name} in the state directory can't be read: {error.strerror}.") from error
    try:
        document = json.loads(data)
        kept = kind.model_validate(document["choices"])
        holds = document["sha256"] == _digest(kept)
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
        holds = False
    if not holds:
        raise _Unreadable(
            f"{file.name} in the state directory does not hold what was written, so nobody knows which versions and "
            "policies administrators wanted; put it back from a copy, or remove it to begin with the newest versions, "
            "and start the service again."
        )
    return kept


@contextmanager
def _only_one(lock: Path, longest_wait_s: float) -> Iterator[bool]:
    """Keep every other process and thread from changing anything; yields whether the volume has locks at all.

    Raises:
        _Held: if others did not let go of it in time.
        OSError: if the directory can't be written.
    """
    gives_up_at = time.monotonic() + longest_wait_s
    opened = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield _lock(opened, gives_up_at)
    finally:
        os.close(opened)  # and with it the lock


def _lock(opened: int, gives_up_at: float) -> bool:
    """Lock an open file, and say whether its volume has locks.

    Raises:
        _Held: if others held it until then.
        OSError: if it can't be locked for a reason of its own.
    """
    while True:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= gives_up_at:
                raise _Held from None
            time.sleep(_LOOKS_AGAIN_S)
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            return False
        else:
            return True


def _write(file: Path, kept: BaseModel) -> None:
    document = {"sha256": _digest(kept), "choices": kept.model_dump(mode="json")}
    # Random, because processes in containers all have the same number.
    aside = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with aside.open("xb") as opened:
            opened.write(json.dumps(document, indent=2).encode() + b"\n")
            opened.flush()
            os.fsync(opened.fileno())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def _digest(kept: BaseModel) -> str:
    text = json.dumps(kept.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
