"""A frame that shows no picture has no verdict, by whichever way it comes and whatever the detector says of it."""

import numpy as np
import pytest

from service.contract.geometry import Tiling
from service.errors import FrameNotComparable
from service.inspection import RawLayout
from service.settings import Settings
from tests.factories import FRAME_HEIGHT, FRAME_WIDTH, HEIGHT, WIDTH, encode, make_bundle, make_frame
from tests.fakes import in_loop
from tests.inspections import make_request
from tests.pipelines import open_pipeline
from tests.servers import serve_in_thread, wait_until_ready

# So high that whatever the detector says of a frame without a picture is far below.
LAX = {"review_threshold": 9.0, "fail_threshold": 9.0}
NOISE = np.random.default_rng(0).integers(0, 3, (FRAME_HEIGHT, FRAME_WIDTH, 3), dtype=np.uint8)
BLANK = {
    "black": np.zeros_like(NOISE),
    "white": np.full_like(NOISE, 255),
    "grey": np.full_like(NOISE, 110),
    "dark noise": NOISE,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with a line that passes whatever is judged, and one whose frames are cut."""
    store = tmp_path_factory.mktemp("store")
    make_bundle(store, policy=LAX)
    make_bundle(store, "cut", tiles=Tiling(rows=2, columns=2, overlap_height=8, overlap_width=12), policy=LAX)
    return store


@pytest.mark.parametrize("decode_workers", [0, 2], ids=["in the runner", "apart"])
@pytest.mark.parametrize("line", ["demo_line", "cut"])
@pytest.mark.parametrize("pixels", BLANK.values(), ids=BLANK.keys())
@in_loop
async def test_frame_when_it_shows_no_picture_then_no_verdict(store, pixels, line, decode_workers):
    """Thresholds of good parts know nothing of a covered lens."""
    async with open_pipeline(store, decode_workers=decode_workers) as (pipeline, _):
        with pytest.raises(FrameNotComparable, match="covered lens or without light"):
            await pipeline.inspect(make_request(line=line, data=encode(pixels)))
        good = await pipeline.inspect(make_request(line=line))

    assert good.judgement.verdict == "PASS"


@pytest.mark.parametrize(
    "fields",
    [
        {"raw": RawLayout("RGB8", FRAME_WIDTH, FRAME_HEIGHT, None), "data": BLANK["black"].tobytes()},
        {"is_network_input": True, "data": bytes(HEIGHT * WIDTH * 3)},
    ],
    ids=["raw", "network input"],
)
@in_loop
async def test_frame_when_it_is_no_image_file_then_it_must_show_a_picture_as_well(store, fields):
    """Raw bytes and tensors of the protocol are frames like others."""
    async with open_pipeline(store) as (pipeline, _):
        with pytest.raises(FrameNotComparable):
            await pipeline.inspect(make_request(**fields))


def test_requests_when_a_frame_shows_no_picture_then_each_way_says_so(store):
    """Alone, in a batch beside a good one, and under the protocol."""
    black, good = encode(BLANK["black"]), encode(make_frame())
    tensor = {"name": "frames", "shape": [1, HEIGHT, WIDTH, 3], "datatype": "UINT8", "data": [0] * (HEIGHT * WIDTH * 3)}
    with serve_in_thread(Settings(store_directory=store)) as http:
        wait_until_ready(http)
        png = {"Content-Type": "image/png"}
        alone = http.post("/v1/lines/demo_line/inspect", content=black, headers=png)
        files = [("frames", (name, data, "image/png")) for name, data in (("a.png", black), ("b.png", good))]
        batch = http.post("/v1/lines/demo_line/inspect-batch", files=files)
        protocol = http.post("/v2/models/demo_line/infer", json={"inputs": [tensor]})

    assert (alone.status_code, alone.json()["code"], alone.json()["verdict"]) == (
        400,
        "frame_not_comparable",
        "NO_VERDICT",
    )
    assert [item["verdict"] for item in batch.json()["items"]] == ["NO_VERDICT", "PASS"]
    assert (protocol.status_code, "covered lens" in protocol.json()["error"]) == (400, True)
