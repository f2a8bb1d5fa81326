"""What administrators do takes its time, and no request waits for it."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx

from service.app import create_admin_app, create_app
from service.engines.ort import OrtEngine
from service.settings import Settings
from tests.callers import ADMIN, write_keys
from tests.factories import make_bundle
from tests.fakes import in_loop
from tests.servers import PATIENCE_S


@in_loop
async def test_change_when_it_takes_long_then_it_holds_no_thread_that_requests_need(tmp_path):
    """Changes wait for each other, a slow one for its device, and what requests do in threads goes on beside them."""
    may_open, opens = threading.Event(), threading.Event()

    def open_engine(bundle):
        if bundle.manifest.version == "2":
            opens.set()
            may_open.wait(PATIENCE_S)
        return OrtEngine(bundle)

    store = tmp_path / "store"
    make_bundle(store)
    settings = Settings(store_directory=store, keys_file=write_keys(tmp_path))
    app = create_app(settings, open_engine=open_engine)
    app.state.context.registry.load()
    make_bundle(store, version="2")
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    async with _client(create_admin_app(app)) as admin, _client(app) as http:
        changing = [
            asyncio.create_task(admin.post("/v1/bundles/demo_line/activate?version=2", headers=ADMIN)) for _ in range(2)
        ]
        await asyncio.to_thread(opens.wait, PATIENCE_S)
        line = await http.get("/v1/lines/demo_line", headers=ADMIN)
        may_open.set()
        changed = await asyncio.gather(*changing)

    assert line.json()["live"]["bundle"]["version"] == "1"
    assert [answer.status_code for answer in changed] == [200, 200]
    app.state.context.registry.close()


@in_loop
async def test_change_when_another_one_waits_for_the_store_then_it_is_made_at_once(tmp_path):
    """Whoever steps back is not held up by somebody who asks a store that does not answer."""
    asked, answers = threading.Event(), threading.Event()

    def hang(*_):
        asked.set()
        answers.wait(PATIENCE_S)

    store = tmp_path / "store"
    make_bundle(store)
    app = create_app(Settings(store_directory=store, keys_file=write_keys(tmp_path)))
    registry = app.state.context.registry
    registry.load()
    make_bundle(store, version="2")
    registry.rescan()
    registry._catalogue._store.refresh = hang
    async with _client(create_admin_app(app)) as admin:
        looking = asyncio.create_task(admin.post("/v1/rescan", headers=ADMIN))
        await asyncio.to_thread(asked.wait, PATIENCE_S)
        changed = await admin.post("/v1/bundles/demo_line/roll-back", headers=ADMIN)
        is_hanging = not looking.done() and not answers.is_set()
        answers.set()
        await looking

    assert (changed.status_code, is_hanging) == (200, True)
    assert registry.serving("demo_line", None).bundle.manifest.version == "1"
    registry.close()


def _client(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
