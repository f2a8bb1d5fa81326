"""Promises of memory: what has no room leaves and comes back, and nothing is closed that a frame is still on."""

import asyncio
import shutil
import threading
import time

import numpy as np
import pytest

from service.errors import (
    LineLoading,
    UnknownVersion,
)
from service.lines.live import VersionKey
from tests.factories import make_graph
from tests.fakes import in_loop
from tests.servers import wait_until
from tests.shelves import Shelf, never_a_gap


def test_memory_when_the_live_version_is_gone_then_it_makes_no_room_since_it_could_not_come_back(crowded):
    """A line that is served is worth more than one that is not yet, whether anybody has looked at the store or not."""
    shutil.rmtree(crowded.path / "plate/1")

    crowded.want("cap")

    assert crowded.line_states() == {"cap": "unloaded", "plate": "ready"}
    assert "not in the store stays as well: plate." in crowded.registry.status("cap").reason


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


def test_tend_when_an_engine_can_not_be_closed_then_that_is_said_once_and_the_others_are_closed(shelf, caplog):
    """Who closes what was replaced also looks for engines that are lost, and must not end over one that is gone."""
    registry = shelf.load(keeps_previous=False)
    for version in ("2", "3"):
        shelf.add(version)
        registry.rescan()
    first, second, _ = shelf.engines

    def fail():
        raise RuntimeError("the device is gone")

    first.close = fail
    registry.tend()
    registry.tend()

    assert [record.message for record in caplog.records].count("an engine could not be closed") == 1
    assert second.is_closed


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


def test_memory_when_a_line_is_half_way_back_then_its_camera_is_told_to_wait_for_the_rest(crowded):
    """Each frame that asks meanwhile is told the same moment, and not one that moves away."""
    told = []

    def take_seven_seconds(_bundle):
        crowded.now += 7

    def ask_after_five_seconds(_bundle):
        crowded.now += 5
        with pytest.raises(LineLoading) as refused:
            crowded.registry.serving("cap", None)
        told.append(refused.value.retry_after_s)

    crowded.before_open = take_seven_seconds
    crowded.want("cap")
    crowded.want("plate")
    crowded.before_open = ask_after_five_seconds
    crowded.want("cap")

    assert told == [pytest.approx(2, abs=0.01)]


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
