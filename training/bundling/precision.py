"""From the exported float32 graph to one that computes in fewer bits, and the gate that it must pass.

Comes after the parity check with PyTorch. `int8` is quantised statically by ONNX Runtime, with Q/DQ pairs, unsigned
activations and signed weights a channel, from good frames that fitting saw; it is made for CPUs. `fp16` is converted
by ONNX Runtime's own converter and made for GPUs; what loses most in half precision (reductions, normalisations,
distances, resizing) stays in float32, and so do inputs and outputs. Whatever a runtime computes follows from the graph
alone: no flag of any runtime changes its precision.

The thresholds belong to the graph that serves, so the line is measured and calibrated again with it. The gate compares
verdicts: of every held-out and test frame, and of planted defects, each graph judged by its own thresholds. Maps and
scores may differ by what `TOLERANCES` says.

Beside `training/bundling/export.py` and `service/engines/ort.py` this is the only importer of ONNX Runtime.
"""

import contextlib
import fnmatch
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from service.contract.bundle import ParityRecord
from service.contract.graph import verify_graph
from service.contract.policy import Policy, ScoreRule, Verdict, bring_to_units, inspected_mask, verdict_of
from service.contract.regions import Window
from service.errors import BundleRefused
from training.bundling.export import ExportFailed
from training.config import Precision

# Operators whose weights are worth quantising; what lies between them gains nothing and loses maps' resolution.
_QUANTISED = ("Conv", "Gemm", "MatMul")
# Sums over many values and differences of near ones overflow or vanish in half precision.
_KEPT_IN_FLOAT = (
    *DEFAULT_OP_BLOCK_LIST,
    *("Div", "Exp", "Gelu", "LayerNormalization", "Log", "Pow", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean"),
    *("ReduceMin", "ReduceSum", "Reciprocal", "Resize", "Softmax", "Sqrt", "Sub"),
)
# Layers that the sentence of a failed gate names.
_NAMED_LAYERS = 4


class Tolerance(NamedTuple):
    """How far a graph of fewer bits may be from float32.

    Attributes:
        maps: mean difference of a map value, as a share of the range of the line's maps.
        scores: largest difference of a score, as a share of the larger of the fail threshold and that range.
        near: a frame whose score lies within this share of a threshold has no single right verdict, so such frames
            may get the neighbouring one; never `PASS` for `FAIL` or the reverse.
    """

    maps: float
    scores: float
    near: float


TOLERANCES: Mapping[Precision, Tolerance] = {
    "fp16": Tolerance(maps=0.005, scores=0.05, near=0.01),
    "int8": Tolerance(maps=0.03, scores=0.25, near=0.05),
}


class JudgedFrames(NamedTuple):
    """What one graph says of one line's frames, and the policy that it is judged by.

    Attributes:
        scores: `(n,)` float32.
        maps: `(n, h, w)` float32.
        policy: calibrated with this very graph.
    """

    scores: NDArray[np.float32]
    maps: NDArray[np.float32]
    policy: Policy


def lower_precision(
    model: bytes,
    precision: Literal["fp16", "int8"],
    frames: NDArray[np.uint8],
    line_index: NDArray[np.int64],
    keep_float: Sequence[str] = (),
) -> bytes:
    """Return the graph in another precision.

    Args:
        model: bytes of the float32 `model.onnx`.
        precision: wanted.
        frames: `(n, H, W, 3)` uint8 good frames that fitting saw; `int8` finds the ranges of activations on them.
        line_index: `(n,)` int64, which line each shows.
        keep_float: patterns of names of operators that stay in float32, as in `node_conv2d_1*`.

    Raises:
        ExportFailed: if the graph can't be converted, or a pattern names nothing.
    """
    graph = onnx.load_from_string(model)
    kept = _matching(graph, keep_float)
    try:
        lowered = _quantise(model, frames, line_index, kept) if precision == "int8" else _halve(graph, kept)
        verify_graph(lowered)
    except BundleRefused as error:
        raise ExportFailed(f"The {precision} graph would be refused: {error.sentence}") from error
    except Exception as error:  # the converters raise whatever their passes raise
        raise ExportFailed(
            f"The graph can't be brought to {precision} ({type(error).__name__}: {error}); export it with --precision "
            "fp32."
        ) from error
    return lowered


def check_verdicts(
    precision: Literal["fp16", "int8"],
    lines: Sequence[tuple[JudgedFrames, JudgedFrames]],
    rule: ScoreRule,
    window: Window,
    layers: Sequence[str] = (),
) -> ParityRecord:
    """Compare a graph with the float32 one it was made from: maps, scores and verdicts.

    Args:
        precision: of the graph.
        lines: of each line what the float32 graph and this one say of the same frames.
        rule: how scores are reduced from maps.
        window: where the maps lie on the frame, `InputSpec.window(1, 1)`.
        layers: operators that could be kept in float32, for the sentence of a refusal.

    Raises:
        ExportFailed: if anything differs by more than the tolerance; the sentence says what to do.
    """
    tolerance = TOLERANCES[precision]
    frames = at_threshold = 0
    largest_map = largest_score = 0.0
    for expected, found in lines:
        span = max(float(np.ptp(expected.maps)), float(np.finfo(np.float32).tiny))
        differences = np.abs(found.maps - expected.maps)
        mean, scores = float(differences.mean()) / span, float(np.abs(found.scores - expected.scores).max())
        allowed = tolerance.scores * max(abs(expected.policy.fail_threshold), span)
        # Each condition is written so that a NaN fails it.
        if not mean <= tolerance.maps:
            raise _refused(precision, f"maps differ by {mean:.2g} of their range in the mean", tolerance.maps, layers)
        if not scores <= allowed:
            raise _refused(precision, f"scores differ by up to {scores:.2g}", allowed, layers)
        verdicts = list(zip(_judge(expected, rule, window), _judge(found, rule, window), strict=True))
        differ = [(before, after) for before, after in verdicts if before.verdict is not after.verdict]
        wrong = [pair for pair in differ if not _is_either_right(*pair, expected.policy, found.policy, tolerance.near)]
        if wrong:
            what = f"{len(wrong)} of {len(verdicts)} frames get another verdict"
            raise _refused(precision, what, 0, layers)
        frames += len(verdicts)
        at_threshold += len(differ)
        largest_map = max(largest_map, float(differences.max()) / span)
        largest_score = max(largest_score, scores)
    return ParityRecord(
        frames=frames,
        map_difference=largest_map,
        score_difference=largest_score,
        verdicts_differ=0,
        verdicts_at_threshold=at_threshold,
    )


def layers_of(model: bytes) -> list[str]:
    """Return the names of operators that `int8` would quantise, the last ones first: errors there meet no averaging."""
    graph = onnx.load_from_string(model).graph
    weights = _weights_of(graph)
    return [node.name for node in reversed(graph.node) if _is_quantised(node, weights)]


class _Judged(NamedTuple):
    score: float
    verdict: Verdict


def _judge(frames: JudgedFrames, rule: ScoreRule, window: Window) -> list[_Judged]:
    inspected = inspected_mask(frames.policy, *frames.maps.shape[1:], window=window)
    judged = []
    for score, anomaly_map in zip(frames.scores, frames.maps, strict=True):
        compared = bring_to_units(float(score), anomaly_map, frames.policy, rule, inspected).score
        judged.append(_Judged(compared, verdict_of(compared, frames.policy)))
    return judged


def _is_either_right(before: _Judged, after: _Judged, old: Policy, new: Policy, near: float) -> bool:
    """Tell whether a frame lies so near to a threshold, in either graph, that neighbouring verdicts are both right."""
    if {before.verdict, after.verdict} == {Verdict.PASS, Verdict.FAIL}:
        thresholds_meet = abs(old.fail_threshold - old.review_threshold) <= near * abs(old.fail_threshold)
        if not thresholds_meet:
            return False
    return any(
        abs(judged.score - threshold) <= near * abs(policy.fail_threshold)
        for judged, policy in ((before, old), (after, new))
        for threshold in (policy.review_threshold, policy.fail_threshold)
    )


def _refused(precision: str, what: str, allowed: float, layers: Sequence[str]) -> ExportFailed:
    keep = f"keep some layers in float32 (--keep-float {layers[0]}), or " if layers else ""
    last = f" The last layers are {', '.join(layers[:_NAMED_LAYERS])}." if layers else ""
    return ExportFailed(
        f"With the {precision} graph {what} against float32, where {allowed:.2g} is allowed, and no bundle was "
        f"written; {keep}export with --precision fp32.{last}"
    )


def _matching(model: Any, patterns: Sequence[str]) -> set[str]:
    names = [node.name for node in model.graph.node]
    kept: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ExportFailed(f"keep_float names {pattern!r}, and no operator of the graph is called so.")
        kept |= set(found)
    return kept


def _halve(model: Any, kept: set[str]) -> bytes:
    with _silence():
        half = convert_float_to_float16(
            model, keep_io_types=True, op_block_list=list(_KEPT_IN_FLOAT), node_block_list=sorted(kept)
        )
    data: bytes = half.SerializeToString(deterministic=True)
    return data


class _Frames(CalibrationDataReader):  # type: ignore[misc] # the library ships no types
    """Shows good frames one by one to whoever looks for the ranges of activations."""

    def __init__(self, feeds: Iterator[dict[str, NDArray[Any]]]) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._feeds, None)


def _quantise(model: bytes, frames: NDArray[np.uint8], line_index: NDArray[np.int64], kept: set[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder, _silence():
        plain, prepared, quantised = (Path(folder) / name for name in ("plain", "prepared", "quantised"))
        plain.write_bytes(model)
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        is_conditional = any(one.name == "line_index" for one in graph.input)
        weights = _weights_of(graph)
        feeds = (
            {"frames": frames[i : i + 1]} | ({"line_index": line_index[i : i + 1]} if is_conditional else {})
            for i in range(len(frames))
        )
        quantize_static(
            str(prepared),
            str(quantised),
            _Frames(feeds),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(_QUANTISED),
            nodes_to_exclude=[
                node.name for node in graph.node if node.name in kept or not _is_quantised(node, weights)
            ],
            # What comes out of a product goes into a bias, a norm or an activation, which compute in float32: rounding
            # it first costs time and half of all error. Convolutions hand their bytes to the next convolution.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        return _tidy(onnx.load(quantised))


def _weights_of(graph: Any) -> dict[str, tuple[int, ...]]:
    return {one.name: tuple(one.dims) for one in graph.initializer}


def _is_quantised(node: Any, weights: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether an operator has weights and answers more than one channel: a map has more than 256 steps."""
    if node.op_type not in _QUANTISED:
        return False
    shapes = [weights[name] for name in node.input[:2] if name in weights]
    return bool(shapes) and shapes[0][0 if node.op_type == "Conv" else -1] > 1


def _tidy(model: Any) -> bytes:
    """Forget operator sets that no operator is of: the reader refuses foreign ones by name."""
    used = {node.domain for node in model.graph.node} | {""}
    kept = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
    data: bytes = model.SerializeToString(deterministic=True)
    return data


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the converters' advice from whoever waits for a bundle."""
    logger = logging.getLogger()
    level = logger.level
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
