"""Plain folders of good images, as a plant collects them, in three variants.

    <root>/train/good/**  and perhaps  <root>/val/good/**     nothing to measure on
    <root>/normal/**      and perhaps  <root>/abnormal/**     no split: the reader makes one
    <root>/*                                                  good images only

Where `abnormal/` exists, a fifth of the normal frames goes to the test split, in blocks of consecutive frames
(`split.py` says why): without normal test frames nothing could be measured.
"""

from pathlib import Path

from training.data.folders import (
    GOOD,
    PLACES,
    find_images,
    good_folders,
    good_samples,
    read_split_folders,
    told_dataset,
)
from training.data.samples import ANOMALOUS, Dataset, Sample
from training.data.split import HoldOut, hold_out

_TEST_RULE = HoldOut(fraction=0.2)


def is_plain(root: Path) -> bool:
    """Tell whether a folder has one of these variants."""
    if good_folders(root / "train"):
        return not (root / "test").is_dir()
    return (root / "normal").is_dir() or bool(find_images(root, nested=False))


def read_plain(root: Path) -> Dataset:
    """Read a data set of this layout.

    Raises:
        DatasetFault: if there is no good frame.
    """
    if good_folders(root / "train"):
        return told_dataset(root, "plain", read_split_folders(root), PLACES)
    if (root / "normal").is_dir():
        return told_dataset(root, "plain", _read_flat(root), "normal and abnormal", "normal")
    samples = [Sample(path, "train", 0, GOOD) for path in find_images(root, nested=False)]
    return told_dataset(root, "plain", samples, f"{root} itself, not from folders in it,")


def _read_flat(root: Path) -> list[Sample]:
    normal = good_samples(root / "normal", "train")
    abnormal = [Sample(path, "test", ANOMALOUS, "abnormal") for path in find_images(root / "abnormal")]
    if not abnormal or not normal:
        return normal + abnormal
    kept, held = hold_out(normal, _TEST_RULE)
    return [*kept, *(Sample(s.path, "test", s.label, s.kind) for s in held), *abnormal]
