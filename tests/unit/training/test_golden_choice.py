"""Promises of the golden set: answers that another device can give, and one verdict that is not PASS."""

import json
from dataclasses import replace

import numpy as np
import pytest

from service.contract.bundle import GOLDEN_FILE, GoldenRule
from service.contract.frames import FrameLimits, decode_image
from tests.factories import (
    TOP_FRACTION,
    ScoreRule,
    encode,
    make_frame,
    make_graph,
    make_input,
    make_policy,
    make_runner,
)
from tests.tiny_line import write_line
from training.data.detect import read_dataset
from training.data.samples import Sample
from training.golden import GoldenChooser, GoldenFailed, golden_files, plant_defect
from training.measuring.answers import ask
from training.progress import SilentReporter

_RULE = ScoreRule(kind="top_fraction_mean", fraction=TOP_FRACTION)


def _chooser(**policy):
    tolerance = GoldenRule(map_tolerance=0.01, score_tolerance=0.01)
    return GoldenChooser(
        make_runner(make_graph()), "bottle", 0, make_policy(**policy), _RULE, make_input(), tolerance, seed=0
    )


def _answers(samples):
    return ask(make_runner(make_graph()), samples, make_input(), SilentReporter(), title="frames")


def _verdicts(frames):
    return [str(frame.verdict) for frame in frames]


def test_choose_when_defects_exist_then_half_the_set_is_real_defects(tmp_path):
    """Good and defective frames share the set, with the verdicts that the policy gives."""
    dataset = read_dataset(write_line(tmp_path))

    frames = _chooser().choose(_answers(dataset.train_good[:20]), _answers(dataset.test), 4)

    assert _verdicts(frames) == ["PASS", "PASS", "FAIL", "FAIL"]


def test_choose_when_the_line_has_no_defects_then_one_is_planted(tmp_path):
    """A device is asked for a verdict that is not PASS even where no defect was ever photographed."""
    dataset = read_dataset(write_line(tmp_path, tested=False))

    frames = _chooser().choose(_answers(dataset.train_good[:20]), None, 4)

    assert _verdicts(frames)[-1] in {"REVIEW", "FAIL"}
    assert "planted" in frames[-1].description


def test_choose_when_scores_lie_near_a_threshold_then_those_frames_are_passed_over(tmp_path):
    """Either verdict would be right for them on another device; without any other frame the choice fails."""
    good = _answers(read_dataset(write_line(tmp_path, tested=False)).train_good[:20])
    middle = float(np.median(good.scores))

    # At this magnitude of the fail threshold every score lies within its tolerance, planted defects included.
    with pytest.raises(GoldenFailed):
        _chooser(review_threshold=middle, fail_threshold=100.0, region_threshold=9.0).choose(good, None, 4)


@pytest.mark.parametrize(("clearance", "is_clear"), [(1.5, False), (2.5, True)])
@pytest.mark.parametrize("near", ["review", "fail"])
def test_take_when_a_score_lies_below_a_threshold_then_twice_the_tolerance_must_lie_between(near, clearance, is_clear):
    """A device may be off by the tolerance, which is a share of the fail threshold, and must find the same verdict."""
    frames = [(make_frame(), "a good part")]
    score = _chooser().take(frames, is_calibrated=True)[0].score
    distance = clearance * 0.01  # in fail thresholds
    thresholds = {"review_threshold": score + 0.2 * distance}
    if near == "fail":
        thresholds = {"review_threshold": score / 2, "fail_threshold": score / (1 - distance)}
    chooser = _chooser(**thresholds)

    if is_clear:
        assert _verdicts(chooser.take(frames, is_calibrated=True)) == ["PASS" if near == "review" else "REVIEW"]
    else:
        with pytest.raises(GoldenFailed):
            chooser.take(frames, is_calibrated=True)


def test_choose_when_every_defect_passes_then_a_planted_one_takes_the_place_of_the_last(tmp_path):
    """A device is asked for another verdict than PASS also where the detector finds none of the defects."""
    good = _answers(read_dataset(write_line(tmp_path, tested=False)).train_good[:20])
    missed = replace(good, samples=tuple(replace(s, split="test", label=1, kind="haze") for s in good.samples))

    frames = _chooser().choose(good, missed, 4)

    assert _verdicts(frames[:3]) == ["PASS"] * 3
    assert _verdicts(frames[3:]) in (["REVIEW"], ["FAIL"])
    assert [frame.description.split()[-1] for frame in frames] == ["part", "part", "haze", "defect"]


def test_choose_when_frames_are_huge_then_they_are_stored_small(tmp_path):
    """A bundle stays small enough to be held in memory, and its answers are those of the stored frame."""
    path = tmp_path / "huge.png"
    path.write_bytes(encode(make_frame(800, 900)))

    frames = _chooser().choose(_answers([Sample(path, "train", 0, "good")]), None, 2)

    frame = decode_image(frames[0].png, FrameLimits())
    assert frame.height * frame.width <= 9 * 32 * 48 * 1.5
    assert "PASS" in _verdicts(frames)


def test_golden_files_when_lines_have_frames_then_keep_whose_they_are(tmp_path):
    """All lines share the files; each answer names its line."""
    chooser = _chooser()
    good = _answers(read_dataset(write_line(tmp_path, tested=False)).train_good[:20])
    frames = [*chooser.choose(good, None, 2), *replace(chooser, line="cap").choose(good, None, 2)]

    files = golden_files(frames)

    answers = json.loads(files[GOLDEN_FILE])
    assert [answer["line"] for answer in answers] == ["bottle", "bottle", "cap", "cap"]
    assert [files[answer["file"]] for answer in answers] == [frame.png for frame in frames]


def test_plant_defect_when_strength_grows_then_more_changes_and_the_frame_stays(tmp_path):
    """The planted defect is seeded, visible, and leaves the good frame as it was."""
    good = make_frame()
    before = good.copy()

    weak, strong, again = (plant_defect(good, np.random.default_rng(3), s) for s in (0.1, 1.0, 1.0))

    changed = [int((planted != good).any(axis=2).sum()) for planted in (weak, strong)]
    assert 0 < changed[0] < changed[1]
    np.testing.assert_array_equal(strong, again)
    np.testing.assert_array_equal(good, before)
