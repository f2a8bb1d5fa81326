"""Whether a TIFF's strips and tiles are whole, where its codec does not ask.

libtiff leaves black what is not listed, draws JPEGs to the end without their data, and stops inflating at the last
pixel, which is before the checksum (Adler-32, RFC 1950) that stands behind it. What it notices itself is left to it:
the end of LZW, Zstandard, LZMA and PackBits. Pixels without compression and those four have no checksum at all.
"""

import zlib

from service.contract.jpeg import PixelsMadeUp, demand_whole
from service.contract.jpeg_segments import has_all_scans
from service.contract.jpeg_zeros import holds_lost_stretch
from service.contract.tiff_layout import JPEG, Piece, TiffPage

_DEFLATE = frozenset({8, 32946})
_INFLATE_STEP_BYTES = 2**16
# Of JPEGs in a TIFF, of which there may be thousands.
_MOST_TABLE_BYTES, _MOST_SEGMENTS = 2**16, 96


def demand_whole_pieces(page: TiffPage) -> None:
    """Refuse a TIFF of which pieces are not listed, lost data, or are not what was written.

    Raises:
        PixelsMadeUp: if pixels are missing, and the codec would not say so.
        zlib.error: if a piece does not inflate to what its checksum was made of.
    """
    if not page.lists_all:
        raise PixelsMadeUp("A piece is missing.")
    if page.compression in _DEFLATE:
        for piece in page.pieces():
            _demand_inflated(piece)
    if page.compression == JPEG:
        if len(page.jpeg_tables) > _MOST_TABLE_BYTES:
            raise PixelsMadeUp("The tables are no tables.")
        for piece in page.pieces():
            _demand_whole_jpeg(piece, page.jpeg_tables)


def _demand_inflated(piece: Piece) -> None:
    """Inflate a piece to its checksum, at which zlib looks; it takes nearly as long as decoding."""
    inflater = zlib.decompressobj()
    left = piece.most_bytes
    for at in range(0, len(piece.data), _INFLATE_STEP_BYTES):
        packed = piece.data[at : at + _INFLATE_STEP_BYTES]
        while packed and not inflater.eof:
            left -= len(inflater.decompress(packed, _INFLATE_STEP_BYTES))
            if left < 0:
                raise PixelsMadeUp("A piece holds more than its pixels.")
            packed = inflater.unconsumed_tail
    if not inflater.eof:
        raise PixelsMadeUp("The end of a piece is missing.")


def _demand_whole_jpeg(piece: Piece, tables: bytes) -> None:
    # The tables come without pixels, as a JPEG of their own.
    whole = tables[:-2] + piece.data[2:] if tables else piece.data
    if not has_all_scans(whole, _MOST_SEGMENTS):
        raise PixelsMadeUp("A scan is missing.")
    if holds_lost_stretch(whole):
        raise PixelsMadeUp("A stretch is zeros.")
    demand_whole(whole, piece.height, piece.full_height, piece.width)
