"""A real engine that a test can hold, and whose answers a test can spoil."""

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Bundle
from service.engines.engine import EngineOutput, LoneRun
from service.engines.ort import OrtEngine

Spoil = Callable[[EngineOutput], EngineOutput]


class GatedEngine:
    """Opens real engines and stands before each of their runs.

    Attributes:
        started: released once for each run that began while held.
        spoil: changes every answer, or raises; None leaves it as it is.
    """

    device = "cpu"

    def __init__(self) -> None:
        self.started = threading.Semaphore(0)
        self.spoil: Spoil | None = None
        self._gate = threading.Event()
        self._gate.set()

    def open(self, bundle: Bundle) -> "_Gated":
        """Bring a bundle to the CPU, behind this gate."""
        return _Gated(self, OrtEngine(bundle))

    def hold(self) -> None:
        """Let every run wait until `release`."""
        self._gate.clear()

    def release(self) -> None:
        """Let the runs that wait go on, and later ones pass."""
        self._gate.set()

    def pass_through(self, run: Callable[[], EngineOutput]) -> EngineOutput:
        """Run when the gate is open, and spoil the answer."""
        if not self._gate.is_set():
            self.started.release()
            self._gate.wait()
        output = run()
        return output if self.spoil is None else self.spoil(output)


class _Gated:
    def __init__(self, gate: GatedEngine, engine: OrtEngine) -> None:
        self.device, self.provider, self.precision = engine.device, engine.provider, engine.precision
        self.size_bytes = engine.size_bytes
        self.alone: LoneRun | None = None
        self._gate = gate
        self._engine = engine

    def run(self, frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
        """Answer as `Engine.run` promises, unless spoilt."""
        return self._gate.pass_through(lambda: self._engine.run(frames, line_index))

    def close(self) -> None:
        """Close the real one."""
        self._engine.close()
