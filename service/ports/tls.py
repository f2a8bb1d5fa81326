"""The server's certificate, and the authorities that callers must come from; `service/client.py` has the other side.

Files that are renewed, as cert-manager renews a mounted secret, are taken into use for new connections without a
restart. A renewed file that does not fit is refused aloud, and the certificate before it stays.
"""

import logging
import math
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger("flawline")


class TlsInvalid(ValueError):
    """The certificate files can't be used; the sentence says what is wrong."""


class ServerCertificate:
    """A certificate with its key, and who may call.

    Args:
        certificate: PEM file, the server's certificate first and its chain after it.
        key: PEM file of its private key.
        client_ca: PEM file of authorities; who shows no certificate of theirs gets no connection. None asks for none.

    Attributes:
        context: for a server; TLS 1.2 or newer.

    Raises:
        TlsInvalid: if a file can't be used.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._looks = self._look()
        self._why_refused: str | None = None
        self.context = self._make()
        self._expires_at = _expiry_of(certificate)

    def expires_at(self) -> float:
        """Tell when the certificate ends, in seconds since 1970; NaN where that can't be told."""
        return self._expires_at

    def renew(self) -> None:
        """Take changed files into use for connections from now on."""
        looks = self._look()
        if looks == self._looks and self._why_refused is None:
            return
        try:
            self._make()  # first aside: half a renewal must not reach the context in use
            self.context.load_cert_chain(self._certificate, self._key)
            if self._client_ca is not None:
                self.context.load_verify_locations(self._client_ca)
        except (TlsInvalid, OSError) as error:  # tried again: it may have been the disk
            if (looks, str(error)) != (self._looks, self._why_refused):
                _log.error("the renewed certificate is refused; the one before it stays", extra={"reason": str(error)})
            self._why_refused = str(error)
        else:
            self._why_refused = None
            self._expires_at = _expiry_of(self._certificate)
            _log.info("the renewed certificate is in use")
        self._looks = looks

    def _make(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._certificate, self._key)
            if self._client_ca is not None:
                context.load_verify_locations(self._client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            files = ", ".join(str(file) for file in (self._certificate, self._key, self._client_ca) if file is not None)
            said = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
            raise TlsInvalid(f"The TLS files {files} can't be used: {said}.") from error
        return context

    def _look(self) -> list[tuple[int, ...] | None]:
        return [_look_at(file) for file in (self._certificate, self._key, self._client_ca) if file is not None]


def _look_at(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _expiry_of(certificate: Path) -> float:
    """Read the end of a certificate's time; the standard library can, but says so nowhere."""
    decode = getattr(getattr(ssl, "_ssl", None), "_test_decode_cert", None)
    try:
        described: Mapping[str, Any] = {} if decode is None else decode(str(certificate))
        return float(ssl.cert_time_to_seconds(described["notAfter"]))
    except (KeyError, OSError, ValueError):  # without the metric is better than without the service
        return math.nan
