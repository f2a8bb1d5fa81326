"""One run, told from the frames of its lines to a bundle in the store; every step is done elsewhere.

Data flows through return values; what a run keeps on its way lies in its directory (`run_directory.py`).
"""

import hashlib
import json
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from service.contract.bundle import Manifest, MetricRecord, ParityRecord
from service.contract.frames import FrameLimits, encode_png
from service.contract.geometry import InputSpec
from service.contract.policy import ScoreRule
from service.contract.tiling import Run, by_tiles, cut_tiles
from training.bundling.bundles import (
    MeasuredLine,
    RunRecord,
    bundle_files,
    make_manifest,
    output_of,
    tell_facts,
    tell_line_facts,
)
from training.bundling.export import DetectorRun, GraphRun, check_parity, export_graph
from training.bundling.fitted_frames import fitted_frames_file
from training.bundling.precision import JudgedFrames, check_verdicts, layers_of, lower_precision
from training.bundling.store import StoreFailed, StoreRefused, probe_store, publish
from training.calibrate import calibrate
from training.config import ConfigFault, RunConfig
from training.data.labelled_defects import LabelledDefects, read_labelled_defects
from training.data.loader import FileFrames, load_frame
from training.data.samples import Sample
from training.data.views import inputs_of_frame, views_of
from training.fitting.checkpoint import CheckpointRefused, kept_identity, load_checkpoint
from training.fitting.detectors import (
    PreparedDetector,
    choose_device,
    give_labelled_defects,
    prepare_detector,
    refuse_labelled_defects,
    refuse_unseen_defects,
)
from training.fitting.fit import CheckpointPlan, FitReport, FitSettings, fit
from training.fitting.import_checkpoint import adopt_released
from training.fitting.peers import Alone, Peers
from training.golden import GoldenChooser, GoldenFrame, golden_files, plant_defect
from training.lines import GatheredLine, GatheredLines, gather_lines, lines_split_by_names
from training.measuring.answers import ask, spread
from training.measuring.evaluate import evaluate
from training.measuring.peaks import mask_without_rim
from training.progress import Reporter, SilentReporter
from training.reporting.collect import collect
from training.reporting.page_data import LineReport, ReportData
from training.reporting.report import draw, render
from training.reproducibility import describe_run, make_deterministic
from training.run_directory import RunRequest, keep_request, keep_results, mask_path

_FIRST_POLICY = "1"
# Over all lines; a line gets its share, and a few at least.
_PARITY_FRAMES = 18
_FEWEST_PARITY_FRAMES = 4
# What decides how a detector is fitted; other keys may change between a run and its export.
_FITTING_KEYS = {"detector", "backbone", "hyperparameters", "input", "seed", "hold_out"}
_DEEPEST_BITS = 16
_FITTED_FRAMES = "set of fitted frames"
# The first releases kept a digest of all frames under it, and none of those that fitting saw.
_ALL_FRAMES = "data"
_SHOT_KEYS = {"shots", "shot_seed", "shot_views"}

# On which the ranges of activations are found.
_RANGE_FRAMES = 32
_PLANTED_FRAMES = 8

Beginning = Literal["new", "resume", "export", "import"]
# From the value of --roi to a command or a sentence that uses it.
HowToLeaveOut = Callable[[str], str]


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
    def metrics(self) -> dict[str, dict[str, MetricRecord]]:
        """Figures of the test frames, by line."""
        return {line: record.metrics for line, record in self.manifest.by_line.items()}


def train(
    request: RunRequest,
    directory: Path,
    reporter: Reporter,
    beginning: Beginning = "new",
    peers: Peers | None = None,
    how_to_leave_out: HowToLeaveOut | None = None,
) -> FinishedRun:
    """Run from frames to bundle.

    Args:
        request: what is wanted.
        directory: of the run; made where it is missing.
        reporter: shows how far the run is.
        beginning: fit anew, go on from the checkpoint, only export what is completely fitted, or take over what the
            method's authors fitted (`fitting/import_checkpoint.py` has then put it into the directory).
        peers: who fits together, this process being the first; the others call `help_to_fit`. None for this one alone.
        how_to_leave_out: says what to do with the mask that leaves the rim out, where the directory will not last;
            None for a new export of the directory.

    Raises:
        Exception: a fault of any step, each a type of its own with a sentence that tells what to do; they are listed
            in `training/__main__.py`.
    """
    config, spec = request.config, request.config.frame_input
    peers = peers or Alone()

    _refuse_ranges_of_nothing(request)
    probe_store(request.store, request.name)
    gathered, defects, prepared = _prepare(request, reporter)
    lines, device, rule = gathered.lines, prepared.device, prepared.score_rule
    if beginning != "export":  # what an export is asked for holds for that export alone
        keep_request(directory, request)
    fitting = _fit(prepared, gathered, defects, request, directory, reporter, beginning, peers)
    reference = _reference_of(prepared, gathered, config)
    peers.part()

    run = by_tiles(DetectorRun(prepared.module, device), spec, rule)
    measured = [_measure(run, index, line, len(lines), rule, config, reporter) for index, line in enumerate(lines)]

    reporter.note("exporting, and comparing the graph with PyTorch")
    on_cpu = by_tiles(DetectorRun(prepared.module.to("cpu"), torch.device("cpu")), spec, rule)
    model = export_graph(prepared.detector)
    graph = GraphRun(model)
    whole = by_tiles(graph, spec, rule)
    policies = {line.name: line.calibrated.policy for line in measured}
    shown, line_index = _some_frames(measured, config)
    parity = check_parity(on_cpu, whole, shown, line_index, list(policies.values()), rule, spec.window(1, 1))
    if config.precision != "fp32":
        reporter.note(f"bringing the graph to {config.precision}, measuring and calibrating again with it")
        model, parity, measured = _lower(model, config, gathered, measured, rule, reporter)
        graph = GraphRun(model)
        whole = by_tiles(graph, spec, rule)
        policies = {line.name: line.calibrated.policy for line in measured}
    golden = golden_files(
        [frame for index, line in enumerate(measured) for frame in _choose_golden(whole, index, line, rule, config)]
    )

    record = RunRecord(
        name=request.name,
        config=config,
        lines=measured,
        warnings=gathered.warnings,
        backbone=prepared.backbone,
        labelled_defects=defects,
        reference=reference,
        output=output_of(graph, shown[0], line_index[0], spec, rule),
        fitting=fitting,
        model=model,
        parity=parity,
        provenance=describe_run(config.seed, datetime.now(UTC)),
        device=str(device),
        processes=request.processes,
    )
    manifest = make_manifest(record)
    report = ReportData(
        run=tell_facts(record),
        resolution=config.evaluation_resolution,
        lines=tuple(_report_line(line, rule, spec) for line in measured),
    )
    drawings = draw(report)  # of both pages, the run's and the bundle's
    page = render(report, drawings=drawings)
    masks = _leave_rims_out(measured, directory, spec, reporter, how_to_leave_out or partial(_export_with, directory))
    keep_results(directory, manifest, report, page, {line.name: line.answers for line in measured}, masks)
    calibrations = {line.name: line.calibrated.calibration for line in measured}
    files = bundle_files(model, calibrations, policies, golden) | fitted_frames_file(gathered.lines)
    try:
        bundle = publish(
            request.store,
            manifest,
            files,
            graph,
            page=lambda version: render(report, version, drawings),
        )
    except (StoreRefused, StoreFailed) as fault:
        raise type(fault)(f"{fault} {_how_to_publish(directory, beginning)}") from fault
    return FinishedRun(bundle, directory, manifest, report, fitting)


def _refuse_ranges_of_nothing(request: RunRequest) -> None:
    if request.released is not None and request.config.precision == "int8":
        raise ConfigFault(
            "precision: int8 finds the ranges of values on good frames that fitting saw, and nothing was fitted here: "
            f"the detector comes from {request.released}. Take fp16 or fp32."
        )


def _how_to_publish(directory: Path, beginning: Beginning) -> str:
    options = " and the options of this one" if beginning == "export" else ""
    command = shlex.join(("flawline", "export", str(directory), "--store"))
    return f"The fit is kept; once that is mended, or with another store{options}: {command} STORE"


def help_to_fit(request: RunRequest, directory: Path, beginning: Beginning, peers: Peers) -> None:
    """Do the part of a run that processes after the first one have: fit with it, and write nothing.

    Args:
        request: as the first process has it.
        directory: of the run; read where the run is resumed.
        beginning: as the first process has it.
        peers: who fits together.

    Raises:
        Exception: as `train`.
    """
    silent = SilentReporter()
    gathered, defects, prepared = _prepare(request, silent)
    _fit(prepared, gathered, defects, request, directory, silent, beginning, peers)
    peers.part()


def _prepare(request: RunRequest, reporter: Reporter) -> tuple[GatheredLines, LabelledDefects | None, PreparedDetector]:
    config = request.config
    device = choose_device(request.device)
    make_deterministic(config.seed)
    if request.labelled_defects is not None:
        refuse_labelled_defects(config)
    prepared = prepare_detector(config, request.weights, request.weight_folders, device, len(request.lines))
    if prepared.backbone is not None:
        reporter.note(f"backbone {prepared.backbone.name}, weights: {prepared.backbone.source}")
    gathered = gather_lines(request, reporter)
    defects = _read_defects(request.labelled_defects, gathered, config.frame_input)
    if defects is not None:
        give_labelled_defects(prepared, defects)
    return gathered, defects, prepared


def _read_defects(folder: Path | None, gathered: GatheredLines, spec: InputSpec) -> LabelledDefects | None:
    if folder is None:
        return None
    known = [sample for line in gathered.lines for sample in line.data.dataset.samples]
    return read_labelled_defects(folder, spec, FrameLimits(), known)


def _fit(
    prepared: PreparedDetector,
    gathered: GatheredLines,
    defects: LabelledDefects | None,
    request: RunRequest,
    directory: Path,
    reporter: Reporter,
    beginning: Beginning,
    peers: Peers,
) -> FitReport:
    config = request.config
    fitting = json.dumps(_deciding(config), sort_keys=True)
    identity = {
        "configuration": hashlib.sha256(fitting.encode()).hexdigest(),
        _FITTED_FRAMES: gathered.fitting_digest,
        "backbone": "none" if prepared.backbone is None else prepared.backbone.digest,
    }
    if defects is not None:
        identity["labelled defects"] = defects.digest
    if copies := sum(line.copies for line in gathered.lines):
        # Runs that fitted on copies as well split the other frames otherwise: what they fitted on would be held out.
        identity["treatment of copied frames"] = f"{copies} left out"
    if request.processes > 1:
        identity["processes"] = str(request.processes)
    if beginning in ("resume", "export"):
        _refuse_older_split(directory, identity, lines_split_by_names(gathered, request))
    if beginning == "import":
        adopt_released(prepared.detector, directory, identity)
    if beginning == "export":
        _refuse_unfitted(directory, identity, prepared)
    plan = CheckpointPlan(directory, identity, resume=beginning != "new")
    frames = FileFrames(
        gathered.fitted_on, config.frame_input, FrameLimits(), gathered.fitted_on_lines, content=gathered.content
    )
    try:
        seen = views_of(frames, config.frame_input, makes_views=config.makes_views)
        if defects is not None and beginning != "export":
            refuse_unseen_defects(prepared, len(seen), request.processes)
        return fit(
            prepared.module,
            seen,
            FitSettings(seed=config.seed, shares=request.processes),
            reporter,
            plan,
            peers=peers,
        )
    finally:
        frames.close()


def _reference_of(prepared: PreparedDetector, gathered: GatheredLines, config: RunConfig) -> Path | None:
    """Return the good frame that a detector compares others with, if it holds one."""
    index = getattr(prepared.module, "reference_index", None)
    if index is None or int(index) < 0:
        return None
    return gathered.fitted_on[int(index) // inputs_of_frame(config.frame_input, makes_views=config.makes_views)]


def _deciding(config: RunConfig) -> dict[str, Any]:
    """Return what decides how a detector is fitted; keys that came later count only where they are used."""
    keys = _FITTING_KEYS if config.shots is None else _FITTING_KEYS | _SHOT_KEYS
    deciding: dict[str, Any] = config.model_dump(mode="json", include=keys)
    if config.input.bit_depth == _DEEPEST_BITS:
        del deciding["input"]["bit_depth"]
    return deciding if config.tiles is None else deciding | {"tiles": config.tiles.model_dump()}


def _refuse_older_split(directory: Path, identity: Mapping[str, str], by_names: Sequence[str]) -> None:
    """Refuse a run that an older release fitted on frames that are held out now, or that might be.

    Args:
        directory: of the run.
        identity: what its identity would be now.
        by_names: lines whose frames older releases split in another order.

    Raises:
        CheckpointRefused: saying why nothing but a new fit helps.
    """
    kept = kept_identity(directory)
    if _ALL_FRAMES in kept:
        raise CheckpointRefused(
            f"{directory} was fitted by an older release, which did not keep which good frames it was fitted on, and "
            "since then others can be held out: those that the run was fitted on would set its thresholds. Train again."
        )
    differing = {key for key in kept.keys() | identity.keys() if kept.get(key) != identity.get(key)}
    if by_names and differing == {_FITTED_FRAMES}:
        raise CheckpointRefused(
            f"{directory} belongs to a run with another {_FITTED_FRAMES}; put back what was changed, or begin another "
            "run. Where nothing was changed, an older release fitted it, which took the last number in each name for "
            f"the order of good frames. Those numbers don't count the frames of {', '.join(by_names)}, so folders and "
            "whole names order them now, and others can be held out: those that the run was fitted on would set its "
            "thresholds. Train again."
        )


def _refuse_unfitted(directory: Path, identity: dict[str, str], prepared: PreparedDetector) -> None:
    state = load_checkpoint(directory, identity)
    stages = prepared.detector.stages()
    if state.stage < len(stages):
        raise RunNotFitted(
            f"Fitting stands at the stage {stages[state.stage].name!r}; complete it first: flawline train --resume "
            f"{directory}"
        )


def _measure(
    run: Run,
    index: int,
    line: GatheredLine,
    lines: int,
    rule: ScoreRule,
    config: RunConfig,
    reporter: Reporter,
) -> MeasuredLine:
    """Ask a fitted detector about one line's frames, calibrate it there, and evaluate it."""
    of_line = "" if lines == 1 else f" of {line.name}"
    asked = partial(
        ask,
        run,
        spec=config.frame_input,
        reporter=reporter,
        content=line.data.content,
        line_index=index,
        batch_size=config.batch_size,
    )
    held_out = asked(samples=line.held_out, title=f"good frames{of_line}")
    tested = asked(samples=line.tested, title=f"test frames{of_line}") if line.tested else None
    calibrated = calibrate(
        held_out.scores,
        held_out.maps,
        rule,
        review_rate=config.review_rate,
        fail_rate=config.fail_rate,
        version=_FIRST_POLICY,
        region_of_interest=line.region_of_interest,
        window=config.frame_input.window(1, 1),
        parts=held_out.parts,
    )
    evaluation = None
    if tested is not None:
        resolution = config.evaluation_resolution
        evaluation = evaluate(
            tested, calibrated.policy, rule, config.frame_input, resolution, held_out=held_out, seed=config.seed
        )
    return MeasuredLine(line, held_out, tested, calibrated, evaluation)


def _export_with(directory: Path, roi: str) -> str:
    return shlex.join(("flawline", "export", str(directory), "--roi", roi))


def _leave_rims_out(
    lines: Sequence[MeasuredLine],
    directory: Path,
    spec: InputSpec,
    reporter: Reporter,
    how_to_leave_out: HowToLeaveOut,
) -> dict[str, bytes]:
    """Say which lines' thresholds are set by the rim of the frame, and return masks that leave it out, as PNGs."""
    masks = {}
    for line in lines:
        peaks = line.calibrated.peaks
        if peaks.gather_at_rim:
            masks[line.name] = encode_png(mask_without_rim(line.held_out.frame_sizes[0], spec.window(1, 1)))
            path = mask_path(directory, line.name, [each.name for each in lines])
            roi = str(path) if len(lines) == 1 else f"{line.name}={path}"
            reporter.note(
                f"{peaks.at_rim} of {len(peaks.places)} held-out good frames of {line.name} look oddest in the outer "
                "eighth of what the detector sees, so the rim sets the thresholds, and smaller defects elsewhere pass. "
                f"If it need not be inspected: {how_to_leave_out(roi)}"
            )
    return masks


def _lower(
    model: bytes,
    config: RunConfig,
    gathered: GatheredLines,
    exact: Sequence[MeasuredLine],
    rule: ScoreRule,
    reporter: Reporter,
) -> tuple[bytes, ParityRecord, list[MeasuredLine]]:
    """Return the graph in the wanted precision, how far it is from float32, and its lines measured with it."""
    precision = config.precision
    if precision == "fp32":
        raise ValueError("float32 is what the graph is in")
    spec = config.frame_input
    frames, shown = _frames_for_ranges(gathered, config)
    lowered = lower_precision(model, precision, frames, shown, config.keep_float)
    graphs = tuple(by_tiles(GraphRun(one), spec, rule) for one in (model, lowered))
    measured = [
        _measure(graphs[1], index, line.gathered, len(exact), rule, config, reporter)
        for index, line in enumerate(exact)
    ]
    compared = []
    for index, lines in enumerate(zip(exact, measured, strict=True)):
        planted = _plant(lines[0], config)
        of_line = np.full(len(planted), index, np.int64)
        before, after = (
            _judged(line, *_in_turn(graph, planted, of_line)) for line, graph in zip(lines, graphs, strict=True)
        )
        compared.append((before, after))
    parity = check_verdicts(precision, compared, rule, spec.window(1, 1), layers_of(model))
    return lowered, parity, measured


def _frames_for_ranges(gathered: GatheredLines, config: RunConfig) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return some of the frames that were fitted on, `(n, H, W, 3)` uint8, and their lines; none for who needs none."""
    spec, count = config.frame_input, len(gathered.fitted_on) if config.precision == "int8" else 0
    seen = range(0, count, max(1, count // _RANGE_FRAMES))[:_RANGE_FRAMES]
    tiles = [cut_tiles(load_frame(gathered.fitted_on[i], spec, FrameLimits()), spec) for i in seen]
    shown = [gathered.fitted_on_lines[i] for i, cut in zip(seen, tiles, strict=True) for _ in cut]
    return np.concatenate([np.empty((0, spec.height, spec.width, 3), np.uint8), *tiles]), np.array(shown, np.int64)


def _plant(line: MeasuredLine, config: RunConfig) -> NDArray[np.uint8]:
    """Return held-out good frames with defects planted on them, `(n, H, W, 3)` uint8."""
    generator = np.random.default_rng(config.seed)
    chosen = spread(line.held_out)[:_PLANTED_FRAMES]
    return np.stack(
        [
            plant_defect(load_frame(sample.path, config.frame_input, FrameLimits()), generator, (i + 1) / len(chosen))
            for i, sample in enumerate(chosen)
        ]
    )


def _in_turn(
    graph: Run, frames: NDArray[np.uint8], line_index: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    answers = [graph(frames[i : i + 1], line_index[i : i + 1]) for i in range(len(frames))]
    return np.concatenate([scores for scores, _ in answers]), np.concatenate([maps for _, maps in answers])


def _judged(line: MeasuredLine, scores: NDArray[np.float32], maps: NDArray[np.float32]) -> JudgedFrames:
    """Return what a graph says of a line's held-out, test and further frames."""
    answers = line.answers.values()
    return JudgedFrames(
        scores=np.concatenate([*(answer.scores for answer in answers), scores]),
        maps=np.concatenate([*(answer.maps for answer in answers), maps]),
        policy=line.calibrated.policy,
    )


def _some_frames(lines: Sequence[MeasuredLine], config: RunConfig) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return frames for the parity check, `(n, H, W, 3)` uint8, and the line that each shows, `(n,)`.

    They are spread over the scores of good and test frames, and lines take turns, so that every batch mixes them.
    """
    count = max(_FEWEST_PARITY_FRAMES, _PARITY_FRAMES // len(lines))
    turns: dict[int, list[tuple[int, Sample]]] = defaultdict(list)
    for index, line in enumerate(lines):
        chosen = spread(line.held_out)[:count]
        if line.tested is not None:
            chosen = [*chosen[: count // 2], *spread(line.tested)[: count // 2]]
        for turn, sample in enumerate(chosen):
            turns[turn].append((index, sample))
    mixed = [pair for turn in sorted(turns) for pair in turns[turn]]
    frames = np.stack([load_frame(sample.path, config.frame_input, FrameLimits()) for _, sample in mixed])
    return frames, np.array([index for index, _ in mixed], np.int64)


def _choose_golden(graph: Run, index: int, line: MeasuredLine, rule: ScoreRule, config: RunConfig) -> list[GoldenFrame]:
    policy = line.calibrated.policy
    chooser = GoldenChooser(graph, line.name, index, policy, rule, config.frame_input, config.golden, config.seed)
    return chooser.choose(line.held_out, line.tested, config.golden_frames)


def _report_line(line: MeasuredLine, rule: ScoreRule, spec: InputSpec) -> LineReport:
    facts, warnings = tell_line_facts(line), line.gathered.data.warnings
    section = collect(line.name, facts, warnings, line.calibrated, line.held_out, line.evaluation, rule, spec)
    # What the authors of a released detector fitted it on is not known.
    return section.model_copy(update={"is_unseen": bool(line.gathered.fitted_on)})
