r"""Record what the official GRNR answers, on a filled ResNet-18 and a drawn texture, for `test_grnr_official.py`.

    git clone https://github.com/hmyao22/GRNR SOURCES/hmyao22+GRNR            # at 8c02ba1; no licence
    .venv/bin/python -m tests.parity.record_grnr SOURCES

Only numbers are written: `recorded/grnr.npz`. The demo's class runs as it is, on the CPU and in float64, with its
commented-out ResNet-18 and a smaller canvas. Substituted, in some cases:

- `described`: the diagonal of the distances stays 0 instead of infinite, so that row means exist and the rule is the
  one that the paper describes. `literal` has the demo's own, by which the first rows of the map are chosen.
- The noise on the neighbours, which the demo draws anew for each model, comes from a seed, and but for `noisy` it is
  a hundred thousand times smaller: in float64 it still keeps a border's repeated neighbours invertible.

However small, noise lends repeated neighbours directions of their own, and so decides the scores at the border. These
are cut, but the least of a grid takes their place, and in two cases it is one of them: of these, no maps are recorded.
"""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tests.parity.official_code import RECORDED, checkout, declare_operators, fill

SEED = 1
CANVAS = 160
MARGIN = 32
# Support, pull, whether rows are chosen as described, share of the demo's noise, reflected margin.
CASES: Mapping[str, tuple[int, float, bool, float, bool]] = {
    "described": (40, 5, True, 1e-5, False),
    "literal": (40, 5, False, 1e-5, False),
    "noisy": (40, 5, True, 1, False),
    "no_pull": (40, 0, True, 1e-5, False),
    "few": (5, 0.1, True, 1e-5, False),
    "reflected": (40, 5, True, 1e-5, True),
}
WITHOUT_MAPS = ("literal", "no_pull")
_CHANNELS = (128, 256)
_ABSENT = ("cv2", "matplotlib", "matplotlib.pyplot")
_MEAN, _STD = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def main() -> None:
    """Write the recording."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", type=Path, help="folder of the checkout")
    source = parser.parse_args().sources / "hmyao22+GRNR"
    declare_operators()
    RECORDED.mkdir(exist_ok=True)
    np.savez_compressed(RECORDED / "grnr.npz", **record(source))


def draw_texture(side: int) -> Tensor:
    """Draw a periodic texture with noise and a bright square, `(3, side, side)` float64 in [0, 1]."""
    along = torch.arange(side, dtype=torch.float64)
    wave = 0.5 + 0.2 * torch.sin(torch.pi / 8 * along)[:, None] * torch.cos(torch.pi / 8 * along)
    noise = np.random.Generator(np.random.PCG64(SEED)).standard_normal((3, side, side))
    texture = wave + 0.03 * torch.from_numpy(noise)
    texture[:, side // 2 : side // 2 + 16, side // 2 - 8 : side // 2 + 8] = 0.9
    return texture.clamp(0, 1)


def record(source: Path) -> dict[str, np.ndarray]:
    """Return everything that is recorded, by name; `__` stands for a slash."""
    stand_ins = {**{name: MagicMock() for name in _ABSENT}, "pytorch_lightning": {"LightningModule": nn.Module}}
    with checkout(source, "demo", stand_ins), _as_of_then():
        return {
            f"{case}__{name}": value
            for case, settings in CASES.items()
            for name, value in _judge(*settings).items()
            if case not in WITHOUT_MAPS or name.startswith(("chosen", "grid", "neighbours"))
        }


@contextmanager
def _as_of_then() -> Iterator[None]:
    """Let the demo run without weights, GPU and names that libraries dropped since."""
    from torchvision.models import resnet18

    with (
        patch("torch.hub.load", lambda *_, **__: resnet18()),
        patch.object(Image, "ANTIALIAS", Image.Resampling.LANCZOS, create=True),
        patch.object(nn.Module, "cuda", lambda self: self),
        patch.object(Tensor, "cuda", lambda self: self),
    ):
        yield


@torch.no_grad()
def _judge(support: int, pull: float, described: bool, noise: float, reflected: bool) -> dict[str, np.ndarray]:
    """Run the demo's class on the texture and record neighbours, choices, scores within the cut, and both maps."""
    import demo

    model = demo.RNR()
    for key, tensor in model.model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            tensor.copy_(torch.from_numpy(fill(key, tuple(tensor.shape), SEED)))
    model.double()
    model.image_size = CANVAS
    generator = torch.Generator().manual_seed(SEED)
    model.beltas = [
        noise * torch.rand((CANVAS // stride) ** 2, channels, 9, generator=generator, dtype=torch.float64)
        for stride, channels in zip((8, 16), _CHANNELS, strict=True)
    ]
    texture = draw_texture(CANVAS - 2 * MARGIN if reflected else CANVAS)
    if reflected:
        texture = nn.functional.pad(texture[None], (MARGIN,) * 4, mode="reflect")[0]
    kept = _Numpy(described)
    grids: list[Tensor] = []
    finish = model.interpolate_scoremap

    def keep_grid(grid: Tensor, cut: int) -> Tensor:
        grids.append(grid)
        return finish(grid, cut)

    gather, lengths = model.get_neighbors, []

    def keep_lengths(features: Tensor, index: int) -> np.ndarray:
        windows: np.ndarray = gather(features, index)  # (n, C, 9)
        lengths.append(np.square(np.delete(windows, 4, axis=2)).sum(axis=(1, 2)))
        return windows

    model.interpolate_scoremap, model.get_neighbors = keep_grid, keep_lengths
    with patch.object(demo, "np", kept):
        maps = model.cal_ano_map((texture[None] - _MEAN) / _STD, filter_number=support, lamda=pull)
    arrays = {f"neighbours{scale}": squares for scale, squares in enumerate(lengths)}
    arrays |= {f"chosen{scale}": np.sort(order[:support]) for scale, order in enumerate(kept.orders)}
    arrays |= {
        f"grid{scale}": _inner(grid, cut).numpy() for scale, (grid, cut) in enumerate(zip(grids, (3, 2), strict=True))
    }
    arrays |= {f"map{scale}": one[::6, ::6] for scale, one in enumerate(maps)}
    return arrays | {"fused": (maps[0] * maps[1])[::4, ::4], "largest": np.array((maps[0] * maps[1]).max())}


def _inner(grid: Tensor, cut: int) -> Tensor:
    return grid[cut:-cut, cut:-cut]


class _Numpy:
    """numpy as the demo sees it: what it sorts is kept, and the diagonal, if wanted, is left alone."""

    def __init__(self, described: bool) -> None:
        self.orders: list[np.ndarray] = []
        self._described = described

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def fill_diagonal(self, distances: np.ndarray, value: float) -> None:
        if not self._described:
            np.fill_diagonal(distances, value)

    def argsort(self, values: np.ndarray) -> np.ndarray:
        self.orders.append(np.argsort(values))
        return self.orders[-1]


if __name__ == "__main__":
    main()
