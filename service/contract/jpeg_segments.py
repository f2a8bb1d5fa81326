"""How a JPEG is built: its segments, whether a scan is missing, where it ends, and how much work it asks for.

A progressive JPEG comes in scans that make each other's pixels finer, and other JPEGs may have a scan a component. A
decoder draws what is there: of a file that lost a scan, and was closed properly, it makes a coarse or a colourless
picture and says nothing. So the scans are held against what the frame's head asks for.

Each scan is a pass over all pixels, and may be a hundred bytes; a segment may be four, and codecs walk them one by one.
So a small file can ask for minutes of work. Encoders write ten scans, of which those that search for the best cut make
a few more, and some dozen segments, or a few hundred where a camera puts measured values beside the picture.
(ITU-T T.81, sections B.1, B.2 and G.1.1.1.)
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from service.errors import UnreadableFrame

START_OF_SCAN, END = 0xDA, 0xD9
FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA, 0xCB})
_PROGRESSIVE = frozenset({0xC2, 0xCA})
_ARITHMETIC = frozenset({0xC9, 0xCA, 0xCB})
_COEFFICIENTS = 64
_UNSENT = 255  # more bits than any scan leaves open
MOST_SEGMENTS = 4096
_MOST_SCANS, _MOST_FILLING = 32, 4096
# What a decoder has no use for: EXIF, profiles, thumbnails, comments. JFIF's and Adobe's segment name the colours.
_NOTES = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
_WITH_SEGMENT = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # restarts have none; the end is found as well
_ENDING = re.compile(rb"\xff\xd9")  # which a pattern finds in a third of the time that `find` takes
_BASELINE = 0xC0
_JFIF, _JFIF_BYTES = 0xE0, 14
# What a plain head holds beside the frame's and the scan's own: quantisation, codes, the restart interval.
_TABLES = frozenset({0xDB, 0xC4, 0xDD})
_MOST_PLAIN_SEGMENTS = 32


class PlainHead(NamedTuple):
    """What the head of a JPEG says.

    Attributes:
        height: pixels.
        width: pixels.
        is_grey: whether it has one component, and not three.
    """

    height: int
    width: int
    is_grey: bool


def plain_head(data: bytes) -> PlainHead | None:
    """Read the head of a JPEG as nearly all are written: baseline, one scan of all components, no notes, no padding.

    Args:
        data: a file that begins like a JPEG.

    Returns:
        None where it is written in any other way, or its head is damaged.
    """
    at, frame = 2, b""
    for _ in range(_MOST_PLAIN_SEGMENTS):
        start = at + 4
        lead = data[at:start]
        if len(lead) < 4 or lead[0] != 0xFF:
            return None
        marker, at = lead[1], at + 2 + int.from_bytes(lead[2:], "big")
        if marker in _TABLES or (marker == _JFIF and at >= start + _JFIF_BYTES):
            continue
        if marker == START_OF_SCAN:
            return _plain(frame, data[start:at])
        if marker != _BASELINE or frame:
            return None
        frame = data[start:at]
    return None


def _plain(frame: bytes, scan: bytes) -> PlainHead | None:
    """Return what the head of a frame says, if it is whole and the scan one of all of its components."""
    count = (len(frame) - 6) // 3
    if count not in (1, 3) or len(frame) != 6 + 3 * count or len(scan) != 4 + 2 * count:
        return None
    components, height, width = frame[6::3], int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    has_all = frame[5] == scan[0] == count == len(set(components)) and scan[1 : 1 + 2 * count : 2] == components
    is_whole = has_all and frame[0] == 8 and height > 0 and width > 0  # bits of a value
    return PlainHead(height, width, count == 1) if is_whole else None


def segments(data: bytes, most: int = MOST_SEGMENTS) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment in order; of a scan its head, and last the end of the image.

    Args:
        data: a file that begins like a JPEG. Where it ends before its end marker, so do the segments.
        most: how many segments it may have.

    Raises:
        UnreadableFrame: where there are more scans or segments than any encoder writes.
    """
    at, scans = 2, 0
    for _ in range(most):
        match = _WITH_SEGMENT.search(data, at)
        if match is None:
            return
        marker, at = match.group(1)[0], match.end()
        if marker == END:
            yield marker, at, at
            return
        if at + 2 > len(data):
            return
        if marker == START_OF_SCAN:
            scans += 1
            if scans > _MOST_SCANS:
                raise UnreadableFrame(f"The JPEG has more than {_MOST_SCANS} scans; send it in one, as baseline.")
        start, end = at + 2, at + max(2, int.from_bytes(data[at : at + 2], "big"))
        yield marker, start, end
        at = end
    raise UnreadableFrame(f"The JPEG has more than {most} segments; leave out what is no picture.")


def without_notes(data: bytes) -> bytes:
    """Return a JPEG without what says nothing of its pixels; the file itself where there is no such thing.

    Codecs read all of that, some at great length, before a size can be held against a limit.

    Args:
        data: a file that begins like a JPEG.

    Raises:
        UnreadableFrame: if its head holds more between segments than padding, or as `segments` says.
    """
    kept, begin, at, filling = list[bytes](), 0, 2, 0
    for marker, start, end in segments(data):
        if marker in (START_OF_SCAN, END):
            break
        filling += start - 4 - at
        if filling > _MOST_FILLING:
            raise UnreadableFrame("The JPEG is padded without end; send it as the camera wrote it.")
        if marker in _NOTES:
            kept.append(data[begin : start - 4])
            begin = end
        at = end
    return b"".join([*kept, data[begin:]]) if kept else data


def is_progressive(data: bytes) -> bool:
    """Tell whether a JPEG comes in scans that make each other finer."""
    return next((kind in _PROGRESSIVE for kind, _, _ in segments(data) if kind in FRAMES), False)


def has_all_scans(data: bytes, most_segments: int = MOST_SEGMENTS) -> bool:
    """Tell whether every component of a JPEG is there, to the last bit of its last coefficient.

    Raises:
        UnreadableFrame: as `segments` does, and if it is coded arithmetically, where libjpeg reads zeros once the data
            has ended and says nothing.
    """
    unsent: dict[int, bytearray] = {}  # of each component, how many bits of each coefficient are still to come
    by_bits = False
    for marker, start, end in segments(data, most_segments):
        segment = data[start:end]
        if marker in _ARITHMETIC:
            raise UnreadableFrame("Lost data can't be noticed in an arithmetically coded JPEG; send it Huffman coded.")
        if marker in FRAMES and len(segment) >= 6:
            by_bits = marker in _PROGRESSIVE
            unsent = {component: bytearray([_UNSENT]) * _COEFFICIENTS for component in segment[6::3][: segment[5]]}
        elif marker == START_OF_SCAN and segment and len(segment) >= 4 + 2 * segment[0]:
            first, last, bits = segment[1 + 2 * segment[0] :][:3]
            if not by_bits:
                first, last, bits = 0, _COEFFICIENTS - 1, 0
            for component in segment[1 : 1 + 2 * segment[0] : 2]:
                if component in unsent:
                    unsent[component][first : last + 1] = bytes([bits & 15]) * (last + 1 - first)
            if not by_bits and segment[0] == len(unsent) and not any(map(any, unsent.values())):
                return True  # of one scan, without a look for markers in all that follows
    return bool(unsent) and not any(map(any, unsent.values()))


def end_of_jpeg(data: bytes) -> int:
    """Return where a JPEG ends, thumbnails that lie in its segments included."""
    first = _ENDING.search(data)
    if first is None or first.end() == len(data):
        return len(data)
    return next((end for marker, _, end in segments(data) if marker == END), len(data))
