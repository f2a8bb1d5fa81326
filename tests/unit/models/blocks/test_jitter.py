"""Promises of the noise on tokens: in proportion to each, and repeatable."""

import numpy as np
import torch

from models.blocks.jitter import jitter_tokens


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_jitter_when_recomputed_in_numpy_then_agrees():
    """The same draws, scaled token by token in float64, give the same noise, to 1e-5."""
    tokens = torch.randn(2, 5, 8, generator=_generator())

    jittered = jitter_tokens(tokens, 20.0, _generator(3))

    drawn = torch.randn(tokens.shape, generator=_generator(3)).double().numpy()
    for image, token in np.ndindex(2, 5):
        clean = tokens[image, token].double().numpy()
        length = np.sqrt((clean**2).sum())
        expected = clean + 20 / 8 * length * drawn[image, token]
        np.testing.assert_allclose(jittered[image, token].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_jitter_when_added_then_is_in_proportion_to_each_tokens_norm():
    """The noise of an entry has the deviation norm x amount / D; a token of zeros stays."""
    tokens = torch.stack([torch.zeros(500, 64), torch.ones(500, 64), 3 * torch.ones(500, 64)])

    noise = jitter_tokens(tokens, 6.0, _generator()) - tokens

    expected = torch.tensor([0.0, 1.0, 3.0]) * 64**0.5 * 6 / 64
    torch.testing.assert_close(noise.std(dim=(1, 2)), expected, rtol=0.02, atol=0.0)  # 32 000 draws
