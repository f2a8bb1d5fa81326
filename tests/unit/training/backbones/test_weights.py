"""Where backbone weights come from, in which order, and what is said when there are none."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.backbones import BackboneUnavailable, CnnBackbone, untrained_weights
from tests.shared_material import require_shared
from training.backbones.weights import WeightsUnavailable, resolve_weights, tell_idle_folder


def _no_download(name: str) -> dict[str, Tensor]:
    raise BackboneUnavailable(f"timm's download of {name} failed")


def _download(name: str) -> dict[str, Tensor]:
    return {name: torch.ones(2)}


def _write(path: Path, value: float) -> Path:
    save_file({"conv": torch.full((2,), value)}, path)
    return path


def test_resolve_weights_when_a_path_is_given_then_reads_it_and_nothing_else(tmp_path):
    """The explicit file wins over folders and download, and its digest is that of its bytes."""
    _write(tmp_path / "resnet18.safetensors", 1.0)
    named = _write(tmp_path / "mine.safetensors", 2.0)

    found = resolve_weights("resnet18", named, [tmp_path], fetch=_download)

    assert found.state_dict["conv"].tolist() == [2.0, 2.0]
    assert found.digest == hashlib.sha256(named.read_bytes()).hexdigest()
    assert found.source == "mine.safetensors"


@pytest.mark.parametrize("name", ["resnet18.safetensors", "resnet18_in1k_to_layer3.safetensors"])
def test_resolve_weights_when_a_folder_has_a_known_file_then_takes_it_before_downloading(tmp_path, name):
    """Folders are searched for the backbone's name and for names that files are handed out under."""
    _write(tmp_path / name, 3.0)

    found = resolve_weights("resnet18", None, [tmp_path / "missing", tmp_path], fetch=_download)

    assert found.source == name


def test_resolve_weights_when_no_file_is_there_then_downloads(tmp_path):
    """The last resort is timm; equal tensors always have the same digest."""
    first = resolve_weights("resnet18", None, [tmp_path], fetch=_download)
    again = resolve_weights("resnet18", None, [], fetch=_download)

    assert first.source == "timm"
    assert first.state_dict["resnet18"].tolist() == [1.0, 1.0]
    assert first.digest == again.digest


def test_resolve_weights_when_nothing_works_then_one_sentence_tells_what_to_do(tmp_path):
    """The sentence names the backbone, the reason and three ways out."""
    with pytest.raises(WeightsUnavailable, match=r"resnet18: timm's download.*folder.*--weights.*'untrained'"):
        resolve_weights("resnet18", None, [tmp_path], fetch=_no_download)


def test_resolve_weights_when_untrained_then_draws_them_from_the_seed():
    """The control fits the backbone, can be repeated, and is never taken for trained weights."""
    found = resolve_weights("test_resnet", "untrained", seed=1, fetch=_no_download)
    again = resolve_weights("test_resnet", "untrained", seed=1)
    other = resolve_weights("test_resnet", "untrained", seed=2)
    backbone = CnnBackbone("test_resnet", (1, 2))
    backbone.load_weights(found.state_dict)

    assert found.source == "untrained"
    assert found.digest == again.digest != other.digest
    assert torch.equal(found.state_dict["conv1.0.weight"], untrained_weights("test_resnet", 1)["conv1.0.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "can't be read"), (b"", "no safetensors"), (b"\x80\x04pickle", "no safetensors")],
    ids=["absent", "empty", "pickle"],
)
def test_resolve_weights_when_the_file_is_unusable_then_says_why(tmp_path, content, message):
    """A missing file and one of another format are told apart; no other format is ever opened."""
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(WeightsUnavailable, match=message):
        resolve_weights("resnet18", path)


def test_resolve_weights_when_given_the_shared_folder_then_digests_are_the_published_ones():
    """The digest is the one that the files' own description states."""
    folder = require_shared("weights")

    digests = [resolve_weights(name, None, [folder]).digest for name in ("resnet18", "mobilenetv1_100")]

    assert [digest[:8] for digest in digests] == ["ccb7789b", "cb6483cd"]


def test_tell_idle_folder_when_the_folder_holds_other_backbones_then_names_them(tmp_path):
    """Nobody fits on another backbone than they brought, and learns which option takes the brought one."""
    _write(tmp_path / "resnet18_in1k_to_layer3.safetensors", 1.0)
    _write(tmp_path / "mine.safetensors", 1.0)

    with pytest.raises(WeightsUnavailable, match=r"no weights of embedded, .*; it holds mine, resnet18\. .*--backbone"):
        tell_idle_folder(str(tmp_path), "embedded")


def test_tell_idle_folder_when_the_folder_is_empty_then_says_to_leave_it_out(tmp_path):
    """An empty folder is most likely a wrong path."""
    with pytest.raises(WeightsUnavailable, match=r"no weights of embedded, .*; or leave --weights out"):
        tell_idle_folder(str(tmp_path), "embedded")


@pytest.mark.parametrize(
    ("given", "backbone"),
    [("FOLDER", "resnet18"), ("FOLDER", None), ("untrained", "embedded"), ("FOLDER/resnet18.safetensors", "embedded")],
)
def test_tell_idle_folder_when_the_folder_is_used_or_none_is_named_then_says_nothing(tmp_path, given, backbone):
    """A file is held against its backbone where it is read, and a detector without a backbone reads none."""
    _write(tmp_path / "resnet18.safetensors", 1.0)

    folder = given.replace("FOLDER", str(tmp_path))

    assert [tell_idle_folder(folder, backbone, of_environment=known) for known in (False, True)] == [None, None]
