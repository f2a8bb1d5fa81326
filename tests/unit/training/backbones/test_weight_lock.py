"""The lock of weights: what arrives is what was packed, and whoever misses a file is told the command."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from models.backbones import EMBEDDED, BackboneUnavailable
from training.backbones import weight_lock
from training.backbones.weight_lock import (
    LOCK_FILE,
    SHIPPED_FOLDER,
    WeightsRefused,
    digest_of,
    fetch_weights,
    find_locked,
    how_to_get,
    read_lock,
    refuse_changed_file,
    verify_folder,
)
from training.backbones.weights import resolve_weights
from training.commands.backbones import weights as weights_commands
from training.config import RunConfig, load_config

_CONFIGS = Path(weight_lock.__file__).parents[1] / "configs"
_SMALL = "vit_small_patch14_reg4_dinov2"


def _download(name):
    """Return the same few tensors for the same name, as a hub would."""
    return {"norm.weight": torch.full((3,), float(len(name)))}


def _other_download(name):
    return {"norm.weight": torch.zeros(3)}


def _no_connection(name):
    raise BackboneUnavailable(f"timm's download of {name} failed (ConnectionError)")


def _damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_project_lock_when_read_then_names_the_backbones_of_the_documents():
    """Quick start, published configurations and their popular names are all locked, each with source and licence."""
    lock = read_lock()

    assert {EMBEDDED, "wide_resnet50_2.tv_in1k", _SMALL, "vit_base_patch14_reg4_dinov2"} <= lock.keys()
    assert all(entry.source and entry.licence for entry in lock.values())
    names = [name for entry in lock.values() for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))
    assert {
        source.removeprefix("timm:") for entry in lock.values() if (source := entry.source).startswith("timm:")
    } <= set(names)


@pytest.mark.parametrize("path", sorted(_CONFIGS.glob("**/*.yaml")), ids=lambda path: str(path.relative_to(_CONFIGS)))
def test_project_lock_when_a_configuration_has_a_backbone_then_it_can_be_packed(path):
    """What a configuration stands on can be carried to a machine without internet."""
    backbone = yaml.safe_load(path.read_text(encoding="utf-8")).get("backbone")

    assert backbone is None or find_locked(backbone).name == backbone


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("dinov2_vits14_reg", _SMALL),
        ("dinov2_vitb14_reg", "vit_base_patch14_reg4_dinov2"),
        ("dinov2_vitl14_reg", "vit_large_patch14_reg4_dinov2"),
        ("wide_resnet50_2", "wide_resnet50_2.tv_in1k"),
        (EMBEDDED, EMBEDDED),
    ],
)
def test_find_locked_when_given_a_popular_name_then_returns_timms(alias, name):
    """People may use the names that the networks were published under."""
    assert find_locked(alias).name == name


def test_find_locked_when_unknown_then_lists_what_is_known():
    """A wrong name is answered with the right ones."""
    with pytest.raises(WeightsRefused, match=r"'resnet999'; known are embedded, .*wide_resnet50_2"):
        find_locked("resnet999")


def test_project_lock_when_compared_with_the_package_then_the_shipped_file_is_the_locked_one():
    """The weights in the wheel are those that we vouch for, and they are small."""
    path = SHIPPED_FOLDER / find_locked(EMBEDDED).file

    assert digest_of(path) == find_locked(EMBEDDED).sha256
    assert path.stat().st_size <= 6_000_000


def test_fetch_when_downloaded_then_the_folder_has_file_and_lock(tmp_path):
    """What was downloaded is recorded with its digest, and is found by a run afterwards."""
    (entry,) = fetch_weights(["dinov2_vits14_reg"], tmp_path, fetch=_download)

    assert entry.sha256 == digest_of(tmp_path / f"{_SMALL}.safetensors")
    assert read_lock(tmp_path / LOCK_FILE) == {_SMALL: entry}
    assert [one.fault for one in verify_folder(tmp_path)] == [None]
    assert resolve_weights("dinov2_vits14_reg", search=[tmp_path]).digest == entry.sha256


def test_fetch_when_repeated_then_does_not_download_again(tmp_path):
    """A file that is there and as locked stays."""
    first = fetch_weights([_SMALL], tmp_path, fetch=_download)

    assert fetch_weights([_SMALL], tmp_path, fetch=_no_connection) == first


def test_fetch_when_the_download_is_another_than_recorded_then_refuses_and_keeps_nothing(tmp_path):
    """Once a digest is on record, other contents under the name are refused."""
    fetch_weights([_SMALL], tmp_path, fetch=_download)
    (tmp_path / f"{_SMALL}.safetensors").unlink()

    with pytest.raises(WeightsRefused, match="the lock says"):
        fetch_weights([_SMALL], tmp_path, fetch=_other_download)

    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_FILE]


def test_fetch_when_there_is_no_connection_then_says_which_command_to_run_where_there_is_one(tmp_path):
    """The sentence can be copied to a connected machine."""
    with pytest.raises(WeightsRefused, match=f"on a connected machine run `flawline weights pack carry {_SMALL}`"):
        fetch_weights(["dinov2_vits14_reg"], tmp_path, fetch=_no_connection)


def test_fetch_when_weights_come_by_hand_only_then_says_which_file_to_place(tmp_path):
    """Where no hub has the variant, the file is named."""
    with pytest.raises(WeightsRefused, match=r"put mobilenetv1_100_in1k_to_blocks3.safetensors .* --weights"):
        fetch_weights(["mobilenetv1_100"], tmp_path, fetch=_download)


def test_pack_when_the_files_are_at_hand_then_copies_them_without_a_connection(tmp_path):
    """Carried weights can be packed again for the next machine."""
    fetch_weights([_SMALL], tmp_path / "here", fetch=_download)

    fetch_weights([_SMALL, EMBEDDED], tmp_path / "carry", search=[tmp_path / "here"], fetch=_no_connection)

    assert [one.fault for one in verify_folder(tmp_path / "carry")] == [None, None]


@pytest.mark.parametrize(("change", "fault"), [("damage", "changed"), ("delete", "missing")])
def test_verify_when_a_file_suffered_on_the_way_then_says_which(tmp_path, change, fault):
    """A damaged and a forgotten file are told apart."""
    fetch_weights([_SMALL], tmp_path, fetch=_download)
    path = tmp_path / f"{_SMALL}.safetensors"
    _damage(path) if change == "damage" else path.unlink()

    assert [(one.entry.name, one.fault) for one in verify_folder(tmp_path)] == [(_SMALL, fault)]


def test_verify_when_a_folder_swears_to_another_file_than_the_project_then_says_so(tmp_path):
    """A folder can't replace weights that we vouch for by bringing its own lock."""
    path = tmp_path / "embedded.safetensors"
    path.write_bytes(b"something else")
    line = find_locked(EMBEDDED).model_dump() | {"sha256": digest_of(path)}
    (tmp_path / LOCK_FILE).write_text(json.dumps({"schema_version": 1, "weights": [line]}))

    assert [one.fault for one in verify_folder(tmp_path)] == ["against the project's lock"]


def test_resolve_weights_when_a_carried_file_was_changed_then_refuses(tmp_path):
    """A run never starts on a file that differs from the lock beside it."""
    fetch_weights([_SMALL], tmp_path, fetch=_download)
    _damage(tmp_path / f"{_SMALL}.safetensors")

    with pytest.raises(WeightsRefused, match="the lock says"):
        resolve_weights(_SMALL, search=[tmp_path])


def test_resolve_weights_when_embedded_then_takes_the_package_and_never_asks_a_hub():
    """The quick start needs nothing but the package."""
    found = resolve_weights(EMBEDDED, fetch=_no_connection)

    assert found.digest == find_locked(EMBEDDED).sha256
    assert found.source == "embedded.safetensors"


@pytest.mark.parametrize("content", ["{}", "[]", '{"schema_version": 2, "weights": []}', "not json"])
def test_read_lock_when_it_is_none_then_refuses(tmp_path, content):
    """A lock of another version, or something else, is not guessed at."""
    (tmp_path / LOCK_FILE).write_text(content)

    with pytest.raises(WeightsRefused, match="pack the folder again"):
        read_lock(tmp_path / LOCK_FILE)


def test_read_lock_when_a_file_name_leaves_the_folder_then_refuses(tmp_path):
    """A lock that was tampered with can't make us read or write elsewhere."""
    line = find_locked(EMBEDDED).model_dump() | {"file": "../../embedded.safetensors"}
    (tmp_path / LOCK_FILE).write_text(json.dumps({"schema_version": 1, "weights": [line]}))

    with pytest.raises(WeightsRefused, match="pack the folder again"):
        refuse_changed_file(tmp_path / "embedded.safetensors")


def test_how_to_get_when_the_name_is_unknown_then_still_says_what_to_do():
    """Any of timm's names can be used with a file of one's own."""
    assert how_to_get("resnet999") == "put resnet999.safetensors into a folder and give it with --weights"


def test_list_command_when_run_then_shows_every_name_and_where_it_is(tmp_path):
    """One look tells what is here."""
    outcome = CliRunner().invoke(weights_commands, ["list", "--folder", str(tmp_path)])

    assert outcome.exit_code == 0
    assert "dinov2_vits14_reg" in outcome.output
    assert "in the package" in outcome.output


def test_pack_and_verify_commands_when_run_then_agree_on_the_lock(tmp_path):
    """The digest of the lock is shown on both sides of the gap."""
    packed = CliRunner().invoke(weights_commands, ["pack", str(tmp_path / "carry"), "embedded"])
    verified = CliRunner().invoke(weights_commands, ["verify", str(tmp_path / "carry")])

    assert (packed.exit_code, verified.exit_code) == (0, 0)
    digest = digest_of(tmp_path / "carry" / LOCK_FILE)
    assert digest in packed.output.replace("\n", "")
    assert digest in verified.output.replace("\n", "")


def test_verify_command_when_a_file_was_changed_then_exits_with_2_and_names_the_command(tmp_path):
    """The person behind the gap learns what to run on the other side."""
    CliRunner().invoke(weights_commands, ["pack", str(tmp_path / "carry"), "embedded"])
    _damage(tmp_path / "carry" / "embedded.safetensors")

    outcome = CliRunner().invoke(weights_commands, ["verify", str(tmp_path / "carry")])

    assert outcome.exit_code == 2
    assert "flawline weights pack carry embedded" in outcome.stderr


@pytest.mark.parametrize(
    ("written", "meant"),
    [("dinov2_vits14_reg", _SMALL), ("embedded", "embedded"), ("resnet18", "resnet18"), ("resnet50", "resnet50")],
)
def test_configuration_when_it_uses_an_alias_then_means_the_locked_backbone(written, meant):
    """A run may name a big backbone as people know it; every other name stays as it is."""
    paper = load_config("paper", overrides=["backbone=" + _SMALL]).model_dump()

    assert RunConfig.model_validate(paper | {"backbone": written}).backbone == meant
