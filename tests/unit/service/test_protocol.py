"""Promises of one connection: what the parser keeps is bounded, and a frame costs few wakings and one packet."""

import asyncio

import pytest
import uvicorn
from uvicorn.server import ServerState

from service.ports.connections import Connections
from service.protocol import MAX_HEAD_BYTES, BoundedProtocol
from service.routes.context import CONNECTION_EXTENSION
from tests.fakes import FakeClock, in_loop

HEAD = b"POST /somewhere HTTP/1.1\r\nHost: test\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self):
        super().__init__()
        self.packets = []
        self.is_paused = False
        self.is_closed = False
        self.is_aborted = False
        self.unsent_bytes = 0

    def get_write_buffer_size(self):
        """Return what the test says is not sent yet."""
        return self.unsent_bytes

    def abort(self):
        """Note that nothing follows, not even what was written."""
        self.is_aborted = self.is_closed = True

    def write(self, data):
        """Keep a packet."""
        self.packets.append(bytes(data))

    def close(self):
        """Note that nothing follows."""
        self.is_closed = True

    def is_closing(self):
        """Tell whether something may follow."""
        return self.is_closed

    def pause_reading(self):
        """Note it; the test decides what comes."""
        self.is_paused = True

    def resume_reading(self):
        """Note it; the test decides what comes."""
        self.is_paused = False


class Connection:
    """A connection whose bytes a test brings piece by piece, to an application that keeps what it is told."""

    def __init__(self, tell=lambda _: None, port=None):
        self.messages = []
        self.scopes = []
        self.body = b"done"
        loop = asyncio.get_running_loop()
        config = uvicorn.Config(self._answer, http=BoundedProtocol, interface="asgi3", log_config=None)
        config.load()
        self.wire = Wire()
        port = Connections(loop.time, tell=tell) if port is None else port
        self.protocol = BoundedProtocol(config, ServerState(), {}, loop, port=port)
        self.protocol.connection_made(self.wire)

    async def bring(self, *pieces):
        """Let pieces arrive, with time between them to be noticed."""
        for piece in pieces:
            self.protocol.data_received(piece)
            for _ in range(5):
                await asyncio.sleep(0)

    def leave(self):
        """Hang up."""
        self.wire.close()
        self.protocol.connection_lost(None)

    async def _answer(self, scope, receive, send):
        self.scopes.append(scope)
        while not self.messages or self.messages[-1].get("more_body", False):
            self.messages.append(await receive())
        self.messages[-1] = self.messages[-1] | {"more_body": False}
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(self.body))]}
        )
        await send({"type": "http.response.body", "body": self.body})


@in_loop
async def test_body_when_its_length_is_told_then_comes_whole_and_is_answered_in_one_packet():
    """The pieces of a frame wake nobody before the last one, and the answer's head does not travel alone."""
    connection = Connection()

    await connection.bring(HEAD + b"Content-Length: 6\r\n\r\nab", b"cd", b"ef")

    assert [message["body"] for message in connection.messages] == [b"abcdef"]
    (packet,) = connection.wire.packets
    assert packet.startswith(b"HTTP/1.1 200 OK\r\n")
    assert packet.endswith(b"\r\n\r\ndone")
    connection.leave()


@in_loop
async def test_body_when_its_length_is_not_told_then_comes_piece_by_piece():
    """Whoever bounds a body of unknown length sees it grow."""
    connection = Connection()

    await connection.bring(CHUNKED + b"2\r\nab\r\n", b"2\r\ncd\r\n", b"0\r\n\r\n")

    assert [message["body"] for message in connection.messages] == [b"ab", b"cd", b""]
    connection.leave()


@in_loop
async def test_body_when_nobody_reads_it_yet_then_no_more_is_taken_until_somebody_does():
    """What arrives before its reader is bounded, and the reader lets the rest come."""
    connection = Connection()

    connection.protocol.data_received(HEAD + b"Content-Length: 300000\r\n\r\n" + bytes(100_000))
    was_paused = connection.wire.is_paused
    await connection.bring(bytes(100_000), bytes(100_000))

    assert was_paused
    assert not connection.wire.is_paused
    assert [len(message["body"]) for message in connection.messages] == [300_000]
    connection.leave()


@in_loop
async def test_body_when_its_request_is_answered_before_it_came_then_the_rest_is_taken_and_thrown_away():
    """A caller that is refused while it sends can send to the end and read why."""
    connection = Connection()
    connection.messages.append({"more_body": False})  # answers at once

    await connection.bring(HEAD + b"Content-Length: 300000\r\n\r\n" + bytes(100_000), bytes(100_000))

    assert len(connection.wire.packets) == 1
    assert not connection.wire.is_paused
    connection.leave()


@pytest.mark.parametrize(
    "pieces",
    [
        [HEAD + b"X-Filler: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n"],
        [HEAD, b"X-Filler: ", b"a" * MAX_HEAD_BYTES],
        [HEAD, *[b"X: a\r\n" * 2**10] * 11],
        [CHUNKED + b"2\r\nab\r\n0\r\n", b"X-Filler: " + b"a" * MAX_HEAD_BYTES],
        [CHUNKED, b"2;x=", b"a" * MAX_HEAD_BYTES],
    ],
    ids=["complete head", "growing head", "growing headers", "trailer", "chunk's extension"],
)
@in_loop
async def test_connection_when_the_parser_keeps_too_much_then_is_answered_and_ended(pieces):
    """Whatever grows without end and is no body ends the connection, with an answer where none has begun."""
    connection = Connection()

    await connection.bring(*pieces)

    assert connection.wire.is_closed
    (answer,) = connection.wire.packets
    assert b" 400 " in answer
    assert b"NO_VERDICT" in answer
    connection.leave()


@in_loop
async def test_connection_when_small_requests_come_at_once_then_their_sum_is_no_large_head():
    """Only what is not handed on counts; many complete requests and the begin of another one are none of it."""
    connection = Connection()
    get = b"GET /somewhere HTTP/1.1\r\nHost: test\r\n\r\n"

    await connection.bring(get * (MAX_HEAD_BYTES // len(get) + 1) + get[:20])

    assert not connection.wire.is_closed
    connection.leave()


@in_loop
async def test_request_when_another_protocol_is_offered_in_it_then_its_body_is_read_and_so_is_the_next_one():
    """The offer is left out, and nothing else."""
    connection = Connection()
    offered = HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\nX-Other: 1\r\nContent-Length: 2\r\n\r\nab"

    await connection.bring(offered + offered)

    assert [message["body"] for message in connection.messages] == [b"ab"]
    assert (b"x-other", b"1") in connection.scopes[0]["headers"]
    assert [name for name, _ in connection.scopes[0]["headers"]] == [b"host", b"x-other", b"content-length"]
    assert len(connection.scopes) == 2
    connection.leave()


@in_loop
async def test_caller_when_it_leaves_then_whoever_watches_is_told_once():
    """Nobody needs a task to wait for that."""
    connection = Connection()
    told = []
    await connection.bring(HEAD + b"Content-Length: 6\r\n\r\nab")
    watch = connection.scopes[0]["extensions"][CONNECTION_EXTENSION].watch

    has_left_already = watch(lambda: told.append(True))
    connection.leave()

    assert (has_left_already, told) == (False, [True])
    assert watch(None) is True
    for _ in range(5):
        await asyncio.sleep(0)
    assert connection.messages == [{"type": "http.disconnect", "more_body": False}]


@in_loop
async def test_caller_when_it_leaves_then_requests_in_line_end_as_left_where_they_bring_a_body():
    """What was sent ahead is no more lost without a trace than what was being answered; nobody works for it."""
    connection = Connection()
    whole, begun = b"Content-Length: 2\r\n\r\nab", b"Content-Length: 4\r\n\r\nab"
    asked = {b"POST /1": whole, b"POST /2": whole, b"GET /3": b"\r\n", b"POST /4": begun}

    connection.protocol.data_received(
        b"".join(ask + b" HTTP/1.1\r\nHost: test\r\n" + rest for ask, rest in asked.items())
    )
    connection.leave()
    for _ in range(20):
        await asyncio.sleep(0)

    assert [scope["path"] for scope in connection.scopes] == ["/1", "/2", "/4"]
    assert all(message["type"] == "http.disconnect" for message in connection.messages)
    assert connection.wire.packets == []


@pytest.mark.parametrize("header", [b"a\r\nX-Made-Up: 1", b"a\nb"])
@in_loop
async def test_answer_when_a_header_would_end_its_line_then_nothing_is_sent(header):
    """No value makes headers of its own, not even on the short way."""
    connection = Connection()
    await connection.bring(HEAD + b"Content-Length: 6\r\n\r\nab")
    answer = connection.scopes[0]["extensions"][CONNECTION_EXTENSION].answer

    with pytest.raises(RuntimeError):
        answer(200, [(b"x-request-id", header)], b"")

    assert connection.wire.packets == []
    connection.leave()


@in_loop
async def test_answer_when_the_caller_does_not_read_then_waits_for_it():
    """Whoever sends frames and takes no answers does not fill the memory with them."""
    connection = Connection()
    await connection.bring(HEAD + b"Content-Length: 6\r\n\r\nab")
    answer = connection.scopes[0]["extensions"][CONNECTION_EXTENSION].answer

    connection.protocol.pause_writing()
    could_first = answer(200, [(b"content-length", b"2")], b"ok")
    connection.protocol.resume_writing()
    could_then = answer(200, [(b"content-length", b"2")], b"ok")

    assert (could_first, could_then) == (False, True)
    assert connection.wire.packets == [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"]
    connection.leave()


def stopped_clock(monkeypatch):
    """Let the running loop go by a clock that a test moves on, and return it."""
    loop = asyncio.get_running_loop()
    clock = FakeClock(loop.time())
    monkeypatch.setattr(loop, "time", clock)
    return clock


def ages(connection):
    """Return how old each request is by what its scope tells, in seconds."""
    return [scope["extensions"][CONNECTION_EXTENSION].age_s() for scope in connection.scopes]


@pytest.mark.parametrize("offer", [b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"], ids=["plain", "with an offer"])
@in_loop
async def test_request_when_its_head_comes_slowly_then_its_age_counts_from_the_first_byte(monkeypatch, offer):
    """A head that dribbles in uses up the caller's deadline, and so it does where it is read once more."""
    clock, connection = stopped_clock(monkeypatch), Connection()

    await connection.bring(HEAD[:9])
    clock.advance(2)
    await connection.bring(HEAD[9:] + offer + b"Content-Length: 2\r\n\r\n", b"ab")

    assert ages(connection) == pytest.approx([2])
    connection.leave()


@in_loop
async def test_request_when_it_stands_in_line_then_its_age_counts_from_its_own_first_byte(monkeypatch):
    """What waits for the answers before it on its connection has come all the same."""
    clock, connection = stopped_clock(monkeypatch), Connection()
    request = HEAD + b"Content-Length: 2\r\n\r\nab"

    connection.protocol.data_received(request + request + request[:5])
    clock.advance(3)
    await connection.bring(request[5:])
    clock.advance(1)
    await connection.bring(request)

    assert ages(connection) == pytest.approx([4, 4, 4, 0])
    connection.leave()


async def pass_time(clock, seconds):
    """Let time pass second by second, so that timers of the loop fire."""
    for _ in range(seconds):
        clock.advance(1)
        for _ in range(5):
            await asyncio.sleep(0)


@in_loop
async def test_connection_when_a_head_does_not_end_then_is_cut_off_after_seconds(monkeypatch):
    """Half a head has seconds, however it dribbles in; between two requests there is more than a minute."""
    clock, told = stopped_clock(monkeypatch), []
    slow, idle, silent = Connection(told.append), Connection(told.append), Connection(told.append)
    request = HEAD + b"Content-Length: 2\r\n\r\nab"
    await idle.bring(request)
    await slow.bring(request + HEAD[:5])

    await pass_time(clock, 9)
    await slow.bring(HEAD[5:10])
    was_cut = slow.wire.is_aborted
    await pass_time(clock, 6)

    assert not was_cut
    assert [one.wire.is_aborted for one in (slow, idle, silent)] == [True, False, False]
    assert told == ["slow_head"]
    for one in (slow, idle, silent):
        one.leave()


@in_loop
async def test_connection_when_an_answer_is_not_taken_then_is_cut_off_after_seconds(monkeypatch):
    """Whoever takes something, however slowly, keeps its connection; who takes nothing keeps no memory."""
    clock, told = stopped_clock(monkeypatch), []
    stuck, slow = Connection(told.append), Connection(told.append)
    stuck.wire.unsent_bytes, slow.wire.unsent_bytes = 10_000, 100_000

    for _ in range(4):
        await pass_time(clock, 5)
        slow.wire.unsent_bytes -= 1

    assert (stuck.wire.is_aborted, slow.wire.is_aborted) == (True, False)
    assert told == ["unread_answer"]
    stuck.leave()
    slow.leave()


@in_loop
async def test_connection_when_it_is_closed_and_its_last_answer_is_not_taken_then_is_cut_off(monkeypatch):
    """Closing waits for what was written; that ends as well."""
    clock = stopped_clock(monkeypatch)
    connection = Connection()
    connection.wire.unsent_bytes = 100
    connection.protocol.shutdown()

    await pass_time(clock, 20)

    assert connection.wire.is_aborted
    connection.leave()


@in_loop
async def test_answer_when_it_is_large_then_leaves_in_pieces_as_they_are_taken():
    """What nobody takes lies here once, and not in the system's buffers as well."""
    connection = Connection()
    connection.body = bytes(range(256)) * 4096
    await connection.bring(HEAD + b"Content-Length: 2\r\n\r\n")
    answer = connection.scopes[0]["extensions"][CONNECTION_EXTENSION].answer

    could_at_once = answer(200, [], connection.body)
    await connection.bring(b"a")
    connection.protocol.pause_writing()
    await connection.bring(b"b")
    while_paused = len(connection.wire.packets)
    connection.protocol.resume_writing()
    await connection.bring(HEAD)

    assert (could_at_once, while_paused) == (False, 0)
    head, _, body = b"".join(connection.wire.packets).partition(b"\r\n\r\n")
    assert b"content-length: 1048576" in head
    assert body == connection.body
    assert max(map(len, connection.wire.packets)) < 2**20 / 2
    connection.leave()


@in_loop
async def test_connection_when_there_is_no_room_then_is_turned_away():
    """It gets no answer and no reader, and its place is not counted."""
    port = Connections(asyncio.get_running_loop().time, most=1)
    first = Connection(port=port)
    await first.bring(HEAD + b"Content-Length: 2\r\n\r\na")

    second = Connection(port=port)
    second.leave()
    await first.bring(b"b")

    assert (first.wire.is_aborted, second.wire.is_aborted) == (False, True)
    assert len(first.wire.packets) == 1
    first.leave()
    assert len(port) == 0
