"""Promises of the log: JSON lines in order, a gap that is told of, and nobody who waits for a reader."""

import json
import logging
import os
import threading

import pytest

from service.observability import log
from service.observability.log import log_json_lines
from service.threads import begin
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


@pytest.mark.parametrize(("size", "is_blocking"), [(6000, True), (200, False), (6000, False)])
def test_log_when_its_reader_is_late_then_nobody_waits_and_every_line_arrives(root_logger, pipe, size, is_blocking):
    """A pipe that has room for half a line holds up nobody, and one that others made not to wait loses nothing."""
    reader, writing = pipe
    os.set_blocking(writing, is_blocking)
    log_json_lines("INFO", writing)
    lost, arrived = [], b""
    root_logger.handlers[0].tell_of_loss = lost.append

    def tell():
        for number in range(400):
            logging.getLogger("anywhere").info("line", extra={"number": number, "padding": "x" * size})

    begin(tell, name="tells").result(20)

    def ends() -> bool:
        nonlocal arrived
        arrived += reader.read() or b""
        return arrived.count(b"\n") == 400

    wait_until(ends, "the end of what was logged")
    assert [json.loads(line)["number"] for line in arrived.splitlines()] == list(range(400))
    assert lost == []


class Disk:
    """What is written to, which hangs in the line that says so until it is told to go on."""

    def __init__(self, monkeypatch):
        self.hangs, self.goes_on = threading.Event(), threading.Event()
        self.threads = set()
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(log, "_LAST_S", 20.0)  # for a machine that is slow

    def write(self, descriptor, data):
        """Write as the real one."""
        self.threads.add(threading.get_ident())
        if b"hangs" in bytes(data):
            self.hangs.set()
            assert self.goes_on.wait(20)
        return self._write(descriptor, data)


def test_log_when_a_line_is_under_way_then_the_next_one_comes_behind_it(pipe, monkeypatch):
    """Lines come in the order in which things happened, and none in the middle of another one."""
    reader, writing = pipe
    disk = Disk(monkeypatch)
    log_json_lines("INFO", writing)

    logging.getLogger("anywhere").info("hangs", extra={"padding": "x" * 6000})
    assert disk.hangs.wait(20)
    logging.getLogger("anywhere").info("short")
    disk.goes_on.set()
    logging.getLogger().handlers[0].flush()

    assert [json.loads(line)["message"] for line in reader.read().splitlines()] == ["hangs", "short"]


def test_log_when_it_is_flushed_then_what_is_under_way_is_there_as_well(pipe, monkeypatch):
    """The last lines of a process are those that say why it ends."""
    reader, writing = pipe
    disk = Disk(monkeypatch)
    log_json_lines("INFO", writing)
    logging.getLogger("anywhere").info("hangs", extra={"padding": "x" * 6000})
    assert disk.hangs.wait(20)

    threading.Timer(0.02, disk.goes_on.set).start()
    logging.getLogger().handlers[0].flush()

    assert json.loads(reader.read())["message"] == "hangs"


def test_log_when_it_is_a_file_then_no_thread_that_logs_waits_for_its_disk(tmp_path, monkeypatch):
    """A file always seems to have room, and its disk may hang all the same."""
    disk = Disk(monkeypatch)
    with (tmp_path / "log").open("wb") as file:
        log_json_lines("INFO", file.fileno())
        logging.getLogger("anywhere").info("line")
        logging.getLogger().handlers[0].flush()

    assert threading.get_ident() not in disk.threads
    assert json.loads((tmp_path / "log").read_text())["message"] == "line"


def test_log_when_a_line_can_not_be_made_then_it_is_counted_and_told_of(root_logger, pipe):
    """Whatever a caller gave to be logged keeps nobody from going on, and is not lost in silence."""
    reader, writing = pipe
    log_json_lines("INFO", writing)
    lost = []
    (handler,) = root_logger.handlers
    handler.tell_of_loss = lost.append

    logging.getLogger("anywhere").info("line %d", "no number")
    logging.getLogger("anywhere").info("the next one")
    handler.flush()

    told = [(line["message"], line.get("lines")) for line in map(json.loads, reader.read().splitlines())]
    assert told == [("the next one", None), ("log lines were lost", 1)]
    assert lost == [1]


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
        for numbers in (range(5), [5]):
            for number in numbers:
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
    assert [line["number"] for line in whole if "number" in line] == list(range(6 - sum(lost)))
    assert whole[-1]["lines"] == sum(lost) > 0
