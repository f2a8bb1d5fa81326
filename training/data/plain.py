"""Plain folders of good images, as a plant collects them, in three variants.

    <root>/train/good/**  and perhaps  <root>/val/good/**     nothing to measure on
    <root>/normal/**      and perhaps  <root>/abnormal/**     no split: the reader makes one
    <root>/*                                                  good images only

Where `abnormal/` exists, a fifth of the normal frames goes to the test split, in blocks of consecutive frames
(`split.py` says why): without normal test frames nothing could be measured.
"""

from pathlib import Path

from training.data.folders import GOOD, find_images, good_samples, read_split_folders
from training.data.samples import ANOMALOUS, Dataset, Sample, make_dataset
from training.data.split import HoldOut, hold_out

_TEST_RULE = HoldOut(fraction=0.2)


def is_plain(root: Path) -> bool:
    """Tell whether a folder has one of these variants."""
    if (root / "train" / GOOD).is_dir():
        return not (root / "test").is_dir()
    return (root / "normal").is_dir() or bool(find_images(root, nested=False))


def read_plain(root: Path) -> Dataset:
    """Read a data set of this layout.

    Raises:
        DatasetFault: if there is no good frame.
    """
    if (root / "train" / GOOD).is_dir():
        samples = read_split_folders(root)
    elif (root / "normal").is_dir():
        samples = _read_flat(root)
    else:
        samples = [Sample(path, "train", 0, GOOD) for path in find_images(root, nested=False)]
    return make_dataset(root, "plain", samples)


def _read_flat(root: Path) -> list[Sample]:
    normal = good_samples(root / "normal", "train")
    abnormal = [Sample(path, "test", ANOMALOUS, "abnormal") for path in find_images(root / "abnormal")]
    if not abnormal or not normal:
        return normal + abnormal
    kept, held = hold_out(normal, _TEST_RULE)
    return [*kept, *(Sample(s.path, "test", s.label, s.kind) for s in held), *abnormal]
