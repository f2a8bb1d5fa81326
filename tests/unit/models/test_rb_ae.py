"""What is RB-AE's own: reading from the reference alone, choosing it, artificial defects, three losses and the map."""

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.blocks.draws import generator_of_step
from models.detector import GradientStage, PassStage
from models.rb_ae import (
    RbAe,
    RbAeConfig,
    _ReferenceAttention,
    dice_loss,
    discrimination_loss,
    edge_difference,
    focal_loss,
    structural_similarity,
)
from tests.tiny_detectors import TINY
from training.fitting.optimisers import build_optimiser, learning_rate_at

_SIZE = (64, 64)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(count: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, *_SIZE, generator=_generator(seed))


def _weave(count: int, seed: int) -> Tensor:
    """Draw frames of a periodic texture in two directions, of any phase."""
    phases = torch.rand(2, count, 1, 1, 1, generator=_generator(seed)) * 2 * torch.pi
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    weave = torch.sin(rows * (2 * torch.pi / 16) + phases[0]) + torch.sin(columns * (2 * torch.pi / 16) + phases[1])
    return (0.5 + 0.2 * weave).expand(count, 3, 64, 64).clamp(0, 1).contiguous()


def _spoil(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Put a bright square on each frame; return the frames and its mask `(H, W)`."""
    mask = torch.zeros(_SIZE)
    mask[20:36, 24:44] = 1
    return torch.where(mask > 0, torch.tensor(0.95), frames), mask


def _show(detector: RbAe, frames: Tensor) -> None:
    """Run the passes."""
    for stage in detector.stages():
        if isinstance(stage, PassStage):
            for batch in frames.split(5):
                stage.observe(batch)
            stage.finish()


def _build(**changes: object) -> RbAe:
    detector = RbAe(replace(TINY["rb_ae"], **changes))
    _show(detector, _images(4, seed=9))
    return detector.eval()


@cache
def _fitted_once() -> RbAe:
    detector = RbAe(TINY["rb_ae"])
    frames = _weave(16, seed=1)
    _show(detector, frames)
    for stage in detector.stages():
        if isinstance(stage, GradientStage):
            optimiser = build_optimiser(stage.recipe, stage.parameters)
            for step in range(stage.recipe.iterations):
                drawn = torch.randperm(16, generator=_generator(step))[:8]
                optimiser.zero_grad()
                sum(stage.loss(frames[drawn], step).values()).backward()
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate_at(stage.recipe, step, stage.recipe.iterations)
                optimiser.step()
    return detector.eval()


def _fitted() -> RbAe:
    return copy.deepcopy(_fitted_once())


def _attention(channels: int = 6, pool: int = 1) -> _ReferenceAttention:
    attention = _ReferenceAttention(channels, pool).eval()
    for index, parameter in enumerate(attention.parameters()):
        torch.nn.init.normal_(parameter, mean=0.5, generator=_generator(index))
    return attention


@torch.no_grad()
def test_attention_when_written_out_with_loops_then_is_the_same():
    """Queries of the frame weigh keys of the reference by softmax(sharpness x cosine), and mix its values."""
    attention = _attention()
    features, reference = torch.randn(2, 1, 6, 3, 4, generator=_generator(5)).unbind()

    mixed = attention.mix(features, *attention.read(reference))[0].numpy()

    weights = {name: value.double().numpy().squeeze() for name, value in attention.state_dict().items()}
    frame, other = (one[0].double().numpy().reshape(6, 12) for one in (features, reference))
    for place in range(12):
        query = weights["query.weight"] @ frame[:, place] + weights["query.bias"]
        keys = [weights["key.weight"] @ other[:, m] + weights["key.bias"] for m in range(12)]
        values = [weights["value.weight"] @ other[:, m] + weights["value.bias"] for m in range(12)]
        cosines = [query @ key / (np.linalg.norm(query) * np.linalg.norm(key)) for key in keys]
        shares = np.exp(np.exp(weights["log_sharpness"]) * np.array(cosines))
        expected = sum(share * value for share, value in zip(shares / shares.sum(), values, strict=True))
        np.testing.assert_allclose(mixed.reshape(6, 12)[:, place], expected, atol=1e-5)


@torch.no_grad()
def test_attention_when_the_frame_is_the_same_everywhere_then_so_is_the_answer():
    """The frame steers the weights and nothing else; no place of it is added to what is read."""
    attention = _attention()
    features = torch.randn(1, 6, 1, 1, generator=_generator(5)).expand(1, 6, 3, 4)

    repaired = attention(features, torch.randn(1, 6, 3, 4, generator=_generator(6)))

    torch.testing.assert_close(repaired, repaired[:, :, :1, :1].expand_as(repaired))


@torch.no_grad()
def test_attention_when_the_frame_has_a_huge_spike_then_answers_stay_within_the_values_of_the_reference():
    """Each channel lies between the least and the largest value, and other places do not notice."""
    attention = _attention()
    features, reference = torch.randn(2, 1, 6, 3, 4, generator=_generator(5)).unbind()
    spiked = features.clone()
    spiked[0, :, 1, 2] = 1e4
    keys, values = attention.read(reference)

    plain, mixed = attention.mix(features, keys, values)[0], attention.mix(spiked, keys, values)[0]

    assert (mixed.amax(dim=(1, 2)) <= values.amax(dim=0) + 1e-5).all()
    assert (mixed.amin(dim=(1, 2)) >= values.amin(dim=0) - 1e-5).all()
    elsewhere = torch.ones(3, 4, dtype=torch.bool)
    elsewhere[1, 2] = False
    assert torch.equal(mixed[:, elsewhere], plain[:, elsewhere])


@torch.no_grad()
def test_attention_when_the_reference_is_pooled_then_reads_means_of_squares():
    """A quarter of the places is left, each the mean of four keys, made one long again, and of four values."""
    plain, pooled = _attention(), _attention(pool=2)
    reference = torch.randn(1, 6, 4, 6, generator=_generator(5))

    (_, every), (keys, values) = plain.read(reference), pooled.read(reference)

    assert keys.shape[0] == values.shape[0] == 6
    torch.testing.assert_close(values[0], every[[0, 1, 6, 7]].mean(dim=0))
    key = plain.key(reference)[0].flatten(1)[:, [0, 1, 6, 7]].mean(dim=1)
    torch.testing.assert_close(keys[0], key / key.norm())


@torch.no_grad()
def test_painting_when_attention_answers_the_same_then_the_frame_changes_nothing():
    """No way leads from the encoder to the decoder around the reference, at any scale."""
    detector = _build()
    for attention in detector.attentions:
        attention.query.weight.zero_()  # now every place reads the same of the reference

    dark, bright = detector.paint(torch.zeros(1, 3, *_SIZE)), detector.paint(_images(1))

    torch.testing.assert_close(dark, bright)


def test_attention_when_new_then_is_ten_times_as_sharp_as_a_cosine():
    """Were it as flat as a cosine, every place would begin by reading the mean of the reference."""
    sharpnesses = [attention.log_sharpness.exp().item() for attention in RbAe(TINY["rb_ae"]).attentions]

    assert sharpnesses == pytest.approx(3 * [10.0])


def test_network_has_the_planned_number_of_parameters():
    """4.69 million in the encoder, 1.04 in attention, with three sharpnesses, 3.82 in the decoder."""
    detector = RbAe(RbAeConfig())

    counts = [sum(p.numel() for p in part.parameters()) for part in detector.children()]

    assert counts == [4_687_296, 1_035_776 + 3, 3_818_915]


def test_features_have_strides_four_eight_and_sixteen():
    """The stem of stride 2 is shown to no attention."""
    detector = _build()

    shapes = [tuple(one.shape) for one in detector.encoder(_images())]

    assert shapes == [(2, 16, 16, 16), (2, 16, 8, 8), (2, 16, 4, 4)]
    assert detector.paint(_images()).shape == (2, 3, 64, 64)


def test_reference_is_the_frame_that_is_nearest_to_the_mean_thumbnail():
    """The most usual frame is kept to the last bit, whatever the batches; nearest is told by 8 x 8 means."""
    frames = (_images(12) * 255).round() / 255
    frames[7] = (frames.mean(dim=0) * 255).round() / 255
    detector = RbAe(TINY["rb_ae"])

    _show(detector, frames)

    thumbnails = frames.numpy().reshape(12, 3, 8, 8, 8, 8).mean(axis=(3, 5))
    torch.testing.assert_close(detector.thumbnail, torch.from_numpy(thumbnails.mean(axis=0)))
    assert np.square(thumbnails - thumbnails.mean(axis=0)).sum(axis=(1, 2, 3)).argmin() == 7
    assert torch.equal(detector.reference.float() / 255, frames[7])
    assert int(detector.reference_index) == 7


def test_reference_when_several_frames_are_near_then_it_is_the_first_of_the_nearest():
    """A frame that is nearly as near, and a copy of the nearest, come too late, in the same batch or in a later one."""
    near = (_images(12) * 255).round() / 255
    frames = torch.cat((near, near.flip(0)))
    detector = RbAe(TINY["rb_ae"])

    _show(detector, frames)

    thumbnails = frames.numpy().reshape(24, 3, 8, 8, 8, 8).mean(axis=(3, 5))
    distances = np.square(thumbnails - thumbnails.mean(axis=0)).sum(axis=(1, 2, 3))
    assert int(detector.reference_index) == distances[:12].argmin()


def test_reference_when_one_is_named_then_it_is_that_frame():
    """A person may know better which frame shows a whole period."""
    frames = (_images(12) * 255).round() / 255
    detector = RbAe(replace(TINY["rb_ae"], reference_frame=6))

    _show(detector, frames)

    assert torch.equal(detector.reference.float() / 255, frames[6])
    assert int(detector.reference_index) == 6


def test_reference_when_the_named_frame_does_not_exist_then_refuses_before_any_descent():
    """The sentence tells how many frames there are."""
    detector = RbAe(replace(TINY["rb_ae"], reference_frame=12))

    with pytest.raises(ValueError, match="only 12 frames"):
        _show(detector, _images(12))


@pytest.mark.parametrize("finish", ["finish_mean", "finish_reference"])
def test_pass_when_it_saw_no_frame_then_refuses(finish):
    """Nothing is chosen from nothing."""
    with pytest.raises(RuntimeError, match="no frames"):
        getattr(RbAe(TINY["rb_ae"]), finish)()


@pytest.mark.parametrize("ask", ["forward", "paint", "reconstruction_loss", "defect_loss"])
def test_detector_when_the_reference_is_missing_then_says_so(ask):
    """Without a reference there is neither an answer nor a loss."""
    detector = RbAe(TINY["rb_ae"])
    arguments = (_images(),) if ask in ("forward", "paint") else (_images(), 0)

    with pytest.raises(RuntimeError, match="no reference frame"):
        getattr(detector, ask)(*arguments)


def test_reference_when_the_state_is_loaded_elsewhere_goes_with_it():
    """The frame lies in the state dict, and a detector that loads it may answer."""
    detector, other = _build(), RbAe(TINY["rb_ae"]).eval()

    other.load_state_dict(detector.state_dict())

    assert torch.equal(other.reference, detector.reference)
    assert torch.equal(other(_images()).anomaly_map, detector(_images()).anomaly_map)


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_discrimination_when_written_out_with_loops_then_is_the_same(margin):
    """Good places pay for leaving, defective ones for staying above the margin; each kind is averaged on its own."""
    features, good = torch.randn(2, 2, 5, 4, 4, generator=_generator(1)).unbind()
    masks = (torch.rand(2, 16, 16, generator=_generator(2)) > 0.96).float()

    loss = discrimination_loss(features, good, masks, margin)

    stay, leave = [], []
    for b, row, column in np.ndindex(2, 4, 4):
        first, second = (one[b, :, row, column].double().numpy() for one in (features, good))
        cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
        cell = masks[b, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        if cell.max() > 0:
            leave.append(max(0.0, cosine - margin))
        else:
            stay.append(1 - cosine)
    assert min(len(stay), len(leave)) > 3
    assert loss.item() == pytest.approx(np.mean(stay) + np.mean(leave), abs=1e-5)


def test_discrimination_when_good_places_coincide_and_defects_are_orthogonal_then_is_zero():
    """The aim of the loss costs nothing."""
    good = torch.zeros(1, 2, 2, 2)
    good[:, 0] = 1
    masks = torch.zeros(1, 4, 4)
    masks[0, 0, 0] = 1
    features = good.clone()
    features[0, :, 0, 0] = torch.tensor([0.0, 3.0])

    assert discrimination_loss(features, good, masks, 0.0).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (1.0, 1.0)], ids=["no defect", "all defect"])
def test_discrimination_when_one_kind_of_place_is_missing_then_it_counts_nothing(value, expected):
    """Frames without a defect, and defects that cover all, divide nothing by zero."""
    features = torch.randn(2, 5, 4, 4, generator=_generator(1))

    loss = discrimination_loss(features, features, torch.full((2, 16, 16), value), 0.0)

    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_discrimination_leaves_the_good_embedding_alone():
    """No gradient flows to what defective features are compared with."""
    features, good = torch.randn(2, 2, 5, 4, 4, generator=_generator(1), requires_grad=True).unbind()
    features.retain_grad()
    good.retain_grad()

    discrimination_loss(features, good, torch.zeros(2, 16, 16), 0.0).backward()

    assert features.grad.abs().sum() > 0
    assert good.grad is None


def test_structural_similarity_when_written_out_with_loops_then_is_the_same():
    """Means, variances and covariance under a Gaussian of 11 pixels, colours apart."""
    first, second = torch.rand(2, 1, 3, 13, 14, generator=_generator()).unbind()

    similarity = structural_similarity(first, second)

    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel, row, column in np.ndindex(3, 3, 4):
        a, b = (one[0, channel, row : row + 11, column : column + 11].double().numpy() for one in (first, second))
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        covariance = (window * (a - mean_a) * (b - mean_b)).sum()
        luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
        values.append(luminance * (2 * covariance + 9e-4) / (var_a + var_b + 9e-4))
    assert similarity.item() == pytest.approx(np.mean(values), abs=1e-5)
    assert structural_similarity(first, first).item() == pytest.approx(1, abs=1e-5)


def test_edge_difference_when_written_out_with_loops_then_is_the_same():
    """Grey, median of nine, Prewitt by three, similarity of lengths; four scales weigh the same."""
    first, second = torch.rand(2, 1, 3, 48, 48, generator=_generator()).unbind()

    difference = edge_difference(first, second)

    a, b = (one[0].mean(dim=0).double().numpy() for one in (first, second))
    means = []
    for scale in range(4):
        if scale:
            a, b = (one.reshape(len(one) // 2, 2, len(one) // 2, 2).mean(axis=(1, 3)) for one in (a, b))
        edges, others = _plain_edges(a), _plain_edges(b)
        means.append(np.mean(1 - (2 * edges * others + 0.0026) / (edges**2 + others**2 + 0.0026)))
    assert difference.item() == pytest.approx(np.mean(means), abs=1e-5)
    assert edge_difference(first, first).item() == pytest.approx(0, abs=1e-6)


def _plain_edges(grey: np.ndarray) -> np.ndarray:
    side = len(grey) - 2
    smooth = np.array([[np.median(grey[r : r + 3, c : c + 3]) for c in range(side)] for r in range(side)])
    edges = np.zeros((side - 2, side - 2))
    for r, c in np.ndindex(*edges.shape):
        cell = smooth[r : r + 3, c : c + 3]
        down, right = (cell[2] - cell[0]).sum() / 3, (cell[:, 2] - cell[:, 0]).sum() / 3
        edges[r, c] = (down**2 + right**2) ** 0.5
    return edges


def test_edge_difference_when_images_are_flat_then_has_a_finite_gradient():
    """The length of no edge at all can be derived."""
    flat = torch.full((1, 3, 48, 48), 0.5, requires_grad=True)

    edge_difference(flat, _images(1)[..., :48, :48]).backward()

    assert torch.isfinite(flat.grad).all()


def test_head_losses_when_written_out_then_are_focal_and_dice():
    """What is certain and right costs nothing; an empty mask that is answered with nothing costs nothing either."""
    logits = torch.tensor([[[2.0, -1.0]]])
    masks = torch.tensor([[[1.0, 1.0]]])
    shares = 1 / (1 + np.exp([-2.0, 1.0]))

    assert focal_loss(logits, masks).item() == pytest.approx(np.mean((1 - shares) ** 2 * -np.log(shares)), abs=1e-6)
    assert dice_loss(masks, masks).item() == 0
    assert dice_loss(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)).item() == 0
    assert dice_loss(torch.tensor([[[0.5, 0.0]]]), masks).item() == pytest.approx(1 - 2 / 3.5)


@torch.no_grad()
def test_reconstruction_loss_when_written_out_then_is_three_weighted_terms():
    """Squared error, 1 - SSIM and edges, of the frame and of what is painted after it."""
    detector = _build(structure_weight=0.5, edge_weight=2.0)
    _unify_statistics(detector)

    terms = detector.reconstruction_loss(_images(), 0)

    painted = detector.paint(_images())
    torch.testing.assert_close(terms["colour"], (painted - _images()).square().mean())
    torch.testing.assert_close(terms["structure"], 0.5 * (1 - structural_similarity(painted, _images())))
    torch.testing.assert_close(terms["edges"], 2 * edge_difference(painted, _images()))


@torch.no_grad()
def test_defect_loss_when_written_out_then_adds_pixels_and_repair_to_two_reconstructions():
    """Both repaintings are compared with the frame as it was; scales are summed."""
    detector = _build(discrimination_weight=2.0, repair_weight=0.3)
    _unify_statistics(detector)
    images = _images(3)

    terms = detector.defect_loss(images, 5)

    planted, masks = detector._plant(images, generator_of_step(detector.config.seed, 5))
    assert 0 < masks.flatten(1).any(dim=1).sum() <= 3
    both = [detector.paint(one) for one in (planted, images)]
    torch.testing.assert_close(terms["colour"], sum((one - images).square().mean() for one in both))
    torch.testing.assert_close(terms["structure"], sum(1 - structural_similarity(one, images) for one in both))
    torch.testing.assert_close(terms["edges"], sum(edge_difference(one, images) for one in both))
    bad, good, reference = (detector.encoder(one) for one in (planted, images, detector._reference_image()))
    apart = sum(discrimination_loss(one, other, masks, 0.0) for one, other in zip(bad, good, strict=True))
    repaired, alike = detector._repair(bad, reference), detector._repair(good, reference)
    distances = [
        1 - functional.cosine_similarity(one, other, dim=1).mean() for one, other in zip(repaired, alike, strict=True)
    ]
    torch.testing.assert_close(terms["discrimination"], 2 * apart)
    torch.testing.assert_close(terms["repair"], 0.3 * sum(distances))


@pytest.mark.parametrize("name", ["discrimination", "repair"])
def test_defect_loss_when_derived_then_pulls_spoilt_frames_and_leaves_good_ones_alone(name):
    """What defects are held against, features and what was read for them, is no target to be moved."""
    detector = _build()
    _unify_statistics(detector)
    images = _images(3)
    planted, masks = (one.detach() for one in detector._plant(images, generator_of_step(detector.config.seed, 5)))
    detector._plant = lambda *_: (planted.requires_grad_(), masks)
    images.requires_grad_()

    detector.defect_loss(images, 5)[name].backward()

    assert planted.grad.abs().sum() > 0
    assert images.grad.abs().sum() == 0


def _unify_statistics(detector: RbAe) -> None:
    """Take the batch out of batch norms, so that a loss may be compared with inference."""
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda _mode=True, norm=module: norm


def test_loss_when_taken_then_only_batch_norms_learn_and_forward_uses_what_they_learnt():
    """Statistics move with every loss, and the detector is left in the mode of inference."""
    detector = _build()
    before = detector(_images()).anomaly_map

    detector.reconstruction_loss(_images(), 0)

    assert not any(module.training for module in detector.modules() if isinstance(module, torch.nn.BatchNorm2d))
    assert not torch.equal(detector(_images()).anomaly_map, before)


def test_losses_when_flips_are_on_then_a_step_mirrors_some_frames():
    """Each step draws its own, and the same ones when it is repeated."""
    detector = _build(flips=True)
    images = _images(16)

    flipped = [detector._flip(images, generator_of_step(detector.config.seed, step)) for step in (0, 0, 1)]

    assert torch.equal(flipped[0], flipped[1])
    assert not torch.equal(flipped[0], flipped[2])
    for image, shown in zip(images, flipped[0], strict=True):
        assert any(torch.equal(shown, image.flip(axes)) for axes in ([], [1], [2], [1, 2]))


@torch.no_grad()
def test_map_is_the_mean_distance_of_the_scales_and_its_score_the_largest_value():
    """Features of frame and repainting are compared by direction, brought to size, averaged and blurred."""
    detector = _build(blur_sigma=0.0)

    output = detector(_images())

    pairs = zip(detector.encoder(_images()), detector.encoder(detector.paint(_images())), strict=True)
    scales = [1 - functional.cosine_similarity(one, other, dim=1)[:, None] for one, other in pairs]
    resized = [functional.interpolate(one, size=_SIZE, mode="bilinear")[:, 0] for one in scales]
    torch.testing.assert_close(output.anomaly_map, sum(resized) / 3)
    torch.testing.assert_close(output.score, output.anomaly_map.flatten(1).amax(dim=1))


@torch.no_grad()
def test_map_when_blurred_then_is_the_plain_one_under_a_gaussian():
    """The sum of a map stays, its peak gets lower."""
    plain, blurred = _build(blur_sigma=0.0)(_images()), _build(blur_sigma=2.0)(_images())

    torch.testing.assert_close(blurred.anomaly_map.mean(), plain.anomaly_map.mean(), rtol=0.02, atol=0)
    assert (blurred.score < plain.score).all()


@torch.no_grad()
def test_score_when_deviation_is_asked_for_then_is_the_deviation_of_the_map():
    """The other score of the same authors, over the same map."""
    detector = _build(score_reduction="deviation")

    output = detector(_images())

    torch.testing.assert_close(output.score, output.anomaly_map.flatten(1).std(dim=1, correction=0))


def test_stages_when_a_head_is_asked_for_then_it_learns_last_and_alone():
    """The head is trained on a finished branch, and moves nothing of it, not even a statistic."""
    detector = _build(map_source="head", head_recipe=TINY["rb_ae"].recipe)
    stage = detector.stages()[-1]
    own = {name: value.clone() for name, value in detector.state_dict().items() if not name.startswith("head.")}

    sum(stage.loss(_images(), 0).values()).backward()

    assert stage.name == "segmentation head"
    for name, parameter in detector.named_parameters():
        assert (parameter.grad is not None) == name.startswith("head."), name
    assert all(torch.equal(detector.state_dict()[name], value) for name, value in own.items())


@torch.no_grad()
def test_map_when_there_is_a_head_then_is_its_answer():
    """The map lies in [0, 1] and is brought to the size of the frame."""
    detector = _build(map_source="head")

    output = detector(_images())

    assert output.anomaly_map.shape == (2, 64, 64)
    assert output.anomaly_map.min() >= 0
    assert output.anomaly_map.max() <= 1


def test_fitted_detector_repaints_a_defect_as_good_surface_and_points_at_it():
    """A repainted defect is nearer to its clean twin than to itself, and its pixels and frames score highest."""
    detector = _fitted()
    clean = _weave(8, seed=2)
    spoilt, mask = _spoil(clean)

    with torch.no_grad():
        painted = detector.paint(spoilt)
        good, bad = detector(clean), detector(spoilt)

    inside = mask > 0
    to_twin = (painted - clean)[:, :, inside].square().mean(dim=(1, 2))
    to_input = (painted - spoilt)[:, :, inside].square().mean(dim=(1, 2))
    assert (to_twin < to_input).all()
    assert (bad.anomaly_map[:, inside].mean(dim=1) > bad.anomaly_map[:, ~inside].mean(dim=1)).all()
    assert bad.score.min() > good.score.max()


def test_fitted_detector_when_the_reference_is_swapped_then_good_frames_stay_good():
    """Another good frame as the reference moves a good frame's score by less than a defect does."""
    detector = _fitted()
    clean = _weave(8, seed=2)
    spoilt, _ = _spoil(clean)
    with torch.no_grad():
        good, bad = detector(clean), detector(spoilt)
        detector.reference.copy_((_weave(1, seed=7)[0] * 255).round())
        swapped = detector(clean)

    assert (swapped.score - good.score).abs().max() < (bad.score - good.score).min()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (64, 72)}, "multiples of 16"),
        ({"image_size": (32, 64)}, "at least 48"),
        ({"channels": (8, 15, 16, 16)}, "even"),
        ({"pooled_reference": 3}, "squares of 3"),
        ({"pooled_reference": 0}, "squares of 0"),
        ({"channels": (0, 8, 8, 8)}, "at least 2"),
        ({"reference_frame": -1}, "counts from 0"),
        ({"defect_area": (0.4, 0.001)}, "defect_area must be two rising shares"),
        ({"defect_area": (0.95, 1.0)}, "no artificial defect has a defect_area of 0.95 to 1"),
        ({"defect_opacity": (0.0, 0.0)}, "defect_opacity must be"),
        ({"defect_opacity": (2.0, 3.0)}, "defect_opacity must be"),
    ],
    ids=[
        "size",
        "small",
        "channels",
        "pool",
        "no pool",
        "no channels",
        "reference",
        "falling",
        "rare",
        "clear",
        "dense",
    ],
)
def test_detector_when_the_configuration_contradicts_itself_then_says_where(changes, message):
    """Impossible combinations are refused before any frame is read."""
    with pytest.raises(ValueError, match=message):
        RbAe(replace(TINY["rb_ae"], **changes))


def test_initial_values_when_the_seed_is_the_same_then_are_the_same():
    """A run is repeatable from its configuration alone."""
    first, again, other = (RbAe(replace(TINY["rb_ae"], seed=seed)).state_dict() for seed in (1, 1, 2))

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.stages.0.0.0.weight"], other["encoder.stages.0.0.0.weight"])


def test_config_when_left_alone_then_holds_the_values_of_the_reconstruction():
    """The defaults are those of section 3 to 7 of what could be put together from the abstracts and sibling codes."""
    config = RbAeConfig()

    assert (config.image_size, config.channels) == ((256, 256), (64, 128, 256, 512))
    assert (config.structure_weight, config.edge_weight) == (1, 1)
    assert (config.discrimination_weight, config.repair_weight, config.margin) == (1, 0.1, 0)
    assert (config.map_source, config.blur_sigma, config.score_reduction) == ("features", 4, "maximum")
    assert (config.defect_area, config.defect_opacity) == ((0.001, 0.4), (1, 1))
    assert (config.recipe.epochs, config.defect_recipe.epochs) == (100, 300)
    assert (config.recipe.learning_rate, config.recipe.batch_size, config.recipe.weight_decay) == (1e-4, 8, 1e-5)
