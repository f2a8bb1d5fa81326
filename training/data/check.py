"""Every file of a data set is opened once before training starts, so that a bad one ends the run in its first minute.

Comes after the reader and before the split. Finds what can't be decoded, masks that do not fit, and the same content
in two splits; returns the digest that the manifest keeps.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.frames import FrameLimits, decode_image, decode_mask, decode_mask_values, is_deep, is_lossy
from service.errors import FlawlineError
from training.data.loader import looks_inverted
from training.data.samples import ANOMALOUS, NORMAL, Dataset, DatasetFault, Sample
from training.progress import Reporter

# A JPEG is decoded at an eighth of its size: all its bytes are still read, so a truncated one is found.
_SMALLEST = (1, 1)
# A quarter of the range, or less, is all that such frames use.
_MANY_EMPTY_BITS = 2
# Beyond these ratios to the usual frame, one is squeezed, or blown up from next to nothing, to another picture.
_LARGEST_RATIO_OF_ASPECTS = 2.0
_LARGEST_RATIO_OF_SIDES = 4.0
# Where fewer have the commonest size, frames are cut to their part, and no size is usual.
_SHARE_OF_USUAL_SIZE = 0.25
# So many sizes are told one by one; of more, aspect ratios alone, from a ratio on that a squeezed frame shows.
_TOLD_SIZES = 4
_SMALL_RATIO_OF_ASPECTS = 1.1
# One damaged recording can bring hundreds of the same; a report names them all.
_TOLD_WARNINGS = 5


@dataclass(frozen=True)
class CheckedDataset:
    """A data set whose files all hold what they promise.

    Attributes:
        dataset: what was checked.
        digest: SHA-256 in hex over sorted relative paths and the files' own digests, masks included.
        counts: frames by "split/kind".
        frame_sizes: `(height, width)` in pixels that frames have, the most common one first.
        warnings: what is allowed but worth knowing, one sentence each.
        copies: frames whose content an earlier one has, too.
        content: SHA-256 in hex of each frame's file.
    """

    dataset: Dataset
    digest: str
    counts: dict[str, int]
    frame_sizes: tuple[tuple[int, int], ...]
    warnings: tuple[str, ...]
    copies: frozenset[Path] = frozenset()
    content: Mapping[Path, str] = field(default_factory=dict)

    def tell(self, name: str, reporter: Reporter) -> None:
        """Say the first few warnings, each with the line's name, and how many more there are."""
        for warning in self.warnings[:_TOLD_WARNINGS]:
            reporter.note(f"{name}: {warning}")
        if (left := len(self.warnings) - _TOLD_WARNINGS) > 0:
            reporter.note(f"{name}: and {left} more like these.")

    @property
    def distinct(self) -> Dataset:
        """The data set without good frames that are copies; nothing is left out of its test frames."""
        left_out = {s for s in (*self.dataset.train_good, *self.dataset.validation_good) if s.path in self.copies}
        return replace(self.dataset, samples=tuple(s for s in self.dataset.samples if s not in left_out))

    @property
    def frame_size(self) -> tuple[int, int]:
        """`(height, width)` in pixels that most frames have."""
        return self.frame_sizes[0]


@dataclass(frozen=True)
class _Finding:
    """What one sample's files showed: digests, or a fault, and perhaps a warning; of 16 bits, the largest value.

    Of masks, too: which share of the frame they mark where that looks inverted, and which file is lossy.
    """

    sample: Sample
    image_digest: str = ""
    frame_size: tuple[int, int] = (0, 0)
    mask_digests: tuple[str, ...] = ()
    fault: str | None = None
    warning: str | None = None
    largest_value: int | None = None
    inverted_share: float | None = None
    lossy_mask: Path | None = None


def check_dataset(
    dataset: Dataset,
    limits: FrameLimits,
    reporter: Reporter,
    threads: int = 2,
    *,
    as_published: bool = False,
    bit_depth: int = 16,
) -> CheckedDataset:
    """Decode every image and mask once and compare their content.

    Args:
        dataset: what a reader returned.
        limits: what the service will accept; training on more would make no sense.
        reporter: shows how far the check is.
        threads: decoders at work.
        as_published: tell rather than refuse the same content in two splits or under two labels: others measured on
            these very frames, so a figure to set beside theirs must, too.
        bit_depth: how many bits the values of 16-bit frames have.

    Raises:
        DatasetFault: if a file can't be read, is over a limit, has a mask of another size, or, unless the set is taken
            as published, lies in two splits or under two labels with the same content.
    """
    with (
        ThreadPoolExecutor(threads) as pool,
        reporter.bar("checking files", len(dataset.samples)) as bar,
    ):
        findings = []
        for finding in pool.map(lambda sample: _look_at(sample, limits, bit_depth), dataset.samples):
            findings.append(finding)
            bar.advance()
    contradictions = tuple(_contradictions(findings))
    faults = [finding.fault for finding in findings if finding.fault is not None]
    if faults or (contradictions and not as_published):
        raise DatasetFault(*(faults or contradictions))
    counts = Counter(f"{s.split}/{s.kind}" for s in dataset.samples)
    return CheckedDataset(
        dataset=dataset,
        digest=_digest(dataset.root, findings),
        counts=dict(sorted(counts.items())),
        frame_sizes=tuple(size for size, _ in Counter(finding.frame_size for finding in findings).most_common()),
        warnings=(
            *dataset.notes,
            *_empty_bits(findings, bit_depth),
            *_odd_masks(findings),
            *_other_shapes(findings),
            *_missing_good(dataset),
            # What is said of one file each comes last: where it is long, only its beginning is told.
            *(finding.warning for finding in findings if finding.warning),
            *(contradictions or _repetitions(findings)),
        ),
        copies=frozenset(other.path for _, *others in _same_content(findings) for other in others),
        content={finding.sample.path: finding.image_digest for finding in findings},
    )


def _look_at(sample: Sample, limits: FrameLimits, bit_depth: int) -> _Finding:
    path = sample.path
    try:
        data = path.read_bytes()
        frame = decode_image(data, limits, _SMALLEST, bit_depth)
        marked = np.zeros((frame.height, frame.width), bool)
        digests, lossy_mask = [], None
        for path in sample.mask_paths:
            mask_data = path.read_bytes()
            values = decode_mask_values(mask_data)
            if values.shape != (frame.height, frame.width):
                sizes = f"{values.shape[1]}x{values.shape[0]} pixels and its image {frame.width}x{frame.height}"
                return _Finding(sample, fault=f"{path} has {sizes}; draw the mask at the size of {sample.path}.")
            if sample.channels and (fault := _fault_of_channel(path, values, sample)) is not None:
                return _Finding(sample, fault=fault)
            if is_lossy(mask_data):
                lossy_mask, values = path, decode_mask(mask_data)
            marked |= values > 0
            digests.append(_sha256(mask_data))
    except FlawlineError as error:
        return _Finding(sample, fault=f"{path}: {error.sentence} Replace the file or take it away.")
    except OSError as error:
        return _Finding(sample, fault=f"{path} can't be read ({error.strerror}); check the file and its permissions.")
    empty = sample.label == ANOMALOUS and bool(digests) and not marked.any()
    warning = f"{path} marks no pixel although its image is anomalous; it adds no region." if empty else None
    return _Finding(
        sample,
        _sha256(data),
        (frame.height, frame.width),
        tuple(digests),
        warning=warning,
        largest_value=int(frame.pixels.max()) if is_deep(data, limits) else None,
        inverted_share=float(marked.mean()) if digests and looks_inverted(marked) else None,
        lossy_mask=lossy_mask,
    )


def _empty_bits(findings: Sequence[_Finding], bit_depth: int) -> Iterator[str]:
    """Say that deep frames would be dark, because the camera writes fewer bits than the file has room for."""
    deep = [finding.largest_value for finding in findings if finding.largest_value is not None]
    used = bit_depth - 8 + max(deep, default=255).bit_length()
    if bit_depth - used >= _MANY_EMPTY_BITS:
        yield (
            f"The frames have {bit_depth} bits a pixel and no value that needs more than {used}, so they are nearly "
            f"black; if the camera has 10 or 12 bits, say so: --set input.bit_depth={max(8, used + used % 2)}."
        )


def _odd_masks(findings: Sequence[_Finding]) -> Iterator[str]:
    """Say which masks look inverted, and which come from a codec that changes values."""
    of_masks = [finding for finding in findings if finding.mask_digests]
    inverted = [(f.inverted_share, f.sample.mask_paths[0]) for f in of_masks if f.inverted_share is not None]
    if inverted:
        share, path = max(inverted)
        yield (
            f"Of {len(of_masks)} frames with masks {len(inverted)} are marked on more than half of themselves or on "
            f"all of their border, like by {path} on {share:.0%}. Marked are the pixels above 0; if such masks are "
            "inverted, figures of pixels say nothing until black and white are swapped."
        )
    lossy = [finding.lossy_mask for finding in of_masks if finding.lossy_mask is not None]
    if lossy:
        yield (
            f"Of {len(of_masks)} frames with masks {len(lossy)} have lossy ones, like {lossy[0]}, whose black is not 0 "
            "beside an edge: what is nearer to white than to black is taken as marked there. Save masks as PNG."
        )


def _other_shapes(findings: Sequence[_Finding]) -> Iterator[str]:
    """Say that some frames have quite another shape than most, as those of another camera or a thumbnail have."""
    sizes = Counter(finding.frame_size for finding in findings)
    ((height, width), count), *_ = sizes.most_common(1)
    if count < _SHARE_OF_USUAL_SIZE * len(findings):
        return
    others = [finding for finding in findings if _is_other_shape(finding.frame_size, (height, width))]
    if others:
        yield (
            f"Of {len(findings)} frames {len(others)} are of quite another shape than the usual {height}x{width} "
            f"(height x width), like {others[0].sample.path} with {others[0].frame_size[0]}x"
            f"{others[0].frame_size[1]}; all are resized to one input, so crop them to a like shape or take them away."
        )
    left = Counter({size: n for size, n in sizes.items() if not _is_other_shape(size, (height, width))})
    yield from _several_sizes(left)


def _several_sizes(sizes: Counter[tuple[int, int]]) -> Iterator[str]:
    """Say that frames come in a few sizes, or in several shapes, as those of several cameras do."""
    aspects = [width / height for height, width in sizes]
    if 1 < len(sizes) <= _TOLD_SIZES:
        told = ", ".join(f"{height}x{width} ({count})" for (height, width), count in sizes.most_common())
    elif max(aspects) > _SMALL_RATIO_OF_ASPECTS * min(aspects):
        told = f"{len(sizes)} of them, with aspect ratios from {min(aspects):.2f} to {max(aspects):.2f}"
    else:
        return
    yield (
        f"Frames differ in size, height x width: {told}. All are resized to one input; if they come from several "
        "cameras, or at several magnifications, make a line of each."
    )


def _is_other_shape(size: tuple[int, int], usual: tuple[int, int]) -> bool:
    """Tell whether aspect ratios differ by more than a factor of two, or a side is below a quarter of the usual."""
    height_ratio, width_ratio = size[0] / usual[0], size[1] / usual[1]
    squeezed = max(height_ratio, width_ratio) / min(height_ratio, width_ratio)
    return squeezed > _LARGEST_RATIO_OF_ASPECTS or min(height_ratio, width_ratio) * _LARGEST_RATIO_OF_SIDES < 1


def _missing_good(dataset: Dataset) -> Iterator[str]:
    labels = {sample.label for sample in dataset.test}
    if ANOMALOUS in labels and NORMAL not in labels:
        yield (
            "There are defective test frames and no good ones, so no figure like AUROC can be measured, nor how many "
            "good parts would be stopped; put good frames that are not trained on into test/good."
        )


def _fault_of_channel(path: Path, values: NDArray[Any], sample: Sample) -> str | None:
    """Say what is wrong with a mask file that marks one defect by one value."""
    found = {int(value) for value in np.unique(values)} - {0}
    known = {saturation.pixel_value for saturation in sample.saturations}
    if len(found) > 1:
        return f"{path} marks several defects, {sorted(found)}; a file of this layout marks one, with one value."
    if found - known:
        return f"{path} marks the defect {found.pop()}, which defects_config.json does not name; add it there."
    return None


def _contradictions(findings: Sequence[_Finding]) -> Iterator[str]:
    for first, *others in _same_content(findings):
        for other in others:
            if other.split != first.split:
                yield (
                    f"{first.path} ({first.split}) and {other.path} ({other.split}) have the same content; "
                    "take one away, or the figures would be measured on what was learnt."
                )
            elif other.label != first.label:
                yield f"{first.path} and {other.path} have the same content but different labels; take one away."


def _repetitions(findings: Sequence[_Finding]) -> Iterator[str]:
    for first, *others in _same_content(findings):
        yield from (f"{other.path} has the same content as {first.path}." for other in others)


def _same_content(findings: Sequence[_Finding]) -> Iterator[list[Sample]]:
    samples: dict[str, list[Sample]] = defaultdict(list)
    for finding in findings:
        samples[finding.image_digest].append(finding.sample)
    yield from (same for same in samples.values() if len(same) > 1)


def _digest(root: Path, findings: Sequence[_Finding]) -> str:
    lines = []
    for finding in findings:
        lines.append(f"{finding.sample.path.relative_to(root).as_posix()} {finding.image_digest}")
        for path, mask_digest in zip(finding.sample.mask_paths, finding.mask_digests, strict=True):
            lines.append(f"{path.relative_to(root).as_posix()} {mask_digest}")
    return _sha256("\n".join(sorted(lines)).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
