"""The layout of the magnetic tile defect data set (MTD): one folder a class, no split.

    <root>/MT_{Blowhole,Break,Crack,Fray,Free,Uneven}/Imgs/<stem>.jpg and <stem>.png, its mask

Good tiles (`MT_Free`) bring an empty mask, which is not used. Four fifths of them are for training, the rest and all
defects for the test; the draw is seeded and stratified by the exposure that begins a name (`exp1` to `exp6`). There is
one such split and no folds: what a run reports is of frames that its bundle was never fitted on. Huang, Qiu, Yuan,
"Surface defect saliency of magnetic tile", The Visual Computer 36 (2020).
"""

import random
import re
from collections import defaultdict
from pathlib import Path

from training.data.folders import GOOD, find_images, subfolders
from training.data.samples import ANOMALOUS, NORMAL, Dataset, DatasetFault, Sample, make_dataset

_PREFIX, _FREE, _IMAGES = "MT_", "MT_Free", "Imgs"
_TEST_FRACTION = 0.2
_SEED = 0
_EXPOSURE = re.compile(r"exp\d+")


def is_magnetic_tile(root: Path) -> bool:
    """Tell whether a folder has this layout."""
    return any(folder.name.startswith(_PREFIX) for folder in subfolders(root))


def read_magnetic_tile(root: Path) -> Dataset:
    """Read the set.

    Raises:
        DatasetFault: if a class has no folder of images, there is no good frame, or an image has no mask.
    """
    samples: list[Sample] = []
    for folder in subfolders(root):
        if not folder.name.startswith(_PREFIX):
            continue
        if not (folder / _IMAGES).is_dir():
            raise DatasetFault(f"{folder} has no folder {_IMAGES}; expected {folder / _IMAGES} with .jpg and .png.")
        samples += _good(folder / _IMAGES) if folder.name == _FREE else _defective(folder / _IMAGES)
    return make_dataset(root, "magnetic_tile", samples, f"{_FREE}/{_IMAGES}")


def _good(folder: Path) -> list[Sample]:
    strata: dict[str, list[Path]] = defaultdict(list)
    for path in _photographs(folder):
        exposure = _EXPOSURE.match(path.name)
        strata["" if exposure is None else exposure.group()].append(path)
    drawing = random.Random(_SEED)  # noqa: S311 -- no secret is drawn
    samples = []
    for _, paths in sorted(strata.items()):
        tested = set(drawing.sample(paths, round(len(paths) * _TEST_FRACTION)))
        samples += [Sample(path, "test" if path in tested else "train", NORMAL, GOOD) for path in paths]
    return samples


def _defective(folder: Path) -> list[Sample]:
    kind = folder.parent.name.removeprefix(_PREFIX).lower()
    samples = [Sample(path, "test", ANOMALOUS, kind, path.with_suffix(".png")) for path in _photographs(folder)]
    faults = [
        f"{sample.path} has no mask; expected {mask.name} beside it."
        for sample in samples
        for mask in sample.mask_paths
        if not mask.is_file()
    ]
    if faults:
        raise DatasetFault(*faults)
    return samples


def _photographs(folder: Path) -> list[Path]:
    return [path for path in find_images(folder, nested=False) if path.suffix.lower() == ".jpg"]
