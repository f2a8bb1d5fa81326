"""What is INP-Former++'s own: soft coherence, two mined distances, the residual's head, and defects to learn from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import untrained_weights
from models.blocks.draws import generator_of_step
from models.blocks.soft_mining import mined_direction_loss
from models.inp_former_pp import (
    InpFormerPp,
    InpFormerPpConfig,
    _dice_loss,
    _mined_magnitude_loss,
    _mix_prototypes,
    _soft_coherence_loss,
)
from tests.plain_inp_branch import draw_prototypes, mine, rebuild
from tests.plain_networks import array_of, cosine, resize, shake, top_mean
from tests.tiny_detectors import TINY, make_detector

_STAGED = replace(TINY["inp_former_pp-vit"], schedule="staged")


def _images(count: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def _build(**changes: object) -> InpFormerPp:
    detector = InpFormerPp(replace(_STAGED, **changes))
    detector.load_backbone_weights(untrained_weights("test_vit2"))
    return detector.eval()


def test_soft_coherence_when_recomputed_in_numpy_then_agrees():
    """Plain loops in float64 give the same L_sc (Eq. 3), to 1e-5."""
    generator = torch.Generator().manual_seed(0)
    fused, prototypes = torch.randn(3, 7, 4, generator=generator), torch.randn(3, 2, 4, generator=generator)

    loss = _soft_coherence_loss(fused, prototypes)

    distances = []
    for tokens, drawn in zip(fused.double().numpy(), prototypes.double().numpy(), strict=True):
        mixtures = []
        for token in tokens:
            likeness = np.exp([cosine(token, prototype) for prototype in drawn])
            mixtures.append(sum(share * one for share, one in zip(likeness / likeness.sum(), drawn, strict=True)))
        distances.append(1 - cosine(tokens.ravel(), np.array(mixtures).ravel()))
    assert loss.item() == pytest.approx(np.mean(distances), abs=1e-5)


def test_mined_direction_when_recomputed_in_numpy_then_value_and_gradient_agree():
    """Plain loops in float64 give the same loss and the same gradient of every number, to 1e-5."""
    generator = torch.Generator().manual_seed(0)
    targets, rebuilt = torch.randn(2, 3, 2, 5, 4, generator=generator).unbind()
    rebuilt = rebuilt.requires_grad_()

    loss = mined_direction_loss(targets, rebuilt, 3.0)
    loss.backward()

    value, gradient = mine(targets.double().numpy(), rebuilt.detach().double().numpy(), 3.0)
    assert loss.item() == pytest.approx(value, abs=1e-5)
    np.testing.assert_allclose(rebuilt.grad.numpy(), gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mined_magnitude_when_recomputed_in_numpy_then_value_and_gradient_agree(reduction):
    """Plain loops in float64 give the same squared error and the same gradient of every number, to 1e-5."""
    generator = torch.Generator().manual_seed(0)
    targets, rebuilt = torch.randn(2, 3, 2, 5, 4, generator=generator).unbind()
    rebuilt = rebuilt.requires_grad_()

    loss = _mined_magnitude_loss(targets, rebuilt, 3.0, reduction)
    loss.backward()

    error = rebuilt.detach().double().numpy() - targets.double().numpy()
    size = error.size / (4 if reduction == "sum" else 1)
    gradient = np.zeros_like(error)
    for group in range(2):
        squared = np.array([[(token @ token) / 4 for token in image] for image in error[:, group]])
        weight = (squared / squared.mean()) ** 3
        gradient[:, group] = weight[..., None] * 2 * error[:, group] / size
    assert loss.item() == pytest.approx((error**2).sum() / size, abs=1e-5)
    np.testing.assert_allclose(rebuilt.grad.numpy(), gradient, rtol=1e-5, atol=1e-5)


def test_reconstruction_error_when_recomputed_in_numpy_then_agrees():
    """The map before the head is the mean of cosine and Euclidean distance over groups (Eq. 9), to 1e-5 of loops."""
    tokens, rebuilt = torch.randn(2, 3, 2, 16, 64, generator=torch.Generator().manual_seed(0)).unbind()

    error = _build()._reconstruction_error(tokens, rebuilt)

    seen, made = tokens.double().numpy(), rebuilt.double().numpy()
    expected = np.zeros((3, 16))
    for image, group, token in np.ndindex(3, 2, 16):
        one, other = seen[image, group, token], made[image, group, token]
        expected[image, token] += (1 - cosine(one, other) + np.sqrt(((one - other) ** 2).sum())) / 2 / 2
    np.testing.assert_allclose(error.numpy(), expected, rtol=1e-5, atol=1e-5)


def _run_head_slowly(head: nn.Sequential, residual: np.ndarray) -> np.ndarray:
    """Return logits `(4h, 4w)` of `(C, h, w)`: two steps that spread each place over 4 x 4, and one that sums."""
    x = residual
    for layer in (head[0], head[2]):
        kernel = array_of(layer.weight)  # (C, D, 4, 4)
        _, height, width = x.shape
        spread = np.zeros((kernel.shape[1], 2 * height + 2, 2 * width + 2))
        for row, column in np.ndindex(height, width):
            patch = np.tensordot(x[:, row, column], kernel, axes=1)
            spread[:, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += patch
        x = np.maximum(spread[:, 1:-1, 1:-1] + array_of(layer.bias)[:, None, None], 0)
    padded, kernel = np.pad(x, ((0, 0), (1, 1), (1, 1))), array_of(head[4].weight)[0]
    logits = np.empty(x.shape[1:])
    for row, column in np.ndindex(*logits.shape):
        logits[row, column] = (kernel * padded[:, row : row + 3, column : column + 3]).sum()
    return logits + array_of(head[4].bias)


@pytest.mark.parametrize("is_scaled", [False, True], ids=["as published", "scaled"])
def test_map_when_recomputed_in_numpy_then_agrees(is_scaled):
    """From the tapped layers to the score: what is rebuilt, Eq. 7's residual, the head, and Eq. 9, to 1e-5 of loops."""
    detector = _build(scale_distance=is_scaled)
    shake([*detector.learnable_parameters()], 0.1)

    with torch.no_grad():
        output = detector(_images(1))
        taps = [array_of(tap)[0] for tap in detector.backbone(_images(1))]

    targets, residual, apart = [np.mean(taps[:2], axis=0), np.mean(taps[2:], axis=0)], np.zeros((16, 64)), np.zeros(16)
    for seen, made in zip(targets, rebuild(detector, np.mean(taps, axis=0)), strict=True):
        for token, (one, other) in enumerate(zip(seen, made, strict=True)):
            direction, magnitude = 1 - cosine(one, other), np.sqrt(((one - other) ** 2).sum())
            residual[token] += direction * np.abs(one - other) / 2
            apart[token] += (direction + magnitude / (8 if is_scaled else 1)) / 2 / 2
    logits = _run_head_slowly(detector.seg_head, residual.T.reshape(64, 4, 4))
    of_head = 1 / (1 + np.exp(-resize(logits, (64, 64), align_corners=False)))
    expected = (resize(apart.reshape(4, 4), (64, 64), align_corners=True) + of_head) / 2
    np.testing.assert_allclose(output.anomaly_map[0].numpy(), expected, rtol=1e-5, atol=1e-5)
    assert float(output.score) == pytest.approx(top_mean(expected, 0.01), rel=1e-5)
    assert np.ptp(of_head) > 0.1  # the head says something


def test_zero_shot_map_when_recomputed_in_numpy_then_agrees():
    """Each token's distance to the prototypes, mixed by the softmax of its cosines to them, is what the map shows."""
    detector = _build(map_source="prototypes")
    shake(detector.learnable_parameters())

    with torch.no_grad():
        output = detector(_images(1))
        taps = detector.backbone(_images(1))

    fused = np.mean([array_of(tap)[0] for tap in taps], axis=0)
    prototypes, apart = draw_prototypes(detector, fused), []
    for token in fused:
        likeness = np.exp([cosine(token, prototype) for prototype in prototypes])
        apart.append(1 - cosine(token, likeness / likeness.sum() @ prototypes))
    expected = resize(np.reshape(apart, (4, 4)), (64, 64), align_corners=True)
    np.testing.assert_allclose(output.anomaly_map[0].numpy(), expected, rtol=0, atol=1e-5)
    assert float(output.score) == pytest.approx(top_mean(expected, 0.01), abs=1e-5)


def test_normal_loss_when_recomputed_in_numpy_then_agrees():
    """L_sm of both errors and a fifth of L_sc, of what each image's own prototypes rebuild and mix."""
    detector = _build(magnitude_weight=0.5)
    shake(detector.learnable_parameters(), 0.1)
    tokens = torch.randn(2, 2, 16, 64, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        terms = {name: float(value) for name, value in detector.loss(tokens, 0).items()}

    directions, errors, mixtures = [], [], []
    for targets in array_of(tokens):
        fused = targets.mean(axis=0)
        prototypes = draw_prototypes(detector, fused)
        likeness = np.exp([[cosine(token, prototype) for prototype in prototypes] for token in fused])
        mixture = likeness / likeness.sum(axis=1, keepdims=True) @ prototypes
        mixtures.append(1 - cosine(fused.ravel(), mixture.ravel()))
        for seen, made in zip(targets, rebuild(detector, fused), strict=True):
            directions.append(1 - cosine(seen.ravel(), made.ravel()))
            errors.append(np.mean((seen - made) ** 2))
    expected = {
        "direction": np.mean(directions),
        "magnitude": 0.5 * np.mean(errors),
        "coherence": 0.2 * np.mean(mixtures),
    }
    assert terms == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_dice_when_recomputed_in_numpy_then_agrees():
    """Twice the overlap over the sum of both, image by image (Eq. 8)."""
    predicted, drawn = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    masks = (drawn > 0.6).float()

    loss = _dice_loss(predicted, masks)

    shares = [
        (2 * (seen * mask).sum() + 1e-6) / (seen.sum() + mask.sum() + 1e-6)
        for seen, mask in zip(array_of(predicted), array_of(masks), strict=True)
    ]
    assert loss.item() == pytest.approx(1 - np.mean(shares), abs=1e-5)


def test_head_when_it_learns_then_from_planted_defects_alone_and_nothing_else_gets_a_gradient():
    """Its loss is the Dice loss of its map of the planted frames, and the branch before it is left alone."""
    detector = _build()
    images = _images()

    loss = detector.head_loss(images, 3)["dice"]
    loss.backward()

    planted, masks = detector._plant_defects(images, generator_of_step(detector.config.seed, 3))
    with torch.no_grad():
        tokens = detector.encode(planted)
        fused = tokens.mean(dim=1)
        residual = detector._residual(tokens, detector.rebuild(fused, detector.extract(fused)))
    logits = [_run_head_slowly(detector.seg_head, one) for one in array_of(residual)]
    maps = [1 / (1 + np.exp(-resize(one, (64, 64), align_corners=False))) for one in logits]
    shares = [
        (2 * (one * mask).sum() + 1e-6) / (one.sum() + mask.sum() + 1e-6)
        for one, mask in zip(maps, array_of(masks), strict=True)
    ]
    assert loss.item() == pytest.approx(1 - np.mean(shares), abs=1e-5)
    touched = {name for name, one in detector.named_parameters() if one.grad is not None}
    assert touched == {name for name, _ in detector.named_parameters() if name.startswith("seg_head.")}
    assert all(1 <= float(mask.sum()) < mask.numel() for mask in masks)


def test_mixture_when_compared_with_its_formula_then_weights_are_the_softmax_of_cosines():
    """Prototypes are mixed as they are, with weights that ignore all lengths."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 5, 4, generator=generator)
    prototypes = torch.randn(2, 3, 4, generator=generator)

    mixture = _mix_prototypes(7 * fused, prototypes)

    cosine = functional.cosine_similarity(fused[:, :, None], prototypes[:, None], dim=-1)
    expected = (cosine.softmax(dim=2)[..., None] * prototypes[:, None]).sum(dim=2)
    torch.testing.assert_close(mixture, expected)


def test_soft_coherence_is_one_distance_for_the_whole_image():
    """Tokens that are their own mixture cost nothing, and opposite ones cost two."""
    prototypes = torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]]])
    fused = torch.stack([torch.tensor([[1.0, 2.0], [2.0, 4.0]]), -torch.tensor([[1.0, 2.0], [1.0, 2.0]])])

    same = _soft_coherence_loss(torch.tensor([[[1.0, 2.0], [1.0, 2.0]]]), prototypes[:1])
    mixed = _soft_coherence_loss(fused, prototypes)

    assert same.item() == pytest.approx(0, abs=1e-6)
    assert mixed.item() == pytest.approx((1 - 3 / 10**0.5 + 2) / 2, abs=1e-6)  # (1 x 1 + 2 x 1) / (5^.5 2^.5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mined_magnitude_when_compared_with_its_formula_then_only_gradients_are_scaled(reduction):
    """The value is the plain squared error; a token's gradient carries (its error / the group's mean)^gamma."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(2, 2, 5, 3, generator=generator)
    plain = torch.randn(2, 2, 5, 3, generator=generator, requires_grad=True)
    mined = plain.detach().clone().requires_grad_()

    plain_loss = (targets - plain).square().mean() * (3 if reduction == "sum" else 1)
    plain_loss.backward()
    mined_loss = _mined_magnitude_loss(targets, mined, 3.0, reduction)
    mined_loss.backward()

    error = (targets - plain.detach()).square().mean(dim=-1)
    weight = torch.stack([(error[:, group] / error[:, group].mean()) ** 3 for group in (0, 1)], dim=1)
    torch.testing.assert_close(mined_loss, plain_loss)
    torch.testing.assert_close(mined.grad, plain.grad * weight[..., None])


def test_mined_terms_when_added_then_neither_weight_touches_the_other_gradient():
    """The gradient of the sum is the sum of the two gradients, each with its own weights."""
    generator = torch.Generator().manual_seed(0)
    targets, rebuilt = torch.randn(2, 2, 1, 5, 3, generator=generator).unbind()

    def gradient_of(*terms: int) -> Tensor:
        leaf = rebuilt.clone().requires_grad_()
        losses = (mined_direction_loss(targets, leaf, 3.0), _mined_magnitude_loss(targets, leaf, 3.0, "mean"))
        sum(losses[term] for term in terms).backward()
        return leaf.grad

    torch.testing.assert_close(gradient_of(0, 1), gradient_of(0) + gradient_of(1))


def test_residual_when_compared_with_its_formula_then_is_the_product_of_both_differences():
    """Each group's absolute difference is multiplied by its cosine distance, then groups are averaged (Eq. 7)."""
    detector = _build()
    tokens, rebuilt = torch.randn(2, 3, 2, 16, 64, generator=torch.Generator().manual_seed(0)).unbind()

    residual = detector._residual(tokens, rebuilt)

    distance = 1 - functional.cosine_similarity(tokens, rebuilt, dim=-1)
    expected = sum(distance[:, g, :, None] * (tokens - rebuilt)[:, g].abs() for g in (0, 1)) / 2
    torch.testing.assert_close(residual, expected.transpose(1, 2).unflatten(2, (4, 4)))


def test_dice_when_maps_equal_masks_then_is_zero_and_when_disjoint_one():
    """Images count alike, whatever the size of their masks."""
    masks = torch.zeros(2, 4, 4)
    masks[0, 0, 0] = masks[1, :2] = 1
    half_right = torch.stack([masks[0], 1 - masks[1]])

    assert _dice_loss(masks, masks).item() == pytest.approx(0, abs=1e-6)
    assert _dice_loss(half_right, masks).item() == pytest.approx(0.5, abs=1e-6)


def test_head_has_the_chosen_layers():
    """Two transposed convolutions double the grid each, one convolution makes one channel; 3.4 million in the paper."""
    head = _build().seg_head

    kinds = [type(layer) for layer in head]
    assert kinds == [nn.ConvTranspose2d, nn.ReLU, nn.ConvTranspose2d, nn.ReLU, nn.Conv2d]
    assert head(torch.zeros(2, 64, 4, 4)).shape == (2, 1, 16, 16)
    assert set(head.state_dict()) == {f"{index}.{kind}" for index in (0, 2, 4) for kind in ("weight", "bias")}


def test_map_is_the_mean_of_reconstruction_error_and_head_map():
    """With a head that answers 0 or 1 everywhere, the map is half of the error, and half of one more (Eq. 9)."""
    whole = _build()
    without = InpFormerPp(replace(_STAGED, map_source="reconstruction"))
    without.load_state_dict({key: value for key, value in whole.state_dict().items() if not key.startswith("seg_head")})
    without.backbone.is_loaded = True

    with torch.no_grad():
        error = without(_images()).anomaly_map
        maps = []
        for logit in (-1e4, 1e4):
            whole.seg_head[4].weight.zero_()
            whole.seg_head[4].bias.fill_(logit)
            maps.append(whole(_images()).anomaly_map)

    torch.testing.assert_close(maps[0], error / 2)
    torch.testing.assert_close(maps[1], error / 2 + 0.5)


def test_reconstruction_error_when_scaled_then_only_the_euclidean_part_shrinks():
    """The option divides by the root of the channel count and leaves the cosine alone."""
    tokens, rebuilt = torch.randn(2, 1, 2, 16, 64, generator=torch.Generator().manual_seed(0)).unbind()

    plain = _build()._reconstruction_error(tokens, rebuilt)
    scaled = _build(scale_distance=True)._reconstruction_error(tokens, rebuilt)

    euclidean = (tokens - rebuilt).norm(dim=-1).mean(dim=1)
    torch.testing.assert_close(plain - scaled, euclidean / 2 * (1 - 1 / 8))


def test_zero_shot_map_is_the_distance_to_the_mixture_and_needs_no_head():
    """The map's values are those of the soft distance, whatever decoder there is."""
    detector = _build(map_source="prototypes")
    detector.decoder = nn.ModuleList()

    with torch.no_grad():
        output = detector(_images())
        fused = detector.encode(_images()).mean(dim=1)
        mixture = _mix_prototypes(fused, detector.extract(fused))

    distance = 1 - functional.cosine_similarity(fused, mixture, dim=-1)
    assert detector.seg_head is None
    torch.testing.assert_close(output.anomaly_map[:, 0, 0], distance[:, 0])
    torch.testing.assert_close(output.anomaly_map[:, -1, -1], distance[:, -1])


def test_stages_when_staged_then_the_branch_comes_before_the_head_and_they_share_nothing():
    """The head can be trained on a finished branch, for example an imported one."""
    branch, head = _build().stages()

    assert (branch.name, head.name) == ("reconstruction", "segmentation head")
    assert not {id(one) for one in branch.parameters} & {id(one) for one in head.parameters}


@pytest.mark.parametrize("schedule", ["staged", "joint"])
def test_stages_when_the_map_needs_no_head_then_none_is_trained(schedule):
    """Neither time nor weights go into what nobody will see."""
    stages = _build(map_source="reconstruction", schedule=schedule).stages()

    assert [stage.name for stage in stages] == ["reconstruction"]


def test_joint_loss_when_followed_then_the_head_moves_nothing_of_the_branch():
    """The branch's gradient is that of the good frames alone: defects never reach it."""
    detector = make_detector("inp_former_pp-vit")
    branch = [value for name, value in detector.named_parameters() if value.requires_grad and "seg_head" not in name]

    joint = torch.autograd.grad(sum(detector.joint_loss(_images(), 3).values()), branch)
    alone = torch.autograd.grad(sum(detector.loss(detector.encode(_images()), 3).values()), branch)

    for one, other in zip(joint, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_planted_defects_when_the_step_changes_then_change():
    """The same frame teaches something new in each epoch, and a step can be repeated."""
    detector = _build()

    first, again, later = (detector.head_loss(_images(), step)["dice"].item() for step in (0, 0, 1))

    assert first == again
    assert first != later


def test_planted_defects_when_their_opacity_is_set_then_are_as_faint():
    """The configuration's range is the one that is drawn from."""
    images = _images(4)

    planted, masks = _build(defect_opacity=(0.1, 0.1))._plant_defects(images, torch.Generator().manual_seed(0))

    assert 0 < float((planted - images).abs().max()) <= 0.1 + 1e-6
    assert not (planted != images).any(dim=1)[masks == 0].any()


def test_labelled_defects_when_given_then_a_share_of_the_batch_learns_from_them():
    """Half of the frames show the donor's colour somewhere, and nothing of it lies outside the mask."""
    detector = _build(labelled_share=0.5)
    masks = torch.zeros(1, 64, 64)
    masks[0, 10:20, 30:50] = 1
    detector.keep_labelled_defects(torch.zeros(1, 3, 64, 64), masks)
    images = 0.5 + 0.5 * _images(4)

    planted, areas = detector._plant_defects(images, torch.Generator().manual_seed(0))

    assert (areas[:2].sum(dim=(1, 2)) == 200).all()
    assert (areas[2:].sum(dim=(1, 2)) != 200).all()
    torch.testing.assert_close(planted * (1 - areas[:, None]), images * (1 - areas[:, None]))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_labelled_defects_when_none_or_all_are_wanted_then_the_batch_stays_whole(share):
    """The share reaches from planted defects alone to real ones alone."""
    detector = _build(labelled_share=share)
    masks = torch.zeros(1, 64, 64)
    masks[0, 10:20, 30:50] = 1
    detector.keep_labelled_defects(_images(1), masks)

    planted, areas = detector._plant_defects(_images(3), torch.Generator().manual_seed(0))

    assert planted.shape == (3, 3, 64, 64)
    assert (areas.sum(dim=(1, 2)) == 200).all().item() == (share == 1)


def test_labelled_defects_are_no_part_of_the_detector():
    """Frames of a plant never travel in the weights."""
    detector = _build()
    before = set(detector.state_dict())

    detector.keep_labelled_defects(_images(1), torch.ones(1, 64, 64))

    assert set(detector.state_dict()) == before


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (torch.zeros(1, 3, 64, 65), torch.ones(1, 64, 65), "got"),
        (torch.zeros(2, 3, 64, 64), torch.ones(1, 64, 64), "masks of shape"),
        (torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64), "empty mask"),
    ],
    ids=["image size", "mask count", "empty mask"],
)
def test_labelled_defects_when_they_do_not_fit_then_are_refused(images, masks, message):
    """A wrong frame or mask is named before fitting."""
    with pytest.raises(ValueError, match=message):
        _build().keep_labelled_defects(images, masks)


def test_labelled_defects_when_no_head_learns_from_them_then_are_refused():
    """Nobody marks defects for a map that can't profit from them."""
    detector = InpFormerPp(replace(_STAGED, map_source="reconstruction"))

    with pytest.raises(ValueError, match="needs no head"):
        detector.keep_labelled_defects(_images(1), torch.ones(1, 64, 64))


def test_branch_has_the_names_of_inp_former():
    """A checkpoint of INP-Former fits the branch as it is; only the head is new."""
    own = {key for key in make_detector("inp_former_pp-vit").state_dict() if not key.startswith("seg_head.")}

    assert own == set(make_detector("inp_former-vit").state_dict())


def test_config_when_left_alone_then_holds_the_published_values():
    """The defaults are the paper's experiment as far as it is known."""
    config = InpFormerPpConfig()

    assert (config.backbone, config.image_size) == ("vit_base_patch14_reg4_dinov2", (392, 392))
    assert (config.prototypes, config.decoder_blocks, config.groups) == (6, 8, 2)
    assert (config.mining_exponent, config.coherence_weight, config.top_fraction) == (3.0, 0.2, 0.01)
    assert (config.recipe.learning_rate, config.recipe.epochs, config.recipe.batch_size) == (5e-4, 200, 16)
    assert (config.head_recipe.epochs, config.map_size, config.blur_sigma) == (100, None, None)
    assert (config.magnitude_weight, config.magnitude_reduction, config.scale_distance) == (1.0, "mean", False)
    assert (config.schedule, config.head_channels, config.defect_opacity) == ("staged", (256, 64), (0.2, 1.0))
