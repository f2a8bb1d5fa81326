"""Every row of the error table, over a real process with a real bundle, beside a neighbour that must not notice."""

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.factories import FRAME_HEIGHT, FRAME_WIDTH, encode, make_bundle, make_frame
from tests.servers import ServerProcess, Side

MAX_BYTES = 100_000
MAX_PIXELS = 20_000
INSPECT = "/v1/lines/demo_line/inspect"
GOOD = encode(make_frame())
RAW = {"Content-Type": "application/x-raw-frame", "X-Pixel-Format": "Mono8", "X-Width": "8", "X-Height": "4"}


def _authorised(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _entry(name: str, lines: list[str], actions: list[str], **more: int) -> dict[str, object]:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return {"name": name, "sha256": digest, "lines": lines, "actions": actions, **more}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    """A ready server with keys and small limits; each key is its holder's name."""
    place = tmp_path_factory.mktemp("table")
    make_bundle(place / "store")
    keys = [
        _entry("everything", ["*"], ["inspect", "read", "metrics"]),
        _entry("camera", ["demo_line"], ["inspect"]),
        _entry("reader", ["demo_line"], ["read"]),
        _entry("slow", ["*"], ["inspect"], quota_per_minute=1),
    ]
    (place / "keys.json").write_text(json.dumps(keys))
    environment = {
        "FLAWLINE_KEYS_FILE": str(place / "keys.json"),
        "FLAWLINE_MAX_BODY_BYTES": str(MAX_BYTES),
        "FLAWLINE_MAX_PIXELS": str(MAX_PIXELS),
        "FLAWLINE_FORMATS": "JPEG,PNG,TIFF,BMP",
        "FLAWLINE_MAX_FRAMES_PER_REQUEST": "3",
        "FLAWLINE_MAX_DEADLINE_S": "10",
    }
    with ServerProcess(place / "store", environment) as process:
        yield process.ready()


def _png(data: bytes) -> dict[str, object]:
    return {"content": data, "headers": {"Content-Type": "image/png"}}


def _raw(data: bytes, **headers: str) -> dict[str, object]:
    return {"content": data, "headers": RAW | {name.replace("_", "-"): value for name, value in headers.items()}}


def _twice(header: str, *values: str) -> dict[str, object]:
    return {"content": GOOD, "headers": [("Content-Type", "image/png"), *((header, value) for value in values)]}


def _png_header(width: int, height: int) -> bytes:
    """Return a PNG that promises a size and holds a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _several(image_format: str) -> bytes:
    buffer = io.BytesIO()
    pages = [Image.fromarray(make_frame(seed=seed)) for seed in (0, 1)]
    pages[0].save(buffer, format=image_format, save_all=True, append_images=pages[1:])
    return buffer.getvalue()


def _chunks() -> Iterator[bytes]:
    while True:  # an endless body; only a server that stops reading ever answers
        yield b"\0" * 4096


JPEG = encode(make_frame(), "JPEG")
ALPHA = encode(np.dstack([make_frame(), np.full((FRAME_HEIGHT, FRAME_WIDTH), 255, np.uint8)]))
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="frame"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    + GOOD
    + b"\r\n--x--\r\n"
)

TABLE = {
    "truncated PNG": (_png(GOOD[:-500]), 400, "unreadable_frame", "damaged or truncated"),
    "truncated JPEG": (
        {"content": JPEG[:-200], "headers": {"Content-Type": "image/jpeg"}},
        400,
        "unreadable_frame",
        "damaged or truncated",
    ),
    "animated PNG": (_png(_several("PNG")), 400, "unreadable_frame", "exactly one frame"),
    "TIFF of several pages": (
        {"content": _several("TIFF"), "headers": {"Content-Type": "image/tiff"}},
        400,
        "unreadable_frame",
        "exactly one frame",
    ),
    "zero-sized": (_png(_png_header(0, 4)), 400, "unreadable_frame", ""),
    "wrong mode": (_png(ALPHA), 400, "unreadable_frame", "without alpha"),
    "no image": (_png(b"certainly no image"), 400, "unreadable_frame", "no image of an accepted format"),
    "empty body": (_png(b""), 400, "unreadable_frame", "empty"),
    "raw bytes not stride times height": (_raw(b"\0" * 31), 400, "unreadable_frame", "32 bytes, but 31 arrived"),
    "raw value over its bits": (
        _raw(b"\xff" * 64, X_Pixel_Format="Mono12"),
        400,
        "unreadable_frame",
        "more than 12 bits",
    ),
    "broken multipart": (
        {"content": b"nonsense", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        400,
        "unreadable_frame",
        "multipart body is damaged",
    ),
    "truncated multipart": (
        {"content": FORM[:-9], "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        400,
        "unreadable_frame",
        "multipart body is truncated",
    ),
    "multipart without a boundary": (
        {"content": FORM, "headers": {"Content-Type": "multipart/form-data"}},
        400,
        "unreadable_frame",
        "boundary",
    ),
    "no key": (_png(GOOD) | {"key": None}, 401, "not_authenticated", "Authorization: Bearer"),
    "unknown key": (_png(GOOD) | {"key": "guess"}, 401, "not_authenticated", "not known"),
    "key without the line": (
        _png(GOOD) | {"key": "camera", "url": "/v1/lines/other/inspect"},
        403,
        "not_authorised",
        "does not cover this line",
    ),
    "key without the action": (_png(GOOD) | {"key": "reader"}, 403, "not_authorised", "'inspect'"),
    "unknown line": (_png(GOOD) | {"url": "/v1/lines/other/inspect"}, 404, "unknown_line", "/v1/lines"),
    "unknown line and no media type": (
        {"content": GOOD, "url": "/v1/lines/other/inspect"},
        404,
        "unknown_line",
        "/v1/lines",
    ),
    "unknown line and a large body": (
        _png(b"\0" * (MAX_BYTES + 1)) | {"url": "/v1/lines/other/inspect"},
        404,
        "unknown_line",
        "/v1/lines",
    ),
    "unknown line of a batch": (
        {"files": [("frames", GOOD)], "url": "/v1/lines/other/inspect-batch"},
        404,
        "unknown_line",
        "/v1/lines",
    ),
    "unknown version": (
        _png(GOOD) | {"params": {"bundle_version": "7"}},
        404,
        "unknown_version",
        "flawline admin activate",
    ),
    "unknown policy": (_png(GOOD) | {"params": {"policy": "strict"}}, 404, "unknown_policy", "policy"),
    "unknown address": (_png(GOOD) | {"url": "/v1/inspect"}, 404, "not_found", "/docs"),
    "wrong method": (_png(GOOD) | {"url": "/v1/lines"}, 405, "method_not_allowed", "/docs"),
    "too many bytes": (_png(b"\0" * (MAX_BYTES + 1)), 413, "frame_too_large", f"{MAX_BYTES} bytes"),
    "endless body": ({"chunks": _chunks, "headers": {"Content-Type": "image/png"}}, 413, "frame_too_large", "limit"),
    "too many pixels": (_png(encode(np.zeros((200, 200), np.uint8))), 413, "frame_too_large", f"{MAX_PIXELS} pixels"),
    "bomb": (_png(_png_header(2**31 - 1, 2**31 - 1)), 413, "frame_too_large", f"{MAX_PIXELS} pixels"),
    "too many raw pixels": (
        _raw(b"\0" * 8, X_Width="200", X_Height="200"),
        413,
        "frame_too_large",
        f"{MAX_PIXELS} pixels",
    ),
    "too many frames": (
        {"files": [("frames", GOOD)] * 4, "url": "/v1/lines/demo_line/inspect-batch"},
        413,
        "frame_too_large",
        "3 frames",
    ),
    "text": ({"content": GOOD, "headers": {"Content-Type": "text/plain"}}, 415, "media_type_not_allowed", "image/png"),
    "no media type": ({"content": GOOD}, 415, "media_type_not_allowed", "Content-Type"),
    "format not allowed here": (
        {"content": encode(make_frame(), "WEBP"), "headers": {"Content-Type": "image/webp"}},
        415,
        "media_type_not_allowed",
        "image/png",
    ),
    "format hidden behind another name": (
        _png(encode(make_frame(), "WEBP")),
        415,
        "media_type_not_allowed",
        "WEBP",
    ),
    "batch that is no form": (
        _png(GOOD) | {"url": "/v1/lines/demo_line/inspect-batch"},
        415,
        "media_type_not_allowed",
        "multipart/form-data",
    ),
    "deadline not positive": (_png(GOOD) | {"params": {"deadline_ms": "0"}}, 422, "parameter_invalid", "deadline_ms"),
    "deadline no number": (_png(GOOD) | {"params": {"deadline_ms": "nan"}}, 422, "parameter_invalid", "deadline_ms"),
    "deadline too long": (
        _png(GOOD) | {"params": {"deadline_ms": "10001"}},
        422,
        "parameter_invalid",
        "10000 ms here; the operator sets the longest one with FLAWLINE_MAX_DEADLINE_S",
    ),
    "deadline longer than any server's": (
        _png(GOOD) | {"params": {"deadline_ms": "600001"}},
        422,
        "parameter_invalid",
        "FLAWLINE_MAX_DEADLINE_S",
    ),
    "deadline of a batch too long": (
        {"files": [("frames", GOOD)], "url": "/v1/lines/demo_line/inspect-batch", "params": {"deadline_ms": "10001"}},
        422,
        "parameter_invalid",
        "FLAWLINE_MAX_DEADLINE_S",
    ),
    "unknown heatmap": (_png(GOOD) | {"params": {"heatmap": "purple"}}, 422, "parameter_invalid", "heatmap"),
    "negative sequence": (_png(GOOD) | {"params": {"sequence": "-1"}}, 422, "parameter_invalid", "sequence"),
    "misspelt parameter": (_png(GOOD) | {"params": {"deadlin_ms": "5"}}, 422, "parameter_invalid", "deadline_ms"),
    "parameter twice": (
        _png(GOOD) | {"params": [("view", "a"), ("view", "b")]},
        422,
        "parameter_invalid",
        "twice",
    ),
    "part twice": (_twice("X-Part-Id", "1", "2"), 422, "parameter_invalid", "X-Part-Id: stands there twice"),
    "part twice, the same": (_twice("X-Part-Id", "1", "1"), 422, "parameter_invalid", "X-Part-Id"),
    "deadline twice": (_twice("X-Deadline-Ms", "5000", "9000"), 422, "parameter_invalid", "X-Deadline-Ms"),
    "deadline joined by a proxy": (
        _png(GOOD) | {"headers": {"Content-Type": "image/png", "X-Deadline-Ms": "5000, 9000"}},
        422,
        "parameter_invalid",
        "deadline_ms",
    ),
    "policy twice": (_twice("X-Policy", "default", "strict"), 422, "parameter_invalid", "X-Policy"),
    "kind twice": (_twice("Content-Type", "image/jpeg"), 422, "parameter_invalid", "Content-Type"),
    "key twice": (_twice("X-API-Key", "camera", "reader"), 422, "parameter_invalid", "X-API-Key"),
    "request id twice": (_twice("X-Request-Id", "a", "b"), 422, "parameter_invalid", "X-Request-Id"),
    "raw width twice": (
        _raw(b"") | {"headers": [*RAW.items(), ("X-Width", "4")]},
        422,
        "parameter_invalid",
        "X-Width: stands there twice",
    ),
    "request id with a space": (
        {"content": GOOD, "headers": {"Content-Type": "image/png", "X-Request-Id": "a b"}},
        422,
        "parameter_invalid",
        "X-Request-Id",
    ),
    "part id that would break a header": (
        _png(GOOD) | {"params": {"part_id": "a\r\nX-Verdict: PASS"}},
        422,
        "parameter_invalid",
        "1 to 128 printable ASCII characters",
    ),
    "policy that is no name": (
        _png(GOOD) | {"params": {"policy": "../x"}},
        422,
        "parameter_invalid",
        "1 to 64 letters",
    ),
    "raw without a width": (
        {"content": b"\0", "headers": {"Content-Type": "application/x-raw-frame", "X-Pixel-Format": "Mono8"}},
        422,
        "parameter_invalid",
        "X-Width",
    ),
    "raw of an unknown format": (_raw(b"\0", X_Pixel_Format="Mono9"), 422, "parameter_invalid", "X-Pixel-Format"),
    "raw stride shorter than a row": (_raw(b"\0" * 28, X_Stride="7"), 422, "parameter_invalid", "stride is 7"),
    "form without a frame": ({"files": [("picture", GOOD)]}, 422, "parameter_invalid", "`frame`"),
    "form with another field": (
        {"files": [("frame", GOOD)], "data": {"view": "top"}},
        422,
        "parameter_invalid",
        "`frame`",
    ),
}


def _send(server: ServerProcess, request: dict[str, object]) -> httpx.Response:
    request = dict(request)
    key = request.pop("key", "everything")
    headers = httpx.Headers(request.pop("headers", {}))  # of which one may stand there twice
    if key is not None:
        headers = httpx.Headers([*headers.multi_items(), *_authorised(str(key)).items()])
    files = request.pop("files", None)
    if isinstance(files, list):
        request["files"] = [(field, ("part.png", data, "image/png")) for field, data in files]
    chunks = request.pop("chunks", None)
    if chunks is not None:
        request["content"] = chunks()
    return server.http.post(request.pop("url", INSPECT), headers=headers, **request)


def _inspect_good(server: ServerProcess) -> httpx.Response:
    return httpx.post(server.url + INSPECT, headers={"Content-Type": "image/png"} | _authorised("camera"), content=GOOD)


@pytest.mark.parametrize("row", TABLE)
def test_request_when_it_is_at_fault_then_its_row_of_the_table_is_answered_and_no_neighbour_notices(server, row):
    """Each fault has its status, its code, a sentence that helps and NO_VERDICT; a frame in flight beside it passes."""
    request, status, code, sentence = TABLE[row]
    neighbour = Side(lambda: _inspect_good(server))

    answer = _send(server, request)

    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (status, code), problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["verdict"] == "NO_VERDICT"
    assert problem["status"] == status
    assert sentence in problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert neighbour.answer().json()["verdict"] == "PASS"


def test_caller_when_over_its_quota_then_429_with_the_wait_and_others_go_on(server):
    """The second frame of a quota of one a minute is refused with Retry-After; another key is not touched."""
    assert _send(server, _png(GOOD) | {"key": "slow"}).status_code == 200

    refused = _send(server, _png(GOOD) | {"key": "slow"})

    assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["verdict"] == "NO_VERDICT"
    assert _inspect_good(server).status_code == 200


def test_body_when_it_only_promises_too_much_then_413_before_it_is_read(server):
    """A Content-Length over the limit is refused on the headers alone; not one byte of the body is waited for."""
    import http.client

    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", INSPECT)
    for name, value in ({"Content-Type": "image/png", "Content-Length": "10000000000"} | _authorised("camera")).items():
        connection.putheader(name, value)
    connection.endheaders()

    answer = connection.getresponse()

    assert answer.status == 413
    assert answer.headers["connection"] == "close"
    assert json.loads(answer.read())["code"] == "frame_too_large"
    connection.close()


def test_metrics_when_faults_were_answered_then_each_is_counted_by_its_code_and_none_as_a_verdict(server):
    """Faults show in `flawline_no_verdict_total` under their line and code; names nobody knows are not labels."""
    _send(server, _png(b"no image"))
    _send(server, _png(GOOD) | {"url": "/v1/lines/never_heard_of/inspect"})

    text = server.http.get("/metrics", headers=_authorised("everything")).text

    assert 'flawline_no_verdict_total{line="demo_line",reason="unreadable_frame"}' in text
    assert 'flawline_no_verdict_total{line="unknown",reason="unknown_line"}' in text
    assert "never_heard_of" not in text


@pytest.mark.parametrize(
    ("url", "key", "status"),
    [
        ("/metrics", None, 401),
        ("/metrics", "camera", 403),
        ("/v1/lines", None, 401),
        ("/v1/lines", "camera", 403),
        ("/v1/lines/demo_line", "reader", 200),
        ("/v1/lines/other", "reader", 403),
        ("/v1/lines/other", "everything", 404),
        ("/v1/inspections/unknown/heatmap", None, 401),
        ("/v1/inspections/unknown/heatmap", "camera", 404),
        ("/healthz/live", None, 200),
        ("/healthz/ready", None, 200),
        ("/docs", None, 200),
    ],
)
def test_address_when_read_then_only_health_and_documentation_are_open(server, url, key, status):
    """Reading needs its key as inspecting does; orchestrators and readers of the documentation need none."""
    answer = server.http.get(url, headers={} if key is None else _authorised(key))

    assert answer.status_code == status
    if status >= 400:
        assert answer.json()["verdict"] == "NO_VERDICT"
