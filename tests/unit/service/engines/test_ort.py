"""Promises of the ONNX Runtime engine: the graph that was promised, on the device that was asked for, or a refusal."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.contract.bundle import Bundle, load_bundle
from service.engines.engine import EngineOptions
from service.engines.opening import open_engine
from service.engines.ort import OrtEngine
from service.errors import BundleRefused, EngineFailed
from tests.factories import HEIGHT, WIDTH, make_bundle, make_frame, make_graph, make_runner, make_two_faced


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """Return a verified bundle of the tiny graph."""
    return load_bundle(make_bundle(tmp_path_factory.mktemp("store")))


def frames_of(count):
    """Return `(count, HEIGHT, WIDTH, 3)` uint8 and as many line indices."""
    frames = np.stack([make_frame(HEIGHT, WIDTH, seed=seed, defect=seed % 2 == 1) for seed in range(count)])
    return frames, np.zeros(count, np.int64)


def test_run_when_frames_come_alone_or_together_then_answers_are_equal(bundle):
    """One frame's answer does not depend on its batch mates."""
    engine = OrtEngine(bundle)
    frames, line_index = frames_of(4)

    together = engine.run(frames, line_index)
    alone = [engine.run(frames[i : i + 1], line_index[i : i + 1]) for i in range(4)]

    np.testing.assert_allclose(together.scores, [answer.scores[0] for answer in alone], rtol=1e-6)
    np.testing.assert_allclose(together.anomaly_maps, np.concatenate([a.anomaly_maps for a in alone]), rtol=1e-6)
    assert engine.device == "cpu"


def test_run_when_called_from_several_threads_then_answers_are_right(bundle):
    """One session serves several runners at once."""
    engine = OrtEngine(bundle)
    frames, line_index = frames_of(4)
    expected = engine.run(frames, line_index).scores

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: engine.run(frames[[i % 4]], line_index[:1]).scores[0], range(200)))

    np.testing.assert_allclose(answers, np.tile(expected, 50), rtol=1e-6)


def test_alone_when_more_threads_are_allowed_then_says_the_same_to_the_last_bit(bundle):
    """What a frame gets does not depend on whether it was alone."""
    engine = OrtEngine(bundle, EngineOptions(threads_alone=3))
    frames, line_index = frames_of(4)

    ordinary = engine.run(frames, line_index)
    lone = engine.alone.run(frames, line_index)

    np.testing.assert_array_equal(lone.scores, ordinary.scores)
    np.testing.assert_array_equal(lone.anomaly_maps, ordinary.anomaly_maps)
    assert engine.alone.speedup == 3


def test_alone_when_no_more_threads_are_allowed_then_is_not_offered(bundle):
    """A second session that could do no more is not opened."""
    engine = OrtEngine(bundle, EngineOptions(threads_per_run=2, threads_alone=2))

    assert engine.alone is None
    assert engine.size_bytes == len(bundle.model)


def test_alone_when_engine_is_closed_then_is_refused(bundle):
    """Nothing runs on an engine that was given up, whichever way."""
    engine = OrtEngine(bundle, EngineOptions(threads_alone=2))
    engine.close()

    with pytest.raises(EngineFailed):
        engine.alone.run(*frames_of(1))


def test_run_when_network_is_conditional_then_follows_the_line_index(tmp_path):
    """A class-conditional network is told which line each frame shows."""
    bundle = load_bundle(make_bundle(tmp_path, "pair", lines=("a", "b"), conditional=True))
    frames, _ = frames_of(2)

    scores = OrtEngine(bundle).run(frames, np.array([0, 1], np.int64)).scores

    run = make_runner(bundle.model)
    expected = [run(frames[[i]], np.array([i], np.int64))[0][0] for i in (0, 1)]
    np.testing.assert_allclose(scores[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(scores[1], expected[1], rtol=1e-6)


@pytest.mark.parametrize(
    "line_index",
    [
        pytest.param(np.array([0, 2], np.int64), id="behind the last"),
        pytest.param(np.array([-1, 0], np.int64), id="negative"),
        pytest.param(np.array([0], np.int64), id="too few"),
        pytest.param(np.array([0, 1], np.int32), id="type"),
    ],
)
def test_run_when_a_line_is_not_among_the_bundles_then_fails(tmp_path, line_index):
    """A graph would take another line's prompt for a negative index, so the host looks before the graph does."""
    bundle = load_bundle(make_bundle(tmp_path, "pair", lines=("a", "b"), conditional=True))
    frames, _ = frames_of(2)

    with pytest.raises(EngineFailed, match="line"):
        OrtEngine(bundle).run(frames, line_index)


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(np.zeros((1, HEIGHT, WIDTH, 3), np.float32), id="type"),
        pytest.param(np.zeros((1, WIDTH, HEIGHT, 3), np.uint8), id="shape"),
    ],
)
def test_run_when_frames_do_not_fit_then_fails(bundle, frames):
    """Whatever the runtime raises arrives as one error."""
    engine = OrtEngine(bundle)

    with pytest.raises(EngineFailed, match="runtime failed"):
        engine.run(frames, np.zeros(1, np.int64))


def graph(inputs, outputs, extra_answers=0):
    """Return a graph of these inputs and outputs that answers zeros, so many more than it was given frames."""
    nodes = [
        helper.make_node("Shape", [inputs[0].name], ["given"], start=0, end=1),
        helper.make_node("Add", ["given", "extra"], ["answers"]),
    ]
    constants = [numpy_helper.from_array(np.array([extra_answers], np.int64), "extra")]
    for output in outputs:
        kind = output.type.tensor_type.elem_type
        sizes = [dim.dim_value for dim in output.type.tensor_type.shape.dim][1:]
        constants.append(numpy_helper.from_array(np.array(sizes, np.int64), f"{output.name}_sizes"))
        shape = f"{output.name}_shape"
        nodes.append(helper.make_node("Concat", ["answers", f"{output.name}_sizes"], [shape], axis=0))
        zero = helper.make_tensor("zero", kind, [1], [0])
        nodes.append(helper.make_node("ConstantOfShape", [shape], [output.name], value=zero))
    body = helper.make_graph(nodes, "odd", inputs, outputs, constants)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def tensor(name, kind=TensorProto.FLOAT, shape=("B",)):
    """Describe one input or output."""
    return helper.make_tensor_value_info(name, kind, list(shape))


FRAMES = tensor("frames", TensorProto.UINT8, ("B", HEIGHT, WIDTH, 3))
SCORE, MAP = tensor("score"), tensor("anomaly_map", shape=("B", HEIGHT // 2, WIDTH // 2))


@pytest.mark.parametrize(
    ("inputs", "outputs", "sentence"),
    [
        pytest.param([tensor("images", TensorProto.UINT8, ("B", 2, 2, 3))], [SCORE, MAP], "must take", id="input name"),
        pytest.param([FRAMES, tensor("more")], [SCORE, MAP], "must take", id="another input"),
        pytest.param([FRAMES], [SCORE], "must take", id="no map"),
        pytest.param([tensor("frames", shape=("B", HEIGHT, WIDTH, 3))], [SCORE, MAP], "type or rank", id="input type"),
        pytest.param([FRAMES], [tensor("score", shape=("B", 1)), MAP], "type or rank", id="score rank"),
        pytest.param(
            [tensor("frames", TensorProto.UINT8, ("B", WIDTH, HEIGHT, 3))], [SCORE, MAP], "size", id="input size"
        ),
        pytest.param([FRAMES], [SCORE, tensor("anomaly_map", shape=("B", 3, 3))], "size", id="map size"),
        pytest.param(
            [tensor("frames", TensorProto.UINT8, (1, HEIGHT, WIDTH, 3))], [SCORE, MAP], "batch size", id="fixed batch"
        ),
    ],
)
def test_engine_when_graph_is_not_the_promised_one_then_refuses(bundle, inputs, outputs, sentence):
    """Names, types, ranks, sizes and the dynamic batch are looked at before any frame is."""
    odd = replace(bundle, model=graph(inputs, outputs))

    with pytest.raises(BundleRefused, match=sentence):
        OrtEngine(odd)


def test_run_when_answer_has_another_shape_then_fails(bundle):
    """What the graph leaves open is checked after each run: here there is one answer too many."""
    engine = OrtEngine(replace(bundle, model=graph([FRAMES], [SCORE, MAP], extra_answers=1)))

    with pytest.raises(EngineFailed, match="another shape"):
        engine.run(*frames_of(2))


def test_engine_when_graph_is_broken_then_refuses(bundle):
    """A graph that the runtime can't load is the bundle's fault."""
    model = onnx.load_from_string(make_graph())
    model.graph.node[0].op_type = "NoSuchOperator"

    with pytest.raises(BundleRefused, match="can't load"):
        OrtEngine(replace(bundle, model=model.SerializeToString()))


def test_engine_when_bytes_look_like_another_format_then_runs_the_graph_that_was_looked_into(bundle):
    """What `onnx` reads is what runs, even where somebody left the check of the bundle out."""
    two_faced = make_two_faced(bundle.model, make_graph(reference=0.0))
    assert onnx.load_from_string(two_faced).graph == onnx.load_from_string(bundle.model).graph
    frames, line_index = frames_of(2)

    answer = OrtEngine(replace(bundle, model=two_faced)).run(frames, line_index)

    np.testing.assert_array_equal(answer.scores, OrtEngine(bundle).run(frames, line_index).scores)


def test_engine_when_device_is_not_there_then_fails_and_does_not_fall_back(bundle):
    """Asking for a GPU on a machine without one is refused, never served by the CPU without a word."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this installation has CUDA")

    with pytest.raises(EngineFailed, match="CUDAExecutionProvider"):
        open_engine(bundle, EngineOptions(device="cuda"))


@pytest.mark.parametrize("memory_arena", ["keep", "shrink", "off"])
def test_run_when_the_memory_arena_is_set_then_answers_are_the_same_bits(bundle, memory_arena):
    """What memory is kept for changes no answer."""
    frames, line_index = frames_of(3)

    answer = OrtEngine(bundle, EngineOptions(memory_arena=memory_arena)).run(frames, line_index)

    np.testing.assert_array_equal(answer.anomaly_maps, OrtEngine(bundle).run(frames, line_index).anomaly_maps)


def test_close_when_a_run_comes_later_then_it_fails(bundle):
    """An engine that was unloaded answers nothing, and says why."""
    engine = OrtEngine(bundle)

    engine.close()

    with pytest.raises(EngineFailed, match="unloaded"):
        engine.run(*frames_of(1))
    assert engine.size_bytes == len(bundle.model)
