"""The student: the embedded network with heads for its teachers, and the way from there to weights that ship."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones import EMBEDDED, CnnBackbone
from training.distillation.lessons import LAYERS, sample_positions


class Student(nn.Module):
    """The network to be embedded, with one head for each teacher and level.

    Args:
        channels: for each level, the teachers' channel counts.
    """

    def __init__(self, channels: Sequence[Sequence[int]]) -> None:
        super().__init__()
        backbone = CnnBackbone(EMBEDDED, LAYERS)
        self.network = backbone.network.train().requires_grad_(requires_grad=True).to(memory_format=torch.channels_last)
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(own, theirs, 1) for theirs in level)
            for own, level in zip(backbone.channels, channels, strict=True)
        )
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1 and module.stride != (1, 1):
                _compute_in_float32(module)
        self.register_buffer("mean", backbone.mean, persistent=False)
        self.register_buffer("std", backbone.std, persistent=False)

    mean: Tensor
    std: Tensor

    def level_heads(self) -> list[list[nn.Conv2d]]:
        """Return the heads of each level, one for each teacher."""
        levels: Any = self.heads
        return [list(level) for level in levels]

    def features(self, frames: Tensor) -> list[Tensor]:
        """Return the own maps of frames `(B, 3, H, W)` uint8."""
        images = (frames.float() / 255 - self.mean) / self.std
        maps: list[Tensor] = self.network.forward_intermediates(
            images.contiguous(memory_format=torch.channels_last), indices=list(LAYERS), intermediates_only=True
        )
        return maps

    def forward(self, frames: Tensor, offsets: Tensor) -> list[list[Tensor]]:
        """Predict the teachers' sampled maps, for each level and teacher."""
        maps = [sample_positions(level, offset) for level, offset in zip(self.features(frames), offsets, strict=True)]
        return [[head(level) for head in heads] for level, heads in zip(maps, self.level_heads(), strict=True)]


def _compute_in_float32(convolution: nn.Conv2d) -> None:
    """Keep a convolution out of autocast: strided depthwise gradients are ten times slower in bfloat16 on CPUs."""
    forward = convolution.forward

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(x.float())

    # Not a wrapping module: that would change the names of the weights.
    convolution.forward = run  # type: ignore[assignment,method-assign]  # replaced on this one object on purpose


@torch.no_grad()
def reestimate_batch_norm(student: Student, frames: Tensor, batch_size: int) -> None:
    """Replace batch norm's running statistics by their plain mean over batches of frames `(N, 3, H, W)` uint8."""
    norms = [module for module in student.network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    student.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    for batch in torch.split(frames, 4 * batch_size):
        student.features(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def finish(student: Student, frames: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Turn a student into weights to ship.

    Re-estimates batch norm, folds it into the convolutions, scales each tapped channel by
    1 / (its deviation + 0.1 x the level's mean deviation), and rounds to float16. The student's own network and heads
    are changed alike, so that it computes with what is shipped and still predicts the teachers.

    Args:
        student: changed in place, left in eval mode.
        frames: `(N, 3, H, W)` uint8 that were not learnt from.
        batch_size: frames of a batch.

    Returns:
        Tensors in timm's naming; the batch norms hold mean 0, variance 1, weight 1 and the bias.
    """
    reestimate_batch_norm(student, frames, batch_size)
    student.eval()
    network: Any = student.network
    fold_batch_norm(network)
    scales = channel_scales(student, frames, batch_size)
    fold_channel_scales(network, scales)
    for scale, heads in zip(scales, student.level_heads(), strict=True):
        for head in heads:
            head.weight.data /= scale.view(1, -1, 1, 1)
    finished = {
        name: value.detach().to(torch.float16).contiguous()
        for name, value in sorted(network.state_dict().items())
        if not name.endswith("num_batches_tracked")
    }
    network.load_state_dict(finished, strict=False)
    return finished


@torch.no_grad()
def channel_scales(student: Student, frames: Tensor, batch_size: int) -> list[Tensor]:
    """Return each level's factors `(C,)`: 1 / (deviation + 0.1 x mean deviation of the level) over frames."""
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    for number, batch in enumerate(torch.split(frames, batch_size)):
        for level, values in enumerate(student.features(batch)):
            first, second = values.double().mean(dim=(0, 2, 3)), values.double().square().mean(dim=(0, 2, 3))
            if number == 0:
                sums.append(first * len(batch))
                squares.append(second * len(batch))
            else:
                sums[level] += first * len(batch)
                squares[level] += second * len(batch)
    deviations = [
        (second / len(frames) - (first / len(frames)).square()).clamp_min(0).sqrt()
        for first, second in zip(sums, squares, strict=True)
    ]
    return [(1 / (deviation + 0.1 * deviation.mean())).float() for deviation in deviations]


@torch.no_grad()
def fold_batch_norm(network: Any) -> None:
    """Move every batch norm's scale into the convolution before it; the norm keeps only its bias."""
    pairs = [(network.conv_stem, network.bn1)]
    for stage in network.blocks:
        for block in stage:
            pairs += [(block.conv_dw, block.bn1), (block.conv_pw, block.bn2)]
    for convolution, norm in pairs:
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias -= gain * norm.running_mean
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        norm.weight.fill_(1)
        # With variance 1 the norm still divides by sqrt(1 + eps).
        convolution.weight *= (gain * math.sqrt(1 + norm.eps)).view(-1, 1, 1, 1)


@torch.no_grad()
def fold_channel_scales(network: Any, scales: Sequence[Tensor]) -> None:
    """Scale the outputs of the tapped stages, and undo it in the next stage's depthwise convolution.

    Args:
        network: the student's network after `fold_batch_norm`.
        scales: for each layer of `LAYERS`, `(C,)` positive factors.
    """
    for layer, scale in zip(LAYERS, scales, strict=True):
        last = network.blocks[layer][-1]
        last.conv_pw.weight *= scale.view(-1, 1, 1, 1)
        last.bn2.bias *= scale
        if layer + 1 < len(network.blocks):
            network.blocks[layer + 1][0].conv_dw.weight /= scale.view(-1, 1, 1, 1)
