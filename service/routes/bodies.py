"""Receives bodies: bounded while they arrive, in memory, and never longer than their deadline.

Before: the caller is known and its parameters are read. After: the bytes of one frame (or of several) and their kind.
A body that promises too much is refused before it is read, one that turns out too large as soon as it is; and so is one
that would take more memory than all bodies, or all of its caller's, may take together.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from service.contract.frames import FORMAT_OF_MEDIA_TYPE, FrameLimits
from service.errors import (
    DeadlinePassed,
    FlawlineError,
    FrameTooLarge,
    MediaTypeNotAllowed,
    ParameterInvalid,
    UnreadableFrame,
)
from service.inspection import RawLayout
from service.ports.body_budget import Holding
from service.routes.content_digest import demand_digest_of, told_digest
from service.routes.context import connection_of, context_of
from service.routes.headers import RAW_HEADERS, refuse_repeated
from service.routes.problems import sentence_of
from service.schemas import RawFrameOptions

RAW_MEDIA_TYPE = "application/x-raw-frame"
MULTIPART_MEDIA_TYPE = "multipart/form-data"
BYTES_MEDIA_TYPE = "application/octet-stream"
SMALL_BODY_BYTES = 64 * 2**10
# What programs write when they do not know the kind of a file; the decoder looks at the bytes anyway.
_UNKNOWN_MEDIA_TYPES = frozenset({BYTES_MEDIA_TYPE, ""})
_DISCARDED_BODIES = 4  # times the limit
_SMALL_BODIES = "small bodies"  # have one share together, whoever sends them


@dataclass(frozen=True)
class Upload:
    """One frame as it came.

    Attributes:
        data: encoded image or raw pixels.
        raw: layout of raw pixels; None for an encoded image.
        digest: SHA-256 of `data` that it was sent with, in hexadecimal digits; empty where it was sent without.
    """

    data: bytes
    raw: RawLayout | None
    digest: str = ""


async def receive_frame(request: Request, limits: FrameLimits, timeout_s: float, holding: Holding) -> Upload:
    """Receive one frame: the raw body, or the file field `frame` of a multipart body.

    Args:
        request: whose body has not been read.
        limits: byte bound and accepted formats.
        timeout_s: how long the body may take to arrive.
        holding: counts what it takes.

    Raises:
        FrameTooLarge: if the body is, or promises to be, over the limit.
        Overloaded: if there is no memory for it now.
        MediaTypeNotAllowed: if its kind is not accepted.
        ParameterInvalid: if the layout of raw pixels, the form or the digest does not fit.
        UnreadableFrame: if a multipart body is broken, or not the one that was sent.
        DeadlinePassed: if it did not arrive in time.
    """
    media_type = _media_type(request.headers)
    if media_type == MULTIPART_MEDIA_TYPE:
        return usable((await receive_frames(request, "frame", 1, limits, timeout_s, holding))[0])
    raw = _layout(media_type, request.headers, limits)
    digest = told_digest(request.headers)
    return Upload(await receive_body(request, limits.max_bytes, timeout_s, holding), raw, digest)


async def receive_body(request: Request, max_bytes: int, timeout_s: float, holding: Holding) -> bytes:
    """Receive a body, whatever it holds.

    Args:
        request: whose body has not been read.
        max_bytes: the largest body.
        timeout_s: how long it may take to arrive.
        holding: counts what it takes.

    Raises:
        FrameTooLarge: if the body is, or promises to be, over the limit.
        Overloaded: if there is no memory for it now.
        DeadlinePassed: if it did not arrive in time.
    """
    _refuse_promise(request, max_bytes, holding)
    if _has_body(request):  # nothing to wait for, and so no need of a timer
        return await _read(request, max_bytes, holding)
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(request, max_bytes, holding)
    except TimeoutError as error:
        raise _not_in_time() from error


async def receive_small_body(request: Request) -> bytes:
    """Receive the body of a request that brings no frame, within the default deadline.

    Raises:
        FrameTooLarge: if the body is, or promises to be, over the limit of such bodies.
        Overloaded: if there is no memory for it now.
        DeadlinePassed: if it did not arrive in time.
    """
    context = context_of(request)
    with context.bodies.of(_SMALL_BODIES) as body:
        return await receive_body(request, SMALL_BODY_BYTES, context.settings.default_deadline_s, body)


def comes_at_once(request: Request) -> bool:
    """Tell whether a frame is received without waiting, so that nobody comes first; a large form goes by a file."""
    return _has_body(request) and _media_type(request.headers) != MULTIPART_MEDIA_TYPE


def _has_body(request: Request) -> bool:
    connection = connection_of(request.scope)
    return connection is not None and connection.has_body()


async def _read(request: Request, max_bytes: int, holding: Holding) -> bytes:
    pieces: list[bytes] = []
    received = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        pieces.append(message.get("body", b""))
        received += len(pieces[-1])
        if received > max_bytes:
            raise _too_many_bytes(max_bytes)
        holding.hold(received)
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def receive_frames(
    request: Request, field: str, max_frames: int, limits: FrameLimits, timeout_s: float, holding: Holding
) -> list[Upload | FlawlineError]:
    """Receive a multipart body whose every part is a file of the same field.

    Args:
        request: whose body has not been read.
        field: name of the field.
        max_frames: how many files it may hold.
        limits: byte bound of the body, and accepted formats.
        timeout_s: how long the body may take to arrive.
        holding: counts what it takes.

    Returns:
        One entry a file, in order: its frame, or what is wrong with its kind.

    Raises:
        FrameTooLarge: if the body is, or promises to be, over the limit, or holds more frames.
        Overloaded: if there is no memory for it now.
        MediaTypeNotAllowed: if the body is not multipart.
        ParameterInvalid: if there is no file, a field of another name, or a digest that can't be read.
        UnreadableFrame: if the body is broken, or not the one that was sent.
        DeadlinePassed: if it did not arrive in time.
    """
    if _media_type(request.headers) != MULTIPART_MEDIA_TYPE:
        raise MediaTypeNotAllowed(f"Send multipart/form-data with a file field named `{field}`.")
    pieces = demand_digest_of(_bounded(request, limits.max_bytes, holding), told_digest(request.headers))
    parser = _FormParser(request.headers, pieces, max_files=max_frames, max_fields=0)
    parser.spool_max_size = limits.max_bytes + 1  # files never reach the disk: what bounds the body bounds the memory
    try:
        async with asyncio.timeout(timeout_s):
            form = await parser.parse()
    except TimeoutError as error:
        raise _not_in_time() from error
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise _too_many_frames(max_frames) from error
        if error.message.startswith("Too many fields"):
            raise ParameterInvalid(f"The form may hold files of the field `{field}` only.") from error
        raise UnreadableFrame("The multipart body is damaged; its parts or its boundary can't be read.") from error
    try:
        if not parser.has_ended:
            raise UnreadableFrame("The multipart body is truncated; its last boundary is missing.")
        files = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files or any(name != field for name, _ in files):
            raise ParameterInvalid(f"Send each frame as a file of the field `{field}`, and no other field.")
        return [await _upload_of(file, request.headers, limits) for _, file in files]
    finally:
        await form.close()


def usable(upload: Upload | FlawlineError) -> Upload:
    """Return a frame, or raise what is wrong with its kind."""
    if isinstance(upload, FlawlineError):
        raise upload
    return upload


class _FormParser(MultiPartParser):
    """Starlette's parser, which by itself takes a truncated form for a shorter one."""

    has_ended = False

    def on_end(self) -> None:
        self.has_ended = True


async def _upload_of(file: UploadFile, headers: Mapping[str, str], limits: FrameLimits) -> Upload | FlawlineError:
    media_type = _media_type(file.headers)
    try:
        refuse_repeated(file.headers.raw)
        is_unknown = media_type in _UNKNOWN_MEDIA_TYPES and not _is_raw(media_type, headers)
        raw = None if is_unknown else _layout(media_type, headers, limits)
        digest = told_digest(file.headers)
    except FlawlineError as error:
        return error
    return Upload(await file.read(), raw, digest)


async def _bounded(request: Request, max_bytes: int, holding: Holding) -> AsyncGenerator[bytes, None]:
    _refuse_promise(request, max_bytes, holding)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            raise _too_many_bytes(max_bytes)
        holding.hold(received)
        yield chunk


def _refuse_promise(request: Request, max_bytes: int, holding: Holding) -> None:
    """Refuse a body that promises to be too large, for itself or beside others, before any of it is read."""
    promised = request.headers.get("content-length", "")
    length = int(promised) if promised.isdigit() else None
    # A client that can only write before it reads never sees an answer on a connection that is closed under it. So what
    # remains of a moderate body is left to the server to throw away, unread by us; an endless one is cut off.
    if length is None or length > _DISCARDED_BODIES * max_bytes:
        request.state.must_close = True
    if length is not None and length > max_bytes:
        raise _too_many_bytes(max_bytes)
    holding.hold(length or 0)


def _not_in_time() -> DeadlinePassed:
    return DeadlinePassed("The body did not arrive within the deadline; look at the network.")


def _media_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _is_raw(media_type: str, headers: Mapping[str, str]) -> bool:
    """Tell whether a body is raw pixels: by its kind, or as bytes of no kind whose pixel format is named."""
    return media_type == RAW_MEDIA_TYPE or (media_type == BYTES_MEDIA_TYPE and RAW_HEADERS["pixel_format"] in headers)


def _layout(media_type: str, headers: Mapping[str, str], limits: FrameLimits) -> RawLayout | None:
    if _is_raw(media_type, headers):
        given = {name: headers[header] for name, header in RAW_HEADERS.items() if header in headers}
        try:
            layout = RawFrameOptions.model_validate_strings(given)
        except ValidationError as error:
            place = str(error.errors()[0]["loc"][0])
            raise ParameterInvalid(f"{RAW_HEADERS[place]}: {sentence_of(error.errors())}") from error
        return RawLayout(layout.pixel_format, layout.width, layout.height, layout.stride)
    if FORMAT_OF_MEDIA_TYPE.get(media_type) not in limits.formats:
        accepted = sorted(name for name, codec in FORMAT_OF_MEDIA_TYPE.items() if codec in limits.formats)
        raise MediaTypeNotAllowed(
            f"Name the frame's kind in Content-Type; accepted are {', '.join(accepted)}, {RAW_MEDIA_TYPE} "
            f"and {MULTIPART_MEDIA_TYPE}."
        )
    return None


def _too_many_bytes(max_bytes: int) -> FrameTooLarge:
    return FrameTooLarge(
        f"The body is over the limit of {max_bytes} bytes; send a smaller or more strongly compressed image."
    )


def _too_many_frames(max_frames: int) -> FrameTooLarge:
    noun = "frame" if max_frames == 1 else "frames"
    return FrameTooLarge(f"A body may hold {max_frames} {noun}; send the others in another request.")
