"""Alive and ready are different questions, and a scraper asks a third.

Live: the event loop answers; a full queue never fails it. Ready: lines are loaded, or wait for their next frame after
they made room for others, their golden frames came out right, their engines are healthy and the service is not
draining. Whether the store can be read is no part of it, once everything was loaded.

Where callers must show a certificate, an orchestrator's probes have none to show. They then ask the health port, which
speaks plain HTTP and says alive and ready in a word: no line, no reason, no metric.
"""

import asyncio

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.routing import Route

from service.routes.context import Context, caller_of, context_of
from service.routes.problems import responses

router = APIRouter(tags=["health"])


@router.get("/healthz/live")
async def live() -> dict[str, str]:
    """Say that the process answers."""
    return {"status": "live"}


@router.get("/healthz/ready", response_class=Response, responses={503: {"description": "Not ready, with the reasons."}})
async def ready(request: Request) -> Response:
    """Say whether the lines of the store are served here, and if not, why."""
    context = context_of(request)
    reasons = context.reasons_not_ready()
    body = {"status": "not ready", "reasons": reasons} if reasons else {"status": "ready"}
    return Response(to_json(body), 503 if reasons else 200, media_type="application/json")


@router.get("/metrics", response_class=Response, responses=responses("not_authenticated", "not_authorised"))
async def metrics(request: Request) -> Response:
    """Return all metrics in the format of Prometheus, or of OpenMetrics where that is asked for."""
    caller_of(request).demand("metrics")
    context_of(request).after_answers.settle()
    taken = context_of(request).telemetry.snapshot()
    # Of forty lines it is half a megabyte: frames that come meanwhile do not wait for all of it.
    body, content_type = await asyncio.to_thread(taken.exposition, request.headers.get("accept", ""))
    return Response(body, media_type=content_type)


def bare_health(context: Context) -> Starlette:
    """Return the application of the health port."""

    async def bare_live(_request: Request) -> Response:
        return Response(to_json({"status": "live"}), media_type="application/json")

    async def bare_ready(_request: Request) -> Response:
        is_ready = not context.reasons_not_ready()
        status = to_json({"status": "ready" if is_ready else "not ready"})
        return Response(status, 200 if is_ready else 503, media_type="application/json")

    return Starlette(routes=[Route("/healthz/live", bare_live), Route("/healthz/ready", bare_ready)])
