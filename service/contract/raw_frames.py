"""Raw sensor bytes to RGB, for cameras that skip the encoder; pixel formats carry their GenICam (PFNC) names.

As the Pixel Format Naming Convention has it (EMVA, version 2.4):

- A number alone means unpacked: 10-, 12- and 16-bit values lie in the lower bits of little-endian 16-bit words, and the
  bits above are zero. A value that uses them is not of the format that was named, and is refused.
- `p` means packed without gaps, the least significant bit first: the first pixel begins in the lowest bit of the first
  byte. A row starts with a byte of its own here, so a width that does not fill whole bytes needs its stride named.
- A Bayer name tells the first two pixels of the first row: `BayerRG8` begins with red, then green.

Of deep pixels the upper eight bits are kept, which is the rule of `frames.py` for 16-bit files too. `Mono16` says of a
value no more than such a file does, so it is read as one: by the bits that frames of the line have (`bit_depth`), and a
value with more is refused. A format that names more bits than these is not of that camera, and refused as well.

Grey frames and those that need no change are views of the bytes that arrived, so nothing is copied before the resize.
"""

from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from service.contract.frames import DEEPEST_BITS, Frame, FrameLimits, to_rgb, too_deep
from service.errors import FrameTooLarge, ParameterInvalid, UnreadableFrame

PixelFormat = Literal[
    "Mono8",
    "Mono10",
    "Mono12",
    "Mono16",
    "Mono10p",
    "Mono12p",
    "BayerRG8",
    "BayerGR8",
    "BayerGB8",
    "BayerBG8",
    "RGB8",
    "BGR8",
]
PIXEL_FORMATS: tuple[PixelFormat, ...] = get_args(PixelFormat)

_BITS_PER_PIXEL: dict[PixelFormat, int] = {
    "Mono8": 8,
    "Mono10": 16,
    "Mono12": 16,
    "Mono16": 16,
    "Mono10p": 10,
    "Mono12p": 12,
    "BayerRG8": 8,
    "BayerGR8": 8,
    "BayerGB8": 8,
    "BayerBG8": 8,
    "RGB8": 24,
    "BGR8": 24,
}
# That the names promise; of Mono16 the line says it.
_DEPTH_BITS: dict[PixelFormat, int] = {"Mono10": 10, "Mono12": 12, "Mono10p": 10, "Mono12p": 12}
_MOSAICS: dict[PixelFormat, int] = {
    "BayerRG8": cv2.COLOR_BayerRGGB2RGB,
    "BayerGR8": cv2.COLOR_BayerGRBG2RGB,
    "BayerGB8": cv2.COLOR_BayerGBRG2RGB,
    "BayerBG8": cv2.COLOR_BayerBGGR2RGB,
}
# Of each pixel of a packed group: the byte that holds the lowest of its upper eight bits, and how far up they begin.
_PACKED: dict[PixelFormat, tuple[tuple[int, int], ...]] = {
    "Mono10p": ((0, 2), (1, 4), (2, 6), (4, 0)),
    "Mono12p": ((0, 4), (2, 0)),
}


def decode_raw(
    data: bytes,
    pixel_format: PixelFormat,
    width: int,
    height: int,
    stride: int | None,
    limits: FrameLimits,
    bit_depth: int = DEEPEST_BITS,
) -> Frame:
    """Turn raw sensor bytes into RGB, exactly.

    Args:
        data: `stride * height` bytes.
        pixel_format: GenICam name.
        width: pixels a row.
        height: rows.
        stride: bytes from one row to the next; None means that rows follow each other without padding.
        limits: byte and pixel bounds.
        bit_depth: how many bits the values of `Mono16` have, 8 to 16; the other deep formats may have no more.

    Raises:
        ParameterInvalid: if the format has more bits than `bit_depth`, the sizes are not positive, the stride is
            shorter than a row or missing where packed rows don't fill whole bytes, or a Bayer size is odd or below 4.
        FrameTooLarge: if bytes or pixels are over the limit.
        UnreadableFrame: if the byte count is not stride times height, or a value has more bits than its format, or
            than `bit_depth`.
    """
    _refuse_deeper(pixel_format, bit_depth)
    if width <= 0 or height <= 0:
        raise ParameterInvalid("Width and height must be positive.")
    if width * height > limits.max_pixels:
        raise FrameTooLarge(f"The frame has more than {limits.max_pixels} pixels; crop it or bin the sensor.")
    if len(data) > limits.max_bytes:
        raise FrameTooLarge(f"The frame has {len(data)} bytes and the limit is {limits.max_bytes}.")
    whole_bytes, spare_bits = divmod(width * _BITS_PER_PIXEL[pixel_format], 8)
    if spare_bits and stride is None:
        raise ParameterInvalid(f"{width} pixels of {pixel_format} don't fill whole bytes; name the stride of a row.")
    row_bytes = whole_bytes + bool(spare_bits)
    stride = row_bytes if stride is None else stride
    if stride < row_bytes:
        raise ParameterInvalid(f"The stride is {stride} bytes, but {width} pixels of {pixel_format} need {row_bytes}.")
    if len(data) != stride * height:
        raise UnreadableFrame(f"Stride times height is {stride * height} bytes, but {len(data)} arrived.")
    rows = np.frombuffer(data, np.uint8).reshape(height, stride)[:, :row_bytes]
    return Frame(_to_rgb(rows, pixel_format, width, height, bit_depth), height, width)


def _refuse_deeper(pixel_format: PixelFormat, bit_depth: int) -> None:
    """Refuse a format whose name promises more bits than frames of the line have."""
    depth = _DEPTH_BITS.get(pixel_format, 0)
    if depth > bit_depth:
        right = {8: "Mono8", 10: "Mono10"}.get(bit_depth, "Mono16")
        raise ParameterInvalid(
            f"Values of {pixel_format} have {depth} bits, and frames of this line have {bit_depth}; send {right}, or "
            "train with another input.bit_depth."
        )


def _to_rgb(
    rows: NDArray[np.uint8], pixel_format: PixelFormat, width: int, height: int, bit_depth: int
) -> NDArray[np.uint8]:
    if pixel_format in ("RGB8", "BGR8"):
        colours = np.ascontiguousarray(rows).reshape(height, width, 3)
        return colours if pixel_format == "RGB8" else np.asarray(cv2.cvtColor(colours, cv2.COLOR_BGR2RGB), np.uint8)
    if pixel_format in _MOSAICS:
        if width % 2 or height % 2 or width < 4 or height < 4:  # OpenCV paints smaller ones black
            raise ParameterInvalid(f"A {pixel_format} frame needs even width and height of at least 4.")
        mosaic = np.ascontiguousarray(rows)
        return np.asarray(cv2.cvtColor(mosaic, _MOSAICS[pixel_format]), dtype=np.uint8)
    if pixel_format in _PACKED:
        return to_rgb(_unpack(rows, _PACKED[pixel_format], width))
    return to_rgb(rows if pixel_format == "Mono8" else _upper_bits(rows, pixel_format, bit_depth))


def _upper_bits(rows: NDArray[np.uint8], pixel_format: PixelFormat, bit_depth: int) -> NDArray[np.uint8]:
    depth = _DEPTH_BITS.get(pixel_format, bit_depth)
    words = np.ascontiguousarray(rows).view("<u2")
    if depth < DEEPEST_BITS and int(words.max()) >> depth:
        if pixel_format == "Mono16":
            raise too_deep(depth)
        raise UnreadableFrame(f"A value has more than {depth} bits; the pixel format is not {pixel_format}.")
    return (words >> (depth - 8)).astype(np.uint8)


def _unpack(rows: NDArray[np.uint8], places: tuple[tuple[int, int], ...], width: int) -> NDArray[np.uint8]:
    """Return the upper eight bits of packed pixels, `(height, width)`."""
    height, row_bytes = rows.shape
    group_bytes = places[-1][0] + 1
    groups = -(-row_bytes // group_bytes)
    padded = np.zeros((height, groups * group_bytes), np.uint8)
    padded[:, :row_bytes] = rows
    taken = padded.reshape(height, groups, group_bytes)
    grey = np.empty((height, groups, len(places)), np.uint8)
    for pixel, (byte, up) in enumerate(places):
        grey[:, :, pixel] = taken[:, :, byte] >> up
        if up:
            grey[:, :, pixel] |= taken[:, :, byte + 1] << (8 - up)
    return grey.reshape(height, -1)[:, :width]
