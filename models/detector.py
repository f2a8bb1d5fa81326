"""The shape every detector has, so that one run, one export and one test suite serve all of them.

A detector is an `nn.Module` whose `forward` maps frames to an `AnomalyOutput`, in train and in eval mode alike.
How it learns is told by `stages()`: an ordered list of passes over the good frames (statistics, no gradient) and of
gradient descents. Stages replace the usual pair "trained / one-pass detector", because several published methods need
both, in their own order: a projection before the descent, a normal-map statistic after it, two descents in a row.

Most detectors don't ask which line a frame shows. A line-conditioned one does: it is told the line of every frame, as
its place among the lines that it is fitted on, in passes, in descents and in `forward`.

Rules: nothing here reads files, the environment or the clock; tensors are `(B, 3, H, W)` float32 RGB in [0, 1] unless
said otherwise, normalisation belongs to the backbone; height comes before width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, Self, runtime_checkable

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
        batch_size: frames an iteration, of all processes together; the last incomplete
            batch of an epoch is dropped unless it is the only one.
        epochs: passes over the frames; exactly one of `epochs` and `iterations` is set.
        iterations: number of updates.
        warmup_iterations: linear ramp from 0; at most a fifth of all iterations are used for it.
        clip_gradient_norm: bound on the norm over all parameters of the stage, or None.
        balance_lines: show every line equally often in an epoch, whatever the number of its frames.
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
    balance_lines: bool = False

    def __post_init__(self) -> None:
        """Refuse a recipe without an end, or with two."""
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError("set exactly one of epochs and iterations")


class Step(int):
    """The number of an iteration, and which share of its batch a loss is asked about.

    A batch that several processes compute, or one process in parts, has several shares; `generator_of_step` draws
    differently for each.

    Args:
        number: of the iteration, from 0.
        share: of the batch, from 0.
    """

    share: int

    def __new__(cls, number: int, share: int = 0) -> Self:
        """Return the number, with its share beside it."""
        step = super().__new__(cls, number)
        step.share = share
        return step


@dataclass(frozen=True)
class PassStage:
    """One look at every good frame without gradients; exactly one of `observe` and `observe_lines` is given.

    Attributes:
        name: what the progress bar says.
        observe: takes images `(B, 3, H, W)`; called once a batch, in a fixed order.
        finish: turns what was observed into buffers of the detector.
        observe_lines: the same for a line-conditioned detector: images, and their lines `(B,)` int64.
    """

    name: str
    observe: Callable[[Tensor], None] | None
    finish: Callable[[], None]
    observe_lines: Callable[[Tensor, Tensor], None] | None = None

    def __post_init__(self) -> None:
        """Refuse a stage that looks at nothing, or twice."""
        if (self.observe is None) == (self.observe_lines is None):
            raise ValueError("set exactly one of observe and observe_lines")

    def show(self, images: Tensor, line_index: Tensor) -> None:
        """Let the detector look at images `(B, 3, H, W)` of the lines `(B,)` int64, which it may not ask for."""
        if self.observe is not None:
            self.observe(images)
        if self.observe_lines is not None:
            self.observe_lines(images, line_index)


@dataclass(frozen=True)
class GradientStage:
    """One descent; exactly one of `loss` and `line_loss` is given.

    Attributes:
        name: what the progress bar says.
        loss: `(inputs, step)` to named terms; the loop sums them. `inputs` is what `encode` returned, or the images
            themselves where `encode` is None. All randomness comes from `generator_of_step`, so that a resumed run
            equals an uninterrupted one. Of the state, a loss may change running statistics of batch norms only.
        parameters: the tensors that this stage may change; all others stay as they are.
        recipe: optimiser, schedule and length.
        encode: the frozen front of the detector, images `(B, 3, H, W)` to a `(B, ...)` tensor, deterministic and
            independent of batch mates; the loop may compute it once per frame and keep it.
        line_loss: the same as `loss` for a line-conditioned detector: inputs, their lines `(B,)` int64, and the step.
    """

    name: str
    loss: Callable[[Tensor, int], dict[str, Tensor]] | None
    parameters: Sequence[nn.Parameter]
    recipe: Recipe
    encode: Callable[[Tensor], Tensor] | None = None
    line_loss: Callable[[Tensor, Tensor, int], dict[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        """Refuse a descent without a loss, or with two."""
        if (self.loss is None) == (self.line_loss is None):
            raise ValueError("set exactly one of loss and line_loss")

    def terms(self, inputs: Tensor, line_index: Tensor, step: int) -> dict[str, Tensor]:
        """Return the loss of inputs `(B, ...)` of the lines `(B,)` int64, which the detector may not ask for."""
        if self.loss is not None:
            return self.loss(inputs, step)
        if self.line_loss is not None:
            return self.line_loss(inputs, line_index, step)
        raise AssertionError("a descent has a loss")


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


@runtime_checkable
class LineConditioned(Protocol):
    """A detector that is told which line a frame shows; its stages have `observe_lines` and `line_loss`.

    Attributes:
        lines: how many lines it is fitted on; a line's index is its place among them.
    """

    lines: int

    def forward(self, images: Tensor, line_index: Tensor | None = None) -> AnomalyOutput:
        """Judge images `(B, 3, H, W)` of the lines `(B,)` int64.

        Args:
            images: as for any detector.
            line_index: each in 0 to `lines` - 1; None stands for the only line.

        Raises:
            ValueError: if an index is out of range, or is left out where there are several lines.
        """
        ...
