"""How good are a backbone's features for finding defects? A plain coreset nearest-neighbour probe on real lines.

    python tests/benchmarks/nearest_neighbour_probe.py [--seeds 5] [--only embedded] [--student FILE]

Setting: frames at 256 x 256, maps of strides 8 and 16 as they are, each averaged over 3 x 3 (with zeros around it), the
coarser one enlarged to the finer grid; 100 training frames, 20,000 of their positions drawn at random, a greedy coreset
of 2,000 as bank; the score of a frame is the largest distance of its positions to the bank. The seed draws frames,
positions and coreset.

The lines only measure: nothing that is shipped was fitted to them or chosen by them.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from models.backbones import CnnBackbone, untrained_weights
from service.contract.frames import FrameLimits, decode_image, fit_to_input
from service.contract.geometry import plain_input
from training.backbones.weights import resolve_weights
from training.measuring.metrics import auroc

SIZE = 256
LAYERS = (2, 3)  # strides 8 and 16
TRAINING_FRAMES, POOL, BANK = 100, 20_000, 2_000
PROJECTION = 128  # dimensions in which the coreset is chosen; distances of the score are exact


def probe(backbone: CnnBackbone, line: Path, seeds: int) -> list[float]:
    """Return the image AUROC of a line for each seed."""
    scores, labels = probe_scores(backbone, line, range(seeds))
    return [float(auroc(row, labels).value) for row in scores]


def probe_scores(
    backbone: CnnBackbone, line: Path, seeds: Sequence[int]
) -> tuple[list[NDArray[np.float64]], NDArray[np.bool_]]:
    """Return the scores of a line's test frames for each seed, and which frames are defective."""
    training = sorted((line / "train" / "good").iterdir())
    tests = sorted(path for path in (line / "test").rglob("*") if path.is_file())
    labels = np.array([path.parent.name != "good" for path in tests])
    seen = {path: positions(backbone, path) for path in tests}
    known: dict[Path, Tensor] = {}
    results = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        chosen = [training[i] for i in rng.choice(len(training), min(TRAINING_FRAMES, len(training)), replace=False)]
        known |= {path: positions(backbone, path) for path in chosen if path not in known}
        pool = torch.cat([known[path] for path in chosen])
        pool = pool[torch.from_numpy(rng.choice(len(pool), min(POOL, len(pool)), replace=False))]
        bank = pool[coreset(pool, rng)]
        results.append(np.array([float(torch.cdist(seen[path], bank).min(dim=1).values.max()) for path in tests]))
    return results, labels


@torch.inference_mode()
def positions(backbone: CnnBackbone, path: Path) -> Tensor:
    """Return the features of every position of a frame, `(1024, C)`."""
    spec = plain_input(SIZE, SIZE)
    pixels = fit_to_input(decode_image(path.read_bytes(), FrameLimits(), (SIZE, SIZE)).pixels, spec)
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    fine, coarse = (functional.avg_pool2d(x, 3, 1, 1) for x in backbone(image))
    coarse = functional.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat((fine, coarse), dim=1)[0].flatten(1).T.contiguous()


def coreset(pool: Tensor, rng: np.random.Generator) -> NDArray[np.int64]:
    """Choose `BANK` rows greedily, each the farthest from those chosen before."""
    directions = rng.standard_normal((pool.shape[1], PROJECTION)).astype(np.float32)
    points = pool.numpy() @ directions
    squared = np.einsum("nd,nd->n", points, points)
    chosen = np.empty(min(BANK, len(points)), np.int64)
    nearest = np.full(len(points), np.inf, np.float32)
    latest = int(rng.integers(len(points)))
    for number in range(len(chosen)):
        chosen[number] = latest
        nearest = np.minimum(nearest, squared + squared[latest] - 2 * (points @ points[latest]))
        latest = int(nearest.argmax())
    return chosen


def contestants(weights: Path, student: Path | None) -> dict[str, Callable[[], CnnBackbone]]:
    """Name the backbones that are compared."""

    def load(name: str, file: Path | None) -> CnnBackbone:
        backbone = CnnBackbone(name, LAYERS)
        backbone.load_weights(resolve_weights(name, file, (weights,)).state_dict)
        return backbone

    def untrained() -> CnnBackbone:
        backbone = CnnBackbone("mobilenetv1_100", LAYERS)
        backbone.load_weights(untrained_weights("mobilenetv1_100"))
        return backbone

    return {
        "mobilenetv1_100": lambda: load("mobilenetv1_100", None),
        "resnet18": lambda: load("resnet18", None),
        "untrained mobilenetv1_100": untrained,
        "embedded": lambda: load("embedded", student),
    }


def main() -> None:
    """Print one row for each backbone."""
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=root.parent / "shared", help="folder with data/ and weights/")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", action="append", help="names of backbones; all by default")
    parser.add_argument("--student", type=Path, help="another file for the embedded backbone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = sorted(path for path in (options.shared / "data").iterdir() if path.is_dir())
    print(f"I-AUROC, mean of {options.seeds} bank seeds (lowest to highest)")
    print(f"| features | {' | '.join(line.name for line in lines)} | mean |")
    for name, build in contestants(options.shared / "weights", options.student).items():
        if options.only and name not in options.only:
            continue
        started = time.perf_counter()
        backbone = build()
        table = np.array([probe(backbone, line, options.seeds) for line in lines])
        rows = [*table, table.mean(axis=0)]
        cells = " | ".join(f"{row.mean():.3f} ({row.min():.3f}-{row.max():.3f})" for row in rows)
        print(f"| {name} | {cells} |  {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
