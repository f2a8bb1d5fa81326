"""What is ST-MAE's own: the deal, the transition, what may leak, the two residuals, and its configuration's limits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import CnnBackbone
from models.blocks.draws import generator_of_step
from models.blocks.patches import patchify
from models.st_mae import StMae, StMaeConfig, _reconstruction_errors, deal_tokens
from tests.tiny_detectors import TINY, make_detector


def _features(batch: int = 2) -> Tensor:
    """Return features `(B, C, h, w)` of the tiny detector's shape, all positive like those of a backbone."""
    detector = make_detector("st_mae")
    shape = (batch, sum(detector.backbone.channels), *detector.config.feature_grid)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _inverse(order: Tensor) -> Tensor:
    return order.argsort(dim=-1)


def test_encode_when_layers_differ_in_size_then_they_are_joined_on_one_grid():
    """F is all layers, bilinear on the grid, one after the other along the channels."""
    detector = make_detector("st_mae")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    features = detector.encode(images)

    with torch.no_grad():
        layers = detector.backbone(images)
    expected = [functional.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False) for x in layers]
    torch.testing.assert_close(features, torch.cat(expected, dim=1))
    assert {tuple(layer.shape[2:]) for layer in layers} == {(16, 16), (8, 8), (4, 4)}


def test_features_at_published_sizes_have_960_channels():
    """Four levels of VGG19, strides 1 to 8, make 64 + 128 + 256 + 512."""
    with torch.device("meta"):
        backbone = CnnBackbone("vgg19.tv_in1k", (0, 1, 2, 3))

    assert (backbone.channels, backbone.strides) == ((64, 128, 256, 512), (1, 2, 4, 8))


def test_deal_when_tokens_are_dealt_then_halves_are_equal_disjoint_and_ascending():
    """Every row is an order of all tokens; rows differ."""
    orders = deal_tokens(20, 4, torch.Generator().manual_seed(0))

    halves = orders.unflatten(1, (2, 10))
    assert torch.equal(orders.sort(dim=1).values, torch.arange(20).expand(4, 20))
    assert (halves.diff(dim=2) > 0).all()
    assert len(orders.unique(dim=0)) == 4


def test_deal_when_tokens_are_odd_then_refuses():
    """Halves swap places one to one."""
    with pytest.raises(ValueError, match="9 tokens"):
        deal_tokens(9, 1, torch.Generator())


def test_transition_when_nothing_else_happens_then_halves_have_swapped_places():
    """The j-th place of A holds what was at the j-th of B and the other way round, in raster order again."""
    detector = make_detector("st_mae")
    for name in ("patch_embedding", "patch_norm", "encoder", "decoder_embedding", "decoder", "prediction"):
        setattr(detector, name, nn.Identity())
    patches = torch.randn(3, 64, 5)
    detector.positions, detector.decoder_positions = torch.zeros(64, 5), torch.zeros(64, 5)
    order = deal_tokens(64, 1, torch.Generator().manual_seed(3))[0]

    moved = detector._rebuild(patches, order, _inverse(order))

    first, second = order.chunk(2)
    assert torch.equal(moved[:, first], patches[:, second])
    assert torch.equal(moved[:, second], patches[:, first])


def test_transition_when_recomputed_in_numpy_then_tokens_arrive_with_the_positions_of_both_places():
    """Embedding, norm, code, exchange, second code and prediction in float64 loops give the same, to 1e-5."""
    detector = make_detector("st_mae")
    detector.encoder, detector.decoder = nn.Identity(), nn.Identity()
    patches = patchify(_features(), 2)
    order = deal_tokens(64, 1, torch.Generator().manual_seed(3))[0]

    with torch.no_grad():
        rebuilt = detector._rebuild(patches, order, _inverse(order))

    state = {name: value.double().numpy() for name, value in detector.state_dict().items()}
    places, targets = detector.positions.double().numpy(), detector.decoder_positions.double().numpy()
    first, second = (half.tolist() for half in order.chunk(2))
    partner = dict(zip([*first, *second], [*second, *first], strict=True))
    for image in range(2):
        for place in range(64):
            source = partner[place]
            token = state["patch_embedding.weight"] @ patches[image, source].double().numpy()
            token = token + state["patch_embedding.bias"]
            token = (token - token.mean()) / np.sqrt(token.var() + 1e-6)
            token = token * state["patch_norm.weight"] + state["patch_norm.bias"] + places[source]
            token = state["decoder_embedding.weight"] @ token + state["decoder_embedding.bias"] + targets[place]
            expected = state["prediction.weight"] @ token + state["prediction.bias"]
            np.testing.assert_allclose(rebuilt[image, place].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_loss_and_residual_when_recomputed_in_numpy_then_agree():
    """Both terms of the loss a token at a time, and d theta a place at a time, to 1e-5 of float64 loops."""
    detector = make_detector("st_mae")
    features = _features()[:, :, :4, :4]
    rebuilt = features + 0.3 * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    detector.token_grid = (2, 2)

    distance, direction = _reconstruction_errors(patchify(features, 2), patchify(rebuilt, 2))
    residual = detector._compare(patchify(features, 2), patchify(rebuilt, 2))

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))

    seen, made = features.double().numpy(), rebuilt.double().numpy()
    directions = []
    for image, y, x in np.ndindex(2, 2, 2):
        cut = (image, slice(None), slice(2 * y, 2 * y + 2), slice(2 * x, 2 * x + 2))
        directions.append(1 - cosine(seen[cut], made[cut]))
    expected = np.zeros((2, 4, 4))
    for image, y, x in np.ndindex(2, 4, 4):
        one, other = seen[image, :, y, x], made[image, :, y, x]
        expected[image, y, x] = ((one - other) ** 2).mean() * (1 - cosine(one, other))
    assert distance.item() == pytest.approx(((made - seen) ** 2).mean(), abs=1e-5)
    assert direction.item() == pytest.approx(np.mean(directions), abs=1e-5)
    np.testing.assert_allclose(residual.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["joint", "split"])
def test_rebuild_when_halves_are_exchanged_then_nothing_changes(mode):
    """One encoder serves both halves, so neither is the first."""
    detector = StMae(replace(TINY["st_mae"], decoder_mode=mode))
    patches = patchify(_features(), 2)
    order = deal_tokens(64, 1, torch.Generator().manual_seed(3))[0]
    exchanged = torch.cat(order.chunk(2)[::-1])

    with torch.no_grad():
        rebuilt = detector._rebuild(patches, order, _inverse(order))
        again = detector._rebuild(patches, exchanged, _inverse(exchanged))

    torch.testing.assert_close(again, rebuilt, rtol=1e-5, atol=1e-5)


def test_rebuild_when_each_image_has_its_deal_then_equals_one_at_a_time():
    """The orders of a training step and the kept orders of inference go the same way."""
    detector = make_detector("st_mae")
    patches = patchify(_features(), 2)
    orders = deal_tokens(64, 2, torch.Generator().manual_seed(3))

    with torch.no_grad():
        together = detector._rebuild(patches, orders, _inverse(orders))
        alone = [
            detector._rebuild(image[None], order, _inverse(order)) for image, order in zip(patches, orders, strict=True)
        ]

    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("mode", "leaks"), [("split", False), ("joint", True)])
def test_rebuild_when_looked_at_backwards_then_only_the_joint_decoder_sees_a_half_itself(mode, leaks):
    """With split decoders, what is rebuilt at B depends on A alone; the joint one, as published, sees B too."""
    detector = StMae(replace(TINY["st_mae"], decoder_mode=mode))
    patches = patchify(_features(1), 2).requires_grad_()
    order = deal_tokens(64, 1, torch.Generator().manual_seed(3))[0]
    first, second = order.chunk(2)

    detector._rebuild(patches, order, _inverse(order))[:, second].square().sum().backward()

    assert (patches.grad[:, first].abs().sum(dim=2) > 0).all()
    assert bool((patches.grad[:, second] != 0).any()) is leaks


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.0), (2.0, 1.0), (3.0, 4.0)])
def test_errors_when_features_are_rebuilt_too_large_then_only_the_distance_tells(factor, expected):
    """Both errors vanish for an exact copy; the cosine knows no size."""
    patches = torch.ones(2, 6, 5)

    distance, direction = _reconstruction_errors(patches, factor * patches)

    torch.testing.assert_close(distance, torch.tensor(expected))
    torch.testing.assert_close(direction, torch.tensor(0.0), rtol=0, atol=1e-6)


def test_errors_when_one_token_is_turned_away_then_its_cosine_counts_alone():
    """The cosine is taken a token at a time, so that a small defect weighs a whole token."""
    patches = torch.ones(1, 4, 2)
    rebuilt = patches.clone()
    rebuilt[0, 2] = torch.tensor([1.0, -1.0])

    _, direction = _reconstruction_errors(patches, rebuilt)

    torch.testing.assert_close(direction, torch.tensor(1 / 4))


def test_loss_weighs_the_direction():
    """The cosine term carries the published weight of 5."""
    detector, plain = make_detector("st_mae"), StMae(replace(TINY["st_mae"], direction_weight=1.0))
    features = _features()

    weighted, unweighted = detector.loss(features, 0), plain.loss(features, 0)

    torch.testing.assert_close(weighted["direction"], 5 * unweighted["direction"])
    torch.testing.assert_close(weighted["distance"], unweighted["distance"])


def test_loss_when_written_out_then_compares_each_image_with_what_its_own_deal_rebuilds_in_place():
    """Tokens are back in raster order before they are compared, each image by the deal that the step drew for it."""
    detector = make_detector("st_mae")
    features = _features(3)

    with torch.no_grad():
        terms = detector.loss(features, 4)
        patches = patchify(features, 2)
        orders = deal_tokens(64, 3, generator_of_step(detector.config.seed, 4))
        rebuilt = torch.cat(
            [detector._rebuild(one[None], order, _inverse(order)) for one, order in zip(patches, orders, strict=True)]
        )

    seen, made = patches.double().numpy(), rebuilt.double().numpy()
    cosines = (seen * made).sum(axis=2) / np.sqrt((seen**2).sum(axis=2) * (made**2).sum(axis=2))
    assert float(terms["distance"]) == pytest.approx(((made - seen) ** 2).mean(), rel=1e-5)
    assert float(terms["direction"]) == pytest.approx(5 * (1 - cosines).mean(), rel=1e-5)


def test_loss_when_steps_differ_then_deals_differ():
    """Training never settles on one deal."""
    detector = make_detector("st_mae")
    features = _features()

    values = {float(detector.loss(features, step)["distance"].detach()) for step in range(3)}

    assert len(values) == 3


def test_residual_when_written_out_then_is_squared_distance_times_cosine_distance():
    """D theta is taken at every place of the grid over all channels, never below zero and zero without a difference."""
    detector = make_detector("st_mae")
    features = _features()
    rebuilt = features + 0.3 * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))

    residual = detector._compare(patchify(features, 2), patchify(rebuilt, 2))

    distance = (rebuilt - features).square().mean(dim=1)
    direction = 1 - functional.cosine_similarity(rebuilt, features, dim=1)
    torch.testing.assert_close(residual, distance * direction)
    assert (detector._compare(patchify(features, 2), patchify(features, 2)) == 0).all()
    assert (detector._compare(patchify(features, 2), 1.01 * patchify(features, 2)) >= 0).all()


def test_forward_averages_over_the_kept_deals():
    """The map is the mean over the deals that lie in the state dict, then smoothed."""
    detector = make_detector("st_mae").eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    patches = patchify(detector.encode(images), 2)

    with torch.no_grad():
        anomaly_map = detector(images).anomaly_map
        residuals = [
            detector._compare(patches, detector._rebuild(patches, order, _inverse(order)))
            for order in detector.state_dict()["orders"]
        ]

    assert len(residuals) == 2
    torch.testing.assert_close(anomaly_map, detector.upsampling((residuals[0] + residuals[1]) / 2))


def test_forward_when_the_score_is_the_maximum_then_is_the_maps_largest_value():
    """The other score that was published for this family."""
    detector = StMae(replace(TINY["st_mae"], score_reduction="maximum")).eval()
    detector.load_backbone_weights(make_detector("st_mae").backbone.network.state_dict())

    with torch.no_grad():
        output = detector(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))

    assert torch.equal(output.score, output.anomaly_map.amax(dim=(1, 2)))


def test_deals_when_the_runs_seed_changes_then_stay():
    """Two runs are judged by the same deals; only `deal_seed` draws others."""
    first, second = StMae(TINY["st_mae"]), StMae(replace(TINY["st_mae"], seed=2))
    other = StMae(replace(TINY["st_mae"], deal_seed=1))

    assert torch.equal(first.orders, second.orders)
    assert not torch.equal(first.orders, other.orders)
    assert not torch.equal(first.prediction.weight, second.prediction.weight)


def test_state_dict_when_loaded_then_the_kept_deals_come_with_it():
    """Weights are never judged by other deals than those that their thresholds were made with."""
    other = StMae(replace(TINY["st_mae"], deal_seed=1))
    restored = StMae(TINY["st_mae"])

    restored.load_state_dict(other.state_dict())

    assert torch.equal(restored.orders, other.orders)
    assert torch.equal(restored.rasters, _inverse(other.orders))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "tile the grid"),
        ({"patch_size": 16}, "1 tokens"),
        ({"deals": 0}, "at least one deal"),
        ({"encoder_heads": 5}, "encoder_channels"),
        ({"decoder_channels": 6, "decoder_heads": 2}, "decoder_channels"),
    ],
)
def test_detector_when_the_configuration_contradicts_itself_then_says_where(changes, message):
    """Impossible combinations are refused before any frame is read."""
    with pytest.raises(ValueError, match=message):
        StMae(replace(TINY["st_mae"], **changes))


def test_config_when_left_alone_then_holds_the_base_size():
    """The defaults are the sizes that were found for the paper's network."""
    config = StMaeConfig()

    assert (config.image_size, config.feature_grid, config.patch_size) == ((256, 256), (64, 64), 4)
    assert (config.encoder_channels, config.encoder_blocks, config.encoder_heads) == (768, 12, 12)
    assert (config.decoder_channels, config.decoder_blocks, config.decoder_heads) == (512, 8, 16)
    assert (config.decoder_mode, config.direction_weight, config.deals) == ("joint", 5.0, 2)
    assert (config.recipe.epochs, config.recipe.batch_size, config.recipe.weight_decay) == (400, 8, 0.05)
