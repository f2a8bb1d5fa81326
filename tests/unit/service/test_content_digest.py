"""Promises of the digest that a body is sent with: what can't be checked is not taken for checked."""

from base64 import b64encode
from hashlib import sha256

import pytest
from starlette.datastructures import Headers

from service.errors import ParameterInvalid, UnreadableFrame
from service.routes.content_digest import demand_digest, told_digest

BODY = b"a frame"
DIGEST = sha256(BODY).digest()
TOLD = f"sha-256=:{b64encode(DIGEST).decode()}:"


@pytest.mark.parametrize(
    "value",
    [
        TOLD,
        f" {TOLD} ",
        f"sha-512=:AAAA:, {TOLD}",
        f"{TOLD},md5=:AAAA:",
        f"{TOLD};q=1",
        f"{TOLD}; q=0.5;of=body;strict;salt=:AA==:;on=?1, md5=:AAAA:;weak",
        f'md5=:AAAA:;note="a, \\"sha-256=:AAAA:\\"; b", {TOLD};note=""',
    ],
    ids=[
        "alone",
        "with blanks",
        "after another algorithm",
        "before another algorithm",
        "with a parameter",
        "with parameters of every kind",
        "with strings that hold separators",
    ],
)
def test_digest_when_it_is_told_then_is_read(value):
    """The one known algorithm is found among others."""
    assert told_digest(Headers({"content-digest": value})) == DIGEST.hex()


def test_digest_when_none_is_told_then_nothing_is_demanded():
    """Without the header every body is taken as it comes."""
    assert told_digest(Headers()) == ""
    demand_digest(BODY, "")


@pytest.mark.parametrize(
    "value",
    [
        "",
        "sha-512=:AAAA:",
        "sha-256=:AAAA:",
        "sha-256=:AAA:",
        f"sha-256={b64encode(DIGEST).decode()}",
        f"SHA-256=:{b64encode(DIGEST).decode()}:",
        f"sha-256=:{DIGEST.hex()}:",
        f"{TOLD}, {TOLD}",
        f"{TOLD}, nonsense",
        f"{TOLD};",
        f"{TOLD};Q=1",
        f"{TOLD} ;q=1",
        f'{TOLD};note="open',
        f'md5=:AAAA:;note="{TOLD}"',
        f"{TOLD},",
    ],
    ids=[
        "empty",
        "another algorithm",
        "too short",
        "no Base64",
        "no colons",
        "capitals",
        "hexadecimal",
        "twice",
        "with nonsense",
        "with an empty parameter",
        "with a parameter in capitals",
        "with a blank before a parameter",
        "with a string without an end",
        "in a string",
        "with nothing after a comma",
    ],
)
def test_digest_when_it_can_not_be_checked_then_is_refused(value):
    """Whoever sends a digest relies on it."""
    with pytest.raises(ParameterInvalid, match="Content-Digest: send sha-256"):
        told_digest(Headers({"content-digest": value}))


def test_body_when_it_is_another_than_was_sent_then_is_refused():
    """One changed byte is enough."""
    demand_digest(BODY, DIGEST.hex())
    with pytest.raises(UnreadableFrame, match="Content-Digest"):
        demand_digest(BODY.upper(), DIGEST.hex())
