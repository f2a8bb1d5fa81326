"""Promises of frames that are cut into tiles: one frame, one place, one answer, the one that was validated."""

import numpy as np
import pytest

from service.contract.bundle import load_bundle
from service.contract.frames import fit_to_input
from service.contract.geometry import Tiling
from service.contract.policy import Verdict
from service.contract.tiling import by_tiles
from service.engines.engine import EngineOutput
from service.engines.ort import OrtEngine
from service.errors import EngineFailed, UnreadableFrame
from service.inspection import RawLayout
from tests.factories import encode, make_bundle, make_frame, make_runner
from tests.fakes import in_loop
from tests.inspections import make_request
from tests.pipelines import assert_golden_frames_hold, open_pipeline

TILES = Tiling(rows=2, columns=3, overlap_height=8, overlap_width=12)
HEIGHT, WIDTH = 120, 200


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return a store with one line whose frames are cropped and cut, and one that also has a region of interest."""
    store = tmp_path_factory.mktemp("store")
    make_bundle(store, "demo_line", tiles=TILES, margin=3)
    right_half = (((0.5, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0)),)
    make_bundle(store, "right_half", tiles=TILES, margin=3, policy={"region_of_interest": right_half})
    return store


class _Remembering:
    """Counts the network inputs of every run, and may answer with one too few."""

    def __init__(self, bundle, *, forgets=False):
        self._engine, self._forgets = OrtEngine(bundle), forgets
        self.device, self.provider, self.precision = "cpu", "fake", "fp32"
        self.alone, self.size_bytes = None, 0
        self.sizes, self.is_live = [], False

    def run(self, frames, line_index):
        self.sizes.append(len(frames))
        output = self._engine.run(frames, line_index)
        short = -1 if self._forgets and self.is_live else None
        return EngineOutput(output.scores[:short], output.anomaly_maps[:short])


def offline(store, line, frame):
    """Answer a frame as training does."""
    bundle = load_bundle(store / line / "1")
    manifest = bundle.manifest
    run = by_tiles(make_runner(bundle.model), manifest.input, manifest.output.score_rule)
    scores, maps = run(fit_to_input(frame, manifest.input)[None], np.zeros(1, np.int64))
    return scores[0], maps[0]


@pytest.mark.parametrize(("defect", "verdict"), [(False, Verdict.PASS), (True, Verdict.FAIL)])
@in_loop
async def test_inspect_when_frames_are_cut_then_answers_the_whole_frame_as_training_did(store, defect, verdict):
    """Score and map are those of the stitched frame, and regions lie in its own pixels."""
    frame = make_frame(HEIGHT, WIDTH, defect=defect)
    async with open_pipeline(store) as (pipeline, _):
        inspection = await pipeline.inspect(make_request(data=encode(frame)))

    score, anomaly_map = offline(store, "demo_line", frame)
    assert inspection.judgement.verdict is verdict
    assert inspection.judgement.score == pytest.approx(float(score), rel=1e-6)
    np.testing.assert_allclose(inspection.anomaly_map, anomaly_map, rtol=1e-6)
    assert inspection.anomaly_map.shape == (28, 60)
    assert bool(inspection.judgement.regions) is defect
    for region in inspection.judgement.regions[:1]:
        cell = 2 * max(HEIGHT / 62, WIDTH / 126)
        assert (region.y, region.x) == (pytest.approx(3 * HEIGHT / 8, abs=cell), pytest.approx(WIDTH / 2, abs=cell))


@in_loop
async def test_inspect_when_golden_frames_are_sent_then_verdicts_are_the_validated_ones(store):
    """What export promised of a cut frame is what the service says of it, many of them at once."""
    await assert_golden_frames_hold(store)


@pytest.mark.parametrize("kind", ["raw", "canvas"])
@in_loop
async def test_inspect_when_the_frame_needs_no_decoder_then_is_cut_alike(store, kind):
    """Raw pixels are resized and cut as an image is; a frame of the canvas's own size is only cut."""
    spec = load_bundle(store / "demo_line" / "1").manifest.input
    size = (spec.canvas_height, spec.canvas_width) if kind == "canvas" else (HEIGHT, WIDTH)
    frame = make_frame(*size, defect=True)
    sent = {"raw": RawLayout("RGB8", WIDTH, HEIGHT, None)} if kind == "raw" else {"is_network_input": True}
    async with open_pipeline(store) as (pipeline, _):
        inspection = await pipeline.inspect(make_request(data=frame.tobytes(), **sent))

    if kind == "raw":
        assert inspection.judgement.score == pytest.approx(float(offline(store, "demo_line", frame)[0]), rel=1e-6)
    assert inspection.judgement.verdict is Verdict.FAIL
    assert (inspection.frame.height, inspection.frame.width) == size


@in_loop
async def test_inspect_when_a_single_tile_is_sent_then_refused(store):
    """A tile is no frame: whoever skips the decoder sends the canvas."""
    async with open_pipeline(store) as (pipeline, _):
        with pytest.raises(UnreadableFrame, match="56 x 120"):
            await pipeline.inspect(make_request(data=bytes(32 * 48 * 3), is_network_input=True))


@in_loop
async def test_inspect_when_frames_are_cut_then_all_tiles_of_a_frame_run(store):
    """Six tiles weigh six: they may run together although they are more than the largest batch, and none is lost."""
    engines = []

    def remember(bundle):
        engines.append(_Remembering(bundle))
        return engines[-1]

    async with open_pipeline(store, remember) as (pipeline, _):
        for engine in engines:
            engine.sizes.clear()

        await pipeline.inspect(make_request(data=encode(make_frame(HEIGHT, WIDTH))))

    assert sum(sum(engine.sizes) for engine in engines) == 6


@in_loop
async def test_inspect_when_a_tile_gets_no_answer_then_there_is_no_verdict(store):
    """A frame of which a part was not looked at is never a good part."""
    engines = []

    def forget(bundle):
        engines.append(_Remembering(bundle, forgets=True))
        return engines[-1]

    async with open_pipeline(store, forget) as (pipeline, _):
        for engine in engines:
            engine.is_live = True
        with pytest.raises(EngineFailed):
            await pipeline.inspect(make_request(data=encode(make_frame(HEIGHT, WIDTH))))


@pytest.mark.parametrize(("at", "verdict"), [(20, Verdict.PASS), (140, Verdict.FAIL)], ids=["outside", "inside"])
@in_loop
async def test_inspect_when_there_is_a_region_of_interest_then_it_lies_on_the_whole_frame(store, at, verdict):
    """Polygons refer to the frame, whatever is cropped from it and wherever tiles meet."""
    frame = make_frame(HEIGHT, WIDTH)
    frame[40:80, at : at + 40] = 250
    async with open_pipeline(store) as (pipeline, _):
        inspection = await pipeline.inspect(make_request(line="right_half", data=encode(frame)))

    assert inspection.judgement.verdict is verdict
