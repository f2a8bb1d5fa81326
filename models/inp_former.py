"""INP-Former: a few prototypes drawn from the image itself must explain the whole image; where they can't, it is odd.

Learnable queries gather "intrinsic normal prototypes" (INPs) from the frozen patch features of one image. A decoder
whose attention may read from those INPs only rebuilds the features. The cosine distance between what the backbone saw
and what was rebuilt is the anomaly map.

Paper: Luo, Cao, Yao, Zhang, Lou, Cheng, Shen, Yu, "Exploring Intrinsic Normal Prototypes within a Single Image for
Universal Anomaly Detection", CVPR 2025, arXiv:2503.02424.
Reference code: luow23/INP-Former, MIT. Nothing of it is copied; numbers agree with it (tests/parity).

Deviations from the paper, all but the last three as in the reference code:
* features of several layers are averaged, not summed: the bottleneck is not scale-free and checkpoints depend on it;
* the soft mining weight multiplies gradients and leaves the loss value alone;
* queries and keys of the decoder are L2-normalised and scaled by one learnt number a head;
* a frozen CNN may take the place of DINOv2, so that one CPU core can train and serve: one tensor made from its pyramid
  is then the input of the decoder and its single target (see `PyramidTokens`). A training step may look at some
  tokens only, because the decoder never mixes tokens;
* the rate rises for 100 iterations, as in the code, but for a fifth of a run at most, for the sake of short ones;
* where masks are resized, they take the nearest pixel; the code's are interpolated and cut at a half, which drops thin
  defects. So pixel figures are not exactly the code's.

Symbols: E, D = `tokens`, `rebuilt` (B, G, N, C), one entry a group of layers · F_Q = `fused` (B, N, C)
· T = `prototype_tokens` (M, C) · P = `prototypes` (B, M, C) · gamma = `mining_exponent` · L_c = coherence
· L_sm = reconstruction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from models.blocks.backbone_tokens import sample_tokens
from models.blocks.draws import generator_of_step
from models.blocks.inp_branch import InpBranch, InpBranchConfig, cosines
from models.blocks.maps import GaussianBlur, resize_map, top_fraction_mean
from models.blocks.soft_mining import mined_direction_loss
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
class InpFormerConfig(InpBranchConfig):
    """Defaults are those of the paper (arXiv:2503.02424, implementation details) and, where it is silent, of its code.

    What it shares with INP-Former++ lies in `InpBranchConfig`.

    Attributes:
        map_source: what the map shows: reconstruction error, or (zero-shot) distance to the nearest INP.
        map_size: `(height, width)` of the anomaly map (256).
        blur_kernel: side of the Gaussian (5).
        blur_sigma: its standard deviation (4).
        recipe: the descent.
    """

    # How a detector that was fitted on other lines judges a new one: the decoder knows their features, the INPs are
    # drawn from each image itself.
    zero_shot_settings: ClassVar[Mapping[str, str]] = MappingProxyType({"map_source": "prototypes"})

    map_source: Literal["reconstruction", "prototypes"] = "reconstruction"
    map_size: tuple[int, int] = (256, 256)
    blur_kernel: int = 5
    blur_sigma: float = 4.0
    recipe: Recipe = _PAPER_RECIPE


class InpFormer(InpBranch):
    """Intrinsic normal prototypes and the decoder that they guide.

    Raises:
        ValueError: if the configuration contradicts itself or the backbone.
    """

    def __init__(self, config: InpFormerConfig) -> None:
        super().__init__(config, torch.Generator().manual_seed(config.seed))
        self.config = config
        self.blur = GaussianBlur(config.blur_kernel, config.blur_sigma)

    def stages(self) -> Sequence[Stage]:
        """Return the descent; a CNN's pyramid is measured before it."""
        descent = GradientStage(
            name="reconstruction",
            loss=self.loss,
            parameters=self.learnable_parameters(),
            recipe=self.config.recipe,
            encode=self.encode,
        )
        return [*self.measuring_passes(), descent]

    def loss(self, tokens: Tensor, step: int) -> dict[str, Tensor]:
        """Return L_sm and the weighted L_c of encoded frames `(B, G, N, C)`."""
        generator = generator_of_step(self.config.seed, step)
        seen = sample_tokens(tokens, self.config.extractor_tokens, generator).mean(dim=1)
        prototypes = self.extract(seen)
        coherence = _distance_to_nearest(seen, prototypes).mean()

        targets = sample_tokens(tokens, self.config.decoder_tokens, generator)
        rebuilt = self.rebuild(targets.mean(dim=1), prototypes)
        return {
            "reconstruction": mined_direction_loss(targets, rebuilt, self.config.mining_exponent),
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
        prototypes = self.extract(fused)
        if self.config.map_source == "prototypes":
            return _distance_to_nearest(fused, prototypes)
        rebuilt = self.rebuild(fused, prototypes)
        return (1 - functional.cosine_similarity(tokens, rebuilt, dim=-1)).mean(dim=1)


def _distance_to_nearest(fused: Tensor, prototypes: Tensor) -> Tensor:
    """Return min over INPs of 1 - cosine, `(B, N)`."""
    return (1 - cosines(fused, prototypes)).amin(dim=-1)
