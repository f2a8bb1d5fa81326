"""The headers that callers give their wishes in: each says one thing, and so stands in a request once.

Which of two was meant would be a guess, and so would be what a caller is told of the part. Who joins two into one with
a comma, as proxies may, makes a value that fits no number, name, kind or key; in `X-Part-Id` and `X-View`, which may
hold any words, it comes back with the answer.
"""

from collections.abc import Iterable

from service.errors import ParameterInvalid
from service.open_inference import JSON_LENGTH_HEADER
from service.routes.problems import REQUEST_ID_HEADER

OPTION_HEADERS = {
    "part_id": "X-Part-Id",
    "view": "X-View",
    "sequence": "X-Sequence",
    "deadline_ms": "X-Deadline-Ms",
    "priority": "X-Priority",
    "heatmap": "X-Heatmap",
    "policy": "X-Policy",
    "bundle_version": "X-Bundle-Version",
}
CONTENT_DIGEST_HEADER = "Content-Digest"
RAW_HEADERS = {"pixel_format": "X-Pixel-Format", "width": "X-Width", "height": "X-Height", "stride": "X-Stride"}

_SINGLE = {
    name.lower().encode(): name
    for name in (
        "Authorization",
        CONTENT_DIGEST_HEADER,
        "Content-Type",
        "X-API-Key",
        JSON_LENGTH_HEADER,
        REQUEST_ID_HEADER,
        *OPTION_HEADERS.values(),
        *RAW_HEADERS.values(),
    )
}


def refuse_repeated(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Refuse headers of which one of ours stands there twice, with whatever values.

    Args:
        headers: names in small letters, and values.

    Raises:
        ParameterInvalid: if one does.
    """
    names = [name for name, _ in headers]
    if len(set(names)) == len(names):
        return
    for name, spelt in _SINGLE.items():
        if names.count(name) > 1:
            raise ParameterInvalid(f"{spelt}: stands there twice; send each header once.")
