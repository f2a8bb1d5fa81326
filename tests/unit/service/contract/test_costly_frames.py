"""Promises about files that ask for far more work than their pixels: refused before a codec works, and no others."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from service.contract.frames import FrameLimits, decode_image, read_header
from service.contract.jpeg_restarts import restarts_fit
from service.contract.jpeg_segments import START_OF_SCAN, segments, without_notes
from service.contract.tiff_layout import TiffPage
from service.errors import FrameTooLarge, UnreadableFrame
from tests.factories import encode, make_frame

LIMITS = FrameLimits()
PIXELS = make_frame(40, 56, seed=4)[:, :, 0]
COMMENT = b"\xff\xfe\x00\x02"
SHORT, LONG, RATIONAL, SIGNED = 3, 4, 5, 9
WIDTH, HEIGHT, STRIPS, STRIP_ROWS, STRIP_BYTES = 256, 257, 273, 278, 279
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES = 322, 323, 324, 325


def jpeg(**options):
    """Encode the frame."""
    return encode(PIXELS, "JPEG", **options)


def first_scan(data):
    """Return where the first scan's marker stands."""
    return next(start - 4 for marker, start, _ in segments(data) if marker == START_OF_SCAN)


def with_scan_repeated(times):
    """Return a progressive JPEG whose last scan comes so many times more."""
    data = jpeg(progressive=True)
    last = max(start - 4 for marker, start, _ in segments(data) if marker == START_OF_SCAN)
    return data[:-2] + data[last:-2] * times + data[-2:]


def segment(marker, data):
    """Return a JPEG's segment."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def one_component_a_scan(times):
    """Return the head of a JPEG of three components, and so many scans of each."""
    head = struct.pack(">BHHB", 8, 40, 56, 3) + b"".join(bytes([name, 0x11, 0]) for name in (1, 2, 3))
    scans = b"".join(segment(0xDA, bytes([1, name, 0]) + b"\0\x3f\0") + b"\x55" for name in (1, 2, 3))
    return b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC0, head) + scans * times + b"\xff\xd9"


def with_chunks(chunk):
    """Return a PNG with something between its head and its pixels."""
    data = encode(PIXELS, "PNG")
    return data[:33] + chunk + data[33:]


def chunk(kind, data=b""):
    """Return a PNG's chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(fields, blob, *, size=(40, 56), compression=1):
    """Write a grey TIFF by hand; a value of None is where the blob begins, and a list lies there as well, as LONG."""
    head = {
        WIDTH: (LONG, size[1]),
        HEIGHT: (LONG, size[0]),
        258: (SHORT, 8),
        259: (SHORT, compression),
        262: (SHORT, 1),
    }
    entries = {**head, 277: (SHORT, 1), **fields}
    at = 8 + 2 + 12 * len(entries) + 4
    directory, rest = struct.pack("<H", len(entries)), b""
    for tag, (kind, value) in sorted(entries.items()):
        if isinstance(value, list):
            begin, count = at + len(blob) + len(rest), len(value)
            rest += struct.pack(f"<{count}I", *value)
        else:
            begin, count = at if value is None else value, 1
        directory += struct.pack("<HHII", tag, kind, count, begin)
    return b"II*\0\x08\0\0\0" + directory + b"\0" * 4 + blob + rest


def tiled(rows, columns, data=None, *, size=(40, 56), kind=LONG, more=None):
    """Write a TIFF of one tile, compressed with Deflate."""
    blob = zlib.compress(b"\x80" * (rows * columns)) if data is None else data
    fields = {TILE_WIDTH: (kind, columns), TILE_HEIGHT: (kind, rows), TILES: (LONG, None)}
    return tiff({**fields, TILE_BYTES: (LONG, len(blob)), **(more or {})}, blob, size=size, compression=8)


def in_strips(more=None, **options):
    """Write a TIFF of one strip, uncompressed, with fields that no decoder needs."""
    fields = {STRIPS: (LONG, None), STRIP_ROWS: (LONG, 40), STRIP_BYTES: (LONG, 40 * 56)}
    return tiff({**fields, **(more or {})}, PIXELS.tobytes(), **options)


def sharing_strips():
    """Write a TIFF of which all strips are the same bytes."""
    blob = zlib.compress(b"\x80" * 56) + b"\0" * 1000
    at = 8 + 2 + 12 * 9 + 4
    fields = {STRIPS: (LONG, [at] * 40), STRIP_ROWS: (LONG, 1), STRIP_BYTES: (LONG, [len(blob)] * 40)}
    return tiff(fields, blob, compression=8)


def run_lengths():
    """Write a BMP of run lengths, which Pillow can't write."""
    rows = (b"\x38\x80" + b"\0\0") * 40 + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, 56, 40, 1, 8, 1, len(rows), 0, 0, 256, 0)
    palette = b"".join(bytes([grey] * 3 + [0]) for grey in range(256))
    begin = 14 + len(head) + len(palette)
    return struct.pack("<2sIHHI", b"BM", begin + len(rows), 0, 0, begin) + head + palette + rows


def fields_over_each_other():
    """Write a TIFF of which two private fields are the same bytes."""
    data = in_strips({65000: (LONG, [1] * 10_000), 65001: (LONG, [1])})
    first, second = (data.index(struct.pack("<HH", tag, LONG)) for tag in (65000, 65001))
    return data[: second + 4] + data[first + 4 : first + 12] + data[second + 12 :]


def with_exif(count):
    """Write a TIFF whose EXIF directory has a field of so many fractions."""
    at = 8 + 2 + 12 * 10 + 4 + PIXELS.size
    directory = struct.pack("<HHHII", 1, 33434, RATIONAL, count, at + 18) + b"\0" * 4 + b"\1\0\0\0" * (2 * count)
    fields = {STRIPS: (LONG, None), STRIP_ROWS: (LONG, 40), STRIP_BYTES: (LONG, PIXELS.size), 34665: (LONG, at)}
    return tiff(fields, PIXELS.tobytes() + directory)


COSTLY = {
    "scans": (lambda: with_scan_repeated(40), "more than 32 scans"),
    "scans-one-component": (lambda: one_component_a_scan(20), "more than 32 scans"),
    "comments": (lambda: jpeg()[:2] + COMMENT * 5000 + jpeg()[2:], "more than 4096 segments"),
    "comments-before-a-scan": (
        lambda: with_scan_repeated(0)[:-2] + COMMENT * 5000 + jpeg()[-2:],
        "more than 4096 segments",
    ),
    "padding": (lambda: jpeg()[:2] + b"\xff" * 5000 + jpeg()[2:], "padded without end"),
    "stuffing": (lambda: jpeg()[:20] + b"\xff\0" * 5000 + jpeg()[20:], "padded without end"),
    "chunks": (lambda: with_chunks(chunk(b"IDAT") * 70_000), "more than 65536 chunks"),
    "notes": (lambda: with_chunks(chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 9999)) * 300), "256 that may be"),
    "plain-notes": (lambda: with_chunks(chunk(b"tEXt", b"k\0v") * 5000), "4096 that are no"),
    "run-lengths": (run_lengths, "run lengths"),
    "tiles-and-strips": (lambda: tiled(4096, 4096, more={STRIPS: (LONG, None)}), "contradicts itself"),
    "signed-tile": (lambda: tiled(4096, 4096, size=(1, 1), kind=SIGNED), "contradicts itself"),
    "strips-over-each-other": (sharing_strips, "lie over each other"),
    "strips": (lambda: in_strips({STRIPS: (LONG, [8] * 70_000)}), "more than 65536 strips"),
    "numbers": (lambda: in_strips({282: (LONG, [1] * 300_000)}), "directory is longer"),
    "numbers-of-profile": (lambda: in_strips({34675: (LONG, [1] * 300_000)}), "directory is longer"),
    "fields-over-each-other": (fields_over_each_other, "directory is longer"),
    "entries": (lambda: in_strips(dict.fromkeys(range(1000, 6000), (SHORT, 1))), "directory is longer"),
    "exif": (lambda: with_exif(300_000), "directory is longer"),
}


@pytest.mark.parametrize(("write", "why"), list(COSTLY.values()), ids=list(COSTLY))
def test_reading_when_a_file_asks_for_work_without_end_is_refused_and_says_why(write, why):
    """What would keep a decoder busy for minutes is counted, and the sentence says what there is too much of."""
    with pytest.raises(UnreadableFrame, match=why):
        decode_image(write(), LIMITS)


@pytest.mark.parametrize("read", [read_header, decode_image])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (16, 2**20), (2**20, 16)])
def test_reading_when_a_tile_is_far_larger_than_frames_may_be_is_refused(rows, columns, read):
    """A tile is decoded whole, whatever corner of it the image takes."""
    with pytest.raises(FrameTooLarge, match="strips or tiles"):
        read(tiled(rows, columns), FrameLimits(max_pixels=10_000))


@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (16, 16), (1024, 1024)])
def test_decoding_when_tiles_are_padded_returns_the_frame(rows, columns):
    """Tiles reach over the border of nearly every image, and over all of a small one."""
    count = -(-40 // rows) * -(-56 // columns)
    blob = zlib.compress(b"\x80" * (rows * columns))
    at = 8 + 2 + 12 * 10 + 4
    fields = {TILE_WIDTH: (LONG, columns), TILE_HEIGHT: (LONG, rows)}
    fields |= {TILES: (LONG, None), TILE_BYTES: (LONG, len(blob))}
    if count > 1:
        fields[TILES] = (LONG, [at + index * len(blob) for index in range(count)])
        fields[TILE_BYTES] = (LONG, [len(blob)] * count)

    frame = decode_image(tiff(fields, blob * count, compression=8), FrameLimits(max_pixels=40 * 56))

    np.testing.assert_array_equal(frame.pixels, np.full((40, 56, 3), 0x80, np.uint8))


def test_decoding_when_a_strip_is_said_to_hold_all_rows_returns_the_frame():
    """The largest number stands for a single strip in many files."""
    frame = decode_image(in_strips({STRIP_ROWS: (LONG, 2**32 - 1)}), FrameLimits(max_pixels=40 * 56))

    np.testing.assert_array_equal(frame.pixels[:, :, 0], PIXELS)


def test_decoding_when_each_row_is_a_strip_returns_the_frame():
    """Some programs write line cameras' long frames so."""
    height, width = 70_000, 2
    pixels = np.random.default_rng(6).integers(0, 256, (height, width), dtype=np.uint8)
    at = 8 + 2 + 12 * 9 + 4
    places = [at + row * width for row in range(height)]
    fields = {STRIPS: (LONG, places), STRIP_ROWS: (LONG, 1), STRIP_BYTES: (LONG, [width] * height)}

    frame = decode_image(tiff(fields, pixels.tobytes(), size=(height, width)), LIMITS)

    np.testing.assert_array_equal(frame.pixels[:, :, 0], pixels)


@pytest.mark.parametrize("tag", [33628, 50838, 65000])
def test_decoding_when_a_maker_keeps_many_numbers_in_a_field_of_its_own_returns_the_frame(tag):
    """Nobody takes such a field apart."""
    frame = decode_image(in_strips({tag: (LONG, [1] * 300_000)}), LIMITS)

    np.testing.assert_array_equal(frame.pixels[:, :, 0], PIXELS)


def test_decoding_when_a_png_has_a_plain_note_for_each_setting_returns_the_frame():
    """Notes that are not compressed cost as little as they are long."""
    frame = decode_image(with_chunks(chunk(b"tEXt", b"gain\0" + b"1.5") * 1000), LIMITS)

    np.testing.assert_array_equal(frame.pixels[:, :, 0], PIXELS)


def test_page_when_it_names_the_depth_of_samples_that_it_has_not_then_its_pieces_hold_no_more():
    """How far a piece may inflate follows from the samples that a decoder draws."""
    depths = {258: (SHORT, 8 | 60_000 << 16)}
    data = bytearray(tiled(40, 56, more=depths))
    at = data.index(struct.pack("<HH", 258, SHORT))
    data[at + 4 : at + 8] = struct.pack("<I", 2)

    (piece,) = TiffPage(bytes(data)).pieces()

    assert piece.most_bytes == 40 * 56


@pytest.mark.parametrize(
    "notes",
    [
        segment(0xE1, b"Exif\0\0" + b"II*\0\x08\0\0\0\0\0\0\0\0\0") * 3,
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\0\0\0\0\0\0\0" * 9),
        segment(0xFE, b"") * 4000,
        segment(0xE2, b"ICC_PROFILE\0\1\1" + b"\0" * 500),
    ],
    ids=["exif", "photoshop", "comments", "profile"],
)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}], ids=str)
def test_decoding_when_a_jpeg_has_notes_leaves_them_out_and_returns_the_same_pixels(notes, options):
    """A codec would read them at length, and they say nothing of the pixels."""
    data = encode(make_frame(40, 56, seed=4), "JPEG", **options)
    noted = data[:2] + notes + data[2:]

    assert without_notes(noted) == data
    assert without_notes(data) is data
    np.testing.assert_array_equal(decode_image(noted, LIMITS).pixels, decode_image(data, LIMITS).pixels)


def test_decoding_when_a_jpeg_holds_further_pictures_as_telephones_write_them_is_refused():
    """A second picture behind the first is found by its bytes, and not by a note of it."""
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "MPO", save_all=True, append_images=[Image.fromarray(PIXELS.T)])

    with pytest.raises(UnreadableFrame, match="several images"):
        decode_image(buffer.getvalue(), LIMITS)


@pytest.mark.parametrize("kind", [0xC9, 0xCA], ids=["sequential", "progressive"])
def test_decoding_when_a_jpeg_is_coded_arithmetically_is_refused(kind):
    """Its decoder makes a whole picture of a few bytes and warns of nothing."""
    head = struct.pack(">BHHB", 8, 40, 56, 1) + bytes([1, 0x11, 0])
    scans = segment(0xDA, b"\1\1\0\0\x3f\0") if kind == 0xC9 else b""
    for first, last in ((0, 0), (1, 63)) if kind == 0xCA else ():
        scans += segment(0xDA, bytes([1, 1, 0, first, last, 0])) + b"\x55"
    data = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + segment(kind, head) + scans + b"\x55\xaa\xff\xd9"

    with pytest.raises(UnreadableFrame, match="arithmetically"):
        decode_image(data, LIMITS)


def test_decoding_when_pixels_of_a_png_are_one_long_chunk_returns_them():
    """How much of a chunk is inflated at a time does not matter to what comes out."""
    pixels = np.random.default_rng(5).integers(0, 256, (400, 500), dtype=np.uint8)
    pixels[-1] = 0  # so that the rows are counted
    rows = np.concatenate([np.zeros((400, 1), np.uint8), pixels], axis=1)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 500, 400, 8, 0, 0, 0, 0))
    packed = zlib.compress(rows.tobytes())
    whole = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", packed + b"\0" * 200_000) + chunk(b"IEND")

    frame = decode_image(whole, LIMITS)

    np.testing.assert_array_equal(frame.pixels[:, :, 0], pixels)


@pytest.mark.parametrize("mark", [b"\xff\xd0", b"\xff\xd0\xff\x01"], ids=["restarts", "restarts-apart"])
def test_restarts_when_there_are_far_too_many_do_not_fit(mark):
    """Thousands of markers that belong to no scan are no restarts of one."""
    data = jpeg(progressive=True)
    interval = segment(0xDD, b"\0\1")
    at = first_scan(data)

    assert not restarts_fit(data[:at] + interval + data[at:-2] + mark * 5000 + data[-2:], closely=True)
