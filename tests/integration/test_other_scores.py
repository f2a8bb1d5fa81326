"""A policy that scores frames otherwise than the line was calibrated: verdicts as it says, and nothing promised."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.app import create_app
from service.settings import Settings
from tests.factories import encode, make_bundle, make_frame, make_policy, make_self_policy, network_of, write_policy
from tests.fakes import in_loop
from tests.inspections import make_inspection

LEFT_HALF = (((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)),)
POLICIES = {
    "strict": make_policy(version="strict", review_threshold=0.08, fail_threshold=0.15),
    "left": make_policy(version="left", region_of_interest=LEFT_HALF),
    "by_itself": make_self_policy(version="by_itself"),
}


@pytest.mark.parametrize(("version", "promises"), [("strict", True), ("left", False), ("by_itself", False)])
@in_loop
async def test_policy_when_it_scores_otherwise_than_calibration_did_then_nothing_is_promised(
    tmp_path, version, promises
):
    """Without scores to compare with there is no p-value, no rate and no drift; with other thresholds there is."""
    write_policy(tmp_path, POLICIES[version], network_of(make_bundle(tmp_path)))
    app = create_app(Settings(store_directory=tmp_path))
    context = app.state.context
    context.registry.load()
    context.registry.activate_policy("demo_line", version)
    for _ in range(50):  # from so many on, drift is told
        frame = make_inspection(bundle_version="1", policy_version=version)
        context.telemetry.inspected(frame, encode_s=0.0, total_s=0.1, answered_at=0.0)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        frame, headers = encode(make_frame()), {"Content-Type": "image/png"}
        answer = (await http.post("/v1/lines/demo_line/inspect", content=frame, headers=headers)).json()
        live = (await http.get("/v1/lines/demo_line")).json()["live"]
        text = (await http.get("/metrics")).text
    context.registry.close()

    fail, calibration = live["thresholds"]["fail"], POLICIES[version].calibration
    [drift] = [one for one in text_string_to_metric_families(text) if one.name == "flawline_score_psi"]
    assert answer["verdict"] == "PASS"
    assert (answer["calibration"], live["calibration"]) == (calibration, calibration)
    assert (answer["p_value"] is not None) is promises
    assert (fail["false_reject_rate"] is not None, fail["good_parts"] > 0) == (promises, promises)
    assert (fail["false_reject_bound"] is not None) is promises
    assert bool(drift.samples) is promises
