"""Promises of the alarm: it rings at the earliest moment, tells how late, and costs a timer only where it must."""

import asyncio

import pytest

from service.scheduling.alarm import Alarm
from tests.fakes import hold_time, in_loop, pass_time


class Bell:
    """An alarm in a loop whose time is held, and when it rang."""

    def __init__(self):
        self.clock = hold_time()
        self.began_at = self.clock()
        self.rang = []
        self.alarm = Alarm(self._ring, self.clock)
        self.timers = 0
        loop = asyncio.get_running_loop()
        call_later = loop.call_later

        def count(*arguments):
            self.timers += 1
            return call_later(*arguments)

        loop.call_later = count

    def _ring(self):
        self.rang.append(self.clock() - self.began_at)

    def ring_by(self, in_s):
        """Ask for a moment, in seconds from the beginning."""
        self.alarm.ring_by(self.began_at + in_s)

    async def wait(self, seconds):
        """Let so many seconds pass, one by one."""
        for _ in range(seconds):
            await pass_time(self.clock, 1.01)


@in_loop
async def test_ring_by_when_several_moments_are_asked_for_then_rings_once_at_the_earliest():
    """What comes later is asked for again by whoever hears it."""
    bell = Bell()

    for in_s in (5, 3, 8):
        bell.ring_by(in_s)
    await bell.wait(12)

    assert bell.rang == [pytest.approx(3.03)]


@in_loop
async def test_ring_by_when_a_later_moment_is_asked_for_then_takes_no_timer():
    """Every frame asks, and few of them are the first to be due."""
    bell = Bell()

    for in_s in (3, 3, 5, 8):
        bell.ring_by(in_s)

    assert bell.timers == 1


@in_loop
async def test_ring_by_when_it_has_rung_then_may_be_asked_for_any_moment_again():
    """A moment that has come is in nobody's way."""
    bell = Bell()
    bell.ring_by(1)
    await bell.wait(2)

    bell.ring_by(8)
    await bell.wait(7)

    assert bell.rang == [pytest.approx(1.01), pytest.approx(8.08)]


@in_loop
async def test_ring_by_when_the_moment_is_past_then_rings_at_once_and_tells_how_late():
    """Whoever is told too late what to watch is not told on time that it was watched."""
    bell = Bell()
    await bell.wait(10)

    bell.ring_by(4)
    await pass_time(bell.clock, 0.01)

    assert bell.rang == [pytest.approx(10.11)]
    assert bell.alarm.late_s == pytest.approx(6.11)


@in_loop
async def test_late_when_the_whole_process_stood_still_then_is_the_time_since_the_moment():
    """That is how a pause is told from a run that does not end."""
    bell = Bell()
    bell.ring_by(5)

    await pass_time(bell.clock, 60)

    assert (bell.rang, bell.alarm.late_s) == ([60.0], 55.0)


@in_loop
async def test_cancel_when_a_moment_was_asked_for_then_does_not_ring_and_may_be_asked_again():
    """What was cancelled leaves nothing behind."""
    bell = Bell()
    bell.ring_by(1)

    bell.alarm.cancel()
    await bell.wait(3)
    bell.ring_by(6)
    await bell.wait(4)

    assert bell.rang == [pytest.approx(6.06)]
