"""Promises of what a runner does with a batch: each frame gets its own answer or its own fault, whatever fails."""

import numpy as np
import pytest

from service.engines.engine import EngineOutput, LoneRun
from service.errors import EngineFailed, UnreadableFrame
from service.scheduling.engine_runs import EngineRuns, Job, run_sizes
from service.scheduling.places import Place
from service.scheduling.schedule import Priority, WaitingFrame
from tests.fakes import FakeClock, FakeEngine, grey_level

SLOW_S = 100.0
WHITE = 255


class GreyWork:
    """Work on a frame whose tiles are of one grey level each.

    Args:
        greys: of the tiles.
        prepare_fault: raised instead of making network inputs.
        finish_fault: raised instead of an answer.
    """

    def __init__(self, *greys, prepare_fault=None, finish_fault=None):
        self.greys = greys
        self.prepare_fault, self.finish_fault = prepare_fault, finish_fault
        self.prepared = 0

    def prepare(self):
        """Make the tiles."""
        self.prepared += 1
        if self.prepare_fault is not None:
            raise self.prepare_fault
        return np.stack([np.full((8, 12, 3), grey, np.uint8) for grey in self.greys])

    def finish(self, result):
        """Answer with what is known."""
        if self.finish_fault is not None:
            raise self.finish_fault
        return result


class Stand:
    """Runs on a fake engine, one thread and a clock that is held.

    Attributes:
        engine: the ordinary way.
        wide: the quicker way.
        is_alone: whether nothing else runs.
        expected_s: that any batch is thought to take.
        probe_fault: raised by the probe.
    """

    def __init__(self, *, has_quicker_way=False):
        self.clock = FakeClock(0.0)
        self.engine, self.wide = FakeEngine(), FakeEngine()
        self.is_alone, self.expected_s = True, SLOW_S
        self.probes, self.probe_fault = 0, None
        self.numbers = iter(range(1000))
        self.runs = EngineRuns(
            self.engine,
            self._probe,
            max_batch_size=4,
            clock=self.clock,
            alone=LoneRun(self.wide.run, 2.0) if has_quicker_way else None,
            is_alone=lambda: self.is_alone,
            expected_s=lambda _: self.expected_s,
        )

    def _probe(self):
        self.probes += 1
        if self.probe_fault is not None:
            raise self.probe_fault

    def job(self, work, *, line_index=0, priority=Priority.NORMAL):
        """Return a frame that began to wait now."""
        place = Place(999.0, "line", len(work.greys), priority)
        waiting = WaitingFrame(next(self.numbers), 999.0, place.weight, priority)
        return Job(waiting, place, work, line_index, self.clock())

    def run(self, *works, **options):
        """Prepare and run frames, and return what became of all."""
        jobs = [self.job(work, **options) for work in works]
        ready, faults = self.runs.prepare(jobs)
        outcome = self.runs.run(ready, self.clock())
        outcome.answers.update(faults)
        return outcome

    def answers(self, *works, **options):
        """Prepare and run frames, and return what came of each."""
        answers = self.run(*works, **options).answers
        return [answers[number] for number in sorted(answers)]


def refuse_white(frames):
    """Fail as a runtime does on a run that holds a white frame."""
    if (frames == WHITE).all(axis=(1, 2, 3)).any():
        raise ValueError


def fail(_):
    """Fail as a runtime may."""
    raise OSError


def greys_of(result):
    """Return the grey levels that were scored."""
    return (result.scores * 255).round().tolist()


def test_prepare_when_inputs_are_there_then_are_not_made_again():
    """A frame that is run once more, by itself, is decoded once."""
    stand, work = Stand(), GreyWork(1)
    job = stand.job(work)

    for _ in range(2):
        ready, faults = stand.runs.prepare([job])

    assert (ready, faults, work.prepared) == ([job], {}, 1)
    assert not job.is_preparing


def test_prepare_when_a_frame_can_not_be_read_then_the_others_can_be_run():
    """A fault before the run is that frame's answer and no neighbour's."""
    stand, fault = Stand(), UnreadableFrame("The bytes are no picture.")
    bad, good = stand.job(GreyWork(1, prepare_fault=fault)), stand.job(GreyWork(2))

    ready, faults = stand.runs.prepare([bad, good])

    assert (ready, faults) == ([good], {bad.waiting.number: fault})
    assert not bad.is_preparing


def test_run_when_no_frame_could_be_prepared_then_asks_nothing_of_the_engine():
    """There is nothing to learn from it either."""
    stand = Stand()

    outcome = stand.runs.run([], 0.0)

    assert outcome == ({}, None, False)
    assert stand.engine.batches == []


def test_run_when_frames_have_tiles_then_each_gets_what_was_said_of_its_own():
    """The tiles of a frame stay together and in order, each told the line of its frame."""
    stand = Stand()
    jobs = [stand.job(GreyWork(1, 2), line_index=5), stand.job(GreyWork(3), line_index=7)]
    ready, _ = stand.runs.prepare(jobs)

    first, second = stand.runs.run(ready, 0.0).answers.values()

    assert (greys_of(first), greys_of(second)) == ([1, 2], [3])
    assert stand.engine.line_indices == [[5, 5, 7]]
    assert (first.batch_size, second.batch_size) == (2, 2)
    assert first.batch_number == second.batch_number


def test_run_when_a_frame_is_heavier_than_a_batch_then_is_cut_into_runs():
    """The engine never sees more than the largest batch, and the frame gets the answers of all its tiles."""
    stand = Stand()

    (result,) = stand.answers(GreyWork(*range(10)))

    assert greys_of(result) == list(range(10))
    assert result.anomaly_maps.shape == (10, 4, 6)
    assert stand.engine.batches == [4, 4, 2]


@pytest.mark.parametrize(("weight", "sizes"), [(0, []), (1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (10, [4, 4, 2])])
def test_sizes_when_a_batch_is_cut_then_none_is_larger_than_may_be(weight, sizes):
    """All of it runs, in as few runs as can be."""
    assert list(run_sizes(weight, 4)) == sizes


def test_run_when_it_took_time_then_tells_how_long_and_since_when():
    """What is learned is how long a runner was kept, with what it prepared."""
    stand = Stand()
    stand.engine.on_run = lambda _: stand.clock.advance(3)
    job = stand.job(GreyWork(1))
    stand.clock.advance(1)
    began_at = stand.clock()
    ready, _ = stand.runs.prepare([job])
    stand.clock.advance(2)

    outcome = stand.runs.run(ready, began_at)

    (result,) = outcome.answers.values()
    assert (result.queue_s, result.infer_s, result.ran_at) == (1, 3, 6)
    assert outcome.run_s == 5


def test_run_when_a_frame_can_not_be_finished_then_only_it_has_no_answer():
    """A fault after the run is that frame's answer, and none of the engine's."""
    stand, fault = Stand(), ValueError("no verdict")

    first, second = stand.answers(GreyWork(1, finish_fault=fault), GreyWork(2))

    assert first is fault
    assert greys_of(second) == [2]
    assert stand.probes == 0


@pytest.mark.parametrize(
    "greys", [[WHITE, 10], [10, WHITE], [WHITE, 10, 20], [10, WHITE, 20], [10, 20, WHITE]], ids=str
)
def test_run_when_one_frame_fails_its_batch_then_its_neighbours_are_answered(greys):
    """A batch that fails is run again one by one, wherever in it the frame is that fails alone."""
    stand = Stand()
    stand.engine.on_run = refuse_white

    outcome = stand.run(*map(GreyWork, greys))

    answers = list(outcome.answers.values())
    assert isinstance(answers.pop(greys.index(WHITE)), EngineFailed)
    assert [greys_of(result) for result in answers] == [[grey] for grey in greys if grey != WHITE]
    assert len({result.batch_number for result in answers}) == len(answers)
    assert (outcome.run_s, outcome.is_engine_lost, stand.probes) == (None, False, 1)


def test_run_when_a_frame_fails_and_the_probe_too_then_the_engine_is_lost():
    """Golden frames tell whose fault it is, whoever runs after it."""
    stand = Stand()
    stand.engine.on_run = refuse_white
    stand.probe_fault = EngineFailed("The known frames fail as well.")

    assert stand.run(GreyWork(WHITE), GreyWork(20)).is_engine_lost


@pytest.mark.parametrize(("scores", "maps"), [(0, 0), (2, 2), (1, 2), (2, 1)])
def test_run_when_the_engine_answers_another_number_of_frames_then_the_frame_has_no_verdict(scores, maps):
    """As many scores and as many maps as frames, or no verdict."""
    stand = Stand()
    stand.engine.on_run = lambda frames: EngineOutput(
        grey_level(np.repeat(frames, scores, axis=0)).scores, grey_level(np.repeat(frames, maps, axis=0)).anomaly_maps
    )

    (answer,) = stand.answers(GreyWork(1))

    assert isinstance(answer, EngineFailed)


@pytest.mark.parametrize(("is_alone", "ways"), [(True, ([1], [])), (False, ([], [1]))])
def test_run_when_nothing_else_runs_then_the_quicker_way_is_taken(is_alone, ways):
    """It takes every core, and so nobody else's."""
    stand = Stand(has_quicker_way=True)
    stand.is_alone = is_alone

    (result,) = stand.answers(GreyWork(51))

    assert greys_of(result) == [51]
    assert (stand.wide.batches, stand.engine.batches) == ways


def test_run_when_frames_are_for_watching_then_both_ways_are_watched():
    """Golden frames come at low priority, and an engine that is broken one way alone is found by them."""
    stand = Stand(has_quicker_way=True)

    for _ in range(4):
        stand.run(GreyWork(51), priority=Priority.LOW)

    assert (stand.wide.batches, stand.engine.batches) == ([1, 1], [1, 1])


def test_run_when_a_frame_that_matters_shares_a_batch_with_one_for_watching_then_the_quicker_way_is_taken():
    """Whose turn it is to be watched is nothing to a frame that somebody waits for."""
    stand = Stand(has_quicker_way=True)
    jobs = [stand.job(GreyWork(1), priority=Priority.LOW), stand.job(GreyWork(2))]

    stand.runs.run(stand.runs.prepare(jobs)[0], 0.0)

    assert (stand.wide.batches, stand.engine.batches) == ([2], [])


@pytest.mark.parametrize(
    ("expected_s", "learned_s"),
    [
        pytest.param(8.5, 8.0, id="less than was thought"),
        pytest.param(8.0, None, id="as much"),
        pytest.param(5.0, None, id="more than was thought"),
    ],
)
def test_run_when_it_was_alone_then_only_tells_how_long_it_takes_at_most(expected_s, learned_s):
    """Beside others a run takes so many times as long as by itself, and no more; what was prepared takes its time."""
    stand = Stand(has_quicker_way=True)
    stand.expected_s = expected_s
    stand.wide.on_run = lambda _: stand.clock.advance(3)
    ready, _ = stand.runs.prepare([stand.job(GreyWork(1))])
    began_at = stand.clock()
    stand.clock.advance(2)

    outcome = stand.runs.run(ready, began_at)

    assert outcome.run_s == learned_s


def test_run_when_only_the_quicker_way_fails_then_the_frame_is_answered_and_that_way_is_given_up():
    """A quicker way that is broken costs time and no verdict."""
    stand = Stand(has_quicker_way=True)
    stand.wide.on_run = fail

    results = [*stand.answers(GreyWork(51)), *stand.answers(GreyWork(51))]

    assert [greys_of(result) for result in results] == [[51], [51]]
    assert (len(stand.wide.batches), len(stand.engine.batches), stand.probes) == (1, 2, 0)


def test_run_when_both_ways_fail_then_the_frame_has_no_verdict_and_the_quicker_way_stays():
    """A frame that no way can run says nothing about the ways."""
    stand = Stand(has_quicker_way=True)
    stand.wide.on_run = stand.engine.on_run = fail

    (answer,) = stand.answers(GreyWork(51))
    stand.wide.on_run = stand.engine.on_run = lambda _: None
    stand.run(GreyWork(51))

    assert isinstance(answer, EngineFailed)
    assert (len(stand.wide.batches), len(stand.engine.batches), stand.probes) == (2, 1, 1)
