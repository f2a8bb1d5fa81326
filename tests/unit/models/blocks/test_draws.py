"""Promises of draws: they follow from seed, step and share, and every detector's step draws by them."""

from pathlib import Path

import pytest
import torch

from models.blocks.draws import generator_of_step
from models.detector import Step

MODELS = Path(__file__).resolve().parents[4] / "models"


def _draw(seed, step):
    return torch.rand(4, generator=generator_of_step(seed, step)).tolist()


def test_generator_when_asked_again_then_draws_the_same():
    """A resumed run makes the draws of one that ran through; the first share's are those of an undivided batch."""
    assert _draw(1, 7) == _draw(1, 7) == _draw(1, Step(7)) == _draw(1, Step(7, 0))


@pytest.mark.parametrize("other", [(2, 7), (1, 8), (1, Step(7, 1)), (1, Step(7, 255))], ids=str)
def test_generator_when_seed_step_or_share_differs_then_draws_something_else(other):
    """No two shares of a batch get the same noise, and none that of another step."""
    assert _draw(1, 7) != _draw(*other)


def test_detectors_when_a_step_draws_then_ask_for_the_generator_of_the_step():
    """A seed made from the step by hand would give every share of a batch the same noise."""
    by_hand = [
        f"{path.relative_to(MODELS)}: {line.strip()}"
        for path in sorted(MODELS.rglob("*.py"))
        if path.name != "draws.py"
        for line in path.read_text("utf-8").splitlines()
        if "manual_seed(" in line and "step" in line
    ]

    assert by_hand == []
