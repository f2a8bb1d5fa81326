"""What the batcher asks of a runtime: arrays in, arrays out. No HTTP, no lines, no clock."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class EngineOutput(NamedTuple):
    """One batch's raw answer.

    Attributes:
        scores: `(B,)` float32.
        anomaly_maps: `(B, h, w)` float32.
    """

    scores: NDArray[np.float32]
    anomaly_maps: NDArray[np.float32]


class Engine(Protocol):
    """A bundle's network on a device.

    Attributes:
        device: where it really runs, for example `cpu` or `cuda:0`.
        size_bytes: memory that it takes on its device, as well as is known.
    """

    device: str
    size_bytes: int

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
