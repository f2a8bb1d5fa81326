"""One fitted run in float32, fp16 and int8, on ONNX Runtime and OpenVINO: CPU time a frame, and whether verdicts agree.

    flawline train LINE --detector dadf --backbone resnet18.a1_in1k --weights FILE
    python tests/benchmarks/precision.py RUN_DIRECTORY [--keep-float PATTERN ...] [--rounds 40] [--precisions int8]

Each precision is exported anew as `flawline export` does, gate included, and with thresholds of its own; one that the
gate refuses is shown with its sentence. Time is that of the process with one thread inside each run, so that other work
hardly moves it; engines take turns, and the ratio is the median of neighbouring turns. Verdicts are counted on all test
frames of the line, those near a threshold included.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from service.contract.bundle import Bundle, load_bundle
from service.contract.frames import FrameLimits
from service.contract.policy import Verdict, inspected_mask, judge
from service.engines.engine import Device, EngineOptions, InferencePrecision
from service.engines.opening import open_engine
from service.errors import FlawlineError
from training.data.detect import read_dataset
from training.data.loader import load_frame
from training.data.samples import NORMAL
from training.jobs import export_run
from training.run_directory import read_request

WARM = 5
CPU_ENGINES: tuple[tuple[Device, InferencePrecision], ...] = (("cpu", "f32"), ("openvino", "f32"), ("openvino", "bf16"))


def export(run: Path, precision: str, keep_float: list[str], store: Path) -> Bundle:
    """Export a run in one precision into a store of its own and read the bundle as the service does."""
    copy = shutil.copytree(run, store / "run")  # an export keeps what it was asked for in the run's directory
    export_run(copy, store, {"precision": precision, "keep_float": keep_float}, 1)
    (manifest,) = store.glob("*/*/manifest.json")
    return load_bundle(manifest.parent)


def verdicts(bundle: Bundle, run: Callable, frames: np.ndarray) -> list[Verdict]:
    """Judge frames of the first line by the bundle's own policy."""
    manifest = bundle.manifest
    policy, rule = bundle.policies[manifest.lines[0]], manifest.output.score_rule
    window = manifest.input.window(1, 1)
    inspected = inspected_mask(policy, manifest.output.map_height, manifest.output.map_width, window=window)
    found = []
    for frame in frames:
        scores, maps = run(frame[None], np.zeros(1, np.int64))
        found.append(judge(float(scores[0]), maps[0], policy, rule, window, inspected).verdict)
    return found


def time_side_by_side(runs: dict[str, Callable], frames: np.ndarray, rounds: int) -> dict[str, list[float]]:
    """Return CPU milliseconds of each turn, by engine."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    line_index = np.zeros(1, np.int64)
    for turn in range(rounds + WARM):
        frame = frames[turn % len(frames)][None]
        for name, run in runs.items():
            begun = time.process_time()
            run(frame, line_index)
            if turn >= WARM:
                taken[name].append(1000 * (time.process_time() - begun))
    return taken


def main() -> None:
    """Export, time and judge, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--precisions", nargs="+", default=["fp16", "int8"])
    parser.add_argument("--keep-float", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    request = read_request(options.run)
    samples = [sample for sample in read_dataset(request.lines[0].folder).samples if sample.split == "test"]
    frames = np.stack([load_frame(sample.path, request.config.frame_input, FrameLimits()) for sample in samples])
    refused: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        bundles = {"fp32": export(options.run, "fp32", [], Path(folder) / "fp32")}
        for precision in options.precisions:
            try:
                bundles[precision] = export(options.run, precision, options.keep_float, Path(folder) / precision)
            except FlawlineError as error:
                refused.append(f"{precision}: {error.sentence}")
        runs, judged = {}, {}
        for precision, bundle in bundles.items():
            for device, hint in CPU_ENGINES:
                if hint == "bf16" and precision != "fp32":
                    continue
                name = f"{precision} {device}" + (" bf16" if hint == "bf16" else "")
                try:
                    engine = open_engine(bundle, EngineOptions(device=device, inference_precision=hint))
                except FlawlineError as error:
                    refused.append(f"{name}: {error.sentence}")
                    continue
                runs[name] = engine.run
                judged[name] = verdicts(bundle, engine.run, frames)
    taken = time_side_by_side(runs, frames, options.rounds)
    reference, exact = taken["fp32 cpu"], judged["fp32 cpu"]
    normal = sum(sample.label == NORMAL for sample in samples)
    print(
        f"{request.config.detector}, {request.lines[0].name}: {normal} good frames and {len(samples) - normal} others"
    )
    print("| engine | CPU ms a frame | times as fast as fp32 | equal verdicts | PASS for FAIL or the reverse |")
    print("| --- | --- | --- | --- | --- |")
    for name, times in taken.items():
        ratio = statistics.median(before / after for before, after in zip(reference, times, strict=True))
        equal = sum(before is after for before, after in zip(exact, judged[name], strict=True))
        opposite = sum(
            {before, after} == {Verdict.PASS, Verdict.FAIL} for before, after in zip(exact, judged[name], strict=True)
        )
        print(f"| {name} | {statistics.median(times):.2f} | {ratio:.2f} | {equal} of {len(exact)} | {opposite} |")
    for sentence in refused:
        print(f"refused: {sentence}")


if __name__ == "__main__":
    main()
