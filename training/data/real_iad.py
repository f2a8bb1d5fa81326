"""The Real-IAD layout: five views of each piece, and splits in a JSON file for each category.

    <parent>/realiad_{256,512,1024,raw}/<category>/OK/Sxxxx/<category>_xxxx_OK_C<view>_<time>.jpg
    <parent>/realiad_{256,512,1024,raw}/<category>/NG/<defect>/Sxxxx/<category>_xxxx_NG_<defect>_C<view>_<time>.{jpg,png}
    <parent>/<splits>/<category>.json

The splits are `realiad_jsons` (all views), `realiad_jsons_sv` (one view) or `realiad_jsons_fuiad_<noise>`, in which the
training list holds anomalies that nobody labelled; fitting takes all of it as good, as it would have to. Masks lie
beside the frames and only the JSON knows their names. Wang et al., "Real-IAD", CVPR 2024, arXiv:2403.12580.
"""

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from training.data.folders import GOOD
from training.data.samples import ANOMALOUS, NORMAL, Dataset, DatasetFault, Sample, make_dataset

SPLITS = (
    "realiad_jsons",
    "realiad_jsons_sv",
    "realiad_jsons_fuiad_0.0",
    "realiad_jsons_fuiad_0.1",
    "realiad_jsons_fuiad_0.2",
    "realiad_jsons_fuiad_0.4",
)
# The publisher's own pattern for the piece that a frame shows.
_PIECE = re.compile(r"([a-zA-Z][a-zA-Z0-9_]*_[0-9]{4}_[A-Z][A-Z_]*[A-Z])_C[0-9]_")


class _Meta(BaseModel):
    prefix: str
    normal_class: str


class _Row(BaseModel):
    category: str
    anomaly_class: str
    image_path: str
    mask_path: str | None


class _Table(BaseModel):
    meta: _Meta
    train: list[_Row]
    test: list[_Row]


def is_real_iad(root: Path, splits: str = SPLITS[0]) -> bool:
    """Tell whether a folder is one category that these splits describe; the plain splits go before all others."""
    if not (root / "OK").is_dir():
        return False
    present = [name for name in SPLITS if _table_path(root, name).is_file()]
    if SPLITS[0] in present or not present:
        return splits == SPLITS[0]
    return splits in present


def read_real_iad(root: Path, splits: str = SPLITS[0]) -> Dataset:
    """Read one category by the named splits.

    Raises:
        DatasetFault: if the JSON file is missing or wrong, or names a file that does not exist.
    """
    root = root.resolve()
    path = _table_path(root, splits)
    try:
        table = _Table.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DatasetFault(
            f"{path} is missing; expected the folder {splits} of Real-IAD beside {root.parent.name}."
        ) from error
    except ValidationError as error:
        raise DatasetFault(
            f"{path} is not what Real-IAD publishes: expected meta with prefix and normal_class, and the lists train "
            "and test with category, anomaly_class, image_path and mask_path; copy it again."
        ) from error
    folder = root.parent / table.meta.prefix
    samples = [_sample(folder, row, "train", table.meta.normal_class) for row in table.train]
    samples += [_sample(folder, row, "test", table.meta.normal_class) for row in table.test]
    missing = [file for sample in samples for file in (sample.path, *sample.mask_paths) if not file.is_file()]
    if missing:
        raise DatasetFault(*(f"{file} is named in {path} but does not exist; unpack it again." for file in missing))
    return make_dataset(root, "real_iad" + splits.removeprefix(SPLITS[0]), samples, "OK")


def _sample(folder: Path, row: _Row, split: Literal["train", "test"], normal_class: str) -> Sample:
    piece = _PIECE.search(Path(row.image_path).name)
    group = None if piece is None else piece.group(1)
    is_normal = split == "train" or row.mask_path is None or row.anomaly_class == normal_class
    if is_normal:
        return Sample(folder / row.image_path, split, NORMAL, GOOD, group=group, s_auroc=True)
    mask = folder / str(row.mask_path)
    return Sample(folder / row.image_path, split, ANOMALOUS, row.anomaly_class, mask, group=group, s_auroc=True)


def _table_path(root: Path, splits: str) -> Path:
    line = root.resolve()
    return line.parent.parent / splits / f"{line.name}.json"
