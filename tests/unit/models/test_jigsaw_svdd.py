"""What is Jigsaw-SVDD's own: the jigsaw and its draws, the encoder run two ways, banks, affinities and spread maps."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks.draws import generator_of_step
from models.jigsaw_svdd import (
    _LARGE,
    _RELATIONS,
    _SMALL,
    JigsawSvdd,
    JigsawSvddConfig,
    _cut_pieces,
    _draw_jigsaws,
    _draw_neighbours,
    _draw_pairs,
    _Encoder,
    _pairs_of_relations,
    _PatchEncoder,
    _RelationClassifier,
    _ResponseNorm,
    _RowSample,
    _select_coreset,
    _spread_matrix,
    merge_by_affinity,
    nearest_distances,
)
from tests.tiny_detectors import TINY
from training.fitting.optimisers import build_optimiser

_SIZE = (256, 256)
# Without a margin, as published, so that what a map is made of can be counted.
_PUBLISHED_BORDER = replace(TINY["jigsaw_svdd"], margin=0)
both_patches = pytest.mark.parametrize("patch", [_SMALL, _LARGE])


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _texture(count: int, size: tuple[int, int] = (192, 192), seed: int = 0) -> Tensor:
    """Draw frames of one product: an oblique gradient over the whole frame, fine stripes, a little noise."""
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    plain = 0.3 + 0.3 * rows / size[0] + 0.2 * columns / size[1] + 0.1 * torch.sin(columns * (2 * torch.pi / 6))
    return plain + 0.02 * torch.randn(count, 3, *size, generator=_generator(seed))


def _encoder(**changes: object) -> _Encoder:
    """Build a small encoder whose norms are not at their initial values, and that has all signs among them."""
    config = JigsawSvddConfig(encoder_channels=(16, 16, 8, 8, 8, 16), embedding_channels=16, hidden_channels=16)
    encoder = _Encoder(replace(config, **changes))
    generator = _generator(1)
    for module in encoder.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
    nn.init.zeros_(encoder.patches.norm.weight[3:4].data)
    return encoder


def _all_patches(images: Tensor, side: int, stride: int) -> Tensor:
    rows, columns = (range(0, length - side + 1, stride) for length in images.shape[2:])
    return torch.cat([images[:, :, r : r + side, c : c + side] for r in rows for c in columns])


def _gradients(count: int, seed: int = 0) -> Tensor:
    """Draw centred frames whose first two channels tell row and column."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 192), torch.linspace(-1, 1, 192), indexing="ij")
    plain = torch.stack((rows, columns, torch.zeros_like(rows)))
    return plain + 0.1 * torch.randn(count, 3, 192, 192, generator=_generator(seed))


def _descend(detector: JigsawSvdd, centred: Tensor, *, steps: int, learning_rate: float = 2e-3) -> None:
    descent = detector.stages()[1]
    optimiser = build_optimiser(replace(descent.recipe, learning_rate=learning_rate), descent.parameters)
    for step in range(steps):
        optimiser.zero_grad()
        sum(descent.loss(centred, step).values()).backward()
        optimiser.step()


def _fitted(frames: Tensor, *, steps: int = 0, **changes: object) -> JigsawSvdd:
    """Run the passes of a tiny detector, with as many steps of the descent between them as are wanted."""
    detector = JigsawSvdd(replace(_PUBLISHED_BORDER, **changes))
    images, _, patches = detector.stages()
    images.observe(frames)
    images.finish()
    _descend(detector, detector.encode(frames), steps=steps)
    for batch in frames.split(5):
        patches.observe(batch)
    patches.finish()
    return detector


def test_relations_when_counted_then_hold_each_of_36_pairs_once():
    """Twelve classes of ordered pairs, in the published order."""
    pairs, counts = _pairs_of_relations()

    listed = {tuple(pair) for own, count in zip(pairs.tolist(), counts.tolist(), strict=True) for pair in own[:count]}
    assert counts.tolist() == [6, 6, 3, 3, 4, 4, 2, 2, 2, 2, 1, 1]
    assert listed == {(a, b) for a in range(9) for b in range(a + 1, 9)}
    assert pairs[7, :2].tolist() == [[2, 3], [5, 6]]
    assert pairs[9, :2].tolist() == [[1, 6], [2, 7]]


def test_relations_when_many_are_drawn_then_classes_are_equally_frequent():
    """Chi-square of 12,000 draws stays below the bound of 11 degrees of freedom at one in a thousand."""
    _, _, classes = _draw_pairs(12_000, _SIZE, _LARGE, _generator())

    counts = torch.bincount(classes, minlength=12)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 31.3


@both_patches
def test_relations_when_drawn_then_no_piece_leaves_the_image_and_all_of_it_is_used(patch):
    """Nothing has to be clipped, which is what made labels contradict each other near borders."""
    corners, _, _ = _draw_jigsaws(20_000, _SIZE, patch, _generator())

    assert int(corners.min()) == 0
    assert corners.amax(dim=(0, 1)).tolist() == [256 - patch, 256 - patch]


@both_patches
def test_relations_when_drawn_then_displacements_are_those_of_their_classes(patch):
    """Along each axis the sign and the number of cells, none, one or two, are what the class says."""
    corners, _, classes = _draw_pairs(5000, _SIZE, patch, _generator())

    moved = (corners[:, 1] - corners[:, 0]) / patch
    cells = torch.bucketize(moved.abs(), torch.tensor([0.5, 1.25])) * moved.sign()
    assert torch.equal(cells.long(), torch.tensor(_RELATIONS)[classes])


@both_patches
def test_relations_when_the_middle_piece_is_drawn_then_stays_by_the_centre_on_both_axes(patch):
    """Piece 4 lies within K/32 of the centre, so its distance to a neighbour is 3/4 K to K - 1, give or take that."""
    corners, _, classes = _draw_pairs(20_000, _SIZE, patch, _generator())

    moved = (corners[:, 1] - corners[:, 0]).abs()
    one_cell = moved[classes == 4]  # 04, 15, 37 and 48
    reach = patch // 32
    assert one_cell.min(dim=0).values.tolist() == [3 * patch // 4 - reach] * 2
    assert one_cell.max(dim=0).values.tolist() == [patch - 1 + reach] * 2


@both_patches
def test_neighbours_when_drawn_then_are_apart_but_not_far(patch):
    """The SVDD pair is never one patch twice, at most K/32 apart along each axis, and inside the image."""
    corners = _draw_neighbours(1000, 5, _SIZE, patch, _generator())

    moved = (corners[:, 5:] - corners[:, :5]).flatten(0, 1)
    reach = patch // 32
    seen = {tuple(move) for move in moved.tolist()}
    steps = range(-reach, reach + 1)
    assert seen == {(y, x) for y in steps for x in steps} - {(0, 0)}
    assert int(corners.min()) == 0
    assert int(corners.max()) == 256 - patch


def test_cut_pieces_when_pixels_hold_their_place_then_pieces_begin_at_their_corners():
    """First pieces come before second ones, height before width."""
    rows, columns = torch.meshgrid(torch.arange(200), torch.arange(220), indexing="ij")
    images = torch.stack((rows, columns, torch.zeros_like(rows)))[None] + torch.tensor([0, 1000])[:, None, None, None]
    corners = torch.tensor([[[3, 5], [7, 11]], [[13, 17], [19, 23]]])

    pieces = _cut_pieces(images, corners, 32)

    assert pieces.shape == (4, 3, 32, 32)
    assert pieces[:, :2, 0, 0].tolist() == [[3, 5], [1013, 1017], [7, 11], [1019, 1023]]
    assert pieces[:, :2, 31, 1].tolist() == [[34, 6], [1044, 1018], [38, 12], [1050, 1024]]


def test_response_norm_equals_pytorchs():
    """The window written as a convolution changes nothing; 1e-6 is float32 summation order."""
    x = 30 * torch.randn(2, 16, 3, 4, generator=_generator())

    expected = functional.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=1)
    torch.testing.assert_close(_ResponseNorm(16)(x), expected, rtol=1e-6, atol=1e-6)


def test_patch_encoder_at_published_sizes_has_the_published_parameters():
    """3,886,720 for 32 pixels, 41,152 more for 64; 26,380 in each classifier, its fixed projection included."""
    config = JigsawSvddConfig()
    with torch.device("meta"):
        encoder = _Encoder(config)
        classifier = _RelationClassifier(64, 128, learn_projection=True)

    small = sum(parameter.numel() for parameter in encoder.patches.parameters())
    assert small == 3_886_720
    assert sum(parameter.numel() for parameter in encoder.parameters()) == small + 41_152
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 26_380


def test_patch_encoder_when_run_then_maps_have_the_published_sides():
    """32 pixels become 28, 14, 6, 3, 2 and in the end one place."""
    encoder = _PatchEncoder((8, 8, 8, 8, 8, 8), 16)
    sides = []
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: sides.append(output.shape[-1]))

    with torch.no_grad():
        embedded = encoder(torch.rand(3, 3, 32, 32))

    assert sides == [28, 14, 6, 6, 6, 2, 1]
    assert embedded.shape == (3, 16)
    assert float(embedded.abs().max()) < 1


def test_patch_encoder_when_new_then_each_octet_of_the_embedding_has_mean_zero_and_variance_one():
    """The last norm keeps an embedding from shrinking to zero, whatever the SVDD term wants."""
    encoder = JigsawSvdd(_PUBLISHED_BORDER).encoder.patches

    with torch.no_grad():
        octets = torch.atanh(encoder(torch.rand(6, 3, 32, 32)).double()).reshape(-1, 8)

    torch.testing.assert_close(octets.mean(dim=1), torch.zeros(6).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(octets.var(dim=1, correction=0), torch.ones(6).double(), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("stride", "large_stride", "size"),
    [(4, 16, (96, 128)), (8, 16, (192, 256)), (16, 32, (192, 256)), (32, 64, (192, 256))],
)
def test_grids_when_compared_with_patches_that_were_cut_out_then_agree(stride, large_stride, size):
    """What overlapping patches share is exact: flat areas, borders and all signs of the norm included, to 1e-5."""
    encoder = _encoder(small_stride=stride, large_stride=large_stride)
    images = 0.3 * torch.randn(1, 3, *size, generator=_generator()) + 0.5
    images[0, :, 20:60, 30:100] = 0.7

    with torch.no_grad():
        small, large = encoder.encode_grids(images)
        alone = encoder.encode_small(_all_patches(images, 32, stride))
        alone_large = encoder.encode_large(_all_patches(images, 64, large_stride))

    torch.testing.assert_close(small.permute(2, 3, 0, 1).reshape(alone.shape), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(large.permute(2, 3, 0, 1).reshape(alone_large.shape), alone_large, rtol=0, atol=1e-5)


def test_classifier_in_parity_mode_never_learns_its_last_weight():
    """It is a buffer with normalised columns in use; its bias and the layers before it learn."""
    fixed, free = (_RelationClassifier(8, 16, learn_projection=learns) for learns in (False, True))
    for classifier in (fixed, free):
        classifier.initialise(_generator())

    logits = [classifier(torch.rand(4, 8), torch.rand(4, 8)) for classifier in (fixed, free)]
    sum(one.square().sum() for one in logits).backward()

    assert "projection" in dict(fixed.named_buffers())
    assert fixed.projection.grad is None
    assert all(parameter.grad is not None for parameter in (*fixed.parameters(), *free.parameters()))
    assert "projection" in dict(free.named_parameters())


def test_classifier_when_the_projection_is_scaled_then_logits_stay():
    """Only the directions of the last weight's columns count."""
    classifier = _RelationClassifier(8, 16, learn_projection=False)
    classifier.initialise(_generator())
    first, second = torch.rand(2, 4, 8, generator=_generator())

    before = classifier(first, second)
    classifier.projection.mul_(7)

    torch.testing.assert_close(classifier(first, second), before)


def _affinity_in_numpy(distances: np.ndarray) -> list[float]:
    merged = []
    for row in distances.astype(np.float64):
        total = sum(max(d, 1e-8) for d in row)
        betas = [min(1 / (max(d, 1e-8) / total), 20.0) for d in row]
        weights = [math.exp(beta) for beta in betas]
        merged.append(sum(w * d for w, d in zip(weights, row, strict=True)) / sum(weights))
    return merged


def test_affinity_when_written_out_in_numpy_then_agrees():
    """Loops in float64, for five neighbours near, far, equal and at distance zero; to 1e-5."""
    distances = torch.rand(200, 5, generator=_generator()) * torch.logspace(-4, 1, 200)[:, None]
    distances[::7, 2] *= 1e-3
    distances[::11, 1] = 0
    distances[5] = 0

    merged = merge_by_affinity(distances)

    np.testing.assert_allclose(merged.numpy(), _affinity_in_numpy(distances.numpy()), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ((0.1, 0.5, 0.6, 0.7, 0.8), 0.100),
        ((2.0, 2.1, 2.2, 2.3, 2.4), 2.155),
        ((3.0, 3.0, 3.0, 3.0), 3.0),
        ((0.7,), 0.7),
        ((0.0, 0.5, 0.6, 0.7, 0.8), 0.0),
        ((0.0, 0.0), 0.0),
    ],
    ids=["one is close", "none is close", "all are equal", "one neighbour", "a perfect match", "perfect matches"],
)
def test_affinity_when_neighbours_are_given_then_the_merged_distance_is_known(distances, expected):
    """The published behaviour on published examples, and the corner cases that the code gets wrong."""
    merged = merge_by_affinity(torch.tensor([distances]))

    assert float(merged) == pytest.approx(expected, abs=5e-4)


def test_affinity_when_neighbours_change_places_then_the_merged_distance_stays_within_their_range():
    """The order means nothing, and no weight is negative."""
    distances = torch.rand(100, 5, generator=_generator())

    merged = merge_by_affinity(distances)

    torch.testing.assert_close(merge_by_affinity(distances.flip(1)), merged)
    assert (merged >= distances.amin(dim=1) - 1e-6).all()
    assert (merged <= distances.amax(dim=1) + 1e-6).all()


def test_affinity_when_all_distances_are_scaled_then_so_is_the_merged_one():
    """Weights depend on ratios only, so farther means higher."""
    distances = torch.rand(100, 5, generator=_generator()) + 0.01

    torch.testing.assert_close(merge_by_affinity(3 * distances), 3 * merge_by_affinity(distances))


@pytest.mark.parametrize("offset", [0, 100], ids=["around zero", "close together far from zero"])
def test_nearest_distances_when_written_out_in_numpy_then_agree(offset):
    """Loops in float64; to 1e-5, at far and at tiny distances, wherever the bank lies."""
    bank = offset + torch.rand(40, 16, generator=_generator()) * 2 - 1
    queries = torch.cat((offset + torch.rand(20, 16, generator=_generator(1)) * 2 - 1, bank[:5] + 1e-4))

    distances = nearest_distances(queries, bank, 3)

    rows, known = queries.double().numpy(), bank.double().numpy()
    expected = [sorted(math.sqrt(sum((a - b) ** 2)) for b in known)[:3] for a in rows]
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_svdd_term_when_written_out_in_numpy_then_is_the_weighted_mean_of_plain_norms():
    """Not squared, no centre: the mean distance between two embeddings of neighbours; to 1e-5."""
    detector = _fitted(_texture(4), compactness_weight=0.25, colour_noise=0.0, pixel_noise=0.0)
    centred = detector.encode(_texture(4))
    embedded = []
    embed = detector.encoder.encode_small
    detector.encoder.encode_small = lambda patches: embedded.append(embed(patches)) or embedded[-1]

    term = detector.loss(centred, 3)["compactness_small"]

    pairs = embedded[1].detach().double().numpy().reshape(2, 4, 8)
    expected = sum(math.sqrt(sum((a - b) ** 2)) for a, b in zip(*pairs, strict=True)) / 4
    assert float(term.detach()) == pytest.approx(0.25 * expected, rel=1e-5)


@pytest.mark.parametrize("learns", [False, True], ids=["as published", "learnt projection"])
def test_relation_term_when_written_out_in_numpy_then_is_the_cross_entropy_of_the_difference(learns):
    """Two hidden layers of the difference, a last weight of columns of length one, cross-entropy; to 1e-5."""
    detector = _fitted(_texture(4), learn_projection=learns, colour_noise=0.0, pixel_noise=0.0)
    centred = detector.encode(_texture(4))
    embedded = []
    embed = detector.encoder.encode_large
    detector.encoder.encode_large = lambda patches: embedded.append(embed(patches)) or embedded[-1]

    term = detector.loss(centred, 3)["relation_large"]

    _, _, classes = _draw_pairs(4, (192, 192), _LARGE, generator_of_step(detector.config.seed, 3))
    state = {name: value.detach().double().numpy() for name, value in detector.large_classifier.state_dict().items()}
    first, second = embedded[0].detach().double().numpy().reshape(2, 4, -1)
    weight = state["projection"] / np.sqrt((state["projection"] ** 2).sum(axis=0))
    expected = 0.0
    for one, other, relation in zip(first, second, classes.tolist(), strict=True):
        hidden = one - other
        for layer in ("hidden.0", "hidden.2"):
            hidden = state[f"{layer}.weight"] @ hidden + state[f"{layer}.bias"]
            hidden = np.where(hidden > 0, hidden, 0.1 * hidden)
        logits = weight @ hidden + state["bias"]
        expected += (math.log(np.exp(logits).sum()) - logits[relation]) / 4
    assert float(term.detach()) == pytest.approx(expected, abs=1e-5)


def test_svdd_term_when_several_pairs_are_asked_for_then_is_their_mean_over_frames_with_pairs_of_their_own():
    """Three pairs of each frame: each pair lies in one frame, a pixel apart, and counts alike."""
    detector = _fitted(_texture(4), neighbour_pairs=3, compactness_weight=1.0, colour_noise=0.0, pixel_noise=0.0)
    seen, embedded = [], []
    embed = detector.encoder.encode_small
    detector.encoder.encode_small = lambda patches: (
        seen.append(patches) or embedded.append(embed(patches)) or embedded[-1]
    )

    frames = 0.1 * torch.arange(4.0)[:, None, None, None].expand(4, 3, 192, 192)
    term = detector.loss(frames, 3)["compactness_small"]

    first, second = seen[1].mean(dim=(1, 2, 3)).chunk(2)
    assert sorted(first.tolist()) == pytest.approx(sorted(3 * [0.0, 0.1, 0.2, 0.3]))
    assert torch.equal(first, second)
    ours, theirs = embedded[1].detach().chunk(2)
    assert float(term.detach()) == pytest.approx(float((ours - theirs).norm(dim=1).mean()))


def test_brightness_when_changed_then_each_neighbour_is_shifted_as_a_whole_and_apart_from_the_other():
    """All values of a patch move alike, by a draw of its own; the jigsaw's pieces are left as they are."""
    loud, quiet = (_fitted(_texture(4), brightness_noise=level) for level in (0.5, 0.0))
    centred = quiet.encode(_texture(4))
    seen = {}
    for name, detector in (("loud", loud), ("quiet", quiet)):
        embed = detector.encoder.encode_large
        detector.encoder.encode_large = lambda x, name=name, embed=embed: (
            seen.setdefault(name, []).append(x) or embed(x)
        )
        with torch.no_grad():
            detector.loss(centred, 3)

    shifts = seen["loud"][1] - seen["quiet"][1]
    assert torch.allclose(shifts, shifts[:, :1, :1, :1].expand_as(shifts), atol=1e-6)
    assert len(shifts[:, 0, 0, 0].unique()) == len(shifts) == 8
    assert 0.1 < float(shifts[:, 0, 0, 0].std()) < 1.5
    assert torch.equal(seen["loud"][0], seen["quiet"][0])


def test_large_pieces_when_a_share_is_asked_for_then_are_cut_out_of_that_many_frames():
    """A quarter of eight frames shows the 64-pixel level its nine pieces and its neighbours; all show the other."""
    detector = _fitted(_texture(8), pairs="all", large_share=0.25)
    seen = {}
    for name in ("encode_small", "encode_large"):
        embed = getattr(detector.encoder, name)
        setattr(
            detector.encoder, name, lambda x, name=name, embed=embed: seen.setdefault(name, []).append(x) or embed(x)
        )

    with torch.no_grad():
        detector.loss(detector.encode(_texture(8)), 3)

    assert [len(pieces) for pieces in seen["encode_large"]] == [9 * 2, 2 * 2]
    assert [len(pieces) for pieces in seen["encode_small"]] == [9 * 8, 2 * 8]


def test_noise_when_added_then_is_for_the_jigsaw_alone():
    """A colour shift for each channel and noise for each value; neighbours of the SVDD term are seen as they are."""
    loud, quiet = (_fitted(_texture(4), colour_noise=level, pixel_noise=level) for level in (0.5, 0.0))
    centred = quiet.encode(_texture(4))

    first, second = loud.loss(centred, 3), quiet.loss(centred, 3)

    assert all(torch.equal(first[name], second[name]) for name in ("compactness_small", "compactness_large"))
    assert all(not torch.equal(first[name], second[name]) for name in ("relation_small", "relation_large"))


def test_spread_when_all_patches_score_alike_then_the_map_is_flat():
    """Sum over covering patches divided by their number; at every published stride the whole image is covered."""
    for patch, stride in ((64, 16), (32, 4), (32, 8), (32, 16)):
        matrix = _spread_matrix(256, patch, stride)

        torch.testing.assert_close(matrix.sum(dim=1), torch.ones(256))


def test_spread_when_one_patch_is_hot_then_lights_its_own_pixels_with_the_right_mean():
    """Each pixel of the patch gets its share of all patches that cover it, and no other pixel anything."""
    matrix = _spread_matrix(256, 32, 8)
    scores = torch.zeros(29, 29)
    scores[5, 0] = 12.0

    spread = matrix @ scores @ matrix.T

    counts = functional.conv_transpose2d(torch.ones(1, 1, 29, 29), torch.ones(1, 1, 32, 32), stride=8)[0, 0]
    expected = torch.zeros(256, 256)
    expected[40:72, 0:32] = 12.0 / counts[40:72, 0:32]
    torch.testing.assert_close(spread, expected)


def test_margin_when_given_then_each_pixel_lies_under_as_many_patches_and_the_middle_stays():
    """Mirrored frames change the map near the border alone; there it is the mean of as many patches as elsewhere."""
    frames = _texture(4)
    plain = _fitted(frames)
    mirrored = _fitted(frames, margin=64)
    mirrored.load_state_dict(plain.state_dict())

    with torch.no_grad():
        maps = [detector(_texture(2, seed=5)).anomaly_map for detector in (plain, mirrored)]

    for axis, (patch, stride) in itertools.product(("rows", "columns"), ((_SMALL, 16), (_LARGE, 32))):
        covering = (mirrored.get_buffer(f"spread_{axis}_{patch}") > 0).sum(dim=1)
        assert covering.unique().tolist() == [patch // stride]
    inner = slice(64, -64)  # a large patch
    torch.testing.assert_close(maps[0][:, inner, inner], maps[1][:, inner, inner], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(maps[0][:, :16, :16], maps[1][:, :16, :16], rtol=1e-2)


def test_row_sample_when_more_rows_come_than_it_may_keep_then_is_even_over_all():
    """Early and late rows have the same chance, and the answer follows from the seed."""
    samples = [_RowSample(200, 3) for _ in range(2)]
    for sample in samples:
        for start in range(0, 2000, 50):
            sample.add(torch.arange(start, start + 50.0)[:, None])

    first, second = (sample.rows()[:, 0] for sample in samples)

    assert len(first) == 200
    assert torch.equal(first, second)
    assert (first.diff() > 0).all()
    assert 60 < int((first < 1000).sum()) < 140


@pytest.mark.parametrize("offset", [0, 1000], ids=["around zero", "close together far from zero"])
def test_coreset_when_chosen_then_each_row_is_the_farthest_from_those_before(offset):
    """The greedy rule, written out in loops."""
    rows = offset + torch.rand(60, 4, generator=_generator())

    chosen = _select_coreset(rows, 10, seed=2)

    picked = [int((rows == chosen[0]).all(dim=1).nonzero())]
    for _ in range(9):
        gaps = [min(float((row - rows[one]).double().norm()) for one in picked) for row in rows]
        picked.append(gaps.index(max(gaps)))
    assert torch.equal(chosen, rows[picked])
    assert torch.equal(_select_coreset(rows, None, seed=2), rows)
    assert torch.equal(_select_coreset(rows, 60, seed=2), rows)


def test_banks_when_filled_then_hold_all_patches_or_as_many_as_allowed():
    """The full bank has a row for each patch of each frame; a bound is kept for each size of patches."""
    full, bounded = _fitted(_texture(3), bank_rows=None), _fitted(_texture(3), bank_rows=30)

    assert full.small_bank.shape == (3 * 11 * 11, 8)
    assert full.large_bank.shape == (3 * 5 * 5, 8)
    assert bounded.small_bank.shape == bounded.large_bank.shape == (30, 8)
    assert full.small_bank.dtype == torch.float32


def test_banks_when_a_frame_of_theirs_is_judged_then_its_score_is_all_but_zero():
    """A known frame finds itself, so only frames that were held out can say what good parts score."""
    frames = _texture(6)
    detector = _fitted(frames[:5], bank_rows=None)

    with torch.no_grad():
        scores = detector(frames).score

    assert scores[:5].max() < 1e-4
    assert scores[5] > 10 * scores[:5].max()


@pytest.mark.parametrize("finish", ["finish_mean_image", "finish_banks"], ids=["no mean image", "no good patches"])
def test_pass_when_no_frames_were_observed_then_refuses(finish):
    """An empty folder never leaves half-made statistics."""
    with pytest.raises(RuntimeError, match="no frames"):
        getattr(JigsawSvdd(_PUBLISHED_BORDER), finish)()


def test_encode_when_the_mean_image_is_measured_then_takes_it_off_pixel_by_pixel():
    """No deviation and no constants of other data: images less the mean of the good ones."""
    frames = _texture(4)
    detector = _fitted(frames)

    centred = detector.encode(frames)

    torch.testing.assert_close(centred, frames - frames.mean(dim=0))


def test_map_when_one_level_sees_nothing_then_the_product_is_zero():
    """Both sizes of patches must find a place strange."""
    detector = _fitted(_texture(3), bank_rows=None)
    strange = torch.rand(1, 3, 192, 192, generator=_generator())
    with torch.no_grad():
        known = detector.encoder.encode_grids(detector.encode(strange))[1].permute(0, 2, 3, 1).reshape(-1, 8)
        before = detector(strange).score
        detector.large_bank = known.repeat_interleave(3, dim=0)

        after = detector(strange).score

    assert float(after) < 0.05 * float(before)


def test_descent_when_run_briefly_then_tells_relations_and_draws_neighbours_together():
    """A few steps on large gradients: far better than one in twelve on new frames, and neighbours come closer."""
    settings = {"pairs": "all", "embedding_channels": 16, "hidden_channels": 32, "compactness_weight": 0.3}
    detector = JigsawSvdd(replace(_PUBLISHED_BORDER, **settings))
    frames = _gradients(3)
    corners, _, classes = _draw_pairs(64, (192, 192), _LARGE, _generator())
    pieces = _cut_pieces(_gradients(64, seed=1), corners, _LARGE)
    before = detector.loss(frames, 0)["compactness_small"]

    _descend(detector, frames, steps=25, learning_rate=5e-3)
    with torch.no_grad():
        first, second = detector.encoder.encode_large(pieces).chunk(2)
        right = (detector.large_classifier(first, second).argmax(dim=1) == classes).float().mean()

    assert float(right) > 2 / 12
    assert detector.loss(frames, 0)["compactness_small"] < before


def test_pairs_when_all_are_learnt_then_the_loss_is_the_balanced_mean_over_36():
    """Each class counts a twelfth, whatever the number of its pairs, so that the expectation is that of one draw."""
    detector = _fitted(_texture(2), pairs="all", colour_noise=0.0, pixel_noise=0.0)
    centred = detector.encode(_texture(2))
    seen = []
    embed = detector.encoder.encode_large
    detector.encoder.encode_large = lambda patches: seen.append(embed(patches)) or seen[-1]

    with torch.no_grad():
        term = detector.loss(centred, 3)["relation_large"]
        pieces = seen[0].reshape(9, 2, -1)
        expected = 0.0
        pairs, counts = _pairs_of_relations()
        for relation, count in enumerate(counts.tolist()):
            for first, second in pairs[relation, :count].tolist():
                logits = detector.large_classifier(pieces[first], pieces[second]).double()
                expected -= float(torch.log_softmax(logits, dim=1)[:, relation].mean()) / count / 12

    assert float(term) == pytest.approx(expected, rel=1e-5)


def test_planted_patch_when_judged_then_scores_above_its_clean_twin_and_is_found():
    """The map's maximum falls into the foreign patch, grown by 16 pixels."""
    detector = _fitted(_texture(6), steps=5)
    clean = _texture(3, seed=1)
    planted = clean.clone()
    planted[:, :, 80:112, 48:80] = clean[:, :, 80:112, 48:80].transpose(2, 3)

    with torch.no_grad():
        good, bad = detector(clean), detector(planted)

    places = bad.anomaly_map.flatten(1).argmax(dim=1)
    rows, columns = places // 192, places % 192
    assert (bad.score > good.score).all()
    assert ((rows >= 64) & (rows < 128) & (columns >= 32) & (columns < 96)).all()


def test_initial_values_when_the_seed_is_the_same_then_are_the_same():
    """A run is repeatable from its configuration alone, whatever was drawn before."""
    first, again, other = (JigsawSvdd(replace(_PUBLISHED_BORDER, seed=seed)).state_dict() for seed in (1, 1, 2))

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.mixing.weight"], other["encoder.mixing.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (192, 160)}, "190 pixels"),
        ({"small_stride": 6}, "small_stride must be"),
        ({"small_stride": 64, "large_stride": 64}, "small_stride must be"),
        ({"small_stride": 16, "large_stride": 24}, "small_stride must be"),
        ({"large_stride": 128}, "small_stride must be"),
        ({"image_size": (200, 192)}, "end at the border"),
        ({"encoder_channels": (8, 8, 8, 8, 8, 12)}, "multiples of 8"),
        ({"embedding_channels": 0}, "multiples of 8"),
        ({"neighbours": 26}, "between 1 and 25"),
        ({"neighbours": 0}, "between 1 and 25"),
        ({"neighbours": 3, "bank_rows": 2}, "between 1 and 2"),
        ({"compactness_weight": -1.0}, "compactness_weight"),
        ({"brightness_noise": -0.1}, "brightness_noise"),
        ({"margin": 24}, "margin"),
        ({"margin": 192}, "margin"),
        ({"margin": -16}, "margin"),
        ({"neighbour_pairs": 0}, "neighbour_pairs"),
        ({"large_share": 0.0}, "large_share"),
    ],
)
def test_detector_when_the_configuration_contradicts_itself_then_says_where(changes, message):
    """Impossible combinations are refused before any frame is read."""
    with pytest.raises(ValueError, match=message):
        JigsawSvdd(replace(_PUBLISHED_BORDER, **changes))


def test_config_when_left_alone_then_holds_the_published_values():
    """The defaults are those of the authors' code; what it leaves open is what this project chose."""
    config = JigsawSvddConfig()

    assert config.encoder_channels == (96, 256, 384, 384, 256, 128)
    assert (config.embedding_channels, config.hidden_channels, config.image_size) == (64, 128, (256, 256))
    assert (config.small_stride, config.large_stride, config.neighbours) == (4, 16, 5)
    assert (config.colour_noise, config.pixel_noise, config.compactness_weight) == (0.02, 0.02, 1e-3)
    assert (config.pairs, config.large_share) == ("one", 1.0)
    assert (config.neighbour_pairs, config.brightness_noise, config.margin) == (1, 0.0, 0)
    assert (config.recipe.optimiser, config.recipe.learning_rate, config.recipe.final_learning_rate) == (
        *("adam", 1e-4),
        1e-4,
    )
    assert (config.recipe.batch_size, config.recipe.epochs, config.recipe.weight_decay) == (64, 40_000, 0.0)
