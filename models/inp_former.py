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
  is then the input of the decoder and its single target (see `_PyramidTokens`). A training step may look at some
  tokens only, because the decoder never mixes tokens.

Symbols: E, D = `tokens`, `rebuilt` (B, G, N, C), one entry a group of layers · F_Q = `fused` (B, N, C)
· T = `prototype_tokens` (M, C) · P = `prototypes` (B, M, C) · gamma = `mining_exponent` · L_c = coherence
· L_sm = reconstruction.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import CnnBackbone, VitBackbone, build_backbone
from models.blocks.maps import GaussianBlur, require_image_size, resize_map, top_fraction_mean
from models.detector import AnomalyOutput, GradientStage, PassStage, Recipe, Stage

_TAPPED_BLOCKS: Mapping[str, tuple[int, ...]] = {
    "vit_small_patch14_reg4_dinov2": (2, 3, 4, 5, 6, 7, 8, 9),
    "vit_base_patch14_reg4_dinov2": (2, 3, 4, 5, 6, 7, 8, 9),
    "vit_large_patch14_reg4_dinov2": (4, 6, 8, 10, 12, 14, 16, 18),
}
_CNN_LAYERS = (2, 3)  # strides 8 and 16

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


class _Mlp(nn.Module):
    """C to ratio x C to C, with GELU between; no dropout, no residual."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, ratio * channels)
        self.fc2 = nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return result


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


class _InpExtractor(nn.Module):
    """Turn the learnt queries into the INPs of each image; one norm serves queries and features."""

    def __init__(self, channels: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-8)
        self.attn = _CrossAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, eps=1e-8)
        self.mlp = _Mlp(channels, mlp_ratio)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
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
        self.mlp = _Mlp(channels, mlp_ratio)

    def forward(self, x: Tensor, prototypes: Tensor) -> Tensor:
        x = self.attn(self.norm1(x), self.norm1(prototypes))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class _ReweightGradient(torch.autograd.Function):
    """Pass values on unchanged and multiply the gradient on its way back (soft mining)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] * weight, None


class _GroupMeans(nn.Module):
    """Transformer tokens: the mean of each set of neighbouring layers."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, layers: list[Tensor]) -> Tensor:
        return _mean_by_group(layers, self.groups)


class _PyramidTokens(nn.Module):
    """CNN tokens: the pyramid on its finest grid, projected by an uncentred PCA.

    Each layer is divided by one scalar, clipped and divided by the root of its channel count, so that layers weigh the
    same. Standardising each channel instead cost 0.14 to 0.19 of image AUROC on a real line. Statistics are gathered in
    two looks at the good frames, because the clip depends on the first.
    """

    layer_scales: Tensor
    projection: Tensor
    token_scale: Tensor
    is_measured: Tensor

    _CLIP = 8.0

    def __init__(self, channels: Sequence[int], grid: tuple[int, int], projected: int, *, average: bool) -> None:
        super().__init__()
        if projected > sum(channels):
            raise ValueError(f"can't project {sum(channels)} channels to {projected}")
        self.grid = grid
        self.average = average
        self.register_buffer("layer_scales", torch.ones(len(channels)))
        self.register_buffer("projection", torch.zeros(sum(channels), projected))
        self.register_buffer("token_scale", torch.ones(()))
        self.register_buffer("is_measured", torch.zeros((), dtype=torch.bool))
        # An exported graph can't branch on a tensor, so a plain copy of `is_measured` is kept beside it.
        self._may_run = False
        self.register_load_state_dict_post_hook(_PyramidTokens._copy_flag)  # type: ignore[no-untyped-call]  # torch's
        self._sums: Tensor | None = None
        self._moments: Tensor | None = None
        self._count = 0

    def _copy_flag(self, _: object) -> None:
        self._may_run = bool(self.is_measured)

    def _on_finest_grid(self, layers: list[Tensor]) -> list[Tensor]:
        """Bring maps `(B, C, h, w)` to tokens `(B, N, C)` of the finest grid."""
        tokens = []
        for layer in layers:
            x = functional.avg_pool2d(layer, 3, stride=1, padding=1, count_include_pad=False) if self.average else layer
            if tuple(x.shape[2:]) != self.grid:
                x = functional.interpolate(x, size=self.grid, mode="bilinear", align_corners=False)
            tokens.append(x.flatten(2).transpose(1, 2))
        return tokens

    def _balance(self, tokens: list[Tensor]) -> Tensor:
        """Give each layer the same weight: `(B, N, sum of C)`."""
        balanced = [
            (x / scale).clamp(-self._CLIP, self._CLIP) / math.sqrt(x.shape[-1])
            for x, scale in zip(tokens, self.layer_scales.unbind(), strict=True)
        ]
        return torch.cat(balanced, dim=-1)

    @torch.no_grad()
    def observe_scales(self, layers: list[Tensor]) -> None:
        """Add a batch to the mean and mean square of each layer."""
        tokens = self._on_finest_grid(layers)
        sums = torch.stack([torch.stack((x.double().mean(), x.double().square().mean())) for x in tokens])
        batch = len(layers[0])
        self._sums = batch * sums if self._sums is None else self._sums + batch * sums
        self._count += batch

    def finish_scales(self) -> None:
        """Keep the standard deviation of each layer."""
        if self._sums is None:
            raise RuntimeError("no frames were observed")
        mean, square = (self._sums / self._count).unbind(dim=1)
        self.layer_scales.copy_((square - mean.square()).clamp_min(1e-12).sqrt())
        self._sums, self._count = None, 0

    @torch.no_grad()
    def observe_moments(self, layers: list[Tensor]) -> None:
        """Add a batch to the second-moment matrix of balanced tokens."""
        x = self._balance(self._on_finest_grid(layers)).flatten(0, 1)
        moments = (x.T @ x).double()
        self._moments = moments if self._moments is None else self._moments + moments
        self._count += len(x)

    def finish_moments(self) -> None:
        """Keep the directions that hold most energy, and the size of what they leave."""
        if self._moments is None:
            raise RuntimeError("no frames were observed")
        energies, directions = torch.linalg.eigh(self._moments / self._count)  # ascending
        kept = self.projection.shape[1]
        directions = directions[:, -kept:].flip(1)
        # The sign of an eigenvector is arbitrary: fix it, so that two machines agree.
        largest = directions.abs().argmax(dim=0, keepdim=True)
        directions = directions * directions.gather(0, largest).sign()
        self.projection.copy_(directions)
        self.token_scale.copy_((energies[-kept:].clamp_min(0).sum() / kept).clamp_min(1e-12).sqrt())
        self.is_measured.fill_(True)
        self._may_run = True
        self._moments, self._count = None, 0

    def forward(self, layers: list[Tensor]) -> Tensor:
        if not self._may_run:
            raise RuntimeError("the pyramid was not measured yet; run the pass stages over the good frames first")
        tokens = self._balance(self._on_finest_grid(layers)) @ self.projection / self.token_scale
        return tokens[:, None]  # (B, 1, N, C)


class InpFormer(nn.Module):
    """Intrinsic normal prototypes and the decoder that they guide.

    Raises:
        ValueError: if the configuration contradicts itself or the backbone.
    """

    def __init__(self, config: InpFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        layers = config.layers or _TAPPED_BLOCKS.get(config.backbone, _CNN_LAYERS)
        if config.decoder_blocks % config.groups:
            raise ValueError("decoder_blocks must be a multiple of groups")
        self.backbone = build_backbone(config.backbone, layers, config.image_size)
        self.tokens, self.grid, channels, heads = _choose_tokens(self.backbone, config)
        if channels % heads:
            raise ValueError(f"{channels} channels can't be split among {heads} heads")

        self.prototype_tokens = nn.Parameter(torch.empty(config.prototypes, channels))
        self.extractor = _InpExtractor(channels, heads, config.mlp_ratio)
        self.bottleneck = _Mlp(channels, config.mlp_ratio)
        self.decoder = nn.ModuleList(
            _InpDecoderBlock(channels, heads, config.mlp_ratio) for _ in range(config.decoder_blocks)
        )
        self.blur = GaussianBlur(config.blur_kernel, config.blur_sigma)
        self._initialise(torch.Generator().manual_seed(config.seed))

    def _initialise(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.prototype_tokens, generator=generator)
        for part in (self.extractor, self.bottleneck, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.01, a=-0.03, b=0.03, generator=generator)
                    nn.init.zeros_(module.bias)

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
        tokens = self.tokens
        if not isinstance(tokens, _PyramidTokens):
            return [descent]
        return [
            PassStage(
                "layer scales", lambda images: tokens.observe_scales(self.backbone(images)), tokens.finish_scales
            ),
            PassStage(
                "projection", lambda images: tokens.observe_moments(self.backbone(images)), tokens.finish_moments
            ),
            descent,
        ]

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
        seen = _sample_tokens(tokens, self.config.extractor_tokens, generator).mean(dim=1)
        prototypes = self._extract(seen)
        coherence = _distance_to_nearest(seen, prototypes).mean()

        targets = _sample_tokens(tokens, self.config.decoder_tokens, generator)
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
        x = self.bottleneck(fused)
        outputs = []
        for block in self.decoder:
            x = block(x, prototypes)
            outputs.append(x)
        # The decoder walks back: its last outputs answer the backbone's first layers.
        return _mean_by_group(outputs[::-1], self.config.groups)


def _choose_tokens(
    backbone: CnnBackbone | VitBackbone, config: InpFormerConfig
) -> tuple[_GroupMeans | _PyramidTokens, tuple[int, int], int, int]:
    """Return the token source that fits the backbone, with its grid, channels and heads."""
    if isinstance(backbone, VitBackbone):
        if config.projected_channels is not None or config.average_features:
            raise ValueError("projected_channels and average_features are for CNN backbones")
        if config.layers is None and config.backbone not in _TAPPED_BLOCKS:
            raise ValueError(f"nothing is published on which blocks of {config.backbone} to tap; set layers")
        if len(backbone.layers) % config.groups:
            raise ValueError(f"{len(backbone.layers)} layers can't be split into {config.groups} equal groups")
        return _GroupMeans(config.groups), backbone.grid, backbone.channels[0], config.heads or backbone.heads
    if config.projected_channels is None or config.heads is None or config.groups != 1:
        raise ValueError("a CNN backbone needs projected_channels, heads and groups=1")
    height, width = config.image_size
    if height % max(backbone.strides) or width % max(backbone.strides):
        raise ValueError(f"image size {config.image_size} is not a multiple of the stride {max(backbone.strides)}")
    grid = (height // min(backbone.strides), width // min(backbone.strides))
    channels = config.projected_channels
    tokens = _PyramidTokens(backbone.channels, grid, channels, average=config.average_features)
    return tokens, grid, channels, config.heads


def _mean_by_group(layers: Sequence[Tensor], groups: int) -> Tensor:
    """Average `(B, N, C)` tensors in `groups` equal runs of neighbours: `(B, G, N, C)`."""
    size = len(layers) // groups
    runs = [layers[start : start + size] for start in range(0, len(layers), size)]
    return torch.stack([torch.stack(list(run)).mean(dim=0) for run in runs], dim=1)


def _sample_tokens(tokens: Tensor, count: int | None, generator: torch.Generator) -> Tensor:
    """Draw `count` of N tokens for each image, all of them if None: `(B, G, count, C)`."""
    batch, groups, positions, channels = tokens.shape
    if count is None or count >= positions:
        return tokens
    drawn = torch.rand(batch, positions, generator=generator).topk(count, dim=1).indices.to(tokens.device)
    return tokens.gather(2, drawn[:, None, :, None].expand(-1, groups, -1, channels))


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
    with torch.no_grad():
        distance = 1 - functional.cosine_similarity(targets, rebuilt, dim=-1)  # (B, G, N)
        weight = (distance / distance.mean(dim=(0, 2), keepdim=True)) ** exponent
    mined: Tensor = _ReweightGradient.apply(rebuilt, weight[..., None])  # type: ignore[no-untyped-call]  # torch's
    return (1 - functional.cosine_similarity(targets.flatten(2), mined.flatten(2), dim=-1)).mean()
