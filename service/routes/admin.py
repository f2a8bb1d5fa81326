"""Administration: which version, policy and shadow serve. On a port of its own, and only with what lies in the store.

Nothing is uploaded here and no path is taken: a caller names a bundle, a version or a line, and what is named is
verified and proved like everything else. Every change, and every attempt at one, is a line of the log `flawline.audit`
with the name of the key. A key covers a bundle where it covers every line of it.

`/v2/repository` is the same for clients of the Open Inference Protocol; there a model is a line.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, ValidationError

from service.auth import Caller
from service.errors import BundleRefused, FlawlineError, NotAuthorised, ParameterInvalid, VersionRefused
from service.lines.live import LineStatus
from service.lines.registry import Registry
from service.routes.bodies import receive_small_body
from service.routes.context import caller_of, context_of, make_change
from service.routes.lines import summary_of
from service.routes.problems import request_id_of, responses
from service.routes.v2 import index_of
from service.schemas import (
    AdminLineAnswer,
    AdminLinesAnswer,
    AdminVersionAnswer,
    BundleAnswer,
    BundlesAnswer,
    ChangedBundleAnswer,
    ChangedLineAnswer,
    DisagreementAnswer,
    DisagreementsAnswer,
    JudgedAnswer,
    Name,
    PolicyRefusedAnswer,
    RefusedAnswer,
    RescanAnswer,
    Version,
    VersionOf,
)

router = APIRouter(tags=["administration"])
protocol = APIRouter(prefix="/v2/repository", include_in_schema=False)

_NO_KEY = ("not_authenticated", "not_authorised")
_CHANGE = (*_NO_KEY, "version_refused", "engine_failed", "store_unreachable", "internal")

_audit = logging.getLogger("flawline.audit")


@router.get("/v1/lines", responses=responses(*_NO_KEY))
async def lines(request: Request) -> AdminLinesAnswer:
    """List the lines that the key covers, and what serves each of them."""
    caller, registry = _administrator(request), context_of(request).registry
    covered = [status for status in registry.statuses() if caller.may("admin", status.line)]
    return AdminLinesAnswer(lines=[_describe_line(status) for status in covered], **_remembered(registry))


@router.get("/v1/bundles", responses=responses(*_NO_KEY))
async def bundles(request: Request) -> BundlesAnswer:
    """List the bundles that the key covers, with every version that is loaded or lies in the store."""
    caller, registry = _administrator(request), context_of(request).registry
    names = [name for name in registry.names() if _covers(caller, registry.lines_of(name))]
    return BundlesAnswer(bundles=await asyncio.to_thread(lambda: [_describe(registry, name) for name in names]))


@router.get("/v1/bundles/{bundle}", responses=responses(*_NO_KEY, "unknown_bundle"))
async def bundle(request: Request, bundle: str) -> BundleAnswer:
    """Tell how the versions of a bundle stand."""
    registry = _registry_for(request, bundle)
    return await asyncio.to_thread(_describe, registry, bundle)


@router.post("/v1/bundles/{bundle}/activate", responses=responses(*_CHANGE, "unknown_bundle", "unknown_version"))
async def activate(request: Request, bundle: str, version: Annotated[Version, Query()]) -> ChangedBundleAnswer:
    """Load, verify and prove a version beside the live one, and make it live; what is refused changes nothing.

    Newer versions in the store no longer become live by themselves, until a still newer one comes.
    """
    registry = _registry_for(request, bundle)
    async with _audited(request, "activate", bundle=bundle, version=version):
        await make_change(registry.activate, bundle, version)
    return await asyncio.to_thread(_describe_changed, registry, bundle)


@router.post("/v1/bundles/{bundle}/roll-back", responses=responses(*_CHANGE, "unknown_bundle", "unknown_version"))
async def roll_back(request: Request, bundle: str) -> ChangedBundleAnswer:
    """Make the version live that was live before; the one that is left is held back until it is activated by name.

    Where the answer says that this is not remembered, take the version out of the store as well.
    """
    registry = _registry_for(request, bundle)
    async with _audited(request, "roll_back", bundle=bundle) as noted:
        noted["version"] = await make_change(registry.roll_back, bundle)
    return await asyncio.to_thread(_describe_changed, registry, bundle)


@router.put(
    "/v1/bundles/{bundle}/shadow",
    responses=responses(*_CHANGE, "unknown_bundle", "unknown_version", "line_not_calibrated"),
)
async def start_shadow(request: Request, bundle: str, version: Annotated[Version, Query()]) -> BundleAnswer:
    """Let a version look at the frames that the live one answers; it is shed first, and answers nobody.

    A line for which it is not calibrated is compared as one that gets no verdict, as it would be if it were live.
    It ends with the process at the latest.
    """
    registry = _registry_for(request, bundle)
    async with _audited(request, "start_shadow", bundle=bundle, version=version):
        await make_change(registry.start_shadow, bundle, version)
    return await asyncio.to_thread(_describe, registry, bundle)


@router.delete("/v1/bundles/{bundle}/shadow", responses=responses(*_NO_KEY, "unknown_bundle"))
async def stop_shadow(request: Request, bundle: str) -> BundleAnswer:
    """Let no version look on any more."""
    registry = _registry_for(request, bundle)
    async with _audited(request, "stop_shadow", bundle=bundle):
        await make_change(registry.stop_shadow, bundle)
    return await asyncio.to_thread(_describe, registry, bundle)


@router.get("/v1/lines/{line}/disagreements", responses=responses(*_NO_KEY, "unknown_line", "line_loading"))
async def disagreements(request: Request, line: str) -> DisagreementsAnswer:
    """List the last frames on which the shadow would have said something else, the newest first."""
    _administrator(request, line)
    context = context_of(request)
    context.registry.status(line)
    return DisagreementsAnswer(
        line=line,
        disagreements=[
            DisagreementAnswer(
                inspection_id=one.inspection_id,
                part_id=one.part_id,
                frame_digest=one.frame_digest,
                at=one.at,
                kind=one.kind,
                live=JudgedAnswer(**vars(one.live)),
                shadow=JudgedAnswer(**vars(one.shadow)),
            )
            for one in context.shadows.disagreements(line)
        ],
    )


@router.post(
    "/v1/lines/{line}/policy",
    responses=responses(
        *(*_NO_KEY, "version_refused", "unknown_line", "unknown_policy"),
        *("line_not_ready", "line_loading", "line_not_calibrated"),
    ),
)
async def activate_policy(request: Request, line: str, version: Annotated[Name, Query()]) -> ChangedLineAnswer:
    """Judge a line by another of its policies where the caller names none, while this bundle version is live."""
    _administrator(request, line)
    registry = context_of(request).registry
    async with _audited(request, "activate_policy", line=line, policy=version):
        await make_change(registry.activate_policy, line, version)
    return _changed(registry, line)


@router.post("/v1/lines/{line}/load", responses=responses(*_CHANGE, "unknown_line", "unknown_version"))
async def load(request: Request, line: str) -> ChangedLineAnswer:
    """Serve a line that is not, or take the newest version of its bundle that is not held back."""
    return _changed(await _load(request, line), line)


@router.post(
    "/v1/lines/{line}/unload", responses=responses(*_NO_KEY, "version_refused", "unknown_line", "line_loading")
)
async def unload(request: Request, line: str) -> ChangedLineAnswer:
    """Serve a line no longer, until it is loaded again; its engine goes with the last line that uses it."""
    return _changed(await _unload(request, line), line)


@router.post("/v1/rescan", responses=responses(*_NO_KEY, "version_refused", "store_unreachable", "internal"))
async def rescan(request: Request) -> RescanAnswer:
    """Ask the store for new versions and policies now; needs a key that covers every line.

    A policy whose file is gone is withdrawn, and a line that it was chosen to judge is refused. A file that was changed
    under the same name is refused, and the policy stays as it was first read. A version that is gone is let go of, but
    where it is live: that one serves on, and is told.
    """
    caller, registry = _administrator(request), context_of(request).registry
    if not caller.covers_every_line:
        raise NotAuthorised("A rescan may change any line; ask for a key that covers all of them.")
    async with _audited(request, "rescan") as noted:
        found = await make_change(registry.rescan)
        noted |= {"activated": len(found.activated), "refused": len(found.refused), "policies": len(found.policies)}
        noted |= {"withdrawn": len(found.withdrawn), "refused_policies": len(found.refused_policies)}
        noted["gone"] = len(found.gone)
    return RescanAnswer(
        activated=[VersionOf(bundle=name, version=version) for name, version in found.activated],
        refused=[
            RefusedAnswer(bundle=name, version=version, reason=reason)
            for (name, version), reason in found.refused.items()
        ],
        policies=[f"{line}/{version}" for line, version in found.policies],
        withdrawn=[f"{line}/{version}" for line, version in found.withdrawn],
        refused_policies=[
            PolicyRefusedAnswer(line=line, version=version, reason=reason)
            for (line, version), reason in found.refused_policies.items()
        ],
        gone=[
            RefusedAnswer(bundle=name, version=version, reason=reason) for (name, version), reason in found.gone.items()
        ],
    )


@protocol.post("/index")
async def repository_index(request: Request) -> list[dict[str, str]]:
    """List the models that the key covers, every version."""
    caller = _administrator(request)
    return await index_of(request, lambda line: caller.may("admin", line))


@protocol.post("/models/{model}/load")
async def load_model(request: Request, model: str) -> None:
    """Load a line's bundle from the store; a model is never taken from the request."""
    _administrator(request, model)
    asked = await _parameters(request)
    if asked:
        raise ParameterInvalid(
            "Models are loaded as they lie in the store; send no parameters, configuration or files."
        )
    await _load(request, model)


@protocol.post("/models/{model}/unload")
async def unload_model(request: Request, model: str) -> None:
    """Unload a line."""
    await _unload(request, model)


class _LoadRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")

    parameters: dict[str, Any] = {}


async def _parameters(request: Request) -> dict[str, Any]:
    body = await receive_small_body(request)
    try:
        return _LoadRequest.model_validate_json(body or b"{}").parameters
    except ValidationError as error:
        raise ParameterInvalid("The body must be a JSON object.") from error


async def _load(request: Request, line: str) -> Registry:
    _administrator(request, line)
    registry = context_of(request).registry
    async with _audited(request, "load", line=line):
        await make_change(registry.load_line, line)
    return registry


async def _unload(request: Request, line: str) -> Registry:
    _administrator(request, line)
    registry = context_of(request).registry
    async with _audited(request, "unload", line=line):
        await make_change(registry.unload_line, line)
    return registry


def _administrator(request: Request, line: str | None = None) -> Caller:
    """Return who is calling.

    Raises:
        NotAuthenticated: if no known key was shown.
        NotAuthorised: if the key does not allow administration, or not of this line.
    """
    caller = caller_of(request)
    caller.demand("admin", line)
    return caller


def _registry_for(request: Request, bundle: str) -> Registry:
    """Return the registry, to somebody who may change a bundle.

    Raises:
        UnknownBundle: if there is none of this name.
        NotAuthorised: if the key does not cover every line of it.
    """
    caller, registry = _administrator(request), context_of(request).registry
    if not _covers(caller, registry.lines_of(bundle)):
        raise NotAuthorised("This key does not cover every line of this bundle; ask for one that does.")
    return registry


def _covers(caller: Caller, lines: tuple[str, ...]) -> bool:
    return all(caller.may("admin", line) for line in lines)


@asynccontextmanager
async def _audited(request: Request, action: str, **about: str) -> AsyncIterator[dict[str, Any]]:
    """Log who wanted what and what became of it, and say in the caller's terms why a version was refused."""
    noted: dict[str, Any] = {
        "by": caller_of(request).name,
        "request_id": request_id_of(request),
        "action": action,
        **about,
    }
    try:
        yield noted
    except BundleRefused as error:
        _audit.warning("administration", extra={**noted, "outcome": VersionRefused.code})
        raise VersionRefused(f"{error.sentence} What was live still is.") from error
    except FlawlineError as error:
        _audit.warning("administration", extra={**noted, "outcome": error.code})
        raise
    except BaseException:
        _audit.warning("administration", extra={**noted, "outcome": FlawlineError.code})
        raise
    _audit.info("administration", extra={**noted, "outcome": "done"})


def _describe_line(status: LineStatus) -> AdminLineAnswer:
    live = status.live
    return AdminLineAnswer(
        line=status.line,
        state=status.state,
        reason=status.reason,
        bundle=status.bundle,
        version=None if live is None else live.bundle.manifest.version,
        policy=None if live is None else live.default_policy,
        policies=[] if live is None else sorted(live.policies),
        device=None if live is None else live.bundle.device,
        precision=None if live is None else live.bundle.precision,
    )


def _changed(registry: Registry, line: str) -> ChangedLineAnswer:
    return ChangedLineAnswer(**vars(summary_of(registry.status(line))), **_remembered(registry))


def _describe_changed(registry: Registry, name: str) -> ChangedBundleAnswer:
    return ChangedBundleAnswer(**vars(_describe(registry, name)), **_remembered(registry))


def _remembered(registry: Registry) -> dict[str, Any]:
    why = registry.why_forgotten
    return {"remembered": why is None, "why_forgotten": why}


def _describe(registry: Registry, name: str) -> BundleAnswer:
    return BundleAnswer(
        bundle=name,
        lines=list(registry.lines_of(name)),
        versions=[
            AdminVersionAnswer(
                version=one.version,
                state=one.state,
                reason=one.reason,
                held_back=one.is_held_back,
                lines=list(one.lines),
                size_bytes=one.size_bytes,
            )
            for one in registry.versions_of(name)
        ],
    )
