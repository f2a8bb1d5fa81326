"""HTTP in, pipeline, HTTP out: one frame, several frames, and the heatmaps of both.

The way of a request: know the caller, read its parameters, find the line, count against the quota, receive the frame,
inspect it, answer, and only then record. Whoever hangs up is not worked for any longer.
"""

import asyncio
from collections.abc import Coroutine, Iterable
from functools import lru_cache
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service.auth import Caller
from service.errors import FlawlineError, NotAuthorised, ParameterInvalid
from service.inspection import Inspection, InspectionRequest
from service.routes import answers
from service.routes.accounting import TRACE_PARENT_HEADER, Counting, count_later, in_time, record_later, unless_left
from service.routes.bodies import Upload, comes_at_once, receive_frame, receive_frames, usable
from service.routes.context import Context, FrameRequest, caller_of, connection_of, context_of, find_for
from service.routes.headers import OPTION_HEADERS
from service.routes.identity import identify, received_at_of, with_id
from service.routes.openapi import BATCH_OPERATION, FRAME_OPERATION, HEATMAP_ANSWERS
from service.routes.part_names import names_in
from service.routes.problems import (
    REQUEST_ID_HEADER,
    answer_fault,
    problem_document,
    request_id_of,
    responses,
    sentence_of,
    unexpected,
)
from service.scheduling.schedule import Priority
from service.schemas import InspectionOptions

router = APIRouter(tags=["inspections"])

_FAULTS = (
    "unreadable_frame",
    "frame_not_comparable",
    "not_authenticated",
    "not_authorised",
    "unknown_line",
    "unknown_version",
    "unknown_policy",
    "frame_too_large",
    "media_type_not_allowed",
    "parameter_invalid",
    "quota_exceeded",
    "internal",
    "engine_failed",
    "overloaded",
    "line_not_ready",
    "line_loading",
    "line_not_calibrated",
    "deadline_passed",
)
_OPTION_OF_HEADER = {header.lower(): name for name, header in OPTION_HEADERS.items()}
_NO_OPTIONS = InspectionOptions()
_PRIORITIES = {"normal": Priority.NORMAL, "low": Priority.LOW}
_REQUEST_ID = REQUEST_ID_HEADER.lower()
_INSPECT_BEFORE, _INSPECT_AFTER = "/v1/lines/", "/inspect"
_HEATMAP_FAULTS = ("not_authenticated", "not_authorised", "unknown_inspection", "parameter_invalid", "internal")


@router.post(
    "/v1/lines/{line}/inspect",
    response_class=Response,
    responses=responses(*_FAULTS),
    openapi_extra=FRAME_OPERATION,
)
async def inspect(request: Request, line: str) -> Response:
    """Inspect one frame.

    The fast path is the frame's bytes as the body; a multipart body with one file field `frame` works as well. With
    `Accept: image/png` the answer is the overlay itself, with ids, verdict, score, thresholds, versions and digests in
    `Flawline-*` headers.
    """
    context = context_of(request)
    with Counting(request, line) as counted:
        caller = caller_of(request)
        caller.demand("inspect", line)
        options = _read_options(request)
        found = counted.found = find_for(caller, context, line, options.bundle_version, options.policy)
        caller.spend_frame()
        # No body is taken that can't be judged, or not in time.
        deadline_s, priority = _deadline_s(options), _PRIORITIES[options.priority]
        context.pipeline.refuse_hopeless(found, received_at_of(request), deadline_s, priority)
        is_next = comes_at_once(request)
        limits, left_s = context.settings.frame_limits, _time_left_s(request, options)
        with context.body_of(caller, line) as body:
            upload = await receive_frame(request, limits, left_s, body)
            asked = _ask(request, line, options, upload)
            if not is_next:  # another version may have become live meanwhile, and what was found been closed
                found = counted.found = find_for(caller, context, line, options.bundle_version, options.policy)
            # Where receiving it let nobody else come first, what was found of the queue still holds.
            inspecting = context.pipeline.inspect_by(
                found, asked, is_hopeful=is_next, tell_digest=counted.noting_digest()
            )
            inspection = await unless_left(request, inspecting)
        return await (_picture if _wants_picture(request) else _answer)(context, inspection)


async def answer_frame(context: Context, line: str, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request to inspect one frame: the short way of every frame to `inspect`.

    It answers as the documented route above does, of which it makes no use: the layers round that one, finding it
    among all others, and reading parameters into arguments take as long as all that is done for a frame here.

    Args:
        context: the service's parts.
        line: what `line_to_inspect` has found.
        scope: of the request.
        receive: of the request.
        send: of the request.
    """
    scope["path_params"] = {"line": line}
    request_id = identify(scope, context.clock())
    request = FrameRequest(scope, receive)
    try:
        response = await inspect(request, line)
    except ClientDisconnect:
        response = Response(status_code=400)  # nobody is there to read it
    except FlawlineError as error:
        response = answer_fault(request, error)
    except Exception as error:  # noqa: BLE001 - the outermost handler of this frame: it has no verdict
        response = answer_fault(request, unexpected(request, error))
    headers, body = with_id(response.raw_headers, request_id), bytes(response.body)
    connection = connection_of(scope)
    if connection is None or not connection.answer(response.status_code, headers, body):
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def line_to_inspect(scope: Scope) -> str | None:
    """Return the line whose frame a request brings; None where it asks for something else."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return None
    path: str = scope["path"]
    if not (path.startswith(_INSPECT_BEFORE) and path.endswith(_INSPECT_AFTER)):
        return None
    line = path[len(_INSPECT_BEFORE) : -len(_INSPECT_AFTER)]
    return None if "/" in line else line or None


@router.post(
    "/v1/lines/{line}/inspect-batch",
    response_class=Response,
    responses=responses(*_FAULTS),
    openapi_extra=BATCH_OPERATION,
)
async def inspect_batch(request: Request, line: str) -> Response:
    """Inspect several frames side by side, each with an answer or a problem of its own, in the order of the request.

    The body is multipart with the files in the field `frames`. Parameters count for every frame; `sequence` is that of
    the first, and the following ones count on.
    """
    context = context_of(request)
    with Counting(request, line) as counted:
        caller = caller_of(request)
        caller.demand("inspect", line)
        options = _read_options(request)
        # No body is taken that can't be judged.
        counted.found = find_for(caller, context, line, options.bundle_version, options.policy)
        limits, left_s = context.settings.frame_limits, _time_left_s(request, options)
        most = context.settings.max_frames_per_request
        with context.body_of(caller, line) as body:
            uploads = await receive_frames(request, "frames", most, limits, left_s, body)
            counted.parts = [names_in(options, index) for index in range(len(uploads))]
            frames = (_item(request, counted, caller, line, options, *one) for one in enumerate(uploads))
            outcomes = await unless_left(request, _side_by_side(frames))
        # Written and counted together, as they are answered: whoever left has got none of them.
        items = [_write_item(request, line, counted, index, outcome) for index, outcome in enumerate(outcomes)]
    head = b'{"request_id":' + to_json(request_id_of(request)) + b',"items":['
    return Response(head + b",".join(items) + b"]}", media_type="application/json")


@router.get(
    "/v1/inspections/{inspection_id}/heatmap",
    response_class=Response,
    responses={**HEATMAP_ANSWERS, **responses(*_HEATMAP_FAULTS)},
)
async def heatmap(
    request: Request, inspection_id: str, kind: Annotated[Literal["png", "overlay", "f16"], Query()] = "overlay"
) -> Response:
    """Return the heatmap of an inspection while it is kept; it was asked for with the frame.

    `png` is 8-bit grey on the policy's fixed scale, `overlay` the frame painted over, `f16` the raw map as
    little-endian float16, row by row, with `Flawline-Shape` (height, width) and `Flawline-Window` (top, left, height,
    width of the map on the original frame, in its pixels). Which bundle and policy judged which frame is said in
    `Flawline-Bundle-Version`, `Flawline-Bundle-Digest`, `Flawline-Policy-Version`, `Flawline-Policy-Digest` and
    `Flawline-Frame-Digest`.
    """
    context = context_of(request)
    caller = caller_of(request)
    await context.after_answers.wait_for(inspection_id)
    record = context.records.heatmap(inspection_id)
    if not (caller.may("read", record.line) or caller.may("inspect", record.line)):
        raise NotAuthorised("This key does not cover the line of this inspection; ask for a key that names it.")
    body = await asyncio.to_thread(record.render, kind)
    headers = {"Flawline-Inspection-Id": inspection_id, "Flawline-Line": record.line, "Cache-Control": "private"}
    headers.update(answers.headers_of_origin(record))
    if kind == "f16":
        headers["Flawline-Shape"] = ",".join(str(side) for side in record.anomaly_map.shape)
        headers["Flawline-Window"] = ",".join(repr(float(edge)) for edge in record.window)
    return Response(body, headers=headers, media_type=answers.MEDIA_TYPE_OF_HEATMAP[kind])


def _read_options(request: Request) -> InspectionOptions:
    """Read what a request says beside the frame, from its headers and its query; the query wins.

    Raises:
        ParameterInvalid: if a value does not fit, or a query parameter is unknown or stands there twice.
    """
    headers, request_id = request.headers, request_id_of(request)
    if headers.get(_REQUEST_ID, request_id) != request_id:
        raise ParameterInvalid(f"{REQUEST_ID_HEADER}: send up to 128 printable characters without spaces.")
    given = {_OPTION_OF_HEADER[header]: value for header, value in headers.items() if header in _OPTION_OF_HEADER}
    asked = request.query_params.multi_items() if request.scope["query_string"] else []
    if not (given or asked):
        return _NO_OPTIONS
    if len({name for name, _ in asked}) < len(asked):
        raise ParameterInvalid("A query parameter stands there twice; send each one once.")
    if any(name not in OPTION_HEADERS for name, _ in asked):
        raise ParameterInvalid(f"A query parameter is unknown; known are {', '.join(OPTION_HEADERS)}.")
    given.update(asked)
    return _options_of(tuple(given.items()))


@lru_cache(maxsize=256)  # a camera says the same with most of its frames
def _options_of(given: tuple[tuple[str, str], ...]) -> InspectionOptions:
    try:
        return InspectionOptions.model_validate_strings(dict(given))
    except ValidationError as error:
        raise ParameterInvalid(sentence_of(error.errors())) from error


def _deadline_s(options: InspectionOptions) -> float | None:
    return None if options.deadline_ms is None else options.deadline_ms / 1000


def _time_left_s(request: Request, options: InspectionOptions) -> float:
    """Return how long the body may still take; nothing or less where the time is over.

    Raises:
        ParameterInvalid: if the caller asks for more time than it may.
    """
    context = context_of(request)
    return received_at_of(request) + context.pipeline.time_allowed_s(_deadline_s(options)) - context.clock()


def _ask(request: Request, line: str, options: InspectionOptions, upload: Upload, index: int = 0) -> InspectionRequest:
    received_at = received_at_of(request)
    return InspectionRequest(
        line=line,
        data=upload.data,
        raw=upload.raw,
        told_digest=upload.digest,
        part_id=options.part_id,
        view=options.view,
        sequence=None if options.sequence is None else options.sequence + index,
        deadline_s=_deadline_s(options),
        policy_version=options.policy,
        heatmap="overlay" if _wants_picture(request) else options.heatmap,
        request_id=request_id_of(request),
        received_at=received_at,
        receive_s=context_of(request).clock() - received_at,
        bundle_version=options.bundle_version,
        trace_parent=request.headers.get(TRACE_PARENT_HEADER),
        priority=_PRIORITIES[options.priority],
    )


async def _answer(context: Context, inspection: Inspection) -> Response:
    return answers.Written(*_encode(context, inspection))


async def _picture(context: Context, inspection: Inspection) -> Response:
    started_at = context.clock()
    async with in_time(context, inspection.request.received_at + inspection.deadline_s, "the picture was drawn"):
        body = await asyncio.to_thread(lambda: context.records.keep(inspection).render("overlay"))
    now = context.clock()
    encode_s, total_s = now - started_at, now - inspection.request.received_at
    record_later(context, inspection, encode_s, total_s, kept=True)
    timings = to_json(answers.timings_ms(inspection, encode_s, total_s))
    headers = {**answers.identity_headers(inspection), "Server-Timing": answers.server_timing(timings).decode()}
    return Response(body, headers=headers, media_type="image/png")


async def _item(
    request: Request,
    counted: Counting,
    caller: Caller,
    line: str,
    options: InspectionOptions,
    index: int,
    upload: Upload | FlawlineError,
) -> Inspection | FlawlineError:
    """Inspect one frame of several; what goes wrong with it stays with it."""
    try:
        frame, context = usable(upload), context_of(request)
        caller.spend_frame()
        found = counted.found = find_for(caller, context, line, options.bundle_version, options.policy)
        asked = _ask(request, line, options, frame, index)
        return await context.pipeline.inspect_by(found, asked, tell_digest=counted.noting_digest(index))
    except FlawlineError as error:
        return error
    except Exception as error:  # noqa: BLE001 - the outermost handler of this frame, so that no neighbour fails with it
        return unexpected(request, error)


def _write_item(
    request: Request, line: str, counted: Counting, index: int, outcome: Inspection | FlawlineError
) -> bytes:
    """Write what became of one frame of several, and have it counted once the answer is on its way."""
    if isinstance(outcome, Inspection):
        return _encode(context_of(request), outcome)[0]
    count_later(request, line, outcome.code, [counted.known_of(index)])
    part = counted.part(index)
    return to_json(problem_document(outcome.code, outcome.sentence, request_id_of(request), line, part))


def _encode(context: Context, inspection: Inspection) -> tuple[bytes, bytes]:
    """Write an answer and its `timings_ms`, and have it recorded once it is on its way."""
    started_at = context.clock()
    described = to_json(answers.describe(inspection))
    now = context.clock()
    encode_s, total_s = now - started_at, now - inspection.request.received_at
    kept = inspection.request.heatmap == "none"  # nothing to keep
    record_later(context, inspection, encode_s, total_s, kept=kept)
    timings = to_json(answers.timings_ms(inspection, encode_s, total_s))
    return answers.with_timings(described, timings), timings


async def _side_by_side(
    items: Iterable[Coroutine[Any, Any, Inspection | FlawlineError]],
) -> list[Inspection | FlawlineError]:
    return await asyncio.gather(*items)


def _wants_picture(request: Request) -> bool:
    if "accept" not in request.headers:
        return False
    accepted = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")]
    return "image/png" in accepted and "application/json" not in accepted
