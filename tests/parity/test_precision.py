"""A graph of fewer bits keeps names and types, leaves out what it is told to, and never leaves with other verdicts."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from models.detector import AnomalyOutput
from service.contract.policy import ScoreRule
from tests.factories import make_frame, make_graph, make_policy
from training.bundling.export import ExportFailed, GraphRun, export_graph
from training.bundling.precision import JudgedFrames, check_verdicts, layers_of, lower_precision

_SIZE = (32, 48)
_MAXIMUM = ScoreRule(kind="maximum")
_WHOLE = (0.0, 0.0, 1.0, 1.0)
_POLICY = make_policy(review_threshold=0.5, fail_threshold=0.8, region_threshold=0.6)


class _Small(nn.Module):
    """Two convolutions and a smoothed map."""

    image_size = _SIZE

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.smooth = nn.Conv2d(1, 1, 3, padding=1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5

    def stages(self):
        """Learn nothing."""
        return []

    def forward(self, images):
        """Judge images `(B, 3, H, W)`."""
        features = functional.relu(self.second(functional.relu(self.first(images))))
        anomaly_map = self.smooth(features.pow(2).mean(dim=1, keepdim=True))[:, 0]
        return AnomalyOutput(anomaly_map, anomaly_map.flatten(1).amax(dim=1))


@pytest.fixture(scope="module")
def model() -> bytes:
    """Export the small network once."""
    return export_graph(_Small())


def frames_of(count):
    """Return `(count, 32, 48, 3)` uint8 good and defective frames, and their line."""
    frames = np.stack([make_frame(*_SIZE, seed=seed, defect=seed % 2 == 1) for seed in range(count)])
    return frames, np.zeros(count, np.int64)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.005), ("int8", 0.05)])
def test_lower_precision_when_run_then_answers_nearly_as_float32_at_any_batch(model, precision, tolerance):
    """Names and types of the contract stay, and so do answers, within a share of the maps' range."""
    frames, line_index = frames_of(6)
    lowered = lower_precision(model, precision, frames, line_index)
    (scores, maps), (_, expected) = GraphRun(lowered)(frames), GraphRun(model)(frames)

    assert scores.dtype == maps.dtype == np.float32
    assert np.abs(maps - expected).max() <= tolerance * np.ptp(expected)
    np.testing.assert_allclose(GraphRun(lowered)(frames[:1])[1], maps[:1], atol=1e-5)  # float32 in another order
    assert lowered == lower_precision(model, precision, frames, line_index)


def test_lower_precision_when_int8_then_weights_are_signed_and_maps_are_not_cut_into_steps(model):
    """Convolutions of many channels are quantised; the one that smooths the map is not."""
    graph = onnx.load_from_string(lower_precision(model, "int8", *frames_of(4))).graph

    kinds = {one.data_type for one in graph.initializer}
    assert {onnx.TensorProto.INT8, onnx.TensorProto.UINT8} <= kinds
    quantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    convolutions = [node.input[1] in quantised for node in graph.node if node.op_type == "Conv"]
    assert convolutions == [True, True, False]


def test_lower_precision_when_int8_then_products_are_not_rounded_on_their_way_out():
    """A product takes bytes and gives float32: what follows it computes in that, and rounding would cost accuracy."""
    graph = onnx.load_from_string(lower_precision(_with_a_product(), "int8", *frames_of(4))).graph

    (product,) = [node for node in graph.node if node.op_type == "MatMul"]
    rounded = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    from_bytes = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert set(product.input) <= from_bytes
    assert product.output[0] not in rounded


def _with_a_product():
    """Return the tiny graph with its three channels mixed into four."""
    model = onnx.load_from_string(make_graph())
    mean = next(index for index, node in enumerate(model.graph.node) if node.op_type == "ReduceMean")
    model.graph.node[mean].input[0] = "mixed"
    model.graph.node.insert(mean, onnx.helper.make_node("MatMul", ["distance", "mixing"], ["mixed"], "mix"))
    mixing = np.random.default_rng(0).uniform(0.1, 1, (3, 4)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(mixing, "mixing"))
    return model.SerializeToString()


def test_lower_precision_when_layers_are_kept_then_those_stay_in_float32(model):
    """Patterns name operators as the graph does; the last layer is the first that is proposed."""
    layers = layers_of(model)

    graph = onnx.load_from_string(lower_precision(model, "int8", *frames_of(4), [layers[0][:-1] + "?"])).graph

    assert len(layers) == 2
    kept = next(node for node in graph.node if node.name == layers[0])
    floats = {one.name for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT}
    assert kept.input[1] in floats


def test_lower_precision_when_a_pattern_names_nothing_then_refuses(model):
    """A misspelt layer is not passed over."""
    with pytest.raises(ExportFailed, match="no operator of the graph"):
        lower_precision(model, "int8", *frames_of(2), ["node_nothing*"])


def judged(scores, policy=_POLICY):
    """Return frames with these scores; their maps are all alike and reach from 0 to 1."""
    maps = np.zeros((len(scores), 2, 2), np.float32)
    maps[:, 0, 0] = 1
    return JudgedFrames(np.array(scores, np.float32), maps, policy)


def test_check_verdicts_when_each_graph_has_thresholds_of_its_own_then_those_decide():
    """All scores may move where the thresholds moved with them."""
    higher = make_policy(review_threshold=0.51, fail_threshold=0.81, region_threshold=0.6)

    record = check_verdicts("int8", [(judged([0.1, 0.6, 0.9]), judged([0.11, 0.61, 0.91], higher))], _MAXIMUM, _WHOLE)

    assert (record.frames, record.verdicts_differ, record.verdicts_at_threshold) == (3, 0, 0)
    assert record.score_difference == pytest.approx(0.01, abs=1e-6)


def test_check_verdicts_when_a_frame_lies_at_a_threshold_then_the_neighbouring_verdict_counts_as_right():
    """Either verdict is right there, and the record says how many there were."""
    record = check_verdicts("int8", [(judged([0.1, 0.49, 0.9]), judged([0.1, 0.51, 0.9]))], _MAXIMUM, _WHOLE)

    assert record.verdicts_at_threshold == 1


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ([0.1, 0.45, 0.9], [0.1, 0.55, 0.9], "1 of 3 frames get another verdict"),
        ([0.1, 0.79, 0.9], [0.1, 0.45, 0.9], "scores differ"),
        ([0.1, 0.6, 0.9], [0.1, float("nan"), 0.9], "scores differ"),
    ],
    ids=["away from a threshold", "score", "NaN"],
)
def test_check_verdicts_when_frames_are_judged_otherwise_then_says_what_to_do(before, after, words):
    """No such graph leaves, and the sentence names layers to keep and the way back to float32."""
    with pytest.raises(ExportFailed, match=words) as refused:
        check_verdicts("int8", [(judged(before), judged(after))], _MAXIMUM, _WHOLE, ["node_conv2d_1"])

    assert "--keep-float node_conv2d_1" in refused.value.sentence
    assert "--precision fp32" in refused.value.sentence


@pytest.mark.parametrize(("column", "fails"), [(2, True), (4, False)])
def test_check_verdicts_when_one_line_of_several_is_judged_otherwise_where_it_is_inspected_then_refuses(column, fails):
    """Every line passes the gate by its own verdicts, which are of what a crop shows of its region of interest."""
    window, left = (0.2, 0.2, 0.6, 0.6), (((0.0, 0.0), (0.35, 0.0), (0.35, 1.0), (0.0, 1.0)),)
    policy = _POLICY.model_copy(update={"region_of_interest": left})
    before = JudgedFrames(np.ones(3, np.float32), np.zeros((3, 8, 12), np.float32), policy)
    before.maps[:, 0, 11] = 1
    after = before._replace(maps=before.maps.copy())
    after.maps[1, 0, column] = 0.7

    def check():
        return check_verdicts("int8", [(judged([0.1]), judged([0.1])), (before, after)], _MAXIMUM, window)

    if fails:
        with pytest.raises(ExportFailed, match="1 of 3 frames get another verdict"):
            check()
    else:
        assert check().frames == 4


def test_check_verdicts_when_maps_differ_in_the_mean_then_refuses():
    """Regions are drawn from maps, so maps are compared as well."""
    found = judged([0.1, 0.9])

    with pytest.raises(ExportFailed, match="maps differ"):
        check_verdicts("int8", [(judged([0.1, 0.9]), found._replace(maps=found.maps + 0.1))], _MAXIMUM, _WHOLE)


def test_check_verdicts_when_pass_would_become_fail_then_refuses_however_near():
    """Two steps are never a matter of rounding, unless both thresholds lie together."""
    policy = make_policy(review_threshold=0.5, fail_threshold=0.6, region_threshold=0.6)
    before, after = judged([0.499, 2.0], policy), judged([0.601, 2.0], policy)

    with pytest.raises(ExportFailed, match="another verdict"):
        check_verdicts("int8", [(before, after)], _MAXIMUM, _WHOLE)
