"""A run on a few good frames: `flawline train --shots`."""

import pytest
import torch
import yaml
from typer.testing import CliRunner

from service.contract.bundle import load_bundle
from service.contract.golden import read_golden
from tests.tiny_line import TINY_RUN, write_line
from training.__main__ import commands

_GOOD = 22


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A line of good frames alone."""
    return write_line(tmp_path_factory.mktemp("shots") / "bottle", good=_GOOD, tested=False)


@pytest.fixture(scope="module")
def bundle(line):
    """What the command makes of two of them."""
    torch.set_num_threads(1)
    place = line.parent
    (place / "tiny.yaml").write_text(yaml.safe_dump(TINY_RUN | {"shot_views": "inp_former"}))
    options = ["--config", place / "tiny.yaml", "--weights", "untrained", "--device", "cpu", "--shots", 2]
    places = ["--shot-seed", 7, "--store", place / "store", "--runs", place / "runs"]

    answer = CliRunner().invoke(commands, ["train", *map(str, [line, *options, *places])])

    assert answer.exit_code == 0, answer.output
    return load_bundle(place / "store/bottle/1")


def test_train_command_when_given_shots_then_the_manifest_names_them_and_all_others_calibrate(line, bundle):
    """The bundle says which frames it was fitted on; thresholds rest on every other good frame."""
    data = bundle.manifest.by_line["bottle"].data

    assert (data.fitted_on, data.calibrated_on) == (2, _GOOD - 2)
    assert len(data.shots) == 2
    assert all((line / name).is_file() for name in data.shots)
    hyperparameters = bundle.manifest.hyperparameters
    assert (hyperparameters["shots"], hyperparameters["shot_seed"]) == (2, 7)


def test_train_command_when_the_line_has_good_frames_only_then_still_makes_a_bundle(bundle):
    """Thresholds need no defect; the figures say why they are missing, and a golden defect is planted."""
    policy = bundle.policies["bottle"]

    assert all(metric.value is None and metric.reason for metric in bundle.manifest.by_line["bottle"].metrics.values())
    assert policy.review_threshold <= policy.fail_threshold
    assert any("planted" in answer.description for answer in read_golden(bundle).answers)


def test_train_command_when_shots_leave_too_few_frames_then_refuses(tmp_path):
    """Thresholds are never promised from a handful of frames."""
    line = write_line(tmp_path / "bottle", good=10)
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY_RUN))
    options = ["--config", config, "--weights", "untrained", "--shots", 4]

    answer = CliRunner().invoke(commands, ["train", *map(str, [line, *options, "--runs", tmp_path / "runs"])])

    assert answer.exit_code == 2
    assert "needs at least 19 good parts that fitting never saw, and 6 are held out" in answer.output


@pytest.mark.parametrize(
    ("settings", "is_told"), [((), True), (("--set", "hyperparameters.recipe.batch_size=1"), False)]
)
def test_train_command_when_the_paper_takes_few_frames_otherwise_then_says_so(tmp_path, settings, is_told):
    """AMI-Net's paper has another batch for few frames; nobody is told who sets it."""
    line = write_line(tmp_path / "bottle", good=10)
    small = ("--set", "backbone=test_resnet", "--set", "hyperparameters.blocks=1")  # never fitted; only to be made
    options = ["--detector", "ami_net", "--config", "paper", "--weights", "untrained", "--shots", 4, *small, *settings]

    answer = CliRunner().invoke(commands, ["train", *map(str, [line, *options, "--runs", tmp_path / "runs"])])

    said = "the paper's few-shot setting has hyperparameters.recipe.batch_size=1; to follow it, add --set"
    assert (said in " ".join(answer.output.split())) == is_told
    assert "needs at least 19 good parts" in answer.output
