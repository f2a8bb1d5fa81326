"""Makes README's picture: generated brushed-metal parts, a detector fitted on good ones, a scratch it never saw.

Everything is generated from a seed, so the picture is free to use. The overlay is the service's own.

    .venv/bin/python tests/benchmarks/readme_picture.py .github/overlay.png
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from rich.console import Console

from service.contract.bundle import load_bundle
from service.contract.frames import encode_png, fit_to_input
from service.contract.heatmaps import overlay
from service.contract.policy import judge
from training.config import load_config
from training.export import GraphRun
from training.progress import choose_reporter
from training.run import train
from training.run_directory import LineRequest, RunRequest

_SIDE = 384
_GOOD, _HELD = 120, 12
_HOLES = ((0.22, 0.22), (0.22, 0.78), (0.78, 0.22), (0.78, 0.78))


def draw_part(rng: Generator, *, scratched: bool) -> NDArray[np.uint8]:
    """Return one part, `(384, 384, 3)` uint8: brushed metal, four holes and a bore, never quite in place."""
    y, x = np.mgrid[0:_SIDE, 0:_SIDE].astype(np.float32) / _SIDE
    x, y = x + rng.normal(0, 0.006), y + rng.normal(0, 0.006)
    streaks = rng.normal(0, 1, (_SIDE, _SIDE + 64)).astype(np.float32)
    streaks = np.cumsum(streaks, axis=1)
    metal = 148 + 1.1 * (streaks[:, 64:] - streaks[:, :-64]) + 26 * np.cos(5 * (x - 0.4))
    if scratched:
        middle = 0.40 + 0.30 * (x - 0.1) + 0.02 * np.sin(17 * x)
        near = np.exp(-(((y - middle) / 0.0035) ** 2)) * ((x > 0.16) & (x < 0.52))
        metal += 85 * near - 45 * np.roll(near, 3, axis=0)
    for centre_y, centre_x in _HOLES:
        metal = _bore(metal, np.hypot(y - centre_y, x - centre_x), 0.055)
    metal = _bore(metal, np.hypot(y - 0.5, x - 0.5), 0.13)
    outside = (np.abs(x - 0.5) > 0.45) | (np.abs(y - 0.5) > 0.45)
    metal = np.where(outside, 34, metal) + rng.normal(0, 3, metal.shape)
    tinted = metal[..., None] * np.array([1.0, 0.99, 0.95])
    return np.clip(tinted, 0, 255).astype(np.uint8)


def _bore(metal: NDArray[np.float32], distance: NDArray[np.float32], radius: float) -> NDArray[np.float32]:
    rim = 50 * np.exp(-(((distance - radius - 0.012) / 0.008) ** 2))
    return np.where(distance < radius, 22, metal + rim).astype(np.float32)


def main() -> None:
    """Draw the line, fit the small configuration, and write the defective frame beside its overlay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--weights", type=Path, default=Path("../shared/weights"))
    arguments = parser.parse_args()
    rng = np.random.default_rng(7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        line = folder / "brushed_plate"
        for kind, count, scratched in (
            ("train/good", _GOOD, False),
            ("test/good", _HELD, False),
            ("test/scratch", 6, True),
        ):
            (line / kind).mkdir(parents=True)
            for index in range(count):
                (line / kind / f"{index:03d}.png").write_bytes(encode_png(draw_part(rng, scratched=scratched)))
        request = RunRequest(
            name=line.name,
            lines=(LineRequest(name=line.name, folder=line),),
            store=folder / "store",
            config=load_config("small"),
            weight_folders=(arguments.weights,),
        )
        finished = train(request, folder / "run", choose_reporter(Console()))
        bundle = load_bundle(finished.bundle)
    for name, metric in finished.report.lines[0].metrics.items():
        print(name, metric.value)
    pixels = draw_part(np.random.default_rng(70), scratched=True)
    spec = bundle.manifest.input
    policy = bundle.policies[bundle.manifest.name]
    scores, maps = GraphRun(bundle.model)(fit_to_input(pixels, spec)[None])
    window = spec.window(_SIDE, _SIDE)
    judgement = judge(float(scores[0]), maps[0], policy, bundle.manifest.output.score_rule, window, None)
    print(judgement.verdict, judgement.score, judgement.regions_total)
    painted = overlay(pixels, maps[0], policy, judgement.regions, window, (_SIDE, _SIDE))
    gap = np.full((_SIDE, 8, 3), 255, np.uint8)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    arguments.picture.write_bytes(encode_png(np.hstack([pixels, gap, painted])))


if __name__ == "__main__":
    main()
