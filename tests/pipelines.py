"""A pipeline on a store, and what both kinds of frames, cut or not, promise of golden frames."""

import asyncio
import time
from contextlib import asynccontextmanager

import pytest

from service.contract.bundle import load_bundle
from service.contract.frames import FrameLimits
from service.contract.golden import read_golden
from service.engines.ort import OrtEngine
from service.lines.loading import BatcherOptions
from service.lines.registry import Registry
from service.observability.telemetry import Telemetry
from service.pipeline import Pipeline
from service.stores.directory import DirectoryStore
from tests.inspections import make_request


@asynccontextmanager
async def open_pipeline(store, open_engine=OrtEngine, *, limits=None, decode_workers=2, **options):
    """Load a store and return a pipeline on it, with its registry."""
    driven = BatcherOptions(**{"runners": 2, "max_batch_size": 4, "max_queue_size": 8, "stuck_after_s": 20} | options)
    telemetry = Telemetry()
    registry = Registry(DirectoryStore(store), None, open_engine, driven, telemetry, time.monotonic)
    await asyncio.to_thread(registry.load)
    limits = limits or FrameLimits()
    pipeline = Pipeline(
        registry,
        limits=limits,
        default_deadline_s=20,
        max_deadline_s=30,
        decode_workers=decode_workers,
        stuck_after_s=driven.stuck_after_s,
        tell_of_replaced=telemetry.decoder_replaced,
    )
    try:
        yield pipeline, registry
    finally:
        registry.close()
        pipeline.close()


async def assert_golden_frames_hold(store):
    """Send all golden frames of the line at once, and compare what is said of them with what was validated."""
    bundle = load_bundle(store / "demo_line" / "1")
    golden = read_golden(bundle)
    async with open_pipeline(store) as (pipeline, _):
        requests = [make_request(data=bundle.files[answer.file]) for answer in golden.answers]
        inspections = await asyncio.gather(*(pipeline.inspect(request) for request in requests))
    assert [i.judgement.verdict for i in inspections] == [answer.verdict for answer in golden.answers]
    scores = [answer.score for answer in golden.answers]
    assert [i.judgement.score for i in inspections] == pytest.approx(scores, rel=1e-5)
