"""Promises about layouts of a TIFF: whatever its bits, planes, packing and order, pixels come right or not at all."""

import itertools
import struct
import zlib

import numpy as np
import pytest

from service.contract.frames import FrameLimits, decode_image, decode_mask_values, read_header
from service.errors import UnreadableFrame

HEIGHT, WIDTH = 20, 40
SHORT, LONG = 3, 4
UNCOMPRESSED, DEFLATE, PACK_BITS = 1, 8, 32773
WHITE_IS_ZERO, BLACK_IS_ZERO, COLOURS, PALETTE = 0, 1, 2, 3
CHUNKY, SEPARATE = 1, 2
FIRST_BIT_HIGHEST, FIRST_BIT_LOWEST = 1, 2
DEPTHS = (1, 2, 4, 8, 12, 16)
# Rows and columns of a strip or tile; without columns it is a strip.
STRIPS, ONE_STRIP, TILES, ONE_TILE, ODD_TILES = (7, None), (HEIGHT, None), (16, 16), (32, 48), (16, 9)


def write(values, bits, *, photometric, planes, compression, order, layout, bit_order=FIRST_BIT_HIGHEST, big=False):
    """Write values `(h, w, samples)` as a TIFF by hand."""
    samples = values.shape[2]
    rows, columns = layout
    parts = np.split(values, samples, axis=2) if planes == SEPARATE else [values]
    pieces = []
    for part, top, left in itertools.product(parts, range(0, HEIGHT, rows), range(0, WIDTH, columns or WIDTH)):
        piece = part[top : top + rows, left : left + (columns or WIDTH)]
        if columns:
            piece = np.pad(piece, ((0, rows - piece.shape[0]), (0, columns - piece.shape[1]), (0, 0)))
        pieces.append(pack(rows_of_bytes(piece, bits, order), compression, bit_order))
    fields = {
        256: (SHORT, [WIDTH]),
        257: (SHORT, [HEIGHT]),
        258: (SHORT, [bits] * samples),
        259: (SHORT, [compression]),
        262: (SHORT, [photometric]),
        266: (SHORT, [bit_order]),
        277: (SHORT, [samples]),
        284: (SHORT, [planes]),
        (325 if columns else 279): (LONG, [len(piece) for piece in pieces]),
    }
    fields |= {322: (SHORT, [columns]), 323: (SHORT, [rows])} if columns else {278: (SHORT, [rows])}
    if photometric == PALETTE:
        fields[320] = (SHORT, [level * 257 for _ in range(3) for level in np.linspace(0, 255, 2**bits).astype(int)])
    head = 16 if big else 8
    places = head + np.cumsum([0, *map(len, pieces)])[:-1]
    fields[324 if columns else 273] = (LONG, [int(place) for place in places])
    blob = b"".join(pieces)
    return directory(fields, head + len(blob), "<" if order == "II" else ">", blob, big)


def rows_of_bytes(piece, bits, order):
    """Return a strip's or tile's bytes, of which each row begins with a byte of its own."""
    if bits == 16:
        return piece.astype("<u2" if order == "II" else ">u2").tobytes()
    each = piece.reshape(piece.shape[0], -1, 1) >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(each.reshape(piece.shape[0], -1).astype(np.uint8), axis=1).tobytes()


def pack(data, compression, bit_order):
    """Compress a strip or tile; PackBits as bytes that are copied."""
    if compression == DEFLATE:
        data = zlib.compress(data)
    if compression == PACK_BITS:
        runs = [data[at : at + 128] for at in range(0, len(data), 128)]
        data = b"".join(bytes([len(run) - 1]) + run for run in runs)
    if bit_order == FIRST_BIT_LOWEST:
        data = np.packbits(np.unpackbits(np.frombuffer(data, np.uint8)), bitorder="little").tobytes()
    return data


def directory(fields, at, order, blob, big):
    """Return the whole file: head, pieces, directory, and what does not fit into its entries."""
    count, entry, inside = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
    body, rest = struct.pack(order + count, len(fields)), b""
    rest_at = at + len(body) + len(fields) * (struct.calcsize(order + entry) + inside) + inside
    for tag, (kind, values) in sorted(fields.items()):
        packed = struct.pack(f"{order}{len(values)}{'H' if kind == SHORT else 'I'}", *values)
        if len(packed) > inside:
            packed, rest = struct.pack(order + ("Q" if big else "I"), rest_at + len(rest)), rest + packed
        body += struct.pack(order + entry, tag, kind, len(values)) + packed.ljust(inside, b"\0")
    magic = struct.pack(order + "HHHQ", 43, 8, 0, at) if big else struct.pack(order + "HI", 42, at)
    return (b"II" if order == "<" else b"MM") + magic + blob + body + b"\0" * inside + rest


def values_of(bits, samples):
    """Return values `(h, w, samples)` that use all of the bits."""
    return np.random.default_rng(bits).integers(0, 2**bits, (HEIGHT, WIDTH, samples))


def as_frame(values, bits, photometric):
    """Return what a frame of these values is, found without any decoder."""
    if photometric == WHITE_IS_ZERO:
        values = 2**bits - 1 - values
    levels = values * 255 // (2**bits - 1) if bits <= 8 else values >> (bits - 8)
    return np.broadcast_to(levels, (HEIGHT, WIDTH, 3))


def bit_depth_of(bits):
    """Return what a line is told of the depth of its frames."""
    return 12 if bits == 12 else 16


@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("compression", [UNCOMPRESSED, DEFLATE, PACK_BITS])
@pytest.mark.parametrize("planes", [CHUNKY, SEPARATE])
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO, COLOURS, PALETTE])
def test_decoding_when_a_tiff_has_any_layout_returns_its_pixels_or_refuses(photometric, planes, compression, order):
    """No half of an image is taken for all of it, whatever a layout's parts are put together."""
    for bits, layout, bit_order, big in itertools.product(
        DEPTHS,
        [STRIPS, ONE_STRIP, TILES, ONE_TILE, ODD_TILES],
        [FIRST_BIT_HIGHEST, FIRST_BIT_LOWEST],
        [False, True],
    ):
        if photometric == PALETTE and bits > 8:
            continue
        values = values_of(bits, 3 if photometric == COLOURS else 1)
        options = {"compression": compression, "order": order, "layout": layout, "bit_order": bit_order, "big": big}
        data = write(values, bits, photometric=photometric, planes=planes, **options)
        try:
            frame = decode_image(data, FrameLimits(), bit_depth=bit_depth_of(bits))
        except UnreadableFrame:
            continue
        np.testing.assert_array_equal(frame.pixels, as_frame(values, bits, photometric), err_msg=f"{bits} {options}")


@pytest.mark.parametrize("layout", [STRIPS, ONE_STRIP, TILES, ONE_TILE])
@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize(
    ("photometric", "bits", "planes", "compression"),
    [
        (COLOURS, 8, CHUNKY, UNCOMPRESSED),
        (COLOURS, 8, SEPARATE, UNCOMPRESSED),
        (COLOURS, 16, CHUNKY, UNCOMPRESSED),
        (COLOURS, 16, CHUNKY, DEFLATE),
        (COLOURS, 16, SEPARATE, DEFLATE),
        (COLOURS, 16, SEPARATE, PACK_BITS),
        (BLACK_IS_ZERO, 1, SEPARATE, UNCOMPRESSED),
        (BLACK_IS_ZERO, 4, CHUNKY, UNCOMPRESSED),
        (BLACK_IS_ZERO, 16, CHUNKY, UNCOMPRESSED),
        (BLACK_IS_ZERO, 16, SEPARATE, DEFLATE),
        (WHITE_IS_ZERO, 8, CHUNKY, UNCOMPRESSED),
        (PALETTE, 8, CHUNKY, UNCOMPRESSED),
    ],
)
def test_decoding_when_a_tiff_is_as_cameras_write_it_returns_its_pixels(
    photometric, bits, planes, compression, order, layout
):
    """What is read rightly is not refused with what is not."""
    values = values_of(bits, 3 if photometric == COLOURS else 1)
    data = write(
        values, bits, photometric=photometric, planes=planes, compression=compression, order=order, layout=layout
    )

    np.testing.assert_array_equal(decode_image(data, FrameLimits()).pixels, as_frame(values, bits, photometric))


@pytest.mark.parametrize("layout", [STRIPS, ONE_STRIP, TILES])
@pytest.mark.parametrize(("order", "big"), [("II", False), ("MM", False), ("II", True)])
def test_decoding_when_planes_of_16_bits_are_not_compressed_is_refused_and_says_what_to_write(layout, order, big):
    """Half of each plane would be the whole image, and the lower half of the part would never be looked at."""
    options = {"compression": UNCOMPRESSED, "order": order, "layout": layout, "big": big}
    data = write(values_of(16, 3), 16, photometric=COLOURS, planes=SEPARATE, **options)

    with pytest.raises(UnreadableFrame, match="interleaved samples, compressed, or as PNG"):
        decode_image(data, FrameLimits())


@pytest.mark.parametrize("read", [read_header, decode_mask_values])
def test_reading_when_planes_can_not_be_read_is_refused_for_headers_and_masks_too(read):
    """A mask of which half is read marks other places."""
    options = {"compression": UNCOMPRESSED, "order": "II", "layout": STRIPS}
    data = write(values_of(4, 1), 4, photometric=BLACK_IS_ZERO, planes=SEPARATE, **options)

    with pytest.raises(UnreadableFrame, match="separate planes"):
        read(data, *([FrameLimits()] if read is read_header else []))


@pytest.mark.parametrize("compression", [UNCOMPRESSED, DEFLATE])
@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("is_told", [True, False])
def test_decoding_when_white_is_0_in_more_than_8_bits_is_refused_and_says_what_to_write(is_told, bits, compression):
    """The codec turns the others round and not these; without a word in the file, nobody knows."""
    options = {"compression": compression, "order": "II", "layout": STRIPS}
    data = write(values_of(bits, 1), bits, photometric=WHITE_IS_ZERO, planes=CHUNKY, **options)
    entry = struct.pack("<HHI", 262, SHORT, 1)
    assert data.count(entry) == 1

    with pytest.raises(UnreadableFrame, match="write black as 0, or a PNG"):
        decode_image(data if is_told else data.replace(entry, struct.pack("<HHI", 263, SHORT, 1)), FrameLimits())


@pytest.mark.parametrize("tag", [258, 259, 262, 266, 284])
@pytest.mark.parametrize("kind", [1, 8, 9, 18])
def test_decoding_when_a_code_is_of_a_kind_that_nobody_writes_is_refused(tag, kind):
    """One decoder takes such a number for what it says, another for none."""
    options = {"compression": UNCOMPRESSED, "order": "II", "layout": STRIPS}
    data = write(values_of(8, 1), 8, photometric=BLACK_IS_ZERO, planes=CHUNKY, **options)
    entry = struct.pack("<HHI", tag, SHORT, 1)
    assert data.count(entry) == 1

    with pytest.raises(UnreadableFrame, match="contradicts itself"):
        decode_image(data.replace(entry, struct.pack("<HHI", tag, kind, 1)), FrameLimits())


def test_decoding_when_more_strips_are_listed_than_the_image_has_rows_for_is_refused():
    """Those that are over are drawn over the first ones."""
    options = {"compression": UNCOMPRESSED, "order": "II", "layout": STRIPS}
    data = write(values_of(8, 1), 8, photometric=BLACK_IS_ZERO, planes=CHUNKY, **options)
    height = struct.pack("<HHIH", 257, SHORT, 1, HEIGHT)
    assert data.count(height) == 1

    with pytest.raises(UnreadableFrame, match="contradicts itself"):
        decode_image(data.replace(height, struct.pack("<HHIH", 257, SHORT, 1, 14)), FrameLimits())


@pytest.mark.parametrize("compression", [UNCOMPRESSED, DEFLATE])
@pytest.mark.parametrize("planes", [CHUNKY, SEPARATE])
@pytest.mark.parametrize("layout", [STRIPS, ONE_STRIP, TILES])
def test_decoding_when_another_tiff_follows_the_last_piece_is_refused(layout, planes, compression):
    """Where a page ends follows from what a piece holds, which is one sample of a plane."""
    options = {"compression": compression, "order": "II", "layout": layout}
    data = write(values_of(8, 3), 8, photometric=COLOURS, planes=planes, **options)
    at = int.from_bytes(data[4:8], "little")
    pieces, fields = data[8:at], data[at:]
    moved = bytearray(data[:4] + struct.pack("<I", 8) + fields + pieces)
    for place in range(10, 10 + 12 * struct.unpack_from("<H", moved, 8)[0], 12):
        tag, kind, count, value = struct.unpack_from("<HHII", moved, place)
        is_outside = count * (2 if kind == SHORT else 4) > 4
        begin = value + 8 - at if is_outside else place + 8
        struct.pack_into("<I", moved, place + 8, begin if is_outside else value)
        for index in range(count if tag in (273, 324) else 0):
            (piece_at,) = struct.unpack_from("<I", moved, begin + 4 * index)
            struct.pack_into("<I", moved, begin + 4 * index, piece_at + len(fields))
    np.testing.assert_array_equal(
        decode_image(bytes(moved), FrameLimits()).pixels, as_frame(values_of(8, 3), 8, COLOURS)
    )

    with pytest.raises(UnreadableFrame, match="several images"):
        decode_image(bytes(moved) + data, FrameLimits())
