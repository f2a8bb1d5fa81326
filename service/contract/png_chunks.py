"""The chunks of a PNG (ISO/IEC 15948, section 5.3)."""

import struct
from collections.abc import Iterator

_FIRST_AT = 8


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of each chunk's data in order, up to the end of the image or of the file.

    Args:
        data: a file that begins like a PNG.
    """
    at = _FIRST_AT
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at + 8, at + 8 + length
        if kind == b"IEND":
            return
        at += length + 12
