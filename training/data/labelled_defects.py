"""A few real defects that people marked, for detectors that learn from them beside good frames.

They lie in the MVTec layout: `test/<kind>/` holds frames and `ground_truth/<kind>/` a mask of each. They are never
frames that the run is measured on, nor good ones: either is found by content and ends the run before fitting.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.contract.frames import FrameLimits, decode_mask, fit_to_input, read_frame
from service.contract.geometry import InputSpec
from service.contract.tiling import cut_tiles
from service.errors import FlawlineError
from training.data.folders import anomalous_samples, defect_folders, like_named
from training.data.loader import looks_inverted
from training.data.samples import DatasetFault, Sample


@dataclass(frozen=True, eq=False)
class LabelledDefects:
    """Marked frames at the size of the network's input.

    Attributes:
        digest: SHA-256 in hex over sorted relative paths and contents, masks included.
        marked: how many frames there were.
        frames: `(n, H, W, 3)` uint8 RGB; where frames are cut, those of their tiles that show a defect.
        masks: `(n, H, W)` bool, none of them empty.
    """

    digest: str
    marked: int
    frames: NDArray[np.uint8]
    masks: NDArray[np.bool_]


def read_labelled_defects(root: Path, spec: InputSpec, limits: FrameLimits, known: Iterable[Sample]) -> LabelledDefects:
    """Read marked frames and refuse those that the run knows already.

    Args:
        root: folder with `test/<kind>/` and `ground_truth/<kind>/`.
        spec: the network's input.
        limits: what the decoder accepts.
        known: frames of the run's lines, good ones and test frames.

    Raises:
        DatasetFault: if there is no frame, a frame has no mask or one that does not fit, marks nothing or looks
            inverted, a file can't be read, or a frame has the content of a known one.
    """
    kinds = defect_folders(root / "test")
    samples = [one for kind in kinds for one in anomalous_samples(kind, root / "ground_truth" / kind.name)]
    if not samples:
        raise DatasetFault(
            f"{root} holds no labelled defect; expected frames in {root / 'test' / '<kind>'} and their masks in "
            f"{root / 'ground_truth' / '<kind>'}."
        )
    bare = [sample for sample in samples if sample.mask_path is None]
    if bare:
        raise DatasetFault(*(_told_of_bare(root, sample) for sample in bare))
    _refuse_known(samples, known)
    pairs = [(sample.path, sample.mask_path) for sample in samples if sample.mask_path is not None]
    frames, masks = zip(*(_load(image, mask, spec, limits) for image, mask in pairs), strict=True)
    files = [path for pair in pairs for path in pair]
    lines = sorted(f"{path.relative_to(root).as_posix()} {_digest(path)}" for path in files)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return LabelledDefects(digest, len(pairs), np.concatenate(frames), np.concatenate(masks))


def _told_of_bare(root: Path, sample: Sample) -> str:
    alike = like_named(root / "ground_truth" / sample.kind)
    advice = (
        "add one or take it away" if alike is None else f"{alike} has other capitals than its folder, so rename one"
    )
    return f"{sample.path} is a labelled defect without a mask; {advice}."


def _refuse_known(samples: Iterable[Sample], known: Iterable[Sample]) -> None:
    seen = {_digest(sample.path): sample for sample in known}
    copies = [(sample, seen[digest]) for sample in samples if (digest := _digest(sample.path)) in seen]
    own = [sample.path for sample, other in copies if other.split == "test" and sample.path.samefile(other.path)]
    if own:
        raise DatasetFault(
            f"{len(own)} labelled defects are test frames of the run, for one {own[0]}; move those that shall be "
            "learnt from, and their masks, to another folder, or the figures would be measured on what was learnt."
        )
    if copies:
        raise DatasetFault(
            *(
                f"{sample.path} has the same content as {other.path} ({other.split}/{other.kind}); take one away, or "
                "the figures would be measured on what was learnt."
                if other.split == "test"
                else f"{sample.path} is marked as defective and has the same content as the good frame {other.path}; "
                "take one away."
                for sample, other in copies
            )
        )


def _load(image: Path, mask: Path, spec: InputSpec, limits: FrameLimits) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return what the network takes of a frame where a defect shows, `(n, H, W, 3)`, and its masks `(n, H, W)`."""
    path = image
    try:
        frame = read_frame(image.read_bytes(), limits, spec)
        path = mask
        marked = decode_mask(mask.read_bytes())
    except FlawlineError as error:
        raise DatasetFault(f"{path}: {error.sentence} Replace the file or take it away.") from error
    if marked.shape != (frame.height, frame.width):
        sizes = f"{marked.shape[1]}x{marked.shape[0]} pixels and its image {frame.width}x{frame.height}"
        raise DatasetFault(f"{mask} has {sizes}; draw the mask at the size of {image}.")
    if looks_inverted(marked):
        raise DatasetFault(
            f"{mask} marks {marked.mean():.0%} of its frame and looks inverted: marked are the pixels above 0. Draw "
            "defects white on black; a frame that is defective all over can't be learnt from, so take it away."
        )
    grey = np.repeat(marked[..., None].astype(np.uint8) * 255, 3, axis=2)
    # Every pixel that a defect touches: a thin scratch must not vanish when the mask shrinks.
    seen = cut_tiles(fit_to_input(grey, spec), spec)[..., 0] > 0
    shows = seen.any(axis=(1, 2))
    if not shows.any():
        raise DatasetFault(f"{mask} marks nothing that the network would see; draw the defect, or take both away.")
    return cut_tiles(fit_to_input(frame.pixels, spec), spec)[shows], seen[shows]


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DatasetFault(f"{path} can't be read ({error.strerror}); check the file and its permissions.") from error
