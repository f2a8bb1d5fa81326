"""Does GLCF's global branch see that parts do not go together, where each of them is good by itself?

Good frames show a red and a blue disc side by side, either of them on the left. Where both are red, no place shows
anything that good frames don't have there; only the whole is wrong. A scratch is the opposite: wrong where it lies. One
network is fitted on good frames for each seed, and each of its two branches judges both kinds by itself, as the presets
`logical` and `texture` have it. A row shows the image AUROCs by the published score, the map's deviation, and by its
maximum.

    .venv/bin/python tests/benchmarks/logical_discs.py --seeds 1 2 3 4 5
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.blocks.maps import reduce_map
from models.detector import Recipe
from models.glcf import Glcf, GlcfConfig
from training.data.loader import MemoryFrames
from training.fitting.fit import FitSettings, fit
from training.measuring.metrics import auroc
from training.progress import SilentReporter

Pixels = NDArray[np.uint8]
_WEIGHTS = Path(__file__).resolve().parents[2] / "models/weights/embedded.safetensors"
_SIDE = 64
_FITTED_ON, _TESTED = 48, 40
_BATCH = 20
_RED, _BLUE = (230, 50, 25), (25, 75, 230)
_PRESETS = ("texture", "logical")
_SCORES = ("deviation", "maximum")

# One level and two blocks a transformer: the smallest network of this shape that learns the rule.
_CONFIG = GlcfConfig(
    backbone="embedded",
    layers=(2,),
    targets=1,
    inputs=1,
    image_size=(_SIDE, _SIDE),
    token_channels=48,
    encoder_blocks=2,
    encoder_heads=4,
    decoder_blocks=2,
    decoder_heads=4,
    mlp_ratio=2,
    level_depths=(1,),
    level_weights=(1.0,),
    recipe=Recipe(
        optimiser="adamw",
        learning_rate=2e-3,
        final_learning_rate=2e-4,
        weight_decay=0.01,
        batch_size=8,
        betas=(0.9, 0.95),
        iterations=800,
        warmup_iterations=20,
    ),
)


def draw_discs(left_is_red: NDArray[np.bool_], right_is_red: NDArray[np.bool_], rng: np.random.Generator) -> Pixels:
    """Draw a disc in either half of grey frames with grain, `(n, 64, 64, 3)`; each is red or blue."""
    rows, columns = np.mgrid[0:_SIDE, 0:_SIDE] + 0.5
    frames = np.full((len(left_is_red), _SIDE, _SIDE, 3), 128.0)
    for is_red, middle in ((left_is_red, 0.27), (right_is_red, 0.73)):
        inside = (rows - 0.5 * _SIDE) ** 2 + (columns - middle * _SIDE) ** 2 < (0.17 * _SIDE) ** 2
        frames[:, inside] = np.where(is_red[:, None], _RED, _BLUE)[:, None]
    grain = rng.normal(0, 5, frames.shape)
    return np.clip(frames + grain, 0, 255).round().astype(np.uint8)


def draw_good(count: int, rng: np.random.Generator) -> Pixels:
    """Draw frames with one red and one blue disc."""
    left = rng.random(count) < 0.5
    return draw_discs(left, ~left, rng)


def draw_two_reds(count: int, rng: np.random.Generator) -> Pixels:
    """Draw frames in which both discs are red."""
    return draw_discs(np.ones(count, bool), np.ones(count, bool), rng)


def draw_scratched(count: int, rng: np.random.Generator) -> Pixels:
    """Draw good frames with a dark scratch of two pixels' width and a third of the frame's length."""
    frames = draw_good(count, rng)
    rows, columns = np.mgrid[0:_SIDE, 0:_SIDE] + 0.5
    for frame in frames:
        angle, (row, column) = rng.uniform(0, np.pi), rng.uniform(0.2, 0.8, 2) * _SIDE
        across = (columns - column) * np.sin(angle) - (rows - row) * np.cos(angle)
        along = (columns - column) * np.cos(angle) + (rows - row) * np.sin(angle)
        frame[(np.abs(across) < 1) & (np.abs(along) < 0.15 * _SIDE)] = 25
    return frames


def judge(seed: int) -> dict[tuple[str, str, str], float]:
    """Fit on good frames and return the image AUROC by kind of defect, preset and score."""
    rng = np.random.default_rng(seed)
    both = Glcf(replace(_CONFIG, seed=seed))
    weights = load_file(_WEIGHTS)
    both.load_backbone_weights(weights)
    fit(both, MemoryFrames(draw_good(_FITTED_ON, rng)), FitSettings(seed=seed), SilentReporter())
    good = draw_good(_TESTED, rng)
    found = {}
    for kind, draw in (("two reds", draw_two_reds), ("scratch", draw_scratched)):
        frames = np.concatenate((good, draw(_TESTED, rng)))
        for branch, preset in enumerate(_PRESETS):
            detector = _preset(both, weights, preset, branch)
            with torch.no_grad():
                inputs = torch.from_numpy(frames).permute(0, 3, 1, 2).split(_BATCH)
                maps = torch.cat([detector(images / 255).anomaly_map for images in inputs])
            for score in _SCORES:
                scores = reduce_map(maps, score).numpy()
                found[kind, preset, score] = auroc(scores, np.arange(2 * _TESTED) >= _TESTED).value or 0.0
    return found


def _preset(both: Glcf, weights: Mapping[str, Tensor], preset: str, branch: int) -> Glcf:
    """Return a detector that judges by one branch of a fitted one that has both, by that branch's own statistics."""
    detector = Glcf(replace(both.config, fusion=preset))
    state = both.state_dict()
    for name in ("means", "deviations"):
        state[name] = state[name][branch : branch + 1]
    detector.load_backbone_weights(weights)
    detector.load_state_dict(state)
    return detector.eval()


def main() -> None:
    """Print a table, a row a seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = [(kind, preset, score) for kind in ("two reds", "scratch") for preset in _PRESETS for score in _SCORES]
    print("| seed | " + " | ".join(", ".join(column) for column in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for seed in options.seeds:
        found = judge(seed)
        print(f"| {seed} | " + " | ".join(f"{found[column]:.2f}" for column in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
