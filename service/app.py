"""The composition root: the one place where the parts are made and put together.

A life: start listening, load in the background (verify, bring to the device, replay the golden frames), be ready, be
told to stop, be unready, answer what was accepted, end.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from service.auth import Keyring, KeysFileInvalid, MountedKeyring
from service.contract.signature import refuse_unusable
from service.engines.engine import GPU_DEVICES
from service.engines.opening import open_engine
from service.errors import FlawlineError
from service.lines.choices import why_unusable
from service.lines.golden_watch import GoldenWatch
from service.lines.ledger import RegistryOptions
from service.lines.loading import BatcherOptions, OpenEngine
from service.lines.registry import Registry
from service.observability.telemetry import Telemetry
from service.observability.traces import Traces
from service.pipeline import Pipeline
from service.ports.body_budget import BodyBudget
from service.ports.connections import Connections
from service.ports.tls import ServerCertificate
from service.records import Records
from service.routes import admin, documentation, health, inspections, lines, v2
from service.routes.context import Context
from service.routes.identity import Identity
from service.routes.openapi import complete_openapi
from service.routes.problems import install_problems
from service.schemas import ProblemDocument
from service.settings import Settings, SettingsInvalid
from service.shadows import Shadows
from service.stores.directory import DirectoryStore
from service.stores.mirror import Mirror
from service.stores.objects import Location, Objects
from service.stores.store import Store

_WATCH_EVERY_S = 1.0
_RENEW_EVERY_S = 10.0
_TRY_AGAIN_EVERY_S = 5.0

_log = logging.getLogger("flawline")


def create_app(
    settings: Settings,
    *,
    open_engine: OpenEngine | None = None,
    clock: Callable[[], float] = time.monotonic,
    certificate: ServerCertificate | None = None,
    when_lost: Callable[[], None] | None = None,
) -> FastAPI:
    """Put the service together.

    Args:
        settings: of the process.
        open_engine: brings a verified bundle to its device; what the settings say where absent.
        clock: monotonic seconds.
        certificate: that connections are made with, to be renewed and watched; None without TLS.
        when_lost: called once when an engine is lost for good, so that the process can end and be started again.

    Raises:
        KeysFileInvalid: if there is a keys file that can't be used.
        SettingsInvalid: if traces are wanted and their library is not installed, or the state directory can't be used.
        SigningFailed: if signatures are asked for and could not be checked.
        StoreUnreachable: if the store can't even be named to the library that speaks with it.
    """
    if settings.trust is not None:
        refuse_unusable(settings.trust)
    context = _put_together(settings, open_engine, clock)

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        # A thread of its own, and a daemon: loading must not keep the process from ending.
        threading.Thread(target=_load_and_look, args=(context, settings), name="flawline-load", daemon=True).start()
        watching = [asyncio.create_task(_watch(context, when_lost))]
        if settings.golden_every_s:
            golden = GoldenWatch(context.registry, context.telemetry, every_s=settings.golden_every_s, clock=clock)
            watching.append(asyncio.create_task(golden.run()))
        if certificate is not None:
            watching.append(asyncio.create_task(_renew(certificate)))
        yield
        for task in watching:
            task.cancel()
        context.lifecycle.start_draining()
        await context.shadows.finish()
        try:
            async with asyncio.timeout(settings.drain_timeout_s):
                await context.registry.drain()
                await context.after_answers.finish()
                if context.traces is not None:
                    await asyncio.to_thread(context.traces.close)
        except TimeoutError:
            _log.error("draining took too long; the service ends without what is left")
        context.registry.close()
        context.pipeline.close()

    app = _Service(
        title="Flawline",
        version=version("flawline"),
        description="Finds defects nobody has seen before. Only PASS means good: no fault is ever answered with it. "
        "Under `/v2` it speaks the Open Inference Protocol, which has a document of its own.",
        lifespan=life,
        docs_url=None,  # ours needs no other host
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours is in telemetry.py
        redirect_slashes=False,  # a redirect says no verdict, and repeats a host that the caller made up
    )
    if certificate is not None:
        context.telemetry.watch_certificate(certificate.expires_at)
    app.state.context = context
    app.add_middleware(Identity, clock=clock)
    for router in (inspections.router, lines.router, v2.router, health.router, documentation.router):
        app.include_router(router)
    install_problems(app)
    complete_openapi(app, settings)
    return app


class _Service(FastAPI):
    """An application in which a frame's way is short; `state.context` is set before the first request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        line = inspections.line_to_inspect(scope)
        if line is None:
            await super().__call__(scope, receive, send)
        else:
            scope["app"] = self
            await inspections.answer_frame(self.state.context, line, scope, receive, send)


def create_admin_app(app: FastAPI) -> FastAPI:
    """Put the administration of a service together; it is to be served in the same process, on another port.

    Args:
        app: the service, from `create_app`.

    Raises:
        KeysFileInvalid: if no key allows administration, so that nobody could ever use it.
    """
    context: Context = app.state.context
    if context.keyring.is_open or not context.keyring.allows("admin"):
        raise KeysFileInvalid("No key allows the action admin; add one to the keys file, or leave the admin port out.")
    administration = FastAPI(
        title="Flawline administration",
        version=version("flawline"),
        description="Which version, policy and shadow serve. Only with what already lies in the verified store.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    administration.state.context = context
    administration.add_middleware(Identity, clock=context.clock)
    for router in (admin.router, admin.protocol, health.router, documentation.router):
        administration.include_router(router)
    install_problems(administration)
    complete_openapi(administration, context.settings, (ProblemDocument,), may_be_open=False)
    return administration


def create_health_app(app: FastAPI) -> ASGIApp:
    """Return what answers on the health port: plain HTTP, alive and ready, and not a word more.

    Args:
        app: the service, from `create_app`.
    """
    context: Context = app.state.context
    return health.bare_health(context)


def open_port(app: FastAPI, most: int) -> Connections:
    """Return what bounds the connections of one port.

    Args:
        app: the service, from `create_app`.
        most: connections at a time.
    """
    context: Context = app.state.context
    return Connections(
        context.clock,
        most=most,
        most_unread_bytes=context.settings.body_budget_bytes,
        tell=context.telemetry.connection_cut,
    )


def start_draining(app: FastAPI) -> None:
    """Be unready from now on; what was accepted is still answered."""
    app.state.context.lifecycle.start_draining()


def _put_together(settings: Settings, open_engine: OpenEngine | None, clock: Callable[[], float]) -> Context:
    keyring = Keyring(None, clock) if settings.keys_file is None else MountedKeyring(settings.keys_file, clock)
    if keyring.is_open:
        _log.warning("the service is open: without FLAWLINE_KEYS_FILE everybody may inspect and read every line")
    telemetry = Telemetry()
    telemetry.count_lost_lines()
    options = BatcherOptions(
        runners=settings.runners_per_engine,
        max_batch_size=settings.max_batch_size,
        max_queue_size=settings.max_queue_size,
        warm_up_limit_s=settings.warm_up_limit_s,
        stuck_after_s=settings.stuck_after_s,
    )
    store = _store_of(settings)
    if settings.state_directory is not None and (reason := why_unusable(settings.state_directory)) is not None:
        raise SettingsInvalid(f"FLAWLINE_STATE_DIRECTORY: {reason}")
    kept = RegistryOptions(
        activates_newest=settings.activate_newest,
        keeps_previous=settings.keep_previous,
        budget_bytes=settings.engine_budget_bytes,
        pinned=settings.pinned_lines,
        trust=settings.trust,
        state_directory=settings.state_directory,
        weighs_engines=open_engine is None and settings.device not in GPU_DEVICES,
    )
    if kept.budget_bytes is not None:
        _log.info("memory budget of engines", extra={"budget_bytes": kept.budget_bytes})
    opens = open_engine or _open_with(settings)
    registry = Registry(store, settings.lines, opens, options, telemetry, clock, kept)
    pipeline = Pipeline(
        registry,
        limits=settings.frame_limits,
        default_deadline_s=settings.default_deadline_s,
        max_deadline_s=settings.max_deadline_s,
        decode_workers=settings.decode_threads,
        stuck_after_s=settings.stuck_after_s,
        tell_of_replaced=telemetry.decoder_replaced,
        clock=clock,
    )
    records = Records(settings.max_heatmaps_kept, settings.max_heatmap_bytes_kept, telemetry)
    shadows = Shadows(
        registry,
        pipeline,
        telemetry,
        max_kept=settings.max_disagreements_kept,
        patience_s=settings.max_deadline_s,
        clock=clock,
    )
    traces = _trace_to(settings, telemetry)
    bodies = BodyBudget(settings.body_budget_bytes)
    context = Context(settings, keyring, registry, pipeline, records, shadows, telemetry, clock, bodies, traces)
    telemetry.watch_readiness(lambda: not context.reasons_not_ready())
    telemetry.watch_live_versions(lambda: registry.live_in_store)
    if isinstance(keyring, MountedKeyring):
        telemetry.watch_keys(keyring.oldest_made_at, keyring.is_in_force)
    return context


def _trace_to(settings: Settings, telemetry: Telemetry) -> Traces | None:
    if settings.traces_endpoint is None:
        return None
    try:
        from service.observability.collector import open_traces  # noqa: PLC0415 - only who names a collector has its library
    except ModuleNotFoundError as error:
        raise SettingsInvalid("FLAWLINE_TRACES_ENDPOINT needs more: pip install 'flawline[tracing]'.") from error
    return open_traces(settings.traces_endpoint, settings.traces_share, partial(telemetry.record_dropped, "traces"))


def _store_of(settings: Settings) -> Store:
    if settings.store_url is None:
        return DirectoryStore(settings.store_directory)
    location = Location(settings.store_url, settings.store_endpoint, settings.store_region)
    return Mirror(Objects(location), settings.store_directory, settings.max_store_bytes)


def _open_with(settings: Settings) -> OpenEngine:
    return partial(open_engine, options=settings.engine_options)


def _load_and_look(context: Context, settings: Settings) -> None:
    """Load what lies in the store, then look for what is new as often as wanted: the body of a thread.

    Between two looks, what could not be loaded is tried again.
    """
    context.registry.load()
    looks_at = context.clock() + settings.store_poll_s
    while not context.lifecycle.stops_within(min(settings.store_poll_s or _TRY_AGAIN_EVERY_S, _TRY_AGAIN_EVERY_S)):
        try:
            if settings.store_poll_s and context.clock() >= looks_at:
                looks_at = context.clock() + settings.store_poll_s
                _look(context)
            else:
                context.registry.try_again()
        except FlawlineError:
            pass  # logged and counted where it happened; what is live still is
        except Exception:  # noqa: BLE001 - the edge of this thread: looking goes on
            _log.exception("a look at the store ended early")


def _look(context: Context) -> None:
    """Look for what is new; a look that ends early by a fault of its own has missed it as any other, and is counted."""
    try:
        context.registry.rescan()
    except FlawlineError:
        raise
    except Exception:
        context.telemetry.store_unreachable()
        raise


async def _watch(context: Context, when_lost: Callable[[], None] | None) -> None:
    """Close what was replaced, and look for a lost engine or lost decoders: only a new process gets them back."""
    # A slow look is enough here: readiness asks the registry itself and turns false at once.
    while not (context.registry.is_lost or context.pipeline.is_lost):
        context.registry.tend()
        await asyncio.sleep(_WATCH_EVERY_S)
    what = "an engine is lost" if context.registry.is_lost else "decoders are lost"
    _log.error("%s; the process ends and wants to be started again", what)
    if when_lost is not None:
        when_lost()


async def _renew(certificate: ServerCertificate) -> None:
    """Look for a renewed certificate; whoever renews one does so days before the old one ends."""
    while True:
        await asyncio.sleep(_RENEW_EVERY_S)
        try:
            await asyncio.to_thread(certificate.renew)
        except Exception:  # noqa: BLE001 - the edge of this task: a machine without a thread to spare may have one later
            _log.exception("a look for a renewed certificate ended early")
