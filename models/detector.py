"""The shape every detector has, so that one run, one export and one test suite serve all of them.

A detector is an `nn.Module` whose `forward` maps frames to an `AnomalyOutput`, in train and in eval mode alike.
How it learns is told by `stages()`: an ordered list of passes over the good frames (statistics, no gradient) and of
gradient descents. Stages replace the usual pair "trained / one-pass detector", because several published methods need
both, in their own order: a projection before the descent, a normal-map statistic after it, two descents in a row.

Rules: nothing here reads files, the environment or the clock; tensors are `(B, 3, H, W)` float32 RGB in [0, 1] unless
said otherwise, normalisation belongs to the backbone; height comes before width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


class AnomalyOutput(NamedTuple):
    """What a detector says of a batch; raw and unclamped, larger is more anomalous.

    Attributes:
        anomaly_map: `(B, h, w)` float32.
        score: `(B,)` float32.
    """

    anomaly_map: Tensor
    score: Tensor


@dataclass(frozen=True)
class Recipe:
    """How one gradient stage descends; every detector's configuration holds the values of its paper.

    Attributes:
        optimiser: the update rule.
        learning_rate: peak rate, reached after the warm-up.
        final_learning_rate: rate at the last iteration of the cosine.
        weight_decay: decoupled decay factor.
        betas: decay rates of the two moments.
        eps: guard added to the root of the second moment.
        amsgrad: whether the running maximum of the second moment is used.
        batch_size: frames an iteration; the last incomplete batch of an epoch is dropped unless it is the only one.
        epochs: passes over the frames; exactly one of `epochs` and `iterations` is set.
        iterations: number of updates.
        warmup_iterations: linear ramp from 0; at most a fifth of all iterations are used for it.
        clip_gradient_norm: bound on the norm over all parameters of the stage, or None.
    """

    optimiser: Literal["stable_adamw", "adamw", "adam", "sgd"]
    learning_rate: float
    final_learning_rate: float
    weight_decay: float
    batch_size: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    epochs: int | None = None
    iterations: int | None = None
    warmup_iterations: int = 0
    clip_gradient_norm: float | None = None

    def __post_init__(self) -> None:
        """Refuse a recipe without an end, or with two."""
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError("set exactly one of epochs and iterations")


@dataclass(frozen=True)
class PassStage:
    """One look at every good frame without gradients.

    Attributes:
        name: what the progress bar says.
        observe: takes images `(B, 3, H, W)`; called once a batch, in a fixed order.
        finish: turns what was observed into buffers of the detector.
    """

    name: str
    observe: Callable[[Tensor], None]
    finish: Callable[[], None]


@dataclass(frozen=True)
class GradientStage:
    """One descent.

    Attributes:
        name: what the progress bar says.
        loss: `(inputs, step)` to named terms; the loop sums them. `inputs` is what `encode` returned, or the images
            themselves where `encode` is None. All randomness comes from generators seeded with the step, so that a
            resumed run equals an uninterrupted one.
        parameters: the tensors that this stage may change; all others stay as they are.
        recipe: optimiser, schedule and length.
        encode: the frozen front of the detector, images `(B, 3, H, W)` to a `(B, ...)` tensor, deterministic and
            independent of batch mates; the loop may compute it once per frame and keep it.
    """

    name: str
    loss: Callable[[Tensor, int], dict[str, Tensor]]
    parameters: Sequence[nn.Parameter]
    recipe: Recipe
    encode: Callable[[Tensor], Tensor] | None = None


Stage = PassStage | GradientStage


@runtime_checkable
class Detector(Protocol):
    """What training, export and tests rely on; implemented by `nn.Module` subclasses only.

    Attributes:
        image_size: `(height, width)` of the images that `forward` accepts.
    """

    image_size: tuple[int, int]

    def stages(self) -> Sequence[Stage]:
        """Return the stages of fitting, in order; the list does not depend on what was fitted before."""
        ...

    def forward(self, images: Tensor) -> AnomalyOutput:
        """Judge images `(B, 3, H, W)`; an image's answer does not depend on its batch mates.

        Raises:
            ValueError: if the images have another size than `image_size`.
            RuntimeError: if a pass stage that the answer depends on has not finished.
        """
        ...
