"""Who may say what judges a frame: a camera's key sends frames, and the line's own version and policy judge them."""

import json
from base64 import b64encode
from collections.abc import Iterator

import httpx
import pytest
from typer.testing import CliRunner

from service.app import create_app
from service.client import Client, EncodedFrame
from service.commands.client import commands
from service.contract.policy import Verdict
from service.settings import Settings
from tests.callers import ADMIN, CAMERA, OTHER_QUALITY, QUALITY, write_keys
from tests.factories import encode, make_bundle, make_frame, make_policy, network_of, write_policy
from tests.fakes import in_loop
from tests.servers import serve_in_thread, wait_until, wait_until_ready

INSPECT = "/v1/lines/demo_line/inspect"
PNG = {"Content-Type": "image/png"}
GOOD, DEFECT = encode(make_frame()), encode(make_frame(defect=True))

OTHERS = [
    pytest.param("lax", None, id="policy"),
    pytest.param(None, "1", id="version"),
    pytest.param("1", "1", id="version and its policy"),
    pytest.param("lax", "2", id="policy of the live version"),
    pytest.param("lax", "1", id="both"),
]
LIVE = [
    pytest.param(None, None, id="nothing"),
    pytest.param("1", None, id="policy"),
    pytest.param(None, "2", id="version"),
    pytest.param("1", "2", id="both"),
]


@pytest.fixture(scope="module")
def http(tmp_path_factory) -> Iterator[httpx.Client]:
    """A server with keys; version 2 of its line is live, 1 is kept, and a policy `lax` lets everything pass."""
    place = tmp_path_factory.mktemp("chosen")
    network = network_of(make_bundle(place / "store"))
    write_policy(place / "store", make_policy(version="lax", review_threshold=100.0, fail_threshold=200.0), network)
    settings = Settings(store_directory=place / "store", keys_file=write_keys(place), store_poll_s=0.05)
    with serve_in_thread(settings) as client:
        wait_until_ready(client)
        make_bundle(place / "store", version="2")

        def live():
            return client.get("/v1/lines/demo_line", headers=ADMIN).json()["live"]["bundle"]["version"]

        wait_until(lambda: live() == "2", "the new version")
        yield client


def one(http, key, policy, version):
    """Send a defect as the body of a request, and return status and answer."""
    wishes = {"X-Policy": policy, "X-Bundle-Version": version}
    headers = PNG | key | {name: value for name, value in wishes.items() if value is not None}
    answer = http.post(INSPECT, content=DEFECT, headers=headers)
    return answer.status_code, answer.json()


def one_by_query(http, key, policy, version):
    """Send a defect, and what is wished in the address."""
    wishes = {"policy": policy, "bundle_version": version}
    asked = {name: value for name, value in wishes.items() if value is not None}
    answer = http.post(INSPECT, content=DEFECT, headers=PNG | key, params=asked)
    return answer.status_code, answer.json()


def several(http, key, policy, version):
    """Send a defect as one of a form's files, and return the status and the answer to it."""
    wishes = {"X-Policy": policy, "X-Bundle-Version": version}
    headers = key | {name: value for name, value in wishes.items() if value is not None}
    answer = http.post(f"{INSPECT}-batch", files=[("frames", ("a.png", DEFECT, "image/png"))], headers=headers)
    told = answer.json()
    return answer.status_code, told["items"][0] if answer.status_code == 200 else told


def under_v2(http, key, policy, version):
    """Send a defect by the Open Inference Protocol, and return its answer in the form of the others."""
    place = "" if version is None else f"/versions/{version}"
    frames = {"name": "encoded_frames", "shape": [1], "datatype": "BYTES", "data": [b64encode(DEFECT).decode()]}
    frames["parameters"] = {"content_type": "base64"}
    body = {"inputs": [frames], "parameters": {} if policy is None else {"policy": policy}}
    answer = http.post(f"/v2/models/demo_line{place}/infer", json=body, headers=key)
    told = answer.json()
    if answer.status_code != 200:
        return answer.status_code, {"code": "not_authorised", "detail": told["error"]}
    [verdict] = [output["data"][0] for output in told["outputs"] if output["name"] == "verdict"]
    judged_by = {"bundle": {"version": told["model_version"]}, "policy": {"version": told["parameters"]["policy"]}}
    return 200, {"verdict": verdict, **judged_by}


WAYS = pytest.mark.parametrize("send", [one, one_by_query, several, under_v2])


@WAYS
@pytest.mark.parametrize(("policy", "version"), OTHERS)
def test_choice_when_the_key_only_inspects_then_is_refused_with_what_to_do(http, send, policy, version):
    """A camera's key would otherwise hold a switch to PASS, wherever a policy on trial lies in the store."""
    status, told = send(http, CAMERA, policy, version)

    assert (status, told["code"]) == (403, "not_authorised")
    assert "'choose'" in told["detail"]
    assert told.get("verdict", "NO_VERDICT") == "NO_VERDICT"


@WAYS
@pytest.mark.parametrize(("policy", "version"), LIVE)
def test_choice_when_it_names_what_is_live_then_a_key_that_inspects_is_enough(http, send, policy, version):
    """Who insists on what judges anyway chooses nothing."""
    status, told = send(http, CAMERA, policy, version)

    assert (status, told["verdict"]) == (200, "FAIL")
    assert (told["bundle"]["version"], told["policy"]["version"]) == ("2", "1")


@WAYS
@pytest.mark.parametrize(("policy", "version"), OTHERS)
def test_choice_when_the_key_may_choose_then_judges_what_was_named(http, send, policy, version):
    """A quality manager asks what another version or policy would say."""
    status, told = send(http, QUALITY, policy, version)

    assert (status, told["verdict"]) == (200, "PASS" if policy == "lax" else "FAIL")
    assert (told["bundle"]["version"], told["policy"]["version"]) == (version or "2", policy or "1")


@WAYS
def test_choice_when_the_key_is_for_another_line_then_is_refused(http, send):
    """The right counts on the lines of the key alone."""
    assert send(http, OTHER_QUALITY, "lax", None)[0] == 403


@in_loop
async def test_choice_when_another_policy_becomes_live_before_the_frame_is_there_then_is_refused(tmp_path):
    """What was live when a request began is no back door to it once an administrator has turned away from it."""
    strict = make_policy(version="strict", review_threshold=0.0, fail_threshold=0.0)
    write_policy(tmp_path, strict, network_of(make_bundle(tmp_path)))
    app = create_app(Settings(store_directory=tmp_path, keys_file=write_keys(tmp_path)))
    registry = app.state.context.registry
    registry.load()

    async def frame():
        yield GOOD[:100]
        registry.activate_policy("demo_line", "strict")
        yield GOOD[100:]

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        answer = await http.post(INSPECT, content=frame(), headers=PNG | CAMERA | {"X-Policy": "1"})

    assert (answer.status_code, answer.json()["code"]) == (403, "not_authorised")
    registry.close()


def test_client_when_its_key_may_not_choose_then_has_no_verdict_and_says_why(http):
    """The part is stopped at once, without further tries, and the outcome says which right is missing."""
    with Client(str(http.base_url), CAMERA["X-API-Key"]) as client:
        outcome = client.inspect("demo_line", EncodedFrame(DEFECT, "image/png"), policy="lax")

    assert (outcome.verdict, outcome.tries) == (Verdict.NO_VERDICT, 1)
    assert outcome.problem is not None
    assert outcome.problem.code == "not_authorised"
    assert "'choose'" in outcome.problem.sentence


def test_inspect_command_when_its_key_may_not_choose_then_tells_why(http, tmp_path):
    """The person at the terminal reads the sentence of the server."""
    (tmp_path / "part.png").write_bytes(DEFECT)
    (tmp_path / "key").write_text(CAMERA["X-API-Key"])

    result = CliRunner().invoke(
        commands,
        [
            *("inspect", str(tmp_path / "part.png"), "--line", "demo_line", "--url", str(http.base_url)),
            *("--key-file", str(tmp_path / "key"), "--policy", "lax", "--json"),
        ],
    )

    told = json.loads(result.stdout)
    assert told["verdict"] == "NO_VERDICT"
    assert "'choose'" in result.stdout
