"""What an operator does beside serving: make keys, sign and verify bundles, publish them to another store.

Each import of weight waits until its command runs. Exit codes: 0 done, 2 the caller's fault or one in its files.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from service.auth import KeyEntry

keys = typer.Typer(no_args_is_help=True, help="Keys of those who may call the service.")
bundle_commands = typer.Typer()

_CALLERS_FAULT = 2
_KEY_BYTES = 32
# So that scanners for secrets find a key that was committed by mistake.
_KEY_PREFIX = "flawline_"

BundleFolder = Annotated[Path, typer.Argument(help="One version: store/<name>/<version>.")]


@keys.callback()
def _about_keys() -> None:
    """Keep `new` a command of its own name, though it is the only one."""


@keys.command(
    epilog="""
Examples:

flawline keys new --name "press 4" --lines cap,bottle --actions inspect

flawline keys new --name "quality manager" --lines cap --actions inspect,choose,read

flawline keys new --name prometheus --actions metrics --keys-file keys.json
"""
)
def new(
    name: Annotated[str, typer.Option(help="Who gets it; logged, unlike the key.")],
    lines: Annotated[str, typer.Option(help="Lines that it covers, with commas; * covers all.")] = "*",
    actions: Annotated[str, typer.Option(help="inspect, choose, read, metrics, admin; with commas.")] = "inspect,read",
    quota_per_minute: Annotated[int | None, typer.Option(help="Frames a minute.", show_default="none")] = None,
    keys_file: Annotated[
        Path, typer.Option(envvar="FLAWLINE_KEYS_FILE", help="Receives its digest; made if absent.")
    ] = Path("keys.json"),
) -> None:
    """Make a key, print it once, and append its digest to the keys file; a running service takes it by itself."""
    from pydantic import ValidationError  # noqa: PLC0415 - see above

    from service.auth import KeyEntry, read_keys  # noqa: PLC0415 - see above

    key = _KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    with _faults_as_sentences():
        try:
            entry = KeyEntry.model_validate(
                {
                    "name": name,
                    "sha256": hashlib.sha256(key.encode()).hexdigest(),
                    "lines": _split(lines),
                    "actions": _split(actions),
                    "quota_per_minute": quota_per_minute,
                    "created_at": datetime.now(UTC).replace(microsecond=0),
                }
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise typer.BadParameter(f"{first['loc'][0]}: {first['msg']}.") from error
        entries = read_keys(keys_file) if keys_file.exists() else ()
        _replace(keys_file, json.dumps([_described(known) for known in (*entries, entry)], indent=2) + "\n")
    typer.echo(key)
    typer.echo(f"Give it to {name} now: {keys_file} holds its digest only, and it can't be shown again.", err=True)


@bundle_commands.command(epilog="Example:\n\nflawline sign store/bottle/3 --key private.pem")
def sign(
    bundle: BundleFolder,
    key: Annotated[Path, typer.Option(help="Private elliptic-curve key, a PEM file.")],
) -> None:
    """Sign a bundle: a signature of its manifest, which names the digest of every other file, is put beside it."""
    from service.contract.bundle import MANIFEST_FILE, load_bundle  # noqa: PLC0415 - see above
    from service.contract.signature import SIGNATURE_FILE, sign_manifest  # noqa: PLC0415 - see above

    with _faults_as_sentences():
        load_bundle(bundle)  # nobody puts a name to what does not hold
        signature = sign_manifest((bundle / MANIFEST_FILE).read_bytes(), key)
        # Written beside the version, where no reader looks, and put in by a rename.
        aside = bundle.resolve().parent / f".{bundle.resolve().name}-{SIGNATURE_FILE}"
        aside.write_bytes(signature)
        aside.rename(bundle / SIGNATURE_FILE)
    typer.echo(f"{bundle / SIGNATURE_FILE}")


@bundle_commands.command(epilog="Example:\n\nflawline verify store/bottle/3 --key public.pem")
def verify(
    bundle: BundleFolder,
    key: Annotated[
        Path | None,
        typer.Option(envvar="FLAWLINE_SIGNATURE_PUBLIC_KEY", help="Public key of whoever must have signed."),
    ] = None,
) -> None:
    """Verify a bundle as the service does: every digest, the graph, the policies, and with a key the signature."""
    from service.contract.bundle import load_bundle  # noqa: PLC0415 - see above
    from service.contract.signature import Trust, refuse_unusable  # noqa: PLC0415 - see above

    trust = None if key is None else Trust(key)
    with _faults_as_sentences():
        if trust is not None:
            refuse_unusable(trust)
        loaded = load_bundle(bundle, trust)
    told = "not asked for a signature" if trust is None else f"signed by the holder of {key}"
    manifest = loaded.manifest
    typer.echo(f"{manifest.name} {manifest.version} holds; {told}; digest {loaded.digest}; network {manifest.network}")


@bundle_commands.command(
    epilog="""
Examples:

flawline publish store/bottle/3 s3://bundles/plant-1

flawline publish store/bottle/3 s3://bundles --endpoint https://minio.plant:9000

flawline publish store/bottle/3 /srv/flawline/store
"""
)
def publish(
    bundle: BundleFolder,
    store: Annotated[str, typer.Argument(help="s3://bucket/prefix, or a directory.")],
    endpoint: Annotated[
        str | None, typer.Option(envvar="FLAWLINE_STORE_ENDPOINT", help="Of another service than Amazon's.")
    ] = None,
    region: Annotated[str, typer.Option(envvar="FLAWLINE_STORE_REGION", help="Of the bucket.")] = "us-east-1",
) -> None:
    """Put a verified bundle, with its signature, into the store that a service reads; nobody ever sees half of it."""
    from service.stores.objects import Location, Objects  # noqa: PLC0415 - see above
    from service.stores.publishing import publish_to_bucket, publish_to_directory  # noqa: PLC0415 - see above

    with _faults_as_sentences():
        if Location.is_meant_by(store):
            place = publish_to_bucket(bundle, Objects(Location(store, endpoint, region)), store)
        else:
            place = str(publish_to_directory(bundle, Path(store)))
    typer.echo(place)


@contextlib.contextmanager
def _faults_as_sentences() -> Iterator[None]:
    from service.auth import KeysFileInvalid  # noqa: PLC0415 - see above
    from service.contract.signature import SigningFailed  # noqa: PLC0415 - see above
    from service.errors import FlawlineError  # noqa: PLC0415 - see above
    from service.stores.publishing import PublishingRefused  # noqa: PLC0415 - see above

    try:
        yield
    except (FlawlineError, KeysFileInvalid, PublishingRefused, SigningFailed) as error:
        sentence = str(error)
    except OSError as error:
        sentence = f"{error.filename or 'A file'}: {error.strerror or error}."
    else:
        return
    typer.echo(sentence, err=True)
    raise typer.Exit(_CALLERS_FAULT)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _described(entry: "KeyEntry") -> dict[str, object]:
    return entry.model_dump(mode="json", exclude_none=True) | {"actions": sorted(entry.actions)}


def _replace(file: Path, text: str) -> None:
    """Write a file anew under another name and rename it, so that a service never reads half of it."""
    aside = file.with_name(f".{file.name}.new")
    # Whoever is writing at the same time has this name; the second one is told so rather than losing the first one's.
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
    try:
        with os.fdopen(descriptor, "w") as opened:
            opened.write(text)
        if file.exists():
            aside.chmod(file.stat().st_mode & 0o777)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
