"""Promises of the golden set: a device that answers otherwise than the validated one is found out in time."""

import io
import json
import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from service.contract.bundle import load_bundle
from service.contract.golden import read_golden, replay
from service.errors import BundleRefused, EngineFailed
from tests.factories import REFERENCE, make_bundle, make_graph, make_policy, make_runner, make_self_policy, reseal


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a valid bundle."""
    return make_bundle(tmp_path)


def replayed(folder, run=None):
    """Load a bundle and replay its golden set, on its own network unless told otherwise."""
    bundle = load_bundle(folder)
    replay(bundle, read_golden(bundle), run or make_runner(bundle.model))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin": 4},
        {"height": 16, "width": 64},
        {"lines": ("left", "right"), "conditional": True},
        {"policy": {"region_of_interest": (((0.0, 0.0), (0.4, 0.0), (0.4, 1.0), (0.0, 1.0)),)}},
        {"margin": 8, "policy": {"region_of_interest": (((0.4, 0.3), (0.9, 0.3), (0.9, 0.7), (0.4, 0.7)),)}},
    ],
    ids=["plain", "cropped", "wide", "two lines", "region of interest", "cropped region of interest"],
)
def test_replay_when_the_network_is_its_own_accepts(tmp_path, options):
    """A bundle's own network gives the answers that it was written with."""
    replayed(make_bundle(tmp_path, **options))


def test_golden_set_when_read_has_good_and_bad_answers(folder):
    """The set shows both verdicts, so that a network which always says the same is found out."""
    golden = read_golden(load_bundle(folder))

    assert [str(answer.verdict) for answer in golden.answers] == ["PASS", "PASS", "FAIL"]
    assert golden.anomaly_maps.shape == (3, 16, 24)
    assert golden.anomaly_maps.dtype == np.float32


@pytest.mark.parametrize("change", [0.001, -0.05, 0.3])
def test_replay_when_a_weight_was_changed_refuses_though_every_digest_is_in_order(folder, change):
    """Repaired digests do not help a network that is not the validated one; the refusal names the frame."""
    (folder / "model.onnx").write_bytes(make_graph(reference=REFERENCE + change))

    with pytest.raises(BundleRefused, match=r"golden/\d\.png gives another anomaly map"):
        replayed(reseal(folder))


def test_replay_when_a_conditional_network_is_asked_for_another_line_refuses(tmp_path):
    """A wrong line index is a wrong network."""
    folder = make_bundle(tmp_path, lines=("left", "right"), conditional=True)
    model = (folder / "model.onnx").read_bytes()

    run = make_runner(model)

    with pytest.raises(BundleRefused, match="anomaly map"):
        replayed(folder, lambda frames, line_index: run(frames, 1 - line_index))


def altered(folder, change):
    """Return the bundle's own network with its answers altered on the way out."""
    run = make_runner((folder / "model.onnx").read_bytes())

    def answer(frames, line_index):
        scores, maps = (values.copy() for values in run(frames, line_index))
        return change(scores, maps)

    return answer


def with_value(values, value):
    """Return an array whose last value is another."""
    values.flat[-1] = value
    return values


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda scores, maps: (scores, with_value(maps, math.nan)), "anomaly map"),
        (lambda scores, maps: (scores, with_value(maps, math.inf)), "anomaly map"),
        (lambda scores, maps: (with_value(scores, math.nan), maps), "score"),
        (lambda scores, maps: (with_value(scores, -math.inf), maps), "score"),
        (lambda scores, maps: (scores * np.float32(1.1), maps), "score"),
        (lambda scores, maps: (np.zeros_like(scores), maps), "score"),
        (lambda scores, maps: (scores, np.zeros_like(maps)), "anomaly map"),
        (lambda scores, maps: (scores, maps[:, ::-1]), "anomaly map"),
        (lambda scores, maps: (scores, maps[:, :1, :1]), "shape"),
        (lambda scores, maps: (scores, maps[0]), "shape"),
        (lambda scores, maps: (scores, maps[:0]), "shape"),
        (lambda scores, maps: (scores[:0], maps), "shape"),
    ],
)
def test_replay_when_a_device_answers_otherwise_refuses_and_says_in_what(folder, change, what):
    """Broken numbers, scaled scores, mirrored maps and wrong shapes never pass as the validated answer."""
    with pytest.raises(BundleRefused, match=f"another {what} on this device"):
        replayed(folder, altered(folder, change))


def test_replay_when_a_device_differs_by_less_than_the_rule_accepts(folder):
    """Other devices round otherwise; the manifest's rule says how far."""
    replayed(folder, altered(folder, lambda scores, maps: (scores + np.float32(1e-5), maps + np.float32(1e-5))))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("policy", [make_policy(), make_self_policy()], ids=["good parts", "self"])
def test_replay_when_scores_alone_differ_by_twice_the_rule_refuses(tmp_path, policy, sign):
    """The rule is a share of what raw scores are held against, whatever units the policy's thresholds are in."""
    folder = make_bundle(tmp_path, policy=policy.model_dump())
    highest = max(answer.score for answer in read_golden(load_bundle(folder)).answers)
    allowed = 1e-3 * (highest if policy.calibration == "self" else policy.fail_threshold)

    replayed(folder, altered(folder, lambda scores, maps: (scores + np.float32(0.5 * sign * allowed), maps)))
    with pytest.raises(BundleRefused, match="another score"):
        replayed(folder, altered(folder, lambda scores, maps: (scores + np.float32(2 * sign * allowed), maps)))


@pytest.mark.parametrize(("line", "refused"), [("loud", False), ("quiet", True)])
def test_replay_when_maps_of_lines_are_of_quite_different_sizes_holds_each_to_its_own(tmp_path, line, refused):
    """What is a rounding for one line is another network for its neighbour."""
    bundle = load_bundle(make_bundle(tmp_path, lines=("loud", "quiet")))
    golden = read_golden(bundle)
    run = make_runner(bundle.model)
    factors = np.float32([1000, 1])
    shown = [bundle.manifest.lines.index(answer.line) for answer in golden.answers]
    golden = replace(golden, anomaly_maps=golden.anomaly_maps * factors[shown, None, None])

    def answer(frames, line_index):
        scores, maps = run(frames)
        is_off = line_index == bundle.manifest.lines.index(line)
        return scores, maps * factors[line_index, None, None] + np.float32(0.05) * is_off[:, None, None]

    with pytest.raises(BundleRefused, match="another anomaly map") if refused else nullcontext():
        replay(bundle, golden, answer)


def test_replay_when_the_engine_fails_passes_the_failure_on(folder):
    """A device that can't answer is no device that answers otherwise."""

    def run(frames, line_index):
        raise EngineFailed("The device is gone.")

    with pytest.raises(EngineFailed, match="gone"):
        replayed(folder, run)


def test_replay_when_the_expected_verdict_is_another_refuses(folder):
    """Maps and scores may agree: the verdict must as well."""
    file = folder / "golden" / "expected.json"
    answers = json.loads(file.read_bytes())
    answers[0]["verdict"] = "REVIEW"
    file.write_text(json.dumps(answers))

    with pytest.raises(BundleRefused, match=r"golden/0\.png gives another verdict"):
        replayed(reseal(folder))


def rewritten(folder, change):
    """Let `change` edit the expected answers, and repair the digests."""
    file = folder / "golden" / "expected.json"
    answers = json.loads(file.read_bytes())
    file.write_text(json.dumps(change(answers)))
    return reseal(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda answers: answers[:0],
        lambda answers: answers[:2],
        lambda answers: [*answers, answers[0]],
        lambda answers: [answers[0] | {"file": "golden/9.png"}, *answers[1:]],
        lambda answers: [answers[0] | {"file": "report.html"}, *answers[1:]],
        lambda answers: [answers[0] | {"verdict": "GOOD"}, *answers[1:]],
        lambda answers: [answers[0] | {"score": None}, *answers[1:]],
        lambda answers: [answers[0] | {"extra": 1}, *answers[1:]],
        lambda answers: [answers[0] | {"line": "another"}, *answers[1:]],
        lambda answers: {"answers": answers},
    ],
    ids=["none", "fewer", "more", "unknown file", "no image", "verdict", "score", "extra", "line", "no list"],
)
def test_reading_when_the_answers_do_not_fit_is_refused(folder, change):
    """Answers without frames, frames without maps and fields that do not fit are refused."""
    bundle = load_bundle(rewritten(folder, change))

    with pytest.raises(BundleRefused, match="golden set"):
        read_golden(bundle)


def test_reading_when_a_line_of_the_bundle_has_no_frame_is_refused(tmp_path):
    """Each line is proved on its own: frames of one say nothing of another's index and thresholds."""
    folder = make_bundle(tmp_path, lines=("left", "right"))
    bundle = load_bundle(rewritten(folder, lambda answers: [answer | {"line": "left"} for answer in answers]))

    with pytest.raises(BundleRefused, match="golden set must have frames of every line"):
        read_golden(bundle)


def test_replay_when_lines_have_other_thresholds_judges_each_by_its_own(tmp_path):
    """The same network serves a strict line and a patient one, and neither is judged by the other's policy."""
    strict = {"review_threshold": 0.001, "fail_threshold": 0.002}
    folder = make_bundle(tmp_path, lines=("strict", "patient"), policies={"strict": strict})

    replayed(folder)

    golden = read_golden(load_bundle(folder))
    assert [(a.line, str(a.verdict)) for a in golden.answers[1:5]] == [
        ("strict", "FAIL"),
        ("strict", "FAIL"),
        ("patient", "PASS"),
        ("patient", "PASS"),
    ]


@pytest.mark.parametrize(
    "maps",
    [
        np.zeros((3, 24, 16), np.float32),
        np.zeros((3, 16, 24), np.float64),
        np.full((3, 16, 24), np.nan, np.float32),
        np.array([{}], dtype=object),
    ],
    ids=["turned", "float64", "nan", "pickled"],
)
def test_reading_when_the_maps_do_not_fit_is_refused(folder, maps):
    """Maps of another shape, type or of no numbers are refused, and objects are never unpickled."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, anomaly_maps=maps)
    (folder / "golden" / "maps.npz").write_bytes(buffer.getvalue())
    bundle = load_bundle(reseal(folder))

    with pytest.raises(BundleRefused, match="golden set"):
        read_golden(bundle)
