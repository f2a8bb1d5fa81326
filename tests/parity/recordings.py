"""What recorded answers of official code say of themselves, so that other recordings of the same form are compared too.

`FLAWLINE_SHARED` names the folder that holds `parity/<method>/`. There `expected_<side>.npz` is an inference and
`expected_train.npz` a training; batch, side, steps and names are read off their arrays. The seed of every draw stands
in the heading of the README beside them, as `SEED = 1`; `FLAWLINE_PARITY_SEED` takes its place.
"""

import os
import re
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.shared_material import SHARED

Arrays = Mapping[str, np.ndarray]
_TRAINING = "train"


def recorded_inferences(method: str) -> list[str]:
    """Return the names of a method's recorded inferences, as `224`; empty where the shared material is missing."""
    files = () if SHARED is None else sorted((SHARED / "parity" / method).glob("expected_*.npz"))
    names = [file.stem.removeprefix("expected_") for file in files]
    return [name for name in names if name != _TRAINING]


def read_arrays(path: Path) -> Arrays:
    """Return all arrays of a recording, and leave no file open."""
    with np.load(path) as file:
        return dict(file)


def arrays_of(method: str, name: str) -> list[str]:
    """Return the names of the arrays of a recorded inference."""
    assert SHARED is not None
    return sorted(read_arrays(SHARED / "parity" / method / f"expected_{name}.npz"))


def each_array(method: str, but: Collection[str]) -> list[object]:
    """Return parameters for a test of every array of every recorded inference but some, or one that skips."""
    found = [
        (name, array) for name in recorded_inferences(method) for array in arrays_of(method, name) if array not in but
    ]
    return [pytest.param(*pair, id="-".join(pair)) for pair in found] or [_missing(method, 2)]


def each_inference(method: str) -> list[object]:
    """Return parameters for a test of every recorded inference, or one that skips."""
    return [pytest.param(name) for name in recorded_inferences(method)] or [_missing(method, 1)]


def seed_of(folder: Path) -> int:
    """Return the seed of a recording's draws: the environment's, else that of the README's heading."""
    told = os.environ.get("FLAWLINE_PARITY_SEED")
    if told is None:
        found = re.search(r"SEED\s*=\s*(\d+)", (folder / "README.md").read_text("utf-8"))
        assert found, f"{folder / 'README.md'} tells no SEED = ...; set FLAWLINE_PARITY_SEED"
        told = found[1]
    return int(told)


def draw(key: str, shape: list[int] | tuple[int, ...], seed: int) -> np.ndarray:
    """Draw float32 normals from name and seed alone."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode("utf-8")) + seed))
    return generator.standard_normal(shape).astype(np.float32)


def setting_of(folder: Path, name: str, default: float) -> float:
    """Return a setting that no tensor tells, as the README says it, `sigma 0.5`, else the default."""
    found = re.search(rf"\b{name}[ =]\s*(\d+(?:\.\d+)?)", (folder / "README.md").read_text("utf-8"))
    return float(found[1]) if found else default


def draw_images(shape: tuple[int, ...], seed: int, checksum: np.ndarray | None) -> np.ndarray:
    """Draw normalised images `(B, 3, side, side)` and compare them with what the recording has seen."""
    normalised = draw(f"input_{shape[-1]}", shape, seed)
    if checksum is not None:
        flat = normalised.astype(np.float64).ravel()
        np.testing.assert_allclose([flat.sum(), np.abs(flat).sum(), *flat[:8]], checksum, rtol=1e-9)
    return normalised


def recorded_after(expected: Arrays) -> tuple[int, dict[str, np.ndarray]]:
    """Return after how many training steps parameters were recorded, and their beginnings by official name."""
    found = [(match, key) for key in expected if (match := re.match(r"after(\d+)__", key))]
    (steps,) = {int(match[1]) for match, _ in found}
    return steps, {key.removeprefix(match[0]): expected[key] for match, key in found}


def _missing(method: str, names: int) -> object:
    reason = f"needs ../shared/parity/{method}, which is not beside this checkout"
    return pytest.param(*("missing",) * names, marks=pytest.mark.skip(reason=reason))
