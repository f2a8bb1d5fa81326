"""Transformer blocks and fixed positions: what mixes with what, and where positions point."""

import pytest
import torch
from torch.nn import functional

from models.blocks.transformer import SelfAttention, TransformerBlock, sincos_positions


def test_attention_when_written_out_then_is_the_same():
    """Queries, keys and values are the thirds of one projection; each head reads its own channels."""
    torch.manual_seed(0)
    attention = SelfAttention(8, 2)
    x = torch.randn(3, 5, 8)

    queries, keys, values = attention.qkv(x).chunk(3, dim=2)
    heads = [
        (queries[..., part] @ keys[..., part].transpose(1, 2) / 2).softmax(dim=2) @ values[..., part]
        for part in (slice(0, 4), slice(4, 8))
    ]

    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=2)))


def test_block_when_written_out_then_is_the_same():
    """Each part is normalised before and skipped around."""
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, 3, norm_eps=1e-6)
    x = torch.randn(2, 5, 8)

    middle = x + block.attn(functional.layer_norm(x, (8,), eps=1e-6))
    expected = middle + block.mlp(functional.layer_norm(middle, (8,), eps=1e-6))

    assert block.mlp.fc1.out_features == 24
    torch.testing.assert_close(block(x), expected)


def test_positions_when_places_share_a_row_then_share_the_second_half():
    """The first half of the channels tells the column, the second the row, in raster order; all places differ."""
    positions = sincos_positions((3, 5), 16).reshape(3, 5, 16)

    assert torch.equal(positions[0, :, :8], positions[2, :, :8])
    assert torch.equal(positions[:, 0, 8:], positions[:, 4, 8:])
    assert len(positions.flatten(0, 1).unique(dim=0)) == 15
    torch.testing.assert_close(positions[0, 3, 0], torch.sin(torch.tensor(3.0)))


def test_positions_when_channels_are_no_multiple_of_four_then_refuse():
    """Sine and cosine of row and column need four equal parts."""
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions((2, 2), 6)
