"""What OpenAPI says of operations whose bodies and answers FastAPI can't see: the hot path builds them itself.

A document is that of the running server: the longest deadline, the kinds of frames and the sizes that it accepts are
its own. What members mean comes from the docstrings of `service/schemas.py`, and the table of errors from the classes
of `service/errors.py`, so that neither can say something else than the code.
"""

import inspect
import re
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service import schemas
from service.contract.frames import FORMAT_OF_MEDIA_TYPE
from service.contract.policy import PolicyFile
from service.errors import MomentError, known_codes, meanings
from service.routes.accounting import TRACE_PARENT_HEADER
from service.routes.answers import MEDIA_TYPE_OF_HEATMAP
from service.routes.bodies import BYTES_MEDIA_TYPE, MULTIPART_MEDIA_TYPE, RAW_MEDIA_TYPE
from service.routes.headers import CONTENT_DIGEST_HEADER, OPTION_HEADERS, RAW_HEADERS
from service.routes.problems import PROBLEMS, REQUEST_ID_HEADER, responses
from service.schemas import (
    BatchAnswer,
    InspectionAnswer,
    InspectionOptions,
    LineAnswer,
    LinesAnswer,
    PoliciesAnswer,
    ProblemDocument,
    RawFrameOptions,
    VersionsAnswer,
)
from service.settings import Settings

# What another layer than the operation's own may answer any request with, so that operations do not list it.
_TO_ANY_REQUEST = {
    "caller_error": "what is no HTTP/1.1 request, or has a head of more than 64 KiB; the connection is closed then",
    "not_found": "an address that does not exist",
    "method_not_allowed": "a method that the address does not take",
    "parameter_invalid": "a header of ours that stands there twice",
    "internal": "a fault of ours that nobody foresaw",
}
_ERRORS = (
    "\n\nErrors are problem documents (RFC 9457), and their `verdict` is `NO_VERDICT`; take no answer at all for that, "
    "too. Each operation lists its own, and `components/responses` all there are. Any request may be answered with "
    + ", ".join(f"{PROBLEMS[code].status} `{code}` ({why})" for code, why in _TO_ANY_REQUEST.items())
    + "."
)
_INSPECTING = "/v1/lines/{line}/inspect"  # and `-batch`
_MODELS = (
    BatchAnswer,
    InspectionAnswer,
    LineAnswer,
    LinesAnswer,
    PoliciesAnswer,
    PolicyFile,
    ProblemDocument,
    VersionsAnswer,
)
_MODEL_OF_COMPONENT = {
    kind.__name__: kind
    for kind in (*vars(schemas).values(), PolicyFile)
    if isinstance(kind, type) and issubclass(kind, BaseModel)
}
_ATTRIBUTE = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)
_KEYS = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "The key, where the service asks for one, as `Authorization: Bearer <key>`.",
    },
    "key": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "The key as `X-API-Key: <key>`, for programs that can't send the other header.",
    },
}
# Of parameters that routes declare themselves.
_WORDS_OF_PARAMETER = {
    "line": "Name of the line; `GET /v1/lines` lists them.",
    "inspection_id": "`inspection_id` of the answer.",
    "kind": "Which picture; another one than was asked for with the frame may be fetched as well.",
    "bundle": "Name of the bundle; `GET /v1/bundles` lists them.",
    "version": "Which version; of a bundle a number, of a policy a name.",
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_EXAMPLE = {
    "verdict": "FAIL",
    "score": 0.5490196347236633,
    "p_value": 0.01639344262295082,
    "calibration": "good_parts",
    "thresholds": {"review": 0.1, "fail": 0.2},
    "regions": [
        {
            "box": {"x": 400.0, "y": 240.0, "width": 200.0, "height": 160.0},
            "polygon": [[400.0, 240.0], [600.0, 240.0], [600.0, 400.0], [400.0, 400.0]],
            "area_px": 32000.0,
            "peak": 0.5490196347236633,
            "mean": 0.5272058844566345,
        }
    ],
    "regions_total": 1,
    "inspection_id": "3d2f7c0f7b8e4c53a1d4b6f0c9e8a712",
    "request_id": "press-4-000917",
    "part_id": "917",
    "view": "top",
    "sequence": 917,
    "line": "demo_line",
    "bundle": {"version": "3", "digest": _DIGEST},
    "policy": {"version": "default", "digest": _DIGEST},
    "detector": "inp_former",
    "device": "cpu",
    "precision": "fp32",
    "frame": {"height": 640, "width": 800, "digest": _DIGEST},
    "heatmap": {
        "kind": "overlay",
        "media_type": "image/png",
        "url": "/v1/inspections/3d2f7c0f7b8e4c53a1d4b6f0c9e8a712/heatmap?kind=overlay",
    },
    "timings_ms": {
        "receive": 0.412,
        "decode": 4.018,
        "queue": 0.105,
        "infer": 21.733,
        "postprocess": 0.611,
        "encode": 0.094,
        "total": 27.402,
    },
}


def reference(name: str) -> dict[str, Any]:
    """Return a JSON media type whose schema is a component."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def complete_openapi(
    app: FastAPI, settings: Settings, models: tuple[type[BaseModel], ...] = _MODELS, *, may_be_open: bool = True
) -> None:
    """Add what operations refer to by name to an application's OpenAPI document, and what holds for all of them.

    Args:
        app: whose document it is.
        settings: of the running server, whose limits are told.
        models: components.
        may_be_open: whether a key may be asked for or not, as the operator likes.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = generate()
        _, definitions = models_json_schema(
            [(model, "serialization") for model in models], ref_template="#/components/schemas/{model}"
        )
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(definitions["$defs"])
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
        for name, schema in components["schemas"].items():
            if name in _MODEL_OF_COMPONENT:
                _describe_members(schema, _MODEL_OF_COMPONENT[name])
        components["responses"] = {code: _error(code) for code in sorted(PROBLEMS, key=_status_and_code)}
        components["headers"] = {REQUEST_ID_HEADER: _REQUEST_ID_ANSWERED}
        components["securitySchemes"] = _KEYS
        document["security"] = [*([{}] if may_be_open else []), *({name: []} for name in _KEYS)]
        document["info"]["description"] += _ERRORS
        for path, methods in document["paths"].items():
            for operation in methods.values():
                _complete_operation(operation)
                if path.startswith(_INSPECTING):
                    _state_limits(operation, settings)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def _status_and_code(code: str) -> tuple[int, str]:
    return PROBLEMS[code].status, code


def _error(code: str) -> dict[str, Any]:
    """Return what is told of one error wherever it comes: its meaning, whether to send it again, and an example."""
    [answer] = responses(code).values()
    status = PROBLEMS[code].status
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        then = "The same request may succeed after as long as `Retry-After` says."
    elif status < HTTPStatus.INTERNAL_SERVER_ERROR:
        then = "The request is at fault, and would fail again."
    elif code in known_codes(MomentError):
        then = "The moment is at fault: the same request may succeed later."
    else:
        then = "The service is at fault; its log says more."
    return answer | {"description": f"{meanings().get(code, f'{PROBLEMS[code].title}.')} {then}"}


def _describe_members(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Give each member what the docstring says of it, and take that out of the description of the whole.

    Args:
        schema: of the model.
        model: whose docstring, and those of the models that it extends, have a part `Attributes:`.
    """
    said: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        said |= dict(_ATTRIBUTE.findall(inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")[2]))
    for name, member in schema.get("properties", {}).items():
        words = " ".join(said.get(name, "").split())
        if words:
            member.setdefault("description", f"{words[0].upper()}{words[1:]}")
    if "description" in schema:
        schema["description"] = schema["description"].partition("\nAttributes:\n")[0].strip()


def _complete_operation(operation: dict[str, Any]) -> None:
    """Say of an operation what its route does not: what its parameters mean, and what every answer has."""
    _drop_foreign_answer(operation["responses"])
    for parameter in operation.get("parameters", []):
        if parameter["name"] in _WORDS_OF_PARAMETER:
            parameter.setdefault("description", _WORDS_OF_PARAMETER[parameter["name"]])
    for status, answer in operation["responses"].items():
        if status == str(HTTPStatus.UNAUTHORIZED.value):
            answer["headers"] = answer.get("headers", {}) | {"WWW-Authenticate": _header("`Bearer`.")}
        reference_to_id = {"$ref": f"#/components/headers/{REQUEST_ID_HEADER}"}
        answer["headers"] = {REQUEST_ID_HEADER: reference_to_id} | answer.get("headers", {})


def _state_limits(operation: dict[str, Any], settings: Settings) -> None:
    """Put the server's own limits into an operation that takes frames, where the models know the widest ones alone."""
    for parameter in operation["parameters"]:
        if parameter["name"] in ("deadline_ms", OPTION_HEADERS["deadline_ms"]):
            limits = {"maximum": settings.max_deadline_s * 1000, "default": settings.default_deadline_s * 1000}
            parameter["schema"] |= {name: int(ms) if ms == int(ms) else ms for name, ms in limits.items()}
    body = operation["requestBody"]
    for media_type, image_format in FORMAT_OF_MEDIA_TYPE.items():
        if image_format not in settings.formats:
            body["content"].pop(media_type, None)
    body["description"] = (
        f"At most {settings.max_body_bytes} bytes (FLAWLINE_MAX_BODY_BYTES); frames of at most {settings.max_pixels} "
        f"pixels (FLAWLINE_MAX_PIXELS), as {', '.join(sorted(settings.formats))} (FLAWLINE_FORMATS) or raw."
    )
    frames = body["content"][MULTIPART_MEDIA_TYPE]["schema"]["properties"].get("frames")
    if frames is not None:
        frames |= {"minItems": 1, "maxItems": settings.max_frames_per_request}


def _drop_foreign_answer(documented: dict[str, Any]) -> None:
    """Take out the framework's own form of 422, in which nothing is ever answered here."""
    if "HTTPValidationError" in str(documented.get("422", "")):
        del documented["422"]


def _members(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Return the schema of each member of what a request may say; whatever may be absent is not null then."""
    schema = model.model_json_schema()
    _describe_members(schema, model)
    members = {}
    for name, member in schema["properties"].items():
        known = {key: value for key, value in member.items() if key not in ("title", "anyOf") and value is not None}
        [kind, *_] = member.get("anyOf", [{}])
        members[name] = kind | known
    return members


def _parameter(name: str, place: str, schema: dict[str, Any], more: str = "") -> dict[str, Any]:
    described = dict(schema)
    words = described.pop("description") + more
    return {"name": name, "in": place, "required": False, "description": words, "schema": described}


def _parameters() -> list[dict[str, Any]]:
    options = _members(InspectionOptions)
    listed = [
        _parameter(header, "header", options[name], f" As the query parameter `{name}`, which wins.")
        for name, header in OPTION_HEADERS.items()
    ]
    listed += [_parameter(name, "query", options[name]) for name in OPTION_HEADERS]
    request_id = {
        "description": "Your name of this try, new for each one: repeated in the answer and in the log, made up where "
        "absent. 1 to 128 printable ASCII characters without blanks.",
        "type": "string",
        "maxLength": 128,
        "examples": ["press-4-000917"],
    }
    trace_parent = {
        "description": "W3C Trace Context: the trace that this inspection is part of, where the operator collects any.",
        "type": "string",
    }
    return [
        *listed,
        _parameter(REQUEST_ID_HEADER, "header", request_id),
        _parameter(TRACE_PARENT_HEADER, "header", trace_parent),
    ]


def _digest_parameter() -> dict[str, Any]:
    schema = {
        "description": "SHA-256 of the body as `sha-256=:<Base64>:` (RFC 9530), or of a part of a form among its own "
        "headers. Where what came is something else, there is no verdict (`unreadable_frame`).",
        "type": "string",
    }
    return _parameter(CONTENT_DIGEST_HEADER, "header", schema)


def _raw_parameters() -> list[dict[str, Any]]:
    with_raw = f" Of a raw frame: `{RAW_MEDIA_TYPE}`, or `{BYTES_MEDIA_TYPE}` with `{RAW_HEADERS['pixel_format']}`."
    options = _members(RawFrameOptions)
    return [_parameter(header, "header", options[name], with_raw) for name, header in RAW_HEADERS.items()]


def _header(description: str, kind: str = "string", **more: Any) -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind, **more}}


def _multipart(field: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"schema": {"type": "object", "required": [field], "properties": {field: schema}}}


_REQUEST_ID_ANSWERED = _header("That of the request, or one that was made up where it had none or one that can't be.")
_SERVER_TIMING = {"Server-Timing": _header("As `timings_ms` of the JSON, in milliseconds.")}
_ORIGIN_HEADERS = {
    "Flawline-Inspection-Id": _header("`inspection_id`."),
    "Flawline-Line": _header("`line`."),
    "Flawline-Bundle-Version": _header("`bundle.version`."),
    "Flawline-Bundle-Digest": _header("`bundle.digest`, SHA-256."),
    "Flawline-Policy-Version": _header("`policy.version`."),
    "Flawline-Policy-Digest": _header("`policy.digest`, SHA-256."),
    "Flawline-Frame-Digest": _header("`frame.digest`, SHA-256 of the frame's bytes as they were sent."),
}
_PICTURE_HEADERS = {
    "Flawline-Verdict": _header("`verdict`.", enum=["PASS", "REVIEW", "FAIL"]),
    "Flawline-Score": _header("`score`.", "number"),
    "Flawline-P-Value": _header("`p_value`; absent where it is null.", "number"),
    "Flawline-Review-Threshold": _header("`thresholds.review`.", "number"),
    "Flawline-Fail-Threshold": _header("`thresholds.fail`.", "number"),
    "Flawline-Calibration": _header("`calibration`.", enum=["good_parts", "self"]),
    "Flawline-Part-Id": _header("`part_id`; absent where it is null."),
    "Flawline-Device": _header("`device`."),
    "Flawline-Precision": _header("`precision`."),
}
_MAP_HEADERS = {
    "Flawline-Shape": _header("With `f16`: height and width of the map, as `h,w`."),
    "Flawline-Window": _header(
        "With `f16`: where the map lies on the original frame, as `top,left,height,width` in its pixels."
    ),
}


def _picture_headers() -> dict[str, dict[str, Any]]:
    """Return the headers that come with a picture alone, whose body can't say what the JSON says."""
    return {
        name: header | {"description": f"With `Accept: image/png`: {header['description']}"}
        for name, header in (_ORIGIN_HEADERS | _PICTURE_HEADERS).items()
    }


FRAME_OPERATION: dict[str, Any] = {
    "parameters": [*_parameters(), _digest_parameter(), *_raw_parameters()],
    "requestBody": {
        "required": True,
        "content": {
            **dict.fromkeys((*FORMAT_OF_MEDIA_TYPE, RAW_MEDIA_TYPE, BYTES_MEDIA_TYPE), _BINARY),
            MULTIPART_MEDIA_TYPE: _multipart("frame", _BINARY["schema"]),
        },
    },
    "responses": {
        "200": {
            "description": "The inspection. With `Accept: image/png` its overlay, what it says in headers.",
            "headers": _SERVER_TIMING | _picture_headers(),
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/InspectionAnswer"},
                    "examples": {"a defect": {"value": _EXAMPLE}},
                },
                "image/png": _BINARY,
            },
        }
    },
}
BATCH_OPERATION: dict[str, Any] = {
    "parameters": [*_parameters(), _digest_parameter(), *_raw_parameters()],
    "requestBody": {
        "required": True,
        "content": {MULTIPART_MEDIA_TYPE: _multipart("frames", {"type": "array", "items": _BINARY["schema"]})},
    },
    "responses": {
        "200": {
            "description": "One entry a frame, in order.",
            "content": reference("BatchAnswer"),
        }
    },
}
HEATMAP_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The heatmap.",
        "headers": _ORIGIN_HEADERS | _MAP_HEADERS,
        "content": dict.fromkeys(sorted(set(MEDIA_TYPE_OF_HEATMAP.values())), _BINARY),
    }
}
