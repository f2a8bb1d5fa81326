"""Existing clients of the Open Inference Protocol, unchanged, against a real server: each gets what it came for.

The acceptance list of `tritonclient` (gevent and asyncio) and of `open-inference-openapi`, and what each of them shows
its user when something is wrong.
"""

import asyncio
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from open_inference.openapi.client import OpenInferenceClient
from open_inference.openapi.errors.not_found_error import NotFoundError
from open_inference.openapi.types import InferenceRequest, RequestInput, RequestOutput, TensorData
from tritonclient.utils import InferenceServerException

from service.app import create_app, start_draining
from service.contract.bundle import Bundle, load_bundle
from service.engines.engine import EngineOutput
from service.errors import EngineFailed
from service.settings import Settings
from tests.factories import HEIGHT, POOL, WIDTH, encode, make_bundle, make_frame, make_policy, make_runner
from tests.gated_engine import GatedEngine
from tests.servers import PATIENCE_S, ServerProcess, Side, held_engine, serve_in_thread, wait_until, wait_until_ready

MODEL = "demo_line"
INFER = f"/v2/models/{MODEL}/infer"
MAX_BYTES = 200_000
MAX_PIXELS = 20_000
MARGIN = 4  # a centre crop, so that a tensor of the input's size that were resized once more would show
PIXELS = make_frame(HEIGHT, WIDTH, seed=3)
DEFECT_PIXELS = make_frame(HEIGHT, WIDTH, seed=3, defect=True)
GOOD = encode(make_frame(), "JPEG")
DEFECT = encode(make_frame(defect=True), "JPEG")
LONG_S = 600.0


def _entry(name: str, lines: list[str], actions: list[str], **more: int) -> dict[str, Any]:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return {"name": name, "sha256": digest, "lines": lines, "actions": actions, **more}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A store with a line of two versions and two policies, and a second line."""
    store = tmp_path_factory.mktemp("store")
    make_bundle(store, MODEL, "1")
    make_bundle(store, MODEL, "2", margin=MARGIN)
    make_bundle(store, "other_line")
    strict = make_policy(version="strict", review_threshold=0.001, fail_threshold=0.002)
    (store / MODEL / "policies").mkdir()
    (store / MODEL / "policies/strict.json").write_text(strict.model_dump_json())
    return store


@pytest.fixture(scope="module")
def bundle(store) -> Bundle:
    """The bundle that is live."""
    return load_bundle(store / MODEL / "2")


@pytest.fixture(scope="module")
def server(store) -> Iterator[ServerProcess]:
    """A ready server with small limits."""
    limits = {
        "FLAWLINE_MAX_BODY_BYTES": str(MAX_BYTES),
        "FLAWLINE_MAX_PIXELS": str(MAX_PIXELS),
        "FLAWLINE_MAX_FRAMES_PER_REQUEST": "3",
        "FLAWLINE_FORMATS": "JPEG,PNG",
        # A slow machine is no fault of the protocol's.
        **dict.fromkeys(("FLAWLINE_DEFAULT_DEADLINE_S", "FLAWLINE_MAX_DEADLINE_S", "FLAWLINE_DRAIN_TIMEOUT_S"), "60"),
    }
    with ServerProcess(store, limits) as process:
        yield process.ready()


@pytest.fixture
def client(server) -> Iterator[triton.InferenceServerClient]:
    """Triton's own client, as it comes."""
    with closing(triton.InferenceServerClient(server.url.removeprefix("http://"), concurrency=8)) as made:
        yield made


def images(*data: bytes, form: type = triton.InferInput) -> Any:
    """Return encoded frames as an input of Triton's client."""
    made = form("encoded_frames", [len(data)], "BYTES")
    made.set_data_from_numpy(np.array(data, dtype=object))
    return made


def pixels(*frames: np.ndarray, is_binary: bool = True) -> triton.InferInput:
    """Return frames of the network's input size as an input of Triton's client."""
    made = triton.InferInput("frames", [len(frames), HEIGHT, WIDTH, 3], "UINT8")
    made.set_data_from_numpy(np.stack(frames), binary_data=is_binary)
    return made


def outputs(*names: str, is_binary: bool = True) -> list[triton.InferRequestedOutput]:
    """Return outputs as Triton's client asks for them."""
    return [triton.InferRequestedOutput(name, binary_data=is_binary) for name in names]


def offline(bundle: Bundle, *frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and maps of frames of the network's input size, from the bundle's graph itself."""
    return make_runner(bundle.model)(np.stack(frames))


def statistics(client: triton.InferenceServerClient, model: str = MODEL, version: str = "") -> dict[str, Any]:
    """Return the only entry of a model's statistics."""
    [told] = client.get_inference_statistics(model, version)["model_stats"]
    return dict(told)


def test_health_when_asked_by_triton_then_live_and_ready_and_only_known_models_are_ready(client):
    """The probes of clients and of KServe tell models that answer from those that do not."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "2")
    assert not client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready("never_heard_of")
    assert not client.is_model_ready("line A/β")


def test_metadata_when_asked_by_triton_then_server_and_model_say_what_they_take_and_give(client):
    """Names, types and shapes with the number of frames in front, and the versions that answer."""
    server_says = client.get_server_metadata()
    model_says = client.get_model_metadata(MODEL, "2")

    assert (server_says["name"], bool(server_says["version"])) == ("flawline", True)
    assert {"binary_tensor_data", "model_configuration", "statistics"} <= set(server_says["extensions"])
    assert (model_says["name"], model_says["versions"], model_says["platform"]) == (MODEL, ["2"], "onnxruntime_onnx")
    assert [tuple(tensor.values()) for tensor in model_says["inputs"]] == [
        ("encoded_frames", "BYTES", [-1]),
        ("frames", "UINT8", [-1, HEIGHT, WIDTH, 3]),
        ("part_id", "BYTES", [-1]),
    ]
    assert [tuple(tensor.values()) for tensor in model_says["outputs"]] == [
        ("score", "FP32", [-1]),
        ("anomaly_map", "FP32", [-1, HEIGHT // POOL, WIDTH // POOL]),
        ("verdict", "BYTES", [-1]),
        ("p_value", "FP32", [-1]),
    ]


def test_configuration_when_asked_by_triton_then_it_is_that_of_the_metadata_without_the_batch(client):
    """The same tensors in Triton's words, and how many frames a request may hold."""
    told = client.get_model_config(MODEL)

    assert (told["name"], told["max_batch_size"], told["backend"]) == (MODEL, 3, "onnxruntime")
    assert [(one["name"], one["data_type"], one["dims"]) for one in told["input"]] == [
        ("encoded_frames", "TYPE_STRING", []),
        ("frames", "TYPE_UINT8", [HEIGHT, WIDTH, 3]),
        ("part_id", "TYPE_STRING", []),
    ]
    assert [one["name"] for one in told["output"]] == ["score", "anomaly_map", "verdict", "p_value"]
    assert told["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == 64


def test_index_when_asked_by_triton_then_every_version_in_the_store_is_listed_and_the_live_one_is_ready(server, client):
    """What could be loaded but is not stands there too; with `ready` only what answers."""
    listed = client.get_model_repository_index()
    ready = server.http.post("/v2/repository/index", json={"ready": True}).json()

    assert [(model["name"], model["version"], model["state"]) for model in listed] == [
        (MODEL, "1", "UNAVAILABLE"),
        (MODEL, "2", "READY"),
        ("other_line", "1", "READY"),
    ]
    assert [(model["name"], model["version"]) for model in ready] == [(MODEL, "2"), ("other_line", "1")]


def test_administration_when_asked_by_triton_then_refused_with_the_reason(client):
    """Nothing is loaded or unloaded from outside."""
    for ask in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match="Nothing is administered on this port") as refused:
            ask(MODEL)
        assert refused.value.status() == "403"


def test_statistics_when_frames_were_answered_then_frames_runs_and_times_have_grown(client):
    """Inferences count frames, failures count too, and their times are in nanoseconds."""
    before = statistics(client, "other_line")
    client.infer("other_line", [images(GOOD, DEFECT)])
    with pytest.raises(InferenceServerException):
        client.infer("other_line", [images(b"no image")])

    after = statistics(client, "other_line", "1")
    everything = client.get_inference_statistics()["model_stats"]

    grown = {
        name: after["inference_stats"][name]["count"] - before["inference_stats"][name]["count"]
        for name in after["inference_stats"]
    }
    assert after["inference_count"] - before["inference_count"] == 2
    assert 1 <= after["execution_count"] - before["execution_count"] <= 2
    assert (grown["success"], grown["compute_infer"], grown["fail"]) == (2, 2, 1)
    assert after["inference_stats"]["compute_infer"]["ns"] > before["inference_stats"]["compute_infer"]["ns"]
    assert after["last_inference"] > 1.7e12
    assert {told["name"] for told in everything} == {MODEL, "other_line"}


@pytest.mark.parametrize("binary_out", [True, False], ids=["binary out", "JSON out"])
@pytest.mark.parametrize("binary_in", [True, False], ids=["binary in", "JSON in"])
def test_frames_when_inferred_in_any_form_then_the_numbers_are_those_of_the_graph(
    bundle, client, binary_in, binary_out
):
    """A tensor of the network's input size is neither resized nor cropped: scores and maps are the graph's."""
    wanted = outputs("anomaly_map", "score", is_binary=binary_out)

    answer = client.infer(MODEL, [pixels(PIXELS, DEFECT_PIXELS, is_binary=binary_in)], outputs=wanted)

    scores, maps = offline(bundle, PIXELS, DEFECT_PIXELS)
    assert np.array_equal(answer.as_numpy("score"), scores)
    assert np.array_equal(answer.as_numpy("anomaly_map"), maps)
    assert answer.as_numpy("verdict") is None


def test_outputs_when_left_out_then_all_are_answered_and_judged_by_the_policy(bundle, client):
    """Without a wish every output comes; verdicts and p-values fit the scores, frame by frame."""
    answer = client.infer(MODEL, [pixels(PIXELS, DEFECT_PIXELS)])

    assert answer.as_numpy("verdict").tolist() == [b"PASS", b"FAIL"]
    assert answer.as_numpy("score").shape == answer.as_numpy("p_value").shape == (2,)
    assert answer.as_numpy("p_value").tolist() == [
        np.float32(bundle.calibrations[MODEL].p_value(float(score))) for score in answer.as_numpy("score")
    ]
    assert answer.as_numpy("anomaly_map").shape == (2, HEIGHT // POOL, WIDTH // POOL)


@pytest.mark.parametrize(("frame", "verdict"), [(GOOD, b"PASS"), (DEFECT, b"FAIL")], ids=["good", "defect"])
def test_jpeg_when_inferred_then_it_is_judged_as_under_v1(server, client, frame, verdict):
    """The same bytes get the same score, p-value and verdict by either protocol, of the same origin."""
    answer = client.infer(MODEL, [images(frame)])

    same = server.http.post(f"/v1/lines/{MODEL}/inspect", content=frame, headers={"Content-Type": "image/jpeg"}).json()
    assert answer.as_numpy("verdict").tolist() == [verdict]
    assert answer.as_numpy("score")[0] == np.float32(same["score"])
    assert answer.as_numpy("p_value")[0] == np.float32(same["p_value"])
    told = answer.get_response()["parameters"]
    del told["inspection_ids"]
    assert told == {
        "frame_digests": same["frame"]["digest"],
        "bundle_digest": same["bundle"]["digest"],
        "policy": same["policy"]["version"],
        "policy_digest": same["policy"]["digest"],
        "calibration": same["calibration"],
        "review_threshold": same["thresholds"]["review"],
        "fail_threshold": same["thresholds"]["fail"],
        "device": same["device"],
        "precision": same["precision"],
    }


def test_request_when_it_has_id_time_priority_version_and_policy_then_each_is_heeded(client):
    """The id comes back, the named version answers, and the named policy judges."""
    answer = client.infer(
        MODEL,
        [images(GOOD)],
        model_version="2",
        request_id="r1",
        timeout=30_000_000,
        priority=1,
        parameters={"policy": "strict", "customer": "anything"},
    )

    told = answer.get_response()
    assert (told["id"], told["model_name"], told["model_version"]) == ("r1", MODEL, "2")
    assert told["parameters"]["policy"] == "strict"
    assert answer.as_numpy("verdict").tolist() == [b"FAIL"]


def test_parts_when_named_by_a_second_input_then_each_frame_has_its_log_line_and_its_count(server, client):
    """Two inputs in one request; the canonical lines and the metrics know each frame, as under /v1."""
    names = triton.InferInput("part_id", [2, 1], "BYTES")
    names.set_data_from_numpy(np.array([[b"part 7"], [b"part 8"]], dtype=object))

    answer = client.infer(MODEL, [names, images(GOOD, DEFECT)], headers={"X-Request-Id": "two-parts"})

    def lines() -> list[dict[str, Any]]:
        return [event for event in server.events() if event.get("request_id") == "two-parts"]

    wait_until(lambda: len(lines()) == 2, "the log lines")
    ids = answer.get_response()["parameters"]["inspection_ids"].split(",")
    assert [(line["part_id"], line["verdict"], line["inspection_id"]) for line in lines()] == [
        ("part 7", "PASS", ids[0]),
        ("part 8", "FAIL", ids[1]),
    ]
    metrics = server.http.get("/metrics").text
    assert f'flawline_inspections_total{{line="{MODEL}",verdict="FAIL",version="2"}}' in metrics


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compression_when_asked_for_by_triton_then_both_ways_work(bundle, client, coding):
    """JSON and tensors are compressed together, in the request and in the answer."""
    answer = client.infer(
        MODEL,
        [pixels(PIXELS)],
        request_compression_algorithm=coding,
        response_compression_algorithm=coding,
    )

    assert np.array_equal(answer.as_numpy("anomaly_map"), offline(bundle, PIXELS)[1])


def test_compression_when_a_client_only_lists_what_it_reads_then_the_answer_is_plain(server):
    """Compressing is for those who name one coding; maps travel faster as they are."""
    body = {
        "inputs": [
            {"name": "frames", "shape": [1, HEIGHT, WIDTH, 3], "datatype": "UINT8", "data": PIXELS.ravel().tolist()}
        ]
    }

    plain = server.http.post(INFER, json=body)
    packed = server.http.post(INFER, json=body, headers={"Accept-Encoding": "gzip"})

    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert plain.json()["outputs"] == packed.json()["outputs"]


def test_async_infer_when_over_eight_connections_then_each_gets_its_own_answer(bundle, client):
    """Frames of concurrent requests share the queue and never each other's answers."""
    frames = [make_frame(HEIGHT, WIDTH, seed=seed, defect=seed % 2 == 1) for seed in range(16)]

    pending = [client.async_infer(MODEL, [pixels(frame)], request_id=str(seed)) for seed, frame in enumerate(frames)]
    answers = [one.get_result() for one in pending]

    assert [answer.get_response()["id"] for answer in answers] == [str(seed) for seed in range(16)]
    assert np.array_equal(np.concatenate([one.as_numpy("score") for one in answers]), offline(bundle, *frames)[0])


def test_aio_client_when_it_asks_then_it_is_answered_as_the_other_one(bundle, server):
    """The asyncio client, which names media types and codings on its own."""

    async def ask() -> tuple[Any, ...]:
        async with triton_aio.InferenceServerClient(server.url.removeprefix("http://")) as client:
            answers = await asyncio.gather(
                client.infer(MODEL, [images(GOOD)], request_id="a"),
                client.infer(MODEL, [pixels(PIXELS)], response_compression_algorithm="gzip"),
            )
            with pytest.raises(InferenceServerException, match="no image of an accepted format"):
                await client.infer(MODEL, [images(b"no image")])
            health = await client.is_server_ready(), await client.is_model_ready("never_heard_of")
            return *answers, health, await client.get_model_repository_index()

    jpeg, tensor, health, index = asyncio.run(ask())

    assert jpeg.get_response()["id"] == "a"
    assert jpeg.as_numpy("verdict").tolist() == [b"PASS"]
    assert np.array_equal(tensor.as_numpy("anomaly_map"), offline(bundle, PIXELS)[1])
    assert health == (True, False)
    assert len(index) == 3


def test_open_inference_client_when_it_asks_then_every_call_works(bundle, server):
    """The client made from the protocol's own OpenAPI document, which checks what it is answered."""
    ask = InferenceRequest(
        id="q",
        inputs=[
            RequestInput(
                name="frames",
                shape=[1, HEIGHT, WIDTH, 3],
                datatype="UINT8",
                data=TensorData(__root__=DEFECT_PIXELS.ravel().tolist()),
            )
        ],
        outputs=[RequestOutput(name="score"), RequestOutput(name="verdict")],
    )
    with httpx.Client(timeout=PATIENCE_S) as http:
        client = OpenInferenceClient(base_url=server.url, httpx_client=http)

        client.check_server_liveness()
        client.check_server_readiness()
        client.check_model_readiness(MODEL)
        client.check_model_version_readiness(MODEL, "2")
        answers = [client.model_infer(MODEL, request=ask), client.model_version_infer(MODEL, "2", request=ask)]
        metadata = [client.read_model_metadata(MODEL), client.read_model_version_metadata(MODEL, "2")]

        assert client.read_server_metadata().name == "flawline"
        with pytest.raises(NotFoundError):
            client.check_model_readiness("never_heard_of")
    assert metadata[0] == metadata[1]
    for answer in answers:
        read = {output.name: output.data.__root__ for output in answer.outputs}
        assert (answer.id, read["verdict"]) == ("q", ["FAIL"])
        assert np.float32(read["score"][0]) == offline(bundle, DEFECT_PIXELS)[0][0]


def _bytes_input(data: bytes, frames: int = 1, size: int | None = None) -> dict[str, Any]:
    tensor = frames * (len(data).to_bytes(4, "little") + data)
    parameters = {"binary_data_size": len(tensor) if size is None else size}
    entry = {"name": "encoded_frames", "shape": [frames], "datatype": "BYTES", "parameters": parameters}
    head = json.dumps({"inputs": [entry]}).encode()
    return {"content": head + tensor, "headers": {"Inference-Header-Content-Length": str(len(head))}}


def _json_input(**changes: Any) -> dict[str, Any]:
    entry = {"name": "frames", "shape": [1, HEIGHT, WIDTH, 3], "datatype": "UINT8", "data": [1] * PIXELS.size}
    return {"json": {"inputs": [entry | changes]}}


_RIGHT = _bytes_input(GOOD)
TABLE = {
    "wrong shape": (_json_input(shape=[1, WIDTH, HEIGHT, 3]), 400, "[frames, 32, 48, 3]"),
    "wrong type": (_json_input(datatype="FP32"), 400, "UINT8"),
    "unknown input": (_json_input(name="image"), 400, "encoded_frames"),
    "too many frames": (_json_input(shape=[4, HEIGHT, WIDTH, 3]), 400, "1 to 3 frames"),
    "unknown output": ({"json": {**_json_input()["json"], "outputs": [{"name": "label"}]}}, 400, "outputs.0"),
    "truncated body": (_RIGHT | {"content": _RIGHT["content"][:-10]}, 400, "more than the body"),
    "oversized tensor": (_bytes_input(GOOD, size=10**12), 400, "more than the body"),
    "length over the body": (_RIGHT | {"headers": {"Inference-Header-Content-Length": "9999999"}}, 400, "length"),
    "no JSON": ({"content": GOOD}, 400, "no JSON"),
    "no body": ({}, 400, "no JSON"),
    "damaged gzip": ({"content": gzip.compress(b"{}")[:-1], "headers": {"Content-Encoding": "gzip"}}, 400, "gzip"),
    "damaged image": (_bytes_input(GOOD[:-200]), 400, "damaged or truncated"),
    "deadline too long": ({"json": {**_json_input()["json"], "parameters": {"timeout": 10**9}}}, 400, "deadline"),
    "unknown model": (_json_input() | {"url": "/v2/models/never_heard_of/infer"}, 404, "no such line"),
    "unknown version": (_json_input() | {"url": f"/v2/models/{MODEL}/versions/1/infer"}, 404, "version 2"),
    "unknown policy": ({"json": {**_json_input()["json"], "parameters": {"policy": "p"}}}, 404, "policy"),
    "model named as the statistics": (_json_input() | {"url": "/v2/models/stats/infer"}, 404, "no address"),
    "unknown path": ({"url": "/v2/trace/setting"}, 404, "nothing under this address"),
    "unknown path below": ({"url": f"/v2/models/{MODEL}/nonsense/infer"}, 404, "nothing under this address"),
    "trailing slash": ({"url": "/v2/repository/index/"}, 404, "nothing under this address"),
    "wrong method": ({"url": f"/v2/models/{MODEL}"}, 405, "does not take that method"),
    "too many bytes": ({"content": b"\0" * (MAX_BYTES + 1)}, 413, f"{MAX_BYTES} bytes"),
    "bomb": (
        {"content": zlib.compress(b"\0" * 10_000_000), "headers": {"Content-Encoding": "deflate"}},
        413,
        f"{MAX_BYTES} bytes",
    ),
    "too many pixels": (_bytes_input(encode(np.zeros((200, 200), np.uint8))), 413, f"{MAX_PIXELS} pixels"),
    "unknown coding": ({"content": b"{}", "headers": {"Content-Encoding": "br"}}, 415, "gzip or deflate"),
    "format not allowed here": (_bytes_input(encode(make_frame(), "WEBP")), 415, "WEBP"),
}


@pytest.mark.parametrize("row", TABLE)
def test_request_when_at_fault_then_its_status_and_a_sentence_in_the_protocols_form_and_the_next_one_passes(
    server, row
):
    """Every error under /v2 is an object with `error` alone, which is all that clients of the protocol can show."""
    request, status, sentence = TABLE[row]

    answer = server.http.post(**({"url": INFER} | request))

    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.json().keys() == {"error"}
    assert sentence in answer.json()["error"]
    assert server.http.post(INFER, **_RIGHT).json()["outputs"][2]["data"] == ["PASS"]


def test_triton_when_the_request_is_at_fault_then_its_user_reads_status_and_sentence(client):
    """What is raised at the user is our sentence, not a complaint about its form."""
    with pytest.raises(InferenceServerException) as wrong:
        client.infer(MODEL, [triton.InferInput("image", [1], "BYTES").set_data_from_numpy(np.array([b"x"], object))])
    with pytest.raises(InferenceServerException) as unknown:
        client.get_model_metadata("never_heard_of")

    assert (wrong.value.status(), unknown.value.status()) == ("400", "404")
    assert "encoded_frames, frames, part_id" in wrong.value.message()
    assert "There is no such line" in unknown.value.message()


def test_frames_when_one_of_three_is_damaged_then_the_request_fails_and_none_passes(server, client):
    """No verdict is given out of a request with a fault in it, and all its frames are counted without one."""
    name = f'flawline_no_verdict_total{{line="{MODEL}",reason="unreadable_frame"}}'

    def counted() -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    before = counted()

    with pytest.raises(InferenceServerException, match="damaged or truncated"):
        client.infer(MODEL, [images(GOOD, DEFECT[:-200], GOOD)])

    assert counted() - before == 3


def _raise(_: Any) -> Any:
    raise EngineFailed("The runtime failed on this batch; the parts have no verdict.")


@pytest.mark.parametrize(
    "spoil",
    [
        _raise,
        lambda output: EngineOutput(np.full_like(output.scores, np.nan), output.anomaly_maps),
        lambda output: EngineOutput(output.scores, np.full_like(output.anomaly_maps, np.inf)),
        lambda output: EngineOutput(output.scores[:0], output.anomaly_maps[:0]),
    ],
    ids=["raises", "score is not a number", "map is infinite", "answers are missing"],
)
def test_frames_when_the_engine_fails_on_one_of_three_then_500_and_no_numbers(tmp_path, spoil):
    """A fault of ours under one frame takes all verdicts of its request along, and the next request passes."""
    make_bundle(tmp_path)
    gate = GatedEngine()
    with serve_in_thread(Settings(store_directory=tmp_path, runners=1), gate.open) as http:
        wait_until_ready(http)
        runs = iter(range(3))
        gate.spoil = lambda output: spoil(output) if next(runs, None) == 1 else output
        with closing(triton.InferenceServerClient(f"127.0.0.1:{http.base_url.port}")) as client:
            with pytest.raises(InferenceServerException) as failed:
                client.infer(MODEL, [images(GOOD, GOOD, GOOD)])
            gate.spoil = None

            after = client.infer(MODEL, [images(GOOD, GOOD, GOOD)])
    assert failed.value.status() == "500"
    assert after.as_numpy("verdict").tolist() == [b"PASS"] * 3


def test_readiness_when_a_model_is_loading_then_false_and_its_frames_are_refused(tmp_path):
    """Before the golden frames came out right, no probe says ready, and 503 says why."""
    make_bundle(tmp_path)
    opened: list[Any] = []

    def open_engine(bundle: Any) -> Any:
        engine = held_engine(bundle)
        engine.hold()
        opened.append(engine)
        return engine

    with serve_in_thread(Settings(store_directory=tmp_path), open_engine) as http:
        wait_until(lambda: bool(opened), "the start of loading")
        with closing(triton.InferenceServerClient(f"127.0.0.1:{http.base_url.port}")) as client:
            ready = client.is_server_live(), client.is_server_ready(), client.is_model_ready(MODEL)
            index = client.get_model_repository_index()
            with pytest.raises(InferenceServerException, match="loading") as refused:
                client.infer(MODEL, [images(GOOD)])
            opened[0].release()
            wait_until(client.is_server_ready, "readiness")

            assert client.is_model_ready(MODEL)
    assert ready == (True, False, False)
    assert [(model["name"], model["state"]) for model in index] == [(MODEL, "LOADING")]
    assert refused.value.status() == "503"


def test_readiness_when_draining_then_false_while_the_server_lives(tmp_path):
    """Balancers look elsewhere from the first moment of stopping."""
    make_bundle(tmp_path)
    app = create_app(Settings(store_directory=tmp_path))

    async def ask() -> list[httpx.Response]:
        registry = app.state.context.registry
        await asyncio.to_thread(registry.load)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            before = await http.get("/v2/health/ready")
            start_draining(app)
            places = ("health/live", "health/ready", f"models/{MODEL}/ready")
            after = [await http.get(f"/v2/{place}") for place in places]
        registry.close()
        return [before, *after]

    before, live, ready, model = asyncio.run(ask())

    assert (before.status_code, live.status_code, ready.status_code, model.status_code) == (200, 200, 503, 503)
    assert "another instance" in ready.json()["error"]
    assert ready.json() == model.json()


def test_queue_when_full_or_stuck_then_503_at_once_and_504_on_time_and_the_accepted_are_answered(tmp_path):
    """Overload and deadlines are told as under /v1; a frame that has its place keeps it."""
    make_bundle(tmp_path)
    opened: list[Any] = []

    def open_engine(bundle: Any) -> Any:
        opened.append(held_engine(bundle))
        return opened[0]

    settings = Settings(
        store_directory=tmp_path,
        runners=1,
        max_queue_size=3,
        default_deadline_s=LONG_S,
        max_deadline_s=LONG_S,
        drain_timeout_s=LONG_S,
        stuck_after_s=LONG_S,
    )
    with serve_in_thread(settings, open_engine) as http:
        wait_until_ready(http)
        [engine] = opened
        runs = len(engine.batches)
        engine.hold()
        try:
            accepted = Side(lambda: http.post(INFER, **_RIGHT))
            wait_until(lambda: len(engine.batches) > runs, "the run")
            with closing(triton.InferenceServerClient(f"127.0.0.1:{http.base_url.port}")) as client:
                with pytest.raises(InferenceServerException, match="queue is full") as full:
                    client.infer(MODEL, [images(GOOD, GOOD, GOOD)])
                with pytest.raises(InferenceServerException, match="deadline passed") as late:
                    client.infer(MODEL, [images(GOOD)], timeout=300_000)
                after = http.get("/metrics").text
        finally:
            engine.release()

        assert accepted.answer().json()["outputs"][2]["data"] == ["PASS"]
    assert (full.value.status(), late.value.status()) == ("503", "504")
    assert f'flawline_queue_depth{{engine="{MODEL}"}} 1.0' in after  # the refused request gave its places back


def test_caller_when_it_hangs_up_then_every_frame_of_its_request_is_dropped_and_counted(tmp_path):
    """Nobody is worked for who has left: all places of the request are free again, and each frame is counted."""
    make_bundle(tmp_path)
    gate = GatedEngine()
    patient = dict.fromkeys(("default_deadline_s", "max_deadline_s", "drain_timeout_s", "stuck_after_s"), LONG_S)
    with serve_in_thread(Settings(store_directory=tmp_path, runners=1, **patient), gate.open) as http:
        wait_until_ready(http)
        gate.hold()
        try:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(http.base_url.join(INFER), **_bytes_input(GOOD, frames=3), timeout=httpx.Timeout(60, read=2))
            wait_until(
                lambda: (
                    f'flawline_no_verdict_total{{line="{MODEL}",reason="caller_left"}} 3.0' in http.get("/metrics").text
                ),
                "the count",
            )
            free = http.get("/metrics").text
        finally:
            gate.release()

        assert http.post(INFER, **_RIGHT).json()["outputs"][2]["data"] == ["PASS"]
    assert f'flawline_queue_depth{{engine="{MODEL}"}} 0.0' in free


@pytest.mark.parametrize(
    ("key", "method", "url", "status"),
    [
        (None, "GET", "/v2", 200),
        (None, "GET", "/v2/health/ready", 200),
        (None, "GET", "/v2/models/demo_line", 401),
        (None, "POST", "/v2/models/demo_line/infer", 401),
        (None, "POST", "/v2/repository/index", 401),
        ("camera", "POST", "/v2/models/demo_line/infer", 200),
        ("camera", "POST", "/v2/models/other_line/infer", 403),
        ("camera", "GET", "/v2/models/demo_line/stats", 403),
        ("camera", "POST", "/v2/repository/models/demo_line/load", 403),
        ("reader", "GET", "/v2/models/demo_line/config", 200),
        ("reader", "GET", "/v2/models/demo_line/ready", 200),
        ("reader", "GET", "/v2/models/other_line", 403),
        ("reader", "POST", "/v2/models/demo_line/infer", 403),
    ],
)
def test_keys_when_they_are_needed_then_lines_and_actions_count_as_under_v1(guarded, key, method, url, status):
    """Health and the server's own name are open; models are read and asked by the line and action of the key."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = (
        {"content": _RIGHT["content"], "headers": headers | _RIGHT["headers"]}
        if "infer" in url
        else {"headers": headers}
    )

    answer = guarded.request(method, url, **request)

    assert answer.status_code == status
    if status >= 400:
        assert answer.json().keys() == {"error"}


def test_keys_when_a_reader_lists_then_only_its_own_models_are_named(guarded):
    """Who may read one line learns nothing of the others."""
    headers = {"X-API-Key": "reader"}

    index = guarded.post("/v2/repository/index", headers=headers).json()
    told = guarded.get("/v2/models/stats", headers=headers).json()["model_stats"]

    assert {model["name"] for model in index} == {model["name"] for model in told} == {"demo_line"}


def test_quota_when_a_request_holds_more_frames_than_are_left_then_429_and_nothing_is_inspected(guarded):
    """Every frame of a request counts."""
    request = _bytes_input(GOOD, frames=3)

    answer = guarded.post(INFER, content=request["content"], headers={"X-API-Key": "slow"} | request["headers"])

    assert answer.status_code == 429
    assert "2 frames a minute" in answer.json()["error"]
    assert int(answer.headers["retry-after"]) >= 1


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[httpx.Client]:
    """A server with keys, in a thread; each key is its holder's name."""
    place = tmp_path_factory.mktemp("guarded")
    for name in (MODEL, "other_line"):
        make_bundle(place / "store", name)
    keys = [
        _entry("camera", [MODEL], ["inspect"]),
        _entry("reader", [MODEL], ["read"]),
        _entry("slow", ["*"], ["inspect"], quota_per_minute=2),
    ]
    (place / "keys.json").write_text(json.dumps(keys))
    with serve_in_thread(Settings(store_directory=place / "store", keys_file=place / "keys.json")) as http:
        wait_until_ready(http)
        yield http
