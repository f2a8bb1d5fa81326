"""Frames for fitting and evaluation: files to uint8 arrays, by the decoder and the resize that the service uses.

A source can be read again and again, in any order. Decoded frames stay in memory while they fit. Where the check of the
data set told what a file held, a file that holds something else is refused: what is learnt and measured is what the
manifest's digests name.
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.contract.frames import FrameLimits, decode_mask, decode_mask_values, fit_to_input, read_frame
from service.contract.geometry import InputSpec
from training.data.samples import DatasetFault, Sample, Saturation

Pixels = NDArray[np.uint8]

# Of its frame; few defects are larger, and hardly any ground is smaller.
_LARGEST_DEFECT = 0.5

LineIndex = NDArray[np.int64]


class FrameSource(Protocol):
    """Frames that can be taken by number, as often as wanted.

    Each shows a line, told as its place among the lines of the run.
    """

    @property
    def line_index(self) -> LineIndex:
        """Return the line of each frame, `(n,)`."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> Pixels:
        """Return the frames as `(B, H, W, 3)` uint8 RGB, in the order of the indices."""
        ...


class MemoryFrames:
    """Frames that lie in memory.

    Args:
        pixels: `(n, H, W, 3)` uint8 RGB.
        line_index: which line each frame shows; None if all show the first.
    """

    def __init__(self, pixels: Pixels, line_index: Sequence[int] | None = None) -> None:
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
            raise ValueError(f"expected (n, H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
        self._pixels = pixels
        self.line_index = _one_line_each(line_index, len(pixels))

    def __len__(self) -> int:
        return len(self._pixels)

    def take(self, indices: Sequence[int]) -> Pixels:
        """Return the frames as `(B, H, W, 3)` uint8 RGB, in the order of the indices."""
        return self._pixels[np.asarray(indices, dtype=np.int64)]


class FileFrames:
    """Frames that are decoded from files when they are taken, by several threads.

    Args:
        paths: image files.
        spec: what becomes of each.
        limits: what the decoder accepts.
        line_index: which line each frame shows; None if all show the first.
        content: SHA-256 in hex of each file, as the check of the data set saw it; None where nobody looked.
        threads: decoders at work.
        memory_bytes: decoded frames are kept for the next time up to this bound.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        spec: InputSpec,
        limits: FrameLimits,
        line_index: Sequence[int] | None = None,
        *,
        content: Mapping[Path, str] | None = None,
        threads: int = 2,
        memory_bytes: int = 2 * 2**30,
    ) -> None:
        self._paths = tuple(paths)
        self.line_index = _one_line_each(line_index, len(self._paths))
        self._spec = spec
        self._limits = limits
        self._content = content
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="frames")
        self._places = memory_bytes // (spec.canvas_height * spec.canvas_width * 3)
        self._kept: dict[int, Pixels] = {}

    def __len__(self) -> int:
        return len(self._paths)

    def take(self, indices: Sequence[int]) -> Pixels:
        """Return the frames as `(B, H, W, 3)` uint8 RGB, in the order of the indices.

        Raises:
            DatasetFault: if a file is no longer what the check of the data set saw.
            FlawlineError: if a file that nobody checked is no image that the limits allow.
            OSError: if a file can't be opened.
        """
        return np.stack(list(self._pool.map(self._frame, indices)))

    def close(self) -> None:
        """End the threads and forget the frames."""
        self._pool.shutdown()
        self._kept.clear()

    def _frame(self, index: int) -> Pixels:
        if (kept := self._kept.get(index)) is not None:
            return kept
        pixels = load_frame(self._paths[index], self._spec, self._limits, self._content)
        # Two threads may pass this bound together; one frame more does not matter.
        if len(self._kept) < self._places:
            self._kept[index] = pixels
        return pixels


def _one_line_each(line_index: Sequence[int] | None, count: int) -> LineIndex:
    found = np.zeros(count, np.int64) if line_index is None else np.array(line_index, np.int64)
    if found.shape != (count,) or (found < 0).any():
        raise ValueError(f"expected one line, from 0 up, for each of {count} frames")
    return found


def load_frame(path: Path, spec: InputSpec, limits: FrameLimits, content: Mapping[Path, str] | None = None) -> Pixels:
    """Read one image file as the canvas that the network takes or is cut for it, `(H, W, 3)` uint8 RGB.

    Args:
        path: of the file.
        spec: the network's input.
        limits: what the decoder accepts.
        content: SHA-256 in hex of each file, as the check of the data set saw it; None where nobody looked.

    Raises:
        DatasetFault: if the file is not what the check saw.
        FlawlineError: if the file is no image that the limits allow.
        OSError: if the file can't be opened.
    """
    return fit_to_input(read_frame(read_checked(path, content), limits, spec).pixels, spec)


def read_checked(path: Path, content: Mapping[Path, str] | None) -> bytes:
    """Read a frame's file, and hold it to what the check of the data set saw.

    A folder that a camera still writes to, or that somebody tidies, may change while a run takes an hour. Its manifest
    would name other frames than it learnt, and `flawline calibrate` would take these for frames that it never saw.

    Args:
        path: of the file.
        content: SHA-256 in hex of each checked file; None where nobody looked.

    Raises:
        DatasetFault: if the file is not what the check saw.
        OSError: if the file can't be opened.
    """
    data = path.read_bytes()
    if content is not None and hashlib.sha256(data).hexdigest() != content[path]:
        raise DatasetFault(
            f"{path} has changed since this command checked it; put back what it was, or begin anew, with a folder "
            "that nobody writes to meanwhile."
        )
    return data


def load_mask(sample: Sample, height: int, width: int) -> NDArray[np.bool_]:
    """Read the ground-truth mask of a sample of known size, `(height, width)` bool; all False where there is none.

    Raises:
        UnreadableFrame: if the mask can't be decoded.
        OSError: if the file can't be opened.
    """
    mask = np.zeros((height, width), bool)
    for path in sample.mask_paths:
        mask |= decode_mask(path.read_bytes())
    return mask


def looks_inverted(marked: NDArray[np.bool_]) -> bool:
    """Tell whether a mask, `(H, W)`, marks more than half of its frame, or all of its border: more often the ground.

    A defect may do so as well, where a whole part is missing or stained.
    """
    border = (marked[0], marked[-1], marked[:, 0], marked[:, -1])
    return bool(marked.mean() > _LARGEST_DEFECT or all(edge.all() for edge in border))


def load_channels(sample: Sample) -> list[tuple[NDArray[np.bool_], Saturation]]:
    """Read the masks of each defect of a sample, `(H, W)` bool, with the rule of its kind; empty masks are left out.

    Raises:
        UnreadableFrame: if a mask can't be decoded.
        OSError: if a file can't be opened.
    """
    rules = {saturation.pixel_value: saturation for saturation in sample.saturations}
    channels = []
    for path in sample.channels:
        values = decode_mask_values(path.read_bytes())
        if (value := int(values.max())) > 0:
            channels.append((values > 0, rules[value]))
    return channels
