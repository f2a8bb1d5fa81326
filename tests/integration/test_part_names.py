"""A part that has no verdict is found by the name that its caller gave it: in the answer, and in the log."""

import hashlib
import json
import logging
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.observability.log import JsonLines
from service.schemas import ProblemDocument
from service.settings import Settings
from tests.factories import encode, make_bundle, make_frame
from tests.servers import serve_in_thread, wait_until_ready

INSPECT = "/v1/lines/demo_line/inspect"
NAMES = {"part_id": "0815", "view": "top", "sequence": 7}
HEADERS = {"Content-Type": "image/png", "X-Part-Id": "0815", "X-View": "top", "X-Sequence": "7"}
GOOD = encode(make_frame())
CUT = GOOD[:-40]
JUDGE = {"bundle_version", "bundle_digest", "policy_version", "policy_digest"}
FRAMES = {"name": "encoded_frames", "shape": [1], "datatype": "BYTES", "parameters": {"content_type": "base64"}}
ENCODED = {"inputs": [FRAMES | {"data": [b64encode(CUT).decode()]}]}


@pytest.fixture(scope="module")
def http(tmp_path_factory) -> Iterator[httpx.Client]:
    """A ready server in a thread, where a body may hold two frames."""
    make_bundle(tmp_path_factory.getbasetemp() / "store")
    settings = Settings(store_directory=tmp_path_factory.getbasetemp() / "store", max_frames_per_request=2)
    with serve_in_thread(settings) as client:
        wait_until_ready(client)
        yield client


@pytest.fixture
def logged(http, caplog):
    """Return the lines of frames without a verdict, as they stand in the log once counts were asked for."""

    def lines() -> list[dict[str, Any]]:
        http.get("/metrics")
        written = (json.loads(JsonLines().format(record)) for record in caplog.records)
        return [line for line in written if line.get("verdict") == "NO_VERDICT"]

    with caplog.at_level(logging.INFO, "flawline.inspections"):
        yield lines


def _names_in(document: dict[str, Any]) -> dict[str, Any]:
    return {name: document[name] for name in NAMES if name in document}


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"content": CUT}, "unreadable_frame", NAMES),
        ({"url": "/v1/lines/unheard_of/inspect"}, "unknown_line", NAMES),
        ({"params": {"policy": "unheard_of"}}, "unknown_policy", NAMES),
        ({"headers": {"Content-Type": "text/plain"}}, "media_type_not_allowed", NAMES),
        ({"headers": {"X-Deadline-Ms": "0.001"}}, "overloaded", NAMES),
        ({"headers": {"X-Deadline-Ms": "soon"}}, "parameter_invalid", NAMES),
        ({"headers": {"X-Request-Id": "two words"}}, "parameter_invalid", NAMES),
        ({"content": CUT, "params": {"part_id": "0816"}}, "unreadable_frame", NAMES | {"part_id": "0816"}),
        ({"headers": {"X-Part-Id": '"0815"'}}, "parameter_invalid", {"view": "top", "sequence": 7}),
        ({"headers": {"X-Sequence": "-1"}}, "parameter_invalid", {"part_id": "0815", "view": "top"}),
        (
            {"headers": [*HEADERS.items(), ("X-View", "left")]},
            "parameter_invalid",
            {"part_id": "0815", "sequence": 7},
        ),
        ({"url": f"{INSPECT}?view=top&view=left"}, "parameter_invalid", {"part_id": "0815", "sequence": 7}),
        ({"url": f"{INSPECT}-batch"}, "media_type_not_allowed", NAMES),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_problem_when_the_part_was_named_then_answer_and_log_name_it(http, logged, change, code, named):
    """Whatever is wrong, each name that is given once and fits comes back; one that is not does not."""
    headers = change.get("headers", {})
    request = {"url": INSPECT, "content": GOOD} | change
    request["headers"] = headers if isinstance(headers, list) else HEADERS | headers

    answer = http.post(**request)

    [line] = logged()
    document = answer.json()
    assert (document["code"], document["verdict"]) == (code, "NO_VERDICT")
    assert ProblemDocument.model_validate(document, extra="forbid")
    assert _names_in(document) == named
    assert (_names_in(line), line["code"], line["request_id"]) == (named, code, document["request_id"])


def test_problem_when_nothing_was_named_then_no_name_stands_there(http, logged):
    """Members are left out, and not null, as `line` is."""
    answer = http.post(INSPECT, content=CUT, headers={"Content-Type": "image/png"})

    assert _names_in(answer.json()) == {}
    assert [_names_in(line) for line in logged()] == [{}]


def test_batch_when_one_frame_has_no_verdict_then_it_is_named_by_its_own_number(http, logged):
    """The numbers of a batch count on from the first one's, whether a frame has a verdict or not."""
    files = [("frames", ("1.png", GOOD, "image/png")), ("frames", ("2.png", CUT, "image/png"))]
    headers = {name: value for name, value in HEADERS.items() if name != "Content-Type"}

    good, bad = http.post(f"{INSPECT}-batch", files=files, headers=headers).json()["items"]

    assert (good["verdict"], bad["verdict"]) == ("PASS", "NO_VERDICT")
    assert (_names_in(good), _names_in(bad)) == (NAMES, NAMES | {"sequence": 8})
    assert [_names_in(line) for line in logged()] == [NAMES | {"sequence": 8}]


@pytest.mark.parametrize(
    ("change", "members"),
    [
        ({"content": CUT}, JUDGE | {"frame_digest"}),
        ({"headers": {"X-Deadline-Ms": "0.001"}}, JUDGE),
        ({"url": "/v1/lines/unheard_of/inspect"}, set()),
        ({"params": {"policy": "unheard_of"}}, set()),
        ({"url": f"{INSPECT}-batch", "files": {"frames": ("1.png", CUT, "image/png")}}, JUDGE | {"frame_digest"}),
        ({"url": "/v2/models/demo_line/infer", "json": ENCODED}, JUDGE | {"frame_digest"}),
    ],
    ids=["unreadable", "no time", "no line", "no policy", "batch", "v2"],
)
def test_log_when_a_frame_has_no_verdict_then_says_which_frame_and_what_was_to_judge_it(http, logged, change, members):
    """Whoever asks why a part was stopped can tell the frame that is kept, and the version that could not judge it."""
    judged = http.post(INSPECT, content=GOOD, headers={"Content-Type": "image/png"}).json()
    body = {} if change.keys() & {"files", "json"} else {"content": GOOD, "headers": {"Content-Type": "image/png"}}
    request = {"url": INSPECT} | body | {name: value for name, value in change.items() if name != "headers"}
    request["headers"] = request.get("headers", {}) | change.get("headers", {})

    http.post(**request)

    [line] = logged()
    expected = {
        "bundle_version": judged["bundle"]["version"],
        "bundle_digest": judged["bundle"]["digest"],
        "policy_version": judged["policy"]["version"],
        "policy_digest": judged["policy"]["digest"],
        "frame_digest": hashlib.sha256(CUT).hexdigest(),
    }
    assert {name: line[name] for name in expected if name in line} == {name: expected[name] for name in members}


def test_infer_when_frames_have_no_verdict_then_the_log_names_each_part(http, logged):
    """The protocol's own form of a fault has no place for names, and the log has."""
    frames = [
        {"name": "encoded_frames", "shape": [2], "datatype": "BYTES", "data": ["", ""]},
        {"name": "part_id", "shape": [2], "datatype": "BYTES", "data": ["0815", ""]},
    ]

    answer = http.post("/v2/models/demo_line/infer", json={"inputs": frames})

    assert (answer.status_code, list(answer.json())) == (400, ["error"])
    assert [_names_in(line) for line in logged()] == [{"part_id": "0815"}, {}]
