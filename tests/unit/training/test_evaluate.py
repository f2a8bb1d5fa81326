"""Promises of evaluation: the service's pixels and policy, and a reason for every figure that is not defined."""

import numpy as np
import pytest

from service.contract.policy import Verdict
from service.errors import UnreadableFrame
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
from tests.tiny_line import DEFECTS, TEST_GOOD, write_line
from training.data.detect import read_dataset
from training.data.samples import Sample
from training.evaluate import ask, evaluate, spread, to_records, without_test_frames
from training.progress import SilentReporter

_RULE = ScoreRule(kind="top_fraction_mean", fraction=TOP_FRACTION)


def _ask(samples, spec=None, **options):
    return ask(make_runner(make_graph()), samples, spec or make_input(), SilentReporter(), title="frames", **options)


def test_ask_when_batches_and_threads_change_then_answers_do_not(tmp_path):
    """Order, scores and maps depend on the frames alone."""
    samples = read_dataset(write_line(tmp_path)).test

    one, many = _ask(samples, batch_size=1, threads=1), _ask(samples, batch_size=4, threads=3)

    assert one.samples == many.samples == samples
    np.testing.assert_array_equal(one.scores, many.scores)
    np.testing.assert_array_equal(one.maps, many.maps)
    assert set(one.frame_sizes) == {(72, 80)}


def test_ask_when_a_frame_is_damaged_then_the_sentence_names_the_file(tmp_path):
    """Whoever reads the message knows which file to replace."""
    path = tmp_path / "broken.png"
    path.write_bytes(encode(make_frame())[:500])

    with pytest.raises(UnreadableFrame, match="broken"):
        _ask([Sample(path, "test", 0, "good")])


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


def test_evaluate_when_the_input_is_cropped_then_masks_are_cropped_alike(tmp_path):
    """Pixel figures are measured where the detector looked: a perfect map stays perfect under a crop."""
    spec = make_input(margin=8)
    answers = _ask(read_dataset(write_line(tmp_path)).test, spec)

    found = evaluate(answers, make_policy(), _RULE, spec)

    assert found.metrics["p_auroc"].value > 0.95


def test_evaluate_when_there_are_no_masks_then_pixel_figures_have_a_reason(tmp_path):
    """Image labels alone give image figures, and pixel figures that say why they are missing."""
    answers = _ask(read_dataset(write_line(tmp_path, masks=False)).test)

    found = evaluate(answers, make_policy(), _RULE, make_input())

    assert found.metrics["i_auroc"].value == 1.0
    assert found.metrics["aupro"].value is None
    assert "no masks" in found.metrics["aupro"].reason


def test_evaluate_when_there_are_good_frames_only_then_every_figure_has_a_reason(tmp_path):
    """Nothing is invented where no defect was shown."""
    answers = _ask([s for s in read_dataset(write_line(tmp_path)).test if s.kind == "good"])

    found = evaluate(answers, make_policy(), _RULE, make_input())

    assert all(metric.value is None and metric.reason for metric in found.metrics.values())
    assert all(record.value is None and record.reason for record in to_records(without_test_frames()).values())


def test_spread_when_asked_for_a_few_then_they_cover_all_scores(tmp_path):
    """The first is the median, and all frames come, each once."""
    answers = _ask(read_dataset(write_line(tmp_path)).test)

    order = spread(answers)

    by_score = [answers.samples[i] for i in np.argsort(answers.scores, kind="stable")]
    assert order[0] == by_score[len(by_score) // 2]
    assert {sample.kind for sample in order[:3]} == {"good", "square"}
    assert sorted(order, key=lambda s: s.path) == sorted(by_score, key=lambda s: s.path)
