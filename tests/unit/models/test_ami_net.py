"""What is AMI-Net's own: the adaptive mask, the random masks of training, its loss and its map."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from models.ami_net import AmiNet, AmiNetConfig, _distances, _embed, assign_tokens, find_outliers
from models.backbones import untrained_weights
from models.blocks.patches import patchify
from models.detector import Recipe
from tests.plain_networks import (
    array_of,
    attend,
    cosine,
    cosine_distances,
    embed,
    linear,
    normalise,
    perceptron,
    place,
    positions,
    resize,
    shake,
)
from tests.tiny_detectors import TINY, make_detector

_CONFIG = TINY["ami_net"]


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _detector(**changes: object) -> AmiNet:
    """Build the tiny detector with some values changed."""
    detector = AmiNet(replace(_CONFIG, **changes))
    detector.load_backbone_weights(untrained_weights(_CONFIG.backbone))
    return detector.eval()


def _mask_slowly(scores: np.ndarray, nearest: np.ndarray, centres: int, deviations: float) -> np.ndarray:
    """Mask cluster by cluster, as the method is told in words."""
    masked = np.zeros(scores.shape, dtype=bool)
    for row, clusters, out in zip(scores, nearest, masked, strict=True):
        for cluster in range(centres):
            members = clusters == cluster
            if members.sum() > 1:
                threshold = row[members].mean() + deviations * row[members].std(ddof=1)
                out[members] = row[members] >= threshold
    return masked


@pytest.mark.parametrize("deviations", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("used", [1, 3, 8], ids=lambda used: f"{used} clusters in use")
def test_outliers_when_found_without_loops_then_are_those_of_the_plain_rule(deviations, used):
    """The closed form masks what a loop over images and clusters masks; clusters may be empty."""
    scores = 100 * _draw(4, 60)
    nearest = torch.randint(used, (4, 60), generator=torch.Generator().manual_seed(1))

    masked = find_outliers(scores, functional.one_hot(nearest, 8).float(), deviations)

    slowly = _mask_slowly(scores.double().numpy(), nearest.numpy(), 8, deviations)
    np.testing.assert_array_equal(masked.numpy() == 1, slowly)


def test_outliers_when_a_cluster_has_one_member_then_it_stays_visible():
    """A token that is alone in its cluster has nothing to be compared with."""
    scores = torch.tensor([[1.0, 1.0, 4.0, 900.0]])
    members = functional.one_hot(torch.tensor([[0, 0, 0, 1]]), 2).float()

    masked = find_outliers(scores, members, deviations=0.5)

    assert masked.tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize("softness", [0.01, 0.1])
def test_mask_when_it_is_soft_then_float32_noise_moves_no_token(softness):
    """A score at its threshold, or between two centres, is half hidden: changed last digits change as little."""
    distances = 1 + _draw(50, 64, 4)
    distances[:, :8, 1] = distances[:, :8, 0]
    noise = 1 + 1e-6 * (_draw(50, 64, 4, seed=1) - 0.5)

    masks = [
        find_outliers(values.amin(dim=2), assign_tokens(values, softness), 0.5, softness)
        for values in (distances, distances * noise)
    ]

    assert ((masks[0] > 0) & (masks[0] < 1)).any()
    # The noise over the softness, times the weight that one token can have in a cluster.
    assert (masks[0] - masks[1]).abs().max() < 1e-5 / softness


def test_mask_when_it_is_soft_then_clear_cases_are_those_of_the_sharp_one():
    """Tokens that lie farther from threshold and second centre than the softness are masked as published."""
    distances = 1 + 9 * _draw(50, 64, 4)
    scores = distances.amin(dim=2)

    sharp = find_outliers(scores, assign_tokens(distances), 0.5)
    soft = find_outliers(scores, assign_tokens(distances, 1e-5), 0.5, 1e-5)

    assert set(sharp.unique().tolist()) == {0.0, 1.0}
    assert (sharp == soft).float().mean() > 0.999


def test_assignment_when_a_token_lies_between_two_centres_then_both_share_it():
    """Shares fall with distance and add up to one; without softness the nearest centre takes all."""
    distances = torch.tensor([[[2.0, 2.0, 5.0], [2.0, 2.1, 5.0]]])

    sharp, soft = assign_tokens(distances), assign_tokens(distances, softness=0.1)

    assert sharp.tolist() == [[[1, 0, 0], [1, 0, 0]]]
    torch.testing.assert_close(soft, torch.tensor([[[0.5, 0.5, 0.0], [2 / 3, 1 / 3, 0.0]]]))


def test_rebuilding_when_a_token_is_masked_then_nothing_that_it_shows_is_used():
    """A defect under the mask can't reach what is rebuilt, at its own place or elsewhere."""
    detector = _detector()
    features = _draw(1, sum(detector.backbone.channels), *detector.feature_grid)
    masked = torch.zeros(1, detector.positions.shape[0])
    masked[0, 0] = 1
    altered = features.clone()
    altered[:, :, : _CONFIG.patch_size, : _CONFIG.patch_size] += 5

    with torch.no_grad():
        patches = [patchify(frame, _CONFIG.patch_size) for frame in (features, altered)]
        hidden = [detector._rebuild(frame, masked) for frame in patches]
        shown = [detector._rebuild(frame, 1 - masked) for frame in patches]

    assert torch.equal(hidden[0], hidden[1])
    assert not torch.equal(shown[0], shown[1])


def test_features_when_unpacked_then_are_the_smoothed_layers_on_the_finest_grid():
    """Layers that were kept on their own grids become the published features, zeros around the border included."""
    detector = _detector()
    images = _draw(2, 3, *detector.image_size)

    features = detector._unpack(detector.encode(images))

    with torch.no_grad():
        layers = detector.backbone(images)
    resized = [
        functional.interpolate(layer, layers[0].shape[2:], mode="bilinear", align_corners=True) for layer in layers
    ]
    smoothed = functional.conv2d(
        torch.cat(resized, dim=1).flatten(0, 1)[:, None], torch.full((1, 1, 3, 3), 1 / 9), padding=1
    )
    torch.testing.assert_close(features.flatten(), smoothed.flatten())


def test_tokens_when_embedded_then_are_those_of_the_convolution():
    """The matrix product over patches is the published convolution without overlaps, row by row."""
    detector = _detector()
    features = _draw(2, sum(detector.backbone.channels), *detector.feature_grid)

    tokens = _embed(detector.patch_embedding, patchify(features, _CONFIG.patch_size))

    torch.testing.assert_close(tokens, detector.patch_embedding(features).flatten(2).transpose(1, 2))


def test_random_masks_when_drawn_then_number_and_place_differ_from_image_to_image():
    """Shares of masked tokens cover 0 to 1 evenly, and no place is preferred."""
    detector = _detector()

    masked = detector._draw_mask(4000, torch.Generator().manual_seed(0))

    shares = masked.mean(dim=1)
    assert masked.shape == (4000, detector.positions.shape[0])
    assert shares.min() < 0.02
    assert shares.max() > 0.95
    np.testing.assert_allclose(np.histogram(shares, 4, (0, 1))[0] / 4000, 0.25, atol=0.03)
    np.testing.assert_allclose(masked.mean(dim=0), shares.mean(), atol=0.04)


def test_mask_when_recomputed_in_numpy_then_distances_agree_and_the_same_tokens_are_hidden():
    """Distances to centres in float64 loops are the same to 1e-5, and so is the mask that follows from them."""
    points, centres = _draw(3, 40, 6), _draw(3, 4, 6, seed=1)

    distances = _distances(points, centres)
    members = assign_tokens(distances)
    masked = find_outliers(distances.amin(dim=2), members, 0.5)

    expected = np.zeros((3, 40, 4))
    for image, token, centre in np.ndindex(*expected.shape):
        one, other = points[image, token].double().numpy(), centres[image, centre].double().numpy()
        expected[image, token, centre] = np.sqrt(((one - other) ** 2).sum()) * (1 - cosine(one, other))
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-5, atol=1e-5)
    slowly = _mask_slowly(expected.min(axis=2), expected.argmin(axis=2), 4, 0.5)
    np.testing.assert_array_equal(masked.numpy() == 1, slowly)
    assert 0 < masked.mean() < 1


def _transform_slowly(rows: np.ndarray, blocks: nn.Sequential) -> np.ndarray:
    """Pass rows through blocks of attention and hidden layers, each with a norm before and a skip around."""
    for block in blocks:
        parts = np.split(linear(normalise(rows, block.norm1), block.attn.qkv), 3, axis=1)
        rows = rows + linear(attend(*parts, block.attn.heads), block.attn.proj)
        rows = rows + perceptron(normalise(rows, block.norm2), block.mlp.fc1, block.mlp.fc2)
    return rows


def _smooth_slowly(layers: list[np.ndarray]) -> np.ndarray:
    """Bring layers `(C, h, w)` to the grid of the first, corners on corners, and take 3 x 3 means, zeros around."""
    size = layers[0].shape[1:]
    features = np.concatenate([resize(layer, size, align_corners=True) for layer in layers])
    padded = np.pad(features, ((0, 0), (1, 1), (1, 1)))
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2)).mean(axis=(3, 4))


def _measure_slowly(
    detector: AmiNet, features: np.ndarray, noise: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the centres of an image's noisy tokens `(M, D)` and the distances of its own tokens to them `(N, M)`."""
    kernel, bias = (array_of(one) for one in detector.centre_embedding.parameters())
    tokens, places = embed(features, kernel, bias), positions(detector.token_grid, len(bias))
    rows = np.concatenate((array_of(detector.centre_queries)[0], _disturb(tokens, noise) + places))
    tokens = tokens + places
    centres = normalise(_transform_slowly(rows, detector.centre_blocks)[: _CONFIG.centres], detector.centre_norm)
    return centres, _lengths_times_directions(tokens, centres)


def _disturb(tokens: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
    """Add noise in proportion to each token's length over its width."""
    return tokens + noise * np.linalg.norm(tokens, axis=1, keepdims=True) / tokens.shape[1]


def _lengths_times_directions(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return np.array([[np.linalg.norm(one - other) * (1 - cosine(one, other)) for other in centres] for one in points])


def _inpaint_slowly(
    detector: AmiNet, features: np.ndarray, masked: np.ndarray, noise: np.ndarray | float = 0.0
) -> np.ndarray:
    """Return what stands under each token `(N, k k C)` where those that are masked are hidden, and all disturbed."""
    kernel, bias = (array_of(one) for one in detector.patch_embedding.parameters())
    tokens = embed(features, kernel, bias)
    tokens[masked] = array_of(detector.mask_token)[0, 0]
    rows = _transform_slowly(_disturb(tokens, noise) + positions(detector.token_grid, len(bias)), detector.blocks)
    return linear(normalise(rows, detector.norm), detector.prediction)


def test_map_when_recomputed_in_numpy_then_agrees():
    """From the layers to the score: centres, adaptive mask, inpainting, and the product of both smoothed errors."""
    detector = _detector(mask_softness=0.0)
    shake(detector.learnable_parameters(), 0.1)
    images = _draw(1, 3, *detector.image_size)

    with torch.no_grad():
        output = detector(images)
        layers = [array_of(layer)[0] for layer in detector.backbone(images)]

    features = _smooth_slowly(layers)
    _, apart = _measure_slowly(detector, features)
    masked = _mask_slowly(apart.min(axis=1)[None], apart.argmin(axis=1)[None], _CONFIG.centres, 0.5)[0]
    rebuilt = place(_inpaint_slowly(detector, features, masked), detector.token_grid, _CONFIG.patch_size)
    errors = (((features - rebuilt) ** 2).mean(axis=0), cosine_distances(features, rebuilt))
    smooth = [ndimage.gaussian_filter(resize(one, (64, 64), align_corners=True), 4.0, truncate=4.0) for one in errors]
    expected = smooth[0] * smooth[1]
    np.testing.assert_allclose(output.anomaly_map[0].numpy(), expected, rtol=0, atol=1e-5 * expected.max())
    assert float(output.score) == pytest.approx(expected.std(), rel=1e-5)
    assert 0 < masked.mean() < 1


@pytest.mark.parametrize("jitter", [0.0, 6.0])
def test_loss_when_recomputed_in_numpy_then_all_four_terms_agree(jitter):
    """Noise lies on the tokens that centres are made of and on what is inpainted, not on those that centres gather."""
    detector = _detector(jitter=jitter)
    shake(detector.learnable_parameters(), 0.1)
    features = _draw(2, sum(detector.backbone.channels), *detector.feature_grid)
    masked = _draw(2, detector.positions.shape[0]) < 0.5

    with torch.no_grad():
        terms = detector._weigh_terms(features, masked.float(), torch.Generator().manual_seed(3))

    drawn = torch.Generator().manual_seed(3)
    shape = (2, detector.positions.shape[0], _CONFIG.token_channels)
    noises = [jitter * array_of(torch.randn(shape, generator=drawn)) for _ in range(2)]
    directions, errors, scores, spreads = [], [], [], []
    for image, hidden, of_centres, of_tokens in zip(array_of(features), masked.numpy(), *noises, strict=True):
        centres, apart = _measure_slowly(detector, image, of_centres)
        scores.append(apart.min(axis=1).mean())
        count = len(centres)
        spreads.append(_lengths_times_directions(centres, centres).sum() / (count * (count - 1)))
        patches = [  # row in the patch, column, channel
            image[:, row : row + 2, column : column + 2].transpose(1, 2, 0).ravel()
            for row in range(0, image.shape[1], 2)
            for column in range(0, image.shape[2], 2)
        ]
        for seen, made in zip(patches, _inpaint_slowly(detector, image, hidden, of_tokens), strict=True):
            directions.append(1 - cosine(seen, made))
            errors.append(np.mean((seen - made) ** 2))
    expected = {
        "direction": 5 * np.mean(directions),
        "distance": np.mean(errors),
        "compactness": np.mean(scores),
        "diversity": -0.1 * np.mean(spreads),
    }
    assert {name: float(one) for name, one in terms.items()} == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_loss_when_steps_differ_then_masks_and_noise_differ():
    """A new mask for every step; the same step draws the same one again."""
    detector = _detector()
    encoded = detector.encode(_draw(2, 3, *detector.image_size))

    first, again, other = (detector.loss(encoded, step)["distance"].item() for step in (0, 0, 1))

    assert first == again
    assert first != other


def test_loss_when_compared_with_its_formula_then_covers_all_tokens():
    """Direction and distance are means over masked and visible tokens alike."""
    detector = _detector(jitter=0.0)
    features = detector._unpack(detector.encode(_draw(2, 3, *detector.image_size)))
    masked = (_draw(2, detector.positions.shape[0]) < 0.5).float()

    terms = detector._weigh_terms(features, masked, torch.Generator())

    size = _CONFIG.patch_size
    rebuilt = detector._rebuild(patchify(features, size), masked)
    tokens = [functional.unfold(maps, size, stride=size) for maps in (features, rebuilt)]
    direction = 1 - functional.cosine_similarity(*tokens, dim=1)
    torch.testing.assert_close(terms["distance"], (features - rebuilt).square().mean())
    torch.testing.assert_close(terms["direction"], 5 * direction.mean())


def test_loss_when_centres_coincide_then_gradients_are_finite():
    """Distances of zero, as of each centre to itself, have a gradient of zero instead of none at all."""
    points = torch.ones(1, 3, 4, requires_grad=True)

    _distances(points, points).sum().backward()

    assert torch.equal(points.grad, torch.zeros(1, 3, 4))


def test_distances_when_points_almost_coincide_then_keep_their_digits():
    """Four digits are right where one minus the rounded cosine has hardly one: they decide which tokens are masked."""
    centre = _draw(1, 1, 64)
    points = centre + 2e-3 * _draw(1, 5, 64, seed=1)

    distances = _distances(points, centre)

    exact, wide = points.double() - centre.double(), centre.double()
    alike = functional.cosine_similarity(points.double(), wide, dim=2)
    torch.testing.assert_close(distances[..., 0].double(), exact.norm(dim=2) * (1 - alike), rtol=1e-4, atol=0.0)


def test_loss_when_centres_move_apart_then_diversity_rewards_it():
    """The diversity term is the negative mean distance of two different centres."""
    centres = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])

    distances = _distances(centres, centres)

    torch.testing.assert_close(distances, torch.tensor([[[0.0, 2**0.5], [2**0.5, 0.0]]]))


def test_score_when_the_map_is_known_then_is_its_population_deviation():
    """An image's score is the standard deviation of its whole map, divided by the number of pixels."""
    detector = _detector()

    with torch.no_grad():
        output = detector(_draw(3, 3, *detector.image_size))

    expected = output.anomaly_map.double().flatten(1).std(dim=1, correction=0)
    torch.testing.assert_close(output.score.double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("frames", [1, 2], ids=["one shot", "two shots"])
def test_stage_when_there_are_few_shots_then_single_frames_train(frames):
    """A batch of one frame gives finite terms and a gradient to every parameter of the stage."""
    detector = make_detector("ami_net")
    (stage,) = detector.stages()

    for step, frame in enumerate(stage.encode(_draw(frames, 3, *detector.image_size)).split(1)):
        terms = stage.loss(frame, step)
        sum(terms.values()).backward()
        assert all(torch.isfinite(term) for term in terms.values())

    assert all(torch.isfinite(parameter.grad).all() for parameter in stage.parameters)


def test_detector_when_the_frame_is_not_square_then_height_comes_first():
    """Grids, positions and maps follow a frame of any two sides."""
    detector = _detector(image_size=(64, 96), map_size=(32, 48))

    with torch.no_grad():
        output = detector(_draw(2, 3, 64, 96))

    assert detector.token_grid == (8, 12)
    assert output.anomaly_map.shape == (2, 32, 48)


def test_initial_values_when_the_seed_is_the_same_then_are_the_same():
    """A run is repeatable from its configuration alone, whatever was drawn before."""
    torch.rand(1)
    first, again, other = AmiNet(_CONFIG), AmiNet(_CONFIG), AmiNet(replace(_CONFIG, seed=2))

    trained = [name for name, parameter in first.named_parameters() if parameter.requires_grad]
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in trained)
    assert not torch.equal(states[0]["patch_embedding.weight"], states[2]["patch_embedding.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (64, 72)}, "stride 16"),
        ({"patch_size": 3}, "do not tile"),
        ({"heads": 3}, "3 heads"),
        ({"token_channels": 66}, "multiple of 4"),
        ({"backbone": "test_vit2"}, "not a convolutional network"),
    ],
    ids=["image", "patch", "heads", "channels", "transformer"],
)
def test_detector_when_its_configuration_contradicts_itself_then_refuses(changes, message):
    """The sentence says which value does not fit."""
    with pytest.raises(ValueError, match=message):
        AmiNet(replace(_CONFIG, **changes))


def test_config_when_left_alone_then_holds_the_values_of_the_reference_code():
    """The defaults are those that trained the released models; the mask is the published step."""
    config = AmiNetConfig()

    assert (config.backbone, config.layers, config.image_size) == ("wide_resnet50_2.tv_in1k", (1, 2, 3), (256, 256))
    assert (config.patch_size, config.token_channels, config.heads, config.mlp_ratio) == (4, 768, 12, 4)
    assert (config.blocks, config.centre_blocks, config.centres, config.jitter) == (8, 1, 8, 20.0)
    assert (config.mask_deviations, config.mask_softness) == (0.5, 0.0)
    assert (config.direction_weight, config.diversity_weight) == (5.0, 0.1)
    assert (config.map_size, config.blur_sigma) == ((256, 256), 4.0)
    assert config.recipe == Recipe("adamw", 1e-4, 1e-4, 0.01, 8, (0.9, 0.95), epochs=300)
