"""Promises of replaying golden frames on live engines: what broke is found, and what is only busy is left alone."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest

from service.engines.engine import EngineOutput
from service.errors import LineNotReady
from service.golden_watch import GoldenWatch
from service.loading import BatcherOptions
from service.registry import Registry
from service.stores.directory import DirectoryStore
from service.telemetry import Telemetry
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
    """A registry whose engine can be spoilt, and what watches it."""

    def __init__(self, store, every_s, stuck_after_s, max_queue_size):
        self.engine, self.telemetry = GatedEngine(), Telemetry()
        driven = BatcherOptions(1, 1, max_queue_size, stuck_after_s)
        directory = DirectoryStore(store)
        self.registry = Registry(directory, None, self.engine.open, driven, self.telemetry, time.monotonic)
        self.watch = GoldenWatch(self.registry, self.telemetry, every_s=every_s, clock=time.monotonic)

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
        service.engine.spoil = lambda output: asked.append(len(output.scores)) or output

        await service.watch.look()
        await service.watch.look()

        assert service.counted("passed") == 2
        assert asked == [1] * 6
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
