"""DADF: rebuild the features from themselves and from a memory of what is normal, then ask a flow how usual all is.

One transformer with two streams rebuilds a frozen CNN's pyramid: self-attention from the image's own tokens, memorial
attention from learnt ones that the image only steers. At each scale a normalizing flow is then fitted to the features
and both rebuilt copies, channel upon channel. Where their likelihood is low, something is odd.

Paper: Yao, Luo, Yu, "Visual Anomaly Detection via Dual-Attention Transformer and Discriminative Flow", IEEE
Transactions on Automation Science and Engineering 2023, arXiv:2303.17882.
Reference code: hmyao22/DADF, MIT; its flow is FrEIA's "all in one" block, MIT. Nothing of them is copied.

Deviations, each with its reason:
* norms stand before attention and perceptron, and a flow step has one coupling, as in the code and not in the figure;
* the last iteration is kept, not the epoch that is best on the test frames: a plant has no test frames;
* a permutation is kept as an index, not as a dense kernel (198 million numbers that only move channels);
* the map is 1 + A / e, in [0, 1) instead of [-e, 0): the same ranking, and more is more anomalous;
* features are read where timm's stages end, so two of the code's other backbones give other ones than there: VGG16 and
  VGG19 256, 512 and 512 channels, before the pools (`layers` 2, 3 and 4), and not 128, 256 and 512 behind them;
  MobileNetV3-L 24, 40 and 112 (1, 2 and 3), and not 24, 40 and 80. No other `layers` give those at strides 4, 8 and 16.
  ResNets and WideResNets, the default among them, are read as in the code;
* gradients are cleared before each step; the published script of the first stage never does, so that each of its steps
  follows the sum of all gradients so far, and published figures come from that: on 72 boards and 600 steps such a
  descent left held-out features at a squared error of 0.94, a cleared one at 0.39;
* biases of the patch embeddings begin at 0, as all others do, instead of PyTorch's small draw;
* frames are resized by the one filter that training and service share, bilinear with antialiasing, instead of bicubic;
* all sizes are free, so that one CPU core can train and serve a small network.

Symbols: F, S, R = `features`, `rebuilt`, `remembered` (B, C, h, w), one entry a scale · X, M = `tokens`, `memory`
(B, N, D) · J = `joint` (B, 3C, h, w) · u, z = a flow's input and output · gamma = `step.gain()`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import CnnBackbone
from models.blocks.dual_attention import DualBlock
from models.blocks.initial_values import draw_defaults, draw_xavier
from models.blocks.maps import require_image_size, resize_map
from models.blocks.on_backbone import OnBackbone
from models.blocks.packing import MapShape, map_shapes, pack, unpack
from models.blocks.patches import unpatchify
from models.blocks.transformer import sincos_positions
from models.detector import AnomalyOutput, GradientStage, Recipe, Stage

_COUPLING_SHARE = 0.1  # of the subnet's answer; FrEIA's, keeps an untrained step near the identity
_SLOPE = 0.1  # of the leaky rectifier in a subnet
_CLAMP = 2.0  # largest log-scale of a step

_PAPER_RECIPE = Recipe(
    optimiser="adamw",
    learning_rate=1e-4,
    final_learning_rate=1e-4,
    weight_decay=0.01,
    batch_size=8,
    betas=(0.9, 0.95),
    epochs=200,
)
_PAPER_FLOW_RECIPE = Recipe(
    optimiser="adam",
    learning_rate=1e-3,
    final_learning_rate=1e-3,
    weight_decay=1e-5,
    batch_size=16,
    epochs=15,
)


@dataclass(frozen=True)
class DadfConfig:
    """Defaults are those of the reference code, whose entry script trains this network.

    Attributes:
        backbone: timm's name; WideResNet-50-2 with torchvision's first weights.
        layers: indices of the tapped stages, ascending; strides 4, 8 and 16.
        image_size: `(height, width)`, multiples of the largest stride.
        scale_channels: e, channels of a token that one scale gives (480); a token has D = layers x e.
        blocks: depth of the transformer (8).
        heads: attention heads (8).
        mlp_ratio: width of each hidden layer over D (4).
        flow_steps: steps of each flow (8), with 3 x 3 and 1 x 1 subnets in turn.
        map_mode: 1 - the likelihood's exponential (paper), or the energy itself, which strong defects don't saturate.
        seed: seeds the initial values and the permutations.
        recipe: the descent of the transformer.
        flow_recipe: the descent of the flows.
    """

    score_reduction: ClassVar[Literal["maximum"]] = "maximum"

    backbone: str = "wide_resnet50_2.tv_in1k"
    layers: tuple[int, ...] = (1, 2, 3)
    image_size: tuple[int, int] = (256, 256)
    scale_channels: int = 480
    blocks: int = 8
    heads: int = 8
    mlp_ratio: int = 4
    flow_steps: int = 8
    map_mode: Literal["exp", "energy"] = "exp"
    seed: int = 1
    recipe: Recipe = _PAPER_RECIPE
    flow_recipe: Recipe = _PAPER_FLOW_RECIPE


class _DualTransformer(nn.Module):
    """Rebuild the maps of a pyramid `(B, C, h, w)` twice: from themselves and from learnt memory."""

    positions: Tensor

    def __init__(self, shapes: Sequence[MapShape], config: DadfConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.grid = (shapes[-1][1], shapes[-1][2])
        self.patches = [shape[1] // self.grid[0] for shape in shapes]
        channels = len(shapes) * config.scale_channels
        self.embeddings = nn.ModuleList(
            nn.Conv2d(shape[0], config.scale_channels, patch, stride=patch)
            for shape, patch in zip(shapes, self.patches, strict=True)
        )
        self.memory = nn.Parameter(torch.empty(1, math.prod(self.grid), channels))
        self.register_buffer("positions", sincos_positions(self.grid, channels), persistent=False)
        self.blocks = nn.ModuleList(DualBlock(channels, config.heads, config.mlp_ratio) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(channels)
        self.predictions = nn.ModuleList(
            nn.Linear(channels, patch * patch * shape[0]) for shape, patch in zip(shapes, self.patches, strict=True)
        )
        self._initialise(generator)

    def _initialise(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.memory, std=0.02, generator=generator)
        draw_xavier(self, generator)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return S and R, shaped as the features are."""
        embedded = [embed(one) for embed, one in zip(self.embeddings, features, strict=True)]
        x = torch.cat(embedded, dim=1).flatten(2).transpose(1, 2) + self.positions  # (B, N, D)
        m = (self.memory + self.positions).expand(x.shape[0], -1, -1)
        for block in self.blocks:
            x, m = block(x, m)
        return self._predict(x), self._predict(m)

    def _predict(self, tokens: Tensor) -> list[Tensor]:
        tokens = self.norm(tokens)
        return [
            unpatchify(predict(tokens), self.grid, patch)
            for predict, patch in zip(self.predictions, self.patches, strict=True)
        ]


class _DepthwiseConv(nn.Conv2d):
    """A convolution of each channel with itself, the size kept.

    With 1 x 1 kernels it is written as the product that it is: on one thread PyTorch would run hundreds of convolutions
    of one channel each, a hundred times as slow.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1) and self.bias is not None:
            return torch.addcmul(self.bias[:, None, None], x, self.weight.reshape(-1, 1, 1))
        return super().forward(x)


class _FlowStep(nn.Module):
    """One affine coupling, one gain and offset a channel, one fixed permutation: u `(B, C, h, w)` to the same shape."""

    permutation: Tensor

    def __init__(self, channels: int, kernel_size: int, generator: torch.Generator) -> None:
        super().__init__()
        changed = channels // 2
        kept = channels - changed
        self.sizes = [kept, changed]
        self.subnet = nn.Sequential(
            _DepthwiseConv(kept, kernel_size),
            nn.LeakyReLU(_SLOPE),
            nn.Conv2d(kept, 2 * changed, 1),
        )
        draw_defaults(self.subnet, generator)
        self.gain_logits = nn.Parameter(torch.full((channels,), 2 * math.log(math.expm1(5))))  # gains of 1
        self.offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("permutation", torch.randperm(channels, generator=generator))

    def gain(self) -> Tensor:
        """Return gamma, `(C,)`: 0.1 softplus of sharpness 0.5, written with the plain one, which exports as it is."""
        return 0.2 * functional.softplus(0.5 * self.gain_logits)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step's output and the logarithm of its volume change, `(B,)`."""
        kept, changed = torch.split(u, self.sizes, dim=1)
        answer = _COUPLING_SHARE * self.subnet(kept)
        log_scale, shift = answer.chunk(2, dim=1)
        log_scale = _CLAMP * torch.tanh(log_scale)
        v = torch.cat((kept, changed * log_scale.exp() + shift), dim=1)
        gain = self.gain()
        out = (gain[:, None, None] * v + self.offset[:, None, None]).index_select(1, self.permutation)
        return out, log_scale.sum(dim=(1, 2, 3)) + u.shape[2] * u.shape[3] * gain.log().sum()


class _Flow(nn.Module):
    """The flow of one scale, behind a norm over the whole map that its likelihood does not count."""

    def __init__(self, shape: MapShape, steps: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape)
        self.steps = nn.ModuleList(_FlowStep(shape[0], 1 if index % 2 else 3, generator) for index in range(steps))

    def forward(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Return z, shaped as J, and the logarithm of the volume change `(B,)`."""
        z = self.norm(joint)
        volume = torch.zeros((), device=joint.device)
        for step in self.steps:
            z, change = step(z)
            volume = volume + change
        return z, volume


class Dadf(OnBackbone):
    """Dual-attention transformer and one discriminative flow a scale, over a frozen CNN pyramid.

    Raises:
        ValueError: if the configuration contradicts itself or the backbone.
    """

    def __init__(self, config: DadfConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.backbone = CnnBackbone(config.backbone, config.layers)
        _refuse_misfits(config, self.backbone.strides)
        self.shapes = map_shapes(self.backbone.channels, self.backbone.strides, config.image_size)
        self.joint_shapes: list[MapShape] = [(3 * channels, h, w) for channels, h, w in self.shapes]
        generator = torch.Generator().manual_seed(config.seed)
        self.transformer = _DualTransformer(self.shapes, config, generator)
        self.flows = nn.ModuleList(_Flow(shape, config.flow_steps, generator) for shape in self.joint_shapes)

    def stages(self) -> Sequence[Stage]:
        """Return two descents: the transformer's, and then the flows' on what it rebuilds."""
        return [
            GradientStage(
                name="reconstruction",
                loss=self.reconstruction_loss,
                parameters=list(self.transformer.parameters()),
                recipe=self.config.recipe,
                encode=self.encode_features,
            ),
            GradientStage(
                name="flow",
                loss=self.flow_loss,
                parameters=list(self.flows.parameters()),
                recipe=self.config.flow_recipe,
                encode=self.encode_joint,
            ),
        ]

    @torch.no_grad()
    def encode_features(self, images: Tensor) -> Tensor:
        """Return F of images `(B, 3, H, W)`, all scales in one row: `(B, sum of C h w)`.

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights.
        """
        return pack(self._see(images))

    @torch.no_grad()
    def encode_joint(self, images: Tensor) -> Tensor:
        """Return J of images `(B, 3, H, W)`, all scales in one row: `(B, sum of 3 C h w)`.

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights.
        """
        return pack(self._join(self._see(images)))

    def reconstruction_loss(self, encoded: Tensor, step: int) -> dict[str, Tensor]:  # noqa: ARG002  (nothing is drawn)
        """Return the squared errors of both streams, each summed over scales, of encoded good frames."""
        features = unpack(encoded, self.shapes)
        rebuilt, remembered = self.transformer(features)
        return {"self": _squared_errors(rebuilt, features), "memory": _squared_errors(remembered, features)}

    def flow_loss(self, encoded: Tensor, step: int) -> dict[str, Tensor]:  # noqa: ARG002  (nothing is drawn)
        """Return the negative log-likelihood of each scale, less its constant, averaged over encoded good frames."""
        terms = {}
        joint = unpack(encoded, self.joint_shapes)
        for flow, one, stride in zip(self.flows, joint, self.backbone.strides, strict=True):
            z, volume = flow(one)
            terms[f"stride {stride}"] = (0.5 * z.square().sum(dim=(1, 2, 3)) - volume).mean()
        return terms

    def forward(self, images: Tensor) -> AnomalyOutput:
        """Judge images `(B, 3, H, W)` float32 in [0, 1].

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights.
        """
        maps = []
        for flow, joint in zip(self.flows, self._join(self._see(images)), strict=True):
            z, _ = flow(joint)
            energy = 0.5 * z.square().mean(dim=1)  # (B, h, w)
            unlikely = energy if self.config.map_mode == "energy" else 1 - (-energy).exp()
            maps.append(resize_map(unlikely, self.image_size))
        anomaly_map = torch.stack(maps).mean(dim=0)
        return AnomalyOutput(anomaly_map, anomaly_map.amax(dim=(1, 2)))

    def _see(self, images: Tensor) -> list[Tensor]:
        """Return F, one map `(B, C, h, w)` a scale."""
        require_image_size(images, self.image_size)
        with torch.no_grad():
            features: list[Tensor] = self.backbone(images)
        return features

    def _join(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return J, one map `(B, 3C, h, w)` a scale: features, rebuilt and remembered."""
        streams = (features, *self.transformer(features))
        return [torch.cat(scale, dim=1) for scale in zip(*streams, strict=True)]


def _refuse_misfits(config: DadfConfig, strides: Sequence[int]) -> None:
    coarsest = strides[-1]
    if any(side % coarsest for side in config.image_size):
        raise ValueError(f"image size {config.image_size} is not a multiple of the stride {coarsest}")
    if any(coarsest % stride for stride in strides):
        raise ValueError(f"the strides {tuple(strides)} do not divide each other")
    channels = len(strides) * config.scale_channels
    if channels % config.heads or channels % 4:
        raise ValueError(f"{channels} channels of a token must be a multiple of 4 and of {config.heads} heads")


def _squared_errors(maps: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Return the mean squared error of each scale, summed over scales."""
    return torch.stack([functional.mse_loss(*pair) for pair in zip(maps, targets, strict=True)]).sum()
