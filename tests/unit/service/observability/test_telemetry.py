"""Promises of the telemetry: every frame is counted and logged once, under labels from closed sets."""

import json
import logging
import math
import re
import select
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.contract.calibration import Calibration
from service.contract.policy import Judgement, Verdict
from service.errors import known_codes
from service.inspection import RawLayout
from service.observability.log import JsonLines
from service.observability.telemetry import (
    CALLER_LEFT,
    OTHER_REASON,
    UNKNOWN_LINE,
    DisagreementKind,
    Discarded,
    GoldenOutcome,
    Sink,
    Telemetry,
    in_units,
)
from service.ports.connections import Cut
from tests.factories import make_policy
from tests.fakes import FakeClock
from tests.inspections import STAGES_S, make_inspection, make_request

# What dashboards, rules and manifests may count on: name, type and labels.
PROMISED = {
    "inspections": ("counter", {"line", "version", "verdict"}),
    "no_verdict": ("counter", {"line", "reason"}),
    "stage_duration_seconds": ("histogram", {"line", "stage"}),
    "deadline_slack_seconds": ("histogram", {"line"}),
    "batch_size": ("histogram", {"engine"}),
    "queue_depth": ("gauge", {"engine"}),
    "score": ("histogram", {"line", "version"}),
    "score_psi": ("gauge", {"line"}),
    "review_ratio": ("gauge", {"line"}),
    "image_quality": ("gauge", {"line", "stat"}),
    "engine_load_seconds": ("gauge", {"engine"}),
    "engine_memory_bytes": ("gauge", {"engine", "version"}),
    "engine_memory_budget_bytes": ("gauge", set()),
    "model_info": ("gauge", {"line", "version", "digest", "policy", "device"}),
    "golden_failures": ("counter", set()),
    "store_unreachable": ("counter", set()),
    "store_reachable": ("gauge", set()),
    "records_dropped": ("counter", {"sink"}),
    "connections_cut": ("counter", {"reason"}),
    "shadow_disagreements": ("counter", {"line", "kind"}),
}
ANSWERED_AT = 1_800_000_000.25
# Every value that a label may have. What the store declares is in its manifests: names of lines and bundles, versions.
DECLARED = {"line": {"demo_line"}, "engine": {"demo_engine"}, "version": {"4"}, "digest": {"d"}, "policy": {"1"}}
BOUNDS = DECLARED | {
    "line": DECLARED["line"] | {UNKNOWN_LINE},
    "verdict": {verdict.value for verdict in Verdict},
    "reason": known_codes() | {CALLER_LEFT, OTHER_REASON, *get_args(Discarded), *get_args(Cut)},
    "stage": {"receive", "decode", "queue", "infer", "postprocess", "encode", "total"},
    "stat": {"brightness", "saturation", "focus", "noise"},
    "outcome": {*get_args(GoldenOutcome), "compared", "shed"},
    "kind": set(get_args(DisagreementKind)),
    "sink": set(get_args(Sink)),
    "device": {"cpu"},
    "provider": {"CPUExecutionProvider"},
    "precision": {"fp32"},
}


@pytest.fixture
def telemetry():
    """Return telemetry that knows one line."""
    telemetry = Telemetry()
    telemetry.declare_line("demo_line")
    return telemetry


def metrics(telemetry):
    """Return every sample by its name with labels."""
    lines = telemetry.exposition()[0].decode().splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if x[:1] not in ("#", ""))}


def test_inspected_when_frame_is_answered_then_every_metric_moves(telemetry):
    """Verdict, stages, slack and score of an answer are all counted under its line."""
    telemetry.inspected(make_inspection(), encode_s=0.0002, total_s=0.5, answered_at=ANSWERED_AT)

    samples = metrics(telemetry)
    assert samples['flawline_inspections_total{line="demo_line",verdict="REVIEW",version="4"}'] == 1
    for stage in (*STAGES_S, "encode", "total"):
        assert samples[f'flawline_stage_duration_seconds_count{{line="demo_line",stage="{stage}"}}'] == 1
    assert samples['flawline_stage_duration_seconds_sum{line="demo_line",stage="infer"}'] == pytest.approx(0.019)
    assert samples['flawline_deadline_slack_seconds_sum{line="demo_line"}'] == pytest.approx(1.5)
    assert samples['flawline_score_sum{line="demo_line",version="4"}'] == pytest.approx(0.5)


def test_inspected_when_frame_is_answered_then_one_canonical_line_is_logged(telemetry, caplog):
    """The log line holds ids, versions and digests, all that gave the verdict, sizes and seconds, and no pixels."""
    with caplog.at_level(logging.INFO, "flawline.inspections"):
        telemetry.inspected(make_inspection(), encode_s=0.0002, total_s=0.5, answered_at=ANSWERED_AT)

    (record,) = caplog.records
    line = json.loads(JsonLines().format(record))
    assert line == {
        "time": "2027-01-15T08:00:00.250+00:00",
        "level": "INFO",
        "logger": "flawline.inspections",
        "message": "inspection",
        "inspection_id": "0" * 32,
        "request_id": "request-1",
        "part_id": "part 7",
        "view": "top",
        "sequence": 3,
        "line": "demo_line",
        "bundle_version": "4",
        "bundle_digest": "d" * 64,
        "policy_version": "1",
        "policy_digest": "e" * 64,
        "frame_digest": "f" * 64,
        "verdict": "REVIEW",
        "score": 0.1,
        "p_value": 0.1,
        "calibration": "good_parts",
        "thresholds": {"review": make_policy().review_threshold, "fail": make_policy().fail_threshold},
        "regions_total": 0,
        "device": "cpu",
        "precision": "fp32",
        "raw": None,
        "is_network_input": False,
        "bytes": 1000,
        "pixels": 2000,
        "batch_size": 2,
        "seconds": {**STAGES_S, "encode": 0.0002, "total": 0.5},
    }


def test_line_when_everything_in_it_is_as_long_as_may_be_then_it_fits_a_pipe_at_once(telemetry, caplog):
    """The line of a frame is bounded whoever asks, and so short that a pipe takes it whole."""
    name, longest, worst = "n" * 64, "i" * 128, -1.2345678901234567e-300
    request = make_request(
        data=bytes(1000),
        raw=RawLayout("BayerRG16", width=2**31 - 1, height=2**31 - 1, stride=2**31 - 1),
        request_id=longest,
        part_id=longest,
        view=longest,
        sequence=2**63 - 1,
    )
    inspection = make_inspection(
        request=request,
        line=name,
        bundle_version="9" * 9,
        policy_version=name,
        judgement=Judgement(Verdict.NO_VERDICT, worst, [], 10**9, np.zeros((2, 2), np.float32)),
        p_value=-worst,
        review_threshold=worst,
        fail_threshold=worst,
        device="cuda:0000:00:00.0",
        timings_s=dict.fromkeys(STAGES_S, 123456.123456),
    )
    with caplog.at_level(logging.INFO, "flawline.inspections"):
        telemetry.inspected(inspection, encode_s=123456.123456, total_s=123456.123456, answered_at=ANSWERED_AT)

    (record,) = caplog.records
    line = JsonLines().format(record)
    assert json.loads(line)["raw"] == {**vars(request.raw)}
    assert len(line.encode()) < 2000 < select.PIPE_BUF


def test_line_when_it_stands_in_the_document_then_a_real_one_has_the_same_members(telemetry, caplog):
    """Who writes a query for the example in `service/records.md` finds what it asks for."""
    text = (Path(__file__).parents[4] / "service/records.md").read_text(encoding="utf-8")
    (example,) = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    with caplog.at_level(logging.INFO, "flawline.inspections"):
        telemetry.inspected(make_inspection(), encode_s=0.0002, total_s=0.5, answered_at=ANSWERED_AT)

    (record,) = caplog.records
    assert _shape(example) == _shape(json.loads(JsonLines().format(record)))


def _shape(value):
    """Return what kind of value it is, with the members of an object in their order."""
    return [(name, _shape(member)) for name, member in value.items()] if isinstance(value, dict) else type(value)


@pytest.mark.parametrize(("line", "label"), [("demo_line", "demo_line"), ("../../etc\n", "unknown")])
def test_not_inspected_when_line_is_anything_then_label_is_bounded(telemetry, caplog, line, label):
    """A name that the registry does not know is neither a label nor in the log."""
    with caplog.at_level(logging.INFO, "flawline.inspections"):
        telemetry.not_inspected(line, CALLER_LEFT, ANSWERED_AT, request_id="request-1", seconds={"total": 0.1})

    assert metrics(telemetry)[f'flawline_no_verdict_total{{line="{label}",reason="caller_left"}}'] == 1
    (record,) = caplog.records
    logged = json.loads(JsonLines().format(record))
    assert (logged["line"], logged["verdict"], logged["code"]) == (label, "NO_VERDICT", "caller_left")
    assert logged["seconds"] == {"total": 0.1}


def test_times_when_frames_were_late_or_refused_then_do_not_look_as_good_as_those_of_the_answered_alone(telemetry):
    """A late frame took its time and had none left; one that was refused took none, and had none left either."""
    telemetry.inspected(make_inspection(), encode_s=0.0002, total_s=0.02, answered_at=ANSWERED_AT)
    for reason, total_s, frames in (("deadline_passed", 0.031, 4), ("overloaded", 0.0003, 16)):
        for _ in range(frames):
            telemetry.not_inspected("demo_line", reason, ANSWERED_AT, seconds={"total": total_s})
    telemetry.not_inspected("demo_line", "unreadable_frame", ANSWERED_AT, seconds={"total": 0.001})
    telemetry.not_inspected("elsewhere", "overloaded", ANSWERED_AT, seconds={"total": 0.001})

    samples = metrics(telemetry)
    total = 'flawline_stage_duration_seconds_{}{{{}line="demo_line",stage="total"}}'
    assert samples[total.format("count", "")] == 5
    assert samples[total.format("sum", "")] == pytest.approx(0.02 + 4 * 0.031)
    assert samples['flawline_deadline_slack_seconds_bucket{le="0.0",line="demo_line"}'] == 20
    assert samples['flawline_deadline_slack_seconds_count{line="demo_line"}'] == 21
    assert 'flawline_deadline_slack_seconds_count{line="unknown"}' not in samples


@pytest.mark.parametrize("line", ["demo_line", UNKNOWN_LINE])
def test_no_verdict_when_nothing_was_lost_yet_then_a_dozen_reasons_stand_at_0(telemetry, line):
    """The first losses are a rise then, which alerts see; a thousand lines cost some thousand series."""
    samples = metrics(telemetry)
    watched = {name: value for name, value in samples.items() if name.startswith("flawline_no_verdict_total{")}

    of_line = [value for name, value in watched.items() if f'line="{line}"' in name]
    assert of_line == [0] * 12
    assert len(watched) == 24


@pytest.fixture
def busy():
    """Return the metrics of telemetry to which everything has happened, strange names and reasons included."""
    telemetry = Telemetry()
    telemetry.declare_line("demo_line")
    calibrated = np.linspace(0, 0.1, 100, dtype=np.float32)
    telemetry.line_serves("demo_line", "4", "d", "1", "cpu", Calibration.from_good_parts(calibrated, calibrated, 0.0))
    meter = telemetry.engine("demo_engine")
    meter.batch(1)
    meter.discard("late")
    telemetry.engine_loaded("demo_engine", 1.0)
    telemetry.engine_runs("demo_engine", "4", "cpu", "CPUExecutionProvider", "fp32", size_bytes=100)
    telemetry.version_refused("demo_engine")
    telemetry.engine_unloaded("demo_engine")
    for _ in range(50):  # from so many on, drift is told
        telemetry.inspected(make_inspection(), encode_s=0.0002, total_s=0.5, answered_at=ANSWERED_AT)
    for reason in ("overloaded", CALLER_LEFT, "HTTP 418", "'; drop", ""):
        telemetry.not_inspected("demo_line", reason, ANSWERED_AT, seconds={"total": 0.1})
        telemetry.not_inspected("../../etc\n", reason, ANSWERED_AT, seconds={"total": 0.1})
    body = telemetry.exposition()[0].decode()
    return {family.name.removeprefix("flawline_"): family for family in text_string_to_metric_families(body)}


@pytest.mark.parametrize("name", PROMISED)
def test_metric_when_the_service_works_then_has_its_promised_name_type_and_labels(busy, name):
    """Dashboards of others rest on these; renaming one is a change that they must be told of."""
    family = busy[name]
    labels = {label for sample in family.samples for label in sample.labels} - {"le"}

    assert (family.type, labels) == PROMISED[name]


def test_labels_when_anything_was_asked_for_then_every_value_is_from_a_closed_set(busy):
    """Nobody outside can make a series: each label of each metric has its bound, and keeps to it."""
    strange = {
        (family.name, label, value)
        for family in busy.values()
        for sample in family.samples
        for label, value in sample.labels.items()
        if label != "le" and value not in BOUNDS.get(label, ())
    }

    assert strange == set()
    reasons = {sample.labels["reason"] for sample in busy["no_verdict"].samples if sample.value}
    assert reasons == {"overloaded", CALLER_LEFT, OTHER_REASON}


def test_versions_when_many_were_rolled_out_then_the_last_few_have_series(telemetry):
    """A process that serves for a year of rollouts is scraped as quickly as on its first day."""
    for number in range(20):
        telemetry.line_serves("demo_line", str(number), "d", "1", "cpu", None)
        telemetry.inspected(
            make_inspection(bundle_version=str(number)), encode_s=0.0, total_s=0.1, answered_at=ANSWERED_AT
        )

    versions = {
        sample.labels["version"]
        for family in text_string_to_metric_families(telemetry.exposition()[0].decode())
        for sample in family.samples
        if "version" in sample.labels
    }
    assert versions == {str(number) for number in range(12, 20)}


def test_line_serves_when_version_changes_then_only_the_new_one_is_left(telemetry):
    """`model_info` names what serves now, once a line."""
    telemetry.line_serves("demo_line", "1", "a", "p", "cpu", None)
    telemetry.line_serves("demo_line", "2", "b", "p", "cpu", None)

    names = [name for name in metrics(telemetry) if name.startswith("flawline_model_info")]
    assert names == ['flawline_model_info{device="cpu",digest="b",line="demo_line",policy="p",version="2"}']


def test_drift_when_scores_leave_their_calibration_then_the_gauges_tell(telemetry):
    """Frames under the line's own policy count; those that another policy or version judged do not."""
    calibrated = np.linspace(0, 0.1, 100, dtype=np.float32)
    telemetry.line_serves("demo_line", "4", "d", "1", "cpu", Calibration.from_good_parts(calibrated, calibrated, 0.0))

    for number in range(60):
        verdict = Verdict.FAIL if number % 2 else Verdict.PASS
        own = replace(make_inspection().judgement, verdict=verdict, score=0.5)
        telemetry.inspected(make_inspection(judgement=own), encode_s=0.0, total_s=0.1, answered_at=ANSWERED_AT)
        strange = replace(own, verdict=Verdict.FAIL, score=9.0)
        telemetry.inspected(
            make_inspection(judgement=strange, policy_version="trial"),
            encode_s=0.0,
            total_s=0.1,
            answered_at=ANSWERED_AT,
        )

    samples = metrics(telemetry)
    assert samples['flawline_score_psi{line="demo_line"}'] > 1
    assert samples['flawline_review_ratio{line="demo_line"}'] == pytest.approx(0.5, abs=0.01)


def test_series_when_a_line_leaves_then_its_gauges_go_and_its_counts_stay(telemetry):
    """What nobody measures any more must not stand still on a dashboard; what was counted was counted."""
    telemetry.declare_line("demo_line")
    telemetry.line_serves("demo_line", "4", "d", "1", "cpu", None)
    telemetry.inspected(make_inspection(), encode_s=0.0, total_s=0.1, answered_at=ANSWERED_AT)

    telemetry.line_leaves("demo_line")
    telemetry.inspected(make_inspection(), encode_s=0.0, total_s=0.1, answered_at=ANSWERED_AT)  # the last under way
    telemetry.not_inspected("demo_line", "line_loading", ANSWERED_AT, seconds={"total": 0.1})

    samples = metrics(telemetry)
    gone = ("flawline_model_info{", "flawline_score_psi{", "flawline_review_ratio{", "flawline_image_quality{")
    assert not [name for name in samples if name.startswith(gone)]
    assert samples['flawline_inspections_total{line="demo_line",verdict="REVIEW",version="4"}'] == 2
    assert telemetry.statistics("demo_line", "4")["inference_stats"]["fail"]["count"] == 1


@pytest.mark.parametrize(("digest", "is_kept"), [("d", True), ("e", False)], ids=["same version", "another one"])
def test_drift_when_a_line_that_made_room_comes_back_then_it_is_measured_on_from_where_it_was(
    telemetry, digest, is_kept
):
    """A line that comes and goes would never have the fifty frames that a figure takes."""
    calibrated = np.linspace(0, 0.1, 100, dtype=np.float32)
    calibration = Calibration.from_good_parts(calibrated, calibrated, 0.0)
    for served in ("d", digest):
        telemetry.line_leaves("demo_line")
        telemetry.line_serves("demo_line", "4", served, "1", "cpu", calibration)
        for _ in range(30):
            telemetry.inspected(make_inspection(), encode_s=0.0, total_s=0.1, answered_at=ANSWERED_AT)

    assert ('flawline_score_psi{line="demo_line"}' in metrics(telemetry)) is is_kept


def test_series_when_a_line_begins_then_none_is_not_a_number(telemetry):
    """One NaN in a day's history makes NaN of its mean, and the alerts that compare with it blind for that day."""
    calibrated = np.linspace(0, 0.1, 100, dtype=np.float32)
    calibration = Calibration.from_good_parts(calibrated, calibrated, 0.0)
    drift = tuple(f'flawline_{name}{{line="demo_line"' for name in ("review_ratio", "score_psi", "image_quality"))

    def told():
        samples = metrics(telemetry)
        assert not [name for name, value in samples.items() if math.isnan(value)]
        return [name for name in samples if name.startswith(drift)]

    telemetry.line_serves("demo_line", "4", "d", "1", "cpu", None)
    started = told()
    telemetry.inspected(make_inspection(), encode_s=0.0, total_s=0.1, answered_at=ANSWERED_AT)
    judged = told()
    telemetry.line_serves("demo_line", "5", "e", "1", "cpu", calibration)
    replaced = told()

    assert started == replaced == []
    assert len(judged) == 1 + 4  # the share, and what was measured of the picture


def test_image_quality_when_frames_come_fast_then_one_a_second_is_measured():
    """Watching the pictures costs the same whether a line is slow or fast."""
    clock = FakeClock()
    telemetry = Telemetry(clock)
    telemetry.declare_line("demo_line")
    telemetry.line_serves("demo_line", "4", "d", "1", "cpu", None)
    seen = []
    for grey in (40, 80, 120, 160):
        canvas = np.full((300, 400, 3), grey, np.uint8)
        telemetry.inspected(make_inspection(canvas=canvas), encode_s=0.0, total_s=0.1, answered_at=ANSWERED_AT)
        seen.append(metrics(telemetry)['flawline_image_quality{line="demo_line",stat="brightness"}'])
        clock.advance(0.6)

    assert seen[0] == pytest.approx(40 / 255, abs=1e-6)
    assert seen[1] == seen[0]
    assert seen[2] > seen[1]
    assert seen[3] == seen[2]
    names = {name for name in metrics(telemetry) if name.startswith("flawline_image_quality")}
    assert len(names) == 4


@pytest.mark.parametrize(
    "accepted", ["application/openmetrics-text; version=1.0.0", "application/openmetrics-text;version=x"]
)
def test_exposition_when_openmetrics_is_asked_for_then_latencies_lead_to_their_inspection(telemetry, accepted):
    """Exemplars name the inspection, so that a slow one is found in the log."""
    telemetry.inspected(make_inspection(), encode_s=0.0, total_s=0.5, answered_at=ANSWERED_AT)

    body, content_type = telemetry.exposition(accepted)

    assert content_type.startswith("application/openmetrics-text")
    assert b'# {inspection_id="' + b"0" * 32 in body
    assert b"inspection_id" not in telemetry.exposition()[0]


def test_snapshot_when_frames_come_before_it_is_written_down_then_says_what_was(telemetry):
    """A thread may take its time to write, and is disturbed by nothing."""
    telemetry.inspected(make_inspection(), encode_s=0.0, total_s=0.5, answered_at=ANSWERED_AT)
    taken = telemetry.snapshot()
    before = taken.exposition()

    for _ in range(100):
        telemetry.inspected(make_inspection(), encode_s=0.0, total_s=0.5, answered_at=ANSWERED_AT)
        telemetry.declare_line("another_line")

    assert taken.exposition() == before
    assert b"another_line" in telemetry.exposition()[0]


def test_engine_when_batches_run_then_gauges_move(telemetry):
    """Batch sizes, depth and discarded frames are kept for each engine."""
    meter = telemetry.engine("engine")

    meter.batch(3)
    meter.depth(7)
    meter.discard("late")

    samples = metrics(telemetry)
    assert samples['flawline_batch_size_sum{engine="engine"}'] == 3
    assert samples['flawline_queue_depth{engine="engine"}'] == 7
    assert samples['flawline_discarded_total{engine="engine",reason="late"}'] == 1
    assert samples['flawline_discarded_total{engine="engine",reason="caller_left"}'] == 0


def test_exposition_when_nothing_happened_then_counters_start_at_zero(telemetry):
    """What alerts watch for exists before it first happens."""
    samples = metrics(telemetry)

    assert samples["flawline_golden_failures_total"] == 0
    assert samples['flawline_records_dropped_total{sink="heatmaps"}'] == 0
    assert not [name for name in samples if name.endswith("_created")]


@pytest.mark.parametrize(
    ("score", "fail_threshold", "units"),
    [(0.2, 0.2, 1), (0.1, 0.2, 0.5), (-2.0, -2.0, 1), (-4.0, -2.0, 0), (-1.0, -2.0, 1.5)],
)
def test_in_units_when_threshold_has_any_sign_then_one_is_at_it(score, fail_threshold, units):
    """Raw scores may be negative; still 1 is at the threshold and more is more anomalous."""
    policy = make_policy(review_threshold=fail_threshold, fail_threshold=fail_threshold)

    assert in_units(score, policy) == pytest.approx(units)


def test_in_units_when_threshold_is_zero_then_stays_ordered():
    """A threshold of zero is no division by zero."""
    policy = make_policy(review_threshold=0.0, fail_threshold=0.0)

    assert in_units(-0.1, policy) < in_units(0.0, policy) == 1 < in_units(0.1, policy)
