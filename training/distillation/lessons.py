"""What a student is taught: generated frames, and what the teachers see in them.

Lesson `n` follows from the seed and `n` alone, in whichever process it is prepared.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.multiprocessing
from torch import Tensor

from models.backbones import CnnBackbone
from training.procedural.frames import FrameStream

LAYERS = (1, 2, 3)  # of the student and of every teacher
STRIDES = (4, 8, 16)
# Streams of frames that share nothing.
TRAINING, NORMALISING, HELD_OUT, FINISHING = range(4)

_LARGEST_TARGET = 16  # positions a side at which a level is compared; larger maps are sampled


@dataclass(frozen=True)
class Teacher:
    """One network to learn from.

    Attributes:
        backbone: timm's name; its layers 1, 2, 3 must have the strides 4, 8, 16.
        weights: safetensors file.
        share: weight of its terms in the loss.
    """

    backbone: str
    weights: Path
    share: float = 1.0


@dataclass(frozen=True)
class DistillConfig:
    """One run; the defaults made the embedded backbone.

    Attributes:
        teachers: who is learnt from.
        seed: of everything.
        images: frames shown in all, repetitions counted; the learning rate follows half a cosine over them.
        batch_size: frames a step.
        frame_size: pixels a side.
        canvas_size: pixels a side of the generated canvases that frames are cut from.
        texture_count: generated textures in use at a time.
        shard_size: frames that are drawn, shuffled and taught together.
        repeats: times that a shard is taught before the next, in another order each time; drawing frames and asking
            teachers costs about as much as learning.
        learning_rate: AdamW's peak.
        weight_decay: AdamW's, on everything.
        warmup_images: linear ramp of the learning rate.
        clip_gradient_norm: bound on the gradient's norm.
        ema_decay: of the running average of the weights, which is what is kept.
        level_shares: weights of strides 4, 8 and 16 in the loss.
        distance_share: weight of the smooth L1 term.
        angle_share: weight of the 1 - cosine term.
        normalising_images: frames over which the targets' means and deviations are taken.
        held_out_images: frames for the explained variance.
        finishing_images: fresh frames for batch norm and channel scales.
        checkpoint_images: frames between two checkpoints, rounded to whole shards.
        bfloat16: compute networks in bfloat16 (faster where the CPU has it); weights and losses stay float32.
    """

    teachers: tuple[Teacher, ...]
    seed: int = 0
    images: int = 400_000
    batch_size: int = 16
    frame_size: int = 128
    canvas_size: int = 512
    texture_count: int = 120
    shard_size: int = 1024
    repeats: int = 2
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup_images: int = 4_000
    clip_gradient_norm: float = 5.0
    ema_decay: float = 0.998
    level_shares: tuple[float, float, float] = (0.25, 1.0, 1.0)
    distance_share: float = 2.0
    angle_share: float = 0.5
    normalising_images: int = 512
    held_out_images: int = 512
    finishing_images: int = 2048
    checkpoint_images: int = 10_240
    bfloat16: bool = False

    def __post_init__(self) -> None:
        """Refuse what does not divide."""
        if not self.teachers:
            raise ValueError("a student needs at least one teacher")
        if self.shard_size % self.batch_size or self.images % self.images_per_shard:
            raise ValueError("images must be whole shards with their repeats, and a shard whole batches")

    def with_images(self, images: int) -> "DistillConfig":
        """Return the same run with about so many images, rounded to whole shards, at least one."""
        whole = max(1, round(images / self.images_per_shard)) * self.images_per_shard
        return replace(self, images=whole)

    @property
    def images_per_shard(self) -> int:
        """Frames shown while one shard is taught."""
        return self.shard_size * self.repeats


@dataclass(frozen=True)
class Lesson:
    """Frames and what the teachers see in them.

    Attributes:
        frames: `(N, 3, H, W)` uint8.
        targets: for each level, for each teacher, `(N, C, h, w)` bfloat16, normalised by channel, `h, w <= 16`.
        offsets: `(levels, 2)`, first row and column at which larger maps were sampled.
    """

    frames: Tensor
    targets: list[list[Tensor]]
    offsets: Tensor


class Classroom:
    """Draws frames and asks the teachers; one in every process, all alike.

    Args:
        config: the run.

    Attributes:
        channels: for each level, the teachers' channel counts.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self._streams: dict[int, FrameStream] = {}
        self._teachers: list[CnnBackbone] = []
        for teacher in config.teachers:
            backbone = CnnBackbone(teacher.backbone, LAYERS)
            backbone.load_weights(safetensors.torch.load_file(teacher.weights))
            if backbone.strides != STRIDES:
                raise ValueError(f"{teacher.backbone} has strides {backbone.strides} where 4, 8, 16 are learnt")
            self._teachers.append(backbone)
        self.channels = [[teacher.channels[level] for teacher in self._teachers] for level in range(len(LAYERS))]
        self._normal = self._normalisation()

    def frames(self, stream: int, index: int) -> Tensor:
        """Draw one shard of a stream: `(N, 3, H, W)` uint8."""
        if stream not in self._streams:
            self._streams[stream] = FrameStream(
                self.config.seed * 4 + stream,
                frame_size=self.config.frame_size,
                canvas_size=self.config.canvas_size,
                texture_count=self.config.texture_count,
                shard_size=self.config.shard_size,
            )
        return torch.from_numpy(self._streams[stream].shard(index)).permute(0, 3, 1, 2)

    def lesson(self, stream: int, index: int) -> Lesson:
        """Draw a shard and let the teachers look at it."""
        frames = self.frames(stream, index)
        steps = [max(1, self.config.frame_size // stride // _LARGEST_TARGET) for stride in STRIDES]
        rng = np.random.default_rng((self.config.seed, stream, index))
        offsets = torch.from_numpy(rng.integers(0, np.array(steps)[:, None], (len(steps), 2)))
        collected: list[list[list[Tensor]]] = [[[] for _ in self._teachers] for _ in LAYERS]
        for batch in torch.split(frames, self.config.batch_size):
            for number, maps in enumerate(self._ask(batch)):
                for level, values in enumerate(maps):
                    mean, deviation = self._normal[level][number]
                    target = (sample_positions(values, offsets[level]) - mean) / deviation
                    collected[level][number].append(target.to(torch.bfloat16))
        return Lesson(frames, [[torch.cat(batches) for batches in level] for level in collected], offsets)

    @torch.no_grad()
    def _ask(self, frames: Tensor) -> Iterator[list[Tensor]]:
        """Let each teacher look at frames `(B, 3, H, W)` uint8."""
        images = (frames.float() / 255).contiguous(memory_format=torch.channels_last)
        for teacher in self._teachers:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bfloat16):
                yield [values.float() for values in teacher(images)]

    def _normalisation(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Take each target channel's mean and deviation, the latter floored at 5 % of the level's mean deviation."""
        frames = self.frames(NORMALISING, 0)[: self.config.normalising_images]
        moments: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for batch in torch.split(frames, self.config.batch_size):
            for number, maps in enumerate(self._ask(batch)):
                for level, values in enumerate(maps):
                    pair = values.mean(dim=(0, 2, 3)), values.square().mean(dim=(0, 2, 3))
                    moments.setdefault((level, number), []).append(pair)
        result: list[list[tuple[Tensor, Tensor]]] = []
        for level in range(len(LAYERS)):
            result.append([])
            for number in range(len(self._teachers)):
                first, second = (torch.stack(kind).mean(dim=0) for kind in zip(*moments[level, number], strict=True))
                deviation = (second - first.square()).clamp_min(0).sqrt()
                deviation = deviation.maximum(0.05 * deviation.mean())
                result[level].append((first.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)))
        return result


@contextmanager
def prepared_lessons(
    config: DistillConfig, classroom: Classroom, shards: range, workers: int
) -> Iterator[Iterator[Lesson]]:
    """Prepare the training lessons of some shards in order: when asked, or ahead of time in other processes."""
    if not workers:
        yield (classroom.lesson(TRAINING, shard) for shard in shards)
        return
    # Spawned, because a forked copy of a process that used torch's threads can hang.
    context = torch.multiprocessing.get_context("spawn")
    pool = context.Pool(workers, _start_worker, (config, torch.get_num_threads()))
    try:
        yield _ahead(pool, shards, workers + 1)
    finally:
        pool.terminate()
        pool.join()


def batches_of(config: DistillConfig, lesson: Lesson, shard: int) -> Iterator[tuple[Tensor, list[list[Tensor]]]]:
    """Cut a lesson into batches, as often as it is repeated, in another order each time."""
    for repeat in range(config.repeats):
        drawn = np.random.default_rng((config.seed, shard, repeat)).permutation(len(lesson.frames))
        for chosen in torch.split(torch.from_numpy(drawn), config.batch_size):
            yield lesson.frames[chosen], [[target[chosen] for target in level] for level in lesson.targets]


def sample_positions(values: Tensor, offset: Tensor) -> Tensor:
    """Take every k-th position of a map `(B, C, h, w)`, so that at most 16 a side are left."""
    step = max(1, values.shape[-1] // _LARGEST_TARGET)
    return values if step == 1 else values[..., int(offset[0]) :: step, int(offset[1]) :: step]


def _ahead(pool: Any, shards: range, lead: int) -> Iterator[Lesson]:
    pending: deque[Any] = deque()
    for shard in shards:
        pending.append(pool.apply_async(_lesson_in_worker, (shard,)))
        if len(pending) > lead:
            yield pending.popleft().get()
    while pending:
        yield pending.popleft().get()


_classroom_here: Classroom | None = None


def _start_worker(config: DistillConfig, threads: int) -> None:
    """Prepare a worker process."""
    global _classroom_here  # noqa: PLW0603  (a worker's initialiser has no other place for what it made)
    torch.set_num_threads(threads)
    _classroom_here = Classroom(config)


def _lesson_in_worker(shard: int) -> Lesson:
    """Prepare one lesson in a worker process."""
    if _classroom_here is None:
        raise RuntimeError("the worker was not started")
    return _classroom_here.lesson(TRAINING, shard)
