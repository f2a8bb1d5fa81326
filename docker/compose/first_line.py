"""Makes the trial's first line, once: draws plates, fits a detector to the good ones, publishes its bundle.

Runs in the training image: `python first_line.py FRAMES STORE`, then options of `flawline train`. The camera
gets plates that fitting never saw, one in thirty-two of them scratched.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from service.contract.frames import encode_png
from training.procedural.plates import draw_plates

LINE = "brushed_plate"
# Plates are easy; a line of your own takes the configuration's steps.
_STEPS = "hyperparameters.recipe.iterations=300"
# One plate in so many that the camera sees is scratched.
_SCRATCHED_EVERY = 32


def draw_line(frames: Path, *, fit: int = 240, shown: int = 96) -> None:
    """Write plates to fit a detector to, and others for the camera, in the order of its shooting."""
    good, scratched = draw_plates(seed=7), draw_plates(seed=8, scratched=True)
    for number in range(fit):
        _write(frames / LINE / "train/good" / f"{number:03d}.png", encode_png(next(good)))
    for number in range(shown):
        supply = scratched if number % _SCRATCHED_EVERY == _SCRATCHED_EVERY - 1 else good
        _write(frames / "camera" / f"{number:03d}.png", encode_png(next(supply)))


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def main() -> None:
    """Draw and fit, unless the volume holds the line already."""
    frames, store = map(Path, sys.argv[1:3])
    if any((store / LINE).glob("[0-9]*")):
        print(f"{LINE} is there already")
        return
    draw_line(frames)
    with tempfile.TemporaryDirectory() as runs:
        command = ["flawline", "train", str(frames / LINE), "--store", str(store), "--runs", runs, "--set", _STEPS]
        done = subprocess.run([*command, *sys.argv[3:]], check=False)  # noqa: S603 - our own command and arguments
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
