"""Update rules and learning rates, as recipes name them; the loop of `fit.py` asks here each iteration.

Rule: the learning rate is set from outside before each step, by a pure function of the iteration, so that a resumed
run can't drift from an uninterrupted one.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from models.detector import Recipe


class StableAdamW(Optimizer):
    """AdamW whose step shrinks, tensor by tensor, where gradients outgrow their running size.

    The step is divided by max(1, RMS(gradient / root of the second moment) / threshold): Algorithm 2 of Wortsman et al.
    2023, arXiv:2304.13013, with INP-Former's order of operations: decay first, and with `amsgrad` the running maximum
    of the second moment *before* its bias correction.

    Args:
        parameters: tensors to change.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the corrected second moment.
        weight_decay: decoupled; each tensor is first multiplied by 1 - lr x weight_decay.
        amsgrad: divide by the running maximum of the second moment.
        clip_threshold: ratio above which a step shrinks.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
        clip_threshold: float = 1.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "clip_threshold": clip_threshold,
        }
        super().__init__(parameters, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change every tensor that has a gradient; return what the closure returned, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_tensor(parameter, parameter.grad, group)
        return loss

    def _step_tensor(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
            if group["amsgrad"]:
                state["largest_square"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        second = state["square"]
        if group["amsgrad"]:
            second = torch.maximum(state["largest_square"], second, out=state["largest_square"])
        denominator = second.sqrt().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        excess = (gradient / denominator).square().mean().sqrt() / group["clip_threshold"]
        scale = -group["lr"] / (1 - beta1 ** state["step"]) / excess.clamp_min(1.0)
        parameter.add_(state["mean"] / denominator * scale)


def build_optimiser(recipe: Recipe, parameters: Iterable[Tensor]) -> Optimizer:
    """Build the optimiser that a recipe names, at its peak learning rate.

    As in PyTorch (and in the papers that use them so), "adam" and "sgd" add the decay to the gradient; the other two
    decouple it. "sgd" takes its momentum from the first beta.
    """
    match recipe.optimiser:
        case "stable_adamw":
            return StableAdamW(
                parameters, recipe.learning_rate, recipe.betas, recipe.eps, recipe.weight_decay, amsgrad=recipe.amsgrad
            )
        case "adamw" | "adam":
            build = AdamW if recipe.optimiser == "adamw" else Adam
            return build(
                parameters,
                lr=recipe.learning_rate,
                betas=recipe.betas,
                eps=recipe.eps,
                weight_decay=recipe.weight_decay,
                amsgrad=recipe.amsgrad,
            )
        case "sgd":
            return SGD(parameters, lr=recipe.learning_rate, momentum=recipe.betas[0], weight_decay=recipe.weight_decay)


def learning_rate_at(recipe: Recipe, iteration: int, total: int) -> float:
    """Return a recipe's learning rate for one iteration of `total`; at most a fifth of them are warm-up."""
    return warmup_cosine(
        iteration,
        total=total,
        warmup=min(recipe.warmup_iterations, total // 5),
        peak=recipe.learning_rate,
        final=recipe.final_learning_rate,
    )


def warmup_cosine(iteration: int, *, total: int, warmup: int, peak: float, final: float) -> float:
    """Return the learning rate of one iteration: a line from 0 that reaches `peak`, then a cosine towards `final`.

    Args:
        iteration: counted from 0; the last is `total - 1`, one step before the cosine would reach `final`.
        total: number of iterations.
        warmup: iterations of the line, both of its ends included, so the very first step has rate 0.
        peak: largest rate.
        final: rate that the cosine ends at.

    Raises:
        ValueError: if the iteration is outside the run.
    """
    if not 0 <= iteration < total:
        raise ValueError(f"iteration {iteration} is outside a run of {total}")
    if iteration < warmup:
        return peak * iteration / max(warmup - 1, 1)
    progress = (iteration - warmup) / (total - warmup)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))
