"""Frames that are sent with a digest: judged where it is theirs, and without a verdict where it is not."""

import gzip
import json
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256

import httpx
import pytest

from service.settings import Settings
from tests.factories import FRAME_HEIGHT, FRAME_WIDTH, encode, make_bundle, make_frame
from tests.servers import serve_in_thread, wait_until_ready

INSPECT = "/v1/lines/demo_line/inspect"
BATCH = "/v1/lines/demo_line/inspect-batch"
INFER = "/v2/models/demo_line/infer"
FRAME = encode(make_frame())
RAW_KIND = {
    "Content-Type": "application/x-raw-frame",
    "X-Pixel-Format": "RGB8",
    "X-Width": str(FRAME_WIDTH),
    "X-Height": str(FRAME_HEIGHT),
}


@pytest.fixture(scope="module")
def http(tmp_path_factory) -> Iterator[httpx.Client]:
    """A ready server in a thread."""
    store = tmp_path_factory.mktemp("store")
    make_bundle(store)
    with serve_in_thread(Settings(store_directory=store)) as client:
        wait_until_ready(client)
        yield client


def _digest(content: bytes) -> str:
    return f"sha-256=:{b64encode(sha256(content).digest()).decode()}:"


def _form(field: str, *parts: tuple[bytes, str]) -> bytes:
    """Return a form whose parts have a digest of their own where one is given."""
    body = b""
    for content, digest in parts:
        body += f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="a.png"\r\n'.encode()
        body += f"Content-Digest: {digest}\r\n".encode() if digest else b""
        body += b"Content-Type: image/png\r\n\r\n" + content + b"\r\n"
    return body + b"--x--\r\n"


FORM_KIND = {"Content-Type": "multipart/form-data; boundary=x"}
_TENSOR = len(FRAME).to_bytes(4, "little") + FRAME
_ENTRY = {
    "name": "encoded_frames",
    "datatype": "BYTES",
    "shape": [1],
    "parameters": {"binary_data_size": len(_TENSOR)},
}
BODIES = {
    "image": (INSPECT, FRAME, {"Content-Type": "image/png"}),
    "raw": (INSPECT, make_frame().tobytes(), RAW_KIND),
    "form": (INSPECT, _form("frame", (FRAME, "")), FORM_KIND),
    "form of several": (BATCH, _form("frames", (FRAME, ""), (FRAME, "")), FORM_KIND),
}


@pytest.mark.parametrize("kind", BODIES)
def test_body_when_its_digest_is_told_then_it_is_judged_only_where_that_fits(http, kind):
    """The digest is that of the whole body, as HTTP has it."""
    url, content, headers = BODIES[kind]

    fitting = http.post(url, content=content, headers={**headers, "Content-Digest": _digest(content)})
    differing = http.post(url, content=content, headers={**headers, "Content-Digest": _digest(content + b"x")})

    assert fitting.status_code == 200
    assert "PASS" in fitting.text
    _is_refused(differing)


def _is_refused(answer: httpx.Response) -> None:
    told = answer.json()
    assert (answer.status_code, told["code"], told["verdict"]) == (400, "unreadable_frame", "NO_VERDICT")
    assert "Content-Digest" in told["detail"]


def test_batch_when_each_frame_has_a_digest_then_the_one_that_differs_alone_has_no_verdict(http):
    """A part of a form may bring its own digest among its headers."""
    body = _form("frames", (FRAME, _digest(FRAME)), (FRAME, _digest(b"another")), (FRAME, "md5=:AAAA:"), (FRAME, ""))

    items = http.post(BATCH, content=body, headers=FORM_KIND).json()["items"]

    assert [item["verdict"] for item in items] == ["PASS", "NO_VERDICT", "NO_VERDICT", "PASS"]
    assert [item.get("code") for item in items] == [None, "unreadable_frame", "parameter_invalid", None]


@pytest.mark.parametrize("coding", [None, "gzip"])
def test_infer_when_the_digest_is_told_then_it_is_that_of_the_body_as_it_came(http, coding):
    """Under /v2 too; of a compressed body it is the compressed bytes' digest."""
    head = json.dumps({"inputs": [_ENTRY]}).encode()
    plain = head + _TENSOR
    content = plain if coding is None else gzip.compress(plain)
    headers = {"Inference-Header-Content-Length": str(len(head))}
    headers |= {} if coding is None else {"Content-Encoding": coding}

    answers = [
        http.post(INFER, content=content, headers={**headers, "Content-Digest": _digest(told)})
        for told in (content, content + b"x")
    ]

    assert [answer.status_code for answer in answers] == [200, 400]
    assert "Content-Digest" in answers[1].json()["error"]


def test_request_when_its_digest_can_not_be_read_then_no_body_is_taken(http):
    """What can't be checked is not taken for checked."""
    answer = http.post(INSPECT, content=FRAME, headers={"Content-Type": "image/png", "Content-Digest": "md5=:AAAA:"})

    assert (answer.status_code, answer.json()["code"]) == (422, "parameter_invalid")
