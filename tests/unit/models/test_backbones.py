"""Frozen backbones: what they return, what they refuse, and that they stay as they are."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import (
    BackboneUnavailable,
    CnnBackbone,
    VitBackbone,
    build_backbone,
    fetch_pretrained,
    untrained_weights,
)
from tests.shared_material import require_shared


def _loaded(name: str, layers: tuple[int, ...], size: tuple[int, int] = (64, 64)) -> CnnBackbone | VitBackbone:
    backbone = build_backbone(name, layers, size)
    backbone.load_weights(untrained_weights(name))
    return backbone


def _images(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "layers"),
    [("test_resnet", (1, 3)), ("test_convnext", (0, 2)), ("mobilenetv1_100", (2, 3)), ("test_efficientnet", (1, 2))],
)
def test_cnn_when_run_then_returns_maps_of_the_promised_channels_and_strides(name, layers):
    """Each chosen stage gives `(B, C, H / stride, W / stride)`, height before width."""
    backbone = _loaded(name, layers)

    features = backbone(_images(64, 96))

    for feature, channels, stride in zip(features, backbone.channels, backbone.strides, strict=True):
        assert feature.shape == (2, channels, 64 // stride, 96 // stride)


def test_cnn_when_run_then_equals_timms_own_feature_network():
    """Cutting and naming change nothing: the values are those of timm's `features_only`, on normalised images."""
    name, images = "test_resnet", _images(64, 64)
    state = untrained_weights(name)
    reference = timm.create_model(name, features_only=True, out_indices=(2, 3)).eval()
    reference.load_state_dict(state, strict=False)
    backbone = _loaded(name, (2, 3))

    with torch.no_grad():
        expected = reference((images - backbone.mean) / backbone.std)

    for ours, theirs in zip(backbone(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_cnn_when_built_then_later_stages_are_gone():
    """What no chosen layer needs is deleted, so it can't run."""
    backbone = CnnBackbone("test_resnet", (1, 2))

    names = [name for name, _ in backbone.named_parameters()]

    assert any("layer2" in name for name in names)
    assert not any(part in name for name in names for part in ("layer3", "layer4", "fc."))


def test_vit_when_run_then_returns_patch_tokens_without_extra_tokens():
    """Each tapped block gives `(B, N, C)` for the patches alone, also for images that are not square."""
    backbone = _loaded("test_vit2", (1, 3), (64, 96))

    features = backbone(_images(64, 96))

    assert backbone.grid == (4, 6)
    assert [feature.shape for feature in features] == [(2, 24, 64), (2, 24, 64)]


def test_vit_when_at_its_own_size_then_equals_timms_intermediate_outputs():
    """At the size of pretraining positions are not interpolated and the values are timm's."""
    images = _images(160, 160)
    backbone = _loaded("test_vit2", (1, 3), (160, 160))
    reference = timm.create_model("test_vit2").eval()
    reference.load_state_dict(untrained_weights("test_vit2"))

    with torch.no_grad():
        expected = reference.forward_intermediates(
            (images - backbone.mean) / backbone.std,
            indices=[1, 3],
            intermediates_only=True,
            output_fmt="NLC",
        )

    for ours, theirs in zip(backbone(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_vit_when_at_another_size_then_positions_follow_dinov2s_scale():
    """Positions are sampled with the scale (n + 0.1) / n0 for each side, not resized to n."""
    backbone = _loaded("test_vit2", (1,), (64, 96))
    embedding = untrained_weights("test_vit2")["pos_embed"][:, 1:].reshape(1, 10, 10, 64).permute(0, 3, 1, 2)

    offset = functional.interpolate(embedding, scale_factor=(4.1 / 10, 6.1 / 10), mode="bicubic")
    plain = functional.interpolate(embedding, size=(4, 6), mode="bicubic")

    torch.testing.assert_close(backbone.positions, offset.flatten(2).transpose(1, 2))
    assert not torch.allclose(backbone.positions, plain.flatten(2).transpose(1, 2), atol=1e-3)


def test_vit_when_copied_and_loaded_anew_then_the_copys_own_positions_follow():
    """Positions belong to the module that was loaded, not to the one it was copied from."""
    first = _loaded("test_vit2", (1,))
    second = copy.deepcopy(first)
    before = first.positions.clone()

    second.load_weights(untrained_weights("test_vit2", seed=1))

    assert torch.equal(first.positions, before)
    assert not torch.equal(second.positions, before)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit2"])
def test_backbone_when_no_weights_were_loaded_then_refuses_to_run(name):
    """Random weights never pass for features by accident."""
    backbone = build_backbone(name, (1, 2), (64, 64))

    with pytest.raises(RuntimeError, match="no weights"):
        backbone(_images(64, 64))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit2"])
def test_backbone_when_told_to_train_then_stays_frozen(name):
    """No mode and no backward pass changes a backbone or reaches its weights."""
    backbone = _loaded(name, (1, 2))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}

    nn.ModuleList([backbone]).train()
    features = backbone(_images(64, 64))

    assert not any(module.training for module in backbone.modules())
    assert not any(feature.requires_grad for feature in features)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("layer2.0.conv1.weight"), "missing layer2.0.conv1.weight"),
        (lambda state: state.update(conv7=torch.zeros(1)), "unknown conv7"),
        (lambda state: state.update({"bn1.weight": torch.zeros(3)}), r"bn1.weight has shape \(3,\)"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_load_weights_when_a_key_does_not_fit_then_names_it(spoil, message):
    """A wrong file is refused by the name of its first wrong keys, and nothing counts as loaded."""
    state = untrained_weights("test_resnet")
    spoil(state)
    backbone = CnnBackbone("test_resnet", (1, 2))

    with pytest.raises(ValueError, match=message):
        backbone.load_weights(state)

    assert not backbone.is_loaded


def test_load_weights_when_cut_stages_and_counters_are_missing_then_accepts():
    """A file may end where the backbone ends, and need not count training steps."""
    backbone = CnnBackbone("test_resnet", (1, 2))
    kept = {key.removeprefix("network.") for key in backbone.state_dict()}
    state = {k: v for k, v in untrained_weights("test_resnet").items() if k in kept and "num_batches" not in k}

    backbone.load_weights(state)

    assert backbone.is_loaded


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("resnet18", "resnet18_in1k_to_layer3.safetensors"),
        ("mobilenetv1_100", "mobilenetv1_100_in1k_to_blocks3.safetensors"),
    ],
)
def test_load_weights_when_given_the_shared_files_then_every_key_matches(name, file):
    """The documented files fit the documented names without exception."""
    backbone = build_backbone(name, (2, 3), (64, 64))

    backbone.load_weights(load_file(require_shared("weights") / file))

    assert [feature.shape[2:] for feature in backbone(_images(64, 64))] == [(8, 8), (4, 4)]


@pytest.mark.parametrize(("name", "mean"), [("mobilenetv1_100", 0.5), ("resnet18", 0.485)])
def test_backbone_normalises_as_its_weights_were_trained(name, mean):
    """MobileNet v1 expects [-1, 1], ResNet-18 the statistics of ImageNet."""
    backbone = build_backbone(name, (2, 3), (64, 64))

    assert backbone.mean.flatten()[0].item() == pytest.approx(mean)


def test_mobilenet_when_named_plainly_then_is_the_variant_of_its_authors():
    """TensorFlow's guard of 1e-3 and its padding to the right and below go with TensorFlow's weights."""
    backbone = build_backbone("mobilenetv1_100", (2, 3), (64, 64))

    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]

    assert {norm.eps for norm in norms} == {1e-3}
    assert type(backbone.network.conv_stem).__name__ == "Conv2dSame"


@pytest.mark.parametrize(
    ("name", "layers", "size", "message"),
    [
        ("no_such_network", (1,), (64, 64), "no_such_network"),
        ("test_resnet", (), (64, 64), "layers"),
        ("test_resnet", (2, 1), (64, 64), "ascending"),
        ("test_resnet", (1, 9), (64, 64), "not 9"),
        ("test_vit2", (1, 20), (64, 64), "not 20"),
        ("test_vit2", (1, 2), (64, 65), "patch size"),
    ],
)
def test_build_backbone_when_a_choice_is_impossible_then_says_which(name, layers, size, message):
    """Unknown names, layers and sizes are refused before anything runs."""
    with pytest.raises(ValueError, match=message):
        build_backbone(name, layers, size)


def test_kinds_when_swapped_then_refuse():
    """A transformer is no pyramid and a pyramid is no transformer."""
    with pytest.raises(ValueError, match="not a convolutional"):
        CnnBackbone("test_vit2", (1,))
    with pytest.raises(ValueError, match="not a plain vision transformer"):
        VitBackbone("test_resnet", (1,), (64, 64))


def test_untrained_weights_when_drawn_then_depend_on_the_seed_alone():
    """The control can be repeated, and drawing it leaves the global random state as it was."""
    torch.manual_seed(3)
    expected_next = torch.rand(1)
    torch.manual_seed(3)

    first, again, other = (untrained_weights("test_resnet", seed)["conv1.0.weight"] for seed in (1, 1, 2))

    assert torch.equal(torch.rand(1), expected_next)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["mobilenetv1_100", "test_resnet"], ids=["no such weights", "no network"])
def test_fetch_pretrained_when_there_is_nothing_to_fetch_then_raises_one_kind(name):
    """Whatever timm's download raises, callers see one error that names the backbone."""
    with pytest.raises(BackboneUnavailable, match=name):
        fetch_pretrained(name)
