"""A whole run on a tiny line: from a folder of frames to a bundle that the service would serve."""

import errno
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from models.backbones import untrained_weights
from service.contract.bundle import FITTED_FRAMES_FILE, load_bundle, versions_of
from service.contract.frames import FrameLimits, decode_image
from service.contract.golden import read_golden, replay
from service.contract.policy import inspected_mask, policy_digest
from service.errors import CalibrationRefused
from tests.factories import encode, make_frame, make_runner
from tests.one_export import forget_exports
from tests.tiny_line import (
    DEFECTS,
    GOOD,
    TEST_GOOD,
    TINY_GRNR,
    TINY_RUN,
    fit_only,
    fitted_tensors,
    make_config,
    make_request,
    write_line,
    write_mvtec_ad2_line,
)
from training.__main__ import commands
from training.bundling.export import GraphRun
from training.config import ConfigFault, RunConfig
from training.data.samples import DatasetFault, Sample
from training.data.split import RecordingOrder
from training.fitting.checkpoint import CheckpointRefused, TrainingState, has_checkpoint, save_checkpoint
from training.fitting.detectors import prepare_detector, refuse_unseen_defects
from training.lines import gather_lines
from training.measuring.answers import ask
from training.progress import SilentReporter
from training.run import train
from training.run_directory import keep_request, read_request


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A line with masks."""
    return write_line(tmp_path_factory.mktemp("lines") / "bottle")


@pytest.fixture(scope="module")
def finished(line, tmp_path_factory):
    """One finished run, at the one thread that every test has; another number of threads would give other last bits."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("finished")
    return train(make_request(line, place / "store"), place / "run", SilentReporter())


def _invoke(*arguments):
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def _published(output):
    return load_bundle(Path(re.search(r"bundle: (\S+)", output)[1]))


def test_train_when_it_ends_then_the_bundle_is_one_that_the_service_accepts(finished):
    """Every digest holds, the golden set replays on a runtime, and the manifest tells the run."""
    bundle = load_bundle(finished.bundle)
    golden = read_golden(bundle)

    replay(bundle, golden, make_runner(bundle.model))
    manifest = bundle.manifest
    assert (manifest.name, manifest.lines, manifest.version) == ("bottle", ("bottle",), "1")
    record = manifest.by_line["bottle"]
    assert (record.data.fitted_on, record.data.calibrated_on) == (GOOD // 2, GOOD // 2)
    assert record.data.frame_sizes == ((72, 80),)
    assert len(bundle.files[FITTED_FRAMES_FILE].split()) == GOOD // 2
    assert (record.data.tested_on_normal, record.data.tested_on_anomalous) == (TEST_GOOD, DEFECTS)
    assert manifest.hyperparameters["hyperparameters"]["heads"] == 2
    assert record.metrics["p_auroc"].value is not None
    assert manifest.backbone.source == "untrained"
    assert len({answer.verdict for answer in golden.answers}) > 1


def test_train_when_it_ends_then_the_page_is_small_and_stands_alone(finished):
    """The report in the bundle embeds all of its pictures and is no burden to send."""
    page = (finished.bundle / "report.html").read_text("utf-8")

    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) >= 2 * DEFECTS
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert len(page) < 5_000_000


def test_train_command_when_resumed_before_its_first_checkpoint_then_repeats_the_run_to_the_bit(
    line, finished, tmp_path
):
    """The command that a stopped run names always works, and the same seed gives the same scores and network."""
    shutil.copytree(finished.bundle, tmp_path / "store/bottle/1")
    directory = tmp_path / "runs" / "bottle" / "1"
    directory.mkdir(parents=True)
    (directory / "run.json").write_text(make_request(line, tmp_path / "store").model_dump_json())
    forget_exports()

    result = _invoke("train", "--resume", directory, "--threads", "1")

    assert result.exit_code == 0, result.output
    assert versions_of(tmp_path / "store" / "bottle") == ["1", "2"]
    scores = [np.load(place / "scores.npz")["test_scores"] for place in (finished.directory, directory)]
    np.testing.assert_array_equal(*scores)
    assert _published(result.output).model == load_bundle(finished.bundle).model


def test_train_when_the_seed_is_another_then_is_another_fitting(line, finished, tmp_path):
    """Whoever repeats a run with other seeds learns how much chance there is in it."""
    fit_only(make_request(line, tmp_path / "store", config=make_config(seed=2)), tmp_path / "other")

    here, there = fitted_tensors(finished.directory), fitted_tensors(tmp_path / "other")
    assert here.keys() == there.keys()
    assert any(not torch.equal(here[name], there[name]) for name in here)


def test_train_when_good_parts_cannot_carry_the_rate_then_refuses_before_fitting(line, tmp_path):
    """The refusal names the number of parts, and neither a run nor a store is left behind."""
    request = make_request(line, tmp_path / "store", config=make_config(fail_rate=0.001))

    with pytest.raises(CalibrationRefused, match="needs at least 999 good parts"):
        train(request, tmp_path / "run", SilentReporter())

    assert list(tmp_path.iterdir()) == []


class _FolderChanges(SilentReporter):
    """Somebody writes other frames over those of a folder, as soon as a piece of work has ended."""

    def __init__(self, folder, ended):
        self._folder, self._ended = folder, ended

    @contextmanager
    def bar(self, name, total, done=0):
        """Write over the frames after the piece of that name."""
        with super().bar(name, total, done) as bar:
            yield bar
        if name == self._ended:
            for path in self._folder.rglob("*.png"):
                path.write_bytes(encode(make_frame(72, 80, seed=900)))


@pytest.mark.parametrize(("ended", "read_next"), [("checking files", "train/good"), ("good frames", "test")])
def test_train_when_frames_change_after_their_check_then_refuses_to_learn_or_measure_others(tmp_path, ended, read_next):
    """The digests of the manifest and of `fitted_frames.txt` are of the frames that the network learnt."""
    line = write_line(tmp_path / "bottle")

    with pytest.raises(DatasetFault, match="has changed since this command checked it"):
        train(make_request(line, tmp_path / "store"), tmp_path / "run", _FolderChanges(line / read_next, ended))


def _with_rough_rims(line):
    """Draw coarse black and white cells round each good training frame of a line, other ones each time."""
    rng = np.random.default_rng(0)
    for path in sorted((line / "train/good").glob("*.png")):
        pixels = decode_image(path.read_bytes(), FrameLimits()).pixels.copy()
        cells = np.kron(rng.integers(0, 2, (18, 20)) * 255, np.ones((4, 4)))[..., None]
        pixels = np.where(_rim(*pixels.shape[:2])[..., None], cells, pixels).astype(np.uint8)
        path.write_bytes(encode(pixels))
    return line


def _rim(height, width):
    rim = np.ones((height, width), bool)
    rim[height // 8 : -height // 8, width // 8 : -width // 8] = False
    return rim


def test_train_when_the_rim_of_good_parts_is_oddest_then_says_so_and_the_run_exports_without_it(tmp_path):
    """What it tells to do is one command, and then the rim sets no threshold; a deviation follows as a maximum does."""
    line = _with_rough_rims(write_line(tmp_path / "lid"))
    hyperparameters = {
        "layers": [2, 3],
        "patch_size": 2,
        "token_channels": 16,
        "heads": 2,
        "blocks": 1,
        "map_size": [32, 32],
        "recipe": TINY_RUN["hyperparameters"]["recipe"] | {"optimiser": "adamw"},
    }
    config = make_config(detector="ami_net", hyperparameters=hyperparameters)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    trained = _invoke(
        *("train", line, "--config", tmp_path / "run.yaml", "--weights", "untrained", "--threads", "1"),
        *("--store", tmp_path / "store", "--runs", tmp_path / "runs"),
    )
    told = re.search(r"flawline (export \S+ --roi \S+)", re.sub(r"\s+", " ", trained.output))

    exported = _invoke(*told[1].split(), "--threads", "1")

    assert (trained.exit_code, exported.exit_code) == (0, 0), trained.output + exported.output
    before, after = (_published(result.output) for result in (trained, exported))
    assert after.manifest.output.score_rule.kind == "deviation"
    assert after.calibrations["lid"].scores.max() < before.calibrations["lid"].scores.min()
    assert "The rim sets the thresholds" in (before.path / "report.html").read_text("utf-8")
    assert "The rim sets the thresholds" not in (after.path / "report.html").read_text("utf-8")
    said = "Only the region of interest is inspected, 56.2 % of the frame"
    assert said in " ".join(exported.output.split())
    assert said in (after.path / "report.html").read_text("utf-8")
    assert not inspected_mask(after.policies["lid"], 32, 32)[_rim(32, 32)].any()


def _learning_from_defects(folder):
    """Write a line, three marked frames of its defect that are not among its test frames, and a configuration."""
    line = write_line(folder / "cup")
    marked = folder / "marked"
    for index in range(3):
        pixels = make_frame(72, 80, seed=300 + index, defect=True)
        mask = np.where((pixels == 250).all(axis=2), 255, 0).astype(np.uint8)
        for place, data in ((f"test/square/{index}.png", pixels), (f"ground_truth/square/{index}_mask.png", mask)):
            (marked / place).parent.mkdir(parents=True, exist_ok=True)
            (marked / place).write_bytes(encode(data))
    recipe = TINY_RUN["hyperparameters"]["recipe"]
    hyperparameters = {key: value for key, value in TINY_RUN["hyperparameters"].items() if key != "map_size"} | {
        "head_channels": [8, 4],
        "head_recipe": recipe | {"iterations": 4},
    }
    config = make_config(detector="inp_former_pp", hyperparameters=hyperparameters)
    (folder / "run.yaml").write_text(config.to_yaml())
    return line, marked, config


def test_train_command_when_defects_are_labelled_then_the_run_and_its_bundle_know_which(finished, tmp_path):
    """They reach the detector, are part of manifest and checkpoint, and another set of them is another run."""
    line, marked, config = _learning_from_defects(tmp_path)
    arguments = ("--config", tmp_path / "run.yaml", "--weights", "untrained", "--threads", "1")
    places = ("--store", tmp_path / "store", "--runs", tmp_path / "runs")

    learnt = _invoke("train", line, *arguments, *places, "--labelled-defects", marked)
    fit_only(make_request(line, tmp_path / "store", config=config), tmp_path / "without")
    (marked / "test/square/0.png").unlink()
    (marked / "ground_truth/square/0_mask.png").unlink()
    (directory,) = (tmp_path / "runs/cup").iterdir()
    exported = _invoke("export", directory, "--threads", "1")

    assert learnt.exit_code == 0, learnt.output
    assert _published(learnt.output).manifest.labelled_defects.frames == 3
    assert finished.manifest.labelled_defects is None
    here, there = fitted_tensors(directory), fitted_tensors(tmp_path / "without")
    assert any(not torch.equal(here[name], there[name]) for name in here)
    assert exported.exit_code == 2
    assert "another labelled defects" in exported.output


@pytest.mark.parametrize(
    ("detector", "words"),
    [("inp_former", "learns from good frames alone"), ("inp_former_pp", "measured on what was learnt")],
    ids=["a detector that takes none", "test frames"],
)
def test_train_command_when_labelled_defects_cannot_be_used_then_refuses_before_fitting(
    line, tmp_path, detector, words
):
    """Other detectors refuse them, and no detector learns from the frames that it is measured on."""
    wanted = ("--detector", detector, "--labelled-defects", line, "--set", "hold_out.fraction=0.5")

    result = _invoke("train", line, *wanted, "--runs", tmp_path, "--threads", "1")

    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("share", "words"),
    [(0, "is 0;"), (2, "is 2;"), (0.05, "of a batch of 8 frames in 'segmentation head' that is none")],
    ids=["nothing", "more than all", "less than a frame"],
)
def test_train_command_when_no_frame_would_get_a_labelled_defect_then_refuses_before_fitting(tmp_path, share, words):
    """A manifest never tells of defects that no batch has seen."""
    line, marked, _ = _learning_from_defects(tmp_path)
    arguments = ("--config", tmp_path / "run.yaml", "--weights", "untrained", "--threads", "1")
    wanted = ("--labelled-defects", marked, "--set", f"hyperparameters.labelled_share={share}")

    result = _invoke("train", line, *arguments, *wanted, "--runs", tmp_path / "runs", "--store", tmp_path / "store")

    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert not (tmp_path / "store").exists()


def test_labelled_defects_when_each_process_has_one_frame_then_are_refused():
    """Half of one frame is none; half of two is one."""
    config = make_config(
        detector="inp_former_pp",
        hyperparameters={key: value for key, value in TINY_RUN["hyperparameters"].items() if key != "map_size"},
    )
    prepared = prepare_detector(config, "untrained", (), torch.device("cpu"))
    frames = batch = prepared.detector.stages()[-1].recipe.batch_size

    refuse_unseen_defects(prepared, frames, batch // 2)
    with pytest.raises(ConfigFault, match=f"a process' 1 of {batch} frames"):
        refuse_unseen_defects(prepared, frames, batch)


def test_export_when_another_precision_is_asked_for_then_the_bundle_is_calibrated_with_that_graph(finished, tmp_path):
    """The service accepts it: the manifest tells the precision, and golden set and thresholds are the graph's own."""
    directory = shutil.copytree(finished.directory, tmp_path / "run")  # an export writes its figures in there

    result = _invoke("export", directory, "--precision", "fp16", "--store", tmp_path / "store", "--threads", "1")

    assert result.exit_code == 0, result.output
    first, half = load_bundle(finished.bundle), _published(result.output)
    assert (first.manifest.precision, half.manifest.precision) == ("fp32", "fp16")
    assert len(half.model) < len(first.model)
    policy, calibration, data = half.policies["bottle"], half.calibrations["bottle"], half.manifest.by_line["bottle"]
    held_out = [Sample(Path(file), "train", 0, "good") for file in np.load(directory / "scores.npz")["held_out_files"]]
    said = ask(GraphRun(half.model), held_out, half.manifest.input, SilentReporter(), title="good frames")
    np.testing.assert_array_equal(calibration.scores, np.sort(said.scores))
    assert not np.array_equal(calibration.scores, first.calibrations["bottle"].scores)
    for rate, threshold in ((data.review_rate, policy.review_threshold), (data.fail_rate, policy.fail_threshold)):
        assert threshold == calibration.threshold(rate).value
    assert half.manifest.parity.frames > GOOD // 2 + TEST_GOOD + DEFECTS  # and planted defects
    replay(half, read_golden(half), make_runner(half.model))
    assert read_request(directory) == read_request(finished.directory)  # the next export is none of that precision


def test_export_when_the_backbone_has_other_weights_then_refuses(finished, line, tmp_path):
    """What was fitted on top of one backbone says nothing on top of another, whatever its shape."""
    directory, frames = _copy_of(finished, line, tmp_path)
    weights = tmp_path / "other.safetensors"
    save_file(untrained_weights(TINY_RUN["backbone"], seed=5), weights)
    keep_request(directory, make_request(frames, tmp_path / "store", weights=weights))

    result = _invoke("export", directory, "--threads", "1")

    assert result.exit_code == 2
    assert "belongs to a run with another backbone" in result.stderr
    assert not (tmp_path / "store/bottle").exists()


def _copy_of(finished, line, folder):
    """Copy a finished run and its line, to change them; return both directories."""
    directory, frames = shutil.copytree(finished.directory, folder / "run"), shutil.copytree(line, folder / "bottle")
    keep_request(directory, make_request(frames, folder / "store"))
    return directory, frames


def test_export_when_a_test_frame_came_since_then_measures_it_with_the_same_network(finished, line, tmp_path):
    """Fitting never saw test frames, so whoever finds another one for them keeps his run."""
    directory, frames = _copy_of(finished, line, tmp_path)
    (frames / "test/good/900.png").write_bytes(encode(make_frame(72, 80, seed=900)))

    result = _invoke("export", directory, "--threads", "1")

    assert result.exit_code == 0, result.output
    assert "reconstruction" not in result.output  # nothing is fitted again, for hours and to the same end
    again = _published(result.output)
    assert again.model == load_bundle(finished.bundle).model
    assert again.manifest.by_line["bottle"].data.tested_on_normal == TEST_GOOD + 1


def test_export_when_one_line_gets_another_region_then_the_others_keep_theirs(line, tmp_path, monkeypatch):
    """What is not asked for stays as the run was asked for, and nothing is inspected that was left out."""
    request = make_request(line, tmp_path / "store", tmp_path / "cap", tmp_path / "lid")
    regions = [tmp_path / "first.png", tmp_path / "second.png", None]
    lines = [
        one.model_copy(update={"region_of_interest": mask}) for one, mask in zip(request.lines, regions, strict=True)
    ]
    keep_request(tmp_path, request.model_copy(update={"lines": tuple(lines)}))
    asked = []

    def train_as_stopped(request, *_):
        asked.append([one.region_of_interest for one in request.lines])
        raise KeyboardInterrupt

    monkeypatch.setattr("training.jobs.train", train_as_stopped)

    _invoke("export", tmp_path)
    _invoke("export", tmp_path, "--roi", f"cap={tmp_path / 'new.png'}")

    assert asked == [regions, [regions[0], tmp_path / "new.png", None]]


@pytest.mark.parametrize("change", ["one more", "one less", "another picture"])
def test_export_when_other_frames_would_be_fitted_on_then_refuses(finished, line, tmp_path, change):
    """The split would hold out what the network has learnt."""
    directory, frames = _copy_of(finished, line, tmp_path)
    good = frames / "train/good"
    if change == "one less":
        (good / "000.png").unlink()
    for path in {"one more": [good / "0000.png"], "another picture": sorted(good.iterdir())}.get(change, []):
        path.write_bytes(encode(make_frame(72, 80, seed=900 + int(path.stem))))

    result = _invoke("export", directory, "--threads", "1")

    assert result.exit_code == 2
    assert "another set of fitted frames; put back what was changed" in result.stderr
    assert not (tmp_path / "store").exists()


def test_export_when_fitting_is_not_complete_then_says_how_to_complete_it(finished, line, tmp_path):
    """A network that stopped half-way is published as no detector's, however well its graph agrees with it."""
    directory, _ = _copy_of(finished, line, tmp_path)
    record = json.loads((directory / "checkpoint.json").read_text())
    (directory / "checkpoint.json").write_text(json.dumps(record | {"stage": 0}))

    result = _invoke("export", directory, "--threads", "1")

    assert result.exit_code == 2
    assert f"complete it first: flawline train --resume {directory}" in result.stderr
    assert not (tmp_path / "store/bottle").exists()


@pytest.mark.parametrize("has_begun", [False, True])
def test_train_command_when_resumed_then_goes_on_where_there_is_something_to_go_on_with(
    line, tmp_path, monkeypatch, has_begun
):
    """Hours that were kept are not spent again, and a run that kept none begins in the same place."""
    keep_request(tmp_path, make_request(line, tmp_path / "store"))
    if has_begun:
        save_checkpoint(tmp_path, TrainingState(0, 5, {}), {})
    begun = []

    def train_as_stopped(_request, _directory, _reporter, beginning, _peers):
        begun.append(beginning)
        raise KeyboardInterrupt

    monkeypatch.setattr("training.jobs.train", train_as_stopped)

    _invoke("train", "--resume", tmp_path)

    assert begun == ["resume" if has_begun else "new"]


@pytest.mark.parametrize("beginning", ["resume", "export"])
def test_train_when_a_run_kept_a_digest_of_all_frames_alone_then_says_to_train_again(
    finished, line, tmp_path, beginning
):
    """Nothing tells which of them it was fitted on, and rules of splitting have changed since it was."""
    directory, frames = _copy_of(finished, line, tmp_path)
    record = json.loads((directory / "checkpoint.json").read_bytes())
    del record["identity"]["set of fitted frames"]
    digest = finished.manifest.by_line["bottle"].data.digest
    record["identity"]["data"] = hashlib.sha256(json.dumps([["bottle", digest]]).encode()).hexdigest()
    (directory / "checkpoint.json").write_text(json.dumps(record))

    with pytest.raises(CheckpointRefused, match=r"an older release, which did not keep .*Train again"):
        train(make_request(frames, tmp_path / "store"), directory, SilentReporter(), beginning)

    assert not (tmp_path / "store" / "bottle").exists()


@pytest.fixture(scope="module", params=["blocks", "random"])
def ordered_otherwise(request, tmp_path_factory):
    """A request, the run that an older release fitted for it, the names of what it fitted on, and the frames as now."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("older")
    frames = write_line(place / "bottle")
    for path in sorted((frames / "train/good").iterdir()):
        path.rename(path.with_name(f"day{int(path.stem) // 24}_{int(path.stem) % 24:03d}.png"))
    wanted = make_request(
        frames, place / "store", config=make_config(hold_out={"fraction": 0.5, "rule": request.param})
    )
    with pytest.MonkeyPatch.context() as older:
        older.setattr(RecordingOrder, "__init__", lambda order, _: setattr(order, "by_last_number", True))
        fit_only(wanted, place / "run")
        learnt = {path.name for path in gather_lines(wanted, SilentReporter()).fitted_on}
    return wanted, place / "run", learnt, gather_lines(wanted, SilentReporter())


@pytest.mark.parametrize("beginning", ["resume", "export"])
def test_train_when_an_older_release_ordered_frames_otherwise_then_says_to_train_again(
    ordered_otherwise, tmp_path, beginning
):
    """It fitted on frames that are held out now, so they would set thresholds, and nobody changed anything."""
    wanted, run, learnt, gathered = ordered_otherwise
    directory = shutil.copytree(run, tmp_path / "run")

    with pytest.raises(CheckpointRefused, match=r"an older release.* frames of bottle, .*Train again"):
        train(wanted, directory, SilentReporter(), beginning)

    assert learnt.intersection(sample.path.name for sample in gathered.lines[0].held_out)
    assert not (wanted.store / "bottle").exists()


def test_calibrate_when_other_good_parts_come_then_publishes_a_new_version(finished, line):
    """The network stays, thresholds and policy version change, the golden set is judged anew, fitted frames are out."""
    result = _invoke(
        "calibrate",
        finished.bundle,
        line / "train" / "good",
        "--fail-rate",
        "0.04",
        "--line-folder",
        line,
        "--threads",
        "1",
    )

    assert result.exit_code == 0, result.output
    first, again = load_bundle(finished.bundle), _published(result.output)
    assert again.model == first.model
    assert again.policies["bottle"].version == "2"
    data = again.manifest.by_line["bottle"].data
    assert (data.calibrated_on, data.calibration_frames.fitted_left_out) == (GOOD // 2, GOOD // 2)
    replay(again, read_golden(again), make_runner(again.model))


def test_evaluate_when_a_bundle_is_measured_again_then_the_figures_are_those_of_its_run(finished, line, tmp_path):
    """The exported graph and the trained detector have the same figures."""
    result = _invoke("evaluate", finished.bundle, line, "--output", tmp_path / "figures.json")

    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "figures.json").read_text())
    figures = told["figures"]
    for name, metric in finished.metrics["bottle"].items():
        assert figures[name]["value"] == pytest.approx(metric.value, abs=0.01)
        if metric.low is not None:  # drawn with the same seed
            assert [figures[name][end] for end in ("low", "high")] == pytest.approx([metric.low, metric.high], abs=0.01)
    bundle = load_bundle(finished.bundle)
    policy, digest = bundle.policies["bottle"], policy_digest(bundle.policies["bottle"])
    thresholds = {"review_threshold": policy.review_threshold, "fail_threshold": policy.fail_threshold}
    assert told["bundle"] == {"name": "bottle", "version": "1", "digest": bundle.digest}
    assert told["policy"] == {"version": "1", "digest": digest, **thresholds}
    data = bundle.manifest.by_line["bottle"].data
    counts = {"normal": TEST_GOOD, "anomalous": DEFECTS, "without_score": 0}
    assert told["data"] == {"name": "bottle", "digest": data.digest, **counts}
    assert {kind: sum(counts.values()) for kind, counts in told["verdicts"].items()} == {
        "good": TEST_GOOD,
        "square": DEFECTS,
    }
    page = bundle.files["report.html"].decode()
    assert "version 1 of bottle" in page
    assert digest in page


def test_evaluate_when_the_line_is_of_mvtec_ad2_then_seg_f1_is_that_of_its_run(tmp_path):
    """Run and bundle choose the threshold on the same frames, and the page and the terminal tell the figure."""
    torch.set_num_threads(1)
    line = write_mvtec_ad2_line(tmp_path / "vial")
    pieces = sorted((line / "validation/good").iterdir())
    for seed, path in enumerate(pieces):  # another light of the same piece
        path.with_stem(path.stem.replace("regular", "overexposed")).write_bytes(
            encode(make_frame(72, 80, seed=700 + seed))
        )
    config = RunConfig.model_validate(TINY_GRNR | {"product": "texture"})
    finished = train(make_request(line, tmp_path / "store", config=config), tmp_path / "run", SilentReporter())

    result = _invoke("evaluate", finished.bundle, line, "--output", tmp_path / "figures.json")

    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert figures["seg_f1"]["value"] == pytest.approx(finished.metrics["vial"]["seg_f1"].value, abs=1e-3)
    data = finished.manifest.by_line["vial"].data
    assert (data.calibrated_on, data.calibrated_parts) == (2 * len(pieces), len(pieces))  # lights count as views do
    assert "seg_f1" in result.output
    assert "SegF1" in (finished.bundle / "report.html").read_text("utf-8")


@pytest.mark.parametrize("source", ["bundle", "directory"])
def test_report_when_asked_for_a_bundle_or_a_run_then_writes_its_page(finished, tmp_path, source):
    """The page can be had from what was published and from what the run kept."""
    result = _invoke("report", getattr(finished, source), "--output", tmp_path / "page.html")

    assert result.exit_code == 0, result.output
    assert "Inspection report: bottle" in (tmp_path / "page.html").read_text("utf-8")


def test_report_when_asked_for_a_bundle_without_its_version_then_says_to_give_one(finished):
    """Whoever names the folder of all versions reads which one to append."""
    newest = finished.bundle.with_name(versions_of(finished.bundle.parent)[-1])  # other tests publish versions there

    outcome = _invoke("report", finished.bundle.parent)

    assert outcome.exit_code == 2
    assert outcome.output.rstrip().endswith(f"give one of them, as in {newest}.")


def test_train_command_when_interrupted_then_keeps_the_run_and_names_the_command_to_go_on(line, tmp_path):
    """Ctrl-C in the middle of fitting costs one step at most, and the caller is told how to go on."""
    endless = TINY_RUN["hyperparameters"] | {
        "recipe": TINY_RUN["hyperparameters"]["recipe"] | {"iterations": 10_000_000}
    }
    (tmp_path / "run.yaml").write_text(json.dumps(TINY_RUN | {"hyperparameters": endless}))
    program = "from training.__main__ import commands; commands()"
    arguments = ["train", line, "--config", "run.yaml", "--weights", "untrained", "--threads", "1"]

    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        seen = next(text for text in process.stdout if text.startswith("reconstruction: encoding"))
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=120)

    assert seen
    (directory,) = (tmp_path / "runs" / "bottle").iterdir()
    assert process.returncode == 130
    assert (
        told.strip() == f"Stopped. To go on where it stood: flawline train --resume {directory.relative_to(tmp_path)}"
    )
    assert has_checkpoint(directory)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [("train --resume", "To go on where it stood: flawline train --resume"), ("export", "give the same command again")],
    ids=["train", "export"],
)
def test_commands_when_terminated_outside_of_fitting_then_end_as_at_ctrl_c(line, tmp_path, monkeypatch, command, words):
    """A termination signal while frames are measured or a graph is exported says how to go on, too."""
    keep_request(tmp_path, make_request(line, tmp_path / "store"))
    monkeypatch.setattr("training.jobs.train", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)

    result = _invoke(*command.split(), tmp_path)

    assert result.exit_code == 130
    assert words in " ".join(result.output.split())
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "options",
    [
        ("--fail-rate", "0.34", "--review-rate", "0.34"),
        ("--set", "seed=9", "--store", "otherstore"),
        ("--config", "small"),  # although it is what it would be without
        ("--roi", "mask.png", "--name", "other", "--detector", "grnr", "--precision", "fp16", "--tiles", "2x2"),
    ],
)
def test_train_command_when_options_stand_beside_resume_then_names_them_and_does_nothing(
    line, tmp_path, monkeypatch, options
):
    """None of them would be followed, and a bundle with the old values would be published as if they had been."""
    keep_request(tmp_path, make_request(line, tmp_path / "store"))
    monkeypatch.setattr("training.jobs.train", lambda *_: pytest.fail("the run went on"))

    result = _invoke("train", "--resume", tmp_path, "--threads", "1", *options)

    assert result.exit_code == 2
    assert " and ".join(sorted(options[::2])) + " can't be given beside --resume" in result.stderr
    assert f"flawline export {tmp_path}" in result.stderr


def test_train_command_when_the_environment_names_weights_then_a_run_goes_on_with_its_own(line, tmp_path, monkeypatch):
    """A job's pod has the variable both when it begins a run and when it goes on; nobody asked for it beside."""
    monkeypatch.setenv("FLAWLINE_WEIGHTS", "untrained")
    keep_request(tmp_path, make_request(line, tmp_path / "store"))
    gone_on = []

    def train_as_stopped(*arguments):
        gone_on.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("training.jobs.train", train_as_stopped)

    assert _invoke("train", "--resume", tmp_path).exit_code == 130
    assert len(gone_on) == 1


def test_train_command_when_a_folder_of_weights_is_idle_then_only_that_of_the_environment_is_allowed(
    line, tmp_path, monkeypatch
):
    """A job names one folder for runs of all backbones; who names it for one run wants that run to use it."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/resnet18.safetensors").touch()
    begun = []

    def train_as_stopped(request, *_):
        begun.append(request)
        raise KeyboardInterrupt

    monkeypatch.setattr("training.jobs.train", train_as_stopped)
    command = ("train", line, "--runs", tmp_path / "runs", "--store", tmp_path / "store")

    named = _invoke(*command, "--weights", tmp_path / "weights")
    monkeypatch.setenv("FLAWLINE_WEIGHTS", str(tmp_path / "weights"))
    known = _invoke(*command)
    both = _invoke(*command, "--weights", tmp_path / "weights")

    assert [result.exit_code for result in (named, known, both)] == [2, 130, 2]
    assert [request.config.backbone for request in begun] == ["embedded"]
    assert f"FLAWLINE_WEIGHTS names {tmp_path / 'weights'}" in known.output.replace("\n", " ")
    assert "holds no weights of embedded" in named.stderr


def test_train_command_when_the_resumed_run_is_finished_then_says_so_and_publishes_nothing(finished):
    """A second version of the same network at the same thresholds is nothing that anybody asked for."""
    before = versions_of(finished.bundle.parent)

    result = _invoke("train", "--resume", finished.directory)

    assert result.exit_code == 2
    assert "is finished already" in result.stderr
    assert f"flawline export {finished.directory}" in result.stderr
    assert versions_of(finished.bundle.parent) == before


@pytest.mark.parametrize("command", ["train --resume", "export", "export --zero-shot --name other"])
@pytest.mark.parametrize("edit", ["seed: 9", "seed: {"])
def test_commands_when_the_configuration_of_a_run_was_edited_then_say_that_it_would_not_be_followed(
    line, tmp_path, command, edit
):
    """The file lies there for people; whoever edits it hears how to have what he wants, and his edit stays."""
    keep_request(tmp_path, make_request(line, tmp_path / "store"))
    config = tmp_path / "config.yaml"
    edited = config.read_text("utf-8").replace("seed: 0", edit)
    config.write_text(edited, "utf-8")

    result = _invoke(*command.split(), tmp_path)

    assert result.exit_code == 2
    assert f"{config} was edited" in result.stderr
    assert f"--config {config}" in result.stderr
    assert config.read_text("utf-8") == edited
    assert not (tmp_path / "store").exists()


def test_run_when_its_configuration_was_only_written_otherwise_then_is_as_it_was(line, tmp_path):
    """A comment changes no value."""
    keep_request(tmp_path, make_request(line, tmp_path / "store"))
    config = tmp_path / "config.yaml"
    config.write_text("# of Monday\n" + config.read_text("utf-8"), "utf-8")

    assert read_request(tmp_path) == make_request(line, tmp_path / "store")


@pytest.mark.parametrize(
    ("command", "number", "code", "advice"),
    [
        ("export", errno.ENOSPC, 1, " The run is as it was; give the same command again."),
        ("train --resume", errno.ENOSPC, 1, " To go on where it stood: flawline train --resume {}"),
        ("export", errno.EACCES, 2, ""),
    ],
)
def test_commands_when_a_file_can_not_be_written_then_the_code_tells_whose_fault_it_is(
    line, tmp_path, monkeypatch, command, number, code, advice
):
    """A full disk is the machine's, a place that may not be written the caller's."""

    def refuse(*_):
        raise OSError(number, "why", "runs/scores.npz")

    keep_request(tmp_path, make_request(line, tmp_path / "store"))
    monkeypatch.setattr("training.jobs.train", refuse)

    result = _invoke(*command.split(), tmp_path)

    told = f"runs/scores.npz: why.{advice.format(tmp_path)}"
    assert (result.exit_code, result.output.strip()) == (code, told)


def test_train_command_when_the_store_can_not_be_one_then_refuses_before_fitting(line, tmp_path):
    """An hour of fitting does not end at a file where a folder should be."""
    (tmp_path / "afile").touch()

    result = _invoke("train", line, "--store", tmp_path / "afile", "--runs", tmp_path / "runs", "--threads", "1")

    assert result.exit_code == 2
    assert f"The store {tmp_path / 'afile'} can't take a bundle" in " ".join(result.output.split())
    assert not list((tmp_path / "runs").rglob("*.*"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train"], 2, "or several with --line"),
        (["train", "nowhere", "--line", "a=nowhere"], 2, "or several with --line"),
        (["train", "--line", "a=nowhere", "--line", "b=elsewhere"], 2, "give its name with --name"),
        (["train", "--line", "a"], 2, "write NAME=PATH"),
        (["train", "--line", "a/b=nowhere"], 2, "at most 64: --line NAME=FOLDER."),
        (["train", "my parts ü"], 2, "at most 64: --name NAME."),
        (["train", "--line", "a=nowhere", "--roi", "b=mask.png"], 2, "there is no line b"),
        (
            ["train", "--line", "a=nowhere", "--line", "b=nowhere", "--name", "both", "--roi", "mask.png"],
            2,
            "write NAME=PATH",
        ),
        (["train", "nowhere"], 2, "nowhere is no folder"),
        (["train", "nowhere", "--name", "a/b"], 2, "can't name a line"),
        (["train", "nowhere", "--set", "sed=1"], 2, "did you mean seed?"),
        (["train", "nowhere", "--config", "huge"], 2, "There is no configuration 'huge'"),
        (["train", "nowhere", "--detector", "patchcore"], 2, "one of the detectors"),
        (["train", "--resume", "nowhere"], 2, "not the directory of a run"),
        (["evaluate", "nowhere", "nowhere"], 2, "manifest.json"),
        (["calibrate", "nowhere", "nowhere"], 2, "manifest.json"),
        (
            ["import-checkpoint", "inp_former", "nowhere", "--line", "a=nowhere", "--layout", "b=visa"],
            2,
            "there is no --line b",
        ),
        (["export", "nowhere"], 2, "not the directory of a run"),
        (["report", "nowhere"], 2, "holds no report"),
    ],
)
def test_commands_when_the_caller_errs_then_say_one_sentence(tmp_path, monkeypatch, arguments, code, words):
    """A fault of the caller is one sentence on stderr and exit code 2; nothing is left behind and nothing traced."""
    monkeypatch.chdir(tmp_path)

    result = _invoke(*arguments)

    assert result.exit_code == code
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("weights", "words"),
    [("nowhere.safetensors", "can't be read"), ("frame.png", "no safetensors file")],
)
def test_train_command_when_weights_do_not_fit_then_says_which_file(line, tmp_path, monkeypatch, weights, words):
    """Wrong weights end the run before fitting."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "frame.png").write_bytes(b"no tensors")
    (tmp_path / "run.yaml").write_text(json.dumps(TINY_RUN))

    result = _invoke("train", line, "--config", "run.yaml", "--weights", weights)

    assert result.exit_code == 2
    assert words in result.stderr


def test_help_when_asked_for_then_does_not_wait_for_torch():
    """Listing the commands imports neither torch nor what needs it."""
    program = "import sys, training.__main__; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
