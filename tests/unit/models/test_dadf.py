"""What is DADF's own: memorial attention, flow steps with their volume, two stages, and the map."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import CnnBackbone, untrained_weights
from models.blocks.packing import map_shapes, unpack
from models.dadf import Dadf, DadfConfig, _DualTransformer, _Flow, _FlowStep
from tests.tiny_detectors import TINY, make_detector
from training.fitting.optimisers import build_optimiser


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=_generator())


def _build(**changes: object) -> Dadf:
    detector = Dadf(replace(TINY["dadf"], **changes))
    detector.load_backbone_weights(untrained_weights("test_resnet"))
    return detector.eval()


def _stir(step: _FlowStep) -> _FlowStep:
    """Move a step away from its initial values, where gains are 1 and offsets 0."""
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=_generator(9)), alpha=0.5)
    return step


def test_rebuilt_maps_have_the_shapes_of_the_features():
    """Both streams answer each scale with a map of its size."""
    detector = _build()
    features = unpack(detector.encode_features(_images()), detector.shapes)

    rebuilt, remembered = detector.transformer(features)

    assert [tuple(one.shape[1:]) for one in rebuilt] == detector.shapes
    assert [tuple(one.shape[1:]) for one in remembered] == detector.shapes


def test_joint_is_features_then_rebuilt_then_remembered():
    """The flows see the three side by side, channel upon channel."""
    detector = _build()
    features = unpack(detector.encode_features(_images()), detector.shapes)

    with torch.no_grad():
        rebuilt, remembered = detector.transformer(features)
        joint = unpack(detector.encode_joint(_images()), detector.joint_shapes)

    for scale, parts in zip(joint, zip(features, rebuilt, remembered, strict=True), strict=True):
        torch.testing.assert_close(scale, torch.cat(parts, dim=1))


def test_reconstruction_loss_when_written_out_then_is_the_mean_square_of_each_scale():
    """Scales weigh the same, whatever their size, and so do the streams."""
    detector = _build()
    encoded = detector.encode_features(_images())

    with torch.no_grad():
        loss = detector.reconstruction_loss(encoded, 0)
        features = unpack(encoded, detector.shapes)
        streams = dict(zip(("self", "memory"), detector.transformer(features), strict=True))

    for name, maps in streams.items():
        expected = sum((one - target).square().mean() for one, target in zip(maps, features, strict=True))
        torch.testing.assert_close(loss[name], expected)
    assert loss["self"] != loss["memory"]


@pytest.mark.parametrize("channels", [6, 7], ids=["even", "odd"])
@pytest.mark.parametrize("kernel_size", [3, 1])
def test_flow_step_when_inverted_then_gives_back_its_input(channels, kernel_size):
    """The step loses nothing; the first part takes the channel that is left over."""
    step = _stir(_FlowStep(channels, kernel_size, _generator()))
    u = torch.randn(2, channels, 4, 4, generator=_generator(1))

    with torch.no_grad():
        out, _ = step(u)
        v = torch.empty_like(out)
        v[:, step.permutation] = out
        v = (v - step.offset[:, None, None]) / step.gain()[:, None, None]
        kept, changed = v.split([(channels + 1) // 2, channels // 2], dim=1)
        answer = 0.1 * step.subnet(kept)
        log_scale = 2 * torch.tanh(answer[:, : channels // 2])
        restored = torch.cat((kept, (changed - answer[:, channels // 2 :]) * (-log_scale).exp()), dim=1)

    torch.testing.assert_close(restored, u, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel_size", [3, 1])
def test_flow_step_volume_equals_the_determinant_of_its_jacobian(kernel_size):
    """What the likelihood counts is what autograd says; 1e-4 is float32."""
    step = _stir(_FlowStep(5, kernel_size, _generator()))
    u = torch.randn(1, 5, 2, 3, generator=_generator(1))

    jacobian = torch.autograd.functional.jacobian(lambda value: step(value)[0].flatten(), u)
    _, volume = step(u)

    _, expected = torch.linalg.slogdet(jacobian.reshape(30, 30))
    torch.testing.assert_close(volume, expected[None], rtol=1e-4, atol=1e-4)


def test_flow_step_when_untrained_then_gains_are_one_and_scales_bounded():
    """A new step is nearly a permutation, and no input can make it stretch by more than e^2."""
    step = _FlowStep(6, 3, _generator())
    u = 1e6 * torch.randn(1, 6, 4, 4, generator=_generator(1))

    with torch.no_grad():
        out, volume = step(u)

    torch.testing.assert_close(step.gain(), torch.ones(6))
    assert not step.offset.any()
    assert volume.abs().item() <= 2.0 * 3 * 16 + 1e-3
    assert torch.isfinite(out).all()


def _step_slowly(step: _FlowStep, u: np.ndarray) -> tuple[np.ndarray, float]:
    """Follow one frame `(C, h, w)` through a step, place by place; return output and log volume."""
    state = {name: value.detach().double().numpy() for name, value in step.state_dict().items()}
    own, mix, bias = state["subnet.0.weight"], state["subnet.2.weight"][:, :, 0, 0], state["subnet.2.bias"]
    reach = own.shape[2] // 2
    channels, height, width = u.shape
    kept = channels - channels // 2
    gain = 0.1 * np.log1p(np.exp(0.5 * state["gain_logits"])) / 0.5
    padded = np.pad(u, ((0, 0), (reach, reach), (reach, reach)))
    v, volume = u.copy(), height * width * np.log(gain).sum()
    for y, x in np.ndindex(height, width):
        window = padded[:kept, y : y + 2 * reach + 1, x : x + 2 * reach + 1]
        hidden = (own[:, 0] * window).sum(axis=(1, 2)) + state["subnet.0.bias"]
        answer = 0.1 * (mix @ np.where(hidden > 0, hidden, 0.1 * hidden) + bias)
        log_scale = 2 * np.tanh(answer[: channels // 2])
        v[kept:, y, x] = u[kept:, y, x] * np.exp(log_scale) + answer[channels // 2 :]
        volume += log_scale.sum()
    moved = gain[:, None, None] * v + state["offset"][:, None, None]
    return moved[step.permutation.numpy()], volume


@pytest.mark.parametrize("channels", [6, 7], ids=["even", "odd"])
def test_flow_when_recomputed_in_numpy_then_outputs_and_likelihood_agree(channels):
    """Norm, steps and volume in float64 loops give the same z and the same negative log-likelihood, to 1e-5."""
    flow = _Flow((channels, 4, 5), 4, _generator())
    for step in flow.steps:
        _stir(step)
    nn.init.normal_(flow.norm.weight, mean=1.0, std=0.2, generator=_generator(3))
    joint = torch.randn(2, channels, 4, 5, generator=_generator(1))

    with torch.no_grad():
        z, volume = flow(joint)

    weight, bias = (value.detach().double().numpy() for value in (flow.norm.weight, flow.norm.bias))
    for frame, out, change in zip(joint.double().numpy(), z.numpy(), volume.numpy(), strict=True):
        u = (frame - frame.mean()) / np.sqrt(frame.var() + 1e-5) * weight + bias
        total = 0.0
        for step in flow.steps:
            u, added = _step_slowly(step, u)
            total += added
        np.testing.assert_allclose(out, u, rtol=1e-5, atol=1e-5)
        likelihood = 0.5 * (out.astype(float) ** 2).sum() - change
        assert likelihood == pytest.approx(0.5 * (u**2).sum() - total, rel=1e-5)


def test_depthwise_product_equals_the_convolution_that_it_stands_for():
    """Values and gradients are those of one 1 x 1 convolution a channel."""
    step = _stir(_FlowStep(6, 1, _generator()))
    conv, u = step.subnet[0], torch.randn(2, 3, 4, 4, generator=_generator(1), requires_grad=True)

    made = conv(u)
    gradients = torch.autograd.grad(made.square().sum(), (u, conv.weight, conv.bias))

    expected = functional.conv2d(u, conv.weight, conv.bias, groups=3)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), (u, conv.weight, conv.bias)))


def test_gain_is_a_softplus_of_sharpness_one_half():
    """The exported form gives the values of the published one."""
    step = _stir(_FlowStep(6, 3, _generator()))

    expected = 0.1 * functional.softplus(step.gain_logits, beta=0.5)

    torch.testing.assert_close(step.gain(), expected)


def test_flow_changes_kernels_in_turn_and_keeps_its_norm_out_of_the_volume():
    """Even steps look around, odd ones don't; the norm over the whole map is learnt and not counted."""
    flow = _Flow((6, 4, 4), 4, _generator())
    joint = torch.randn(2, 6, 4, 4, generator=_generator(1))

    z, volume = flow(joint)
    u, expected = flow.norm(joint), 0
    for step in flow.steps:
        u, change = step(u)
        expected = expected + change

    assert [step.subnet[0].kernel_size[0] for step in flow.steps] == [3, 1, 3, 1]
    assert flow.norm.weight.shape == (6, 4, 4)
    torch.testing.assert_close((z, volume), (u, expected))


def test_flows_have_the_published_number_of_parameters():
    """For ResNet-34's channels 3.16 million in steps and 2.75 million in norms, permutations not counted."""
    flows = [_Flow(shape, 8, _generator()) for shape in ((192, 64, 64), (384, 32, 32), (768, 16, 16))]

    norms = sum(value.numel() for flow in flows for value in flow.norm.parameters())
    steps = sum(value.numel() for flow in flows for value in flow.steps.parameters())

    assert norms == 2_752_512
    assert steps == pytest.approx(3.16e6, rel=1e-3)


def test_flow_loss_when_written_out_then_is_half_the_squares_less_the_volume():
    """Terms are sums over a frame, not divided by its size, averaged over frames."""
    detector = _build()
    encoded = detector.encode_joint(_images())

    with torch.no_grad():
        terms = detector.flow_loss(encoded, 0)
        joint = unpack(encoded, detector.joint_shapes)
        for flow, one, name in zip(detector.flows, joint, terms, strict=True):
            z, volume = flow(one)
            torch.testing.assert_close(terms[name], (z.square().flatten(1).sum(dim=1) / 2 - volume).mean())

    assert list(terms) == ["stride 4", "stride 8", "stride 16"]


def test_permutations_are_kept_with_the_weights_and_differ_from_step_to_step():
    """A process that loads the weights permutes as the one that trained them."""
    detector = _build()

    kept = [value for name, value in detector.state_dict().items() if name.endswith("permutation")]

    assert len(kept) == 12
    assert not torch.equal(kept[0], kept[1])
    assert all(torch.equal(value.sort().values, torch.arange(len(value))) for value in kept)


def test_stages_when_followed_then_the_second_leaves_the_transformer_alone():
    """Transformer and memory belong to the first stage, norms and flows to the second."""
    detector = make_detector("dadf")

    first, second = detector.stages()

    names = {id(value): name for name, value in detector.named_parameters()}
    assert {names[id(value)].partition(".")[0] for value in first.parameters} == {"transformer"}
    assert {names[id(value)].partition(".")[0] for value in second.parameters} == {"flows"}
    assert "transformer.memory" in {names[id(value)] for value in first.parameters}


def test_stages_when_run_then_each_moves_its_own_part_alone():
    """The backbone and its batch norms never move, the transformer only in the first stage, flows in the second."""
    detector = _build().train()
    moved = []
    for stage in detector.stages():
        before = {name: value.clone() for name, value in detector.state_dict().items()}
        encoded = stage.encode(_images(4))
        optimiser = build_optimiser(stage.recipe, stage.parameters)
        for step in range(2):
            optimiser.zero_grad()
            sum(stage.loss(encoded, step).values()).backward()
            optimiser.step()
        moved.append({name for name, value in detector.state_dict().items() if not torch.equal(value, before[name])})

    learnt = {name for name, parameter in detector.named_parameters() if parameter.requires_grad}
    assert moved == [{name for name in learnt if name.startswith(part)} for part in ("transformer.", "flows.")]


def test_map_is_one_plus_the_published_one_over_e():
    """Each scale shows 1 - exp(-mean square / 2), in [0, 1); the mean of the scales is scored by its maximum."""
    detector = _build()

    with torch.no_grad():
        output = detector(_images())
        joint = unpack(detector.encode_joint(_images()), detector.joint_shapes)
        published = []
        for flow, one in zip(detector.flows, joint, strict=True):
            z, _ = flow(one)
            likely = -torch.exp(1 - 0.5 * z.square().mean(dim=1, keepdim=True))
            published.append(functional.interpolate(likely, size=(64, 64), mode="bilinear")[:, 0])

    torch.testing.assert_close(output.anomaly_map, 1 + sum(published) / 3 / math.e)
    torch.testing.assert_close(output.score, output.anomaly_map.flatten(1).amax(dim=1))
    assert output.anomaly_map.min() >= 0
    assert output.anomaly_map.max() < 1


def test_map_when_a_flow_answers_larger_values_then_never_falls():
    """Less likely is never less anomalous, at any place."""
    detector = _build()
    maps = []
    for scale in (0.5, 1.0, 2.0):
        for flow in detector.flows:
            nn.init.constant_(flow.norm.weight, scale)
            for step in flow.steps:
                for parameter in step.subnet.parameters():
                    nn.init.zeros_(parameter)  # what is left is linear, so a larger norm is a larger z
        with torch.no_grad():
            maps.append(detector(_images(1)).anomaly_map)

    assert (maps[1] >= maps[0]).all()
    assert (maps[2] >= maps[1]).all()
    assert maps[2].mean() > maps[0].mean()


def test_permutation_by_index_equals_the_matrix_that_it_stands_for():
    """The published form multiplies by a matrix of zeros and ones; the index moves the same channels."""
    step = _stir(_FlowStep(6, 3, _generator()))
    u = torch.randn(2, 6, 4, 4, generator=_generator(1))
    matrix = torch.eye(6)[step.permutation]

    with torch.no_grad():
        out, _ = step(u)
        step.permutation.copy_(torch.arange(6))
        unmoved, _ = step(u)

    torch.testing.assert_close(out, torch.einsum("ij,bjhw->bihw", matrix, unmoved))


@pytest.mark.parametrize(
    ("backbone", "channels", "parameters"),
    [("wide_resnet50_2.tv_in1k", (256, 512, 1024), 213.36e6), ("resnet18.tv_in1k", (64, 128, 256), 203.03e6)],
)
def test_transformer_at_published_sizes_has_the_published_shapes_and_parameters(backbone, channels, parameters):
    """Maps of 64, 32 and 16 places a side become 256 tokens of 1440 channels, for either backbone."""
    with torch.device("meta"):
        pyramid = CnnBackbone(backbone, (1, 2, 3))
        shapes = map_shapes(pyramid.channels, pyramid.strides, (256, 256))
        transformer = _DualTransformer(shapes, DadfConfig(), None)
        rebuilt, remembered = transformer([torch.empty(2, *shape) for shape in shapes])

    assert shapes == [(count, side, side) for count, side in zip(channels, (64, 32, 16), strict=True)]
    assert transformer.memory.shape == (1, 256, 1440)
    assert [tuple(one.shape[1:]) for one in rebuilt] == [tuple(one.shape[1:]) for one in remembered] == shapes
    assert sum(value.numel() for value in transformer.parameters()) == pytest.approx(parameters, rel=1e-4)


@pytest.mark.parametrize("stage", [0, 1], ids=["reconstruction", "flow"])
def test_stage_when_followed_then_its_loss_falls(stage):
    """A few steps down the gradient make the good frames likelier, in either stage."""
    descent = _build().stages()[stage]
    encoded = descent.encode(_images(4))
    optimiser = torch.optim.Adam(descent.parameters, lr=1e-3)

    losses = []
    for step in range(8):
        optimiser.zero_grad()
        loss = sum(descent.loss(encoded, step).values())
        loss.backward()
        optimiser.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0]


def test_map_when_energy_is_asked_for_then_strong_defects_do_not_saturate():
    """Far off values that the exponential shows alike keep their order."""
    by_likelihood, by_energy = _build(), _build(map_mode="energy")
    scores = []
    for detector in (by_likelihood, by_energy):
        for scale in (20.0, 40.0):
            for flow in detector.flows:
                nn.init.constant_(flow.norm.weight, scale)
            with torch.no_grad():
                scores.append(detector(_images(1)).score.item())

    assert scores[0] == scores[1] == 1
    assert scores[3] > 2 * scores[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (64, 72)}, "multiple of the stride 16"),
        ({"heads": 5}, "5 heads"),
        ({"scale_channels": 7, "heads": 3}, "multiple of 4"),
    ],
    ids=["size", "heads", "positions"],
)
def test_detector_when_the_configuration_contradicts_itself_then_says_where(changes, message):
    """Impossible combinations are refused before any frame is read."""
    with pytest.raises(ValueError, match=message):
        _build(**changes)


def test_initial_values_when_the_seed_is_the_same_then_are_the_same():
    """A run is repeatable from its configuration alone, permutations included."""
    first, again, other = _build(), _build(), _build(seed=2)

    states = [detector.state_dict() for detector in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["transformer.memory"], states[2]["transformer.memory"])
    assert not torch.equal(states[0]["flows.0.steps.0.permutation"], states[2]["flows.0.steps.0.permutation"])


def test_config_when_left_alone_then_holds_the_published_values():
    """The defaults are what the reference code trains."""
    config = DadfConfig()

    assert (config.backbone, config.layers, config.image_size) == ("wide_resnet50_2.tv_in1k", (1, 2, 3), (256, 256))
    assert (config.scale_channels, config.blocks, config.heads, config.mlp_ratio) == (480, 8, 8, 4)
    assert (config.flow_steps, config.map_mode) == (8, "exp")
    assert (config.recipe.learning_rate, config.recipe.epochs, config.recipe.batch_size) == (1e-4, 200, 8)
    assert (config.flow_recipe.learning_rate, config.flow_recipe.epochs, config.flow_recipe.batch_size) == (
        1e-3,
        15,
        16,
    )
