"""The log of the process: one line of JSON a record, and nobody who waits for whoever reads it.

A pipe with room for a line gets it at once. A full one, and a file, whose disk may hang, are written by a thread. Where
nobody reads for long, or the disk is full, lines are lost, counted and told of; no frame waits for them.
"""

import json
import logging
import os
import select
import stat
import traceback
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import accumulate
from threading import Condition, Event, Thread
from typing import Any

from pydantic_core import to_json

# Bytes of lines that wait for their reader: half a minute of hundreds of frames a second.
_MOST_WAITING = 8 << 20
# Lines of the thread that come within this time are written together: waking it costs as much as several lines do.
_TOGETHER_S = 0.02
# At the end of the process, for a reader that is slow.
_LAST_S = 1.0
_STANDARD_ERROR = 2


class InspectionRecord(logging.LogRecord):
    """The record of one frame, which does not look for its caller, thread and process as others do.

    Args:
        logger: whose record it is.
        members: of the line.
        created: when it came to be, in seconds since 1970.
    """

    _of_all = vars(logging.LogRecord("", logging.INFO, __file__, 0, "inspection", None, None))

    def __init__(self, logger: str, members: Mapping[str, Any], created: float) -> None:
        self.__dict__.update(self._of_all)
        self.name = logger
        self.created = created
        self.msecs = self.created % 1 * 1000
        self.members = members


class JsonLines(logging.Formatter):
    """Formats each log record as one line of JSON, with whatever was given as `extra` as members."""

    _STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        members: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if isinstance(record, InspectionRecord):
            return to_json({**members, **record.members}).decode()
        members.update((name, value) for name, value in vars(record).items() if name not in self._STANDARD)
        if record.exc_info is not None and record.exc_info[1] is not None:
            members["exception"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(members, default=str)


class LineWriter(logging.Handler):
    """Writes lines in order, by itself or by a thread; what can't be written is told of once it can again.

    Args:
        descriptor: of the file or pipe.

    Attributes:
        tell_of_loss: called with how many lines were lost, by whichever thread notices.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.tell_of_loss: Callable[[int], None] = _tell_nobody
        self._descriptor = descriptor
        self._changed = Condition()
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._is_writing = False
        self._lost = 0
        self._is_torn = False
        self._hurry = Event()
        self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._room = select.poll()
        self._room.register(descriptor, select.POLLOUT)
        Thread(target=self._write_for_ever, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line where that takes no time, else hand it over, or lose it where too many wait already."""
        try:
            line = self.format(record).encode("utf-8", "replace") + b"\n"
        except Exception:  # noqa: BLE001 - whatever a caller gave to be logged; as the library's own handlers do
            self._lose(1)
            return
        with self._changed:
            if self._has_room(line):
                self._put([line], 0)
                return
            has_room = self._waiting_bytes + len(line) <= _MOST_WAITING
            if has_room:
                self._waiting.append(line)
                self._waiting_bytes += len(line)
                self._changed.notify_all()
            else:  # counted before the lines that it is missing behind can be taken
                self._lost += 1
        if not has_room:
            self.tell_of_loss(1)
        elif record.levelno >= logging.WARNING:
            self._hurry.set()

    def flush(self) -> None:
        """Wait until everything is written, but not for a reader that has stopped to read."""
        self._hurry.set()
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._is_writing, _LAST_S)

    def _lose(self, lines: int) -> None:
        with self._changed:
            self._lost += lines
        self.tell_of_loss(lines)

    def _has_room(self, line: bytes) -> bool:
        """Tell whether a line is the next one, and would not wait: what is ready takes so many bytes at once."""
        is_next = not self._waiting and not self._is_writing and not self._lost
        return is_next and not self._is_file and len(line) < select.PIPE_BUF and bool(self._room.poll(0))

    def _write_for_ever(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting)
            self._hurry.wait(_TOGETHER_S)
            self._hurry.clear()
            with self._changed:
                lines, self._waiting, self._waiting_bytes = self._waiting, [], 0
                lost, self._lost = self._lost, 0  # those that found no room behind these lines
                self._is_writing = True
            self._put(lines, lost)

    def _put(self, lines: Sequence[bytes], lost: int) -> None:
        """Write lines, and how many were lost behind them."""
        unwritten = len(lines) - self._write(lines)
        if unwritten:
            self._lose(unwritten)
        if lost and (unwritten or not self._write([self._gap(lost)])):
            with self._changed:
                self._lost += lost

    def _gap(self, lost: int) -> bytes:
        """Return the line that says how many are missing where it stands."""
        known = {"name": "flawline", "levelno": logging.WARNING, "levelname": "WARNING", "msg": "log lines were lost"}
        return self.format(logging.makeLogRecord(known | {"lines": lost})).encode() + b"\n"

    def _write(self, lines: Sequence[bytes]) -> int:
        """Write lines and return how many of them arrived whole."""
        # What follows half a line must not become part of it.
        torn = b"\n" if self._is_torn else b""
        data, written = torn + b"".join(lines), 0
        try:
            while written < len(data):
                try:
                    written += os.write(self._descriptor, memoryview(data)[written:])
                except BlockingIOError:  # whoever gave us the pipe made it so
                    self._room.poll(_LAST_S * 1000)
        except OSError:
            if written:
                self._is_torn = data[written - 1 : written] != b"\n"
            return bisect_right([*accumulate(map(len, lines))], written - len(torn))
        self._is_torn = False
        return len(lines)


def log_json_lines(level: str, descriptor: int = _STANDARD_ERROR) -> None:
    """Make every logger of the process write JSON lines.

    Args:
        level: name of the lowest level that is written.
        descriptor: of what is written to; standard error where absent.
    """
    handler = LineWriter(descriptor)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it says of a caller's file is no fault of ours


def _tell_nobody(lines: int) -> None:
    """Lose lines while nobody counts yet."""
