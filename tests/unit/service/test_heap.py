"""Promises of the heap: what is imported for good is never looked through again, and what is held is told."""

import gc
import sys
from types import ModuleType

import pytest

from service.heap import held_bytes, imports_stay


@pytest.fixture
def frozen(monkeypatch):
    """Count the times that everything is set aside, rather than do it to the tests beside this one."""
    times = []
    monkeypatch.setattr(gc, "freeze", lambda: times.append(1))
    return times


def test_imports_stay_when_something_was_imported_then_is_set_aside_and_collecting_goes_on(frozen, monkeypatch):
    """The collector rests while modules are made, and has nothing to do with them afterwards."""
    with imports_stay():
        collected = gc.isenabled()
        monkeypatch.setitem(sys.modules, "a_module_of_this_test", ModuleType("a_module_of_this_test"))

    assert not collected
    assert gc.isenabled()
    assert len(frozen) == 1


def test_imports_stay_when_all_was_there_or_an_import_fails_then_changes_nothing(frozen):
    """A program that calls commands again and again never sets its own garbage aside."""
    with pytest.raises(ModuleNotFoundError), imports_stay():
        raise ModuleNotFoundError

    assert gc.isenabled()
    assert frozen == []


def test_held_when_the_kernel_tells_then_what_is_taken_between_two_looks_is_the_difference(tmp_path):
    """Only the process's own memory counts; where nobody tells, nothing is made up."""
    before = held_bytes()
    taken = bytearray(32 * 2**20)
    after = held_bytes()

    assert before is not None
    assert after is not None
    assert 0.9 * len(taken) < after - before < 2 * len(taken)
    assert held_bytes(tmp_path / "nothing") is None
