"""What a model has done since the process started, as the statistics of the Open Inference Protocol count it.

A frame counts as a request. Runs are counted by the frames that took part in them: of n frames that ran in batches of
b, n / b runs are known, rounded up; where lines share an engine, each knows its own share. Frames divided by runs is
the mean batch size, and every number only grows.

Specification: Triton's `extension_statistics.md`. Nothing here reads the clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_STATISTICS = ("success", "queue", "compute_input", "compute_infer", "compute_output", "fail")
_OF_A_RUN = ("compute_input", "compute_infer", "compute_output")


@dataclass
class _Sum:
    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


@dataclass
class _BatchSums:
    frames: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_OF_A_RUN, 0.0))


class Tally:
    """The counts of one version of one model."""

    def __init__(self) -> None:
        self._last_ms = 0
        self._sums = {name: _Sum() for name in _STATISTICS}
        self._by_batch_size: dict[int, _BatchSums] = {}

    def answered(self, batch_size: int, seconds: Mapping[str, float], at_ms: int) -> None:
        """Count one answered frame.

        Args:
            batch_size: frames in the run that it was in.
            seconds: by stage, `total` among them.
            at_ms: milliseconds since 1970.
        """
        self._last_ms = at_ms
        batch = self._by_batch_size.get(batch_size)
        if batch is None:
            batch = self._by_batch_size[batch_size] = _BatchSums()
        batch.frames += 1
        decode_s, infer_s = seconds["decode"], seconds["infer"]
        output_s = seconds["postprocess"] + seconds["encode"]
        sums = self._sums
        sums["success"].add(seconds["total"])
        sums["queue"].add(seconds["queue"])
        sums["compute_input"].add(decode_s)
        sums["compute_infer"].add(infer_s)
        sums["compute_output"].add(output_s)
        spent = batch.seconds
        spent["compute_input"] += decode_s
        # Each frame of a run knows the time of the whole run; the other times are its own.
        spent["compute_infer"] += infer_s / batch_size
        spent["compute_output"] += output_s

    def failed(self, total_s: float, at_ms: int) -> None:
        """Count one frame without a verdict."""
        self._last_ms = at_ms
        self._sums["fail"].add(total_s)

    def describe(self) -> dict[str, Any]:
        """Return the counts in the protocol's form; times are nanoseconds."""
        return {
            "last_inference": self._last_ms,
            "inference_count": self._sums["success"].count,
            "execution_count": sum(_runs(size, batch) for size, batch in self._by_batch_size.items()),
            "inference_stats": {name: _duration(sum_.count, sum_.seconds) for name, sum_ in self._sums.items()},
            "batch_stats": [
                {
                    "batch_size": size,
                    **{name: _duration(_runs(size, batch), seconds) for name, seconds in batch.seconds.items()},
                }
                for size, batch in sorted(self._by_batch_size.items())
            ],
        }


def _runs(size: int, batch: _BatchSums) -> int:
    return -(-batch.frames // size)


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}
