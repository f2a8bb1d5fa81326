"""Promises of the TensorRT engine and of the GPU's buffers, on stand-ins with the libraries' real names."""

import importlib
import sys
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import service.engines
from service.contract.bundle import Bundle, load_bundle
from service.engines.engine import EngineOptions
from service.engines.opening import open_engine
from service.engines.ort import _GpuSession
from service.engines.promise import Promise
from service.errors import BundleRefused, EngineFailed
from tests.factories import HEIGHT, POOL, WIDTH, make_bundle, make_frame
from tests.fakes import grey_level
from tests.gpu_stand_in import Cuda, Status, TensorRt

MAP = (HEIGHT // POOL, WIDTH // POOL)
FRAMES = {"frames": (np.uint8, (HEIGHT, WIDTH, 3))}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """Return a verified bundle of the tiny graph."""
    return load_bundle(make_bundle(tmp_path_factory.mktemp("store")))


@pytest.fixture
def gpu(monkeypatch):
    """Put the stand-ins where the libraries would be, and return both with the modules that import them afresh."""
    cuda = Cuda()
    tensorrt = TensorRt(cuda, MAP, FRAMES)
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    sys.modules["cuda.bindings"].runtime = cuda.module()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", sys.modules["cuda.bindings"].runtime)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt.module())
    for name in ("cuda", "trt"):
        monkeypatch.delitem(sys.modules, f"service.engines.{name}", raising=False)
    yield cuda, tensorrt, importlib.import_module("service.engines.trt")
    for name in ("cuda", "trt"):  # whoever comes next must not meet the stand-ins
        sys.modules.pop(f"service.engines.{name}", None)
        vars(service.engines).pop(name, None)


@pytest.fixture
def options(tmp_path):
    """Return options of batches of at most four frames, with a cache of this test's own."""
    return EngineOptions(device="tensorrt", max_batch_size=4, cache_directory=tmp_path / "cache")


def frames_of(count):
    """Return `(count, HEIGHT, WIDTH, 3)` uint8 and as many line indices."""
    frames = np.stack([make_frame(HEIGHT, WIDTH, seed=seed, defect=seed % 2 == 1) for seed in range(count)])
    return frames, np.zeros(count, np.int64)


def test_build_plan_when_the_graph_is_taken_then_is_strongly_typed_and_covers_every_batch(gpu, bundle, options):
    """Precision is the ONNX's, and one plan serves batches from one to the largest."""
    _, tensorrt, trt = gpu

    record = trt.build_plan(bundle, options, 2, 2**20)
    trt.build_plan(bundle, options, 2, 2**20)

    assert tensorrt.flags == [1 << 1] * 2
    shape = (HEIGHT, WIDTH, 3)
    assert tensorrt.profiles == {"frames": ((1, *shape), (2, *shape), (4, *shape))}
    assert (record.architecture, record.tensorrt, record.precision, record.max_batch) == (
        "sm_90",
        "10.16.1.11",
        "fp32",
        4,
    )
    assert tensorrt.timing == [b"", b"measured"]


@pytest.mark.parametrize(
    ("fails", "said", "words"),
    [
        pytest.param(set(), "no such operator", "no such operator", id="parser"),
        pytest.param({"build"}, None, "no kernel", id="builder"),
        pytest.param({"profile"}, None, "batch sizes 1, 2, 4", id="profile"),
    ],
)
def test_build_plan_when_tensorrt_refuses_then_repeats_what_it_said(gpu, bundle, options, fails, said, words):
    """Whoever builds is told what TensorRT did not like, and no plan is kept."""
    _, tensorrt, trt = gpu
    tensorrt.fails, tensorrt.said = fails, said

    with pytest.raises(BundleRefused, match=words):
        trt.build_plan(bundle, options, 2, 2**20)

    assert not list(options.cache_directory.rglob("*.plan"))


def test_build_plan_when_the_bundle_is_int8_then_says_which_precision_to_take(gpu, bundle, options):
    """A graph that was quantised for CPUs is not tried on a GPU."""
    int8 = replace(bundle, manifest=bundle.manifest.model_copy(update={"precision": "int8"}))

    with pytest.raises(BundleRefused, match="fp16"):
        gpu[2].build_plan(int8, options, 2, 2**20)


def test_build_command_when_run_then_names_the_plan(gpu, bundle, tmp_path):
    """The command builds where FLAWLINE_DEVICE=tensorrt looks."""
    from service.__main__ import commands

    arguments = ["build-engine", str(bundle.path), "--max-batch-size", "8", "--cache", str(tmp_path / "plans")]
    result = CliRunner().invoke(commands, arguments)

    assert result.exit_code == 0, result.output
    assert "plan: sm_90-10.16.1.11-fp32, batches of 1 to 8" in result.output
    assert len(list((tmp_path / "plans").rglob("*.plan"))) == 1


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["enqueued", "recorded"])
def test_run_when_batches_of_every_size_come_then_answers_each(gpu, bundle, options, cuda_graphs):
    """Sizes below, at and above the plan's largest batch are answered, again and again, recorded or not."""
    cuda, _, trt = gpu
    options = replace(options, cuda_graphs=cuda_graphs, instances=2)
    trt.build_plan(bundle, options, 4, 2**20)
    engine = open_engine(bundle, options)

    for count in (1, 3, 4, 1, 3, 4, 9, 1):
        frames, line_index = frames_of(count)
        answer = engine.run(frames, line_index)
        np.testing.assert_array_equal(answer.scores, grey_level(frames, MAP).scores)
        np.testing.assert_array_equal(answer.anomaly_maps, grey_level(frames, MAP).anomaly_maps)

    assert engine.device == "tensorrt:cuda:0"
    assert ("cudaGraphLaunch" in cuda.calls) is cuda_graphs
    engine.close()
    assert cuda.held == {}
    with pytest.raises(EngineFailed, match="unloaded"):
        engine.run(*frames_of(1))


def test_run_when_an_answer_is_kept_then_the_next_batch_does_not_change_it(gpu, bundle, options):
    """Answers are copies of the buffers, which the next run overwrites."""
    gpu[2].build_plan(bundle, options, 4, 2**20)
    engine = open_engine(bundle, options)
    dark, bright = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8), np.full((1, HEIGHT, WIDTH, 3), 255, np.uint8)

    first = engine.run(dark, np.zeros(1, np.int64))
    engine.run(bright, np.zeros(1, np.int64))

    assert first.scores.tolist() == [0.0]
    assert first.anomaly_maps.max() == 0.0


def test_run_when_the_gpu_refuses_once_then_the_next_run_answers(gpu, bundle, options):
    """A fault that leaves the device whole costs its own batch and no other."""
    cuda, tensorrt, trt = gpu
    trt.build_plan(bundle, options, 4, 2**20)
    engine = open_engine(bundle, options)
    cuda.fails["cudaMemcpyAsync"] = Status.cudaErrorMemoryAllocation

    with pytest.raises(EngineFailed, match="cudaErrorMemoryAllocation"):
        engine.run(*frames_of(1))
    tensorrt.fails = {"execute"}
    with pytest.raises(EngineFailed, match="TensorRT refused"):
        engine.run(*frames_of(1))
    tensorrt.fails = set()

    assert len(engine.run(*frames_of(2)).scores) == 2


def test_run_when_the_gpu_is_lost_then_every_later_run_fails_without_touching_it(gpu, bundle, options):
    """A sticky error is remembered, so that the golden probe fails as well and the process ends."""
    cuda, _, trt = gpu
    trt.build_plan(bundle, options, 4, 2**20)
    engine = open_engine(bundle, options)
    cuda.is_lost = True

    with pytest.raises(EngineFailed, match="lost"):
        engine.run(*frames_of(1))
    calls = len(cuda.calls)
    with pytest.raises(EngineFailed, match="lost"):
        engine.run(*frames_of(1))

    assert len(cuda.calls) == calls


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(np.zeros((1, HEIGHT, WIDTH, 3), np.float32), id="type"),
        pytest.param(np.zeros((1, WIDTH, HEIGHT, 3), np.uint8), id="shape"),
    ],
)
def test_run_when_frames_do_not_fit_then_fails_before_they_are_copied(gpu, bundle, options, frames):
    """Bytes of another shape would land in the buffers without a word."""
    gpu[2].build_plan(bundle, options, 4, 2**20)

    with pytest.raises(EngineFailed, match="not what the network takes"):
        open_engine(bundle, options).run(frames, np.zeros(1, np.int64))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no plan", "build-engine"),
        ("a plan of another release", "build it again"),
        ("no memory for a context", "no memory"),
        ("no GPU", "no GPU"),
        ("no memory for buffers", "cudaErrorMemoryAllocation"),
    ],
)
def test_engine_when_it_cannot_open_then_says_why_and_gives_memory_back(gpu, bundle, options, what, words):
    """An engine that does not open leaves nothing on the device, and its sentence says what to do."""
    cuda, tensorrt, trt = gpu
    if what != "no plan":
        trt.build_plan(bundle, options, 4, 2**20)
    tensorrt.fails = {"a plan of another release": {"deserialise"}, "no memory for a context": {"context"}}.get(
        what, set()
    )
    cuda.fails = {
        "no GPU": {"cudaGetDeviceCount": Status.cudaErrorInsufficientDriver},
        "no memory for buffers": {"cudaMalloc": Status.cudaErrorMemoryAllocation},
    }.get(what, {})

    with pytest.raises(EngineFailed, match=words):
        open_engine(bundle, options)

    assert cuda.held == {}


def test_engine_when_its_second_instance_cannot_open_then_the_first_gives_its_memory_back(gpu, bundle, options):
    """Half an engine is none."""
    cuda, tensorrt, trt = gpu
    trt.build_plan(bundle, options, 4, 2**20)
    tensorrt.contexts_left = 1

    with pytest.raises(EngineFailed, match="no memory"):
        open_engine(bundle, replace(options, instances=2))

    assert cuda.held == {}


def test_engine_when_larger_batches_are_wanted_than_the_plan_takes_then_says_how_to_build(gpu, bundle, options):
    """A setting that the plan can't keep is refused at the start, not at the first large batch."""
    gpu[2].build_plan(bundle, options, 4, 2**20)

    with pytest.raises(EngineFailed, match="--max-batch-size 8"):
        open_engine(bundle, replace(options, max_batch_size=8))


def test_engine_when_the_plan_is_of_another_network_then_refuses(gpu, bundle, options):
    """What the plan takes and gives is compared with the manifest, as for every runtime."""
    gpu[2].build_plan(bundle, options, 4, 2**20)
    gpu[1].map_shape = (3, 3)

    with pytest.raises(BundleRefused, match="size"):
        open_engine(bundle, options)


def test_gpu_session_when_bound_to_buffers_then_answers_as_the_cpu_engine(gpu, bundle):
    """ONNX Runtime itself computes into the lane's fixed buffers; here they lie on the host, so that it can."""
    promise = Promise.of(bundle.manifest)
    session = _GpuSession(bundle, promise, EngineOptions(device="cpu", max_batch_size=4), device_type="cpu")
    cpu = open_engine(bundle, EngineOptions())

    for count in (1, 4, 2, 1):
        frames, line_index = frames_of(count)
        outputs, expected = session.run(frames, line_index), cpu.run(frames, line_index)
        np.testing.assert_array_equal(outputs["score"], expected.scores)
        np.testing.assert_array_equal(outputs["anomaly_map"], expected.anomaly_maps)
    session.close()

    assert gpu[0].held == {}
