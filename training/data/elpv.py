"""Solar cells of the elpv data set: its own layout, and real frames for a first try, laid out like a product line.

    <root>/src/elpv_dataset/data/images/cellNNNN.png      the repository; the folder `data` alone will do as well
    <root>/src/elpv_dataset/data/labels.csv               path, defect probability, mono or poly; between blanks

Electroluminescence images of cells, 300x300 grey, without masks. The layout's reader takes probability 0 as normal,
2/3 and 1 as anomalous and leaves 1/3 out. By the name `elpv_doubtful` (`flawline reproduce … --layout elpv_doubtful`),
with `_mono` or `_poly` behind it for one type, cells of 1/3 are tested too, as anomalous ones of a kind of their own.
The line for a first try comes from the PyPI package `elpv-dataset`, is monocrystalline only and leaves all doubtful
cells out; the package is fetched by pip and stays where pip put it, and nothing of it is part of this project.

Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence Imagery",
EU PVSEC 2018. Images: CC BY-NC-SA 4.0, hence for trials, not for commerce.
"""

import hashlib
import importlib.util
import shutil
from pathlib import Path

from training.data.folders import GOOD
from training.data.samples import ANOMALOUS, NORMAL, Dataset, DatasetFault, Sample, make_dataset

LICENCE = "Solar cells: elpv-dataset, CC BY-NC-SA 4.0 (non-commercial use only), Buerhop-Lutz et al., EU PVSEC 2018."
_TEST_SHARE = 0.3
_PLACES = (Path("src/elpv_dataset/data"), Path("elpv_dataset/data"), Path("data"), Path())
_LABELS = "labels.csv"
_TYPES = ("mono", "poly")
# Probabilities are thirds; the second third is the first that counts as a defect.
_NORMAL_UP_TO, _ANOMALOUS_FROM = 0.1, 0.5


def is_elpv(root: Path) -> bool:
    """Tell whether a folder is the data set's repository or the folder of its data."""
    return _data_folder(root) is not None


def read_elpv(root: Path, cell_type: str | None = None, *, doubtful: bool = False) -> Dataset:
    """Read the cells of one type, or of both; 70 % of the normal ones are for training, by the hash of their names.

    Args:
        root: the repository, or the folder of its data.
        cell_type: mono or poly, or None for both.
        doubtful: whether cells of probability 1/3 are tested, as anomalous ones of the kind "doubtful".

    Raises:
        DatasetFault: if the table of labels is missing or wrong, or names a file that does not exist.
    """
    data = _data_folder(root)
    if data is None:
        raise DatasetFault(f"{root} has no {_PLACES[0] / _LABELS}; give the repository of elpv-dataset.")
    samples = []
    for number, line in enumerate((data / _LABELS).read_text(encoding="utf-8").splitlines(), start=1):
        name, probability, kind = _row(data / _LABELS, number, line)
        if cell_type not in (None, kind):
            continue
        if probability >= _ANOMALOUS_FROM:
            samples.append(Sample(data / name, "test", ANOMALOUS, "defective"))
        elif probability > _NORMAL_UP_TO:
            if doubtful:
                samples.append(Sample(data / name, "test", ANOMALOUS, "doubtful"))
        else:
            samples.append(Sample(data / name, "test" if _is_tested(name) else "train", NORMAL, GOOD))
    missing = [sample.path for sample in samples if not sample.path.is_file()]
    if missing:
        raise DatasetFault(*(f"{path} is named in {_LABELS} but does not exist; copy it again." for path in missing))
    layout = "_".join(["elpv", *(["doubtful"] if doubtful else []), *([] if cell_type is None else [cell_type])])
    return make_dataset(root, layout, samples, str(data / "images"))


def write_solar_cells(folder: Path) -> Path:
    """Copy the frames into the MVTec layout, once; 70 % of the normal ones are for training.

    The split follows the hash of each file's name, so it is the same everywhere.

    Returns:
        The line's folder.

    Raises:
        DatasetFault: if the package is not installed.
    """
    found = importlib.util.find_spec("elpv_dataset")
    if found is None or found.origin is None:
        raise DatasetFault("The package elpv-dataset is not installed: pip install 'flawline[demo]', or name a line.")
    data = Path(found.origin).parent / "data"
    finished = folder / ".complete"
    if finished.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    rows = [line.split() for line in (data / "labels.csv").read_text(encoding="utf-8").splitlines()]
    for name, probability, kind in rows:
        destination = _destination(name, float(probability), kind)
        if destination is not None:
            (folder / destination).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / name, folder / destination / Path(name).name)
    finished.touch()
    return folder


def _destination(name: str, probability: float, kind: str) -> str | None:
    if kind != "mono" or probability not in (0.0, 1.0):
        return None
    if probability == 1.0:
        return "test/defective"
    return "test/good" if _is_tested(name) else "train/good"


def _is_tested(name: str) -> bool:
    return int(hashlib.sha256(Path(name).name.encode()).hexdigest()[:8], 16) / 2**32 < _TEST_SHARE


def _data_folder(root: Path) -> Path | None:
    found = [root / place for place in _PLACES if (root / place / _LABELS).is_file()]
    return found[0] if found and (found[0] / "images").is_dir() else None


def _row(table: Path, number: int, line: str) -> tuple[str, float, str]:
    try:
        name, probability, kind = line.split()
        value = float(probability)
    except ValueError as error:
        raise DatasetFault(
            f"Line {number} of {table} is {line!r}; expected a path, a probability and mono or poly, between blanks."
        ) from error
    if kind not in _TYPES or not 0 <= value <= 1:
        raise DatasetFault(
            f"Line {number} of {table} is {line!r}; expected a probability from 0 to 1 and mono or poly."
        )
    return name, value, kind
