"""Promises of patience: what never ends is found stuck, and nothing is over a time in which the process stood still."""

from itertools import cycle, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scheduling.patience import Patience

STUCK_AFTER_S = 48.0
LOOK_S = 8.0
MOST_PAUSES = 16

# In quarters of a second, so that no sum is rounded.
quarters = st.integers(1, 400).map(lambda n: n / 4)
turns = st.tuples(quarters, quarters)  # seconds awake, then seconds paused


class Process:
    """A process that is paused from time to time, with a step that never ends under way from 0 on.

    Args:
        turns: seconds in which it is awake and in which it is paused, one after the other; then it stays awake.
    """

    def __init__(self, turns):
        self.pauses = []
        end = 0.0
        for awake_s, paused_s in turns:
            self.pauses.append((end + awake_s, end + awake_s + paused_s))
            end += awake_s + paused_s

    def awake_at(self, time):
        """Return the first moment from then on in which something can happen."""
        return next((end for begin, end in self.pauses if begin <= time < end), time)

    def awake_s(self, time):
        """Return how long the process was awake until then."""
        return time - sum(min(end, time) - begin for begin, end in self.pauses if begin < time)

    def watch(self, gaps):
        """Look at the step, at most so many seconds from one look to the next, until it is stuck.

        Returns:
            The moment, and how many looks told of a pause.
        """
        patience, now, told = Patience(STUCK_AFTER_S), 0.0, 0
        for gap_s in islice(cycle(gaps), 2000):
            due_at = now + min(gap_s, max(patience.left_s(0.0, now), 0.25))
            now = self.awake_at(due_at)
            told += patience.look(now, now - due_at)
            if patience.left_s(0.0, now) <= 0:
                return now, told
        raise AssertionError("never found stuck")


gaps = st.lists(st.integers(4, 32).map(lambda n: n / 4), min_size=1, max_size=5)


def test_looks_when_a_step_may_take_long_then_are_six_in_that_time():
    """Whoever waits is told how often to look."""
    patience = Patience(STUCK_AFTER_S)

    assert (patience.stuck_after_s, patience.looks_every_s) == (STUCK_AFTER_S, LOOK_S)


def test_left_when_no_look_was_late_then_counts_all_the_time():
    """A step has what is left of its time, to the moment, however late looks are within what is usual."""
    patience = Patience(STUCK_AFTER_S)

    told = [patience.look(now, late_s) for now, late_s in ((8.0, 0.0), (24.0, LOOK_S), (32.0, 0.25))]

    assert told == [False] * 3
    assert [patience.left_s(since, 40.0) for since in (-8.0, 0.0, 30.0)] == [0.0, 8.0, 38.0]


def test_left_when_a_look_was_late_then_counts_nothing_since_the_one_before():
    """Steps from before the pause keep what had counted, and those that began meanwhile have all their time."""
    patience = Patience(STUCK_AFTER_S)
    patience.look(8.0, 0.0)

    has_stood_still = patience.look(100.0, 84.0)

    assert has_stood_still
    assert [patience.left_s(since, 100.0) for since in (0.0, 8.0, 12.0, 100.0)] == [40.0, 48.0, 48.0, 48.0]
    assert patience.left_s(0.0, 110.0) == 30.0


@given(turns=st.lists(turns, max_size=60), gaps=gaps)
def test_step_when_it_never_ends_then_is_found_stuck_whatever_the_pauses(turns, gaps):
    """Each pause hides at most one look's time of being awake, and no more than so many of them hide anything."""
    process = Process(turns)

    found_at, told = process.watch(gaps)

    assert process.awake_s(found_at) <= STUCK_AFTER_S + LOOK_S * min(told, MOST_PAUSES)


@given(turns=st.lists(turns, max_size=MOST_PAUSES), gaps=gaps)
def test_step_when_the_process_was_paused_then_is_not_stuck_before_its_time_awake(turns, gaps):
    """No pause of more than two looks ever counts, wherever it comes and however many there are; short ones may."""
    process = Process(turns)

    found_at, _ = process.watch(gaps)

    short_s = sum(end - begin for begin, end in process.pauses if end - begin <= 2 * LOOK_S)
    assert process.awake_s(found_at) >= STUCK_AFTER_S - short_s


@given(pauses=st.lists(st.integers(9, 4000), min_size=200, max_size=200))
def test_step_when_every_look_is_late_then_is_found_stuck_in_the_end(pauses):
    """A process that is hardly ever awake tells apart nothing, and does not wait for ever."""
    patience, now, looks = Patience(STUCK_AFTER_S), 0.0, 0

    while patience.left_s(0.0, now) > 0:
        now += 0.25 + pauses[looks]
        patience.look(now, float(pauses[looks]))
        looks += 1

    assert MOST_PAUSES < looks <= MOST_PAUSES + STUCK_AFTER_S / LOOK_S


@given(looks=st.lists(st.tuples(quarters, quarters), max_size=40), begun=st.tuples(st.integers(0, 9000), quarters))
def test_left_when_one_step_began_before_another_then_is_never_more(looks, begun):
    """Whoever looks at the oldest step first may leave the others for later where that one has time left."""
    patience, now = Patience(STUCK_AFTER_S), 0.0
    for gap_s, late_s in looks:
        now += gap_s + late_s
        patience.look(now, late_s)

    older, younger = begun[0] / 4, begun[0] / 4 + begun[1]

    assert patience.left_s(older, now) <= patience.left_s(younger, now)


@pytest.mark.parametrize("since", [0.0, 5.0])
def test_left_when_paused_before_a_step_began_then_it_has_no_more_time_than_others(since):
    """A pause is no credit for what comes later."""
    patience = Patience(STUCK_AFTER_S)
    patience.look(-50.0, 0.0)
    patience.look(since, 30.0)

    assert patience.left_s(since, since + 10.0) == 38.0
