"""Promises of loading a version beside frames: it gives way, hurries where somebody waits, and is tried again."""

import asyncio
import os
import sys
import threading

import pytest

from service.errors import (
    BundleRefused,
    LineLoading,
)
from service.threads import begin
from tests.fakes import in_loop
from tests.servers import wait_until
from tests.shelves import Shelf, never_a_gap


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
