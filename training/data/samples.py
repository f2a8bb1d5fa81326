"""What every data-set reader returns: samples with their split, label and mask, in one order.

Plain values only: nothing here opens a file. Readers (one file a layout, listed in `detect.py`) come before, `check.py`
and the split after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.contract.legible import is_legible, legible

Split = Literal["train", "validation", "test"]
Label = Literal[0, 1, -1]

NORMAL: Label = 0
ANOMALOUS: Label = 1
UNKNOWN: Label = -1

# Up to which rate of false positives AUPRO is integrated where a data set's makers say nothing else.
AUPRO_LIMIT = 0.3

# How many faulty files one message names; the rest is counted.
_NAMED_FAULTS = 5


class DatasetFault(Exception):
    """The data set can't be trained on; the sentence names the file and says what to do.

    Args:
        faults: one sentence for each faulty file or folder, at least one.

    Attributes:
        faults: all of them, where the message names the first few.
    """

    def __init__(self, *faults: str) -> None:
        left = len(faults) - _NAMED_FAULTS
        more = [f"And {left} more like these."] if left > 0 else []
        self.faults = tuple(legible(fault) for fault in faults)
        super().__init__(" ".join([*self.faults[:_NAMED_FAULTS], *more]))


@dataclass(frozen=True)
class Saturation:
    """How much of one kind of defect must be covered, by MVTec LOCO's `defects_config.json`.

    Attributes:
        pixel_value: the value that marks this defect in a mask file.
        threshold: share of the defect's area where `relative`, else pixels of the original frame.
        relative: how to read the threshold.
    """

    pixel_value: int
    threshold: float
    relative: bool


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        path: the image file.
        split: what the image is for.
        label: 0 normal, 1 anomalous, -1 unknown.
        kind: "good", or the name of the defect.
        mask_path: ground-truth mask, where one file holds it.
        channels: mask files where each defect of the image has its own (MVTec LOCO); then `mask_path` is None.
        saturations: of every kind of defect that the channels may mark.
        group: pieces that belong together (views of one part) share it; they must not be split.
        s_auroc: whether the data set's makers measure S-AUROC, that of pieces whose views share a group.
        aupro_limit: the rate of false positives up to which the data set's makers integrate AUPRO, in (0, 1].
        seg_f1: whether the data set's makers measure SegF1, the F1 of pixels at a threshold from good frames alone.
    """

    path: Path
    split: Split
    label: Label
    kind: str
    mask_path: Path | None = None
    channels: tuple[Path, ...] = ()
    saturations: tuple[Saturation, ...] = ()
    group: str | None = None
    s_auroc: bool = False
    aupro_limit: float = AUPRO_LIMIT
    seg_f1: bool = False

    @property
    def mask_paths(self) -> tuple[Path, ...]:
        """All files that together mark the image's defects; none for a good image or one without ground truth."""
        return self.channels if self.mask_path is None else (self.mask_path,)


def parts_of(samples: Sequence[Sample]) -> list[int]:
    """Return which part each frame shows, counted from 0: views of one piece show one, any other frame its own."""
    parts: dict[str | Path, int] = {}
    return [parts.setdefault(s.path if s.group is None else s.group, len(parts)) for s in samples]


@dataclass(frozen=True)
class Dataset:
    """All samples of one line, sorted by path.

    Attributes:
        name: last part of the root.
        root: folder that holds all files.
        layout: name of the reader.
        samples: sorted by path.
        notes: what the reader saw that is allowed but worth knowing, one sentence each.
    """

    name: str
    root: Path
    layout: str
    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = ()

    @property
    def train_good(self) -> tuple[Sample, ...]:
        """Good frames to fit on (and to hold some out of)."""
        return tuple(s for s in self.samples if s.split == "train" and s.label == NORMAL)

    @property
    def validation_good(self) -> tuple[Sample, ...]:
        """Good frames that the data set itself keeps out of fitting; often none."""
        return tuple(s for s in self.samples if s.split == "validation" and s.label == NORMAL)

    @property
    def test(self) -> tuple[Sample, ...]:
        """Frames to measure on."""
        return tuple(s for s in self.samples if s.split == "test")

    @property
    def has_masks(self) -> bool:
        """Whether pixel figures can be computed: each anomalous test frame has a mask, and there is one."""
        anomalous = [s for s in self.test if s.label == ANOMALOUS]
        return bool(anomalous) and all(s.mask_paths for s in anomalous)


def make_dataset(
    root: Path, layout: str, samples: Sequence[Sample], good_folder: str = "train/good", notes: tuple[str, ...] = ()
) -> Dataset:
    """Sort the samples and refuse a set that nothing can be learnt from.

    Args:
        root: folder of the line.
        layout: name of the reader.
        samples: in any order.
        good_folder: where this layout keeps its good frames for training, for the message.
        notes: as `Dataset.notes`; a refusal says them, too.

    Raises:
        DatasetFault: if there is no good frame to train on, some anomalous frames have masks and others have none, or a
            name can't be shown.
    """
    dataset = Dataset(root.resolve().name, root, layout, tuple(sorted(samples, key=lambda s: s.path.as_posix())), notes)
    refuse_illegible(dataset)
    if not dataset.train_good:
        raise DatasetFault(
            f"{root} has no good frame to train on; put at least one image into {root / good_folder}.", *notes
        )
    anomalous = [s for s in dataset.test if s.label == ANOMALOUS]
    if any(s.mask_paths for s in anomalous):
        bare = [s for s in anomalous if not s.mask_paths]
        if bare:
            first, *others = (
                f"{s.path} is anomalous and has no mask, while others have one; add the mask, or take the "
                "ground_truth folder away to measure images only."
                for s in bare
            )
            raise DatasetFault(first, *notes, *others)
    return dataset


def refuse_illegible(dataset: Dataset) -> None:
    """Refuse names that must not be shown: runs, reports and bundles tell of frames and kinds of defects by them.

    Raises:
        DatasetFault: if a file, a folder or a kind has one.
    """
    names = {dataset.name}
    for sample in dataset.samples:
        names.update((str(sample.path), *(str(path) for path in sample.mask_paths), sample.kind, sample.group or ""))
    odd = sorted(name for name in names if not is_legible(name))
    if odd:
        raise DatasetFault(
            *(f"{name} holds characters that a terminal would obey, or that are no text; rename it." for name in odd)
        )
