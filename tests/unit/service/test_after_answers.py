"""Promises of what is done after answers: counted once, in order, soon, and never at another answer's cost."""

import asyncio

from service.routes.context import AfterAnswers
from tests.fakes import in_loop


@in_loop
async def test_later_when_answers_follow_each_other_then_all_are_counted_together_and_in_order():
    """Nothing is counted while answers are written, and whoever reads finds all of them."""
    after, counted = AfterAnswers(), []
    for answer in range(3):
        after.later(lambda answer=answer: counted.append(answer))

    before = list(counted)
    after.settle()
    after.settle()

    assert before == []
    assert counted == [0, 1, 2]


@in_loop
async def test_later_when_nobody_reads_then_counts_soon():
    """A frame's line in the log does not wait for the next frame."""
    after, counted = AfterAnswers(), asyncio.Event()

    after.later(counted.set)

    await counted.wait()


@in_loop
async def test_later_when_very_many_answers_come_then_counts_some_at_once():
    """A flood of refusals is not saved up to hold everybody up at once."""
    after, counted = AfterAnswers(), []

    for answer in range(1000):
        after.later(lambda answer=answer: counted.append(answer))

    assert len(counted) > 900
    assert counted == list(range(len(counted)))


@in_loop
async def test_settle_when_one_answer_can_not_be_counted_then_the_others_are():
    """What goes wrong with counting one frame stays with it."""
    after, counted = AfterAnswers(), []

    def fail():
        raise OSError

    for count in (fail, lambda: counted.append(1)):
        after.later(count)
    after.settle()

    assert counted == [1]


@in_loop
async def test_finish_when_something_is_due_then_it_is_counted_before_the_process_ends():
    """The last answers' lines are written as well."""
    after, counted = AfterAnswers(), []
    after.later(lambda: counted.append(1))

    await after.finish()

    assert counted == [1]
