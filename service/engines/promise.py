"""What a bundle promises of its network, checked by every engine: names, types and sizes at load and after each run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Manifest
from service.engines.engine import EngineOutput
from service.errors import BundleRefused, EngineFailed

# numpy's name of the type, and the sizes; a size that the graph leaves open is a name or None.
Signature = Mapping[str, tuple[str, list[int | str | None]]]
# To compare with this one is quick, and with what it is made from is not.
_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Promise:
    """The shapes that go in and come out.

    Attributes:
        frame_shape: `(H, W, 3)`.
        map_shape: `(h, w)`.
        lines: how many the network was fitted on.
    """

    frame_shape: tuple[int, int, int]
    map_shape: tuple[int, int]
    lines: int

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Read what a manifest promises."""
        spec, output = manifest.input, manifest.output
        return cls((spec.height, spec.width, 3), (output.map_height, output.map_width), len(manifest.lines))

    def check_signature(self, inputs: Signature, outputs: Signature) -> bool:
        """Compare the graph with the promise, and tell whether the network is class-conditional.

        Raises:
            BundleRefused: if it is not the graph that the manifest describes.
        """
        if not {"frames"} <= inputs.keys() <= {"frames", "line_index"} or outputs.keys() != {"score", "anomaly_map"}:
            raise BundleRefused(
                "model.onnx must take `frames` and give `score` and `anomaly_map`; export the bundle again."
            )
        expected: dict[str, tuple[str, tuple[int, ...]]] = {
            "frames": ("uint8", self.frame_shape),
            "line_index": ("int64", ()),
            "score": ("float32", ()),
            "anomaly_map": ("float32", self.map_shape),
        }
        for name, (kind, shape) in {**inputs, **outputs}.items():
            expected_kind, expected_shape = expected[name]
            if kind != expected_kind or len(shape) != 1 + len(expected_shape):
                raise BundleRefused(f"model.onnx has another type or rank of `{name}` than a bundle; export it again.")
            if isinstance(shape[0], int):
                raise BundleRefused(f"model.onnx fixes the batch size of `{name}`; export it with a dynamic one.")
            # A size that the graph leaves open is checked after each run.
            if any(isinstance(got, int) and got != want for got, want in zip(shape[1:], expected_shape, strict=True)):
                raise BundleRefused(f"model.onnx has another size of `{name}` than manifest.json; export it again.")
        return "line_index" in inputs

    def refuse_other_frames(self, frames: NDArray[np.uint8]) -> None:
        """Look before bytes are copied to where nothing looks any more.

        Raises:
            EngineFailed: if the frames are of another type or size than the network's input.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != self.frame_shape or not len(frames):
            raise EngineFailed("The frames are not what the network takes; the parts have no verdict.")

    def refuse_other_lines(self, line_index: NDArray[np.int64], count: int) -> None:
        """Refuse an index that a graph would count from the end, or that some runtimes would read past the end for.

        Raises:
            EngineFailed: if there is not one int64 index of the bundle's lines for each frame.
        """
        if line_index.dtype != np.int64 or line_index.shape != (count,):
            raise EngineFailed("A class-conditional network needs one int64 line index for each frame.")
        if ((line_index < 0) | (line_index >= self.lines)).any():
            raise EngineFailed(f"A frame is said to show a line that is not among the bundle's {self.lines}.")

    def check_output(self, scores: object, anomaly_maps: object, count: int) -> EngineOutput:
        """Return a runtime's answer, if it is one for so many frames.

        Raises:
            EngineFailed: if it has another shape or type.
        """
        if not (
            isinstance(scores, np.ndarray)
            and isinstance(anomaly_maps, np.ndarray)
            and scores.dtype == anomaly_maps.dtype == _FLOAT32
            and scores.shape == (count,)
            and anomaly_maps.shape == (count, *self.map_shape)
        ):
            raise EngineFailed("The runtime answered with another shape or type than the bundle promises.")
        return EngineOutput(scores, anomaly_maps)


def run_in_pieces(
    run: Callable[[NDArray[np.uint8], NDArray[np.int64]], EngineOutput],
    frames: NDArray[np.uint8],
    line_index: NDArray[np.int64],
    most: int,
) -> EngineOutput:
    """Run a batch that may be larger than buffers or a plan allow: a frame that alone has many tiles is one.

    Args:
        run: takes at most `most` frames.
        frames: `(B, H, W, 3)` uint8.
        line_index: `(B,)` int64.
        most: frames at a time.
    """
    if len(frames) <= most:
        return run(frames, line_index)
    pieces = [run(frames[i : i + most], line_index[i : i + most]) for i in range(0, len(frames), most)]
    return EngineOutput(
        np.concatenate([piece.scores for piece in pieces]), np.concatenate([piece.anomaly_maps for piece in pieces])
    )
