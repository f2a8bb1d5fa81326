"""What is served: lines, the versions in the store, and policies. Reading only; callers see the lines of their key."""

import asyncio
from functools import lru_cache

from fastapi import APIRouter, Request

from service.contract.calibration import Calibration
from service.errors import CalibrationRefused
from service.lines.live import LineStatus, LiveLine
from service.routes.context import caller_of, context_of
from service.routes.problems import responses
from service.schemas import (
    FrameSize,
    InspectedWindow,
    LineAnswer,
    LinesAnswer,
    LineSummary,
    LineThresholds,
    LiveAnswer,
    MetricAnswer,
    PoliciesAnswer,
    PolicyAnswer,
    PolicyRefusedAnswer,
    ThresholdAnswer,
    VersionAnswer,
    Versioned,
    VersionsAnswer,
)

_FAULTS = ("not_authenticated", "not_authorised", "unknown_line", "line_loading")

router = APIRouter(prefix="/v1/lines", tags=["lines"])


@router.get("", responses=responses("not_authenticated", "not_authorised"))
async def lines(request: Request) -> LinesAnswer:
    """List the lines that the caller may know of, and how each one stands."""
    caller = caller_of(request)
    caller.demand("read")
    statuses = context_of(request).registry.statuses()
    return LinesAnswer(lines=[summary_of(status) for status in statuses if caller.may("read", status.line)])


@router.get("/{line}", responses=responses(*_FAULTS))
async def line(request: Request, line: str) -> LineAnswer:
    """Tell how a line stands, why it is not ready, and what serves it."""
    status = _status(request, line)
    # Bounds are found by bisection over long sums, once a threshold.
    live = None if status.live is None else await asyncio.to_thread(_describe, status.live)
    return LineAnswer(line=status.line, state=status.state, reason=status.reason, live=live)


@router.get("/{line}/versions", responses=responses(*_FAULTS))
async def versions(request: Request, line: str) -> VersionsAnswer:
    """List the versions of a line's bundle, oldest first: which one is live, and why others were refused."""
    _status(request, line)
    known = await asyncio.to_thread(context_of(request).registry.versions, line)
    return VersionsAnswer(
        line=line,
        versions=[
            VersionAnswer(version=one.version, live=one.state == "live", state=one.state, reason=one.reason)
            for one in known
        ],
    )


@router.get("/{line}/policies", responses=responses(*_FAULTS))
async def policies(request: Request, line: str) -> PoliciesAnswer:
    """List a line's policies, each complete and with its digest, and why other files of it are refused."""
    live = _status(request, line).live
    listed = [] if live is None else sorted(live.policies.items())
    return PoliciesAnswer(
        line=line,
        network=None if live is None else live.bundle.manifest.network,
        policies=[
            PolicyAnswer(
                version=version,
                digest=policy.digest,
                default=live is not None and version == live.default_policy,
                policy=policy.policy,
            )
            for version, policy in listed
        ],
        refused=[
            PolicyRefusedAnswer(line=line, version=version, reason=refusal.reason)
            for version, refusal in sorted(() if live is None else live.refusals.items())
        ],
    )


def _status(request: Request, line: str) -> LineStatus:
    caller_of(request).demand("read", line)
    return context_of(request).registry.status(line)


def summary_of(status: LineStatus) -> LineSummary:
    """Describe a line in a few words."""
    bundle = None if status.live is None else status.live.bundle
    return LineSummary(
        line=status.line,
        state=status.state,
        reason=status.reason,
        bundle=None if bundle is None else Versioned(version=bundle.manifest.version, digest=bundle.digest),
        detector=None if bundle is None else bundle.manifest.detector,
        device=None if bundle is None else bundle.device,
        precision=None if bundle is None else bundle.precision,
    )


def _describe(live: LiveLine) -> LiveAnswer:
    bundle, manifest = live.bundle, live.bundle.manifest
    policy = live.policies[live.default_policy].policy
    calibration = live.calibration_for(policy)
    top, left, height, width = manifest.input.window(1, 1)
    map_height, map_width = manifest.map_size
    return LiveAnswer(
        bundle=Versioned(version=manifest.version, digest=bundle.digest),
        detector=manifest.detector,
        backbone=None if manifest.backbone is None else manifest.backbone.name,
        device=bundle.device,
        provider=bundle.provider,
        precision=bundle.precision,
        input=FrameSize(height=manifest.input.canvas_height, width=manifest.input.canvas_width),
        tiles=manifest.input.tile_count,
        anomaly_map=FrameSize(height=map_height, width=map_width),
        inspected=InspectedWindow(top=top, left=left, height=height, width=width),
        default_policy=live.default_policy,
        calibration=policy.calibration if live.gives_verdicts else "none",
        policies=sorted(live.policies),
        thresholds=LineThresholds(
            review=_threshold(calibration, policy.review_threshold),
            fail=_threshold(calibration, policy.fail_threshold),
        ),
        metrics={
            name: MetricAnswer(value=metric.value, reason=metric.reason, low=metric.low, high=metric.high)
            for name, metric in manifest.by_line[live.name].metrics.items()
        },
        created_at=manifest.created_at,
    )


@lru_cache(maxsize=256)
def _threshold(calibration: Calibration | None, value: float) -> ThresholdAnswer:
    """Tell what calibration says of a threshold: the rate and bound of the conformal threshold of the same p-value."""
    if calibration is None:
        return ThresholdAnswer(value=value, false_reject_rate=None, false_reject_bound=None, good_parts=0)
    rate = calibration.p_value(value)
    try:
        bound = calibration.threshold(rate).bound
    except CalibrationRefused:  # so low that every good part reaches it; nothing is promised
        return ThresholdAnswer(
            value=value, false_reject_rate=None, false_reject_bound=None, good_parts=calibration.good_parts
        )
    return ThresholdAnswer(
        value=value, false_reject_rate=rate, false_reject_bound=bound, good_parts=calibration.good_parts
    )
