"""Sends traces to a collector, over OTLP and HTTP, from a thread of its own; wants the extra `tracing`.

A collector that is slow or gone costs no inspection anything: what can't be sent is lost, and every loss is counted.
"""

import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from service.observability.traces import Traces

# Spans on their way; while there are more, inspections go without.
_MAX_UNDER_WAY = 4096
_EXPORT_TIMEOUT_S = 5


class _Sending(BatchSpanProcessor):
    """Sends in batches, and knows how many spans are under way."""

    def __init__(self, exporter: SpanExporter, on_lost: Callable[[int], None]) -> None:
        super().__init__(_Counted(exporter, self._arrived, on_lost), max_queue_size=2 * _MAX_UNDER_WAY)
        self._on_lost = on_lost
        self._begun = self._ended = 0  # each is counted by one thread only

    def has_room(self) -> bool:
        """Tell whether one more inspection may be traced; one that may not is counted as lost."""
        if self._begun - self._ended < _MAX_UNDER_WAY:
            return True
        self._on_lost(1)
        return False

    def on_end(self, span: ReadableSpan) -> None:
        self._begun += 1
        super().on_end(span)

    def _arrived(self, spans: int) -> None:
        self._ended += spans


class _Counted(SpanExporter):
    """An exporter that tells how many spans it got rid of, and how many of them were lost."""

    def __init__(self, exporter: SpanExporter, on_end: Callable[[int], None], on_lost: Callable[[int], None]) -> None:
        self._exporter = exporter
        self._on_end = on_end
        self._on_lost = on_lost

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            self._on_end(len(spans))
            if result is not SpanExportResult.SUCCESS:
                self._on_lost(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def open_traces(endpoint: str, share: float, on_lost: Callable[[int], None]) -> Traces:
    """Return what traces inspections and sends them to a collector.

    Args:
        endpoint: of the collector, with its path.
        share: of inspections that are traced, where the caller has not decided.
        on_lost: called with the number of spans, or of untraced inspections, that never arrive.
    """
    # Its own complaints would be a line for every batch; a loss is counted, and an alert tells of it.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    sending = _Sending(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S), on_lost)
    resource = Resource.create({"service.name": "flawline", "service.version": version("flawline")})
    provider = TracerProvider(ParentBased(TraceIdRatioBased(share)), resource, shutdown_on_exit=False)
    provider.add_span_processor(sending)
    return Traces(provider.get_tracer("flawline"), has_room=sending.has_room, close=provider.shutdown)
