"""Promises of looks at the store: what is new is proved and serves, and what is gone or away is told."""

import os
import shutil

import pytest

from service.errors import (
    BundleRefused,
    StoreUnreachable,
    UnknownVersion,
)
from service.lines.choices import CHOICES_FILE, LAST_LIVE_FILE
from service.stores.directory import DirectoryStore
from tests.rights import rights_of_an_ordinary_user
from tests.shelves import Shelf


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


def test_rescan_when_the_live_version_is_gone_then_it_serves_on_and_that_is_told_until_another_one_does(shelf, caplog):
    """A hand that slipped takes no line out of service, and whoever revoked a version hears that it judges on."""
    registry = shelf.load()
    shelf.telemetry.watch_live_versions(lambda: registry.live_in_store)
    well = shelf.metrics()
    away = (shelf.path / "demo_line/1").rename(shelf.path / "demo_line/.1")

    looks = [list(registry.rescan().gone) for _ in range(2)]
    gone = (shelf.serving(), registry.is_ready, registry.versions("demo_line")[0].reason, shelf.metrics())
    away.rename(shelf.path / "demo_line/1")
    registry.rescan()
    back = (registry.versions("demo_line")[0].reason, shelf.metrics())
    shelf.add("2")
    shutil.rmtree(shelf.path / "demo_line/1")
    registry.rescan()

    told = 'flawline_live_version_in_store{engine="demo_line"}'
    assert f"{told} 1.0" in well
    assert looks == [[("demo_line", "1")]] * 2
    assert gone[:2] == ("1", True)
    assert "removed from the store" in gone[2]
    assert f"{told} 0.0" in gone[3]
    assert [record.message for record in caplog.records].count("the live version is gone from the store") == 1
    assert back[0] is None
    assert f"{told} 1.0" in back[1]
    assert shelf.states() == {"2": "live"}
    assert f"{told} 1.0" in shelf.metrics()


def test_rescan_when_a_line_made_room_and_its_version_is_gone_then_nobody_hears_that_it_serves_on(crowded):
    """What is in no memory and in no store can't come back until it is put back."""
    shutil.rmtree(crowded.path / "cap/1")

    gone = crowded.registry.rescan().gone

    assert list(gone) == [("cap", "1")]
    assert "can't come back" in gone["cap", "1"]


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


def test_rescan_when_the_chosen_version_of_an_unloaded_line_is_away_for_a_while_then_it_comes_back_by_no_other(shelf):
    """One look at a volume that hides it must not step back: what would judge is as it was chosen."""
    registry = shelf.load(activates_newest=False)
    shelf.add("2")
    registry.activate("demo_line", "2")
    registry.unload_line("demo_line")
    away = (shelf.path / "demo_line/2").rename(shelf.path / "demo_line/.2")
    registry.rescan()

    with pytest.raises(UnknownVersion, match="chose version 2, which is not in the store"):
        registry.load_line("demo_line")
    away.rename(shelf.path / "demo_line/2")
    registry.load_line("demo_line")

    assert shelf.serving() == "2"


@pytest.mark.parametrize("file", [CHOICES_FILE, LAST_LIVE_FILE])
def test_start_when_nobody_knows_what_was_live_before_then_the_store_may_remove_nothing(
    shelf, tmp_path, monkeypatch, file
):
    """What lies in no bucket any more may be what judges, and this the last copy: a disk that forgot deletes none."""
    needed = []
    monkeypatch.setattr(DirectoryStore, "refresh", lambda _store, asked: needed.append(asked))
    shelf.add("2")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / file).write_text("{")

    shelf.load(state_directory=tmp_path / "state")

    assert needed[0].in_use == {("demo_line", "1"), ("demo_line", "2")}


def test_start_when_the_version_that_was_live_is_gone_then_an_older_one_is_taken_and_told(shelf, tmp_path, caplog):
    """Whoever wants the older version removes the newer one; whoever did not mean to is told."""
    shelf.add("2")
    (tmp_path / "state").mkdir()
    shelf.load(state_directory=tmp_path / "state").close()
    shutil.rmtree(shelf.path / "demo_line/2")

    shelf.load(state_directory=tmp_path / "state")

    assert shelf.serving() == "1"
    assert [record.message for record in caplog.records].count("an older version is taken") == 1


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
