"""JPEG files in which nothing is amiss: the only importer of `simplejpeg`.

It is libjpeg-turbo, as in Pillow, and gives the same pixels, but as three bytes each at once, where Pillow keeps four
and takes them apart again: 5 megapixels take 15 instead of 39 ms, one at a quarter of its size 1.8 instead of 2.0. And
it tells where libjpeg makes up pixels, such as a stretch that is lost and filled with grey; such a file is refused. One
of which it tells something else is left to Pillow, whose pixels are then looked at closely
(`service/contract/frames.py`): a strange head, or a few bytes too many before the end, which cost no pixel and are
padding of whoever wrote the file.
"""

import re
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from service.contract.jpeg_segments import is_progressive

_MADE_UP = re.compile(r"Corrupt JPEG data|Premature end|Inconsistent progression")  # libjpeg's own words (jerror.h)
_TOO_MANY = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
_MOST_PADDING = 64
_LARGEST_UNIT = 32  # pixels on a side: a block of a component that is taken four times as coarse
_END = b"\xff\xd9"


class PixelsMadeUp(ValueError):
    """Data is missing or damaged, and libjpeg would draw something in its place."""


def decode_clean(
    data: bytes, size: tuple[int, int], wanted: tuple[int, int], *, is_grey: bool
) -> NDArray[np.uint8] | None:
    """Decode a JPEG of which no pixel has to be made up.

    Args:
        data: the file.
        size: `(height, width)` that were held against the limits; nothing larger is decoded.
        wanted: `(height, width)` at the scale that is wanted, 1/1, 1/2, 1/4 or 1/8, rounded up.
        is_grey: whether it has one channel.

    Returns:
        `(height, width)` or `(height, width, 3)` uint8; None where libjpeg warns of the file or can't read it, or
        finds another size or layout than was told.

    Raises:
        PixelsMadeUp: if libjpeg would mend what is lost.
    """
    height, width = wanted
    try:
        found_height, found_width, layout, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        if (found_height, found_width) != size or (layout == "Gray") != is_grey:
            return None
        pixels: NDArray[Any] = simplejpeg.decode_jpeg(
            data, "GRAY" if is_grey else "RGB", min_height=height, min_width=width, strict=True
        )
    except ValueError as error:
        if _is_mended(data, str(error)):
            raise PixelsMadeUp(str(error)) from error
        return None
    pixels = pixels[:, :, 0] if is_grey else pixels
    return pixels if pixels.shape[:2] == wanted else None


def demand_whole(data: bytes, height: int, most_height: int, width: int) -> None:
    """Refuse a JPEG inside of another file of which pixels are missing.

    Args:
        data: the JPEG with all its tables.
        height: rows that it has to hold at least.
        most_height: rows that it may hold.
        width: pixels that a row has to hold; here, too, there may be more that fill its last blocks.

    Raises:
        PixelsMadeUp: if it holds fewer or many more, or libjpeg warns of it or can't read it.
    """
    try:
        found_height, found_width, layout, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        fits_down = height <= found_height < most_height + _LARGEST_UNIT
        if not (fits_down and width <= found_width < width + _LARGEST_UNIT):
            raise PixelsMadeUp("The size is another one.")
        simplejpeg.decode_jpeg(data, "GRAY" if layout == "Gray" else "RGB", strict=True)
    except ValueError as error:
        raise PixelsMadeUp(str(error)) from error


def _is_mended(data: bytes, warning: str) -> bool:
    """Tell whether a warning, the first one of a file, means that pixels were made up."""
    surplus = _TOO_MANY.match(warning)
    if surplus is not None and not is_progressive(data):
        # Whoever pads writes one value, and not much of it; what is left of a damaged scan is neither.
        end, count = data.rfind(_END), int(surplus.group(1))
        return count > _MOST_PADDING or len(set(data[end - count : end])) != 1
    return _MADE_UP.match(warning) is not None
