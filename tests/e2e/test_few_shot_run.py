"""A run on a few good frames: `flawline train --shots`."""

import torch
import yaml
from typer.testing import CliRunner

from service.contract.bundle import load_bundle
from tests.tiny_line import TINY_RUN, write_line
from training.__main__ import commands

_GOOD = 22


def test_train_command_when_given_shots_then_the_manifest_names_them_and_all_others_calibrate(tmp_path):
    """The bundle says which frames it was fitted on; thresholds rest on every other good frame."""
    torch.set_num_threads(1)
    line = write_line(tmp_path / "bottle", good=_GOOD, tested=False)
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY_RUN | {"shot_views": "inp_former"}))
    options = ["--config", config, "--weights", "untrained", "--device", "cpu", "--shots", 2, "--shot-seed", 7]
    places = ["--store", tmp_path / "store", "--runs", tmp_path / "runs"]

    answer = CliRunner().invoke(commands, ["train", *map(str, [line, *options, *places])])

    assert answer.exit_code == 0, answer.output
    manifest = load_bundle(tmp_path / "store/bottle/1").manifest
    data = manifest.by_line["bottle"].data
    assert (data.fitted_on, data.calibrated_on) == (2, _GOOD - 2)
    assert len(data.shots) == 2
    assert all((line / name).is_file() for name in data.shots)
    assert (manifest.hyperparameters["shots"], manifest.hyperparameters["shot_seed"]) == (2, 7)


def test_train_command_when_shots_leave_too_few_frames_then_refuses(tmp_path):
    """Thresholds are never promised from a handful of frames."""
    line = write_line(tmp_path / "bottle", good=10)
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY_RUN))
    options = ["--config", config, "--weights", "untrained", "--shots", 4]

    answer = CliRunner().invoke(commands, ["train", *map(str, [line, *options, "--runs", tmp_path / "runs"])])

    assert answer.exit_code == 2
    assert "needs at least 19 good parts that fitting never saw, and 6 are held out" in answer.output
