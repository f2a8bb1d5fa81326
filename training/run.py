"""One run, told from a folder of frames to a bundle in the store; every step is done elsewhere.

Data flows through return values; what a run keeps on its way lies in its directory (`run_directory.py`).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from service.contract.bundle import Manifest, MetricRecord
from service.contract.frames import FrameLimits
from service.contract.regions import Polygon
from training.bundles import RunRecord, bundle_files, make_manifest, tell_facts, verify_bundle
from training.calibrate import Calibrated, calibrate, read_region_of_interest, refuse_unsupported_rates
from training.checkpoint import load_checkpoint
from training.config import RunConfig
from training.data.check import CheckedDataset, check_dataset
from training.data.detect import read_dataset
from training.data.loader import FileFrames, load_frame
from training.data.samples import UNKNOWN, Sample
from training.data.split import split_good
from training.detectors import PreparedDetector, choose_device, prepare_detector
from training.evaluate import Answers, ask, evaluate, spread
from training.export import DetectorRun, GraphRun, check_parity, export_graph
from training.fit import CheckpointPlan, FitReport, FitSettings, fit
from training.golden import GoldenChooser
from training.progress import Reporter
from training.report import ReportData, collect, render
from training.reproducibility import describe_run, make_deterministic
from training.run_directory import RunRequest, keep_request, keep_results
from training.store import publish

_FIRST_POLICY = "1"
_PARITY_FRAMES = 18
# What decides how a detector is fitted; other keys may change between a run and its export.
_FITTING_KEYS = {"detector", "backbone", "hyperparameters", "input", "seed", "hold_out"}

Beginning = Literal["new", "resume", "export"]


class RunNotFitted(Exception):
    """The run's fitting is not complete; the sentence says how to complete it."""


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """Where things are, and what the table at the end says.

    Attributes:
        bundle: directory in the store.
        directory: of the run.
        manifest: of the bundle, without version and digests.
        report: what the page shows.
        fitting: what happened, and how long it took.
    """

    bundle: Path
    directory: Path
    manifest: Manifest
    report: ReportData
    fitting: FitReport

    @property
    def metrics(self) -> dict[str, MetricRecord]:
        """Figures of the test frames."""
        return self.manifest.by_line[self.manifest.name].metrics


def train(request: RunRequest, directory: Path, reporter: Reporter, beginning: Beginning = "new") -> FinishedRun:
    """Run from frames to bundle.

    Args:
        request: what is wanted.
        directory: of the run; made where it is missing.
        reporter: shows how far the run is.
        beginning: fit anew, go on from the checkpoint, or only export what is completely fitted.

    Raises:
        Exception: a fault of any step, each a type of its own with a sentence that tells what to do; they are listed
            in `training/__main__.py`.
    """
    config, spec = request.config, request.config.input
    device = choose_device(request.device)
    make_deterministic(config.seed)

    frames = _gather(request, reporter)
    prepared = prepare_detector(config, request.weights, request.weight_folders, device)
    keep_request(directory, request)
    fitting = _fit(prepared, frames, config, directory, reporter, beginning)
    rule = prepared.score_rule

    run = DetectorRun(prepared.module, device)
    held_out = ask(run, frames.held_out, spec, reporter, title="good frames", batch_size=config.batch_size)
    tested = None
    if frames.tested:
        tested = ask(run, frames.tested, spec, reporter, title="test frames", batch_size=config.batch_size)
    calibrated = _calibrate(held_out, prepared, config, frames.region_of_interest)
    evaluation = None
    if tested is not None:
        evaluation = evaluate(tested, calibrated.policy, rule, spec, config.evaluation_resolution, seed=config.seed)

    reporter.note("exporting, and comparing the graph with PyTorch")
    on_cpu = DetectorRun(prepared.module.to("cpu"), torch.device("cpu"))
    model = export_graph(prepared.detector)
    graph = GraphRun(model)
    shown = _some_frames(held_out, tested, config)
    only_line = np.zeros(len(shown), np.int64)
    parity = check_parity(on_cpu, graph, shown, only_line, [calibrated.policy], rule, spec.window(1, 1))
    chooser = GoldenChooser(graph, request.name, 0, calibrated.policy, rule, spec, config.golden, config.seed)
    golden = chooser.choose(held_out, tested, config.golden_frames)

    record = RunRecord(
        name=request.name,
        config=config,
        data=frames.data,
        fitted_on=frames.fitted_on,
        held_out=held_out,
        evaluation=evaluation,
        backbone=prepared.backbone,
        score_rule=rule,
        fitting=fitting,
        calibrated=calibrated,
        model=model,
        parity=parity,
        provenance=describe_run(config.seed, datetime.now(UTC)),
        device=str(device),
    )
    manifest = make_manifest(record)
    report = collect(tell_facts(record), calibrated, held_out, evaluation, rule, spec, config.evaluation_resolution)
    page = render(report)
    keep_results(
        directory,
        manifest.by_line[request.name].metrics,
        report,
        page,
        {"held_out": held_out} | ({"test": tested} if tested else {}),
    )
    files = bundle_files(model, calibrated, golden, page)
    bundle = publish(request.store, manifest, files, check=lambda path: verify_bundle(path, graph))
    return FinishedRun(bundle, directory, manifest, report, fitting)


class _Frames(NamedTuple):
    data: CheckedDataset
    fitted_on: list[Sample]
    held_out: list[Sample]
    tested: list[Sample]
    region_of_interest: tuple[Polygon, ...] | None


def _gather(request: RunRequest, reporter: Reporter) -> _Frames:
    """Read and check everything that could end the run, before the first hour is spent on fitting."""
    config = request.config
    region = None if request.region_of_interest is None else read_region_of_interest(request.region_of_interest)
    dataset = read_dataset(request.line_folder)
    fitted_on, held_out = split_good(dataset, config.hold_out)
    refuse_unsupported_rates(len(held_out), config.review_rate, config.fail_rate)
    tested = [sample for sample in dataset.test if sample.label != UNKNOWN]
    return _Frames(check_dataset(dataset, FrameLimits(), reporter), fitted_on, held_out, tested, region)


def _fit(
    prepared: PreparedDetector,
    frames: _Frames,
    config: RunConfig,
    directory: Path,
    reporter: Reporter,
    beginning: Beginning,
) -> FitReport:
    fitting = json.dumps(config.model_dump(mode="json", include=_FITTING_KEYS), sort_keys=True)
    identity = {
        "configuration": hashlib.sha256(fitting.encode()).hexdigest(),
        "data": frames.data.digest,
        "backbone": "none" if prepared.backbone is None else prepared.backbone.digest,
    }
    if beginning == "export":
        _refuse_unfitted(directory, identity, prepared)
    plan = CheckpointPlan(directory, identity, resume=beginning != "new")
    source = FileFrames([sample.path for sample in frames.fitted_on], config.input, FrameLimits())
    try:
        return fit(prepared.module, source, FitSettings(seed=config.seed), reporter, plan)
    finally:
        source.close()


def _refuse_unfitted(directory: Path, identity: dict[str, str], prepared: PreparedDetector) -> None:
    state = load_checkpoint(directory, identity)
    stages = prepared.detector.stages()
    if state.stage < len(stages):
        raise RunNotFitted(
            f"Fitting stands at the stage {stages[state.stage].name!r}; complete it first: flawline train --resume "
            f"{directory}"
        )


def _calibrate(
    held_out: Answers,
    prepared: PreparedDetector,
    config: RunConfig,
    region: tuple[Polygon, ...] | None,
) -> Calibrated:
    return calibrate(
        held_out.scores,
        held_out.maps,
        prepared.score_rule,
        review_rate=config.review_rate,
        fail_rate=config.fail_rate,
        version=_FIRST_POLICY,
        region_of_interest=region,
        window=config.input.window(1, 1),
    )


def _some_frames(held_out: Answers, tested: Answers | None, config: RunConfig) -> NDArray[np.uint8]:
    """Return frames for the parity check, `(n, H, W, 3)` uint8, spread over the scores of good and test frames."""
    chosen: Sequence[Sample] = spread(held_out)[:_PARITY_FRAMES]
    if tested is not None:
        half = _PARITY_FRAMES // 2
        chosen = [*chosen[:half], *spread(tested)[:half]]
    return np.stack([load_frame(sample.path, config.input, FrameLimits()) for sample in chosen])
