"""Promises of the schedule, each rule of its docstring, on examples and as a state machine."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from service.schedule import Decision, Priority, Promised, RunTimes, Turns, WaitingFrame, admit, decide, has_room

NOW = 100.0
ROUNDING_S = 1e-9

FLAT = RunTimes((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0))  # a CPU: batches save nothing
CHEAP = RunTimes((1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35))  # a GPU: batches cost next to nothing


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
            [*waiting(10, 10, 10, 10), WaitingFrame(4, NOW + 60, line="b"), WaitingFrame(5, NOW + 50, line="c")],
            6,
            FLAT,
            ((5,), (4,), (0,), (1,), (2,), (3,)),
            id="lines that had nothing go before one that had",
        ),
        pytest.param(
            [*waiting(10, 10), WaitingFrame(2, NOW + 60, weight=2, line="b"), WaitingFrame(3, NOW + 70, line="b")],
            4,
            FLAT,
            ((2,), (0,), (1,), (3,)),
            id="a line's turn comes by the inputs before it",
        ),
    ],
)
def test_batches_when_frames_wait_then_follow_the_rules(frames, idle, run_times, batches):
    """Which frames run together follows from deadlines, idle runners and learned run times."""
    decision = decide(frames, idle, 1, NOW, run_times, Turns({"": 1}))

    assert decision.batches == batches


def test_decision_when_deadlines_are_past_or_out_of_reach_then_expires_and_refuses():
    """A passed deadline expires, one that can't be met is refused, and the rest runs."""
    decision = decide(waiting(-1, 0, 0.5, 1, 1.5), 1, 1, NOW, FLAT, Turns())

    assert decision == Decision(
        batches=((4,),), expired=(0, 1), refused=(2, 3), look_again_at=None, turns=Turns({"": 1})
    )


def test_decision_when_frames_go_on_waiting_then_looks_again_before_the_first_would_be_too_late():
    """The next look is at the latest moment at which a waiting frame could still start in time."""
    decision = decide(waiting(7, 5), 0, 2, NOW, FLAT, Turns())

    assert decision == Decision(batches=(), expired=(), refused=(), look_again_at=NOW + 4, turns=Turns())


def test_decision_when_nothing_runs_and_all_seem_hopeless_then_tries_the_one_with_most_time():
    """A wrong estimate can't refuse frames for ever, because an idle engine tries one nevertheless."""
    decision = decide(waiting(0.2, 0.9, 0.5), 2, 0, NOW, FLAT, Turns())

    assert decision.batches == ((1,),)
    assert set(decision.refused) == {0, 2}


@pytest.mark.parametrize(
    ("ahead", "deadline", "free_in_s", "possible", "wait_s"),
    [
        pytest.param([], 0.5, [0, 0], True, 0, id="an idle engine tries"),
        pytest.param([], 0, [0, 0], False, 0, id="a passed deadline is never admitted"),
        pytest.param([], 1.5, [2, 0.4], True, 0.4, id="in time once a runner is free"),
        pytest.param([], 1.4, [2, 0.4], False, 0.4, id="too late even as the next"),
        pytest.param([5, 5, 5, 5], 6, [0.5, 0.5], True, 2.5, id="two runners share what is ahead"),
        pytest.param([5, 5, 5, 5], 3, [0.5, 0.5], True, 0.5, id="later deadlines are not ahead"),
        pytest.param([2, 2, 2, 2], 3, [0.5, 0.5], False, 2.5, id="too late behind those that are ahead"),
    ],
)
def test_admission_when_others_are_ahead_then_counts_what_comes_before(ahead, deadline, free_in_s, possible, wait_s):
    """A frame is admitted if it can end in time behind running frames and behind those with earlier deadlines."""
    promised = [Promised(NOW + other) for other in ahead]

    admission = admit(promised, Promised(NOW + deadline), free_in_s, NOW, FLAT, Turns())

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
    ahead = [Promised(NOW + 1, weight=4, priority=Priority.LOW), Promised(NOW + 9, weight=2)]

    normal = admit(ahead, Promised(NOW + 8), [1, 1], NOW, FLAT, Turns())
    low = admit(ahead, Promised(NOW + 8, priority=Priority.LOW), [1, 1], NOW, FLAT, Turns())

    assert (normal.wait_s, low.wait_s) == (1, 4)


def test_turns_when_two_lines_always_wait_then_each_gets_the_same_whatever_it_sends():
    """A line with thirty frames for each of another, all of them more urgent, is served no more than that one."""
    turns, served = Turns(), Counter[str]()
    noisy = [WaitingFrame(number, NOW + 1 + number / 100, line="noisy") for number in range(30)]
    quiet = [WaitingFrame(100 + number, NOW + 50 + number, line="quiet") for number in range(10)]

    for _ in range(20):
        decision = decide([*noisy, *quiet], 1, 0, NOW, RunTimes.unknown(1), turns)
        ((number,),), turns = decision.batches, decision.turns
        served["noisy" if number < 100 else "quiet"] += 1
        noisy, quiet = ([f for f in frames if f.number != number] for frames in (noisy, quiet))

    assert served == {"noisy": 10, "quiet": 10}


def test_turns_when_a_line_was_silent_then_it_saved_nothing_up():
    """A line that begins to send late shares from then on; it does not catch up on what it never wanted."""
    turns = Turns()
    for number in range(50):
        turns = turns.after([WaitingFrame(number, NOW, line="noisy")], ["noisy"])

    assert turns.of("noisy") == 1
    assert turns.of("quiet") == 0


def test_turns_when_frames_have_tiles_then_a_turn_costs_as_many():
    """A frame of eight tiles lets the other lines have eight inputs before the next one."""
    heavy = [WaitingFrame(number, NOW + 9, weight=8, line="heavy") for number in (0, 1)]
    light = [WaitingFrame(10 + number, NOW + 60, line="light") for number in range(12)]
    turns, order = Turns(), []
    waits = [*heavy, *light]

    while waits:
        decision = decide(waits, 1, 0, NOW, RunTimes.unknown(1), turns)
        ((number,),), turns = decision.batches, decision.turns
        order.append(number)
        waits = [frame for frame in waits if frame.number != number]

    assert order.index(1) - order.index(0) == 9


def test_admission_when_other_lines_wait_then_counts_them_for_as_many_turns_as_the_own_line_has():
    """A noisy line's queue stands in the way of its own frames and hardly in that of others."""
    ahead = [Promised(NOW + 5, line="noisy") for _ in range(20)]

    quiet = admit(ahead, Promised(NOW + 9, line="quiet"), [1, 1], NOW, FLAT, Turns())
    noisy = admit(ahead, Promised(NOW + 9, line="noisy"), [1, 1], NOW, FLAT, Turns())

    assert (quiet.is_possible, quiet.wait_s) == (True, 1.5)
    assert (noisy.is_possible, noisy.wait_s) == (False, 11)


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
        self.turns = Turns()

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
        decision = decide(self.waiting.values(), idle, busy, self.now, self.run_times, self.turns)
        self._hold_against_rules(decision, idle, busy)
        self.turns = decision.turns
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
        """Priorities, turns of the lines, deadlines: nobody who waits on could have gone before one who started."""
        served, a_turn = Counter(self.turns.lead), self.run_times.best_weight
        for at, frame in enumerate(started):
            for other in started[at + 1 :] + others:
                assert frame.priority <= other.priority
                if frame.line == other.line and frame.priority == other.priority:
                    assert (frame.deadline, frame.number) < (other.deadline, other.number)
                elif frame.priority == other.priority:
                    more_urgent = sum(
                        rival.weight
                        for rival in started[at + 1 :] + others
                        if rival.line == other.line
                        and (rival.priority, rival.deadline, rival.number)
                        < (other.priority, other.deadline, other.number)
                    )
                    turn, other_turn = served[frame.line] // a_turn, (served[other.line] + more_urgent) // a_turn
                    assert turn < other_turn or (
                        turn == other_turn and (frame.deadline, frame.number) < (other.deadline, other.number)
                    )
            served[frame.line] += frame.weight

    @invariant()
    def each_frame_leaves_exactly_once(self):
        """Whoever arrived waits or left, and left once."""
        if hasattr(self, "left"):
            assert sorted([*self.left, *self.waiting]) == list(range(self.arrived))


TestSchedule = ScheduleMachine.TestCase
TestSchedule.settings = settings(max_examples=150, stateful_step_count=40)
