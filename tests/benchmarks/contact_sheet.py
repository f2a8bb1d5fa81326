"""Makes the contact sheet of models/README.md: one generated defect, and what each detector's overlay shows of it.

A woven cloth is generated from a seed, so the picture is free to use. Every detector is fitted on good cloth only, with
its small configuration, and exported; the overlay is the service's own. Runs are kept in the output folder, so the work
can be stopped and split over processes.

    .venv/bin/python tests/benchmarks/contact_sheet.py fit --output ../sheet --detectors inp_former,dadf
    .venv/bin/python tests/benchmarks/contact_sheet.py draw models/contact_sheet.png --output ../sheet
"""

import argparse
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from rich.console import Console

mpl.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models import DETECTORS
from service.contract.bundle import load_bundle
from service.contract.frames import encode_png, fit_to_input
from service.contract.heatmaps import overlay
from service.contract.policy import judge
from training.bundling.export import GraphRun
from training.comparison.compare import Cell, CellPlan, Means, cell_directory, complete, read_cell
from training.config import load_config
from training.progress import choose_reporter

_SIDE = 320
_THREAD = 10.0  # pixels from one thread to the next
_GOOD, _TESTED, _DEFECTIVE = 100, 10, 6
_LINE = "woven_cloth"
_SHOWN_SEED = 70
_COLUMNS = 4


def weave(rng: Generator, *, torn: bool) -> NDArray[np.uint8]:
    """Return one piece of cloth, `(320, 320, 3)` uint8, in uneven light; a torn one lacks a thread and has a stain."""
    y, x = np.mgrid[0:_SIDE, 0:_SIDE].astype(np.float32)
    shift_y, shift_x = rng.uniform(0, 2 * _THREAD, 2)
    bend = 1.5 * np.sin(2 * np.pi * y / _SIDE + rng.uniform(0, 6))
    over = np.cos(np.pi * (x + bend + shift_x) / _THREAD) * np.cos(np.pi * (y + shift_y) / _THREAD)
    warp = np.abs(np.sin(np.pi * (x + bend + shift_x) / _THREAD))
    weft = np.abs(np.sin(np.pi * (y + shift_y) / _THREAD))
    cloth = 96 + 78 * np.where(over > 0, warp, weft) + rng.normal(0, 5, x.shape)
    if torn:
        cloth[(np.abs(y - 122) < _THREAD / 2) & (x > 70) & (x < 180)] -= 60
        stain = np.exp(-(((y - 220) / 20) ** 2 + ((x - 230) / 30) ** 2))
        cloth = cloth * (1 - 0.45 * stain) + 30 * stain
    light = 1 + 0.06 * np.cos(2 * np.pi * (x / _SIDE - rng.uniform()))
    tinted = (cloth * light)[..., None] * np.array([0.86, 0.93, 1.0])
    return np.clip(tinted, 0, 255).astype(np.uint8)


def write_line(folder: Path) -> Path:
    """Write the line's frames and return its folder; frames that are there already are left as they are."""
    line, rng = folder / "lines" / _LINE, np.random.default_rng(7)
    kinds = (("train/good", _GOOD, False), ("test/good", _TESTED, False), ("test/torn", _DEFECTIVE, True))
    for kind, count, torn in kinds:
        (line / kind).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            data = encode_png(weave(rng, torn=torn))
            file = line / kind / f"{index:03d}.png"
            if not file.exists():
                file.write_bytes(data)
    return line


def plan(folder: Path, detector: str) -> CellPlan:
    """Return the run of one detector on the cloth; it is a texture, which one detector wants to be told."""
    return CellPlan(_LINE, folder / "lines" / _LINE, load_config("small", detector, ["product=texture"]))


def fit(folder: Path, detectors: list[str]) -> None:
    """Fit what is missing."""
    write_line(folder)
    means = Means(folder / "cells", speed_s=0.5)
    for result in complete([plan(folder, name) for name in detectors], means, choose_reporter(Console())):
        print(
            result.sentence if not isinstance(result, Cell) else f"{result.detector} {result.metrics['i_auroc'].value}"
        )


def draw(folder: Path, picture: Path) -> None:
    """Draw the frame and each detector's overlay of it, with verdict and name."""
    pixels = weave(np.random.default_rng(_SHOWN_SEED), torn=True)
    shown = [("the frame", pixels)]
    for name in DETECTORS:
        directory = cell_directory(folder / "cells", plan(folder, name))
        cell = read_cell(directory)
        if cell is None or cell.bundle is None:
            print(f"{name} was not fitted; run fit first")
            continue
        bundle = load_bundle(directory / cell.bundle)
        spec, policy = bundle.manifest.input, bundle.policies[_LINE]
        scores, maps = GraphRun(bundle.model)(fit_to_input(pixels, spec)[None])
        window = spec.window(_SIDE, _SIDE)
        judgement = judge(float(scores[0]), maps[0], policy, bundle.manifest.output.score_rule, window, None)
        print(name, judgement.verdict, f"{judgement.regions_total} regions")
        painted = overlay(pixels, maps[0], policy, judgement.regions, window, (_SIDE, _SIDE))
        shown.append((f"{name}: {judgement.verdict.value}", painted))
    rows = -(-len(shown) // _COLUMNS)
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=(2.2 * _COLUMNS, 2.35 * rows), layout="constrained")
    for place in axes.flat:
        place.axis("off")
    for place, (title, tile) in zip(axes.flat, shown, strict=False):
        place.imshow(tile)
        place.set_title(title, fontsize=8)
    figure.savefig(picture, dpi=90)


def main() -> None:
    """Fit or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("fit", "draw"))
    parser.add_argument("picture", type=Path, nargs="?", default=Path("models/contact_sheet.png"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--detectors", default=",".join(DETECTORS))
    arguments = parser.parse_args()
    if arguments.action == "fit":
        fit(arguments.output, arguments.detectors.split(","))
    else:
        draw(arguments.output, arguments.picture)


if __name__ == "__main__":
    main()
