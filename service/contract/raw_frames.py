"""Raw sensor bytes to RGB, for cameras that skip the encoder; pixel formats carry their GenICam (PFNC) names.

Unpacked formats only: 10-, 12- and 16-bit values lie in little-endian 16-bit words. Deep pixels keep their top 8 bits,
which is the rule of `frames.py` for 16-bit images too.
"""

from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from service.contract.frames import Frame, FrameLimits
from service.errors import FrameTooLarge, ParameterInvalid, UnreadableFrame

PixelFormat = Literal["Mono8", "Mono10", "Mono12", "Mono16", "BayerRG8", "RGB8", "BGR8"]
PIXEL_FORMATS: tuple[PixelFormat, ...] = get_args(PixelFormat)

_BYTES_PER_PIXEL: dict[PixelFormat, int] = {
    "Mono8": 1,
    "Mono10": 2,
    "Mono12": 2,
    "Mono16": 2,
    "BayerRG8": 1,
    "RGB8": 3,
    "BGR8": 3,
}
_DEPTH_BITS: dict[PixelFormat, int] = {"Mono10": 10, "Mono12": 12, "Mono16": 16}


def decode_raw(
    data: bytes, pixel_format: PixelFormat, width: int, height: int, stride: int | None, limits: FrameLimits
) -> Frame:
    """Turn raw sensor bytes into RGB, exactly.

    Args:
        data: `stride * height` bytes.
        pixel_format: GenICam name.
        width: pixels a row.
        height: rows.
        stride: bytes from one row to the next; None means that rows follow each other without padding.
        limits: byte and pixel bounds.

    Raises:
        ParameterInvalid: if the sizes are not positive, the stride is shorter than a row, or a Bayer size is odd or
            below 4.
        FrameTooLarge: if bytes or pixels are over the limit.
        UnreadableFrame: if the byte count is not stride times height, or a value has more bits than its format.
    """
    if width <= 0 or height <= 0:
        raise ParameterInvalid("Width and height must be positive.")
    if width * height > limits.max_pixels:
        raise FrameTooLarge(f"The frame has more than {limits.max_pixels} pixels; crop it or bin the sensor.")
    if len(data) > limits.max_bytes:
        raise FrameTooLarge(f"The frame has {len(data)} bytes and the limit is {limits.max_bytes}.")
    row_bytes = width * _BYTES_PER_PIXEL[pixel_format]
    stride = row_bytes if stride is None else stride
    if stride < row_bytes:
        raise ParameterInvalid(f"The stride is {stride} bytes, but {width} pixels of {pixel_format} need {row_bytes}.")
    if len(data) != stride * height:
        raise UnreadableFrame(f"Stride times height is {stride * height} bytes, but {len(data)} arrived.")
    rows = np.frombuffer(data, np.uint8).reshape(height, stride)[:, :row_bytes]
    return Frame(_to_rgb(np.ascontiguousarray(rows), pixel_format, width, height), height, width)


def _to_rgb(rows: NDArray[np.uint8], pixel_format: PixelFormat, width: int, height: int) -> NDArray[np.uint8]:
    if pixel_format in ("RGB8", "BGR8"):
        colours = rows.reshape(height, width, 3)
        return np.ascontiguousarray(colours if pixel_format == "RGB8" else colours[:, :, ::-1])
    if pixel_format == "BayerRG8":
        if width % 2 or height % 2 or width < 4 or height < 4:  # OpenCV paints smaller ones black
            raise ParameterInvalid("A BayerRG8 frame needs even width and height of at least 4.")
        # OpenCV's older names call this pattern "BG", after the second row's second pixel.
        return np.asarray(cv2.cvtColor(rows, cv2.COLOR_BayerRGGB2RGB), dtype=np.uint8)
    if pixel_format == "Mono8":
        return np.repeat(rows[:, :, None], 3, axis=2)
    depth = _DEPTH_BITS[pixel_format]
    words = rows.view("<u2")
    if depth < 16 and int(words.max()) >> depth:
        raise UnreadableFrame(f"A value has more than {depth} bits; the pixel format is not {pixel_format}.")
    grey = (words >> (depth - 8)).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)
