"""The MVTec AD layout, with or without masks (Bergmann et al., IJCV 2021); also what many other sets are stored in.

    <root>/train/good/*
    <root>/test/good/*, <root>/test/<defect>/*
    <root>/ground_truth/<defect>/<stem>_mask.png     optional

Frames may be grey and may differ in size.
"""

from pathlib import Path

from training.data.folders import PLACES, good_folders, read_split_folders, told_dataset
from training.data.samples import Dataset


def is_mvtec(root: Path) -> bool:
    """Tell whether a folder has this layout: good frames to train on, and test folders."""
    return bool(good_folders(root / "train")) and (root / "test").is_dir()


def read_mvtec(root: Path) -> Dataset:
    """Read a data set of this layout.

    Raises:
        DatasetFault: if there is no good frame, or a mask does not fit to the images.
    """
    return told_dataset(root, "mvtec", read_split_folders(root), PLACES)
