"""The digest that a body may be sent with: what came is what was sent, whatever its format notices (RFC 9530).

    Content-Digest: sha-256=:RBNvo1WzZ4oRRq0W9+hknpT7T8If536DEMBg9hyq/4o=:

SHA-256 alone is known here. Another algorithm beside it is no harm; alone it is refused, since whoever sends it would
take the body for checked.
"""

import base64
import binascii
import re
from collections.abc import AsyncGenerator, Mapping
from hashlib import sha256

from service.errors import ParameterInvalid
from service.inspection import digest_differs
from service.routes.headers import CONTENT_DIGEST_HEADER

_ALGORITHM = "sha-256"
# A byte sequence among the members of a dictionary, and what may be said of it, which nobody has given a meaning;
# RFC 9651, sections 3.1.2, 3.2 and 3.3.
_KEY = r"[a-z*][a-z0-9_.*-]*"
_STRING = r'"(?:[ !#-\[\]-~]|\\["\\])*"'
_PARAMETERS = rf'(?:;\x20*{_KEY}(?:=(?:{_STRING}|[^\s",;]+))?)*'
_MEMBER = re.compile(rf"({_KEY})=:([A-Za-z0-9+/=]*):{_PARAMETERS}")
_MEMBERS = re.compile(rf"\s*{_MEMBER.pattern}(?:\s*,\s*{_MEMBER.pattern})*\s*")


def told_digest(headers: Mapping[str, str]) -> str:
    """Return the SHA-256 that a body is sent with, in hexadecimal digits; empty where it is sent without.

    Args:
        headers: of a request, or of a part of a form.

    Raises:
        ParameterInvalid: if there is a digest that can't be read, or none of the known algorithm.
    """
    value = headers.get(CONTENT_DIGEST_HEADER)
    if value is None:
        return ""
    members = _MEMBER.findall(value) if _MEMBERS.fullmatch(value) else []
    told = [digest for algorithm, digest in members if algorithm == _ALGORITHM]
    try:
        digest = base64.b64decode(told[0], validate=True) if len(told) == 1 else b""
    except binascii.Error:
        digest = b""
    if len(digest) != sha256().digest_size:
        raise ParameterInvalid(
            f"{CONTENT_DIGEST_HEADER}: send {_ALGORITHM}=:...: once, with the 32 bytes of the SHA-256 in Base64."
        )
    return digest.hex()


def demand_digest(body: bytes, told: str) -> None:
    """Refuse a body that is not the one that was sent.

    Args:
        body: as it came, before any decompression.
        told: what `told_digest` has returned.

    Raises:
        UnreadableFrame: if its digest is another one.
    """
    if told and sha256(body).hexdigest() != told:
        raise digest_differs()


async def demand_digest_of(pieces: AsyncGenerator[bytes, None], told: str) -> AsyncGenerator[bytes, None]:
    """Pass the pieces of a body on, and behave as `demand_digest` at their end."""
    seen = sha256()
    async for piece in pieces:
        if told:
            seen.update(piece)
        yield piece
    if told and seen.hexdigest() != told:
        raise digest_differs()
