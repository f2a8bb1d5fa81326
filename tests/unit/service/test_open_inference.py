"""Promises of the protocol in bytes: what fits is read exactly, everything else is refused without cost."""

import gzip
import json
import struct
import tracemalloc
import zlib
from base64 import b64encode
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import FlawlineError, FrameTooLarge, MediaTypeNotAllowed, Overloaded, ParameterInvalid
from service.open_inference import (
    MAX_JSON_BYTES,
    MAX_JSON_MARKS,
    InferRequest,
    WantedOutput,
    coding_of,
    compress,
    decompress,
    model_spec,
    parse_request,
    print_answer,
    wanted_coding,
    wants_ready_only,
)

H, W = 2, 3
MODEL = model_spec((H, W), (4, 5), max_frames=3)
EVERYTHING = ("score", "anomaly_map", "verdict", "p_value")
PIXELS = list(range(2 * H * W * 3))
FRAMES = (bytes(PIXELS[: H * W * 3]), bytes(PIXELS[H * W * 3 :]))


def elements(*values: bytes) -> bytes:
    """Return a BYTES tensor in binary form."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def encoded(frames: int = 1, **changes: Any) -> dict[str, Any]:
    """Return the JSON form of an input of encoded frames, with some members replaced, or removed where None."""
    entry = {"name": "encoded_frames", "shape": [frames], "datatype": "BYTES", "data": ["x"] * frames} | changes
    return {name: value for name, value in entry.items() if value is not None}


def binary(name: str, datatype: str, shape: list[int], size: int) -> dict[str, Any]:
    """Return the JSON form of an input whose bytes follow."""
    return {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}


def parse(document: Any, tail: bytes = b"") -> InferRequest:
    """Parse a request whose JSON and binary tensors are given apart."""
    head = json.dumps(document).encode()
    return parse_request(head + tail, str(len(head)) if tail else None, MODEL)


def nested(values: list[Any], shape: list[int]) -> Any:
    """Return values as lists in lists."""
    return np.array(values).reshape(shape).tolist()


@pytest.mark.parametrize("shape", [[2], [2, 1]], ids=["flat", "column"])
def test_encoded_frames_when_binary_then_each_is_read_to_the_byte(shape):
    """Images behind the JSON come out as they went in, in order, whatever bytes they hold."""
    images = (b"\xff\xd8 one", b"\0\0\0\0")
    tail = elements(*images)

    asked = parse({"inputs": [binary("encoded_frames", "BYTES", shape, len(tail))]}, tail)

    assert asked.frames == images
    assert not asked.is_network_input
    assert asked.part_ids == (None, None)


def test_encoded_frames_when_base64_in_json_then_each_is_read_to_the_byte():
    """Clients without binary tensors send images as base64, and say so."""
    data = [b64encode(b"\xff\xd8").decode()]

    asked = parse({"inputs": [encoded(data=data, parameters={"content_type": "base64"})]})

    assert asked.frames == (b"\xff\xd8",)


@pytest.mark.parametrize(
    "data",
    [PIXELS, nested(PIXELS, [2, H, W, 3]), [float(value) for value in PIXELS]],
    ids=["flat", "nested", "as real numbers"],
)
def test_frames_when_in_json_then_read_row_by_row(data):
    """Pixels may be flat or nested, and whole numbers of either kind."""
    asked = parse({"inputs": [{"name": "frames", "shape": [2, H, W, 3], "datatype": "UINT8", "data": data}]})

    assert asked.frames == FRAMES
    assert asked.is_network_input


def test_frames_when_binary_with_a_second_input_then_both_are_taken_in_the_order_of_the_inputs():
    """Binary tensors follow each other without a gap, and part ids belong to their frames; an empty one names none."""
    names = elements(b"part 7", b"")
    inputs = [
        binary("part_id", "BYTES", [2, 1], len(names)),
        binary("frames", "UINT8", [2, H, W, 3], len(PIXELS)),
    ]

    asked = parse({"inputs": inputs}, names + bytes(PIXELS))

    assert asked.frames == FRAMES
    assert asked.part_ids == ("part 7", None)


@pytest.mark.parametrize(
    ("document", "wanted"),
    [
        ({}, tuple(WantedOutput(name, is_binary=False) for name in EVERYTHING)),
        (
            {"outputs": [], "parameters": {"binary_data_output": True}},
            tuple(WantedOutput(name, is_binary=True) for name in EVERYTHING),
        ),
        (
            {
                "outputs": [{"name": "verdict"}, {"name": "score", "parameters": {"binary_data": False}}],
                "parameters": {"binary_data_output": True},
            },
            (WantedOutput("verdict", is_binary=True), WantedOutput("score", is_binary=False)),
        ),
    ],
    ids=["left out", "all binary", "one apart"],
)
def test_outputs_when_wanted_then_in_that_order_and_form(document, wanted):
    """Left out means all; the form of all is JSON unless said otherwise, and one output may differ."""
    assert parse({"inputs": [encoded()], **document}).outputs == wanted


@pytest.mark.parametrize(
    ("parameters", "timeout_s", "policy"),
    [
        ({}, None, None),
        ({"timeout": 0, "priority": 0}, None, None),
        ({"timeout": 1_500_000, "priority": 3, "policy": "strict"}, 1.5, "strict"),
        ({"sequence_id": 7, "customer": "anything"}, None, None),
    ],
)
def test_parameters_when_given_then_time_is_in_microseconds_and_unknown_ones_are_let_be(parameters, timeout_s, policy):
    """A timeout of nothing is none, a policy may be named, and custom parameters are no fault."""
    asked = parse({"id": "r1", "inputs": [encoded()], "parameters": parameters, "model_name": "ignored"})

    assert (asked.request_id, asked.timeout_s, asked.policy) == ("r1", timeout_s, policy)


IMAGE = elements(b"x")
REFUSED = {
    "no JSON": (b"certainly", None, "no JSON"),
    "cut JSON": (b'{"inputs": [', None, "no JSON"),
    "NaN": (b'{"inputs": [], "x": NaN}', None, "no JSON"),
    "deep": (b'{"inputs": ' + b"[" * 10_000 + b"}", None, "no JSON"),
    "not an object": (b"[]", None, "an object"),
    "empty": (b"", None, "no JSON"),
    "length not a number": (b"{}", "two", "Inference-Header-Content-Length"),
    "length negative": (b"{}", "-1", "Inference-Header-Content-Length"),
    "length in other digits": (b"{}", "²", "Inference-Header-Content-Length"),
    "length over the body": (b"{}", "3", "Inference-Header-Content-Length"),
    "length of many digits": (b"{}", "9" * 5000, "Inference-Header-Content-Length"),
    "no inputs": ({}, b"", "`inputs` is missing"),
    "inputs no list": ({"inputs": {}}, b"", "a list"),
    "input no object": ({"inputs": [1]}, b"", "inputs.0"),
    "empty inputs": ({"inputs": []}, b"", "either `encoded_frames` or `frames`"),
    "too many inputs": ({"inputs": [encoded()] * 17}, b"", "at most 16"),
    "unknown input": ({"inputs": [encoded(name="image")]}, b"", "encoded_frames, frames, part_id"),
    "input twice": ({"inputs": [encoded(), encoded()]}, b"", "twice"),
    "both kinds of frames": (
        {"inputs": [encoded(), {"name": "frames", "shape": [1, H, W, 3], "datatype": "UINT8", "data": PIXELS[:18]}]},
        b"",
        "either",
    ),
    "wrong type": ({"inputs": [encoded(datatype="FP32")]}, b"", "datatype BYTES"),
    "no type": ({"inputs": [encoded(datatype=None)]}, b"", "`datatype` is missing"),
    "no shape": ({"inputs": [encoded(shape=None)]}, b"", "`shape` is missing"),
    "empty shape": ({"inputs": [encoded(shape=[])]}, b"", "the shape must be [frames]"),
    "wrong rank": ({"inputs": [encoded(shape=[1, 2])]}, b"", "the shape must be [frames]"),
    "wrong sides": ({"inputs": [binary("frames", "UINT8", [1, W, H, 3], 18)]}, b"x" * 18, "[frames, 2, 3, 3]"),
    "no frames": ({"inputs": [encoded(shape=[0], data=[])]}, b"", "1 to 3 frames"),
    "negative side": ({"inputs": [encoded(shape=[-1])]}, b"", "1 to 3 frames"),
    "too many frames": ({"inputs": [encoded(4)]}, b"", "1 to 3 frames"),
    "enormous side": ({"inputs": [encoded(shape=[10**30])]}, b"", "1 to 3 frames"),
    "side no number": ({"inputs": [encoded(shape=["1"])]}, b"", "the shape"),
    "side true": ({"inputs": [encoded(shape=[True])]}, b"", "the shape"),
    "neither data nor size": ({"inputs": [encoded(data=None)]}, b"", "either `data`"),
    "data and size": ({"inputs": [encoded(parameters={"binary_data_size": 5})]}, IMAGE, "either `data`"),
    "size no number": ({"inputs": [binary("encoded_frames", "BYTES", [1], "5")]}, IMAGE, "a whole number"),
    "size true": ({"inputs": [binary("encoded_frames", "BYTES", [1], True)]}, IMAGE, "a whole number"),
    "size negative": ({"inputs": [binary("encoded_frames", "BYTES", [1], -1)]}, IMAGE, "more than the body"),
    "size over the body": ({"inputs": [binary("encoded_frames", "BYTES", [1], 6)]}, IMAGE, "more than the body"),
    "size without binary tensors": ({"inputs": [binary("encoded_frames", "BYTES", [1], 5)]}, b"", "more than the body"),
    "bytes left over": ({"inputs": [binary("encoded_frames", "BYTES", [1], 5)]}, IMAGE + b"x", "more bytes"),
    "size not that of the shape": ({"inputs": [binary("frames", "UINT8", [2, H, W, 3], 18)]}, b"x" * 18, "the shape"),
    "element over the tensor": (
        {"inputs": [binary("encoded_frames", "BYTES", [1], 5)]},
        struct.pack("<I", 2**32 - 1) + b"x",
        "an element is longer",
    ),
    "element without a length": ({"inputs": [binary("encoded_frames", "BYTES", [1], 3)]}, b"\0\0\0", "an element"),
    "too few elements": ({"inputs": [binary("encoded_frames", "BYTES", [2], 5)]}, IMAGE, "an element"),
    "too many elements": ({"inputs": [binary("encoded_frames", "BYTES", [1], 10)]}, IMAGE * 2, "more elements"),
    "data no list": ({"inputs": [encoded(data="x")]}, b"", "a list"),
    "data of numbers": ({"inputs": [encoded(data=[1])]}, b"", "strings"),
    "data too short": ({"inputs": [encoded(2, data=["x"])]}, b"", "as many values"),
    "data nested otherwise": ({"inputs": [encoded(2, data=[["x", "x"]])]}, b"", "not nested"),
    "data half nested": ({"inputs": [encoded(2, shape=[2, 1], data=[["x"], "x"])]}, b"", "not nested"),
    "no base64": ({"inputs": [encoded(data=["*"], parameters={"content_type": "base64"})]}, b"", "decoded"),
    "half a letter": ({"inputs": [encoded(data=["é"], parameters={"content_type": "base64"})]}, b"", "decoded"),
    **{
        f"pixel {value}": (
            {"inputs": [{"name": "frames", "shape": [1, H, W, 3], "datatype": "UINT8", "data": [value] * 18}]},
            b"",
            "0 to 255",
        )
        for value in (256, -1, 0.5, 10**400, "7", None, True)
    },
    "part ids of another number": (
        {"inputs": [encoded(2), {"name": "part_id", "shape": [1], "datatype": "BYTES", "data": ["7"]}]},
        b"",
        "as many entries",
    ),
    "part id of other letters": (
        {"inputs": [encoded(), {"name": "part_id", "shape": [1], "datatype": "BYTES", "data": ["ü"]}]},
        b"",
        "printable",
    ),
    "outputs no list": ({"inputs": [encoded()], "outputs": "score"}, b"", "a list"),
    "unknown output": ({"inputs": [encoded()], "outputs": [{"name": "label"}]}, b"", "outputs.0"),
    "output twice": ({"inputs": [encoded()], "outputs": [{"name": "score"}] * 2}, b"", "outputs.1"),
    "classification": (
        {"inputs": [encoded()], "outputs": [{"name": "score", "parameters": {"classification": 3}}]},
        b"",
        "classes",
    ),
    "form no truth": ({"inputs": [encoded()], "parameters": {"binary_data_output": 1}}, b"", "true or false"),
    "parameters no object": ({"inputs": [encoded()], "parameters": []}, b"", "an object"),
    "id no string": ({"inputs": [encoded()], "id": 7}, b"", "a string"),
    "timeout negative": ({"inputs": [encoded()], "parameters": {"timeout": -1}}, b"", "`timeout`"),
    "timeout no whole number": ({"inputs": [encoded()], "parameters": {"timeout": 0.5}}, b"", "`timeout`"),
    "priority negative": ({"inputs": [encoded()], "parameters": {"priority": -1}}, b"", "`priority`"),
    "policy no name": ({"inputs": [encoded()], "parameters": {"policy": "../x"}}, b"", "`policy`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_request_when_it_does_not_fit_then_refused_with_its_place(case):
    """Each way of being wrong has a sentence of its own that says where, and never repeats the request's bytes."""
    document, tail, sentence = REFUSED[case]

    with pytest.raises(ParameterInvalid) as refused:
        parse_request(document, tail, MODEL) if isinstance(document, bytes) else parse(document, tail)

    assert sentence in refused.value.sentence


def test_request_when_it_promises_terabytes_then_nothing_is_allocated_for_them():
    """Shapes and sizes are compared as numbers; what is only promised costs no memory."""
    document = {"inputs": [binary("frames", "UINT8", [3, H, W, 3], 2**40)]}
    parse({"inputs": [encoded()]})  # whatever is made once is made now

    tracemalloc.start()
    with pytest.raises(ParameterInvalid):
        parse(document, b"x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 100_000


@pytest.mark.parametrize(
    "body", [b" " * (MAX_JSON_BYTES + 1), *(mark * (most + 1) for mark, most in MAX_JSON_MARKS.items())]
)
def test_json_when_too_long_or_too_finely_divided_then_refused_before_it_is_parsed(body):
    """Parsing costs many times the bytes; what would take seconds is told to come as binary tensors."""
    with pytest.raises(FrameTooLarge, match="binary tensors"):
        parse_request(body, None, MODEL)


_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
)
_json = st.recursive(
    _scalars | st.sampled_from(["encoded_frames", "frames", "BYTES", "UINT8", "score"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
_inputs = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["encoded_frames", "frames", "part_id"]) | _json,
        "datatype": st.sampled_from(["BYTES", "UINT8", "FP16"]) | _json,
        "shape": st.sampled_from([[1], [2, 1], [1, H, W, 3]]) | _json,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 40)}) | _json,
        "data": st.lists(st.text(max_size=3) | st.integers(0, 300), max_size=18) | _json,
    },
)
_documents = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text() | _json,
        "inputs": st.lists(_inputs, max_size=3) | _json,
        "outputs": st.lists(st.fixed_dictionaries({"name": _json}), max_size=3) | _json,
        "parameters": st.dictionaries(st.sampled_from(["timeout", "priority", "policy"]), _json) | _json,
    },
)


def _is_parsed_or_refused(body: bytes, json_length: str | None) -> None:
    try:
        asked = parse_request(body, json_length, MODEL)
    except FlawlineError as error:
        assert error.code in ("parameter_invalid", "frame_too_large")  # noqa: PT017 - either end is right
        return
    assert 1 <= len(asked.frames) == len(asked.part_ids) <= MODEL.max_frames
    assert sum(map(len, asked.frames)) <= len(body)
    assert {wanted.name for wanted in asked.outputs} <= set(EVERYTHING)
    assert not asked.is_network_input or {len(frame) for frame in asked.frames} == {H * W * 3}


@given(st.binary(max_size=200), st.none() | st.text(max_size=8) | st.integers(0, 250).map(str))
def test_bytes_when_anything_at_all_then_a_request_or_a_typed_refusal(body, json_length):
    """Arbitrary bodies under arbitrary headers never crash the parser."""
    _is_parsed_or_refused(body, json_length)


@given(_documents, st.binary(max_size=40), st.integers(-2, 2))
def test_documents_when_nearly_right_then_a_request_or_a_typed_refusal(document, tail, off_by):
    """Requests that are wrong in some of their parts never crash the parser, nor come out larger than they went in."""
    head = json.dumps(document).encode()

    _is_parsed_or_refused(head + tail, str(len(head) + off_by) if tail or off_by else None)


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=3), st.booleans(), st.text(max_size=20))
def test_frames_when_sent_in_either_form_then_they_come_out_as_they_went_in(images, is_binary, request_id):
    """No image is changed on the way, nor the id by which the answer is found."""
    if is_binary:
        tail = elements(*images)
        entry = binary("encoded_frames", "BYTES", [len(images)], len(tail))
    else:
        tail = b""
        data = [b64encode(image).decode() for image in images]
        entry = encoded(len(images), data=data, parameters={"content_type": "base64"})

    asked = parse({"id": request_id, "inputs": [entry]}, tail)

    assert asked.frames == tuple(images)
    assert asked.request_id == request_id


def _values(frames: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "score": generator.random(frames, np.float32),
        "anomaly_map": generator.random((frames, 4, 5), np.float32),
        "verdict": ["PASS", "REVIEW", "FAIL"][:frames],
        "p_value": generator.random(frames, np.float32),
    }


def _read_answer(body: bytes, json_bytes: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    document = json.loads(body[:json_bytes])
    rest = body[len(body) if json_bytes is None else json_bytes :]
    read: dict[str, Any] = {}
    for output in document["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            read[output["name"]] = output["data"]
        elif output["datatype"] == "FP32":
            read[output["name"]] = np.frombuffer(rest[:size], "<f4").tolist()
            rest = rest[size:]
        else:
            texts, chunk, rest = [], rest[:size], rest[size:]
            while chunk:
                (length,) = struct.unpack_from("<I", chunk)
                texts.append(chunk[4 : 4 + length].decode())
                chunk = chunk[4 + length :]
            read[output["name"]] = texts
    assert rest == b""
    return document, read


@given(st.lists(st.booleans(), min_size=4, max_size=4), st.integers(1, 3), st.permutations(EVERYTHING))
def test_answer_when_read_back_then_every_number_is_the_same_in_either_form(forms, frames, order):
    """JSON and binary outputs hold the very same float32, side by side in one answer, in the order that was asked."""
    outputs = [{"name": name, "parameters": {"binary_data": form}} for name, form in zip(order, forms, strict=True)]
    values = _values(frames)

    asked = parse({"id": "r1", "inputs": [encoded(frames)], "outputs": outputs})
    answer = print_answer(asked, "demo_line", "3", values, {"policy": "1"})

    document, read = _read_answer(answer.body, answer.json_bytes)
    assert (answer.json_bytes is None) == (not any(forms))
    assert (document["model_name"], document["model_version"], document["id"]) == ("demo_line", "3", "r1")
    assert [output["name"] for output in document["outputs"]] == list(order)
    for name in ("score", "anomaly_map", "p_value"):
        assert np.array_equal(np.array(read[name], np.float32), values[name].ravel())
    assert read["verdict"] == values["verdict"]


def test_answer_when_a_map_is_large_then_every_number_of_it_is_there():
    """A map is printed in pieces, and no seam shows."""
    values = _values(2) | {"anomaly_map": np.random.default_rng(1).random((2, 130, 90), np.float32)}
    asked = parse({"inputs": [encoded(2)], "outputs": [{"name": "anomaly_map"}]})

    answer = print_answer(asked, "demo_line", "3", values, {})

    _, read = _read_answer(answer.body, answer.json_bytes)
    assert np.array_equal(np.array(read["anomaly_map"], np.float32), values["anomaly_map"].ravel())


def test_answer_when_no_id_was_sent_then_none_is_made_up():
    """The id is the caller's own; without one the member is left out."""
    answer = print_answer(parse({"inputs": [encoded()]}), "demo_line", "3", _values(1), {})

    assert "id" not in json.loads(answer.body)


@pytest.mark.parametrize(
    ("coding", "pack", "unpack"),
    [("gzip", gzip.compress, gzip.decompress), ("deflate", zlib.compress, zlib.decompress)],
)
def test_compression_when_another_program_is_at_the_other_end_then_both_ways_agree(coding, pack, unpack):
    """What others compress is read, and others read what is compressed here."""
    data = np.random.default_rng(0).bytes(3 * 2**20 + 1)  # as large as compressed ones are, and read in several goes

    assert decompress(pack(data), coding, len(data), lambda _: None) == data
    assert unpack(compress(data, coding)) == data


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_bomb_when_decompressed_then_it_ends_at_the_limit(coding):
    """A body that would grow a thousandfold is refused having grown to the limit and no further."""
    bomb = compress(b"\0" * 50_000_000, coding)

    tracemalloc.start()
    with pytest.raises(FrameTooLarge):
        decompress(bomb, coding, 10_000, lambda _: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 1_000_000


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_body_when_decompressed_then_memory_is_asked_for_before_it_is_taken(coding):
    """A few kilobytes that become megabytes are told of while they grow, and end where there is no more."""
    grown = []

    def hold(size):
        grown.append(size)
        if size > 8 * 2**20:
            raise Overloaded("no more")

    with pytest.raises(Overloaded):
        decompress(compress(bytes(50_000_000), coding), coding, 50_000_000, hold)

    assert grown == [2**20 * (number + 1) for number in range(9)]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("damage", [lambda x: x[:-1], lambda x: x + b"x", lambda _: b"", lambda _: b"nonsense"])
def test_compressed_body_when_damaged_then_refused(coding, damage):
    """Truncated, lengthened and foreign data are the caller's fault, and say so."""
    with pytest.raises(ParameterInvalid):
        decompress(damage(compress(b"data", coding)), coding, 100, lambda _: None)


@pytest.mark.parametrize(
    ("header", "coding"),
    [(None, None), ("identity", None), ("gzip", "gzip"), ("GZIP ", "gzip"), ("deflate", "deflate")],
)
def test_content_encoding_when_known_then_read(header, coding):
    """The two codings of the protocol, or none."""
    assert coding_of(header) == coding


@pytest.mark.parametrize("header", ["br", "gzip, gzip", "x"])
def test_content_encoding_when_unknown_then_refused(header):
    """A body that can't be read is not guessed at."""
    with pytest.raises(MediaTypeNotAllowed, match="gzip or deflate"):
        coding_of(header)


@pytest.mark.parametrize(
    ("header", "coding"),
    [("gzip", "gzip"), ("deflate", "deflate"), ("gzip, deflate, br", None), ("*", None), ("", None), (None, None)],
)
def test_accept_encoding_when_one_coding_is_named_then_it_is_meant(header, coding):
    """Clients that list all they can read get plain tensors, which are faster."""
    assert wanted_coding(header) == coding


@pytest.mark.parametrize(("body", "ready"), [(b"", False), (b"{}", False), (b'{"ready": true}', True)])
def test_index_request_when_read_then_it_may_be_empty(body, ready):
    """An empty body asks for every model."""
    assert wants_ready_only(body) is ready
