"""JPEG files in which nothing is amiss: the only importer of `simplejpeg`.

It is libjpeg-turbo, as in Pillow, and gives the same pixels, but as three bytes each at once, where Pillow keeps four
and takes them apart again: 5 megapixels take 15 instead of 39 ms, one at a quarter of its size 1.8 instead of 2.0. And
it tells where libjpeg makes up pixels, such as a stretch that is lost and filled with grey. A file of which it tells
that is left to Pillow, whose pixels are then looked at closely (`service/contract/frames.py`). Bytes too many before
the end, which cost no pixel, are not told of.
"""

from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray


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
    """
    height, width = wanted
    try:
        found_height, found_width, layout, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        if (found_height, found_width) != size or (layout == "Gray") != is_grey:
            return None
        pixels: NDArray[Any] = simplejpeg.decode_jpeg(
            data, "GRAY" if is_grey else "RGB", min_height=height, min_width=width, strict=True
        )
    except ValueError:
        return None
    pixels = pixels[:, :, 0] if is_grey else pixels
    return pixels if pixels.shape[:2] == wanted else None
