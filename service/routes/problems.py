"""The one table from error code to status, and the problem documents (RFC 9457) that every fault is answered with.

Every fault that any part of the service raises ends here, and every document says `NO_VERDICT`: a caller that reads
only the verdict can't take a fault for a good part. Unexpected exceptions say nothing of what they were; the log does.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service.contract.policy import Verdict
from service.errors import FlawlineError, ParameterInvalid
from service.schemas import WORDS_OF_PATTERN

PROBLEM_MEDIA_TYPE = "application/problem+json"
REQUEST_ID_HEADER = "X-Request-Id"
# `part_id`, `view` and `sequence`, as far as they are known.
PartNames = Mapping[str, str | int]

_LINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_DEFAULT_RETRY_AFTER_S = 1.0
_OPEN_INFERENCE = "/v2"
_STATUS_UNDER_OPEN_INFERENCE = {"parameter_invalid": 400}  # the protocol knows no 422

_log = logging.getLogger("flawline")


@dataclass(frozen=True)
class Problem:
    """How one error code is answered.

    Attributes:
        status: HTTP status.
        title: the kind of problem in a few words, the same for every occurrence.
        example: a sentence as callers see it; documentation only.
    """

    status: int
    title: str
    example: str


# One row a code. `service/errors.py` says whose fault each one is.
PROBLEMS: dict[str, Problem] = {
    "caller_error": Problem(400, "The request can't be served", "Correct the request."),
    "unreadable_frame": Problem(
        400,
        "The frame can't be read",
        "The JPEG image is damaged or truncated; send the complete file as the camera wrote it.",
    ),
    "frame_not_comparable": Problem(
        400,
        "The frame shows no picture",
        "The frame is flat, as with a covered lens or without light; look at camera and lamp.",
    ),
    "not_authenticated": Problem(
        401, "No known key", "Send your key in the header `Authorization: Bearer <key>` or `X-API-Key`."
    ),
    "not_authorised": Problem(
        403, "The key does not cover this", "This key may not inspect here; ask for a key that names the line."
    ),
    "not_found": Problem(404, "Nothing here", "There is nothing under this address; see /docs."),
    "unknown_line": Problem(404, "Unknown line", "There is no such line; GET /v1/lines lists them."),
    "unknown_bundle": Problem(404, "Unknown bundle", "There is no such bundle; GET /v1/bundles lists them."),
    "unknown_version": Problem(
        404, "Unknown bundle version", "The line has no such version; GET /v1/lines/{line}/versions lists them."
    ),
    "unknown_policy": Problem(
        404, "Unknown policy version", "The line has no such policy; GET /v1/lines/{line}/policies lists them."
    ),
    "unknown_inspection": Problem(
        404,
        "Unknown inspection",
        "The inspection is unknown or no longer kept; fetch heatmaps soon, from the process that answered.",
    ),
    "method_not_allowed": Problem(405, "Method not allowed", "This address does not take that method; see /docs."),
    "version_refused": Problem(
        409, "The version is refused", "model.onnx is not the file that manifest.json names. What was live still is."
    ),
    "frame_too_large": Problem(
        413, "The frame is too large", "The image has more than 50000000 pixels; crop it or bin the sensor."
    ),
    "media_type_not_allowed": Problem(
        415, "Media type not accepted", "Name the frame's kind in Content-Type, for example image/jpeg."
    ),
    "parameter_invalid": Problem(422, "A parameter does not fit", "deadline_ms: Input should be greater than 0."),
    "quota_exceeded": Problem(
        429, "Quota used up", "This key's quota of 600 frames a minute is used up; wait as long as Retry-After says."
    ),
    "internal": Problem(
        500, "Internal fault", "Something unexpected went wrong; report the request id, the log holds the cause."
    ),
    "engine_failed": Problem(
        500, "The engine failed", "The engine failed on this batch; the part has no verdict, send it again."
    ),
    "bundle_refused": Problem(500, "The bundle is refused", "model.onnx is not the file that manifest.json names."),
    "store_unreachable": Problem(
        503, "The store can't be asked", "The bucket does not answer; what was there before is still served."
    ),
    "calibration_refused": Problem(500, "The calibration is refused", "Hold out more good frames."),
    "unavailable": Problem(503, "Not now", "Try again."),
    "overloaded": Problem(
        503, "No place in time", "The queue is full; slow down or try again after as long as Retry-After says."
    ),
    "line_not_ready": Problem(503, "The line is not ready", "The line is unhealthy and waits for a restart."),
    "line_loading": Problem(503, "The line is loading", "The line is loading; try again in a moment."),
    "line_not_calibrated": Problem(
        503, "The line is not calibrated", "Calibrate the line with good parts: flawline calibrate BUNDLE GOOD_FOLDER."
    ),
    "deadline_passed": Problem(
        504, "The deadline has passed", "The answer would come after the deadline; the part has no verdict."
    ),
}

_CODE_OF_STATUS = {404: "not_found", 405: "method_not_allowed"}


def status_of(code: str) -> int:
    """Return the HTTP status of an error code; unknown codes are our fault."""
    return PROBLEMS.get(code, PROBLEMS["internal"]).status


def problem_document(
    code: str, sentence: str, request_id: str, line: str | None, part: PartNames | None = None
) -> dict[str, Any]:
    """Describe one fault as the members of a problem document.

    Args:
        code: stable, a key of `PROBLEMS`.
        sentence: what happened and what to do.
        request_id: of the request, so that its log line is found.
        line: that was asked for, where the address names one.
        part: how the caller names what the frame shows.
    """
    problem = PROBLEMS.get(code, PROBLEMS["internal"])
    document: dict[str, Any] = {
        "type": f"urn:flawline:problem:{code}",
        "title": problem.title,
        "status": problem.status,
        "code": code,
        "detail": sentence,
        "verdict": Verdict.NO_VERDICT.value,
        "request_id": request_id,
    }
    if line is not None and _LINE.fullmatch(line):
        document["line"] = line
    return document | dict(part or {})


def answer_fault(request: Request, error: FlawlineError) -> Response:
    """Answer an expected fault."""
    return _answer(request, error.code, error.sentence, error.retry_after_s)


def retry_after(code: str, known_s: float | None) -> dict[str, str]:
    """Return the `Retry-After` header of a fault that passes by itself, in whole seconds; else nothing."""
    if known_s is None and status_of(code) not in (429, 503):
        return {}
    return {"Retry-After": str(max(1, math.ceil(_DEFAULT_RETRY_AFTER_S if known_s is None else known_s)))}


def sentence_of(errors: list[Any]) -> str:
    """Turn pydantic's list of errors into one sentence that names the parameter, without the caller's value."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("query", "path", "header", "body"))
    words = WORDS_OF_PATTERN.get(first.get("ctx", {}).get("pattern"))
    return f"{place or 'The request'}: {first['msg'] if words is None else f'Input should be {words}'}."


def install_problems(app: FastAPI) -> None:
    """Make every fault of an application answer with a problem document."""

    async def on_fault(request: Request, error: Exception) -> Response:
        return answer_fault(request, error if isinstance(error, FlawlineError) else unexpected(request, error))

    async def on_validation(request: Request, error: Exception) -> Response:
        errors = list(error.errors()) if isinstance(error, RequestValidationError) else []
        return answer_fault(request, ParameterInvalid(sentence_of(errors) if errors else "A parameter does not fit."))

    async def on_http(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        code = _CODE_OF_STATUS.get(status, "internal" if status >= 500 else "caller_error")
        headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
        return _answer(request, code, PROBLEMS[code].example, None, headers)

    async def on_left(_request: Request, _error: Exception) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    app.add_exception_handler(ClientDisconnect, on_left)
    app.add_exception_handler(FlawlineError, on_fault)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_fault)


def responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's `responses` for an operation that may answer with these codes, each with an example."""
    documented: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        problem = PROBLEMS[code]
        entry = documented.setdefault(
            problem.status,
            {
                "description": HTTPStatus(problem.status).phrase,
                "content": {
                    PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}, "examples": {}}
                },
            },
        )
        entry["content"][PROBLEM_MEDIA_TYPE]["examples"][code] = {
            "summary": problem.title,
            "value": problem_document(code, problem.example, "5f0c1c9e2f6b4f0e9a5c", "demo_line"),
        }
        if problem.status in (429, 503):
            entry["headers"] = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
    return documented


def request_id_of(request: Request) -> str:
    """Return the id under which this request is logged and echoed."""
    return str(request.scope.get("state", {}).get("request_id", ""))


def note_part(request: Request, part: PartNames) -> None:
    """Have the problem that a request is going to be answered with say which part it is about."""
    request.scope["state"]["part"] = part


def unexpected(request: Request, error: Exception) -> FlawlineError:
    """Log what nobody expected, and return the fault that tells nothing of it."""
    _log.error("unexpected fault", exc_info=error, extra={"request_id": request_id_of(request)})
    return FlawlineError(PROBLEMS["internal"].example)


def _answer(
    request: Request,
    code: str,
    sentence: str,
    retry_after_s: float | None,
    headers: dict[str, str] | None = None,
) -> Response:
    request_id = request_id_of(request)
    headers = {**(headers or {}), **retry_after(code, retry_after_s), REQUEST_ID_HEADER: request_id}
    if code == "not_authenticated":
        headers["WWW-Authenticate"] = "Bearer"
    if code == "frame_too_large" and getattr(request.state, "must_close", False):
        headers["Connection"] = "close"
    path: str = request.scope["path"]
    if path == _OPEN_INFERENCE or path.startswith(f"{_OPEN_INFERENCE}/"):
        # The protocol's own form, whoever answers: its clients show this member and fail without it.
        status = _STATUS_UNDER_OPEN_INFERENCE.get(code, status_of(code))
        return Response(to_json({"error": sentence}), status, headers, "application/json")
    part = request.scope.get("state", {}).get("part")
    document = problem_document(code, sentence, request_id, request.path_params.get("line"), part)
    return Response(to_json(document), status_of(code), headers, PROBLEM_MEDIA_TYPE)
