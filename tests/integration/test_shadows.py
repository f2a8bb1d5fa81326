"""Promises of shadows: they see answered frames only, give way to everybody, and what they say changes no answer."""

import asyncio
import json
import logging
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from service.contract.frames import FrameLimits
from service.contract.policy import Verdict
from service.lines.ledger import RegistryOptions
from service.lines.loading import BatcherOptions
from service.lines.registry import Registry
from service.observability.log import JsonLines
from service.observability.telemetry import Telemetry
from service.pipeline import Pipeline
from service.scheduling.schedule import Priority
from service.shadows import Shadows
from service.stores.directory import DirectoryStore
from tests.factories import encode, make_bundle, make_frame, make_policy, network_of, write_policy
from tests.fakes import in_loop
from tests.gated_engine import GatedEngine
from tests.inspections import make_request

OPTIONS = BatcherOptions(runners=1, max_batch_size=1, max_queue_size=8, stuck_after_s=20)
DEFECT = encode(make_frame(defect=True))


class Stage:
    """A line whose second version looks on."""

    def __init__(self, store, lines=(), **second):
        make_bundle(store, lines=lines)
        make_bundle(store, version="2", lines=lines, **second)
        self.telemetry = Telemetry()
        self.engine = GatedEngine()
        kept = RegistryOptions(activates_newest=False)
        self.registry = Registry(
            DirectoryStore(store), None, self.engine.open, OPTIONS, self.telemetry, time.monotonic, kept
        )
        self.pipeline = Pipeline(
            self.registry,
            limits=FrameLimits(),
            default_deadline_s=20,
            max_deadline_s=20,
            decode_workers=1,
            stuck_after_s=20,
            tell_of_replaced=self.telemetry.decoder_replaced,
        )
        self.shadows = Shadows(
            self.registry, self.pipeline, self.telemetry, max_kept=2, patience_s=20, clock=time.monotonic
        )

    async def show(self, **request):
        """Inspect a frame, and show it when it is answered."""
        inspection = await self.pipeline.inspect(make_request(**request))
        self.shadows.show(inspection)
        return inspection

    async def looked(self):
        """Wait until nothing is looked at."""
        await asyncio.gather(*self.shadows._looking.values())

    def counts(self):
        """Return the metrics of shadows."""
        text = self.telemetry.exposition()[0].decode()
        return {line for line in text.splitlines() if line.startswith("flawline_shadow")}


@asynccontextmanager
async def on_stage(tmp_path, lines=(), **second):
    """Set the stage, and clear it."""
    stage = Stage(tmp_path, lines, **second)
    await asyncio.to_thread(stage.registry.load)
    await asyncio.to_thread(stage.registry.activate, "demo_line", "1")
    await asyncio.to_thread(stage.registry.start_shadow, "demo_line", "2")
    try:
        yield stage
    finally:
        stage.engine.release()
        await stage.shadows.finish()
        stage.registry.close()
        stage.pipeline.close()


@pytest.mark.parametrize(
    ("second", "frame", "kind"),
    [
        ({}, DEFECT, None),
        ({"policy": {"fail_threshold": 0.9}}, DEFECT, "laxer"),
        ({"policy": {"review_threshold": 0.001, "fail_threshold": 0.002}}, encode(make_frame()), "stricter"),
        ({"height": 64, "width": 96}, DEFECT, None),
    ],
    ids=["same", "laxer", "stricter", "another input"],
)
@in_loop
async def test_shadow_when_it_judges_then_only_disagreements_are_kept_with_both_sides(tmp_path, second, frame, kind):
    """What the shadow would have said is compared with what was answered, by its own network and policy."""
    async with on_stage(tmp_path, **second) as stage:
        inspection = await stage.show(data=frame)
        await stage.looked()

        kept = stage.shadows.disagreements("demo_line")
        counts = stage.counts()

    assert inspection.bundle_version == "1"
    assert 'flawline_shadow_frames_total{line="demo_line",outcome="compared"} 1.0' in counts
    assert [one.kind for one in kept] == ([] if kind is None else [kind])
    for one in kept:
        assert one.inspection_id == inspection.inspection_id
        assert (one.live.bundle_version, one.shadow.bundle_version) == ("1", "2")
        assert one.frame_digest == inspection.frame_digest
        assert one.live.score == pytest.approx(one.shadow.score)
        assert f'flawline_shadow_disagreements_total{{kind="{kind}",line="demo_line"}} 1.0' in counts


@pytest.mark.parametrize("is_broken", [False, True], ids=["judges", "fails"])
@in_loop
async def test_shadow_when_it_disagrees_then_the_log_says_of_which_frame_and_who_by_digests(
    tmp_path, caplog, is_broken
):
    """What a decision on a version rested on outlives the process: both sides can be proved from the log."""

    def fail(_):
        raise OSError

    async with on_stage(tmp_path, policy={"fail_threshold": 0.9}) as stage:
        inspection = await stage.pipeline.inspect(make_request(data=DEFECT))
        tried = stage.registry._state.shadows["demo_line"].lines["demo_line"]
        if is_broken:
            stage.engine.spoil = fail
        with caplog.at_level(logging.INFO, "flawline"):
            stage.shadows.show(inspection)
            await stage.looked()

    (record,) = [record for record in caplog.records if record.message == "a shadow disagrees"]
    line = json.loads(JsonLines().format(record))
    live, shadow = line["live"], line["shadow"]
    told = [line[name] for name in ("inspection_id", "line", "part_id", "frame_digest", "kind")]
    kind = "no_verdict" if is_broken else "laxer"
    assert told == [inspection.inspection_id, "demo_line", "part 7", inspection.frame_digest, kind]
    assert (live["bundle_digest"], live["policy_digest"]) == (inspection.bundle_digest, inspection.policy_digest)
    assert (shadow["bundle_digest"], shadow["policy_digest"]) == (tried.bundle.digest, tried.policies["1"].digest)
    assert (live["verdict"], shadow["verdict"]) == ("FAIL", "NO_VERDICT" if is_broken else "REVIEW")


@in_loop
async def test_shadow_when_the_line_is_busy_then_it_is_shed_and_frames_run_on(tmp_path):
    """A frame that is under way keeps the shadow from looking: it would cost the device what the line needs."""
    async with on_stage(tmp_path) as stage:
        inspection = await stage.pipeline.inspect(make_request())
        stage.engine.hold()
        under_way = asyncio.ensure_future(stage.pipeline.inspect(make_request()))
        await asyncio.to_thread(stage.engine.started.acquire)

        stage.shadows.show(inspection)
        stage.engine.release()

        assert (await under_way).judgement.verdict is Verdict.PASS
        happened = {line for line in stage.counts() if not line.endswith(" 0.0")}
        assert happened == {'flawline_shadow_frames_total{line="demo_line",outcome="shed"} 1.0'}


@in_loop
async def test_shadow_when_somebody_asks_its_version_by_name_then_it_is_shed(tmp_path):
    """Whoever wants an answer of the candidate has it before the candidate looks at anything unasked."""
    async with on_stage(tmp_path) as stage:
        inspection = await stage.pipeline.inspect(make_request())
        shadow = stage.registry._state.shadows["demo_line"].bundle.batcher

        with shadow.place(time.monotonic() + 20, line="demo_line"):
            stage.shadows.show(inspection)

        assert 'flawline_shadow_frames_total{line="demo_line",outcome="shed"} 1.0' in stage.counts()


@in_loop
async def test_shadow_when_it_looks_then_behind_every_frame_and_without_a_picture(tmp_path):
    """What answers nobody takes no turn from a frame that came meanwhile, and draws nothing."""
    async with on_stage(tmp_path) as stage:
        looked, inspect_by = [], stage.pipeline.inspect_by

        def tell(found, request):
            looked.append((request.priority, request.heatmap))
            return inspect_by(found, request)

        inspection = await stage.pipeline.inspect(make_request(heatmap="png"))
        stage.pipeline.inspect_by = tell
        stage.shadows.show(inspection)
        await stage.looked()

        assert looked == [(Priority.SHADOW, "none")]


@in_loop
async def test_shadow_when_the_service_ends_then_nobody_waits_for_it(tmp_path):
    """A candidate that hangs in a frame holds up no restart."""
    async with on_stage(tmp_path) as stage:
        inspection = await stage.pipeline.inspect(make_request())
        stage.engine.hold()
        stage.shadows.show(inspection)
        await asyncio.to_thread(stage.engine.started.acquire)

        async with asyncio.timeout(10):
            await stage.shadows.finish()


@in_loop
async def test_shadow_when_something_unforeseen_happens_then_it_is_told_as_no_verdict(tmp_path):
    """A candidate that can't be asked is a finding, and not one frame fewer that was compared."""
    async with on_stage(tmp_path) as stage:
        inspection = await stage.pipeline.inspect(make_request())

        def fail(*_):
            raise ValueError

        stage.pipeline.inspect_by = fail
        stage.shadows.show(inspection)
        await stage.looked()

        assert [one.kind for one in stage.shadows.disagreements("demo_line")] == ["no_verdict"]
        assert 'flawline_shadow_frames_total{line="demo_line",outcome="compared"} 1.0' in stage.counts()


@in_loop
async def test_shadow_when_it_still_looks_then_the_next_frame_is_answered_and_shed(tmp_path):
    """A shadow that hangs holds up nobody and gathers no frames."""
    async with on_stage(tmp_path) as stage:
        shadow = stage.registry._state.shadows["demo_line"].bundle
        first = await stage.pipeline.inspect(make_request())
        second = await stage.pipeline.inspect(make_request())
        stage.engine.hold()
        stage.shadows.show(first)
        await asyncio.to_thread(stage.engine.started.acquire)

        stage.shadows.show(second)

        assert len(shadow.batcher._places) == 1
        assert 'flawline_shadow_frames_total{line="demo_line",outcome="shed"} 1.0' in stage.counts()


@in_loop
async def test_shadow_when_frames_are_answered_together_then_it_looks_at_one_of_them(tmp_path):
    """Before it has begun with one frame it takes no other, or it would run many of a line that sends them at once."""
    async with on_stage(tmp_path) as stage:
        answered = await asyncio.gather(*(stage.pipeline.inspect(make_request()) for _ in range(3)))

        for inspection in answered:
            stage.shadows.show(inspection)
        await stage.looked()

        happened = {line for line in stage.counts() if not line.endswith(" 0.0")}
        assert happened == {
            'flawline_shadow_frames_total{line="demo_line",outcome="compared"} 1.0',
            'flawline_shadow_frames_total{line="demo_line",outcome="shed"} 2.0',
        }


@pytest.mark.parametrize(("patience_s", "outcome"), [(20, "compared"), (1e-9, "shed")])
@in_loop
async def test_shadow_when_the_caller_had_little_time_then_it_has_its_own(tmp_path, patience_s, outcome):
    """What is left of a frame's deadline after its answer says nothing of how long a shadow may take."""
    async with on_stage(tmp_path) as stage:
        shadows = Shadows(
            stage.registry, stage.pipeline, stage.telemetry, max_kept=2, patience_s=patience_s, clock=time.monotonic
        )
        inspection = await stage.pipeline.inspect(make_request())
        hasty = replace(inspection.request, received_at=inspection.request.received_at - 60, deadline_s=0.001)

        shadows.show(replace(inspection, request=hasty))
        await asyncio.gather(*shadows._looking.values())

        assert f'flawline_shadow_frames_total{{line="demo_line",outcome="{outcome}"}} 1.0' in stage.counts()


@in_loop
async def test_shadow_when_a_policy_was_chosen_for_its_version_then_judges_by_that(tmp_path):
    """What it would say as the live one is said by the policy that would judge then, not by the bundle's own."""

    def choose():
        stage.registry.activate("demo_line", "2")
        network = network_of(tmp_path / "demo_line" / "2")
        write_policy(tmp_path, make_policy(version="lax", fail_threshold=0.9), network)
        stage.registry.rescan()
        stage.registry.activate_policy("demo_line", "lax")
        stage.registry.activate("demo_line", "1")
        stage.registry.start_shadow("demo_line", "2")

    async with on_stage(tmp_path) as stage:
        await asyncio.to_thread(choose)

        await stage.show(data=DEFECT)
        await stage.looked()

        (kept,) = stage.shadows.disagreements("demo_line")
        assert (kept.live.policy_version, kept.shadow.policy_version, kept.kind) == ("1", "lax", "laxer")


@in_loop
async def test_disagreements_when_several_lines_have_some_then_each_is_told_its_own(tmp_path):
    """Who may know of one line learns nothing of another."""
    async with on_stage(tmp_path, ("left", "right"), policy={"fail_threshold": 0.9}) as stage:
        shown = {}
        for line in ("left", "right"):
            shown[line] = (await stage.show(line=line, data=DEFECT)).inspection_id
            await stage.looked()

        kept = {line: [one.inspection_id for one in stage.shadows.disagreements(line)] for line in shown}
        assert kept == {line: [inspection_id] for line, inspection_id in shown.items()}


@in_loop
async def test_shadow_when_its_engine_fails_then_it_is_told_and_the_process_goes_on(tmp_path):
    """A candidate that breaks is a finding about the candidate: the line stays ready and nothing is restarted."""
    async with on_stage(tmp_path) as stage:
        inspection = await stage.pipeline.inspect(make_request())

        def fail(_):
            raise OSError

        stage.engine.spoil = fail
        stage.shadows.show(inspection)
        await stage.looked()

        (kept,) = stage.shadows.disagreements("demo_line")
        assert (kept.kind, kept.shadow.verdict, kept.shadow.score) == ("no_verdict", Verdict.NO_VERDICT, None)
        assert (stage.registry.is_ready, stage.registry.is_lost) == (True, False)
        assert stage.registry.versions("demo_line")[1].reason == "The engine is lost; start the service again."


@in_loop
async def test_shadow_when_it_is_not_calibrated_for_the_line_then_it_says_what_it_would_live_no_verdict(tmp_path):
    """Thresholds that nobody calibrated make no verdict, in the shadow as in the light."""
    async with on_stage(tmp_path) as stage:
        state = stage.registry._state
        lines = {name: replace(line, calibration=None) for name, line in state.shadows["demo_line"].lines.items()}
        tried = replace(state.shadows["demo_line"], lines=lines)
        stage.registry._state = replace(state, shadows={"demo_line": tried})

        await stage.show()
        await stage.looked()

        (kept,) = stage.shadows.disagreements("demo_line")
        assert (kept.kind, kept.shadow.verdict, kept.shadow.score) == ("no_verdict", Verdict.NO_VERDICT, None)


@in_loop
async def test_shadow_when_many_frames_differ_then_the_oldest_make_room_and_are_counted(tmp_path):
    """What is kept is bounded, and what is lost is known."""
    async with on_stage(tmp_path, policy={"fail_threshold": 0.9}) as stage:
        shown = []
        for _ in range(3):
            shown.append((await stage.show(data=DEFECT)).inspection_id)
            await stage.looked()

        kept = [one.inspection_id for one in stage.shadows.disagreements("demo_line")]
        assert kept == [shown[2], shown[1]]
        assert 'records_dropped_total{sink="disagreements"} 1.0' in stage.telemetry.exposition()[0].decode()
