"""Promises of the cores of a lone run: threads are spread, nobody is confined for good, and no refusal stops a run."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.engines.cores import Cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are moved on Linux alone")


def on_a_thread(act):
    """Do something on a thread of its own, whose cores are nobody else's."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


def test_choose_when_there_are_several_cores_then_home_is_one_and_the_others_are_the_rest():
    """The core that asks is home, and every other one is for those that help."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    home = max(os.sched_getaffinity(0))

    def choose_there():
        os.sched_setaffinity(0, (home,))
        os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
        return Cores.choose()

    cores = on_a_thread(choose_there)

    assert {cores.home, *cores.others} == os.sched_getaffinity(0)
    assert cores.home not in cores.others


def test_choose_when_there_is_one_core_then_there_is_nothing_to_choose():
    """On one core nobody can be kept apart."""

    def choose_on_one():
        os.sched_setaffinity(0, (min(os.sched_getaffinity(0)),))
        return Cores.choose()

    assert on_a_thread(choose_on_one) is None


def test_go_home_when_done_then_the_thread_may_run_anywhere_again():
    """Going home moves a thread once and confines it to nothing."""
    allowed = os.sched_getaffinity(0)
    cores = Cores(min(allowed), tuple(sorted(allowed - {min(allowed)})))

    def go():
        cores.go_home()
        return os.sched_getaffinity(0)

    assert on_a_thread(go) == allowed


def test_go_home_when_the_thread_may_not_run_there_then_it_stays_where_it_may():
    """Whoever takes cores away from a process does not get them back by a frame."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    home, left = min(allowed), max(allowed)

    def go():
        os.sched_setaffinity(0, (left,))
        Cores(home, (left,)).go_home()
        return os.sched_getaffinity(0)

    assert on_a_thread(go) == {left}
