"""Promises of what administrators change: a version is proved, swapped at once, and stepped back from at once."""

import shutil

import pytest

from service.errors import (
    BundleRefused,
    EngineFailed,
    LineLoading,
    LineNotCalibrated,
    LineNotReady,
    StoreUnreachable,
    UnknownBundle,
    UnknownLine,
    UnknownVersion,
)
from service.lines.registry import Registry
from service.stores.directory import DirectoryStore
from tests.factories import make_bundle, make_graph
from tests.servers import wait_until
from tests.shelves import Shelf


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


def test_roll_back_when_nobody_knows_what_was_live_before_then_steps_over_what_somebody_has_stepped_back_from(
    shelf, tmp_path
):
    """A way back leads to nothing that was left on purpose: that takes its name."""
    (tmp_path / "state").mkdir()
    shelf.add("2")
    registry = shelf.load(state_directory=tmp_path / "state")
    registry.activate("demo_line", "1")
    shelf.add("3")
    registry.rescan()
    registry.close()
    registry = shelf.load(state_directory=tmp_path / "state")

    assert (shelf.serving(), registry.roll_back("demo_line")) == ("3", "1")


@pytest.mark.parametrize("step_back", [Registry.roll_back, lambda registry, name: registry.activate(name, "1")])
def test_step_back_when_the_live_version_is_gone_then_it_is_held_back_if_it_comes_again(shelf, step_back):
    """What judged on after it was removed, until somebody chose another one, does not judge again unasked."""
    registry = shelf.load()
    shelf.add("2")
    registry.rescan()
    away = (shelf.path / "demo_line/2").rename(shelf.path / "demo_line/.2")
    registry.rescan()

    step_back(registry, "demo_line")
    registry.rescan()
    away.rename(shelf.path / "demo_line/2")

    assert registry.rescan().activated == ()
    assert shelf.serving() == "1"


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_roll_back_when_the_version_before_judged_on_though_it_was_gone_then_steps_over_it(
    shelf, monkeypatch, is_mirrored
):
    """Whoever took a revoked version out of use does not meet it again, before anybody looks at the store once more."""
    registry = shelf.load()
    for version in ("2", "3"):
        shelf.add(version)
    registry.activate("demo_line", "2")
    if is_mirrored:
        monkeypatch.setattr(registry._catalogue._store, "gone", lambda: {("demo_line", "2")})
    else:
        shutil.rmtree(shelf.path / "demo_line/2")
    registry.rescan()
    registry.activate("demo_line", "3")

    with pytest.raises(UnknownVersion):
        shelf.serving(version="2")
    assert registry.roll_back("demo_line") == "1"


def test_change_when_a_version_lies_in_the_mirror_alone_then_it_is_none_of_the_store(shelf, monkeypatch):
    """What the mirror kept for a start that took a newer one is not tried, activated or stepped back to."""
    monkeypatch.setattr(DirectoryStore, "gone", lambda _store: {("demo_line", "2")})
    for version in ("2", "3"):
        shelf.add(version)
    registry = shelf.load()

    for change in (registry.activate, registry.start_shadow):
        with pytest.raises(UnknownVersion, match="no such version"):
            change("demo_line", "2")
    assert registry.roll_back("demo_line") == "1"


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


def test_load_line_when_its_bundle_was_removed_and_another_one_has_it_by_now_then_takes_that(
    shelf, tmp_path, monkeypatch
):
    """A line that moves to another bundle does so when somebody unloads and loads it, and nothing keeps the old one."""
    (tmp_path / "state").mkdir()
    registry, needed = shelf.load(state_directory=tmp_path / "state"), []
    shutil.rmtree(shelf.path / "demo_line")
    shelf.add("1", "pair", lines=("demo_line", "right"))
    refused = registry.rescan().refused

    registry.unload_line("demo_line")
    registry.load_line("demo_line")
    monkeypatch.setattr(registry._catalogue._store, "refresh", needed.append)
    registry.rescan()

    assert "removed from the store; unload demo_line, and load it" in refused["pair", "1"]
    assert {status.line: (status.bundle, status.state) for status in registry.statuses()} == {
        "demo_line": ("pair", "ready"),
        "right": ("pair", "ready"),
    }
    assert needed[-1].in_use == {("pair", "1")}


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
