"""Threads for work that must neither keep the process from ending nor take the cores from what matters more.

Priorities are a thread's own on Linux alone, and threads that it begins inherit them; elsewhere all threads are alike.
An ordinary user can't take a lower one back, so that whatever should stand back has a thread of its own.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

# Of whatever runs beside the event loop: a third of its weight where both want the same core.
BEHIND_THE_LOOP = 5
# Of runs that nobody waits for: a third of that again. Not less, because a thread that has Python's lock and gets no
# core keeps everybody from both.
BEHIND_FRAMES = 10

_Outcome = TypeVar("_Outcome")


def stand_back(niceness: int) -> None:
    """Let the event loop come before the calling thread, and before those that it begins, by so much."""
    hold_back(threading.get_native_id(), niceness)


def hold_back(thread_id: int, niceness: int) -> None:
    """Let the event loop come before a thread, named by the system's number of it, by so much."""
    if sys.platform == "linux" and niceness:
        with contextlib.suppress(OSError):
            of_the_loop = os.getpriority(os.PRIO_PROCESS, os.getpid())
            wanted = max(of_the_loop + niceness, os.getpriority(os.PRIO_PROCESS, thread_id))
            os.setpriority(os.PRIO_PROCESS, thread_id, wanted)


def begin(work: Callable[[], _Outcome], *, name: str, niceness: int = 0) -> Future[_Outcome]:
    """Begin work in a thread of its own, which ends with the process, and return what will come of it.

    Args:
        work: what it raises comes out of the future.
        name: of the thread.
        niceness: of the thread; 0 leaves it as the calling one.

    Raises:
        RuntimeError: if the machine has no thread left.
    """
    outcome: Future[_Outcome] = Future()
    outcome.set_running_or_notify_cancel()  # whoever stops waiting stops nothing

    def body() -> None:
        stand_back(niceness)
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - the edge of this thread: whoever waits must hear of it
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    threading.Thread(target=body, name=name, daemon=True).start()
    return outcome


class Turns:
    """Lets one at a time do something long, and those first whom somebody waits for."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._is_taken = False
        self._urgent = 0

    @property
    def is_awaited(self) -> bool:
        """Whether somebody who is urgent waits for a turn now."""
        return self._urgent > 0

    @contextmanager
    def take(self, *, is_urgent: bool) -> Iterator[None]:
        """Wait for a turn, and hold it; one that is not urgent comes after all that are."""
        with self._free:
            self._urgent += is_urgent
            try:
                self._free.wait_for(lambda: not self._is_taken and (is_urgent or not self._urgent))
                self._is_taken = True
            finally:
                self._urgent -= is_urgent
        try:
            yield
        finally:
            with self._free:
                self._is_taken = False
                self._free.notify_all()
