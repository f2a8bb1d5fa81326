"""Every file of a data set is opened once before training starts, so that a bad one ends the run in its first minute.

Comes after the reader and before the split. Finds what can't be decoded, masks that do not fit, and the same content
in two splits; returns the digest that the manifest keeps.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from service.contract.frames import FrameLimits, decode_image, decode_mask
from service.errors import FlawlineError
from training.data.samples import ANOMALOUS, Dataset, DatasetFault, Sample
from training.progress import Reporter

# A JPEG is decoded at an eighth of its size: all its bytes are still read, so a truncated one is found.
_SMALLEST = (1, 1)


@dataclass(frozen=True)
class CheckedDataset:
    """A data set whose files all hold what they promise.

    Attributes:
        dataset: what was checked.
        digest: SHA-256 in hex over sorted relative paths and the files' own digests, masks included.
        counts: frames by "split/kind".
        warnings: what is allowed but worth knowing, one sentence each.
    """

    dataset: Dataset
    digest: str
    counts: dict[str, int]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Finding:
    """What one sample's files showed: digests, or a fault, and perhaps a warning."""

    sample: Sample
    image_digest: str = ""
    mask_digest: str = ""
    fault: str | None = None
    warning: str | None = None


def check_dataset(dataset: Dataset, limits: FrameLimits, reporter: Reporter, threads: int = 2) -> CheckedDataset:
    """Decode every image and mask once and compare their content.

    Args:
        dataset: what a reader returned.
        limits: what the service will accept; training on more would make no sense.
        reporter: shows how far the check is.
        threads: decoders at work.

    Raises:
        DatasetFault: if a file can't be read, is over a limit, has a mask of another size, or lies in two splits or
            under two labels with the same content.
    """
    with (
        ThreadPoolExecutor(threads) as pool,
        reporter.bar("checking files", len(dataset.samples)) as bar,
    ):
        findings = []
        for finding in pool.map(lambda sample: _look_at(sample, limits), dataset.samples):
            findings.append(finding)
            bar.advance()
    faults = [finding.fault for finding in findings if finding.fault is not None] or list(_contradictions(findings))
    if faults:
        raise DatasetFault(*faults)
    counts = Counter(f"{s.split}/{s.kind}" for s in dataset.samples)
    return CheckedDataset(
        dataset=dataset,
        digest=_digest(dataset.root, findings),
        counts=dict(sorted(counts.items())),
        warnings=tuple(finding.warning for finding in findings if finding.warning) + tuple(_repetitions(findings)),
    )


def _look_at(sample: Sample, limits: FrameLimits) -> _Finding:
    path = sample.path
    try:
        data = path.read_bytes()
        frame = decode_image(data, limits, _SMALLEST)
        if sample.mask_path is None:
            return _Finding(sample, _sha256(data))
        path = sample.mask_path
        mask_data = path.read_bytes()
        mask = decode_mask(mask_data)
    except FlawlineError as error:
        return _Finding(sample, fault=f"{path}: {error.sentence} Replace the file or take it away.")
    except OSError as error:
        return _Finding(sample, fault=f"{path} can't be read ({error.strerror}); check the file and its permissions.")
    if mask.shape != (frame.height, frame.width):
        sizes = f"{mask.shape[1]}x{mask.shape[0]} pixels and its image {frame.width}x{frame.height}"
        return _Finding(sample, fault=f"{path} has {sizes}; draw the mask at the size of {sample.path}.")
    empty = sample.label == ANOMALOUS and not mask.any()
    warning = f"{path} marks no pixel although its image is anomalous; it adds no region." if empty else None
    return _Finding(sample, _sha256(data), _sha256(mask_data), warning=warning)


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
        if finding.sample.mask_path is not None:
            lines.append(f"{finding.sample.mask_path.relative_to(root).as_posix()} {finding.mask_digest}")
    return _sha256("\n".join(sorted(lines)).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
