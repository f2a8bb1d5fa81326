"""Promises of the store's writer: whole bundles, each under a version of its own."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.contract.bundle import Manifest, load_bundle, versions_of
from tests.factories import bundle_files
from training.store import publish


@pytest.fixture(scope="module")
def parts():
    """A manifest and the files of a small bundle, without manifest and sidecar."""
    files = bundle_files()
    manifest = Manifest.model_validate_json(files.pop("manifest.json"))
    del files["manifest.sha256"]
    return manifest, files


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


def test_publish_when_the_last_look_fails_then_leaves_nothing(tmp_path, parts):
    """What the check raises keeps the bundle out, and no temporary name stays."""

    def refuse(path: Path) -> None:
        assert load_bundle(path).manifest.version == "1"
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        publish(tmp_path, *parts, check=refuse)

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
