"""The Python client, sync and async: one call a frame, and whatever goes wrong comes back as `NO_VERDICT`.

    with Client("http://station-4:8000", key="...") as client:
        outcome = client.inspect("cap", Path("frame.jpg"), part_id="0815", deadline_ms=200)
        if outcome.verdict is Verdict.PASS: ...

The rule of this file: `PASS` needs a complete answer with status 200 that fits the schema, to the very request that was
sent, for the line, part and policy that it named, with the verdict that its own score and thresholds give, before the
deadline: once that has passed, only reasons are listened for. Each try has a request id of its own, which the server's
answer repeats, and where a proxy has put its own in place, the answer names the digest of the frame: so neither a cache
nor an answer that comes a request late is taken for this part's. No exception leaves `inspect`, because a caller who
forgets to catch one must not pass the part; what nobody foresaw is logged and becomes a problem like any other.

What only the moment refused (429, 503, no connection) is tried again, never before `Retry-After` and never where the
answer would come after the deadline; each try tells the server how much time is left. A frame that was sent and not
answered in time is not sent again: its time is over. Nor is one that HTTP can't carry.

The one importer of httpx and tenacity in the service.
"""

import asyncio
import json
import logging
import math
import os
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx
import numpy as np
import tenacity
from numpy.typing import NDArray
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from service.bounded_sockets import bounded_pool, waits_end_at
from service.contract.policy import Verdict, verdict_between
from service.contract.raw_frames import PIXEL_FORMATS, PixelFormat
from service.inspection import HeatmapKind
from service.schemas import InspectionAnswer, InspectionOptions, LinesAnswer, LineSummary, Name

MEDIA_TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".jfif": "image/jpeg",
    ".png": "image/png",
    ".bmp": "image/bmp",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".webp": "image/webp",
}

DEFAULT_DEADLINE_MS = 2000.0
# The server answers 504 at the deadline itself; so much longer is listened, to hear its reason. No verdict is, by then.
_GRACE_S = 0.25
_SHORTEST_WAIT_S = 0.001
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0
_RETRIED_STATUS = (429, 503)
_OK = 200
_LARGEST_PORT = 65535
_LINE = TypeAdapter(Name)
_Answer = TypeVar("_Answer", bound=BaseModel)
# Of our own answers: nobody sends megabytes as a verdict.
_LARGEST_ANSWER_BYTES = 16 * 2**20

_log = logging.getLogger("flawline")


class ClientFault(Exception):
    """The server could not be asked for something that is no verdict; the sentence says why.

    Args:
        problem: the server's, or the client's own.
    """

    def __init__(self, problem: "Problem") -> None:
        super().__init__(problem.sentence)
        self.problem = problem


@dataclass(frozen=True)
class EncodedFrame:
    """A frame as the camera's file format has it.

    Attributes:
        data: the file's bytes.
        media_type: for example `image/jpeg`.
        digest: SHA-256 of the bytes as the camera wrote them, in hexadecimal digits, where somebody noted it; None
            takes that of `data`, which says nothing of what was lost before.
    """

    data: bytes
    media_type: str
    digest: str | None = None


@dataclass(frozen=True, eq=False)
class RawFrame:
    """A frame as the sensor gives it; nothing is encoded or decoded on the way.

    Attributes:
        pixels: `(H, W)` uint8 or uint16, or `(H, W, 3)` uint8.
        pixel_format: GenICam name; None takes `Mono8`, `Mono16` or `RGB8` by shape and dtype.
    """

    pixels: NDArray[np.uint8] | NDArray[np.uint16]
    pixel_format: PixelFormat | None = None


Frame = str | os.PathLike[str] | EncodedFrame | RawFrame  # the first two are the path of an image file


@dataclass(frozen=True)
class Problem:
    """Why there is no verdict.

    Attributes:
        code: the server's stable code, or the client's own: `parameter_invalid`, `frame_unreadable`, `not_reachable`,
            `deadline_passed`, `answer_unusable`, `client_closed`, and `client_failed` for what nobody foresaw.
        sentence: what happened and what to do.
        status: of the answer, or None where none came.
        request_id: under which the server logged it, or None.
    """

    code: str
    sentence: str
    status: int | None = None
    request_id: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one frame.

    Attributes:
        verdict: `NO_VERDICT` wherever `answer` is None.
        answer: the server's complete answer.
        problem: why there is none.
        tries: how often the frame was sent.
        elapsed_ms: from the call to its end.
    """

    verdict: Verdict
    answer: InspectionAnswer | None
    problem: Problem | None
    tries: int = 0
    elapsed_ms: float = 0.0


class Client:
    """Inspects frames from one thread or several.

    Args:
        url: of the server.
        key: of the caller, or None where the service is open.
        deadline_ms: of every inspection that names none.
        connections: kept open at most.
        tls: context with a private authority or a client certificate; None takes the system's authorities.
        clock: monotonic seconds.
        sleep: waits so many seconds.

    Raises:
        ClientFault: if the address or the key can't be one.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        deadline_ms: float = DEFAULT_DEADLINE_MS,
        connections: int = 16,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._http = httpx.Client(transport=_Transport(connections, tls), **_options(url, key, connections))
        self._deadline_ms = deadline_ms
        self._clock = clock
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def inspect(
        self,
        line: str,
        frame: Frame,
        *,
        part_id: str | None = None,
        view: str | None = None,
        sequence: int | None = None,
        deadline_ms: float | None = None,
        heatmap: HeatmapKind = "none",
        policy: str | None = None,
    ) -> Outcome:
        """Inspect one frame; returns, and never raises.

        Args:
            line: of the part.
            frame: the path of an image file, its bytes, or raw pixels.
            part_id: echoed and recorded, without blanks before and after it: `"0815    "`, as a PLC fills its strings,
                is `"0815"`.
            view: echoed and recorded, without blanks before and after it.
            sequence: echoed and recorded.
            deadline_ms: from this call to its end, all tries together; a verdict that comes later is none. Why a server
                that is late itself has none is listened for a quarter of a second longer.
            heatmap: which one `heatmap` may fetch afterwards.
            policy: version of the line's policy; one that is not live wants a key with the action `choose`.
        """
        patience = _Patience(self._clock)
        try:
            asked = _ask(
                line,
                part_id=part_id,
                view=view,
                sequence=sequence,
                heatmap=heatmap,
                policy=policy,
                deadline_ms=self._deadline_ms if deadline_ms is None else deadline_ms,
            )
            patience.deadline_s = asked.deadline_s
            sending = _prepare(frame, asked)
            retrying = tenacity.Retrying(sleep=self._sleep, **patience.rules())
            return patience.close(retrying(self._send, sending, patience).outcome)
        except Exception as error:  # noqa: BLE001 - the rule of this file
            return patience.close(_without_verdict(_failed(error)))

    def _send(self, sending: "_Sending", patience: "_Patience") -> "_Heard":
        """Try once."""
        _refuse_closed(self._http)
        left_s, request_id = patience.begin_try(), _new_request_id()
        try:
            with (
                waits_end_at(time.monotonic() + left_s + _GRACE_S),
                self._http.stream("POST", **sending.one_try(left_s, request_id)) as response,
            ):
                content = b""
                for piece in response.iter_bytes():
                    content = patience.collect(content, piece)
        except (httpx.HTTPError, _TooLate, _TooMuch) as error:
            return _unheard(error)
        heard = _hear(response, content, sending, request_id)
        if heard.is_strange:
            _stop_using(response)
        return heard

    def lines(self) -> list[LineSummary]:
        """Return every line that the key may know of.

        Raises:
            ClientFault: if the server can't be asked or refuses.
        """
        return _read_lines(self.ask("GET", "/v1/lines"))

    def heatmap(self, inspection_id: str, kind: Literal["png", "overlay", "f16"] = "overlay") -> bytes:
        """Return the heatmap of an inspection that asked for one.

        Raises:
            ClientFault: if the server can't be asked, or no longer keeps it.
        """
        return _read_picture(self._request("GET", _path_of_heatmap(inspection_id), kind=kind), inspection_id)

    def ask(self, method: str, path: str, *, timeout_s: float = DEFAULT_DEADLINE_MS / 1e3, **parameters: str) -> bytes:
        """Ask for something that is no verdict, once, and return the body of the answer.

        Args:
            method: of HTTP.
            path: below the address of the server.
            timeout_s: without any byte of the answer.
            parameters: of the query.

        Raises:
            ClientFault: if the server can't be asked, does not answer in time, or refuses.
        """
        return _read_bytes(self._request(method, path, timeout_s, **parameters))

    def _request(
        self, method: str, path: str, timeout_s: float = DEFAULT_DEADLINE_MS / 1e3, **parameters: str
    ) -> httpx.Response:
        _refuse_closed(self._http)
        try:
            return self._http.request(method, path, params=parameters, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise ClientFault(_no_answer(error)) from error


class AsyncClient:
    """The same for programs with an event loop; arguments and answers are those of `Client`."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        deadline_ms: float = DEFAULT_DEADLINE_MS,
        connections: int = 16,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._http = httpx.AsyncClient(verify=True if tls is None else tls, **_options(url, key, connections))
        self._deadline_ms = deadline_ms
        self._clock = clock

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def inspect(
        self,
        line: str,
        frame: Frame,
        *,
        part_id: str | None = None,
        view: str | None = None,
        sequence: int | None = None,
        deadline_ms: float | None = None,
        heatmap: HeatmapKind = "none",
        policy: str | None = None,
    ) -> Outcome:
        """Inspect one frame; see `Client.inspect`. Raises nothing but the cancellation of its task."""
        patience = _Patience(self._clock)
        try:
            asked = _ask(
                line,
                part_id=part_id,
                view=view,
                sequence=sequence,
                heatmap=heatmap,
                policy=policy,
                deadline_ms=self._deadline_ms if deadline_ms is None else deadline_ms,
            )
            patience.deadline_s = asked.deadline_s
            sending = _prepare(frame, asked)
            retrying = tenacity.AsyncRetrying(**patience.rules())
            return patience.close((await retrying(self._send, sending, patience)).outcome)
        except Exception as error:  # noqa: BLE001 - the rule of this file
            return patience.close(_without_verdict(_failed(error)))

    async def _send(self, sending: "_Sending", patience: "_Patience") -> "_Heard":
        """Try once."""
        _refuse_closed(self._http)
        left_s, request_id = patience.begin_try(), _new_request_id()
        try:
            async with (
                asyncio.timeout(left_s + _GRACE_S),
                self._http.stream("POST", **sending.one_try(left_s, request_id)) as response,
            ):
                content = b""
                async for piece in response.aiter_bytes():
                    content = patience.collect(content, piece)
        except (httpx.HTTPError, TimeoutError, _TooLate, _TooMuch) as error:
            return _unheard(error)
        heard = _hear(response, content, sending, request_id)
        if heard.is_strange:
            await response.extensions["network_stream"].aclose()
        return heard

    async def lines(self) -> list[LineSummary]:
        """Return every line that the key may know of; raises as `Client.lines` does."""
        _refuse_closed(self._http)
        try:
            return _read_lines(_read_bytes(await self._http.get("/v1/lines")))
        except httpx.HTTPError as error:
            raise ClientFault(_no_answer(error)) from error

    async def heatmap(self, inspection_id: str, kind: Literal["png", "overlay", "f16"] = "overlay") -> bytes:
        """Return the heatmap of an inspection that asked for one; raises as `Client.heatmap` does."""
        _refuse_closed(self._http)
        try:
            response = await self._http.get(_path_of_heatmap(inspection_id), params={"kind": kind})
        except httpx.HTTPError as error:
            raise ClientFault(_no_answer(error)) from error
        return _read_picture(response, inspection_id)


class _TooLate(Exception):
    """The answer still comes, and its time is over."""


class _TooMuch(Exception):
    """The answer is longer than any answer of the server."""


class _Said(InspectionOptions):
    """What a caller of the client may say: no server lets itself be given more time, whatever its operator allows."""

    deadline_ms: float | None = Field(default=None, gt=0, le=600_000, allow_inf_nan=False)


@dataclass(frozen=True)
class _Asked:
    """What was asked for, and what an answer must therefore be about."""

    line: str
    options: InspectionOptions
    deadline_s: float


@dataclass(frozen=True)
class _Sending:
    asked: _Asked
    url: str
    content: bytes
    digest: bytes
    headers: Mapping[str, str]

    def one_try(self, left_s: float, request_id: str) -> dict[str, Any]:
        """Return the arguments of one try, which tells the server how much time is left and what the answer repeats."""
        headers = {**self.headers, "X-Deadline-Ms": f"{max(1.0, left_s * 1e3):.3f}", "X-Request-Id": request_id}
        # Whoever has no connection by the deadline has nobody whose reason could be heard.
        connect_s = max(_SHORTEST_WAIT_S, left_s)
        timeout = httpx.Timeout(left_s + _GRACE_S, connect=connect_s, pool=connect_s)
        return {"url": self.url, "content": self.content, "headers": headers, "timeout": timeout}


@dataclass(frozen=True)
class _Heard:
    """One try's end.

    Attributes:
        outcome: what the frame would be told if this was the last try.
        again: whether the same frame may get a verdict a moment later.
        not_before_s: the server's `Retry-After`.
        is_strange: whether it is the answer to another request. Then the connection is one ahead or behind, and every
            later answer on it would be too.
    """

    outcome: Outcome
    again: bool = False
    not_before_s: float = 0.0
    is_strange: bool = False


class _Patience:
    """How long one frame may take, over all its tries.

    Attributes:
        deadline_s: from the beginning to the end of them.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.deadline_s = 0.0
        self._clock = clock
        self._started_at = clock()
        self._tries = 0

    def begin_try(self) -> float:
        """Count a try and return the seconds that are left for it."""
        self._tries += 1
        return max(0.0, self.deadline_s - (self._clock() - self._started_at))

    def collect(self, content: bytes, piece: bytes) -> bytes:
        """Add a piece to an answer, unless it comes too late or there is too much of it.

        Raises:
            _TooLate: if the time is over.
            _TooMuch: if the answer is none of ours.
        """
        if self._clock() - self._started_at > self.deadline_s + _GRACE_S:
            raise _TooLate
        if len(content) + len(piece) > _LARGEST_ANSWER_BYTES:
            raise _TooMuch
        return content + piece

    def rules(self) -> dict[str, Any]:
        """Return how tenacity tries again."""
        backoff = tenacity.wait_random_exponential(multiplier=_FIRST_PAUSE_S, max=_LONGEST_PAUSE_S)

        def pause_s(state: tenacity.RetryCallState) -> float:
            return max(backoff(state), _heard_in(state).not_before_s)

        def no_time_left(state: tenacity.RetryCallState) -> bool:
            return self._clock() - self._started_at + state.upcoming_sleep >= self.deadline_s

        return {
            "retry": tenacity.retry_if_result(lambda heard: heard.again),
            "wait": pause_s,
            "stop": no_time_left,
            "retry_error_callback": _heard_in,
        }

    def close(self, outcome: Outcome) -> Outcome:
        """Note tries and time, and take away a verdict that came too late, however it did: the part is gone by then."""
        elapsed_s = self._clock() - self._started_at
        if outcome.answer is not None and elapsed_s > self.deadline_s:
            sentence = "The answer came after the deadline; the part has no verdict."
            outcome = _without_verdict(Problem("deadline_passed", sentence, _OK, outcome.answer.request_id))
        return replace(outcome, tries=self._tries, elapsed_ms=elapsed_s * 1e3)


def _heard_in(state: tenacity.RetryCallState) -> _Heard:
    if state.outcome is None:  # only before the first try, when nobody asks
        raise AssertionError("no try has ended yet")
    heard: _Heard = state.outcome.result()
    return heard


class _Transport(httpx.HTTPTransport):
    """Answers come in many pieces, and their waits end together."""

    def __init__(self, connections: int, tls: ssl.SSLContext | None) -> None:
        context = httpx.create_ssl_context(trust_env=False) if tls is None else tls
        super().__init__(verify=context, trust_env=False)
        # httpx has no other way to name the pool; a test would see if it were not taken any more.
        self._pool = bounded_pool(context, connections)


def _options(url: str, key: str | None, connections: int) -> dict[str, Any]:
    """Return what both kinds of httpx's clients are made with.

    Raises:
        ClientFault: if the address or the key can't be one.
    """
    try:
        is_address = (httpx.URL(url).port or 0) <= _LARGEST_PORT
    except httpx.InvalidURL:
        is_address = False
    if not is_address:
        raise ClientFault(Problem("parameter_invalid", "The server's address is none; look at its host and port."))
    if key is not None and not key.isascii():
        raise ClientFault(Problem("parameter_invalid", "A key is ASCII; look for what is none in it."))
    return {
        "base_url": url,
        "headers": {} if key is None else {"Authorization": f"Bearer {key}"},
        "limits": httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        "timeout": DEFAULT_DEADLINE_MS / 1e3,
        "trust_env": False,  # a proxy of the environment must not stand between a camera and its station
    }


def _ask(line: str, *, deadline_ms: float, **options: object) -> _Asked:
    """Say what is wanted, as the server will read it.

    Raises:
        ClientFault: if something does not fit.
    """
    try:
        said = _Said.model_validate({"deadline_ms": deadline_ms, **options})
        return _Asked(_LINE.validate_python(line), said, (said.deadline_ms or 0.0) / 1e3)
    except ValidationError as error:
        raise ClientFault(Problem("parameter_invalid", f"{_first_of(error, 'line')}.")) from error


def _first_of(error: ValidationError, whole: str = "all of it") -> str:
    """Tell where something does not fit, and why."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in first['loc']) or whole}: {first['msg']}"


def _prepare(frame: Frame, asked: _Asked) -> _Sending:
    """Write the request.

    Raises:
        ClientFault: if the frame can't be sent.
    """
    try:
        content, kind = _encode(frame)
        digest = _digest_of(frame, content)
    except OSError as error:
        sentence = f"{error.filename or 'The frame'} can't be read: {error.strerror}."
        raise ClientFault(Problem("frame_unreadable", sentence)) from error
    except (TypeError, ValueError) as error:
        raise ClientFault(Problem("frame_unreadable", str(error))) from error
    options = asked.options
    said = {
        "X-Part-Id": options.part_id,
        "X-View": options.view,
        "X-Sequence": None if options.sequence is None else str(options.sequence),
        "X-Heatmap": options.heatmap,
        "X-Policy": options.policy,
        "Content-Digest": f"sha-256=:{b64encode(digest).decode()}:",
    }
    headers = kind | {name: value for name, value in said.items() if value}
    return _Sending(asked, f"/v1/lines/{asked.line}/inspect", content, digest, headers)


def _digest_of(frame: object, content: bytes) -> bytes:
    """Return the SHA-256 that the server is told, so that it judges what was sent and nothing else.

    It takes half a millisecond a megabyte, of the frame's own time.

    Raises:
        ValueError: if the caller's own can't be one.
    """
    if not isinstance(frame, EncodedFrame) or frame.digest is None:
        return sha256(content).digest()
    try:
        digest = bytes.fromhex(frame.digest)
    except (TypeError, ValueError):
        digest = b""
    if len(digest) != sha256().digest_size:
        raise ValueError("The digest of an EncodedFrame is its SHA-256, 64 hexadecimal digits.")
    return digest


def _encode(frame: object) -> tuple[bytes, dict[str, str]]:
    """Return a frame's bytes and the headers that say what they are.

    Raises:
        OSError: if the file can't be read.
        TypeError: if it is no frame at all.
        ValueError: if it is no kind of frame that the service takes.
    """
    if isinstance(frame, str | os.PathLike):
        file = Path(frame)
        media_type = MEDIA_TYPES.get(file.suffix.lower())
        if media_type is None:
            raise ValueError(f"{file.name} is no image file that the service takes: {', '.join(MEDIA_TYPES)}.")
        return file.read_bytes(), {"Content-Type": media_type}
    if isinstance(frame, EncodedFrame):
        if not isinstance(frame.data, bytes | bytearray | memoryview):
            raise TypeError(f"The data of an EncodedFrame are bytes, and not {type(frame.data).__name__}.")
        return bytes(frame.data), {"Content-Type": _header_of(frame.media_type)}
    if not isinstance(frame, RawFrame):
        kinds = "a path, EncodedFrame(data, 'image/jpeg') or RawFrame(pixels)"
        raise TypeError(f"A frame is {kinds}, and not {type(frame).__name__}.")
    return _encode_raw(frame)


def _header_of(media_type: object) -> str:
    """Return a media type as a header has it.

    Raises:
        ValueError: if it can't be one.
    """
    name = media_type.strip() if isinstance(media_type, str) else ""
    if not name or not name.isascii() or not name.isprintable():
        raise ValueError("A media type is printable ASCII, for example image/jpeg.")
    return name


def _encode_raw(frame: RawFrame) -> tuple[bytes, dict[str, str]]:
    """Return pixels as they lie in memory, and the headers that say how.

    Raises:
        ValueError: if they are no kind that the service takes.
    """
    pixels = np.ascontiguousarray(frame.pixels)
    kinds: dict[tuple[int, str], PixelFormat] = {(2, "uint8"): "Mono8", (2, "uint16"): "Mono16", (3, "uint8"): "RGB8"}
    pixel_format = frame.pixel_format or kinds.get((pixels.ndim, pixels.dtype.name))
    if (pixels.ndim, pixels.dtype.name) not in kinds or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise ValueError("Raw pixels are (H, W) uint8 or uint16, or (H, W, 3) uint8.")
    if pixel_format not in PIXEL_FORMATS:
        raise ValueError(f"A pixel format is one of {', '.join(PIXEL_FORMATS)}.")
    return pixels.astype(pixels.dtype.newbyteorder("<"), copy=False).tobytes(), {
        "Content-Type": "application/x-raw-frame",
        "X-Pixel-Format": pixel_format,
        "X-Height": str(pixels.shape[0]),
        "X-Width": str(pixels.shape[1]),
    }


def _new_request_id() -> str:
    return os.urandom(16).hex()


def _stop_using(response: httpx.Response) -> None:
    """Let the pool find the connection of an answer closed; another thread may just have taken it."""
    with suppress(OSError):  # of one that is
        response.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def _hear(response: httpx.Response, content: bytes, sending: _Sending, request_id: str) -> _Heard:
    """Read an answer; whatever does not fit completely has no verdict."""
    if response.status_code != _OK:
        return _hear_problem(response, content)
    try:
        answer = read_answer(InspectionAnswer, content)
    except ClientFault as fault:
        return _Heard(_without_verdict(fault.problem))
    # Some proxies name requests anew, Envoy among them; then the answer must be about these very bytes.
    if answer.request_id != request_id and answer.frame.digest != sending.digest.hex():
        return _Heard(_without_verdict(_unusable("This is the answer to another request.")), is_strange=True)
    wrong = _contradiction(answer, sending.asked)
    return _Heard(Outcome(answer.verdict, answer, None) if wrong is None else _without_verdict(_unusable(wrong)))


def _contradiction(answer: InspectionAnswer, asked: _Asked) -> str | None:
    """Say what keeps an answer from being believed: it is not what was asked for, or does not agree with itself."""
    options, said = asked.options, (answer.line, answer.part_id, answer.view, answer.sequence)
    if said != (asked.line, options.part_id, options.view, options.sequence):
        return "The answer is about another part; look at what stands in between."
    if options.policy not in (None, answer.policy.version):
        return f"The part was judged by another policy than {options.policy}, which was asked for; look at the server."
    review, fail = answer.thresholds.review, answer.thresholds.fail
    if review > fail or verdict_between(answer.score, review, fail) is not answer.verdict:
        compared = f"a score of {answer.score!r} with the thresholds {review!r} and {fail!r}"
        return f"The answer contradicts itself: {answer.verdict.value} for {compared}; look at the server."
    return None


def _hear_problem(response: httpx.Response, content: bytes) -> _Heard:
    again = response.status_code in _RETRIED_STATUS
    return _Heard(_without_verdict(_problem_of(response, content)), again, _retry_after_s(response))


def _problem_of(response: httpx.Response, content: bytes) -> Problem:
    code, sentence, request_id = "answer_unusable", f"The server answered with status {response.status_code}.", None
    try:
        document = json.loads(content)
        code, sentence, request_id = str(document["code"]), str(document["detail"]), document.get("request_id")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # whatever stands in between, a proxy for example, has its own way to refuse
    return Problem(code, sentence, response.status_code, request_id if isinstance(request_id, str) else None)


def _retry_after_s(response: httpx.Response) -> float:
    try:
        seconds = float(response.headers.get("Retry-After", "0"))
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _unheard(error: Exception) -> _Heard:
    """Tell what a try without an answer means."""
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return _Heard(_without_verdict(_not_sendable(error)))  # and never will be
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return _Heard(_without_verdict(_not_reachable(error)), again=True)
    if isinstance(error, httpx.TimeoutException | TimeoutError | _TooLate):
        sentence = "The deadline passed before the answer was complete; the part has no verdict."
        return _Heard(_without_verdict(Problem("deadline_passed", sentence)))
    if isinstance(error, _TooMuch):
        return _Heard(
            _without_verdict(_unusable("The answer is longer than any of the server's; look at the address."))
        )
    # A connection that broke: the server was stopped, or closed an idle one in the very moment of its use.
    return _Heard(_without_verdict(_not_reachable(error)), again=isinstance(error, httpx.TransportError))


def _no_answer(error: Exception) -> Problem:
    if isinstance(error, httpx.ReadTimeout):
        return Problem("no_answer", "The server did not answer in time; whether it did what was asked is not known.")
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return _not_sendable(error)
    return _not_reachable(error)


def _not_sendable(error: Exception) -> Problem:
    if isinstance(error, httpx.UnsupportedProtocol):
        return Problem("parameter_invalid", "The server's address must begin with http:// or https://.")
    # Its own text may show the key.
    return Problem("parameter_invalid", "HTTP can't carry the request; look for blanks and line ends in key and names.")


def _failed(error: Exception) -> Problem:
    """Tell what kept a frame from being sent, or from being answered, as nobody foresaw."""
    if isinstance(error, ClientFault):
        return error.problem
    _log.error("the client failed", exc_info=error)
    return Problem("client_failed", f"The client failed ({type(error).__name__}); the log says how.")


def _refuse_closed(http: httpx.Client | httpx.AsyncClient) -> None:
    """Refuse to ask through a client that was closed.

    Raises:
        ClientFault: if it was.
    """
    if http.is_closed:
        raise ClientFault(Problem("client_closed", "The client was closed; make a new one."))


def _not_reachable(error: Exception) -> Problem:
    return Problem("not_reachable", f"The server can't be reached ({type(error).__name__}); look at address and cable.")


def _unusable(sentence: str) -> Problem:
    return Problem("answer_unusable", sentence, _OK)


def _without_verdict(problem: Problem) -> Outcome:
    return Outcome(Verdict.NO_VERDICT, None, problem)


def _read_lines(content: bytes) -> list[LineSummary]:
    return read_answer(LinesAnswer, content).lines


def read_answer(schema: type[_Answer], content: bytes) -> _Answer:
    """Read an answer; a newer server may say more.

    Raises:
        ClientFault: if it does not fit.
    """
    try:
        return schema.model_validate_json(content, extra="ignore")
    except ValidationError as error:
        sentence = f"The server's answer does not fit this client ({_first_of(error)}); update the older of the two."
        raise ClientFault(_unusable(sentence)) from error


def _read_bytes(response: httpx.Response) -> bytes:
    if response.status_code != _OK:
        raise ClientFault(_problem_of(response, response.content))
    return response.content


def _path_of_heatmap(inspection_id: str) -> str:
    return f"/v1/inspections/{inspection_id}/heatmap"


def _read_picture(response: httpx.Response, inspection_id: str) -> bytes:
    """Return a heatmap, which by itself does not show whose it is.

    Raises:
        ClientFault: if it is that of another inspection, or none.
    """
    picture = _read_bytes(response)
    if response.headers.get("Flawline-Inspection-Id") != inspection_id:
        raise ClientFault(_unusable("The picture is that of another inspection; look at what stands in between."))
    return picture
