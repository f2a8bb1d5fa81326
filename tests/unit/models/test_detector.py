"""Promises of the stages: a detector is either told the lines of its frames or not, and the loop need not know."""

import pytest
import torch

from models.detector import GradientStage, PassStage, Recipe

_RECIPE = Recipe("adam", 1e-3, 1e-3, 0.0, batch_size=2, iterations=1)
_IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
_LINES = torch.tensor([1, 0])


def test_show_when_a_pass_asks_for_lines_then_it_is_told_them():
    """A pass gets images alone or images and lines, as it was declared."""
    plain, told = [], []

    PassStage("plain", plain.append, list).show(_IMAGES, _LINES)
    PassStage("told", None, list, lambda *both: told.append(both)).show(_IMAGES, _LINES)

    assert plain[0] is _IMAGES
    assert told[0][0] is _IMAGES
    assert told[0][1] is _LINES


def test_terms_when_a_descent_asks_for_lines_then_it_is_told_them():
    """A loss gets inputs and step, with the lines between them where it was declared so."""
    plain = GradientStage("plain", lambda inputs, step: {"sum": inputs.sum() + step}, [], _RECIPE)
    told = GradientStage(
        "told", None, [], _RECIPE, line_loss=lambda inputs, lines, step: {"sum": inputs.sum() + lines.sum() + step}
    )

    answers = [stage.terms(torch.ones(2), _LINES, 5)["sum"] for stage in (plain, told)]

    assert answers == [7, 8]


@pytest.mark.parametrize("both", [False, True], ids=["neither", "both"])
def test_stage_when_it_has_neither_or_both_ways_then_it_is_refused(both):
    """A stage that looks at nothing, or that would look twice, is a mistake of its author."""
    way = (lambda *_: {}) if both else None

    with pytest.raises(ValueError, match="exactly one of observe and observe_lines"):
        PassStage("odd", way, list, way)
    with pytest.raises(ValueError, match="exactly one of loss and line_loss"):
        GradientStage("odd", way, [], _RECIPE, line_loss=way)
