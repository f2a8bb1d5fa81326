"""RB-AE: repaint a texture out of one fixed good frame, and see where the picture and its repainting part.

An encoder makes features of a frame at three scales; attention then replaces every one of them by a mixture of the
features of a reference frame, so a defect reaches the decoder neither through the bottleneck nor through a skip
connection, and the decoder paints a good surface. Planted defects teach the encoder to keep good pixels where they are
and to push foreign ones away. The cosine distance between the encoder's features of the frame and of its repainting,
over all scales, is the anomaly map.

Paper: Luo, Yao, Yu, "Reference-Based AutoEncoder for Surface Defect Detection" (RB-AE), arXiv:2211.10060v1; as "Normal
Reference Attention and Defective Feature Perception Network for Surface Defect Detection" (NDP-Net, the second version)
in IEEE Transactions on Instrumentation and Measurement 2023.
Reference code: none was published. Only what the two abstracts say is certain: the autoencoder, attention to one fixed
reference frame, a loss of pixels on artificial defects, the comparison at several scales, and (second version) two
stages of training. Layers, loss formulas and schedule are a reconstruction after the same authors' other codes.

Chosen where the abstracts are silent, or changed, each with its reason:
* the reference is the good frame nearest to the mean 8 x 8 thumbnail, unless one is named by its number: the choice
  needs no other network, and a plant can repeat it; a run's report says which file it is, the graph has the pixels;
* nobody warns where held-out good frames are painted badly, as where the reference shows less than a period of its
  texture: what that means for verdicts stands in the thresholds, which rest on these very frames;
* the reference frame itself is part of the exported graph; runtimes compute its keys and values once, when they load;
* sources of artificial defects are drawn textures and good frames of the batch, changed and shuffled: ImageNet can't be
  shipped. A folder of one's own pictures is no choice: a run would then hang on files that no bundle has;
* queries and keys have length one and a learnt sharpness, which starts at 10: products of plain convolutions start
  nearly equal, every place then reads the same, and the batch norm behind blows the rest up in ways that differ from
  batch to single frame;
* attention has one head and reads the reference alone. Left out: joint self-attention over the tokens of frame and
  reference, of which TFA-Net, by the same authors, decodes the reference's. There a frame's own tokens are values too,
  so a defect could reach the decoder, the reference's keys would no longer be constants, and the finest scale would
  cost four times as much;
* the map is the mean cosine distance of the scales, without learnt parameters; a learnt head is an option. Left out: a
  share of the difference of edges between frame and repainting, whose weight would be 0 until something asks for it;
* the encoder is learnt from scratch; a pretrained one, of which the abstracts say nothing, would be frozen to what the
  loss of pixels has to move;
* the rate of the second descent falls along a cosine instead of in one step, as in all recipes of this project;
* the last iteration is kept, not the epoch that is best on the test frames: a plant has no test frames;
* all sizes are free, so that one CPU core can train and serve a small network.

Symbols: x, x_a = frame, the same with planted defects (B, 3, H, W) · m = `masks` (B, H, W) · F, F^r = `features` of
frame and reference (B, C, h, w), one entry a scale · K, V = `keys` (M, d), `values` (M, C) of the reference's M
positions · R = `repaired`, shaped as F · x^ = `painted` (B, 3, H, W) · mu_1, mu_2 = `discrimination_weight`,
`repair_weight` · lambda_1, lambda_2 = `structure_weight`, `edge_weight` · delta = `margin`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks.draws import generator_of_step
from models.blocks.initial_values import draw_defaults
from models.blocks.maps import map_deviation, require_image_size, resize_map
from models.blocks.smoothing import gaussian_matrix
from models.blocks.synthetic_defects import draw_perlin_mask, plant_foreign_pictures
from models.detector import AnomalyOutput, GradientStage, PassStage, Recipe, Stage

_SHARPNESS = 10.0  # of attention before training
_SLOPE = 0.2  # of the leaky rectifiers
_COARSEST_STRIDE = 16
_SMALLEST_SIDE = 48  # below it the coarsest edge map would be empty
_THUMBNAIL = 8
_HEAD_CHANNELS = 32  # of each scale; the head then halves their number a scale more
_SSIM_KERNEL, _SSIM_SIGMA = 11, 1.5
_SSIM_GUARDS = (0.01**2, 0.03**2)
_EDGE_SCALES = 4
_EDGE_GUARD = 0.0026
_TINY = 1e-6

_PAPER_RECIPE = Recipe(
    optimiser="adam",
    learning_rate=1e-4,
    final_learning_rate=1e-4,
    weight_decay=1e-5,
    batch_size=8,
    epochs=100,
)
_PAPER_DEFECT_RECIPE = Recipe(
    optimiser="adam",
    learning_rate=1e-4,
    final_learning_rate=1e-5,
    weight_decay=1e-5,
    batch_size=8,
    epochs=300,
)
_PAPER_HEAD_RECIPE = Recipe(
    optimiser="adam",
    learning_rate=1e-4,
    final_learning_rate=1e-5,
    weight_decay=1e-5,
    batch_size=8,
    epochs=100,
)


@dataclass(frozen=True)
class RbAeConfig:
    """Defaults are those of the reconstruction; the paper's own were not readable.

    Attributes:
        image_size: `(height, width)`, multiples of 16 from 48 on.
        channels: C of the stem and of the three scales, whose strides are 2, 4, 8 and 16.
        reference_frame: which of the frames that are fitted on is the reference, counted from 0 in recording order;
            the report of a run names the file; None for the one that is most like all others.
        pooled_reference: side of the squares of reference positions that the finest scale averages into one key; 2
            makes a quarter of the work, 1 for none.
        structure_weight: lambda_1, weight of 1 - SSIM next to a squared error of weight 1.
        edge_weight: lambda_2, weight of the difference of edges.
        discrimination_weight: mu_1, weight of the loss of pixels.
        repair_weight: mu_2, weight of the distance between repaired features of a frame with and without a defect.
        margin: delta, cosine up to which a defective pixel's feature is far enough from the good one.
        flips: show frames mirrored at random; for textures without a direction only.
        defect_area: smallest and largest share of a frame that an artificial defect covers.
        defect_opacity: range of the share that a foreign picture has in its area; 1 covers the frame.
        map_source: what the map shows: distances of features, or what a head learnt to make of their differences.
        blur_sigma: standard deviation of the map's Gaussian in pixels; 0 for none. A head's map is not blurred.
        score_reduction: maximum of the map, or its standard deviation, which the same authors' TFA-Net takes.
        seed: seeds the initial values, and with the step all artificial defects and flips.
        recipe: the descent on good frames.
        defect_recipe: the descent that adds artificial defects.
        head_recipe: the descent of the head, if there is one.
    """

    image_size: tuple[int, int] = (256, 256)
    channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    reference_frame: int | None = None
    pooled_reference: int = 1
    structure_weight: float = 1.0
    edge_weight: float = 1.0
    discrimination_weight: float = 1.0
    repair_weight: float = 0.1
    margin: float = 0.0
    flips: bool = False
    defect_area: tuple[float, float] = (0.001, 0.4)
    defect_opacity: tuple[float, float] = (1.0, 1.0)
    map_source: Literal["features", "head"] = "features"
    blur_sigma: float = 4.0
    score_reduction: Literal["maximum", "deviation"] = "maximum"
    seed: int = 1
    recipe: Recipe = _PAPER_RECIPE
    defect_recipe: Recipe = _PAPER_DEFECT_RECIPE
    head_recipe: Recipe = _PAPER_HEAD_RECIPE


class _ConvBlock(nn.Sequential):
    """A 3 x 3 convolution, batch norm and leaky rectifier."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.LeakyReLU(_SLOPE),
        )


class _Encoder(nn.Module):
    """Frames `(B, 3, H, W)` to features of strides 4, 8 and 16; the stem of stride 2 is shown to nobody."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(_ConvBlock(before, after, stride=2), _ConvBlock(after, after))
            for before, after in pairwise((3, *channels))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        x: Tensor = self.stages[0](images)
        features = []
        for stage in self.stages[1:]:
            x = stage(x)
            features.append(x)
        return features


class _ReferenceAttention(nn.Module):
    """R of one scale: each position reads from the reference alone; nothing of F is added to the answer."""

    def __init__(self, channels: int, pool: int = 1) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 2, 1)
        self.key = nn.Conv2d(channels, channels // 2, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.pool = nn.AvgPool2d(pool) if pool > 1 else nn.Identity()
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(_SHARPNESS)))
        self.out = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def read(self, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Return K `(M, d)` and V `(M, C)` of the reference's features `(1, C, h, w)`."""
        keys, values = (self.pool(one(reference))[0].flatten(1).T for one in (self.key, self.value))
        return functional.normalize(keys, dim=1, eps=_TINY), values

    def mix(self, features: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return for each position of F `(B, C, h, w)` a convex combination of V, `(B, C, h, w)`."""
        queries = self.query(features).flatten(2).transpose(1, 2)  # (B, N, d)
        queries = functional.normalize(queries, dim=2, eps=_TINY) * self.log_sharpness.exp()
        weights = (queries @ keys.T).softmax(dim=2)  # (B, N, M)
        mixed: Tensor = (weights @ values).transpose(1, 2).reshape(features.shape)
        return mixed

    def forward(self, features: Tensor, reference: Tensor) -> Tensor:
        repaired: Tensor = self.out(self.mix(features, *self.read(reference)))
        return repaired


class _Decoder(nn.Module):
    """Repaired features of three scales to frames `(B, 3, H, W)` in [0, 1]."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        stem, fine, middle, coarse = channels
        self.narrow = nn.ModuleList(
            _ConvBlock(*pair) for pair in ((coarse, middle), (middle, fine), (fine, stem), (stem, stem // 2))
        )
        self.merge = nn.ModuleList(
            nn.Sequential(_ConvBlock(2 * width, width), _ConvBlock(width, width)) for width in (middle, fine)
        )
        self.smooth = _ConvBlock(stem, stem)
        self.paint = nn.Conv2d(stem // 2, 3, 3, padding=1)

    def forward(self, repaired: Sequence[Tensor]) -> Tensor:
        fine, middle, x = repaired
        for narrow, merge, skipped in zip(self.narrow[:2], self.merge, (middle, fine), strict=True):
            x = merge(torch.cat((narrow(_double(x)), skipped), dim=1))
        x = self.smooth(self.narrow[2](_double(x)))
        painted: Tensor = self.paint(self.narrow[3](_double(x))).sigmoid()
        return painted


class _Head(nn.Module):
    """Absolute differences of three scales to logits `(B, h, w)` on the finest grid."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Conv2d(width, _HEAD_CHANNELS, 1) for width in channels)
        hidden = len(channels) * _HEAD_CHANNELS
        self.fuse = nn.Sequential(_ConvBlock(hidden, 2 * hidden // 3), nn.Conv2d(2 * hidden // 3, 1, 1))

    def forward(self, differences: Sequence[Tensor]) -> Tensor:
        grid = differences[0].shape[2:]
        embedded = [
            functional.interpolate(embedding(one), size=grid, mode="bilinear", align_corners=False)
            for embedding, one in zip(self.embeddings, differences, strict=True)
        ]
        logits: Tensor = self.fuse(torch.cat(embedded, dim=1))[:, 0]
        return logits


class RbAe(nn.Module):
    """Encoder, attention to the reference, and decoder; learnt from nothing but good frames.

    Raises:
        ValueError: if the configuration contradicts itself.
    """

    reference: Tensor
    thumbnail: Tensor
    has_reference: Tensor
    reference_index: Tensor
    blur_rows: Tensor
    blur_columns: Tensor

    def __init__(self, config: RbAeConfig) -> None:
        super().__init__()
        _refuse_misfits(config)
        self.config = config
        self.image_size = config.image_size
        scales = config.channels[1:]
        self.encoder = _Encoder(config.channels)
        self.attentions = nn.ModuleList(
            _ReferenceAttention(width, pool)
            for width, pool in zip(scales, (config.pooled_reference, 1, 1), strict=True)
        )
        self.decoder = _Decoder(config.channels)
        self.head = _Head(scales) if config.map_source == "head" else None
        draw_defaults(self, torch.Generator().manual_seed(config.seed))

        self.register_buffer("reference", torch.zeros((3, *config.image_size), dtype=torch.uint8))
        self.register_buffer("thumbnail", torch.zeros(3, _THUMBNAIL, _THUMBNAIL))
        self.register_buffer("has_reference", torch.zeros((), dtype=torch.bool))
        self.register_buffer("reference_index", torch.full((), -1, dtype=torch.int64))
        height, width = config.image_size
        for name, side in (("blur_rows", height), ("blur_columns", width)):
            matrix = gaussian_matrix(side, config.blur_sigma).to(torch.float32)
            self.register_buffer(name, matrix, persistent=False)
        # An exported graph can't branch on a tensor, so a plain copy of `has_reference` is kept beside it.
        self._may_run = False
        self.register_load_state_dict_post_hook(RbAe._copy_flag)  # type: ignore[no-untyped-call]  # torch's
        self._sum: Tensor | None = None
        self._count = 0
        self._nearest = torch.inf
        self.train()

    def _copy_flag(self, _: object) -> None:
        self._may_run = bool(self.has_reference)

    def train(self, mode: bool = True) -> "RbAe":
        """Switch the mode, but for batch norms: only a loss uses the statistics of its batch."""
        super().train(mode)
        for part in self.children():
            part.eval()
        return self

    def stages(self) -> Sequence[Stage]:
        """Return two looks for the reference frame, the descent on good frames, and that with artificial defects."""
        branch = [parameter for part in self._branch for parameter in part.parameters()]
        stages: list[Stage] = [
            PassStage("mean frame", self.observe_mean, self.finish_mean),
            PassStage("reference frame", self.observe_reference, self.finish_reference),
            GradientStage("reconstruction", self.reconstruction_loss, branch, self.config.recipe),
            GradientStage("artificial defects", self.defect_loss, branch, self.config.defect_recipe),
        ]
        if self.head is not None:
            head = list(self.head.parameters())
            stages.append(GradientStage("segmentation head", self.head_loss, head, self.config.head_recipe))
        return stages

    @property
    def _branch(self) -> list[nn.Module]:
        return [self.encoder, self.attentions, self.decoder]

    @torch.no_grad()
    def observe_mean(self, images: Tensor) -> None:
        """Add the thumbnails of good images `(B, 3, H, W)`."""
        require_image_size(images, self.image_size)
        total = _thumbnails(images).double().sum(dim=0)
        self._sum = total if self._sum is None else self._sum + total
        self._count += images.shape[0]

    def finish_mean(self) -> None:
        """Keep the mean thumbnail.

        Raises:
            RuntimeError: if no frames were observed.
        """
        if self._sum is None:
            raise RuntimeError("no frames were observed")
        self.thumbnail.copy_(self._sum / self._count)
        self._sum, self._count = None, 0

    @torch.no_grad()
    def observe_reference(self, images: Tensor) -> None:
        """Keep the frame that is named, or the first of those nearest to the mean, of good images `(B, 3, H, W)`."""
        require_image_size(images, self.image_size)
        wanted = self.config.reference_frame
        distances = (_thumbnails(images) - self.thumbnail).square().flatten(1).sum(dim=1)
        for image, distance in zip(images, distances.tolist(), strict=True):
            if self._count == wanted or (wanted is None and distance < self._nearest):
                self._nearest = distance
                self.reference.copy_((image * 255).round())
                self.reference_index.fill_(self._count)
            self._count += 1

    def finish_reference(self) -> None:
        """Settle on the frame that was kept.

        Raises:
            RuntimeError: if no frames were observed.
            ValueError: if there are fewer frames than the one that is named needs.
        """
        if self._count == 0:
            raise RuntimeError("no frames were observed")
        count, wanted = self._count, self.config.reference_frame
        self._count, self._nearest = 0, torch.inf
        if wanted is not None and wanted >= count:
            raise ValueError(f"reference_frame is {wanted}, but only {count} frames are fitted on, counted from 0")
        self.has_reference.fill_(True)
        self._may_run = True

    def reconstruction_loss(self, images: Tensor, step: int) -> dict[str, Tensor]:
        """Return the terms of L_rec for good images `(B, 3, H, W)`."""
        images = self._flip(images, generator_of_step(self.config.seed, step))
        with _batch_statistics(self._branch):
            _, repaired = self._repair_batch(images)
            painted = self.decoder(repaired)
        return self._painting_terms(painted, images)

    def defect_loss(self, images: Tensor, step: int) -> dict[str, Tensor]:
        """Return L_rec of good images `(B, 3, H, W)` with and without planted defects, L_disc and L_rep, weighted."""
        generator = generator_of_step(self.config.seed, step)
        images = self._flip(images, generator)
        planted, masks = self._plant(images, generator)
        both = torch.cat((planted, images))
        with _batch_statistics(self._branch):
            features, repaired = self._repair_batch(both)
            painted = self.decoder(repaired)
        # Twice the mean over both halves is the sum of their two losses.
        terms = {name: 2 * value for name, value in self._painting_terms(painted, torch.cat((images, images))).items()}
        apart, alike = [], []
        for seen, read in zip(features, repaired, strict=True):
            (bad, good), (bad_read, good_read) = seen.chunk(2), read.chunk(2)
            apart.append(discrimination_loss(bad, good, masks, self.config.margin))
            alike.append((1 - _cosine(bad_read, good_read.detach())).mean())
        terms["discrimination"] = self.config.discrimination_weight * torch.stack(apart).sum()
        terms["repair"] = self.config.repair_weight * torch.stack(alike).sum()
        return terms

    def head_loss(self, images: Tensor, step: int) -> dict[str, Tensor]:
        """Return focal and Dice loss of the head on good images `(B, 3, H, W)` in which defects were planted."""
        head = self._require_head()
        generator = generator_of_step(self.config.seed, step)
        planted, masks = self._plant(self._flip(images, generator), generator)
        with torch.no_grad():
            before, after = self._see_twice(planted)
        with _batch_statistics([head]):
            logits = resize_map(head(_differences(before, after)), self.image_size)
        return {"focal": focal_loss(logits, masks), "dice": dice_loss(logits.sigmoid(), masks)}

    def forward(self, images: Tensor) -> AnomalyOutput:
        """Judge images `(B, 3, H, W)` float32 in [0, 1].

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if there is no reference frame yet.
        """
        before, after = self._see_twice(images)
        if self.head is not None:
            anomaly_map = resize_map(self.head(_differences(before, after)), self.image_size).sigmoid()
        else:
            distances = [1 - _cosine(one, other) for one, other in zip(before, after, strict=True)]
            mean = torch.stack([resize_map(one, self.image_size) for one in distances]).mean(dim=0)
            anomaly_map = self.blur_rows @ mean @ self.blur_columns.T
        if self.config.score_reduction == "deviation":
            return AnomalyOutput(anomaly_map, map_deviation(anomaly_map))
        return AnomalyOutput(anomaly_map, anomaly_map.amax(dim=(1, 2)))

    def paint(self, images: Tensor) -> Tensor:
        """Return x^, what the decoder makes of images `(B, 3, H, W)` by the reference's means, in the same shape.

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if there is no reference frame yet.
        """
        return self._paint(self._see(images))

    def _see(self, images: Tensor) -> list[Tensor]:
        """Return F of images `(B, 3, H, W)`."""
        require_image_size(images, self.image_size)
        features: list[Tensor] = self.encoder(images)
        return features

    def _see_twice(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return F of images `(B, 3, H, W)` and of what is painted after them."""
        before = self._see(images)
        return before, self.encoder(self._paint(before))

    def _paint(self, features: Sequence[Tensor]) -> Tensor:
        """Return x^ for F, with the reference in a pass of its own, which a runtime computes once."""
        painted: Tensor = self.decoder(self._repair(features, self.encoder(self._reference_image())))
        return painted

    def _repair_batch(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return F and R of images `(B, 3, H, W)`; batch norms see the reference as one more of them."""
        require_image_size(images, self.image_size)
        together: list[Tensor] = self.encoder(torch.cat((images, self._reference_image())))
        features, reference = [one[:-1] for one in together], [one[-1:] for one in together]
        return features, self._repair(features, reference)

    def _repair(self, features: Sequence[Tensor], reference: Sequence[Tensor]) -> list[Tensor]:
        """Return R for F and F^r."""
        return [
            attention(one, other) for attention, one, other in zip(self.attentions, features, reference, strict=True)
        ]

    def _reference_image(self) -> Tensor:
        """Return the reference frame, `(1, 3, H, W)` float32 in [0, 1]."""
        if not self._may_run:
            raise RuntimeError("there is no reference frame yet; run the pass stages over the good frames first")
        return self.reference[None].to(torch.float32) / 255

    def _flip(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if not self.config.flips:
            return images
        for axis in (2, 3):
            chosen = torch.rand(images.shape[0], 1, 1, 1, generator=generator).to(images.device) < 0.5
            images = torch.where(chosen, images.flip(axis), images)
        return images

    def _plant(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        area, opacity = self.config.defect_area, self.config.defect_opacity
        return plant_foreign_pictures(images, generator, area=area, opacity=opacity)

    def _painting_terms(self, painted: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of L_rec(x^, x)."""
        return {
            "colour": functional.mse_loss(painted, images),
            "structure": self.config.structure_weight * (1 - structural_similarity(painted, images)),
            "edges": self.config.edge_weight * edge_difference(painted, images),
        }

    def _require_head(self) -> _Head:
        if self.head is None:
            raise RuntimeError("this detector has no head to train")
        return self.head


def discrimination_loss(features: Tensor, good: Tensor, masks: Tensor, margin: float) -> Tensor:
    """Return L_disc of one scale: good pixels stay where they are without a defect, defective ones leave.

    Args:
        features: `(B, C, h, w)`, of frames with defects.
        good: `(B, C, h, w)`, of the same frames without; no gradient flows to them.
        masks: `(B, H, W)` of 0 and 1, H and W multiples of h and w; a position that touches a defect is defective.
        margin: cosine that costs a defective position nothing.

    Returns:
        `()`, the mean of 1 - cosine over good positions plus that of cosine above the margin over defective ones; what
        has no position counts 0.
    """
    stride = masks.shape[1] // features.shape[2]
    bad = functional.max_pool2d(masks[:, None], stride)[:, 0]
    cosine = _cosine(features, good.detach())
    stay = ((1 - bad) * (1 - cosine)).sum() / (1 - bad).sum().clamp_min(1)
    leave = (bad * (cosine - margin).clamp_min(0)).sum() / bad.sum().clamp_min(1)
    return stay + leave


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean SSIM of images `(B, C, H, W)` in [0, 1], colours apart: `()`, 1 where they are equal.

    Gaussian window of 11 pixels and deviation 1.5, without a border (Wang et al. 2004, doi:10.1109/TIP.2003.819861).
    """
    offsets = torch.arange(_SSIM_KERNEL, device=first.device) - _SSIM_KERNEL // 2
    window = torch.exp(-offsets.square() / (2 * _SSIM_SIGMA**2))
    window = window / window.sum()
    channels = first.shape[1]

    def mean_of(maps: Tensor) -> Tensor:
        rows = functional.conv2d(maps, window.expand(channels, 1, -1)[..., None], groups=channels)
        return functional.conv2d(rows, window.expand(channels, 1, 1, -1), groups=channels)

    mean, other_mean = mean_of(first), mean_of(second)
    product = mean * other_mean
    variances = mean_of(first.square() + second.square()) - mean.square() - other_mean.square()
    covariance = mean_of(first * second) - product
    guard, other_guard = _SSIM_GUARDS
    similarity = (2 * product + guard) * (2 * covariance + other_guard)
    return (similarity / ((mean.square() + other_mean.square() + guard) * (variances + other_guard))).mean()


def edge_difference(first: Tensor, second: Tensor) -> Tensor:
    """Return one minus the similarity of gradient magnitudes (MSGMS) of images `(B, 3, H, W)`, averaged over scales.

    Grey images are smoothed by a 3 x 3 median, differentiated after Prewitt, and halved from scale to scale (Zavrtanik,
    Kristan, Skocaj, RIAD, 2021, doi:10.1016/j.patcog.2020.107706), here without borders.
    """
    first, second = first.mean(dim=1), second.mean(dim=1)
    differences = []
    for scale in range(_EDGE_SCALES):
        if scale:
            first, second = (functional.avg_pool2d(one[:, None], 2)[:, 0] for one in (first, second))
        a, b = _edges(_median(first)), _edges(_median(second))
        similarity = (2 * a * b + _EDGE_GUARD) / (a.square() + b.square() + _EDGE_GUARD)
        differences.append((1 - similarity).mean())
    return torch.stack(differences).mean()


def focal_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the mean of (1 - p)^2 times -log p, p being the share given to what is right; both `(B, H, W)`."""
    cross = functional.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    return ((1 - (-cross).exp()).square() * cross).mean()


def dice_loss(predicted: Tensor, masks: Tensor) -> Tensor:
    """Return 1 - Dice of a whole batch of maps in [0, 1] and masks, both `(B, H, W)`; masks may be empty."""
    return 1 - (2 * (predicted * masks).sum() + 1) / (predicted.sum() + masks.sum() + 1)


def _refuse_misfits(config: RbAeConfig) -> None:
    if any(side % _COARSEST_STRIDE or side < _SMALLEST_SIDE for side in config.image_size):
        raise ValueError(
            f"image size {config.image_size} must be multiples of {_COARSEST_STRIDE} and at least {_SMALLEST_SIDE}"
        )
    if any(width % 2 or width < 2 for width in config.channels):
        raise ValueError(f"channels must be even and at least 2, not {config.channels}")
    if config.reference_frame is not None and config.reference_frame < 0:
        raise ValueError(f"reference_frame counts from 0, it is {config.reference_frame}")
    pool = config.pooled_reference
    if pool < 1 or any((side // 4) % pool for side in config.image_size):
        raise ValueError(f"squares of {pool} (pooled_reference) do not fill the finest grid of the reference")
    smallest, largest = config.defect_area
    if not 0 <= smallest < largest <= 1:
        raise ValueError(f"defect_area must be two rising shares from 0 to 1, not {config.defect_area}")
    faintest, strongest = config.defect_opacity
    if not (0 <= faintest <= strongest <= 1 and strongest > 0):
        raise ValueError(f"defect_opacity must be two shares up to 1, the last above 0, not {config.defect_opacity}")
    try:
        draw_perlin_mask(config.image_size, torch.Generator().manual_seed(0), area=config.defect_area)
    except ValueError as error:
        raise ValueError(f"no artificial defect has a defect_area of {smallest:g} to {largest:g}; widen it") from error


def _thumbnails(images: Tensor) -> Tensor:
    return functional.adaptive_avg_pool2d(images, _THUMBNAIL)


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine over channels of maps `(B, C, h, w)`: `(B, h, w)`."""
    return functional.cosine_similarity(first, second, dim=1, eps=_TINY)


def _differences(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    return [(one - other).abs() for one, other in zip(before, after, strict=True)]


def _median(grey: Tensor) -> Tensor:
    """Return the 3 x 3 median of `(B, H, W)`, without a border: `(B, H - 2, W - 2)`.

    Sort each column of three; the median of nine is that of the largest low, the middle middle and the least high one.
    """
    above, here, below = grey[:, :-2], grey[:, 1:-1], grey[:, 2:]
    low = above.minimum(here).minimum(below)
    middle = _middle(above, here, below)
    high = above.maximum(here).maximum(below)
    low = low[..., :-2].maximum(low[..., 1:-1]).maximum(low[..., 2:])
    middle = _middle(middle[..., :-2], middle[..., 1:-1], middle[..., 2:])
    high = high[..., :-2].minimum(high[..., 1:-1]).minimum(high[..., 2:])
    return _middle(low, middle, high)


def _middle(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a.minimum(b).maximum(a.maximum(b).minimum(c))


def _edges(grey: Tensor) -> Tensor:
    """Return the length of the Prewitt gradient of `(B, H, W)`, without a border: `(B, H - 2, W - 2)`."""
    down = (grey[:, 2:] - grey[:, :-2]) / 3
    right = (grey[..., 2:] - grey[..., :-2]) / 3
    down = down[..., :-2] + down[..., 1:-1] + down[..., 2:]
    right = right[:, :-2] + right[:, 1:-1] + right[:, 2:]
    # The root of zero has no gradient.
    return (down.square() + right.square() + _TINY**2).sqrt()


@contextmanager
def _batch_statistics(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Let batch norms use, and learn from, the batch at hand."""
    for part in parts:
        part.train()
    try:
        yield
    finally:
        for part in parts:
            part.eval()
