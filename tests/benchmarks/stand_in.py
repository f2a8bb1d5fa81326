"""A stand-in detector for the service's benchmarks: as much work as a small real one, in a bundle like any other.

    python -m tests.benchmarks.stand_in STORE [--lines 10]

A feature extractor in the shape of MobileNet V1 with random weights, two levels, teacher and student as convolutions of
one pixel, and a map of the input's size: 19 ms of one core a frame. The frames are a textured surface with a sensor's
noise, 1024 by 1024 pixels of JPEG, 191 KiB. Everything is seeded. Nothing is learnt, and speed does not know.
"""

import argparse
import io
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from service.contract.bundle import CALIBRATION_FILE, MODEL_FILE, POLICY_FILE, REPORT_FILE, OutputSpec, line_file, seal
from service.contract.calibration import Calibration
from service.contract.frames import FrameLimits, decode_image, fit_to_input
from service.contract.golden import GoldenAnswer, write_golden
from service.contract.policy import Policy, ScoreRule, Verdict
from tests.factories import make_input, make_manifest, write_files

SIZE = 256
FRAME_SIZE = 1024
GOOD_PARTS = 40


class StandIn(nn.Module):
    """Frames `(B, 256, 256, 3)` uint8 to scores `(B,)` and maps `(B, 256, 256)`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            _block(32, 64, 1),
            _block(64, 128, 2),
            _block(128, 128, 1),
        )
        self.fine = nn.Sequential(_block(128, 256, 2), _block(256, 256, 1))
        self.coarse = nn.Sequential(_block(256, 512, 2), *[_block(512, 512, 1) for _ in range(5)])
        self.teacher = nn.Conv2d(256 + 512, 128, 1)
        self.student = nn.Sequential(nn.Conv2d(256 + 512, 128, 1), nn.ReLU(), nn.Conv2d(128, 128, 1))
        self.register_buffer("mean", torch.tensor([123.7, 116.3, 103.5]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([58.4, 57.1, 57.4]).view(1, 3, 1, 1))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Judge frames."""
        images = (frames.permute(0, 3, 1, 2).to(torch.float32) - self.mean) / self.deviation
        fine = self.fine(self.stem(images))
        coarse = nn.functional.interpolate(self.coarse(fine), scale_factor=2, mode="bilinear", align_corners=False)
        features = torch.cat([fine, coarse], 1)
        distance = ((self.teacher(features) - self.student(features)) ** 2).mean(1, keepdim=True)
        maps = nn.functional.interpolate(distance, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0]
        return maps.amax(dim=(1, 2)), maps


def make_model() -> bytes:
    """Return `model.onnx`."""
    torch.manual_seed(0)
    frames = torch.zeros((2, SIZE, SIZE, 3), dtype=torch.uint8)
    graph = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            StandIn().eval(),
            (frames,),
            input_names=["frames"],
            output_names=["score", "anomaly_map"],
            dynamic_shapes={"frames": {0: torch.export.Dim("B", min=1, max=256)}},
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(graph)
    return graph.getvalue()


def make_frame(seed: int = 0, size: int = FRAME_SIZE) -> Image.Image:
    """Return one frame of the surface."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 255, (size // 16, size // 16, 3), dtype=np.uint8))
    base = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    stripes = 20 * np.sin(x / 7) + 15 * np.sin(y / 11)
    pixels = 0.35 * base + 90 + stripes[..., None] + generator.normal(0, 4, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))


def make_jpeg(seed: int = 0, size: int = FRAME_SIZE) -> bytes:
    """Return a frame as a camera sends it."""
    return _encoded(make_frame(seed, size), format="JPEG", quality=90, subsampling=2)


def make_store(store: Path, lines: int = 1) -> Path:
    """Write a bundle of so many lines, `line0` and on, that share one engine, and return the store."""
    names = tuple(f"line{i}" for i in range(lines))
    name = names[0] if lines == 1 else "stand_in"
    spec = make_input(SIZE, SIZE)
    record = make_manifest(
        name=name,
        lines=names,
        detector="stand_in",
        input=spec,
        output=OutputSpec(map_height=SIZE, map_width=SIZE, score_rule=ScoreRule(kind="maximum")),
    )
    model = make_model()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def run(encoded: bytes) -> tuple[float, np.ndarray]:
        pixels = decode_image(encoded, FrameLimits(), spec.resize_target).pixels
        scores, maps = session.run(["score", "anomaly_map"], {"frames": fit_to_input(pixels, spec)[None]})
        return float(scores[0]), maps[0]

    good = [run(make_jpeg(seed)) for seed in range(1, GOOD_PARTS + 1)]
    scores = np.array([score for score, _ in good], np.float32)
    floor = float(np.median([anomaly_map for _, anomaly_map in good]))
    calibration = Calibration.from_good_parts(scores, scores, floor).to_bytes()
    most = float(scores.max())
    policy = Policy(
        version="1",
        review_threshold=1.5 * most,
        fail_threshold=2 * most,
        region_threshold=1.5 * most,
        map_floor=floor,
    )
    rules = policy.model_dump_json(indent=2).encode() + b"\n"
    png = _encoded(make_frame(0), format="PNG", compress_level=1)
    score, anomaly_map = run(png)
    answers = [
        GoldenAnswer(line=line, file=f"golden/{i}.png", description="a part", score=score, verdict=Verdict.PASS)
        for i, line in enumerate(names)
    ]
    files = {
        MODEL_FILE: model,
        REPORT_FILE: b"<!doctype html><title>stand-in</title>\n",
        **{line_file(line, names, CALIBRATION_FILE): calibration for line in names},
        **{line_file(line, names, POLICY_FILE): rules for line in names},
        **write_golden(answers, [png] * lines, np.stack([anomaly_map] * lines)),
    }
    write_files(store / name / "1", seal(record, files))
    return store


def main() -> None:
    """Write a store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--lines", type=int, default=1)
    arguments = parser.parse_args()
    print(make_store(arguments.store, max(1, min(arguments.lines, 1000))))


def _block(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, out, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


def _encoded(image: Image.Image, **options: object) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, **options)
    return encoded.getvalue()


if __name__ == "__main__":
    main()
