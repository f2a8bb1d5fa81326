"""Real frames for a first try: solar cells from the PyPI package `elpv-dataset`, laid out like a product line.

Electroluminescence images of cells, 300x300 grey. Normal: monocrystalline, defect probability 0; anomalous:
monocrystalline, probability 1; the doubtful ones between are left out. The package is fetched by pip and stays where
pip put it; nothing of it is part of this project.

Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence Imagery",
EU PVSEC 2018. Images: CC BY-NC-SA 4.0, hence for trials, not for commerce.
"""

import hashlib
import importlib.util
import shutil
from pathlib import Path

from training.data.samples import DatasetFault

LICENCE = "Solar cells: elpv-dataset, CC BY-NC-SA 4.0 (non-commercial use only), Buerhop-Lutz et al., EU PVSEC 2018."
_TEST_SHARE = 0.3


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
    position = int(hashlib.sha256(Path(name).name.encode()).hexdigest()[:8], 16) / 2**32
    return "test/good" if position < _TEST_SHARE else "train/good"
