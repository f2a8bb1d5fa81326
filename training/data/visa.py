"""The VisA layout as its authors publish it: one table of splits beside the categories.

    <parent>/<category>/Data/Images/{Normal,Anomaly}/*.JPG
    <parent>/<category>/Data/Masks/Anomaly/*.png       values name the defect; above zero is anomalous; none for normal
    <parent>/<category>/image_anno.csv                 not needed here
    <parent>/split_csv/1cls.csv                        object,split,label,image,mask; paths from <parent>

Zou et al., "SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and Segmentation", ECCV 2022. The
reorganised variant (`train/good`, `test/bad`, `ground_truth/bad`) is read as the MVTec layout.
"""

import csv
from collections.abc import Mapping
from pathlib import Path

from training.data.folders import GOOD
from training.data.samples import ANOMALOUS, NORMAL, Dataset, DatasetFault, Sample, Split, make_dataset

_TABLE = Path("split_csv") / "1cls.csv"
_COLUMNS = ("object", "split", "label", "image", "mask")
_SPLITS: Mapping[str, Split] = {"train": "train", "test": "test"}
_LABELS = {"normal": NORMAL, "anomaly": ANOMALOUS}


def is_visa(root: Path) -> bool:
    """Tell whether a folder is one category of this layout."""
    return (root / "Data" / "Images").is_dir()


def read_visa(root: Path) -> Dataset:
    """Read one category by the one-class split.

    Raises:
        DatasetFault: if the table is missing or wrong, or names a file that does not exist.
    """
    # An absolute path, because the category is known by its folder's name and the table lies beside that folder.
    root = root.resolve()
    table = root.parent / _TABLE
    try:
        text = table.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise DatasetFault(
            f"{table} is missing; VisA keeps the folder split_csv beside its categories, copy it there."
        ) from error
    rows = csv.DictReader(text.splitlines())
    if tuple(rows.fieldnames or ()) != _COLUMNS:
        raise DatasetFault(f"{table} begins with {rows.fieldnames}; expected {','.join(_COLUMNS)}. Copy it again.")
    samples = [_sample(root.parent, table, row) for row in rows if row["object"] == root.name]
    if not samples:
        raise DatasetFault(f"{table} has no row of the object {root.name!r}; give the folder its name in the table.")
    missing = [path for sample in samples for path in (sample.path, *sample.mask_paths) if not path.is_file()]
    if missing:
        raise DatasetFault(*(f"{path} is named in {table} but does not exist; copy it again." for path in missing))
    return make_dataset(root, "visa", samples, "Data/Images/Normal")


def _sample(parent: Path, table: Path, row: Mapping[str, str]) -> Sample:
    split, label = _SPLITS.get(row["split"]), _LABELS.get(row["label"])
    if split is None or label is None:
        raise DatasetFault(
            f"{table} says split {row['split']!r} and label {row['label']!r} of {row['image']}; expected train or "
            "test, and normal or anomaly."
        )
    for name in (row["image"], row["mask"] or ""):
        place = Path(name).parts
        if name and (place[0] != row["object"] or ".." in place):
            raise DatasetFault(
                f"{table} has a row of {row['object']} whose file {name} lies outside that folder; copy it again."
            )
    if row["mask"] and label == NORMAL:
        raise DatasetFault(f"{table} calls {row['image']} normal and names a mask of it; mend one of the two.")
    mask = parent / row["mask"] if row["mask"] else None
    return Sample(parent / row["image"], split, label, GOOD if label == NORMAL else "anomaly", mask)
