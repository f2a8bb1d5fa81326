"""Promises of the two streams: the image steers what the prior says, and never becomes part of it."""

import numpy as np
import torch
from torch import Tensor, nn

from models.blocks.dual_attention import DualAttention


def _attention(x: Tensor, m: Tensor) -> tuple[DualAttention, Tensor, Tensor]:
    attention = DualAttention(8, 2)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return attention, *attention(x, m)


def test_prior_stream_when_written_out_then_mixes_the_prior_by_the_keys_of_the_image():
    """Queries and values come from the prior and keys from the image; rows of weights sum to one."""
    x, m = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1)).unbind()

    attention, _, prior = _attention(x, m)

    _, keys, _ = attention.qkv(x).chunk(3, dim=-1)
    queries, _, values = attention.qkv(m).chunk(3, dim=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (queries[..., head] @ keys[..., head].transpose(1, 2) / 2).softmax(dim=-1)
        heads.append(weights @ values[..., head])
    torch.testing.assert_close(prior, attention.proj(torch.cat(heads, dim=-1)))


def test_prior_stream_when_the_image_is_the_same_everywhere_then_does_not_depend_on_it():
    """Equal keys weigh all of the prior alike: the image steers the weights and nothing else."""
    m = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))

    _, _, dark = _attention(torch.zeros(1, 5, 8), m)
    _, _, bright = _attention(torch.full((1, 5, 8), 3.0), m)

    torch.testing.assert_close(dark, bright)


def test_stream_of_the_image_is_the_usual_one():
    """The image's stream does not see the prior."""
    x, m = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1)).unbind()

    _, read, _ = _attention(x, m)
    _, other, _ = _attention(x, 2 * m)

    assert torch.equal(read, other)


def test_attention_when_recomputed_in_numpy_then_both_streams_agree():
    """Softmax by softmax and head by head in float64, the two streams come out the same, to 1e-5."""
    x, m = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(1)).unbind()
    attention, _, _ = _attention(x, m)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(0.3)
        read, remembered = attention(x, m)

    state = {name: value.double().numpy() for name, value in attention.state_dict().items()}
    for image in range(2):
        parts = [tokens[image].double().numpy() @ state["qkv.weight"].T + state["qkv.bias"] for tokens in (x, m)]
        keys = parts[0][:, 8:16]
        for part, answer in zip(parts, (read, remembered), strict=True):
            joined = np.zeros((5, 8))
            for head, token in np.ndindex(2, 5):
                own = slice(4 * head, 4 * head + 4)
                weights = np.exp([part[token, :8][own] @ keys[other][own] / 2 for other in range(5)])
                joined[token, own] = sum(w * part[other, 16:][own] for other, w in enumerate(weights / weights.sum()))
            expected = joined @ state["proj.weight"].T + state["proj.bias"]
            np.testing.assert_allclose(answer[image].detach().numpy(), expected, rtol=1e-5, atol=1e-5)
