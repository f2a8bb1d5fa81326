r"""Lay out three lines that nothing was chosen on, from public checkouts, in the MVTec AD layout.

    git clone https://github.com/zae-bayern/elpv-dataset SOURCES/elpv-dataset        # at 411fd729; CC BY-NC-SA 4.0
    git clone https://github.com/tangsanli5201/DeepPCB SOURCES/DeepPCB               # at 08e98c4d; MIT, for research
    git clone https://github.com/bianconif/PIPED SOURCES/PIPED                       # at 3d89e1f3; CC BY 4.0
    .venv/bin/python tests/benchmarks/unseen_lines.py SOURCES OUTPUT
    .venv/bin/python tests/benchmarks/detectors.py measure --data OUTPUT --output CELLS \
        --textures paper --control --probe

| line | what it is | good to fit on, good and defective to test on |
|---|---|---|
| `solar_poly` | electroluminescence of polycrystalline cells, 300 x 300, image labels alone | 240, 80, 120 |
| `pcb_20085` | DeepPCB's board 20085, binarised, 640 x 640, boxes as masks | 120, 40, 61 |
| `paper` | four kinds of paper under a dome light, colour, 128 x 128, masks of the impurities | 128, 64, 192 |

Which frames are taken is settled by the SHA-256 of their names, so that nobody chose any. Of paper the
patches of one sheet lie on one side, and of a board each place is seen in one folder alone.
"""

import argparse
import hashlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

_BOARD = "20085"
_KINDS_OF_PAPER = 4
_PATCHES_TO_FIT_ON = 32  # of a kind's 48: whole sheets, which have four or eight


def main() -> None:
    """Write the three lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", type=Path, help="folder of the three checkouts")
    parser.add_argument("output", type=Path, help="folder to write the lines into")
    options = parser.parse_args()
    lay_out_solar_poly(options.sources / "elpv-dataset", options.output / "solar_poly")
    lay_out_board(options.sources / "DeepPCB", options.output / f"pcb_{_BOARD}")
    lay_out_paper(options.sources / "PIPED", options.output / "paper")


def lay_out_solar_poly(source: Path, line: Path) -> None:
    """Take polycrystalline cells that are surely good (probability 0) or surely defective (probability 1)."""
    root = source / "src" / "elpv_dataset" / "data"
    labels = [row.split() for row in (root / "labels.csv").read_text(encoding="utf-8").splitlines()]
    poly = [(root / name, float(probability)) for name, probability, kind in labels if kind == "poly"]
    good = _by_hash(path for path, probability in poly if probability == 0)
    defective = _by_hash(path for path, probability in poly if probability == 1)
    _copy(good[:240], line / "train" / "good")
    _copy(good[240:320], line / "test" / "good")
    _copy(defective[:120], line / "test" / "defective")


def lay_out_board(source: Path, line: Path) -> None:
    """Take templates as good frames and tested scans of other places as defective ones, filled boxes as masks."""
    group = source / "PCBData" / f"group{_BOARD}"
    places = _by_hash(sorted(path.with_suffix("") for path in (group / f"{_BOARD}_not").glob("*.txt")))
    scans = [group / _BOARD / f"{place.name}_temp.jpg" for place in places[:160]]
    _copy(scans[:120], line / "train" / "good")
    _copy(scans[120:], line / "test" / "good")
    for place in places[160:221]:
        scan = group / _BOARD / f"{place.name}_test.jpg"
        _copy([scan], line / "test" / "mixed")
        with Image.open(scan) as frame:
            mask = Image.new("L", frame.size)
        boxes = ImageDraw.Draw(mask)
        for row in place.with_suffix(".txt").read_text(encoding="utf-8").splitlines():
            left, top, right, bottom, _kind = (int(number) for number in row.split())
            boxes.rectangle((left, top, right - 1, bottom - 1), fill=255)
        _save_mask(mask, line, "mixed", scan.stem)


def lay_out_paper(source: Path, line: Path) -> None:
    """Take four kinds of paper; a kind's impurities are a defect by the kind's name."""
    kinds = [kind for kind in (source / "data").iterdir() if (kind / "Defects").is_dir()]
    for kind in _by_hash(kinds)[:_KINDS_OF_PAPER]:
        patches = sorted((kind / "NoDefects").glob("*.bmp"))
        _copy(patches[:_PATCHES_TO_FIT_ON], line / "train" / "good")
        _copy(patches[_PATCHES_TO_FIT_ON:], line / "test" / "good")
        truths = {path.stem.split("_GT_")[1]: path for path in (kind / "Defects").glob("Ground*/*.bmp")}
        for patch in sorted((kind / "Defects").glob("*.bmp")):
            _copy([patch], line / "test" / kind.name)
            with Image.open(truths[patch.stem.split("_D_")[1]]) as truth:
                inked = np.asarray(truth.convert("L")) < 128  # impurities are drawn black
            _save_mask(Image.fromarray(inked.astype(np.uint8) * 255), line, kind.name, patch.stem)


def _by_hash(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: hashlib.sha256(path.name.encode()).hexdigest())


def _copy(paths: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copyfile(path, folder / path.name)


def _save_mask(mask: Image.Image, line: Path, defect: str, stem: str) -> None:
    folder = line / "ground_truth" / defect
    folder.mkdir(parents=True, exist_ok=True)
    mask.save(folder / f"{stem}_mask.png")


if __name__ == "__main__":
    main()
