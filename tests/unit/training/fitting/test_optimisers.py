"""Update rules and schedules, against formulas written out plainly."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from models.detector import Recipe
from tests.shared_material import require_shared
from training.fitting.optimisers import StableAdamW, build_optimiser, learning_rate_at, warmup_cosine

RECIPE = Recipe(
    optimiser="stable_adamw",
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    weight_decay=0.1,
    batch_size=2,
    iterations=100,
    warmup_iterations=10,
    amsgrad=True,
    eps=1e-10,
)


def _gradients(count: int) -> list[torch.Tensor]:
    """Return gradients that shrink and then burst, so that the maximum and the clip both matter."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1.0, 0.1, 0.1, 30.0, 0.1][:count]
    return [size * torch.randn(4, generator=generator, dtype=torch.float64) for size in sizes]


def test_stable_adamw_equals_its_formula_written_out():
    """Decay first, uncorrected running maximum, and a step that shrinks when gradients burst."""
    start = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    optimiser = StableAdamW([parameter], lr=0.01, betas=(0.9, 0.99), eps=1e-10, weight_decay=0.1, amsgrad=True)

    expected, mean, square, largest = start.numpy().copy(), np.zeros(4), np.zeros(4), np.zeros(4)
    shrunk = []
    for t, gradient in enumerate(_gradients(5), start=1):
        parameter.grad = gradient.clone()
        optimiser.step()
        g = gradient.numpy()
        expected *= 1 - 0.01 * 0.1
        mean = 0.9 * mean + 0.1 * g
        square = 0.99 * square + 0.01 * g**2
        largest = np.maximum(largest, square)
        denominator = np.sqrt(largest) / math.sqrt(1 - 0.99**t) + 1e-10
        ratio = max(1.0, float(np.sqrt(np.mean((g / denominator) ** 2))))
        shrunk.append(ratio > 1)
        expected -= 0.01 / (1 - 0.9**t) / ratio * mean / denominator

    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12)
    assert shrunk[3]


def test_stable_adamw_when_restored_then_goes_on_bit_by_bit():
    """State saved after two steps and loaded into a new optimiser gives the same third step."""
    first = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimiser = StableAdamW([first], amsgrad=True)
    *early, last = _gradients(3)
    for gradient in early:
        first.grad = gradient.clone()
        optimiser.step()
    second = nn.Parameter(first.detach().clone())
    restored = StableAdamW([second], amsgrad=True)
    restored.load_state_dict(copy.deepcopy(optimiser.state_dict()))

    for parameter, rule in ((first, optimiser), (second, restored)):
        parameter.grad = last.clone()
        rule.step()

    assert torch.equal(first, second)


def test_stable_adamw_when_a_tensor_has_no_gradient_then_leaves_it_alone():
    """Neither step nor decay touches what the loss did not reach."""
    untouched = nn.Parameter(torch.ones(2))

    StableAdamW([untouched], weight_decay=0.5).step()

    assert torch.equal(untouched, torch.ones(2))


def test_stable_adamw_when_given_a_closure_then_returns_its_loss():
    """The closure runs with gradients, as PyTorch's own optimisers run it."""
    parameter = nn.Parameter(torch.ones(1))
    optimiser = StableAdamW([parameter])

    def closure() -> float:
        loss = (parameter**2).sum()
        loss.backward()
        return loss.item()

    assert optimiser.step(closure) == 1.0
    assert parameter.item() < 1.0


@pytest.mark.parametrize("name", ["stable_adamw", "adamw", "adam", "sgd"])
def test_build_optimiser_when_a_recipe_names_a_rule_then_that_rule_walks_downhill(name):
    """Every name of a recipe gives a working optimiser at the peak rate."""
    parameter = nn.Parameter(torch.full((3,), 2.0))
    optimiser = build_optimiser(replace(RECIPE, optimiser=name), [parameter])

    for _ in range(5):
        optimiser.zero_grad()
        (parameter**2).sum().backward()
        optimiser.step()

    assert optimiser.param_groups[0]["lr"] == RECIPE.learning_rate
    assert optimiser.param_groups[0]["weight_decay"] == RECIPE.weight_decay
    assert (parameter < 2.0).all()


def test_schedule_equals_the_official_trace():
    """Twelve iterations with four of warm-up have the learning rates of INP-Former's own scheduler."""
    expected = np.load(require_shared("parity/inp_former") / "expected_train.npz")["schedule12"]

    ours = [warmup_cosine(i, total=12, warmup=4, peak=1e-3, final=1e-4) for i in range(12)]

    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize(
    ("total", "warmup"), [(100, 10), (20, 4), (3, 0)], ids=["as the recipe says", "a fifth", "none"]
)
def test_learning_rate_at_when_the_run_is_short_then_at_most_a_fifth_is_warm_up(total, warmup):
    """The warm-up of the recipe is cut to a fifth of the iterations."""
    ours = [learning_rate_at(RECIPE, i, total) for i in range(total)]

    assert ours == [warmup_cosine(i, total=total, warmup=warmup, peak=1e-2, final=1e-3) for i in range(total)]
    assert ours[warmup] == max(ours) == pytest.approx(RECIPE.learning_rate)
    assert ours[warmup:] == sorted(ours[warmup:], reverse=True)
    assert ours[-1] > RECIPE.final_learning_rate


def test_learning_rate_at_when_the_warm_up_is_one_iteration_then_it_starts_at_zero():
    """A line of one point is its lower end."""
    assert warmup_cosine(0, total=5, warmup=1, peak=1.0, final=0.1) == 0.0


@pytest.mark.parametrize("iteration", [-1, 12])
def test_warmup_cosine_when_outside_the_run_then_refuses(iteration):
    """A rate is asked for iterations of the run only."""
    with pytest.raises(ValueError, match="outside"):
        warmup_cosine(iteration, total=12, warmup=4, peak=1.0, final=0.1)
