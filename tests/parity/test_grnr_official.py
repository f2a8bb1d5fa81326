"""GRNR gives the numbers of its authors' demo: chosen features, scores of both grids, maps and their product.

The recorded numbers are of hmyao22/GRNR at 8c02ba1, which ran on a filled ResNet-18 (`record_grnr.py`). Both sides
computed in float64. Deviations that are meant are taken back here, one by one, and then nothing differs: the ridge is
made tiny, the slope of the choice 0, the context 0, and for the demo as it stands its first rows are chosen.
"""

from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from models import grnr
from models.grnr import Grnr, GrnrConfig, combine_neighbours, mean_distances, neighbour_filters, typical_weights
from tests.parity.official_code import RECORDED, fill
from tests.parity.record_grnr import CANVAS, CASES, MARGIN, SEED, WITHOUT_MAPS, draw_texture
from tests.parity.recordings import Arrays, read_arrays

_TINY_RIDGE = 1e-13  # in float64 enough for a border's repeated neighbours
_CUT = (3, 2)
_EXACT = [case for case in CASES if case != "noisy"]


@cache
def _recorded() -> Arrays:
    return read_arrays(RECORDED / "grnr.npz")


@cache
def _weights() -> dict[str, Tensor]:
    names = Grnr(GrnrConfig(backbone="resnet18")).backbone.network.state_dict()
    return {
        name: torch.from_numpy(fill(name, tuple(own.shape), SEED))
        for name, own in names.items()
        if not name.endswith("num_batches_tracked")
    }


def _build(case: str, **changes: object) -> tuple[Grnr, Tensor]:
    """Build the detector with the settings of a case, in float64, and the image that the demo saw."""
    support, pull, _, _, reflected = CASES[case]
    side = CANVAS - 2 * MARGIN if reflected else CANVAS
    settings = {
        "border_mode": "reflect_pad" if reflected else "crop",
        "context": 0,
        "support": support,
        "regularisation": pull,
        "ridge": _TINY_RIDGE,
        "support_slope": 0.0,
    }
    detector = Grnr(GrnrConfig(backbone="resnet18", image_size=(side, side), **(settings | changes)))
    detector.load_backbone_weights(_weights())
    detector.double().eval()
    detector.regression.filters = _orthogonal(detector.regression.filters)
    return detector, draw_texture(side)[None]


def _orthogonal(filters: Tensor) -> Tensor:
    """Return the filters to all digits of float64, where the detector holds those of float32."""
    around = [0, 1, 2, 3, 5, 6, 7, 8]
    exact = torch.zeros(8, 9, dtype=torch.float64)
    exact[:, around] = torch.linalg.qr(filters.double().reshape(8, 9)[:, around].T).Q.T
    return exact.reshape(8, 1, 3, 3)


def _first_rows(distances: Tensor, support: int, slope: int) -> Tensor:
    """Choose as the demo does, whose mean distances are all infinite."""
    assert slope == 0
    return (torch.arange(distances.shape[1]) < support).to(distances.dtype).expand_as(distances)


@cache
@torch.no_grad()
def _answers(case: str) -> dict[str, np.ndarray]:
    """Judge the texture and name everything that the demo was asked for."""
    detector, image = _build(case)
    choose = typical_weights if CASES[case][2] else _first_rows
    with patch.object(grnr, "typical_weights", choose):
        features = detector.encode(image)
        grids = [detector.regression(layer) for layer in features]
        anomaly_map = detector(image).anomaly_map[0]
    rows = [layer.flatten(2).transpose(1, 2) for layer in features]
    chosen = [choose(mean_distances(layer), CASES[case][0], 0)[0].nonzero()[:, 0] for layer in rows]
    maps = [
        upsample(grnr._cut_rim(grid, cut))[0]
        for grid, cut, upsample in zip(grids, _CUT, detector.upsampling, strict=True)
    ]
    if detector.config.border_mode == "crop":
        anomaly_map = anomaly_map[MARGIN:-MARGIN, MARGIN:-MARGIN]
    answers = {"fused": anomaly_map[::4, ::4], "largest": anomaly_map.max()}
    for scale, cut in enumerate(_CUT):
        answers[f"chosen{scale}"] = chosen[scale]
        neighbours = combine_neighbours(features[scale], detector.regression.filters)
        answers[f"neighbours{scale}"] = neighbours.square().sum(dim=(2, 3))[0]
        answers[f"grid{scale}"] = grids[scale][0, cut:-cut, cut:-cut]
        answers[f"map{scale}"] = maps[scale][::6, ::6]
    return {name: value.numpy() for name, value in answers.items()}


@pytest.mark.parametrize("scale", [0, 1])
@pytest.mark.parametrize("case", _EXACT)
def test_chosen_features_are_those_of_the_demo(case, scale):
    """The same places are typical; the demo as it stands takes the map's first ones."""
    chosen = _answers(case)[f"chosen{scale}"]

    np.testing.assert_array_equal(chosen, _recorded()[f"{case}__chosen{scale}"])
    assert (chosen == np.arange(len(chosen))).all() == (case == "literal")


@pytest.mark.parametrize("name", ["neighbours0", "neighbours1"])
@pytest.mark.parametrize("case", _EXACT)
def test_neighbours_equal_the_demo(case, name):
    """The eight together are as long as there, at the border too, where the map is reflected."""
    np.testing.assert_allclose(_answers(case)[name], _recorded()[f"{case}__{name}"], rtol=1e-12)


@pytest.mark.parametrize("name", ["grid0", "grid1"])
@pytest.mark.parametrize("case", _EXACT)
def test_scores_within_the_cut_equal_the_demo(case, name):
    """The regression agrees to seven digits, with and without pull: what noise was left moves the eighth."""
    official = _recorded()[f"{case}__{name}"]

    np.testing.assert_allclose(_answers(case)[name], official, rtol=0, atol=1e-7 * official.max())


@pytest.mark.parametrize("name", ["map0", "map1", "fused", "largest"])
@pytest.mark.parametrize("case", [case for case in _EXACT if case not in WITHOUT_MAPS])
def test_maps_equal_the_demo(case, name):
    """Cut, resize, blur, margin and product agree to six digits: the matrices that do them are float32."""
    official = _recorded()[f"{case}__{name}"]

    np.testing.assert_allclose(_answers(case)[name], official, rtol=0, atol=1e-6 * official.max())


@torch.no_grad()
def test_ridge_and_slope_when_as_delivered_then_move_the_map_by_less_than_a_hundredth():
    """What stands for the demo's noise and its sharp choice is small beside what they judge."""
    detector, image = _build("noisy", ridge=GrnrConfig().ridge, support_slope=GrnrConfig().support_slope)

    ours = detector(image).anomaly_map[0, MARGIN:-MARGIN, MARGIN:-MARGIN][::4, ::4].numpy()

    official = _recorded()["noisy__fused"]
    np.testing.assert_allclose(ours, official, rtol=0, atol=1e-2 * official.max())


def test_orthogonal_filters_are_the_detector_s_own():
    """Refining them to float64 changed their last digits only."""
    filters = neighbour_filters()

    torch.testing.assert_close(_orthogonal(filters).abs(), filters.double().abs(), rtol=0, atol=1e-6)
