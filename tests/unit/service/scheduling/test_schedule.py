"""Promises of the schedule, each rule of its docstring, on examples and as a state machine."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from service.scheduling.places import Place
from service.scheduling.schedule import Decision, Priority, RunTimes, Shares, WaitingFrame, admit, decide, has_room

NOW = 100.0
ROUNDING_S = 1e-9

FLAT = RunTimes((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0))  # a CPU: batches save nothing
CHEAP = RunTimes((1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35))  # a GPU: batches cost next to nothing
OFTEN_A = Shares({"a": 6.0, "b": 1.0, "c": 1.0, "": 1.0}, 9.0)  # where line a had most of the engine


def promised(deadline: float, weight: int = 1, priority: Priority = Priority.NORMAL, line: str = "") -> Place:
    """Return a frame that was accepted and does not run yet."""
    return Place(deadline, line, weight, priority)


def waiting(*deadlines: float) -> list[WaitingFrame]:
    """Return frames in order of arrival, with deadlines so many seconds from now."""
    return [WaitingFrame(number, NOW + deadline) for number, deadline in enumerate(deadlines)]


@pytest.mark.parametrize(
    ("frames", "idle", "run_times", "batches"),
    [
        pytest.param(waiting(60), 2, CHEAP, ((0,),), id="a lone frame runs at once"),
        pytest.param(waiting(60, 50, 50), 3, FLAT, ((1,), (2,), (0,)), id="earliest deadline, then arrival"),
        pytest.param(waiting(*[60] * 8), 2, CHEAP, ((0, 1, 2, 3), (4, 5, 6, 7)), id="split evenly over idle runners"),
        pytest.param(waiting(*[60] * 5), 2, CHEAP, ((0, 1, 2), (3, 4)), id="the odd one goes first"),
        pytest.param(waiting(*[60] * 20), 1, CHEAP, (tuple(range(8)),), id="never above the largest batch"),
        pytest.param(waiting(*[60] * 8), 2, FLAT, ((0,), (1,)), id="no batches where they do not pay"),
        pytest.param(waiting(1.08, 60, 60), 1, CHEAP, ((0, 1),), id="no frame joins that makes the first one late"),
        pytest.param(waiting(60, 60), 0, CHEAP, (), id="nothing starts where every runner is busy"),
        pytest.param(
            [WaitingFrame(0, NOW + 60, weight=12), WaitingFrame(1, NOW + 60, weight=2)],
            1,
            CHEAP,
            ((0,),),
            id="a frame of many tiles runs alone",
        ),
        pytest.param(
            [
                WaitingFrame(0, NOW + 9, priority=Priority.SHADOW),
                WaitingFrame(1, NOW + 60, priority=Priority.LOW),
                WaitingFrame(2, NOW + 90),
            ],
            2,
            FLAT,
            ((2,), (1,)),
            id="what matters more goes first, whatever the deadlines",
        ),
        pytest.param(
            [WaitingFrame(0, NOW + 10, line="a"), *(WaitingFrame(n, NOW + 60 - n, line="bc"[n - 1]) for n in (1, 2))],
            3,
            FLAT,
            ((2,), (1,), (0,)),
            id="a line that had too much stands back",
        ),
        pytest.param(
            [
                WaitingFrame(0, NOW + 60, line="b"),
                WaitingFrame(1, NOW + 50, line="b"),
                WaitingFrame(2, NOW + 9, line="c"),
            ],
            3,
            FLAT,
            ((2,), (1,), (0,)),
            id="lines within their shares go by deadline alone",
        ),
    ],
)
def test_batches_when_frames_wait_then_follow_the_rules(frames, idle, run_times, batches):
    """Which frames run together follows from deadlines, idle runners and learned run times."""
    decision = decide(frames, idle, 1, NOW, run_times, OFTEN_A)

    assert decision.batches == batches


def test_decision_when_deadlines_are_past_or_out_of_reach_then_expires_and_refuses():
    """A passed deadline expires, one that can't be met is refused, and the rest runs."""
    decision = decide(waiting(-1, 0, 0.5, 1, 1.5), 1, 1, NOW, FLAT, Shares())

    assert decision == Decision(
        batches=((4,),), expired=(0, 1), refused=(2, 3), look_again_at=None, shares=decision.shares
    )


def test_decision_when_frames_go_on_waiting_then_looks_again_before_the_first_would_be_too_late():
    """The next look is at the latest moment at which a waiting frame could still start in time."""
    decision = decide(waiting(7, 5), 0, 2, NOW, FLAT, Shares())

    assert decision == Decision(batches=(), expired=(), refused=(), look_again_at=NOW + 4, shares=Shares({"": 0.0}))


def test_decision_when_nothing_runs_and_all_seem_hopeless_then_tries_the_one_with_most_time():
    """A wrong estimate can't refuse frames for ever, because an idle engine tries one nevertheless."""
    decision = decide(waiting(0.2, 0.9, 0.5), 2, 0, NOW, FLAT, Shares())

    assert decision.batches == ((1,),)
    assert set(decision.refused) == {0, 2}


@pytest.mark.parametrize(
    ("ahead", "deadline", "free_in_s", "possible", "wait_s"),
    [
        pytest.param([], 0.5, [0, 0], True, 0, id="an idle engine tries"),
        pytest.param([], 0, [0, 0], False, 0, id="a passed deadline is never admitted"),
        pytest.param([], 1.6, [2, 0.4], True, 0.4, id="in time once a runner is free"),
        pytest.param([], 1.4, [2, 0.4], False, 0.4, id="too late even as the next"),
        pytest.param([5, 5, 5, 5], 6, [0.5, 0.5], True, 2.5, id="two runners share what is ahead"),
        pytest.param([5, 5, 5, 5], 3, [0.5, 0.5], True, 0.5, id="later deadlines are not ahead"),
        pytest.param([2, 2, 2, 2], 3, [0.5, 0.5], False, 2.5, id="too late behind those that are ahead"),
    ],
)
def test_admission_when_others_are_ahead_then_counts_what_comes_before(ahead, deadline, free_in_s, possible, wait_s):
    """A frame is admitted if it can end in time behind running frames and behind those with earlier deadlines."""
    before = [promised(NOW + other) for other in ahead]

    admission = admit(before, promised(NOW + deadline), free_in_s, NOW, FLAT, Shares())

    assert (admission.is_possible, admission.wait_s) == (possible, pytest.approx(wait_s))


def test_run_times_when_nothing_is_known_then_promise_nothing():
    """Before the first run every deadline seems possible and the largest batch worth trying."""
    run_times = RunTimes.unknown(4)

    assert (run_times.of(3), run_times.best_weight, run_times.max_batch_size) == (0.0, 4, 4)


def test_run_times_when_a_run_stalls_then_move_little_and_come_back_quickly():
    """One stall changes the estimate by a tenth, one faster run brings it half the way back."""
    run_times = RunTimes.unknown(1).learn(1, 1.0)

    stalled = run_times.learn(1, 11.0)
    recovered = stalled.learn(1, 1.0)

    assert stalled.of(1) == pytest.approx(2.0)
    assert recovered.of(1) == pytest.approx(1.5)


def test_admission_when_what_is_ahead_matters_less_then_it_does_not_count():
    """A frame waits for nothing that matters less, and for all that matters more or as much."""
    ahead = [promised(NOW + 1, weight=4, priority=Priority.LOW), promised(NOW + 9, weight=2)]

    normal = admit(ahead, promised(NOW + 8), [1, 1], NOW, FLAT, Shares())
    low = admit(ahead, promised(NOW + 8, priority=Priority.LOW), [1, 1], NOW, FLAT, Shares())

    assert (normal.wait_s, low.wait_s) == (1, 4)


def test_shares_when_two_lines_always_wait_then_neither_gets_much_more_whatever_it_sends():
    """A line whose frames are all more urgent than another's gets little more than an even share of the engine."""
    shares, served = Shares(), Counter[str]()

    for number in range(2000):
        frames = [WaitingFrame(0, NOW + 1, line="noisy"), WaitingFrame(1, NOW + 50, line="quiet")]
        decision = decide(frames, 1, 0, NOW, RunTimes.unknown(1), shares)
        shares = decision.shares
        served[frames[decision.batches[0][0]].line] += number >= 1000

    assert served["noisy"] / served["quiet"] == pytest.approx(1.25 / 0.75, rel=0.1)


def test_shares_when_a_line_was_silent_then_it_counts_no_more_and_saved_nothing_up():
    """What ran long ago is forgotten, and so are lines that run no more."""
    shares = Shares().after([WaitingFrame(0, NOW, line="gone")] * 100)
    for _ in range(3000):
        shares = shares.after([WaitingFrame(0, NOW, line="a"), WaitingFrame(1, NOW, line="b")])

    assert set(shares.used) == {"a", "b"}
    assert not any(shares.is_over(line) for line in ("a", "b", "gone"))


def test_shares_when_frames_have_tiles_then_each_tile_counts():
    """A line with a tenth of the frames has too much where each of them is of fifty tiles."""
    shares = Shares()
    for _ in range(20):
        shares = shares.after([WaitingFrame(0, NOW, weight=50, line="tiled")] + [WaitingFrame(1, NOW, line="b")] * 9)

    assert shares.is_over("tiled")
    assert not shares.is_over("b")


def test_admission_when_a_line_had_too_much_then_only_its_own_frames_wait_for_its_queue():
    """A noisy line's queue is not in the way of others; its own next frame gets just what they leave."""
    ahead = [promised(NOW + 5, line="a") for _ in range(10)]

    quiet = admit(ahead, promised(NOW + 9, line="b"), [1, 1], NOW, FLAT, OFTEN_A)
    noisy = admit(ahead, promised(NOW + 9, line="a"), [1, 1], NOW, FLAT, OFTEN_A)

    assert (quiet.is_possible, quiet.wait_s) == (True, 1)
    assert (noisy.is_possible, noisy.wait_s) == (False, pytest.approx(1 + 5 * 9 / 6))


@pytest.mark.parametrize(
    ("taken", "by_line", "priority", "is_shared", "room"),
    [
        (63, 63, Priority.NORMAL, False, True),
        (64, 0, Priority.NORMAL, False, False),
        (42, 42, Priority.NORMAL, True, True),
        (43, 43, Priority.NORMAL, True, False),
        (63, 0, Priority.NORMAL, True, True),
        (63, 2, Priority.NORMAL, True, False),
        (31, 0, Priority.LOW, True, True),
        (32, 0, Priority.LOW, True, False),
        (16, 0, Priority.SHADOW, True, False),
    ],
)
def test_room_when_a_queue_is_shared_then_no_line_takes_the_last_places(taken, by_line, priority, is_shared, room):
    """A line holds at most two places for each free one, one alone holds all, and what matters less leaves more."""
    assert has_room(64, taken, by_line, priority, is_shared=is_shared) is room


@pytest.mark.parametrize(("weight", "seconds"), [(1, 1.0), (2, 1.0), (3, 1.5), (4, 3.0), (6, 4.0), (8, 6.0)])
def test_run_times_when_a_weight_never_ran_then_scale_the_nearest(weight, seconds):
    """An unknown weight takes as long as the nearest known one, and longer in proportion where it is heavier."""
    run_times = RunTimes((None, 1.0, None, 3.0))

    assert run_times.of(weight) == pytest.approx(seconds)


def test_run_times_when_a_frame_is_heavier_than_a_batch_then_learn_its_share():
    """A frame of many tiles teaches what a full batch takes."""
    run_times = RunTimes.unknown(2).learn(6, 3.0)

    assert run_times.of(2) == pytest.approx(1.0)


def test_admission_when_runs_are_uneven_then_the_queue_is_expected_to_move_at_their_mean():
    """Quick runs tell what a run may take, not how soon what is ahead will be done."""
    run_times = RunTimes.unknown(1)
    for _ in range(100):
        run_times = run_times.learn(1, 1.0).learn(1, 3.0)

    admission = admit([promised(NOW + 5)] * 10, promised(NOW + 90), [0.5], NOW, run_times, Shares())

    assert run_times.of(1) < 1.5
    assert admission.wait_s == pytest.approx(20.5, rel=0.1)


def test_pace_when_a_runner_is_kept_longer_than_its_run_then_the_queue_moves_as_slowly():
    """On a busy machine threads wait for each other between runs; a forecast without that would accept too much."""
    run_times = RunTimes.unknown(1).learn(1, 1.0, occupied_s=1.5)

    admission = admit([promised(NOW + 5)] * 10, promised(NOW + 90), [0.5], NOW, run_times, Shares())

    assert run_times.of(1) == pytest.approx(1.0)
    assert admission.wait_s == pytest.approx(15.5)


def test_pace_when_a_run_stalls_then_moves_little():
    """One run of a thousand times the usual length does not close the queue."""
    run_times = RunTimes.unknown(1).learn(1, 1.0)

    assert run_times.learn(1, 1000.0).pace_s == pytest.approx(1.3)


class _Plant:
    """Lines that send frames at random times to two runners, in a time of its own: schedule and queue, nothing else."""

    def __init__(self, rates, deadline_s, seconds, seed):
        generator = random.Random(seed)  # noqa: S311 - times of arrival, no secret
        self.arrivals = []
        for line, rate in rates.items():
            at = generator.expovariate(rate)
            while at < seconds:
                self.arrivals.append((at, line))
                at += generator.expovariate(rate)
        self.arrivals.sort()
        self.deadline_s = deadline_s
        self.lengths = random.Random(seed)  # noqa: S311 - as above
        self.run_times = RunTimes.unknown(1)
        self.shares = Shares()
        self.waiting: dict[int, tuple[float, WaitingFrame]] = {}
        self.running: list[tuple[float, float, float, WaitingFrame]] = []
        self.latencies: dict[str, list[float]] = {line: [] for line in rates}
        self.refused = Counter[str]()
        self.late = 0

    def run(self):
        """Let everything happen in its order."""
        for number, (at, line) in enumerate(self.arrivals):
            while self.running and min(self.running)[0] <= at:
                self._end()
            self._arrive(number, at, line)
        while self.running:
            self._end()
        return self

    def _arrive(self, number, now, line):
        held = Counter(frame.line for _, frame in self.waiting.values()) + Counter(r[3].line for r in self.running)
        free_in_s = [max(0.0, began + self.run_times.of(1) - now) for _, began, _, _ in self.running]
        free_in_s += [0.0] * (2 - len(free_in_s))
        ahead = [promised(frame.deadline, line=frame.line) for _, frame in self.waiting.values()]
        new = promised(now + self.deadline_s, line=line)
        is_possible = admit(ahead, new, free_in_s, now, self.run_times, self.shares).is_possible
        if has_room(64, held.total(), held[line], Priority.NORMAL, is_shared=True) and is_possible:
            self.waiting[number] = now, WaitingFrame(number, new.deadline, line=line)
            self._decide(now)
        else:
            self.refused[line] += 1

    def _end(self):
        run = min(self.running)
        self.running.remove(run)
        now, began, arrived, frame = run
        self.latencies[frame.line].append(now - arrived)
        self.late += now > frame.deadline
        self.run_times = self.run_times.learn(1, now - began)
        self._decide(now)

    def _decide(self, now):
        busy = len(self.running)
        waiting = [frame for _, frame in self.waiting.values()]
        decision = decide(waiting, 2 - busy, busy, now, self.run_times, self.shares)
        self.shares = decision.shares
        for number in (n for batch in decision.batches for n in batch):
            arrived, frame = self.waiting.pop(number)
            self.running.append((now + self.lengths.uniform(0.018, 0.024), now, arrived, frame))
        for number in (*decision.expired, *decision.refused):
            self.late += 1
            del self.waiting[number]


def _p99(plant):
    return np.percentile([s for line, all_s in plant.latencies.items() if line != "line0" for s in all_s], 99)


def test_lines_when_one_sends_twenty_times_its_share_then_the_others_hardly_notice():
    """Nine lines at 60 % of what two runners can do: their 99th percentile rises by at most a fifth."""
    rates = {f"line{number}": 5.7 for number in range(10)}

    usual = _Plant(rates, 2.0, 60, seed=1).run()
    flooded = _Plant({**rates, "line0": 20 * 5.7}, 2.0, 60, seed=1).run()

    assert _p99(flooded) <= 1.2 * _p99(usual)
    assert set(flooded.refused) == {"line0"}
    assert len(flooded.latencies["line0"]) > 0.9 * 60 * (2 / 0.021 - 9 * 5.7)


def test_queue_when_three_times_too_much_comes_then_runners_are_busy_and_the_accepted_are_in_time():
    """With deadlines of ten runs, the runners never rest, what is accepted ends in time, and the rest is refused."""
    plant = _Plant({"line0": 3 * 2 / 0.021}, 0.21, 20, seed=2).run()

    answered = len(plant.latencies["line0"])
    assert answered >= 0.97 * 20 * 2 / 0.021
    assert plant.late <= 0.005 * answered


class ScheduleMachine(RuleBasedStateMachine):
    """Frames arrive, runs end, time passes; after each event one decision is taken and held against every rule."""

    @initialize(
        runners=st.integers(1, 4),
        seconds=st.lists(st.none() | st.integers(1, 40).map(lambda n: n / 8), min_size=1, max_size=8),
    )
    def start(self, runners, seconds):
        """Choose the runners and what is known of run times."""
        self.runners = runners
        self.run_times = RunTimes(tuple(seconds))
        self.now = 0.0
        self.arrived = 0
        self.waiting: dict[int, WaitingFrame] = {}
        self.running: list[list[WaitingFrame]] = []
        self.left: list[int] = []
        self.look_again_at: float | None = None
        self.shares = Shares()

    @rule(
        in_s=st.integers(0, 80).map(lambda n: n / 8),
        weight=st.integers(1, 12),
        priority=st.sampled_from(Priority),
        line=st.sampled_from("abc"),
    )
    def arrive(self, in_s, weight, priority, line):
        """Let a frame arrive."""
        self.waiting[self.arrived] = WaitingFrame(self.arrived, self.now + in_s, weight, priority, line)
        self.arrived += 1
        self._decide()

    @rule(seconds=st.integers(1, 40).map(lambda n: n / 8))
    def wait(self, seconds):
        """Let time pass, but stop where the schedule wanted to look again."""
        until = self.now + seconds
        if self.look_again_at is not None and self.look_again_at < until:
            until = self.look_again_at
        self.now = max(self.now, until)
        self._decide()

    @rule(choice=st.integers(0, 3), seconds=st.integers(1, 40).map(lambda n: n / 8))
    def end_a_run(self, choice, seconds):
        """Let a run end that took so long."""
        if self.running:
            batch = self.running.pop(choice % len(self.running))
            self.run_times = self.run_times.learn(sum(frame.weight for frame in batch), seconds)
            self._decide()

    def _decide(self):
        idle, busy = self.runners - len(self.running), len(self.running)
        decision = decide(self.waiting.values(), idle, busy, self.now, self.run_times, self.shares)
        self._hold_against_rules(decision, idle, busy)
        self.shares = decision.shares
        self.running += [[self.waiting[number] for number in batch] for batch in decision.batches]
        for number in (*decision.expired, *decision.refused, *(n for batch in decision.batches for n in batch)):
            del self.waiting[number]  # raises where a frame left before
            self.left.append(number)
        self.look_again_at = decision.look_again_at

    def _hold_against_rules(self, decision, idle, busy):
        weights = [sum(self.waiting[number].weight for number in batch) for batch in decision.batches]
        started = [self.waiting[number] for batch in decision.batches for number in batch]
        gone = {frame.number for frame in started} | set(decision.expired) | set(decision.refused)
        others = [frame for number, frame in self.waiting.items() if number not in gone]
        assert len(decision.batches) <= idle
        for batch, weight in zip(decision.batches, weights, strict=True):
            assert len(batch) == 1 or weight <= min(self.run_times.max_batch_size, self.run_times.best_weight)
        assert not others or len(decision.batches) == idle, "a frame waits while a runner is idle"
        self._hold_against_order(started, others)
        assert set(decision.expired) == {n for n, frame in self.waiting.items() if frame.deadline <= self.now}
        for number in decision.refused:
            frame = self.waiting[number]
            assert self.now + self.run_times.of(frame.weight) >= frame.deadline - ROUNDING_S
        is_trial = busy == 0 and len(started) == 1
        for batch, weight in zip(decision.batches, weights, strict=True):
            for number in batch:
                in_time = self.now + self.run_times.of(weight) < self.waiting[number].deadline + ROUNDING_S
                assert in_time or is_trial
        if all(frame.weight == 1 for frame in started + others) and weights:
            ready = len(started) + len(others)
            assert max(weights) <= -(-ready // min(idle, ready))
        assert (decision.look_again_at is None) == (not others)
        assert decision.look_again_at is None or decision.look_again_at > self.now - ROUNDING_S

    def _hold_against_order(self, started, others):
        """Priorities, shares of the lines, deadlines: nobody who waits on could have gone before one who started."""
        order = [(frame.priority, self.shares.is_over(frame.line), frame.deadline, frame.number) for frame in started]
        last = [(f.priority, self.shares.is_over(f.line), f.deadline, f.number) for f in others]
        assert order == sorted(order)
        assert not order or not last or max(order) < min(last)

    @invariant()
    def each_frame_leaves_exactly_once(self):
        """Whoever arrived waits or left, and left once."""
        if hasattr(self, "left"):
            assert sorted([*self.left, *self.waiting]) == list(range(self.arrived))


TestSchedule = ScheduleMachine.TestCase
TestSchedule.settings = settings(max_examples=150, stateful_step_count=40)
