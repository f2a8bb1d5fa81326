"""INP-Former++: what the image's own prototypes can't explain, seen through a head that learnt what a defect leaves.

As in INP-Former, prototypes drawn from the image (INPs) guide a decoder that rebuilds frozen features. Coherence is
soft, so that tokens do not all fall on one prototype; mining looks at the squared error too; and a small head learns
from planted defects to turn the residual between features and rebuilt features into a clean map. The rebuilding branch
never sees a defect: no gradient passes from the head to it.

Paper: Luo et al., "INP-Former++: Advancing Universal Anomaly Detection via Intrinsic Normal Prototypes and Residual
Learning", 2025, arXiv:2506.03660.
Reference code: none was published. This is a re-implementation from the paper's description, not the authors' model.

Chosen where the description is silent:
* the head's channels (256, 64) and kernels; squared errors are averaged over channels, so as not to drown the cosine;
* the normal branch is trained first and then the head alone; the authors call this and joint training both valid;
* planted defects have textures that are drawn or scrambled from the frame: DTD's photographs can't be shipped, and with
  a folder of somebody's own a run could not be repeated from its configuration;
* the head never sees a frame without a defect: the Dice loss of an empty mask is about 1 whatever the map says;
* maps are finished at image size without a blur; both are options.
Ours, as in `inp_former.py`: a frozen CNN may take the transformer's place, and a training step may look at some tokens
only. Semi-supervised learning: `keep_labelled_defects` before fitting gives the head real defects beside planted ones.
Left out: a command that begins with INP-Former's released weights and fits the head alone. The names of the branch are
the same, so Python can.

Symbols: E, D = `tokens`, `rebuilt` (B, G, N, C), one entry a group of layers · P = `prototypes` (B, M, C)
· gamma = `mining_exponent` · L_sc = coherence · L_sm = direction + magnitude · R = `residual` (B, C, h, w) · H = head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks.backbone_tokens import sample_tokens
from models.blocks.draws import generator_of_step
from models.blocks.initial_values import draw_defaults
from models.blocks.inp_branch import InpBranch, InpBranchConfig, cosines
from models.blocks.maps import GaussianBlur, require_image_size, resize_map, top_fraction_mean
from models.blocks.soft_mining import mined_direction_loss, mining_weight, reweight_gradient
from models.blocks.synthetic_defects import paste_defects, plant_textures
from models.detector import AnomalyOutput, GradientStage, Recipe, Stage

_DICE_EPS = 1e-6  # Eq. 8

_PAPER_RECIPE = Recipe(
    optimiser="stable_adamw",
    learning_rate=5e-4,
    final_learning_rate=5e-5,
    weight_decay=1e-4,
    batch_size=16,
    eps=1e-10,
    amsgrad=True,
    epochs=200,
    warmup_iterations=100,
    clip_gradient_norm=0.1,
)
_PAPER_HEAD_RECIPE = Recipe(
    optimiser="stable_adamw",
    learning_rate=5e-4,
    final_learning_rate=5e-4,
    weight_decay=1e-4,
    batch_size=16,
    eps=1e-10,
    amsgrad=True,
    epochs=100,
)


@dataclass(frozen=True)
class InpFormerPpConfig(InpBranchConfig):
    """Defaults are those of the paper (arXiv:2506.03660, section IV) and, where it is silent, of INP-Former.

    What it shares with INP-Former lies in `InpBranchConfig`.

    Attributes:
        magnitude_weight: weight of the squared error in L_sm; unpublished, 1 chosen.
        magnitude_reduction: mean or sum of the squared error over channels; unpublished, mean chosen.
        head_channels: channels between the three layers of the head; unpublished.
        schedule: the branch first and then the head, or both in one descent.
        defect_opacity: range of the share that a planted texture has in its area; DRAEM's.
        labelled_share: share of a batch that gets a real defect, where real defects were given (half).
        map_source: what the map shows: reconstruction error averaged with the head's map; reconstruction error alone,
            which needs no head; or (zero-shot) distance to the mixture of INPs.
        scale_distance: divide the Euclidean part of the reconstruction error by the root of C, so that it does not
            drown the other two; off in the paper.
        map_size: `(height, width)` of the anomaly map; None for that of the image.
        blur_kernel: side of the Gaussian.
        blur_sigma: its standard deviation in pixels of the map; None for no blur.
        recipe: the descent of the normal branch, or of both (section IV-A).
        head_recipe: the descent of the head in the staged schedule (100 epochs, by its authors).
    """

    # How a detector that was fitted on other lines judges a new one: decoder and head know their features, the INPs are
    # drawn from each image itself.
    zero_shot_settings: ClassVar[Mapping[str, str]] = MappingProxyType({"map_source": "prototypes"})

    magnitude_weight: float = 1.0
    magnitude_reduction: Literal["mean", "sum"] = "mean"
    head_channels: tuple[int, int] = (256, 64)
    schedule: Literal["staged", "joint"] = "staged"
    defect_opacity: tuple[float, float] = (0.2, 1.0)
    labelled_share: float = 0.5
    map_source: Literal["combined", "reconstruction", "prototypes"] = "combined"
    scale_distance: bool = False
    map_size: tuple[int, int] | None = None
    blur_kernel: int = 5
    blur_sigma: float | None = None
    recipe: Recipe = _PAPER_RECIPE
    head_recipe: Recipe = _PAPER_HEAD_RECIPE


class _SegmentationHead(nn.Sequential):
    """H: residual `(B, C, h, w)` to logits `(B, 1, 4h, 4w)` in two steps of two."""

    def __init__(self, channels: int, hidden: tuple[int, int], generator: torch.Generator) -> None:
        super().__init__(
            nn.ConvTranspose2d(channels, hidden[0], 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden[0], hidden[1], 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden[1], 1, 3, padding=1),
        )
        draw_defaults(self, generator)


class InpFormerPp(InpBranch):
    """Prototypes and decoder of INP-Former, and the head that reads the residual.

    Raises:
        ValueError: if the configuration contradicts itself or the backbone.
    """

    def __init__(self, config: InpFormerPpConfig) -> None:
        generator = torch.Generator().manual_seed(config.seed)
        super().__init__(config, generator)
        self.config = config
        self.seg_head = _SegmentationHead(self.channels, config.head_channels, generator) if self._has_head else None
        self.blur = nn.Identity() if config.blur_sigma is None else GaussianBlur(config.blur_kernel, config.blur_sigma)
        self._labelled_defects: tuple[Tensor, Tensor] | None = None

    @property
    def _has_head(self) -> bool:
        return self.config.map_source == "combined"

    def keep_labelled_defects(self, images: Tensor, masks: Tensor) -> None:
        """Take real defects for the head to learn from beside planted ones (semi-supervised); call before fitting.

        Args:
            images: `(n, 3, H, W)` float32 in [0, 1], one defective frame each.
            masks: `(n, H, W)` of 0 and 1, where its defect is.

        Raises:
            ValueError: if there is no head to learn from them, the sizes do not fit, or a mask is empty.
        """
        if self.seg_head is None:
            raise ValueError(
                f"a map of {self.config.map_source!r} needs no head, and only the head learns from defects"
            )
        require_image_size(images, self.image_size)
        if masks.shape != (len(images), *self.image_size):
            raise ValueError(f"expected masks of shape {(len(images), *self.image_size)}, got {tuple(masks.shape)}")
        if not masks.flatten(1).any(dim=1).all():
            raise ValueError("a labelled defect has an empty mask")
        self._labelled_defects = (images, masks.to(torch.float32))

    def stages(self) -> Sequence[Stage]:
        """Return the descents; a CNN's pyramid is measured before them."""
        passes = self.measuring_passes()
        head = [] if self.seg_head is None else list(self.seg_head.parameters())
        everything = self.learnable_parameters()
        branch = [parameter for parameter in everything if not any(parameter is own for own in head)]
        recipe = self.config.recipe
        if self.config.schedule == "joint" and head:
            return [*passes, GradientStage("reconstruction and head", self.joint_loss, everything, recipe)]
        descents = [GradientStage("reconstruction", self.loss, branch, recipe, self.encode)]
        if head:
            descents.append(GradientStage("segmentation head", self.head_loss, head, self.config.head_recipe))
        return [*passes, *descents]

    def loss(self, tokens: Tensor, step: int) -> dict[str, Tensor]:
        """Return the two halves of L_sm and the weighted L_sc of encoded good frames `(B, G, N, C)`."""
        generator = generator_of_step(self.config.seed, step)
        seen = sample_tokens(tokens, self.config.extractor_tokens, generator).mean(dim=1)
        prototypes = self.extract(seen)
        targets = sample_tokens(tokens, self.config.decoder_tokens, generator)
        rebuilt = self.rebuild(targets.mean(dim=1), prototypes)

        gamma, reduction = self.config.mining_exponent, self.config.magnitude_reduction
        return {
            "direction": mined_direction_loss(targets, rebuilt, gamma),
            "magnitude": self.config.magnitude_weight * _mined_magnitude_loss(targets, rebuilt, gamma, reduction),
            "coherence": self.config.coherence_weight * _soft_coherence_loss(seen, prototypes),
        }

    def head_loss(self, images: Tensor, step: int) -> dict[str, Tensor]:
        """Return the Dice loss of the head on good images `(B, 3, H, W)` in which defects were planted."""
        planted, masks = self._plant_defects(images, generator_of_step(self.config.seed, step))
        with torch.no_grad():
            tokens = self.encode(planted)
            residual = self._residual(tokens, self._rebuild_all(tokens))
        return {"dice": _dice_loss(self._segment(residual), masks)}

    def joint_loss(self, images: Tensor, step: int) -> dict[str, Tensor]:
        """Return all terms at once; the branch learns from the images as they are, the head from planted defects."""
        return self.loss(self.encode(images), step) | self.head_loss(images, step)

    def _plant_defects(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Give each image a defect: real ones, where there are any, for the first of a batch, whose order is random."""
        if self._labelled_defects is None:
            return plant_textures(images, generator, self.config.defect_opacity)
        donors, donor_masks = (kept.to(images.device) for kept in self._labelled_defects)
        real = round(self.config.labelled_share * len(images))
        parts = []
        if real:
            parts.append(paste_defects(images[:real], donors, donor_masks, generator))
        if real < len(images):
            parts.append(plant_textures(images[real:], generator, self.config.defect_opacity))
        planted, masks = zip(*parts, strict=True)
        return torch.cat(planted), torch.cat(masks)

    def forward(self, images: Tensor) -> AnomalyOutput:
        """Judge images `(B, 3, H, W)` float32 in [0, 1].

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if the backbone has no weights or a CNN's pyramid was not measured.
        """
        tokens = self.encode(images)
        if self.config.map_source == "prototypes":
            fused = tokens.mean(dim=1)
            mixture = _mix_prototypes(fused, self.extract(fused))
            return self._finish_map(self._place(1 - functional.cosine_similarity(fused, mixture, dim=-1)))
        rebuilt = self._rebuild_all(tokens)
        anomaly_map = self._place(self._reconstruction_error(tokens, rebuilt))
        if self.seg_head is not None:
            anomaly_map = (anomaly_map + self._segment(self._residual(tokens, rebuilt))) / 2  # Eq. 9
        return self._finish_map(anomaly_map)

    def _reconstruction_error(self, tokens: Tensor, rebuilt: Tensor) -> Tensor:
        """Return the mean of cosine and Euclidean distance, averaged over groups: `(B, N)` (Eq. 9)."""
        direction = 1 - functional.cosine_similarity(tokens, rebuilt, dim=-1)
        magnitude = (tokens - rebuilt).square().sum(dim=-1).sqrt()
        if self.config.scale_distance:
            magnitude = magnitude / tokens.shape[-1] ** 0.5
        return ((direction + magnitude) / 2).mean(dim=1)

    def _residual(self, tokens: Tensor, rebuilt: Tensor) -> Tensor:
        """Return R `(B, C, h, w)`: absolute difference times cosine distance, averaged over groups (Eq. 7)."""
        direction = 1 - functional.cosine_similarity(tokens, rebuilt, dim=-1)
        residual = (direction[..., None] * (tokens - rebuilt).abs()).mean(dim=1)  # (B, N, C)
        return residual.transpose(1, 2).reshape(-1, residual.shape[2], *self.grid)

    def _segment(self, residual: Tensor) -> Tensor:
        """Return the head's map of image size, `(B, H, W)` in [0, 1]."""
        assert self.seg_head is not None  # noqa: S101  (only asked where there is one; a bug otherwise)
        return resize_map(self.seg_head(residual)[:, 0], self.image_size).sigmoid()

    def _place(self, distances: Tensor) -> Tensor:
        """Bring distances of tokens `(B, N)` to image size."""
        return resize_map(distances.reshape(-1, *self.grid), self.image_size, align_corners=True)

    def _finish_map(self, anomaly_map: Tensor) -> AnomalyOutput:
        """Bring a map of image size to its own size, blur it if wanted, and score it by its largest values."""
        anomaly_map = self.blur(resize_map(anomaly_map, self.config.map_size or self.image_size))
        return AnomalyOutput(anomaly_map, top_fraction_mean(anomaly_map, self.config.top_fraction))

    def _rebuild_all(self, tokens: Tensor) -> Tensor:
        """Return D of all tokens E `(B, G, N, C)`."""
        fused = tokens.mean(dim=1)
        return self.rebuild(fused, self.extract(fused))


def _mix_prototypes(fused: Tensor, prototypes: Tensor) -> Tensor:
    """Return for each token `(B, N, C)` the INPs, mixed by the softmax of their cosine to it: `(B, N, C)`."""
    return cosines(fused, prototypes).softmax(dim=-1) @ prototypes


def _soft_coherence_loss(fused: Tensor, prototypes: Tensor) -> Tensor:
    """Return L_sc: 1 - one cosine an image between all tokens and all their mixtures (Eq. 3)."""
    mixture = _mix_prototypes(fused, prototypes)
    return (1 - functional.cosine_similarity(fused.flatten(1), mixture.flatten(1), dim=-1)).mean()


def _mined_magnitude_loss(
    targets: Tensor, rebuilt: Tensor, exponent: float, reduction: Literal["mean", "sum"]
) -> Tensor:
    """Return the squared error, averaged over images, groups and tokens; weighted by itself in the same way (Eq. 5)."""
    squared = (targets - rebuilt).square().mean(dim=-1)  # (B, G, N)
    mined = reweight_gradient(rebuilt, mining_weight(squared, exponent)[..., None])
    error = (targets - mined).square()
    return (error.mean(dim=-1) if reduction == "mean" else error.sum(dim=-1)).mean()


def _dice_loss(predicted: Tensor, masks: Tensor) -> Tensor:
    """Return 1 - Dice of maps in [0, 1] and masks, both `(B, H, W)`, averaged over images (Eq. 8)."""
    overlap = (predicted * masks).sum(dim=(1, 2))
    total = predicted.sum(dim=(1, 2)) + masks.sum(dim=(1, 2))
    return (1 - (2 * overlap + _DICE_EPS) / (total + _DICE_EPS)).mean()
