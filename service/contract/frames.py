"""The one door to the image codec and the one resize; training and service read every pixel through it.

A threshold only means the same in both places if both see the same pixels, so there is one decoder, with one rule for
scaled JPEG decoding, and one resize. Pixel rules:

- Frames are taken as stored: EXIF orientation is ignored, a TIFF's too, as masks and cameras know nothing of it.
- Grey is repeated to RGB, without a copy before the resize; palettes are resolved; an alpha channel is refused,
  because what lies under it is a guess.
- Of 16-bit pixels the upper eight of the bits that they really have are kept. Cameras write 10 or 12 bits into the
  lower end of 16, where the top eight would be black, so the bundle says how many there are (`bit_depth`); a value with
  more is refused.
- JPEG is decoded at the smallest DCT scale (1/1, 1/2, 1/4, 1/8) that is no smaller than the target. It is about six
  times faster than a full decode and moves pixels by about one grey level, which is why calibration uses it as well.
  Files in which nothing is amiss go a quicker way to the same pixels (`service/contract/jpeg.py`), and where they are
  written as nearly all are, Pillow need not open them.
- The resize is Pillow's bilinear filter with antialias on 8-bit pixels.

Limits are arguments and are checked on the header, before any pixel is decoded. A file of which a decoder would work
longer than its pixels are worth, by scans, segments, chunks or tiles that no encoder writes, is refused before a codec
sees it.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from service.contract.geometry import InputSpec, NetworkInput
from service.contract.jpeg import PixelsMadeUp, decode_clean
from service.contract.jpeg_restarts import restarts_fit
from service.contract.jpeg_segments import PlainHead, has_all_scans, is_progressive, plain_head, without_notes
from service.contract.jpeg_zeros import holds_lost_stretch
from service.contract.png_checks import chunks_are_sound, holds_all_rows
from service.contract.png_chunks import chunks
from service.contract.second_image import another_follows
from service.contract.tiff_checks import demand_whole_pieces
from service.contract.tiff_layout import TiffPage
from service.errors import FrameTooLarge, MediaTypeNotAllowed, UnreadableFrame

FORMAT_OF_MEDIA_TYPE = {
    "image/jpeg": "JPEG",
    "image/png": "PNG",
    "image/bmp": "BMP",
    "image/tiff": "TIFF",
    "image/webp": "WEBP",
}
FRAME_FORMATS = frozenset(FORMAT_OF_MEDIA_TYPE.values())
# Of a WebP, which has neither a checksum nor an end that a decoder asks for, nothing tells what is lost: zeros, and
# bits that were changed, are drawn as another picture. Whoever takes it knows that.
DEFAULT_FORMATS = FRAME_FORMATS - {"WEBP"}
DEEPEST_BITS = 16

# Every header is held against the caller's own limit, which may well be above Pillow's: line cameras send long frames.
Image.MAX_IMAGE_PIXELS = None

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
    Warning,  # where the process runs with warnings as errors
)

_TIFF_BITS_PER_SAMPLE = 258
# Of which the codec says what is missing, or we find out: none, LZW, JPEG, Deflate by both of its numbers, PackBits,
# LZMA and Zstandard (service/contract/tiff_checks.py). Fax and JPEG's old style are drawn on with whatever fits.
_TIFF_COMPRESSIONS = frozenset({1, 5, 7, 8, 32773, 32946, 34925, 50000})
_TIFF_JPEG = 7
_WEBP_CHUNKS_AT, _WEBP_LOSSY = 12, b"VP8 "
_PNG_DEPTH_AT = 24
_BMP_INFO_AT, _BMP_WITH_PACKING = 14, 40  # where the info header begins, and how long one is that names a packing
_BMP_RUN_LENGTHS = (1, 2)
_JPEG_BEGIN, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_JPEG_SCALES = (8, 4, 2)
_WHITES = (1, 2**8 - 1, 2**16 - 1)
_JPEG_FILLER = 128  # what libjpeg draws where the data ended early


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
        pixels: `(h, w, 3)` uint8 RGB, to be read only; smaller than the original where a JPEG was decoded at reduced
            scale. Of a grey frame all three channels are the same bytes.
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
    data = _admit(data, limits)
    with _open(data, limits) as image:
        return _header_of(image, data)


def read_frame(data: bytes, limits: FrameLimits, spec: NetworkInput) -> Frame:
    """Decode one encoded frame for a network: what training and service read frames with.

    Raises:
        FrameTooLarge: if bytes or pixels are over the limit.
        MediaTypeNotAllowed: if the format is known but not accepted here.
        UnreadableFrame: if it can't be decoded completely, or has more bits than the network's input says.
    """
    return decode_image(data, limits, (spec.resize_height, spec.resize_width), spec.bit_depth)


def decode_image(
    data: bytes, limits: FrameLimits, target: tuple[int, int] | None = None, bit_depth: int = DEEPEST_BITS
) -> Frame:
    """Decode one encoded image to RGB.

    Args:
        data: the encoded image.
        limits: bounds that are checked before decoding.
        target: `(height, width)` that the frame will be resized to; lets a JPEG be decoded at reduced scale.
        bit_depth: how many bits the values of 16-bit images have, 8 to 16.

    Raises:
        FrameTooLarge: if bytes or pixels are over the limit.
        MediaTypeNotAllowed: if the format is known but not accepted here.
        UnreadableFrame: if it can't be decoded completely, or a value has more bits than `bit_depth`.
    """
    plain = _plain_jpeg(data, limits)
    if plain is not None:
        frame = _decode_plain_jpeg(data, plain, target)
        if frame is not None:
            return frame
    data = _admit(data, limits)
    with _open(data, limits) as image:
        header = _header_of(image, data)
        try:
            _demand_sound(data, image)
            decoded = None
            if header.format == "JPEG":
                decoded = _decode_jpeg(data, image, header, target, is_clean=plain is None)
            if decoded is None:
                decoded = _decode(image)
                if not _is_complete(data, image, decoded, target):
                    raise _damaged(header.format)
        except _CODEC_ERRORS as error:
            raise _damaged(header.format) from error
    return Frame(to_rgb(_to_eight_bits(decoded, data, header, bit_depth)), header.height, header.width)


def is_deep(data: bytes, limits: FrameLimits) -> bool:
    """Tell whether an encoded image is grey of 16 bits, whose values `bit_depth` is about.

    Raises:
        CallerError: whatever `read_header` raises.
    """
    return read_header(data, limits).mode in _SIXTEEN_BIT_MODES


def fit_to_input(pixels: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.uint8]:
    """Resize and crop a frame to the canvas, which is what the network takes or is cut into tiles: the one resize.

    Args:
        pixels: `(h, w, 3)` uint8 RGB.
        spec: the bundle's input.

    Returns:
        `(spec.canvas_height, spec.canvas_width, 3)` uint8 RGB, contiguous.
    """
    height, width = spec.resize_height, spec.resize_width
    if pixels.shape[:2] != (height, width):
        # Each channel is resized by itself, so one of a grey frame's is enough.
        alike = is_grey(pixels)
        source = Image.fromarray(pixels[:, :, 0] if alike else pixels)
        resized = np.asarray(source.resize((width, height), Image.Resampling.BILINEAR))
        pixels = to_rgb(resized)
    top, left = (height - spec.canvas_height) // 2, (width - spec.canvas_width) // 2
    return np.ascontiguousarray(pixels[top : top + spec.canvas_height, left : left + spec.canvas_width])


def to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return `(h, w)` grey as `(h, w, 3)` whose channels are the same bytes, to be read only; RGB as it is."""
    return np.broadcast_to(pixels[:, :, None], (*pixels.shape, 3)) if pixels.ndim == 2 else pixels


def too_deep(bit_depth: int) -> UnreadableFrame:
    """Return what is said of a value that has more bits than frames of its line."""
    return UnreadableFrame(
        f"A pixel has more than {bit_depth} bits, which is all that frames of this line have; send what the camera "
        "wrote, or train with another input.bit_depth."
    )


def is_grey(pixels: NDArray[np.uint8]) -> bool:
    """Tell whether the three channels of a frame `(h, w, 3)` are the same bytes, as `to_rgb` makes them."""
    return pixels.strides[2] == 0


def decode_mask(data: bytes) -> NDArray[np.bool_]:
    """Decode a ground-truth mask: every value above 0 is True, in a lossy file what is nearer to white than to black.

    A JPEG's black is not 0 beside an edge; where values are kept as they were drawn, each may be a kind of defect.

    Returns:
        `(h, w)` bool.

    Raises:
        UnreadableFrame: if it can't be decoded.
    """
    if is_lossy(data):
        return decode_region_mask(data)
    marked: NDArray[np.bool_] = decode_mask_values(data) > 0
    return marked


def decode_region_mask(data: bytes) -> NDArray[np.bool_]:
    """Decode a region-of-interest mask: what is nearer to white than to black is True.

    A JPEG's black is not 0 beside an edge, and a brush with soft edges leaves greys. White is the end of the range of 8
    bits, of 16 where a value is above that, or 1 where none is above it, as programs write masks.

    Returns:
        `(h, w)` bool.

    Raises:
        UnreadableFrame: if it can't be decoded.
    """
    values = decode_mask_values(data)
    largest = values.max()
    white = next((white for white in _WHITES if largest <= white), largest)
    marked: NDArray[np.bool_] = values > white / 2
    return marked


def decode_mask_values(data: bytes) -> NDArray[Any]:
    """Decode a mask whose values say which defect they mark; of several colours the largest counts.

    What is wholly transparent is 0: nobody has seen the colours under it, which are white as often as black.

    Returns:
        `(h, w)`, the file's own integers, or bool where it has one bit a pixel.

    Raises:
        UnreadableFrame: if it can't be decoded.
    """
    limits = FrameLimits()
    data = _admit(data, limits)
    with _open(data, limits) as image:
        try:
            _demand_sound(data, image)
            if image.format == "JPEG":
                header = ImageHeader("JPEG", image.height, image.width, image.mode)
                _decode_jpeg(data, image, header, None, is_clean=True)
            values = _visible(image)
            if not _is_complete(data, image, values, None):
                raise PixelsMadeUp("Rows or blocks are missing.")
        except _CODEC_ERRORS as error:
            raise UnreadableFrame("The mask image is damaged or truncated.") from error
    largest: NDArray[Any] = values.reshape(*values.shape[:2], -1).max(axis=2)
    return largest


def is_lossy(data: bytes) -> bool:
    """Tell whether a file's codec changes values: JPEG, also inside a TIFF, and the lossy kind of WebP.

    Raises:
        UnreadableFrame: if it is no image.
    """
    with _open(_admit(data, limits := FrameLimits()), limits) as image:
        if image.format == "TIFF":
            return TiffPage(data).compression == _TIFF_JPEG
        return image.format == "JPEG" or (image.format == "WEBP" and _WEBP_LOSSY in _webp_chunks(data))


def _webp_chunks(data: bytes) -> set[bytes]:
    names, at = set(), _WEBP_CHUNKS_AT
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        names.add(name)
        at += 8 + size + size % 2
    return names


def _visible(image: Image.Image) -> NDArray[Any]:
    """Return a mask's values or colours, 0 where it is transparent."""
    if image.mode in _SIXTEEN_BIT_MODES or not image.has_transparency_data:
        return np.asarray(image.convert("RGB") if image.mode == "P" else image)
    colours = np.asarray(image.convert("RGBA"))
    return colours[..., :3] * (colours[..., 3:] > 0)


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


def _admit(data: bytes, limits: FrameLimits) -> bytes:
    """Return what a codec may see of a file; refuse what asks for far more work than its pixels are worth."""
    if len(data) > limits.max_bytes:
        raise FrameTooLarge(
            f"The frame has {len(data)} bytes and the limit is {limits.max_bytes}; send a smaller or more strongly "
            "compressed image."
        )
    if not data:
        raise UnreadableFrame("The image is empty: it has no byte.")
    try:
        if data.startswith(_JPEG_BEGIN):
            return without_notes(data)
        if data.startswith(b"\x89PNG"):
            for _ in chunks(data):
                pass
        elif data.startswith((b"II", b"MM")):
            page = TiffPage(data)
            page.demand_modest(limits.max_pixels)
            page.demand_read_as_written()
            return page.as_stored()
        elif data.startswith(b"BM") and _has_run_lengths(data):
            raise UnreadableFrame("A BMP of run lengths is not accepted; write it without compression, or as PNG.")
    except _CODEC_ERRORS as error:
        raise UnreadableFrame("The image is damaged or truncated; send the complete file.") from error
    return data


def _has_run_lengths(bmp: bytes) -> bool:
    """Tell whether a BMP's pixels are packed in a way that Pillow unpacks in Python, a microsecond for every two."""
    info_bytes, packing = struct.unpack_from("<I12xI", bmp[_BMP_INFO_AT : _BMP_INFO_AT + 20].ljust(20, b"\0"))
    return info_bytes >= _BMP_WITH_PACKING and packing in _BMP_RUN_LENGTHS


def _open(data: bytes, limits: FrameLimits) -> ImageFile.ImageFile:
    try:
        image = Image.open(io.BytesIO(data), formats=sorted(FRAME_FORMATS))
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


def _damaged(image_format: str) -> UnreadableFrame:
    return UnreadableFrame(
        f"The {image_format} image is damaged or truncated; send the complete file as the camera wrote it."
    )


def _header_of(image: ImageFile.ImageFile, data: bytes) -> ImageHeader:
    if image.width == 0 or image.height == 0:
        raise UnreadableFrame("The image has no pixels.")
    try:
        several = _holds_several(image) or another_follows(data, str(image.format))
    except _CODEC_ERRORS as error:
        raise UnreadableFrame("The image is damaged or truncated; send the complete file.") from error
    if several:
        raise UnreadableFrame("The file holds several images; send exactly one frame a request.")
    if image.mode not in _EIGHT_BIT_MODES | _SIXTEEN_BIT_MODES or "transparency" in image.info:
        raise UnreadableFrame("The pixel layout is not accepted; send grey or RGB, 8 or 16 bits, without alpha.")
    if image.format == "TIFF" and TiffPage(data).compression not in _TIFF_COMPRESSIONS:
        raise UnreadableFrame(
            "Lost data can't be noticed in this kind of TIFF; send one without compression, or with LZW, Deflate, "
            "Zstandard, LZMA, PackBits or JPEG."
        )
    return ImageHeader(str(image.format), image.height, image.width, image.mode)


def _decode(image: ImageFile.ImageFile) -> NDArray[Any]:
    """Return `(h, w, 3)` uint8, or of a grey image `(h, w)`, uint8 or of 16 bits."""
    if image.mode in ("L", "RGB") or image.mode in _SIXTEEN_BIT_MODES:
        return np.asarray(image)  # where converting would copy the whole frame once more
    return np.asarray(image.convert("L" if image.mode == "1" else "RGB"))


def _plain_jpeg(data: bytes, limits: FrameLimits) -> PlainHead | None:
    """Return the head of a JPEG as nearly all are written; None where a look at the whole file is to say what it is.

    Nothing is said here of a file that is refused: what follows does, of this one as of all others.
    """
    if not data.startswith(_JPEG_BEGIN) or len(data) > limits.max_bytes or "JPEG" not in limits.formats:
        return None
    head = plain_head(data)
    if head is None or head.height * head.width > limits.max_pixels:
        return None
    return None if another_follows(data, "JPEG") or holds_lost_stretch(data) else head


def _decode_plain_jpeg(data: bytes, head: PlainHead, target: tuple[int, int] | None) -> Frame | None:
    """Decode a JPEG whose head is plain; None where libjpeg warns of what follows it, or can't read it."""
    size = head.height, head.width
    try:
        pixels = decode_clean(data, size, _drafted(size, target), is_grey=head.is_grey)
    except _CODEC_ERRORS as error:
        raise _damaged("JPEG") from error
    return None if pixels is None else Frame(to_rgb(pixels), *size)


def _drafted(size: tuple[int, int], target: tuple[int, int] | None) -> tuple[int, int]:
    """Return the `(height, width)` of a JPEG at the smallest scale that is no smaller than a target, as Pillow does."""
    if target is None:
        return size
    most = min(size[0] // target[0], size[1] // target[1])
    scale = next((scale for scale in _JPEG_SCALES if scale <= most), 1)
    return -(-size[0] // scale), -(-size[1] // scale)


def _decode_jpeg(
    data: bytes, image: ImageFile.ImageFile, header: ImageHeader, target: tuple[int, int] | None, *, is_clean: bool
) -> NDArray[np.uint8] | None:
    """Choose the scale, and decode a file in which nothing is amiss; None where `image` is to be looked at closely."""
    if target is not None:
        image.draft(None, (target[1], target[0]))
    if not is_clean:  # as libjpeg has found before
        return None
    if not has_all_scans(data):
        raise PixelsMadeUp("A scan is missing.")
    if holds_lost_stretch(data):
        raise PixelsMadeUp("A stretch is zeros.")
    size, wanted = (header.height, header.width), (image.height, image.width)
    pixels = decode_clean(data, size, wanted, is_grey=image.mode == "L")
    if pixels is None and is_progressive(data):  # nobody else tells what is missing of one
        raise PixelsMadeUp("It can't be read strictly.")
    return pixels


def _demand_sound(data: bytes, image: ImageFile.ImageFile) -> None:
    """Refuse what the file itself tells to be damaged, where the codec does not ask it."""
    if image.format == "PNG" and not chunks_are_sound(data):
        raise PixelsMadeUp("A chunk is another than was written, or the end is missing.")
    if image.format == "TIFF":
        demand_whole_pieces(TiffPage(data))


def _to_eight_bits(pixels: NDArray[Any], data: bytes, header: ImageHeader, bit_depth: int) -> NDArray[np.uint8]:
    if header.mode in _SIXTEEN_BIT_MODES:
        if bit_depth < DEEPEST_BITS and int(pixels.max()) >> bit_depth:
            raise too_deep(bit_depth)
        return (pixels >> (bit_depth - 8)).astype(np.uint8)
    if bit_depth < DEEPEST_BITS and header.mode == "RGB" and _has_deep_colours(data, header):
        # The codec has kept the top eight bits of each colour, which are empty here.
        raise UnreadableFrame(
            f"Colours of 16 bits can't be read as {bit_depth} bits; send 8 bits a colour, or grey of 16 bits."
        )
    return pixels


def _has_deep_colours(data: bytes, header: ImageHeader) -> bool:
    if header.format == "PNG":
        return data[_PNG_DEPTH_AT] == DEEPEST_BITS
    if header.format != "TIFF":
        return False
    with Image.open(io.BytesIO(data), formats=["TIFF"]) as image:
        depths: tuple[int, ...] = getattr(image, "tag_v2", {}).get(_TIFF_BITS_PER_SAMPLE, (8,))
    return max(depths) > 8


def _holds_several(image: ImageFile.ImageFile) -> bool:
    if image.format != "TIFF":
        return int(getattr(image, "n_frames", 1)) != 1
    # Pillow counts a TIFF's pages by walking all of them, which a file of millions of pages makes a matter of minutes.
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _is_complete(data: bytes, image: ImageFile.ImageFile, pixels: NDArray[Any], target: tuple[int, int] | None) -> bool:
    """Tell whether the file held every pixel, in the cases where Pillow fills in the rest without a word.

    A PNG's compressed stream may be closed early, every checksum right, and leave the last rows zero; a JPEG's may end
    early, before a proper end marker, and leave the last blocks middle grey. Both are looked at closely only where the
    last pixels look like that. A JPEG that lost what lies between two restart markers is middle grey there, wherever
    that is; markers tell.
    """
    if image.format == "PNG" and (image.info.get("interlace") or not _last_row(image).any()):
        return holds_all_rows(data)
    if image.format == "JPEG":
        is_filled = bool((pixels[-1, -1] == _JPEG_FILLER).all())
        return restarts_fit(data, closely=is_filled) and not (is_filled and not _jpeg_ends_late(data, target, pixels))
    return True


def _last_row(image: ImageFile.ImageFile) -> NDArray[Any]:
    """Return the last row as it is stored, without a copy of the others."""
    return np.asarray(image.crop((0, image.height - 1, image.width, image.height)))


def _jpeg_ends_late(data: bytes, target: tuple[int, int] | None, pixels: NDArray[Any]) -> bool:
    """Decode again with more data before the end marker: a complete image does not change, an unfinished one does."""
    end = data.rfind(_JPEG_END)
    longer = data[:end] + bytes(range(1, 128)) * 2 + data[end:]
    with Image.open(io.BytesIO(longer), formats=["JPEG"]) as image:
        if target is not None:
            image.draft(None, (target[1], target[0]))
        return np.array_equal(_decode(image), pixels)
