"""Promises of versions: a new one is proved beside the old one, swapped at once, and stepped back from at once."""

import asyncio
import os
import shutil
import sys
import threading
import time

import numpy as np
import pytest

from service.engines.ort import OrtEngine
from service.errors import (
    BundleRefused,
    EngineFailed,
    LineLoading,
    LineNotCalibrated,
    LineNotReady,
    StoreUnreachable,
    UnknownBundle,
    UnknownLine,
    UnknownPolicy,
    UnknownVersion,
)
from service.lines.ledger import RegistryOptions
from service.lines.live import VersionKey
from service.lines.loading import BatcherOptions
from service.lines.registry import Registry
from service.observability.telemetry import Telemetry
from service.stores.directory import DirectoryStore
from service.threads import begin
from tests.factories import make_bundle, make_graph, make_policy, network_of, reseal, write_policy
from tests.fakes import in_loop
from tests.rights import rights_of_an_ordinary_user
from tests.servers import wait_until

OPTIONS = BatcherOptions(runners=1, max_batch_size=1, max_queue_size=4, stuck_after_s=20)


class Shelf:
    """A store, the registry on it, and the engines that it opened."""

    def __init__(self, path):
        self.path = path
        self.telemetry = Telemetry()
        self.engines = []
        self.sizes = {}
        self.registry = None
        self.now = None  # the real time
        self.before_open = lambda _bundle: None
        self.on_run = lambda: None

    def load(self, wanted=None, **options):
        """Load what lies there."""
        store = DirectoryStore(self.path)
        kept = RegistryOptions(**options)
        self.registry = Registry(store, wanted, self._open, OPTIONS, self.telemetry, self._clock, kept)
        self.registry.load()
        return self.registry

    def add(self, version="1", name="demo_line", **options):
        """Write a bundle."""
        return make_bundle(self.path, name, version, **options)

    def add_broken(self, version, name="demo_line"):
        """Write a bundle whose network is another one than the validated one."""
        folder = self.add(version, name)
        (folder / "model.onnx").write_bytes(make_graph(reference=0.5))
        return reseal(folder)

    def add_policy(self, version, network=None, **fields):
        """Write a policy file, and return it."""
        return write_policy(self.path, make_policy(version=version, **fields), network)

    def network(self, version="1"):
        """Return what a policy file names that is written for a version's scores."""
        return network_of(self.path / "demo_line" / version)

    def serving(self, line="demo_line", version=None):
        """Return the version that serves a line."""
        return self.registry.serving(line, version).bundle.manifest.version

    def states(self, line="demo_line"):
        """Return how the versions stand."""
        return {one.version: one.state for one in self.registry.versions(line)}

    def metrics(self):
        """Return the text that a scraper reads."""
        return self.telemetry.exposition()[0].decode()

    def line_states(self):
        """Return how the lines stand."""
        return {status.line: status.state for status in self.registry.statuses()}

    def want(self, line):
        """Bring a frame for a line that is not in memory, and wait until it was tried to load it."""
        with pytest.raises(LineNotReady) as refused:
            self.registry.serving(line, None)
        wait_until(lambda: line not in self.registry._asked_again, "the load")  # of a bundle of this name
        return refused.value

    def _clock(self):
        if self.now is None:
            return time.monotonic()
        self.now += 1e-6  # so that of two the later one can be told
        return self.now

    def _open(self, bundle):
        self.before_open(bundle)
        engine = Watched(bundle, self.sizes.get(bundle.manifest.name, 0), self)
        self.engines.append(engine)
        return engine


class Watched(OrtEngine):
    """A real engine that tells of its runs, notes its end, and says what size it is told to."""

    def __init__(self, bundle, size_bytes, shelf):
        super().__init__(bundle)
        self.shelf = shelf
        self.size_bytes = size_bytes
        self.version = bundle.manifest.version
        self.is_closed = False

    def run(self, frames, line_index):
        """Tell of it, and run."""
        self.shelf.on_run()
        return super().run(frames, line_index)

    def close(self):
        """Note it."""
        self.is_closed = True
        super().close()


@pytest.fixture
def shelf(tmp_path):
    """Return a shelf with one line, not loaded."""
    shelf = Shelf(tmp_path / "store")
    shelf.add("1")
    yield shelf
    if shelf.registry is not None:
        shelf.registry.close()


def test_rescan_when_a_version_came_then_it_is_live_and_the_old_one_is_kept(shelf):
    """Who names no version gets the new one; who names the old one still gets that."""
    registry = shelf.load()
    shelf.add("2")

    found = registry.rescan()

    assert found.activated == (("demo_line", "2"),)
    assert (shelf.serving(), shelf.serving(version="1")) == ("2", "1")
    assert shelf.states() == {"1": "kept", "2": "live"}
    told = [line for line in shelf.metrics().splitlines() if line.startswith("flawline_model_info{")]
    assert [line.endswith('version="2"} 1.0') for line in told] == [True]


def _priority():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
def test_rescan_when_a_version_is_loaded_beside_frames_then_it_stands_back_behind_them_on_one_core(shelf):
    """At the start loading stands back behind the event loop alone, later on its runs do behind runners as well."""
    opened, ran, own = [], [], _priority()
    shelf.before_open = lambda _bundle: opened.append(_priority() - own)
    shelf.on_run = lambda: ran.append((_priority() - own, shelf.registry._loader._running.count))
    shelf.add("1", "other_line")
    registry = shelf.load()
    at_the_start, ran[:] = set(ran), []
    shelf.add("2")

    registry.rescan()

    assert opened == [5, 5, 5]  # what a runtime's own threads inherit
    assert at_the_start == {(5, 0)}
    assert set(ran) == {(10, 1)}


def test_rescan_when_a_frame_runs_then_the_runs_of_a_new_version_wait_for_its_end(shelf):
    """Proving a version takes longer where frames come, and no frame does."""
    registry, order = shelf.load(), []
    running = registry._loader._running
    shelf.add("2")
    shelf.before_open = lambda _bundle: order.append("opened")
    shelf.on_run = lambda: order.append("proved")
    waits = threading.Event()
    wait_for_gap = running.wait_for_gap

    def tell(longest_s):
        waits.set()
        return wait_for_gap(longest_s)

    running.wait_for_gap = tell
    running.begin()  # as a runner does that has a frame
    looking = begin(registry.rescan, name="rescan")
    assert waits.wait(20.0)
    order.append("frame")
    running.end()

    assert looking.result(20.0).activated == (("demo_line", "2"),)
    assert order[:3] == ["opened", "frame", "proved"]


def test_store_when_it_could_not_bring_a_version_then_that_is_told_where_it_would_serve(shelf, monkeypatch):
    """A version without room here is no missing one, and one that waits for somebody is no fault."""
    registry, absent = shelf.load(), {("demo_line", "2"): "There is no room."}
    monkeypatch.setattr(registry._catalogue._store, "absent", lambda: absent)

    found = registry.rescan()
    with pytest.raises(StoreUnreachable, match=r"Version 2 could not be brought .* no room"):
        registry.activate("demo_line", "2")
    registry.activate("demo_line", "1")
    held_back = registry.rescan()

    assert (found.refused, held_back.refused) == ({("demo_line", "2"): "There is no room."}, {})
    assert 'flawline_versions_refused_total{engine="demo_line"} 1.0' in shelf.metrics()


def test_rescan_when_a_version_is_being_loaded_then_the_store_may_not_remove_it(shelf, monkeypatch):
    """Nor what is live, nor what somebody asks for: whoever looks meanwhile takes no file away that is being read."""
    registry, needed = shelf.load(), []
    monkeypatch.setattr(registry._catalogue._store, "refresh", needed.append)
    shelf.add("2")

    def ask(_bundle):
        with pytest.raises(UnknownVersion):
            registry.activate("demo_line", "9")

    shelf.before_open = ask

    registry.rescan()

    assert set(needed[-1].serving) == {("demo_line", version) for version in ("1", "2", "9")}


def test_rescan_when_nothing_came_then_nothing_is_loaded_again(shelf):
    """Looking is cheap: no engine is opened for what is live already."""
    registry = shelf.load()

    assert registry.rescan().activated == ()
    assert len(shelf.engines) == 1


def test_rescan_when_the_new_version_is_refused_then_nothing_changes_and_it_is_told(shelf):
    """A candidate that does not hold harms nobody: the line answers as before, and reason and metric say so."""
    registry = shelf.load()
    before = registry.serving("demo_line", None)
    assert 'flawline_versions_refused_total{engine="demo_line"} 0.0' in shelf.metrics()
    shelf.add_broken("2")

    found = registry.rescan()

    assert list(found.refused) == [("demo_line", "2")]
    assert registry.serving("demo_line", None) is before
    assert registry.is_ready
    assert shelf.states() == {"1": "live", "2": "refused"}
    assert "golden frame" in registry.versions("demo_line")[1].reason
    assert 'flawline_versions_refused_total{engine="demo_line"} 1.0' in shelf.metrics()
    assert shelf.engines[1].is_closed


def test_rescan_when_a_refused_version_is_as_it_was_then_it_is_not_tried_again_until_it_changes(shelf):
    """A half copied version costs one try, and is taken once it is whole."""
    registry = shelf.load()
    folder = shelf.add("2")
    report = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    registry.rescan()

    again = registry.rescan()
    (folder / "report.html").write_bytes(report)
    whole = registry.rescan()

    assert again.refused == {}
    assert whole.activated == (("demo_line", "2"),)


def test_rescan_when_a_version_changes_while_it_is_tried_then_it_is_tried_again(shelf):
    """What was refused is what lay there when it was read, not what its publisher has written since."""
    registry = shelf.load()
    folder = shelf.add("2")

    def be_mended(_bundle):
        os.utime(folder / "report.html")
        raise BundleRefused("Half of it was there.")

    shelf.before_open = be_mended
    refused = registry.rescan().refused
    shelf.before_open = lambda _bundle: None

    assert list(refused) == [("demo_line", "2")]
    assert registry.rescan().activated == (("demo_line", "2"),)


def test_rescan_when_a_new_line_is_refused_then_the_others_stay_ready(shelf):
    """A broken bundle that comes while others are served takes no pod down, and is listed with its reason."""
    registry = shelf.load()
    shelf.add_broken("1", "new_line")

    registry.rescan()

    assert registry.is_ready
    assert registry.status("new_line").state == "refused"


def test_rescan_when_a_line_was_refused_at_the_start_then_a_newer_version_serves_it(shelf):
    """A line that was down comes up with the version that is right, and the service becomes ready."""
    shelf.add_broken("2")
    registry = shelf.load()
    assert not registry.is_ready

    shelf.add("3")
    registry.rescan()

    assert registry.is_ready
    assert shelf.serving() == "3"


def test_rescan_when_told_to_wait_for_an_administrator_then_new_versions_are_only_listed(shelf):
    """Where nothing becomes live by itself, it does when it is activated."""
    registry = shelf.load(activates_newest=False)
    shelf.add("2")

    registry.rescan()
    waiting = shelf.states()
    registry.activate("demo_line", "2")

    assert waiting == {"1": "live", "2": "stored"}
    assert shelf.serving() == "2"


def test_rescan_when_the_store_can_not_be_asked_then_says_so_and_goes_on(shelf):
    """A bucket that is away is told to whoever asked, and counted; lines are served."""
    registry = shelf.load()
    store = registry._catalogue._store

    def refresh(_needed):
        raise StoreUnreachable("The bucket does not answer.")

    assert "flawline_store_reachable 1.0" in shelf.metrics()
    with pytest.MonkeyPatch.context() as away:
        away.setattr(store, "refresh", refresh)
        with pytest.raises(StoreUnreachable, match="bucket"):
            registry.rescan()
        assert registry.is_ready
        assert "flawline_store_unreachable_total 1.0" in shelf.metrics()
        assert "flawline_store_reachable 0.0" in shelf.metrics()

    registry.rescan()

    assert "flawline_store_unreachable_total 1.0" in shelf.metrics()
    assert "flawline_store_reachable 1.0" in shelf.metrics()


def test_rescan_when_the_directory_is_away_then_what_is_loaded_stays_ready_and_each_miss_is_counted(shelf, caplog):
    """A volume that is away takes no pod out of service that judges; what was hidden meanwhile comes with it."""
    registry = shelf.load()
    away = shelf.path.rename(shelf.path.with_name("away"))

    for _ in range(2):
        with pytest.raises(StoreUnreachable, match="can't be read: No such file"):
            registry.rescan()
    with pytest.raises(StoreUnreachable):
        registry.activate("demo_line", "2")
    with pytest.raises(StoreUnreachable):
        registry.load_line("other_line")

    assert (registry.is_ready, shelf.serving()) == (True, "1")
    assert "flawline_store_unreachable_total 4.0" in shelf.metrics()  # the others ask as well
    assert [record.message for record in caplog.records].count("the store can't be asked") == 1
    away.rename(shelf.path)
    shelf.add("2")
    assert registry.rescan().activated == (("demo_line", "2"),)


@pytest.mark.parametrize("is_removed", [False, True])
def test_rescan_when_one_folder_can_not_be_read_then_its_line_goes_on_and_that_is_counted_and_logged_once(
    shelf, caplog, is_removed
):
    """What hides new versions of one bundle is told like what hides those of all."""
    folder = shelf.add("1", "pair", lines=("left", "right")).parent
    registry = shelf.load()
    folder.chmod(0)

    with rights_of_an_ordinary_user():
        registry.rescan()
        registry.rescan()
        registry.load_line("demo_line")
        hidden = shelf.metrics()
    folder.chmod(0o700)
    if is_removed:
        shutil.rmtree(folder)
    registry.rescan()

    assert registry.is_ready
    assert "flawline_store_unreachable_total 2.0" in hidden
    assert "flawline_store_reachable 0.0" in hidden
    assert "flawline_store_reachable 1.0" in shelf.metrics()
    assert [record.message for record in caplog.records].count("a folder of the store can't be read") == 1


def test_rescan_when_the_store_was_away_at_the_start_then_all_its_lines_are_missed_until_they_serve(shelf):
    """A refused line is not taken for one that came late only because the store came late."""
    shelf.add_broken("1", "broken_line")
    away = shelf.path.rename(shelf.path.with_name("away"))
    registry = shelf.load(wanted=frozenset({"demo_line", "broken_line"}))
    at_first = registry.status("demo_line").reason
    away.rename(shelf.path)

    found = registry.rescan()

    assert at_first == "The store can't be read: No such file or directory."
    assert (found.activated, tuple(found.refused)) == ((("demo_line", "1"),), (("broken_line", "1"),))
    assert (shelf.serving(), registry.is_ready) == ("1", False)


def test_ready_when_the_store_was_away_at_the_start_and_one_version_was_activated_then_not_before_all_were_looked_for(
    shelf,
):
    """What serves says nothing of lines that nobody has looked for yet."""
    shelf.add("1", "other_line")
    away = shelf.path.rename(shelf.path.with_name("away"))
    registry = shelf.load()
    away.rename(shelf.path)

    registry.activate("demo_line", "1")
    at_first = (shelf.serving(), registry.is_ready)
    registry.try_again()

    assert at_first == ("1", False)
    assert (shelf.serving("other_line"), registry.is_ready) == ("1", True)


def test_roll_back_when_asked_then_the_version_before_is_live_without_being_loaded(shelf):
    """Stepping back takes one assignment, and what was left is not taken again by itself."""
    registry = shelf.load()
    shelf.add("2")
    registry.rescan()

    assert registry.roll_back("demo_line") == "1"

    assert len(shelf.engines) == 2
    assert registry.rescan().activated == ()
    assert shelf.states() == {"1": "live", "2": "stored"}
    shelf.add("3")
    assert registry.rescan().activated == (("demo_line", "3"),)


def test_rescan_when_the_live_version_is_gone_then_it_serves_on_and_that_is_told_until_another_one_does(shelf, caplog):
    """A hand that slipped takes no line out of service, and whoever revoked a version hears that it judges on."""
    registry = shelf.load()
    shelf.telemetry.watch_live_versions(lambda: registry.live_in_store)
    well = shelf.metrics()
    away = (shelf.path / "demo_line/1").rename(shelf.path / "demo_line/.1")

    for _ in range(2):
        registry.rescan()
    gone = (shelf.serving(), registry.is_ready, registry.versions("demo_line")[0].reason, shelf.metrics())
    away.rename(shelf.path / "demo_line/1")
    registry.rescan()
    back = (registry.versions("demo_line")[0].reason, shelf.metrics())
    shelf.add("2")
    shutil.rmtree(shelf.path / "demo_line/1")
    registry.rescan()

    told = 'flawline_live_version_in_store{engine="demo_line"}'
    assert f"{told} 1.0" in well
    assert gone[:2] == ("1", True)
    assert "removed from the store" in gone[2]
    assert f"{told} 0.0" in gone[3]
    assert [record.message for record in caplog.records].count("the live version is gone from the store") == 1
    assert back[0] is None
    assert f"{told} 1.0" in back[1]
    assert shelf.states() == {"2": "live"}
    assert f"{told} 1.0" in shelf.metrics()


def test_rescan_when_the_version_before_is_gone_then_nobody_is_judged_by_it_any_more(shelf):
    """What was revoked answers nobody who names it, and is stepped over on the way back."""
    registry = shelf.load()
    for version in ("2", "3"):
        shelf.add(version)
        registry.rescan()
    shutil.rmtree(shelf.path / "demo_line/2")

    registry.rescan()

    with pytest.raises(UnknownVersion):
        shelf.serving(version="2")
    assert registry.roll_back("demo_line") == "1"


def test_rescan_when_a_version_on_trial_is_gone_then_the_trial_ends(shelf):
    """Only what lies in the store is tried."""
    registry = shelf.load(activates_newest=False)
    shelf.add("2")
    registry.start_shadow("demo_line", "2")
    shutil.rmtree(shelf.path / "demo_line/2")

    registry.rescan()

    assert shelf.states() == {"1": "live"}
    assert registry.shadow_of("demo_line", "1", registry.serving("demo_line", None).default_policy) is None


def test_rescan_when_an_unloaded_version_is_gone_then_its_line_comes_back_by_another_one(shelf):
    """To unload a line is how its version is taken out of use before it is revoked."""
    registry = shelf.load()
    shelf.telemetry.watch_live_versions(lambda: registry.live_in_store)
    shelf.add("2")
    registry.rescan()
    registry.unload_line("demo_line")
    shutil.rmtree(shelf.path / "demo_line/2")
    registry.rescan()

    told = shelf.metrics()
    registry.load_line("demo_line")

    assert "flawline_live_version_in_store{" not in told
    assert shelf.serving() == "1"


def test_memory_when_the_live_version_is_gone_then_it_makes_no_room_since_it_could_not_come_back(crowded):
    """A line that is served is worth more than one that is not yet."""
    registry = crowded.registry
    shutil.rmtree(crowded.path / "plate/1")
    registry.rescan()

    crowded.want("cap")

    assert crowded.line_states() == {"cap": "unloaded", "plate": "ready"}


def test_start_when_the_version_that_was_live_is_gone_then_an_older_one_is_taken_and_told(shelf, tmp_path, caplog):
    """Whoever wants the older version removes the newer one; whoever did not mean to is told."""
    shelf.add("2")
    (tmp_path / "state").mkdir()
    shelf.load(state_directory=tmp_path / "state").close()
    shutil.rmtree(shelf.path / "demo_line/2")

    shelf.load(state_directory=tmp_path / "state")

    assert shelf.serving() == "1"
    assert [record.message for record in caplog.records].count("an older version is taken") == 1


def test_roll_back_when_several_versions_were_live_then_steps_back_one_at_a_time(shelf):
    """Versions are numbers: ten comes after nine, and the way back from it leads over nine to one."""
    registry = shelf.load()
    for version in ("9", "10"):
        shelf.add(version)
        assert registry.rescan().activated == (("demo_line", version),)

    assert [registry.roll_back("demo_line") for _ in range(2)] == ["9", "1"]


def test_roll_back_when_the_service_has_just_started_then_takes_the_next_older_of_the_store(shelf):
    """A restart forgets what was live before, and the store does not."""
    for version in ("9", "10", "11"):
        shelf.add(version)
    registry = shelf.load()

    assert [registry.roll_back("demo_line") for _ in range(3)] == ["10", "9", "1"]
    assert shelf.serving() == "1"
    with pytest.raises(UnknownVersion, match="no version before"):
        registry.roll_back("demo_line")


def test_roll_back_when_the_newest_version_was_refused_at_the_start_then_takes_the_one_before_it(shelf):
    """The way out of a line that is down because of its newest version."""
    shelf.add_broken("2")
    registry = shelf.load()

    before = registry.roll_back("demo_line")
    registry.rescan()

    assert (before, shelf.serving(), registry.is_ready) == ("1", "1", True)
    assert [one.version for one in registry.versions("demo_line") if one.is_held_back] == ["2"]


def test_roll_back_when_the_store_is_away_then_says_so(shelf):
    """No version is called missing while nobody can look."""
    registry = shelf.load()
    shelf.path.rename(shelf.path.with_name("away"))

    with pytest.raises(StoreUnreachable):
        registry.roll_back("demo_line")


def test_roll_back_when_the_version_before_is_spoilt_then_nothing_changes(shelf):
    """A way back that does not hold is refused, and the line goes on."""
    shelf.add("2")
    registry = shelf.load()
    (shelf.path / "demo_line" / "1" / "model.onnx").write_bytes(b"")

    with pytest.raises(BundleRefused):
        registry.roll_back("demo_line")
    assert shelf.serving() == "2"
    assert registry.is_ready
    assert shelf.states() == {"1": "refused", "2": "live"}


def test_roll_back_when_the_version_in_memory_answers_no_more_then_nothing_changes(shelf):
    """What was proved when it was loaded is proved again before it serves once more."""
    registry = shelf.load()
    shelf.add("2")
    registry.rescan()

    def fail():
        raise EngineFailed("The device does not answer.")

    shelf.on_run = fail

    with pytest.raises(EngineFailed):
        registry.roll_back("demo_line")
    assert shelf.states() == {"1": "kept", "2": "live"}


def test_roll_back_when_another_bundle_serves_one_of_its_lines_by_now_then_is_refused(tmp_path):
    """No line changes its bundle unasked, whether the version to go back to is in memory or not."""
    shelf = Shelf(tmp_path)
    shelf.add("1", "pair", lines=("left", "right"))
    registry = shelf.load()
    shelf.add("2", "pair", lines=("left",))
    registry.rescan()
    shelf.add("1", "right")
    registry.rescan()

    with pytest.raises(BundleRefused, match="right serves right already"):
        registry.roll_back("pair")

    assert registry.status("right").bundle == "right"
    assert shelf.serving("left") == "2"
    registry.close()


def test_rescan_when_a_line_comes_to_be_served_by_another_bundle_meanwhile_then_the_new_one_is_refused(tmp_path):
    """Who goes back while a bundle loads decides, and what was loaded for nothing gives its memory back."""
    shelf = Shelf(tmp_path)
    shelf.add("1", "pair", lines=("left", "right"))
    registry = shelf.load()
    shelf.add("2", "pair", lines=("left",))
    registry.rescan()
    shelf.add("1", "right")
    shelf.before_open = lambda _bundle: registry.roll_back("pair")

    found = registry.rescan()

    assert found.refused == {("right", "1"): "pair serves right already; remove one."}
    assert registry.status("right").bundle == "pair"
    assert [engine.is_closed for engine in shelf.engines] == [False, False, True]
    registry.close()


def test_roll_back_when_the_version_before_could_not_be_brought_then_none_is_passed_over(shelf, monkeypatch):
    """Who steps back means the version before, and not one that lies here by chance."""
    shelf.add("3")
    registry = shelf.load()
    monkeypatch.setattr(registry._catalogue._store, "absent", lambda: {("demo_line", "2"): "There is no room."})

    with pytest.raises(StoreUnreachable, match="There is no room"):
        registry.roll_back("demo_line")

    assert shelf.serving() == "3"


def test_activate_when_an_older_version_is_named_then_it_stays_live(shelf):
    """What somebody chose by name is not replaced by what was there already."""
    shelf.add("2")
    registry = shelf.load()

    registry.activate("demo_line", "1")

    assert registry.rescan().activated == ()
    assert shelf.serving() == "1"
    with pytest.raises(UnknownVersion):
        registry.activate("demo_line", "9")
    make_bundle(shelf.path.parent, "beside", "1")
    with pytest.raises(UnknownVersion):
        registry.activate("../beside", "1")


@in_loop
async def test_swap_when_a_frame_is_under_way_then_its_engine_is_closed_only_after_it(tmp_path):
    """A frame ends on the engine that admitted it; engines end when nobody is on them, and not before."""
    shelf = Shelf(tmp_path)
    shelf.add("1")
    registry = shelf.load(keeps_previous=False)
    old = registry.serving("demo_line", None).bundle
    shelf.add("2")

    with old.batcher.place(time.monotonic() + 20, line="demo_line") as place:
        registry.rescan()
        registry.tend()
        assert not shelf.engines[0].is_closed
        result = await old.batcher.submit(place, np.full((1, 32, 48, 3), 110, np.uint8), 0)
    registry.tend()

    assert np.isfinite(result.scores).all()
    assert (shelf.serving(), shelf.engines[0].is_closed, shelf.engines[1].is_closed) == ("2", True, False)
    with pytest.raises(UnknownVersion):
        registry.serving("demo_line", "1")
    registry.close()


@in_loop
async def test_drain_when_a_frame_is_on_a_replaced_version_then_waits_for_its_answer(tmp_path):
    """A stop that comes just behind a swap loses no frame of the version before."""
    shelf = Shelf(tmp_path)
    shelf.add("1")
    registry = shelf.load(keeps_previous=False)
    old = registry.serving("demo_line", None).bundle.batcher
    shelf.add("2")

    with old.place(time.monotonic() + 20, line="demo_line"):
        registry.rescan()
        draining = asyncio.create_task(registry.drain())
        await asyncio.sleep(0)
        waits = not draining.done()

    await draining
    assert waits
    registry.close()


def test_policy_when_a_file_appears_then_it_is_offered_and_may_be_made_the_default(shelf):
    """Policies come without a restart; which one judges is changed in one assignment."""
    registry = shelf.load()
    shelf.add_policy("strict", fail_threshold=0.15)

    found = registry.rescan()
    registry.activate_policy("demo_line", "strict")

    assert found.policies == (("demo_line", "strict"),)
    assert registry.find("demo_line", None, None).policy.policy.fail_threshold == 0.15
    assert 'policy="strict"' in shelf.metrics()
    with pytest.raises(UnknownPolicy):
        registry.activate_policy("demo_line", "absent")


def test_policy_when_a_new_version_becomes_live_then_its_own_judges(shelf):
    """Thresholds that somebody set for one network say nothing of another's scores."""
    registry = shelf.load()
    shelf.add_policy("lax", shelf.network(), fail_threshold=0.9)
    registry.activate_policy("demo_line", "lax")
    shelf.add("2")

    registry.rescan()
    new = registry.find("demo_line", None, None).policy.policy.version
    registry.roll_back("demo_line")

    assert new == "1"
    assert registry.find("demo_line", None, None).policy.policy.version == "lax"


def test_policy_when_the_line_is_not_calibrated_then_one_that_needs_it_is_no_default(tmp_path):
    """A policy that could not judge is not made the one that does."""
    shelf = Shelf(tmp_path)
    shelf.add("1", calibrated=False)
    registry = shelf.load()
    shelf.add_policy("strict")

    with pytest.raises(LineNotCalibrated):
        registry.activate_policy("demo_line", "strict")
    registry.close()


def test_shadow_when_on_then_loaded_beside_and_answers_nobody_by_itself(shelf):
    """A candidate looks on; the live one serves, until the candidate is activated, which needs no loading."""
    shelf.add("2")
    registry = shelf.load()
    registry.activate("demo_line", "1")
    live = registry.serving("demo_line", None)

    registry.start_shadow("demo_line", "2")

    assert registry.serving("demo_line", None) is live
    assert registry.shadow_of("demo_line", "1", "1") == (live, registry._state.shadows["demo_line"].lines["demo_line"])
    assert registry.shadow_of("demo_line", "1", "another policy") is None
    assert shelf.states() == {"1": "live", "2": "shadow"}
    with pytest.raises(UnknownVersion, match="live"):
        registry.start_shadow("demo_line", "1")
    opened = len(shelf.engines)
    registry.activate("demo_line", "2")
    assert len(shelf.engines) == opened
    assert registry.shadow_of("demo_line", "2", "1") is None
    shelf.add("3")
    registry.rescan()
    assert registry.shadow_of("demo_line", "3", "1") is None


def test_shadow_when_off_then_its_engine_is_closed(shelf):
    """A candidate that is not wanted any more gives its memory back."""
    registry = shelf.load(activates_newest=False)
    shelf.add("2")
    registry.start_shadow("demo_line", "2")
    registry.tend()
    assert (shelf.states(), shelf.engines[1].is_closed) == ({"1": "live", "2": "shadow"}, False)

    registry.stop_shadow("demo_line")
    registry.tend()

    assert shelf.states() == {"1": "live", "2": "stored"}
    assert [engine.is_closed for engine in shelf.engines] == [False, True]


def test_shadow_when_another_one_is_tried_or_the_line_is_unloaded_then_it_is_closed_and_looks_no_more(shelf):
    """One candidate looks on at a time, and none at a line that is out of service."""
    registry = shelf.load(activates_newest=False)
    for version in ("2", "3"):
        shelf.add(version)
        registry.start_shadow("demo_line", version)
    registry.tend()
    assert [engine.is_closed for engine in shelf.engines] == [False, True, False]

    registry.unload_line("demo_line")
    registry.load_line("demo_line")
    registry.tend()

    assert [engine.is_closed for engine in shelf.engines] == [True, True, True, False]
    assert registry.shadow_of("demo_line", "1", "1") is None


def test_shadow_when_it_is_not_calibrated_then_refused_and_not_kept(shelf):
    """A candidate that could give no verdict on any frame says so at once, and takes no memory."""
    registry = shelf.load(activates_newest=False)
    shelf.add("2", calibrated=False)

    with pytest.raises(LineNotCalibrated, match="flawline calibrate"):
        registry.start_shadow("demo_line", "2")
    registry.tend()

    assert registry.shadow_of("demo_line", "1", "1") is None
    assert shelf.states() == {"1": "live", "2": "stored"}
    assert [engine.is_closed for engine in shelf.engines] == [False, True]


def test_memory_when_the_budget_is_full_then_the_line_not_asked_for_makes_room_and_comes_back(tmp_path):
    """Lines beyond the budget are unloaded, and loaded again by the first frame, which is told to come back."""
    shelf = Shelf(tmp_path)
    for name in ("one", "two", "three"):
        shelf.add("1", name)
        shelf.sizes[name] = 100
    registry = shelf.load(budget_bytes=250)

    states = {status.line: status.state for status in registry.statuses()}
    assert states == {"one": "unloaded", "three": "ready", "two": "ready"}
    assert registry.is_ready
    registry.serving("three", None)
    with pytest.raises(LineLoading) as refused:
        registry.serving("one", None)
    assert refused.value.retry_after_s >= 1
    wait_until(lambda: registry.status("one").state == "ready", "the line")
    registry.tend()

    assert sum(not engine.is_closed for engine in shelf.engines) == 2
    assert shelf.line_states() == {"one": "ready", "three": "ready", "two": "unloaded"}
    assert "flawline_engine_unloads_total" in shelf.metrics()
    shelf.want("two")  # the line that has just come stays until its frame is here again
    assert shelf.line_states() == {"one": "ready", "three": "unloaded", "two": "ready"}
    registry.close()


def test_memory_when_a_new_version_of_a_line_has_no_room_beside_the_live_one_then_that_one_stays(shelf):
    """A line is never out of service for the sake of its own next version."""
    shelf.sizes = {"demo_line": 100}
    registry = shelf.load(budget_bytes=150)
    shelf.add("2")

    (reason,) = registry.rescan().refused.values()

    assert "FLAWLINE_MEMORY_BUDGET_BYTES" in reason
    assert (shelf.serving(), registry.is_ready) == ("1", True)


def test_memory_when_a_shadow_makes_room_then_it_looks_at_no_frame_any_more(shelf):
    """Who serves nobody leaves first, and is not shown what its closed engine could not look at."""
    shelf.sizes = {"demo_line": 100, "other_line": 100}
    registry = shelf.load(budget_bytes=250, activates_newest=False)
    shelf.add("2")
    registry.start_shadow("demo_line", "2")
    shelf.add("1", "other_line")

    registry.rescan()

    assert shelf.line_states() == {"demo_line": "ready", "other_line": "ready"}
    assert registry.shadow_of("demo_line", "1", "1") is None


def test_memory_when_loading_takes_more_than_is_promised_then_that_counts(tmp_path, monkeypatch):
    """The budget holds for what engines really take, closed ones meanwhile left out, and everybody is told it."""
    shelf = Shelf(tmp_path)
    for name in ("one", "two", "three"):
        shelf.add("1", name)
        shelf.sizes[name] = 10
    held = iter([1000, 1100, 1100, 1200, 1200, 1300])
    monkeypatch.setattr("service.lines.residence.held_bytes", lambda: next(held))

    registry = shelf.load(budget_bytes=250, weighs_engines=True)

    assert shelf.line_states() == {"one": "unloaded", "three": "ready", "two": "ready"}
    assert [one.size_bytes for one in registry.versions("two")] == [100]
    told = [line for line in shelf.metrics().splitlines() if line.startswith("flawline_engine_memory")]
    assert sorted(told) == [
        "flawline_engine_memory_budget_bytes 250.0",
        'flawline_engine_memory_bytes{engine="three",version="1"} 100.0',
        'flawline_engine_memory_bytes{engine="two",version="1"} 100.0',
    ]
    registry.close()


def test_memory_when_a_network_will_outgrow_its_file_then_room_is_made_before_it_is_opened(tmp_path, monkeypatch):
    """What engines take beyond their files was seen on the others, and must not be there twice for a moment."""
    shelf = Shelf(tmp_path)
    sizes = [(shelf.add("1", name) / "model.onnx").stat().st_size for name in ("one", "two", "zone")]
    held = iter([0, 2, 2, 4, 4, 6])  # files' worth
    monkeypatch.setattr("service.lines.residence.held_bytes", lambda: next(held) * max(sizes))
    in_memory = []
    shelf.before_open = lambda _bundle: in_memory.append(
        [line for line, state in shelf.line_states().items() if state == "ready"] if shelf.registry else []
    )

    registry = shelf.load(budget_bytes=5 * max(sizes), weighs_engines=True)

    assert in_memory == [[], ["one"], ["two"]]
    registry.close()


def test_memory_when_another_engine_is_closed_meanwhile_then_its_memory_is_no_part_of_the_new_one(
    tmp_path, monkeypatch
):
    """What the one before gave back would hide what the new one takes."""
    shelf = Shelf(tmp_path)
    shelf.add("1")
    held = iter([1000, 1100, 1100, 1110])
    monkeypatch.setattr("service.lines.residence.held_bytes", lambda: next(held))
    registry = shelf.load(weighs_engines=True, keeps_previous=False)
    registry._retire([VersionKey("demo_line", "1")])
    shelf.before_open = lambda _bundle: registry.tend()
    shelf.add("2")

    registry.rescan()

    assert registry.versions("demo_line")[-1].size_bytes == 100
    registry.close()


def test_memory_when_a_line_comes_back_then_the_policy_that_was_chosen_for_it_still_judges(tmp_path):
    """Making room must not change what a line is judged by."""
    shelf = Shelf(tmp_path)
    for name in ("demo_line", "other"):
        shelf.add("1", name)
        shelf.sizes[name] = 100
    shelf.add_policy("strict", fail_threshold=0.15)
    registry = shelf.load(budget_bytes=150)

    def bring_back(line):
        with pytest.raises(LineLoading):
            registry.find(line, None, None)
        wait_until(lambda: registry.status(line).state == "ready", "the line")

    bring_back("demo_line")
    registry.activate_policy("demo_line", "strict")
    bring_back("other")
    bring_back("demo_line")

    assert registry.find("demo_line", None, None).policy.policy.version == "strict"
    registry.close()


@pytest.fixture
def crowded(tmp_path):
    """Return a loaded shelf with two lines and memory for one: `plate` is served, `cap` made room for it."""
    shelf = Shelf(tmp_path / "store")
    shelf.now = 1000.0
    for name in ("cap", "plate"):
        shelf.sizes[name] = (shelf.add("1", name) / "model.onnx").stat().st_size
    shelf.load(budget_bytes=3 * shelf.sizes["cap"] // 2)
    assert shelf.line_states() == {"cap": "unloaded", "plate": "ready"}
    yield shelf
    shelf.registry.close()


def never_a_gap(shelf):
    """Have other lines leave no gap, and return the list of what was waited for one, in seconds."""
    waited = []

    def wait_for_gap(longest_s):
        shelf.now += longest_s
        waited.append(longest_s)
        return False

    shelf.registry._loader._running.wait_for_gap = wait_for_gap
    return waited


def test_gaps_when_nobody_waits_for_a_version_then_its_runs_wait_half_a_minute_in_all(shelf):
    """A version that comes beside the live one gives way, and comes in the end."""
    shelf.now = 1000.0
    registry = shelf.load()
    waited = never_a_gap(shelf)
    shelf.add("2")

    assert registry.rescan().activated == (("demo_line", "2"),)
    assert sum(waited) == pytest.approx(30.0, abs=0.01)


def test_gaps_when_a_camera_waits_for_the_line_then_its_runs_hardly_wait_for_any(crowded):
    """Its frames have no verdict until it is back, and were told to come again in a moment."""
    waited = never_a_gap(crowded)

    crowded.want("cap")

    assert crowded.line_states()["cap"] == "ready"
    assert sum(waited) == pytest.approx(1.0, abs=0.01)


def test_gaps_when_an_administrator_waits_for_a_version_then_its_runs_hardly_wait_for_any(shelf):
    """Going back to a version that is not in memory is how a line is mended."""
    shelf.now = 1000.0
    registry = shelf.load(activates_newest=False)
    waited = never_a_gap(shelf)
    shelf.add("2")

    registry.activate("demo_line", "2")

    assert sum(waited) == pytest.approx(1.0, abs=0.01)


def test_gaps_when_a_camera_comes_to_wait_behind_a_load_then_that_one_hurries_too(crowded):
    """One version is loaded at a time, so that what waits for the next one waits for this one."""
    waited = never_a_gap(crowded)
    loading, give_up = crowded.registry._loading, crowded.registry._loader._running.wait_for_gap

    def wait_for_gap(longest_s):
        if not waited:
            with pytest.raises(LineLoading):
                crowded.registry.serving("cap", None)
            wait_until(lambda: loading.is_awaited, "the camera's load")
        return give_up(longest_s)

    crowded.registry._loader._running.wait_for_gap = wait_for_gap
    crowded.sizes["zone"] = crowded.sizes["cap"]
    crowded.add("1", "zone")

    assert crowded.registry.rescan().activated == (("zone", "1"),)
    wait_until(lambda: "cap" not in crowded.registry._asked_again, "the load")

    assert crowded.line_states()["cap"] == "ready"
    assert sum(waited) <= 2.01


def test_memory_when_a_line_is_swapped_in_then_the_pod_stays_ready_and_the_line_is_loading(crowded):
    """An ordinary swap is no fault: what waits for a frame, or is on its way, is served."""
    seen = []
    crowded.before_open = lambda _bundle: seen.append((crowded.registry.is_ready, crowded.line_states()))

    crowded.want("cap")

    assert seen == [(True, {"cap": "loading", "plate": "unloaded"})]
    assert crowded.line_states() == {"cap": "ready", "plate": "unloaded"}


def _hide_maps(shelf):
    maps = shelf.path / "cap" / "1" / "golden" / "maps.npz"
    hidden = maps.rename(shelf.path / "hidden")
    return lambda: hidden.rename(maps)


def _hide_store(shelf):
    away = shelf.path.rename(shelf.path.with_name("away"))
    return lambda: away.rename(shelf.path)


@pytest.mark.parametrize("hide", [_hide_maps, _hide_store])
@pytest.mark.parametrize("by", ["try_again", "rescan", "frame"])
def test_memory_when_a_line_can_not_be_read_on_its_way_back_then_nothing_makes_room_and_it_comes_back_later(
    crowded, hide, by
):
    """Two seconds without the store take no line down for good, and the line in memory not at all."""
    registry, bring_back = crowded.registry, hide(crowded)

    first = crowded.want("cap")
    during = (crowded.line_states(), registry.is_ready, crowded.serving("plate"))
    second = crowded.want("cap")
    bring_back()
    crowded.now += 1
    if by == "frame":
        crowded.want("cap")
    else:
        getattr(registry, by)()

    assert isinstance(first, LineLoading)
    assert during == ({"cap": "unloaded", "plate": "ready"}, True, "1")
    assert not isinstance(second, LineLoading)
    assert 0 < second.retry_after_s <= 1
    assert "could not come back" in second.sentence
    assert 'flawline_versions_refused_total{engine="cap"} 1.0' in crowded.metrics()
    assert (crowded.serving("cap"), registry.is_ready) == ("1", True)


def test_memory_when_the_store_is_away_and_a_bundle_of_several_lines_is_wanted_then_each_of_them_says_so(tmp_path):
    """Which lines a bundle serves is known from when it served them, though its manifest can't be read now."""
    shelf = Shelf(tmp_path / "store")
    shelf.sizes = {"pair": 100, "plate": 100}
    shelf.add("1", "pair", lines=("left", "right"))
    shelf.add("1", "plate")
    registry = shelf.load(budget_bytes=150)
    _hide_store(shelf)

    with pytest.raises(LineLoading):
        registry.serving("left", None)
    wait_until(lambda: "pair" not in registry._asked_again, "the load")

    assert shelf.line_states() == {"left": "unloaded", "plate": "ready", "right": "unloaded"}
    assert "could not come back" in registry.status("right").reason
    registry.close()


def test_memory_when_no_engine_can_be_opened_then_the_pod_is_not_ready_until_one_can_and_no_frame_is_needed(crowded):
    """A pod that could not answer any line gets no frames, so that it has to try by itself; later and later."""

    def fail(_bundle):
        raise MemoryError

    crowded.before_open = fail
    crowded.want("cap")
    one_failed = (crowded.line_states(), crowded.registry.is_ready)
    crowded.want("plate")
    tries = len(crowded.engines)
    for _ in range(40):
        crowded.now += 300
        crowded.registry.try_again()
    all_failed = (crowded.line_states(), crowded.registry.is_ready)
    crowded.before_open = lambda _bundle: None
    crowded.now += 300
    crowded.registry.try_again()

    assert one_failed == ({"cap": "unloaded", "plate": "unloaded"}, True)  # `plate` waits for its next frame
    assert all_failed == ({"cap": "unloaded", "plate": "unloaded"}, False)
    assert len(crowded.engines) > tries
    assert crowded.registry.is_ready


def test_memory_when_a_line_comes_back_then_its_camera_is_told_to_wait_as_long_as_the_last_load_took(crowded):
    """A camera that asks again too soon asks in vain, and one that waits too long has parts without a verdict."""

    def take_seven_seconds(_bundle):
        crowded.now += 7

    crowded.before_open = take_seven_seconds
    crowded.want("cap")
    crowded.want("plate")

    assert crowded.want("cap").retry_after_s == pytest.approx(7, abs=0.01)


def test_memory_when_the_last_load_gave_way_to_frames_then_a_camera_is_not_told_to_wait_as_long(crowded):
    """What nobody waited for took half a minute beside frames; for the camera it takes a moment."""
    waited = never_a_gap(crowded)
    crowded.sizes["zone"] = crowded.sizes["cap"]
    crowded.add("1", "zone")
    crowded.registry.rescan()
    gave_way_s = sum(waited)
    crowded.want("plate")

    told_s = crowded.want("zone").retry_after_s

    assert gave_way_s == pytest.approx(30.0, abs=0.01)
    assert told_s == pytest.approx(1.0, abs=0.01)


def test_memory_when_no_thread_can_be_begun_for_a_line_then_the_next_frame_asks_again(crowded, monkeypatch):
    """A machine that was full for a moment keeps no line away for good."""

    def fail(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", fail)
        with pytest.raises(LineLoading):
            crowded.registry.serving("cap", None)

    crowded.want("cap")

    assert crowded.serving("cap") == "1"


def test_memory_when_a_waiting_line_gets_a_newer_version_that_is_refused_then_it_comes_back_as_it_was(crowded):
    """A version that does not hold changes nothing, whether the one before it is in memory or waits for a frame."""
    crowded.add_broken("2", "cap")

    found = crowded.registry.rescan()

    assert tuple(found.refused) == (("cap", "2"),)
    assert (crowded.line_states()["cap"], crowded.registry.is_ready) == ("unloaded", True)
    crowded.want("cap")
    assert crowded.serving("cap") == "1"


def test_memory_when_a_line_does_not_hold_on_its_way_back_then_it_is_refused_until_it_changes(crowded):
    """What is wrong with the bundle itself is no fault that passes: the pod says that it misses the line."""
    model = crowded.path / "cap" / "1" / "model.onnx"
    held = model.read_bytes()
    model.write_bytes(make_graph(reference=0.5))
    crowded.want("cap")
    refused = (crowded.line_states(), crowded.registry.is_ready)
    crowded.now += 1e6
    crowded.registry.try_again()
    crowded.registry.rescan()
    tried = crowded.metrics()
    model.write_bytes(held)
    crowded.registry.try_again()

    assert refused == ({"cap": "refused", "plate": "ready"}, False)
    assert 'flawline_versions_refused_total{engine="cap"} 1.0' in tried
    assert (crowded.serving("cap"), crowded.registry.is_ready) == ("1", True)
    crowded.want("plate")
    crowded.registry.try_again()  # what holds again is no fault any more, and waits for its frame
    assert crowded.line_states() == {"cap": "unloaded", "plate": "ready"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "too little memory"),
        (BundleRefused("The runtime can't load model.onnx."), "too little memory"),
        (RuntimeError("can't start new thread"), "in a way that nobody foresaw"),
    ],
    ids=["python", "runtime", "unforeseen"],
)
def test_load_when_the_machine_is_at_fault_then_it_is_said_and_counted_and_tried_again_with_an_end(
    shelf, error, reason
):
    """Nothing is said against the bundle, and nobody has to touch it; but a machine that never can is left alone."""
    tries = []

    def fail(bundle):
        tries.append(bundle)
        raise error from RuntimeError("std::bad_alloc") if isinstance(error, BundleRefused) else None

    shelf.before_open, shelf.now = fail, 1000.0
    registry = shelf.load()
    said = registry.status("demo_line").reason
    registry.try_again()  # too early
    at_first = len(tries)
    for _ in range(20):
        shelf.now += 300
        registry.try_again()
        registry.rescan()
    given_up = len(tries)
    shelf.before_open = lambda _bundle: None
    registry.rescan()
    left_alone = registry.is_ready
    os.utime(shelf.path / "demo_line" / "1" / "model.onnx")
    registry.rescan()

    assert reason in said
    assert "export" not in said
    assert (at_first, given_up) == (1, 10)
    assert 'flawline_versions_refused_total{engine="demo_line"} 10.0' in shelf.metrics()
    assert (left_alone, registry.is_ready) == (False, True)


def test_load_when_the_machine_stays_at_fault_then_each_pause_is_twice_the_one_before(shelf):
    """A pod that can't load reads its store seldom, not every second; a changed version begins anew."""
    tries = []

    def fail(_bundle):
        tries.append(round(shelf.now))
        raise MemoryError

    shelf.before_open, shelf.now = fail, 0.0
    registry = shelf.load()
    for second in range(1, 18):
        shelf.now = 1.001 * second
        registry.try_again()
    os.utime(shelf.path / "demo_line" / "1" / "model.onnx")
    for second in (18, 19):
        shelf.now = 1.001 * second
        registry.rescan()

    assert tries == [0, 1, 3, 7, 15, 18, 19]


def test_load_when_the_machine_never_can_load_the_newest_version_then_the_one_before_serves_in_the_end(shelf):
    """A restart with a version that is too large here goes on with what was live, once it has tried for long."""
    shelf.load(state_directory=shelf.path.parent).close()
    shelf.add("2")

    def fail(bundle):
        if bundle.manifest.version == "2":
            raise MemoryError

    shelf.before_open, shelf.now = fail, 1000.0
    registry = shelf.load(state_directory=shelf.path.parent)
    at_first = registry.is_ready
    for _ in range(10):
        shelf.now += 300
        registry.try_again()

    assert not at_first
    assert (shelf.serving(), registry.is_ready) == ("1", True)


def test_memory_when_lines_are_pinned_then_they_stay_and_what_does_not_fit_is_refused(tmp_path):
    """A pinned line is never unloaded; one that can't fit beside it says what to change."""
    shelf = Shelf(tmp_path)
    shelf.add("1", "kept")
    shelf.sizes = {"kept": 100, "large": 200}
    shelf.add("1", "large")
    registry = shelf.load(budget_bytes=250, pinned=frozenset({"kept"}))

    assert registry.status("kept").state == "ready"
    assert "FLAWLINE_MEMORY_BUDGET_BYTES" in registry.status("large").reason
    assert [engine.is_closed for engine in shelf.engines] == [False, True]
    registry.close()


def test_unload_when_asked_then_the_line_answers_nobody_until_it_is_loaded_again(tmp_path):
    """An administrator's unloading lasts: no frame and no look at the store brings the line back."""
    shelf = Shelf(tmp_path)
    shelf.add("1", "pair", lines=("left", "right"), conditional=True)
    registry = shelf.load()

    registry.unload_line("left")
    registry.rescan()

    with pytest.raises(LineNotReady, match="unloaded"):
        registry.serving("left", None)
    with pytest.raises(LineNotReady, match="unloaded"):
        registry.activate_policy("left", "1")
    assert (shelf.serving("right"), registry.status("left").state) == ("1", "unloaded")
    registry.unload_line("right")
    registry.tend()
    assert shelf.engines[0].is_closed
    assert not registry.is_ready
    registry.load_line("left")
    assert (shelf.serving("left"), registry.status("right").state) == ("1", "unloaded")
    with pytest.raises(UnknownLine):
        registry.load_line("nobody")
    registry.close()


def test_unload_when_the_other_line_of_its_bundle_is_refused_for_a_while_then_it_stays_unloaded(tmp_path):
    """What an administrator took out is not missed, whatever becomes of what would serve it."""
    shelf = Shelf(tmp_path / "store")
    shelf.now = 1000.0
    shelf.sizes = {"pair": 100, "plate": 100}
    model = shelf.add("1", "pair", lines=("left", "right")) / "model.onnx"
    shelf.add("1", "plate")
    registry = shelf.load(budget_bytes=150)
    registry.unload_line("left")
    held = model.read_bytes()
    model.write_bytes(make_graph(reference=0.5))
    with pytest.raises(LineLoading):
        registry.serving("right", None)
    wait_until(lambda: "pair" not in registry._asked_again, "the load")
    at_first = shelf.line_states()
    model.write_bytes(held)

    registry.try_again()

    assert at_first == {"left": "unloaded", "plate": "ready", "right": "refused"}
    assert (shelf.line_states()["left"], shelf.serving("right"), registry.is_ready) == ("unloaded", "1", True)
    registry.close()


def test_metrics_when_nothing_serves_a_line_any_more_then_no_series_says_what_does(crowded):
    """A line that was taken out, or made room for others, must not look served by what served it last."""

    def told():
        return [
            line.split('line="')[1].split('"')[0]
            for line in crowded.metrics().splitlines()
            if line.startswith("flawline_model_info{")
        ]

    at_first = told()
    crowded.want("cap")
    swapped = told()
    crowded.registry.unload_line("cap")
    unloaded = told()
    crowded.registry.load_line("cap")

    assert (at_first, swapped, unloaded, told()) == (["plate"], ["cap"], [], ["cap"])


def test_load_line_when_the_newest_version_is_spoilt_then_it_stays_unloaded(shelf):
    """What is refused changes nothing: no frame brings a line back that an administrator took out of service."""
    registry = shelf.load()
    registry.unload_line("demo_line")
    shelf.add_broken("2")

    with pytest.raises(BundleRefused):
        registry.load_line("demo_line")

    with pytest.raises(LineNotReady, match="unloaded by an administrator"):
        registry.serving("demo_line", None)
    registry.rescan()
    assert registry.status("demo_line").state == "unloaded"


def test_load_line_when_the_newest_version_does_not_serve_it_then_says_so_and_it_stays_unloaded(tmp_path):
    """A line that its bundle has left is not told as loaded."""
    shelf = Shelf(tmp_path)
    shelf.add("1", "pair", lines=("left", "right"))
    registry = shelf.load()
    registry.unload_line("right")
    shelf.add("2", "pair", lines=("left",))

    with pytest.raises(UnknownLine, match="Version 2 of pair does not serve"):
        registry.load_line("right")

    assert registry.status("right").state == "unloaded"
    registry.close()


def test_ready_when_a_wanted_line_is_left_out_by_a_new_version_then_not_until_one_serves_it(tmp_path):
    """What is named to be served is missed from the moment it is not, as it would be after a restart."""
    shelf = Shelf(tmp_path)
    shelf.add("1", "pair", lines=("left", "right"))
    registry = shelf.load(wanted=frozenset({"left", "right"}))
    shelf.add("2", "pair", lines=("left",))

    registry.rescan()

    assert (shelf.serving("left"), registry.is_ready) == ("2", False)
    with pytest.raises(LineNotReady, match="Version 2 of pair does not serve the line"):
        registry.serving("right", None)
    registry.roll_back("pair")
    assert (shelf.serving("right"), registry.is_ready) == ("1", True)
    registry.close()


def test_ready_when_a_line_that_came_late_was_served_and_is_refused_then_not(tmp_path):
    """Once a late line has been served, it is missed like any other."""
    shelf = Shelf(tmp_path)
    shelf.sizes = {"old": 100, "late": 100}
    shelf.add("1", "old")
    registry = shelf.load(budget_bytes=150)
    shelf.add_broken("1", "late")
    registry.rescan()
    refused_late = (registry.status("late").state, registry.is_ready)
    shelf.add("2", "late")
    registry.rescan()
    (shelf.path / "late" / "2" / "model.onnx").write_bytes(b"")

    for line in ("old", "late"):  # the first takes the room of the second
        with pytest.raises(LineLoading):
            registry.serving(line, None)
        wait_until(lambda line=line: registry.status(line).state in ("ready", "refused"), "the line")

    assert refused_late == ("refused", True)
    assert (registry.status("late").state, registry.status("old").state) == ("refused", "ready")
    assert not registry.is_ready
    registry.close()


def test_load_line_when_the_newest_version_has_come_to_serve_it_then_takes_that(tmp_path):
    """A line that nobody has looked for yet is found where it is served by now."""
    shelf = Shelf(tmp_path)
    shelf.add("1", "pair", lines=("left",))
    registry = shelf.load()
    shelf.add("2", "pair", lines=("left", "right"))

    registry.load_line("right")

    assert (shelf.serving("left"), shelf.serving("right")) == ("2", "2")
    registry.close()


def test_load_line_when_a_newer_version_lies_there_then_takes_it(shelf):
    """Loading a line that is served asks the store for what is new."""
    registry = shelf.load()
    shelf.add("2")

    registry.load_line("demo_line")

    assert shelf.serving() == "2"
    assert registry.lines_of("demo_line") == ("demo_line",)
    with pytest.raises(UnknownBundle):
        registry.lines_of("nobody")


def test_load_line_when_a_still_newer_version_comes_while_one_is_loaded_then_takes_that_and_closes_the_other(shelf):
    """What was opened and is not wanted any more gives its memory back."""
    registry = shelf.load()
    shelf.add("2")
    shelf.before_open = lambda bundle: bundle.manifest.version == "2" and shelf.add("3")

    registry.load_line("demo_line")

    assert shelf.serving() == "3"
    assert [(engine.version, engine.is_closed) for engine in shelf.engines] == [("1", False), ("2", True), ("3", False)]


@in_loop
async def test_distrust_when_an_engine_says_other_things_then_the_line_is_unhealthy_and_the_process_goes_on(tmp_path):
    """An engine that runs and answers wrongly answers nobody; loading the version again proves it anew."""
    shelf = Shelf(tmp_path)
    shelf.add("1")
    registry = shelf.load()
    registry.serving("demo_line", None).bundle.batcher.distrust("The golden frame differs.")

    assert registry.status("demo_line").reason == "The golden frame differs."
    assert (registry.is_ready, registry.is_lost) == (False, False)
    await asyncio.to_thread(registry.activate, "demo_line", "1")
    assert registry.is_ready
    registry.tend()
    assert [engine.is_closed for engine in shelf.engines] == [True, False]
    registry.close()


def offered(registry, version=None):
    """Return the policies that the line may be judged by."""
    return sorted(registry.serving("demo_line", version).policies)


def test_policy_when_it_was_written_for_another_network_then_it_judges_no_frame_of_this_one(shelf):
    """Thresholds of another network's scores could pass everything; they wait until that network serves."""
    shelf.add("2", reference=0.3, policy={"review_threshold": 0.7, "fail_threshold": 0.8})
    shelf.add_policy("night", shelf.network("2"), review_threshold=9.0, fail_threshold=9.0)
    registry = shelf.load()
    by_its_own = registry.find("demo_line", None, "night").policy.policy.fail_threshold

    registry.activate("demo_line", "1")
    registry.rescan()

    assert by_its_own == 9.0
    for version in (None, "1"):
        with pytest.raises(UnknownPolicy, match="another network"):
            registry.find("demo_line", version, "night")
    with pytest.raises(UnknownPolicy, match="another network"):
        registry.activate_policy("demo_line", "night")
    assert 'flawline_policies_refused_total{line="demo_line"} 0.0' in shelf.metrics()
    assert registry.find("demo_line", "2", "night").policy.policy.version == "night"


def test_policy_when_the_network_stays_then_it_judges_the_newer_version_too(shelf):
    """A calibration again changes no score, so that what was written for the scores goes on."""
    shelf.add_policy("lax", shelf.network(), fail_threshold=0.9)
    registry = shelf.load()
    shelf.add("2", policy={"fail_threshold": 0.3})

    registry.rescan()

    assert registry.find("demo_line", None, "lax").line.bundle.manifest.version == "2"


def test_policy_when_it_names_no_network_then_it_is_offered_only_as_strict_as_the_bundles_own(shelf):
    """What passes nothing that the bundle's own policy stops is safe; of the rest is said what to add."""
    shelf.add_policy("strict", fail_threshold=0.15)
    shelf.add_policy("lax", fail_threshold=0.9)
    registry = shelf.load()

    found = registry.rescan()

    assert offered(registry) == ["1", "strict"]
    assert found.refused_policies.keys() == {("demo_line", "lax")}
    with pytest.raises(UnknownPolicy, match=f'add "network": "{shelf.network()}"'):
        registry.find("demo_line", None, "lax")
    assert 'flawline_policies_refused_total{line="demo_line"} 1.0' in shelf.metrics()
    shelf.add_policy("lax", shelf.network(), fail_threshold=0.9)
    assert registry.rescan().policies == (("demo_line", "lax"),)


def test_policy_when_its_file_was_changed_then_that_is_refused_and_told_at_every_look(shelf):
    """A version means the same thresholds for good; who corrects one under its name must not believe that it counts."""
    shelf.add_policy("night", shelf.network(), fail_threshold=0.9)
    registry = shelf.load()
    shelf.add_policy("night", shelf.network(), fail_threshold=0.15)

    first, second = registry.rescan(), registry.rescan()

    assert first.refused_policies == second.refused_policies
    assert "save the file under a new version" in first.refused_policies["demo_line", "night"]
    assert 'flawline_policies_refused_total{line="demo_line"} 1.0' in shelf.metrics()
    assert registry.find("demo_line", None, "night").policy.policy.fail_threshold == 0.9
    with pytest.raises(BundleRefused, match="was changed"):
        registry.activate_policy("demo_line", "night")
    shelf.add("2")
    registry.rescan()  # the same thresholds in a version that never saw the file as it was
    assert registry.find("demo_line", "2", "night").policy.policy.fail_threshold == 0.9


def test_policy_when_its_file_is_half_written_then_it_goes_on_and_that_is_told(shelf):
    """An editor that is caught at work takes no line out."""
    file = shelf.add_policy("strict", fail_threshold=0.15)
    registry = shelf.load()
    registry.activate_policy("demo_line", "strict")
    whole = file.read_bytes()
    file.write_bytes(whole[:20])

    found = registry.rescan()
    file.write_bytes(whole)

    assert found.refused_policies.keys() == {("demo_line", "strict")}
    assert registry.find("demo_line", None, None).policy.policy.version == "strict"
    assert registry.rescan().refused_policies == {}


def test_policy_when_its_file_is_gone_then_it_is_withdrawn_from_every_version_in_memory(shelf):
    """Who removes a policy wants no frame judged by it, by whatever version it asks for."""
    shelf.add("2")
    file = shelf.add_policy("night", shelf.network(), fail_threshold=0.9)
    registry = shelf.load()
    registry.activate("demo_line", "1")
    registry.start_shadow("demo_line", "2")
    file.unlink()

    found = registry.rescan()
    shelf.add_policy("night", shelf.network(), fail_threshold=0.8)
    registry.rescan()

    assert found.withdrawn == (("demo_line", "night"),)
    for version in ("1", "2"):
        with pytest.raises(UnknownPolicy):
            registry.find("demo_line", version, "night")
    assert set(registry.shadow_of("demo_line", "1", "1")[1].policies) == {"1"}
    shelf.add_policy("night", shelf.network(), fail_threshold=0.9)
    assert registry.rescan().policies == (("demo_line", "night"),)
    file.write_text("half of it")
    assert registry.rescan().withdrawn == ()  # what came back goes on like any other


def test_policy_when_the_one_that_judges_is_gone_then_its_line_gives_no_verdict_by_another(shelf):
    """The bundle's own policy could pass what the withdrawn one stopped, so that the line waits for somebody."""
    file = shelf.add_policy("strict", fail_threshold=0.15)
    registry = shelf.load()
    registry.activate_policy("demo_line", "strict")
    text = file.read_text()
    file.unlink()

    found = registry.rescan()

    assert found.withdrawn == (("demo_line", "strict"),)
    assert not registry.is_ready
    with pytest.raises(LineNotReady, match="chose its policy strict"):
        registry.find("demo_line", None, None)
    file.write_text(text)
    registry.load_line("demo_line")
    assert registry.find("demo_line", None, None).policy.policy.version == "strict"
    file.unlink()
    registry.rescan()
    registry.activate_policy("demo_line", "1")
    assert registry.find("demo_line", None, None).policy.policy.version == "1"


def test_policy_when_the_one_that_was_chosen_for_a_kept_version_is_gone_then_that_one_judges_by_no_other(shelf):
    """Who asks for the version by its number gets no verdict by thresholds that nobody chose for it, either."""
    file = shelf.add_policy("strict", fail_threshold=0.15)
    registry = shelf.load()
    registry.activate_policy("demo_line", "strict")
    shelf.add("2")
    registry.rescan()
    file.unlink()
    registry.rescan()

    with pytest.raises(UnknownPolicy, match="is gone"):
        registry.find("demo_line", "1", None)
    assert registry.find("demo_line", "1", "1").policy.policy.version == "1"
    with pytest.raises(LineNotCalibrated):
        registry.start_shadow("demo_line", "1")


def test_policy_when_a_file_has_the_version_of_the_bundles_own_then_that_one_may_be_chosen_all_the_same(shelf):
    """The way back to the bundle's own policy is not barred by a file that was named like it."""
    shelf.add_policy("1", shelf.network(), fail_threshold=9.0)
    shelf.add_policy("strict", fail_threshold=0.15)
    registry = shelf.load()
    registry.activate_policy("demo_line", "strict")

    registry.activate_policy("demo_line", "1")

    assert registry.find("demo_line", None, None).policy.policy.fail_threshold == 0.2


def test_policy_when_nothing_lies_in_the_store_then_it_is_not_taken_for_removed(shelf):
    """A volume that is not mounted any more is no administrator's word."""
    shelf.add_policy("strict", fail_threshold=0.15)
    registry = shelf.load()
    registry.activate_policy("demo_line", "strict")
    shelf.path.rename(shelf.path.with_name("away"))
    shelf.path.mkdir()

    found = registry.rescan()

    assert found.withdrawn == ()
    assert registry.find("demo_line", None, None).policy.policy.version == "strict"
