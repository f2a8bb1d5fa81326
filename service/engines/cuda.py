"""One GPU's memory and streams: the only importer of CUDA Python (`cuda.bindings`).

Each instance of a GPU engine has a stream and one set of buffers of its own, made once for the largest batch: pinned
on the host, so that copies run beside another instance's computing, and at a fixed address on the device, so that a
recorded CUDA graph may be replayed.

A CUDA error that leaves the context broken ("sticky": an illegal address, an uncorrectable memory error) comes back
from every later call. It is told apart by asking the device once more, and remembered: nothing runs on that engine any
more, the golden probe fails as well, and the process ends and is started again.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda.bindings import runtime
from numpy.typing import NDArray

from service.errors import EngineFailed

DEVICE = 0  # one process a GPU: which one it sees is the operator's choice (CUDA_VISIBLE_DEVICES, Kubernetes)


class GpuLost(EngineFailed):
    """The process's CUDA context is broken; only a new process can use the GPU again."""


def check(answer: tuple[Any, ...]) -> Any:
    """Return what a CUDA call returned beside its status: nothing, one value or a tuple.

    Raises:
        GpuLost: if the call failed and the device does not answer any more.
        EngineFailed: if the call failed.
    """
    status, *values = answer
    if status != runtime.cudaError_t.cudaSuccess:
        again, *_ = runtime.cudaDeviceSynchronize()
        if again != runtime.cudaError_t.cudaSuccess:
            raise GpuLost(f"The GPU is lost ({_name(status)}); the part has no verdict.")
        raise EngineFailed(f"The GPU refused a call ({_name(status)}); the parts have no verdict.")
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def architecture() -> str:
    """Return the GPU's compute capability as in `sm_90`.

    Raises:
        EngineFailed: if there is no GPU, or no driver for it.
    """
    status, *count = runtime.cudaGetDeviceCount()
    if status != runtime.cudaError_t.cudaSuccess or not any(count):
        raise EngineFailed("There is no GPU that CUDA can use here; look at the driver, or ask for another device.")
    attribute = runtime.cudaDeviceAttr
    major = check(runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, DEVICE))
    minor = check(runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, DEVICE))
    return f"sm_{major}{minor}"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a network, for one frame.

    Attributes:
        dtype: numpy's.
        shape: without the batch.
        is_input: whether it goes to the device, or comes back.
    """

    dtype: type[np.generic]
    shape: tuple[int, ...]
    is_input: bool

    @property
    def frame_bytes(self) -> int:
        """Bytes that one frame takes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Lane:
    """A stream and the buffers of one instance.

    Args:
        tensors: by name.
        most: frames in the largest batch.

    Attributes:
        stream: CUDA's handle.
        addresses: where each tensor lies on the device.
        size_bytes: memory that the buffers take there.

    Raises:
        EngineFailed: if the device has no memory left.
    """

    def __init__(self, tensors: Mapping[str, TensorSpec], most: int) -> None:
        self._tensors = dict(tensors)
        self._host: dict[str, int] = {}
        self._pinned: dict[str, NDArray[Any]] = {}
        self.addresses: dict[str, int] = {}
        self.size_bytes = 0
        self.stream: int | None = None
        try:
            check(runtime.cudaSetDevice(DEVICE))
            handle = check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
            self.stream = int(handle)
            for name, tensor in self._tensors.items():
                size = tensor.frame_bytes * most
                self._host[name] = int(check(runtime.cudaHostAlloc(size, runtime.cudaHostAllocDefault)))
                self._pinned[name] = _view(self._host[name], size, tensor, most)
                self.addresses[name] = int(check(runtime.cudaMalloc(size)))
                self.size_bytes += size
        except EngineFailed:
            self.close()
            raise

    def send(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Copy inputs to the device, in the stream's order; returns before the copy is done."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        for name, array in arrays.items():
            pinned = self._pinned[name][: len(array)]
            pinned[...] = array
            check(runtime.cudaMemcpyAsync(self.addresses[name], self._host[name], pinned.nbytes, kind, self.stream))

    def fetch(self, count: int) -> dict[str, NDArray[Any]]:
        """Wait for the stream and return a copy of each output's first `count` frames."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        outputs = {name: self._pinned[name][:count] for name, one in self._tensors.items() if not one.is_input}
        for name, pinned in outputs.items():
            check(runtime.cudaMemcpyAsync(self._host[name], self.addresses[name], pinned.nbytes, kind, self.stream))
        self.wait()
        return {name: pinned.copy() for name, pinned in outputs.items()}  # the next batch overwrites the buffers

    def wait(self) -> None:
        """Wait until everything in the stream is done."""
        check(runtime.cudaStreamSynchronize(self.stream))

    def begin_recording(self) -> None:
        """Record what is put into the stream from now on, instead of running it."""
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(runtime.cudaStreamBeginCapture(self.stream, mode))

    def end_recording(self) -> Any:
        """Return what was recorded, ready for `replay`."""
        graph = check(runtime.cudaStreamEndCapture(self.stream))
        try:
            return check(runtime.cudaGraphInstantiate(graph, 0))
        finally:
            check(runtime.cudaGraphDestroy(graph))

    def replay(self, recorded: Any) -> None:
        """Run what was recorded."""
        check(runtime.cudaGraphLaunch(recorded, self.stream))

    def forget(self, recorded: Any) -> None:
        """Give a recording's memory back; a lost device has nothing to give."""
        runtime.cudaGraphExecDestroy(recorded)

    def close(self) -> None:
        """Give everything back; a lost device has nothing to give."""
        self._pinned.clear()
        while self.addresses:
            runtime.cudaFree(self.addresses.popitem()[1])
        while self._host:
            runtime.cudaFreeHost(self._host.popitem()[1])
        if self.stream is not None:
            runtime.cudaStreamDestroy(self.stream)
            self.stream = None


def _view(address: int, size: int, tensor: TensorSpec, most: int) -> NDArray[Any]:
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    return raw.view(tensor.dtype).reshape(most, *tensor.shape)


def _name(status: Any) -> str:
    return str(getattr(status, "name", status))
