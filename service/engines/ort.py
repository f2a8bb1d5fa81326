"""ONNX Runtime: the only importer of `onnxruntime` on the service's side.

One thread inside a run and no spinning: on a CPU, frames run side by side on several runners, and every thread more
inside of one run costs more than it brings. The session is checked at load and every answer after each run, so that
nothing of another shape or type travels on.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from service.contract.bundle import Bundle
from service.engines.engine import EngineOutput
from service.errors import BundleRefused, EngineFailed

Device = Literal["cpu", "cuda"]

_PROVIDERS: dict[Device, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
}
_ERRORS_ONLY = 3

onnxruntime.disable_telemetry_events()  # `flawline` does not even let them begin; other programs come here


class OrtEngine:
    """A bundle's network in an ONNX Runtime session.

    Args:
        bundle: verified.
        device: where it must run.
        threads_per_run: CPU threads inside one run.

    Raises:
        BundleRefused: if the runtime can't load the graph, or it is not the graph that the manifest describes.
        EngineFailed: if the device is not there.
    """

    def __init__(self, bundle: Bundle, device: Device = "cpu", threads_per_run: int = 1) -> None:
        spec, output = bundle.manifest.input, bundle.manifest.output
        self._frame_shape = (spec.height, spec.width, 3)
        self._map_shape = (output.map_height, output.map_width)
        self._lines = len(bundle.manifest.lines)
        self._session = _open_session(bundle.model, device, threads_per_run)
        inputs, outputs = _signature(self._session.get_inputs()), _signature(self._session.get_outputs())
        self._is_conditional = "line_index" in inputs
        _check_signature(inputs, outputs, self._frame_shape, self._map_shape)
        self.device = "cpu" if device == "cpu" else "cuda:0"
        self.size_bytes = len(bundle.model)

    def run(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        """Judge frames; see `Engine.run`."""
        feed: dict[str, NDArray[Any]] = {"frames": frames}
        if self._is_conditional:
            self._refuse_other_lines(line_index, len(frames))
            feed["line_index"] = line_index
        try:
            scores, anomaly_maps = self._session.run(["score", "anomaly_map"], feed)
        except Exception as error:  # the runtime's errors share no narrower base
            raise EngineFailed("The runtime failed on this batch; the parts have no verdict.") from error
        B = len(frames)
        if not (_is_float32(scores, (B,)) and _is_float32(anomaly_maps, (B, *self._map_shape))):
            raise EngineFailed("The runtime answered with another shape or type than the bundle promises.")
        return EngineOutput(scores, anomaly_maps)

    def close(self) -> None:
        """Let go of the session, which gives its memory back."""
        self._session = None

    def _refuse_other_lines(self, line_index: NDArray[np.int64], count: int) -> None:
        """A graph counts a negative index from the end, and some runtimes read past the end: a wrong line, no error."""
        if line_index.dtype != np.int64 or line_index.shape != (count,):
            raise EngineFailed("A class-conditional network needs one int64 line index for each frame.")
        if ((line_index < 0) | (line_index >= self._lines)).any():
            raise EngineFailed(f"A frame is said to show a line that is not among the bundle's {self._lines}.")


def _open_session(model: bytes, device: Device, threads_per_run: int) -> Any:
    wanted = _PROVIDERS[device]
    if wanted[0] not in onnxruntime.get_available_providers():
        raise EngineFailed(f"This installation has no {wanted[0]}; install the extra for it or ask for another device.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads_per_run
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(model, options, providers=list(wanted))
    except Exception as error:  # the runtime's errors share no narrower base
        raise BundleRefused("The runtime can't load model.onnx; export the bundle again.") from error
    session.disable_fallback()  # a failing run must fail, and not be repeated elsewhere without a word
    # A provider that is installed but can't start is left out without an error, so only the session itself can tell.
    if session.get_providers()[0] != wanted[0]:
        raise EngineFailed(f"{wanted[0]} could not start; look at the driver, or ask for another device.")
    return session


def _signature(arguments: Sequence[Any]) -> dict[str, tuple[str, list[int | str | None]]]:
    return {argument.name: (argument.type, list(argument.shape)) for argument in arguments}


def _check_signature(
    inputs: dict[str, tuple[str, list[int | str | None]]],
    outputs: dict[str, tuple[str, list[int | str | None]]],
    frame_shape: tuple[int, ...],
    map_shape: tuple[int, ...],
) -> None:
    if not {"frames"} <= inputs.keys() <= {"frames", "line_index"} or outputs.keys() != {"score", "anomaly_map"}:
        raise BundleRefused(
            "model.onnx must take `frames` and give `score` and `anomaly_map`; export the bundle again."
        )
    expected = {
        "frames": ("tensor(uint8)", frame_shape),
        "line_index": ("tensor(int64)", ()),
        "score": ("tensor(float)", ()),
        "anomaly_map": ("tensor(float)", map_shape),
    }
    for name, (kind, shape) in (inputs | outputs).items():
        expected_kind, expected_shape = expected[name]
        if kind != expected_kind or len(shape) != 1 + len(expected_shape):
            raise BundleRefused(f"model.onnx has another type or rank of `{name}` than a bundle; export it again.")
        if isinstance(shape[0], int):
            raise BundleRefused(f"model.onnx fixes the batch size of `{name}`; export it with a dynamic one.")
        # A size that the graph leaves open is checked after each run.
        if any(isinstance(got, int) and got != want for got, want in zip(shape[1:], expected_shape, strict=True)):
            raise BundleRefused(f"model.onnx has another size of `{name}` than manifest.json; export it again.")


def _is_float32(values: object, shape: tuple[int, ...]) -> bool:
    return isinstance(values, np.ndarray) and values.dtype == np.float32 and values.shape == shape
