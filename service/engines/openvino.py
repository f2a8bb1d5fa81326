"""OpenVINO on a CPU: the only importer of `openvino`.

An engine of its own rather than ONNX Runtime's OpenVINO provider: that one comes in a build of ONNX Runtime that takes
the place of the ordinary one and lags behind it. In float32 it is about as fast as ONNX Runtime; its gain is bfloat16
(`FLAWLINE_INFERENCE_PRECISION=bf16`), on processors that compute in it. The golden set decides whether a bundle may be
served so: an answer that leaves the golden tolerance refuses the line.

As in ONNX Runtime, frames side by side are the quickest way, and a frame that is alone is run on every core.
"""

import io
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Bundle
from service.engines.engine import EngineOptions, EngineOutput, LoneRun
from service.engines.pool import Pool
from service.engines.promise import Promise, Signature
from service.errors import BundleRefused, EngineFailed

# OpenVINO's import reports to its maker over the internet, unless this package of its own is missing; a factory did not
# ask for that.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # so that importing it fails

import openvino  # noqa: E402 - see above
from openvino.frontend import FrontEndManager  # noqa: E402 - see above

_NUMPY_NAMES = {"u8": "uint8", "i64": "int64", "f32": "float32"}
_BFLOAT16 = "BF16"

# The binding looks for NumPy the first time that it is given an array, under a lock that it does not share with the
# interpreter's: two threads that come there first, at once, wait for each other for ever. Importing is one thread's.
openvino.Tensor(np.zeros(1, np.uint8))


class OpenVinoEngine:
    """A bundle's network in OpenVINO.

    Args:
        bundle: verified.
        options: `instances` run side by side, each with `threads_per_run` threads; one more is for runs that are alone,
            where `threads_alone` is larger.

    Raises:
        BundleRefused: if the runtime can't load the graph, or it is not the graph that the manifest describes.
        EngineFailed: if this processor can't compute in the wanted precision.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self._promise = Promise.of(bundle.manifest)
        core = openvino.Core()
        if options.inference_precision == "bf16" and _BFLOAT16 not in core.get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            raise EngineFailed("This processor has no bfloat16; set FLAWLINE_INFERENCE_PRECISION=f32.")
        self.alone: LoneRun | None = None
        self._lone_pool: Pool[Any] | None = None
        try:
            model = _read(bundle.model)
            inputs, outputs = _signature(model.inputs), _signature(model.outputs)
            self._is_conditional = self._promise.check_signature(inputs, outputs)
            # The kernel places threads better than a process that does not know its neighbours.
            self._pool = _open(core, model, options, options.instances, options.threads_per_run, is_pinned=False)
            if options.threads_alone > options.threads_per_run:
                # But it wakes those of one run on the same core, where they wait for each other.
                self._lone_pool = _open(core, model, options, 1, options.threads_alone, is_pinned=True)
                self.alone = LoneRun(self._run_alone, options.threads_alone / options.threads_per_run)
        except RuntimeError as error:
            raise BundleRefused("The runtime can't load model.onnx; export the bundle again.") from error
        self.device = "openvino:cpu"
        self.provider = "openvino"
        self.precision: str = "bf16" if options.inference_precision == "bf16" else bundle.manifest.precision
        self.size_bytes = len(bundle.model) * (1 if self.alone is None else 2)

    def run(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        """Judge frames; see `Engine.run`."""
        return self._run(self._pool, frames, line_index)

    def close(self) -> None:
        """Give the network up; it ends with the last run."""
        self._pool.close()
        if self._lone_pool is not None:
            self._lone_pool.close()

    def _run_alone(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        return self._run(self._pool if self._lone_pool is None else self._lone_pool, frames, line_index)

    def _run(self, pool: Pool[Any], frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        self._promise.refuse_other_frames(frames)
        feed: dict[str, NDArray[Any]] = {"frames": np.ascontiguousarray(frames)}
        if self._is_conditional:
            self._promise.refuse_other_lines(line_index, len(frames))
            feed["line_index"] = line_index
        with pool.lend() as request:
            try:
                results = request.infer(feed, share_inputs=True)
                scores, anomaly_maps = results["score"], results["anomaly_map"]  # copies, made by `infer`
            except Exception as error:  # the runtime's errors share no narrower base
                raise EngineFailed("The runtime failed on this batch; the parts have no verdict.") from error
        return self._promise.check_output(scores, anomaly_maps, len(frames))


def _read(model: bytes) -> Any:
    """Read ONNX and nothing else: `Core.read_model` finds OpenVINO's own format in whatever bytes begin with it."""
    reader = FrontEndManager().load_by_framework("onnx")
    if reader is None:
        raise EngineFailed("This installation of OpenVINO reads no ONNX; install the extra `openvino` again.")
    return reader.convert(reader.load(io.BytesIO(model)))


def _open(
    core: Any, model: Any, options: EngineOptions, instances: int, threads_per_run: int, *, is_pinned: bool
) -> Pool[Any]:
    settings = {
        "INFERENCE_NUM_THREADS": threads_per_run * instances,
        "NUM_STREAMS": instances,
        "INFERENCE_PRECISION_HINT": options.inference_precision,
        "ENABLE_CPU_PINNING": is_pinned,
    }
    compiled = core.compile_model(model, "CPU", settings)
    return Pool(instances, compiled.create_infer_request, lambda _: None)  # the last request takes the network with it


def _signature(ports: Sequence[Any]) -> Signature:
    found: dict[str, tuple[str, list[int | str | None]]] = {}
    for port in ports:
        kind = port.get_element_type().get_type_name()
        shape: list[int | str | None] = [
            None if dimension.is_dynamic else dimension.get_length() for dimension in port.get_partial_shape()
        ]
        found[port.get_any_name()] = (_NUMPY_NAMES.get(kind, kind), shape)
    return found
