"""One bundle on one GPU: does it answer as validated, how fast is it by batch size, and do copies overlap computing?

    pip install -c constraints.txt '.[gpu]'                      # on the GPU machine; no torch needed
    python tests/benchmarks/gpu_engines.py BUNDLE [--devices cuda ort-tensorrt tensorrt] [--largest 16] [--seconds 3]

For each device: the golden set is replayed (parity gate: maps, scores, verdicts); then frames a second by batch size,
with one instance and with two, beside the same session fed from memory that already lies on the device (`raw`), which
is the limit. Two instances that reach more than one, at the same batch size, are copies that run beside computing; ONNX
Runtime's own profile is written next to the table for whoever wants to see them. `tensorrt` builds its plan first.
Where there is no GPU the script says so and ends with exit code 3. It was never run: no machine here had one.
"""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from service.contract.bundle import Bundle, load_bundle
from service.contract.golden import read_golden, replay
from service.engines.engine import EngineOptions
from service.engines.opening import open_engine
from service.errors import FlawlineError

NO_GPU = 3


def frames_a_second(run: Any, frames: np.ndarray, callers: int, seconds: float) -> float:
    """Return frames a second of so many callers side by side, for about so long."""
    line_index = np.zeros(len(frames), np.int64)
    end = time.perf_counter() + seconds

    def call() -> int:
        count = 0
        while time.perf_counter() < end:
            run(frames, line_index)
            count += len(frames)
        return count

    begun = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        total = sum(pool.map(lambda _: call(), range(callers)))
    return total / (time.perf_counter() - begun)


def raw_frames_a_second(bundle: Bundle, frames: np.ndarray, seconds: float, profile: Path) -> float:
    """Return the limit: a bare CUDA session whose inputs lie on the device and whose outputs stay there."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(profile)
    session = onnxruntime.InferenceSession(
        bundle.model, options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    binding = session.io_binding()
    feeds = {"frames": frames, "line_index": np.zeros(len(frames), np.int64)}
    for one in session.get_inputs():
        binding.bind_ortvalue_input(one.name, onnxruntime.OrtValue.ortvalue_from_numpy(feeds[one.name], "cuda", 0))
    for one in session.get_outputs():
        binding.bind_output(one.name, "cuda")
    session.run_with_iobinding(binding)
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        session.run_with_iobinding(binding)
        count += len(frames)
    rate = count / (time.perf_counter() - begun)
    session.end_profiling()
    return rate


def has_gpu() -> bool:
    """Tell whether CUDA finds a device."""
    try:
        from service.engines.cuda import architecture

        print(f"GPU: {architecture()}")
    except (ImportError, FlawlineError) as error:
        print(f"There is no GPU to measure here: {error}", file=sys.stderr)
        return False
    return True


def measure(bundle: Bundle, options: EngineOptions, sizes: list[int], seconds: float, raw: dict[int, float]) -> None:
    """Check one device against the golden set and print its rows."""
    golden = read_golden(bundle)
    for graphs in (False, True):
        for instances in (1, 2):
            engine = open_engine(bundle, replace(options, instances=instances, cuda_graphs=graphs))
            replay(bundle, golden, engine.run)
            for size in sizes:
                shape = (size, bundle.manifest.input.height, bundle.manifest.input.width, 3)
                frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
                for _ in range(3):
                    engine.run(frames, np.zeros(size, np.int64))
                rate = frames_a_second(engine.run, frames, instances, seconds)
                share = f"{rate / raw[size]:.2f}" if size in raw else "-"
                recorded = "recorded" if graphs else "plain"
                print(f"| {options.device} | {recorded} | {instances} | {size} | {rate:.0f} | {share} |", flush=True)
            engine.close()


def main() -> int:
    """Print one table for all devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--devices", nargs="+", default=["cuda"])
    parser.add_argument("--largest", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3)
    arguments = parser.parse_args()
    if not has_gpu():
        return NO_GPU
    bundle = load_bundle(arguments.bundle)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= arguments.largest]
    folder = Path(tempfile.mkdtemp(prefix="flawline-gpu-"))
    shape = (bundle.manifest.input.height, bundle.manifest.input.width, 3)
    raw = {
        size: raw_frames_a_second(bundle, np.zeros((size, *shape), np.uint8), arguments.seconds, folder / f"raw-{size}")
        for size in sizes
    }
    print(f"profiles: {folder}")
    print("| device | runs | instances | batch | frames/s | share of raw |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size, rate in raw.items():
        print(f"| raw CUDA session | plain | 1 | {size} | {rate:.0f} | 1.00 |")
    for device in arguments.devices:
        options = EngineOptions(device=device, max_batch_size=sizes[-1], cache_directory=folder / "plans")
        try:
            if device == "tensorrt":
                from service.engines.trt import build_plan

                build_plan(bundle, options, sizes[-1], 4 * 2**30)
            measure(bundle, options, sizes, arguments.seconds, raw)
        except FlawlineError as error:
            print(f"refused on {device}: {error.sentence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
