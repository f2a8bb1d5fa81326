"""What OpenAPI says of operations whose bodies and answers FastAPI can't see: the hot path builds them itself."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.contract.frames import FORMAT_OF_MEDIA_TYPE
from service.routes.answers import MEDIA_TYPE_OF_HEATMAP
from service.routes.bodies import BYTES_MEDIA_TYPE, MULTIPART_MEDIA_TYPE, RAW_MEDIA_TYPE
from service.routes.headers import CONTENT_DIGEST_HEADER, OPTION_HEADERS, RAW_HEADERS
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

_MODELS = (
    BatchAnswer,
    InspectionAnswer,
    LineAnswer,
    LinesAnswer,
    PoliciesAnswer,
    ProblemDocument,
    VersionsAnswer,
)
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
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


def complete_openapi(app: FastAPI, models: tuple[type[BaseModel], ...] = _MODELS, *, may_be_open: bool = True) -> None:
    """Add what operations refer to by name to an application's OpenAPI document.

    Args:
        app: whose document it is.
        models: components.
        may_be_open: whether a key may be asked for or not, as the operator likes.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        _, definitions = models_json_schema(
            [(model, "serialization") for model in models], ref_template="#/components/schemas/{model}"
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(definitions["$defs"])
        document["components"]["securitySchemes"] = _KEYS
        document["security"] = [*([{}] if may_be_open else []), *({name: []} for name in _KEYS)]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for methods in document["paths"].values():
            for operation in methods.values():
                _drop_foreign_answer(operation["responses"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def _drop_foreign_answer(documented: dict[str, Any]) -> None:
    """Take out the framework's own form of 422, in which nothing is ever answered here."""
    if "HTTPValidationError" in str(documented.get("422", "")):
        del documented["422"]


def _parameters() -> list[dict[str, Any]]:
    listed = []
    options = InspectionOptions.model_json_schema()["properties"]
    for name, header in OPTION_HEADERS.items():
        schema = {key: value for key, value in options[name].items() if key != "title"}
        listed.append({"name": name, "in": "query", "required": False, "schema": schema})
        listed.append({"name": header, "in": "header", "required": False, "schema": schema})
        listed[-1]["description"] = f"The same as the query parameter `{name}`, which wins."
    listed.append(
        {"name": "X-Request-Id", "in": "header", "required": False, "schema": {"type": "string", "maxLength": 128}}
    )
    listed[-1]["description"] = "Echoed and logged; made up where absent."
    return listed


def _digest_parameter() -> dict[str, Any]:
    return {
        "name": CONTENT_DIGEST_HEADER,
        "in": "header",
        "required": False,
        "description": "SHA-256 of the body as `sha-256=:<Base64>:` (RFC 9530), or of a part of a form among its own "
        "headers. Where what came is something else, there is no verdict (`unreadable_frame`).",
        "schema": {"type": "string"},
    }


def _raw_parameters() -> list[dict[str, Any]]:
    options = RawFrameOptions.model_json_schema()["properties"]
    return [
        {
            "name": header,
            "in": "header",
            "required": False,
            "description": f"With `{RAW_MEDIA_TYPE}`, or with `{BYTES_MEDIA_TYPE}` and `X-Pixel-Format`.",
            "schema": {key: value for key, value in options[name].items() if key != "title"},
        }
        for name, header in RAW_HEADERS.items()
    ]


def _multipart(field: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"schema": {"type": "object", "required": [field], "properties": {field: schema}}}


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
            "headers": {"Server-Timing": {"description": "As `timings_ms`.", "schema": {"type": "string"}}},
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
    200: {"description": "The heatmap.", "content": dict.fromkeys(sorted(set(MEDIA_TYPE_OF_HEATMAP.values())), _BINARY)}
}
