"""The weights in the package: they fit, they are sound, and their channels have the spread that they were scaled to."""

import pytest
import safetensors.torch
import torch

from models.backbones import EMBEDDED, BackboneUnavailable, CnnBackbone, fetch_pretrained
from training.backbones.weight_lock import SHIPPED_FOLDER
from training.backbones.weights import resolve_weights
from training.procedural.frames import FrameStream


@pytest.fixture(scope="module")
def backbone():
    """The backbone as a run gets it."""
    loaded = CnnBackbone(EMBEDDED, (1, 2, 3))
    loaded.load_weights(resolve_weights(EMBEDDED).state_dict)
    return loaded


@pytest.fixture(scope="module")
def images():
    """Generated frames `(B, 3, 128, 128)` in [0, 1] that no student learnt from."""
    frames = torch.from_numpy(FrameStream(123, texture_count=16, shard_size=64).shard(0))
    return frames.permute(0, 3, 1, 2).float() / 255


def test_embedded_when_built_then_has_strides_4_8_16_and_few_parameters(backbone):
    """Small enough for a CPU, with the maps that the detectors tap."""
    assert backbone.strides == (4, 8, 16)
    assert backbone.channels == (64, 192, 384)
    assert sum(parameter.numel() for parameter in backbone.parameters()) <= 3_000_000


def test_embedded_when_read_then_every_value_is_finite_float16():
    """Rounding to half precision lost no weight to zero or infinity."""
    state = safetensors.torch.load_file(SHIPPED_FOLDER / "embedded.safetensors")

    assert {value.dtype for value in state.values()} == {torch.float16}
    assert all(value.isfinite().all() for value in state.values())


def test_embedded_when_it_sees_generated_frames_then_channels_have_about_unit_spread(backbone, images):
    """The scaling is in the weights: whoever taps the maps needs no constants beside them."""
    for one in backbone(images):
        spread = one.std(dim=(0, 2, 3))

        assert 0.6 < float(spread.median()) < 1.3
        assert float(spread.max()) < 4


def test_embedded_when_the_frame_changes_a_little_then_so_do_the_maps(backbone, images):
    """Features react to a defect where it is, and hardly elsewhere."""
    damaged = images[:1].clone()
    damaged[..., 40:48, 40:48] = 1 - damaged[..., 40:48, 40:48]

    _, fine, _ = (a - b for a, b in zip(backbone(damaged), backbone(images[:1]), strict=True))

    moved = fine.square().sum(dim=1).sqrt()[0]
    assert moved[4:7, 4:7].mean() > 5 * moved[10:, 10:].mean()


def test_fetch_pretrained_when_asked_for_the_embedded_one_then_refuses_without_a_connection():
    """No hub is ever asked for what the package brings."""
    with pytest.raises(BackboneUnavailable, match="comes with Flawline"):
        fetch_pretrained(EMBEDDED)
