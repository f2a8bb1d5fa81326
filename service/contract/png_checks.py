"""Whether a PNG is whole: each of its chunks as it was written, and every row there.

Every chunk of a PNG carries a checksum, and the last one says that it is the last. A decoder draws what inflates and
looks at neither once the pixels have begun: of a file whose end is zeros, as after a power cut or while it is still
being copied, it makes black rows and says nothing. So the checksums are computed, of which 6 gigabytes take a second:
a two-hundredth of what decoding takes.
(ISO/IEC 15948, sections 5.3 to 5.6, 8.2 and 10.)
"""

import struct
import zlib

from service.contract.png_chunks import chunks

_HEADER_AT = 16  # behind the length and the kind of the first chunk
_INTERLACED_AT = 28
# Adam7's passes as (first column, first row, column step, row step); section 8.2.
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_INFLATE_STEP_BYTES = 2**16


def chunks_are_sound(data: bytes) -> bool:
    """Tell whether every chunk has the bytes that its checksum was made of, down to the one that ends the file.

    Args:
        data: a file that a decoder has taken for a PNG; what follows its end is not looked at.
    """
    view = memoryview(data)
    for kind, start, end in chunks(data):
        if end + 4 > len(data) or zlib.crc32(view[start - 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return False
        if kind == b"IEND":
            return True
    return False


def holds_all_rows(data: bytes) -> bool:
    """Tell whether as many bytes are inflated as the size needs: a stream may be closed early, every checksum right.

    Args:
        data: a file that a decoder has taken for a PNG.
    """
    width, height, depth, colour_type = struct.unpack_from(">IIBB", data, _HEADER_AT)
    bits = depth * _SAMPLES[colour_type]
    passes = PASSES if data[_INTERLACED_AT] else ((0, 0, 1, 1),)
    missing = 0
    for left, top, step_x, step_y in passes:
        columns, rows = -(-(width - left) // step_x), -(-(height - top) // step_y)
        if columns > 0 and rows > 0:
            missing += rows * (1 + -(-columns * bits // 8))  # each row starts with its filter's byte
    inflater = zlib.decompressobj()
    for kind, start, end in chunks(data):
        if kind != b"IDAT":
            continue
        # By pieces: what the inflater has not taken yet is handed back as a copy each time.
        for at in range(start, min(end, len(data)), _INFLATE_STEP_BYTES):
            packed = data[at : min(at + _INFLATE_STEP_BYTES, end)]
            while packed and missing > 0 and not inflater.eof:
                missing -= len(inflater.decompress(packed, _INFLATE_STEP_BYTES))
                packed = inflater.unconsumed_tail
    return missing <= 0
