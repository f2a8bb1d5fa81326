"""Promises of bundles that no frame of their line has made: what they say of themselves, and what they refuse."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from service.contract.bundle import FITTED_FRAMES_FILE, load_bundle
from service.contract.golden import read_golden, replay
from service.contract.policy import Verdict, judge
from service.errors import FrameNotComparable, ParameterInvalid
from tests.factories import make_bundle, make_input, make_runner
from tests.tiny_line import TINY_GRNR, TINY_RUN, fit_only, make_config, make_request, write_line
from training.bundling.fitted_frames import read_fitted_frames
from training.config import ConfigFault, RunConfig
from training.fitting.checkpoint import CheckpointRefused, TrainingState, detector_tensors, save_checkpoint
from training.fitting.detectors import prepare_detector
from training.progress import SilentReporter
from training.recalibrate import read_good_folder, recalibrate
from training.run_directory import read_request
from training.zero_shot import ZeroShotRequest, generate_frames, make_zero_shot, zero_shot_config

_TINY_GRNR = RunConfig.model_validate(TINY_GRNR | {"product": "texture"})

_TINY_PP = TINY_RUN["hyperparameters"] | {
    "head_channels": [16, 8],
    "scale_distance": True,
    "head_recipe": TINY_RUN["hyperparameters"]["recipe"],
}


def _request(store, **changes):
    request = ZeroShotRequest(name="leather", store=store, config=_TINY_GRNR, weights="untrained")
    return replace(request, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of INP-Former's run on another line, whose frames are gone."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("run")
    line = write_line(place / "lines/screws")
    fit_only(make_request(line, place / "store"), place / "run")
    line.rename(place / "gone")
    return place / "run"


def _from_run(run, store, **changes):
    fitted = read_request(run)
    request = _request(store, config=zero_shot_config(fitted.config), fitted_in=run, fitted_for=fitted)
    return replace(request, **changes)


@pytest.fixture(scope="module")
def uncalibrated(run, tmp_path_factory):
    """A bundle of INP-Former, fitted on another line, that waits for good parts; its version before served one more."""
    store = tmp_path_factory.mktemp("none")
    make_bundle(store, "leather", lines=("leather", "lid"))
    return make_zero_shot(_from_run(run, store), SilentReporter())


@pytest.fixture(scope="module")
def measured_by_itself(tmp_path_factory):
    """A bundle of GRNR whose frames are measured by themselves."""
    return make_zero_shot(_request(tmp_path_factory.mktemp("self"), calibration="self"), SilentReporter())


def test_export_when_nothing_is_known_of_the_line_then_the_bundle_promises_nothing(uncalibrated):
    """There is no calibration, no rate, no figure and no golden verdict, and the service's own reader accepts it."""
    bundle = load_bundle(uncalibrated)
    golden = read_golden(bundle)

    replay(bundle, golden, make_runner(bundle.model))

    record = bundle.manifest.by_line["leather"]
    assert (record.data.fitted_on, record.data.calibrated_on) == (0, 0)
    assert (record.review_rate, record.fail_rate, dict(bundle.calibrations)) == (None, None, {})
    assert all(metric.value is None for metric in record.metrics.values())
    assert {answer.verdict for answer in golden.answers} == {Verdict.NO_VERDICT}
    assert bundle.policies["leather"].calibration == "good_parts"


def test_export_when_frames_measure_themselves_then_the_policy_says_so_with_the_published_threshold(measured_by_itself):
    """FAIL begins at eight robust deviations, golden frames have verdicts, and some of them are not PASS."""
    bundle = load_bundle(measured_by_itself)
    policy, golden = bundle.policies["leather"], read_golden(bundle)

    replay(bundle, golden, make_runner(bundle.model))

    assert (policy.calibration, policy.review_threshold, policy.fail_threshold) == ("self", 6.0, 8.0)
    assert dict(bundle.calibrations) == {}
    assert Verdict.NO_VERDICT not in {answer.verdict for answer in golden.answers}


@pytest.mark.parametrize("level", [0, 100, 255])
def test_policy_when_a_frame_is_flat_then_it_has_no_verdict(measured_by_itself, level):
    """A covered lens, any grey and a saturated frame stay below the least spread that was measured at export."""
    bundle = load_bundle(measured_by_itself)
    _, maps = make_runner(bundle.model)(np.full((1, 64, 64, 3), level, np.uint8))

    rule, window = bundle.manifest.output.score_rule, (0.0, 0.0, 64.0, 64.0)
    with pytest.raises(FrameNotComparable):
        judge(float(maps.max()), maps[0], bundle.policies["leather"], rule, window, None)


@pytest.mark.parametrize("kind", ["uncalibrated", "measured_by_itself"])
def test_report_when_no_frame_made_the_bundle_then_says_so_and_what_to_do(kind, request):
    """The page says what the bundle is, what it does not promise, and the command that makes it an ordinary one."""
    page = load_bundle(request.getfixturevalue(kind)).files["report.html"].decode()

    assert "No frame of this line has made this bundle" in page
    assert "flawline calibrate" in page
    assert ("There are no verdicts yet" in page) == (kind == "uncalibrated")
    assert ("Each frame is measured by itself" in page) == (kind == "measured_by_itself")
    assert page.count("data:image/jpeg") >= 4


def test_calibrate_when_the_bundle_has_none_then_it_becomes_an_ordinary_one(measured_by_itself, tmp_path):
    """Good parts give thresholds, rates, p-values, and golden frames of the line itself, with verdicts."""
    folder = write_line(tmp_path / "leather", good=24, tested=False) / "train/good"
    good = read_good_folder(folder, None, 16, SilentReporter())

    path, report = recalibrate(
        load_bundle(measured_by_itself),
        "leather",
        good,
        None,
        SilentReporter(),
        review_rate=0.1,
        fail_rate=0.05,
    )

    bundle = load_bundle(path)
    golden = read_golden(bundle)
    replay(bundle, golden, make_runner(bundle.model))
    record = bundle.manifest.by_line["leather"]
    assert (path.name, record.data.calibrated_on, record.fail_rate) == ("2", 24, 0.05)
    assert bundle.calibrations["leather"].scores.size == 24
    assert bundle.policies["leather"].calibration == "good_parts"
    assert Verdict.NO_VERDICT not in {answer.verdict for answer in golden.answers}
    assert not any("generated" in answer.description for answer in golden.answers)
    assert [line.line for line in report.lines] == ["leather"]


def test_frames_when_generated_then_every_second_has_a_defect_and_the_seed_decides_all():
    """Golden frames are the same on every machine, have the input's size before the crop, and are not flat."""
    spec = make_input(64, 96, margin=8)

    frames, again = generate_frames(spec, 4, seed=1), generate_frames(spec, 4, seed=1)

    assert all(np.array_equal(one, other) for (one, _), (other, _) in zip(frames, again, strict=True))
    assert {pixels.shape for pixels, _ in frames} == {(80, 112, 3)}
    assert ["defect" in description for _, description in frames] == [False, True, False, True]
    assert all(pixels.std() > 5 for pixels, _ in frames)


def test_export_when_the_detector_must_be_fitted_then_says_how(tmp_path):
    """A detector that learns can't be had by its name alone."""
    request = _request(tmp_path, config=make_config())

    with pytest.raises(ConfigFault, match="has to be fitted: flawline train"):
        make_zero_shot(request, SilentReporter())

    assert not list(tmp_path.iterdir())


def test_export_when_another_bundle_serves_the_line_then_refuses(tmp_path):
    """The service would refuse the second bundle, so it is not made, as a run would not be begun."""
    make_bundle(tmp_path, "both", lines=("leather", "lid"))

    with pytest.raises(ParameterInvalid, match=r"The bundle both in .* serves the line leather already"):
        make_zero_shot(_request(tmp_path), SilentReporter())

    assert [path.name for path in tmp_path.iterdir()] == ["both"]


def test_export_when_the_new_version_leaves_a_line_out_then_its_page_says_so(uncalibrated):
    """Whoever names the bundle of several lines learns which ones it will not serve any more."""
    told = "The newest version of leather serves lid as well, and this one will not."

    assert told in load_bundle(uncalibrated).files["report.html"].decode()


def test_zero_shot_when_the_method_knows_no_other_lines_then_is_refused_by_name():
    """Most detectors judge only what they were fitted on."""
    fitted = make_config(detector="dadf", hyperparameters={})

    with pytest.raises(ConfigFault, match=r"dadf judges only lines that it was fitted on.*inp_former"):
        zero_shot_config(fitted)


def test_export_when_a_run_on_other_lines_is_taken_over_then_maps_show_the_nearest_prototype(uncalibrated):
    """The network of the other lines judges by its prototypes, says so, and names these lines."""
    bundle = load_bundle(uncalibrated)

    assert (bundle.manifest.name, bundle.manifest.lines) == ("leather", ("leather",))
    assert bundle.manifest.hyperparameters["hyperparameters"]["map_source"] == "prototypes"
    assert bundle.manifest.by_line["leather"].data.name == "frames of screws"
    assert "other lines: screws" in bundle.files["report.html"].decode()


def test_export_when_frames_were_fitted_on_elsewhere_then_does_not_claim_to_know_them(uncalibrated, measured_by_itself):
    """Where nothing was fitted, no good frame can have been learnt; of other lines' frames only their run knew."""
    assert FITTED_FRAMES_FILE not in load_bundle(uncalibrated).files
    assert read_fitted_frames(load_bundle(measured_by_itself)) == frozenset()


def test_export_when_the_run_on_other_lines_is_not_complete_then_is_refused(run, tmp_path):
    """Prototypes that are half learnt look like learnt ones."""
    directory = shutil.copytree(run, tmp_path / "run")
    record = json.loads((directory / "checkpoint.json").read_text())
    (directory / "checkpoint.json").write_text(json.dumps(record | {"stage": 0}))

    with pytest.raises(ConfigFault, match="complete it first: flawline train --resume"):
        make_zero_shot(_from_run(directory, tmp_path / "store"), SilentReporter())

    assert not (tmp_path / "store").exists()


def test_export_when_the_run_has_a_head_for_its_own_lines_then_the_bundle_does_without(tmp_path):
    """INP-Former++ learnt a head from planted defects; a new line is judged by its prototypes alone."""
    config = make_config(detector="inp_former_pp", hyperparameters=_TINY_PP)
    prepared = prepare_detector(config, "untrained", (), torch.device("cpu"))
    for stage in prepared.detector.stages()[:2]:
        stage.show(
            torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.int64)
        )
        stage.finish()
    state = TrainingState(len(prepared.detector.stages()), 0, detector_tensors(prepared.module))
    save_checkpoint(tmp_path / "run", state, {"backbone": prepared.backbone.digest, "data": "of other lines"})
    request = _request(tmp_path / "store", config=zero_shot_config(config), fitted_in=tmp_path / "run")

    bundle = load_bundle(make_zero_shot(request, SilentReporter()))

    assert any(name.startswith("seg_head") for name in state.detector)
    assert bundle.manifest.detector == "inp_former_pp"
    assert bundle.manifest.hyperparameters["hyperparameters"]["map_source"] == "prototypes"


def test_export_when_textures_look_as_flat_as_flat_frames_then_self_calibration_is_refused(run, tmp_path):
    """A network whose maps hardly spread can't measure a frame by itself, and the sentence says what to do instead."""
    with pytest.raises(ConfigFault, match="leave --calibration self out"):
        make_zero_shot(_from_run(run, tmp_path, calibration="self"), SilentReporter())

    assert not list(tmp_path.iterdir())


def test_export_when_the_backbone_is_not_the_runs_then_is_refused(run, tmp_path):
    """Prototypes of one backbone mean nothing to another."""
    request = _from_run(run, tmp_path)
    other = request.config.model_copy(update={"seed": 5})  # seeds the untrained backbone

    with pytest.raises(CheckpointRefused, match="backbone"):
        make_zero_shot(replace(request, config=other), SilentReporter())
