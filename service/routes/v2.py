"""The Open Inference Protocol under `/v2`: HTTP in, pipeline, HTTP out; a bundle is a model, with the name of its line.

A bundle of several lines is as many models: the model's name chooses the line, and so its thresholds and the index that
the network is told. The bundle's own name is no model, because nobody could say whose thresholds it would have.

KServe, `tritonclient` and any other client of the protocol work unchanged. What its bodies hold is the business of
`service/open_inference.py`; faults take the protocol's form in `service/routes/problems.py`. These operations are left
out of our OpenAPI document, because the protocol has one of its own.

The frames of one request are inspected side by side, each with a place of its own, and answered together: where one has
no verdict none has, and the request fails with the fault of that frame.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from service import open_inference
from service.contract.bundle import Manifest
from service.errors import LineNotCalibrated, LineNotReady, NotAuthorised, UnknownLine
from service.inspection import Inspection, InspectionRequest
from service.lines.live import NOT_CALIBRATED, LineCard, LineStatus
from service.lines.registry import Registry
from service.observability.telemetry import REQUEST_FAILED
from service.open_inference import JSON_LENGTH_HEADER, Coding, InferAnswer, InferRequest, ModelSpec, Values
from service.ports.body_budget import Holding
from service.routes.accounting import TRACE_PARENT_HEADER, Counting, in_time, record_later, unless_left
from service.routes.bodies import receive_body, receive_small_body
from service.routes.content_digest import demand_digest, told_digest
from service.routes.context import Context, caller_of, context_of, find_for, refuse_choice
from service.routes.identity import received_at_of
from service.routes.problems import request_id_of
from service.settings import Settings

router = APIRouter(prefix="/v2", include_in_schema=False)

PLATFORM = "onnxruntime_onnx"

_NOT_A_MODEL = "stats"  # the protocol gives this address to the statistics of all models


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """Say that the process answers."""
    return {"live": True}


@router.get("/health/ready")
async def ready(request: Request) -> dict[str, bool]:
    """Say whether the lines of the store are served here."""
    _demand_ready(context_of(request))
    return {"ready": True}


@router.get("")
async def server_metadata() -> dict[str, Any]:
    """Name the server and the extensions that it has."""
    return {"name": "flawline", "version": version("flawline"), "extensions": list(open_inference.EXTENSIONS)}


@router.get("/models/stats")
async def all_statistics(request: Request) -> dict[str, Any]:
    """Tell what each model that the caller may know of has done."""
    caller = caller_of(request)
    caller.demand("read")
    context = context_of(request)
    models = [status for status in context.registry.statuses() if caller.may("read", status.line)]
    cards = [status.card if status.live is None else status.live.card for status in models]
    return {"model_stats": [_statistics(context, card) for card in cards if card is not None]}


@router.get("/models/{model}/stats")
@router.get("/models/{model}/versions/{version}/stats")
async def statistics(request: Request, model: str) -> dict[str, Any]:
    """Tell what a model has done."""
    return {"model_stats": [_statistics(context_of(request), _readable(request, model))]}


@router.get("/models/{model}/ready")
@router.get("/models/{model}/versions/{version}/ready")
async def model_ready(request: Request, model: str) -> dict[str, Any]:
    """Say whether a model answers frames that name no policy."""
    line = _readable(request, model)
    if not line.gives_verdicts:
        raise LineNotCalibrated(NOT_CALIBRATED)
    if context_of(request).lifecycle.is_draining:
        _demand_ready(context_of(request))
    return {"name": line.name, "ready": True}


@router.get("/models/{model}")
@router.get("/models/{model}/versions/{version}")
async def model_metadata(request: Request, model: str) -> dict[str, Any]:
    """Tell what a model takes and gives."""
    line, context = _readable(request, model), context_of(request)
    spec, manifest = _spec(line.manifest, context.settings), line.manifest
    return {
        "name": line.name,
        "versions": [manifest.version],
        "platform": PLATFORM,
        "inputs": [tensor.metadata() for tensor in spec.inputs],
        "outputs": [tensor.metadata() for tensor in spec.outputs],
        "properties": {
            "detector": manifest.detector,
            "device": line.device,
            "provider": line.provider,
            "precision": line.precision,
            "digest": line.digest,
            "policy": line.default_policy,
        },
    }


@router.get("/models/{model}/config")
@router.get("/models/{model}/versions/{version}/config")
async def model_configuration(request: Request, model: str) -> dict[str, Any]:
    """Tell how a model is run, in the words of Triton's configuration."""
    line, settings = _readable(request, model), context_of(request).settings
    spec = _spec(line.manifest, settings)
    on_gpu = "cuda" in line.device
    return {
        "name": line.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": spec.max_frames,
        "input": [tensor.configuration() for tensor in spec.inputs],
        "output": [tensor.configuration() for tensor in spec.outputs],
        "instance_group": [{"kind": "KIND_GPU" if on_gpu else "KIND_CPU", "count": settings.runners_per_engine}],
        "dynamic_batching": {
            "preferred_batch_size": [settings.max_batch_size],
            "max_queue_delay_microseconds": 0,
            "default_queue_policy": {
                "timeout_action": "REJECT",
                "default_timeout_microseconds": round(settings.default_deadline_s * 1e6),
                "allow_timeout_override": True,
                "max_queue_size": settings.max_queue_size,
            },
        },
    }


@router.post("/repository/index")
async def repository_index(request: Request) -> list[dict[str, str]]:
    """List the models that the caller may know of, every version that is loaded or lies in the store."""
    caller = caller_of(request)
    caller.demand("read")
    return await index_of(request, lambda line: caller.may("read", line))


async def index_of(request: Request, may_know: Callable[[str], bool]) -> list[dict[str, str]]:
    """List models as the protocol wants them.

    Args:
        request: whose body may ask for those alone that are ready.
        may_know: says of which lines.
    """
    context = context_of(request)
    ready_only = open_inference.wants_ready_only(await receive_small_body(request))
    models = [status for status in context.registry.statuses() if may_know(status.line)]
    entries = await asyncio.to_thread(lambda: [entry for model in models for entry in _index(context.registry, model)])
    return [entry for entry in entries if entry["state"] == "READY" or not ready_only]


@router.post("/repository/models/{model}/load")
@router.post("/repository/models/{model}/unload")
async def administer(request: Request, model: str) -> None:
    """Refuse to load or unload: that is for administrators, on a port of their own."""
    caller_of(request).demand("admin", model)
    raise NotAuthorised("Nothing is administered on this port; ask on the administration's own, where that is on.")


@router.post("/models/{model}/infer")
@router.post("/models/{model}/versions/{version}/infer")
async def infer(request: Request, model: str) -> Response:
    """Inspect the frames of one request and answer them together."""
    context = context_of(request)
    bundle_version = _version(request, model)
    with Counting(request, model) as counted:
        caller = caller_of(request)
        caller.demand("inspect", model)
        line = context.registry.serving(model, bundle_version)
        refuse_choice(caller, context, line, None)
        caller.spend_frame()
        with context.body_of(caller, model) as body:
            asked = await _receive(request, _spec(line.bundle.manifest, context.settings), body)
            counted.parts = [{} if part_id is None else {"part_id": part_id} for part_id in asked.part_ids]
            for _ in asked.frames[1:]:
                caller.spend_frame()
            # Which policy is named stands in the body.
            counted.found = find_for(caller, context, model, bundle_version, asked.policy)
            works = _works(request, model, bundle_version, asked)
            inspections = await unless_left(request, _together(context, works, counted))
        return await _answer(request, asked, inspections)


def _demand_ready(context: Context) -> None:
    reasons = context.reasons_not_ready()
    if reasons:
        raise LineNotReady(" ".join(reason["reason"] for reason in reasons) or "The service is not ready.")


def _version(request: Request, model: str) -> str | None:
    """Return the version that the address names, if any.

    Raises:
        UnknownLine: if the model's name means something else in this place.
    """
    if model == _NOT_A_MODEL:
        raise UnknownLine("A model of this name has no address here; name the line differently.")
    wanted: str | None = request.path_params.get("version")
    return wanted


def _readable(request: Request, model: str) -> LineCard:
    """Return what is told of the line that a request asks about.

    Raises:
        FlawlineError: if the caller may not know of it, or it is not there, or not ready.
    """
    caller_of(request).demand("read", model)
    return context_of(request).registry.look_at(model, _version(request, model))


def _spec(manifest: Manifest, settings: Settings) -> ModelSpec:
    return open_inference.model_spec(
        (manifest.input.canvas_height, manifest.input.canvas_width),
        manifest.map_size,
        settings.max_frames_per_request,
    )


def _statistics(context: Context, line: LineCard) -> dict[str, Any]:
    context.after_answers.settle()
    return context.telemetry.statistics(line.name, line.manifest.version)


def _index(registry: Registry, status: LineStatus) -> list[dict[str, str]]:
    known = registry.versions(status.line)
    state = "READY" if registry.comes_back(status) and status.card is not None else _index_state(status)
    if not known:
        return [_entry(status.line, "", state, status.reason or "")]
    newest = known[-1].version
    card = status.card if status.live is None else status.live.card
    serving = newest if card is None else card.manifest.version
    return [
        _entry(status.line, one.version, state, status.reason or "")
        if one.version == serving
        else _entry(status.line, one.version, "READY", "It is kept, and answers who names it.")
        if one.state == "kept" and status.line in one.lines
        else _entry(status.line, one.version, "UNAVAILABLE", one.reason or "Another version serves the line.")
        for one in known
    ]


def _index_state(status: LineStatus) -> str:
    if status.state == "loading":
        return "LOADING"
    answers = status.state == "ready" and status.reason is None
    return "READY" if answers else "UNAVAILABLE"


def _entry(name: str, version: str, state: str, reason: str) -> dict[str, str]:
    return {"name": name, "version": version, "state": state, "reason": reason}


async def _receive(request: Request, spec: ModelSpec, holding: Holding) -> InferRequest:
    """Receive and read a request; in a thread, because decompressing and parsing may take as long as a run."""
    settings = context_of(request).settings
    max_bytes = settings.max_body_bytes
    coding, told = open_inference.coding_of(request.headers.get("content-encoding")), told_digest(request.headers)
    # How long the caller allows stands in the body, so the body itself gets the longest time there is.
    left_s = received_at_of(request) + settings.max_deadline_s - context_of(request).clock()
    body = await receive_body(request, max_bytes, left_s, holding)

    def hold(plain_bytes: int) -> None:
        holding.hold(len(body) + plain_bytes)

    def read() -> InferRequest:
        demand_digest(body, told)
        plain = body if coding is None else open_inference.decompress(body, coding, max_bytes, hold)
        return open_inference.parse_request(plain, request.headers.get(JSON_LENGTH_HEADER), spec)

    async with in_time(context_of(request), received_at_of(request) + settings.max_deadline_s, "the request was read"):
        return await asyncio.to_thread(read)


def _works(
    request: Request, model: str, bundle_version: str | None, asked: InferRequest
) -> Iterable[InspectionRequest]:
    received_at = received_at_of(request)
    receive_s = context_of(request).clock() - received_at
    for data, part_id in zip(asked.frames, asked.part_ids, strict=True):
        yield InspectionRequest(
            line=model,
            data=data,
            raw=None,
            part_id=part_id,
            view=None,
            sequence=None,
            deadline_s=asked.timeout_s,
            policy_version=asked.policy,
            heatmap="none",
            request_id=request_id_of(request),
            received_at=received_at,
            receive_s=receive_s,
            bundle_version=bundle_version,
            trace_parent=request.headers.get(TRACE_PARENT_HEADER),
            is_network_input=asked.is_network_input,
        )


async def _together(context: Context, works: Iterable[InspectionRequest], counted: Counting) -> list[Inspection]:
    """Inspect every frame, and let the first fault end all of them, whose caller is still there."""
    tasks = [
        asyncio.ensure_future(context.pipeline.inspect(work, tell_digest=counted.noting_digest(index)))
        for index, work in enumerate(works)
    ]
    try:
        inspections = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel(REQUEST_FAILED)
    if len({(inspection.bundle_digest, inspection.policy_digest) for inspection in inspections}) > 1:
        raise LineNotReady("Another version or policy became live during this request; send it again.")
    return inspections


async def _answer(request: Request, asked: InferRequest, inspections: list[Inspection]) -> Response:
    context = context_of(request)
    started_at = context.clock()
    coding = open_inference.wanted_coding(request.headers.get("accept-encoding"))
    # All of them came together and have the same time.
    deadline = inspections[0].request.received_at + inspections[0].deadline_s
    async with in_time(context, deadline, "the answer was written"):
        answer = await asyncio.to_thread(_print, asked, inspections, coding)
    now = context.clock()
    for inspection in inspections:
        record_later(context, inspection, now - started_at, now - inspection.request.received_at, kept=True)
    headers: dict[str, str] = {} if coding is None else {"Content-Encoding": coding}
    if answer.json_bytes is None:
        return Response(answer.body, headers=headers, media_type="application/json")
    headers[JSON_LENGTH_HEADER] = str(answer.json_bytes)
    return Response(answer.body, headers=headers, media_type="application/octet-stream")


def _print(asked: InferRequest, inspections: list[Inspection], coding: Coding | None) -> InferAnswer:
    judgements = [inspection.judgement for inspection in inspections]
    wanted = {output.name for output in asked.outputs}
    maps = [inspection.anomaly_map for inspection in inspections] if "anomaly_map" in wanted else []
    values: Mapping[str, Values] = {
        "score": np.array([judgement.score for judgement in judgements], np.float32),
        "anomaly_map": np.array(maps, np.float32),
        "verdict": [judgement.verdict.value for judgement in judgements],
        # NaN, null in JSON, where good parts were not scored as the policy scores.
        "p_value": np.array([inspection.p_value for inspection in inspections], np.float32),
    }
    shared = inspections[0]  # one bundle and one policy judged all of them
    parameters: dict[str, str | float] = {
        "inspection_ids": ",".join(inspection.inspection_id for inspection in inspections),
        "frame_digests": ",".join(inspection.frame_digest for inspection in inspections),
        "bundle_digest": shared.bundle_digest,
        "policy": shared.policy_version,
        "policy_digest": shared.policy_digest,
        "calibration": shared.policy.calibration,
        "review_threshold": shared.review_threshold,
        "fail_threshold": shared.fail_threshold,
        "device": shared.device,
        "precision": shared.precision,
    }
    answer = open_inference.print_answer(asked, shared.line, shared.bundle_version, values, parameters)
    if coding is None:
        return answer
    return InferAnswer(open_inference.compress(answer.body, coding), answer.json_bytes)
