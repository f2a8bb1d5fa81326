"""The BTAD layout: MVTec's folders under other names.

    <root>/train/ok/*, <root>/test/ok/*, <root>/test/ko/*, <root>/ground_truth/ko/*

Suffixes (`.bmp`, `.png`) differ from product to product and between a frame and its mask, so that pairs are found by
the name without its suffix. Mishra et al., "VT-ADL", ISIE 2021, arXiv:2104.10036.
"""

from pathlib import Path

from training.data.folders import anomalous_samples, find_images, good_samples, told_dataset
from training.data.samples import Dataset, DatasetFault

_OK, _KO = "ok", "ko"
_PLACES = "train/ok, test/ok and test/ko, masks from ground_truth/ko,"


def is_btad(root: Path) -> bool:
    """Tell whether a folder is one product of this layout."""
    return (root / "train" / _OK).is_dir()


def read_btad(root: Path) -> Dataset:
    """Read one product.

    Raises:
        DatasetFault: if there is no good frame, no mask at all, or a mask does not fit to the images.
    """
    masks = root / "ground_truth" / _KO
    if find_images(root / "test" / _KO) and not find_images(masks):
        raise DatasetFault(f"{masks} holds no mask; expected one for each image in {root / 'test' / _KO}, by its name.")
    samples = good_samples(root / "train" / _OK, "train") + good_samples(root / "test" / _OK, "test")
    samples += anomalous_samples(root / "test" / _KO, masks)
    return told_dataset(root, "btad", samples, _PLACES, "train/ok")
