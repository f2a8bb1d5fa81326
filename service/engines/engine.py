"""What the batcher asks of a runtime: arrays in, arrays out. No HTTP, no lines, no clock."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Device = Literal["cpu", "openvino", "cuda", "ort-tensorrt", "tensorrt"]
MemoryArena = Literal["keep", "shrink", "off"]
InferencePrecision = Literal["f32", "bf16"]

GPU_DEVICES: frozenset[Device] = frozenset({"cuda", "ort-tensorrt", "tensorrt"})


@dataclass(frozen=True)
class EngineOptions:
    """How engines are opened; `Settings` explains each of them to operators.

    Attributes:
        device: runtime and device.
        instances: that run side by side; a CPU session of ONNX Runtime serves any number of threads by itself.
        threads_per_run: CPU threads inside one run.
        threads_alone: CPU threads inside a run beside which nothing runs; no more than `threads_per_run` means that
            such a run is like any other.
        max_batch_size: frames that one run must be able to take; a larger batch is run in pieces.
        memory_arena: whether memory stays between runs of ONNX Runtime's CPU.
        cuda_graphs: record each batch size once and replay it.
        inference_precision: that OpenVINO may compute in.
        cache_directory: of TensorRT's plans.
    """

    device: Device = "cpu"
    instances: int = 1
    threads_per_run: int = 1
    threads_alone: int = 1
    max_batch_size: int = 1
    memory_arena: MemoryArena = "keep"
    cuda_graphs: bool = False
    inference_precision: InferencePrecision = "f32"
    cache_directory: Path | None = None


class EngineOutput(NamedTuple):
    """One batch's raw answer.

    Attributes:
        scores: `(B,)` float32.
        anomaly_maps: `(B, h, w)` float32.
    """

    scores: NDArray[np.float32]
    anomaly_maps: NDArray[np.float32]


RunBatch = Callable[[NDArray[np.uint8], NDArray[np.int64]], EngineOutput]


class LoneRun(NamedTuple):
    """A quicker way for a batch beside which nothing runs.

    Attributes:
        run: as `Engine.run`, with more threads.
        speedup: over `Engine.run`, at the very most.
    """

    run: RunBatch
    speedup: float


class Engine(Protocol):
    """A bundle's network on a device.

    Attributes:
        device: where it really runs, for example `cpu` or `cuda:0`.
        provider: what runs it there, in the runtime's own word, for example `CPUExecutionProvider`.
        precision: that it computes in: the bundle's, unless the runtime was told otherwise.
        size_bytes: memory that it takes on its device, as well as is known: weights and buffers of its own at least;
            on a CPU, whoever loaded it sets what that was seen to take.
        alone: what may be run instead where nothing else runs; None where `run` is as quick as it gets.
    """

    device: str
    provider: str
    precision: str
    size_bytes: int
    alone: LoneRun | None

    def run(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        """Judge frames; safe to call from several threads at once.

        Args:
            frames: `(B, H, W, 3)` uint8 RGB.
            line_index: `(B,)` int64, which of the bundle's lines each frame shows; only class-conditional networks
                look at it.

        Raises:
            EngineFailed: if the runtime raises, or answers with other shapes or types than promised, or a line that a
                class-conditional network was not fitted on is asked for.
        """
        ...

    def close(self) -> None:
        """Give back what it holds on its device; nothing is run after it, and closing twice is closing once."""
        ...
