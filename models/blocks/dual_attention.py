"""A transformer block for two streams, where a prior one is steered by the image and keeps its own values.

The image's stream attends to itself. The prior stream asks with its own queries, looks at the image's keys, and mixes
its own values: what it says stays made of what was known before. After hmyao22/DADF, arXiv:2303.17882.
"""

from torch import Tensor, nn
from torch.nn import functional

from models.blocks.mlp import Mlp


class DualAttention(nn.Module):
    """Both streams look at the image's keys; each mixes its own values.

    Args:
        channels: width of a token, a multiple of `heads`.
        heads: number of attention heads.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return queries, keys, values  # each (B, heads, N, D / heads)

    def _read(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        read = functional.scaled_dot_product_attention(queries, keys, values)
        result: Tensor = self.proj(read.transpose(1, 2).flatten(2))
        return result

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the image's tokens and the prior's, both `(B, N, D)`."""
        queries, keys, values = self._split(x)
        prior_queries, _, prior_values = self._split(m)
        return self._read(queries, keys, values), self._read(prior_queries, keys, prior_values)


class DualBlock(nn.Module):
    """A transformer block whose weights serve the image's stream and the prior's.

    Args:
        channels: width of a token, a multiple of `heads`.
        heads: number of attention heads.
        mlp_ratio: width of the hidden layer over the token's.
    """

    def __init__(self, channels: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = DualAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, mlp_ratio)

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Transform the image's tokens and the prior's, both `(B, N, D)`."""
        read, remembered = self.attn(self.norm1(x), self.norm1(m))
        x, m = x + read, m + remembered
        return x + self.mlp(self.norm2(x)), m + self.mlp(self.norm2(m))
