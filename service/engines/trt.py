"""TensorRT: the only importer of `tensorrt`; written for releases 10 and 11.

Building: the verified ONNX becomes a plan for this GPU, once, by `flawline build-engine`. The network is strongly
typed, so precision is what the ONNX says and no flag of the builder changes it; release 11 knows no other way. Batches
of every size from one to the profile's largest are one plan.

Running: each instance has an execution context and a lane (stream, pinned and device buffers, `cuda.py`), and serves
one run at a time. A batch size may be recorded as a CUDA graph on its second run and replayed from then on.

Nobody has run this file on a GPU yet (see README.md beside it): its calls are checked against the real bindings of both
releases, and its order of calls against a stand-in with their names.
"""

import hashlib
import logging
import threading
from typing import Any

import numpy as np
import tensorrt
from numpy.typing import NDArray

from service.contract.bundle import Bundle
from service.contract.graph import input_names
from service.engines.cuda import GpuLost, Lane, TensorSpec, architecture
from service.engines.engine import EngineOptions, EngineOutput, LoneRun
from service.engines.plans import (
    Plan,
    PlanKey,
    PlanRecord,
    private_directory,
    read_plan,
    read_timing_cache,
    write_plan,
    write_timing_cache,
)
from service.engines.pool import Pool
from service.engines.promise import Promise, Signature, run_in_pieces
from service.errors import BundleRefused, EngineFailed

_TO_BE_SEALED = "0" * 64

_log = logging.getLogger("flawline")


class _Log(tensorrt.ILogger):  # type: ignore[misc] # the bindings ship no types
    """Passes TensorRT's complaints on to our log, and keeps the last error for the sentence of a refusal."""

    def __init__(self) -> None:
        super().__init__()
        self.last_error = "no reason given"

    def log(self, severity: Any, msg: str) -> None:
        """Take one line; called by the library."""
        if severity in (tensorrt.ILogger.INTERNAL_ERROR, tensorrt.ILogger.ERROR):
            self.last_error = msg
            _log.error("tensorrt", extra={"said": msg})
        elif severity == tensorrt.ILogger.WARNING:
            _log.warning("tensorrt", extra={"said": msg})


def build_plan(bundle: Bundle, options: EngineOptions, opt_batch: int, workspace_bytes: int) -> PlanRecord:
    """Build a bundle's plan on this machine and keep it in the cache.

    Args:
        bundle: verified.
        options: its `max_batch_size` and `cache_directory` count.
        opt_batch: batch size that the plan shall be fastest at.
        workspace_bytes: device memory that the builder may try layers with.

    Returns:
        What was kept.

    Raises:
        BundleRefused: if TensorRT can't take the graph; the sentence repeats what it said.
        EngineFailed: if there is no GPU, or the cache can't be used.
    """
    cache, key, log = _cache_of(options), _key_of(bundle), _Log()
    if bundle.manifest.precision == "int8":
        raise BundleRefused(
            "An int8 bundle is quantised for CPUs, with unsigned activations that TensorRT does not take; export the "
            "run with --precision fp16 for it."
        )
    private_directory(cache)
    builder = tensorrt.Builder(log)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse(bundle.model):
        said = parser.get_error(0).desc() if parser.num_errors else log.last_error
        raise BundleRefused(f"TensorRT can't take model.onnx: {said}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, workspace_bytes)
    profile = builder.create_optimization_profile()
    promise = Promise.of(bundle.manifest)
    for name in input_names(bundle.model):
        shape = promise.frame_shape if name == "frames" else ()
        profile.set_shape(name, (1, *shape), (opt_batch, *shape), (options.max_batch_size, *shape))
    if config.add_optimization_profile(profile) < 0:
        raise BundleRefused(f"TensorRT refuses the batch sizes 1, {opt_batch}, {options.max_batch_size}.")
    timing = config.create_timing_cache(read_timing_cache(cache))
    config.set_timing_cache(timing, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BundleRefused(f"TensorRT can't build model.onnx: {log.last_error}")
    write_timing_cache(cache, bytes(config.get_timing_cache().serialize()))
    record = PlanRecord(
        model_digest=key.model_digest,
        architecture=key.architecture,
        tensorrt=key.tensorrt,
        precision=key.precision,
        min_batch=1,
        opt_batch=opt_batch,
        max_batch=options.max_batch_size,
        plan_digest=_TO_BE_SEALED,
    )
    data = bytes(plan)
    write_plan(cache, record, data)
    return read_plan(cache, key).record


class TrtEngine:
    """A bundle's plan on the GPU.

    Args:
        bundle: verified.
        options: instances, largest batch, cache.

    Raises:
        BundleRefused: if the plan's inputs and outputs are not what the manifest describes.
        EngineFailed: if there is no GPU, no plan for it, or one that may not be loaded.
    """

    device = "tensorrt:cuda:0"
    provider = "tensorrt"
    alone: LoneRun | None = None

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        plan = read_plan(_cache_of(options), _key_of(bundle))
        if plan.record.max_batch < options.max_batch_size:
            raise EngineFailed(
                f"The plan takes batches of at most {plan.record.max_batch}, and FLAWLINE_MAX_BATCH_SIZE is "
                f"{options.max_batch_size}; lower it, or build again: flawline build-engine BUNDLE --max-batch-size "
                f"{options.max_batch_size}."
            )
        self.precision: str = bundle.manifest.precision
        self._promise = Promise.of(bundle.manifest)
        self._most = options.max_batch_size
        self._log = _Log()  # must outlive runtime and engine
        self._runtime = tensorrt.Runtime(self._log)
        self._engine: Any = _load(self._runtime, plan, self._log)
        self._is_conditional = self._promise.check_signature(*_signatures(self._engine))
        tensors = {
            "frames": TensorSpec(np.uint8, self._promise.frame_shape, is_input=True),
            "line_index": TensorSpec(np.int64, (), is_input=True),
            "score": TensorSpec(np.float32, (), is_input=False),
            "anomaly_map": TensorSpec(np.float32, self._promise.map_shape, is_input=False),
        }
        if not self._is_conditional:
            del tensors["line_index"]
        self._pool = Pool(
            options.instances, lambda: _Context(self._engine, tensors, options, self._log), _Context.close
        )
        of_context = int(self._engine.device_memory_size_v2)
        self.size_bytes = len(plan.data) + sum(of_context + context.buffer_bytes for context in self._pool.instances)
        self._lost: str | None = None
        self._closing = threading.Lock()

    def run(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        """Judge frames; see `Engine.run`."""
        self._promise.refuse_other_frames(frames)
        if self._is_conditional:
            self._promise.refuse_other_lines(line_index, len(frames))
        return run_in_pieces(self._run, frames, line_index, self._most)

    def close(self) -> None:
        """Give contexts, buffers and the network back; see `Engine.close`."""
        with self._closing:
            self._pool.close()
            self._engine = None

    def _run(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        if self._lost is not None:
            raise GpuLost(self._lost)
        inputs: dict[str, NDArray[Any]] = {"frames": frames}
        if self._is_conditional:
            inputs["line_index"] = line_index
        try:
            with self._pool.lend() as context:
                outputs = context.run(inputs, len(frames))
        except GpuLost as error:
            self._lost = error.sentence
            raise
        return self._promise.check_output(outputs["score"], outputs["anomaly_map"], len(frames))


class _Context:
    """An execution context with its lane; serves one run at a time."""

    def __init__(self, engine: Any, tensors: dict[str, TensorSpec], options: EngineOptions, log: _Log) -> None:
        self._log = log
        self._records = options.cuda_graphs
        self._recorded: dict[int, Any] = {}
        self._ran: set[int] = set()
        self._shapes = {name: tensor.shape for name, tensor in tensors.items() if tensor.is_input}
        self._lane = Lane(tensors, options.max_batch_size)
        self.buffer_bytes = self._lane.size_bytes
        self._context: Any = engine.create_execution_context()
        if self._context is None:
            self._lane.close()
            raise EngineFailed(f"The GPU has no memory for another instance: {log.last_error}")
        for name, address in self._lane.addresses.items():
            self._obey(self._context.set_tensor_address(name, address))

    def run(self, inputs: dict[str, NDArray[Any]], count: int) -> dict[str, NDArray[Any]]:
        """Copy, compute and copy back, all in the stream's order; then wait."""
        self._lane.send(inputs)
        recorded = self._recorded.get(count)
        if recorded is not None:
            self._lane.replay(recorded)
        else:
            self._enqueue(count)
        return self._lane.fetch(count)

    def close(self) -> None:
        """Give recordings, context and buffers back."""
        while self._recorded:
            self._lane.forget(self._recorded.popitem()[1])
        self._context = None
        self._lane.close()

    def _enqueue(self, count: int) -> None:
        for name, shape in self._shapes.items():
            self._obey(self._context.set_input_shape(name, (count, *shape)))
        if not self._records or count not in self._ran:
            # The first run of a size may allocate and choose, which can't be recorded.
            self._obey(self._context.execute_async_v3(self._lane.stream))
            self._ran.add(count)
            return
        self._lane.begin_recording()
        is_enqueued = self._context.execute_async_v3(self._lane.stream)
        recorded = self._lane.end_recording()
        self._obey(is_enqueued)
        self._recorded[count] = recorded
        self._lane.replay(recorded)

    def _obey(self, done: bool) -> None:
        if not done:
            self._lane.wait()  # says so where the whole device is lost
            raise EngineFailed(f"TensorRT refused a call ({self._log.last_error}); the parts have no verdict.")


def _cache_of(options: EngineOptions) -> Any:
    if options.cache_directory is None:
        raise EngineFailed("TensorRT needs a folder for its plans; set FLAWLINE_ENGINE_CACHE_DIRECTORY.")
    return options.cache_directory


def _key_of(bundle: Bundle) -> PlanKey:
    return PlanKey(
        hashlib.sha256(bundle.model).hexdigest(), architecture(), tensorrt.__version__, bundle.manifest.precision
    )


def _load(runtime: Any, plan: Plan, log: _Log) -> Any:
    engine = runtime.deserialize_cuda_engine(plan.data)
    if engine is None:
        raise EngineFailed(f"The plan can't be loaded ({log.last_error}); build it again: flawline build-engine BUNDLE")
    return engine


def _signatures(engine: Any) -> tuple[Signature, Signature]:
    inputs: dict[str, tuple[str, list[int | str | None]]] = {}
    outputs: dict[str, tuple[str, list[int | str | None]]] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT
        shape: list[int | str | None] = [None if size < 0 else int(size) for size in engine.get_tensor_shape(name)]
        (inputs if is_input else outputs)[name] = (np.dtype(tensorrt.nptype(engine.get_tensor_dtype(name))).name, shape)
    return inputs, outputs
