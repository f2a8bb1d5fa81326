"""Signatures of bundles: the only importer of `model_signing`, the library of the OpenSSF.

What is signed is `manifest.json`. It names the SHA-256 of every other file, so that whoever signs it signs them all,
and the very bytes that a signature was checked against are the ones that are parsed. The signature lies beside it as
`model.sig`, which the manifest doesn't name. Plans under `engines/` are built on the target and are not signed; they
are checked against the verified graph.

Keys are elliptic-curve keys in PEM files (P-256, P-384 or P-521), and nothing here ever asks a network. The library is
imported when it is first needed: it brings much that a service without signatures has no use for.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from service.errors import BundleRefused

SIGNATURE_FILE = "model.sig"
MAX_SIGNATURE_BYTES = 2**20

_SIGNED_FILE = "manifest.json"
_INSTALL = "The package model-signing is not installed; pip install 'flawline[signing]'."


class SigningFailed(ValueError):
    """Nothing can be signed, or no signature checked, with this key here; the sentence says why."""


@dataclass(frozen=True)
class Trust:
    """Whose bundles are taken.

    Attributes:
        public_key: PEM file of the key that signatures are checked with.
        required: refuse bundles without a signature; else only wrong ones are.
    """

    public_key: Path
    required: bool = True


def refuse_unsigned(manifest: bytes, signature: bytes | None, trust: Trust) -> None:
    """Insist on the signature of a bundle.

    Args:
        manifest: bytes of `manifest.json`, as they are parsed afterwards.
        signature: bytes of `model.sig`, or None where there is none.
        trust: whose signature counts.

    Raises:
        BundleRefused: if the signature is missing though required, of another key, or of another manifest.
    """
    if signature is None:
        if not trust.required:
            return
        raise BundleRefused("The bundle is not signed, and this service asks for it; flawline sign BUNDLE --key KEY.")
    try:
        library = _library()
        verifier = library.verifying.Config().use_elliptic_key_verifier(public_key=trust.public_key)
    except Exception as error:
        raise BundleRefused(_key_fault("public", trust.public_key, error)) from error
    with tempfile.TemporaryDirectory(prefix="flawline-signature-") as folder:
        # The library reads files; a copy of our own, so that nobody changes it between the check and the parsing.
        signed, sealed = Path(folder, _SIGNED_FILE), Path(folder, SIGNATURE_FILE)
        signed.write_bytes(manifest)
        sealed.write_bytes(signature)
        try:
            verifier.set_hashing_config(library.hashing.Config()).verify(signed, sealed)
        except Exception as error:  # a file that is no signature makes the library raise all kinds
            raise BundleRefused(
                f"{SIGNATURE_FILE} is no signature of this {_SIGNED_FILE} by the key that is trusted here; sign the "
                "bundle again, or look at who changed it."
            ) from error


def sign_manifest(manifest: bytes, private_key: Path) -> bytes:
    """Return the bytes of `model.sig`.

    Args:
        manifest: bytes of `manifest.json`.
        private_key: PEM file, not encrypted.

    Raises:
        SigningFailed: if the key can't be used, or the library is not installed.
    """
    try:
        signer = _library().signing.Config().use_elliptic_key_signer(private_key=private_key)
    except Exception as error:
        raise SigningFailed(_key_fault("private", private_key, error)) from error
    with tempfile.TemporaryDirectory(prefix="flawline-signature-") as folder:
        signed, sealed = Path(folder, _SIGNED_FILE), Path(folder, SIGNATURE_FILE)
        signed.write_bytes(manifest)
        signer.sign(signed, sealed)
        return sealed.read_bytes()


def refuse_unusable(trust: Trust) -> None:
    """Look at the public key and the library once, at the start, rather than at the first bundle.

    Raises:
        SigningFailed: if signatures could not be checked.
    """
    try:
        _library().verifying.Config().use_elliptic_key_verifier(public_key=trust.public_key)
    except Exception as error:
        raise SigningFailed(_key_fault("public", trust.public_key, error)) from error


def _library() -> Any:
    import model_signing.hashing  # noqa: PLC0415 - see above
    import model_signing.signing  # noqa: PLC0415 - see above
    import model_signing.verifying  # noqa: PLC0415 - see above

    library: ModuleType = model_signing
    return library


def _key_fault(kind: str, file: Path, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return _INSTALL
    if isinstance(error, OSError):
        return f"The {kind} key {file} can't be read: {error.strerror}."
    return (
        f"{file} is no {kind} key that can be used; make a pair with `openssl ecparam -name prime256v1 -genkey -noout "
        "-out private.pem` and `openssl ec -in private.pem -pubout -out public.pem`."
    )
