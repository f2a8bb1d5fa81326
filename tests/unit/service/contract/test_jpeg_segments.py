"""Promises of what is read of a JPEG's build: a plain head tells what Pillow finds, and nothing else passes for one."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from service.contract import frames
from service.contract.frames import FrameLimits, decode_image
from service.contract.jpeg_segments import PlainHead, end_of_jpeg, plain_head
from service.errors import CallerError
from tests.factories import encode, make_frame

HEIGHT, WIDTH = 45, 70
END = b"\xff\xd9"
TARGETS = [None, (45, 70), (44, 1), (22, 35), (11, 9), (5, 8), (1, 1), (90, 140)]


def write(mode="RGB", **options) -> bytes:
    """Return a frame as a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(make_frame(HEIGHT, WIDTH, seed=3)).convert(mode).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def segment(marker, content) -> bytes:
    """Return a segment of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(content)) + content


def after_start(data, added) -> bytes:
    """Return a JPEG with something added at its very beginning."""
    return data[:2] + added + data[2:]


PLAIN = {
    "colours": write(),
    "grey": write("L"),
    "full chroma": write(subsampling=0),
    "optimised": write(optimize=True),
    "restarts": write(restart_marker_blocks=3),
    "without JFIF": write()[:2] + write()[20:],
}


@pytest.mark.parametrize("data", PLAIN.values(), ids=PLAIN)
def test_plain_head_when_a_file_is_written_as_most_are_tells_its_size(data):
    """Height before width, and whether there are colours."""
    with Image.open(io.BytesIO(data)) as image:
        expected = PlainHead(image.height, image.width, image.mode == "L")

    assert plain_head(data) == expected


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(write(progressive=True), id="progressive"),
        pytest.param(write("CMYK"), id="four components"),
        pytest.param(write(comment="of a camera"), id="a note"),
        pytest.param(after_start(write(), segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")), id="a maker's segment"),
        pytest.param(after_start(write(), b"\xff"), id="padding"),
        pytest.param(after_start(write(), segment(0xE0, b"JFIF")), id="a short JFIF"),
        pytest.param(after_start(write(), segment(0xDB, b"") * 40), id="very many tables"),
        pytest.param(after_start(write(), b"\xff\xdb\0\0"), id="a segment of no length"),
        pytest.param(write().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), id="twelve bits"),
        pytest.param(write().replace(b"\xff\xc0\0\x11\x08\0", b"\xff\xc0\0\x11\x08\0\0"), id="a longer frame head"),
        pytest.param(write().replace(struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", 0, WIDTH)), id="no rows"),
        pytest.param(write().replace(b"\xff\xda\0\x0c\x03", b"\xff\xda\0\x08\x01"), id="a scan of one component"),
        pytest.param(write()[: write().index(b"\xff\xda") + 6], id="cut in its head"),
        pytest.param(write()[: write().index(b"\xff\xc0")] + END, id="without a frame"),
    ],
)
def test_plain_head_when_a_file_is_written_otherwise_tells_nothing(data):
    """Such a file is looked at as a whole."""
    assert plain_head(data) is None


def outcome(data, target):
    """Return what becomes of a file: its pixels, or the sentence that refuses it."""
    try:
        frame = decode_image(data, FrameLimits(max_bytes=2**16, max_pixels=2**13), target)
    except CallerError as error:
        return type(error), str(error)
    return frame.pixels.tobytes(), frame.pixels.strides, frame.height, frame.width


def damaged(data, generator) -> bytes:
    """Return a file of which up to three bytes are others, two times out of three in its head."""
    changed = bytearray(data)
    within = len(data) if generator.integers(3) == 0 else data.index(b"\xff\xda") + 14
    for place in generator.integers(within, size=generator.integers(1, 4)):
        changed[place] = generator.integers(256)
    return bytes(changed)


@pytest.mark.parametrize("data", PLAIN.values(), ids=PLAIN)
def test_decoding_when_the_head_is_plain_then_is_as_if_pillow_had_opened_the_file(monkeypatch, data):
    """Sound or damaged, at every scale: the same pixels, or the same sentence."""
    generator = np.random.default_rng(4)
    files = [data, data + data, data + END, data[:-2], data[: len(data) // 2], data + bytes(2**16)]
    files += [damaged(data, generator) for _ in range(40)]
    asked = [(file, target) for number, file in enumerate(files) for target in TARGETS[:: 1 if number == 0 else 3]]
    found = [outcome(*one) for one in asked]

    monkeypatch.setattr(frames, "plain_head", lambda _: None)

    assert found == [outcome(*one) for one in asked]


@pytest.mark.parametrize("data", PLAIN.values(), ids=PLAIN)
def test_decoding_when_the_head_is_plain_then_pillow_need_not_open_the_file(monkeypatch, data):
    """It takes twenty times as long as reading the head does."""
    monkeypatch.setattr(frames.Image, "open", None)

    assert decode_image(data, FrameLimits()).pixels.shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("padding", [0, 1], ids=["even", "odd"])
def test_end_when_something_follows_is_before_it(padding):
    """Wherever in the file it lies, and whatever looks like it in a preview."""
    data = encode(make_frame(16, 24), "JPEG", comment=bytes(padding) + END)

    assert [end_of_jpeg(data), end_of_jpeg(data + END), end_of_jpeg(data + b"more")] == [len(data)] * 3
    assert end_of_jpeg(data[:-2]) == len(data) - 2
