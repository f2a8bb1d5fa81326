"""A bundle without training frames: a detector that judges a line it never saw, told from a name to the store.

Two kinds of detectors can do it: those that fit nothing at all (GRNR), and those that a run fitted on other lines and
whose configuration says how they judge a new one (`zero_shot_settings`; INP-Former and INP-Former++ show the distance
to their prototypes instead of what their decoder rebuilds). There are no good parts, hence no calibration: such a line
gets no verdict, until `flawline calibrate` brings good parts, or unless its policy says that each frame is measured by
itself (`service.contract.policy`). Golden frames are generated; they prove the device, not the line.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from models import DETECTORS
from service.contract.bundle import BackboneRecord, DataRecord, LineRecord, Manifest, OutputSpec, ParityRecord
from service.contract.frames import fit_to_input
from service.contract.geometry import InputSpec
from service.contract.graph import opset_of
from service.contract.policy import Policy, ScoreRule, spread_of
from service.contract.tiling import Run, by_tiles
from service.errors import FrameNotComparable
from training.bundling.bundles import bundle_files, output_of, tell_input
from training.bundling.export import DetectorRun, GraphRun, check_parity, export_graph
from training.bundling.fitted_frames import write_fitted_frames
from training.bundling.store import probe_store, publish
from training.config import ConfigFault, RunConfig
from training.fitting.checkpoint import load_checkpoint, restore_detector
from training.fitting.detectors import PreparedDetector, prepare_detector
from training.golden import GoldenChooser, GoldenFrame, golden_files, plant_defect
from training.lines import lines_given_up, refuse_taken_lines
from training.measuring.evaluate import to_records, without_test_frames
from training.procedural.textures import draw_texture
from training.progress import Reporter
from training.reporting.page_data import Fact, RunFacts
from training.reporting.report import render_zero_shot
from training.reproducibility import Provenance, describe_run, make_deterministic
from training.run_directory import RunRequest

Calibration = Literal["none", "self"]

_FIRST = "1"
# Robust standard deviations above a frame's own middle. The second is that of GRNR's zero-shot mode; the band below it,
# in which a person should look, is ours.
_SELF_REVIEW, _SELF_FAIL = 6.0, 8.0
# A frame must spread so many times as much as the most restless of the flat frames, whose maps show the network alone.
_FLAT_LEVELS, _ABOVE_FLAT = (0, 64, 128, 192, 255), 2.0
# SHA-256 over the frames that made the bundle, of which there are none.
_NO_FRAMES = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@dataclass(frozen=True)
class ZeroShotRequest:
    """What somebody asked for.

    Attributes:
        name: of the bundle and its line.
        store: where the bundle goes.
        config: which detector, and how it judges.
        calibration: `none` for a line that waits for good parts, `self` for one whose frames measure themselves.
        weights: a safetensors file, "untrained", or None to search by the backbone's name.
        weight_folders: folders that may hold the file.
        fitted_in: directory of the run on other lines, or None for a detector that is not fitted.
        fitted_for: what that run was asked for.
    """

    name: str
    store: Path
    config: RunConfig
    calibration: Calibration = "none"
    weights: Literal["untrained"] | Path | None = None
    weight_folders: tuple[Path, ...] = ()
    fitted_in: Path | None = None
    fitted_for: RunRequest | None = None


@dataclass(frozen=True, eq=False)
class _Made:
    """What the steps returned, as far as manifest and report tell it."""

    request: ZeroShotRequest
    model: bytes
    graph: GraphRun
    policy: Policy
    rule: ScoreRule
    golden: list[GoldenFrame]
    parity: ParityRecord
    output: OutputSpec
    backbone: BackboneRecord | None
    provenance: Provenance
    warnings: tuple[str, ...]


def make_zero_shot(request: ZeroShotRequest, reporter: Reporter) -> Path:
    """Publish a bundle that no frame of its line has made.

    Returns:
        The bundle's directory in the store.

    Raises:
        StoreRefused, StoreFailed: if the store can't be written.
        ParameterInvalid: if another bundle of the store serves the line.
        ConfigFault: if the detector has to be fitted on the line it judges, or its maps of textures are as flat as
            those of flat frames.
        CheckpointRefused: if the run's checkpoint is missing, damaged, or another backbone's.
        WeightsUnavailable: if no backbone weights could be had.
        ExportFailed: if the graph can't be made, or does not say what the detector says.
        GoldenFailed: if no generated frame is clear of the thresholds.
    """
    config, spec = request.config, request.config.frame_input
    if config.precision != "fp32":
        raise ConfigFault("A zero-shot bundle is fp32: without frames nobody can tell what another precision changes.")
    probe_store(request.store, request.name)
    refuse_taken_lines(request.store, request.name, [request.name])
    warnings = lines_given_up(request.store, request.name, [request.name])
    for warning in warnings:
        reporter.note(warning)
    make_deterministic(config.seed)
    prepared = prepare_detector(config, request.weights, request.weight_folders, torch.device("cpu"))
    if request.fitted_in is None:
        _refuse_unfitted(prepared, config.detector)
    else:
        _take_over(prepared, request.fitted_in)
    rule = prepared.score_rule

    reporter.note("exporting, and comparing the graph with PyTorch")
    model = export_graph(prepared.detector)
    graph = GraphRun(model)
    whole = by_tiles(graph, spec, rule)
    frames = generate_frames(spec, config.golden_frames, config.seed)
    inputs = np.stack([fit_to_input(pixels, spec) for pixels, _ in frames])
    policy = _choose_policy(whole, inputs, spec, request.calibration)
    on_cpu = by_tiles(DetectorRun(prepared.module, torch.device("cpu")), spec, rule)
    of_line = np.zeros(len(inputs), np.int64)
    chooser = GoldenChooser(whole, request.name, 0, policy, rule, spec, config.golden, config.seed)
    try:
        parity = check_parity(on_cpu, whole, inputs, of_line, [policy], rule, spec.window(1, 1))
        golden = chooser.take(frames, is_calibrated=False)
    except FrameNotComparable as error:
        raise ConfigFault(
            f"The maps of this {config.detector} spread hardly more over a texture than over a flat frame, so frames "
            "can't be measured by themselves; leave --calibration self out, and calibrate the bundle with good parts."
        ) from error

    made = _Made(
        request=request,
        model=model,
        graph=graph,
        policy=policy,
        rule=rule,
        golden=golden,
        parity=parity,
        output=output_of(graph, inputs[0], of_line[0], spec, rule),
        backbone=prepared.backbone,
        provenance=describe_run(config.seed, datetime.now(UTC)),
        warnings=warnings,
    )
    files = bundle_files(model, {}, {request.name: policy}, golden_files(made.golden))
    if request.fitted_for is None:  # nothing was fitted; of other lines' frames only their run knew
        files |= write_fitted_frames(())

    def page(version: str) -> str:
        return _render(made, version)

    return publish(request.store, _make_manifest(made), files, graph, page)


def zero_shot_config(fitted: RunConfig) -> RunConfig:
    """Return a run's configuration, changed so that its detector judges lines that it was not fitted on.

    Raises:
        ConfigFault: if the detector has no such way.
    """
    settings = getattr(DETECTORS[fitted.detector].config, "zero_shot_settings", None)
    if settings is None:
        able = [name for name, entry in DETECTORS.items() if hasattr(entry.config, "zero_shot_settings")]
        raise ConfigFault(
            f"The detector {fitted.detector} judges only lines that it was fitted on; leave --zero-shot out, or take a "
            f"run of {' or '.join(sorted(able))}."
        )
    return fitted.model_copy(update={"hyperparameters": {**fitted.hyperparameters, **settings}})


def generate_frames(spec: InputSpec, count: int, seed: int) -> list[tuple[NDArray[np.uint8], str]]:
    """Draw generated textures, every second one with a planted defect, and say what each one shows.

    Args:
        spec: the network's input; frames have its size before the crop.
        count: how many.
        seed: of everything that is drawn.

    Returns:
        Frames `(h, w, 3)` uint8 RGB and their descriptions.
    """
    height, width = spec.resize_height, spec.resize_width
    generator = np.random.default_rng(seed)
    frames = []
    for index in range(count):
        grey = draw_texture(generator, max(64, height, width))[:height, :width]
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
        if index % 2 == 0:
            frames.append((pixels, "a generated texture"))
        else:
            frames.append((plant_defect(pixels, generator, 0.3), "a generated texture with a planted defect"))
    return frames


def _refuse_unfitted(prepared: PreparedDetector, detector: str) -> None:
    if not prepared.detector.stages():
        return
    raise ConfigFault(
        f"The detector {detector} has to be fitted: flawline train LINE_FOLDER --detector {detector}. A run on other "
        "lines can judge a new one where its method allows that: flawline export RUN --zero-shot --name NAME."
    )


def _take_over(prepared: PreparedDetector, directory: Path) -> None:
    """Load what a run on other lines has fitted; its frames need not be here any more."""
    digest = "none" if prepared.backbone is None else prepared.backbone.digest
    state = load_checkpoint(directory, {"backbone": digest}, only_named=True)
    stages = prepared.detector.stages()
    if state.stage < len(stages):
        raise ConfigFault(
            f"Fitting stands at the stage {stages[state.stage].name!r}; complete it first: flawline train --resume "
            f"{directory}"
        )
    # What only the other lines need is left out, as the head of INP-Former++.
    asked_for = prepared.module.state_dict().keys()
    restore_detector(prepared.module, {name: state.detector[name] for name in state.detector if name in asked_for})


def _choose_policy(run: Run, inputs: NDArray[np.uint8], spec: InputSpec, calibration: Calibration) -> Policy:
    """Return the default policy: thresholds in a frame's own units, or ones that only stand where some must stand."""
    if calibration == "self":
        return Policy(
            version=_FIRST,
            review_threshold=_SELF_REVIEW,
            fail_threshold=_SELF_FAIL,
            region_threshold=_SELF_REVIEW,
            map_floor=0.0,
            calibration="self",
            least_spread=_ABOVE_FLAT * _restlessness(run, spec),
        )
    scores, maps = run(inputs, np.zeros(len(inputs), np.int64))
    # No score is ever compared with these; they give heatmaps a scale and golden scores a size.
    largest, middle = float(scores.max()), float(np.median(maps))
    return Policy(
        version=_FIRST,
        review_threshold=largest,
        fail_threshold=largest,
        region_threshold=max(float(maps.max()), float(np.nextafter(np.float32(middle), np.float32(np.inf)))),
        map_floor=middle,
    )


def _restlessness(run: Run, spec: InputSpec) -> float:
    """Return the largest spread of the maps of flat frames; never 0."""
    flat = np.stack([np.full((spec.canvas_height, spec.canvas_width, 3), level, np.uint8) for level in _FLAT_LEVELS])
    _, maps = run(flat, np.zeros(len(flat), np.int64))
    return max(float(np.finfo(np.float32).tiny), *(spread_of(anomaly_map) for anomaly_map in maps))


def _make_manifest(made: _Made) -> Manifest:
    request, provenance = made.request, made.provenance
    fitted = request.fitted_for
    data = DataRecord(
        name="no frames" if fitted is None else f"frames of {', '.join(line.name for line in fitted.lines)}",
        digest=_NO_FRAMES,
        fitted_on=0,
        calibrated_on=0,
        tested_on_normal=0,
        tested_on_anomalous=0,
    )
    return Manifest(
        name=request.name,
        lines=(request.name,),
        version=_FIRST,
        detector=request.config.detector,
        backbone=made.backbone,
        hyperparameters=request.config.model_dump(mode="json"),
        input=request.config.frame_input,
        output=made.output,
        opset=opset_of(made.model),
        precision="fp32",
        by_line={
            request.name: LineRecord(
                data=data, review_rate=None, fail_rate=None, metrics=to_records(without_test_frames())
            )
        },
        evaluation_resolution=request.config.evaluation_resolution,
        parity=made.parity,
        golden=request.config.golden,
        seed=provenance.seed,
        libraries=provenance.libraries,
        git_revision=provenance.git_revision,
        created_at=provenance.created_at,
        files={},
    )


def _render(made: _Made, version: str) -> str:
    request, fitted = made.request, made.request.fitted_for
    facts = {
        "Fitted on": "nothing" if fitted is None else f"other lines: {', '.join(line.name for line in fitted.lines)}",
        "Backbone weights": "none" if made.backbone is None else f"{made.backbone.source}, {made.backbone.digest}",
        "Input": tell_input(request.config.frame_input),
        "Sources": made.provenance.git_revision or "not a checkout",
        "Libraries": ", ".join(f"{name} {version}" for name, version in made.provenance.libraries.items()),
    }
    run = RunFacts(
        name=request.name,
        detector=request.config.detector,
        backbone=None if made.backbone is None else made.backbone.name,
        created_at=made.provenance.created_at,
        facts=tuple(Fact(name=name, value=value) for name, value in facts.items()),
        configuration=request.config.to_yaml(),
        losses=(),
        parity=made.parity,
        warnings=made.warnings,
    )
    return render_zero_shot(run, version, made.policy, made.golden, made.rule, request.config.frame_input)
