"""Noise on tokens in training, so that a network that rebuilds them can't merely copy.

After You et al., "A Unified Model for Multi-class Anomaly Detection" (UniAD), arXiv:2206.03687.
"""

import torch
from torch import Tensor


def jitter_tokens(tokens: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise in proportion to the norm of each token.

    Args:
        tokens: `(B, N, D)`.
        amount: standard deviation of the noise, as a multiple of the token's norm over D.
        generator: on the CPU, so that all devices draw the same.
    """
    noise = torch.randn(tokens.shape, generator=generator).to(tokens.device)
    norms = torch.linalg.vector_norm(tokens, dim=2, keepdim=True)
    jittered: Tensor = tokens + noise * norms * (amount / tokens.shape[2])
    return jittered
