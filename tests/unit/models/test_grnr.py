"""What is GRNR's own: the regression and its closed form, what may choose and be chosen, and that textures suffice."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.grnr import (
    Grnr,
    GrnrConfig,
    combine_neighbours,
    mean_distances,
    neighbour_filters,
    solve,
    typical_weights,
)
from tests.tiny_detectors import TINY, make_detector
from training.backbones.weights import resolve_weights
from training.config import load_config


class _FilterBank(nn.Module):
    """48 fixed random filters without a mean, rectified and averaged: features that need no pretraining."""

    strides, channels = (8, 16), (48, 48)

    def __init__(self) -> None:
        super().__init__()
        filters = torch.randn(48, 3, 15, 15, generator=torch.Generator().manual_seed(0))
        self.register_buffer("filters", filters - filters.mean(dim=(2, 3), keepdim=True))

    def forward(self, images: Tensor) -> list[Tensor]:
        answers = functional.conv2d(functional.pad(images, (7,) * 4, mode="reflect"), self.filters).abs()
        return [functional.avg_pool2d(answers, stride) for stride in self.strides]


def _on_filters(**changes: object) -> Grnr:
    """Build the demo's GRNR (N of 40) on the filter bank, with a smaller canvas."""
    detector = Grnr(replace(GrnrConfig(backbone="test_resnet", layers=(2, 3), image_size=(192, 192)), **changes))
    detector.backbone = _FilterBank()
    return detector.eval()


def _texture(size: int = 192, period: float = 16.0, moved: int = 0) -> Tensor:
    """Draw a periodic texture `(1, 3, size, size)`; a move by whole periods of the product leaves it as it is."""
    along = torch.arange(size, dtype=torch.float32) + moved
    wave = 0.5 + 0.2 * torch.sin(2 * math.pi / period * along)[:, None] * torch.cos(2 * math.pi / period * along)
    return wave.expand(1, 3, size, size).clone()


@torch.no_grad()
def _judge(detector: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    return detector(images)


def _regress_slowly(features: np.ndarray, config: GrnrConfig, support: np.ndarray) -> np.ndarray:
    """Solve the printed objective position by position: `(C, H, W)` float64 and the N x C support to `(H, W)`."""
    channels, height, width = features.shape
    padded = np.pad(features, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    scores = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            window = padded[:, row : row + 3, column : column + 3].reshape(channels, 9).T
            around = np.delete(window, 4, axis=0)  # S_L, 8 x C
            query = features[:, row, column]
            right = query @ around.T
            for typical in support:
                right = right + config.regularisation * typical @ around.T
            total = 1 + config.regularisation * len(support)
            gram = around @ around.T
            ridge = config.ridge * np.trace(gram) / 8 * np.eye(8)
            weights = np.linalg.solve((total * (gram + ridge)).T, right)
            scores[row, column] = np.linalg.norm(query - weights @ around)
    return scores


def _sharply_typical(features: np.ndarray, count: int) -> np.ndarray:
    """Return the rows of `(C, H, W)` with the smallest mean distance to the others: `(count, C)`."""
    rows = features.reshape(len(features), -1).T
    means = [sum(np.linalg.norm(a - b) for b in rows) / (len(rows) - 1) for a in rows]
    return rows[np.argsort(means, kind="stable")[:count]]


@pytest.mark.parametrize("regularisation", [0.0, 0.1, 5.0])
def test_regression_when_the_objective_is_solved_as_printed_then_agrees(regularisation):
    """The closed form equals N separate terms for every typical feature, to 1e-8 in float64, with 8 neighbours each."""
    config = GrnrConfig(support=6, support_slope=0.0, regularisation=regularisation)
    detector = Grnr(replace(TINY["grnr"], support=6, support_slope=0.0, regularisation=regularisation)).double()
    detector.regression.filters = _exact_filters()
    features = np.random.default_rng(0).gamma(2.0, size=(12, 6, 5))

    scores = detector.regression(torch.from_numpy(features)[None])[0].numpy()

    expected = _regress_slowly(features, config, _sharply_typical(features, 6))
    np.testing.assert_allclose(scores, expected, rtol=1e-8)


def test_regression_when_in_float32_then_agrees_with_the_objective_solved_in_float64():
    """Neighbours that are nearly alike, as smoothed features are, cost no more than 1e-5 of the scores' range."""
    config = replace(TINY["grnr"], support=6, support_slope=0.0)
    noise = torch.randn(1, 32, 9, 9, generator=torch.Generator().manual_seed(0))
    features = 20 + functional.avg_pool2d(noise, 3, stride=1)

    with torch.no_grad():
        scores = Grnr(config).regression(features)[0].numpy()

    wide = features[0].double().numpy()
    expected = _regress_slowly(wide, config, _sharply_typical(wide, 6))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5 * expected.max())


def _exact_filters() -> Tensor:
    """Return the filters, orthogonal to the last bit of float64 instead of float32."""
    matrix = neighbour_filters().reshape(8, 9)[:, [0, 1, 2, 3, 5, 6, 7, 8]].double()
    filters = torch.zeros(8, 9, dtype=torch.float64)
    filters[:, [0, 1, 2, 3, 5, 6, 7, 8]] = torch.linalg.qr(matrix.T).Q.T
    return filters.reshape(8, 1, 3, 3)


def test_filters_are_orthogonal_and_pass_over_the_centre():
    """Turned neighbours span what the neighbours span, with the same lengths, and the position itself is not there."""
    filters = neighbour_filters().reshape(8, 9)

    torch.testing.assert_close(filters @ filters.T, torch.eye(8), rtol=0, atol=1e-6)
    assert (filters[:, 4] == 0).all()
    assert (filters[0].unique() == filters[0, [4, 0]]).all()


def test_neighbours_when_the_position_itself_changes_then_stay():
    """Eight neighbours stand for a position, and noise in its own feature reaches neither them nor their products."""
    features = torch.rand(1, 5, 7, 7, generator=torch.Generator().manual_seed(0))
    changed = features.clone()
    changed[:, :, 3, 4] = 100.0
    filters = neighbour_filters()

    before = combine_neighbours(features, filters)[0, 3 * 7 + 4]
    after = combine_neighbours(changed, filters)[0, 3 * 7 + 4]

    assert before.shape == (8, 5)
    assert torch.equal(after, before)
    assert not torch.equal(
        combine_neighbours(changed, filters)[0, 3 * 7 + 3], combine_neighbours(features, filters)[0, 24]
    )


def test_mean_distances_when_written_out_then_leave_the_row_itself_out():
    """The mean is over the n - 1 other rows."""
    rows = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))

    distances = mean_distances(rows)

    expected = torch.tensor([[sum((a - b).norm() for b in image) / 8 for a in image] for image in rows])
    torch.testing.assert_close(distances, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slope", [0, 10])
def test_typical_features_when_a_hundred_are_outliers_then_none_of_these_is_chosen(slope):
    """The choice looks at features, not at places: the outliers lie first and their weight is nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = 1 + 0.01 * torch.rand(1, 1600, 16, generator=generator)
    rows[:, :100] += 5 * torch.rand(1, 100, 16, generator=generator)

    weights = typical_weights(mean_distances(rows), 40, slope)

    assert (weights[:, :100] == 0).all()
    assert 35 <= float(weights.sum()) <= 45
    assert weights[:, 140:].sum() > 0


def test_typical_features_when_the_choice_is_sharp_then_they_are_exactly_n():
    """With no slope the published rule is left: the N nearest, each with the same weight."""
    distances = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))

    weights = typical_weights(distances, 7, 0)

    assert (weights.sum(dim=1) == 7).all()
    assert weights[0, distances[0].argsort()[:7]].eq(1).all()


def test_typical_features_when_distances_tie_then_equals_have_equal_weights():
    """The last digits never decide: equal features count alike, however many there are."""
    weights = typical_weights(torch.ones(1, 20), 5, 2)

    assert (weights == weights[0, 0]).all()
    assert weights[0, 0] > 0


def test_solve_agrees_with_the_library():
    """Elimination without exchanges solves positive definite systems, graded ones too."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(50, 8, 12, generator=generator, dtype=torch.float64)
    factors[:, 0] *= 1000
    matrices = factors @ factors.transpose(1, 2)
    right = torch.randn(50, 8, 1, generator=generator, dtype=torch.float64)

    torch.testing.assert_close(solve(matrices, right), torch.linalg.solve(matrices, right), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("regularisation", "least", "most"), [(0.0, 0.0, 1.2), (5.0, 2.0, math.inf)])
def test_regularisation_when_a_patch_is_flat_then_only_the_pull_shows_it(regularisation, least, most):
    """The inside of a flat patch is rebuilt by itself unless typical features pull: lambda matters as on or off."""
    detector = _on_filters(regularisation=regularisation)
    images = _texture() + 0.02 * torch.randn(1, 3, 192, 192, generator=torch.Generator().manual_seed(1))
    images[:, :, 64:128, 64:128] = 0.5
    features = detector.encode(images)[0]

    with torch.no_grad():
        scores = detector.regression(features)[0]

    inside = scores[4 + 10 : 4 + 14, 4 + 10 : 4 + 14].mean()
    background = scores[6:10, 6:26].mean()
    assert least < float(inside / background) < most


@pytest.mark.parametrize("seed", range(4))
def test_planted_defect_when_the_texture_is_periodic_then_stands_out_tenfold_at_its_place(seed):
    """One frame is enough: its score is more than ten times the clean one's, and the peak lies on the defect."""
    detector = _on_filters()
    top, left = (int(v) for v in torch.randint(40, 130, (2,), generator=torch.Generator().manual_seed(seed)))
    clean = _texture()
    defective = clean.clone()
    defective[:, :, top : top + 20, left : left + 20] = 0.9

    _, clean_score = _judge(detector, clean)
    anomaly_map, score = _judge(detector, defective)

    peak = divmod(int(anomaly_map[0].argmax()), 192)
    assert float(score) > 10 * float(clean_score)
    assert top - 16 <= peak[0] <= top + 36
    assert left - 16 <= peak[1] <= left + 36


def test_map_when_the_texture_is_clean_then_its_border_is_not_hot():
    """What reflection makes of a texture at the border stays below a tenth of a defect, like all of a clean map."""
    detector = _on_filters()
    defective = _texture()
    defective[:, :, 40:60, 110:130] = 0.9

    clean = _judge(detector, _texture())[0][0]
    _, score = _judge(detector, defective)

    assert clean[:16].max() < 0.1 * score
    assert clean[:, :16].max() < 0.1 * score
    assert clean.max() < 0.1 * score


@pytest.fixture(scope="module")
def embedded() -> Grnr:
    """The small configuration with the weights that come with the package, whose convolutions pad with zeros."""
    config = load_config("small", "grnr", ["product=texture"]).detector_config()
    detector = Grnr(config)
    detector.load_backbone_weights(resolve_weights("embedded").state_dict)
    return detector.eval()


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_forward_when_a_real_backbone_sees_one_grey_then_its_padding_is_no_defect(embedded, level):
    """What a network's zeros make of the border never reaches the map."""
    _, score = _judge(embedded, torch.full((1, 3, 256, 256), level))

    assert float(score) < 1e-3


def test_map_when_a_real_backbone_sees_noise_then_the_border_is_as_usual_as_the_middle(embedded):
    """A texture that fills the frame has no rim, so neither has its map; with the margin alone it was 2.7 to 5.3."""
    noise = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))

    maps = _judge(embedded, noise)[0].mean(dim=0)

    middle = maps[48:-48, 48:-48].mean()
    sides = (maps[:16], maps[-16:], maps[:, :16], maps[:, -16:])
    assert all(0.7 < float(side.mean() / middle) < 1.4 for side in sides)


def test_forward_when_built_twice_then_maps_are_the_same_to_the_bit():
    """Nothing is drawn at construction."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    first, second = make_detector("grnr"), make_detector("grnr")

    assert torch.equal(_judge(first, images)[0], _judge(second, images)[0])


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_forward_when_all_features_are_equal_then_is_finite_and_nearly_nothing(level):
    """A constant image has no defect, and no division by nothing."""
    detector = _on_filters()

    anomaly_map, score = _judge(detector, torch.full((1, 3, 192, 192), level))

    assert torch.isfinite(anomaly_map).all()
    assert float(score) < 1e-3


def test_forward_when_the_image_moves_by_a_coarse_cell_then_the_map_moves_along():
    """Away from the border a defect's map does not depend on where it lies."""
    detector = _on_filters()
    images = _texture()
    images[:, :, 76:106, 76:106] = 0.9

    still = _judge(detector, images)[0][0]
    moved = _judge(detector, images.roll((16, 16), (2, 3)))[0][0]

    inside = slice(60, 130)
    torch.testing.assert_close(
        moved.roll((-16, -16), (0, 1))[inside, inside], still[inside, inside], rtol=0, atol=1e-3 * float(still.max())
    )


def test_forward_when_batch_mates_are_odd_then_supports_are_not_shared():
    """Each image is its own reference: a mate full of noise changes nothing."""
    detector = _on_filters()
    noise = torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))

    alone = _judge(detector, _texture())[0][0]
    together = _judge(detector, torch.cat((_texture(), noise)))[0][0]

    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("border_mode", ["reflect_pad", "crop"])
def test_features_when_recomputed_in_numpy_then_are_means_of_nine_cells_with_zeros_around(border_mode):
    """The canvas is the image, mirrored outwards or as it is; what the backbone sees beyond its margin is dropped."""
    detector = Grnr(replace(TINY["grnr"], image_size=(96, 96), border_mode=border_mode))
    detector.load_backbone_weights(make_detector("grnr").backbone.network.state_dict())
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    added, beyond = (16 + 32, 32) if border_mode == "reflect_pad" else (0, 0)

    features = detector.encode(images)

    canvas = np.pad(images.numpy(), ((0, 0), (0, 0), (added, added), (added, added)), mode="reflect")
    with torch.no_grad():
        layers = detector.backbone(torch.from_numpy(canvas))
    for seen, layer, stride in zip(features, layers, detector.backbone.strides, strict=True):
        padded = np.pad(layer[0].double().numpy(), ((0, 0), (1, 1), (1, 1)))
        means = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2)).sum(axis=(3, 4)) / 9
        cells = beyond // stride
        inner = means[:, cells : means.shape[1] - cells, cells : means.shape[2] - cells]
        np.testing.assert_allclose(seen[0].numpy(), inner, rtol=0, atol=1e-5)


def test_forward_multiplies_both_scales_and_takes_the_largest_value():
    """The fused map is the product of two upsampled grids, and the score is its maximum."""
    detector = make_detector("grnr")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    anomaly_map, score = _judge(detector, images)

    with torch.no_grad():
        grids = [detector.regression(features) for features in detector.encode(images)]
    maps = []
    for grid, cells in zip(grids, (3, 2), strict=True):
        cut = grid.amin(dim=(1, 2), keepdim=True).expand_as(grid).clone()
        cut[:, cells:-cells, cells:-cells] = grid[:, cells:-cells, cells:-cells]
        large = functional.interpolate(cut[:, None], size=(96, 96), mode="bilinear", align_corners=False)
        maps.append(_blur(large)[:, 0, 16:-16, 16:-16])
    torch.testing.assert_close(anomaly_map, maps[0] * maps[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(score, anomaly_map.amax(dim=(1, 2)))


def _blur(maps: Tensor) -> Tensor:
    """Blur `(B, 1, H, W)` by sigma 3 with a reach of 12; the margin hides what happens behind the border."""
    offsets = torch.arange(-12, 13, dtype=torch.float32)
    weights = torch.exp(-(offsets**2) / 18)
    weights = weights / weights.sum()
    padded = functional.pad(maps, (12,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(padded, weights[None, None, :, None]), weights[None, None, None, :])


def test_forward_when_the_margin_is_cropped_then_the_rim_holds_the_least_value():
    """In the demo's way the margin is the image's own: never judged, and maps still cover the frame."""
    detector = Grnr(replace(TINY["grnr"], image_size=(96, 96), border_mode="crop"))
    detector.load_backbone_weights(make_detector("grnr").backbone.network.state_dict())

    anomaly_map, _ = _judge(detector, torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)))

    rim = anomaly_map[0].clone()
    rim[16:-16, 16:-16] = anomaly_map.min()
    assert anomaly_map.shape == (1, 96, 96)
    torch.testing.assert_close(rim, anomaly_map.min().expand(96, 96), rtol=0, atol=1e-6)


def test_stages_when_asked_then_there_is_none():
    """No frame is needed before the first answer."""
    assert make_detector("grnr").stages() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": 18}, "multiple of the stride"),
        ({"pool": 2}, "odd number of cells"),
        ({"margin": 64}, "can't be reflected"),
        ({"context": 36}, "a context of 36 pixels is not a multiple"),
        ({"cut": (3, 3)}, "beyond the margin"),
        ({"support": 144}, "144 typical features"),
        ({"support": 0}, "0 typical features"),
    ],
)
def test_detector_when_the_configuration_contradicts_itself_then_says_where(changes, message):
    """Impossible combinations are refused before any frame is read."""
    with pytest.raises(ValueError, match=message):
        Grnr(replace(TINY["grnr"], **changes))


def test_config_when_left_alone_then_holds_the_demos_values():
    """The defaults are the published demo's, on its canvas of 320."""
    config = GrnrConfig()

    assert (config.support, config.regularisation, config.pool, config.cut) == (40, 5.0, 3, (3, 2))
    assert (config.blur_sigma, config.margin, config.image_size) == (3.0, 32, (256, 256))
    assert config.backbone.startswith("wide_resnet50_2")
