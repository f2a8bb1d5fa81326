"""Looks into an ONNX graph before any runtime does: the one importer of `onnx` on the service's side.

A graph that reads other files or asks for foreign operators could run code or data that no digest covers, so both are
refused, here and at export time, by the same function.
"""

from collections.abc import Iterator
from typing import Any

import onnx

from service.errors import BundleRefused

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
_LARGEST_GRAPH_BYTES = 2 * 2**30


def verify_graph(data: bytes) -> None:
    """Check that a graph is self-contained and made of standard operators only.

    Args:
        data: the bytes of `model.onnx`.

    Raises:
        BundleRefused: if it is no ONNX graph, refers to external data, or uses a foreign operator domain.
    """
    if len(data) > _LARGEST_GRAPH_BYTES:
        raise BundleRefused("model.onnx is larger than 2 GiB, which ONNX can't hold in one file.")
    try:
        model = onnx.load_from_string(data)
    except Exception as error:
        raise BundleRefused("model.onnx is not an ONNX graph; export the bundle again.") from error
    if not model.graph.node:
        raise BundleRefused("model.onnx holds no operators; export the bundle again.")
    domains: set[str] = set()
    for part in _parts(model):
        if isinstance(part, onnx.TensorProto):
            if part.data_location == onnx.TensorProto.EXTERNAL or part.external_data:
                raise BundleRefused("model.onnx refers to data in another file; export it as one file.")
        elif isinstance(part, onnx.NodeProto | onnx.FunctionProto | onnx.OperatorSetIdProto):
            domains.add(part.domain)
    foreign = sorted(domains - STANDARD_DOMAINS)
    if foreign:
        raise BundleRefused(f"model.onnx uses operators of the domain {foreign[0]!r}; only standard ones are accepted.")


def opset_of(data: bytes) -> int:
    """Return the version of the standard operator set that a verified graph uses."""
    model = onnx.load_from_string(data)
    return max(int(opset.version) for opset in model.opset_import if opset.domain in STANDARD_DOMAINS)


def input_names(data: bytes) -> tuple[str, ...]:
    """Return what a verified graph has to be given."""
    return tuple(value.name for value in onnx.load_from_string(data).graph.input)


def _parts(model: onnx.ModelProto) -> Iterator[object]:
    """Yield every message inside a model: subgraphs, functions, sparse tensors, and whatever later versions add."""
    waiting: list[Any] = [model]  # Any, because protobuf ships no types
    while waiting:
        part = waiting.pop()
        yield part
        if isinstance(part, onnx.TensorProto):
            continue  # nothing of interest below, and listing its fields would copy the weights
        for field, value in part.ListFields():
            if field.message_type is not None:
                waiting.extend([value] if hasattr(value, "ListFields") else value)
