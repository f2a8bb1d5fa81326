"""Builds what tests need, small and real: frames, encoded images, a tiny ONNX graph, a manifest, a complete bundle.

Everything is seeded, so the same arguments give the same bytes. Nothing here knows torch; the graph is built by
hand and its golden answers come from onnxruntime.

The tiny graph compares each pixel with one reference colour, averages the distance over cells of 2 x 2 pixels, and
scores a frame by the mean of its highest hundredth: good frames (grey noise about the reference) stay below 0.04, and
the bright square of `make_frame(..., defect=True)` reaches about 0.5.
"""

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from service.contract.bundle import (
    CALIBRATION_FILE,
    MODEL_FILE,
    POLICY_FILE,
    REPORT_FILE,
    DataRecord,
    GoldenRule,
    LineRecord,
    Manifest,
    MetricRecord,
    OutputSpec,
    ParityRecord,
    line_file,
    seal,
)
from service.contract.calibration import Calibration
from service.contract.frames import FrameLimits, decode_image, fit_to_input
from service.contract.geometry import InputSpec, Tiling
from service.contract.golden import GoldenAnswer, write_golden
from service.contract.policy import Policy, PolicyFile, ScoreRule, Verdict, inspected_mask, judge, may_judge
from service.contract.tiling import Run, by_tiles

HEIGHT, WIDTH = 32, 48  # not square, so that a swapped height and width shows
FRAME_HEIGHT, FRAME_WIDTH = 64, 80  # another shape than the input, so that a forgotten resize shows
REFERENCE = 110 / 255  # the good parts' grey level, in [0, 1]
POOL = 2  # pixels of the input along each side of one map cell
TOP_FRACTION = 0.01
GOOD_PARTS = 60
FIRST_GOLDEN_SEED = 1000


def make_frame(
    height: int = FRAME_HEIGHT, width: int = FRAME_WIDTH, seed: int = 0, *, defect: bool = False
) -> NDArray[np.uint8]:
    """Return a good part's frame `(height, width, 3)` uint8 RGB, grey noise; with `defect` a bright square lies on it.

    The square covers a quarter of each side, from three eighths down and half way across.
    """
    generator = np.random.default_rng(seed)
    noise = generator.normal(0, 8, (height, width, 3))
    pixels = np.clip(255 * REFERENCE + noise, 0, 255).astype(np.uint8)
    if defect:
        top, left = 3 * height // 8, width // 2
        pixels[top : top + max(1, height // 4), left : left + max(1, width // 4)] = 250
    return pixels


def encode(pixels: NDArray[Any], image_format: str = "PNG", **options: Any) -> bytes:
    """Encode an array as Pillow understands it; `image_format` and `options` are those of `Image.save`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=image_format, **options)
    return buffer.getvalue()


def make_graph(
    height: int = HEIGHT, width: int = WIDTH, *, reference: float = REFERENCE, conditional_lines: int = 0
) -> bytes:
    """Return a tiny graph as the bytes of `model.onnx`.

    Args:
        height: of the input; a multiple of `POOL`.
        width: of the input; a multiple of `POOL`.
        reference: grey level in [0, 1] that the graph takes for good; another one changes every map.
        conditional_lines: 0 for one input; else the graph has a second input `line_index` int64 `[B]`, and line i takes
            `reference + i / 100` for good.
    """
    h, w = height // POOL, width // POOL
    colours = np.array([[reference + i / 100] for i in range(max(1, conditional_lines))], np.float32)
    constants = {
        "colours": colours if conditional_lines else colours.reshape(1, 1, 1, 1),
        "full_scale": np.float32(255),
        "channel_axis": np.array([3], np.int64),
        "cell_axis": np.array([1], np.int64),
        "pixel_axes": np.array([1, 2], np.int64),
        "cells": np.array([-1, h * w], np.int64),
        "top": np.array([max(1, int(h * w * TOP_FRACTION))], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["frames"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["real", "full_scale"], ["unit"]),
        helper.make_node("Sub", ["unit", "good"], ["difference"]),
        helper.make_node("Abs", ["difference"], ["distance"]),
        helper.make_node("ReduceMean", ["distance", "channel_axis"], ["grey"], keepdims=0),
        helper.make_node("Unsqueeze", ["grey", "cell_axis"], ["planes"]),
        helper.make_node("AveragePool", ["planes"], ["pooled"], kernel_shape=[POOL, POOL], strides=[POOL, POOL]),
        helper.make_node("Squeeze", ["pooled", "cell_axis"], ["anomaly_map"]),
        helper.make_node("Reshape", ["anomaly_map", "cells"], ["flat"]),
        helper.make_node("TopK", ["flat", "top"], ["largest", "where"], axis=1),
        helper.make_node("ReduceMean", ["largest", "cell_axis"], ["score"], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info("frames", TensorProto.UINT8, ["B", height, width, 3])]
    if conditional_lines:
        inputs.append(helper.make_tensor_value_info("line_index", TensorProto.INT64, ["B"]))
        nodes[:0] = [
            helper.make_node("Gather", ["colours", "line_index"], ["chosen"], axis=0),
            helper.make_node("Unsqueeze", ["chosen", "pixel_axes"], ["good"]),
        ]
    else:
        nodes[:0] = [helper.make_node("Identity", ["colours"], ["good"])]
    graph = helper.make_graph(
        nodes,
        "distance_from_good",
        inputs,
        [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["B"]),
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["B", h, w]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def make_two_faced(model: bytes, hidden: bytes) -> bytes:
    """Return bytes that `onnx` reads as one graph, and whoever goes by marks as another in ONNX Runtime's own format.

    Args:
        model: the bytes of `model.onnx` that `onnx` shall see.
        hidden: those of the graph for whoever looks for the mark.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "hidden.ort"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(written)
        options.add_session_config_entry("session.save_model_format", "ORT")
        onnxruntime.InferenceSession(hidden, options, providers=["CPUExecutionProvider"])
        other = written.read_bytes()
    # A flatbuffer: where its root lies, the mark, and offsets from wherever they stand. The root's place becomes the
    # first fields of a model: its version, and a producer's name of four letters, the mark.
    head = b"\x08\x0a\x12\x04ORTM"
    shift = int.from_bytes(head[:4], "little") - int.from_bytes(other[:4], "little")
    tag = b"\xa2\x1f"  # a field that ONNX does not know, and passes over with all that it holds
    length = shift + len(other) - len(head) - len(tag) - 4
    varint = bytes([*(length >> 7 * i & 0x7F | 0x80 for i in range(3)), length >> 21])
    begun = head + tag + varint
    return begun + bytes(shift + 8 - len(begun)) + other[8:] + model


def make_runner(model: bytes) -> Run:
    """Return a network on onnxruntime's CPU; `line_index` may be left out, which means the first line.

    Args:
        model: the bytes of `model.onnx`; only a class-conditional graph looks at `line_index`.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    conditional = len(session.get_inputs()) == 2

    def run(
        frames: NDArray[np.uint8], line_index: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        feed: dict[str, NDArray[Any]] = {"frames": frames}
        if conditional:
            feed["line_index"] = np.zeros(len(frames), np.int64) if line_index is None else line_index
        scores, maps = session.run(["score", "anomaly_map"], feed)
        return scores, maps

    return run


def make_input(height: int = HEIGHT, width: int = WIDTH, margin: int = 0, tiles: Tiling | None = None) -> InputSpec:
    """Return an input whose resized frame is `margin` pixels larger on each side than what is cropped from it."""
    rows, columns = (1, 1) if tiles is None else (tiles.rows, tiles.columns)
    down, across = (0, 0) if tiles is None else (tiles.overlap_height, tiles.overlap_width)
    return InputSpec(
        height=height,
        width=width,
        resize_height=height + (rows - 1) * (height - down) + 2 * margin,
        resize_width=width + (columns - 1) * (width - across) + 2 * margin,
        tiles=tiles,
    )


def make_policy(**overrides: Any) -> Policy:
    """Return a policy whose thresholds fit `make_graph` and `make_frame`, with some fields replaced."""
    fields: dict[str, Any] = {
        "version": "1",
        "review_threshold": 0.1,
        "fail_threshold": 0.2,
        "region_threshold": 0.2,
        "map_floor": 0.025,
    }
    return Policy(**fields | overrides)


def make_self_policy(**overrides: Any) -> Policy:
    """Return a policy that measures frames by themselves: defects of `make_frame` are far above 8, good ones below."""
    fields = {"review_threshold": 6.0, "fail_threshold": 8.0, "region_threshold": 6.0, "map_floor": 0.0}
    return make_policy(**{**fields, "calibration": "self", "least_spread": 1e-4, **overrides})


def network_of(bundle: Path) -> str:
    """Return what policy files name that were written for a bundle's scores, given its folder."""
    return Manifest.model_validate_json((bundle / "manifest.json").read_bytes()).network


def write_policy(store: Path, policy: Policy, network: str | None = None, line: str = "demo_line") -> Path:
    """Write a policy file of a line into a store, and return it; `network` is what it names."""
    file = store / line / "policies" / f"{policy.version}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(PolicyFile(**policy.model_dump(), network=network).model_dump_json(exclude_none=True))
    return file


def make_line_record(**overrides: Any) -> LineRecord:
    """Return what a bundle of the tiny graph says of one of its lines, with some fields replaced."""
    fields: dict[str, Any] = {
        "data": DataRecord(
            name="seeded noise",
            digest="0" * 64,
            fitted_on=1,
            calibrated_on=GOOD_PARTS,
            tested_on_normal=10,
            tested_on_anomalous=10,
        ),
        "review_rate": 0.1,
        "fail_rate": 0.05,
        "metrics": {"image_auroc": MetricRecord(value=1.0, low=0.9, high=1.0)},
    }
    return LineRecord(**fields | overrides)


def make_uncalibrated_record() -> LineRecord:
    """Return what a bundle says of a line that no good part stands behind."""
    data = DataRecord(
        name="none", digest="0" * 64, fitted_on=0, calibrated_on=0, tested_on_normal=0, tested_on_anomalous=0
    )
    return make_line_record(data=data, review_rate=None, fail_rate=None, metrics={})


def make_manifest(**overrides: Any) -> Manifest:
    """Return a complete manifest of the tiny graph, without files, with some fields replaced."""
    name = overrides.get("name", "demo_line")
    lines = overrides.get("lines", (name,))
    fields: dict[str, Any] = {
        "name": name,
        "lines": lines,
        "version": "1",
        "detector": "distance_from_good",
        "backbone": None,
        "hyperparameters": {"reference": REFERENCE, "pool": POOL},
        "input": make_input(),
        "output": OutputSpec(
            map_height=HEIGHT // POOL,
            map_width=WIDTH // POOL,
            score_rule=ScoreRule(kind="top_fraction_mean", fraction=TOP_FRACTION),
        ),
        "opset": 20,
        "precision": "fp32",
        "by_line": {line: make_line_record() for line in lines},
        "evaluation_resolution": "model",
        "parity": ParityRecord(frames=3, map_difference=0.0, score_difference=0.0, verdicts_differ=0),
        "golden": GoldenRule(map_tolerance=1e-3, score_tolerance=1e-3),
        "seed": 0,
        "libraries": {"numpy": np.__version__},
        "git_revision": None,
        "created_at": "2026-11-22T12:00:00+00:00",
        "files": {},
    }
    return Manifest(**fields | overrides)


def bundle_files(
    name: str = "demo_line",
    version: str = "1",
    *,
    height: int = HEIGHT,
    width: int = WIDTH,
    margin: int = 0,
    tiles: Tiling | None = None,
    lines: tuple[str, ...] = (),
    conditional: bool = False,
    calibrated: bool = True,
    policy: Mapping[str, Any] | None = None,
    policies: Mapping[str, Mapping[str, Any]] | None = None,
    reference: float = REFERENCE,
    extra_files: Mapping[str, bytes] | None = None,
    **manifest: Any,
) -> dict[str, bytes]:
    """Return every file of a valid bundle by relative path, its golden answers taken from onnxruntime.

    Args:
        name: of the bundle.
        version: of the bundle.
        height: of the network's input; a multiple of `POOL`.
        width: of the network's input; a multiple of `POOL`.
        margin: pixels that a centre crop cuts from each side of the resized frame.
        tiles: how frames are cut; overlaps are multiples of `POOL`.
        lines: the product lines; empty means one, called `name`.
        conditional: whether the graph takes a `line_index`.
        calibrated: whether the lines have a calibration.
        policy: fields that differ from `make_policy`, in every line.
        policies: further fields that differ, by line.
        reference: what the graph takes for good.
        extra_files: more files, named by the manifest.
        manifest: fields that differ from `make_manifest`.
    """
    lines = lines or (name,)
    spec = make_input(height, width, margin, tiles)
    rules = {line: make_policy(**{**(policy or {}), **(policies or {}).get(line, {})}) for line in lines}
    output = OutputSpec(
        map_height=height // POOL,
        map_width=width // POOL,
        score_rule=ScoreRule(kind="top_fraction_mean", fraction=TOP_FRACTION),
    )
    if not calibrated:
        manifest.setdefault("by_line", dict.fromkeys(lines, make_uncalibrated_record()))
    record = make_manifest(name=name, version=version, lines=lines, **{"input": spec, "output": output} | manifest)
    model = make_graph(height, width, reference=reference, conditional_lines=len(lines) if conditional else 0)
    run = by_tiles(make_runner(model), record.input, record.output.score_rule)
    good = np.stack([fit_to_input(make_frame(seed=seed), spec) for seed in range(GOOD_PARTS)])
    files = {MODEL_FILE: model}
    for index, line in enumerate(lines):
        scores, maps = run(good, np.full(GOOD_PARTS, index, np.int64))
        calibration = Calibration.from_good_parts(scores, maps.max(axis=(1, 2)), float(np.median(maps)))
        if calibrated:
            files[line_file(line, lines, CALIBRATION_FILE)] = calibration.to_bytes()
        files[line_file(line, lines, POLICY_FILE)] = rules[line].model_dump_json(indent=2).encode() + b"\n"
    files |= {
        REPORT_FILE: b"<!doctype html><title>demo</title>\n",
        **_golden_files(run, record, rules),
        **(extra_files or {}),
    }
    return seal(record, files)


def make_bundle(store: Path, name: str = "demo_line", version: str = "1", **options: Any) -> Path:
    """Write a valid bundle to `store/name/version`, return that folder; options are those of `bundle_files`."""
    return write_files(store / name / version, bundle_files(name, version, **options))


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files by relative path into a folder, which is made, and return it."""
    for relative, data in files.items():
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return folder


def reseal(folder: Path, **manifest: Any) -> Path:
    """Repair manifest and digests after a test changed a bundle's files on purpose, and replace manifest fields."""
    record = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    files = {name: (folder / name).read_bytes() for name in record.files}
    return write_files(folder, seal(record.model_copy(update=manifest), files))


def _golden_files(run: Run, record: Manifest, policies: Mapping[str, Policy]) -> dict[str, bytes]:
    answers, pngs, maps = [], [], []
    wanted = [(line, defect) for line in record.lines for defect in (False, False, True)]
    for index, (line, defect) in enumerate(wanted):
        policy = policies[line]
        inspected = inspected_mask(policy, *record.map_size, window=record.input.window(1, 1))
        png = encode(make_frame(seed=FIRST_GOLDEN_SEED + index, defect=defect))
        frame = decode_image(png, FrameLimits(), record.input.resize_target)
        line_index = np.array([record.lines.index(line)], np.int64)
        score, anomaly_map = run(fit_to_input(frame.pixels, record.input)[None], line_index)
        window = record.input.window(frame.height, frame.width)
        verdict = Verdict.NO_VERDICT
        if may_judge(policy, is_calibrated=record.by_line[line].is_calibrated):
            rule = record.output.score_rule
            verdict = judge(float(score[0]), anomaly_map[0], policy, rule, window, inspected).verdict
        answers.append(
            GoldenAnswer(
                line=line,
                file=f"golden/{index}.png",
                description="a bright square" if defect else "a good part",
                score=float(score[0]),
                verdict=verdict,
            )
        )
        pngs.append(png)
        maps.append(anomaly_map[0])
    return write_golden(answers, pngs, np.stack(maps))
