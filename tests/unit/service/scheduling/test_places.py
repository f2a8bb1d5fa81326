"""Promises of the places: each is given back, and what is counted are those that are held."""

import pytest

from service.scheduling.places import Place, Places
from service.scheduling.schedule import Priority


def make_place(line="line", priority=Priority.NORMAL):
    """Return a frame's right to be answered."""
    return Place(9.0, line, 1, priority)


class Seats:
    """Places, and what they tell."""

    def __init__(self, most=4, *, is_shared=False):
        self.told = []
        self.places = Places(most, is_shared=is_shared, tell=self.told.append)

    def take(self, *lines):
        """Hold a place for a frame of each line."""
        for line in lines:
            self.places.take(make_place(line))


def test_hold_when_the_block_ends_then_is_given_back():
    """A place is held for as long as the block, and those who watch hear of both ends."""
    seats, place = Seats(), make_place()

    with seats.places.hold(place) as held:
        during = len(seats.places)

    assert held is place
    assert (during, len(seats.places)) == (1, 0)
    assert seats.told == [1, 0]


def test_hold_when_the_block_raises_then_is_given_back_all_the_same():
    """Whatever becomes of a frame, its place is free for the next one."""
    seats = Seats(most=1)

    with pytest.raises(OSError, match="torn"), seats.places.hold(make_place()):
        raise OSError("torn")

    assert seats.places.has_room(make_place())


def test_ahead_when_some_frames_run_then_names_only_those_that_do_not():
    """A frame that runs is seen by its runner already, and must not count twice."""
    seats, running, waiting = Seats(), make_place(), make_place()
    for place in (running, waiting):
        seats.places.take(place)

    running.is_ahead = False

    assert seats.places.ahead() == [waiting]


@pytest.mark.parametrize(
    ("held", "is_shared", "asks", "has_room"),
    [
        pytest.param("aaa", False, "a", True, id="who is alone takes the last one"),
        pytest.param("aaaa", False, "a", False, id="none is free"),
        pytest.param("aaa", True, "a", False, id="beside others nobody takes the last one"),
        pytest.param("aaa", True, "b", True, id="it is for those who have none"),
        pytest.param("abc", True, "a", True, id="whoever has few may have one more"),
    ],
)
def test_room_when_lines_hold_places_then_follows_the_schedule(held, is_shared, asks, has_room):
    """How many places a line holds is counted for each line by itself."""
    seats = Seats(4, is_shared=is_shared)
    seats.take(*held)

    assert seats.places.has_room(make_place(asks)) is has_room


def test_room_when_frames_matter_less_then_there_is_less():
    """What a frame matters is asked of the frame that is new."""
    seats = Seats(4)
    seats.take("a", "a")

    assert not seats.places.has_room(make_place("a", Priority.LOW))


def test_room_when_places_were_given_back_then_they_do_not_count():
    """What counts against a line's share are the places that it has, not those that it had."""
    seats = Seats(4, is_shared=True)
    seats.take("b")
    for _ in range(9):
        with seats.places.hold(make_place("a")):
            pass

    assert seats.places.has_room(make_place("a"))
