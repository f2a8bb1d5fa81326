"""What a run says of itself in the bundle: manifest, facts of the report, and files.

Comes after the report and before the store.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import (
    CALIBRATION_FILE,
    MODEL_FILE,
    POLICY_FILE,
    BackboneRecord,
    DataRecord,
    LabelledDefectsRecord,
    LineRecord,
    Manifest,
    OutputSpec,
    ParityRecord,
    line_file,
)
from service.contract.calibration import Calibration
from service.contract.geometry import InputSpec
from service.contract.graph import opset_of
from service.contract.policy import Policy, ScoreRule
from service.contract.tiling import Run, cut_tiles
from training.backbones.weight_lock import digest_of
from training.calibrate import Calibrated
from training.config import RunConfig
from training.data.labelled_defects import LabelledDefects
from training.data.samples import ANOMALOUS, NORMAL
from training.fitting.fit import FitReport
from training.lines import GatheredLine
from training.measuring.answers import Answers
from training.measuring.evaluate import Evaluation, to_records, without_test_frames
from training.reporting.page_data import Fact, RunFacts
from training.reproducibility import Provenance

_FIRST_VERSION = "1"  # replaced by the store, which alone knows which is free


@dataclass(frozen=True, eq=False)
class MeasuredLine:
    """What the steps of a run returned for one of its lines.

    Attributes:
        gathered: its frames.
        held_out: answers to the good frames that thresholds rest on.
        tested: answers to the test frames, or None where there are none.
        calibrated: thresholds and policy.
        evaluation: of the test frames, or None where there are none.
    """

    gathered: GatheredLine
    held_out: Answers
    tested: Answers | None
    calibrated: Calibrated
    evaluation: Evaluation | None

    @property
    def name(self) -> str:
        """Name of the line."""
        return self.gathered.name

    @property
    def answers(self) -> dict[str, Answers]:
        """Raw answers by the name of their set."""
        return {"held_out": self.held_out} | ({} if self.tested is None else {"test": self.tested})


@dataclass(frozen=True, eq=False)
class RunRecord:
    """What the steps of a run returned, as far as manifest and report tell it.

    Attributes:
        name: of the bundle.
        config: of the run.
        lines: in the order of their indices.
        warnings: what is worth knowing of the lines together.
        backbone: its weights, or None.
        labelled_defects: what the detector learnt from beside good frames, or None.
        reference: the good frame that it compares others with, or None.
        output: of the graph.
        fitting: what happened.
        model: bytes of the graph.
        parity: of the graph.
        provenance: seeds, libraries, revision, time.
        device: where the detector was fitted.
        processes: how many fitted it together.
    """

    name: str
    config: RunConfig
    lines: Sequence[MeasuredLine]
    warnings: tuple[str, ...]
    backbone: BackboneRecord | None
    labelled_defects: LabelledDefects | None
    reference: Path | None
    output: OutputSpec
    fitting: FitReport
    model: bytes
    parity: ParityRecord
    provenance: Provenance
    device: str
    processes: int = 1


def output_of(
    graph: Run, canvas: NDArray[np.uint8], line_index: np.int64, spec: InputSpec, rule: ScoreRule
) -> OutputSpec:
    """Return what a graph answers to one network input, asked about a part of a canvas `(H, W, 3)` uint8."""
    _, maps = graph(cut_tiles(canvas, spec)[:1], np.array([line_index], np.int64))
    _, height, width = maps.shape
    return OutputSpec(map_height=height, map_width=width, score_rule=rule)


def make_manifest(run: RunRecord) -> Manifest:
    """Return the manifest of a run, complete but for version and digests, which the store adds."""
    return Manifest(
        name=run.name,
        lines=tuple(line.name for line in run.lines),
        version=_FIRST_VERSION,
        detector=run.config.detector,
        backbone=run.backbone,
        hyperparameters=run.config.model_dump(mode="json"),
        input=run.config.frame_input,
        output=run.output,
        opset=opset_of(run.model),
        precision=run.config.precision,
        by_line={line.name: _line_record(line, run.config) for line in run.lines},
        labelled_defects=_labelled_record(run.labelled_defects),
        evaluation_resolution=run.config.evaluation_resolution,
        parity=run.parity,
        golden=run.config.golden,
        seed=run.provenance.seed,
        libraries=run.provenance.libraries,
        git_revision=run.provenance.git_revision,
        created_at=run.provenance.created_at,
        files={},
    )


def _labelled_record(defects: LabelledDefects | None) -> LabelledDefectsRecord | None:
    return None if defects is None else LabelledDefectsRecord(digest=defects.digest, frames=defects.marked)


def _tell_labelled(defects: LabelledDefects | None) -> dict[str, str]:
    return {} if defects is None else {"Labelled defects": f"{defects.marked} frames, {defects.digest}"}


def _tell_reference(run: RunRecord) -> dict[str, str]:
    if run.reference is None:
        return {}
    root = run.lines[0].gathered.data.dataset.root  # whoever holds a reference is fitted on one line
    return {"Reference frame": f"{run.reference.relative_to(root).as_posix()}, SHA-256 {digest_of(run.reference)}"}


def tell_facts(run: RunRecord) -> RunFacts:
    """Return what the report says of a run."""
    seconds = ", ".join(f"{name} {duration:.0f} s" for name, duration in run.fitting.seconds.items())
    libraries = ", ".join(f"{name} {version}" for name, version in run.provenance.libraries.items())
    together = "" if run.processes == 1 else f", by {run.processes} processes"
    facts = {
        "Input": tell_input(run.config.frame_input),
        "Backbone weights": "none" if run.backbone is None else f"{run.backbone.source}, {run.backbone.digest}",
        **_tell_labelled(run.labelled_defects),
        **_tell_reference(run),
        "Network digest": hashlib.sha256(run.model).hexdigest(),
        "Fitting": f"on {run.device}{together}{': ' + seconds if seconds else ''}",
        "Seed": str(run.provenance.seed),
        "Sources": run.provenance.git_revision or "not a checkout",
        "Libraries": libraries,
    }
    return RunFacts(
        name=run.name,
        detector=run.config.detector,
        backbone=None if run.backbone is None else run.backbone.name,
        created_at=run.provenance.created_at,
        facts=tuple(Fact(name=name, value=value) for name, value in facts.items()),
        configuration=run.config.to_yaml(),
        losses=tuple((point.stage, point.step, sum(point.terms.values())) for point in run.fitting.losses),
        parity=run.parity,
        warnings=run.warnings,
    )


def tell_input(spec: InputSpec) -> str:
    """Say in words what becomes of a frame."""
    size = f"{spec.canvas_height}x{spec.canvas_width}"
    resized = f"{spec.resize_height}x{spec.resize_width}"
    cropped = "" if size == resized else f", cropped from {resized}"
    if spec.tiles is None:
        return f"{size} pixels (height x width){cropped}"
    overlap = f"{spec.tiles.overlap_height} and {spec.tiles.overlap_width}"
    return (
        f"{size} pixels (height x width){cropped}, cut into {spec.tiles.rows} rows and {spec.tiles.columns} columns of "
        f"tiles of {spec.height}x{spec.width} that overlap by {overlap} pixels"
    )


def _names_of(line: GatheredLine) -> tuple[str, ...]:
    root = line.data.dataset.root
    return tuple(sample.path.relative_to(root).as_posix() for sample in line.fitted_on)


def tell_line_facts(line: MeasuredLine) -> tuple[Fact, ...]:
    """Return what the report says of one line's frames."""
    counts = ", ".join(f"{count} {name}" for name, count in line.gathered.data.counts.items())
    height, width = line.gathered.data.frame_size
    fitted_on, held_out = len(line.gathered.fitted_on), len(line.held_out.samples)
    parts, copies = line.calibrated.calibration.good_parts, line.gathered.copies
    of_parts = "" if parts == held_out else f" that show {parts} parts"
    without = f", {copies} left out as copies" if copies else ""
    return (
        Fact(name="Frames", value=f"{counts}; {fitted_on} fitted on, {held_out} held out{of_parts}{without}"),
        Fact(name="Frame size", value=f"{height}x{width} pixels (height x width)"),
        Fact(name="Data digest", value=line.gathered.data.digest),
    )


def bundle_files(
    model: bytes,
    calibrations: Mapping[str, Calibration],
    policies: Mapping[str, Policy],
    golden: Mapping[str, bytes],
) -> dict[str, bytes]:
    """Return a bundle's files by relative path, all but the report, manifest and sidecar.

    Args:
        model: the graph.
        calibrations: good-part values of each line that was calibrated.
        policies: default rules, by line.
        golden: files of the golden set.
    """
    files = {MODEL_FILE: model, **golden}
    lines = list(policies)
    for line in lines:
        if line in calibrations:
            files[line_file(line, lines, CALIBRATION_FILE)] = calibrations[line].to_bytes()
        files[line_file(line, lines, POLICY_FILE)] = policies[line].model_dump_json(indent=2).encode() + b"\n"
    return files


def _line_record(line: MeasuredLine, config: RunConfig) -> LineRecord:
    labels = [] if line.tested is None else [sample.label for sample in line.tested.samples]
    return LineRecord(
        data=DataRecord(
            name=line.gathered.data.dataset.name,
            digest=line.gathered.data.digest,
            fitted_on=len(line.gathered.fitted_on),
            calibrated_on=len(line.held_out.samples),
            calibrated_parts=line.calibrated.calibration.good_parts,
            copies_left_out=line.gathered.copies,
            tested_on_normal=labels.count(NORMAL),
            tested_on_anomalous=labels.count(ANOMALOUS),
            shots=() if config.shots is None else _names_of(line.gathered),
            frame_sizes=line.gathered.data.frame_sizes,
        ),
        review_rate=config.review_rate,
        fail_rate=config.fail_rate,
        metrics=to_records(without_test_frames() if line.evaluation is None else line.evaluation.metrics),
    )
