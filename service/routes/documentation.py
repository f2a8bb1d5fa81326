"""The root and `/docs`: one page made from the OpenAPI document, without scripts or anything from other hosts.

Plants have no internet, and FastAPI's own pages load theirs from a content network; there they would stay blank. The
page says all that the document says: what each operation takes and answers, with types, limits, defaults and examples,
every error, and every member of an answer. On a phone, tables become one entry below the other.
"""

import json
import re
from html import escape
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from service.schemas import WORDS_OF_PATTERN

router = APIRouter(include_in_schema=False)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 1rem; color: #1b1f24; }
h1 small { font-size: 1rem; font-weight: normal; color: #57606a; }
h2 { margin-top: 3rem; font-size: 1.2rem; border-top: 1px solid #d0d7de; padding-top: 1rem; }
h3 { margin: 1.5rem 0 .3rem; font-size: 1rem; }
a { color: #0550ae; }
code, pre { font: 13px/1.45 ui-monospace, monospace; background: #f3f5f7; border-radius: 4px; }
code { padding: 0 .25em; overflow-wrap: anywhere; } pre { padding: .7rem; overflow-x: auto; }
ul { padding-left: 1.2rem; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th { text-align: left; font-weight: 600; } th, td { vertical-align: top; padding: .35rem .8rem .35rem 0; }
tr { border-bottom: 1px solid #eaeef2; } td { overflow-wrap: anywhere; }
.name { width: 24%; } .kind { width: 26%; } .status { width: 7%; } .code { width: 20%; }
.note { color: #57606a; } .method { color: #0a6e31; font-weight: 600; text-transform: uppercase; }
details { margin: .4rem 0; } summary { cursor: pointer; } details > :not(summary) { margin-left: 1rem; }
details > table { width: calc(100% - 1rem); }
@media (max-width: 44rem) {
  table, tbody, tr, td { display: block; } thead { display: none; } tr { padding: .5rem 0; }
  td { padding: 0; } details > :not(summary) { margin-left: 0; } details > table { width: 100%; }
}
"""
_LIMITS = {
    "exclusiveMinimum": "more than {}",
    "minimum": "at least {}",
    "exclusiveMaximum": "less than {}",
    "maximum": "at most {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} entries",
    "maxItems": "at most {} entries",
}
_REFERENCE = "#/components/schemas/"


@router.get("/")
async def root() -> Response:
    """Say what this is and where to read on."""
    return JSONResponse({"service": "flawline", "docs": "/docs", "openapi": "/openapi.json", "lines": "/v1/lines"})


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Show every operation with its parameters, answers and examples, every error and every schema."""
    page = _page(request.app.openapi())
    return HTMLResponse(page, headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})


def _page(document: dict[str, Any]) -> str:
    info, components = document["info"], document["components"]
    operations = [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    title = escape(info["title"])
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{title} <small>{escape(info['version'])}</small></h1>{_paragraphs(info['description'])}",
            '<p>For programs: <a href="openapi.json">openapi.json</a></p>',
            _index(operations),
            _keys(components["securitySchemes"], may_be_open={} in document["security"]),
            *(_operation(*one, components) for one in operations),
            _errors(components["responses"]),
            '<h2 id="schemas">Schemas</h2>',
            *(_schema(name, schema) for name, schema in sorted(components["schemas"].items())),
            "</body></html>",
        )
    )


def _index(operations: list[tuple[str, str, dict[str, Any]]]) -> str:
    listed: dict[str, str] = {}
    for method, path, operation in operations:
        tag = operation.get("tags", [""])[0]
        first = operation.get("description", "").partition("\n\n")[0]
        listed[tag] = (
            listed.get(tag, "")
            + f'<li><a href="#{_anchor(method, path)}">{_head(method, path)}</a><br>{_words(first)}</li>'
        )
    groups = "".join(f"<h3>{escape(tag.capitalize())}</h3><ul>{entries}</ul>" for tag, entries in listed.items())
    more = '<a href="#keys">keys</a>, <a href="#errors">all errors</a>, <a href="#schemas">schemas</a>'
    return f"<nav>{groups}<p>Further down: {more}.</p></nav>"


def _keys(schemes: dict[str, Any], *, may_be_open: bool) -> str:
    ways = "".join(f"<li>{_words(scheme['description'])}</li>" for scheme in schemes.values())
    whether = (
        "A key is needed where the operator has given keys out; send it in one of two headers:"
        if may_be_open
        else "A key is needed; send it in one of two headers:"
    )
    return f'<h2 id="keys">Keys</h2><p>{whether}</p><ul>{ways}</ul>'


def _operation(method: str, path: str, operation: dict[str, Any], components: dict[str, Any]) -> str:
    parts = [
        f'<h2 id="{_anchor(method, path)}">{_head(method, path)}</h2>',
        _paragraphs(operation.get("description", "")),
    ]
    for place, title in (("path", "In the address"), ("header", "Headers"), ("query", "Query parameters")):
        entries = [entry for entry in operation.get("parameters", []) if entry["in"] == place]
        rows = [(entry["name"], entry["schema"], entry.get("description", "")) for entry in entries]
        if rows:
            parts.append(f"<h3>{title}</h3>{_members(rows, {entry['name'] for entry in entries if entry['required']})}")
    if "requestBody" in operation:
        body = operation["requestBody"]
        parts.append(f"<h3>Body</h3>{_paragraphs(body.get('description', ''))}{_contents(body['content'])}")
    answers = (_answer(status, answer, components) for status, answer in operation["responses"].items())
    return "".join((*parts, "<h3>Answers</h3>", *answers))


def _answer(status: str, answer: dict[str, Any], components: dict[str, Any]) -> str:
    contents = answer.get("content", {})
    codes = [code for content in contents.values() for code in content.get("examples", {}) if status >= "400"]
    links = ", ".join(f'<a href="#error-{escape(code)}"><code>{escape(code)}</code></a>' for code in codes)
    head = f"<code>{escape(status)}</code> {_words(answer.get('description', ''))}{': ' if links else ''}{links}"
    headers = {
        name: components["headers"][header["$ref"].rpartition("/")[2]] if "$ref" in header else header
        for name, header in answer.get("headers", {}).items()
    }
    rows = [(name, header["schema"], header.get("description", "")) for name, header in headers.items()]
    examples = "".join(
        _json(example["value"]) for content in contents.values() for example in content.get("examples", {}).values()
    )
    return f"<details><summary>{head}</summary>{_contents(contents)}{_members(rows, set())}{examples}</details>"


def _errors(answers: dict[str, Any]) -> str:
    rows = []
    for code, answer in answers.items():
        [content] = answer["content"].values()
        example = content["examples"][code]["value"]
        rows.append(
            f'<tr id="error-{escape(code)}"><td><code>{example["status"]}</code></td>'
            f"<td><code>{escape(code)}</code></td><td>{_words(answer['description'])}<br>"
            f'<span class="note">For example: {_words(example["detail"])}</span></td></tr>'
        )
    return (
        '<h2 id="errors">Errors</h2><p>Each is answered with a <a href="#schema-ProblemDocument">problem document</a>, '
        "whose <code>detail</code> says what to do.</p><table><thead><tr>"
        '<th class="status">Status</th><th class="code">Code</th><th>Meaning, and what to do</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _schema(name: str, schema: dict[str, Any]) -> str:
    rows = [(member, kind, kind.get("description", "")) for member, kind in schema.get("properties", {}).items()]
    kind = "" if rows else f"<p>{_kind(schema)}</p>"
    members = _members(rows, set(schema.get("required", [])))
    return (
        f'<h3 id="schema-{escape(name)}">{escape(name)}</h3>{_paragraphs(schema.get("description", ""))}{kind}{members}'
    )


def _contents(contents: dict[str, Any]) -> str:
    entries = "".join(
        f"<li><code>{escape(media_type)}</code> {_kind(content.get('schema', {}))}</li>"
        for media_type, content in contents.items()
    )
    return f"<ul>{entries}</ul>" if entries else ""


def _members(rows: list[tuple[str, dict[str, Any], str]], required: set[str]) -> str:
    """Write a table of names, each with its schema and what it means."""
    if not rows:
        return ""
    written = "".join(
        f"<tr><td><code>{escape(name)}</code>{' <b>required</b>' if name in required else ''}</td>"
        f'<td class="note">{_kind(schema)}</td><td>{_words(meaning)}</td></tr>'
        for name, schema, meaning in rows
    )
    head = '<th class="name">Name</th><th class="kind">Type</th><th>Meaning</th>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{written}</tbody></table>"


def _kind(schema: dict[str, Any]) -> str:
    """Say what values a schema allows: type or enumeration, limits, default and examples."""
    if "prefixItems" in schema:  # as many as there are kinds of them
        return f"[{', '.join(_kind(one) for one in schema['prefixItems'])}]"
    said = [_type(schema)]
    said += [words.format(_json_word(schema[limit])) for limit, words in _LIMITS.items() if limit in schema]
    if "pattern" in schema:
        known = WORDS_OF_PATTERN.get(schema["pattern"])
        said.append(f"matches <code>{escape(schema['pattern'])}</code>" if known is None else escape(known))
    if schema.get("default") is not None:
        said.append(f"default <code>{_json_word(schema['default'])}</code>")
    if "examples" in schema:
        shown = ", ".join(f"<code>{_json_word(example)}</code>" for example in schema["examples"])
        said.append(f"for example {shown}")
    return "; ".join(part for part in said if part)


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].removeprefix(_REFERENCE))
        return f'<a href="#schema-{name}">{name}</a>'
    if "anyOf" in schema:
        return ", or ".join(_kind(one) for one in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ("one of " if len(values) > 1 else "") + ", ".join(f"<code>{_json_word(one)}</code>" for one in values)
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return _object(schema) if schema.get("type") == "object" else _plain(schema)


def _object(schema: dict[str, Any]) -> str:
    if "properties" in schema:
        members = (f"<code>{escape(name)}</code> ({_kind(one)})" for name, one in schema["properties"].items())
        return f"form with {', '.join(members)}"
    each = schema.get("additionalProperties")
    return f"object by name, each {_kind(each)}" if isinstance(each, dict) else "object"


def _plain(schema: dict[str, Any]) -> str:
    return "bytes" if schema.get("format") == "binary" else escape(str(schema.get("type", "")))


def _head(method: str, path: str) -> str:
    return f'<span class="method">{escape(method)}</span> <code>{escape(path)}</code>'


def _anchor(method: str, path: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{method}{path}".lower()).strip("-")


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_words(part)}</p>" for part in text.split("\n\n") if part.strip())


def _words(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(" ".join(text.split()), quote=False))


def _json(value: Any) -> str:
    return f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False), quote=False)}</pre>"


def _json_word(value: Any) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value), quote=False)
