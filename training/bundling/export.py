"""One graph from the camera's bytes to the score, and the proof that it says what PyTorch said.

Comes after calibration, because verdicts are compared as well. The graph is verified by the reader's own rules, and a
graph that differs is an error: nothing is written then. Beside `service/engines/ort.py` this is the only importer of
ONNX Runtime.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.detector import AnomalyOutput, Detector, LineConditioned
from service.contract.bundle import ParityRecord
from service.contract.graph import verify_graph
from service.contract.policy import Policy, ScoreRule, bring_to_units, inspected_mask, verdict_of
from service.contract.regions import Window
from service.contract.tiling import Run
from service.errors import BundleRefused, FlawlineError

OPSET = 20
_TRACED_BATCH = 2
# Batch sizes that parity runs at; none of them is the traced one.
_PARITY_BATCHES = (1, 3, 5)
# float32 sums in another order: errors seen are near 1e-6 of the range. Where a detector decides, such errors grow:
# AMI-Net's tokens at the threshold of its mask make up to 1.5e-4 of the range. No verdict may differ.
MAP_TOLERANCE = 1e-3
SCORE_TOLERANCE = 1e-4


class ExportFailed(FlawlineError):
    """The detector can't be exported, or the graph does not say what the detector says; no bundle is written."""

    code = "export_failed"


class EndToEnd(nn.Module):
    """From camera bytes to score and map: what becomes the graph, and what evaluation runs.

    Args:
        detector: fitted.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, frames: Tensor, line_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Judge frames: scores `(B,)` and maps `(B, h, w)`, both float32.

        Args:
            frames: `(B, H, W, 3)` uint8 RGB.
            line_index: `(B,)` int64, which line each frame shows; for line-conditioned detectors only.
        """
        # Cast first: TensorRT takes bytes as an input and nowhere else.
        images = frames.to(torch.float32).permute(0, 3, 1, 2) / 255
        output: AnomalyOutput = self.detector(images) if line_index is None else self.detector(images, line_index)
        return output.score, output.anomaly_map


@dataclass(frozen=True, eq=False)
class DetectorRun:
    """A fitted detector as frames and their lines in, scores and maps out.

    Attributes:
        detector: an `nn.Module`; it is put into eval mode and left on its device.
        device: where it lies.
    """

    detector: nn.Module
    device: torch.device

    def __call__(
        self,
        frames: NDArray[np.uint8],
        line_index: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Judge frames: scores `(B,)` and maps `(B, h, w)`.

        Args:
            frames: `(B, H, W, 3)` uint8.
            line_index: `(B,)`, looked at by line-conditioned detectors only; None if all frames show the first line.
        """
        arguments: list[NDArray[Any]] = [frames]
        if isinstance(self.detector, LineConditioned):
            arguments.append(_first_line(frames) if line_index is None else line_index)
        with torch.inference_mode():
            module = EndToEnd(self.detector).eval()
            scores, maps = module(*(torch.from_numpy(np.ascontiguousarray(one)).to(self.device) for one in arguments))
        return scores.float().cpu().numpy(), maps.float().cpu().numpy()


class GraphRun:
    """An exported graph on ONNX Runtime's CPU, as frames and their lines in, scores and maps out.

    Args:
        model: bytes of `model.onnx`; verified by the caller or by `export_graph`.
        threads: of one inference.
        profile: where the runtime shall write what every operator takes, as the beginning of a file's name, or None.

    Raises:
        ExportFailed: if the runtime can't load the graph.
    """

    def __init__(self, model: bytes, threads: int = 1, profile: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.load_model_format", "ONNX")  # as the service reads it
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's exceptions share no base of their own
            raise ExportFailed("ONNX Runtime can't load the exported graph; no bundle was written.") from error
        self._is_conditional = any(one.name == "line_index" for one in self._session.get_inputs())

    def __call__(
        self,
        frames: NDArray[np.uint8],
        line_index: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Judge frames: scores `(B,)` and maps `(B, h, w)`.

        Args:
            frames: `(B, H, W, 3)` uint8.
            line_index: `(B,)`, fed to line-conditioned graphs only; None if all frames show the first line.
        """
        feed: dict[str, NDArray[Any]] = {"frames": frames}
        if self._is_conditional:
            feed["line_index"] = _first_line(frames) if line_index is None else line_index
        scores, maps = self._session.run(["score", "anomaly_map"], feed)
        return scores, maps

    def end_profiling(self) -> Path:
        """Close the profile that was asked for and return its file: trace events as JSON, durations in microseconds."""
        return Path(self._session.end_profiling())


def export_graph(detector: Detector) -> bytes:
    """Write a detector as one self-contained ONNX graph with a dynamic batch.

    Args:
        detector: fitted.

    Returns:
        The bytes of `model.onnx`: `frames` uint8 `[B, H, W, 3]` to `score` `[B]` and `anomaly_map` `[B, h, w]`. A
        line-conditioned detector's graph takes `line_index` int64 `[B]` as well.

    Raises:
        ExportFailed: if the detector can't be traced, or the reader would refuse the graph.
    """
    if not isinstance(detector, nn.Module):
        raise TypeError("a detector is an nn.Module")
    module = EndToEnd(detector).eval()
    first = next(iter(detector.parameters()), None)
    device = torch.device("cpu") if first is None else first.device
    example = {"frames": torch.zeros((_TRACED_BATCH, *detector.image_size, 3), dtype=torch.uint8, device=device)}
    if isinstance(detector, LineConditioned):
        example["line_index"] = torch.zeros(_TRACED_BATCH, dtype=torch.int64, device=device)
    try:
        data = _trace(module, example)
        verify_graph(data)
    except BundleRefused as error:
        raise ExportFailed(f"The exported graph would be refused: {error.sentence}") from error
    except Exception as error:  # the exporter raises whatever its passes raise
        raise ExportFailed(f"The detector can't be exported to ONNX ({type(error).__name__}: {error}).") from error
    return data


def check_parity(
    detector: Run,
    graph: Run,
    frames: NDArray[np.uint8],
    line_index: NDArray[np.int64],
    policies: Sequence[Policy],
    rule: ScoreRule,
    window: Window = (0.0, 0.0, 1.0, 1.0),
) -> ParityRecord:
    """Compare the graph with PyTorch on real frames, at batch sizes that were not traced: maps, scores and verdicts.

    Lines are mixed within a batch as the frames are, and compared by the range and the thresholds of their own. Scores
    must also be what `rule` makes of the maps, since the service reduces them again inside a region of interest.
    Of a frame whose score lies within a ten-thousandth of a threshold either verdict is right, so such frames are left
    out of the comparison of verdicts.

    Args:
        detector: PyTorch.
        graph: the exported graph in a runtime.
        frames: `(n, H, W, 3)` uint8, at least one.
        line_index: `(n,)` int64, which line each frame shows.
        policies: of each line, whose verdicts are compared.
        rule: how the bundle says that scores are reduced from maps.
        window: where the maps lie on the frame, `InputSpec.window(1, 1)`.

    Raises:
        ExportFailed: if anything differs by more than the tolerance; the sentence says what and by how much.
    """
    expected = _in_batches(detector, frames, line_index, (len(frames),))
    found = _in_batches(graph, frames, line_index, _PARITY_BATCHES)
    differences = [
        _compare_line(expected.of(shown), found.of(shown), policies[line], rule, window)
        for line, shown in ((line, line_index == line) for line in np.unique(line_index))
    ]
    return ParityRecord(
        frames=len(frames),
        map_difference=max(maps for maps, _ in differences),
        score_difference=max(scores for _, scores in differences),
        verdicts_differ=0,
    )


class _Answers(NamedTuple):
    scores: NDArray[np.float32]
    maps: NDArray[np.float32]

    def of(self, shown: NDArray[np.bool_]) -> "_Answers":
        return _Answers(self.scores[shown], self.maps[shown])


def _compare_line(
    expected: _Answers, found: _Answers, policy: Policy, rule: ScoreRule, window: Window
) -> tuple[float, float]:
    """Return the largest difference of maps, as a share of their range, and of scores; refuse what is too large."""
    span = max(float(expected.maps.max() - expected.maps.min()), float(np.finfo(np.float32).tiny))
    map_difference = float(np.abs(found.maps - expected.maps).max()) / span
    score_difference = float(np.abs(found.scores - expected.scores).max())
    # Thresholds in a frame's own units say nothing of raw scores.
    allowed = SCORE_TOLERANCE * (span if policy.calibration == "self" else max(abs(policy.fail_threshold), span))
    # Each condition is written so that a NaN fails it.
    if not map_difference <= MAP_TOLERANCE:
        raise _differs("anomaly maps", f"{map_difference:.2g} of their range", f"{MAP_TOLERANCE:g}")
    if not score_difference <= allowed:
        raise _differs("scores", f"{score_difference:.2g}", f"{allowed:.2g}")
    _check_rule(rule, found, allowed)
    inspected = inspected_mask(policy, *found.maps.shape[1:], window=window)
    differ = _verdicts_that_differ(expected, found, policy, rule, inspected)
    if differ:
        raise _differs("verdicts", f"{differ} of {len(found.scores)} frames", "0")
    return map_difference, score_difference


def _first_line(frames: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.zeros(len(frames), np.int64)


def _trace(module: nn.Module, example: dict[str, Tensor]) -> bytes:
    batch = torch.export.Dim("B", min=1)
    with _silence(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(example.values()),
            input_names=list(example),
            output_names=["score", "anomaly_map"],
            dynamic_shapes=tuple({0: batch} for _ in example),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    if program is None:  # never with dynamo=True, but its type allows it
        raise RuntimeError("the exporter returned no graph")
    model = program.model_proto
    _forget_sources(model.graph)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _forget_sources(graph: Any) -> None:
    """Take stack traces with this machine's paths out of a graph; equal detectors then give equal bytes."""
    graph.ClearField("metadata_props")
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for node in graph.node:
        for attribute in node.attribute:
            # Asking for an absent graph would create it, and the graph would be invalid.
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _forget_sources(inner)


def _in_batches(run: Run, frames: NDArray[np.uint8], line_index: NDArray[np.int64], sizes: Sequence[int]) -> _Answers:
    scores, maps = [], []
    start = turn = 0
    while start < len(frames):
        end = start + sizes[turn % len(sizes)]
        batch_scores, batch_maps = run(frames[start:end], line_index[start:end])
        scores.append(batch_scores)
        maps.append(batch_maps)
        start, turn = end, turn + 1
    return _Answers(np.concatenate(scores), np.concatenate(maps))


def _check_rule(rule: ScoreRule, found: _Answers, allowed: float) -> None:
    reduced = np.array([rule.reduce(anomaly_map.ravel()) for anomaly_map in found.maps])
    difference = float(np.abs(reduced - found.scores).max())
    if not difference <= allowed:
        raise ExportFailed(
            f"The bundle would promise the score rule {rule.kind}, but the graph's scores differ from it by "
            f"{difference:.2g}; no bundle was written."
        )


def _verdicts_that_differ(
    expected: _Answers,
    found: _Answers,
    policy: Policy,
    rule: ScoreRule,
    inspected: NDArray[np.bool_] | None,
) -> int:
    # A share of the threshold, not of the maps' range: a hot spot outside of the region of interest must not widen it.
    near = SCORE_TOLERANCE * abs(policy.fail_threshold)
    differ = 0
    for score, anomaly_map, other_score, other_map in zip(*expected, *found, strict=True):
        compared = bring_to_units(float(score), anomaly_map, policy, rule, inspected).score
        if min(abs(compared - policy.review_threshold), abs(compared - policy.fail_threshold)) <= near:
            continue
        other = bring_to_units(float(other_score), other_map, policy, rule, inspected).score
        differ += verdict_of(compared, policy) is not verdict_of(other, policy)
    return differ


def _differs(what: str, found: str, allowed: str) -> ExportFailed:
    return ExportFailed(
        f"The exported graph's {what} differ from PyTorch's by {found}, where {allowed} is allowed; no bundle was "
        "written. Fit again with another seed (--set seed=2): answers that hang on the last digits of float32 can't be "
        "trusted on another device."
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's progress, warnings and log lines from whoever waits for a bundle."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
