"""The chunks of a PNG, and how many there may be.

A chunk may hold nothing, and a compressed note a thousand times its size; codecs read each by itself. Encoders write a
chunk of pixels for every few kilobytes, at worst one a row, and a handful of notes; microscopes and cameras write a
plain note for each of their settings.
(ISO/IEC 15948, section 5.)
"""

import struct
from collections.abc import Iterator

from service.errors import UnreadableFrame

_FIRST_AT = 8
_MOST_CHUNKS, _MOST_NOTES, _MOST_PACKED_NOTES = 2**16, 4096, 256
_NOTE = 0x20  # in the first letter of a kind: a decoder may do without such a chunk
_PACKED_NOTES = frozenset({b"iCCP", b"zTXt", b"iTXt"})  # or may be


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of each chunk's data in order, up to the end of the image or of the file.

    Args:
        data: a file that begins like a PNG.

    Raises:
        UnreadableFrame: where there are more chunks than any encoder writes.
    """
    at, count, notes, packed_notes = _FIRST_AT, 0, 0, 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        count += 1
        notes += bool(kind[0] & _NOTE)
        packed_notes += kind in _PACKED_NOTES
        if count > _MOST_CHUNKS or notes > _MOST_NOTES or packed_notes > _MOST_PACKED_NOTES:
            raise UnreadableFrame(
                f"The PNG has more than {_MOST_CHUNKS} chunks, or {_MOST_NOTES} that are no pixels, or "
                f"{_MOST_PACKED_NOTES} that may be compressed notes; write it anew."
            )
        yield kind, at + 8, at + 8 + length
        if kind == b"IEND":
            return
        at += length + 12
