"""Whether a stretch of a JPEG's pixels is zeros, as a lost block of a disk or a gap in what was sent leaves them.

A decoder draws zeros as well as any other bits, and where they run out together with the pixels it says nothing. They
are a picture only where zero bits alone mean that a block ends: then they are many blocks without a difference, as of a
black border. In the tables of most encoders, those of the standard's annex K among them, zero bits mean a coefficient
of -1 instead, and so long a stretch of nothing else is no picture.
(ITU-T T.81, sections B.2.4.2, C.2, F.1.2.2 and K.3.)
"""

from service.contract.jpeg_segments import START_OF_SCAN, segments

# Longer than what writers pad with, and shorter than what is lost at once: a disk's block, a packet.
_RUN = bytes(128)
_SEQUENTIAL, _CODE_TABLES = frozenset({0xC0, 0xC1}), 0xC4
_END_OF_BLOCK = 0
_MOST_TABLE_BYTES = 8 * (17 + 256)  # four tables of each class
_COUNTS_BYTES = 17  # the number of a table, and how many codes of each length it has


def holds_lost_stretch(data: bytes) -> bool:
    """Tell whether coded pixels are zeros for so long that no picture is coded so.

    Args:
        data: a file that a decoder has taken for a JPEG. Only of sequential ones there is something to tell.
    """
    if data.find(_RUN) < 0:
        return False
    shortest_codes: dict[int, int] = {}  # of each table of coefficients, what zero bits mean
    scan, is_sequential = -1, False
    for marker, start, end in segments(data):
        if scan >= 0 and data.find(_RUN, scan, start) >= 0:
            return True
        scan = -1
        if marker in _SEQUENTIAL:
            is_sequential = True
        elif marker == _CODE_TABLES:
            shortest_codes |= _shortest_codes(data[start:end])
        elif marker == START_OF_SCAN and is_sequential:
            tables = data[start + 2 : start + 1 + 2 * data[start] : 2]
            if any(shortest_codes.get(table & 15, _END_OF_BLOCK) != _END_OF_BLOCK for table in tables):
                scan = end
    return False


def _shortest_codes(segment: bytes) -> dict[int, int]:
    """Return what the code of zero bits alone means, in each table of coefficients that a segment holds."""
    found, at = dict[int, int](), 0
    while at + _COUNTS_BYTES < len(segment) and at < _MOST_TABLE_BYTES:
        if segment[at] >> 4 == 1:
            found[segment[at] & 15] = segment[at + _COUNTS_BYTES]
        at += _COUNTS_BYTES + sum(segment[at + 1 : at + _COUNTS_BYTES])
    return found
