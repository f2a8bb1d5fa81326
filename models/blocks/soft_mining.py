"""Gradients that follow how hard a place is, while the value of the loss stays what it was."""

from typing import Any

import torch
from torch import Tensor


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
