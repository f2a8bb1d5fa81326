"""Jigsaw-SVDD gives the numbers of its authors' code: encoder, classifiers, losses, merging, maps and draws.

The numbers were recorded from the official modules (wangpeng000/VisualInspection at a593340) by
`record_jigsaw_svdd.py`; every tensor and image is filled by a rule that starts from its name. Where the detector's
docstring names a deviation, the test says on which side of it the two agree.
"""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from models import jigsaw_svdd
from models.jigsaw_svdd import (
    _LARGE,
    _SMALL,
    JigsawSvdd,
    JigsawSvddConfig,
    _draw_jigsaws,
    _draw_neighbours,
    _pairs_of_relations,
    merge_by_affinity,
)
from tests.parity.official_code import RECORDED, fill
from tests.parity.recordings import draw, read_arrays
from training.fitting.optimisers import build_optimiser

_SEED = 1
_RECORDED = read_arrays(RECORDED / "jigsaw_svdd.npz")
_FEATURES = {"rtol": 1e-4, "atol": 2e-5}
both_patches = pytest.mark.parametrize("patch", [_SMALL, _LARGE])


def _official(name: str) -> str:
    """Return the official name of a parameter or buffer."""
    for ours, theirs in (
        ("encoder.quadrants.", "enc.conv1."),
        ("encoder.mixing.", "enc.conv2."),
        ("encoder.patches.convolution.", "enc.enc.conv.0."),
        ("encoder.patches.norm.", "enc.enc.conv.1."),
        ("large_classifier.", "cls_64."),
        ("small_classifier.", "cls_32."),
    ):
        if name.startswith(ours):
            rest = name.removeprefix(ours)
            for own, other in (("hidden.0.", "fc1."), ("hidden.2.", "fc2."), ("projection", "fc3.weight")):
                rest = rest.replace(own, other)
            return theirs + ("fc3.bias" if rest == "bias" and theirs.startswith("cls") else rest)
    place, _, rest = name.removeprefix("encoder.patches.deep.").partition(".")
    return f"enc.enc.conv.{int(place) + 4}.{rest}"


def _tensors(detector: JigsawSvdd) -> dict[str, Tensor]:
    """Return what the official modules hold, by its official name."""
    own = {
        **dict(detector.named_parameters()),
        **{
            f"{name}.projection": getattr(detector, name).projection
            for name in ("small_classifier", "large_classifier")
        },
    }
    return {_official(name): value for name, value in own.items()}


def _detector(**settings: object) -> JigsawSvdd:
    detector = JigsawSvdd(JigsawSvddConfig(**settings))
    with torch.no_grad():
        for key, value in _tensors(detector).items():
            value.copy_(torch.from_numpy(fill(key, value.shape, _SEED)))
    return detector


def test_embeddings_of_all_patches_equal_the_official_code():
    """What is shared between overlapping patches is what the official loop makes of each on its own, at both levels."""
    image = torch.from_numpy(0.2 * draw("grid", (1, 80, 80, 3), _SEED)).permute(0, 3, 1, 2)

    with torch.no_grad():
        small, large = _detector(small_stride=8, large_stride=16).encoder.encode_grids(image)

    np.testing.assert_allclose(small.permute(0, 2, 3, 1).numpy(), _RECORDED["grid_32"], **_FEATURES)
    np.testing.assert_allclose(large.permute(0, 2, 3, 1).numpy(), _RECORDED["grid_64"], **_FEATURES)


@pytest.fixture(scope="module")
def trained() -> tuple[np.ndarray, Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Take the recorded steps over patches at the recorded places, without noise."""
    detector = _detector(compactness_weight=0.5, colour_noise=0.0, pixel_noise=0.0)
    (stage,) = (stage for stage in detector.stages() if stage.name == "jigsaw")
    optimiser = build_optimiser(stage.recipe, stage.parameters)
    images = torch.from_numpy(0.2 * draw("images", (2, 3, 256, 256), _SEED))
    named = {_official(name): value for name, value in detector.named_parameters()}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jigsaw_svdd, "_draw_pairs", _recorded_pairs)
        patched.setattr(jigsaw_svdd, "_draw_neighbours", _recorded_neighbours)
        rows, gradients = [], {}
        for step in range(len(_RECORDED["trace"])):
            terms = stage.loss(images, step)
            loss = sum(terms.values())
            optimiser.zero_grad()
            loss.backward()
            if step == 0:
                gradients = {key: value.grad.clone() for key, value in named.items()}
            optimiser.step()
            compactness = (terms["compactness_large"].item() / 0.5, terms["compactness_small"].item() / 0.5)
            rows.append([loss.item(), terms["relation_large"].item(), terms["relation_small"].item(), *compactness])
    return np.array(rows), gradients, _tensors(detector)


def _recorded_pairs(_count: int, _size: object, patch: int, _generator: object) -> tuple[Tensor, Tensor, Tensor]:
    corners, classes = _RECORDED[f"pairs_{patch}"], _RECORDED[f"classes_{patch}"].astype(np.int64)
    return torch.from_numpy(corners), torch.tensor([[0, 1]]), torch.from_numpy(classes)


def _recorded_neighbours(_count: int, _pairs: int, _size: object, patch: int, _generator: object) -> Tensor:
    return torch.from_numpy(_RECORDED[f"close_{patch}"])


@pytest.mark.parametrize(
    ("column", "name"), list(enumerate(["loss", "relation_64", "relation_32", "svdd_64", "svdd_32"]))
)
def test_training_trace_equals_the_official_code(trained, column, name):
    """The loss and its terms in each Adam step are the official ones."""
    rows, _, _ = trained

    np.testing.assert_allclose(rows[:, column], _RECORDED["trace"][:, column], rtol=1e-4, err_msg=name)


def test_what_learns_and_by_which_gradients_equals_the_official_code(trained):
    """The same tensors get a gradient of the same size; the classifiers' last weights get none."""
    _, gradients, _ = trained

    assert sorted(gradients) == list(_RECORDED["learnt"])
    for key, gradient in gradients.items():
        np.testing.assert_allclose(gradient.norm(), _RECORDED[f"gradnorm__{key}"], rtol=1e-3, atol=1e-5, err_msg=key)


def test_parameters_after_the_last_step_equal_the_official_code(trained):
    """Adam moves the parameters as the official loop does, and leaves the classifiers' last weights alone."""
    rows, gradients, tensors = trained

    for key, value in tensors.items():
        recorded = _RECORDED[f"after__{key}"]
        ours = value.detach().flatten()[: len(recorded)].numpy()
        np.testing.assert_allclose(ours, recorded, rtol=0, atol=2e-4 * len(rows), err_msg=key)
        if key in gradients:  # by a gradient that is rounding alone, each of the two goes its own way
            start = gradients[key].flatten()[: len(recorded)].abs().numpy()
            learns = start > 1e-3 * float(_RECORDED[f"gradnorm__{key}"]) / gradients[key].numel() ** 0.5
            np.testing.assert_allclose(ours[learns], recorded[learns], rtol=1e-4, atol=5e-6, err_msg=key)


def test_merged_distances_equal_the_official_code_where_no_bound_is_met():
    """Affinity augmentation of ordinary distances, and of a single one, is the official sum."""
    ordinary = np.sort(np.abs(draw("distances", (1, 4, 8, 5), _SEED)) + np.float32(0.4), axis=-1)
    one = np.abs(draw("one", (1, 2, 4, 1), _SEED)) + np.float32(0.1)

    for distances, merged in ((ordinary, "merged"), (one, "merged_one")):
        rows = torch.from_numpy(distances.reshape(-1, distances.shape[-1]))
        np.testing.assert_allclose(merge_by_affinity(rows), _RECORDED[merged].ravel(), rtol=1e-5, err_msg=merged)


def test_merged_distances_leave_the_official_code_where_it_gives_the_nearest_least_weight():
    """At a distance of zero, and beyond its bound, the nearest patch has the least weight there, and the most here."""
    close = torch.tensor([[0.0, 0.5, 0.6, 0.7, 0.8], [0.0476, 0.0526, 0.3, 0.3, 0.3]])

    ours, official = merge_by_affinity(close).numpy(), _RECORDED["merged_close"].ravel()

    np.testing.assert_array_less(ours, [1e-4, 0.0493])
    np.testing.assert_array_less([0.5, 0.0523], official)


def test_spread_maps_equal_the_official_code():
    """Each pixel gets the mean of the patches above it."""
    detector = JigsawSvdd(JigsawSvddConfig(encoder_channels=(8,) * 6, small_stride=4, large_stride=16))

    for patch, side in ((_SMALL, 57), (_LARGE, 13)):
        scores = torch.from_numpy(np.abs(draw(f"s{patch}", (1, side, side), _SEED)))
        rows, columns = (detector.get_buffer(f"spread_{axis}_{patch}") for axis in ("rows", "columns"))
        spread = (rows @ scores @ columns.T)[:, ::5, ::5]
        np.testing.assert_allclose(spread.numpy(), _RECORDED[f"spread_{patch}"], rtol=1e-5, atol=1e-6)


def test_map_and_score_of_embeddings_equal_the_official_code(monkeypatch):
    """Neighbours, merging, spreading, the product of both levels and its maximum are the official ones."""
    config = JigsawSvddConfig(encoder_channels=(8,) * 6, embedding_channels=8, small_stride=4, large_stride=16)
    detector = JigsawSvdd(config)
    queries = {}
    for patch, count in ((_SMALL, 57), (_LARGE, 13)):
        queries[patch] = torch.from_numpy(draw(f"queries_{patch}", (1, count, count, 8), _SEED)).permute(0, 3, 1, 2)
    detector.small_bank, detector.large_bank = (
        torch.from_numpy(draw(f"bank_{patch}", (64, 8), _SEED)) for patch in (_SMALL, _LARGE)
    )
    monkeypatch.setattr(detector, "_embed_patches", lambda _images: (queries[_SMALL], queries[_LARGE]))

    output = detector(torch.empty(0))

    np.testing.assert_allclose(output.anomaly_map[:, ::5, ::5].numpy(), _RECORDED["chain_map"], rtol=1e-4)
    np.testing.assert_allclose(output.score.numpy(), _RECORDED["chain_score"], rtol=1e-4)


def test_relations_are_the_official_table():
    """The table's pairs have the same classes, and drawing a class and then a pair is drawing one of its rows."""
    pairs, counts = _pairs_of_relations()
    ours = {
        (*pair, relation): 1 / len(counts) / held
        for relation, held in enumerate(counts.tolist())
        for pair in pairs[relation, :held].tolist()
    }
    rows, times = np.unique(_RECORDED["table"], axis=0, return_counts=True)

    official = dict(zip(map(tuple, rows.tolist()), times / times.sum(), strict=True))

    assert ours == pytest.approx(official)


@both_patches
def test_pieces_are_drawn_as_far_apart_as_by_the_official_code(patch):
    """Around a centre where the code clips nothing, steps are the same numbers, equally frequent, and point alike."""
    side = 3 * patch - 2  # of an image with room for one centre
    corners, _, _ = _draw_jigsaws(20_000, (side, side), patch, torch.Generator().manual_seed(1))
    outer = [0, 1, 2, 3, 5, 6, 7, 8]
    moves = corners[:, outer].numpy() - (patch - 1)

    steps, counts = np.unique(np.abs(moves), return_counts=True)

    officially, times = _RECORDED[f"moved_{patch}"][:, outer], _RECORDED[f"steps_{patch}_count"]
    np.testing.assert_array_equal(np.unique(np.sign(moves), axis=0), np.unique(np.sign(officially), axis=0))
    np.testing.assert_array_equal(steps, _RECORDED[f"steps_{patch}"])
    np.testing.assert_allclose(counts / counts.sum(), times / times.sum(), atol=0.01)


@both_patches
def test_neighbours_are_drawn_as_by_the_official_code(patch):
    """All steps of up to K/32 along each axis but none at all, equally frequent."""
    corners = _draw_neighbours(20_000, 1, (256, 256), patch, torch.Generator().manual_seed(0)).numpy()

    steps, counts = np.unique(corners[:, 1] - corners[:, 0], axis=0, return_counts=True)

    times = _RECORDED[f"close_steps_{patch}_count"]
    np.testing.assert_array_equal(steps, _RECORDED[f"close_steps_{patch}"])
    np.testing.assert_allclose(counts / counts.sum(), times / times.sum(), atol=0.015)
