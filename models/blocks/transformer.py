"""Vision transformer blocks and fixed positions, as masked autoencoders use them."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks.mlp import Mlp


class SelfAttention(nn.Module):
    """Softmax attention of tokens among themselves.

    Args:
        channels: width of a token, a multiple of `heads`.
        heads: number of attention heads.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens `(B, N, D)`."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv.unbind()  # each (B, heads, N, D / heads)
        read = functional.scaled_dot_product_attention(queries, keys, values)
        result: Tensor = self.proj(read.transpose(1, 2).flatten(2))
        return result


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each with its own norm before and a skip around.

    Args:
        channels: width of a token, a multiple of `heads`.
        heads: number of attention heads.
        mlp_ratio: width of the hidden layer over the token's.
        norm_eps: guard of both norms.
    """

    def __init__(self, channels: int, heads: int, mlp_ratio: int, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=norm_eps)
        self.attn = SelfAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, eps=norm_eps)
        self.mlp = Mlp(channels, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens `(B, N, D)`."""
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


def sincos_positions(grid: tuple[int, int], channels: int) -> Tensor:
    """Return fixed positions of a grid `(height, width)`: `(height x width, channels)` float32, row by row.

    The first half of the channels tells the column and the second half the row; each is sine, then cosine, of
    frequencies 10000^(-j / (channels / 4)).

    Raises:
        ValueError: if `channels` is not a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"positions need a multiple of 4 channels, not {channels}")
    quarter = channels // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [places.reshape(-1, 1) * frequencies for places in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).to(torch.float32)
