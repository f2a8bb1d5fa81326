"""One detector for several lines, from the command line to the server: every line keeps its own thresholds."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from service.contract.bundle import Bundle, load_bundle
from service.contract.golden import read_golden, replay
from service.engines.engine import EngineOutput
from service.engines.ort import OrtEngine
from service.settings import Settings
from tests.factories import make_runner
from tests.fakes import FakeEngine
from tests.servers import Side, serve_in_thread, wait_until, wait_until_ready
from tests.tiny_line import GOOD, TINY_RUN, write_line
from training.__main__ import commands
from training.measuring.answers import ask

CALM, ROUGH = "calm", "rough"
LONG_S = 600.0
# So many runs of the network are one run of a single frame: then two frames in one run always pay.
_DEAR_SINGLES = 40


def _invoke(*arguments):
    return CliRunner().invoke(commands, [*map(str, arguments), "--threads", "1"])


def _told(output, what):
    return Path(re.search(rf"^{what}: (\S+)", output, re.MULTILINE)[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two lines: smooth parts, and parts of a coarse texture in frames of another shape."""
    place = tmp_path_factory.mktemp("several")
    write_line(place / CALM)
    write_line(place / ROUGH, roughness=40, size=(60, 80))
    (place / "run.yaml").write_text(json.dumps(TINY_RUN))
    return place


@pytest.fixture(scope="module")
def asked() -> set[tuple[str, int]]:
    """Of which line the run showed frames, and as which line of the network."""
    return set()


@pytest.fixture(scope="module")
def trained(place, asked) -> str:
    """What the command said that fitted one detector on both lines."""
    torch.set_num_threads(1)
    named = [option for line in (CALM, ROUGH) for option in ("--line", f"{line}={place / line}")]

    def ask_and_note(*arguments, samples, line_index, **options):
        asked.update((sample.path.relative_to(place).parts[0], line_index) for sample in samples)
        return ask(*arguments, samples=samples, line_index=line_index, **options)

    with pytest.MonkeyPatch.context() as watched:
        watched.setattr("training.run.ask", ask_and_note)
        result = _invoke(
            *("train", *named, "--name", "pair", "--config", place / "run.yaml", "--weights", "untrained"),
            *("--store", place / "store", "--runs", place / "runs"),
        )
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def bundle(trained) -> Bundle:
    """The bundle of both lines."""
    return load_bundle(_told(trained, "bundle"))


def _pixels(place, line, number):
    return (place / line / "test/good" / f"{number:03d}.png").read_bytes()


def test_train_when_given_two_lines_then_the_bundle_keeps_thresholds_golden_frames_and_figures_of_each(bundle):
    """Both lines share a network, and nothing that turns its map into a verdict."""
    manifest, golden = bundle.manifest, read_golden(bundle)

    replay(bundle, golden, make_runner(bundle.model))

    assert (manifest.name, manifest.lines) == ("pair", (CALM, ROUGH))
    assert bundle.policies[CALM].fail_threshold < bundle.policies[ROUGH].review_threshold
    assert {answer.line for answer in golden.answers if answer.verdict == "FAIL"} == {CALM, ROUGH}
    assert {line: record.data.fitted_on for line, record in manifest.by_line.items()} == dict.fromkeys(
        (CALM, ROUGH), GOOD // 2
    )
    assert all(record.metrics["i_auroc"].value is not None for record in manifest.by_line.values())


def test_train_when_lines_are_measured_then_each_is_shown_as_itself(trained, asked):
    """A network that is told which line it sees is calibrated as what it will be asked, under the line's own index."""
    assert asked == {(CALM, 0), (ROUGH, 1)}


def test_train_when_frames_differ_in_size_then_says_so_once(trained):
    """Other sizes are allowed, and whoever fits on them knows."""
    assert trained.count("frames differ in size") == 1
    assert "rough 60x80 (aspect ratio 1.33)" in " ".join(trained.split())


def test_server_when_frames_of_two_lines_share_a_batch_then_each_gets_the_verdict_of_its_own_line(
    bundle, place, tmp_path
):
    """The very same frame passes on the rough line and fails on the calm one, side by side in one run."""
    shutil.copytree(bundle.path, tmp_path / "pair/1")  # other tests publish newer versions into the store of the run
    engine = FakeEngine(device="cpu")

    def open_engine(opened: Bundle) -> FakeEngine:
        network = OrtEngine(opened)

        def answer(frames) -> EngineOutput:
            runs = _DEAR_SINGLES if len(frames) == 1 else 1
            return [network.run(frames, np.zeros(len(frames), np.int64)) for _ in range(runs)][-1]

        engine.on_run = answer
        return engine

    def inspect(http, line):
        answer = http.post(
            f"/v1/lines/{line}/inspect", content=_pixels(place, ROUGH, 0), headers={"Content-Type": "image/png"}
        )
        return answer.json()

    patience = {"default_deadline_s": LONG_S, "max_deadline_s": LONG_S, "drain_timeout_s": LONG_S}
    settings = Settings(store_directory=tmp_path, runners=1, max_batch_size=2, stuck_after_s=LONG_S, **patience)
    with serve_in_thread(settings, open_engine) as http:
        wait_until_ready(http)
        engine.hold()
        runs = len(engine.batches)
        first = Side(lambda: inspect(http, CALM))
        wait_until(lambda: len(engine.batches) > runs, "the run")
        sides = {line: Side(lambda line=line: inspect(http, line)) for line in (CALM, ROUGH)}
        wait_until(lambda: 'flawline_queue_depth{engine="pair"} 3.0' in http.get("/metrics").text, "a queue")
        engine.release()
        answers = {line: side.answer() for line, side in sides.items()}
        assert first.answer()["verdict"] == "FAIL"

    assert sorted(engine.line_indices[-1]) == [0, 1]
    assert {line: answer["verdict"] for line, answer in answers.items()} == {CALM: "FAIL", ROUGH: "PASS"}
    assert answers[CALM]["score"] == pytest.approx(answers[ROUGH]["score"], rel=1e-5)
    for line, answer in answers.items():
        policy, calibration = bundle.policies[line], bundle.calibrations[line]
        assert answer["thresholds"] == {"review": policy.review_threshold, "fail": policy.fail_threshold}
        assert answer["p_value"] == calibration.p_value(answer["score"])


def test_evaluate_when_the_bundle_serves_several_lines_then_measures_the_named_one(bundle, place, tmp_path):
    """Good parts of the rough line pass by its own thresholds; without a name nothing is guessed."""
    figures = tmp_path / "figures.json"

    named = _invoke("evaluate", bundle.path, place / ROUGH, "--line", ROUGH, "--output", figures)
    nameless = _invoke("evaluate", bundle.path, place / ROUGH)
    stranger = _invoke("evaluate", bundle.path, place / ROUGH, "--line", "cap")

    assert named.exit_code == 0, named.output
    expected = bundle.manifest.by_line[ROUGH].metrics["i_auroc"].value
    assert json.loads(figures.read_text())["figures"]["i_auroc"]["value"] == pytest.approx(expected, abs=0.01)
    assert (nameless.exit_code, stranger.exit_code) == (2, 2)
    assert "serves calm, rough; name one of them with --line" in nameless.stderr
    assert "and not cap" in stranger.stderr


def test_calibrate_when_one_line_is_named_then_all_of_the_others_is_carried_over(bundle, place):
    """New good parts of one line change its thresholds, its golden verdicts and its figures, and no other's."""
    more = write_line(place / "more", good=GOOD + 24, tested=False, roughness=40, size=(60, 80))
    result = _invoke(
        *("calibrate", bundle.path, more / "train/good", "--line", ROUGH, "--fail-rate", "0.03"),
        *("--line-folder", place / ROUGH),
    )

    assert result.exit_code == 0, result.output
    again = load_bundle(_told(result.output, "bundle"))
    replay(again, read_golden(again), make_runner(again.model))
    assert again.model == bundle.model
    for name in ("policy.json", "calibration.npz"):
        assert again.files[f"lines/{CALM}/{name}"] == bundle.files[f"lines/{CALM}/{name}"]
        assert again.files[f"lines/{ROUGH}/{name}"] != bundle.files[f"lines/{ROUGH}/{name}"]
    assert again.manifest.by_line[CALM] == bundle.manifest.by_line[CALM]
    rough = again.manifest.by_line[ROUGH]
    assert (rough.fail_rate, rough.review_rate, rough.data.calibrated_on) == (0.03, 0.1, GOOD // 2 + 24)
    assert rough.data.calibration_frames.fitted_left_out == GOOD // 2
    kept = [answer.model_copy(update={"file": ""}) for answer in read_golden(again).answers if answer.line == CALM]
    before = [answer.model_copy(update={"file": ""}) for answer in read_golden(bundle).answers if answer.line == CALM]
    assert kept == before
    assert "carried over from version 1" in again.files["report.html"].decode()


def test_report_when_the_run_had_several_lines_then_has_a_section_of_each(trained, tmp_path):
    """The page is rendered again from what the run kept, with a contents list at its head."""
    result = CliRunner().invoke(
        commands, ["report", str(_told(trained, "run")), "--output", str(tmp_path / "page.html")]
    )

    assert result.exit_code == 0, result.output
    page = (tmp_path / "page.html").read_text("utf-8")
    assert re.findall(r'<a href="#line-\d">(\w+)</a>', page) == [CALM, ROUGH]
    assert page.count('class="line"') == 2


def test_export_when_the_run_had_several_lines_then_goes_on_from_its_one_fitting(trained, bundle):
    """Rates change for every line, and the network for none."""
    result = _invoke("export", _told(trained, "run"), "--review-rate", "0.2", "--fail-rate", "0.1")

    assert result.exit_code == 0, result.output
    again = load_bundle(_told(result.output, "bundle"))
    assert again.model == bundle.model
    assert all(again.policies[line].fail_threshold < bundle.policies[line].fail_threshold for line in (CALM, ROUGH))


def test_resume_when_the_lines_changed_places_then_refuses(trained, tmp_path):
    """A checkpoint belongs to its lines in their order, which is that of the network's indices."""
    run = _told(trained, "run")
    for file in (*run.glob("checkpoint*"), run / "run.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    request = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(request | {"lines": request["lines"][::-1]}))

    result = _invoke("train", "--resume", tmp_path)

    assert result.exit_code == 2
    assert "belongs to a run with another set of fitted frames" in result.stderr


def test_train_when_another_bundle_serves_a_line_then_refuses_before_fitting(bundle, place):
    """The service would refuse the second bundle after an hour of fitting; the command does at once."""
    result = _invoke(
        *("train", place / CALM, "--config", place / "run.yaml", "--weights", "untrained"),
        *("--store", place / "store", "--runs", place / "others"),
    )

    assert result.exit_code == 2
    assert "The bundle pair" in result.stderr
    assert "serves the line calm already" in result.stderr
    assert not list((place / "others").rglob("*.json"))
