"""The Open Inference Protocol V2 without HTTP: bytes in, frames out; arrays in, bytes out.

Before: the body was received within its limit. After: the pipeline inspects each frame. A bundle is a model with these
tensors, whose first side is the number of frames:

    in   encoded_frames  BYTES  [B] or [B, 1]   images as the camera encoded them; decoded and resized here
         frames          UINT8  [B, H, W, 3]    RGB, of exactly the line's input size; either this or the one above
         part_id         BYTES  [B] or [B, 1]   optional: the caller's names of the parts; an empty one names none
    out  score           FP32   [B]
         anomaly_map     FP32   [B, h, w]
         verdict         BYTES  [B]
         p_value         FP32   [B]                 NaN (null in JSON) where nothing speaks of such scores

Whatever does not fit is refused with `ParameterInvalid`, by arithmetic on plain integers and before anything is
allocated that the request merely promises. Sentences name places in the request and never repeat its bytes.

Specification: kserve/open-inference-protocol, `inference_rest.md`; the extensions are Triton's.
"""

import binascii
import re
import struct
import zlib
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from service.errors import FrameTooLarge, MediaTypeNotAllowed, ParameterInvalid
from service.schemas import Identifier, Name

JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)
# Parsing holds all other threads up, for seconds where a few MiB are nothing but brackets or keys. These bounds leave
# room for the pixels of a frame of 512 x 512 (flat; nested 256 x 256); who has more sends them as binary tensors.
MAX_JSON_BYTES = 8 * 2**20
MAX_JSON_MARKS = {b",": 2**20, b"[": 2**17, b"{": 2**17, b":": 2**17, b'"': 2**17}

Datatype = Literal["BYTES", "FP32", "UINT8"]
Coding = Literal["gzip", "deflate"]
Values = NDArray[np.float32] | Sequence[str]

_CONFIGURED_TYPES: dict[Datatype, str] = {"BYTES": "TYPE_STRING", "FP32": "TYPE_FP32", "UINT8": "TYPE_UINT8"}
_CODINGS: dict[str, Coding] = {"gzip": "gzip", "deflate": "deflate"}
_WINDOW_BITS: dict[Coding, int] = {"gzip": 31, "deflate": 15}  # of zlib: 16 more than 15 means a gzip header
_FAST = 1
_PRINTED_AT_ONCE = 2**13  # numbers; a millisecond or two
_INFLATED_AT_ONCE = 2**20
_LARGEST_ENTRIES = 16  # inputs, and outputs, of one request
_IDENTIFIER: TypeAdapter[str] = TypeAdapter(Identifier)
_NAME: TypeAdapter[str] = TypeAdapter(Name)
_KINDS = {str: "a string", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}
_Kind = TypeVar("_Kind", str, int, bool, list[Any], dict[str, Any])


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: by which requests and answers refer to it.
        datatype: the protocol's name.
        sides: its shape without the number of frames in front.
        is_optional: whether a request may leave it out.
    """

    name: str
    datatype: Datatype
    sides: tuple[int, ...]
    is_optional: bool = False

    def metadata(self) -> dict[str, Any]:
        """Describe it as the model's metadata does."""
        return {"name": self.name, "datatype": self.datatype, "shape": [-1, *self.sides]}

    def configuration(self) -> dict[str, Any]:
        """Describe it as the model's configuration does, where the number of frames is not a side."""
        described = {"name": self.name, "data_type": _CONFIGURED_TYPES[self.datatype], "dims": list(self.sides)}
        return described | ({"optional": True} if self.is_optional else {})


@dataclass(frozen=True)
class ModelSpec:
    """What a model takes and gives.

    Attributes:
        inputs: that a request may hold.
        outputs: that an answer may hold.
        max_frames: in one request.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_frames: int


@dataclass(frozen=True)
class WantedOutput:
    """An output of the answer; `is_binary` puts its bytes behind the JSON instead of its numbers into it."""

    name: str
    is_binary: bool


@dataclass(frozen=True)
class InferRequest:
    """What a caller asks.

    Attributes:
        request_id: to be echoed; None where the caller sent none.
        frames: one image each, as encoded by the camera or, where `is_network_input`, `(H, W, 3)` uint8 RGB row by row.
        is_network_input: whether the frames are the canvas itself.
        part_ids: one a frame; None where the part has no name.
        timeout_s: from the arrival of the request to its answer; None where the caller names none.
        policy: version to judge by; None takes the default one.
        outputs: wanted, in this order.
    """

    request_id: str | None
    frames: tuple[bytes, ...]
    is_network_input: bool
    part_ids: tuple[str | None, ...]
    timeout_s: float | None
    policy: str | None
    outputs: tuple[WantedOutput, ...]


@dataclass(frozen=True)
class InferAnswer:
    """An encoded answer; `json_bytes` tells where binary tensors begin, and is None where there is none."""

    body: bytes
    json_bytes: int | None


def model_spec(input_size: tuple[int, int], map_size: tuple[int, int], max_frames: int) -> ModelSpec:
    """Describe a bundle as a model.

    Args:
        input_size: `(H, W)` of the network's input, or of the canvas that is cut into tiles for it.
        map_size: `(h, w)` of its anomaly map.
        max_frames: in one request.
    """
    inputs = (
        TensorSpec("encoded_frames", "BYTES", (), is_optional=True),
        TensorSpec("frames", "UINT8", (*input_size, 3), is_optional=True),
        TensorSpec("part_id", "BYTES", (), is_optional=True),
    )
    outputs = (
        TensorSpec("score", "FP32", ()),
        TensorSpec("anomaly_map", "FP32", map_size),
        TensorSpec("verdict", "BYTES", ()),
        TensorSpec("p_value", "FP32", ()),
    )
    return ModelSpec(inputs, outputs, max_frames)


def parse_request(body: bytes, json_length: str | None, model: ModelSpec) -> InferRequest:
    """Read an inference request.

    Args:
        body: JSON, and behind it the binary tensors; not compressed any more.
        json_length: value of the header `Inference-Header-Content-Length`; None means that all of the body is JSON.
        model: that is asked.

    Raises:
        ParameterInvalid: if anything does not fit the protocol or the model.
        FrameTooLarge: if the JSON is over its limit.
    """
    head, rest = _split(body, json_length)
    document = _read_json(head)
    parameters = _optional(document, "parameters", dict, "The request") or {}
    tensors = _read_inputs(_take(document, "inputs", list, "The request"), rest, model)
    if ("frames" in tensors) == ("encoded_frames" in tensors):
        raise ParameterInvalid("inputs: send either `encoded_frames` or `frames`, with one entry a frame.")
    is_network_input = "frames" in tensors
    frames = tensors["frames" if is_network_input else "encoded_frames"]
    named = tensors.get("part_id", [b""] * len(frames))
    if len(named) != len(frames):
        raise ParameterInvalid("inputs: `part_id` needs as many entries as there are frames.")
    return InferRequest(
        request_id=_optional(document, "id", str, "The request"),
        frames=tuple(frames),
        is_network_input=is_network_input,
        part_ids=tuple(_part_id(name) for name in named),
        timeout_s=_timeout_s(parameters),
        policy=_policy(parameters),
        outputs=_read_outputs(document, parameters, model),
    )


def print_answer(
    request: InferRequest, model: str, version: str, values: Mapping[str, Values], parameters: Mapping[str, str | float]
) -> InferAnswer:
    """Write an inference answer.

    Args:
        request: that is answered.
        model: name.
        version: that answered.
        values: by output; arrays are float32 with the number of frames in front and hold finite numbers only.
        parameters: of the answer.
    """
    printed, tail = [], []
    for wanted in request.outputs:
        value = values[wanted.name]
        is_real = isinstance(value, np.ndarray)
        shape = list(value.shape) if isinstance(value, np.ndarray) else [len(value)]
        output: dict[str, Any] = {"name": wanted.name, "datatype": "FP32" if is_real else "BYTES", "shape": shape}
        if wanted.is_binary:
            tail.append(_to_bytes(value))
            output["parameters"] = {"binary_data_size": len(tail[-1])}
            printed.append(to_json(output))
        else:
            printed.append(to_json(output)[:-1] + b',"data":' + _to_numbers(value) + b"}")
    identity = {} if request.request_id is None else {"id": request.request_id}
    named = {"model_name": model, "model_version": version, **identity, "parameters": dict(parameters)}
    head = to_json(named)[:-1] + b',"outputs":[' + b",".join(printed) + b"]}"
    return InferAnswer(b"".join((head, *tail)), len(head) if tail else None)


def coding_of(content_encoding: str | None) -> Coding | None:
    """Return how a body is compressed, from its `Content-Encoding`; None where it is not.

    Raises:
        MediaTypeNotAllowed: if that is not known here.
    """
    named = (content_encoding or "identity").strip().lower()
    if named == "identity":
        return None
    if named not in _CODINGS:
        raise MediaTypeNotAllowed("Content-Encoding: compress with gzip or deflate, or not at all.")
    return _CODINGS[named]


def wanted_coding(accept_encoding: str | None) -> Coding | None:
    """Return how an answer is to be compressed, from `Accept-Encoding`; None where it is not.

    Many clients say all that they can read with every request, and compressing maps costs more than sending them. Who
    names one coding alone means it.
    """
    return _CODINGS.get((accept_encoding or "").strip().lower())


def decompress(body: bytes, coding: Coding, max_bytes: int, hold: Callable[[int], None]) -> bytes:
    """Decompress a body without ever holding more than its limit.

    Args:
        body: as it came.
        coding: how it is compressed.
        max_bytes: the largest one.
        hold: called with how large it has become, again and again while it grows; raises where that is too much now.

    Raises:
        FrameTooLarge: if it is larger than `max_bytes`.
        ParameterInvalid: if it is damaged or incomplete.
    """
    inflater = zlib.decompressobj(_WINDOW_BITS[coding])
    pieces, size, read = [], 0, 0
    while read < len(body) and not inflater.eof:
        rest, is_full = body[read : read + _INFLATED_AT_ONCE], False
        read += len(rest)
        while (rest or is_full) and not inflater.eof:
            most = min(_INFLATED_AT_ONCE, max_bytes + 1 - size)
            hold(size + most)  # a few kilobytes may become the largest body
            try:
                piece = inflater.decompress(rest, most)
            except zlib.error as error:
                raise ParameterInvalid(f"The body is no {coding} data, or damaged.") from error
            pieces.append(piece)
            size, rest, is_full = size + len(piece), inflater.unconsumed_tail, len(piece) == most
            if size > max_bytes:
                raise FrameTooLarge(f"The body is over the limit of {max_bytes} bytes once it is decompressed.")
    if not inflater.eof or inflater.unused_data or read < len(body):
        raise ParameterInvalid(f"The {coding} data is truncated, or something follows it.")
    return b"".join(pieces)


def compress(body: bytes, coding: Coding) -> bytes:
    """Compress a body, fast rather than small."""
    deflater = zlib.compressobj(_FAST, wbits=_WINDOW_BITS[coding])
    return deflater.compress(body) + deflater.flush()


def wants_ready_only(body: bytes) -> bool:
    """Read the body of a repository index request, which may be empty.

    Raises:
        ParameterInvalid: if it does not fit.
    """
    return bool(body) and (_optional(_read_json(body), "ready", bool, "The request") or False)


def _split(body: bytes, json_length: str | None) -> tuple[bytes, memoryview]:
    if json_length is None:
        return body, memoryview(b"")
    if re.fullmatch(r"[0-9]{1,19}", json_length) is None or int(json_length) > len(body):
        raise ParameterInvalid(f"{JSON_LENGTH_HEADER}: must be the length of the JSON, which the body begins with.")
    length = int(json_length)
    return body[:length], memoryview(body)[length:]


def _read_json(head: bytes) -> dict[str, Any]:
    if len(head) > MAX_JSON_BYTES or any(head.count(mark) > most for mark, most in MAX_JSON_MARKS.items()):
        raise FrameTooLarge(f"The JSON is over {MAX_JSON_BYTES} bytes or too finely divided; send binary tensors.")
    try:
        document = from_json(head, allow_inf_nan=False)
    except ValueError as error:
        raise ParameterInvalid("The request is no JSON; see the Open Inference Protocol, version 2.") from error
    if not isinstance(document, dict):
        raise ParameterInvalid("The request must be an object; see the Open Inference Protocol, version 2.")
    return document


def _optional(members: Mapping[str, Any], name: str, kind: type[_Kind], where: str) -> _Kind | None:
    value = members.get(name)
    if value is None:
        return None
    if type(value) is not kind:  # exactly: for Python, true is a number as well
        raise ParameterInvalid(f"{where}: `{name}` must be {_KINDS[kind]}.")
    return value


def _take(members: Mapping[str, Any], name: str, kind: type[_Kind], where: str) -> _Kind:
    value = _optional(members, name, kind, where)
    if value is None:
        raise ParameterInvalid(f"{where}: `{name}` is missing.")
    return value


def _entries(listed: list[Any], what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if len(listed) > _LARGEST_ENTRIES:
        raise ParameterInvalid(f"{what}: at most {_LARGEST_ENTRIES} are read.")
    for index, entry in enumerate(listed):
        where = f"{what}.{index}"
        if not isinstance(entry, dict):
            raise ParameterInvalid(f"{where}: must be an object.")
        yield where, entry


def _read_inputs(listed: list[Any], rest: memoryview, model: ModelSpec) -> dict[str, list[bytes]]:
    """Return the bytes of each input, one entry a frame."""
    known = {spec.name: spec for spec in model.inputs}
    tensors: dict[str, list[bytes]] = {}
    for where, entry in _entries(listed, "inputs"):
        spec = known.get(_take(entry, "name", str, where))
        if spec is None or spec.name in tensors:
            raise ParameterInvalid(f"{where}: unknown or twice; this model takes {', '.join(known)}, each once.")
        if _take(entry, "datatype", str, where) != spec.datatype:
            raise ParameterInvalid(f"{where}: {spec.name} is of the datatype {spec.datatype}.")
        shape = _shape(entry, spec, model.max_frames, where)
        parameters = _optional(entry, "parameters", dict, where) or {}
        data = _optional(entry, "data", list, where)
        size = _optional(parameters, "binary_data_size", int, where)
        if (data is None) == (size is None):
            raise ParameterInvalid(f"{where}: needs either `data` or the parameter `binary_data_size`.")
        if data is not None:
            is_base64 = parameters.get("content_type") == "base64"
            tensors[spec.name] = _from_json(_flat(data, shape, where), spec, is_base64=is_base64, where=where)
            continue
        if size is None or not 0 <= size <= len(rest):
            raise ParameterInvalid(f"{where}: `binary_data_size` is more than the body holds; is it truncated?")
        tensors[spec.name] = _from_binary(rest[:size], spec, shape[0], where)
        rest = rest[size:]
    if rest:
        raise ParameterInvalid("The body holds more bytes than its inputs have; look at `binary_data_size`.")
    return tensors


def _shape(entry: dict[str, Any], spec: TensorSpec, max_frames: int, where: str) -> list[int]:
    shape = _take(entry, "shape", list, where)
    sides = [list(spec.sides)] + ([[1]] if spec.datatype == "BYTES" else [])
    if not shape or type(shape[0]) is not int or shape[1:] not in sides:
        right = ", ".join(map(str, ("frames", *spec.sides)))
        raise ParameterInvalid(f"{where}: the shape must be [{right}].")
    if not 1 <= shape[0] <= max_frames:
        raise ParameterInvalid(f"{where}: the shape must begin with 1 to {max_frames} frames.")
    return shape


def _flat(data: list[Any], shape: list[int], where: str) -> list[Any]:
    """Return values row by row, that came flat or nested as the shape says."""
    level: list[Any] = data
    if any(type(item) is list for item in data):
        level = [data]
        for side in shape:
            if not all(type(row) is list and len(row) == side for row in level):
                raise ParameterInvalid(f"{where}: `data` is not nested as the shape says.")
            level = list(chain.from_iterable(level))
    if len(level) != prod(shape):
        raise ParameterInvalid(f"{where}: `data` needs as many values as the shape says.")
    return level


def _from_json(values: list[Any], spec: TensorSpec, *, is_base64: bool, where: str) -> list[bytes]:
    if spec.datatype == "BYTES":
        if not all(type(value) is str for value in values):
            raise ParameterInvalid(f"{where}: `data` must hold strings.")
        try:
            return [b64decode(value, validate=True) if is_base64 else value.encode() for value in values]
        except (binascii.Error, ValueError) as error:
            raise ParameterInvalid(f"{where}: `data` holds a string that can't be decoded.") from error
    kinds = set(map(type, values))
    if not kinds <= {int, float} or min(values) < 0 or max(values) > 255:
        raise ParameterInvalid(f"{where}: `data` must hold whole numbers from 0 to 255.")
    if float in kinds:  # clients that know one kind of number only send 7.0
        if not all(float(value).is_integer() for value in values):
            raise ParameterInvalid(f"{where}: `data` must hold whole numbers from 0 to 255.")
        values = list(map(int, values))
    each = prod(spec.sides)
    data = bytes(values)
    return [data[at : at + each] for at in range(0, len(data), each)]


def _from_binary(data: memoryview, spec: TensorSpec, frames: int, where: str) -> list[bytes]:
    if spec.datatype != "BYTES":
        each = prod(spec.sides)
        if len(data) != frames * each:
            raise ParameterInvalid(f"{where}: `binary_data_size` is not what the shape takes.")
        return [bytes(data[at : at + each]) for at in range(0, len(data), each)]
    elements = []
    for _ in range(frames):
        size = struct.unpack_from("<I", data)[0] if len(data) >= 4 else None
        if size is None or size > len(data) - 4:
            raise ParameterInvalid(f"{where}: an element is longer than the tensor; each begins with its length.")
        elements.append(bytes(data[4 : 4 + size]))
        data = data[4 + size :]
    if data:
        raise ParameterInvalid(f"{where}: the tensor holds more elements than its shape says.")
    return elements


def _read_outputs(
    document: Mapping[str, Any], parameters: Mapping[str, Any], model: ModelSpec
) -> tuple[WantedOutput, ...]:
    is_binary = _optional(parameters, "binary_data_output", bool, "parameters") or False
    listed = _optional(document, "outputs", list, "The request")
    if not listed:
        return tuple(WantedOutput(spec.name, is_binary) for spec in model.outputs)
    known = [spec.name for spec in model.outputs]
    wanted: dict[str, WantedOutput] = {}
    for where, entry in _entries(listed, "outputs"):
        name = _take(entry, "name", str, where)
        if name not in known or name in wanted:
            raise ParameterInvalid(f"{where}: unknown or twice; this model gives {', '.join(known)}, each once.")
        own = _optional(entry, "parameters", dict, where) or {}
        if own.get("classification"):
            raise ParameterInvalid(f"{where}: there are no classes here; leave `classification` out.")
        own_binary = _optional(own, "binary_data", bool, where)
        wanted[name] = WantedOutput(name, is_binary if own_binary is None else own_binary)
    return tuple(wanted.values())


def _timeout_s(parameters: Mapping[str, Any]) -> float | None:
    # Frames run in the order of their deadlines, so a priority is checked and then has nothing left to say.
    for name in ("timeout", "priority"):
        if (_optional(parameters, name, int, "parameters") or 0) < 0:
            raise ParameterInvalid(f"parameters: `{name}` must not be negative.")
    timeout_us = min(parameters.get("timeout") or 0, 2**63)
    return timeout_us / 1e6 if timeout_us else None


def _policy(parameters: Mapping[str, Any]) -> str | None:
    policy = _optional(parameters, "policy", str, "parameters")
    try:
        return None if policy is None else _NAME.validate_python(policy)
    except ValidationError as error:
        raise ParameterInvalid("parameters: `policy` is no name of a policy version.") from error


def _part_id(name: bytes) -> str | None:
    try:
        return _IDENTIFIER.validate_python(name.decode("ascii")) if name else None
    except (UnicodeDecodeError, ValidationError) as error:
        raise ParameterInvalid("inputs: a `part_id` has up to 128 printable ASCII characters.") from error


def _to_bytes(value: Values) -> bytes:
    if isinstance(value, np.ndarray):
        return value.astype("<f4").tobytes()
    return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in value)


def _to_numbers(value: Values) -> bytes:
    if not isinstance(value, np.ndarray):
        return to_json(list(value))
    # Piece by piece, because no other thread of the process runs while one is printed, and no deadline fires: a large
    # map takes tens of milliseconds.
    numbers = value.ravel()
    pieces = (numbers[at : at + _PRINTED_AT_ONCE].tolist() for at in range(0, numbers.size, _PRINTED_AT_ONCE))
    # NaN is no JSON: a p-value that does not exist is null.
    printed = (to_json(piece, inf_nan_mode="null")[1:-1] for piece in pieces)
    return b"[" + b",".join(printed) + b"]"
