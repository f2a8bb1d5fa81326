"""Promises of the threads that decode: every frame ends once, no line takes them all, and none is kept for ever."""

import asyncio
import gc
import threading
import time
import weakref

import pytest

from service.errors import UnreadableFrame
from service.scheduling.decoders import Decoders
from service.scheduling.patience import MOST_GIVEN_UP
from tests.fakes import hold_time, in_loop, pass_time

SOON_S = 0.05
LONG_S = 20.0


class Step:
    """A step that ends when it is released."""

    def __init__(self, name="", order=None):
        self.gate, self.began = threading.Event(), threading.Event()
        self.name, self.order = name, order
        self.thread = None

    def __call__(self):
        """Wait."""
        self.thread = threading.current_thread()
        self.began.set()
        if self.order is not None:
            self.order.append(self.name)
        self.gate.wait()

    async def until_begun(self):
        """Wait until a thread is in it."""
        await asyncio.to_thread(self.began.wait)


class Stand:
    """Decoders, and what they tell."""

    def __init__(self, workers, stuck_after_s, clock):
        self.replaced = 0
        self.steps = []
        self.decoders = Decoders(workers, stuck_after_s=stuck_after_s, clock=clock, tell_of_replaced=self._count)

    def _count(self):
        self.replaced += 1

    def step(self, *arguments):
        """Make a step that is released with the test."""
        self.steps.append(Step(*arguments))
        return self.steps[-1]

    def start(self, line, step):
        """Begin to decode, and go on."""
        return asyncio.ensure_future(self.decoders.run(line, step))


@pytest.fixture
def make_stand():
    """Set up decoders whose threads end with the test."""
    stands = []

    def make(workers=1, stuck_after_s=LONG_S, clock=time.monotonic):
        stands.append(Stand(workers, stuck_after_s, clock))
        return stands[-1]

    yield make
    for stand in stands:
        stand.decoders.close()
        for step in stand.steps:
            step.gate.set()


@in_loop
async def test_run_when_a_step_raises_then_its_caller_hears_of_it_and_the_thread_goes_on(make_stand):
    """One frame's fault is nobody else's."""
    stand, done = make_stand(), []

    def fail():
        raise UnreadableFrame("It is none.")

    with pytest.raises(UnreadableFrame, match="It is none"):
        await stand.decoders.run("line", fail)
    await stand.decoders.run("line", lambda: done.append(1))

    assert done == [1]


@in_loop
async def test_run_when_a_step_raised_then_nothing_is_kept_of_it(make_stand):
    """A frame is large, and garbage is collected seldom."""
    stand = make_stand()

    class Frame:
        def __call__(self):
            raise UnreadableFrame("It is none.")

    frame = Frame()
    kept = weakref.ref(frame)
    gc.disable()
    try:
        with pytest.raises(UnreadableFrame):
            await stand.decoders.run("line", frame)
        del frame
        await stand.decoders.run("line", lambda: None)

        assert kept() is None
    finally:
        gc.enable()


@in_loop
async def test_run_when_one_line_sends_much_then_the_other_does_not_wait_behind_it(make_stand):
    """A line that holds threads comes after one that holds none, however much it sent before."""
    stand, order = make_stand(workers=2), []
    held = [stand.step("held") for _ in range(2)]
    started = [stand.start("busy", step) for step in held]
    for step in held:
        await step.until_begun()
    waiting = [stand.start("busy", stand.step("busy", order)) for _ in range(3)]
    other = stand.step("other", order)
    waiting.append(stand.start("other", other))
    await asyncio.sleep(0)

    held[0].gate.set()
    await other.until_begun()

    assert order == ["other"]
    for step in stand.steps:
        step.gate.set()
    await asyncio.gather(*started, *waiting)
    assert order == ["other", "busy", "busy", "busy"]


@in_loop
async def test_run_when_the_caller_left_then_the_step_is_not_begun(make_stand):
    """Nobody waits for it, and others do."""
    stand, order = make_stand(), []
    held = stand.step()
    first = stand.start("line", held)
    await held.until_begun()
    left = stand.start("line", stand.step("left", order))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)

    held.gate.set()
    await first
    await stand.decoders.run("line", lambda: order.append("after"))

    assert order == ["after"]


@in_loop
async def test_run_when_a_step_does_not_end_then_refuses_the_frame_and_replaces_the_thread(make_stand):
    """Others are decoded again, although nothing can end what is kept."""
    stand = make_stand(stuck_after_s=SOON_S)

    with pytest.raises(UnreadableFrame, match="could not be decoded"):
        await stand.decoders.run("line", stand.step())
    await stand.decoders.run("other", lambda: None)

    assert stand.replaced == 1
    assert not stand.decoders.is_lost


@in_loop
async def test_run_when_its_caller_left_before_that_then_the_thread_is_replaced_all_the_same(make_stand):
    """A deadline ends the waiting, and not what is waited for."""
    stand = make_stand(stuck_after_s=SOON_S)
    step = stand.step()
    running = stand.start("line", step)
    await step.until_begun()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)

    await stand.decoders.run("other", lambda: None)

    assert stand.replaced == 1


@pytest.mark.parametrize("awake_s", [0, 2, 29])
@in_loop
async def test_run_when_the_whole_process_was_paused_then_the_thread_keeps_its_place(make_stand, awake_s):
    """Decoding that was under way when the process was paused, once or often, is given time to end once it goes on."""
    clock = hold_time()
    stand = make_stand(stuck_after_s=30, clock=clock)
    step = stand.step()
    running = stand.start("line", step)
    await step.until_begun()

    for _ in range(awake_s):
        await pass_time(clock, 1)
    for paused_s in (3600, 11, 31, 29, 12, 7200, 31, 31):
        await pass_time(clock, paused_s)
    step.gate.set()
    await running

    assert stand.replaced == 0


@pytest.mark.parametrize("paused_s", [0, 31])
@in_loop
async def test_run_when_a_step_does_not_end_after_a_pause_either_then_is_refused_one_period_later(make_stand, paused_s):
    """A pause does not hide a step that never ends: it is noticed by a look once the process was awake for so long."""
    clock = hold_time()
    stand = make_stand(stuck_after_s=30, clock=clock)
    step = stand.step()
    running = stand.start("line", step)
    await step.until_begun()

    await pass_time(clock, paused_s)
    for _ in range(29):
        await pass_time(clock, 1)
    replaced = stand.replaced
    for _ in range(7):
        await pass_time(clock, 1)

    assert replaced == 0
    assert stand.replaced == 1
    with pytest.raises(UnreadableFrame):
        await running


@pytest.mark.parametrize("awake_s", [1, 12])
@in_loop
async def test_run_when_paused_again_and_again_then_a_step_that_does_not_end_is_noticed_all_the_same(
    make_stand, awake_s
):
    """However often the process is paused, and however briefly it is awake between, no thread is kept for ever."""
    clock = hold_time()
    stand = make_stand(stuck_after_s=30, clock=clock)
    step = stand.step()
    running = stand.start("line", step)
    await step.until_begun()

    was_awake_s = 0
    while not stand.replaced and was_awake_s < 120:
        await pass_time(clock, 31)
        for _ in range(awake_s):
            await pass_time(clock, 1)
        was_awake_s += awake_s

    assert stand.replaced == 1
    with pytest.raises(UnreadableFrame):
        await asyncio.wait_for(running, LONG_S)


@in_loop
async def test_decoders_when_many_never_come_back_then_are_lost_until_they_do(make_stand):
    """What they hold is only given back with the process, or by themselves."""
    stand = make_stand(workers=MOST_GIVEN_UP, stuck_after_s=SOON_S)
    steps = [stand.step() for _ in range(MOST_GIVEN_UP)]

    answers = await asyncio.gather(*(stand.decoders.run("line", step) for step in steps), return_exceptions=True)

    assert [type(answer) for answer in answers] == [UnreadableFrame] * MOST_GIVEN_UP
    assert stand.decoders.is_lost
    for step in steps:
        step.gate.set()
        await asyncio.to_thread(step.thread.join)
    assert not stand.decoders.is_lost


@in_loop
async def test_close_when_threads_wait_then_they_end(make_stand):
    """Nothing is left behind of a service that stops."""
    stand = make_stand()
    step = stand.step()
    running = stand.start("line", step)
    await step.until_begun()

    stand.decoders.close()
    step.gate.set()
    await running
    await asyncio.to_thread(step.thread.join)

    assert not step.thread.is_alive()
