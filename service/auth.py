"""Keys: who may do what on which line, and how often.

A keys file is a JSON list of `{"name", "sha256", "lines", "actions", "quota_per_minute", "created_at"}`; it holds
digests, so that who reads the file can't use it. Keys are long random strings, for which one round of SHA-256 is
enough. Without a keys file the service is open, and says so in the log. The clock is an argument: seconds, monotonic.

The file is read again when it changes, as Kubernetes changes a mounted secret by swapping a link. One that does not fit
is refused aloud, and the keys that were in force stay: a slip of the pen must not stop the plant, and whoever revokes a
key sees in log and metric that it was not. It is read again until it fits, because what failed may have been the disk.
"""

import hashlib
import hmac
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple, Self, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from service.contract.bundle import Digest, LineName
from service.errors import NotAuthenticated, NotAuthorised, QuotaExceeded

# `choose` goes beside `inspect`: naming what judges, where it is not what would judge anyway.
Action = Literal["inspect", "choose", "read", "metrics", "admin"]
ACTIONS: tuple[Action, ...] = get_args(Action)
EVERY_LINE = "*"

_LOOK_EVERY_S = 1.0

_log = logging.getLogger("flawline")


class KeyEntry(BaseModel):
    """One key of the file.

    Attributes:
        name: of whoever holds it; logged, never the key.
        sha256: digest of the key's UTF-8 bytes, in lower-case hexadecimal.
        lines: that it covers; `*` covers every line.
        actions: that it allows there.
        quota_per_minute: frames; None does not count.
        created_at: when the key was made; None in files of an earlier day, or written by hand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    sha256: Digest
    lines: tuple[Literal["*"] | LineName, ...] = Field(min_length=1)
    actions: frozenset[Action] = Field(min_length=1)
    quota_per_minute: int | None = Field(default=None, gt=0)
    created_at: AwareDatetime | None = None

    def covers(self, line: str) -> bool:
        """Say whether the key counts on a line."""
        return EVERY_LINE in self.lines or line in self.lines


_ENTRIES = TypeAdapter(tuple[KeyEntry, ...])


class KeysFileInvalid(ValueError):
    """The keys file can't be read; the sentence says what is wrong and shows a right entry."""


def read_keys(path: Path) -> tuple[KeyEntry, ...]:
    """Read the entries of a keys file.

    Raises:
        KeysFileInvalid: if it can't be read or an entry does not fit.
    """
    try:
        return _ENTRIES.validate_json(path.read_bytes())
    except OSError as error:
        raise KeysFileInvalid(f"The keys file {path} can't be read: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise KeysFileInvalid(
            f"The keys file {path} does not fit at {place}: {first['msg']}. A right entry is "
            '{"name": "press 4", "sha256": "<64 hex digits>", "lines": ["cap"], "actions": ["inspect", "read"]}.'
        ) from error


class Caller:
    """Somebody who showed a known key, or anybody where the service is open."""

    def __init__(self, entry: KeyEntry | None, bucket: "_Bucket | None") -> None:
        self._entry = entry
        self._bucket = bucket

    @property
    def name(self) -> str:
        """Who it is, for the log."""
        return "anybody" if self._entry is None else self._entry.name

    def may(self, action: Action, line: str) -> bool:
        """Say whether an action is allowed on a line."""
        return self._entry is None or (action in self._entry.actions and self._entry.covers(line))

    @property
    def covers_every_line(self) -> bool:
        """Whether no line is out of reach, not even one that comes later."""
        return self._entry is None or EVERY_LINE in self._entry.lines

    def demand(self, action: Action, line: str | None = None) -> None:
        """Insist on a right.

        Args:
            action: what is about to happen.
            line: where; None asks for the action on any line.

        Raises:
            NotAuthorised: if the key has no such right; whether the line exists is not told.
        """
        if self._entry is None:
            return
        if action not in self._entry.actions:
            raise NotAuthorised(f"This key does not allow the action {action!r}; ask for a key that does.")
        if line is not None and not self._entry.covers(line):
            raise NotAuthorised("This key does not cover this line; ask for a key that names it.")

    def spend_frame(self) -> None:
        """Count one frame against the quota.

        Raises:
            QuotaExceeded: if none is left; it knows when there will be.
        """
        if self._bucket is not None:
            self._bucket.take()


class Keyring:
    """The keys of one file; a changed file makes a new keyring, and taking it into use is one assignment.

    Args:
        entries: None for an open service.
        clock: seconds, monotonic.
        buckets: of keyrings of the same file before, by digest, so that what was used of a quota stays used; changed.

    Raises:
        KeysFileInvalid: if two entries have the same key.
    """

    def __init__(
        self,
        entries: Iterable[KeyEntry] | None,
        clock: Callable[[], float],
        buckets: "dict[str, _Bucket] | None" = None,
    ) -> None:
        self._entries = None if entries is None else tuple(entries)
        known = self._entries or ()
        if len({entry.sha256 for entry in known}) != len(known):
            raise KeysFileInvalid("Two entries of the keys file have the same sha256; give each holder its own key.")
        buckets = {} if buckets is None else buckets
        self._buckets = {
            entry.sha256: buckets.setdefault(entry.sha256, _Bucket(entry.quota_per_minute, clock))
            for entry in known
            if entry.quota_per_minute is not None
        }
        for entry in known:
            if entry.quota_per_minute is not None:
                self._buckets[entry.sha256].hold(entry.quota_per_minute)

    @classmethod
    def from_file(cls, path: Path, clock: Callable[[], float], buckets: "dict[str, _Bucket] | None" = None) -> Self:
        """Read a keys file.

        Raises:
            KeysFileInvalid: if it can't be read or an entry does not fit.
        """
        return cls(read_keys(path), clock, buckets)

    @property
    def is_open(self) -> bool:
        """Whether everybody may do everything."""
        return self._entries is None

    def allows(self, action: Action) -> bool:
        """Say whether any key allows an action."""
        return self._entries is None or any(action in entry.actions for entry in self._entries)

    def oldest_made_at(self, otherwise: float) -> float:
        """Return when the oldest key was made, in seconds since 1970; not a number where there is no key.

        Args:
            otherwise: what counts for a key whose entry does not say.
        """
        made = (otherwise if one.created_at is None else one.created_at.timestamp() for one in self._entries or ())
        return min(made, default=math.nan)

    def identify(self, authorization: str | None, api_key: str | None) -> Caller:
        """Find out who is calling.

        Args:
            authorization: the header `Authorization`; `Bearer <key>` counts.
            api_key: the header `X-API-Key`; counts where there is no bearer.

        Raises:
            NotAuthenticated: if there is no key or it is not known.
        """
        if self._entries is None:
            return Caller(None, None)
        scheme, _, bearer = (authorization or "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else api_key
        if not key:
            raise NotAuthenticated("Send your key in the header `Authorization: Bearer <key>` or `X-API-Key`.")
        digest = hashlib.sha256(key.encode()).hexdigest()
        found: KeyEntry | None = None
        for entry in self._entries:  # every entry is compared, so that the time tells nothing
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        if found is None:
            raise NotAuthenticated("This key is not known here; check it, or ask for a new one.")
        return Caller(found, self._buckets.get(found.sha256))


class MountedKeyring:
    """The keys of a file that may be changed while the service runs.

    Args:
        path: of the keys file; it is looked at when somebody calls, at most once a second.
        clock: seconds, monotonic.

    Raises:
        KeysFileInvalid: if the file can't be used now; the service does not begin without keys.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._looks = self._look()
        self._changed_at = _changed_at(self._looks)
        self._buckets: dict[str, _Bucket] = {}
        self._keyring = Keyring.from_file(path, clock, self._buckets)
        self._looked_at = clock()
        self._is_in_force = True
        self._why_refused: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether everybody may do everything; never, where there is a keys file."""
        return False

    def allows(self, action: Action) -> bool:
        """Tell whether there is a key for an action; see `Keyring.allows`."""
        self._renew()
        return self._keyring.allows(action)

    def is_in_force(self) -> bool:
        """Tell whether the keys that count are those of the file as it is now."""
        self._renew()
        return self._is_in_force

    def oldest_made_at(self) -> float:
        """Tell when the oldest key in force was made; of entries that don't say, when their file was last changed."""
        self._renew()
        return self._keyring.oldest_made_at(self._changed_at)

    def identify(self, authorization: str | None, api_key: str | None) -> Caller:
        """Find out who is calling; see `Keyring.identify`."""
        self._renew()
        return self._keyring.identify(authorization, api_key)

    def _renew(self) -> None:
        now = self._clock()
        if now - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = now
        looks = self._look()
        if looks == self._looks and self._is_in_force:
            return
        # Until it was read: a disk that failed once must not keep a revoked key until somebody edits the file again.
        self._is_in_force = False
        try:
            self._keyring = Keyring.from_file(self._path, self._clock, self._buckets)
        except KeysFileInvalid as error:
            if (looks, str(error)) != (self._looks, self._why_refused):  # said once, however often it is read
                _log.error(
                    "the changed keys file is refused; the keys before it stay in force", extra={"reason": str(error)}
                )
            self._why_refused = str(error)
        else:
            self._is_in_force = True
            self._changed_at = _changed_at(looks)
            _log.info("the changed keys file is in force")
        finally:
            self._looks = looks

    def _look(self) -> "_Looks | None":
        """Tell one content from another, from outside; a swapped link shows another inode."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return _Looks(found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


class _Looks(NamedTuple):
    """What tells one content of a file from another, from outside."""

    device: int
    inode: int
    changed_at_ns: int
    size: int


def _changed_at(looks: _Looks | None) -> float:
    return math.nan if looks is None else looks.changed_at_ns / 1e9


class _Bucket:
    """A token bucket that holds a minute's quota and refills evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._tokens = float(per_minute)
        self._filled_at = clock()

    def hold(self, per_minute: int) -> None:
        """Hold another quota from now on, and be as full as before."""
        self._tokens *= per_minute / self._per_minute
        self._per_minute = per_minute

    def take(self) -> None:
        now = self._clock()
        per_second = self._per_minute / 60
        self._tokens = min(float(self._per_minute), self._tokens + (now - self._filled_at) * per_second)
        self._filled_at = now
        if self._tokens < 1:
            raise QuotaExceeded(
                f"This key's quota of {self._per_minute} frames a minute is used up; wait as long as Retry-After says.",
                retry_after_s=(1 - self._tokens) / per_second,
            )
        self._tokens -= 1
