"""Which of several configurations is better, judged without a single test frame.

Each is fitted on a line's good frames as a run fits it, and then tells the good frames that were held out from the same
frames with a defect planted into them at their own size: a scratch, a spot, a moved patch, a broad shade, and, where it
is asked for, a faint crack. None of them is what a detector plants for itself while it learns. A row shows the image
AUROC by kind, and their mean, by which a choice is made: "own" with the configuration's own score, the others with the
same maps read in another way. The line's test folder is never read. Tiles are a setting like others.

    .venv/bin/python tests/benchmarks/planted_defects.py ../shared/data/pcb --detector st_mae --set backbone=embedded
    .venv/bin/python tests/benchmarks/planted_defects.py LINE --detector inp_former --set 'tiles={rows: 2, columns: 2}'
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.blocks.maps import reduce_map, top_fraction_mean
from service.contract.frames import FrameLimits, decode_image, fit_to_input
from service.contract.tiling import Run, by_tiles
from training.bundling.export import DetectorRun
from training.config import RunConfig, load_config, score_rule_of
from training.data.detect import read_dataset
from training.data.loader import FileFrames
from training.data.samples import Sample
from training.data.split import split_good
from training.data.views import views_of
from training.fitting.detectors import choose_device, prepare_detector
from training.fitting.fit import FitSettings, fit
from training.measuring.metrics import auroc
from training.progress import SilentReporter
from training.reproducibility import make_deterministic

Pixels = NDArray[np.uint8]
_BATCH = 8
_FRACTIONS = (0.001, 0.003, 0.01, 0.03, 0.1)


def scratch(frame: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw a thin line, darker or lighter than what it crosses, over an eighth to a third of the frame."""
    side = min(frame.shape[:2])
    across, along = _straight(frame, rng)
    across = across + 0.02 * side * np.sin(along / side * rng.uniform(5, 15))
    line = (np.abs(across) < rng.uniform(0.004, 0.009) * side) & (np.abs(along) < rng.uniform(0.06, 0.17) * side)
    return _changed(frame, line.astype(np.float32), rng)


def spot(frame: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw a small ellipse, darker or lighter than what it covers."""
    height, width = frame.shape[:2]
    side = min(height, width)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    centre_y, centre_x = _place(rng, height, width)
    radii = rng.uniform(0.01, 0.03, 2) * side
    inside = ((y - centre_y) / radii[0]) ** 2 + ((x - centre_x) / radii[1]) ** 2 < 1
    return _changed(frame, inside.astype(np.float32), rng)


def patch(frame: Pixels, rng: np.random.Generator) -> Pixels:
    """Cut a rectangle out of the frame, turn it, and put it elsewhere."""
    height, width = frame.shape[:2]
    side = int(rng.uniform(0.05, 0.12) * min(height, width))
    here, there = ((int(rng.integers(height - side)), int(rng.integers(width - side))) for _ in range(2))
    cut = np.rot90(frame[here[0] : here[0] + side, here[1] : here[1] + side], int(rng.integers(1, 4)))
    result = frame.copy()
    result[there[0] : there[0] + side, there[1] : there[1] + side] = cut
    return result


def shade(frame: Pixels, rng: np.random.Generator) -> Pixels:
    """Darken or lighten a broad place with soft edges."""
    height, width = frame.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    centre_y, centre_x = _place(rng, height, width)
    radii = rng.uniform(0.06, 0.15, 2) * (height, width)
    soft = np.exp(-0.5 * (((y - centre_y) / radii[0]) ** 2 + ((x - centre_x) / radii[1]) ** 2))
    return _changed(frame, soft.astype(np.float32), rng)


def crack(frame: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw a crack: a faint line a pixel or two wide that wanders, over an eighth to a third of the frame."""
    side = min(frame.shape[:2])
    across, along = _straight(frame, rng)
    for waves in (4, 9, 23):  # a walk: the finer the bend, the smaller
        across = across + 0.1 / waves * side * np.sin(along / side * waves * 2 + rng.uniform(0, 2 * np.pi))
    half = rng.uniform(0.002, 0.004) * side
    line = np.clip(half + 0.5 - np.abs(across), 0, 1) * (np.abs(along) < rng.uniform(0.06, 0.17) * side)
    return _changed(frame, line.astype(np.float32), rng, rng.uniform(0.08, 0.2))


KINDS: dict[str, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "scratch": scratch,
    "spot": spot,
    "patch": patch,
    "shade": shade,
    "crack": crack,
}


def _straight(frame: Pixels, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lay a straight line anywhere; return each pixel's distance across and along it, `(H, W)`, from its middle."""
    height, width = frame.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    centre_y, centre_x = _place(rng, height, width)
    angle = rng.uniform(0, np.pi)
    across = (x - centre_x) * np.sin(angle) - (y - centre_y) * np.cos(angle)
    along = (x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)
    return across, along


def _place(rng: np.random.Generator, height: int, width: int) -> tuple[float, float]:
    return rng.uniform(0.12, 0.88) * height, rng.uniform(0.12, 0.88) * width


def _changed(
    frame: Pixels, share: NDArray[np.float32], rng: np.random.Generator, contrast: float | None = None
) -> Pixels:
    """Move the grey of a place by a part of the frame's own range, away from the nearer end where there is no room.

    The part is `contrast`, where it is given; else it is drawn.
    """
    grey = frame.astype(np.float32)
    place = float((grey.mean(axis=2) * share).sum() / max(share.sum(), 1e-6))
    low, high = np.percentile(grey, (1, 99))
    step = (rng.uniform(0.25, 0.5) if contrast is None else contrast) * max(high - low, 40.0)
    binary = float(np.mean((frame < 16) | (frame > 239))) > 0.95
    if binary:  # a scan of two greys knows no others
        return np.where(share[..., None] > 0.5, 255 - frame, frame).astype(np.uint8)
    darker = place - low > high - place if rng.random() < 0.5 else rng.random() < 0.5
    moved = grey + share[..., None] * (-step if darker else step)
    return np.clip(moved, 0, 255).round().astype(np.uint8)


def judge(line: Path, config: RunConfig, weights: Path, kinds: Sequence[str]) -> tuple[dict[str, list[float]], float]:
    """Fit a configuration on a line and let it judge planted defects.

    Returns:
        The AUROC of each kind, by the way in which a map becomes a score, the configuration's own first; and the
        seconds of CPU time that fitting took.
    """
    device = choose_device("cpu")
    make_deterministic(config.seed)
    fitted_on, held_out = split_good(read_dataset(line), config.hold_out)
    prepared = prepare_detector(config, None, (weights,), device)
    frames = FileFrames([sample.path for sample in fitted_on], config.frame_input, FrameLimits())
    begun = time.process_time()
    try:
        views = views_of(frames, config.frame_input, makes_views=config.makes_views)
        fit(prepared.module, views, FitSettings(seed=config.seed), SilentReporter())
    finally:
        frames.close()
    fit_s = time.process_time() - begun

    # Of frames that are cut, the stitched maps are read and not those of their tiles.
    rule = score_rule_of(config.detector_config())
    run = by_tiles(DetectorRun(prepared.module, device), config.frame_input, rule)
    good = _scores(run, _frames(held_out, config, None))
    planted = [_scores(run, _frames(held_out, config, kind)) for kind in kinds]
    labels = np.repeat([False, True], len(held_out))
    found = {
        way: [_defined(auroc(np.concatenate((good[way], scores[way])), labels).value) for scores in planted]
        for way in good
    }
    return found, fit_s


def _defined(value: float | None) -> float:
    return float("nan") if value is None else value


def _frames(samples: Sequence[Sample], config: RunConfig, kind: str | None) -> list[Pixels]:
    """Return frames as they are taken or cut, each with a defect planted first where a kind is given."""
    frames = []
    for number, sample in enumerate(samples):
        frame = decode_image(sample.path.read_bytes(), FrameLimits()).pixels
        if kind is not None:
            frame = KINDS[kind](frame, np.random.default_rng((number, list(KINDS).index(kind))))
        frames.append(fit_to_input(frame, config.frame_input))
    return frames


def _scores(run: Run, frames: Sequence[Pixels]) -> dict[str, NDArray[np.float64]]:
    """Return the scores of frames by each way of reading a map."""
    batches = [np.stack(frames[start : start + _BATCH]) for start in range(0, len(frames), _BATCH)]
    answers = [run(batch, np.zeros(len(batch), np.int64)) for batch in batches]
    maps = torch.from_numpy(np.concatenate([maps for _, maps in answers]))
    tops = {f"top {fraction:g}": top_fraction_mean(maps, fraction) for fraction in _FRACTIONS}
    own = {"own": torch.from_numpy(np.concatenate([scores for scores, _ in answers]))}
    others = {"maximum": reduce_map(maps, "maximum"), "deviation": reduce_map(maps, "deviation")}
    return {way: scores.double().numpy() for way, scores in (own | others | tops).items()}


def main() -> None:
    """Print one row for each line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="+", type=Path)
    parser.add_argument("--detector", required=True)
    parser.add_argument("--config", default="small", help="small, paper or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--kinds", default="scratch,spot,patch,shade", help=f"with commas between: {', '.join(KINDS)}")
    parser.add_argument("--weights", type=Path, default=Path("../shared/weights"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kinds = options.kinds.split(",")
    print(f"{options.detector} {options.config} {' '.join(options.set)}")
    print(f"| line | score | {' | '.join(kinds)} | mean | CPU s of fitting |\n{'|---' * (len(kinds) + 4)}|")
    for line in options.lines:
        config = load_config(options.config, options.detector, options.set)
        found, fit_s = judge(line, config, options.weights, kinds)
        for way, values in found.items():
            told = [f"{value:.3f}" for value in (*values, float(np.mean(values)))]
            print(f"| {line.name} | {way} | {' | '.join(told)} | {fit_s:.0f} |", flush=True)


if __name__ == "__main__":
    main()
