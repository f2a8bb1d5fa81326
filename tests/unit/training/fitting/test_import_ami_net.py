"""Released checkpoints of AMI-Net become detectors, or a sentence that names what does not fit."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.ami_net import AmiNet, AmiNetConfig
from models.backbones import untrained_weights
from training.config import load_config
from training.fitting.checkpoint import CheckpointRefused
from training.fitting.import_checkpoint import import_ami_net, read_released, tell_softened

_SIZE = (32, 32)
_OFFICIAL = {
    "centre_queries": "cls_token",
    "centre_blocks.": "auxiliary.",
    "centre_norm.": "norm_auxi.",
    "centre_embedding.": "auxi_embed.proj.",
    "patch_embedding.": "patch_embed.proj.",
    "prediction.": "inpainting_pred.",
}
_LAYERS = {"conv1.": "block1.0.", "bn1.": "block1.1.", "layer1.": "block2.", "layer2.": "block3.", "layer3.": "block4."}


@pytest.fixture(scope="module")
def detector() -> AmiNet:
    """Build the published architecture with a narrow and shallow transformer."""
    return AmiNet(AmiNetConfig(image_size=_SIZE, token_channels=64, heads=1, blocks=2, centres=3))


@pytest.fixture
def checkpoint(detector) -> dict[str, Tensor]:
    """Name a detector's own tensors as the official files do, without the feature extractor."""
    state = {"Roncon_model.pos_embed": detector.positions[None]}
    for name, value in detector.state_dict().items():
        if not name.startswith("backbone."):
            ours = next((prefix for prefix in _OFFICIAL if name.startswith(prefix)), "")
            state[f"Roncon_model.{_OFFICIAL.get(ours, '')}{name.removeprefix(ours)}"] = value + 0.5
    return state


def test_import_when_the_backbone_is_left_out_then_only_it_is_missing(checkpoint):
    """Every tensor arrives under its name here, sizes are read off the shapes, and the backbone has no weights."""
    imported = import_ami_net(checkpoint, _SIZE)

    assert (imported.config.blocks, imported.config.centres, imported.config.heads) == (2, 3, 1)
    assert torch.equal(imported.centre_queries, checkpoint["Roncon_model.cls_token"])
    assert torch.equal(imported.norm.weight, checkpoint["Roncon_model.norm.weight"])
    assert torch.equal(imported.centre_norm.weight, checkpoint["Roncon_model.norm_auxi.weight"])
    assert not imported.backbone.is_loaded


def test_import_when_the_backbone_is_inside_then_it_is_loaded_by_stage(checkpoint):
    """The four blocks of the feature extractor are the stem and the first three layers."""
    weights = untrained_weights("wide_resnet50_2.tv_in1k")
    for key, value in weights.items():
        ours = next((prefix for prefix in _LAYERS if key.startswith(prefix)), None)
        if ours is not None:
            checkpoint[f"Feature_extractor.{_LAYERS[ours]}{key.removeprefix(ours)}"] = value

    imported = import_ami_net(checkpoint, _SIZE)

    assert imported.backbone.is_loaded
    assert torch.equal(imported.backbone.network.layer3[5].conv3.weight, weights["layer3.5.conv3.weight"])


@pytest.mark.parametrize("name", ["AMAE.pth", "AMAE.safetensors"])
def test_import_when_given_a_file_then_reads_it_without_running_anything(tmp_path, checkpoint, name):
    """The released files hold the dictionary under a key of its own; a flat safetensors file will do as well."""
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save({"epoch": 290, "state_dict": checkpoint}, path)
    else:
        save_file(checkpoint, path)

    imported = import_ami_net(path, _SIZE)

    assert torch.equal(imported.prediction.bias, checkpoint["Roncon_model.inpainting_pred.bias"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("Roncon_model.cls_token"), "lacks Roncon_model.cls_token"),
        (lambda state: state.pop("Roncon_model.auxi_embed.proj.bias"), "lacks Roncon_model.auxi_embed.proj.bias"),
        (lambda state: state.update({"decoder.bias": torch.ones(1)}), "unknown key decoder.bias"),
        (
            lambda state: state.update({"Roncon_model.blocks.1.norm3.bias": torch.ones(64)}),
            "unknown key Roncon_model.blocks.1.norm3.bias",
        ),
        (
            lambda state: state.update({"Roncon_model.norm.bias": torch.ones(3)}),
            r"Roncon_model.norm.bias has shape \(3,",
        ),
        (lambda state: state.update({"Roncon_model.cls_token": torch.ones(3)}), "cls_token has shape"),
        (lambda state: state.update({"Roncon_model.pos_embed": torch.ones(1, 4, 64)}), "images of 32 x 32"),
        (lambda state: state.update({"Roncon_model.pos_embed": torch.ones(1, 9, 64)}), "images of 32 x 32"),
        (
            lambda state: state.update({"Roncon_model.patch_embed.proj.weight": torch.ones(64, 448, 4, 4)}),
            "448 channels; only AMI-Nets over WideResNet-50-2, which has 1792",
        ),
        (lambda state: state.update({"Feature_extractor.block5.0.bias": torch.ones(1)}), "unknown key block5"),
    ],
    ids=[
        "missing",
        "missing inside",
        "stranger",
        "unknown",
        "shape",
        "no queries",
        "table",
        "grid",
        "backbone",
        "extractor",
    ],
)
def test_import_when_a_key_does_not_fit_then_names_it_officially(
    checkpoint, spoil: Callable[[dict[str, Tensor]], object], message
):
    """The sentence uses the name that stands in the file."""
    spoil(checkpoint)

    with pytest.raises(ValueError, match=message):
        import_ami_net(checkpoint, _SIZE)


@pytest.mark.parametrize(("side", "words"), [(64, "images of 64 x 64"), (40, "multiple")], ids=["table", "grid"])
def test_read_when_the_side_does_not_fit_then_says_to_change_the_side_and_not_the_file(
    tmp_path, checkpoint, side, words
):
    """The positions are a fixed table; whoever asks for another side is not sent to fetch the file again."""
    path = tmp_path / "AMAE.safetensors"
    save_file(checkpoint, path)

    with pytest.raises(CheckpointRefused, match=words) as refused:
        read_released("ami_net", path, side)

    assert "leave --size out" in str(refused.value)
    assert "the authors' own file" not in str(refused.value)


def test_tell_softened_when_the_mask_has_a_slope_then_says_so_and_how_to_take_the_authors_step():
    """The paper configuration's mask is not the released one; with the hard step nothing is told."""
    as_shipped = load_config("paper", "ami_net")
    as_released = load_config("paper", "ami_net", ["hyperparameters.mask_softness=0"])

    assert "--set hyperparameters.mask_softness=0" in str(tell_softened(as_shipped))
    assert tell_softened(as_released) is None
    assert tell_softened(load_config("paper", "inp_former")) is None
