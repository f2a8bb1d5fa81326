"""Promises of a store in a bucket, against a real S3 server: whole versions come, and nothing else changes anything."""

import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from obstore.store import S3Store

from service.contract.bundle import load_bundle, versions_of
from service.engines.ort import OrtEngine
from service.errors import StoreUnreachable
from service.lines.ledger import RegistryOptions
from service.lines.loading import BatcherOptions
from service.lines.registry import Registry
from service.observability.telemetry import Telemetry
from service.stores.mirror import Mirror
from service.stores.objects import Location, Objects
from service.stores.publishing import PublishingRefused, publish_to_bucket
from service.stores.store import Needed
from tests.cameras import Cameras
from tests.factories import make_bundle, reseal
from tests.s3 import BUCKET, CREDENTIALS, s3_server
from tests.servers import ServerProcess, wait_until

pytestmark = pytest.mark.skipif(find_spec("moto") is None, reason="needs a real S3 server, moto's")

ROOM = 2**30


class _Counted(Objects):
    """Objects that tell what was fetched."""

    def __init__(self, location: Location) -> None:
        super().__init__(location)
        self.fetched: list[str] = []

    def get(self, key: str, max_bytes: int) -> bytes:
        self.fetched.append(key)
        return super().get(key, max_bytes)


class _Bucket:
    """One test's own part of the bucket."""

    def __init__(self, endpoint: str, prefix: str) -> None:
        self.endpoint = endpoint
        self.url = f"s3://{BUCKET}/{prefix}"
        self.objects = _Counted(Location(self.url, endpoint))
        # As others write to it, who keep to no rule.
        self._others = S3Store(
            BUCKET, prefix=prefix, endpoint=endpoint, region="us-east-1", client_options={"allow_http": True}
        )

    def publish(self, bundle: Path) -> str:
        return publish_to_bucket(bundle, self.objects, self.url)

    def write(self, key: str, data: bytes) -> None:
        self._others.put(key, data)

    def remove(self, key: str) -> None:
        self._others.delete(key)

    def mirror(self, directory: Path, room: int = ROOM) -> Mirror:
        return Mirror(self.objects, directory, room)

    def listed(self) -> set[str]:
        return {listed.key for listed in self.objects.list()}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A running S3 server."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Bundles to publish, `demo_line` 1 to 3; to be read only."""
    store = tmp_path_factory.mktemp("made")
    for version in ("1", "2", "3"):
        make_bundle(store, version=version)
    return store / "demo_line"


@pytest.fixture
def bucket(server, monkeypatch, tmp_path) -> _Bucket:
    """An empty place in the bucket."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    return _Bucket(server, tmp_path.name)


def test_mirror_when_a_version_was_published_then_it_is_brought_whole(bucket, made, tmp_path):
    """What was published is what is loaded, and a second look fetches nothing."""
    bucket.publish(made / "3")
    mirror = bucket.mirror(tmp_path / "cache")

    mirror.refresh()

    assert load_bundle(mirror.directory / "demo_line/3").digest == load_bundle(made / "3").digest
    bucket.objects.fetched.clear()
    mirror.refresh()
    assert bucket.objects.fetched == []


def test_mirror_when_a_version_has_no_manifest_yet_then_it_is_not_there(bucket, made, tmp_path):
    """Half-published versions are not seen."""
    bucket.publish(made / "3")
    bucket.remove("demo_line/3/manifest.json")
    mirror = bucket.mirror(tmp_path / "cache")

    mirror.refresh()

    assert versions_of(mirror.directory / "demo_line") == []


def test_mirror_when_a_file_does_not_fit_its_digest_then_only_that_version_stays_away(bucket, made, tmp_path, caplog):
    """A changed object is told once and keeps no other version from coming; put right, it comes."""
    for version in ("2", "3"):
        bucket.publish(made / version)
    bucket.write("demo_line/3/report.html", b"another report")
    mirror = bucket.mirror(tmp_path / "cache")

    for _ in range(2):
        mirror.refresh()

    assert versions_of(mirror.directory / "demo_line") == ["2"]
    told = [record.__dict__["reason"] for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1
    assert "report.html is not the file" in told[0]
    bucket.write("demo_line/3/report.html", (made / "3/report.html").read_bytes())
    mirror.refresh()
    assert versions_of(mirror.directory / "demo_line") == ["2", "3"]


def test_mirror_when_a_manifest_is_replaced_then_the_version_stays_as_it_was(bucket, made, tmp_path, caplog):
    """Versions never change, whoever may write to the bucket."""
    bucket.publish(made / "3")
    mirror = bucket.mirror(tmp_path / "cache")
    mirror.refresh()
    before = load_bundle(mirror.directory / "demo_line/3").digest
    bucket.write("demo_line/3/manifest.json", b"{}")

    mirror.refresh()

    assert load_bundle(mirror.directory / "demo_line/3").digest == before
    assert "versions never change" in caplog.records[-1].__dict__["reason"]


def test_mirror_when_a_version_is_removed_from_the_bucket_then_it_is_removed_here(bucket, made, tmp_path):
    """Whoever wants the older version removes the newer one, here as in a directory."""
    for version in ("2", "3"):
        bucket.publish(made / version)
    mirror = bucket.mirror(tmp_path / "cache")
    mirror.refresh()
    for key in bucket.listed():
        if key.startswith("demo_line/3/"):
            bucket.remove(key)

    mirror.refresh()

    assert versions_of(mirror.directory / "demo_line") == ["2"]


def test_mirror_when_it_was_cut_short_then_goes_on_where_it_was(bucket, made, tmp_path):
    """A file that is there and fits is not fetched again; what is left of another one is."""
    bucket.publish(made / "3")
    half = tmp_path / "cache/demo_line/.fetching-3"
    half.mkdir(parents=True)
    shutil.copy(made / "3/model.onnx", half)
    (half / "policy.json").write_bytes(b"{")

    bucket.mirror(tmp_path / "cache").refresh()

    assert load_bundle(tmp_path / "cache/demo_line/3").manifest.version == "3"
    assert "demo_line/3/policy.json" in bucket.objects.fetched
    assert "demo_line/3/model.onnx" not in bucket.objects.fetched


def test_mirror_when_there_is_no_room_then_the_newest_versions_are_there(bucket, made, tmp_path):
    """The disk stays bounded; an older version makes room for a newer one."""
    size = sum(file.stat().st_size for file in (made / "1").rglob("*") if file.is_file())
    mirror = bucket.mirror(tmp_path / "cache", room=2 * size + size // 2)
    for version in ("1", "2"):
        bucket.publish(made / version)
    mirror.refresh()
    bucket.publish(made / "3")

    mirror.refresh()

    assert versions_of(mirror.directory / "demo_line") == ["2", "3"]


def _room_for(made: Path, bundles: int) -> int:
    size = sum(file.stat().st_size for file in (made / "1").rglob("*") if file.is_file())
    return bundles * size + size // 2


def test_mirror_when_there_is_no_room_then_what_serves_stays_and_what_is_needed_comes(bucket, made, tmp_path):
    """Newer versions push out neither what serves nor, once it is needed, what was left out; each absence has why."""
    mirror = bucket.mirror(tmp_path / "cache", room=_room_for(made, 1))
    bucket.publish(made / "1")
    mirror.refresh()
    for version in ("2", "3"):
        bucket.publish(made / version)

    mirror.refresh(Needed(serving={("demo_line", "1")}))

    assert versions_of(mirror.directory / "demo_line") == ["1"]
    assert sorted(mirror.absent()) == [("demo_line", "2"), ("demo_line", "3")]
    assert "FLAWLINE_MAX_STORE_BYTES" in mirror.absent()["demo_line", "3"]
    mirror.refresh(Needed(serving={("demo_line", "2")}))
    assert versions_of(mirror.directory / "demo_line") == ["2"]


def test_mirror_when_there_is_room_for_two_then_the_newest_comes_before_the_one_to_roll_back_to(bucket, made, tmp_path):
    """A mirror that is full of what serves and what did before still lets a new version in."""
    mirror = bucket.mirror(tmp_path / "cache", room=_room_for(made, 2))
    for version in ("1", "2"):
        bucket.publish(made / version)
    mirror.refresh()
    bucket.publish(made / "3")

    mirror.refresh(Needed(serving={("demo_line", "2")}, previous={("demo_line", "1")}))

    assert versions_of(mirror.directory / "demo_line") == ["2", "3"]


def test_mirror_when_the_limit_was_lowered_then_what_serves_is_not_removed(bucket, made, tmp_path):
    """A restart finds what serves, whatever somebody set in between."""
    bucket.publish(made / "3")
    bucket.mirror(tmp_path / "cache").refresh()

    bucket.mirror(tmp_path / "cache", room=2).refresh(Needed(serving={("demo_line", "3")}))

    assert versions_of(tmp_path / "cache/demo_line") == ["3"]


@pytest.fixture
def chosen(bucket, made, tmp_path) -> Iterator[Callable[..., Registry]]:
    """Return what starts a registry on the bucket with room for two versions, that waits for administrators."""
    started: list[Registry] = []

    def start(bundles: int = 2, wanted: frozenset[str] | None = None, **options: Any) -> Registry:
        kept = {"activates_newest": False, "state_directory": tmp_path / "state"} | options
        registry = Registry(
            bucket.mirror(tmp_path / "cache", room=_room_for(made, bundles)),
            wanted,
            OrtEngine,
            BatcherOptions(runners=1, max_batch_size=1, max_queue_size=4, stuck_after_s=20),
            Telemetry(),
            time.monotonic,
            RegistryOptions(**kept),
        )
        (tmp_path / "state").mkdir(exist_ok=True)
        started.append(registry)
        registry.load()
        return registry

    yield start
    for registry in started:
        registry.close()


def test_registry_when_newer_versions_fill_the_mirror_then_the_one_that_was_chosen_serves_after_a_restart(
    bucket, made, chosen
):
    """Whatever is published while an older version serves by choice, it is there when the pod starts again."""
    bucket.publish(made / "1")
    registry = chosen()
    registry.activate("demo_line", "1")
    for version in ("2", "3"):
        bucket.publish(made / version)
        registry.rescan()

    again = chosen()

    assert again.is_ready
    assert again.serving("demo_line", None).bundle.manifest.version == "1"


def test_registry_when_the_live_version_is_removed_from_the_bucket_then_it_serves_through_restarts_until_another_does(
    bucket, made, tmp_path, chosen
):
    """An accident takes no line out of service; a version that was revoked goes with the step to another one."""
    for version in ("1", "2"):
        bucket.publish(made / version)
    registry = chosen()
    for key in bucket.listed():
        if key.startswith("demo_line/2/"):
            bucket.remove(key)
    registry.rescan()
    again = chosen()
    served = [one.serving("demo_line", None).bundle.manifest.version for one in (registry, again)]
    told = [dict(one.live_in_store) for one in (registry, again)]

    stepped = again.roll_back("demo_line")
    again.rescan()

    assert served == ["2", "2"]
    assert told == [{"demo_line": False}] * 2
    assert stepped == "1"
    assert versions_of(tmp_path / "cache/demo_line") == ["1"]


def test_registry_when_a_version_was_left_out_of_the_mirror_then_it_is_fetched_for_who_asks(bucket, made, chosen):
    """Activating names any version of the bucket, and rolling back takes the one before though it was left out."""
    for version in ("1", "2", "3"):
        bucket.publish(made / version)
    registry = chosen()
    assert registry.serving("demo_line", None).bundle.manifest.version == "3"

    registry.activate("demo_line", "1")

    assert registry.serving("demo_line", None).bundle.manifest.version == "1"
    assert chosen().serving("demo_line", None).bundle.manifest.version == "1"


def test_registry_when_a_chosen_version_can_not_be_fetched_then_says_why(bucket, made, tmp_path, chosen):
    """Nobody is told to put back what lies there."""
    for version in ("1", "2"):
        bucket.publish(made / version)
    chosen().activate("demo_line", "1")
    shutil.rmtree(tmp_path / "cache")
    bucket.write("demo_line/1/report.html", b"another report")

    registry = chosen()

    reason = registry.status("demo_line").reason or ""
    assert "could not be brought from the store" in reason
    assert "report.html is not the file" in reason
    with pytest.raises(StoreUnreachable, match=r"report\.html"):
        registry.activate("demo_line", "1")


def test_registry_when_a_new_version_has_no_room_then_whoever_asks_hears_and_it_is_counted_once(bucket, made, chosen):
    """What is live stays; that a published version does not come is no secret of the log."""
    bucket.publish(made / "1")
    registry = chosen(bundles=1, activates_newest=True)
    bucket.publish(made / "2")

    found = [registry.rescan() for _ in range(2)]

    assert [list(one.refused) for one in found] == [[("demo_line", "2")]] * 2
    assert "FLAWLINE_MAX_STORE_BYTES" in found[0].refused["demo_line", "2"]
    assert registry.serving("demo_line", None).bundle.manifest.version == "1"
    told = registry._telemetry.exposition()[0].decode()
    assert 'flawline_versions_refused_total{engine="demo_line"} 1.0' in told


def test_registry_when_a_choice_is_outdated_then_its_version_makes_room_for_new_ones(bucket, made, chosen):
    """What no restart would begin with is kept no longer than others."""
    for version in ("1", "2"):
        bucket.publish(made / version)
    registry = chosen(activates_newest=True, keeps_previous=False)
    registry.activate("demo_line", "1")
    registry.activate("demo_line", "2")
    registry._choices.choose_version("demo_line", "1", ())
    bucket.publish(made / "3")

    assert registry.rescan().activated == (("demo_line", "3"),)


def test_registry_when_a_newer_version_was_left_out_then_stepping_back_holds_it_back_too(bucket, made, chosen):
    """It does not become live by itself as soon as there is room for it."""
    bucket.publish(made / "1")
    registry = chosen(bundles=1, activates_newest=True)
    bucket.publish(made / "2")
    registry.rescan()

    registry.activate("demo_line", "1")

    assert chosen(bundles=2, activates_newest=True).serving("demo_line", None).bundle.manifest.version == "1"


def test_registry_when_a_wanted_line_has_no_room_then_that_is_the_reason(bucket, made, chosen):
    """Nobody looks in the bucket for what lies there."""
    bucket.publish(made / "1")

    registry = chosen(bundles=0, wanted=frozenset({"demo_line"}))

    assert "FLAWLINE_MAX_STORE_BYTES" in (registry.status("demo_line").reason or "")


def test_mirror_when_a_policy_comes_changes_and_goes_then_the_directory_follows(bucket, tmp_path):
    """A line's own policies come along, and files of other kinds do not."""
    mirror = bucket.mirror(tmp_path / "cache")
    policy = mirror.directory / "demo_line/policies/night.json"
    bucket.write("demo_line/policies/night.json", b"one")
    bucket.write("demo_line/policies/deep/er.json", b"no")
    bucket.write("demo_line/policies/night.txt", b"no")
    mirror.refresh()
    first = policy.read_bytes()
    bucket.write("demo_line/policies/night.json", b"two")
    mirror.refresh()
    second = policy.read_bytes()
    bucket.remove("demo_line/policies/night.json")
    mirror.refresh()

    assert (first, second, policy.exists()) == (b"one", b"two", False)
    assert [path.name for path in policy.parent.iterdir()] == []


def test_mirror_when_a_manifest_names_files_outside_then_refused_and_nothing_is_written_there(bucket, tmp_path):
    """A manifest can't make the mirror write outside of its version."""
    bucket.write("demo_line/1/manifest.json", b'{"files": {"../../../escaped": "' + b"0" * 64 + b'"}}')
    mirror = bucket.mirror(tmp_path / "cache")

    mirror.refresh()

    assert versions_of(mirror.directory / "demo_line") == []
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("fault", ["no server", "no bucket"])
def test_mirror_when_the_bucket_can_not_be_asked_then_told_and_what_was_brought_stays(bucket, made, tmp_path, fault):
    """No network and no permission leave the directory alone."""
    bucket.publish(made / "3")
    bucket.mirror(tmp_path / "cache").refresh()
    there = Location(f"s3://{BUCKET}", "http://127.0.0.1:9") if fault == "no server" else None
    wrong = Objects(there or Location("s3://not-there", bucket.endpoint))

    with pytest.raises(StoreUnreachable, match="can't be listed") as told:
        Mirror(wrong, tmp_path / "cache", ROOM).refresh()

    assert load_bundle(tmp_path / "cache/demo_line/3").manifest.version == "3"
    assert "<" not in told.value.sentence


def test_publisher_when_a_version_is_there_then_the_second_is_refused_and_changes_nothing(bucket, made, tmp_path):
    """Versions never change, and two publishers of one number never mix."""
    bucket.publish(made / "3")
    before = bucket.listed()
    other = Path(shutil.copytree(made / "3", tmp_path / "other/demo_line/3"))
    (other / "report.html").write_bytes(b"another report")
    reseal(other, seed=7)

    with pytest.raises(PublishingRefused, match=r"report\.html .* another file"):
        bucket.publish(other)
    with pytest.raises(PublishingRefused, match="already"):
        bucket.publish(made / "3")

    assert bucket.listed() == before
    bucket.mirror(tmp_path / "cache").refresh()
    assert load_bundle(tmp_path / "cache/demo_line/3").digest == load_bundle(made / "3").digest


def test_publisher_when_it_was_cut_short_then_the_next_run_finishes(bucket, made, tmp_path):
    """What lies there already and is the same is left as it is."""
    bucket.write("demo_line/3/model.onnx", (made / "3/model.onnx").read_bytes())

    bucket.publish(made / "3")

    bucket.mirror(tmp_path / "cache").refresh()
    assert versions_of(tmp_path / "cache/demo_line") == ["3"]


def test_server_when_its_store_is_a_bucket_then_serves_what_was_published_there(bucket, made, tmp_path):
    """`flawline serve --store s3://…` needs nothing but the address and the usual credentials."""
    bucket.publish(made / "2")
    settings: dict[str, Any] = {
        **CREDENTIALS,
        "FLAWLINE_STORE_ENDPOINT": bucket.endpoint,
        "FLAWLINE_STORE_DIRECTORY": str(tmp_path / "cache"),
    }

    with ServerProcess(Path("unused"), settings, ["--store", bucket.url]) as process:
        version = process.ready().line("demo_line")["live"]["bundle"]["version"]

    assert version == "2"


def test_server_when_the_disk_of_its_mirror_is_full_then_it_goes_on_and_takes_the_version_when_there_is_room(
    bucket, made, tmp_path
):
    """Under load, a version that can't be written leaves the one before it in service, and nothing half is loaded."""
    bucket.publish(made / "2")
    settings: dict[str, Any] = {
        **CREDENTIALS,
        "FLAWLINE_STORE_ENDPOINT": bucket.endpoint,
        "FLAWLINE_STORE_DIRECTORY": str(tmp_path / "cache"),
        "FLAWLINE_STORE_POLL_S": "0.1",
    }
    room = (made / "3/model.onnx").stat().st_size // 2
    with ServerProcess(Path("unused"), settings, ["--store", bucket.url]) as process:
        process.ready()
        with Cameras(process.url) as cameras:
            process.limit_files(room)
            bucket.publish(made / "3")
            wait_until(lambda: "flawline_store_unreachable_total 0.0" not in _metrics(process), "a look that fails")
            cameras.after()
            versions_while_full = {told.version for told in list(cameras.told)}
            process.limit_files(None)
            wait_until(lambda: cameras.told[-1].version == "3", "the new version")
        ready = process.http.get("/healthz/ready").status_code

    cameras.assert_safe()
    assert {told.status for told in cameras.told} == {200}
    assert versions_while_full == {"2"}
    assert ready == 200


def _metrics(process: ServerProcess) -> str:
    return process.http.get("/metrics").text
