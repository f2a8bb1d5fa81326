"""Fits a detector as publications do and measures it: on all good training frames, without thresholds or a bundle.

A run for a plant (`training/run.py`) holds good frames back to calibrate on, and publishes what it fitted. A published
figure rests on neither, so this way is shorter: checked lines → fit on every good training frame, or a few → figures of
each line's test frames. Frames that a data set keeps for validation are not fitted on; where its makers' figures rest
on them, they are asked about. Frames are decoded, resized and measured by the same functions as in a run.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from service.contract.bundle import BackboneRecord, MetricRecord
from service.contract.frames import FrameLimits
from service.contract.policy import Policy
from service.contract.tiling import by_tiles
from training.bundling.export import DetectorRun
from training.config import RunConfig
from training.data.check import CheckedDataset, check_dataset
from training.data.detect import Category, read_dataset
from training.data.loader import FileFrames
from training.data.samples import NORMAL, UNKNOWN, DatasetFault, Sample
from training.data.shots import choose_shots
from training.data.views import views_of
from training.fitting.checkpoint import has_checkpoint
from training.fitting.detectors import PreparedDetector, choose_device, prepare_detector
from training.fitting.fit import CheckpointPlan, FitSettings, fit
from training.measuring.answers import ask
from training.measuring.evaluate import evaluate, needs_held_out, to_records
from training.progress import Reporter
from training.reproducibility import make_deterministic

# Ranking figures know no threshold. No map value reaches this one, so no time goes into describing regions.
_NO_VERDICTS = Policy(version="1", review_threshold=0, fail_threshold=0, region_threshold=3e38, map_floor=0)


@dataclass(frozen=True)
class Equipment:
    """What measuring needs besides its description.

    Attributes:
        weights: a safetensors file, "untrained", or None to search by the backbone's name.
        weight_folders: folders that may hold the file.
        device: where to fit.
    """

    weights: Path | Literal["untrained"] | None = None
    weight_folders: tuple[Path, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Measured:
    """What was found of one fitted detector.

    Attributes:
        figures: of each line, by name; an undefined one has a reason.
        frames: of each line: fitted on, tested normal, tested anomalous.
        shots: of each line, names of the few frames fitted on; empty where all were.
        backbone: its weights, or None.
        device: where the detector was fitted.
        fit_s: seconds of fitting, in this process.
        warnings: what the check of the data allowed but wants known.
    """

    figures: dict[str, dict[str, MetricRecord]]
    frames: dict[str, tuple[int, int, int]]
    shots: dict[str, tuple[str, ...]]
    backbone: BackboneRecord | None
    device: str
    fit_s: float
    warnings: tuple[str, ...]


def check_line(line: Category, config: RunConfig, reporter: Reporter) -> CheckedDataset:
    """Open every file of a line once, and say what is allowed but worth knowing.

    Raises:
        DatasetFault: if a file can't be used, or no test frame has a known label.
    """
    dataset = read_dataset(line.folder, line.layout)
    if all(sample.label == UNKNOWN for sample in dataset.test):
        raise DatasetFault(f"{line.folder} has no test frame whose label is known; there is nothing to measure on.")
    checked = check_dataset(dataset, FrameLimits(), reporter, as_published=True, bit_depth=config.input.bit_depth)
    checked.tell(line.name, reporter)
    return checked


def measure(
    lines: Mapping[str, CheckedDataset],
    config: RunConfig,
    equipment: Equipment,
    directory: Path,
    digest: str,
    reporter: Reporter,
) -> Measured:
    """Fit one detector on all lines together and measure it on each.

    Args:
        lines: by name, one, or several in a multi-class run.
        config: of the run; rates, hold-out and golden set are not used, its shots are.
        equipment: weights and device.
        directory: keeps the checkpoint while fitting; what lies there under the same digest is gone on with.
        digest: of everything that the result depends on.
        reporter: shows how far the work is.

    Raises:
        Exception: a fault of any step, each with a sentence; they are listed in `training/faults.py`.
    """
    device = choose_device(equipment.device)
    make_deterministic(config.seed)
    prepared = prepare_detector(config, equipment.weights, equipment.weight_folders, device, len(lines))
    chosen = [_to_fit_on(data, config) for data in lines.values()]
    begun = time.monotonic()
    content = {path: sha for data in lines.values() for path, sha in data.content.items()}
    plan = CheckpointPlan(directory, {"cell": digest}, has_checkpoint(directory))
    _fit(prepared, chosen, content, config, plan, reporter)
    fit_s = time.monotonic() - begun

    spec, rule = config.frame_input, prepared.score_rule
    run = by_tiles(DetectorRun(prepared.module, device), spec, rule)
    asked = partial(ask, run, spec=spec, reporter=reporter, content=content, batch_size=config.batch_size)
    figures, frames = {}, {}
    for index, (name, data) in enumerate(lines.items()):
        tested = [sample for sample in data.dataset.test if sample.label != UNKNOWN]
        answers = asked(samples=tested, title=f"test frames of {name}", line_index=index)
        held_out, kept_out = None, data.dataset.validation_good
        if kept_out and needs_held_out(tested):
            held_out = asked(samples=kept_out, title=f"validation frames of {name}", line_index=index)
        found = evaluate(
            answers, _NO_VERDICTS, rule, spec, config.evaluation_resolution, held_out=held_out, seed=config.seed
        )
        figures[name] = to_records(found.metrics)
        good = sum(sample.label == NORMAL for sample in tested)
        frames[name] = (len(chosen[index]), good, len(tested) - good)
    warnings = tuple(warning for data in lines.values() for warning in data.warnings)
    shots = {} if config.shots is None else dict(zip(lines, map(_names, lines.values(), chosen), strict=True))
    return Measured(figures, frames, shots, prepared.backbone, str(device), fit_s, warnings)


def _to_fit_on(data: CheckedDataset, config: RunConfig) -> list[Sample]:
    if config.shots is None:
        return list(data.dataset.train_good)
    return choose_shots(data.dataset, config.shots, config.shot_seed)[0]


def _names(data: CheckedDataset, samples: Sequence[Sample]) -> tuple[str, ...]:
    return tuple(sample.path.relative_to(data.dataset.root).as_posix() for sample in samples)


def _fit(
    prepared: PreparedDetector,
    chosen: Sequence[Sequence[Sample]],
    content: Mapping[Path, str],
    config: RunConfig,
    plan: CheckpointPlan,
    reporter: Reporter,
) -> None:
    files = [(sample.path, index) for index, samples in enumerate(chosen) for sample in samples]
    spec = config.frame_input
    frames = FileFrames(
        [path for path, _ in files], spec, FrameLimits(), [index for _, index in files], content=content
    )
    try:
        fit(
            prepared.module,
            views_of(frames, spec, makes_views=config.makes_views),
            FitSettings(seed=config.seed),
            reporter,
            plan,
        )
    finally:
        frames.close()
