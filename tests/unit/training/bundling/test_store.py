"""Promises of the store's writer: whole bundles, each under a version of its own."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.contract.bundle import Manifest, load_bundle, versions_of
from service.errors import BundleRefused
from tests.factories import bundle_files, make_runner
from training.bundling.store import StoreFailed, StoreRefused, probe_store, publish


@pytest.fixture(scope="module")
def parts():
    """A manifest, the files of a small bundle without manifest and sidecar, and its graph at work."""
    files = bundle_files()
    manifest = Manifest.model_validate_json(files.pop("manifest.json"))
    del files["manifest.sha256"]
    return manifest, files, make_runner(files["model.onnx"])


def test_publish_when_versions_exist_then_takes_the_next_number(tmp_path, parts):
    """Versions count up from 1, and a gap is not filled."""
    first = publish(tmp_path, *parts)
    (tmp_path / "demo_line" / "7").mkdir()
    (tmp_path / "demo_line" / "7" / "manifest.json").touch()

    second = publish(tmp_path, *parts)

    assert (first.name, second.name) == ("1", "8")
    assert load_bundle(second).manifest.version == "8"


def test_publish_when_many_at_once_then_each_gets_a_whole_bundle_of_its_own(tmp_path, parts):
    """Concurrent publishers never share, overwrite or skip a version."""
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: publish(tmp_path, *parts), range(8)))

    assert sorted(int(path.name) for path in paths) == list(range(1, 9))
    assert [load_bundle(path).manifest.version for path in paths] == [path.name for path in paths]


def test_publish_when_the_graph_answers_otherwise_than_its_golden_set_then_leaves_nothing(tmp_path, parts):
    """The service would refuse the bundle, so it gets no name in the store, and no temporary name stays."""
    manifest, files, graph = parts

    def another(frames, line_index):
        scores, maps = graph(frames, line_index)
        return scores + 1, maps + 1

    with pytest.raises(BundleRefused, match="golden"):
        publish(tmp_path, manifest, files, another)

    assert list((tmp_path / "demo_line").iterdir()) == []


def test_publish_when_the_disk_keeps_something_else_then_leaves_nothing(tmp_path, parts, monkeypatch):
    """What lies on the disk is looked at, and not what was meant to lie there."""

    def write_a_little_less(path, data):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[:-1] if path.name == "calibration.npz" else data)

    monkeypatch.setattr("training.bundling.store._write", write_a_little_less)

    with pytest.raises(BundleRefused, match=r"calibration\.npz"):
        publish(tmp_path, *parts)

    assert list((tmp_path / "demo_line").iterdir()) == []


def test_publish_when_a_publisher_died_then_its_leftovers_go_and_living_ones_stay(tmp_path, parts):
    """A temporary name is removed once it is older than any publisher can be."""
    dead, alive = tmp_path / "demo_line" / ".publishing-dead", tmp_path / "demo_line" / ".publishing-alive"
    for folder in (dead, alive):
        (folder / "golden").mkdir(parents=True)
    os.utime(dead, (0, 0))

    publish(tmp_path, *parts)

    assert not dead.exists()
    assert alive.exists()
    assert versions_of(tmp_path / "demo_line") == ["1"]


def test_publish_when_done_then_others_may_read(tmp_path, parts):
    """The server runs as another user than whoever trains."""
    path = publish(tmp_path, *parts)

    assert path.stat().st_mode & 0o555 == 0o555


def test_probe_when_there_is_no_store_yet_then_leaves_none(tmp_path):
    """A run that is refused later has made nothing."""
    probe_store(tmp_path / "far/store", "demo_line")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("store", ["store", "store/below"], ids=["a file", "below a file"])
def test_probe_when_the_store_is_a_file_then_refuses_and_names_it(tmp_path, store):
    """What publishing would meet at the end is told at the beginning."""
    (tmp_path / "store").touch()

    with pytest.raises(StoreRefused, match=r"The store .*/store(/below)? can't take a bundle \(.*Not a directory\)"):
        probe_store(tmp_path / store, "demo_line")


def _fill_the_disk(monkeypatch):
    def refuse(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a full disk does, without a path

    monkeypatch.setattr(os, "fsync", refuse)


def test_store_when_the_disk_is_full_then_probe_and_publish_name_it_as_the_machines_fault(tmp_path, parts, monkeypatch):
    """The sentence tells which disk, and nothing half stays behind."""
    _fill_the_disk(monkeypatch)

    for ask in (lambda: probe_store(tmp_path, "demo_line"), lambda: publish(tmp_path, *parts)):
        with pytest.raises(StoreFailed, match=rf"^The store {tmp_path} can't be written: No space left on device\."):
            ask()

    assert [*tmp_path.rglob("*")] == [tmp_path / "demo_line"]
