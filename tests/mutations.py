"""Damaged files for tests: images whose bytes were flipped, cut, repeated, joined, or whose header lies. All seeded."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.factories import encode, make_frame

CUT = "cut"  # the end of the file is missing, image data with it


class Mutant(NamedTuple):
    """One damaged file.

    Attributes:
        kind: what was done to it.
        media_type: of the file it was.
        data: its bytes.
    """

    kind: str
    media_type: str
    data: bytes


def originals(*, defect: bool) -> list[tuple[str, bytes]]:
    """Return sound files of every codec that is accepted by default, of several kinds each, with their media types."""
    pixels = make_frame(defect=defect)
    grey = pixels[:, :, 0]
    return [
        ("image/jpeg", encode(pixels, "JPEG", quality=95)),
        ("image/jpeg", encode(pixels, "JPEG", quality=95, progressive=True)),
        ("image/jpeg", encode(grey, "JPEG", quality=95, restart_marker_rows=1)),
        ("image/png", encode(pixels)),
        ("image/png", encode(grey.astype(np.uint16) * 257)),
        ("image/png", _with_text(encode(pixels))),
        ("image/bmp", encode(pixels, "BMP")),
        ("image/tiff", encode(pixels, "TIFF", compression="tiff_lzw")),
        ("image/tiff", encode(pixels, "TIFF", compression="raw")),
        ("image/tiff", encode(pixels, "TIFF", compression="tiff_deflate")),
    ]


def mutants(count: int, *, defect: bool, seed: int = 0) -> Iterator[Mutant]:
    """Yield damaged files, the same for the same arguments."""
    generator = np.random.default_rng(seed)
    sound = originals(defect=defect)
    for index in range(count):
        media_type, data = sound[index % len(sound)]
        kind = _KINDS[int(generator.integers(len(_KINDS)))]
        yield Mutant(kind, media_type, _damage(kind, data, sound, generator))


def bomb(side: int, image_format: str, **options: Any) -> bytes:
    """Return a small file that promises `side` x `side` pixels, and keeps the promise."""
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, image_format, **options)
    return buffer.getvalue()


_KINDS = ("flip", "flip many", CUT, "insert", "zero", "repeat", "join", "head")


def _damage(kind: str, data: bytes, sound: list[tuple[str, bytes]], generator: np.random.Generator) -> bytes:
    changed = bytearray(data)
    at = int(generator.integers(len(data)))
    length = int(generator.integers(1, 1 + len(data) // 8))
    if kind in ("flip", "flip many"):
        for place in generator.integers(len(data), size=1 if kind == "flip" else 32):
            changed[place] ^= 1 << int(generator.integers(8))
    elif kind == CUT:
        # A tenth at least, so that pixels are missing and not only what follows them.
        del changed[int(len(data) * generator.uniform(0.02, 0.9)) :]
    elif kind == "insert":
        changed[at:at] = generator.bytes(length)
    elif kind == "zero":
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    elif kind == "repeat":
        changed[at:at] = changed[at : at + length]
    elif kind == "join":
        changed[at:] = sound[int(generator.integers(len(sound)))][1][at:]
    else:
        for place in generator.integers(min(64, len(data)), size=4):
            changed[place] = int(generator.integers(256))
    return bytes(changed)


def _with_text(png: bytes) -> bytes:
    """Add a text chunk, as programs write comments."""
    content = b"comment\0\0" + zlib.compress(bytes(2**19))
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    end = png.rindex(b"IEND") - 4
    return png[:end] + chunk + png[end:]
