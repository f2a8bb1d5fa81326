"""Whether another image follows in the bytes of a file: a decoder reads the first one and says nothing of it.

Two frames in one body, joined by a buffer that was not emptied or a script that appends, are one part judged and one
part lost. What else follows, such as padding or a maker's notes, costs no pixel and is left alone.
"""

import re
import struct

from service.contract.jpeg_segments import end_of_jpeg
from service.contract.png_chunks import chunks
from service.contract.tiff_layout import TiffPage

_PNG_CHECK_BYTES = 4
_BMP_INFO_AT = 14
# How the accepted formats begin. The two letters of a BMP alone are found in any data: the kind of its header follows.
_BEGINS = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|II[*+]\0|MM\0[*+]|RIFF....WEBPVP8|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    re.DOTALL,
)


def another_follows(data: bytes, image_format: str) -> bool:
    """Tell whether an image of any accepted format begins after the end of the first one.

    Args:
        data: the file.
        image_format: the first one's codec name.
    """
    end = _ENDS[image_format](data)
    return end < len(data) and _BEGINS.search(data, end) is not None


def _end_of_png(data: bytes) -> int:
    return max((end + _PNG_CHECK_BYTES for _, _, end in chunks(data)), default=len(data))


def _end_of_bmp(data: bytes) -> int:
    """Return where the pixels of a BMP end; its own word for the file's size is often wrong."""
    size, pixels_at, info_bytes = struct.unpack_from("<I4xII", data, 2)
    if info_bytes == 12:
        width, height, bits = struct.unpack_from("<HH2xH", data, _BMP_INFO_AT + 4)
        packing = packed_bytes = 0
    else:
        width, height, bits, packing, packed_bytes = struct.unpack_from("<ii2xHII", data, _BMP_INFO_AT + 4)
    if packing in (1, 2):  # run lengths, whose end their header tells
        return int(pixels_at + packed_bytes if packed_bytes else max(size, pixels_at))
    return int(pixels_at + (abs(width) * bits + 31) // 32 * 4 * abs(height))


def _end_of_webp(data: bytes) -> int:
    length = int.from_bytes(data[4:8], "little")
    return 8 + length + length % 2


_ENDS = {
    "PNG": _end_of_png,
    "JPEG": end_of_jpeg,
    "BMP": _end_of_bmp,
    "TIFF": lambda data: TiffPage(data).end,
    "WEBP": _end_of_webp,
}
