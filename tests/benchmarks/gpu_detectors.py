"""Detectors at their paper's size on one GPU: does a step of each descent fit in bfloat16, and how fast do they judge?

    python tests/benchmarks/gpu_detectors.py                            # all ten; `[training]` is installed, no weights
    python tests/benchmarks/gpu_detectors.py --detectors inp_former dadf --frames 1 8 32
    python tests/benchmarks/gpu_detectors.py --device cpu --config small --most 2 --frames 1      # that it works

Steps: for each stage in its order, one pass over a batch, or one forward and backward step and update at the recipe's
batch size, under bfloat16 autocast; seconds of the second step, and the most memory that torch held. Frames are noise
and backbones untrained: neither changes what a step costs. Judging: milliseconds a frame under the same autocast, and
the multiplications and additions that torch counts of it, as a share of the rate at which this device multiplies
matrices in bfloat16, measured beside it. Where there is no GPU the script says so and ends with exit code 3. On a GPU
it was never run: no machine here had one. What the service runs there is `gpu_engines.py`'s.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models import DETECTORS
from models.detector import Detector, GradientStage, LineConditioned, PassStage, Stage, Step
from training.config import load_config
from training.fitting.detectors import prepare_detector
from training.fitting.optimisers import build_optimiser

NO_GPU = 3
_TIMED = ("inp_former", "dadf")
_MIB = 2**20


class StepCost(NamedTuple):
    """What one stage takes.

    Attributes:
        stage: its name.
        frames: of the batch.
        seconds: of one step, or of one look at a batch.
        memory_mib: the most that torch held meanwhile; None on a CPU, where nobody counts.
        loss: of the step; None for a pass.
    """

    stage: str
    frames: int
    seconds: float
    memory_mib: float | None
    loss: float | None


def steps_of(detector: nn.Module, device: torch.device, most: int) -> list[StepCost]:
    """Go through a detector's stages, one batch each, under bfloat16 autocast, and let it judge one.

    Args:
        detector: on the device; it is fitted to noise, as far as one step goes.
        device: where.
        most: frames of a batch, where a recipe asks for more.

    Raises:
        FloatingPointError: if a loss, a gradient, a map or a score is not finite, or a descent has no gradient.
    """
    assert isinstance(detector, Detector)
    costs = [_step(detector, stage, device, most) for stage in detector.stages()]
    _begin_counting(device)
    detector.eval()
    began = _now(device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        answer = detector(*_told(detector, 1, device))
    if not all(bool(one.isfinite().all()) for one in answer):
        raise FloatingPointError("Its map or score is not finite in bfloat16.")
    return [*costs, StepCost("judging, the first time", 1, _now(device) - began, _most_held(device), None)]


def _step(detector: nn.Module, stage: Stage, device: torch.device, most: int) -> StepCost:
    frames = min(most, stage.recipe.batch_size if isinstance(stage, GradientStage) else 8)
    images, lines = noise(detector, frames, device), torch.zeros(frames, dtype=torch.int64, device=device)
    _begin_counting(device)
    if isinstance(stage, PassStage):
        detector.eval()
        began = _now(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            stage.show(images, lines)
        seconds, loss = _now(device) - began, None
        with torch.no_grad():
            stage.finish()
    else:
        detector.train()
        seconds, loss = _descend(detector, stage, images, lines, device)
    return StepCost(stage.name, frames, seconds, _most_held(device), loss)


def _descend(
    detector: nn.Module, stage: GradientStage, images: Tensor, lines: Tensor, device: torch.device
) -> tuple[float, float]:
    """Make two steps, of which the first one chooses kernels; return the seconds of the second, and its loss."""
    chosen = {id(parameter) for parameter in stage.parameters}
    for parameter in detector.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    optimiser = build_optimiser(stage.recipe, stage.parameters)
    seconds = value = 0.0
    for number in range(2):
        torch.manual_seed(number)
        began = _now(device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                inputs = images if stage.encode is None else stage.encode(images).float()
            loss = torch.stack([term.float() for term in stage.terms(inputs, lines, Step(number)).values()]).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        value = float(loss.detach())
        gradients = [one.grad for one in stage.parameters if one.grad is not None]
        if not (gradients and all(bool(one.isfinite().all()) for one in (loss, *gradients))):
            raise FloatingPointError(f"'{stage.name}' has no finite loss and gradient in bfloat16: {value}.")
        optimiser.step()
        seconds = _now(device) - began
    return seconds, value


def judging_ms(detector: nn.Module, device: torch.device, frames: int, repeats: int = 10) -> tuple[float, float]:
    """Return the milliseconds a frame, median of some runs, and the arithmetic operations a frame that torch counts."""
    told = _told(detector, frames, device)
    detector.eval().requires_grad_(False)  # which the counter would ask about
    spent = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        with FlopCounterMode(display=False) as counted:
            detector(*told)
        for _ in range(repeats):
            began = _now(device)
            detector(*told)
            spent.append(_now(device) - began)
    return 1000 * statistics.median(spent) / frames, counted.get_total_flops() / frames


def matrix_rate(device: torch.device, side: int, repeats: int = 10) -> float:
    """Return how many operations a second this device does in products of square bfloat16 matrices, at its best."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    torch.mm(left, right)
    spent = []
    for _ in range(repeats):
        began = _now(device)
        torch.mm(left, right)
        spent.append(_now(device) - began)
    return 2 * side**3 / min(spent)


def noise(detector: nn.Module, frames: int, device: torch.device) -> Tensor:
    """Return images `(frames, 3, H, W)` of the detector's size, the same for each call."""
    assert isinstance(detector, Detector)
    generator = torch.Generator().manual_seed(0)
    return torch.rand(frames, 3, *detector.image_size, generator=generator).to(device)


def _told(detector: nn.Module, frames: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return what a detector is asked about: images, and their lines where it wants to know them."""
    images, lines = noise(detector, frames, device), torch.zeros(frames, dtype=torch.int64, device=device)
    return (images, lines) if isinstance(detector, LineConditioned) else (images,)


def _begin_counting(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _most_held(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / _MIB if device.type == "cuda" else None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _print_steps(names: Sequence[str], config: str, device: torch.device, most: int) -> dict[str, nn.Module]:
    print("| detector | stage | frames | s a step | memory, MiB | loss |\n| --- | --- | --- | --- | --- | --- |")
    fitted = {}
    for name in names:
        detector = prepare_detector(load_config(config, name, ["product=texture"]), "untrained", (), device).module
        for cost in steps_of(detector, device, most):
            memory = "-" if cost.memory_mib is None else f"{cost.memory_mib:.0f}"
            loss = "-" if cost.loss is None else f"{cost.loss:.3g}"
            print(f"| {name} | {cost.stage} | {cost.frames} | {cost.seconds:.3f} | {memory} | {loss} |", flush=True)
        if name in _TIMED:
            fitted[name] = detector
    return fitted


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", default=list(DETECTORS), choices=list(DETECTORS))
    parser.add_argument("--config", default="paper", choices=("paper", "small"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--most", type=int, default=64, help="frames of a step at most, for smaller devices")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 8, 32], help="batches of judging")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here, or this torch can't use it.", file=sys.stderr)
        return NO_GPU
    device = torch.device(arguments.device)
    print(torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", torch.__version__)
    fitted = _print_steps(arguments.detectors, arguments.config, device, arguments.most)
    rate = matrix_rate(device, 8192 if device.type == "cuda" else 1024)
    print(f"\nProducts of matrices in bfloat16: {rate / 1e12:.2f} T operations a second")
    print("| detector | frames | ms a frame | G operations a frame | share |\n| --- | --- | --- | --- | --- |")
    for name, detector in fitted.items():
        for frames in arguments.frames:
            ms, operations = judging_ms(detector, device, frames)
            share = operations / (ms / 1000) / rate
            print(f"| {name} | {frames} | {ms:.2f} | {operations / 1e9:.1f} | {share:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
