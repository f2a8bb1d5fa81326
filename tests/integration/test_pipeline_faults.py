"""No fault at any step ever yields `PASS`: each one below is injected into frames that pass without it."""

import asyncio
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.frames import FrameLimits
from service.contract.policy import Verdict
from service.engines.engine import EngineOutput
from service.errors import EngineFailed, FlawlineError
from service.lines.loading import BatcherOptions
from service.lines.registry import Registry
from service.observability.telemetry import Telemetry
from service.pipeline import Pipeline
from service.stores.directory import DirectoryStore
from tests.factories import encode, make_bundle, make_frame
from tests.fakes import in_loop
from tests.gated_engine import GatedEngine
from tests.inspections import make_request

GOOD = encode(make_frame())
TAIL_BYTES = 40  # behind the last pixel come checksums and the end chunk, without which all pixels are still there


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return a store with one line."""
    store = tmp_path_factory.mktemp("store")
    make_bundle(store)
    return store


class Service:
    """A pipeline whose engine can be spoilt."""

    def __init__(self, store, clock=time.monotonic, stuck_after_s=20, decode_workers=0):
        self.engine = GatedEngine()
        options = BatcherOptions(runners=2, max_batch_size=2, max_queue_size=8, stuck_after_s=stuck_after_s)
        telemetry = Telemetry()
        self.registry = Registry(DirectoryStore(store), None, self.engine.open, options, telemetry, clock)
        self.registry.load()
        self.pipeline = Pipeline(
            self.registry,
            limits=FrameLimits(),
            default_deadline_s=20,
            max_deadline_s=20,
            decode_workers=decode_workers,
            stuck_after_s=stuck_after_s,
            tell_of_replaced=telemetry.decoder_replaced,
            clock=clock,
        )

    async def outcomes(self, count=1, **changes):
        """Inspect good frames side by side, and return answers and exceptions."""
        requests = [make_request(**changes) for _ in range(count)]
        return await asyncio.gather(*(self.pipeline.inspect(r) for r in requests), return_exceptions=True)

    def close(self):
        """End every thread."""
        self.engine.release()
        self.registry.close()
        self.pipeline.close()


@pytest.fixture(params=[0, 2], ids=["by the runner", "step by step"])
def service(store, request):
    """Return a fresh service, because some faults are for ever; runners decode and judge, or others do."""
    service = Service(store, decode_workers=request.param)
    yield service
    service.close()


def _raise(error):
    raise error


def _spoil_scores(value):
    return lambda output: EngineOutput(np.full_like(output.scores, value), output.anomaly_maps)


def _spoil_maps(value):
    def spoil(output):
        anomaly_maps = output.anomaly_maps.copy()
        anomaly_maps[:, 3, 5] = value
        return EngineOutput(output.scores, anomaly_maps)

    return spoil


SPOILS = {
    "raises": lambda _: _raise(ValueError("x")),
    "out of memory": lambda _: _raise(MemoryError()),
    "ends the thread": lambda _: _raise(SystemExit()),
    "nan score": _spoil_scores(np.nan),
    "infinite score": _spoil_scores(np.inf),
    "negative infinite score": _spoil_scores(-np.inf),
    "nan in the map": _spoil_maps(np.nan),
    "infinity in the map": _spoil_maps(np.inf),
    "negative infinity in the map": _spoil_maps(-np.inf),
    "no answers": lambda o: EngineOutput(o.scores[:0], o.anomaly_maps[:0]),
    "too few maps": lambda o: EngineOutput(o.scores, o.anomaly_maps[:-1]),
    "too many answers": lambda o: EngineOutput(np.repeat(o.scores, 2), np.repeat(o.anomaly_maps, 2, axis=0)),
}


@in_loop
async def test_inspect_when_nothing_is_wrong_then_passes(service):
    """Without a fault these very frames pass, so the promises below are not empty."""
    (outcome,) = await service.outcomes(data=GOOD)

    assert outcome.judgement.verdict is Verdict.PASS


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS.keys())
@in_loop
async def test_inspect_when_engine_is_spoilt_then_engine_failed(service, spoil):
    """Whatever the engine does wrong, alone or to both frames of a batch, ends as `EngineFailed`."""
    service.engine.spoil = spoil

    alone = await service.outcomes()
    together = await service.outcomes(count=5)

    assert isinstance(alone[0], EngineFailed)
    assert all(isinstance(outcome, FlawlineError) for outcome in together)


@pytest.mark.parametrize("index", [0, 1])
@in_loop
async def test_inspect_when_one_score_of_a_batch_is_spoilt_then_only_its_frame_has_no_verdict(service, index):
    """A number that is not finite fails its own frame; nobody else's, and nobody gets another's score."""
    service.engine.hold()
    waiting = [asyncio.ensure_future(service.pipeline.inspect(make_request())) for _ in range(6)]
    await asyncio.to_thread(service.engine.started.acquire)

    def spoil(output):
        scores = output.scores.copy()
        scores[index : index + 1] = np.nan
        return EngineOutput(scores, output.anomaly_maps)

    service.engine.spoil = spoil
    service.engine.release()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)

    assert all(isinstance(o, EngineFailed) or o.judgement.verdict is Verdict.PASS for o in outcomes)
    assert all(np.isfinite(o.judgement.score) for o in outcomes if not isinstance(o, EngineFailed))


@in_loop
async def test_inspect_when_run_never_ends_then_no_verdict(store):
    """A hanging device fails every frame, and the line with it."""
    service = Service(store, stuck_after_s=0.2)
    service.engine.hold()

    outcomes = await service.outcomes(count=4)

    assert all(isinstance(outcome, FlawlineError) for outcome in outcomes)
    assert not service.registry.is_ready
    service.close()


class JumpingClock:
    """A clock that jumps far ahead at one reading."""

    def __init__(self):
        self.readings_until_jump = None
        self._offset = 0.0

    def __call__(self):
        """Return the time."""
        if self.readings_until_jump is not None:
            self.readings_until_jump -= 1
            if self.readings_until_jump == 0:
                self._offset = 1000.0
        return time.monotonic() + self._offset


@pytest.mark.parametrize("reading", range(1, 11))
@in_loop
async def test_inspect_when_deadline_passes_between_any_two_steps_then_no_verdict(store, reading):
    """Wherever the process was asleep while the deadline passed, the late answer is no answer."""
    clock = JumpingClock()
    service = Service(store, clock=clock)
    clock.readings_until_jump = reading

    (outcome,) = await service.outcomes()

    assert isinstance(outcome, FlawlineError)
    service.close()


@settings(max_examples=60)
@given(data=st.data())
def test_inspect_when_bytes_are_damaged_then_never_passes(store, data):
    """A frame that lost any of its pixels, or is any bytes at all, has no verdict."""
    cut = data.draw(st.integers(0, len(GOOD) - TAIL_BYTES).map(lambda end: GOOD[:end]) | st.binary(max_size=200))

    async def scenario():
        service = Service(store)
        outcomes = await service.outcomes(data=cut)
        service.close()
        return outcomes

    (outcome,) = asyncio.run(scenario())

    assert isinstance(outcome, FlawlineError)
