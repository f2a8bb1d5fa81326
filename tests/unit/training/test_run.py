"""Promises of a run that no step keeps alone: which frame a detector holds that compares all others with one."""

import hashlib

import numpy as np
import pytest
import torch

from models.detector import PassStage
from service.contract.bundle import ParityRecord
from service.contract.frames import FrameLimits
from tests.tiny_line import make_request, write_line
from training.bundling.bundles import MeasuredLine, RunRecord, tell_facts
from training.config import load_config
from training.data.loader import FileFrames
from training.data.views import views_of
from training.fitting.detectors import prepare_detector
from training.fitting.fit import FitReport
from training.lines import gather_lines
from training.progress import SilentReporter
from training.reproducibility import Provenance
from training.run import _reference_of

_TINY = ("input={height: 64, width: 64, resize_height: 64, resize_width: 64}", "hold_out.fraction=0.5")


@pytest.mark.parametrize("tiles", ["null", "{rows: 1, columns: 2}"], ids=["whole frames", "tiles"])
def test_report_of_a_detector_with_a_reference_names_its_file_and_digest(tmp_path, tiles):
    """Whoever asks why a part was rejected finds the frame that it was compared with, and can prove that it is it."""
    config = load_config("small", "rb_ae", [*_TINY, f"tiles={tiles}"])
    folder = write_line(tmp_path / "weave", good=40, tested=False)
    gathered = gather_lines(make_request(folder, tmp_path / "store", config=config), SilentReporter())
    prepared = prepare_detector(config, None, (), torch.device("cpu"))
    frames = FileFrames(gathered.fitted_on, config.frame_input, FrameLimits())
    shown = views_of(frames, config.frame_input, makes_views=False)
    for stage in prepared.detector.stages():
        if isinstance(stage, PassStage):
            stage.observe(torch.from_numpy(shown.take(range(len(shown)))).permute(0, 3, 1, 2) / 255)
            stage.finish()

    reference = _reference_of(prepared, gathered, config)
    facts = tell_facts(_record(config, gathered, reference)).facts

    held = prepared.module.reference.permute(1, 2, 0).numpy()
    of_file = FileFrames([reference], config.frame_input, FrameLimits())
    parts = views_of(of_file, config.frame_input, makes_views=False)
    assert any(np.array_equal(held, part) for part in parts.take(range(len(parts))))
    name = f"train/good/{reference.name}, SHA-256 {hashlib.sha256(reference.read_bytes()).hexdigest()}"
    assert [fact.value for fact in facts if fact.name == "Reference frame"] == [name]


def _record(config, gathered, reference):
    """Return what a run would tell of itself, with nothing measured."""
    line = MeasuredLine(gathered.lines[0], held_out=None, tested=None, calibrated=None, evaluation=None)
    return RunRecord(
        name="weave",
        config=config,
        lines=[line],
        warnings=(),
        backbone=None,
        labelled_defects=None,
        reference=reference,
        output=None,
        fitting=FitReport((), {}),
        model=b"",
        parity=ParityRecord(frames=1, map_difference=0, score_difference=0, verdicts_differ=0),
        provenance=Provenance(1, {}, None, "2026-01-01T00:00:00Z"),
        device="cpu",
    )
