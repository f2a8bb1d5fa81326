"""Promises of the one door to the image codec: everything or a typed refusal, and the same pixels for everybody."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.contract import frames
from service.contract.frames import (
    FrameLimits,
    decode_image,
    decode_mask,
    decode_mask_values,
    decode_region_mask,
    fit_to_input,
    is_lossy,
    read_header,
)
from service.contract.geometry import Tiling
from service.contract.jpeg_segments import START_OF_SCAN, segments
from service.contract.png_checks import PASSES
from service.errors import CallerError, FrameTooLarge, MediaTypeNotAllowed, UnreadableFrame
from tests.factories import encode, make_frame, make_input
from tests.strategies import images

LIMITS = FrameLimits()
STORED = Path(__file__).parent / "data" / "resized.npz"
LOSSLESS = {
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "tiff-lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff-deflate": ("TIFF", {"compression": "tiff_deflate"}),
    "tiff-packbits": ("TIFF", {"compression": "packbits"}),
    "webp": ("WEBP", {"lossless": True}),
}
LOSSY = {
    "jpeg": ("JPEG", {}),
    "jpeg-progressive": ("JPEG", {"progressive": True}),
    "jpeg-full-chroma": ("JPEG", {"subsampling": 0}),
}


def table(rows):
    """Parametrise over the values of a table, with its keys as ids."""
    return pytest.mark.parametrize("kind", list(rows.values()), ids=list(rows))


def png(width, height, depth, colour_type, rows, *, interlaced=False, chunks=b""):
    """Write a PNG by hand, also ones that no encoder would write; `rows` are filtered rows before compression."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, int(interlaced))
    body = png_chunk(b"IHDR", head) + chunks + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_chunk(kind, data):
    """Return one chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_rows(values, sample_type):
    """Return filtered rows of `(h, w, ...)` values, no filter used."""
    rows = values.astype(sample_type).reshape(len(values), -1)
    return b"".join(b"\0" + row.tobytes() for row in rows)


def saved(image, image_format, **options):
    """Encode a Pillow image of any mode."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@table(LOSSLESS)
@pytest.mark.parametrize("channels", [3, None], ids=["rgb", "grey"])
def test_decoding_when_the_format_is_lossless_returns_the_very_pixels(kind, channels):
    """RGB comes back bit by bit, and grey comes back three times."""
    pixels = make_frame(17, 23, seed=1)
    pixels = pixels if channels else pixels[:, :, 0]

    frame = decode_image(encode(pixels, kind[0], **kind[1]), LIMITS)

    expected = pixels if channels else np.stack([pixels] * 3, axis=-1)
    np.testing.assert_array_equal(frame.pixels, expected)
    assert (frame.height, frame.width, frame.pixels.dtype) == (17, 23, np.uint8)


@given(st.binary(max_size=300))
def test_decoding_when_bytes_are_arbitrary_refuses_as_the_callers_fault(data):
    """Bytes that are no image never raise anything but the caller's own errors."""
    with pytest.raises(CallerError):
        decode_image(data, LIMITS)


@given(
    st.sampled_from(sorted(LOSSLESS | LOSSY)),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_decoding_when_bytes_are_damaged_returns_a_whole_frame_or_refuses(name, damage):
    """Damage ends as a frame of the promised size or as the caller's error, never as anything else."""
    image_format, options = (LOSSLESS | LOSSY)[name]
    data = bytearray(encode(make_frame(16, 24, seed=2), image_format, **options))
    for at, value in damage:
        data[at % len(data)] = value

    try:
        frame = decode_image(bytes(data), LIMITS)
    except CallerError:
        return

    assert frame.pixels.shape == (frame.height, frame.width, 3)


@table(LOSSLESS | LOSSY)
def test_decoding_when_the_file_is_cut_anywhere_is_refused_or_complete(kind):
    """A file that lost its end is refused, unless every pixel was there; a partial frame is never returned."""
    data = encode(make_frame(16, 24, seed=3), kind[0], **kind[1])
    whole = decode_image(data, LIMITS).pixels
    partial = []

    for length in range(len(data)):
        try:
            pixels = decode_image(data[:length], LIMITS).pixels
        except CallerError:
            continue
        if not np.array_equal(pixels, whole):
            partial.append(length)

    assert partial == []


@pytest.mark.parametrize("target", [None, (16, 20)], ids=["full", "scaled"])
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_decoding_when_a_jpeg_is_cut_at_reduced_scale_is_refused(target, progressive):
    """Scaled decoding refuses a cut file as full decoding does."""
    data = encode(make_frame(64, 80, seed=3), "JPEG", progressive=progressive)

    for length in range(2, len(data), 7):
        with pytest.raises(CallerError):
            decode_image(data[:length], LIMITS, target)


@pytest.mark.parametrize("target", [None, (32, 40)], ids=["full", "scaled"])
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_decoding_when_a_cut_jpeg_got_an_end_marker_is_refused(progressive, target):
    """A gateway that closes a half-received JPEG properly does not turn the missing part into grey or coarse pixels."""
    data = encode(make_frame(128, 160, seed=4), "JPEG", progressive=progressive)

    for length in range(700, len(data) - 2, 13):
        with pytest.raises(UnreadableFrame, match="damaged or truncated"):
            decode_image(data[:length] + b"\xff\xd9", LIMITS, target)


@pytest.mark.parametrize("target", [None, (32, 40)], ids=["full", "scaled"])
def test_decoding_when_a_progressive_jpeg_lost_a_whole_scan_is_refused(target):
    """What a scan would have made finer is not left coarse, though every scan that is there is sound."""
    data = encode(make_frame(128, 160, seed=4), "JPEG", progressive=True)
    scans = [start - 4 for marker, start, _ in segments(data) if marker == START_OF_SCAN]
    assert len(scans) > 5

    for begin, end in zip(scans, [*scans[1:], len(data) - 2], strict=True):
        with pytest.raises(UnreadableFrame, match="damaged or truncated"):
            decode_image(data[:begin] + data[end:], LIMITS, target)


@pytest.mark.parametrize("damage", ["lost", "zeroed"])
def test_decoding_when_libjpeg_complains_of_a_progressive_jpeg_is_refused(damage):
    """Bytes that are gone from the first half, where later scans refine what they made, cost the frame its verdict."""
    data = encode(make_frame(128, 160, seed=4), "JPEG", progressive=True)
    at = len(data) // 4
    middle = b"" if damage == "lost" else bytes(400)

    with pytest.raises(UnreadableFrame, match="damaged or truncated"):
        decode_image(data[:at] + middle + data[at + 400 :], LIMITS)


def tiff(strips, compression, height, width, rows, *, counts=None):
    """Write a grey TIFF of 8 bits by hand, also one that no encoder would write."""
    counts = [len(strip) for strip in strips] if counts is None else counts
    begin = 8 + 2 + 12 * 9 + 4 + 8 * len(strips)
    offsets = [begin + sum(map(len, strips[:index])) for index in range(len(strips))]
    lists = struct.pack(f"<{2 * len(strips)}I", *offsets, *counts)
    where = begin - len(lists)
    alone = len(strips) == 1
    fields = [(256, 1, width), (257, 1, height), (258, 1, 8), (259, 1, compression), (262, 1, 1)]
    fields += [(273, len(strips), offsets[0] if alone else where), (277, 1, 1), (278, 1, rows)]
    fields += [(279, len(strips), counts[0] if alone else where + 4 * len(strips))]
    directory = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in fields)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 9) + directory + bytes(4) + lists + b"".join(strips)


@pytest.mark.parametrize("rows", [64, 24, 16], ids=["one strip", "a shorter last strip", "even strips"])
def test_decoding_when_a_tiff_holds_whole_jpegs_returns_their_pixels(rows):
    """The look for missing data refuses no sound TIFF."""
    pixels = make_frame(64, 80, seed=4)[:, :, 0]
    strips = [encode(pixels[top : top + rows], "JPEG", quality=95) for top in range(0, 64, rows)]

    frame = decode_image(tiff(strips, 7, 64, 80, rows), LIMITS)

    expected = np.concatenate([decode_image(strip, LIMITS).pixels for strip in strips])
    np.testing.assert_array_equal(frame.pixels, expected)


@pytest.mark.parametrize("damage", ["cut", "cut and closed", "counted short", "zeroed", "progressive, a scan lost"])
@pytest.mark.parametrize("strip", [0, 2])
def test_decoding_when_a_jpeg_inside_a_tiff_lost_data_is_refused(strip, damage):
    """The codec draws such strips to the end in grey, whatever is missing."""
    pixels = make_frame(96, 160, seed=4)[:, :, 0]
    strips = [encode(pixels[top : top + 32], "JPEG", progressive="scan" in damage) for top in (0, 32, 64)]
    counts = [len(one) for one in strips]
    whole = strips[strip]
    half = len(whole) * 2 // 3
    last_scan = max(start for marker, start, _ in segments(whole) if marker == START_OF_SCAN) - 4
    strips[strip] = {
        "cut": whole[:half],
        "cut and closed": whole[:half] + b"\xff\xd9",
        "counted short": whole,
        "zeroed": whole[:half] + bytes(len(whole) - half - 2) + b"\xff\xd9",
        "progressive, a scan lost": whole[:last_scan] + b"\xff\xd9",
    }[damage]
    counts[strip] = half if damage == "counted short" else len(strips[strip])

    with pytest.raises(UnreadableFrame, match="damaged or truncated"):
        decode_image(tiff(strips, 7, 96, 160, 32, counts=counts), LIMITS)


@pytest.mark.parametrize("compression", [8, 32946], ids=["deflate", "deflate by its old number"])
@pytest.mark.parametrize("strip", [0, 2])
def test_decoding_when_any_byte_of_a_deflated_strip_is_changed_is_refused(strip, compression):
    """The checksum at the end of each strip is looked at, though the codec stops at the last pixel."""
    pixels = make_frame(48, 32, seed=4)[:, :, 0]
    rows = [pixels[top : top + 16].tobytes() for top in (0, 16, 32)]
    strips = [zlib.compress(one) for one in rows]
    data = tiff(strips, compression, 48, 32, 16)
    begin, refused = data.index(strips[strip]), 0
    np.testing.assert_array_equal(decode_image(data, LIMITS).pixels[:, :, 0], pixels)

    for at in range(begin, begin + len(strips[strip])):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        try:
            still = decode_image(bytes(changed), LIMITS).pixels[:, :, 0]
        except UnreadableFrame:
            refused += 1
        else:
            np.testing.assert_array_equal(still, pixels)

    assert refused >= len(strips[strip]) - 3  # before and after the pixels some bits say other things


@pytest.mark.parametrize("damage", ["zeros to the end", "a page of zeros", "no checksum", "more than its pixels"])
@pytest.mark.parametrize("strip", [0, 2])
def test_decoding_when_a_deflated_strip_is_not_what_was_written_is_refused(strip, damage):
    """Zeros inflate to something, and so does what is left over."""
    pixels = make_frame(48, 32, seed=4)[:, :, 0]
    rows = [pixels[top : top + 16].tobytes() for top in (0, 16, 32)]
    strips = [zlib.compress(one) for one in rows]
    whole = strips[strip]
    strips[strip] = {
        "zeros to the end": whole[:100] + bytes(len(whole) - 100),
        "a page of zeros": whole[:100] + bytes(64) + whole[164:],
        "no checksum": whole[:-4],
        "more than its pixels": zlib.compress(rows[strip] + bytes(10_000_000)),
    }[damage]

    with pytest.raises(UnreadableFrame, match="damaged or truncated"):
        decode_image(tiff(strips, 8, 48, 32, 16), LIMITS)


@pytest.mark.parametrize("kind", ["L", "RGB", "1", "P", "I;16"])
@pytest.mark.parametrize("rows", [None, 7, 16])
def test_decoding_when_a_deflated_tiff_is_whole_returns_its_pixels(kind, rows):
    """The look for a strip's checksum refuses no sound TIFF, whatever its strips."""
    pixels = make_frame(45, 37, seed=4)
    image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257) if kind == "I;16" else Image.fromarray(pixels)
    image = image if kind == "I;16" else image.convert(kind)
    information = {} if rows is None else {278: rows}

    frame = decode_image(saved(image, "TIFF", compression="tiff_adobe_deflate", tiffinfo=information), LIMITS)

    np.testing.assert_array_equal(frame.pixels, decode_image(saved(image, "TIFF"), LIMITS).pixels)


@pytest.mark.parametrize("compression", [1, 8], ids=["none", "deflate"])
def test_decoding_when_a_tiff_does_not_list_all_strips_is_refused(compression):
    """Rows that no strip holds are not left black."""
    pixels = make_frame(64, 80, seed=4)[:, :, 0]
    rows = [pixels[top : top + 16].tobytes() for top in range(0, 64, 16)]
    strips = [zlib.compress(row) if compression == 8 else row for row in rows]
    whole = decode_image(tiff(strips, compression, 64, 80, 16), LIMITS)

    np.testing.assert_array_equal(whole.pixels[:, :, 0], pixels)
    with pytest.raises(UnreadableFrame, match="damaged or truncated"):
        decode_image(tiff(strips[:2], compression, 64, 80, 16), LIMITS)


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_decoding_when_a_tiff_is_a_fax_is_refused(compression):
    """Its codec draws what is missing in white and says nothing, so that nothing of it can be relied on."""
    data = saved(Image.fromarray(make_frame(64, 80)).convert("1"), "TIFF", compression=compression)

    with pytest.raises(UnreadableFrame, match="Lost data can't be noticed"):
        decode_image(data, LIMITS)


ONE_AFTER_THE_OTHER = LOSSLESS | LOSSY | {"tiff-jpeg": ("TIFF", {"compression": "jpeg"})}


@table(ONE_AFTER_THE_OTHER)
@pytest.mark.parametrize("second", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("between", [b"", bytes(7), b"end of frame\r\n"], ids=["", "zeros", "words"])
def test_reading_when_another_image_follows_in_the_bytes_is_refused(kind, second, between):
    """Of two frames in one body the second would be lost: which of them is the part is a guess."""
    first = encode(make_frame(70, 90, seed=1), kind[0], **kind[1])

    for read in (read_header, decode_image):
        with pytest.raises(UnreadableFrame, match="several images"):
            read(first + between + encode(make_frame(16, 24, seed=2, defect=True), second), LIMITS)


@table(ONE_AFTER_THE_OTHER)
@pytest.mark.parametrize("rest", [bytes(1000), b"abc" * 100, b"\xff\xd9", b"BM, II and RIFF", b"\0\xff\xd8\0"])
def test_decoding_when_something_else_follows_returns_the_frame(kind, rest):
    """Padding and a maker's notes cost no pixel."""
    data = encode(make_frame(70, 90, seed=1), kind[0], **kind[1])

    np.testing.assert_array_equal(decode_image(data + rest, LIMITS).pixels, decode_image(data, LIMITS).pixels)


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_decoding_when_a_jpeg_has_a_thumbnail_returns_the_frame(progressive):
    """A preview inside of the file's own segments is no second frame."""
    preview = encode(make_frame(16, 24), "JPEG")
    data = encode(make_frame(64, 80), "JPEG", progressive=progressive)
    segment = b"Exif\0\0" + preview + preview
    with_preview = data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment + data[2:]

    np.testing.assert_array_equal(decode_image(with_preview, LIMITS).pixels, decode_image(data, LIMITS).pixels)


def test_decoding_when_pixels_look_like_the_begin_of_a_file_returns_the_frame():
    """What the first image holds is its own, whatever it spells."""
    pixels = np.zeros((40, 50, 3), np.uint8)
    pixels[7, 9], pixels[20, :2] = (0xFF, 0xD8, 0xFF), np.frombuffer(b"II*\0II", np.uint8).reshape(2, 3)

    for image_format in ("BMP", "TIFF"):
        data = encode(pixels if image_format == "TIFF" else pixels[:, :, ::-1], image_format)
        assert b"\xff\xd8\xff" in data
        assert decode_image(data, LIMITS).pixels.shape == (40, 50, 3)


@pytest.mark.parametrize("size", [(64, 64), (65, 43)])
@pytest.mark.parametrize("target", [None, (16, 11)], ids=["full", "scaled"])
def test_decoding_when_a_whole_jpeg_is_middle_grey_returns_it(size, target):
    """The look for missing blocks takes no evenly grey picture for a cut one."""
    data = encode(np.full((*size, 3), 128, np.uint8), "JPEG")

    frame = decode_image(data, LIMITS, target)

    assert set(np.unique(frame.pixels)) == {128}


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_decoding_when_a_png_stream_ends_early_is_refused(interlaced, kept):
    """A PNG whose compressed stream is closed before the last row is refused, though every checksum is right."""
    rows = png_rows(make_frame(4, 5, seed=5), np.uint8)[: kept * 16]

    with pytest.raises(UnreadableFrame, match="damaged or truncated"):
        decode_image(png(5, 4, 8, 2, rows, interlaced=interlaced), LIMITS)


def whole_png(kind):
    """Return a sound PNG of one of the kinds that are accepted."""
    pixels = make_frame(24, 40, seed=5)
    if kind == "interlaced":
        passes = (pixels[top::step_y, left::step_x] for left, top, step_x, step_y in PASSES)
        return png(40, 24, 8, 2, b"".join(png_rows(one, np.uint8) for one in passes), interlaced=True)
    if kind == "I;16":
        return encode(pixels[:, :, 0].astype(np.uint16) * 257)
    return saved(Image.fromarray(pixels).convert(kind), "PNG")


PNG_KINDS = ["1", "L", "P", "RGB", "I;16", "interlaced"]


@pytest.mark.parametrize("kind", PNG_KINDS)
def test_decoding_when_any_byte_of_a_png_is_changed_is_refused(kind):
    """Each byte belongs to a checksum, that of the pixels included, and every checksum is held against its bytes."""
    data = whole_png(kind)
    decode_image(data, LIMITS)

    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        with pytest.raises(CallerError):
            decode_image(bytes(changed), LIMITS)


@pytest.mark.parametrize("kind", PNG_KINDS)
def test_decoding_when_a_stretch_of_a_png_is_zeros_is_refused(kind):
    """A file that was laid out before it was copied, or lost a block with the power, makes no black rows."""
    data = whole_png(kind)

    for at in range(50, len(data), 7):
        for count in (32, len(data)):
            with pytest.raises(UnreadableFrame):
                decode_image(data[:at] + bytes(len(data[at : at + count])) + data[at + count :], LIMITS)


def test_decoding_when_a_png_does_not_say_that_it_ends_is_refused():
    """Every row is there, and still nobody knows what else was."""
    with pytest.raises(UnreadableFrame, match="damaged or truncated"):
        decode_image(whole_png("L").removesuffix(png_chunk(b"IEND", b"")), LIMITS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_decoding_when_a_whole_png_is_black_returns_it(mode):
    """The look for missing rows takes no black picture for a cut one."""
    data = saved(Image.new(mode, (13, 9)), "PNG")

    assert decode_image(data, LIMITS).pixels.shape == (9, 13, 3)


def test_decoding_when_a_png_is_interlaced_returns_the_very_pixels():
    """Adam7's seven passes are put together as their standard says."""
    pixels = make_frame(11, 7, seed=6)
    passes = b"".join(
        png_rows(pixels[top::step_y, left::step_x], np.uint8)
        for left, top, step_x, step_y in PASSES
        if pixels[top::step_y, left::step_x].size
    )

    frame = decode_image(png(7, 11, 8, 2, passes, interlaced=True), LIMITS)

    np.testing.assert_array_equal(frame.pixels, pixels)


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
def test_decoding_when_a_png_has_sixteen_bits_keeps_the_upper_eight(channels):
    """Deep pixels lose their lower byte and nothing else."""
    deep = np.random.default_rng(0).integers(0, 2**16, (6, 5, channels))

    frame = decode_image(png(5, 6, 16, {1: 0, 3: 2}[channels], png_rows(deep, ">u2")), LIMITS)

    np.testing.assert_array_equal(frame.pixels, np.broadcast_to(deep >> 8, (6, 5, 3)))


@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
def test_decoding_when_a_tiff_has_sixteen_bits_keeps_the_upper_eight(order):
    """Deep grey TIFF pixels lose their lower byte, whichever way the file orders bytes."""
    deep = np.random.default_rng(1).integers(0, 2**16, (6, 5)).astype(f"{order}u2")

    frame = decode_image(encode(deep, "TIFF"), LIMITS)

    np.testing.assert_array_equal(frame.pixels, np.stack([deep >> 8] * 3, axis=-1))


def test_decoding_when_a_palette_is_used_resolves_it():
    """A palette image gives the colours that it shows."""
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([1, 0])

    frame = decode_image(saved(image, "PNG"), LIMITS)

    assert frame.pixels.tolist() == [[[200, 100, 50], [10, 20, 30]]]


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "TIFF"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("F", "TIFF"),
        ("I", "TIFF"),
    ],
)
def test_decoding_when_the_pixel_layout_is_not_accepted_is_refused(mode, image_format):
    """Layouts whose colours would be a guess are refused with what to send instead."""
    with pytest.raises(UnreadableFrame, match="send grey or RGB"):
        decode_image(saved(Image.new(mode, (4, 4)), image_format), LIMITS)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_decoding_when_a_colour_is_transparent_is_refused(mode):
    """A transparent colour is an alpha channel by another name."""
    data = saved(Image.new(mode, (4, 4)), "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)

    with pytest.raises(UnreadableFrame, match="without alpha"):
        decode_image(data, LIMITS)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_decoding_when_the_file_holds_several_images_is_refused(image_format):
    """One request carries one frame; which of several would be the part is a guess."""
    first, second = (Image.fromarray(make_frame(8, 8, seed)) for seed in (1, 2))

    with pytest.raises(UnreadableFrame, match="several images"):
        decode_image(saved(first, image_format, save_all=True, append_images=[second]), LIMITS)


@pytest.mark.parametrize("next_page", ["itself", "nowhere"])
def test_decoding_when_a_tiffs_next_page_is_no_page_ends_at_once(next_page):
    """A page list that runs in a ring or off the end is not walked: one whole frame, or the caller's error."""
    pixels = make_frame(8, 8)
    data = bytearray(encode(pixels, "TIFF"))
    first = struct.unpack_from("<I", data, 4)[0]
    entries = struct.unpack_from("<H", data, first)[0]
    struct.pack_into("<I", data, first + 2 + 12 * entries, first if next_page == "itself" else 2**31)

    try:
        frame = decode_image(bytes(data), LIMITS)
    except CallerError:
        return

    np.testing.assert_array_equal(frame.pixels, pixels)


@pytest.mark.parametrize(("width", "height"), [(0, 4), (4, 0), (0, 0)])
def test_decoding_when_the_image_has_no_pixels_is_refused(width, height):
    """An image without rows or columns is unreadable, not an empty frame."""
    with pytest.raises(UnreadableFrame):
        decode_image(png(width, height, 8, 2, b"\0" * height), LIMITS)


@pytest.mark.parametrize("side", [3, 12_000, 40_000, 2**31 - 1])
@pytest.mark.parametrize("read", [read_header, decode_image])
def test_reading_when_the_header_promises_too_many_pixels_is_refused_before_decoding(side, read):
    """The header decides: there are no pixels at all in these files, and still the answer is that they are too many."""
    with pytest.raises(FrameTooLarge, match="more than 8 pixels"):
        read(png(side, side, 8, 2, b""), FrameLimits(max_pixels=8))


def test_decoding_when_pixels_are_exactly_at_the_limit_is_allowed():
    """The limit is the largest allowed count, not the smallest refused one."""
    assert decode_image(encode(make_frame(4, 5)), FrameLimits(max_pixels=20)).pixels.shape == (4, 5, 3)


def test_decoding_when_bytes_are_over_the_limit_is_refused_and_says_both_numbers():
    """The byte limit comes first, before any look into the bytes."""
    with pytest.raises(FrameTooLarge, match="101 bytes and the limit is 100"):
        decode_image(b"x" * 101, FrameLimits(max_bytes=100))


def test_decoding_when_a_compressed_text_inside_is_huge_is_refused():
    """A bomb in a text chunk costs no memory."""
    bomb = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 20_000_000))
    data = png(5, 4, 8, 2, png_rows(make_frame(4, 5), np.uint8), chunks=bomb)

    with pytest.raises(UnreadableFrame):
        decode_image(data, LIMITS)


@pytest.mark.parametrize("image_format", ["BMP", "TIFF"])
def test_decoding_when_the_format_is_known_but_not_accepted_here_says_what_is(image_format):
    """A line that takes PNG and JPEG tells so to who sends another format."""
    limits = FrameLimits(formats=frozenset({"PNG", "JPEG"}))

    with pytest.raises(MediaTypeNotAllowed, match="send JPEG, PNG"):
        decode_image(encode(make_frame(4, 4), image_format), limits)


def test_decoding_when_the_format_is_foreign_is_refused():
    """Formats that nobody asked for are not even tried."""
    with pytest.raises(UnreadableFrame, match="no image of an accepted format"):
        decode_image(encode(make_frame(4, 4), "GIF"), LIMITS)


def test_decoding_when_the_body_is_empty_says_so():
    """An empty body has its own sentence."""
    with pytest.raises(UnreadableFrame, match="empty"):
        decode_image(b"", LIMITS)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_decoding_when_an_orientation_is_noted_ignores_it(image_format, orientation):
    """Frames are taken as stored, because masks and cameras know nothing of EXIF."""
    image, exif = Image.fromarray(make_frame(8, 20)), Image.Exif()
    exif[0x0112] = orientation

    frame = decode_image(saved(image, image_format, exif=exif), LIMITS)

    assert (frame.height, frame.width) == (8, 20)
    np.testing.assert_array_equal(frame.pixels, decode_image(saved(image, image_format), LIMITS).pixels)


def test_decoding_masks_when_an_orientation_is_noted_ignores_it():
    """A mask lies on its frame as both are stored."""
    marked, exif = np.zeros((8, 20), np.uint8), Image.Exif()
    marked[1, 2] = 255
    exif[0x0112] = 6

    np.testing.assert_array_equal(decode_mask(saved(Image.fromarray(marked), "TIFF", exif=exif)), marked > 0)


@pytest.mark.parametrize(
    ("target", "decoded"),
    [
        (None, (96, 160)),
        ((96, 160), (96, 160)),
        ((49, 80), (96, 160)),
        ((48, 80), (48, 80)),
        ((48, 81), (96, 160)),
        ((24, 40), (24, 40)),
        ((12, 20), (12, 20)),
        ((2, 2), (12, 20)),
    ],
)
def test_decoding_when_a_jpeg_has_a_target_uses_the_smallest_scale_not_below_it(target, decoded):
    """A scaled decode is never smaller than the target and still tells the original's size."""
    frame = decode_image(encode(make_frame(96, 160), "JPEG"), LIMITS, target)

    assert frame.pixels.shape == (*decoded, 3)
    assert (frame.height, frame.width) == (96, 160)


def test_decoding_when_a_png_has_a_target_decodes_it_fully():
    """Only JPEG knows a cheaper size."""
    assert decode_image(encode(make_frame(96, 160)), LIMITS, (12, 20)).pixels.shape == (96, 160, 3)


def test_reading_the_header_when_the_image_is_good_tells_format_size_and_mode():
    """The header is what limits and answers need, read without a pixel."""
    header = read_header(encode(make_frame(9, 7), "JPEG"), LIMITS)

    assert (header.format, header.height, header.width, header.mode) == ("JPEG", 9, 7, "RGB")


@pytest.mark.parametrize("size", ["smaller", "larger", "cropped", "one_row"])
def test_resize_when_compared_with_stored_pixels_is_the_same_to_the_bit(size):
    """The resize under every calibrated threshold never changes unnoticed; `data/make_resized.py` wrote the pixels."""
    with np.load(STORED) as stored:
        frame, expected = stored["frame"], stored[size]
    margin = 3 if size == "cropped" else 0

    resized = fit_to_input(frame, make_input(*expected.shape[:2], margin))

    np.testing.assert_array_equal(resized, expected)
    assert resized.flags.c_contiguous


@given(images(), st.integers(1, 30), st.integers(1, 30))
def test_resize_when_the_frame_is_mirrored_is_mirrored(pixels, height, width):
    """Left and right, top and bottom are treated alike, to the bit."""
    spec = make_input(height, width)

    resized = fit_to_input(pixels, spec)

    np.testing.assert_array_equal(fit_to_input(pixels[:, ::-1], spec), resized[:, ::-1])
    np.testing.assert_array_equal(fit_to_input(pixels[::-1], spec), resized[::-1])


@given(images(channels=None), st.integers(1, 30), st.integers(1, 30))
def test_resize_when_grey_is_repeated_keeps_the_channels_equal(grey, height, width):
    """A grey frame gives the same pixels whether it is repeated before the resize or after it."""
    spec = make_input(height, width)

    resized = fit_to_input(np.stack([grey] * 3, axis=-1), spec)

    alone = np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resized, np.stack([alone] * 3, axis=-1))


@given(images())
def test_resize_when_the_frame_has_the_size_already_changes_nothing(pixels):
    """No pixel moves without need."""
    np.testing.assert_array_equal(fit_to_input(pixels, make_input(*pixels.shape[:2])), pixels)


def test_resize_when_the_input_is_cropped_keeps_the_centre():
    """A centre crop cuts the same from both sides of the resized frame."""
    pixels = make_frame(20, 30, seed=8)

    np.testing.assert_array_equal(fit_to_input(pixels, make_input(14, 24, margin=3)), pixels[3:17, 3:27])


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB", "I;16"])
def test_mask_when_any_layout_stores_it_is_true_where_colours_are_above_zero(mode):
    """Masks are read from whatever drew them; an alpha channel that hides nothing says nothing."""
    marked = make_frame(6, 8, seed=9)[:, :, 0] > 110
    image = Image.fromarray(marked.astype(np.uint8) * 255).convert(mode)

    np.testing.assert_array_equal(decode_mask(saved(image, "PNG")), marked)
    np.testing.assert_array_equal(decode_region_mask(saved(image, "PNG")), marked)


@pytest.mark.parametrize(("white", "kind"), [(1, np.uint8), (255, np.uint8), (65535, np.uint16)])
def test_region_mask_when_it_has_another_range_is_cut_at_the_middle_of_it(white, kind):
    """What is nearer to black is left out, however many bits say so."""
    values = np.array([[0, white // 2, white // 2 + 1, white]], kind)

    decoded = decode_region_mask(saved(Image.fromarray(values), "PNG"))

    np.testing.assert_array_equal(decoded, values > white / 2)


def test_region_mask_when_a_jpeg_blurs_its_edges_leaves_out_what_was_painted_black():
    """A codec's ringing beside an edge inspects nothing."""
    painted, data = _ringing("JPEG", quality=50)

    np.testing.assert_array_equal(decode_region_mask(data), painted)


def _ringing(image_format, **options):
    """Return what was painted, and a file in which greys lie beside it."""
    painted = np.zeros((64, 80), bool)
    painted[5:43, 7:51] = True
    data = saved(Image.fromarray(painted.astype(np.uint8) * 255), image_format, **options)
    assert (decode_mask_values(data)[~painted] > 0).sum() > 100
    return painted, data


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("JPEG", {"quality": 50}), ("TIFF", {"compression": "jpeg", "quality": 50}), ("WEBP", {"quality": 30})],
    ids=["jpeg", "jpeg in a tiff", "webp"],
)
def test_mask_when_a_lossy_codec_blurs_its_edges_marks_what_was_painted(image_format, options):
    """Ringing beside a defect is no defect, neither to learn from nor to measure by."""
    painted, data = _ringing(image_format, **options)

    assert is_lossy(data)
    assert (decode_mask(data) == painted).mean() > 0.995


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("BMP", {}), ("WEBP", {"lossless": True})],
    ids=["png", "tiff", "tiff of lzw", "bmp", "webp"],
)
def test_mask_when_values_name_kinds_of_defects_marks_all_of_them(image_format, options):
    """Values from 1 up are marked in every file that keeps them as they were drawn."""
    kinds = np.arange(4, dtype=np.uint8).repeat(12).reshape(4, 12)
    data = saved(Image.fromarray(kinds), image_format, **options)

    assert not is_lossy(data)
    np.testing.assert_array_equal(decode_mask(data), kinds > 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("decode", [decode_mask, decode_region_mask])
def test_mask_when_nothing_is_painted_somewhere_then_the_colour_under_it_marks_nothing(decode, mode):
    """Programs leave white, or anything, where a layer is transparent."""
    painted = make_frame(6, 8, seed=9)[:, :, 0] > 110
    layer = np.full((6, 8, 4), 255, np.uint8)
    layer[..., 3] = painted * 255
    image = Image.fromarray(layer)
    if mode == "P":
        image = Image.fromarray(painted.astype(np.uint8), "P")
        image.putpalette([255] * 6)
    data = saved(image if mode == "P" else image.convert(mode), "PNG", **({"transparency": 0} if mode == "P" else {}))

    np.testing.assert_array_equal(decode(data), painted)


def test_mask_when_damaged_is_refused():
    """A mask that lost its end is refused like a frame."""
    data = encode(make_frame(32, 32)[:, :, 0])

    with pytest.raises(UnreadableFrame):
        decode_mask(data[: len(data) // 2])


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
@pytest.mark.parametrize("decode", [decode_mask, decode_region_mask])
def test_mask_when_its_end_was_lost_is_refused(decode, image_format):
    """Rows that a codec makes black would be rows that nobody inspects."""
    data = encode(np.random.default_rng(7).integers(0, 2, (64, 64), np.uint8) * 255, image_format)

    for kept in range(len(data) // 2, len(data), 97):
        with pytest.raises(UnreadableFrame):
            decode(data[:kept] + bytes(len(data) - kept))
        with pytest.raises(UnreadableFrame):
            decode(data[:kept] + b"\xff\xd9")


@pytest.mark.parametrize("channels", [3, None], ids=["rgb", "grey"])
def test_png_when_encoded_and_decoded_holds_the_same_pixels(channels):
    """What we draw is what arrives."""
    pixels = make_frame(9, 11) if channels else make_frame(9, 11)[:, :, 0]

    decoded = decode_image(frames.encode_png(pixels), LIMITS).pixels

    np.testing.assert_array_equal(decoded, pixels if channels else np.stack([pixels] * 3, axis=-1))


def test_jpeg_when_encoded_and_decoded_is_close():
    """Report pictures lose only a little; tolerance: quality 90 on noise of 8 grey levels."""
    pixels = np.full((16, 16, 3), 77, np.uint8)

    assert np.abs(decode_image(frames.encode_jpeg(pixels), LIMITS).pixels.astype(int) - 77).max() <= 2


def test_resizing_a_map_when_it_is_constant_keeps_the_value():
    """Maps are resized as real numbers, without a detour through 8 bits."""
    resized = frames.resize_map(np.full((5, 7), 0.1234567, np.float32), 11, 3)

    assert resized.shape == (11, 3)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, 0.1234567, rtol=1e-6)  # float32 sums of filter weights


def test_resizing_when_the_size_fits_already_returns_the_same():
    """Nothing is copied or filtered without need."""
    anomaly_map, mask, pixels = np.zeros((4, 6), np.float32), np.ones((4, 6), bool), make_frame(4, 6)

    assert frames.resize_map(anomaly_map, 4, 6) is anomaly_map
    assert frames.resize_mask(mask, 4, 6) is mask
    assert frames.resize_pixels(pixels, 4, 6) is pixels


def test_resizing_a_mask_when_enlarged_by_a_whole_factor_repeats_it():
    """Masks stay true or false."""
    mask = make_frame(3, 4)[:, :, 0] > 110

    np.testing.assert_array_equal(frames.resize_mask(mask, 6, 8), mask.repeat(2, axis=0).repeat(2, axis=1))


def test_resizing_pixels_when_asked_returns_height_before_width():
    """Pictures for people obey the same order of sizes."""
    assert frames.resize_pixels(make_frame(10, 20), 5, 8).shape == (5, 8, 3)


@pytest.mark.parametrize("side", [9_600, 20_000], ids=["where Pillow warns", "where Pillow refuses"])
def test_header_when_the_frame_is_larger_than_the_codec_likes_then_only_our_limit_counts(side):
    """Long frames of line cameras are let in by whoever raises the limit, without a warning, and refused otherwise."""
    header = png(side, side, 8, 0, b"")

    promised = read_header(header, FrameLimits(max_pixels=side * side))

    assert (promised.height, promised.width) == (side, side)
    with pytest.raises(FrameTooLarge, match=f"{side * side - 1} pixels"):
        read_header(header, FrameLimits(max_pixels=side * side - 1))


@pytest.mark.parametrize("bit_depth", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_decoding_when_a_camera_has_fewer_bits_than_the_file_keeps_its_upper_eight(image_format, bit_depth):
    """A 12-bit camera's values in a 16-bit file are not black, in either container."""
    deep = np.random.default_rng(2).integers(0, 2**bit_depth, (6, 5)).astype(np.uint16)

    frame = decode_image(encode(deep, image_format), LIMITS, bit_depth=bit_depth)

    np.testing.assert_array_equal(frame.pixels, np.stack([deep >> (bit_depth - 8)] * 3, axis=-1))


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_decoding_when_a_value_has_more_bits_than_the_camera_is_refused(image_format):
    """A value that would wrap round to black is refused, never clipped in silence."""
    deep = np.full((6, 5), 1 << 12, np.uint16)

    with pytest.raises(UnreadableFrame, match="more than 12 bits"):
        decode_image(encode(deep, image_format), LIMITS, bit_depth=12)


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "JPEG"])
def test_decoding_when_the_file_has_eight_bits_ignores_the_bit_depth(image_format):
    """What a camera's deep files hold says nothing of files of eight bits."""
    data = encode(make_frame(9, 8), image_format)

    np.testing.assert_array_equal(decode_image(data, LIMITS, bit_depth=12).pixels, decode_image(data, LIMITS).pixels)


def test_decoding_when_colours_of_sixteen_bits_are_said_to_have_twelve_is_refused():
    """The codec keeps the empty upper bits of such colours, so they are refused rather than taken for black."""
    deep = np.random.default_rng(3).integers(0, 2**12, (6, 5, 3))

    with pytest.raises(UnreadableFrame, match="grey of 16 bits"):
        decode_image(png(5, 6, 16, 2, png_rows(deep, ">u2")), LIMITS, bit_depth=12)


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "JPEG"])
def test_decoding_when_the_frame_is_grey_holds_its_pixels_once(image_format):
    """Twenty megapixels of grey are 20 MB and not 60: the three channels are the same bytes."""
    frame = decode_image(encode(make_frame(16, 24)[:, :, 0], image_format), LIMITS)

    assert frame.pixels.shape == (16, 24, 3)
    assert frames.is_grey(frame.pixels)


@given(images(channels=None), st.integers(1, 30), st.integers(1, 30))
def test_resize_when_grey_is_held_once_gives_the_same_bits(grey, height, width):
    """The quick way of grey frames is the slow one, to the bit."""
    spec = make_input(height, width)

    np.testing.assert_array_equal(
        fit_to_input(frames.to_rgb(grey), spec), fit_to_input(np.stack([grey] * 3, axis=-1), spec)
    )


def test_resize_when_frames_are_cut_gives_the_canvas():
    """What is resized and cropped is all that the tiles cover."""
    tiling = Tiling(rows=2, columns=3, overlap_height=4, overlap_width=2)

    canvas = fit_to_input(make_frame(40, 50), make_input(16, 12, 3, tiling))

    assert canvas.shape == (28, 32, 3)
    assert canvas.flags.c_contiguous
