"""Traces of inspections for OpenTelemetry, where a collector is named; `collector.py` sends them.

Spans are made after the answer, out of the timings that every inspection carries anyway, so nothing on a frame's way
knows of them. One span an inspection, below it one a stage; frames that ran together link to one span of their batch.
A caller's `traceparent` (W3C Trace Context) is the parent, and decides whether there are spans at all.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.inspection import Inspection

# One after the other, from the first byte on; `encode` ends with the answer.
_STAGES = ("receive", "decode", "queue", "infer", "postprocess")
# Batches whose span a later frame may still have to link to.
_KEPT_BATCHES = 1024


class Traces:
    """Turns inspections into spans.

    Args:
        tracer: makes them.
        has_room: whether more spans may be made now; where not, an inspection goes without.
        close: sends what is left.
        now_ns: nanoseconds since 1970.
    """

    def __init__(
        self,
        tracer: Tracer,
        *,
        has_room: Callable[[], bool] = lambda: True,
        close: Callable[[], None] = lambda: None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._tracer = tracer
        self._has_room = has_room
        self.close = close
        self._now_ns = now_ns
        self._callers = TraceContextTextMapPropagator()
        self._batches: OrderedDict[tuple[str, int], SpanContext] = OrderedDict()

    def inspected(self, inspection: Inspection, encode_s: float, total_s: float) -> None:
        """Trace one answered frame.

        Args:
            inspection: the answer.
            encode_s: seconds spent on writing it.
            total_s: seconds from its arrival until now.
        """
        end = self._now_ns()
        start = end - _ns(total_s)
        span = self._begin(inspection.line, inspection.request.trace_parent, start)
        if span is None:
            return
        span.set_attributes(
            {
                "flawline.inspection_id": inspection.inspection_id,
                "flawline.bundle_version": inspection.bundle_version,
                "flawline.policy_version": inspection.policy_version,
                "flawline.device": inspection.device,
                "flawline.verdict": inspection.judgement.verdict.value,
                "flawline.score": inspection.judgement.score,
            }
        )
        within, at = _below(span), start
        for stage in _STAGES:
            spent = _ns(inspection.timings_s[stage])
            links = [Link(self._batch(inspection, at, at + spent))] if stage == "infer" else []
            self._tracer.start_span(stage, within, links=links, start_time=at).end(at + spent)
            at += spent
        self._tracer.start_span("encode", within, start_time=end - _ns(encode_s)).end(end)
        span.end(end)

    def not_inspected(self, line: str, reason: str, trace_parent: str | None, total_s: float) -> None:
        """Trace one frame without a verdict.

        Args:
            line: of the registry, or `unknown`.
            reason: an error code.
            trace_parent: of the caller.
            total_s: seconds from its arrival until now.
        """
        end = self._now_ns()
        span = self._begin(line, trace_parent, end - _ns(total_s))
        if span is not None:
            span.set_attributes({"flawline.verdict": "NO_VERDICT", "error.type": reason})
            span.set_status(Status(StatusCode.ERROR, reason))
            span.end(end)

    def _begin(self, line: str, trace_parent: str | None, start: int) -> Span | None:
        if not self._has_room():
            return None
        caller = Context() if trace_parent is None else self._callers.extract({"traceparent": trace_parent}, Context())
        span = self._tracer.start_span(
            "inspect", caller, SpanKind.SERVER, attributes={"flawline.line": line}, start_time=start
        )
        return span if span.is_recording() else None

    def _batch(self, inspection: Inspection, start: int, end: int) -> SpanContext:
        """Return the span of the batch that a frame ran in; the first of its frames makes it."""
        key = (inspection.bundle_digest, inspection.batch_number)
        if key not in self._batches:
            size: dict[str, int | str] = {
                "flawline.batch_size": inspection.batch_size,
                "flawline.device": inspection.device,
            }
            # In a trace of its own: it belongs to no single caller.
            span = self._tracer.start_span("batch", Context(), attributes=size, start_time=start)
            span.end(end)
            self._batches[key] = span.get_span_context()
            if len(self._batches) > _KEPT_BATCHES:
                self._batches.popitem(last=False)
        return self._batches[key]


def _below(span: Span) -> Context:
    return set_span_in_context(span, Context())


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
