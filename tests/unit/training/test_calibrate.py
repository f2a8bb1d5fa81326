"""Promises of calibration: thresholds from good parts alone, and a refusal that says what is missing."""

import numpy as np
import pytest
from typer.testing import CliRunner

from service.contract.calibration import Calibration
from service.contract.policy import ScoreRule, Verdict, inspected_mask, judge
from service.errors import BundleRefused, CalibrationRefused, ParameterInvalid, UnreadableFrame
from tests.factories import encode, make_bundle, make_frame, make_policy
from training.__main__ import commands
from training.calibrate import (
    calibrate,
    read_region_of_interest,
    refuse_other_shape,
    refuse_unsupported_rates,
    refuse_unusable_region,
    tell_other_shapes,
)

_TOP = ScoreRule(kind="top_fraction_mean", fraction=0.1)
_LEFT_HALF = (((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)),)


def _good_parts(count=39, hot_right=False):
    maps = np.random.default_rng(0).uniform(0, 1, (count, 10, 10)).astype(np.float32)
    if hot_right:
        maps[:, :, 8:] = 5
    scores = np.array([_TOP.reduce(anomaly_map.ravel()) for anomaly_map in maps], np.float32)
    return scores, maps


def test_calibrate_when_enough_good_parts_then_each_rate_holds_on_them():
    """No more good parts than the wanted share reach each threshold, and review comes before fail."""
    scores, maps = _good_parts()

    found = calibrate(scores, maps, _TOP, review_rate=0.1, fail_rate=0.05, version="1")

    assert (scores >= found.policy.fail_threshold).sum() <= 0.05 * 40 - 1
    assert (scores >= found.policy.review_threshold).sum() <= 0.1 * 40 - 1
    assert found.policy.review_threshold < found.policy.fail_threshold
    assert (maps.max(axis=(1, 2)) >= found.policy.region_threshold).sum() <= 3
    assert found.policy.map_floor == pytest.approx(np.median(maps))
    assert (found.review.good_parts, found.fail.good_parts) == (39, 39)


def test_calibrate_when_a_region_of_interest_is_given_then_the_rest_does_not_count():
    """Scores, peaks and floor are those of the inspected half, not of the hot rim outside."""
    scores, maps = _good_parts(hot_right=True)

    found = calibrate(scores, maps, _TOP, review_rate=0.1, fail_rate=0.05, version="1", region_of_interest=_LEFT_HALF)

    assert scores.min() > 1.5
    assert found.policy.fail_threshold < 1.01
    assert found.policy.region_threshold < 1.01
    assert found.calibration.scores[-1] <= 1


def test_calibrate_when_the_input_is_cropped_then_good_parts_are_scored_as_frames_will_be_judged():
    """A region of interest lies on the frame: thresholds rest on the very places of a crop's map that are inspected."""
    window, left = (0.2, 0.2, 0.6, 0.6), (((0.0, 0.0), (0.35, 0.0), (0.35, 1.0), (0.0, 1.0)),)
    scores, maps = _good_parts()
    maps[:, :, 3:] += 5  # of the crop's ten columns, three lie within the region; of the frame's, four would

    rates = {"review_rate": 0.2, "fail_rate": 0.05}
    found = calibrate(scores, maps, _TOP, **rates, version="1", region_of_interest=left, window=window)

    inspected = inspected_mask(found.policy, 10, 10, window=window)
    judged = [
        judge(float(score), anomaly_map, found.policy, _TOP, window, inspected)
        for score, anomaly_map in zip(scores, maps, strict=True)
    ]
    assert found.calibration.scores.tolist() == sorted(np.float32(one.score) for one in judged)
    assert [one.verdict for one in judged].count(Verdict.FAIL) == 1
    assert [one.verdict for one in judged].count(Verdict.REVIEW) == 6
    assert found.policy.map_floor == np.median(maps[:, :, :3])
    assert found.policy.region_threshold == found.calibration.peak_threshold(0.2).value
    assert found.policy.region_threshold < found.calibration.peak_threshold(0.05).value
    assert ((found.peaks.places[:, 0] > 0.2) & (found.peaks.places[:, 0] < 0.4)).all()
    assert len({x for x, _ in found.peaks.places}) == 3


def test_refuse_unusable_region_when_it_lies_on_what_is_cropped_then_says_so_before_anything_is_fitted():
    """What the network never sees can't be inspected, though it lies on the frame."""
    window, corner = (0.2, 0.2, 0.6, 0.6), (((0.0, 0.0), (0.15, 0.0), (0.15, 0.15), (0.0, 0.15)),)
    larger = (((0.0, 0.0), (0.4, 0.0), (0.4, 0.4), (0.0, 0.4)),)

    with pytest.raises(BundleRefused, match="leaves nothing to inspect"):
        refuse_unusable_region(corner, (10, 10), _TOP, window)
    with pytest.raises(BundleRefused, match="how uneven its map is"):
        refuse_unusable_region(larger, (10, 10), ScoreRule(kind="deviation"), window)
    refuse_unusable_region(larger, (10, 10), _TOP, window)


def test_calibrate_when_parts_have_several_views_then_rests_on_parts():
    """No more parts than the wanted share have a view that reaches a threshold, and the promise counts parts."""
    scores, maps = _good_parts(95)
    part_of = np.arange(95) // 5

    found = calibrate(scores, maps, _TOP, review_rate=0.1, fail_rate=0.05, version="1", parts=part_of)

    stopped = {int(part) for part in part_of[scores >= found.policy.review_threshold]}
    assert len(stopped) == 1
    assert (scores >= found.policy.fail_threshold).sum() == 0
    assert len(set(part_of[maps.max(axis=(1, 2)) >= found.policy.region_threshold])) <= 1
    assert (found.review.good_parts, found.fail.good_parts) == (19, 19)
    with pytest.raises(
        CalibrationRefused, match="18 are held out, in 90 frames that show them several times; add good"
    ):
        calibrate(*(scores[:90], maps[:90], _TOP), review_rate=0.1, fail_rate=0.05, version="1", parts=part_of[:90])


@pytest.mark.parametrize(
    ("good_parts", "review", "fail", "words"),
    [
        (18, 0.1, 0.05, "needs at least 19 good parts that fitting never saw, and 18 are held out"),
        (98, 0.1, 0.01, "needs at least 99 good parts"),
        (18, 0.1, 0.05, "accept a higher rate: --fail-rate 0.0527, or above"),
        (2, 0.1, 0.05, "--fail-rate 0.334 with --review-rate 0.334, or above"),
        (500, 0.05, 0.1, "must not be above the review rate, 0.05"),
        (500, 0.1, 0.2, "Give --review-rate 0.2 or above as well, or a lower --fail-rate."),
        (500, 0.1, 0, "for example use 0.05 and 0.1"),
    ],
)
def test_refuse_unsupported_rates_when_good_parts_cannot_carry_them_then_says_how_many_would(
    good_parts, review, fail, words
):
    """The refusal comes before fitting and names the number that would do."""
    with pytest.raises(CalibrationRefused) as caught:
        refuse_unsupported_rates(good_parts, review, fail)

    assert words in caught.value.sentence


@pytest.mark.parametrize(
    ("splits", "words"), [(True, "frames, hold out a larger share, or"), (False, "frames or accept")]
)
def test_refuse_unsupported_rates_when_all_parts_are_used_already_then_asks_for_no_larger_share(splits, words):
    """Only a run splits its good parts; a new calibration takes all that it is given."""
    with pytest.raises(CalibrationRefused) as caught:
        refuse_unsupported_rates(18, 0.1, 0.05, splits=splits)

    assert words in caught.value.sentence


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("region", [None, _LEFT_HALF], ids=["everywhere", "region"])
@pytest.mark.parametrize("of", ["score", "map"])
def test_calibrate_when_a_number_is_not_finite_then_is_refused(value, region, of):
    """A broken detector never gets thresholds, though what is broken may not be what they rest on."""
    scores, maps = _good_parts()
    if of == "score":
        scores[3] = value
    else:
        maps[3, 2, 9] = value

    with pytest.raises(CalibrationRefused, match="score or map is not finite"):
        calibrate(scores, maps, _TOP, review_rate=0.1, fail_rate=0.05, version="1", region_of_interest=region)


def test_calibrate_when_a_region_is_too_small_for_a_deviation_then_is_refused():
    """A region that a defect could fill would let it pass."""
    scores, maps = _good_parts()
    corner = (((0.0, 0.0), (0.3, 0.0), (0.3, 0.3), (0.0, 0.3)),)

    with pytest.raises(BundleRefused, match="how uneven its map is"):
        calibrate(
            *(scores, maps, ScoreRule(kind="deviation")),
            review_rate=0.1,
            fail_rate=0.05,
            version="1",
            region_of_interest=corner,
        )


def test_read_region_of_interest_when_the_mask_is_white_somewhere_then_gives_polygons_of_the_frame(tmp_path):
    """Outlines come in fractions of the frame and never leave it; specks are left out."""
    mask = np.zeros((100, 200), np.uint8)
    mask[0:50, 100:200] = 255
    mask[90, 3] = 255
    path = tmp_path / "roi.png"
    path.write_bytes(encode(mask))

    polygons = read_region_of_interest(path)

    corners = np.array(polygons[0])
    assert len(polygons) == 1
    np.testing.assert_allclose(corners.min(axis=0), [0.5, 0.0], atol=0.005)
    np.testing.assert_allclose(corners.max(axis=0), [1.0, 0.5], atol=0.005)
    assert corners.min() >= 0
    assert corners.max() <= 1


def test_read_region_of_interest_of_a_ring_leaves_its_middle_out(tmp_path):
    """The hole of a washer is black in its mask, so nothing that lies under it is inspected."""
    y, x = np.mgrid[0:120, 0:120]
    radius = np.hypot(y - 60, x - 60)
    path = tmp_path / "washer.png"
    path.write_bytes(encode(np.where((radius < 50) & (radius > 20), 255, 0).astype(np.uint8)))

    inspected = inspected_mask(make_policy(region_of_interest=read_region_of_interest(path)), 120, 120)

    assert inspected is not None
    assert inspected[(radius < 50) & (radius > 20)].all()
    assert not inspected[(radius < 18) | (radius > 52)].any()


@pytest.mark.parametrize(
    "content", [None, b"no image", encode(np.zeros((8, 8), np.uint8))], ids=["missing", "text", "black"]
)
def test_read_region_of_interest_when_nothing_is_marked_then_is_refused(tmp_path, content):
    """A mask that would inspect nothing ends in one sentence."""
    path = tmp_path / "roi.png"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UnreadableFrame):
        read_region_of_interest(path)


@pytest.mark.parametrize(
    ("mask_size", "frame_sizes"),
    [((72, 80), [(72, 80)]), ((36, 40), [(72, 80)]), ((307, 384), [(1024, 1280)]), ((64, 64), [(72, 80), (80, 72)])],
    ids=["the frames' own", "half of it", "rounded down", "between theirs"],
)
def test_refuse_other_shape_when_the_mask_has_the_frames_aspect_ratio_then_it_will_do(tmp_path, mask_size, frame_sizes):
    """A thumbnail is drawn on more easily than a frame of a large sensor."""
    path = tmp_path / "roi.png"
    path.write_bytes(encode(np.full(mask_size, 255, np.uint8)))

    refuse_other_shape(path, frame_sizes)

    squeezed = tell_other_shapes(path, frame_sizes)
    assert (squeezed is None) is (len(frame_sizes) == 1)
    assert squeezed is None or "has 64x64 pixels, and some frames another aspect ratio, like 80x72" in squeezed


@pytest.mark.parametrize("mask_size", [(50, 200), (80, 72), (64, 64)])
def test_refuse_other_shape_when_the_mask_would_be_squeezed_then_names_both_sizes(tmp_path, mask_size):
    """A mask of another camera, or of the turned frame, inspects other places than were painted."""
    path = tmp_path / "roi.png"
    path.write_bytes(encode(np.full(mask_size, 255, np.uint8)))

    with pytest.raises(ParameterInvalid, match=f"has {mask_size[1]}x{mask_size[0]} pixels and the frames 80x72"):
        refuse_other_shape(path, [(72, 80)])


def test_calibrate_command_when_a_layout_is_given_then_the_line_folder_is_read_by_it(tmp_path):
    """A folder of test frames that could be read in several ways is read in the one that is said."""
    bundle, good = make_bundle(tmp_path / "store"), tmp_path / "good"
    good.mkdir()
    (good / "0.png").write_bytes(encode(make_frame()))
    arguments = ["calibrate", str(bundle), str(good), "--line-folder", str(tmp_path), "--layout", "photo_album"]

    done = CliRunner().invoke(commands, arguments)

    assert done.exit_code == 2
    assert "There is no layout 'photo_album'" in done.stderr


def test_calibrate_command_when_two_regions_are_given_then_takes_neither_in_silence(tmp_path):
    """A line has one region of interest; whoever gives two means something that would be lost."""
    bundle = make_bundle(tmp_path / "store")

    done = CliRunner().invoke(commands, ["calibrate", str(bundle), "nowhere", "--roi", "a.png", "--roi", "b.png"])

    assert done.exit_code == 2
    assert "give --roi once" in done.stderr


def _views_of_five(folder, copies=0):
    folder.mkdir()
    for index in range(25):
        (folder / f"s{index // 5}_C{index % 5}.png").write_bytes(encode(make_frame(seed=index)))
    for index in range(copies):
        (folder / f"s9_C{index}.png").write_bytes(encode(make_frame(seed=0)))
    return folder


@pytest.mark.parametrize(
    ("of_run", "group_by", "words"),
    [
        (None, None, "25 are held out;"),
        (None, r"^(s\d)", "5 are held out, in 25 frames"),
        (r"^(s\d)", None, "5 are held out, in 25 frames"),
        (r"^(s\d)", ".*", "25 are held out;"),
    ],
)
def test_calibrate_command_when_frames_are_views_then_a_pattern_says_so(tmp_path, of_run, group_by, words):
    """Frames of a folder each count as a part, unless a pattern, or the run's own, finds which part a name is of."""
    hyperparameters = {} if of_run is None else {"hold_out": {"rule": "groups", "group_by": of_run}}
    bundle = make_bundle(tmp_path / "store", hyperparameters=hyperparameters)
    good = _views_of_five(tmp_path / "good", copies=3)
    options = [] if group_by is None else ["--group-by", group_by]

    done = CliRunner().invoke(commands, ["calibrate", str(bundle), str(good), "--fail-rate", "0.03", *options])

    assert done.exit_code == 2
    assert words in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "was calibrated on 10 parts in 20 frames, and nothing says which of the new frames show the same part"),
        (["--group-by", "("], "'(' is no regular expression"),
        (["--group-by", "plate"], "does not match the group pattern 'plate'"),
    ],
)
def test_calibrate_command_when_nothing_finds_parts_of_several_views_then_asks(tmp_path, options, words):
    """A line whose parts had views before has them again: its new frames aren't taken for parts."""
    scores = np.arange(20, dtype=np.float32)
    calibration = Calibration.from_good_parts(scores, scores, 0.0, np.arange(20) // 2)
    bundle = make_bundle(tmp_path / "store", extra_files={"calibration.npz": calibration.to_bytes()})
    good = _views_of_five(tmp_path / "good")

    done = CliRunner().invoke(commands, ["calibrate", str(bundle), str(good), *options])

    assert done.exit_code == 2
    assert words in done.stderr
