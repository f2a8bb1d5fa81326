"""Promises of the look into a graph: self-contained, standard operators, wherever things are hidden."""

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from service.contract.bundle import load_bundle
from service.contract.graph import opset_of, verify_graph
from service.errors import BundleRefused
from tests.factories import make_bundle, make_graph, reseal


def external_tensor(name="weights"):
    """Return a tensor whose values would lie in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def external_sparse():
    """Return a sparse tensor whose values would lie in another file."""
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [0])
    return onnx.SparseTensorProto(values=external_tensor(), indices=indices, dims=[4])


def constant(**attributes):
    """Return a node with attributes set by hand, as no builder would."""
    node = onnx.NodeProto(op_type="Constant", output=["hidden"])
    for name, value in attributes.items():
        attribute = node.attribute.add(name=name)
        for field, content in value.items():
            target = getattr(attribute, field)
            target.extend([content]) if field.endswith("s") else target.CopyFrom(content)
    return node


def subgraph(*nodes, initializers=()):
    """Return a graph inside of a node."""
    return onnx.GraphProto(name="inner", node=nodes, initializer=initializers)


def function(node):
    """Return a local function that holds a node."""
    return onnx.FunctionProto(name="local", domain="", node=[node])


HIDDEN_DATA = {
    "initializer": lambda model: model.graph.initializer.append(external_tensor()),
    "sparse initializer": lambda model: model.graph.sparse_initializer.append(external_sparse()),
    "attribute": lambda model: model.graph.node.append(constant(value={"t": external_tensor()})),
    "attribute list": lambda model: model.graph.node.append(constant(value={"tensors": external_tensor()})),
    "sparse attribute": lambda model: model.graph.node.append(constant(value={"sparse_tensor": external_sparse()})),
    "sparse list": lambda model: model.graph.node.append(constant(value={"sparse_tensors": external_sparse()})),
    "subgraph": lambda model: model.graph.node.append(constant(body={"g": subgraph(initializers=[external_tensor()])})),
    "subgraph list": lambda model: model.graph.node.append(
        constant(body={"graphs": subgraph(initializers=[external_tensor()])})
    ),
    "subgraph of a subgraph": lambda model: model.graph.node.append(
        constant(body={"g": subgraph(constant(body={"g": subgraph(constant(value={"t": external_tensor()}))}))})
    ),
    "function": lambda model: model.functions.append(function(constant(value={"t": external_tensor()}))),
    "subgraph of a function": lambda model: model.functions.append(
        function(constant(body={"g": subgraph(initializers=[external_tensor()])}))
    ),
    "function default": lambda model: model.functions.append(
        onnx.FunctionProto(name="local", attribute_proto=constant(value={"t": external_tensor()}).attribute)
    ),
    "training": lambda model: model.training_info.add().algorithm.initializer.append(external_tensor()),
}

FOREIGN = onnx.NodeProto(op_type="RunShell", domain="com.example", output=["hidden"])
HIDDEN_OPERATORS = {
    "node": lambda model: model.graph.node.append(FOREIGN),
    "import": lambda model: model.opset_import.append(helper.make_opsetid("com.example", 1)),
    "subgraph": lambda model: model.graph.node.append(constant(body={"g": subgraph(FOREIGN)})),
    "subgraph list": lambda model: model.graph.node.append(constant(body={"graphs": subgraph(FOREIGN)})),
    "function": lambda model: model.functions.append(function(FOREIGN)),
    "function domain": lambda model: model.functions.append(
        onnx.FunctionProto(name="local", domain="com.example", node=[constant()])
    ),
    "function import": lambda model: model.functions.append(
        onnx.FunctionProto(name="local", opset_import=[helper.make_opsetid("com.example", 1)])
    ),
    "training": lambda model: model.training_info.add().algorithm.node.append(FOREIGN),
}


def hide(change):
    """Return the tiny graph with something hidden in it."""
    model = onnx.load_from_string(make_graph())
    change(model)
    return model.SerializeToString()


@pytest.mark.parametrize("conditional_lines", [0, 3])
def test_graph_when_self_contained_and_standard_is_accepted(conditional_lines):
    """A graph as training exports it passes, with or without a line's index."""
    data = make_graph(conditional_lines=conditional_lines)

    verify_graph(data)

    assert opset_of(data) == 20


@pytest.mark.parametrize("place", HIDDEN_DATA)
def test_graph_when_data_lies_in_another_file_is_refused_wherever_it_is_said(place):
    """No digest covers another file, so no constant anywhere may refer to one."""
    with pytest.raises(BundleRefused, match="another file"):
        verify_graph(hide(HIDDEN_DATA[place]))


@pytest.mark.parametrize("field", ["location", "list"])
def test_graph_when_external_data_is_only_half_declared_is_refused(field):
    """Either sign of external data is enough."""
    tensor = external_tensor()
    if field == "location":
        del tensor.external_data[:]
    else:
        tensor.data_location = TensorProto.DEFAULT

    with pytest.raises(BundleRefused, match="another file"):
        verify_graph(hide(lambda model: model.graph.initializer.append(tensor)))


@pytest.mark.parametrize("place", HIDDEN_OPERATORS)
def test_graph_when_an_operator_is_foreign_is_refused_wherever_it_stands(place):
    """Custom operators are code that no digest covers; the refusal names their domain."""
    with pytest.raises(BundleRefused, match=r"'com\.example'"):
        verify_graph(hide(HIDDEN_OPERATORS[place]))


@pytest.mark.parametrize("place", ["graph", "subgraph"])
def test_graph_when_an_operator_only_looks_standard_is_refused(place):
    """Some runtimes look an operator that they don't know up among plug-ins, whatever its domain."""
    node = onnx.NodeProto(op_type="RunShell", output=["hidden"])
    hidden = node if place == "graph" else constant(body={"g": subgraph(node)})

    with pytest.raises(BundleRefused, match="'RunShell'"):
        verify_graph(hide(lambda model: model.graph.node.append(hidden)))


def test_graph_when_it_defines_a_standard_operator_anew_is_refused():
    """Whether such a definition counts is another thing in each runtime."""
    with pytest.raises(BundleRefused, match="'Identity' itself"):
        verify_graph(hide(lambda model: model.functions.append(onnx.FunctionProto(name="Identity", node=[constant()]))))


@pytest.mark.parametrize("second", ["", "ai.onnx"])
def test_graph_when_it_names_two_standard_operator_sets_is_refused(second):
    """Which of them counts would be the runtime's choice."""
    with pytest.raises(BundleRefused, match="one standard operator set alone"):
        verify_graph(hide(lambda model: model.opset_import.append(helper.make_opsetid(second, 7))))


@pytest.mark.parametrize(
    "add",
    [
        pytest.param(lambda data: b"\xa2\x1f\x03any" + data, id="field that ONNX does not know, in front"),
        pytest.param(lambda data: data + b"\xa2\x1f\x03any", id="field that ONNX does not know, behind"),
        pytest.param(lambda data: b"\x08\x03" + data, id="field that stands there twice"),
        pytest.param(lambda data: b"\x08\x8a\x00" + data[2:], id="number written longer than it is"),
        pytest.param(lambda data: data[2:] + data[:2], id="fields in another order"),
    ],
)
def test_graph_when_its_bytes_hold_more_than_was_read_is_refused(add):
    """Another reader might find another graph in what this one passes over."""
    data = make_graph()
    assert onnx.load_from_string(add(data)).graph == onnx.load_from_string(data).graph

    with pytest.raises(BundleRefused, match="another reader"):
        verify_graph(add(data))


def test_graph_when_it_brings_settings_is_refused():
    """ONNX Runtime would obey them where its environment says so; how a session runs is the operator's business."""
    with pytest.raises(BundleRefused, match="settings for ONNX Runtime"):
        verify_graph(hide(lambda model: model.metadata_props.add(key="ort_config", value="{}")))


def test_graph_when_it_carries_the_mark_of_another_format_is_refused():
    """ONNX Runtime takes bytes with this mark for its own format, and would run another network."""
    data = hide(lambda model: setattr(model, "producer_name", "ORTM and a network of its own"))
    assert data[4:8] == b"ORTM"

    with pytest.raises(BundleRefused, match="ONNX Runtime's own format"):
        verify_graph(data)


@pytest.mark.parametrize("domain", ["ai.onnx.ml", "com.microsoft", "ai.onnx.training", "AI.ONNX"])
def test_graph_when_the_domain_is_a_cousin_of_the_standard_one_is_refused(domain):
    """Only the standard operators run on every device."""
    with pytest.raises(BundleRefused, match=domain):
        verify_graph(hide(lambda model: model.opset_import.append(helper.make_opsetid(domain, 1))))


def test_graph_when_it_holds_no_operator_is_refused():
    """An empty message parses as a model; it is none."""
    with pytest.raises(BundleRefused, match="no operators"):
        verify_graph(b"")


@given(st.binary(max_size=200))
def test_graph_when_bytes_are_arbitrary_is_refused(data):
    """Bytes that are no graph are refused and raise nothing else."""
    with pytest.raises(BundleRefused):
        verify_graph(data)


def test_graph_when_cut_anywhere_is_refused_or_still_standard():
    """A graph that lost its end raises nothing but the refusal."""
    data = make_graph()

    for length in range(0, len(data), 3):
        try:
            verify_graph(data[:length])
        except BundleRefused:
            continue


@pytest.mark.parametrize("place", ["initializer", "subgraph", "function"])
def test_bundle_when_its_graph_hides_external_data_is_refused(tmp_path, place):
    """Loading a bundle looks into the graph before any runtime does, though every digest is in order."""
    folder = make_bundle(tmp_path)
    (folder / "model.onnx").write_bytes(hide(HIDDEN_DATA[place]))

    with pytest.raises(BundleRefused, match=r"model\.onnx refers to data in another file"):
        load_bundle(reseal(folder))
