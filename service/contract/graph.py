"""Looks into an ONNX graph before any runtime does: the one importer of `onnx` on the service's side.

A graph that reads other files or asks for foreign operators could run code or data that no digest covers, so both are
refused, here and at export time, by the same function.
"""

from collections.abc import Iterator

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
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise BundleRefused("model.onnx refers to data in another file; export it as one file.")
    domains = {opset.domain for opset in model.opset_import} | {function.domain for function in model.functions}
    domains |= {node.domain for node in _nodes(model)}
    foreign = sorted(domains - STANDARD_DOMAINS)
    if foreign:
        raise BundleRefused(f"model.onnx uses operators of the domain {foreign[0]!r}; only standard ones are accepted.")


def opset_of(data: bytes) -> int:
    """Return the version of the standard operator set that a verified graph uses."""
    model = onnx.load_from_string(data)
    return max(int(opset.version) for opset in model.opset_import if opset.domain in STANDARD_DOMAINS)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every constant, wherever a graph may hold one."""
    for graph in _graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Yield the main graph and every graph inside a node's attributes, functions included."""
    yield model.graph
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
            yield from attribute.graphs


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            waiting.extend(attribute.g.node)
            for graph in attribute.graphs:
                waiting.extend(graph.node)
