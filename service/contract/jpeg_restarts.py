"""The restart markers of a JPEG: whether every stretch between them is there.

Cameras write restart markers so that a decoder can go on after damage, and so it does: it fills the stretch that is
lost with grey and says nothing. A defect there would be gone, and the part `PASS`. So the markers are counted: they
come in order, and there are as many as the frame's size asks for. Files without restart markers cost a look at their
head.
(ITU-T T.81, sections B.1 and E.1.4.)
"""

import struct

import numpy as np

from service.contract.jpeg_segments import END, FRAMES, MOST_SEGMENTS, START_OF_SCAN, segments

_RESTARTS, _RESTART_INTERVAL = bytes(range(0xD0, 0xD8)), 0xDD
_ONLY_RESTARTS = bytes(value if value in _RESTARTS else 0 for value in range(256))
_SEQUENTIAL = frozenset({0xC0, 0xC1})
_BLOCK = 8


def restarts_fit(data: bytes, *, closely: bool) -> bool:
    """Tell whether a JPEG has all of its restart markers, in order; True where it was written without.

    Args:
        data: a file that a decoder has taken for a JPEG.
        closely: whether to look for markers in a file that says it was written without, which takes longer.
    """
    interval, frame, kind = 0, b"", 0
    for marker, start, end in segments(data):
        if marker == _RESTART_INTERVAL and end - start >= 2:
            (interval,) = struct.unpack_from(">H", data, start)
        elif marker in FRAMES:
            frame, kind = data[start:end], marker
        elif marker == START_OF_SCAN:
            if interval == 0 and not closely:
                return True
            found = _markers(data, end)
            if kind in _SEQUENTIAL and end > start and data[start] == _components(frame):
                return _fit_one_scan(found, -(-_units(frame) // interval) - 1 if interval else 0)
            return _are_in_order(found, interval)
    return False


def _markers(data: bytes, begin: int) -> bytes:
    """Return the second bytes of all markers; of a large file there may be millions."""
    values = np.frombuffer(data, np.uint8, offset=min(begin, len(data)))
    first, second = values[:-1], values[1:]
    return bytes(second[(first == 0xFF) & (second != 0) & (second != 0xFF)])


def _fit_one_scan(found: bytes, wanted: int) -> bool:
    return found[: wanted + 1] == _count_on(wanted) + bytes([END])


def _are_in_order(found: bytes, interval: int) -> bool:
    """Tell whether the restarts of every scan count on from zero; how many a scan needs is not asked."""
    if interval == 0:
        return not any(restart in found for restart in _RESTARTS)
    marked = found.translate(_ONLY_RESTARTS)
    if marked.count(b"\0") > MOST_SEGMENTS:
        return False
    return all(scan == _count_on(len(scan)) for scan in marked.split(b"\0"))


def _count_on(count: int) -> bytes:
    return (_RESTARTS * (count // len(_RESTARTS) + 1))[:count]


def _components(frame: bytes) -> int:
    return frame[5] if len(frame) > 5 else 0


def _units(frame: bytes) -> int:
    """Return how many coded units a scan of all components has."""
    height, width, count = struct.unpack_from(">HHB", frame, 1)
    factors = [frame[7 + 3 * index] for index in range(count) if 7 + 3 * index < len(frame)]
    across, down = max((f >> 4 for f in factors), default=1), max((f & 15 for f in factors), default=1)
    if count == 1:  # a scan of one component is coded block by block
        across = down = 1
    return int(-(-width // (_BLOCK * max(1, across))) * -(-height // (_BLOCK * max(1, down))))
