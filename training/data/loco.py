"""The MVTec LOCO AD layout: logical and structural anomalies, one mask file for each defect of an image.

    <root>/train/good/*, <root>/validation/good/*
    <root>/test/good/*, <root>/test/{logical_anomalies,structural_anomalies}/NNN.png
    <root>/ground_truth/<kind>/NNN/000.png, 001.png, ...     one defect each; its value says which
    <root>/defects_config.json                               how much of each defect must be covered

Bergmann et al., "Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly Detection and Localization",
IJCV 2022; the rules of saturation are those of its evaluation kit. Frames differ in size from category to category.
"""

from pathlib import Path

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from training.data.folders import (
    PLACES,
    defect_folders,
    find_images,
    good_folders,
    good_samples,
    subfolders,
    told_dataset,
)
from training.data.samples import ANOMALOUS, Dataset, DatasetFault, Sample, Saturation, Split

LOGICAL, STRUCTURAL = "logical_anomalies", "structural_anomalies"
_CONFIG = "defects_config.json"
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class _Defect(BaseModel):
    defect_name: str
    pixel_value: int = Field(gt=0, lt=256)
    saturation_threshold: float = Field(gt=0)
    relative_saturation: bool


def is_loco(root: Path) -> bool:
    """Tell whether a folder has this layout: the table of defects, or the folder of logical anomalies."""
    return (root / _CONFIG).is_file() or (root / "test" / LOGICAL).is_dir()


def read_loco(root: Path) -> Dataset:
    """Read one category.

    Raises:
        DatasetFault: if the table of defects is missing or wrong, there is no good frame, or images and folders of
            masks do not fit together.
    """
    saturations = _read_saturations(root / _CONFIG)
    samples: list[Sample] = []
    for split in _SPLITS:
        samples += [one for folder in good_folders(root / split) for one in good_samples(folder, split)]
    for kind in defect_folders(root / "test"):
        samples += _anomalous_samples(kind, root / "ground_truth" / kind.name, saturations)
    return told_dataset(root, "loco", samples, PLACES)


def _read_saturations(path: Path) -> tuple[Saturation, ...]:
    try:
        defects = TypeAdapter(list[_Defect]).validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DatasetFault(f"{path} is missing; MVTec LOCO keeps it in every category, copy it from there.") from error
    except ValidationError as error:
        raise DatasetFault(
            f"{path} is not what MVTec LOCO keeps there: expected a list of objects with defect_name, pixel_value, "
            "saturation_threshold and relative_saturation; copy it again."
        ) from error
    return tuple(Saturation(d.pixel_value, d.saturation_threshold, d.relative_saturation) for d in defects)


def _anomalous_samples(images: Path, masks: Path, saturations: tuple[Saturation, ...]) -> list[Sample]:
    samples = [
        Sample(
            path,
            "test",
            ANOMALOUS,
            images.name,
            channels=tuple(find_images(masks / path.stem, nested=False)),
            saturations=saturations,
        )
        for path in find_images(images, nested=False)
    ]
    faults = [
        f"{sample.path} has no mask; expected {masks / sample.path.stem} with one PNG for each defect."
        for sample in samples
        if not sample.channels
    ]
    stems = {sample.path.stem for sample in samples}
    faults += [
        f"{folder} holds masks without an image; add {images / folder.name}.png or remove the folder."
        for folder in subfolders(masks)
        if folder.name not in stems
    ]
    if faults:
        raise DatasetFault(*faults)
    return samples
