"""What a run says of itself in the bundle: manifest, facts of the report, files, and the last look before publishing.

Comes after the report and before the store.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.contract.bundle import (
    CALIBRATION_FILE,
    MODEL_FILE,
    POLICY_FILE,
    REPORT_FILE,
    BackboneRecord,
    Bundle,
    DataRecord,
    LineRecord,
    Manifest,
    OutputSpec,
    ParityRecord,
    load_bundle,
)
from service.contract.golden import Run, read_golden, replay
from service.contract.graph import opset_of
from service.contract.policy import ScoreRule
from training.calibrate import Calibrated
from training.config import RunConfig
from training.data.check import CheckedDataset
from training.data.samples import ANOMALOUS, NORMAL, Sample
from training.evaluate import Answers, Evaluation, to_records, without_test_frames
from training.fit import FitReport
from training.report import Fact, RunFacts
from training.reproducibility import Provenance

_FIRST_VERSION = "1"  # replaced by the store, which alone knows which is free


@dataclass(frozen=True, eq=False)
class RunRecord:
    """What the steps of a run returned, as far as manifest and report tell it.

    Attributes:
        name: of the bundle and its line.
        config: of the run.
        data: the checked data set.
        fitted_on: good frames that the detector was fitted on.
        held_out: answers to the good frames that thresholds rest on.
        evaluation: of the test frames, or None where there are none.
        backbone: its weights, or None.
        score_rule: how scores are reduced from maps.
        fitting: what happened.
        calibrated: thresholds and policy.
        model: bytes of the graph.
        parity: of the graph.
        provenance: seeds, libraries, revision, time.
        device: where the detector was fitted.
    """

    name: str
    config: RunConfig
    data: CheckedDataset
    fitted_on: Sequence[Sample]
    held_out: Answers
    evaluation: Evaluation | None
    backbone: BackboneRecord | None
    score_rule: ScoreRule
    fitting: FitReport
    calibrated: Calibrated
    model: bytes
    parity: ParityRecord
    provenance: Provenance
    device: str


def make_manifest(run: RunRecord) -> Manifest:
    """Return the manifest of a run, complete but for version and digests, which the store adds."""
    tested = () if run.evaluation is None else run.evaluation.answers.samples
    height, width = run.held_out.maps.shape[1:]
    return Manifest(
        name=run.name,
        lines=(run.name,),
        version=_FIRST_VERSION,
        detector=run.config.detector,
        backbone=run.backbone,
        hyperparameters=run.config.model_dump(mode="json"),
        input=run.config.input,
        output=OutputSpec(map_height=height, map_width=width, score_rule=run.score_rule),
        opset=opset_of(run.model),
        precision="fp32",
        by_line={
            run.name: LineRecord(
                data=DataRecord(
                    name=run.data.dataset.name,
                    digest=run.data.digest,
                    fitted_on=len(run.fitted_on),
                    calibrated_on=len(run.held_out.samples),
                    tested_on_normal=sum(sample.label == NORMAL for sample in tested),
                    tested_on_anomalous=sum(sample.label == ANOMALOUS for sample in tested),
                ),
                review_rate=run.config.review_rate,
                fail_rate=run.config.fail_rate,
                metrics=to_records(without_test_frames() if run.evaluation is None else run.evaluation.metrics),
            )
        },
        evaluation_resolution=run.config.evaluation_resolution,
        parity=run.parity,
        golden=run.config.golden,
        seed=run.provenance.seed,
        libraries=run.provenance.libraries,
        git_revision=run.provenance.git_revision,
        created_at=run.provenance.created_at,
        files={},
    )


def tell_facts(run: RunRecord) -> RunFacts:
    """Return what the report says of a run."""
    spec = run.config.input
    cropped = f", cropped from {spec.resize_height}x{spec.resize_width}" if spec.height != spec.resize_height else ""
    counts = ", ".join(f"{count} {name}" for name, count in run.data.counts.items())
    seconds = ", ".join(f"{name} {duration:.0f} s" for name, duration in run.fitting.seconds.items())
    libraries = ", ".join(f"{name} {version}" for name, version in run.provenance.libraries.items())
    facts = {
        "Frames": f"{counts}; {len(run.fitted_on)} fitted on, {len(run.held_out.samples)} held out",
        "Data digest": run.data.digest,
        "Input": f"{spec.height}x{spec.width} pixels (height x width){cropped}",
        "Backbone weights": "none" if run.backbone is None else f"{run.backbone.source}, {run.backbone.digest}",
        "Network digest": hashlib.sha256(run.model).hexdigest(),
        "Fitting": f"on {run.device}{': ' + seconds if seconds else ''}",
        "Seed": str(run.provenance.seed),
        "Sources": run.provenance.git_revision or "not a checkout",
        "Libraries": libraries,
    }
    return RunFacts(
        line=run.name,
        detector=run.config.detector,
        backbone=None if run.backbone is None else run.backbone.name,
        created_at=run.provenance.created_at,
        facts=tuple(Fact(name=name, value=value) for name, value in facts.items()),
        configuration=run.config.to_yaml(),
        losses=tuple((point.stage, point.step, sum(point.terms.values())) for point in run.fitting.losses),
        parity=run.parity,
        warnings=run.data.warnings,
    )


def bundle_files(model: bytes, calibrated: Calibrated, golden: Mapping[str, bytes], page: str) -> dict[str, bytes]:
    """Return a bundle's files by relative path, all but manifest and sidecar."""
    return {
        MODEL_FILE: model,
        CALIBRATION_FILE: calibrated.calibration.to_bytes(),
        POLICY_FILE: calibrated.policy.model_dump_json(indent=2).encode() + b"\n",
        REPORT_FILE: page.encode(),
        **golden,
    }


def verify_bundle(path: Path, run: Run) -> Bundle:
    """Read a bundle as the service will, and replay its golden set.

    Raises:
        BundleRefused: if the service would refuse it.
    """
    bundle = load_bundle(path)
    replay(bundle, read_golden(bundle), run)
    return bundle
