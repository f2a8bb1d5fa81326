"""GLCF: what parts of an image say must agree with what the whole image means; where they disagree, it is odd.

Frozen features become local tokens, which keep the grid, and one semantic token, through which everything global must
pass. Three decoders mirror the backbone: one rebuilds the features from the semantic token alone, one predicts those
global features from the local tokens, one predicts the backbone's features from the local tokens. The cosine distance
of the last pair shows structural defects, that of the first two shows logical ones.

Paper: Yao, Yu, Luo, Qiang, Luo, Zhang, "Learning Global-Local Correspondence with Semantic Bottleneck for Logical
Anomaly Detection", arXiv:2303.05768.
Reference code: hmyao22/GLCF, MIT; its last version, with a WideResNet and cosine distances. Nothing of it is copied.

Deviations from the reference code, each with its reason:
* the backbone stays frozen, as in the first version; the last one hands it to the optimiser and updates its batch
  norms, and a moving teacher lets the cosine targets collapse;
* frames are resized once, to the network's size, instead of twice;
* maps are blurred in calibration and inference alike; the published scripts do so in one of the two;
* both branches are always judged in the default fusion, alike; the evaluation script chooses one by the name of the
  product, a mix that it comments out weighs them 8 to 1, the demo script 5 to 1, and `branch_weights` can;
* the rate falls to a tenth along a cosine instead of in one step at three fifths, the one shape that the loop has;
* gradients are cleared before each step, as the published script never does: each of its steps follows the sum of all
  gradients so far;
* frames are resized by the one filter that training and service share, bilinear with antialiasing, instead of Lanczos;
* biases of the patch embeddings begin at 0, as all others do, instead of PyTorch's small draw;
* depths, widths and the number of levels are free, so that a CPU can train and serve.
As in the code, where the paper may be read otherwise: each transformer block has a skip around its own skips, and the
third loss has no stopped gradient, so both of its sides meet each other. Maps are normalised by the frames that the
network was fitted on: a change of scale moves no ranking of a branch, and thresholds rest on held-out frames anyway.
The score is the standard deviation of the map. Left out: the code's first version (Swin-T, 49 semantic tokens, squared
errors), whose windows make graphs of hundreds of slices.

Symbols: f = `targets`, the backbone's finest levels · X = `local` tokens (B, N, D) · g = `semantic` token (B, 1, D)
· G_k = `global_features` (Phi_G) · G^_k = `global_estimates` (Psi_G) · L^_k = `local_estimates` (Psi_L)
· mu, sigma = `means`, `deviations` (branches, levels) · alpha, beta =
`branch_weights` · w = `level_weights`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import CnnBackbone
from models.blocks.initial_values import draw_defaults, draw_xavier
from models.blocks.maps import reduce_map, require_image_size
from models.blocks.on_backbone import OnBackbone
from models.blocks.packing import map_shapes, pack, unpack
from models.blocks.smoothing import SmoothUpsampling
from models.blocks.transformer import TransformerBlock, sincos_positions
from models.detector import AnomalyOutput, GradientStage, PassStage, Recipe, Stage

_NORM_EPS = 1e-5  # of the reference code, where masked autoencoders have 1e-6
_SMALLEST_DEVIATION = 1e-6  # of a cosine distance; keeps a branch that learnt nothing from dividing by zero

_PAPER_RECIPE = Recipe(
    optimiser="adamw",
    learning_rate=1e-4,
    final_learning_rate=1e-5,
    weight_decay=0.01,
    batch_size=8,
    betas=(0.9, 0.95),
    epochs=500,
)


@dataclass(frozen=True)
class GlcfConfig:
    """Defaults are those of the reference code's last version.

    Attributes:
        backbone: timm's name; WideResNet-50-2.
        layers: tapped stages, each at twice the stride of the one before.
        targets: how many levels, the finest first, are rebuilt.
        inputs: how many levels, the coarsest last, are embedded as tokens.
        image_size: `(height, width)`, multiples of a token's stride, which is twice that of the coarsest target.
        token_channels: D, a multiple of 4 and of both numbers of heads.
        encoder_blocks: depth of the encoder that gathers the semantic token.
        encoder_heads: its attention heads.
        decoder_blocks: depth of each of the two token decoders.
        decoder_heads: their attention heads.
        mlp_ratio: width of each hidden layer over its input.
        level_depths: blocks of a feature decoder at each target, the coarsest first: a mirrored WideResNet-50-2.
        local_weight: weight of the loss between f and L^.
        global_weight: weight of the loss between G and f.
        correspondence_weight: weight of the loss between G and G^.
        detach_global_target: keep the third loss from pulling G towards G^.
        fusion: both branches, the local one (textures), or the global one (logic).
        branch_weights: of the local and the global branch where the fusion asks both (open: alike; the code has
            5 to 1 and 8 to 1).
        level_weights: w, of each target's normalised map, the finest first.
        blur_sigma: standard deviation of the Gaussian in pixels of the image.
        score_reduction: standard deviation of the map, or its largest value.
        seed: seeds the initial values.
        recipe: the descent.
    """

    backbone: str = "wide_resnet50_2.tv_in1k"
    layers: tuple[int, ...] = (1, 2, 3, 4)
    targets: int = 3
    inputs: int = 3
    image_size: tuple[int, int] = (224, 224)
    token_channels: int = 480
    encoder_blocks: int = 6
    encoder_heads: int = 12
    decoder_blocks: int = 6
    decoder_heads: int = 16
    mlp_ratio: int = 4
    level_depths: tuple[int, ...] = (3, 4, 6)
    local_weight: float = 1.0
    global_weight: float = 1.0
    correspondence_weight: float = 1.0
    detach_global_target: bool = False
    fusion: Literal["general", "texture", "logical"] = "general"
    branch_weights: tuple[float, float] = (1.0, 1.0)
    level_weights: tuple[float, ...] = (1.0, 3.0, 6.0)
    blur_sigma: float = 4.0
    score_reduction: Literal["deviation", "maximum"] = "deviation"
    seed: int = 1
    recipe: Recipe = _PAPER_RECIPE


class _Blocks(nn.ModuleList):
    """Transformer blocks, each with one more skip around itself."""

    def __init__(self, depth: int, channels: int, heads: int, mlp_ratio: int) -> None:
        super().__init__(TransformerBlock(channels, heads, mlp_ratio, _NORM_EPS) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x) + x
        return x


class _SemanticBottleneck(nn.Module):
    """Turn levels into local tokens and one semantic token, and either of the two back into a coarse feature map."""

    positions: Tensor

    def __init__(
        self, config: GlcfConfig, channels: Sequence[int], patches: Sequence[int], grid: tuple[int, int], out: int
    ) -> None:
        super().__init__()
        self.grid = grid
        width, ratio = config.token_channels, config.mlp_ratio
        self.embeddings = nn.ModuleList(
            nn.Conv2d(old, width, patch, stride=patch) for old, patch in zip(channels, patches, strict=True)
        )
        self.semantic_token = nn.Parameter(torch.zeros(1, 1, width))
        self.query_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        self.encoder = _Blocks(config.encoder_blocks, width, config.encoder_heads, ratio)
        self.encoder_norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.decoder_embedding = nn.Linear(width, width)
        self.global_decoder = _Blocks(config.decoder_blocks, width, config.decoder_heads, ratio)
        self.local_decoder = _Blocks(config.decoder_blocks, width, config.decoder_heads, ratio)
        self.decoder_norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.prediction = nn.Linear(width, out)

    def encode(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return local tokens `(B, N, D)` and the semantic token `(B, 1, D)`."""
        embedded = [embedding(level) for embedding, level in zip(self.embeddings, levels, strict=True)]
        tokens = torch.stack(embedded).sum(dim=0).flatten(2).transpose(1, 2) + self.positions
        x = torch.cat((tokens, self.semantic_token.expand(tokens.shape[0], -1, -1)), dim=1)
        x = self.decoder_embedding(self.encoder_norm(self.encoder(x)))
        return x[:, :-1], x[:, -1:]

    def decode_semantic(self, semantic: Tensor) -> Tensor:
        """Return the coarse map `(B, C, h, w)` that the semantic token `(B, 1, D)` alone brings about."""
        queries = (self.query_token + self.positions).expand(semantic.shape[0], -1, -1)
        return self._predict(self.global_decoder(torch.cat((semantic, queries), dim=1))[:, 1:])

    def decode_local(self, local: Tensor) -> Tensor:
        """Return the coarse map `(B, C, h, w)` that local tokens `(B, N, D)` bring about."""
        return self._predict(self.local_decoder(local))

    def _predict(self, tokens: Tensor) -> Tensor:
        predicted: Tensor = self.prediction(self.decoder_norm(tokens))
        return predicted.transpose(1, 2).reshape(predicted.shape[0], -1, *self.grid)


class _ReverseBlock(nn.Module):
    """A residual bottleneck of half the width, that may double the grid (RD4AD, arXiv:2201.10703)."""

    def __init__(self, channels: int, out: int, *, doubles: bool) -> None:
        super().__init__()
        hidden = out // 2
        self.conv1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = (
            nn.ConvTranspose2d(hidden, hidden, 2, stride=2, bias=False)
            if doubles
            else nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
        )
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.upsample = (
            nn.Sequential(nn.ConvTranspose2d(channels, out, 2, stride=2, bias=False), nn.BatchNorm2d(out))
            if doubles
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(x)))
        hidden = functional.relu(self.bn2(self.conv2(hidden)))
        return functional.relu(self.bn3(self.conv3(hidden)) + self.upsample(x))


class _FeatureDecoder(nn.Module):
    """The backbone in reverse: from a coarse map to one map for each target, the finest first."""

    def __init__(self, channels: int, outs: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for out, depth in zip(reversed(outs), depths, strict=True):
            blocks = [_ReverseBlock(out if i else channels, out, doubles=i == 0) for i in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
            channels = out

    def initialise(self, generator: torch.Generator) -> None:
        """Draw plain convolutions by their fan-out, as residual networks do, and transposed ones as PyTorch does."""
        draw_defaults(self, generator)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[::-1]


class Glcf(OnBackbone):
    """The semantic bottleneck and its three feature decoders, on top of a frozen CNN.

    Raises:
        ValueError: if the configuration contradicts itself or the backbone.
    """

    means: Tensor
    deviations: Tensor
    weights: Tensor
    is_calibrated: Tensor

    def __init__(self, config: GlcfConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.backbone = CnnBackbone(config.backbone, config.layers)
        channels, strides = self.backbone.channels, self.backbone.strides
        _refuse_misfits(config, strides)
        self._shapes = map_shapes(channels, strides, config.image_size)

        stride = _token_stride(config, strides)
        grid = (config.image_size[0] // stride, config.image_size[1] // stride)
        target_channels = channels[: config.targets]
        coarse = 2 * target_channels[-1]
        patches = [stride // one for one in strides[-config.inputs :]]
        self.bottleneck = _SemanticBottleneck(config, channels[-config.inputs :], patches, grid, coarse)
        decoders = {
            name: _FeatureDecoder(coarse, target_channels, config.level_depths)
            for name in ("global_features", "global_estimates", "local_estimates")
        }
        self.decoders = nn.ModuleDict(decoders)
        generator = torch.Generator().manual_seed(config.seed)
        draw_xavier(self.bottleneck, generator)  # both learnt tokens start at zero
        for decoder in decoders.values():
            decoder.initialise(generator)
        self.upsampling = nn.ModuleList(
            SmoothUpsampling((height, width), config.image_size, config.blur_sigma)
            for _, height, width in self._shapes[: config.targets]
        )

        self._branches = 2 if config.fusion == "general" else 1
        self.register_buffer("means", torch.zeros(self._branches, config.targets))
        self.register_buffer("deviations", torch.ones(self._branches, config.targets))
        of_branches = torch.tensor(config.branch_weights if config.fusion == "general" else (1.0,))
        weights = torch.outer(of_branches, torch.tensor(config.level_weights))
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("is_calibrated", torch.zeros((), dtype=torch.bool))
        # An exported graph can't branch on a tensor, so a plain copy of `is_calibrated` is kept beside it.
        self._may_run = False
        self.register_load_state_dict_post_hook(Glcf._copy_flag)  # type: ignore[no-untyped-call]  # torch's
        self._sums: Tensor | None = None
        self._count = 0
        self.train()

    def _copy_flag(self, _: object) -> None:
        self._may_run = bool(self.is_calibrated)

    def train(self, mode: bool = True) -> "Glcf":
        """Switch the mode, but for the decoders' batch norms: only a loss uses the statistics of its batch."""
        super().train(mode)
        self.decoders.eval()
        return self

    def stages(self) -> Sequence[Stage]:
        """Return the descent, and the look at good maps that normalises them."""
        return [
            GradientStage(
                name="correspondence",
                loss=self.loss,
                parameters=self.learnable_parameters(),
                recipe=self.config.recipe,
                encode=self.encode,
            ),
            PassStage("normal maps", self.observe, self.finish),
        ]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return all frozen levels of images `(B, 3, H, W)`, packed: `(B, sum of C h w)`.

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights.
        """
        require_image_size(images, self.image_size)
        return pack(self.backbone(images))

    def loss(self, encoded: Tensor, _: int) -> dict[str, Tensor]:
        """Return the weighted distances of the three pairs for packed levels `(B, sum of C h w)`; nothing is drawn."""
        levels = unpack(encoded, self._shapes)
        targets = levels[: self.config.targets]
        with _batch_statistics(self.decoders):
            local, semantic = self.bottleneck.encode(levels[-self.config.inputs :])
            refined = self.bottleneck.decode_local(local)
            local_estimates = self.decoders["local_estimates"](refined)
            global_estimates = self.decoders["global_estimates"](refined)
            global_features = self.decoders["global_features"](self.bottleneck.decode_semantic(semantic))
        fixed = [one.detach() for one in global_features] if self.config.detach_global_target else global_features
        return {
            "local": self.config.local_weight * _distance_of_images(targets, local_estimates),
            "global": self.config.global_weight * _distance_of_images(targets, global_features),
            "correspondence": self.config.correspondence_weight * _distance_of_images(fixed, global_estimates),
        }

    @torch.no_grad()
    def observe(self, images: Tensor) -> None:
        """Add the mean and the standard deviation of each good map of images `(B, 3, H, W)`."""
        maps = self._distance_maps(self.encode(images)).double()
        spread = maps.std(dim=(3, 4), correction=0)
        sums = torch.stack((maps.mean(dim=(3, 4)), spread)).sum(dim=1)  # (2, branches, levels)
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += images.shape[0]

    def finish(self) -> None:
        """Keep mu and sigma of each branch and level, averaged over the observed frames.

        Raises:
            RuntimeError: if no frames were observed.
        """
        if self._sums is None:
            raise RuntimeError("no frames were observed")
        means, deviations = (self._sums / self._count).unbind()
        self.means.copy_(means)
        self.deviations.copy_(deviations.clamp_min(_SMALLEST_DEVIATION))
        self.is_calibrated.fill_(True)
        self._may_run = True
        self._sums, self._count = None, 0

    def forward(self, images: Tensor) -> AnomalyOutput:
        """Judge images `(B, 3, H, W)` float32 in [0, 1]; maps may be negative.

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights or the maps were not calibrated.
        """
        encoded = self.encode(images)
        if not self._may_run:
            raise RuntimeError("the maps were not calibrated yet; run the pass stage over the good frames first")
        normalised = (self._distance_maps(encoded) - self.means[..., None, None]) / self.deviations[..., None, None]
        anomaly_map = (self.weights[..., None, None] * normalised).sum(dim=(1, 2))
        return AnomalyOutput(anomaly_map, reduce_map(anomaly_map, self.config.score_reduction))

    def _distance_maps(self, encoded: Tensor) -> Tensor:
        """Return 1 - cosine of each pair that the fusion uses, resized and blurred: `(B, branches, levels, H, W)`."""
        levels = unpack(encoded, self._shapes)
        local, semantic = self.bottleneck.encode(levels[-self.config.inputs :])
        refined = self.bottleneck.decode_local(local)
        pairs = []
        if self.config.fusion != "logical":
            pairs.append((levels[: self.config.targets], self.decoders["local_estimates"](refined)))
        if self.config.fusion != "texture":
            global_features = self.decoders["global_features"](self.bottleneck.decode_semantic(semantic))
            pairs.append((global_features, self.decoders["global_estimates"](refined)))
        maps = [
            upsample(1 - functional.cosine_similarity(one, other, dim=1))
            for pair in pairs
            for upsample, one, other in zip(self.upsampling, *pair, strict=True)
        ]
        return torch.stack(maps, dim=1).reshape(-1, self._branches, self.config.targets, *self.image_size)


def _refuse_misfits(config: GlcfConfig, strides: Sequence[int]) -> None:
    if any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
        raise ValueError(f"each layer must have twice the stride of the one before; the strides are {tuple(strides)}")
    if not (0 < config.targets <= len(strides) and 0 < config.inputs <= len(strides) <= config.targets + config.inputs):
        raise ValueError(f"targets and inputs must be levels of the {len(strides)} layers and leave none out")
    if len(config.level_depths) != config.targets or len(config.level_weights) != config.targets:
        raise ValueError(f"level_depths and level_weights need one entry for each of {config.targets} targets")
    if min(config.branch_weights) <= 0:
        raise ValueError(
            f"branch_weights must be positive, not {config.branch_weights}; fusion leaves a branch out altogether"
        )
    stride = _token_stride(config, strides)
    if strides[-1] > stride:
        raise ValueError(f"a layer of stride {strides[-1]} is coarser than the tokens, whose stride is {stride}")
    if any(side % stride for side in config.image_size):
        raise ValueError(f"image size {config.image_size} is not a multiple of a token's stride {stride}")
    if any(config.token_channels % divisor for divisor in (4, config.encoder_heads, config.decoder_heads)):
        raise ValueError(f"token_channels must be a multiple of 4 and of all heads, not {config.token_channels}")


def _token_stride(config: GlcfConfig, strides: Sequence[int]) -> int:
    return 2 * strides[config.targets - 1]


def _distance_of_images(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return the sum over levels of 1 - cosine of whole images' maps, averaged over the batch (RD4AD)."""
    distances = [
        1 - functional.cosine_similarity(one.flatten(1), other.flatten(1), dim=1)
        for one, other in zip(first, second, strict=True)
    ]
    return torch.stack(distances).sum(dim=0).mean()


@contextmanager
def _batch_statistics(decoders: nn.Module) -> Iterator[None]:
    """Let batch norms use, and learn from, the batch at hand."""
    decoders.train()
    try:
        yield
    finally:
        decoders.eval()
