"""How fast an exported graph is on this machine's CPU, and which kind of operator takes most of the time.

Comes after export, where detectors are compared. One frame, one thread, ONNX Runtime, as the service runs a CPU. Two
clocks, because a machine has other work: the thread's own CPU time hardly moves with it, the clock on the wall does.
"""

import json
import os
import platform
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from training.bundling.export import GraphRun

_LEAST_REPEATS = 15
_LARGEST_REPEATS = 200
_PROFILED_RUNS = 6
_CPU_INFORMATION = Path("/proc/cpuinfo")


class OperatorShare(BaseModel):
    """How much of a forward pass one kind of operator takes.

    Attributes:
        kind: the runtime's name, fused kinds included.
        share: of the time of all operators, 0 to 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    share: float


class GraphSpeed(BaseModel):
    """What one frame costs.

    Attributes:
        cpu_ms: median of the thread's CPU time, milliseconds; what an idle core would take.
        wall_ms: median on the wall's clock, milliseconds, with whatever else ran.
        repeats: number of timed runs.
        cpu: the machine, in words.
        operators: kinds of operators, the slowest first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu_ms: float
    wall_ms: float
    repeats: int
    cpu: str
    operators: tuple[OperatorShare, ...]


def measure_speed(model: bytes, tiles: NDArray[np.uint8], least_s: float = 3.0) -> GraphSpeed:
    """Time a graph on one frame with one thread, then profile it.

    Args:
        model: bytes of `model.onnx`.
        tiles: `(T, H, W, 3)` uint8, what the graph takes of the frame; T is 1 where frames are not cut.
        least_s: seconds that timing lasts at least, within 15 to 200 runs.

    Raises:
        ExportFailed: if the runtime can't load the graph.
    """
    graph = GraphRun(model)
    graph(tiles)  # the first run allocates
    walls: list[float] = []
    own: list[float] = []
    begun = time.perf_counter()
    while len(walls) < _LARGEST_REPEATS and (len(walls) < _LEAST_REPEATS or time.perf_counter() - begun < least_s):
        # With one thread the runtime works on the caller's, so the caller's CPU time is the frame's.
        wall, cpu = time.perf_counter(), time.thread_time()
        graph(tiles)
        own.append(time.thread_time() - cpu)
        walls.append(time.perf_counter() - wall)
    return GraphSpeed(
        cpu_ms=1000 * median(own),
        wall_ms=1000 * median(walls),
        repeats=len(walls),
        cpu=name_cpu(),
        operators=_profile(model, tiles),
    )


def name_cpu() -> str:
    """Return what the machine says of its processor."""
    cores = f"{os.cpu_count()} cores"
    if not _CPU_INFORMATION.is_file():
        return f"{platform.processor() or platform.machine()}, {cores}"
    facts: dict[str, str] = {}
    for line in _CPU_INFORMATION.read_text("utf-8").splitlines():
        name, _, value = line.partition(":")
        facts[name.strip()] = value.strip()
    model = facts.get("model name", platform.machine())
    numbers = f" (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else ""
    return f"{model}{numbers}, {cores}"


def _profile(model: bytes, frames: NDArray[np.uint8]) -> tuple[OperatorShare, ...]:
    with tempfile.TemporaryDirectory() as folder:
        graph = GraphRun(model, profile=Path(folder) / "profile")
        for _ in range(_PROFILED_RUNS):
            graph(frames)
        events = json.loads(graph.end_profiling().read_text("utf-8"))
    runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
    took: Counter[str] = Counter()
    for event in events:
        # The first run allocates, so it is left out.
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= runs[1]:
            took[event["args"]["op_name"]] += event["dur"]
    total = max(1, took.total())
    return tuple(OperatorShare(kind=kind, share=duration / total) for kind, duration in took.most_common())
