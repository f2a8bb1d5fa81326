"""Promises of asking: answers depend on the frames alone, and a few frames stand for all scores."""

import hashlib

import numpy as np
import pytest

from service.errors import UnreadableFrame
from tests.factories import encode, make_frame, make_graph, make_input, make_runner
from tests.tiny_line import write_line
from training.data.detect import read_dataset
from training.data.samples import DatasetFault, Sample
from training.measuring.answers import ask, spread
from training.progress import SilentReporter


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


def test_ask_when_a_frame_changed_since_it_was_checked_then_refuses_it_by_name(tmp_path):
    """Thresholds and figures are of the frames that the manifest names."""
    path = tmp_path / "part.png"
    path.write_bytes(encode(make_frame()))

    with pytest.raises(DatasetFault, match=r"part\.png has changed since this command checked it"):
        _ask([Sample(path, "test", 0, "good")], content={path: hashlib.sha256(b"another frame").hexdigest()})


def test_spread_when_asked_for_a_few_then_they_cover_all_scores(tmp_path):
    """The first is the median, and all frames come, each once."""
    answers = _ask(read_dataset(write_line(tmp_path)).test)

    order = spread(answers)

    by_score = [answers.samples[i] for i in np.argsort(answers.scores, kind="stable")]
    assert order[0] == by_score[len(by_score) // 2]
    assert {sample.kind for sample in order[:3]} == {"good", "square"}
    assert sorted(order, key=lambda s: s.path) == sorted(by_score, key=lambda s: s.path)
