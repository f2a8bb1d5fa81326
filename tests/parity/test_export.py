"""The graph that leaves training says what PyTorch says, from camera bytes to verdict, or it does not leave."""

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnxscript.rewriter._matcher import SimplePatternMatcher
from torch import nn
from torch.nn import functional

from models.detector import AnomalyOutput, LineConditioned, PassStage
from service.contract.graph import opset_of, verify_graph
from service.contract.policy import Policy, ScoreRule
from tests import early_mismatch
from tests.factories import make_frame, make_policy, make_self_policy
from tests.tiny_detectors import TINY, make_detector
from training.bundling.export import DetectorRun, ExportFailed, GraphRun, check_parity, export_graph
from training.config import score_rule_of

_CPU = torch.device("cpu")
_ONLY_LINE = np.zeros(9, np.int64)
_MAXIMUM = ScoreRule(kind="maximum")
_ROI = (((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)),)


class _Brightness(nn.Module):
    """The smallest detector: how bright a cell is."""

    image_size = (32, 48)

    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.zeros(()))

    def stages(self):
        """Learn nothing."""
        return []

    def forward(self, images):
        """Judge images `(B, 3, H, W)`."""
        anomaly_map = functional.avg_pool2d(images.mean(dim=1, keepdim=True), 4)[:, 0] + self.offset
        return AnomalyOutput(anomaly_map, anomaly_map.flatten(1).amax(dim=1))


class _Offsets(_Brightness):
    """Brightness above what each of three lines usually has."""

    lines = 3

    def __init__(self):
        super().__init__()
        self.register_buffer("usual", torch.tensor([0.0, 0.1, 0.2]))

    def forward(self, images, line_index=None):
        """Judge images `(B, 3, H, W)` of lines `(B,)`."""
        anomaly_map = super().forward(images).anomaly_map - self.usual.index_select(0, line_index)[:, None, None]
        return AnomalyOutput(anomaly_map, anomaly_map.flatten(1).amax(dim=1))


class _Roundabout(_Brightness):
    """Brightness on a way that the optimiser shortens."""

    def forward(self, images):
        """Judge images `(B, 3, H, W)`."""
        return super().forward(images.permute(0, 2, 3, 1).permute(0, 3, 1, 2))


@cache
def _graph_of(kind: type[_Brightness]) -> bytes:
    """Export one of the smallest detectors once for all tests."""
    return export_graph(kind())


def _frames(count=9):
    return np.stack([make_frame(32, 48, seed=seed, defect=seed % 2 == 1) for seed in range(count)])


def _policy(**fields):
    return make_policy(**{"review_threshold": 0.6, "fail_threshold": 0.9, "region_threshold": 0.8} | fields)


def _check(graph, kind=_Brightness, line_index=_ONLY_LINE, policies=None, rule=_MAXIMUM):
    return check_parity(DetectorRun(kind(), _CPU), graph, _frames(), line_index, policies or [_policy()], rule)


def _spoilt(graph, spoil):
    """Return a graph whose scores and maps become something else."""
    return lambda frames, line_index: spoil(line_index, *graph(frames, line_index))


# One block of a kind shows all of its operators; the exporter would only take longer for more of the same.
_SHALLOW: Mapping[str, Mapping[str, Any]] = {
    "ami_net": {"blocks": 1},
    "dadf": {"blocks": 1, "flow_steps": 2},  # subnets of both kinds
    "glcf": {"encoder_blocks": 1, "decoder_blocks": 1, "level_depths": (1, 1)},
    "inp_former-cnn": {"decoder_blocks": 1},
    "inp_former-vit": {"layers": (1, 2), "decoder_blocks": 2},  # one for each group of layers
    "inp_former_pp-cnn": {"decoder_blocks": 1},
    "inp_former_pp-vit": {"layers": (1, 2), "decoder_blocks": 2},
    "st_mae": {"encoder_blocks": 1, "decoder_blocks": 1},
}


class _Exported(NamedTuple):
    """A tiny detector, its graph, and frames with their lines; nobody changes them."""

    detector: nn.Module
    model: bytes
    frames: NDArray[np.uint8]
    line_index: NDArray[np.int64]


@cache
def _exported(variant: str) -> _Exported:
    """Export a tiny detector once for all tests; a line-conditioned one knows three lines, and batches mix them."""
    lines = {"lines": 3} if hasattr(TINY[variant], "lines") else {}
    detector = make_detector(variant, **lines, **_SHALLOW.get(variant, {}))
    frames = np.stack([make_frame(*detector.image_size, seed=seed, defect=seed % 2 == 1) for seed in range(9)])
    line_index = np.array([2, 0, 1, 1, 2, 0, 0, 1, 2], np.int64) * isinstance(detector, LineConditioned)
    for stage in detector.stages():
        if isinstance(stage, PassStage):
            stage.show(torch.from_numpy(frames).permute(0, 3, 1, 2) / 255, torch.from_numpy(line_index))
            stage.finish()
    return _Exported(detector.eval(), export_graph(detector), frames, line_index)


@pytest.mark.parametrize("variant", sorted(TINY))
def test_export_graph_when_a_detector_is_fitted_then_its_graph_passes_parity(variant):
    """Every detector leaves as one self-contained graph of standard operators with the same answers at any batch."""
    detector, model, frames, line_index = _exported(variant)
    run = DetectorRun(detector, _CPU)
    scores = run(frames, line_index)[0]
    policy = _policy(review_threshold=float(np.median(scores)) * 1.001, fail_threshold=float(scores.max()) * 1.01)
    policies = [policy] * (int(line_index.max()) + 1)

    verify_graph(model)
    assert opset_of(model) == 20
    parity = check_parity(run, GraphRun(model), frames, line_index, policies, score_rule_of(TINY[variant]))
    assert parity.frames == 9
    assert parity.map_difference < 1e-4


def test_export_graph_when_run_then_is_silent_and_tells_nothing_of_this_machine(capfd):
    """No progress or warning reaches whoever waits, and no path of the sources is in the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = export_graph(_Brightness())

    assert capfd.readouterr() == ("", "")
    assert b"/" not in b"".join(node.SerializeToString() for node in onnx.load_from_string(model).graph.node)
    assert b".py" not in model
    assert _graph_of(_Brightness) == model


def test_export_graph_when_the_optimiser_tries_every_pattern_on_every_node_then_gives_the_same_graph(monkeypatch):
    """What spares tests that time (`tests/early_mismatch.py`) changes no graph."""
    spared = _graph_of(_Roundabout)
    monkeypatch.setattr(SimplePatternMatcher, "match", early_mismatch.match_all)

    assert export_graph(_Roundabout()) == spared


def test_export_graph_when_read_then_has_the_names_and_shapes_of_the_contract():
    """`frames` is uint8 with a free batch; `score` and `anomaly_map` are float32 with the same batch."""
    graph = onnx.load_from_string(_graph_of(_Brightness)).graph

    values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
    dims = {name: [d.dim_param or d.dim_value for d in v.shape.dim] for name, v in values.items()}
    batch = dims["frames"][0]
    assert isinstance(batch, str)
    assert dims == {"frames": [batch, 32, 48, 3], "score": [batch], "anomaly_map": [batch, 8, 12]}
    assert values["frames"].elem_type == onnx.TensorProto.UINT8


def test_export_graph_when_pnpt_was_fitted_on_several_lines_then_its_graph_holds_no_average_of_features():
    """The graph holds the prompts that it chooses from by a frame's line, and not what they were made of."""
    detector, model, frames, line_index = _exported("pnpt")

    swapped = DetectorRun(detector, _CPU)(frames, (line_index + 1) % 3)[1]

    assert not np.allclose(swapped, GraphRun(model)(frames, line_index)[1], rtol=0, atol=1e-3)
    held = [tuple(one.dims) for one in onnx.load_from_string(model).graph.initializer]
    assert tuple(detector.prompts.shape) in held
    assert tuple(detector.pool.shape) not in held


def test_exported_graph_of_rb_ae_holds_the_reference_and_a_runtime_reads_it_only_once(tmp_path):
    """The frame is a constant of the graph; at load everything that depends on it alone is folded into constants."""
    detector, model, _, _ = _exported("rb_ae")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3

    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    assert detector.reference.numpy().tobytes() in model
    folded = (tmp_path / "optimised.onnx").read_bytes()
    encoder, decoder = 8, 10
    attention = 3 * 2  # query and the way out; keys and values are constants
    assert len(_kernels(folded)) == 2 * encoder + decoder + attention
    assert len(_kernels(model)) == 3 * encoder + decoder + 2 * attention
    # The three passes of the encoder have one set of kernels between them.
    assert len(set(_kernels(model))) == encoder + decoder + 2 * attention


def _kernels(model: bytes) -> list[str]:
    """Return the name of each convolution's kernel."""
    nodes = onnx.load_from_string(model).graph.node
    return [node.input[1] for node in nodes if node.op_type in ("Conv", "FusedConv")]


def test_export_when_prompts_are_an_input_then_the_graph_judges_by_those():
    """A prompt may come from outside, so that a line can be added without another graph; 1e-4 as above."""

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.detector = _exported("pnpt").detector

        def forward(self, images, prompts):
            return tuple(self.detector.judge(images, prompts))

    module, generator = Prompted(), torch.Generator().manual_seed(1)
    images, prompts = torch.rand(5, 3, 64, 64, generator=generator), torch.randn(5, 16, 32, generator=generator)
    batch = torch.export.Dim("B", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations are not this project's
        program = torch.onnx.export(
            module, (images[:2], prompts[:2]), dynamo=True, dynamic_shapes=({0: batch}, {0: batch}), verbose=False
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])

    for count in (1, 2, 5):
        feed = {"images": images[:count].numpy(), "prompts": prompts[:count].numpy()}
        with torch.no_grad():
            expected = module(images[:count], prompts[:count])
        for found, wanted in zip(session.run(None, feed), expected, strict=True):
            np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-4)


def test_export_graph_when_the_detector_is_line_conditioned_then_the_graph_takes_the_lines():
    """`line_index` is int64 with the batch of `frames`, and lines may be mixed in a batch of any size."""
    model = _graph_of(_Offsets)
    graph, frames = GraphRun(model), _frames(5)
    line_index = np.array([2, 0, 1, 1, 2], np.int64)

    scores, maps = graph(frames, line_index)

    expected = DetectorRun(_Offsets(), _CPU)(frames, line_index)
    np.testing.assert_allclose(scores, expected[0], atol=1e-6)  # float32 in another order
    np.testing.assert_allclose(maps, expected[1], atol=1e-6)  # likewise
    np.testing.assert_array_equal(graph(frames)[0], graph(frames, np.zeros(5, np.int64))[0])
    inputs = {value.name: value.type.tensor_type for value in onnx.load_from_string(model).graph.input}
    assert list(inputs) == ["frames", "line_index"]
    assert inputs["line_index"].elem_type == onnx.TensorProto.INT64
    assert inputs["line_index"].shape.dim[0].dim_param == inputs["frames"].shape.dim[0].dim_param


def test_check_parity_when_one_line_of_several_differs_then_the_export_fails():
    """Each line is compared by its own range and its own thresholds."""
    line_index = np.arange(9, dtype=np.int64) % 3
    policies = [_policy(), _policy(fail_threshold=0.8), _policy(fail_threshold=0.7)]
    good = GraphRun(_graph_of(_Offsets))
    odd = _spoilt(
        good, lambda line, scores, maps: (scores - 0.01 * (line == 2), maps - 0.01 * (line == 2)[:, None, None])
    )

    parity = _check(good, _Offsets, line_index, policies)

    assert parity.frames == 9
    with pytest.raises(ExportFailed, match="anomaly maps"):
        _check(odd, _Offsets, line_index, policies)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda _, scores, maps: (scores * 1.01, maps * 1.01), "anomaly maps"),
        (lambda _, scores, maps: (scores + 0.01, maps), "scores"),
        (lambda _, scores, maps: (scores * np.float32("nan"), maps), "scores"),
        (lambda _, scores, maps: (scores, maps * np.float32("nan")), "anomaly maps"),
    ],
    ids=["map", "score", "score NaN", "map NaN"],
)
def test_check_parity_when_the_graph_says_something_else_then_the_export_fails(spoil, words):
    """A difference of one percent, or a number that is none, never leaves training."""
    with pytest.raises(ExportFailed, match=words):
        _check(_spoilt(GraphRun(_graph_of(_Brightness)), spoil))


def test_check_parity_when_a_verdict_differs_inside_the_region_of_interest_then_the_export_fails():
    """Verdicts are compared as the service finds them, not as the graph's own score would have it."""
    frames = _frames()

    def run(batch, line_index):
        maps = np.full((len(batch), 8, 12), 0.5, np.float32)
        maps[:, 0, 11] = 1000.0  # outside of the region of interest; makes a small difference smaller still
        return np.full(len(batch), 1000.0, np.float32), maps

    def other(batch, line_index):
        scores, maps = run(batch, line_index)
        maps[:, 0, 0] += 0.05
        return scores, maps

    policy: Policy = _policy(review_threshold=0.52, fail_threshold=0.9, region_of_interest=_ROI)

    with pytest.raises(ExportFailed, match="verdicts differ"):
        check_parity(run, other, frames, _ONLY_LINE, [policy], _MAXIMUM)


_NUMBERED = np.zeros((9, 2, 2, 3), np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None, None]
_TWO_LINES = np.arange(9, dtype=np.int64) % 2


def _saying(maps, scores=None):
    """Return what answers frame i of `_NUMBERED` with map i, and its largest value if there are no scores."""
    told = maps.max(axis=(1, 2)) if scores is None else scores
    return lambda frames, _: (told[frames[:, 0, 0, 0]], maps[frames[:, 0, 0, 0]])


def _ramps(*highest):
    """Return a map `(8, 12)` for each frame that rises from 0 to the given value."""
    return np.linspace(0, 1, 96, dtype=np.float32).reshape(8, 12) * np.array(highest, np.float32)[:, None, None]


@pytest.mark.parametrize("size", [1, 3, 5])
def test_check_parity_when_answers_hang_on_the_size_of_a_batch_then_the_export_fails(size):
    """Frames come alone and together, and a graph that was traced with two may say something else then."""
    maps = _ramps(*[0.5] * 9)

    def other(frames, line_index):
        scores, ones = _saying(maps)(frames, line_index)
        return (scores, ones * 1.01) if len(frames) == size else (scores, ones)

    with pytest.raises(ExportFailed, match="anomaly maps"):
        check_parity(_saying(maps), other, _NUMBERED, _ONLY_LINE, [_policy()], _MAXIMUM)


@pytest.mark.parametrize(("off", "fails"), [(0.0005, False), (0.002, True)])
def test_check_parity_when_a_quiet_line_stands_beside_a_loud_one_then_is_held_to_its_own_range(off, fails):
    """A thousandth of a line's own range is allowed, and the record tells the worst line's difference."""
    maps = _ramps(*[1000.0 if line else 1.0 for line in _TWO_LINES])
    others = maps.copy()
    others[0, 3, 3] += off  # of line 0

    def check():
        return check_parity(_saying(maps), _saying(others), _NUMBERED, _TWO_LINES, [_policy()] * 2, _MAXIMUM)

    if fails:
        with pytest.raises(ExportFailed, match="anomaly maps"):
            check()
    else:
        assert check().map_difference == pytest.approx(off, rel=1e-3)


@pytest.mark.parametrize(("off", "fails"), [(5e-5, False), (2e-4, True)])
@pytest.mark.parametrize(
    ("policy", "unit"),
    [(_policy(), 1.0), (make_self_policy(), 0.01)],
    ids=["thresholds of raw scores", "thresholds in a frame's own units"],
)
def test_check_parity_when_scores_differ_then_a_ten_thousandth_is_allowed(policy, unit, off, fails):
    """It is one of the range, or of the threshold where that is larger and in units of raw scores."""
    maps = _ramps(*[unit] * 9)
    scores = maps.max(axis=(1, 2)) + np.float32(off * unit)

    def check():
        return check_parity(_saying(maps), _saying(maps, scores), _NUMBERED, _ONLY_LINE, [policy], _MAXIMUM)

    if fails:
        with pytest.raises(ExportFailed, match="graph's scores differ"):
            check()
    else:
        assert check().score_difference == pytest.approx(off * unit, rel=0.01)


@pytest.mark.parametrize(
    ("thresholds", "fails"),
    [((0.52, 0.9), True), ((0.1, 0.52), True), ((0.50002, 0.9), False), ((0.1, 0.50002), False), ((0.6, 0.9), False)],
    ids=["review", "fail", "at review", "at fail", "neither"],
)
def test_check_parity_when_a_score_crosses_a_threshold_of_its_line_then_the_export_fails(thresholds, fails):
    """Each line has its own two; where PyTorch's score lies as good as on one of them, either verdict is right."""
    maps = _ramps(0.5, 0.5, *[1000.0] * 7)
    others = maps.copy()
    others[1, -1, -1] += 0.04  # of line 1, and little of its range
    lax = _policy(review_threshold=5000, fail_threshold=5000)
    strict = _policy(review_threshold=thresholds[0], fail_threshold=thresholds[1])

    def check():
        return check_parity(_saying(maps), _saying(others), _NUMBERED, _TWO_LINES, [lax, strict], _MAXIMUM)

    if fails:
        with pytest.raises(ExportFailed, match="verdicts differ from PyTorch's by 1 of 4 frames"):
            check()
    else:
        assert check().verdicts_differ == 0


@pytest.mark.parametrize(("column", "fails"), [(2, True), (4, False)])
def test_check_parity_when_the_input_is_cropped_then_verdicts_are_of_what_is_inspected_of_it(column, fails):
    """A region of interest lies on the frame, so it covers fewer columns of a crop's map than of the frame's."""
    window, left = (0.2, 0.2, 0.6, 0.6), (((0.0, 0.0), (0.35, 0.0), (0.35, 1.0), (0.0, 1.0)),)
    maps = np.full((9, 8, 12), 0.5, np.float32)
    maps[:, 0, 11] = 1000.0
    others = maps.copy()
    others[:, 0, column] += 0.05
    policy = _policy(review_threshold=0.52, region_of_interest=left)

    def check():
        return check_parity(_saying(maps), _saying(others), _NUMBERED, _ONLY_LINE, [policy], _MAXIMUM, window)

    if fails:
        with pytest.raises(ExportFailed, match="verdicts differ"):
            check()
    else:
        assert check().verdicts_differ == 0


def test_check_parity_when_the_score_rule_is_not_the_graphs_then_the_export_fails():
    """A bundle never promises a rule under which a region of interest would give other scores."""
    with pytest.raises(ExportFailed, match="score rule"):
        _check(GraphRun(_graph_of(_Brightness)), rule=ScoreRule(kind="top_fraction_mean", fraction=0.5))


def test_export_graph_when_the_detector_cannot_be_traced_then_says_so_in_one_sentence():
    """What the exporter raises ends as one typed fault."""

    class Branching(_Brightness):
        def forward(self, images):
            output = super().forward(images)
            return output if float(images.sum()) > 0 else AnomalyOutput(output.anomaly_map * 2, output.score)

    with pytest.raises(ExportFailed, match="can't be exported"):
        export_graph(Branching())


def test_graph_run_when_the_bytes_are_no_graph_then_is_refused():
    """The runtime's own exceptions do not reach the caller."""
    with pytest.raises(ExportFailed):
        GraphRun(b"no graph")
