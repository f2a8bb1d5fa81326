"""Shadows: a version that looks at the frames which the live one has answered, and answers nobody.

A frame is shown to a shadow only after its answer was handed over, only where neither engine has anything better to do,
and one frame at a time; whatever can't be shown at once is shed and counted. So a shadow sees a sample of the frames,
and the busier the line, the smaller. It judges by its own policy and its own network, from the bytes that the camera
sent. Where it disagrees with the verdict that was given, both are kept for whoever decides, and logged.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from service.contract.policy import Verdict
from service.errors import FlawlineError, MomentError
from service.inspection import Inspection
from service.lines.live import Found, LiveLine
from service.lines.registry import Registry
from service.observability.telemetry import DisagreementKind, Telemetry
from service.pipeline import Pipeline
from service.scheduling.schedule import Priority

# `stricter` would have stopped a part that went on, or a part for good that was only to be looked at; `laxer` is the
# other way round; `no_verdict` means that the shadow failed on the frame.

_SEVERITY = {Verdict.PASS: 0, Verdict.REVIEW: 1, Verdict.FAIL: 2}

_log = logging.getLogger("flawline")


@dataclass(frozen=True)
class Judged:
    """What one of the two said.

    Attributes:
        bundle_version: of the bundle.
        bundle_digest: of the bundle.
        policy_version: of the policy.
        policy_digest: of the policy.
        verdict: `NO_VERDICT` where it failed.
        score: None where it failed.
        review_threshold: of the policy.
        fail_threshold: of the policy.
    """

    bundle_version: str
    bundle_digest: str
    policy_version: str
    policy_digest: str
    verdict: Verdict
    score: float | None
    review_threshold: float
    fail_threshold: float


@dataclass(frozen=True)
class Disagreement:
    """A frame on which the shadow would have said something else.

    Attributes:
        inspection_id: of the frame's inspection.
        line: of the frame.
        part_id: as the caller named it.
        frame_digest: SHA-256 of the frame's bytes as they came.
        at: when, in ISO 8601.
        kind: how they differ.
        live: what was answered.
        shadow: what would have been.
    """

    inspection_id: str
    line: str
    part_id: str | None
    frame_digest: str
    at: str
    kind: DisagreementKind
    live: Judged
    shadow: Judged


class Shadows:
    """Shows answered frames to shadows; belongs where the event loop runs.

    Args:
        registry: knows which versions look on.
        pipeline: inspects, for shadows as for everybody.
        telemetry: counts.
        max_kept: disagreements, of all lines; the oldest make room and are counted.
        patience_s: how long a shadow may take over a frame.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        registry: Registry,
        pipeline: Pipeline,
        telemetry: Telemetry,
        *,
        max_kept: int,
        patience_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._registry = registry
        self._pipeline = pipeline
        self._telemetry = telemetry
        self._patience_s = patience_s
        self._clock = clock
        self._kept: deque[Disagreement] = deque(maxlen=max_kept)
        self._looking: dict[str, asyncio.Task[None]] = {}

    def show(self, inspection: Inspection) -> None:
        """Show a frame that was answered to the shadow of its line, if there is one and it has the time."""
        pair = self._registry.shadow_of(inspection.line, inspection.bundle_version, inspection.policy_version)
        if pair is None:
            return
        live, shadow = pair
        name = shadow.key.name
        if name in self._looking or not (live.bundle.batcher.has_spare_runner and shadow.bundle.batcher.is_idle):
            self._telemetry.shadow_shed(inspection.line)
            return
        task = asyncio.get_running_loop().create_task(self._look(inspection, shadow))
        self._looking[name] = task
        task.add_done_callback(lambda _: self._looking.pop(name, None))

    def disagreements(self, line: str) -> list[Disagreement]:
        """Return what is kept of a line, the newest first."""
        return [one for one in reversed(self._kept) if one.line == line]

    async def finish(self) -> None:
        """Look at nothing any more."""
        for task in list(self._looking.values()):
            task.cancel()
        await asyncio.gather(*self._looking.values(), return_exceptions=True)

    async def _look(self, inspection: Inspection, shadow: LiveLine) -> None:
        request = replace(
            inspection.request,
            received_at=self._clock(),
            deadline_s=self._patience_s,
            heatmap="none",
            priority=Priority.SHADOW,
        )
        # One whose chosen policy is gone gives no verdicts; its own thresholds are told of, and judge nothing.
        found = Found(shadow, shadow.policies.get(shadow.default_policy) or shadow.policies[shadow.own_policy])
        try:
            if shadow.gives_verdicts:
                judged = _judged(await self._pipeline.inspect_by(found, request))
            else:  # what it would be told as the live one: its thresholds are nobody's
                judged = _no_verdict(found)
        except MomentError:
            self._telemetry.shadow_shed(inspection.line)
            return
        except FlawlineError:
            judged = _no_verdict(found)
        except Exception:  # noqa: BLE001 - the edge of this task: a shadow harms nobody, and its fault is told
            _log.exception("a shadow failed", extra={"line": inspection.line})
            judged = _no_verdict(found)
        self._telemetry.shadow_compared(inspection.line)
        kind = _compare(inspection.judgement.verdict, judged.verdict)
        if kind is not None:
            self._keep(inspection, judged, kind)

    def _keep(self, inspection: Inspection, shadow: Judged, kind: DisagreementKind) -> None:
        self._telemetry.shadow_disagreed(inspection.line, kind)
        if len(self._kept) == self._kept.maxlen:
            self._telemetry.record_dropped("disagreements")
        found = Disagreement(
            inspection_id=inspection.inspection_id,
            line=inspection.line,
            part_id=inspection.request.part_id,
            frame_digest=inspection.frame_digest,
            at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            kind=kind,
            live=_judged(inspection),
            shadow=shadow,
        )
        self._kept.append(found)
        # What is kept ends with the process; whoever decides on a version may be asked later what it was decided on.
        _log.info("a shadow disagrees", extra=asdict(found))


def _compare(live: Verdict, shadow: Verdict) -> DisagreementKind | None:
    if shadow is Verdict.NO_VERDICT:
        return "no_verdict"
    if live is shadow:
        return None
    return "stricter" if _SEVERITY[shadow] > _SEVERITY[live] else "laxer"


def _judged(inspection: Inspection) -> Judged:
    return Judged(
        bundle_version=inspection.bundle_version,
        bundle_digest=inspection.bundle_digest,
        policy_version=inspection.policy_version,
        policy_digest=inspection.policy_digest,
        verdict=inspection.judgement.verdict,
        score=inspection.judgement.score,
        review_threshold=inspection.review_threshold,
        fail_threshold=inspection.fail_threshold,
    )


def _no_verdict(found: Found) -> Judged:
    policy = found.policy.policy
    bundle = found.line.bundle
    return Judged(
        bundle_version=bundle.manifest.version,
        bundle_digest=bundle.digest,
        policy_version=policy.version,
        policy_digest=found.policy.digest,
        verdict=Verdict.NO_VERDICT,
        score=None,
        review_threshold=policy.review_threshold,
        fail_threshold=policy.fail_threshold,
    )
