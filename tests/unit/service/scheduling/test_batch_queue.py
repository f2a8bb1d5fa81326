"""Promises of the queue that event loop and runners share: every frame leaves once, and no runner waits beside one."""

import threading
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from service.scheduling.batch_queue import BatchQueue, Running
from service.scheduling.places import Place
from service.scheduling.schedule import Priority, RunTimes, WaitingFrame
from service.threads import begin

RUN_S = 1.0
ONE_BY_ONE = RunTimes((RUN_S,))


@dataclass(eq=False)
class Frame:
    """A frame of one line, due at a moment."""

    number: int
    due: float = 100.0
    is_left: bool = False
    weight: int = 1

    def __post_init__(self):
        self.place = Place(self.due, "line", self.weight, Priority.NORMAL)

    @property
    def waiting(self):
        """What the schedule is told."""
        return WaitingFrame(self.number, self.due, self.weight, line="line")


def make_queue(*frames, runners=1):
    """Return a queue in which frames wait."""
    queue = BatchQueue(runners, ONE_BY_ONE)
    for frame in frames:
        queue.add(frame)
    return queue


def numbers_of(batch):
    """Return the numbers of a batch's frames."""
    return [entry.number for entry in batch.entries]


def test_add_when_a_runner_is_idle_then_says_so():
    """Whoever adds a frame must know whether somebody is there to take it."""
    queue = make_queue()

    assert queue.add(Frame(1))
    queue.take(0.0)
    assert not queue.add(Frame(2))


def test_end_and_take_when_frames_wait_then_the_most_urgent_runs_next():
    """The runner that ends a batch goes on with the earliest deadline, as if it had come through the event loop."""
    queue = make_queue(Frame(1))
    (first,) = queue.take(0.0).batches
    for frame in (Frame(2, due=50.0), Frame(3, due=20.0)):
        queue.add(frame)

    (following,) = queue.end_and_take(first, RUN_S, RUN_S).batches

    assert numbers_of(following) == [3]
    assert not following.entries[0].place.is_ahead


def test_end_and_take_when_deadlines_have_gone_then_hands_those_frames_out_once():
    """Whoever takes is told of frames that expired, and of those that can't be in time any more."""
    queue = make_queue(Frame(1))
    (first,) = queue.take(0.0).batches
    expired, hopeless, waiting = Frame(2, due=1.5), Frame(3, due=2.5), Frame(4)
    for frame in (expired, hopeless, waiting):
        queue.add(frame)

    taken = queue.end_and_take(first, RUN_S, 2.0)

    assert (list(taken.expired), list(taken.refused)) == ([expired], [hopeless])
    assert [numbers_of(batch) for batch in taken.batches] == [[4]]
    assert not queue.withdraw(expired)
    assert not queue.withdraw(hopeless)


def test_take_when_a_frame_has_tiles_then_its_run_is_expected_to_take_as_long_as_all_of_them():
    """Whoever asks for a place meanwhile is told by when a runner is free, not by how many frames it has."""
    queue = make_queue(Frame(1, weight=4))

    (batch,) = queue.take(10.0).batches

    assert batch.weight == 4
    assert batch.expected_end == 10.0 + 4 * RUN_S


def test_take_when_nobody_waits_for_a_frame_then_it_is_not_run():
    """A caller that has hung up is seen before its frame runs, though it has not withdrawn it yet."""
    gone = Frame(1, is_left=True)
    queue = make_queue(gone, Frame(2))

    (batch,) = queue.take(0.0).batches

    assert numbers_of(batch) == [2]
    assert queue.withdraw(gone)


def test_close_when_frames_wait_and_run_then_returns_all_and_gives_no_more():
    """What is closed hands everything back, and no runner gets another frame."""
    queue = make_queue(Frame(1), Frame(2))
    (running,) = queue.take(0.0).batches

    left = queue.close()
    queue.add(Frame(3))

    assert sorted(entry.number for entry in left) == [1, 2]
    assert not queue.end_and_take(running, RUN_S, RUN_S).batches


def test_end_when_there_is_nothing_to_learn_then_the_runner_is_idle_again():
    """A batch of a lost engine ends without teaching anything."""
    queue = make_queue(Frame(1))
    (batch,) = queue.take(0.0).batches

    queue.end(batch)

    assert queue.is_empty
    assert queue.run_times == ONE_BY_ONE
    assert queue.add(Frame(2))


def test_give_up_when_a_batch_is_still_prepared_then_it_never_runs_and_its_runner_counts_as_idle():
    """Whoever gives a batch up, and whoever begins its run, can't both be right."""
    queue = make_queue(Frame(1))
    (batch,) = queue.take(0.0).batches

    assert queue.give_up(batch)
    assert not queue.begin_run(batch, 1.0)
    assert queue.add(Frame(2))


def test_give_up_when_a_batch_runs_then_leaves_it_alone():
    """A run is the engine's affair."""
    queue = make_queue(Frame(1))
    (batch,) = queue.take(0.0).batches

    assert queue.begin_run(batch, 1.0)
    assert not queue.give_up(batch)
    assert queue.under_way() == [batch]


def test_admit_when_a_run_takes_longer_than_expected_then_promises_no_more_by_it():
    """A runner that should be free by now is free at once at best, and not the sooner the longer it is late."""
    queue = make_queue(Frame(1))
    queue.take(0.0)
    ahead = [Place(41.0, "line", 1, Priority.NORMAL)] * 2

    too_early, in_time = [queue.admit(ahead, Place(due, "line", 1, Priority.NORMAL), 40.0) for due in (43.0, 44.0)]

    assert (too_early.is_possible, in_time.is_possible) == (False, True)
    assert too_early.wait_s == 2 * RUN_S


def test_under_way_when_one_was_prepared_for_long_then_its_time_counts_from_its_run():
    """What went into a frame before its run is not the engine's time; the longest step comes first."""
    queue = make_queue(Frame(1), Frame(2), runners=2)
    slow, other = queue.take(0.0).batches
    assert queue.begin_run(other, 1.0)
    assert queue.begin_run(slow, 5.0)

    assert queue.under_way() == [other, slow]
    assert [batch.step_since for batch in queue.under_way()] == [1.0, 5.0]


@given(dues=st.lists(st.floats(0.5, 12.0), min_size=1, max_size=30), runners=st.integers(1, 3))
def test_queue_when_several_threads_take_then_each_frame_leaves_once(dues, runners):
    """However runners and event loop interleave, no frame runs twice, and none is forgotten."""
    frames = [Frame(number, due) for number, due in enumerate(dues)]
    queue = make_queue(*frames, runners=runners)
    first = queue.take(0.0)
    left = [entry.number for entry in (*first.expired, *first.refused)]

    def run(batch):
        now = 0.0
        while batch is not None:
            left.extend(numbers_of(batch))
            now += RUN_S
            taken = queue.end_and_take(batch, RUN_S, now)
            left.extend(entry.number for entry in (*taken.expired, *taken.refused))
            batch = taken.batches[0] if taken.batches else None

    threads = [threading.Thread(target=run, args=(batch,)) for batch in first.batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    left.extend(entry.number for entry in queue.close())
    assert sorted(left) == list(range(len(frames)))


def test_gap_when_what_runs_leaves_no_core_then_what_can_run_later_waits_for_its_end():
    """A run that nobody waits for begins when a core is left beside it, and not before."""
    running, order = Running(side_by_side=2), []

    def run_later():
        with running.in_gap(20.0):
            order.append(f"later, {running.count} at a time")

    running.begin()
    later = begin(run_later, name="later")
    is_gap = running.wait_for_gap(0.0)
    order.append("frame")
    running.end()
    later.result(20.0)

    assert not is_gap
    assert order == ["frame", "later, 1 at a time"]
    assert (running.count, running.wait_for_gap(0.0)) == (0, True)


def test_gap_when_the_machine_has_cores_for_more_then_one_is_kept_free():
    """Of four cores two may be taken, so that the next frame finds one beside what can run later."""
    running = Running(side_by_side=4)

    running.begin()
    running.begin()
    assert running.wait_for_gap(0.0)
    running.begin()
    assert not running.wait_for_gap(0.0)


def test_gap_when_there_is_none_for_too_long_then_runs_all_the_same():
    """What can run later runs in the end, and counts as a run like others."""
    running = Running()

    running.begin()
    with running.in_gap(0.0):
        assert running.count == 2
    assert running.count == 1
