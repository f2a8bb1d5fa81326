"""AMI-Net: hide the tokens that do not fit in with the rest of the image, then paint them anew from what is left.

Learnt queries gather cluster centres from the tokens of one image; the tokens that lie far from their centre, measured
within each cluster, are masked. A vision transformer that was trained to inpaint randomly masked feature maps rebuilds
the frozen CNN features from the visible tokens, so a defect is replaced by its normal surroundings. Squared error times
cosine distance between what the backbone saw and what was rebuilt is the anomaly map.

Paper: Luo, Yao, Yu, Li, "AMI-Net: Adaptive Mask Inpainting Network for Industrial Anomaly Detection and Localization",
IEEE Transactions on Automation Science and Engineering 2024, arXiv:2412.11802.
Reference code: luow23/AMI-Net, MIT. Nothing of it is copied; numbers agree with it (tests/parity).

Deviations, each with its reason:
* the last iteration is kept, not the epoch that is best on the test frames: a plant has no test frames;
* the backbone runs without gradients, and its layers may be kept from epoch to epoch: no optimiser ever moved it;
* gradients are cleared before each step, as the published scripts never do: each of their steps follows the sum of all
  gradients so far;
* frames are resized to the whole image size rather than by their shorter side: other shapes do not fit the network; the
  filter is the one that training and service share, bilinear with antialiasing, instead of Lanczos;
* resize and mean of a layer, resize and Gaussian of a map are one matrix an axis, the product of both: the same linear
  maps, cheaper, and reflected borders export as they are;
* tokens are embedded by a matrix product, not by a convolution without overlaps: the same, and the patches are the
  loss's targets anyway;
* all draws of a training step come from the step's own seed, and none is left in inference;
* an epoch drops its incomplete batch, as for all detectors, where the scripts train on it as well;
* layers are brought to a quarter of the image's side, which is the code's 64 x 64 at its 256; there it is 64 x 64 at
  every size;
* every backbone is read as the WideResNet-50 is: three stages, each with its 3 x 3 mean. The code's others take the
  stem or the last stages, without the mean, and normalise the features of the two of 101 layers;
* width, depth and patch are free, so that one CPU core can train and serve a small network.
As in the reference code, where the paper may be read otherwise: the mask token is learnt, and losses cover all tokens.

The published mask is a decision: a token whose score equals its threshold to the last float32 digits is masked by one
runtime and not by another, and then maps differ by a hundredth of their range. So a mask may be given a short slope
(`mask_softness`), over which a token fades into the mask token; 0 is the published step.

Symbols: F, F^ = `features`, `rebuilt` (B, C, h, w) · x = `tokens` (B, N, D) · a = `centre_tokens` (B, N, D), a second
embedding of F · z = `centres` (B, M, D) · s = `scores` (B, N) · sigma = `mask_deviations` · k = `patch_size`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import CnnBackbone
from models.blocks.draws import generator_of_step
from models.blocks.initial_values import draw_defaults, draw_xavier
from models.blocks.jitter import jitter_tokens
from models.blocks.maps import map_deviation, require_image_size
from models.blocks.on_backbone import OnBackbone
from models.blocks.packing import map_shapes, pack, unpack
from models.blocks.patches import patchify, unpatchify
from models.blocks.smoothing import SmoothUpsampling, bilinear_matrix
from models.blocks.transformer import TransformerBlock, sincos_positions
from models.detector import AnomalyOutput, GradientStage, Recipe, Stage

_TINY = 1e-12  # keeps quotients of nothing by nothing finite

_PAPER_RECIPE = Recipe(
    optimiser="adamw",
    learning_rate=1e-4,
    final_learning_rate=1e-4,
    weight_decay=0.01,
    batch_size=8,
    betas=(0.9, 0.95),
    epochs=300,
)


@dataclass(frozen=True)
class AmiNetConfig:
    """Defaults are those of the reference code, which trained the models that the paper reports.

    Attributes:
        backbone: timm's name; WideResNet-50-2 with torchvision's first weights.
        layers: indices of the tapped stages, strides 4, 8 and 16; the first one sets the grid h x w.
        image_size: `(height, width)`, multiples of the largest stride.
        patch_size: k, side of a token on the grid; a token's target is k x k x C numbers.
        token_channels: D, a multiple of 4 and of `heads`.
        heads: attention heads.
        mlp_ratio: width of each hidden layer over its input.
        blocks: depth of the inpainting transformer.
        centre_blocks: depth of the transformer that gathers centres.
        centres: M, the number of cluster centres.
        jitter: strength of the noise on tokens in training, in units of a token's norm over D.
        mask_deviations: sigma; a token is masked from so many standard deviations above its cluster's mean score on.
        direction_weight: weight of the cosine term of the loss, next to a squared error of weight 1.
        diversity_weight: weight of the distances between centres, next to a compactness of weight 1.
        mask_softness: width of the step between visible and masked, as a fraction of the threshold, and of the step
            between two clusters; 0 is sharp, as published.
        map_size: `(height, width)` of the anomaly map.
        blur_sigma: standard deviation of the Gaussian in pixels of the map; 0 for none.
        seed: seeds the initial values, and with the step all noise and masks of training.
        recipe: the descent; the paper's batch is 8 for one class, 16 for fifteen classes in one model, 1 for few shots.
    """

    score_reduction: ClassVar[Literal["deviation"]] = "deviation"

    backbone: str = "wide_resnet50_2.tv_in1k"
    layers: tuple[int, ...] = (1, 2, 3)
    image_size: tuple[int, int] = (256, 256)
    patch_size: int = 4
    token_channels: int = 768
    heads: int = 12
    mlp_ratio: int = 4
    blocks: int = 8
    centre_blocks: int = 1
    centres: int = 8
    jitter: float = 20.0
    mask_deviations: float = 0.5
    mask_softness: float = 0.0
    direction_weight: float = 5.0
    diversity_weight: float = 0.1
    map_size: tuple[int, int] = (256, 256)
    blur_sigma: float = 4.0
    seed: int = 1
    recipe: Recipe = _PAPER_RECIPE


def assign_tokens(distances: Tensor, softness: float = 0.0) -> Tensor:
    """Share tokens out to clusters: wholly to the nearest centre, unless another one is as near.

    Args:
        distances: `(B, N, M)` float32 of tokens to centres.
        softness: how much farther, as a fraction, a centre may be and still get a part; 0 gives all to the nearest.

    Returns:
        `(B, N, M)` float32, shares of each token; they add up to 1.
    """
    if softness == 0:
        nearest = distances.argmin(dim=2, keepdim=True)
        return (nearest == torch.arange(distances.shape[2], device=distances.device)).to(distances.dtype)
    least = distances.amin(dim=2, keepdim=True)
    shares = (1 - (distances - least) / (softness * least).clamp_min(_TINY)).clamp_min(0)
    return shares / shares.sum(dim=2, keepdim=True)


def find_outliers(scores: Tensor, members: Tensor, deviations: float, softness: float = 0.0) -> Tensor:
    """Mark the tokens that lie farther from their centre than is usual in their cluster.

    Args:
        scores: `(B, N)` float32, distance of each token to its nearest centre.
        members: `(B, N, M)` float32, shares of tokens in clusters.
        deviations: standard deviations (unbiased) above the cluster's mean from which on a token is an outlier.
        softness: width of the step from visible to outlier, as a fraction of the threshold; 0 decides sharply.

    Returns:
        `(B, N)` float32, 0 for visible tokens and 1 for outliers. A cluster of one token has no outliers.
    """
    count = members.sum(dim=1, keepdim=True)  # (B, 1, M)
    mean = (members * scores[..., None]).sum(dim=1, keepdim=True) / count.clamp_min(_TINY)
    # Two passes: the mean square minus the squared mean would lose the digits that decide at the threshold.
    square = (members * (scores[..., None] - mean).square()).sum(dim=1, keepdim=True)
    deviation = (square / (count - 1).clamp_min(1)).sqrt()
    threshold = (members * (mean + deviations * deviation)).sum(dim=2)
    company = (members * (count - 1).clamp(0, 1)).sum(dim=2)
    if softness == 0:
        return (scores >= threshold).to(scores.dtype) * company
    return (0.5 + (scores - threshold) / (softness * threshold).clamp_min(_TINY)).clamp(0, 1) * company


class AmiNet(OnBackbone):
    """Adaptive mask generator and inpainting transformer over a frozen CNN pyramid.

    Raises:
        ValueError: if the configuration contradicts itself or the backbone.
    """

    positions: Tensor

    def __init__(self, config: AmiNetConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.backbone = CnnBackbone(config.backbone, config.layers)
        _refuse_misfits(config, self.backbone.strides)
        self.feature_grid = _divide(config.image_size, min(self.backbone.strides))
        self.token_grid = _divide(self.feature_grid, config.patch_size)

        features, channels, patch = sum(self.backbone.channels), config.token_channels, config.patch_size
        self.patch_embedding = nn.Conv2d(features, channels, patch, stride=patch)
        self.centre_embedding = nn.Conv2d(features, channels, patch, stride=patch)
        self.centre_queries = nn.Parameter(torch.empty(1, config.centres, channels))
        self.centre_blocks = _transformer(config, config.centre_blocks)
        self.centre_norm = nn.LayerNorm(channels)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.blocks = _transformer(config, config.blocks)
        self.norm = nn.LayerNorm(channels)
        self.prediction = nn.Linear(channels, patch * patch * features)
        # Layers are resized and smoothed in one, as maps are: both are linear along each axis.
        for index, stride in enumerate(self.backbone.strides):
            for axis, old, new in zip(
                ("rows", "columns"), _divide(config.image_size, stride), self.feature_grid, strict=True
            ):
                matrix = _mean_matrix(new) @ bilinear_matrix(old, new)
                self.register_buffer(f"resize_{axis}_{index}", matrix.to(torch.float32), persistent=False)
        self.register_buffer("positions", sincos_positions(self.token_grid, channels), persistent=False)
        self.upsampling = SmoothUpsampling(self.feature_grid, config.map_size, config.blur_sigma)
        self._initialise(torch.Generator().manual_seed(config.seed))

    def _initialise(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.centre_queries, std=0.02, generator=generator)
        for embedding in (self.patch_embedding, self.centre_embedding):
            draw_defaults(embedding, generator)
        nn.init.xavier_uniform_(self.patch_embedding.weight.data.flatten(1), generator=generator)
        for part in (self.centre_blocks, self.blocks, self.prediction):
            draw_xavier(part, generator)

    def stages(self) -> Sequence[Stage]:
        """Return the one descent."""
        return [
            GradientStage(
                name="inpainting",
                loss=self.loss,
                parameters=self.learnable_parameters(),
                recipe=self.config.recipe,
                encode=self.encode,
            )
        ]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the frozen layers of images `(B, 3, H, W)`, one after the other in one row: `(B, sum of C h w)`.

        Each layer keeps its own grid, because on the common one they would take four times the memory.

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights.
        """
        require_image_size(images, self.image_size)
        return pack(self.backbone(images))

    def loss(self, encoded: Tensor, step: int) -> dict[str, Tensor]:
        """Return the four terms of the loss of encoded frames: direction, distance, compactness and diversity."""
        generator = generator_of_step(self.config.seed, step)
        features = self._unpack(encoded)
        masked = self._draw_mask(len(features), generator).to(features)
        return self._weigh_terms(features, masked, generator)

    def _weigh_terms(self, features: Tensor, masked: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the weighted terms for features `(B, C, h, w)` whose tokens are masked as `(B, N)` says."""
        patches = patchify(features, self.config.patch_size)
        centre_tokens = _embed(self.centre_embedding, patches)
        centres = self._gather_centres(jitter_tokens(centre_tokens, self.config.jitter, generator))
        # Only the centres are made from jittered tokens; it is the clean ones that shall lie near them.
        scores = _distances(centre_tokens + self.positions, centres).amin(dim=2)
        count = self.config.centres
        spread = _distances(centres, centres).sum(dim=(1, 2)) / (count * max(count - 1, 1))

        tokens = self._hide(_embed(self.patch_embedding, patches), masked)
        predicted = self._inpaint(jitter_tokens(tokens, self.config.jitter, generator))
        directions = 1 - _cosines(predicted, patches)
        return {
            "direction": self.config.direction_weight * directions.mean(),
            "distance": functional.mse_loss(predicted, patches),
            "compactness": scores.mean(),
            "diversity": -self.config.diversity_weight * spread.mean(),
        }

    def _draw_mask(self, batch: int, generator: torch.Generator) -> Tensor:
        """Choose for each image a uniform share of its tokens, and that many of them at random: `(B, N)`, 0 or 1."""
        count = self.positions.shape[0]
        wanted = (torch.rand(batch, 1, generator=generator) * count).floor()
        ranks = torch.rand(batch, count, generator=generator).argsort(dim=1).argsort(dim=1)
        return (ranks < wanted).to(torch.float32)

    def forward(self, images: Tensor) -> AnomalyOutput:
        """Judge images `(B, 3, H, W)` float32 in [0, 1].

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights.
        """
        features = self._unpack(self.encode(images))
        patches = patchify(features, self.config.patch_size)
        masked = self._find_mask(self._measure_tokens(patches))
        return self._finish_map(features, self._rebuild(patches, masked))

    def _unpack(self, encoded: Tensor) -> Tensor:
        """Bring the layers in a row back to maps, to the finest grid, and smooth them: features `(B, C, h, w)`.

        The zeros around the border count in the mean, as they do in the released models.
        """
        shapes = map_shapes(self.backbone.channels, self.backbone.strides, self.image_size)
        resized = [
            self.get_buffer(f"resize_rows_{index}") @ (layer @ self.get_buffer(f"resize_columns_{index}").T)
            for index, layer in enumerate(unpack(encoded, shapes))
        ]
        return torch.cat(resized, dim=1)

    def _gather_centres(self, centre_tokens: Tensor) -> Tensor:
        """Return the cluster centres `(B, M, D)` of tokens `(B, N, D)` without positions."""
        queries = self.centre_queries.expand(centre_tokens.shape[0], -1, -1)
        x = self.centre_blocks(torch.cat((queries, centre_tokens + self.positions), dim=1))
        centres: Tensor = self.centre_norm(x[:, : self.config.centres])
        return centres

    def _measure_tokens(self, patches: Tensor) -> Tensor:
        """Return the distances of the tokens of patches `(B, N, k k C)` to the image's centres `(B, N, M)`."""
        centre_tokens = _embed(self.centre_embedding, patches)
        return _distances(centre_tokens + self.positions, self._gather_centres(centre_tokens))

    def _find_mask(self, distances: Tensor) -> Tensor:
        """Return the adaptive mask `(B, N)`, 1 where a token is hidden."""
        softness = self.config.mask_softness
        members = assign_tokens(distances, softness)
        return find_outliers(distances.amin(dim=2), members, self.config.mask_deviations, softness)

    def _hide(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """Put the mask token in place of masked ones, a mixture where the mask lies between 0 and 1."""
        share = masked[..., None]
        return (1 - share) * tokens + share * self.mask_token

    def _inpaint(self, tokens: Tensor) -> Tensor:
        """Predict the features under all tokens `(B, N, D)` without positions: `(B, N, k k C)`."""
        predicted: Tensor = self.prediction(self.norm(self.blocks(tokens + self.positions)))
        return predicted

    def _rebuild(self, patches: Tensor, masked: Tensor) -> Tensor:
        """Return F^ `(B, C, h, w)` of patches `(B, N, k k C)`, inpainted where tokens are masked."""
        predicted = self._inpaint(self._hide(_embed(self.patch_embedding, patches), masked))
        return unpatchify(predicted, self.token_grid, self.config.patch_size)

    def _finish_map(self, features: Tensor, rebuilt: Tensor) -> AnomalyOutput:
        """Smooth squared error and cosine distance, multiply them, and score by the map's standard deviation."""
        distance = (features - rebuilt).square().mean(dim=1)
        direction = 1 - functional.cosine_similarity(features, rebuilt, dim=1)
        anomaly_map = self.upsampling(direction) * self.upsampling(distance)
        return AnomalyOutput(anomaly_map, map_deviation(anomaly_map))


def _refuse_misfits(config: AmiNetConfig, strides: Sequence[int]) -> None:
    if any(side % max(strides) for side in config.image_size):
        raise ValueError(f"image size {config.image_size} is not a multiple of the stride {max(strides)}")
    grid = _divide(config.image_size, min(strides))
    if any(side % config.patch_size for side in grid):
        raise ValueError(f"patches of {config.patch_size} do not tile the grid {grid} of the finest layer")
    if config.token_channels % config.heads or config.token_channels % 4:
        raise ValueError(f"token_channels must be a multiple of 4 and of {config.heads} heads")


def _divide(size: tuple[int, int], step: int) -> tuple[int, int]:
    return size[0] // step, size[1] // step


def _mean_matrix(size: int) -> Tensor:
    """Return what takes the mean of three neighbours of a row, with zeros beyond its ends: `(size, size)` float64."""
    near = (torch.arange(size)[:, None] - torch.arange(size)).abs() <= 1
    return near.double() / 3


def _transformer(config: AmiNetConfig, depth: int) -> nn.Sequential:
    return nn.Sequential(
        *(TransformerBlock(config.token_channels, config.heads, config.mlp_ratio) for _ in range(depth))
    )


def _embed(embedding: nn.Conv2d, patches: Tensor) -> Tensor:
    """Turn patches `(B, N, k k C)` into tokens `(B, N, D)`: the convolution without overlaps, as a matrix product."""
    weight = embedding.weight.permute(0, 2, 3, 1).flatten(1)
    return functional.linear(patches, weight, embedding.bias)


def _cosines(rows: Tensor, others: Tensor) -> Tensor:
    """Return the cosines of rows `(B, N, C)` and others: `(B, N)`, with half the passes of PyTorch's own."""
    lengths = torch.linalg.vector_norm(rows, dim=2) * torch.linalg.vector_norm(others, dim=2)
    cosines: Tensor = (rows * others).sum(dim=2) / lengths.clamp_min(_TINY)
    return cosines


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """Return Euclidean distance times cosine distance of points `(B, N, D)` and centres `(B, M, D)`: `(B, N, M)`.

    Both parts are taken of differences: after training tokens lie so near to their centres that 1 - cosine, or the
    square of the Euclidean distance expanded, would lose the digits that decide which tokens are masked. Of unit
    vectors, 1 - cosine is half their squared distance. At zero distance the gradient is zero, by PyTorch's convention.
    """
    euclidean = torch.linalg.vector_norm(points[:, :, None] - centres[:, None], dim=3)
    directions = functional.normalize(points, dim=2)[:, :, None] - functional.normalize(centres, dim=2)[:, None]
    distances: Tensor = euclidean * (0.5 * directions.square().sum(dim=3))
    return distances
