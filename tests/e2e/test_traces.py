"""Traces of a real server: sent to a real receiver on loopback, and lost without harm where nobody listens."""

import pytest

from tests.factories import encode, make_bundle, make_frame
from tests.programs import free_port, listening
from tests.servers import PATIENCE_S, ServerProcess, wait_until

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
HEADERS = {"Content-Type": "image/png", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}


def _spans_of(body):
    told = trace_service.ExportTraceServiceRequest.FromString(body)
    return [span for resource in told.resource_spans for scope in resource.scope_spans for span in scope.spans]


def _inspect(server):
    return server.http.post("/v1/lines/demo_line/inspect", content=encode(make_frame()), headers=HEADERS)


def test_traces_when_a_collector_is_named_then_a_callers_trace_goes_through_all_stages(tmp_path):
    """From the header of a request to OTLP over HTTP; what is left is sent before the process ends."""
    make_bundle(tmp_path / "store")
    with listening() as (address, arrived):
        with ServerProcess(tmp_path / "store", {"FLAWLINE_TRACES_ENDPOINT": f"{address}/v1/traces"}) as server:
            server.ready()
            answer = _inspect(server)
            server.terminate()
            code = server.exit_code()
        spans = [span for _ in range(arrived.qsize()) for span in _spans_of(arrived.get(timeout=PATIENCE_S))]

    assert (answer.json()["verdict"], code) == ("PASS", 0)
    ours = {span.name for span in spans if span.trace_id.hex() == TRACE}
    assert ours == {"inspect", "receive", "decode", "queue", "infer", "postprocess", "encode"}
    [batch] = [span for span in spans if span.name == "batch"]
    [infer] = [span for span in spans if span.name == "infer"]
    assert [link.span_id for link in infer.links] == [batch.span_id]


def test_traces_when_nobody_listens_then_frames_are_judged_and_the_loss_is_counted(tmp_path):
    """A collector that is gone costs no verdict."""
    make_bundle(tmp_path / "store")
    endpoint = f"http://127.0.0.1:{free_port()}/v1/traces"
    at_once = {"OTEL_BSP_SCHEDULE_DELAY": "100"}  # ms, of OpenTelemetry's own; five seconds where absent
    with ServerProcess(tmp_path / "store", {"FLAWLINE_TRACES_ENDPOINT": endpoint, **at_once}) as server:
        server.ready()
        answer = _inspect(server)
        lost = 'flawline_records_dropped_total{sink="traces"} 8.0'
        wait_until(lambda: lost in server.http.get("/metrics").text, "the count of what was lost")

    assert answer.json()["verdict"] == "PASS"
