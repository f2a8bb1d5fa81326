"""Promises of the pipeline, on a real bundle: the validated verdict, on time, and the place given back."""

import asyncio
import hashlib
import threading
import time
from functools import partial

import numpy as np
import pytest

from service.contract.bundle import load_bundle
from service.contract.frames import FrameLimits, decode_image, fit_to_input, read_frame
from service.contract.policy import Verdict
from service.errors import (
    DeadlinePassed,
    FrameTooLarge,
    LineNotReady,
    Overloaded,
    ParameterInvalid,
    UnknownLine,
    UnreadableFrame,
)
from service.inspection import RawLayout
from service.scheduling.schedule import Priority, RunTimes
from tests.factories import (
    FRAME_HEIGHT,
    FRAME_WIDTH,
    HEIGHT,
    WIDTH,
    encode,
    make_bundle,
    make_frame,
    make_policy,
    make_runner,
    reseal,
)
from tests.fakes import in_loop
from tests.gated_engine import GatedEngine
from tests.inspections import make_request
from tests.pipelines import assert_golden_frames_hold
from tests.pipelines import open_pipeline as open_with_limits

LIMITS = FrameLimits(max_bytes=100_000, max_pixels=10_000)
open_pipeline = partial(open_with_limits, limits=LIMITS)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return a store with one line that has a policy of its own, and two lines that share a bundle."""
    store = tmp_path_factory.mktemp("store")
    make_bundle(store, "demo_line", margin=4)
    make_bundle(store, "pair", lines=("left", "right"), conditional=True)
    policies = store / "demo_line" / "policies"
    policies.mkdir()
    harsh = make_policy(version="harsh", review_threshold=0, fail_threshold=0)
    (policies / "harsh.json").write_text(harsh.model_dump_json())
    return store


@pytest.mark.parametrize(("defect", "verdict"), [(False, Verdict.PASS), (True, Verdict.FAIL)])
@in_loop
async def test_inspect_when_frame_is_answered_then_says_everything(store, defect, verdict):
    """The answer holds the verdict, what made it, where it looked, and how long each stage took."""
    frame = make_frame(defect=defect)
    request = make_request(data=encode(frame))
    async with open_pipeline(store) as (pipeline, registry):
        live = registry.find("demo_line", None, None).line

        inspection = await pipeline.inspect(request)

    bundle = load_bundle(store / "demo_line" / "1")
    scores, maps = make_runner(bundle.model)(fit_to_input(frame, bundle.manifest.input)[None])
    assert inspection.judgement.verdict is verdict
    assert inspection.judgement.score == pytest.approx(float(scores[0]))
    assert bool(inspection.judgement.regions) is defect
    np.testing.assert_allclose(inspection.anomaly_map, maps[0], rtol=1e-6)
    assert inspection.p_value == bundle.calibrations["demo_line"].p_value(inspection.judgement.score)
    assert inspection.request is request
    assert (inspection.line, inspection.bundle_version, inspection.bundle_digest) == (
        "demo_line",
        "1",
        live.bundle.digest,
    )
    assert (inspection.policy_version, inspection.detector, inspection.device) == ("1", "distance_from_good", "cpu")
    assert (inspection.frame.height, inspection.frame.width) == (64, 80)
    assert inspection.window == bundle.manifest.input.window(64, 80)
    assert len(inspection.inspection_id) == 32
    assert list(inspection.timings_s) == ["receive", "decode", "queue", "infer", "postprocess"]
    assert all(seconds >= 0 for seconds in inspection.timings_s.values())
    assert inspection.deadline_s == 20


@in_loop
async def test_inspect_when_golden_frames_are_sent_then_verdicts_are_the_validated_ones(store):
    """What export promised of a frame is what the service says of it."""
    await assert_golden_frames_hold(store)


@pytest.mark.parametrize("padding", [None, 16], ids=["packed", "padded rows"])
@in_loop
async def test_inspect_when_frame_is_raw_then_answer_equals_that_of_the_image(store, padding):
    """Raw sensor bytes and a lossless image of the same pixels get the same score."""
    frame = make_frame(defect=True)
    raw = RawLayout("RGB8", width=80, height=64, stride=None if padding is None else 3 * 80 + padding)
    rows = np.pad(frame.reshape(64, 3 * 80), ((0, 0), (0, padding or 0)), constant_values=255)
    async with open_pipeline(store) as (pipeline, _):
        encoded = await pipeline.inspect(make_request(data=encode(frame)))
        unpacked = await pipeline.inspect(make_request(data=rows.tobytes(), raw=raw))

    assert unpacked.judgement == encoded.judgement


@in_loop
async def test_inspect_when_a_deep_frame_is_raw_then_answer_equals_that_of_the_image(tmp_path):
    """A 12-bit camera's words are the same frame raw and as PNG, on a line that was told of the 12 bits."""
    folder = make_bundle(tmp_path)
    manifest = load_bundle(folder).manifest
    reseal(folder, input=manifest.input.model_copy(update={"bit_depth": 12}))
    words = make_frame(defect=True)[:, :, 0].astype("<u2") * 16
    raw = RawLayout("Mono16", width=80, height=64, stride=None)
    async with open_pipeline(tmp_path) as (pipeline, _):
        encoded = await pipeline.inspect(make_request(data=encode(words)))
        unpacked = await pipeline.inspect(make_request(data=words.tobytes(), raw=raw))
        with pytest.raises(UnreadableFrame, match="more than 12 bits"):
            await pipeline.inspect(make_request(data=(words * 16).tobytes(), raw=raw))

    assert unpacked.judgement == encoded.judgement
    assert unpacked.judgement.verdict is Verdict.FAIL


@in_loop
async def test_inspect_when_data_is_the_networks_input_then_it_is_neither_resized_nor_cropped(store):
    """Pixels of the input's size reach the network as they are, and regions lie on these very pixels."""
    pixels = make_frame(HEIGHT, WIDTH, defect=True)
    scores, maps = make_runner(load_bundle(store / "demo_line" / "1").model)(pixels[None])
    async with open_pipeline(store) as (pipeline, _):
        inspection = await pipeline.inspect(make_request(data=pixels.tobytes(), is_network_input=True))

    [region] = inspection.judgement.regions
    assert inspection.judgement.score == float(scores[0])
    np.testing.assert_array_equal(inspection.anomaly_map, maps[0])
    assert inspection.judgement.verdict is Verdict.FAIL
    assert (inspection.frame.height, inspection.frame.width) == (HEIGHT, WIDTH)
    assert inspection.window == (0, 0, HEIGHT, WIDTH)
    assert (region.x, region.y) == (WIDTH // 2, 3 * HEIGHT // 8)


@pytest.mark.parametrize("decode_workers", [0, 1], ids=["by the runner", "by threads of their own"])
@pytest.mark.parametrize(
    "sent",
    [
        {"data": encode(make_frame())},
        {"data": make_frame().tobytes(), "raw": RawLayout("RGB8", width=80, height=64, stride=None)},
        {"data": make_frame(HEIGHT, WIDTH).tobytes(), "is_network_input": True},
    ],
    ids=["image", "raw", "network input"],
)
@in_loop
async def test_inspect_when_frame_is_answered_then_the_digest_of_its_bytes_is_told(store, sent, decode_workers):
    """Who keeps what the camera sent can prove which file a verdict is about, however it was sent."""
    async with open_pipeline(store, decode_workers=decode_workers) as (pipeline, _):
        inspection = await pipeline.inspect(make_request(**sent))

    assert inspection.frame_digest == hashlib.sha256(sent["data"]).hexdigest()


@pytest.mark.parametrize("change", [-1, 1], ids=["a byte less", "a byte more"])
@in_loop
async def test_inspect_when_data_is_not_the_networks_input_then_refused(store, change):
    """Another number of bytes than the network takes is no frame."""
    data = bytes(HEIGHT * WIDTH * 3 + change)
    async with open_pipeline(store) as (pipeline, _):
        with pytest.raises(UnreadableFrame, match="32 x 48"):
            await pipeline.inspect(make_request(data=data, is_network_input=True))


@in_loop
async def test_inspect_when_jpeg_is_large_then_sees_the_pixels_that_calibration_sees(store):
    """The service decodes a JPEG at the same reduced scale as training does."""
    data = encode(make_frame(96, 100, defect=True), "JPEG", quality=95)
    bundle = load_bundle(store / "demo_line" / "1")
    pixels = decode_image(data, LIMITS, bundle.manifest.input.resize_target).pixels
    expected = make_runner(bundle.model)(fit_to_input(pixels, bundle.manifest.input)[None])[0][0]
    async with open_pipeline(store) as (pipeline, _):
        inspection = await pipeline.inspect(make_request(data=data))

    assert inspection.judgement.score == pytest.approx(float(expected), rel=1e-6)


@in_loop
async def test_inspect_when_policy_is_named_then_it_judges(store):
    """Another policy changes the verdict and is named in the answer; the score stays."""
    async with open_pipeline(store) as (pipeline, _):
        usual = await pipeline.inspect(make_request())
        harsh = await pipeline.inspect(make_request(policy_version="harsh"))

    assert (usual.judgement.verdict, harsh.judgement.verdict) == (Verdict.PASS, Verdict.FAIL)
    assert usual.judgement.score == harsh.judgement.score
    assert harsh.policy_version == "harsh"
    assert harsh.policy_digest != usual.policy_digest


@pytest.mark.parametrize("decode_workers", [0, 2], ids=["runners decode", "others decode"])
@in_loop
async def test_inspect_when_lines_share_an_engine_then_each_is_judged_as_its_own(store, decode_workers):
    """The network is told which line a frame belongs to, also inside one batch."""
    async with open_pipeline(store, decode_workers=decode_workers) as (pipeline, _):
        answers = await asyncio.gather(*(pipeline.inspect(make_request(line=x)) for x in ("left", "right")))

    frame = fit_to_input(make_frame(), load_bundle(store / "pair" / "1").manifest.input)[None]
    model = load_bundle(store / "pair" / "1").model
    expected = [float(make_runner(model)(frame, np.array([index], np.int64))[0][0]) for index in (0, 1)]
    assert [answer.judgement.score for answer in answers] == pytest.approx(expected, rel=1e-6)
    assert expected[0] != expected[1]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"line": "nobody"}, UnknownLine),
        ({"data": b"no image"}, UnreadableFrame),
        ({"data": b"x" * 200_000}, FrameTooLarge),
        ({"deadline_s": 31.0}, ParameterInvalid),
        ({"deadline_s": 0.0}, ParameterInvalid),
        ({"deadline_s": float("nan")}, ParameterInvalid),
        ({"received_at": 0.0, "deadline_s": 1.0}, Overloaded),
        ({"data": b"1234", "raw": RawLayout("Mono8", 3, 3, None)}, UnreadableFrame),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("decode_workers", [0, 2], ids=["by the runner", "step by step"])
@in_loop
async def test_inspect_when_request_can_not_be_served_then_raises_and_gives_the_place_back(
    store, changes, error, decode_workers
):
    """With a single place, the next frame is answered whatever was wrong with the one before."""
    async with open_pipeline(store, max_queue_size=1, decode_workers=decode_workers) as (pipeline, _):
        for _attempt in range(2):
            with pytest.raises(error):
                await pipeline.inspect(make_request(**changes))
        inspection = await pipeline.inspect(make_request())

    assert inspection.judgement.verdict is Verdict.PASS


@in_loop
async def test_inspect_when_runners_decode_then_says_what_is_said_step_by_step(store):
    """Which thread decodes and judges changes nothing of an answer but its times."""
    said = []
    for decode_workers in (0, 2):
        async with open_pipeline(store, decode_workers=decode_workers) as (pipeline, _):
            inspection = await pipeline.inspect(make_request(data=encode(make_frame(defect=True))))
        said.append((inspection.judgement, inspection.window, inspection.p_value, inspection.frame.height))
        assert inspection.timings_s["decode"] > 0

    assert said[0] == said[1]
    assert said[0][0].verdict is Verdict.FAIL


@in_loop
async def test_inspect_when_a_bad_frame_shares_a_batch_then_only_it_is_refused(store):
    """A runner that decodes leaves out what can't be read, and runs the frames beside it."""
    gated = GatedEngine()
    async with open_pipeline(store, gated.open, runners=1, decode_workers=0) as (pipeline, registry):
        batcher = registry.find("demo_line", None, None).line.bundle.batcher
        batcher._queue.run_times = RunTimes((0.001,) * 4)  # batches pay
        gated.hold()
        first = asyncio.ensure_future(pipeline.inspect(make_request()))
        await asyncio.to_thread(gated.started.acquire)
        data = [encode(make_frame()), encode(make_frame())[:-40], encode(make_frame())]
        frames = [asyncio.ensure_future(pipeline.inspect(make_request(data=each))) for each in data]
        await asyncio.sleep(0)
        gated.release()
        outcomes = await asyncio.gather(first, *frames, return_exceptions=True)

    assert isinstance(outcomes[2], UnreadableFrame)
    assert [outcomes[index].batch_size for index in (1, 3)] == [2, 2]
    assert {outcomes[index].judgement.verdict for index in (0, 1, 3)} == {Verdict.PASS}


@in_loop
async def test_inspect_when_engine_hangs_then_deadline_passes_on_time_and_place_is_given_back(store):
    """The caller waits no longer than its deadline, and the place is free again."""
    gated = GatedEngine()
    async with open_pipeline(store, gated.open, max_queue_size=1) as (pipeline, registry):
        gated.hold()
        began_at = time.monotonic()

        with pytest.raises(DeadlinePassed):
            await pipeline.inspect(make_request(deadline_s=0.1))
        waited_s = time.monotonic() - began_at
        gated.release()
        inspection = await pipeline.inspect(make_request())
        places = registry.find("demo_line", None, None).line.bundle.batcher._places

    assert waited_s < 5
    assert inspection.judgement.verdict is Verdict.PASS
    assert not places


@in_loop
async def test_inspect_when_decoding_is_behind_then_deadline_covers_it(store):
    """A frame that waits for a decoder is told at its deadline, too."""
    async with open_pipeline(store) as (pipeline, _):
        gate = threading.Event()
        holding = [asyncio.ensure_future(pipeline._decoders.run("demo_line", gate.wait)) for _ in range(2)]
        await asyncio.sleep(0)

        with pytest.raises(DeadlinePassed):
            await pipeline.inspect(make_request(deadline_s=0.1))
        gate.set()
        await asyncio.gather(*holding)
        inspection = await pipeline.inspect(make_request())

    assert inspection.judgement.verdict is Verdict.PASS


@pytest.mark.parametrize("decode_workers", [0, 1], ids=["by the runner", "by threads of their own"])
@in_loop
async def test_inspect_when_decoding_a_frame_does_not_end_then_it_is_refused_and_the_line_goes_on(
    store, monkeypatch, decode_workers
):
    """Whatever a codec finds in one caller's frame, the engine is not lost over it, and other frames are judged."""
    gate, kept = threading.Event(), b"kept"

    def read_or_hang(data, limits, spec):
        if data == kept:
            gate.wait()
        return read_frame(data, limits, spec)

    monkeypatch.setattr("service.pipeline.read_frame", read_or_hang)
    async with open_pipeline(store, runners=1, decode_workers=decode_workers, stuck_after_s=0.1) as (
        pipeline,
        registry,
    ):
        with pytest.raises(UnreadableFrame, match="could not be decoded"):
            await pipeline.inspect(make_request(data=kept))
        inspection = await pipeline.inspect(make_request())
        gate.set()

        assert inspection.judgement.verdict is Verdict.PASS
        assert registry.is_ready
        assert not registry.is_lost


@in_loop
async def test_inspect_when_draining_then_answers_what_was_accepted_and_refuses_the_rest(store):
    """No accepted frame is lost by a drain."""
    gated = GatedEngine()
    async with open_pipeline(store, gated.open) as (pipeline, registry):
        gated.hold()
        accepted = [asyncio.ensure_future(pipeline.inspect(make_request())) for _ in range(4)]
        await asyncio.to_thread(gated.started.acquire)
        draining = asyncio.ensure_future(registry.drain())
        await asyncio.sleep(0)

        with pytest.raises(LineNotReady):
            await pipeline.inspect(make_request())
        gated.release()
        await draining
        inspections = await asyncio.gather(*accepted)

    assert [i.judgement.verdict for i in inspections] == [Verdict.PASS] * 4


@pytest.mark.parametrize(("heatmap", "kept"), [("none", (HEIGHT, WIDTH)), ("overlay", (FRAME_HEIGHT, FRAME_WIDTH))])
@in_loop
async def test_inspect_when_no_heatmap_is_wanted_then_only_the_networks_pixels_are_kept(store, heatmap, kept):
    """Large frames that wait for their run hold their full pixels only where a picture is drawn of them."""
    async with open_pipeline(store) as (pipeline, _):
        inspection = await pipeline.inspect(make_request(heatmap=heatmap))

    assert inspection.frame.pixels.shape[:2] == kept
    assert (inspection.frame.height, inspection.frame.width) == (FRAME_HEIGHT, FRAME_WIDTH)


@in_loop
async def test_inspect_when_frames_that_matter_less_wait_already_then_one_that_matters_goes_before_them(store):
    """An archive that is sent again must not keep a part at the line waiting."""
    gated, ended = GatedEngine(), []
    options = {"runners": 1, "max_batch_size": 1, "decode_workers": 0}
    async with open_pipeline(store, gated.open, **options) as (pipeline, _):

        async def inspect(name, priority):
            await pipeline.inspect(make_request(priority=priority))
            ended.append(name)

        gated.hold()
        frames = [asyncio.ensure_future(inspect("running", Priority.NORMAL))]
        await asyncio.to_thread(gated.started.acquire)
        for name, priority in (("archive", Priority.LOW), ("line", Priority.NORMAL)):
            frames.append(asyncio.ensure_future(inspect(name, priority)))
            await asyncio.sleep(0)
        gated.release()
        await asyncio.gather(*frames)

    assert ended == ["running", "line", "archive"]
