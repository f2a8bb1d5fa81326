"""What a frame costs before the network sees it: CPU time by format and size, beside the bare codecs.

    .venv/bin/python tests/benchmarks/frames.py [--megapixels 0.3 5 20] [--input 256] [--json frames.json]

Prints a table in Markdown. `ours` is the whole way from the bytes of a body to the network's input, `read_frame` or
`decode_raw` and then `fit_to_input`. `Pillow` and `OpenCV` decode and resize without a check or a limit, and promise
nothing of truncated files; OpenCV decodes a JPEG at full size and resizes by INTER_AREA, so its pixels differ. All on
one thread, in CPU time of the process, which other work on the machine moves little. `MiB` is the peak of numpy's
arrays beyond the body; Pillow's own images, four bytes a pixel of colour, are not traced.
"""

import argparse
import io
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.contract.frames import FrameLimits, encode_png, fit_to_input, read_frame
from service.contract.geometry import InputSpec, Tiling, plain_input
from service.contract.raw_frames import PixelFormat, decode_raw
from service.contract.tiling import cut_tiles, stitch

LIMITS = FrameLimits()
ENCODED: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "JPEG RGB": ("JPEG", False, {"quality": 90}),
    "JPEG grey": ("JPEG", True, {"quality": 90}),
    "PNG RGB": ("PNG", False, {"compress_level": 1}),
    "PNG grey": ("PNG", True, {"compress_level": 1}),
    "BMP RGB": ("BMP", False, {}),
    "BMP grey": ("BMP", True, {}),
    "TIFF RGB": ("TIFF", False, {}),
    "TIFF grey": ("TIFF", True, {}),
}
RAW: tuple[PixelFormat, ...] = ("Mono8", "Mono12", "Mono12p", "BayerRG8", "RGB8", "BGR8")
_BITS = {"Mono8": 8, "Mono12": 16, "Mono12p": 12, "BayerRG8": 8, "RGB8": 24, "BGR8": 24}
_REPEATS, _LEAST_S = 30, 1.0


class Row(NamedTuple):
    """One format at one size, in milliseconds of CPU time."""

    frame: str
    kind: str
    body_mib: float
    ours_ms: float
    pillow_ms: float | None
    opencv_ms: float | None
    traced_mib: float


def main() -> None:
    """Measure what the options ask for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.3, 5.0, 20.0])
    parser.add_argument("--input", type=int, default=256, help="side of the network's input")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    rows: list[Row] = []
    for megapixels in options.megapixels:
        height = 2 * round((megapixels * 1e6 * 3 / 4) ** 0.5 / 2)
        width = 4 * round(height / 3)
        rows += measure(height, width, plain_input(options.input, options.input))
    print_table(rows)
    print_others(options.input)
    if options.json is not None:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n", encoding="utf-8")


def measure(height: int, width: int, spec: InputSpec) -> list[Row]:
    """Measure every format at one size of frame."""
    colours = draw(height, width)
    rows = []
    for kind, (codec, is_grey, how) in ENCODED.items():
        data = encode(colours[:, :, 0] if is_grey else colours, codec, how)
        rows.append(
            Row(
                f"{width}x{height}",
                kind,
                len(data) / 2**20,
                cpu_ms(lambda data=data: ours(data, spec)),
                cpu_ms(lambda data=data: by_pillow(data, spec)),
                cpu_ms(lambda data=data: by_opencv(data, spec)),
                traced_mib(lambda data=data: ours(data, spec)),
            )
        )
    for pixel_format in RAW:
        body = (
            bytes(height * width * _BITS[pixel_format] // 8) if "12" in pixel_format else as_raw(colours, pixel_format)
        )
        decode = _raw(body, pixel_format, width, height, spec)
        size = len(body) / 2**20
        rows.append(Row(f"{width}x{height}", pixel_format, size, cpu_ms(decode), None, None, traced_mib(decode)))
    return rows


def ours(data: bytes, spec: InputSpec) -> NDArray[np.uint8]:
    """Go the service's way."""
    return cut_tiles(fit_to_input(read_frame(data, LIMITS, spec).pixels, spec), spec)


def by_pillow(data: bytes, spec: InputSpec) -> NDArray[np.uint8]:
    """Decode and resize with Pillow alone, a JPEG at reduced scale as well."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (spec.width, spec.height))
        return np.asarray(image.convert("RGB").resize((spec.width, spec.height), Image.Resampling.BILINEAR))


def by_opencv(data: bytes, spec: InputSpec) -> NDArray[Any]:
    """Decode at full size and resize with OpenCV alone."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    return np.asarray(cv2.resize(image, (spec.width, spec.height), interpolation=cv2.INTER_AREA))


def _raw(body: bytes, pixel_format: PixelFormat, width: int, height: int, spec: InputSpec) -> Callable[[], object]:
    def decode() -> NDArray[np.uint8]:
        return fit_to_input(decode_raw(body, pixel_format, width, height, None, LIMITS).pixels, spec)

    return decode


def draw(height: int, width: int) -> NDArray[np.uint8]:
    """Draw a surface of cloudy colours with a little noise, so that no codec has it too easy."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(60, 200, (height // 16 + 1, width // 16 + 1, 3)).astype(np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    return np.clip(smooth + generator.integers(-3, 4, smooth.shape, dtype=np.int16), 0, 255).astype(np.uint8)


def encode(pixels: NDArray[np.uint8], codec: str, how: dict[str, Any]) -> bytes:
    """Encode as a camera's program would."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=codec, **how)
    return buffer.getvalue()


def as_raw(colours: NDArray[np.uint8], pixel_format: PixelFormat) -> bytes:
    """Return the bytes of an 8-bit format."""
    return colours.tobytes() if pixel_format in ("RGB8", "BGR8") else colours[:, :, 0].tobytes()


def cpu_ms(work: Callable[[], object]) -> float:
    """Return the median CPU time of the process, in milliseconds."""
    work()
    took: list[float] = []
    begun = time.perf_counter()
    while len(took) < 3 or (len(took) < _REPEATS and time.perf_counter() - begun < _LEAST_S):
        before = time.process_time()
        work()
        took.append(time.process_time() - before)
    return 1000 * median(took)


def traced_mib(work: Callable[[], object]) -> float:
    """Return the peak of what numpy and Python allocate, in MiB."""
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / 2**20


def print_table(rows: list[Row]) -> None:
    """Print one line a format and size."""
    print("| frame | format | body, MiB | ours, ms | Pillow, ms | OpenCV, ms | MiB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        others = ["" if value is None else f"{value:.1f}" for value in (row.pillow_ms, row.opencv_ms)]
        told = [f"{row.body_mib:.1f}", f"{row.ours_ms:.1f}", *others, f"{row.traced_mib:.0f}"]
        print("|", " | ".join((row.frame, row.kind, *told)), "|")


def print_others(side: int) -> None:
    """Print what tiles and heatmaps cost, which a frame's size does not change."""
    tiling = Tiling(rows=3, columns=2, overlap_height=side // 4, overlap_width=side // 4)
    height, width = 3 * side - side // 4 * 2, 2 * side - side // 4
    spec = InputSpec(height=side, width=side, resize_height=height, resize_width=width, tiles=tiling)
    canvas = draw(height, width)
    maps = np.random.default_rng(0).random((6, side, side)).astype(np.float32)
    grey = cv2.GaussianBlur(draw(side, side)[:, :, 0], (0, 0), 4)
    print("\n| what | ms |\n|---|---|")
    print(f"| cut {width}x{height} into 6 tiles | {cpu_ms(lambda: cut_tiles(canvas, spec)):.2f} |")
    print(f"| stitch 6 maps of {side}x{side} | {cpu_ms(lambda: stitch(maps, spec)):.2f} |")
    print(f"| grey heatmap {side}x{side} to PNG, ours | {cpu_ms(lambda: encode_png(np.asarray(grey))):.2f} |")
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    print(f"| the same, OpenCV | {cpu_ms(lambda: cv2.imencode('.png', grey, fast)):.2f} |")


if __name__ == "__main__":
    main()
