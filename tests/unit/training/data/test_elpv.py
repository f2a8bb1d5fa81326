"""The solar cells of the demo: a line that is the same on every machine."""

import importlib.util
from pathlib import Path

import pytest

from training.data.detect import read_dataset
from training.data.elpv import write_solar_cells
from training.data.samples import ANOMALOUS, NORMAL, DatasetFault


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay the package's frames out once."""
    if importlib.util.find_spec("elpv_dataset") is None:
        pytest.skip("needs the package elpv-dataset (extra demo)")
    return write_solar_cells(tmp_path_factory.mktemp("line") / "solar_cell")


def test_solar_cells_when_written_are_all_certain_monocrystalline_ones(line):
    """588 normal and 313 defective cells are certain and monocrystalline; every one is laid out, and no other."""
    samples = read_dataset(line).samples

    labels = [sample.label for sample in samples]

    assert (labels.count(NORMAL), labels.count(ANOMALOUS)) == (588, 313)


def test_solar_cells_when_split_keep_defects_out_of_training(line):
    """Training sees normal cells only, about seven tenths of them."""
    dataset = read_dataset(line)

    trained = [sample for sample in dataset.samples if sample.split == "train"]

    assert {sample.label for sample in trained} == {NORMAL}
    assert 0.65 < len(trained) / 588 < 0.75


def test_solar_cells_when_written_twice_are_left_alone(line):
    """A finished folder is not written again."""
    frame = next(line.rglob("*.png"))
    before = frame.stat().st_mtime_ns

    write_solar_cells(line)

    assert frame.stat().st_mtime_ns == before


def test_solar_cells_when_the_package_is_missing_say_what_to_install(tmp_path, monkeypatch):
    """Without the package, one sentence names it and the way round it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(DatasetFault, match=r"pip install 'flawline\[demo\]'"):
        write_solar_cells(tmp_path / "line")
