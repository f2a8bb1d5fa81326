"""Objects of an S3-compatible service: the only importer of `obstore`.

That library is one wheel without dependencies, keeps its own retries and time limits, and speaks conditional writes;
boto3 and s3fs bring forty to a hundred megabytes for the same five calls. It is imported when a store is first opened,
so that a service with a directory store needs no more than before.

Credentials come the library's usual way: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a web identity (AWS_ROLE_ARN and
AWS_WEB_IDENTITY_TOKEN_FILE, as Kubernetes mounts them), or the instance's or container's own role.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from service.errors import StoreUnreachable

if TYPE_CHECKING:
    from obstore.store import S3Store

_SCHEME = "s3://"
_CALL_TIMEOUT_S = 60
_CONNECT_TIMEOUT_S = 5
_RETRY_FOR_S = 20
_RETRIES = 3
_LISTED_AT_A_TIME = 1000
_LARGEST_LISTING = 1_000_000


@dataclass(frozen=True)
class Location:
    """Where objects lie.

    Attributes:
        url: s3://bucket/prefix.
        endpoint: of another service than Amazon's; None is Amazon's.
        region: of the bucket.
    """

    url: str
    endpoint: str | None = None
    region: str = "us-east-1"

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self.url.removeprefix(_SCHEME).partition("/")[0]

    @property
    def prefix(self) -> str:
        """What every object's key begins with, without slashes at its ends; may be empty."""
        return self.url.removeprefix(_SCHEME).partition("/")[2].strip("/")

    @staticmethod
    def is_meant_by(text: str) -> bool:
        """Tell whether a store's name is such a location rather than a directory."""
        return text.startswith(_SCHEME)


class Listed(NamedTuple):
    """One object of a listing.

    Attributes:
        key: below the location's prefix.
        size: bytes.
        tag: changes when the object does.
    """

    key: str
    size: int
    tag: str


class Objects:
    """The objects below a location.

    Args:
        location: where they are.

    Raises:
        StoreUnreachable: if the library is not installed, or the location can't be meant.
    """

    def __init__(self, location: Location) -> None:
        self._url = location.url
        self._store = _open(location)

    def list(self) -> list[Listed]:
        """List every object.

        Raises:
            StoreUnreachable: if the service does not answer or does not allow it.
        """
        found: list[Listed] = []
        try:
            for page in self._store.list(chunk_size=_LISTED_AT_A_TIME):
                found.extend(Listed(item["path"], item["size"], item["e_tag"] or "") for item in page)
                if len(found) > _LARGEST_LISTING:
                    raise StoreUnreachable(f"{self._url} holds more than {_LARGEST_LISTING} objects; name a prefix.")
        except _faults() as error:
            raise self._unreachable("can't be listed", error) from error
        return found

    def get(self, key: str, max_bytes: int) -> bytes:
        """Return an object's bytes.

        Raises:
            StoreUnreachable: if the service does not answer, or the object is gone or larger than it should be.
        """
        try:
            answer = self._store.get(key)
            if answer.meta["size"] > max_bytes:
                raise StoreUnreachable(f"{key} in {self._url} has more bytes than it was listed with.")
            return bytes(answer.bytes())
        except _faults() as error:
            raise self._unreachable(f"does not give {key}", error) from error

    def holds(self, key: str, data: bytes) -> bool:
        """Tell whether an object has exactly these bytes.

        Raises:
            StoreUnreachable: if the service does not answer, or the object is gone.
        """
        try:
            return int(self._store.head(key)["size"]) == len(data) and self.get(key, len(data)) == data
        except _faults() as error:
            raise self._unreachable(f"does not tell of {key}", error) from error

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object that is not there yet; of two writers one succeeds.

        Returns:
            False where there is one of this key already; it stays as it is.

        Raises:
            StoreUnreachable: if the service does not answer or does not allow it.
        """
        from obstore.exceptions import AlreadyExistsError, PreconditionError  # noqa: PLC0415 - see above

        try:
            # In one piece: only that is conditional with every service.
            self._store.put(key, data, mode="create", use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            return False
        except _faults() as error:
            raise self._unreachable(f"does not take {key}", error) from error
        return True

    def _unreachable(self, what: str, error: Exception) -> StoreUnreachable:
        return StoreUnreachable(f"{self._url} {what}: {_in_a_line(error)}")


def _open(location: Location) -> "S3Store":
    try:
        from obstore.store import S3Store  # noqa: PLC0415 - see above
    except ModuleNotFoundError as error:
        raise StoreUnreachable("The package obstore is not installed; pip install 'flawline[s3]'.") from error
    plain = (location.endpoint or "").startswith("http://")
    try:
        return S3Store(
            location.bucket,
            prefix=location.prefix or None,
            endpoint=location.endpoint,
            region=location.region,
            client_options={
                "allow_http": plain,
                "timeout": timedelta(seconds=_CALL_TIMEOUT_S),
                "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
            },
            retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_FOR_S)},
        )
    except _faults() as error:
        raise StoreUnreachable(f"{location.url} can't be opened: {_in_a_line(error)}") from error


def _faults() -> tuple[type[Exception], ...]:
    from obstore.exceptions import BaseError  # noqa: PLC0415 - see above

    return (BaseError, OSError, ValueError)


def _in_a_line(error: Exception) -> str:
    """Shorten what the library says: without the service's XML and its own internals."""
    said = str(error).partition("\n\nDebug source")[0].partition("<?xml")[0]
    return " ".join(said.split())[:300].rstrip(" :") + "."
