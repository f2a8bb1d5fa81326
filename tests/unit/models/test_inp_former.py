"""What is INP-Former's own: soft mining, sampling, and its configuration's limits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from models.blocks.soft_mining import mined_direction_loss
from models.detector import PassStage
from models.inp_former import InpFormer, InpFormerConfig, _distance_to_nearest
from tests.tiny_detectors import TINY, make_detector


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def _mine_slowly(targets: np.ndarray, rebuilt: np.ndarray, exponent: float) -> tuple[float, np.ndarray]:
    """Return the mined cosine distance and its gradient, image by image and token by token."""
    images, groups, tokens, _ = targets.shape
    value, gradient = 0.0, np.zeros_like(rebuilt)
    for group in range(groups):
        distance = np.array(
            [[1 - _cosine(targets[b, group, n], rebuilt[b, group, n]) for n in range(tokens)] for b in range(images)]
        )
        for image in range(images):
            seen, made = targets[image, group].ravel(), rebuilt[image, group].ravel()
            cosine = _cosine(seen, made)
            value += (1 - cosine) / (images * groups)
            slope = cosine * made / (made @ made) - seen / np.sqrt((seen @ seen) * (made @ made))
            weight = (distance[image] / distance.mean()) ** exponent
            gradient[image, group] = weight[:, None] * slope.reshape(tokens, -1) / (images * groups)
    return value, gradient


@pytest.mark.parametrize("exponent", [0.0, 3.0])
def test_soft_mining_when_recomputed_in_numpy_then_value_and_gradient_agree(exponent):
    """Plain loops in float64 give the same loss and the same gradient of every number, to 1e-5."""
    generator = torch.Generator().manual_seed(0)
    targets, rebuilt = torch.randn(2, 3, 2, 5, 4, generator=generator).unbind()
    rebuilt = rebuilt.requires_grad_()

    loss = mined_direction_loss(targets, rebuilt, exponent)
    loss.backward()

    value, gradient = _mine_slowly(targets.double().numpy(), rebuilt.detach().double().numpy(), exponent)
    assert loss.item() == pytest.approx(value, abs=1e-5)
    np.testing.assert_allclose(rebuilt.grad.numpy(), gradient, rtol=1e-5, atol=1e-5)


def test_coherence_when_recomputed_in_numpy_then_agrees():
    """L_c is the mean over tokens of one minus their cosine to the nearest prototype, to 1e-5 of plain loops."""
    generator = torch.Generator().manual_seed(0)
    fused, prototypes = torch.randn(2, 7, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)

    distance = _distance_to_nearest(fused, prototypes)

    expected = [
        [min(1 - _cosine(token, prototype) for prototype in drawn) for token in tokens]
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


def _norm_slowly(rows: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    spread = np.sqrt(rows.var(axis=-1, keepdims=True) + norm.eps)
    return (rows - rows.mean(axis=-1, keepdims=True)) / spread * _array(norm.weight) + _array(norm.bias)


def _linear_slowly(rows: np.ndarray, linear: nn.Linear) -> np.ndarray:
    return rows @ _array(linear.weight).T + _array(linear.bias)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def _draw_prototypes_slowly(detector: InpFormer, fused: np.ndarray) -> np.ndarray:
    """Return P of one image's F_Q `(N, C)`, head by head: T + attention over tokens, then the hidden layers."""
    block, heads = detector.extractor, detector.extractor.attn.heads
    drawn = _array(detector.prototype_tokens)
    queries = _linear_slowly(_norm_slowly(drawn, block.norm1), block.attn.q)
    keys, values = np.split(_linear_slowly(_norm_slowly(fused, block.norm1), block.attn.kv), 2, axis=1)
    read = []
    for q, k, v in zip(*(np.split(x, heads, axis=1) for x in (queries, keys, values)), strict=True):
        weights = np.exp(q @ k.T / np.sqrt(q.shape[1]))
        read.append(weights / weights.sum(axis=1, keepdims=True) @ v)
    drawn = drawn + _linear_slowly(np.concatenate(read, axis=1), block.attn.proj)
    hidden = _linear_slowly(_norm_slowly(drawn, block.norm2), block.mlp.fc1)
    gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return drawn + _linear_slowly(gelu, block.mlp.fc2)


def test_zero_shot_map_when_recomputed_in_numpy_then_agrees():
    """From F_Q to the score: nearest of the drawn prototypes, two resizes, blur with zeros behind it, top 1 %."""
    config = replace(TINY["inp_former-vit"], map_source="prototypes", map_size=(48, 48))
    detector = InpFormer(config).eval()
    detector.load_backbone_weights(make_detector("inp_former-vit").backbone.network.state_dict())
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        output = detector(images)
        taps = detector.backbone(images)

    fused = np.mean([_array(tap)[0] for tap in taps], axis=0)
    prototypes = _draw_prototypes_slowly(detector, fused)
    distance = np.array([min(1 - _cosine(token, prototype) for prototype in prototypes) for token in fused])
    grid = torch.from_numpy(distance.reshape(1, 1, *detector.grid))
    large = functional.interpolate(grid, size=(64, 64), mode="bilinear", align_corners=True)
    resized = functional.interpolate(large, size=(48, 48), mode="bilinear", align_corners=False)[0, 0].numpy()
    offsets = np.arange(-2, 3)
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 4.0**2))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(resized, 2), (5, 5))
    expected = (windows * kernel / kernel.sum()).sum(axis=(2, 3))
    np.testing.assert_allclose(output.anomaly_map[0].numpy(), expected, rtol=0, atol=1e-5)
    assert float(output.score) == pytest.approx(np.sort(expected.ravel())[-int(0.01 * 48 * 48) :].mean(), abs=1e-5)


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
