"""What is INP-Former's own: soft mining, sampling, and its configuration's limits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from models.blocks.soft_mining import mined_direction_loss
from models.detector import PassStage
from models.inp_former import InpFormer, InpFormerConfig, _distance_to_nearest
from tests.plain_inp_branch import draw_prototypes, mine, rebuild
from tests.plain_networks import array_of, cosine, resize, shake, top_mean
from tests.tiny_detectors import TINY, make_detector


@pytest.mark.parametrize("exponent", [0.0, 3.0])
def test_soft_mining_when_recomputed_in_numpy_then_value_and_gradient_agree(exponent):
    """Plain loops in float64 give the same loss and the same gradient of every number, to 1e-5."""
    generator = torch.Generator().manual_seed(0)
    targets, rebuilt = torch.randn(2, 3, 2, 5, 4, generator=generator).unbind()
    rebuilt = rebuilt.requires_grad_()

    loss = mined_direction_loss(targets, rebuilt, exponent)
    loss.backward()

    value, gradient = mine(targets.double().numpy(), rebuilt.detach().double().numpy(), exponent)
    assert loss.item() == pytest.approx(value, abs=1e-5)
    np.testing.assert_allclose(rebuilt.grad.numpy(), gradient, rtol=1e-5, atol=1e-5)


def test_coherence_when_recomputed_in_numpy_then_agrees():
    """L_c is the mean over tokens of one minus their cosine to the nearest prototype, to 1e-5 of plain loops."""
    generator = torch.Generator().manual_seed(0)
    fused, prototypes = torch.randn(2, 7, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)

    distance = _distance_to_nearest(fused, prototypes)

    expected = [
        [min(1 - cosine(token, prototype) for prototype in drawn) for token in tokens]
        for tokens, drawn in zip(fused.double().numpy(), prototypes.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(distance.numpy(), expected, rtol=0, atol=1e-5)


def test_cnn_detector_when_only_scales_were_measured_then_refuses():
    """Half of the passes is not enough."""
    detector = make_detector("inp_former-cnn")
    first = detector.stages()[0]
    assert isinstance(first, PassStage)
    first.observe(torch.rand(2, 3, 64, 64))
    first.finish()

    with pytest.raises(RuntimeError, match="pass stages"):
        detector.encode(torch.rand(1, 3, 64, 64))


def test_soft_mining_when_compared_with_its_formula_then_only_gradients_are_scaled():
    """The loss value is the plain cosine distance; each token's gradient carries (distance / mean)^gamma."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(2, 2, 5, 3, generator=generator)
    plain = torch.randn(2, 2, 5, 3, generator=generator, requires_grad=True)
    mined = plain.detach().clone().requires_grad_()

    plain_loss = (1 - torch.cosine_similarity(targets.flatten(2), plain.flatten(2), dim=-1)).mean()
    plain_loss.backward()
    mined_loss = mined_direction_loss(targets, mined, exponent=3.0)
    mined_loss.backward()

    distance = 1 - torch.cosine_similarity(targets, plain.detach(), dim=-1)
    weight = torch.stack([(distance[:, group] / distance[:, group].mean()) ** 3 for group in (0, 1)], dim=1)
    torch.testing.assert_close(mined_loss, plain_loss)
    torch.testing.assert_close(mined.grad, plain.grad * weight[..., None])


def test_distance_to_nearest_when_a_token_is_a_prototype_then_is_zero():
    """Length does not matter, direction does; the nearest of the prototypes counts."""
    prototypes = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    fused = torch.tensor([[[5.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]])

    distance = _distance_to_nearest(fused, prototypes)

    torch.testing.assert_close(distance, torch.tensor([[0.0, 1 - 0.5**0.5, 1.0]]))


def test_loss_when_tokens_are_sampled_then_steps_differ_and_all_tokens_are_used_without():
    """Samples follow the step; without sampling a step changes nothing."""
    detector = make_detector("inp_former-cnn")
    whole = InpFormer(replace(TINY["inp_former-cnn"], extractor_tokens=None, decoder_tokens=None))
    whole.load_state_dict(detector.state_dict())
    tokens = torch.randn(2, 1, 64, 32, generator=torch.Generator().manual_seed(0))

    sampled = [detector.loss(tokens, step)["reconstruction"].item() for step in (0, 1)]
    unsampled = [whole.loss(tokens, step)["reconstruction"].item() for step in (0, 1)]

    assert sampled[0] != sampled[1]
    assert unsampled[0] == unsampled[1]


def test_initial_values_when_the_seed_is_the_same_then_are_the_same():
    """A run is repeatable from its configuration alone, whatever was drawn before."""
    config = TINY["inp_former-cnn"]

    torch.rand(1)
    first, again, other = InpFormer(config), InpFormer(config), InpFormer(replace(config, seed=2))

    trained = [name for name, parameter in first.named_parameters() if parameter.requires_grad]
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in trained)
    assert not torch.equal(states[0]["prototype_tokens"], states[2]["prototype_tokens"])


def test_initial_values_follow_the_reference_code():
    """Linear weights are normal of 0.01 cut at 0.03, biases 0, norms guarded by 1e-8, scales 1."""
    detector = InpFormer(TINY["inp_former-vit"])

    parts = [*detector.extractor.modules(), *detector.bottleneck.modules(), *detector.decoder.modules()]
    linears = [module for module in parts if isinstance(module, nn.Linear)]
    weights = torch.cat([linear.weight.flatten() for linear in linears])

    assert weights.abs().max().item() <= 0.03
    assert weights.std().item() == pytest.approx(0.00986, rel=0.02)  # 0.01 shrinks by the cut at three deviations
    assert not any(linear.bias.any() for linear in linears)
    assert {module.eps for module in parts if isinstance(module, nn.LayerNorm)} == {1e-8}
    assert all((block.attn.learn_scale == 1).all() for block in detector.decoder)


def test_map_source_when_prototypes_then_the_decoder_is_not_asked():
    """The zero-shot map is the distance to the nearest prototype: it has other values and needs no decoder."""
    detector = make_detector("inp_former-vit").eval()
    zero_shot = InpFormer(replace(TINY["inp_former-vit"], map_source="prototypes")).eval()
    zero_shot.load_backbone_weights(detector.backbone.network.state_dict())
    zero_shot.load_state_dict(detector.state_dict())
    zero_shot.decoder = nn.ModuleList()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        output, reconstruction = zero_shot(images), detector(images)

    assert output.anomaly_map.shape == reconstruction.anomaly_map.shape
    assert not torch.allclose(output.anomaly_map, reconstruction.anomaly_map)


def _built(**changes: object) -> InpFormer:
    """Build the tiny transformer variant with weights that are no longer those of the beginning."""
    detector = InpFormer(replace(TINY["inp_former-vit"], map_size=(48, 48), **changes)).eval()
    detector.load_backbone_weights(make_detector("inp_former-vit").backbone.network.state_dict())
    shake(detector.learnable_parameters())
    return detector


def _finish_slowly(distance: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Bring distances of tokens to the map: two resizes, and a blur with zeros behind the border."""
    large = resize(distance.reshape(grid), (64, 64), align_corners=True)
    resized = resize(large, (48, 48), align_corners=False)
    offsets = np.arange(-2, 3)
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 4.0**2))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(resized, 2), (5, 5))
    return (windows * kernel / kernel.sum()).sum(axis=(2, 3))


def test_zero_shot_map_when_recomputed_in_numpy_then_agrees():
    """From F_Q to the score: nearest of the drawn prototypes, two resizes, blur with zeros behind it, top 1 %."""
    detector = _built(map_source="prototypes")
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        output = detector(images)
        taps = detector.backbone(images)

    fused = np.mean([array_of(tap)[0] for tap in taps], axis=0)
    prototypes = draw_prototypes(detector, fused)
    distance = np.array([min(1 - cosine(token, prototype) for prototype in prototypes) for token in fused])
    expected = _finish_slowly(distance, detector.grid)
    np.testing.assert_allclose(output.anomaly_map[0].numpy(), expected, rtol=0, atol=1e-5)
    assert float(output.score) == pytest.approx(top_mean(expected, 0.01), abs=1e-5)


def test_reconstruction_map_when_recomputed_in_numpy_then_agrees():
    """From the tapped layers to the score: what the decoder reads from the prototypes, walked back group by group."""
    detector = _built()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        output = detector(images)
        taps = [array_of(tap)[0] for tap in detector.backbone(images)]

    targets = [np.mean(taps[:2], axis=0), np.mean(taps[2:], axis=0)]
    rebuilt = rebuild(detector, np.mean(taps, axis=0))
    apart = [[1 - cosine(*pair) for pair in zip(*group, strict=True)] for group in zip(targets, rebuilt, strict=True)]
    expected = _finish_slowly(np.mean(apart, axis=0), detector.grid)
    np.testing.assert_allclose(output.anomaly_map[0].numpy(), expected, rtol=0, atol=1e-5)
    assert float(output.score) == pytest.approx(top_mean(expected, 0.01), abs=1e-5)


def test_loss_when_recomputed_in_numpy_then_agrees():
    """L_sm is one cosine an image and group, averaged, and L_c, of each image's own prototypes, counts a fifth."""
    detector = _built()
    tokens = torch.randn(2, 2, 16, 64, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        terms = {name: float(value) for name, value in detector.loss(tokens, 0).items()}

    apart, nearest = [], []
    for targets in array_of(tokens):
        fused = targets.mean(axis=0)
        prototypes = draw_prototypes(detector, fused)
        nearest += [min(1 - cosine(token, prototype) for prototype in prototypes) for token in fused]
        apart += [
            1 - cosine(*(rows.ravel() for rows in pair)) for pair in zip(targets, rebuild(detector, fused), strict=True)
        ]
    expected = {"reconstruction": np.mean(apart), "coherence": 0.2 * np.mean(nearest)}
    assert terms == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("inp_former-vit", {"decoder_blocks": 3}, "multiple of groups"),
        ("inp_former-vit", {"layers": (1, 2, 3)}, "equal groups"),
        ("inp_former-vit", {"layers": None}, "set layers"),
        ("inp_former-vit", {"projected_channels": 8}, "CNN backbones"),
        ("inp_former-vit", {"heads": 5}, "heads"),
        ("inp_former-cnn", {"projected_channels": None}, "projected_channels"),
        ("inp_former-cnn", {"projected_channels": 999, "heads": 1}, "project"),
        ("inp_former-cnn", {"groups": 2}, "groups=1"),
        ("inp_former-cnn", {"image_size": (64, 72)}, "multiple of the stride"),
    ],
)
def test_detector_when_the_configuration_contradicts_itself_then_says_where(variant, changes, message):
    """Impossible combinations are refused before any frame is read."""
    with pytest.raises(ValueError, match=message):
        InpFormer(replace(TINY[variant], **changes))


def test_config_when_left_alone_then_holds_the_published_values():
    """The defaults are the paper's experiment."""
    config = InpFormerConfig()

    assert (config.backbone, config.image_size) == ("vit_base_patch14_reg4_dinov2", (392, 392))
    assert (config.prototypes, config.decoder_blocks, config.groups) == (6, 8, 2)
    assert (config.mining_exponent, config.coherence_weight) == (3.0, 0.2)
    assert (config.map_size, config.blur_kernel, config.blur_sigma, config.top_fraction) == ((256, 256), 5, 4.0, 0.01)
    assert (config.recipe.epochs, config.recipe.batch_size, config.recipe.clip_gradient_norm) == (200, 16, 0.1)
