"""Promises of loading one version: every line of it is proved, every runner is warm, and nothing is kept twice."""

import asyncio
import gc
import time
import weakref

import numpy as np
import pytest

from service.engines.engine import LoneRun
from service.engines.ort import OrtEngine
from service.errors import BundleRefused, Overloaded
from service.lines.loading import BatcherOptions, Loader
from service.observability.telemetry import Telemetry
from tests.factories import make_bundle
from tests.fakes import in_loop

LINES = ("left", "middle", "right")


class Told(OrtEngine):
    """A real engine that notes its runs, and may see one line otherwise than it was validated.

    Attributes:
        runs: frames, and the line of the first one, of each run.
        spoilt: index of that line; None for none.
    """

    def __init__(self, bundle):
        super().__init__(bundle)
        self.runs = []
        self.spoilt = None

    def run(self, frames, line_index):
        """Run, and note it."""
        self.runs.append((len(frames), int(line_index[0])))
        output = super().run(frames, line_index)
        return output._replace(scores=output.scores + 1) if self.runs[-1][1] == self.spoilt else output


class Loaded:
    """A version of three lines, loaded; ends with the test."""

    def __init__(self, store, *, lines=LINES, spoilt=None, **driven):
        self.read, self.engine, self._spoilt = None, None, spoilt
        known = {"runners": 1, "max_batch_size": 2, "max_queue_size": 4, "stuck_after_s": 20}
        driven = BatcherOptions(**known | driven)
        self.loader = Loader(store, self._open, driven, Telemetry(), time.monotonic)
        self.version = self.loader.load("trio", "1", lambda _: lines).version

    def _open(self, bundle):
        self.read, self.engine = weakref.ref(bundle), Told(bundle)
        self.engine.spoilt = self._spoilt
        return self.engine

    def close(self):
        """End its runners."""
        self.version.bundle.batcher.close()
        self.engine.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return a store with a bundle whose network is told the line; to be read only."""
    store = tmp_path_factory.mktemp("store")
    make_bundle(store, "trio", lines=LINES, conditional=True)
    return store


@pytest.fixture
def load(store):
    """Return what loads the version."""
    loaded = []

    def load(**options):
        loaded.append(Loaded(store, **options))
        return loaded[-1]

    yield load
    for one in loaded:
        one.close()


def test_load_when_a_line_far_down_answers_otherwise_then_the_version_is_refused(load):
    """Golden frames of a few lines are kept to ask again, and those of all are asked before any of them is served."""
    with pytest.raises(BundleRefused, match="golden frame"):
        load(spoilt=2)


@pytest.mark.parametrize("spoilt", [0, 1])
def test_prove_again_when_one_of_the_lines_that_are_kept_answers_otherwise_then_it_is_refused(load, spoilt):
    """What serves once more is asked for as many lines as are remembered, and not for the first one alone."""
    loaded = load()
    loaded.loader.prove_again(loaded.version)
    loaded.engine.spoilt = spoilt

    with pytest.raises(BundleRefused, match="golden frame"):
        loaded.loader.prove_again(loaded.version)


def test_load_when_lines_are_many_then_frames_of_each_must_show_a_picture(load):
    """A covered lens passes on no line, also where its golden frames are not kept."""
    version = load().version

    assert len(version.bundle.proofs) < len(LINES)
    assert all(line.least_contrast > 0 for line in version.lines.values())


def test_load_when_only_one_line_is_wanted_then_the_network_is_told_it_by_its_place_in_the_bundle(load):
    """The order of what is served here says nothing of what the network learned."""
    version = load(lines=("right",)).version

    assert {name: line.line_index for name, line in version.lines.items()} == {"right": 2}


def test_load_when_runs_may_be_side_by_side_then_they_have_been(load):
    """No frame is the first to run beside another one, and what that takes is there to be weighed."""
    engine = load(runners=2).engine

    assert [size for size, _ in engine.runs[:8]] == [1, 1, 1, 2, 2, 2, 2, 2]


def test_load_when_there_is_no_time_to_warm_up_then_batches_stay_as_small_as_was_tried(load):
    """The limit is the one that was set; no batch is larger than the engine has run."""
    engine = load(warm_up_limit_s=0.0).engine

    assert {size for size, _ in engine.runs} == {1}


def test_load_when_lines_share_an_engine_then_one_of_them_can_not_take_every_place(load):
    """The batcher is told how many lines there are, or a busy one would shut its neighbours out."""
    batcher = load().version.bundle.batcher

    def place(line):
        return batcher.place(time.monotonic() + 20, line=line)

    with place("left"), place("left"), place("left"):
        with pytest.raises(Overloaded):
            place("left")
        assert place("right")


@in_loop
async def test_load_when_the_engine_has_a_quicker_way_for_a_lone_frame_then_that_is_taken(store):
    """What was tried on golden frames and found equal and quicker answers a frame that is alone."""
    spent_s, alone = 0.0, []

    def clock():
        return time.monotonic() + spent_s

    class Slow(OrtEngine):
        def run(self, frames, line_index):
            nonlocal spent_s
            spent_s += 1.0
            return super().run(frames, line_index)

    def open_engine(bundle):
        engine = Slow(bundle)

        def run(frames, line_index):
            alone.append(len(frames))
            return OrtEngine.run(engine, frames, line_index)

        engine.alone = LoneRun(run, 2.0)
        return engine

    driven = BatcherOptions(runners=1, max_batch_size=1, max_queue_size=4, stuck_after_s=20)
    loader = Loader(store, open_engine, driven, Telemetry(), clock)
    version, _ = await asyncio.to_thread(loader.load, "trio", "1", lambda lines: lines)
    batcher, tried = version.bundle.batcher, len(alone)

    with batcher.place(clock() + 20, line="left") as place:
        await batcher.submit(place, np.zeros((1, 32, 48, 3), np.uint8), 0)

    assert alone[tried:] == [1]
    batcher.close()
    version.bundle.engine.close()


def test_load_when_done_then_the_file_is_held_no_longer(load):
    """The network is in the engine; its bytes would take the same memory once more."""
    loaded = load()
    gc.collect()

    assert loaded.read() is None
