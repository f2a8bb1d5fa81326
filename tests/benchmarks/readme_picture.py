"""Makes README's picture: generated brushed-metal parts, a detector fitted on good ones, a scratch it never saw.

Everything is generated from a seed, so the picture is free to use. The overlay is the service's own.

    .venv/bin/python tests/benchmarks/readme_picture.py .github/overlay.png
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console

from service.contract.bundle import load_bundle
from service.contract.frames import encode_png, fit_to_input
from service.contract.heatmaps import overlay
from service.contract.policy import judge
from training.bundling.export import GraphRun
from training.config import load_config
from training.procedural.plates import PLATE_SIDE, draw_plate
from training.progress import choose_reporter
from training.run import train
from training.run_directory import LineRequest, RunRequest

_GOOD, _HELD = 120, 12


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
                (line / kind / f"{index:03d}.png").write_bytes(encode_png(draw_plate(rng, scratched=scratched)))
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
    pixels = draw_plate(np.random.default_rng(70), scratched=True)
    spec = bundle.manifest.input
    policy = bundle.policies[bundle.manifest.name]
    scores, maps = GraphRun(bundle.model)(fit_to_input(pixels, spec)[None])
    window = spec.window(PLATE_SIDE, PLATE_SIDE)
    judgement = judge(float(scores[0]), maps[0], policy, bundle.manifest.output.score_rule, window, None)
    print(judgement.verdict, judgement.score, judgement.regions_total)
    painted = overlay(pixels, maps[0], policy, judgement.regions, window, (PLATE_SIDE, PLATE_SIDE))
    gap = np.full((PLATE_SIDE, 8, 3), 255, np.uint8)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    arguments.picture.write_bytes(encode_png(np.hstack([pixels, gap, painted])))


if __name__ == "__main__":
    main()
