"""The main job, told once: from a folder of frames to verdicts over HTTP.

Every step is the one that a user's own line takes: the same run, the same server process, frames posted as cameras post
them. Nothing is judged here that fitting or calibration saw.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from service.client import Outcome
from training.camera import fetch_overlay, post_frames, running_server
from training.config import RunConfig
from training.data.detect import read_dataset
from training.data.elpv import LICENCE, write_solar_cells
from training.data.samples import ANOMALOUS, UNKNOWN, Sample
from training.measuring.metrics import Metric, auroc
from training.progress import Reporter
from training.run import FinishedRun, train
from training.run_directory import LineRequest, RunRequest

CONNECTIONS = 8

_VERDICTS = ("PASS", "REVIEW", "FAIL", "NO_VERDICT")
_STAGES = ("receive", "decode", "queue", "infer", "postprocess", "encode", "total")
_LARGEST_DIFFERENCE = 1e-3
_PICTURES = 4


class DemoFailed(Exception):
    """The server's answers are not those of the offline evaluation; the sentence says which."""


@dataclass(frozen=True)
class Shooting:
    """All test frames, posted once.

    Attributes:
        samples: the frames.
        shots: their answers, in the same order.
        seconds: from the first frame to the last answer.
    """

    samples: Sequence[Sample]
    shots: Sequence[Outcome]
    seconds: float


def run_demo(
    line: Path | None,
    folder: Path,
    config: RunConfig,
    weights: Path | Literal["untrained"] | None,
    weight_folders: tuple[Path, ...],
    reporter: Reporter,
) -> None:
    """Fit, export, serve and inspect one line.

    Args:
        line: the user's frames, or None for the solar cells of the package `elpv-dataset`.
        folder: receives frames, store, run, log and overlays.
        config: of the run.
        weights: of the backbone; a file, "untrained", or None to look for them.
        weight_folders: where they are looked for.
        reporter: shows how far it is.

    Raises:
        DemoFailed: if the server answers otherwise than the offline evaluation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if line is None:
        reporter.note(LICENCE)
        line = write_solar_cells(folder / "frames" / "solar_cell")
    name = line.resolve().name
    request = RunRequest(
        name=name,
        lines=(LineRequest(name=name, folder=line),),
        store=folder / "store",
        config=config,
        weights=weights,
        weight_folders=weight_folders,
    )
    finished = train(request, folder / "run", reporter)

    log = folder / "server.log"
    with running_server(folder / "store", log) as url:
        shooting = _post_test_frames(url, name, line, reporter)
        overlays = _write_overlays(url, name, shooting, folder / "overlays")

    _show(shooting, finished, reporter)
    reporter.note(f"report    {finished.bundle / 'report.html'}")
    reporter.note(f"overlays  {folder / 'overlays'} ({overlays} pictures)")
    reporter.note(f"bundle    {finished.bundle}")
    reporter.note(f"log       {log} (one JSON line an inspection)")
    reporter.note(f"again     flawline serve --store {folder / 'store'}")
    _refuse_differences(shooting, finished)


def _post_test_frames(url: str, name: str, line: Path, reporter: Reporter) -> Shooting:
    samples = [sample for sample in read_dataset(line).test if sample.label != UNKNOWN]
    with reporter.bar(f"{CONNECTIONS} cameras", len(samples)) as bar:
        begun = time.perf_counter()
        shots = post_frames(
            url, name, [sample.path for sample in samples], connections=CONNECTIONS, on_shot=bar.advance
        )
        return Shooting(samples, shots, time.perf_counter() - begun)


def _write_overlays(url: str, name: str, shooting: Shooting, folder: Path) -> int:
    """Write the most and least anomalous frames of each group as the server draws them, named by rank and verdict."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    judged = [
        (sample, shot.answer)
        for sample, shot in zip(shooting.samples, shooting.shots, strict=True)
        if shot.answer is not None
    ]
    judged.sort(key=lambda pair: -pair[1].score)
    written = 0
    for label, group in ((ANOMALOUS, "defective"), (1 - ANOMALOUS, "good")):
        ranked = [pair for pair in judged if pair[0].label == label]
        chosen = ranked if len(ranked) <= 2 * _PICTURES else [*ranked[:_PICTURES], *ranked[-_PICTURES:]]
        for rank, (sample, answer) in enumerate(chosen, start=1):
            target = folder / f"{group}_{rank}_{answer.verdict}_{sample.kind}_{sample.path.stem}.png"
            target.write_bytes(fetch_overlay(url, name, sample.path))
            written += 1
    return written


def _show(shooting: Shooting, finished: FinishedRun, reporter: Reporter) -> None:
    kinds = sorted({(sample.label, sample.kind) for sample in shooting.samples})
    counts = Counter(
        (sample.kind, shot.verdict.value) for sample, shot in zip(shooting.samples, shooting.shots, strict=True)
    )
    reporter.table(
        "Verdicts over HTTP",
        ("frames", *_VERDICTS),
        [(kind, *(str(counts[kind, verdict]) for verdict in _VERDICTS)) for _, kind in kinds],
    )
    reporter.table(
        "Milliseconds over HTTP",
        ("stage", "p50", "p99"),
        [*(_percentiles(stage, shooting) for stage in _STAGES), _round_trip(shooting)],
    )
    offline = finished.report.lines[0].metrics.get("i_auroc")
    reporter.table(
        "Result",
        ("figure", "value"),
        [
            ("I-AUROC through HTTP", _tell(_auroc_over_http(shooting))),
            ("I-AUROC offline", "undefined" if offline is None or offline.value is None else f"{offline.value:.4f}"),
            ("frames a second", f"{len(shooting.shots) / shooting.seconds:.1f} ({CONNECTIONS} cameras)"),
        ],
    )


def _refuse_differences(shooting: Shooting, finished: FinishedRun) -> None:
    problems = [shot.problem.sentence for shot in shooting.shots if shot.problem is not None]
    if problems:
        raise DemoFailed(f"{len(problems)} of {len(shooting.shots)} frames got no verdict: {problems[0]}")
    online, offline = _auroc_over_http(shooting).value, finished.report.lines[0].metrics.get("i_auroc")
    if online is None or offline is None or offline.value is None:
        return
    if abs(online - offline.value) > _LARGEST_DIFFERENCE:
        raise DemoFailed(f"The I-AUROC is {online:.4f} through HTTP and {offline.value:.4f} offline.")


def _auroc_over_http(shooting: Shooting) -> Metric:
    judged = [
        (shot.answer.score, sample.label)
        for sample, shot in zip(shooting.samples, shooting.shots, strict=True)
        if shot.answer is not None
    ]
    return auroc([score for score, _ in judged], [label for _, label in judged])


def _percentiles(stage: str, shooting: Shooting) -> tuple[str, str, str]:
    return _row(stage, [getattr(shot.answer.timings_ms, stage) for shot in shooting.shots if shot.answer])


def _round_trip(shooting: Shooting) -> tuple[str, str, str]:
    return _row("round trip", [shot.elapsed_ms for shot in shooting.shots])


def _row(name: str, values: Sequence[float]) -> tuple[str, str, str]:
    if not values:
        return name, "-", "-"
    return name, f"{np.percentile(values, 50):.1f}", f"{np.percentile(values, 99):.1f}"


def _tell(metric: Metric) -> str:
    return f"undefined: {metric.reason}" if metric.value is None else f"{metric.value:.4f}"
