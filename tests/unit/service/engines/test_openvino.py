"""Promises of the OpenVINO engine, kept by the real runtime on this machine's CPU."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnx
import pytest

from service.contract.bundle import Bundle, load_bundle
from service.contract.golden import read_golden, replay
from service.engines.engine import EngineOptions
from service.engines.opening import open_engine
from service.engines.ort import OrtEngine
from service.errors import BundleRefused, EngineFailed
from tests.factories import HEIGHT, WIDTH, make_bundle, make_frame, make_graph

pytest.importorskip("openvino", reason="the extra `openvino` is not installed")

OPTIONS = EngineOptions(device="openvino", instances=2)
OTHER_FORMAT = '<?xml version="1.0"?><net name="other" version="11"><layers></layers><edges></edges></net>'


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """Return a verified bundle of two lines whose tiny graph is told which one it looks at."""
    folder = make_bundle(tmp_path_factory.mktemp("store"), "pair", lines=("a", "b"), conditional=True)
    return load_bundle(folder)


@pytest.fixture(scope="module")
def engine(bundle):
    """Open it once."""
    return open_engine(bundle, OPTIONS)


def frames_of(count):
    """Return `(count, HEIGHT, WIDTH, 3)` uint8 and lines that take turns."""
    frames = np.stack([make_frame(HEIGHT, WIDTH, seed=seed, defect=seed % 2 == 1) for seed in range(count)])
    return frames, np.arange(count, dtype=np.int64) % 2


def test_engine_when_golden_frames_are_replayed_then_answers_as_validated(bundle, engine):
    """The very check that a line passes before it goes live."""
    replay(bundle, read_golden(bundle), engine.run)

    assert engine.device == "openvino:cpu"
    assert engine.size_bytes > 0


def test_run_when_called_from_several_threads_then_answers_are_onnx_runtimes(bundle, engine):
    """Instances serve runners side by side, at several batch sizes; 1e-5: float32 in another order."""
    frames, line_index = frames_of(4)
    expected = OrtEngine(bundle).run(frames, line_index)

    def run(turn):
        count = 1 + turn % 4
        return count, engine.run(frames[:count], line_index[:count])

    with ThreadPoolExecutor(4) as pool:
        for count, answer in pool.map(run, range(40)):
            np.testing.assert_allclose(answer.scores, expected.scores[:count], rtol=1e-5)
            np.testing.assert_allclose(answer.anomaly_maps, expected.anomaly_maps[:count], rtol=1e-5, atol=1e-6)


def test_run_when_it_is_alone_then_more_threads_say_the_same(bundle):
    """Which way a frame goes depends on what else goes on, and its score must not."""
    engine = open_engine(bundle, replace(OPTIONS, threads_alone=2))
    frames, line_index = frames_of(2)

    alone = engine.alone.run(frames, line_index)

    assert engine.alone.speedup == 2
    for way, other in zip(alone, engine.run(frames, line_index), strict=True):
        np.testing.assert_array_equal(way, other)
    engine.close()
    with pytest.raises(EngineFailed, match="unloaded"):
        engine.alone.run(frames, line_index)


def test_engine_when_bytes_look_like_another_format_then_runs_the_graph_that_was_looked_into(bundle, engine):
    """OpenVINO finds its own format in whatever bytes begin with it; what `onnx` reads is what runs."""
    model = onnx.load_from_string(bundle.model)
    model.producer_name = OTHER_FORMAT
    frames, line_index = frames_of(2)

    answer = open_engine(replace(bundle, model=model.SerializeToString()), OPTIONS).run(frames, line_index)

    np.testing.assert_array_equal(answer.scores, engine.run(frames, line_index).scores)


def test_engine_when_imported_then_openvino_reports_to_nobody():
    """Its import tells its maker of it over the internet, from a process of its own, unless kept from it."""
    program = (
        "import sys, service.engines.openvino; print([m for m in sys.modules if m.startswith('openvino_telemetry.')])"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_engine_when_a_lone_run_may_take_no_more_threads_then_there_is_one_way(engine):
    """A second network would take memory for nothing."""
    assert engine.alone is None


@pytest.mark.parametrize(
    ("frames", "line_index"),
    [
        pytest.param(np.zeros((1, WIDTH, HEIGHT, 3), np.uint8), np.zeros(1, np.int64), id="shape"),
        pytest.param(np.zeros((1, HEIGHT, WIDTH, 3), np.float32), np.zeros(1, np.int64), id="type"),
        pytest.param(np.zeros((1, HEIGHT, WIDTH, 3), np.uint8), np.array([2], np.int64), id="line"),
    ],
)
def test_run_when_input_does_not_fit_then_fails(engine, frames, line_index):
    """What the network was not made for is refused before the runtime sees it."""
    with pytest.raises(EngineFailed):
        engine.run(frames, line_index)


def test_engine_when_graph_is_another_then_refuses(bundle):
    """The manifest's shapes are looked at before any frame is."""
    with pytest.raises(BundleRefused, match="size"):
        open_engine(replace(bundle, model=make_graph(WIDTH, HEIGHT, conditional_lines=2)), OPTIONS)


def test_close_when_a_run_comes_later_then_it_fails(bundle):
    """An engine that was unloaded answers nothing, and says why."""
    engine = open_engine(bundle, OPTIONS)

    engine.close()

    with pytest.raises(EngineFailed, match="unloaded"):
        engine.run(*frames_of(1))
