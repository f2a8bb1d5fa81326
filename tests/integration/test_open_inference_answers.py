"""Answers under `/v2`: what they say of bundle and policy counts for each frame of the request."""

import asyncio
from base64 import b64encode

import httpx

from service.app import create_app
from service.settings import Settings
from tests.factories import encode, make_bundle, make_frame, make_policy
from tests.fakes import in_loop
from tests.servers import serve_held, wait_until


@in_loop
async def test_infer_when_another_policy_becomes_live_between_two_frames_then_it_is_to_be_sent_again(tmp_path):
    """One policy and its digest are named for all frames, so all of them were judged by it."""
    make_bundle(tmp_path, "demo_line")
    (tmp_path / "demo_line/policies").mkdir()
    strict = make_policy(version="strict", review_threshold=0, fail_threshold=0)
    (tmp_path / "demo_line/policies/strict.json").write_text(strict.model_dump_json())
    app = create_app(Settings(store_directory=tmp_path))
    context = app.state.context
    context.registry.load()
    inspect, one_by_one = context.pipeline.inspect, asyncio.Lock()

    async def then_activate(work, **options):
        async with one_by_one:
            inspection = await inspect(work, **options)
            await asyncio.to_thread(context.registry.activate_policy, "demo_line", "strict")
            return inspection

    context.pipeline.inspect = then_activate
    frame = b64encode(encode(make_frame())).decode()
    images = {"name": "encoded_frames", "datatype": "BYTES", "shape": [2], "data": [frame, frame]}
    asked = {"inputs": [images | {"parameters": {"content_type": "base64"}}]}

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        mixed = await http.post("/v2/models/demo_line/infer", json=asked)
        again = await http.post("/v2/models/demo_line/infer", json=asked)
    context.registry.close()

    assert (mixed.status_code, again.status_code) == (503, 200)
    assert "send it again" in mixed.json()["error"]
    assert again.json()["parameters"]["policy"] == "strict"


def test_infer_when_one_frame_has_no_verdict_then_the_others_count_as_of_a_failed_request(tmp_path):
    """Whose caller waits, and is answered, is not counted as one that left, neither waiting nor running."""
    make_bundle(tmp_path, "demo_line")
    frames = [b64encode(data).decode() for data in (b"junk", *[encode(make_frame())] * 4)]
    images = {"name": "encoded_frames", "datatype": "BYTES", "shape": [5], "data": frames}
    asked = {"inputs": [images | {"parameters": {"content_type": "base64"}}]}

    with serve_held(tmp_path, runners=1) as (http, engine):
        engine.hold()
        failed = http.post("/v2/models/demo_line/infer", json=asked)
        engine.release()
        counted = 'flawline_discarded_total{engine="demo_line",reason="request_failed"} 4.0'
        wait_until(lambda: counted in http.get("/metrics").text, "the count")
        told = http.get("/metrics").text

    assert failed.status_code == 400
    assert 'flawline_discarded_total{engine="demo_line",reason="caller_left"} 0.0' in told
