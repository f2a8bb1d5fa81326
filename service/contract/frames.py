"""The one door to the image codec and the one resize; training and service read every pixel through it.

A threshold only means the same in both places if both see the same pixels, so there is one decoder, with one rule for
scaled JPEG decoding, and one resize. Pixel rules:

- Frames are taken as stored: EXIF orientation is ignored, as masks and cameras know nothing of it.
- Grey is repeated to RGB; 16-bit keeps its top 8 bits; palettes are resolved; an alpha channel is refused, because
  what lies under it is a guess.
- JPEG is decoded at the smallest DCT scale (1/1, 1/2, 1/4, 1/8) that is no smaller than the target. It is about six
  times faster than a full decode and moves pixels by about one grey level, which is why calibration uses it as well.
- The resize is Pillow's bilinear filter with antialias on 8-bit pixels.

Limits are arguments and are checked on the header, before any pixel is decoded.
"""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from service.contract.geometry import InputSpec
from service.errors import FrameTooLarge, MediaTypeNotAllowed, UnreadableFrame

FORMAT_OF_MEDIA_TYPE = {
    "image/jpeg": "JPEG",
    "image/png": "PNG",
    "image/bmp": "BMP",
    "image/tiff": "TIFF",
    "image/webp": "WEBP",
}
FRAME_FORMATS = frozenset(FORMAT_OF_MEDIA_TYPE.values())

_EIGHT_BIT_MODES = frozenset({"1", "L", "RGB", "P"})
_SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})

# Pillow's plug-ins raise all of these on bytes that are not what they claim to be.
_CODEC_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class FrameLimits:
    """What a caller may send.

    Attributes:
        max_bytes: largest encoded size.
        max_pixels: largest width times height.
        formats: accepted codec names, a subset of `FRAME_FORMATS`.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 50_000_000
    formats: frozenset[str] = FRAME_FORMATS


@dataclass(frozen=True)
class ImageHeader:
    """What the first bytes of an image promise.

    Attributes:
        format: codec name, one of `FRAME_FORMATS`.
        height: pixels.
        width: pixels.
        mode: Pillow's name of the pixel layout.
    """

    format: str
    height: int
    width: int
    mode: str


@dataclass(frozen=True)
class Frame:
    """One decoded camera image.

    Attributes:
        pixels: `(h, w, 3)` uint8 RGB; smaller than the original where a JPEG was decoded at reduced scale.
        height: pixels of the original frame.
        width: pixels of the original frame.
    """

    pixels: NDArray[np.uint8]
    height: int
    width: int


def read_header(data: bytes, limits: FrameLimits) -> ImageHeader:
    """Read size and kind of an encoded image without decoding a pixel.

    Raises:
        FrameTooLarge: if bytes or pixels are over the limit.
        MediaTypeNotAllowed: if the format is known but not accepted here.
        UnreadableFrame: if it is no image, empty, animated or of a pixel layout that is not accepted.
    """
    with _open(data, limits) as image:
        return _header_of(image)


def decode_image(data: bytes, limits: FrameLimits, target: tuple[int, int] | None = None) -> Frame:
    """Decode one encoded image to RGB.

    Args:
        data: the encoded image.
        limits: bounds that are checked before decoding.
        target: `(height, width)` that the frame will be resized to; lets a JPEG be decoded at reduced scale.

    Raises:
        FrameTooLarge: if bytes or pixels are over the limit.
        MediaTypeNotAllowed: if the format is known but not accepted here.
        UnreadableFrame: if it can't be decoded completely.
    """
    with _open(data, limits) as image:
        header = _header_of(image)
        try:
            if target is not None and header.format == "JPEG":
                image.draft(None, (target[1], target[0]))
            pixels = _to_rgb(image)
        except _CODEC_ERRORS as error:
            raise UnreadableFrame(
                f"The {header.format} image is damaged or truncated; send the complete file as the camera wrote it."
            ) from error
    return Frame(pixels, header.height, header.width)


def fit_to_input(pixels: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.uint8]:
    """Resize and crop a frame to what the network takes: the one resize.

    Args:
        pixels: `(h, w, 3)` uint8 RGB.
        spec: the bundle's input.

    Returns:
        `(spec.height, spec.width, 3)` uint8 RGB, contiguous.
    """
    height, width = spec.resize_height, spec.resize_width
    if pixels.shape[:2] != (height, width):
        resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(resized)
    top, left = (height - spec.height) // 2, (width - spec.width) // 2
    return np.ascontiguousarray(pixels[top : top + spec.height, left : left + spec.width])


def decode_mask(data: bytes) -> NDArray[np.bool_]:
    """Decode a ground-truth or region-of-interest mask: every value above zero is True.

    Returns:
        `(h, w)` bool.

    Raises:
        UnreadableFrame: if it can't be decoded.
    """
    with _open(data, FrameLimits()) as image:
        try:
            values = np.asarray(image.convert("RGB") if image.mode == "P" else image)
        except _CODEC_ERRORS as error:
            raise UnreadableFrame("The mask image is damaged or truncated.") from error
    marked: NDArray[np.bool_] = values.reshape(*values.shape[:2], -1).max(axis=2) > 0
    return marked


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode `(h, w)` grey or `(h, w, 3)` RGB uint8 as PNG, at the fast compression level.

    Level 1 costs a sixth of Pillow's default on anomaly maps and the file is about as small.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def encode_jpeg(pixels: NDArray[np.uint8], quality: int = 90) -> bytes:
    """Encode `(h, w)` grey or `(h, w, 3)` RGB uint8 as JPEG; for pages that people look at, never for golden frames."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def resize_map(anomaly_map: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Resize a map `(h, w)` float32 bilinearly (with antialias when shrinking) to `(height, width)`."""
    if anomaly_map.shape == (height, width):
        return anomaly_map
    resized = Image.fromarray(np.ascontiguousarray(anomaly_map, dtype=np.float32))
    return np.asarray(resized.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)


def resize_mask(mask: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    """Resize a mask `(h, w)` bool by nearest neighbour to `(height, width)`."""
    if mask.shape == (height, width):
        return mask
    resized = Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized) > 0


def resize_pixels(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize `(h, w, 3)` uint8 for pictures that people look at; what the network sees goes by `fit_to_input`."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _open(data: bytes, limits: FrameLimits) -> ImageFile.ImageFile:
    if len(data) > limits.max_bytes:
        raise FrameTooLarge(
            f"The frame has {len(data)} bytes and the limit is {limits.max_bytes}; send a smaller or more strongly "
            "compressed image."
        )
    if not data:
        raise UnreadableFrame("The body is empty; send the image's bytes.")
    try:
        image = Image.open(io.BytesIO(data), formats=sorted(FRAME_FORMATS))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(limits) from error
    except _CODEC_ERRORS as error:
        raise UnreadableFrame(
            f"The bytes are no image of an accepted format ({', '.join(sorted(limits.formats))})."
        ) from error
    if image.format not in limits.formats:
        raise MediaTypeNotAllowed(
            f"{image.format} images are not accepted here; send {', '.join(sorted(limits.formats))}."
        )
    if image.width * image.height > limits.max_pixels:
        raise _too_many_pixels(limits)
    return image


def _too_many_pixels(limits: FrameLimits) -> FrameTooLarge:
    return FrameTooLarge(f"The image has more than {limits.max_pixels} pixels; crop it or bin the sensor.")


def _header_of(image: ImageFile.ImageFile) -> ImageHeader:
    if image.width == 0 or image.height == 0:
        raise UnreadableFrame("The image has no pixels.")
    try:
        pictures = getattr(image, "n_frames", 1)
    except _CODEC_ERRORS as error:
        raise UnreadableFrame("The image is damaged or truncated; send the complete file.") from error
    if pictures != 1:
        raise UnreadableFrame("The file holds several images; send exactly one frame a request.")
    if image.mode not in _EIGHT_BIT_MODES | _SIXTEEN_BIT_MODES or "transparency" in image.info:
        raise UnreadableFrame("The pixel layout is not accepted; send grey or RGB, 8 or 16 bits, without alpha.")
    return ImageHeader(str(image.format), image.height, image.width, image.mode)


def _to_rgb(image: ImageFile.ImageFile) -> NDArray[np.uint8]:
    if image.mode in _SIXTEEN_BIT_MODES:
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))
