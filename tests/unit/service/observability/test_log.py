"""Promises of the log: JSON lines in order, a gap that is told of, and nobody who waits for a reader."""

import json
import logging
import os

import pytest

from service.observability import log
from service.observability.log import log_json_lines
from tests.servers import wait_until


@pytest.fixture(autouse=True)
def root_logger():
    """Give the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def pipe():
    """Return a pipe whose end for reading is a file that gives what is there."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with os.fdopen(reading, "rb", buffering=0) as reader:
        yield reader, writing
        os.close(writing)


def test_log_json_lines_when_something_raised_then_line_holds_the_traceback(pipe):
    """Every record is one line of JSON, with exceptions and extras inside."""
    reader, writing = pipe
    log_json_lines("WARNING", writing)

    logging.getLogger("anywhere").info("not wanted")
    try:
        int("harm\ndone")
    except ValueError:
        logging.getLogger("anywhere").exception("caught", extra={"request_id": "r", "odd": object()})
    logging.getLogger().handlers[0].flush()

    (line,) = reader.read().splitlines()
    logged = json.loads(line)
    assert (logged["level"], logged["message"], logged["request_id"]) == ("ERROR", "caught", "r")
    assert "ValueError: invalid literal" in logged["exception"]


def test_log_when_nobody_reads_then_lines_beyond_the_bound_are_lost_counted_and_told_of_where_they_are_missing(
    root_logger, pipe, monkeypatch
):
    """Logging returns at once, what was kept arrives in order, and the log says where lines are missing."""
    monkeypatch.setattr(log, "_MOST_WAITING", 200_000)
    reader, writing = pipe
    log_json_lines("INFO", writing)
    lost = []
    (handler,) = root_logger.handlers
    handler.tell_of_loss = lost.append

    for number in range(3000):
        logging.getLogger("anywhere").info("line", extra={"number": number, "padding": "x" * 200})
    arrived = b""

    def ends() -> bool:
        nonlocal arrived
        arrived += reader.read() or b""
        told = [json.loads(line).get("lines", 1) for line in arrived.splitlines()] if arrived.endswith(b"\n") else []
        return sum(told) == 3000

    wait_until(ends, "the end of what was kept")
    expected = 0
    for event in map(json.loads, arrived.splitlines()):
        if event["message"] == "log lines were lost":
            expected += event["lines"]
        else:
            assert event["number"] == expected
            expected += 1
    assert expected == 3000
    assert lost
    assert set(lost) == {1}


def test_log_when_the_disk_is_full_then_half_a_line_spoils_no_other(root_logger, tmp_path, monkeypatch):
    """Lines that do not fit are lost; with room again, the log goes on with whole ones and tells of the gap."""
    lost, limited = [], True
    write = os.write

    def until_full(descriptor, data):
        written = os.fstat(descriptor).st_size
        if limited and written >= 300:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[: 300 - written] if limited else data)

    monkeypatch.setattr(os, "write", until_full)
    with (tmp_path / "log").open("wb") as file:
        log_json_lines("INFO", file.fileno())
        (handler,) = root_logger.handlers
        handler.tell_of_loss = lost.append
        for number in range(5):
            logging.getLogger("anywhere").info("line", extra={"number": number})
        handler.flush()
        limited = False
        logging.getLogger("anywhere").warning("there is room again")
        handler.flush()

    whole, torn = [], 0
    for line in (tmp_path / "log").read_text().splitlines():
        try:
            whole.append(json.loads(line))
        except ValueError:
            torn += 1
    assert torn == 1
    assert [line["message"] for line in whole][-2:] == ["there is room again", "log lines were lost"]
    assert [line["number"] for line in whole if "number" in line] == list(range(5 - sum(lost)))
    assert whole[-1]["lines"] == sum(lost) > 0
