"""ST-MAE: each half of an image must be predicted from the other half; what can't be is odd.

Fused features of a frozen CNN are cut into tokens and dealt into two halves. One transformer encodes both halves, each
on its own; the code of one half is then moved to the places of the other ("transition"), and a light decoder rebuilds
all features from the moved codes. Squared distance times cosine distance between features and rebuilt features is the
anomaly map.

Paper: Yao, Wang, Yu, "Siamese Transition Masked Autoencoders as Uniform Unsupervised Visual Anomaly Detector",
arXiv:2211.00349.
Reference code: the authors published none. Sizes were read in TSTB-dev/ST-MAE (MIT, by others) and in hmyao22/PSA, the
same authors' next method; nothing of either is copied.

Deviations from TSTB-dev/ST-MAE, each with its reason:
* moved codes go back to their places in the image; there they stay in the order of the deal, which scrambles the map;
* a token's position is added after the norm of its embedding (paper, framework figure), and it is the fixed sine and
  cosine of masked autoencoders, again at the place where the decoder puts it;
* each block has norms of its own; there all blocks share one;
* the cosine term is taken a token at a time, as in PSA, so that a small defect is not lost in the whole image;
* attention has biases, encoder and decoder end with a norm, and each value of a patch has a projection of its own, as
  in PSA; the embedding's bias begins at 0, as all others do, instead of PyTorch's small draw;
* both distances are multiplied on the grid, as there, and then resized and blurred, so that a map has the frame's size;
  there nothing is resized and the score is the largest value, while PSA resizes each first and multiplies last;
* AdamW has the betas of PSA (0.9 and 0.95), and gradients are clipped at a norm of 1, as neither source does, so that
  one odd batch throws no descent off;
* the rate falls to a tenth along a cosine; the two sources disagree (constant, or one step) and the loop has one shape.
Chosen where nothing was published: the j-th token of one half, row by row, changes places with the j-th of the other;
inference averages over a few deals that are drawn once and kept with the weights, because a new deal changes all
scores; frames are not augmented and features not standardised channel by channel; the score is the standard deviation
of the map, as in the authors' other evaluations.

With `decoder_mode="joint"`, as drawn in the paper, the decoder sees all moved codes at once, so what it rebuilds at a
place may draw on the code that was made from this very place. `"split"` rebuilds each half from the other alone.

Symbols: F, F^ = `features` (B, C, h, w) and, cut into patches, `patches`, `rebuilt` (B, N, k k C) · k = `patch_size`
· A, B = first and second half of `order` (N,) · d, theta = squared and cosine distance at a place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import CnnBackbone
from models.blocks.draws import generator_of_step
from models.blocks.initial_values import draw_xavier
from models.blocks.maps import reduce_map, require_image_size
from models.blocks.on_backbone import OnBackbone
from models.blocks.patches import patchify, unpatchify
from models.blocks.smoothing import SmoothUpsampling
from models.blocks.transformer import TransformerBlock, sincos_positions
from models.detector import AnomalyOutput, GradientStage, Recipe, Stage

_NORM_EPS = 1e-5  # of both sources, where masked autoencoders have 1e-6

_PAPER_RECIPE = Recipe(
    optimiser="adamw",
    learning_rate=1e-4,
    final_learning_rate=1e-5,
    weight_decay=0.05,
    batch_size=8,
    betas=(0.9, 0.95),
    epochs=400,
    clip_gradient_norm=1.0,
)


@dataclass(frozen=True)
class StMaeConfig:
    """Defaults are the "base" size of TSTB-dev/ST-MAE; the paper's own tables are not public.

    Attributes:
        backbone: timm's name; VGG19 in the re-implementation.
        layers: tapped stages; four levels (paper, framework figure), strides 1, 2, 4 and 8 of VGG19.
        image_size: `(height, width)`.
        feature_grid: h, w that all levels are resized to before they are joined.
        patch_size: k, side of a token on the grid; the number of tokens must be even.
        encoder_channels: width of the encoder's tokens, a multiple of 4 and of its heads.
        encoder_heads: its attention heads.
        encoder_blocks: its depth.
        decoder_channels: width of the decoder's tokens, a multiple of 4 and of its heads.
        decoder_heads: its attention heads.
        decoder_blocks: its depth.
        mlp_ratio: width of each hidden layer over its input.
        decoder_mode: one decoder pass over all moved codes, or one a half.
        direction_weight: weight of the cosine term of the loss, next to a squared error of weight 1 (both sources).
        deals: K, over how many kept deals inference averages; more cost as much again.
        deal_seed: draws them; apart from `seed`, because another deal changes all scores.
        blur_sigma: standard deviation of the Gaussian in pixels of the image.
        score_reduction: standard deviation of the map, or its largest value.
        seed: seeds the initial values and, with the step, the deals of training.
        recipe: the descent.
    """

    backbone: str = "vgg19.tv_in1k"
    layers: tuple[int, ...] = (0, 1, 2, 3)
    image_size: tuple[int, int] = (256, 256)
    feature_grid: tuple[int, int] = (64, 64)
    patch_size: int = 4
    encoder_channels: int = 768
    encoder_heads: int = 12
    encoder_blocks: int = 12
    decoder_channels: int = 512
    decoder_heads: int = 16
    decoder_blocks: int = 8
    mlp_ratio: int = 4
    decoder_mode: Literal["joint", "split"] = "joint"
    direction_weight: float = 5.0
    deals: int = 2
    deal_seed: int = 0
    blur_sigma: float = 4.0
    score_reduction: Literal["deviation", "maximum"] = "deviation"
    seed: int = 1
    recipe: Recipe = _PAPER_RECIPE


def deal_tokens(count: int, rows: int, generator: torch.Generator) -> Tensor:
    """Deal `count` tokens into two equal halves, `rows` times over.

    Returns:
        `(rows, count)` int64, each row an order of all tokens: first half A, then half B, both ascending.

    Raises:
        ValueError: if `count` is odd; halves swap places one to one.
    """
    if count % 2:
        raise ValueError(f"{count} tokens can't be dealt into two equal halves")
    shuffled = torch.rand(rows, count, generator=generator).argsort(dim=1)
    return shuffled.reshape(rows, 2, -1).sort(dim=2).values.flatten(1)


class StMae(OnBackbone):
    """The siamese encoder, the transition and the decoder, on top of a frozen CNN.

    Raises:
        ValueError: if the configuration contradicts itself.
    """

    positions: Tensor
    decoder_positions: Tensor
    orders: Tensor
    rasters: Tensor

    def __init__(self, config: StMaeConfig) -> None:
        super().__init__()
        _refuse_misfits(config)
        self.config = config
        self.image_size = config.image_size
        self.token_grid = (config.feature_grid[0] // config.patch_size, config.feature_grid[1] // config.patch_size)
        self.backbone = CnnBackbone(config.backbone, config.layers)

        patch_channels = config.patch_size**2 * sum(self.backbone.channels)
        self.patch_embedding = nn.Linear(patch_channels, config.encoder_channels)
        self.patch_norm = nn.LayerNorm(config.encoder_channels, eps=_NORM_EPS)
        self.encoder = _transformer(
            config.encoder_blocks, config.encoder_channels, config.encoder_heads, config.mlp_ratio
        )
        self.decoder_embedding = nn.Linear(config.encoder_channels, config.decoder_channels)
        self.decoder = _transformer(
            config.decoder_blocks, config.decoder_channels, config.decoder_heads, config.mlp_ratio
        )
        self.prediction = nn.Linear(config.decoder_channels, patch_channels)
        self.upsampling = SmoothUpsampling(config.feature_grid, config.image_size, config.blur_sigma)

        for name, channels in (("positions", config.encoder_channels), ("decoder_positions", config.decoder_channels)):
            self.register_buffer(name, sincos_positions(self.token_grid, channels), persistent=False)
        tokens = self.token_grid[0] * self.token_grid[1]
        orders = deal_tokens(tokens, config.deals, torch.Generator().manual_seed(config.deal_seed))
        self.register_buffer("orders", orders)
        self.register_buffer("rasters", orders.argsort(dim=1))  # stored, so that no graph has to sort
        self._initialise(torch.Generator().manual_seed(config.seed))

    def _initialise(self, generator: torch.Generator) -> None:
        for part in (self.patch_embedding, self.encoder, self.decoder_embedding, self.decoder, self.prediction):
            draw_xavier(part, generator)

    def stages(self) -> Sequence[Stage]:
        """Return the one descent."""
        return [
            GradientStage(
                name="transition",
                loss=self.loss,
                parameters=self.learnable_parameters(),
                recipe=self.config.recipe,
                encode=self.encode,
            )
        ]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the fused frozen features F `(B, C, h, w)` of images `(B, 3, H, W)`.

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights.
        """
        require_image_size(images, self.image_size)
        grid = self.config.feature_grid
        resized = [
            layer
            if tuple(layer.shape[2:]) == grid
            else functional.interpolate(layer, size=grid, mode="bilinear", align_corners=False)
            for layer in self.backbone(images)
        ]
        return torch.cat(resized, dim=1)

    def loss(self, features: Tensor, step: int) -> dict[str, Tensor]:
        """Return the squared and the weighted cosine distance of features `(B, C, h, w)`, a new deal an image."""
        generator = generator_of_step(self.config.seed, step)
        patches = patchify(features, self.config.patch_size)
        order = deal_tokens(patches.shape[1], patches.shape[0], generator).to(features.device)
        distance, direction = _reconstruction_errors(patches, self._rebuild(patches, order, order.argsort(dim=1)))
        return {"distance": distance, "direction": self.config.direction_weight * direction}

    def forward(self, images: Tensor) -> AnomalyOutput:
        """Judge images `(B, 3, H, W)` float32 in [0, 1].

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights.
        """
        patches = patchify(self.encode(images), self.config.patch_size)
        residuals = [
            self._compare(patches, self._rebuild(patches, order, raster))
            for order, raster in zip(self.orders.unbind(), self.rasters.unbind(), strict=True)
        ]
        anomaly_map = self.upsampling(torch.stack(residuals).mean(dim=0))
        return AnomalyOutput(anomaly_map, reduce_map(anomaly_map, self.config.score_reduction))

    def _rebuild(self, patches: Tensor, order: Tensor, raster: Tensor) -> Tensor:
        """Return F^ `(B, N, k k C)` of patches, for an order `(N,)` of all images or `(B, N)` of each.

        `raster` is the inverse of `order`: where each token of the image lies in it.
        """
        tokens = self.patch_norm(self.patch_embedding(patches)) + self.positions
        codes = _join_halves(self.encoder(_part_halves(_pick(tokens, order))))
        moved = torch.cat(codes.chunk(2, dim=1)[::-1], dim=1)  # the transition: B's codes to A's places and back
        placed = self.decoder_embedding(moved) + self.decoder_positions[order]
        if self.config.decoder_mode == "split":
            decoded = _join_halves(self.decoder(_part_halves(placed)))
        else:
            decoded = self.decoder(placed)
        rebuilt: Tensor = self.prediction(_pick(decoded, raster))
        return rebuilt

    def _compare(self, patches: Tensor, rebuilt: Tensor) -> Tensor:
        """Return d times theta `(B, h, w)` of patches `(B, N, k k C)`."""
        size = self.config.patch_size
        seen, expected = (x.reshape(x.shape[0], x.shape[1], size**2, -1) for x in (patches, rebuilt))  # (B, N, k k, C)
        distance = (expected - seen).square().mean(dim=3)
        # Rounding may leave a cosine just above 1.
        direction = (1 - functional.cosine_similarity(expected, seen, dim=3)).clamp_min(0)
        return unpatchify(distance * direction, self.token_grid, size)[:, 0]


def _refuse_misfits(config: StMaeConfig) -> None:
    if any(side % config.patch_size for side in config.feature_grid):
        raise ValueError(f"patches of {config.patch_size} do not tile the grid {config.feature_grid}")
    if config.deals < 1:
        raise ValueError("inference needs at least one deal")
    for part, channels, heads in (
        ("encoder", config.encoder_channels, config.encoder_heads),
        ("decoder", config.decoder_channels, config.decoder_heads),
    ):
        if channels % heads or channels % 4:
            raise ValueError(f"{part}_channels must be a multiple of 4 and of its {heads} heads, not {channels}")


def _transformer(depth: int, channels: int, heads: int, mlp_ratio: int) -> nn.Sequential:
    blocks = [TransformerBlock(channels, heads, mlp_ratio, _NORM_EPS) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.LayerNorm(channels, eps=_NORM_EPS))


def _reconstruction_errors(patches: Tensor, rebuilt: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean squared and the mean cosine distance of patches `(B, N, k k C)`, the latter a token at a time."""
    return (rebuilt - patches).square().mean(), (1 - functional.cosine_similarity(rebuilt, patches, dim=2)).mean()


def _part_halves(tokens: Tensor) -> Tensor:
    """Lay the two halves of `(B, N, D)` on the batch axis: `(2 B, N / 2, D)`, an image's halves next to each other."""
    return tokens.reshape(-1, tokens.shape[1] // 2, tokens.shape[2])


def _join_halves(halves: Tensor) -> Tensor:
    """Undo `_part_halves`."""
    return halves.reshape(-1, 2 * halves.shape[1], halves.shape[2])


def _pick(tokens: Tensor, index: Tensor) -> Tensor:
    """Return tokens `(B, N, D)` in the order of an index `(N,)`, or `(B, N)` where images differ."""
    if index.ndim == 1:
        return tokens.index_select(1, index)
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
