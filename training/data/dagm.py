"""The DAGM 2007 layout: generated textures; a coarse ellipse marks each defect.

    <root>/{Train,Test}/NNNN.PNG
    <root>/{Train,Test}/Label/NNNN_label.PNG      only where NNNN is defective
    <root>/{Train,Test}/Label/Labels.txt          not needed here

Defective frames of `Train` are left out: detectors are fitted on good ones. Since an ellipse covers more than the
defect, pixel figures and AUPRO are only indicative. Wieler and Hahn, "Weakly Supervised Learning for Industrial Optical
Inspection", DAGM 2007.
"""

from pathlib import Path

from training.data.folders import GOOD, by_name, find_images
from training.data.samples import ANOMALOUS, NORMAL, Dataset, DatasetFault, Sample, Split, make_dataset

_LABEL = "Label"


def is_dagm(root: Path) -> bool:
    """Tell whether a folder is one class of this layout; `Label` tells it from sets whose folder is called `train`."""
    return any((root / split / _LABEL).is_dir() for split in ("Train", "Test"))


def read_dagm(root: Path) -> Dataset:
    """Read one class.

    Raises:
        DatasetFault: if there is no good frame or no test frame, a label has no image, or two files have one name.
    """
    samples = [sample for sample in _read(root / "Train", "train") if sample.label == NORMAL]
    tested = _read(root / "Test", "test")
    if not tested:
        raise DatasetFault(f"{root / 'Test'} holds no frame; expected NNNN.PNG and Label/NNNN_label.PNG.")
    return make_dataset(root, "dagm", samples + tested, "Train")


def _read(folder: Path, split: Split) -> list[Sample]:
    labels = by_name(folder / _LABEL, find_images(folder / _LABEL, nested=False), "_label")
    samples = []
    for name, path in by_name(folder, find_images(folder, nested=False), "").items():
        mask = labels.pop(name, None)
        label, kind = (NORMAL, GOOD) if mask is None else (ANOMALOUS, "defect")
        samples.append(Sample(path, split, label, kind, mask))
    if labels:
        raise DatasetFault(
            *(f"{path} is a label without an image; expected {folder / name}.PNG." for name, path in labels.items())
        )
    return samples
