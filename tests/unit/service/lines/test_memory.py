"""Promises of making room: what engines take, who leaves, in which order, and that nobody leaves in vain."""

from hypothesis import given
from hypothesis import strategies as st

from service.lines.live import VersionKey
from service.lines.memory import EngineSizes, Resident, make_room

RESIDENTS = st.lists(
    st.builds(
        Resident,
        key=st.builds(VersionKey, st.uuids().map(str), st.just("1")),
        size_bytes=st.integers(0, 100),
        used_at=st.floats(0, 100),
        is_live=st.booleans(),
        is_pinned=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda resident: resident.key,
)


@given(RESIDENTS, st.integers(0, 400), st.integers(0, 200))
def test_room_when_made_then_all_fits_nothing_pinned_leaves_and_the_last_to_leave_was_needed(residents, budget, wanted):
    """What stays fits beside what comes; nobody leaves who need not, and where there can't be room nobody does."""
    leaving = make_room(residents, budget, wanted)

    left = {resident.key: resident for resident in residents}
    if leaving is None:
        assert sum(resident.size_bytes for resident in residents if resident.is_pinned) + wanted > budget
        return
    assert not any(left[key].is_pinned for key in leaving)
    stays = sum(resident.size_bytes for key, resident in left.items() if key not in leaving)
    assert stays + wanted <= budget
    if leaving:
        assert stays + left[leaving[-1]].size_bytes + wanted > budget


@given(RESIDENTS, st.integers(0, 400))
def test_room_when_made_then_those_that_serve_nobody_leave_first_and_then_the_least_recently_used(residents, budget):
    """Kept versions and shadows go before lines do; among lines, those that nobody asked for."""
    leaving = make_room(residents, budget, 0) or ()

    by_key = {resident.key: resident for resident in residents}
    order = [(by_key[key].is_live, by_key[key].used_at) for key in leaving]
    stays = [resident for resident in residents if not resident.is_pinned and resident.key not in leaving]
    assert order == sorted(order)
    assert all((resident.is_live, resident.used_at) >= last for resident in stays for last in order[-1:])


def test_sizes_when_an_engine_was_loaded_then_it_takes_what_was_seen_and_others_are_expected_to_grow_alike():
    """A runtime's copies and buffers count; a network that never came is judged by those that did."""
    sizes = EngineSizes()

    assert sizes.expect("new", 10) == 10
    assert sizes.learn("known", 10, 20, 80) == 80
    assert sizes.expect("known", 10) == 80
    assert sizes.expect("new", 100) == 800
    assert sizes.expect(None, 100) == 800
    sizes.learn("known", 10, 1, -150)
    assert sizes.expect("new", 100) == 100  # what others gave back meanwhile makes no file smaller


def test_sizes_when_frames_come_and_go_meanwhile_then_loads_are_averaged_and_never_below_the_promise():
    """A load beside which others gave memory back looks too small, and one beside a large frame too large."""
    sizes = EngineSizes()
    sizes.learn("known", 10, 20, 80)

    assert sizes.learn("known", 10, 20, 120) == 100
    assert sizes.learn("known", 10, 20, -900) == 20
    assert sizes.expect("new", 10) == 20


def test_sizes_when_others_were_closed_meanwhile_then_their_memory_counts_only_where_nothing_is_known():
    """What a closed engine gave back is a guess; guesses upon guesses would grow without an end."""
    sizes = EngineSizes()

    assert sizes.learn("known", 10, 20, 15, closed_bytes=70) == 85
    assert sizes.learn("known", 10, 20, 60, closed_bytes=85) == 85
    assert sizes.learn("known", 10, 20, 75) == 80
