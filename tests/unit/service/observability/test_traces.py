"""Spans as OpenTelemetry's own exporter in memory sees them, and a real receiver on loopback."""

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from service.observability.traces import Traces
from tests.inspections import make_inspection, make_request

NOW_NS = 1_800_000_000 * 10**9
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def memory():
    """Where spans end up."""
    return InMemorySpanExporter()


@pytest.fixture
def traces(memory):
    """What makes spans, at a standing clock."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return Traces(provider.get_tracer("test"), now_ns=lambda: NOW_NS)


def spans(memory):
    """Return the finished spans by name; of several with one name the last."""
    return {span.name: span for span in memory.get_finished_spans()}


def test_inspected_when_a_frame_is_answered_then_each_stage_is_a_span_of_its_own_length(traces, memory):
    """One span a stage below one of the inspection, each as long as the timings that the caller was told."""
    inspection = make_inspection()
    total_s = sum(inspection.timings_s.values()) + 0.5

    traces.inspected(inspection, encode_s=0.25, total_s=total_s)

    seen = spans(memory)
    root = seen["inspect"]
    lengths = {name: (span.end_time - span.start_time) / 1e9 for name, span in seen.items()}
    assert lengths == pytest.approx(
        {**inspection.timings_s, "encode": 0.25, "inspect": total_s, "batch": lengths["infer"]}
    )
    stages = {*inspection.timings_s, "encode"}
    assert {seen[name].parent.span_id for name in stages} == {root.context.span_id}
    assert all(root.start_time <= seen[name].start_time <= seen[name].end_time <= root.end_time for name in stages)
    assert root.end_time == NOW_NS
    assert root.attributes["flawline.inspection_id"] == inspection.inspection_id
    assert root.attributes["flawline.verdict"] == inspection.judgement.verdict.value


def test_inspected_when_frames_ran_together_then_both_link_to_one_batch(traces, memory):
    """The batch has one span in a trace of its own; frames of another batch link elsewhere."""
    for batch in (1, 1, 2):
        traces.inspected(make_inspection(batch_number=batch), encode_s=0, total_s=1)

    finished = memory.get_finished_spans()
    batches = [span.context for span in finished if span.name == "batch"]
    links = [link.context.span_id for span in finished if span.name == "infer" for link in span.links]
    assert len(batches) == 2
    assert links == [batches[0].span_id, batches[0].span_id, batches[1].span_id]
    assert not {context.trace_id for context in batches} & {s.context.trace_id for s in finished if s.name == "inspect"}


def test_inspected_when_the_caller_sends_its_context_then_the_span_is_its_child(traces, memory):
    """W3C Trace Context: one trace from the camera's controller to our stages."""
    traces.inspected(make_inspection(request=make_request(trace_parent=CALLER)), encode_s=0, total_s=1)

    root = spans(memory)["inspect"]
    assert f"{root.context.trace_id:032x}" == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert f"{root.parent.span_id:016x}" == "00f067aa0ba902b7"


@pytest.mark.parametrize("trace_parent", [None, "", "nonsense", "00-00000000000000000000000000000000-0-01", "x" * 5000])
def test_inspected_when_the_callers_context_is_none_then_the_trace_begins_here(traces, memory, trace_parent):
    """Whatever somebody sends in that header, there is a trace and no fault."""
    traces.inspected(make_inspection(request=make_request(trace_parent=trace_parent)), encode_s=0, total_s=1)

    assert spans(memory)["inspect"].parent is None


def test_inspected_when_the_caller_decided_against_it_then_nothing_is_traced(traces, memory):
    """The last two digits of its context say whether it is sampled."""
    traces.inspected(make_inspection(request=make_request(trace_parent=CALLER[:-2] + "00")), encode_s=0, total_s=1)

    assert memory.get_finished_spans() == ()


def test_not_inspected_when_a_frame_has_no_verdict_then_the_span_is_an_error_with_its_code(traces, memory):
    """It can be looked for by the code that the caller was told."""
    traces.not_inspected("cap", "overloaded", CALLER, 0.125)

    [span] = memory.get_finished_spans()
    assert (span.status.status_code, span.attributes["error.type"]) == (StatusCode.ERROR, "overloaded")
    assert (span.attributes["flawline.verdict"], span.attributes["flawline.line"]) == ("NO_VERDICT", "cap")
    assert span.end_time - span.start_time == 125_000_000


def test_traces_when_there_is_no_room_then_the_inspection_goes_without():
    """A collector that hangs must not fill the memory."""
    memory = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))

    Traces(provider.get_tracer("test"), has_room=lambda: False).inspected(make_inspection(), encode_s=0, total_s=1)

    assert memory.get_finished_spans() == ()
