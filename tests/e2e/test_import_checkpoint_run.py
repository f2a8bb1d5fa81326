"""A checkpoint under the authors' own key names becomes a bundle that the service would serve."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from service.contract.bundle import load_bundle
from service.contract.golden import read_golden, replay
from tests.factories import make_runner
from tests.shared_material import require_shared
from tests.tiny_line import GOOD, write_line
from training.__main__ import commands
from training.fitting.checkpoint import has_checkpoint
from training.fitting.import_checkpoint import RELEASED_SIDES


def _import(*arguments):
    return CliRunner().invoke(commands, ["import-checkpoint", *(str(argument) for argument in arguments)])


@pytest.fixture
def line(tmp_path):
    """A line with test frames."""
    return write_line(tmp_path / "bottle")


def _official_state(method):
    """Return tensors of the official names and shapes, small noise everywhere."""
    generator = torch.Generator().manual_seed(0)
    entries = json.loads((require_shared(f"parity/{method}") / "state_dict_keys.json").read_text())
    return {entry["key"]: 0.05 * torch.randn(entry["shape"], generator=generator) for entry in entries}


def test_import_when_a_released_checkpoint_fits_then_its_bundle_serves(tmp_path, line):
    """The authors' encoder and decoder arrive in the graph, all good frames calibrate, and the page says so."""
    # Two blocks of ten in the encoder and of eight in the decoder: the exporter takes its time for each.
    state = {
        name: value for name, value in _official_state("inp_former").items() if not re.match(r"decoder\.[2-7]\.", name)
    }
    torch.save(state, tmp_path / "model.pth")
    places = ("--store", tmp_path / "store", "--runs", tmp_path / "runs", "--threads", 1)
    small = ("--size", 28, "--set", "hyperparameters.layers=[1, 2]")
    half = ("--set", "precision=fp16")

    result = _import("inp_former", tmp_path / "model.pth", "--line", line, *small, *places, *half)

    assert result.exit_code == 0, result.output
    bundle = load_bundle(Path(re.search(r"bundle: (\S+)", result.output)[1]))
    replay(bundle, read_golden(bundle), make_runner(bundle.model))
    manifest = bundle.manifest
    assert manifest.precision == "fp16"  # for which no fitted frame is needed
    assert (manifest.detector, manifest.backbone.name) == ("inp_former", "vit_small_patch14_reg4_dinov2")
    assert (manifest.input.height, manifest.input.resize_height) == (28, 32)
    assert (manifest.by_line["bottle"].data.fitted_on, manifest.by_line["bottle"].data.calibrated_on) == (0, GOOD)
    page = " ".join(bundle.files["report.html"].decode().split())
    assert "model.pth" in page
    assert "Which frames the detector was fitted on is not known here" in page
    run = re.search(r"run: (\S+)", result.output)[1]
    assert has_checkpoint(Path(run))
    assert f"no frames yet: flawline export {run} --zero-shot --name NAME" in " ".join(result.output.split())


def test_import_when_int8_is_wanted_then_refuses_because_nothing_was_fitted(tmp_path, line):
    """Its ranges come from good frames that fitting saw, never from those that thresholds rest on."""
    torch.save(_official_state("inp_former"), tmp_path / "model.pth")
    places = ("--store", tmp_path / "store", "--runs", tmp_path / "runs", "--threads", 1)

    result = _import(
        "inp_former", tmp_path / "model.pth", "--line", line, "--size", 28, *places, "--set", "precision=int8"
    )

    assert result.exit_code == 2, result.output
    assert "on good frames that fitting saw, and nothing was fitted here" in " ".join(result.output.split())
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("method", "spoil", "sentence"),
    [
        ("inp_former", lambda state: state.pop("decoder.3.attn.q.weight"), "lacks decoder.3.attn.q.weight"),
        ("inp_former", lambda state: state.update({"head.weight": torch.ones(1)}), "unknown key head.weight"),
        ("inp_former", lambda state: state.update({"optimiser": {"lr": 1.0}}), "flat dictionary"),
    ],
    ids=["a key is missing", "a key is unknown", "something else than tensors"],
)
def test_import_when_a_key_is_wrong_then_names_it_and_leaves_nothing_behind(tmp_path, line, method, spoil, sentence):
    """A checkpoint that does not fit is refused in one sentence before anything is written."""
    state = _official_state(method)
    spoil(state)
    torch.save(state, tmp_path / "model.pth")

    result = _import(method, tmp_path / "model.pth", "--line", line, "--runs", tmp_path / "runs")

    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("method", sorted(RELEASED_SIDES))
def test_import_when_the_file_is_no_checkpoint_then_says_so(tmp_path, line, method):
    """A picture, a page of an error or half a download is told in one sentence."""
    (tmp_path / "model.pth").write_bytes(b"<html>404</html>")

    result = _import(method, tmp_path / "model.pth", "--line", line)

    assert result.exit_code == 2
    assert "can't be read as plain tensors" in " ".join(result.output.split())


def test_import_when_nothing_was_released_for_the_detector_then_names_those_that_have(tmp_path, line):
    """A method without released checkpoints is refused by name."""
    result = _import("st_mae", tmp_path / "model.pth", "--line", line)

    assert result.exit_code == 2
    assert "inp_former, ami_net" in " ".join(result.output.split())
