"""The MVTec AD layout, with or without masks (Bergmann et al., IJCV 2021); also what many other sets are stored in.

    <root>/train/good/*
    <root>/test/good/*, <root>/test/<defect>/*
    <root>/ground_truth/<defect>/<stem>_mask.png     optional

Frames may be grey and may differ in size.
"""

from pathlib import Path

from training.data.folders import GOOD, read_split_folders
from training.data.samples import Dataset, make_dataset


def is_mvtec(root: Path) -> bool:
    """Tell whether a folder has this layout: good frames to train on, and test folders."""
    return (root / "train" / GOOD).is_dir() and (root / "test").is_dir()


def read_mvtec(root: Path) -> Dataset:
    """Read a data set of this layout.

    Raises:
        DatasetFault: if there is no good frame, or a mask does not fit to the images.
    """
    return make_dataset(root, "mvtec", read_split_folders(root))
