"""Stand-ins for CUDA Python and TensorRT with the names that they really have, computing on the host.

They stand at the libraries' seams, so that our own code runs whole: "device" memory is host memory, a stream does
things at once, and a network averages grey levels. `tests/unit/service/engines/test_gpu_contract.py` holds our use of
both against the real libraries.
"""

import ctypes
import enum
from types import ModuleType
from typing import Any

import numpy as np


class Status(enum.Enum):
    """CUDA's statuses that are asked for here."""

    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700


class Cuda:
    """A GPU of the mind.

    Attributes:
        calls: names of the calls, in order.
        fails: statuses that calls of a name return, instead of succeeding.
        is_lost: whether every call fails.
        held: addresses that were given and not taken back.
        recording: what was put into a stream while it is recorded.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, Status] = {}
        self.is_lost = False
        self.held: dict[int, Any] = {}
        self.recording: list[Any] | None = None

    def module(self) -> ModuleType:
        """Return it as `cuda.bindings.runtime`."""
        runtime = ModuleType("cuda.bindings.runtime")
        runtime.cudaError_t = Status
        runtime.cudaStreamNonBlocking, runtime.cudaHostAllocDefault = 1, 0
        runtime.cudaMemcpyKind = enum.Enum("cudaMemcpyKind", "cudaMemcpyHostToDevice cudaMemcpyDeviceToHost")
        runtime.cudaStreamCaptureMode = enum.Enum("cudaStreamCaptureMode", "cudaStreamCaptureModeThreadLocal")
        runtime.cudaDeviceAttr = enum.Enum(
            "cudaDeviceAttr", "cudaDevAttrComputeCapabilityMajor cudaDevAttrComputeCapabilityMinor"
        )
        major = runtime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor
        answers = {
            "cudaGetDeviceCount": lambda: 1,
            "cudaSetDevice": lambda device: None,
            "cudaDeviceGetAttribute": lambda attribute, device: 9 if attribute is major else 0,
            "cudaDeviceSynchronize": lambda: None,
            "cudaStreamCreateWithFlags": lambda flags: 11,
            "cudaStreamDestroy": lambda stream: None,
            "cudaStreamSynchronize": lambda stream: None,
            "cudaMalloc": self._allocate,
            "cudaHostAlloc": lambda size, flags: self._allocate(size),
            "cudaFree": self._free,
            "cudaFreeHost": self._free,
            "cudaMemcpyAsync": lambda to, source, count, kind, stream: ctypes.memmove(to, source, count) and None,
            "cudaStreamBeginCapture": lambda stream, mode: self._record(),
            "cudaStreamEndCapture": lambda stream: self._recorded(),
            "cudaGraphInstantiate": lambda graph, flags: graph,
            "cudaGraphDestroy": lambda graph: None,
            "cudaGraphExecDestroy": lambda graph: None,
            "cudaGraphLaunch": lambda graph, stream: [step() for step in graph] and None,
        }
        for name, answer in answers.items():
            setattr(runtime, name, self._call(name, answer))
        return runtime

    def _call(self, name: str, answer: Any) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if self.is_lost:
                return (Status.cudaErrorIllegalAddress,)
            if name in self.fails:
                return (self.fails.pop(name),)
            value = answer(*arguments)
            return (Status.cudaSuccess,) if value is None else (Status.cudaSuccess, value)

        return call

    def _allocate(self, size: int) -> int:
        memory = (ctypes.c_uint8 * max(1, size))()
        self.held[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def _free(self, address: int) -> None:
        del self.held[address]

    def _record(self) -> None:
        self.recording = []

    def _recorded(self) -> Any:
        recorded, self.recording = self.recording, None
        return recorded


class TensorRt:
    """TensorRT of the mind: whatever it parses becomes a network that averages grey levels.

    Args:
        cuda: whose memory it computes in.
        map_shape: `(h, w)` of its maps.
        inputs: name to `(type, shape)`.

    Attributes:
        profiles: shapes that were set, by input.
        flags: of the networks that were made.
        said: what the parser complains of; None parses.
        timing: caches that builds were given.
        fails: names of calls that are refused.
        contexts_left: how many execution contexts the device has memory for.
    """

    version = "10.16.1.11"

    def __init__(self, cuda: Cuda, map_shape: tuple[int, int], inputs: dict[str, tuple[Any, tuple[int, ...]]]) -> None:
        self.cuda, self.map_shape, self.inputs = cuda, map_shape, inputs
        self.profiles: dict[str, tuple[Any, ...]] = {}
        self.flags: list[int] = []
        self.said: str | None = None
        self.timing: list[bytes] = []
        self.fails: set[str] = set()
        self.contexts_left = 100

    def module(self) -> ModuleType:
        """Return it as `tensorrt`."""
        trt, world = ModuleType("tensorrt"), self
        trt.__version__ = self.version
        severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
        trt.TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
        trt.MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
        trt.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
        trt.nptype = lambda dtype: dtype
        trt.ILogger = type("ILogger", (), {one.name: one for one in severity})

        class Network:
            def __init__(self, flags: int) -> None:
                world.flags.append(flags)

        class OnnxParser:
            num_errors = 1

            def __init__(self, network: Network, logger: Any) -> None:
                assert isinstance(network, Network)

            def parse(self, model: bytes) -> bool:
                return world.said is None

            def get_error(self, index: int) -> Any:
                return type("Error", (), {"desc": lambda _: world.said})()

        class Profile:
            def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
                world.profiles[name] = (least, best, most)

        class Timing:
            def serialize(self) -> bytes:
                return b"measured"

        class Config:
            def set_memory_pool_limit(self, pool: Any, size: int) -> None:
                assert pool is trt.MemoryPoolType.WORKSPACE

            def add_optimization_profile(self, profile: Profile) -> int:
                return -1 if "profile" in world.fails else 0

            def create_timing_cache(self, data: bytes) -> Timing:
                world.timing.append(data)
                return Timing()

            def set_timing_cache(self, cache: Timing, ignore_mismatch: bool) -> bool:
                return True

            def get_timing_cache(self) -> Timing:
                return Timing()

        class Builder:
            def __init__(self, logger: Any) -> None:
                self._logger = logger

            def create_network(self, flags: int) -> Network:
                return Network(flags)

            def create_builder_config(self) -> Config:
                return Config()

            def create_optimization_profile(self) -> Profile:
                return Profile()

            def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
                if "build" in world.fails:
                    self._logger.log(trt.ILogger.ERROR, "no kernel")
                    return None
                return b"a plan"

        class Context:
            def __init__(self) -> None:
                self._at: dict[str, int] = {}
                self._batch = 0

            def set_tensor_address(self, name: str, address: int) -> bool:
                self._at[name] = address
                return True

            def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
                self._batch = shape[0]
                return True

            def execute_async_v3(self, stream: int) -> bool:
                if "execute" in world.fails:
                    return False
                step = self._step(self._batch)
                if world.cuda.recording is not None:
                    world.cuda.recording.append(step)
                else:
                    step()
                return True

            def _step(self, batch: int) -> Any:
                def step() -> bool:
                    frames = world.view(self._at["frames"], np.uint8, (batch, *world.inputs["frames"][1]))
                    scores = frames.mean(axis=(1, 2, 3), dtype=np.float64).astype(np.float32) / np.float32(255)
                    world.view(self._at["score"], np.float32, (batch,))[...] = scores
                    world.view(self._at["anomaly_map"], np.float32, (batch, *world.map_shape))[...] = scores[
                        :, None, None
                    ]
                    return True

                return step

        class Engine:
            device_memory_size_v2 = 1000
            names = (*world.inputs, "score", "anomaly_map")
            num_io_tensors = len(names)

            def get_tensor_name(self, index: int) -> str:
                return self.names[index]

            def get_tensor_mode(self, name: str) -> Any:
                return trt.TensorIOMode.INPUT if name in world.inputs else trt.TensorIOMode.OUTPUT

            def get_tensor_dtype(self, name: str) -> Any:
                return world.inputs[name][0] if name in world.inputs else np.float32

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                known = {"score": (), "anomaly_map": world.map_shape}
                return (-1, *(world.inputs[name][1] if name in world.inputs else known[name]))

            def create_execution_context(self) -> Context | None:
                world.contexts_left -= 1
                return None if "context" in world.fails or world.contexts_left < 0 else Context()

        class Runtime:
            def __init__(self, logger: Any) -> None:
                assert logger is not None

            def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
                return None if "deserialise" in world.fails else Engine()

        trt.OnnxParser, trt.Builder, trt.Runtime = OnnxParser, Builder, Runtime
        return trt

    @staticmethod
    def view(address: int, dtype: Any, shape: tuple[int, ...]) -> Any:
        """Return memory at an address as an array."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)
