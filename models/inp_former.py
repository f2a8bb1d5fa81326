"""INP-Former: a few prototypes drawn from the image itself must explain the whole image; where they can't, it is odd.

Learnable queries gather "intrinsic normal prototypes" (INPs) from the frozen patch features of one image. A decoder
whose attention may read from those INPs only rebuilds the features. The cosine distance between what the backbone saw
and what was rebuilt is the anomaly map.

Paper: Luo, Cao, Yao, Zhang, Lou, Cheng, Shen, Yu, "Exploring Intrinsic Normal Prototypes within a Single Image for
Universal Anomaly Detection", CVPR 2025, arXiv:2503.02424.
Reference code: luow23/INP-Former, MIT. Nothing of it is copied; numbers agree with it (tests/parity).

Deviations from the paper, all but the last as in the reference code:
* features of several layers are averaged, not summed: the bottleneck is not scale-free and checkpoints depend on it;
* the soft mining weight multiplies gradients and leaves the loss value alone;
* queries and keys of the decoder are L2-normalised and scaled by one learnt number a head;
* a frozen CNN may take the place of DINOv2, so that one CPU core can train and serve: one tensor made from its pyramid
  is then the input of the decoder and its single target (see `PyramidTokens`). A training step may look at some
  tokens only, because the decoder never mixes tokens.

Symbols: E, D = `tokens`, `rebuilt` (B, G, N, C), one entry a group of layers · F_Q = `fused` (B, N, C)
· T = `prototype_tokens` (M, C) · P = `prototypes` (B, M, C) · gamma = `mining_exponent` · L_c = coherence
· L_sm = reconstruction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks.backbone_tokens import PyramidTokens, build_front, sample_tokens
from models.blocks.maps import GaussianBlur, require_image_size, resize_map, top_fraction_mean
from models.blocks.mlp import Mlp
from models.blocks.prototypes import InpDecoder, InpExtractor, initialise_linears
from models.blocks.soft_mining import mining_weight, reweight_gradient
from models.detector import AnomalyOutput, GradientStage, Recipe, Stage

_PAPER_RECIPE = Recipe(
    optimiser="stable_adamw",
    learning_rate=1e-3,
    final_learning_rate=1e-4,
    weight_decay=1e-4,
    batch_size=16,
    eps=1e-10,
    amsgrad=True,
    epochs=200,
    warmup_iterations=100,
    clip_gradient_norm=0.1,
)


@dataclass(frozen=True)
class InpFormerConfig:
    """Defaults are those of the paper (arXiv:2503.02424, implementation details) and, where it is silent, of its code.

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
        coherence_weight: lambda, the weight of L_c (0.2).
        projected_channels: C of a CNN's projected pyramid; None for a transformer.
        average_features: take the 3x3 mean of each CNN layer first; helps localisation.
        extractor_tokens: tokens an image that the extractor sees in a training step; None for all (paper).
        decoder_tokens: tokens an image that the decoder rebuilds in a training step; None for all (paper).
        map_source: what the map shows: reconstruction error, or (zero-shot) distance to the nearest INP.
        map_size: `(height, width)` of the anomaly map (256).
        blur_kernel: side of the Gaussian (5).
        blur_sigma: its standard deviation (4).
        top_fraction: share of the map's largest values that make the score (0.01).
        seed: seeds the initial values and the token samples.
        recipe: the descent.
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
    map_source: Literal["reconstruction", "prototypes"] = "reconstruction"
    map_size: tuple[int, int] = (256, 256)
    blur_kernel: int = 5
    blur_sigma: float = 4.0
    top_fraction: float = 0.01
    seed: int = 1
    recipe: Recipe = _PAPER_RECIPE


class InpFormer(nn.Module):
    """Intrinsic normal prototypes and the decoder that they guide.

    Raises:
        ValueError: if the configuration contradicts itself or the backbone.
    """

    def __init__(self, config: InpFormerConfig) -> None:
        super().__init__()
        self.config = config
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
        self.backbone, self.tokens, self.grid, channels, heads = front

        self.prototype_tokens = nn.Parameter(torch.empty(config.prototypes, channels))
        self.extractor = InpExtractor(channels, heads, config.mlp_ratio)
        self.bottleneck = Mlp(channels, config.mlp_ratio)
        self.decoder = InpDecoder(channels, heads, config.mlp_ratio, blocks=config.decoder_blocks, groups=config.groups)
        self.blur = GaussianBlur(config.blur_kernel, config.blur_sigma)
        self._initialise(torch.Generator().manual_seed(config.seed))

    def _initialise(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.prototype_tokens, generator=generator)
        for part in (self.extractor, self.bottleneck, self.decoder):
            initialise_linears(part, generator)

    def load_backbone_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the backbone's weights in timm's naming.

        Raises:
            ValueError: if a key is missing, unknown or has another shape.
        """
        self.backbone.load_weights(state_dict)

    def stages(self) -> Sequence[Stage]:
        """Return the descent; a CNN's pyramid is measured before it."""
        descent = GradientStage(
            name="reconstruction",
            loss=self.loss,
            parameters=[parameter for parameter in self.parameters() if parameter.requires_grad],
            recipe=self.config.recipe,
            encode=self.encode,
        )
        if isinstance(self.tokens, PyramidTokens):
            return [*self.tokens.passes(self.backbone), descent]
        return [descent]

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

    def loss(self, tokens: Tensor, step: int) -> dict[str, Tensor]:
        """Return L_sm and the weighted L_c of encoded frames `(B, G, N, C)`."""
        generator = torch.Generator().manual_seed(self.config.seed * 2**32 + step)
        seen = sample_tokens(tokens, self.config.extractor_tokens, generator).mean(dim=1)
        prototypes = self._extract(seen)
        coherence = _distance_to_nearest(seen, prototypes).mean()

        targets = sample_tokens(tokens, self.config.decoder_tokens, generator)
        rebuilt = self._rebuild(targets.mean(dim=1), prototypes)
        return {
            "reconstruction": _soft_mining_loss(targets, rebuilt, self.config.mining_exponent),
            "coherence": self.config.coherence_weight * coherence,
        }

    def forward(self, images: Tensor) -> AnomalyOutput:
        """Judge images `(B, 3, H, W)` float32 in [0, 1].

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights or a CNN's pyramid was not measured.
        """
        return self._finish_map(self._judge_tokens(self.encode(images)))

    def _finish_map(self, distances: Tensor) -> AnomalyOutput:
        """Turn distances of tokens `(B, N)` into map and score: image size, map size, blur, mean of the largest."""
        anomaly_map = resize_map(distances.reshape(-1, *self.grid), self.image_size, align_corners=True)
        anomaly_map = self.blur(resize_map(anomaly_map, self.config.map_size))
        return AnomalyOutput(anomaly_map, top_fraction_mean(anomaly_map, self.config.top_fraction))

    def _judge_tokens(self, tokens: Tensor) -> Tensor:
        """Return the distance `(B, N)` that the map shows, from tokens `(B, G, N, C)`."""
        fused = tokens.mean(dim=1)
        prototypes = self._extract(fused)
        if self.config.map_source == "prototypes":
            return _distance_to_nearest(fused, prototypes)
        rebuilt = self._rebuild(fused, prototypes)
        return (1 - functional.cosine_similarity(tokens, rebuilt, dim=-1)).mean(dim=1)

    def _extract(self, fused: Tensor) -> Tensor:
        """Return the INPs `(B, M, C)` of fused tokens `(B, N, C)`."""
        result: Tensor = self.extractor(self.prototype_tokens, fused)
        return result

    def _rebuild(self, fused: Tensor, prototypes: Tensor) -> Tensor:
        """Return what the decoder makes of tokens `(B, N, C)`: one entry a group, `(B, G, N, C)`."""
        rebuilt: Tensor = self.decoder(self.bottleneck(fused), prototypes)
        return rebuilt


def _distance_to_nearest(fused: Tensor, prototypes: Tensor) -> Tensor:
    """Return min over INPs of 1 - cosine, `(B, N)`; a matrix product avoids (B, N, M, C)."""
    cosine = functional.normalize(fused, dim=-1) @ functional.normalize(prototypes, dim=-1).transpose(-2, -1)
    return (1 - cosine).amin(dim=-1)


def _soft_mining_loss(targets: Tensor, rebuilt: Tensor, exponent: float) -> Tensor:
    """Return one cosine distance an image and group, averaged; well-rebuilt tokens get less gradient.

    Args:
        targets: `(B, G, N, C)`, without gradient.
        rebuilt: `(B, G, N, C)`.
        exponent: gamma; a token's gradient is scaled by (its distance / the group's mean distance)^gamma.
    """
    distance = 1 - functional.cosine_similarity(targets, rebuilt, dim=-1)  # (B, G, N)
    mined = reweight_gradient(rebuilt, mining_weight(distance, exponent)[..., None])
    return (1 - functional.cosine_similarity(targets.flatten(2), mined.flatten(2), dim=-1)).mean()
