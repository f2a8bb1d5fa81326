"""How a JPEG is built: its segments, whether a scan is missing, and where it ends.

A progressive JPEG comes in scans that make each other's pixels finer, and other JPEGs may have a scan a component. A
decoder draws what is there: of a file that lost a scan, and was closed properly, it makes a coarse or a colourless
picture and says nothing. So the scans are held against what the frame's head asks for.
(ITU-T T.81, sections B.1, B.2 and G.1.1.1.)
"""

import re
from collections.abc import Iterator

START_OF_SCAN, END = 0xDA, 0xD9
FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA, 0xCB})
_PROGRESSIVE = frozenset({0xC2, 0xCA})
_COEFFICIENTS = 64
_UNSENT = 255  # more bits than any scan leaves open
MARKER = re.compile(rb"\xff([^\x00\xff])")
_WITH_SEGMENT = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # restarts have none; the end is found as well
_ENDING = re.compile(rb"\xff\xd9")  # which a pattern finds in a third of the time that `find` takes


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment in order; of a scan its head, and last the end of the image.

    Args:
        data: a file that a decoder has taken for a JPEG. Where it ends before its end marker, so do the segments.
    """
    at = 2
    while (match := _WITH_SEGMENT.search(data, at)) is not None:
        marker, at = match.group(1)[0], match.end()
        if marker == END:
            yield marker, at, at
            return
        if at + 2 > len(data):
            return
        start, end = at + 2, at + max(2, int.from_bytes(data[at : at + 2], "big"))
        yield marker, start, end
        at = end


def is_progressive(data: bytes) -> bool:
    """Tell whether a JPEG comes in scans that make each other finer."""
    return next((kind in _PROGRESSIVE for kind, _, _ in segments(data) if kind in FRAMES), False)


def has_all_scans(data: bytes) -> bool:
    """Tell whether every component of a JPEG is there, to the last bit of its last coefficient."""
    unsent: dict[int, bytearray] = {}  # of each component, how many bits of each coefficient are still to come
    by_bits = False
    for marker, start, end in segments(data):
        segment = data[start:end]
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
            if not by_bits and not any(map(any, unsent.values())):
                return True  # without a look for markers in all that follows
    return bool(unsent) and not any(map(any, unsent.values()))


def end_of_jpeg(data: bytes) -> int:
    """Return where a JPEG ends, thumbnails that lie in its segments included."""
    first = _ENDING.search(data)
    if first is None or first.end() == len(data):
        return len(data)
    return next((end for marker, _, end in segments(data) if marker == END), len(data))
