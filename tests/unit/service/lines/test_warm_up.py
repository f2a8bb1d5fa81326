"""Promises of warming up: sizes run while there is time, and side by side; the lone way must be quicker and equal."""

import threading

import numpy as np
import pytest

from service.engines.engine import LoneRun
from service.errors import EngineFailed
from service.lines.warm_up import LoneTrial, at_once, run_side_by_side, warm_up
from tests.factories import make_manifest
from tests.fakes import FakeEngine, grey_level

FRAMES = np.full((2, 8, 12, 3), 51, np.uint8)
LINE_INDEX = np.zeros(2, np.int64)


class Clock:
    """A clock that stands still but where a run is said to take time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        """Return the time."""
        return self.now


def in_turn(clock, wait_s):
    """Return how runs are done that wait so long for their turn."""
    at_once_then = at_once(clock)

    def timed(run, frames, line_index):
        clock.now += wait_s
        return at_once_then(run, frames, line_index)

    return timed


def trial_of(*, took_s, took_alone_s, held_up_s=(), other_bits=None, wait_s=0.0):
    """Return the trial of an engine both of whose ways take so many seconds."""
    clock, engine, wide = Clock(), FakeEngine(), FakeEngine()
    held_up = iter(held_up_s)

    def ordinary(_):
        clock.now += took_s

    def alone(frames):
        clock.now += took_alone_s + next(held_up, 0.0)
        output = grey_level(frames)
        if other_bits is None:
            return output
        return output._replace(**{other_bits: np.nextafter(getattr(output, other_bits), np.float32(1))})

    engine.on_run, wide.on_run = ordinary, alone
    engine.alone = LoneRun(wide.run, 2.0)
    return LoneTrial(engine, in_turn(clock, wait_s)), engine


def test_warm_up_when_runs_wait_for_their_turn_then_that_costs_no_batch_size():
    """Busy neighbours at loading must not make the batches of an engine smaller for good."""
    clock, engine = Clock(), FakeEngine()

    def take_a_second(_):
        clock.now += 1.0

    engine.on_run = take_a_second

    run_times = warm_up(engine, make_manifest(), 4, 12.0, in_turn(clock, 50.0))

    assert run_times.max_batch_size == 4


def test_warm_up_when_runs_themselves_take_too_long_then_larger_sizes_are_given_up():
    """No size is begun after the limit: it is then never chosen, rather than cold."""
    clock, engine = Clock(), FakeEngine()

    def take_a_second(_):
        clock.now += 1.0

    engine.on_run = take_a_second

    run_times = warm_up(engine, make_manifest(), 4, 6.0, at_once(clock))

    assert run_times.max_batch_size == 2
    assert engine.batches == [1, 1, 1, 2, 2, 2]


def test_warm_up_when_the_first_run_of_a_size_is_slow_then_the_quickest_is_learned():
    """What a size allocates once would refuse frames that can well be in time."""
    clock, engine, took_s = Clock(), FakeEngine(), iter([9.0, 0.5, 0.25, 8.0, 1.0, 2.0])

    def take_its_time(_):
        clock.now += next(took_s)

    engine.on_run = take_its_time

    run_times = warm_up(engine, make_manifest(), 2, 100.0, at_once(clock))

    assert (run_times.of(1), run_times.of(2)) == (0.25, 1.0)


def test_winner_when_lone_way_is_quicker_and_equal_then_is_taken():
    """It answers as the ordinary way does, and is offered from then on."""
    trial, engine = trial_of(took_s=2.0, took_alone_s=1.0)

    output = trial.run(FRAMES, LINE_INDEX)

    np.testing.assert_array_equal(output.scores, grey_level(FRAMES).scores)
    assert trial.winner() is engine.alone


@pytest.mark.parametrize(
    "trouble",
    [
        {"took_s": 1.0, "took_alone_s": 1.0},
        {"took_s": 2.0, "took_alone_s": 1.0, "other_bits": "scores"},
        {"took_s": 2.0, "took_alone_s": 1.0, "other_bits": "anomaly_maps"},
    ],
)
def test_winner_when_lone_way_is_slow_or_differs_in_one_bit_then_is_not_taken(trouble):
    """A score that depends on what else goes on can't be told to anybody who asks why."""
    trial, _ = trial_of(**trouble)

    trial.run(FRAMES, LINE_INDEX)

    assert trial.winner() is None


def test_winner_when_lone_way_differs_on_some_golden_frames_then_is_not_taken():
    """One frame that it sees otherwise is enough, whatever it says of those that come after it."""
    trial, engine = trial_of(took_s=2.0, took_alone_s=1.0)
    quick = engine.alone

    def alone(frames, line_index):
        output = quick.run(frames, line_index)
        return output if len(frames) == 2 else output._replace(scores=output.scores + np.float32(1))

    engine.alone = LoneRun(alone, 2.0)

    trial.run(FRAMES[:1], LINE_INDEX[:1])
    trial.run(FRAMES, LINE_INDEX)

    assert trial.winner() is None


@pytest.mark.parametrize("wait_s", [0.0, 10.0])
def test_winner_when_lone_way_is_held_up_at_first_then_is_tried_again(wait_s):
    """What else goes on at the start, or keeps runs waiting, does not decide how a line is served for good."""
    trial, engine = trial_of(took_s=0.02, took_alone_s=0.01, held_up_s=(0.1, 0.1), wait_s=wait_s)

    trial.run(FRAMES, LINE_INDEX)

    assert trial.winner() is engine.alone


def test_winner_when_lone_way_is_slow_on_a_large_network_then_is_not_tried_for_long():
    """A line waits for it, so that what takes seconds a run is tried once or twice more, and not twenty times."""
    trial, engine = trial_of(took_s=1.0, took_alone_s=1.5)
    trial.run(FRAMES, LINE_INDEX)

    trial.winner()

    assert len(engine.batches) == 2


def test_winner_when_lone_way_fails_then_is_not_taken_and_the_frames_are_answered():
    """A second session that can't run is no reason to refuse a line whose first one can."""
    trial, engine = trial_of(took_s=2.0, took_alone_s=1.0)

    def fail(frames, line_index):
        raise OSError

    engine.alone = LoneRun(fail, 2.0)
    output = trial.run(FRAMES, LINE_INDEX)

    np.testing.assert_array_equal(output.scores, grey_level(FRAMES).scores)
    assert trial.winner() is None


def test_winner_when_engine_has_one_way_then_there_is_none():
    """Most engines have one way."""
    trial = LoneTrial(FakeEngine(), at_once(Clock()))

    trial.run(FRAMES, LINE_INDEX)

    assert trial.winner() is None


def test_side_by_side_when_runs_may_be_then_all_are_under_way_at_once():
    """The buffers of every run are there before frames come, and are seen while the engine is weighed."""
    engine, together = FakeEngine(), threading.Barrier(3)
    engine.on_run = lambda _: together.wait(20) and None

    run_side_by_side(engine, make_manifest(), 2, 3)

    assert engine.batches == [2, 2, 2]


def test_side_by_side_when_one_fails_then_raises():
    """An engine that can't run as often as frames may come is not taken into use."""
    engine = FakeEngine()

    def fail(_):
        raise EngineFailed("The runtime failed.")

    engine.on_run = fail

    with pytest.raises(EngineFailed):
        run_side_by_side(engine, make_manifest(), 1, 2)
