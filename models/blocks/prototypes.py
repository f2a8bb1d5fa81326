"""Prototypes drawn from the image itself (INPs), and the decoder that may rebuild the image from nothing else.

Luo et al., CVPR 2025, arXiv:2503.02424; numbers agree with its code (tests/parity).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks.backbone_tokens import mean_by_group
from models.blocks.mlp import Mlp


class _CrossAttention(nn.Module):
    """Read from a source with softmax attention: the INP extractor's."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, -1).transpose(1, 2)  # (B, heads, tokens, C / heads)

    def _weigh(self, queries: Tensor, keys: Tensor) -> Tensor:
        scale = 1 / math.sqrt(queries.shape[-1])
        return (queries * scale @ keys.transpose(-2, -1)).softmax(dim=-1)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        keys, values = self.kv(source).chunk(2, dim=-1)
        attention = self._weigh(self._split(self.q(x)), self._split(keys))
        read = (attention @ self._split(values)).transpose(1, 2).flatten(2)
        result: Tensor = self.proj(read)
        return result


class _PrototypeAttention(_CrossAttention):
    """Read with rectified cosine similarity: the decoder's INP-guided attention.

    Rows are not normalised: a token unlike all INPs reads nothing, so it can't be rebuilt.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads)
        self.learn_scale = nn.Parameter(torch.ones(heads, 1, 1))

    def _weigh(self, queries: Tensor, keys: Tensor) -> Tensor:
        cosine = functional.normalize(queries, dim=-1) @ functional.normalize(keys, dim=-1).transpose(-2, -1)
        return functional.relu(self.learn_scale * cosine)


class InpExtractor(nn.Module):
    """Turn the learnt queries into the INPs of each image; one norm serves queries and features.

    Args:
        channels: C.
        heads: attention heads.
        mlp_ratio: width of the hidden layer over its input.
    """

    def __init__(self, channels: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-8)
        self.attn = _CrossAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, eps=1e-8)
        self.mlp = Mlp(channels, mlp_ratio)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """Draw INPs `(B, M, C)` from tokens `(B, N, C)` by queries `(M, C)`."""
        queries = queries.expand(features.shape[0], -1, -1)  # len() would fix the batch size of an exported graph
        x = queries + self.attn(self.norm1(queries), self.norm1(features))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class _InpDecoderBlock(nn.Module):
    """Rebuild tokens from INPs; the attention has no residual, which would let anomalies pass."""

    def __init__(self, channels: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-8)
        self.attn = _PrototypeAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, eps=1e-8)
        self.mlp = Mlp(channels, mlp_ratio)

    def forward(self, x: Tensor, prototypes: Tensor) -> Tensor:
        x = self.attn(self.norm1(x), self.norm1(prototypes))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class InpDecoder(nn.ModuleList):
    """Blocks that read from the INPs only; neighbouring blocks answer for one group of the backbone's layers.

    Args:
        channels: C.
        heads: attention heads.
        mlp_ratio: width of each hidden layer over its input.
        blocks: depth, a multiple of `groups`.
        groups: G.

    Raises:
        ValueError: if the blocks can't be split into equal groups.
    """

    def __init__(self, channels: int, heads: int, mlp_ratio: int, *, blocks: int, groups: int) -> None:
        if blocks % groups:
            raise ValueError("decoder_blocks must be a multiple of groups")
        super().__init__(_InpDecoderBlock(channels, heads, mlp_ratio) for _ in range(blocks))
        self.groups = groups

    def forward(self, x: Tensor, prototypes: Tensor) -> Tensor:
        """Rebuild bottlenecked tokens `(B, N, C)` from INPs `(B, M, C)`: one entry a group, `(B, G, N, C)`."""
        outputs = []
        for block in self:
            x = block(x, prototypes)
            outputs.append(x)
        # The decoder walks back: its last outputs answer the backbone's first layers.
        return mean_by_group(outputs[::-1], self.groups)


def initialise_linears(part: nn.Module, generator: torch.Generator) -> None:
    """Draw linear weights from a normal of 0.01 cut at 0.03, and set biases to 0, as INP-Former's code does."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.01, a=-0.03, b=0.03, generator=generator)
            nn.init.zeros_(module.bias)
