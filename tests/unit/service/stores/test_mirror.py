"""Promises of the mirror, on a bucket in memory: what comes first, what stays, and what keeps nothing else away."""

import hashlib
import json

import pytest

from service.contract.signature import SIGNATURE_FILE
from service.errors import StoreUnreachable
from service.stores.mirror import Mirror
from service.stores.objects import Listed
from service.stores.store import NOTHING, Needed

SIZE = 10_000  # bytes of a version's one file; its manifest has some hundred
ROOM_FOR_ONE = 15_000


class Bucket:
    """Objects in memory.

    Attributes:
        data: by key.
        faulty: keys that can't be read.
        asked: keys that were asked for, in order.
    """

    def __init__(self):
        self.data = {}
        self.faulty = set()
        self.asked = []

    def list(self):
        """Return what there is, as `Objects.list`."""
        return [Listed(key, len(data), _digest(data)) for key, data in self.data.items()]

    def get(self, key, max_bytes):
        """Return an object, as `Objects.get`."""
        self.asked.append(key)
        if key in self.faulty:
            raise StoreUnreachable(f"{key} can't be read.")
        assert len(self.data[key]) <= max_bytes
        return self.data[key]

    def publish(self, version, name="cap", path="model.onnx", size=SIZE):
        """Put a version of one file there."""
        data = f"{name} {version}".encode().ljust(size)
        self.data[f"{name}/{version}/{path}"] = data
        self.data[f"{name}/{version}/manifest.json"] = json.dumps({"files": {path: _digest(data)}}).encode()


class Mirrored:
    """A mirror of such a bucket."""

    def __init__(self, folder, max_bytes=2**30):
        self.bucket, self.folder = Bucket(), folder
        self.mirror = Mirror(self.bucket, folder, max_bytes)

    def refresh(self, serving=(), previous=(), *, newest_waits=False, in_use=()):
        """Bring what is new, where versions of `cap` are needed, and return which of them are there."""
        serving, in_use = {*serving, *in_use}, [("cap", one) for one in in_use]
        needed = Needed([("cap", one) for one in serving], [("cap", one) for one in previous], newest_waits, in_use)
        self.mirror.refresh(needed if serving else NOTHING)
        return self.there()

    def there(self):
        """Return the versions of `cap` that are there."""
        return sorted(file.parent.name for file in (self.folder / "cap").glob("[0-9]*/manifest.json"))


def _digest(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def mirrored(tmp_path):
    """Return a mirror of an empty bucket."""
    return Mirrored(tmp_path / "cache")


@pytest.fixture
def narrow(tmp_path):
    """Return a mirror with room for one version."""
    return Mirrored(tmp_path / "cache", ROOM_FOR_ONE)


def test_refresh_when_one_object_can_not_be_read_then_the_others_come_and_it_is_told(mirrored):
    """One damaged object keeps no other version away, is said to whoever asked, and comes when it can be read."""
    for version in ("1", "2"):
        mirrored.bucket.publish(version)
    mirrored.bucket.data["cap/policies/night.json"] = b"{}"
    mirrored.bucket.faulty = {"cap/2/model.onnx"}

    with pytest.raises(StoreUnreachable, match=r"cap/2/model\.onnx can't be read"):
        mirrored.refresh()

    assert mirrored.there() == ["1"]
    assert (mirrored.folder / "cap/policies/night.json").exists()
    assert mirrored.mirror.absent() == {("cap", "2"): "It could not be fetched; the log says why."}
    mirrored.bucket.faulty.clear()
    assert mirrored.refresh() == ["1", "2"]
    assert mirrored.mirror.absent() == {}


def test_refresh_when_nothing_can_be_read_then_it_gives_up_after_a_few(mirrored):
    """A network that is away is not waited for once an object."""
    for version in ("1", "2", "3", "4", "5"):
        mirrored.bucket.publish(version)
    mirrored.bucket.faulty = set(mirrored.bucket.data)

    with pytest.raises(StoreUnreachable):
        mirrored.refresh()

    assert len(mirrored.bucket.asked) == 3


def test_refresh_when_a_version_is_refused_then_it_is_fetched_again_only_when_it_has_changed(mirrored):
    """What does not hold costs its traffic once, and leaves nothing on the disk."""
    mirrored.bucket.publish("1")
    whole = mirrored.bucket.data["cap/1/model.onnx"]
    mirrored.bucket.data["cap/1/model.onnx"] = whole[:-1]
    mirrored.refresh()
    asked = len(mirrored.bucket.asked)

    assert mirrored.refresh() == []
    assert len(mirrored.bucket.asked) == asked
    assert [file for file in mirrored.folder.rglob("*") if file.is_file()] == []
    assert "model.onnx is not the file" in mirrored.mirror.absent()["cap", "1"]
    mirrored.bucket.data["cap/1/model.onnx"] = whole
    assert mirrored.refresh() == ["1"]


def test_refresh_when_a_fetch_of_another_manifest_was_cut_short_then_nothing_of_it_is_left(mirrored):
    """A version consists of what its manifest names, or it would be refused for good when it is loaded."""
    mirrored.bucket.publish("1")
    stranger = mirrored.folder / "cap/.fetching-1/golden/stranger.png"
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"left")

    mirrored.refresh()

    files = {file.name for file in (mirrored.folder / "cap/1").rglob("*") if file.is_file()}
    assert files == {"manifest.json", "manifest.sha256", "model.onnx"}


@pytest.mark.parametrize("path", ["../../../escaped", "{folder}/escaped", "golden/../../../../escaped"])
def test_refresh_when_a_manifest_names_a_file_outside_then_it_is_refused_though_the_file_is_there(mirrored, path):
    """Whoever may write to the bucket may not write anywhere else."""
    mirrored.bucket.publish("1", path=path.format(folder=mirrored.folder.parent))

    assert mirrored.refresh() == []

    assert list(mirrored.folder.parent.rglob("escaped")) == []
    assert "outside of the bundle" in mirrored.mirror.absent()["cap", "1"]


def test_refresh_when_a_version_is_signed_later_then_its_signature_comes(mirrored):
    """Signing what is published already needs no new version."""
    mirrored.bucket.publish("1")
    mirrored.refresh()
    mirrored.bucket.data[f"cap/1/{SIGNATURE_FILE}"] = b"signed"
    mirrored.bucket.asked.clear()

    mirrored.refresh()

    assert (mirrored.folder / "cap/1" / SIGNATURE_FILE).read_bytes() == b"signed"
    assert mirrored.bucket.asked == [f"cap/1/{SIGNATURE_FILE}"]


def test_refresh_when_objects_are_larger_than_they_may_be_then_they_are_not_even_fetched(mirrored):
    """What would fill memory is refused by its size, and keeps nothing else away."""
    mirrored.bucket.publish("1")
    mirrored.bucket.data["cap/2/manifest.json"] = bytes(16 * 2**20 + 1)
    mirrored.bucket.data["cap/policies/night.json"] = bytes(2**20 + 1)

    assert mirrored.refresh() == ["1"]

    assert {key for key in mirrored.bucket.asked if not key.startswith("cap/1/")} == set()
    assert "more than are taken" in mirrored.mirror.absent()["cap", "2"]


def test_refresh_when_a_policy_is_as_it_was_then_it_is_fetched_again_only_where_it_is_missing_here(mirrored):
    """A look costs no traffic for what is there, and brings back what somebody has removed from the disk."""
    mirrored.bucket.data["cap/policies/night.json"] = b"{}"
    for _ in range(2):
        mirrored.refresh()
    asked = len(mirrored.bucket.asked)
    (mirrored.folder / "cap/policies/night.json").unlink()

    mirrored.refresh()

    assert asked == 1
    assert (mirrored.folder / "cap/policies/night.json").read_bytes() == b"{}"


def test_refresh_when_everything_is_removed_from_the_bucket_then_nothing_is_left_here(mirrored):
    """The directory follows the bucket, down to what it noted of its objects."""
    mirrored.bucket.publish("1")
    mirrored.bucket.data["cap/policies/night.json"] = b"{}"
    mirrored.refresh()
    mirrored.bucket.data.clear()

    assert mirrored.refresh() == []

    assert [file for file in mirrored.folder.rglob("*") if file.is_file()] == []


def test_refresh_when_what_is_in_use_is_removed_from_the_bucket_then_it_stays_until_something_else_is(mirrored):
    """An accident in the bucket takes no line out of service, and what was revoked goes with the next version."""
    for version in ("1", "2"):
        mirrored.bucket.publish(version)
    mirrored.refresh(in_use=["1"])
    (mirrored.folder / "cap/.fetching-1").mkdir()
    mirrored.bucket.data.clear()

    stayed = (mirrored.refresh(in_use=["1"]), set(mirrored.mirror.gone()))
    left = [path.name for path in (mirrored.folder / "cap").iterdir()]
    mirrored.bucket.publish("1")
    put_back = (mirrored.refresh(in_use=["1"]), set(mirrored.mirror.gone()))
    mirrored.bucket.data.clear()
    mirrored.bucket.publish("3")
    went = (mirrored.refresh(in_use=["3"]), set(mirrored.mirror.gone()))

    assert stayed == (["1"], {("cap", "1")})
    assert left == ["1"]
    assert put_back == (["1"], set())
    assert went == (["3"], set())


def test_room_when_what_is_in_use_is_gone_then_it_counts_too(narrow):
    """A directory that is full of what stays takes nothing beside it."""
    narrow.bucket.publish("1")
    narrow.refresh()
    narrow.bucket.data.clear()
    narrow.bucket.publish("2")

    assert narrow.refresh(in_use=["1"]) == ["1"]
    assert "FLAWLINE_MAX_STORE_BYTES" in narrow.mirror.absent()["cap", "2"]


def test_room_when_versions_are_numbers_then_ten_is_newer_than_nine(narrow):
    """The newest version is the one that is brought."""
    for version in ("9", "10"):
        narrow.bucket.publish(version)

    assert narrow.refresh() == ["10"]


def test_room_when_what_was_chosen_has_none_then_it_is_left_out_with_what_was_fetched_of_it(narrow):
    """The bound holds for what somebody asks for as well; only what serves already is never removed."""
    narrow.bucket.publish("1", size=2 * ROOM_FOR_ONE)
    half = narrow.folder / "cap/.fetching-1"
    half.mkdir(parents=True)

    assert narrow.refresh(serving=["1"]) == []

    assert not half.exists()
    assert "FLAWLINE_MAX_STORE_BYTES" in narrow.mirror.absent()["cap", "1"]


def test_room_when_one_serves_and_another_was_chosen_then_the_one_that_is_there_stays(narrow):
    """A newer choice that has no room pushes nothing out that is asked by frames, and does not come beside it."""
    narrow.bucket.publish("1")
    narrow.refresh()
    narrow.bucket.publish("2")

    assert narrow.refresh(serving=["1", "2"]) == ["1"]


@pytest.mark.parametrize(("newest_waits", "there"), [(False, ["2", "3"]), (True, ["1", "2"])])
def test_room_when_new_versions_wait_for_an_administrator_then_the_way_back_comes_before_them(
    tmp_path, newest_waits, there
):
    """What becomes live by itself is worth more than what rolling back would take, and what only waits is not."""
    mirrored = Mirrored(tmp_path / "cache", ROOM_FOR_ONE + SIZE)
    for version in ("1", "2", "3"):
        mirrored.bucket.publish(version)

    assert mirrored.refresh(serving=["2"], previous=["1"], newest_waits=newest_waits) == there


def test_refresh_when_the_directory_can_not_be_made_then_the_store_is_out_of_reach(tmp_path):
    """A fault of the disk is told like one of the network, with a sentence."""
    (tmp_path / "file").touch()

    with pytest.raises(StoreUnreachable, match="can't be written"):
        Mirrored(tmp_path / "file" / "cache").refresh()
