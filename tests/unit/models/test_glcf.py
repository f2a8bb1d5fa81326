"""What is GLCF's own: the semantic bottleneck, three pairs, calibrated maps, and its configuration's limits."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import CnnBackbone
from models.blocks.packing import map_shapes, unpack
from models.glcf import Glcf, GlcfConfig, _Blocks, _distance_of_images, _FeatureDecoder, _SemanticBottleneck
from tests.tiny_detectors import TINY, make_detector


def _images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def _with(**changes: object) -> Glcf:
    """Build the tiny detector with other settings and the same backbone weights."""
    detector = Glcf(replace(TINY["glcf"], **changes))
    detector.load_backbone_weights(make_detector("glcf").backbone.network.state_dict())
    return detector


def _calibrated(frames: Tensor, **changes: object) -> Glcf:
    detector = _with(**changes)
    for batch in frames.split(4):  # the last one is smaller
        detector.observe(batch)
    detector.finish()
    return detector.eval()


def test_bottleneck_when_local_tokens_change_then_the_global_map_does_not():
    """Everything global has passed through the one semantic token."""
    bottleneck = make_detector("glcf").bottleneck
    levels = [torch.rand(2, 48, 8, 8), torch.rand(2, 192, 4, 4)]

    with torch.no_grad():
        local, semantic = bottleneck.encode(levels)
        shown = bottleneck.decode_semantic(semantic)
        exchanged = bottleneck.decode_semantic(semantic.flip(0))

    assert local.shape == (2, 16, 48)
    assert semantic.shape == (2, 1, 48)
    assert shown.shape == bottleneck.decode_local(local).shape == (2, 96, 4, 4)
    torch.testing.assert_close(exchanged, shown.flip(0))
    assert not torch.allclose(shown[0], shown[1])


def test_bottleneck_when_levels_are_embedded_then_tokens_are_their_sum_with_positions():
    """Each level is cut into as many patches as there are tokens; the semantic token comes last, without a position."""
    bottleneck = make_detector("glcf").bottleneck
    bottleneck.encoder, bottleneck.encoder_norm, bottleneck.decoder_embedding = (nn.Identity() for _ in range(3))
    nn.init.normal_(bottleneck.semantic_token)
    fine, coarse = torch.rand(2, 48, 8, 8), torch.rand(2, 192, 4, 4)

    with torch.no_grad():
        local, semantic = bottleneck.encode([fine, coarse])

    first, second = bottleneck.embeddings
    expected = functional.conv2d(fine, first.weight, first.bias, stride=2) + second(coarse)
    torch.testing.assert_close(local, expected.flatten(2).transpose(1, 2) + bottleneck.positions)
    assert torch.equal(semantic, bottleneck.semantic_token.expand(2, 1, 48))


def test_blocks_have_one_more_skip_around_themselves():
    """With the blocks' own branches silent, each of them doubles its input."""
    blocks = _Blocks(3, 8, 2, 2)
    for parameter in blocks.parameters():
        nn.init.zeros_(parameter)
    x = torch.rand(2, 5, 8)

    assert torch.equal(blocks(x), 8 * x)


def test_feature_decoder_when_run_then_mirrors_the_backbone():
    """From the coarse map, each stage doubles the grid and gives one target's channels; the finest comes first."""
    decoder = _FeatureDecoder(32, (8, 16), (2, 1))

    fine, coarse = decoder(torch.rand(2, 32, 3, 5))

    assert (fine.shape, coarse.shape) == ((2, 8, 12, 20), (2, 16, 6, 10))
    assert [len(stage) for stage in decoder.stages] == [2, 1]
    assert all(block.conv1.out_channels == block.conv3.out_channels // 2 for stage in decoder.stages for block in stage)


def test_feature_decoder_at_published_sizes_has_the_published_parameters():
    """A mirrored WideResNet-50-2 has 24.92 million of them."""
    with torch.device("meta"):
        decoder = _FeatureDecoder(2048, (256, 512, 1024), (3, 4, 6))

    assert sum(parameter.numel() for parameter in decoder.parameters()) == 24_917_504


def test_bottleneck_at_published_sizes_has_the_published_shapes_and_parameters():
    """Three levels become 49 local tokens and one of 480 channels, and either of them a map of 2048 x 7 x 7."""
    with torch.device("meta"):
        backbone = CnnBackbone("wide_resnet50_2.tv_in1k", (1, 2, 3, 4))
        shapes = map_shapes(backbone.channels, backbone.strides, (224, 224))
        bottleneck = _SemanticBottleneck(GlcfConfig(), backbone.channels[1:], (4, 2, 1), (7, 7), 2048)
        local, semantic = bottleneck.encode([torch.empty(2, *shape) for shape in shapes[1:]])
        maps = bottleneck.decode_semantic(semantic), bottleneck.decode_local(local)

    assert shapes == [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    assert (local.shape, semantic.shape) == ((2, 49, 480), (2, 1, 480))
    assert [one.shape for one in maps] == [(2, 2048, 7, 7)] * 2
    assert sum(value.numel() for value in bottleneck.parameters()) == pytest.approx(58.03e6, rel=1e-3)


def test_score_when_a_constant_is_added_to_the_map_then_stays():
    """A shift of all statistics alike moves no score: it is the map's deviation."""
    images = _images(2)
    detector = _calibrated(_images(4, seed=1))

    with torch.no_grad():
        before = detector(images)
        detector.means.sub_(detector.deviations)
        after = detector(images)

    torch.testing.assert_close(after.anomaly_map, before.anomaly_map + 2 * sum(detector.config.level_weights))
    torch.testing.assert_close(after.score, before.score, rtol=1e-4, atol=1e-5)


def test_detector_has_three_decoders_of_their_own():
    """Equal in shape, apart in values."""
    decoders = make_detector("glcf").decoders

    first, second, third = (torch.cat([p.flatten() for p in decoder.parameters()]) for decoder in decoders.values())
    assert first.shape == second.shape == third.shape
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_distance_when_maps_are_equal_or_longer_then_is_zero():
    """Only the direction of an image's whole map counts."""
    maps = [torch.rand(3, 4, 5, 6) + 0.1, torch.rand(3, 8, 2, 2) + 0.1]

    distance = _distance_of_images(maps, [3 * one for one in maps])

    torch.testing.assert_close(distance, torch.tensor(0.0), rtol=0, atol=1e-6)


def test_distance_when_written_out_then_is_summed_over_levels_and_averaged_over_images():
    """Orthogonal maps are 1 apart at each level."""
    first = [torch.tensor([[1.0, 0.0], [1.0, 0.0]])[..., None], torch.tensor([[1.0, 0.0], [1.0, 0.0]])[..., None]]
    second = [torch.tensor([[0.0, 1.0], [1.0, 0.0]])[..., None], torch.tensor([[0.0, 1.0], [0.0, 1.0]])[..., None]]

    torch.testing.assert_close(_distance_of_images(first, second), torch.tensor((2 + 1) / 2))


@pytest.mark.parametrize("name", ["local", "global", "correspondence"])
def test_loss_when_a_weight_is_zero_then_its_term_is_off(name):
    """Each pair can be left out, and the others stay as they were."""
    detector = make_detector("glcf")
    encoded = detector.encode(_images(2))

    terms = _with(**{f"{name}_weight": 0.0}).loss(encoded, 0)
    reference = detector.loss(encoded, 0)

    assert terms[name] == 0
    for other in reference.keys() - {name}:
        torch.testing.assert_close(terms[other], reference[other])


@pytest.mark.parametrize(("detach", "is_pulled"), [(False, True), (True, False)])
def test_loss_when_the_global_target_is_detached_then_only_its_estimate_moves(detach, is_pulled):
    """Published, both sides of the third pair meet each other; the switch holds one of them."""
    detector = _with(detach_global_target=detach)

    detector.loss(detector.encode(_images(2)), 0)["correspondence"].backward()

    pulled = [parameter.grad is not None for parameter in detector.decoders["global_features"].parameters()]
    assert all(pulled) if is_pulled else not any(pulled)
    assert all(parameter.grad is not None for parameter in detector.decoders["global_estimates"].parameters())


def test_loss_when_computed_then_only_the_decoders_learn_statistics():
    """The decoders' batch norms follow the batches; the teacher's never move, and inference never moves any."""
    detector = make_detector("glcf").train()
    before = copy.deepcopy(detector.state_dict())

    detector.loss(detector.encode(_images(4)), 0)
    after = copy.deepcopy(detector.state_dict())
    detector.observe(_images(4))
    last = detector.state_dict()

    running = [key for key in before if "running" in key]
    moved = {key for key in running if not torch.equal(before[key], after[key])}
    assert moved == {key for key in running if key.startswith("decoders.")}
    assert all(torch.equal(after[key], last[key]) for key in running)


def test_calibration_when_its_own_frames_are_judged_then_maps_have_mean_zero_and_deviation_one():
    """Averaged over the observed frames, whatever the batches were, each branch and level is normalised."""
    frames = _images(6)
    detector = _calibrated(frames)

    with torch.no_grad():
        maps = detector._distance_maps(detector.encode(frames))

    normalised = (maps.double() - detector.means[..., None, None]) / detector.deviations[..., None, None]
    assert normalised.shape == (6, 2, 2, 64, 64)
    torch.testing.assert_close(normalised.mean(dim=(0, 3, 4)), torch.zeros(2, 2).double(), rtol=0, atol=1e-5)
    spread = normalised.std(dim=(3, 4), correction=0).mean(dim=0)
    torch.testing.assert_close(spread, torch.ones(2, 2).double(), rtol=0, atol=1e-5)


def test_calibration_when_good_maps_are_flat_then_maps_stay_finite():
    """A branch whose two sides agree everywhere has no spread to divide by."""
    detector = make_detector("glcf").eval()
    detector._distance_maps = lambda encoded: torch.zeros(len(encoded), 2, 2, 64, 64)

    detector.observe(_images(2))
    detector.finish()

    assert (detector.deviations > 0).all()
    assert torch.isfinite(detector(_images(2)).anomaly_map).all()


def test_calibration_when_no_frames_were_observed_then_refuses():
    """An empty folder never leaves half-made statistics."""
    with pytest.raises(RuntimeError, match="no frames"):
        make_detector("glcf").finish()


def _resize_slowly(one: np.ndarray, size: int) -> np.ndarray:
    """Resize a square map with aligned corners, then blur it by sigma 4, repeating the border by reflection."""
    places = np.linspace(0, len(one) - 1, size)
    one = np.array([np.interp(places, np.arange(len(one)), row) for row in one])
    one = np.array([np.interp(places, np.arange(one.shape[0]), column) for column in one.T]).T
    weights = np.exp(-0.5 * (np.arange(-16, 17) / 4) ** 2)
    weights /= weights.sum()
    for _ in range(2):
        one = np.array([np.convolve(np.pad(row, 16, mode="symmetric"), weights, mode="valid") for row in one]).T
    return one


def test_map_when_recomputed_in_numpy_then_is_the_weighted_sum_of_normalised_cosine_distances():
    """From the decoders' features on, float64 loops give the same map and score, to 1e-5 of the map's range."""
    images = _images(2)
    detector = _calibrated(_images(6, seed=1))

    with torch.no_grad():
        output = detector(images)
        levels = unpack(detector.encode(images), detector._shapes)
        local, semantic = detector.bottleneck.encode(levels[-2:])
        refined = detector.bottleneck.decode_local(local)
        rebuilt = detector.decoders["global_features"](detector.bottleneck.decode_semantic(semantic))
        pairs = [
            (levels[:2], detector.decoders["local_estimates"](refined)),
            (rebuilt, detector.decoders["global_estimates"](refined)),
        ]

    means, deviations = detector.means.double().numpy(), detector.deviations.double().numpy()
    for image in range(2):
        expected = np.zeros((64, 64))
        for branch, level in np.ndindex(2, 2):
            seen, made = (features[level][image].double().numpy() for features in pairs[branch])
            distance = np.zeros(seen.shape[1:])
            for y, x in np.ndindex(*distance.shape):
                one, other = seen[:, y, x], made[:, y, x]
                norms = max(np.linalg.norm(one), 1e-8) * max(np.linalg.norm(other), 1e-8)
                distance[y, x] = 1 - one @ other / norms
            normalised = (_resize_slowly(distance, 64) - means[branch, level]) / deviations[branch, level]
            expected += detector.config.level_weights[level] * normalised
        tolerance = 1e-5 * np.ptp(expected)
        np.testing.assert_allclose(output.anomaly_map[image].numpy(), expected, rtol=0, atol=tolerance)
        assert output.score[image].item() == pytest.approx(expected.std(), abs=tolerance)


def test_distance_when_recomputed_in_numpy_then_agrees():
    """D is the sum over levels of one minus the cosine of two whole maps, averaged over images, to 1e-5."""
    generator = torch.Generator().manual_seed(0)
    first, second = ([torch.randn(3, c, 4, 5, generator=generator) for c in (2, 6)] for _ in range(2))

    distance = _distance_of_images(first, second)

    total = 0.0
    for one, other in zip(first, second, strict=True):
        for seen, made in zip(one.double().numpy(), other.double().numpy(), strict=True):
            product = sum(a * b for a, b in zip(seen.ravel(), made.ravel(), strict=True))
            total += (1 - product / np.sqrt((seen**2).sum() * (made**2).sum())) / 3
    assert distance.item() == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("shares", [(1.0, 1.0), (5.0, 1.0)])
def test_forward_when_general_then_is_the_weighted_sum_of_both_branches(shares):
    """A = sum over branches and levels of both weights times the normalised map; its deviation is the score."""
    frames = _images(3)
    general = _calibrated(frames, fusion="general", branch_weights=shares)
    texture, logical = (_calibrated(frames, fusion=name) for name in ("texture", "logical"))

    with torch.no_grad():
        output = general(frames)
        parts = shares[0] * texture(frames).anomaly_map + shares[1] * logical(frames).anomaly_map

    torch.testing.assert_close(output.anomaly_map, parts, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.score, output.anomaly_map.flatten(1).std(dim=1, correction=0))


@pytest.mark.parametrize(
    ("fusion", "unused"),
    [("texture", ("global_features", "global_estimates")), ("logical", ("local_estimates",))],
)
def test_forward_when_one_branch_is_chosen_then_the_others_decoders_are_not_asked(fusion, unused):
    """What is not part of the verdict costs nothing either."""
    detector = _calibrated(_images(3), fusion=fusion)
    for name in unused:
        del detector.decoders[name]

    with torch.no_grad():
        output = detector(_images(2))

    assert torch.isfinite(output.score).all()


def test_forward_when_the_score_is_the_maximum_then_is_the_maps_largest_value():
    """The alternative to the published deviation."""
    detector = _calibrated(_images(3), score_reduction="maximum")

    with torch.no_grad():
        output = detector(_images(2))

    assert torch.equal(output.score, output.anomaly_map.amax(dim=(1, 2)))


def test_initial_values_when_the_seed_is_the_same_then_are_the_same():
    """A run is repeatable from its configuration alone, whatever was drawn before."""
    first, again, other = Glcf(TINY["glcf"]), Glcf(TINY["glcf"]), Glcf(replace(TINY["glcf"], seed=2))

    trained = [name for name, parameter in first.named_parameters() if parameter.requires_grad]
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in trained)
    assert not torch.equal(states[0]["bottleneck.prediction.weight"], states[2]["bottleneck.prediction.weight"])
    assert not states[0]["bottleneck.semantic_token"].any()
    assert not states[0]["bottleneck.query_token"].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (1, 3)}, "twice the stride"),
        ({"targets": 4}, "leave none out"),
        ({"targets": 1, "inputs": 1}, "leave none out"),
        ({"level_depths": (1,)}, "one entry"),
        ({"level_weights": (1.0, 2.0, 3.0)}, "one entry"),
        ({"targets": 1, "level_depths": (1,), "level_weights": (1.0,)}, "coarser than the tokens"),
        ({"image_size": (64, 72)}, "multiple of a token's stride"),
        ({"encoder_heads": 5}, "token_channels"),
        ({"branch_weights": (1.0, 0.0)}, "leaves a branch out"),
    ],
)
def test_detector_when_the_configuration_contradicts_itself_then_says_where(changes, message):
    """Impossible combinations are refused before any frame is read."""
    with pytest.raises(ValueError, match=message):
        Glcf(replace(TINY["glcf"], **changes))


def test_config_when_left_alone_then_holds_the_published_values():
    """The defaults are those of the authors' last code."""
    config = GlcfConfig()

    assert (config.layers, config.targets, config.inputs, config.image_size) == ((1, 2, 3, 4), 3, 3, (224, 224))
    assert (config.token_channels, config.encoder_blocks, config.encoder_heads) == (480, 6, 12)
    assert (config.decoder_blocks, config.decoder_heads, config.level_depths) == (6, 16, (3, 4, 6))
    assert (config.local_weight, config.global_weight, config.correspondence_weight) == (1.0, 1.0, 1.0)
    assert (config.fusion, config.level_weights, config.blur_sigma) == ("general", (1.0, 3.0, 6.0), 4.0)
    assert config.branch_weights == (1.0, 1.0)
    assert (config.recipe.epochs, config.recipe.batch_size, config.recipe.learning_rate) == (500, 8, 1e-4)
