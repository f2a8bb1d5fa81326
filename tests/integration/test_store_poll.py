"""Promises of looking at the store again and again: what is new serves, and what does not hold is told of and left."""

from service.settings import Settings
from tests.factories import encode, make_bundle, make_frame, write_files
from tests.servers import serve_in_thread, wait_until, wait_until_ready

INSPECT = "/v1/lines/demo_line/inspect"
PNG = {"Content-Type": "image/png"}
GOOD = encode(make_frame())


def test_store_when_it_is_polled_then_new_versions_serve_and_refused_ones_are_listed(tmp_path):
    """Without a restart and without an administrator: version 3 is refused, 4 takes over, and frames go on."""
    make_bundle(tmp_path)

    with serve_in_thread(Settings(store_directory=tmp_path, store_poll_s=0.05)) as http:
        wait_until_ready(http)

        def stands():
            versions = http.get("/v1/lines/demo_line/versions").json()["versions"]
            return {one["version"]: (one["state"], one["reason"]) for one in versions}

        write_files(tmp_path / "demo_line" / "3", {"manifest.json": b"{}"})
        wait_until(lambda: stands()["3"][0] == "refused", "the refusal")
        refused = stands()
        make_bundle(tmp_path, version="4")
        wait_until(lambda: stands()["4"][0] == "live", "the new version")
        now = http.post(INSPECT, content=GOOD, headers=PNG).json()
        named = http.post(INSPECT, content=GOOD, headers=PNG | {"X-Bundle-Version": "1"}).json()
        ready = http.get("/healthz/ready").status_code

    assert refused["1"] == ("live", None)
    assert "manifest" in refused["3"][1]
    assert set(refused) == {"1", "3"}
    assert (now["bundle"]["version"], now["verdict"]) == ("4", "PASS")
    assert (named["bundle"]["version"], named["verdict"]) == ("1", "PASS")
    assert ready == 200
