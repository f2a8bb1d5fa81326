"""The rebuilding branch that INP-Former and INP-Former++ share: frozen front, prototypes, and the decoder they guide.

Luo et al., CVPR 2025, arXiv:2503.02424; numbers agree with its code (tests/parity).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks.backbone_tokens import PyramidTokens, build_front
from models.blocks.maps import require_image_size
from models.blocks.mlp import Mlp
from models.blocks.on_backbone import OnBackbone
from models.blocks.prototypes import InpDecoder, InpExtractor, initialise_linears
from models.detector import PassStage


@dataclass(frozen=True)
class InpBranchConfig:
    """Defaults are those of INP-Former's paper, which the later one keeps.

    Attributes:
        backbone: timm's name; DINOv2 with registers (Base) in the paper.
        layers: tapped blocks or stages; None takes the published ones of the backbone, strides 8 and 16 of a CNN.
        image_size: `(height, width)`; the paper crops 392 from 448.
        groups: sets of neighbouring layers that are compared on their own (two sets of four); 1 for a CNN.
        prototypes: M, the number of INPs (6).
        decoder_blocks: depth of the decoder, a multiple of `groups` (8).
        heads: attention heads; None takes those of the transformer backbone.
        mlp_ratio: width of each hidden layer over its input (4).
        mining_exponent: gamma of soft mining (3).
        coherence_weight: lambda, the weight of the coherence loss (0.2).
        projected_channels: C of a CNN's projected pyramid; None for a transformer.
        average_features: take the 3x3 mean of each CNN layer first; helps localisation.
        extractor_tokens: tokens an image that the extractor sees in a training step; None for all (paper).
        decoder_tokens: tokens an image that the decoder rebuilds in a training step; None for all (paper).
        top_fraction: share of the map's largest values that make the score (0.01).
        seed: seeds the initial values, the token samples and whatever else a step draws.
    """

    backbone: str = "vit_base_patch14_reg4_dinov2"
    layers: tuple[int, ...] | None = None
    image_size: tuple[int, int] = (392, 392)
    groups: int = 2
    prototypes: int = 6
    decoder_blocks: int = 8
    heads: int | None = None
    mlp_ratio: int = 4
    mining_exponent: float = 3.0
    coherence_weight: float = 0.2
    projected_channels: int | None = None
    average_features: bool = False
    extractor_tokens: int | None = None
    decoder_tokens: int | None = None
    top_fraction: float = 0.01
    seed: int = 1


class InpBranch(OnBackbone):
    """Draw prototypes (INPs) from an image's frozen tokens and rebuild the tokens from nothing else.

    Args:
        config: of the detector.
        generator: of the initial values.

    Attributes:
        image_size: `(height, width)` of the images that `encode` accepts.
        grid: `(height, width)` of the N tokens.
        channels: C of a token.

    Raises:
        ValueError: if the configuration contradicts itself or the backbone.
    """

    def __init__(self, config: InpBranchConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.image_size = config.image_size
        front = build_front(
            config.backbone,
            config.image_size,
            config.layers,
            groups=config.groups,
            heads=config.heads,
            projected_channels=config.projected_channels,
            average=config.average_features,
        )
        self.backbone, self.tokens, self.grid, self.channels, heads = front

        self.prototype_tokens = nn.Parameter(torch.empty(config.prototypes, self.channels))
        self.extractor = InpExtractor(self.channels, heads, config.mlp_ratio)
        self.bottleneck = Mlp(self.channels, config.mlp_ratio)
        self.decoder = InpDecoder(
            self.channels, heads, config.mlp_ratio, blocks=config.decoder_blocks, groups=config.groups
        )
        nn.init.normal_(self.prototype_tokens, generator=generator)
        for part in (self.extractor, self.bottleneck, self.decoder):
            initialise_linears(part, generator)

    def measuring_passes(self) -> list[PassStage]:
        """Return the looks at good frames that come before any descent: a CNN's pyramid is measured, else none."""
        return self.tokens.passes(self.backbone) if isinstance(self.tokens, PyramidTokens) else []

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the frozen tokens `(B, G, N, C)` of images `(B, 3, H, W)`.

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights or a CNN's pyramid was not measured.
        """
        require_image_size(images, self.image_size)
        result: Tensor = self.tokens(self.backbone(images))
        return result

    def extract(self, fused: Tensor) -> Tensor:
        """Return the INPs `(B, M, C)` of fused tokens `(B, N, C)`."""
        result: Tensor = self.extractor(self.prototype_tokens, fused)
        return result

    def rebuild(self, fused: Tensor, prototypes: Tensor) -> Tensor:
        """Return what the decoder makes of tokens `(B, N, C)`: one entry a group, `(B, G, N, C)`."""
        rebuilt: Tensor = self.decoder(self.bottleneck(fused), prototypes)
        return rebuilt


def cosines(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """Return the cosine of tokens `(B, N, C)` to INPs `(B, M, C)`: `(B, N, M)`, as a matrix product."""
    return functional.normalize(tokens, dim=-1) @ functional.normalize(prototypes, dim=-1).transpose(-2, -1)
