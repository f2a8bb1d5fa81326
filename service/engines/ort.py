"""ONNX Runtime: the only importer of `onnxruntime` on the service's side.

On a CPU one session serves every runner: one thread inside a run and no spinning, since frames run side by side and
every thread more inside of one run costs more than it brings. Where a frame is alone that is otherwise: all cores but
one would idle, so a second session with a thread for each of them takes it. On a GPU each instance is a session, a
stream and a set of buffers of its own (`cuda.py`): inputs are copied from pinned memory, the graph is bound to fixed
device addresses, and a batch size may be recorded as a CUDA graph and replayed.

The session is checked at load and every answer after each run, so that nothing of another shape or type travels on.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from service.contract.bundle import Bundle
from service.contract.graph import input_names
from service.engines.cores import Cores
from service.engines.engine import Device, EngineOptions, EngineOutput, LoneRun
from service.engines.plans import private_directory
from service.engines.pool import Pool
from service.engines.promise import Promise, Signature, run_in_pieces
from service.errors import BundleRefused, EngineFailed

_PROVIDERS: dict[Device, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "ort-tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
_NUMPY_NAMES = {"tensor(uint8)": "uint8", "tensor(int64)": "int64", "tensor(float)": "float32"}
_OUTPUTS = ("score", "anomaly_map")
_ERRORS_ONLY = 3
_DEFAULTS = EngineOptions()

onnxruntime.disable_telemetry_events()  # `flawline` does not even let them begin; other programs come here


class OrtEngine:
    """A bundle's network in ONNX Runtime on the CPU: one session for all runners, and one for a run that is alone.

    Args:
        bundle: verified.
        options: threads and memory.

    Raises:
        BundleRefused: if the runtime can't load the graph, or it is not the graph that the manifest describes.
    """

    device = "cpu"
    provider = _PROVIDERS["cpu"][0]

    def __init__(self, bundle: Bundle, options: EngineOptions = _DEFAULTS) -> None:
        self._promise = Promise.of(bundle.manifest)
        self._session: Any = _open_session(bundle.model, options, _PROVIDERS["cpu"])
        self._is_conditional = _check_session(self._session, self._promise)
        self._run_options = onnxruntime.RunOptions()
        if options.memory_arena == "shrink":
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.precision: str = bundle.manifest.precision
        self.size_bytes = len(bundle.model)
        self.alone: LoneRun | None = None
        self._wide_session: Any = None
        self._cores: Cores | None = None
        if options.threads_alone > options.threads_per_run:
            self._cores = Cores.choose()
            wide = replace(options, threads_per_run=options.threads_alone)
            self._wide_session = _open_session(bundle.model, wide, _PROVIDERS["cpu"], self._cores)
            self.size_bytes *= 2
            self.alone = LoneRun(self._run_alone, options.threads_alone / options.threads_per_run)

    def run(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        """Judge frames; see `Engine.run`."""
        return self._run(self._session, frames, line_index)  # taken once: another thread may close the engine

    def close(self) -> None:
        """Give the sessions up; each ends with the last run that holds it."""
        self._session = self._wide_session = None

    def _run_alone(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        if self._cores is not None:
            self._cores.go_home()
        return self._run(self._wide_session, frames, line_index)

    def _run(self, session: Any, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        feed: dict[str, NDArray[Any]] = {"frames": frames}
        if self._is_conditional:
            self._promise.refuse_other_lines(line_index, len(frames))
            feed["line_index"] = line_index
        if session is None:
            raise EngineFailed("The engine was unloaded; the part has no verdict.")
        try:
            scores, anomaly_maps = session.run(_OUTPUTS, feed, self._run_options)
        except Exception as error:  # the runtime's errors share no narrower base
            raise EngineFailed("The runtime failed on this batch; the parts have no verdict.") from error
        return self._promise.check_output(scores, anomaly_maps, len(frames))


class OrtGpuEngine:
    """A bundle's network in ONNX Runtime on a GPU, by its CUDA or its TensorRT provider: a session an instance.

    Args:
        bundle: verified.
        options: which provider, and how.

    Raises:
        BundleRefused: if the runtime can't load the graph, or it is not the graph that the manifest describes.
        EngineFailed: if the device is not there.
    """

    device = "cuda:0"
    alone: LoneRun | None = None

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        wanted = _PROVIDERS[options.device][0]
        if wanted not in onnxruntime.get_available_providers():
            raise EngineFailed(
                f"This installation has no {wanted}; install the extra for it or ask for another device."
            )
        self.provider = wanted
        self.precision: str = bundle.manifest.precision
        self._promise = Promise.of(bundle.manifest)
        self._most = options.max_batch_size
        self._pool = Pool(options.instances, lambda: _GpuSession(bundle, self._promise, options), _GpuSession.close)
        instances = self._pool.instances
        self._is_conditional = instances[0].is_conditional
        # Each session holds the weights; what it computes in between is not known.
        self.size_bytes = sum(len(bundle.model) + instance.buffer_bytes for instance in instances)

    def run(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        """Judge frames; see `Engine.run`."""
        self._promise.refuse_other_frames(frames)
        if self._is_conditional:
            self._promise.refuse_other_lines(line_index, len(frames))
        return run_in_pieces(self._run, frames, line_index, self._most)

    def close(self) -> None:
        """Give sessions and buffers back; see `Engine.close`."""
        self._pool.close()

    def _run(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        with self._pool.lend() as instance:
            outputs = instance.run(frames, line_index)
        return self._promise.check_output(outputs["score"], outputs["anomaly_map"], len(frames))


class _GpuSession:
    """One session with its lane; serves one run at a time.

    Every run is on the session's own thread, because ONNX Runtime keeps a recorded graph for the thread that recorded
    it, and runners come and go.

    Args:
        bundle: verified.
        promise: what it promises.
        options: as the engine's.
        device_type: where the lane's memory lies, in the runtime's words.
    """

    def __init__(self, bundle: Bundle, promise: Promise, options: EngineOptions, device_type: str = "cuda") -> None:
        from service.engines.cuda import Lane, TensorSpec  # noqa: PLC0415 - only GPU machines have CUDA Python

        tensors = {
            "frames": TensorSpec(np.uint8, promise.frame_shape, is_input=True),
            "line_index": TensorSpec(np.int64, (), is_input=True),
            "score": TensorSpec(np.float32, (), is_input=False),
            "anomaly_map": TensorSpec(np.float32, promise.map_shape, is_input=False),
        }
        self._tensors = tensors
        self._device_type = device_type
        self._records = options.cuda_graphs
        self._lane = Lane(tensors, options.max_batch_size)
        self.buffer_bytes = self._lane.size_bytes
        self._bindings: dict[int, tuple[Any, Any]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flawline-gpu")
        try:
            providers = _providers(bundle, options, promise, self._lane.stream)
            self._session: Any = self._thread.submit(_open_session, bundle.model, options, providers).result()
            self.is_conditional = _check_session(self._session, promise)
        except BaseException:
            self.close()
            raise

    def run(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Run frames, at most as many as the buffers hold."""
        return self._thread.submit(self._run, frames, line_index).result()

    def close(self) -> None:
        """Give session and buffers back."""
        self._thread.submit(self._close).result()
        self._thread.shutdown(wait=False)

    def _close(self) -> None:
        self._bindings.clear()
        self._session = None
        self._lane.close()

    def _run(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        count = len(frames)
        inputs: dict[str, NDArray[Any]] = {"frames": frames}
        if self.is_conditional:
            inputs["line_index"] = line_index
        binding, run_options = self._bindings.get(count) or self._bind(count)
        self._lane.send(inputs)
        try:
            self._session.run_with_iobinding(binding, run_options)
        except Exception as error:  # the runtime's errors share no narrower base
            self._lane.wait()  # says so where the whole device is lost
            raise EngineFailed("The runtime failed on this batch; the parts have no verdict.") from error
        return self._lane.fetch(count)

    def _bind(self, count: int) -> tuple[Any, Any]:
        binding = self._session.io_binding()
        for name, tensor in self._tensors.items():
            if name == "line_index" and not self.is_conditional:
                continue
            bind = binding.bind_input if tensor.is_input else binding.bind_output
            place = {
                "device_type": self._device_type,
                "device_id": 0,
                "element_type": tensor.dtype,
                "shape": [count, *tensor.shape],
                "buffer_ptr": self._lane.addresses[name],
            }
            bind(name, **place)
        run_options = onnxruntime.RunOptions()
        # The lane waits for its own stream, after the outputs' copy.
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._records:
            run_options.add_run_config_entry("gpu_graph_id", str(count))
        self._bindings[count] = binding, run_options
        return binding, run_options


def _providers(
    bundle: Bundle, options: EngineOptions, promise: Promise, stream: int | None
) -> list[tuple[str, dict[str, str]] | str]:
    """Return the providers of a session with a lane, and what each is told; every value is text, as they want it."""
    if options.device == "cpu":
        return list(_PROVIDERS["cpu"])
    graphs = "1" if options.cuda_graphs else "0"
    shared = {"device_id": "0", "user_compute_stream": str(stream)}
    # Memory grows by what is asked for, not by doubling: several engines share the device.
    cuda = {**shared, "arena_extend_strategy": "kSameAsRequested", "enable_cuda_graph": graphs}
    providers: list[tuple[str, dict[str, str]] | str] = [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
    if options.device != "ort-tensorrt":
        return providers
    if options.cache_directory is None:
        raise EngineFailed("TensorRT needs a folder for its plans; set FLAWLINE_ENGINE_CACHE_DIRECTORY.")
    # The provider deserialises what lies there, so it must be nobody else's to write.
    cache = str(private_directory(options.cache_directory / "ort-tensorrt"))
    is_conditional = "line_index" in input_names(bundle.model)

    def shapes(count: int) -> str:
        sizes = "x".join(str(size) for size in (count, *promise.frame_shape))
        return f"frames:{sizes}" + (f",line_index:{count}" if is_conditional else "")

    tensorrt = {
        **shared,
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": cache,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": cache,
        "trt_cuda_graph_enable": graphs,
        # One plan for every batch size, rather than a new one for each that comes.
        "trt_profile_min_shapes": shapes(1),
        "trt_profile_opt_shapes": shapes(options.max_batch_size),
        "trt_profile_max_shapes": shapes(options.max_batch_size),
    }
    return [("TensorrtExecutionProvider", tensorrt), *providers]


def _open_session(model: bytes, options: EngineOptions, providers: Sequence[Any], cores: Cores | None = None) -> Any:
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = options.threads_per_run
    session_options.inter_op_num_threads = 1
    session_options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    session_options.log_severity_level = _ERRORS_ONLY
    # Else the runtime goes by a mark in the bytes, and could find another network in them than `onnx` looked into.
    session_options.add_session_config_entry("session.load_model_format", "ONNX")
    session_options.enable_cpu_mem_arena = options.memory_arena != "off"
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session_options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if cores is not None:  # the calling thread is the first one; the runtime counts cores from 1
        others = ",".join(str(core + 1) for core in cores.others)
        helpers = [others] * (options.threads_per_run - 1)
        session_options.add_session_config_entry("session.intra_op_thread_affinities", ";".join(helpers))
    try:
        session = onnxruntime.InferenceSession(model, session_options, providers=list(providers))
    except Exception as error:  # the runtime's errors share no narrower base
        what = "; without FLAWLINE_CUDA_GRAPHS it may" if options.cuda_graphs else "; export the bundle again"
        raise BundleRefused(f"The runtime can't load model.onnx{what}.") from error
    session.disable_fallback()  # a failing run must fail, and not be repeated elsewhere without a word
    # A provider that is installed but can't start is left out without an error, so only the session itself can tell.
    wanted = _PROVIDERS[options.device][0]
    if session.get_providers()[0] != wanted:
        raise EngineFailed(f"{wanted} could not start; look at the driver, or ask for another device.")
    return session


def _check_session(session: Any, promise: Promise) -> bool:
    return promise.check_signature(_signature(session.get_inputs()), _signature(session.get_outputs()))


def _signature(arguments: Sequence[Any]) -> Signature:
    found: Mapping[str, tuple[str, list[int | str | None]]] = {
        argument.name: (_NUMPY_NAMES.get(argument.type, argument.type), list(argument.shape)) for argument in arguments
    }
    return found
