"""Which values the settings of a detector may have, as far as that is alike for all of them.

A detector refuses what contradicts its own design when it is built. Here is refused what no detector can mean: numbers
that are not finite, negative sizes, rates that lead nowhere. Rules:

- Integers are sizes and counts, from 1 on, but for those that count from 0.
- Other numbers are weights, shares, widths and strengths, from 0 on, but for the few that have a sign.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from models.detector import Recipe

# Places, seeds, and cells or pixels that are left out.
_FROM_ZERO = frozenset({"layers", "reference_frame", "margin", "context", "cut", "seed", "deal_seed"})
# A cosine, and a number of standard deviations above a mean.
_SIGNED = frozenset({("rb_ae", "margin"), ("ami_net", "mask_deviations")})


def find_misfit(detector: str, own: Any) -> str | None:
    """Say which of a detector's settings has a value that nothing can be made of.

    Args:
        detector: its name.
        own: its own configuration.

    Returns:
        A sentence without a stop that begins with the name of the setting, or None.
    """
    for field in dataclasses.fields(own):
        value = getattr(own, field.name)
        if isinstance(value, Recipe):
            found = next(_misfits_of_recipe(value), None)
            if found is not None:
                return f"{field.name}.{found}"
        elif (what := _misfit_of_setting(detector, field.name, value)) is not None:
            return f"{field.name}: {what}; it is {_shown(value)}"
    return None


def find_idle_recipe(own: Any) -> str | None:
    """Say which of a detector's descents makes no step; arguments and answer as `find_misfit`."""
    for field in dataclasses.fields(own):
        recipe = getattr(own, field.name)
        if isinstance(recipe, Recipe):
            for name in ("epochs", "iterations"):
                if getattr(recipe, name) == 0:
                    return f"{field.name}.{name}: must be at least 1, or nothing is learnt; it is 0"
    return None


def _misfit_of_setting(detector: str, name: str, value: Any) -> str | None:
    numbers = [one for one in (value if isinstance(value, tuple) else (value,)) if _is_number(one)]
    if any(not math.isfinite(number) for number in numbers):
        return "must be finite"
    if (detector, name) not in _SIGNED and any(number < 0 for number in numbers):
        return "must not be negative"
    if name not in _FROM_ZERO and any(isinstance(number, int) and number == 0 for number in numbers):
        return "must be at least 1"
    return _misfit_of_name(name, numbers)


def _misfit_of_name(name: str, numbers: list[int | float]) -> str | None:
    if name == "top_fraction" and not all(0 < number <= 1 for number in numbers):
        return "must be above 0 and at most 1; a share of less than one value of the map scores by its maximum"
    if name == "mining_exponent" and any(number % 1 for number in numbers):
        return "must be whole; rounding makes distances a trifle negative, which no other power takes"
    if name == "ridge" and 0 in numbers:
        return "must be above 0, or equal neighbours have no solution"
    if name.endswith("_weights") and numbers and not any(numbers):
        return "must not all be 0"
    return None


def _misfits_of_recipe(recipe: Recipe) -> Iterator[str]:
    for name in ("learning_rate", "final_learning_rate", "weight_decay", "eps"):
        rate = getattr(recipe, name)
        if not (math.isfinite(rate) and rate >= 0):
            yield f"{name}: must be finite and not negative; it is {rate}"
    if recipe.learning_rate == 0:
        yield "learning_rate: must be above 0, or nothing is learnt; it is 0"
    if any(not 0 <= beta < 1 for beta in recipe.betas):
        yield f"betas: must lie from 0 to below 1; they are {_shown(recipe.betas)}"
    if recipe.batch_size < 1:
        yield f"batch_size: must be at least 1; it is {recipe.batch_size}"
    for name in ("epochs", "iterations", "warmup_iterations"):
        count = getattr(recipe, name)
        if count is not None and count < 0:
            yield f"{name}: must not be negative; it is {count}"
    clip = recipe.clip_gradient_norm
    if clip is not None and not (math.isfinite(clip) and clip > 0):
        yield f"clip_gradient_norm: must be finite and above 0, or null for no bound; it is {clip}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
