"""A network of several lines over HTTP: the line in the address chooses thresholds, index and figures."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from service.contract.bundle import Bundle, load_bundle
from service.settings import Settings
from tests.factories import HEIGHT, WIDTH, encode, make_bundle, make_frame, make_line_record, make_runner
from tests.servers import serve_in_thread, wait_until_ready

STRICT, PATIENT = "strict", "patient"
PIXELS = make_frame(HEIGHT, WIDTH, seed=5)
PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A store with one bundle of two lines: the first fails what the second lets pass."""
    store = tmp_path_factory.mktemp("store")
    make_bundle(
        store,
        "pair",
        "7",
        lines=(STRICT, PATIENT),
        conditional=True,
        policies={STRICT: {"review_threshold": 0.001, "fail_threshold": 0.002}},
        by_line={
            STRICT: make_line_record(fail_rate=0.01, metrics={}),
            PATIENT: make_line_record(),
        },
    )
    return store


@pytest.fixture(scope="module")
def bundle(store) -> Bundle:
    """The bundle of both lines."""
    return load_bundle(store / "pair/7")


@pytest.fixture(scope="module")
def http(store) -> Iterator[httpx.Client]:
    """A ready server in a thread."""
    with serve_in_thread(Settings(store_directory=store, default_deadline_s=10)) as client:
        wait_until_ready(client)
        yield client


def _score(bundle, line):
    scores, _ = make_runner(bundle.model)(PIXELS[None], np.array([bundle.manifest.lines.index(line)], np.int64))
    return float(scores[0])


def _infer(http, model):
    tensor = {"name": "frames", "datatype": "UINT8", "shape": [1, HEIGHT, WIDTH, 3], "data": PIXELS.ravel().tolist()}
    return http.post(f"/v2/models/{model}/infer", json={"inputs": [tensor]})


@pytest.mark.parametrize(("line", "verdict"), [(STRICT, "FAIL"), (PATIENT, "PASS")])
def test_inspect_when_lines_share_a_network_then_the_address_chooses_thresholds_index_and_calibration(
    http, bundle, line, verdict
):
    """The same bytes get the score, verdict, thresholds and p-value of the line that they were sent to."""
    answer = http.post(f"/v1/lines/{line}/inspect", content=encode(PIXELS), headers=PNG).json()

    assert (answer["line"], answer["verdict"]) == (line, verdict)
    assert answer["score"] == pytest.approx(_score(bundle, line), rel=1e-5)
    assert answer["thresholds"]["fail"] == bundle.policies[line].fail_threshold
    assert answer["p_value"] == bundle.calibrations[line].p_value(answer["score"])


@pytest.mark.parametrize(("line", "verdict"), [(STRICT, "FAIL"), (PATIENT, "PASS")])
def test_infer_when_lines_share_a_network_then_the_model_is_the_line(http, bundle, line, verdict):
    """A client of the protocol names a line as its model, and gets that line's index, thresholds and p-value."""
    answer = _infer(http, line).json()

    given = {output["name"]: output["data"] for output in answer["outputs"]}
    assert (answer["model_name"], answer["model_version"]) == (line, "7")
    assert given["verdict"] == [verdict]
    assert given["score"] == pytest.approx([_score(bundle, line)], rel=1e-5)
    assert given["p_value"] == pytest.approx([bundle.calibrations[line].p_value(given["score"][0])])


def test_infer_when_a_bundle_of_several_lines_is_named_itself_then_there_is_no_such_model(http):
    """No line's thresholds are guessed for a bundle that has several."""
    answer = _infer(http, "pair")

    assert answer.status_code == 404
    assert "error" in answer.json()


def test_frame_when_the_network_was_never_fitted_on_its_line_then_gets_no_other_lines_verdict(http):
    """An unknown class ends in 404 on both ways in, without a verdict."""
    answer = http.post("/v1/lines/unseen/inspect", content=encode(PIXELS), headers=PNG)

    assert (answer.status_code, answer.json()["verdict"]) == (404, "NO_VERDICT")
    assert _infer(http, "unseen").status_code == 404


def test_infer_when_the_caller_gives_an_index_of_its_own_then_is_refused(http):
    """The address alone says which line a frame shows, so an index out of range never reaches the network."""
    tensor = {"name": "frames", "datatype": "UINT8", "shape": [1, HEIGHT, WIDTH, 3], "data": PIXELS.ravel().tolist()}
    index = {"name": "line_index", "datatype": "INT64", "shape": [1], "data": [0]}

    answer = http.post(f"/v2/models/{PATIENT}/infer", json={"inputs": [tensor, index]})

    assert answer.status_code == 400
    assert "this model takes encoded_frames, frames, part_id" in answer.json()["error"]


def test_models_when_a_bundle_serves_several_lines_then_are_listed_and_counted_by_line(http):
    """The index has a model a line, all of the bundle's version, and each counts its own frames."""
    listed = http.post("/v2/repository/index").json()
    before = {line: _successes(http, line) for line in (STRICT, PATIENT)}
    _infer(http, STRICT)

    assert [(model["name"], model["version"], model["state"]) for model in listed] == [
        (PATIENT, "7", "READY"),
        (STRICT, "7", "READY"),
    ]
    assert _successes(http, STRICT) == before[STRICT] + 1
    assert _successes(http, PATIENT) == before[PATIENT]


def _successes(http, model):
    [told] = http.get(f"/v2/models/{model}/stats").json()["model_stats"]
    return told["inference_stats"]["success"]["count"]


def test_line_when_it_shares_a_bundle_then_tells_thresholds_and_figures_of_its_own(http, bundle):
    """What is told of a line is what it is judged by, not what its neighbour is."""
    told = {line: http.get(f"/v1/lines/{line}").json()["live"] for line in (STRICT, PATIENT)}

    for line, live in told.items():
        assert live["bundle"] == {"version": "7", "digest": bundle.digest}
        assert live["thresholds"]["fail"]["value"] == bundle.policies[line].fail_threshold
    assert told[STRICT]["metrics"] == {}
    assert list(told[PATIENT]["metrics"]) == ["image_auroc"]
