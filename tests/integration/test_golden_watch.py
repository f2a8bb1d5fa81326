"""Promises of replaying golden frames on live engines: what broke is found, and what is only busy is left alone."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import pytest

from service.contract.geometry import Tiling
from service.engines.engine import EngineOutput
from service.errors import LineNotReady
from service.lines.golden_watch import GoldenWatch
from service.lines.loading import BatcherOptions
from service.lines.registry import Registry
from service.observability.telemetry import Telemetry
from service.scheduling.schedule import Priority
from service.stores.directory import DirectoryStore
from tests.factories import make_bundle
from tests.fakes import in_loop
from tests.gated_engine import GatedEngine


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return a store with a bundle of two lines."""
    store = tmp_path_factory.mktemp("store")
    make_bundle(store, "pair", lines=("left", "right"), conditional=True)
    return store


class Watched:
    """A registry whose engine can be spoilt, and what watches it; nobody waits for its turns."""

    def __init__(self, store, every_s, stuck_after_s, max_queue_size):
        self.engine, self.telemetry = GatedEngine(), Telemetry()
        self.waited = []  # seconds, and how many replays had passed by then
        driven = BatcherOptions(1, 1, max_queue_size, stuck_after_s)
        directory = DirectoryStore(store)
        self.registry = Registry(directory, None, self.engine.open, driven, self.telemetry, time.monotonic)
        self.spent_s = 0.0  # beyond the real time
        self.meanwhile = lambda: None
        self.watch = self.watching(every_s)

    def watching(self, every_s):
        """Return what watches the registry with a period."""
        clock, sleep = lambda: time.monotonic() + self.spent_s, self._do_not_sleep
        return GoldenWatch(self.registry, self.telemetry, every_s=every_s, clock=clock, sleep=sleep)

    async def _do_not_sleep(self, seconds):
        self.waited.append((round(seconds, -1), self.counted("passed")))
        self.meanwhile()

    def counted(self, outcome):
        """Return how many replays ended so."""
        text = self.telemetry.exposition()[0].decode()
        found = [line for line in text.splitlines() if f'golden_checks_total{{outcome="{outcome}"}}' in line]
        return float(found[0].split()[-1]) if found else 0.0


@asynccontextmanager
async def watched(store, every_s=20.0, stuck_after_s=20.0, max_queue_size=4):
    """Load the store and return what watches it."""
    watched = Watched(store, every_s, stuck_after_s, max_queue_size)
    await asyncio.to_thread(watched.registry.load)
    try:
        yield watched
    finally:
        watched.engine.release()
        watched.registry.close()


@in_loop
async def test_replay_when_all_is_well_then_it_passes_and_takes_the_lines_in_turn(store):
    """Golden frames of one line after the other run on the live engine, and nothing else happens."""
    async with watched(store) as service:
        asked = []
        bundle = service.registry.serving("left", None).bundle
        run = bundle.engine.run
        bundle.engine.run = lambda frames, index: asked.append((len(frames), *index.tolist())) or run(frames, index)

        await service.watch.look()
        await service.watch.look()

        assert service.counted("passed") == 2
        assert asked == [(1, 0)] * 3 + [(1, 1)] * 3
        assert service.registry.is_ready


@in_loop
async def test_replay_when_it_asks_then_behind_all_frames_within_its_period_and_for_all_tiles(tmp_path):
    """Where a queue has frames of cameras, a golden one is answered after them or not at all."""
    make_bundle(tmp_path, tiles=Tiling(rows=1, columns=2, overlap_height=8, overlap_width=12))
    async with watched(tmp_path) as service:
        asked, batcher = [], service.registry.serving("demo_line", None).bundle.batcher
        place = batcher.place

        def tell(deadline, **of_frame):
            asked.append((deadline <= time.monotonic() + 20.0, of_frame["priority"], of_frame["weight"]))
            return place(deadline, **of_frame)

        batcher.place = tell

        await service.watch.look()

        assert asked == [(True, Priority.LOW, 2)] * 3


@in_loop
async def test_replay_when_the_lines_are_taken_out_before_its_turn_then_nothing_is_asked(store):
    """What serves nobody any more is on its way out, and its answers would tell of no line."""
    async with watched(store) as service:
        service.meanwhile = lambda: [service.registry.unload_line(line) for line in ("left", "right")]

        await service.watch.look()
        await service.watch.look()  # and where nothing is live, the period is waited for all the same

        assert [service.counted(outcome) for outcome in ("passed", "skipped", "failed")] == [0, 0, 0]
        assert service.waited == [(20, 0), (20, 0)]


@in_loop
async def test_replay_when_it_ends_early_then_it_is_counted_and_looking_goes_on(store):
    """A fault of our own must not leave engines unwatched for the rest of the process, nor look like a proof."""
    async with watched(store) as service:
        batcher = service.registry.serving("left", None).bundle.batcher

        def fail(*_, **__):
            raise ArithmeticError

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(batcher, "place", fail)
            await service.watch.look()
        await service.watch.look()

        outcomes = ("passed", "skipped", "failed", "ended_early")
        assert [service.counted(outcome) for outcome in outcomes] == [1, 0, 0, 1]
        assert service.registry.is_ready


@in_loop
async def test_replay_when_the_device_answers_otherwise_then_its_lines_are_unhealthy_and_not_lost(store):
    """Other numbers than were validated take every line of the engine out of service, with the reason."""
    async with watched(store) as service:
        service.engine.spoil = lambda output: EngineOutput(output.scores + 0.5, output.anomaly_maps)

        await service.watch.look()

        assert service.counted("failed") == 1
        assert {status.state for status in service.registry.statuses()} == {"unhealthy"}
        assert "golden frame" in service.registry.status("left").reason
        assert (service.registry.is_ready, service.registry.is_lost) == (False, False)
        assert "flawline_golden_failures_total 1.0" in service.telemetry.exposition()[0].decode()
        with pytest.raises(LineNotReady):
            service.registry.serving("right", None)


@in_loop
async def test_replay_when_the_device_is_gone_then_the_engine_is_lost(store):
    """An error that stays is found by the first replay; only a new process helps then."""
    async with watched(store) as service:

        def fail(_):
            raise OSError

        service.engine.spoil = fail

        await service.watch.look()

        assert (service.registry.is_ready, service.registry.is_lost) == (False, True)
        assert service.counted("failed") == 1


@in_loop
async def test_replay_when_the_engine_hangs_then_it_is_lost_by_the_alarm_of_its_runs(store):
    """A replay goes through the runners, so that one that never comes back is noticed without any frame."""
    async with watched(store, stuck_after_s=0.05) as service:
        service.engine.hold()

        await service.watch.look()

        assert service.registry.is_lost


@in_loop
async def test_replay_when_the_engine_is_held_then_it_holds_no_thread_that_requests_need(store):
    """A replay may wait long for its answers; what requests do in threads goes on beside it."""
    async with watched(store) as service:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        service.engine.hold()
        looking = asyncio.create_task(service.watch.look())

        await asyncio.to_thread(service.engine.started.acquire)
        is_waiting = not looking.done()
        service.engine.release()
        await looking

        assert is_waiting
        assert service.counted("passed") == 1


@in_loop
async def test_replay_when_the_engine_is_busy_then_it_is_skipped_and_nobody_is_the_worse(store):
    """A full queue is no fault: the frames in it are answered, and the line stays healthy."""
    async with watched(store, max_queue_size=1) as service:
        batcher = service.registry.serving("left", None).bundle.batcher
        with batcher.place(time.monotonic() + 20, line="left"):
            await service.watch.look()

        assert service.counted("skipped") == 1
        assert service.registry.is_ready


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory):
    """Return a store with four bundles of a line each."""
    store = tmp_path_factory.mktemp("wide_store")
    for name in ("north", "east", "south", "west"):
        make_bundle(store, name)
    return store


@in_loop
async def test_replay_when_there_are_many_bundles_then_one_after_another_spread_over_the_period(wide_store):
    """Each engine has its own queue, and all share the cores: replays side by side take them from cameras."""
    async with watched(wide_store, every_s=1000.0) as service:
        await service.watch.look()

        assert service.waited == [(250, 0), (500, 1), (750, 2), (1000, 3)]
        assert service.counted("passed") == 4


@in_loop
async def test_replay_when_a_frame_of_another_line_runs_all_the_period_then_it_gives_way_and_is_skipped(wide_store):
    """Priorities count within an engine; a golden frame of one must not take the core of a frame of another."""
    async with watched(wide_store, every_s=0.05) as service:
        live = service.registry.serving("north", None)
        batcher, size = live.bundle.batcher, live.bundle.manifest.input
        service.engine.hold()
        with batcher.place(time.monotonic() + 20, line="north") as place:
            frames = np.zeros((1, size.height, size.width, 3), np.uint8)
            answer = asyncio.create_task(batcher.submit(place, frames, 0))
            await asyncio.to_thread(service.engine.started.acquire)

            await service.watch.look()

            began_meanwhile = service.engine.started.acquire(blocking=False)
            skipped = service.counted("skipped")
            service.engine.release()
            await answer
        await service.watching(20.0).look()

    assert not began_meanwhile
    assert skipped == 4
    assert (service.counted("passed"), service.counted("skipped")) == (4, 4)


def without_gaps(service):
    """Have the frames of other lines leave no room, and return the list of what was waited for some, in seconds."""
    waited = []

    def wait_for_gap(longest_s):
        waited.append(longest_s)
        return False

    service.registry._loader._running.wait_for_gap = wait_for_gap
    return waited


@in_loop
async def test_replay_when_there_is_no_gap_then_each_bundle_waits_its_share_of_the_period(wide_store):
    """One that waits all the period would take the turns of the others, and what they missed would not be counted."""
    async with watched(wide_store, every_s=1000.0) as service:
        waited = without_gaps(service)

        await service.watch.look()

        assert waited == [250.0] * 4
        assert service.counted("skipped") == 4


@in_loop
async def test_replay_when_gaps_are_late_then_all_golden_frames_of_a_bundle_wait_its_share_together(wide_store):
    """What one frame has waited the next ones have not, or a bundle would take the turns of the others."""
    async with watched(wide_store, every_s=1000.0) as service:
        waited = []

        def wait_for_gap(longest_s):
            waited.append(round(longest_s, -1))
            service.spent_s += 100.0
            return True

        service.registry._loader._running.wait_for_gap = wait_for_gap

        await service.watch.look()

        assert waited == [250.0, 150.0, 50.0] * 4


@in_loop
async def test_replay_when_an_idle_engine_was_skipped_three_times_then_it_is_replayed_without_a_gap(wide_store):
    """A device that goes wrong would be found by the next part only, since no frame proves it meanwhile."""
    async with watched(wide_store) as service:
        without_gaps(service)

        for _ in range(3):
            await service.watch.look()
        before = service.counted("passed"), service.counted("skipped")
        await service.watch.look()
        then = service.counted("passed"), service.counted("skipped")
        await service.watch.look()

        assert (before, then) == ((0, 12), (4, 12))
        assert (service.counted("passed"), service.counted("skipped")) == (4, 16)


@in_loop
async def test_replay_when_an_idle_engine_that_was_skipped_answers_otherwise_then_it_is_found(wide_store):
    """Constant frames of one line must not hide what has become of the others."""
    async with watched(wide_store) as service:
        without_gaps(service)
        service.engine.spoil = lambda output: EngineOutput(output.scores + 0.5, output.anomaly_maps)

        for _ in range(4):
            await service.watch.look()

        assert {status.state for status in service.registry.statuses()} == {"unhealthy"}


@in_loop
async def test_replay_when_an_engine_answers_frames_between_its_turns_then_it_goes_on_giving_way(wide_store):
    """What is answered is proof enough, and the line that is busy needs the room."""
    async with watched(wide_store) as service:
        without_gaps(service)
        live = service.registry.serving("north", None)
        batcher, size = live.bundle.batcher, live.bundle.manifest.input

        for _ in range(4):
            with batcher.place(time.monotonic() + 20, line="north") as place:
                await batcher.submit(place, np.zeros((1, size.height, size.width, 3), np.uint8), 0)
            await service.watch.look()

        assert (service.counted("passed"), service.counted("skipped")) == (3, 13)
