"""Questions about models under `/v2`: what they are told is true of frames to come, and nothing happens for them."""

import httpx
import pytest

from service.app import create_app
from service.engines.ort import OrtEngine
from service.settings import Settings
from tests.factories import make_bundle
from tests.fakes import in_loop


class _Large(OrtEngine):
    """An engine that says that it is larger than half of the memory budget below."""

    def __init__(self, bundle):
        super().__init__(bundle)
        self.size_bytes = 100


def _client(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@in_loop
async def test_model_when_it_made_room_for_another_then_is_told_as_it_was_and_nothing_is_loaded_for_that(tmp_path):
    """Who sends nothing before a model is ready must not wait for ever, nor probes have models take turns in memory."""
    opened = []

    def open_engine(bundle):
        opened.append(bundle.manifest.name)
        return _Large(bundle)

    for name in ("one", "two"):
        make_bundle(tmp_path, name)
    app = create_app(Settings(store_directory=tmp_path, memory_budget_bytes=150), open_engine=open_engine)
    registry = app.state.context.registry
    registry.load()
    used_at = dict(registry._used_at)

    async with _client(app) as http:
        answers = {
            (name, question): await http.get(f"/v2/models/{name}{question}")
            for name in ("one", "two")
            for question in ("/ready", "", "/config", "/stats", "/versions/1/ready", "/versions/2/ready")
        }
        index = (await http.post("/v2/repository/index")).json()
    registry.close()

    told = {question: answer.json() for (name, question), answer in answers.items() if name == "one"}
    others = {question: answer.json() for (name, question), answer in answers.items() if name == "two"}
    not_there = [answer.status_code for (_, question), answer in answers.items() if question == "/versions/2/ready"]
    assert not_there == [503, 404]
    assert {answer.status_code for (_, question), answer in answers.items()} == {200, 503, 404}
    for question in ("/ready", "", "/config", "/versions/1/ready"):
        told[question].get("properties", {}).pop("digest", None)
        others[question].get("properties", {}).pop("digest", None)
        assert told[question] == others[question] | {"name": "one"}
    assert told["/stats"]["model_stats"][0]["version"] == "1"
    assert [(entry["name"], entry["state"]) for entry in index] == [("one", "READY"), ("two", "READY")]
    assert "as soon as a frame comes" in index[0]["reason"]
    assert opened == ["one", "two"]
    assert (registry._asked_again, registry._used_at) == (set(), used_at)


@pytest.mark.parametrize("is_calibrated", [True, False])
@in_loop
async def test_model_when_it_is_not_calibrated_then_it_is_not_ready_and_the_service_is(tmp_path, is_calibrated):
    """No frame would get a verdict, which is no reason to take off a service that has other lines."""
    make_bundle(tmp_path, calibrated=is_calibrated)
    app = create_app(Settings(store_directory=tmp_path))
    app.state.context.registry.load()

    async with _client(app) as http:
        model = await http.get("/v2/models/demo_line/ready")
        [listed] = (await http.post("/v2/repository/index")).json()
        service, healthz = await http.get("/v2/health/ready"), await http.get("/healthz/ready")
    app.state.context.registry.close()

    assert model.status_code == (200 if is_calibrated else 503)
    assert ("flawline calibrate" in model.text) is not is_calibrated
    assert listed["state"] == ("READY" if is_calibrated else "UNAVAILABLE")
    assert (service.status_code, healthz.status_code) == (200, 200)
