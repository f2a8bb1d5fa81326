"""Released checkpoints become detectors, or a sentence that names what does not fit."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.inp_former import InpFormer, InpFormerConfig
from training.config import load_config
from training.fitting.checkpoint import CheckpointRefused
from training.fitting.import_checkpoint import dinov2_to_timm, import_inp_former, read_released

_SIZE = (28, 28)
_OFFICIAL = {"prototype_tokens": "prototype_token", "extractor.": "aggregation.0.", "bottleneck.": "bottleneck.0."}


@pytest.fixture(scope="module")
def detector() -> InpFormer:
    """Build the smallest published architecture."""
    return InpFormer(InpFormerConfig(backbone="vit_small_patch14_reg4_dinov2", image_size=_SIZE))


@pytest.fixture
def checkpoint(detector) -> dict[str, Tensor]:
    """Name a detector's own tensors as the official files do, without the encoder."""
    state = {}
    for name, value in detector.state_dict().items():
        if not name.startswith("backbone."):
            prefix = next((ours for ours in _OFFICIAL if name.startswith(ours)), "")
            state[_OFFICIAL.get(prefix, "") + name.removeprefix(prefix)] = value + 0.5
    return state


def test_import_when_the_encoder_is_left_out_then_only_the_backbone_is_missing(checkpoint):
    """Every tensor arrives under its name here, and the detector says that its backbone has no weights."""
    imported = import_inp_former(checkpoint, _SIZE)

    assert torch.equal(imported.prototype_tokens, checkpoint["prototype_token"])
    assert torch.equal(imported.extractor.attn.kv.weight, checkpoint["aggregation.0.attn.kv.weight"])
    assert torch.equal(imported.decoder[7].mlp.fc2.bias, checkpoint["decoder.7.mlp.fc2.bias"])
    assert not imported.backbone.is_loaded


def test_import_when_the_decoder_is_less_deep_then_so_is_the_detector(tmp_path, checkpoint):
    """The depth is read off the names, and a run that takes the checkpoint over is told it."""
    short = {name: value for name, value in checkpoint.items() if not re.match(r"decoder\.[4-7]\.", name)}
    path = tmp_path / "model.safetensors"
    save_file(short, path)

    imported, released = import_inp_former(short, _SIZE), read_released("inp_former", path, _SIZE[0])

    assert (len(imported.decoder), imported.config.decoder_blocks) == (4, 4)
    assert "hyperparameters.decoder_blocks=4" in released.settings
    config = load_config("paper", "inp_former", released.settings)
    InpFormer(config.detector_config()).load_state_dict(dict(released.tensors), strict=False)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_import_when_given_a_file_then_reads_it_without_running_anything(tmp_path, checkpoint, suffix):
    """Both formats are read as plain tensors."""
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save(checkpoint, path)
    else:
        save_file(checkpoint, path)

    imported = import_inp_former(path, _SIZE)

    assert torch.equal(imported.bottleneck.fc1.weight, checkpoint["bottleneck.0.fc1.weight"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.pth", {"model": {"prototype_token": torch.ones(1)}}, "flat dictionary"),
        ("model.pth", {"path": Path("anywhere")}, "plain tensors"),
        ("model.pth", None, "plain tensors"),
        ("model.safetensors", None, "plain tensors"),
    ],
    ids=["nested", "an object", "noise as pth", "noise as safetensors"],
)
def test_import_when_the_file_holds_something_else_then_refuses(tmp_path, name, content, message):
    """Nested dictionaries, objects of other classes and broken files are refused before anything of them runs."""
    path = tmp_path / name
    if content is None:
        path.write_bytes(b"noise")
    else:
        torch.save(content, path)

    with pytest.raises(ValueError, match=message):
        import_inp_former(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("prototype_token"), "lacks prototype_token"),
        (lambda state: state.pop("aggregation.0.attn.q.weight"), "lacks aggregation.0.attn.q.weight"),
        (lambda state: state.update({"extractor.norm1.bias": torch.ones(384)}), "unknown key extractor.norm1.bias"),
        (lambda state: state.update({"decoder.8.norm1.weight": torch.ones(384)}), "9 blocks, which 2 groups"),
        (lambda state: state.update({"decoder.7.norm3.weight": torch.ones(384)}), "unknown key decoder.7.norm3.weight"),
        (lambda state: state.update({"decoder.norm.weight": torch.ones(384)}), "unknown key decoder.norm.weight"),
        (
            lambda state: state.update({"bottleneck.0.fc1.bias": torch.ones(3)}),
            r"bottleneck.0.fc1.bias has shape \(3,\)",
        ),
        (lambda state: state.update({"prototype_token": torch.ones(6, 100)}), "100 channels"),
        (lambda state: state.update({"prototype_token": torch.ones(6)}), "prototype_token has shape"),
        (lambda state: state.update({"decoder.0.attn.learn_scale": torch.ones(12, 1, 1)}), "12 heads; 6"),
        (lambda state: state.update({"encoder.cls_token": torch.ones(1, 1, 384)}), "has no register_tokens"),
    ],
    ids=[
        "missing",
        "missing inside",
        "our name",
        "half a block",
        "unknown",
        "unknown beside blocks",
        "shape",
        "channels",
        "not a matrix",
        "heads",
        "half an encoder",
    ],
)
def test_import_when_a_key_does_not_fit_then_names_it_officially(
    checkpoint, spoil: Callable[[dict[str, Tensor]], object], message
):
    """The sentence uses the name that stands in the file."""
    spoil(checkpoint)

    with pytest.raises(ValueError, match=message):
        import_inp_former(checkpoint, _SIZE)


def test_read_when_the_side_does_not_fit_then_says_to_change_the_side_and_not_the_file(tmp_path, checkpoint):
    """Whoever asks for a side that is no multiple of the patch is not sent to fetch the file again."""
    path = tmp_path / "model.safetensors"
    save_file(checkpoint, path)

    with pytest.raises(CheckpointRefused, match=r"14.*leave --size out for the 392") as refused:
        read_released("inp_former", path, 400)

    assert "the authors' own file" not in str(refused.value)


def test_read_when_the_encoder_is_another_one_of_the_authors_options_then_sends_nobody_to_fetch_the_file(
    tmp_path, checkpoint
):
    """Their scripts also fit over DINOv2 without registers, and the file is then just as they saved it."""
    path = tmp_path / "model.pth"
    torch.save(checkpoint | {"encoder.cls_token": torch.ones(1, 1, 384), "encoder.pos_embed": torch.ones(1)}, path)

    with pytest.raises(CheckpointRefused, match=r"over DINOv2 with registers.*flawline train") as refused:
        read_released("inp_former", path, _SIZE[0])

    assert "the authors' own file" not in str(refused.value)


def test_dinov2_to_timm_when_renamed_then_the_class_token_carries_its_position():
    """Timm keeps positions of patches only; the sum is the same, and the mask token is dropped."""
    state = {
        "cls_token": torch.ones(1, 1, 2),
        "register_tokens": torch.zeros(1, 4, 2),
        "mask_token": torch.zeros(1, 2),
        "pos_embed": torch.arange(6.0).reshape(1, 3, 2),
        "blocks.0.ls1.gamma": torch.ones(2),
    }

    renamed = dinov2_to_timm(state)

    assert renamed.keys() == {"cls_token", "reg_token", "pos_embed", "blocks.0.ls1.gamma"}
    assert renamed["cls_token"].tolist() == [[[1.0, 2.0]]]
    assert renamed["pos_embed"].tolist() == [[[2.0, 3.0], [4.0, 5.0]]]
