"""Administration of a real process: on its own port, with its own keys, and no frame is the worse for it."""

import threading

import httpx
import pytest
from tritonclient.http import InferenceServerClient
from tritonclient.utils import InferenceServerException

from tests.callers import ADMIN, CAMERA, ONE_LINE, write_keys
from tests.factories import encode, make_bundle, make_frame, make_graph, make_policy, network_of, reseal, write_policy
from tests.servers import PATIENCE_S, ServerProcess, wait_until

INSPECT = "/v1/lines/demo_line/inspect"
PNG = {"Content-Type": "image/png"}
GOOD, DEFECT = encode(make_frame()), encode(make_frame(defect=True))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Return a server with two lines, its store, and a client of its administration."""
    folder = tmp_path_factory.mktemp("administered")
    store = folder / "store"
    make_bundle(store)
    make_bundle(store, "other_line")
    environment = {"FLAWLINE_ADMIN_PORT": "0", "FLAWLINE_KEYS_FILE": str(write_keys(folder))}
    with ServerProcess(store, environment) as server:
        server.ready()
        with httpx.Client(base_url=f"http://127.0.0.1:{server.admin_port}", timeout=PATIENCE_S) as admin:
            yield server, store, admin


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/lines"),
        ("GET", "/v1/bundles"),
        ("GET", "/v1/bundles/demo_line"),
        ("POST", "/v1/bundles/demo_line/activate?version=1"),
        ("POST", "/v1/bundles/demo_line/roll-back"),
        ("PUT", "/v1/bundles/demo_line/shadow?version=1"),
        ("DELETE", "/v1/bundles/demo_line/shadow"),
        ("POST", "/v1/lines/demo_line/policy?version=1"),
        ("POST", "/v1/lines/demo_line/load"),
        ("POST", "/v1/lines/demo_line/unload"),
        ("POST", "/v1/rescan"),
        ("POST", "/v2/repository/models/demo_line/load"),
        ("POST", "/v2/repository/models/demo_line/unload"),
    ],
)
def test_operation_when_the_key_does_not_cover_it_then_refused_and_never_on_the_port_of_the_frames(
    served, method, path
):
    """Without a key 401, with a camera's or another line's 403, and on the other port there is no such thing."""
    server, _, admin = served

    assert admin.request(method, path).status_code == 401
    assert admin.request(method, path, headers=CAMERA).status_code == 403
    if path not in ("/v1/lines", "/v1/bundles"):
        assert admin.request(method, path, headers=ONE_LINE).status_code == 403
    if path != "/v1/lines":  # which is another answer there
        assert server.http.request(method, path, headers=ADMIN).status_code in (403, 404, 405)
    assert admin.post(INSPECT, content=GOOD, headers=CAMERA | PNG).status_code == 404


def test_change_when_made_then_audited_and_described(served):
    """Who did what stands in the log, also where it was refused; answers and faults have their documented form."""
    server, store, admin = served
    make_bundle(store, "other_line", "2")

    changed = admin.post("/v1/bundles/other_line/activate?version=2", headers=ONE_LINE)
    unknown = admin.post("/v1/bundles/other_line/activate?version=9", headers=ADMIN)
    wrong = admin.post("/v1/bundles/other_line/activate?version=../1", headers=ADMIN)
    listed = admin.get("/v1/bundles", headers=ONE_LINE).json()["bundles"]

    assert [(one["version"], one["state"]) for one in changed.json()["versions"]] == [("1", "kept"), ("2", "live")]
    told = changed.json()
    assert (told.pop("remembered"), "FLAWLINE_STATE_DIRECTORY" in told.pop("why_forgotten")) == (False, True)
    assert listed == [told]
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_version")
    assert (wrong.status_code, wrong.json()["code"]) == (422, "parameter_invalid")
    told = [(e["by"], e["action"], e["outcome"]) for e in server.events() if e["logger"] == "flawline.audit"]
    assert ("otto", "activate", "done") in told
    assert ("anna", "activate", "unknown_version") in told


def test_documents_when_asked_for_then_tell_of_administration_only(served):
    """The administration describes itself as the service does."""
    _, _, admin = served

    document = admin.get("/openapi.json").json()

    assert "/v1/bundles/{bundle}/roll-back" in document["paths"]
    assert not any("inspect" in path for path in document["paths"])
    assert admin.get("/docs").status_code == 200
    assert admin.get("/healthz/live").status_code == 200


def test_policy_when_activated_then_the_next_frame_is_judged_by_it(served):
    """A policy file that appeared is verified and judges, without a restart."""
    server, store, admin = served
    write_policy(store, make_policy(version="lenient", fail_threshold=0.9), network_of(store / "demo_line" / "1"))

    before = server.http.post(INSPECT, content=DEFECT, headers=PNG | CAMERA).json()
    answer = admin.post("/v1/lines/demo_line/policy?version=lenient", headers=ADMIN)
    after = server.http.post(INSPECT, content=DEFECT, headers=PNG | CAMERA).json()
    admin.post("/v1/lines/demo_line/policy?version=1", headers=ADMIN)

    assert answer.status_code == 200
    assert (before["policy"]["version"], before["verdict"]) == ("1", "FAIL")
    assert (after["policy"]["version"], after["verdict"]) == ("lenient", "REVIEW")


def test_tritonclient_when_it_loads_and_unloads_then_it_works_unchanged(served):
    """Repository index, load and unload are those of the protocol; a model in the request is refused."""
    _, _, admin = served
    client = InferenceServerClient(admin.base_url.netloc.decode())

    def states():
        index = client.get_model_repository_index(headers=ADMIN)
        return {(entry["name"], entry["version"]): entry["state"] for entry in index}

    client.unload_model("other_line", headers=ADMIN)
    unloaded = {state for (name, _), state in states().items() if name == "other_line"}
    client.load_model("other_line", headers=ADMIN)
    loaded = {state for (name, _), state in states().items() if name == "other_line"}
    with pytest.raises(InferenceServerException, match="no parameters"):
        client.load_model("other_line", headers=ADMIN, config="{}")
    client.close()

    assert unloaded == {"UNAVAILABLE"}
    assert "READY" in loaded


def test_swap_and_roll_back_when_frames_come_then_none_is_lost_and_none_is_wrong(tmp_path):
    """Under load versions come, go and are refused, and every frame has its right verdict from one of them."""
    store = tmp_path / "store"
    make_bundle(store)
    environment = {"FLAWLINE_ADMIN_PORT": "0", "FLAWLINE_KEYS_FILE": str(write_keys(tmp_path))}
    environment |= {f"FLAWLINE_{name}_S": "60" for name in ("DEFAULT_DEADLINE", "MAX_DEADLINE", "DRAIN_TIMEOUT")}
    answers, stop = [], threading.Event()

    def camera(frame, expected):
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
            while not stop.is_set():
                answer = http.post(INSPECT, content=frame, headers=PNG | CAMERA)
                answers.append((answer.status_code, answer.json()["verdict"], expected, answer.json().get("bundle")))

    with ServerProcess(store, environment) as server:
        server.ready()
        admin = httpx.Client(base_url=f"http://127.0.0.1:{server.admin_port}", timeout=PATIENCE_S, headers=ADMIN)
        cameras = [threading.Thread(target=camera, args=pair) for pair in ((GOOD, "PASS"), (DEFECT, "FAIL")) * 2]
        for thread in cameras:
            thread.start()

        def after_some_frames():
            wanted = len(answers) + 8
            wait_until(lambda: len(answers) >= wanted, "frames")

        after_some_frames()
        make_bundle(store, version="2")
        activated = admin.post("/v1/rescan").json()["activated"]
        after_some_frames()
        broken = make_bundle(store, version="3")
        (broken / "model.onnx").write_bytes(make_graph(reference=0.5))
        reseal(broken)
        refused = admin.post("/v1/bundles/demo_line/activate?version=3")
        after_some_frames()
        damaged = make_bundle(store, version="4") / "model.onnx"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        found_damaged = admin.post("/v1/rescan").json()["refused"]
        after_some_frames()
        states = admin.post("/v1/bundles/demo_line/roll-back").json()["versions"]
        after_some_frames()
        stop.set()
        for thread in cameras:
            thread.join(PATIENCE_S)
        admin.close()
        ready = server.http.get("/healthz/ready").status_code

    assert activated == [{"bundle": "demo_line", "version": "2"}]
    assert (refused.status_code, refused.json()["code"]) == (409, "version_refused")
    assert "model.onnx" in found_damaged[0]["reason"]
    stand = [(one["version"], one["state"]) for one in states]
    assert stand == [("1", "live"), ("2", "stored"), ("3", "refused"), ("4", "refused")]
    assert {status for status, *_ in answers} == {200}
    assert all(verdict == expected for _, verdict, expected, _ in answers)
    assert {bundle["version"] for *_, bundle in answers} == {"1", "2"}
    assert ready == 200
