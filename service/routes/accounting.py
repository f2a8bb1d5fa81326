"""What every way of inspecting shares: frames are counted once, after the answer, and nobody works for the absent."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from service.errors import FlawlineError
from service.inspection import Inspection
from service.routes.context import Context, context_of
from service.routes.problems import request_id_of
from service.telemetry import CALLER_LEFT

TRACE_PARENT_HEADER = "traceparent"

_Result = TypeVar("_Result")


@dataclass
class Asked:
    """How many frames a request asks about; one, until more is known."""

    frames: int = 1


@asynccontextmanager
async def counting(request: Request, line: str) -> AsyncIterator[Asked]:
    """Count whatever ends without a verdict."""
    asked = Asked()
    try:
        yield asked
    except FlawlineError as error:
        count_later(request, line, error.code, asked.frames)
        raise
    except ClientDisconnect:
        count_later(request, line, CALLER_LEFT, asked.frames)
        raise
    except Exception:
        count_later(request, line, FlawlineError.code, asked.frames)
        raise


def count_later(request: Request, line: str, reason: str, frames: int = 1) -> None:
    """Count and log frames without a verdict as soon as the answer has been handed over."""
    context = context_of(request)

    def count() -> None:
        total_s = round(context.clock() - request.state.received_at, 6)
        for _ in range(frames):
            context.telemetry.not_inspected(line, reason, request_id=request_id_of(request), seconds={"total": total_s})
            if context.traces is not None:
                known = context.telemetry.known_line(line)
                context.traces.not_inspected(known, reason, request.headers.get(TRACE_PARENT_HEADER), total_s)

    asyncio.get_running_loop().call_soon(count)


def record_later(context: Context, inspection: Inspection, encode_s: float, total_s: float, *, kept: bool) -> None:
    """Count and log an answered frame once the answer is on its way.

    Args:
        context: the service's parts.
        inspection: the answer.
        encode_s: seconds spent on writing it.
        total_s: seconds from its arrival until it was written.
        kept: whether its heatmap is kept already, or not wanted.
    """
    if kept:
        asyncio.get_running_loop().call_soon(_count, context, inspection, encode_s, total_s)
    else:
        context.after_answers.start(inspection.inspection_id, _record(context, inspection, encode_s, total_s))


async def unless_left(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Wait for work, and cancel it as soon as the caller hangs up.

    Raises:
        ClientDisconnect: if it did.
    """
    working = asyncio.current_task()
    # The body has been read to its end, so the next message can only be the disconnect.
    leaving: asyncio.Future[Any] = asyncio.ensure_future(request.receive())
    has_left = False

    def stop(left: asyncio.Future[Any]) -> None:
        nonlocal has_left
        if not left.cancelled() and working is not None:
            has_left = True
            working.cancel()

    leaving.add_done_callback(stop)
    try:
        return await work
    except asyncio.CancelledError as error:
        if has_left and working is not None and working.uncancel() == 0:
            raise ClientDisconnect from error
        raise
    finally:
        leaving.remove_done_callback(stop)
        leaving.cancel()


async def _record(context: Context, inspection: Inspection, encode_s: float, total_s: float) -> None:
    _count(context, inspection, encode_s, total_s)
    await asyncio.to_thread(context.records.keep, inspection)


def _count(context: Context, inspection: Inspection, encode_s: float, total_s: float) -> None:
    context.telemetry.inspected(inspection, encode_s, total_s)
    if context.traces is not None:
        context.traces.inspected(inspection, encode_s, total_s)
    context.shadows.show(inspection)
