"""A line of noise frames with bright squares for defects, and a run that takes seconds: what tests of training fit."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from numpy.typing import NDArray
from torch import Tensor

import tests.early_mismatch
import tests.one_export
import tests.one_registry  # noqa: F401 - for its effect
from tests.factories import encode, make_frame
from training.config import RunConfig
from training.progress import SilentReporter
from training.run import train
from training.run_directory import LineRequest, RunRequest

GOOD, TEST_GOOD, DEFECTS = 48, 6, 5
_HEIGHT, _WIDTH = 72, 80
_CELL = 6  # pixels along each side of one cell of texture

# What makes a shipped configuration quick to fit and to export; all else stays as it is shipped.
BRIEF = (
    "hyperparameters.recipe.iterations=2",
    "hyperparameters.recipe.batch_size=4",
    "hyperparameters.decoder_blocks=1",
)

TINY_RUN: dict[str, Any] = {
    "detector": "inp_former",
    "backbone": "test_resnet",
    "input": {"height": 64, "width": 64, "resize_height": 64, "resize_width": 64},
    "hyperparameters": {
        "layers": [2, 3],
        "groups": 1,
        "decoder_blocks": 1,
        "heads": 2,
        "mlp_ratio": 2,
        "projected_channels": 32,
        "extractor_tokens": 32,
        "decoder_tokens": 16,
        "map_size": [32, 32],
        "recipe": {
            "optimiser": "stable_adamw",
            "learning_rate": 1e-3,
            "final_learning_rate": 1e-4,
            "weight_decay": 1e-4,
            "batch_size": 8,
            "iterations": 12,
            "warmup_iterations": 2,
        },
    },
    "hold_out": {"fraction": 0.5},
    "golden_frames": 4,
}

# A network that is not fitted: it is the same in every run, so that all of them export it once.
TINY_GRNR: dict[str, Any] = {
    "detector": "grnr",
    "backbone": "test_resnet",
    "input": TINY_RUN["input"],
    "hyperparameters": {"layers": [1, 2], "margin": 16, "context": 32, "support": 10},
    "hold_out": {"fraction": 0.5},
    "golden_frames": 4,
}


def write_line(
    folder: Path,
    *,
    good: int = GOOD,
    tested: bool = True,
    masks: bool = True,
    size: tuple[int, int] = (_HEIGHT, _WIDTH),
    roughness: float = 0,
) -> Path:
    """Write a line in the MVTec layout and return its folder.

    Args:
        folder: receives the frames.
        good: training frames.
        tested: whether there are test frames.
        masks: whether defects have masks.
        size: `(height, width)` of the frames.
        roughness: standard deviation of a coarse texture, in grey levels; another one is another product.
    """
    for index in range(good):
        _write(folder / "train/good" / f"{index:03d}.png", encode(_roughen(make_frame(*size, seed=index), roughness)))
    if not tested:
        return folder
    for index in range(TEST_GOOD):
        pixels = _roughen(make_frame(*size, seed=100 + index), roughness)
        _write(folder / "test/good" / f"{index:03d}.png", encode(pixels))
    for index in range(DEFECTS):
        pixels = make_frame(*size, seed=200 + index, defect=True)
        _write(folder / "test/square" / f"{index:03d}.png", encode(_roughen(pixels, roughness)))
        if masks:
            mask = np.where((pixels == 250).all(axis=2), 255, 0).astype(np.uint8)
            _write(folder / "ground_truth/square" / f"{index:03d}_mask.png", encode(mask))
    return folder


def write_mvtec_ad2_line(folder: Path, *, good: int = 8, validation: int = 24) -> Path:
    """Write a line like `write_line`'s as MVTec AD 2 is packed, private frames without a label included.

    Args:
        folder: receives the frames.
        good: training frames.
        validation: good frames that are kept out of fitting.
    """
    whole = write_line(folder / "whole", good=good + validation)
    frames = sorted((whole / "train/good").iterdir())
    moved = {
        "train/good": frames[:good],
        "validation/good": frames[good:],
        "test_public/good": sorted((whole / "test/good").iterdir()),
        "test_public/bad": sorted((whole / "test/square").iterdir()),
        "test_public/ground_truth/bad": sorted((whole / "ground_truth/square").iterdir()),
    }
    for place, paths in moved.items():
        for path in paths:
            number, *mask = path.stem.split("_")
            _write(folder / place / f"{'_'.join([number, 'regular', *mask])}.png", path.read_bytes())
    shutil.rmtree(whole)
    _write(folder / "test_private/000_regular.png", encode(make_frame(_HEIGHT, _WIDTH, seed=300, defect=True)))
    return folder


def make_config(**overrides: Any) -> RunConfig:
    """Return the tiny run's configuration, with some top-level keys replaced."""
    return RunConfig.model_validate(TINY_RUN | overrides)


def make_request(line_folder: Path, store: Path, *more_folders: Path, **overrides: Any) -> RunRequest:
    """Return what a tiny run asks for: random backbone weights, the CPU; lines are named as their folders."""
    folders = (line_folder, *more_folders)
    fields: dict[str, Any] = {
        "name": line_folder.name,
        "lines": tuple(LineRequest(name=folder.name, folder=folder) for folder in folders),
        "store": store,
        "config": make_config(),
        "weights": "untrained",
        "device": "cpu",
    }
    return RunRequest(**fields | overrides)


def fit_only(request: RunRequest, directory: Path) -> None:
    """Run until the detector is fitted and measured, and stop before its export, which takes longer than all else."""
    with pytest.raises(_StoppedError):
        train(request, directory, _StopsBeforeExport())


def fitted_tensors(directory: Path) -> dict[str, Tensor]:
    """Return what a run's checkpoint holds of its detector."""
    (file,) = directory.glob("checkpoint-*.safetensors")
    return {name: value for name, value in safetensors.torch.load_file(file).items() if name.startswith("detector/")}


class _StoppedError(Exception):
    pass


class _StopsBeforeExport(SilentReporter):
    def note(self, text: str) -> None:
        if text.startswith("exporting"):
            raise _StoppedError


def _roughen(pixels: NDArray[np.uint8], roughness: float) -> NDArray[np.uint8]:
    if not roughness:
        return pixels
    cells = tuple(-(-side // _CELL) for side in pixels.shape[:2])
    noise = np.random.default_rng(int(pixels.sum())).normal(0, roughness, cells)
    texture = np.kron(noise, np.ones((_CELL, _CELL)))[: pixels.shape[0], : pixels.shape[1], None]
    return np.clip(pixels + texture, 0, 255).astype(np.uint8)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
