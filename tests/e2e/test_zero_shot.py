"""A line without training frames on a real server: refused, measured by itself, and in the end calibrated."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from service.contract.bundle import load_bundle
from tests.factories import (
    FRAME_HEIGHT,
    FRAME_WIDTH,
    encode,
    make_bundle,
    make_frame,
    make_self_policy,
    network_of,
    write_files,
    write_policy,
)
from tests.servers import ServerProcess
from tests.tiny_line import TINY_GRNR
from training.__main__ import commands

INSPECT = "/v1/lines/demo_line/inspect"
PNG = {"Content-Type": "image/png"}
GOOD = encode(make_frame())
DEFECT = encode(make_frame(defect=True))
FLAT = encode(np.zeros((FRAME_HEIGHT, FRAME_WIDTH, 3), np.uint8))
SELF = make_self_policy(version="by_itself")


def _invoke(*arguments):
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of a line that nobody calibrated; one of its policies measures frames by themselves."""
    store = tmp_path_factory.mktemp("store")
    write_policy(store, SELF, network_of(make_bundle(store, calibrated=False)))
    with ServerProcess(store) as running:
        yield running.ready()


@pytest.mark.parametrize("frame", [GOOD, DEFECT, FLAT], ids=["good", "defect", "flat"])
def test_line_when_nobody_calibrated_it_then_every_frame_is_refused_with_what_to_do(server, frame):
    """The server is up and the line is proved, but no frame gets a verdict, and the sentence says how to get one."""
    answer = server.http.post(INSPECT, content=frame, headers=PNG)

    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["verdict"]) == (503, "line_not_calibrated", "NO_VERDICT")
    assert "flawline calibrate" in problem["detail"]
    assert "line_not_calibrated" in server.http.get("/metrics").text
    live = server.line("demo_line")
    assert (live["state"], live["live"]["calibration"]) == ("ready", "none")
    assert live["reason"] == problem["detail"]


@pytest.mark.parametrize(("frame", "verdict"), [(GOOD, "PASS"), (DEFECT, "FAIL")], ids=["good", "defect"])
def test_line_when_its_policy_says_self_then_answers_and_says_so(server, frame, verdict):
    """A verdict without good parts names its calibration, has no p-value, and its thresholds are the policy's."""
    answer = server.http.post(INSPECT, content=frame, headers=PNG, params={"policy": "by_itself"})

    told = answer.json()
    assert (answer.status_code, told["verdict"], told["calibration"]) == (200, verdict, "self")
    assert told["p_value"] is None
    assert told["thresholds"] == {"review": 6.0, "fail": 8.0}
    assert (told["score"] >= 8.0) == (verdict == "FAIL")
    assert all(region["peak"] >= 6.0 for region in told["regions"])


def test_line_when_its_policy_says_self_then_a_flat_frame_is_refused(server):
    """A covered lens is no good part, even where nothing but the frame itself is there to compare with."""
    answer = server.http.post(INSPECT, content=FLAT, headers=PNG, params={"policy": "by_itself"})

    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["verdict"]) == (400, "frame_not_comparable", "NO_VERDICT")


def test_evaluate_when_a_test_frame_is_flat_then_the_others_are_measured_and_it_is_counted(tmp_path):
    """Whoever tries a line with its own frames learns of the covered lens, and of all other frames as well."""
    bundle = make_bundle(tmp_path / "store", calibrated=False, policy=dict(SELF))
    frames = {"test/good/0.png": GOOD, "test/good/1.png": FLAT, "test/square/0.png": DEFECT}
    write_files(tmp_path / "line", {"train/good/0.png": encode(make_frame(seed=7)), **frames})

    result = _invoke("evaluate", bundle, tmp_path / "line", "--output", tmp_path / "figures.json")

    assert result.exit_code == 0, result.output
    assert "1 of the 3 test frames are flat and have no score" in " ".join(result.output.split())
    assert "test/good/1.png" in "".join(result.output.split())
    told = json.loads((tmp_path / "figures.json").read_text())
    assert [told["data"][key] for key in ("normal", "anomalous", "without_score")] == [2, 1, 1]
    assert told["verdicts"]["good"] == {"PASS": 1, "REVIEW": 0, "FAIL": 0, "NO_VERDICT": 1}
    assert told["figures"]["i_auroc"]["value"] == 1.0


def test_picture_when_a_frame_is_measured_by_itself_then_its_headers_say_so(server):
    """An answer that is a picture names the calibration in its headers, and no p-value."""
    headers = {**PNG, "Accept": "image/png"}

    answer = server.http.post(INSPECT, content=DEFECT, headers=headers, params={"policy": "by_itself"})

    assert answer.headers["content-type"] == "image/png"
    assert (answer.headers["flawline-verdict"], answer.headers["flawline-calibration"]) == ("FAIL", "self")
    assert "flawline-p-value" not in answer.headers


def test_open_inference_when_a_frame_is_measured_by_itself_then_the_parameters_say_so(server):
    """Under /v2 the p-value is null, the calibration a parameter, and an uncalibrated policy still an error."""
    pixels = make_frame(32, 48, defect=True)
    inputs = [{"name": "frames", "datatype": "UINT8", "shape": [1, 32, 48, 3], "data": pixels.ravel().tolist()}]

    by_itself = server.http.post(
        "/v2/models/demo_line/infer", json={"inputs": inputs, "parameters": {"policy": "by_itself"}}
    )
    refused = server.http.post("/v2/models/demo_line/infer", json={"inputs": inputs})

    told = by_itself.json()
    outputs = {output["name"]: output["data"] for output in told["outputs"]}
    assert told["parameters"]["calibration"] == "self"
    assert (outputs["verdict"], outputs["p_value"]) == (["FAIL"], [None])
    assert refused.status_code == 503
    assert "not calibrated" in refused.json()["error"]


def test_export_when_a_line_is_new_then_the_server_takes_it_and_calibrating_it_makes_it_ordinary(tmp_path):
    """From the command line: exported by name, served and refused, calibrated with good parts, served with verdicts."""
    config, good, store = tmp_path / "tiny.yaml", tmp_path / "good", tmp_path / "store"
    config.write_text(json.dumps(TINY_GRNR))
    good.mkdir()
    for index in range(24):
        (good / f"{index:02d}.png").write_bytes(encode(make_frame(seed=index)))

    options = ("--store", store, "--config", config, "--weights", "untrained", "--name", "demo_line")
    exported = _invoke("export", "grnr", "--product", "texture", *options)
    assert exported.exit_code == 0, exported.output
    first = Path(re.search(r"bundle: (\S+)", exported.output)[1])
    with ServerProcess(store) as server:
        refused = server.ready().http.post(INSPECT, content=GOOD, headers=PNG)
    calibrated = _invoke("calibrate", first, good)
    assert calibrated.exit_code == 0, calibrated.output
    with ServerProcess(store) as server:
        answer = server.ready().http.post(INSPECT, content=GOOD, headers=PNG)

    assert refused.json()["code"] == "line_not_calibrated"
    told = answer.json()
    assert (told["bundle"]["version"], told["calibration"]) == ("2", "good_parts")
    assert 0 < told["p_value"] <= 1
    assert load_bundle(first).manifest.by_line["demo_line"].is_calibrated is False


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("grnr", "--product", "texture"), "add --name"),
        (("grnr", "--name", "leather"), "say so with --product texture"),
        (("grnr", "--name", "board", "--product", "object"), "take another detector"),
        (("grnr", "--name", "leather", "--fail-rate", "0.1"), "give them to flawline calibrate"),
        (("grnr", "--name", "leather", "--roi", "mask.png"), "give it to flawline calibrate"),
        (("runs/none", "--calibration", "self"), "--calibration belong to a zero-shot export"),
        (("runs/none", "--zero-shot", "--name", "new"), "is not the directory of a run"),
        (("inp_former", "--name", "leather", "--weights", "untrained"), "has to be fitted"),
    ],
    ids=["no name", "no product", "an object", "rates", "a region", "no zero-shot", "no run", "to be fitted"],
)
def test_export_when_it_can_not_be_then_says_what_to_do_and_writes_nothing(tmp_path, arguments, sentence):
    """Every wrong call ends in one sentence and exit code 2, before any network is exported."""
    ended = _invoke("export", *arguments, "--store", tmp_path / "store")

    assert ended.exit_code == 2
    assert sentence in " ".join(ended.output.split())
    assert not (tmp_path / "store").exists()
