"""Promises of a port's connections: bounded, idle ones go first, and whoever is at work is left alone."""

import logging
import resource
from collections import Counter

import pytest

from service.ports import connections
from service.ports.connections import Connections, raise_file_limit
from tests.fakes import FakeClock


class Guest:
    """A connection as the port sees it.

    Args:
        peer: its address.
        since: when it began to wait; None where it is at work.
        has_asked: whether it brought a request.
    """

    def __init__(self, peer="a", since=0.0, has_asked=False):
        self.peer, self.since, self.has_asked = peer, since, has_asked
        self.is_cut = False

    def waits_since(self):
        """Return since when it waits."""
        return self.since

    def cut(self):
        """Note it."""
        self.is_cut = True


class Port:
    """A port with room for some, that keeps what it tells."""

    def __init__(self, most=4, most_unread_bytes=100):
        self.told = Counter()
        self.clock = FakeClock()
        self.connections = Connections(
            self.clock, most=most, most_unread_bytes=most_unread_bytes, tell=lambda why: self.told.update([why])
        )

    def fill(self, *guests):
        """Let guests in, who all find room."""
        assert all(self.connections.come(guest) for guest in guests)
        return guests


@pytest.mark.parametrize(
    ("guests", "goes"),
    [
        pytest.param([Guest(since=3), Guest(since=1), Guest(since=2), Guest(since=4)], 1, id="who waits longest"),
        pytest.param([Guest("a", 1), Guest("b", 3), Guest("b", 2), Guest("b", 4)], 2, id="of the address with most"),
        pytest.param(
            [Guest("b", 1, has_asked=True), Guest("b", 2, has_asked=True), Guest("b", None), Guest("a", 3)],
            3,
            id="who never asked before who did",
        ),
        pytest.param(
            [Guest("a", None), Guest("a", None), Guest("a", None), Guest("b", 5, has_asked=True)],
            3,
            id="who is idle before who works",
        ),
    ],
)
def test_connection_when_there_is_no_room_then_one_that_waits_makes_it(guests, goes):
    """The newcomer gets in, and who has to go for it is counted."""
    port = Port()
    port.fill(*guests)

    assert port.connections.come(Guest("c"))
    assert [guest.is_cut for guest in guests] == [number == goes for number in range(4)]
    assert port.told == {"no_room": 1}
    assert len(port.connections) == 4


def test_connection_when_all_are_at_work_then_it_is_turned_away_and_none_of_them(caplog):
    """No request is broken off for somebody new; the log says once what happens, however often it does."""
    port = Port()
    guests = port.fill(*[Guest(since=None) for _ in range(4)])

    with caplog.at_level(logging.WARNING):
        came = [port.connections.come(Guest("b")) for _ in range(3)]
        port.clock.advance(60)
        came.append(port.connections.come(Guest("b")))

    assert not any(came)
    assert not any(guest.is_cut for guest in guests)
    assert port.told == {"turned_away": 4}
    assert [(record.cut, record.peer) for record in caplog.records] == [
        ({"turned_away": 1}, "b"),
        ({"turned_away": 3}, "b"),
    ]


def test_connections_when_many_come_at_once_then_not_all_are_looked_at_for_each():
    """Making room for one makes some for the next ones, so that a flood does not hold up frames."""
    port = Port(most=640)
    looks = Counter()

    class Watched(Guest):
        def waits_since(self):
            looks["at all"] += 1
            return self.since

    port.fill(*[Watched(since=number) for number in range(640)])
    port.fill(*[Guest("b", since=1000) for _ in range(10)])

    assert looks["at all"] == 640


def test_connection_when_it_has_ended_then_its_place_is_free():
    """Nobody is cut off for somebody who is gone."""
    port = Port()
    guests = port.fill(*[Guest() for _ in range(4)])

    port.connections.go(guests[2])
    port.fill(Guest())

    assert port.told == {}


def test_answers_when_they_are_not_taken_then_the_oldest_goes_for_the_next():
    """Memory of answers is bounded over all connections; who takes its answer is in nobody's way."""
    port = Port()
    first, second, third = port.fill(*[Guest(since=None) for _ in range(3)])

    port.connections.take_answer(first, 60)
    port.connections.take_answer(second, 40)
    port.connections.has_taken_answer(second)
    port.connections.take_answer(third, 50)
    port.connections.has_taken_answer(first)
    port.connections.take_answer(second, 50)

    assert (first.is_cut, second.is_cut, third.is_cut) == (True, False, False)
    assert port.told == {"unread_answer": 1}


def test_answer_when_it_is_larger_than_all_may_be_then_it_is_sent_alone():
    """A bound that is too small stops nobody for good."""
    port = Port()
    (guest,) = port.fill(Guest(since=None))

    port.connections.take_answer(guest, 101)

    assert not guest.is_cut


@pytest.mark.parametrize(
    ("limits", "files"),
    [((1024, 4096), 4096), ((4096, 4096), 4096), ((1024, resource.RLIM_INFINITY), 2**20), ((1024, 2**30), 2**20)],
)
def test_files_when_the_process_may_have_more_then_takes_them(monkeypatch, limits, files):
    """A connection is a file; what a shell or a service manager leaves by default is soon used up."""
    told = []
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(connections.resource, "setrlimit", lambda _, new: told.append(new))

    assert raise_file_limit() == files
    assert told == ([] if limits[0] == files else [(files, limits[1])])


def test_files_when_a_sandbox_refuses_more_then_the_ones_there_are_count(monkeypatch):
    """The bound of connections follows from what there is."""

    def refuse(*_):
        raise ValueError("not allowed")

    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(connections.resource, "setrlimit", refuse)

    assert raise_file_limit() == 1024
