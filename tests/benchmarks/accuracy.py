"""How well a detector does on real lines, with its backbone and with an untrained one, over several seeds.

Each row is one complete run, from the folder of frames to a bundle, with the committed configuration. The untrained
backbone is the control: what pretraining has to beat. Nothing is chosen on the test frames.

    .venv/bin/python tests/benchmarks/accuracy.py ../shared/data/solar_cell ../shared/data/pcb --seeds 1 2 3
    .venv/bin/python tests/benchmarks/accuracy.py ../shared/data/pcb --backbone mobilenetv1_100
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from training.config import load_config
from training.progress import SilentReporter, choose_reporter
from training.run import train
from training.run_directory import LineRequest, RunRequest

_FIGURES = ("i_auroc", "i_ap", "p_auroc", "aupro")


def measure(line: Path, detector: str, backbone: str | None, seed: int, weights: Path, *, untrained: bool) -> list[str]:
    """Run one line once and return its row."""
    overrides = [f"seed={seed}", *([f"backbone={backbone}"] if backbone else [])]
    config = load_config("small", detector, overrides)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        request = RunRequest(
            name=line.name,
            lines=(LineRequest(name=line.name, folder=line),),
            store=Path(folder) / "store",
            config=config,
            weights="untrained" if untrained else None,
            weight_folders=(weights,),
        )
        finished = train(request, Path(folder) / "run", SilentReporter())
    minutes = (time.perf_counter() - begun) / 60
    metrics = finished.report.lines[0].metrics
    figures = [metrics[name].value if name in metrics else None for name in _FIGURES]
    kind = "untrained" if untrained else (config.backbone or "none")
    told = ["-" if value is None else f"{value:.4f}" for value in figures]
    return [line.name, detector, kind, str(seed), *told, f"{minutes:.1f}"]


def main() -> None:
    """Measure every line with every seed and print a Markdown table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="+", type=Path)
    parser.add_argument("--detector", default="inp_former")
    parser.add_argument("--backbone", help="instead of the configuration's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--weights", type=Path, default=Path("../shared/weights"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without-control", action="store_true", help="leave the untrained backbone out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"| line | detector | backbone | seed | {' | '.join(_FIGURES)} | minutes |")
    print("|---|---|---|---|---|---|---|---|---|")
    means: dict[tuple[str, str], list[float]] = {}
    for line in arguments.lines:
        for untrained in (False,) if arguments.without_control else (False, True):
            for seed in arguments.seeds:
                row = measure(
                    line, arguments.detector, arguments.backbone, seed, arguments.weights, untrained=untrained
                )
                means.setdefault((row[0], row[2]), []).append(float(row[4]))
                print(f"| {' | '.join(row)} |", flush=True)
    reporter = choose_reporter(Console(stderr=True))
    rows = [(line, kind, f"{statistics.mean(values):.4f}") for (line, kind), values in means.items()]
    reporter.table("mean I-AUROC over seeds", ("line", "backbone", "i_auroc"), rows)


if __name__ == "__main__":
    main()
