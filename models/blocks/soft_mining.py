"""Gradients that follow how hard a place is, while the value of the loss stays what it was."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class _ReweightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] * weight, None


def reweight_gradient(x: Tensor, weight: Tensor) -> Tensor:
    """Pass `x` on unchanged and multiply its gradient by `weight` on the way back; shapes broadcast."""
    result: Tensor = _ReweightGradient.apply(x, weight)  # type: ignore[no-untyped-call]  # torch's
    return result


def mining_weight(distance: Tensor, exponent: float) -> Tensor:
    """Return (distance / its mean over batch and positions)^exponent, without a gradient.

    Args:
        distance: `(B, G, N)` float32, not negative; the mean is taken for each group G.
        exponent: gamma of soft mining (INP-Former, arXiv:2503.02424).
    """
    distance = distance.detach()
    return (distance / distance.mean(dim=(0, 2), keepdim=True)) ** exponent


def mined_direction_loss(targets: Tensor, rebuilt: Tensor, exponent: float) -> Tensor:
    """Return one cosine distance an image and group, averaged; well-rebuilt tokens get less gradient.

    Args:
        targets: `(B, G, N, C)`, without gradient.
        rebuilt: `(B, G, N, C)`.
        exponent: gamma; a token's gradient is scaled by (its distance / the group's mean distance)^gamma.
    """
    distance = 1 - functional.cosine_similarity(targets, rebuilt, dim=-1)  # (B, G, N)
    mined = reweight_gradient(rebuilt, mining_weight(distance, exponent)[..., None])
    return (1 - functional.cosine_similarity(targets.flatten(2), mined.flatten(2), dim=-1)).mean()
