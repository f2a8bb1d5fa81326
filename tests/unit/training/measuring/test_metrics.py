"""Promises of the field's figures, held against scikit-learn and against plain loops over thresholds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn import metrics as reference

from training.measuring.bootstrap import PerImage, bootstrap, histograms, interval, one_hot
from training.measuring.metrics import (
    Curve,
    Metric,
    aupro,
    auroc,
    average_precision,
    f1_max,
    image_metrics,
    pixel_auroc,
    pixel_average_precision,
    pixel_curves,
    pixel_f1_max,
    pixel_metrics,
    precision_recall_curve,
    roc_curve,
    saturation_area,
    seg_f1,
    spro,
)
from training.measuring.ranking import ScoreNotFinite, pool_pixels

# Few distinct values, so that ties inside and across the classes are common.
_TIED_SCORES = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, width=32))


@st.composite
def _labelled_scores(draw):
    labels = [0, 1, *draw(st.lists(st.integers(0, 1), max_size=30))]
    scores = draw(st.lists(_TIED_SCORES, min_size=len(labels), max_size=len(labels)))
    return np.array(scores), np.array(labels)


@st.composite
def _maps_and_masks(draw):
    images = draw(st.integers(1, 3))
    pixels = st.lists(st.integers(-3, 3), min_size=20, max_size=20)
    bits = st.lists(st.booleans(), min_size=20, max_size=20)
    maps = [np.array(draw(pixels), np.float32).reshape(4, 5) for _ in range(images)]
    masks = [np.array(draw(bits), bool).reshape(4, 5) for _ in range(images)]
    masks[0][0, 0], masks[0][3, 4] = True, False
    return maps, masks


def _reference_area(points, limit):
    """Integrate `(x, y)` nodes up to the limit, one trapezoid after the other."""
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)  # noqa: PLW2901 -- the last trapezoid is cut
            x1 = limit  # noqa: PLW2901 -- the last trapezoid is cut
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def _reference_overlap(maps, regions_of_image, free_of_image, limit, saturations_of_image=None):
    """Compute AUPRO or sPRO by lowering a threshold through every distinct value."""
    normal = sum(int(free.sum()) for free in free_of_image)
    points = [(0.0, 0.0)]
    for threshold in np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]:
        false = sum(int((m >= threshold)[free].sum()) for m, free in zip(maps, free_of_image, strict=True))
        shares = []
        for index, regions in enumerate(regions_of_image):
            for number, region in enumerate(regions):
                enough = int(region.sum()) if saturations_of_image is None else saturations_of_image[index][number]
                enough = min(enough, int(region.sum()))
                shares.append(min(int((maps[index] >= threshold)[region].sum()) / enough, 1.0))
        points.append((false / normal, sum(shares) / len(shares)))
    return _reference_area([*points, (1.0, 1.0)], limit)


def _components(mask):
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    return [labels == number for number in range(1, count + 1)]


@given(_labelled_scores())
def test_image_figures_with_ties_equal_scikit_learn(case):
    """AUROC, AP and F1-max equal an independent implementation, whatever ties there are."""
    scores, labels = case
    precision, recall, _ = reference.precision_recall_curve(labels, scores)
    with np.errstate(invalid="ignore"):
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))

    found = [auroc(scores, labels).value, average_precision(scores, labels).value, f1_max(scores, labels).value]

    expected = [reference.roc_auc_score(labels, scores), reference.average_precision_score(labels, scores), f1.max()]
    assert found == pytest.approx(expected, abs=1e-12)


@given(_maps_and_masks())
def test_pixel_figures_with_ties_equal_scikit_learn_on_pooled_pixels(case):
    """Pixel figures are the image figures of all pixels in one pool."""
    maps, masks = case
    scores, labels = np.concatenate([m.ravel() for m in maps]), np.concatenate([m.ravel() for m in masks])

    found = [pixel_auroc(maps, masks).value, pixel_average_precision(maps, masks).value]

    expected = [reference.roc_auc_score(labels, scores), reference.average_precision_score(labels, scores)]
    assert found == pytest.approx(expected, abs=1e-12)
    assert pixel_f1_max(maps, masks).value == pytest.approx(f1_max(scores, labels).value, abs=1e-12)


@given(_maps_and_masks(), st.sampled_from([0.05, 0.3, 0.77, 1.0]))
def test_aupro_with_ties_equals_a_loop_over_all_thresholds(case, limit):
    """The single sort gives the area that a plain loop over every threshold gives."""
    maps, masks = case
    expected = _reference_overlap(maps, [_components(m) for m in masks], [~m for m in masks], limit)

    found = aupro(maps, masks, limit)

    assert found.value == pytest.approx(expected, abs=1e-9)


@settings(max_examples=10)
@given(_maps_and_masks(), st.lists(st.booleans(), min_size=20, max_size=20), st.sampled_from([0.05, 0.3, 1.0]))
def test_pixel_figures_inside_a_region_equal_plain_loops_over_its_pixels(case, bits, limit):
    """What is not inspected is neither a false alarm nor a missed defect, and a cut defect is its part inside."""
    maps, masks = case
    region = np.array(bits).reshape(4, 5)
    region[0, 0] = region[3, 4] = True
    inspected = [region, *[np.roll(region, i, axis=0) for i in range(1, len(maps))]]
    scores, labels = (
        np.concatenate([one[seen] for one, seen in zip(arrays, inspected, strict=True)]) for arrays in (maps, masks)
    )
    free = [~mask & seen for mask, seen in zip(masks, inspected, strict=True)]
    cut = [[part & seen for part in _components(mask)] for mask, seen in zip(masks, inspected, strict=True)]
    inside = [[part for part in parts if part.any()] for parts in cut]

    found = pixel_metrics(maps, masks, np.ones(len(maps)), [limit], inspected=inspected)

    values = [metric.value for metric in found.values()]
    assert values[:2] == pytest.approx(
        [reference.roc_auc_score(labels, scores), reference.average_precision_score(labels, scores)], abs=1e-12
    )
    assert values[2] == pytest.approx(f1_max(scores, labels).value, abs=1e-12)
    assert values[3] == pytest.approx(_reference_overlap(maps, inside, free, limit), abs=1e-9)
    if len(maps) == 1:  # then a resample is the image itself, and has its figures
        per_image = histograms(pool_pixels(maps, masks, inspected), maps, masks, inspected)
        draws = bootstrap(per_image, np.ones(1, bool), seed=0, limits=[limit])
        assert draws.min(axis=0) == pytest.approx(values, abs=1e-9) == draws.max(axis=0)


@given(
    *(_maps_and_masks(), st.integers(1, 25), st.integers(1, 25), st.sampled_from([0.05, 0.3, 1.0])),
    *(st.lists(st.booleans(), min_size=20, max_size=20), st.booleans()),
)
def test_spro_with_overlapping_channels_equals_a_loop_over_all_thresholds(
    case, first, second, limit, bits, is_all_inspected
):
    """Saturation, pixels shared by two channels and pixels that are not inspected count as in the plain loop."""
    maps, masks = case
    region = np.array(bits).reshape(4, 5) | is_all_inspected
    region[0, 0] = True  # where a defect is marked
    shifted = [np.roll(mask, 1, axis=1) for mask in masks]
    channels = [[c for c in pair if c.any()] for pair in zip(masks, shifted, strict=True)]
    saturations = [[first, second][: len(pair)] for pair in channels]
    free = [~(mask | other) & region for mask, other in zip(masks, shifted, strict=True)]
    if not any(f.any() for f in free):
        return

    found = spro(maps, channels, saturations, limit, inspected=None if is_all_inspected else [region] * len(maps))

    seen = [
        [(c & region, enough) for c, enough in zip(*image, strict=True) if (c & region).any()]
        for image in zip(channels, saturations, strict=True)
    ]
    cut, enough = ([[pair[place] for pair in image] for image in seen] for place in (0, 1))
    assert found.value == pytest.approx(_reference_overlap(maps, cut, free, limit, enough), abs=1e-9)


_GOOD_MAPS = [np.array([[0, 2], [0, 2]], np.float32), np.array([[0, 2, 0, 2]], np.float32)]


def test_seg_f1_of_a_small_map_equals_the_count_by_hand():
    """Good pixels of mean 1 and deviation 1 put the threshold at 4, and a pixel there is predicted."""
    maps = [np.array([[9, 4, 3], [4, 0, 0]], np.float32), np.array([[5, 0]], np.float32), np.zeros((1, 2), np.float32)]
    masks = [np.array([[True, True, True], [False] * 3]), np.zeros((1, 2), bool), np.zeros((1, 2), bool)]
    # Predicted: 9, 4, 4 and 5; two of them are defective, and of three defective pixels one is missed.

    found = seg_f1(maps, masks, _GOOD_MAPS)
    # An even frame at the end makes neither all frames even nor its value the threshold, which is 3.1 now.
    beside_an_even_frame = seg_f1(maps, masks, [*_GOOD_MAPS, np.ones((2, 4), np.float32)])

    assert found == beside_an_even_frame == Metric(2 * 2 / (2 * 2 + 2 + 1))


@given(_maps_and_masks(), st.lists(st.booleans(), min_size=20, max_size=20), st.integers(0, 2**32 - 1), st.booleans())
def test_seg_f1_equals_scikit_learn_on_pooled_pixels(case, bits, seed, is_all_inspected):
    """One threshold over all pixels is what numpy and scikit-learn make of one pool, of the inspected region alone."""
    maps, masks = case
    good_maps = list(np.random.default_rng(seed).normal(100, 0.5, (3, 4, 5)).astype(np.float32) - 100)
    region = np.ones((4, 5), bool) if is_all_inspected else np.array(bits).reshape(4, 5)
    region[0, 0] = region[3, 4] = True
    good, scores, labels = (np.concatenate([one[region] for one in arrays]) for arrays in (good_maps, maps, masks))
    threshold = good.astype(np.float64).mean() + 3 * good.astype(np.float64).std()
    seen = {} if is_all_inspected else {"inspected": [region] * len(maps), "good_inspected": [region] * 3}

    found = seg_f1(iter(maps), iter(masks), iter(good_maps), **seen)

    assert found.value == pytest.approx(reference.f1_score(labels, scores >= threshold, zero_division=0), abs=1e-12)


def test_seg_f1_of_maps_far_from_zero_keeps_the_deviation():
    """Small deviations about a large mean, as of scores without a unit, are not lost in rounding."""
    good_maps = [np.float32(4096) + good for good in _GOOD_MAPS]
    anomaly_map, mask = np.array([[4099, 4100]], np.float32), np.array([[False, True]])

    found = seg_f1([anomaly_map], [mask], good_maps)

    assert found == Metric(1.0)


@pytest.mark.parametrize(
    ("values", "marks", "good_maps", "value", "reason"),
    [
        ([0, 9], [0, 0], _GOOD_MAPS, None, "no mask marks a region"),
        ([0, 9], [1, 1], _GOOD_MAPS, None, "masks mark every pixel"),
        ([0, 9], [0, 1], [], None, "there is no held-out good frame"),
        ([0, 3], [0, 1], _GOOD_MAPS, 0.0, None),
        ([9, 9], [0, 1], _GOOD_MAPS, 2 / 3, "degenerate: all scores"),
        ([0.1, 9], [0, 1], [np.full((7, 7), 0.1, np.float32)], 2 / 3, "degenerate: all pixels of the held-out"),
    ],
    ids=["no anomalous", "no normal", "no good", "nothing found", "equal scores", "equal good pixels"],
)
def test_seg_f1_where_it_is_not_defined_or_says_little_has_a_reason(values, marks, good_maps, value, reason):
    """A missing class or threshold gives no number, equal values a warning, and finding nothing is a plain 0."""
    found = seg_f1([np.array([values], np.float32)], [np.array([marks], bool)], good_maps)

    assert found.value == (value if value is None else pytest.approx(value, abs=1e-12))
    assert found.reason is None if reason is None else found.reason.startswith(reason)


def test_seg_f1_of_a_good_map_that_is_not_finite_is_refused():
    """No threshold is made of NaN."""
    blank = np.zeros((1, 1), np.float32)

    with pytest.raises(ScoreNotFinite, match="image 1"):
        seg_f1([blank], [np.ones((1, 1), bool)], [blank, np.full((1, 1), np.nan, np.float32)])


def test_aupro_of_a_four_by_four_map_equals_the_sum_by_hand():
    """The hand-computed example holds."""
    anomaly_map = np.array([[9, 8, 0, 0], [1, 7, 0, 0], [0, 0, 0, 0], [0, 0, 0, 6]], np.float32)
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = mask[1, 0] = mask[3, 3] = True
    # Regions {9, 1} and {6}, 13 normal pixels.
    # Nodes: (0, 0), (0, .25), (1/13, .25), (2/13, .25), (2/13, .75), (2/13, 1), (1, 1).
    expected = (2 / 13 * 0.25 + (0.3 - 2 / 13) * 1.0) / 0.3

    found = aupro([anomaly_map], [mask])

    assert found.value == pytest.approx(expected, abs=1e-12)


def test_every_figure_of_a_perfect_map_is_one():
    """A map that separates the classes reaches 1 in each figure."""
    mask = np.zeros((8, 8), bool)
    mask[2:4, 2:5] = True
    maps, masks = [mask.astype(np.float32), np.zeros((8, 8), np.float32)], [mask, np.zeros((8, 8), bool)]

    figures = pixel_metrics(maps, masks, [1, 0])

    assert {name: metric.value for name, metric in figures.items()} == {
        "p_auroc": 1.0,
        "p_ap": 1.0,
        "p_f1max": 1.0,
        "aupro": pytest.approx(1.0, abs=1e-12),
    }


def test_a_constant_map_gives_one_half_and_the_diagonal_and_says_degenerate():
    """Equal values give AUROC 0.5, AP equal to the prevalence and AUPRO 0.15, each with a warning."""
    mask = np.zeros((4, 5), bool)
    mask[0, :2] = True

    figures = pixel_metrics([np.full((4, 5), -3, np.float32)], [mask], [1])

    assert figures["p_auroc"].value == 0.5
    assert figures["p_ap"].value == pytest.approx(0.1)
    assert figures["aupro"].value == pytest.approx(0.15, abs=1e-12)
    assert all("degenerate" in (metric.reason or "") for metric in figures.values())


@settings(max_examples=40)  # each takes as long as ten of the others
@given(_maps_and_masks())
def test_figures_of_increasing_transforms_are_unchanged(case):
    """Only the order of values counts, negative ones included."""
    maps, masks = case
    bent = [(np.exp(m.astype(np.float32) / 2) - 40).astype(np.float32) for m in maps]

    before, after = pixel_metrics(maps, masks, [1] * len(maps)), pixel_metrics(bent, masks, [1] * len(maps))

    assert [m.value for m in before.values()] == [m.value for m in after.values()]


@given(_labelled_scores())
def test_auroc_of_swapped_labels_is_mirrored(case):
    """Swapping the classes mirrors the AUROC at one half."""
    scores, labels = case

    found = auroc(scores, labels).value + auroc(scores, 1 - labels).value

    assert found == pytest.approx(1.0, abs=1e-12)


def test_aupro_of_a_small_and_a_large_region_weighs_them_alike():
    """Finding only the region of one pixel covers as much as finding only the one of a hundred."""
    mask = np.zeros((30, 30), bool)
    mask[0, 0], mask[10:20, 10:20] = True, True
    small, large = np.zeros((30, 30), np.float32), np.zeros((30, 30), np.float32)
    small[0, 0], large[10:20, 10:20] = 1, 1

    found = [aupro([m], [mask]).value for m in (small, large)]

    assert found[0] == pytest.approx(found[1], abs=1e-12)
    assert found[0] == pytest.approx(0.5 + 0.5 * 0.15, abs=1e-12)


def test_aupro_of_diagonally_touching_pixels_counts_one_region():
    """Regions are 8-connected."""
    mask = np.zeros((6, 6), bool)
    mask[0, 0] = mask[1, 1] = mask[4, 4] = True
    anomaly_map = np.zeros((6, 6), np.float32)
    anomaly_map[4, 4] = 1

    found = aupro([anomaly_map], [mask])

    assert found.value == pytest.approx(0.5 + 0.5 * 0.15, abs=1e-12)


@given(_maps_and_masks())
def test_spro_with_the_area_as_saturation_equals_aupro_of_single_components(case):
    """Without saturation, and with one channel for each component, sPRO is PRO."""
    maps, masks = case
    channels = [_components(mask) for mask in masks]
    saturations = [[int(c.sum()) for c in image] for image in channels]

    found = spro(maps, channels, saturations, 0.3)

    assert found.value == pytest.approx(aupro(maps, masks, 0.3).value, abs=1e-9)


def test_spro_with_a_partial_cover_over_the_saturation_reaches_one():
    """Finding as many pixels as the saturation asks for is as good as finding all."""
    channel = np.zeros((6, 6), bool)
    channel[1:3, 1:5] = True
    anomaly_map = np.zeros((6, 6), np.float32)
    anomaly_map[1, 1:4] = 1

    found = spro([anomaly_map], [[channel]], [[3]])

    assert found.value == pytest.approx(1.0, abs=1e-12)


def test_spro_without_a_limit_is_that_of_the_first_twentieth():
    """MVTec LOCO's figure ends at a false positive rate of 0.05; a detector that is good later gains nothing by it."""
    channel = np.zeros((10, 10), bool)
    channel[0, 0] = True
    anomaly_map = np.arange(100, 0, -1, dtype=np.float32).reshape(10, 10)
    anomaly_map[0, 0] = 90.5  # ten of 99 good pixels lie above

    found, late = spro([anomaly_map], [[channel]], [[1]]), spro([anomaly_map], [[channel]], [[1]], 0.3)

    assert found == Metric(0.0)
    assert late.value > 0.6


@pytest.mark.parametrize(
    ("area", "threshold", "relative", "expected"),
    [(100, 0.255, True, 25), (100, 40, False, 40), (30, 40, False, 30), (3, 0.1, True, 1)],
    ids=["share", "pixels", "more than the area", "never zero"],
)
def test_saturation_area_follows_the_defects_config(area, threshold, relative, expected):
    """Relative thresholds are truncated, absolute ones are bounded by the area."""
    assert saturation_area(area, threshold, relative=relative) == expected


def test_aupro_with_more_normal_images_changes_the_false_positive_rate_only():
    """A clean normal image lowers the false positive rate and leaves the cover as it is."""
    mask = np.zeros((4, 4), bool)
    mask[0, :2] = True
    anomaly_map = np.array([[5, 1, 4, 3], *[[0] * 4] * 3], np.float32)
    clean = np.full((4, 4), -1, np.float32)

    before = pixel_curves([anomaly_map], [mask]).pro
    after = pixel_curves([anomaly_map, clean], [mask, np.zeros((4, 4), bool)]).pro

    assert sorted(set(before.y)) == sorted(set(after.y))
    assert max(before.x[before.y < 1]) == pytest.approx(2 / 14)
    assert max(after.x[after.y < 1]) == pytest.approx(2 / 30)


@pytest.mark.parametrize(
    ("labels", "reason"), [([1, 1], "no normal"), ([0, 0], "no anomalous")], ids=["all anomalous", "all normal"]
)
@pytest.mark.parametrize("figure", [auroc, average_precision, f1_max])
def test_figures_of_a_single_class_have_a_reason_instead_of_a_value(figure, labels, reason):
    """A missing class gives no number, and says so."""
    found = figure([0.1, 0.2], labels)

    assert found.value is None
    assert reason in found.reason


@pytest.mark.parametrize(("mark", "reason"), [(0, "no mask marks a region"), (1, "masks mark every pixel")])
def test_figures_of_pixels_of_a_single_class_have_a_reason_that_speaks_of_masks(mark, reason):
    """An anomalous frame whose mask marks nothing is there, and nobody shall look for it."""
    maps, masks = [np.zeros((3, 3), np.float32)], [np.full((3, 3), mark, bool)]

    found = pixel_metrics(maps, masks, [1])

    assert set(found.values()) == {Metric(None, reason)}
    assert {pixel_auroc(maps, masks), aupro(maps, masks)} == {Metric(None, reason)}


def test_aupro_without_a_normal_pixel_has_a_reason_instead_of_a_value():
    """Without a normal pixel there is no false positive rate."""
    found = aupro([np.zeros((3, 3), np.float32)], [np.ones((3, 3), bool)])

    assert found == Metric(None, "masks mark every pixel")


def test_pixel_metrics_of_an_anomalous_image_with_an_empty_mask_adds_no_region():
    """An anomalous image without a marked pixel adds normal pixels only."""
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = True
    maps = [np.eye(4, dtype=np.float32), *[np.full((4, 4), -1, np.float32)] * 4]
    masks = [mask, *[np.zeros((4, 4), bool)] * 4]  # a third of draws lacks the first

    found = pixel_metrics(maps, masks, [1] * 5)

    assert found["aupro"].value == pytest.approx(aupro(maps, masks).value)
    assert found["aupro"].interval is not None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(value):
    """NaN and infinity end with the typed error, in scores and in maps."""
    anomaly_map = np.zeros((3, 3), np.float32)
    anomaly_map[1, 1] = value

    with pytest.raises(ScoreNotFinite, match="score 1"):
        auroc([0.0, value], [0, 1])
    with pytest.raises(ScoreNotFinite, match="image 0"):
        pixel_metrics([anomaly_map], [np.zeros((3, 3), bool)], [0])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: auroc([[0.1]], [[1]]), "one dimension"),
        (lambda: auroc([0.1], [1, 0]), "expected 1 labels"),
        (lambda: auroc([0.1, 0.2], [1, -1]), "0 .normal. or 1"),
        (lambda: aupro([np.zeros((2, 2), np.float32)], [np.zeros((2, 3), bool)]), "shape"),
        (lambda: aupro([np.zeros((2, 2), np.float32)], [np.zeros((2, 2), np.uint8)]), "must be bool"),
        (lambda: aupro([np.zeros((2, 2), np.float32)], [np.eye(2, dtype=bool)], 0), "limit"),
        (lambda: pixel_metrics([np.zeros((2, 2), np.float32)], [np.eye(2, dtype=bool)], [0]), "labelled normal"),
        (lambda: spro([np.zeros((2, 2), np.float32)], [[np.eye(2, dtype=bool)]], [[]]), "saturation areas"),
        (lambda: spro([np.zeros((2, 2), np.float32)], [[np.eye(2, dtype=bool)]], [[0]]), "must be positive"),
        (lambda: spro([np.full((2, 2), np.nan, np.float32)], [[]], [[]]), "image 0 holds NaN"),
    ],
    ids=["rank", "count", "unknown label", "size", "type", "limit", "mask of a normal", "areas", "saturation", "NaN"],
)
def test_inputs_that_do_not_fit_are_refused(call, sentence):
    """A wrong input ends with a sentence instead of a figure."""
    with pytest.raises(ValueError, match=sentence):
        call()


def test_image_metrics_with_few_anomalous_images_have_an_interval_round_the_value():
    """Below a hundred anomalous images each figure carries a repeatable bootstrap interval."""
    generator = np.random.default_rng(5)
    labels = np.repeat([0, 1], 40)
    scores = generator.normal(size=80) + labels

    first, second = image_metrics(scores, labels, seed=3), image_metrics(scores, labels, seed=3)

    assert first == second
    assert all(m.interval[0] <= m.value <= m.interval[1] for m in first.values())
    # Hanley & McNeil (1982) give a standard error of about 0.05 here.
    assert 0.1 < first["i_auroc"].interval[1] - first["i_auroc"].interval[0] < 0.3


@pytest.mark.parametrize(("images", "least"), [(3, 0.292), (20, 0.832)])
def test_image_metrics_of_a_perfect_ranking_tell_what_so_few_images_prove(images, least):
    """No handful of frames is certain: the exact bound of k in order of k stands in place of a width of 0."""
    scores, labels = np.arange(images + 40.0), np.repeat([0, 1], [40, images])

    found = image_metrics(scores, labels)
    worst = image_metrics(-scores, labels)["i_auroc"]

    # At an AUROC of the bound, k independent pairs are all in order in 2.5 % of repetitions.
    assert found["i_auroc"].interval[0] ** images == pytest.approx(0.025)
    assert found["i_auroc"].interval == (pytest.approx(least, abs=1e-3), 1.0)
    assert worst.interval == (0.0, pytest.approx(1 - least, abs=1e-3))
    for name in ("i_ap", "i_f1max"):
        assert (found[name].value, found[name].interval) == (1.0, None)
        assert found[name].reason.startswith("no interval")


def test_image_metrics_with_too_few_images_have_a_reason_for_no_interval():
    """From four frames draws tell too little: their interval would miss the truth in one of five repetitions."""
    scores = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 2.5, 6.0, 7.0, 8.0])

    few, enough = image_metrics(scores, np.repeat([0, 1], [6, 4])), image_metrics(scores, np.repeat([0, 1], [5, 5]))

    assert {(m.interval, m.reason) for m in few.values()} == {
        (None, "no interval: fewer than 5 good or defective test frames")
    }
    assert all(m.interval is not None and m.reason is None for m in enough.values())


def test_image_metrics_of_equal_scores_have_no_interval():
    """A detector that always says the same is not known to rank at chance, to the last digit."""
    found = image_metrics(np.zeros(20), np.repeat([0, 1], 10))["i_auroc"]

    assert (found.value, found.interval) == (0.5, None)
    assert found.reason.startswith("degenerate: all scores are equal; no interval")


def test_pixel_metrics_of_two_images_have_a_reason_for_no_interval():
    """One good and one defective frame can be drawn in one way only."""
    mask = np.eye(8, dtype=bool)
    maps = [np.arange(64, dtype=np.float32).reshape(8, 8)] * 2

    found = pixel_metrics(maps, [np.zeros((8, 8), bool), mask], [0, 1])

    assert all(m.value is not None and m.interval is None and "no interval" in m.reason for m in found.values())


def test_image_metrics_with_many_anomalous_images_have_no_interval():
    """From a hundred anomalous images on, figures stand alone."""
    found = image_metrics(np.arange(200), np.repeat([0, 1], 100))

    assert all(metric.interval is None for metric in found.values())


def test_image_metrics_of_a_single_class_have_no_interval():
    """What has no value has no interval either."""
    found = image_metrics([1.0, 2.0], [1, 1])

    assert all(metric.interval is None and metric.value is None for metric in found.values())


def test_pixel_metrics_with_few_anomalous_images_have_an_interval_round_the_value():
    """Pixel intervals come from resampled images and lie round the exact value."""
    generator = np.random.default_rng(7)
    masks = [np.zeros((32, 32), bool) for _ in range(30)]
    for mask in masks[:15]:
        top, left = generator.integers(0, 26, 2)
        mask[top : top + 6, left : left + 6] = True
    maps = [(generator.normal(size=(32, 32)) + 2 * mask).astype(np.float32) for mask in masks]

    found = pixel_metrics(maps, masks, [1] * 15 + [0] * 15)

    assert all(m.interval[0] - 1e-3 <= m.value <= m.interval[1] + 1e-3 for m in found.values())
    assert all(0 < m.interval[1] - m.interval[0] < 0.2 for m in found.values())


def test_thinned_curves_keep_their_ends_and_their_area():
    """A thinned curve has few points, both ends, and nearly the exact area."""
    generator = np.random.default_rng(11)
    labels = generator.integers(0, 2, 5000)
    scores = generator.normal(size=5000) + labels

    curve = roc_curve(scores, labels, points=200)
    precision = precision_recall_curve(scores, labels, points=200)

    assert len(curve.x) <= 200
    assert (curve.x[0], curve.y[0], curve.x[-1], curve.y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(curve.y, curve.x) == pytest.approx(auroc(scores, labels).value, abs=2e-3)
    assert len(precision.x) <= 200
    assert precision.x[-1] == 1


def test_curves_of_a_missing_class_are_empty():
    """There is nothing to draw where nothing is defined."""
    maps, masks = [np.zeros((2, 2), np.float32)], [np.zeros((2, 2), bool)]

    found = pixel_curves(maps, masks)

    assert all(isinstance(c, Curve) and c.x.size == 0 for c in (found.roc, found.precision_recall, found.pro))


def test_bootstrap_draws_a_thousand_times_and_keeps_as_many_images_of_each_label():
    """Each draw has the good and the defective images' own numbers, so that it has every figure."""
    anomalous = np.repeat([False, True], [4, 2])
    own = PerImage(one_hot(np.arange(6), ~anomalous, 6), one_hot(np.arange(6), anomalous, 6), None, None)

    draws = bootstrap(own, anomalous, seed=0)

    assert draws.shape == (1000, 3)
    assert np.isfinite(draws).all()
    assert (draws[:, 0] == 0).all()  # the groups of good images come first, whichever are drawn


def test_interval_when_draws_are_known_then_leaves_a_fortieth_of_them_out_on_each_side():
    """What is called a 95 % interval is one."""
    assert interval(np.arange(1001.0), (9, 9)).bounds == (25, 975)
