"""Metrics and the one log line an inspection: the only importer of `prometheus_client`.

Nothing here is called before the answer is on its way, except the engines' gauges. Labels come from closed sets: the
registry declares its lines and engines, reasons are the codes of `service.errors`, a name that nobody declared is
counted as `unknown`, and another reason as `other`. Of a line's versions the last few have series.

What every frame moves is counted in plain numbers, which the event loop alone changes, and becomes series when somebody
scrapes: the library's own counters and histograms take a lock and look for bounds and labels at each of the ten steps.
"""

import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Final, Literal, NamedTuple, get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from service.contract.calibration import Calibration
from service.contract.policy import Policy, Verdict
from service.errors import CallerError, DeadlinePassed, Overloaded, known_codes
from service.inspection import Inspection
from service.observability.drift import LineDrift, ScoreDrift, measure_quality
from service.observability.log import InspectionRecord, LineWriter
from service.observability.tallies import Tally
from service.ports.connections import Cut

Discarded = Literal["caller_left", "late", "request_failed"]
Sink = Literal["heatmaps", "disagreements", "traces", "log"]

GoldenOutcome = Literal["passed", "failed", "skipped", "ended_early"]
DisagreementKind = Literal["stricter", "laxer", "no_verdict"]

UNKNOWN_LINE = "unknown"
OTHER_REASON = "other"
CALLER_LEFT: Final = "caller_left"
# Of frames that are answered together: another one of the request has no verdict, and so this one gets none.
REQUEST_FAILED: Final = "request_failed"
_REASONS = known_codes() | {CALLER_LEFT}
# What alerts and promises ask for by name. A series that is born with its first losses shows no rise, so nobody would
# be told of them: whatever is not the caller's to blame is there at 0 before, a dozen series a line.
_WATCHED_REASONS = sorted(known_codes() - known_codes(CallerError) | {OTHER_REASON})
# Of one line; what served before these is forgotten, or every rollout would leave series behind for ever.
_VERSIONS_KEPT = 8
# Frames that found no time: those that come through beside them would look all the quicker.
_OUT_OF_TIME = {DeadlinePassed.code, Overloaded.code}

_STAGE_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_STAGES = ("receive", "decode", "queue", "infer", "postprocess", "encode", "total")
_SLACK_BUCKETS_S = (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
_SCORE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5)
_SMALLEST_THRESHOLD = 1e-6
# A picture is measured in a millisecond, so only some are: each line at most once a second, and so many in all.
_MEASURED_EVERY_S = 1.0
_MEASURED_A_SECOND = 4
# Of the middle of a picture, to make it a quarter of that.
_MEASURED_SIDE = 128
_SMALLEST_SIDE = 3

_log = logging.getLogger("flawline.inspections")


class Buckets:
    """One series of a histogram: how many values lie below each bound, and an example of each.

    Args:
        bounds: upper ones, in order; a last one without end is added.
    """

    __slots__ = ("_bounds", "_counts", "_examples", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._examples: list[tuple[str, float, float] | None] = [None] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, inspection_id: str | None = None) -> None:
        """Count a value; the inspection that it is of becomes the example of its bucket."""
        bucket = bisect_left(self._bounds, value)
        self._counts[bucket] += 1
        self._sum += value
        if inspection_id is not None:
            self._examples[bucket] = inspection_id, value, time.time()

    def tell(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Add this series to what is scraped."""
        ends = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = [
            (end, count) if shown is None else (end, count, Exemplar({"inspection_id": shown[0]}, shown[1], shown[2]))
            for end, count, shown in zip(ends, accumulate(self._counts), self._examples, strict=True)
        ]
        family.add_metric(labels, buckets, self._sum)


class _Children(dict[tuple[str, str], Counter]):
    """Series of one metric by their labels, each looked for once: refusals come by the hundreds a second."""

    def __init__(self, metric: Counter) -> None:
        super().__init__()
        self._metric = metric

    def __missing__(self, labels: tuple[str, str]) -> Counter:
        self[labels] = self._metric.labels(*labels)
        return self[labels]


class Depth:
    """How many frames wait at an engine, over all versions of its bundle that are loaded."""

    def __init__(self) -> None:
        self.frames = 0


class EngineMeter:
    """The gauges of one engine, with their labels already resolved, because the batcher calls them for every batch."""

    def __init__(
        self, batch_size: Buckets, waiting: Depth, discarded: Mapping[Discarded, Counter], replaced: Counter
    ) -> None:
        self._batch_size = batch_size
        self._waiting = waiting
        self._depth = 0
        self._discarded = discarded
        self._replaced = replaced

    def batch(self, size: int) -> None:
        """Count one run of so many network inputs."""
        self._batch_size.observe(size)

    def depth(self, frames: int) -> None:
        """Say how many frames are accepted and not answered yet."""
        self._waiting.frames += frames - self._depth  # versions of one bundle, one beside the other, add up
        self._depth = frames

    def discard(self, why: Discarded) -> None:
        """Count a frame that nobody waits for any more: dropped before its run, or its result after it."""
        self._discarded[why].inc()

    def decoder_replaced(self) -> None:
        """Count a thread that was given up, since the frame that it decoded kept it too long."""
        self._replaced.inc()


class _Series:
    """What every answered frame of one version of a line adds to, in plain numbers."""

    __slots__ = ("score", "slack", "stages", "tally", "verdicts")

    def __init__(self, of_line: "_LineSeries", tally: Tally) -> None:
        self.verdicts: dict[str, int] = {}
        self.score = Buckets(_SCORE_BUCKETS)
        self.stages = of_line.stages
        self.slack = of_line.slack
        self.tally = tally


class _LineSeries(NamedTuple):
    """What every answered frame of a line adds to, whichever version judges, and some that found no time."""

    stages: dict[str, Buckets]
    slack: Buckets


class _FrameSeries(Collector):
    """Tells a scraper what frames have moved."""

    def __init__(self) -> None:
        self.by_version: dict[tuple[str, str], _Series] = {}
        self.by_line: dict[str, _LineSeries] = {}
        self.batch_sizes: dict[str, Buckets] = {}

    def collect(self) -> Iterable[Metric]:
        """Return every family, also those that have no series yet."""
        inspections = CounterMetricFamily(
            "flawline_inspections", "Answered frames.", labels=("line", "version", "verdict")
        )
        scores = _family("score", "Scores in units of the fail threshold: 1 is at the threshold.", "line", "version")
        for (line, version), series in [*self.by_version.items()]:
            for verdict, count in [*series.verdicts.items()]:
                inspections.add_metric((line, version, verdict), count)
            series.score.tell(scores, (line, version))
        stages = _family(
            "stage_duration_seconds",
            "Time by stage of answered frames; total is also of those whose deadline passed, not of refused ones.",
            "line",
            "stage",
        )
        slack = _family(
            "deadline_slack_seconds",
            "Time left to the deadline at the answer; 0 where it passed, or was refused for want of time or room.",
            "line",
        )
        for line, of_line in [*self.by_line.items()]:
            for stage, spent in [*of_line.stages.items()]:
                spent.tell(stages, (line, stage))
            of_line.slack.tell(slack, (line,))
        sizes = _family("batch_size", "Network inputs in one run; a tiled frame is its tiles.", "engine")
        for engine, batches in [*self.batch_sizes.items()]:
            batches.tell(sizes, (engine,))
        return inspections, scores, stages, slack, sizes


class _DriftSeries(Collector):
    """Tells a scraper how far lines have moved; of a figure that there is not yet, there is no series."""

    def __init__(self) -> None:
        self.by_line: dict[str, LineDrift] = {}

    def collect(self) -> Iterable[Metric]:
        """Return every family, also those that have no series yet."""
        index = GaugeMetricFamily(
            "flawline_score_psi",
            "Stability index of the last scores against calibration; above 0.25 is another line, none: can't compare.",
            labels=("line",),
        )
        review = GaugeMetricFamily(
            "flawline_review_ratio", "Share of the last frames that were not PASS.", labels=("line",)
        )
        quality = GaugeMetricFamily(
            "flawline_image_quality",
            "Mean over the last measured pictures, as the network takes them.",
            labels=("line", "stat"),
        )
        for line, drift in [*self.by_line.items()]:
            _tell(index, (line,), None if drift.scores is None else drift.scores.index())
            _tell(review, (line,), drift.review.mean())
            for name, mean in [*drift.quality.items()]:
                _tell(quality, (line, name), mean.mean())
        return index, review, quality


class _InStoreSeries(Collector):
    """Tells a scraper whether what judges lies in the store.

    Args:
        in_store: says it, by bundle whose lines are served.
    """

    def __init__(self, in_store: Callable[[], Mapping[str, bool]]) -> None:
        self._in_store = in_store

    def collect(self) -> Iterable[Metric]:
        """Return the family, also where nothing serves yet."""
        family = GaugeMetricFamily(
            "flawline_live_version_in_store",
            "1 while the version that judges lies in the store, as its last look found; 0 where it was removed there.",
            labels=("engine",),
        )
        for engine, is_there in self._in_store().items():
            family.add_metric((engine,), float(is_there))
        return (family,)


def _tell(family: GaugeMetricFamily, labels: Sequence[str], value: float | None) -> None:
    if value is not None:
        family.add_metric(labels, value)


def _family(name: str, meaning: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"flawline_{name}", meaning, labels=labels)


class Snapshot(Collector):
    """What every metric said at one moment, to be written down by any thread: that takes twice as long as asking.

    Args:
        families: as collected.
    """

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return every family."""
        return self._families

    def exposition(self, accepted: str = "") -> tuple[bytes, str]:
        """Return what a scraper reads, and its content type.

        Args:
            accepted: the scraper's `Accept` header; only OpenMetrics carries exemplars.
        """
        # Not the library's own negotiation: it takes the version from the caller, and fails on one that is none.
        if "application/openmetrics-text" in accepted:
            body: bytes = openmetrics.generate_latest(self)  # type: ignore[no-untyped-call]  # has no types
            return body, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self), CONTENT_TYPE_LATEST


class Telemetry:
    """Every metric of the process, on a registry of its own.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # A `_created` series beside every counter and histogram doubles what is scraped, and no dashboard reads it.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library ships this function without types
        self._collectors = CollectorRegistry()
        ProcessCollector(registry=self._collectors)
        self._frames = _FrameSeries()
        self._collectors.register(self._frames)
        self._drifts = _DriftSeries()
        self._collectors.register(self._drifts)
        self._no_verdict = self._counter(
            "no_verdict",
            "Frames without a verdict, by error code or caller_left; of frames sent ahead those that were received, "
            "not what lay in the kernel.",
            "line",
            "reason",
        )
        self._queue_depth = self._gauge("queue_depth", "Frames accepted and not answered yet.", "engine")
        self._discarded = self._counter(
            "discarded",
            "Frames that nobody waited for any more: their caller left, they were late, or their request has failed.",
            "engine",
            "reason",
        )
        self._replaced_decoders = self._counter(
            "decoders_replaced", "Threads that were given up, since the frame that they decoded kept them too long."
        )
        self._engine_load = self._gauge(
            "engine_load_seconds", "From reading the bundle to its golden frames passed.", "engine"
        )
        self._engine_info = self._gauge(
            "engine_info", "A loaded engine; always 1.", "engine", "version", "device", "provider", "precision"
        )
        self._engine_bytes = self._gauge(
            "engine_memory_bytes", "What a loaded engine takes, as the budget counts it.", "engine", "version"
        )
        self._budget = self._gauge("engine_memory_budget_bytes", "Memory of all engines together; 0 is no limit.")
        self._model_info = self._gauge(
            "model_info", "What serves a line; always 1.", "line", "version", "digest", "policy", "device"
        )
        self._ready = self._gauge(
            "ready", "1 while the store's lines are served here, else 0; what /healthz/ready says."
        )
        self._refused_versions = self._counter(
            "versions_refused", "Versions of bundles that were not taken into use; a live one goes on.", "engine"
        )
        self._refused_policies = self._counter(
            "policies_refused", "Policy files that are not taken as they lie in the store; others go on.", "line"
        )
        self._unloads = self._counter("engine_unloads", "Engines unloaded to make room for others.", "engine")
        self._store_unreachable = self._counter("store_unreachable", "Times that the store could not be asked.")
        # Looks may be a day apart, and misses are counted as seldom: what the last one found is true until the next.
        self._store_reachable = self._gauge(
            "store_reachable", "1 where the last look at the store succeeded; 0 where it failed, or none ended yet."
        )
        self._golden_checks = self._counter("golden_checks", "Replays of golden frames on live engines.", "outcome")
        for outcome in get_args(GoldenOutcome):
            self._golden_checks.labels(outcome)
        self._golden_failures = self._counter("golden_failures", "Bundles whose golden frames came out differently.")
        self._dropped = self._counter(
            "records_dropped", "Records that made room for newer ones, or that nobody took.", "sink"
        )
        for sink in get_args(Sink):
            self._dropped.labels(sink)
        self._cut = self._counter(
            "connections_cut",
            "Connections that were cut off or turned away, for want of room or for being slow.",
            "reason",
        )
        for reason in get_args(Cut):
            self._cut.labels(reason)
        self._shadow_frames = self._counter(
            "shadow_frames", "Answered frames of lines with a shadow: compared with it, or shed.", "line", "outcome"
        )
        self._disagreements = self._counter(
            "shadow_disagreements", "Frames on which the shadow would have said something else.", "line", "kind"
        )
        self._lines: set[str] = set()
        self._model_labels: dict[str, tuple[str, ...]] = {}
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._measured_at: dict[str, float] = {}
        # What served a line last, and how far the line had moved by then: one that makes room for others comes back.
        self._last_drifts: dict[str, tuple[tuple[str, ...], LineDrift]] = {}
        self._depths: dict[str, Depth] = {}
        self._no_verdicts = _Children(self._no_verdict)
        self._served: dict[str, list[str]] = {}  # versions of each line, the last one last
        self._declare_reasons(UNKNOWN_LINE)

    def watch_readiness(self, is_ready: Callable[[], bool]) -> None:
        """Have readiness asked for at every scrape."""
        self._ready.set_function(lambda: float(is_ready()))

    def watch_live_versions(self, in_store: Callable[[], Mapping[str, bool]]) -> None:
        """Have it asked at every scrape whether what judges still lies in the store.

        Args:
            in_store: says it, by bundle whose lines are served.
        """
        self._collectors.register(_InStoreSeries(in_store))

    def watch_keys(self, oldest_made_at: Callable[[], float], is_in_force: Callable[[], bool]) -> None:
        """Have the age of the callers' keys told at every scrape; a service without keys has no such series."""
        oldest = self._gauge("keys_oldest_timestamp_seconds", "When the oldest key in force was made.")
        oldest.set_function(oldest_made_at)
        in_force = self._gauge("keys_in_force", "1 while the keys file counts, 0 while a changed one is refused.")
        in_force.set_function(lambda: float(is_in_force()))

    def count_lost_lines(self) -> None:
        """Count the lines of the process's log that can't be written from now on."""
        for handler in logging.getLogger().handlers:
            if isinstance(handler, LineWriter):
                handler.tell_of_loss = partial(self.record_dropped, "log")

    def watch_certificate(self, expires_at: Callable[[], float]) -> None:
        """Have the end of the server's certificate told at every scrape; without TLS there is no such series."""
        expiry = self._gauge("certificate_expiry_timestamp_seconds", "When the server's certificate ends.")
        expiry.set_function(expires_at)

    def declare_line(self, line: str) -> None:
        """Let a line of the registry be a label; what alerts watch for is there before it first happens."""
        self._declare_reasons(line)
        self._refused_policies.labels(line).inc(0)
        for outcome in ("compared", "shed"):
            self._shadow_frames.labels(line, outcome)
        for kind in get_args(DisagreementKind):
            self._disagreements.labels(line, kind)

    def known_line(self, line: str) -> str:
        """Return a line's name, or `unknown` where the registry has no such line."""
        return line if line in self._lines else UNKNOWN_LINE

    def engine(self, engine: str) -> EngineMeter:
        """Return the gauges of an engine, under the name of its bundle."""
        reasons: tuple[Discarded, ...] = get_args(Discarded)
        discarded = {reason: self._discarded.labels(engine, reason) for reason in reasons}
        if engine not in self._depths:
            self._depths[engine] = depth = Depth()
            self._queue_depth.labels(engine).set_function(lambda: float(depth.frames))
            self._frames.batch_sizes[engine] = Buckets(_BATCH_BUCKETS)
        return EngineMeter(self._frames.batch_sizes[engine], self._depths[engine], discarded, self._replaced_decoders)

    def decoder_replaced(self) -> None:
        """Count a decoder apart from the runners that was given up."""
        self._replaced_decoders.inc()

    def engine_loaded(self, engine: str, seconds: float) -> None:
        """Record how long an engine took from its bundle's bytes to its golden frames passed."""
        self._engine_load.labels(engine).set(seconds)

    def engine_runs(
        self, engine: str, version: str, device: str, provider: str, precision: str, *, size_bytes: int
    ) -> None:
        """Record where a loaded version runs, by what, what it computes in, and the memory that it takes."""
        self._engine_info.labels(engine, version, device, provider, precision).set(1)
        self._engine_bytes.labels(engine, version).set(size_bytes)

    def memory_is_bounded(self, budget_bytes: int | None) -> None:
        """Record what all engines may take together; None is no limit."""
        self._budget.set(budget_bytes or 0)

    def engine_closed(self, engine: str, version: str, device: str, provider: str, precision: str) -> None:
        """Forget a version that is in memory no longer."""
        self._engine_info.remove(engine, version, device, provider, precision)
        self._engine_bytes.remove(engine, version)

    def line_serves(
        self, line: str, version: str, digest: str, policy: str, device: str, calibration: Calibration | None
    ) -> None:
        """Record what serves a line from now on, and forget what served it before.

        How far a line has moved is measured on where the same serves it again that did so last.

        Args:
            line: its name.
            version: of the bundle.
            digest: of the bundle.
            policy: version of the default one.
            device: of the engine.
            calibration: what drift is measured against; None where nothing speaks of the default policy's scores.
        """
        before = self._model_labels.get(line)
        if before is not None:
            self._model_info.remove(*before)
        self._model_labels[line] = labels = (line, version, digest, policy, device)
        self._model_info.labels(*labels).set(1)
        self._forget_old_versions(line, version)
        judged_by, drift = self._last_drifts.get(line, ((), None))
        if drift is None or judged_by != labels or (drift.scores is None) != (calibration is None):
            drift = LineDrift(None if calibration is None else ScoreDrift(calibration))
        self._drifts.by_line[line] = drift
        self._last_drifts[line] = labels, drift

    def line_leaves(self, line: str) -> None:
        """Forget what served a line, where nothing does any more, and what was told of its last frames."""
        labels = self._model_labels.pop(line, None)
        if labels is not None:
            self._model_info.remove(*labels)
        self._drifts.by_line.pop(line, None)

    def declare_engine(self, engine: str) -> None:
        """Let what may happen to a bundle's engines be told of before it first does."""
        self._refused_versions.labels(engine).inc(0)
        self._unloads.labels(engine).inc(0)

    def version_refused(self, engine: str) -> None:
        """Count a version of a bundle that was not taken into use."""
        self._refused_versions.labels(engine).inc()

    def policy_refused(self, line: str) -> None:
        """Count a policy file of a line that is not taken as it lies in the store."""
        self._refused_policies.labels(line).inc()

    def engine_unloaded(self, engine: str) -> None:
        """Count an engine that made room for others."""
        self._unloads.labels(engine).inc()

    def store_read(self) -> None:
        """Record that the store was asked for what is new, and answered."""
        self._store_reachable.set(1)

    def store_unreachable(self) -> None:
        """Count a time that the store could not be asked for what is new; so it stands until it answers."""
        self._store_unreachable.inc()
        self._store_reachable.set(0)

    def golden_failed(self) -> None:
        """Count a bundle whose golden frames came out differently on this device."""
        self._golden_failures.inc()

    def shadow_shed(self, line: str) -> None:
        """Count a frame that the shadow of its line had no time for."""
        self._shadow_frames.labels(line, "shed").inc()

    def shadow_compared(self, line: str) -> None:
        """Count a frame that the shadow of its line has judged as well."""
        self._shadow_frames.labels(line, "compared").inc()

    def shadow_disagreed(self, line: str, kind: DisagreementKind) -> None:
        """Count a frame on which the shadow would have said something else."""
        self._disagreements.labels(line, kind).inc()

    def golden_checked(self, outcome: GoldenOutcome) -> None:
        """Count a replay of golden frames while lines are served.

        One that was skipped met a busy engine; one that ended early was at fault itself, and says nothing of an engine.
        """
        self._golden_checks.labels(outcome).inc()

    def record_dropped(self, sink: Sink, records: int = 1) -> None:
        """Count records that made room for newer ones, or that nobody took."""
        self._dropped.labels(sink).inc(records)

    def connection_cut(self, reason: Cut) -> None:
        """Count a connection that was cut off or turned away."""
        self._cut.labels(reason).inc()

    def inspected(self, inspection: Inspection, encode_s: float, total_s: float, answered_at: float) -> None:
        """Count and log one answered frame.

        Args:
            inspection: the answer.
            encode_s: seconds spent on writing it.
            total_s: seconds from its arrival until it was written.
            answered_at: when that was, in seconds since 1970.
        """
        request, judgement, line = inspection.request, inspection.judgement, inspection.line
        series = self._series(line, inspection.bundle_version)
        verdict, shown = judgement.verdict.value, inspection.inspection_id
        series.verdicts[verdict] = series.verdicts.get(verdict, 0) + 1
        seconds = {**inspection.timings_s, "encode": encode_s, "total": total_s}
        for stage, spent in seconds.items():
            series.stages[stage].observe(spent, shown if stage == "total" else None)
        series.tally.answered(inspection.batch_size, seconds, int(answered_at * 1000))
        series.slack.observe(inspection.deadline_s - total_s)
        series.score.observe(in_units(judgement.score, inspection.policy), shown)
        self._watch(inspection)
        if not _log.isEnabledFor(logging.INFO):
            return
        fields: dict[str, Any] = {
            "inspection_id": inspection.inspection_id,
            "request_id": request.request_id,
            "part_id": request.part_id,
            "view": request.view,
            "sequence": request.sequence,
            "line": line,
            "bundle_version": inspection.bundle_version,
            "bundle_digest": inspection.bundle_digest,
            "policy_version": inspection.policy_version,
            "policy_digest": inspection.policy_digest,
            "frame_digest": inspection.frame_digest,
            "verdict": verdict,
            "score": judgement.score,
            "p_value": inspection.p_value,
            "calibration": inspection.policy.calibration,
            "thresholds": {"review": inspection.review_threshold, "fail": inspection.fail_threshold},
            "regions_total": judgement.regions_total,
            "device": inspection.device,
            "precision": inspection.precision,
            "raw": None if request.raw is None else vars(request.raw),
            "is_network_input": request.is_network_input,
            "bytes": len(request.data),
            "pixels": inspection.frame.height * inspection.frame.width,
            "batch_size": inspection.batch_size,
            "seconds": {stage: round(spent, 6) for stage, spent in seconds.items()},
        }
        _log.handle(InspectionRecord(_log.name, fields, answered_at))

    def not_inspected(
        self, line: str, reason: str, answered_at: float, *, seconds: Mapping[str, float], **fields: Any
    ) -> None:
        """Count and log one frame without a verdict.

        Args:
            line: as it was asked for; one that the registry does not know is counted and logged as `unknown`.
            reason: an error code, or `CALLER_LEFT`; anything else is counted as `other`, and logged as it is.
            answered_at: when its answer was written, in seconds since 1970.
            seconds: by stage, as far as is known; `total` among them.
            fields: whatever else is known, for the log: request and part id, what was to judge it, its digest.
        """
        known = self.known_line(line)
        self._no_verdicts[known, reason if reason in _REASONS else OTHER_REASON].inc()
        if reason in _OUT_OF_TIME and known != UNKNOWN_LINE:
            self._of_line(known).slack.observe(0.0)
            if reason == DeadlinePassed.code:  # a refusal takes no time at all, and would make the line look quick
                self._of_line(known).stages["total"].observe(seconds.get("total", 0.0))
        verdict = Verdict.NO_VERDICT.value
        if known in self._served:  # by a version that is in memory, or was the last one there
            version = self._served[known][-1]
            self._tally(known, version).failed(seconds.get("total", 0.0), int(answered_at * 1000))
        known_fields = {"line": known, "verdict": verdict, "code": reason, "seconds": dict(seconds)}
        if _log.isEnabledFor(logging.INFO):
            _log.handle(InspectionRecord(_log.name, known_fields | fields, answered_at))

    def statistics(self, line: str, version: str) -> dict[str, Any]:
        """Return what a bundle has done for a line, as the Open Inference Protocol's statistics describe it."""
        return {"name": line, "version": version, **self._tally(line, version).describe()}

    def exposition(self, accepted: str = "") -> tuple[bytes, str]:
        """Return what a scraper reads, and its content type.

        Args:
            accepted: the scraper's `Accept` header; only OpenMetrics carries exemplars.
        """
        return self.snapshot().exposition(accepted)

    def snapshot(self) -> "Snapshot":
        """Return what every metric says now; to be taken where they are moved."""
        return Snapshot(tuple(self._collectors.collect()))

    def _watch(self, inspection: Inspection) -> None:
        """Count a frame towards drift, unless it was judged by another policy or bundle than the line's own."""
        line = inspection.line
        served, drift = self._model_labels.get(line), self._drifts.by_line.get(line)
        if served is None or drift is None or served[1:4:2] != (inspection.bundle_version, inspection.policy_version):
            return
        drift.judged(inspection.judgement.score, passed=inspection.judgement.verdict is Verdict.PASS)
        now, pause_s = self._clock(), max(_MEASURED_EVERY_S, len(self._drifts.by_line) / _MEASURED_A_SECOND)
        if now - self._measured_at.get(line, -math.inf) < pause_s:
            return
        self._measured_at[line] = now
        height, width = inspection.canvas.shape[:2]
        if min(height, width) < _SMALLEST_SIDE:
            return
        top, left = max(0, height - _MEASURED_SIDE) // 2, max(0, width - _MEASURED_SIDE) // 2
        drift.seen(measure_quality(inspection.canvas[top : top + _MEASURED_SIDE, left : left + _MEASURED_SIDE]))

    def _declare_reasons(self, line: str) -> None:
        self._lines.add(line)
        for reason in _WATCHED_REASONS:
            self._no_verdicts[line, reason].inc(0)

    def _forget_old_versions(self, line: str, version: str) -> None:
        served = [one for one in self._served.get(line, []) if one != version] + [version]
        for old in served[:-_VERSIONS_KEPT]:
            self._frames.by_version.pop((line, old), None)
            self._tallies.pop((line, old), None)
        self._served[line] = served[-_VERSIONS_KEPT:]

    def _series(self, line: str, version: str) -> _Series:
        known = self._frames.by_version
        if (line, version) not in known:
            known[line, version] = _Series(self._of_line(line), self._tally(line, version))
        return known[line, version]

    def _of_line(self, line: str) -> _LineSeries:
        series = self._frames.by_line.get(line)
        if series is None:
            stages = {stage: Buckets(_STAGE_BUCKETS_S) for stage in _STAGES}
            series = self._frames.by_line[line] = _LineSeries(stages, Buckets(_SLACK_BUCKETS_S))
        return series

    def _tally(self, line: str, version: str) -> Tally:
        tally = self._tallies.get((line, version))
        if tally is None:
            tally = self._tallies[line, version] = Tally()
        return tally

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, namespace="flawline", registry=self._collectors)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(name, meaning, labels, namespace="flawline", registry=self._collectors)


def in_units(score: float, policy: Policy) -> float:
    """Return a score in units of the fail threshold: 1 is at it, and more is more anomalous, whatever its sign."""
    unit = max(abs(policy.fail_threshold), _SMALLEST_THRESHOLD)
    return 1 + (score - policy.fail_threshold) / unit
