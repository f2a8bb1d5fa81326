"""Promises of the batcher: each frame is answered once, on time, whatever the engine does."""

import asyncio
import os
import re
import sys
import threading
import time
from typing import get_args

import numpy as np
import pytest
from prometheus_client import Counter

from service.engines.engine import LoneRun
from service.errors import DeadlinePassed, EngineFailed, FlawlineError, LineNotReady, Overloaded, UnreadableFrame
from service.observability.telemetry import REQUEST_FAILED, Buckets, Depth, Discarded, EngineMeter, Telemetry
from service.scheduling.batch_queue import Running
from service.scheduling.batcher import Batcher
from service.scheduling.patience import MOST_GIVEN_UP
from service.scheduling.schedule import Priority, RunTimes
from tests.fakes import FakeClock, FakeEngine, grey_level, hold_time, in_loop, pass_time

SOON_S = 0.05
LONG_S = 20.0
REASONS = get_args(Discarded)
BATCHES_PAY = RunTimes((0.001, 0.001, 0.001, 0.001))


class Bench:
    """A batcher with a fake engine under it."""

    def __init__(
        self,
        *,
        lines=1,
        runners=1,
        max_queue_size=64,
        run_times=None,
        stuck_after_s=LONG_S,
        alone=None,
        running=None,
        clock=time.monotonic,
    ):
        self.clock = clock
        self.engine = FakeEngine()
        self.telemetry = Telemetry()
        self.probes = 0
        self.probe_fault: Exception | None = None
        self.batcher = Batcher(
            self.engine,
            self._probe,
            lines=lines,
            runners=runners,
            max_queue_size=max_queue_size,
            run_times=run_times or RunTimes.unknown(1),
            stuck_after_s=stuck_after_s,
            meter=self.telemetry.engine("bench"),
            clock=clock,
            alone=alone,
            running=running,
        )

    def _probe(self):
        self.probes += 1
        if self.probe_fault is not None:
            raise self.probe_fault

    async def inspect(self, grey=0, **options):
        """Take a place and run a frame of one grey level."""
        return await self.inspect_tiles([grey], **options)

    async def inspect_tiles(self, greys, *, deadline_s=LONG_S, line_index=0, line="line", priority=Priority.NORMAL):
        """Take a place and run a frame of several tiles, each of one grey level."""
        deadline = self.clock() + deadline_s
        with self.batcher.place(deadline, line=line, weight=len(greys), priority=priority) as place:
            tiles = np.stack([np.full((8, 12, 3), grey, np.uint8) for grey in greys])
            return await self.batcher.submit(place, tiles, line_index)

    async def inspect_work(self, work):
        """Take a place and run a frame that is still to be prepared."""
        with self.batcher.place(self.clock() + LONG_S, line="line") as place:
            return await self.batcher.run(place, work, 0)

    def start(self, grey=0, **options):
        """Begin to inspect, and go on."""
        return asyncio.ensure_future(self.inspect(grey, **options))

    async def until_a_run_starts(self):
        """Wait until one more run is inside the engine."""
        await asyncio.to_thread(self.engine.started.acquire)

    def metric(self, name):
        """Return the value of a metric of this engine."""
        text = self.telemetry.exposition()[0].decode()
        (value,) = re.findall(rf"^flawline_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(value)

    def discarded(self):
        """Return how many frames were thrown away, by why."""
        counts = {reason: self.metric(f'discarded_total{{engine="bench",reason="{reason}"}}') for reason in REASONS}
        return {reason: count for reason, count in counts.items() if count}


@pytest.fixture
def make_bench():
    """Build benches whose runners end with the test."""
    benches = []

    def make(**options):
        benches.append(Bench(**options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.engine.release()
        bench.batcher.close()


def watch_greys(engine):
    """Return a list that collects the grey levels of each run."""
    runs = []

    def note(frames):
        runs.append(frames[:, 0, 0, 0].tolist())

    engine.on_run = note
    return runs


async def together(bench, frames):
    """Have frames wait behind a run, so that they are one batch, and return what became of them."""
    bench.engine.hold()
    first = bench.start()
    await bench.until_a_run_starts()
    batch = [asyncio.ensure_future(frame) for frame in frames]
    await asyncio.sleep(0)
    bench.engine.release()
    _, *answers = await asyncio.gather(first, *batch, return_exceptions=True)
    return answers


def refuse_white(frames):
    """Fail as a runtime does on a run that holds a white frame."""
    if (frames == 255).all(axis=(1, 2, 3)).any():
        raise ValueError


class Slow:
    """Work whose frame takes two seconds to be made a network input."""

    def __init__(self, clock):
        self.clock = clock

    def prepare(self):
        """Let them pass."""
        self.clock.advance(2)
        return np.zeros((1, 8, 12, 3), np.uint8)

    def finish(self, result):
        """Return all that is known."""
        return result


class Unreadable:
    """Work whose frame can't be made a network input."""

    def prepare(self):
        """Refuse."""
        raise UnreadableFrame("The bytes are no picture.")

    def finish(self, result):
        """Never be asked."""
        raise AssertionError(result)


@in_loop
async def test_submit_when_engine_answers_then_returns_this_frames_part(make_bench):
    """A frame gets its own score and map, with the size of its batch and its times."""
    bench = make_bench()

    result = await bench.inspect(grey=51, line_index=3)

    expected = grey_level(np.full((1, 8, 12, 3), 51, np.uint8))
    assert result.scores == pytest.approx([0.2])
    np.testing.assert_array_equal(result.anomaly_maps, expected.anomaly_maps)
    assert result.batch_size == 1
    assert result.queue_s >= 0
    assert result.infer_s >= 0
    assert bench.engine.line_indices == [[3]]


@in_loop
async def test_run_when_a_frame_waits_and_is_prepared_and_runs_then_is_told_how_long_each_took(make_bench):
    """Seconds of one stage are not told as another's: who looks for what is slow must not look in the wrong place."""
    clock = FakeClock()
    bench = make_bench(clock=clock)
    bench.engine.on_run = lambda _: clock.advance(3)
    bench.engine.hold()
    first = asyncio.ensure_future(bench.inspect_work(Slow(clock)))
    await bench.until_a_run_starts()
    second = asyncio.ensure_future(bench.inspect_work(Slow(clock)))
    await asyncio.sleep(0)
    bench.engine.release()

    results = await asyncio.gather(first, second)

    assert [(result.queue_s, result.prepare_s, result.infer_s) for result in results] == [(0, 2, 3), (3, 2, 3)]


@in_loop
async def test_submit_when_many_frames_share_batches_then_each_gets_its_own_answer(make_bench):
    """No frame is ever answered with a neighbour's score."""
    bench = make_bench(runners=2, run_times=BATCHES_PAY)

    results = await asyncio.gather(*(bench.inspect(grey) for grey in range(60)))

    assert [round(result.scores[0] * 255) for result in results] == list(range(60))
    assert max(bench.engine.batches) <= 4
    assert sum(bench.engine.batches) == 60


@in_loop
async def test_submit_when_tiled_frames_share_batches_then_each_gets_the_answers_of_its_tiles(make_bench):
    """The tiles of a frame stay together and in order, each told the line of its frame, and weigh as many."""
    bench = make_bench(run_times=BATCHES_PAY)
    bench.engine.hold()
    first = bench.start()
    await bench.until_a_run_starts()
    frames = [bench.inspect_tiles(greys, line_index=i) for i, greys in enumerate([[1, 2], [3], [4, 5, 6]])]
    answers = asyncio.gather(first, *frames)
    await asyncio.sleep(0)
    bench.engine.release()

    _, *results = await answers

    assert [(r.scores * 255).round().tolist() for r in results] == [[1, 2], [3], [4, 5, 6]]
    assert [(r.anomaly_maps[:, 0, 0] * 255).round().tolist() for r in results] == [[1, 2], [3], [4, 5, 6]]
    assert bench.engine.line_indices == [[0], [0, 0, 1], [2, 2, 2]]
    assert [result.batch_size for result in results] == [2, 2, 1]


@in_loop
async def test_submit_when_a_frame_is_heavier_than_a_batch_then_it_runs_alone_in_several_runs(make_bench):
    """The engine never sees more than the largest batch, and the frame gets the answers of all its tiles."""
    bench = make_bench(run_times=BATCHES_PAY)

    heavy, light = await asyncio.gather(bench.inspect_tiles(list(range(10))), bench.inspect(99))

    assert (heavy.scores * 255).round().tolist() == list(range(10))
    assert heavy.anomaly_maps.shape == (10, 4, 6)
    assert light.batch_size == 1
    assert bench.engine.batches == [4, 4, 2, 1]
    assert bench.metric('batch_size_sum{engine="bench"}') == 11
    assert bench.metric('batch_size_count{engine="bench"}') == 4


@in_loop
async def test_place_when_tiled_frames_are_ahead_then_counts_their_tiles(make_bench):
    """What is ahead weighs as many network inputs as it has, and so does the frame that asks."""
    bench = make_bench(run_times=RunTimes((1.0,)))
    bench.engine.hold()
    first = bench.start()
    await bench.until_a_run_starts()
    ahead = asyncio.ensure_future(bench.inspect_tiles([1, 2, 3], deadline_s=8))
    await asyncio.sleep(0)

    with pytest.raises(Overloaded) as refusal:
        await bench.inspect_tiles([4, 5, 6, 7, 8], deadline_s=8.5)
    bench.engine.release()
    await asyncio.gather(first, ahead)

    assert refusal.value.retry_after_s == pytest.approx(4, abs=0.5)


@in_loop
async def test_submit_when_runners_are_idle_then_frames_run_side_by_side(make_bench):
    """Two frames on two idle runners are inside the engine at the same time, each alone."""
    bench = make_bench(runners=2, run_times=BATCHES_PAY)
    bench.engine.hold()

    answers = [bench.start(), bench.start()]
    await bench.until_a_run_starts()
    await bench.until_a_run_starts()
    bench.engine.release()
    await asyncio.gather(*answers)

    assert bench.engine.batches == [1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
@in_loop
async def test_runners_when_they_run_then_stand_back_behind_the_event_loop(make_bench):
    """Runners that keep every core busy must not keep a refusal waiting."""
    bench, seen = make_bench(), []
    bench.engine.on_run = lambda _: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    await bench.inspect()

    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert seen == [min(own + 5, 19)]


@in_loop
async def test_submit_when_frames_wait_then_earliest_deadline_runs_first(make_bench):
    """Behind a busy runner, frames run in the order of their deadlines, and of arrival among equals."""
    bench = make_bench()
    runs = watch_greys(bench.engine)
    bench.engine.hold()
    answers = [bench.start(0)]
    await bench.until_a_run_starts()

    answers += [bench.start(1, deadline_s=18), bench.start(2, deadline_s=12), bench.start(3, deadline_s=15)]
    await asyncio.sleep(0)
    bench.engine.release()
    await asyncio.gather(*answers)

    assert runs == [[0], [2], [3], [1]]


@in_loop
async def test_submit_when_one_line_sends_too_much_then_the_others_need_not_wait_for_it(make_bench):
    """Behind a busy runner, a line that has nothing running goes before the many frames of one that came earlier."""
    bench = make_bench(lines=2)
    runs = watch_greys(bench.engine)
    bench.engine.hold()
    answers = [bench.start(0, line="noisy")]
    await bench.until_a_run_starts()

    answers += [bench.start(grey, line="noisy", deadline_s=12) for grey in (1, 2, 3)]
    answers += [bench.start(9, line="quiet", deadline_s=18)]
    await asyncio.sleep(0)
    bench.engine.release()
    await asyncio.gather(*answers)

    assert runs == [[0], [9], [1], [2], [3]]


@in_loop
async def test_place_when_one_line_sends_too_much_then_the_others_still_find_one(make_bench):
    """A noisy line is refused before it has filled the queue, and a quiet one is not."""
    bench = make_bench(lines=2, max_queue_size=9)
    bench.engine.hold()
    noisy = [bench.start(line="noisy") for _ in range(20)]
    await bench.until_a_run_starts()
    quiet = bench.start(line="quiet")
    await asyncio.sleep(0)
    bench.engine.release()

    answers = await asyncio.gather(*noisy, return_exceptions=True)
    await quiet

    assert [type(answer) for answer in answers].count(Overloaded) == 14


@in_loop
async def test_place_when_frames_matter_less_then_they_are_shed_first(make_bench):
    """Frames of an archive, and shadow traffic still sooner, are refused while there is room for what matters."""
    bench = make_bench(max_queue_size=8)
    bench.engine.hold()
    sent = [bench.start(priority=Priority.SHADOW) for _ in range(3)]
    sent += [bench.start(priority=Priority.LOW) for _ in range(3)]
    sent += [bench.start() for _ in range(4)]
    await bench.until_a_run_starts()
    bench.engine.release()

    answers = await asyncio.gather(*sent, return_exceptions=True)

    refused = [isinstance(answer, Overloaded) for answer in answers]
    assert refused == [False, False, True, False, False, True, False, False, False, False]


@in_loop
async def test_submit_when_batch_is_stuck_then_deadline_fires_on_time(make_bench):
    """The caller hears of the deadline while its run still hangs, and the late result is thrown away and counted."""
    bench = make_bench()
    bench.engine.hold()
    began_at = time.monotonic()

    with pytest.raises(DeadlinePassed):
        await bench.inspect(deadline_s=SOON_S)
    waited_s = time.monotonic() - began_at
    bench.engine.release()
    await bench.inspect()  # the late result came before this one

    assert SOON_S * 0.9 <= waited_s < LONG_S / 4
    assert bench.metric('discarded_total{engine="bench",reason="late"}') == 1


@in_loop
async def test_submit_when_several_deadlines_come_behind_stuck_batches_then_each_fires_on_time(make_bench):
    """One deadline that has fired leaves the next one no later, however far off the last one is."""
    bench = make_bench(runners=3)
    bench.engine.hold()
    began_at = time.monotonic()
    patient = bench.start(deadline_s=LONG_S)

    hasty = [bench.inspect(deadline_s=SOON_S), bench.inspect(deadline_s=1.2 * SOON_S)]
    answers = await asyncio.gather(*hasty, return_exceptions=True)
    waited_s = time.monotonic() - began_at
    bench.engine.release()
    await patient

    assert [type(answer) for answer in answers] == [DeadlinePassed] * 2
    assert 1.2 * SOON_S * 0.9 <= waited_s < LONG_S / 4


@in_loop
async def test_submit_when_deadline_comes_in_the_queue_then_frame_never_runs(make_bench):
    """A frame that waits behind a stuck run until its deadline is answered on time and not run afterwards."""
    bench = make_bench()
    runs = watch_greys(bench.engine)
    bench.engine.hold()
    first = bench.start(1)
    await bench.until_a_run_starts()

    with pytest.raises((DeadlinePassed, Overloaded)):
        await bench.inspect(2, deadline_s=SOON_S)
    bench.engine.release()
    await first
    await bench.inspect(3)

    assert runs == [[1], [3]]


@in_loop
async def test_place_when_run_times_say_too_late_then_refuses_at_once(make_bench):
    """A deadline that can't be met behind the running batch is refused before any work, with a time to wait."""
    bench = make_bench(run_times=RunTimes((5.0,)))
    bench.engine.hold()
    first = bench.start()
    await bench.until_a_run_starts()

    with pytest.raises(Overloaded) as refusal:
        await bench.inspect(deadline_s=6)
    bench.engine.release()
    await first

    assert refusal.value.retry_after_s == pytest.approx(5, abs=1)


@in_loop
async def test_place_when_a_more_urgent_frame_runs_then_it_is_waited_for_once(make_bench):
    """What runs is known by when its runner is free, and is not ahead as well: that would refuse frames in vain."""
    bench = make_bench(run_times=RunTimes((1.0,)), clock=FakeClock())
    bench.engine.hold()
    first = bench.start(deadline_s=2)
    await bench.until_a_run_starts()

    bench.batcher.refuse_hopeless(bench.clock() + 2.6, line="line")
    with pytest.raises(Overloaded):
        bench.batcher.refuse_hopeless(bench.clock() + 2.2, line="line")
    bench.engine.release()

    assert (await first).batch_size == 1


@in_loop
async def test_spare_runner_when_as_many_frames_have_a_place_as_there_are_runners_then_there_is_none(make_bench):
    """Who would take a runner for what nobody waits for leaves the last one to the next frame."""
    bench = make_bench(runners=2)

    spare = [bench.batcher.has_spare_runner]
    with bench.batcher.place(bench.clock() + LONG_S, line="line"):
        spare.append(bench.batcher.has_spare_runner)
        with bench.batcher.place(bench.clock() + LONG_S, line="line"):
            spare.append(bench.batcher.has_spare_runner)
    bench.batcher.close()

    assert spare == [True, True, False]
    assert not bench.batcher.has_spare_runner


@in_loop
async def test_submit_when_frame_can_no_longer_be_in_time_then_refuses_it_before_its_deadline(make_bench):
    """A waiting frame is refused as soon as it could not end in time any more, well before its deadline."""
    bench = make_bench(run_times=RunTimes((0.3,)))
    bench.engine.hold()
    first = bench.start(deadline_s=LONG_S)
    await bench.until_a_run_starts()
    began_at = time.monotonic()

    with pytest.raises(Overloaded):
        await bench.inspect(deadline_s=0.61)  # admitted: 0.3 s of the running batch, 0.3 s of its own
    waited_s = time.monotonic() - began_at
    bench.engine.release()
    await first

    assert waited_s < 0.6


@in_loop
async def test_place_when_queue_is_full_then_refuses_and_has_room_again_later(make_bench):
    """One frame more than there are places is refused; an answered frame gives its place back."""
    bench = make_bench(max_queue_size=2)
    bench.engine.hold()
    accepted = [bench.start(), bench.start()]
    await bench.until_a_run_starts()

    with pytest.raises(Overloaded) as refusal:
        await bench.inspect()
    depth = bench.metric('queue_depth{engine="bench"}')
    bench.engine.release()
    await asyncio.gather(*accepted)
    await bench.inspect()

    assert refusal.value.retry_after_s is not None
    assert depth == 2
    assert bench.metric('queue_depth{engine="bench"}') == 0


@in_loop
async def test_submit_when_one_frame_fails_its_batch_then_neighbours_are_answered(make_bench):
    """A batch that fails is run again frame by frame, and only the frame that fails alone has no verdict."""
    bench = make_bench(run_times=BATCHES_PAY)
    bench.engine.on_run = refuse_white

    answers = await together(bench, [bench.inspect(grey) for grey in (10, 255, 20)])

    assert bench.engine.batches == [1, 3, 1, 1, 1]
    assert isinstance(answers[1], EngineFailed)
    assert [round(answers[i].scores[0] * 255) for i in (0, 2)] == [10, 20]
    assert bench.probes == 1
    assert bench.batcher.is_healthy


@in_loop
async def test_run_when_one_frame_can_not_be_prepared_and_another_fails_then_each_is_told_its_own_fault(make_bench):
    """What was known of a batch before its run is not lost when its frames have to be run again."""
    bench = make_bench(run_times=BATCHES_PAY)
    bench.engine.on_run = refuse_white

    batch = [bench.inspect_work(Unreadable()), bench.inspect(255), bench.inspect(20)]
    unreadable, failed, answered = await together(bench, batch)

    assert bench.engine.batches == [1, 2, 1, 1]
    assert isinstance(unreadable, UnreadableFrame)
    assert isinstance(failed, EngineFailed)
    assert answered.scores * 255 == pytest.approx([20])
    assert bench.batcher.is_healthy


@in_loop
async def test_submit_when_a_frame_fails_and_the_probe_too_then_no_neighbour_is_answered(make_bench):
    """What a lost engine said just before and just after is no verdict, though it looked like one."""
    bench = make_bench(run_times=BATCHES_PAY)
    bench.engine.on_run = refuse_white
    bench.probe_fault = EngineFailed("The known frames fail as well.")

    answers = await together(bench, [bench.inspect(grey) for grey in (10, 255, 20)])

    assert [type(answer) for answer in answers] == [EngineFailed] * 3
    assert not bench.batcher.is_healthy
    assert bench.batcher.is_lost


@in_loop
async def test_batcher_when_probe_fails_too_then_is_unhealthy_and_answers_everyone(make_bench):
    """A lost engine fails whoever waits, admits nobody, and says so to readiness."""
    bench = make_bench()

    def fail(_):
        raise RuntimeError

    bench.engine.on_run = fail
    bench.probe_fault = EngineFailed("The known frames fail as well.")
    bench.engine.hold()
    waiting = [bench.start() for _ in range(3)]
    await bench.until_a_run_starts()
    bench.engine.release()

    answers = await asyncio.gather(*waiting, return_exceptions=True)

    assert [type(answer) for answer in answers] == [EngineFailed] * 3
    assert bench.engine.batches == [1]  # what waited is not run on an engine that is lost
    assert not bench.batcher.is_healthy
    with pytest.raises(LineNotReady):
        await bench.inspect()


@in_loop
async def test_batcher_when_a_run_does_not_end_then_is_unhealthy_and_answers_everyone(make_bench):
    """A run that takes longer than anything reasonable counts as a lost engine."""
    bench = make_bench(stuck_after_s=SOON_S)
    bench.engine.hold()

    answers = await asyncio.gather(bench.inspect(), bench.inspect(), return_exceptions=True)

    assert [type(answer) for answer in answers] == [EngineFailed] * 2
    assert not bench.batcher.is_healthy


@pytest.mark.parametrize("paused_s", [29.99, 31, 3600])
@in_loop
async def test_batcher_when_the_whole_process_is_paused_then_stays_healthy_and_answers(make_bench, paused_s):
    """A run that was under way when the process was paused is given time to end once it goes on."""
    clock = hold_time()
    bench = make_bench(stuck_after_s=30, clock=clock)
    bench.engine.hold()
    answer = bench.start(51, deadline_s=9999)
    await bench.until_a_run_starts()

    await pass_time(clock, paused_s)
    await pass_time(clock, 4)
    bench.engine.release()

    assert (await answer).scores == pytest.approx([0.2])
    assert bench.batcher.is_healthy


@pytest.mark.parametrize("paused_s", [0, 31])
@in_loop
async def test_batcher_when_a_run_does_not_end_after_a_pause_either_then_is_lost_one_period_later(make_bench, paused_s):
    """A pause does not hide a run that never ends: it is noticed once the process was awake for long enough."""
    clock = hold_time()
    bench = make_bench(stuck_after_s=30, clock=clock)
    bench.engine.hold()
    answer = bench.start(deadline_s=9999)
    await bench.until_a_run_starts()

    await pass_time(clock, paused_s)
    for _ in range(29):
        await pass_time(clock, 1)
    was_healthy = bench.batcher.is_healthy
    await pass_time(clock, 1.1)

    with pytest.raises(EngineFailed):
        await answer
    assert was_healthy
    assert not bench.batcher.is_healthy


@in_loop
async def test_batcher_when_a_run_does_not_end_then_is_lost_at_once_and_not_with_the_next_look(make_bench):
    """Looks come late on a busy machine, and the last one comes when the time is over."""
    clock = hold_time()
    bench = make_bench(stuck_after_s=30, clock=clock)
    bench.engine.hold()
    answer = bench.start(deadline_s=9999)
    await bench.until_a_run_starts()

    for _ in range(4):
        await pass_time(clock, 7)
    was_healthy = bench.batcher.is_healthy
    await pass_time(clock, 2.1)

    assert was_healthy
    assert isinstance(answer.exception(), EngineFailed)


@pytest.mark.parametrize("awake_s", [1, 12])
@in_loop
async def test_batcher_when_paused_again_and_again_then_a_run_that_does_not_end_is_noticed_all_the_same(
    make_bench, awake_s
):
    """However often the process is paused, and however briefly it is awake between, no hung engine is hidden by it."""
    clock = hold_time()
    bench = make_bench(stuck_after_s=30, clock=clock)
    bench.engine.hold()
    answer = bench.start(deadline_s=9999)
    await bench.until_a_run_starts()

    was_awake_s = 0
    while bench.batcher.is_healthy and was_awake_s < 120:
        await pass_time(clock, 31)
        for _ in range(awake_s):
            await pass_time(clock, 1)
        was_awake_s += awake_s

    assert isinstance(answer.exception(), EngineFailed)
    assert bench.batcher.is_lost


@pytest.mark.parametrize("awake_s", [0, 2, 29])
@in_loop
async def test_batcher_when_paused_more_than_once_during_a_run_then_stays_healthy_and_answers(make_bench, awake_s):
    """An engine is never lost over a time in which its process stood still, whatever came before."""
    clock = hold_time()
    bench = make_bench(stuck_after_s=30, clock=clock)
    bench.engine.hold()
    answer = bench.start(51, deadline_s=99999)
    await bench.until_a_run_starts()

    for _ in range(awake_s):
        await pass_time(clock, 1)
    for paused_s in (11, 31, 3600, 29, 12, 7200, 31, 31):
        await pass_time(clock, paused_s)
    bench.engine.release()

    assert (await answer).scores == pytest.approx([0.2])
    assert bench.batcher.is_healthy


class HeldWork:
    """Work that is prepared when it is released, and not before."""

    def __init__(self):
        self.gate = threading.Event()
        self.began = threading.Event()
        self.thread = None

    def prepare(self):
        """Wait."""
        self.thread = threading.current_thread()
        self.began.set()
        self.gate.wait()
        return np.zeros((1, 8, 12, 3), np.uint8)

    def finish(self, result):
        """Return it as it is."""
        return result


@pytest.fixture
def make_held():
    """Make work that is released with the test."""
    works = []

    def make():
        works.append(HeldWork())
        return works[-1]

    yield make
    for work in works:
        work.gate.set()


async def run_work(bench, work, *, deadline_s=LONG_S, line="line"):
    """Take a place and run a frame that is prepared by the runner."""
    with bench.batcher.place(bench.clock() + deadline_s, line=line) as place:
        return await bench.batcher.run(place, work, 0)


@in_loop
async def test_batcher_when_decoding_does_not_end_then_refuses_the_frame_and_answers_all_others(make_bench, make_held):
    """A frame that keeps its runner is its sender's affair: the engine is not lost, and another runner goes on."""
    bench, work = make_bench(stuck_after_s=SOON_S), make_held()

    with pytest.raises(UnreadableFrame, match="could not be decoded"):
        await run_work(bench, work)
    result = await bench.inspect(grey=51)

    assert result.scores == pytest.approx([0.2])
    assert bench.batcher.is_healthy
    assert bench.metric("decoders_replaced_total") == 1


@in_loop
async def test_batcher_when_decoding_ends_after_it_was_given_up_then_frame_never_runs_and_the_thread_ends(
    make_bench, make_held
):
    """What comes back too late runs for nobody, and there are as many runners as before."""
    bench, work = make_bench(stuck_after_s=SOON_S), make_held()
    with pytest.raises(UnreadableFrame):
        await run_work(bench, work)

    work.gate.set()
    await asyncio.to_thread(work.thread.join)

    assert bench.engine.batches == []
    assert (await bench.inspect()).batch_size == 1


@in_loop
async def test_batcher_when_the_deadline_is_before_that_then_it_fires_and_the_runner_is_replaced_all_the_same(
    make_bench, make_held
):
    """Nobody need wait for a frame to have it noticed that it keeps a runner."""
    bench, work = make_bench(stuck_after_s=4 * SOON_S), make_held()

    with pytest.raises(DeadlinePassed):
        await run_work(bench, work, deadline_s=SOON_S)
    await bench.inspect()

    assert bench.batcher.is_healthy
    assert bench.metric("decoders_replaced_total") == 1


@in_loop
async def test_batcher_when_a_frame_keeps_its_batch_then_neighbours_are_told_to_come_again(make_bench, make_held):
    """Only the frame that is being decoded is blamed."""
    bench, work = make_bench(run_times=BATCHES_PAY, stuck_after_s=10 * SOON_S), make_held()
    bench.engine.hold()
    first = bench.start()
    await bench.until_a_run_starts()
    kept = [asyncio.ensure_future(run_work(bench, work)), bench.start(), bench.start()]
    await asyncio.sleep(0)
    bench.engine.release()

    answers = await asyncio.gather(*kept, return_exceptions=True)

    assert [type(answer) for answer in answers] == [UnreadableFrame, Overloaded, Overloaded]
    assert (await first).batch_size == 1
    assert bench.batcher.is_healthy


@in_loop
async def test_batcher_when_many_decoders_never_come_back_then_is_lost_and_answers_everyone(make_bench, make_held):
    """What they hold is only given back with the process."""
    bench = make_bench(runners=MOST_GIVEN_UP + 1, stuck_after_s=SOON_S)

    answers = await asyncio.gather(
        *(run_work(bench, make_held()) for _ in range(MOST_GIVEN_UP)), return_exceptions=True
    )

    assert [type(answer) for answer in answers] == [UnreadableFrame] * MOST_GIVEN_UP
    assert bench.batcher.is_lost
    with pytest.raises(LineNotReady):
        await bench.inspect()


@in_loop
async def test_batcher_when_decoders_came_back_then_they_are_not_counted_as_lost(make_bench, make_held):
    """However many frames were slow, one after the other, the process goes on."""
    bench = make_bench(stuck_after_s=SOON_S / 5)

    for _ in range(MOST_GIVEN_UP + 2):
        work = make_held()
        with pytest.raises(UnreadableFrame):
            await run_work(bench, work)
        work.gate.set()
        await asyncio.to_thread(work.thread.join)

    assert bench.batcher.is_healthy


@in_loop
async def test_wait_for_gap_when_decoding_does_not_end_then_there_is_one_once_the_runner_is_replaced(
    make_bench, make_held
):
    """A runner that was given up counts no more, and not once less when it comes back: golden frames need the gap."""
    clock, running = hold_time(), Running()
    bench, work = make_bench(runners=2, stuck_after_s=30, running=running, clock=clock), make_held()
    bench.engine.hold()
    kept, beside = asyncio.ensure_future(run_work(bench, work, deadline_s=9999)), bench.start(deadline_s=9999)
    await asyncio.to_thread(work.began.wait)
    await bench.until_a_run_starts()
    gaps = [(running.count, bench.batcher.wait_for_gap(0.0))]

    bench.engine.release()
    await beside
    gaps.append((running.count, bench.batcher.wait_for_gap(0.0)))
    for _ in range(31):
        await pass_time(clock, 1)
    gaps.append((running.count, bench.batcher.wait_for_gap(0.0)))
    work.gate.set()
    await asyncio.to_thread(work.thread.join)
    gaps.append((running.count, bench.batcher.wait_for_gap(0.0)))

    assert gaps == [(2, False), (1, False), (0, True), (0, True)]
    assert isinstance(kept.exception(), UnreadableFrame)


@in_loop
async def test_batcher_when_decoding_ends_just_as_it_is_given_up_then_a_run_that_does_not_end_is_noticed(
    make_bench, make_held
):
    """A frame that comes back at the last moment runs after all, and its run is watched like any other."""
    clock = hold_time()
    bench, work = make_bench(stuck_after_s=30, clock=clock), make_held()
    bench.engine.hold()
    answer = asyncio.ensure_future(run_work(bench, work, deadline_s=9999))
    await asyncio.to_thread(work.began.wait)
    give_up = bench.batcher._queue.give_up

    def come_back_before(batch):
        work.gate.set()
        bench.engine.started.acquire()
        return give_up(batch)

    bench.batcher._queue.give_up = come_back_before

    for _ in range(31):
        await pass_time(clock, 1)
    was_healthy, batches = bench.batcher.is_healthy, list(bench.engine.batches)
    for _ in range(31):
        await pass_time(clock, 1)

    assert (was_healthy, batches) == (True, [1])
    assert bench.batcher.is_lost
    assert isinstance(answer.exception(), EngineFailed)
    assert bench.metric("decoders_replaced_total") == 0


@in_loop
async def test_batcher_when_younger_runs_begin_beside_one_that_does_not_end_then_is_lost_as_soon(make_bench):
    """What another runner is still in time with does not put off that a run which hangs is noticed."""
    clock = hold_time()
    bench = make_bench(runners=2, stuck_after_s=30, clock=clock)
    bench.engine.hold()
    answers = [bench.start(deadline_s=9999)]
    await bench.until_a_run_starts()

    for _ in range(15):
        await pass_time(clock, 1)
    answers.append(bench.start(deadline_s=9999))
    await bench.until_a_run_starts()
    for _ in range(16):
        await pass_time(clock, 1)

    assert not bench.batcher.is_healthy
    assert [type(answer.exception()) for answer in answers] == [EngineFailed] * 2


@in_loop
async def test_batcher_when_a_runner_ends_then_is_unhealthy_and_answers_everyone(make_bench):
    """A runner that is torn down from inside takes nobody's answer with it."""
    bench = make_bench(runners=2)

    def end(_):
        raise SystemExit

    bench.engine.on_run = end

    answers = await asyncio.gather(*(bench.inspect() for _ in range(5)), return_exceptions=True)

    assert [type(answer) for answer in answers] == [EngineFailed] * 5
    assert not bench.batcher.is_healthy


class TornBuckets(Buckets):
    """A metric that fails, and with it the batch loop that counts on it."""

    def observe(self, value, inspection_id=None):
        """Fail."""
        raise OSError(value, inspection_id)


@in_loop
async def test_batcher_when_the_batch_loop_itself_fails_then_is_unhealthy_and_answers_everyone():
    """A fault of the loop's own is heard by everyone who waits."""
    meter = EngineMeter(TornBuckets((1,)), Depth(), {}, Counter("replaced", "None.", registry=None))
    batcher = Batcher(
        FakeEngine(),
        lambda: None,
        lines=1,
        runners=1,
        max_queue_size=4,
        run_times=RunTimes.unknown(1),
        stuck_after_s=LONG_S,
        meter=meter,
        clock=time.monotonic,
    )

    with pytest.raises(EngineFailed), batcher.place(time.monotonic() + LONG_S, line="line") as place:
        await batcher.submit(place, np.zeros((1, 8, 12, 3), np.uint8), 0)

    assert not batcher.is_healthy
    with pytest.raises(EngineFailed):
        await batcher.submit(place, np.zeros((1, 8, 12, 3), np.uint8), 0)


@pytest.mark.parametrize(("said", "reason"), [((), "caller_left"), ((REQUEST_FAILED,), "request_failed")])
@in_loop
async def test_submit_when_given_up_while_it_waits_then_frame_is_not_run_and_counted_by_its_reason(
    make_bench, said, reason
):
    """A frame that nobody waits for any more is dropped before it takes a place in a batch."""
    bench = make_bench()
    runs = watch_greys(bench.engine)
    bench.engine.hold()
    first = bench.start(1)
    await bench.until_a_run_starts()
    given_up = bench.start(2)
    await asyncio.sleep(0)

    given_up.cancel(*said)
    bench.engine.release()
    await first
    await bench.inspect(3)

    assert runs == [[1], [3]]
    assert bench.discarded() == {reason: 1}


@pytest.mark.parametrize(("said", "reason"), [((), "caller_left"), ((REQUEST_FAILED,), "request_failed")])
@in_loop
async def test_submit_when_given_up_during_the_run_then_result_is_counted_by_its_reason(make_bench, said, reason):
    """A result that nobody waits for any more is thrown away and counted."""
    bench = make_bench()
    bench.engine.hold()
    given_up = bench.start()
    await bench.until_a_run_starts()

    given_up.cancel(*said)
    bench.engine.release()
    await bench.inspect()

    assert given_up.cancelled()
    assert bench.discarded() == {reason: 1}


@in_loop
async def test_drain_when_frames_are_accepted_then_answers_them_and_admits_no_more(make_bench):
    """Draining ends when the last accepted frame is answered; meanwhile new ones are sent elsewhere."""
    bench = make_bench()
    bench.engine.hold()
    accepted = [bench.start(), bench.start()]
    await bench.until_a_run_starts()
    draining = asyncio.ensure_future(bench.batcher.drain())
    await asyncio.sleep(0)

    with pytest.raises(LineNotReady):
        await bench.inspect()
    bench.engine.release()
    await draining

    assert [answer.result().batch_size for answer in accepted] == [1, 1]


@in_loop
async def test_close_when_frames_still_wait_then_they_are_told(make_bench):
    """Whoever is left after the drain hears that the service stops."""
    bench = make_bench()
    bench.engine.hold()
    waiting = [bench.start(), bench.start()]
    await bench.until_a_run_starts()

    bench.batcher.close()
    answers = await asyncio.gather(*waiting, return_exceptions=True)

    assert [type(answer) for answer in answers] == [LineNotReady] * 2


def _raise(error):
    raise error


@pytest.mark.parametrize(
    "on_run",
    [
        pytest.param(lambda _: None, id="answered"),
        pytest.param(lambda _: _raise(ValueError()), id="engine raises"),
        pytest.param(lambda frames: grey_level(frames[:0]), id="no answers"),
    ],
)
@in_loop
async def test_place_when_a_frame_ends_in_any_way_then_is_given_back(make_bench, on_run):
    """With a single place, the next frame is admitted whatever became of the one before."""
    bench = make_bench(max_queue_size=1)
    bench.engine.on_run = on_run

    for _ in range(3):
        try:
            await bench.inspect()
        except FlawlineError as error:
            assert isinstance(error, EngineFailed)  # noqa: PT017 - the outcome may be either; only the place matters

    assert bench.metric('queue_depth{engine="bench"}') == 0


@in_loop
async def test_submit_when_nothing_else_runs_then_the_lone_way_is_taken(make_bench):
    """A frame that is alone gets every core, and one that comes meanwhile runs beside it in the ordinary way."""
    wide = FakeEngine()
    bench = make_bench(runners=2, alone=LoneRun(wide.run, 2.0))
    wide.hold()

    first = bench.start(grey=51)
    await asyncio.to_thread(wide.started.acquire)
    beside = await bench.inspect(grey=102)
    wide.release()

    assert ((await first).scores, beside.scores) == (pytest.approx([0.2]), pytest.approx([0.4]))
    assert (wide.batches, bench.engine.batches) == ([1], [1])


@in_loop
async def test_submit_when_another_engine_runs_then_the_lone_way_is_not_taken(make_bench):
    """Cores are shared by all engines of a process, so a frame beside another engine's is not alone."""
    wide, running = FakeEngine(), Running()
    bench = make_bench(runners=2, alone=LoneRun(wide.run, 2.0), running=running)

    running.begin()
    await bench.inspect()
    running.end()
    await bench.inspect()

    assert (bench.engine.batches, wide.batches) == ([1], [1])


@in_loop
async def test_submit_when_another_frame_waits_then_the_lone_way_is_not_taken(make_bench, make_held):
    """A frame behind this one would wait for every core, though it could have most of them now."""
    wide = FakeEngine()
    bench, work = make_bench(alone=LoneRun(wide.run, 2.0)), make_held()
    first = asyncio.ensure_future(bench.inspect_work(work))
    await asyncio.to_thread(work.began.wait)
    second = bench.start()
    await asyncio.sleep(0)

    work.gate.set()
    await asyncio.gather(first, second)

    assert (bench.engine.batches, wide.batches) == ([1], [1])


@in_loop
async def test_submit_when_lone_runs_are_slow_then_the_estimate_does_not_rise(make_bench):
    """They tell how long frames take at most, by what is thought of them by then, and not by what was at first."""
    wide, clock = FakeEngine(), FakeClock()
    bench = make_bench(run_times=RunTimes((LONG_S,)), alone=LoneRun(wide.run, 2.0), clock=clock)
    took_s = 1
    wide.on_run = lambda _: clock.advance(took_s)
    for _ in range(10):
        await bench.inspect()
    fallen = bench.batcher._queue.run_times

    took_s = 3
    await bench.inspect()

    assert fallen.of(1) == pytest.approx(2, abs=0.1)
    assert bench.batcher._queue.run_times == fallen


@in_loop
async def test_submit_when_lone_runs_are_quick_then_a_wrong_estimate_falls(make_bench):
    """Lone runs alone teach that frames are not as slow as was thought, or two at once would be refused for ever."""
    wide = FakeEngine()
    bench = make_bench(run_times=RunTimes((LONG_S,)), alone=LoneRun(wide.run, 2.0))

    for _ in range(60):
        await bench.inspect()
    both = await asyncio.gather(bench.inspect(deadline_s=LONG_S / 2), bench.inspect(deadline_s=LONG_S / 2))

    assert len(both) == 2
