"""What every way of inspecting shares: frames are counted once, after the answer, and nobody works for the absent."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from service.errors import DeadlinePassed, FlawlineError
from service.inspection import Inspection
from service.lines.live import Found
from service.observability.telemetry import CALLER_LEFT
from service.pipeline import TellDigest
from service.routes.context import Context, connection_of, context_of
from service.routes.identity import received_at_of
from service.routes.part_names import names_of
from service.routes.problems import PartNames, note_part, request_id_of

TRACE_PARENT_HEADER = "traceparent"

_Result = TypeVar("_Result")


class Counting:
    """Counts whatever ends without a verdict inside a `with` block.

    Args:
        request: that is being answered.
        line: as it was asked for.

    Attributes:
        parts: names of what each frame shows; None until it is known which frames there are: then it counts as one, of
            the part that the request itself names.
        found: what was to judge them; None until it was found.
    """

    def __init__(self, request: Request, line: str) -> None:
        self._request = request
        self._line = line
        self.parts: Sequence[PartNames] | None = None
        self.found: Found | None = None
        self._digests: dict[int, str] = {}

    def noting_digest(self, index: int = 0) -> TellDigest:
        """Return what notes the digest of a frame, by its place in the request."""
        return partial(self._digests.__setitem__, index)

    def part(self, index: int) -> PartNames:
        """Return the names of what a frame shows, by its place in the request."""
        return names_of(self._request) if self.parts is None else self.parts[index]

    def known_of(self, index: int) -> dict[str, str | int]:
        """Return what the log is to have of a frame without a verdict: its part, what was to judge it, its digest."""
        judge = {} if self.found is None else self.found.named()
        digest = {"frame_digest": self._digests[index]} if index in self._digests else {}
        return {**self.part(index), **judge, **digest}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        if not isinstance(fault, Exception):
            return
        code = fault.code if isinstance(fault, FlawlineError) else FlawlineError.code
        reason = CALLER_LEFT if isinstance(fault, ClientDisconnect) else code
        named = names_of(self._request)
        note_part(self._request, named)
        if self.parts is None:
            self.parts = [named]
        frames = [self.known_of(index) for index in range(len(self.parts))]
        count_later(self._request, self._line, reason, frames)


def count_later(request: Request, line: str, reason: str, frames: Sequence[Mapping[str, str | int]]) -> None:
    """Count and log frames without a verdict, with what is known of each, once the answer is handed over."""
    context, now = context_of(request), time.time()
    total_s, request_id = round(context.clock() - received_at_of(request), 6), request_id_of(request)

    def count() -> None:
        for frame in frames:
            context.telemetry.not_inspected(
                line, reason, now, request_id=request_id, seconds={"total": total_s}, **frame
            )

    context.after_answers.later(count)
    if context.traces is not None:
        known, caller = context.telemetry.known_line(line), request.headers.get(TRACE_PARENT_HEADER)
        for _ in frames:
            asyncio.get_running_loop().call_soon(context.traces.not_inspected, known, reason, caller, total_s)


def record_later(context: Context, inspection: Inspection, encode_s: float, total_s: float, *, kept: bool) -> None:
    """Count and log an answered frame once the answer is on its way.

    Args:
        context: the service's parts.
        inspection: the answer.
        encode_s: seconds spent on writing it.
        total_s: seconds from its arrival until it was written.
        kept: whether its heatmap is kept already, or not wanted.
    """
    now = time.time()
    context.after_answers.later(lambda: context.telemetry.inspected(inspection, encode_s, total_s, now))
    if kept:
        asyncio.get_running_loop().call_soon(_show, context, inspection, encode_s, total_s)
    else:
        context.after_answers.start(inspection.inspection_id, _record(context, inspection, encode_s, total_s))


@asynccontextmanager
async def in_time(context: Context, deadline: float, what: str) -> AsyncIterator[None]:
    """Wait for what is done inside a `with` block until a deadline.

    Args:
        context: the service's parts.
        deadline: by the service's clock.
        what: has to be done by then, for the sentence.

    Raises:
        DeadlinePassed: at the deadline.
    """
    try:
        async with asyncio.timeout(deadline - context.clock()):
            yield
    except TimeoutError as error:
        raise DeadlinePassed(f"The deadline passed before {what}; the part has no verdict.") from error


async def unless_left(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Wait for work, and cancel it as soon as the caller hangs up, where the server tells (`service/protocol.py`).

    Raises:
        ClientDisconnect: if it did.
    """
    working = asyncio.current_task()
    has_left = False

    def stop() -> None:
        nonlocal has_left
        if working is not None:
            has_left = True
            working.cancel()

    connection = connection_of(request.scope)
    if connection is None:
        return await work
    if connection.watch(stop):
        work.close()
        raise ClientDisconnect
    try:
        return await work
    except asyncio.CancelledError as error:
        if has_left and working is not None and working.uncancel() == 0:
            raise ClientDisconnect from error
        raise
    finally:
        connection.watch(None)


async def _record(context: Context, inspection: Inspection, encode_s: float, total_s: float) -> None:
    _show(context, inspection, encode_s, total_s)
    await asyncio.to_thread(context.records.keep, inspection)


def _show(context: Context, inspection: Inspection, encode_s: float, total_s: float) -> None:
    if context.traces is not None:
        context.traces.inspected(inspection, encode_s, total_s)
    context.shadows.show(inspection)
