"""The root and `/docs`: one page made from the OpenAPI document, without scripts or anything from other hosts.

Plants have no internet, and FastAPI's own pages load theirs from a content network; there they would stay blank.
"""

import json
from html import escape
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

router = APIRouter(include_in_schema=False)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h2 { margin-top: 2.5rem; font-size: 1.1rem; border-top: 1px solid #d0d7de; padding-top: 1rem; }
code, pre { font: 13px/1.45 ui-monospace, monospace; background: #f3f5f7; border-radius: 4px; }
code { padding: 0 .25em; } pre { padding: .7rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } td { vertical-align: top; padding: .2rem .8rem .2rem 0; }
.method { color: #0a6e31; text-transform: uppercase; }
"""


@router.get("/")
async def root() -> Response:
    """Say what this is and where to read on."""
    return JSONResponse({"service": "flawline", "docs": "/docs", "openapi": "/openapi.json", "lines": "/v1/lines"})


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Show every operation with its parameters, answers and examples."""
    document = request.app.openapi()
    operations = [
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    title = escape(document["info"]["title"])
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{escape(document['info'].get('description', ''))}</p>"
        '<p>For programs: <a href="openapi.json">openapi.json</a></p>' + "".join(operations) + "</html>"
    )
    return HTMLResponse(page, headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    parameters = "".join(
        f"<tr><td><code>{escape(entry['name'])}</code></td><td>{escape(entry['in'])}</td>"
        f"<td>{escape(entry.get('description', ''))}</td></tr>"
        for entry in operation.get("parameters", [])
    )
    bodies = ", ".join(f"<code>{escape(kind)}</code>" for kind in operation.get("requestBody", {}).get("content", {}))
    return (
        f'<h2><span class="method">{escape(method)}</span> <code>{escape(path)}</code></h2>'
        f"<p>{escape(operation.get('description') or operation.get('summary', ''))}</p>"
        + (f"<p>Body: {bodies}</p>" if bodies else "")
        + (f"<table>{parameters}</table>" if parameters else "")
        + "".join(_answer(status, answer) for status, answer in operation["responses"].items())
    )


def _answer(status: str, answer: dict[str, Any]) -> str:
    examples = [
        example["value"]
        for content in answer.get("content", {}).values()
        for example in content.get("examples", {}).values()
    ]
    shown = "".join(f"<pre>{escape(json.dumps(example, indent=2))}</pre>" for example in examples)
    head = f"<code>{escape(status)}</code> {escape(answer.get('description', ''))}"
    return f"<details><summary>{head}</summary>{shown}</details>" if shown else f"<p>{head}</p>"
