"""Questions about models under `/v2`: the truth about what a frame would find, and nothing happens for them."""

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
async def test_model_when_it_made_room_for_another_then_questions_about_it_load_nothing(tmp_path):
    """Probes that ask for every model must not have them take each other's place in turn, with no frame in sight."""
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
            for question in ("/ready", "", "/config", "/stats", "/versions/1/ready")
        }
    registry.close()

    assert {answer.status_code for (name, _), answer in answers.items() if name == "two"} == {200}
    out = [answer for (name, _), answer in answers.items() if name == "one"]
    assert {answer.status_code for answer in out} == {503}
    assert all("as soon as a frame comes" in answer.json()["error"] for answer in out)
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
