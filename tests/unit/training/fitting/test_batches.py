"""Promises of the plan of a fit: as many iterations as its recipe says, of as many frames."""

import dataclasses
import re
from importlib.resources import files

import pytest

from models.detector import Recipe
from training.config import load_config
from training.fitting.batches import planned_iterations


@pytest.mark.parametrize(
    ("recipe", "frames", "expected"),
    [
        ({"epochs": 3}, 10, (6, 4)),
        ({"epochs": 3}, 8, (6, 4)),
        ({"epochs": 3}, 3, (3, 3)),
        ({"iterations": 7}, 10, (7, 4)),
    ],
    ids=["last batch dropped", "even", "single small batch", "iterations"],
)
def test_planned_iterations_follow_the_recipe(recipe, frames, expected):
    """Epochs become iterations of full batches."""
    full = Recipe("adam", 1e-3, 1e-3, 0.0, batch_size=4, **recipe)

    assert planned_iterations(full, frames) == expected


@pytest.mark.parametrize(
    ("frames", "steps", "published"),
    [
        (30, (40_000, 30), 18_400),
        (100, (40_000, 64), 62_400),
        (127, (40_000, 64), 79_200),
        (209, (120_000, 64), 130_400),
    ],
)
def test_planned_iterations_of_jigsaws_are_those_that_its_configuration_tells(frames, steps, published):
    """The paper configuration names its steps beside the published ones, and how to have those from 64 frames on."""
    recipe = load_config("paper", "jigsaw_svdd").detector_config().recipe
    instead = dataclasses.replace(recipe, epochs=None, iterations=625 * frames)
    text = " ".join((files("training") / "configs/jigsaw_svdd.yaml").read_text("utf-8").replace("# ", "").split())

    assert planned_iterations(recipe, frames) == steps
    assert 400 * (100 * frames // 64) == published
    assert re.search(rf"{frames} images {steps[0]:,}.{{0,30}}{published:,}", text)
    if frames >= 64:
        assert planned_iterations(instead, frames) == (pytest.approx(published, rel=5e-3), 64)
