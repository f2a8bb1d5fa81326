"""Threads that decode apart from the runners: no line takes all of them, and none is kept for ever.

The next frame is one of the line that holds the fewest threads now, so that frames that take long to decode are waited
for by their own line. Nothing can end a thread from outside. One that a frame keeps too long is given up: the frame is
refused, another thread takes its place, and it ends by itself when it comes back.
"""

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from service.scheduling.alarm import Alarm
from service.scheduling.patience import MOST_GIVEN_UP, Patience, not_decoded
from service.threads import BEHIND_FRAMES, hold_back

_log = logging.getLogger("flawline")


@dataclass(eq=False, slots=True)
class _Job:
    """One frame's decoding.

    Attributes:
        line: whose frame it is.
        step: what is to be done.
        ended: told what came of it.
        begun_at: when a thread took it.
        thread_id: of that thread, by the system's count.
    """

    line: str
    step: Callable[[], object]
    ended: Future[None] = field(default_factory=Future)
    begun_at: float = 0.0
    thread_id: int = 0


class Decoders:
    """Decodes frames, several at once.

    Args:
        workers: threads.
        stuck_after_s: a frame that takes longer costs its thread; see `patience` for what of its time counts.
        clock: monotonic seconds.
        tell_of_replaced: called for each thread that was given up.
    """

    def __init__(
        self, workers: int, *, stuck_after_s: float, clock: Callable[[], float], tell_of_replaced: Callable[[], None]
    ) -> None:
        self._patience = Patience(stuck_after_s)
        self._clock = clock
        self._tell_of_replaced = tell_of_replaced
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[_Job]] = {}
        self._running: set[_Job] = set()
        self._given_up = 0
        self._is_closed = False
        self._next_look = Alarm(self._look, clock)
        for _ in range(workers):
            self._start()

    @property
    def is_lost(self) -> bool:
        """Whether so many threads did not come back that only a new process helps."""
        return self._given_up >= MOST_GIVEN_UP

    async def run(self, line: str, step: Callable[[], object]) -> None:
        """Do a step in one of the threads.

        Args:
            line: whose frame it is about.
            step: what to do; not begun any more once the caller has left.

        Raises:
            UnreadableFrame: if it kept its thread too long.
            Exception: whatever the step raises.
        """
        # Without a name for it here: see `_decode_one`.
        await asyncio.wrap_future(self._put(_Job(line, step)))

    def _put(self, job: _Job) -> Future[None]:
        with self._changed:
            self._waiting.setdefault(job.line, deque()).append(job)
            self._changed.notify()
        self._look_again()
        return job.ended

    def close(self) -> None:
        """End the threads, without waiting for work that nobody waits for any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._next_look.cancel()

    def _start(self) -> None:
        # Daemons, because decoding that never ends must not keep the process from ending.
        threading.Thread(target=self._serve, name="flawline-decode", daemon=True).start()

    def _serve(self) -> None:
        while self._decode_one():
            pass

    def _decode_one(self) -> bool:
        """Decode the next frame, and return whether this thread goes on; it keeps nothing of a frame while it waits."""
        job = self._take()
        if job is None:
            return False
        fault: BaseException | None = None
        try:
            try:
                job.step()
            except BaseException as error:  # noqa: BLE001 - the edge: a codec may raise anything, and the thread goes on
                fault = error
            with self._changed:
                if job not in self._running:  # given up meanwhile: another thread has its place
                    self._given_up -= 1
                    return False
                self._running.remove(job)
            if fault is None:
                job.ended.set_result(None)
            else:
                job.ended.set_exception(fault)
            return True
        finally:
            # A fault knows the frames of the stack that it came through, this one among them: the image would be kept
            # until somebody collects garbage.
            del fault, job

    def _take(self) -> _Job | None:
        """Wait for a frame that somebody still waits for; None where there is nothing more to do."""
        with self._changed:
            while not self._is_closed:
                if self._waiting:
                    held = Counter(job.line for job in self._running)
                    line = min(self._waiting, key=lambda name: held[name])
                    job = self._waiting[line].popleft()
                    if not self._waiting[line]:
                        del self._waiting[line]
                    if job.ended.set_running_or_notify_cancel():
                        job.begun_at, job.thread_id = self._clock(), threading.get_native_id()
                        self._running.add(job)
                        return job
                else:
                    self._changed.wait()
            return None

    def _look_again(self) -> None:
        self._next_look.ring_by(self._clock() + self._patience.looks_every_s)

    def _look(self) -> None:
        """Replace threads that are kept too long, and look again while any frame is there."""
        now = self._clock()
        self._patience.look(now, self._next_look.late_s)
        with self._changed:
            stuck = [job for job in self._running if self._patience.left_s(job.begun_at, now) <= 0]
            self._running.difference_update(stuck)
            self._given_up += len(stuck)
            is_idle = not self._running and not self._waiting
        for job in stuck:
            _log.error("a decoder is replaced: decoding does not end", extra={"line": job.line})
            self._tell_of_replaced()
            job.ended.set_exception(not_decoded(self._patience.stuck_after_s))
            hold_back(job.thread_id, BEHIND_FRAMES)
            self._start()
        if not is_idle:
            self._look_again()
