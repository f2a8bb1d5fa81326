"""Asks a detector about frames: one path for the PyTorch detector and for the exported graph.

Comes after fitting and again whenever a bundle is looked at. Frames are decoded and resized by the service's own
functions; what is made of the answers is told in `evaluate.py`.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.contract.frames import FrameLimits, fit_to_input, read_frame
from service.contract.geometry import InputSpec
from service.contract.pictures import contrast_of
from service.contract.tiling import Run
from service.errors import FlawlineError, UnreadableFrame
from training.data.loader import read_checked
from training.data.samples import Sample, parts_of
from training.progress import Reporter


@dataclass(frozen=True, eq=False)
class Answers:
    """What a detector said of frames, before any policy.

    Attributes:
        samples: one a frame.
        scores: `(n,)` float32 raw scores.
        maps: `(n, h, w)` float32.
        frame_sizes: `(height, width)` of each original frame.
        contrasts: of what the network took of each frame (`service.contract.pictures`).
    """

    samples: tuple[Sample, ...]
    scores: NDArray[np.float32]
    maps: NDArray[np.float32]
    frame_sizes: tuple[tuple[int, int], ...]
    contrasts: tuple[float, ...]

    @property
    def labels(self) -> NDArray[np.int64]:
        """`(n,)`, 1 = anomalous, 0 = normal."""
        return np.array([sample.label for sample in self.samples], np.int64)

    @property
    def parts(self) -> NDArray[np.int64]:
        """`(n,)`, which part each frame shows; views of one part share a number."""
        return np.array(parts_of(self.samples), np.int64)

    def take(self, indices: Sequence[int]) -> "Answers":
        """Return what was said of some of the frames."""
        return Answers(
            samples=tuple(self.samples[i] for i in indices),
            scores=self.scores[list(indices)],
            maps=self.maps[list(indices)],
            frame_sizes=tuple(self.frame_sizes[i] for i in indices),
            contrasts=tuple(self.contrasts[i] for i in indices),
        )


class _Fitted(NamedTuple):
    pixels: NDArray[np.uint8]
    frame_size: tuple[int, int]
    contrast: float


def ask(
    run: Run,
    samples: Sequence[Sample],
    spec: InputSpec,
    reporter: Reporter,
    *,
    title: str,
    content: Mapping[Path, str] | None = None,
    line_index: int = 0,
    batch_size: int = 8,
    threads: int = 2,
) -> Answers:
    """Run frames through a detector or a graph, the next batch being decoded while this one runs.

    Args:
        run: the detector or the graph; of frames that are cut, `by_tiles` of it.
        samples: at least one.
        spec: the network's input.
        reporter: shows how far the work is.
        title: what the bar says.
        content: SHA-256 in hex of each frame's file, as the check of the data set saw it; None where nobody looked.
        line_index: of the line that the frames show, among those of the run or bundle.
        batch_size: frames a call of `run`.
        threads: decoders at work.

    Raises:
        DatasetFault: if a file is no longer what the check of the data set saw.
        UnreadableFrame: if a frame can't be decoded; the sentence names the file.
    """
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    scores, maps = [], []
    sizes: list[tuple[int, int]] = []
    contrasts: list[float] = []
    with ThreadPoolExecutor(threads) as pool, reporter.bar(title, len(samples)) as bar:

        def begin(index: int) -> list[Future[_Fitted]]:
            return (
                [pool.submit(_read, sample, spec, content) for sample in batches[index]] if index < len(batches) else []
            )

        waiting = begin(0)
        for index, batch in enumerate(batches):
            ready = [future.result() for future in waiting]
            waiting = begin(index + 1)
            batch_scores, batch_maps = run(
                np.stack([fitted.pixels for fitted in ready]), np.full(len(batch), line_index, np.int64)
            )
            scores.append(batch_scores)
            maps.append(batch_maps)
            sizes.extend(fitted.frame_size for fitted in ready)
            contrasts.extend(fitted.contrast for fitted in ready)
            bar.advance(len(batch))
    return Answers(tuple(samples), np.concatenate(scores), np.concatenate(maps), tuple(sizes), tuple(contrasts))


def spread(answers: Answers) -> list[Sample]:
    """Order frames so that any first few of them are spread over all scores: median first, then quarters, eighths."""
    by_score = [answers.samples[i] for i in np.argsort(answers.scores, kind="stable")]
    order: dict[int, None] = {}
    pieces = 1
    while len(order) < len(by_score):
        pieces *= 2
        order.update(dict.fromkeys(odd * len(by_score) // pieces for odd in range(1, pieces, 2)))
        if pieces > 2 * len(by_score):
            order.update(dict.fromkeys(range(len(by_score))))
    return [by_score[i] for i in order]


def _read(sample: Sample, spec: InputSpec, content: Mapping[Path, str] | None) -> _Fitted:
    data = read_checked(sample.path, content)
    try:
        frame = read_frame(data, FrameLimits(), spec)
    except FlawlineError as error:
        raise UnreadableFrame(f"{sample.path}: {error.sentence}") from error
    canvas = fit_to_input(frame.pixels, spec)
    return _Fitted(canvas, (frame.height, frame.width), contrast_of(canvas))
