"""Writes `resized.npz`: what the one resize gives for a seeded frame. Run it only when the pixels are meant to change.

    python tests/unit/service/contract/data/make_resized.py

A bundle's thresholds rest on these pixels: when the stored ones stop matching, every bundle needs a new calibration.
"""

from pathlib import Path

import numpy as np

from service.contract.frames import fit_to_input
from tests.factories import make_frame, make_input

SIZES = {"smaller": (12, 20, 0), "larger": (64, 80, 0), "cropped": (16, 20, 3), "one_row": (1, 16, 0)}


def main() -> None:
    """Write the stored pixels beside this script."""
    frame = make_frame(37, 53, seed=7, defect=True)
    resized = {name: fit_to_input(frame, make_input(*size)) for name, size in SIZES.items()}
    np.savez_compressed(Path(__file__).with_name("resized.npz"), frame=frame, **resized)


if __name__ == "__main__":
    main()
