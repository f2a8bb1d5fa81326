"""Promises of evaluation: the service's pixels and policy, and a reason for every figure that is not defined."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score

from service.contract.frames import FrameLimits, decode_image, decode_mask, resize_map, resize_mask
from service.contract.policy import Verdict, inspected_mask
from tests.factories import (
    TOP_FRACTION,
    ScoreRule,
    encode,
    make_frame,
    make_graph,
    make_input,
    make_policy,
    make_runner,
    make_self_policy,
)
from tests.tiny_line import DEFECTS, TEST_GOOD, write_line, write_mvtec_ad2_line
from training.data.detect import read_dataset
from training.data.loader import load_channels, load_mask
from training.data.samples import ANOMALOUS, UNKNOWN, Sample
from training.measuring.answers import ask
from training.measuring.evaluate import evaluate, inspected_share, to_records, without_test_frames
from training.measuring.metrics import Metric, auroc, saturation_area, spro
from training.progress import SilentReporter

_RULE = ScoreRule(kind="top_fraction_mean", fraction=TOP_FRACTION)


def _ask(samples, spec=None, **options):
    return ask(make_runner(make_graph()), samples, spec or make_input(), SilentReporter(), title="frames", **options)


@pytest.mark.parametrize("resolution", ["original", "model"])
def test_evaluate_when_masks_exist_then_all_figures_are_defined(tmp_path, resolution):
    """A detector that sees every square ranks images and pixels almost without fault."""
    answers = _ask(read_dataset(write_line(tmp_path)).test)

    found = evaluate(answers, make_policy(), _RULE, make_input(), resolution)

    assert all(metric.value is not None for metric in found.metrics.values())
    assert found.metrics["i_auroc"].value == 1.0
    assert found.metrics["p_auroc"].value > 0.95
    assert found.by_kind["square"].value == 1.0
    assert found.verdict_counts() == {
        "good": {Verdict.PASS: TEST_GOOD, Verdict.REVIEW: 0, Verdict.FAIL: 0},
        "square": {Verdict.PASS: 0, Verdict.REVIEW: 0, Verdict.FAIL: DEFECTS},
    }


def test_evaluate_when_a_frame_shows_no_picture_then_it_has_no_verdict_as_in_the_service(tmp_path):
    """Who counts a black frame as passed promises what no camera gets; its score is ranked all the same."""
    path = tmp_path / "black.png"
    path.write_bytes(encode(np.zeros_like(make_frame())))
    answers = _ask([*read_dataset(write_line(tmp_path / "line")).test, Sample(path, "test", 0, "good")])

    found = evaluate(
        answers, make_policy(review_threshold=9.0, fail_threshold=9.0), _RULE, make_input(), least_contrast=1
    )

    assert found.verdict_counts()["good"] == {
        Verdict.PASS: TEST_GOOD,
        Verdict.REVIEW: 0,
        Verdict.FAIL: 0,
        Verdict.NO_VERDICT: 1,
    }
    assert found.scores.size == TEST_GOOD + DEFECTS + 1


@pytest.mark.parametrize("resolution", ["original", "model"])
def test_evaluate_when_frames_are_measured_by_themselves_then_flat_ones_have_no_verdict_and_no_rank(
    tmp_path, resolution
):
    """Any rank would be made up: the others have the figures that they would have alone."""
    answers = _ask(read_dataset(write_line(tmp_path)).test)
    maps = answers.maps.copy()
    flat = [3, TEST_GOOD + 1]
    maps[flat] = 0.0
    others = [i for i in range(len(answers.samples)) if i not in flat]

    found = evaluate(replace(answers, maps=maps), make_self_policy(), _RULE, make_input(), resolution)

    alone = evaluate(answers.take(others), make_self_policy(), _RULE, make_input(), resolution)
    assert found.unscored == tuple(answers.samples[i] for i in flat)
    assert found.answers.samples == tuple(answers.samples[i] for i in others)
    assert (found.metrics, found.by_kind) == (alone.metrics, alone.by_kind)
    assert [counts[Verdict.NO_VERDICT] for counts in found.verdict_counts().values()] == [1, 1]
    assert [sum(counts.values()) for counts in found.verdict_counts().values()] == [TEST_GOOD, DEFECTS]


def test_evaluate_when_all_frames_of_a_kind_are_flat_then_the_kind_is_told_without_a_figure(tmp_path):
    """A kind that nothing can be said of is not one that was never there."""
    answers = _ask(read_dataset(write_line(tmp_path)).test)
    defective = [i for i, sample in enumerate(answers.samples) if sample.label == ANOMALOUS]
    maps = answers.maps.copy()
    maps[defective] = 0.0

    some = evaluate(replace(answers, maps=maps), make_self_policy(), _RULE, make_input())
    none = evaluate(replace(answers, maps=np.zeros_like(maps)), make_self_policy(), _RULE, make_input())

    for found in (some, none):
        assert found.by_kind == {"square": Metric(None, "none of its frames has a score")}
        assert all(metric.value is None and metric.reason for metric in found.metrics.values())
        assert found.verdict_counts()["square"][Verdict.NO_VERDICT] == DEFECTS
    assert none.verdict_counts()["good"][Verdict.NO_VERDICT] == TEST_GOOD


def test_evaluate_when_several_frames_show_a_piece_then_it_scores_as_its_worst_frame(tmp_path):
    """A defect that one of two views shows is found by that view, and its good views spoil no figure of pieces."""
    samples = read_dataset(write_line(tmp_path, masks=False)).test
    good = [sample for sample in samples if sample.label == 0]
    bad = [sample for sample in samples if sample.label == 1]
    views = [replace(good[0], group="a"), replace(good[1], group="a")]
    # Labelled by its piece, a view without the defect looks as good as it is.
    views += [replace(bad[0], group="b"), replace(bad[0], path=good[2].path, group="b")]
    lights, views = views, [replace(view, s_auroc=True) for view in views]

    pieces = evaluate(_ask(views), make_policy(), _RULE, make_input())
    by_frame = [*views[:3], replace(views[1], path=good[2].path, group="b")]  # labelled by what it shows
    assert evaluate(_ask(by_frame), make_policy(), _RULE, make_input()).metrics["s_auroc"].value == 1.0
    by_light = evaluate(_ask(lights), make_policy(), _RULE, make_input())
    alone = evaluate(_ask([replace(view, group=None) for view in views]), make_policy(), _RULE, make_input())

    assert pieces.metrics["s_auroc"].value == 1.0
    assert pieces.metrics["i_auroc"].value < 1.0
    assert "s_auroc" not in alone.metrics
    assert "s_auroc" not in by_light.metrics  # in MVTec AD 2 the frames of a piece are lights


def test_evaluate_when_the_makers_integrate_aupro_elsewhere_then_both_figures_are_told(tmp_path):
    """A data set's own limit is a figure of its own name and value, beside the usual one."""
    samples = read_dataset(write_line(tmp_path)).test
    usual, strict = (
        evaluate(
            replace(_ask(samples), samples=tuple(replace(sample, aupro_limit=limit) for sample in samples)),
            make_policy(),
            _RULE,
            make_input(),
        ).metrics
        for limit in (0.3, 0.05)
    )

    assert strict["aupro"] == usual["aupro"]
    assert strict["aupro_at_0.05"].value < strict["aupro"].value
    assert strict["aupro_at_0.05"].interval is not None
    assert "aupro_at_0.05" not in usual


def test_evaluate_when_the_input_is_cropped_then_masks_are_cropped_alike(tmp_path):
    """Pixel figures are measured where the detector looked: a perfect map stays perfect under a crop."""
    spec = make_input(margin=8)
    answers = _ask(read_dataset(write_line(tmp_path)).test, spec)

    found = evaluate(answers, make_policy(), _RULE, spec)

    assert found.metrics["p_auroc"].value > 0.95


_LEFT = (((0.0, 0.0), (0.6, 0.0), (0.6, 1.0), (0.0, 1.0)),)


def _with_defects_at_the_right(line):
    """Move the squares of two frames to the right edge; those of the others are cut by `_LEFT`."""
    for path in [*sorted((line / "test/square").iterdir())[:2], *sorted((line / "ground_truth/square").iterdir())[:2]]:
        path.write_bytes(encode(np.roll(decode_image(path.read_bytes(), FrameLimits()).pixels, 20, axis=1)))
    return line


def _inspected_pixels(answers, spec, resolution, inspected):
    """Return map values and marks of all inspected pixels of all frames, `(n,)` each, by plain loops."""
    scores, labels = [], []
    for sample, anomaly_map, size in zip(answers.samples, answers.maps, answers.frame_sizes, strict=True):
        top, left, height, width = (round(edge) for edge in spec.window(*size))
        mask = load_mask(sample, *size)[top : top + height, left : left + width]
        shape = mask.shape if resolution == "original" else anomaly_map.shape
        rows, columns = (
            (np.arange(side) + 0.5) * of_map // side for side, of_map in zip(shape, anomaly_map.shape, strict=True)
        )
        seen = inspected[np.ix_(rows.astype(int), columns.astype(int))]
        scores.append(resize_map(anomaly_map, *shape)[seen])
        labels.append(resize_mask(mask, *shape)[seen])
    return scores, labels


@pytest.mark.parametrize("region", [None, _LEFT], ids=["everything", "a region"])
@pytest.mark.parametrize(("resolution", "margin"), [("original", 0), ("original", 8), ("model", 0)])
def test_evaluate_when_the_makers_measure_seg_f1_then_it_is_that_of_one_threshold_from_good_frames(
    tmp_path, resolution, margin, region, monkeypatch
):
    """Good frames' maps are brought to size, cropped and cut as test frames' are, however many pixels there are."""
    dataset, spec = read_dataset(write_mvtec_ad2_line(tmp_path)), make_input(margin=margin)
    answers = _ask([sample for sample in dataset.test if sample.label != UNKNOWN], spec)
    held_out = _ask(dataset.validation_good, spec)
    policy = make_policy(region_of_interest=region)
    inspected = inspected_mask(policy, *answers.maps.shape[1:], window=spec.window(1, 1))
    inspected = np.ones(answers.maps.shape[1:], bool) if inspected is None else inspected
    scores, labels = (np.concatenate(pieces) for pieces in _inspected_pixels(answers, spec, resolution, inspected))
    good = np.concatenate(_inspected_pixels(held_out, spec, resolution, inspected)[0]).astype(np.float64)
    monkeypatch.setattr("training.measuring.evaluate._LARGEST_PIXEL_COUNT", 100)

    found = evaluate(answers, policy, _RULE, spec, resolution, held_out=held_out).metrics

    expected = f1_score(labels, scores >= good.mean() + 3 * good.std())
    assert 0.1 < expected < 1
    assert found["seg_f1"] == Metric(pytest.approx(expected, abs=1e-12))
    assert (found["aupro"].value is None) == (resolution == "original")


def test_evaluate_when_seg_f1_can_not_be_measured_then_it_has_a_reason(tmp_path):
    """Nothing is invented without a threshold, a mask or an inspected defect, or where nobody publishes it."""
    samples = [sample for sample in read_dataset(write_mvtec_ad2_line(tmp_path)).test if sample.label != UNKNOWN]
    answers, held_out = _ask(samples), _ask(samples[:1])
    bare, usual = (
        replace(answers, samples=tuple(replace(sample, **change) for sample in samples))
        for change in ({"mask_path": None}, {"seg_f1": False})
    )
    corner = make_policy(region_of_interest=(((0.0, 0.0), (0.03, 0.0), (0.03, 0.03)),))

    found = [
        evaluate(asked, policy, _RULE, make_input(), held_out=good).metrics.get("seg_f1")
        for asked, policy, good in [
            (answers, make_policy(), None),
            (bare, make_policy(), held_out),
            (answers, corner, held_out),
            (usual, make_policy(), held_out),
        ]
    ]

    assert found == [
        Metric(None, "there is no held-out good frame to choose the threshold on"),
        Metric(None, "the line has image labels only, no masks"),
        Metric(None, "no marked defect lies in the region of interest"),
        None,
    ]


@pytest.mark.parametrize(("resolution", "margin"), [("original", 0), ("original", 8), ("model", 0)])
def test_evaluate_when_a_region_is_inspected_then_pixel_figures_are_of_its_pixels(tmp_path, resolution, margin):
    """Defects outside are no misses, hot pixels outside no false alarms, and the defects outside are counted."""
    spec = make_input(margin=margin)
    answers = _ask(read_dataset(_with_defects_at_the_right(write_line(tmp_path))).test, spec)
    policy = make_policy(region_of_interest=_LEFT)
    inspected = inspected_mask(policy, *answers.maps.shape[1:], window=spec.window(1, 1))
    scores, labels = _inspected_pixels(answers, spec, resolution, inspected)
    outside = sum(sample.label == 1 and not marks.any() for sample, marks in zip(answers.samples, labels, strict=True))

    found = evaluate(answers, policy, _RULE, spec, resolution)

    expected = [auroc(np.concatenate(scores), np.concatenate(labels)).value, outside]
    assert [found.metrics["p_auroc"].value, found.defects_outside] == expected
    # So are image figures: of the scores that verdicts are found by, and not of the network's own.
    own = replace(answers, scores=-answers.scores)
    assert evaluate(own, policy, _RULE, spec, resolution).metrics["i_auroc"] == found.metrics["i_auroc"]
    assert outside == 2
    assert evaluate(answers, make_policy(), _RULE, spec, resolution).defects_outside is None


def test_evaluate_when_every_defect_lies_outside_of_the_region_then_pixel_figures_have_a_reason(tmp_path):
    """There is nothing to find in there, which is not the same as finding nothing."""
    answers = _ask(read_dataset(write_line(tmp_path)).test)
    corner = (((0.0, 0.0), (0.03, 0.0), (0.03, 0.03)),)

    found = evaluate(answers, make_policy(region_of_interest=corner), _RULE, make_input())

    assert found.metrics["p_auroc"].reason == found.metrics["aupro"].reason
    assert "region of interest" in found.metrics["aupro"].reason
    assert found.defects_outside == DEFECTS
    assert found.metrics["i_auroc"].value is not None


def _with_a_speck(line, at):
    """Mark one pixel more on the first defect's mask."""
    path = min((line / "ground_truth/square").iterdir())
    marked = decode_mask(path.read_bytes())
    marked[at] = True
    path.write_bytes(encode((marked * 255).astype(np.uint8)))
    return line


@pytest.mark.parametrize(
    ("resolution", "region", "is_told"),
    [("model", None, True), ("model", _LEFT, False), ("original", None, False)],
    ids=["lost", "not inspected", "measured as it is"],
)
def test_evaluate_when_a_mark_falls_between_the_cells_of_the_map_then_pixel_figures_say_so(
    tmp_path, resolution, region, is_told
):
    """A defect that vanishes with the resize was not found; one that nobody inspects was not to be found."""
    answers = _ask(read_dataset(_with_a_speck(write_line(tmp_path), (1, -1))).test)
    policy = make_policy() if region is None else make_policy(region_of_interest=region)

    found = evaluate(answers, policy, _RULE, make_input(), resolution).metrics

    told = f"1 of {DEFECTS + 1} marked regions lies between the cells"
    assert [told in (found[name].reason or "") for name in ("p_auroc", "p_ap", "p_f1max", "aupro")] == [is_told] * 4
    assert all(metric.value is not None for metric in found.values())


def test_evaluate_when_there_are_no_masks_then_pixel_figures_have_a_reason(tmp_path):
    """Image labels alone give image figures, and pixel figures that say why they are missing."""
    answers = _ask(read_dataset(write_line(tmp_path, masks=False)).test)

    found = evaluate(answers, make_policy(), _RULE, make_input())

    assert found.metrics["i_auroc"].value == 1.0
    assert found.metrics["aupro"].value is None
    assert "no masks" in found.metrics["aupro"].reason


def _write_loco(folder):
    """Write a line with two kinds of squares; the second frame of each kind marks two defects in two files."""
    line = write_line(folder)
    (line / "defects_config.json").write_text(
        '[{"defect_name": "a", "pixel_value": 255, "saturation_threshold": 0.5, "relative_saturation": true},'
        ' {"defect_name": "b", "pixel_value": 254, "saturation_threshold": 3, "relative_saturation": false}]'
    )
    kinds = ("logical_anomalies", "structural_anomalies")
    for index, frame in enumerate(sorted((line / "test/square").iterdir())):
        kind = kinds[index % 2]
        image, masks = line / "test" / kind / frame.name, line / "ground_truth" / kind / frame.stem
        image.parent.mkdir(exist_ok=True)
        masks.mkdir(parents=True)
        old = line / "ground_truth/square" / f"{frame.stem}_mask.png"
        marked = decode_mask(old.read_bytes())
        frame.rename(image)
        rows = np.flatnonzero(marked.any(axis=1))
        upper = marked.copy()
        upper[rows[len(rows) // 2] :] = False
        (masks / "000.png").write_bytes(encode((upper * 255).astype(np.uint8)))
        (masks / "001.png").write_bytes(encode(((marked & ~upper) * 254).astype(np.uint8)))
        old.unlink()
    (line / "test/square").rmdir()
    (line / "ground_truth/square").rmdir()
    return line


def test_evaluate_when_defects_have_masks_of_their_own_then_spro_is_the_mean_of_kinds(tmp_path):
    """MVTec LOCO's headline is the mean over its two kinds, each measured against all good frames."""
    answers = _ask(read_dataset(_write_loco(tmp_path)).test)

    found = evaluate(answers, make_policy(), _RULE, make_input()).metrics

    kinds = [found["spro_logical_anomalies"].value, found["spro_structural_anomalies"].value]
    assert found["spro"].value == pytest.approx(sum(kinds) / 2)
    assert all(0.9 < value <= 1 for value in kinds)
    assert found["i_auroc_of_kinds"].value == 1.0
    assert found["i_auroc_logical_anomalies"].value == found["i_auroc_structural_anomalies"].value == 1.0


def test_evaluate_when_one_kind_is_missed_then_figures_of_the_other_kind_stay(tmp_path):
    """A kind is measured against good frames alone: defects of another kind are neither found nor missed with it."""
    answers = _ask(read_dataset(_write_loco(tmp_path)).test)
    missed = np.array([sample.kind == "structural_anomalies" for sample in answers.samples])
    blind = replace(
        answers,
        scores=np.where(missed, np.float32(0), answers.scores),
        maps=np.where(missed[:, None, None], np.float32(0), answers.maps),
    )

    before, after = (evaluate(one, make_policy(), _RULE, make_input()) for one in (answers, blind))

    for name in ("spro_logical_anomalies", "i_auroc_logical_anomalies"):
        assert after.metrics[name] == before.metrics[name]
    assert after.metrics["spro_structural_anomalies"].value < 0.05
    assert after.metrics["i_auroc_structural_anomalies"].value == 0
    assert after.metrics["i_auroc_of_kinds"].value == 0.5
    assert {kind: metric.value for kind, metric in after.by_kind.items()} == {
        "logical_anomalies": 1,
        "structural_anomalies": 0,
    }


def test_evaluate_when_a_region_cuts_defects_then_spro_is_that_of_its_pixels(tmp_path):
    """Of a defect that is cut, its share of the part inside is enough, and pixels outside are no false alarms."""
    answers, policy = _ask(read_dataset(_write_loco(tmp_path)).test), make_policy(region_of_interest=_LEFT)
    inspected = inspected_mask(policy, *answers.maps.shape[1:])
    kept = [i for i, sample in enumerate(answers.samples) if sample.kind in ("good", "logical_anomalies")]
    maps, channels, enough = [], [], []
    for index in kept:
        height, width = answers.frame_sizes[index]
        seen = resize_mask(inspected, height, width)
        marks = [(mask[seen][None], rule) for mask, rule in load_channels(answers.samples[index])]
        maps.append(resize_map(answers.maps[index], height, width)[seen][None])
        channels.append([mask for mask, _ in marks])
        enough.append([saturation_area(int(m.sum()), rule.threshold, relative=rule.relative) for m, rule in marks])

    found = evaluate(answers, policy, _RULE, make_input()).metrics

    assert found["spro_logical_anomalies"].value == pytest.approx(spro(maps, channels, enough).value)
    assert found["spro_logical_anomalies"].value < 1
    whole = evaluate(answers, make_policy(), _RULE, make_input()).metrics
    assert found["spro_logical_anomalies"].value != whole["spro_logical_anomalies"].value


def test_evaluate_when_a_mask_marks_nothing_then_no_defect_is_told_to_lie_outside(tmp_path):
    """What nobody marked lies nowhere."""
    answers = _ask(read_dataset(write_line(tmp_path)).test)
    (tmp_path / "blank.png").write_bytes(encode(np.zeros((72, 80), np.uint8)))
    blank = tuple(replace(s, mask_path=tmp_path / "blank.png") if s.label else s for s in answers.samples)
    policy = make_policy(region_of_interest=_LEFT)

    found = evaluate(replace(answers, samples=blank), policy, _RULE, make_input())

    assert found.defects_outside == 0


def test_inspected_share_when_the_input_is_cropped_then_is_one_of_the_frame():
    """What the network never sees is not inspected, whatever the region of interest is."""
    everything = make_policy(region_of_interest=(((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)),))

    shares = [inspected_share(everything, (16, 24), make_input(margin=margin)) for margin in (0, 8)]

    assert shares == [1, pytest.approx(32 / 48 * 48 / 64)]
    assert inspected_share(make_policy(), (16, 24), make_input()) is None


def test_evaluate_when_maps_are_blank_then_spro_is_that_of_chance(tmp_path):
    """A map that says nothing gives the line from (0, 0) to (1, 1), of which 0.05 counts."""
    answers = _ask(read_dataset(_write_loco(tmp_path)).test)
    blank = replace(answers, maps=np.zeros_like(answers.maps))

    found = evaluate(blank, make_policy(), _RULE, make_input()).metrics

    assert found["spro"].value == pytest.approx(0.025)


def test_evaluate_when_measured_at_the_models_size_then_spro_has_a_reason(tmp_path):
    """Saturation areas count pixels of the original frame, so no other size can do."""
    answers = _ask(read_dataset(_write_loco(tmp_path)).test)

    found = evaluate(answers, make_policy(), _RULE, make_input(), "model").metrics

    assert found["spro"].value is None
    assert "original" in found["spro_logical_anomalies"].reason


def test_evaluate_when_there_are_good_frames_only_then_every_figure_has_a_reason(tmp_path):
    """Nothing is invented where no defect was shown."""
    answers = _ask([s for s in read_dataset(write_line(tmp_path)).test if s.kind == "good"])

    found = evaluate(answers, make_policy(), _RULE, make_input())

    assert all(metric.value is None and metric.reason for metric in found.metrics.values())
    assert all(record.value is None and record.reason for record in to_records(without_test_frames()).values())
