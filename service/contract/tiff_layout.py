"""Where the parts of a TIFF's first page lie; its pixels are the codec's business.

Only what is asked for: the pieces (strips or tiles) that hold the page, and where the page ends. Entries that run off
the file are left out, since the codec refuses them.

A directory may list more than any encoder writes, and a tile may be far larger than the image that it holds a corner
of: both cost a decoder time and memory that the image's own size says nothing of, and are refused.
(TIFF 6.0, sections 2, 7, 15 and 22; BigTIFF as libtiff has it.)
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from service.errors import FrameTooLarge, UnreadableFrame

UNCOMPRESSED, JPEG = 1, 7
_SEPARATE = 2  # planes, one after the other
_WHITE_IS_ZERO, _BLACK_IS_ZERO = 0, 1
_MOST_BITS_TURNED = 8  # of a grey value that a codec turns round where white is 0
_HIGHEST_FIRST = 1  # of the bits of a byte
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _BIT_ORDER, _ORIENTATION = 256, 257, 258, 259, 262, 266, 274
_STRIP_OFFSETS, _SAMPLES, _ROWS_PER_STRIP, _STRIP_COUNTS, _PLANES = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS = 322, 323, 324, 325
_JPEG_TABLES = 347
_FURTHER_DIRECTORIES = (34665, 34853, 40965, 330)  # EXIF, GPS, interoperability; last, smaller copies
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_UNSIGNED = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_TEXT = frozenset({1, 2, 7})  # and bytes of any meaning, which no codec takes apart
_MOST_DIRECTORIES, _MOST_ENTRIES, _MOST_PIECES = 8, 4096, 2**16
_MOST_NUMBERS = 2**18  # of all fields of a directory: a place and a size of each piece, and a palette, twice over
# Makers' own fields of a page, which are carried along as bytes; the profile of colours alone is taken apart.
_FIRST_PRIVATE, _COLOUR_PROFILE = 32768, 34675
# What strips and tiles may hold beyond the largest image: those at its lower and right border are padded.
_MOST_PADDING, _LEAST_PIXELS = 2, 2**22
# A page is in strips or in tiles. Of one that says both, one decoder reads these and another one those.
_OF_STRIPS = frozenset({_STRIP_OFFSETS, _STRIP_COUNTS})
_OF_TILES = frozenset({_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS})
_LAYOUT = _OF_STRIPS | _OF_TILES | {_WIDTH, _HEIGHT, _SAMPLES, _ROWS_PER_STRIP}
# What a number stands for. Decoders read it as another one, or as none, where it is of a kind that nobody writes.
_CODES = frozenset({_BITS, _COMPRESSION, _PHOTOMETRIC, _BIT_ORDER, _PLANES})
_KINDS_OF_CODES = frozenset({3, 4, 13, 16})
_KINDS_OF_LAYOUT = _KINDS_OF_CODES | {1}


class Piece(NamedTuple):
    """A strip or tile.

    Attributes:
        data: its bytes.
        height: rows that it holds at least.
        full_height: rows that others hold; some write as many into a last strip that needs fewer.
        width: pixels a row.
        most_bytes: that `full_height` rows take without compression.
    """

    data: bytes
    height: int
    full_height: int
    width: int
    most_bytes: int


class _Entry(NamedTuple):
    """A field of a directory: its type, and where the bytes of its values lie."""

    kind: int
    start: int
    end: int


class TiffPage:
    """The first page of a TIFF.

    Args:
        data: a file that begins like a TIFF.

    Raises:
        UnreadableFrame: if it lists more than any encoder writes, or contradicts itself.

    Attributes:
        compression: the number of its method.
        end: of all that belongs to the page.
        padded_pixels: of all of its strips or tiles, of one plane.
        lists_all: whether as many pieces are listed as its size needs; a codec leaves black what is not.
        jpeg_tables: that its JPEG pieces share; empty where there are none.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._order = "<" if data[:2] == b"II" else ">"
        self._is_big = self._number(data[2:4], "H") == 43
        self.end = 16 if self._is_big else 8
        if self._is_big and self._order == ">":
            raise UnreadableFrame("A BigTIFF can be read in little-endian order alone; write it in that.")
        first = self._number(data[8:16], "Q") if self._is_big else self._number(data[4:8], "I")
        self._page = self._read_directory(first, is_page=True)
        self._measure_further(self._page)
        self._demand_one_layout()
        self.compression = self._one(_COMPRESSION, UNCOMPRESSED)
        self.jpeg_tables = self._bytes(self._page.get(_JPEG_TABLES))
        self._is_tiled = is_tiled = _TILE_OFFSETS in self._page
        offsets = self._all(_TILE_OFFSETS if is_tiled else _STRIP_OFFSETS)
        counts = self._all(_TILE_COUNTS if is_tiled else _STRIP_COUNTS)
        width, self._height = self._one(_WIDTH, 0), self._one(_HEIGHT, 0)
        self._is_separate = self._one(_PLANES, 1) == _SEPARATE
        samples = self._one(_SAMPLES, 1)
        planes = samples if self._is_separate else 1
        most_pieces = max(_MOST_PIECES, self._height * planes)  # as there are writers that give each row a strip
        if max(len(offsets), len(counts)) > most_pieces:
            raise UnreadableFrame(f"The TIFF has more than {most_pieces} strips or tiles; write it in larger ones.")
        if is_tiled:
            self._rows, self._columns = max(1, self._one(_TILE_HEIGHT, 0)), max(1, self._one(_TILE_WIDTH, 0))
        else:
            self._rows, self._columns = max(1, min(self._one(_ROWS_PER_STRIP, self._height), self._height)), width
        self._each = max(1, -(-self._height // self._rows))  # of a plane, from top to bottom
        self._bits = max(self._all(_BITS)[:samples], default=1)
        row_bytes = -(-self._columns * (1 if self._is_separate else samples) * self._bits // 8)
        self._piece_bytes = self._rows * row_bytes
        each_row = -(-width // max(1, self._columns))
        self.padded_pixels = self._each * self._rows * each_row * self._columns
        self._needed = planes * self._each * each_row
        self._listed = len(offsets)
        self._places = list(zip(offsets, counts, strict=False))
        self.end = max([self.end, *(offset + count for offset, count in self._places)])
        self.lists_all = len(self._places) >= self._needed
        if self.compression == UNCOMPRESSED:  # of which the codec asks the size alone, and not the counts
            self.lists_all = len(offsets) >= self._needed
            needed = enumerate(offsets[: self._needed])
            self.end = max([self.end, *(offset + row_bytes * self._rows_of(index) for index, offset in needed)])

    def demand_modest(self, max_pixels: int) -> None:
        """Refuse strips or tiles that are far larger than an image may be.

        Raises:
            FrameTooLarge: if all of them together hold many more pixels than `max_pixels`.
            UnreadableFrame: if they lie over each other, so that the same bytes would be decoded again and again.
        """
        if self.padded_pixels > max(_MOST_PADDING * max_pixels, _LEAST_PIXELS):
            raise FrameTooLarge(
                f"The TIFF's strips or tiles hold far more than {max_pixels} pixels; write it in smaller ones."
            )
        packed_bytes = sum(count for _, count in self._places[: self._needed])
        if self.compression != UNCOMPRESSED and packed_bytes > len(self._data):
            raise UnreadableFrame("The TIFF's strips or tiles lie over each other; write it anew.")

    def demand_read_as_written(self) -> None:
        """Refuse pixels that Pillow takes for others than were written.

        Of grey of more than 8 bits it passes over whether white is 0, which it is where the file does not say, so that
        the frame comes out as its own negative.

        Without compression it reads pixels by itself. Of planes it reads bytes, whatever they hold: half of 16 bits,
        and each as it is. Of a tile at the right border it goes on by a row's bits, without those that fill up the last
        byte. Pieces that are not needed it draws over those that are. All of that goes without a word, and part of the
        image is never seen.

        Raises:
            UnreadableFrame: if it is one of these.
        """
        depths = set(self._all(_BITS)) or {1}
        tone = self._one(_PHOTOMETRIC, _WHITE_IS_ZERO)
        if tone == _WHITE_IS_ZERO and max(depths) > _MOST_BITS_TURNED:
            raise UnreadableFrame(
                "White is 0 in this TIFF of more than 8 bits, or nothing says what is; write black as 0, or a PNG."
            )
        if self.compression != UNCOMPRESSED:
            return
        is_plain = (depths == {8} and tone != _WHITE_IS_ZERO) or (depths == {1} and tone == _BLACK_IS_ZERO)
        if self._is_separate and not (is_plain and self._one(_BIT_ORDER, _HIGHEST_FIRST) == _HIGHEST_FIRST):
            raise UnreadableFrame(
                "Of a TIFF of separate planes without compression only samples of 8 bits, black as 0, can be read; "
                "write it with interleaved samples, compressed, or as PNG."
            )
        if self._is_tiled and self._columns * self._bits % 8:
            raise UnreadableFrame("The rows of the TIFF's tiles are no whole bytes; write tiles of 16 columns or more.")
        if self._listed > self._needed:
            raise _contradicts_itself()

    def as_stored(self) -> bytes:
        """Return the file without a note that turns it: of all formats a TIFF alone is turned by its codec."""
        entry = self._page.get(_ORIENTATION)
        if entry is None or not (turns := self._values(entry)) or set(turns) == {1}:
            return self._data
        upright = struct.pack(f"{self._order}{len(turns)}{_UNSIGNED[entry.kind]}", *(1 for _ in turns))
        return self._data[: entry.start] + upright + self._data[entry.start + len(upright) :]

    def pieces(self) -> Iterator[Piece]:
        """Yield strips or tiles as far as the page needs them, those of every plane included."""
        for index, (offset, count) in enumerate(self._places[: self._needed]):
            data = self._data[offset : offset + count]
            yield Piece(data, self._rows_of(index), self._rows, self._columns, self._piece_bytes)

    def _rows_of(self, index: int) -> int:
        """Return how many rows a strip or tile holds; the last strip of a plane may hold fewer than others."""
        return self._rows if self._is_tiled else min(self._rows, self._height - index % self._each * self._rows)

    def _number(self, data: bytes, letter: str) -> int:
        size = struct.calcsize("=" + letter)
        return int(struct.unpack(self._order + letter, data[:size].ljust(size, b"\0"))[0])

    def _read_directory(self, at: int, *, is_page: bool) -> dict[int, _Entry]:
        head, each, value = (8, 20, 8) if self._is_big else (2, 12, 4)
        told = self._number(self._data[at : at + head], "Q" if self._is_big else "H")
        count = min(told, max(0, len(self._data) - at - head) // each)
        if count > _MOST_ENTRIES:
            raise _too_long()
        entries: dict[int, _Entry] = {}
        numbers = field_bytes = 0
        for place in range(at + head, at + head + count * each, each):
            entry = self._data[place : place + each]
            tag, kind = self._number(entry, "H"), self._number(entry[2:], "H")
            values = self._number(entry[4:], "Q" if self._is_big else "I")
            size = values * _TYPE_BYTES.get(kind, 1)
            inside = place + each - value
            start = inside if size <= value else self._number(entry[-value:], "Q" if self._is_big else "I")
            if start + size <= len(self._data):
                is_carried = kind in _TEXT or (is_page and _is_private(tag))
                numbers += 0 if is_carried else values
                if tag not in entries:
                    entries[tag] = _Entry(kind, start, start + size)
                    field_bytes += size
                self.end = max(self.end, start + size)
        # Fields that lie over each other may hold more than the file, and then Pillow leaves out the last ones.
        if numbers > _MOST_NUMBERS or field_bytes > len(self._data):
            raise _too_long()
        self.end = max(self.end, min(len(self._data), at + head + told * each + value))
        return entries

    def _demand_one_layout(self) -> None:
        """Refuse a page in strips and tiles, and one whose layout has values of which decoders think differently."""
        is_read = all(
            entry.kind in (_KINDS_OF_CODES if tag in _CODES else _KINDS_OF_LAYOUT)
            for tag, entry in self._page.items()
            if tag in _LAYOUT | _CODES
        )
        if not is_read or (_OF_STRIPS & self._page.keys() and _OF_TILES & self._page.keys()):
            raise _contradicts_itself()

    def _measure_further(self, directory: dict[int, _Entry]) -> None:
        """Count directories that this one names as parts of the page."""
        waiting, seen = [directory], set[int]()
        while waiting:
            entries = waiting.pop()
            for tag in _FURTHER_DIRECTORIES:
                for at in self._values(entries.get(tag)):
                    if at not in seen and 0 < at < len(self._data) and len(seen) < _MOST_DIRECTORIES:
                        seen.add(at)
                        waiting.append(self._read_directory(at, is_page=False))

    def _bytes(self, entry: _Entry | None) -> bytes:
        return b"" if entry is None else self._data[entry.start : entry.end]

    def _values(self, entry: _Entry | None) -> tuple[int, ...]:
        if entry is None or entry.kind not in _UNSIGNED:
            return ()
        data, letter = self._bytes(entry), _UNSIGNED[entry.kind]
        values: tuple[int, ...] = struct.unpack(
            f"{self._order}{len(data) // struct.calcsize('=' + letter)}{letter}", data
        )
        return values

    def _all(self, tag: int) -> tuple[int, ...]:
        return self._values(self._page.get(tag))

    def _one(self, tag: int, absent: int) -> int:
        return next(iter(self._all(tag)), absent)


def _is_private(tag: int) -> bool:
    return tag >= _FIRST_PRIVATE and tag not in (*_FURTHER_DIRECTORIES, _COLOUR_PROFILE)


def _too_long() -> UnreadableFrame:
    return UnreadableFrame("The TIFF's directory is longer than that of any picture; leave out what is no picture.")


def _contradicts_itself() -> UnreadableFrame:
    return UnreadableFrame("The TIFF contradicts itself about its strips or tiles; write it anew.")
