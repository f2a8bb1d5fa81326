"""Promises of the bodies' budget: bounded in all, nobody takes everything, and all comes back."""

import pytest

from service.errors import Overloaded
from service.ports.body_budget import BodyBudget


def fill(budget, holder, size):
    """Hold as much as a holder gets, in bodies of one size, and return the holdings."""
    holdings = []
    while True:
        holding = budget.of(holder)
        try:
            holding.hold(size)
        except Overloaded:
            return holdings
        holdings.append(holding)


def test_holder_when_it_sends_without_end_then_gets_half():
    """The other half stays for whoever comes."""
    assert len(fill(BodyBudget(100), "a", 10)) == 5


def test_holders_when_all_send_without_end_then_the_last_one_still_finds_room():
    """Each leaves as much free as it has, so that nothing is ever all taken."""
    budget = BodyBudget(1000)

    shares = [len(fill(budget, holder, 1)) for holder in "abcd"]

    assert shares == [500, 250, 125, 62]


def test_body_when_nobody_else_sends_then_may_be_as_large_as_the_budget():
    """The largest frame of a line gets in."""
    with BodyBudget(100).of("a") as body:
        body.hold(100)

        with pytest.raises(Overloaded):
            body.hold(101)


def test_body_when_its_request_ends_then_its_bytes_are_free_again():
    """Whatever it ended with, and however it grew."""
    budget = BodyBudget(100)
    for _ in range(3):
        with budget.of("a") as body:
            for size in (10, 20, 20, 15, 100):
                body.hold(size)
            with pytest.raises(Overloaded):
                body.hold(101)

    with budget.of("b") as body:
        body.hold(100)
