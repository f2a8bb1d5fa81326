"""Distil the embedded backbone: a compact student learns, on generated frames, what large teachers see.

Every frame comes from `training.procedural`, so no photograph is ever looked at. A student with random weights is
shown the frame and asked, through one 1x1 convolution for each teacher and stride, for the teacher's feature maps;
afterwards these heads are dropped and the student's own maps are the features. What the pilot found to matter is kept:
targets normalised by channel, batch norm re-estimated on fresh frames at the end, and every channel of the result
scaled to about unit spread. The scaling is folded into the weights: batch norm and scale go into the convolution before
a tapped ReLU, the inverse scale into the depthwise convolution behind it, which is exact because ReLU(s x) = s ReLU(x)
for s > 0.

Everything follows from the seed: lesson `n` is the same in every process, so a stopped run goes on as if it had never
stopped. Related: FitNets (arXiv:1412.6550); learning from several teachers as in AM-RADIO (arXiv:2312.06709); generated
images as in arXiv:2106.05963.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import EMBEDDED
from training.distillation.lessons import (
    FINISHING,
    HELD_OUT,
    STRIDES,
    Classroom,
    DistillConfig,
    batches_of,
    prepared_lessons,
)
from training.distillation.student import Student, finish, reestimate_batch_norm
from training.fitting.checkpoint import (
    LossPoint,
    TrainingState,
    has_checkpoint,
    load_checkpoint,
    optimiser_state,
    restore_optimiser,
    save_checkpoint,
)
from training.progress import Reporter

_POINTS_OF_CURVE = 500


@dataclass(frozen=True)
class Explained:
    """How much of a teacher the heads predict on held-out generated frames.

    Attributes:
        images: frames learnt from so far.
        share: by "<teacher>/<stride>", 1 - residual / variance of the normalised targets; 1 is perfect.
    """

    images: int
    share: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean over teachers and over the strides 8 and 16."""
        return float(np.mean([value for key, value in self.share.items() if not key.endswith("/4")]))


@dataclass(frozen=True)
class Distilled:
    """What came out.

    Attributes:
        weights: float16 tensors in timm's naming, ready for the backbone `embedded`.
        losses: one point a step.
        explained: measurements on held-out frames, last one with the finished weights.
    """

    weights: dict[str, Tensor]
    losses: tuple[LossPoint, ...]
    explained: tuple[Explained, ...]


def distil(
    config: DistillConfig, directory: Path, reporter: Reporter, *, workers: int = 0, resume: bool = False
) -> Distilled:
    """Train the student, finish its weights, and return them.

    Args:
        config: the run.
        directory: where checkpoints are kept.
        reporter: told about progress.
        workers: processes that draw frames and run the teachers beside the training; the result is the same.
        resume: go on from the checkpoint in `directory`; `images` may differ from the first start.

    Raises:
        training.fitting.checkpoint.CheckpointRefused: if the checkpoint is damaged or of another run.
        ValueError: if teacher weights do not fit.
    """
    torch.manual_seed(config.seed)
    classroom = Classroom(config)
    student = Student(classroom.channels)
    optimiser = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    average = Student(classroom.channels)
    average.load_state_dict(student.state_dict())
    losses: list[LossPoint] = []
    explained: list[Explained] = []
    if resume and has_checkpoint(directory):
        state = load_checkpoint(directory, _identity(config))
        student.load_state_dict(_under("student.", state.detector))
        average.load_state_dict(_under("average.", state.detector))
        restore_optimiser(optimiser, state)
        losses.extend(state.losses)

    first = len(losses) * config.batch_size // config.images_per_shard
    shards = range(first, config.images // config.images_per_shard)
    with (
        prepared_lessons(config, classroom, shards, workers) as lessons,
        reporter.bar("distil", config.images, first * config.images_per_shard) as bar,
    ):
        for shard, lesson in zip(shards, lessons, strict=True):
            for frames, targets in batches_of(config, lesson, shard):
                terms = _learn(config, student, optimiser, len(losses), frames, targets, lesson.offsets)
                _follow(average, student, min(config.ema_decay, (1 + len(losses)) / (10 + len(losses))))
                losses.append(LossPoint("distil", len(losses), terms))
                bar.advance(len(frames), terms)
            done = (shard + 1) * config.images_per_shard
            if done % config.checkpoint_images < config.images_per_shard or done == config.images:
                _keep(config, directory, student, average, optimiser, losses)
            if done % (4 * config.checkpoint_images) < config.images_per_shard:
                explained.append(measure(config, classroom, average, done))
                reporter.note(_say(explained[-1]))

    finishing_shards = range(1, 1 + max(1, config.finishing_images // config.shard_size))
    fresh = torch.cat([classroom.frames(FINISHING, shard) for shard in finishing_shards])
    finished = finish(average, fresh, config.batch_size)
    explained.append(measure(config, classroom, average, config.images, reestimate=False))
    reporter.note(_say(explained[-1]))
    return Distilled(finished, tuple(losses), tuple(explained))


def _learn(
    config: DistillConfig,
    student: Student,
    optimiser: torch.optim.Optimizer,
    step: int,
    frames: Tensor,
    targets: list[list[Tensor]],
    offsets: Tensor,
) -> dict[str, float]:
    """Take one step and return the loss terms."""
    rate = _learning_rate(config, step)
    for group in optimiser.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
        predictions = student(frames, offsets)
    terms = distillation_terms(config, predictions, targets)
    optimiser.zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]  # torch's
    nn.utils.clip_grad_norm_(student.parameters(), config.clip_gradient_norm)
    optimiser.step()
    return {name: float(value.detach()) for name, value in terms.items()}


def distillation_terms(
    config: DistillConfig, predictions: Sequence[Sequence[Tensor]], targets: Sequence[Sequence[Tensor]]
) -> dict[str, Tensor]:
    """Compare predicted with normalised target maps, for each level and teacher `(B, C, h, w)`.

    Returns:
        "distance" (smooth L1) and "angle" (1 - cosine over channels), both weighted.
    """
    distance, angle = torch.zeros(()), torch.zeros(())
    for level_share, predicted, wanted in zip(config.level_shares, predictions, targets, strict=True):
        for teacher, guess, target in zip(config.teachers, predicted, wanted, strict=True):
            ours, theirs = guess.float(), target.float()
            share = level_share * teacher.share
            distance = distance + share * functional.smooth_l1_loss(ours, theirs)
            angle = angle + share * (1 - _cosine(ours, theirs).mean())
    return {"distance": config.distance_share * distance, "angle": config.angle_share * angle}


def _cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    """Cosine over channels of `(B, C, h, w)`; as torch's own, but without two normalised copies of large maps."""
    lengths = ours.square().sum(dim=1) * theirs.square().sum(dim=1)
    return (ours * theirs).sum(dim=1) / lengths.clamp_min(1e-12).sqrt()


def _learning_rate(config: DistillConfig, step: int) -> float:
    """Ramp up over the first frames, then half a cosine down to 0."""
    done = step * config.batch_size
    ramp = min(1.0, (done + config.batch_size) / max(config.warmup_images, config.batch_size))
    return config.learning_rate * ramp * 0.5 * (1 + math.cos(math.pi * min(done / config.images, 1.0)))


@torch.no_grad()
def _follow(average: Student, student: Student, decay: float) -> None:
    """Move the running average towards the student; batch norm's statistics and counters are copied."""
    for own, new in zip(average.parameters(), student.parameters(), strict=True):
        own.lerp_(new, 1 - decay)
    for kept, latest in zip(average.buffers(), student.buffers(), strict=True):
        kept.copy_(latest)


@torch.no_grad()
def measure(
    config: DistillConfig, classroom: Classroom, student: Student, images: int, *, reestimate: bool = True
) -> Explained:
    """Measure the explained variance on held-out generated frames; batch norms are re-estimated on others first."""
    probe = Student(classroom.channels)
    probe.load_state_dict(student.state_dict())
    if reestimate:
        reestimate_batch_norm(probe, classroom.frames(FINISHING, 0), config.batch_size)
    probe.eval()
    lesson = classroom.lesson(HELD_OUT, 0)
    residual: dict[str, float] = {}
    total: dict[str, float] = {}
    for start in range(0, config.held_out_images, config.batch_size):
        part = slice(start, start + config.batch_size)
        predictions = probe(lesson.frames[part], lesson.offsets)
        targets = [[target[part] for target in level] for level in lesson.targets]
        for stride, predicted, wanted in zip(STRIDES, predictions, targets, strict=True):
            for teacher, guess, target in zip(config.teachers, predicted, wanted, strict=True):
                key = f"{teacher.backbone}/{stride}"
                residual[key] = residual.get(key, 0.0) + float((guess - target.float()).square().sum())
                total[key] = total.get(key, 0.0) + float(target.float().square().sum())
    return Explained(images, {key: 1 - residual[key] / total[key] for key in total})


def write_student(distilled: Distilled, config: DistillConfig, directory: Path) -> Path:
    """Write `embedded.safetensors` and `embedded.json` (seed, recipe, loss curve, figures); return the former."""
    directory.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save(distilled.weights)
    path = directory / f"{EMBEDDED}.safetensors"
    path.write_bytes(data)
    step = max(1, len(distilled.losses) // _POINTS_OF_CURVE)
    record = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "parameters": sum(v.numel() for k, v in distilled.weights.items() if "running_" not in k),
        "config": _identity(config) | {"images": config.images},
        "explained": [asdict(point) for point in distilled.explained],
        "loss": [[point.step, round(sum(point.terms.values()), 5)] for point in distilled.losses[::step]],
    }
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return path


def _keep(
    config: DistillConfig,
    directory: Path,
    student: Student,
    average: Student,
    optimiser: torch.optim.Optimizer,
    losses: Sequence[LossPoint],
) -> None:
    """Write a checkpoint."""
    tensors, scalars = optimiser_state(optimiser)
    detector = {f"student.{name}": value for name, value in student.state_dict().items()}
    detector |= {f"average.{name}": value for name, value in average.state_dict().items()}
    state = TrainingState(0, len(losses), detector, tensors, scalars, tuple(losses))
    save_checkpoint(directory, state, _identity(config))


def _identity(config: DistillConfig) -> dict[str, str]:
    """Name what must be equal for a resumed run; its length may change."""
    plain = {name: str(value) for name, value in asdict(config).items()}
    for name in ("images", "teachers", "checkpoint_images"):
        del plain[name]
    for teacher in config.teachers:
        digest = hashlib.sha256(teacher.weights.read_bytes()).hexdigest()
        plain[f"teacher {teacher.backbone}"] = f"{teacher.share} {digest}"
    return plain


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _say(explained: Explained) -> str:
    figures = ", ".join(f"{key} {value:.3f}" for key, value in explained.share.items())
    return (
        f"explained variance after {explained.images} images: {figures}; mean of strides 8 and 16: {explained.mean:.4f}"
    )
