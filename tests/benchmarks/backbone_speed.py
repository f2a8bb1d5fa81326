"""How long a backbone takes for one frame in ONNX Runtime on one core, two backbones side by side.

    python tests/benchmarks/backbone_speed.py [--size 256] [--rounds 60]

Both graphs return the maps of strides 8 and 16 of one frame. They take turns within one run, so that a busy machine
slows both alike; the ratio is the median of the ratios of neighbouring turns. Random weights: speed does not know.
"""

import argparse
import io
import statistics
import time
import warnings

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from models.backbones import CnnBackbone, untrained_weights

LAYERS = (2, 3)  # strides 8 and 16


class _AsTuple(nn.Module):
    """Returns the maps as a tuple, which is what the exporter wants."""

    def __init__(self, backbone: CnnBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(images))


def open_session(name: str, size: int) -> tuple[onnxruntime.InferenceSession, int]:
    """Export a backbone for one frame and load it for one core; also return its number of parameters."""
    backbone = CnnBackbone(name, LAYERS)
    backbone.load_weights(untrained_weights(name))
    graph = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package announces its successor
        torch.onnx.export(_AsTuple(backbone), (torch.rand(1, 3, size, size),), graph, dynamo=False, opset_version=18)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.getvalue(), options, providers=["CPUExecutionProvider"])
    return session, sum(parameter.numel() for parameter in backbone.parameters())


def main() -> None:
    """Print milliseconds of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs=2, default=["embedded", "mobilenetv1_100"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    image = np.random.default_rng(0).random((1, 3, options.size, options.size), dtype=np.float32)
    sessions, parameters = zip(*(open_session(name, options.size) for name in options.names), strict=True)
    taken: list[list[float]] = [[], []]
    for number in range(options.rounds + 5):
        for which, session in enumerate(sessions):
            begun = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: image})
            if number >= 5:  # the first turns warm up
                taken[which].append((time.perf_counter() - begun) * 1e3)
    print(f"ONNX Runtime {onnxruntime.__version__}, one core, {options.size} x {options.size}, {options.rounds} turns")
    print("| backbone | parameters | ms per frame, median (fastest) |")
    for name, count, times in zip(options.names, parameters, taken, strict=True):
        print(f"| {name} | {count:,} | {statistics.median(times):.2f} ({min(times):.2f}) |")
    ratio = statistics.median(first / second for first, second in zip(*taken, strict=True))
    print(f"{options.names[0]} takes {ratio:.2f} of the time of {options.names[1]} (fastest turns: ", end="")
    print(f"{min(taken[0]) / min(taken[1]):.2f})")


if __name__ == "__main__":
    main()
