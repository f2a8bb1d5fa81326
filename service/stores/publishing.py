"""Puts a finished bundle into another store: a directory, or an S3-compatible bucket.

Nobody ever reads half of it. In a directory the version appears by a rename. In a bucket its manifest is written last,
and every object only where there is none of its key: of two publishers of one version the second is stopped at the
first file that differs, and their files can't mix. One that was cut short goes on when it is run again.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from service.contract.bundle import MANIFEST_DIGEST_FILE, MANIFEST_FILE, Bundle, load_bundle
from service.contract.signature import SIGNATURE_FILE
from service.errors import BundleRefused
from service.stores.objects import Objects

_TEMPORARY_PREFIX = ".publishing-"
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})


class PublishingRefused(ValueError):
    """The version can't be put there; the sentence says why."""


def publish_to_directory(path: Path, store: Path) -> Path:
    """Copy a bundle into a directory store, under its own name and version.

    Returns:
        Where it lies now.

    Raises:
        BundleRefused: if the bundle does not hold.
        PublishingRefused: if the version is there already.
    """
    bundle = load_bundle(path)
    final = store / bundle.manifest.name / bundle.manifest.version
    if final.exists():
        raise _taken(bundle, str(store))
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=final.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp makes it private, but the server may run as another user
        for relative, data in _files_of(bundle):
            target = temporary / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(final)
    except OSError as error:
        if error.errno in _TAKEN and final.exists():
            raise _taken(bundle, str(store)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def publish_to_bucket(path: Path, objects: Objects, url: str) -> str:
    """Upload a bundle, under its own name and version, its manifest last.

    Args:
        path: of the bundle.
        objects: of the bucket.
        url: of the bucket, for sentences.

    Returns:
        Where it lies now.

    Raises:
        BundleRefused: if the bundle does not hold.
        PublishingRefused: if the version is there already, or a file of it that differs.
        StoreUnreachable: if the bucket does not answer or does not allow it.
    """
    bundle = load_bundle(path)
    place = f"{bundle.manifest.name}/{bundle.manifest.version}"
    for relative, data in _files_of(bundle):
        if objects.put_new(f"{place}/{relative}", data):
            continue
        if relative == MANIFEST_FILE:
            raise _taken(bundle, url)
        if not objects.holds(f"{place}/{relative}", data):
            raise PublishingRefused(
                f"{place}/{relative} in {url} is another file, of a publisher that was there before; publish under a "
                "new version, or remove what it left where it never finished."
            )
    return f"{url.rstrip('/')}/{place}"


def _files_of(bundle: Bundle) -> list[tuple[str, bytes]]:
    """Return every file as it was verified, in the order in which they may be seen: the manifest comes last."""
    read = {name: (bundle.path / name) for name in (MANIFEST_DIGEST_FILE, SIGNATURE_FILE, MANIFEST_FILE)}
    verified = {name: bundle.files.get(name, bundle.model) for name in bundle.manifest.files}
    last = {name: file.read_bytes() for name, file in read.items() if file.exists()}
    if hashlib.sha256(last[MANIFEST_FILE]).hexdigest() != bundle.digest:
        raise BundleRefused(f"{MANIFEST_FILE} has changed while the bundle was read; publish it again.")
    return [*sorted(verified.items()), *last.items()]


def _taken(bundle: Bundle, store: str) -> PublishingRefused:
    return PublishingRefused(
        f"{store} has version {bundle.manifest.version} of {bundle.manifest.name} already, and versions never change; "
        "train or calibrate again to make a new one."
    )
