"""What simulated cameras promise: parts arrive on time whatever the answers do, and every frame is counted once."""

import asyncio
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.camera import CameraPlan, Tally, run_camera, trigger_times
from service.client import EncodedFrame, Outcome, Problem
from service.contract.policy import Verdict
from tests.fakes import FakeClock

FRAMES = [EncodedFrame(name, "image/png") for name in (b"first", b"second", b"third")]
PASSED = Outcome(Verdict.PASS, None, None, tries=1, elapsed_ms=5.0)
LOST = Outcome(Verdict.NO_VERDICT, None, Problem("not_reachable", "Nobody answers."), tries=3, elapsed_ms=900.0)


def _run(plan, inspect, duration_s):
    """Run one camera on a clock that jumps to the next trigger, and return its tally."""
    clock, tally = FakeClock(), Tally()

    async def sleep(seconds: float) -> None:
        clock.advance(seconds)
        await asyncio.sleep(0)

    asyncio.run(run_camera(plan, FRAMES, tally, inspect, duration_s=duration_s, clock=clock, sleep=sleep))
    return tally


@given(
    rate=st.floats(0.1, 1000),
    jitter=st.floats(0, 1),
    arrivals=st.sampled_from(["regular", "poisson"]),
    seed=st.integers(0, 99),
)
def test_triggers_when_drawn_then_ascend_and_repeat_with_their_seed(rate, jitter, arrivals, seed):
    """Times never go back, and the same camera triggers at the same times again."""
    plan = CameraPlan("cap", rate, arrivals, jitter, seed=seed)

    times, again = (list(itertools.islice(trigger_times(plan), 50)) for _ in range(2))

    assert times == again
    assert times == sorted(times)
    assert times[0] >= 0


@pytest.mark.parametrize(("arrivals", "spread"), [("regular", 0.01), ("poisson", 0.06)])
def test_triggers_when_counted_then_keep_their_rate(arrivals, spread):
    """A thousand parts take as long as the rate says, exactly or on average."""
    times = list(itertools.islice(trigger_times(CameraPlan("cap", 20.0, arrivals)), 1000))

    assert times[-1] == pytest.approx(1000 / 20.0, rel=spread)


def test_camera_when_it_runs_then_sends_each_frame_in_turn_with_its_number():
    """Frames repeat after the last one, numbers never do."""
    sent = []

    async def inspect(line, frame, number):
        sent.append((line, frame.data, number))
        return PASSED

    tally = _run(CameraPlan("cap", 10.0, jitter=0.0, burst=2), inspect, duration_s=0.2)

    assert sent == [("cap", data, number) for number, data in enumerate([b"first", b"second", b"third", b"first"])]
    assert (tally.sent, tally.dropped, dict(tally.verdicts)) == (4, 0, {"PASS": 4})


def test_camera_when_answers_do_not_come_then_drops_and_counts_what_its_buffer_can_not_hold():
    """Parts go on arriving; every trigger is either sent or counted as dropped."""

    async def inspect(line, frame, number):
        for _ in range(50):
            await asyncio.sleep(0)
        return LOST

    tally = _run(CameraPlan("cap", 10.0, jitter=0.0, buffer=3), inspect, duration_s=1.0)

    assert (tally.sent, tally.dropped) == (3, 7)
    assert dict(tally.problems) == {"not_reachable": 3}
    assert dict(tally.verdicts) == {"NO_VERDICT": 3}


def test_camera_when_it_is_stopped_then_every_frame_under_way_is_counted_as_without_verdict():
    """Whoever ends a run early reads figures that add up, and no latency of a frame that was not answered."""
    tally, clock = Tally(), FakeClock()

    async def inspect(line, frame, number):
        if number < 2:
            return PASSED
        return await asyncio.Event().wait()

    async def stop_at_the_fourth(seconds: float) -> None:
        clock.advance(seconds)
        await asyncio.sleep(0)
        if tally.sent == 4:
            raise asyncio.CancelledError

    plan = CameraPlan("cap", 10.0, jitter=0.0, burst=2)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(
            run_camera(plan, FRAMES, tally, inspect, duration_s=math.inf, clock=clock, sleep=stop_at_the_fourth)
        )

    assert (tally.sent, dict(tally.verdicts)) == (4, {"PASS": 2, "NO_VERDICT": 2})
    assert dict(tally.problems) == {"interrupted": 2}
    assert list(tally.latencies_ms) == [PASSED.elapsed_ms] * 2


def test_tally_when_asked_for_a_percentile_then_gives_a_latency_that_was_seen():
    """The median of one to a hundred is fifty, and before the first answer there is none."""
    tally = Tally()
    before = tally.percentile_ms(0.5)

    for elapsed_ms in range(1, 101):
        tally.note(Outcome(Verdict.PASS, None, None, 1, float(elapsed_ms)))

    assert before is None
    assert [tally.percentile_ms(fraction) for fraction in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]


@pytest.mark.parametrize(
    ("ends", "interrupted", "dropped", "expected"),
    [
        ([PASSED], 0, 0, True),
        ([PASSED], 3, 0, True),
        ([PASSED, LOST], 3, 0, False),
        ([PASSED], 0, 1, False),
        ([], 3, 0, False),
        ([], 0, 0, False),
    ],
    ids=["judged", "stopped", "one lost", "one dropped", "stopped before any", "none sent"],
)
def test_tally_when_asked_whether_all_were_seen_then_forgives_only_whom_the_end_cut_off(
    ends, interrupted, dropped, expected
):
    """Ctrl-C is how a run ends that has no other end; what was lost before it stays lost."""
    tally = Tally(dropped=dropped)
    for outcome in ends:
        tally.note(outcome)
    for _ in range(interrupted):
        tally.note_interrupted()

    assert tally.saw_all is expected
