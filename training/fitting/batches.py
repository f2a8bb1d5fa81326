"""Which frames each step of a fit sees, in which order, and how they are brought while the step before is at work.

An epoch's order depends on the seed and the epoch alone, so that a run which is resumed goes on with the same frames.
Knows of no detector.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from models.detector import Recipe
from training.data.loader import FrameSource, LineIndex


def planned_iterations(recipe: Recipe, frames: int) -> tuple[int, int]:
    """Return how many iterations a recipe makes of so many frames, and how many frames each one sees.

    The last incomplete batch of an epoch is dropped, unless it is the only one.
    """
    batch = min(recipe.batch_size, frames)
    if recipe.iterations is not None:
        return recipe.iterations, batch
    return (recipe.epochs or 0) * (frames // batch), batch


def orders_of(
    line_index: LineIndex, batch: int, seed: tuple[int, int], steps: Iterable[int]
) -> Iterator[Sequence[int]]:
    """Return the frames of each step; an epoch's order depends on the seed and the epoch alone."""
    per_epoch = len(line_index) // batch
    shuffled: tuple[int, list[int]] | None = None
    for step in steps:
        epoch, place = divmod(step, per_epoch)
        if shuffled is None or shuffled[0] != epoch:
            shuffled = epoch, _shuffle(line_index, np.random.default_rng((*seed, epoch))).tolist()
        yield shuffled[1][place * batch : (place + 1) * batch]


def _shuffle(line_index: LineIndex, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return as many frames as there are, every line equally often: `(n,)`.

    The lines come in rounds, each line once in a round, so that any batch is as mixed as it can be. A short line begins
    again within the epoch; of a long one the epoch shows a part. Frames of one line are simply permuted.
    """
    lines = np.unique(line_index)
    rounds = math.ceil(len(line_index) / len(lines))
    columns = []
    for line in lines:
        frames = np.flatnonzero(line_index == line)
        repeats = math.ceil(rounds / len(frames))
        columns.append(np.concatenate([generator.permutation(frames) for _ in range(repeats)])[:rounds])
    mixed = np.stack(columns, axis=1)
    if len(lines) > 1:
        mixed = generator.permuted(mixed, axis=1)
    return mixed.ravel()[: len(line_index)]


def taken_ahead(
    frames: FrameSource, orders: Iterable[Sequence[int]]
) -> Iterator[tuple[Sequence[int], NDArray[np.uint8]]]:
    """Take the frames of one batch while the batch before is worked on."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        coming: tuple[Sequence[int], Future[NDArray[np.uint8]]] | None = None
        for order in orders:
            before, coming = coming, (order, pool.submit(frames.take, order))
            if before is not None:
                yield before[0], before[1].result()
        if coming is not None:
            yield coming[0], coming[1].result()
