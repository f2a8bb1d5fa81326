"""Looks into an ONNX graph before any runtime does: the one importer of `onnx` on the service's side.

A graph that reads other files or asks for foreign operators could run code or data that no digest covers, so both are
refused, here and at export time, by the same function.

That says something about what runs only where the runtime reads the same graph from the same bytes. Formats are told
apart by marks, unknown fields are passed over, and each reader has its own idea of both. So the bytes must be exactly
those that `onnx` writes for what it has read: there is nothing else in them that another reader could find. The engines
tell their runtimes on top of that to read ONNX and nothing else.
"""

from collections.abc import Iterator
from typing import Any

import onnx

from service.errors import BundleRefused

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
_LARGEST_GRAPH_BYTES = 2 * 2**30
_ORT_MARK = slice(4, 8), b"ORTM"  # `ort_format_version.h`; the rest of the bytes may be a right ONNX graph as well
_SETTINGS_KEY = "ort_config"  # obeyed where the environment says ORT_LOAD_CONFIG_FROM_MODEL=1; may have files written


def verify_graph(data: bytes) -> None:
    """Check that a graph is self-contained, made of standard operators only, and the only graph in its bytes.

    Args:
        data: the bytes of `model.onnx`.

    Raises:
        BundleRefused: if it is no ONNX graph, could be read as another one, refers to external data, brings settings
            for its runtime, or uses operators that are not standard or that it defines itself.
    """
    model = _read(data)
    _refuse_foreign(model)
    for function in model.functions:  # of a standard domain, with a standard name perhaps: which one counts differs
        raise BundleRefused(f"model.onnx defines {function.name!r} itself; export it without functions.")
    if len(model.opset_import) != 1:
        raise BundleRefused("model.onnx does not name one standard operator set alone; export the bundle again.")
    if any(one.key == _SETTINGS_KEY for one in model.metadata_props):
        raise BundleRefused("model.onnx brings settings for ONNX Runtime, which are the operator's; export it without.")


def opset_of(data: bytes) -> int:
    """Return the version of the standard operator set that a verified graph uses."""
    model = onnx.load_from_string(data)
    return max(int(opset.version) for opset in model.opset_import if opset.domain in STANDARD_DOMAINS)


def input_names(data: bytes) -> tuple[str, ...]:
    """Return what a verified graph has to be given."""
    return tuple(value.name for value in onnx.load_from_string(data).graph.input)


def _read(data: bytes) -> onnx.ModelProto:
    """Read a graph, where there is nothing else in the bytes."""
    if len(data) > _LARGEST_GRAPH_BYTES:
        raise BundleRefused("model.onnx is larger than 2 GiB, which ONNX can't hold in one file.")
    place, mark = _ORT_MARK
    if data[place] == mark:
        raise BundleRefused("model.onnx bears the mark of ONNX Runtime's own format; export it as ONNX.")
    try:
        model = onnx.load_from_string(data)
        model.DiscardUnknownFields()
        is_whole = model.SerializeToString() == data
    except Exception as error:
        raise BundleRefused("model.onnx is not an ONNX graph; export the bundle again.") from error
    if not model.graph.node:
        raise BundleRefused("model.onnx holds no operators; export the bundle again.")
    if not is_whole:
        raise BundleRefused(
            "model.onnx is not written as `onnx` writes its graph, so another reader might find another one in it; "
            "export the bundle again."
        )
    return model


def _refuse_foreign(model: onnx.ModelProto) -> None:
    """Refuse data of other files, and operators that are not standard."""
    domains: set[str] = set()
    operators: set[str] = set()
    for part in _parts(model):
        if isinstance(part, onnx.TensorProto):
            if part.data_location == onnx.TensorProto.EXTERNAL or part.external_data:
                raise BundleRefused("model.onnx refers to data in another file; export it as one file.")
        elif isinstance(part, onnx.NodeProto | onnx.FunctionProto | onnx.OperatorSetIdProto):
            domains.add(part.domain)
            if isinstance(part, onnx.NodeProto):
                operators.add(part.op_type)
    foreign = sorted(domains - STANDARD_DOMAINS)
    if foreign:
        raise BundleRefused(f"model.onnx uses operators of the domain {foreign[0]!r}; only standard ones are accepted.")
    # TensorRT looks what it does not know up among plug-ins, and ONNX Runtime has operators of its own in this domain.
    unknown = sorted(name for name in operators if not onnx.defs.has(name))
    if unknown:
        raise BundleRefused(f"model.onnx uses {unknown[0]!r}, which is no standard operator.")


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
