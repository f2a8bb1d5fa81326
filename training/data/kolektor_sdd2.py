"""The KolektorSDD2 layout: every frame has a mask beside it, and most masks are empty.

    <root>/{train,test}/NNNNN.png and NNNNN_GT.png

A frame is defective where its mask marks a pixel, so each mask is opened once here. Defective frames of `train` are
left out: detectors are fitted on good ones. Bozic, Tabernik, Skocaj, "Mixed supervision for surface-defect detection",
Computers in Industry 2021, arXiv:2104.06064. The first KolektorSDD has other folders and no split, and is not read.
"""

from pathlib import Path

from service.contract.frames import decode_mask
from service.errors import UnreadableFrame
from training.data.folders import GOOD, by_name, find_images
from training.data.samples import ANOMALOUS, NORMAL, Dataset, DatasetFault, Sample, Split, make_dataset

_ENDING = "_GT"


def is_kolektor_sdd2(root: Path) -> bool:
    """Tell whether a folder has this layout."""
    return any(any((root / split).glob(f"*{_ENDING}.png")) for split in ("train", "test"))


def read_kolektor_sdd2(root: Path) -> Dataset:
    """Read the set.

    Raises:
        DatasetFault: if there is no good frame, a mask can't be read, a frame and its mask are not both there, or two
            files have one name.
    """
    samples = [sample for sample in _read(root / "train", "train") if sample.label == NORMAL]
    return make_dataset(root, "kolektor_sdd2", samples + _read(root / "test", "test"), "train")


def _read(folder: Path, split: Split) -> list[Sample]:
    files = find_images(folder, nested=False)
    masks = by_name(folder, (path for path in files if path.stem.endswith(_ENDING)), _ENDING)
    frames = by_name(folder, (path for path in files if not path.stem.endswith(_ENDING)), "")
    alone = sorted(masks.keys() ^ frames.keys())
    if alone:
        raise DatasetFault(
            *(f"Expected both {folder / name}.png and {folder / name}{_ENDING}.png; one is missing." for name in alone)
        )
    return [_sample(path, masks[name], split) for name, path in frames.items()]


def _sample(path: Path, mask: Path, split: Split) -> Sample:
    try:
        is_defective = bool(decode_mask(mask.read_bytes()).any())
    except UnreadableFrame as error:
        raise DatasetFault(f"{mask}: {error.sentence} Replace the file.") from error
    if is_defective:
        return Sample(path, split, ANOMALOUS, "defect", mask)
    return Sample(path, split, NORMAL, GOOD)
